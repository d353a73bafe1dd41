"""Rates: exact on series without noise, honest intervals on series with noise, refusals and flags everywhere else."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from scipy import optimize, stats

import mfsde
from mfsde.analysis import rates, wasserstein
from mfsde.analysis.rates import Rate, Unresolved
from mfsde.scenarios import DoubleWell, MeanFieldOU

TIMES = np.arange(0, 4.01, 0.1)
SIZES = np.array([25.0, 50.0, 100.0, 200.0, 400.0])

KAPPA, COUPLING, SIGMA, DT = 1.0, 0.5, 0.7, 0.05
PULL = KAPPA + COUPLING
# Euler's scheme multiplies the mean by 1 - κh at each step, and its stationary variance is σ²/(λ(2 - λh)), λ = κ + α.
VARIANCE = SIGMA**2 / (PULL * (2 - PULL * DT))
MEAN_RATE = -math.log1p(-KAPPA * DT) / DT

# Of 60 intervals that cover 95 % fewer than 51 hold the truth once in 1800 times.
REPEATS, FEWEST_HITS = 60, 51


def series(samples: np.ndarray, times: np.ndarray = TIMES, power: int = 2, **coords: Any) -> xr.DataArray:
    """(time, replica) from (R, T)."""
    labels = {"time": times, "replica": np.arange(len(samples))}
    found = xr.DataArray(samples.T, dims=("time", "replica"), coords=labels, attrs={"power": power})
    return found.assign_coords({name: (("time", "replica"), value.T) for name, value in coords.items()})


def noiseless(rate: float, prefactor: float, power: int = 1, r: int = 5, times: np.ndarray = TIMES) -> xr.DataArray:
    return series(np.tile((prefactor * np.exp(-rate * times)) ** power, (r, 1)), times, power)


def paths(seed: int, r: int = 20, times: np.ndarray = TIMES, memory: float = 1.0) -> np.ndarray:
    """Stationary Gaussian noise of variance 1, correlated over times like a run's own, (R, T)."""
    rng = np.random.default_rng(seed)
    keep = np.exp(-np.diff(times) / memory)
    noise = rng.normal(size=(r, len(times)))
    for k, a in enumerate(keep):
        noise[:, k + 1] = a * noise[:, k] + math.sqrt(1 - a * a) * noise[:, k + 1]
    return noise


def noisy(rate: float, seed: int, level: float = 0.03, power: int = 2, floor: float = 0.0, **how: Any) -> xr.DataArray:
    """√(e^{-2·rate·t} + floor²) to the power, with noise of standard deviation `level` in every replica."""
    mean = (np.exp(-2 * rate * TIMES) + floor**2) ** (power / 2)
    return series(mean + level * paths(seed, **how), power=power)


def kinds(rate: Rate) -> set[str]:
    return {flag.split(" ")[0].strip(":") for flag in rate.flags}


def close(value: float, tolerance: float = 1e-12) -> Any:
    return pytest.approx(value, rel=tolerance)


# Exponential: exact ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [1, 2])
def test_a_series_without_noise_gives_the_rate_and_the_prefactor_of_w2(power):
    rate = rates.exponential(noiseless(1.3, 3.0, power))
    assert rate.value == close(1.3)
    assert rate.prefactor == close(3.0)
    assert rate.window == (0.0, 4.0)
    assert rate.stderr < 1e-12
    assert rate.flags == ()


@pytest.mark.parametrize("power", [1, 2])
def test_start_and_stop_bound_the_window_and_nothing_else_without_noise(power):
    rate = rates.exponential(noiseless(1.3, 3.0, power), start=0.7, stop=2.1)
    assert rate.window == pytest.approx((0.7, 2.1))
    assert rate.value == close(1.3)
    assert rate.prefactor == close(3.0)
    assert rate.flags == ()


def test_times_far_from_zero_lose_no_digits():
    # Powers of raw times would make the normal equations of the parabola singular to rounding.
    far = noiseless(1.3, 1.0).assign_coords(time=TIMES + 100)
    rate = rates.exponential(far)
    assert rate.value == close(1.3)
    assert rate.prefactor == close(math.exp(130), 1e-10)
    assert rate.flags == ()
    # A is W₂ at time 0, which may be beyond a floating number.
    assert rates.exponential(noiseless(1.3, 1.0).assign_coords(time=TIMES + 1e4)).prefactor == math.inf


