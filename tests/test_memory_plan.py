"""What a run will take, told before it starts: predictions against counts, refusals, drifts in blocks of replicas."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
import xarray as xr
from torch import Tensor

import mfsde
from mfsde import memory, run
from mfsde.allocations import LiveBytes
from mfsde.memory import DoesNotFit, Growth, Trials
from mfsde.replica_blocks import ReplicaBlocks
from mfsde.run import System
from mfsde.scenarios import DoubleWell, KineticDoubleWell, MeanFieldOU
from mfsde.settings import Settings
from mfsde.store import Memory

SHORT: dict[str, Any] = {"horizon": 0.2, "dt": 0.05, "seed": 3}


@dataclass(frozen=True)
class Plane:
    """What the drifts below share: the plane, and noise of size σ."""

    sigma: float = 0.5

    def diffusion(self, t, x, mu):
        return self.sigma

    def initial(self):
        return mfsde.Gaussian([0.0, 1.0], [[1.0, 0.0], [0.0, 1.0]])


def bump(z: Tensor) -> Tensor:
    return z * torch.exp(-z.square().sum(-1, keepdim=True))


@dataclass(frozen=True)
class Naive(Plane):
    """The sum over pairs as a tensor of all of them."""

    def drift(self, t, x, mu):
        return -bump(x.unsqueeze(-2) - x.unsqueeze(-3)).mean(-2)


@dataclass(frozen=True)
class Convolved(Plane):
    """The same, in the engine's blocks."""

    def drift(self, t, x, mu):
        return -mu.convolve(bump, x)


@dataclass(frozen=True)
class Batched(Plane):
    """The same, on random batches."""

    def drift(self, t, x, mu):
        return -mu.convolve(mfsde.Kernel(bump, mfsde.pairwise.Batches(8)), x)


@dataclass(frozen=True)
class Network(mfsde.MeanFieldLangevin):
    """A network of 1000 data, whose features are evaluated in chunks."""

    sigma: float = 0.1

    @cached_property
    def energy(self):
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(1000, 4, generator=generator)
        return mfsde.risk(mfsde.Neuron("tanh"), "squared", z, torch.sin(z[:, 0]))

    def confinement(self, x):
        return 0.5 * x.square().sum(-1)

    def initial(self):
        return mfsde.Gaussian([0.0] * 5, 1.0)


def of(scenario: Any, **settings: Any) -> tuple[Settings, Callable[..., System]]:
    """Checked settings, and what starts a system of other ones."""
    checked = run._settings_of(scenario, {}, {**SHORT, **settings})
    return checked, lambda small, view: System.start(scenario, small, (), view)


# Counting


def test_live_bytes_are_those_of_storages_made_within_and_not_freed() -> None:
    before = torch.zeros(1000)
    with LiveBytes() as counter:
        assert counter.live == 0
        view, x = before[10:].view(2, -1), torch.empty(100)
        assert view.shape == (2, 495)
        assert counter.live == 400
        y = x + 1
        z = y[:10].unsqueeze(0)
        assert counter.live == 800
        x.mul_(2)
        del x
        assert counter.live == 400
        del y
        # Its storage lives on in the view.
        assert counter.live == 400
        del z
        assert counter.live == 0
        assert counter.outside == 800


def test_what_a_call_adds_is_counted_apart() -> None:
    with LiveBytes() as counter:
        kept = torch.empty(100)
        made = counter.inside(lambda: torch.empty(50) + torch.empty(50))
        later = torch.empty(25)
    assert kept.numel() + made.numel() + later.numel() == 175
    assert (counter.entered, counter.added, counter.outside) == (400, 600, 700)


# Predictions

CASES = [
    (MeanFieldOU(), {"n_particles": 1_500_000}),
    (MeanFieldOU(), {"n_particles": 1000, "n_replicas": 3000}),
    (DoubleWell(), {"n_particles": 100_000, "n_replicas": 16, "method": "heun"}),
    (Network(), {"n_particles": 20_000, "n_replicas": 2}),
    (Convolved(), {"n_particles": 4000}),
    (Convolved(), {"n_particles": 400, "n_replicas": 100, "dtype": torch.float64}),
    (Naive(), {"n_particles": 3500}),
    (Naive(), {"n_particles": 500, "n_replicas": 40}),
]


