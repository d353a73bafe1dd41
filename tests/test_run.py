"""Runs: identities that hold bit for bit, the labelled dataset, what is refused at the door, resuming and sweeping."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mfsde
from mfsde.noise import Noise
from mfsde.provenance import load_file
from mfsde.run import System
from mfsde.scenarios import MeanFieldOU
from mfsde.settings import Settings
from mfsde.store import ZarrStore, load_checkpoint, read_settings

OU = MeanFieldOU()
SMALL = {"n_particles": 5, "horizon": 1.0, "dt": 0.1, "seed": 0}


@dataclass(frozen=True)
class Independent:
    """Particles that do not see one another; every scheme accepts it."""

    sigma: float = 0.6
    dim: int = 1

    def drift(self, t, x, mu):
        return torch.sin(x) - x + t

    def diffusion(self, t, x, mu):
        return self.sigma * torch.cos(x)

    def initial(self):
        return mfsde.Gaussian([0.5] * self.dim, 1.0)


@dataclass(frozen=True)
class Weighted:
    """Particles of unequal mass that are drawn to their weighted mean."""

    kappa: float = 1.0

    def drift(self, t, x, mu):
        return -self.kappa * (x - mu.mean())

    def diffusion(self, t, x, mu):
        return 0.3

    def initial(self):
        return mfsde.EmpiricalMeasure(torch.tensor([[0.0], [1.0], [4.0]]), torch.tensor([0.5, 0.25, 0.25]))


def position(scenario: Any, **changes: Any) -> np.ndarray:
    """The saved positions of a run, (time, replica, particle, component)."""
    return mfsde.simulate(scenario, **{**SMALL, **changes})["position"].values


# What `largest` calls with each time at which it is asked. Outside the function: what an observable closes over is part
# of what it is, and a run is resumed with the same observables only.
GUARD: list[Callable[[float], None]] = []


@pytest.fixture(autouse=True)
def no_guard() -> Iterator[None]:
    yield
    GUARD.clear()


def largest(name: str = "largest") -> mfsde.Observable:
    """max |X| over the particles, (R,)."""

    def function(t, x, mu):
        for guard in GUARD:
            guard(t)
        return x.abs().amax((-2, -1))

    return mfsde.Observable(name, function, units="m", long_name="largest distance")


# Bit for bit


@pytest.mark.parametrize("method", ["euler", "milstein", "srk", "heun", "midpoint", "euler_heun"])
@pytest.mark.parametrize("dim", [1, 3])
def test_the_first_20_particles_are_those_of_a_smaller_system(method, dim):
    case = Independent(dim=dim)
    few, many = (position(case, n_particles=n, n_replicas=2, method=method, save_every=1) for n in (20, 50))
    assert np.array_equal(few, many[:, :, :20])


@pytest.mark.parametrize("method", ["euler", "srk", "heun"])
@pytest.mark.parametrize("n", [3, 300, 5000])
@pytest.mark.parametrize("dim", [1, 3])
def test_the_first_2_replicas_are_those_of_a_smaller_batch(dim, n, method):
    # The particles are coupled through their mean: its rounding must not depend on the batch.
    ou = MeanFieldOU(initial_mean=(1.0,) * dim)
    one, two, five = (position(ou, n_particles=n, n_replicas=r, horizon=0.3, method=method) for r in (1, 2, 5))
    assert np.array_equal(two, five[:, :2])
    assert np.array_equal(one, five[:, :1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["euler", "srk", "heun"])
@pytest.mark.parametrize("dim", [1, 3])
def test_two_threads_give_the_numbers_of_one(dim, method, dtype):
    ou = MeanFieldOU(initial_mean=(1.0,) * dim)
    runs = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)  # the fixture of conftest restores it
        for n_replicas in (1, 3):
            run = mfsde.simulate(
                ou, n_particles=20_000, n_replicas=n_replicas, horizon=0.3, dt=0.1, seed=1, dtype=dtype, method=method
            )
            assert run.attrs["threads"] == threads
            runs[threads, n_replicas] = run["position"].values
    assert np.array_equal(runs[1, 1], runs[2, 1])
    assert np.array_equal(runs[1, 3], runs[2, 3])
    assert np.array_equal(runs[1, 1], runs[2, 3][:, :1])


def test_seeds_replicas_and_particles_differ():
    a, b = (position(OU, n_replicas=2, save_every=1, seed=seed) for seed in (0, 2**32))
    assert not np.isclose(a, b).any()
    assert not np.isclose(a[:, 0], a[:, 1]).any()
    assert not np.isclose(a[:, :, 0], a[:, :, 1]).any()


N_STEPS = 23
ALL_STEPS = mfsde.simulate(OU, n_particles=6, n_replicas=2, horizon=2.3, dt=0.1, seed=4, save_every=1)
ALL_MEANS = mfsde.simulate(
    OU, n_particles=6, n_replicas=2, horizon=2.3, dt=0.1, seed=4, save_every=1, observables=["mean", "covariance"]
)


@given(
    save_every=st.none() | st.integers(1, N_STEPS + 2),
    keep=st.none() | st.integers(0, 8),
    checkpoint_every=st.none() | st.integers(1, N_STEPS + 2),
    names=st.lists(st.sampled_from(["mean", "covariance"]), unique=True),
    on_disk=st.booleans(),
)
@settings(max_examples=60)
def test_what_is_saved_changes_nothing(save_every, keep, checkpoint_every, names, on_disk):
    expected = sorted({0, N_STEPS, *(range(0, N_STEPS, save_every) if save_every else ())})
    with tempfile.TemporaryDirectory() as folder:
        run = mfsde.simulate(
            OU, n_particles=6, n_replicas=2, horizon=2.3, dt=0.1, seed=4, save_every=save_every, keep_particles=keep,
            checkpoint_every=checkpoint_every, observables=names, store=f"{folder}/run.zarr" if on_disk else None,
        ).load()  # fmt: skip
    assert np.array_equal(run.time, ALL_STEPS.time[expected])
    assert list(run.data_vars) == (["position"] if keep != 0 else []) + names
    if keep != 0:
        assert np.array_equal(run.position, ALL_STEPS.position[expected, :, :keep])
    for name in names:
        assert np.array_equal(run[name], ALL_MEANS[name][expected])


@pytest.mark.parametrize("method", ["milstein", "srk", "heun", "midpoint", "euler_heun"])
def test_saving_changes_nothing_under_other_schemes(method):
    every = position(Independent(), save_every=1, method=method)
    assert np.array_equal(position(Independent(), save_every=4, method=method), every[[0, 4, 8, 10]])


def test_a_bar_of_progress_changes_nothing_and_is_told_on_stderr(capsys):
    assert np.array_equal(position(OU, progress=True), position(OU))
    captured = capsys.readouterr()
    assert "MeanFieldOU: step 10 of 10" in captured.err
    assert captured.out == ""


# The dataset


def test_times_are_labelled_by_equal_numbers():
    times = mfsde.simulate(OU, save_every=1, **SMALL).time
    assert times.values.tolist() == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert 3 * 0.1 != 0.3
    coarse = mfsde.simulate(OU, save_every=1, **{**SMALL, "dt": 0.5}).time
    assert set(coarse.values) < set(times.values)
    assert times.attrs["units"]


def test_step_0_and_the_last_are_always_saved():
    assert mfsde.simulate(OU, **SMALL).time.values.tolist() == [0.0, 1.0]
    assert mfsde.simulate(OU, save_every=4, **SMALL).time.values.tolist() == [0.0, 0.4, 0.8, 1.0]
    assert mfsde.simulate(OU, save_every=99, **SMALL).time.values.tolist() == [0.0, 1.0]


@pytest.fixture(params=["memory", "store"])
def run(request, tmp_path) -> xr.Dataset:
    return mfsde.simulate(
        MeanFieldOU(initial_mean=(1.0, 0.0)), n_particles=7, horizon=1, dt=0.25, seed=2**63 + 1, n_replicas=3,
        observables=["mean", "covariance", largest()], keep_particles=4, noise=Noise(2**63 + 1, substeps=2),
        save_every=2, store=tmp_path / "run.zarr" if request.param == "store" else None,
    )  # fmt: skip


def test_the_dataset_is_labelled(run):
    assert run.position.dims == ("time", "replica", "particle", "component")
    assert run["mean"].dims == ("time", "replica", "component")
    assert run.covariance.dims[:2] == ("time", "replica")
    assert run.largest.dims == ("time", "replica")
    assert dict(run.sizes) | {"component_2": 2} == {
        "time": 3,
        "replica": 3,
        "particle": 4,
        "component": 2,
        "component_2": 2,
    }
    for name in ("replica", "particle", "component"):
        assert run[name].values.tolist() == list(range(run.sizes[name]))
    assert all({"long_name", "units"} <= set(run[name].attrs) for name in run.variables)
    assert (run.largest.attrs["units"], run.largest.attrs["long_name"]) == ("m", "largest distance")
    assert run.position.dtype == run["mean"].dtype == np.float32


def test_fields_and_settings_are_scalar_coordinates(run):
    found = {name: run[name].item() for name in run.coords if run[name].ndim == 0}
    assert found == {
        "kappa": 1.0, "coupling": 0.5, "sigma": 0.7, "initial_variance": 1.0, "n_particles": 7, "dt": 0.25,
        "seed": 2**63 + 1,
    }  # fmt: skip


def test_the_attributes_say_where_the_run_came_from(run):
    attrs = run.attrs
    assert attrs["scenario"] == "MeanFieldOU"
    assert attrs["scenario_path"] == "mfsde.scenarios.mean_field_ou:MeanFieldOU"
    assert json.loads(attrs["parameters"])["kappa"] == 1.0
    assert json.loads(attrs["settings"]) == {
        "n_particles": 7, "horizon": 1.0, "dt": 0.25, "seed": 2**63 + 1, "n_replicas": 3, "save_every": 2,
        "keep_particles": 4, "method": "euler", "device": "cpu", "dtype": "float32", "substeps": 2,
        "checkpoint_every": None,
    }  # fmt: skip
    noise = json.loads(attrs["noise"])
    assert (noise["seed"], noise["substeps"], noise["version"]) == (2**63 + 1, 2, 1)
    assert (attrs["method"], attrs["dtype"], attrs["device"], attrs["threads"]) == ("euler", "float32", "cpu", 1)
    assert {"mfsde", "torch", "torchsde", "numpy", "POT", "xarray", "git_commit"} <= set(json.loads(attrs["versions"]))
    assert attrs["status"] == "complete"
    assert attrs["start"] <= attrs["end"]


def test_observables_see_all_particles_and_positions_only_those_kept(run):
    everything = mfsde.simulate(
        MeanFieldOU(initial_mean=(1.0, 0.0)), n_particles=7, horizon=1, dt=0.25, seed=2**63 + 1, n_replicas=3,
        noise=Noise(2**63 + 1, substeps=2), save_every=2,
    )  # fmt: skip
    x = everything.position.values.astype(np.float64)
    assert np.array_equal(run.position, everything.position[:, :, :4])
    np.testing.assert_allclose(run["mean"], x.mean(2), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(run.largest, np.abs(x).max((2, 3)), rtol=1e-6)
    centred = x - x.mean(2, keepdims=True)
    np.testing.assert_allclose(run.covariance, np.einsum("trni,trnj->trij", centred, centred) / 7, rtol=1e-5, atol=1e-6)


def test_keeping_no_particles_leaves_the_observables():
    run = mfsde.simulate(OU, keep_particles=0, observables="mean", **SMALL)
    assert list(run.data_vars) == ["mean"]
    assert "particle" not in run.sizes
    assert mfsde.simulate(OU, keep_particles=99, **SMALL).sizes["particle"] == 5


def test_runs_are_single_precision_unless_asked():
    assert position(OU).dtype == np.float32
    assert position(OU, dtype=torch.float64).dtype == np.float64


def test_a_weighted_measure_starts_a_weighted_run():
    run = mfsde.simulate(
        Weighted(), n_particles=3, horizon=1.0, dt=0.1, seed=0, n_replicas=2, observables=["mean"], keep_particles=2
    )
    assert run.weight.dims == ("time", "replica", "particle")
    assert np.array_equal(run.weight, np.broadcast_to([0.5, 0.25], (2, 2, 2)))
    assert np.array_equal(run.position[0, ..., 0], np.broadcast_to([0.0, 1.0], (2, 2)))
    assert np.array_equal(run["mean"][0, :, 0], [1.25, 1.25])
    whole = mfsde.simulate(Weighted(), n_particles=3, horizon=1.0, dt=0.1, seed=0, n_replicas=2, observables=["mean"])
    np.testing.assert_allclose((whole.position * whole.weight).sum("particle"), whole["mean"], rtol=1e-5)
    assert "weight" not in mfsde.simulate(OU, **SMALL)


def test_a_measure_with_a_replica_axis_starts_each_replica_where_it_says():
    @dataclass(frozen=True)
    class Here(Independent):
        points: Tensor = None  # type: ignore[assignment]

        def initial(self):
            return mfsde.EmpiricalMeasure(self.points)

    points = torch.arange(6.0).reshape(2, 3, 1)
    run = {"n_particles": 3, "horizon": 0.1, "dt": 0.1, "seed": 0, "n_replicas": 2}
    assert np.array_equal(position(Here(points=points), **run)[0], points)
    assert np.array_equal(position(Here(points=points[0]), **run)[0], points[:1].expand(2, 3, 1))
    assert np.array_equal(points, torch.arange(6.0).reshape(2, 3, 1))


def test_equal_seeds_start_different_equations_from_the_same_points():
    assert np.array_equal(position(OU)[0], position(replace(OU, sigma=2.0, kappa=0.1))[0])


def test_a_decoupled_run_keeps_the_parameters_and_its_name():
    run = mfsde.simulate(mfsde.decoupled(OU, OU.limit), **SMALL)
    assert run.attrs["scenario"] == "decoupled(MeanFieldOU)"
    assert run.sigma == 0.7
    assert np.array_equal(run.position[0], position(OU)[0])
    assert not np.array_equal(run.position[-1], position(OU)[-1])


def test_a_store_read_meanwhile_shows_a_prefix(tmp_path):
    store, seen = tmp_path / "run.zarr", []

    def read(t: float) -> None:
        if t > 0:
            seen.append(mfsde.open_run(store).load())

    GUARD[:] = [read]
    run = mfsde.simulate(OU, save_every=1, observables=[largest()], store=store, **SMALL).load()
    assert len(seen) == 10
    for partial in seen:
        assert partial.attrs["status"] == "running"
        n = partial.sizes["time"]
        assert np.array_equal(partial.time, run.time[:n])
        assert np.array_equal(partial.position, run.position[:n])


def test_a_store_and_memory_hold_the_same_dataset(tmp_path):
    both = {"save_every": 3, "observables": ["mean"], **SMALL}
    memory, disk = mfsde.simulate(OU, **both), mfsde.simulate(OU, store=tmp_path / "run.zarr", **both)
    told = [{k: v for k, v in run.attrs.items() if k not in ("start", "end")} for run in (memory, disk)]
    assert told[0] == told[1]
    xr.testing.assert_identical(memory.drop_attrs(deep=False), disk.load().drop_attrs(deep=False))
    assert memory.position.attrs == disk.position.attrs


def test_an_existing_store_is_overwritten_only_when_asked(tmp_path):
    store = tmp_path / "run.zarr"
    mfsde.simulate(OU, store=store, **SMALL)
    with pytest.raises(FileExistsError):
        mfsde.simulate(replace(OU, sigma=2.0), store=store, **SMALL)
    assert mfsde.open_run(store).sigma == 0.7
    assert mfsde.simulate(replace(OU, sigma=2.0), store=store, overwrite=True, **SMALL).sigma == 2.0


# What is refused at the door


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dt": 0.3}, ValueError, "horizon = 1.0 is not a whole number of steps dt = 0.3. The nearest horizons are 0.9 "
         "and 1.2; or take dt = 0.333333333333."),
        ({"dt": 1.3}, ValueError, "The nearest horizons are 1.3; or take dt = 1.0."),
        ({"dt": 0.1 * (1 + 1e-8)}, ValueError, "is not a whole number of steps"),
        ({"dt": -0.1}, ValueError, "dt = -0.1; expected a positive, finite number of time units."),
        ({"dt": 0}, ValueError, "dt = 0.0; expected a positive"),
        ({"dt": math.nan}, ValueError, "dt = nan; expected a positive"),
        ({"horizon": math.inf}, ValueError, "horizon = inf; expected a positive"),
        ({"horizon": "1"}, TypeError, "horizon = '1' is a str; expected a positive number."),
        ({"dt": True}, TypeError, "dt = True is a bool; expected a positive number."),
        ({"n_particles": 0}, ValueError, "n_particles = 0; expected a whole number >= 1."),
        ({"n_particles": -3}, ValueError, "n_particles = -3; expected a whole number >= 1."),
        ({"n_particles": 5.0}, TypeError, "n_particles = 5.0 is a float; expected a whole number >= 1."),
        ({"n_particles": True}, TypeError, "n_particles = True; expected a whole number >= 1."),
        ({"n_replicas": 0}, ValueError, "n_replicas = 0; expected a whole number >= 1."),
        ({"save_every": 0}, ValueError, "save_every = 0; expected a whole number >= 1."),
        ({"save_every": 0.5}, TypeError, "save_every = 0.5 is a float; expected a whole number >= 1."),
        ({"checkpoint_every": -1}, ValueError, "checkpoint_every = -1; expected a whole number >= 1."),
        ({"keep_particles": -1}, ValueError, "keep_particles = -1; expected a whole number >= 0."),
        ({"keep_particles": False}, TypeError, "keep_particles = False; expected a whole number >= 0."),
        ({"seed": -1}, ValueError, "seed = -1; expected a whole number >= 0."),
        ({"seed": None}, TypeError, "seed = None is a NoneType; expected a whole number >= 0."),
        ({"seed": 2**64}, ValueError, "2**64"),
        ({"noise": Noise(1)}, ValueError, "seed = 0 contradicts noise.seed = 1; the run's randomness has one key. Pass "
         "seed=1, or build the noise with Noise(0, substeps=1)."),
        ({"noise": 3}, TypeError, "noise = 3; expected mfsde.Noise(seed, substeps=k) or None."),
        ({"dtype": torch.float16}, TypeError, "dtype = torch.float16; expected torch.float32 or torch.float64."),
        ({"dtype": "float32"}, TypeError, "dtype = 'float32'; expected torch.float32 or torch.float64."),
        ({"device": "abacus"}, ValueError, "device = 'abacus' is no torch device; expected 'cpu', 'cuda' or 'cuda:1'."),
        ({"method": "rk4"}, ValueError, "unknown method 'rk4'; expected one of euler, milstein, srk, heun, midpoint, "
         "euler_heun"),
        ({"horizon": 2.0**32, "dt": 1.0}, ValueError, "horizon/dt times substeps = 4294967296 exceeds the noise's "
         "counters; it must be below 2^32."),
        ({"horizon": 2.0**31, "dt": 1.0, "noise": Noise(0, substeps=2)}, ValueError, "must be below 2^32."),
        ({"n_replicas": 3, "noise": Noise(0, antithetic=True)}, ValueError, "n_replicas = 3 with antithetic noise, "
         "whose replicas 2j and 2j + 1 are a pair; expected an even number, for instance 4."),
        ({"n_replicas": 2**32}, ValueError, "n_replicas = 4294967296 exceeds the noise's counters; it must be below "
         "2^32."),
        ({"n_particles": 2**34}, ValueError, "n_particles = 17179869184 exceeds the noise's counters; it must be below "
         "2^34."),
        ({"observables": "entorpy"}, ValueError, "unknown name 'entorpy'"),
        ({"timestep": 0.1}, TypeError, "unexpected keyword argument 'timestep'"),
        ({"adaptive": True}, TypeError, "unexpected keyword argument 'adaptive'"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(changes, error, message, tmp_path):
    with pytest.raises(error, match=re.escape(message)):
        mfsde.simulate(OU, store=tmp_path / "run.zarr", **{**SMALL, **changes})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["n_particles", "horizon", "dt", "seed"])
def test_what_changes_the_result_has_no_default(name):
    with pytest.raises(TypeError, match=f"missing 1 required keyword-only argument: '{name}'"):
        mfsde.simulate(OU, **{k: v for k, v in SMALL.items() if k != name})


def test_mixed_precision_is_recorded_and_resumed_and_changes_no_ordinary_digest(tmp_path):
    settings = {"n_particles": 20, "horizon": 1.0, "dt": 0.1, "seed": 3, "dtype": torch.float64}
    mixed = mfsde.Noise(3, precision=torch.float32)
    run = mfsde.simulate(OU, **settings, noise=mixed, store=tmp_path / "run.zarr", checkpoint_every=4)
    assert json.loads(run.attrs["noise"])["precision"] == json.loads(run.attrs["settings"])["precision"] == "float32"
    assert mfsde.resume(tmp_path / "run.zarr", scenario=OU).equals(run)
    ordinary = mfsde.simulate(OU, **settings)
    assert "precision" not in ordinary.attrs["settings"] + ordinary.attrs["noise"]
    assert ordinary.attrs["digest"] != run.attrs["digest"]
    difference = abs(ordinary.position - run.position)
    assert difference.max() < 1e-6
    assert difference.isel(time=-1).min() > 0
    with pytest.raises(ValueError, match=r"precision=torch.float64, and the state is in float32"):
        mfsde.simulate(OU, **{**settings, "dtype": torch.float32}, noise=mfsde.Noise(3, precision=torch.float64))


def test_antithetic_noise_is_recorded_and_resumed_and_changes_no_ordinary_digest(tmp_path):
    mirrored = {**SMALL, "n_replicas": 4, "noise": Noise(SMALL["seed"], antithetic=True)}
    run = mfsde.simulate(OU, store=tmp_path / "run.zarr", **mirrored)
    assert json.loads(run.attrs["settings"])["antithetic"] is True
    assert "antithetic" not in json.loads(mfsde.simulate(OU, **SMALL).attrs["settings"])
    assert mfsde.resume(tmp_path / "run.zarr", scenario=OU).equals(run)


def test_settings_are_keyword_only():
    with pytest.raises(TypeError, match="takes 1 positional argument"):
        mfsde.simulate(OU, 5, horizon=1.0, dt=0.1, seed=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal is that of a machine without CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda")])
def test_cuda_is_refused_where_there_is_none(device):
    with pytest.raises(ValueError, match=r"sees no CUDA device. Use device='cpu', or install a CUDA build of torch"):
        mfsde.simulate(OU, device=device, **SMALL)


def test_numbers_of_numpy_are_numbers():
    expected = position(OU, n_replicas=2)
    found = position(
        OU,
        n_particles=np.int64(5),
        horizon=np.float64(1),
        dt=np.float64(0.1),
        seed=np.uint64(0),
        n_replicas=np.int32(2),
    )
    assert np.array_equal(found, expected)
    assert np.array_equal(position(OU, n_replicas=2, noise=Noise(0)), expected)
    # 10 steps of 0.1 are 1 up to rounding, and so are 3 of 0.1 and 0.3.
    assert mfsde.simulate(OU, **{**SMALL, "horizon": 0.3}).time.values[-1] == 0.3


def starting_from(start: Any, **changes: Any) -> None:
    @dataclass(frozen=True)
    class Started(Independent):
        def initial(self):
            return start

    mfsde.simulate(Started(), **{**SMALL, **changes})


def test_an_initial_law_of_the_wrong_kind_is_refused():
    with pytest.raises(TypeError, match=r"Started.initial\(\) returned a Tensor; expected a law \(mfsde.Gaussian"):
        starting_from(torch.zeros(5, 1))
    with pytest.raises(TypeError, match=r"Started.initial\(\) returned a NoneType; expected a law"):
        starting_from(None)
    with pytest.raises(ValueError, match=r"a measure of 4 particles but n_particles = 5; pass n_particles=4"):
        starting_from(mfsde.EmpiricalMeasure(torch.zeros(4, 1)))


def test_a_start_that_is_not_finite_is_refused():
    points = torch.zeros(2, 5, 1)
    points[1, 3] = math.nan
    message = r"Started.initial\(\) gave a value that is not finite at replica 1, particle 3.*\(float32\)"
    with pytest.raises(ValueError, match=message):
        starting_from(mfsde.EmpiricalMeasure(points), n_replicas=2)
    # 1e39 is a number in float64 only.
    with pytest.raises(ValueError, match=r"not finite at replica 0, particle 0; a run starts .* \(float32\)"):
        starting_from(mfsde.Dirac([1e39]))
    starting_from(mfsde.Dirac([1e39]), dtype=torch.float64)


def test_an_observable_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(TypeError, match="observable 'number' returned a float"):
        mfsde.simulate(
            OU, observables=[mfsde.Observable("number", lambda t, x, mu: 1.0)], store=tmp_path / "a.zarr", **SMALL
        )
    assert not list(tmp_path.iterdir())


# Runs that end early


@dataclass(frozen=True)
class Exploding:
    """x' = x³ from 30 at particle 3: infinite after a few steps."""

    def drift(self, t, x, mu):
        return x**3

    def diffusion(self, t, x, mu):
        return 0.0

    def initial(self):
        return mfsde.EmpiricalMeasure(torch.tensor([[0.1], [0.2], [0.0], [30.0], [-0.1]]))


