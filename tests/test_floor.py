"""The sampling floor and its removal, the geometry of Gaussians, and errors from replicas.

Identities first. A debiased statistic is then shown to have mean zero at equal laws over many independent repeats, to 4
standard errors, while the raw squared distance, whose mean is the floor, is rejected by the same test. Repeats are laid
along `time`.
"""

import itertools
import math

import numpy as np
import pytest
import xarray as xr
from scipy import linalg, stats

from mfsde import Gaussian, Uniform
from mfsde.analysis import bures, floor, replicas
from mfsde.analysis.wasserstein import between, debiased, distance, to_law

SE = 4.0


def rng(seed=5):
    return np.random.default_rng(seed)


def run(r, t=1, n=40, d=1, seed=5, scale=1.0, shift=0.0):
    values = shift + scale * rng(seed).normal(size=(t, r, n, d))
    coords = {"time": np.arange(t) * 0.5, "replica": np.arange(r), "component": np.arange(d)}
    return xr.DataArray(values, coords=coords, dims=("time", "replica", "particle", "component"), name="position")


def standard(d):
    return Gaussian([0.0] * d, 1.0)


def z_score(repeats):
    """Mean over independent repeats in units of its standard error."""
    repeats = np.asarray(repeats)
    return float(repeats.mean() / (repeats.std(ddof=1) / math.sqrt(len(repeats))))


def means_without_one(values):
    return np.array([np.delete(values, r).mean() for r in range(len(values))])


# Jackknife values


@pytest.mark.parametrize("r", [3, 4, 9])
def test_quantile_values_are_the_brute_force_statistic_over_pairs(r):
    gap = rng().normal(0.3, 1.0, size=(r, 12))

    def statistic(rows):
        return np.mean([gap[a] @ gap[b] / 12 for a, b in itertools.permutations(rows, 2)])

    values = floor.quantile_values(gap)
    assert values.mean() == pytest.approx(statistic(range(r)), abs=1e-12)
    expected = [statistic([a for a in range(r) if a != gone]) for gone in range(r)]
    np.testing.assert_allclose(means_without_one(values), expected, atol=1e-12)
    np.testing.assert_allclose(values, floor.quantile_values(gap, np.square(gap).mean(1)), atol=1e-14)
    # A planted fault: with the pairs r = s, whose mean is the floor.
    assert abs(values.mean() - np.square(gap.mean(0)).mean()) > 0.01


@pytest.mark.parametrize(("r", "partners"), [(3, 1), (3, 2), (5, 2), (6, 2), (9, 1), (9, 3), (4, 8)])
def test_pair_values_are_the_brute_force_statistic_over_pairs(r, partners):
    pairs = floor.pairing(r, partners)
    assert len({frozenset(pair) for pair in pairs.tolist()}) == len(pairs)
    assert all(a != b for a, b in pairs)
    assert set(np.bincount(pairs.ravel(), minlength=r)) == {min(2 * partners, r - 1)}
    h = rng().normal(size=(r, r))
    h = h + h.T
    chosen = h[pairs[:, 0], pairs[:, 1]]
    values = floor.pair_values(chosen, pairs, r)
    assert values.mean() == pytest.approx(chosen.mean(), abs=1e-12)
    expected = [np.mean([h[a, b] for a, b in pairs if gone not in (a, b)]) for gone in range(r)]
    np.testing.assert_allclose(means_without_one(values), expected, atol=1e-12)


def test_moment_values_are_the_pseudo_values_of_the_pooled_distance():
    x, y = rng(1).normal(size=(6, 30, 3)), 1.3 * rng(2).normal(size=(6, 30, 3))

    def pooled(u, v):
        moments = [(z.reshape(-1, 3).mean(0), np.cov(z.reshape(-1, 3).T, bias=True)) for z in (u, v)]
        return bures.squared(*moments[0], *moments[1]), bures.squared(0.0 * moments[0][0], moments[0][1], *moments[1])

    values, part = floor.moment_values(bures.moments(x), bures.moments(y))
    without = np.array([pooled(np.delete(x, r, 0), np.delete(y, r, 0))[0] for r in range(6)])
    np.testing.assert_allclose(values, 6 * pooled(x, y)[0] - 5 * without, atol=1e-11)
    error = values.std(ddof=1) / math.sqrt(6)
    assert error == pytest.approx(float(replicas.jackknife_error(without)), rel=1e-9)
    assert 0 < part.mean() <= values.mean() + 1e-12


