"""Theorems as checks: a margin, its standard error and a verdict (`check`).

Laws enter by quadrature, runs particle by particle (`free_energy`); standard errors come from replicas only. A check on
samples can refute a hypothesis, not prove it. Conventions: dX = -(D_mF + (σ²/2) ∇U) dt + σ dW, T = σ²/2,
V(m) = F(m) + T KL(m | e^{-U}).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from scipy import integrate, stats
from torch import Tensor

from mfsde import EmpiricalMeasure, Energy
from mfsde.limit.free_energy import Density, internal, of_law, score_of, value_of, with_density
from mfsde.measure import Law
from mfsde.model import confinement, energy_of, temperature

from . import dynamics, particles, replicas, wasserstein
from .check import ROUNDING, Check, Values, identity, inequality, mean_and_error, of_means, unfounded
from .free_energy import (
    Flow,
    along,
    dissipation,
    free_energy,
    generators,
    of_one_run,
    of_particles,
    periods,
    time_step,
    variance,
)
from .gibbs import curvature, proximal

__all__ = [
    "Check",
    "bias_bound",
    "convexity_gap",
    "dissipation",
    "entropy_sandwich",
    "first_order",
    "free_energy",
    "free_energy_dissipation",
    "functional_inequalities",
    "hwi",
    "identity",
    "iid_bias",
    "inequality",
    "log_sobolev",
    "relative_entropy",
    "relative_fisher",
    "stationarity",
    "talagrand",
]

QUADRATURE = 1e-9  # relative, of an integral against a law
UNCONVERGED = 1e-6  # relative, of an integral over time
CONVEX = 1e-9  # relative depth below its chord at which a function counts as not convex
GAUSSIAN = 0.1  # skewness and excess kurtosis that a Gaussian plug-in tolerates
PROBE_AXES, PROBE_PARTICLES = 8, 500
ROWS, MOST_POINTS = 256, 20_000  # of a second derivative: a block, and the largest quadrature it is computed on
SKEWED = 400  # samples from which 3 s.e. of a χ²₁-like mean are violated by chance in 0.6 % of cases (6 % at 16)

TEST_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Σ x": lambda x: x.sum(-1),
    "½|x|²": lambda x: 0.5 * x.square().sum(-1),
    # log cosh x = |x| + log(1 + e^{-2|x|}) - log 2, written without the kink
    "Σ log cosh x": lambda x: (torch.nn.functional.softplus(2 * x) - x - math.log(2)).sum(-1),
}


# The free energy and its dissipation


def free_energy_dissipation(
    scenario: Any,
    flow: Flow | xr.Dataset | xr.DataArray,
    *,
    start: float | None = None,
    stop: float | None = None,
    law: Law | Flow | None = None,
) -> Check:
    """V(m_t) - V(m_s) = -∫_s^t ∫ |D_mF + T ∇log m_r + T ∇U|² dm_r dr.

    Declared error. Flow: of the adaptive quadrature in time. Run: Simpson's rule against the trapezoid over the saved
    times, plus (dt/2) of the variation of the dissipation for Euler steps (an explicit gradient step errs by half of
    that, to first order in dt), plus the finite-N bias as the change of the margin on halves of the particles.

    Args:
        scenario: with energy, sigma and confinement.
        flow: t ↦ Law, or a run with at least three saved times and two replicas.
        start: s; needed for a flow, the first saved time of a run when None.
        stop: t; likewise.
        law: as for `free_energy`, for a run.

    Returns:
        Check; "hypothesis fails" where particles that are visibly not Gaussian were given no `law`, and without numbers
        where the run or the scenario follows another dynamics (births and deaths, minibatches, velocities, σ = 0, a
        drift that is not -(D_mF + T ∇U)).

    Raises:
        TypeError, ValueError: as `free_energy`; missing times.

    Source: Szpruch, Mean-field Langevin dynamics, Theorem 3.

    """
    name, source = "free-energy dissipation", "Szpruch, Mean-field Langevin dynamics, Theorem 3"
    if isinstance(flow, (xr.Dataset, xr.DataArray)):
        return _dissipation_of_run(name, source, scenario, flow, start, stop, law)
    if start is None or stop is None or not start < stop:
        raise ValueError(f"free_energy_dissipation of a flow needs start < stop; got start = {start}, stop = {stop}.")
    ends = [(t, flow(t)) for t in (start, stop)]
    other = dynamics.of_scenario(scenario, [(t, m.as_measure()) for t, m in ends if isinstance(m, Law)])
    if other:
        return unfounded(name, other, source)
    spent, error, *_ = integrate.quad(
        lambda t: dissipation(scenario, flow(t)), start, stop, epsabs=1e-13, epsrel=1e-10, limit=30, full_output=1
    )
    if error > UNCONVERGED * (abs(spent) + UNCONVERGED):
        raise RuntimeError(
            f"{name}: the integral over [{start}, {stop}] did not converge ({spent:.6g} ± {error:.1g}); the flow may "
            "jump, or start from a law without density. Choose a later start."
        )
    change = free_energy(scenario, flow(stop)) - free_energy(scenario, flow(start))
    declared = float(error) + QUADRATURE * abs(spent)
    return identity(name, change, -spent, discretisation=declared, source=source)


# The first-order condition


def first_order(scenario: Any, m: Law) -> Check:
    """Var_m(δF/δm(m, ·) + T log m + T U) = 0: the first-order condition of m* for a law with a density.

    Args:
        scenario: with energy, sigma and confinement.
        m: the candidate, with log_prob; `analysis.gibbs.Gibbs` makes one from an unnormalised density.

    Raises:
        TypeError: m has no density.

    Source: Szpruch, Mean-field Langevin dynamics, Proposition 4. The density printed there,
        exp(-(2/σ²)(δF/δm + U)), does not satisfy it.

    """
    t, mu = temperature(scenario), with_density(m).as_measure()
    parts = [
        energy_of(scenario).functional_derivative(mu, mu.points),
        t * m.log_prob(mu.points),  # type: ignore[attr-defined]
        t * confinement(scenario, mu.points),
    ]
    residual = variance(mu, sum(parts[1:], parts[0]))
    size = sum(variance(mu, part) for part in parts)
    source = "Szpruch, Mean-field Langevin dynamics, Proposition 4"
    return identity("first-order condition", residual, 0.0, discretisation=QUADRATURE * size, source=source)


def stationarity(
    scenario: Any,
    run: xr.Dataset | xr.DataArray,
    *,
    functions: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    start: float | None = None,
) -> tuple[Check, ...]:
    """∫ (T Δf - (D_mF + T ∇U)·∇f) dm = 0 for every test function f: the first-order condition, weakly.

    It needs no density of the particles, and it has no finite-N bias: the particle system's own Gibbs law satisfies it
    for every N. The declared error is Euler's leading term, (dt/2) |E(b·∇²f b + σ² b·∇Δf + (σ⁴/4) Δ²f)|, b the drift.

    Args:
        scenario: with energy, sigma and confinement.
        run: a long run, two replicas or more; all its saved times from `start` on are averaged.
        functions: name -> f, (..., d) -> (...), smooth; Σ x_k, ½|x|² and Σ log cosh x_k when None.
        start: where stationarity begins; the first saved time when None.

    Returns:
        One identity for each test function; "hypothesis fails", without numbers, where the run or the scenario follows
        another dynamics, as for `free_energy_dissipation`, or is projected into a domain, whose boundary adds a term.

    Raises:
        ValueError: as `free_energy`; fewer than two replicas.

    Source: the weak form of Szpruch, Mean-field Langevin dynamics, Proposition 4.

    """
    position = _between(of_one_run(run, "stationarity"), start, None)
    replicas.count(position)
    step = time_step(position, "stationarity")
    named = dict(functions or TEST_FUNCTIONS)
    source = "weak form of Szpruch, Mean-field Langevin dynamics, Proposition 4"
    other = _another_dynamics(scenario, run, position) or _bounded(scenario)
    if other:
        return tuple(unfounded(f"stationarity, f = {name}", other, source) for name in named)
    terms = generators(scenario, list(named.values()))
    found = along(position, None, terms, "generator", "∫ Lf dm", n_terms=2 * len(named))
    means = found.mean([dim for dim in found.dims if dim == "time"]).transpose("term", "replica").values
    return tuple(
        identity(
            f"stationarity, f = {name}",
            means[2 * k],
            np.zeros(means.shape[1]),
            discretisation=0.5 * step * abs(float(means[2 * k + 1].mean())),
            source=source,
        )
        for k, name in enumerate(named)
    )


# Functional inequalities


def hwi(entropy: Values, fisher: Values, w2: Values, convexity: float, *, seen: float | None = None) -> Check:
    """KL <= W₂ (√I - K W₂/2) for a reference e^{-Ψ} with ∇²Ψ >= K, K of any sign.

    Args:
        entropy: KL(m | reference), a number or one per replica.
        fisher: I = ∫ |∇log(m/reference)|² dm, likewise.
        w2: W₂(m, reference), likewise.
        convexity: K.
        seen: the smallest curvature found on points (`curvature`), held against K.

    Source: Otto, Villani (2000), Theorem 3.

    """

    def sides(kl: float, i: float, w: float) -> tuple[float, float]:
        return kl, w * (math.sqrt(i) - 0.5 * convexity * w)

    _check_constant("HWI", convexity)
    hypotheses = [_as_convex(convexity, seen)]
    return of_means("HWI", sides, (entropy, fisher, w2), hypotheses, "Otto, Villani (2000), Theorem 3")


def log_sobolev(entropy: Values, fisher: Values, constant: float, *, seen: float | None = None) -> Check:
    """KL <= I/(2α): the log-Sobolev inequality with constant α, in particular α = K > 0 (Bakry, Émery).

    Arguments as for `hwi`.

    Source: Bakry, Émery (1985); Otto, Villani (2000), Theorem 2.

    """
    _check_constant("log-Sobolev", constant)
    hypotheses = [_as_positive(constant), _as_convex(constant, seen)]
    divisor = constant if constant > 0 else math.nan

    def sides(kl: float, i: float) -> tuple[float, float]:
        return kl, i / (2 * divisor)

    return of_means("log-Sobolev", sides, (entropy, fisher), hypotheses, "Bakry, Émery (1985)")


def talagrand(entropy: Values, w2: Values, constant: float, *, seen: float | None = None) -> Check:
    """W₂ <= √(2 KL/K): Talagrand's T₂, as the root.

    Arguments as for `hwi`.

    Source: Otto, Villani (2000), Theorem 1.

    """
    _check_constant("Talagrand T₂", constant)
    hypotheses = [_as_positive(constant), _as_convex(constant, seen)]
    divisor = constant if constant > 0 else math.nan

    def sides(kl: float, w: float) -> tuple[float, float]:
        return w, math.sqrt(2 * kl / divisor)

    return of_means("Talagrand T₂", sides, (entropy, w2), hypotheses, "Otto, Villani (2000), Theorem 1")


def functional_inequalities(
    m: Law, reference: Law, *, convexity: float | None = None, w2: float | None = None
) -> tuple[Check, Check, Check]:
    """HWI, log-Sobolev and Talagrand between two laws with densities, by quadrature against m.

    Args:
        m: a law with log_prob.
        reference: likewise.
        convexity: K of the reference; None takes the smallest curvature found on the quadrature points of both laws.
        w2: W₂(m, reference); None computes it.

    Raises:
        TypeError: a law without density.
        ValueError: m has mass where the reference has none; W₂ unavailable.

    """
    entropy, fisher = relative_entropy(m, reference), relative_fisher(m, reference)
    points = torch.cat([with_density(law).as_measure().points for law in (m, reference)])
    seen = curvature(reference, points)
    k = seen if convexity is None else convexity
    distance = float(wasserstein.distance(m, reference)) if w2 is None else w2
    return (
        hwi(entropy, fisher, distance, k, seen=seen),
        log_sobolev(entropy, fisher, k, seen=seen),
        talagrand(entropy, distance, k, seen=seen),
    )


def relative_entropy(m: Law, reference: Law) -> float:
    """KL(m | reference) = ∫ log(m/reference) dm in nats, by m's quadrature.

    Raises:
        TypeError: a law without density.
        ValueError: m has mass where the reference has none.

    """
    mu = with_density(m).as_measure()
    value = float(mu.integrate(lambda x: m.log_prob(x) - with_density(reference).log_prob(x)))  # type: ignore[attr-defined]
    if not math.isfinite(value):
        raise ValueError(f"KL(m | reference) = {value}: m has mass where the reference's density is zero.")
    return value


def relative_fisher(m: Law, reference: Law) -> float:
    """I(m | reference) = ∫ |∇log(m/reference)|² dm, by m's quadrature."""
    mu = with_density(m).as_measure()
    return float(mu.integrate(lambda x: (score_of(m, x) - score_of(reference, x)).square().sum(-1)))


