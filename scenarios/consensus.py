"""Consensus-based optimisation: particles that look for the minimiser of a function without its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mfsde import EmpiricalMeasure, Gaussian, Observable


@dataclass(frozen=True)
class ConsensusBased:
    """dX = -λ(X - x̄) dt + σ S(X - x̄) dW on R^d, x̄ = ∫ x e^{-αf} dm/∫ e^{-αf} dm, the consensus point.

    S(z) is diag(z) (anisotropic: each component its own noise, in proportion to itself) or |z| I (isotropic). For large
    α the consensus point is near the best particle (Laplace's principle), and the particles, which stop only where all
    of them are, gather around a point where f is small. For α = 0 it is the mean, and E|X - x̄|² = V in the limit decays
    as V' = -(2λ - σ²)V (anisotropic, in every dimension) or V' = -(2λ - dσ²)V (isotropic): consensus is reached for a
    positive rate.

    Objectives, of z = x - minimiser, all of least value 0 there: "quadratic" ½|z|²; "rastrigin"
    Σ_k (z_k² - 10 cos 2πz_k + 10), with local minima near every whole point; "ackley" -20 exp(-0.2 |z|/√d) -
    exp(Σ_k cos(2πz_k)/d) + 20 + e.

    Args:
        objective: f, "quadratic", "rastrigin" or "ackley".
        minimiser: where f is least, d numbers.
        alpha: α >= 0.
        attraction: λ.
        sigma: σ.
        isotropic: whether S(z) is |z| I.
        initial_mean: centre of the initial Gaussian, the same for every component.
        initial_variance: its variance.

    Raises:
        ValueError: an unknown objective, no component, or α < 0.

    Source: Pinnau, Totzeck, Tse, Martin, A consensus-based model for global optimization and its mean-field limit
    (2017); Carrillo, Jin, Li, Zhu, A consensus-based global optimization method for high dimensional machine learning
    problems (2021), for the anisotropic noise.

    """

    objective: str = "rastrigin"
    minimiser: Sequence[float] = (0.0, 0.0)
    alpha: float = 30.0
    attraction: float = 1.0
    sigma: float = 1.2
    isotropic: bool = False
    initial_mean: float = 1.0
    initial_variance: float = 4.0

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective = {self.objective!r}; expected one of {', '.join(OBJECTIVES)}.")
        if len(self.minimiser) == 0 or not self.alpha >= 0:
            raise ValueError(
                f"minimiser has {len(self.minimiser)} numbers and alpha = {self.alpha}; expected at least one number, "
                "and α >= 0."
            )

    @property
    def dim(self) -> int:
        """Dimension d."""
        return len(self.minimiser)

    def value(self, x: Tensor) -> Tensor:
        """F(x).    (..., d) -> (...)."""
        return OBJECTIVES[self.objective](x - x.new_tensor(list(self.minimiser)))

    def consensus(self, mu: EmpiricalMeasure) -> Tensor:
        """The consensus point ∫ x e^{-αf} dm/∫ e^{-αf} dm.    (..., 1, d)."""
        exponents = -self.alpha * self.value(mu.points)
        if not mu.is_uniform:
            exponents = exponents + mu.weights.log()
        # Shares that sum to one whatever the size of αf: the largest exponent is taken out first.
        return EmpiricalMeasure.signed(mu.points, torch.softmax(exponents, -1)).mean()

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """-λ(x - x̄)."""
        return self.attraction * (self.consensus(mu) - x)

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """σ|x - x̄|, (..., N, 1), or σ(x - x̄), (..., N, d)."""
        z = x - self.consensus(mu)
        return self.sigma * (z.norm(dim=-1, keepdim=True) if self.isotropic else z)

    def initial(self) -> Gaussian:
        """N(initial_mean, initial_variance·I)."""
        return Gaussian([self.initial_mean] * self.dim, self.initial_variance)

    def observables(self) -> tuple[Observable, ...]:
        """Consensus point, the value of f there, and the spread E|X - E X|²."""

        def consensus(t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
            return self.consensus(mu).squeeze(-2)

        def reached(t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
            return self.value(self.consensus(mu)).squeeze(-1)

        def spread(t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
            return mu.integrate(lambda y: (y - mu.mean()).square().sum(-1))

        return (
            Observable("consensus", consensus, "1", "consensus point", ("component",)),
            Observable("reached", reached, "1", "objective at the consensus point"),
            Observable("spread", spread, "1", "E|X - E X|²"),
        )

    def suggested(self) -> dict[str, Any]:
        """Settings that find the minimiser."""
        return {"n_particles": 200, "n_replicas": 50, "horizon": 10.0, "dt": 0.02, "seed": 0, "save_every": 10}


def _quadratic(z: Tensor) -> Tensor:
    return 0.5 * z.square().sum(-1)


def _rastrigin(z: Tensor) -> Tensor:
    return (z.square() + 20 * torch.sin(math.pi * z).square()).sum(-1)


def _ackley(z: Tensor) -> Tensor:
    distance = z.square().mean(-1).sqrt()
    waves = torch.cos(2 * math.pi * z).mean(-1)
    return -20 * torch.expm1(-0.2 * distance) - math.e * torch.expm1(waves - 1)


OBJECTIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "quadratic": _quadratic,
    "rastrigin": _rastrigin,
    "ackley": _ackley,
}
