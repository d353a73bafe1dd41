"""Mean-field Langevin dynamics (Szpruch): the particle system, its free energy, its minimiser, convergence to it.

T = σ²/2, V(m) = F(m) + T KL(m | e^{-U}). Two flows: `GaussianLangevin`, in closed form, and `Observed`, which is convex
and not Gaussian.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
import xarray as xr
from scipy import optimize
from scipy.integrate import simpson
from torch import Tensor

import mfsde
from mfsde import EmpiricalMeasure, Energy, Gaussian, limit
from mfsde.analysis import contraction as constants
from mfsde.analysis import rates, theory, wasserstein
from mfsde.analysis.check import identity, inequality
from mfsde.analysis.gibbs import proximal
from mfsde.model import with_methods
from mfsde.scenarios import CurieWeiss, GaussianLangevin

from .item import Finding, claim, item, misprint, outside

FLOAT64 = torch.float64
LOG_ROOT_TURN = 0.5 * math.log(2 * math.pi)


# The particle system


@item(
    source="001, (1), Derivation of MFLD I-II, Definitions 1-2",
    statement="dX^i = −(N ∂_{x_i}F^N(X) + T∇U(X^i)) dt + σ dW^i, N ∂_{x_i}F^N(x) = D_mF(m^N, x_i), D_mF = ∇ δF/δm, "
    "∫ δF/δm(m, ·) dm = 0",
    hypotheses=("F differentiable in the measure", "U with Lipschitz gradient (Assumption 2)"),
    misprints=(
        "gradient descent prints τ ∇_{x_i} F^N; it is τ N ∂_{x_i} F^N, or the force vanishes with N",
        "gradient descent prints the regulariser U(x)² for U(x) = |x|²",
        "noisy gradient descent prints (σ²/2) ∇U without its step τ",
    ),
    fault="the force is ∂_{x_i} F^N in place of N ∂_{x_i} F^N",
)
def particle_system(quick: bool, faulty: bool) -> Iterator[Finding]:
    """Euler's own moments at finite N, exactly; derivatives against hand-written ones; the printed recursions."""
    case = GaussianLangevin(kappa=1.5, target=(-1.0,), stiffness=2.0)
    n, step = 10, 0.05
    settings: dict[str, Any] = {
        "n_particles": n,
        "n_replicas": 1000 if quick else 20_000,
        "dt": step,
        "seed": 0,
        "dtype": FLOAT64,
    }
    weak = WithoutN(**asdict(case), n=n)
    run = mfsde.simulate(weak if faulty else case, horizon=1.0, **settings)
    mean, of_mean, within = euler_moments(case, n, step, 20)
    label = f"N = {n}, R = {settings['n_replicas']}, dt = {step}, t = 1"
    yield claim(identity(f"E mean, {label}", centre(run), np.full(len(centre(run)), mean)))
    squared = n * (centre(run) - mean) ** 2
    yield claim(identity(f"N Var(mean), {label}", squared, np.full(len(squared), of_mean)))
    yield claim(identity(f"E (1/N) Σ(X − mean)², {label}", spread(run), np.full(len(squared), within)))
    printed = mfsde.simulate(weak, horizon=1.0, **settings)
    yield misprint(identity(f"force ∂F^N without N: E mean, {label}", centre(printed), np.full(len(squared), mean)))

    yield from _derivatives(case)
    yield from _printed_recursions(quick)


def _derivatives(case: GaussianLangevin) -> Iterator[Finding]:
    """D_mF automatically, by hand and as N ∂F^N, each along one direction; the normalisation of δF/δm."""
    generator = torch.Generator().manual_seed(0)
    network = Network()
    target = torch.tensor(case.target, dtype=FLOAT64)
    forces: tuple[tuple[Any, Callable[[Tensor], Tensor], int, str], ...] = (
        (case.energy, lambda x: case.kappa * (x.mean(0) - target).expand_as(x), 1, "½κ(mean − a)²"),
        (network.energy, network.force, network.dim, "risk of a network"),
    )
    for energy, by_hand, dim, name in forces:
        theta, along = torch.randn(2, 50, dim, generator=generator, dtype=FLOAT64)
        mu = EmpiricalMeasure(theta)
        automatic = float((energy.intrinsic_derivative(mu, theta) * along).sum())
        written = float((by_hand(theta) * along).sum())
        yield claim(identity(f"D_mF·v automatically, {name}", automatic, written))
        x = theta.clone().requires_grad_()
        (slope,) = torch.autograd.grad(energy(EmpiricalMeasure(x)), x)
        yield claim(identity(f"N ∂F^N·v, N = {len(x)}, {name}", len(x) * float((slope * along).sum()), automatic))
        values = energy.functional_derivative(mu, theta)
        # F(m + s(m' - m)) is quadratic in s, so that three values give its slope at 0 exactly.
        others = torch.randn(50, dim, generator=generator, dtype=FLOAT64)
        at = [float(energy(mixed(theta, others, s))) for s in (0.0, 0.5, 1.0)]
        pairing = float((energy.functional_derivative(mu, others) - values).mean())
        name_1 = f"d/ds F((1 − s)m + sm') at 0 against ∫ δF/δm d(m' − m), {name}"
        yield claim(identity(name_1, 4 * at[1] - 3 * at[0] - at[2], pairing))
        room = 1e-12 * float(values.abs().max())
        yield claim(identity(f"∫ δF/δm dm, {name}", float(values.mean()), 0.0, discretisation=room))


def mixed(theta: Tensor, others: Tensor, share: float) -> EmpiricalMeasure:
    """(1 - s) m + s m' of two samples of N points each."""
    weights = torch.tensor([1 - share, share], dtype=FLOAT64).repeat_interleave(len(theta)) / len(theta)
    return EmpiricalMeasure(torch.cat([theta, others]), weights)


def _printed_recursions(quick: bool) -> Iterator[Finding]:
    """The stationary variance of noisy gradient descent with U = |x|², and of the recursions as printed."""
    case, step, n = GaussianLangevin(kappa=1.5, target=(0.0,), stiffness=2.0, initial_mean=(0.0,)), 0.05, 50
    settings: dict[str, Any] = {
        "n_particles": n,
        "n_replicas": 200 if quick else 2000,
        "horizon": 5.0,
        "dt": step,
        "seed": 0,
    }
    rate = 0.5 * case.sigma**2 * case.stiffness
    exact = (1 - 1 / n) * case.sigma**2 / (rate * (2 - rate * step))
    forms = {
        "τ(σ²/2)∇U, as is right": case,
        "(σ²/2)∇U as printed, without τ": PrintedRegulariser(**asdict(case), regularisation=1 / step),
        "τ(σ²/2)∇U² as printed": PrintedRegulariser(**asdict(case), power=2),
    }
    for told, form in forms.items():
        found = spread(mfsde.simulate(form, **settings))
        check = identity(f"stationary variance, {told}, τ = {step}", found, np.full(len(found), exact))
        yield claim(check) if form is case else misprint(check)


