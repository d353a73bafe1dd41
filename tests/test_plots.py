"""Pictures: what is drawn is what was given, and nothing else changes."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import xarray as xr
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats

import mfsde
from mfsde.analysis import entropy, plots
from mfsde.analysis.axes import LABEL_WIDTH
from mfsde.analysis.rates import Rate
from mfsde.scenarios import DoubleWell, MeanFieldOU

R, TIMES = 6, np.linspace(0.0, 2.0, 21)
FIT = Rate(1.0, 0.95, 1.05, 0.02, (0.2, 1.4), 3.0, "log fit")
SLOPE = Rate(-1.0, -1.1, -0.9, 0.04, (25, 400), 2.0, "log-log fit")


def axes():
    return Figure(figsize=(4, 3)).add_subplot()


def replicated(mean, *, spread=0.05, dim="time", labels=TIMES, r=R, seed=0, **attrs):
    """A positive series with independent replicas."""
    noise = np.random.default_rng(seed).normal(size=(len(labels), r))
    return xr.DataArray(
        np.asarray(mean)[:, None] * (1 + spread * noise),
        dims=(dim, "replica"),
        coords={
            dim: (dim, labels, {"long_name": dim, "units": "s" if dim == "time" else "1"}),
            "replica": np.arange(r),
        },
        attrs={"long_name": "distance", "units": "m", **attrs},
        name="distance",
    )


def distance(power=1, **options):
    return replicated(3 * np.exp(-TIMES) if power == 1 else 9 * np.exp(-2 * TIMES), power=power, **options)


def table(sizes=(25, 50, 100, 200, 400), **options):
    return replicated(2 / np.array(sizes), dim="n_particles", labels=np.array(sizes), power=2, **options)


def cloud(points, *, times=None, period=None, weight=None):
    """A run whose particles are given.    points: (T, R, N, d)."""
    points = np.asarray(points, dtype=float)
    times = np.arange(len(points), dtype=float) if times is None else times
    attrs = {"long_name": "particles", "units": "m"} | ({} if period is None else {"period": period})
    dims = ("time", "replica", "particle", "component")
    data = {"position": (dims, points, attrs if weight is None else attrs | {"weighted": "by the variable weight"})}
    if weight is not None:
        data["weight"] = (dims[:-1], weight)
    return xr.Dataset(data, coords={"time": ("time", times, {"long_name": "time", "units": "1"}),
                                    "component": np.arange(points.shape[-1])})  # fmt: skip


def sweep():
    """Runs at two parameters in one dataset."""
    runs = [cloud(normals(2, 1, 5, 2), times=[0.0, 1.0]) for _ in range(2)]
    return xr.concat(runs, xr.Variable("coupling", [0.1, 0.2]), join="exact", data_vars="all")


def normals(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def drawn(ax, gid):
    return [artist for artist in ax.get_children() if artist.get_gid() == gid]


def line(ax, gid):
    (found,) = drawn(ax, gid)
    return np.asarray(found.get_data())


def band(ax, which=0):
    """Lower and upper edge of a filled band at its abscissae."""
    x, y = drawn(ax, "band")[which].get_paths()[0].vertices.T
    return [(y[x == at].min(), y[x == at].max()) for at in np.unique(x)]


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


@pytest.fixture(scope="module")
def ou():
    return MeanFieldOU(initial_mean=(3.0,))


@pytest.fixture(scope="module")
def run(ou):
    return mfsde.simulate(ou, n_particles=100, n_replicas=3, horizon=1.0, dt=0.1, seed=0, save_every=1)


# Means and bands ------------------------------------------------------------------------------------------------------


def test_series_draws_the_replica_mean_and_two_standard_errors():
    values = replicated(1 + TIMES)
    ax = plots.series(values, axes(), "energy")
    mean, error = values.mean("replica").values, values.std("replica", ddof=1).values / math.sqrt(R)
    np.testing.assert_allclose(line(ax, "mean"), [TIMES, mean])
    np.testing.assert_allclose(band(ax), np.stack([mean - 2 * error, mean + 2 * error], -1))
    assert legend(ax) == [f"energy, ±\xa02\xa0s.e. of\xa0{R}\xa0replicas"]


def test_a_band_contains_the_truth_as_often_as_two_standard_errors_do():
    """P(|t_{R-1}| < 2) over independent times, to four binomial standard errors."""
    times = np.arange(2000.0)
    values = xr.DataArray(normals(2000, R), dims=("time", "replica"), coords={"time": times})
    expected = stats.t.cdf(2, R - 1) - stats.t.cdf(-2, R - 1)
    tolerance = 4 * math.sqrt(expected * (1 - expected) / len(times))

    def coverage(ax):
        return np.mean([low < 0 < high for low, high in band(ax)])

    assert abs(coverage(plots.series(values, axes())) - expected) < tolerance
    # Planted fault: replicas counted twice.
    doubled = xr.concat([values, values], "replica", join="exact")
    assert abs(coverage(plots.series(doubled, axes())) - expected) > tolerance


@pytest.mark.parametrize("picture", [plots.series, plots.decay, plots.power])
def test_a_single_point_has_its_error_bar(picture):
    values = (table if picture is plots.power else distance)()[:1].assign_attrs(power=1)
    figure = Figure()
    ax = picture(values, ax=figure.add_subplot())
    figure.draw_without_rendering()
    mean, error = values.mean("replica").item(), values.std("replica", ddof=1).item() / math.sqrt(R)
    (segment,) = drawn(ax, "bars")[0].get_segments()
    np.testing.assert_allclose(segment[:, 1], [mean - 2 * error, mean + 2 * error])
    assert ax.get_xlim()[0] < values[values.dims[0]].item() < ax.get_xlim()[1]


def test_a_given_standard_error_is_drawn_and_a_single_replica_says_that_it_has_none():
    mean = replicated(1 + TIMES).mean("replica", keep_attrs=True)
    ax = plots.series(mean.assign_coords(stderr=("time", 0.1 + TIMES)), axes())
    np.testing.assert_allclose(np.diff(band(ax)).ravel(), 4 * (0.1 + TIMES))
    for alone, told in ((mean.expand_dims("replica", 1), "one replica, no error bar"), (mean, "no error bar")):
        ax = plots.series(alone, axes())
        assert not drawn(ax, "band")
        assert legend(ax) == [told]


def test_the_order_of_dimensions_and_of_times_does_not_matter():
    values = replicated(1 + TIMES)
    expected = line(plots.series(values, axes()), "mean")
    for other in (values.T, values.isel(time=slice(None, None, -1))):
        np.testing.assert_array_equal(line(plots.series(other, axes()), "mean"), expected)


def test_labels_carry_names_and_units():
    ax = plots.series(replicated(1 + TIMES), axes())
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("time [s]", "distance [m]")
    bare = replicated(1 + TIMES).assign_attrs(units="1")
    assert plots.series(bare, axes()).get_ylabel() == "distance"
    bare.attrs = {}
    assert plots.series(bare, axes()).get_ylabel() == "distance"  # the name of the array


def test_long_labels_are_broken_and_exponents_raised():
    values = replicated(1 + TIMES).assign_attrs(
        long_name="free energy F + (σ²/2) KL(m | e^-U), Gaussian plug-in (lower bound)", units="nat"
    )
    ax = plots.series(values, axes())
    assert max(map(len, ax.get_ylabel().replace("$^{", "").replace("}$", "").split("\n"))) <= LABEL_WIDTH
    assert "e$^{-U}$" in ax.get_ylabel()
    assert "[nat]" in ax.get_ylabel()
    ax.set_title(plots.series(values.assign_attrs(long_name="E|X^{i,N} - X̄^i|²", units="1"), axes()).get_ylabel())
    assert ax.get_title() == "E|X$^{i,N}$ - $\\mathrm{\\bar{X}}$$^{i}$|²"
    ax.figure.draw_without_rendering()  # matplotlib can set it


def test_entropy_is_labelled_with_its_estimator_and_energies_share_axes():
    for estimator, told in (
        ("spacing", "spacing (m = 3) entropy, ±"),
        ("knn", "kNN (k = 4) entropy, ±"),
        ("gaussian", "Gaussian plug-in entropy, ±"),
    ):
        x = cloud(normals(2, 3, 200, 1))
        for found in (
            entropy.differential(x, estimator=estimator),
            entropy.relative(x, mfsde.Gaussian([0.0], [[1.0]]), estimator=estimator),
        ):
            assert legend(plots.entropy(found, axes()))[0].replace("\n", " ").startswith(told)
    ax = plots.entropy(replicated(1 + TIMES).assign_attrs(estimator="kNN, k = 4; whitened"), axes())
    assert legend(ax)[0].startswith("kNN, ±")
    ax = plots.entropy(replicated(1 + TIMES).assign_attrs(estimator="score matching; degree 3"), axes())
    assert legend(ax)[0].startswith("score matching, ±")
    assert legend(plots.entropy(replicated(1 + TIMES), axes()))[0].startswith("±")
    both = xr.Dataset(
        {
            "energy": replicated(1 + TIMES).assign_attrs(long_name="energy F(m)"),
            "free_energy": replicated(2 + TIMES).assign_attrs(long_name="free energy"),
        }
    )
    ax = plots.energy(both, axes())
    assert [label.split(",")[0] for label in legend(ax)] == ["energy F(m)", "free energy"]
    assert ax.get_ylabel() == "energy [m]"
    styles = {(mean.get_color(), mean.get_linestyle()) for mean in drawn(ax, "mean")}
    assert len(styles) == len({style for _, style in styles}) == 2


# Distances and rates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [1, 2])
def test_decay_draws_the_mean_and_the_fit_to_its_power(power):
    values = distance(power)
    ax = plots.decay(values, FIT, axes())
    assert ax.get_yscale() == "log"
    np.testing.assert_allclose(line(ax, "mean"), [TIMES, values.mean("replica")])
    times, fitted = line(ax, "fit")
    assert (times[0], times[-1]) == FIT.window
    np.testing.assert_allclose(fitted, (3 * np.exp(-times)) ** power)
    (window,) = drawn(ax, "window")
    assert (window.get_x(), window.get_x() + window.get_width()) == pytest.approx(FIT.window)
    # The drawn slope is power·λ; the number is W₂'s.
    name = "λ" if power == 1 else "λ of W₂"
    assert any(entry.startswith(f"{name} = 1.000 ± 0.050") for entry in legend(ax)), legend(ax)


def test_the_fit_lies_in_its_data_and_one_that_forgets_the_power_does_not():
    """Replica means of W₂² scatter by spread/√R; the root of the fit is far outside, by hundreds of them."""
    values = distance(2)
    ax = plots.decay(values, FIT, axes())
    times, fitted = line(ax, "fit")
    mean = np.interp(times, TIMES, np.log(values.mean("replica")))
    tolerance = 4 * 0.05 / math.sqrt(R)
    assert np.abs(np.log(fitted) - mean).max() < tolerance
    wrong = line(plots.decay(values.assign_attrs(power=1), FIT, axes()), "fit")[1]
    assert np.abs(np.log(wrong) - mean).max() > tolerance


def test_the_floor_is_dashed_and_shaded_below():
    floor = 0.1 + 0.02 * TIMES
    for given in (floor, np.tile(floor[:, None], R)):
        dims = ("time", "replica")[: given.ndim]
        ax = plots.decay(distance().assign_coords(floor=(dims, given)), ax=axes())
        np.testing.assert_allclose(line(ax, "floor"), [TIMES, floor])
        assert drawn(ax, "floor")[0].get_linestyle() == "--"
        (shaded,) = drawn(ax, "below")
        x, y = shaded.get_paths()[0].vertices.T
        assert [y[x == t].max() for t in TIMES] == pytest.approx(floor)
        assert y.min() < ax.get_ylim()[0] < floor.min()


def test_values_free_of_the_floor_are_marked_by_their_roots():
    squares = replicated(9 * np.exp(-2 * TIMES))
    squares[-2:] = -squares[-2:]
    ax = plots.decay(distance().assign_coords(unbiased=squares), ax=axes())
    times, roots = line(ax, "unbiased")
    np.testing.assert_array_equal(times, TIMES[:-2])
    np.testing.assert_allclose(roots, np.sqrt(squares.mean("replica")[:-2]))
    assert "floor removed" in legend(ax)


def test_means_that_are_not_positive_are_marked_and_not_drawn():
    values = distance(2)
    values[-3:] = -values[-3:]
    ax = plots.decay(values, FIT, axes())
    np.testing.assert_array_equal(np.isnan(line(ax, "mean")[1]), values.mean("replica") <= 0)
    np.testing.assert_array_equal(line(ax, "rug")[0], TIMES[-3:])
    assert "mean ≤ 0" in legend(ax)
    with pytest.raises(ValueError, match=r"no mean is positive"):
        plots.decay(-values[:-3], ax=axes())


def test_flags_and_asymmetric_intervals_are_told():
    doubtful = Rate(1.0, 0.9, 1.3, 0.1, (0.2, 1.4), 3.0, "log fit", ("N and N/2 disagree",))
    ax = plots.decay(distance(), doubtful, axes())
    (entry,) = [label for label in legend(ax) if "λ" in label]
    assert entry.splitlines() == ["λ = 1.00 [0.90, 1.30] (95 %)", "on [0.2, 1.4]", "flag: N and N/2 disagree"]
    plain = drawn(plots.decay(distance(), FIT, axes()), "fit")[0]
    assert drawn(ax, "fit")[0].get_linestyle() != plain.get_linestyle()
    assert drawn(ax, "fit")[0].get_color() != plain.get_color()


def test_several_distances_on_the_same_axes_are_all_visible_and_told_apart():
    near = distance().assign_coords(floor=("time", np.full(len(TIMES), 0.2)))
    far = (10 * near).assign_attrs(near.attrs).drop_vars("floor")
    ax = plots.decay(near, FIT, axes(), label="N = 100")
    plots.decay(far, ax=ax, label="N = 10")
    low, high = ax.get_ylim()
    assert low < 0.2
    assert high > float(far.max())
    assert len({mean.get_color() for mean in drawn(ax, "mean")}) == 2


@pytest.mark.parametrize("flags", [(), ("a reason to doubt it, told at length", "and another as long")])
def test_the_legend_of_a_flat_decay_covers_no_data(flags):
    flat = replicated(np.full(len(TIMES), 0.5), power=1)
    rate = Rate(0.01, -0.01, 0.03, 0.01, (0, 2), 0.5, "log fit", flags)
    figure = Figure(figsize=(4, 3), layout="constrained")
    ax = plots.decay(flat, rate, figure.add_subplot())
    figure.draw_without_rendering()
    bottom = ax.get_legend().get_window_extent().y0
    for gid in ("mean", "fit"):
        assert ax.transData.transform(line(ax, gid).T)[:, 1].max() < bottom


@pytest.mark.parametrize("low", [3e-7, 0.02, 0.6, 40.0])
def test_ticks_of_a_log_axis_are_at_least_two_and_do_not_overlap(low):
    figure = Figure(figsize=(4, 3), layout="constrained")
    for factor in (1.2, 5, 50, 1e6):
        figure.clear()
        values = replicated(np.geomspace(low * factor, low, len(TIMES)), power=1, spread=0.01)
        ax = plots.decay(values, ax=figure.add_subplot())
        figure.draw_without_rendering()
        # The legend keeps free the top of the axis, which may hold further ticks.
        low_end, high_end = ax.get_ylim()
        ticks = [t for t in ax.yaxis.get_major_ticks() if low_end <= t.get_loc() <= high_end and t.label1.get_text()]
        extents = sorted((t.label1.get_window_extent() for t in ticks), key=lambda box: box.y0)
        assert len(ticks) >= 2
        assert all(below.y1 <= above.y0 for below, above in itertools.pairwise(extents))


def test_power_draws_means_with_bars_and_the_fit():
    values = table()
    ax = plots.power(values, SLOPE, ax=axes())
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    n, mean = values.n_particles.values, values.mean("replica").values
    np.testing.assert_allclose(line(ax, "mean"), [n, mean])
    error = values.std("replica", ddof=1).values / math.sqrt(R)
    (bars,) = drawn(ax, "bars")
    np.testing.assert_allclose(
        np.array(bars.get_segments())[:, :, 1], np.stack([mean - 2 * error, mean + 2 * error], 1)
    )
    at, fitted = line(ax, "fit")
    assert (at[0], at[-1]) == pytest.approx(SLOPE.window)
    np.testing.assert_allclose(fitted, 2 / at)
    assert "p = −1.00 ± 0.10 (95 %)\non [25, 400]" in legend(ax)
    assert [f"{tick:g}" for tick in ax.get_xticks()] == ["25", "50", "100", "200", "400"]


def test_chaos_slope_adds_a_line_of_slope_minus_one_below_the_means():
    ax = plots.chaos_slope(table(), SLOPE, axes())
    n, reference = line(ax, "reference")
    np.testing.assert_allclose(np.diff(np.log(reference)) / np.diff(np.log(n)), -1)
    assert (reference < line(ax, "mean")[1]).all()
    assert "slope −1" in legend(ax)
    assert ax.get_ylim()[0] < reference.min()


def test_a_sweep_over_another_parameter_and_seeds():
    values = table()
    swept = xr.Dataset({"error": values.rename(n_particles="dt", replica="seed")})
    ax = plots.power(swept, over="dt", ax=axes())
    np.testing.assert_allclose(line(ax, "mean"), [values.n_particles, values.mean("replica")])
    assert legend(ax) == [f"mean, ±\xa02\xa0s.e. of\xa0{R}\xa0seeds"]


# Laws -----------------------------------------------------------------------------------------------------------------


def test_density_draws_the_pooled_histogram_and_the_limit(ou, run):
    ax = plots.density(run, ou.limit, [0, 1.0], axes(), bins=30)
    first, last = drawn(ax, "histogram")
    for stairs, time in ((first, 0.0), (last, 1.0)):
        heights, edges, _ = stairs.get_data()
        pooled = run.position.sel(time=time).values.ravel()
        np.testing.assert_allclose(heights, np.histogram(pooled, edges, density=True)[0], rtol=1e-12)
        assert (heights * np.diff(edges)).sum() == pytest.approx(1)
    limits = [np.asarray(curve.get_data()) for curve in drawn(ax, "limit")]
    for (x, y), time in zip(limits, (0.0, 1.0), strict=True):
        np.testing.assert_allclose(y, ou.limit(time).log_prob(torch.tensor(x)[:, None]).exp())
    assert legend(ax) == ["t = 0", "t = 1", "limit"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("x", "density")


def test_the_histogram_agrees_with_the_limit_and_not_with_another_law():
    """χ² of 3 × 2000 independent points in 30 bins: within four standard deviations of its mean."""
    x = normals(1, 3, 2000, 1)

    def chi_squared(law):
        ax = plots.density(cloud(x), law, ax=axes(), bins=np.linspace(-2.5, 2.5, 31))
        heights, edges, _ = drawn(ax, "histogram")[0].get_data()
        expected = x.size * np.interp((edges[1:] + edges[:-1]) / 2, *line(ax, "limit")) * np.diff(edges)
        return ((x.size * heights * np.diff(edges) - expected) ** 2 / expected).sum()

    far = 30 + 4 * math.sqrt(2 * 30)
    assert chi_squared(mfsde.Gaussian(0.0, 1.0)) < far
    assert chi_squared(mfsde.Gaussian(0.0, 1.3)) > far


def test_masses_count(run):
    x = normals(1, 2, 50, 1)
    weight = np.random.default_rng(1).dirichlet(np.ones(50), size=(1, 2))
    ax = plots.density(cloud(x, weight=weight), ax=axes())
    heights, edges, _ = drawn(ax, "histogram")[0].get_data()
    np.testing.assert_allclose(heights, np.histogram(x.ravel(), edges, weights=weight.ravel(), density=True)[0])
    with pytest.raises(ValueError, match=r"unequal masses; pass the run itself"):
        plots.density(cloud(x, weight=weight).position, ax=axes())
    mean = line(plots.paths(cloud(x, weight=weight), ax=axes()), "mean")[1]
    np.testing.assert_allclose(mean, (x[..., 0] * weight)[:, 0].sum(-1))


def test_a_limit_dataset_is_interpolated_in_time():
    nodes = np.linspace(-5, 5, 101)
    rows = np.stack([stats.norm.pdf(nodes), stats.norm.pdf(nodes, 1)])
    limit = xr.Dataset({"density": (("time", "x"), rows)}, coords={"time": [0.0, 2.0], "x": nodes})
    x, y = line(plots.density(cloud(normals(3, 1, 50, 1)), limit, 0.5, axes()), "limit")  # the nearest frame is t = 0
    np.testing.assert_allclose(y, np.interp(x, nodes, rows[0]))
    x, y = line(plots.density(cloud(normals(3, 1, 50, 1)), limit, 1.0, axes()), "limit")
    np.testing.assert_allclose(y, np.interp(x, nodes, rows.mean(0)))
    with pytest.raises(ValueError, match=r"the limit is given on \[0, 2\] but t = 3 is drawn"):
        plots.density(cloud(normals(4, 1, 50, 1)), limit, 3.0, axes())


def test_a_point_mass_is_a_vertical_line():
    ax = plots.density(cloud(np.full((2, 1, 10, 1), 3.0)), mfsde.Gaussian(3.0, 0.0), ax=axes())
    assert line(ax, "limit")[0].tolist() == [3.0, 3.0]
    flat = plots.density(cloud(np.zeros((1, 1, 10, 2))), mfsde.Dirac([0.0, 0.0]), ax=axes())
    assert line(flat, "limit").ravel().tolist() == [0.0, 0.0]


def test_more_times_than_a_legend_holds_get_a_colour_bar():
    ax = plots.density(cloud(normals(20, 1, 50, 1)), times=range(20), ax=axes())
    assert len(drawn(ax, "histogram")) == 20
    assert len(ax.figure.axes) == 2
    assert ax.figure.axes[1].get_ylabel() == "time"


@pytest.mark.parametrize("corner", [0.0, -1.0])
def test_a_torus_is_shown_on_its_box(corner):
    x = 2.0 + corner + np.random.default_rng(0).uniform(size=(3, 1, 4000, 1)) * np.array([0, 1, 10]).reshape(3, 1, 1, 1)
    x[0] = corner + 2 * np.random.default_rng(1).uniform(size=(1, 4000, 1))
    torus = cloud(x, period="[2.0]")
    ax = plots.density(torus, mfsde.Gaussian(0.0, 0.09), [2], axes(), bins=4)
    heights, edges, _ = drawn(ax, "histogram")[0].get_data()
    assert (edges[0], edges[-1]) == (corner, corner + 2)
    np.testing.assert_allclose(heights, 0.5, atol=4 * math.sqrt(0.5 * (1 - 0.25) / 4000 / 0.5))
    at, y = line(ax, "limit")
    assert np.trapezoid(y, at) == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(y[0], y[-1])
    ax = plots.paths(torus, 5, ax=axes())
    assert ax.get_ylim() == (corner, corner + 2)
    assert not drawn(ax, "mean")


def test_paths_are_the_first_particles_and_their_mean(run):
    ax = plots.paths(run, 7, replica=2, ax=axes())
    x = run.position.isel(replica=2, component=0).transpose("particle", "time").values
    for k, path in enumerate(drawn(ax, "path")):
        np.testing.assert_allclose(path.get_data(), [run.time, x[k]])
    assert len(drawn(ax, "path")) == 7
    np.testing.assert_allclose(line(ax, "mean")[1], x.mean(0), rtol=1e-6)


def test_paths_on_a_torus_are_cut_at_its_edge_and_nowhere_else():
    x = np.array([0.1, 0.6, 1.4, 1.9, 2.3, 2.8]).reshape(6, 1, 1, 1)  # crosses 2 once
    (path,) = drawn(plots.paths(cloud(x, period="[2.0]"), ax=axes()), "path")
    times, y = path.get_data()
    assert times[np.isnan(y)].tolist() == [3.5]
    np.testing.assert_allclose(y[::2], x.ravel() % 2.0)
    assert np.nanmin(y) >= 0
    assert np.nanmax(y) < 2


def test_the_plane_is_a_histogram_of_mass_one_with_level_lines():
    x = normals(2, 2, 500, 2)
    ax = plots.density(cloud(x), mfsde.Gaussian([0.0, 0.0], 1.0), ax=axes(), bins=20)
    (mesh,) = [c for c in ax.collections if hasattr(c, "get_coordinates")]
    corners = mesh.get_coordinates()
    cells = np.outer(np.diff(corners[:, 0, 1]), np.diff(corners[0, :, 0]))
    assert (np.asarray(mesh.get_array()) * cells).sum() == pytest.approx(1)
    across, up = corners[0, :, 0], corners[:, 0, 1]
    counts = np.histogram2d(x[-1, ..., 0].ravel(), x[-1, ..., 1].ravel(), (across, up))[0]
    np.testing.assert_allclose(np.asarray(mesh.get_array()) * cells, counts.T / 1000)
    (levels,) = drawn(ax, "limit")
    radii = [np.linalg.norm(path.vertices, axis=1) for path in levels.get_paths()]
    # Level lines of a standard Gaussian at 10, 30, ..., 90 % of its top are circles.
    for radius, share in zip(radii, (0.1, 0.3, 0.5, 0.7, 0.9), strict=True):
        np.testing.assert_allclose(radius, math.sqrt(-2 * math.log(share)), atol=0.02)
    assert ax.figure.axes[1].get_ylabel() == "density [1/m²]"


def test_phase_draws_particles_and_the_drift_that_moves_them():
    ou = MeanFieldOU(initial_mean=(3.0, -1.0, 5.0))
    run = mfsde.simulate(ou, n_particles=40, n_replicas=2, horizon=0.4, dt=0.1, seed=0, save_every=1)
    ax = plots.phase(run, 0.2, 1, (0, 2), axes(), scenario=ou)
    x = run.position.sel(time=0.2).isel(replica=1).values.astype(float)
    (particles,), (field,) = drawn(ax, "particles"), drawn(ax, "field")
    np.testing.assert_allclose(particles.get_offsets(), x[:, [0, 2]])
    mean, at = x.mean(0), np.c_[field.X, field.Y]
    expected = ou.coupling * mean[[0, 2]] - (ou.kappa + ou.coupling) * at
    np.testing.assert_allclose(np.c_[field.U, field.V], expected, atol=1e-5)
    # Planted fault: the field of another law, coupling to a mean of 0.
    assert np.abs(np.c_[field.U, field.V] + (ou.kappa + ou.coupling) * at).min() > 0.1
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("x, component 0", "x, component 2")
    assert ax.get_title() == "t = 0.2, replica 1"


@dataclass(frozen=True)
class Kernel:
    """dX = -(K * m)(X) dt + σ dW with the particle itself left out: a law that arrows are no atoms of."""

    sigma: float = 0.1

    def drift(self, t, x, mu):
        return -mu.convolve(torch.tanh, x, include_self=False)

    def diffusion(self, t, x, mu):
        return self.sigma

    def initial(self):
        return mfsde.Gaussian([0.0, 0.0], 1.0)


def test_a_time_is_a_time_whether_integer_or_not():
    run = cloud(normals(4, 1, 5, 2), times=[0.0, 0.5, 1.0, 3.0])

    def title(*args, **options):
        return plots.phase(run, *args, ax=axes(), **options).get_title()

    assert title(1) == title(1.0) == title(frame=2) == "t = 1, replica 0"
    assert title() == title(frame=-1) == "t = 3, replica 0"
    assert plots.density(run, times=1, ax=axes()).get_title() == "t = 1"


def test_phase_takes_drifts_that_leave_out_the_particle_itself():
    run = mfsde.simulate(Kernel(), n_particles=10, horizon=0.1, dt=0.1, seed=0)
    ax = plots.phase(run, ax=axes(), scenario=Kernel())
    (field,) = drawn(ax, "field")
    x = run.position.values[-1, 0]
    expected = -np.tanh(np.c_[field.X, field.Y][:, None] - x).mean(1)
    np.testing.assert_allclose(np.c_[field.U, field.V], expected, atol=1e-6)


# Animations and pages -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2])
def test_an_animation_has_a_frame_for_every_time(dim, tmp_path):
    law = mfsde.Gaussian([0.0] * dim, 1.0)
    path = plots.animate(cloud(normals(5, 2, 30, dim)), tmp_path / "run.gif", lambda t: law, fps=10)
    assert path == tmp_path / "run.gif"
    with Image.open(path) as picture:
        assert picture.n_frames == 5
        assert picture.info["duration"] == 100
        frames = []
        for k in range(5):
            picture.seek(k)
            frames.append(np.asarray(picture.convert("L")))
    assert all((a != b).any() for a, b in itertools.combinations(frames, 2))
    assert [file.name for file in tmp_path.iterdir()] == ["run.gif"]


def test_a_page_holds_the_frames_it_plays(tmp_path):
    path = plots.animate(cloud(normals(3, 2, 30, 1)), str(tmp_path / "run.html"), replica=1)
    assert path.read_text().count("data:image/png;base64") == 3


def test_an_animation_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "run.gif"
    path.write_bytes(b"earlier")

    def law(t):
        if t > 1:
            raise RuntimeError("no law after t = 1")
        return mfsde.Gaussian(0.0, 1.0)

    with pytest.raises(RuntimeError, match=r"no law after"):
        plots.animate(cloud(normals(3, 1, 30, 1)), path, law)
    assert path.read_bytes() == b"earlier"
    assert [file.name for file in tmp_path.iterdir()] == ["run.gif"]


def test_a_summary_shows_what_a_run_recorded(ou, run):
    well = mfsde.simulate(
        DoubleWell(), n_particles=30, n_replicas=2, horizon=1.0, dt=0.1, seed=3, save_every=1,
        observables=("energy", "mean", "entropy"),
    )  # fmt: skip
    figure = plots.summary(well, distance(), FIT)
    titles = [ax.get_ylabel() for ax in figure.axes]
    assert [title.split(",")[0] for title in titles] == [
        "distance [m]", "density", "x", "energy F(m)", "mean over particles", "differential entropy",
    ]  # fmt: skip
    assert "DoubleWell: N = 30, 2 replicas, dt = 0.1, seed = 3" in figure.get_suptitle()
    assert "theta = 1" in figure.get_suptitle()
    figure.savefig("/dev/null", format="png")
    assert len(plots.summary(run, law=ou.limit).axes) == 2
    none_kept = mfsde.simulate(ou, n_particles=9, horizon=0.2, dt=0.1, seed=0, keep_particles=0, observables=("mean",))
    assert len(plots.summary(none_kept).axes) == 1
    deep = mfsde.simulate(MeanFieldOU(initial_mean=(0.0,) * 5), n_particles=9, horizon=0.2, dt=0.1, seed=0)
    assert len(plots.summary(deep).axes) == 2
    with pytest.raises(ValueError, match=r"neither particles nor observables"):
        plots.summary(none_kept.drop_vars("mean"))


# Refusals -------------------------------------------------------------------------------------------------------------

NAN = replicated(1 + TIMES, power=1)
NAN = NAN.where(NAN.time != TIMES[4])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.series(NAN, axes()), r"6 of 126 values are not finite"),
        (lambda: plots.decay(NAN, ax=axes()), r"6 of 126 values are not finite"),
        (lambda: plots.series(distance()[:0], axes()), r"nothing to draw, the sizes are .*'time': 0"),
        (lambda: plots.series(distance().expand_dims("component"), axes()), r"Select along the others"),
        (lambda: plots.series(distance().drop_vars("time"), axes()), r"expected 'time', with its coordinate"),
        (lambda: plots.series(distance().mean().expand_dims("time"), axes()), r"expected 'time', with its coordinate"),
        (lambda: plots.decay(distance().assign_attrs(power=3), ax=axes()), r"attrs\['power'\] is 3; expected 1"),
        (lambda: plots.decay(replicated(TIMES), ax=axes()), r"attrs\['power'\] is None; expected 1"),
        (lambda: plots.decay(distance().assign_coords(floor=math.nan), ax=axes()), r"decay, floor: 21 of 21 values"),
        (lambda: plots.decay(distance().isel(time=slice(5)), FIT, axes()), r"Pass the rate of this series"),
        (lambda: plots.decay(distance(), Rate(math.nan, 0, 0, 0, (0, 1), 1, ""), axes()), r"rate: 1 of 4 values"),
        (lambda: plots.power(table((-5, 10)), ax=axes()), r"n_particles goes down to -5; a log axis needs positive"),
        (lambda: plots.power(table(), over="dt", ax=axes()), r"expected 'dt', with its coordinate"),
        (lambda: plots.energy(xr.Dataset(), axes()), r"recorded neither `energy` nor `free_energy`"),
        (lambda: plots.density(cloud(normals(2, 1, 5, 3)), ax=axes()), r"3 components; a picture shows one or two"),
        (lambda: plots.density(cloud(normals(2, 1, 5, 1)), times=7.0, ax=axes()), r"t = 7.0 is outside the saved"),
        (lambda: plots.density(cloud(normals(2, 1, 5, 1)), times=[], ax=axes()), r"no times were asked for"),
        (lambda: plots.density(cloud(normals(2, 1, 5, 1)).isel(time=0), ax=axes()), r"keep the time"),
        (lambda: plots.density(cloud(normals(2, 1, 5, 1)), bins=np.array([1, 0]), ax=axes()), r"increasing order"),
        (lambda: plots.density(cloud(normals(2, 1, 5, 2)), times=[0, 1], ax=axes()), r"draws one time \(2 were"),
        (lambda: plots.density(cloud(np.full((2, 1, 5, 1), np.inf)), ax=axes()), r"particles at t = 0: 5 of 5 values"),
        (lambda: plots.density(cloud(normals(2, 1, 5, 1)), mfsde.Gaussian([0.0, 0.0], 1.0), ax=axes()), r"dimension 2"),
        (lambda: plots.density(xr.Dataset(), ax=axes()), r"no `position`"),
        (lambda: plots.density(cloud(normals(2, 1, 5, 1), weight=np.zeros((2, 1, 5))), ax=axes()), r"masses must be"),
        (lambda: plots.paths(cloud(normals(2, 1, 5, 1)), replica=1, ax=axes()), r"replica 1 does not exist"),
        (lambda: plots.paths(cloud(normals(2, 1, 5, 1)), component=1, ax=axes()), r"component 1 does not exist"),
        (lambda: plots.paths(cloud(normals(2, 1, 5, 1)), 0, ax=axes()), r"draw at least one"),
        (lambda: plots.paths(cloud(np.full((2, 1, 5, 1), np.nan)), ax=axes()), r"10 of 10 values are not finite"),
        (lambda: plots.phase(cloud(normals(2, 1, 5, 1)), ax=axes()), r"needs two different"),
        (lambda: plots.phase(cloud(normals(2, 1, 5, 2)), 2, ax=axes()), r"t = 2 is outside the saved times \[0, 1\]"),
        (lambda: plots.phase(cloud(normals(2, 1, 5, 2)), frame=2, ax=axes()), r"frame 2 does not exist.*pass time=2"),
        (lambda: plots.phase(cloud(normals(2, 1, 5, 2)), 1, frame=1, ax=axes()), r"both say when"),
        (lambda: plots.density(sweep(), ax=axes()), r"further dimensions \['coupling'\].*run.isel\(coupling=0\)"),
        (lambda: plots.paths(sweep(), ax=axes()), r"further dimensions \['coupling'\]"),
        (lambda: plots.animate(sweep(), "run.gif"), r"further dimensions \['coupling'\]"),
        (lambda: plots.animate(cloud(normals(2, 1, 5, 1)), "run.mp4"), r"expected .gif or .html"),
        (lambda: plots.animate(cloud(normals(2, 1, 5, 1)), "run.gif", fps=0), r"frames per second are positive"),
        (lambda: plots.animate(cloud(normals(2, 1, 5, 3)), "run.gif"), r"3 components"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_what_is_not_a_series_a_rate_or_a_law_is_refused():
    with pytest.raises(TypeError, match=r"got a ndarray; expected a DataArray over 'time'"):
        plots.series(np.ones(3), axes())
    with pytest.raises(TypeError, match=r"got a list; expected a DataArray over 'time'"):
        plots.decay([1.0], ax=axes())
    with pytest.raises(TypeError, match=r"rate is a float; expected what rates"):
        plots.decay(distance(), 1.0, axes())
    with pytest.raises(TypeError, match=r"a Dataset with one variable; got \['a', 'b'\]"):
        plots.power(xr.Dataset({"a": table(), "b": table()}), ax=axes())
    with pytest.raises(TypeError, match=r"the limit is a float; expected a Law"):
        plots.density(cloud(normals(2, 1, 5, 1)), lambda t: 1.0, ax=axes())


# What does not change -------------------------------------------------------------------------------------------------


def test_nothing_global_changes(run, ou, tmp_path):
    before, backend = dict(matplotlib.rcParams), matplotlib.get_backend()
    figures = plt.get_fignums()
    plots.decay(distance(), FIT, axes())
    plots.chaos_slope(table(), SLOPE, axes())
    plots.density(run, ou.limit, ax=axes())
    plots.animate(run.isel(time=[0, 1]), tmp_path / "run.html")
    plots.animate(run.isel(time=[0, 1]), tmp_path / "run.gif")
    plots.summary(run, distance(), FIT)
    assert dict(matplotlib.rcParams) == before
    assert matplotlib.get_backend() == backend
    assert plt.get_fignums() == figures


def test_without_axes_the_current_ones_are_drawn_on(run):
    figure, ax = plt.subplots()
    try:
        assert plots.decay(distance()) is ax
        assert plots.series(distance(), label="again") is ax
        plt.sca(figure.add_subplot(3, 3, 1))
        assert plots.paths(run) is plt.gca()
    finally:
        plt.close(figure)


def test_matplotlib_waits_for_the_first_picture():
    code = "import sys, mfsde.analysis.plots; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_read_lazily_draws_the_same(run, ou):
    pytest.importorskip("dask")
    lazy = run.chunk(time=3)
    for gid in ("path", "mean"):
        here, there = (drawn(plots.paths(r, ax=axes()), gid) for r in (run, lazy))
        for a, b in zip(here, there, strict=True):
            np.testing.assert_allclose(a.get_data(), b.get_data(), rtol=1e-6)
    here, there = (drawn(plots.density(r, ou.limit, ax=axes()), "histogram") for r in (run, lazy))
    for a, b in zip(here, there, strict=True):
        np.testing.assert_array_equal(a.get_data().values, b.get_data().values)
    one = distance()
    np.testing.assert_array_equal(
        line(plots.decay(one, ax=axes()), "mean"), line(plots.decay(one.chunk(time=4), ax=axes()), "mean")
    )