def miss(scenario: Any, settings: dict[str, Any]) -> float:
    """The larger of prediction and count, divided by the smaller, for the whole step and for the drift."""
    checked, start = of(scenario, **settings)
    trials = Trials(checked, start)
    trials.frame()
    told = Growth(trials, checked).at(checked.n_replicas)
    tried = {r * n for r, n in trials._known}
    assert max(tried) < checked.n_replicas * checked.n_particles
    true = trials.peaks(checked.n_replicas, checked.n_particles)
    pairs = ((told.total, true.total), (told.added, true.added))
    return max(max(a, b) / min(a, b) for a, b in pairs)


@pytest.mark.parametrize(("scenario", "settings"), CASES)
def test_a_run_takes_what_was_told(scenario: Any, settings: dict[str, Any]) -> None:
    assert miss(scenario, settings) < 1.5


def test_without_large_trials_blocks_would_be_taken_for_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Growth, "_followed", lambda growth: growth._sizes[-1])
    for scenario, settings in (CASES[3], CASES[4]):
        assert miss(scenario, settings) > 1.5


def test_small_systems_are_tried_as_they_are() -> None:
    checked, start = of(Naive(), n_particles=50, n_replicas=2)
    trials = Trials(checked, start)
    trials.frame()
    assert Growth(trials, checked).at(2) == trials.peaks(2, 50)


def test_frames_are_told_to_the_byte(tmp_path: Path) -> None:
    observed = mfsde.Observable("radius", lambda t, x, mu: x.square().sum(-1))
    settings = {**SHORT, "n_particles": 90, "n_replicas": 3, "save_every": 1, "keep_particles": 7}
    found = mfsde.plan(Convolved(), observables=["mean", observed], store=tmp_path / "run.zarr", **settings)
    whole = mfsde.simulate(Convolved(), observables=["mean", observed], **settings)
    assert found.n_frames == whole.sizes["time"] == 5
    assert found.disk == sum(v.nbytes for v in whole.data_vars.values())
    assert found.state == 3 * 90 * 2 * 4
    assert found.free is not None
    assert found.fits


# Refusals


def test_frames_that_do_not_fit_are_refused_with_the_next_moves(tmp_path: Path) -> None:
    settings = {**SHORT, "n_particles": 1000, "n_replicas": 4, "save_every": 1}
    with pytest.raises(DoesNotFit, match=r"needs 80 kB of memory for 5 frames, and 50 kB are.*store=.*keep_particles"):
        mfsde.simulate(MeanFieldOU(), memory=50_000, **settings)
    for kind in (MemoryError, ValueError):
        assert issubclass(DoesNotFit, kind)
    # Streamed, as advised, a run of more frames than memory fits.
    many = {**settings, "horizon": 2000 * 0.05, "memory": 20_000_000}
    assert mfsde.plan(MeanFieldOU(), **many).reason.startswith(
        "MeanFieldOU with 4 replicas of 1,000 particles needs 32 MB"
    )
    assert mfsde.plan(MeanFieldOU(), store=tmp_path / "run.zarr", **many).fits


def test_a_disk_that_is_too_small_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_free", lambda store: 1000)
    with pytest.raises(DoesNotFit, match=r"needs 8\.0 kB of disk for 2 frames, and .* has 1\.0 kB left\. Save less"):
        mfsde.simulate(MeanFieldOU(), n_particles=1000, store=tmp_path / "new" / "run.zarr", **SHORT)
    assert not (tmp_path / "new").exists()


def test_a_drift_that_does_not_fit_is_refused_with_its_growth() -> None:
    with pytest.raises(
        DoesNotFit, match=r"drift of Naive makes temporaries that grow like N²: .*mu\.convolve"
    ) as found:
        mfsde.simulate(Naive(), n_particles=100_000, memory=8 * 2**30, **SHORT)
    # 2 N² floats of 4 bytes are 80 GB, of which a few are alive at a time.
    amount = float(str(found.value).split("N²: ")[1].split(" GB")[0])
    assert 160 <= amount <= 400
    assert mfsde.plan(Convolved(), n_particles=100_000, memory=8 * 2**30, **SHORT).fits
    with pytest.raises(DoesNotFit, match=r"drift of Network takes .* MB for one replica"):
        mfsde.simulate(Network(), n_particles=2000, memory=2_000_000, **SHORT)


def test_a_state_that_does_not_fit_is_refused() -> None:
    with pytest.raises(
        DoesNotFit, match=r"for its state of 400 kB and the buffers of a step, and .* Take fewer replicas"
    ):
        mfsde.simulate(MeanFieldOU(), n_particles=1000, n_replicas=100, memory=1_200_000, **SHORT)