def test_a_growing_series_has_a_negative_rate():
    assert rates.exponential(noiseless(-0.2, 1.0)).value == close(-0.2)
    assert "free" not in kinds(rates.exponential(series(np.exp(0.2 * TIMES) + 0.01 * paths(0))))


def test_the_window_ends_before_the_mean_meets_six_standard_errors_and_never_reopens():
    # Four replicas e^{-t} ± δ have standard error δ/√3 at every time.
    delta = 0.05
    samples = np.exp(-TIMES) + delta * np.array([[-1.0], [-1.0], [1.0], [1.0]])
    limit = -math.log(rates.ABOVE_NOISE * delta / math.sqrt(3))
    last = TIMES[limit > TIMES].max()
    assert rates.exponential(series(samples)).window == (0.0, close(last))
    samples[:, -5:] += 1.0
    assert rates.exponential(series(samples)).window == (0.0, close(last))


@pytest.mark.parametrize("power", [1, 2])
def test_rescaling_time_divides_the_rate(power):
    base = noisy(1.0, 0, power=power)
    whole, scaled = rates.exponential(base), rates.exponential(base.assign_coords(time=8 * TIMES))
    for name in ("value", "low", "high", "stderr"):
        assert getattr(scaled, name) == close(getattr(whole, name) / 8)
    assert scaled.window == pytest.approx(tuple(8 * t for t in whole.window))
    assert scaled.prefactor == close(whole.prefactor)
    assert kinds(scaled) == kinds(whole)


@pytest.mark.parametrize("power", [1, 2])
def test_rescaling_distance_scales_the_prefactor_alone(power):
    base = noisy(1.0, 0, power=power)
    whole, scaled = rates.exponential(base), rates.exponential((base * 7.0**power).assign_attrs(base.attrs))
    for name in ("value", "low", "high", "stderr"):
        assert getattr(scaled, name) == close(getattr(whole, name), 1e-11)
    assert scaled.window == whole.window
    assert scaled.prefactor == close(7 * whole.prefactor, 1e-11)
    assert kinds(scaled) == kinds(whole)


def test_the_order_of_replicas_and_of_dimensions_changes_nothing():
    base = noisy(1.0, 0)
    shuffled = base.isel(replica=np.random.default_rng(1).permutation(20)).transpose("replica", "time")
    one, other = rates.exponential(base), rates.exponential(shuffled)
    for name in ("value", "low", "high", "stderr", "prefactor"):
        assert getattr(other, name) == close(getattr(one, name), 1e-11)
    assert other.window == one.window
    assert kinds(other) == kinds(one)


def test_what_is_free_of_the_floor_is_what_is_fitted():
    # W₂² = e^{-2t} + f² is read through `unbiased`, through `floor`, and as it is.
    floor = 0.2
    squares = np.tile(np.exp(-2 * TIMES), (5, 1))
    biased = series(np.sqrt(squares + floor**2), power=1)
    corrected = biased.assign_coords(floor=("time", np.full(len(TIMES), floor)))
    stop = {"stop": 3.0}
    assert rates.exponential(corrected, **stop).value == close(1.0, 1e-9)
    assert "less the floor" in rates.exponential(corrected, **stop).method
    unbiased = corrected.assign_coords(unbiased=(("time", "replica"), squares.T))
    assert rates.exponential(unbiased).value == close(1.0)
    assert "without its floor" in rates.exponential(unbiased).method
    assert rates.exponential(biased, **stop).value < 0.6


def test_a_series_may_end_at_its_own_reference():
    samples = np.exp(-2 * TIMES) + 0.03 * paths(2)
    samples[:, -1] = 0.0
    rate = rates.exponential(series(samples))
    assert rate.low <= 1.0 <= rate.high
    assert rate.flags == ()
    exact = np.tile(np.exp(-2 * TIMES), (5, 1))
    exact[:, -1] = 0.0
    assert rates.exponential(series(exact)).value == close(1.0)


# Exponential: intervals -----------------------------------------------------------------------------------------------


def naive_interval(distance: xr.DataArray, window: tuple[float, float]) -> tuple[float, float]:
    """Least squares on the logarithm of the mean curve, its error from the residuals: what a careless fit reports."""
    mean = distance.mean("replica").sel(time=slice(window[0] - 1e-9, window[1] + 1e-9))
    fit = stats.linregress(mean.time, np.log(mean))
    half = stats.t.ppf(0.975, mean.sizes["time"] - 2) * fit.stderr
    return -(fit.slope + half) / 2, -(fit.slope - half) / 2


