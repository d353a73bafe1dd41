"""Transport between measures of unequal mass: Hellinger–Kantorovich, Wasserstein–Fisher–Rao, bounded Lipschitz.

Mass may be moved, created and destroyed. The three distances differ in what that costs:

* `hellinger_kantorovich`: HK² = min ∫₀¹∫ (|v|²/ℓ² + ¼ α²) dρ_t dt over ∂_tρ + ∇·(ρv) = αρ from μ to ν
  (Liero, Mielke, Savaré, Inventiones 2018, Theorem 8.18, with ℓ = 1). Its static form, Theorem 7.20 there, is the
  entropy–transport problem that `entropy_transport` solves.
* `wasserstein_fisher_rao`: WFR_δ² = min ∫₀¹∫ (½|v|² + ½δ²α²) dρ_t dt over the same paths (Chizat, Peyré, Schmitzer,
  Vialard, Found. Comput. Math. 2018). The integrand is 2δ² times the one above with ℓ = 2δ, so WFR_δ = √2 δ HK_{2δ}.
* `bounded_lipschitz`: ‖μ - ν‖ in the dual of bounded Lipschitz functions, a balanced linear program.

Measures are `EmpiricalMeasure`s, pairs (points, masses) of any total mass, or samples (each point 1/N). The value of
the first two is certified by the gap to a dual value; a program that was not solved raises.
"""

from __future__ import annotations

import bisect
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from scipy.spatial.distance import cdist
from scipy.special import xlog1py

from mfsde import EmpiricalMeasure
from mfsde.measure import Law
from mfsde.torus import period_lengths

from . import ground, particles, wasserstein
from .labels import apply, threaded

Array = np.ndarray
Lengths = tuple[float, ...] | None
# A measure as this file computes with it: points (N, d), masses (N,), torus.
Atoms = tuple[Array, Array, Lengths]

# Gaps between primal and dual value, relative to the total mass of both measures: where the iteration stops, and
# above which its result is refused.
GAP = 1e-13
LARGEST_GAP = 1e-9
ITERATIONS = 100
# Σ P∘Z is not driven below this share of the mass.
FLOOR = 1e-3 * GAP
# An iteration costs O((N + M)³) and ten matrices: 2000 against 2000 points take some half a minute.
LARGEST_PROBLEM = 5000
# The linear program of the bounded-Lipschitz norm: the cost matrix in bytes.
LARGEST_COST = 2 * 2**30

# Of the way to the boundary, and the largest change of a dual potential, in one step.
BOUNDARY = 0.99
LARGEST_CHANGE = 2.0

# The sum convention maximises over the share of the bound |φ| ≤ s, to this relative accuracy.
SHARE_GAP = 1e-10
SHARES = 100

# Weights are a probability to this accuracy.
LOST_MASS = 1e-4

CONVENTIONS = ("max", "sum")


@dataclass(frozen=True)
class EntropyTransport:
    """A solved entropy–transport problem: primal value, certified lower bound, optimal plan.

    Args:
        value: ⟨c, P⟩ + KL(P1 | p) + KL(Pᵀ1 | q) at the plan, an upper bound of the minimum.
        bound: a dual value, a lower bound of it; both up to rounding, some 1e-16 of the mass.
        plan: (N, M), the mass moved from x_i to y_j; its marginals are not p and q.

    """

    value: float
    bound: float
    plan: Array


