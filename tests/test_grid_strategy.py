"""Sums over pairs on a grid: splines and filters exactly, sums within the declared error, invariances, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.interpolate import BSpline
from torch import Tensor

from mfsde.pairwise import grid as grids
from mfsde.pairwise.blocked import Blocked
from mfsde.pairwise.grid import Grid
from mfsde.pairwise.kernel import Kernel, Pairs

FLOAT64 = torch.float64
TURN = 2 * math.pi


def gaussian(z: Tensor) -> Tensor:
    return torch.exp(-z.square().sum(-1) / 2)


def narrow(z: Tensor) -> Tensor:
    return torch.exp(-50 * z.square().sum(-1))


def well(z: Tensor) -> Tensor:
    """Zero at 0."""
    return 1 - torch.exp(-z.square().sum(-1) / 2)


def morse(z: Tensor) -> Tensor:
    """Regularised: of two lengths, with cancellation."""
    r = (z.square().sum(-1) + 0.1).sqrt()
    return torch.exp(-r) - 0.5 * torch.exp(-r / 2)


def spring(z: Tensor) -> Tensor:
    """It grows, and has a feature at 0."""
    return z.square().sum(-1) / 2 + gaussian(z)


def matrix(z: Tensor) -> Tensor:
    """(..., d) -> (..., 2, d), neither even nor odd."""
    return torch.stack([gaussian(z)[..., None] * (1 + z), z / (1 + z.square().sum(-1, keepdim=True))], -2)


def kuramoto(z: Tensor) -> Tensor:
    """Of period 2π in every component."""
    return torch.cos(z).sum(-1) + 0.3 * torch.cos(2 * z).prod(-1)


def absolute(z: Tensor) -> Tensor:
    return z.abs().sum(-1)


SMOOTH = {f.__name__: Kernel(f) for f in (gaussian, narrow, well, morse, spring, matrix)}
SMOOTH |= {f"gradient of {name}": SMOOTH[name].slope for name in ("gaussian", "narrow", "morse", "spring")}
every_kernel = pytest.mark.parametrize("kernel", SMOOTH.values(), ids=SMOOTH)
FORCE = SMOOTH["gradient of gaussian"]


def some_pairs(
    n: int = 300,
    *,
    d: int = 2,
    m: int | None = None,
    spread: float = 1.0,
    replicas: int = 1,
    seed: int = 0,
    period=None,
) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    points = spread * torch.randn(replicas, n, d, generator=generator, dtype=FLOAT64)
    x = points if m is None else spread * torch.randn(replicas, m, d, generator=generator, dtype=FLOAT64)
    weights = torch.softmax(torch.randn(replicas, n, generator=generator, dtype=FLOAT64), -1)
    return Pairs(x, points, weights, period)


def moved(pairs: Pairs, by: Tensor) -> Pairs:
    return Pairs(pairs.x + by, pairs.points + by, pairs.weights, pairs.period, pairs.own)


def relative_error(strategy: Grid, kernel: Kernel, pairs: Pairs) -> float:
    exact = Blocked().sums(kernel, pairs).detach()
    return float((strategy.sums(kernel, pairs).detach() - exact).norm() / exact.norm())


# Splines and filters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [4, 6, 8])
def test_weights_are_those_of_the_cardinal_spline(p):
    u = torch.linspace(0, 1, 11, dtype=FLOAT64)[:-1]
    weights = sum(u**k * grids._pieces(p)[k].unsqueeze(1) for k in range(p))
    spline = BSpline.basis_element(torch.arange(p + 1).numpy() - p / 2, extrapolate=False)
    for a in range(p):
        expected = torch.tensor(spline(u.numpy() - (a + 1 - p // 2))).nan_to_num()
        torch.testing.assert_close(weights[a], expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("p", [4, 6, 8])
def test_the_filter_undoes_the_spline_to_two_orders_more_than_interpolation(p):
    n = 64
    k = torch.arange(1, 5, dtype=FLOAT64)
    angle = TURN * k / n
    transform = (torch.sin(angle / 2) / (angle / 2)) ** p
    left = (grids._filter(p, n)[1:5] * transform - 1).abs()
    assert bool((left <= (angle / 2) ** (p + 2)).all())


@pytest.mark.parametrize("order", [4, 6, 8])
@pytest.mark.parametrize("d", [1, 2])
def test_polynomials_of_the_splines_degree_are_exact(monkeypatch, order, d):
    """To what is left of the cut of periodic differences, below tolerance/10 of its size: too much to be accepted."""
    monkeypatch.setattr(grids, "_spacing", lambda measure: measure.strategy.spacing)
    kernel = Kernel(lambda z: z[..., :1] ** (order - 1) - 2 * z.sum(-1, keepdim=True) ** 2 + 0.5)
    assert relative_error(Grid(1e-10, order=order, spacing=0.7), kernel, some_pairs(50, d=d)) <= 1e-7


@pytest.mark.parametrize("order", [4, 6, 8])
def test_the_error_falls_with_the_order_of_the_spline(order):
    """Errors of independent positions: the slope between spacings h and h/2 is p, up to h²."""
    pairs = some_pairs(100)
    coarse, fine = (relative_error(Grid(1e-2, order=order, spacing=h), FORCE, pairs) for h in (0.4, 0.2))
    assert math.log2(coarse / fine) >= order - 0.5


# The declared error ---------------------------------------------------------------------------------------------------


def pair_error(strategy: Grid, kernel: Kernel, d: int, period=None) -> float:
    """Root mean square over single pairs, relative to K's, in the balls of radius h, 4h, 16h, ...: the largest."""
    like = torch.zeros(1, d, dtype=FLOAT64)
    h = strategy.spacing_for(kernel, like, period)
    generator = torch.Generator().manual_seed(5)
    worst = 0.0
    for radius in (h, 4 * h, 16 * h):
        y = torch.rand(12, 1, d, generator=generator, dtype=FLOAT64)
        z = torch.randn(12, 40, d, generator=generator, dtype=FLOAT64)
        share = torch.rand(12, 40, 1, generator=generator, dtype=FLOAT64)
        x = y + radius * z / z.norm(dim=-1, keepdim=True) * share ** (1 / d)
        worst = max(worst, relative_error(strategy, kernel, Pairs(x, y, torch.ones(12, 1, dtype=FLOAT64), period)))
    return worst


