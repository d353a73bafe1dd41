"""W₂ by independent routes, and the traps of the library below."""

import ast
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from mfsde import EmpiricalMeasure, Gaussian, Uniform
from mfsde.analysis import wasserstein
from mfsde.analysis.wasserstein import between, between_replicas, distance, gaussian_distance

RNG = np.random.default_rng(7)


def by_permutations(x, y):
    """The definition for equal masses: the best of all assignments."""
    costs = [np.mean(np.sum((x - y[list(p)]) ** 2, axis=1)) for p in itertools.permutations(range(len(y)))]
    return math.sqrt(min(costs))


@pytest.mark.parametrize("d", [1, 2, 5])
def test_it_is_the_best_assignment(d):
    x, y = RNG.normal(size=(6, d)), RNG.normal(1.0, 2.0, size=(6, d))
    assert distance(x, y) == pytest.approx(by_permutations(x, y), rel=1e-12)
    # A planted fault: the square in place of the root would not pass.
    assert distance(x, y) ** 2 != pytest.approx(by_permutations(x, y), rel=1e-3)


def test_sorting_and_the_linear_program_agree_in_one_dimension():
    x, y = RNG.normal(size=(40, 1)), RNG.normal(0.3, 1.4, size=(55, 1))
    p, q = RNG.dirichlet(np.ones(40)), RNG.dirichlet(np.ones(55))
    sorted_ = distance(
        EmpiricalMeasure(torch.tensor(x), torch.tensor(p)), EmpiricalMeasure(torch.tensor(y), torch.tensor(q))
    )
    assert sorted_ == pytest.approx(wasserstein._program(x, p, y, q), rel=1e-10)


def test_an_affine_image_under_a_positive_matrix_has_the_closed_form():
    # Y = AX + b, A symmetric positive definite, is optimal: W₂ is Bures' formula with the 1/N covariances.
    x = RNG.normal(size=(60, 3))
    a = np.array([[2.0, 0.3, 0.1], [0.3, 1.0, -0.2], [0.1, -0.2, 0.5]])
    y = x @ a + [1.0, -2.0, 0.5]
    moments = [(z.mean(0), np.cov(z.T, bias=True)) for z in (x, y)]
    assert distance(x, y) == pytest.approx(gaussian_distance(*moments[0], *moments[1]), rel=1e-10)
    assert distance(x, y) != pytest.approx(distance(x, -y), rel=1e-2)


def test_gaussians_have_the_closed_form_of_one_dimension():
    a, b = Gaussian([1.0], [[4.0]]), Gaussian([0.0], [[0.25]])
    assert distance(a, b) == pytest.approx(math.sqrt(1 + 1.5**2), rel=1e-12)


def test_an_offset_costs_no_digits_in_float32():
    x, y = (RNG.normal(size=(50, 2)) for _ in range(2))
    moved = distance((x + 1e4).astype(np.float32), (y + 1e4).astype(np.float32))
    assert moved == pytest.approx(distance(x, y), rel=5e-3)
    assert moved > 0.1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("d", [1, 2])
def test_values_that_are_not_finite_raise_and_are_never_zero(bad, d):
    x, y = RNG.normal(size=(10, d)), RNG.normal(size=(10, d))
    x[3, 0] = bad
    for pair in ((x, y), (y, x)):
        with pytest.raises(ValueError, match="not finite"):
            distance(*pair)


def test_a_program_that_does_not_converge_raises(monkeypatch):
    monkeypatch.setattr(wasserstein, "ITERATIONS", 5)
    with pytest.raises(RuntimeError, match="did not converge"):
        distance(RNG.normal(size=(80, 2)), RNG.normal(size=(80, 2)))


def test_what_cannot_be_compared_is_refused():
    x = RNG.normal(size=(10, 2))
    with pytest.raises(ValueError, match="dimensions differ, 2 and 3"):
        distance(x, RNG.normal(size=(10, 3)))
    with pytest.raises(ValueError, match=r"cost matrix of 74\.5 GiB"):
        distance(np.zeros((100_000, 2)), np.ones((100_000, 2)))
    with pytest.raises(ValueError, match="no closed form"):
        distance(x, Uniform(0.0, 1.0))
    with pytest.raises(ValueError, match="expected a sample"):
        distance(x, np.zeros((2, 3, 4)))


