"""Births and deaths of neurons: implicit schemes, the signed rate and its limit, the examples, rates of convergence."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import xarray as xr
from scipy.integrate import quad, solve_ivp
from scipy.linalg import expm
from scipy.optimize import minimize
from torch import Tensor

import mfsde
from mfsde import EmpiricalMeasure, Energy, Gaussian, Law, limit
from mfsde.analysis import replicas
from mfsde.analysis.check import identity, inequality
from mfsde.limit.characteristics import quadrature
from mfsde.scenarios import StudentTeacher
from mfsde.scenarios.mixture_birth_death import LOSS_OF_NONE, TARGET, GaussianMixture

from .item import Finding, claim, item, misprint, outside

Array = np.ndarray

# Models whose moments close -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quadratic:
    """V = kx²/2: transport along -speed ∇V with noise σ, births and deaths at α V; fault multiplies that rate.

    N(m, v) stays Gaussian: m' = -km(speed + αv), v' = -2 speed kv - αkv² + σ².
    """

    k: float = 1.0
    alpha: float = 1.5
    sigma: float = 0.0
    speed: float = 1.0
    centre: float = 1.0
    variance: float = 0.8
    fault: float = 1.0

    @cached_property
    def energy(self) -> Energy:
        """E."""
        return mfsde.potential(lambda x: 0.5 * self.k * x.square().sum(-1))

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """The transport."""
        return -self.speed * self.k * x

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> float:
        """The noise."""
        return self.sigma

    def initial(self) -> Gaussian:
        """The start."""
        return Gaussian([self.centre], [[self.variance]])

    def birth_death_rate(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """The rate before its mean is taken away."""
        return 0.5 * self.fault * self.alpha * self.k * x.square().sum(-1)

    def moments(self, t: float) -> Array:
        """(m, v) at t by the equations above."""

        def slope(_: float, y: Array) -> list[float]:
            m, v = y
            pull, k = self.speed * self.k, self.alpha * self.k
            return [-pull * m - k * m * v, -2 * pull * v - k * v**2 + self.sigma**2]

        start = (self.centre, self.variance)
        found: Array = solve_ivp(slope, (0.0, t), start, rtol=1e-11, atol=1e-14, method="DOP853").y[:, -1]
        return found

    def split_moments(self, h: float, n_steps: int, *, is_exact: bool = False) -> Array:
        """(m, v) of what a run does: a transport, then the exact reaction v₊ = v/(1 + αkhv), m₊ = m v₊/v.

        The transport is a step of Euler, or where it is exact (without noise) that of dopri5.
        """
        pull = h * self.speed * self.k
        stay = math.exp(-pull) if is_exact else 1 - pull
        m, v = self.centre, self.variance
        for _ in range(n_steps):
            m, v = stay * m, stay**2 * v + self.sigma**2 * h
            after = v / (1 + self.alpha * self.k * h * v)
            m, v = m * after / v, after
        return np.array([m, v])

    def excess(self, t: Array) -> Array:
        """E(t) = ½k(v + m²) in closed form without noise: a rational decay at speed 0, an exponential one else."""
        t = np.asarray(t, dtype=float)
        if self.speed == 0:
            v = self.variance / (1 + self.alpha * self.k * self.variance * t)
            m = self.centre * v / self.variance
        else:
            growth, ratio = np.exp(2 * self.speed * self.k * t), self.alpha / (2 * self.speed)
            v = 1 / ((1 / self.variance + ratio) * growth - ratio)
            m = self.centre * v * np.sqrt(growth) / self.variance
        found: Array = 0.5 * self.k * (v + m**2)
        return found


@dataclass(frozen=True)
class Learning:
    """E(μ) = ½(∫ sin dμ - 0.3)² + ¼(∫ x² dμ)²: interacting; V = δE/δμ moves at `speed` and selects at α."""

    alpha: float = 0.7
    speed: float = 1.0
    sigma: float = 0.0
    fault: float = 1.0

    @cached_property
    def energy(self) -> Energy:
        """E."""
        return Energy(
            lambda mu: (
                0.5 * (mu.integrate(lambda x: x[..., 0].sin()) - 0.3).square()
                + 0.25 * mu.integrate(lambda x: x[..., 0].square()).square()
            )
        )

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """The transport."""
        return -self.speed * self.energy.intrinsic_derivative(mu, x)

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> float:
        """The noise."""
        return self.sigma

    def initial(self) -> Gaussian:
        """The start."""
        return Gaussian([0.5], [[1.0]])

    def birth_death_rate(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """The rate before its mean is taken away."""
        return self.fault * self.alpha * self.energy.functional_derivative(mu, x)


@dataclass(frozen=True)
class TwoStates:
    """Particles that stay at 0 or 1, V = rate x: K, the number at 1, goes to K - 1 at rate K(N - K)/(N - 1)."""

    rate: float = 1.4
    at_one: float = 0.6

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """The transport."""
        return torch.zeros_like(x)

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> float:
        """The noise."""
        return 0.0

    def initial(self) -> Gaussian:
        """The start."""
        return Gaussian([0.0], [[1.0]])

    def birth_death_rate(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """The rate before its mean is taken away."""
        return self.rate * x[..., 0]


@dataclass(frozen=True)
class Still:
    """The energy, start and noise of a model without its births and deaths: what proximal steps ask for."""

    model: Quadratic | Learning
    sigma: float = 0.0

    @cached_property
    def energy(self) -> Energy:
        """E."""
        return self.model.energy

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """The transport."""
        return -self.energy.intrinsic_derivative(mu, x)

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> float:
        """The noise."""
        return 0.0

    def initial(self) -> Gaussian:
        """The start."""
        return self.model.initial()


def measure_at(run: xr.Dataset, time: int) -> EmpiricalMeasure:
    """A weighted run of one replica at the number of a time."""
    at = run.isel(time=time, replica=0)
    points = at["position"].transpose("particle", "component").values
    return EmpiricalMeasure.signed(torch.from_numpy(points), torch.from_numpy(at["weight"].values))


def order(errors: list[float]) -> tuple[float, float]:
    """The order of errors at steps τ, τ/2, τ/4, τ/8 extrapolated to τ = 0, and its declared error.

    log₂ of a ratio of errors is p + cτ + O(τ²): twice the second less the first is p + O(τ²), at τ/2 with a quarter of
    that error. The last change is three times what is left to leading order.
    """
    found = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    before, after = (2 * b - a for a, b in itertools.pairwise(found))
    return after, abs(after - before)


# Implicit schemes -----------------------------------------------------------------------------------------------------


@item(
    source="003, (15)–(17), (35)–(36)",
    statement="On V = kx²/2 explicit Euler (15) is (1 − τk)^n, argmin V + |x − x_k|²/2τ is implicit Euler, "
    "(1 + τk)^{−n}; argmin E + KL(·|μ_k)/(ατ) is the mirror step: μ_t ∝ μ₀e^{−αVt} exactly for E linear in μ, of "
    "order τ towards (35) else",
    hypotheses=("V independent of μ for exactness; smooth E for the order",),
    fault="KL/(2ατ) in place of KL/(ατ), after the pattern of W₂²/(2τ)",
)
def proximal_steps(quick: bool, faulty: bool) -> Iterator[Finding]:
    """Transport by particles, reaction by masses on fixed points."""
    case, tau, n_steps = Quadratic(k=1.3, alpha=1.5), 0.25, 8
    alpha = case.alpha * (2.0 if faulty else 1.0)
    start = case.initial()
    points = quadrature(start, 128)
    moved = limit.jko(Still(case), tau, n_steps, start=points)
    shrunk = case.centre * (1 + tau * case.k) ** -n_steps
    # Newton's method ends at 1e-10 of a step.
    yield claim(identity("implicit Euler, mean after 8 steps of τ = 1/4", end_mean(moved), shrunk, discretisation=1e-9))
    stepped = mfsde.simulate(
        Still(case), n_particles=16, n_replicas=1, horizon=tau * n_steps, dt=tau, seed=0, save_every=n_steps,
        keep_particles=0, observables=("mean",), method="euler",
    )["mean"].values.reshape(-1)  # fmt: skip
    # In single precision, a rounding for each step.
    rounding = n_steps * float(np.finfo(np.float32).eps)
    ratio, factor = float(stepped[-1] / stepped[0]), (1 - tau * case.k) ** n_steps
    yield claim(identity("explicit Euler (15): (1 − τk)^n, n = 8, τ = 1/4", ratio, factor, discretisation=rounding))
    exact = case.centre * math.exp(-case.k * 2.0)
    errors = [
        abs(end_mean(limit.jko(Still(case), 2.0 / n, n, start=points)) - exact)
        for n in ((8, 16, 32, 64) if quick else (16, 32, 64, 128))
    ]
    value, change = order(errors)
    yield claim(identity("order in τ of implicit Euler towards the gradient flow", value, 1.0, discretisation=change))
    reacted = limit.jko(Still(case), tau, n_steps, geometry="kl", alpha=alpha, start=points)
    still = replace(case, speed=0.0)
    m, v = still.moments(tau * n_steps)
    for name, got, want in (("mean", end_mean(reacted), m), ("variance", end_variance(reacted), v)):
        yield claim(
            identity(f"mirror steps, {name} of μ_2 ∝ μ₀e^{{−2αV}}, τ = 1/4", got, float(want), discretisation=1e-8)
        )
    interacting = Learning(speed=0.0)
    nodes = quadrature(interacting.initial(), 96)
    flow = limit.characteristics(interacting, [0.0, 1.0], start=nodes)
    reference = float(flow["energy"].values[-1].squeeze())
    rate = interacting.alpha * (2.0 if faulty else 1.0)
    errors = []
    for n in (4, 8, 16, 32) if quick else (8, 16, 32, 64):
        found = limit.jko(Still(interacting), 1.0 / n, n, geometry="kl", alpha=rate, start=nodes)
        errors.append(abs(float(found["energy"].values[-1].squeeze()) - reference))
    value, change = order(errors)
    yield claim(identity("order in τ of mirror steps towards (35), interacting E", value, 1.0, discretisation=change))


def end_mean(run: xr.Dataset) -> float:
    """Of the last time."""
    return float(run["mean"].values[-1].squeeze())


def end_variance(run: xr.Dataset) -> float:
    """Of the last time."""
    return float(run["covariance"].values[-1].squeeze())


# The signed rate ------------------------------------------------------------------------------------------------------


@item(
    source="003, (33)–(34), (37), dE/dt",
    statement="∂_tμ = ∇·(μ∇V) − α(V − V̄)μ has mass 1; on V = kx²/2 Gaussians stay so: m' = −km(1+αv), v' = −2kv − αkv² "
    "(+σ² with noise σ); dE/dt = −∫|∇V|² dμ − α Var_μ V; N particles that copy a uniform other: rates times N/(N−1)",
    hypotheses=("E smooth, V = δE/δμ", "no noise for dE/dt", "a Gaussian start for the moments"),
    misprints=(
        "(33), without V̄, does not conserve mass: ∫ exp(−α∫₀^t V) dμ₀ along the transport is left, and (34) does",
    ),
    fault="the rate is 2αV",
)
def birth_death(quick: bool, faulty: bool) -> Iterator[Finding]:
    """Particles in the three reactions, the limit along characteristics, the dissipation."""
    fault = 2.0 if faulty else 1.0
    case = Quadratic(sigma=0.6, fault=fault)
    n, n_replicas, dt = (1000, 24, 0.01) if quick else (4000, 64, 0.005)
    m, v = case.moments(1.0)
    split = np.abs(case.split_moments(dt, round(1 / dt)) - (m, v))
    for reaction in ("jumps", "weights"):
        run = mfsde.simulate(
            case, n_particles=n, n_replicas=n_replicas, horizon=1.0, dt=dt, seed=5, save_every=round(1 / dt),
            keep_particles=0, observables=("mean", "covariance"), method=f"euler+{reaction}",
        ).isel(time=-1)  # fmt: skip
        where = f"{reaction}, N = {n}, R = {n_replicas}, t = 1"
        mean = run["mean"].values.reshape(n_replicas)
        yield claim(identity(f"mean, {where}", mean, float(m), discretisation=float(split[0])))
        # An empirical variance lacks 1/N of that of the law, and a copy takes 2/N of it: E|L| < 1 events for each
        # particle and time.
        variance = run["covariance"].values.reshape(n_replicas)
        lost = float(split[1] + 3 * v / n)
        yield claim(identity(f"variance, {where}", variance, float(v), discretisation=lost))
    smooth = Quadratic(fault=fault)
    m, v = smooth.moments(1.0)
    few, many, h = (256, 96, 0.0125) if quick else (512, 256, 0.00625)
    run = mfsde.simulate(
        smooth, n_particles=few, n_replicas=many, horizon=1.0, dt=h, seed=6, save_every=round(1 / h), keep_particles=0,
        observables=("mean",), method="dopri5+clocks",
    ).isel(time=-1)  # fmt: skip
    # The splitting's error, and what copies take of Cov(V, x): 2/N of the reaction's share for each event of a
    # particle, E|L| < 1 of them. The N/(N − 1) of the rates undoes the empirical covariance's.
    share = abs(float(m) - smooth.centre * math.exp(-smooth.k))
    off = float(abs(smooth.split_moments(h, round(1 / h), is_exact=True)[0] - m) + 2 * share / few)
    yield claim(
        identity(
            f"mean, clocks, N = {few}, R = {many}, t = 1",
            run["mean"].values.reshape(many),
            float(m),
            discretisation=off,
        )
    )
    flow = limit.characteristics(smooth, [0.0, 0.5, 1.0], n_nodes=256)
    for name, got, want in (("mean", end_mean(flow), m), ("variance", end_variance(flow), v)):
        yield claim(identity(f"{name} along characteristics, t = 1", got, float(want), discretisation=1e-8))
    mass = printed_mass(smooth, 1.0)
    mean_rate = quad(lambda s: smooth.alpha * float(smooth.excess(np.array(s))), 0.0, 1.0)[0]
    yield claim(
        identity(
            "mass of (34) at t = 1, ∫ exp(−α∫₀^t (V − V̄)) dμ₀", mass * math.exp(mean_rate), 1.0, discretisation=1e-8
        )
    )
    yield misprint(identity("mass of (33) at t = 1, printed without V̄", mass, 1.0))
    yield from _two_states(quick, fault)
    yield from _dissipation(fault)


def printed_mass(case: Quadratic, t: float) -> float:
    """∫ exp(-α ∫₀^t V) dμ₀ along x e^{-ks}: the mass of (33)."""
    start = quadrature(case.initial(), 256)
    fall = 0.25 * case.fault * case.alpha * (1 - math.exp(-2 * case.k * t))
    return float((start.weights * torch.exp(-fall * start.points[:, 0].square())).sum())


def _two_states(quick: bool, fault: float) -> Iterator[Finding]:
    n, ones, n_replicas = 10, 6, 4000 if quick else 40_000
    x = torch.zeros(n_replicas, n, 1)
    x[:, :ones] = 1.0
    case = TwoStates(rate=1.4 * fault)
    equation = mfsde.model.Equation(case, x)
    mfsde.birth_death.clocks(equation, 0.0, 1.0, mfsde.Noise(3), 0, x)
    share = x.double().mean((1, 2)).numpy()
    expected = chain_mean(n, ones, 1.4, 1.0)
    where = f"two states, N = {n}, R = {n_replicas}"
    yield claim(identity(f"{where}: rates times N/(N−1)", share, expected))


def chain_mean(n: int, start: int, rate: float, t: float) -> float:
    """E K/N of the chain K → K - 1 at rate·K(N - K)/(N - 1)."""
    k = np.arange(n + 1)
    down = rate * k * (n - k) / (n - 1)
    law = expm(t * (np.diag(-down) + np.diag(down[1:], -1)))[start]
    return float(law @ k / n)


def _dissipation(fault: float) -> Iterator[Finding]:
    case, h = Learning(fault=fault), 0.02
    times = [0.0, 0.5 - h, 0.5 - h / 2, 0.5, 0.5 + h / 2, 0.5 + h]
    flow = limit.characteristics(case, times, n_nodes=128)
    energy = flow["energy"].values.reshape(len(times))
    wide, near = (energy[5] - energy[1]) / (2 * h), (energy[4] - energy[2]) / h
    mu = measure_at(flow, 3)
    slope = case.energy.functional_derivative(mu, mu.points)
    squared = case.energy.intrinsic_derivative(mu, mu.points).square().sum(-1)
    mean = (mu.weights * slope).sum()
    gradient, variance = float((mu.weights * squared).sum()), float((mu.weights * (slope - mean).square()).sum())
    yield claim(
        identity(
            "dE/dt = −∫|∇V|² − α Var V at t = ½, interacting E",
            near,
            -gradient - case.alpha * variance,
            discretisation=abs(wide - near) + 1e-8,
        )
    )


# The mixture of Gaussians ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FedByStart(GaussianMixture):
    """The mixture whose new neurons come from the bad start again: no full support."""

    @property
    def reinjection(self) -> Callable[[], tuple[float, Law]]:
        """Rate and law of new neurons."""
        if self.reinjection_rate == 0:
            raise AttributeError("reinjection_rate = 0: no neuron comes from outside.")
        return lambda: (self.reinjection_rate, self.initial())


def losses(case: Any, quick: bool, **changes: Any) -> Array:
    """The loss at the end of a run for every replica."""
    settings: dict[str, Any] = {"n_particles": 100, "n_replicas": 8, "horizon": 40.0, "dt": 0.2, "seed": 0}
    if not quick:
        settings |= {"n_particles": 200, "n_replicas": 12, "horizon": 60.0}
    settings |= changes
    steps = round(settings["horizon"] / settings["dt"])
    found: Array = mfsde.simulate(case, save_every=steps, keep_particles=0, **settings)["loss"].values[-1]
    return found


def unseen(case: GaussianMixture, n: int) -> str:
    """What fails of supp μ₀ = D: the bump at 2 is further than two units' widths from every neuron."""
    start = case.initial().sample(n, torch.Generator().manual_seed(0))
    right = float(start[:, 1].max())
    return f"support is not full: no neuron starts to the right of y = {right:.2f}" if right < 2 - 2 * 0.5**0.5 else ""