def hellinger_kantorovich(a: Any, b: Any, *, length: float = 1.0, metric: str = "euclidean") -> float:
    """HK_ℓ(μ, ν) = (min_P ⟨c, P⟩ + KL(P1 | p) + KL(Pᵀ1 | q))^{1/2}, c = -log cos²(min(r/ℓ, π/2)).

    Between a δ_x and b δ_y it is a + b - 2√(ab) cos(min(r/ℓ, π/2)), squared: beyond πℓ/2 mass is not moved but
    destroyed and created. As ℓ → 0 the square rises to Hellinger's Σ(√p - √q)² over common atoms; for equal masses
    ℓ·HK_ℓ → W₂ as ℓ → ∞. HK²(sμ, sν) = s HK²(μ, ν). The square exceeds the minimum by at most 1e-9 (nearly always
    1e-13) of the mass; for lengths that leave less than that of it, use `wasserstein.distance`.

    Args:
        a: an `EmpiricalMeasure` (its torus is respected), a pair (points (N, d), masses (N,)) of any total mass, or a
            sample (N, d) or (N,) of points of mass 1/N.
        b: likewise; numbers of points and masses may differ.
        length: ℓ, the distance that weighs as much as a change of mass.
        metric: ground metric, "euclidean" (torus where the measures have a `period`) or "sphere" (great circles).

    Returns:
        The root, in units of √mass.

    Raises:
        TypeError: a law instead of atoms.
        ValueError: points or masses that are not finite, negative masses, dimensions or tori that differ, a problem
            above 5000 points (both together).
        RuntimeError: the gap to the dual value is not certified.

    Source: Liero, Mielke, Savaré, Optimal entropy–transport problems (2018), Theorem 7.20.

    """
    _check_positive(length, "length")
    return _hellinger_kantorovich(_atoms(a, "a"), _atoms(b, "b"), length, metric)


def wasserstein_fisher_rao(a: Any, b: Any, *, delta: float, metric: str = "euclidean") -> float:
    """WFR_δ(μ, ν) = √2 δ HK_{2δ}(μ, ν): action ½|v|² + ½δ²α², mass is not moved further than πδ.

    For equal masses WFR_δ → W₂/√2 as δ → ∞ (the action has a half); WFR_δ/(√2 δ) → Hellinger as δ → 0.

    Args:
        a: as in `hellinger_kantorovich`.
        b: likewise.
        delta: δ, the price of a change of mass against that of motion.
        metric: as in `hellinger_kantorovich`.

    Returns:
        The root, in units of the state times √mass.

    Raises:
        TypeError: as `hellinger_kantorovich`.
        ValueError: as `hellinger_kantorovich`.
        RuntimeError: as `hellinger_kantorovich`.

    Source: Chizat, Peyré, Schmitzer, Vialard, An interpolating distance between optimal transport and Fisher–Rao
    metrics (2018), where the geodesics between two Diracs are computed.

    """
    _check_positive(delta, "delta")
    return math.sqrt(2) * delta * hellinger_kantorovich(a, b, length=2 * delta, metric=metric)


def hellinger_kantorovich_between(
    a: xr.Dataset | xr.DataArray, b: xr.Dataset | xr.DataArray, *, length: float = 1.0, metric: str = "euclidean"
) -> xr.DataArray:
    """HK_ℓ between two runs, over every remaining dimension they share (time, replica, ...).

    Args:
        a: a run, whose `weight` (of any total) counts where it has one, or the `position` of equal particles.
        b: likewise; its number of particles may differ. Shared coordinates must be equal.
        length: ℓ, as in `hellinger_kantorovich`.
        metric: as in `hellinger_kantorovich`.

    Returns:
        DataArray over the remaining dimensions; problems run in threads.

    Raises:
        TypeError: not a run.
        ValueError: as `hellinger_kantorovich`; labels or tori that differ.
        RuntimeError: as `hellinger_kantorovich`.

    """
    _check_positive(length, "length")

    def one(x: Atoms, y: Atoms) -> float:
        return _hellinger_kantorovich(x, y, length, metric)

    found = _between(one, a, b).rename("hellinger_kantorovich")
    return found.assign_attrs(
        long_name="Hellinger–Kantorovich distance HK",
        units="1",
        length=length,
        power=1,
        estimator="entropy–transport problem between atoms, interior point with a certified gap",
    )


