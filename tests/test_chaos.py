"""Propagation of chaos: the coupling identities exactly, then the constants of the linear-quadratic model."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import xarray as xr

import mfsde
from mfsde.analysis import chaos, particles, rates, replicas
from mfsde.scenarios import DoubleWell, MeanFieldOU

OU = MeanFieldOU(kappa=1.0, coupling=2.0, sigma=0.7, initial_mean=(1.0, 0.0, -1.0, 0.5), initial_variance=0.3)
SIZES = (10, 20, 40, 80, 160)
DT, HORIZON, REPLICAS = 0.05, 1.5, 100
SETTINGS = {"horizon": HORIZON, "dt": DT, "seed": 7, "n_replicas": REPLICAS, "save_every": 6}
SMALL = {"n_particles": 6, "horizon": 0.4, "dt": 0.1, "seed": 1, "n_replicas": 3, "save_every": 1}
# Statistical statements are made at this many standard errors over replicas.
SIGMAS = 4.0


# The linear-quadratic model under Euler's scheme ----------------------------------------------------------------------
#
# With λ = κ + α, D = X^i - X̄^i obeys D' = -λD + α(m^N - m): it is the same for all i, hence the mean over i of
# X^i - X̄^i = (m^N - m) - ((1/N) Σ X̄^i - m). Both terms are driven by the mean of the noises, one relaxing at rate κ,
# one at rate λ. In Euler's scheme the powers a_j = (1 - κh)^j, l_j = (1 - λh)^j take the place of the exponentials, so
#     E|D_k|² = (d/N) [v₀ (a_k - l_k)² + σ²h Σ_{j<k} (a_j - l_j)²].


def powers(ou: MeanFieldOU, step: int, dt: float) -> tuple[np.ndarray, np.ndarray]:
    j = np.arange(step + 1)
    return (1 - ou.kappa * dt) ** j, (1 - (ou.kappa + ou.coupling) * dt) ** j


def euler_error(ou: MeanFieldOU, step: int, dt: float = DT) -> float:
    """N·E|D|²."""
    a, b = powers(ou, step, dt)
    noise = ou.sigma**2 * dt * np.square(a - b)[:step].sum()
    return len(ou.initial_mean) * (ou.initial_variance * (a[step] - b[step]) ** 2 + noise)


def euler_variance(ou: MeanFieldOU, rate: float, step: int, dt: float = DT) -> float:
    """Variance of one component relaxing at `rate`: N·Var(m^N) for κ, that of the limit for κ + α."""
    a = (1 - rate * dt) ** np.arange(step + 1)
    return ou.initial_variance * a[step] ** 2 + ou.sigma**2 * dt * np.square(a)[:step].sum()


def exact_error(ou: MeanFieldOU, t: float) -> float:
    """N·E|D_t|² of the equation itself."""
    k, lam = ou.kappa, ou.kappa + ou.coupling
    integral = sum(c * -math.expm1(-r * t) / r for c, r in ((1, 2 * k), (-2, k + lam), (1, 2 * lam)))
    start = ou.initial_variance * (math.exp(-k * t) - math.exp(-lam * t)) ** 2
    return len(ou.initial_mean) * (start + ou.sigma**2 * integral)


def euler_law(ou: MeanFieldOU, dt: float = DT):
    """The law of Euler's scheme; the drift asks for its mean only."""

    def at(t: float) -> mfsde.Gaussian:
        decay = (1 - ou.kappa * dt) ** round(t / dt)
        return mfsde.Gaussian([decay * m for m in ou.initial_mean], ou.initial_variance)

    return at


def nonlinear(ou: MeanFieldOU, **settings) -> xr.Dataset:
    return mfsde.simulate(mfsde.decoupled(ou, euler_law(ou, settings["dt"])), **settings)


def steps(values: xr.DataArray) -> list[int]:
    return [round(t / DT) for t in values["time"].values]


def z_scores(values: xr.DataArray, exact: list[float]) -> np.ndarray:
    """Distance in standard errors, where there is one (at the start all errors are 0)."""
    moving = values["stderr"].values > 0
    assert moving.sum() >= values.size - 1
    return ((values.values - np.asarray(exact)) / np.where(moving, values["stderr"].values, 1))[moving]


@pytest.fixture(scope="module")
def runs() -> dict[int, xr.Dataset]:
    return {n: mfsde.simulate(OU, n_particles=n, **SETTINGS) for n in SIZES}


@pytest.fixture(scope="module")
def reference() -> xr.Dataset:
    return nonlinear(OU, n_particles=max(SIZES), **SETTINGS)


@pytest.fixture(scope="module")
def pair() -> tuple[xr.Dataset, xr.Dataset]:
    return mfsde.simulate(OU, **SMALL), nonlinear(OU, **SMALL)