@dataclass(frozen=True)
class WithoutN(GaussianLangevin):
    """The Gaussian flow whose force is ∂_{x_i}F^N, 1/n of what it is to be."""

    n: int = 1

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """-(D_mF/n + T∇U)."""
        return -self.kappa * (mu.mean() - self._target(x)) / self.n - 0.5 * self.sigma**2 * self.stiffness * x


@dataclass(frozen=True)
class PrintedRegulariser(GaussianLangevin):
    """The Gaussian flow with the regulariser c|x|^{2p}, U = |x|² at stiffness 2."""

    regularisation: float = 1.0
    power: int = 1

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """-(D_mF + T c ∇|x|^{2p})."""
        slope = 2 * self.power * x * x.square().sum(-1, keepdim=True) ** (self.power - 1)
        return -self.kappa * (mu.mean() - self._target(x)) - 0.5 * self.sigma**2 * self.regularisation * slope


def euler_moments(case: GaussianLangevin, n: int, step: float, n_steps: int) -> tuple[float, float, float]:
    """E mean, N Var(mean), E (1/N) Σ(X - mean)² of n particles after Euler steps, d = 1."""
    slow, fast = 0.5 * case.sigma**2 * case.stiffness, case.kappa + 0.5 * case.sigma**2 * case.stiffness
    mean, of_mean, own = case.initial_mean[0], case.initial_variance, case.initial_variance
    for _ in range(n_steps):
        mean += step * (case.kappa * case.target[0] - fast * mean)
        of_mean = (1 - step * fast) ** 2 * of_mean + case.sigma**2 * step
        own = (1 - step * slow) ** 2 * own + case.sigma**2 * step
    return mean, of_mean, (1 - 1 / n) * own


def centre(run: xr.Dataset) -> np.ndarray:
    """Mean of the particles at the last time, one per replica, d = 1."""
    values: np.ndarray = run["position"].values[-1, ..., 0].astype(float).mean(-1)
    return values


def spread(run: xr.Dataset) -> np.ndarray:
    """Their variance, by 1/N."""
    values: np.ndarray = run["position"].values[-1, ..., 0].astype(float).var(-1)
    return values


# Dissipation


@item(
    source="001, Theorem 3",
    statement="V(m_t) − V(m_s) = −∫_s^t ∫ |D_mF + T∇log m_r + T∇U|² dm_r dr, T = σ²/2",
    hypotheses=(
        "U confining with ∇U Lipschitz (Assumption 2)",
        "D_mF bounded and Lipschitz (Assumption 5)",
        "s > 0 or m_0 with a density of finite Fisher information",
    ),
    fault="the functional's σ is 1.3 times that of the flow",
)
def dissipation(quick: bool, faulty: bool) -> Iterator[Finding]:
    """In closed form, by the Fokker-Planck equation, by particles.

    In the Gaussian flow D_mF is Lipschitz but not bounded in m: it holds there without that hypothesis.
    """
    factor = 1.3 if faulty else 1.0
    case = GaussianLangevin(sigma=0.9)
    functional = replace(case, sigma=factor * case.sigma)
    found = theory.free_energy_dissipation(functional, case.limit, start=0.05, stop=2.0)
    yield claim(replace(found, name="V(m_2) − V(m_0.05), Gaussian flow in closed form"))
    settings: dict[str, Any] = {"n_replicas": 32, "horizon": 2.0, "seed": 0}
    settings |= {"n_particles": 500, "dt": 0.002} if quick else {"n_particles": 2000, "dt": 0.0005}
    # The force of the first steps is that of m_0, far from m*: their size is most of the declared error.
    run = mfsde.simulate(case, save_every=10 if quick else 20, **settings)
    told = f"particles, N = {run.sizes['particle']}, R = {run.sizes['replica']}"
    plugged = theory.free_energy_dissipation(functional, run)
    yield claim(replace(plugged, name=f"V(m_2) − V(m_0), Gaussian flow, {told}"))

    wells = Observed(wells=1.2, sigma=1.2, kappa=2.0)
    of_wells = replace(wells, sigma=factor * wells.sigma)
    times = np.linspace(0, 2, 41 if quick else 81)
    flow = limit.fokker_planck(wells, None, times, n_nodes=161 if quick else 321)
    laws = [limit.law_at(flow, t) for t in times]
    values = np.array([theory.free_energy(of_wells, law) for law in laws])
    spent = np.array([theory.dissipation(of_wells, law) for law in laws])
    whole, halved = (simpson(spent[::c], x=times[::c]) for c in (1, 2))
    declared = abs(whole - halved)
    name = "V(m_2) − V(m_0), ½κ(∫tanh dm − y)² in two wells, Fokker–Planck"
    yield claim(identity(name, values[-1] - values[0], -whole, discretisation=declared))
    run = mfsde.simulate(wells, save_every=25 if quick else 50, **settings)
    found = theory.free_energy_dissipation(of_wells, run, law=limit.flow(flow))
    yield claim(replace(found, name=f"V(m_2) − V(m_0), two wells, {told}"))


# The limit σ → 0


@item(
    source="001, Proposition 3",
    statement="V^σ Γ-converges to F, so that F(m^{*,σ}) → inf F and V^σ(m^{*,σ}) → inf F as σ → 0",
    hypotheses=("F weakly continuous and convex", "U of quadratic growth"),
    fault="m^{*,σ} is the Gibbs law of δF/δm/σ² in place of 2δF/δm/σ²",
)
def gamma_limit(quick: bool, faulty: bool) -> Iterator[Finding]:
    """A target in reach, one out of reach, and the Gaussian case; limits and orders from the constrained problem.

    The mean of the Gaussian case is not weakly continuous: it holds there without that hypothesis.
    """
    factor = math.sqrt(2) if faulty else 1.0
    sigmas = tuple(2.0**-k for k in range(1, 5 if quick else 7))

    def minimiser(case: Any, start: Any = None) -> limit.StationaryLaw:
        return limit.gibbs(replace(case, sigma=factor * case.sigma), start=start, tolerance=1e-8)

    yield from _in_reach(sigmas, minimiser)
    yield from _out_of_reach(sigmas, minimiser)
    yield from _smoothed(sigmas, factor)

    base = GaussianLangevin(kappa=1.0, stiffness=1.0)
    least, whole = [], []
    law = None
    for sigma in (*sigmas, sigmas[-1] / 2):
        case, t = replace(base, sigma=sigma), 0.5 * sigma**2
        law = minimiser(case, law)  # from afar the field, divided by T, leaves every grid
        least.append(float(case.energy(law.as_measure())))
        whole.append(theory.free_energy(case, law))
        pull = t * base.stiffness / (base.kappa + t * base.stiffness)
        exact = 0.5 * base.kappa * (pull * base.target[0]) ** 2
        yield claim(identity(f"F(m*), Gaussian, σ = {sigma:g}", least[-1], exact, discretisation=1e-7 * exact))
    for what, values, order in (("F", least, 4.0), ("V", whole, 2.0)):
        # κT²/(κ + kT)²: the order differs by O(T), a quarter of it at half of σ.
        orders = np.log2(np.array(values[:-1]) / values[1:])
        name = f"order in σ of {what}(m*) − inf F, Gaussian, σ = {sigmas[-1]:g} → {sigmas[-1] / 2:g}"
        left = abs(float(orders[-1] - orders[-2]))
        yield claim(identity(name, float(orders[-1]), order, discretisation=left))


