"""Antithetic replicas: no error is computed as though they were independent, and every way out gives the right one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
import pytest
import xarray as xr

import mfsde
from mfsde.analysis import (
    chaos,
    contraction,
    control_variates,
    entropy,
    labels,
    overview,
    plots,
    rates,
    replicas,
    theory,
    wasserstein,
)
from mfsde.analysis.check import identity, inequality
from mfsde.scenarios import GaussianLangevin, MeanFieldOU

matplotlib.use("agg")

OU = MeanFieldOU(kappa=0.5, coupling=1.0, sigma=0.6, initial_mean=(2.0,), initial_variance=0.4)
LANGEVIN = GaussianLangevin()
SETTINGS: dict[str, Any] = {"horizon": 1.0, "dt": 0.05, "seed": 5, "n_replicas": 16, "save_every": 2}
WORDS = "replicas 2j and 2j + 1 have opposite noise"
REFUSED = (
    r"replicas 2j and 2j \+ 1 have opposite noise .*control_variates\.antithetic\(values\).*slice\(None, None, 2\)"
)


def of_euler(t: float) -> mfsde.Gaussian:
    """The law of Euler's scheme; the drift asks for its mean only."""
    return mfsde.Gaussian([2 * (1 - OU.kappa * SETTINGS["dt"]) ** round(t / SETTINGS["dt"])], OU.initial_variance)


def marked(run: xr.Dataset) -> xr.Dataset:
    """With the attribute that a run with antithetic noise has."""
    return run.assign_coords(replica=run["replica"].assign_attrs(antithetic=WORDS))


def bare(values: Any) -> Any:
    """Without it."""
    attrs = {k: v for k, v in values["replica"].attrs.items() if k != "antithetic"}
    return values.assign_coords(replica=values["replica"].drop_attrs().assign_attrs(attrs))


def simulated(scenario: Any, n: int = 40) -> xr.Dataset:
    noise = mfsde.Noise(SETTINGS["seed"], antithetic=True)
    return marked(mfsde.simulate(scenario, n_particles=n, noise=noise, **SETTINGS))


@pytest.fixture(scope="module")
def run() -> xr.Dataset:
    return simulated(OU)


@pytest.fixture(scope="module")
def copies() -> xr.Dataset:
    return simulated(mfsde.decoupled(OU, of_euler), n=80)


@pytest.fixture(scope="module")
def langevin() -> xr.Dataset:
    return simulated(LANGEVIN)


def test_errors_over_antithetic_replicas_are_wrong_and_those_over_pairs_are_not(run, copies):
    errors = chaos.squared_error(run, copies).isel(time=-1)
    # The model is linear: both of a pair have the error of one replica, and sixteen say as much as eight.
    assert errors.values[0::2] == pytest.approx(errors.values[1::2], rel=1e-3)
    naive = replicas.mean_and_error(bare(errors))
    right = replicas.mean_and_error(control_variates.pairs(errors))
    assert float(right) == pytest.approx(float(naive))
    assert float(right["stderr"]) == pytest.approx(math.sqrt(2 + 1 / 7) * float(naive["stderr"]), rel=1e-3)
    assert float(control_variates.antithetic(errors).stderr) == pytest.approx(float(right["stderr"]))
    one_of_each = replicas.mean_and_error(errors.isel(replica=slice(None, None, 2)))
    assert float(one_of_each["stderr"]) == pytest.approx(float(right["stderr"]), rel=1e-3)
    # A mean in which the noise is odd has an error of zero, and a naive one that is not.
    mean = run["position"].isel(component=0, time=-1).mean("particle")
    assert float(replicas.mean_and_error(bare(mean))["stderr"]) > 1e-3
    assert float(control_variates.antithetic(mean).stderr) < 1e-6


def phi(x: np.ndarray) -> np.ndarray:
    return np.square(x[..., 0])


def table(run: xr.Dataset, copies: xr.Dataset) -> xr.DataArray:
    runs = [run.isel(particle=slice(n)).assign_coords(n_particles=n) for n in (10, 20, 40)]
    return chaos.table(runs, copies, time=1.0)


# Everything that computes an error over replicas of (run, copies): from particles, and from values of replicas.
OF_PARTICLES: dict[str, Callable[..., Any]] = {
    "debiased": lambda run, copies: wasserstein.debiased(run, OU.limit),
    "debiased, reference": lambda run, copies: wasserstein.debiased(bare(run), copies.isel(particle=slice(40))),
    "between_replicas": lambda run, copies: wasserstein.between_replicas(run.isel(time=-1)),
    "coupling_error": lambda run, copies: chaos.coupling_error(run, copies),
    "sup_error": lambda run, copies: chaos.sup_error(run, copies),
    "uniform_error": lambda run, copies: chaos.uniform_error(run, copies),
    "weak_error": lambda run, copies: chaos.weak_error(run, copies, phi),
    "fluctuation": lambda run, copies: chaos.fluctuation(run, phi),
    "pooled entropy": lambda run, copies: entropy.differential(run.isel(time=-1), pooled=True),
}
OF_VALUES: dict[str, Callable[..., Any]] = {
    "mean": replicas.mean_and_error,
    "uniform_in_time": lambda values: chaos.uniform_in_time(values),
    "exponential": lambda values: rates.exponential(values.assign_attrs(power=2)),
    "identity": lambda values: identity("a", values.isel(time=-1), values.isel(time=-1) * 2),
    "inequality": lambda values: inequality("a", 1.0, values.isel(time=-1)),
    "log-Sobolev": lambda values: theory.log_sobolev(values.isel(time=-1), values.isel(time=-1), 1.0),
    "control": lambda values: control_variates.control_variate(
        values.isel(time=-1), values.isel(time=-2), float(values.isel(time=-2).mean())
    ),
    "series": lambda values: plots.series(values),
}


