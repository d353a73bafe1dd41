"""One step, and what surrounds it: compiled coefficients, no waiting for the device, frames that leave it meanwhile."""

from __future__ import annotations

import importlib
import json
import math
import platform
import subprocess
import sys
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mfsde
from mfsde import compilation, run, solver
from mfsde.clock import Clock
from mfsde.replay import Replay
from mfsde.run import System
from mfsde.scenarios import DoubleWell, KineticDoubleWell, MeanFieldOU, TwoLayerNetwork
from mfsde.settings import Settings
from mfsde.solver import CHECK_EVERY, integrate
from mfsde.store import ZarrStore
from mfsde.transfer import Snapshot

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: its steps are untested here")


@dataclass(frozen=True)
class Season:
    """dX = (a(1 - t) E X - κX cos t - X³) dt + (σ + ½ sin²X) dW."""

    kappa: float = 1.0
    pull: float = 0.5
    sigma: float = 0.3

    def drift(self, t, x, mu):
        return self.pull * (1 - t) * mu.mean() - self.kappa * math.cos(t) * x - x**3

    def diffusion(self, t, x, mu):
        return self.sigma + 0.5 * torch.sin(x) ** 2

    def initial(self):
        return mfsde.Gaussian([0.5], [[1.0]])


# Compiled coefficients

SEASON: dict[str, Any] = {"n_particles": 5000, "n_replicas": 2, "horizon": 0.8, "dt": 0.05, "seed": 4, "save_every": 4}
KINETIC = {**SEASON, "method": "baoab", "dtype": torch.float64}
PAIRS = [(Season(), SEASON), (KineticDoubleWell(), KINETIC)]


def inductor_config() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch, about itself
        return importlib.import_module("torch._inductor.config")


@pytest.fixture(scope="module")
def pairs() -> list[tuple[xr.Dataset, xr.Dataset]]:
    """Runs of two scenarios, eager and compiled: all that is compiled in this file."""
    # Without the six probes of the compiler that torch makes on every new machine: they take longer than the rest.
    with inductor_config().patch({"cpp.vec_isa_ok": True}):
        return [(mfsde.simulate(s, **kw), mfsde.simulate(s, **kw, compile=True)) for s, kw in PAIRS]


def assert_equal_to_rounding(eager: xr.Dataset, compiled: xr.Dataset) -> None:
    """The same path: a step changes a state of size one by a few roundings, and 16 steps do not amplify them much."""
    epsilon = np.finfo(eager.position.dtype).eps
    gap = abs(eager.position - compiled.position)
    assert float(gap.max()) <= 64 * epsilon * float(abs(eager.position).max())


def test_compiled_is_eager_to_rounding_with_the_same_noise(pairs):
    for eager, compiled in pairs:
        assert_equal_to_rounding(eager, compiled)
        assert (eager.position != compiled.position).any() or eager.position.dtype == np.float64
    # A time that became a constant, and other noise, are no rounding.
    for fault in ({"horizon": 0.4, "dt": 0.025}, {"seed": 5}):
        with pytest.raises(AssertionError):
            assert_equal_to_rounding(pairs[0][0], mfsde.simulate(Season(), **{**SEASON, **fault}))


def test_neither_a_step_nor_a_second_run_compiles(pairs):
    compiled = dict(torch._dynamo.utils.counters["stats"])
    found = compilation._function.cache_info()
    with torch._dynamo.config.patch(error_on_recompile=True):
        again = mfsde.simulate(Season(), **{**SEASON, "seed": 9, "horizon": 1.2}, compile=True)
    assert compiled["unique_graphs"] == torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compilation._function.cache_info().misses == found.misses
    assert_equal_to_rounding(mfsde.simulate(Season(), **{**SEASON, "seed": 9, "horizon": 1.2}), again)