def _in_reach(sigmas: tuple[float, ...], minimiser: Callable[..., limit.StationaryLaw]) -> Iterator[Finding]:
    """Inf F = 0 at the laws with ∫tanh = y; m* tends to the one of least entropy, ∝ e^{λ tanh - U}."""
    base = Observed(target=0.5)
    tilt = optimize.brentq(lambda a: tilted(base, a)[0] - base.target, 0.0, 20.0, xtol=1e-14)
    least = tilted(base, tilt)[1]
    found: list[tuple[float, float]] = []
    for sigma in sigmas:
        case, t = replace(base, sigma=sigma), 0.5 * sigma**2
        law = minimiser(case)
        value, whole = float(case.energy(law.as_measure())), theory.free_energy(case, law)
        found.append((value, whole))
        scale = case.kappa / t

        def excess(a: float, scale: float = scale) -> float:
            return a - scale * (base.target - tilted(base, a)[0])

        solved = float(optimize.brentq(excess, 0.0, 20.0, xtol=1e-14))
        exact = 0.5 * (t * solved) ** 2 / case.kappa
        name = f"F(m*), y = {base.target:g}, σ = {sigma:g}"
        yield claim(identity(name, value, exact, discretisation=1e-7 * exact))
        # F(m*) <= V(m*) <= V of the law of least entropy on which F = 0.
        yield claim(inequality(f"V(m*) ≤ T min KL on argmin F, σ = {sigma:g}", whole, t * least))
    ts = 0.5 * np.square(sigmas)
    for what, ratios, end in (
        ("F(m*)/T²", np.array([f for f, _ in found]) / ts**2, tilt**2 / (2 * base.kappa)),
        ("V(m*)/T", np.array([v for _, v in found]) / ts, least),
    ):
        # Both differ from their limits by a series in T, a quarter of σ ↦ σ/2.
        better = (4 * ratios[-1] - ratios[-2]) / 3
        left = abs(better - (4 * ratios[-2] - ratios[-3]) / 3)
        yield claim(identity(f"{what} as σ → 0, y = {base.target:g}", better, end, discretisation=left))


def _out_of_reach(sigmas: tuple[float, ...], minimiser: Callable[..., limit.StationaryLaw]) -> Iterator[Finding]:
    """Inf F = ½κ(|y| - 1)², attained by no law: neurons run to infinity, slowly."""
    base = Observed(target=1.5, kappa=2.0)
    lowest = 0.5 * base.kappa * (base.target - 1) ** 2
    before = math.inf
    for sigma in sigmas:
        case = replace(base, sigma=sigma)
        law = minimiser(case)
        value = float(case.energy(law.as_measure()))
        trial = min(theory.free_energy(case, Gaussian([at], 0.3)) for at in np.linspace(0, 4, 17))
        name = f"F(m*) − inf F ≤ V(trial) − inf F, y = {base.target:g}, σ = {sigma:g}"
        yield claim(inequality(name, value - lowest, trial - lowest))
        yield claim(inequality(f"inf F ≤ F(m*), y = {base.target:g}, σ = {sigma:g}", lowest, value))
        if math.isfinite(before):
            yield claim(inequality(f"F(m*) falls with σ, σ = {sigma:g}", value, before))
        before = value


def _smoothed(sigmas: tuple[float, ...], factor: float) -> Iterator[Finding]:
    """The recovery sequence: a Dirac smoothed by the heat kernel, V^σ(N(a, σ²)) = F(δ_a) + O(σ² log(1/σ))."""
    base, at = Observed(target=0.5), 1.0
    point = math.tanh(at)
    left = []
    for sigma in sigmas:
        whole = theory.free_energy(replace(base, sigma=factor * sigma), Gaussian([at], sigma**2))
        left.append((whole - 0.5 * base.kappa * (point - base.target) ** 2) / (0.5 * sigma**2) + math.log(sigma))
    # KL gives ½(a² - 1), F its Laplacian at δ_a, T κ(tanh a - y) tanh''(a); both err by a series in σ².
    exact = 0.5 * (at**2 - 1) - 2 * base.kappa * (point - base.target) * point * (1 - point**2)
    better, before = ((4 * left[k] - left[k - 1]) / 3 for k in (-1, -2))
    name = f"(V^σ(N(a, σ²)) − F(δ_a))/T + log σ as σ → 0, a = {at:g}"
    yield claim(identity(name, better, exact, discretisation=abs(better - before)))


def tilted(case: Observed, tilt: float) -> tuple[float, float]:
    """∫tanh dp and KL(p | e^{-U}) for p ∝ e^{a tanh - U}, by the trapezoidal rule."""
    x = torch.linspace(-12, 12, 4001, dtype=FLOAT64)
    feature, log_weight = torch.tanh(x), tilt * torch.tanh(x) - case.confinement(x.unsqueeze(-1))
    log_z = float(torch.logsumexp(log_weight, 0)) + math.log(float(x[1] - x[0]))
    p = torch.softmax(log_weight, 0)
    mean = float(p @ feature)
    return mean, tilt * mean - log_z


