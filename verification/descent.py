"""Gradient flows of homogeneous particles: the minimal-norm velocity, many particles, global minima and how many."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
import xarray as xr
from scipy.optimize import brentq
from torch import Tensor

import mfsde
from mfsde import EmpiricalMeasure, Energy, Gaussian, Uniform
from mfsde.analysis import rates, wasserstein
from mfsde.analysis.check import identity, inequality
from mfsde.gradient_flow import GradientFlow
from mfsde.limit import characteristics
from mfsde.limit.convex import SparseMeasure, features_of_gram, sparse_measure, sparse_measure_over
from mfsde.measure import Dirac
from mfsde.model import with_methods
from mfsde.product import Product
from mfsde.regularisers import L1
from mfsde.scenarios import PlantedNetwork, SparseSpikes

from .function_space import extrapolated
from .item import Finding, claim, item, misprint, outside

Array = np.ndarray
DOUBLE = torch.float64
TURN = 2 * math.pi

# The problems --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planted:
    """A problem with its least objective over all measures.

    Args:
        name: in words.
        case: the flow.
        dt: steps at which its objective does not increase.
        horizon: time by which many particles are near the minimum.
        grid: parameters of places θ, (g, p), all over them.
        spacing: distance of neighbours there, (p,).

    """

    name: str
    case: Any
    dt: float
    horizon: float
    grid: Array
    spacing: Array

    def places(self, parameters: Array) -> Array:
        """The places that parameters stand for: points of the circle, or of the ball, or unit vectors.    (k, d)."""
        if isinstance(self.case, SparseSpikes):
            return parameters
        angle = parameters[:, -1:]
        unit = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
        if self.case.activation == "signed_square":
            return np.asarray(unit / np.abs(unit).sum(1, keepdims=True))
        return unit if self.case.activation == "relu" else np.clip(parameters[:, :1], 0.0, self.case.radius) * unit

    def places_of(self, x: Array) -> Array:
        """The places of particles (N, d)."""
        theta = x[:, 1:]
        if isinstance(self.case, PlantedNetwork) and self.case.activation == "relu":
            return np.asarray(theta / np.linalg.norm(theta, axis=1, keepdims=True))
        return theta

    @cached_property
    def planted(self) -> tuple[Array, Array]:
        """Amplitudes and places of what is to be found."""
        if isinstance(self.case, SparseSpikes):
            found = np.array(self.case.spikes)
            return found[:, 0], found[:, 1:] * self.case.circumference
        return self.case.planted[:, 0].numpy(), self.case.planted[:, 1:].numpy()

    def kernel(self, a: Array, b: Array) -> Array:
        """⟨φ(a), φ(b)⟩ at places."""
        if isinstance(self.case, SparseSpikes):
            k = np.arange(1, self.case.cutoff + 1) * TURN / self.case.circumference
            return np.asarray((1 + 2 * np.cos((a - b.T)[..., None] * k).sum(-1)) / (2 * self.case.cutoff + 1))
        return np.asarray(self.case.kernel(torch.from_numpy(a), torch.from_numpy(b)))

    @cached_property
    def least(self) -> SparseMeasure:
        """The minimiser over all places, its duality gap at most 1e-10 of the objective."""
        w, at = self.planted
        return sparse_measure_over(
            lambda a, b: self.kernel(self.places(a), self.places(b)),
            lambda a: np.asarray(self.kernel(self.places(a), at) @ w),
            float(w @ self.kernel(at, at) @ w), self.case.penalty, self.grid, self.spacing,
        )  # fmt: skip

    @cached_property
    def n_atoms(self) -> int:
        """m₀: places of the minimiser, those closer than a hundredth of the whole counted once."""
        at = self.places(self.least.nodes) if self.least.nodes is not None else np.zeros((0, 1))
        apart = 0.01 * float(np.ptp(self.places(self.grid), axis=0).max())
        kept: list[Array] = []
        for place in at[np.abs(self.least.weights).argsort()[::-1]]:
            if all(np.linalg.norm(self.difference(place, other)) > apart for other in kept):
                kept.append(place)
        # σ(-s) = 1 - σ(s): the minimiser may not be unique, and the one with the fewest places is meant.
        enough = self.least.objective + 1e-7 * self.least.objective
        for place in kept[::-1]:
            rest = [other for other in kept if other is not place]
            near = (
                [x for x in at if min(np.linalg.norm(self.difference(x, other)) for other in rest) <= apart]
                if rest
                else []
            )
            if near and self.on_nodes(np.array(near)).objective < enough:
                kept = rest
        return len(kept)

    def difference(self, a: Array, b: Array) -> Array:
        """A - b, on the circle the shorter way."""
        if isinstance(self.case, SparseSpikes):
            half = self.case.circumference / 2
            return np.asarray((a - b + half) % (2 * half) - half)
        return np.asarray(a - b)

    @cached_property
    def minimiser(self) -> EmpiricalMeasure:
        """The minimiser as a measure of neurons of amplitude 1 with signed masses."""
        at = self.places(self.least.nodes) if self.least.nodes is not None else self.planted[1][:0]
        if isinstance(self.case, PlantedNetwork) and self.case.activation == "signed_square":
            at = np.sign(at) * np.sqrt(np.abs(at))
        neurons = torch.from_numpy(np.concatenate([np.ones((len(at), 1)), at], axis=1))
        return EmpiricalMeasure.signed(neurons[None], torch.from_numpy(self.least.weights)[None])

    def on_nodes(self, places: Array, *, nonnegative: bool = False) -> SparseMeasure:
        """The convex problem on a grid of places (k, d), over signed measures or those >= 0."""
        w, at = self.planted
        square = float(w @ self.kernel(at, at) @ w)
        gram, pull = self.kernel(places, places), self.kernel(places, at) @ w
        return sparse_measure(*features_of_gram(gram, pull, square), self.case.penalty, nonnegative=nonnegative)

    def of_one(self, places: Array) -> float:
        """The least objective of all particles at one of these places (k, d): w by the soft threshold."""
        w, at = self.planted
        pull = np.abs(self.kernel(places, at) @ w)
        size = np.array([self.kernel(x[None], x[None])[0, 0] for x in places])
        gains = np.maximum(pull - self.case.penalty, 0.0) ** 2 / (2 * size)
        return 0.5 * float(w @ self.kernel(at, at) @ w) - float(gains.max())

    def run(self, n_particles: int, n_replicas: int, horizon: float | None = None, **settings: Any) -> xr.Dataset:
        """Particles of the flow, or of `scenario`."""
        dt = settings.get("dt", self.dt)
        end = dt * round((self.horizon if horizon is None else horizon) / dt)
        scenario = settings.pop("scenario", self.case)
        shared = {"dt": dt, "seed": 0, "method": "proximal", "dtype": DOUBLE, **settings}
        return mfsde.simulate(scenario, n_particles=n_particles, n_replicas=n_replicas, horizon=end, **shared)

    def gap(self, mu: EmpiricalMeasure) -> Array:
        """F(μ) less the dual value at the residual of μ, scaled until |η| <= 1 on the grid, (R,): >= F(μ) - F*."""
        w, at = self.planted
        everywhere = torch.from_numpy(self.places(self.grid))
        highest = self.certificate(mu, everywhere).abs().amax(-1)
        scale = torch.clamp(1 / highest, max=1.0)
        along_target = self.case.penalty * self.certificate(mu, torch.from_numpy(at)) @ torch.from_numpy(w)
        dual = scale * along_target - scale.square() * self.case.energy(mu)
        return np.asarray(self.case.objective(mu) - dual)

    def certificate(self, mu: EmpiricalMeasure, places: Tensor) -> Tensor:
        """η at places (k, d), the same for all replicas.    (R, k)."""
        shared = places[:, 0] if isinstance(self.case, SparseSpikes) else places
        eta: Tensor = self.case.certificate(mu, shared.expand(len(mu.points), *shared.shape))
        return eta


def polar(radius: float, n_radii: int = 10, n_angles: int = 240) -> tuple[Array, Array]:
    """A grid of the disc in polar coordinates, and its spacing."""
    r, angle = np.meshgrid(np.arange(1, n_radii + 1) / n_radii * radius, np.arange(n_angles) / n_angles * TURN)
    return np.stack([r, angle], -1).reshape(-1, 2), np.array([radius / n_radii, TURN / n_angles])


def circle(length: float = TURN, n: int = 720) -> tuple[Array, Array]:
    """A grid of a circle, and its spacing."""
    return np.arange(n)[:, None] / n * length, np.array([length / n])


@lru_cache
def spikes() -> Planted:
    """Sparse deconvolution on the circle."""
    return Planted("spikes", SparseSpikes(circumference=24.0), 0.05, 200.0, *circle(24.0))


@lru_cache
def sigmoid() -> Planted:
    """A network of sigmoid units, V = λ|w|."""
    case = PlantedNetwork(
        "sigmoid", n_data=100, n_planted=4, planted_scale=4.0, penalty=0.01, radius=4.0, initial_scale=4.0, data_seed=4
    )
    return Planted("sigmoid", case, 5.0, 5000.0, *polar(4.0))


@lru_cache
def relu() -> Planted:
    """A network of ReLU units, V = λ|w||θ|."""
    return Planted("ReLU", PlantedNetwork("relu", n_planted=3, penalty=0.01, data_seed=3), 1.0, 2000.0, *circle())


@lru_cache
def signed_square() -> Planted:
    """A network of ReLU units of s(θ) = θ|θ|, V = λ|θ|²."""
    case = PlantedNetwork("signed_square", n_planted=3, penalty=0.01, data_seed=3)
    return Planted("signed square", case, 0.4, 800.0, *circle())


def final(run: xr.Dataset, time: int = -1) -> EmpiricalMeasure:
    """The particles at a saved time."""
    return EmpiricalMeasure(torch.from_numpy(run["position"].values[time]))


# 000, Proposition 2.3 ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Thresholded(GradientFlow):
    """F = ½(∫ x dm - y)², V = λ|x|: x_i' = y - M - λ sign x_i, and 0 at x_i = 0 while |y - M| <= λ."""

    target: float = -0.8
    threshold: float = 0.35

    @cached_property
    def energy(self) -> Energy:
        """½(∫ x dm - y)²."""
        return Energy(lambda mu: 0.5 * (mu.integrate(lambda x: x[..., 0]) - self.target).square())

    @cached_property
    def regulariser(self) -> L1:
        """λ|x|."""
        return L1(self.threshold)

    def smooth_drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """Y - M for all."""
        return (self.target - mu.mean()).expand_as(x)

    def initial(self) -> Gaussian:
        """N(0, 1)."""
        return Gaussian([0.0], [[1.0]])


