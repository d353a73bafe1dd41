"""Normalising constants: log Z = log ∫ e^f, with an error, of densities known up to a constant."""

from __future__ import annotations

from typing import Any

import numpy as np

from mfsde.measure import period_lengths

from . import annealing, quadrature
from .log_density import Density
from .particles import Lengths

TOLERANCE = {1: 1e-10, 2: 1e-8}
MONTE_CARLO_TOLERANCE = 0.02


def normalise(
    log_density: Any, d: int, *, period: Any = None, tolerance: float | None = None, seed: int = 0
) -> tuple[float, float]:
    """Log Z = log ∫ e^f dx, with its error.

    In d <= 2 adaptive Gauss-Kronrod quadrature in x = c + s sinh(u) around the highest mode, on a domain found by the
    decay of f: algebraic tails are integrated too. Above, annealed importance sampling with resampling from a Gaussian
    to the target in adaptive stages, particles moved by MALA, neighbouring stages bridged by the optimal estimator;
    twice, the second time from the Gaussian fitted to the first result, which must agree with it. The error is then one
    standard error over 8 independent systems. Modes are searched by ascents from 0 and around it up to distance 100:
    move a density that lives elsewhere.

    Args:
        log_density: f, (..., d) -> (...), torch or numpy; or a Law, of which log Z = 0.
        d: dimension.
        period: of a torus, one length or one per component; d <= 2.
        tolerance: largest error of log Z: 1e-10 in d = 1, 1e-8 in d = 2, 0.02 above.
        seed: of the sampling in d > 2.

    Returns:
        log Z and its error: the quadrature's estimate, or the standard error.

    Raises:
        ValueError: e^f is not integrable, or f is not a number somewhere.
        RuntimeError: the error exceeds the tolerance.

    Source: Bennett (1976); Meng, Wong (1996), equation 4.1; Del Moral, Doucet, Jasra, Sequential Monte Carlo samplers
    (2006); Roberts, Tweedie (1996) for MALA.

    """
    lengths = None if period is None else tuple(period_lengths(period, d))
    density = Density.of(log_density)
    return (0.0, 0.0) if density.is_normalised else log_constant(density, d, lengths, tolerance, seed)


def log_constant(density: Density, d: int, lengths: Lengths, tolerance: float | None, seed: int) -> tuple[float, float]:
    """The same by quadrature or by annealing; refused where the error exceeds the tolerance."""
    if d > 2 and lengths is not None and np.isfinite(lengths).any():
        raise ValueError(f"normalise: no method for a torus in dimension {d}; pass log_z.")
    allowed = TOLERANCE.get(d, MONTE_CARLO_TOLERANCE) if tolerance is None else tolerance
    found, error = (
        quadrature.log_constant(density, d, lengths, allowed)
        if d <= 2
        else annealing.log_constant(density, d, seed, allowed)
    )
    if not error <= allowed:
        raise RuntimeError(
            f"normalise: log Z = {found:.6g} has an error of {error:.2g}, more than the tolerance {allowed:g}. Pass "
            "log_z where it is known, or state a larger tolerance."
        )
    return found, error