def target(x: Array) -> Array:
    """The mixture f."""
    return np.asarray(sum(a * np.exp(-0.5 * (x - b) ** 2 / s) / math.sqrt(2 * math.pi * s) for a, b, s in TARGET))


@item(
    source="003, Theorem (global convergence), mixture of Gaussians",
    statement="C_f = ½∫f² = .0688682701; from y₀ ~ U(−2, 2) n neurons learn with and without births; from y₀ ~ "
    "N(−2, .1²) both descent and birth–death stay near the stationary network of two units, of loss .0137234, where "
    "birth–death with reinjection (full support) does not",
    hypotheses=(
        "supp μ₀ = D and n = ∞ in the theorem (checked: the rightmost of n neurons)",
        "n and t of the runs: n neurons have no tails, and the loss near two units still falls, by ¼ % until t = 1000",
    ),
    fault="new neurons come from the bad start instead of a law of full support",
    cost=1.5,
)
def gaussian_mixture(quick: bool, faulty: bool) -> Iterator[Finding]:
    """Losses at the end, replicas paired by their noise. A run has escaped below half of the loss of two units."""
    square = quad(
        lambda x: 0.5 * float(target(np.array(x))) ** 2, -15, 15, epsabs=1e-13, limit=200,
    )[0]  # fmt: skip
    yield claim(identity("C_f by quadrature", square, 0.0688682701, discretisation=5e-11))
    yield claim(identity("C_f, sums of Gaussians", LOSS_OF_NONE, 0.0688682701, discretisation=5e-11))
    left = GaussianMixture(initial_places="left", alpha=0.0)
    fed = (FedByStart if faulty else GaussianMixture)(initial_places="left", alpha=1.0, reinjection_rate=0.01)
    plateau = two_units()
    yield claim(identity("stationary network of two units, loss", plateau, 0.0137234238, discretisation=5e-11))
    stuck, alone = losses(left, quick), losses(replace(left, alpha=1.0), quick)
    escaped = losses(fed, quick)
    n, t = (100, 40) if quick else (200, 60)
    for name, found in (("descent", stuck), ("birth–death without reinjection", alone)):
        yield claim(inequality(f"bad start, {name}, n = {n}, t = {t}: has not escaped", 0.5 * plateau, found))
    yield claim(inequality(f"bad start, reinjection .01, n = {n}, t = {t}: has escaped", escaped, 0.5 * plateau))
    yield outside(
        inequality(
            f"bad start, n = {n}, t = {t}, no reinjection: has escaped",
            alone,
            0.5 * plateau,
            hypotheses=[unseen(left, n)],
        )
    )
    good = GaussianMixture(alpha=0.0)
    for name, case in (("descent", good), ("birth–death", replace(good, alpha=1.0))):
        yield claim(
            inequality(
                f"good start, {name}, n = {n}, t = {t}: a tenth of two units' loss", losses(case, quick), 0.1 * plateau
            )
        )