def thresholded_path(case: Thresholded, x: Array, times: Array) -> Array:
    """The exact path, from one event to the next: a particle meets 0, or those at 0 are let go.    (N,) -> (T, N)."""
    out, t, done, n = np.empty((len(times), len(x))), 0.0, 0, len(x)
    while done < len(times):
        mean = x.mean()
        v = case.target - mean
        free = (x != 0) | (abs(v) > case.threshold)
        sign = np.where(x != 0, np.sign(x), np.sign(v)) * free
        share, pull = free.sum() / n, case.threshold * sign.sum() / n
        rest = case.target - pull / share if share else mean

        def path(s: float, x: Array = x, sign: Array = sign, share: float = share, rest: float = rest) -> Array:
            """Free ones move by ∫(y - M) and their kink, M' = share·(rest - M)."""
            if not share:
                return x
            drawn = (case.target - rest) * s - (x.mean() - rest) * -np.expm1(-share * s) / share
            return np.where(sign != 0, x + drawn - case.threshold * sign * s, 0.0)

        end = times[-1] - t
        for side in (-1.0, 1.0):
            ahead = np.where(sign == side, x * side, np.inf)
            if np.isfinite(ahead).any():
                i = int(ahead.argmin())
                grid = np.linspace(0, end, 400)[1:]
                met = np.flatnonzero([path(s)[i] * side <= 0 for s in grid])
                if len(met) and end > 0:
                    low = 1e-12 if met[0] == 0 else grid[met[0] - 1]
                    root = (
                        brentq(lambda s, i=i: path(s)[i], low, grid[met[0]], xtol=1e-14)
                        if path(low)[i] * side > 0
                        else low
                    )
                    end = min(end, root)
            # M relaxes monotonically: it leaves |y - M| <= λ where its rest is outside.
            beyond = (case.target - rest) * side > case.threshold
            if share and (~free).any() and beyond:
                out_at = case.target - side * case.threshold
                end = min(end, max(math.log((mean - rest) / (out_at - rest)) / share, 1e-12))
        while done < len(times) and times[done] <= t + end + 1e-13:
            out[done] = path(times[done] - t)
            done += 1
        moved = path(end)
        # At an event the particle that met 0 is there exactly.
        x, t = np.where(np.abs(moved) < 1e-11, 0.0, moved), t + end
    return out


