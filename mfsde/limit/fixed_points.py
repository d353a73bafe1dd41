"""The stationary laws of a scenario on one grid: fixed points of law ↦ law of its field, and what belongs to them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy import optimize
from scipy.sparse.linalg import ArpackError, LinearOperator, eigs

from ..measure import EmpiricalMeasure
from ..model import scenario_name
from . import richardson
from .domain import domain_of
from .free_energy import first_order_residual, of_law, value_of
from .grid import Array, Axis, Grid
from .grid_law import GridLaw
from .self_consistency import Chain, Fields, Potential, Shapes, fields_of, probes, shapes_of

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


class Problem:
    """The fixed points of a scenario on one grid."""

    def __init__(self, scenario: Any, origin: EmpiricalMeasure, grid: Grid, tolerance: float) -> None:
        self.name, self.tolerance, self.grid = scenario_name(scenario), tolerance, grid
        self.scenario = scenario
        domain = domain_of(scenario, origin)
        self.is_bounded = bool(np.isfinite([*domain.low, *domain.high]).any())
        self.fields: Fields = fields_of(scenario, grid, origin)
        self.has_current = has_current(self.fields)
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


def _excess(shapes: Shapes, a: float) -> float:
    """What a single statistic's image exceeds it by; NaN at values of no law, where σσᵀ may turn negative."""
    try:
        return float(shapes.image(np.array([a]))[0] - a)
    except ValueError:
        return math.nan


def _crossings(shapes: Shapes, masses: list[Array]) -> list[float]:
    """Where a single statistic equals its image, by its sign changes over the range that laws can give it."""
    values = np.array([shapes.of_law(mass)[0] for mass in masses] + [0.0])
    margin = 0.1 * np.ptp(values)
    scan = np.linspace(values.min() - margin, values.max() + margin, SCAN)
    gaps = np.array([_excess(shapes, float(a)) for a in scan])
    found = [float(a) for a, gap in zip(scan, gaps, strict=True) if gap == 0]
    for k in np.flatnonzero(gaps[:-1] * gaps[1:] < 0):
        root = optimize.brentq(
            lambda a: shapes.image(np.array([a]))[0] - a, scan[k], scan[k + 1], xtol=1e-14, rtol=1e-14
        )
        found.append(float(root))
    return found


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


def has_current(fields: Fields) -> bool:
    """Whether the stationary law may carry a current: on circles and planes, without an energy."""
    circles = any(axis.is_circle for axis in fields.grid.axes)
    return isinstance(fields, Chain) and (fields.grid.dim == 2 or circles)