def test_intervals_over_replicas_cover_and_those_from_residuals_do_not():
    assert stats.binom.cdf(FEWEST_HITS - 1, REPEATS, 0.95) < 1e-3
    hits = naive = 0
    for seed in range(REPEATS):
        distance = noisy(1.0, seed)
        rate = rates.exponential(distance)
        hits += rate.low <= 1.0 <= rate.high
        low, high = naive_interval(distance, rate.window)
        naive += low <= 1.0 <= high
    assert hits >= FEWEST_HITS
    assert naive < FEWEST_HITS


def test_a_sound_series_is_rarely_flagged():
    # Each of two tests flags 1 % of sound series: of 60, more than 6 are flagged once in 4000 times.
    assert stats.binom.sf(6, REPEATS, 0.02) < 1e-3
    assert sum(bool(rates.exponential(noisy(1.0, seed)).flags) for seed in range(REPEATS)) <= 6


@pytest.mark.parametrize("power", [1, 2])
def test_few_replicas_widen_the_interval(power):
    few, many = (rates.exponential(noisy(1.0, 3, level=0.01, power=power, r=r), stop=1.5) for r in (3, 40))
    assert many.low <= 1.0 <= many.high
    # t_2 = 4.30 and t_39 = 2.02 multiply the standard errors.
    for rate, quantile in ((few, 4.3027), (many, 2.0227)):
        assert (rate.high - rate.low) / 2 / rate.stderr == close(quantile, 1e-4)


# Exponential: flags ---------------------------------------------------------------------------------------------------


def test_two_exponentials_are_curved_until_the_fast_one_is_over():
    mean = np.exp(-2 * TIMES) + 4 * np.exp(-8 * TIMES)
    distance = series(mean + 0.01 * paths(0))
    whole = rates.exponential(distance)
    assert "curved" in kinds(whole)
    assert whole.low > 1.0
    late = rates.exponential(distance, start=0.9)
    assert late.flags == ()
    assert late.low <= 1.0 <= late.high


def test_a_floor_that_was_not_subtracted_is_flagged():
    bare = noisy(1.0, 0, level=0.01, power=1, floor=0.1)
    rate = rates.exponential(bare)
    assert rate.high < 1.0
    assert {"free", "curved"} <= kinds(rate)
    known = rates.exponential(bare.assign_coords(floor=("time", np.full(len(TIMES), 0.1))))
    assert known.low <= 1.0 <= known.high
    assert known.flags == ()


def test_a_floor_is_noticed_beyond_a_window_that_does_not_show_it():
    # The window is straight; the squares beyond it settle at -0.05 and not at 0.
    distance = series(np.exp(-2 * TIMES) - 0.05 + 0.01 * paths(0))
    assert "free" in kinds(rates.exponential(distance))
    assert "free" not in kinds(rates.exponential(series(np.exp(-2 * TIMES) + 0.01 * paths(0))))


def test_another_slope_from_half_the_particles_is_flagged():
    noise = 0.01 * paths(4)
    samples = np.exp(-2 * TIMES) + noise
    sound = series(samples, half=np.exp(-2 * TIMES) + 1.5 * noise + 0.01 * paths(5))
    assert rates.exponential(sound, stop=1.5).flags == ()
    biased = series(samples, half=np.exp(-1.7 * TIMES) + 1.5 * noise + 0.01 * paths(5))
    assert any("N/2 particles disagree" in flag for flag in rates.exponential(biased, stop=1.5).flags)
    # The noise that N and N/2 share is no excuse: what differs is compared with the scatter of the difference.
    shared = series(samples, half=samples * np.exp(0.01 * TIMES))
    assert any("N/2 particles disagree" in flag for flag in rates.exponential(shared, stop=1.5).flags)
    lost = series(samples, half=samples - 0.5)
    assert any("N/2 particles lose the window" in flag for flag in rates.exponential(lost, stop=1.5).flags)


def test_a_change_of_shape_is_flagged_where_it_is_a_share_of_the_distance():
    samples = np.exp(-2 * TIMES) + 0.01 * paths(6)
    within = series(samples, shape=0.01 * samples)
    assert rates.exponential(within, stop=1.5).flags == ()
    beyond = series(samples, shape=0.2 * samples)
    assert any(re.search(r"may differ by 2\d% of", flag) for flag in rates.exponential(beyond, stop=1.5).flags)