@pytest.mark.parametrize("name", OF_PARTICLES)
def test_no_error_is_computed_from_antithetic_particles(run, copies, name):
    with pytest.raises(ValueError, match=REFUSED):
        OF_PARTICLES[name](run, copies)
    # One of each pair is independent of the others, and so are replicas of ordinary noise.
    few = (data.isel(replica=slice(None, None, 2)) for data in (run, copies))
    for pair in (few, (bare(run), bare(copies))):
        OF_PARTICLES[name](*pair)


@pytest.mark.parametrize("name", OF_VALUES)
def test_no_error_is_computed_from_antithetic_values_and_pairs_are_a_way_out(run, copies, name):
    # Squares about the path without noise, whose pair means vary.
    squares = np.square(run["position"].isel(component=0)).mean("particle").rename("square").isel(time=slice(1, None))
    with pytest.raises(ValueError, match=r"square: " + REFUSED):
        OF_VALUES[name](squares)
    pairs = control_variates.pairs(squares)
    assert "antithetic" not in pairs["replica"].attrs
    for values in (pairs, bare(squares)):
        OF_VALUES[name](values)


def test_a_marked_control_is_refused_beside_values_that_are_not():
    rng = np.random.default_rng(0)
    y, c = (xr.DataArray(rng.normal(size=12), {"replica": np.arange(12)}, name="value") for _ in range(2))
    c_marked = c.assign_coords(replica=c["replica"].assign_attrs(antithetic=WORDS))
    with pytest.raises(ValueError, match=REFUSED):
        control_variates.control_variate(y, c_marked, 0.0)
    control_variates.control_variate(y, c, 0.0)


def test_theorems_do_not_take_antithetic_replicas(langevin):
    other = langevin.assign(position=langevin["position"] + 1)
    given = {"lipschitz": 1.0, "one_sided": 1.0, "sigma": 1.0}
    for check in (
        lambda run: theory.free_energy_dissipation(LANGEVIN, run),
        lambda run: theory.stationarity(LANGEVIN, run),
        lambda run: theory.entropy_sandwich(LANGEVIN, run.isel(time=-1), LANGEVIN.limit(2.0)),
        lambda run: contraction.stability(run, other if "antithetic" in run["replica"].attrs else bare(other), **given),
        lambda run: theory.inequality("a", theory.free_energy(LANGEVIN, run).isel(time=-1), 10.0),
    ):
        with pytest.raises(ValueError, match=REFUSED):
            check(langevin)
        check(bare(langevin))


def test_tables_of_antithetic_runs_have_powers_by_pairs(run, copies):
    errors = table(run, copies)
    with pytest.raises(ValueError, match=r"coupling_error: " + REFUSED):
        rates.power(errors)
    with pytest.raises(ValueError, match=REFUSED):
        plots.power(errors)
    by_pairs, naive = rates.power(control_variates.pairs(errors)), rates.power(bare(errors))
    assert by_pairs.value == pytest.approx(naive.value, abs=1e-3)
    assert by_pairs.stderr > 1.3 * naive.stderr


def test_distances_to_a_law_are_those_of_the_replicas_and_nothing_is_removed_across_them(run):
    found, plain = wasserstein.to_law(run, OU.limit), wasserstein.to_law(bare(run), OU.limit)
    np.testing.assert_array_equal(found, plain)
    assert "unbiased" in plain.coords
    assert "unbiased" not in found.coords
    with pytest.raises(ValueError, match=REFUSED):
        rates.exponential(found)
    whole = overview.overview(run, OU)
    assert whole.rate is None
    assert any("opposite noise" in note for note in whole.notes)


@pytest.mark.parametrize("keep", [True, False, "default"])
def test_the_mark_survives_functions_reductions_and_laziness(run, keep):
    with xr.set_options(keep_attrs=keep):
        position = run["position"]
        for values in (
            labels.apply(lambda x: x.mean((-2, -1)), position, input_core_dims=[["particle", "component"]]),
            labels.apply(lambda x, y: x + y, position, position.isel(time=0, drop=True)),
            theory.free_energy(LANGEVIN, run),
            wasserstein.to_law(run, OU.limit),
            wasserstein.between(run, run.isel(time=-1, drop=True)),
            entropy.differential(run),
            ((position - position.mean("particle")) ** 2).sum("component").max("particle"),
            position.chunk(time=2).mean("particle").compute(),
        ):
            assert values["replica"].attrs["antithetic"] == WORDS


def test_what_counts_as_independent():
    def of(*ids: int, mark: bool = True) -> xr.DataArray:
        attrs = {"antithetic": WORDS} if mark else {}
        return xr.DataArray(np.ones(len(ids)), {"replica": ("replica", list(ids), attrs)}, "replica")

    for values in (of(0, 1), of(2, 3), of(0, 2, 3), of(5, 4, 0)):
        assert not replicas.are_independent(values)
        with pytest.raises(ValueError, match=REFUSED):
            replicas.count(values)
    for values in (of(0, 2), of(1, 2), of(1, 3, 4), of(0, 1, mark=False), xr.DataArray(np.ones(2), dims="replica")):
        assert replicas.count(values) == values.size
    with pytest.raises(ValueError, match="at least two independent replicas"):
        replicas.count(of(0))
