"""The law of independent blocks of components."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .measure import EmpiricalMeasure, Law, _sobol_measure

# Atoms of a product of quadratures; above it a quasi-random sample of the product is taken.
MOST_ATOMS = 1 << 17


@dataclass(frozen=True, eq=False)
class Product(Law):
    """Independent blocks of components: the product of laws, in their order.

    Args:
        factors: laws of any dimensions.

    Raises:
        ValueError: no factor.

    """

    factors: tuple[Law, ...]

    def __init__(self, factors: Sequence[Law]) -> None:
        if not factors or not all(isinstance(law, Law) for law in factors):
            raise ValueError(f"Product: expected laws, at least one; got {list(factors)!r:.80}.")
        object.__setattr__(self, "factors", tuple(factors))

    @property
    def dim(self) -> int:
        """Sum of the factors' dimensions."""
        return sum(law.dim for law in self.factors)

    @property
    def n_variates(self) -> int:
        """Sum of the factors' variates."""
        return sum(law.n_variates for law in self.factors)

    @property
    def mean(self) -> Tensor:
        """The factors' means, (d,)."""
        return torch.cat([torch.as_tensor(law.mean) for law in self.factors])  # type: ignore[attr-defined]

    @property
    def cov(self) -> Tensor:
        """The factors' covariances as blocks, (d, d)."""
        blocks = [torch.as_tensor(law.cov) for law in self.factors]  # type: ignore[attr-defined]
        return torch.block_diag(*blocks)  # type: ignore[no-any-return]

    def from_variates(self, z: Tensor) -> Tensor:
        """Each factor from its own variates."""
        parts = z.split([law.n_variates for law in self.factors], dim=-1)
        return torch.cat([law.from_variates(part) for law, part in zip(self.factors, parts, strict=True)], dim=-1)

    def log_prob(self, x: Tensor) -> Tensor:
        """Sum of the factors' log densities, (..., d) -> (...)."""
        parts = x.split([law.dim for law in self.factors], dim=-1)
        densities = [law.log_prob(part) for law, part in zip(self.factors, parts, strict=True)]  # type: ignore[attr-defined]
        return torch.stack(densities).sum(0)

    def as_measure(self) -> EmpiricalMeasure:
        """The product of the factors' quadratures; matched Sobol points where it would have too many atoms."""
        parts = [law.as_measure() for law in self.factors]
        if math.prod(mu.n_particles for mu in parts) > MOST_ATOMS:
            return _sobol_measure(self, self.mean, self.cov)
        points, weights = parts[0].points, parts[0].weights
        for mu in parts[1:]:
            n, m = len(points), mu.n_particles
            points = torch.cat([points.repeat_interleave(m, 0), mu.points.repeat(n, 1)], dim=-1)
            weights = torch.outer(weights, mu.weights).flatten()
        return EmpiricalMeasure(points, weights)