# `debiased`: identities


@pytest.mark.parametrize(
    ("estimator", "d", "tolerance"), [("quantile", 1, 0), ("transport", 2, 0), ("gaussian", 2, 1e-9)]
)
def test_a_copy_of_the_run_is_at_distance_zero(estimator, d, tolerance):
    x = run(5, t=2, d=d)
    found = debiased(x, x.copy(), estimator=estimator)
    assert float(abs(found).max()) <= tolerance
    assert float(abs(found.half).max()) <= tolerance
    # A planted fault: the same particles in other replicas are another sample.
    assert float(abs(debiased(x, x.isel(replica=[1, 2, 3, 4, 0]).assign_coords(replica=x.replica))).max()) > 1e-4


@pytest.mark.parametrize(("estimator", "d"), [("quantile", 1), ("transport", 1), ("transport", 3), ("gaussian", 3)])
def test_half_is_the_statistic_of_the_first_half_of_the_particles(estimator, d):
    x, y = run(4, t=2, n=20, d=d), run(4, t=2, n=20, d=d, seed=6, shift=0.5)
    first = {"particle": slice(10)}
    for reference in (y, standard(d)):
        if estimator == "transport" and reference is not y:
            continue
        half = reference if reference is not y else y.isel(first)
        expected = debiased(x.isel(first), half, estimator=estimator)
        found = debiased(x, reference, estimator=estimator).half
        np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("d", [1, 2])
def test_transport_is_the_brute_force_statistic(d):
    a, b = run(7, n=15, d=d), run(7, n=15, d=d, seed=6, shift=0.4)
    found = debiased(a, b, estimator="transport", partners=2)
    x, y = a.values[0], b.values[0]

    def squared(u, v):
        return distance(u, v) ** 2

    pairs = [(i, (i + k) % 7) for k in (1, 2) for i in range(7)]
    parts = [
        0.5 * (squared(x[i], y[j]) + squared(x[j], y[i]) - squared(x[i], x[j]) - squared(y[i], y[j])) for i, j in pairs
    ]
    assert float(found.mean()) == pytest.approx(np.mean(parts), abs=1e-12)
    assert ("shape" in found.coords) == (d > 1)


def test_the_quantile_statistic_is_the_squared_distance_less_its_floor():
    x, law = run(6, n=25, shift=0.7), standard(1)
    found = debiased(x, law)
    raw = float(np.square(to_law(x, law)).mean())
    assert float(found.mean()) < raw
    np.testing.assert_allclose(to_law(x, law).unbiased, found, atol=1e-12)
    np.testing.assert_allclose(
        to_law(run(6, d=2), standard(2)).unbiased, debiased(run(6, d=2), standard(2)), atol=1e-12
    )
    assert "unbiased" not in to_law(run(2), law).coords


def test_the_runs_may_differ_in_their_numbers():
    x, y = run(4, n=20), run(6, n=30, seed=6)
    same = y.isel(replica=slice(4), particle=slice(20))
    np.testing.assert_array_equal(debiased(x, y), debiased(x, same))
    end = y.isel(time=0, drop=True)
    np.testing.assert_array_equal(debiased(x, end), debiased(x, same))


# `debiased`: statistics

CASES = [
    ("quantile", 1, 40, 200),
    ("gaussian", 1, 40, 200),
    ("gaussian", 2, 40, 200),
    ("gaussian", 10, 60, 100),
    ("transport", 1, 20, 40),
    ("transport", 2, 20, 40),
    ("transport", 10, 16, 40),
]


@pytest.mark.parametrize(("estimator", "d", "n", "repeats"), CASES)
def test_equal_laws_are_at_mean_distance_zero(estimator, d, n, repeats):
    x, y = run(4, t=repeats, n=n, d=d, seed=1), run(4, t=repeats, n=n, d=d, seed=2)
    found = debiased(x, y, estimator=estimator)
    assert abs(z_score(found.mean("replica"))) < SE
    assert abs(z_score(found.half.mean("replica"))) < SE
    # The planted fault is the raw statistic: its mean is the floor.
    if estimator == "gaussian":
        (m, s), (k, u) = (bures.moments(z.values) for z in (x, y))
        raw = bures.squared(m, bures.covariance(m, s), k, bures.covariance(k, u)).mean(1)
    else:
        raw = np.square(between(x, y)).mean("replica")
    assert z_score(raw) > 3 * SE
    # A shift of half a standard deviation in every direction is seen, at its size.
    few = {"time": slice(30)}
    moved = debiased(x.isel(few), y.isel(few) + 0.5, estimator=estimator).mean("replica")
    assert abs(z_score(moved - 0.25 * d)) < SE
    assert z_score(moved) > SE


