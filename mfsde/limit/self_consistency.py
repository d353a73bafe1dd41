"""Stationary laws as fixed points: a law makes a field, a field makes a law.

For a gradient flow the field is the potential δF/δm(m, ·)/T at the nodes, and its law e^{-potential - U}; otherwise
the field is the drift (and diffusion) at the faces of the cells, and its law the stationary one of the linear equation
with that drift. Interactions see a law through a few statistics, so the fields of all laws differ by few shapes: they
are found by probing, and the fixed point is then sought in their coefficients.
"""

from __future__ import annotations

import abc
from typing import Any

import numpy as np
import torch
from scipy import linalg

from ..measure import EmpiricalMeasure
from ..model import confinement, temperature
from .coefficients import Coefficients
from .finite_volume import FiniteVolumes
from .grid import TURNS, Array, Grid

PROBES = (12, 96)  # laws that fields are compared for; more where the fewer ones do not show all shapes
SPARE = 3  # probes beyond the number of shapes: they must lie in the span of the others
NEGLIGIBLE = 1e-11  # singular value of a shape, relative to the largest
DIFFERENCE = 1e-3  # largest change of a field in a difference


class Fields(abc.ABC):
    """What laws on a grid do to one another: mass ↦ field ↦ log density.

    Args:
        coefficients: of the scenario, checked on the grid.
        grid: the grid.

    """

    has_constant = False  # whether fields that differ by a constant are one

    def __init__(self, coefficients: Coefficients, grid: Grid) -> None:
        self.coefficients, self.grid = coefficients, grid

    @abc.abstractmethod
    def of(self, mu: EmpiricalMeasure, rows: Array | None = None) -> Array:
        """The field that a law makes, which need not live on the grid: all of it, (k,), or some rows of it."""

    @abc.abstractmethod
    def log_density(self, field: Array) -> Array:
        """The logarithm of the density that a field makes, up to a constant.    (*shape)."""

    def of_mass(self, mass: Array, rows: Array | None = None) -> Array:
        """The field of masses of the nodes."""
        return self.of(self.grid.measure(mass), rows)

    def mass(self, field: Array) -> Array:
        """The masses of the nodes that a field makes, summing to 1."""
        log_density = self.log_density(field)
        mass = np.exp(log_density - log_density.max()) * self.grid.widths
        normalised: Array = mass / mass.sum()
        return normalised

    def image(self, field: Array) -> Array:
        """The field of the law of a field: a fixed point is a stationary law."""
        return self.of_mass(self.mass(field))

    def gap(self, one: Array, other: Array) -> float:
        """Largest difference of two fields, relative to the field (or 1)."""
        difference = one - other
        if self.has_constant:
            difference = difference - difference.mean()
        return float(np.abs(difference).max() / max(1.0, np.abs(one).max()))


class Potential(Fields):
    """Gradient flows: the field is δF/δm(m, ·)/T at the nodes, T = σ²/2, up to a constant."""

    has_constant = True

    def __init__(self, coefficients: Coefficients, grid: Grid) -> None:
        super().__init__(coefficients, grid)
        scenario = coefficients.scenario
        self.energy, self.temperature = scenario.energy, temperature(scenario)
        self._points = torch.from_numpy(grid.points)
        self._confinement = confinement(scenario, self._points).numpy()

    def of(self, mu: EmpiricalMeasure, rows: Array | None = None) -> Array:
        """δF/δm(m, ·)/T at the nodes."""
        plain = EmpiricalMeasure(mu.points, mu.weights, period=mu.period)
        points = self._points if rows is None else self._points[torch.from_numpy(rows)]
        field: Array = self.energy.variation(plain, points).numpy() / self.temperature
        return field

    def log_density(self, field: Array) -> Array:
        """-field - U."""
        log_density: Array = (-field - self._confinement).reshape(self.grid.shape)
        return log_density


class Chain(Fields):
    """Other equations: the field is the drift and diffusion that the finite-volume generator is made of."""

    def __init__(self, coefficients: Coefficients, grid: Grid) -> None:
        super().__init__(coefficients, grid)
        self._volumes = FiniteVolumes(coefficients, grid)

    def of(self, mu: EmpiricalMeasure, rows: Array | None = None) -> Array:
        """The drift b at the faces, a at the nodes and faces, in one row."""
        drift, spread = self._volumes.fields(0.0, mu)
        field = np.concatenate([drift.ravel(), spread.ravel()])
        return field if rows is None else field[rows]

    def log_density(self, field: Array) -> Array:
        """The stationary law of the linear equation with these coefficients."""
        n, d = self._volumes.points.shape
        spread = field[n * d :]
        spread = spread.reshape(-1, d, d) if self.coefficients.is_general else spread.reshape(-1, d)
        return self._volumes.stationary(field[: n * d].reshape(n, d), spread).reshape(self.grid.shape)

    def imbalance(self, mass: Array) -> float:
        """‖A(m) m‖_{L¹}."""
        return float(np.abs(self._volumes.generator(0.0, mass.ravel()).apply(mass.ravel())).sum())