# The entropy sandwich


def entropy_sandwich(
    scenario: Any,
    m: Any,
    minimiser: Law,
    *,
    probes: Sequence[EmpiricalMeasure] | None = None,
    log_z: Callable[[EmpiricalMeasure], float] | None = None,
) -> tuple[Check, Check]:
    """T KL(m | m*) <= V(m) - V(m*) <= T KL(m | p_m), p_m ∝ exp(-(1/T) δF/δm(m, ·) - U), for convex F.

    The entropy of m cancels in both margins, so that for particles they need no estimate of it; the two sides
    themselves are then shown with the Gaussian plug-in. Declared error for particles: the change of the margin on
    halves of them.

    Args:
        scenario: with energy, sigma and confinement.
        m: a law with log_prob, or a run (or position) at one time, two replicas or more.
        minimiser: m*, a law with log_prob.
        probes: measures along whose mixtures the convexity of F is checked; m, m*, translates and a dilation of m
            when None.
        log_z: m ↦ log ∫ exp(-(1/T) δF/δm(m, x) - U(x)) dx; None takes quadrature, in d <= 2.

    Returns:
        Lower and upper inequality; "hypothesis fails" where F lies above a chord.

    Raises:
        TypeError, ValueError: as `free_energy`; more than one time; d > 2 without log_z.

    Source: Nitanda, Wu, Suzuki (2022), Proposition 1; Chizat (2022).

    """
    star = of_law(minimiser)
    normalisation = log_z or (lambda mu: proximal(scenario, mu).log_z)
    if isinstance(m, Law):
        density, lower, upper = of_law(m), None, None
        sides = _sandwich(scenario, density.measure, density.entropy, minimiser, star, normalisation)
    else:
        position = _single_time(of_one_run(m, "entropy_sandwich"))
        density = of_particles(torch.as_tensor(position.values, dtype=torch.float64), periods(position))
        sides = _sandwich(scenario, density.measure, density.entropy, minimiser, star, normalisation)
        lower, upper = _halves_of_sandwich(scenario, position, minimiser, star, sides, normalisation)
    probes = _probes(density.measure, star.measure) if probes is None else probes
    convex = _as_convex_energy(energy_of(scenario), probes)
    low, gap, up = (s if s.ndim else float(s) for s in sides)
    source = "Nitanda, Wu, Suzuki (2022), Proposition 1"
    error = 10 * ROUNDING * max(float(np.max(np.abs(s))) for s in sides)
    return (
        inequality(
            "entropy sandwich, lower", low, gap, discretisation=lower or error, hypotheses=[convex], source=source
        ),
        inequality(
            "entropy sandwich, upper", gap, up, discretisation=upper or error, hypotheses=[convex], source=source
        ),
    )


