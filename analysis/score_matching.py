"""Fisher information of a sample: a mean where the score ∇log m is known, score matching where it is not.

    I(m | π) = ∫ |∇log m - s|² dm = sup_h -2 ∫ (div h + h·s) dm - ∫ |h|² dm,   s = ∇log π

Source: Hyvärinen, Estimation of non-normalized statistical models by score matching (2005), theorem 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np

from . import particles
from .particles import Lengths

Array = np.ndarray
Score = Callable[[Array], Array]

WIDEST_BASIS = 500


def known(x: Array, *, score: Score, reference: Score | None) -> Array:
    """|∇log m - s|² at every particle.    (..., N, d) -> (..., N)."""
    difference = _at(score, x)
    if reference is not None:
        difference = difference - _at(reference, x)
    terms: Array = np.square(difference).sum(-1)
    return terms


def matched(x: Array, *, basis: Basis, reference: Score | None) -> Array:
    """The supremum over a basis, less its overfitting.    (..., N, d) -> (...)."""
    scores = np.zeros_like(x) if reference is None else _at(reference, x)
    samples, pulls = x.reshape(-1, *x.shape[-2:]), scores.reshape(-1, *x.shape[-2:])
    found = [_matched(a, s, basis) for a, s in zip(samples, pulls, strict=True)]
    return np.array(found).reshape(x.shape[:-2])


def _matched(x: Array, score: Array, basis: Basis) -> float:
    """Q = Σ_k b_kᵀ M⁻¹ b_k with M = <ψψᵀ>, b_k = -<∂_kψ + ψ s_k>, less its bias of order 1/N.

    The delete-one-particle jackknife N Q - (N - 1) <Q_{-i}> removes it; Q_{-i} is a rank-one update.
    """
    n = len(x)
    value, slopes = basis(x, score)
    target = -slopes.mean(0)
    root = np.linalg.qr(value / math.sqrt(n), mode="r")
    if np.abs(np.diagonal(root)).min() <= 1e-10 * np.abs(np.diagonal(root)).max():
        raise ValueError("fisher: the particles do not span the basis; lower the degree or simulate more of them.")
    # In orthonormal functions ψ R⁻¹ the matrix M is the identity.
    inverse = np.linalg.inv(root)
    value, target = value @ inverse, inverse.T @ target
    terms = -np.einsum("npk,pq->nqk", slopes, inverse)
    rest = n * target - terms
    leverage = np.square(value).sum(1)
    without = np.square(rest).sum((1, 2)) + np.square(np.einsum("np,npk->nk", value, rest)).sum(1) / (n - leverage)
    return float(n * np.square(target).sum() - without.sum() / n**2)


def _at(score: Score, x: Array) -> Array:
    values = score(x)
    particles.check_finite(values, "the score at the particles")
    return values


@dataclass(frozen=True)
class Basis:
    """Products of one-dimensional functions of the standardised components, up to a total degree.

    Args:
        powers: (p, d), the index of the one-dimensional function in each component.
        degree: total degree.
        lengths: periods of the components, or None.

    """

    powers: Array
    degree: int
    lengths: Lengths

    @staticmethod
    def of(d: int, degree: int, lengths: Lengths) -> Basis:
        """All products of total degree <= degree; on circles cosines and sines count by their frequency."""
        periodic = [lengths is not None and math.isfinite(lengths[k]) for k in range(d)]
        size = math.comb(d + (2 * degree if any(periodic) else degree), d)
        if size > WIDEST_BASIS:
            raise ValueError(
                f"fisher: degree {degree} in dimension {d} needs up to {size} basis functions, more than "
                f"{WIDEST_BASIS}. Lower the degree or project on fewer components."
            )
        found = set()
        for total in range(degree + 1):
            for chosen in combinations_with_replacement(range(d), total):
                found |= _with_phases(np.bincount(chosen, minlength=d) if chosen else np.zeros(d, int), periodic)
        return Basis(np.array(sorted(found)), degree, lengths)

    @property
    def size(self) -> int:
        """Number of products."""
        return len(self.powers)

    def __call__(self, x: Array, score: Array) -> tuple[Array, Array]:
        """ψ (N, p) and ∂_kψ + ψ s_k (N, p, d)."""
        n, d = x.shape
        tables = [self._functions(x[:, k], k) for k in range(d)]
        factors = [values[self.powers[:, k]] for k, (values, _) in enumerate(tables)]
        psi = np.prod(factors, axis=0)
        slopes = np.empty((n, self.size, d))
        for k, (_, derivatives) in enumerate(tables):
            others = np.prod(factors[:k] + factors[k + 1 :], axis=0) if d > 1 else 1.0
            slopes[:, :, k] = (others * derivatives[self.powers[:, k]] + psi * score[:, k]).T
        return psi.T, slopes

    def _functions(self, x: Array, k: int) -> tuple[Array, Array]:
        """One-dimensional functions of component k and their derivatives, (degrees, N) each."""
        length = math.inf if self.lengths is None else self.lengths[k]
        values, slopes = [np.ones_like(x)], [np.zeros_like(x)]
        if math.isfinite(length):
            for order in range(1, self.degree + 1):
                wave = 2 * math.pi * order / length
                values += [np.cos(wave * x), np.sin(wave * x)]
                slopes += [-wave * np.sin(wave * x), wave * np.cos(wave * x)]
            return np.stack(values), np.stack(slopes)
        spread = float(x.std())
        # The mean of a constant is rounded, so its spread need not be 0.
        if not spread > 1e-12 * float(np.abs(x).max()):
            raise ValueError("a component is constant: the law has no density. Drop the component.")
        z = (x - x.mean()) / spread
        # Hermite polynomials: He_{j+1} = z He_j - j He_{j-1}, He_j' = j He_{j-1}, normalised by √j!.
        hermite = np.polynomial.hermite_e.hermevander(z, self.degree).T
        for j in range(1, self.degree + 1):
            norm = math.sqrt(math.factorial(j))
            values.append(hermite[j] / norm)
            slopes.append(j * hermite[j - 1] / norm / spread)
        return np.stack(values), np.stack(slopes)


def _with_phases(orders: Array, periodic: list[bool]) -> set[tuple[int, ...]]:
    """Indices of one-dimensional functions: an order j on a circle stands for cos and sin, 2j - 1 and 2j."""
    found: set[tuple[int, ...]] = {()}
    for order, circle in zip(orders.tolist(), periodic, strict=True):
        options = [2 * order - 1, 2 * order] if circle and order else [order]
        found = {(*head, option) for head in found for option in options}
    return found
