"""The transport step at given pairs: the proximal operator of an energy in L² of a measure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.linalg import solveh_banded

from ..energy import Energy
from .grid import Array
from .mirror import measure, value_of
from .newton import Operator
from .quantile_map import Entropy

NEIGHBOUR = 1e-6  # displacement, in deviations, between the forces whose difference is a curvature


@dataclass(frozen=True, eq=False)
class Proximal:
    """Φ(X) = G(Σ_i w_i δ_{X_i}) + T S(X) + Σ_i w_i |X_i - Y_i|²/(2τ) over X of shape (n, d), in the geometry of L²(w).

    Source: Montanari, (7.3); without an entropy it is (16) of Rotskoff.
    """

    energy: Energy
    mass: Array
    origin: Array
    tau: float
    entropy: Entropy | None

    @property
    def stiffness(self) -> float:
        """1/τ."""
        return 1 / self.tau

    def value(self, x: Array) -> float:
        """Φ."""
        entropy = 0.0 if self.entropy is None else self.entropy.value(x)
        return value_of(self.energy, x, self.mass) + entropy + self.norm(x - self.origin) ** 2 / (2 * self.tau)

    def derivatives(self, x: Array) -> tuple[Array, Operator]:
        """D_mG + (X - Y)/τ + T ∂_x log m, and the second derivative."""
        force, spread = self._force(x), self._spread(x) or self.norm(x) or 1.0

        def curved(v: Array) -> Array:
            size = NEIGHBOUR * spread / float(np.abs(v).max())
            change: Array = (self._force(x + size * v) - force) / size + v / self.tau
            return change if self.entropy is None else change + self.entropy.curved(x, v)

        slope: Array = force + (x - self.origin) / self.tau
        return (slope if self.entropy is None else slope + self.entropy.slope(x)), curved

    def inner(self, x: Array, a: Array, b: Array) -> float:
        """Σ w a·b, everywhere."""
        return float(self.mass @ (a * b).sum(-1))

    def inverse(self, x: Array) -> Operator:
        """The inverse of the second derivative without what couples the points, or of 1/τ alone."""
        if self.entropy is None:
            return lambda r: self.tau * r
        bands, root = self.entropy.bands(x), np.sqrt(self.mass)[:, None]
        bands[1] += np.maximum(1 / self.tau + self._local, 0.5 / self.tau)
        return lambda r: solveh_banded(bands, root * r) / root

    def room(self, x: Array, step: Array) -> float:
        """The share of a step that keeps a quantile map increasing."""
        return 1.0 if self.entropy is None else self.entropy.room(x, step)

    def scale(self, x: Array) -> float:
        """The deviation of the points; where that vanishes, what rounding makes of their distance from 0."""
        return self._spread(x) + 1e-3 * self.norm(x)

    def norm(self, a: Array) -> float:
        """√(Σ w |a|²)."""
        return math.sqrt(self.inner(a, a, a))

    def _force(self, x: Array) -> Array:
        """D_mG on the points."""
        mu = measure(x, self.mass)
        force: Array = self.energy.intrinsic_derivative(mu, mu.points).numpy()
        return force

    def _spread(self, x: Array) -> float:
        return self.norm(x - self.mass @ x)

    @cached_property
    def _local(self) -> Array:
        """∂_x D_mG(m, x) at the origin with m held, (n,): the part of the curvature that acts point by point."""
        mu = measure(self.origin, self.mass)
        size = NEIGHBOUR * (self._spread(self.origin) or 1.0)
        there = self.energy.intrinsic_derivative(mu, mu.points + size).numpy()
        local: Array = (there - self._force(self.origin))[:, 0] / size
        return local