def convexity_gap(energy: Energy, measures: Sequence[EmpiricalMeasure]) -> float:
    """The smallest (1-ε) F(m) + ε F(m') - F((1-ε) m + ε m') over pairs and ε = ¼, ½, ¾, relative to the |F| involved.

    Negative: F is not convex along mixtures. Otherwise these pairs do not refute it.

    Args:
        energy: F.
        measures: two or more, without leading axes, weights welcome.

    Raises:
        ValueError: fewer than two measures.

    """
    if len(measures) < 2:
        raise ValueError(f"convexity_gap needs two measures or more to mix; got {len(measures)}.")
    values = [float(energy(mu)) for mu in measures]
    smallest = math.inf
    for (mu, a), (nu, b) in itertools.combinations(zip(measures, values, strict=True), 2):
        for share in (0.25, 0.5, 0.75):
            mixed = float(energy(_mixture(mu, nu, share)))
            size = abs(a) + abs(b) + abs(mixed)
            gap = (1 - share) * a + share * b - mixed
            smallest = min(smallest, gap / size if size else 0.0)
    return smallest


# The bias of N particles


def iid_bias(energy: Energy, samples: Any, law: Law, *, discretisation: float = 0.0) -> Check:
    """E F(m^N) - F(m) = (1/2N) ∫ δ²F/δm²(m)(x, x) m(dx) for N i.i.d. points; exact for quadratic F.

    For F = ½(∫φ dm - y)² the right side is Var(φ)/(2N). The left side uses F(m^N) - F(m) - ∫ δF/δm(m) dm^N, which has
    the same mean (the last term has mean zero) and a variance of order N⁻² in place of N⁻¹.

    Args:
        energy: F.
        samples: (replica, particle, component): independent samples of the law, 400 replicas or more.
        law: m.
        discretisation: declared O(1/N²) remainder for F that are not quadratic.

    Raises:
        ValueError: fewer than 400 replicas, points that are not finite or of another dimension, a law whose quadrature
            has more than 20 000 points.

    Source: Chassagneux, Szpruch, Tse, Weak quantitative propagation of chaos via differential calculus on the space of
        measures (2022), at first order.

    """
    bias, n = _bias(energy, samples, law)
    if len(bias) < SKEWED:
        raise ValueError(
            f"iid_bias needs {SKEWED} replicas or more; got {len(bias)}. The excess F(m^N) - F(m) is distributed like "
            "a χ²: from fewer, three standard errors reject a true identity too often. Independent samples are cheap."
        )
    mu = law.as_measure()
    second = _second_derivatives(energy, mu, lambda x: x)
    expected = sum(float((w * rows.diagonal()).sum()) for w, rows in second) / (2 * n)
    declared = discretisation + QUADRATURE * abs(expected)
    source = "Chassagneux, Szpruch, Tse (2022)"
    return identity("bias of N particles", bias, np.full(len(bias), expected), discretisation=declared, source=source)


