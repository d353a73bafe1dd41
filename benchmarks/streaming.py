"""What it costs to stream 100 of 1000 snapshots to disk."""

from __future__ import annotations

import tempfile
from pathlib import Path

import mfsde
from mfsde.scenarios import MeanFieldOU

from .timing import interleaved, row

CASES = [100_000, 1_000_000]
STEPS, EVERY, DT = 1000, 10, 0.01


def rows() -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        return [compared(n, Path(folder) / "run.zarr") for n in CASES]


def compared(n: int, store: Path) -> dict:
    def simulate(steps: int, **saving: object) -> None:
        mfsde.simulate(MeanFieldOU(), n_particles=n, horizon=steps * DT, dt=DT, seed=1, **saving)

    streaming = {"save_every": EVERY, "store": store, "overwrite": True}
    # What making and opening a store costs, once, is reported by the case but not counted to the streaming.
    seconds = interleaved(
        {
            "unsaved": lambda: simulate(STEPS, keep_particles=0),
            "streamed": lambda: simulate(STEPS, **streaming),
            "unsaved, start": lambda: simulate(EVERY, keep_particles=0),
            "streamed, start": lambda: simulate(EVERY, **streaming),
        },
        repeats=5,
    )
    streamed, unsaved = (seconds[name] - seconds[f"{name}, start"] for name in ("streamed", "unsaved"))
    case = f"N = {n:,}, {STEPS // EVERY} of {STEPS} snapshots (store made in {seconds['streamed, start']:.3f} s)"
    return row("streaming", case, streamed, "s", f"no saving {unsaved:.3f}", streamed / unsaved, 1.10)