@dataclass(frozen=True)
class Observed(mfsde.MeanFieldLangevin):
    """F(m) = ½κ(∫tanh dm - y)², e^{-U} = ½N(-a, 1) + ½N(a, 1): convex F, on the line.

    ∇U = x - a tanh(ax), so that 1 - a² <= U'' <= 1 and x·∇U >= ½x² - ½a²; |D_mF| <= κ(1 + |y|), C_F = κ(1 + |y|).

    Args:
        kappa: κ.
        target: y; in reach for |y| < 1.
        wells: a; U is convex for a <= 1, |x|²/2 for 0.
        sigma: σ.
        initial_mean: of the initial law, a Gaussian.
        initial_variance: likewise.

    """

    kappa: float = 1.0
    target: float = 0.5
    wells: float = 0.0
    sigma: float = 1.0
    initial_mean: float = -1.0
    initial_variance: float = 0.5

    @cached_property
    def energy(self) -> Energy:
        """½κ(∫tanh dm - y)²."""
        return Energy(
            lambda mu: 0.5 * self.kappa * (mu.integrate(lambda x: torch.tanh(x).sum(-1)) - self.target).square()
        )

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """-(κ(∫tanh dm - y) sech²(x) + T ∇U(x)), by hand."""
        off = self.kappa * (mu.integrate(torch.tanh).unsqueeze(-2) - self.target)
        return -(off / torch.cosh(x).square() + 0.5 * self.sigma**2 * self.confinement_gradient(x))

    def confinement(self, x: Tensor) -> Tensor:
        """U(x) = ½x² + ½a² - log cosh(ax) + ½ log 2π."""
        ax = self.wells * x[..., 0].abs()
        log_cosh = ax + torch.log1p(torch.exp(-2 * ax)) - math.log(2)
        return 0.5 * x[..., 0].square() + 0.5 * self.wells**2 - log_cosh + LOG_ROOT_TURN

    def confinement_gradient(self, x: Tensor) -> Tensor:
        """∇U(x) = x - a tanh(ax)."""
        return x - self.wells * torch.tanh(self.wells * x)

    def initial(self) -> Gaussian:
        """N(initial_mean, initial_variance)."""
        return Gaussian([self.initial_mean], self.initial_variance)

    @property
    def lipschitz(self) -> float:
        """C_F."""
        return self.kappa * (1 + abs(self.target))


# The first-order condition


@item(
    source="001, Proposition 4; 002, (8.5)",
    statement="δF/δm(m*, ·) + T log m* + T U is constant exactly for m* = argmin V: m* ∝ exp(−(2/σ²) δF/δm(m*, ·) − U)",
    hypotheses=("F convex, C¹, bounded below (Assumption 1)", "U confining (Assumption 2)", "σ > 0"),
    misprints=("printed m* ∝ exp(−(2/σ²)(δF/δm + U)), which has U divided by T; the condition above gives e^{−U}",),
    fault="the noise of the particles is σ²/2 in place of σ",
)
def first_order(quick: bool, faulty: bool) -> Iterator[Finding]:
    """The fixed point, long runs on the line, and the two-layer network: outputs against those of their Gibbs law."""
    gaussian = GaussianLangevin()
    well = Observed(wells=1.2, sigma=1.2, kappa=2.0)
    for case, told in ((gaussian, "Gaussian"), (well, "two wells")):
        star = limit.gibbs(case)
        yield claim(replace(theory.first_order(case, star), name=f"Var_m*(δF/δm + T log m* + TU), fixed point, {told}"))
        least = min_over_gaussians(case)
        whole = theory.free_energy(case, star)
        name = f"V(m*) against the least V of a Gaussian, {told}"
        yield claim(identity(name, whole, least) if case is gaussian else inequality(name, whole, least))
    mean = gaussian.kappa * gaussian.target[0] / (gaussian.kappa + gaussian.stiffness)
    printed = Gaussian([mean], 0.5 * gaussian.sigma**2 / gaussian.stiffness)
    told = "Var of the same for the printed m*, Gaussian"
    yield misprint(replace(theory.first_order(gaussian, printed), name=told))

    moved = with_methods(well, half_square(well)) if faulty else well
    run = mfsde.simulate(
        moved, n_particles=125 if quick else 1000, n_replicas=32 if quick else 64, horizon=12.0, dt=0.02, seed=0,
        save_every=20,
    )  # fmt: skip
    for check in theory.stationarity(well, run, start=6.0):
        yield claim(replace(check, name=f"{check.name}, N = {run.sizes['particle']}, R = {run.sizes['replica']}"))
    yield from _network(quick, faulty)


def _network(quick: bool, faulty: bool) -> Iterator[Finding]:
    """The outputs f over the data, averaged over a long run: along f*, and |f - f[p_f]|/|f[p_f]|,
    p_f ∝ exp(-δF/δm(f, ·)/T - U).

    One residual for each replica: sampling can only raise its mean. The 5 % are ours, and room for that noise.
    """
    for case in (Network(), Network(bias=False)):
        moved = with_methods(case, half_square(case)) if faulty else case
        n, r, step = (1000, 32, 0.04) if quick else (4000, 32, 0.02)
        coarse, late = (
            torch.from_numpy(
                mfsde.simulate(
                    moved, n_particles=n, n_replicas=r, horizon=12.0, dt=c * step, seed=0, noise=mfsde.Noise(0, c),
                    save_every=round(0.4 / step / c),
                )["position"].sel(time=slice(4.0, None)).values
            ).double()
            for c in (2, 1)
        )  # fmt: skip
        coarser, outputs = (case.outputs(theta).mean(0) for theta in (coarse, late))
        images = torch.stack([case.image(f) for f in outputs])
        apart = ((outputs - images).norm(dim=-1) / images.norm(dim=-1)).numpy()
        d = f"d = {case.dim}, T = {case.temperature:g}, N = {n}, R = {r}"
        yield claim(inequality(f"network: |f − f[Gibbs law of f]|/|f| ≤ 5 %, {d}", apart, np.full(r, 0.05)))
        star = case.fixed_point()
        found, before = ((f @ star / star.square().sum()).numpy() for f in (outputs, coarser))
        # Halving the step changes f by what is left, to first order; the bias 1/N is below the noise.
        left = abs(float((found - before).mean()))
        yield claim(identity(f"network: f·f*/|f*|², {d}", found, np.ones(r), discretisation=left))
        # That the network has learned: with m* = e^{-U} the condition would say nothing.
        fitted = float((star - case.targets).norm() / case.targets.norm())
        yield claim(inequality(f"network: |f* − y|/|y| ≤ ½, d = {case.dim}", fitted, 0.5))
    near = EmpiricalMeasure(late[-1, 0])
    law = limit.gibbs(case, start=near, n_nodes=65 if quick else None)
    yield claim(replace(theory.first_order(case, law), name=f"network: Var_m*(…), fixed point, d = {case.dim}"))
    mu = law.as_measure()
    size = float((mu.weights @ case.feature(mu.points, case.inputs)).norm())
    left = float((star - case.fixed_point(28)).norm())
    yield claim(identity("network: |f*| by limit.gibbs, d = 2", size, float(star.norm()), discretisation=left))


