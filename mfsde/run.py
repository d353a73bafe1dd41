"""Runs: `simulate`, `resume` and `sweep`.

A run is a scenario, its settings and its noise; everything else follows. `simulate` builds the particle system, sends
frames and checkpoints to a store, and returns the dataset. `resume` builds the same from what the store recorded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import json
import signal
import sys
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from . import provenance
from .clock import Clock
from .draws import Shuffles, set_key
from .measure import EmpiricalMeasure, Law
from .memory import Plan, View, as_it_is, planned, shared
from .methods import Method, check_method
from .model import Equation, fields, has_births, numeric_fields, on_device, parameters, replaced, scenario_name
from .noise import Noise, Stream
from .observables import NAMED, Observable, evaluate, interaction_error, is_named, listed, resolve
from .pairwise.convolution import ahead, recorded, used
from .progress import Progress
from .replica_blocks import ReplicaBlocks
from .settings import Settings, label
from .sgd import TIME
from .solver import integrate
from .store import Layout, Memory, StoreError, Variable, ZarrStore, load_checkpoint, open_run, read_settings
from .torus import period_lengths
from .transfer import Snapshot, travels
from .workers import at_least_one, run_all

Path_ = str | Path


def simulate(
    scenario: Any,
    *,
    n_particles: int,
    horizon: float,
    dt: float,
    seed: int,
    n_replicas: int = 1,
    save_every: int | None = None,
    keep_particles: int | None = None,
    observables: Iterable[Observable | str] = (),
    method: str = "euler",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    noise: Noise | None = None,
    store: Path_ | None = None,
    overwrite: bool = False,
    checkpoint_every: int | None = None,
    compile: bool = False,
    memory: float | None = None,
    progress: bool = False,
) -> xr.Dataset:
    """Solves the interacting N-particle system dX^i = b(t, X^i, m^N) dt + σ(t, X^i, m^N) dW^i.

    Args:
        scenario: a frozen dataclass with drift(t, x, mu), diffusion(t, x, mu) and initial().
        n_particles: N.
        horizon: final time, a whole number of steps dt.
        dt: step size.
        seed: the key of all randomness; equal seeds couple runs path by path, whatever N, dt (see noise) or device.
        n_replicas: independent copies of the whole system, run as one batch.
        save_every: steps between two saved frames; None saves the first and the last.
        keep_particles: store only the first k particles (0 none, None all); observables always see all N.
        observables: `mfsde.Observable`s or names ("mean", "covariance", "energy", "confinement", "entropy",
            "free_energy"), besides the scenario's own.
        method: "euler", "milstein", "srk" (Itô), "heun", "midpoint", "euler_heun" (Stratonovich, drift corrected);
            "baoab", "obabo" (kinetic), "proximal" (non-smooth terms), "dopri5" (no noise, adaptive), "sgd" (sampled
            data). With a birth_death_rate "+jumps" (default), "+clocks" or "+weights" follows: jumps at a rate frozen
            over a step, at exact times, or masses instead of jumps. As dt -> 0 and N -> ∞ the law never depends on it;
            schemes that would be wrong are refused.
        device: "cpu" or "cuda".
        dtype: torch.float32 or torch.float64.
        noise: `mfsde.Noise(seed, substeps=k)`: each increment is the sum of k fine ones, the path of a run at dt/k.
            With `antithetic=True` replicas 2j and 2j + 1 have opposite noise: independent are the pairs. With
            `precision=torch.float32` a float64 run has the normals of float32, which cost less.
        store: a folder to stream to (Zarr v3), readable by `open_run` meanwhile; None keeps the frames in memory.
        overwrite: replace an existing run store.
        checkpoint_every: steps between two checkpoints to resume from; None: the first and the last step.
        compile: compile the drift with torch.compile, some seconds for each new shape: worth it for drifts of several
            operations on 10⁵ particles or more. Same noise, equal to rounding; refused where torch cannot compile it.
        memory: bytes that the run may take; None: four fifths of what is available. Where all replicas at once do not
            fit, the drift is evaluated for some at a time, with the same numbers (attribute `replica_block`).
        progress: a bar with steps/s and time left, after a line that says what the run needs (`mfsde.plan`).

    Returns:
        Dataset with `position(time, replica, particle, component)` and one variable per observable; scalar
        coordinates for every numeric field, n_particles, dt and seed; provenance in the attributes. From memory, or
        opened lazily from the store.

    Raises:
        TypeError, ValueError: bad input, refused before the first step.
        DoesNotFit: the run needs more memory or disk than there is (a MemoryError and a ValueError).
        FileExistsError: the store exists.
        BlowUp: the state stopped being finite; committed frames are kept.
        KeyboardInterrupt: Ctrl-C, after a checkpoint has been written; `resume` continues.

    """
    settings = Settings.checked(
        n_particles=n_particles, horizon=horizon, dt=dt, seed=seed, n_replicas=n_replicas, save_every=save_every,
        keep_particles=keep_particles, method=method, device=device, dtype=dtype, noise=noise,
        checkpoint_every=checkpoint_every, compile=compile,
    )  # fmt: skip
    system = _started(scenario, settings, observables, store, memory, progress)
    layout = system.layout()
    if store is None:
        frames = Memory(layout)
        system.run(frames, 0, 0, progress)
        return frames.dataset()
    disk = ZarrStore.create(store, layout, overwrite)
    system.run(disk, 0, 0, progress)
    return open_run(store)


def plan(
    scenario: Any,
    *,
    observables: Iterable[Observable | str] = (),
    store: Path_ | None = None,
    memory: float | None = None,
    **settings: Any,
) -> Plan:
    """What `simulate` with the same arguments would take of memory and disk, and whether it fits; runs a few particles.

    Raises:
        TypeError, ValueError: bad input, as in `simulate`.

    """
    checked = _settings_of(scenario, {}, settings)
    found = _planned(scenario, checked, tuple(listed(observables)), store, memory, True)
    if found is None:
        # What is wrong with the scenario, which could not be tried, is told by its start.
        System.start(scenario, checked, observables)
        raise ValueError(f"{scenario_name(scenario)} starts from no law or measure that tells its dimension.")
    return found


def resume(
    store: Path_,
    *,
    scenario: Any = None,
    observables: Iterable[Observable | str] | None = None,
    progress: bool = False,
) -> xr.Dataset:
    """Continues an interrupted run from its last checkpoint; every stored number is that of an uninterrupted run.

    Args:
        store: the run's folder.
        scenario: needed only where the recorded one cannot be imported again (defined in a script or notebook, large
            tensors); it must be the same, source included.
        observables: likewise, for observables given to `simulate` as functions.
        progress: a bar with steps/s and time left.

    Returns:
        The completed dataset; that of a run that was already complete is returned as it is.

    Raises:
        ValueError: no run store, or a store of another scenario.
        TypeError: the scenario or an observable must be passed.
        CorruptCheckpoint: the checkpoint is not what was written.

    """
    recorded = read_settings(store)
    if _is_complete(store) and scenario is None and observables is None:
        return open_run(store)
    scenario = _recorded_scenario(store, recorded, scenario)
    settings = Settings(**recorded["settings"])
    chosen = _recorded_observables(store, recorded, scenario, observables)
    system = _started(scenario, settings, chosen, store, progress=progress, block=recorded.get("replica_block"))
    return _completed(store, recorded, system, progress)


def sweep(
    scenario: Any,
    over: Mapping[str, Iterable[Any]],
    reduce: Callable[[xr.Dataset], xr.Dataset] | None = None,
    workers: int = 1,
    **settings: Any,
) -> xr.Dataset:
    """Runs a scenario over a grid of fields and settings and joins the results along what was swept.

    Args:
        scenario: as for `simulate`.
        over: {name: values}; each name is a field of the scenario or a setting of `simulate`.
        reduce: run Dataset -> Dataset, applied to each run as soon as it ends; None keeps whole runs.
        workers: number of processes that share the runs, the costliest first, torch's threads and `memory`; each takes
            about two seconds to start. Results are those of one process with as many threads. The scenario's class and
            functions have to be defined in a module, or in a script that calls sweep below
            `if __name__ == "__main__":`.
        settings: all other settings of `simulate`. With `store="folder"` each run has a store of its own there, and
            a sweep that was interrupted goes on where it stopped. `progress=True` counts runs.

    Returns:
        Dataset with one dimension for each name of `over`, in that order.

    Raises:
        TypeError: a name is neither a field nor a setting; reduce returned no Dataset; with workers, something that
            another process could not import.
        ValueError: nothing to sweep, repeated values, or runs whose datasets do not fit together.
        WorkerDied: a process was killed, or could not start.
        KeyboardInterrupt: Ctrl-C, after checkpoints have been written; with a store the same call goes on from there.
        Exception: what a run raises, with its point in a note.

    """
    axes = {name: [_plain(name, value) for value in values] for name, values in over.items()}
    settings = {**settings, "observables": tuple(listed(settings.get("observables", ())))}
    _check_axes(scenario, axes, settings)
    folder = settings.pop("store", None)
    shown = settings.pop("progress", False)
    points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    # All of them before the first run: a step that does not divide should not cost what came before it.
    checked = [_settings_of(scenario, point, settings) for point in points]
    n_workers = min(at_least_one("workers", workers), len(points))
    if n_workers > 1:
        settings["memory"] = shared(settings.get("memory"), checked[0].device, n_workers)
    runs = _Runs(scenario, points, settings, folder, reduce)
    with Progress(f"sweep {scenario_name(scenario)}", 0, len(points), shown, "run") as bar:
        costs = [s.n_particles * s.n_replicas * s.n_steps for s in checked]
        try:
            found = run_all(runs, costs, n_workers, runs.name, lambda count, index, result: bar.at(count))
        except KeyboardInterrupt as stop:
            if folder is None:
                raise
            raise KeyboardInterrupt(
                f"the sweep was interrupted; what it has run is in {folder}, and the same sweep goes on from there"
            ) from stop
    results = [_placed(result, point) for result, point in zip(found, points, strict=True)]
    return _joined(results, axes)


@dataclass(frozen=True)
class _Runs:
    """The runs of a sweep, by number."""

    scenario: Any
    points: list[dict[str, Any]]
    settings: dict[str, Any]
    folder: Path_ | None
    reduce: Callable[[xr.Dataset], xr.Dataset] | None

    def __call__(self, k: int) -> xr.Dataset:
        """What is kept of run k."""
        return _reduced(self.reduce, _one_of_sweep(self.scenario, self.points[k], self.settings, self.folder))

    def name(self, k: int) -> str:
        """Its place in the grid."""
        told = ", ".join(f"{name} = {_label(value)}" for name, value in self.points[k].items())
        return f"{told} of the sweep over {scenario_name(self.scenario)}"


@dataclass
class System:
    """A run that is ready to go: equation, settings, method, observables, state."""

    scenario: Any
    equation: Equation
    settings: Settings
    method: Method
    observables: tuple[Observable, ...]
    x: Tensor
    kernels: set[Hashable]
    replica_block: int | None = None

    @classmethod
    def start(
        cls, scenario: Any, settings: Settings, observables: Iterable[Observable | str], view: View = as_it_is
    ) -> System:
        """The system at step 0, checked; its equation is the scenario seen through a view."""
        device, dtype = torch.device(settings.device), settings.torch_dtype
        fields(scenario)
        moved = view(on_device(scenario, device, dtype))
        x, weights = _initial(moved, settings, device, dtype)
        method = Method.of(settings.method, has_births(moved))
        if method.reaction == "weights" and weights is None:
            weights = torch.full_like(x[..., 0], 1 / settings.n_particles)
        key = Shuffles(settings.noise, 0, settings.n_replicas, device)
        kernels: set[Hashable] = set()
        with ahead(settings.n_steps, kernels, is_start=True):
            equation = Equation(moved, x, weights, method.transport != "sgd", key)
        check_method(equation, method, x, (0.0, settings.horizon / 2))
        if method.reaction and method.reaction != "weights":
            equation.trace()
        found = resolve(moved, observables)
        if settings.compile:
            from .compilation import compiled  # torch's compiler is loaded where it is asked for

            equation.scenario = compiled(equation, method.transport, x, (0.0, settings.horizon / 2))
        block = view.size if isinstance(view, ReplicaBlocks) else None
        return cls(scenario, equation, settings, method, found, x, kernels, block)

    def restore(self, store: Path_) -> tuple[int, int]:
        """Takes the state of the last checkpoint; returns its step and the number of frames before it."""
        try:
            checkpoint = load_checkpoint(store)
        except FileNotFoundError:
            # Killed before the first one: the beginning is the state to go on from.
            return 0, 0
        self.x = checkpoint.state["position"].to(self.x).contiguous()
        equation = self.equation
        if equation.weights is not None:
            equation.weights = checkpoint.state["weight"].to(self.x)
        if equation.parent is not None:
            equation.parent = checkpoint.state["parent"].to(self.x.device)
            equation.events = checkpoint.state["events"].to(self.x.device)
        return checkpoint.step, checkpoint.index

    def state(self, x: Tensor) -> dict[str, Tensor]:
        """What a checkpoint holds."""
        equation = self.equation
        parts = {"position": x, "weight": equation.weights, "parent": equation.parent, "events": equation.events}
        return {name: part for name, part in parts.items() if part is not None}

    def layout(self) -> Layout:
        """What the run will store."""
        settings, clock = self.settings, Clock(self.settings.dt)
        times = np.array([label(clock.time(step)) for step in settings.save_steps()])
        described = self.description()
        name = TIME if self.method.transport == "sgd" else "time"
        return Layout(times, tuple(self._variables()), self._coordinates(), described, name)

    def identity(self) -> str:
        """Digest of everything that determines the numbers."""
        described = provenance.describe(self.scenario)
        # The same class is the same run wherever it is imported from.
        del described["scenario_path"]
        # The named observables are ours: their name says what they compute.
        observed = [[o.name, None if is_named(o) else provenance.encode(o.function)] for o in self.observables]
        settings = {k: v for k, v in self.settings.as_dict().items() if k != "checkpoint_every"}
        return provenance.digest([described, settings, observed, self.settings.noise.identity()])

    def description(self) -> dict[str, Any]:
        """Provenance, for the root attributes."""
        return {
            **provenance.describe(self.scenario),
            "settings": self.settings.as_dict(),
            "observables": [o.name for o in self.observables],
            "method": self.settings.method,
            **self._reaction(),
            **recorded(self.equation.strategies),
            **({"compiled": True} if self.settings.compile else {}),
            **({"replica_block": self.replica_block} if self.replica_block else {}),
            "noise": self.settings.noise.identity(),
            "dtype": self.settings.dtype,
            "device": _device_name(self.x.device),
            "threads": torch.get_num_threads(),
            "versions": provenance.versions(),
            "digest": self.identity(),
        }

    def _reaction(self) -> dict[str, str]:
        """How particles are born and die, and by what rate where the engine provides it."""
        if not self.method.reaction:
            return {}
        selects = getattr(self.scenario, "selects", None)
        return {"reaction": self.method.reaction, **({} if selects is None else {"selection": selects})}

    def run(self, sink: Memory | ZarrStore, first: int, index: int, progress: bool) -> None:
        """Integrates from step `first`, frame `index`, to the end, and closes the sink whatever happens."""
        recorder = _Recorder(self, sink, first, index)
        last = self.settings.n_steps
        try:
            with (
                Progress(self.equation.name, first, last, progress) as bar,
                _interrupts() as interrupted,
                ahead(last, self.kernels),
                used() as seen,
            ):
                recorder.begin(first, self.x)
                reached, x = integrate(
                    self.equation, self.x, first, last, Clock(self.settings.dt), self.settings.noise,
                    self.method, recorder.stops(), recorder.watch, recorder.reporting(bar.at), interrupted,
                )  # fmt: skip
            recorder.deliver()
            # A kernel that the start did not meet is told of at the end.
            told = recorded({**seen, **self.equation.strategies}) if seen.keys() - self.equation.strategies else {}
            if reached < last:
                recorder.checkpoint(reached, x)
                sink.close("interrupted", **told)
                raise KeyboardInterrupt(self._interrupt_message(sink, reached, last))
            sink.close("complete", **told)
        except BaseException as problem:
            # What was committed stays; a sink that failed itself has nothing to add to its own error.
            status = "interrupted" if isinstance(problem, KeyboardInterrupt) else "failed"
            with contextlib.suppress(Exception):
                recorder.deliver()
            with contextlib.suppress(StoreError):
                sink.close(status, error=f"{type(problem).__name__}: {problem}")
            raise

    def _interrupt_message(self, sink: Memory | ZarrStore, reached: int, last: int) -> str:
        told = f"{self.equation.name} was interrupted at step {reached} of {last}"
        if not isinstance(sink, ZarrStore):
            return f"{told}; its frames were in memory only. With store='run.zarr' an interrupted run can be resumed"
        # A class from a script or notebook cannot be imported again, and has to be passed.
        passed = ", scenario=..." if provenance.describe(self.scenario)["scenario_path"] is None else ""
        return f"{told}; it can go on from there: mfsde.resume({str(sink.path)!r}{passed})"

    def frame(self, step: int, x: Tensor) -> dict[str, Tensor]:
        """What is stored of a state."""
        t = Clock(self.settings.dt).time(step)
        # What is observed is summed exactly where that takes a key, and is no part of the steps.
        with used():
            values = {o.name: evaluate(o, self.equation, t, x) for o in self.observables}
        if self.settings.kept:
            values["position"] = x[:, : self.settings.kept]
            if self.equation.weights is not None:
                values["weight"] = self.equation.weights[:, : self.settings.kept]
            if self.equation.parent is not None:
                values["parent"] = self.equation.parent[:, : self.settings.kept]
        if self.equation.events is not None:
            values["events"] = self.equation.events
        if self.equation.is_approximate:
            set_key(self.equation, self.settings.noise, step)
            with used():
                values["interaction_error"] = interaction_error(self.equation, t, x)
            self.equation.key = None
        return values

    def _variables(self) -> Iterator[Variable]:
        frame = self.frame(0, self.x)
        attributes = {
            "position": (("replica", "particle", "component"), "1", f"particles of {self.equation.name}"),
            "weight": (("replica", "particle"), "1", "mass of each particle"),
            "parent": (("replica", "particle"), "1", "ancestor at the saved time before, -1: reinjected since"),
            "events": (("replica",), "1", "births and deaths since the saved time before"),
            "interaction_error": (("replica",), "1", "largest relative error of approximate sums over pairs"),
        }
        first = tuple(attributes)
        for o in self.observables:
            attributes[o.name] = (o.dimensions(frame[o.name]), o.units, o.long_name or o.name)
        for name, value in sorted(frame.items(), key=lambda item: item[0] not in first):
            dims, units, long_name = attributes[name]
            kind = str(value.dtype).removeprefix("torch.")
            extra = self._geometry() if name == "position" else {}
            yield Variable(name, dims, tuple(value.shape), kind, {"long_name": long_name, "units": units, **extra})

    def _geometry(self) -> dict[str, str]:
        """What a distance between particles has to know: the torus, and that masses are not equal."""
        period = self.equation.period
        told = {} if self.equation.weights is None else {"weighted": "by the variable weight"}
        if period is None:
            return told
        lengths = [p if p < float("inf") else None for p in period_lengths(period, self.x.shape[-1])]
        return {**told, "period": json.dumps(lengths)}

    def _replicas(self) -> dict[str, str]:
        """What a replica is; what takes errors over replicas has to know of pairs."""
        told = _named("independent copy of the system")
        if not self.settings.antithetic:
            return told
        return {**told, "antithetic": "replicas 2j and 2j + 1 have opposite noise"}

    def _coordinates(self) -> dict[str, Any]:
        settings, kept = self.settings, self.settings.kept
        coordinates: dict[str, Any] = {
            "replica": (("replica",), np.arange(settings.n_replicas), self._replicas()),
            "component": (("component",), np.arange(self.x.shape[-1]), _named("component of the state")),
        }
        if kept:
            coordinates["particle"] = (("particle",), np.arange(kept), _named("particle"))
        scalars = {**numeric_fields(self.scenario), "n_particles": settings.n_particles, "dt": settings.dt}
        for name, value in scalars.items():
            coordinates[name] = ((), np.asarray(value), _named(name))
        kind = np.int64 if settings.seed < 2**63 else np.uint64
        coordinates["seed"] = ((), np.asarray(settings.seed, dtype=kind), _named("key of the noise"))
        return coordinates


class _Recorder:
    """Sends a run's frames and checkpoints to its sink, in order.

    A frame that comes from an accelerator is on its way while steps go on: it is delivered at the next check, and
    before anything that follows it.
    """

    def __init__(self, system: System, sink: Memory | ZarrStore, first: int, index: int) -> None:
        self._system, self._sink, self._index = system, sink, index
        self._sent: tuple[int, dict[str, Snapshot]] | None = None
        settings = system.settings
        self._saves = settings.save_steps()
        self._checkpoints = {s for s in settings.checkpoint_steps() if s > first}
        self._first = first

    def stops(self) -> list[int]:
        return sorted(s for s in {*self._saves, *self._checkpoints} if s > self._first)

    def begin(self, step: int, x: Tensor) -> None:
        """The frame that belongs to the starting state, unless it is stored already; then a checkpoint."""
        if self._index < len(self._saves) and self._saves[self._index] == step:
            self._append(step, x)
            self.checkpoint(step, x)

    def watch(self, step: int, x: Tensor) -> None:
        if self._index < len(self._saves) and self._saves[self._index] == step:
            self._append(step, x)
        if step in self._checkpoints:
            self.checkpoint(step, x)

    def reporting(self, report: Callable[[int], None]) -> Callable[[int], None]:
        """`report`, preceded by the delivery of a frame that has arrived."""

        def settle(step: int) -> None:
            if self._sent is not None and all(part.has_arrived() for part in self._sent[1].values()):
                self.deliver()
            report(step)

        return settle

    def deliver(self) -> None:
        """Hands over the frame that is on its way, if there is one."""
        if self._sent is not None:
            (index, frame), self._sent = self._sent, None
            self._sink.append(index, {name: part.host() for name, part in frame.items()})

    def checkpoint(self, step: int, x: Tensor) -> None:
        self.deliver()
        self._sink.checkpoint(step, self._system.state(x), self._index)

    def _append(self, step: int, x: Tensor) -> None:
        self.deliver()
        frame = self._system.frame(step, x)
        if travels(x):
            self._sent = self._index, {name: Snapshot(part) for name, part in frame.items()}
        else:
            self._sink.append(self._index, frame)
        self._index += 1
        if self._system.equation.parent is not None:
            self._system.equation.trace()


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C into a flag that is read between steps, where the state is whole; a second one is raised.

    Outside the main thread signals are not ours to handle, and the flag stays down.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    raised = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: Any) -> None:
        if raised.is_set() and callable(before):
            before(number, frame)
        raised.set()

    signal.signal(signal.SIGINT, note)
    try:
        yield raised.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _planned(
    scenario: Any,
    settings: Settings,
    observables: tuple[Observable | str, ...],
    store: Path_ | None,
    memory: float | None,
    always: bool,
) -> Plan | None:
    def start(small: Settings, view: View) -> System:
        return System.start(scenario, small, observables, view)

    return planned(scenario_name(scenario), scenario, settings, start, store, memory, always)


def _started(
    scenario: Any,
    settings: Settings,
    observables: Iterable[Observable | str],
    store: Path_ | None,
    memory: float | None = None,
    progress: bool = False,
    block: int | None = None,
) -> System:
    """The system at step 0, its drift in blocks of replicas where it has to be or was; refused if it does not fit."""
    chosen = tuple(listed(observables))
    found = _planned(scenario, settings, chosen, store, memory, progress)
    if found is not None:
        found.check()
        block = min(found.replica_block, block or settings.n_replicas)
        if progress:
            print(found.line(), file=sys.stderr, flush=True)
    view = ReplicaBlocks(block) if block and block < settings.n_replicas else as_it_is
    return System.start(scenario, settings, chosen, view)


def _initial(
    scenario: Any, settings: Settings, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The particles at step 0, (R, N, d), from the scenario's initial law or measure."""
    name, n, r = scenario_name(scenario), settings.n_particles, settings.n_replicas
    start = scenario.initial() if hasattr(scenario, "initial") else None
    if isinstance(start, Law):
        shape = (r, n, start.n_variates)
        z = torch.empty(shape, dtype=dtype, device=device)
        if start.n_variates:
            z = settings.noise.normals(0, shape, stream=Stream.INITIAL, dtype=dtype, device=device)
        x, weights = start.from_variates(z), None
    elif isinstance(start, EmpiricalMeasure):
        if start.n_particles != n:
            raise ValueError(
                f"{name}.initial() is a measure of {start.n_particles} particles but n_particles = {n}; pass "
                f"n_particles={start.n_particles}, or return a law."
            )
        if start.points.shape[:-2] not in ((), (1,), (r,)):
            raise ValueError(
                f"{name}.initial() is a measure with leading axes {tuple(start.points.shape[:-2])} but n_replicas is "
                f"{r}; expected points ({n}, d), shared by all replicas, or ({r}, {n}, d)."
            )
        x = start.points.detach().to(device=device, dtype=dtype).expand(r, n, start.dim).clone()
        weights = None if start.is_uniform else start.weights.detach().to(device=device, dtype=dtype).expand(r, n)
    else:
        raise TypeError(
            f"{name}.initial() returned a {type(start).__name__}; expected a law (mfsde.Gaussian([0.0], [[1.0]]), "
            "mfsde.Uniform, ...) or an mfsde.EmpiricalMeasure."
        )
    if not bool(torch.isfinite(x).all()):
        replica, particle, _ = torch.nonzero(~torch.isfinite(x))[0].tolist()
        raise ValueError(
            f"{name}.initial() gave a value that is not finite at replica {replica}, particle {particle}; a run starts "
            f"from finite particles ({settings.dtype})."
        )
    return x.contiguous(), weights


