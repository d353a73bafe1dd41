"""`make bench`: all benchmarks, a table, build/bench.json.

    python -m benchmarks [NAME ...] [--threads K]

Timings compare interleaved calls in one process; ratios travel between machines, nanoseconds do not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib import import_module
from pathlib import Path

import torch

from mfsde import noise, provenance

MODULES = (
    *("noise", "steps", "kinetic", "network", "sgd", "streaming", "memory", "transport", "entropy", "limit"),
    "multilevel",
    "birth_death",
)
OUT = Path("build/bench.json")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*MODULES, []], metavar="NAME", help=f"of {', '.join(MODULES)}")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.names or MODULES:
        for row in import_module(f"benchmarks.{name}").rows():
            rows.append(row)
            print(line(row), flush=True)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps({"machine": machine(options.threads), "rows": rows}, indent=1))
    print(f"\nwritten to {OUT}")


def line(row: dict) -> str:
    met = {None: "", True: "met", False: "NOT MET"}[row["met"]]
    target = "" if row["target"] is None else f"<= {row['target']:g}"
    return (
        f"{row['benchmark']:<18} {row['case']:<62} {row['value']:8.3g} {row['unit']:<17} {row['reference']:<26} "
        f"ratio {row['ratio']:6.3f} {target:<8} {met}"
    )


def machine(threads: int) -> dict:
    model = [x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "processor": model[0] if model else platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "device": device,
        "noise": noise.backend(),
        "versions": provenance.versions(),
    }


if __name__ == "__main__":
    main()