def two_units() -> float:
    """The loss where descent of two units from the bad start ends, by Newton's method of secants."""
    energy = GaussianMixture().energy

    def loss(z: Array) -> tuple[float, Array]:
        mu = EmpiricalMeasure(torch.from_numpy(z.reshape(2, 2)))
        slope = 0.5 * energy.intrinsic_derivative(mu, mu.points)
        return float(energy(mu)), slope.numpy().ravel()

    found = minimize(loss, [0.5, -2.1, -0.5, -1.9], jac=True, method="BFGS", options={"gtol": 1e-9})
    return float(found.fun)


# The planted network --------------------------------------------------------------------------------------------------


@item(
    source="003, planted ReLU",
    statement="d = 50, 10 teacher units, unit-sphere inputs: the loss of birth–death is below that of plain descent "
    "early (t = 4); at n = 50 it is above later (t = 80), at n = 500 it is still below (t = 20, in full t = 80)",
    hypotheses=(
        "α = 1, the laws of teacher and start and the times are ours",
        "finite n without reinjection: support lost by a death does not come back, and the loss at late times tells n",
    ),
    fault="the rate has the other sign, at a quarter of its size: neurons of high V are copied",
    cost=1.0,
)
def planted_relu(quick: bool, faulty: bool) -> Iterator[Finding]:
    """Losses of replicas paired by start and noise, early and late, few neurons and many."""
    n_replicas = 32 if quick else 48
    case = Contrary.planted(alpha=0.25) if faulty else StudentTeacher.planted(alpha=1.0)
    plain = StudentTeacher.planted(alpha=0.0)
    early = {"n_particles": 50, "n_replicas": n_replicas, "horizon": 4.0, "dt": 0.1}
    births, descent = losses(case, quick, **early), losses(plain, quick, **early)
    yield claim(inequality(f"birth–death ≤ descent, n = 50, t = 4, R = {n_replicas}", births, descent))
    n_replicas //= 2
    late = {"n_particles": 50, "n_replicas": n_replicas, "horizon": 80.0, "dt": 0.5 if quick else 0.25}
    births, descent = losses(case, quick, **late), losses(plain, quick, **late)
    yield claim(inequality(f"descent ≤ birth–death, n = 50, t = 80, R = {n_replicas}", descent, births))
    wide = {"n_particles": 500, "n_replicas": 4 if quick else 8, "horizon": 20.0 if quick else 80.0, "dt": 0.4}
    births, descent = losses(case, quick, **wide), losses(plain, quick, **wide)
    where = f"n = 500, t = {wide['horizon']:g}, R = {wide['n_replicas']}"
    yield claim(inequality(f"birth–death ≤ descent, {where}", births, descent))