def _named(long_name: str) -> dict[str, str]:
    return {"long_name": long_name, "units": "1"}


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _recorded_scenario(store: Path_, recorded: dict[str, Any], scenario: Any) -> Any:
    if scenario is not None:
        return scenario
    try:
        return provenance.rebuild(recorded)
    except provenance.CannotRebuild as problem:
        raise TypeError(
            f"{store}: {problem}; pass it: mfsde.resume({str(store)!r}, scenario=...). It is checked against "
            "the record."
        ) from problem


def _recorded_observables(
    store: Path_, recorded: dict[str, Any], scenario: Any, given: Iterable[Observable | str] | None
) -> Iterable[Observable | str]:
    """The call's observables: those recorded that the scenario does not bring itself."""
    if given is not None:
        return given
    own = {o if isinstance(o, str) else o.name for o in getattr(scenario, "observables", tuple)()}
    names = [name for name in recorded["observables"] if name not in own]
    unknown = [name for name in names if name not in NAMED]
    if unknown:
        raise TypeError(
            f"{store} records observable {', '.join(unknown)}, whose function is not stored; pass it: "
            f"mfsde.resume({str(store)!r}, observables=[...])."
        )
    return names


def _is_complete(store: Path_) -> bool:
    return bool(open_run(store).attrs["status"] == "complete")


