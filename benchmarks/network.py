"""Two-layer network, n = 1000 data, d = 20, N = 1e4: a step of `simulate` against a preallocated closed form."""

from __future__ import annotations

import math

import torch

import mfsde

from .timing import interleaved, row
from .workloads import N_DATA, N_INPUTS, Network, network_data

N_PARTICLES, DT, STEPS = 10_000, 0.01, 20


class ClosedForm:
    """The same step by hand: every array allocated once, the gradient written out."""

    def __init__(self) -> None:
        self.z, self.y = (torch.from_numpy(a) for a in network_data())
        self.x = torch.randn(N_PARTICLES, N_INPUTS + 1)
        self.hidden = torch.empty(N_PARTICLES, N_DATA)
        self.f, self.r = torch.empty(N_DATA), torch.empty(N_DATA)
        self.weighted, self.pulled = torch.empty(N_DATA, N_INPUTS), torch.empty(N_PARTICLES, N_INPUTS)
        self.drift, self.noise = torch.empty_like(self.x), torch.empty_like(self.x)

    def run(self, steps: int) -> None:
        sigma, p = 0.1, N_INPUTS
        for _ in range(steps):
            alpha, beta = self.x[:, :p], self.x[:, p]
            torch.mm(alpha, self.z.T, out=self.hidden).tanh_()
            torch.mv(self.hidden.T, beta, out=self.f).div_(N_PARTICLES)
            torch.sub(self.f, self.y, out=self.r).div_(N_DATA)
            self.drift[:, p] = self.hidden @ self.r
            torch.mul(self.z, self.r[:, None], out=self.weighted)
            self.hidden.square_().neg_().add_(1)
            torch.mm(self.hidden, self.weighted, out=self.pulled)
            torch.mul(self.pulled, beta[:, None], out=self.drift[:, :p])
            self.drift.add_(self.x, alpha=0.5 * sigma**2)
            self.noise.normal_()
            self.x.sub_(self.drift, alpha=DT).add_(self.noise, alpha=sigma * math.sqrt(DT))


def rows() -> list[dict]:
    closed = ClosedForm()
    network = Network()

    def run(steps: int) -> None:
        mfsde.simulate(network, n_particles=N_PARTICLES, horizon=steps * DT, dt=DT, seed=1, keep_particles=0)

    seconds = interleaved(
        {
            "closed": lambda: closed.run(STEPS),
            "closed, start": lambda: closed.run(1),
            "ours": lambda: run(STEPS),
            "ours, start": lambda: run(1),
        }
    )
    step = {name: 1e3 * (seconds[name] - seconds[f"{name}, start"]) / (STEPS - 1) for name in ("closed", "ours")}
    case = f"n = {N_DATA}, d = {N_INPUTS + 1}, N = {N_PARTICLES:,}"
    reference = f"closed-form torch {step['closed']:.2f}"
    return [row("two-layer network", case, step["ours"], "ms/step", reference, step["ours"] / step["closed"], 1.1)]