@dataclass(frozen=True)
class Contrary(StudentTeacher):
    """Births where deaths should be."""

    @property
    def birth_death_rate(self) -> Callable[[float, Tensor, EmpiricalMeasure], Tensor]:
        """(t, x, mu) -> -α V."""
        return lambda t, x, mu: -self.alpha * self.potential(mu, x)


# The rate of convergence ----------------------------------------------------------------------------------------------


@item(
    source="003, (38)",
    statement="E(t) ≤ C/t for t ≥ t_C, an upper bound: pure birth–death on V = kx²/2 attains it, E = 1/(2αt) + "
    "O(t⁻²); with transport E falls like e^{−2kt} there",
    hypotheses=("(38): supp μ₀ = D, μ_t converges", "closed forms: V = kx²/2, a Gaussian start"),
    fault="a transport of a twentieth of the strength goes along with pure birth–death",
    cost=1.0,
)
def convergence_rate(quick: bool, faulty: bool) -> Iterator[Finding]:
    """Characteristics over decades, particles over one, both against closed forms."""
    pure = Quadratic(alpha=2.0, speed=0.0, centre=0.5, variance=1.0)
    run_of = replace(pure, speed=0.05) if faulty else pure
    yield from _decay_in_the_limit(pure, run_of)
    yield from _decay_of_particles(pure, run_of, quick)
    yield from _decay_with_transport(replace(pure, speed=1.0), quick)