def min_over_gaussians(case: Any) -> float:
    """The least V(N(a, s²)), by descent in (a, log s)."""
    found = optimize.minimize(
        lambda at: theory.free_energy(case, Gaussian([at[0]], math.exp(2 * at[1]))), [0.0, 0.0], tol=1e-9
    )
    return float(found.fun)


def half_square(case: Any) -> dict[str, Callable[..., float]]:
    """σ²/2, taken for the noise."""
    return {"diffusion": lambda t, x, mu: 0.5 * float(case.sigma) ** 2}


@dataclass(frozen=True)
class Network(mfsde.MeanFieldLangevin):
    """f(z) = scale ∫ β tanh(α·z) dm(α, β) on 8 data (x, y), z = (x, 1), or x without bias; U that of N(0, I).

    Args:
        bias: z carries a constant 1: d = 3, otherwise 2.
        scale: in front of the mean over neurons.
        sigma: σ.

    """

    bias: bool = True
    scale: float = 3.0
    sigma: float = 1.0

    @property
    def dim(self) -> int:
        """Parameters of a neuron."""
        return 3 if self.bias else 2

    @property
    def temperature(self) -> float:
        """T."""
        return 0.5 * self.sigma**2

    @cached_property
    def inputs(self) -> Tensor:
        """(8, dim - 1)."""
        x = torch.linspace(-1.5, 1.5, 8, dtype=FLOAT64)
        return torch.stack([x, torch.ones_like(x)], 1) if self.bias else x[:, None]

    @cached_property
    def targets(self) -> Tensor:
        """2 tanh 2x, with ½ more where there is a bias.    (8,)."""
        return 2 * torch.tanh(2 * self.inputs[:, 0]) + (0.5 if self.bias else 0.0)

    @cached_property
    def feature(self) -> mfsde.Neuron:
        """Scale β tanh(α·z)."""
        return mfsde.Neuron("tanh", scale=self.scale)

    @cached_property
    def energy(self) -> Any:
        """½ mean (f - y)²."""
        return mfsde.risk(self.feature, "squared", self.inputs, self.targets)

    def confinement(self, x: Tensor) -> Tensor:
        """½|θ|² + ½d log 2π."""
        return 0.5 * x.square().sum(-1) + self.dim * LOG_ROOT_TURN

    def confinement_gradient(self, x: Tensor) -> Tensor:
        """θ."""
        return x

    def initial(self) -> Gaussian:
        """N(0, I)."""
        return Gaussian([0.0] * self.dim, 1.0)

    def neurons(self, theta: Tensor) -> Tensor:
        """(..., d) -> (..., 8), written out."""
        return self.scale * theta[..., -1:] * torch.tanh(theta[..., :-1] @ self.inputs.T)

    def outputs(self, theta: Tensor) -> Tensor:
        """Outputs on the data.    (..., N, d) -> (..., 8)."""
        return self.neurons(theta).mean(-2)

    def force(self, theta: Tensor) -> Tensor:
        """D_mF(m^N, θ_i) = mean_s (f_s - y_s) ∇φ(θ_i, z_s), by hand.    (N, d) -> (N, d)."""
        off = (self.outputs(theta) - self.targets) / len(self.targets)
        active = torch.tanh(theta[:, :-1] @ self.inputs.T)
        inner = (off * (1 - active.square()) * theta[:, -1:]) @ self.inputs
        return self.scale * torch.cat([inner, (off * active).sum(1, keepdim=True)], 1)

    def image(self, outputs: Tensor, n_nodes: int = 40) -> Tensor:
        """Outputs of the density ∝ exp(-δF/δm/T - U), δF/δm at the outputs f.    (8,) -> (8,)."""
        features, log_weights = hermite(self, n_nodes)
        off = (outputs - self.targets) / len(self.targets)
        return torch.softmax(log_weights - features @ off / self.temperature, 0) @ features

    def fixed_point(self, n_nodes: int = 40) -> Tensor:
        """f* by Newton's method on f - image(f), the gradient of a strongly convex function."""
        f = torch.zeros_like(self.targets)
        for _ in range(50):
            residual = f - self.image(f, n_nodes)
            if float(residual.norm()) < 1e-10:
                return f
            slope = torch.eye(len(f), dtype=FLOAT64) - torch.autograd.functional.jacobian(
                lambda x: self.image(x, n_nodes), f
            )
            step = torch.linalg.solve(slope, residual)
            while float((f - step - self.image(f - step, n_nodes)).norm()) > float(residual.norm()):
                step = step / 2
            f = f - step
        raise RuntimeError("the network's self-consistent outputs were not found; raise sigma.")


@cache
def hermite(case: Network, n_nodes: int) -> tuple[Tensor, Tensor]:
    """Neurons (n, 8) and log weights (n,) of Gauss-Hermite quadrature against e^{-U}."""
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(n_nodes))
    theta = torch.cartesian_prod(*[nodes] * case.dim)
    return case.neurons(theta), torch.cartesian_prod(*[weights.log()] * case.dim).sum(-1)


# Stability


@item(
    source="001, Proposition 6",
    statement="W₂(m_t, m'_t) ≤ C_t W₂(m_0, m'_0), C_t = e^{(2C_F + ½σ²L)t}, (x − x')·(−∇U(x) + ∇U(x')) ≤ L|x − x'|²",
    hypotheses=("∇U Lipschitz (Assumption 2)", "D_mF Lipschitz in (x, m) with constant C_F (Assumption 5)"),
    fault="∇U enters the drift with the wrong sign",
)
def stability(quick: bool, faulty: bool) -> Iterator[Finding]:
    """Two runs on the same noise, and two flows of the Fokker-Planck equation; U convex and not convex."""
    gaussian = GaussianLangevin()
    well = Observed(kappa=0.1, wells=2.0, sigma=0.5, initial_mean=-0.1, initial_variance=0.01)
    others = (replace(gaussian, initial_mean=(-1.0,), initial_variance=0.1), replace(well, initial_mean=0.1))
    settings: dict[str, Any] = {
        "n_particles": 250 if quick else 4000, "n_replicas": 32, "dt": 0.01, "seed": 0, "save_every": 20,
    }  # fmt: skip
    for case, other, lipschitz, one_sided, horizon, told in (
        (gaussian, others[0], gaussian.kappa, -gaussian.stiffness, 1.0, "U convex"),
        (well, others[1], well.lipschitz, well.wells**2 - 1, 4.0, "U with two wells"),
    ):
        a, b = (
            mfsde.simulate(with_methods(c, repelled(c)) if faulty else c, horizon=horizon, **settings)
            for c in (case, other)
        )
        found = constants.stability(a, b, lipschitz=lipschitz, one_sided=one_sided, sigma=case.sigma)
        counts = f"N = {settings['n_particles']}, R = {settings['n_replicas']}"
        yield claim(replace(found, name=f"coupled distance at its worst time, {told}, L = {one_sided:g}, {counts}"))
        if one_sided > 0:
            # An upper bound alone would let the opposite force pass: it pushes both to the barrier, together.
            start, later = (coupled(a, b, k) for k in (0, -1))
            name = f"coupled distance, {told}: that of t = 0 ≤ that of t = {horizon:g}, {counts}"
            yield claim(inequality(name, start, later))

    times, rtol = [0.0, 1.0, 2.0, 4.0], 1e-4 if quick else 1e-6
    flows = [limit.fokker_planck(c, None, times, n_nodes=81 if quick else 257, rtol=rtol) for c in (well, others[1])]
    gaps = [float(wasserstein.distance(*(limit.law_at(flow, t) for flow in flows))) for t in times]
    growth = 2 * well.lipschitz + 0.5 * well.sigma**2 * (well.wells**2 - 1)
    for t, gap in zip(times[1:], gaps[1:], strict=True):
        bound = math.exp(growth * t) * gaps[0]
        yield claim(inequality(f"W₂(m_t, m'_t), U with two wells, t = {t:g}, Fokker–Planck", gap, bound))
    # Without L > 0 the constant would be e^{2C_F t} at most, or 1 for small C_F.
    yield claim(inequality("W₂(m_0, m'_0) ≤ W₂(m_4, m'_4): two wells part the laws", gaps[0], gaps[-1]))