def test_a_blow_up_keeps_what_was_committed_and_marks_the_store(tmp_path):
    store = tmp_path / "run.zarr"
    with pytest.raises(mfsde.BlowUp) as caught:
        mfsde.simulate(Exploding(), store=store, save_every=1, checkpoint_every=2, **SMALL)
    assert (caught.value.replica, caught.value.particle) == (0, 3)
    kept = mfsde.open_run(store).load()
    assert kept.attrs["status"] == "failed"
    assert kept.attrs["error"] == f"BlowUp: {caught.value}"
    x, h = torch.tensor([0.1, 0.2, 0.0, 30.0, -0.1]), 0.1
    steps = 0
    while bool(torch.isfinite(x).all()):
        np.testing.assert_allclose(kept.position[steps, 0, :, 0], x, rtol=1e-4)
        x, steps = x + h * x**3, steps + 1
    assert steps == caught.value.step == kept.sizes["time"]
    assert 2 < steps < 10


class Stop(Exception):
    pass


def stops_at(time: float, armed: list[bool], action: Callable[[], None]) -> mfsde.Observable:
    """An observable that acts once, when it first sees `time`."""

    def guard(t: float) -> None:
        if armed and t >= time - 1e-9:
            armed.clear()
            action()

    GUARD[:] = [guard]
    return largest()