@pytest.mark.parametrize("d", [1, 2])
@every_kernel
def test_single_pairs_are_within_the_tolerance(kernel, d):
    assert pair_error(Grid(1e-3), kernel, d) <= 1e-3


@every_kernel
def test_a_spacing_far_above_the_one_found_is_not_and_is_refused(kernel):
    like = torch.zeros(1, 2, dtype=FLOAT64)
    h = 2.5 * Grid(1e-3).spacing_for(kernel, like)
    assert pair_error(Grid(0.1, order=4, spacing=h), kernel, 2) > 1e-3
    with pytest.raises(
        ValueError, match=r"relative error .* at spacing .*, above the tolerance 0.001\. Give a smaller"
    ):
        Grid(1e-3, spacing=h).spacing_for(kernel, like)
    assert Grid(1e-3, spacing=h / 3).spacing_for(kernel, like) == h / 3


@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-5])
@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("d", [1, 2])
def test_forces_are_within_the_tolerance(d, spread, tolerance):
    for name in ("gradient of gaussian", "gradient of spring"):
        assert relative_error(Grid(tolerance), SMOOTH[name], some_pairs(d=d, spread=spread)) <= tolerance


@every_kernel
def test_single_precision_meets_the_tolerance(kernel):
    pairs = some_pairs(spread=2.0)
    single = Pairs(pairs.x.float(), pairs.points.float(), pairs.weights.float())
    found = Grid(1e-3).sums(kernel, single).detach()
    exact = Blocked().sums(kernel, pairs).detach()
    assert found.dtype == torch.float32
    assert float((found - exact).norm() / exact.norm()) <= 1e-3