def coupled(a: xr.Dataset, b: xr.Dataset, k: int) -> np.ndarray:
    """((1/N) Σ|X^i - X'^i|²)^{1/2} at the k-th saved time.    (R,)."""
    x, y = (run["position"].values[k, ..., 0].astype(float) for run in (a, b))
    return np.asarray(np.sqrt(np.square(x - y).mean(-1)))


def repelled(case: Any) -> dict[str, Callable[..., Tensor]]:
    """The drift with +T∇U."""
    return {"drift": lambda t, x, mu: case.drift(t, x, mu) + case.sigma**2 * case.confinement_gradient(x)}


# Tightness and the limit set


@item(
    source="001, Theorem 4, tightness and step 1",
    statement="sup_t E|X_t|^p ≤ max(E|X_0|^p, r^p), T C_U r² = Br + T(C'_U + p + d − 2), x·∇U ≥ C_U|x|² − C'_U, "
    "|D_mF| ≤ B; all m_0 have the one limit m*",
    hypotheses=(
        "x·∇U ≥ C_U|x|² − C'_U (Assumption 2)",
        "D_mF bounded (Assumption 5)",
        "F convex",
        "E|X_0|^p < ∞, p > 2",
    ),
    fault="the regulariser's force is ∇U in place of T∇U",
)
def tightness(quick: bool, faulty: bool) -> Iterator[Finding]:
    """Moments of particles and densities against the Lyapunov bound; three initial laws, two wells, one limit."""
    base, horizon = Observed(kappa=0.5, wells=1.3, sigma=1.2), 20.0
    star = limit.gibbs(base)
    mu = star.as_measure()
    n, r, step = (125, 32, 0.05) if quick else (1000, 64, 0.02)
    features: dict[str, Callable[[Tensor], Tensor]] = {"tanh x": torch.tanh, "x²": torch.square}
    for start, variance in ((-3.0, 0.2), (3.0, 0.2), (0.0, 2.0)):
        case = replace(base, initial_mean=start, initial_variance=variance)
        moved = with_methods(case, unscaled(case)) if faulty else case
        told = f"from N({start:g}, {variance:g})"
        runs = [
            mfsde.simulate(
                moved, n_particles=n, n_replicas=r, horizon=horizon, dt=c * step, seed=0, noise=mfsde.Noise(0, c),
                save_every=round(1 / step / c),
            )
            for c in (1, 2)
        ]  # fmt: skip
        x, coarse = (torch.from_numpy(run["position"].values[..., 0]).double() for run in runs)
        for p in (3, 4):
            moments = x.abs().pow(p).mean(-1).numpy()
            worst = int(moments.mean(1).argmax())
            first = gaussian_moment(start, variance, p)
            bound = max(first, lyapunov_radius(case, p) ** p)
            name = f"sup_t E|X|^{p}, t ≤ {horizon:g}, {told}, N = {n}, R = {r}"
            yield claim(inequality(name, moments[worst], np.full(r, bound)))
        for name, feature in features.items():
            late, coarser = (feature(y[-1]).mean(-1).numpy() for y in (x, coarse))
            expected = float(mu.weights @ feature(mu.points[:, 0]))
            # Halving the step changes the value by what is left, to first order; the bias 1/N is below the noise.
            left = abs(float((late - coarser).mean()))
            found = identity(f"∫{name} dm_{horizon:g}, {told}", late, np.full(r, expected), discretisation=left)
            yield claim(found)

        flow = limit.fokker_planck(moved, None, [0.0, horizon, 30.0], n_nodes=81 if quick else 257, rtol=1e-6)
        end, before = (limit.law_at(flow, t) for t in (30.0, horizon))
        moving = float(wasserstein.distance(end, before))
        declared = float(flow["mean_error"].values[-1, 0])
        gap = float(wasserstein.distance(end, star))
        name = f"W₂(m_30, m*), {told}, Fokker–Planck"
        yield claim(identity(name, gap, 0.0, discretisation=moving + declared + star.error))


def unscaled(case: Any) -> dict[str, Callable[..., Tensor]]:
    """The drift with ∇U in place of T∇U."""
    more = 1 - 0.5 * case.sigma**2
    return {"drift": lambda t, x, mu: case.drift(t, x, mu) - more * case.confinement_gradient(x)}


def lyapunov_radius(case: Observed, p: int) -> float:
    """The root r of T C_U r² = B r + T(C'_U + p + d - 2).

    With M = E|X|^p and r = M^{1/p} Itô's formula and Hölder's inequality give
    M' <= p r^{p-2} (B r + T(C'_U + p + d - 2) - T C_U r²), which is negative above the root.
    """
    t, b = 0.5 * case.sigma**2, case.kappa * (1 + abs(case.target))
    c, rest = 0.5, 0.5 * case.wells**2 + p - 1
    return (b + math.sqrt(b * b + 4 * t * t * c * rest)) / (2 * t * c)


def gaussian_moment(mean: float, variance: float, p: int) -> float:
    """E|X|^p for X ~ N(mean, variance)."""
    mu = Gaussian([mean], variance).as_measure()
    return float((mu.weights * mu.points[:, 0].abs() ** p).sum())


# Convergence


