"""The mean-field Ornstein-Uhlenbeck process with common noise: conditionally Gaussian, solvable at every N."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mfsde import EmpiricalMeasure, Gaussian


@dataclass(frozen=True)
class CommonNoiseOU:
    """dX = -(κX + α(X - E[X|W⁰])) dt + σ C^{1/2} dW + σ⁰ dW⁰ on R^d, C_kl = ρ off the diagonal and 1 on it.

    Given W⁰ the limit law is Gaussian: its covariance is that of an equation without common noise, its mean the
    Ornstein-Uhlenbeck process dM = -κM dt + σ⁰ dW⁰. A path of W⁰ is the run's, not the scenario's, so there is no
    `limit(t)`: `conditional` gives the law for a given M, `marginal` the law when W⁰ is not known. The mean of N
    particles is an Ornstein-Uhlenbeck process as well, of noise σ²/N + σ⁰²: `variance_of_mean`.

    Args:
        kappa: κ, the pull to 0.
        coupling: α, the pull to the conditional mean.
        sigma: σ, size of the own noise.
        shared: σ⁰, size of the common noise.
        correlation: ρ between the components of a particle's own noise; without effect for d = 1.
        initial_mean: initial mean, d numbers.
        initial_variance: initial variance of every component.

    Raises:
        ValueError: ρ that is no correlation, -1/(d - 1) <= ρ <= 1.

    Source: Carmona, Fouque, Sun, Mean field games and systemic risk (2015), section 2; Carmona, Delarue, Probabilistic
    Theory of Mean Field Games II (2018), section 2.1, for conditional laws.

    """

    kappa: float = 1.0
    coupling: float = 0.5
    sigma: float = 0.7
    shared: float = 0.4
    correlation: float = 0.0
    initial_mean: Sequence[float] = (1.0,)
    initial_variance: float = 1.0

    def __post_init__(self) -> None:
        lowest = -1 / max(1, self.dim - 1)
        if not lowest <= self.correlation <= 1:
            raise ValueError(
                f"correlation = {self.correlation}; expected {lowest:.4g} <= ρ <= 1, where {self.dim} components can "
                "be correlated alike."
            )

    @property
    def dim(self) -> int:
        """Dimension d."""
        return len(self.initial_mean)

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """-(κ + α) x + α m, written so that one pass over the particles is enough."""
        return self.coupling * mu.mean() - (self.kappa + self.coupling) * x

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> float | Tensor:
        """σ, or σ C^{1/2} where components are correlated, (1, 1, d, d)."""
        if self.correlation == 0 or self.dim == 1:
            return self.sigma
        # The symmetric root of (1 - ρ) I + ρ 1 1ᵀ.
        rest, along = math.sqrt(1 - self.correlation), math.sqrt(1 + (self.dim - 1) * self.correlation)
        root = x.new_full((self.dim, self.dim), self.sigma * (along - rest) / self.dim)
        root.diagonal().add_(self.sigma * rest)
        return root.expand(*[1] * (x.ndim - 1), -1, -1)

    def common_diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> float:
        """σ⁰."""
        return self.shared

    def initial(self) -> Gaussian:
        """N(initial_mean, initial_variance·I)."""
        return Gaussian(list(self.initial_mean), self.initial_variance)

    def conditional(self, t: float, mean: Any) -> Gaussian:
        """The limit law given W⁰, N(M, v₀ e^{-2λt} I + σ² C (1 - e^{-2λt})/(2λ)), λ = κ + α.

        Args:
            t: time.
            mean: M = E[X_t | W⁰], d numbers: of `fokker_planck`, or in its place the mean of many particles.

        """
        rate = self.kappa + self.coupling
        own = self.sigma**2 * _elapsed(rate, t) * self._correlations()
        return Gaussian(mean, self.initial_variance * math.exp(-2 * rate * t) * torch.eye(self.dim).double() + own)

    def marginal(self, t: float) -> Gaussian:
        """The law of a particle of the limit when W⁰ is not known: N(e^{-κt} m₀, conditional covariance + Var M I)."""
        centre = [math.exp(-self.kappa * t) * m for m in self.initial_mean]
        spread = self.shared**2 * _elapsed(self.kappa, t) * torch.eye(self.dim).double()
        return Gaussian(centre, self.conditional(t, centre).cov + spread)

    def variance_of_mean(self, t: float, n_particles: int) -> float:
        """Variance of a component of the mean of N particles: v₀ e^{-2κt}/N + (σ²/N + σ⁰²)(1 - e^{-2κt})/(2κ)."""
        own = self.initial_variance * math.exp(-2 * self.kappa * t) / n_particles
        return own + (self.sigma**2 / n_particles + self.shared**2) * _elapsed(self.kappa, t)

    def observables(self) -> tuple[str, ...]:
        """Mean and covariance of the particles: those of the law given W⁰, up to 1/√N."""
        return ("mean", "covariance")

    def suggested(self) -> dict[str, Any]:
        """Settings that show replicas drifting apart, each with its own W⁰."""
        return {"n_particles": 1000, "n_replicas": 8, "horizon": 4.0, "dt": 0.01, "seed": 0, "save_every": 10}

    def _correlations(self) -> Tensor:
        """C, (d, d)."""
        c = torch.full((self.dim, self.dim), float(self.correlation), dtype=torch.float64)
        c.fill_diagonal_(1.0)
        return c


def _elapsed(rate: float, t: float) -> float:
    """∫₀ᵗ e^{-2 rate (t - s)} ds."""
    return t if rate == 0 else -math.expm1(-2 * rate * t) / (2 * rate)
