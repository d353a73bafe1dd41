"""The workloads A to E: everyone checked, then timed in turn, one case after another.

A step is the difference of a run of some steps and a run of one, divided: what is compared is the step, not the start.
Each takes as many steps as fit a fixed time; who would need much longer, judged by its smaller cases, is left out of a
case, and the row says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

import mfsde

from . import ceilings
from .agreement import SMALL, Disagreement, check
from .competitors import Competitor, installed
from .timing import per_step, seconds
from .workloads import Case, attraction

FULL: dict[str, list[Case]] = {
    "A": [
        *(Case("A", 10**k) for k in (3, 4, 5, 6, 7)),
        *(Case("A", 10**k, dtype="float64") for k in (5, 6)),
        Case("A", 1000, replicas=64),
    ],
    "B": [Case("B", n) for n in (1000, 3000, 10_000, 30_000, 100_000)],
    "C": [Case("C", n) for n in (1000, 10_000, 100_000)],
    "D": [Case("D", n) for n in (1000, 10_000)],
    "E": [Case("E", n) for n in (10_000, 100_000, 1_000_000)],
}
# Where the question is what another core gives.
SCALING: dict[str, list[Case]] = {
    "A": [*(Case("A", 10**k) for k in (5, 6, 7)), Case("A", 10**6, dtype="float64")],
    "B": [Case("B", 10_000)],
    "C": [Case("C", 10_000)],
    "D": [Case("D", 1000)],
    "E": [Case("E", 1_000_000)],
}
QUICK: dict[str, list[Case]] = {
    "A": [Case("A", 100_000), Case("A", 1000, replicas=64)],
    "B": [Case("B", 2000)],
    "C": [Case("C", 1000)],
    "D": [Case("D", 1000)],
    "E": [Case("E", 100_000)],
}


@dataclass(frozen=True)
class Effort:
    """Seconds that one timed call should take; repeats; the longest step taken at all, and of our exact sums."""

    call: float
    repeats: int
    longest: float
    longest_own: float
    most_steps: int = 2000


EFFORT = {False: Effort(0.12, 5, 1.2, 6.0), True: Effort(0.03, 3, 0.1, 0.1)}
COMPILED = ("JAX", "diffrax", "numba", "KeOps", "SiSyPHE", "mfsde compiled", "mfsde, compiled", "mfsde keops")
# Repeats of a step that takes long: a median of three.
FEW = 3


@dataclass
class Comparison:
    """One process's rows: a number of threads on a device."""

    device: str
    quick: bool
    unit: dict[str, float]
    competitors: list[Competitor]
    missing: dict[str, str]
    _seen: dict[tuple[str, str], tuple[int, float]] = field(default_factory=dict)
    _verdicts: dict[tuple[str, str, str], str] = field(default_factory=dict)
    _compiling: dict[tuple[str, str], float] = field(default_factory=dict)

    @classmethod
    def on(cls, device: str, quick: bool) -> Comparison:
        found, missing = installed()
        usable = [c for c in found if device in c.devices]
        return cls(device, quick, ceilings.measured(device, quick), usable, missing)

    def cases(self, workload: str) -> list[Case]:
        several = torch.get_num_threads() > 1 and self.device == "cpu"
        cases = QUICK if self.quick else SCALING if several else FULL
        return [replace(case, device=self.device) for case in cases[workload]]

    def compared(self, case: Case) -> Iterator[dict[str, Any]]:
        effort = EFFORT[self.quick]
        running, left_out = [], []
        for competitor in self._able(case):
            reason = self._verdict(competitor, case) or self._too_long(competitor, case, effort)
            if reason:
                left_out.append(self._row(case, competitor.name, note=reason))
                continue
            timed = Timed(competitor.name, competitor, competitor.prepare[case.workload](case))
            try:
                timed.calibrate(effort, case.device)
            except Exception as problem:
                left_out.append(self._row(case, competitor.name, note=failure(problem)))
                continue
            running.append(timed)
        long = [timed for timed in running if timed.step > effort.call]
        short = [timed for timed in running if timed not in long]
        for group, repeats in ((short, effort.repeats), (long, min(FEW, effort.repeats))):
            found = per_step({t.name: (t.run, t.steps) for t in group}, repeats, case.device)
            for timed in group:
                name, (step, start) = timed.name, found[timed.name]
                timed.measured(step, start)
                if step <= 0:
                    left_out.append(self._row(case, name, note="not resolved: the start outweighs the steps"))
                    continue
                self._seen[case.workload, name] = (case.n, step)
                yield self._row(case, name, timed=timed)
        yield from left_out

    def _able(self, case: Case) -> list[Competitor]:
        return [c for c in self.competitors if case.workload in c.prepare and case.dtype in c.dtypes]

    def _verdict(self, competitor: Competitor, case: Case) -> str:
        """Why it is not timed, empty where it is."""
        key = (case.workload, competitor.name, case.dtype)
        if key not in self._verdicts:
            try:
                self._compiling.setdefault(key[:2], first_call(competitor, case))
                check(competitor, case.workload, case.dtype, case.device)
                self._verdicts[key] = ""
            except Disagreement as problem:
                self._verdicts[key] = f"not timed, disagrees: {problem}"
            except Exception as problem:
                self._verdicts[key] = f"fails: {type(problem).__name__}: {problem!s:.200}"
        return self._verdicts[key]

    def _compile(self, workload: str, timed: Timed) -> float | None:
        """What this case, or the first one of the workload, took beyond its steps."""
        if timed.name not in COMPILED:
            return None
        return max(timed.compiling, self._compiling[workload, timed.name])

    def _too_long(self, competitor: Competitor, case: Case, effort: Effort) -> str:
        if (case.workload, competitor.name) not in self._seen:
            return ""
        n, step = self._seen[case.workload, competitor.name]
        order = 2 if case.workload == "B" else 1
        expected = step * (case.n * case.replicas / n) ** order
        longest = effort.longest_own if competitor.name == "mfsde compiled" else effort.longest
        # The approximate strategies are not of second order.
        if case.workload == "B" and competitor.strategy is not None and not competitor.strategy.exact:
            return ""
        return f"left out, a step would take about {expected:.2g} s" if expected > longest else ""

    def _row(self, case: Case, name: str, timed: Timed | None = None, note: str = "") -> dict[str, Any]:
        what, least = ceilings.of_step(case, self.unit)
        found: dict[str, Any] = {
            "workload": case.workload,
            "title": case.of.title,
            "case": str(case),
            "n": case.n,
            "replicas": case.replicas,
            "dtype": case.dtype,
            "device": case.device,
            "by": name,
            "ceiling": what,
            "ceiling_seconds": least,
            "parts": ceilings.parts(case, self.unit),
            "unit": case.of.unit,
            "seconds": None,
            "note": note,
        }
        if timed is None:
            return found
        found |= {
            "seconds": timed.step,
            "value": case.of.value(case, timed.step),
            "fraction": least / timed.step,
            "steps": timed.steps,
            "start_seconds": timed.start,
            "compile_seconds": self._compile(case.workload, timed),
            "relative_error": _error(case, timed.competitor.strategy),
        }
        if case.device != "cpu" and name.startswith("mfsde"):
            found["launches"] = launches(timed.run)
        return found