@item(
    source="001, Theorem 4, HWI inequality",
    statement="W₂(m_t, m*) → 0 and V(m_t) falls; KL ≤ W₂(√I − ½K W₂), KL ≤ I/(2α), W₂² ≤ 2KL/α relative to m*; "
    "T KL(m|m*) ≤ V(m) − V(m*) ≤ T KL(m|p_m)",
    hypotheses=(
        "U confining with ∇U Lipschitz, D_mF bounded and Lipschitz (Assumptions 2, 5), E|X_0|^p < ∞ for some p > 2",
        "F convex (for uniqueness and the sandwich)",
        "−∇² log m* ≥ K (HWI); α > 0 a log-Sobolev constant of m*",
    ),
    fault="the Fisher information is ½ ∫|∇log(m/m*)|² dm",
)
def convergence(quick: bool, faulty: bool) -> Iterator[Finding]:
    """Margins in closed form and by particles, equality for a shift, decay by Fokker-Planck; F that is not convex."""
    share = 0.5 if faulty else 1.0
    yield from _inequalities(quick, share)
    yield from _decay(quick)
    yield from _not_convex()


def _inequalities(quick: bool, share: float) -> Iterator[Finding]:
    """HWI, log-Sobolev and Talagrand: for shifts equalities, along the flow inequalities."""
    case = GaussianLangevin()
    k = case.stiffness
    star = limit_of(case)
    for name, law in (("a shift by 1", shifted(star, 1.0)), ("m_{0.5}", case.limit(0.5)), ("m_0", case.initial())):
        kl, fisher = theory.relative_entropy(law, star), share * theory.relative_fisher(law, star)
        w2 = float(wasserstein.distance(law, star))
        if name == "a shift by 1":
            yield claim(identity("HWI, equality for a shift by 1", kl, w2 * (math.sqrt(fisher) - 0.5 * k * w2)))
            yield claim(identity("log-Sobolev, equality for a shift by 1", kl, fisher / (2 * k)))
            yield claim(identity("Talagrand, equality for a shift by 1", w2, math.sqrt(2 * kl / k)))
            continue
        for check in (
            theory.hwi(kl, fisher, w2, k), theory.log_sobolev(kl, fisher, k), theory.talagrand(kl, w2, k),
        ):  # fmt: skip
            yield claim(replace(check, name=f"{check.name}, {name}, closed form"))
    for check in theory.entropy_sandwich(case, case.limit(0.5), star):
        yield claim(replace(check, name=f"{check.name}, m_0.5, closed form"))

    n, r = (250, 64) if quick else (2500, 128)
    run = mfsde.simulate(case, n_particles=n, n_replicas=r, horizon=0.5, dt=0.01, seed=0, save_every=25)
    told = f"N = {n}, R = {r}"
    for t in (0.25, 0.5):
        kl_r, fisher_r, w2_r = plug_in(run.sel(time=t), star)
        fisher_r = share * fisher_r
        for check in (
            theory.hwi(kl_r, fisher_r, w2_r, k), theory.log_sobolev(kl_r, fisher_r, k), theory.talagrand(kl_r, w2_r, k),
        ):  # fmt: skip
            yield claim(replace(check, name=f"{check.name}, moments of particles at t = {t:g}, {told}"))
        # The law of Euler's steps is Gaussian as well. To first order in 1/N the distance of estimates is larger by at
        # most Var(mean)/(2 W₂), Var(mean) = v/N, and that of their standard deviation lower by at most √v/(4N).
        mean, _, within = euler_moments(case, n, 0.01, round(t / 0.01))
        variance = within / (1 - 1 / n)
        law = Gaussian([mean], variance)
        exact = float(wasserstein.distance(law, star))
        left = (0.5 * variance / exact + 0.25 * math.sqrt(variance)) / n
        name = f"W₂(m_t, m*), law of the steps, t = {t:g}, {told}"
        yield claim(identity(name, w2_r, np.full(r, exact), discretisation=left))
    for check in theory.entropy_sandwich(case, run.sel(time=0.5).isel(replica=slice(8)), star):
        yield claim(replace(check, name=f"{check.name}, particles at t = 0.5, N = {n}, R = 8"))


def _decay(quick: bool) -> Iterator[Finding]:
    """V and W₂ along the Fokker-Planck flow of a convex F, at the rate of the log-Sobolev constant."""
    case = Observed(kappa=1.0, sigma=1.0, initial_mean=-2.0)
    t = 0.5 * case.sigma**2
    star = limit.gibbs(case)
    lowest = theory.free_energy(case, star)
    times = np.linspace(0, 10, 21)
    flow = limit.fokker_planck(case, None, times, n_nodes=81 if quick else 257, rtol=1e-6)
    laws = [limit.law_at(flow, s) for s in times]
    values = np.array([theory.free_energy(case, law) for law in laws])
    yield claim(inequality("largest increase of V between times, Fokker–Planck", float(np.diff(values).max()), 0.0))
    alpha = constants.smallest_constant(case, [law.as_measure() for law in laws[:: 5 if quick else 1]]).low
    reference = proximal(case, star.as_measure())
    own = constants.log_sobolev_constant(reference).low
    for check in theory.functional_inequalities(laws[4], reference):
        yield claim(replace(check, name=f"{check.name}, ½κ(∫tanh dm − y)², t = {times[4]:g}, Fokker–Planck"))
    for k in (4, 10, 20):
        bound = math.exp(-2 * alpha * t * times[k]) * (values[0] - lowest)
        name = f"V(m_t) − V(m*) ≤ e^(−2αTt)(V(m_0) − V(m*)), α = {alpha:.3g}, t = {times[k]:g}"
        yield claim(inequality(name, values[k] - lowest, bound))
        gap = float(wasserstein.distance(laws[k], star))
        declared = float(flow["mean_error"].values[k, 0])
        name = f"W₂(m_t, m*), t = {times[k]:g}, Fokker–Planck"
        yield claim(inequality(name, gap, math.sqrt(2 * bound / (t * own)), discretisation=declared))


def _not_convex() -> Iterator[Finding]:
    """A concave F: the sandwich has no ground, and below the transition there are three stationary laws."""
    concave = GaussianLangevin(kappa=-0.3)
    for check in theory.entropy_sandwich(concave, concave.limit(0.5), limit_of(concave)):
        yield outside(replace(check, name=f"{check.name}, F = −0.15(mean − a)²"))
    for coupling, count in ((2.0, 3), (0.5, 1)):
        case = CurieWeiss(coupling=coupling)
        laws = limit.gibbs_all(case, n_nodes=257)
        told = f"stationary laws, −½J|mean|², J = {coupling:g}, J_c = {case.critical_coupling():.4g}"
        yield claim(identity(told, float(len(laws)), float(count)))
        if count > 1:
            gap = theory.convexity_gap(case.energy, [law.as_measure() for law in laws])
            reason = f"F is not convex along mixtures: above a chord by {-gap:.2g} of its size" if gap < 0 else ""
            yield outside(
                inequality(f"one stationary law, J = {coupling:g}", float(len(laws)), 1.0, hypotheses=[reason])
            )