def bias_bound(energy: Energy, samples: Any, law: Law, bound: float) -> Check:
    """|E F(m^N) - F(m)| <= 2L/N for N i.i.d. points of m.

    Args:
        energy: F.
        samples: (replica, particle, component): independent samples of the law.
        law: m.
        bound: L with E sup_ν |δF/δm(ν, ξ)| + E sup_ν |δ²F/δm²(ν, ξ, η)| <= L: a supremum over laws ν, which is yours
            to prove. Values at ν = m that already exceed it make the hypothesis fail.

    Raises:
        ValueError: fewer than two replicas; as `iid_bias` otherwise.

    Source: Szpruch, Mean-field Langevin dynamics, Theorem 6; Mei, Montanari, Nguyen (2018),
        Proposition 4.1 with another constant.

    """
    bias, n = _bias(energy, samples, law)
    mu = law.as_measure()
    second = _second_derivatives(energy, mu, lambda x: mu.points)
    first = float((mu.weights * energy.functional_derivative(mu, mu.points).abs()).sum())
    seen = first + sum(float((w[:, None] * mu.weights * rows.abs()).sum()) for w, rows in second)
    reason = "" if seen <= bound * (1 + QUADRATURE) else f"L = {bound:g}, but the expectations at m alone give {seen:g}"
    mean, error = mean_and_error(np.sign(bias.mean()) * bias)
    return inequality(
        "bias below 2L/N", mean, 2 * bound / n, stderr=error, hypotheses=[reason],
        source="Szpruch, Mean-field Langevin dynamics, Theorem 6",
    )  # fmt: skip


