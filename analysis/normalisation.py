"""Normalising constants: log Z = log ∫ e^f, with an error, of densities known up to a constant."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mfsde.torus import period_lengths

from . import annealing, quadrature
from .log_density import LogDensity
from .particles import Lengths

PARTS = 8  # of given points, along the first component, each with its own best
TOLERANCE = {1: 1e-10, 2: 1e-8}
MONTE_CARLO_TOLERANCE = 0.02

Array = np.ndarray


def normalise(
    log_density: Any, d: int, *, period: Any = None, tolerance: float | None = None, seed: int = 0, near: Any = None
) -> tuple[float, float]:
    """Log Z = log ∫ e^f dx, with its error.

    In d <= 2 adaptive Gauss-Kronrod quadrature in x = c + s sinh(u) around the highest mode, on a domain found by the
    decay of f: algebraic tails are integrated too. Above, annealed importance sampling with resampling from a Gaussian
    to the target in adaptive stages, particles moved by MALA, neighbouring stages bridged by the optimal estimator;
    twice, the second time from the Gaussian fitted to the first result, which must agree with it. The error is then one
    standard error over 8 independent systems.

    Modes are searched on a grid that is fine at 0 and reaches 1e6, of 4001 points in d = 1 and 241² in d = 2: one at
    distance r from 0 that is narrower than about r/100 in d = 1, r/6 in d = 2, may be missed, and the stated error does
    not know. Above, by ascents from 0 and from 24 random points up to distance 100. Pass `near` points where there may
    be others, or move the density.

    Args:
        log_density: f, (..., d) -> (...), torch or numpy; or a Law, of which log Z = 0.
        d: dimension.
        period: of a torus, one length or one per component; d <= 2.
        tolerance: largest error of log Z: 1e-10 in d = 1, 1e-8 in d = 2, 0.02 above.
        seed: of the sampling in d > 2.
        near: points (n, d), such as a sample of a law like this one; modes are looked for from the best of them, too.

    Returns:
        log Z and its error: the quadrature's estimate, or the standard error.

    Raises:
        ValueError: e^f is not integrable, or f is not a number somewhere.
        RuntimeError: the error exceeds the tolerance.

    Source: Bennett (1976); Meng, Wong (1996), equation 4.1; Del Moral, Doucet, Jasra, Sequential Monte Carlo samplers
    (2006); Roberts, Tweedie (1996) for MALA.

    """
    lengths = None if period is None else tuple(period_lengths(period, d))
    density = LogDensity.of(log_density)
    if density.is_normalised:
        return 0.0, 0.0
    points = np.empty((0, d)) if near is None else np.asarray(near, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != d or not np.isfinite(points).all():
        raise ValueError(f"normalise: near has shape {points.shape}; expected finite points (n, {d}).")
    return log_constant(density, d, lengths, tolerance, seed, points)[:2]


def log_constant(
    density: LogDensity, d: int, lengths: Lengths, tolerance: float | None, seed: int, near: Array
) -> tuple[float, float, float]:
    """The same, and the highest f that was found; refused where the error exceeds the tolerance."""
    if d > 2 and lengths is not None and np.isfinite(lengths).any():
        raise ValueError(f"normalise: no method for a torus in dimension {d}; pass log_z.")
    allowed = TOLERANCE.get(d, MONTE_CARLO_TOLERANCE) if tolerance is None else tolerance
    starts = _best(density, near)
    found, error, highest = (
        quadrature.log_constant(density, d, lengths, allowed, starts)
        if d <= 2
        else annealing.log_constant(density, d, seed, allowed, starts)
    )
    if not error <= allowed:
        raise RuntimeError(
            f"normalise: log Z = {found:.6g} has an error of {error:.2g}, more than the tolerance {allowed:g}. Pass "
            "log_z where it is known, or state a larger tolerance."
        )
    return found, error, highest


def _best(density: LogDensity, near: Array) -> Array:
    """The points of highest density in the whole and in a few parts of them.    (n, d) -> (at most PARTS + 1, d)."""
    if not len(near):
        return near
    values = np.nan_to_num(density(near), nan=-math.inf)
    order = np.argsort(near[:, 0])
    chosen = {int(values.argmax())} | {
        int(part[values[part].argmax()]) for part in np.array_split(order, PARTS) if len(part)
    }
    starts: Array = near[sorted(k for k in chosen if math.isfinite(values[k]))]
    return starts