def _completed(store: Path_, recorded: dict[str, Any], system: System, progress: bool) -> xr.Dataset:
    """The run of a store, continued where it is not complete; refused where it is another system's."""
    _check_same(store, recorded, system)
    if not _is_complete(store):
        step, index = system.restore(store)
        system.run(ZarrStore.reopen(store), step, index, progress)
    return open_run(store)


def _check_same(store: Path_, recorded: dict[str, Any], system: System) -> None:
    if system.identity() != recorded["digest"]:
        raise ValueError(
            f"{store} is a store of another run: {_difference(recorded, system)}. Continue with the recorded scenario "
            "and settings, or start a new store."
        )


def _difference(recorded: dict[str, Any], system: System) -> str:
    """Why a system is not the one a store was made with."""
    was, now = recorded, json.loads(json.dumps(provenance.describe(system.scenario)))
    if was["scenario"] != now["scenario"]:
        return f"it holds a run of {was['scenario']}, not of {now['scenario']}"
    if was["parameters"] != now["parameters"]:
        return f"its parameters differ ({_changes(was['parameters'], now['parameters'])})"
    if was["scenario_source"] != now["scenario_source"]:
        return f"the source of {now['scenario']} has changed since the run began"
    if was["settings"] != system.settings.as_dict():
        return f"its settings differ ({_changes(was['settings'], system.settings.as_dict())})"
    return "its observables, noise version or law differ"


