"""Cost of the noise: nanoseconds per normal and per particle-step, against torch's own generator.

The cases are timed in turn, round after round, and the median over the rounds is reported: a slow minute of the machine
then falls on all of them alike.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mfsde import _noise_numpy, _noise_torch
from mfsde.noise import Noise, backend

from .timing import row

ROUNDS = 15
STEP = 0.01
SIGMA = 0.7
SHAPES = [(1, 10**6, 1), (1, 500_000, 2), (1, 100_000, 10), (64, 1000, 1), (1, 100, 1)]
NOISE = Noise(1)


@dataclass(frozen=True)
class Case:
    what: str
    by: str
    dtype: torch.dtype
    threads: int
    shape: tuple[int, int, int]
    call: Callable[[], Any]

    def nanoseconds(self) -> float:
        """Per value, repeated until one measurement takes at least 1e5 values."""
        torch.set_num_threads(self.threads)
        values = math.prod(self.shape)
        repeats = max(1, 100_000 // values)
        start = time.perf_counter()
        for _ in range(repeats):
            self.call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / (repeats * values) * 1e9


def sequential_step(x: Tensor, drift: Tensor, z: Tensor) -> None:
    """Three passes with torch's own generator."""
    z.normal_()
    x.add_(drift, alpha=STEP).add_(z, alpha=SIGMA * math.sqrt(STEP))


def cases_for(dtype: torch.dtype, threads: int, shape: tuple[int, int, int], device: str) -> list[Case]:
    x, drift, z = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(3))
    name = f"mfsde {backend(device)}" + (" (cuda)" if device != "cpu" else "")

    def case(what: str, by: str, call: Callable[[], Any]) -> Case:
        return Case(what, by, dtype, threads, shape, call)

    cases = [
        case("normals", name, lambda: NOISE.normals(1, shape, dtype=dtype, device=device, out=z)),
        case("normals", f"torch normal_ ({device})", lambda: z.normal_()),
        case("euler step", name, lambda: NOISE.euler_(x, drift, STEP, SIGMA, 1)),
        case("euler step, diagonal", name, lambda: NOISE.euler_(x, drift, STEP, drift, 1)),
        case("euler step", f"torch normal_, add_, add_ ({device})", lambda: sequential_step(x, drift, z)),
    ]
    if device == "cpu" and threads == 1 and shape == SHAPES[0]:
        window = (NOISE.seed, 1, 1, 1, 0, 0, 1.0)
        cases.append(case("normals", "mfsde numpy", lambda: _noise_numpy.normals(z, *window)))
        cases.append(case("normals", "mfsde torch", lambda: _noise_torch.normals(z, *window)))
    return cases


def all_cases() -> list[Case]:
    available = torch.get_num_threads()
    kinds = [("cpu", threads) for threads in sorted({1, available})]
    if torch.cuda.is_available():
        kinds.append(("cuda", available))
    return [
        case
        for device, threads in kinds
        for dtype in (torch.float32, torch.float64)
        for shape in SHAPES
        for case in cases_for(dtype, threads, shape, device)
    ]


def measured() -> list[dict[str, Any]]:
    """One entry for each case: what, by, dtype, threads, shape, ns (median over the rounds)."""
    before = torch.get_num_threads()
    cases = all_cases()
    times: list[list[float]] = [[] for _ in cases]
    for case in cases:
        case.nanoseconds()
    for _ in range(ROUNDS):
        for case, taken in zip(cases, times, strict=True):
            taken.append(case.nanoseconds())
    torch.set_num_threads(before)
    return [
        {
            "what": case.what,
            "by": case.by,
            "dtype": str(case.dtype).removeprefix("torch."),
            "threads": case.threads,
            "shape": case.shape,
            "ns": statistics.median(taken),
        }
        for case, taken in zip(cases, times, strict=True)
    ]


def rows() -> list[dict[str, Any]]:
    """Each of our cases beside torch's own generator doing the same."""
    found = measured()
    torchs = {_key(entry): entry["ns"] for entry in found if entry["by"].startswith("torch")}
    lines = []
    for entry in found:
        key = _key(entry)
        if not entry["by"].startswith("torch") and key in torchs:
            threads = "1 thread" if entry["threads"] == 1 else f"{entry['threads']} threads"
            case = f"{entry['what']} {entry['shape']} {entry['dtype']}, {threads}, {entry['by']}"
            reference = f"torch {torchs[key]:.2f}"
            lines.append(row("noise", case, entry["ns"], "ns/value", reference, entry["ns"] / torchs[key], None))
    return lines


def _key(entry: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(entry[name] for name in ("what", "dtype", "threads", "shape"))