@pytest.mark.parametrize(("wrong", "kind"), [(0, ValueError), (-1, ValueError), ("8 GB", TypeError), (True, TypeError)])
def test_a_budget_is_a_number_of_bytes(wrong: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"memory = .*; expected a .*number of bytes"):
        mfsde.simulate(MeanFieldOU(), n_particles=10, memory=wrong, **SHORT)


# Blocks of replicas


@dataclass(frozen=True)
class Weighted(Convolved):
    """Particles of unequal masses, one law for each replica."""

    points: Tensor = field(default_factory=lambda: torch.linspace(-1, 1, 5 * 40 * 2).reshape(5, 40, 2).sin())

    def initial(self):
        weights = torch.linspace(1, 2, 40).expand(5, 40)
        return mfsde.EmpiricalMeasure(self.points, weights / weights.sum(-1, keepdim=True))


@dataclass(frozen=True)
class Reborn(Naive):
    """With births and deaths where it is crowded."""

    def birth_death_rate(self, t, x, mu):
        return mu.convolve(lambda z: torch.exp(-z.square().sum(-1)), x)


IN_BLOCKS = [
    (MeanFieldOU(), {}),
    (Naive(), {"dtype": torch.float64}),
    (Convolved(), {"method": "heun"}),
    (Batched(), {}),
    (Weighted(), {"n_particles": 40}),
    (Reborn(), {}),
    (KineticDoubleWell(), {"method": "baoab"}),
    (Network(), {"n_particles": 64}),
]


