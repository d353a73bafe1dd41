"""Side-by-side timing: interleaved calls in one process, medians, ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def interleaved(calls: Mapping[str, Callable[[], object]], repeats: int = 7) -> dict[str, float]:
    """Median seconds of each call. The calls take turns, so that a busy neighbour slows all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


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
