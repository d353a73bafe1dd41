"""What a run will take of memory and disk, told before it starts, and how many replicas at a time fit.

The start and one step are tried on a few particles of one or two replicas, with the allocations of torch operations
counted. Growth is followed up to sizes at which the engine's own blocks are full (or the run's, if it is smaller), and
extrapolated from there. Trials have their own state; the keyed noise has none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .allocations import LiveBytes
from .clock import Clock
from .measure import EmpiricalMeasure
from .methods import Method
from .model import Equation
from .pairwise.blocked import PAIRWISE_FLOATS
from .pairwise.convolution import ahead, used
from .replica_blocks import Coefficient, with_coefficients
from .settings import Settings
from .solver import integrate
from .store import SLABS, TARGET_CHUNK

# Of what is available, without a budget of the user's; other processes and the allocator need some too.
SHARE = 0.8
# Particles of the first trials. No array of a scenario is likely to have as many entries.
SIZES = (67, 134, 268)
# Where one replica's peak is linear in N it is followed to trials of so many floats, several of the engine's blocks of
# data; where it is steeper, to so many pairs' components, half as many again as a block of pairs has.
LINEAR_FLOATS, STEEP_FLOATS = 1 << 22, 3 * PAIRWISE_FLOATS // 2
# A trial that is expected to take longer, in seconds, is not made; what is known by then is extrapolated.
LONGEST_TRIAL = 0.2
# A step of a run whose scenario cannot be tried on fewer particles, in states.
STATES_OF_A_STEP = 6
# Floats for each component of each pair of particles, and bytes for the observables of a replica, that hardly any run
# needs: one that would fit with them is not planned.
FLOATS_OF_A_PAIR, BYTES_OF_OBSERVABLES = 8, 1 << 12

View = Callable[[Any], Any]


class DoesNotFit(MemoryError, ValueError):
    """A run that needs more memory or disk than there is, refused before its first step."""


class Started(Protocol):
    """A system at step 0."""

    equation: Equation
    method: Method
    x: Tensor

    def frame(self, step: int, x: Tensor) -> dict[str, Tensor]:
        """What is stored of a state."""
        ...


def as_it_is(scenario: Any) -> Any:
    """The view of a scenario that changes nothing."""
    return scenario


# A system with these settings, whose scenario is seen through a view.
Start = Callable[[Settings, View], Started]


@dataclass(frozen=True)
class Plan:
    """What a run needs and what there is, in bytes.

    state: positions of all particles and replicas. step: the most that is alive while the run starts and steps, state
    included, with the drift in blocks of `replica_block` replicas. drift: what one evaluation of the drift adds, None
    where it cannot be told from smaller systems. frames: those kept in memory, or waiting for the disk. disk: the
    store. available: the budget. free: of the disk, None without a store. reason: why the run does not fit, or "".
    problem: why the drift could not be tried on fewer particles, or "".
    """

    name: str
    n_particles: int
    n_replicas: int
    replica_block: int
    n_frames: int
    state: int
    step: int
    drift: int | None
    frames: int
    disk: int
    available: float
    free: int | None
    reason: str = ""
    problem: str = ""

    @property
    def fits(self) -> bool:
        """Whether the run can start."""
        return not self.reason

    @property
    def needed(self) -> int:
        """Memory of the run at its peak."""
        return self.step + self.frames

    def check(self) -> None:
        """Refuses a run that does not fit.

        Raises:
            DoesNotFit: with what is needed, what there is, and the next moves.

        """
        if self.reason:
            raise DoesNotFit(self.reason)

    def line(self) -> str:
        """The plan in one line."""
        drift = "drift unknown" if self.drift is None else f"drift {told(self.drift)}"
        there = "unknown" if math.isinf(self.available) else told(self.available)
        parts = [f"state {told(self.state)}", drift, f"{self.n_frames} frames {told(self.frames)}"]
        line = f"{self.name}: needs {told(self.needed)} of {there} memory ({', '.join(parts)})"
        if self.free is not None:
            line += f", {told(self.disk)} of {told(self.free)} disk"
        if self.fits and self.replica_block < self.n_replicas:
            line += f"; drift in blocks of {self.replica_block} of {self.n_replicas} replicas"
        return line if self.fits else f"{line}; does not fit"

    def __str__(self) -> str:
        return "\n".join(part for part in (self.line(), self.reason, self.problem) if part)


def planned(
    name: str, scenario: Any, settings: Settings, start: Start, store: str | Path | None, memory: Any, always: bool
) -> Plan | None:
    """The plan of a run; None for one that starts from no law, and for small ones unless it is `always` wanted.

    Args:
        name: of the scenario.
        scenario: the user's object.
        settings: those of the run.
        start: makes a system of other settings.
        store: where its frames go, None for memory.
        memory: the budget in bytes, or None.
        always: whether small runs are tried too.

    Raises:
        TypeError, ValueError: a budget that is none.

    """
    budget, dim = Budget.of(memory, settings.device), _dimension(scenario)
    if dim is None or (not always and _is_small(dim, settings, store, budget)):
        return None
    return _Planner(name, settings, budget, Trials(settings, start), store).plan(dim)


# What there is


@dataclass(frozen=True)
class Budget:
    """Bytes for the computation, on its device, and for frames, on the host; one and the same on a CPU."""

    device: float
    host: float
    is_shared: bool

    @classmethod
    def of(cls, memory: Any, device: str) -> Budget:
        """The user's bytes, or a share of what is available."""
        on_cuda = torch.device(device).type == "cuda"
        if memory is not None:
            given = _checked(memory)
            return cls(given, SHARE * available() if on_cuda else given, not on_cuda)
        if on_cuda:
            free, _ = torch.cuda.mem_get_info(torch.device(device))
            return cls(SHARE * free, SHARE * available(), False)
        there = SHARE * available()
        return cls(there, there, True)