def test_compiling_is_recorded_where_it_was_asked_for(pairs):
    (eager, compiled), _ = pairs
    assert json.loads(compiled.attrs["compiled"]) is True
    assert json.loads(compiled.attrs["settings"])["compile"] is True
    assert "compile" not in json.loads(eager.attrs["settings"])
    assert "compiled" not in eager.attrs
    assert compiled.attrs["digest"] != eager.attrs["digest"]


def test_a_compiled_run_is_resumed_as_it_began(pairs, tmp_path: Path, monkeypatch):
    frames = ZarrStore.append

    def append(self, index, frame):
        if index == 3:
            raise RuntimeError("midway")
        frames(self, index, frame)

    monkeypatch.setattr(ZarrStore, "append", append)
    with pytest.raises(RuntimeError, match="midway"):
        mfsde.simulate(Season(), **SEASON, checkpoint_every=4, store=tmp_path / "run.zarr", compile=True)
    monkeypatch.setattr(ZarrStore, "append", frames)
    resumed = mfsde.resume(tmp_path / "run.zarr", scenario=Season())
    assert json.loads(resumed.attrs["settings"])["compile"] is True
    assert np.array_equal(resumed.position, pairs[0][1].position)


def test_calls_that_no_step_makes_stay_eager():
    x = torch.randn(2, 5, 1)
    mu = mfsde.EmpiricalMeasure(x)
    calls: list[str] = []
    found = compilation._Coefficient(
        lambda t, x, mu: calls.append("eager"), lambda t, x, w: calls.append("compiled") or x, x, weighted=False
    )
    with torch.no_grad():
        found(0.1, x, mu)
        for points, law in ((x.clone(), mu), (x[:, :3], mfsde.EmpiricalMeasure(x[:, :3])), (x.double(), mu)):
            found(0.1, points, law)
        found(0.1, x, mfsde.EmpiricalMeasure(x, torch.full((2, 5), 0.2)))
    found(0.1, x, mu)
    assert calls == ["compiled", *["eager"] * 5]


def test_equal_parameters_share_what_was_compiled_and_others_do_not():
    @dataclass(frozen=True)
    class Holder:
        value: Any

    def identity(value: Any) -> Any:
        return compilation._identity(Holder(value))

    def f() -> None: ...

    for same in (1.0, "a", (1, (2.0, None)), [1], torch.tensor([1.0, 2.0]), f, Season()):
        copied = replace(same) if isinstance(same, Season) else same.clone() if isinstance(same, Tensor) else same
        assert identity(same) == identity(copied)
        assert hash(identity(same)) == hash(identity(copied))
    for one, other in (
        (1.0, 2.0), (1, 1.0), (True, 1), ((1,), [1]), (torch.tensor([1.0]), torch.tensor([2.0])),
        (torch.tensor([1.0]), torch.tensor([1.0]).double()), (lambda x: x, lambda x: x), (Season(), Season(sigma=1.0)),
        (Season(), MeanFieldOU()),
    ):  # fmt: skip
        assert identity(one) != identity(other)


@dataclass(frozen=True)
class Branching(Season):
    def drift(self, t, x, mu):
        return -x if t < 0.5 else x


@dataclass(frozen=True)
class Looking(Season):
    def drift(self, t, x, mu):
        return -x if float(x.abs().max()) > 100 else x


@dataclass(frozen=True, slots=True)
class Slotted:
    kappa: float = 1.0

    def drift(self, t, x, mu):
        return -self.kappa * x

    def diffusion(self, t, x, mu):
        return 0.3

    def initial(self):
        return mfsde.Gaussian([0.5], [[1.0]])


