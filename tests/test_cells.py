"""Cell lists: the sums over all pairs, from the pairs of neighbouring cells."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mfsde.pairwise import cells as cell_lists
from mfsde.pairwise.blocked import Blocked
from mfsde.pairwise.cells import Cells
from mfsde.pairwise.kernel import Kernel, Pairs

FLOAT64 = torch.float64
PERIODS = {
    1: [None, 1.0, 5.0],
    2: [None, 2.0, (None, 7.0), (7.0, None), (0.5, 3.0)],
    3: [None, 4.0, (5.0, None, 1.5)],
}
CASES = [(d, period) for d, periods in PERIODS.items() for period in periods]
every_space = pytest.mark.parametrize(("d", "period"), CASES, ids=[f"d={d}, period {p}" for d, p in CASES])


def bump(z: Tensor) -> Tensor:
    """Twice differentiable, 0 for |z| ≥ 1."""
    return (1 - z.square().sum(-1)).clamp(min=0) ** 3


def lens(z: Tensor) -> Tensor:
    """Discontinuous at |z| = 1."""
    return (z.square().sum(-1) < 1).to(z.dtype)


def repulsion(z: Tensor) -> Tensor:
    """Singular at 0, (..., d) -> (..., d)."""
    r = z.norm(dim=-1, keepdim=True)
    return z / r**2 * (1 - r).clamp(min=0)


def matrix(z: Tensor) -> Tensor:
    """(..., d) -> (..., 2, d)."""
    return torch.stack([bump(z)[..., None] * z, repulsion(z + 1e-3) * 0 + bump(z)[..., None].expand_as(z)], -2)


KERNELS = {"bump": bump, "lens": lens, "matrix": matrix}


def some_pairs(
    *, n: int = 90, m: int | None = None, d: int = 2, replicas: int = 2, period=None, dtype=FLOAT64
) -> Pairs:
    generator = torch.Generator().manual_seed(n + 10 * d)
    points = 2.5 * torch.randn(replicas, n, d, generator=generator, dtype=FLOAT64).to(dtype)
    weights = torch.softmax(torch.randn(replicas, n, generator=generator, dtype=FLOAT64).to(dtype), -1)
    x = points if m is None else 2.5 * torch.randn(replicas, m, d, generator=generator, dtype=FLOAT64).to(dtype)
    return Pairs(x, points, weights, period)


def without_own(pairs: Pairs) -> Pairs:
    return Pairs(pairs.x, pairs.points, pairs.weights, pairs.period, torch.arange(pairs.x.shape[1]))


def assert_exact(kernel: Kernel, pairs: Pairs, strategy: Cells) -> None:
    found, expected = strategy.sums(kernel, pairs), Blocked().sums(kernel, pairs)
    eps = torch.finfo(pairs.x.dtype).eps
    torch.testing.assert_close(found, expected, rtol=64 * eps, atol=64 * eps)


# Exactness ------------------------------------------------------------------------------------------------------------


@every_space
@pytest.mark.parametrize("name", KERNELS)
def test_equals_the_sum_over_all_pairs(d, period, name):
    kernel = Kernel(KERNELS[name])
    for pairs in (some_pairs(d=d, period=period), some_pairs(d=d, period=period, m=17)):
        assert_exact(kernel, pairs, Cells(support=1.0))


@every_space
def test_equals_the_sum_over_all_other_pairs(d, period):
    pairs = without_own(some_pairs(d=d, period=period))
    for kernel in (Kernel(bump), Kernel(repulsion)):
        assert_exact(kernel, pairs, Cells(support=1.0))
    # The atoms left out need not be in order.
    rows = torch.tensor([31, 4, 4, 80])
    assert_exact(Kernel(repulsion), pairs.at(rows), Cells(support=1.0))


@every_space
def test_the_slope_of_a_kernel_has_its_support(d, period):
    assert_exact(Kernel(bump).slope, some_pairs(d=d, period=period), Cells(support=1.0))


@pytest.mark.parametrize("cell", [1.0, 1.7, 40.0])
def test_a_larger_cell_changes_nothing(cell):
    for period in (None, (None, 9.0)):
        assert_exact(Kernel(bump), some_pairs(period=period), Cells(1.0, cell))


def test_in_float32():
    for period in (None, 7.0):
        pairs = some_pairs(period=period, dtype=torch.float32)
        assert_exact(Kernel(bump), pairs, Cells(1.0))
        assert Cells(1.0).sums(Kernel(bump), pairs).dtype == torch.float32


def test_support_larger_than_the_period():
    """Every pair interacts once, by its shortest difference."""
    for period in (0.3, 0.9, 1.1, 2.3, 3.01):
        assert_exact(Kernel(bump), some_pairs(d=2, period=period), Cells(1.0))


def test_pairs_across_the_edges_of_cells_are_found():
    """Lattices of spacing 1 and support 1: neighbours are a rounding inside or outside."""
    side = torch.arange(-4.0, 5.0, dtype=FLOAT64)
    lattice = torch.cartesian_prod(side, side)
    for shift in (0.0, 1e-16, -1e-16, 0.1, 1 / 3):
        for stretch in (1.0, 1 - 1e-15, 1 + 1e-15):
            points = (stretch * lattice + shift)[None]
            pairs = Pairs(points, points, torch.full((1, 81), 1 / 81, dtype=FLOAT64))
            assert_exact(Kernel(lens), pairs, Cells(1.0))


def test_positions_outside_of_the_period_and_on_its_edge():
    edge = torch.tensor([[0.0], [3.0], [-3.0], [-1e-20], [2.9999999999999996], [1.4], [30.2], [-7.7]], dtype=FLOAT64)
    pairs = Pairs(edge[None], edge[None], torch.full((1, 8), 1 / 8, dtype=FLOAT64), 3.0)
    for support in (0.2, 0.75, 1.0):
        assert_exact(Kernel(lambda z, support=support: bump(z / support)), pairs, Cells(support))


@pytest.mark.parametrize("d", [1, 2, 3])
def test_outliers(d):
    """Far beyond what numbers of cells can count without gaps."""
    pairs = some_pairs(d=d, n=40)
    points = pairs.points.clone()
    points[0, 3] = 1e15
    points[0, 4] = 1e15 + 0.5
    points[1, 7, 0] = -3e30
    points[1, 8] = 1e9
    points[1, 9] = 1e9 + 0.75
    assert_exact(Kernel(bump), Pairs(points, points, pairs.weights), Cells(1.0))


def test_particles_without_neighbours():
    points = 10 * torch.arange(5.0, dtype=FLOAT64)[None, :, None].expand(1, 5, 3)
    alone = without_own(Pairs(points, points, torch.full((1, 5), 0.2, dtype=FLOAT64)))
    for kernel, shape in ((Kernel(bump), (1, 5)), (Kernel(bump).slope, (1, 5, 3)), (Kernel(matrix), (1, 5, 2, 3))):
        assert torch.equal(Cells(1.0).sums(kernel, alone), torch.zeros(shape, dtype=FLOAT64))


def test_a_position_that_is_no_number_stays_with_its_own_row():
    pairs = some_pairs(n=30)
    points = pairs.points.clone()
    points[0, 5, 0] = math.nan
    found = Cells(1.0).sums(Kernel(bump), Pairs(points, points, pairs.weights))
    others = [i for i in range(30) if i != 5]
    assert bool(found[0, others].isfinite().all())


def test_blocks_of_rows_change_nothing(monkeypatch):
    pairs = without_own(some_pairs(n=200))
    whole = Cells(1.0).sums(Kernel(repulsion), pairs)
    for candidates in (1, 50, 1000):
        monkeypatch.setattr(cell_lists, "CANDIDATES", candidates)
        assert torch.equal(Cells(1.0).sums(Kernel(repulsion), pairs), whole)


def test_replicas_and_threads_change_no_bit():
    pairs = some_pairs(n=300, replicas=3)
    together = Cells(1.0).sums(Kernel(bump), pairs)
    for r in range(3):
        alone = Pairs(pairs.x[r : r + 1], pairs.points[r : r + 1], pairs.weights[r : r + 1])
        assert torch.equal(Cells(1.0).sums(Kernel(bump), alone)[0], together[r])
    torch.set_num_threads(2)
    assert torch.equal(Cells(1.0).sums(Kernel(bump), pairs), together)


def test_only_neighbouring_pairs_are_evaluated():
    n, seen = 20_000, 0
    points = torch.rand(1, n, 2, generator=torch.Generator().manual_seed(0))
    support = math.sqrt(10 / (math.pi * n))

    def counting(z: Tensor) -> Tensor:
        nonlocal seen
        seen += len(z)
        return bump(z / support)

    Cells(support).sums(Kernel(counting), Pairs(points, points, torch.full((1, n), 1 / n)))
    assert seen < 13 * n


# Derivatives ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("period", [None, (None, 4.0)])
@pytest.mark.parametrize("excluded", [False, True])
def test_derivatives(period, excluded):
    pairs = some_pairs(n=7, replicas=1, period=period)
    own = torch.arange(7) if excluded else None
    inputs = [
        z.clone().div(1 if z is pairs.weights else 2).requires_grad_() for z in (pairs.x, pairs.points, pairs.weights)
    ]

    def sums(x: Tensor, points: Tensor, weights: Tensor) -> Tensor:
        return Cells(1.0).sums(Kernel(bump), Pairs(x, points, weights, period, own))

    assert torch.autograd.gradcheck(sums, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(sums, inputs, fast_mode=True)


def test_parameters_of_the_kernel_have_derivatives():
    width = torch.tensor(1.2, dtype=FLOAT64, requires_grad=True)
    pairs = some_pairs(n=60)

    def slope(strategy) -> Tensor:
        values = strategy.sums(Kernel(lambda z: width * bump(width * z)), pairs)
        return torch.autograd.grad(values.square().sum(), [width])[0]

    torch.testing.assert_close(slope(Cells(1.0)), slope(Blocked()), rtol=1e-12, atol=0)


def test_derivatives_are_those_of_the_sum_over_all_pairs():
    pairs = some_pairs(n=60)

    def gradient(strategy) -> Tensor:
        x = pairs.points.clone().requires_grad_()
        energy = (strategy.sums(Kernel(bump), Pairs(x, x, pairs.weights)) * pairs.weights).sum()
        return torch.autograd.grad(energy, [x])[0]

    torch.testing.assert_close(gradient(Cells(1.0)), gradient(Blocked()), rtol=1e-12, atol=1e-14)


def test_no_nan_enters_a_derivative_through_the_atom_left_out():
    x = some_pairs(n=40).points.requires_grad_()
    pairs = Pairs(x, x, torch.full((2, 40), 1 / 40, dtype=FLOAT64), None, torch.arange(40))
    (slope,) = torch.autograd.grad(Cells(1.0).sums(Kernel(repulsion), pairs).square().sum(), [x])
    assert bool(slope.isfinite().all())


# Refusals -------------------------------------------------------------------------------------------------------------


def test_a_cell_smaller_than_the_support_is_refused():
    with pytest.raises(ValueError, match="support larger than the cell"):
        Cells(1.0, cell=0.9)


@pytest.mark.parametrize("support", [0.0, -1.0, math.inf, math.nan])
def test_a_radius_that_is_none_is_refused(support):
    with pytest.raises(ValueError, match="expected the radius"):
        Cells(support)


def test_high_dimensions_are_refused():
    with pytest.raises(ValueError, match=r"3\^4 = 81 neighbours"):
        Cells(1.0).sums(Kernel(bump), some_pairs(d=4, n=5))


def gaussian(z: Tensor) -> Tensor:
    return torch.exp(-z.square().sum(-1))


def square(z: Tensor) -> Tensor:
    """0 outside of a square, whose corners lie at distance √2."""
    return (z.abs().amax(-1) < 1).to(z.dtype)


def ring(z: Tensor) -> Tensor:
    """0 on (1, 3) and beyond 4."""
    r = z.norm(dim=-1)
    return bump(z) + ((r > 3) & (r < 4)).to(z.dtype)


def tail_of_nan(z: Tensor) -> Tensor:
    return (1 - z.square().sum(-1)).sqrt()


@pytest.mark.parametrize("function", [gaussian, square, ring, tail_of_nan])
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
def test_a_kernel_that_does_not_vanish_outside_is_refused(function, dtype):
    kernel = Kernel(function)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=rf"{function.__name__} does not vanish outside of its support 1: \|K\(z\)\| ="
        ):
            Cells(1.0).sums(kernel, some_pairs(n=5, dtype=dtype))


def test_a_kernel_that_vanishes_to_rounding_is_accepted():
    assert_exact(Kernel(gaussian), some_pairs(), Cells(6.0))
    with pytest.raises(ValueError, match="support 5"):
        Cells(5.0).sums(Kernel(gaussian), some_pairs())


def test_on_a_torus_only_shortest_differences_count():
    """A kernel that repeats with the period vanishes outside of its support all the same."""

    def periodic(z: Tensor) -> Tensor:
        return bump(4 * torch.sin(math.pi * z / 3))

    assert_exact(Kernel(periodic), some_pairs(d=1, period=3.0), Cells(0.3))
    with pytest.raises(ValueError, match="does not vanish"):
        Cells(0.3).sums(Kernel(periodic), some_pairs(d=1))


def test_the_support_is_checked_once():
    calls = []

    def watched(z: Tensor) -> Tensor:
        calls.append(len(z))
        return bump(z)

    kernel = Kernel(watched)
    with torch.no_grad():
        for _ in range(3):
            Cells(1.0).sums(kernel, some_pairs())
    # Once for the support, in two calls, and for each sum a look at the kernel and the sum itself.
    assert len(calls) == 2 + 3 * 2


def test_it_is_recorded_with_its_parameters():
    assert Cells(0.5).described() == {"strategy": "cells", "support": 0.5, "cell": None}
