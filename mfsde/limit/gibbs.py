"""Stationary laws of the mean-field limit: the self-consistent m* ∝ exp(-(2/σ²) δF/δm(m*, ·) - U), and what takes its
place where the equation is no gradient flow: the m* with A(m*) m* = 0, A the Fokker-Planck operator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy import optimize
from scipy.sparse.linalg import ArpackError, LinearOperator, eigs

from ..measure import EmpiricalMeasure, Law
from ..model import scenario_name
from . import richardson
from .coefficients import check_dimension, initial_law
from .domain import Domain, domain_of, first_box, widened
from .free_energy import first_order_residual, of_law, value_of
from .grid import FEWEST, Array, Axis, Grid
from .grid_law import GridLaw
from .self_consistency import Chain, Fields, Potential, Shapes, fields_of, probes, shapes_of

NODES = {1: 513, 2: 65}
MOST_NODES = {1: 8193, 2: 129}
RESOLVED, COARSE = 1e-9, 1e-3  # errors of a law: more nodes are taken above the first, none is returned above the other
COARSE_CURRENT = 1e-2  # the same for Richardson's estimate where there is a current
DEPTH = 36.0  # nats below its maximum at which a density may end: e^{-36} is float64 rounding
CURRENT_DEPTH = 20.0  # the same where there is a current: tails are those of the scheme, not of the law, before that
DOUBLINGS = 12
ATOMS = 6  # laws of three atoms each, whose fields' laws a search for all stationary laws has to hold
ROUNDS = 8  # of choosing a box for a law and finding the law of the box
SAME = 1e-6  # difference of the densities of one stationary law found twice, relative to their maximum
SCAN = 401  # points at which a single statistic is compared with its image
BUMPS = 24  # starts for several statistics
DAMPED = 300  # iterations that a stuck Newton method is helped out by


class StationaryLaw(GridLaw):
    """A stationary law m* on a grid, with what was found on the way.

    Attributes:
        residual: for gradient flows the standard deviation under m* of δF/δm + T log m* + T U (Proposition 4), else
            ‖A(m*) m*‖_{L¹}; zero for an exact solution.
        free_energy: V(m*) = F + T KL(m* | e^{-U}); None where the equation is no gradient flow.
        log_z: log ∫ exp(-δF/δm(m*, ·)/T - U) dx, with ∫ δF/δm dm* = 0; None likewise.
        has_current: whether a current may flow in it.
        is_spectral: whether its quadrature is better than any power of the spacing; at walls, and where there is a
            current (on circles and planes without an energy), it is of second order, there combined to the fourth.
        feedback: largest real part of an eigenvalue of the derivative at m* of law ↦ law of its field. Below 1 the
            fixed-point iteration's linear modes die out; at 1 a branch of stationary laws begins, ends or turns.
        error: estimated error of its mean and deviation, relative to the latter: the change when the law is summed over
            every second node only (a third of it at walls), or Richardson's where there is a current.
        n_statistics: number of statistics through which the law acts on the particles; None where there are many.

    """

    is_spectral: bool
    has_current: bool
    residual: float
    free_energy: float | None
    log_z: float | None
    feedback: float
    error: float
    n_statistics: int | None


def gibbs(
    scenario: Any, grid: Any = None, *, start: Any = None, n_nodes: int | None = None, tolerance: float = 1e-11
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
        the
            law, d > 2, common noise.
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
    tolerance: float = 1e-11,
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


class Problem:
    """The fixed points of a scenario on one grid."""

    def __init__(self, scenario: Any, origin: EmpiricalMeasure, grid: Grid, tolerance: float) -> None:
        self.name, self.tolerance, self.grid = scenario_name(scenario), tolerance, grid
        self.scenario = scenario
        domain = domain_of(scenario, origin)
        self.is_bounded = bool(np.isfinite([*domain.low, *domain.high]).any())
        self.fields: Fields = fields_of(scenario, grid, origin)
        self.has_current = _has_current(self.fields)
        self.first = self.fields.of(origin)
        self.shapes: Shapes | None = shapes_of(self.fields, self.first)

    def solve(self, field: Array) -> Array:
        """The fixed point that Newton's method reaches from a field.    RuntimeError where it reaches none."""
        found = self._root(field)
        gap = self.fields.gap(self.fields.image(found), found)
        if not gap <= self.tolerance:
            # Newton's method got stuck; damped iterations leave for a law that attracts them.
            found = self._root(self._damped(field))
            gap = self.fields.gap(self.fields.image(found), found)
        if not gap <= self.tolerance:
            raise RuntimeError(
                f"{self.name}: the fixed-point iteration for a stationary law stopped at a residual of {gap:.3g} "
                f"(asked for {self.tolerance:g}): the map from a law to the law of its field does not contract here. "
                "Give start= nearer to the law, more nodes, or follow it from other parameters with mfsde.limit.branch."
            )
        return found

    def _damped(self, field: Array) -> Array:
        """Iterations of field ↦ field of its law, mixed with the field before."""
        if self.shapes is None:
            return _iterated(self.fields.image, field)
        return self.shapes.field(_iterated(self.shapes.image, self.shapes.coefficients(field)))

    def _root(self, field: Array) -> Array:
        if self.shapes is None:
            return _krylov(self.fields, field)
        if self.shapes.rank == 0:
            return self.shapes.origin
        return self.shapes.field(_newton(self.shapes, self.shapes.coefficients(field)))

    def solve_all(self, starts: list[EmpiricalMeasure]) -> list[Array]:
        """All fixed points that are found, each once."""
        found: list[Array] = []
        for field in self._candidates(starts):
            try:
                solved = self.solve(field)
            except (RuntimeError, ValueError, FloatingPointError):
                continue
            if not any(self._is_same(solved, other) for other in found):
                found.append(solved)
        return found or [self.solve(self.first)]

    def _candidates(self, starts: list[EmpiricalMeasure]) -> list[Array]:
        given = [self.first, *map(self.fields.of, starts)]
        if self.shapes is not None and self.shapes.rank == 0:
            return given
        masses = probes(self.grid, BUMPS)
        if self.shapes is not None and self.shapes.rank == 1:
            return given + [self.shapes.field(np.array([a])) for a in _crossings(self.shapes, masses)]
        even = self.grid.widths / self.grid.widths.sum()
        return [self.fields.of_mass(mass) for mass in (even, *masses)] + given

    def _is_same(self, one: Array, other: Array) -> bool:
        a, b = (self.fields.mass(field) / self.grid.widths for field in (one, other))
        if all(axis.is_circle for axis in self.grid.axes) and self.is_invariant:
            a, b = np.abs(np.fft.fftn(a)), np.abs(np.fft.fftn(b))
        return bool(np.abs(a - b).max() <= SAME * max(a.max(), b.max()))

    @property
    def is_invariant(self) -> bool:
        """Whether a turned law makes the turned law, on a circle or torus of even nodes."""
        mass = probes(self.grid, 2)[1]
        turned = np.roll(mass, 5, 0)
        one, other = (self.fields.mass(self.fields.of_mass(m)) for m in (mass, turned))
        return bool(np.abs(np.roll(one, 5, 0) - other).max() <= 1e-9 * other.max())

    def feedback(self, field: Array) -> float:
        """Largest real part of an eigenvalue of field ↦ field of its law."""
        if self.shapes is not None:
            if self.shapes.rank == 0:
                return 0.0
            return float(np.linalg.eigvals(self.shapes.jacobian(self.shapes.coefficients(field))).real.max())
        size = 1e-4 * max(1.0, float(np.abs(field).max()))

        def turned(v: Array) -> Array:
            step = size * v.ravel() / max(1e-300, float(np.abs(v).max()))
            change = self.fields.image(field + step) - self.fields.image(field - step)
            found: Array = change * float(np.abs(v).max()) / (2 * size)
            return found

        operator = LinearOperator((len(field), len(field)), matvec=turned, dtype=np.float64)
        # Constants are no fields: the iteration starts from a field without mean.
        first = np.sin(np.arange(len(field)))
        try:
            return float(
                eigs(operator, 1, which="LR", return_eigenvectors=False, tol=1e-8, v0=first - first.mean()).real[0]
            )
        except ArpackError:
            return math.nan

    def law(self, field: Array) -> StationaryLaw:
        """The stationary law of a fixed point, with what belongs to it."""
        law = StationaryLaw.from_log(self.grid, self.fields.log_density(field))
        assert isinstance(law, StationaryLaw)
        law.feedback = self.feedback(field)
        law.n_statistics = None if self.shapes is None else self.shapes.rank
        law.has_current = self.has_current
        law.is_spectral = not (self.is_bounded or self.has_current)
        law.error = _unresolved(law) / (3 if self.is_bounded else 1)
        scenario = self.fields.coefficients.scenario
        if isinstance(self.fields, Potential):
            law.residual = first_order_residual(scenario, law)
            law.free_energy = float(value_of(scenario, of_law(law)))
            law.log_z = self._log_z(law)
        else:
            assert isinstance(self.fields, Chain)
            law.residual = self.fields.imbalance(law.density * self.grid.widths)
            law.free_energy = law.log_z = None
        return self._sharpened(law) if self.has_current else law

    def _sharpened(self, rough: StationaryLaw) -> StationaryLaw:
        """The law combined with the one on the refined grid, and the error that their difference tells."""
        grid = self.grid
        fine = Problem(self.scenario, rough.as_measure(), grid.refined(), self.tolerance)
        sharp = GridLaw.from_log(fine.grid, fine.fields.log_density(fine.solve(fine.first)))
        both = richardson.combined(rough.density, grid.restricted(sharp.density), grid.dim)
        law = StationaryLaw.from_log(grid, np.log(both))
        for name in ("is_spectral", "has_current", "residual", "free_energy", "log_z", "feedback", "n_statistics"):
            setattr(law, name, getattr(rough, name))
        wide = sharp.cov.diagonal().sqrt()
        change = torch.cat([sharp.mean - rough.mean, wide - rough.cov.diagonal().sqrt()]) / torch.cat([wide, wide])
        law.error = float(change.abs().max()) / 3
        return law

    def _log_z(self, law: GridLaw) -> float:
        """The logarithm of ∫ exp(-δF/δm/T - U), δF/δm of mean zero under the law."""
        assert isinstance(self.fields, Potential)
        mass = law.density * self.grid.widths
        slope = self.fields.of_mass(mass)
        log_density = self.fields.log_density(slope - float(mass.ravel() @ slope))
        top = log_density.max()
        return float(top + math.log(float(self.grid.integral(np.exp(log_density - top)))))