def bounded_lipschitz(a: Any, b: Any, *, convention: str = "max", metric: str = "euclidean") -> float:
    """‖μ - ν‖ = sup ∫ φ d(μ - ν) over bounded Lipschitz φ.

    convention="max": |φ| ≤ 1 and Lip φ ≤ 1. This is transport with cost min(r, 2) in which mass that one side lacks
    comes from one more node at cost 1 from every point; δ_x against δ_y gives min(r, 2).
    convention="sum": |φ|_∞ + Lip φ ≤ 1. Given |φ| ≤ s the cost is min((1 - s) r, 2s) and the node is at cost s; the
    value is concave in s and is maximised to 1e-10 of the mass. δ_x against δ_y gives 2r/(2 + r).

    Args:
        a: as in `hellinger_kantorovich`.
        b: likewise.
        convention: "max" or "sum".
        metric: as in `hellinger_kantorovich`.

    Returns:
        The norm, in units of mass (length enters through the bound 1 on the slope).

    Raises:
        TypeError: a law instead of atoms.
        ValueError: as `hellinger_kantorovich`, an unknown convention, a cost matrix above 2 GiB.
        RuntimeError: the linear program did not converge.

    Source: Piccoli, Rossi, On properties of the generalized Wasserstein distance (2016), for "max"; Dudley, Real
    analysis and probability, Section 11.3, for "sum".

    """
    _check_convention(convention)
    return _bounded_lipschitz(_atoms(a, "a"), _atoms(b, "b"), convention, metric)


def bounded_lipschitz_between(
    a: xr.Dataset | xr.DataArray, b: xr.Dataset | xr.DataArray, *, convention: str = "max", metric: str = "euclidean"
) -> xr.DataArray:
    """‖μ - ν‖ between two runs, over every remaining dimension they share (time, replica, ...).

    Args:
        a: as in `hellinger_kantorovich_between`.
        b: likewise.
        convention: "max" or "sum", as in `bounded_lipschitz`.
        metric: as in `hellinger_kantorovich`.

    Returns:
        DataArray over the remaining dimensions; problems run in threads.

    Raises:
        TypeError: not a run.
        ValueError: as `bounded_lipschitz`; labels or tori that differ.
        RuntimeError: as `bounded_lipschitz`.

    """
    _check_convention(convention)

    def one(x: Atoms, y: Atoms) -> float:
        return _bounded_lipschitz(x, y, convention, metric)

    found = _between(one, a, b).rename("bounded_lipschitz")
    return found.assign_attrs(
        long_name="bounded-Lipschitz norm of the difference",
        units="1",
        convention=convention,
        power=1,
        estimator="linear program between atoms",
    )


def entropy_transport(cost: Array, p: Array, q: Array) -> EntropyTransport:
    """min_{P ≥ 0} ⟨c, P⟩ + KL(P1 | p) + KL(Pᵀ1 | q), KL(r | p) = Σ r log(r/p) - r + p.

    A primal–dual interior-point method in the dual potentials φ, ψ: it follows P∘Z = μ, Z = c - φ - ψ ≥ 0,
    p e^{-φ} = P1, q e^{-ψ} = Pᵀ1 as μ falls, with Mehrotra's corrector. A Newton step eliminates P and Z and leaves one
    symmetric positive definite system of the size of the smaller side: O((N + M)³) an iteration, 10 to 40 iterations.
    The lower bound is the dual value sup Σ p (1 - e^{-φ}) + Σ q (1 - e^{-ψ}), φ + ψ ≤ c, at the potentials made
    feasible by a c-transform; so the gap does not depend on how the plan was found.

    Args:
        cost: (N, M), ≥ 0; infinite where mass cannot be moved.
        p: (N,), masses ≥ 0, not all of them need be moved.
        q: (M,), likewise.

    Returns:
        Value, lower bound and plan.

    Raises:
        ValueError: shapes that do not fit; masses or costs that are negative or NaN; more than 5000 points.
        RuntimeError: the gap stayed above 1e-9 of the mass.

    Source: Mehrotra, SIAM J. Optim. 2 (1992); duality: Liero, Mielke, Savaré (2018), Section 4.

    """
    _check_program(cost, p, q)
    if len(p) > len(q):
        # The Schur complement has the size of the first side.
        turned = entropy_transport(cost.T, q, p)
        return EntropyTransport(turned.value, turned.bound, turned.plan.T)
    plan = np.zeros_like(cost, dtype=np.float64)
    possible = np.isfinite(cost) & (p > 0)[:, None] & (q > 0)
    rows, columns = possible.any(1), possible.any(0)
    # Mass that can go nowhere is destroyed, or created, at cost 1 each.
    alone = float(p[~rows].sum() + q[~columns].sum())
    if not rows.any():
        return EntropyTransport(alone, alone, plan)
    kept = np.ix_(rows, columns)
    mass = float(p[rows].sum() + q[columns].sum())
    found = _interior_point(cost[kept], p[rows] / mass, q[columns] / mass)
    if not found.value - found.bound <= LARGEST_GAP:
        raise RuntimeError(
            f"entropy–transport between {len(p)} and {len(q)} atoms: the gap between primal and dual value is "
            f"{found.value - found.bound:.1e} of the mass (at most {LARGEST_GAP:g} is accepted). Merge atoms that "
            "nearly coincide, drop negligible masses, or change the length scale."
        )
    plan[kept] = mass * found.plan
    return EntropyTransport(alone + mass * found.value, alone + mass * found.bound, plan)