@pytest.mark.parametrize(
    ("scenario", "changes", "message"),
    [
        (
            TwoLayerNetwork(),
            {"n_particles": 80},
            r"TwoLayerNetwork.drift \(derived from its energy, unless written by hand\): ",
        ),
        (Branching(), {}, r"Branching.drift: .*[Dd]ata-dependent"),
        (Looking(), {}, r"Looking.drift: .*[Dd]ata-dependent"),
        (Slotted(), {}, "Slotted: its class has slots"),
        (mfsde.decoupled(Season(), mfsde.Gaussian([0.0], [[1.0]])), {}, "a decoupled scenario looks its law up"),
    ],
)
def test_what_torch_cannot_compile_whole_is_refused(scenario, changes, message):
    settings = {"n_particles": 20, "horizon": 1.0, "dt": 0.1, "seed": 0, **changes}
    with pytest.raises(ValueError, match=rf"(?s)compile=True is not for .*{message}.*compile=False"):
        mfsde.simulate(scenario, **settings, compile=True)
    mfsde.simulate(scenario, **settings)


def test_sums_over_pairs_are_refused_since_they_have_kernels_of_their_own():
    @dataclass(frozen=True)
    class Attracted(Season):
        def drift(self, t, x, mu):
            return mu.convolve(lambda z: -z * torch.exp(-(z**2)), x)

    with pytest.raises(ValueError, match="Attracted: its sums over pairs have kernels of their own"):
        mfsde.simulate(Attracted(), n_particles=20, horizon=1.0, dt=0.1, seed=0, compile=True)


def test_other_values_are_refused(monkeypatch):
    # As if torch's compiler were wrong by a thousandth of the largest value.
    monkeypatch.setattr(compilation, "_function", lambda key: lambda t, x, w: key.method(t.item(), x, Law(x)) * 1.01)
    Law = mfsde.EmpiricalMeasure
    with pytest.raises(ValueError, match=r"MeanFieldOU.drift: compiled values differ by .* from eager ones of up to"):
        mfsde.simulate(MeanFieldOU(), n_particles=20, horizon=1.0, dt=0.1, seed=0, compile=True)


def test_a_machine_without_a_compiler_says_so():
    with (
        inductor_config().patch({"cpp.cxx": ("/nonexistent/c++",)}),
        importlib.import_module("torch._inductor.utils").fresh_cache(),
        pytest.raises(ValueError, match=r"(?s)No working C\+\+ compiler found.*compile=False runs the same equation"),
    ):
        mfsde.simulate(MeanFieldOU(), n_particles=21, horizon=1.0, dt=0.1, seed=0, compile=True)


@pytest.mark.parametrize("value", [1, "yes", None])
def test_compile_is_a_yes_or_no(value):
    with pytest.raises(TypeError, match=r"compile = .*; expected True or False"):
        mfsde.simulate(MeanFieldOU(), n_particles=20, horizon=1.0, dt=0.1, seed=0, compile=value)


# Normals of float32 in a run of float64


def test_a_replay_has_the_mixed_noise_of_its_run():
    settings: dict[str, Any] = {"n_particles": 40, "horizon": 0.4, "dt": 0.05, "seed": 2, "n_replicas": 2}
    mixed = mfsde.Noise(2, substeps=2, precision=torch.float32)
    ends = []
    for noise in (mixed, mfsde.Noise(2, substeps=2)):
        checked = Settings.checked(
            **settings, save_every=None, keep_particles=None, method="euler", device="cpu", dtype=torch.float64,
            noise=noise, checkpoint_every=None,
        )  # fmt: skip
        system = System.start(Season(), checked, ())
        x, replay = system.x, Replay(system, Season(), None, 0)
        for step in range(8):
            x = replay.step(step, x)
        ends.append(x)
    run = torch.from_numpy(mfsde.simulate(Season(), **settings, dtype=torch.float64, noise=mixed).position[-1].values)
    assert float((ends[0] - run).abs().max()) < 1e-13
    assert 1e-10 < float((ends[1] - run).abs().max()) < 1e-5


# Temporaries