# Hypotheses, as the sentence that says what fails


def _check_constant(name: str, constant: float) -> None:
    if not math.isfinite(constant):
        raise ValueError(f"{name}: the constant is {constant}; expected a finite number.")


def _as_positive(constant: float) -> str:
    return "" if constant > 0 else f"the constant is {constant:g}; the inequality needs a positive one"


def _as_convex(claimed: float, seen: float | None) -> str:
    if seen is None or seen >= claimed - 1e-6 * max(1.0, abs(claimed)):
        return ""
    return f"the reference is not {claimed:g}-log-concave: its curvature falls to {seen:g}"


def _as_convex_energy(energy: Energy, probes: Sequence[EmpiricalMeasure]) -> str:
    gap = convexity_gap(energy, probes)
    if gap >= -CONVEX:
        return ""
    return f"F is not convex along mixtures: it lies above a chord by {-gap:.2g} of its size"


def _another_dynamics(scenario: Any, run: xr.Dataset | xr.DataArray, position: xr.DataArray) -> str:
    """That the run, or the scenario at some of its particles, follows another equation."""
    return dynamics.of_run(run) or dynamics.of_scenario(scenario, dynamics.clouds(position, periods(position)))


def _bounded(scenario: Any) -> str:
    """That particles are kept in a domain: a projection that wraps them around a torus keeps none."""
    if not hasattr(scenario, "project") or getattr(scenario, "period", None) is not None:
        return ""
    return "the particles are projected into a domain, and only functions without slope across its boundary satisfy it"