def shared(memory: Any, device: str, n: int) -> float | None:
    """The budget of one of n runs at a time; None where nothing is known."""
    part = Budget.of(memory, device).device / n
    return None if math.isinf(part) else part


def _checked(memory: Any) -> float:
    if isinstance(memory, bool) or not isinstance(memory, (int, float)):
        raise TypeError(f"memory = {memory!r:.60}; expected a number of bytes (8 * 2**30), or None.")
    if not memory > 0:
        raise ValueError(f"memory = {memory}; expected a positive number of bytes, or None for what is available.")
    return float(memory)


def available() -> float:
    """Bytes that this process may still take of the host's memory; infinity where the system does not say.

    The least of Linux's MemAvailable and what is left below the limits of its control groups (versions 1 and 2).
    """
    left = [_meminfo(), *(_left(*files) for files in _limits())]
    return max(0.0, min(left))


def _meminfo() -> float:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    return math.inf


@cache
def _limits() -> tuple[tuple[Path, Path, Path], ...]:
    """Files of limit, usage and statistics of this process's control groups and those above them."""
    root, found = Path("/sys/fs/cgroup"), []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0":
                base, names = root, ("memory.max", "memory.current")
            elif "memory" in controllers.split(","):
                base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
            else:
                continue
            own = base / path.strip("/")
            # In a container the path is often that of the host, and the group lies at the root.
            for group in {own, *own.parents, base}:
                files = (group / names[0], group / names[1], group / "memory.stat")
                if group.is_relative_to(base) and files[0].is_file():
                    found.append(files)
    return tuple(found)


def _left(limit: Path, usage: Path, statistics: Path) -> float:
    with contextlib.suppress(OSError, ValueError):
        # "max" is no number: there is no limit.
        left = float(int(limit.read_text())) - int(usage.read_text())
        for line in statistics.read_text().splitlines():
            # Pages of files are given back when memory is short.
            if line.startswith(("inactive_file ", "total_inactive_file ")):
                return left + int(line.split()[1])
        return left
    return math.inf


# What is needed


