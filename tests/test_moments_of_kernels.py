"""Sums over pairs that factorise: polynomial kernels by moments, declared features, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mfsde.pairwise import moments
from mfsde.pairwise.blocked import Blocked
from mfsde.pairwise.kernel import Kernel, Pairs
from mfsde.pairwise.moments import Moments, Separable, degree_of, polynomial
from mfsde.pairwise.trace import trace

FLOAT32, FLOAT64 = torch.float32, torch.float64
MATRIX = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=FLOAT64)


def quartic(z: Tensor) -> Tensor:
    s = z.square().sum(-1)
    return s.square() / 4 - s / 2 + 0.3


KERNELS = {
    "linear": (Kernel(lambda z: z), 1),
    "quadratic": (Kernel(lambda z: (z @ MATRIX.to(z.dtype) * z).sum(-1) / 2), 2),
    "quartic": (Kernel(quartic), 4),
    "quartic force": (Kernel(quartic).slope, 3),
    "odd": (Kernel(lambda z: z[..., 0] ** 3 * z[..., 1] - z[..., 1] + 2), 4),
    "sixth": (Kernel(lambda z: z.pow(6).sum(-1) - (z[..., 0] * z[..., 1]) ** 3), 6),
    "matrix valued": (Kernel(lambda z: z.unsqueeze(-1) * z.unsqueeze(-2) + torch.eye(2, dtype=z.dtype)), 2),
    "constant": (Kernel(lambda z: torch.ones_like(z[..., 0]) * 3), 0),
    "zero": (Kernel(lambda z: z * 0), 0),
    "cancelling": (Kernel(lambda z: ((z + 1) ** 4 - z**4 - 4 * z**3).sum(-1)), 2),
}
every_kernel = pytest.mark.parametrize(("kernel", "degree"), KERNELS.values(), ids=KERNELS)


def some_pairs(
    replicas=1, n=50, m=None, d=2, dtype=FLOAT64, weighted=False, own=False, period=None, shift=0.0
) -> Pairs:
    """Atoms, seen from themselves or from m other points."""
    generator = torch.Generator().manual_seed(0)
    points = (torch.randn(replicas, n, d, generator=generator, dtype=FLOAT64) + shift).to(dtype)
    x = points if m is None else (torch.randn(replicas, m, d, generator=generator, dtype=FLOAT64) + shift).to(dtype)
    weights = torch.softmax(torch.randn(replicas, n, generator=generator, dtype=FLOAT64), -1).to(dtype)
    weights = weights if weighted else torch.full((1,), 1 / n, dtype=dtype).expand(replicas, n)
    return Pairs(x, points, weights, period, torch.arange(n) if own else None)


def in_double(pairs: Pairs) -> Pairs:
    return Pairs(pairs.x.double(), pairs.points.double(), pairs.weights.double(), pairs.period, pairs.own)


def assert_equal_to_rounding(ours: Tensor, kernel: Kernel, pairs: Pairs, tolerance: float) -> None:
    with torch.no_grad():
        true = Blocked().sums(kernel, in_double(pairs))
        size = Blocked().sums(Kernel(lambda z: kernel(z).abs()), in_double(pairs)).amax(1, keepdim=True)
    assert ours.shape == true.shape
    assert ours.dtype == pairs.x.dtype
    assert bool(((ours - true).abs() <= tolerance * size).all()), float((ours - true).abs().max())


# Polynomials ----------------------------------------------------------------------------------------------------------


@every_kernel
def test_degrees_are_read_off(kernel, degree):
    assert degree_of(kernel, torch.zeros(2, dtype=FLOAT64)) == degree


def test_coefficients_are_those_of_the_polynomial():
    (p,) = polynomial(trace(KERNELS["quartic"][0], torch.zeros(2, dtype=FLOAT64)))
    assert p == {(4, 0): 0.25, (2, 2): 0.5, (0, 4): 0.25, (2, 0): -0.5, (0, 2): -0.5, (0, 0): 0.3}
    (p,) = polynomial(trace(KERNELS["cancelling"][0], torch.zeros(1, dtype=FLOAT64)))
    assert p == {(0,): 1.0, (1,): 4.0, (2,): 6.0}


@every_kernel
@pytest.mark.parametrize("own", [False, True])
def test_moments_equal_all_pairs(kernel, degree, own):
    pairs = some_pairs(3, weighted=True, own=own, m=None if own else 7)
    assert_equal_to_rounding(Moments().sums(kernel, pairs), kernel, pairs, 1e-13)
    pairs = some_pairs(dtype=FLOAT32, own=own)
    assert_equal_to_rounding(Moments(degree).sums(kernel, pairs), kernel, pairs, 3e-6)


def test_far_from_the_origin_nothing_is_lost():
    for dtype, tolerance in ((FLOAT32, 1e-5), (FLOAT64, 1e-13)):
        pairs = some_pairs(2, dtype=dtype, weighted=True, shift=1e3)
        kernel, _ = KERNELS["quartic"]
        assert_equal_to_rounding(Moments().sums(kernel, pairs), kernel, pairs, tolerance)


def test_without_the_centre_it_would_be_lost(monkeypatch):
    monkeypatch.setattr(moments, "_centre", lambda pairs: torch.zeros_like(pairs.points[:, :1]))
    with pytest.raises(AssertionError):
        test_far_from_the_origin_nothing_is_lost()


def in_small_units(z: Tensor) -> Tensor:
    u = z / 1e-10
    return (u**4).sum(-1) - u[..., 0] + 2


def test_units_of_length_do_not_leave_the_range_of_float32():
    pairs = some_pairs(dtype=FLOAT32, own=True)
    small = Pairs(1e-10 * pairs.x, 1e-10 * pairs.points, pairs.weights, None, pairs.own)
    assert_equal_to_rounding(Moments().sums(Kernel(in_small_units), small), Kernel(in_small_units), small, 3e-6)


def test_in_another_unit_they_would(monkeypatch):
    monkeypatch.setattr(moments, "_unit", lambda polynomials: 1.0)
    monkeypatch.setattr(moments, "_fits", lambda polynomials, dtype: True)
    with pytest.raises(AssertionError):
        test_units_of_length_do_not_leave_the_range_of_float32()


def test_blocks_of_rows_and_threads_change_no_bit(monkeypatch):
    kernel, pairs = KERNELS["quartic force"][0], some_pairs(2, n=34_000, dtype=FLOAT32, own=True)
    whole = Moments().sums(kernel, pairs)
    monkeypatch.setattr(moments, "MONOMIAL_FLOATS", 1)
    torch.set_num_threads(2)
    assert torch.equal(Moments().sums(kernel, pairs), whole)
    rows = torch.arange(17, 4100)
    assert torch.equal(Moments().sums(kernel, pairs.at(rows)), whole[:, rows])


@pytest.mark.parametrize("name", ["quadratic", "quartic force", "odd"])
@pytest.mark.parametrize("own", [False, True])
def test_gradients_of_moments(name, own):
    start = some_pairs(2, n=5, m=None if own else 3, weighted=True, own=own)

    def sums(x: Tensor, points: Tensor, weights: Tensor) -> Tensor:
        return Moments().sums(KERNELS[name][0], Pairs(x, points, weights, None, start.own))

    inputs = [z.clone().requires_grad_() for z in (start.x, start.points, start.weights)]
    assert torch.autograd.gradcheck(sums, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(sums, inputs, fast_mode=True)


@pytest.mark.parametrize(
    ("strategy", "function", "settings", "why"),
    [
        (Moments(), lambda z: torch.exp(-z.square().sum(-1)), {}, "it contains exp"),
        (Moments(), lambda z: 1 / (1 + z.square().sum(-1)), {}, "it contains a quotient"),
        (Moments(), lambda z: z.norm(dim=-1), {}, "it contains sqrt"),
        (Moments(), lambda z: torch.rand_like(z), {}, "draws random numbers"),
        (Moments(), quartic, {"period": 1.0}, "a polynomial is not periodic"),
        (Moments(3), quartic, {}, r"Moments\(degree=3\): the kernel quartic has degree 4"),
        (Moments(), lambda z: z.pow(7).sum(-1), {}, "has degree 7; beyond 6"),
        (Moments(), lambda z: (1 + z.sum(-1)) ** 6, {"d": 9}, "more than 1000 monomials"),
        (Moments(), lambda z: z.sum(-1) / 0.0 * 0.0, {}, "finite at none"),
        (Moments(), lambda z: (1e30 * z) ** 2 + z**6 * 1e-40, {"dtype": FLOAT32}, "too far apart for torch.float32"),
    ],
)
def test_what_moments_refuse(strategy, function, settings, why):
    with pytest.raises(ValueError, match=why):
        strategy.sums(Kernel(function), some_pairs(**settings))
    if not settings.get("period") and strategy.degree is None:
        like = torch.zeros(settings.get("d", 2), dtype=settings.get("dtype", FLOAT64))
        assert degree_of(Kernel(function), like) is None


@pytest.mark.parametrize("degree", [-1, 1.5, "2"])
def test_a_degree_is_a_whole_number(degree):
    with pytest.raises(ValueError, match="expected a whole number >= 0"):
        Moments(degree)


# Declared features ----------------------------------------------------------------------------------------------------


def circle(x: Tensor) -> Tensor:
    return torch.cat([torch.cos(x), torch.sin(x)], dim=-1)


def turned(x: Tensor) -> Tensor:
    """Of sin(x - y), with the axis of the value: (..., r, 1)."""
    return torch.cat([torch.sin(x), -torch.cos(x)], dim=-1).unsqueeze(-1)


COSINE = Kernel(lambda z: torch.cos(z[..., 0]))
SINE = Kernel(lambda z: torch.sin(z))


@pytest.mark.parametrize("period", [None, 2 * math.pi])
@pytest.mark.parametrize("own", [False, True])
def test_features_equal_all_pairs(own, period):
    for dtype, tolerance in ((FLOAT32, 1e-6), (FLOAT64, 1e-14)):
        pairs = some_pairs(3, d=1, dtype=dtype, weighted=True, own=own, m=None if own else 7, period=period)
        for kernel, left in ((COSINE, circle), (SINE, turned)):
            assert_equal_to_rounding(Separable(left, circle).sums(kernel, pairs), kernel, pairs, tolerance)
        force = Separable(circle, circle).sums(COSINE.slope, pairs)
        assert_equal_to_rounding(force, COSINE.slope, pairs, tolerance)


@pytest.mark.parametrize("kernel", [COSINE, COSINE.slope])
def test_gradients_of_features(kernel):
    start = some_pairs(2, n=4, d=1, weighted=True, own=True)

    def sums(x: Tensor, points: Tensor, weights: Tensor) -> Tensor:
        return Separable(circle, circle).sums(kernel, Pairs(x, points, weights, None, start.own))

    inputs = [z.clone().requires_grad_() for z in (start.x, start.points, start.weights)]
    assert torch.autograd.gradcheck(sums, inputs)


@pytest.mark.parametrize(
    ("kernel", "left", "why"),
    [
        (
            SINE,
            lambda x: turned(x) * 1.01,
            r"differs from .* by up to 0\.0\d+ where the kernel is at most (1|0\.\d+)\.",
        ),
        (COSINE, turned, "left returned"),
        (COSINE, lambda x: circle(x)[..., :1], "left returned"),
    ],
)
def test_features_of_another_kernel_are_refused(kernel, left, why):
    with pytest.raises(ValueError, match=why):
        Separable(left, circle).sums(kernel, some_pairs(d=1))
