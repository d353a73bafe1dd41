"""The sampling floor and its removal.

E W₂²(μ_N, ν_N) > 0 even when both are samples of one law: what N particles cost. It is removed across replicas. In one
dimension, and between Gaussians, W₂² is the square of a mean over replicas, so that products of different replicas are
free of it; in general the U-statistic

    U = W₂²(μ_r, ν_s) - ½ W₂²(μ_r, μ_s) - ½ W₂²(ν_r, ν_s),    r ≠ s,

has mean zero for equal laws, and is unbiased where the laws differ by a translation; otherwise it carries a bias of the
order of the floor.

Every function returns jackknife values, one for each replica: their mean is the estimate, means without one replica are
the delete-one estimates, so that whatever is computed from their mean gets a valid jackknife error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mfsde.measure import Law

from . import bures, line, particles
from .replicas import leave_one_out, pseudo_values

Points = np.ndarray
Weights = np.ndarray | None
# W₂ between samples over a leading axis: (K, N, d), (K, N), (K, M, d), (K, M) -> (K,).
Distances = Callable[[Points, Weights, Points, Weights], Points]

# Delete-one values of products of two replicas need three.
FEWEST = 3


def quantile_values(gap: Points, own: Points | None = None) -> Points:
    """Jackknife values of the mean over r ≠ s of ⟨gap_r, gap_s⟩/N, for differences of quantile functions.

    Args:
        gap: (..., R, N).
        own: |gap_r|²/N, (..., R), where it is known already.

    Returns:
        (..., R).

    """
    r, n = gap.shape[-2:]
    own = np.einsum("...rn,...rn->...r", gap, gap) / n if own is None else own
    total = gap.sum(-2)
    whole = np.einsum("...n,...n->...", total, total)[..., None] / n
    along = np.einsum("...rn,...n->...r", gap, total) / n
    every = own.sum(-1, keepdims=True)
    full = (whole - every) / (r * (r - 1))
    without = (whole - 2 * along + 2 * own - every) / ((r - 1) * (r - 2))
    # Tukey's pseudo-values, with the replicas on the last axis.
    values: Points = r * full - (r - 1) * without
    return values


def moment_values(first: tuple[Points, Points], second: tuple[Points, Points]) -> tuple[Points, Points]:
    """Jackknife values of the squared Gaussian distance of moments pooled over replicas, and of its covariance part.

    Args:
        first: ∫x dm and ∫xxᵀ dm of every replica, (R, d) and (R, d, d).
        second: likewise, with one replica for each of the first or, for a law, without the replica axis.

    """

    def at(pick: object) -> tuple[Points, Points]:
        (m, s), (n, u) = (_picked(side, pick) for side in (first, second))
        c, k = bures.covariance(m, s), bures.covariance(n, u)
        return bures.squared(m, c, n, k), bures.covariance_part(c, k)

    def _picked(side: tuple[Points, Points], pick: object) -> tuple[Points, Points]:
        if side[0].ndim == 1:
            return side
        reduce = leave_one_out if pick == "without" else lambda z: z.mean(0)
        return reduce(side[0]), reduce(side[1])

    full, without = at("all"), at("without")
    return pseudo_values(full[0], without[0]), pseudo_values(full[1], without[1])


def pairing(r: int, partners: int) -> Points:
    """Pairs of different replicas, (P, 2): every one with the `partners` that follow it, or all if there are fewer."""
    if 2 * partners >= r - 1:
        return np.array(np.triu_indices(r, 1)).T
    return np.array([(a, (a + k) % r) for k in range(1, partners + 1) for a in range(r)])


def pair_values(values: Points, pairs: Points, r: int) -> Points:
    """Jackknife values of a mean over pairs; without replica r all its pairs go.    (P,), (P, 2) -> (R,)."""
    total, number = values.sum(), len(values)
    gone, count = np.zeros(r), np.zeros(r)
    for side in (0, 1):
        np.add.at(gone, pairs[:, side], values)
        np.add.at(count, pairs[:, side], 1)
    return pseudo_values(np.asarray(total / number), (total - gone) / (number - count))


@dataclass(frozen=True)
class Debiasing:
    """How the floor is removed at one time, from all replicas."""

    estimator: str
    pairs: Points
    distances: Distances
    cells: Callable[[Law, int], tuple[Points, float]] = line.even_cells

    def values(
        self, x: Points, p: Weights, y: Points | Law, q: Weights, own: tuple[Points, Points] | None = None
    ) -> tuple[Points, Points, Points]:
        """Jackknife values at N and N/2, and the covariance part.    (R, N, d), (R, N) -> three (R,)."""
        n = x.shape[1]
        if self.estimator == "quantile":
            full, half = (quantile_values(self._quantile_gap(x, y, k)) for k in (n, n // 2))
            return full, half, np.zeros(len(x))
        particles.check_finite(x, "W₂ without its floor")
        # About a common centre: second moments about a far origin would lose the covariance.
        centre = law_moments(y)[0] if isinstance(y, Law) else y.mean((0, 1), dtype=np.float64)
        full, shape = moment_values(bures.moments(x - centre, p), either_moments(y, q, n, centre))
        if self.estimator == "gaussian":
            half = moment_values(bures.moments(x[:, : n // 2] - centre), either_moments(y, None, n // 2, centre))[0]
            return full, half, shape
        if isinstance(y, Law):
            raise TypeError("the transport estimator compares samples")
        own = self.within(y, q) if own is None else own
        found = []
        for k, reference in zip((n, n // 2), own, strict=True):
            u, v = x[:, :k], y[:, :k]
            pu, qv = (None if w is None else w[:, :k] for w in (p, q))
            across = 0.5 * (self._squared(u, pu, v, qv) + self._squared(v, qv, u, pu))
            u_statistic = across - 0.5 * self._squared(u, pu, u, pu) - 0.5 * reference
            found.append(pair_values(u_statistic, self.pairs, len(x)))
        return found[0], found[1], shape

    def within(self, y: Points, q: Weights) -> tuple[Points, Points]:
        """The reference's own squared distances between replicas, at N and N/2."""
        if self.estimator != "transport":
            return np.zeros(0), np.zeros(0)
        n = y.shape[1]
        halves = (slice(n), slice(n // 2))
        parts = [self._squared(y[:, k], None if q is None else q[:, k], y[:, k], None if q is None else q[:, k])
                 for k in halves]  # fmt: skip
        return parts[0], parts[1]

    def _quantile_gap(self, x: Points, y: Points | Law, n: int) -> Points:
        """Differences of the quantile functions of n particles, cell by cell.    (R, N, 1) -> (R, n)."""
        gap: Points = np.sort(x[:, :n, 0], axis=-1).astype(np.float64)
        # Infinities and NaN are sorted to the ends.
        particles.check_finite(gap[:, [0, -1]], "W₂ without its floor")
        if isinstance(y, Law):
            gap -= self.cells(y, n)[0]
        else:
            gap -= np.sort(y[:, :n, 0], axis=-1)
        return gap

    def _squared(self, x: Points, p: Weights, y: Points, q: Weights) -> Points:
        """W₂²(x_r, y_s) for every pair (r, s)."""
        a, b = self.pairs[:, 0], self.pairs[:, 1]
        pa, qb = (None if w is None else w[k] for w, k in ((p, a), (q, b)))
        squared: Points = np.square(self.distances(x[a], pa, y[b], qb))
        return squared


def either_moments(y: Points | Law, q: Weights, n: int, centre: Points) -> tuple[Points, Points]:
    """First two moments about a centre, of samples or of a law."""
    if not isinstance(y, Law):
        return bures.moments(y[:, :n] - centre, None if q is None else q[:, :n])
    mean, cov = law_moments(y)
    return mean - centre, cov + np.outer(mean - centre, mean - centre)


def law_samples(law: Law, r: int, n: int) -> Points:
    """R independent samples of a law, the same at every time."""
    generator = torch.Generator().manual_seed(0)
    return law.sample(r * n, generator).numpy().reshape(r, n, -1)


def law_moments(law: Law) -> tuple[Points, Points]:
    """Mean and covariance.    ValueError for a law that states none."""
    if not (isinstance(getattr(law, "mean", None), Tensor) and isinstance(getattr(law, "cov", None), Tensor)):
        raise ValueError(
            f"{type(law).__name__} states no mean and cov, which the Gaussian plug-in needs; use "
            "debiased(run, law, estimator='transport'), which samples it."
        )
    return law.mean.numpy(), law.cov.numpy()  # type: ignore[attr-defined]