# Exponential: mean-field OU -------------------------------------------------------------------------------------------


def ou(kappa: float = KAPPA, d: int = 1, mean: float = 1.0, scale: float = 1.0, **settings: Any) -> xr.Dataset:
    """From N(m₀, scale²·v∞ I), |m₀| = mean."""
    start = {"initial_mean": (mean / math.sqrt(d),) * d, "initial_variance": scale**2 * VARIANCE}
    chosen = {"n_particles": 500, "n_replicas": 20, "horizon": 4.0, "dt": DT, "seed": 3, "save_every": 4} | settings
    return mfsde.simulate(MeanFieldOU(kappa, COUPLING, SIGMA, **start), **chosen)


def invariant(d: int = 1) -> mfsde.Gaussian:
    return mfsde.Gaussian([0.0] * d, VARIANCE)


def test_the_rate_of_mean_field_ou_lies_in_its_interval_and_a_wrong_one_does_not():
    rate = rates.exponential(wasserstein.to_law(ou(), invariant()))
    assert rate.flags == ()
    assert rate.low <= MEAN_RATE <= rate.high
    half = (rate.high - rate.low) / 2
    assert half < 0.03 * MEAN_RATE
    # Planted: another κ, more than five half-widths away. The measurement follows it and rejects the truth.
    planted = KAPPA * 1.2
    moved = -math.log1p(-planted * DT) / DT
    assert moved - MEAN_RATE > 5 * half
    wrong = rates.exponential(wasserstein.to_law(ou(kappa=planted), invariant()))
    assert not wrong.low <= MEAN_RATE <= wrong.high


def test_a_raw_logarithmic_fit_misses_the_rate_and_is_flagged():
    distance = wasserstein.to_law(ou(horizon=8.0, save_every=8), invariant())
    raw = rates.exponential(distance.drop_vars(["unbiased", "floor"]))
    assert raw.high < MEAN_RATE
    assert {"free", "curved"} <= kinds(raw)
    fitted = rates.exponential(distance)
    assert fitted.low <= MEAN_RATE <= fitted.high


def test_the_rate_in_the_plane_by_the_gaussian_estimator():
    rate = rates.exponential(wasserstein.debiased(ou(d=2), invariant(2), estimator="gaussian"))
    assert rate.flags == ()
    assert rate.low <= MEAN_RATE <= rate.high
    assert not rate.low <= 1.2 * MEAN_RATE <= rate.high


def test_mean_and_variance_relaxing_together_are_flagged_until_the_variance_is_done():
    # W₂² = m₀² e^{-2κt} + (√v - √v∞)², the second at rate 2(κ + α) once it is small.
    distance = wasserstein.to_law(ou(scale=2.5, n_particles=2000), invariant())
    whole = rates.exponential(distance)
    assert "curved" in kinds(whole)
    assert whole.low > MEAN_RATE
    late = rates.exponential(distance, start=1.6)
    assert late.flags == ()
    assert late.low <= MEAN_RATE <= late.high


def test_a_change_of_scale_in_ten_dimensions_is_flagged_for_exact_transport():
    d, n, r = 10, 60, 8
    run = ou(d=d, mean=0.0, scale=2.0, n_particles=n, n_replicas=r, horizon=0.4, save_every=2)
    drawn = invariant(d).sample(n * r, torch.Generator().manual_seed(5)).numpy().reshape(r, n, d)
    reference = xr.DataArray(drawn, dims=("replica", "particle", "component"), coords={"replica": np.arange(r)})
    rate = rates.exponential(wasserstein.debiased(run, reference, estimator="transport"))
    assert any(flag.startswith("shape:") for flag in rate.flags)


# Exponential: refusals ------------------------------------------------------------------------------------------------


def test_equilibrium_holds_no_rate():
    with pytest.raises(Unresolved, match=r"no rate: from t = 0 on, \d saved times in a row stand 6 .* \(they are \d"):
        rates.exponential(wasserstein.to_law(ou(mean=0.0), invariant()))


def test_a_start_beyond_the_end_holds_no_rate():
    with pytest.raises(Unresolved, match=r"start = 9\.0 and stop = None leave 0 of the saved times"):
        rates.exponential(noiseless(1.0, 1.0), start=9.0)
    with pytest.raises(Unresolved, match=r"leave 2 of the saved times"):
        rates.exponential(noiseless(1.0, 1.0), start=1.0, stop=1.1)


def test_unresolved_is_a_value_error():
    assert issubclass(Unresolved, ValueError)