def made(x: np.ndarray, n_particles: int | None = None, weight: np.ndarray | None = None, **attrs: str) -> xr.Dataset:
    """A dataset of given particles (time, replica, particle, component), as a run would look."""
    dims = ("time", "replica", "particle", "component")
    data = {"position": (dims, x, attrs)} | ({} if weight is None else {"weight": (dims[:3], weight)})
    coords = {name: np.arange(size) for name, size in zip(dims, x.shape, strict=True)}
    coords["time"] = coords["time"] + 1.0
    return xr.Dataset(data, {**coords, "n_particles": n_particles or x.shape[2]})


def clouds(*shape: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape), rng.normal(size=shape)


# Identities -----------------------------------------------------------------------------------------------------------


def test_the_closed_form_is_that_of_the_moment_recursion_and_tends_to_the_equations():
    lam, d = OU.kappa + OU.coupling, len(OU.initial_mean)
    m2, dm, d2 = OU.initial_variance, 0.0, 0.0  # N·E M², N·E DM, N·E D²
    for step in range(31):
        assert euler_error(OU, step) == pytest.approx(d * d2, rel=1e-12, abs=1e-15)
        a, b, c = 1 - OU.kappa * DT, 1 - lam * DT, OU.coupling * DT
        m2, dm, d2 = a * a * m2 + OU.sigma**2 * DT, a * (b * dm + c * m2), b * b * d2 + 2 * b * c * dm + c * c * m2
    gaps = [abs(euler_error(OU, round(1 / h), h) - exact_error(OU, 1.0)) for h in (0.01, 0.005)]
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.05)
    assert gaps[1] < 5e-3 * exact_error(OU, 1.0)


def test_it_is_the_mean_square_of_the_differences():
    x, y = clouds(3, 2, 5, 2)
    found = chaos.squared_error(made(x, 5), made(y, 50))
    assert found.dims == ("time", "replica")
    np.testing.assert_allclose(found, np.square(x - y).sum(-1).mean(-1), rtol=1e-14)
    suprema = chaos.sup_squared_error(made(x, 5), made(y, 50))
    np.testing.assert_allclose(suprema, np.square(x - y).sum(-1).max(0).mean(-1), rtol=1e-14)
    # The supremum belongs to the particle: that of the particles' mean is smaller.
    assert (suprema.values > found.max("time").values + 0.1).all()


def test_in_the_linear_model_all_particles_of_a_replica_have_the_same_error():
    settings = {**SMALL, "dtype": torch.float64}
    run, reference = mfsde.simulate(OU, **settings), nonlinear(OU, **settings)
    means = (run.position - reference.position).mean("particle")
    found = chaos.squared_error(run, reference)
    np.testing.assert_allclose(found, np.square(means).sum("component"), rtol=1e-12, atol=1e-28)
    assert (found.isel(time=0) == 0).all()
    assert (found.isel(time=-1) > 0).all()


def test_particles_are_compared_by_label_and_a_larger_reference_changes_nothing():
    run = mfsde.simulate(OU, **SMALL)
    larger = nonlinear(OU, **{**SMALL, "n_particles": 11})
    expected = chaos.squared_error(run, nonlinear(OU, **SMALL))
    xr.testing.assert_identical(chaos.squared_error(run, larger), expected)
    shuffled = larger.isel(particle=[3, 9, 0, 5, 1, 4, 10, 2])
    xr.testing.assert_identical(chaos.squared_error(run, shuffled), expected)
    # In the order of storage the pairs would be wrong, and the error far larger.
    wrong = np.square(run.position.values - shuffled.position.values[:, :, :6]).sum(-1).mean(-1)
    assert (wrong[-1] > 3 * expected.values[-1]).all()


def test_particles_that_were_not_kept_are_not_needed():
    run, reference = (mfsde.simulate(s, **SMALL) for s in (OU, mfsde.decoupled(OU, euler_law(OU, 0.1))))
    kept = mfsde.simulate(OU, **SMALL, keep_particles=2)
    some = chaos.squared_error(kept, reference)
    xr.testing.assert_identical(some, chaos.squared_error(run.isel(particle=slice(2)), reference))
    assert some.attrs["n_particles"] == some["n_particles"] == 6


