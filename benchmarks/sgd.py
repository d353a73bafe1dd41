"""Stochastic gradient descent of a two-layer network, N = 800, d = 320, one sample a step: steps, and their parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

import mfsde
from mfsde.draws import Draws
from mfsde.scenarios.online_gaussians import OnlineGaussians

from .timing import interleaved, row

N_PARTICLES, N_INPUTS, N_DATA, DT = 800, 320, 10_000, 2e-6
STEPS, CALLS = 2000, 500
TARGET = 200.0  # µs, 5000 steps a second


@dataclass(frozen=True)
class Network(mfsde.NoisySGD):
    """A ReLU network on fixed data: the gradient in output weights too."""

    @cached_property
    def energy(self) -> mfsde.Energy:
        inputs = torch.randn(N_DATA, N_INPUTS, generator=torch.Generator().manual_seed(0))
        return mfsde.risk(mfsde.Neuron("relu"), "squared", inputs, torch.sin(inputs[:, 0]))

    def initial(self) -> mfsde.Gaussian:
        return mfsde.Gaussian([0.0] * (N_INPUTS + 1), 1.0 / N_INPUTS)


ONLINE, NETWORK = OnlineGaussians(data_dim=N_INPUTS), Network()


class ByHand:
    """The steps of the first scenario on one tensor, each array a buffer, samples from torch's generator."""

    def __init__(self) -> None:
        self.w = torch.randn(N_PARTICLES, N_INPUTS) * (ONLINE.scale / N_INPUTS**0.5)
        self.hidden, self.above = torch.empty(N_PARTICLES), torch.empty(N_PARTICLES)
        self.value, self.slope = torch.empty(N_PARTICLES), torch.empty(N_PARTICLES)
        self.x = torch.empty(N_INPUTS)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            y = 2.0 * float(torch.rand(()) < 0.5) - 1.0
            self.x.normal_().mul_(1 + y * ONLINE.delta)
            torch.mv(self.w, self.x, out=self.hidden)
            self.value.fill_(ONLINE.left_value)
            self.slope.zero_()
            for t, c in zip(ONLINE.knots, ONLINE.jumps, strict=True):
                torch.sub(self.hidden, t, out=self.above).relu_()
                self.value.add_(self.above, alpha=c)
                self.slope.add_(self.above.sign_(), alpha=c)
            self.slope.mul_(y - self.value.mean())
            self.w.addr_(self.slope, self.x, alpha=DT)


def simulate(scenario: object, steps: int) -> None:
    mfsde.simulate(scenario, n_particles=N_PARTICLES, horizon=steps * DT, dt=DT, seed=1, method="sgd", keep_particles=0)


def parts() -> dict[str, Callable[[], object]]:
    """The parts of a step of the first scenario, one by one."""
    w = ONLINE.initial().from_variates(torch.randn(1, N_PARTICLES, N_INPUTS))
    mu, noise = mfsde.EmpiricalMeasure(w), mfsde.Noise(1)
    x, y = ONLINE.sample(Draws(noise, 0, 1, w.dtype, w.device))
    hidden = torch.bmm(w, x.mT)
    drift = ONLINE.sampled_drift(0.0, w, mu, (x, y))
    return {
        "sample": lambda: ONLINE.sample(Draws(noise, 0, 1, w.dtype, w.device)),
        "w·x": lambda: torch.bmm(w, x.mT),
        "σ and σ'": lambda: ONLINE.activation(hidden),
        "product of rank one": lambda: torch.mul(hidden, x),
        "update": lambda: w.add_(drift, alpha=DT),
        "sampled drift, whole": lambda: ONLINE.sampled_drift(0.0, w, mu, (x, y)),
    }


def repeated(call: Callable[[], object]) -> Callable[[], None]:
    def calls() -> None:
        for _ in range(CALLS):
            call()

    return calls


def rows() -> list[dict]:
    with torch.no_grad():
        hand, pieces = ByHand(), parts()
        seconds = interleaved(
            {
                "hand": lambda: hand.run(STEPS),
                "hand, start": lambda: hand.run(1),
                "online": lambda: simulate(ONLINE, STEPS),
                "online, start": lambda: simulate(ONLINE, 1),
                "network": lambda: simulate(NETWORK, STEPS),
                "network, start": lambda: simulate(NETWORK, 1),
            },
            repeats=5,
        )
        part = interleaved({name: repeated(call) for name, call in pieces.items()})
    step = {
        name: 1e6 * (seconds[name] - seconds[f"{name}, start"]) / (STEPS - 1) for name in ("hand", "online", "network")
    }
    where, target = f"N = {N_PARTICLES}, d = {N_INPUTS}", f"{TARGET:g}, 5000 steps/s"
    online, network, by_hand = step["online"], step["network"], f"by hand {step['hand']:.0f}"
    found = [
        row("sgd", f"{where}, fresh samples", online, "µs/step", target, online / TARGET, 1.0),
        row("sgd", f"{where}, fresh samples", online, "µs/step", by_hand, online / step["hand"], None),
        row("sgd", f"{where}, ReLU and output weights", network, "µs/step", target, network / TARGET, None),
    ]
    for name, value in part.items():
        each = 1e6 * value / CALLS
        found.append(row("sgd", f"  {name}", each, "µs", "of a step", each / step["online"], None))
    return found
