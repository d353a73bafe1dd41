"""SiSyPHE: its `Particles.linear_local_average` with a Gaussian kernel, which runs on KeOps."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..workloads import Case
from . import Competitor, Run, by_torch
from .by_keops import pull


def competitors() -> list[Competitor]:
    # Whether it loads is what is asked here.
    import_module("sisyphe.particles")
    return [Competitor("SiSyPHE", {"B": attraction}, devices=("cpu", "cuda"))]


def gaussian(x: Tensor, y: Tensor, L: Tensor, boundary_conditions: Any, **others: Any) -> Any:
    from sisyphe.kernels import squared_distances

    return (-0.5 * squared_distances(x, y, L, boundary_conditions)).exp()


def attraction(case: Case) -> Run:
    from sisyphe.particles import Particles

    def drift_(x: Tensor, out: Tensor) -> None:
        system = Particles(x, 1.0, 1.0, boundary_conditions="open")
        sums = system.linear_local_average(x, torch.ones_like(x[:, :1]), isaverage=False, kernel=gaussian)
        pull(x, torch.cat(sums, dim=1), out)

    return by_torch.euler(case, drift_)
