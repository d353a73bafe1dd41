"""Births and deaths at N = 1e6, d = 1, float32: the whole reaction against the transport step that it follows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import mfsde
from mfsde import birth_death
from mfsde.clock import Clock
from mfsde.euler import euler
from mfsde.model import Equation

from .timing import interleaved, row

N = 1_000_000


@dataclass(frozen=True)
class Quadratic:
    """V = x²/2: transport along -∇V with noise, births and deaths at αV."""

    alpha: float = 1.0
    sigma: float = 1.0

    def drift(self, t: float, x: Tensor, mu: mfsde.EmpiricalMeasure) -> Tensor:
        return -x

    def diffusion(self, t: float, x: Tensor, mu: mfsde.EmpiricalMeasure) -> float:
        return self.sigma

    def initial(self) -> mfsde.Gaussian:
        return mfsde.Gaussian([0.0], 0.5)

    def birth_death_rate(self, t: float, x: Tensor, mu: mfsde.EmpiricalMeasure) -> Tensor:
        return x[..., 0].square().mul_(0.5 * self.alpha)


# dt, target
CASES = [(0.01, 1.5), (0.05, None)]


def rows() -> list[dict]:
    return [compared(*case) for case in CASES]


def compared(dt: float, target: float | None) -> dict:
    """Both act on one state in turn, which stays at equilibrium; the step in the key goes on."""
    x = 0.7 * torch.randn(1, N, 1, generator=torch.Generator().manual_seed(0))
    equation, noise, clock = Equation(Quadratic(), x), mfsde.Noise(1), Clock(dt)
    equation.trace()
    step, events = 0, []

    def transport() -> None:
        nonlocal step
        step += 1
        euler(equation, clock, noise, step, x)

    def reaction() -> None:
        events.append(birth_death.jumps(equation, step * dt, dt, noise, step, x))

    seconds = interleaved({"transport": transport, "reaction": reaction}, repeats=41)
    case = f"N = {N:,}, {int(torch.stack(events).double().mean()):,} events a step"
    reference = f"Euler step {1e3 * seconds['transport']:.2f}"
    value, ratio = 1e3 * seconds["reaction"], seconds["reaction"] / seconds["transport"]
    return row("births and deaths", case, value, "ms/step", reference, ratio, target)