def raise_stop() -> None:
    raise Stop("midway")


def array_files(store: Path) -> dict[str, bytes]:
    """Every chunk of every array of a store."""
    return {
        str(file.relative_to(store)): file.read_bytes()
        for folder in store.glob("*/c")
        for file in folder.rglob("*")
        if file.is_file()
    } | {str(file.relative_to(store)): file.read_bytes() for file in store.glob("*/c") if file.is_file()}


def same_numbers(a: Path, b: Path) -> bool:
    one, other = mfsde.open_run(a).load(), mfsde.open_run(b).load()
    return one.drop_attrs(deep=False).identical(other.drop_attrs(deep=False)) and array_files(a) == array_files(b)


@pytest.mark.parametrize(
    ("save_every", "checkpoint_every", "time"),
    [(1, 1, 0.5), (3, 4, 0.9), (4, 3, 0.8), (2, None, 0.6), (1, 7, 1.0), (5, 2, 0.5), (1, 1, 0.1), (None, 3, 1.0)],
)
def test_a_run_that_an_exception_ended_is_resumed_to_the_bit(save_every, checkpoint_every, time, tmp_path):
    settings = {"save_every": save_every, "checkpoint_every": checkpoint_every, "n_replicas": 2, **SMALL}
    whole, broken, armed = tmp_path / "whole.zarr", tmp_path / "broken.zarr", [True]
    mfsde.simulate(OU, store=whole, observables=["mean", largest()], **settings)
    with pytest.raises(Stop):
        mfsde.simulate(OU, store=broken, observables=["mean", stops_at(time, armed, raise_stop)], **settings)
    left = mfsde.open_run(broken)
    assert left.attrs["status"] == "failed"
    assert left.attrs["error"] == "Stop: midway"
    assert left.time.values.tolist() == [t for t in mfsde.open_run(whole).time.values if t < time - 1e-9]
    # The last state that was checkpointed before the frame that failed.
    frame = next(step for step in [*range(0, 10, save_every or 10), 10] if step >= 10 * time - 1e-9)
    assert load_checkpoint(broken).step == max(range(0, frame, checkpoint_every or 10))
    observables = ["mean", stops_at(time, armed, raise_stop)]
    resumed = mfsde.resume(broken, observables=observables)
    assert resumed.attrs["status"] == "complete"
    assert same_numbers(whole, broken)