FAULTS = """
import resource, torch
from mfsde import pages
torch.set_num_threads(1)

def faults():
    \"\"\"Pages that twenty steps with three temporaries of 8 MB take from the system.\"\"\"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        kept = [torch.zeros(10**6, dtype=torch.float64).add_(1.0) for _ in range(3)]
        del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults())
pages.keep()
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library: its thresholds are its own")
def test_temporaries_keep_their_pages_from_one_step_to_the_next():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, timeout=60, check=True)
    before, after = map(int, done.stdout.split())
    # Sixty arrays of 8 MB, most of them taken anew; then none.
    assert after < 100
    assert before > 1000


GROWTH = """
import torch
import mfsde
from mfsde import pages
from mfsde.scenarios import GaussianMixture
torch.set_num_threads(1)

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6

def grown(steps):
    \"\"\"Megabytes by which a run that compares all pairs raises the resident size.\"\"\"
    before = resident()
    mfsde.simulate(GaussianMixture(), n_particles=150, n_replicas=8, horizon=0.2 * steps, dt=0.2, seed=0)
    return resident() - before

grown(2)
pages.RESIDENT = 1e8
print(grown(192))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library: its heap is its own")
def test_freed_memory_is_given_back_above_a_bound():
    # Without, it grows by some 3 MB a step in most runs: where small blocks come to lie is chance.
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, timeout=60, check=True)
    assert float(done.stdout) < 350


# Waiting for the device