def _hellinger_kantorovich(a: Atoms, b: Atoms, length: float, metric: str) -> float:
    _check_space(a, b, metric)
    a, b = _present(a), _present(b)
    _check_size(len(a[0]), len(b[0]))
    if len(a[0]) == 0 or len(b[0]) == 0:
        return math.sqrt(float(a[1].sum() + b[1].sum()))
    scaled = _distances(a, b, metric) / length
    with np.errstate(divide="ignore"):
        cost = -2 * np.log(np.cos(np.minimum(scaled, np.pi / 2)))
    cost[scaled >= np.pi / 2] = np.inf
    return math.sqrt(max(0.0, entropy_transport(cost, a[1], b[1]).value))


def _interior_point(cost: Array, p: Array, q: Array) -> EntropyTransport:
    """The iteration, for masses that sum to 1 together; every row and column has a finite cost."""
    inside = np.isfinite(cost)
    pairs = int(inside.sum())
    finite = np.where(inside, cost, 0.0)
    phi, psi = np.full(len(p), -0.5), np.full(len(q), -0.5)
    slack = finite + 1
    plan = np.where(inside, np.outer(p, q), 0.0) / max(p.sum(), q.sum())
    best = EntropyTransport(float(p.sum() + q.sum()), 0.0, np.zeros_like(plan))
    for _ in range(ITERATIONS):
        best = _better(best, _certified(cost, finite, p, q, phi, plan, slack))
        complementarity = float((plan * slack).sum())
        if best.value - best.bound <= GAP or not 0 < complementarity < math.inf:
            break
        average = complementarity / pairs
        try:
            newton = _Newton(inside, p * np.exp(-phi), q * np.exp(-psi), plan, slack)
        except LinAlgError:
            # At the end of the path the system may lose its last digits; the certificate says whether that matters.
            break
        step = newton.direction(np.zeros_like(plan))
        size = newton.longest(step)
        ahead = float(((plan + size * step[2]) * (slack + size * step[3])).sum(where=inside)) / pairs
        # The floor is far below the gap asked for: there the potentials still move, and P and Z need not vanish more.
        aim = max(average * (ahead / average) ** 3, min(average, FLOOR / pairs))
        target = np.where(inside, aim - step[2] * step[3], 0.0) / slack
        step = newton.direction(target)
        size = min(BOUNDARY * newton.longest(step, 1 / BOUNDARY), _allowed(step[0], step[1]))
        phi, psi, plan, slack = (x + size * dx for x, dx in zip((phi, psi, plan, slack), step, strict=True))
    return best