def _changes(was: dict[str, Any], now: dict[str, Any]) -> str:
    changed = [k for k in sorted({*was, *now}) if was.get(k) != now.get(k)]
    return ", ".join(f"{k}: {was.get(k)!r:.40} then, {now.get(k)!r:.40} now" for k in changed)


def _check_axes(scenario: Any, axes: dict[str, list[Any]], settings: dict[str, Any]) -> None:
    known = [p for p in inspect.signature(simulate).parameters if p != "scenario"]
    allowed = {*parameters(scenario), *known} - {"store", "overwrite", "progress", "observables", "noise", "memory"}
    for name, values in axes.items():
        if name not in allowed:
            raise TypeError(
                f"sweep: {name!r} is neither a field of {scenario_name(scenario)} nor a setting that can be swept; "
                f"expected one of {', '.join(sorted(allowed))}."
            )
        if not values or len(set(values)) != len(values):
            raise ValueError(f"sweep: the values of {name!r} must be distinct and at least one; got {values!r:.80}.")
        if name in settings:
            raise TypeError(f"sweep: {name!r} is both swept and set; leave one out.")
    if not axes:
        raise ValueError("sweep: over is empty; name at least one field or setting, or call simulate.")
    unknown = set(settings) - set(known)
    if unknown:
        raise TypeError(f"sweep: unknown setting {', '.join(sorted(unknown))}; expected one of {', '.join(known)}.")


