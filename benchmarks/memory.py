"""Peak memory of a run, in state-sized buffers, and its growth with the number of steps. Linux only."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from .timing import row


def peak_of(n: int, steps: int, save_every: int | None, stored: bool) -> int:
    """Bytes that a run takes at its peak beyond a small run before it, measured in a process of its own."""
    arguments = json.dumps({"n": n, "steps": steps, "save_every": save_every, "stored": stored})
    command = [sys.executable, "-m", "benchmarks.memory", arguments]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def rows() -> list[dict]:
    found = []
    state = 4 * 1_000_000
    for stored, what in ((False, "no positions kept"), (True, "streaming every 10th step")):
        buffers = peak_of(1_000_000, 100, 10 if stored else None, stored) / state
        found.append(row("peak memory", f"N = 1,000,000 float32, {what}", buffers, "states", "", buffers, 12))
    # The same hundred frames; a thousand times as many steps.
    short, long = (peak_of(10_000, steps, steps // 100, True) for steps in (100, 100_000))
    case = "N = 10,000, 100,000 steps against 100, 100 snapshots each"
    found.append(row("memory growth", case, long / 2**20, "MiB", f"100 steps {short / 2**20:.1f}", long / short, None))
    return found


def _measure(n: int, steps: int, save_every: int | None, stored: bool) -> int:
    import tempfile

    import mfsde
    from mfsde.scenarios import MeanFieldOU

    def run(folder: str, size: int, count: int) -> None:
        mfsde.simulate(
            MeanFieldOU(),
            n_particles=size,
            horizon=count * 0.01,
            dt=0.01,
            seed=1,
            save_every=save_every if count == steps else 1,
            keep_particles=None if stored else 0,
            store=Path(folder) / f"{size}.zarr" if stored else None,
            overwrite=True,
        )

    with tempfile.TemporaryDirectory() as folder:
        run(folder, 100, 10)
        # Forget the peak so far: what counts is what the run adds to a process that is warm.
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        run(folder, n, steps)
        return _status("VmHWM") - before


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


if __name__ == "__main__":
    print(_measure(**json.loads(sys.argv[1])))