class _Newton:
    """Newton steps for P∘Z = T∘Z, Z = c - φ - ψ, P1 = p e^{-φ}, Pᵀ1 = q e^{-ψ}, all with one factorisation.

    With W = P/Z: dP = T - P + W∘(dφ + dψ) and (diag(p e^{-φ}) + diag(W1)) dφ + W dψ = p e^{-φ} - T1; likewise for dψ.
    """

    def __init__(self, inside: Array, r: Array, s: Array, plan: Array, slack: Array) -> None:
        self.inside, self.r, self.s, self.plan, self.slack = inside, r, s, plan, slack
        self.ratio = plan / slack
        self.columns = s + self.ratio.sum(0)
        schur = -(self.ratio / self.columns) @ self.ratio.T
        np.fill_diagonal(schur, 0.0)
        # The complement's rows sum to r + W(s/columns) > 0, so its diagonal can be formed without cancellation.
        diagonal = r + self.ratio @ (s / self.columns) - schur.sum(1)
        np.fill_diagonal(schur, diagonal)
        self.scale = 1 / np.sqrt(diagonal)
        schur *= self.scale
        schur *= self.scale[:, None]
        self.factor = cho_factor(schur, lower=True, overwrite_a=True, check_finite=False)

    def direction(self, target: Array) -> tuple[Array, Array, Array, Array]:
        """(dφ, dψ, dP, dZ) towards P∘Z = target∘Z."""
        on_r, on_s = self.r - target.sum(1), self.s - target.sum(0)
        reduced = self.scale * (on_r - self.ratio @ (on_s / self.columns))
        d_phi = self.scale * cho_solve(self.factor, reduced, check_finite=False)
        d_psi = (on_s - self.ratio.T @ d_phi) / self.columns
        both = np.where(self.inside, d_phi[:, None] + d_psi, 0.0)
        return d_phi, d_psi, target - self.plan + self.ratio * both, -both

    def longest(self, step: tuple[Array, Array, Array, Array], most: float = 1.0) -> float:
        """The longest step, at most `most`, that keeps P and Z positive."""
        falling = np.divide(-step[2], self.plan, out=np.zeros_like(self.plan), where=self.inside)
        return min(most, 1 / max(float(falling.max()), float((-step[3] / self.slack).max()), 1 / most))


def _certified(
    cost: Array, finite: Array, p: Array, q: Array, phi: Array, plan: Array, slack: Array
) -> EntropyTransport:
    # On the path P∘Z = μ the pairs of the optimal plan have Z → 0 in the end; the others hold nothing but μ/Z.
    plan = np.where(plan > slack * np.minimum((p * np.exp(-phi))[:, None], q), plan, 0.0)
    value = float((finite * plan).sum()) + _divergence(plan.sum(1), p) + _divergence(plan.sum(0), q)
    psi = (cost - phi[:, None]).min(0)
    phi = (cost - psi).min(1)
    bound = -float((p * np.expm1(-phi)).sum() + (q * np.expm1(-psi)).sum())
    return EntropyTransport(value, bound, plan)


def _better(a: EntropyTransport, b: EntropyTransport) -> EntropyTransport:
    upper = b if b.value < a.value else a
    return EntropyTransport(upper.value, max(a.bound, b.bound), upper.plan)


def _divergence(r: Array, p: Array) -> float:
    """KL(r | p) = Σ p h(r/p), h(z) = z log z - z + 1, with z = 1 + t: no cancellation of r against p."""
    t = (r - p) / p
    return float((p * (xlog1py(1 + t, t) - t)).sum())


def _allowed(d_phi: Array, d_psi: Array) -> float:
    """The step that changes no potential by more than LARGEST_CHANGE: beyond, e^{-φ} is nothing like its tangent."""
    change = max(float(np.abs(d_phi).max()), float(np.abs(d_psi).max()))
    return LARGEST_CHANGE / change if change > 0 else math.inf