def test_differences_on_a_torus_are_the_shortest():
    x, y = (2.0 + c for c in clouds(2, 3, 7, 2))
    period = json.dumps([1.5, None])
    found = chaos.squared_error(made(x, 7, period=period), made(y, 70, period=period))
    images = np.min([np.abs(x - y + 1.5 * k)[..., 0] for k in range(-12, 13)], axis=0)
    np.testing.assert_allclose(found, (images**2 + (x - y)[..., 1] ** 2).mean(-1), rtol=1e-12)
    # Whole turns are no distance at all; without the period they would be.
    turned = y + np.array([3.0, 0.0])
    np.testing.assert_allclose(found, chaos.squared_error(made(x, 7, period=period), made(turned, 70, period=period)))
    assert (chaos.squared_error(made(x, 7), made(turned, 70)) > found + 1).all()


def test_unequal_masses_weigh_the_errors():
    x, y = clouds(2, 3, 4, 1)
    weight = np.random.default_rng(1).dirichlet(np.ones(4), size=(2, 3))
    run, reference = made(x, 4, weight, weighted="by the variable weight"), made(y, 40)
    expected = (np.square(x - y)[..., 0] * weight).sum(-1)
    np.testing.assert_allclose(chaos.squared_error(run, reference), expected, rtol=1e-13)
    assert abs(expected - np.square(x - y).mean((-1, -2))).min() > 1e-3
    # Of particles that were kept, the masses are renormalised.
    part = chaos.squared_error(run.isel(particle=slice(2)), reference)
    kept = weight[..., :2] / weight[..., :2].sum(-1, keepdims=True)
    np.testing.assert_allclose(part, (np.square(x - y)[..., :2, 0] * kept).sum(-1), rtol=1e-13)
    weak = chaos.weak_error(run, reference, lambda z: z[..., 0])
    np.testing.assert_allclose(weak, ((x - y)[..., 0] * weight).sum(-1).mean(1), rtol=1e-12)


def test_chunked_stored_and_in_memory_runs_give_the_same_numbers(tmp_path):
    settings = {**SMALL, "n_replicas": 9}
    for name, scenario in (("run", OU), ("reference", mfsde.decoupled(OU, euler_law(OU, 0.1)))):
        mfsde.simulate(scenario, store=tmp_path / name, **settings)
    stored = [mfsde.open_run(tmp_path / name) for name in ("run", "reference")]
    memory, lazy = [s.load() for s in stored], [s.chunk(time=2, replica=4) for s in stored]
    errors = chaos.squared_error(*lazy)
    assert errors.chunks is not None
    xr.testing.assert_identical(errors.compute(), chaos.squared_error(*memory))
    for f in (chaos.coupling_error, chaos.sup_error, chaos.uniform_error):
        xr.testing.assert_allclose(f(*lazy).compute(), f(*memory), rtol=1e-13)
    xr.testing.assert_allclose(chaos.weak_error(*lazy, square).compute(), chaos.weak_error(*memory, square), rtol=1e-13)
    lazy_fluctuation = chaos.fluctuation(lazy[0], square)
    assert lazy_fluctuation.chunks is not None
    xr.testing.assert_allclose(lazy_fluctuation.compute(), chaos.fluctuation(memory[0], square), rtol=1e-13)


def test_results_say_what_they_are(pair):
    found = chaos.coupling_error(*pair)
    assert found.name == "coupling_error"
    assert found.attrs == {
        "long_name": "coupling error E|X^{i,N} - X̄^i|²",
        "units": "1",
        "estimator": "synchronous coupling, reference: nonlinear process",
        "n_particles": 6,
        "power": 2,
    }
    assert {"time", "stderr", "kappa", "seed", "dt"} <= set(found.coords)
    supremum, uniform = chaos.sup_error(*pair), chaos.uniform_error(*pair)
    assert "supremum over 5 saved times" in supremum.attrs["estimator"]
    assert float(uniform) == float(found.max()) <= float(supremum)
    assert float(uniform["time"]) == float(found["time"][found.values.argmax()])
    # Where every replica has its maximum at one time, the jackknife is the standard error there.
    assert float(uniform["stderr"]) == pytest.approx(float(found["stderr"].sel(time=uniform["time"])), rel=1e-9)


# Statistics: the coupling error ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", SIZES)
def test_the_error_is_the_exact_one_of_eulers_scheme(runs, reference, n):
    found = chaos.coupling_error(runs[n], reference)
    assert abs(z_scores(found, [euler_error(OU, k) / n for k in steps(found)])).max() < SIGMAS
    # The constant of a coupling of 1.5 instead of 2 is rejected.
    faulty = replace(OU, coupling=1.5)
    assert abs(z_scores(found, [euler_error(faulty, k) / n for k in steps(found)])).max() > SIGMAS


