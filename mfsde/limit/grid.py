"""Grids of nodes on the line, an interval, a circle, and products of two of them.

Every node owns the cell between the midpoints to its neighbours; on a line or an interval the two end nodes own half a
cell. The widths are then the weights of the trapezoidal rule, so that a nodal density of trapezoid mass 1 is at once
the density of a finite-volume solution and a weighted measure of its nodes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..measure import EmpiricalMeasure
from ..torus import Period, period_lengths

Array = np.ndarray

FEWEST = 5  # nodes on an axis
# Irrational steps spread places evenly, and differently along the two axes.
TURNS = np.array([math.sqrt(2) - 1, math.sqrt(3) - 1])


@dataclass(frozen=True, eq=False)
class Axis:
    """Distinct increasing nodes, (n,), on a line, or on a circle of circumference `length`.

    `is_closed`: the circle's first node is shown once more at its end, where the user's grid had it.
    """

    nodes: Array
    length: float = math.inf
    is_closed: bool = False

    @classmethod
    def of(cls, nodes: Any, length: float = math.inf, name: str = "grid") -> Axis:
        """The axis through nodes that a user gave.

        Raises:
            TypeError, ValueError: no row of increasing finite numbers, or more than one turn of the circle.

        """
        try:
            x = np.asarray(nodes.detach().cpu() if isinstance(nodes, Tensor) else nodes, dtype=np.float64)
        except (TypeError, ValueError):
            raise TypeError(f"{name}: expected a row of numbers, (G,); got {nodes!r:.60}.") from None
        if x.ndim != 1 or len(x) < FEWEST or not np.isfinite(x).all() or not (np.diff(x) > 0).all():
            raise ValueError(
                f"{name}: expected at least {FEWEST} increasing finite nodes, (G,); got shape {x.shape}. For instance "
                "numpy.linspace(-4, 4, 401), or None to have the nodes chosen."
            )
        if math.isinf(length):
            return cls(x)
        turn = x[-1] - x[0]
        if turn > length * (1 + 1e-9):
            raise ValueError(
                f"{name}: nodes from {x[0]:g} to {x[-1]:g} go round the circle of length {length:g} more than once; "
                f"take numpy.linspace({x[0]:g}, {x[0] + length:g}, G)."
            )
        closed = bool(turn > length * (1 - 1e-9))
        return cls(x[:-1] if closed else x, length, closed)

    @property
    def is_circle(self) -> bool:
        """True where the first node is the last one's neighbour."""
        return math.isfinite(self.length)

    @cached_property
    def gaps(self) -> Array:
        """Distances between neighbours: (n - 1,), and (n,) on a circle."""
        inside = np.diff(self.nodes)
        return np.append(inside, self.nodes[0] + self.length - self.nodes[-1]) if self.is_circle else inside

    @cached_property
    def widths(self) -> Array:
        """Cell widths, (n,): trapezoidal weights."""
        widths: Array = np.zeros(len(self.nodes))
        if self.is_circle:
            widths += (self.gaps + np.roll(self.gaps, 1)) / 2
            return widths
        widths[:-1] += self.gaps / 2
        widths[1:] += self.gaps / 2
        return widths

    @property
    def shown(self) -> Array:
        """The nodes as the user sees them: on a closed circle with the first one again at the end."""
        return np.append(self.nodes, self.nodes[0] + self.length) if self.is_closed else self.nodes

    def show(self, values: Array, axis: int = -1) -> Array:
        """Values at the distinct nodes as values at the shown ones."""
        return np.concatenate([values, values.take([0], axis)], axis) if self.is_closed else values

    def refined(self) -> Axis:
        """With the midpoints of all neighbours in between."""
        left = self.nodes[: len(self.gaps)]
        middles = left + self.gaps / 2
        nodes = np.empty(len(self.nodes) + len(middles))
        nodes[::2], nodes[1::2] = self.nodes, middles
        return Axis(nodes, self.length, self.is_closed)


