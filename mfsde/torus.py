"""Tori: states some of whose components are periodic."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Period = float | Sequence[float | None] | None


def shortest(difference: Tensor, period: Period) -> Tensor:
    """The representative of a difference on the torus that lies in [-period/2, period/2]."""
    if period is None:
        return difference
    p = difference.new_tensor(period_lengths(period, difference.shape[-1]))
    turns = torch.round(difference / p)
    return difference - torch.where(torch.isinf(p), torch.zeros_like(p), p) * turns


def period_lengths(period: Period, dim: int) -> list[float]:
    """One length per component, infinite where the component lives on a line.

    Raises:
        ValueError: the number of components differs, or a length is not positive.

    """
    parts = list(period) if isinstance(period, (Sequence, Tensor)) else [period] * dim
    lengths = [math.inf if p is None else float(p) for p in parts]
    if len(lengths) != dim or not all(p > 0 for p in lengths):
        raise ValueError(
            f"period = {period!r} does not fit dimension {dim}: expected one positive length (or None on a line) per "
            "component, or one number for all."
        )
    return lengths
