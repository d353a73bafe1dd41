"""The store: what was committed stays readable and bit-exact, whatever happens to the process that writes it."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mfsde import store as store_module
from mfsde.store import (
    CorruptCheckpoint,
    Layout,
    Memory,
    StoreError,
    Variable,
    ZarrStore,
    checkpoint_file,
    load_checkpoint,
    open_run,
    read_settings,
)

# Small chunks, so that a few kilobytes show every geometry: several frames per chunk, one, and several per frame.
SMALL = {"TARGET_CHUNK": 1024, "LARGEST_CHUNK": 16384, "PIECE": 1000}
N_FRAMES, N_PARTICLES = 150, 31

VARIABLES = (
    Variable("position", ("replica", "particle", "component"), (2, N_PARTICLES, 2), "float32", {"units": "1"}),
    Variable("image", ("pixel",), (1500,), "float32", {"long_name": "one frame per chunk"}),
    Variable("cloud", ("replica", "particle", "feature"), (2, N_PARTICLES, 150), "float32", {}),
    Variable("energy", ("replica",), (2,), "float64", {"long_name": "energy", "units": "days since 2000"}),
    Variable("events", ("replica",), (2,), "int64", {"units": "seconds"}),
    Variable("alive", (), (), "bool", {}),
)
ATTRS: dict[str, Any] = {
    "scenario": "ou",
    "digest": "d1",
    "settings": {"b": [1, {"c": None}], "a": True},
    "progress": False,
    "seed": 2**63 + 1,
    "dt": 0.1,
    "period": float("inf"),
}


def layout(n_frames: int = N_FRAMES, variables: tuple[Variable, ...] = VARIABLES, **attrs: Any) -> Layout:
    coords: dict[str, Any] = {
        "replica": (("replica",), np.arange(2), {"long_name": "independent copy"}),
        "particle": (("particle",), np.arange(N_PARTICLES), {}),
        "component": (("component",), np.arange(2), {}),
        "sigma": ((), np.float64(0.7), {"long_name": "noise"}),
        "n_particles": ((), np.int64(N_PARTICLES), {}),
    }
    return Layout(np.round(np.arange(n_frames) * 0.1, 12), variables, coords, {**ATTRS, **attrs})


@functools.cache
def frame(index: int, variables: tuple[Variable, ...] = VARIABLES) -> dict[str, Tensor]:
    """Frame `index`, a function of the index alone; nowhere equal to a fill value or to another frame."""
    result = {}
    for v in variables:
        n = int(np.prod(v.shape))
        x = torch.arange(n, dtype=torch.float64) + 1 + index * (n + 1)
        x = x % 2 == 0 if v.dtype == "bool" else x
        result[v.name] = x.to(getattr(torch, v.dtype)).reshape(v.shape)
    return result


@functools.cache
def all_frames(name: str) -> np.ndarray:
    return np.stack([frame(i)[name].numpy() for i in range(N_FRAMES)])


def expected(name: str, stop: int) -> np.ndarray:
    return all_frames(name)[:stop]


def bare(dataset: xr.Dataset) -> xr.Dataset:
    return dataset.drop_attrs(deep=False)


def fill(store: ZarrStore | Memory, start: int, stop: int) -> None:
    for i in range(start, stop):
        store.append(i, frame(i))


def hashes(path: Path) -> dict[str, str]:
    """SHA-256 of everything under the array folders: chunks, metadata and whatever else lies there."""
    files = [p for p in path.rglob("*") if p.is_file() and p.relative_to(path).parts[0] != "checkpoint"]
    files = [p for p in files if p != path / "zarr.json"]
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def state(index: int) -> dict[str, Tensor]:
    return {"x": torch.arange(100.0) + index, "key": torch.tensor([index], dtype=torch.int64)}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(store_module, name, value)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of the full run of N_FRAMES, written without interruption."""
    path = tmp_path_factory.mktemp("reference") / "run.zarr"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(store_module, name, value)
        store = ZarrStore.create(path, layout())
        fill(store, 0, N_FRAMES)
        store.close()
    return hashes(path)


# A child process, to be killed. One is started per module; it forks for every job, so that a kill costs no import.


def child_run(job: dict[str, Any]) -> None:
    """Continue the store at job["path"], or begin it, as `resume` would: from the last checkpoint."""
    for name, value in SMALL.items():
        setattr(store_module, name, value)
    ZarrStore.COMMIT_EVERY = job.get("commit_every", 0.01)
    path = Path(job["path"])
    if path.exists():
        store = ZarrStore.reopen(path)
        start = load_checkpoint(path).index if has_checkpoint(path) else 0
    else:
        store, start = ZarrStore.create(path, layout()), 0
    if "die_at" in job:
        die_at_rename(job["die_at"], job["before"])
    for i in range(start, N_FRAMES):
        if i == job.get("limit_at"):
            store.flush()
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        store.append(i, frame(i))
        if (i + 1) % job.get("checkpoint_every", 31) == 0:
            store.checkpoint(10 * (i + 1), state(i + 1), i + 1)
        time.sleep(job.get("pause", 0.0))
    store.close()


def has_checkpoint(path: Path) -> bool:
    return any(checkpoint_file(path, which).exists() for which in ("current", "previous"))


def die_at_rename(count: int, before: bool) -> None:
    """kill -9 of this process at its count-th rename, before or after it: renames are all that readers can see."""
    rename, seen = os.replace, itertools.count(1)

    def replace(source: Any, target: Any) -> None:
        last = next(seen) == count
        if last and before:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace  # type: ignore[assignment]