def test_a_run_with_a_wrong_coupling_is_rejected(reference):
    # The fault is in the particles now, and hidden from the check that would refuse the pair.
    wrong = mfsde.simulate(replace(OU, coupling=1.5), n_particles=20, **SETTINGS)
    with pytest.raises(ValueError, match=r"not coupled: coupling is 1\.5 in one and 2\.0 in the other"):
        chaos.coupling_error(wrong, reference)
    hidden = wrong.assign_coords(coupling=2.0).assign_attrs(parameters=reference.attrs["parameters"])
    found = chaos.coupling_error(hidden, reference)
    assert abs(z_scores(found, [euler_error(OU, k) / 20 for k in steps(found)])).max() > SIGMAS


def test_the_slope_in_n_is_minus_one(runs, reference):
    table = chaos.table(reversed(runs.values()), reference, time=HORIZON)
    assert table.dims == ("n_particles", "replica")
    assert table["n_particles"].values.tolist() == list(SIZES)
    xr.testing.assert_equal(
        table.sel(n_particles=40).drop_vars("n_particles"),
        chaos.squared_error(runs[40], reference).sel(time=HORIZON).drop_vars("n_particles"),
    )
    rate = rates.power(table, over="n_particles")
    assert rate.low < -1 < rate.high
    assert rate.high - rate.low < 0.25
    # The slope of the root, and of marginal distances on the line, lie outside; so does a planted 1/√N.
    assert not rate.low < -0.5 < rate.high
    planted = rates.power(table * table["n_particles"] ** 0.5, over="n_particles")
    assert not planted.low < -1 < planted.high


def test_the_supremum_has_the_same_slope(runs, reference):
    table = chaos.table(runs.values(), reference)
    rate = rates.power(table, over="n_particles")
    assert rate.low < -1 < rate.high
    for n in SIZES:
        mean = float(table.sel(n_particles=n).mean())
        assert mean == pytest.approx(float(chaos.sup_error(runs[n], reference)), rel=1e-12)
        assert mean >= float(chaos.uniform_error(runs[n], reference))


def test_the_law_of_the_equation_leaves_a_floor_of_the_schemes_error():
    # The nonlinear process at the mean e^{-κt} instead of (1 - κh)^k is off by a deterministic b_k, whatever N.
    dt, n = 0.25, 200
    settings = {**SETTINGS, "dt": dt, "n_particles": n, "save_every": 1}
    found = chaos.coupling_error(
        mfsde.simulate(OU, **settings), mfsde.simulate(mfsde.decoupled(OU, OU.limit), **settings)
    )
    a, floor, offset = powers(OU, 6, dt)[0], [0.0], 0.0
    for k in range(6):
        gap = a[k] - math.exp(-OU.kappa * k * dt)
        offset = (1 - (OU.kappa + OU.coupling) * dt) * offset + OU.coupling * dt * gap
        floor.append(offset**2 * np.square(OU.initial_mean).sum())
    chaos_only = [euler_error(OU, k, dt) / n for k in range(7)]
    # At the first step both laws still have the same mean.
    assert abs(z_scores(found, np.add(chaos_only, floor))).max() < SIGMAS
    assert abs(z_scores(found, chaos_only)).max() > SIGMAS


def test_a_large_system_measures_less_and_its_own_error_makes_up_for_it(runs):
    # E|X^{N} - X^{M}|² = C/N - C/M exactly in the linear model, and E|X^{M/2} - X^{M}|² = C/M.
    small, coarse, large = runs[20], runs[40], runs[80]
    bare, full = chaos.coupling_error(small, large), chaos.coupling_error(small, large, coarse)
    exact = np.array([euler_error(OU, k) for k in steps(bare)])
    assert abs(z_scores(bare, exact * (1 / 20 - 1 / 80))).max() < SIGMAS
    assert abs(z_scores(bare, exact / 20)).max() > SIGMAS
    assert abs(z_scores(full, exact / 20)).max() < SIGMAS
    np.testing.assert_allclose(full, bare + full["reference_error"], rtol=1e-12)
    # The scatter of the reference's own error, for this test alone.
    per_replica = chaos.squared_error(small, large, coarse)["reference_error"]
    own = replicas.mean_and_error(per_replica.drop_vars("reference_error"))
    assert abs(z_scores(own, exact / 80)).max() < SIGMAS
    # Independent systems would have E|X^{M/2} - X^{M}|² = 3C/M, hence a third of this for the reference's own error.
    assert abs(z_scores(own, exact / 240)).max() > SIGMAS
    table = chaos.table([runs[10], small], large, time=HORIZON, coarse_reference=coarse)
    np.testing.assert_allclose(table.sel(n_particles=20).mean(), full.sel(time=HORIZON), rtol=1e-12)
    assert "plus the reference's own error, reference: system of 80 particles" in full.attrs["estimator"]
    quarter = chaos.squared_error(runs[10], large, small)["reference_error"]
    quarter = replicas.mean_and_error(quarter.drop_vars("reference_error"))
    assert abs(z_scores(quarter, exact / 80)).max() < SIGMAS


