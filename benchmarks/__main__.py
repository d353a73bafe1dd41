"""`make bench`: the workloads A to E against other libraries and the machine, a table, build/bench.json, a picture.

    python -m benchmarks [NAME ...] [--threads 1 2] [--quick] [--device cuda]
    python -m benchmarks plot

NAME: workloads A, B, C, D, E and startup (these when none is given); parts of the engine (noise, steps, kinetic, ...);
plot draws docs/performance.png from the last run. Calls that are compared take turns in one process; ratios travel
between machines, nanoseconds do not.
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
PARTS = (
    *("noise", "steps", "kinetic", "network", "sgd", "streaming", "memory", "transport", "entropy", "limit"),
    "multilevel",
    "birth_death",
)
OUT = Path("build/bench.json")
PICTURE = Path("docs/performance.png")


def main() -> None:
    names = (*WORKLOADS, "startup", *PARTS, "plot")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", choices=[*names, []], metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--threads", type=int, nargs="+", help="one process for each (default: 1, and 2 where 2 cores)")
    parser.add_argument("--quick", action="store_true", help="small sizes, few repeats: does everything run?")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: workloads A, B, C on a GPU")
    parser.add_argument("--out", type=Path, default=OUT, help=f"where the rows go (default {OUT})")
    options = parser.parse_args()
    if options.names == ["plot"]:
        return draw(options.out)
    if options.device == "cuda" and not gpu_is_present():
        print("skipped: no GPU is present (torch.cuda.is_available() is False)")
        return None
    record = measured(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1))
    print(f"\n{record['seconds']:.0f} s, written to {options.out}")
    return None


def measured(options: argparse.Namespace) -> dict[str, Any]:
    from . import report, session, targets

    began = time.perf_counter()
    names = options.names or [*WORKLOADS, "startup"]
    if options.device == "cuda":
        names = [name for name in names if name in ("A", "B", "C")]
    startup: dict[str, float] = {}
    if "startup" in names:
        from . import startup as fresh

        startup = fresh.measured(options.quick)
        print("start-up: " + ", ".join(f"{name} {seconds:.3f} s" for name, seconds in startup.items()))
        names = [name for name in names if name != "startup"]
    found = [session.in_process(names, k, options.device, options.quick) for k in threads(options)] if names else []
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


def threads(options: argparse.Namespace) -> list[int]:
    """Parts of the engine are measured with one thread, unless others are asked for."""
    if options.threads:
        return list(options.threads)
    cores = len(os.sched_getaffinity(0))
    only_parts = options.names and not set(options.names) & set(WORKLOADS)
    return [1] if options.quick or options.device == "cuda" or only_parts or cores < 2 else [1, 2]


def gpu_is_present() -> bool:
    import torch

    return torch.cuda.is_available()


def draw(record: Path) -> None:
    from . import plot

    if not record.exists():
        raise SystemExit(f"{record} does not exist: run `python -m benchmarks` first.")
    plot.draw(json.loads(record.read_text()), PICTURE)
    print(f"drew {PICTURE}")


if __name__ == "__main__":
    main()