def _decay_in_the_limit(pure: Quadratic, run_of: Quadratic) -> Iterator[Finding]:
    """Births and deaths alone on characteristics, up to t = 100."""
    times = np.array([0.0, 25.0, 50.0, 100.0])
    flow = limit.characteristics(run_of, times, n_nodes=512)
    energy = flow["energy"].values.reshape(-1)
    slope = math.log(energy[3] / energy[1]) / math.log(times[3] / times[1])
    # E = (1/2α)(t + t₀)⁻¹ (1 + O((t + t₀)⁻¹)), t₀ = 1/(αkv₀): exponents differ from -1 by (t₀ + m₀²t₀/v₀)/t at most.
    delay = (1 + pure.centre**2 / pure.variance) / (pure.alpha * pure.k * pure.variance)
    yield claim(
        identity("pure birth–death: exponent over t = 25 … 100, limit", slope, -1.0, discretisation=delay / times[1])
    )
    yield claim(
        identity(
            "pure birth–death: t E(t) → 1/(2α), t = 100", 100 * energy[3], 0.5 / pure.alpha, discretisation=delay / 100
        )
    )
    yield claim(
        identity(
            "pure birth–death: E(100), closed form", energy[3], float(pure.excess(np.array(100.0))), discretisation=1e-8
        )
    )
    bound = 0.5 * (1 + pure.centre**2 / pure.variance) / pure.alpha
    largest = float((times * energy).max())
    yield claim(inequality("E(t) ≤ C/t at t = 25 … 100, C = (1 + m₀²/v₀)/(2α): largest t E", largest, bound))


