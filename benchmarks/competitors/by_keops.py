"""KeOps: the pairs as a LazyTensor, one reduction a step for the sums of e and of e·x."""

from __future__ import annotations

import torch
from torch import Tensor

from ..workloads import Case
from . import Competitor, Run, by_torch


def competitors() -> list[Competitor]:
    import pykeops

    pykeops.set_verbose(False)
    return [Competitor("KeOps", {"B": attraction}, devices=("cpu", "cuda"))]


def attraction(case: Case) -> Run:
    from pykeops.torch import LazyTensor

    def drift_(x: Tensor, out: Tensor) -> None:
        apart = LazyTensor(x[:, None, :]) - LazyTensor(x[None, :, :])
        pull(x, (-0.5 * (apart**2).sum(-1)).exp() @ torch.cat([x, torch.ones_like(x[:, :1])], dim=1), out)

    return by_torch.euler(case, drift_)


def pull(x: Tensor, sums: Tensor, out: Tensor) -> None:
    """Σ_j e_ij (x_j - x_i)/N from Σ_j e_ij x_j and Σ_j e_ij."""
    torch.addcmul(sums[:, :2], x, sums[:, 2:], value=-1, out=out).div_(len(x))
