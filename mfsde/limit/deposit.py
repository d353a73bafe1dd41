"""Initial laws on a grid: the masses that its nodes carry."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch

from ..measure import EmpiricalMeasure, Law
from .grid import Array, Grid

RESOLVED = 1e-6  # disagreement of the trapezoidal rule with mass 1, on the grid and on every second node of it
INSIDE = 16  # points on a side of every cell over which an unresolved density on the plane is averaged
OUTSIDE = 1e-4  # mass that a grid may miss


def deposit(start: Law | EmpiricalMeasure, grid: Grid) -> Array:
    """Masses of the nodes for a law, of the grid's shape and summing to 1.

    A smooth density that the grid resolves is taken at the nodes, where the trapezoidal rule integrates it to
    spectral accuracy. Otherwise cells get their probability (on the line by the distribution function, on the plane by
    averaging the density), and atoms are shared by the nodes around them, so that the mean stays exact.

    Raises:
        ValueError: more than 1e-4 of the mass lies outside the grid; the law has neither atoms, density nor quantiles.

    """
    if isinstance(start, EmpiricalMeasure):
        return _atoms(start.points.double().numpy(), start.weights.double().numpy(), grid)
    if not bool((torch.diagonal(start.cov) > 0).all()):  # type: ignore[attr-defined]
        if bool((start.cov != 0).any()):  # type: ignore[attr-defined]
            raise ValueError(
                "the initial law has no spread along one direction and some along another: it has neither atoms nor a "
                "density. Give it a small variance there."
            )
        return _atoms(start.mean.numpy()[None], np.ones(1), grid)  # type: ignore[attr-defined]
    density = _density(start, grid)
    if density is not None and _is_resolved(density, grid):
        mass = density * grid.widths
    elif grid.dim == 1:
        mass = _cells(start, grid)
    else:
        mass = _averages(start, grid)
    _check_inside(float(mass.sum()), grid)
    normalised: Array = mass / mass.sum()
    return normalised


def _density(start: Any, grid: Grid) -> Array | None:
    """The density at the nodes, summed over the turns of a torus; None where the law has none."""
    if not hasattr(start, "log_prob"):
        return None
    turns = [(-2, -1, 0, 1, 2) if axis.is_circle else (0,) for axis in grid.axes]
    sides = np.array([axis.length if axis.is_circle else 0.0 for axis in grid.axes])
    values = np.zeros(len(grid.points))
    for turn in itertools.product(*turns):
        values += start.log_prob(torch.from_numpy(grid.points + sides * turn)).exp().numpy()
    return values.reshape(grid.shape)


def _is_resolved(density: Array, grid: Grid) -> bool:
    """Whether the trapezoidal rule knows the mass, also from every second node only."""
    thinned = density[tuple(slice(0, None, 2) for _ in grid.shape)]
    coarse = Grid(tuple(type(a)(a.nodes[::2], a.length) for a in grid.axes))
    even = all(len(a.nodes) % 2 == (0 if a.is_circle else 1) for a in grid.axes)
    errors = [abs(float(grid.integral(density)) - 1.0)]
    return all(e < RESOLVED for e in [*errors, *([abs(float(coarse.integral(thinned)) - 1.0)] if even else [])])


def _cells(start: Any, grid: Grid) -> Array:
    """Probabilities of the cells on a line or circle."""
    axis = grid.axes[0]
    if axis.is_circle:
        left = axis.nodes - np.roll(axis.gaps, 1) / 2
        edges = np.append(left, left[0] + axis.length)
        levels = sum(_cdf(start, edges + turn * axis.length) for turn in (-2, -1, 0, 1, 2))
        found: Array = np.diff(levels)
        return found
    middles = axis.nodes[:-1] + axis.gaps / 2
    levels = _cdf(start, np.concatenate([axis.nodes[:1], middles, axis.nodes[-1:]]))
    cells: Array = np.diff(levels)
    return cells


def _cdf(start: Any, x: Array) -> Array:
    if not hasattr(start, "cdf"):
        raise ValueError(
            f"a {type(start).__name__} has neither log_prob nor cdf; the limit needs one to start from it."
        )
    levels: Array = start.cdf(torch.from_numpy(x)).numpy()
    return levels


def _averages(start: Any, grid: Grid) -> Array:
    """Masses of the cells on the plane, by the midpoint rule inside each."""
    if not hasattr(start, "log_prob"):
        raise ValueError(f"a {type(start).__name__} has no log_prob; on a plane the limit needs one to start from it.")
    shares = (np.arange(INSIDE) + 0.5) / INSIDE
    rows = []
    for axis in grid.axes:
        before, after = (np.roll(axis.gaps, 1), axis.gaps) if axis.is_circle else (
            np.concatenate([[0.0], axis.gaps]), np.concatenate([axis.gaps, [0.0]])
        )  # fmt: skip
        left = axis.nodes - before / 2
        rows.append((left[:, None] + shares * ((before + after) / 2)[:, None]).ravel())
    fine = np.stack([m.ravel() for m in np.meshgrid(*rows, indexing="ij")], -1)
    values = start.log_prob(torch.from_numpy(fine)).exp().numpy()
    nx, ny = grid.shape
    masses: Array = values.reshape(nx, INSIDE, ny, INSIDE).mean((1, 3)) * grid.widths
    return masses


def _atoms(points: Array, weights: Array, grid: Grid) -> Array:
    """Each atom's mass on the nodes around it, linear in its place.    (n, d), (n,)."""
    mass = np.zeros(grid.shape)
    corners = []
    inside = np.ones(len(points), dtype=bool)
    for k, axis in enumerate(grid.axes):
        x, n = points[:, k], len(axis.nodes)
        if axis.is_circle:
            x = axis.nodes[0] + np.mod(x - axis.nodes[0], axis.length)
        inside &= axis.is_circle | ((x >= axis.nodes[0]) & (x <= axis.nodes[-1]))
        low = np.clip(np.searchsorted(axis.nodes, x, side="right") - 1, 0, len(axis.gaps) - 1)
        share = np.clip((x - axis.nodes[low]) / axis.gaps[low], 0.0, 1.0)
        corners.append(((low, 1 - share), ((low + 1) % n, share)))
    _check_inside(float(weights[inside].sum()), grid)
    kept = weights * inside
    for corner in itertools.product(*corners):
        np.add.at(mass, tuple(i for i, _ in corner), kept * np.prod([s for _, s in corner], axis=0))
    normalised: Array = mass / mass.sum()
    return normalised


def _check_inside(total: float, grid: Grid) -> None:
    if abs(total - 1.0) > OUTSIDE:
        ends = " × ".join(f"[{axis.nodes[0]:g}, {axis.nodes[-1]:g}]" for axis in grid.axes)
        raise ValueError(
            f"the grid on {ends} holds {total:.6g} of the initial law's mass instead of 1: it ends too early, or is "
            "too coarse. Widen or refine it, or pass grid=None to have it chosen."
        )