@dataclass(frozen=True)
class Peaks:
    """Bytes alive outside the drift, where it is entered, and added by it: those of `LiveBytes`."""

    outside: float
    entered: float
    added: float

    @property
    def total(self) -> float:
        """The peak."""
        return max(self.outside, self.entered + self.added)

    def with_(self, other: Peaks, combine: Callable[[float, float], float]) -> Peaks:
        """Entry by entry, never negative."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Peaks(*(max(0.0, combine(a, b)) for a, b in pairs))


class Trials:
    """Small systems of a run: what they allocate, and what their frames hold."""

    def __init__(self, settings: Settings, start: Start) -> None:
        self._settings, self._start = settings, start
        self._known: dict[tuple[int, int], Peaks] = {}
        self._seconds: dict[tuple[int, int], float] = {}
        self.dim = 1
        # Replicas of antithetic noise come in pairs.
        self.fewest = 2 if settings.antithetic else 1

    def peaks(self, r: int, n: int) -> Peaks:
        """Those of the start and one step of r replicas of n particles."""
        if (r, n) not in self._known:
            counter, began = LiveBytes(), time.perf_counter()
            with self._apart(), counter:
                self._step(self._system(r, n, counter))
            self._known[r, n] = Peaks(counter.outside, counter.entered, counter.added)
            self._seconds[r, n] = time.perf_counter() - began
        return self._known[r, n]

    def is_quick(self, r: int, n: int) -> bool:
        """Whether such a trial takes little time, if what the largest one so far took grows like R N²."""
        (r0, n0), seconds = max(self._seconds.items(), key=lambda item: item[0][0] * item[0][1])
        return seconds * (r / r0) * (n / n0) ** 2 < LONGEST_TRIAL

    def frame(self) -> tuple[int, int]:
        """Bytes of a frame of the run, and number of its variables."""
        settings, r, n = self._settings, self.fewest, min(SIZES[0], self._settings.n_particles)
        with self._apart():
            system = self._system(r, n, LiveBytes())
            stored = system.frame(0, system.x)
            # The first step of all leaves checks and caches behind, which later trials are not to count.
            self._step(system)
        full = {r: settings.n_replicas, n: settings.n_particles}
        total = 0
        for name, value in stored.items():
            particles = settings.kept if name in ("position", "weight", "parent") else settings.n_particles
            rest = (particles if size == n else size for size in value.shape[1:])
            total += value.element_size() * full[r] * math.prod(rest)
        return total, len(stored)

    def _step(self, system: Started) -> None:
        clock, noise = Clock(self._settings.dt), self._settings.noise
        self.dim = system.x.shape[-1]
        integrate(system.equation, system.x, 0, 1, clock, noise, system.method, (), _unwatched)

    def _system(self, r: int, n: int, counter: LiveBytes) -> Started:
        settings = self._settings
        small = dataclasses.replace(settings, n_replicas=r, n_particles=n, compile=False)
        pairs = settings.n_replicas * settings.n_particles**2
        # Sums over pairs choose their strategy by the work ahead: here they are to choose that of the run.
        work = settings.n_steps * pairs // (r * n * n)

        def counted(coefficient: Coefficient) -> Coefficient:
            def evaluated(t: float, x: Tensor, mu: EmpiricalMeasure) -> Any:
                with ahead(work):
                    return counter.inside(lambda: coefficient(t, x, mu))

            return evaluated

        return self._start(small, lambda scenario: with_coefficients(_shrunk(scenario, settings, r, n), counted))

    @contextlib.contextmanager
    def _apart(self) -> Any:
        """Within it nothing is recorded or drawn that the run would notice."""
        device = torch.device(self._settings.device)
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), used():
            yield


def _unwatched(step: int, x: Tensor) -> None:
    """Nobody looks at the states of a trial."""


def _shrunk(scenario: Any, settings: Settings, r: int, n: int) -> Any:
    """The scenario started from some atoms, where it starts from as many as there are particles."""
    start = scenario.initial() if hasattr(scenario, "initial") else None
    if not isinstance(start, EmpiricalMeasure) or start.n_particles != settings.n_particles:
        return scenario
    points = start.points[..., :n, :]
    points = points[:r] if points.ndim == 3 and len(points) == settings.n_replicas else points
    weights = None if start.is_uniform else start.weights[..., :n]
    if weights is not None:
        weights = weights[:r] if weights.ndim == 2 and len(weights) == settings.n_replicas else weights
        weights = weights / weights.sum(-1, keepdim=True)
    few = EmpiricalMeasure(points, weights, period=start.period)
    view = with_coefficients(scenario, lambda coefficient: coefficient)
    object.__setattr__(view, "initial", lambda: few)
    return view


class Growth:
    """The peaks of a run's system from those of smaller ones.

    In N a parabola through the first trials, as long as the largest one confirms it; where blocks are full by then, a
    line through the two largest. In R a line through the two with most replicas.
    """

    def __init__(self, trials: Trials, settings: Settings) -> None:
        self._trials, self._first = trials, trials.fewest
        self._n, self._r = settings.n_particles, settings.n_replicas
        self._float = torch.empty((), dtype=settings.torch_dtype).element_size()
        self._sizes = sorted({min(n, self._n) for n in SIZES})
        self._small = [trials.peaks(self._first, n) for n in self._sizes]
        self._is_steep = self._is_curved(self._sizes, self._small)
        self._largest = self._followed()
        self._one = trials.peaks(self._first, self._largest)
        self._is_confirmed = True
        self._single = self._one if self._largest == self._n else self._extrapolated()
        self._top, self._top_replicas, self._slope = self._single, self._first, Peaks(0.0, 0.0, 0.0)
        if self._r > self._first:
            self._follow_replicas()

    def at(self, r: int) -> Peaks:
        """The peaks of r replicas of the run's N particles."""
        return self._top.with_(self._slope, lambda value, slope: value + slope * (r - self._top_replicas))

    @property
    def order(self) -> int:
        """What the drift's share grows like in N: 1 or 2."""
        return 2 if self._is_confirmed and self._is_steep else 1

    @staticmethod
    def _is_curved(sizes: list[int], peaks: list[Peaks]) -> bool:
        """Whether the quadratic part is a good part of the last of three trials."""
        if len(sizes) < 3:
            return False
        totals = [p.total for p in peaks]
        return _parabola(sizes, totals)[2] * sizes[-1] ** 2 > 0.2 * totals[-1]

    def _wanted(self) -> int:
        """Particles of one replica beyond which growth is not followed."""
        if self._is_steep:
            return math.ceil(math.sqrt(STEEP_FLOATS / (self._trials.dim * self._first)))
        return int(self._sizes[-1] * LINEAR_FLOATS * self._float / max(1.0, self._small[-1].total))

    def _followed(self) -> int:
        """The largest number of particles tried: the run's, or where growth is known, or where trials take long."""
        end = min(self._n, max(self._sizes[-1], self._wanted()))
        if self._is_steep:
            # Not many, and a run of more will take longer over each step.
            return end
        n = self._sizes[-1]
        while n < end:
            further = min(end, 4 * n)
            if not self._trials.is_quick(self._first, further):
                # A quarter of the step may still be quick; a factor of two tells blocks that are full.
                further = min(end, 2 * n)
                if not self._trials.is_quick(self._first, further):
                    break
            self._trials.peaks(self._first, further)
            n = further
        return n

    def _extrapolated(self) -> Peaks:
        """One replica of N particles."""
        n, one = self._largest, self._one
        middle = self._sizes[-1] if n > self._sizes[-1] else self._sizes[1]
        places = [self._sizes[0], middle, n]
        trials = [self._trials.peaks(self._first, place) for place in places]
        expected = _value(_parabola(self._sizes, [p.total for p in self._small]), n)
        self._is_confirmed = one.total > 0.8 * expected
        if self._is_confirmed:
            columns = zip(*(dataclasses.astuple(p) for p in trials), strict=True)
            return Peaks(*(_value(_parabola(places, column), self._n) for column in columns))
        further = min(self._n, math.ceil(1.25 * n))
        beyond = self._trials.peaks(self._first, further)
        rise = beyond.with_(one, lambda b, a: (b - a) / (further - n))
        return one.with_(rise, lambda value, slope: value + slope * (self._n - n))

    def _follow_replicas(self) -> None:
        first, n, one = self._first, self._largest, self._one
        wanted = 2.0
        if self._is_steep:
            wanted = 4 / 3 * STEEP_FLOATS / (self._trials.dim * n * n)
        elif n == self._n:
            wanted = LINEAR_FLOATS * self._float / max(one.total, 1.0) * first
        many = max(2, min(self._r, math.ceil(wanted)) // first) * first
        top = self._trials.peaks(many, n)
        below = max(first, 3 * many // (4 * first) * first)
        under = self._trials.peaks(below, n)
        slope = top.with_(under, lambda a, b: (a - b) / (many - below))
        if n == self._n:
            self._top, self._top_replicas, self._slope = top, many, slope
            return
        # What one more replica adds grows as the first one does.
        scale = self._n / n if not self._is_confirmed else self._single.total / max(one.total, 1.0)
        self._slope = slope.with_(slope, lambda a, _: a * scale)


def _parabola(places: Sequence[float], values: Sequence[float]) -> tuple[float, float, float]:
    """A, b, c of a + bn + cn² through three points; a line, through the last two, where c would be negative."""
    (n0, n1, n2), (v0, v1, v2) = places, values
    low, high = (v1 - v0) / (n1 - n0), (v2 - v1) / (n2 - n1)
    c = max(0.0, (high - low) / (n2 - n0))
    b = max(0.0, high - c * (n1 + n2))
    return max(0.0, v2 - b * n2 - c * n2 * n2), b, c


def _value(parabola: tuple[float, float, float], n: int) -> float:
    a, b, c = parabola
    return a + b * n + c * n * n


# The verdict


class _Planner:
    """Puts together what is needed and what there is."""

    def __init__(self, name: str, settings: Settings, budget: Budget, trials: Trials, store: str | Path | None) -> None:
        self._name, self._settings, self._budget, self._store = name, settings, budget, store
        self._trials = trials

    def plan(self, dim: int) -> Plan:
        settings = self._settings
        try:
            frame, variables = self._trials.frame()
        except Exception:
            # What is wrong with the scenario is told by the run's own checks; or it needs its true N.
            frame, variables = settings.n_replicas * settings.kept * dim * self._float, 1
        self._n_frames = len(settings.save_steps())
        self._state = settings.n_replicas * settings.n_particles * dim * self._float
        self._all_frames = self._n_frames * frame
        self._frames = self._all_frames
        if self._store is not None:
            # A frame on its way to the disk is in one of a few slabs; one more is in the making.
            waiting = (SLABS + 1) * max(frame, variables * TARGET_CHUNK)
            self._frames = min(self._all_frames + frame, waiting)
        self._room = self._budget.device - (self._frames if self._budget.is_shared else 0)
        try:
            growth = Growth(self._trials, settings)
        except Exception as error:
            problem = (
                f"A step of fewer particles failed, so that its memory is a guess: {type(error).__name__}: {error}"
            )
            step = STATES_OF_A_STEP * self._state
            return self._assembled(settings.n_replicas, step, None, self._reason(None), problem)
        block = self._block(growth)
        needed = self._needed(growth, block or 1)
        return self._assembled(
            block or 1, needed, growth.at(block or 1).added, self._reason(growth if block is None else None)
        )

    @property
    def _float(self) -> int:
        return torch.empty((), dtype=self._settings.torch_dtype).element_size()

    def _needed(self, growth: Growth, block: int) -> float:
        """The peak with the drift in blocks of replicas: parts are joined beside the whole."""
        whole = growth.at(self._settings.n_replicas)
        joined = 0 if block == self._settings.n_replicas else 2 * self._state
        return max(whole.outside, whole.entered + joined + growth.at(block).added)

    def _block(self, growth: Growth) -> int | None:
        """The most replicas at a time that fit; None where one does not."""
        r = self._settings.n_replicas
        if self._needed(growth, r) <= self._room:
            return r
        if self._settings.compile or self._needed(growth, 1) > self._room:
            return None
        low, high = 1, r
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._needed(growth, middle) <= self._room else (low, middle)
        # As equal blocks as there have to be.
        return math.ceil(r / math.ceil(r / low))

    def _assembled(self, block: int, step: float, drift: float | None, reason: str, problem: str = "") -> Plan:
        settings, on_disk = self._settings, self._store is not None
        return Plan(
            name=self._name,
            n_particles=settings.n_particles,
            n_replicas=settings.n_replicas,
            replica_block=block,
            n_frames=self._n_frames,
            state=self._state,
            step=int(step),
            drift=None if drift is None else int(drift),
            frames=self._frames,
            disk=self._all_frames if on_disk else 0,
            available=self._budget.device,
            free=_free(self._store) if self._store is not None else None,
            reason=reason,
            problem=problem,
        )

    def _reason(self, growth: Growth | None) -> str:
        """Why the run does not fit; growth is given where its step does not."""
        if self._store is not None and self._all_frames > _free(self._store):
            return (
                f"{self._size()} needs {told(self._all_frames)} of disk for {self._n_frames} frames, and "
                f"{_existing(self._store)} has {told(_free(self._store))} left. Save less: a larger save_every, "
                "keep_particles=k (observables always see all particles), fewer replicas; or another store."
            )
        if self._frames > self._budget.host:
            return (
                f"{self._size()} needs {told(self._frames)} of memory for {self._n_frames} frames, and "
                f"{told(self._budget.host)} are available. Stream them to a disk with store='run.zarr', or keep less: "
                "a larger save_every, keep_particles=k (observables always see all particles), fewer replicas."
            )
        return "" if growth is None else self._step_reason(growth)

    def _step_reason(self, growth: Growth) -> str:
        r = self._settings.n_replicas
        beside = f" beside {told(self._frames)} of frames" if self._frames and self._budget.is_shared else ""
        there = f"and {told(max(0.0, self._room))} are available{beside}"
        whole, one = growth.at(r), growth.at(1)
        if max(whole.outside, whole.entered) + (2 * self._state if r > 1 else 0) > self._room:
            return (
                f"{self._size()} needs {told(max(whole.outside, whole.entered))} for its state of {told(self._state)} "
                f"and the buffers of a step, {there}. Take fewer replicas (with other seeds they make one sample), "
                "fewer particles, or dtype=torch.float32."
            )
        if self._settings.compile and r > 1 and self._needed(growth, 1) <= self._room:
            return (
                f"{self._size()} needs {told(self._needed(growth, r))}, {there}; compile=True makes code for all "
                "replicas at once. Leave compile out, and the drift goes in blocks of replicas, or take fewer."
            )
        if growth.order == 2:
            return (
                f"the drift of {self._name} makes temporaries that grow like N²: {told(one.added)} for one replica of "
                f"N = {self._settings.n_particles:,}, {there}. Sums over pairs by mu.convolve(K, x) or "
                'mfsde.interaction(W) need O(N) memory, least of all with strategy="compiled"; or take fewer particles.'
            )
        return (
            f"the drift of {self._name} takes {told(one.added)} for one replica of N = "
            f"{self._settings.n_particles:,}, {there}. Evaluate it in parts (data, features or pairs at a time), or "
            "take fewer particles."
        )

    def _size(self) -> str:
        settings = self._settings
        replicas = "1 replica" if settings.n_replicas == 1 else f"{settings.n_replicas:,} replicas"
        return f"{self._name} with {replicas} of {settings.n_particles:,} particles"


def told(n: float) -> str:
    """Bytes in words, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n < 999.5 or unit == "TB":
            break
        n /= 1000
    return f"{n:.0f} {unit}" if n >= 9.95 or unit == "B" else f"{n:.1f} {unit}"


def _dimension(scenario: Any) -> int | None:
    try:
        return int(scenario.initial().dim)
    except Exception:
        # Refused at the start of the run, with the reason.
        return None


def _is_small(dim: int, settings: Settings, store: str | Path | None, budget: Budget) -> bool:
    """Whether even a drift that makes tensors of all pairs would fit, frames included."""
    r, n = settings.n_replicas, settings.n_particles
    pairs = r * n * max(n, SIZES[-1]) * dim * FLOATS_OF_A_PAIR
    kept = len(settings.save_steps()) * r * (2 * settings.kept * dim * 8 + BYTES_OF_OBSERVABLES)
    fits = 8 * pairs + kept <= min(budget.device, budget.host)
    return fits and (store is None or kept <= _free(store))


def _existing(store: str | Path) -> Path:
    """The folder of a store, or the one above it that is there."""
    folder = Path(store).absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _free(store: str | Path) -> int:
    """Bytes that a store may have in the end: those of the run that is continued or replaced are there already."""
    held = sum(f.stat().st_size for f in Path(store).rglob("*") if f.is_file()) if Path(store).is_dir() else 0
    return shutil.disk_usage(_existing(store)).free + held