def _iterated(image: Callable[[Array], Array], a: Array) -> Array:
    """The damped iteration a ↦ (a + image(a))/2, until it moves by little."""
    for _ in range(DAMPED):
        step = 0.5 * (image(a) - a)
        a = a + step
        if np.abs(step).max() < 1e-6 * max(1.0, float(np.abs(a).max())):
            break
    return a


def _newton(shapes: Shapes, a: Array) -> Array:
    """Powell's hybrid method on image(a) - a, and steps of Newton's own to rounding."""
    found = optimize.root(
        lambda b: shapes.image(b) - b, a, jac=lambda b: shapes.jacobian(b) - np.eye(len(b)), tol=1e-13
    )
    best: Array = found.x
    for _ in range(3):
        gap = shapes.image(best) - best
        step, *_ = np.linalg.lstsq(shapes.jacobian(best) - np.eye(len(best)), -gap, rcond=1e-12)
        tried = best + step
        if not np.abs(shapes.image(tried) - tried).max() < np.abs(gap).max():
            break
        best = tried
    return best


def _krylov(fields: Fields, field: Array) -> Array:
    """Newton-Krylov on the field itself."""
    scale = max(1.0, float(np.abs(field).max()))
    found = optimize.root(
        lambda f: fields.image(f) - f, field, method="krylov", options={"fatol": 1e-13 * scale, "maxiter": 200}
    )
    best: Array = found.x
    return best


