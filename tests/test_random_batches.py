"""Random batches: unbiased given the state, exact where nothing is random."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

import mfsde
from mfsde.draws import Draws
from mfsde.pairwise import batches
from mfsde.pairwise.batches import Batches
from mfsde.pairwise.blocked import Blocked
from mfsde.pairwise.kernel import Kernel, Pairs

FLOAT64 = torch.float64


def draws(step: int, replicas: int = 1) -> Draws:
    return Draws(mfsde.Noise(7), step, replicas, FLOAT64, torch.device("cpu"))


class Fixed:
    """One shuffle for ever: the planted fault of batches that are never reshuffled."""

    def __init__(self, replicas: int) -> None:
        self._draws = draws(0, replicas)
        self._order: dict[int, Tensor] = {}

    def permutations(self, n: int) -> Tensor:
        return self._order.setdefault(n, self._draws.permutations(n))


def attraction(z: Tensor) -> Tensor:
    """Odd, (..., d) -> (..., d)."""
    return z * torch.exp(-z.square().sum(-1, keepdim=True) / 2)


def singular(z: Tensor) -> Tensor:
    return z / z.square().sum(-1, keepdim=True)


def gaussian(z: Tensor) -> Tensor:
    return torch.exp(-z.square().sum(-1) / 2)


KERNELS = {"scalar": gaussian, "odd": attraction, "matrix": lambda z: torch.stack([attraction(z), z.sin()], -1)}


def some_pairs(n: int = 23, *, replicas: int = 1, weighted: bool = False, own: bool = True, period=None) -> Pairs:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(replicas, n, 2, generator=generator, dtype=FLOAT64)
    logits = torch.randn(replicas, n, generator=generator, dtype=FLOAT64) * weighted
    return Pairs(x, x, torch.softmax(logits, -1), period, torch.arange(n) if own else None)


def keyed(pairs: Pairs, key) -> Pairs:
    return Pairs(pairs.x, pairs.points, pairs.weights, pairs.period, pairs.own, key)


# The mean over shuffles -----------------------------------------------------------------------------------------------

# All keys at once: replicas of one state, whose shuffles are independent.
KEYS = 2000


def over_keys(strategy: Batches, pairs: Pairs, kernel: Kernel, key=None) -> Tensor:
    """Sums under KEYS keys, (KEYS, N · out)."""
    many = Pairs(
        pairs.x.expand(KEYS, -1, -1),
        pairs.points.expand(KEYS, -1, -1),
        pairs.weights.expand(KEYS, -1),
        pairs.period,
        pairs.own,
        key or draws(3, KEYS),
    )
    return strategy.sums(kernel, many).reshape(KEYS, -1)


def largest_z(found: Tensor, expected: Tensor) -> float:
    """|mean - expected| in standard errors, the largest over the entries; infinite where nothing varies but differs."""
    miss, error = (found.mean(0) - expected).abs(), found.std(0) / math.sqrt(len(found))
    rounding = 1e-13 * expected.abs().amax()
    return float(torch.where(miss < rounding, 0.0, miss / error).max())


def is_unbiased(strategy: Batches, pairs: Pairs, name: str = "odd", key=None) -> bool:
    """For every particle jointly: the bound is that of |z| ≤ 4 for a single one, shared among the entries."""
    kernel = Kernel(KERNELS[name])
    found = over_keys(strategy, pairs, kernel, key)
    expected = Blocked().sums(kernel, pairs).flatten()
    bound = -stats.norm.ppf(stats.norm.cdf(-4) / len(expected))
    return largest_z(found, expected) <= bound


CASES = {
    "even": some_pairs(24),
    "uneven": some_pairs(23),
    "weighted": some_pairs(23, weighted=True),
    "with the own term": some_pairs(22, weighted=True, own=False),
    "on a torus": some_pairs(21, period=(2.0, None)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [2, 5])
def test_unbiased_given_the_state(case, size):
    for name in KERNELS:
        assert is_unbiased(Batches(size), CASES[case], name)


class ByShareOfN(Batches):
    """Planted fault: N/b instead of (N-1)/(b-1)."""

    def sums(self, kernel: Kernel, pairs: Pairs) -> Tensor:
        n = pairs.points.shape[1]
        return super().sums(kernel, pairs) * (n / self.size) / ((n - 1) / (self.size - 1))


def test_a_wrong_factor_is_rejected():
    assert is_unbiased(Batches(4), CASES["even"])
    assert not is_unbiased(ByShareOfN(4), CASES["even"])


def test_batches_that_are_never_reshuffled_are_rejected():
    once = Fixed(1)

    class Same:
        def permutations(self, n: int) -> Tensor:
            return once.permutations(n).expand(KEYS, -1)

    assert not is_unbiased(Batches(4), CASES["even"], key=Same())


def test_a_shuffle_of_half_the_particles_is_rejected():
    """Of particles that never meet."""
    shuffles = draws(3, KEYS)

    class Halves:
        def permutations(self, n: int) -> Tensor:
            return torch.cat([shuffles.permutations(n // 2), n // 2 + shuffles.permutations(n // 2)], 1)

    assert not is_unbiased(Batches(4), CASES["even"], key=Halves())


def test_the_variance_is_that_of_sampling_without_replacement():
    """Var = S² (N-1)² (1/(b-1) - 1/(N-1)), S² the sample variance over j ≠ i of w_j K(x_i - x_j): ∝ 1/b for b ≪ N."""
    pairs, kernel, n = some_pairs(24, weighted=True), Kernel(gaussian), 24
    terms = gaussian(pairs.x[0].unsqueeze(1) - pairs.x[0].unsqueeze(0)) * pairs.weights[0]
    others = terms[~torch.eye(n, dtype=torch.bool)].reshape(n, n - 1)
    for size in (2, 3, 6, 12):
        expected = others.var(1) * (n - 1) ** 2 * (1 / (size - 1) - 1 / (n - 1))
        found = (over_keys(Batches(size), pairs, kernel) - others.sum(1)).square()
        ratio = (found / expected).mean(1)
        z = (ratio.mean() - 1) / (ratio.std() / math.sqrt(KEYS))
        assert abs(float(z)) <= 4


def test_replicas_have_shuffles_of_their_own():
    """The values at one particle under one key tell nothing about those under another."""
    found = over_keys(Batches(4), CASES["even"], Kernel(gaussian))[:, 0]
    a, b = found[::2], found[1::2]
    assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) <= 4 / math.sqrt(KEYS / 2)


# Identities that hold for each shuffle --------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "size"), [(24, 4), (23, 4), (25, 2), (31, 7), (9, 4), (20, 10)])
def test_equals_a_loop_over_batches(n, size):
    pairs = some_pairs(n, replicas=2, weighted=True, period=3.0)
    found = Batches(size).sums(Kernel(attraction), keyed(pairs, draws(5, 2)))
    order, number = draws(5, 2).permutations(n), n // size
    for r in range(2):
        members = torch.tensor_split(order[r], number)
        assert max(map(len, members)) - min(map(len, members)) <= 1
        for batch in members:
            for i in batch.tolist():
                total = sum(
                    pairs.weights[r, j] * attraction(pairs.differences(slice(i, i + 1))[r, 0, j])
                    for j in batch.tolist()
                    if j != i
                )
                expected = total * (n - 1) / (len(batch) - 1)
                torch.testing.assert_close(found[r, i], expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("n", [24, 23])
def test_momentum_is_conserved(n):
    """Σ_i force_i = 0 for an odd kernel and uniform weights, as in the sum over all pairs."""
    pairs = keyed(some_pairs(n, replicas=3), draws(2, 3))
    force = Batches(4).sums(Kernel(attraction), pairs)
    assert float(force.sum(1).abs().max()) < 1e-14 * n * float(force.abs().max())


def test_a_constant_kernel_has_no_variance():
    """Each particle meets mass 1 - 1/N in every batch, and its own mass 1/N besides."""
    ones = Kernel(lambda z: torch.ones_like(z[..., 0]))
    for own in (True, False):
        pairs = some_pairs(23, own=own)
        found = over_keys(Batches(3), pairs, ones)
        torch.testing.assert_close(found, torch.full_like(found, 1 - own / 23), rtol=1e-14, atol=0)


def test_the_own_term_is_exact():
    pairs = some_pairs(23, weighted=True)
    rest = Batches(4).sums(Kernel(gaussian), keyed(pairs, draws(1)))
    all_of_it = Batches(4).sums(Kernel(gaussian), keyed(Pairs(pairs.x, pairs.x, pairs.weights), draws(1)))
    torch.testing.assert_close(all_of_it - rest, pairs.weights, rtol=1e-13, atol=1e-16)


def test_a_kernel_singular_at_zero_is_never_evaluated_there():
    x = some_pairs(23).x.requires_grad_()
    weights = torch.full((1, 23), 1 / 23, dtype=FLOAT64)
    found = Batches(4).sums(Kernel(singular), Pairs(x, x, weights, None, torch.arange(23), draws(0)))
    (slope,) = torch.autograd.grad(found.square().sum(), [x])
    assert bool(found.isfinite().all())
    assert bool(slope.isfinite().all())


def test_blocks_and_threads_change_roundings_only(monkeypatch):
    pairs = some_pairs(60, replicas=2, weighted=True)

    def sums() -> Tensor:
        return Batches(7).sums(Kernel(attraction), keyed(pairs, draws(4, 2)))

    whole = sums()
    torch.set_num_threads(2)
    torch.testing.assert_close(sums(), whole, rtol=1e-13, atol=1e-15)
    for floats in (1, 60, 500):
        monkeypatch.setattr(batches, "BATCH_FLOATS", floats)
        torch.testing.assert_close(sums(), whole, rtol=1e-13, atol=1e-15)


def test_a_replica_alone_has_its_own_shuffle():
    pairs = some_pairs(24, replicas=2)
    both = Batches(4).sums(Kernel(attraction), keyed(pairs, draws(4, 2)))
    first = Pairs(pairs.x[:1], pairs.points[:1], pairs.weights[:1], None, pairs.own, draws(4, 1))
    torch.testing.assert_close(Batches(4).sums(Kernel(attraction), first)[0], both[0], rtol=1e-13, atol=1e-15)


def test_steps_differ():
    pairs = some_pairs(24)
    first, second = (Batches(4).sums(Kernel(attraction), keyed(pairs, draws(step))) for step in (0, 1))
    assert not torch.equal(first, second)


def test_in_float32():
    pairs = some_pairs(23, weighted=True)
    single = Pairs(pairs.x.float(), pairs.points.float(), pairs.weights.float(), None, pairs.own, draws(0))
    found = Batches(4).sums(Kernel(attraction), single)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), Batches(4).sums(Kernel(attraction), keyed(pairs, draws(0))), rtol=1e-4, atol=1e-5
    )


# Where it is exact ----------------------------------------------------------------------------------------------------


def test_without_a_key_the_sum_over_all_pairs():
    pairs = some_pairs(23)
    assert torch.equal(Batches(4).sums(Kernel(attraction), pairs), Blocked().sums(Kernel(attraction), pairs))


def test_elsewhere_the_sum_over_all_pairs():
    pairs = some_pairs(23, own=False)
    elsewhere = Pairs(pairs.x + 1, pairs.points, pairs.weights, None, None, draws(0))
    some = keyed(some_pairs(23), draws(0)).at(torch.tensor([3, 1, 20]))
    for case in (elsewhere, some):
        assert torch.equal(Batches(4).sums(Kernel(attraction), case), Blocked().sums(Kernel(attraction), case))


def test_equal_points_are_the_particles():
    pairs = keyed(some_pairs(23), draws(0))
    copied = Pairs(pairs.x.clone(), pairs.points, pairs.weights, None, pairs.own, draws(0))
    assert torch.equal(Batches(4).sums(Kernel(attraction), copied), Batches(4).sums(Kernel(attraction), pairs))


# Derivatives and refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [True, False])
def test_derivatives(own):
    pairs = some_pairs(9, weighted=True, own=own)
    inputs = [z.clone().requires_grad_() for z in (pairs.x, pairs.weights)]
    key = Fixed(1)

    def sums(x: Tensor, weights: Tensor) -> Tensor:
        return Batches(4).sums(Kernel(attraction), Pairs(x, x, weights, None, pairs.own, key))

    assert torch.autograd.gradcheck(sums, inputs)
    assert torch.autograd.gradgradcheck(sums, inputs)


@pytest.mark.parametrize("size", [1, 0, -3, 2.5, True])
def test_a_batch_of_one_is_refused(size):
    with pytest.raises(ValueError, match="meets nobody"):
        Batches(size)


def test_fewer_particles_than_two_batches_are_refused():
    with pytest.raises(ValueError, match=r"23 particles are fewer than two batches of 12.*at most 11"):
        Batches(12).sums(Kernel(attraction), keyed(some_pairs(23), draws(0)))
    # Outside of a step nothing is cut into batches.
    Batches(12).sums(Kernel(attraction), some_pairs(23))


def test_it_is_recorded_with_its_parameters():
    assert Batches(4).described() == {"strategy": "batches", "size": 4}
