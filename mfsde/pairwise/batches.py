"""The random batch method: each particle meets a random few of the others in each step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..torus import shortest
from .blocked import PAIRWISE_FLOATS, Blocked
from .kernel import Kernel, Pairs, Strategy


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
        ValueError: a size below 2; when summing, N < 2 size.

    References:
        S. Jin, L. Li, J.-G. Liu, Random batch methods (RBM) for interacting particle systems, J. Comput. Phys. 400
        (2020) 108877, Algorithm 1 (RBM without replacement).

    """

    size: int

    exact: ClassVar[bool] = False
    differentiable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 2:
            raise ValueError(
                f"Batches: size = {self.size!r}; expected a whole number of particles, at least 2: a particle alone in "
                "its batch meets nobody."
            )

    def sums(self, kernel: Kernel, pairs: Pairs) -> Tensor:
        """(R, M, *out)."""
        n = pairs.points.shape[1]
        if n < 2 * self.size:
            raise ValueError(
                f"Batches: {n} particles are fewer than two batches of {self.size}. Give a size of at most {n // 2}, "
                'or strategy="exact".'
            )
        if pairs.key is None or not _of_particles(pairs):
            return Blocked().sums(kernel, pairs)
        order = pairs.key.permutations(n)
        found = torch.cat([_sums(kernel, pairs, members) for members in self._batches(order)], dim=1)
        total = found.gather(1, _beside(order.argsort(dim=1), found).expand_as(found))
        if pairs.own is None:
            total = total + _own_terms(kernel, pairs)
        return total

    def _batches(self, order: Tensor) -> list[Tensor]:
        """Members of the batches, (R, batches, b) for each of the two sizes b that occur."""
        n = order.shape[1]
        number = n // self.size
        b, larger = divmod(n, number)
        first, rest = order[:, : larger * (b + 1)], order[:, larger * (b + 1) :]
        return [x.unflatten(1, (-1, size)) for x, size in ((first, b + 1), (rest, b)) if x.shape[1]]


def _of_particles(pairs: Pairs) -> bool:
    """Whether x_i is the atom y_i, and the one that is left out where one is."""
    x, points, own = pairs.x, pairs.points, pairs.own
    if x is not points and (x.shape != points.shape or not torch.equal(x, points)):
        return False
    return own is None or torch.equal(own, torch.arange(len(own), device=own.device))


def _sums(kernel: Kernel, pairs: Pairs, members: Tensor) -> Tensor:
    """The sums within batches (R, batches, b), in their order.    (R, batches · b, *out)."""
    replicas, _, b = members.shape
    floats = replicas * (b - 1) * pairs.x.shape[-1]
    rows = min(b, max(1, PAIRWISE_FLOATS // floats))
    at_once = max(1, PAIRWISE_FLOATS // (floats * rows))
    own = torch.arange(b, device=members.device)
    parts = []
    for some in members.split(at_once, dim=1):
        parts.append(torch.cat([_block(kernel, pairs, some, number) for number in own.split(rows)], dim=2))
    return torch.cat(parts, dim=1).flatten(1, 2)


def _block(kernel: Kernel, pairs: Pairs, members: Tensor, own: Tensor) -> Tensor:
    """The sums of some members of each batch, those with the numbers `own` (rows,).    (R, batches, rows, *out)."""
    replicas, _, b = members.shape
    # Counted on from each member round the batch: the member itself is none of the others, so K never sees a 0.
    others = (own.unsqueeze(1) + torch.arange(1, b, device=own.device)) % b
    replica = torch.arange(replicas, device=members.device)[:, None, None]
    x = pairs.x[replica, members[..., own]]
    points, weights = pairs.points[replica, members], pairs.weights[replica, members]
    values = kernel(shortest(x.unsqueeze(3) - points[:, :, others], pairs.period))
    share = (pairs.points.shape[1] - 1) / (b - 1)
    return (values * _beside(weights[:, :, others] * share, values)).sum(3)


def _own_terms(kernel: Kernel, pairs: Pairs) -> Tensor:
    """The terms w_i K(0).    (R, N, *out)."""
    at_zero = kernel(pairs.points.new_zeros(1, 1, pairs.points.shape[-1]))
    return _beside(pairs.weights, at_zero) * at_zero


def _beside(weights: Tensor, values: Tensor) -> Tensor:
    return weights.reshape(weights.shape + (1,) * (values.ndim - weights.ndim))
