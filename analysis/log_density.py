"""Log densities known up to a constant, and scores, at numpy points: whichever library they are written in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mfsde.energy import gradient
from mfsde.measure import Law

Array = np.ndarray

DROP = 45.0  # what lies below e^-DROP of the highest density is left out


@dataclass(frozen=True)
class LogDensity:
    """A log density f and its gradient on numpy points, whichever library it is written in."""

    function: Callable[[Any], Any]
    is_normalised: bool = False

    @staticmethod
    def of(log_density: Any) -> LogDensity:
        """Of a Law, or of a function (..., d) -> (...) in torch or numpy."""
        if isinstance(log_density, Law):
            if not hasattr(log_density, "log_prob"):
                raise ValueError(f"a {type(log_density).__name__} has no density; expected a Law with log_prob.")
            return LogDensity(log_density.log_prob, is_normalised=True)
        if not callable(log_density):
            raise TypeError(
                f"log_density is a {type(log_density).__name__}; expected a function (..., d) -> (...) or a Law."
            )
        return LogDensity(log_density)

    def __call__(self, x: Array) -> Array:
        """f(x).    (..., d) -> (...)."""
        values = _evaluated(self.function, x)
        if values.shape != x.shape[:-1]:
            raise ValueError(
                f"log_density returned shape {values.shape} for points {x.shape}; expected {x.shape[:-1]}: sum over "
                "the last axis."
            )
        return values

    def gradient(self, x: Array) -> Array:
        """∇f(x), by automatic differentiation, or by central differences of a numpy function."""
        try:
            found: Array = gradient(self.function, torch.from_numpy(x)).numpy()
            return found
        except (TypeError, AttributeError, RuntimeError):
            return self._differences(x)

    def _differences(self, x: Array) -> Array:
        step = 6e-6 * (1 + np.abs(x))
        slopes = np.empty_like(x)
        for k in range(x.shape[-1]):
            e = np.zeros_like(x)
            e[..., k] = step[..., k]
            slopes[..., k] = (self(x + e) - self(x - e)) / (2 * step[..., k])
        return slopes


def _evaluated(function: Callable[[Any], Any], x: Array) -> Array:
    """A function of torch points, or else of numpy points."""
    try:
        with torch.no_grad():
            values = function(torch.from_numpy(np.ascontiguousarray(x)))
    except (TypeError, AttributeError, RuntimeError) as in_torch:
        try:
            values = function(x)
        except (TypeError, AttributeError, RuntimeError) as in_numpy:
            raise TypeError(
                f"log_density fails at torch points in float64 ({in_torch}) and at numpy points ({in_numpy}); expected "
                "a function (..., d) -> (...) of either. A float32 network takes them after .double()."
            ) from in_torch
    return np.asarray(values.numpy() if isinstance(values, torch.Tensor) else values, dtype=np.float64)


def depends_on_time(given: Any, t: float) -> bool:
    """Whether this is t ↦ Law, rather than a function of points."""
    if isinstance(given, Law) or not callable(given):
        return False
    # Functions of points may fail at a number in any way, or warn.
    try:
        with np.errstate(all="ignore"):
            return isinstance(given(t), Law)
    except Exception:
        return False


def score_function(given: Any) -> Callable[[Array], Array]:
    """∇log of a law that is given by its score, by its log density, or as a Law.    (..., d) -> (..., d)."""
    if isinstance(given, Law) or not callable(given):
        return LogDensity.of(given).gradient

    def score(x: Array) -> Array:
        values = _evaluated(given, x)
        if values.shape == x.shape[:-1]:
            return LogDensity(given).gradient(x)
        if values.shape != x.shape:
            raise ValueError(
                f"a score or log density returned shape {values.shape} for points {x.shape}; expected {x.shape} "
                f"(a score) or {x.shape[:-1]} (a log density)."
            )
        return values

    return score