def order(errors: dict[float, Array], over: str = "dt") -> dict[str, float]:
    """The exponent of errors, one value per replica for each step, and what it moves without the coarsest step."""
    steps = sorted(errors)
    coarsest = steps[-1] if over == "dt" else steps[0]

    def fitted(chosen: list[float]) -> rates.Rate:
        table = xr.DataArray(np.stack([errors[s] for s in chosen]), dims=(over, "replica"), coords={over: chosen})
        return rates.power(table, over)

    every, finer = fitted(steps), fitted([s for s in steps if s != coarsest])
    return {"value": every.value, "stderr": every.stderr, "bias": abs(every.value - finer.value)}


def energy_lost(scenario: Any, run: xr.Dataset) -> tuple[Array, Array]:
    """F_m(0) - F_m(T) and ∫ m⁻¹Σ|u_i'|² dt by the trapezoidal rule, of a run saved at every step.    (R,), (R,)."""
    rate = np.stack([np.asarray(scenario.dissipation(0.0, final(run, k))) for k in range(run.sizes["time"])])
    objective = run["objective"].values
    step = float(run["time"][1] - run["time"][0])
    return objective[0] - objective[-1], step * (rate[1:] + rate[:-1]).sum(0) / 2


@item(
    source="000, Proposition 2.3",
    statement="u_i' = ṽ(u_i) − proj_{∂V(u_i)} ṽ(u_i) has one solution, and d/dt F_m = −(1/m) Σ_i |u_i'|²",
    hypotheses=(
        "R differentiable, dR Lipschitz on bounded sets and bounded on sublevel sets; V semiconvex",
        "Φ differentiable, dΦ Lipschitz on each Q_r, dΦ and ∂V of linear growth in r",
        "ReLU units: dΦ is not Lipschitz, but with inputs N(0, I) their velocity field is, away from θ = 0",
    ),
    misprints=(
        "|u'|² printed without its norm: with the Euclidean one, Σ_i |u_i'|², the identity is m times too large",
    ),
    fault="the proximal map is taken with half the step, so that the kink holds half as strongly",
)
def particle_flow(quick: bool, faulty: bool) -> Iterator[Finding]:
    """The soft threshold exactly, the energy identity, and one limit of two schemes."""
    case, n, replicas, horizon = Thresholded(), 12, 6 if quick else 24, 6.0
    run_case = halved(case) if faulty else case
    steps = (0.1, 0.05, 0.025, 0.0125) if quick else (0.1, 0.05, 0.025, 0.0125, 0.00625)
    times = np.linspace(0, horizon, 31)
    settings: dict[str, Any] = {
        "n_particles": n,
        "n_replicas": replicas,
        "horizon": horizon,
        "seed": 0,
        "dtype": DOUBLE,
    }
    found: dict[str, dict[float, Array]] = {"proximal": {}, "euler": {}}
    for method, paths in found.items():
        scenario = run_case if method == "proximal" else case
        for h in steps:
            run = mfsde.simulate(scenario, dt=h, save_every=round(0.2 / h), method=method, **settings)
            paths[h] = run["position"].values[..., 0]
    start = found["proximal"][steps[0]][0]
    exact = np.stack([thresholded_path(case, x, times) for x in start], axis=1)
    error = {h: np.abs(x - exact).mean((0, 2)) for h, x in found["proximal"].items()}
    p = order(error)
    yield claim(
        identity(
            "order in h to the exact path of V = λ|x|", p["value"], 1.0, stderr=p["stderr"], discretisation=p["bias"]
        )
    )
    held = (found["proximal"][steps[-1]][-1] == 0).mean(-1)
    yield claim(identity("share that is at the kink at t = 6", held, (exact[-1] == 0).mean(-1)))
    apart = {h: np.abs(found["proximal"][h] - found["euler"][h]).mean((0, 2)) for h in steps}
    q = order(apart)
    yield claim(
        identity("order in h, proximal against Euler", q["value"], 1.0, stderr=q["stderr"], discretisation=q["bias"])
    )
    for problem, end in ((spikes(), 4.0), (relu(), 8.0)):
        lost = {}
        for h in (problem.dt / 5, problem.dt / 10):
            scenario = halved(problem.case) if faulty else problem.case
            run = problem.run(10, replicas, end, scenario=scenario, dt=h, save_every=1)
            lost[h] = energy_lost(problem.case, run)
        coarse, fine = lost.values()
        bias = float(np.abs((coarse[0] - coarse[1]) - (fine[0] - fine[1])).mean())
        name = f"F_m(0) − F_m({end:g}), {problem.name}, m = 10"
        yield claim(identity(name, fine[0], fine[1], discretisation=bias))
        yield misprint(identity(f"{name}, Euclidean norm", fine[0], 10 * fine[1], discretisation=bias))