def _as_gaussian(position: xr.DataArray) -> str:
    """Third and fourth moments of every component, averaged over time, against those of a Gaussian."""
    quantile = replicas.t_quantile(replicas.count(position), 0.999)
    for name, moment in (("skewness", stats.skew), ("excess kurtosis", stats.kurtosis)):
        axes = ("replica", "component", "particle")
        values = moment(position.transpose(..., *axes).values.astype(float), axis=-1, bias=False)
        values = values.reshape(-1, *values.shape[-2:]).mean(0)
        for k in range(values.shape[1]):
            mean, error = mean_and_error(values[:, k])
            if abs(mean) > GAUSSIAN + quantile * error:
                return (
                    f"the particles are not Gaussian ({name} {mean:.2f} in component {k}), so their plug-in score and "
                    "entropy are wrong: pass law=, the law or t ↦ law whose density is theirs"
                )
    return ""


# Runs


def _between(position: xr.DataArray, start: float | None, stop: float | None) -> xr.DataArray:
    if "time" not in position.dims:
        return position
    times = position["time"].values
    slack = 1e-9 * max(1.0, float(np.abs(times).max()))
    kept = (times >= (-math.inf if start is None else start - slack)) & (
        times <= (math.inf if stop is None else stop + slack)
    )
    if not kept.any():
        raise ValueError(f"no saved time lies in [{start}, {stop}]; the run has {times[0]} to {times[-1]}.")
    return position.isel(time=kept)


def _single_time(position: xr.DataArray) -> xr.DataArray:
    if position.sizes.get("time", 1) != 1:
        raise ValueError(f"expected particles at one time; got {position.sizes['time']}. Select one: .sel(time=...).")
    position = position.squeeze("time") if "time" in position.dims else position
    replicas.count(position)
    particles.check_finite(position.values, "position")
    return position.transpose("replica", "particle", "component")


def _halves(position: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray]:
    half = position.sizes["particle"] // 2
    return position.isel(particle=slice(None, half)), position.isel(particle=slice(half, 2 * half))