@pytest.mark.parametrize(("d", "n"), [(1, 40), (2, 40), (10, 60)])
def test_a_sampled_law_is_at_mean_distance_zero_from_its_law(d, n):
    x = run(4, t=200, n=n, d=d, seed=3)
    found = to_law(x, standard(d))
    assert abs(z_score(found.unbiased.mean("replica"))) < SE
    assert z_score(np.square(found).mean("replica")) > 3 * SE


def test_a_change_of_scale_keeps_the_assignment():
    # W₂²(x, sy) = |x|² + s²|y|² - 2s C and W₂²(x, y) = |x|² + |y|² - 2C with one C: the statistic at scale s follows.
    s, d, r = 1.1, 10, 4
    x, y = run(r, n=30, d=d), run(r, n=30, d=d, seed=6)
    squared = {
        (a, b): distance(u, v) ** 2
        for (a, u), (b, v) in itertools.product([*enumerate(x.values[0]), *enumerate(y.values[0], r)], repeat=2)
    }
    norm = np.square(np.concatenate([x.values[0], y.values[0]])).sum(-1).mean(-1)
    total = []
    for a, b in itertools.permutations(range(r), 2):
        c = (norm[a] + norm[r + b] - squared[a, r + b]) / 2
        across = norm[a] + s**2 * norm[r + b] - 2 * s * c
        total.append(across - 0.5 * squared[a, b] - 0.5 * s**2 * squared[r + a, r + b])
    found = debiased(x, s * y, partners=2)
    assert float(found.mean()) == pytest.approx(np.mean(total), abs=1e-10)


def test_a_change_of_scale_is_biased_by_half_the_floor_and_shape_sees_it():
    # By the identity above E U = (s - 1)²(d - F/2), F = E W₂²(μ_N, μ'_N), where W₂² = (s - 1)² d.
    d, n, s, times = 10, 50, 2.0, 12
    x, y = run(6, t=times, n=n, d=d, seed=1), run(6, t=times, n=n, d=d, seed=2, scale=s)
    found = debiased(x, y, partners=1)
    below = np.square(between(x.isel(replica=[0, 2, 4]), x.isel(replica=[1, 3, 5]).assign_coords(replica=[0, 2, 4])))
    mean = found.mean("replica")
    assert abs(z_score(mean - (s - 1) ** 2 * (d - 0.5 * below.mean("replica")))) < SE
    assert z_score(mean - (s - 1) ** 2 * d) < -2 * SE
    assert abs(z_score(found["shape"].mean("replica") - (s - 1) ** 2 * d)) < SE
    # A translation has no shape.
    moved = debiased(x, run(6, t=times, n=n, d=d, seed=3, shift=0.5), partners=1)
    assert abs(z_score(moved["shape"].mean("replica"))) < SE


# What `debiased` refuses


def test_what_cannot_be_debiased_is_refused():
    x, y = run(4, d=2), run(4, d=2, seed=6)
    for r in (1, 2):
        with pytest.raises(ValueError, match=rf"takes at least 3; the run has {r}\. Simulate with n_replicas=8"):
            debiased(x.isel(replica=slice(r)), y)
    with pytest.raises(ValueError, match=r"the run has 4 replicas but the reference 3; .* Simulate the reference"):
        debiased(x, y.isel(replica=slice(3)))
    for a, b in ((x.isel(particle=[0]), y), (x, y.isel(particle=[0])), (x.isel(particle=[0]), standard(2))):
        with pytest.raises(ValueError, match=r"N/2 particles takes N >= 2"):
            debiased(a, b)
    with pytest.raises(ValueError, match=r"estimator 'moments' is unknown; expected quantile, gaussian or transport"):
        debiased(x, y, estimator="moments")
    with pytest.raises(ValueError, match=r"quantile estimator needs one dimension .* \(d = 2\); use estimator='trans"):
        debiased(x, y, estimator="quantile")
    torus = {"period": "[1.0, 1.0]"}
    with pytest.raises(ValueError, match=r"gaussian estimator needs Euclidean space and equal masses; use 'transport'"):
        debiased(x.assign_attrs(torus), y.assign_attrs(torus), estimator="gaussian")
    with pytest.raises(ValueError, match=r"labels along 'time' differ"):
        debiased(x, y.assign_coords(time=y.time + 1e-12))
    with pytest.raises(ValueError, match=r"labels along 'component' differ"):
        debiased(x, run(4, d=3))
    with pytest.raises(ValueError, match=r"lives in dimension 1, the particles in dimension 2"):
        debiased(x, standard(1))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("estimator", "d"), [("quantile", 1), ("gaussian", 1), ("gaussian", 2), ("transport", 2)])