@pytest.mark.parametrize(("scenario", "settings"), IN_BLOCKS)
def test_blocks_of_replicas_change_no_number(
    scenario: Any, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {**SHORT, "n_particles": 40, "n_replicas": 5, "save_every": 2, **settings}
    whole = mfsde.simulate(scenario, **chosen)
    calls: list[int] = []
    monkeypatch.setattr(memory, "_is_small", lambda *_: False)
    monkeypatch.setattr(memory._Planner, "_block", lambda *_: 2)
    kept = ReplicaBlocks._in_blocks

    def counted(self: ReplicaBlocks, coefficient: Any) -> Any:
        def seen(t: float, x: Tensor, mu: Any) -> Any:
            calls.append(len(x))
            assert mu.points.shape[0] == len(x)
            return coefficient(t, x, mu)

        return kept(self, seen)

    monkeypatch.setattr(ReplicaBlocks, "_in_blocks", counted)
    parts = mfsde.simulate(scenario, **chosen)
    assert set(calls) == {1, 2}
    assert parts.attrs.pop("replica_block") == 2
    assert "replica_block" not in whole.attrs
    xr.testing.assert_identical(whole.drop_attrs(), parts.drop_attrs())
    assert whole.attrs["digest"] == parts.attrs["digest"]


def test_blocks_are_as_large_as_the_budget_allows_and_bound_the_peak() -> None:
    settings = {**SHORT, "n_particles": 300, "n_replicas": 8}
    whole, one = (mfsde.plan(Naive(), **{**settings, "n_replicas": r}) for r in (8, 1))
    assert whole.replica_block == 8
    budget = whole.frames + one.step + 2 * one.drift
    parts = mfsde.plan(Naive(), memory=budget, **settings)
    assert parts.fits
    assert 1 < parts.replica_block < 8
    assert parts.needed <= budget < whole.needed
    assert "drift in blocks of" in str(parts)
    checked, start = of(Naive(), n_particles=300, n_replicas=8)
    for view, fits in ((ReplicaBlocks(parts.replica_block), True), (memory.as_it_is, False)):
        with LiveBytes() as counter:
            system = start(checked, view)
            system.run(Memory(system.layout()), 0, 0, False)
        assert (counter.outside <= budget - whole.frames) == fits


def arrays(store: Path) -> dict[str, str]:
    files = (f for f in store.rglob("*") if f.is_file() and f.name not in ("zarr.json", ".lock"))
    found = {str(f.relative_to(store)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    return {name: digest for name, digest in found.items() if not name.startswith("checkpoint")}


STOP = {"after": math.inf}


def mean_or_stop(t: float, x: Tensor, mu: Any) -> Tensor:
    if t > STOP["after"]:
        raise ArithmeticError
    return x.mean(-2)


WATCH = mfsde.Observable("watched", mean_or_stop)


def test_stores_are_the_same_and_resumed_in_the_recorded_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SHORT, "n_particles": 300, "n_replicas": 8, "save_every": 1, "checkpoint_every": 1}
    whole = mfsde.plan(Naive(), store=tmp_path / "whole", **settings)
    budget = whole.needed - whole.drift // 2
    mfsde.simulate(Naive(), store=tmp_path / "whole", **settings)
    mfsde.simulate(Naive(), store=tmp_path / "parts", memory=budget, **settings)
    assert arrays(tmp_path / "whole") == arrays(tmp_path / "parts")
    block = mfsde.open_run(tmp_path / "parts").attrs["replica_block"]
    assert 1 <= block < 8

    monkeypatch.setitem(STOP, "after", 0.1)
    with pytest.raises(ArithmeticError):
        mfsde.simulate(Naive(), store=tmp_path / "cut", memory=budget, observables=[WATCH], **settings)
    monkeypatch.setitem(STOP, "after", math.inf)
    resumed = mfsde.resume(tmp_path / "cut", observables=[WATCH])
    assert resumed.attrs["replica_block"] == block
    positions = mfsde.open_run(tmp_path / "whole").position
    xr.testing.assert_identical(resumed.position.drop_attrs().load(), positions.drop_attrs().load())


# What planning leaves behind, and what it cannot know


def test_planning_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**SHORT, "n_particles": 300, "n_replicas": 2, "save_every": 1}
    scenario = Reborn()
    before = mfsde.simulate(Reborn(), **settings)
    state = torch.get_rng_state()
    mfsde.plan(scenario, **settings)
    assert torch.equal(state, torch.get_rng_state())
    monkeypatch.setattr(memory, "_is_small", lambda *_: False)
    after = mfsde.simulate(scenario, **settings)
    xr.testing.assert_identical(before.drop_attrs(), after.drop_attrs())
    assert before.attrs["digest"] == after.attrs["digest"]


@dataclass(frozen=True)
class OneSize(Plane):
    """A drift with a field for each particle."""

    forces: Tensor = field(default_factory=lambda: torch.ones(500, 2))

    def drift(self, t, x, mu):
        return self.forces - x


def test_a_drift_that_needs_its_true_size_is_run_without_a_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    found = mfsde.plan(OneSize(), n_particles=500, **SHORT)
    assert found.drift is None
    assert found.fits
    assert "drift unknown" in found.line()
    assert "A step of fewer particles failed" in str(found)
    monkeypatch.setattr(memory, "_is_small", lambda *_: False)
    assert mfsde.simulate(OneSize(), n_particles=500, **SHORT).sizes["particle"] == 500


def test_what_is_wrong_with_a_scenario_is_told_at_its_true_size(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Flat(Plane):
        def drift(self, t, x, mu):
            return x[..., 0]

    monkeypatch.setattr(memory, "_is_small", lambda *_: False)
    with pytest.raises(ValueError, match="for 300 particles in dimension 2"):
        mfsde.simulate(Flat(), n_particles=300, **SHORT)


def test_progress_begins_with_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    mfsde.simulate(MeanFieldOU(), n_particles=1000, progress=True, **SHORT)
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("MeanFieldOU: needs ")
    assert "state 4.0 kB, drift 4.0 kB, 2 frames 8.0 kB" in first
    mfsde.simulate(MeanFieldOU(), n_particles=1000, **SHORT)
    assert capsys.readouterr().err == ""


# What there is


def test_available_memory_is_the_least_of_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = memory.available()
    assert 0 < everything < math.inf
    names = ("limit", "usage", "statistics")
    files = tuple(tmp_path / name for name in names)
    for text, left in (("max\n", math.inf), ("1000000\n", 700_000.0)):
        for file, content in zip(files, (text, "400000\n", "anon 5\ninactive_file 100000\n"), strict=True):
            file.write_text(content)
        monkeypatch.setattr(memory, "_limits", lambda: (files,))
        assert memory._left(*files) == left
        assert memory.available() == min(memory._meminfo(), left)


def test_sizes_are_told_in_words() -> None:
    assert [memory.told(n) for n in (0, 999, 1000, 99_400, 123_456, 4.2e10, 3e15)] == [
        *("0 B", "999 B", "1.0 kB", "99 kB", "123 kB", "42 GB", "3000 TB"),
    ]