def test_the_reference_of_a_nonlinear_model_is_corrected_to_leading_order():
    well = DoubleWell(initial_mean=(0.5, -0.2), sigma=0.9)
    settings = {**SETTINGS, "n_replicas": 300, "horizon": 1.0, "save_every": None}
    systems = {n: mfsde.simulate(well, n_particles=n, **settings) for n in (20, 40, 80, 1280)}
    truth = chaos.squared_error(systems[20], systems[1280])
    bare, full = chaos.squared_error(systems[20], systems[80]), chaos.squared_error(*(systems[n] for n in (20, 80, 40)))
    for found, holds in ((full, True), (bare, False)):
        gap = replicas.mean_and_error((found - truth).isel(time=-1).reset_coords(drop=True))
        # The reference of 1280 particles has an error too, a 64th of what is measured.
        slack = float(truth.isel(time=-1).mean()) / 64
        assert (abs(float(gap)) < SIGMAS * float(gap["stderr"]) + slack) is holds


def test_the_error_stays_bounded_where_the_mean_is_attracted_and_grows_where_it_is_not():
    settings = {**SETTINGS, "horizon": 8.0, "n_particles": 20, "save_every": 8}
    found = {}
    for kappa in (1.0, 0.0):
        ou = replace(OU, kappa=kappa)
        found[kappa] = chaos.uniform_in_time(
            chaos.squared_error(mfsde.simulate(ou, **settings), nonlinear(ou, **settings))
        )
    assert found[1.0].low < 0 < found[1.0].high
    assert found[1.0].flags == ()
    assert found[1.0].window == (4.0, 8.0)
    # Without attraction the mean is a Brownian motion: the error grows like t, log-linearly fitted over [4, 8].
    t = np.arange(10, 21) * 0.4
    expected = np.polyfit(t, np.log([euler_error(replace(OU, kappa=0.0), round(s / DT)) for s in t]), 1)[0]
    assert found[0.0].low < expected < found[0.0].high
    assert found[0.0].low > 0
    assert "the error grows" in found[0.0].flags[0]


def test_growth_of_a_known_rate_is_found_exactly():
    t = np.linspace(0, 4, 9)
    errors = xr.DataArray(np.outer(np.exp(0.3 * t), [1.0, 2.0, 4.0]), {"time": t}, ("time", "replica"))
    rate = chaos.uniform_in_time(errors)
    assert rate.value == pytest.approx(0.3, rel=1e-12)
    assert rate.prefactor == pytest.approx(7 / 3, rel=1e-12)
    assert rate.high - rate.low < 1e-10
    noisy = errors * np.exp(np.random.default_rng(0).normal(size=errors.shape))
    assert "lets the error double" in chaos.uniform_in_time(noisy).flags[0]


# Statistics: weak errors and fluctuations -----------------------------------------------------------------------------


def square(x: np.ndarray) -> np.ndarray:
    return np.square(x).sum(-1)


def first(x: np.ndarray) -> np.ndarray:
    return x[..., 0]


def test_the_weak_error_is_the_exact_one(runs, reference):
    # X^i - m^N has variance (1 - 1/N) v, m^N has p/N, and they are uncorrelated: E|X^i|² - E|X̄|² = d (p - v)/N.
    found = chaos.weak_error(runs[20], reference, square)
    d, lam = len(OU.initial_mean), OU.kappa + OU.coupling
    exact = [d * (euler_variance(OU, OU.kappa, k) - euler_variance(OU, lam, k)) / 20 for k in steps(found)]
    assert abs(z_scores(found, exact)).max() < SIGMAS
    assert abs(z_scores(found, [-e for e in exact])).max() > SIGMAS
    assert abs(z_scores(found, [0.0 for e in exact])).max() > SIGMAS


def test_the_coupling_reduces_the_variance_by_the_exact_ratio(runs, reference):
    # For φ = x₁ the difference of means is D itself: the ratio is (p + v)/N over E D²/N per component.
    found = chaos.weak_error(runs[20], reference, first)["variance_reduction"].values[1:]
    late = steps(runs[20])[1:]
    both = [euler_variance(OU, r, k) for k in late for r in (OU.kappa, OU.kappa + OU.coupling)]
    exact = np.array(both).reshape(-1, 2).sum(1) / [euler_error(OU, k) / len(OU.initial_mean) for k in late]
    # Each of the three variances has relative error √(2/(R-1)); the logarithm of the ratio at most twice that.
    tolerance = SIGMAS * 2 * math.sqrt(2 / (REPLICAS - 1))
    assert abs(np.log(found / exact)).max() < tolerance
    # Independent runs would have ratio 1.
    assert abs(np.log(1 / exact)).min() > tolerance