def _crossings(shapes: Shapes, masses: list[Array]) -> list[float]:
    """Where a single statistic equals its image, by its sign changes over the range that laws can give it."""
    values = np.array([shapes.of_law(mass)[0] for mass in masses] + [0.0])
    margin = 0.1 * np.ptp(values)
    scan = np.linspace(values.min() - margin, values.max() + margin, SCAN)
    gaps = np.array([shapes.image(np.array([a]))[0] - a for a in scan])
    found = [float(a) for a, gap in zip(scan, gaps, strict=True) if gap == 0]
    for k in np.flatnonzero(gaps[:-1] * gaps[1:] < 0):
        root = optimize.brentq(
            lambda a: shapes.image(np.array([a]))[0] - a, scan[k], scan[k + 1], xtol=1e-14, rtol=1e-14
        )
        found.append(float(root))
    return found


# The grid


def starting(scenario: Any, start: Any) -> EmpiricalMeasure:
    """A starting law as a measure.    ValueError for what has no stationary law on a grid."""
    law = initial_law(scenario) if start is None else start
    if not isinstance(law, (Law, EmpiricalMeasure)):
        raise TypeError(f"start = {law!r:.60}; expected a law (mfsde.Gaussian([0.0], [[1.0]])) or an EmpiricalMeasure.")
    check_dimension(scenario, law.dim)
    if start is not None and law.dim != initial_law(scenario).dim:
        raise ValueError(
            f"start lives in dimension {law.dim}, {scenario_name(scenario)} in dimension {initial_law(scenario).dim}."
        )
    if hasattr(scenario, "common_diffusion"):
        raise ValueError(
            f"{scenario_name(scenario)} has common noise: its law given W⁰ is random and has no fixed point. Follow it "
            "in time with mfsde.limit.fokker_planck."
        )
    mu = law.as_measure() if isinstance(law, Law) else law
    return EmpiricalMeasure.given(mu.points.double(), mu.weights.double(), getattr(scenario, "period", None))


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
    if grid is not None:
        if n_nodes is not None:
            raise TypeError("grid and n_nodes are two ways to say where the nodes are; leave one out.")
        given = grid if isinstance(grid, Grid) else Grid.of(grid, origin.dim, domain.period)
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