def _bounded_lipschitz(a: Atoms, b: Atoms, convention: str, metric: str) -> float:
    _check_space(a, b, metric)
    (x, p, _), (y, q, _) = a, b = _present(a), _present(b)
    if len(x) == 0 or len(y) == 0:
        return float(p.sum() + q.sum())
    size = 8 * len(x) * len(y)
    if size > LARGEST_COST:
        raise ValueError(
            f"bounded_lipschitz between {len(x)} and {len(y)} atoms needs a cost matrix of {size / 2**30:.1f} GiB and "
            "minutes. Subsample the particles and multiply their masses by what was left out."
        )
    r = _distances(a, b, metric)
    surplus = float(p.sum() - q.sum())
    if surplus > 0:
        q = np.append(q, surplus)
    elif surplus < 0:
        p = np.append(p, -surplus)

    def value(slope: float, height: float) -> float:
        """Sup over |φ| ≤ height, Lip φ ≤ slope."""
        cost = np.full((len(p), len(q)), height)
        np.minimum(slope * r, 2 * height, out=cost[: len(x), : len(y)])
        return wasserstein.transport_cost(p, q, cost)

    if convention == "max":
        return value(1.0, 1.0)
    # At s = 0 φ vanishes, and it rises by at most s on every atom; at s = 1 it is constant, and 1 - s lets it vary by
    # at most (1 - s) max r on the mass that both sides have.
    shared = min(float(p[: len(x)].sum()), float(q[: len(y)].sum()))
    steepest = float(p[: len(x)].sum() + q[: len(y)].sum())
    return _concave_maximum(
        lambda s: value(1 - s, s),
        (0.0, steepest),
        (abs(surplus), abs(surplus) - shared * float(r.max())),
        SHARE_GAP * steepest,
    )


def _concave_maximum(
    f: Callable[[float], float], left: tuple[float, float], right: tuple[float, float], tolerance: float
) -> float:
    """Maximum over [0, 1] of a concave function, to an absolute tolerance.

    A concave function lies below the extension of each of its chords. Where the extensions of the two neighbours of an
    interval meet is the most it can reach in there; that point is evaluated next, until no interval can hold more.

    Args:
        f: the function inside.
        left: its value at 0 and an upper bound of its slope there.
        right: its value at 1 and a lower bound of its slope there.
        tolerance: of the value.

    Raises:
        RuntimeError: the bound did not come within the tolerance.

    """
    # Two points beyond the ends stand for the slopes there.
    known = [(-1.0, left[0] - left[1]), (0.0, left[0]), (0.5, f(0.5)), (1.0, right[0]), (2.0, right[0] + right[1])]
    most = math.inf
    for _ in range(SHARES):
        best = max(v for _, v in known[1:-1])
        s, most = max((_reach(*known[k : k + 4]) for k in range(len(known) - 3)), key=lambda point: point[1])
        if most - best <= tolerance:
            return best
        bisect.insort(known, (s, f(s)))
    raise RuntimeError(
        f"bounded_lipschitz: the maximum over the share of the bound is known only to {most - best:.1e} after {SHARES} "
        "linear programs. Rescale lengths so that they are of order 1, or use convention='max'."
    )


def _reach(*known: tuple[float, float]) -> tuple[float, float]:
    """Where in the middle of three neighbouring intervals a concave function can be largest, and how large."""
    (_, _), (s0, v0), (s1, v1), (_, _) = known
    rise, fall = _slope(*known[:2]), _slope(*known[2:])
    if rise <= 0 or fall >= 0:
        return 0.5 * (s0 + s1), max(v0, v1)
    s = (v1 - v0 + rise * s0 - fall * s1) / (rise - fall)
    most = v0 + rise * (s - s0)
    # Rounding may put the meeting point on an end; the middle then still halves the interval.
    return (s if s0 < s < s1 else 0.5 * (s0 + s1)), most


def _slope(left: tuple[float, float], right: tuple[float, float]) -> float:
    return (right[1] - left[1]) / (right[0] - left[0])


