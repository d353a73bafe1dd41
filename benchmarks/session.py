"""One process of the benchmarks: a number of cores and threads, fixed before any library is loaded.

Thread pools are sized when libraries load, and each by a variable of its own; cores that a process may not use are
respected by all of them. One core is then one core for everybody.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


def in_process(names: Iterable[str], threads: int, device: str, quick: bool) -> dict[str, Any]:
    """Measures in a fresh process, which prints as it goes; returns what it found."""
    with tempfile.TemporaryDirectory() as folder:
        # What others keep compiled from earlier runs would make compiling look free.
        caches = {"XDG_CACHE_HOME": folder, "KEOPS_CACHE_FOLDER": folder}
        environment = os.environ | dict.fromkeys(VARIABLES, str(threads)) | ({} if quick else caches)
        out = Path(folder) / "found.json"
        asked = {"names": list(names), "threads": threads, "device": device, "quick": quick, "out": str(out)}
        subprocess.run([sys.executable, "-m", "benchmarks.session", json.dumps(asked)], env=environment, check=True)
        return json.loads(out.read_text())


def main() -> None:
    asked = json.loads(sys.argv[1])
    if asked["device"] == "cpu":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-asked["threads"] :])
    Path(asked["out"]).write_text(json.dumps(measured(**{k: v for k, v in asked.items() if k != "out"}), indent=1))


def measured(names: list[str], threads: int, device: str, quick: bool) -> dict[str, Any]:
    import torch

    from . import report
    from .workloads import WORKLOADS

    torch.set_num_threads(threads)
    workloads = [name for name in names if name in WORKLOADS]
    found: dict[str, Any] = {"machine": report.machine(threads, device), "workloads": [], "rows": []}
    if workloads:
        from . import ceilings
        from .comparison import Comparison

        comparison = Comparison.on(device, quick)
        found["ceilings"], found["missing"] = comparison.unit, comparison.missing
        print(f"\n{report.where(threads, device)}: {ceilings.described(comparison.unit)}")
        for name, reason in comparison.missing.items():
            print(f"{name}: {reason}")
        for letter in workloads:
            print(f"\n{letter}  {WORKLOADS[letter].title}", flush=True)
            for case in comparison.cases(letter):
                rows = [row | {"threads": threads} for row in comparison.compared(case)]
                found["workloads"] += rows
                print("\n".join(report.lines(rows)), flush=True)
    for name in (name for name in names if name not in WORKLOADS):
        for row in import_module(f"benchmarks.{name}").rows():
            found["rows"].append(row | {"threads": threads})
            print(report.line(row), flush=True)
    return found


if __name__ == "__main__":
    main()
