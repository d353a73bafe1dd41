"""Side-by-side timing: interleaved calls in one process, medians, ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    repeats: int = 7,
    device: str = "cpu",
    of: Callable[[list[float]], float] = statistics.median,
) -> dict[str, float]:
    """Median seconds of each call, or another statistic.

    The calls take turns, so that a busy neighbour slows all of them alike.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            found[name].append(seconds(call, device))
    return {name: of(values) for name, values in found.items()}


def per_step(
    runs: Mapping[str, tuple[Callable[[int], object], int]], repeats: int, device: str = "cpu"
) -> dict[str, tuple[float, float]]:
    """Median seconds of a step and of a run of one step, for runs of so many steps that are given, taking turns.

    A step is a difference of two neighbouring calls: what a neighbour slows for longer than both falls out of it.
    """
    steps: dict[str, list[float]] = {name: [] for name in runs}
    starts: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, (run, count) in runs.items():
            start = seconds(partial(run, 1), device)
            whole = seconds(partial(run, count), device)
            starts[name].append(start)
            steps[name].append((whole - start) / (count - 1))
    return {name: (statistics.median(steps[name]), statistics.median(starts[name])) for name in runs}


def seconds(call: Callable[[], object], device: str = "cpu") -> float:
    """Of one call; on a GPU between two events of its stream, so that what is queued is what is timed."""
    if device == "cpu":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    torch.cuda.synchronize()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    call()
    last.record()
    torch.cuda.synchronize()
    return 1e-3 * float(first.elapsed_time(last))


def row(benchmark: str, case: str, value: float, unit: str, reference: str, ratio: float, target: float | None) -> dict:
    """One line of the report; `target` bounds the ratio (or the value, where there is no ratio)."""
    return {
        "benchmark": benchmark,
        "case": case,
        "value": value,
        "unit": unit,
        "reference": reference,
        "ratio": ratio,
        "target": target,
        "met": None if target is None else bool(ratio <= target),
    }
