"""Where the mass of a scenario lives: the walls of its domain, and a box around what moves in between."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..measure import EmpiricalMeasure, Law
from ..model import scenario_name
from ..torus import period_lengths
from .grid import Array, Axis, Grid

FAR = 1e9  # where a wall is looked for
BISECTIONS = 100
LEVEL = 1e-13  # of the initial law beyond either end of the first box
DEVIATIONS = 8.0  # the same for a law without quantiles
LEAST_SPREAD = 1e-3  # half-width of the box around a point mass, relative to its place (or 1)


@dataclass(frozen=True)
class Domain:
    """Walls on every axis, infinite where there is none, and the torus.    low, high: (d,).

    `turn` is where the coordinates of a circle begin: 0, or where `project` puts them.
    """

    low: Array
    high: Array
    period: list[float | None] | None
    turn: Array

    def is_open(self, axis: Axis, k: int, side: int) -> bool:
        """Whether a grid's end (side 0: low, 1: high) is no wall: mass that reaches it would leave the grid."""
        if axis.is_circle:
            return False
        wall = float((self.low, self.high)[side][k])
        end = float(axis.nodes[-side])
        return not (math.isfinite(wall) and abs(end - wall) <= 1e-9 * max(1.0, abs(wall)))

    def check(self, grid: Grid, name: str) -> None:
        """Refuses a grid that goes beyond a wall."""
        for k, axis in enumerate(grid.axes):
            slack = 1e-9 * max(1.0, float(np.abs(axis.nodes).max()))
            if not axis.is_circle and (axis.nodes[0] < self.low[k] - slack or axis.nodes[-1] > self.high[k] + slack):
                raise ValueError(
                    f"grid: nodes from {axis.nodes[0]:g} to {axis.nodes[-1]:g} go beyond the domain [{self.low[k]:g}, "
                    f"{self.high[k]:g}] that {name}.project keeps the particles in; end the grid there."
                )

    def high_ends(self, log_density: Array, grid: Grid, depth: float) -> list[tuple[int, int]]:
        """Open ends (axis, side) of a grid where a log density is less than `depth` below its maximum."""
        top = log_density.max()
        return [
            (k, side)
            for k, axis in enumerate(grid.axes)
            for side in (0, 1)
            if self.is_open(axis, k, side) and log_density.take(-side, k).max() > top - depth
        ]

    def tails(self, mass: Array, grid: Grid) -> Array:
        """Mass near the open ends, (T,): the density there over a twentieth of the length.    mass: (T, *shape)."""
        total = np.zeros(len(mass))
        for k, axis in enumerate(grid.axes):
            marginal = np.moveaxis(mass, k + 1, 1).reshape(len(mass), len(axis.nodes), -1).sum(-1)
            for side in (0, 1):
                if self.is_open(axis, k, side):
                    total += marginal[:, -side] / axis.widths[-side] * 0.05 * (axis.nodes[-1] - axis.nodes[0])
        return total


def domain_of(scenario: Any, start: Law | EmpiricalMeasure) -> Domain:
    """The domain that a scenario's `project` keeps its particles in: a box, looked for from the mean of a law inside.

    Raises:
        ValueError: the domain is no box.

    """
    mu = start.as_measure() if isinstance(start, Law) else start
    inside = mu.mean()[0].double().numpy()
    d = len(inside)
    period = getattr(scenario, "period", None)
    lengths = _lengths(period, d)
    low, high = np.full(d, -math.inf), np.full(d, math.inf)
    if not hasattr(scenario, "project"):
        return Domain(low, high, lengths, np.zeros(d))
    turn = np.zeros(d)
    for k in range(d):
        length = None if lengths is None else lengths[k]
        if length is None:
            low[k], high[k] = (_wall(scenario, inside, k, side) for side in (-1, 1))
        else:
            far = inside.copy()
            far[k] = 0.75 * length
            turn[k] = 0.0 if _projected(scenario, far)[k] >= 0 else -0.5 * length
    circles = np.array([lengths is not None and length is not None for length in lengths or [None] * d])
    _check_box(scenario, inside, low, high, circles)
    return Domain(low, high, lengths, turn)


