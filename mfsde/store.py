"""The only crossing from tensors to labelled arrays: a run in memory, or on disk as a Zarr v3 store.

A run store is a folder that any Zarr v3 reader understands:

    zarr.json              root group; its attributes are the provenance, status, start and end
    time/                  NaN until committed: time[i] is written after frame i and is its commit mark
    position/ ...          one array per variable, full length from the start; NaN (integers: 0) until written
    replica/ ...           static coordinates
    checkpoint/zarr.json   group; its attributes hold the format number and the settings of the run
    checkpoint/times/      array of all planned time labels. Beside its metadata, where no reader of Zarr
                           looks for other files: current.ckpt, previous.ckpt, and unfinished files

Every file is written under another name and then renamed, so that a reader, or a process that comes after
`kill -9`, sees whole files only. Attributes that NetCDF could not hold (bool, None, nested values, non-finite
numbers) are canonical JSON strings.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import itertools
import json
import math
import os
import shutil
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import google_crc32c  # zarr's own implementation of the checksum; installed with it
import numpy as np
import torch
import xarray as xr
from torch import Tensor

if TYPE_CHECKING:
    import zarr

FORMAT = 1
TARGET_CHUNK = 2 * 2**20  # bytes: large enough that the file system does not notice, small enough to rewrite
LARGEST_CHUNK = 64 * 2**20  # bytes: frames above are split along the particles
PIECE = 2**18  # bytes per write
SLABS = 3  # one being filled, one waiting, one being written

_STATUSES = ("running", "complete", "interrupted", "failed")
_RESERVED_ATTRIBUTES = ("coordinates", "status", "start", "end")
_MAGIC = b"mfsde checkpoint 1\n"


class StoreError(RuntimeError):
    """Frames could not be written, or a store cannot be continued; the cause is chained."""


class CorruptCheckpoint(RuntimeError):
    """A checkpoint file is not what was written."""


# What is stored


@dataclass(frozen=True)
class Variable:
    """One data variable, described without its leading time axis."""

    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    attrs: Mapping[str, str] = field(default_factory=dict, hash=False)


Coordinate = tuple[tuple[str, ...], np.ndarray | np.generic | float, Mapping[str, str]]


@dataclass(frozen=True)
class Layout:
    """Everything about a run's Dataset except the values: fixed before the first frame.

    `coords` are the static ones (dims, values, attrs), scalars with dims (); `time` is made from `times`, and
    `time_name` says what it counts.
    `attrs` is the provenance: values that JSON can hold, nested or not.
    """

    times: np.ndarray
    variables: tuple[Variable, ...]
    coords: Mapping[str, Coordinate]
    attrs: Mapping[str, Any]
    time_name: str = "time"

    @property
    def time_attributes(self) -> dict[str, str]:
        """Attributes of the coordinate time."""
        return {"long_name": self.time_name, "units": "1"}

    def __post_init__(self) -> None:
        _check_times(self.times)
        names = [v.name for v in self.variables] + list(self.coords)
        for name in names:
            _check_name(name, names)
        for v in self.variables:
            _check_array(v.name, v.dims, v.shape, v.dtype)
        for name, (dims, values, _) in self.coords.items():
            _check_array(name, dims, np.shape(values), str(np.asarray(values).dtype))
        _check_sizes(self)
        for key in set(self.attrs) & set(_RESERVED_ATTRIBUTES):
            raise ValueError(f"The store itself writes the attribute {key!r}; give yours another name.")
        _canonical(dict(self.attrs))


def _check_times(times: np.ndarray) -> None:
    t = np.asarray(times)
    if t.ndim != 1 or t.dtype != np.float64 or not np.isfinite(t).all() or (np.diff(t) <= 0).any():
        raise ValueError(
            f"Time labels must be one strictly increasing row of finite float64 numbers, got {t.dtype} of "
            f"shape {t.shape}. NaN marks what is not committed, and equal labels could not be told apart."
        )


def _check_name(name: str, names: list[str]) -> None:
    if names.count(name) > 1 or name in ("time", "checkpoint", "zarr.json"):
        raise ValueError(f"The name {name!r} is taken in the store; rename the variable or coordinate.")
    if not name or name.startswith((".", "__")) or "/" in name or not name.isprintable():
        raise ValueError(f"{name!r} cannot name an array, which is a folder. Use letters, digits, underscores.")


def _check_array(name: str, dims: tuple[str, ...], shape: tuple[int, ...], dtype: str) -> None:
    if len(dims) != len(shape) or "time" in dims or len(set(dims)) != len(dims):
        raise ValueError(
            f"{name} has dims {dims} for shape {shape}; expected one distinct name per axis, without 'time', "
            "which the store puts in front."
        )
    if np.dtype(dtype).kind not in "biufc":
        raise ValueError(f"{name} has dtype {dtype}; arrays hold numbers. Put text into an attribute.")


def _check_sizes(layout: Layout) -> None:
    sizes: dict[str, int] = {}
    shapes = [(v.name, v.dims, v.shape) for v in layout.variables]
    shapes += [(name, dims, np.shape(values)) for name, (dims, values, _) in layout.coords.items()]
    for name, dims, shape in shapes:
        for dim, size in zip(dims, shape, strict=True):
            if sizes.setdefault(dim, size) != size:
                raise ValueError(f"{name} has {size} entries along {dim!r}; another array has {sizes[dim]}.")


def _canonical(value: Any) -> str:
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Attributes must hold plain JSON values: {error}. Convert them before.") from error


def _attributes(values: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes that Zarr and NetCDF give back as they are; what they cannot hold becomes canonical JSON."""
    return {key: value if _is_plain(value) else _canonical(value) for key, value in values.items()}