def positions(t=3, r=4, n=20, d=2):
    values = RNG.normal(size=(t, r, n, d))
    coords = {"time": np.arange(t) * 0.5, "replica": np.arange(r), "particle": np.arange(n), "component": np.arange(d)}
    return xr.DataArray(values, coords=coords, dims=("time", "replica", "particle", "component"), name="position")


@pytest.mark.parametrize("d", [1, 2])
def test_between_runs_over_the_remaining_dimensions_and_keeps_coordinates(d):
    a, b = positions(d=d), positions(d=d, n=30)
    found = between(a, b)
    assert found.dims == ("time", "replica")
    assert found.attrs["power"] == 1
    np.testing.assert_array_equal(found.time, a.time)
    for t, r in itertools.product(range(3), range(4)):
        assert float(found[t, r]) == distance(a.values[t, r], b.values[t, r])


def test_between_broadcasts_a_reference_and_refuses_other_times():
    a = positions()
    end = between(a, a.isel(time=-1, drop=True))
    assert end.dims == ("time", "replica")
    assert float(abs(end.isel(time=-1)).max()) < 1e-7
    with pytest.raises(ValueError, match="time"):
        between(a, a.assign_coords(time=a.time + 1e-12))
    with pytest.raises(ValueError, match="`particle` and `component`"):
        between(a.isel(particle=0), a)


def test_between_replicas_takes_every_pair_once():
    a = positions()
    found = between_replicas(a)
    assert found.sizes == {"time": 3, "pair": 6}
    pairs = list(zip(found.replica_a.values.tolist(), found.replica_b.values.tolist(), strict=True))
    assert pairs == list(itertools.combinations(range(4), 2))
    assert float(found[1, 4]) == distance(a.values[1, 1], a.values[1, 3])
    with pytest.raises(ValueError, match="at least two replicas"):
        between_replicas(a.isel(replica=[0]))


def test_masses_are_part_of_the_law():
    a = xr.DataArray([[0.0], [1.0]], dims=("particle", "component"), attrs={"weighted": "by the variable weight"})
    p, q = (xr.DataArray(w, dims="particle") for w in ([0.9, 0.1], [0.1, 0.9]))
    assert float(between(a, a, weight_a=p, weight_b=q)) == pytest.approx(math.sqrt(0.8), rel=1e-12)
    with pytest.raises(ValueError, match="unequal masses; pass weight_a"):
        between(a, a)
    pairs = a.expand_dims(replica=2)
    weights = xr.concat([p, q], "replica")
    assert float(between_replicas(pairs, weights)[0]) == pytest.approx(math.sqrt(0.8), rel=1e-12)


def test_on_a_torus_the_shorter_way_counts():
    x, y = torch.tensor([[0.01]], dtype=torch.float64), torch.tensor([[0.99]], dtype=torch.float64)
    assert distance(EmpiricalMeasure(x, period=1.0), EmpiricalMeasure(y, period=1.0)) == pytest.approx(0.02, rel=1e-9)
    assert distance(EmpiricalMeasure(x), EmpiricalMeasure(y)) == pytest.approx(0.98, rel=1e-9)
    with pytest.raises(ValueError, match="different tori"):
        distance(EmpiricalMeasure(x, period=1.0), EmpiricalMeasure(y, period=2.0))
    # Wrapping one component of a cloud moves nothing on the torus; the other lives on a line.
    cloud = RNG.uniform(size=(20, 2))
    moved = cloud + np.where(RNG.uniform(size=(20, 1)) < 0.5, 1.0, 0.0) * [1.0, 0.0]
    a, b = (xr.DataArray(z, dims=("particle", "component"), attrs={"period": "[1.0, null]"}) for z in (cloud, moved))
    assert float(between(a, b)) < 1e-6
    assert float(between(a, b.drop_attrs())) < 1e-6
    assert float(between(a.drop_attrs(), b.drop_attrs())) > 0.1


def test_pot_is_imported_by_this_module_alone():
    root = Path(__file__).parent.parent
    for file in itertools.chain(*((root / name).rglob("*.py") for name in ("mfsde", "scenarios", "analysis"))):
        names = {
            alias.name.split(".")[0]
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in (node.names if isinstance(node, ast.Import) else [ast.alias(node.module or "")])
        }
        assert ("ot" in names) == (file.name == "wasserstein.py"), file
