"""The mean-field Ornstein-Uhlenbeck process: linear, Gaussian, solvable at every N."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mfsde import EmpiricalMeasure, Gaussian


@dataclass(frozen=True)
class MeanFieldOU:
    """dX = -(κX + α(X - E X)) dt + σ dW on R^d.

    Args:
        kappa: κ, the pull to 0.
        coupling: α, the pull to the mean.
        sigma: σ.
        initial_mean: initial mean, d numbers.
        initial_variance: initial variance of every component.

    Source: Sznitman, Topics in propagation of chaos (1991), and any text on linear-quadratic mean-field models.

    """

    kappa: float = 1.0
    coupling: float = 0.5
    sigma: float = 0.7
    initial_mean: Sequence[float] = (1.0,)
    initial_variance: float = 1.0

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """-(κ + α) x + α m, written so that one pass over the particles is enough."""
        centre, rate = self.coupling * mu.mean(), self.kappa + self.coupling
        # Parameters that are being fitted are tensors, which alpha= does not take.
        return centre - rate * x if isinstance(rate, Tensor) else torch.sub(centre, x, alpha=rate)

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> float:
        """σ."""
        return self.sigma

    def initial(self) -> Gaussian:
        """N(initial_mean, initial_variance·I)."""
        return Gaussian(list(self.initial_mean), self.initial_variance)

    def limit(self, t: float) -> Gaussian:
        """N(e^{-κt} m₀, v_t I), v_t = v₀ e^{-2λt} + σ²(1 - e^{-2λt})/(2λ), λ = κ + α."""
        rate = self.kappa + self.coupling
        decay = math.exp(-2 * rate * t)
        gained = t if rate == 0 else -math.expm1(-2 * rate * t) / (2 * rate)
        centre = [math.exp(-self.kappa * t) * m for m in self.initial_mean]
        return Gaussian(centre, self.initial_variance * decay + self.sigma**2 * gained)

    def log_invariant(self, x: Tensor) -> Tensor:
        """-(κ + α)|x|²/σ², the unnormalised invariant law of the limit; it exists for κ > 0."""
        if self.kappa <= 0:
            raise ValueError(
                f"MeanFieldOU with kappa = {self.kappa} has no invariant law: nothing pulls the mean to 0."
            )
        return -(self.kappa + self.coupling) / self.sigma**2 * x.square().sum(-1)

    def suggested(self) -> dict[str, Any]:
        """Settings that show the relaxation."""
        return {"n_particles": 1000, "n_replicas": 8, "horizon": 4.0, "dt": 0.01, "seed": 0, "save_every": 10}