def _decay_of_particles(pure: Quadratic, run_of: Quadratic, quick: bool) -> Iterator[Finding]:
    """Their exponent between two times, of particles and in closed form."""
    window = [8.0, 12.0, 16.0] if quick else [8.0, 12.0, 16.0, 24.0, 32.0]
    n, n_replicas, dt = (1000, 64, 0.02) if quick else (4000, 96, 0.02)
    run = mfsde.simulate(
        run_of, n_particles=n, n_replicas=n_replicas, horizon=window[-1], dt=dt, seed=7, save_every=round(4 / dt),
        keep_particles=0, observables=("energy",),
    )["energy"].sel(time=window, method="nearest")  # fmt: skip
    ends = run.isel(time=[0, -1]).transpose("replica", "time").values.astype(float)
    length, where = math.log(window[-1] / window[0]), f"N = {n}, R = {n_replicas}"

    def exponent(mean: Array) -> Array:
        slope: Array = np.log(mean[1:] / mean[:1]) / length
        return slope

    found, error = replicas.jackknife(exponent, ends)
    exact = pure.excess(np.array(window))
    # No error is declared: copies raise E by some 8/N, steps of this length by less than 1 %, and alike at both ends.
    yield claim(
        identity(
            f"pure birth–death: exponent over t = 8 … {window[-1]:g}, {where}, closed form",
            float(found[0]), float(exponent(exact[[0, -1]])[0]), stderr=float(error[0]),
        )
    )  # fmt: skip


