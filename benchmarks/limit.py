"""What the deterministic limit costs, and how accurate it is, against the targets of its accuracy."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from mfsde.limit import fokker_planck, gibbs
from mfsde.scenarios import DoubleWell, MeanFieldOU

from .timing import row

REPEATS = 3
PLANE = 129  # nodes on an axis; the solution is computed on 257 × 257 too


def rows() -> list[dict]:
    return [*line(), *rest(), *plane()]


def timed(call: Callable[[], object], repeats: int = REPEATS) -> tuple[float, object]:
    """Median seconds, and what came out."""
    seconds, found = [], None
    for _ in range(repeats):
        began = time.perf_counter()
        found = call()
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds)), found


def bounded(case: str, value: float, unit: str, target: float, reference: str) -> dict:
    """A row whose value itself is bounded."""
    return row("limit", case, value, unit, reference, value / target, 1.0)


def line() -> list[dict]:
    seconds, limit = timed(lambda: fokker_planck(DoubleWell(), None, [5.0]))
    best = fokker_planck(DoubleWell(), None, [5.0], n_nodes=2049, rtol=1e-11, atol=1e-15)
    moments = max(
        abs(float(limit[name].values.ravel()[0] - best[name].values.ravel()[0])) for name in ("mean", "covariance")
    )
    ou = MeanFieldOU()
    exact = fokker_planck(ou, None, [0.5, 4.0])
    gap = max(abs(float(exact["mean"][k, 0]) - float(ou.limit(t).mean[0])) for k, t in enumerate((0.5, 4.0)))
    return [
        bounded("Desai-Zwanzig to t = 5: time (target 5 s)", seconds, "s", 5.0, "1-D Fokker-Planck"),
        bounded("Desai-Zwanzig to t = 5: moments (target 1e-6)", moments, "", 1e-6, "4 × the nodes, rtol 1e-11"),
        bounded("mean-field OU: mean (target 1e-6)", gap, "", 1e-6, "closed form"),
    ]


def rest() -> list[dict]:
    seconds, law = timed(lambda: gibbs(DoubleWell()), 7)
    best = gibbs(DoubleWell(), n_nodes=2049)
    gap = abs(float(law.mean[0]) - float(best.mean[0]))
    return [
        bounded("Gibbs fixed point: time (target 0.5 s)", seconds, "s", 0.5, "Desai-Zwanzig, 513 nodes"),
        bounded("Gibbs fixed point: mean (target 1e-10)", gap, "", 1e-10, "4 × the nodes"),
        bounded("Gibbs fixed point: residual (target 1e-10)", law.residual, "", 1e-10, "Proposition 4"),
    ]


def plane() -> list[dict]:
    scenario = DoubleWell(initial_mean=(0.5, -0.2))
    nodes = np.linspace(-4.0, 4.5, PLANE)
    seconds, limit = timed(lambda: fokker_planck(scenario, (nodes, nodes), [2.0]), 1)
    lines = [fokker_planck(DoubleWell(initial_mean=(m,)), None, [2.0]) for m in (0.5, -0.2)]
    gap = max(abs(float(limit["mean"][0, k]) - float(lines[k]["mean"][0, 0])) for k in (0, 1))
    wide = max(abs(float(limit.covariance[0, k, k]) - float(lines[k].covariance[0, 0, 0])) for k in (0, 1))
    return [
        bounded("2-D double well, 257², to t = 2: time (target 60 s)", seconds, "s", 60.0, "and on 129²"),
        bounded("2-D double well: moments (target 1e-3)", max(gap, wide), "", 1e-3, "the 1-D solutions"),
    ]