@pytest.mark.parametrize(
    ("distance", "message"),
    [
        (noiseless(1.0, 1.0, r=1), r"at least two independent replicas.*has 1 along 'replica'.*n_replicas=8"),
        (noiseless(1.0, 1.0).where(TIMES[:, None] != 0.5), r"rates\.exponential: 5 of 205 values are not finite"),
        (noiseless(1.0, 1.0).drop_attrs(), r"attrs\['power'\] is None; set it to 1 \(the rate of the series"),
        (noiseless(1.0, 1.0).assign_attrs(power=3), r"attrs\['power'\] is 3"),
        (noiseless(1.0, 1.0).isel(replica=0), r"expected a distance \(time, replica\); got dimensions \('time',\)"),
        (noiseless(1.0, 1.0).expand_dims("pair"), r"got dimensions \('pair', 'time', 'replica'\).*wasserstein\.to_law"),
        (noiseless(1.0, 1.0).isel(time=slice(None, None, -1)), r"times do not increase; sort .*sortby\('time'\)"),
    ],
)
def test_what_is_no_decaying_series_is_refused(distance, message):
    with pytest.raises(ValueError, match=message):
        rates.exponential(distance)


# Powers ---------------------------------------------------------------------------------------------------------------


def table(samples: np.ndarray, n: np.ndarray = SIZES, dim: str = "replica") -> xr.DataArray:
    """(n_particles, replica) from (R, K)."""
    return xr.DataArray(samples.T, dims=("n_particles", dim), coords={"n_particles": n}, name="error")


@pytest.mark.parametrize("exponent", [-1.0, -0.5, 2.0])
def test_a_power_without_noise_is_exact(exponent):
    rate = rates.power(table(np.tile(3.0 * SIZES**exponent, (4, 1))))
    assert rate.value == close(exponent)
    assert rate.prefactor == close(3.0, 1e-11)
    assert rate.window == (25.0, 400.0)
    assert rate.flags == ()


def scatter(seed: int, exponent: float = -1.0, r: int = 30) -> np.ndarray:
    """Independent values of mean 2 n^p with chi-squared noise, as squared errors have, (R, K)."""
    noise = np.random.default_rng(seed).chisquare(4, size=(r, len(SIZES))) / 4
    return 2.0 * SIZES**exponent * noise


def test_intervals_of_exponents_cover_and_reject_a_wrong_one():
    hits = wrong = 0
    for seed in range(REPEATS):
        rate = rates.power(table(scatter(seed)))
        hits += rate.low <= -1.0 <= rate.high
        planted = rates.power(table(scatter(seed, exponent=-0.5)))
        wrong += planted.low <= -1.0 <= planted.high
    assert hits >= FEWEST_HITS
    assert wrong < FEWEST_HITS


def test_noise_that_all_sizes_share_cancels_in_the_slope():
    # Runs of equal seed share their noise: a factor of a replica, the same at every n, moves the intercept alone.
    factor = np.random.default_rng(0).gamma(4.0, 0.25, size=(10, 1))
    shared = rates.power(table(factor / SIZES))
    assert shared.value == close(-1.0)
    assert shared.stderr < 1e-12
    errors = factor.std(ddof=1) / math.sqrt(10) * np.ones_like(SIZES) * factor.mean() ** -1 / SIZES
    alone = xr.DataArray(1 / SIZES, dims="n_particles", coords={"n_particles": SIZES})
    assert rates.power(alone.assign_coords(stderr=("n_particles", errors))).stderr > 0.05


def test_replicas_seeds_and_unsorted_sizes_agree():
    samples = scatter(1)
    whole = rates.power(table(samples))
    seeds = rates.power(table(samples, dim="seed"))
    assert replace(seeds, method=whole.method) == whole
    assert "over 30 seeds" in seeds.method
    mixed = rates.power(table(samples).isel(n_particles=[3, 0, 4, 1, 2]).transpose("replica", "n_particles"))
    assert mixed == whole
    shuffled = rates.power(table(samples[np.random.default_rng(0).permutation(30)]))
    assert shuffled.value == close(whole.value, 1e-11)
    assert shuffled.stderr == close(whole.stderr, 1e-9)


def test_rescaling_leaves_the_exponent():
    samples = scatter(2)
    whole = rates.power(table(samples))
    other = rates.power(table(5 * samples, n=3 * SIZES))
    assert other.value == close(whole.value, 1e-11)
    assert other.stderr == close(whole.stderr, 1e-9)
    assert other.prefactor == close(5 * whole.prefactor * 3**-whole.value, 1e-10)


