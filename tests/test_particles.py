"""The door of the analysis: what is let in, and what the refusals say."""

import math

import numpy as np
import pytest
import xarray as xr

import mfsde
from mfsde.analysis import labels, particles
from mfsde.scenarios import MeanFieldOU


def cloud(t=3, n=4, d=2, **attrs):
    values = np.arange(t * n * d, dtype=float).reshape(t, n, d)
    coords = {"time": 0.5 * np.arange(t), "component": np.arange(d)}
    return xr.DataArray(values, coords=coords, dims=("time", "particle", "component"), name="position", attrs=attrs)


def run(**settings):
    settings = {"n_particles": 5, "n_replicas": 3, "horizon": 0.2, "dt": 0.1, "seed": 1} | settings
    return mfsde.simulate(MeanFieldOU(), **settings)


# What is let in


def test_a_run_and_its_positions_are_the_same_particles():
    found = run()
    xr.testing.assert_identical(particles.positions(found), found["position"])
    xr.testing.assert_identical(particles.positions(found["position"]), found["position"])
    assert particles.weights(found) is None
    assert particles.weights(found["position"]) is None
    assert particles.period(found["position"]) is None


def test_a_weighted_run_brings_its_masses_and_a_bare_position_is_refused():
    position = cloud(weighted="by the variable weight")
    weight = xr.DataArray(np.full((3, 4), 0.25), dims=("time", "particle"))
    dataset = xr.Dataset({"position": position, "weight": weight})
    xr.testing.assert_identical(particles.weights(dataset), dataset["weight"])
    with pytest.raises(ValueError, match=r"unequal masses; pass the run itself, which holds `weight`"):
        particles.weights(position)


def test_a_run_that_kept_no_particles_is_refused():
    with pytest.raises(ValueError, match=r"reference has no `position`; .* keep_particles=0 keeps none"):
        particles.positions(run(keep_particles=0), "reference")


def test_what_is_no_run_is_refused():
    with pytest.raises(TypeError, match=r"run is a ndarray; expected a run Dataset or its `position`"):
        particles.positions(np.zeros((3, 4, 2)))
    for missing in ("particle", "component"):
        with pytest.raises(ValueError, match=r"expected `particle` and `component` among them"):
            particles.positions(cloud().isel({missing: 0}))


def test_an_empty_selection_is_refused():
    for empty in (cloud().sel(time=slice(7, 9)), cloud().isel(particle=slice(0))):
        with pytest.raises(ValueError, match=r"holds no values: its sizes are .* Check the selection of times"):
            particles.positions(empty)


# The torus


def test_the_torus_is_read_from_the_positions():
    torus = cloud(period="[6.28, null]")
    assert particles.period(torus) == (6.28, math.inf)
    assert particles.period(torus, cloud()) == (6.28, math.inf)
    assert particles.period(torus, torus) == (6.28, math.inf)
    with pytest.raises(ValueError, match=r"different tori, with periods \['\[1\.0, null\]', '\[6\.28, null\]'\]"):
        particles.period(torus, cloud(period="[1.0, null]"))


# Labels


def test_equal_labels_match_and_missing_dimensions_are_no_matter():
    a = cloud()
    particles.check_matching(a, a)
    particles.check_matching(a, a.isel(time=0))
    particles.check_matching(a, a.isel(particle=slice(2)))
    particles.check_matching(a.drop_vars("component"), a)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda a: a.assign_coords(time=a.time + 1e-12), r"'time' differ: .* 0 shared; simulate both with the same dt"),
        (lambda a: a.assign_coords(time=a.time + 7), r"3 from 0\.0 to 1\.0 and 3 from 7\.0 to 8\.0, 0 shared"),
        (lambda a: a.isel(time=[0, 1]), r"'time' differ: .* 2 shared; select the shared ones on both sides with .sel"),
        (lambda a: a.isel(time=[2, 1, 0]), r"'time' differ: .* 3 shared"),
        (lambda a: a.isel(component=[0]), r"'component' differ: 2 from 0 to 1 and 1 from 0 to 0, 1 shared"),
        (lambda a: a.isel(component=[0]).drop_vars("component"), r"'component' differ"),
        (
            lambda a: a.assign_coords(component=["x", "y"]),
            r"'component' differ: .* 0 shared; compare laws on the same space",
        ),
    ],
)
def test_labels_that_differ_are_refused_on_both_sides(other, message):
    a = cloud()
    with pytest.raises(ValueError, match=message):
        particles.check_matching(a, other(a))
    with pytest.raises(ValueError, match=r"labels along"):
        particles.check_matching(other(a), a)


def test_empty_labels_are_named():
    with pytest.raises(ValueError, match=r"'time' differ: 3 from 0\.0 to 1\.0 and none, 0 shared"):
        particles.check_matching(cloud(), cloud().isel(time=slice(0)))


# Values


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(bad):
    values = np.ones((4, 3))
    particles.check_finite(values, "here")
    values[1, 2] = bad
    with pytest.raises(ValueError, match=r"here: 1 of 12 values are not finite\. .* select the times before it did"):
        particles.check_finite(values, "here")


def test_masses_are_those_of_a_measure():
    particles.check_masses(np.array([[0.0, 2.0], [1.0, 1.0]]), "here")
    for masses, message in (
        ([[0.5, -1e-9]], r"here: masses must be non-negative and not all zero; the smallest is -1e-09"),
        ([[1.0, 1.0], [0.0, 0.0]], r"here: masses .* the smallest total 0"),
        ([[math.nan, 1.0]], r"here: 1 of 2 values are not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            particles.check_masses(np.array(masses), "here")


# The labelled layer


def test_functions_are_applied_under_equal_labels_only():
    a = cloud()
    assert labels.apply(np.add, a, a).dims == a.dims
    with pytest.raises(ValueError, match=r"(?s)join=.exact"):
        labels.apply(np.add, a, a.assign_coords(time=a.time + 1e-12))


def test_a_single_system_gets_a_replica_axis():
    arrays, cores = labels.replicated(cloud(), None)
    assert arrays[0].sizes["replica"] == 1
    assert cores == [["replica", "particle", "component"]]
    arrays, cores = labels.replicated(cloud(), xr.DataArray(np.ones(4), dims="particle"))
    assert [z.sizes["replica"] for z in arrays] == [1, 1]
    assert cores[1] == ["replica", "particle"]


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("number", [0, 1, 7])
def test_threads_keep_the_order(number, workers):
    assert labels.threaded(lambda k: k * k, number, workers) == [k * k for k in range(number)]


def test_an_error_in_a_thread_is_raised():
    def one(k):
        raise RuntimeError(f"problem {k}")

    with pytest.raises(RuntimeError, match="problem 0"):
        labels.threaded(one, 3, 2)
