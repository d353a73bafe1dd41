"""`make bench`: the workloads A to E against other libraries and the machine, a table, build/bench.json, a picture.

    python -m benchmarks [NAME ...] [--threads 1 2] [--quick] [--device cuda]
    python -m benchmarks plot

NAME: workloads A, B, C, D, E and startup (these, and A, B, C on a GPU if there is one, when none is given); parts of
the engine (noise, steps, kinetic, ...); plot draws docs/performance.png from the last run. Calls that are compared take
turns in one process; ratios travel between machines, nanoseconds do not.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

WORKLOADS = ("A", "B", "C", "D", "E")
ON_GPU = ("A", "B", "C")
PARTS = (
    *("noise", "steps", "kinetic", "network", "sgd", "streaming", "memory", "transport", "entropy", "limit"),
    "multilevel",
    "birth_death",
)
OUT = Path("build/bench.json")
PICTURES = {"cpu": Path("docs/performance.png"), "cuda": Path("docs/performance-gpu.png")}


def main() -> None:
    names = (*WORKLOADS, "startup", *PARTS, "plot")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", choices=[*names, []], metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--threads", type=int, nargs="+", help="one process for each (default: 1, and 2 where 2 cores)")
    parser.add_argument("--quick", action="store_true", help="small sizes, few repeats: does everything run?")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: A, B, C on a GPU alone")
    parser.add_argument("--out", type=Path, default=OUT, help=f"where the rows go (default {OUT})")
    options = parser.parse_args()
    if options.names == ["plot"]:
        return draw(options.out)
    record = measured(options)
    if not record["machines"] and not record["startup"]:
        return None
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1))
    print(f"\n{record['seconds']:.0f} s, written to {options.out}")
    return None


def measured(options: argparse.Namespace) -> dict[str, Any]:
    from . import report, session, targets

    began = time.perf_counter()
    names = options.names or [*WORKLOADS, "startup"]
    startup: dict[str, float] = {}
    if "startup" in names and options.device == "cpu":
        from . import startup as fresh

        startup = fresh.measured(options.quick)
        print("start-up: " + ", ".join(f"{name} {seconds:.3f} s" for name, seconds in startup.items()))
    names = [name for name in names if name != "startup"]
    found = []
    if names and options.device == "cpu":
        found += [session.in_process(names, k, "cpu", options.quick) for k in threads(options)]
    if options.device == "cuda" or not options.names:
        found += on_gpu([name for name in names if name in ON_GPU], options.quick)
    rows = [row for part in found for row in part["workloads"]]
    verdicts = targets.verdicts(rows, startup)
    if rows or startup:
        print("\nTargets")
        shown = [v for v in verdicts if v["met"] is not None or not options.names]
        print("\n".join(report.verdict(v) for v in shown))
    return {
        "command": "python -m benchmarks " + shlex.join(sys.argv[1:]),
        "seconds": time.perf_counter() - began,
        "machines": [part["machine"] for part in found],
        "ceilings": [{"threads": p["machine"]["threads"], **p["ceilings"]} for p in found if "ceilings" in p],
        "missing": next((part["missing"] for part in found if "missing" in part), {}),
        "startup": startup,
        "targets": verdicts,
        "workloads": rows,
        "rows": [row for part in found for row in part["rows"]],
    }


def on_gpu(names: list[str], quick: bool) -> list[dict[str, Any]]:
    from . import session

    if not gpu_is_present():
        print("\nGPU: skipped, torch.cuda.is_available() is False")
        return []
    return [session.in_process(names, 1, "cuda", quick)]


def threads(options: argparse.Namespace) -> list[int]:
    """Parts of the engine are measured with one thread, unless others are asked for."""
    if options.threads:
        return list(options.threads)
    cores = len(os.sched_getaffinity(0))
    only_parts = options.names and not set(options.names) & set(WORKLOADS)
    return [1] if options.quick or only_parts or cores < 2 else [1, 2]


def gpu_is_present() -> bool:
    import torch

    return torch.cuda.is_available()


def draw(record: Path) -> None:
    from . import plot

    if not record.exists():
        raise SystemExit(f"{record} does not exist: run `python -m benchmarks` first.")
    found = json.loads(record.read_text())
    for device, picture in PICTURES.items():
        if any(row["device"] == device for row in found["workloads"]):
            plot.draw(found, picture, device)
            print(f"drew {picture}")


if __name__ == "__main__":
    main()