def stripes(z: Tensor) -> Tensor:
    """Of period 2π in the first component."""
    return torch.exp(torch.cos(z[..., 0]) - z[..., 1].square() / 8)


@pytest.mark.parametrize(
    ("function", "period"),
    [(kuramoto, TURN), (kuramoto, (2 * TURN, TURN)), (stripes, (TURN, None)), (gaussian, (50.0, 20.0))],
)
def test_tori_and_cylinders_are_within_the_tolerance(function, period):
    for kernel in (Kernel(function), Kernel(function).slope):
        assert relative_error(Grid(1e-3), kernel, some_pairs(spread=3.0, period=period)) <= 1e-3


def test_a_kink_at_half_a_period_costs_spacing_and_is_refused_where_the_tolerance_is_not_met():
    kernel = Kernel(narrow).slope
    pairs = some_pairs(period=4.0)
    assert relative_error(Grid(1e-2), kernel, pairs) <= 1e-2
    with pytest.raises(ValueError, match=r"not smooth enough for a grid: it jumps by 4 .* Make it periodic"):
        Grid(1e-4).sums(Kernel(lambda z: z), pairs)


def test_two_clusters_at_the_ends_of_the_box_see_each_other():
    """Of the box's longest differences none is spoilt by where periodic ones are cut."""
    generator = torch.Generator().manual_seed(2)
    y = torch.randn(1, 40, 2, generator=generator, dtype=FLOAT64)
    x = y + torch.tensor([25.0, -13.0], dtype=FLOAT64)
    pairs = Pairs(x, y, torch.full((1, 40), 1 / 40, dtype=FLOAT64))
    for name in ("spring", "gradient of spring", "matrix"):
        assert relative_error(Grid(1e-3), SMOOTH[name], pairs) <= 1e-4


def within(z: Tensor) -> Tensor:
    return (z.norm(dim=-1) < 1).to(z)


JUMPS = {
    "indicator": within,
    "bounded confidence": lambda z: z * within(z).unsqueeze(-1),
    "along a component": lambda z: gaussian(z) * (z[..., -1] < 0.7),
    "small": lambda z: gaussian(z) + 0.02 * within(z / 1.3),
    "cut off": lambda z: gaussian(z) * within(z / 2.5),
}


@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-5])
@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("name", JUMPS)
def test_jumps_are_refused(name, d, tolerance):
    with pytest.raises(ValueError, match="not smooth enough for a grid: it jumps by"):
        Grid(tolerance).spacing_for(Kernel(JUMPS[name]), torch.zeros(1, d, dtype=FLOAT64))


@pytest.mark.parametrize("name", JUMPS)
def test_jumps_are_refused_at_a_given_spacing(name):
    with pytest.raises(ValueError, match="not smooth enough for a grid: it jumps by"):
        Grid(1e-3, spacing=1e-3).spacing_for(Kernel(JUMPS[name]), torch.zeros(1, 1, dtype=FLOAT64))


@pytest.mark.parametrize(("tolerance", "height"), [(1e-1, 1e-2), (1e-3, 1e-5)])
def test_jumps_below_the_tolerance_are_not(tolerance, height):
    kernel = Kernel(lambda z: gaussian(z) + height * within(z / 1.3))
    like = torch.zeros(1, 2, dtype=FLOAT64)
    found, smooth = (Grid(tolerance).spacing_for(k, like) for k in (kernel, SMOOTH["gaussian"]))
    assert smooth / 2 <= found <= smooth


def kink(z: Tensor) -> Tensor:
    return (1 - z.square().sum(-1)).relu()


def step(z: Tensor) -> Tensor:
    return torch.tanh((z.square().sum(-1) - 1) * 5e3)


