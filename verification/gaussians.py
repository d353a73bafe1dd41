"""Figures 6.1 to 6.3 of Montanari's lecture: classifying Gaussians, the reduced flows of their limits beside SGD.

Time is t = kε with step sizes s_k = ε ξ/2, for which the limit is the W₂ flow of R/2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from scipy import optimize, special
from torch import Tensor

import mfsde
from mfsde import EmpiricalMeasure, limit
from mfsde.analysis import wasserstein
from mfsde.analysis.check import identity, inequality
from mfsde.limit.characteristics import quadrature
from mfsde.scenarios import IsotropicGaussians, OnlineGaussians, OnlineVariableSelection, VariableSelection
from mfsde.scenarios.isotropic_gaussians import NormOfGaussian

from .item import Finding, claim, item, misprint

FLOAT64 = torch.float64
ZETA_QUARTER = -0.8132784052618915  # ζ(¼)
PRECISION = 1e-3  # of the risk of the radial flow, to t = 10
TIGHT: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-10}
LOOSE: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-8}  # far below PRECISION
DOUBLE_SPEED = "the captions' ε is probably s_k itself: with s_k = ε and t = kε the flow is that of R, twice as fast"


# Figure 6.1


@item(
    source="002, Figure 6.1",
    statement="ρ̄_t solves ∂_tρ̄ = ∂_r(ρ̄ ∂_rψ), ψ = V + ∫U_d dρ̄: dR/dt = −2∫|ψ'|² dρ̄; SGD follows it to fluctuations "
    "of its samples and of N = 800; as d = ∞, inf R = 0 exactly for Δ ≥ Δ∞, q(a₊) = 1, q(a₋) = −1, "
    "(1 + Δ∞)/(1 − Δ∞) = a₊/a₋",
    hypotheses=("ρ_0 invariant under rotations", "ε ≪ 1/d, N ≫ d"),
    misprints=(DOUBLE_SPEED, "(5.3) prints v = +∇Ψ: the risk would grow"),
    fault="U_d without its terms j ≥ 1: the kernel of d = ∞ in d = 40",
    cost=3,
)
def isotropic_gaussians(quick: bool, faulty: bool) -> Iterator[Finding]:
    """The radial flow by two methods, SGD beside it, and the critical Δ."""
    truth = IsotropicGaussians()
    start = quadrature(truth.initial(), 128 if quick else 512)
    flow = replace(truth, data_dim=None) if faulty else truth
    yield from _radial_flow(flow, truth, start, quick)
    yield from _dissipation(flow, start)
    yield from _radial_sgd(flow, start, quick)
    yield from _threshold(quick)


def _radial_flow(flow: IsotropicGaussians, truth: IsotropicGaussians, start: Any, quick: bool) -> Iterator[Finding]:
    """Refined in its nodes; against midpoints and another integrator; against the flow in R^40."""
    times = [0.0, 1.0, 10.0]
    n = start.n_particles
    errors = LOOSE if quick else TIGHT
    risks = _risks(flow, start, times, errors)
    half = _risks(flow, quadrature(truth.initial(), n // 2), times, errors)
    change = abs(risks[-1] - half[-1])
    yield claim(inequality(f"change of R(10), {n // 2} → {n} nodes", change, PRECISION))
    if not quick:
        run, coarse = (_of_midpoints(truth, m, 10.0) for m in (1600, 800))
        room = change + abs(run - coarse)
        yield claim(identity(f"R(10): {n} nodes = 1600 midpoints", risks[-1], run, discretisation=room))

    # The same few points as atoms: what differs is the kernel, not their quadrature.
    few, until = (quadrature(truth.initial(), 6), 0.3) if quick else (quadrature(truth.initial(), 16), 10.0)
    reduced = _risks(flow, few, [0.0, until])[-1]
    order = 8 if quick else 16
    fine, rough = (_of_orthants(truth, few, until, k) for k in (order, order // 2))
    name = f"R({until:g}): series of U_d = pairs in R⁴⁰, {few.n_particles} norms × {order} angles"
    yield claim(identity(name, reduced, fine, discretisation=abs(fine - rough) + 1e-7))


def _risks(
    case: IsotropicGaussians, start: EmpiricalMeasure, times: Sequence[float], errors: dict[str, Any] = TIGHT
) -> np.ndarray:
    found: np.ndarray = 2 * limit.characteristics(case, times, start=start, **errors)["energy"].values
    return found


def _of_midpoints(case: IsotropicGaussians, n: int, horizon: float) -> float:
    """The risk of n equal masses from the quantiles (i + ½)/n, by `simulate`."""
    u = (torch.arange(n, dtype=FLOAT64)[:, None] + 0.5) / n
    law = case.initial()
    assert isinstance(law, NormOfGaussian)
    run = mfsde.simulate(
        _FromNorms(start=law.quantile(u)), n_particles=n, horizon=horizon, dt=horizon, seed=0,
        method="dopri5", dtype=FLOAT64, keep_particles=0,
    )  # fmt: skip
    return float(run["risk"][-1, 0])


@dataclass(frozen=True)
class _FromNorms(IsotropicGaussians):
    """The radial flow from given norms, (N, 1)."""

    start: Any = None

    def initial(self) -> Any:
        return EmpiricalMeasure(self.start)


def _of_orthants(case: IsotropicGaussians, start: EmpiricalMeasure, horizon: float, order: int) -> float:
    """The risk of the flow in R^d, ∇U by probabilities of orthants, directions by Gauss-Jacobi quadrature."""
    times = [0.0, horizon]
    flow = limit.characteristics(_InSpace(order=order), times, start=start, **TIGHT)
    last = EmpiricalMeasure(torch.from_numpy(flow["position"].values[-1, 0]), start.weights)
    return float(case.risk(last))


@dataclass(frozen=True)
class _InSpace(IsotropicGaussians):
    """The radial flow of OnlineGaussians in R^d: no series, but its drift at r e₁ beside s(u, √(1 - u²)), u = ⟨e₁, e⟩.

    Inner products are all that it depends on: two coordinates carry those of R^d, u has density ∝ (1 - u²)^{(d-3)/2}.
    """

    order: int = 16

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """The component along the weight."""
        online = OnlineGaussians(self.delta, self.data_dim or 0, self.scale, self.left_value, self.knots, self.jumps)
        power = 0.5 * (online.data_dim - 3)
        u, p = (torch.from_numpy(v) for v in special.roots_jacobi(self.order, power, power))
        direction = torch.stack([u, (1 - u.square()).sqrt()], -1)
        points = (mu.points.unsqueeze(-2) * direction).flatten(-3, -2)
        weights = (mu.weights.unsqueeze(-1) * (p / p.sum())).flatten(-2)
        at = torch.cat([x, torch.zeros_like(x)], -1)
        return online.drift(t, at, EmpiricalMeasure(points, weights))[..., :1]


def _dissipation(flow: IsotropicGaussians, start: EmpiricalMeasure) -> Iterator[Finding]:
    """The slope of the risk at t = 1, by differences of fourth order."""
    h = 1e-2
    law = limit.characteristics(flow, [1 + k * h for k in (-2, -1, 0, 1, 2)], start=start, **TIGHT)
    r = 2 * law["energy"].values
    slope, rough = (r[0] - 8 * r[1] + 8 * r[3] - r[4]) / (12 * h), (r[3] - r[1]) / (2 * h)
    x = torch.from_numpy(law["position"].values[2, 0])
    mu = EmpiricalMeasure(x, start.weights)
    speed = float((start.weights * flow.drift(0.0, x, mu).square()[:, 0]).sum())
    error = abs(slope - rough) * h + 1e-6
    yield claim(identity("dR/dt at t = 1 = −2∫|ψ'|² dρ̄", slope, -2 * speed, discretisation=error))
    yield misprint(identity("(5.3) as printed: dR/dt = +2∫|ψ'|² dρ̄", slope, 2 * speed, discretisation=error))


def _radial_sgd(flow: IsotropicGaussians, start: EmpiricalMeasure, quick: bool) -> Iterator[Finding]:
    """Replicas at N = 800 and two ε: risk of the radial law (the network averaged over rotations), and this law."""
    n, eps, times, replicas = (800, 2e-4, (0.25, 0.5), 4) if quick else (800, 1e-5, (1.0, 5.0, 10.0), 6)
    fine, coarse = (
        mfsde.simulate(
            OnlineGaussians(), n_particles=n, n_replicas=replicas, horizon=times[-1], dt=e, seed=0,
            save_every=round(0.25 / e), method="sgd",
        )
        for e in (eps, 2 * eps)
    )  # fmt: skip
    law = limit.characteristics(flow, [0.0, *times], start=start, **TIGHT)
    setting = f"N = {n}, R = {replicas}, ε = {eps:g}"
    for t in times:
        seen, other = (run["radial_risk"].sel(time=t, method="nearest").values for run in (fine, coarse))
        expected = np.full(replicas, 2 * float(law["energy"].sel(time=t)))
        # Noise of the samples bends the mean by a multiple of ε: replica by replica it is taken out.
        name = f"risk of SGD's radial law at t = {t:g}, 2R_ε − R_2ε, {setting}"
        yield claim(identity(name, 2 * seen - other, expected))
        if not quick:
            own = float(seen.std(ddof=1))
            name = f"mean risk of SGD's radial law at t = {t:g} within the deviation of one run, {setting}"
            yield claim(identity(name, seen, expected, discretisation=own))
    t = times[-1]
    yield from _radial_distance(fine, coarse, limit.law_at(law, t), t, setting)
    early, late = (0.25, 0.5) if quick else (5.0, 10.0)
    doubled = fine["radial_risk"].sel(time=late, method="nearest").values
    printed = np.full(replicas, 2 * float(law["energy"].sel(time=early)))
    yield misprint(identity(f"with s_k = ε, risk at t = {early:g}", doubled, printed))


def _radial_distance(fine: xr.Dataset, coarse: xr.Dataset, law: Any, t: float, setting: str) -> Iterator[Finding]:
    """RMS over replicas of W₂ to the limit, against that of as many independent norms and the bias of ε."""
    norms, rough = (
        torch.from_numpy(run["position"].sel(time=t, method="nearest").values).double().norm(dim=-1, keepdim=True)
        for run in (fine, coarse)
    )
    squares = np.array([wasserstein.distance(EmpiricalMeasure(x), law) ** 2 for x in norms])
    u = torch.rand(40, norms.shape[1], 1, generator=torch.Generator().manual_seed(0), dtype=FLOAT64)
    floor = [wasserstein.distance(EmpiricalMeasure(law.quantile(v)), law) ** 2 for v in u]
    bias = wasserstein.distance(EmpiricalMeasure(norms.flatten(0, 1)), EmpiricalMeasure(rough.flatten(0, 1)))
    rms = math.sqrt(squares.mean())
    error = float(squares.std(ddof=1)) / math.sqrt(len(squares)) / (2 * rms)
    least = math.sqrt(np.mean(floor))
    error = math.hypot(error, float(np.std(floor, ddof=1)) / math.sqrt(len(floor)) / (2 * least))
    name = f"RMS W₂ to ρ̄_{t:g} ≤ that of N independent norms + bias, {setting}"
    yield claim(inequality(name, rms, least + bias, stderr=error))


def _threshold(quick: bool) -> Iterator[Finding]:
    """Δ∞ by the roots of q and by the hull of r ↦ (q(τ₊r), q(τ₋r)); the flow on both sides."""
    shape = IsotropicGaussians(data_dim=None)
    exact = _critical_by_roots(shape)
    hull = _critical_by_hull(shape)
    yield claim(identity("Δ∞: hull of r ↦ (q(τ₊r), q(τ₋r)) meets (1, −1)", hull, exact, discretisation=1e-7))
    for gap in (0.01, -0.01):
        delta = exact + gap
        least = _least_risk(shape, delta)
        name = f"d = ∞, Δ = Δ∞ {'+' if gap > 0 else '−'} 0.01: inf R"
        if gap > 0:
            yield claim(inequality(f"{name} = 0", least, 1e-9))
        else:
            single = _best_single(replace(shape, delta=delta))[1]
            # What the grid's best norm has too much; the mass as one more equation is met to single / 1e6.
            room = float(_distances(shape, delta)[1].min()) - single + 1e-6 * single
            yield claim(identity(f"{name} = min R(δ_r)", least, single, discretisation=room))
    if quick:
        return
    start = quadrature(IsotropicGaussians().initial(), 8)
    above, below = (replace(shape, delta=exact + gap) for gap in (0.05, -0.2))
    risk, single = _risks(above, start, [0.0, 50.0])[-1], _best_single(above)[1]
    yield claim(inequality("Δ∞ + 0.05: R(50) ≤ min R(δ_r)", risk, single))
    (early, risk), single = _risks(below, start, [0.0, 20.0, 50.0])[1:], _best_single(below)[1]
    yield claim(identity("Δ∞ − 0.2: R(50) = min R(δ_r)", risk, single, discretisation=abs(risk - early)))


def _least_risk(shape: IsotropicGaussians, delta: float) -> float:
    """Inf R over probabilities on a grid of norms, by non-negative least squares with the mass as one more equation."""
    outputs, heavy = _distances(shape, delta)[0], 1e3
    rows = np.vstack([outputs, np.full(outputs.shape[1], heavy)])
    masses = optimize.nnls(rows, np.array([1.0, -1.0, heavy]))[0]
    masses /= masses.sum()
    return float(0.5 * np.square(outputs @ masses - np.array([1.0, -1.0])).sum())


def _distances(shape: IsotropicGaussians, delta: float) -> tuple[np.ndarray, np.ndarray]:
    """The outputs q(τ₊r), q(τ₋r) on a grid of norms, and R(δ_r) there, for d = ∞."""
    r = np.geomspace(0.05, 50, 4001)
    outputs = np.stack([_mean_output(shape, (1 + delta) * r), _mean_output(shape, (1 - delta) * r)])
    return outputs, 0.5 * np.square(outputs - np.array([[1.0], [-1.0]])).sum(0)


def _mean_output(shape: IsotropicGaussians, a: Any) -> Any:
    """q(a) = E σ(aG)."""
    a = np.asarray(a, dtype=float)
    total = np.full_like(a, shape.left_value)
    for t, c in zip(shape.knots, shape.jumps, strict=True):
        u = t / a
        total = total + c * (a * np.exp(-0.5 * u * u) / math.sqrt(2 * math.pi) - t * special.ndtr(-u))
    return total


def _critical_by_roots(shape: IsotropicGaussians) -> float:
    """Q is increasing: q(τ₊r) = 1 and q(τ₋r) = -1 fix both arguments, and their ratio is (1 + Δ)/(1 - Δ)."""
    high, low = (optimize.brentq(lambda a, y=y: _mean_output(shape, a) - y, 0.05, 50.0, xtol=1e-14) for y in (1, -1))
    return float((high - low) / (high + low))


def _critical_by_hull(shape: IsotropicGaussians) -> float:
    """Where min over directions of max_r n·((q(τ₊r), q(τ₋r)) - (1, -1)), the depth of (1, -1) in the hull, is 0.

    q here is a Gauss-Legendre quadrature of its definition between the knots, not its closed form.
    """
    nodes, weights = np.polynomial.legendre.leggauss(40)
    (t1, t2), (c, _) = shape.knots, shape.jumps
    z, w = t1 + (t2 - t1) * (nodes + 1) / 2, weights * (t2 - t1) / 2

    def output(a: Any) -> Any:
        # E σ(aG) = y₀ + ∫ σ'(z) P(aG > z) dz.
        return shape.left_value + c * (special.erfc(z / (math.sqrt(2) * np.asarray(a)[..., None])) / 2 @ w)

    r = np.geomspace(0.05, 50, 4001)

    def depth(delta: float) -> float:
        x, y = output((1 + delta) * r) - 1, output((1 - delta) * r) + 1

        def support(angle: float) -> float:
            heights = math.cos(angle) * x + math.sin(angle) * y
            k = int(heights.argmax())
            if not 0 < k < len(r) - 1:
                return float(heights[k])

            def height(s: float) -> float:
                along, across = output((1 + delta) * s) - 1, output((1 - delta) * s) + 1
                return -math.cos(angle) * float(along) - math.sin(angle) * float(across)

            found = optimize.minimize_scalar(
                height, bounds=(r[k - 1], r[k + 1]), method="bounded", options={"xatol": 1e-10}
            )
            return -float(found.fun)

        angles = np.linspace(0, 2 * math.pi, 361)
        k = int(np.argmin([(math.cos(a) * x + math.sin(a) * y).max() for a in angles]))
        step = angles[1]
        bounds = (angles[k] - step, angles[k] + step)
        return float(optimize.minimize_scalar(support, bounds=bounds, method="bounded", options={"xatol": 1e-9}).fun)

    return float(optimize.brentq(depth, 0.3, 0.7, xtol=1e-9))


def _best_single(shape: IsotropicGaussians) -> tuple[float, float]:
    """The r that minimises R(δ_r), and this minimum."""
    r = np.linspace(0.02, 6, 600)
    k = int(np.argmin([_risk_of_norm(shape, s) for s in r]))
    found = optimize.minimize_scalar(
        lambda s: _risk_of_norm(shape, s), bounds=(r[max(k - 1, 0)], r[min(k + 1, 599)]), method="bounded",
        options={"xatol": 1e-10},
    )  # fmt: skip
    return float(found.x), float(found.fun)


def _risk_of_norm(shape: IsotropicGaussians, r: float) -> float:
    return float(shape.risk(EmpiricalMeasure(torch.full((1, 1), float(r), dtype=FLOAT64))))


# Figure 6.2


@item(
    source="002, Figure 6.2",
    statement="a' = ½Σ_y e_y M(b,s_y), b' = ½Σ_y e_y aΦ, r₁' = ½Σ_y e_y aφ τ_y²r₁/s_y, r₂' = ½Σ_y e_y aφ r₂/s_y, each "
    "times ξ = t^{−1/4}, is −ξ∇Ψ; SGD in R^d follows it as N, d → ∞ and εd → 0",
    hypotheses=("weights of random directions", "s₀/d fixed as d → ∞", "ε ≪ 1/d"),
    misprints=(DOUBLE_SPEED,),
    fault="r₁' without its factor τ_y²",
    cost=2,
)
def variable_selection(quick: bool, faulty: bool) -> Iterator[Finding]:
    """The reduced flow is a gradient flow, and SGD in R^d comes to it."""
    truth = VariableSelection()
    flow = _Unscaled() if faulty else truth
    start = quadrature(truth.initial(), 16 if quick else 48)
    x, mu = start.points.clone(), start
    x[:, 0] += 0.3
    mu = EmpiricalMeasure(x, start.weights)
    derived = -truth.energy.intrinsic_derivative(mu, x)
    scale = float(derived.abs().max())
    gap = float((flow.drift(0.0, x, mu) - derived).abs().max())
    yield claim(identity("largest |drift + ∇Ψ|, ∇Ψ by differentiation", gap, 0.0, discretisation=1e-12 * scale))

    eps, t = 2e-4, 4.0
    online = OnlineVariableSelection(offset=eps)
    steps = eps * np.sum([online.step_size(k * eps) for k in range(round(t / eps))])
    # Σ_{k=1}^n k^{-α} = n^{1-α}/(1-α) + ζ(α) + ½n^{-α} - (α/12) n^{-α-1} + O(n^{-α-3}).
    corrected = truth.clock(t) + ZETA_QUARTER * eps**0.75 + 0.5 * eps * t**-0.25
    room = eps**2 * t**-1.25 / 48
    name = f"Σ ε ξ(kε) to t = {t:g} = ∫ξ + ζ(¼)ε^¾ + ½ε t^−¼, ∫ξ = t^¾/¾"
    yield claim(identity(name, steps, corrected, discretisation=room))
    yield from _selection_sgd(flow, start, quick)


@dataclass(frozen=True)
class _Unscaled(VariableSelection):
    """A wrong derivation: ∂s_y/∂r₁ = r₁/s_y in place of τ_y² r₁/s_y."""

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """As if s_y² had been r₁² + r₂² when it was differentiated."""
        b = super().drift(t, x, mu)
        return torch.cat([b[..., :2], b[..., 3:] / x[..., 3:] * x[..., 2:3], b[..., 3:]], -1)


def _selection_sgd(flow: VariableSelection, start: EmpiricalMeasure, quick: bool) -> Iterator[Finding]:
    """Risks of SGD, exact, against the curve, above which it lies by multiples of 1/N, 1/d and εd: each is measured."""
    horizon, eps, n, replicas = (1.0, 1e-3, 200, 4) if quick else (4.0, 2e-4, 800, 4)
    few, d = (40, 80) if quick else (80, 320)
    ratio = d // few

    def risks(dim: int, step: float, m: int) -> np.ndarray:
        case = OnlineVariableSelection(data_dim=dim, n_relevant=dim * 3 // 16, offset=step)
        run = mfsde.simulate(
            case, n_particles=m, n_replicas=replicas, horizon=horizon, dt=step, seed=0,
            save_every=round(horizon / step), method="sgd",
        )  # fmt: skip
        last = torch.from_numpy(run["position"].values[-1]).double()
        return np.array([float(case.risk(EmpiricalMeasure(x))) for x in last])

    full, half = (risks(d, eps, m) for m in (n, n // 2))
    # In fewer dimensions with the same εd: what is left is of order 1/d.
    other, other_half = (risks(few, ratio * eps, m) for m in (n, n // 2))
    rough = risks(few, 2 * ratio * eps, n)
    bias_n = abs(float(half.mean() - full.mean()))
    bias_d = abs(float((2 * other - other_half).mean() - (2 * full - half).mean())) / (ratio - 1)
    bias_eps = abs(float(rough.mean() - other.mean()))

    case = OnlineVariableSelection(data_dim=d, n_relevant=d * 3 // 16, offset=eps)
    law = limit.characteristics(flow, [0.0, case.clock(horizon), 2 * case.clock(horizon)], start=start, **TIGHT)
    _, expected, doubled = 2 * law["energy"].values
    name = f"SGD's risk at t = {horizon:g}, d = {d}, N = {n}, R = {replicas}, ε = {eps:g}"
    room = bias_n + bias_d + bias_eps
    yield claim(identity(name, full, np.full(replicas, expected), discretisation=room))
    yield misprint(identity("the same, with s_k = ε ξ", full, np.full(replicas, doubled), discretisation=room))
    near = f"2R_N − R_N/2, its part of order 1/N away, d = {d}"
    yield claim(identity(near, 2 * full - half, np.full(replicas, expected), discretisation=bias_d + bias_eps))


# Figure 6.3


@item(
    source="002, Figure 6.3",
    statement="σ falling on (0, ½): at δ_0 norms move by −ψ'(0) = −(3Δ + 7.5)/√(2π) < 0, so from κ = 0.1 all reach 0 "
    "and stay, R = 1 + σ(0)²; from κ = 0.4 R falls to what the best single norm has; SGD by batches "
    "of 100 with 100ε, the noise of one sample with ε",
    hypotheses=("r ≥ 0 is kept: a wall at which the norms stay", "ε ≪ 1/d"),
    misprints=(DOUBLE_SPEED,),
    fault="norms step through r = 0",
    cost=1,
)
def non_monotone(quick: bool, faulty: bool) -> Iterator[Finding]:
    """The wall, both fates, and SGD."""
    small, large = (IsotropicGaussians.non_monotone(kappa) for kappa in (0.1, 0.4))
    zero = torch.zeros(1, 1, dtype=FLOAT64)
    speed = float(small.drift(0.0, zero, EmpiricalMeasure(zero)))
    expected = -(3 * small.delta + 7.5) / math.sqrt(2 * math.pi)
    yield claim(identity("velocity of norms at δ_0", speed, expected))

    dead = 1 + small.left_value**2
    flow = _StepsThrough(**vars(small)) if faulty else small
    nodes, until = (16, 0.05) if quick else (64, 10.0)
    law = limit.characteristics(flow, [0.0, 0.05, until + 0.01], start=quadrature(small.initial(), nodes), **TIGHT)
    yield claim(identity("κ = 0.1: R(0.05) = 1 + σ(0)²", 2 * float(law["energy"][1]), dead))
    largest = float(law["position"].isel(time=-1).max())
    yield claim(identity(f"κ = 0.1: largest norm at t = {until:g}", largest, 0.0))
    farthest = -float(law["position"].min())
    yield claim(inequality("κ = 0.1: −(smallest norm) ≤ 0", farthest, 0.0))

    risks = (
        2
        * limit.characteristics(large, [0.0, 10.0, 20.0], start=quadrature(large.initial(), nodes), **TIGHT)[
            "energy"
        ].values
    )
    single = _best_single(large)[1]
    change = abs(risks[2] - risks[1])
    yield claim(inequality("κ = 0.4: R(20) ≤ min over r of R(δ_r)", risks[2], single, discretisation=change))
    yield from _non_monotone_sgd(small, large, dead, quick)


@dataclass(frozen=True)
class _StepsThrough(IsotropicGaussians):
    """Without the wall."""

    def project(self, x: Tensor) -> Tensor:
        """Anywhere."""
        return x


def _non_monotone_sgd(
    small: IsotropicGaussians, large: IsotropicGaussians, dead: float, quick: bool
) -> Iterator[Finding]:
    """SGD in R^d by batches of 100 samples and steps of 100ε.

    At the wall a norm jumps back and forth by a step: the risk is off by a multiple of the step, which is taken out
    replica by replica. R_h = R + ah + bh² leaves 2R_h − R_2h = R − 2bh², a third of its change from 2h to h.
    """
    n, d, replicas, h = (100, 40, 4, 5e-4) if quick else (800, 320, 8, 1e-4)
    for case, horizon in ((small, 0.05), (large, 0.1 if quick else 0.2)):
        reduced = replace(case, data_dim=d)
        online = OnlineGaussians(
            reduced.delta, d, reduced.scale, reduced.left_value, reduced.knots, reduced.jumps, batch_size=100
        )

        def risks(step: float, m: int, online: OnlineGaussians = online, horizon: float = horizon) -> np.ndarray:
            run = mfsde.simulate(
                online, n_particles=m, n_replicas=replicas, horizon=horizon, dt=step, seed=0, method="sgd",
                keep_particles=0,
            )  # fmt: skip
            found: np.ndarray = run["radial_risk"].values[-1]
            return found

        fine, coarse, rough = (risks(k * h, n) for k in (1, 2, 4))
        seen, before = 2 * fine - coarse, 2 * coarse - rough
        room = abs(float((seen - before).mean())) / 3 + abs(float((risks(4 * h, n // 2) - rough).mean()))
        setting = f"batches of 100, ε = {h / 100:g}, d = {d}, N = {n}, R = {replicas}"
        name = f"κ = {case.scale}: risk of SGD's radial law at t = {horizon:g}, 2R_ε − R_2ε, {setting}"
        if case is small:
            yield claim(identity(name, seen, np.full(replicas, dead), discretisation=room))
            continue
        start = quadrature(reduced.initial(), 16 if quick else 32)
        law = limit.characteristics(reduced, [0.0, horizon, 2 * horizon], start=start)
        _, expected, doubled = 2 * law["energy"].values
        yield claim(identity(name, seen, np.full(replicas, expected), discretisation=room))
        name = "the same, with s_k = ε"
        yield misprint(identity(name, seen, np.full(replicas, doubled), discretisation=room))
