"""Implicit steps in the Kullback-Leibler geometry: mass grows and shrinks where it stands, nothing moves.

    p₊ = argmin F(p) + T KL(p | q) + KL(p | p₀)/(ατ)

over the masses of fixed points: nodes of a grid, of a quantile map, or particles. Small steps follow the Fisher-Rao
(birth-death) flow ∂_t m = -α (V' - ∫ V' dm) m, V' = δF/δm + T log(m/q).

Source: Rotskoff, Mean-field networks and birth-death, (35)-(36); Lu, Lu, Nolen (2019).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from scipy.special import log_ndtr, logsumexp, ndtri_exp

from ..energy import Energy
from ..measure import EmpiricalMeasure
from ..store import Coordinate
from . import results
from .grid import Array, Grid
from .newton import Operator, minimised

NEIGHBOUR = 1e-6  # change of a log mass between the two forces whose difference is a curvature
LEGENDRE = 8  # points in every cell over which a changed density is integrated
TAIL = 1.0  # stretch, in deviations, from which it is continued beyond the last level


@dataclass(frozen=True, eq=False)
class Reaction:
    """Φ(p) = F(p) + T KL(p | q) + KL(p | p₀)/(ατ) over the masses of points (n, d).

    The minimiser is log p₊ = (log p₀ - ατ (f - T log q))/(1 + ατT) + const with f = δF/δm(p₊). Newton's method works on
    the field f: positivity and mass one then need no care, and a linear F takes a single step. Its geometry is the
    covariance under p.

    Args:
        energy: F.
        points: (n, d), fixed.
        temperature: T; with 0 the reference does not matter.
        log_reference: (n,), log q: the logarithm of a point's volume times e^{-U}.
        rate: ατ.
        origin: (n,), log p₀.

    """

    energy: Energy
    points: Array
    temperature: float
    log_reference: Array
    rate: float
    origin: Array

    def minimised(self) -> tuple[Array, float, float]:
        """The minimiser's log masses, KL(p₊ | p₀), and the deviation under p₊ of what is constant at the optimum.

        Raises:
            RuntimeError: none was reached.

        """
        # The field whose image is p₀: from there on Φ only falls.
        field, residual = minimised(self, self.temperature * (self.log_reference - self._finite_origin))
        found = self.image(field)
        return found, relative(found, self.origin), residual / self.stiffness

    @property
    def stiffness(self) -> float:
        """The second derivative of Φ where F is linear."""
        return self.rate / (1 + self.rate * self.temperature)

    def image(self, field: Array) -> Array:
        """The log masses that a field makes of p₀."""
        force = field - self.temperature * self.log_reference
        moved = (self.origin - self.rate * force) / (1 + self.rate * self.temperature)
        normalised: Array = moved - logsumexp(moved)
        return normalised

    def value(self, field: Array) -> float:
        """Φ at the image."""
        law = self.image(field)
        return self.free_energy(law) + relative(law, self.origin) / self.rate

    def free_energy(self, log_mass: Array) -> float:
        """F(p) + T KL(p | q)."""
        entropy = self.temperature * relative(log_mass, self.log_reference) if self.temperature else 0.0
        return value_of(self.energy, self.points, np.exp(log_mass)) + entropy

    def derivatives(self, field: Array) -> tuple[Array, Operator]:
        """What the field lacks to be that of its image, times the stiffness, and the derivative of that."""
        response = self._response(field)

        def curved(v: Array) -> Array:
            size = NEIGHBOUR / (self.stiffness * math.sqrt(self.inner(field, v, v)))
            change: Array = self.stiffness * (v - (self._response(field + size * v) - response) / size)
            return change

        return self.stiffness * (field - response), curved

    def inner(self, field: Array, a: Array, b: Array) -> float:
        """The covariance of a and b under the image."""
        p = np.exp(self.image(field))
        return float((p * (a - p @ a)) @ (b - p @ b))

    def inverse(self, field: Array) -> Operator:
        """That of the second derivative where F is linear."""
        return lambda r: r / self.stiffness

    def room(self, field: Array, step: Array) -> float:
        """Every field is allowed."""
        return 1.0

    def scale(self, field: Array) -> float:
        """A change of the log masses by one, or the size of the field."""
        return max(1 / self.stiffness, math.sqrt(self.inner(field, field, field)))

    def _response(self, field: Array) -> Array:
        """δF/δm at the image."""
        mu = measure(self.points, np.exp(self.image(field)))
        values: Array = self.energy.functional_derivative(mu, mu.points).numpy()
        return values

    @property
    def _finite_origin(self) -> Array:
        """The origin, and anything where there is no mass, as none will come."""
        return np.where(np.isfinite(self.origin), self.origin, 0.0)


def measure(points: Array, mass: Array) -> EmpiricalMeasure:
    """Masses (n,) on points (n, d)."""
    return EmpiricalMeasure.signed(torch.from_numpy(points), torch.from_numpy(mass))


def value_of(energy: Energy, points: Array, mass: Array) -> float:
    """F of masses (n,) on points (n, d)."""
    with torch.no_grad():
        return float(energy(measure(points, mass)))


def relative(log_mass: Array, log_other: Array) -> float:
    """Σ p log(p/q), 0 log 0 = 0."""
    carries = log_mass > -math.inf
    p = log_mass[carries]
    return float(np.exp(p) @ (p - log_other[carries]))


def relevelled(z: Array, x: Array, log_ratio: Array) -> Array:
    """The quantile map of a law whose density is r times that of another.    (n,), (n,), (n,) -> (n,).

    The old law has the quantiles x at the levels Φ(z), the new one the density r(z) relative to it, unnormalised.
    The new levels of the old quantiles are integrals of φ r, log r a cubic spline in z, to rounding; between them the
    quantiles are interpolated by a cubic spline in the new z. Gaussians stay Gaussians, exactly.
    """
    spline, ends = CubicSpline(z, log_ratio), []
    reach = int(np.searchsorted(z, z[0] + TAIL))
    for end, other, side in ((0, reach, 1.0), (-1, -1 - reach, -1.0)):
        slope = (log_ratio[other] - log_ratio[end]) / (z[other] - z[end])
        # ∫ of φ(s) r(z₀) e^{slope (s - z₀)} beyond the last level z₀.
        ends.append(log_ratio[end] - slope * z[end] + slope**2 / 2 + log_ndtr(side * (z[end] - slope)))
    nodes, weights = np.polynomial.legendre.leggauss(LEGENDRE)
    half = np.diff(z)[:, None] / 2
    inner = z[:-1, None] + half * (1 + nodes)
    log_inner = spline(inner) - inner**2 / 2 - math.log(2 * math.pi) / 2
    top = max(float(log_inner.max()), *ends)
    cells = (np.exp(log_inner - top) * weights * half).sum(1)
    lower = np.cumsum(np.concatenate([[math.exp(ends[0] - top)], cells]))
    upper = np.cumsum(np.concatenate([[math.exp(ends[1] - top)], cells[::-1]]))[::-1]
    log_total = math.log(lower[-1] + upper[-1])
    # Each level from its nearer tail: 1 - 10⁻¹⁶ has no digits left.
    levels = np.where(
        lower < upper, ndtri_exp(np.log(lower) - log_total), -ndtri_exp(np.minimum(np.log(upper) - log_total, 0.0))
    )
    return _continued(levels, x, z)


def _continued(levels: Array, x: Array, z: Array) -> Array:
    """Increasing values x at increasing levels as values at z, straight beyond the ends."""
    spline = CubicSpline(levels, x)
    inside = np.clip(z, levels[0], levels[-1])
    left, right = ((x[k + 1] - x[k]) / (levels[k + 1] - levels[k]) for k in (0, len(x) - 2))
    beyond = np.where(z < inside, left, right) * (z - inside)
    found: Array = spline(inside) + beyond
    # A cubic may fall between steep and flat stretches, far out in the tails.
    return found if (np.diff(found) > 0).all() else np.interp(inside, levels, x) + beyond


@dataclass(frozen=True, eq=False)
class Nodes:
    """A law as masses of the nodes of a grid: the state is their logarithms, (n,)."""

    grid: Grid
    reaction: Reaction
    lead: ClassVar[tuple[str, ...]] = ()

    @property
    def first(self) -> Array:
        """The state to start from."""
        return self.reaction.origin

    @property
    def settings(self) -> dict[str, Any]:
        """What is recorded of the form."""
        return {"form": "nodes", "nodes": list(self.grid.shape)}

    @property
    def coords(self) -> dict[str, Coordinate]:
        """Coordinates of the dataset."""
        return {**results.axis_coordinates(self.grid), **results.component_coordinate(self.grid.dim)}

    @property
    def described(self) -> dict[str, tuple[tuple[str, ...], str]]:
        """Dimensions and long names of what a frame holds besides energies."""
        return {"density": (results.AXES[: self.grid.dim], "density of the law")}

    def react(self, state: Array) -> tuple[Array, float, float]:
        """One step: the state, KL(m₊ | m), the residual."""
        return replace(self.reaction, origin=state).minimised()

    def frame(self, state: Array) -> dict[str, Any]:
        """What is stored at a time."""
        return {
            "density": self.grid.show(np.exp(self.log_density(state))),
            "energy": value_of(self.reaction.energy, *self.cloud(state)),
            "free_energy": self.reaction.free_energy(state),
        }

    def cloud(self, state: Array) -> tuple[Array, Array]:
        """Points (n, d) and their masses (n,)."""
        return self.reaction.points, np.exp(state)

    def log_density(self, state: Array) -> Array:
        """The logarithm of the density, of the grid's shape."""
        log_density: Array = state.reshape(self.grid.shape) - np.log(self.grid.widths)
        return log_density