@pytest.mark.parametrize("method", ["milstein", "srk", "heun"])
def test_other_schemes_and_the_scenarios_own_observables_are_resumed_to_the_bit(method, tmp_path):
    armed: list[bool] = []

    @dataclass(frozen=True)
    class Observed(Independent):
        def observables(self):
            return (stops_at(0.7, armed, raise_stop),)

    settings = {"save_every": 2, "checkpoint_every": 3, "method": method, "noise": Noise(0, substeps=2), **SMALL}
    whole, broken = tmp_path / "whole.zarr", tmp_path / "broken.zarr"
    mfsde.simulate(Observed(), store=whole, **settings)
    armed.append(True)
    with pytest.raises(Stop):
        mfsde.simulate(Observed(), store=broken, **settings)
    # Defined in a function: it cannot be imported again.
    with pytest.raises(TypeError, match=r"Observed was not defined in a module .*; pass it: mfsde.resume\(.*scenario="):
        mfsde.resume(broken)
    mfsde.resume(broken, scenario=Observed())
    assert same_numbers(whole, broken)


def test_ctrl_c_is_answered_between_two_steps_and_resumed_to_the_bit(tmp_path):
    whole, broken, before = tmp_path / "whole.zarr", tmp_path / "broken.zarr", signal.getsignal(signal.SIGINT)
    settings = {"save_every": 2, "n_replicas": 2, **SMALL}
    mfsde.simulate(OU, store=whole, observables=[largest()], **settings)
    interrupt = stops_at(0.4, [True], lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(
        KeyboardInterrupt, match=r"was interrupted at step (4|5) of 10; it can go on from there: mfsde.re"
    ):
        mfsde.simulate(OU, store=broken, observables=[interrupt], **settings)
    assert signal.getsignal(signal.SIGINT) is before
    assert mfsde.open_run(broken).attrs["status"] == "interrupted"
    assert load_checkpoint(broken).step in (4, 5)
    mfsde.resume(broken, observables=[largest()])
    assert same_numbers(whole, broken)


def test_ctrl_c_in_memory_says_what_would_have_helped():
    interrupt = stops_at(0.4, [True], lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt, match=r"frames were in memory only. With store='run.zarr'"):
        mfsde.simulate(OU, observables=[interrupt], save_every=2, **SMALL)


@pytest.fixture
def interrupted(tmp_path) -> Path:
    """The store of an OU run that ended at step 5."""
    store = tmp_path / "run.zarr"
    with pytest.raises(Stop):
        mfsde.simulate(
            OU, store=store, save_every=1, checkpoint_every=1, observables=[stops_at(0.5, [True], raise_stop)], **SMALL
        )
    return store


def test_resume_needs_the_observables_that_are_functions(interrupted):
    with pytest.raises(TypeError, match=r"records observable largest, whose function is not stored; pass it"):
        mfsde.resume(interrupted)
    with pytest.raises(ValueError, match="is a store of another run: its observables"):
        mfsde.resume(interrupted, observables=[largest("other")])
    with pytest.raises(ValueError, match="is a store of another run: its observables"):
        mfsde.resume(interrupted, observables=[])
    assert mfsde.resume(interrupted, observables=[largest()]).attrs["status"] == "complete"


def test_resume_refuses_another_function_under_the_name_of_an_observable(interrupted):
    smallest = mfsde.Observable("largest", lambda t, x, mu: x.abs().amin((-2, -1)), "m", "largest distance")
    with pytest.raises(ValueError, match="is a store of another run"):
        mfsde.resume(interrupted, observables=[smallest])


def test_resume_refuses_other_parameters_another_scenario_and_another_source(interrupted):
    with pytest.raises(ValueError, match=r"its parameters differ \(sigma: 0.7 then, 0.8 now\)"):
        mfsde.resume(interrupted, scenario=replace(OU, sigma=0.8), observables=[largest()])
    with pytest.raises(ValueError, match="it holds a run of MeanFieldOU, not of Independent"):
        mfsde.resume(interrupted, scenario=Independent(), observables=[largest()])

    @dataclass(frozen=True)
    class Other(MeanFieldOU):
        def drift(self, t, x, mu):
            return x

    Other.__name__ = Other.__qualname__ = "MeanFieldOU"
    with pytest.raises(ValueError, match="the source of MeanFieldOU has changed since the run began"):
        mfsde.resume(interrupted, scenario=Other(), observables=[largest()])
    # None of these has touched it.
    assert mfsde.open_run(interrupted).sizes["time"] == 5
    assert mfsde.resume(interrupted, scenario=OU, observables=[largest()]).sizes["time"] == 11


def test_resume_refuses_a_scenario_file_that_was_edited_meanwhile(tmp_path):
    file, store = tmp_path / "pull.py", tmp_path / "run.zarr"
    source = """
from dataclasses import dataclass
import mfsde

@dataclass(frozen=True)
class Pull:
    kappa: float = 1.0
    def drift(self, t, x, mu): return -self.kappa * x
    def diffusion(self, t, x, mu): return 0.5
    def initial(self): return mfsde.Dirac([1.0])
"""
    file.write_text(source)
    module = load_file(file)
    with pytest.raises(Stop):
        mfsde.simulate(module.Pull(), store=store, observables=[stops_at(1.0, [True], raise_stop)], **SMALL)
    file.write_text(source.replace("-self.kappa * x", "-self.kappa * x**3"))
    del sys.modules[module.__name__]
    with pytest.raises(ValueError, match="the source of Pull has changed since the run began"):
        mfsde.resume(store, observables=[largest()])
    file.write_text("# A comment is no other source.\n" + source)
    sys.modules.pop(module.__name__, None)
    assert mfsde.resume(store, observables=[largest()]).attrs["status"] == "complete"


def test_resume_returns_a_complete_run_and_refuses_what_is_none(tmp_path):
    run = mfsde.simulate(OU, store=tmp_path / "run.zarr", **SMALL)
    xr.testing.assert_identical(mfsde.resume(tmp_path / "run.zarr"), run)
    with pytest.raises(ValueError, match=r"nothing.zarr"):
        mfsde.resume(tmp_path / "nothing.zarr")


def test_a_decoupled_run_is_resumed_to_the_bit(tmp_path):
    nonlinear, armed = mfsde.decoupled(OU, OU.limit), [True]
    whole, broken = tmp_path / "whole.zarr", tmp_path / "broken.zarr"
    settings = {"save_every": 2, "checkpoint_every": 3, **SMALL}
    mfsde.simulate(nonlinear, store=whole, observables=[largest()], **settings)
    with pytest.raises(Stop):
        mfsde.simulate(nonlinear, store=broken, observables=[stops_at(0.6, armed, raise_stop)], **settings)
    with pytest.raises(ValueError, match=r"it holds a run of decoupled\(MeanFieldOU\), not of MeanFieldOU"):
        mfsde.resume(broken, scenario=OU, observables=[largest()])
    mfsde.resume(broken, scenario=mfsde.decoupled(OU, OU.limit), observables=[largest()])
    assert same_numbers(whole, broken)


# Sweeps


def last_mean(run: xr.Dataset) -> xr.DataArray:
    return run["mean"].isel(time=-1, component=0)


def test_the_dimensions_of_a_sweep_are_what_was_swept():
    table = mfsde.sweep(
        OU, {"n_particles": [10, 20, 40], "sigma": [0.5, 1.0], "seed": range(4)}, reduce=last_mean, horizon=0.5, dt=0.1,
        n_replicas=2, observables=["mean"], keep_particles=0,
    )  # fmt: skip
    assert table["mean"].dims[:3] == ("n_particles", "sigma", "seed")
    assert dict(table.sizes) == {"n_particles": 3, "sigma": 2, "seed": 4, "replica": 2}
    assert table.n_particles.values.tolist() == [10, 20, 40]
    assert table.sigma.values.tolist() == [0.5, 1.0]
    assert table.seed.values.tolist() == [0, 1, 2, 3]
    assert (table.kappa, table.dt) == (1.0, 0.1)
    for n, sigma, seed in [(10, 1.0, 3), (40, 0.5, 0), (20, 1.0, 1)]:
        alone = mfsde.simulate(
            replace(OU, sigma=sigma), n_particles=n, horizon=0.5, dt=0.1, seed=seed, n_replicas=2, observables=["mean"]
        )
        found = table["mean"].sel(n_particles=n, sigma=sigma, seed=seed)
        assert np.array_equal(found, last_mean(alone))


def test_whole_runs_are_joined_where_they_fit():
    table = mfsde.sweep(OU, {"sigma": [0.5, 1.0]}, save_every=5, **SMALL)
    assert table.position.dims == ("sigma", "time", "replica", "particle", "component")
    assert np.array_equal(table.position.sel(sigma=0.5), position(replace(OU, sigma=0.5), save_every=5))
    assert table.attrs["scenario"] == "MeanFieldOU"
    assert "digest" not in table.attrs


def test_methods_and_step_sizes_can_be_swept():
    table = mfsde.sweep(
        OU, {"method": ["euler", "heun"], "dt": [0.5, 0.25]}, n_particles=5, horizon=1.0, seed=0, dtype=torch.float64
    )
    assert table.position.dims[:2] == ("method", "dt")
    alone = position(OU, method="heun", dt=0.25, dtype=torch.float64)
    assert np.array_equal(table.position.sel({"method": "heun", "dt": 0.25}), alone)


def test_runs_that_do_not_fit_together_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"sweep: the datasets do not fit together .* Pass reduce=f"):
        mfsde.sweep(OU, {"n_particles": [5, 6]}, horizon=1.0, dt=0.1, seed=0)


