"""Start-up, each in a fresh process: importing mfsde beyond torch, and the first step of a run."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

CLOCK = "import time; began = time.perf_counter(); {work}; print(time.perf_counter() - began)"
TORCH = "import torch"
# The name alone loads nothing: what a script waits for is the first function that it takes.
ENGINE = "import torch, mfsde; mfsde.simulate"
STEP = """
import time, torch, mfsde
from mfsde.scenarios import MeanFieldOU
mfsde.simulate
def run(steps):
    began = time.perf_counter()
    mfsde.simulate(MeanFieldOU(), n_particles=1000, horizon=0.01 * steps, dt=0.01, seed=1)
    return time.perf_counter() - began
print(run(1))
"""


def measured(quick: bool = False) -> dict[str, float]:
    """Medians in seconds: torch, the name mfsde, import (of simulate) beyond torch, first step."""
    programs = {
        "torch": CLOCK.format(work=TORCH),
        "name": CLOCK.format(work="import torch, mfsde"),
        "engine": CLOCK.format(work=ENGINE),
        "first step": STEP,
    }
    found: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(3 if quick else 9):
        for name, program in programs.items():
            done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
            found[name].append(float(done.stdout))
    middle = {name: statistics.median(values) for name, values in found.items()}
    return {
        "torch": middle["torch"],
        "import mfsde, lazy": middle["name"] - middle["torch"],
        "import": middle["engine"] - middle["torch"],
        "first step": middle["first step"],
    }


def rows() -> Iterator[dict[str, Any]]:
    from .timing import row

    for name, seconds in measured().items():
        target = {"import": 0.3, "first step": 0.1}.get(name)
        yield row("start-up", name, seconds, "s", "", seconds, target)
