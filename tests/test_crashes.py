"""Runs that are killed, run out of disk, or find their checkpoint damaged."""

import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import mfsde
from mfsde.cli import main
from mfsde.scenarios import MeanFieldOU
from mfsde.store import checkpoint_file

PROGRAM = """
import sys, mfsde, torch
from mfsde.cli import main
from mfsde.scenarios import MeanFieldOU
torch.set_num_threads(1)
mfsde.simulate(MeanFieldOU(), n_particles={n}, n_replicas=3, horizon={steps} * 0.01, dt=0.01, seed=5, save_every=7,
               observables=["mean", "covariance"], checkpoint_every=50, store=sys.argv[1])
"""
STEPS = 3000
GO_ON = "import sys, mfsde, torch; torch.set_num_threads(1); mfsde.resume(sys.argv[1])"


def start(store: Path, n: int = 400, before: str = "") -> subprocess.Popen:
    program = before + PROGRAM.format(n=n, steps=STEPS)
    return subprocess.Popen([sys.executable, "-c", program, str(store)], stderr=subprocess.PIPE, text=True)


def chunks(store: Path) -> dict[str, str]:
    """Digest of every chunk of every array; metadata of the run (start, end, status) may differ."""
    files = [f for f in store.rglob("*") if f.is_file() and f.name != "zarr.json" and "checkpoint" not in f.parts]
    return {str(f.relative_to(store)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    store = tmp_path_factory.mktemp("whole") / "run.zarr"
    child = start(store)
    told = child.communicate(timeout=120)[1]
    assert child.returncode == 0, told
    return store


def test_a_run_killed_anywhere_and_resumed_has_the_bytes_of_one_that_was_not(uninterrupted, tmp_path):
    store = tmp_path / "run.zarr"
    child = start(store)
    chance = random.Random(20)
    kills = 0
    while kills < 3:
        while not store.exists() and child.poll() is None:
            time.sleep(0.01)
        time.sleep(chance.uniform(0.0, 0.25))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        kills += 1
        # Readable at once, and what is committed is right.
        with mfsde.open_run(store) as run, mfsde.open_run(uninterrupted) as whole:
            np.testing.assert_array_equal(run.position.values, whole.position.values[: run.sizes["time"]])
        child = subprocess.Popen([sys.executable, "-c", GO_ON, str(store)], stderr=subprocess.PIPE, text=True)
        if kills < 3:
            time.sleep(1.5)
        if child.poll() is not None:
            break
    told = child.communicate(timeout=120)[1]
    assert child.returncode == 0, told
    assert mfsde.open_run(store).attrs["status"] == "complete"
    assert chunks(store) == chunks(uninterrupted)
    assert len(chunks(store)) >= 10


# Time after which the observable gives up. Outside the function: what it closes over would make it another one.
LAST = [float("inf")]


def observable() -> mfsde.Observable:
    """The mean, until it gives up."""

    def mean(t, x, mu):
        if t > LAST[0]:
            raise RuntimeError("the observable gave up")
        return mu.mean()

    return mfsde.Observable("flaky", mean)


def stopped_half_way(store: Path) -> None:
    """A run that an observable ended after step 300 of 400, its checkpoints at 100, 200 and 300."""
    LAST[0] = 3.05
    with pytest.raises(RuntimeError, match="gave up"):
        mfsde.simulate(
            MeanFieldOU(), n_particles=50, horizon=4.0, dt=0.01, seed=1, save_every=10, checkpoint_every=100,
            observables=[observable()], store=store,
        )  # fmt: skip
    LAST[0] = float("inf")


@pytest.mark.parametrize("where", [0.02, 0.3, 0.5, 0.8, 0.99])
def test_a_flipped_bit_in_the_checkpoint_is_refused_and_nothing_is_lost(tmp_path, where):
    store = tmp_path / "run.zarr"
    stopped_half_way(store)
    before = mfsde.open_run(store).load()
    assert before.attrs["status"] == "failed"
    current = checkpoint_file(store)
    content = bytearray(current.read_bytes())
    content[int(where * len(content))] ^= 1 << 4
    current.write_bytes(content)
    with pytest.raises(RuntimeError, match=r"current\.ckpt") as refusal:
        mfsde.resume(store, observables=[observable()])
    assert "previous" in str(refusal.value)
    np.testing.assert_array_equal(mfsde.open_run(store).position.values, before.position.values)
    assert main(["resume", str(store)]) == 1
    # The next move that the message names: the previous checkpoint serves.
    current.unlink()
    resumed = mfsde.resume(store, observables=[observable()])
    direct = mfsde.simulate(MeanFieldOU(), n_particles=50, horizon=4.0, dt=0.01, seed=1, save_every=10)
    np.testing.assert_array_equal(resumed.position.values, direct.position.values)


def test_a_full_disk_ends_the_run_with_a_message_and_keeps_what_was_committed(tmp_path):
    store = tmp_path / "run.zarr"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))\n"
    child = start(store, n=4000, before=limit)
    told = child.communicate(timeout=120)[1]
    assert child.returncode not in (0, None)
    assert re.search(r"run\.zarr failed: .*File too large", told), told
    assert "mfsde.resume" in told
    with mfsde.open_run(store) as run:
        assert run.attrs["status"] == "failed"
        assert run.sizes["time"] < STEPS // 7 + 1


def test_a_store_that_exists_is_refused_whatever_it_is(tmp_path):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.tex").write_text("all of it")
    for overwrite in (False, True):
        with pytest.raises((FileExistsError, ValueError), match="thesis"):
            mfsde.simulate(
                MeanFieldOU(), n_particles=5, horizon=0.1, dt=0.01, seed=0, store=folder, overwrite=overwrite
            )
    assert (folder / "chapter.tex").read_text() == "all of it"


def test_a_blow_up_keeps_what_was_committed_and_marks_the_store(tmp_path):
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Runaway:
        def drift(self, t, x, mu):
            return x**3

        def diffusion(self, t, x, mu):
            return 0.1

        def initial(self):
            return mfsde.Gaussian([1.0], [[0.01]])

    store = tmp_path / "run.zarr"
    with pytest.raises(mfsde.BlowUp, match=r"Runaway blew up: the state is .* at step"):
        mfsde.simulate(Runaway(), n_particles=20, horizon=3.0, dt=0.01, seed=0, save_every=1, store=store)
    with mfsde.open_run(store) as run:
        assert run.attrs["status"] == "failed"
        assert "blew up" in run.attrs["error"]
        assert 10 < run.sizes["time"] < 301
        assert np.isfinite(run.position.values).all()


def test_a_moved_store_can_be_resumed(tmp_path):
    stopped_half_way(tmp_path / "here.zarr")
    there = tmp_path / "deeper" / "there.zarr"
    there.parent.mkdir()
    shutil.move(tmp_path / "here.zarr", there)
    assert mfsde.resume(there, observables=[observable()]).attrs["status"] == "complete"
    assert os.listdir(tmp_path) == ["deeper"]