def test_the_fluctuation_is_what_it_says():
    x = np.random.default_rng(0).normal(size=(2, 9, 5, 1)) + 1e3
    found = chaos.fluctuation(made(x), first)
    means = x[..., 0].mean(-1)
    np.testing.assert_allclose(found, 5 * means.var(1, ddof=1), rtol=1e-9)
    np.testing.assert_allclose(found["iid"], x.reshape(2, -1).var(1, ddof=1), rtol=1e-9)
    without = [np.delete(x[..., 0], r, axis=1) for r in range(9)]
    variances = np.array([5 * w.mean(-1).var(1, ddof=1) for w in without])
    np.testing.assert_allclose(found["stderr"], replicas.jackknife_error(variances), rtol=1e-9)
    ratios = variances / [w.reshape(2, -1).var(1, ddof=1) for w in without]
    np.testing.assert_allclose(found["ratio_stderr"], replicas.jackknife_error(ratios), rtol=1e-8)
    np.testing.assert_allclose(found["ratio"], found / found["iid"], rtol=1e-12)


def test_the_fluctuation_of_interacting_particles_is_not_that_of_independent_ones():
    ou = replace(OU, initial_mean=(1.0,))
    settings = {**SETTINGS, "n_replicas": 500, "n_particles": 20}
    found = chaos.fluctuation(mfsde.simulate(ou, **settings), first)
    free = chaos.fluctuation(nonlinear(ou, **settings), first)
    interacting = [euler_variance(ou, ou.kappa, k) for k in steps(found)]
    independent = [euler_variance(ou, ou.kappa + ou.coupling, k) for k in steps(found)]
    assert abs(z_scores(found, interacting)).max() < SIGMAS
    assert abs(z_scores(found, independent)).max() > SIGMAS
    assert abs(z_scores(free, independent)).max() < SIGMAS
    assert abs(z_scores(free, interacting)).max() > SIGMAS
    # The ratio sees it without knowing the variances.
    assert (abs(free["ratio"] - 1) < SIGMAS * free["ratio_stderr"]).all()
    assert (abs(found["ratio"] - 1) > SIGMAS * found["ratio_stderr"]).isel(time=-1)
    # One particle has variance v + (p - v)/N; RN of them, nearly independent, know it to √(2/RN).
    one = np.array(independent) + (np.array(interacting) - independent) / 20
    assert (abs(found["iid"] / one - 1) < SIGMAS * math.sqrt(2 * 3 / (500 * 20))).all()


def test_the_chi_squared_interval_covers():
    # 400 samples of a Gaussian linear statistic: 95 % ± 4 s.e. of a proportion.
    x = np.random.default_rng(3).normal(size=(400, 10, 6, 1))
    found = chaos.fluctuation(made(x), first)
    covered = float(((found["low"] < 1) & (found["high"] > 1)).mean())
    assert abs(covered - 0.95) < SIGMAS * math.sqrt(0.95 * 0.05 / 400)
    # The symmetric interval of two jackknife errors misses more often: that is why `low` and `high` exist.
    assert float((abs(found - 1) < 2 * found["stderr"]).mean()) < 0.95 - SIGMAS * math.sqrt(0.95 * 0.05 / 400)


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 2}, r"seed is 1 in one and 2 in the other"),
        ({"dt": 0.05, "save_every": 2}, r"dt is 0\.1 in one and 0\.05"),
        ({"noise": mfsde.Noise(1, substeps=2)}, r"substeps is 1 in one and 2"),
        ({"method": "srk"}, r"method is euler in one and srk"),
    ],
)
def test_paths_that_are_not_shared_are_refused(pair, change, named):
    other = nonlinear(OU, **{**SMALL, **change})
    with pytest.raises(ValueError, match=rf"not coupled: .*{named}.*simulate both with the same"):
        chaos.squared_error(pair[0], other)


def test_other_equations_are_refused(pair):
    well = mfsde.simulate(DoubleWell(initial_mean=OU.initial_mean), **SMALL)
    with pytest.raises(ValueError, match=r"not coupled: scenario is MeanFieldOU in one and DoubleWell"):
        chaos.squared_error(pair[0], well)
    with pytest.raises(ValueError, match=r"not coupled: source of the scenario is "):
        chaos.squared_error(pair[0], pair[1].assign_attrs(scenario_source="edited"))


def test_starts_that_differ_are_refused_whatever_the_attributes_say(pair):
    moved = pair[1].copy()
    moved["position"] = moved.position.roll(replica=1)
    with pytest.raises(ValueError, match=r"start from different points, up to .* apart"):
        chaos.squared_error(pair[0], moved)