def _is_plain(value: Any) -> bool:
    if isinstance(value, bool):  # NetCDF has no bool
        return False
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return isinstance(value, str) or (isinstance(value, float) and math.isfinite(value))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _check_status(status: str) -> None:
    if status not in _STATUSES:
        raise ValueError(f"Unknown status {status!r}; expected one of {', '.join(_STATUSES)}.")


def _check_frame(layout: Layout, index: int, frame: Mapping[str, Tensor]) -> None:
    if not 0 <= index < len(layout.times):
        raise ValueError(f"Frame {index} does not exist: the layout has {len(layout.times)} times, from 0 on.")
    if len(frame) != len(layout.variables) or any(v.name not in frame for v in layout.variables):
        expected = sorted(v.name for v in layout.variables)
        raise ValueError(f"Frame {index} has the variables {sorted(frame)}; expected {expected}.")
    for v in layout.variables:
        x = frame[v.name]
        if tuple(x.shape) != v.shape or str(x.dtype) != f"torch.{v.dtype}":
            raise ValueError(
                f"Frame {index} of {v.name} is {x.dtype} of shape {tuple(x.shape)}; "
                f"expected torch.{v.dtype} of shape {v.shape}, as in the layout."
            )


# In memory


class Memory:
    """The frames of a run without a store; the same calls as `ZarrStore`, the same Dataset as `open_run`."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._committed = 0
        self._attrs = {"status": "running", "start": _now()}
        n = len(layout.times)
        # Pages of an empty array are taken when they are first written: frames that never come cost nothing.
        self._values = {v.name: np.empty((n, *v.shape), v.dtype) for v in layout.variables}
        self._tensors = {name: torch.from_numpy(values) for name, values in self._values.items()}

    @property
    def committed(self) -> int:
        """Number of frames appended so far."""
        return self._committed

    def append(self, index: int, frame: Mapping[str, Tensor]) -> None:
        """Copy frame `index`; frames come in order. ValueError for a frame that is not as in the layout."""
        _check_frame(self._layout, index, frame)
        if index != self._committed:
            raise ValueError(f"Frame {index} came where frame {self._committed} was due; keep the order.")
        for name, x in frame.items():
            self._tensors[name][index].copy_(x.detach())
        self._committed = index + 1

    def flush(self) -> None:
        """Nothing to do: every frame is at its place already."""

    def checkpoint(self, step: int, state: Mapping[str, Tensor], index: int | None = None) -> None:
        """Nothing to do: a run in memory does not outlive its process."""

    def close(self, status: str = "complete", **attrs: Any) -> None:
        """Record how the run ended."""
        _check_status(status)
        self._attrs |= {"status": status, "end": _now(), **_attributes(attrs)}

    def dataset(self) -> xr.Dataset:
        """The frames appended so far; the arrays are shared, not copied."""
        layout, n = self._layout, self._committed
        data = {v.name: (("time", *v.dims), self._values[v.name][:n], dict(v.attrs)) for v in layout.variables}
        coords: dict[str, Any] = {n: (d, np.asarray(x), dict(a)) for n, (d, x, a) in layout.coords.items()}
        coords["time"] = ("time", np.array(layout.times[:n]), layout.time_attributes)
        return xr.Dataset(data, coords, {**_attributes(layout.attrs), **self._attrs})


# Files


def _replace(target: Path, parts: Iterable[Any], sync: bool) -> None:
    """Write `parts`, one after the other, to a new file and rename it to `target`: readers see old or new."""
    partial = target.with_name(f"{target.name}.partial")
    _write_new(partial, parts, sync)
    os.replace(partial, target)
    if sync:
        _sync_folder(target.parent)


def _write_new(file: Path, parts: Iterable[Any], sync: bool) -> None:
    """Write a file that nobody reads yet; nothing is left of it after an error."""
    try:
        with open(file, "wb", buffering=0) as handle:
            for part in parts:
                _write_all(handle, part)
            if sync:
                os.fsync(handle.fileno())
    except BaseException:
        file.unlink(missing_ok=True)
        raise


def _write_all(file: io.FileIO, part: Any) -> None:
    # One write may be cut short by a limit or a nearly full disk; the next one then reports the reason.
    rest = memoryview(part).cast("B")
    while len(rest):
        rest = rest[file.write(rest) :]


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checksummed(octets: np.ndarray) -> Iterator[Any]:
    """A chunk as Zarr's crc32c codec stores it: the bytes, in pieces, and then their checksum.

    The checksum holds the interpreter lock and writing releases it: taking turns, neither keeps the
    computation waiting for longer than a piece.
    """
    crc = 0
    for start in range(0, len(octets), PIECE):
        piece = octets[start : start + PIECE]
        crc = google_crc32c.extend(crc, piece)
        yield piece
    yield crc.to_bytes(4, "little")


def _tidy(path: Path) -> None:
    for leftover in path.rglob("*.partial"):
        leftover.unlink(missing_ok=True)


# The geometry of an array on disk


@dataclass(frozen=True)
class _Grid:
    """How an array is cut: `rows` frames per chunk and, where frames are huge, `width` entries of `axis`."""

    shape: tuple[int, ...]
    rows: int
    axis: int
    width: int

    @classmethod
    def of(cls, variable: Variable, n_frames: int) -> _Grid:
        shape, dims = variable.shape, variable.dims
        nbytes = math.prod(shape) * np.dtype(variable.dtype).itemsize
        rows = min(max(1, TARGET_CHUNK // max(1, nbytes)), max(1, n_frames))
        if not shape:
            return cls(shape, rows, 0, 1)
        axis = dims.index("particle") if "particle" in dims else int(np.argmax(shape))
        blocks = min(shape[axis], math.ceil(nbytes / LARGEST_CHUNK)) if rows == 1 else 1
        return cls(shape, rows, axis, max(1, math.ceil(shape[axis] / max(1, blocks))))

    @classmethod
    def stored(cls, folder: Path) -> _Grid:
        """The grid an array was made with, which need not be the one it would get today."""
        metadata = json.loads((folder / "zarr.json").read_bytes())
        shape = tuple(metadata["shape"][1:])
        rows, *cut = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        axis = next((a for a, n in enumerate(shape) if cut[a] < n), 0)
        return cls(shape, rows, axis, cut[axis] if cut else 1)

    @property
    def blocks(self) -> int:
        return math.ceil(self.shape[self.axis] / self.width) if self.shape else 1

    @property
    def chunk(self) -> tuple[int, ...]:
        if not self.shape:
            return (self.rows,)
        cut = [max(1, n) for n in self.shape]
        cut[self.axis] = self.width
        return (self.rows, *cut)

    def extent(self, block: int) -> int:
        return min(self.width, self.shape[self.axis] - block * self.width)

    def key(self, chunk: int, block: int) -> str:
        """File name of a chunk, with the separator `.`: one flat folder per array."""
        index = [0] * len(self.shape)
        if index:
            index[self.axis] = block
        return ".".join(["c", str(chunk), *map(str, index)])


def _fill(dtype: str) -> Any:
    kind = np.dtype(dtype).kind
    return np.nan if kind == "f" else complex(np.nan, np.nan) if kind == "c" else np.zeros((), dtype).item()


@dataclass
class _Slab:
    """One chunk of a column on its way to disk; `stop` is one past the last frame put into it."""

    column: _Column
    values: np.ndarray
    tensor: Tensor
    chunk: int = 0
    block: int = 0
    stop: int = 0
    dirty: bool = False
    filled: bool = False  # with fill values, or with what is committed, in rows that no frame reaches


class _Column:
    """One variable on its way to disk: its grid, its slabs, and how many leading frames are in its files."""

    def __init__(self, root: Path, variable: Variable, committed: int) -> None:
        self.variable = variable
        self.folder = root / variable.name
        self.grid = _Grid.stored(self.folder)
        self.fill = _fill(variable.dtype)
        self.current: _Slab | None = None
        self.free: list[_Slab] = []
        self.slabs = 0
        self.restored = committed
        self.written = committed

    def new_slab(self) -> _Slab:
        values = np.empty(self.grid.chunk, self.variable.dtype)
        return _Slab(self, values, torch.from_numpy(values))

    def prepare(self, slab: _Slab, chunk: int, block: int) -> None:
        """Make `slab` stand for this chunk: fill values, and what an earlier process committed of it.

        A chunk file is always rewritten as a whole, so what is committed in it has to be carried over.
        """
        rows = self.grid.rows
        start, stop = chunk * rows, min((chunk + 1) * rows, self.restored)
        slab.chunk, slab.block, slab.stop, slab.dirty = chunk, block, start, False
        short = self.grid.blocks > 1 and block == self.grid.blocks - 1
        slab.filled = short or (rows > 1 and stop > start)
        if slab.filled:
            slab.values.fill(self.fill)
        if rows > 1 and stop > start:
            slab.values[: stop - start] = self.read(start, stop)

    def read(self, start: int, stop: int) -> Any:
        try:
            return _zarr().open_array(str(self.folder), mode="r", zarr_format=3)[start:stop]
        except ValueError as error:
            raise StoreError(
                f"{self.folder} is damaged between frames {start} and {stop}: {error}. "
                "The run cannot be continued here; start it again with overwrite=True."
            ) from error

    def write(self, slab: _Slab, sync: bool) -> None:
        """Write the slab's chunk file as a whole."""
        if not slab.filled:
            # Rows that no frame has reached; a chunk that is full needs no filling at all.
            slab.values[slab.stop - slab.chunk * self.grid.rows :] = self.fill
        octets = slab.values.reshape(-1).view(np.uint8)
        _replace(self.folder / self.grid.key(slab.chunk, slab.block), _checksummed(octets), sync)
        slab.dirty = False
        self.count(slab)

    def count(self, slab: _Slab) -> None:
        """Frames of a slab that is on disk count as written, but only where no earlier frame is missing."""
        if slab.block == self.grid.blocks - 1 and self.written >= slab.chunk * self.grid.rows:
            self.written = max(self.written, slab.stop)