def _one_of_sweep(scenario: Any, point: dict[str, Any], settings: dict[str, Any], folder: Path_ | None) -> xr.Dataset:
    own = parameters(scenario)
    changed = replaced(scenario, {k: v for k, v in point.items() if k in own})
    chosen = {**settings, **{k: v for k, v in point.items() if k not in own}}
    if folder is None:
        return simulate(changed, **chosen)
    named = ",".join(f"{k}={_label(v)}" for k, v in point.items())
    store = Path(folder) / (named.replace("/", "_") + ".zarr")
    if store.exists() and not settings.get("overwrite", False):
        return _continued(store, changed, chosen)
    return simulate(changed, store=store, **chosen)


def _continued(store: Path, scenario: Any, settings: dict[str, Any]) -> xr.Dataset:
    """A run of an earlier sweep, completed where it stopped; another run is refused."""
    recorded = read_settings(store)
    memory, block = settings.get("memory"), recorded.get("replica_block")
    checked = _settings_of(scenario, {}, settings)
    system = _started(scenario, checked, settings["observables"], store, memory, block=block)
    return _completed(store, recorded, system, progress=False)


def _settings_of(scenario: Any, point: dict[str, Any], settings: dict[str, Any]) -> Settings:
    """The settings that `simulate` would check for one point of a sweep."""
    chosen = {**settings, **{k: v for k, v in point.items() if k not in parameters(scenario)}}
    asked = inspect.signature(simulate).bind(scenario, **chosen)
    asked.apply_defaults()
    names = {f.name for f in dataclasses.fields(Settings)} - {"substeps", "antithetic", "precision"} | {"noise"}
    return Settings.checked(**{k: v for k, v in asked.arguments.items() if k in names})