def child_limited(job: dict[str, Any]) -> None:
    """A disk that fills up at frame `limit_at`: what the caller sees goes to a file beside the store."""
    begin = time.monotonic()
    report: dict[str, Any] = {}
    try:
        child_run(job)
    except StoreError as error:
        report = {"message": str(error), "cause": type(error.__cause__).__name__}
    path = Path(job["path"])
    writers = [t for t in threading.enumerate() if t.name.startswith("writer")]
    for writer in writers:
        # It ends by itself, but the caller may hear of the error a moment before.
        writer.join(timeout=10)
    report["alive"] = [t.name for t in writers if t.is_alive()]
    report["seconds"] = time.monotonic() - begin
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    path.with_suffix(".json").write_text(json.dumps(report))


def serve() -> None:
    """Read jobs from stdin; for each, fork, wait, print the exit status."""
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                {"run": child_run, "limited": child_limited}[job.get("what", "run")](job)
                code = 0
            finally:
                os._exit(code)
        if "kill_after" in job:
            time.sleep(job["kill_after"])
            os.kill(pid, signal.SIGKILL)  # not yet waited for, so the pid is still this child's
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


class Nursery:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def start(self, **job: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()

    def wait(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def run(self, **job: Any) -> int:
        self.start(**job)
        return self.wait()


def script(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    root = Path(store_module.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONWARNINGS": "error", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, **options)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with script("serve", stdin=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "ready\n"
        yield Nursery(process)
        process.stdin.close()
        assert process.wait(30) == 0


def check_readable(path: Path) -> int:
    """The store opens, and holds the right values at exactly its committed times; returns their number."""
    run = open_run(path)
    n = run.sizes["time"]
    np.testing.assert_array_equal(run["time"].values, layout().times[:n])
    for name in [v.name for v in VARIABLES]:
        np.testing.assert_array_equal(run[name].values, expected(name, n))
    return n


# The Dataset


def test_memory_and_store_give_the_same_dataset(tmp_path: Path, small: None) -> None:
    path = tmp_path / "run.zarr"
    store, memory = ZarrStore.create(path, layout()), Memory(layout())
    for stop in (0, 1, 7, 70, N_FRAMES):
        for target in (store, memory):
            fill(target, memory.committed if target is memory else store.committed, stop)
            target.flush()
        ours, theirs = open_run(path), memory.dataset()
        xr.testing.assert_identical(bare(ours.load()), bare(theirs))
        assert list(ours) == list(theirs)
        for name in ours.variables:
            assert ours[name].dtype == theirs[name].dtype
            assert ours[name].attrs == theirs[name].attrs
        assert {k: v for k, v in ours.attrs.items() if k != "start"} == {
            k: v for k, v in theirs.attrs.items() if k != "start"
        }
    store.close("interrupted", step=5, resumable=True)
    memory.close("interrupted", step=5, resumable=True)
    for run in (open_run(path), memory.dataset()):
        assert (run.attrs["status"], run.attrs["step"], run.attrs["resumable"]) == ("interrupted", 5, "true")
        assert run.attrs["end"] >= run.attrs["start"]


def test_other_readers_of_zarr_see_the_coordinates_and_no_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.zarr"
    store = ZarrStore.create(path, layout(5))
    unfinished: list[Any] = []
    monkeypatch.setattr(store_module, "_write_new", spy(unfinished, store_module._write_new))
    fill(store, 0, 5)
    for step in (1, 2):
        store.checkpoint(step, state(step))
    (checkpoint_file(path).parent / "zarr.json.partial").write_bytes(b"left by a kill")
    plain = xr.open_zarr(path, consolidated=False, chunks=None, decode_times=False)
    assert set(plain.coords) == {"time", "replica", "particle", "component", "sigma", "n_particles"}
    assert plain.indexes["time"].size == 5
    members = dict(zarr.open_group(path, mode="r").members(max_depth=None))
    assert set(members) == {"checkpoint", "checkpoint/times", *plain.variables}
    store.close()
    # A kill may leave any unfinished file behind: only in the folder of an array is it no foreign object.
    folders = {file.parent.relative_to(path).as_posix() for file, *_ in unfinished}
    assert folders == {"checkpoint/times", "time", *(v.name for v in VARIABLES)}


def test_attributes_survive_netcdf_and_settings_come_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    ZarrStore.create(path, layout(5)).close()
    attrs = open_run(path).attrs
    assert all(type(value) in (str, int, float) for value in attrs.values())
    assert attrs["progress"] == "false"
    assert attrs["settings"] == '{"a":true,"b":[1,{"c":null}]}'
    assert attrs["period"] == "Infinity"
    assert (attrs["dt"], attrs["seed"]) == (0.1, str(2**63 + 1))
    assert read_settings(path) == ATTRS
    ZarrStore.reopen(path).close()
    assert read_settings(path) == ATTRS


def test_the_layout_comes_back_from_the_store(tmp_path: Path) -> None:
    ours = layout(5)
    ZarrStore.create(tmp_path / "run.zarr", ours).close()
    store = ZarrStore.reopen(tmp_path / "run.zarr")
    theirs = store.layout
    store.close()
    assert theirs.variables == ours.variables
    assert theirs.attrs == ours.attrs
    np.testing.assert_array_equal(theirs.times, ours.times)
    assert list(theirs.coords) == list(ours.coords)
    for name, (dims, values, attrs) in ours.coords.items():
        assert (theirs.coords[name][0], theirs.coords[name][2]) == (dims, attrs)
        assert np.asarray(theirs.coords[name][1]).dtype == np.asarray(values).dtype
        np.testing.assert_array_equal(theirs.coords[name][1], values)


def test_without_dask_the_run_is_opened_lazily(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.zarr"
    store = ZarrStore.create(path, layout(40))
    fill(store, 0, 40)
    store.close()
    flip(path / "image" / "c.20.0", 100)
    monkeypatch.setitem(sys.modules, "dask.array", None)
    image = open_run(path)["image"]  # opening and reading other frames does not touch the damaged chunk
    np.testing.assert_array_equal(image[19].values, frame(19)["image"])
    with pytest.raises(ValueError, match="checksum"):
        image[20].load()


@pytest.mark.skipif(importlib.util.find_spec("dask") is None, reason="needs dask")
def test_with_dask_the_run_is_chunked(tmp_path: Path, small: None) -> None:
    store = ZarrStore.create(tmp_path / "run.zarr", layout(40))
    fill(store, 0, 30)
    store.close("interrupted")
    run = open_run(tmp_path / "run.zarr")
    assert run["image"].chunks == ((1,) * 30, (1500,))
    np.testing.assert_array_equal(run["cloud"].values, expected("cloud", 30))


# Chunks


@pytest.mark.parametrize(
    ("shape", "dims", "n_frames", "chunk"),
    [
        ((), (), 1000, (1000,)),  # never longer than the run
        ((), (), 10**6, (262144,)),
        ((1, 10**4, 1), ("replica", "particle", "component"), 1000, (26, 1, 10**4, 1)),
        ((1, 10**6, 1), ("replica", "particle", "component"), 100, (1, 1, 10**6, 1)),
        ((2, 10**7, 3), ("replica", "particle", "component"), 100, (1, 2, 1250000, 3)),
        ((10**8,), ("cell",), 2, (1, 8333334)),
    ],
)
def test_chunks_hold_a_few_megabytes(shape: Any, dims: Any, n_frames: int, chunk: Any) -> None:
    variable = Variable("x", dims, shape, "float64")
    grid = store_module._Grid.of(variable, n_frames)
    assert grid.chunk == chunk
    assert np.prod(chunk) * 8 <= 64 * 2**20


def test_chunk_files_are_those_that_zarr_writes(tmp_path: Path, small: None) -> None:
    path, other = tmp_path / "run.zarr", tmp_path / "other.zarr"
    store = ZarrStore.create(path, layout(50))
    fill(store, 0, 50)
    store.close()
    ZarrStore.create(other, layout(50)).close()
    with zarr.config.set({"array.write_empty_chunks": True}):
        for v in VARIABLES:
            zarr.open_array(other / v.name, mode="r+")[:] = expected(v.name, 50)
        zarr.open_array(other / "time", mode="r+")[:] = layout(50).times
    assert hashes(other) == hashes(path)
    blocks = sorted((path / "cloud").glob("c.7.*"))
    assert len(blocks) == 3  # 37 kB per frame
    assert len(list((path / "position").glob("c.*"))) == 25  # two frames per chunk


def test_small_frames_are_written_rarely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = tuple(Variable(f"o{i}", ("replica",), (2,), "float64") for i in range(5))
    store = ZarrStore.create(tmp_path / "run.zarr", layout(2000, variables))
    written: list[Any] = []
    monkeypatch.setattr(store_module, "_write_new", spy(written, store_module._write_new))
    fill_small(store, variables, 2000)
    store.close()
    # Per array one write, perhaps another one after COMMIT_EVERY seconds.
    assert 6 <= len(written) <= 20


def fill_small(store: ZarrStore, variables: tuple[Variable, ...], n: int) -> None:
    values = frame(0, variables)
    for i in range(n):
        store.append(i, values)


def spy(calls: list[Any], function: Any) -> Any:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return function(*args, **kwargs)

    return wrapped


def test_what_waits_is_committed_without_another_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ZarrStore.COMMIT_EVERY == 2.0
    monkeypatch.setattr(ZarrStore, "COMMIT_EVERY", 0.05)
    path = tmp_path / "run.zarr"
    store = ZarrStore.create(path, layout(50))
    for i in (0, 1):
        store.append(i, frame(i))
        deadline = time.monotonic() + 20
        while open_run(path).sizes["time"] <= i and time.monotonic() < deadline:
            time.sleep(0.02)
        assert check_readable_prefix(path) == i + 1
    store.close()


def check_readable_prefix(path: Path) -> int:
    run = open_run(path)
    for name in run.data_vars:
        np.testing.assert_array_equal(run[name].values, expected(str(name), run.sizes["time"]))
    return run.sizes["time"]


def test_frames_may_live_anywhere_in_memory(tmp_path: Path, small: None) -> None:
    """Views, transposed tensors and tensors with a gradient are copied by value; later changes do not matter."""
    variables = (Variable("x", ("particle", "component"), (N_PARTICLES, 2), "float32"),)
    store = ZarrStore.create(tmp_path / "run.zarr", layout(3, variables))
    x = torch.arange(2.0 * N_PARTICLES, requires_grad=True).reshape(2, N_PARTICLES).T
    y = x.detach().clone()
    for i in range(3):
        store.append(i, {"x": x if i == 0 else y})
        if i:
            y += 1
    store.close()
    np.testing.assert_array_equal(
        open_run(tmp_path / "run.zarr")["x"].values, torch.stack([x.detach(), x.detach(), y - 1])
    )


def test_complex_and_half_precision_keep_their_bits(tmp_path: Path) -> None:
    names = ("complex64", "float16", "uint8", "int32")
    variables = tuple(Variable(name, ("k",), (3,), name) for name in names)
    store = ZarrStore.create(tmp_path / "run.zarr", layout(4, variables))
    for i in range(2):
        store.append(i, frame(i, variables))
    store.close()
    run = open_run(tmp_path / "run.zarr")
    for name in names:
        assert run[name].dtype == name
        np.testing.assert_array_equal(run[name][1].values, frame(1, variables)[name])


# Interruption


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 9, 40, 151, 302, 600])
def test_killed_at_any_rename_the_store_is_readable_and_ends_identical(
    tmp_path: Path, nursery: Nursery, reference: dict[str, str], count: int, before: bool
) -> None:
    path, n = tmp_path / "run.zarr", 0
    for attempt in range(2):  # while it runs, and again while it continues (which may take fewer renames)
        status = nursery.run(path=str(path), die_at=count, before=before, commit_every=0.0)
        assert status == -signal.SIGKILL or (status == 0 and attempt == 1)
        now = check_readable(path)
        assert now >= n
        n = now
    assert nursery.run(path=str(path)) == 0
    assert hashes(path) == reference


def test_killed_at_random_moments_again_and_again_it_ends_identical(
    tmp_path: Path, nursery: Nursery, reference: dict[str, str]
) -> None:
    rng = random.Random(1)
    path, n = tmp_path / "run.zarr", 0
    for _ in range(8):
        nursery.run(
            path=str(path),
            pause=0.002,
            commit_every=rng.choice([0.0, 0.005, 0.05]),
            checkpoint_every=11,
            kill_after=rng.uniform(0.03, 0.3),
        )
        if path.exists():
            now = check_readable(path)
            assert now >= n
            n = now
            assert not has_checkpoint(path) or load_checkpoint(path).index <= n
    assert n > 0
    assert nursery.run(path=str(path)) == 0
    assert hashes(path) == reference


def test_killed_before_the_first_frame_it_opens_empty(tmp_path: Path, nursery: Nursery) -> None:
    path = tmp_path / "run.zarr"
    assert nursery.run(path=str(path), die_at=1, before=True) == -signal.SIGKILL
    run = open_run(path)
    assert run.sizes["time"] == 0
    assert run["position"].shape == (0, 2, N_PARTICLES, 2)
    assert run["position"].dtype == np.float32
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_checkpoint(path)


def test_a_reader_sees_a_growing_prefix(tmp_path: Path, nursery: Nursery) -> None:
    path = tmp_path / "run.zarr"
    nursery.start(path=str(path), pause=0.008, commit_every=0.02, checkpoint_every=20)
    seen = [0]
    while seen[-1] < N_FRAMES:
        if path.exists():
            run = open_run(path)
            n = run.sizes["time"]
            seen.append(n)
            last = run.isel(time=slice(max(0, n - 5), n)).load()
            for name in last.data_vars:
                np.testing.assert_array_equal(last[name].values, expected(str(name), n)[max(0, n - 5) :])
            dict(zarr.open_group(path, mode="r").members())
            xr.open_zarr(path, consolidated=False, chunks=None, decode_times=False).close()
    assert nursery.wait() == 0
    assert seen == sorted(seen)
    assert len(set(seen)) > 4  # the reader did see it while it was growing


@given(data=st.data())
@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # each example writes hundreds of files: not the place to shrink
    suppress_health_check=list(HealthCheck),
)
def test_any_order_of_calls_and_interruptions_ends_in_the_same_files(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    n_frames = 30
    folder = tmp_path_factory.mktemp("calls")
    target = data.draw(st.sampled_from([256, 1024, 4096, 2**20]), label="target chunk")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "TARGET_CHUNK", target)
        patch.setattr(store_module, "LARGEST_CHUNK", 8192)
        patch.setattr(ZarrStore, "COMMIT_EVERY", data.draw(st.sampled_from([0.0, 0.001, 2.0]), label="period"))
        store = ZarrStore.create(folder / "a.zarr", layout(n_frames))
        plain = ZarrStore.create(folder / "b.zarr", layout(n_frames))
        # Geometry is a property of the store: a later version with another target must continue old ones.
        patch.setattr(store_module, "TARGET_CHUNK", 512)
        fill(plain, 0, n_frames)
        plain.close()
        i = 0
        while i < n_frames:
            stop = min(n_frames, i + data.draw(st.integers(1, 12), label="frames"))
            fill(store, i, stop)
            i = stop
            action = data.draw(st.sampled_from(["on", "flush", "checkpoint", "abandon", "reopen"]), label="then")
            if action == "flush":
                store.flush()
                assert check_readable_prefix(folder / "a.zarr") >= i
            elif action == "checkpoint":
                store.checkpoint(i, state(i))
            elif action in ("abandon", "reopen"):
                before = store.committed
                if action == "abandon":
                    store._stop()
                    os.close(store._lock)
                store.close("interrupted")
                store = ZarrStore.reopen(folder / "a.zarr")
                assert store.committed >= before
                i = min(store.committed, data.draw(st.integers(0, n_frames), label="back to at most"))
        store.close()
        assert hashes(folder / "a.zarr") == hashes(folder / "b.zarr")
        assert check_readable_prefix(folder / "a.zarr") == n_frames


def test_what_is_committed_stays_so_while_a_continuation_goes_over_it(tmp_path: Path, small: None) -> None:
    path = tmp_path / "run.zarr"
    store = ZarrStore.create(path, layout(60))
    fill(store, 0, 50)
    store.close("interrupted")
    assert open_run(path).attrs["status"] == "interrupted"
    store = ZarrStore.reopen(path)
    assert open_run(path).attrs["status"] == "running"
    assert "end" not in open_run(path).attrs
    for i in range(9, 60):
        store.append(i, frame(i))
        store.flush()
        # Reading all of it takes long; what may go wrong does so at the start, at chunks and where new frames begin.
        if i < 12 or i % 8 == 7 or 47 <= i <= 52:
            assert check_readable_prefix(path) == max(50, i + 1)
    store.close()


def test_leftovers_of_a_kill_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    ZarrStore.create(path, layout(5)).close()
    leftovers = [path / "position" / "c.0.0.0.0.partial", checkpoint_file(path).with_name("current.ckpt.partial")]
    for leftover in leftovers:
        leftover.write_bytes(b"half a chu")
    ZarrStore.reopen(path).close()
    assert not any(leftover.exists() for leftover in leftovers)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    store = ZarrStore.create(path, layout(5))
    with pytest.raises(StoreError, match="being written"):
        ZarrStore.reopen(path)
    with pytest.raises(StoreError, match="being written"):
        ZarrStore.create(path, layout(5), overwrite=True)
    fill(store, 0, 5)
    store.close()
    ZarrStore.reopen(path).close()
    assert open_run(path).sizes["time"] == 5


# The thread behind


def test_append_waits_when_the_disk_is_behind(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = (VARIABLES[1],)
    gate, appended = threading.Event(), []
    write = store_module._write_new
    store = ZarrStore.create(tmp_path / "run.zarr", layout(20, variables))
    monkeypatch.setattr(store_module, "_write_new", lambda *a, **k: gate.wait(30) and write(*a, **k))

    def run() -> None:
        for i in range(20):
            store.append(i, frame(i, variables))
            appended.append(i)

    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(0.3)
    assert len(appended) == store_module.SLABS
    assert store._columns[0].slabs == store_module.SLABS
    gate.set()
    thread.join(30)
    store.close()
    assert len(appended) == 20
    assert store._columns[0].slabs == store_module.SLABS
    assert open_run(tmp_path / "run.zarr").sizes["time"] == 20


def test_a_slab_does_not_change_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame that comes meanwhile waits, or the checksum would not be that of the file."""
    monkeypatch.setattr(ZarrStore, "COMMIT_EVERY", 0.0)
    path, write_new, write = tmp_path / "run.zarr", store_module._write_new, store_module._write_all
    inside, appended = events(2)
    intact = []

    def slow(*args: Any) -> None:
        inside.set()
        appended.wait(0.3)
        write(*args)

    def checked(file: Path, *args: Any, **kwargs: Any) -> None:
        write_new(file, *args, **kwargs)
        content = np.frombuffer(file.read_bytes(), np.uint8)
        if file.name.startswith("c."):
            intact.append(content[-4:].tobytes() == list(store_module._checksummed(content[:-4]))[-1])

    store = ZarrStore.create(path, layout(20, VARIABLES[:1]))
    monkeypatch.setattr(store_module, "_write_all", slow)
    monkeypatch.setattr(store_module, "_write_new", checked)
    store.append(0, frame(0, VARIABLES[:1]))
    assert inside.wait(30)
    store.append(1, frame(1, VARIABLES[:1]))
    appended.set()
    store.close()
    assert intact
    assert all(intact)


def events(n: int) -> list[threading.Event]:
    return [threading.Event() for _ in range(n)]


def test_frames_are_committed_only_behind_those_before_them(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread is late: it commits while a full chunk still waits and a later, unfinished one is written already."""
    monkeypatch.setattr(ZarrStore, "COMMIT_EVERY", 60.0)
    path, write = tmp_path / "run.zarr", store_module._write_new
    filled, reached, checked = events(3)
    store = ZarrStore.create(path, layout(20, VARIABLES[:1]))

    def gated(file: Path, *args: Any, **kwargs: Any) -> None:
        if file.name.startswith("c.0.0."):
            filled.wait(30)
        elif file.name.startswith("c.1.0."):
            reached.set()
            checked.wait(30)
        write(file, *args, **kwargs)

    monkeypatch.setattr(store_module, "_write_new", gated)
    for i in range(5):  # two frames per chunk: two full chunks and a half
        store.append(i, frame(i, VARIABLES[:1]))
    monkeypatch.setattr(ZarrStore, "COMMIT_EVERY", 0.0)
    filled.set()
    assert reached.wait(30)
    assert (path / "position" / "c.2.0.0.0").exists()
    assert check_readable_prefix(path) == 2
    checked.set()
    store.flush()
    assert check_readable_prefix(path) == 5
    store.close()


@pytest.mark.parametrize("limit_at", [1, 53, 120])
def test_a_full_disk_ends_in_a_clear_error(tmp_path: Path, nursery: Nursery, limit_at: int) -> None:
    path = tmp_path / "run.zarr"
    assert nursery.run(what="limited", path=str(path), limit_at=limit_at, checkpoint_every=1000) == 0
    report = json.loads(path.with_suffix(".json").read_text())
    assert report["cause"] == "OSError"
    for part in (str(path), "File too large", f"{limit_at} of {N_FRAMES} frames", "resume", "Make room"):
        assert part in report["message"]
    assert f"t = {layout().times[limit_at - 1]:.12g}," in report["message"]
    assert report["alive"] == []
    assert report["seconds"] < 20
    assert check_readable(path) == limit_at
    assert not list(path.rglob("*.partial"))
    assert nursery.run(path=str(path)) == 0  # the limit is gone
    assert check_readable(path) == N_FRAMES


@pytest.mark.parametrize("call", ["append", "flush", "checkpoint", "close"])
def test_an_error_of_the_thread_is_raised_by_the_next_call(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path, variables = tmp_path / "run.zarr", VARIABLES[:2]
    store = ZarrStore.create(path, layout(20, variables))
    for i in range(7):
        store.append(i, frame(i, variables))
    store.flush()

    def full(file: Path, *args: Any, **kwargs: Any) -> None:
        if file.parent.name == "image":
            raise OSError(28, "No space left on device")
        write(file, *args, **kwargs)

    write = store_module._write_new
    monkeypatch.setattr(store_module, "_write_new", full)
    store.append(7, frame(7, variables))
    store._thread.join(30)
    assert not store._thread.is_alive()
    calls: dict[str, Any] = {
        "append": lambda: store.append(8, frame(8, variables)),
        "flush": store.flush,
        "checkpoint": lambda: store.checkpoint(1, state(1)),
        "close": store.close,
    }
    with pytest.raises(StoreError, match=r"No space left.* 7 of 20 frames, up to t = 0\.6, .*resume") as caught:
        calls[call]()
    assert isinstance(caught.value.__cause__, OSError)
    store.close("interrupted" if call == "append" else "failed")  # told once: closing is quiet now
    assert open_run(path).attrs["status"] == ("interrupted" if call == "append" else "failed")
    assert check_readable_prefix(path) == 7
    with pytest.raises(ValueError, match="closed"):
        store.append(8, frame(8, variables))


@pytest.mark.parametrize("call", ["flush", "checkpoint", "close"])
def test_an_error_while_the_caller_waits_is_raised_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    store = ZarrStore.create(tmp_path / "run.zarr", layout(20))
    waiting = threading.Event()

    def full(*args: Any, **kwargs: Any) -> None:
        waiting.wait(30)
        raise OSError(28, "No space left on device")

    fill(store, 0, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "_write_new", full)
        threading.Timer(0.2, waiting.set).start()
        with pytest.raises(StoreError, match=r"No space left.* No frame is committed"):
            getattr(store, call)(*((1, state(1)) if call == "checkpoint" else ()))
    store.close("failed")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_checkpoint(tmp_path / "run.zarr")


def test_frames_that_reached_the_disk_before_the_error_are_committed(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here nothing was flushed: the commit marks are written when the error has already happened."""
    store = ZarrStore.create(tmp_path / "run.zarr", layout(20))
    write = store_module._write_new

    def full(file: Path, *args: Any, **kwargs: Any) -> None:
        if file.name.startswith("c.7."):
            raise OSError(28, "No space left on device")
        write(file, *args, **kwargs)

    monkeypatch.setattr(store_module, "_write_new", full)
    with pytest.raises(StoreError, match="7 of 20"):  # noqa: PT012 (which call finds out is a matter of timing)
        fill(store, 0, 20)
        store.flush()
    store.close("failed")
    assert check_readable_prefix(tmp_path / "run.zarr") == 7


def interrupted_script(path: str, closing: str) -> None:
    """A computation that is stopped with Ctrl-C while the disk is slow."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
    write = store_module._write_new

    def slow(*args: Any, **kwargs: Any) -> None:
        time.sleep(0.05)
        write(*args, **kwargs)

    store = ZarrStore.create(path, layout(10**5, (VARIABLES[1],)))
    for name, value in SMALL.items():
        setattr(store_module, name, value)
    store_module._write_new = slow
    i = 0
    try:
        while True:
            store.append(i, frame(i % 1000, (VARIABLES[1],)))
            i += 1
            if i == 2000:
                print("running", flush=True)
    except KeyboardInterrupt:
        if closing == "close":
            store.close("interrupted", step=i)
            print(store.committed - i, flush=True)


@pytest.mark.parametrize("closing", ["close", "walk away"])
def test_ctrl_c_ends_the_interpreter(tmp_path: Path, closing: str) -> None:
    path = tmp_path / "run.zarr"
    with script("interrupted", str(path), closing) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        rest = process.stdout.read()
    run = open_run(path)
    assert run.attrs["status"] == ("interrupted" if closing == "close" else "running")
    if closing == "close":
        assert int(rest) in (0, 1)  # all that was appended, and perhaps the frame during which the signal came
        assert run.sizes["time"] >= run.attrs["step"]


def test_after_an_interrupted_append_the_store_closes_but_takes_no_more(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of a frame may have been handed over: appending it again could overwrite the other frames of its chunk."""
    path = tmp_path / "run.zarr"
    store = ZarrStore.create(path, layout(20))
    fill(store, 0, 9)

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    # A context of its own: undoing everything would change the chunk sizes of `small` under the running thread.
    with monkeypatch.context() as patch:
        patch.setattr(store, "_append_blocks", interrupt)
        with pytest.raises(KeyboardInterrupt):
            store.append(9, frame(9))
    with pytest.raises(StoreError, match=r"interrupted halfway.*resume"):
        store.append(9, frame(9))
    store.checkpoint(1, state(9))
    store.close("interrupted")
    assert load_checkpoint(path).index == check_readable_prefix(path) == 9
    store = ZarrStore.reopen(path)
    fill(store, 9, 20)
    store.close()
    assert check_readable_prefix(path) == 20


def test_durable_syncs_every_file_before_its_commit_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Any] = []
    for durable in (False, True):
        store = ZarrStore.create(tmp_path / f"{durable}.zarr", layout(5), durable=durable)
        monkeypatch.setattr(os, "fsync", spy(synced, os.fsync))
        fill(store, 0, 5)
        store.flush()
        monkeypatch.undo()
        store.close()
        assert len(synced) == (2 * (len(VARIABLES) + 1) if durable else 0)


# Checkpoints


@pytest.fixture
def checkpointed(tmp_path: Path) -> Path:
    path = tmp_path / "run.zarr"
    store = ZarrStore.create(path, layout(5))
    fill(store, 0, 2)
    store.checkpoint(10, state(2), 2)
    fill(store, 2, 4)
    store.checkpoint(20, state(4), 4)
    store.close("interrupted")
    return path


def flip(file: Path, position: int, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << bit
    file.write_bytes(content)


def test_a_checkpoint_comes_back_to_the_bit(tmp_path: Path, checkpointed: Path) -> None:
    moved = checkpointed.rename(tmp_path / "moved.zarr")
    loaded = load_checkpoint(moved)
    assert (loaded.step, loaded.index, loaded.digest) == (20, 4, "d1")
    assert list(loaded.state) == list(state(4))
    assert all(
        torch.equal(loaded.state[name], x) and loaded.state[name].dtype == x.dtype for name, x in state(4).items()
    )


def test_a_view_does_not_drag_its_storage_along(checkpointed: Path) -> None:
    store = ZarrStore.reopen(checkpointed)
    store.checkpoint(30, {"x": torch.zeros(10**6)[5:8]})
    store.close()
    assert checkpoint_file(checkpointed).stat().st_size < 10**4


def test_every_flipped_bit_is_refused(checkpointed: Path) -> None:
    file = checkpoint_file(checkpointed)
    intact = file.read_bytes()
    rng = random.Random(0)
    # Magic line, digest and header byte by byte; then the payload with its own header, body and end.
    for position in [*range(200), *rng.sample(range(200, len(intact)), 60), *range(len(intact) - 20, len(intact))]:
        flip(file, position, rng.randrange(8))
        with pytest.raises(CorruptCheckpoint):
            load_checkpoint(checkpointed)
        file.write_bytes(intact)
    for damaged in (intact[:-1], intact + b"\0", intact[: len(intact) // 2], b""):
        file.write_bytes(damaged)
        with pytest.raises(CorruptCheckpoint):
            load_checkpoint(checkpointed)
    file.write_bytes(intact)
    assert load_checkpoint(checkpointed).step == 20


def test_a_damaged_checkpoint_names_the_way_out_and_the_way_works(checkpointed: Path) -> None:
    file = checkpoint_file(checkpointed)
    flip(file, 300)
    with pytest.raises(CorruptCheckpoint) as caught:
        load_checkpoint(checkpointed)
    for part in (str(file), "checksum differs", "previous checkpoint (step 10) is intact", "delete", "resume"):
        assert part in str(caught.value)
    file.unlink()
    loaded = load_checkpoint(checkpointed)
    assert (loaded.step, loaded.index) == (10, 2)
    store = ZarrStore.reopen(checkpointed)
    fill(store, loaded.index, 5)
    store.close()
    assert check_readable_prefix(checkpointed) == 5


def test_without_an_intact_predecessor_the_message_says_so(checkpointed: Path) -> None:
    for which in ("current", "previous"):
        flip(checkpoint_file(checkpointed, which), 300)
    with pytest.raises(CorruptCheckpoint, match="No earlier checkpoint is intact"):
        load_checkpoint(checkpointed)
    checkpoint_file(checkpointed).unlink()
    with pytest.raises(CorruptCheckpoint, match=r"previous\.ckpt.*No earlier"):
        load_checkpoint(checkpointed)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, checkpointed: Path) -> None:
    other = tmp_path / "other.zarr"
    ZarrStore.create(other, layout(5, digest="d2")).close()
    checkpoint_file(other).write_bytes(checkpoint_file(checkpointed).read_bytes())
    with pytest.raises(ValueError, match=r"another run.*'d1'.*'d2'"):
        load_checkpoint(other)


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(
    checkpointed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ZarrStore.reopen(checkpointed)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module, "_write_all", full)
    with pytest.raises(StoreError, match="No space left"):
        store.checkpoint(30, state(4))
    monkeypatch.undo()
    store.close()
    assert load_checkpoint(checkpointed).step == 20
    assert not list(checkpointed.rglob("*.partial"))


def test_a_checkpoint_covers_its_frames(tmp_path: Path) -> None:
    """The checkpoint is on disk only when the frames it counts are committed."""
    store = ZarrStore.create(tmp_path / "run.zarr", layout(5))
    fill(store, 0, 3)
    store.checkpoint(1, state(3))
    assert check_readable_prefix(tmp_path / "run.zarr") == 3
    assert load_checkpoint(tmp_path / "run.zarr").index == 3
    with pytest.raises(ValueError, match="4 frames, but 3"):
        store.checkpoint(2, state(3), 4)
    store.close()


# At the door


def test_what_exists_is_not_overwritten_unasked(checkpointed: Path) -> None:
    before = hashes(checkpointed)
    with pytest.raises(FileExistsError, match=r"run store.*resume.*overwrite=True"):
        ZarrStore.create(checkpointed, layout(5))
    assert hashes(checkpointed) == before


def test_overwriting_replaces_a_run_store(checkpointed: Path) -> None:
    store = ZarrStore.create(checkpointed, layout(7), overwrite=True)
    assert open_run(checkpointed).sizes["time"] == 0
    assert not has_checkpoint(checkpointed)
    fill(store, 0, 7)
    store.close()
    assert check_readable_prefix(checkpointed) == 7
    assert [p.name for p in checkpointed.parent.iterdir()] == ["run.zarr"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_but_a_run_store_is_ever_deleted(tmp_path: Path, checkpointed: Path, overwrite: bool) -> None:
    file, folder, group = tmp_path / "notes.txt", tmp_path / "folder", tmp_path / "group.zarr"
    file.write_text("mine")
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    zarr.create_group(group, zarr_format=3)
    (checkpointed / "figure.png").write_text("mine")
    for path, found in ((file, "a file"), (folder, "thesis"), (group, "Zarr"), (checkpointed, "figure|run store")):
        with pytest.raises(FileExistsError, match=f"{found}.*another path|another path.*{found}"):
            ZarrStore.create(path, layout(5), overwrite=overwrite)
    assert (
        file.read_text() == (folder / "thesis.tex").read_text() == (checkpointed / "figure.png").read_text() == "mine"
    )
    assert zarr.open_group(group, mode="r") is not None


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "a" / "b" / "run.zarr"):
        ZarrStore.create(path, layout(5)).close()
        assert open_run(path).attrs["status"] == "complete"


def test_a_failed_creation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module, "_create_array", full)
    with pytest.raises(OSError, match="No space"):
        ZarrStore.create(tmp_path / "run.zarr", layout(5))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("reader", [open_run, load_checkpoint, read_settings, ZarrStore.reopen])
def test_what_is_not_a_store_is_named(tmp_path: Path, reader: Any) -> None:
    file, folder, group = tmp_path / "notes.txt", tmp_path / "folder", tmp_path / "group.zarr"
    file.write_text("mine")
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    zarr.create_group(group, zarr_format=3)
    cases = {
        tmp_path / "nowhere": "nothing at",
        file: "it is a file",
        folder: "a folder with thesis.tex",
        group: "a Zarr folder that no run wrote",
    }
    for path, found in cases.items():
        with pytest.raises(ValueError, match=f"{found}.*(Check|open)"):
            reader(path)
    with pytest.raises(ValueError, match="local folder"):
        reader("s3://bucket/run.zarr")


def test_a_store_of_a_later_format_is_refused(checkpointed: Path) -> None:
    metadata = checkpointed / "checkpoint" / "zarr.json"
    metadata.write_text(metadata.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match="format 2, this version reads 1"):
        open_run(checkpointed)


@pytest.mark.parametrize("kind", [Memory, ZarrStore])
def test_frames_are_checked(tmp_path: Path, kind: Any) -> None:
    store = Memory(layout(5)) if kind is Memory else ZarrStore.create(tmp_path / "run.zarr", layout(5))
    good = frame(0)
    bad = {
        "expected": {k: v for k, v in good.items() if k != "energy"},
        r"expected \['alive'": {**good, "extra": good["energy"]},
        "energy is torch.float32": {**good, "energy": good["energy"].float()},
        r"image .*\(1499,\).*expected .*\(1500,\)": {**good, "image": good["image"][1:]},
    }
    for message, values in bad.items():
        with pytest.raises(ValueError, match=message):
            store.append(0, values)
    for index, message in ((1, "frame 0 was due"), (5, "does not exist"), (-1, "does not exist")):
        with pytest.raises(ValueError, match=message):
            store.append(index, good)
    store.append(0, good)
    with pytest.raises(ValueError, match="frame 1 was due"):
        store.append(0, good)
    with pytest.raises(ValueError, match="Unknown status"):
        store.close("finished")
    with pytest.raises(ValueError, match="JSON"):
        store.close("complete", answer=object())
    store.close()


def test_a_gap_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    store = ZarrStore.create(path, layout(9))
    fill(store, 0, 3)
    store.close()
    store = ZarrStore.reopen(path)
    with pytest.raises(ValueError, match=r"gap.*3 committed"):
        store.append(4, frame(4))
    fill(store, 3, 5)
    store.close()
    assert check_readable_prefix(path) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"times": np.array([0.0, 0.0])}, "strictly increasing"),
        ({"times": np.array([0.0, np.nan])}, "finite"),
        ({"times": np.arange(3)}, "float64"),
        ({"variables": (Variable("time", (), (), "float64"),)}, "taken"),
        ({"variables": (Variable("sigma", (), (), "float64"),)}, "taken"),
        ({"variables": (Variable("a/b", (), (), "float64"),)}, "cannot name an array"),
        ({"variables": (Variable("x", ("time",), (3,), "float64"),)}, "time"),
        ({"variables": (Variable("x", ("k",), (3, 4), "float64"),)}, "one distinct name per axis"),
        ({"variables": (Variable("x", ("replica",), (3,), "float64"),)}, "3 entries|2 entries"),
        ({"variables": (Variable("x", (), (), "U4"),)}, "numbers"),
        ({"coords": {"name": ((), np.array("a"), {})}}, "numbers"),
        ({"attrs": {"status": "mine"}}, "store itself"),
        ({"attrs": {"scenario": object()}}, "JSON"),
    ],
)
def test_layouts_are_checked(change: dict[str, Any], message: str) -> None:
    good = layout(5)
    arguments = {"times": good.times, "variables": VARIABLES, "coords": good.coords, "attrs": good.attrs}
    with pytest.raises(ValueError, match=message):
        Layout(**{**arguments, **change})


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        interrupted_script(*sys.argv[2:])