def halved(case: Any) -> Any:
    """The flow whose proximal map takes half the step."""
    return with_methods(case, {"proximal": lambda x, h: case.regulariser.prox(x, h / 2)})


# 000, Theorem 2.6 ----------------------------------------------------------------------------------------------------


def smooth_network() -> Any:
    """A tanh network without regulariser: its velocity field is smooth, so that characteristics carry the limit."""
    case = PlantedNetwork("tanh", n_inputs=1, n_data=20, n_planted=2, planted_scale=2.0, initial_scale=2.0)
    none: dict[str, Any] = {"regulariser": None}
    return with_methods(case, none)


def neurons_at(case: Any, theta: Array) -> Any:
    """The flow that starts from neurons (0, θ).    (N,) or (R, N)."""
    points = torch.from_numpy(np.stack([np.zeros_like(theta), theta], -1))
    return with_methods(case, {"initial": lambda: EmpiricalMeasure(points)})


def faster(case: Any) -> Any:
    """The velocity with that of w multiplied by 1.25."""

    def velocity(t: float, x: Tensor, mu: EmpiricalMeasure) -> Any:
        return case.smooth_drift(t, x, mu) * x.new_tensor([1.25, 1.0])

    return velocity


def midpoints(n: int) -> Array:
    """The n points of the uniform law on [-2, 2] nearest to it."""
    return np.asarray(-2 + 4 * (np.arange(n) + 0.5) / n)