def test_a_decoupled_scenario_can_be_swept():
    nonlinear = mfsde.decoupled(OU, OU.limit)
    table = mfsde.sweep(nonlinear, {"seed": [0, 1]}, n_particles=5, horizon=1.0, dt=0.1)
    assert np.array_equal(table.position.sel(seed=0), position(nonlinear))


@pytest.mark.parametrize(
    ("over", "changes", "error", "message"),
    [
        ({"gamma": [1]}, {}, TypeError, "sweep: 'gamma' is neither a field of MeanFieldOU nor a setting that can be "
         "swept; expected one of "),
        ({"store": ["a"]}, {}, TypeError, "'store' is neither a field"),
        ({}, {}, ValueError, "sweep: over is empty; name at least one field or setting, or call simulate."),
        ({"sigma": []}, {}, ValueError, "sweep: the values of 'sigma' must be distinct and at least one; got []."),
        ({"sigma": [1.0, 1.0]}, {}, ValueError, "the values of 'sigma' must be distinct"),
        ({"dt": [0.1]}, {"dt": 0.1}, TypeError, "sweep: 'dt' is both swept and set; leave one out."),
        ({"sigma": [1.0]}, {"steps": 3}, TypeError, "sweep: unknown setting steps; expected one of n_particles, "),
        ({"sigma": [1.0]}, {"reduce": lambda run: 1.0}, TypeError, "sweep: reduce returned a float; expected an xarray "
         "Dataset or DataArray."),
    ],
)  # fmt: skip
def test_a_bad_sweep_is_refused(over, changes, error, message):
    settings = {k: v for k, v in SMALL.items() if k not in over} | changes
    with pytest.raises(error, match=re.escape(message)):
        mfsde.sweep(OU, over, **settings)