@dataclass
class Timed:
    """One competitor in one case."""

    name: str
    competitor: Competitor
    run: Any
    steps: int = 2
    step: float = 0.0
    start: float = 0.0
    compiling: float = 0.0

    def calibrate(self, effort: Effort, device: str) -> None:
        """How many steps; what the first calls took beyond later ones is compiling."""

        def taken(steps: int) -> float:
            return seconds(partial(self.run, steps), device)

        first, again = taken(1), taken(1)
        self.compiling = max(first - again, 0.0)
        count = 4 if again < effort.call else 1
        warm = taken(1 + count)
        more = min(warm, taken(1 + count)) if again < effort.call else warm
        # Some compile for each number of steps.
        self.compiling += warm - more
        # A long start hides a few steps: more of them, until they show.
        while more - again < 0.2 * again and count < effort.most_steps:
            count = min(8 * count, effort.most_steps)
            more = taken(1 + count)
        self.step = max((more - again) / count, 1e-7)
        # A start that outweighs the steps would leave their difference to its own spread.
        wanted = max(effort.call, min(2 * again, 6 * effort.call))
        self.steps = 1 + max(1, min(effort.most_steps, int(wanted / self.step)))
        if again < effort.call:
            taken(self.steps)

    def measured(self, step: float, start: float) -> None:
        self.step, self.start = step, start


def first_call(competitor: Competitor, case: Case) -> float:
    """Seconds by which the first step of a small case exceeds the second: tracing, compiling, loading."""
    run = competitor.prepare[case.workload](replace(case, n=SMALL[case.workload], replicas=1))
    first = seconds(partial(run, 1), case.device)
    return max(first - seconds(partial(run, 1), case.device), 0.0)


def failure(problem: Exception) -> str:
    return f"fails: {type(problem).__name__}: {problem!s:.200}"


def _error(case: Case, strategy: Any) -> float | None:
    """Relative root mean square of the error of the drift, on a sample of the particles."""
    if strategy is None:
        return None
    energy = mfsde.interaction(attraction, strategy=strategy)
    return float(energy.error(mfsde.EmpiricalMeasure(case.tensor())).max())


def launches(run: Any, steps: int = 20) -> float:
    """Kernels, copies and fills that the device is given per step."""
    from torch.profiler import ProfilerActivity, profile

    def count(steps: int) -> int:
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            run(steps)
            torch.cuda.synchronize()
        return sum(1 for event in recorded.events() if event.device_type == torch.autograd.DeviceType.CUDA)

    return (count(1 + steps) - count(1)) / steps