class Reads(TorchDispatchMode):
    """Counts what would wait for an accelerator: numbers read from tensors, sizes found in them, constants sent."""

    WAITING = frozenset(
        {
            *(torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default),
            *(torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default),
            torch.ops.aten.lift_fresh.default,
        }
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.WAITING:
            ours = [f"{f.filename}:{f.lineno}" for f in traceback.extract_stack() if "mfsde" in f.filename]
            self.found[f"{func} from {ours[-1]}"] += 1
        return func(*args, **(kwargs or {}))


BLOCKS = 2


def steps(scenario: Any, method: str, n_steps: int, device: str = "cpu", n_particles: int = 200) -> tuple[Any, ...]:
    """The arguments of `integrate` for some steps of a run."""
    settings = Settings.checked(
        n_particles=n_particles, horizon=0.01 * n_steps, dt=0.01, seed=0, n_replicas=2, save_every=None,
        keep_particles=0, method=method, device=device, dtype=torch.float32, noise=None, checkpoint_every=None,
    )  # fmt: skip
    system = System.start(scenario, settings, ())
    clock = Clock(settings.dt)
    return system.equation, system.x, 0, n_steps, clock, settings.noise, system.method, [n_steps], lambda step, x: None


def assert_waits_once_a_block(scenario: Any, method: str) -> None:
    arguments = steps(scenario, method, BLOCKS * CHECK_EVERY)
    with Reads() as reads:
        integrate(*arguments)
    assert 1 <= sum(reads.found.values()) <= BLOCKS, dict(reads.found)


STEPPED = [
    (MeanFieldOU(), "euler"),
    (DoubleWell(), "euler"),
    (TwoLayerNetwork(), "euler"),
    (KineticDoubleWell(), "baoab"),
    (KineticDoubleWell(), "obabo"),
    (Season(), "milstein"),
    (Season(), "heun"),
]


@pytest.mark.parametrize(("scenario", "method"), STEPPED, ids=[f"{type(s).__name__}-{m}" for s, m in STEPPED])
def test_a_block_of_steps_waits_for_its_finiteness_only(scenario, method):
    assert_waits_once_a_block(scenario, method)


def test_a_drift_that_reads_a_number_is_noticed():
    with pytest.raises(AssertionError, match="_local_scalar_dense"):
        assert_waits_once_a_block(Looking(), "euler")


@needs_cuda
@pytest.mark.parametrize(("scenario", "method"), STEPPED[:4], ids=["ou", "double_well", "network", "kinetic"])
def test_a_block_of_steps_does_not_synchronise_with_the_device(scenario, method):
    # Fewer steps than a check: the first run compiles the noise's kernels.
    integrate(*steps(scenario, method, CHECK_EVERY // 2, "cuda"))
    equation, x, first, last, *rest = steps(scenario, method, CHECK_EVERY // 2, "cuda")
    torch.cuda.synchronize()
    seen: list[int] = []

    def interrupted() -> bool:
        # The check that follows the last step may wait.
        seen.append(1)
        if len(seen) == last:
            torch.cuda.set_sync_debug_mode("default")
        return False

    torch.cuda.set_sync_debug_mode("error")
    try:
        integrate(equation, x, first, last, *rest, interrupted=interrupted)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(seen) == last


def launches_per_step(arguments: tuple[Any, ...]) -> float:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        integrate(*arguments)
        torch.cuda.synchronize()
    kernels = [event for event in profiled.events() if event.device_type.name == "CUDA"]
    return len(kernels) / (BLOCKS * CHECK_EVERY)


@needs_cuda
@pytest.mark.parametrize(("n", "most"), [(4096, 3), (2**20, 4)])
def test_a_compiled_step_is_a_few_launches(n, most):
    # Up to a block of the mean: one sum, one pass of the drift, one of the noise; above, the blocks' sums are summed.
    arguments = steps(MeanFieldOU(), "euler", BLOCKS * CHECK_EVERY, "cuda", n)
    equation, x = arguments[:2]
    equation.scenario = compilation.compiled(equation, "euler", x, (0.0, 0.5))
    integrate(*steps(MeanFieldOU(), "euler", 2, "cuda", n))
    # The check, its copy and the last frame are a few more in each block.
    assert launches_per_step(arguments) <= most + 0.2


# Frames that leave the device while steps go on


def test_a_snapshot_is_what_the_tensor_was():
    x = torch.arange(12.0).reshape(2, 6)
    whole, part = Snapshot(x), Snapshot(x[:, :3])
    before = x.clone()
    x.zero_()
    assert whole.has_arrived()
    assert torch.equal(whole.host(), before)
    assert torch.equal(part.host(), before[:, :3])
    assert part.host().is_contiguous()
    assert part.host().untyped_storage().nbytes() == 6 * 4


@needs_cuda
def test_a_snapshot_on_cuda_is_what_the_tensor_was():
    x = torch.randn(2**24, device="cuda")
    before = x.cpu()
    for _ in range(5):
        found = Snapshot(x)
        x.add_(1.0)
        assert torch.equal(found.host(), before)
        assert found.has_arrived()
        assert found.host().is_pinned()
        before = x.cpu()


SAVED: dict[str, Any] = {**SEASON, "save_every": 3, "checkpoint_every": 5, "observables": ["mean"], "n_particles": 50}


@pytest.mark.parametrize("check_every", [1, 64])
def test_frames_on_their_way_come_in_order_and_unchanged(check_every, tmp_path: Path, monkeypatch):
    expected = mfsde.simulate(Season(), **SAVED, store=tmp_path / "here.zarr")
    monkeypatch.setattr(run, "travels", lambda x: True)
    monkeypatch.setattr(solver, "CHECK_EVERY", check_every)
    assert mfsde.simulate(Season(), **SAVED).equals(expected)
    assert mfsde.simulate(Season(), **SAVED, store=tmp_path / "away.zarr").equals(expected)


def test_a_frame_on_its_way_is_kept_when_the_run_fails(tmp_path: Path, monkeypatch):
    @dataclass(frozen=True)
    class Failing(Season):
        def drift(self, t, x, mu):
            if t > 0.5:
                raise ZeroDivisionError
            return super().drift(t, x, mu)

    monkeypatch.setattr(run, "travels", lambda x: True)
    with pytest.raises(ZeroDivisionError):
        mfsde.simulate(Failing(), **{**SAVED, "checkpoint_every": None}, store=tmp_path / "run.zarr")
    # Steps 0, 3, 6 and 9; the drift fails in the step from 11.
    assert mfsde.open_run(tmp_path / "run.zarr").time.values.tolist() == [0.0, 0.15, 0.3, 0.45]