def test_particles_that_are_not_finite_are_refused(estimator, d, bad):
    x, y = run(4, d=d), run(4, d=d, seed=6)
    x[0, 1, 3, 0] = bad
    for a, b in ((x, y), (y, x), (x, standard(d))):
        with pytest.raises(ValueError, match="not finite"):
            debiased(a, b, estimator=estimator)


def test_a_law_without_moments_is_sampled_or_refused():
    class Box(Uniform):
        mean = cov = None

    x, tail = run(8, n=100, d=2, seed=1), replicas.t_quantile(8, 0.999)
    with pytest.raises(ValueError, match=r"Box states no mean and cov, .* estimator='transport'"):
        debiased(x, Box([-1.0, -1.0], 1.0), estimator="gaussian")
    # The error of the law's sample is in the scatter over replicas.
    found = debiased(x, Gaussian([0.8, 0.0], 1.0), estimator="transport")
    assert abs(z_score(found.isel(time=0) - 0.64)) < tail
    assert z_score(found.isel(time=0)) > tail
    # Variances 1 and 1/3, and a shape that only transport sees.
    assert z_score(debiased(x, Box([-1.0, -1.0], 1.0)).isel(time=0)) > tail


def test_chosen_estimators_are_recorded():
    for d, reference, name in (
        (1, run(4, seed=6), "quantile"),
        (1, standard(1), "quantile"),
        (2, standard(2), "gaussian"),
        (2, lambda t: standard(2), "gaussian"),
        (2, run(4, d=2, seed=6), "transport"),
        (2, Uniform([-1.0, -1.0], 1.0), "transport"),
    ):
        found = debiased(run(4, n=10, d=d).assign_attrs(units="m"), reference)
        assert found.attrs["estimator"].endswith(name)
        assert found.attrs["power"] == 2
        assert found.attrs["units"] == "(m)²"
    torus = {"period": "[4.0]"}
    found = debiased(run(4, n=10).assign_attrs(torus), run(4, n=10, seed=6).assign_attrs(torus))
    assert found.attrs["estimator"].endswith("transport")


# Bures


def spd(seed, d=4):
    a = rng(seed).normal(size=(d, d))
    return a @ a.T + 0.1 * np.eye(d)


def test_bures_is_the_matrix_square_root_formula():
    for seed in range(5):
        c, k = spd(seed), spd(seed + 100)
        root = linalg.sqrtm(c).real
        expected = np.trace(c + k - 2 * linalg.sqrtm(root @ k @ root).real)
        assert float(bures.covariance_part(c, k)) == pytest.approx(expected, rel=1e-9)
        assert float(bures.covariance_part(k, c)) == pytest.approx(expected, rel=1e-9)
        assert abs(float(bures.covariance_part(c, c))) < 1e-12 * np.trace(c)
    commuting = np.diag([1.0, 4.0]), np.diag([9.0, 0.0])
    assert float(bures.squared(np.zeros(2), commuting[0], np.ones(2), commuting[1])) == pytest.approx(2 + 4 + 4)


def test_bures_takes_leading_axes():
    means, covs = rng().normal(size=(3, 2, 4)), np.array([[spd(10 * a + b) for b in range(2)] for a in range(3)])
    found = bures.squared(means, covs, np.zeros(4), np.eye(4))
    assert found.shape == (3, 2)
    assert found[2, 1] == pytest.approx(
        float(bures.squared(means[2, 1], covs[2, 1], np.zeros(4), np.eye(4))), rel=1e-12
    )