def test_times_components_and_replicas_must_match(pair):
    run, reference = pair
    for dim in ("time", "component", "replica"):
        with pytest.raises(ValueError, match=rf"labels along '{dim}' differ"):
            chaos.squared_error(run, reference.isel({dim: slice(1, None)}))
    with pytest.raises(ValueError, match=r"expected the same\. Select from both alike"):
        chaos.squared_error(run, reference.isel(time=-1))
    with pytest.raises(ValueError, match=r"time is 0\.3 in one and 0\.4 in the other"):
        chaos.squared_error(run.isel(time=-2), reference.isel(time=-1))
    xr.testing.assert_equal(
        chaos.squared_error(run.isel(time=-1), reference.isel(time=-1)),
        chaos.squared_error(run, reference).isel(time=-1),
    )


def test_references_that_say_nothing_are_refused(pair):
    run, reference = pair
    same = mfsde.simulate(OU, **SMALL)
    with pytest.raises(ValueError, match=r"both systems of 6 particles with the same noise"):
        chaos.squared_error(run, same)
    smaller = mfsde.simulate(OU, **{**SMALL, "n_particles": 4})
    with pytest.raises(ValueError, match=r"reference has 4 particles and run 6; .*Swap them"):
        chaos.squared_error(run, smaller)
    with pytest.raises(ValueError, match=r"run is a decoupled run"):
        chaos.squared_error(reference, run)
    few = nonlinear(OU, **{**SMALL, "n_particles": 4})
    with pytest.raises(ValueError, match=r"stored 4 particles and lacks some of the 6 of run"):
        chaos.squared_error(run, few)
    larger = mfsde.simulate(OU, **{**SMALL, "n_particles": 8})
    with pytest.raises(ValueError, match=r"a decoupled run is the nonlinear process and has none"):
        chaos.squared_error(run, reference, larger)
    with pytest.raises(ValueError, match=r"coarse_reference has 8 particles and reference 8; expected fewer"):
        chaos.squared_error(run, larger, larger)


def test_what_is_no_run_is_refused(pair):
    with pytest.raises(TypeError, match=r"run is a DataArray; expected a run Dataset"):
        chaos.squared_error(pair[0].position, pair[1])
    with pytest.raises(TypeError, match=r"coarse_reference is a str"):
        chaos.squared_error(pair[0], mfsde.simulate(OU, **{**SMALL, "n_particles": 8}), "coarse")
    with pytest.raises(ValueError, match=r"has no `position`"):
        chaos.squared_error(pair[0].drop_vars("position"), pair[1])


@pytest.mark.parametrize("time", [0, 2])
@pytest.mark.parametrize("which", [0, 1])
def test_values_that_are_not_finite_are_refused(pair, which, time):
    bad = [ds.copy(deep=True) for ds in pair]
    bad[which].position[time, 0, 0, 0] = np.nan
    for f in (chaos.squared_error, chaos.sup_error, lambda a, b: chaos.weak_error(a, b, square)):
        with pytest.raises(ValueError, match=r"not finite"):
            f(*bad)
    with pytest.raises(ValueError, match=r"not finite"):
        chaos.fluctuation(made(np.full((1, 9, 4, 1), np.inf)), first)


def test_one_replica_has_no_interval(pair):
    one = [ds.isel(replica=[0]) for ds in pair]
    calls = (chaos.coupling_error, chaos.sup_error, chaos.uniform_error, lambda a, b: chaos.weak_error(a, b, square))
    for f in calls:
        with pytest.raises(ValueError, match=r"at least two independent replicas"):
            f(*one)
    with pytest.raises(ValueError, match=r"at least two independent replicas"):
        chaos.uniform_in_time(chaos.squared_error(*one))
    with pytest.raises(ValueError, match=r"variance over 3 replicas has a relative error of 100%.*at least 8"):
        chaos.fluctuation(pair[0], first)


def test_fluctuations_need_all_particles_and_equal_masses():
    run = mfsde.simulate(OU, **{**SMALL, "n_replicas": 8}, keep_particles=3)
    with pytest.raises(ValueError, match=r"the mean over 3 of 6 interacting particles"):
        chaos.fluctuation(run, first)
    x, weight = np.zeros((1, 8, 2, 1)), np.full((1, 8, 2), 0.5)
    with pytest.raises(ValueError, match=r"unequal masses"):
        chaos.fluctuation(made(x, 2, weight), first)


def test_a_function_of_the_particles_keeps_their_axis(pair):
    with pytest.raises(ValueError, match=r"φ returned shape .* one number for each particle"):
        chaos.weak_error(*pair, lambda x: x)
    with pytest.raises(ValueError, match=r"φ of the particles.*not finite"):
        chaos.weak_error(*pair, lambda x: np.full(x.shape[:-1], np.nan))


