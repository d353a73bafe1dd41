"""Two populations of linear particles, each drawn to the means of both."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mfsde import EmpiricalMeasure, Gaussian, Mixture, Observable


@dataclass(frozen=True)
class TwoPopulations:
    """dX = -(κ_a X + Σ_b A_ab (X - m_b)) dt + σ_a dW for X of population a, m_b = E[X | population b]; a, b = 0, 1.

    The state is (X, a): the population is a component that never moves. Populations are drawn with the initial law,
    each particle belonging to 1 with probability `share`, so that particles are exchangeable and the number of a
    population is binomial. Its mean is taken over its own particles, ∫ x 1_b dm/∫ 1_b dm; a population without
    particles draws nobody. Weighted particles count by their weights.

    A_ab > 0 draws a to b and A_ab < 0 drives it away, and A_ab ≠ A_ba makes a system without energy: if 0 follows 1
    and 1 flees from 0, means go round.

    Args:
        kappa: κ_a, the pull to 0 in each population.
        coupling: A, two rows of two.
        sigma: σ_a.
        share: probability of population 1, strictly between 0 and 1.
        initial_mean: initial mean in each population.
        initial_variance: initial variance in each.

    Raises:
        ValueError: parameters that are not two (or two by two), or a share outside (0, 1).

    Source: Carmona, Delarue, Probabilistic Theory of Mean Field Games I (2018), section 7.1.1, for several populations;
    the moments solve linear equations.

    """

    kappa: Sequence[float] = (1.0, 1.5)
    coupling: Sequence[Sequence[float]] = ((0.0, 2.0), (-3.0, 2.0))
    sigma: Sequence[float] = (0.4, 0.6)
    share: float = 0.4
    initial_mean: Sequence[float] = (1.0, -1.0)
    initial_variance: Sequence[float] = (0.3, 0.1)

    def __post_init__(self) -> None:
        pairs = (self.kappa, self.sigma, self.initial_mean, self.initial_variance, self.coupling, *self.coupling)
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError(
                "TwoPopulations: kappa, sigma, initial_mean and initial_variance are two numbers, one for each "
                "population, and coupling two rows of two."
            )
        if not 0 < self.share < 1:
            raise ValueError(f"share = {self.share}; expected a probability strictly between 0 and 1.")

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """(-(κ_a X + Σ_b A_ab (X - m_b)), 0)."""
        position, mass = x[..., :1], self.masses(mu)
        means = self.means(mu).unsqueeze(-2)
        kappa, coupling = _of(self.kappa, x), _of(self.coupling, x) * (mass > 0).unsqueeze(-2)
        force = -kappa * position - (coupling * (position - means)).sum(-1, keepdim=True)
        return torch.cat([force, torch.zeros_like(position)], dim=-1)

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """(σ_a, 0)."""
        sigma = _of(self.sigma, x)
        return torch.cat([sigma, torch.zeros_like(sigma)], dim=-1)

    def initial(self) -> Mixture:
        """The mixture of N(initial_mean_a, initial_variance_a) ⊗ δ_a."""
        return self._mixture(list(self.initial_mean), list(self.initial_variance))

    def limit(self, t: float) -> Mixture:
        """The mixture of N(m_a, v_a) ⊗ δ_a, m_a' = -κ_a m_a - Σ_b A_ab (m_a - m_b), v_a' = -2 r_a v_a + σ_a².

        The rate is r_a = κ_a + Σ_b A_ab.
        """
        coupling = torch.tensor(self.coupling, dtype=torch.float64)
        rates = torch.tensor(self.kappa, dtype=torch.float64) + coupling.sum(-1)
        start = torch.tensor(self.initial_mean, dtype=torch.float64)
        means = torch.linalg.matrix_exp(t * (coupling - torch.diag(rates))) @ start
        variances = []
        for rate, sigma, variance in zip(rates.tolist(), self.sigma, self.initial_variance, strict=True):
            gained = t if rate == 0 else -math.expm1(-2 * rate * t) / (2 * rate)
            variances.append(variance * math.exp(-2 * rate * t) + sigma**2 * gained)
        return self._mixture(means.tolist(), variances)

    def masses(self, mu: EmpiricalMeasure) -> Tensor:
        """Mass of each population, (..., 2)."""
        return mu.integrate(_membership)

    def means(self, mu: EmpiricalMeasure) -> Tensor:
        """Mean of each population, (..., 2); 0 for one without particles."""
        return _ratio(mu.integrate(lambda x: _membership(x) * x[..., :1]), self.masses(mu))

    def variances(self, mu: EmpiricalMeasure) -> Tensor:
        """Variance within each population, (..., 2); 0 for one without particles."""
        means = self.means(mu).unsqueeze(-2)
        return _ratio(mu.integrate(lambda x: _membership(x) * (x[..., :1] - means).square()), self.masses(mu))

    def observables(self) -> tuple[Observable, ...]:
        """Mass, mean and variance of each population."""

        def of(name: str, measured: Callable[[EmpiricalMeasure], Tensor]) -> Observable:
            return Observable(
                f"population_{name}", lambda t, x, mu: measured(mu), "1", f"{name} of the population", ("population",)
            )

        return of("mass", self.masses), of("mean", self.means), of("variance", self.variances)

    def suggested(self) -> dict[str, Any]:
        """Settings in which the means go round each other."""
        return {"n_particles": 1000, "n_replicas": 8, "horizon": 4.0, "dt": 0.01, "seed": 0, "save_every": 10}

    def _mixture(self, means: list[float], variances: list[float]) -> Mixture:
        pairs = enumerate(zip(means, variances, strict=True))
        return Mixture([Gaussian([m, a], [[v, 0.0], [0.0, 0.0]]) for a, (m, v) in pairs], [1 - self.share, self.share])


def _is_second(x: Tensor) -> Tensor:
    return x[..., 1:2] > 0.5


def _membership(x: Tensor) -> Tensor:
    """(1_{a = 0}, 1_{a = 1}).    (..., N, 2) -> (..., N, 2)."""
    second = _is_second(x).to(x.dtype)
    return torch.cat([1 - second, second], dim=-1)


def _of(values: Any, x: Tensor) -> Tensor:
    """The values of each particle's own population, (..., N, 1) for numbers and (..., N, 2) for rows."""
    first, second = (x.new_tensor(value).reshape(-1) for value in values)
    return torch.where(_is_second(x), second, first)


def _ratio(total: Tensor, mass: Tensor) -> Tensor:
    return torch.where(mass > 0, total / torch.where(mass > 0, mass, torch.ones_like(mass)), torch.zeros_like(total))
