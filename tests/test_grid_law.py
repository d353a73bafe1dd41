"""Grids and the laws on them."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mfsde
from mfsde.limit import GridLaw, flow, law_at
from mfsde.limit.flow import Displacement
from mfsde.limit.grid import Axis, Grid
from mfsde.limit.grid_law import _inverted

TURN = 2 * math.pi


def on(law, x):
    return law.log_prob(torch.from_numpy(x)[:, None]).exp().numpy()


def test_widths_are_the_trapezoidal_rule():
    nodes = np.array([0.0, 0.5, 0.75, 1.5, 2.0])
    f = np.sin(nodes)
    assert Axis.of(nodes).widths @ f == pytest.approx(np.trapezoid(f, nodes), abs=1e-15)
    assert Grid.of(nodes, 1).integral(f) == pytest.approx(np.trapezoid(f, nodes), abs=1e-15)


@pytest.mark.parametrize("closed", [True, False])
def test_a_circle_is_gone_round_once(closed):
    axis = Axis.of(np.linspace(0, TURN, 9)[: 9 if closed else 8], TURN)
    assert len(axis.nodes) == 8
    assert axis.is_closed is closed
    assert axis.widths.sum() == pytest.approx(TURN)
    assert len(axis.shown) == (9 if closed else 8)
    assert axis.show(axis.nodes)[-1] == (0.0 if closed else axis.nodes[-1])


def test_a_refined_grid_holds_the_own_nodes_and_all_midpoints():
    grid = Grid.of((np.linspace(0, 1, 5) ** 2, np.linspace(0, TURN, 7)), 2, [None, TURN])
    fine = grid.refined()
    assert fine.shape == (9, 12)
    x = fine.points.reshape(9, 12, 2)
    assert np.array_equal(grid.restricted(np.moveaxis(x, -1, 0)), np.moveaxis(grid.points.reshape(5, 6, 2), -1, 0))
    assert fine.axes[1].nodes[-1] == pytest.approx(TURN - TURN / 12)


@pytest.mark.parametrize(
    ("nodes", "kind", "text"),
    [
        ([0.0, 1.0], ValueError, "at least 5"),
        (np.zeros(9), ValueError, "increasing"),
        (np.array([0, 1, 2, np.nan, 4]), ValueError, "increasing finite"),
        ("line", TypeError, "row of numbers"),
        (np.zeros((5, 2)), ValueError, r"\(G,\)"),
    ],
)
def test_nodes_that_are_no_grid_are_refused(nodes, kind, text):
    with pytest.raises(kind, match=text):
        Grid.of(nodes, 1)


def test_more_than_one_turn_is_refused():
    with pytest.raises(ValueError, match="more than once"):
        Grid.of(np.linspace(0, 7, 50), 1, TURN)
    with pytest.raises(TypeError, match="pair of rows"):
        Grid.of(np.linspace(0, 7, 50), 2)


# Laws -----------------------------------------------------------------------------------------------------------------

TWO = mfsde.Mixture([mfsde.Gaussian([-1.0], [[0.1]]), mfsde.Gaussian([1.0], [[0.4]])], [0.3, 0.7])


def grid_law(n, low=-5.0, high=6.0, law=TWO):
    x = np.linspace(low, high, n)
    return GridLaw(x, on(law, x))


def test_a_law_on_a_line_is_the_law_it_was_made_from():
    law = grid_law(801)
    assert law.density @ law.grid.widths == pytest.approx(1, abs=1e-14)
    assert float(law.mean[0]) == pytest.approx(float(TWO.mean[0]), abs=1e-10)
    assert float(law.cov[0, 0]) == pytest.approx(float(TWO.cov[0, 0]), abs=1e-10)
    x = torch.linspace(-2.5, 3.5, 400, dtype=torch.float64)
    assert torch.allclose(law.log_prob(x[:, None]), TWO.log_prob(x[:, None]), atol=2e-6)
    assert torch.allclose(law.cdf(x), TWO.cdf(x), atol=1e-7)
    u = torch.linspace(0.001, 0.999, 500, dtype=torch.float64)
    assert torch.allclose(law.quantile(u), TWO.quantile(u), atol=2e-5)
    assert torch.allclose(law.cdf(law.quantile(u)), u, atol=1e-14)


def test_quantiles_and_log_densities_converge_with_the_fourth_order():
    # Halving h divides the error by 16; 9 leaves room for what is not yet asymptotic.
    u = torch.linspace(0.02, 0.98, 301, dtype=torch.float64)
    x = TWO.quantile(u)[:, None]
    errors = [
        (float((law.quantile(u) - TWO.quantile(u)).abs().max()), float((law.log_prob(x) - TWO.log_prob(x)).abs().max()))
        for law in map(grid_law, (201, 401, 801))
    ]
    for rough, fine in itertools.pairwise(errors):
        assert rough[0] / fine[0] > 9
        assert rough[1] / fine[1] > 9


def test_the_score_is_the_derivative_of_the_log_density():
    x = torch.linspace(-2, 3, 50, dtype=torch.float64)[:, None]
    law = grid_law(801)
    step = 1e-5
    slope = (law.log_prob(x + step) - law.log_prob(x - step)) / (2 * step)
    assert torch.allclose(law.score(x)[:, 0], slope, atol=1e-6)


def test_samples_of_a_law_on_the_line_follow_it_monotonically():
    law = grid_law(401)
    z = torch.linspace(-3, 3, 101, dtype=torch.float64)[:, None]
    x = law.from_variates(z)
    assert bool((x[1:] > x[:-1]).all())
    assert torch.allclose(x[:, 0], TWO.quantile(torch.special.ndtr(z[:, 0])), atol=1e-4)
    assert law.from_variates(z.float()).dtype is torch.float32


@given(st.lists(st.floats(0, 1), min_size=6, max_size=40).filter(lambda d: max(d) > 1e-3), st.integers(0, 10))
def test_a_rough_density_still_has_an_increasing_distribution_function(density, seed):
    nodes = np.cumsum(np.random.default_rng(seed).uniform(0.1, 1.0, len(density)))
    law = GridLaw(nodes, np.array(density))
    x = torch.linspace(float(nodes[0]), float(nodes[-1]), 200, dtype=torch.float64)
    levels = law.cdf(x)
    assert bool((torch.diff(levels) >= -1e-12).all())
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    q = law.quantile(u)
    assert bool((torch.diff(q) >= -1e-9).all())
    assert torch.allclose(law.cdf(q), u, atol=1e-9)


def test_the_inverse_of_a_flat_piece_is_inside_it():
    law = GridLaw(np.arange(9.0), np.array([0, 1, 1, 0, 0, 0, 1, 1, 0.0]))
    u = law.cdf(torch.tensor([4.5], dtype=torch.float64))
    assert 2.9 < float(_inverted(law._distribution, u.numpy())[0]) < 6.1


def test_a_density_of_zeros_far_out_has_a_log_density_of_minus_infinity_there():
    x = np.linspace(-3, 3, 61)
    law = GridLaw(x, np.where(np.abs(x) < 2, 1 - x**2 / 4, 0.0))
    assert float(law.log_prob(torch.tensor([[2.5]], dtype=torch.float64))) == -math.inf
    assert math.isfinite(float(law.log_prob(torch.tensor([[1.9]], dtype=torch.float64))))
    assert float(law.log_prob(torch.tensor([[99.0]], dtype=torch.float64))) == -math.inf


def test_a_hole_carries_nothing():
    x = np.linspace(0, 4, 41)
    law = GridLaw(x, ((x <= 1) | (x >= 3)).astype(float))
    at = torch.tensor([[2.0], [0.5], [1.0], [3.55]], dtype=torch.float64)
    assert law.log_prob(at).isfinite().tolist() == [False, True, True, True]


@pytest.mark.parametrize("closed", [True, False])
def test_a_law_on_a_circle(closed):
    x = np.linspace(0, TURN, 201)[: 201 if closed else 200]
    law = GridLaw(x, np.exp(np.cos(x - 1)), TURN)
    assert law.density @ law.grid.widths == pytest.approx(1, abs=1e-14)
    at = torch.tensor([[0.3], [0.3 + TURN], [0.3 - TURN]], dtype=torch.float64)
    known = math.cos(0.3 - 1) - math.log(TURN * float(torch.special.i0(torch.tensor(1.0, dtype=torch.float64))))
    assert torch.allclose(law.log_prob(at), torch.full((3,), known, dtype=torch.float64), atol=1e-7)
    assert law.as_measure().period == [TURN]
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    assert torch.allclose(law.cdf(law.quantile(u)), u, atol=1e-12)


PLANE = mfsde.Gaussian([0.3, -0.2], [[0.5, 0.2], [0.2, 0.4]])


def plane_law(n=121):
    x = np.linspace(-5, 5, n)
    nodes = torch.from_numpy(Grid.of((x, x), 2).points)
    return GridLaw((x, x), PLANE.log_prob(nodes).exp().numpy().reshape(n, n))


def test_a_law_on_the_plane():
    law = plane_law()
    assert torch.allclose(law.mean, PLANE.mean, atol=1e-9)
    assert torch.allclose(law.cov, PLANE.cov, atol=1e-8)
    x = PLANE.from_variates(torch.randn(300, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    assert torch.allclose(law.log_prob(x), PLANE.log_prob(x), atol=1e-6)
    centred = x - PLANE.mean
    assert torch.allclose(law.score(x), -centred @ torch.linalg.inv(PLANE.cov), atol=1e-6)
    with pytest.raises(ValueError, match="one dimension only"):
        law.quantile(torch.tensor([0.5]))


def test_samples_on_the_plane_have_the_law_and_a_wrong_one_is_noticed():
    n = 40_000
    x = plane_law().sample(n, torch.Generator().manual_seed(0))
    # The transform by Gaussian conditionals is exactly normal; each moment has the standard error of n samples.
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(PLANE.cov), (x - PLANE.mean).T, upper=False).T

    def worst(z):
        moments = [(z[:, 0], 1.0), (z[:, 1], 1.0), (z[:, 0] * z[:, 1], 1.0)]
        moments += [(z[:, k] ** 2 - 1, math.sqrt(2)) for k in (0, 1)]
        return max(abs(float(m.mean())) / (s / math.sqrt(n)) for m, s in moments)

    assert worst(white) < 4
    assert worst(white * torch.tensor([1.0, 1.05])) > 4
    assert worst(white.flip(1) * 0.5 + 0.5 * white) > 4


def test_rows_of_variates_on_the_plane_do_not_depend_on_their_number():
    law = plane_law(61)
    z = torch.randn(50, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert torch.equal(law.from_variates(z)[:20], law.from_variates(z[:20]))


@pytest.mark.parametrize(
    ("density", "text"),
    [
        (np.zeros(9), "not zero everywhere"),
        (-np.ones(9), "non-negative"),
        (np.full(9, np.nan), "finite"),
        (np.ones(8), "one each"),
        (np.ones((9, 9, 9)), r"\(G,\)"),
    ],
)
def test_no_density_is_refused(density, text):
    with pytest.raises(ValueError, match=text):
        GridLaw(np.linspace(0, 1, 9), density)


# Between times --------------------------------------------------------------------------------------------------------


def limit_of(laws, times):
    import xarray as xr

    x = np.linspace(-6, 8, 701)
    return xr.Dataset({"density": (("time", "x"), [on(law, x) for law in laws])}, {"time": times, "x": x})


def test_at_saved_times_the_law_is_the_saved_one_and_between_them_on_the_geodesic():
    first, second = mfsde.Gaussian([0.0], [[1.0]]), mfsde.Gaussian([2.0], [[0.25]])
    limit = limit_of([first, second], [0.0, 1.0])
    u = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    assert torch.allclose(law_at(limit, 1.0).quantile(u), second.quantile(u), atol=1e-6)
    # W₂'s geodesic between Gaussians on the line: mean and deviation are linear.
    middle = law_at(limit, 0.25)
    assert isinstance(middle, Displacement)
    assert torch.allclose(middle.quantile(u), mfsde.Gaussian([0.5], [[0.875**2]]).quantile(u), atol=1e-6)
    assert float(middle.mean[0]) == pytest.approx(0.5, abs=1e-8)
    assert float(middle.cov[0, 0]) == pytest.approx(0.875**2, rel=1e-3)
    # What averages densities instead would be off by far.
    assert abs(float(middle.quantile(torch.tensor(0.9))) - 1.6214) < 1e-3
    at = flow(limit)
    assert at(0.25) is at(0.25)
    with pytest.raises(ValueError, match="solve it up to there"):
        at(1.5)


def test_a_dataset_without_a_density_is_refused():
    with pytest.raises(ValueError, match="density"):
        law_at(limit_of([TWO], [0.0]).rename(density="other"), 0.0)
    with pytest.raises(ValueError, match="isel"):
        law_at(limit_of([TWO], [0.0]).expand_dims(replica=2), 0.0)
