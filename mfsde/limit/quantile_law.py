"""Laws on the line given by some of their quantiles: what characteristics and proximal steps compute."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from scipy.special import ndtr, ndtri
from torch import Tensor

from ..measure import EmpiricalMeasure, Law

Array = np.ndarray

BISECTIONS = 60
LEAST = 1e-300  # of a level whose normal deviate is finite


class QuantileLaw(Law):
    """The law whose quantile at Φ(z) is a monotone cubic in z through given ones, and constant beyond the last.

    Args:
        levels: (n,), increasing, inside (0, 1).
        points: (n,), the quantiles there, not decreasing; equal ones are an atom.
        masses: (n,), their shares in means; what lies between the middles of neighbouring levels where None.

    Raises:
        ValueError: levels or points that are not in order.

    """

    def __init__(self, levels: Any, points: Any, masses: Any = None) -> None:
        u, x = (np.asarray(values, dtype=np.float64) for values in (levels, points))
        if u.shape != x.shape or u.ndim != 1 or not (np.diff(u) > 0).all() or not (np.diff(x) >= 0).all():
            raise ValueError(
                f"QuantileLaw: levels {u.shape} and points {x.shape}; expected rows of one length, levels increasing "
                "and points not decreasing."
            )
        self._z, self._x = ndtri(np.maximum(u, LEAST)), x
        edges = np.concatenate([[0.0], (u[1:] + u[:-1]) / 2, [1.0]])
        shares = np.diff(edges) if masses is None else np.asarray(masses, dtype=np.float64)
        self._mass = shares / shares.sum()

    @classmethod
    def of_atoms(cls, points: Array, masses: Array) -> QuantileLaw:
        """The law that ordered atoms are a quadrature of: each stands at the middle of its mass.    (n,), (n,)."""
        order = np.argsort(points, kind="stable")
        x, w = points[order], masses[order] / masses.sum()
        middles = np.cumsum(w) - w / 2
        # Masses that rounding swallows have no level of their own.
        kept = np.flatnonzero(np.diff(middles, prepend=0.0) > 0)
        kept = kept[middles[kept] < 1]
        return cls(middles[kept], x[kept], w[kept])

    @property
    def dim(self) -> int:
        """One."""
        return 1

    @cached_property
    def _map(self) -> PchipInterpolator:
        return PchipInterpolator(self._z, self._x)

    def _at(self, z: Array) -> Array:
        values: Array = self._map(np.clip(z, self._z[0], self._z[-1]))
        return values

    def quantile(self, u: Tensor) -> Tensor:
        """The quantile at levels u."""
        return torch.from_numpy(self._at(ndtri(u.detach().cpu().double().numpy()))).to(u)

    def cdf(self, x: Tensor) -> Tensor:
        """P(X <= x): by bisection of the quantile map, one at the last point."""
        at = x.detach().cpu().double().numpy()
        low, high = np.full(at.shape, self._z[0]), np.full(at.shape, self._z[-1])
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            below = self._at(middle) <= at
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        levels = np.where(at < self._x[0], 0.0, np.where(at >= self._x[-1], 1.0, ndtr(low)))
        return torch.from_numpy(levels).to(x)

    def from_variates(self, z: Tensor) -> Tensor:
        """The map itself: the quantile of Φ(z)."""
        return torch.from_numpy(self._at(z.detach().cpu().double().numpy())).to(z)

    @property
    def mean(self) -> Tensor:
        """(1,)."""
        return self.as_measure().mean()[0]

    @property
    def cov(self) -> Tensor:
        """(1, 1)."""
        return self.as_measure().covariance()

    def as_measure(self) -> EmpiricalMeasure:
        """The given quantiles with their masses."""
        return EmpiricalMeasure(torch.from_numpy(self._x)[:, None], torch.from_numpy(self._mass))