def error_around_the_unit_sphere(function, d: int, tolerance: float) -> float:
    """Of pairs within five spacings of |z| = 1, counted with the share that they have of the ball |z| <= 1.2."""
    kernel = Kernel(function)
    h = Grid(tolerance).spacing_for(kernel, torch.zeros(1, d, dtype=FLOAT64))
    generator = torch.Generator().manual_seed(5)
    y = h * torch.rand(4, 1, d, generator=generator, dtype=FLOAT64)
    # A small sector needs a small box.
    z = torch.cat([torch.ones(4, 200, 1), 0.2 * torch.rand(4, 200, d - 1, generator=generator)], -1).double()
    length = 1 + 5 * h * (2 * torch.rand(4, 200, 1, generator=generator, dtype=FLOAT64) - 1)
    pairs = Pairs(y + z / z.norm(dim=-1, keepdim=True) * length, y, torch.ones(4, 1, dtype=FLOAT64))
    error = (Grid(tolerance).sums(kernel, pairs) - Blocked().sums(kernel, pairs)).square().mean()
    share = ((1 + 5 * h) ** d - (1 - 5 * h) ** d) / 1.2**d
    ball = 1.2 * torch.linspace(0, 1, 10001, dtype=FLOAT64).unsqueeze(-1) ** (1 / d) * torch.eye(d, dtype=FLOAT64)[0]
    return math.sqrt(float(share * error / kernel(ball).square().mean()))


NARROW = [(kink, 1, 1e-5), (kink, 2, 4e-5), (step, 1, 1e-3)]


@pytest.mark.parametrize(("function", "d", "tolerance"), NARROW)
def test_features_narrower_than_the_distances_of_samples_are_within_the_tolerance(function, d, tolerance):
    assert error_around_the_unit_sphere(function, d, tolerance) <= tolerance


@pytest.mark.parametrize(("function", "d", "tolerance"), NARROW)
def test_without_samples_where_the_kernel_is_rough_they_are_not(monkeypatch, function, d, tolerance):
    none = grids._Rough(
        *(torch.zeros(0, n, dtype=FLOAT64) for n in (d, d)), torch.zeros(0).long(), *torch.zeros(2, 0, 2)
    )
    monkeypatch.setattr(grids._Measure, "rough", none)
    assert error_around_the_unit_sphere(function, d, tolerance) > tolerance


# Shapes, own terms, invariances ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2])
@every_kernel
def test_points_elsewhere_and_several_replicas(kernel, d):
    pairs = some_pairs(60, d=d, m=17, replicas=3)
    found = Grid(1e-4).sums(kernel, pairs)
    exact = Blocked().sums(kernel, pairs)
    assert found.shape == exact.shape
    assert float(((found - exact).norm() / exact.norm()).detach()) <= 1e-4


def test_each_replica_is_as_if_alone():
    pairs = some_pairs(80, replicas=4)
    together = Grid().sums(FORCE, pairs)
    for r in range(4):
        alone = Grid().sums(FORCE, Pairs(pairs.x[r : r + 1], pairs.points[r : r + 1], pairs.weights[r : r + 1]))
        torch.testing.assert_close(together[r : r + 1], alone, rtol=0, atol=1e-14)


@every_kernel
def test_own_terms_are_left_out(kernel):
    pairs = some_pairs(40, replicas=2)
    own = torch.arange(40).flip(0)
    pairs = Pairs(pairs.points[:, own], pairs.points, pairs.weights, own=own)
    assert relative_error(Grid(1e-3), kernel, pairs) <= 1e-3


@every_kernel
def test_a_single_particle_without_itself_sees_nothing(kernel):
    """The term left out is the one that the grid added, to rounding."""
    x = torch.tensor([[[0.3, -0.7]]], dtype=FLOAT64)
    alone = Pairs(x, x, torch.ones(1, 1, dtype=FLOAT64), own=torch.zeros(1, dtype=torch.int64))
    size = float(kernel(x).abs().max().detach())
    assert float(Grid().sums(kernel, alone).detach().abs().max()) <= 1e-12 * (1 + size)