@dataclass(frozen=True, eq=False)
class Grid:
    """The product of one or two axes. Arrays on it have the shape (n,) or (n_x, n_y)."""

    axes: tuple[Axis, ...]

    @classmethod
    def of(cls, nodes: Any, dim: int, period: Period = None) -> Grid:
        """The grid that a user gave: nodes (G,) on the line, a pair of them on the plane; a grid is one already.

        Raises:
            TypeError, ValueError: as `Axis.of`, or another number of axes than the state has components.

        """
        if isinstance(nodes, Grid):
            return nodes
        parts = [nodes] if dim == 1 else nodes
        if not isinstance(parts, (Sequence, np.ndarray, Tensor)) or len(parts) != dim:
            raise TypeError(f"grid: the state has {dim} components; expected a pair of rows of nodes, (G,) and (H,).")
        lengths = [math.inf] * dim if period is None else period_lengths(period, dim)
        return cls(tuple(Axis.of(x, length) for x, length in zip(parts, lengths, strict=True)))

    @classmethod
    def given(cls, nodes: Any, n_nodes: int | None, dim: int, period: Period = None) -> Grid | None:
        """The same, None where none was given: then `n_nodes` may say how many to choose, and only then."""
        if nodes is not None and n_nodes is not None:
            raise TypeError("grid and n_nodes are two ways to say where the nodes are; leave one out.")
        return None if nodes is None else cls.of(nodes, dim, period)

    @classmethod
    def box(cls, low: Sequence[float], high: Sequence[float], n: int, period: Period = None) -> Grid:
        """Even nodes, n on each axis, over a box; a circle starts at its low end and is gone round once."""
        lengths = [math.inf] * len(low) if period is None else period_lengths(period, len(low))
        ends = [a + length if math.isfinite(length) else b for a, b, length in zip(low, high, lengths, strict=True)]
        rows = [np.linspace(a, b, n) for a, b in zip(low, ends, strict=True)]
        return cls(tuple(Axis.of(x, length) for x, length in zip(rows, lengths, strict=True)))

    @property
    def dim(self) -> int:
        """Number of axes."""
        return len(self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Distinct nodes on each axis."""
        return tuple(len(axis.nodes) for axis in self.axes)

    @property
    def period(self) -> list[float | None] | None:
        """The torus as measures take it."""
        lengths = [axis.length if axis.is_circle else None for axis in self.axes]
        return lengths if any(length is not None for length in lengths) else None

    @cached_property
    def widths(self) -> Array:
        """Volume of every cell, of the grid's shape."""
        volume = self.axes[0].widths
        for axis in self.axes[1:]:
            volume = np.multiply.outer(volume, axis.widths)
        return volume

    @cached_property
    def points(self) -> Array:
        """All nodes, (n, d), the last axis running fastest."""
        mesh = np.meshgrid(*(axis.nodes for axis in self.axes), indexing="ij")
        return np.stack([m.ravel() for m in mesh], axis=-1)

    def measure(self, mass: Array) -> EmpiricalMeasure:
        """Masses of the nodes as the law that drifts see.    Leading axes are replicas: (..., *shape)."""
        lead = mass.shape[: mass.ndim - self.dim]
        weights = np.maximum(mass.reshape(*lead, -1), 0.0)
        points = torch.from_numpy(self.points).expand(*lead, *self.points.shape)
        return EmpiricalMeasure.given(points, torch.from_numpy(weights / weights.sum(-1, keepdims=True)), self.period)

    def refined(self) -> Grid:
        """Every axis with its midpoints."""
        return Grid(tuple(axis.refined() for axis in self.axes))

    def restricted(self, values: Array) -> Array:
        """Values on `refined()` at the own nodes: the last axes of the array."""
        for k in range(self.dim):
            values = values.take(range(0, values.shape[k - self.dim], 2), k - self.dim)
        return values

    def show(self, values: Array) -> Array:
        """Values at the distinct nodes as at the shown ones: the last axes of the array."""
        for k, axis in enumerate(self.axes):
            values = axis.show(values, k - self.dim)
        return values

    def unrolled(self, mass: Array) -> tuple[Array, Array]:
        """Points and masses that means are taken over: on a circle half of the first node's mass lies at its end.

        (..., *shape) -> (n', d), (..., n').
        """
        rows = []
        for k, axis in enumerate(self.axes):
            row = axis.nodes
            if axis.is_circle:
                side = k - self.dim
                row = np.append(row, row[0] + axis.length)
                mass = np.concatenate([mass, mass.take([0], side)], side)
                halves = np.ones(len(row))
                halves[[0, -1]] = 0.5
                mass = mass * halves.reshape([-1 if q == k else 1 for q in range(self.dim)])
            rows.append(row)
        mesh = np.meshgrid(*rows, indexing="ij")
        return np.stack([m.ravel() for m in mesh], -1), mass.reshape(*mass.shape[: mass.ndim - self.dim], -1)

    def few_atoms(self, count: int) -> list[EmpiricalMeasure]:
        """Laws of three atoms of unequal masses, spread over the grid: what they do to a drift costs little."""
        low = np.array([axis.nodes[0] for axis in self.axes])
        length = np.array([np.ptp(axis.nodes) for axis in self.axes])
        shares = np.mod(0.5 + np.arange(3 * count)[:, None] * TURNS[: self.dim], 1.0)
        points = torch.from_numpy(low + length * shares).reshape(count, 3, -1)
        weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
        return [EmpiricalMeasure.given(x, weights, self.period) for x in points]

    def integral(self, values: Array) -> Array:
        """Trapezoidal integral over the last axes."""
        total: Array = (values * self.widths).sum(axis=tuple(range(-self.dim, 0)))
        return total

    def normalised(self, density: Array) -> Array:
        """A nodal density of trapezoid mass 1."""
        scaled: Array = density / self.integral(density)[(..., *[None] * self.dim)]
        return scaled
