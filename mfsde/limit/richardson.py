"""Two solutions, on a grid and on its refinement, into one, and into an estimate of its error."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import results
from .grid import Array, Grid

KNOWN = 1e-12  # density, relative to its maximum, from which two solutions are combined
LARGEST = 0.5  # correction of the logarithm of a density


def extrapolated(rough: Array, sharp: Array) -> Array:
    """The value for h → 0 of a quantity with an error c h², from those at h and h/2."""
    value: Array = (4 * sharp - rough) / 3
    return value


def combined(rough: Array, sharp: Array, dim: int) -> Array:
    """The same for the logarithm of a density, which keeps it positive; far out in the tails the finer one.

    The density's axes are the last `dim` ones; it is not normalised.
    """
    level = KNOWN * sharp.max(axis=tuple(range(-dim, 0)), keepdims=True)
    known = (rough > level) & (sharp > level)
    correction = np.log(np.where(known, sharp, 1.0) / np.where(known, rough, 1.0)) / 3
    density: Array = sharp * np.exp(np.clip(correction, -LARGEST, LARGEST))
    return density


def estimate(rough: Array, sharp: Array, order: int = 2) -> Array:
    """The error at h/2 of a quantity with an error c h^order, from the values at h and h/2."""
    error: Array = np.abs(sharp - rough) / (2**order - 1)
    return error


def paired(
    grid: Grid,
    densities: tuple[Array, Array],
    moments: tuple[results.Series, results.Series],
    lead: tuple[str, ...] = (),
    *,
    order: int = 2,
    combine: bool = True,
    told: str = "",
) -> dict[str, Any]:
    """Density and moments from both solutions, with their error estimates, as series of a dataset.

    Args:
        grid: the nodes that are shown.
        densities: on the grid and on its refinement, both at the nodes of the grid, (T, ..., *shape).
        moments: `results.moments` of both.
        lead: dimensions between time and the nodes.
        order: of the error in the spacing.
        combine: whether the values are extrapolated, or those of the refinement.
        told: what the long names add: " given W⁰".

    """
    (rough, sharp), dims = densities, (*lead, *results.AXES[: grid.dim])
    best = grid.normalised(combined(rough, sharp, grid.dim) if combine else sharp)
    space = "in space (Richardson)"
    series: dict[str, Any] = {
        "density": (dims, grid.show(best), f"density of the law{told}", "1"),
        "error": (dims, grid.show(estimate(rough, sharp, order)), f"error estimate of the density {space}", "1"),
    }
    first, second = moments
    for name, (axes, values, long_name, units) in second.items():
        found = extrapolated(first[name][1], values) if combine else values
        series[name] = (axes, found, f"{long_name}{told}", units)
        gap = estimate(first[name][1], values, order)
        series[f"{name}_error"] = (axes, gap, f"error estimate of the {long_name} {space}", units)
    return series