@pytest.mark.parametrize("replicas", [1, 3])
def test_single_precision_keeps_its_digits_however_many_masses_a_node_collects(replicas):
    pairs = some_pairs(60000 // replicas, d=1, replicas=replicas)
    few = Pairs(pairs.points[:, :20], pairs.points, torch.full_like(pairs.weights, replicas / 60000))
    single = Pairs(few.x.float(), few.points.float(), few.weights.float())
    exact = Grid(1e-5).sums(FORCE, few).detach()
    assert float((Grid(1e-5).sums(FORCE, single).detach() - exact).norm() / exact.norm()) <= 1e-5


def test_many_blocks_of_particles_give_the_same_sums(monkeypatch):
    pairs = some_pairs(100, replicas=2)
    whole = Grid().sums(FORCE, pairs)
    monkeypatch.setattr(grids, "BLOCK", 7)
    torch.testing.assert_close(Grid().sums(FORCE, pairs), whole, rtol=0, atol=1e-15)
    monkeypatch.setattr(grids, "KEPT_NODES", 0)
    torch.testing.assert_close(Grid().sums(FORCE, pairs), whole, rtol=0, atol=1e-15)


def test_relabelling_particles_relabels_their_sums():
    pairs, order = some_pairs(200), torch.randperm(200, generator=torch.Generator().manual_seed(1))
    found = Grid().sums(FORCE, Pairs(pairs.x[:, order], pairs.points[:, order], pairs.weights[:, order]))
    torch.testing.assert_close(found, Grid().sums(FORCE, pairs)[:, order], rtol=0, atol=1e-15)


def test_translations_change_nothing_beyond_the_tolerance_and_whole_spacings_nothing():
    pairs, strategy = some_pairs(200), Grid(1e-3, spacing=0.25)
    here = strategy.sums(FORCE, pairs).detach()
    there = strategy.sums(FORCE, moved(pairs, torch.tensor([-1.75, 1000.0], dtype=FLOAT64)))
    torch.testing.assert_close(there.detach(), here, rtol=0, atol=1e-12)
    off = strategy.sums(FORCE, moved(pairs, torch.tensor([0.1, -7.32], dtype=FLOAT64)))
    assert 1e-9 < float((off.detach() - here).norm() / here.norm()) <= 1e-3


def test_the_box_changes_rounding_only():
    pairs = some_pairs(100)
    far = torch.tensor([[[20.0, -9.0]]], dtype=FLOAT64)
    wide = Pairs(
        pairs.x, torch.cat([pairs.points, far], 1), torch.cat([pairs.weights, pairs.weights.new_zeros(1, 1)], 1)
    )
    torch.testing.assert_close(Grid().sums(FORCE, wide), Grid().sums(FORCE, pairs), rtol=0, atol=1e-9)


def test_turns_of_a_torus_change_rounding_only():
    kernel = Kernel(kuramoto).slope
    pairs = some_pairs(100, period=TURN)
    turned = moved(pairs, TURN * torch.tensor([3.0, -2.0], dtype=FLOAT64))
    torch.testing.assert_close(Grid().sums(kernel, turned), Grid().sums(kernel, pairs), rtol=0, atol=1e-12)


def test_forces_of_an_odd_kernel_add_up_to_zero():
    pairs = some_pairs(300, spread=3.0)
    forces = Grid(1e-2).sums(FORCE, pairs)
    torch.testing.assert_close((pairs.weights.unsqueeze(-1) * forces).sum(1), torch.zeros(1, 2, dtype=FLOAT64))


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
def test_threads_do_not_change_a_bit(dtype):
    pairs = some_pairs(10000)
    pairs = Pairs(pairs.x.to(dtype), pairs.points.to(dtype), pairs.weights.to(dtype))
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(Grid().sums(FORCE, pairs).detach())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])


def test_a_resumed_run_finds_the_same_spacing_whatever_state_it_meets():
    late, early = some_pairs(50, spread=9.0), some_pairs(50, seed=3)
    interrupted, whole = Kernel(morse).slope, Kernel(morse).slope
    Grid().sums(whole, early)
    assert torch.equal(Grid().sums(whole, late), Grid().sums(interrupted, late))
    single = torch.zeros(1, 2)
    assert Grid().spacing_for(whole, late.x) == Grid().spacing_for(Kernel(morse).slope, single)