# On disk


class ZarrStore:
    """A run on disk, written by a thread behind the computation. Made by `create` or `reopen`; one writer.

    `append` copies a frame into slabs of the size of a chunk. The thread writes the full ones and, when a
    frame has waited for `COMMIT_EVERY` seconds or `flush` asks for it, the others too; then it commits. A
    variable has at most `SLABS` slabs: `append` waits when the disk is behind. What the thread could not
    write is raised as StoreError by the next call. With `durable=True` every file is synced, so that what is
    committed also survives a power failure; without it, that holds for checkpoints only.
    """

    COMMIT_EVERY: ClassVar[float] = 2.0

    def __init__(self, path: Path, layout: Layout, lock: int, committed: int, durable: bool) -> None:
        self.path = path
        self.layout = layout
        self._lock = lock
        self._durable = durable
        columns = [_Column(path, v, committed) for v in layout.variables]
        # Large frames last: they wake the thread, which then competes for the interpreter lock with `append`.
        self._columns = sorted(columns, key=lambda column: -column.grid.rows)
        self._time_grid = _Grid.stored(path / "time")
        self._committed = committed
        self._next: int | None = 0 if committed == 0 else None  # None: the first append says where to go on
        self._torn = False  # an append was interrupted, and some of its variables may be handed over already
        # The mutex guards everything below, and the slabs that are being filled. `with` takes the mutex itself and
        # not the condition: entering a condition is Python code, where Ctrl-C could leave it locked for ever.
        self._mutex = threading.Lock()
        self._changed = threading.Condition(self._mutex)
        self._jobs: deque[_Slab] = deque()
        self._waiting_since: float | None = None
        self._flush_wanted = False
        self._stopping = False
        self._closed = False
        self._error: BaseException | None = None
        self._error_told = False
        self._thread = threading.Thread(target=self._write_behind, name=f"writer of {path.name}", daemon=True)
        self._thread.start()

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], layout: Layout, overwrite: bool = False, durable: bool = False
    ) -> ZarrStore:
        """Make a new store; it appears under `path` complete with all its arrays, or not at all.

        FileExistsError where something is at `path`; `overwrite` replaces an earlier run store, nothing else.
        """
        root = _local(path)
        _check_free(root, overwrite)
        root.parent.mkdir(parents=True, exist_ok=True)
        build = root.parent / f".{root.name}.{uuid.uuid4().hex}"
        try:
            _write_skeleton(build, layout)
            lock = _take_lock(build)
            _put_in_place(build, root, overwrite)
            if durable:
                os.sync()
        except BaseException:
            shutil.rmtree(build, ignore_errors=True)
            raise
        return cls(root, layout, lock, 0, durable)

    @classmethod
    def reopen(cls, path: str | os.PathLike[str], durable: bool = False) -> ZarrStore:
        """Open a store to continue it; the first `append` may go back to any frame up to `committed`.

        ValueError where there is no run store, StoreError where another process is writing to it.
        """
        root = _require_store(path)
        lock = _take_lock(root)
        try:
            _tidy(root)
            layout = _read_layout(root)
            committed = _prefix(_zarr().open_array(str(root / "time"), mode="r", zarr_format=3)[:])
            _update_attributes(root, {"status": "running"}, drop=("end", "error"))
        except BaseException:
            os.close(lock)
            raise
        return cls(root, layout, lock, committed, durable)

    @property
    def committed(self) -> int:
        """Number of frames that are on disk and visible to readers."""
        return self._committed

    # The caller's side

    def append(self, index: int, frame: Mapping[str, Tensor]) -> None:
        """Copy frame `index` and return; it is committed within COMMIT_EVERY seconds, or by `flush`.

        ValueError for a frame out of order or not as in the layout, StoreError where writing has failed.
        """
        self._check_usable()
        _check_frame(self.layout, index, frame)
        self._check_order(index)
        self._torn = True
        for column in self._columns:
            x = frame[column.variable.name].detach()
            if column.grid.rows == 1:
                self._append_blocks(column, index, x)
            else:
                self._append_row(column, index, x)
        with self._mutex:
            self._next, self._torn = index + 1, False
            if self._waiting_since is None:
                self._waiting_since = time.monotonic()
                self._changed.notify_all()

    def flush(self) -> None:
        """Return when everything appended so far is on disk and committed; StoreError where that failed."""
        self._check_usable()
        with self._mutex:
            self._flush_wanted = True
            self._changed.notify_all()
            while self._flush_wanted:
                self._changed.wait()
                self._raise_error()

    def checkpoint(self, step: int, state: Mapping[str, Tensor], index: int | None = None) -> None:
        """Flush, then write `state` at `step` with its own checksum; the checkpoint before is kept.

        `index` is the number of frames that go with the state: where `append` goes on after it is loaded.
        """
        self.flush()
        appended = self._committed if self._next is None else min(self._next, self._committed)
        index = appended if index is None else index
        if not 0 <= index <= appended:
            raise ValueError(f"The checkpoint claims {index} frames, but {appended} were appended.")
        header = {"step": step, "index": index, "digest": str(self.layout.attrs.get("digest", ""))}
        try:
            _write_checkpoint(self.path, header, state)
        except OSError as error:
            raise self._describe(error) from error

    def close(self, status: str = "complete", **attrs: Any) -> None:
        """Flush, end the thread, and write `status`, `end` and `attrs` to the root attributes.

        After a failed write: status "failed" and StoreError, unless an earlier call has raised that already.
        """
        _check_status(status)
        if self._closed:
            return
        final = _attributes(attrs)
        try:
            failure = self._last_flush()
            status = status if failure is None else "failed"
            try:
                _update_attributes(self.path, {"status": status, "end": _now(), **final})
            except OSError as error:
                failure = failure or (None if self._error_told else self._describe(error))
        finally:
            self._stop()
            os.close(self._lock)
        if failure is not None:
            raise failure

    def _last_flush(self) -> StoreError | None:
        try:
            if not self._error_told:
                self.flush()
        except StoreError as error:
            return error
        return None

    def _stop(self) -> None:
        with self._mutex:
            self._stopping = self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _check_usable(self) -> None:
        if self._closed:
            raise ValueError(f"{self.path} is closed; continue it with ZarrStore.reopen.")
        self._raise_error()

    def _check_order(self, index: int) -> None:
        if self._torn:
            raise StoreError(
                f"Appending a frame to {self.path} was interrupted halfway; close the store and continue with "
                f"mfsde.resume({str(self.path)!r})."
            )
        if self._next is None and index > self._committed:
            raise ValueError(
                f"Frame {index} would leave a gap: {self.path} has {self._committed} committed frames. "
                "Continue from an earlier checkpoint."
            )
        if self._next is not None and index != self._next:
            raise ValueError(f"Frame {index} came where frame {self._next} was due; keep the order.")

    def _raise_error(self) -> None:
        if self._error is not None:
            self._error_told = True
            raise self._describe(self._error) from self._error

    def _describe(self, error: BaseException) -> StoreError:
        n, times = self._committed, self.layout.times
        kept = f"{n} of {len(times)} frames, up to t = {times[n - 1]:.12g}, are" if n else "No frame is"
        return StoreError(
            f"Writing to {self.path} failed: {error}. {kept} committed and readable. "
            f"Make room or repair the disk, then continue with mfsde.resume({str(self.path)!r})."
        )

    def _append_blocks(self, column: _Column, index: int, x: Tensor) -> None:
        """A frame that fills its chunk (or several): it goes to the thread at once."""
        grid = column.grid
        for block in range(grid.blocks):
            slab = self._take_slab(column, index, block)
            part, target = x, slab.tensor[0]
            if grid.blocks > 1:
                part = x.narrow(grid.axis, block * grid.width, grid.extent(block))
                target = target.narrow(grid.axis, 0, grid.extent(block))
            target.copy_(part)
            slab.stop = index + 1
            self._hand_over(slab)

    def _append_row(self, column: _Column, index: int, x: Tensor) -> None:
        """A frame that shares its chunk with others: it goes to its row of the slab being filled."""
        x = x.cpu()  # waits for an accelerator here, and not while holding the lock
        chunk, row = divmod(index, column.grid.rows)
        if column.current is None or column.current.chunk != chunk:
            column.current = self._take_slab(column, chunk, 0)
        slab = column.current
        with self._mutex:  # the thread may be writing this very slab
            slab.tensor[row].copy_(x)
            slab.stop = index + 1
            slab.dirty = True
        if row + 1 == column.grid.rows or index + 1 == len(self.layout.times):
            self._hand_over(slab)

    def _take_slab(self, column: _Column, chunk: int, block: int) -> _Slab:
        with self._mutex:
            while not column.free and column.slabs == SLABS:
                self._raise_error()
                self._changed.wait()
            self._raise_error()
            slab = column.free.pop() if column.free else None
            column.slabs += slab is None
        slab = slab or column.new_slab()
        column.prepare(slab, chunk, block)
        return slab

    def _hand_over(self, slab: _Slab) -> None:
        with self._mutex:
            # In this order, an interruption in between leaves a slab that is written twice, not one that is lost.
            self._jobs.append(slab)
            if slab.column.current is slab:
                slab.column.current = None
            self._changed.notify_all()

    # The thread's side

    def _write_behind(self) -> None:
        try:
            while self._serve():
                pass
        except BaseException as error:
            self._salvage()
            with self._mutex:
                self._error = error
                self._jobs.clear()
                self._changed.notify_all()

    def _serve(self) -> bool:
        """Wait for work and do one piece of it; False when the thread should end."""
        with self._mutex:
            while not (self._jobs or self._flush_wanted or self._late() or self._stopping):
                self._changed.wait(self._patience())
            if self._stopping:
                return False
            slab = self._jobs.popleft() if self._jobs else None
        if slab is not None:
            slab.column.write(slab, self._durable)
            with self._mutex:
                slab.column.free.append(slab)
                self._changed.notify_all()
        if slab is None or self._late():
            self._commit()
        return True

    def _patience(self) -> float | None:
        since = self._waiting_since
        return None if since is None else max(0.0, since + self.COMMIT_EVERY - time.monotonic())

    def _late(self) -> bool:
        return self._patience() == 0.0

    def _commit(self) -> None:
        """Write the slabs that are being filled, then the time labels of all frames that are now complete."""
        with self._mutex:
            for column in self._columns:
                self._write_unfinished(column)
            self._write_labels()
            self._waiting_since = time.monotonic() if self._jobs else None
            if not self._jobs:
                self._flush_wanted = False
            self._changed.notify_all()

    def _salvage(self) -> None:
        """After an error: commit the frames that did reach the disk, as far as that is still possible."""
        with self._mutex:
            for column in self._columns:
                with contextlib.suppress(Exception):
                    self._write_unfinished(column)
            with contextlib.suppress(Exception):
                self._write_labels()

    def _write_unfinished(self, column: _Column) -> None:
        slab = column.current
        if slab is not None and slab.dirty:
            column.write(slab, self._durable)
        elif slab is not None:
            column.count(slab)  # written earlier, perhaps before a full slab that was still waiting

    def _write_labels(self) -> None:
        done = min((c.written for c in self._columns), default=self._next or 0)
        if done > self._committed:
            self._write_times(self._committed, done)
            self._committed = done

    def _write_times(self, start: int, stop: int) -> None:
        """Commit frames start, ..., stop - 1; ascending, so that at any moment a prefix is committed."""
        grid, times = self._time_grid, self.layout.times
        for chunk in range(start // grid.rows, math.ceil(stop / grid.rows)):
            first, last = chunk * grid.rows, min(stop, (chunk + 1) * grid.rows)
            values = np.full(grid.chunk, np.nan)
            values[: last - first] = times[first:last]
            file = self.path / "time" / grid.key(chunk, 0)
            _replace(file, _checksummed(values.view(np.uint8)), self._durable)


def _prefix(times: Any) -> int:
    """Number of committed frames: labels before the first NaN."""
    missing = np.isnan(np.asarray(times))
    return int(missing.argmax()) if missing.any() else len(missing)


# Making and recognising a store


def _local(path: str | os.PathLike[str]) -> Path:
    if "://" in str(path):
        raise ValueError(f"{path} is an address; a run store is a local folder. Write it here, then copy it.")
    return Path(path).expanduser().resolve()


def _zarr() -> Any:
    """Loaded with the first store: it takes a fifth of a second, which runs in memory need not wait for."""
    import zarr

    return zarr


def _write_skeleton(root: Path, layout: Layout) -> None:
    n = len(layout.times)
    names = sorted(["time", *layout.coords])
    attrs = _attributes(layout.attrs) | {"status": "running", "start": _now(), "coordinates": " ".join(names)}
    group = _zarr().create_group(str(root), zarr_format=3, attributes=attrs)
    time_chunk = _Grid.of(Variable("time", (), (), "float64"), n).chunk
    _create_array(group, "time", (n,), time_chunk, "float64", ("time",), layout.time_attributes)
    for v in layout.variables:
        chunk = _Grid.of(v, n).chunk
        _create_array(group, v.name, (n, *v.shape), chunk, v.dtype, ("time", *v.dims), v.attrs)
    for name, (dims, values, coord_attrs) in layout.coords.items():
        x = np.asarray(values)
        _create_array(group, name, x.shape, _whole(x), str(x.dtype), dims, coord_attrs)[...] = x
    order = {"variables": [v.name for v in layout.variables], "coords": list(layout.coords)}
    plan = {"format": FORMAT, "settings": _canonical(dict(layout.attrs)), **order}
    times = np.asarray(layout.times)
    hidden = group.create_group("checkpoint", attributes=plan)
    _create_array(hidden, "times", (n,), _whole(times), "float64", ("time",), {})[...] = times


def _whole(x: np.ndarray) -> tuple[int, ...]:
    return tuple(max(1, n) for n in x.shape)


def _create_array(
    group: zarr.Group,
    name: str,
    shape: tuple[int, ...],
    chunk: tuple[int, ...],
    dtype: str,
    dims: tuple[str, ...],
    attrs: Mapping[str, str],
) -> Any:
    from zarr.codecs import BytesCodec, Crc32cCodec

    # Random mantissas do not compress: a checksum and no compressor. `_Column.write` produces the same bytes.
    return group.create_array(
        name,
        shape=shape,
        chunks=chunk,
        dtype=dtype,
        fill_value=_fill(dtype),
        serializer=BytesCodec(endian="little" if np.dtype(dtype).itemsize > 1 else None),
        filters=None,
        compressors=[Crc32cCodec()],
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=dims,
        attributes=dict(attrs),
    )


def _check_free(root: Path, overwrite: bool) -> None:
    """Refuse all but nothing, an empty folder and, with `overwrite`, a run store that nobody is writing."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(
            f"{root} exists already ({_what_is(root)}). Give another path, continue it with mfsde.resume, "
            "or pass overwrite=True to replace an earlier run."
        )
    foreign = [] if not _is_store(root) else [p.name for p in root.iterdir() if not _belongs(p)]
    if foreign or not _is_store(root):
        found = f"it also holds {', '.join(sorted(foreign)[:5])}" if foreign else f"it is {_what_is(root)}"
        raise FileExistsError(
            f"{root} is not overwritten: {found}, and only run stores are deleted. "
            "Remove it yourself, or give another path."
        )
    os.close(_take_lock(root))


def _belongs(path: Path) -> bool:
    return path.name == "zarr.json" or (path / "zarr.json").is_file()


def _put_in_place(build: Path, root: Path, overwrite: bool) -> None:
    """Rename the finished skeleton to its place; an earlier store steps aside first and is deleted last."""
    aside = build.with_name(build.name + ".old")
    if overwrite and root.exists():
        os.replace(root, aside)
    os.replace(build, root)
    shutil.rmtree(aside, ignore_errors=True)


def _is_store(root: Path) -> bool:
    return (root / "zarr.json").is_file() and "format" in _plan(root)


def _plan(root: Path) -> dict[str, Any]:
    """What was fixed at creation: format number, settings, order of names; empty where there is no store."""
    try:
        return dict(json.loads((root / "checkpoint" / "zarr.json").read_bytes())["attributes"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _what_is(path: Path) -> str:
    if not path.is_dir():
        return "a file"
    if _is_store(path):
        return "a run store"
    if (path / "zarr.json").is_file() or (path / ".zgroup").is_file():
        return "a Zarr folder that no run wrote"
    names = sorted(p.name for p in itertools.islice(path.iterdir(), 100))
    more = ", ..." if len(names) > 3 else ""
    return f"a folder with {', '.join(names[:3])}{more}" if names else "an empty folder"


def _require_store(path: str | os.PathLike[str]) -> Path:
    root = _local(path)
    if not root.exists():
        raise ValueError(f"There is nothing at {root}; expected a run store. Check the path, or run first.")
    if not _is_store(root):
        raise ValueError(
            f"{root} is not a run store: it is {_what_is(root)}. Expected the folder made by "
            "simulate(..., store=...); open other Zarr data with xarray.open_zarr."
        )
    version = _plan(root)["format"]
    if version != FORMAT:
        raise ValueError(f"{root} has store format {version}, this version reads {FORMAT}; update mfsde.")
    return root


def _take_lock(root: Path) -> int:
    """A handle that keeps other writers away; the kernel closes it with the process, however that ends."""
    handle = os.open(root / "checkpoint" / "zarr.json", os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise StoreError(
            f"{root} is being written by a run that has not ended; wait for it, or stop it. It can be read."
        ) from None
    except OSError:
        pass  # some network file systems have no locks
    return handle


def _read_layout(root: Path) -> Layout:
    plan = _plan(root)
    variables, coords = [], {}
    for name in plan["variables"]:
        array, dims, attrs = _described(root / name)
        variables.append(Variable(name, dims[1:], array.shape[1:], str(array.dtype), attrs))
    for name in plan["coords"]:
        array, dims, attrs = _described(root / name)
        coords[name] = (dims, np.asarray(array[...]), attrs)
    times = np.asarray(_described(root / "checkpoint" / "times")[0][:])
    return Layout(times, tuple(variables), coords, read_settings(root))


def _described(folder: Path) -> tuple[zarr.Array[Any], tuple[str, ...], dict[str, str]]:
    array = _zarr().open_array(str(folder), mode="r", zarr_format=3)
    dims = getattr(array.metadata, "dimension_names", None) or ()
    return array, tuple(str(d) for d in dims), {key: str(x) for key, x in array.attrs.asdict().items()}


def _update_attributes(root: Path, attrs: Mapping[str, Any], drop: Iterable[str] = ()) -> None:
    metadata = json.loads((root / "zarr.json").read_bytes())
    kept = {key: value for key, value in metadata.get("attributes", {}).items() if key not in drop}
    metadata["attributes"] = {**kept, **attrs}
    # An unfinished file in the root itself would be a foreign object to readers that list the group.
    partial = root / "checkpoint" / "times" / "zarr.json.partial"
    _write_new(partial, [json.dumps(metadata, indent=2).encode()], sync=False)
    os.replace(partial, root / "zarr.json")


# Reading


def open_run(path: str | os.PathLike[str]) -> xr.Dataset:
    """The committed frames of a run as a lazy Dataset, also while it is being written.

    Chunked with dask where dask is installed, else by xarray's own lazy indexing. Frames that are committed
    later need another `open_run`. ValueError for anything that is not a run store.
    """
    root = _require_store(path)
    dataset: xr.Dataset = xr.open_zarr(
        str(root),
        consolidated=False,
        zarr_format=3,
        chunks={} if _has_dask() else None,
        # Values come back as they were written: no masking, no dates, however the units read.
        mask_and_scale=False,
        decode_times=False,
        decode_timedelta=False,
        concat_characters=False,
    )
    plan = _plan(root)
    dataset = dataset[[*plan["variables"], *plan["coords"], "time"]]  # in the order of the layout
    return dataset.isel(time=slice(0, _prefix(dataset["time"].values))).drop_encoding()


def _has_dask() -> bool:
    try:
        import dask.array  # type: ignore[import-not-found, unused-ignore]  # noqa: F401
    except ImportError:
        return False
    return True


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The `attrs` of the layout as they were given at creation, nested values included."""
    root = _require_store(path)
    settings: dict[str, Any] = json.loads(_plan(root)["settings"])
    return settings


# Checkpoints


@dataclass(frozen=True)
class Checkpoint:
    """The state after `step`, and the number of frames `index` that had been appended by then."""

    step: int
    state: dict[str, Tensor]
    index: int
    digest: str = ""


def checkpoint_file(path: str | os.PathLike[str], which: str = "current") -> Path:
    """Where the `current` or the `previous` checkpoint of a store lies."""
    return Path(path) / "checkpoint" / "times" / f"{which}.ckpt"


def _write_checkpoint(root: Path, header: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Magic line, SHA-256 of all that follows, header as a line of JSON, then the tensors."""
    buffer = io.BytesIO()
    torch.save({name: _compact(x) for name, x in state.items()}, buffer)
    head, payload = _canonical(header).encode() + b"\n", buffer.getbuffer()
    digest = hashlib.sha256(head)
    digest.update(payload)
    current = checkpoint_file(root)
    partial = current.with_name("current.ckpt.partial")
    _write_new(partial, [_MAGIC, digest.hexdigest().encode() + b"\n", head, payload], sync=True)
    # A kill between the two renames leaves only `previous`, which `load_checkpoint` then takes.
    with contextlib.suppress(FileNotFoundError):
        os.replace(current, checkpoint_file(root, "previous"))
    os.replace(partial, current)
    _sync_folder(current.parent)


def _compact(x: Tensor) -> Tensor:
    """A CPU tensor that owns its values and no more: saving a view would save all that lies behind it."""
    x = x.detach().cpu()
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """The latest checkpoint of a store, its checksum verified.

    FileNotFoundError where there is none yet, CorruptCheckpoint where the file is not what was written.
    """
    root = _require_store(path)
    for which in ("current", "previous"):
        if checkpoint_file(root, which).exists():
            checkpoint = _load_or_explain(root, which)
            _check_origin(root, checkpoint)
            return checkpoint
    raise FileNotFoundError(
        f"{root} has no checkpoint: the run ended before its first one. Start it again with overwrite=True."
    )


def _load_or_explain(root: Path, which: str) -> Checkpoint:
    file = checkpoint_file(root, which)
    try:
        return _load(file)
    except CorruptCheckpoint as error:
        raise CorruptCheckpoint(f"{error} {_way_out(root, which)}") from None


def _load(file: Path) -> Checkpoint:
    content = memoryview(file.read_bytes())
    start = len(_MAGIC) + 65
    stated, rest = bytes(content[len(_MAGIC) : start]), content[start:]
    found = hashlib.sha256(rest).hexdigest().encode() + b"\n"
    if content[: len(_MAGIC)] != _MAGIC or stated != found:
        raise CorruptCheckpoint(
            f"{file} is damaged: its checksum differs from the one written with it "
            f"(SHA-256 of the content {found[:12].decode()}..., stated {stated[:12]!r})."
        )
    head, payload = bytes(rest).split(b"\n", 1)
    header = json.loads(head)
    state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    return Checkpoint(header["step"], state, header["index"], header["digest"])


def _check_origin(root: Path, checkpoint: Checkpoint) -> None:
    expected = str(read_settings(root).get("digest", ""))
    if checkpoint.digest != expected:
        raise ValueError(
            f"The checkpoint in {root} belongs to another run: its settings digest is {checkpoint.digest!r}, "
            f"the store has {expected!r}. Put back its own file, or run again with overwrite=True."
        )


def _way_out(root: Path, which: str) -> str:
    previous = checkpoint_file(root, "previous")
    if which == "current" and previous.exists():
        with contextlib.suppress(CorruptCheckpoint):
            step = _load(previous).step
            return (
                f"The previous checkpoint (step {step}) is intact: delete the damaged file and call "
                f"mfsde.resume({str(root)!r}) to go on from there."
            )
    return "No earlier checkpoint is intact. The frames stay readable; run again with overwrite=True."