@item(
    source="000, Theorem 2.6",
    statement="μ_{m,0} → μ_0 in W₂ implies μ_{m,t} → μ_t in W₂, μ the Wasserstein gradient flow from μ_0; where the "
    "velocity field is Lipschitz, at the rate of the start",
    hypotheses=("all μ_{m,0} in one set Q_r", "W₂(μ_{m,0}, μ_0) → 0", "no regulariser, tanh units: a smooth field"),
    fault="the output weights w move at 1.25 times their speed",
)
def many_particles(quick: bool, faulty: bool) -> Iterator[Finding]:
    """A tanh network from {0} × U(−2, 2): W₂ of m particles to the limit along characteristics."""
    case, horizon = smooth_network(), 1.0
    moved = with_methods(case, {"smooth_drift": faster(case)}) if faulty else case
    settings = {"horizon": horizon, "dt": 1.0, "seed": 0, "method": "dopri5", "dtype": DOUBLE}
    n_limit = 256 if quick else 1024
    laws = {}
    for n in (n_limit // 2, n_limit):
        start = EmpiricalMeasure(torch.from_numpy(np.stack([np.zeros(n), midpoints(n)], -1)))
        laws[n] = characteristics(case, [0.0, horizon], start=start)["position"].values[-1, 0]

    def ends(scenario: Any, n: int, **changed: Any) -> Array:
        run = mfsde.simulate(scenario, n_particles=n, **{**settings, **changed})
        return np.asarray(run["position"].values[-1])

    def to_limit(x: Array, n: int = n_limit) -> float:
        return float(wasserstein.distance(x, laws[n]))

    # The best start: W₂(μ_{m,0}, μ_0) = 2/(√3 m) exactly.
    sizes: tuple[int, ...] = (4, 8, 16, 32) if quick else (8, 16, 32, 64)
    x = {m: ends(neurons_at(moved, midpoints(m)), m)[0] for m in sizes}
    slope, finer, of_half = (
        float(np.polyfit(np.log(chosen), np.log([to_limit(x[m], n) for m in chosen]), 1)[0])
        for chosen, n in ((sizes, n_limit), (sizes[1:], n_limit), (sizes, n_limit // 2))
    )
    bias = 2 * abs(slope - finer) + abs(slope - of_half)
    yield claim(identity("slope of W₂ in m at t = 1, equidistant start", slope, -1.0, discretisation=bias))
    # Independent particles: E W₂² = |b - a|²/6m at the start, and the same order later.
    replicas, sizes = (100, (8, 16, 32, 64)) if quick else (200, (16, 32, 64, 128, 256))
    alike = with_methods(moved, {"initial": lambda: Product([Dirac([0.0]), Uniform([-2.0], [2.0])])})
    batch = {"n_replicas": replicas, "dt": 0.05, "method": "heun"}
    squared = order(
        {float(m): np.array([to_limit(y, n_limit // 2) ** 2 for y in ends(alike, m, **batch)]) for m in sizes},
        "n_particles",
    )
    error, bias = squared["stderr"], squared["bias"]
    yield claim(
        identity("slope of E W₂² in m at t = 1, independent", squared["value"], -1.0, stderr=error, discretisation=bias)
    )
    # Particles of the wrong law: the theorem says nothing, and indeed nothing converges.
    wrong = {m: to_limit(ends(neurons_at(case, midpoints(m) / 2), m)[0]) for m in (8, 32)}
    at_start = wasserstein.distance(midpoints(32)[:, None] / 2, midpoints(n_limit)[:, None])
    unmet = f"W₂(μ_(m,0), μ_0) = {at_start:.3g} at m = 32: it does not tend to 0" if at_start > 0.1 else ""
    yield outside(identity("W₂ at t = 1, m = 32, from U(−1, 1)", wrong[32], wrong[8] / 4, hypotheses=[unmet]))


# 000, Proposition 3.1 and Lemma C.15 ---------------------------------------------------------------------------------


def everywhere(problem: Planted, mu: EmpiricalMeasure) -> Array:
    """Max |η| over the grid, (R,): F'(μ)(±1, θ) = λ(1 ∓ η) >= 0 is |η| <= 1."""
    places = torch.from_numpy(problem.places(problem.grid))
    return np.asarray(problem.certificate(mu, places).abs().amax(-1))


def on_support(problem: Planted, mu: EmpiricalMeasure) -> Array:
    """∫ F'(μ) dμ / ∫ V dμ, 0 where F' vanishes on the support.    (R,).

    Φ is 1-homogeneous in w, so that ⟨r, Φ(x)⟩ = -w ṽ_w(x).
    """
    cost = mu.integrate(problem.case.regulariser.value)
    slopes = -problem.case.smooth_drift(0.0, mu.points, mu)[..., 0] * mu.points[..., 0]
    return np.asarray(mu.integrate(lambda x: slopes) / cost + 1)


@item(
    source="000, Proposition 3.1 and Lemma C.15",
    statement="μ minimises F iff F'(μ) ≥ 0, = 0 μ-a.e.; lim_t lim_m F(μ_{m,t}) = F* = lim_m lim_t F(μ_{m,t})",
    hypotheses=(
        "F convex",
        "F(μ_t) → F* for the flow from μ_0",
        "μ_{m,0} → μ_0 in W₂, all in one set Q_r",
        "measured: F falls like a power of t or faster, |η| and F' on the support like 1/t, all like 1/m or faster",
    ),
    fault="the flow descends with λ 3 % too small",
)
def optimality(quick: bool, faulty: bool) -> Iterator[Finding]:
    """The certificate at the convex minimiser and at the end of the flow, and the limits in both orders."""
    replicas = 3 if quick else 6
    for problem in (spikes(), sigmoid()) if quick else (spikes(), sigmoid(), relu()):
        case, least = problem.case, problem.least
        mu = problem.minimiser
        top = float(everywhere(problem, mu).max())
        # A gap of 1e-10 F* leaves |η| - 1 <= 1e-10 F*/(λ ∫|w|), and the flat top hides places by the root of that.
        rounding = 1e-10 * least.objective / (case.penalty * float(np.abs(least.weights).sum()))
        yield claim(inequality(f"{problem.name}: max |η| at the convex minimiser", top, 1.0, discretisation=rounding))
        rest = float(np.abs(least.certificate - np.sign(least.weights)) @ np.abs(least.weights))
        yield claim(
            identity(
                f"{problem.name}: Σ|w||η − sign w| there",
                rest,
                0.0,
                discretisation=1e-10 * least.objective / case.penalty,
            )
        )
        run_case = replace(case, penalty=0.97 * case.penalty) if faulty else case
        steps = round(problem.horizon / problem.dt)
        end, m = steps * problem.dt, 100
        run = problem.run(m, replicas, end, scenario=run_case, save_every=steps // 4)
        middle, before, late = (final(run, k) for k in (2, 3, 4))
        for what, measured, limit in (("max |η|", everywhere, 1.0), ("∫F'(μ)dμ/∫V dμ", on_support, 0.0)):
            # What falls like 1/t or faster is within 3 times the change from 3t/4 to t of where it ends.
            then, now = measured(problem, before), measured(problem, late)
            yield claim(
                identity(
                    f"{problem.name}: {what} at m = {m}, t = {end:g}",
                    now,
                    np.full(replicas, limit),
                    discretisation=3 * float(np.abs(now - then).mean()) + rounding,
                )
            )
        # Weak duality: no measure is further from the minimum than its gap.
        share = (np.asarray(case.objective(middle)) - least.objective) / problem.gap(middle)
        yield claim(
            inequality(f"{problem.name}: (F(μ) − F*)/gap(μ), t = {end / 2:g}, the largest", float(share.max()), 1.0)
        )
    yield from commuting(quick, faulty)


def commuting(quick: bool, faulty: bool) -> Iterator[Finding]:
    """F(μ_{m,t}) of sigmoid networks: t → ∞ for a fixed m, and m → ∞ at fixed times before t → ∞."""
    problem, replicas = sigmoid(), 4 if quick else 16
    case = replace(problem.case, penalty=0.97 * problem.case.penalty) if faulty else problem.case
    quarter, sizes = (100, (2, 8, 32)) if quick else (250, (2, 32, 128))
    t, found = 4 * quarter * problem.dt, {}
    for m in sizes:
        run = problem.run(m, replicas, t, scenario=case, save_every=quarter)
        found[m] = np.stack([np.asarray(problem.case.objective(final(run, k))) for k in (1, 2, 4)])
    few, middle, many = sizes
    least = np.full(replicas, problem.least.objective)
    at_many, left = extrapolated(list(found[many]))
    told = f"from t = {t / 4:g}, {t / 2:g}, {t:g}"
    yield claim(identity(f"F(μ_(m,t)), t → ∞ at m = {many}, {told}; F*", at_many, least, discretisation=left))
    # c/m, or faster: from m to 4m a third of the change is left.
    change = (found[middle] - found[many]) / 3
    limit, left = extrapolated(list(found[many] - change))
    apart = left + float(np.abs((limit - at_many).mean()))
    yield claim(
        identity(f"the same, m → ∞ from {middle} and {many}, then t → ∞; F*", limit, least, discretisation=apart)
    )
    yield claim(
        inequality(f"log₁₀(F − F*) at t = {t:g}: m = {many} ≤ m = {few}", *(
            np.log10(np.maximum(found[m][-1] - least, problem.least.gap)) for m in (many, few)
        ))
    )  # fmt: skip


# 000, Theorems 3.3 and 3.5, Propositions 4.2 and 4.3 -----------------------------------------------------------------


def hole(directions: Array) -> float:
    """The largest angle to the nearest of these directions, in degrees, over the sphere around 0.    (N, d)."""
    unit = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    probes = np.random.default_rng(0).standard_normal((2000, directions.shape[1]))
    probes /= np.linalg.norm(probes, axis=1, keepdims=True)
    return float(np.degrees(np.arccos(np.clip((probes @ unit.T).max(1), -1, 1)).max()))


def unseparated(problem: Planted, x: Array) -> str:
    """Why a start does not separate: empty where it does.    (N, 1 + d).

    2-homogeneous neurons have to surround 0 in R^(1+d); with a fixed sign θ does, in both copies; partially
    1-homogeneous ones, which start at w = 0, lie over all of Θ.
    """
    if isinstance(problem.case, PlantedNetwork) and problem.case.activation == "relu":
        widest, least = hole(x), 90.0
        what = "neurons (w, θ) surround 0"
    elif isinstance(problem.case, PlantedNetwork) and problem.case.activation == "signed_square":
        widest, least = max(hole(x[x[:, 0] == s, 1:]) if (x[:, 0] == s).sum() else 180.0 for s in (-1, 1)), 90.0
        what = "neurons θ surround 0 with either sign"
    else:
        places = problem.places(problem.grid)
        apart = np.linalg.norm(problem.difference(places[:, None], x[None, :, 1:]), axis=-1).min(1)
        whole = float(np.ptp(places, axis=0).max())
        # Ours: finitely many places have no full support, and holes of a quarter of Θ are taken as none.
        widest, least = 100 * float(apart.max()) / whole, 25.0
        what = "places lie over all of Θ"
    return f"no {what}: a hole of {widest:.0f}{'°' if least == 90 else ' % of it'}" if widest > least else ""


def lopsided(problem: Planted, m: int) -> Any:
    """A start that does not separate: one place; for ReLU units w >= |θ|, which keeps w > 0; a single sign."""
    case, angle = problem.case, np.arange(m) / m * TURN
    if isinstance(case, SparseSpikes):
        return replace(case, initial_spread=0.0, initial_place=0.6)
    ring = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    if case.activation == "relu":
        points = np.concatenate([np.full((m, 1), 0.6), 0.5 * ring], axis=1)
    elif case.activation == "signed_square":
        points = np.concatenate([np.ones((m, 1)), 0.5 * ring], axis=1)
    else:
        points = np.tile([0.0, 1.0, 1.0], (m, 1))
    start = EmpiricalMeasure(torch.from_numpy(points))
    return with_methods(case, {"initial": lambda: start})


@item(
    source="000, Theorems 3.3 and 3.5, Propositions 4.2 and 4.3",
    statement="the support of μ_0 separates, μ_t → μ_∞ and μ_{m,0} → μ_0 in W₂ imply F(μ_{m,t}) → F* as m, t → ∞",
    hypotheses=(
        "Φ and V as in 000, Proposition 2.3; θ ↦ F'(μ)(θ) has regular values that are dense in its range (Sard); "
        "μ_{m,0} in one set Q_r; μ_t converges",
        "3.3: Φ, V 2-homogeneous, supp μ_0 separates 0 from ∞: ReLU units of θ|θ| with V = λ|θ|²; ReLU units with "
        "V = λ|w||θ| only formally, for their dΦ is discontinuous at θ = 0",
        "3.5: Φ = wφ(θ), V = λ|w|, supp μ_0 = {0} × Θ, Θ without boundary (spikes on the circle), all of R^d with "
        "limits at infinity, or convex and bounded with ∂_n⟨r, φ⟩ = 0 on ∂Θ",
        "sigmoid units on a ball do not meet 3.5: ∂_n⟨r, φ⟩ ≠ 0, projection holds θ back; its conclusion is measured",
        "measured: F − F* falls like a power of t or faster",
    ),
    fault="the descent of θ has lost its factor w: the sign of a neuron does not reach its place",
    cost=1.0,
)
def global_convergence(quick: bool, faulty: bool) -> Iterator[Finding]:
    """F as t → ∞ for m ≫ m₀ against the certified minimum, and starts that do not separate."""
    replicas = 3 if quick else 8
    # A fixed sign takes the place of w in the signed square, and without it nothing is bounded.
    problems = (spikes(), sigmoid(), relu()) if faulty else (spikes(), sigmoid(), relu(), signed_square())
    for problem in problems:
        case, least = problem.case, problem.least
        steps = 4 * (round(problem.horizon / problem.dt) // (16 if quick else 4))
        end = steps * problem.dt
        m = 40 if quick else 100
        run = problem.run(m, replicas, end, scenario=signless(case) if faulty else case, save_every=steps // 4)
        values = run["objective"].values
        late = values[4]
        unmet = unseparated(problem, run["position"].values[0, 0])
        name = f"{problem.name}, m = {m}, m₀ = {problem.n_atoms}"
        lowest = np.full(replicas, least.objective)
        yield claim(inequality(f"{name}: F* (gap {least.gap:.0e}) ≤ F", lowest, late, discretisation=least.gap))
        limit, left = extrapolated([values[1], values[2], late])
        yield claim(
            identity(f"{name}: F as t → ∞, from t ≤ {end:g}; F*", limit, lowest,
                     discretisation=left + least.gap, hypotheses=[unmet])
        )  # fmt: skip
        # Few neurons carry all there, and large ones are stiff: shorter steps, for as many.
        stuck = problem.run(m, 1, end / 4, scenario=lopsided(problem, m), dt=problem.dt / 4, save_every=steps // 4)
        reason = unseparated(problem, stuck["position"].values[0, 0])
        held, left = extrapolated(list(stuck["objective"].values[[1, 2, 4], 0]))
        now = float(stuck["objective"].values[4, 0])
        yield outside(
            identity(f"{problem.name}, lopsided: F as t → ∞, from t ≤ {end / 4:g}; F*", float(held),
                     least.objective, discretisation=left, hypotheses=[reason])
        )  # fmt: skip
        what, bound, error = least_of_lopsided(problem)
        yield claim(inequality(f"{problem.name}, lopsided: least F of {what} ≤ F", bound, now, discretisation=error))
        yield claim(inequality(f"{name}: F ≤ least F of {what}", late, np.full(replicas, bound - error)))


def least_of_lopsided(problem: Planted) -> tuple[str, float, float]:
    """The least objective on the way of a lopsided start, and what every other point of the grid moves it.

    Particles at one place remain there together; a sign that w cannot lose leaves measures >= 0.
    """
    places = problem.places(problem.grid)
    if isinstance(problem.case, PlantedNetwork) and problem.case.activation in ("relu", "signed_square"):
        fine, coarse = (problem.on_nodes(x, nonnegative=True).objective for x in (places, places[::2]))
        return "measures ≥ 0", fine, abs(coarse - fine)
    fine, coarse = problem.of_one(places), problem.of_one(places[::2])
    return "one place", fine, abs(coarse - fine)


def signless(case: Any) -> Any:
    """The flow whose places do not see the sign of w."""

    def velocity(t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        v: Tensor = case.smooth_drift(t, x, mu)
        sign = torch.where(x[..., :1] < 0, -1.0, 1.0)
        return torch.cat([v[..., :1], v[..., 1:] * sign], dim=-1)

    return with_methods(case, {"smooth_drift": velocity})


# 000, Figure 3 -------------------------------------------------------------------------------------------------------


def complexity(problem: Planted, sizes: tuple[int, ...], n_replicas: int, *, frozen: bool = False) -> xr.Dataset:
    """Excess over the minimum against the number of particles: the flow, and the convex problem at its first places.

    frozen: places do not move. Variables `flow` and `grid`, (n_particles, replica).
    """
    found: dict[str, list[Array]] = {"flow": [], "grid": []}
    for m in sizes:
        run = problem.run(m, n_replicas, scenario=still(problem.case) if frozen else problem.case)
        found["flow"].append(run["objective"].values[-1] - problem.least.objective)
        start = run["position"].values[0]
        of_grid = [problem.on_nodes(problem.places_of(x)).objective for x in start]
        found["grid"].append(np.array(of_grid) - problem.least.objective)
    dims = ("n_particles", "replica")
    return xr.Dataset({name: (dims, np.stack(values)) for name, values in found.items()}, {"n_particles": list(sizes)})


def still(case: Any) -> Any:
    """The flow in which only amplitudes are trained: θ stays, or for ReLU units its direction."""
    is_relu = isinstance(case, PlantedNetwork) and case.activation == "relu"

    def velocity(t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        v: Tensor = case.smooth_drift(t, x, mu)
        theta = x[..., 1:]
        along = (v[..., 1:] * theta).sum(-1, keepdim=True) / theta.square().sum(-1, keepdim=True).clamp(min=1e-300)
        return torch.cat([v[..., :1], along * theta if is_relu else torch.zeros_like(theta)], dim=-1)

    return with_methods(case, {"smooth_drift": velocity})


@item(
    source="000, Figure 3",
    statement="excess loss at convergence: the particle flow is below convex minimisation on a grid for m ≥ a few m₀",
    hypotheses=("the start of the flow is the grid", "the minimum is certified to 1e-10", "a few is 4 here: ours"),
    fault="places do not move: only output weights are trained",
    cost=3.0,
)
def particle_complexity(quick: bool, faulty: bool) -> Iterator[Finding]:
    """Sparse deconvolution, sigmoid and ReLU networks: excess against the number of particles."""
    replicas = 4 if quick else 12
    for problem in (spikes(), sigmoid(), relu()):
        m0 = problem.n_atoms
        sizes = (8 * m0,) if quick else (4 * m0, 8 * m0, 16 * m0)
        horizon = problem.horizon / 4 if quick else problem.horizon
        table = complexity(replace(problem, horizon=horizon), sizes, replicas, frozen=faulty)
        for m in sizes:
            flow, grid = (
                np.log10(np.maximum(table[name].sel(n_particles=m).values, problem.least.gap))
                for name in ("flow", "grid")
            )
            yield claim(inequality(f"{problem.name}, m₀ = {m0}, m = {m}: log₁₀ excess, flow ≤ grid", flow, grid))


# 000, the animation --------------------------------------------------------------------------------------------------


def signed_places(problem: Planted, x: Array) -> Array:
    """Clusters of particles with w ≠ 0 on the circle, as (Σ w/N, place), (k, 2): less than 2 % apart is one.

    (N, 2) -> (k, 2).
    """
    length = problem.case.circumference
    active = x[x[:, 0] != 0]
    active = active[active[:, 1].argsort()]
    if not len(active):
        return np.zeros((0, 2))
    gaps = np.diff(active[:, 1], append=active[0, 1] + length)
    first = int(gaps.argmax()) + 1
    turned = np.roll(active, -first, axis=0)
    turned[:, 1] = np.unwrap(turned[:, 1], period=length)
    cuts = np.flatnonzero(np.diff(turned[:, 1]) > 0.02 * length) + 1
    groups = np.split(turned, cuts)
    return np.array([
        [g[:, 0].sum() / len(x), np.average(g[:, 1], weights=np.abs(g[:, 0])) % length] for g in groups
    ])  # fmt: skip


def resolution(problem: Planted) -> float:
    """What the gap of the minimiser leaves open of its places: ½(w|φ'|δ)² ≤ gap for the smallest |w|, alone.

    |φ'|² = (2π/length)² K(K + 1)/3 for the kernel of norm 1 with frequencies up to K.
    """
    slope = 2 * math.pi / problem.case.circumference * math.sqrt(problem.case.cutoff * (problem.case.cutoff + 1) / 3)
    smallest = float(np.abs(problem.least.weights[problem.least.weights != 0]).min())
    place: float = math.sqrt(2 * problem.least.gap) / (smallest * slope)
    return place


@item(
    source="000, animation of the particle gradient flow",
    statement="along the frames F_m never increases; spikes end where |η| = 1, as many as the minimiser has",
    hypotheses=("steps short enough for forward–backward descent", "m ≫ m₀"),
    fault="the descent of θ has lost its factor w: the sign of a neuron does not reach its place",
)
def particle_paths(quick: bool, faulty: bool) -> Iterator[Finding]:
    """What the animation of sparse spikes shows."""
    problem = spikes()
    length = problem.case.circumference
    run = problem.run(100, 2 if quick else 4, 150.0 if quick else 400.0,
                      scenario=signless(problem.case) if faulty else problem.case, save_every=20)  # fmt: skip
    objective = run["objective"].values
    # Sums of 100 terms round by 1e-14 of what they add up to.
    rise = float(np.diff(objective, axis=0).max())
    yield claim(
        inequality("largest rise of F_m between frames", rise, 0.0, discretisation=1e-14 * float(objective.max()))
    )
    at_minimum = problem.least.nodes.ravel() if problem.least.nodes is not None else np.zeros(0)
    middle, late = (run["position"].values[k] for k in (run.sizes["time"] // 2, -1))
    counts = np.array([float(len(signed_places(problem, x))) for x in late])
    yield claim(
        identity("spikes at the end against atoms of the minimiser", float(counts.mean()), float(problem.n_atoms))
    )

    def away(x: Array) -> float:
        places = signed_places(problem, x)[:, 1]
        return float(np.abs(problem.difference(places[:, None], at_minimum)).min(1).max() / length)

    # Half of the time: what falls like 1/t or faster has no more to go than it went since.
    distance, before = max(away(x) for x in late), max(away(x) for x in middle)
    declared = abs(before - distance) + resolution(problem) / length
    yield claim(identity("farthest spike from an atom, in turns", distance, 0.0, discretisation=declared))

    def seen(k: int) -> float:
        """The least |η| at a spike, over replicas."""
        mu = final(run, k)
        return min(
            float(problem.certificate(mu, torch.from_numpy(signed_places(problem, x)[:, 1:]))[i].abs().min())
            for i, x in enumerate(run["position"].values[k])
        )

    now, earlier = seen(-1), seen(run.sizes["time"] // 2)
    yield claim(identity("least |η| at a spike", now, 1.0, discretisation=abs(now - earlier)))
    cost = float(np.abs(problem.least.weights).sum())
    mass, then = (np.array([np.abs(signed_places(problem, x)[:, 0]).sum() for x in at]) for at in (late, middle))
    yield claim(
        identity("total mass of the spikes", float(mass.mean()), cost, discretisation=float(np.abs(mass - then).max()))
    )