@pytest.fixture
def steps_taken(monkeypatch) -> list[str]:
    """A list that grows with each drift that is evaluated on behalf of a run."""
    calls: list[str] = []
    drift = MeanFieldOU.drift
    monkeypatch.setattr(MeanFieldOU, "drift", lambda *a: calls.append("drift") or drift(*a))
    return calls


def swept(folder: Path, scenario: Any = OU, **changes: Any) -> xr.Dataset:
    settings = {"n_particles": 5, "horizon": 1.0, "dt": 0.1, "save_every": 5, "checkpoint_every": 2, **changes}
    return mfsde.sweep(scenario, {"seed": [0, 1, 2]}, store=folder, **settings).load()


def test_a_sweep_with_a_folder_keeps_a_store_for_each_run_and_does_not_run_it_again(tmp_path, steps_taken):
    first = swept(tmp_path)
    stores = sorted(tmp_path.iterdir())
    assert len(stores) == 3
    assert [mfsde.open_run(store).seed for store in stores] == [0, 1, 2]
    done = len(steps_taken)
    assert done >= 30
    xr.testing.assert_identical(swept(tmp_path), first)
    # Each store is compared with what is asked: one drift at the door, and no step.
    assert len(steps_taken) == done + len(stores)
    assert np.array_equal(first.position, swept(tmp_path / "elsewhere").position)


