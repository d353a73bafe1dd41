"""The random batch method: each particle meets a random few of the others in each step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..torus import Period, shortest
from .blocked import Blocked
from .kernel import Kernel, Pairs, Strategy

# Differences that are alive at once: they stay in the cache, and each costs a few operations only.
BATCH_FLOATS = 1 << 18


@dataclass(frozen=True)
class Batches(Strategy):
    """(N-1)/(b-1) Σ_{j in the batch of i, j ≠ i} w_j K(x_i - x_j), and w_i K(0) where no atom is left out.

    In each step of a run the particles are shuffled and cut into ⌊N/size⌋ batches of b ∈ {size, size + 1, ...}
    particles that differ by at most one. Given the state, its mean is the sum over all pairs; its variance is
    proportional to 1/(b-1) - 1/(N-1). Work and memory O(N · size) instead of O(N²). A batch's uniform weights and odd
    kernel sum to zero force: momentum is conserved. The shuffle is a function of (seed, step, replica), the same for
    every number of threads and in a resumed run.

    It is a method for the steps of a run. Values outside of one (energies, observables, errors), which have no key, and
    those at points other than the particles are exact, by `Blocked`.

    Args:
        size: particles in a batch, at least 2 and at most N/2.

    Raises:
        ValueError: a size below 2; in a step, N < 2 size.

    References:
        S. Jin, L. Li, J.-G. Liu, Random batch methods (RBM) for interacting particle systems, J. Comput. Phys. 400
        (2020) 108877, Algorithm 1 (RBM without replacement).

    """

    size: int

    exact: ClassVar[bool] = False
    random: ClassVar[bool] = True
    differentiable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 2:
            raise ValueError(
                f"Batches: size = {self.size!r}; expected a whole number of particles, at least 2: a particle alone in "
                "its batch meets nobody."
            )

    def choice(self, kernel: Kernel, pairs: Pairs) -> Strategy:
        """Exact sums where there is no key, or x are not the particles."""
        return self if pairs.key is not None and _of_particles(pairs) else Blocked()

    def sums(self, kernel: Kernel, pairs: Pairs) -> Tensor:
        """(R, M, *out)."""
        if pairs.key is None or not _of_particles(pairs):
            return Blocked().sums(kernel, pairs)
        n = pairs.points.shape[1]
        if n < 2 * self.size:
            raise ValueError(
                f"Batches: {n} particles are fewer than two batches of {self.size}. "
                + (f'Give a size of at most {n // 2}, or strategy="exact".' if n > 3 else 'Use strategy="exact".')
            )
        order = pairs.key.permutations(n)
        x, points = _shuffled(pairs.x, order), _shuffled(pairs.points, order)
        weights = pairs.weights.gather(1, order)
        parts = []
        for members, b in self._batches(n):
            batch = [z[..., members].unflatten(-1, (-1, b)) for z in (x, points, weights)]
            parts.append(_sums(kernel, pairs, *batch))
        found = torch.cat(parts, dim=1)
        total = torch.zeros_like(found).scatter(1, _beside(order, found).expand_as(found), found)
        if pairs.own is None:
            total = total + _own_terms(kernel, pairs)
        return total

    def _batches(self, n: int) -> list[tuple[slice, int]]:
        """For each of the two sizes b that occur, the places of its batches among shuffled particles, and b."""
        b, larger = divmod(n, n // self.size)
        cut = larger * (b + 1)
        return [part for part in ((slice(cut), b + 1), (slice(cut, n), b)) if part[0] != slice(0)]


def _of_particles(pairs: Pairs) -> bool:
    """Whether x_i is the atom y_i, and the one that is left out where one is."""
    x, points, own = pairs.x, pairs.points, pairs.own
    if x is not points and (x.shape != points.shape or not torch.equal(x, points)):
        return False
    return own is None or torch.equal(own, torch.arange(len(own), device=own.device))


def _shuffled(x: Tensor, order: Tensor) -> Tensor:
    """Particles (R, N, d) in another order, component by component.    (R, d, N)."""
    return torch.stack([c.gather(1, order) for c in x.unbind(-1)], dim=1)


def _sums(kernel: Kernel, pairs: Pairs, x: Tensor, points: Tensor, weights: Tensor) -> Tensor:
    """The sums within batches, x and points (R, d, batches, b), weights (R, batches, b).    (R, batches · b, *out)."""
    replicas, d, _, b = x.shape
    floats = replicas * d * (b - 1)
    rows = min(b, max(1, BATCH_FLOATS // floats))
    at_once = max(1, BATCH_FLOATS // (floats * rows))
    share = (pairs.points.shape[1] - 1) / (b - 1)
    blocks = (z.split(at_once, dim=-2) for z in (x, points, weights * share))
    parts = []
    for at, beside, masses in zip(*blocks, strict=True):
        ends = [(k, min(k + rows, b)) for k in range(0, b, rows)]
        parts.append(torch.cat([_rows(kernel, pairs.period, at, beside, masses, *part) for part in ends], dim=2))
    return torch.cat(parts, dim=1).flatten(1, 2)


def _rows(kernel: Kernel, period: Period, x: Tensor, points: Tensor, weights: Tensor, start: int, stop: int) -> Tensor:
    """The sums of some members of each batch.    (R, batches, rows, *out)."""
    others, masses = _round(points)[..., start + 1 : stop + 1, :], _round(weights)[..., start + 1 : stop + 1, :]
    z = shortest((x[..., start:stop].unsqueeze(-1) - others).movedim(1, -1), period)
    values = kernel(z)
    return (values * _beside(masses, values)).sum(3)


def _round(x: Tensor) -> Tensor:
    """Rows k = 0, ..., b of all members but k - 1, those from k on first.    (..., b) -> (..., b + 1, b - 1).

    A view but for one copy of the batch; as no member meets itself, K never sees a 0.
    """
    return torch.cat([x, x[..., :-1]], -1).unfold(-1, x.shape[-1] - 1, 1)


def _own_terms(kernel: Kernel, pairs: Pairs) -> Tensor:
    """The terms w_i K(0).    (R, N, *out)."""
    at_zero = kernel(pairs.points.new_zeros(1, 1, pairs.points.shape[-1]))
    return _beside(pairs.weights, at_zero) * at_zero


def _beside(weights: Tensor, values: Tensor) -> Tensor:
    return weights.reshape(weights.shape + (1,) * (values.ndim - weights.ndim))
