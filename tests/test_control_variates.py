"""Antithetic pairs and control variates: unbiased, with intervals that cover, on data whose law is known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import xarray as xr
from scipy import stats

import mfsde
from mfsde.analysis.control_variates import _corrected, antithetic, control_variate, pairs
from mfsde.scenarios import DoubleWell, MeanFieldOU

Array = np.ndarray


def replicas(values: Array, *dims: str, name: str = "value") -> xr.DataArray:
    coords = {"replica": np.arange(values.shape[-1])}
    return xr.DataArray(values, coords, (*dims, "replica"), name=name, attrs={"units": "m"})


def mirrored(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Normals whose last axis is made of antithetic pairs."""
    z = rng.standard_normal((*shape[:-1], shape[-1] // 2))
    return np.stack([z, -z], -1).reshape(shape)


def within(values: Array, truth: float, bound: float = 4.0) -> bool:
    """Mean of independent values within some standard errors."""
    return bool(abs(values.mean() - truth) < bound * values.std(ddof=1) / math.sqrt(len(values)))


def covers(estimates: Array, errors: Array, truth: float, freedom: int) -> bool:
    """Coverage of 95 % t intervals over many repeats, within four of its own standard errors and 1 %."""
    n = len(estimates)
    share = (np.abs(estimates - truth) <= stats.t.ppf(0.975, freedom) * errors).mean()
    return bool(abs(share - 0.95) < 4 * math.sqrt(0.95 * 0.05 / n) + 0.01)


# Antithetic -----------------------------------------------------------------------------------------------------------


def test_pairs_are_means_of_neighbours() -> None:
    values = replicas(np.arange(12.0).reshape(2, 6) ** 2, "time")
    found = pairs(values)
    assert found.dims == ("time", "replica")
    np.testing.assert_array_equal(found, (values.values[:, 0::2] + values.values[:, 1::2]) / 2)
    assert found.replica.values.tolist() == [0, 1, 2]
    assert found.attrs == values.attrs


def test_the_variance_factor_is_one_over_one_plus_rho() -> None:
    z = mirrored(np.random.default_rng(0), (200_000,))
    # Y = z + a(z² - 1): the odd part cancels, the even part does not. ρ = (2a² - 1)/(2a² + 1).
    for a in (0.0, 0.3, 2.0):
        found = antithetic(replicas(z + a * (z * z - 1)))
        rho = (2 * a * a - 1) / (2 * a * a + 1)
        assert float(found.correlation) == pytest.approx(rho, abs=0.01)
        assert abs(float(found.estimate)) < 4 * float(found.stderr) + 1e-12
        assert float(found.stderr) == pytest.approx(math.sqrt(2 * a * a / 100_000), rel=0.03, abs=1e-12)
        if a:
            assert float(found.variance_reduction) == pytest.approx(1 / (1 + rho), rel=0.03)
    assert float(antithetic(replicas(z)).variance_reduction) > 1e10
    # Independent replicas taken for pairs gain nothing.
    loose = antithetic(replicas(np.random.default_rng(1).standard_normal(20_000)))
    assert abs(float(loose.correlation)) < 4 / math.sqrt(10_000)


def test_antithetic_intervals_cover() -> None:
    z = mirrored(np.random.default_rng(2), (4000, 30, 40))
    # Means over 30 particles, whose pair means are nearly Gaussian.
    values = np.exp(0.8 * z).mean(1)
    found = antithetic(replicas(values, "repeat"))
    truth = math.exp(0.32)
    assert within(found.estimate.values, truth)
    assert covers(found.estimate.values, found.stderr.values, truth, 19)
    # Pairs that are taken for independent replicas give errors that are too large.
    naive = values.std(-1, ddof=1) / math.sqrt(40)
    assert not covers(values.mean(-1), naive, truth, 39)
    # And those of an even function errors that are too small.
    even = (z * z).mean(1)
    assert not covers(even.mean(-1), even.std(-1, ddof=1) / math.sqrt(40), 1.0, 39)


def test_antithetic_runs_of_the_engine() -> None:
    settings: dict[str, Any] = {"n_particles": 50, "horizon": 1.0, "dt": 0.05, "seed": 3, "n_replicas": 16}
    noise = mfsde.Noise(3, antithetic=True)
    ou = mfsde.simulate(MeanFieldOU(), noise=noise, observables=["mean"], **settings)["mean"].isel(component=0, time=-1)
    found = antithetic(ou)
    # Affine in the noise: pairs do not vary, and their mean is Euler's own.
    assert float(found.stderr) < 1e-6
    assert float(found.estimate) == pytest.approx(0.95**20, abs=1e-6)
    well = mfsde.simulate(DoubleWell(), noise=noise, observables=["mean"], **settings)["mean"].isel(component=0)
    reduced = antithetic(well)
    assert reduced.estimate.dims == ("time",)
    assert float(reduced.variance_reduction[-1]) > 3
    plain = mfsde.simulate(MeanFieldOU(), observables=["mean"], **settings)["mean"].isel(component=0, time=-1)
    assert float(antithetic(plain).stderr) > 1e-2


# Control variates -----------------------------------------------------------------------------------------------------


def linear(rng: np.random.Generator, shape: tuple[int, ...], p: int = 1, rho: float = 0.95) -> tuple[Array, Array]:
    """Y with mean 1 and p controls with mean 0; R² = ρ²."""
    c = rng.standard_normal((*shape[:-1], p, shape[-1]))
    y = 1 + rho * c.sum(-2) / math.sqrt(p) + math.sqrt(1 - rho**2) * rng.standard_normal(shape)
    return y, c


def skewed(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """A control whose square enters Y: regression with the full-sample coefficient is biased."""
    c = rng.standard_exponential(shape) - 1
    return c + 0.5 * c**2 + 0.3 * rng.standard_normal(shape), c[..., None, :]


def test_what_is_linear_in_the_control_is_exact() -> None:
    c = np.random.default_rng(0).standard_normal((3, 20))
    found = control_variate(replicas(2 + 5 * c, "time"), replicas(c + 7, "time"), 7.0)
    np.testing.assert_allclose(found.estimate, 2, atol=1e-13)
    np.testing.assert_allclose(found.coefficient.isel(control=0), 5, atol=1e-12)
    assert float(found.stderr.max()) < 1e-13
    assert found.estimate.dims == ("time",)
    assert found.estimate.attrs["units"] == "m"


def test_the_coefficient_of_each_replica_is_that_of_the_others() -> None:
    y, c = linear(np.random.default_rng(1), (9,), p=2)
    corrected = []
    for r in range(9):
        keep = np.arange(9) != r
        dc = c[:, keep] - c[:, keep].mean(1, keepdims=True)
        beta = np.linalg.lstsq(dc.T, y[keep] - y[keep].mean(), rcond=None)[0]
        corrected.append(y[r] - beta @ c[:, r])
    mean, stderr, *_ = _corrected(y, c)
    assert mean == pytest.approx(np.mean(corrected), abs=1e-13)
    assert stderr == pytest.approx(np.std(corrected, ddof=1) / 3, abs=1e-13)


@pytest.mark.parametrize(("r", "p"), [(8, 1), (20, 1), (20, 3)])
def test_intervals_cover_and_the_variance_falls(r: int, p: int) -> None:
    y, c = linear(np.random.default_rng(3), (8000, r), p)
    mean, stderr, *_ = _corrected(y, c)
    assert within(mean, 1)
    assert covers(mean, stderr, 1.0, r - 1 - p)
    # (1 - R²)(R - 2)/(R - p - 2)/R for jointly normal values (Lavenberg, Welch 1981), up to the leave-one-out's own.
    expected = (1 - 0.95**2) * (r - 2) / (r - p - 2) / r
    assert mean.var() == pytest.approx(expected, rel=0.12 if r > 10 else 0.3)
    # An expectation that is wrong by half a standard error of C is seen in the coverage.
    shifted, errors, *_ = _corrected(y, c + 0.5 / math.sqrt(r))
    assert not covers(shifted, errors, 1.0, r - 1 - p)


def test_the_mean_is_unbiased_where_the_usual_coefficient_is_not() -> None:
    y, c = skewed(np.random.default_rng(4), (60_000, 8))
    assert within(_corrected(y, c)[0], 0.5)
    dc = c - c.mean(-1, keepdims=True)
    beta = (dc[:, 0] * (y - y.mean(-1, keepdims=True))).sum(-1) / np.square(dc[:, 0]).sum(-1)
    assert not within(y.mean(-1) - beta * c[:, 0].mean(-1), 0.5)


def test_a_linear_scenario_and_the_decoupled_process_are_controls() -> None:
    # Under the same seed; the expectation of the linear scenario's mean is that of its Euler scheme.
    well = DoubleWell(sigma=0.6)
    ou = MeanFieldOU(kappa=0.5, coupling=1.0, sigma=0.6, initial_mean=(0.5,), initial_variance=0.5)
    settings: dict[str, Any] = {"n_particles": 100, "horizon": 1.0, "dt": 0.05, "seed": 5, "n_replicas": 40}
    value, control = (
        mfsde.simulate(case, observables=["mean"], **settings)["mean"].isel(component=0) for case in (well, ou)
    )
    steps = xr.DataArray((value.time / 0.05).round(), value.time.coords)
    found = control_variate(value, control, 0.5 * 0.975**steps)
    assert float(found.variance_reduction[-1]) > 4
    assert float(found.control_error.max()) < 4
    combined = math.hypot(float(found.stderr[-1]), float(found.plain_stderr[-1]))
    assert abs(float(found.estimate[-1] - found.plain[-1])) < 4 * combined
    # The mean of the continuous equation is another number, and noticed where it matters.
    with pytest.raises(ValueError, match="standard errors from the expectation given"):
        control_variate(value, control, 0.5 * 0.8**steps)
    # Independent particles with the law of the continuous equation in their drift: E of their mean is its mean + O(dt).
    copy = mfsde.simulate(
        mfsde.decoupled(ou, ou.limit), observables=["mean"], **{**settings, "dt": 0.005}
    )["mean"].isel(component=0, time=-1)  # fmt: skip
    fine = mfsde.simulate(ou, observables=["mean"], **{**settings, "dt": 0.005})["mean"].isel(component=0, time=-1)
    close = control_variate(fine, copy, float(ou.limit(1.0).mean[0]))
    assert float(close.variance_reduction) > 2
    assert abs(float(close.estimate) - float(ou.limit(1.0).mean[0])) < 4 * float(close.stderr) + 0.002


def test_several_controls_by_name_and_pairs_of_antithetic_replicas() -> None:
    rng = np.random.default_rng(6)
    z = mirrored(rng, (2, 400))
    y = replicas(np.exp(z.sum(0)))
    controls = {"square": replicas(np.square(z.sum(0))), "odd": replicas(z[0])}
    found = control_variate(pairs(y), {k: pairs(c) for k, c in controls.items()}, {"square": 2.0, "odd": 0.0})
    assert found.control.values.tolist() == ["square", "odd"]
    # The odd control vanishes in pairs, and changes nothing.
    assert float(found.coefficient.sel(control="odd")) == 0
    assert float(found.variance_reduction) > 2
    assert abs(float(found.estimate) - math.e) < 4 * float(found.stderr)
    twice = control_variate(pairs(y), {k: pairs(controls["square"]) for k in "ab"}, {"a": 2.0, "b": 2.0})
    once = control_variate(pairs(y), pairs(controls["square"]), 2.0)
    assert float(twice.estimate) == pytest.approx(float(once.estimate), abs=1e-10)


def test_a_control_that_does_not_vary_changes_nothing() -> None:
    y = replicas(np.random.default_rng(7).standard_normal((2, 12)), "time")
    c = np.random.default_rng(8).standard_normal((2, 12))
    c[0] = 3.0
    expectation = xr.DataArray([3.0, 0.0], dims="time")
    found = control_variate(y, replicas(c, "time"), expectation)
    assert float(found.estimate[0]) == pytest.approx(float(found.plain[0]), abs=1e-14)
    assert float(found.variance_reduction[0]) == pytest.approx(1)


# The door -------------------------------------------------------------------------------------------------------------

Y = replicas(np.random.default_rng(9).standard_normal(10))
BAD = Y.copy(data=np.full(10, np.nan))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: antithetic(Y[:5]), "5 replicas labelled .* expected whole pairs"),
        (lambda: antithetic(Y[1:9]), "expected whole pairs 2j, 2j"),
        (lambda: antithetic(Y[:2]), "at least two independent replicas"),
        (lambda: antithetic(BAD), "not finite"),
        (lambda: antithetic(Y.rename(replica="run")), "expected `replica` among them"),
        (lambda: control_variate(Y[:4], Y[:4] ** 2, 1.0), "4 replicas and 1 controls; .* at least 5"),
        (lambda: control_variate(Y, Y[:8], 0.0), "has 8 replicas and the value 10"),
        (lambda: control_variate(Y, Y.expand_dims(k=2), 0.0), "has the dimensions \\['k'\\]"),
        (lambda: control_variate(Y, {"a": Y}, 0.0), "expectation must name the controls"),
        (lambda: control_variate(Y, {"a": Y}, {"b": 0.0}), "expectation must name the controls"),
        (lambda: control_variate(Y, Y + 5, 0.0), "standard errors from the expectation given"),
        (lambda: control_variate(Y, BAD, 0.0), "control 'value' has values that are not finite"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_wrong_types_are_refused() -> None:
    with pytest.raises(TypeError, match="values is a ndarray; expected a DataArray"):
        antithetic(np.zeros(4))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="control is a list"):
        control_variate(Y, [Y], 0.0)  # type: ignore[arg-type]