def limit_of(case: GaussianLangevin) -> Gaussian:
    """m*, N(κa/λ, I/k)."""
    rate = case.kappa + 0.5 * case.sigma**2 * case.stiffness
    return Gaussian([case.kappa * a / rate for a in case.target], 1 / case.stiffness)


def shifted(law: Gaussian, by: float) -> Gaussian:
    """The law moved along the line."""
    return Gaussian(law.mean + by, law.cov)


def plug_in(run: xr.Dataset, star: Gaussian) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """KL, Fisher information and W₂ relative to m*, each (R,), of the Gaussians with the moments of the particles."""
    x = run["position"].values[..., 0].astype(float)
    m, v, w = x.mean(-1) - float(star.mean), x.var(-1, ddof=1), float(star.cov)
    kl = 0.5 * (v / w - 1 - np.log(v / w) + m**2 / w)
    return kl, v * (1 / w - 1 / v) ** 2 + m**2 / w**2, np.sqrt(m**2 + (np.sqrt(v) - math.sqrt(w)) ** 2)


# Exponential contraction


@item(
    source="001, Theorem 5",
    statement="W₂(m_t, m*) ≤ e^{(2C_F − ½σ²C_U)t} W₂(m_0, m*), by synchronous coupling",
    hypotheses=(
        "D_mF Lipschitz in (x, m) with constant C_F, (2); W₂ in the measure is enough",
        "(∇U(x) − ∇U(x'))·(x − x') ≥ C_U|x − x'|², (3)",
        "m* stationary",
    ),
    misprints=("printed e^{(6C_F − C_U)t}: it misses σ²/2, and is false for small σ even where condition (4) holds",),
    fault="the regulariser's force is σ²∇U in place of ½σ²∇U",
)
def contraction(quick: bool, faulty: bool) -> Iterator[Finding]:
    """Constants as estimated and as known, both bounds, and the measured rate."""
    base = GaussianLangevin()
    k, sigma = base.stiffness, base.sigma
    for kappa in (0.3, 0.01):
        case = replace(base, kappa=kappa)
        known = constants.theorem_5(kappa * max(1.0, abs(case.target[0])), k, sigma)
        found = constants.contraction_of(case, [case.initial().as_measure()])
        told = f"κ = {kappa:g}"
        c_f = constants.lipschitz(case, [case.initial().as_measure()])
        yield claim(identity(f"C_F estimated, ½κ(mean − a)², {told}", c_f, kappa))
        c_u = constants.one_sided_convexity(case, case.initial().as_measure().points)
        yield claim(identity(f"C_U estimated, {told}", c_u, k))
        star = limit_of(case)
        start = float(wasserstein.distance(case.initial(), star))
        for t in (0.25, 1.0):
            later = float(wasserstein.distance(case.limit(t), star))
            check = constants.contraction_check(known, t, later, start)
            yield claim(replace(check, name=f"W₂(m_t, m*), {told}, t = {t:g}, closed form"))
        if kappa == 0.01:
            later = float(wasserstein.distance(case.limit(1.0), star))
            check = constants.contraction_check(known, 1.0, later, start, form="printed")
            yield misprint(replace(check, name=f"printed e^((6C_F − C_U)t), {told}, t = 1, (4) holds"))
            yield claim(identity("left side of (4) as estimated, κ = 0.01, p = 2.5", found.condition, -1.22))
            yield claim(identity("2C_F − ½σ²C_U as estimated, κ = 0.01", found.corrected, known.corrected))
    far = replace(base, target=(-2.0,))
    c_f = constants.lipschitz(far, [far.initial().as_measure()])
    yield claim(identity("C_F estimated, ½κ(mean − a)², κ = 0.3, a = −2", c_f, 2 * far.kappa))
    tanh = Observed(kappa=0.3)
    seen = constants.lipschitz(tanh, [tanh.initial().as_measure()])
    yield claim(inequality("C_F estimated ≤ κ(1 + |y|), ½κ(∫tanh dm − y)²", seen, tanh.lipschitz))

    yield from _measured_rate(quick, faulty)
    weak = replace(base, stiffness=1.0, kappa=0.01)
    star = limit_of(weak)
    start, later = (float(wasserstein.distance(weak.limit(t), star)) for t in (0.0, 1.0))
    check = constants.contraction_check(constants.theorem_5(0.01, 1.0, sigma), 1.0, later, start, form="printed")
    yield outside(replace(check, name="printed bound, U = |x|²/2: (4) fails for every p > 2"))
    check = constants.contraction_check(constants.theorem_5(0.01, 1.0, sigma), 1.0, later, start)
    yield claim(replace(check, name="W₂(m_1, m*), U = |x|²/2, where (4) fails, corrected bound"))


def _measured_rate(quick: bool, faulty: bool) -> Iterator[Finding]:
    """A start of the stationary variance makes the flow a shift, so that W₂ is one exponential, of rate κ + ½σ²k."""
    case = GaussianLangevin(initial_variance=0.25)
    n, r, step = (250, 32, 0.005) if quick else (2000, 64, 0.005)
    moved = with_methods(case, doubled(case)) if faulty else case
    run = mfsde.simulate(moved, n_particles=n, n_replicas=r, horizon=2.0, dt=step, seed=0, save_every=10)
    apart = wasserstein.to_law(run, limit_of(case))
    rate = rates.exponential(apart, start=0.0)
    slow = case.kappa + 0.5 * case.sigma**2 * case.stiffness
    exact = -math.log1p(-step * slow) / step
    told = f"N = {n}, R = {r}"
    yield claim(identity(f"rate of W₂(m_t, m*), {told}", rate.value, exact, stderr=rate.stderr))
    known = constants.theorem_5(case.kappa * max(1.0, case.target[0]), case.stiffness, case.sigma)
    name = f"½σ²C_U − 2C_F ≤ rate, {told}"
    yield claim(inequality(name, -known.corrected, rate.value, stderr=rate.stderr))
    start = apart.isel(time=0, drop=True)
    for t in (0.25, 0.5):
        check = constants.contraction_check(known, t, apart.sel(time=t, drop=True), start)
        yield claim(replace(check, name=f"W₂(m_t, m*), t = {t:g}, {told}"))


def doubled(case: Any) -> dict[str, Callable[..., Tensor]]:
    """The drift with 2T∇U."""
    return {"drift": lambda t, x, mu: case.drift(t, x, mu) - 0.5 * case.sigma**2 * case.confinement_gradient(x)}