def _dissipation_of_run(
    name: str,
    source: str,
    scenario: Any,
    run: xr.Dataset | xr.DataArray,
    start: float | None,
    stop: float | None,
    law: Law | Flow | None,
) -> Check:
    position = _between(of_one_run(run, name), start, stop)
    replicas.count(position)
    if position.sizes.get("time", 1) < 3:
        raise ValueError(
            f"{name}: needs three saved times or more; got {position.sizes.get('time', 1)}. Lower save_every."
        )
    other = _another_dynamics(scenario, run, position)
    if other:
        return unfounded(name, other, source)
    time = position["time"].values

    def sides(at: xr.DataArray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        v = free_energy(scenario, at, law=law).transpose("time", "replica").values
        rate = dissipation(scenario, at, law=law).transpose("time", "replica").values
        return v[-1] - v[0], -integrate.simpson(rate, x=time, axis=0), rate

    change, spent, rate = sides(position)
    trapezoid = abs(float((spent + integrate.trapezoid(rate, x=time, axis=0)).mean()))
    euler = 0.5 * time_step(position, name) * float(np.abs(np.diff(rate.mean(1))).sum())
    halves = [sides(half) for half in _halves(position)]
    halved = np.mean([half_spent - half_change for half_change, half_spent, _ in halves])
    finite_n = abs(float(halved - (spent - change).mean()))
    return identity(
        name, change, spent, discretisation=trapezoid + euler + finite_n,
        hypotheses=[_as_gaussian(position) if law is None else ""], source=source,
    )  # fmt: skip


# The sandwich's three terms, and what convexity is probed on


def _sandwich(
    scenario: Any,
    mu: EmpiricalMeasure,
    entropy: Tensor,
    minimiser: Law,
    star: Density,
    log_z: Callable[[EmpiricalMeasure], float],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """T KL(m | m*), V(m) - V(m*), T KL(m | p_m), one of each per replica, or numbers."""
    t = temperature(scenario)
    lower = t * (-entropy - mu.integrate(minimiser.log_prob))  # type: ignore[attr-defined]
    gap = internal(scenario, mu) - t * entropy - value_of(scenario, star)
    each = [mu] if mu.points.ndim == 2 else [EmpiricalMeasure(x, period=mu.period) for x in mu.points]
    normalised = mu.points.new_tensor([log_z(one) for one in each]).reshape(mu.points.shape[:-2])
    # ∫ δF/δm dm = 0, so only U and the normalisation of p_m remain.
    upper = t * (-entropy + mu.integrate(lambda x: confinement(scenario, x)) + normalised)
    return lower.numpy(), gap.numpy(), upper.numpy()


def _halves_of_sandwich(
    scenario: Any,
    position: xr.DataArray,
    minimiser: Law,
    star: Density,
    sides: tuple[np.ndarray, np.ndarray, np.ndarray],
    log_z: Callable[[EmpiricalMeasure], float],
) -> tuple[float, float]:
    """What the two margins change by on halves of the particles: their O(1/N) bias."""
    halved = []
    for half in _halves(position):
        mu = EmpiricalMeasure(torch.as_tensor(half.values, dtype=torch.float64), period=periods(position))
        # The entropy cancels in the margins.
        low, gap, up = _sandwich(scenario, mu, mu.points.new_zeros(len(mu.points)), minimiser, star, log_z)
        halved.append(((gap - low).mean(), (up - gap).mean()))
    low, gap, up = sides
    lower, upper = np.abs(np.mean(halved, axis=0) - [(gap - low).mean(), (up - gap).mean()])
    return float(lower), float(upper)


def _mixture(mu: EmpiricalMeasure, nu: EmpiricalMeasure, share: float) -> EmpiricalMeasure:
    """(1 - share) μ + share ν."""
    weights = torch.cat([(1 - share) * mu.weights, share * nu.weights])
    return EmpiricalMeasure(torch.cat([mu.points, nu.points]), weights, period=mu.period)


def _probes(mu: EmpiricalMeasure, star: EmpiricalMeasure) -> list[EmpiricalMeasure]:
    """m, m*, translates of m by a standard deviation along each axis, m dilated by 2."""
    if mu.points.ndim > 2:
        mu = EmpiricalMeasure(mu.points.reshape(-1, *mu.points.shape[-2:])[0], period=mu.period)
    base = EmpiricalMeasure(mu.points[:PROBE_PARTICLES], period=mu.period) if mu.is_uniform else mu
    spread = base.covariance().diagonal().sqrt()
    moves = [spread * e for e in torch.eye(base.dim, dtype=base.points.dtype)[:PROBE_AXES]]
    clouds = [base.points, *(base.points + move for move in moves), 2 * base.points - base.mean()]
    weights = None if base.is_uniform else base.weights
    return [star, *(EmpiricalMeasure(cloud, weights, period=mu.period) for cloud in clouds)]


def _bias(energy: Energy, samples: Any, law: Law) -> tuple[np.ndarray, int]:
    """F(m^N) - F(m) - ∫ δF/δm(m) dm^N for each replica, and N."""
    if isinstance(samples, (xr.Dataset, xr.DataArray)):
        samples = _single_time(of_one_run(samples, "samples")).values
    x = torch.as_tensor(samples, dtype=torch.float64)
    if x.ndim != 3:
        raise ValueError(f"samples have shape {tuple(x.shape)}; expected (replica, particle, component).")
    particles.check_finite(x.numpy(), "samples")
    if x.shape[-1] != law.dim:
        raise ValueError(f"samples have {x.shape[-1]} components and the law is in dimension {law.dim}; pass its own.")
    sample, mu = EmpiricalMeasure(x), law.as_measure()
    with torch.no_grad():
        excess = energy(sample) - energy(mu)
    linear = energy.functional_derivative(mu, x.reshape(-1, x.shape[-1])).reshape(x.shape[:-1]).mean(-1)
    return (excess - linear).numpy(), x.shape[1]


def _second_derivatives(
    energy: Energy, mu: EmpiricalMeasure, beside: Callable[[Tensor], Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights (k,) and δ²F/δm²(m)(x, beside(x)), (k, ...), for blocks x of the points of m."""
    if mu.n_particles > MOST_POINTS:
        raise ValueError(
            f"the law's quadrature has {mu.n_particles} points, and the second derivative of F costs a backward pass "
            f"on all of them for each; at most {MOST_POINTS} are affordable. Pass a law with a smaller as_measure(), "
            "such as a Gaussian or one in d = 1."
        )
    for w, x in zip(mu.weights.split(ROWS), mu.points.split(ROWS), strict=True):
        yield w, energy.second_derivative(mu, x, beside(x))