def test_a_sweep_that_was_interrupted_goes_on_where_it_stopped(tmp_path, steps_taken):
    asked: list[float] = []

    def guard(t: float) -> None:
        asked.append(t)
        # The second run's last frame; each run is asked at the door and at 0, 0.5 and 1.
        if len(asked) == 8:
            raise Stop

    GUARD[:] = [guard]
    with pytest.raises(Stop):
        swept(tmp_path, observables=[largest()])
    GUARD.clear()
    assert sorted(mfsde.open_run(store).attrs["status"] for store in tmp_path.iterdir()) == ["complete", "failed"]
    steps_taken.clear()
    table = swept(tmp_path, observables=[largest()])
    # Third run: 10 steps, second: from step 8; and a few at the door.
    assert len(steps_taken) < 20
    assert np.array_equal(table.position, swept(tmp_path / "elsewhere", observables=[largest()]).position)


@pytest.mark.parametrize(
    "changes",
    [
        {"scenario": replace(OU, sigma=2.0)},
        {"scenario": Independent()},
        {"dt": 0.05},
        {"n_particles": 6},
        {"n_replicas": 2},
        {"save_every": 2},
        {"dtype": torch.float64},
        {"method": "heun"},
        {"observables": ["mean"]},
        {"horizon": 2.0},
    ],
    ids=str,
)
def test_a_sweep_refuses_stores_of_other_runs_unless_told_to_overwrite_them(changes, tmp_path):
    swept(tmp_path)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        swept(tmp_path, **changes)
    again = swept(tmp_path, overwrite=True, **changes)
    assert again.drop_attrs(deep=False).identical(swept(tmp_path / "elsewhere", **changes).drop_attrs(deep=False))


def test_a_sweep_refuses_stores_made_with_other_noise(tmp_path):
    def one(**changes: Any) -> xr.Dataset:
        return mfsde.sweep(OU, {"sigma": [0.5]}, store=tmp_path, **SMALL, **changes)

    one()
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        one(noise=Noise(0, substeps=2))


def test_a_sweep_refuses_stores_made_with_a_setting_that_is_now_left_out(tmp_path):
    mfsde.sweep(OU, {"sigma": [0.5]}, store=tmp_path, n_replicas=2, **SMALL)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        mfsde.sweep(OU, {"sigma": [0.5]}, store=tmp_path, **SMALL)


# Corners


@dataclass(frozen=True)
class OneFactor:
    """dX = X dt + X dW, one Brownian motion per particle, σ a view of the state."""

    view: bool = True

    def drift(self, t, x, mu):
        return x

    def diffusion(self, t, x, mu):
        return x[..., None] if self.view else x[..., None].clone()

    def initial(self):
        return mfsde.Dirac([1.0])


