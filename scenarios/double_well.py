"""The Desai-Zwanzig model: double-well particles attracted to their mean, with a phase transition in σ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from mfsde import EmpiricalMeasure, Energy, Gaussian, potential


@dataclass(frozen=True)
class DoubleWell:
    """dX = -(X³ - X + θ(X - E X)) dt + σ dW, component by component on R^d.

    The gradient flow of ∫ V dm + ½ ∬ W(x - y) dm dm + (σ²/2) ∫ m log m with V = Σ_k (x_k⁴/4 - x_k²/2), W = θ|z|²/2.
    Below a critical σ three stationary laws coexist; above it the symmetric one is alone.

    Args:
        theta: θ, strength of the attraction.
        sigma: σ.
        initial_mean: initial mean, d numbers.
        initial_variance: initial variance of every component.

    Source: Desai, Zwanzig, Statistical mechanics of a nonlinear stochastic model (1978); Dawson (1983).

    """

    theta: float = 1.0
    sigma: float = 0.8
    initial_mean: Sequence[float] = (0.5,)
    initial_variance: float = 0.5

    @cached_property
    def energy(self) -> Energy:
        """∫ V dm + ½ ∬ W dm dm."""
        return potential(_double_well) + self.theta * Energy(half_spread)

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """-D_mF(mu, x), by hand: the quadratic interaction needs the mean only."""
        return x - x**3 - self.theta * (x - mu.mean())

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> float:
        """σ."""
        return self.sigma

    def initial(self) -> Gaussian:
        """N(initial_mean, initial_variance·I)."""
        return Gaussian(list(self.initial_mean), self.initial_variance)

    def suggested(self) -> dict[str, Any]:
        """Settings that reach the stationary law."""
        return {
            "n_particles": 2000,
            "n_replicas": 8,
            "horizon": 10.0,
            "dt": 0.01,
            "seed": 0,
            "save_every": 20,
            "observables": ("mean", "covariance", "energy"),
        }


def _double_well(x: Tensor) -> Tensor:
    square = x.square()
    return (0.25 * square.square() - 0.5 * square).sum(-1)


def half_spread(mu: EmpiricalMeasure) -> Tensor:
    """½ ∬ W(x - y) dm dm for W = |z|²/2, without pairs: half the trace of the covariance."""
    return 0.5 * mu.covariance().diagonal(dim1=-2, dim2=-1).sum(-1)
