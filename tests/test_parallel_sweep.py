"""Sweeps by several processes: the numbers of one, in the same order, and errors that name their point."""

from __future__ import annotations

import importlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import xarray as xr

import mfsde
from mfsde.scenarios import MeanFieldOU
from mfsde.store import load_checkpoint
from mfsde.workers import WorkerDied, run_all

SETTINGS: dict[str, Any] = {"horizon": 0.2, "dt": 0.05}
OVER: dict[str, Any] = {"sigma": [1.0, 0.1, 0.7], "seed": [2, 1], "n_particles": [20]}


@dataclass(frozen=True)
class Cubic:
    """dX = slope·X³ dt + dW, which blows up for a large slope."""

    slope: float = -1.0

    def drift(self, t, x, mu):
        return self.slope * x**3

    def diffusion(self, t, x, mu):
        return 1.0

    def initial(self):
        return mfsde.Gaussian([1.0], [[1.0]])


def same(a: xr.Dataset, b: xr.Dataset) -> None:
    """Bit for bit, coordinates and their order included; attributes but those of the clock."""
    xr.testing.assert_identical(a.drop_attrs(), b.drop_attrs())
    first, second = ({k: v for k, v in run.attrs.items() if k not in ("start", "end")} for run in (a, b))
    assert first == second


def test_workers_give_the_numbers_of_one_process_in_the_same_order(tmp_path: Path) -> None:
    one = mfsde.sweep(MeanFieldOU(), OVER, **SETTINGS)
    two = mfsde.sweep(MeanFieldOU(), OVER, workers=2, store=tmp_path / "runs", **SETTINGS)
    same(one, two.load())
    assert two.sigma.values.tolist() == OVER["sigma"]
    # What is there already is not run again.
    same(two, mfsde.sweep(MeanFieldOU(), OVER, store=tmp_path / "runs", **SETTINGS).load())


CHORES = """
import os
import time


class Logged:
    def __init__(self, file):
        self.file = file

    def __call__(self, k):
        with open(self.file, "a") as log:
            log.write(f"{os.getpid()} {k}\\n")
        return k * k


class Odd(Exception):
    def __init__(self, number, reason):
        super().__init__(f"{number}: {reason}")
        self.number = number


def fails(k):
    if k == 1:
        raise Odd(5, "no number for 1")
    time.sleep(60)


def dies(k):
    os._exit(3)
"""


@pytest.fixture
def chores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Tasks that need no torch, in a module that processes import in no time."""
    (tmp_path / "chores.py").write_text(CHORES)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("chores")
    del sys.modules["chores"]


def test_the_costliest_tasks_are_first_and_results_are_in_order(chores: ModuleType, tmp_path: Path) -> None:
    costs = [3.0, 1.0, 2.0, 0.5, 0.25]
    assert run_all(chores.Logged(str(tmp_path / "log")), costs, 2, str) == [0, 1, 4, 9, 16]
    tasks: dict[str, list[float]] = {}
    for line in (tmp_path / "log").read_text().splitlines():
        process, k = line.split()
        tasks.setdefault(process, []).append(costs[int(k)])
    assert sorted(own[0] for own in tasks.values()) == [2.0, 3.0]
    assert all(own == sorted(own, reverse=True) for own in tasks.values())


def test_an_error_keeps_its_class_and_attributes_names_its_task_and_ends_the_others(chores: ModuleType) -> None:
    began = time.monotonic()
    with pytest.raises(chores.Odd, match="5: no number for 1") as found:
        run_all(chores.fails, [1.0, 2.0], 2, lambda k: f"task {k}")
    assert found.value.number == 5
    assert found.value.__notes__ == ["at task 1"]
    # The other one would have slept on.
    assert time.monotonic() - began < 30


def test_a_process_that_dies_is_told_from_an_error(chores: ModuleType) -> None:
    with pytest.raises(WorkerDied, match=r"the process of task \d ended with code 3 before it could answer"):
        run_all(chores.dies, [2.0, 1.0], 2, lambda k: f"task {k}")


def test_one_process_names_the_point_too() -> None:
    with pytest.raises(mfsde.BlowUp) as blown:
        mfsde.sweep(Cubic(), {"slope": [-1.0, 1e6]}, n_particles=8, seed=3, **SETTINGS)
    assert blown.value.__notes__ == ["at slope = 1000000.0 of the sweep over Cubic"]


def test_what_cannot_be_sent_is_refused_before_any_process_starts() -> None:
    @dataclass(frozen=True)
    class Local(Cubic):
        pass

    settings = {**SETTINGS, "n_particles": 8}
    with pytest.raises(TypeError, match=r"(?s)cannot be sent to another process.*top level of a module"):
        mfsde.sweep(MeanFieldOU(), {"seed": [1, 2]}, lambda run: run, workers=2, **settings)
    with pytest.raises(TypeError, match="cannot be sent to another process"):
        mfsde.sweep(Local(), {"seed": [1, 2]}, workers=2, **settings)
    for wrong, kind in ((0, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(kind, match=r"workers = .*expected a whole number >= 1"):
            mfsde.sweep(MeanFieldOU(), {"seed": [1, 2]}, workers=wrong, **settings)


SQUARES = """
from mfsde.workers import run_all

def square(k):
    return k * k

def run():
    print(run_all(square, [1, 2, 3], 2, str))

"""


def ran(*arguments: str) -> tuple[int, str, str]:
    run = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False)
    return run.returncode, run.stdout, run.stderr


def test_scripts_need_the_guard_and_prompts_a_module(tmp_path: Path) -> None:
    (tmp_path / "guarded.py").write_text(SQUARES + "if __name__ == '__main__':\n    run()\n")
    (tmp_path / "bare.py").write_text(SQUARES + "run()\n")
    assert ran(str(tmp_path / "guarded.py"))[:2] == (0, "[0, 1, 4]\n")
    code, _, told = ran(str(tmp_path / "bare.py"))
    assert code != 0
    assert "below `if __name__ == '__main__':`" in told
    code, _, told = ran("-c", SQUARES + "run()\n")
    assert code != 0
    assert "square is defined in a notebook or at a prompt, which has no file to import" in told


LONG = """
import signal
import mfsde
from mfsde.scenarios import MeanFieldOU

if __name__ == "__main__":
    # Tests may run in the background, where shells leave it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    mfsde.sweep(MeanFieldOU(), {"seed": [1, 2, 3]}, workers=2, n_particles=50, horizon=1e5, dt=0.01, store="runs")
"""


def test_an_interrupted_sweep_leaves_checkpoints_and_no_process(tmp_path: Path) -> None:
    (tmp_path / "long.py").write_text(LONG)
    process = subprocess.Popen([sys.executable, "long.py"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    runs, end = tmp_path / "runs", time.monotonic() + 60
    while sum(1 for _ in runs.glob("seed=*.zarr")) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(0.2)
    # As from `kill`: the workers hear of it from the parent only.
    process.send_signal(signal.SIGINT)
    # The pipe is closed by the last process that has it.
    _, told = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in told
    assert "what it has run is in runs, and the same sweep goes on from there" in told
    stores = sorted(runs.glob("seed=*.zarr"))
    assert [store.name for store in stores] == ["seed=1.zarr", "seed=2.zarr"]
    for store in stores:
        assert mfsde.open_run(store).attrs["status"] == "interrupted"
        assert load_checkpoint(store).step > 0