def _unresolved(law: GridLaw) -> float:
    """Largest change of mass, mean and deviation when a law is summed over every second node."""
    halves = tuple(slice(0, None, 2) for _ in law.grid.axes)
    thin = Grid(tuple(Axis(a.nodes[::2], a.length) if a.is_circle else Axis(a.nodes[::2]) for a in law.grid.axes))
    pairs = []
    for grid, density in ((law.grid, law.density), (thin, law.density[halves])):
        points, mass = grid.unrolled(density * grid.widths)
        total = float(mass.sum())
        mean = mass @ points / total
        pairs.append((total, mean, np.sqrt(mass @ np.square(points - mean) / total)))
    (one, mean, wide), (other, mean_2, wide_2) = pairs
    return float(max(abs(other - one), (np.abs(mean - mean_2) / wide).max(), np.abs(wide_2 / wide - 1).max()))


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
        depth = CURRENT_DEPTH if _has_current(fields) else DEPTH
        out = {side for height in heights for side in _high_ends(height, grid, domain, depth)}
        if not out:
            return _shrunk(heights, grid, domain, depth)
        low, high = widened(low, high, sorted(out), domain)
    raise ValueError(
        f"{scenario_name(scenario)} has no stationary law that a grid holds: on [{low[0]:.3g}, {high[0]:.3g}] the "
        "density exp(-(2/σ²) δF/δm - U) (or that of the drift) still does not decay. The confinement U, or the pull of "
        "the drift, is too weak; strengthen it, or put the equation on an interval or torus."
    )


def _has_current(fields: Fields) -> bool:
    """Whether the stationary law may carry a current: on circles and planes, without an energy."""
    circles = any(axis.is_circle for axis in fields.grid.axes)
    return isinstance(fields, Chain) and (fields.grid.dim == 2 or circles)


def _high_ends(height: Array, grid: Grid, domain: Domain, depth: float) -> list[tuple[int, int]]:
    """Open ends of the grid where a log density is not yet low."""
    found = []
    for k, axis in enumerate(grid.axes):
        for side in (0, 1):
            if domain.is_open(axis, k, side) and height.take(-side, k).max() > height.max() - depth:
                found.append((k, side))
    return found


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
    if _high_ends(law.log_density, law.grid, domain, depth):
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
        for k, axis in enumerate(law.grid.axes):
            others = tuple(q for q in range(law.dim) if q != k)
            marginal = (law.density * law.grid.widths).sum(axis=others) / axis.widths
            for side in (0, 1):
                tail = marginal[-side] * 0.05 * (axis.nodes[-1] - axis.nodes[0])
                if domain.is_open(axis, k, side) and tail > 1e-4:
                    raise ValueError(
                        f"{name}: about {tail:.2g} of a stationary law's mass is at the end {axis.nodes[-side]:g} of "
                        "the grid: either it ends too early, or what confines is too weak. Pass grid=None to find out."
                    )