def _reduced(reduce: Callable[[xr.Dataset], xr.Dataset] | None, run: xr.Dataset) -> xr.Dataset:
    result = run if reduce is None else reduce(run)
    if isinstance(result, xr.DataArray):
        result = result.to_dataset(name=result.name or "value")
    if not isinstance(result, xr.Dataset):
        raise TypeError(f"sweep: reduce returned a {type(result).__name__}; expected an xarray Dataset or DataArray.")
    return result


def _placed(result: xr.Dataset, point: dict[str, Any]) -> xr.Dataset:
    """The result at its place in the grid."""
    bare = result.drop_vars([name for name in point if name in result.coords])
    return bare.expand_dims({name: [_label(value)] for name, value in point.items()})


def _label(value: Any) -> Any:
    """A swept value as a coordinate."""
    return str(value).removeprefix("torch.") if isinstance(value, (torch.dtype, torch.device)) else value


def _plain(name: str, value: Any) -> Any:
    """A swept value as a plain scalar: what can label an axis."""
    value = value.item() if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.ndim == 0) else value
    if value is not None and not isinstance(value, (int, float, str, torch.dtype, torch.device)):
        raise TypeError(
            f"sweep: {name} = {value!r:.60} cannot label an axis; sweep numbers or strings (give the scenario a scalar "
            "field that the rest is derived from)."
        )
    return value