@dataclass(frozen=True)
class Selected(MeanFieldOU):
    """Particles to the right of their mean die, those to the left are copied."""

    selection: float = 1.0

    def birth_death_rate(self, t: float, x: torch.Tensor, mu: mfsde.EmpiricalMeasure) -> torch.Tensor:
        return self.selection * x.sum(-1)


def test_particles_that_are_born_and_die_have_no_paths_to_compare():
    settings = {**SMALL, "n_particles": 12}
    born, large, larger = (
        mfsde.simulate(Selected(), **{**settings, "n_particles": n}) for n in (12, 24, 48)
    )  # fmt: skip
    assert {"parent", "events"} <= set(born)
    compared = (
        lambda run, other: chaos.squared_error(run, other),
        lambda run, other: chaos.coupling_error(run, other),
        lambda run, other: chaos.sup_error(run, other),
        lambda run, other: chaos.uniform_error(run, other),
        lambda run, other: chaos.weak_error(run, other, lambda x: x[..., 0]),
        lambda run, other: chaos.table([run, large], other),
    )
    moved = mfsde.simulate(MeanFieldOU(), **settings)
    reasons = r"are born and die in this run \(.*\), so that .* Measure laws instead: wasserstein\.to_law\(run, law\)"
    for compare in compared:
        for run, name in ((born, "`parent` and `events`"), (born.drop_vars(["parent", "events"]), "reaction 'jumps'")):
            with pytest.raises(ValueError, match=reasons) as problem:
                compare(run, larger)
            assert name in str(problem.value)
    for run, other in ((moved, larger), (born, mfsde.simulate(MeanFieldOU(), **{**settings, "n_particles": 24}))):
        with pytest.raises(ValueError, match=reasons):
            chaos.squared_error(run, other)
    with pytest.raises(ValueError, match=r"coarse_reference: particles are born and die"):
        chaos.squared_error(moved, mfsde.simulate(MeanFieldOU(), **{**settings, "n_particles": 48}), large)
    # A fluctuation is one of laws; and masses that change move no particle to another's place.
    many = mfsde.simulate(Selected(), **{**settings, "n_replicas": 8})
    assert bool(np.isfinite(chaos.fluctuation(many, lambda x: x[..., 0])).all())
    weighted = [
        mfsde.simulate(Selected(), method="euler+weights", **{**settings, "n_particles": n}) for n in (12, 24)
    ]  # fmt: skip
    assert float(chaos.squared_error(*weighted).isel(time=-1).mean()) > 0


def test_growth_of_nothing_is_refused(pair):
    errors = chaos.squared_error(*pair)
    with pytest.raises(ValueError, match=r"the error vanishes"):
        chaos.uniform_in_time(0 * errors)
    with pytest.raises(ValueError, match=r"2 saved times in the second half"):
        chaos.uniform_in_time(errors.isel(time=slice(3)))


def test_tables_of_runs_that_do_not_belong_together_are_refused(pair):
    run, reference = pair
    smaller = mfsde.simulate(OU, **{**SMALL, "n_particles": 4})
    with pytest.raises(ValueError, match=r"\[6\] particles; expected at least two different sizes"):
        chaos.table([run], reference)
    with pytest.raises(ValueError, match=r"\[6, 4, 6\] particles"):
        chaos.table([run, smaller, run], reference)
    with pytest.raises(ValueError, match=r"1 references for 2 runs"):
        chaos.table([run, smaller], [reference])
    with pytest.raises(ValueError, match=r"time 0\.35 was not saved; the nearest saved time is 0\.[34]"):
        chaos.table([run, smaller], reference, time=0.35)
    with pytest.raises(ValueError, match=r"not as suprema; pass time="):
        chaos.table([run, smaller], reference, coarse_reference=reference)
    other = mfsde.simulate(replace(OU, sigma=0.1), **{**SMALL, "n_particles": 4})
    with pytest.raises(ValueError, match=r"differ in more than their size: sigma is 0\.7 in one and 0\.1"):
        chaos.table([run, other], reference)
    with pytest.raises(TypeError, match=r"runs\[1\] is a DataArray"):
        chaos.table([run, smaller.position], reference)


def test_the_torus_of_a_run_is_that_of_its_reference():
    x, y = clouds(2, 3, 4, 1)
    with pytest.raises(ValueError, match=r"different tori"):
        chaos.squared_error(made(x, 4, period="[1.0]"), made(y, 40, period="[2.0]"))
    assert particles.period(made(x)["position"]) is None
