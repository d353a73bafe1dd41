"""A law on the line as an increasing map X(z) of a normal deviate z: its levels, and its entropy.

W₂ is then the distance of L²(φ), the entropy ∫ m log m = -∫ φ log X' dz + const, and Gaussians are straight lines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.interpolate import CubicSpline

from .grid import Array


@dataclass(frozen=True, eq=False)
class Levels:
    """Even z with the masses w ∝ φ(z) that quantiles X(z) carry.

    `flux` lies on the gaps and stands for φ there: Σ_j w_j z_j g_j = Σ_i flux_i (g_{i+1} - g_i)/h for every g, as by
    parts ∫ z g φ = ∫ g' φ. Maps that are straight in z, the Gaussians, then solve the discrete step without error.
    """

    z: Array

    @cached_property
    def mass(self) -> Array:
        """(n,), summing to 1."""
        w = np.exp(-(self.z**2) / 2)
        shares: Array = w / w.sum()
        return shares

    @cached_property
    def flux(self) -> Array:
        """(n - 1,), summing to 1 up to what lies beyond the last level."""
        outward = np.cumsum((self.mass * self.z)[::-1])[::-1][1:] * self.spacing
        # From the nearer end, where nothing cancels.
        return np.where(self.z[1:] > 0, outward, outward[::-1])

    @property
    def spacing(self) -> float:
        """Distance h of the levels in z."""
        return float(self.z[1] - self.z[0])

    def slopes(self, x: Array) -> Array:
        """X'(z), (n,), kept positive where a map is rough."""
        gaps = np.diff(x) / self.spacing
        before, after = np.append(gaps[0], gaps), np.append(gaps, gaps[-1])
        smooth = CubicSpline(self.z, x)(self.z, 1)
        slopes: Array = np.clip(smooth, np.minimum(before, after) / 2, 2 * np.maximum(before, after))
        return slopes


@dataclass(frozen=True, eq=False)
class Entropy:
    """T ∫ m log m of a quantile map: -T ∫ φ log X' dz + const, with X' on the gaps, for X of shape (n, 1)."""

    temperature: float
    levels: Levels

    def value(self, x: Array) -> float:
        """The value, exact for Gaussians."""
        slopes = np.diff(x[:, 0]) / self.levels.spacing
        return -self.temperature * (float(self.levels.flux @ np.log(slopes)) + (1 + math.log(2 * math.pi)) / 2)

    def slope(self, x: Array) -> Array:
        """T ∂_x log m at the quantiles, (n, 1): the gradient in L²(m)."""
        pull = self.temperature * self.levels.flux / np.diff(x[:, 0])
        score: Array = np.diff(pull, prepend=0.0, append=0.0) / self.levels.mass
        return score[:, None]

    def curved(self, x: Array, v: Array) -> Array:
        """The second derivative applied to v, (n, 1)."""
        bend = self._stiffness(x) * np.diff(v[:, 0])
        change: Array = -np.diff(bend, prepend=0.0, append=0.0) / self.levels.mass
        return change[:, None]

    def bands(self, x: Array) -> Array:
        """The second derivative between deviations times √mass, (2, n): upper band and diagonal."""
        stiffness, root = self._stiffness(x), np.sqrt(self.levels.mass)
        diagonal = (np.append(stiffness, 0.0) + np.append(0.0, stiffness)) / self.levels.mass
        return np.stack([np.append(0.0, -stiffness / (root[1:] * root[:-1])), diagonal])

    def room(self, x: Array, step: Array) -> float:
        """The share of a step, at most 1, that keeps the map increasing."""
        closing = -np.diff(step[:, 0]) / np.diff(x[:, 0])
        return 1.0 if closing.max() < 0.95 else 0.95 / float(closing.max())

    def _stiffness(self, x: Array) -> Array:
        stiffness: Array = self.temperature * self.levels.flux / np.diff(x[:, 0]) ** 2
        return stiffness