def _with_errors(results: list[xr.Dataset]) -> list[xr.Dataset]:
    """Runs whose sums over pairs are exact beside others: their error is 0."""
    name = "interaction_error"
    given = next((result[name] for result in results if name in result), None)
    return (
        results if given is None else [result if name in result else _with_error(result, given) for result in results]
    )


def _with_error(result: xr.Dataset, given: xr.DataArray) -> xr.Dataset:
    wide = next((v for v in result.data_vars.values() if set(given.dims) <= set(v.dims)), None)
    if wide is None:
        return result
    narrow = wide.isel({dim: 0 for dim in wide.dims if dim not in given.dims}, drop=True).transpose(*given.dims)
    return result.assign({given.name: xr.zeros_like(narrow, dtype=given.dtype).assign_attrs(given.attrs)})


def _joined(results: list[xr.Dataset], axes: dict[str, list[Any]]) -> xr.Dataset:
    results = _with_errors(results)
    names: list[set[str]] = [{str(name) for name in result.data_vars} for result in results]
    if any(found != names[0] for found in names):
        partial = ", ".join(sorted(names[0].union(*names) - names[0].intersection(*names)))
        raise ValueError(
            f"sweep: only some runs have the variables {partial}; reduce must return the same ones for every run."
        )
    nested: list[Any] = results
    for values in reversed(list(axes.values())[1:]):
        nested = [nested[k : k + len(values)] for k in range(0, len(nested), len(values))]
    try:
        table: xr.Dataset = xr.combine_nested(
            nested, concat_dim=list(axes), join="exact", compat="equals", coords="minimal",
            data_vars="minimal" if all(set(axes) <= set(v.dims) for v in results[0].data_vars.values()) else "all",
            combine_attrs="drop_conflicts",
        )  # fmt: skip
        return table
    except (ValueError, xr.MergeError) as problem:
        raise ValueError(
            f"sweep: the datasets do not fit together ({problem}). Pass reduce=f that returns the same coordinates for "
            "every run, for instance only what is to be compared."
        ) from problem