def test_given_errors_weight_independent_points():
    rng = np.random.default_rng(3)
    error = 0.1 * rng.uniform(0.5, 2.0, len(SIZES)) / SIZES
    mean = 1 / SIZES + error * rng.normal(size=len(SIZES))
    points = xr.DataArray(mean, dims="n_particles", coords={"n_particles": SIZES, "stderr": ("n_particles", error)})
    rate = rates.power(points)
    fit, cov = np.polyfit(np.log(SIZES), np.log(mean), 1, w=mean / error, cov="unscaled")
    assert rate.value == close(fit[0], 1e-10)
    assert rate.prefactor == close(math.exp(fit[1]), 1e-10)
    assert rate.stderr == close(math.sqrt(cov[0, 0]), 1e-10)
    assert (rate.high - rate.low) / 2 == close(1.96 * rate.stderr)
    assert rates.power(points.isel(n_particles=[2, 0, 1, 4, 3])).value == close(rate.value)


def test_a_dataset_with_one_variable_stands_for_it_and_any_name_may_be_swept():
    samples = scatter(4)
    assert rates.power(table(samples).to_dataset()) == rates.power(table(samples))
    steps = table(samples, n=1 / SIZES).rename(n_particles="dt")
    assert rates.power(steps, over="dt").value == close(-rates.power(table(samples)).value, 1e-11)
    two = table(samples).to_dataset().assign(other=table(samples))
    with pytest.raises(ValueError, match=r"the dataset holds \['error', 'other'\]; pass one"):
        rates.power(two)


def test_a_bend_is_flagged():
    noise = np.random.default_rng(5).normal(size=(20, len(SIZES)))
    straight = rates.power(table((1 + 0.02 * noise) / SIZES))
    assert straight.flags == ()
    bent = rates.power(table((1 + 0.02 * noise) * (1 / SIZES + 0.01)))
    assert kinds(bent) == {"curved"}
    assert "not one power over this range" in bent.flags[0]


def test_means_close_to_their_noise_are_flagged():
    samples = np.tile(1 / SIZES, (9, 1))
    samples[:, -1] *= np.array([4.0, -1.0, -1.0, 4.0, -1.0, 4.0, -1.0, 4.0, -1.0])
    assert any("within 3 standard errors of zero" in flag for flag in rates.power(table(samples)).flags)


@pytest.mark.parametrize(
    ("values", "over", "message"),
    [
        (table(scatter(0)), "dt", r"no dimension 'dt' among \('n_particles', 'replica'\)"),
        (table(scatter(0)).isel(n_particles=slice(2)), "n_particles", r"2 values of n_particles .* three positive"),
        (
            table(scatter(0), n=np.array([1.0, 1.0, 2.0, 2.0, 2.0])),
            "n_particles",
            r"positive ones, all different",
        ),
        (table(scatter(0), n=np.arange(5.0)), "n_particles", r"\[0\.0, .* a slope takes three positive ones"),
        (table(scatter(0, r=1)), "n_particles", r"at least two independent replicas; error has 1"),
        (table(scatter(0)).mean("replica"), "n_particles", r"with a coordinate `stderr`; got \('n_particles',\)"),
        (table(scatter(0)).expand_dims(time=2), "n_particles", r"Reduce the others \(\.isel\(time=-1\)"),
        (table(np.where(SIZES > 300, np.nan, scatter(0))), "n_particles", r"rates\.power: 30 of 150 values are not f"),
    ],
)
def test_what_is_no_table_is_refused(values, over, message):
    with pytest.raises(ValueError, match=message):
        rates.power(values, over=over)


def test_means_that_are_not_positive_have_no_power():
    with pytest.raises(Unresolved, match=r"no power law: means .* are not positive without any one replica"):
        rates.power(table(scatter(0) - 0.02))
    points = xr.DataArray(1 / SIZES, dims="n_particles", coords={"n_particles": SIZES})
    for mean, error in ((points - 0.01, 0.1 * points), (points, 0 * points)):
        with pytest.raises(Unresolved, match=r"means and standard errors must be positive"):
            rates.power(mean.assign_coords(stderr=error))


# Contraction ----------------------------------------------------------------------------------------------------------


def clouds(d: int, n: int = 30, m: int = 30, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)), 1.0 + 0.5 * rng.normal(size=(m, d))