def test_sums_do_not_depend_on_the_clouds_before():
    """Two clouds of unlike extent may share a number of nodes, and a transform."""
    small, large = (torch.linspace(0, n * 0.25, 9, dtype=FLOAT64).reshape(1, 9, 1) for n in (66, 74))
    weights = torch.full((1, 9), 1 / 9, dtype=FLOAT64)
    kernels = [Kernel(lambda z: z / (1 + z.square()).sqrt() * torch.cos(0.5 * z)) for _ in range(2)]
    strategy = Grid(1e-3, spacing=0.25)
    plan = grids._plan(strategy, kernels[0], small, (math.inf,))
    assert plan.box([small]).sizes == plan.box([large]).sizes
    strategy.sums(kernels[0], Pairs(small, small, weights))
    found = [strategy.sums(kernel, Pairs(large, large, weights)) for kernel in kernels]
    assert torch.equal(found[0], found[1])


def test_spacings_scale_with_the_kernel():
    like = torch.zeros(1, 2, dtype=FLOAT64)
    wide = Grid().spacing_for(Kernel(lambda z: gaussian(z / 4)).slope, like)
    assert wide == 4 * Grid().spacing_for(FORCE, like)
    assert Grid(1e-5, order=4).spacing_for(FORCE, like) < Grid(1e-5).spacing_for(FORCE, like)


# Derivatives ----------------------------------------------------------------------------------------------------------


def test_sums_are_differentiable_in_points_weights_and_parameters(monkeypatch):
    # Every value of a parameter makes another kernel, to be measured again.
    monkeypatch.setattr(grids, "_spacing", lambda measure: measure.strategy.spacing)
    pairs = some_pairs(6, d=2, m=3)
    scale = torch.tensor(1.3, dtype=FLOAT64, requires_grad=True)
    strategy = Grid(1e-2, spacing=0.5)

    def sums(x: Tensor, points: Tensor, weights: Tensor, scale: Tensor) -> Tensor:
        kernel = Kernel(lambda z: torch.exp(-z.square().sum(-1) / (2 * scale**2)))
        return strategy.sums(kernel, Pairs(x, points, weights))

    inputs = [z.clone().requires_grad_() for z in (pairs.x, pairs.points, pairs.weights)]
    assert torch.autograd.gradcheck(sums, [*inputs, scale])
    assert torch.autograd.gradgradcheck(sums, [*inputs, scale])


@pytest.mark.parametrize("slope", [False, True])
def test_parameters_have_gradients_after_sums_without(slope):
    scale = torch.tensor(1.3, dtype=FLOAT64, requires_grad=True)
    kernel = Kernel(lambda z: torch.exp(-z.square().sum(-1) / (2 * scale**2)))
    kernel, pairs = kernel.slope if slope else kernel, some_pairs(6)
    fresh = Kernel(kernel.potential.function).slope if slope else Kernel(kernel.function)
    with torch.no_grad():
        Grid().sums(kernel, pairs)
    (found,) = torch.autograd.grad(Grid().sums(kernel, pairs).square().sum(), [scale])
    (expected,) = torch.autograd.grad(Grid().sums(fresh, pairs).square().sum(), [scale])
    assert float(expected.abs()) > 0
    assert torch.equal(found, expected)


def test_transforms_without_parameters_are_kept_where_gradients_are_followed():
    pairs, kernel = some_pairs(6), Kernel(gaussian).slope
    x = pairs.x.clone().requires_grad_()
    Grid().sums(kernel, Pairs(x, x, pairs.weights))
    plan = grids._plan(Grid(), kernel, pairs.x, (math.inf, math.inf))
    (kept,) = plan.transforms.values()
    assert not kept.requires_grad
    assert plan.transform(kernel, plan.box([x]), x) is kept


