"""How fast: convexity and Lipschitz constants, the log-Sobolev constant, and the rates they predict.

Conventions: dX = -(D_mF + (σ²/2) ∇U) dt + σ dW, T = σ²/2. Constants found on samples are one-sided, and every docstring
says on which side: a supremum over finitely many points is a lower estimate, an infimum an upper one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from mfsde import EmpiricalMeasure
from mfsde.model import confinement, confinement_gradient, energy_of, temperature

from . import dynamics, particles, replicas, wasserstein
from .check import Check, Values, inequality, unfounded
from .free_energy import of_one_run, time_step
from .gibbs import Gibbs, curvature, proximal
from .labels import apply
from .rates import Rate

CUT = 60.0  # nats below the maximum at which a median-based constant is no longer sought: the grid ends at 70
ROUNDING = 1e-12  # of the largest entry of a discrete generator: eigenvalues below it are arithmetic
MEDIAN = 1e-9  # mass, relative, within which a median is not located
AGREEMENT = 1e-3  # relative: by how much discretisation lets a lower bound exceed an upper one
JUDGED_AT = (0.0, 1.0)  # times at which a drift is held against that of the energy
TRANSLATIONS = (1.0, 10.0, 100.0)  # shifts of a law, in units of its size, that probe D_mF


# The log-Sobolev constant


@dataclass(frozen=True)
class LogSobolev:
    """Bounds on the log-Sobolev constant α: KL(ν | p) <= I(ν | p)/(2α) for every ν.

    The bounds are theorems; their values come from a grid that ends 70 nats below the maximum, and are numerical, no
    proofs: what the density does further out, or between the nodes, they do not see.

    Args:
        low: the best of the lower bounds.
        high: the best of the upper bounds.
        bakry_emery: inf of -∇² log p over the box that the grid spans, a lower bound where positive.
        holley_stroock: K e^{-osc}, a lower bound; NaN without a reference.
        spectral_gap: Poincaré constant, an upper bound; inf above one dimension, NaN where rounding hides it.
        muckenhoupt: lower and upper bound by the criterion of Bobkov and Götze; (0, inf) above one dimension.

    """

    low: float
    high: float
    bakry_emery: float
    holley_stroock: float
    spectral_gap: float
    muckenhoupt: tuple[float, float]

    def __str__(self) -> str:
        criteria = {"Bakry-Émery": self.bakry_emery, "Holley-Stroock": self.holley_stroock, "gap": self.spectral_gap}
        used = [f"{name} {value:.4g}" for name, value in criteria.items() if math.isfinite(value)]
        used.append(f"Muckenhoupt [{self.muckenhoupt[0]:.4g}, {self.muckenhoupt[1]:.4g}]")
        return f"log-Sobolev constant in [{self.low:.4g}, {self.high:.4g}] ({', '.join(used)})"


def log_sobolev_constant(law: Gibbs, *, reference: Any = None) -> LogSobolev:
    """Bounds on the log-Sobolev constant of a Gibbs law, by four criteria, on its grid.

    Args:
        law: a `Gibbs` law in one or two dimensions.
        reference: log density (..., d) -> (...) or law, strongly log-concave, that the law perturbs boundedly.

    Raises:
        ValueError: no criterion gives a positive lower bound (d = 2, not log-concave, no reference); a law on the line
            whose tails are too heavy for any α > 0, as far as the grid shows; bounds that contradict each other.

    """
    grid = law.as_measure().points
    bakry = curvature(law, grid)
    holley = math.nan if reference is None else holley_stroock(law, reference, grid)
    gap, criterion = (spectral_gap(law), muckenhoupt(law)) if law.dim == 1 else (math.inf, (0.0, math.inf))
    low = max(b for b in (bakry, holley, criterion[0], 0.0) if not math.isnan(b))
    if not low > 0:
        raise ValueError(
            "log_sobolev_constant: no criterion gives a positive lower bound: the law is not log-concave on its grid "
            f"(curvature {bakry:.3g}), and Muckenhoupt's bound is {criterion[0]:g} (0 in d = 2, or behind a barrier of "
            "some 700 nats). Pass a strongly log-concave reference that it perturbs boundedly."
        )
    high = min(b for b in (gap, criterion[1]) if not math.isnan(b))
    if low > high * (1 + AGREEMENT):
        raise ValueError(
            f"log_sobolev_constant: the bounds contradict each other, {low:g} > {high:g} (Bakry-Émery {bakry:g}, "
            f"Holley-Stroock {holley:g}, gap {gap:g}, Muckenhoupt {criterion}): the grid misses a part of the law, or "
            "the reference is not what perturbs it. Check the second derivatives of its log density."
        )
    return LogSobolev(low, max(low, high), bakry, holley, gap, criterion)


def holley_stroock(law: Any, reference: Any, points: Any) -> float:
    """K e^{-osc(log p - log r)}, where the reference r has curvature K > 0: a lower bound of the log-Sobolev constant.

    Both K and the oscillation are taken over the points, so that they must cover the support.

    Raises:
        ValueError: the reference is not strongly log-concave on the points.

    Source: Holley, Stroock (1987).

    """
    x = torch.as_tensor(points, dtype=torch.float64)
    k = curvature(reference, x)
    if not k > 0:
        raise ValueError(f"holley_stroock: the reference has curvature {k:g} somewhere; it must be positive.")
    difference = getattr(law, "log_prob", law)(x) - getattr(reference, "log_prob", reference)(x)
    return k * math.exp(-float(difference.max() - difference.min()))


def spectral_gap(law: Gibbs) -> float:
    """Inf ∫ |f'|² dp / Var_p f: the first non-zero eigenvalue of -(p f')'/p, one dimension only.

    An upper bound of the log-Sobolev constant. Finite differences of second order on the law's grid. NaN where the
    eigenvalue, exponentially small behind a barrier, is below the rounding of the matrix.

    Source: Bakry, Gentil, Ledoux, Analysis and geometry of Markov diffusion operators (2014), Proposition 5.1.3.

    """
    x, log_p = _on_line(law)
    step = x[1] - x[0]
    # In the variable g = f √p the matrix is symmetric; only ratios of neighbouring densities enter.
    between = 0.5 * (log_p[1:] + log_p[:-1])
    diagonal = np.zeros_like(log_p)
    diagonal[:-1] += np.exp(between - log_p[:-1])
    diagonal[1:] += np.exp(between - log_p[1:])
    beside = -np.ones_like(between)
    found = eigh_tridiagonal(diagonal / step**2, beside / step**2, eigvals_only=True, select="i", select_range=(0, 1))
    return float(found[1]) if found[1] > ROUNDING * diagonal.max() / step**2 else math.nan


def muckenhoupt(law: Gibbs) -> tuple[float, float]:
    """Lower and upper bound of α on the line, within a universal factor, log-concave or not.

    With M the median and A(x) = p([x, ∞)), the best C in Ent(f²) <= C ∫ |f'|² dp lies between max b and 4 max B, where
    b = sup_{x > M} A log(1 + 1/(2A)) ∫_M^x 1/p, B = sup_{x > M} A log(1 + e²/A) ∫_M^x 1/p, and likewise on the left.
    With f² = dν/dp, I = 4 ∫ |f'|² dp, so that α = 2/C.

    Raises:
        ValueError: A log(1 + e²/A) ∫ 1/p still grows where the grid ends: α is zero, or its sup lies further out.

    Source: Bobkov, Götze (1999), Theorem 5.3; these constants: Barthe, Roberto, Sobolev inequalities for probability
        measures on the real line (2003).

    """
    x, log_p = _on_line(law)
    sides = [_muckenhoupt_right(x, log_p), _muckenhoupt_right(-x[::-1], log_p[::-1])]
    small, large = (max(side[k] for side in sides) for k in (0, 1))
    return math.exp(math.log(2) - large), math.exp(math.log(2) - small)


def predicted_rate(constant: float, scenario: Any) -> float:
    """2αT: V(m_t) - V* <= e^{-2αTt} (V(m_0) - V*) when every p_{m_t} has log-Sobolev constant α and F is convex.

    Source: Nitanda, Wu, Suzuki (2022), Theorem 1; Chizat (2022).

    """
    return 2 * constant * temperature(scenario)


def smallest_constant(scenario: Any, measures: Sequence[EmpiricalMeasure]) -> LogSobolev:
    """The log-Sobolev bounds of the p_m with the smallest lower bound, over the given measures m (a flow's snapshots).

    Args:
        scenario: with energy, sigma and confinement; d <= 2.
        measures: without leading axes.

    """
    found = []
    for mu in measures:
        law = proximal(scenario, mu)
        reference = (lambda x: -confinement(scenario, x)) if hasattr(scenario, "confinement") else None
        if reference is not None and not curvature(reference, law.as_measure().points) > 0:
            reference = None
        found.append(log_sobolev_constant(law, reference=reference))
    return min(found, key=lambda bounds: bounds.low)


def decay_rate(rate: Rate, constant: float, scenario: Any) -> Check:
    """2αT <= the measured rate of V(m_t) - V*.

    Args:
        rate: of V - V* itself: V - V* ~ A e^{-λt} (a series of squares halved by its `power` must be doubled back).
        constant: α, a lower bound.
        scenario: for T. "hypothesis fails", without numbers, where its dynamics is another than mean-field Langevin, as
            seen on its initial law and at the times of the rate's window.

    """
    name, source = "free-energy decay 2αT", "Nitanda, Wu, Suzuki (2022), Theorem 1"
    other = dynamics.of_scenario(scenario, dynamics.started(scenario, rate.window))
    if other:
        return unfounded(name, other, source)
    reasons = [f"the measured rate is flagged: {'; '.join(rate.flags)}"] if rate.flags else []
    return inequality(
        name, predicted_rate(constant, scenario), rate.value, stderr=rate.stderr, hypotheses=reasons, source=source,
    )  # fmt: skip


# Constants of the drift


def lipschitz(scenario: Any, measures: Sequence[EmpiricalMeasure]) -> float:
    """C_F: the Lipschitz constant of D_mF in (x, m), and its growth at the origin, as seen on samples.

    The largest of |D_mF(m, x) - D_mF(m, x')|/|x - x'|, |D_mF(m, x) - D_mF(m', x)|/W₂(m, m') and
    |D_mF(m, 0)|/(1 + ∫|y| dm) over the points, measures, their translates and δ_0. Theorem 5 has W₁ <= W₂ in the
    second: that too makes it a lower estimate. Known: F = ½κ(mean - a)² has C_F = κ max(1, |a|).

    Args:
        scenario: with an energy.
        measures: at least one, without leading axes; a few hundred points each are plenty.

    Raises:
        ValueError: no measure.

    """
    energy = energy_of(scenario)
    if not measures:
        raise ValueError("lipschitz needs at least one measure to look at; got none.")
    laws = _family(measures[0]) + list(measures[1:])
    x = measures[0].points
    slopes = [energy.intrinsic_derivative(mu, x.clone()) for mu in laws]
    found = [_along_points(x, slope) for slope in slopes]
    for i in range(len(laws)):
        for j in range(i):
            distance = _distance(laws[i], laws[j])
            if distance > 0:
                found.append(float((slopes[i] - slopes[j]).norm(dim=-1).max()) / distance)
    for mu in laws:
        at_origin = energy.intrinsic_derivative(mu, torch.zeros_like(x[:1])).norm()
        found.append(float(at_origin / (1 + (mu.weights * mu.points.norm(dim=-1)).sum())))
    return max(found)


def one_sided_convexity(scenario: Any, points: Any) -> float:
    """C_U with (∇U(x) - ∇U(x'))·(x - x') >= C_U |x - x'|²: the smallest curvature of U on the points.

    An infimum over points: an upper estimate, exact for quadratic U.
    """
    return curvature(lambda x: -confinement(scenario, x), points)


# Theorem 5


@dataclass(frozen=True)
class Contraction:
    """The two forms of W₂(m_t, m*) <= e^{ct} W₂(m_0, m*).

    Args:
        printed: c = 6C_F - C_U, as printed: it misses σ²/2 and is false for small σ.
        corrected: c = 2C_F - σ²C_U/2, proved by synchronous coupling; without any condition on moments.
        condition: left side of (4), σ²(p - 1)/2 + 3C_F + σ²|∇U(0)|/2 - σ²C_U/2; the theorem asks for < 0.
        p: the moment, p > 2.
        proved: which form is proved.
        other: why the scenario's dynamics is not the theorem's, where `contraction_of` has seen that.

    """

    printed: float
    corrected: float
    condition: float
    p: float
    proved: str = "corrected"
    other: str = ""

    @property
    def condition_holds(self) -> bool:
        """(4) holds."""
        return self.condition < 0

    def bound(self, t: Any, w2: float, form: str = "corrected") -> Any:
        """e^{ct} W₂(m_0, m*), for a number or an array of times.

        Raises:
            ValueError: an unknown form.

        """
        exponents = {"printed": self.printed, "corrected": self.corrected}
        if form not in exponents:
            raise ValueError(f"unknown form {form!r}; Theorem 5 has the forms {', '.join(exponents)}.")
        return w2 * np.exp(exponents[form] * np.asarray(t, dtype=float))

    def __str__(self) -> str:
        return (
            f"W₂ contracts like e^({self.corrected:.4g} t) (corrected, proved); printed: e^({self.printed:.4g} t); "
            f"condition (4) {self.condition:.4g} {'<' if self.condition_holds else '>='} 0 at p = {self.p:g}"
        )


def theorem_5(lipschitz: float, convexity: float, sigma: float, *, p: float = 2.5, slope: float = 0.0) -> Contraction:
    """Both exponents of Theorem 5 and the left side of its condition (4).

    With U = k|x|²/2, (4) reads k > p - 1 + 6C_F/σ², so that it excludes U = |x|²/2. It bounds the p-th moment; the
    corrected contraction does not need it.

    Args:
        lipschitz: C_F.
        convexity: C_U.
        sigma: σ.
        p: number of moments of m_0, above 2.
        slope: |∇U(0)|.

    Raises:
        ValueError: p <= 2, or constants out of their range.

    Source: Szpruch, Mean-field Langevin dynamics, Theorem 5.

    """
    if not p > 2:
        raise ValueError(f"p = {p:g}: condition (4) bounds a moment p > 2.")
    if not (lipschitz >= 0 and sigma > 0):
        raise ValueError(f"C_F = {lipschitz:g} and σ = {sigma:g}: expected C_F >= 0 and σ > 0.")
    half = 0.5 * sigma**2
    condition = half * (p - 1) + 3 * lipschitz + half * slope - convexity * half
    return Contraction(6 * lipschitz - convexity, 2 * lipschitz - half * convexity, condition, p)


def contraction_of(scenario: Any, measures: Sequence[EmpiricalMeasure], *, p: float = 2.5) -> Contraction:
    """`theorem_5` with C_F, C_U and ∇U(0) estimated on the measures and their points: optimistic on both sides."""
    points = measures[0].points
    slope = float(confinement_gradient(scenario, torch.zeros_like(points[:1])).norm())
    c_u = one_sided_convexity(scenario, torch.cat([mu.points for mu in measures]))
    found = theorem_5(lipschitz(scenario, measures), c_u, float(scenario.sigma), p=p, slope=slope)
    return replace(found, other=dynamics.of_scenario(scenario, [(t, mu) for t in JUDGED_AT for mu in measures]))


def contraction_check(
    contraction: Contraction, t: float, w2: Values, w2_start: Values, *, form: str = "corrected", stderr: float = 0.0
) -> Check:
    """W₂(m_t, m*) <= e^{ct} W₂(m_0, m*), c of the corrected or of the printed form.

    Args:
        contraction: the exponents, from `theorem_5`, or from `contraction_of`, which has looked at the dynamics too.
        t: time.
        w2: W₂(m_t, m*), a number or one per replica.
        w2_start: W₂(m_0, m*), likewise.
        form: "corrected" or "printed"; for the printed one condition (4) is a hypothesis.
        stderr: of w2, where it is one number.

    """
    growth = float(contraction.bound(t, 1.0, form))
    reason = ""
    if form == "printed" and not contraction.condition_holds:
        reason = f"condition (4) fails: {contraction.condition:.4g} >= 0 at p = {contraction.p:g}"
    return inequality(
        f"Theorem 5, {form}, t = {t:g}", w2, growth * w2_start, stderr=stderr,
        hypotheses=[contraction.other, reason], source="Szpruch, Mean-field Langevin dynamics, Theorem 5",
    )  # fmt: skip


# Proposition 6


def stability(
    a: xr.Dataset | xr.DataArray,
    b: xr.Dataset | xr.DataArray,
    *,
    lipschitz: float,
    one_sided: float,
    sigma: float,
) -> Check:
    """W₂(m_t, m'_t) <= C_t W₂(m_0, m'_0), C_t = e^{(2C_F + σ²L/2) t}, by two runs on the same noise.

    The distance of coupled particles, (1/N Σ|X^i - X'^i|²)^{1/2}, bounds W₂ from above and obeys the same inequality in
    every replica, started from the coupling of the initial particles. The check is the one at the saved time with the
    smallest margin, in units of the right side; its declared error is Euler's, of the order of dt times the exponent.

    Args:
        a: a run.
        b: another, from another initial law, with the same seed, settings and coefficients.
        lipschitz: C_F, with W₂ in the measure.
        one_sided: L with -(∇U(x) - ∇U(x'))·(x - x') <= L |x - x'|²; -C_U for convex U, which gives Theorem 5.
        sigma: σ.

    Returns:
        Check; "hypothesis fails", without numbers, where a run has births and deaths (its particles have no paths),
        minibatches or velocities. A drift that is not -(D_mF + (σ²/2) ∇U) it does not see: no scenario is given.

    Raises:
        ValueError: times, components, particles or replicas differ; fewer than two replicas; equal initial particles;
            no dt; weights, a torus or a sweep.

    Source: Szpruch, Mean-field Langevin dynamics, Proposition 6.

    """
    x, y = of_one_run(a, "stability"), of_one_run(b, "stability")
    _check_plain(x, y)
    particles.check_matching(x, y, ("time", "component", "particle", "replica"))
    _check_coupled(a, b)
    replicas.count(x)
    if x.sizes.get("time", 1) < 2:
        raise ValueError("stability needs a first and a later saved time; got one. Pass the whole runs.")
    source = "Szpruch, Mean-field Langevin dynamics, Proposition 6"
    other = dynamics.of_run(a) or dynamics.of_run(b)
    if other:
        return unfounded("stability", other, source)
    distance = _coupled(x, y).transpose("time", "replica")
    time = distance["time"].values - distance["time"].values[0]
    growth = 2 * lipschitz + 0.5 * sigma**2 * one_sided
    bound = np.exp(growth * time)[:, None] * distance.values[:1]
    later = range(1, len(time))
    if not (distance.values[0] > 0).all():
        raise ValueError("stability: the runs start from equal particles; start one of them from another law.")
    worst = min(later, key=lambda k: float((1 - distance.values[k] / bound[k]).mean()))
    step = max(time_step(z, "stability") for z in (x, y))
    # |1 - hλ| against e^{-hλ}: relative h²λ²/2 a step, λ the whole one-sided rate, both constants added up.
    rate = 2 * lipschitz + 0.5 * sigma**2 * abs(one_sided)
    declared = 0.5 * step * rate**2 * float(time[worst]) * float(bound[worst].mean())
    return inequality(
        f"stability, t = {float(distance['time'][worst]):g}", distance.values[worst], bound[worst],
        discretisation=declared, source=source,
    )  # fmt: skip


def _check_plain(*runs: xr.DataArray) -> None:
    for run in runs:
        if any(math.isfinite(length) for length in particles.period(run) or ()):
            raise ValueError(
                "stability: the particles live on a torus, where the convexity of U that gives L does not exist; it "
                "is a theorem on R^d."
            )


def _check_coupled(a: xr.Dataset | xr.DataArray, b: xr.Dataset | xr.DataArray) -> None:
    for name in ("seed", "dt"):
        if name in a.coords and name in b.coords and float(a[name]) != float(b[name]):
            raise ValueError(
                f"the runs differ in {name} ({float(a[name]):g}, {float(b[name]):g}), so their noise is not shared."
            )


def _coupled(x: xr.DataArray, y: xr.DataArray) -> xr.DataArray:
    """(1/N Σ |X^i - X'^i|²)^{1/2} over the remaining dimensions."""

    def block(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        particles.check_finite(p, "a")
        particles.check_finite(q, "b")
        gap = p.astype(np.float64) - q
        out: np.ndarray = np.sqrt(np.einsum("...nd,...nd->...", gap, gap) / p.shape[-2])
        return out

    keep = [dim for dim in ("time", "replica", "particle", "component") if dim in x.coords]
    x, y = (z.reset_coords(drop=True).assign_coords({dim: x[dim] for dim in keep}) for z in (x, y))
    core = ["particle", "component"]
    found: xr.DataArray = apply(block, x, y, input_core_dims=[core, core], output_dtypes=[float])
    return found


# Below


def _on_line(law: Gibbs) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and log density, in logarithms throughout: a barrier may be deeper than the smallest float."""
    nodes = law.table()[0]
    with torch.no_grad():
        log_p = law.log_prob(nodes[:, None]).numpy()
    support = np.flatnonzero(log_p > -math.inf)
    x, log_p = (a[support[0] : support[-1] + 1] for a in (nodes.numpy(), log_p))
    if not np.isfinite(log_p).all():
        raise ValueError(
            "the density is zero between two parts of its support: no log-Sobolev or Poincaré inequality holds."
        )
    return x, log_p


def _muckenhoupt_right(x: np.ndarray, log_p: np.ndarray) -> tuple[float, float]:
    """Logarithms of b and of 4B.

    A barrier without visible mass may hold the median anywhere: B starts on its near side, b at its top.
    """
    step = math.log(x[1] - x[0])
    below, above = _log_integral(log_p, step), _log_integral(log_p[::-1], step)[::-1]
    start, far = np.searchsorted(below - below[-1], [-math.log(2) - MEDIAN, -math.log(2) + MEDIAN])
    start, top = int(start), int(start + log_p[start : max(far, start + 1)].argmin())
    stop = int(np.flatnonzero(log_p > log_p.max() - CUT)[-1])
    log_p = log_p - below[-1]

    def products(median: int, inner: float) -> np.ndarray:
        # At the median and at the end one of the two factors vanishes.
        log_a = above[median + 1 : stop] - below[-1]
        weight = _log_integral(-log_p[median:], step)[1 : stop - median]
        found: np.ndarray = log_a + np.log(np.logaddexp(0.0, inner - log_a)) + weight
        return found

    small, large = products(top, -math.log(2)), products(start, 2.0)
    # Gaussian tails: it falls towards its limit. Exponential ones: it grows like the distance. Maxima, since it ripples
    # where the potential does.
    quarter = max(1, len(large) // 4)
    if large[-quarter:].max() > large[-2 * quarter : -quarter].max() + 1e-6:
        raise ValueError(
            f"muckenhoupt: A log(1 + e²/A) ∫ 1/p still grows at |x| = {abs(x[stop - 1]):g}, {CUT:g} nats below the "
            "maximum, where the grid ends. The tails are heavier than Gaussian, and then no log-Sobolev inequality "
            "holds, or the largest value lies further out; add a confinement that grows like |x|²."
        )
    return float(small.max()), math.log(4) + float(large.max())


def _log_integral(log_values: np.ndarray, log_step: float) -> np.ndarray:
    """Log of the cumulative trapezoidal rule; -inf at the first node."""
    panels = np.logaddexp(log_values[1:], log_values[:-1]) - math.log(2) + log_step
    return np.concatenate([[-math.inf], np.logaddexp.accumulate(panels)])


def _along_points(x: Tensor, slope: Tensor) -> float:
    """Max |f(x) - f(x')|/|x - x'|."""
    # By the matrix product |x|² - 2x·y + |y|² cancels far from the origin.
    mode = "donot_use_mm_for_euclid_dist"
    x, slope = x - x.mean(0), slope - slope.mean(0)
    distance, change = torch.cdist(x, x, compute_mode=mode), torch.cdist(slope, slope, compute_mode=mode)
    apart = distance > 1e-9 * max(1.0, float(distance.max()))
    return float((change[apart] / distance[apart]).max()) if bool(apart.any()) else 0.0


def _family(mu: EmpiricalMeasure) -> list[EmpiricalMeasure]:
    """m, its translates along the first axis, δ_0."""
    size = float(mu.covariance().diagonal().sum() ** 0.5) or 1.0
    unit = torch.zeros_like(mu.points[:1])
    unit[0, 0] = size
    moved = [EmpiricalMeasure(mu.points + s * unit, mu.weights) for r in TRANSLATIONS for s in (r, -r)]
    return [mu, *moved, EmpiricalMeasure(torch.zeros_like(mu.points[:1]))]


def _distance(mu: EmpiricalMeasure, nu: EmpiricalMeasure) -> float:
    return float(wasserstein.distance(mu, nu))
