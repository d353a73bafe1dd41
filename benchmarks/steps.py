"""Mean-field OU, Euler, d = 1: ns per particle-step of `simulate` against a hand-written in-place torch loop."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import mfsde
from mfsde.scenarios import MeanFieldOU

from .timing import interleaved, row

DT = 0.01


@dataclass(frozen=True)
class Casual(MeanFieldOU):
    """The drift as one writes it first: three operations, three temporaries."""

    def drift(self, t: float, x: Tensor, mu: mfsde.EmpiricalMeasure) -> Tensor:
        return -self.kappa * x - self.coupling * (x - mu.mean())


def torch_loop(replicas: int, n: int, steps: int, dtype: torch.dtype) -> None:
    """The same physics by hand: `normal_` into a buffer, fused updates in place, no saving."""
    ou = MeanFieldOU()
    x = torch.randn(replicas, n, 1, dtype=dtype)
    z = torch.empty_like(x)
    shrink, pull, noise = 1 - (ou.kappa + ou.coupling) * DT, ou.coupling * DT, ou.sigma * math.sqrt(DT)
    for _ in range(steps):
        z.normal_()
        mean = x.mean(-2, keepdim=True)
        x.mul_(shrink).add_(mean, alpha=pull).add_(z, alpha=noise)


def run(scenario: MeanFieldOU, replicas: int, n: int, steps: int, dtype: torch.dtype) -> None:
    mfsde.simulate(
        scenario, n_particles=n, n_replicas=replicas, horizon=steps * DT, dt=DT, seed=1, keep_particles=0, dtype=dtype
    )


# replicas, N, steps, dtype, target of the one-pass drift, target of the casual one
CASES = [
    (1, 100_000, 300, torch.float32, 0.85, 1.15),
    (1, 1_000_000, 40, torch.float32, 0.85, 1.15),
    (1, 100_000, 150, torch.float64, 0.35, None),
    (1, 1_000_000, 20, torch.float64, 0.35, None),
    (64, 1_000, 300, torch.float32, 1.0, None),
]


def rows() -> list[dict]:
    return [found for case in CASES for found in compared(*case)]


def compared(
    replicas: int, n: int, steps: int, dtype: torch.dtype, target: float, casual_target: float | None
) -> list[dict]:
    # A run of one step is subtracted: what is compared is the step, not the start.
    calls = {}
    for count, suffix in ((steps, ""), (1, ", start")):
        calls[f"loop{suffix}"] = partial(torch_loop, replicas, n, count, dtype)
        calls[f"one pass{suffix}"] = partial(run, MeanFieldOU(), replicas, n, count, dtype)
        calls[f"casual{suffix}"] = partial(run, Casual(), replicas, n, count, dtype)
    seconds = interleaved(calls)
    scale = 1e9 / (replicas * n * (steps - 1))
    step = {name: (seconds[name] - seconds[f"{name}, start"]) * scale for name in ("loop", "one pass", "casual")}
    kind = str(dtype).removeprefix("torch.")
    where = f"{replicas} × N = {n:,} {kind}" if replicas > 1 else f"N = {n:,} {kind}"
    reference = f"torch loop {step['loop']:.2f}"
    found = []
    for name, drift, bound in (("one pass", "one-pass", target), ("casual", "three-operation", casual_target)):
        ratio = step[name] / step["loop"]
        found.append(
            row("mean-field OU", f"{where}, {drift} drift", step[name], "ns/particle-step", reference, ratio, bound)
        )
    return found