def _decay_with_transport(moving: Quadratic, quick: bool) -> Iterator[Finding]:
    """Exponential decay at 2k, in the limit and of particles."""
    late = limit.characteristics(moving, [0.0, 4.0, 5.0], n_nodes=128)["energy"].values.reshape(-1)
    fall = math.log(late[1] / late[2])
    # What the closed form's logarithm still bends there.
    bend = abs(float(np.log(moving.excess(np.array(4.0)) / moving.excess(np.array(5.0)))) - 2 * moving.k)
    yield claim(
        identity("with transport: −d log E/dt at t = 4 … 5, limit: 2k", fall, 2 * moving.k, discretisation=bend + 1e-6)
    )
    n, n_replicas, dt = (1000, 12, 0.02) if quick else (4000, 48, 0.005)
    both = mfsde.simulate(
        moving, n_particles=n, n_replicas=n_replicas, horizon=3.0, dt=dt, seed=8, save_every=round(1 / dt),
        keep_particles=0, observables=("energy",), method="dopri5+jumps",
    )["energy"].values  # fmt: skip
    drop = np.log(both[2] / both[3])
    expected = math.log(float(moving.excess(np.array(2.0)) / moving.excess(np.array(3.0))))
    m, v = np.array([moving.split_moments(dt, round(t / dt), is_exact=True) for t in (2.0, 3.0)]).T
    split = abs(math.log((v[0] + m[0] ** 2) / (v[1] + m[1] ** 2)) - expected)
    yield claim(
        identity(
            f"with transport: log E(2)/E(3), N = {n}, R = {n_replicas}, closed form",
            drop, expected, discretisation=split,
        )
    )  # fmt: skip


