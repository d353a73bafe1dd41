"""mfsde itself, through `simulate`."""

from __future__ import annotations

import inspect
from importlib.util import find_spec
from typing import Any

import torch

import mfsde
import mfsde.pairwise

from ..steps import Casual
from ..workloads import DT, OU, Case, started
from . import Competitor, Run

BOTH = ("cpu", "cuda")


def simulated(scenario: Any, case: Case, **settings: Any) -> Run:
    of = started(scenario, case)

    def run(steps: int, keep: bool = False) -> torch.Tensor | None:
        found = mfsde.simulate(
            of, n_particles=case.n, n_replicas=case.replicas, horizon=steps * DT, dt=DT, seed=1,
            keep_particles=None if keep else 0, dtype=case.torch_dtype, device=case.device, method=case.of.method,
            **settings,
        )  # fmt: skip
        return torch.as_tensor(found.position.values[-1]) if keep else None

    return run


def plain(case: Case, **settings: Any) -> Run:
    return simulated(case.of.scenario(case), case, **settings)


def casual(case: Case) -> Run:
    return simulated(Casual(OU.kappa, OU.coupling, case.noise), case)


def compiled(case: Case) -> Run:
    return plain(case, compile=True)


def competitors() -> list[Competitor]:
    found = [
        Competitor("mfsde", dict.fromkeys("ACDE", plain), devices=BOTH),
        Competitor("mfsde, drift in three operations", {"A": casual}, devices=BOTH),
    ]
    if "compile" in inspect.signature(mfsde.simulate).parameters:
        found.append(Competitor("mfsde, compiled", {"A": compiled}, devices=BOTH))
    return found + [pairwise(name, *rest) for name, *rest in strategies()]


def strategies() -> list[tuple[str, Any, float | None]]:
    """Name, strategy, and the tolerance that it declares for its drift; None for a random one."""
    strategies = mfsde.pairwise
    # exp(-|z|²/2) is the characteristic function of N(0, I).
    spectrum = mfsde.Gaussian([0.0, 0.0], 1.0)
    found = [
        ("mfsde blocked", strategies.Blocked(), 2e-4),
        ("mfsde compiled", strategies.Compiled(), 2e-4),
        ("mfsde grid", strategies.Grid(tolerance=1e-3), 1e-3),
        ("mfsde fourier", strategies.Fourier(spectrum), None),
        ("mfsde batches", strategies.Batches(size=64), None),
    ]
    return [*found, ("mfsde keops", strategies.KeOps(), 2e-4)] if find_spec("pykeops") else found


def pairwise(name: str, strategy: Any, tolerance: float | None) -> Competitor:
    def prepare(case: Case) -> Run:
        return simulated(case.of.scenario(case, strategy), case)

    return Competitor(name, {"B": prepare}, devices=BOTH, tolerance=tolerance, strategy=strategy)
