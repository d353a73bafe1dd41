"""Two-layer networks trained by gradients (Montanari): the risk as an energy, SGD and its limit, low temperature, JKO.

His loss is (y - f)², twice the "squared" one of `mfsde.risk`: R = 2F, and the equation (5.4) is the W₂ flow of F = R/2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import xarray as xr
from scipy import optimize, stats
from scipy.integrate import simpson
from torch import Tensor

import mfsde
from mfsde import EmpiricalMeasure, Energy, limit
from mfsde.analysis import theory
from mfsde.analysis.check import Check, identity, inequality, mean_and_error
from mfsde.scenarios import DoubleWell

from .item import Finding, claim, item, misprint, outside

FLOAT64 = torch.float64
ROUNDING = 2.3e-16


# The risk as an energy


@item(
    source="002, Section 4, (4.1)-(4.8), (5.1)-(5.3)",
    statement="R(ρ) = R_# + 2∫V dρ + ∬U dρ dρ, U PSD, Ψ = ½ δR/δρ = V + ∫U dρ, E(v_i | past) = −∇Ψ(θ_i; ρ); "
    "ρ* minimises R exactly if supp ρ* ⊆ argmin Ψ(·; ρ*)",
    hypotheses=("E y² < ∞ and E σ_*(x; θ)² < ∞", "samples independent, each used once"),
    misprints=("(5.3) prints v = +∇Ψ, along which the risk grows; v = −∇Ψ, as in (5.2) and (5.4)",),
    fault="the loss is ½(y − f)², that of the limit's energy, in place of (y − f)²",
)
def risk_energy(quick: bool, faulty: bool) -> Iterator[Finding]:
    """Neurons erf(θ·x) on Gaussian data, where U is an arcsine; optimality on a grid, by non-negative least squares."""
    teacher, theta = ErfTeacher(), ErfTeacher.neurons(20)
    factor = 1.0 if faulty else 2.0
    data = [teacher.data(4000 if quick else 40_000, seed) for seed in range(16)]
    risks = [mfsde.risk(erf_of_product, "squared", x, y) for x, y in data]
    mu = EmpiricalMeasure(theta)
    v, u = teacher.external(theta), arcsine(theta, theta)
    n = f"N = {len(theta)}, {len(data)} × {len(data[0][0])} samples"

    measured = np.array([factor * float(energy(mu)) for energy in risks])
    stated = teacher.second_moment + 2 * float(v.mean()) + float(u.mean())
    yield claim(identity(f"R_N by (4.1), {n}", measured, np.full(len(data), stated)))

    at = ErfTeacher.neurons(5, seed=1)
    change = [0.5 * factor * energy.functional_derivative(mu, at).numpy() for energy in risks]
    psi = teacher.external(at) + arcsine(at, theta).mean(1)
    centred = (psi - (v + u.mean(1)).mean()).numpy()
    for k in range(2):
        found = np.array([values[k] for values in change])
        yield claim(identity(f"½ δR/δρ at θ_{k + 1}, {n}", found, np.full(len(data), centred[k])))

    slope = teacher.slope(theta)
    squared = float(slope.square().sum(-1).mean())
    velocities = [-0.5 * factor * energy.intrinsic_derivative(mu, theta) for energy in risks]
    along = np.array([float((v_ * slope).sum(-1).mean()) for v_ in velocities])
    yield claim(identity("mean of v·∇Ψ by (5.1)", along, np.full(len(data), -squared)))
    yield misprint(identity("(5.3) as printed: mean of v·∇Ψ", along, np.full(len(data), squared)))

    many = ErfTeacher.neurons(300, seed=2)
    eigenvalues = np.linalg.eigvalsh(arcsine(many, many).numpy())
    room = ROUNDING * len(many) * float(eigenvalues[-1])
    yield claim(inequality("−(smallest eigenvalue of U)", -float(eigenvalues[0]), 0.0, discretisation=room))

    yield from _optimality(quick)
    yield from _descent(quick)


def _optimality(quick: bool) -> Iterator[Finding]:
    """(4.8) at the minimiser of R over probabilities on a grid, and off it."""
    problem = OnGrid.of_sine(201 if quick else 801)
    best = problem.minimiser()
    psi = problem.psi(best)
    support = best > 0
    spread = float(psi[support].max() - psi.min())
    room = 1e-11 * float(np.abs(psi).max())
    name = f"max over supp ρ* ({int(support.sum())} atoms) − min Ψ"
    yield claim(identity(name, spread, 0.0, discretisation=room))
    # R(ρ) - inf R <= 2 (∫Ψ dρ - min Ψ) by convexity: what the sufficiency of (4.8) rests on.
    even = np.full_like(best, 1 / len(best))
    for name, rho in (("even", even), ("half way to ρ*", (even + best) / 2)):
        slack = 2 * (float(problem.psi(rho) @ rho) - float(problem.psi(rho).min()))
        yield claim(inequality(f"R(ρ) − inf R, ρ {name}", problem.risk(rho) - problem.risk(best), slack))


def _descent(quick: bool) -> Iterator[Finding]:
    """The risk after a time 1 along v = -∇Ψ and along (5.3)."""
    x, y = ErfTeacher().data(200, 99)
    energy = mfsde.risk(erf_of_product, "squared", x, y)
    down, up = (
        mfsde.simulate(
            Descent(factor * energy), n_particles=20, n_replicas=4 if quick else 16, horizon=1.0, dt=0.05, seed=0,
            method="midpoint", observables=("energy",),
        )
        for factor in (1.0, -1.0)
    )  # fmt: skip
    first, last = (2 * down["energy"].isel(time=k, drop=True) for k in (0, -1))
    yield claim(inequality("R(ρ_1) ≤ R(ρ_0), v = −∇Ψ", last, first))
    first, last = (-2 * up["energy"].isel(time=k, drop=True) for k in (0, -1))
    yield misprint(inequality("(5.3) as printed: R(ρ_1) ≤ R(ρ_0), v = ∇Ψ", last, first))


@dataclass(frozen=True)
class ErfTeacher:
    """y = Σ_j a_j erf(w_j·x) + noise, x ~ N(0, I): R_#, V and U in closed form."""

    amplitudes: tuple[float, ...] = (1.0, -0.5)
    weights: tuple[tuple[float, float], ...] = ((1.0, 0.0), (-0.5, 1.5))
    noise: float = 0.3

    @staticmethod
    def neurons(n: int, seed: int = 0) -> Tensor:
        """(n, 2)."""
        return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)

    @property
    def second_moment(self) -> float:
        """R_# = E y²."""
        return float(self._a @ arcsine(self._w, self._w) @ self._a) + self.noise**2

    def external(self, theta: Tensor) -> Tensor:
        """V(θ) = -E y σ_*(x; θ).    (n, 2) -> (n,)."""
        return -(arcsine(theta, self._w) @ self._a)

    def slope(self, theta: Tensor) -> Tensor:
        """∇Ψ at the neurons that ρ consists of.    (n, 2) -> (n, 2)."""
        at = theta.clone().requires_grad_()
        psi = self.external(at) + arcsine(at, theta).mean(1)
        return torch.autograd.grad(psi.sum(), at)[0]

    def data(self, n: int, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs (n, 2) and labels (n,)."""
        draws = torch.randn(n, 3, generator=torch.Generator().manual_seed(1000 + seed), dtype=FLOAT64)
        x = draws[:, :2]
        return x, torch.erf(x @ self._w.T) @ self._a + self.noise * draws[:, 2]

    @property
    def _a(self) -> Tensor:
        return torch.tensor(self.amplitudes, dtype=FLOAT64)

    @property
    def _w(self) -> Tensor:
        return torch.tensor(self.weights, dtype=FLOAT64)


def erf_of_product(theta: Tensor, z: Tensor) -> Tensor:
    """σ_*(z; θ) = erf(θ·z).    (..., N, 1, d), (b, d) -> (..., N, b)."""
    return torch.erf(theta.squeeze(-2) @ z.mT)


def arcsine(u: Tensor, v: Tensor) -> Tensor:
    """E erf(u·x) erf(v·x), x ~ N(0, I).    (n, d), (m, d) -> (n, m).    Source: Williams (1997)."""
    lengths = torch.sqrt((1 + 2 * u.square().sum(-1))[:, None] * (1 + 2 * v.square().sum(-1)))
    return 2 / math.pi * torch.asin(2 * u @ v.T / lengths)


@dataclass(frozen=True)
class Descent(mfsde.GradientFlow):
    """x' = -D_mF(m, x) from N(0, I)."""

    functional: Any = None

    @property
    def energy(self) -> Energy:
        """F."""
        energy: Energy = self.functional
        return energy

    def initial(self) -> mfsde.Gaussian:
        """N(0, I) in the plane."""
        return mfsde.Gaussian([0.0, 0.0], 1.0)


@dataclass(frozen=True)
class OnGrid:
    """R(ρ) = |Aρ - y|² over probabilities ρ on the nodes of a grid.    outputs A: (n, G), targets y: (n,)."""

    outputs: np.ndarray
    targets: np.ndarray

    @classmethod
    def of_sine(cls, n_nodes: int) -> OnGrid:
        """erf(θx), |θ| <= 4, for y = sin 2x, x ~ N(0, 1) by 60 quantiles: out of reach."""
        x = math.sqrt(2) * torch.special.erfinv((2 * torch.arange(60, dtype=FLOAT64) + 1) / 60 - 1).numpy()
        grid = np.linspace(-4, 4, n_nodes)
        outputs = torch.erf(torch.from_numpy(np.outer(x, grid))).numpy()
        return cls(outputs / math.sqrt(60), np.sin(2 * x) / math.sqrt(60))

    def minimiser(self) -> np.ndarray:
        """ρ*, (G,): the point of least norm of the hull of the columns of A - y, by non-negative least squares.

        With a row of ones and the target (0, ..., 0, 1), min |Bρ|² + (1 - Σρ)² over ρ >= 0 is proportional to it.
        """
        columns = np.vstack([self.outputs - self.targets[:, None], np.ones(self.outputs.shape[1])])
        found, _ = optimize.nnls(columns, np.append(np.zeros(len(self.targets)), 1.0), maxiter=20 * columns.shape[1])
        minimiser: np.ndarray = found / found.sum()
        return minimiser

    def risk(self, rho: np.ndarray) -> float:
        """R(ρ)."""
        return float(np.square(self.outputs @ rho - self.targets).sum())

    def psi(self, rho: np.ndarray) -> np.ndarray:
        """Ψ = V + ∫U dρ, (G,)."""
        values: np.ndarray = self.outputs.T @ (self.outputs @ rho - self.targets)
        return values


# Stochastic gradients and their limit


@item(
    source="002, (2.1)-(3.5), Theorem 5.1, (5.1)-(5.6), (8.1)-(8.2)",
    statement="with s_k = ε/2, t = kε and k = ⌊t/ε⌋, RMS(R_N(θ^k) − R(ρ_t)) is of order N^{−1/2} with exact gradients "
    "and ε^{1/2} for N ≫ 1/ε, its mean of order 1/N and ε; sup_{k ≤ T/ε} |R_N(θ^k) − R(ρ_{kε})| ≤ "
    "C e^{CT} √(1/N ∨ ε) (√(D + log(N/ε)) + z) with probability 1 − e^{−z²}; noise √(4Ts_k) g adds TΔρ",
    hypotheses=(
        "σ_* and y bounded, ∇V and ∇U bounded and Lipschitz (A2, A3)",
        "θ⁰ i.i.d. from ρ_0",
        "one fresh sample a step: E(v_i | past) = −∇Ψ(θ_i; ρ)",
    ),
    misprints=(
        "(8.1) prints the noise √(2T s_k) g, which adds (T/2)Δρ; (8.2) has TΔρ, which takes √(4T s_k)",
        "Section 5 prints k = ⌊k/ε⌋; k = ⌊t/ε⌋",
        "the continuity equation before (5.4) is printed without = 0",
        "Theorem 5.1 has C depend on the constants of A1, A2 where it states A2, A3, and an f that its bound lacks",
        "step sizes s_k = ε, as captions may mean, make the time 2kε: the axes differ by a factor 2",
    ),
    fault="every neuron draws a sample of its own, so that the samples' noise averages out over neurons",
    cost=1.0,
)
def sgd(quick: bool, faulty: bool) -> Iterator[Finding]:
    """Tanh neurons on two data: slopes in N and ε, the plateau, the supremum, the temperature and the time axis."""
    network = OwnSamples() if faulty else Tanh()
    unmet = _unmet(network)
    limiting = 2 * limit.characteristics(Tanh(), np.linspace(0, 1, 257))["energy"].values.reshape(257)  # R(ρ_t)
    yield from _number_of_neurons(limiting[-1], quick, unmet)
    yield from _step_size(quick, unmet)
    yield from _plateau(network, quick, unmet)
    yield from _supremum(network, limiting, quick, unmet)
    yield from _temperature(network, limiting[-1], quick)


def _unmet(case: Tanh) -> list[str]:
    """What numbers show to fail of A2, A3 (a bound that grows with |θ|) and of E(v | past) = -∇Ψ."""
    bounds = np.array([_bounds(case, reach) for reach in (8, 80)])
    names = ("σ_*", "∇V + ∇U", "the Lipschitz constant of ∇V + ∇U")
    found = [f"{name} is not bounded" for name, (near, far) in zip(names, bounds.T, strict=True) if far > 1.01 * near]
    theta = torch.linspace(-2, 2, 9, dtype=FLOAT64).unsqueeze(-1).expand(len(TARGETS), -1, 1)
    mu = EmpiricalMeasure(theta)
    each = torch.arange(len(TARGETS)).unsqueeze(-1).expand(-1, theta.shape[1])
    bias = float((case.sampled_drift(0.0, theta, mu, each).mean(0) - case.drift(0.0, theta, mu)[0]).abs().max())
    return [*found, f"the samples' mean velocity is off by {bias:.2g}" if bias > 1e-12 else ""]


def _bounds(case: Tanh, reach: int) -> list[float]:
    """Of |σ_*|, of |∇V + ∇_1U| and of its difference quotients in either argument, for |θ|, |θ'| <= reach."""
    spacing = 0.02
    theta = torch.arange(-reach, reach + spacing / 2, spacing, dtype=FLOAT64).unsqueeze(-1)
    others = torch.tensor([-reach, -1.0, 0.0, 0.5, reach], dtype=FLOAT64)
    pairs = torch.stack([others, others + spacing], -1).reshape(-1, 1, 1)
    slopes = torch.stack([case.energy.intrinsic_derivative(EmpiricalMeasure(at), theta)[:, 0] for at in pairs])
    quotients = (slopes.diff(dim=1).abs().max() / spacing, (slopes[1::2] - slopes[::2]).abs().max() / spacing)
    return [
        float(tanh_of_product(theta.unsqueeze(-2), INPUTS).abs().max()),
        float(slopes.abs().max()),
        float(max(quotients)),
    ]


def _number_of_neurons(exact: float, quick: bool, unmet: list[str]) -> Iterator[Finding]:
    """Exact gradients, t = 1: slopes in N of the root mean square and of the mean of R_N - R."""
    sizes = np.array([16, 32, 64, 128, 256] if quick else [32, 64, 128, 256, 512, 1024])
    n_replicas, steps = (1000, 4) if quick else (4000, 4)
    # R(ρ_1) by the same steps, so that what is left of them is in both; quantiles err like 1/n².
    stated = float(Tanh().risks(_final(Tanh(n_quantiles=4096), "midpoint", steps, 4096, 1, seed=0))[0])
    coarse = _final(Tanh(n_quantiles=4096), "midpoint", steps // 2, 4096, 1, seed=0)
    order = abs(stated - float(Tanh().risks(coarse)[0]))  # three times what is left, at order 2
    yield claim(identity("R(ρ_1) by characteristics and by 4096 quantiles", stated, exact, discretisation=order))
    squares, means, off = [], [], 0.0
    for n in sizes:
        run = _run(Tanh(), "midpoint", steps, int(n), n_replicas, seed=int(n))
        start, end = (run["position"].values[k, ..., 0] for k in (0, -1))
        error, known = Tanh().risks(end) - stated, _controls(start)
        # What independent weights contribute to the first two orders has a known mean, and is taken out.
        squares.append(_without(error**2, known))
        means.append(_without(error, known))
        centre = known.mean(0)
        off += n_replicas * float(centre @ np.linalg.solve(np.cov(known.T), centre))
    likely = float(stats.chi2.ppf(0.9973, len(sizes) * known.shape[1]))
    unmet = [*unmet, f"θ⁰ is not i.i.d. from ρ_0: χ² = {off:.3g} > {likely:.3g}" if off > likely else ""]
    told = f"N = {sizes[0]} … {sizes[-1]}, R = {n_replicas}"
    yield claim(_slope(f"power of N, RMS, exact gradients, {told}", sizes, squares, -0.5, root=0.5, unmet=unmet))
    yield claim(_slope(f"power of N, mean, exact gradients, {told}", sizes, means, -1.0, unmet=unmet))


def _step_size(quick: bool, unmet: list[str]) -> Iterator[Finding]:
    """One sample a step, N = ∞ (ρ_0 of a few atoms): slopes in ε of the root mean square and the mean of R_N - R.

    At an early time the deviation is large beside the mean, so that the mean square is of one order; late it is small.
    """
    n_replicas = 4000 if quick else 20_000
    found = _sampled(4, 0.25, [8, 16, 32, 64] if quick else [8, 16, 32, 64, 128, 256], n_replicas, unmet, root=0.5)
    yield claim(found)
    # Summing over all sequences of samples for ε ≥ 1/16 shows that errors of order ε³ move this slope by 0.01 (0.003).
    found = _sampled(16, 1.0, [8, 16, 32, 64, 128] if quick else [16, 32, 64, 128, 256], n_replicas // 2, unmet)
    yield claim(found)


def _sampled(
    n_atoms: int, horizon: float, steps: list[int], n_replicas: int, unmet: list[str], root: float = 1.0
) -> Check:
    """The power of ε in R_N - R, in its mean or root mean square, at a time, by SGD from ρ_0 = atoms."""
    case = Tanh(n_quantiles=n_atoms)
    stated = 2 * float(limit.characteristics(case, [0.0, horizon])["energy"].values[-1].squeeze())
    ends = [_final(case, "sgd", n, n_atoms, n_replicas, seed=n, horizon=horizon) for n in steps]
    errors, epsilon = np.array([Tanh().risks(end) - stated for end in ends]), horizon / np.array(steps)
    told = f"N ≫ 1/ε, t = {horizon:g}, ε = 1/{1 / epsilon[0]:g} … 1/{1 / epsilon[-1]:g}, R = {n_replicas}"
    if root == 1.0:
        return _slope(f"power of ε, mean, {told}", epsilon, errors, 1.0, unmet=unmet)
    return _slope(f"power of ε, RMS, {told}", epsilon, errors**2, 0.5, root=root, unmet=unmet)


def _plateau(network: Tanh, quick: bool, unmet: list[str]) -> Iterator[Finding]:
    """At fixed ε, between SGD and exact gradients from equal weights: no decay in N."""
    sizes, n_replicas = np.array([16, 32, 64, 128] if quick else [32, 64, 128, 256]), (400 if quick else 2000)
    ends = [
        [Tanh().risks(_final(network, method, 16, int(n), n_replicas, seed=1)) for method in ("sgd", "euler")]
        for n in sizes
    ]
    gaps = np.array([sampled - exact for sampled, exact in ends])
    gaps -= gaps.mean(1, keepdims=True)  # the error of order ε has no less of a plateau
    told = f"ε = 1/16, N = {sizes[0]} … {sizes[-1]}, R = {n_replicas}"
    yield claim(_slope(f"power of N, deviation of SGD − exact, {told}", sizes, gaps**2, 0.0, root=0.5, unmet=unmet))


def _supremum(network: Tanh, limiting: np.ndarray, quick: bool, unmet: list[str]) -> Iterator[Finding]:
    """(5.6) along N = 1/ε: the root mean square of the supremum over the bracket decays no slower than N^{-1/2}."""
    sizes, n_replicas = np.array([16, 32, 64, 128] if quick else [16, 32, 64, 128, 256]), (200 if quick else 2000)
    squares = []
    for n in sizes:
        run = mfsde.simulate(
            network, n_particles=int(n), n_replicas=n_replicas, horizon=1.0, dt=1 / int(n), seed=int(n), method="sgd",
            keep_particles=0, save_every=1, observables=("energy",), dtype=FLOAT64,
        )  # fmt: skip
        errors = np.abs(2 * run["energy"].values - limiting[:: len(limiting) // n, None]).max(0)
        squares.append(np.square(errors / (math.sqrt(1 + 2 * math.log(n)) + 1)))  # D = 1, z = 1
    name = f"(5.6): power of N = 1/ε, RMS sup_k/(√(D + log(N/ε)) + 1), N = {sizes[0]} … {sizes[-1]}, R = {n_replicas}"
    slope, stderr = _power(sizes, np.array(squares), 0.5, next_order=False)
    yield claim(inequality(name, slope, -0.5, stderr=stderr, hypotheses=unmet))


def _temperature(network: Tanh, noiseless: float, quick: bool) -> Iterator[Finding]:
    """T = 0.1: the variance of the neurons against the equation with TΔ, and the risk against its time."""
    t, steps, n, n_replicas = 0.1, (64 if quick else 128), (100 if quick else 200), (200 if quick else 1200)
    noisy, printed, cold = (replace(network, sigma=math.sqrt(c * t)) for c in (2.0, 1.0, 0.0))
    variance, risk = _moments_of_limit(math.sqrt(2 * t))
    half_variance, _ = _moments_of_limit(math.sqrt(t))
    told = f"T = {t}, N = {n}, ε = 1/{steps}, R = {n_replicas}"

    def samples(case: Tanh, found: Any) -> np.ndarray:
        # Errors of orders ε and 1/N are taken away by runs with both doubled; what is left is of order ε².
        fine, coarse = (found(_final(case, "sgd", steps // c, n // c, n_replicas, seed=2 + c)) for c in (1, 2))
        values: np.ndarray = 2 * fine - coarse
        return values

    def check(name: str, values: np.ndarray, expected: float) -> Check:
        return identity(name, values, np.full(n_replicas, expected))

    def both(theta: np.ndarray) -> np.ndarray:
        return np.stack([theta.var(1, ddof=1), Tanh().risks(theta)])

    spread, reached = samples(noisy, both)
    yield claim(check(f"variance, noise √(4Ts_k), {told}", spread, variance))
    half, _ = samples(printed, both)
    yield misprint(check("(8.1) as printed: variance, noise √(2Ts_k)", half, variance))
    yield claim(check("variance, √(2Ts_k), against (T/2)Δ", half, half_variance))
    yield claim(check(f"R_N(θ^k), s_k = ε/2, kε = 1, {told}", reached, risk))
    yield claim(check("R_N(θ^k), s_k = ε/2, kε = 1, T = 0", samples(cold, Tanh().risks), noiseless))
    twice = samples(replace(cold, speed=2.0), Tanh().risks)
    yield misprint(check("s_k = ε with t = kε: R_N(θ^k)", twice, noiseless))


@dataclass(frozen=True)
class Tanh(mfsde.NoisySGD):
    """f(z) = ∫ tanh(θz) ρ(dθ) on two data, one drawn at each step, from the uniform law on [0, 3/2].

    Args:
        sigma: √(2T).
        speed: s_k = speed·ε/2.
        n_quantiles: where positive, weights start at that many quantiles of the law instead of at random.

    """

    sigma: float = 0.0
    speed: float = 1.0
    n_quantiles: int = 0

    @cached_property
    def energy(self) -> Energy:
        """F = R/2."""
        return self.speed * mfsde.risk(tanh_of_product, "squared", INPUTS, TARGETS)

    def initial(self) -> Any:
        """The law, or its quantiles."""
        if not self.n_quantiles:
            return mfsde.Uniform([LOW], [HIGH])
        levels = (2 * torch.arange(self.n_quantiles, dtype=FLOAT64) + 1) / (2 * self.n_quantiles)
        return EmpiricalMeasure((LOW + (HIGH - LOW) * levels).unsqueeze(-1))

    def risks(self, theta: np.ndarray) -> np.ndarray:
        """R_N for every replica.    (R, N) -> (R,)."""
        with torch.no_grad():
            found: np.ndarray = 2 * self.energy(EmpiricalMeasure(torch.from_numpy(theta).unsqueeze(-1))).numpy()
        return found


@dataclass(frozen=True)
class OwnSamples(Tanh):
    """Every neuron is moved by a datum of its own."""

    def sample(self, draws: mfsde.Draws) -> Tensor:
        """Numbers of data for up to 256 neurons."""
        return draws.integers(self.n_quantiles or 256, len(TARGETS))

    def sampled_drift(self, t: float, x: Tensor, mu: EmpiricalMeasure, sample: Tensor) -> Tensor:
        """(R, N, 1)."""
        of_data = [
            super(OwnSamples, self).sampled_drift(t, x, mu, torch.full_like(sample[:, :1], s))
            for s in range(len(TARGETS))
        ]
        return torch.stack(of_data).gather(0, sample[None, :, : x.shape[1], None])[0]


LOW, HIGH = 0.0, 1.5
INPUTS = torch.tensor([[1.0], [2.0]], dtype=FLOAT64)
TARGETS = torch.tensor([1.2, -0.6], dtype=FLOAT64)


def tanh_of_product(theta: Tensor, z: Tensor) -> Tensor:
    """tanh(θz).    (..., N, 1, 1), (b, 1) -> (..., N, b)."""
    return torch.tanh(theta[..., 0, :] * z[:, 0])


def _moments_of_limit(sigma: float) -> tuple[float, float]:
    """Variance and risk at t = 1 by the Fokker-Planck equation."""
    found = limit.fokker_planck(Tanh(sigma=sigma), np.linspace(-3.0, 4.5, 97), [0.0, 1.0], rtol=1e-5)
    return float(found["covariance"][-1, 0, 0]), 2 * float(found["energy"][-1])


def _run(case: Tanh, method: str, steps: int, n: int, n_replicas: int, seed: int, horizon: float = 1.0) -> xr.Dataset:
    """To the horizon, first and last step kept."""
    return mfsde.simulate(
        case, n_particles=n, n_replicas=n_replicas, horizon=horizon, dt=horizon / steps, seed=seed, method=method,
        dtype=FLOAT64, save_every=steps,
    )  # fmt: skip


def _final(case: Tanh, method: str, steps: int, n: int, n_replicas: int, seed: int, horizon: float = 1.0) -> np.ndarray:
    """Weights at the horizon, (R, N)."""
    run = _run(case, method, steps, n, n_replicas, seed, horizon)
    found: np.ndarray = run["position"].values[-1, ..., 0]
    return found


def _controls(theta: np.ndarray, degree: int = 4) -> np.ndarray:
    """Means over neurons of Legendre polynomials, and their products, less what i.i.d. weights give.

    (R, N) -> (R, k), each of expectation zero under ρ_0.
    """
    z = (2 * theta - LOW - HIGH) / (HIGH - LOW)
    first: np.ndarray = np.polynomial.legendre.legvander(z, degree)[..., 1:].mean(1)
    i, j = np.triu_indices(degree)
    return np.column_stack([first, first[:, i] * first[:, j] - (i == j) / (theta.shape[1] * (2 * i + 3))])


def _without(error: np.ndarray, known: np.ndarray) -> np.ndarray:
    """What controls of mean zero leave of an error, of the same mean up to O(1/R).    (R,), (R, k) -> (R,)."""
    design = np.column_stack([np.ones(len(error)), known])
    rest: np.ndarray = error - known @ np.linalg.lstsq(design, error, rcond=None)[0][1:]
    return rest


def _power(n: np.ndarray, values: np.ndarray, root: float, *, next_order: bool = True) -> tuple[float, float]:
    """The power p in (E values)^root = (A n^q (1 + Bs))^root, s = 1/N or ε, and its error.    values: (K, R).

    Least squares on logarithms for q, log A and, with `next_order`, B, weighted by scatter. The error is over replicas,
    each at all n at once, since runs of equal seed share their noise.
    """
    size = np.abs(values.mean(1))
    logs, scatter, small = np.log(size), values.std(1, ddof=1) / size, np.minimum(n, 1 / n)
    columns, curve = [np.log(n), np.ones(len(n))], np.zeros(len(n))
    if next_order:
        low = [-math.inf, -math.inf, -0.9 / small.max()]

        def misfit(p: np.ndarray) -> np.ndarray:
            left: np.ndarray = (p[0] * columns[0] + p[1] + np.log1p(p[2] * small) - logs) / scatter
            return left

        b = optimize.least_squares(misfit, [*np.polyfit(np.log(n), logs, 1), 0.0], bounds=(low, math.inf)).x[2]
        columns, curve = [*columns, small / (1 + b * small)], np.log1p(b * small)
    weights = root * np.linalg.pinv(np.stack(columns, 1) / scatter[:, None])[0] / scatter
    _, stderr = mean_and_error(weights / values.mean(1) @ values)
    return float(weights @ (logs - curve)), stderr


def _slope(name: str, n: np.ndarray, values: Any, expected: float, *, root: float = 1.0, unmet: list[str]) -> Check:
    """The power against what is expected; sizes are such that s² moves it by less than its standard error."""
    found, stderr = _power(n, np.array(values), root)
    return identity(name, found, expected, stderr=stderr, hypotheses=unmet)


# Noise: low temperature and the free energy


@item(
    source="002, Theorem 8.1, (8.7)",
    statement="for every δ > 0 there are β* and t* with R(ρ_t) ≤ inf R + δ for β > β*(δ), t > t*(δ, β), t* the same "
    "for all N; R(ρ_t) → R(m*) ≤ R(ρ) + 2T (sup S − S(ρ)) for all ρ",
    hypotheses=("U, V smooth", "e^{−βΨ} integrable: a compact space, or confinement", "β > β*(δ)"),
    misprints=(
        "(8.7) prints R(ρ_t) ≤ R(ρ) + δ, which is empty for ρ = ρ_0; inf_ρ R(ρ) is meant",
        "the theorem prints β*(ε); it is a function of δ",
    ),
    fault="the noise is √(2Ts_k), that of half the temperature",
)
def low_temperature(quick: bool, faulty: bool) -> Iterator[Finding]:
    """Bumps on the circle: stationary laws against the minimum on a grid, and times at which risks are reached."""
    problem, delta, heat = Bumps().on_grid(3601), 0.15, 0.5 if faulty else 1.0
    rho = problem.minimiser()
    lowest = problem.risk(rho)
    # By (4.8) the minimum over measures is lower by what Ψ falls between the nodes: (its slope there times) a spacing.
    psi = problem.psi(rho)
    gap = 2 * float(np.abs(np.diff(psi))[rho[1:] > 0].max())
    temperatures = (1.0, 0.1, 0.01, 0.001) if quick else (3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)
    reached = {t: Bumps().risk(limit.gibbs(Bumps.at(heat * t), n_nodes=513)) for t in temperatures}
    for t in temperatures:
        bound = _smoothed_bound(problem, rho, t)
        yield claim(inequality(f"R(m*), T = {t}, against R(ρ) + 2T(sup S − S(ρ))", reached[t], bound))
    slopes = [(reached[t] - lowest) / t for t in temperatures]
    left = abs(slopes[-1] - slopes[-2]) + gap / temperatures[-1]
    name = f"(R(m*) − inf R)/T, T = {temperatures[-1]}: D = 1 by equipartition"
    yield claim(identity(name, slopes[-1], 1.0, discretisation=left))

    enough = max(t for t in temperatures if reached[t] <= lowest + delta)
    yield claim(inequality(f"R(m*) ≤ inf R + {delta}, β = {1 / enough:g}", reached[enough], lowest + delta))
    warm = Bumps().risk(limit.gibbs(Bumps.at(1.0), n_nodes=513))
    reason = "" if warm <= lowest + delta else f"β = 1 is below β*({delta}): m* itself has the risk {warm:.3g}"
    yield outside(inequality(f"R(m*) ≤ inf R + {delta}, β = 1", warm, lowest + delta, hypotheses=[reason]))
    yield from _times(quick, heat * 0.02, lowest, 0.3)
    yield claim(_afterwards(quick, 0.3, heat))


def _times(quick: bool, temperature: float, lowest: float, delta: float) -> Iterator[Finding]:
    """When noisy SGD is first below a level, for several N, against the equation's time."""
    times = np.linspace(0, 10, 101)
    flow = limit.fokker_planck(Bumps.at(0.02), None, times, n_nodes=97, rtol=1e-5)
    risks, level = 2 * flow["energy"].values, lowest + delta
    stated = float(_passage(times, risks[:, None], level)[0])
    slope = abs(float(np.interp(stated, times, np.gradient(risks, times))))
    law = limit.law_at(flow, stated).as_measure()
    own = float(law.integrate(lambda x: bump(x.unsqueeze(-2), ANGLES).square().mean(-1)))  # ∫ U(θ, θ) dρ
    sizes, n_replicas, dt = ((50, 200, 800), 8, 0.025) if quick else ((50, 200, 800, 3200), 48, 0.01)
    for n in sizes:
        run = mfsde.simulate(
            Bumps.at(temperature), n_particles=n, n_replicas=n_replicas, horizon=10.0, dt=dt, seed=n, method="sgd",
            keep_particles=0, save_every=round(0.1 / dt), observables=("energy",),
        )  # fmt: skip
        found = _passage(run.time.values, 2 * run["energy"].values, level)
        # Independent neurons exceed R by at most (∫ U(θ, θ) dρ)/N in the mean, as in Proposition 4.1.
        late = own / n / slope
        name = f"time to R ≤ inf R + {delta}, T = 0.02, N = {n}, R = {n_replicas}"
        yield claim(identity(name, found, np.full(n_replicas, stated), discretisation=late))


def _afterwards(quick: bool, temperature: float, heat: float) -> Check:
    """R_N(θ^k) for t in [12, 18], where what is left of the start is below 0.001, against the risk of m*."""
    n, dt, n_replicas = (400, 0.025, 16) if quick else (800, 0.0125, 64)

    def late(c: int) -> np.ndarray:
        run = mfsde.simulate(
            Bumps.at(heat * temperature), n_particles=n // c, n_replicas=n_replicas, horizon=18.0, dt=c * dt, seed=c,
            method="sgd", keep_particles=0, save_every=round(0.2 / (c * dt)), observables=("energy",),
        )  # fmt: skip
        values: np.ndarray = 2 * run["energy"].sel(time=slice(12, None)).mean("time").values
        return values

    stated = Bumps().risk(limit.gibbs(Bumps.at(temperature), n_nodes=513))
    # Errors of orders 1/N and ε are taken away by a run with both doubled.
    name = f"R_N(θ^k), t ≥ 12, T = {temperature}, against R(m*), N = {n}, ε = {dt}, R = {n_replicas}"
    return identity(name, 2 * late(1) - late(2), np.full(n_replicas, stated), discretisation=1e-3)


def _passage(times: np.ndarray, values: np.ndarray, level: float) -> np.ndarray:
    """First times at which columns are below a level, between saved times by a straight line.    (T, R) -> (R,).

    A column that stays above it is followed on straight from its end.
    """
    below = values <= level
    first = np.where(below.any(0), below.argmax(0), len(times) - 1)
    column = np.arange(values.shape[1])
    after, before = values[first, column], values[first - 1, column]
    found: np.ndarray = times[first - 1] + (before - level) / (before - after) * (times[first] - times[first - 1])
    return found


@dataclass(frozen=True)
class Bumps(mfsde.NoisySGD):
    """f(z) = ∫ 3 exp(2 (cos(θ - z) - 1)) ρ(dθ) on 12 angles: noisy SGD, one sample a step.

    The space of θ is a circle, so that e^{-Ψ/T} can be normalised for every T: bounded neurons on a line have a bounded
    Ψ, and no Boltzmann law (8.5).

    Args:
        sigma: √(2T).
        scale: of the energy, 1 for F = R/2.
        start: mean of the initial law.

    """

    sigma: float = 0.4
    scale: float = 1.0
    start: float = 1.5
    period: tuple[float] = (2 * math.pi,)

    @classmethod
    def at(cls, temperature: float, **fields: Any) -> Bumps:
        """With σ = √(2T)."""
        return cls(sigma=math.sqrt(2 * temperature), **fields)

    @cached_property
    def energy(self) -> Energy:
        """F = R/2."""
        return self.scale * mfsde.risk(bump, "squared", ANGLES, HEIGHTS)

    def initial(self) -> mfsde.Gaussian:
        """N(start, 0.1), read on the circle."""
        return mfsde.Gaussian([self.start], 0.1)

    def risk(self, law: mfsde.Law) -> float:
        """R of a law with a quadrature."""
        return 2 * float(self.energy(law.as_measure()))

    def on_grid(self, n: int) -> OnGrid:
        """R over probabilities on n - 1 nodes."""
        theta = torch.linspace(0, TURN, n, dtype=FLOAT64)[:-1]
        outputs = bump(theta[:, None, None], ANGLES).T / math.sqrt(len(ANGLES))
        return OnGrid(outputs.numpy(), HEIGHTS.numpy() / math.sqrt(len(ANGLES)))


TURN = 2 * math.pi
ANGLES = torch.linspace(0, TURN, 13, dtype=FLOAT64)[:-1].unsqueeze(-1)
# Narrower than one neuron, and away from 0 = 2π, so that means over [0, 2π) are those of the two clusters.
HEIGHTS = 2.4 * torch.exp(6 * (torch.cos(ANGLES[:, 0] - math.pi - 1.3) - 1))
HEIGHTS += 1.8 * torch.exp(6 * (torch.cos(ANGLES[:, 0] - math.pi + 1.1) - 1))


def bump(theta: Tensor, z: Tensor) -> Tensor:
    """3 exp(2 (cos(θ - z) - 1)).    (..., N, 1, 1), (b, 1) -> (..., N, b)."""
    return 3 * torch.exp(2 * (torch.cos(theta[..., 0, :] - z[:, 0]) - 1))


def _smoothed_bound(problem: OnGrid, rho: np.ndarray, temperature: float) -> float:
    """Min over w of R(ρ_w) + 2T (log 2π - S(ρ_w)), ρ_w = ρ* smoothed by a von Mises law of concentration 1/w."""
    nodes = np.linspace(0, TURN, len(rho) + 1)[:-1]
    atoms = rho > 0

    def bound(log_concentration: float) -> float:
        law = np.exp(math.exp(log_concentration) * (np.cos(nodes[:, None] - nodes[atoms]) - 1)) @ rho[atoms]
        law /= law.sum()
        entropy = -float((law[law > 0] * np.log(law[law > 0] / nodes[1])).sum())
        return problem.risk(law) + 2 * temperature * (math.log(TURN) - entropy)

    return float(optimize.minimize_scalar(bound, bounds=(-2.0, 10.0), method="bounded").fun)


@item(
    source="002, (8.2)-(8.6)",
    statement="dF(ρ_t)/dt = −∫|∇(Ψ + T log ρ_t)|² ρ_t dθ ≤ 0 for F = ½R − T S along ∂_tρ = ∇·(ρ∇Ψ) + TΔρ; F is "
    "strictly convex, ρ* = e^{−βΨ(·; ρ*)}/Z its one minimiser, the one fixed point and the limit of ρ_t; "
    "2T ‖ρ − ρ*‖² ≤ F(ρ) − F(ρ*) in variation, ‖·‖ = ½∫|·|",
    hypotheses=("U PSD, T > 0", "e^{−βΨ} integrable: a compact space, or confinement", "U, V smooth"),
    misprints=(
        "(8.5) is given for all of R^D: neurons that are bounded, as Theorem 5.1 asks, have a bounded Ψ and no such ρ*",
        "F is called strongly convex thanks to U PSD; that makes R convex; −T S makes F strictly convex, and strongly "
        "in total variation alone (Pinsker)",
    ),
    fault="the flow is that of R − T S: Ψ is δR/δρ, without its ½",
)
def free_energy(quick: bool, faulty: bool) -> Iterator[Finding]:
    """Densities and particles on the circle; two starts; mixtures; what is not convex, or not confined."""
    t = 0.3
    case, moved = Bumps.at(t), Bumps.at(t, scale=2.0 if faulty else 1.0)
    times = np.linspace(0, 2.0, 17)
    flow = limit.fokker_planck(moved, None, times, n_nodes=129 if quick else 257)
    laws = [limit.law_at(flow, s) for s in times]
    values = np.array([theory.free_energy(case, law) for law in laws])
    spent = np.array([theory.dissipation(case, law) for law in laws])
    first = 4  # the start is narrow, and F steep there
    whole, halved = (simpson(spent[first::c], x=times[first::c]) for c in (1, 2))
    change = values[-1] - values[first]
    name = f"F(ρ_t) − F(ρ_s), s = {times[first]:g}, t = {times[-1]:g}, density"
    yield claim(identity(name, change, -whole, discretisation=abs(whole - halved)))
    yield claim(inequality("largest increase of F between times", float(np.diff(values).max()), 0.0))
    run = mfsde.simulate(
        moved, n_particles=400 if quick else 2000, n_replicas=8 if quick else 32, horizon=2.0, dt=0.0125, seed=0,
        save_every=10,
    )  # fmt: skip
    found = theory.free_energy_dissipation(case, run, start=times[first], law=limit.flow(flow))
    yield claim(replace(found, name=f"(8.6) by particles, N = {run.sizes['particle']}, R = {run.sizes['replica']}"))

    star = limit.gibbs(moved, n_nodes=513)
    yield claim(theory.first_order(case, star))
    lowest = theory.free_energy(case, star)
    for start in (1.5, 4.5):
        late = limit.law_at(
            limit.fokker_planck(replace(moved, start=start), None, [0.0, 1.0, 4.0], n_nodes=129, rtol=1e-5), 4.0
        )
        # T KL(ρ | ρ*) <= F(ρ) - F(ρ*) for convex R, and Pinsker.
        bound = math.sqrt(max(theory.free_energy(case, late) - lowest, 0.0) / (2 * t))
        apart = _total_variation(late, star)
        yield claim(inequality(f"|ρ_4 − ρ*| in variation, from N({start}, 0.1)", apart, bound, discretisation=1e-4))
    yield from _convexity(case, laws[2], star)


def _convexity(case: Bumps, one: Any, other: Any) -> Iterator[Finding]:
    """R on a mixture; three stationary laws where U is not PSD; none where nothing confines."""
    share, mu, nu = 0.3, one.as_measure(), other.as_measure()
    mixture = EmpiricalMeasure.signed(
        torch.cat([mu.points, nu.points]), torch.cat([(1 - share) * mu.weights, share * nu.weights]), mu.period
    )
    gap = (1 - share) * case.energy(mu) + share * case.energy(nu) - case.energy(mixture)
    outputs = [m.integrate(lambda x: bump(x.unsqueeze(-2), ANGLES)) for m in (mu, nu)]
    squared = float((outputs[0] - outputs[1]).square().mean())  # ∬ U d(ρ - ρ')²
    yield claim(identity("2 × gap of R/2 below its chord", 2 * float(gap), share * (1 - share) * squared))
    well = DoubleWell(sigma=0.5)
    laws = limit.gibbs_all(well, n_nodes=257)
    x = np.array([[mu.mean().item()] for mu in (law.as_measure() for law in laws)])
    lowest = float(np.linalg.eigvalsh(-well.theta * x @ x.T)[0])
    reason = f"U(θ, θ') = −{well.theta:g} θθ' has the eigenvalue {lowest:.2g}" if lowest < 0 else ""
    yield outside(inequality("number of fixed points, double well", float(len(laws)), 1.0, hypotheses=[reason]))
    bounded = Tanh(n_quantiles=16)
    far = torch.tensor([[-2e3], [-1e3], [1e3], [2e3]], dtype=FLOAT64)
    ends = bounded.energy.functional_derivative(bounded.initial(), far)
    grows = float((ends[[0, 3]] - ends[[1, 2]]).max())
    reason = "" if grows > 1e-9 else "Ψ is constant towards ±∞: e^{−βΨ} does not decay, Z = ∞"
    yield outside(inequality("(8.5) for bounded neurons on R: Ψ(1000) < Ψ(2000)", 0.0, grows, hypotheses=[reason]))


def _total_variation(one: Any, other: Any) -> float:
    """½ ∫ |ρ - ρ'| on the circle."""
    x = torch.linspace(0, TURN, 4097, dtype=FLOAT64)[:-1].unsqueeze(-1)
    return float((one.log_prob(x).exp() - other.log_prob(x).exp()).abs().mean() * TURN / 2)


# Minimising movements


@item(
    source="002, (7.2)-(7.5); 003, (16)-(20)",
    statement="ρ₊ = argmin F(ρ) + W₂²(ρ, ρ_k)/2τ follows the W₂ flow of F, to first order in τ; for F = ½k∫|x|² + "
    "T∫ρ log ρ m₊ = m/(1 + τk), s₊ = (s + √(s² + 4τT(1 + τk)))/(2(1 + τk)); (5.4) is the flow of R/2",
    hypotheses=("finite second moments", "F semi-convex along geodesics, τ small enough"),
    misprints=(
        "002, (7.5) prints R(ρ) as the energy of (5.4); it is R/2, and with R the scheme runs twice as fast",
        "002, (7.5) minimises over ρ ∈ R^d; ρ ∈ P₂ is meant, and x_ε(kε) where (7.3) has x_ε(t)",
        "003 prints the weak form d/dt∫χ dμ = +∫∇χ·∇V dμ; it lacks a minus",
        "003, (19) prints ∇·∇(ρ∇V), a vector; it is ∇·(ρ∇V); as printed on the line the mean would not move",
    ),
    fault="the penalty is W₂²/τ in place of W₂²/2τ",
)
def jko(quick: bool, faulty: bool) -> Iterator[Finding]:
    """Gaussian steps in closed form, their order, the linear network, and the forms printed for the flow."""
    penalty = 0.5 if faulty else 1.0
    case, tau, n_steps = Quadratic(), 0.1, 4
    run = limit.jko(case, penalty * tau, n_steps)
    mean, deviation = _gaussian_steps(case, tau, n_steps)
    room = 1e-7  # of the minimisation: its gradient ends below 1e-9
    yield claim(identity(f"mean after {n_steps} steps, τ = {tau}", _mean(run), mean, discretisation=room))
    yield claim(identity(f"deviation after {n_steps} steps", _deviation(run), deviation, discretisation=room))
    m, cov = np.array([case.m0]), np.array([[case.v0]])
    for _ in range(n_steps):
        m, cov = limit.gaussian_step(m, cov, penalty * tau, case.k, case.temperature)
    yield claim(identity("deviation by gaussian_step", math.sqrt(cov[0, 0]), deviation))

    taus = (0.2, 0.1, 0.05, 0.025) if quick else (0.1, 0.05, 0.025, 0.0125, 0.00625)
    runs = [limit.jko(case, penalty * tau, round(1 / tau)) for tau in taus]
    exact_mean, exact_deviation = case.at(1.0)
    for what, value, exact in (("mean", _mean, exact_mean), ("deviation", _deviation, exact_deviation)):
        errors = [abs(value(run) - exact) for run in runs]
        orders = np.log2(np.array(errors[:-1]) / errors[1:])
        # Orders differ from 1 by O(τ): extrapolated to 0, and what the last halving changes then.
        before, found = (2 * orders[1:] - orders[:-1])[-2:]
        name = f"order in τ → 0, {what}, from τ = {taus[0]:g} … {taus[-1]:g}"
        yield claim(identity(name, float(found), 1.0, discretisation=abs(float(found - before))))

    yield from _linear_network(quick, penalty)
    yield from _printed_flows(quick)


def _linear_network(quick: bool, penalty: float) -> Iterator[Finding]:
    """(7.5) for f(z) = z ∫θ dρ: the mean at t = 1 with R/2 and, as printed, with R."""
    tau = 0.05 if quick else 0.0125
    a, b = float(Linear.inputs().square().mean()), float((Linear.inputs()[:, 0] * Linear.targets()).mean())

    def stated(t: float) -> float:
        return b / a + (1.0 - b / a) * math.exp(-a * t)

    def scheme(factor: float) -> tuple[float, float]:
        steps = [tau, tau / 2]
        return _extrapolated(*(_mean(limit.jko(Linear(factor), penalty * h, round(1 / h))) for h in steps))

    found, left = scheme(0.5)
    yield claim(identity("(7.5) with R/2, τ → 0: mean at t = 1", found, stated(1.0), discretisation=left))
    found, left = scheme(1.0)
    yield misprint(identity("(7.5) as printed, with R: mean at t = 1", found, stated(1.0), discretisation=left))
    yield claim(identity("(7.5) with R, t = 1: the mean at t = 2", found, stated(2.0), discretisation=left))


def _extrapolated(coarse: float, fine: float) -> tuple[float, float]:
    """The value at τ = 0 from τ and τ/2, where errors are of order one, and a half of what the last halving changed."""
    return 2 * fine - coarse, abs(fine - coarse) / 2


def _printed_flows(quick: bool) -> Iterator[Finding]:
    """003: the weak form along interacting neurons, and (19) on the line."""
    x, y = ErfTeacher().data(100, 7)
    energy = mfsde.risk(erf_of_product, "squared", x, y)
    run = mfsde.simulate(
        Descent(energy), n_particles=20, n_replicas=8 if quick else 32, horizon=1.0, dt=1 / 64, seed=0, save_every=4,
        method="midpoint", dtype=FLOAT64,
    )  # fmt: skip
    theta = torch.from_numpy(run["position"].values)
    chi = theta.square().sum(-1).mean(-1).numpy()
    product = torch.stack([2 * (x_ * energy.intrinsic_derivative(EmpiricalMeasure(x_), x_)).sum(-1) for x_ in theta])
    rate = product.mean(-1).numpy()
    whole, halved = (simpson(rate[::c], x=run.time.values[::c], axis=0) for c in (1, 2))
    # Midpoint steps err by h² of what the rate moves by.
    left = float(np.abs(whole - halved).mean()) + float(np.abs(rate[-1] - rate[0]).mean()) / 64**2
    change = chi[-1] - chi[0]
    yield claim(identity("∫χ dμ_1 − ∫χ dμ_0 = −∫∫∇χ·∇V, χ = |θ|²", change, -whole, discretisation=left))
    yield misprint(identity("003, weak form as printed, without minus", change, whole, discretisation=left))

    case = Quadratic()
    found = limit.fokker_planck(case, None, [0.0, 1.0])
    mean, declared = _mean(found), float(found["mean_error"].values[-1, 0])
    yield claim(identity("∂_tρ = ∇·(ρ∇V) + TΔρ: mean at t = 1", mean, case.at(1.0)[0], discretisation=declared))
    # d/dt ∫ x (ρV')'' dx = 0 by parts: as printed the mean does not move.
    yield misprint(identity("003, (19) as printed, on the line: mean", mean, case.m0, discretisation=declared))


@dataclass(frozen=True)
class Quadratic:
    """F = ½k ∫x² dm at the temperature T = σ²/2, from N(1, ½)."""

    k: float = 1.5
    sigma: float = 0.8
    m0: float = 1.0
    v0: float = 0.5

    @cached_property
    def energy(self) -> Energy:
        """½k ∫x² dm."""
        return mfsde.potential(lambda x: 0.5 * self.k * x.square().sum(-1))

    @property
    def temperature(self) -> float:
        """T."""
        return 0.5 * self.sigma**2

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """-kx."""
        return -self.k * x

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> float:
        """σ."""
        return self.sigma

    def initial(self) -> mfsde.Gaussian:
        """N(m0, v0)."""
        return mfsde.Gaussian([self.m0], self.v0)

    def at(self, t: float) -> tuple[float, float]:
        """Mean and deviation at a time."""
        rest = self.temperature / self.k
        variance = rest + (self.v0 - rest) * math.exp(-2 * self.k * t)
        return self.m0 * math.exp(-self.k * t), math.sqrt(variance)


@dataclass(frozen=True)
class Linear:
    """factor × R for f(z) = z ∫θ dm on two data, with σ = 0.5, from N(1, ½)."""

    factor: float = 0.5
    sigma: float = 0.5

    @staticmethod
    def inputs() -> Tensor:
        """(2, 1)."""
        return torch.tensor([[0.5], [1.2]], dtype=FLOAT64)

    @staticmethod
    def targets() -> Tensor:
        """(2,)."""
        return torch.tensor([1.0, -0.8], dtype=FLOAT64)

    @cached_property
    def energy(self) -> Energy:
        """R is twice the squared risk."""
        return 2 * self.factor * mfsde.risk(_line, "squared", self.inputs(), self.targets())

    def initial(self) -> mfsde.Gaussian:
        """N(1, ½)."""
        return mfsde.Gaussian([1.0], 0.5)


def _line(theta: Tensor, z: Tensor) -> Tensor:
    return theta[..., 0, :] * z[:, 0]


def _gaussian_steps(case: Quadratic, tau: float, n_steps: int) -> tuple[float, float]:
    """Mean and deviation after steps, by the formula."""
    m, s, growth = case.m0, math.sqrt(case.v0), 1 + tau * case.k
    for _ in range(n_steps):
        m, s = m / growth, (s + math.sqrt(s * s + 4 * tau * case.temperature * growth)) / (2 * growth)
    return m, s


def _mean(run: xr.Dataset) -> float:
    return float(run["mean"].values[-1].squeeze())


def _deviation(run: xr.Dataset) -> float:
    return math.sqrt(float(run["covariance"].values[-1].squeeze()))
