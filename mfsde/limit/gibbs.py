"""Stationary laws of the mean-field limit: the self-consistent m* ∝ exp(-(2/σ²) δF/δm(m*, ·) - U), and what takes its
place where the equation is no gradient flow: the m* with A(m*) m* = 0, A the Fokker-Planck operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..measure import EmpiricalMeasure, Law
from ..model import scenario_name
from .coefficients import Coefficients, check_dimension, initial_law
from .domain import Domain, domain_of, first_box, widened
from .fixed_points import Problem, StationaryLaw, has_current
from .grid import FEWEST, Array, Grid
from .self_consistency import fields_of

NODES = {1: 513, 2: 65}
MOST_NODES = {1: 8193, 2: 129}
RESOLVED, COARSE = 1e-9, 1e-3  # errors of a law: more nodes are taken above the first, none is returned above the other
COARSE_CURRENT = 1e-2  # the same for Richardson's estimate where there is a current
DEPTH = 36.0  # nats below its maximum at which a density may end: e^{-36} is float64 rounding
CURRENT_DEPTH = 20.0  # the same where there is a current: tails are those of the scheme, not of the law, before that
DOUBLINGS = 12
LEAKING = 1e-4  # mass at open ends that is an error
ATOMS = 6  # laws of three atoms each, whose fields' laws a search for all stationary laws has to hold
LOOKED_AT = 9  # nodes on an axis at which noise is looked for
ROUNDS = 8  # of choosing a box for a law and finding the law of the box


def gibbs(
    scenario: Any, grid: Any = None, *, start: Any = None, n_nodes: int | None = None, tolerance: float = 1e-10
) -> StationaryLaw:
    """A stationary law of the mean-field limit, in one or two dimensions.

    For a gradient flow (b = -(D_mF + T ∇U), constant σ, T = σ²/2) the fixed point of m ∝ exp(-δF/δm(m, ·)/T - U);
    otherwise the stationary solution of the Fokker-Planck equation. Newton's method in the statistics through which
    the law acts, found by probing, or on the field itself; on a line by the trapezoidal rule, spectrally accurate.

    Args:
        scenario: as for `simulate`; its coefficients are taken at t = 0.
        grid: nodes (G,), or a pair of them; None has them chosen around the law.
        start: a law or measure near which the fixed point is sought; None: the scenario's initial law. Where several
            stationary laws exist, `gibbs_all` finds them.
        n_nodes: nodes on each axis where the grid is chosen (from 513, or 65 in two dimensions, as many as resolve it).
        tolerance: largest change of the field by its own law, relative to the field.

    Returns:
        A `GridLaw` with `residual`, `free_energy`, `log_z`, `feedback`.

    Raises:
        ValueError: no stationary law (what confines is too weak), mass at the ends of the grid, a grid too coarse for
            the law, d > 2, common noise, a component without noise.
        RuntimeError: the fixed point was not reached; the message says how far it got.

    Source: Szpruch, Mean-field Langevin dynamics, Proposition 4; Hu, Ren, Siska, Szpruch (2021), Proposition 2.5.

    """
    origin = starting(scenario, start)
    _check_numbers(n_nodes, tolerance)
    return _refitted(scenario, [origin], grid, n_nodes, lambda problem: [problem.solve(problem.first)], tolerance)[0]


def gibbs_all(
    scenario: Any,
    grid: Any = None,
    *,
    starts: Sequence[Any] = (),
    n_nodes: int | None = None,
    tolerance: float = 1e-10,
) -> list[StationaryLaw]:
    """All stationary laws that were found, by increasing free energy (or mean, without one).

    Where the law acts through one statistic, that statistic is compared with its image over its whole range, and every
    crossing is refined; otherwise Newton's method starts from the initial law, from bumps all over the grid and from
    `starts`, which may take minutes in two dimensions. Laws that are turned copies of one another on a circle count
    once.

    Arguments, return and errors as for `gibbs`.
    """
    origin = starting(scenario, None)
    given = [starting(scenario, start) for start in starts]
    _check_numbers(n_nodes, tolerance)

    def solve(problem: Problem) -> list[Array]:
        return problem.solve_all(given)

    return _refitted(scenario, [origin, *given], grid, n_nodes, solve, tolerance, everywhere=True)


def starting(scenario: Any, start: Any) -> EmpiricalMeasure:
    """A starting law as a measure.    ValueError for what has no stationary law on a grid."""
    if hasattr(scenario, "overdamped"):
        raise ValueError(
            f"{scenario_name(scenario)} is kinetic: its stationary laws are products of those of positions, "
            "mfsde.limit.gibbs(scenario.overdamped()), with velocities N(0, T I): scenario.with_velocities(law) joins "
            "them."
        )
    law, own = initial_law(scenario, start), initial_law(scenario)
    check_dimension(scenario, law.dim)
    if law.dim != own.dim:
        raise ValueError(f"start lives in dimension {law.dim}, {scenario_name(scenario)} in dimension {own.dim}.")
    if hasattr(scenario, "common_diffusion"):
        raise ValueError(
            f"{scenario_name(scenario)} has common noise: its law given W⁰ is random and has no fixed point. Follow it "
            "in time with mfsde.limit.fokker_planck."
        )
    mu = law.as_measure() if isinstance(law, Law) else law
    origin = EmpiricalMeasure.given(mu.points.double(), mu.weights.double(), getattr(scenario, "period", None))
    _check_noise(scenario, origin)
    return origin


def _check_noise(scenario: Any, origin: EmpiricalMeasure) -> None:
    """Refuses components without noise, at any of some laws around the start."""
    domain = domain_of(scenario, origin)
    low, high = first_box(EmpiricalMeasure(origin.points, origin.weights), domain)
    grid = Grid.box(list(low), list(high), LOOKED_AT, domain.period)
    coefficients = Coefficients(scenario, grid.points, (grid.widths / grid.widths.sum()).ravel())
    still = coefficients.noiseless((0.0,), grid.points, [origin, *grid.few_atoms(2)])
    if not still:
        return
    d = origin.points.shape[-1]
    where = "" if len(still) == d else f" on component {' and '.join(map(str, still))} of the state"
    raise ValueError(
        f"{coefficients.name} has no noise{where}: stationary laws need not have a density there, nor be isolated. "
        "Follow the law in time with mfsde.limit.evolve, or simulate."
    )


def _refitted(
    scenario: Any,
    held: list[EmpiricalMeasure],
    grid: Any,
    n_nodes: int | None,
    solve: Callable[[Problem], list[Array]],
    tolerance: float,
    everywhere: bool = False,
) -> list[StationaryLaw]:
    """Solutions on the user's grid, or on one that is chosen anew until it fits and resolves the laws it holds.

    `held` are laws whose fields' laws the grid has to hold, the first of them the start; with `everywhere` also
    those of atoms all over it.
    """
    origin, name = held[0], scenario_name(scenario)
    domain = domain_of(scenario, origin)
    given = Grid.given(grid, n_nodes, origin.dim, domain.period)
    if given is not None:
        domain.check(given, name)
        laws = _laws(scenario, origin, given, solve, tolerance)
        _check_ends(laws, domain, name)
        _check_resolved(laws, name)
        return laws
    n = NODES[origin.dim] if n_nodes is None else n_nodes
    low, high = first_box(EmpiricalMeasure(origin.points, origin.weights), domain)
    first = held
    for _ in range(ROUNDS):
        if everywhere:
            atoms = Grid.box(list(low), list(high), n, domain.period).few_atoms(ATOMS)
            held = [*held, *atoms]
        low, high = _box(scenario, held, low, high, domain, n)
        laws = _laws(scenario, origin, Grid.box(list(low), list(high), n, domain.period), solve, tolerance)
        wanted = n if n_nodes is not None else _enough(laws, n)
        if wanted == n and (everywhere or all(_fits(law, domain) for law in laws)):
            break
        n = wanted
        held = [*first, *(law.as_measure() for law in laws)]
    _check_ends(laws, domain, name)
    _check_resolved(laws, name)
    return laws


def _enough(laws: list[StationaryLaw], n: int) -> int:
    """As many nodes on each axis as resolve the laws, as far as that is affordable."""
    coarse = any(law.error > (RESOLVED if law.is_spectral else _bound(law)) for law in laws)
    return min(2 * n - 1, MOST_NODES[laws[0].dim]) if coarse else n


def _bound(law: StationaryLaw) -> float:
    """The error above which a law is not returned; with a current that of the finer grid, before the combination."""
    return COARSE_CURRENT if law.has_current else COARSE


def _check_resolved(laws: list[StationaryLaw], name: str) -> None:
    for law in laws:
        if not law.error <= _bound(law):
            raise ValueError(
                f"{name}: {' × '.join(map(str, law.grid.shape))} nodes are too few for a stationary law: its "
                f"moments are known to {law.error:.2g} of its deviation (at most {_bound(law):g}). Pass more nodes, or "
                "a grid that is finer where the law is (heavy tails make a chosen grid wide)."
            )


def _check_numbers(n_nodes: Any, tolerance: Any) -> None:
    if n_nodes is not None and (not isinstance(n_nodes, int) or isinstance(n_nodes, bool) or n_nodes < FEWEST):
        raise ValueError(f"n_nodes = {n_nodes!r}; expected a whole number >= {FEWEST}.")
    if not (isinstance(tolerance, (int, float)) and tolerance > 0):
        raise ValueError(f"tolerance = {tolerance!r}; expected a positive number.")


def _laws(scenario: Any, origin: EmpiricalMeasure, grid: Grid, solve: Any, tolerance: float) -> list[StationaryLaw]:
    problem = Problem(scenario, origin, grid, tolerance)
    laws = [problem.law(field) for field in solve(problem)]
    return sorted(laws, key=lambda law: float(law.mean[0]) if law.free_energy is None else law.free_energy)


def _box(
    scenario: Any, held: list[EmpiricalMeasure], low: Array, high: Array, domain: Domain, n: int
) -> tuple[Array, Array]:
    """A box outside of which the laws of the fields of some laws are below e^{-36} of their maximum."""
    for _ in range(DOUBLINGS):
        grid = Grid.box(list(low), list(high), n, domain.period)
        fields = fields_of(scenario, grid, held[0])
        heights = [fields.log_density(fields.of(mu)) for mu in held]
        if not all(np.isfinite(height).all() for height in heights):
            break
        depth = CURRENT_DEPTH if has_current(fields) else DEPTH
        out = {side for height in heights for side in domain.high_ends(height, grid, depth)}
        if not out:
            return _shrunk(heights, grid, domain, depth)
        low, high = widened(low, high, sorted(out), domain)
    raise ValueError(
        f"{scenario_name(scenario)} has no stationary law that a grid holds: on [{low[0]:.3g}, {high[0]:.3g}] the "
        "density exp(-(2/σ²) δF/δm - U) (or that of the drift) still does not decay. The confinement U, or the pull of "
        "the drift, is too weak; strengthen it, or put the equation on an interval or torus."
    )


def _shrunk(heights: list[Array], grid: Grid, domain: Domain, depth: float) -> tuple[Array, Array]:
    """The smallest box that holds everything above a depth below the maximum, and the walls."""
    low, high = np.empty(grid.dim), np.empty(grid.dim)
    for k, axis in enumerate(grid.axes):
        others = tuple(q for q in range(grid.dim) if q != k)
        carries = np.flatnonzero(np.any([(h > h.max() - depth).any(axis=others) for h in heights], axis=0))
        first, last = max(0, carries[0] - 1), min(len(axis.nodes) - 1, carries[-1] + 1)
        low[k] = axis.nodes[0] if axis.is_circle or not domain.is_open(axis, k, 0) else axis.nodes[first]
        high[k] = axis.nodes[-1] if axis.is_circle or not domain.is_open(axis, k, 1) else axis.nodes[last]
    return low, high


def _fits(law: StationaryLaw, domain: Domain) -> bool:
    """Whether the grid holds a law to rounding, and is not much too wide for it."""
    depth = CURRENT_DEPTH if law.has_current else DEPTH
    if domain.high_ends(law.log_density, law.grid, depth):
        return False
    for k, axis in enumerate(law.grid.axes):
        if axis.is_circle or not (domain.is_open(axis, k, 0) and domain.is_open(axis, k, 1)):
            continue
        others = tuple(q for q in range(law.dim) if q != k)
        carries = np.flatnonzero((law.log_density > law.log_density.max() - depth).any(axis=others))
        if carries[-1] - carries[0] < len(axis.nodes) / 3:
            return False
    return True


def _check_ends(laws: list[StationaryLaw], domain: Domain, name: str) -> None:
    for law in laws:
        tail = float(domain.tails((law.density * law.grid.widths)[None], law.grid)[0])
        if tail > LEAKING:
            ends = " × ".join(f"[{axis.nodes[0]:g}, {axis.nodes[-1]:g}]" for axis in law.grid.axes)
            raise ValueError(
                f"{name}: about {tail:.2g} of a stationary law's mass is at the ends of {ends}: either the grid ends "
                "too early, or what confines is too weak. Pass grid=None to find out."
            )