def first_box(start: Law | EmpiricalMeasure, domain: Domain) -> tuple[Array, Array]:
    """A box that holds the initial law, inside the walls; an interval or circle as a whole.    (d,), (d,)."""
    if isinstance(start, EmpiricalMeasure):
        points = start.points[start.weights > 0].double().numpy()
        low, high = points.min(0), points.max(0)
    elif start.dim == 1 and hasattr(start, "quantile"):
        ends = start.quantile(torch.tensor([LEVEL, 1 - LEVEL], dtype=torch.float64)).numpy()
        low, high = ends[:1], ends[1:]
    else:
        mu = start.as_measure()
        mean = mu.mean()[0].double().numpy()
        reach = DEVIATIONS * np.sqrt(np.diagonal(mu.covariance().double().numpy()))
        low, high = mean - reach, mean + reach
    middle, half = (low + high) / 2, (high - low) / 2
    half = np.maximum(half, LEAST_SPREAD * np.maximum(1.0, np.abs(middle)))
    low, high = np.maximum(middle - 1.1 * half, domain.low), np.minimum(middle + 1.1 * half, domain.high)
    walled = np.isfinite(domain.low) & np.isfinite(domain.high)
    low, high = np.where(walled, domain.low, low), np.where(walled, domain.high, high)
    for k, length in enumerate(domain.period or ()):
        if length is not None:
            low[k], high[k] = domain.turn[k], domain.turn[k] + length
    return low, high


def widened(low: Array, high: Array, out: list[tuple[int, int]], domain: Domain) -> tuple[Array, Array]:
    """The box with the sides (axis, 0 or 1) pushed out by its length there, up to the walls."""
    low, high = low.copy(), high.copy()
    for k, side in out:
        length = high[k] - low[k]
        if side == 0:
            low[k] = max(low[k] - length, domain.low[k])
        else:
            high[k] = min(high[k] + length, domain.high[k])
    return low, high


def _lengths(period: Any, d: int) -> list[float | None] | None:
    if period is None:
        return None
    return [length if math.isfinite(length) else None for length in period_lengths(period, d)]


def _wall(scenario: Any, inside: Array, k: int, side: int) -> float:
    """The farthest point from `inside` along an axis that `project` leaves in place; infinite where there is none."""

    def stays(distance: float) -> bool:
        x = inside.copy()
        x[k] += side * distance
        return bool(np.abs(_projected(scenario, x)[k] - x[k]) <= 1e-15 * max(1.0, abs(x[k])))

    if stays(FAR):
        return side * math.inf
    low, high = 0.0, next(10.0**k for k in range(-9, 10) if not stays(10.0**k))
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if stays(middle) else (low, middle)
    wall = float(inside[k] + side * low)
    scale = max(1.0, abs(wall))
    return round(wall / scale, 12) * scale + 0.0


def _projected(scenario: Any, x: Array) -> Array:
    with torch.no_grad():
        moved: Array = scenario.project(torch.from_numpy(x.copy())[None, None])[0, 0].numpy()
    return moved


def _check_box(scenario: Any, inside: Array, low: Array, high: Array, circles: Array) -> None:
    """Refuses domains that are no box: the projection moves a corner. Circles have no corners."""
    corners = [np.where(np.isfinite(end), end, inside) for end in (low, high)]
    mixed = [np.where(np.arange(len(low)) == 0, corners[0], corners[1])] if len(low) == 2 else []
    for corner in [*corners, *mixed]:
        moved = np.where(circles, 0.0, np.abs(_projected(scenario, corner) - corner))
        if moved.max() > 1e-6 * max(1.0, float(np.abs(corner).max())):
            raise ValueError(
                f"{scenario_name(scenario)}.project keeps the particles in a domain that is no box (it moves "
                f"{corner.tolist()}); the limit is computed on intervals, rectangles and tori."
            )
