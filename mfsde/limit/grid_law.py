"""Laws given by their density on a grid: what the deterministic side computes, usable wherever a law is.

Between the nodes the logarithm of the density is a cubic spline, so that the density is positive and exact at the
nodes. On the line the distribution function is the monotone cubic through its values at the nodes whose slopes are the
density: quantiles, samples and log densities then belong together to O(h⁴).
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from scipy.interpolate import CubicHermiteSpline, CubicSpline, RectBivariateSpline
from torch import Tensor

from ..measure import EmpiricalMeasure, Law
from ..torus import Period
from .grid import Grid

Array = np.ndarray

NEWTON = 60  # steps of the safeguarded inversion of a distribution function; bisection alone would need 52
WRAPPED = 4  # nodes beyond either end of a circle that its spline goes on for
BELOW = 5.0  # nats under the least density of a table that stand for a density of zero
SAMPLES = 1 << 20  # conditional densities evaluated at a time


class GridLaw(Law):
    """The law of density `density` on nodes, in one or two dimensions, on a line, an interval or a torus.

    Args:
        nodes: (G,), increasing, or a pair of them in two dimensions.
        density: (G,) or (G, H), non-negative; normalised to trapezoid mass 1.
        period: as of a scenario; a circle's nodes go round once.

    Raises:
        TypeError, ValueError: nodes that are no grid, a density that does not fit it, is negative, not finite or zero.

    """

    grid: Grid
    log_density: Array

    def __init__(self, nodes: Any, density: Any, period: Period = None) -> None:
        values = np.asarray(density.detach().cpu() if isinstance(density, Tensor) else density, dtype=np.float64)
        if values.ndim not in (1, 2):
            raise ValueError(f"GridLaw: density has shape {values.shape}; expected (G,), or (G, H) on a plane.")
        grid = Grid.of(nodes, values.ndim, period)
        values = values[tuple(slice(0, n) for n in grid.shape)] if _is_shown(grid, values) else values
        if values.shape != grid.shape:
            raise ValueError(f"GridLaw: density has shape {values.shape} on {grid.shape} nodes; expected one each.")
        if not np.isfinite(values).all() or values.min() < 0 or not values.max() > 0:
            raise ValueError("GridLaw: a density is finite, non-negative and not zero everywhere.")
        with np.errstate(divide="ignore"):
            self._set(grid, np.log(grid.normalised(values)))

    @classmethod
    def from_log(cls, grid: Grid, log_density: Array) -> Self:
        """The law of e^{log_density}, normalised here; what is too small for a float64 keeps its logarithm."""
        law = cls.__new__(cls)
        top = log_density.max()
        law._set(grid, log_density - top - math.log(float(grid.integral(np.exp(log_density - top)))))
        return law

    @classmethod
    def of_mass(cls, grid: Grid, mass: Array) -> Self:
        """The law of masses of the nodes."""
        law = cls.__new__(cls)
        with np.errstate(divide="ignore"):
            law._set(grid, np.log(mass / mass.sum() / grid.widths))
        return law

    def _set(self, grid: Grid, log_density: Array) -> None:
        self.grid, self.log_density = grid, log_density

    @property
    def dim(self) -> int:
        """Dimension d, 1 or 2."""
        return self.grid.dim

    @property
    def period(self) -> list[float | None] | None:
        """The torus, None on a line."""
        return self.grid.period

    @property
    def nodes(self) -> tuple[Array, ...]:
        """The nodes of every axis."""
        return tuple(axis.nodes for axis in self.grid.axes)

    @cached_property
    def density(self) -> Array:
        """The density at the nodes, of trapezoid mass 1."""
        density: Array = np.exp(self.log_density)
        return density

    @cached_property
    def mean(self) -> Tensor:
        """(d,); on a circle of the coordinates from the first node on."""
        points, mass = self._unrolled
        return torch.from_numpy(mass @ points)

    @cached_property
    def cov(self) -> Tensor:
        """(d, d)."""
        points, mass = self._unrolled
        centred = points - mass @ points
        return torch.from_numpy((mass[:, None] * centred).T @ centred)

    @property
    def _unrolled(self) -> tuple[Array, Array]:
        mass = self.density * self.grid.widths
        return self.grid.unrolled(mass / mass.sum())

    def as_measure(self) -> EmpiricalMeasure:
        """The nodes with their masses: the trapezoidal rule."""
        mu = self.grid.measure(self.density * self.grid.widths)
        return EmpiricalMeasure(mu.points, mu.weights, period=self.period)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density, (..., d) -> (...); -inf outside the grid."""
        at = self._wrapped(x.detach().cpu().double().numpy())
        values = self._log_spline(at) if self.dim == 1 else self._log_table(at)
        return torch.from_numpy(np.asarray(values)).to(x)

    def score(self, x: Tensor) -> Tensor:
        """∇ log density, (..., d) -> (..., d): the spline's."""
        at = self._wrapped(x.detach().cpu().double().numpy())
        if self.dim == 1:
            return torch.from_numpy(self._log_spline(at, 1)[..., None]).to(x)
        return torch.from_numpy(np.stack([self._log_table(at, 1, 0), self._log_table(at, 0, 1)], -1)).to(x)

    def cdf(self, x: Tensor) -> Tensor:
        """P(X <= x), one dimension only; on a circle from the first node on."""
        self._check_line("cdf")
        at = self._wrapped(x.detach().cpu().double().numpy()[..., None])[..., 0]
        distribution = self._distribution
        inside = np.clip(at, distribution.x[0], distribution.x[-1])
        return torch.from_numpy(np.clip(distribution(inside), 0.0, 1.0)).to(x)

    def quantile(self, u: Tensor) -> Tensor:
        """Inverse of the distribution function, one dimension only."""
        self._check_line("quantile")
        return torch.from_numpy(_inverted(self._distribution, u.detach().cpu().double().numpy())).to(u)

    def from_variates(self, z: Tensor) -> Tensor:
        """The quantile of Φ(z) on the line; on the plane that of x, then that of y given x (Rosenblatt)."""
        u = torch.special.ndtr(z.double())
        if self.dim == 1:
            return self.quantile(u).to(z)
        flat = u.reshape(-1, 2).cpu().numpy()
        first = _inverted(self._marginal._distribution, flat[:, 0])
        rows = max(1, SAMPLES // self.grid.shape[1])
        second = [self._given(first[k : k + rows], flat[k : k + rows, 1]) for k in range(0, len(flat), rows)]
        return torch.from_numpy(np.stack([first, np.concatenate(second)], -1).reshape(z.shape)).to(z)

    def _wrapped(self, x: Array) -> Array:
        """On a circle the representative from the first node on."""
        if self.period is None:
            return x
        out = x.copy()
        for k, axis in enumerate(self.grid.axes):
            if axis.is_circle:
                out[..., k] = axis.nodes[0] + np.mod(x[..., k] - axis.nodes[0], axis.length)
        return out

    def _log_spline(self, at: Array, derivative: int = 0) -> Array:
        """The spline through the finite logarithms; -inf between nodes of which one carries nothing."""
        x, y = self._turned(self.log_density)
        known = np.isfinite(y)
        if self.grid.axes[0].is_circle and known.all():
            y[-1] = y[0]
            spline = CubicSpline(x, y, bc_type="periodic")
        else:
            spline = CubicSpline(x[known], y[known])
        values = spline(at[..., 0], derivative)
        right = np.clip(np.searchsorted(x, at[..., 0]), 1, len(x) - 1)
        whole = (known[right - 1] | (at[..., 0] == x[right])) & (known[right] | (at[..., 0] == x[right - 1]))
        inside = (at[..., 0] >= x[known][0]) & (at[..., 0] <= x[known][-1]) & whole
        return np.where(inside, values, 0.0 if derivative else -math.inf)

    def _log_table(self, at: Array, dx: int = 0, dy: int = 0) -> Array:
        (x, y), table = self._table
        inside = (at >= [x[0], y[0]]).all(-1) & (at <= [x[-1], y[-1]]).all(-1)
        values = table.ev(at[..., 0], at[..., 1], dx, dy)
        return np.where(inside, values, 0.0 if dx or dy else -math.inf)

    @cached_property
    def _table(self) -> tuple[tuple[Array, Array], RectBivariateSpline]:
        """The interpolated logarithm on the plane, and its nodes; circles go on for some nodes at either side."""
        nodes, values = [], self.log_density
        for k, axis in enumerate(self.grid.axes):
            row = axis.nodes
            if axis.is_circle:
                n = len(row)
                row = np.concatenate([row[-WRAPPED:] - axis.length, row, row[:WRAPPED] + axis.length])
                values = values.take(range(-WRAPPED, n + WRAPPED), k, mode="wrap")
            nodes.append(row)
        # Nodes that carry nothing go on below the least that do: a spline through -inf is none, and a cliff would ring.
        floor = values[np.isfinite(values)].min() - BELOW
        return (nodes[0], nodes[1]), RectBivariateSpline(*nodes, np.maximum(values, floor))

    def _turned(self, values: Array) -> tuple[Array, Array]:
        """Nodes and values on the line; on a circle once round, the first node again at the end."""
        axis = self.grid.axes[0]
        if not axis.is_circle:
            return axis.nodes, values.copy()
        return np.append(axis.nodes, axis.nodes[0] + axis.length), np.append(values, values[0])

    @cached_property
    def _distribution(self) -> CubicHermiteSpline:
        """Increasing from 0 to 1: at the nodes the integral of the density's spline, its slopes the density."""
        x, rho = self._turned(self.density)
        rising = np.maximum(np.diff(CubicSpline(x, rho).antiderivative()(x)), 0.0)
        levels = np.concatenate([[0.0], np.cumsum(rising)])
        total, secants = levels[-1], rising / np.diff(x)
        # Slopes above three secants could make the cubic fall (Fritsch, Carlson, 1980): far out in the tails.
        caps = 3 * np.minimum(np.append(secants, secants[-1]), np.append(secants[0], secants))
        return CubicHermiteSpline(x, levels / total, np.minimum(rho, caps) / total)

    @cached_property
    def _marginal(self) -> GridLaw:
        """The law of x on the plane."""
        axis = self.grid.axes[0]
        return GridLaw.of_mass(Grid((axis,)), (self.density * self.grid.widths).sum(1))

    def _given(self, x: Array, u: Array) -> Array:
        """The u-quantile of y given x, the density linear between nodes.    (n,), (n,) -> (n,)."""
        first, second = self.grid.axes
        density = self.density if not first.is_circle else np.concatenate([self.density, self.density[:1]])
        nodes = first.nodes if not first.is_circle else np.append(first.nodes, first.nodes[0] + first.length)
        right = np.clip(np.searchsorted(nodes, x), 1, len(nodes) - 1)
        share = ((x - nodes[right - 1]) / (nodes[right] - nodes[right - 1]))[:, None]
        rho = (1 - share) * density[right - 1] + share * density[right]
        y = second.nodes
        if second.is_circle:
            y, rho = np.append(y, y[0] + second.length), np.concatenate([rho, rho[:, :1]], 1)
        return _linear_quantile(y, rho, u)

    def _check_line(self, what: str) -> None:
        if self.dim != 1:
            raise ValueError(f"GridLaw.{what} exists in one dimension only; this law has d = {self.dim}.")


def _is_shown(grid: Grid, values: Array) -> bool:
    """Whether a density repeats the first nodes of closed circles, as the grid did."""
    shown = tuple(len(axis.shown) for axis in grid.axes)
    return shown != grid.shape and values.shape == shown


def _inverted(rising: CubicHermiteSpline, u: Array) -> Array:
    """The inverse of an increasing cubic spline: Newton's method, kept in its bracket by bisection."""
    x, levels = rising.x, rising(rising.x)
    at = np.clip(np.asarray(u, dtype=np.float64), 0.0, 1.0)
    right = np.clip(np.searchsorted(levels, at), 1, len(x) - 1)
    low, high = x[right - 1].copy(), x[right].copy()
    c3, c2, c1, c0 = (rising.c[k][right - 1] for k in range(4))
    start = low.copy()
    below, above = levels[right - 1], levels[right]
    share = np.divide(at - below, above - below, out=np.full_like(at, 0.5), where=above > below)
    y: Array = low + np.clip(share, 0.0, 1.0) * (high - low)
    for _ in range(NEWTON):
        s = y - start
        gap = ((c3 * s + c2) * s + c1) * s + c0 - at
        low, high = np.where(gap <= 0, y, low), np.where(gap >= 0, y, high)
        slope = (3 * c3 * s + 2 * c2) * s + c1
        with np.errstate(divide="ignore", invalid="ignore"):
            newton = y - gap / slope
        inside = (newton >= low) & (newton <= high)
        following = np.where(inside, newton, (low + high) / 2)
        moved = np.abs(following - y)
        y = following
        if not (moved > 1e-15 * np.maximum(1.0, np.abs(y))).any():
            break
    return y


def _linear_quantile(y: Array, rho: Array, u: Array) -> Array:
    """Quantiles of densities that are linear between nodes.    (G,), (n, G), (n,) -> (n,)."""
    gaps = np.diff(y)
    parts = (rho[:, 1:] + rho[:, :-1]) / 2 * gaps
    levels = np.concatenate([np.zeros((len(rho), 1)), np.cumsum(parts, 1)], 1)
    target = u * levels[:, -1]
    cell = np.clip((levels < target[:, None]).sum(1), 1, len(y) - 1)
    rows = np.arange(len(rho))
    a, b, gap = rho[rows, cell - 1], rho[rows, cell], gaps[cell - 1]
    rest = np.maximum(target - levels[rows, cell - 1], 0.0)
    # a s + (b - a) s²/(2 gap) = rest, in the form that does not cancel.
    root = np.sqrt(np.maximum(a**2 + 2 * rest * (b - a) / gap, 0.0))
    step = np.divide(2 * rest, a + root, out=np.zeros_like(rest), where=a + root > 0)
    found: Array = y[cell - 1] + np.clip(step, 0.0, gap)
    return found