def test_the_slope_of_an_interpolated_kernel_is_the_kernels_slope_to_one_order_less():
    pairs = some_pairs(300)
    x = pairs.x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(
        Grid(1e-3).sums(SMOOTH["gaussian"], Pairs(x, pairs.points, pairs.weights)).sum(), [x]
    )
    exact = Blocked().sums(FORCE, pairs).detach()
    assert float((slope - exact).norm() / exact.norm()) <= 1e-2


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"tolerance": 0.0}, "tolerance = 0.0"),
        ({"tolerance": 0.5}, "tolerance = 0.5"),
        ({"tolerance": math.nan}, "tolerance = nan"),
        ({"order": 5}, "order = 5; expected 4, 6, 8"),
        ({"spacing": 0.0}, "spacing = 0.0; expected a positive length"),
        ({"spacing": math.inf}, "spacing = inf"),
    ],
)
def test_parameters_out_of_range_are_refused(parameters, message):
    with pytest.raises(ValueError, match=message):
        Grid(**parameters)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda z: 1 / z.norm(dim=-1), "not finite at 0; a singular kernel"),
        (absolute, "not smooth enough for a grid: the relative error is .* Regularise"),
        (lambda z: z.square().sum(-1) ** 0.6, "not smooth enough"),
        (lambda z: torch.where(z[..., 0] > 0, 1.0, 0.0), "not smooth enough for a grid: it jumps by 1 near"),
        (lambda z: z, "no length scale.*moments"),
        (lambda z: z.square().sum(-1), "no length scale"),
        (lambda z: gaussian(z - z.mean(dim=-2, keepdim=True)), "depends on which other differences"),
        (lambda z: gaussian(z) * torch.arange(z.shape[-2]), "depends on which other differences"),
        (lambda z: gaussian(z).sum(0), "returned shape"),
    ],
)
def test_kernels_that_a_grid_would_be_wrong_for_are_refused(function, message):
    with pytest.raises(ValueError, match=message):
        Grid().sums(Kernel(function), some_pairs(20))


def test_three_dimensions_are_refused():
    with pytest.raises(ValueError, match=r"d = 3, and a grid of nodes suits d <= 2"):
        Grid().sums(Kernel(gaussian), some_pairs(20, d=3))


def test_outliers_that_need_too_large_a_grid_are_refused():
    pairs = some_pairs(20)
    pairs.points[0, 3] = 1e4
    with pytest.raises(ValueError, match="A few outliers may spread the box"):
        Grid().sums(FORCE, pairs)


def test_tolerances_below_rounding_are_refused():
    pairs = some_pairs(20)
    single = Pairs(pairs.x.float(), pairs.points.float(), pairs.weights.float())
    with pytest.raises(ValueError, match=r"below what sums in torch\.float32 are rounded to"):
        Grid(1e-6).sums(FORCE, single)
    Grid(1e-6).sums(FORCE, pairs)


def test_positions_without_digits_left_are_refused():
    pairs = some_pairs(20)
    far = Pairs(pairs.x.float() + 1e7, pairs.points.float() + 1e7, pairs.weights.float())
    with pytest.raises(ValueError, match=r"rounded too coarsely in torch\.float32"):
        Grid().sums(FORCE, far)
    there = moved(pairs, torch.full((2,), 1e7, dtype=FLOAT64))
    assert relative_error(Grid(), FORCE, there) <= 1e-3


def test_a_kernel_that_overflows_within_the_box_is_refused():
    kernel = Kernel(lambda z: torch.where(z.norm(dim=-1) < 30, gaussian(z), math.nan))
    assert relative_error(Grid(), kernel, some_pairs(20)) <= 1e-3
    with pytest.raises(ValueError, match="not finite at some differences in the box"):
        Grid().sums(kernel, some_pairs(20, spread=6.0))


def test_sums_of_a_cloud_that_has_blown_up_are_nan():
    pairs = some_pairs(20)
    pairs.points[0, 3, 1] = math.inf
    assert bool(Grid().sums(FORCE, pairs).isnan().all())


def test_a_kernel_with_a_matrix_of_the_particles_dtype_is_measured_in_that_dtype():
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    kernel = Kernel(lambda z: (z * gaussian(z)[..., None]) @ turn)
    pairs = some_pairs(100)
    single = Pairs(pairs.x.float(), pairs.points.float(), pairs.weights.float())
    assert relative_error(Grid(), kernel, single) <= 1e-3