def fields_of(scenario: Any, grid: Grid, mu: EmpiricalMeasure) -> Fields:
    """The potentials of a gradient flow, the drifts of another equation; which of them is seen at the law mu."""
    coefficients = Coefficients(scenario, grid.points, (grid.widths / grid.widths.sum()).ravel())
    laws = [mu, *grid.few_atoms(3)]
    return (Potential if coefficients.is_gradient_flow(grid.points, laws) else Chain)(coefficients, grid)


class Shapes:
    """An affine space that holds the fields of all laws on a grid: field = origin + Σ_k a_k shape_k (+ a constant).

    Args:
        fields: the fields.
        origin: one of them, (k,).
        shapes: orthonormal rows (r, k).

    Coefficients are read off as many rows of a field as there are unknowns, chosen by pivoting: a field need not be
    known elsewhere (discrete empirical interpolation; Chaturantabut, Sorensen, 2010).

    """

    def __init__(self, fields: Fields, origin: Array, shapes: Array) -> None:
        self.fields, self.origin, self.shapes = fields, origin, shapes
        basis = np.vstack([shapes, np.ones((1, len(origin)))]) if fields.has_constant else shapes
        self._rows = linalg.qr(basis, mode="r", pivoting=True)[1][: len(basis)]
        self._inverse = np.linalg.inv(basis[:, self._rows].T)[: len(shapes)]

    @property
    def rank(self) -> int:
        """Number of shapes: of statistics through which the law acts."""
        return len(self.shapes)

    def field(self, a: Array) -> Array:
        """The field of coefficients, (r,) -> (k,)."""
        field: Array = self.origin + a @ self.shapes
        return field

    def coefficients(self, field: Array) -> Array:
        """Coefficients of a field, (k,) -> (r,)."""
        found: Array = self._inverse @ (field - self.origin)[self._rows]
        return found

    def of_law(self, mass: Array) -> Array:
        """Coefficients of the field of a law."""
        found: Array = self._inverse @ (self.fields.of_mass(mass, self._rows) - self.origin[self._rows])
        return found

    def image(self, a: Array) -> Array:
        """Coefficients of the field of the law of a field with coefficients a."""
        return self.of_law(self.fields.mass(self.field(a)))

    def jacobian(self, a: Array) -> Array:
        """∂image/∂a, (r, r), by fourth-order differences in which no field changes by more than 1e-3."""
        columns = []
        for k, shape in enumerate(self.shapes):
            step = DIFFERENCE / np.abs(shape).max() * np.eye(self.rank)[k]
            near = [self.image(a + s * step) for s in (-2, -1, 1, 2)]
            columns.append((near[0] - 8 * near[1] + 8 * near[2] - near[3]) / (12 * step[k]))
        return np.array(columns).T.reshape(self.rank, self.rank)


def shapes_of(fields: Fields, origin: Array) -> Shapes | None:
    """The shapes of the fields of laws on a grid, found by probing; None where there are too many to count."""
    for count in PROBES:
        rows = np.array([fields.of(mu) for mu in fields.grid.few_atoms(count)]) - origin
        if fields.has_constant:
            rows -= rows.mean(1, keepdims=True)
        size = float(np.abs(rows).max())
        if size <= 1e-13 * max(1.0, float(np.abs(origin).max())):
            return Shapes(fields, origin, np.zeros((0, len(origin))))
        _, weights, shapes = np.linalg.svd(rows / size, full_matrices=False)
        rank = int((weights > NEGLIGIBLE * weights[0]).sum())
        if rank <= count - SPARE:
            return Shapes(fields, origin, shapes[:rank])
    return None


def probes(grid: Grid, count: int) -> list[Array]:
    """Bumps of several widths at places spread over the grid, as masses."""
    ends = np.array([(axis.nodes[0], axis.nodes[-1]) for axis in grid.axes])
    length = np.diff(ends, axis=1)[:, 0]
    found = []
    for k in range(count):
        place = ends[:, 0] + length * np.mod(0.5 + k * TURNS[: grid.dim], 1.0)
        width = length * (0.03, 0.1, 0.3)[k % 3]
        distance = grid.points - place
        for q, axis in enumerate(grid.axes):
            if axis.is_circle:
                distance[:, q] -= axis.length * np.rint(distance[:, q] / axis.length)
        mass = np.exp(-0.5 * np.square(distance / width).sum(-1)).reshape(grid.shape) * grid.widths
        found.append(mass / mass.sum())
    return found
