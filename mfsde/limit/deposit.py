"""Initial laws on a grid: the masses that its nodes carry."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch

from ..measure import EmpiricalMeasure, Law
from .grid import Array, Grid

RESOLVED = 1e-6  # disagreement of the trapezoidal rule with mass 1, on the grid and on every second node of it
EVEN = {1: 1 << 15, 2: 1 << 9}  # levels of each variate, by their number
FARTHEST = 9.0  # deviations beyond which a copy of a law is not seen on a circle
MOST_TURNS = 64
ROUNDING = 1e-12  # mass of atoms that may seem to be outside
OUTSIDE = 1e-4  # mass that a grid may miss


def deposit(start: Law | EmpiricalMeasure, grid: Grid) -> Array:
    """Masses of the nodes for a law, of the grid's shape and summing to 1.

    A smooth density that the grid resolves is taken at the nodes, where the trapezoidal rule integrates it to
    spectral accuracy. Another law is represented by many atoms, even in its variates, and an atom is shared by the
    nodes around it, linear in its place, so that means stay exact.

    Raises:
        ValueError: more than 1e-4 of the mass (of an empirical measure: any of it) lies outside the grid; a law that is
            singular along some direction only.

    """
    if isinstance(start, EmpiricalMeasure):
        weights = start.weights.double().numpy()
        return _atoms(start.points.double().numpy(), weights / weights.sum(), grid, ROUNDING)
    mean, cov = _moments(start)
    if not (np.diag(cov) > 0).all():
        if cov.any():
            raise ValueError(
                "the initial law has no spread along one direction and some along another: it has neither atoms nor a "
                "density. Give it a small variance there."
            )
        return _atoms(mean[None], np.ones(1), grid, ROUNDING)
    density = _density(start, grid)
    if density is not None and _is_resolved(density, grid):
        mass = density * grid.widths
        normalised: Array = mass / mass.sum()
        return normalised
    points = _even(start)
    return _atoms(points, np.full(len(points), 1 / len(points)), grid, OUTSIDE)


def _moments(start: Any) -> tuple[Array, Array]:
    """Mean (d,) and covariance (d, d): every law has them, though not every class of laws."""
    return start.mean.numpy(), start.cov.numpy()


def _even(start: Law) -> Array:
    """Points of a law at even levels of its variates, of equal mass; of many variates at Sobol points.    (n, d)."""
    q = start.n_variates
    if q > 2:
        unit = torch.quasirandom.SobolEngine(q, scramble=True, seed=0).draw(1 << 18, dtype=torch.float64)
        unit = unit.clamp(1e-12, 1 - 1e-12)
    else:
        levels = (torch.arange(EVEN[q], dtype=torch.float64) + 0.5) / EVEN[q]
        unit = torch.cartesian_prod(*[levels] * q).reshape(-1, q)
    points: Array = start.from_variates(torch.special.ndtri(unit)).numpy()
    return points


def _density(start: Any, grid: Grid) -> Array | None:
    """The density at the nodes, summed over the turns of a torus; None where the law has none."""
    if not hasattr(start, "log_prob"):
        return None
    mean, cov = _moments(start)
    wide = np.sqrt(np.diag(cov))
    turns = []
    for axis, m, s in zip(grid.axes, mean, wide, strict=True):
        # Every copy that reaches the circle; a law that is wider than many turns is represented by atoms.
        low, high = (np.floor((m + side * FARTHEST * s - axis.nodes[0]) / axis.length) for side in (-1, 1))
        if axis.is_circle and high - low > MOST_TURNS:
            return None
        turns.append(range(int(low), int(high) + 1) if axis.is_circle else range(1))
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


def _atoms(points: Array, weights: Array, grid: Grid, outside: float) -> Array:
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
    _check_inside(float(weights[inside].sum()), grid, outside)
    kept = weights * inside
    for corner in itertools.product(*corners):
        np.add.at(mass, tuple(i for i, _ in corner), kept * np.prod([s for _, s in corner], axis=0))
    normalised: Array = mass / mass.sum()
    return normalised


def _check_inside(total: float, grid: Grid, outside: float) -> None:
    if abs(total - 1.0) > outside:
        ends = " × ".join(f"[{axis.nodes[0]:g}, {axis.nodes[-1]:g}]" for axis in grid.axes)
        raise ValueError(
            f"the grid on {ends} holds {total:.6g} of the initial law's mass instead of 1: the law reaches beyond it, "
            "or beyond a wall of the domain. Widen the grid, start inside the domain, or have it chosen (grid=None)."
        )