def test_moments_are_those_of_the_measure():
    x, p = rng().normal(size=(2, 30, 3)), rng(1).dirichlet(np.ones(30), size=2)
    first, second = bures.moments(x, 5 * p)
    for k in range(2):
        np.testing.assert_allclose(first[k], np.average(x[k], axis=0, weights=p[k]), atol=1e-13)
        expected = np.cov(x[k].T, aweights=p[k], bias=True)
        np.testing.assert_allclose(bures.covariance(first, second)[k], expected, atol=1e-13)


@pytest.mark.parametrize("d", [1, 3, 10])
def test_the_gaussian_floor_is_the_mean_over_samples(d):
    n, repeats, cov = 400, 800, np.diag(np.linspace(0.5, 2.0, d))
    x = rng(8).normal(size=(repeats, n, d)) * np.sqrt(np.diag(cov))
    first, second = bures.moments(x)
    squared = bures.squared(first, bures.covariance(first, second), np.zeros(d), cov)
    mean, error = squared.mean(), squared.std(ddof=1) / math.sqrt(repeats)
    found = bures.sampling_cost(cov, n)
    # The next order is 1/N of the leading one, times about the dimension.
    assert abs(mean - found) < SE * error + 2 * d / n * found
    # A planted fault: the mean's error alone.
    assert abs(mean - np.trace(cov) / n) > SE * error + 2 * d / n * found


def test_the_gaussian_floor_has_its_closed_form_on_the_line():
    # σ²/N of the mean and σ²/(2N) of the deviation.
    assert bures.sampling_cost(np.array([[3.0]]), 10) == pytest.approx(3.0 * 1.5 / 10, rel=1e-12)
    assert bures.sampling_cost(np.diag([1.0, 0.0]), 10) == pytest.approx(1.5 / 10, rel=1e-12)
    assert bures.sampling_cost(np.zeros((2, 2)), 10) == 0.0


# Replicas


def test_means_carry_the_error_of_replicas():
    x = xr.DataArray(rng().normal(size=(3, 8)), dims=("time", "replica"), attrs={"units": "m"}, name="x")
    found = replicas.mean_and_error(x)
    np.testing.assert_allclose(found, x.values.mean(1))
    np.testing.assert_allclose(found.stderr, x.values.std(1, ddof=1) / math.sqrt(8))
    assert found.attrs["units"] == "m"
    for one in (x.isel(replica=[0]), x.isel(replica=0)):
        with pytest.raises(ValueError, match=r"at least two independent replicas; x has 1 along 'replica'\. Simulate"):
            replicas.mean_and_error(one)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    x = rng().normal(size=(9, 2))
    value, error = replicas.jackknife(lambda m: 3 * m - 1, x)
    np.testing.assert_allclose(value, 3 * x.mean(0) - 1)
    np.testing.assert_allclose(error, 3 * x.std(0, ddof=1) / 3)
    without = replicas.leave_one_out(x)
    np.testing.assert_allclose(without[4], np.delete(x, 4, 0).mean(0))
    np.testing.assert_allclose(replicas.pseudo_values(x.mean(0), without), x)
    with pytest.raises(ValueError, match=r"jackknife needs at least two replicas; got 1"):
        replicas.jackknife(np.square, x[:1])


def test_the_jackknife_of_a_smooth_function_is_the_delta_method():
    x = rng().normal(2.0, 0.1, size=(4000, 3))
    value, error = replicas.jackknife(lambda m: np.log(m[0]) * m[1], x)
    gradient = np.array([x.mean(0)[1] / x.mean(0)[0], math.log(x.mean(0)[0]), 0.0])
    assert float(value) == pytest.approx(math.log(x.mean(0)[0]) * x.mean(0)[1])
    assert float(error) == pytest.approx(math.sqrt(gradient @ np.cov(x.T) @ gradient / 4000), rel=1e-3)


def test_t_intervals_cover_and_normal_ones_do_not():
    assert replicas.t_quantile(10) == pytest.approx(2.2621571628, rel=1e-9)
    assert replicas.t_quantile(5, 0.99) == pytest.approx(4.6040948714, rel=1e-9)
    r, repeats = 5, 4000
    x = rng().normal(size=(repeats, r))
    t = abs(x.mean(1)) / (x.std(1, ddof=1) / math.sqrt(r))
    error = math.sqrt(0.95 * 0.05 / repeats)
    assert abs(np.mean(t < replicas.t_quantile(r)) - 0.95) < SE * error
    assert np.mean(t < stats.norm.ppf(0.975)) < 0.95 - SE * error