# Reinjection ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fed(Quadratic):
    """Ornstein-Uhlenbeck particles replaced at a rate by draws from N(2, ½): m' = -km + ρ(2 - m), s' likewise."""

    alpha: float = 0.0
    sigma: float = 0.6
    inflow: float = 0.8

    def reinjection(self) -> tuple[float, Law]:
        """Rate and law of new particles."""
        return self.inflow, Gaussian([2.0], [[0.5]])

    def exact(self, t: float) -> Array:
        """Mean and second moment at t: each relaxes exponentially."""
        m0, s0 = self.centre, self.variance + self.centre**2
        fast, slow = 2 * self.k + self.inflow, self.k + self.inflow
        m, s = 2.0 * self.inflow / slow, (self.sigma**2 + 4.5 * self.inflow) / fast
        return np.array([m + (m0 - m) * math.exp(-slow * t), s + (s0 - s) * math.exp(-fast * t)])

    def of_steps(self, h: float, n_steps: int) -> Array:
        """The same of a run: Euler, then the exchange of 1 - e^{-ρh}."""
        m, s, keep = self.centre, self.variance + self.centre**2, math.exp(-self.inflow * h)
        for _ in range(n_steps):
            m, s = (1 - h * self.k) * m, (1 - h * self.k) ** 2 * s + self.sigma**2 * h
            m, s = keep * m + (1 - keep) * 2.0, keep * s + (1 - keep) * 4.5
        return np.array([m, s])


@item(
    source="003, reinjection",
    statement="∂_tμ = … + ρ(π − μ): m' = −km + ρ(m_π − m), s' = −2ks + σ² + ρ(s_π − s); with π of full support "
    "birth–death leaves the bad start of the mixture",
    hypotheses=("supp π = D",),
    fault="neurons are replaced at half the rate, and by draws from the start",
    cost=0.7,
)
def reinjection(quick: bool, faulty: bool) -> Iterator[Finding]:
    """Moments in the two reactions that draw differently, and the escape."""
    case = Fed()
    run_of = replace(case, inflow=0.4) if faulty else case
    n, n_replicas, dt = (500, 24, 0.02) if quick else (2000, 64, 0.01)
    exact = case.exact(1.0)
    off = np.abs(case.of_steps(dt, round(1 / dt)) - exact)
    for reaction in ("jumps", "clocks"):
        run = mfsde.simulate(
            run_of, n_particles=n, n_replicas=n_replicas, horizon=1.0, dt=dt, seed=5, save_every=round(1 / dt),
            keep_particles=0, observables=("mean", "covariance"), method=f"euler+{reaction}",
        ).isel(time=-1)  # fmt: skip
        mean = run["mean"].values.reshape(n_replicas)
        second = run["covariance"].values.reshape(n_replicas) + mean**2
        for name, got, want, bias in (("mean", mean, exact[0], off[0]), ("second moment", second, exact[1], off[1])):
            where = f"{name}, {reaction}, N = {n}, R = {n_replicas}, t = 1"
            yield claim(identity(where, got, float(want), discretisation=float(bias)))
    law = FedByStart if faulty else GaussianMixture
    left = GaussianMixture(initial_places="left", alpha=1.0)
    size: dict[str, Any] = {"n_particles": 100, "horizon": 40.0}
    stuck, half = losses(left, quick, **size), 0.5 * two_units()
    escaped = losses(law(initial_places="left", alpha=1.0, reinjection_rate=0.02), quick, **size)
    yield claim(inequality("bad start, t = 40, reinjection .02: below half of two units' loss", escaped, half))
    yield outside(
        inequality(
            "bad start, t = 40, no reinjection: below half of two units' loss",
            stuck,
            half,
            hypotheses=[unseen(left, 100)],
        )
    )