@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("m", [30, 17])
def test_a_linear_drift_contracts_at_its_own_rate(d, m):
    x, y = clouds(d, m=m)
    assert rates.contraction(x, y, -1.7 * x, -1.7 * y) == close(1.7)
    # The sign and the size of a drift are seen.
    assert rates.contraction(x, y, 1.7 * x, 1.7 * y) == close(-1.7)


@pytest.mark.parametrize("d", [1, 2])
def test_attraction_to_the_mean_does_not_move_the_means_together(d):
    # ⟨b - b', x - y⟩ = -λ|x - y|² + α⟨m - m', x - y⟩ with λ = κ + α; the mean of x - y is m - m' under any coupling.
    x, y = clouds(d)
    v, w = (-PULL * z + COUPLING * z.mean(0) for z in (x, y))
    apart = float(np.square(x.mean(0) - y.mean(0)).sum())
    expected = PULL - COUPLING * apart / wasserstein.distance(x, y) ** 2
    assert rates.contraction(x, y, v, w) == close(expected, 1e-10)


def test_the_coupling_in_the_plane_is_the_optimal_assignment():
    x, y = clouds(2)
    v, w = np.sin(x), np.sin(y)
    i, j = optimize.linear_sum_assignment(np.square(x[:, None] - y).sum(-1))
    gap = x[i] - y[j]
    expected = -float(((v[i] - w[j]) * gap).sum() / np.square(gap).sum())
    assert rates.contraction(x, y, v, w) == close(expected, 1e-10)
    index = -float(((v - w) * (x - y)).sum() / np.square(x - y).sum())
    assert abs(index - expected) > 0.05


def test_contraction_between_runs_is_the_array_function_at_every_time_and_replica():
    scenario = MeanFieldOU(KAPPA, COUPLING, SIGMA, initial_mean=(1.0, 0.0))
    settings = {"n_particles": 40, "n_replicas": 3, "horizon": 0.4, "dt": 0.1, "seed": 1, "dtype": torch.float64}
    run = mfsde.simulate(scenario, **settings)
    other = mfsde.simulate(replace(scenario, initial_mean=(-1.0, 0.5), initial_variance=0.3), **settings)
    drift = rates.drift_of(scenario)
    found = rates.contraction_between(run, other, drift)
    assert found.dims == ("time", "replica")
    assert found.attrs["units"] == "1"
    assert {"long_name", "estimator"} <= set(found.attrs)
    np.testing.assert_array_equal(found.time, run.time)
    for time in run.time.values:
        for replica in run.replica.values:
            x, y = (z.position.sel(time=time, replica=replica).values for z in (run, other))
            expected = rates.contraction(x, y, drift(time, x), drift(time, y))
            assert float(found.sel(time=time, replica=replica)) == close(expected)
            apart = float(np.square(x.mean(0) - y.mean(0)).sum()) / wasserstein.distance(x, y) ** 2
            assert expected == close(PULL - COUPLING * apart, 1e-9)
    lazy = rates.contraction_between(run.chunk(time=2), other.chunk(time=2), drift)
    xr.testing.assert_identical(lazy.compute(), found)
    swapped = rates.contraction_between(run.transpose("replica", ...), other, drift)
    np.testing.assert_array_equal(swapped.transpose("time", "replica"), found)


def test_drift_of_takes_the_law_of_the_points():
    x = np.random.default_rng(0).normal(size=(20, 2))
    linear = MeanFieldOU(KAPPA, COUPLING, SIGMA, initial_mean=(1.0, 0.0))
    np.testing.assert_allclose(rates.drift_of(linear)(0.0, x), -PULL * x + COUPLING * x.mean(0), rtol=1e-13)
    well = DoubleWell(theta=2.0, initial_mean=(0.5, 0.0))
    np.testing.assert_allclose(rates.drift_of(well)(0.0, x), x - x**3 - 2.0 * (x - x.mean(0)), rtol=1e-12, atol=1e-14)
    read_only = x.copy()
    read_only.flags.writeable = False
    np.testing.assert_array_equal(rates.drift_of(well)(0.0, read_only), rates.drift_of(well)(0.0, x))


