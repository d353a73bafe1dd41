"""Positions and velocities: a state of 2d components, d positions and then d velocities."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from .measure import EmpiricalMeasure
from .torus import period_lengths


def law_of_positions(mu: EmpiricalMeasure, points: Tensor | None = None) -> EmpiricalMeasure:
    """The marginal law of positions under a law of states, on its torus.

    Args:
        mu: a measure on R^{2d}.
        points: its positions (..., N, d), where they are at hand.

    """
    d = half_dimension(mu.points, "law_of_positions")
    points = mu.points[..., :d].contiguous() if points is None else points
    period = position_period(mu.period, d)
    if mu._is_given:
        return EmpiricalMeasure.given(points, mu.weights, period)
    return EmpiricalMeasure.signed(points, None if mu.is_uniform else mu.weights, period, mu.key)


def position_period(period: Any, d: int) -> list[float | None] | None:
    """The period of positions from that of states: d lengths (or None), then None for every velocity.

    Raises:
        ValueError: velocities on a circle.

    """
    if period is None:
        return None
    lengths = period_lengths(period, 2 * d)
    if any(math.isfinite(length) for length in lengths[d:]):
        raise ValueError(
            f"period = {period!r} puts velocities on a circle; give one entry per component of the state, positions "
            f"first, and None for the {d} velocities."
        )
    return [length if math.isfinite(length) else None for length in lengths[:d]]


def half_dimension(x: Tensor, name: str) -> int:
    """The number d of positions in a state of 2d components.    ValueError if it is odd."""
    d, odd = divmod(x.shape[-1], 2)
    if odd or d == 0:
        raise ValueError(
            f"{name}: a kinetic state has d positions and d velocities; got {x.shape[-1]} components. initial() must "
            "be a law of both; initial_position() is that of positions alone."
        )
    return d
