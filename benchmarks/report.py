"""What is printed of a row, and what is recorded of a machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def machine(threads: int, device: str) -> Row:
    import torch

    from mfsde import noise, provenance

    from . import competitors

    model = [x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "processor": model[0] if model else platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "threads": threads,
        "device": gpu if device == "cuda" else device,
        "gpu": gpu,
        "vector": torch.backends.cpu.get_cpu_capability(),
        "noise": noise.backend(),
        "versions": {**provenance.versions(), **competitors.versions()},
    }


def where(threads: int, device: str) -> str:
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    return "one thread" if threads == 1 else f"{threads} threads"


def lines(rows: list[Row]) -> Iterable[str]:
    """The rows of one case: costs, what each takes in steps of the fastest row of mfsde, share of the ceiling."""
    own = min((row["seconds"] for row in rows if row["seconds"] and row["by"].startswith("mfsde")), default=None)
    yield f"  {rows[0]['case']}"
    for row in sorted(rows, key=lambda row: row["seconds"] or float("inf")):
        if row["seconds"] is None:
            yield f"    {row['by']:<32} {row['note']}"
            continue
        times = "" if own is None else f"{row['seconds'] / own:8.2f} x"
        parts = [f"{row['fraction']:6.1%} of {row['ceiling']}"]
        if row["compile_seconds"]:
            parts.append(f"compiling {row['compile_seconds']:.2g} s")
        if row["relative_error"] is not None:
            parts.append(f"error {row['relative_error']:.1e}")
        if row.get("launches") is not None:
            parts.append(f"{row['launches']:.1f} launches a step")
        yield f"    {row['by']:<32} {row['value']:10.4g} {row['unit']:<12} {times}   {', '.join(parts)}"


def line(row: Row) -> str:
    """A row of a benchmark of one part."""
    met = {None: "", True: "met", False: "NOT MET"}[row["met"]]
    target = "" if row["target"] is None else f"<= {row['target']:g}"
    return (
        f"{row['benchmark']:<18} {row['case']:<62} {row['value']:8.3g} {row['unit']:<17} {row['reference']:<26} "
        f"ratio {row['ratio']:6.3f} {target:<8} {met}"
    )


def verdict(row: Row) -> str:
    met = {None: "not measured", True: "met", False: "NOT MET"}[row["met"]]
    value = "" if row["value"] is None else f"{row['value']:.3g}"
    return f"{row['what']:<48} {value:>9} {row['unit']:<18} {row['target']:<9} {met}"