def test_what_has_no_contraction_rate_is_refused():
    x, y = clouds(2)
    with pytest.raises(ValueError, match=r"contraction: w has shape \(29, 2\), its points \(30, 2\)"):
        rates.contraction(x, y, x, y[1:])
    with pytest.raises(ValueError, match=r"contraction, v: 1 of 60 values are not finite"):
        rates.contraction(x, y, np.where(x == x.max(), np.nan, x), y)
    with pytest.raises(ValueError, match=r"W₂, the first sample: 1 of 60 values are not finite"):
        rates.contraction(np.where(x == x.max(), np.inf, x), y, x, y)
    with pytest.raises(ValueError, match=r"the samples are equal, so nothing contracts"):
        rates.contraction(x, x, x, x)
    with pytest.raises(ValueError, match=r"expected samples \(N, d\); got shapes \(30,\) and \(30,\)"):
        rates.contraction(x[:, 0], y[:, 0], x[:, 0], y[:, 0])


def test_runs_that_do_not_match_have_no_contraction():
    run = ou(n_particles=10, n_replicas=3, horizon=0.2, save_every=1)
    drift = rates.drift_of(MeanFieldOU())
    with pytest.raises(ValueError, match=r"the labels along 'time' differ: 5 from 0\.0 .* 3 shared"):
        rates.contraction_between(run, run.isel(time=slice(3)), drift)
    with pytest.raises(ValueError, match=r"the labels along 'replica' differ"):
        rates.contraction_between(run, run.isel(replica=slice(2)), drift)
    with pytest.raises(ValueError, match=r"the samples are equal"):
        rates.contraction_between(run, run, drift)
    masses = run.position.isel(component=0, drop=True) ** 2
    with pytest.raises(ValueError, match=r"expected particles of equal mass in Euclidean space"):
        rates.contraction_between(run.assign(weight=masses), run, drift)
    turned = run.assign(position=run.position.assign_attrs(period="[6.283185307179586]"))
    with pytest.raises(ValueError, match=r"expected particles of equal mass in Euclidean space"):
        rates.contraction_between(turned, turned, drift)


# What is reported -----------------------------------------------------------------------------------------------------


def test_a_rate_prints_as_value_interval_method_window_and_flags():
    rate = Rate(1.23456, 1.2, 1.3, 0.02, (0.5, 2.0), 3.0, "log fit", ("first", "second"))
    assert str(rate) == "1.235 ± 0.05 (95 %, log fit, window [0.5, 2])\n  flag: first\n  flag: second"


def test_attributes_survive_json_and_zarr(tmp_path):
    distance = noisy(1.0, 0, level=0.01, power=1, floor=0.1).rename("distance")
    rate = rates.exponential(distance)
    found = rate.attributes()
    assert found["flags"] == "; ".join(rate.flags) != ""
    assert (found["window_start"], found["window_end"]) == rate.window
    assert json.loads(json.dumps(found)) == found
    assert all(type(value) in (float, str) for value in found.values())
    stored = distance.assign_attrs({f"rate_{name}": value for name, value in found.items()}).to_dataset()
    stored.to_zarr(tmp_path / "rate.zarr", zarr_format=3, consolidated=False)
    with xr.open_zarr(tmp_path / "rate.zarr", consolidated=False) as back:
        assert {name: back.distance.attrs[f"rate_{name}"] for name in found} == found


@pytest.mark.parametrize("rate", [rates.power(table(scatter(0))), rates.exponential(noiseless(1.0, 1.0))])
def test_numbers_are_python_floats(rate):
    assert all(type(value) in (float, str) for value in rate.attributes().values())


def test_a_power_that_bends_is_flagged_also_with_given_errors_and_with_three_points():
    n = np.array([10.0, 100.0, 1000.0, 10000.0])
    values = xr.DataArray(1 / n + 1e-3, dims="n_particles", coords={"n_particles": n})
    bent = rates.power(values.assign_coords(stderr=("n_particles", 1e-3 * values.values)))
    assert any("miss the line" in flag for flag in bent.flags)
    straight = xr.DataArray(1 / n, dims="n_particles", coords={"n_particles": n})
    assert rates.power(straight.assign_coords(stderr=("n_particles", 1e-3 / n))).flags == ()
    r = np.random.default_rng(0)
    table = values[:3] * xr.DataArray(np.exp(1e-3 * r.normal(size=(3, 12))), dims=("n_particles", "replica"))
    assert any("curved" in flag for flag in rates.power(table).flags)


def test_the_rate_of_a_lower_bound_says_so():
    series = noiseless(1.0, 1.0).assign_attrs(power=1, bound="lower")
    assert any(flag.startswith("bound:") for flag in rates.exponential(series).flags)
