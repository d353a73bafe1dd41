"""KeOps: the sums over all pairs, by formulas made from kernels written with torch."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from mfsde.pairwise.blocked import Blocked
from mfsde.pairwise.keops import KeOps
from mfsde.pairwise.kernel import Kernel, Pairs

FLOAT64 = torch.float64


@pytest.fixture
def keops() -> KeOps:
    pytest.importorskip("pykeops", reason='needs pykeops: pip install "mfsde[keops]"')
    return KeOps()


def some_pairs(*, n=70, m: int | None = None, d=2, replicas=1, period=None, own=False, dtype=FLOAT64) -> Pairs:
    generator = torch.Generator().manual_seed(n + d)
    points = 2 * torch.randn(replicas, n, d, generator=generator, dtype=FLOAT64).to(dtype)
    weights = torch.softmax(torch.randn(replicas, n, generator=generator, dtype=FLOAT64).to(dtype), -1)
    x = points if m is None else 2 * torch.randn(replicas, m, d, generator=generator, dtype=FLOAT64).to(dtype)
    return Pairs(x, points, weights, period, torch.arange(n) if own else None)


def assert_exact(strategy: KeOps, kernel: Kernel, pairs: Pairs, ulps: int = 64) -> None:
    found, expected = strategy.sums(kernel, pairs), Blocked().sums(kernel, pairs).detach()
    eps = torch.finfo(pairs.x.dtype).eps
    torch.testing.assert_close(found, expected, rtol=ulps * eps, atol=ulps * eps * float(expected.abs().max()))


def gaussian(z: Tensor) -> Tensor:
    return torch.exp(-z.square().sum(-1) / 2)


def singular(z: Tensor) -> Tensor:
    return z / z.square().sum(-1, keepdim=True)


def test_the_slope_of_a_kernel_in_float32(keops):
    kernel = Kernel(gaussian).slope
    assert_exact(keops, kernel, some_pairs(n=300, m=41, dtype=torch.float32), ulps=200)
    assert keops.sums(kernel, some_pairs(dtype=torch.float32)).dtype == torch.float32


def test_replicas_on_a_torus_without_the_own_term(keops):
    """A kernel singular at 0, which it never sees."""
    pairs = some_pairs(replicas=3, period=(3.0, None), own=True)
    assert_exact(keops, Kernel(singular), pairs)
    assert_exact(keops, Kernel(singular), pairs.at(torch.tensor([5, 69, 0, 5])))


def test_halves_of_a_period_turn_the_same_way(keops):
    """Differences of exactly half a period, whose sign is that of torch."""
    lattice = torch.arange(-9.0, 10.0, dtype=FLOAT64)[None, :, None]
    pairs = Pairs(lattice, lattice, torch.softmax(lattice.squeeze(-1), -1), 2.0)
    assert_exact(keops, Kernel(lambda z: z), pairs)


def many_functions(z: Tensor) -> Tensor:
    a, b = z[..., 0], z[..., 1]
    small, positive = 1e-6 * a, 0.5 + a.square()
    return torch.stack(
        [
            torch.expm1(small),
            torch.expm1(a),
            torch.log1p(1e-9 * positive),
            torch.log1p(positive),
            torch.tanh(small),
            torch.tanh(10 * a),
            torch.sinh(small),
            torch.sinh(a),
            torch.cosh(b),
            torch.sin(a) + torch.cos(b) + torch.tan(a),
            torch.asin(a / 100) + torch.acos(b / 100) + torch.atan(a),
            torch.atan2(a, b),
            positive**0.3 + positive**-1.7,
            torch.log(positive) + positive.sqrt() + positive.rsqrt(),
            a.abs() + b.sign(),
            (3 * a).floor() + (5 * b).ceil(),
            (2 * (2 * a).floor() / 4).round() + (3 * b).trunc(),
            torch.maximum(a, b) - torch.minimum(a, 2 * b),
            a.clamp(-0.5, 0.7) + b.relu(),
            torch.where((a > 0) & ~(b <= 0.1) | (a == b), a * b, a - b),
            torch.where((a < 0) | (b >= a), a.exp(), torch.ones_like(a)),
            torch.sigmoid(a),
            torch.remainder(a, 0.7),
            torch.full_like(a, 2.5),
        ],
        -1,
    )


def test_functions(keops):
    """Relative to each one's own size: those of small arguments keep their digits."""
    pairs, kernel = some_pairs(n=50, m=3), Kernel(many_functions)
    found, expected = keops.sums(kernel, pairs), Blocked().sums(kernel, pairs)
    sizes = Blocked().sums(Kernel(lambda z: many_functions(z).abs()), pairs)
    assert float(((found - expected).abs() / sizes).max()) < 1e-13


def test_matrices(keops):
    def matrix(z: Tensor) -> Tensor:
        return gaussian(z)[..., None, None] * z[..., :, None] * z[..., None, :]

    assert keops.sums(Kernel(matrix), some_pairs(d=3)).shape == (1, 70, 3, 3)
    assert_exact(keops, Kernel(matrix), some_pairs(d=3))


def test_numbers_that_a_kernel_closes_over_are_those_of_the_call(keops):
    scale = torch.ones((), dtype=FLOAT64)
    kernel = Kernel(lambda z: scale * gaussian(z))
    for value in (1.0, 3.0):
        scale.fill_(value)
        assert_exact(keops, kernel, some_pairs())


# Refusals -------------------------------------------------------------------------------------------------------------


def test_functions_that_keops_lacks_are_refused(keops):
    with pytest.raises(ValueError, match=r'KeOps has no function erf\. Use strategy="exact"'):
        keops.sums(Kernel(lambda z: torch.erf(z.sum(-1))), some_pairs())


def test_powers_of_negative_numbers_are_refused(keops):
    with pytest.raises(ValueError, match="x may be negative"):
        keops.sums(Kernel(lambda z: z.sum(-1) ** 0.3), some_pairs())


def test_kernels_that_depend_on_data_are_refused(keops):
    with pytest.raises(ValueError, match=r"KeOps: .* has no formula: .*strategy=\"exact\""):
        keops.sums(Kernel(lambda z: z.sum(-1) if float(z.max()) > 100 else z.amax(-1)), some_pairs())


def test_formulas_that_would_take_minutes_to_compile_are_refused(keops):
    def nested(z: Tensor) -> Tensor:
        value = z.sum(-1)
        for _ in range(12):
            value = value * torch.sin(value)
        return value

    with pytest.raises(ValueError, match="operations written out, more than 2000"):
        keops.sums(Kernel(nested), some_pairs())


def test_numbers_of_atoms_beyond_the_precision_are_refused(keops):
    x = torch.zeros(1, 1, 1).expand(1, 1 << 24, 1)
    with pytest.raises(ValueError, match="Use float64"):
        keops.sums(Kernel(gaussian), Pairs(x, x, x.squeeze(-1), None, torch.zeros(1, dtype=torch.int64)))


def test_without_pykeops_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "mfsde\[keops\]"'):
        KeOps()


def test_it_is_recorded_by_its_name(keops):
    assert keops.described() == {"strategy": "keops"}