def _between(
    one: Callable[[Atoms, Atoms], float], a: xr.Dataset | xr.DataArray, b: xr.Dataset | xr.DataArray
) -> xr.DataArray:
    """A distance of atoms over every dimension but particle and component, problems in threads."""
    position_a, position_b = particles.positions(a, "a"), particles.positions(b, "b")
    particles.check_matching(position_a, position_b, ("time", "replica", "component"))
    period = particles.period(position_a, position_b)
    first = [x.drop_vars("particle", errors="ignore") for x in (position_a, particles.weights(a)) if x is not None]
    second = [
        x.drop_vars("particle", errors="ignore").rename(particle="particle_b")
        for x in (position_b, particles.weights(b))
        if x is not None
    ]
    partial = [_is_partial(run, position) for run, position in ((a, position_a), (b, position_b))]
    cores = [["particle", "component"], ["particle"]][: len(first)]
    cores += [["particle_b", "component"], ["particle_b"]][: len(second)]

    def block(*arrays: Array) -> Array:
        x, y = arrays[: len(first)], arrays[len(first) :]
        lead = np.broadcast_shapes(*(z.shape[:-2] for z in (x[0], y[0])), *(z.shape[:-1] for z in (*x[1:], *y[1:])))

        def solve(index: tuple[int, ...]) -> float:
            left, right = (_selected(side, lead, index, period) for side in (x, y))
            for atoms, name, kept in ((left, "a", partial[0]), (right, "b", partial[1])):
                _check_atoms(atoms, f"{name} at index {index}")
                if kept:
                    _check_whole(atoms, name)
            return one(left, right)

        places = list(np.ndindex(*lead))
        found = threaded(lambda k: solve(places[k]), len(places), os.cpu_count() or 1)
        return np.array(found, dtype=np.float64).reshape(lead)

    result: xr.DataArray = apply(
        block,
        *first,
        *second,
        input_core_dims=cores,
        output_dtypes=[float],
    )
    return result


def _is_partial(run: xr.Dataset | xr.DataArray, position: xr.DataArray) -> bool:
    """True when weighted particles are only some of those that were simulated."""
    everyone = position.coords.get("n_particles")
    weighted = particles.weights(run) is not None
    return weighted and everyone is not None and everyone.ndim == 0 and position.sizes["particle"] < int(everyone)


def _check_whole(atoms: Atoms, name: str) -> None:
    total = float(atoms[1].sum())
    if total < 1 - LOST_MASS:
        raise ValueError(
            f"{name} holds only some of its weighted particles, of mass {total:.6g}; the rest would count as "
            "destroyed. Keep all (keep_particles=None), or let the kept ones stand for all: "
            'run.assign(weight=run["weight"] / run["weight"].sum("particle")).'
        )


def _selected(side: tuple[Array, ...], lead: tuple[int, ...], index: tuple[int, ...], period: Lengths) -> Atoms:
    """The atoms of one time and replica."""
    points = np.broadcast_to(side[0], lead + side[0].shape[-2:])[index].astype(np.float64)
    if len(side) == 1:
        return points, np.full(len(points), 1 / len(points)), period
    return points, np.broadcast_to(side[1], lead + side[1].shape[-1:])[index].astype(np.float64), period


def _atoms(measure: Any, name: str) -> Atoms:
    """Points (N, d), masses (N,) and torus of what the user passed."""
    period, masses = None, None
    if isinstance(measure, Law):
        raise TypeError(
            f"{name} is a {type(measure).__name__}, which has no atoms. Pass law.as_measure() (a quadrature) or a "
            "sample, law.sample(n)."
        )
    if isinstance(measure, EmpiricalMeasure):
        if measure.period is not None:
            period = tuple(period_lengths(measure.period, measure.dim))
        masses = None if measure.is_uniform else _array(measure.weights)
        measure = measure.points
    elif isinstance(measure, tuple):
        if len(measure) != 2:
            raise TypeError(f"{name} is a tuple of {len(measure)}; expected (points (N, d), masses (N,)).")
        measure, masses = measure[0], _array(measure[1])
    if isinstance(measure, xr.DataArray):
        period = particles.period(measure)
        if "weighted" in measure.attrs and masses is None:
            raise ValueError(f"{name} has lost its unequal masses; pass (points, masses), or the run to ..._between.")
        if set(measure.dims) == {"particle", "component"}:
            measure = measure.transpose("particle", "component").values
    points = _array(measure)
    points = points[:, None] if points.ndim == 1 else points
    if points.ndim != 2 or points.size == 0:
        raise ValueError(
            f"{name} has points of shape {points.shape}; expected (N, d) with N >= 1. For runs over time and replicas "
            "use hellinger_kantorovich_between; a measure without mass is written with masses 0."
        )
    atoms = points, np.full(len(points), 1 / len(points)) if masses is None else masses, period
    _check_atoms(atoms, name)
    return atoms


