"""A kinetic step (BAOAB) against the overdamped Euler step of the same force, same N, same d, float32.

A run of one step is subtracted, so that the step is compared and not the start. Positions and velocities are twice the
state; the noise, which is most of a step without a network, is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

import mfsde
from mfsde import EmpiricalMeasure, Energy, Gaussian, MeanFieldLangevin, Neuron
from mfsde.kinetic import Kinetic, KineticLangevin

from .timing import interleaved, row

DT = 0.01
TARGET = 1.3


def one_pass(x: Tensor, mu: EmpiricalMeasure) -> Tensor:
    """-(κ(E X - a) + kX), κ = 0.3, a = 1, k = ½."""
    return torch.sub(0.3 * (1 - mu.mean()), x, alpha=0.5)


def casual(x: Tensor, mu: EmpiricalMeasure) -> Tensor:
    """The same as one writes it first."""
    return -0.3 * (mu.mean() - 1) - 0.5 * x


@dataclass(frozen=True)
class Overdamped:
    """dX = force dt + σ dW."""

    pull: Callable[[Tensor, EmpiricalMeasure], Tensor]
    sigma: float = 1.0

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        return self.pull(x, mu)

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> float:
        return self.sigma

    def initial(self) -> Gaussian:
        return Gaussian([0.0], 1.0)


@dataclass(frozen=True)
class Underdamped(Kinetic):
    """dV = (force - V) dt + σ dW."""

    pull: Callable[[Tensor, EmpiricalMeasure], Tensor]
    gamma: float = 1.0
    sigma: float = 1.0

    def force(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        return self.pull(x, mu)

    def initial_position(self) -> Gaussian:
        return Gaussian([0.0], 1.0)


def risk(n: int, p: int) -> Energy:
    """Squared loss of a tanh network on n Gaussian inputs."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(n, p, generator=generator)
    return mfsde.risk(Neuron("tanh"), "squared", inputs, torch.sign(inputs[:, 0] * inputs[:, 1]))


@dataclass(frozen=True)
class Network(MeanFieldLangevin):
    """Mean-field Langevin training."""

    inputs: int = 16
    data: int = 200
    sigma: float = 0.2

    @cached_property
    def energy(self) -> Energy:
        return risk(self.data, self.inputs)

    def confinement_gradient(self, x: Tensor) -> Tensor:
        return x

    def initial(self) -> Gaussian:
        return Gaussian([0.0] * (self.inputs + 1), 1.0)


@dataclass(frozen=True)
class KineticNetwork(KineticLangevin):
    """The same with inertia: σ²/(2γ) is the other's σ²/2."""

    inputs: int = 16
    data: int = 200
    gamma: float = 1.0
    sigma: float = 0.2

    @cached_property
    def energy(self) -> Energy:
        return risk(self.data, self.inputs)

    def confinement_gradient(self, x: Tensor) -> Tensor:
        return x

    def initial_position(self) -> Gaussian:
        return Gaussian([0.0] * (self.inputs + 1), 1.0)


# case, overdamped, kinetic, N, steps
CASES: list[tuple[str, Any, Any, int, int]] = [
    ("quadratic force in one pass", Overdamped(one_pass), Underdamped(one_pass), 100_000, 300),
    ("quadratic force in one pass", Overdamped(one_pass), Underdamped(one_pass), 1_000_000, 40),
    ("quadratic force in four", Overdamped(casual), Underdamped(casual), 100_000, 300),
    ("quadratic force in four", Overdamped(casual), Underdamped(casual), 1_000_000, 40),
    ("two-layer network, d = 17, 200 data", Network(), KineticNetwork(), 1000, 300),
]


def rows() -> list[dict]:
    return [compared(*case) for case in CASES]


def compared(name: str, overdamped: Any, kinetic: Any, n: int, steps: int) -> dict:
    calls = {}
    for scenario, method in ((overdamped, "euler"), (kinetic, "baoab")):
        for count in (steps, 1):
            calls[f"{method} {count}"] = partial(run, scenario, method, n, count)
    seconds = interleaved(calls, repeats=9)
    scale = 1e9 / (n * (steps - 1))
    euler, baoab = ((seconds[f"{m} {steps}"] - seconds[f"{m} 1"]) * scale for m in ("euler", "baoab"))
    case = f"N = {n:,} float32, {name}"
    return row("kinetic step", case, baoab, "ns/particle-step", f"euler {euler:.2f}", baoab / euler, TARGET)


def run(scenario: Any, method: str, n: int, steps: int) -> None:
    mfsde.simulate(scenario, n_particles=n, horizon=steps * DT, dt=DT, seed=1, keep_particles=0, method=method)
