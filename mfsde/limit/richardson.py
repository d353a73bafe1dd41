"""Two solutions, on a grid and on its refinement, into one, and into an estimate of its error."""

from __future__ import annotations

import numpy as np

from .grid import Array

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