def _array(values: Any) -> Array:
    return np.asarray(values.detach().cpu() if isinstance(values, torch.Tensor) else values, dtype=np.float64)


def _present(atoms: Atoms) -> Atoms:
    """The atoms that have mass."""
    points, masses, period = atoms
    return points[masses > 0], masses[masses > 0], period


def _distances(a: Atoms, b: Atoms, metric: str) -> Array:
    """Ground distances (N, M), exactly 0 between atoms that coincide."""
    period = a[2] or b[2]
    if metric == "euclidean" and period is None:
        # Differences, not |x|² + |y|² - 2xy: that would move coinciding atoms 1e-8 apart.
        apart: Array = cdist(a[0], b[0])
        return apart
    return ground.distances(a[0], b[0], metric=metric, period=period)


def _check_space(a: Atoms, b: Atoms, metric: str) -> None:
    if a[0].shape[1] != b[0].shape[1]:
        raise ValueError(
            f"the measures live in dimensions {a[0].shape[1]} and {b[0].shape[1]}; compare laws on one space."
        )
    if a[2] is not None and b[2] is not None and a[2] != b[2]:
        raise ValueError(f"the measures live on different tori, with periods {a[2]} and {b[2]}.")
    # A plain sample beside a measure takes the measure's torus.
    ground.check_metric(metric, a[2] or b[2])


def _check_atoms(atoms: Atoms, name: str) -> None:
    points, masses, _ = atoms
    particles.check_finite(points, f"points of {name}")
    if masses.shape != points.shape[:1]:
        raise ValueError(
            f"{name} has masses of shape {masses.shape} for {len(points)} points; expected ({len(points)},)."
        )
    if not (np.isfinite(masses).all() and (masses >= 0).all()):
        raise ValueError(
            f"{name} has masses in [{masses.min():.6g}, {masses.max():.6g}]; expected finite ones ≥ 0. For a signed "
            "measure pass its positive part as one argument and its negative part as the other."
        )


def _check_positive(value: float, name: str) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} = {value} must be positive and finite; it is a length in the units of the state.")


def _check_convention(convention: str) -> None:
    if convention not in CONVENTIONS:
        raise ValueError(f'convention = {convention!r} is unknown; expected "max" or "sum".')


def _check_size(n: int, m: int) -> None:
    if n + m > LARGEST_PROBLEM:
        raise ValueError(
            f"entropy–transport between {n} and {m} atoms: at most {LARGEST_PROBLEM} together, the work grows with "
            "the cube. Subsample exchangeable particles (position.isel(particle=slice(k)), masses times N/k) and "
            "compare two sizes."
        )


def _check_program(cost: Array, p: Array, q: Array) -> None:
    if p.ndim != 1 or q.ndim != 1 or cost.shape != (len(p), len(q)):
        raise ValueError(
            f"cost has shape {cost.shape} for masses {p.shape} and {q.shape}; expected (N, M), (N,), (M,)."
        )
    _check_size(len(p), len(q))
    for name, masses in (("p", p), ("q", q)):
        if not (np.isfinite(masses).all() and (masses >= 0).all()):
            raise ValueError(f"masses {name} must be finite and ≥ 0; leave out atoms without mass.")
    if not (cost >= 0).all():
        raise ValueError("cost must be ≥ 0 and not NaN; write infinity where mass cannot be moved.")
