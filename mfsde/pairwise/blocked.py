"""All pairs in blocks of rows, by the kernel's own torch operations: the reference of every other strategy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .kernel import Kernel, Pairs, Strategy

# A block of rows holds at most this many floats of differences (16 MiB in float32).
PAIRWISE_FLOATS = 1 << 22


@dataclass(frozen=True)
class Blocked(Strategy):
    """Σ_j w_j K(x_i - y_j) row block by row block: O(N²) work, O(N) memory, no tensor of all pairs.

    Under automatic differentiation each block is evaluated once more in the backward pass.
    """

    exact: ClassVar[bool] = True
    differentiable: ClassVar[bool] = True

    def sums(self, kernel: Kernel, pairs: Pairs) -> Tensor:
        """(R, M, *out)."""
        rows = max(1, PAIRWISE_FLOATS // max(1, pairs.points.numel()))
        parts = [_rows(kernel, pairs, slice(k, k + rows)) for k in range(0, pairs.x.shape[1], rows)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _rows(kernel: Kernel, pairs: Pairs, rows: slice) -> Tensor:
    if torch.is_grad_enabled():
        from torch.utils.checkpoint import checkpoint

        def again(x: Tensor, points: Tensor, weights: Tensor) -> Tensor:
            return _sum(kernel, Pairs(x, points, weights, pairs.period, pairs.own), rows)

        return checkpoint(again, pairs.x, pairs.points, pairs.weights, use_reentrant=False)  # type: ignore[no-any-return]
    return _sum(kernel, pairs, rows)


def _sum(kernel: Kernel, pairs: Pairs, rows: slice) -> Tensor:
    difference, weights = pairs.differences(rows), pairs.weights.unsqueeze(-2)
    if pairs.own is not None:
        # A kernel singular at 0 must not see a 0, not even behind a mask: its gradient would be NaN.
        own = pairs.own[rows].unsqueeze(-1) == torch.arange(pairs.points.shape[1], device=pairs.x.device)
        difference = torch.where(own.unsqueeze(-1), torch.ones_like(difference), difference)
        weights = torch.where(own, torch.zeros_like(weights), weights)
    values = kernel(difference)
    return (values * weights.reshape(weights.shape + (1,) * (values.ndim - 3))).sum(2)
