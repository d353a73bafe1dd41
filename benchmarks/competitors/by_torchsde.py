"""torchsde as its documentation shows it: `sdeint` with the default BrownianInterval, Euler, a fixed step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..workloads import DT, OU, Case
from . import Competitor, Run, by_torch


def competitors() -> list[Competitor]:
    return [Competitor("torchsde", {"A": ou, "B": attraction, "C": network}, devices=("cpu", "cuda"))]


class Equation(torch.nn.Module):
    """The whole system of a replica as one state: a drift that couples particles is then no concern of the library."""

    noise_type, sde_type = "diagonal", "ito"

    def __init__(self, drift: Any, sigma: float, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.drift, self.sigma, self.particles = drift, sigma, shape

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return self.drift(y.view(self.particles)).view(y.shape)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.full_like(y, self.sigma)


def solved(case: Case, drift: Any) -> Run:
    import torchsde

    start = case.tensor()
    equation = Equation(drift, case.noise, tuple(start.shape))

    def run(steps: int) -> Tensor:
        with torch.no_grad():
            times = torch.tensor([0.0, steps * DT], dtype=start.dtype, device=start.device)
            y = torchsde.sdeint(equation, start.flatten(1), times, dt=DT, method="euler")
        return y[-1].view(start.shape)

    return run


def ou(case: Case) -> Run:
    return solved(case, lambda x: torch.sub(OU.coupling * x.mean(1, keepdim=True), x, alpha=OU.kappa + OU.coupling))


def attraction(case: Case) -> Run:
    return _confined(case, by_torch.Attraction(case))


def network(case: Case) -> Run:
    return _confined(case, by_torch.Network(case))


def _confined(case: Case, drift_: Any) -> Run:
    def drift(x: Tensor) -> Tensor:
        out = torch.empty_like(x[0])
        drift_(x[0], out)
        return out.sub_(x[0], alpha=0.5 * case.noise**2)[None]

    return solved(case, drift)