@pytest.mark.parametrize("method", ["euler", "heun", "midpoint", "euler_heun"])
def test_a_diffusion_that_is_a_view_of_the_state_is_read_before_the_state_moves(method):
    assert np.array_equal(position(OneFactor(True), method=method), position(OneFactor(False), method=method))


@dataclass(frozen=True)
class DrawnWeights:
    """Particles whose masses are drawn anew by every call of `initial`."""

    def drift(self, t, x, mu):
        return mu.mean() - x

    def diffusion(self, t, x, mu):
        return 0.5

    def initial(self):
        weights = torch.rand(5, dtype=torch.float64) + 0.1
        return mfsde.EmpiricalMeasure(torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None], weights / weights.sum())


def test_weights_are_resumed_with_the_state(tmp_path):
    store = tmp_path / "run.zarr"
    with pytest.raises(Stop):
        mfsde.simulate(
            DrawnWeights(), store=store, save_every=1, checkpoint_every=1,
            observables=[stops_at(0.5, [True], raise_stop)], **SMALL,
        )  # fmt: skip
    GUARD.clear()
    run = mfsde.resume(store, observables=[largest()])
    assert run.sizes["time"] == 11
    assert float(abs(run.weight - run.weight.isel(time=0)).max()) == 0


def scaled(factor: float) -> Callable[..., torch.Tensor]:
    return lambda t, x, mu: factor * x.mean((-2, -1))


def power(k: float, t: float, x: torch.Tensor, mu: Any) -> torch.Tensor:
    return x.abs().pow(k).mean((-2, -1))


@pytest.mark.parametrize(
    ("recorded", "other"), [(scaled(2.0), scaled(7.0)), (functools.partial(power, 2.0), functools.partial(power, 7.0))]
)
def test_an_observable_is_its_code_and_what_it_closes_over(recorded, other, tmp_path):
    store = tmp_path / "run.zarr"
    mfsde.simulate(OU, store=store, observables=[mfsde.Observable("m", recorded)], **SMALL)
    with pytest.raises(ValueError, match="is a store of another run: its observables"):
        mfsde.resume(store, observables=[mfsde.Observable("m", other)])
    assert mfsde.resume(store, observables=[mfsde.Observable("m", recorded)]).sizes["time"] == 2


def test_a_complete_store_is_not_returned_for_another_scenario(tmp_path):
    mfsde.simulate(OU, store=tmp_path / "run.zarr", **SMALL)
    with pytest.raises(ValueError, match="its parameters differ"):
        mfsde.resume(tmp_path / "run.zarr", scenario=replace(OU, sigma=3.0))


def test_a_run_killed_before_its_first_checkpoint_starts_at_the_beginning(tmp_path):
    whole, cut = tmp_path / "whole.zarr", tmp_path / "cut.zarr"
    mfsde.simulate(OU, store=whole, save_every=2, **SMALL)
    system = System.start(OU, Settings(**read_settings(whole)["settings"]), ())
    ZarrStore.create(cut, system.layout()).close("interrupted")
    mfsde.resume(cut)
    assert same_numbers(whole, cut)


def test_the_error_of_an_interrupted_run_does_not_outlive_its_completion(interrupted):
    assert "error" in mfsde.open_run(interrupted).attrs
    GUARD.clear()
    assert "error" not in mfsde.resume(interrupted, observables=[largest()]).attrs


def test_a_sweep_hands_the_same_observables_to_every_run():
    table = mfsde.sweep(OU, {"seed": [0, 1, 2]}, n_particles=5, horizon=1.0, dt=0.1, observables=(o for o in ["mean"]))
    assert np.isfinite(table["mean"].values).all()


def test_a_sweep_of_runs_with_different_variables_is_refused():
    def reduced(run: xr.Dataset) -> xr.Dataset:
        return xr.Dataset({f"m{int(run.seed)}": 1.0})

    with pytest.raises(ValueError, match=r"only some runs have the variables m0, m1"):
        mfsde.sweep(OU, {"seed": [0, 1]}, reduced, n_particles=5, horizon=1.0, dt=0.1)


def test_a_sweep_takes_numpy_axes_and_refuses_values_that_label_nothing():
    table = mfsde.sweep(OU, {"sigma": np.arange(1, 3)}, n_particles=5, horizon=1.0, dt=0.1, seed=0)
    assert table.sigma.values.tolist() == [1, 2]
    with pytest.raises(TypeError, match="cannot label an axis"):
        mfsde.sweep(OU, {"initial_mean": [(0.0,), (1.0,)]}, n_particles=5, horizon=1.0, dt=0.1, seed=0)
    with pytest.raises(ValueError, match="must be distinct"):
        mfsde.sweep(OU, {"sigma": [1, 1.0]}, n_particles=5, horizon=1.0, dt=0.1, seed=0)


def test_watching_may_not_change_what_is_watched():
    meddling = mfsde.Observable("meddling", lambda t, x, mu: x.add_(1.0).mean((-2, -1)))
    with pytest.raises(ValueError, match="observable 'meddling' changed x in place"):
        mfsde.simulate(OU, observables=[meddling], **SMALL)


@dataclass(frozen=True)
class LateDetached:
    """σ vanishes at t = 0 and hides its derivative afterwards."""

    def drift(self, t, x, mu):
        return torch.zeros_like(x)

    def diffusion(self, t, x, mu):
        return min(1.0, t) * x.detach()

    def initial(self):
        return mfsde.Dirac([1.0])


def test_schemes_are_probed_inside_the_run_too():
    with pytest.raises(ValueError, match=r"needs the derivative of LateDetached\.diffusion"):
        mfsde.simulate(LateDetached(), method="heun", **SMALL)


@dataclass(frozen=True)
class Factored:
    """A drift that fails by itself on infinities, some steps after the state has them."""

    def drift(self, t, x, mu):
        if not bool(torch.isfinite(x).all()):
            raise ArithmeticError("a decomposition did not converge")
        return x**3

    def diffusion(self, t, x, mu):
        return 0.0

    def initial(self):
        return mfsde.Dirac([3.0])


def test_a_failure_caused_by_a_blow_up_is_told_as_the_blow_up():
    with pytest.raises(mfsde.BlowUp, match="at step") as caught:
        mfsde.simulate(Factored(), n_particles=2, horizon=5.0, dt=0.1, seed=0)
    assert isinstance(caught.value.__cause__, ArithmeticError)
