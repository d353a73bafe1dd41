"""Mean-field Langevin dynamics that stays Gaussian: every quantity of the theory has a closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mfsde import EmpiricalMeasure, Energy, Gaussian, MeanFieldLangevin


@dataclass(frozen=True)
class GaussianLangevin(MeanFieldLangevin):
    """dX = -(κ(E X - a) + (σ²/2) k X) dt + σ dW on R^d: F(m) = ½κ|∫x dm - a|², U = k|x|²/2 + (d/2) log(2π/k).

    U is normalised: e^{-U} is the density of N(0, I/k).

    Args:
        kappa: κ, the pull of the mean to its target.
        target: a, d numbers, or one for all components.
        stiffness: k, the inverse variance of the reference law; k > 0.
        sigma: σ.
        initial_mean: initial mean, d numbers.
        initial_variance: initial variance of every component.

    Raises:
        ValueError: k <= 0, or a target of another dimension.

    Source: Hu, Ren, Siska, Szpruch, Mean-field Langevin dynamics and energy landscape of neural networks, eq. (1).

    """

    kappa: float = 0.3
    target: Sequence[float] = (1.0,)
    stiffness: float = 4.0
    sigma: float = 1.0
    initial_mean: Sequence[float] = (2.0,)
    initial_variance: float = 0.5

    def __post_init__(self) -> None:
        if not self.stiffness > 0:
            raise ValueError(f"stiffness = {self.stiffness}: e^(-k|x|²/2) is a law for k > 0 only.")
        if len(self.target) not in (1, len(self.initial_mean)):
            raise ValueError(
                f"target has {len(self.target)} numbers and initial_mean {len(self.initial_mean)}; expected as many, "
                "or one target for all components."
            )

    @property
    def dim(self) -> int:
        """Dimension d."""
        return len(self.initial_mean)

    @cached_property
    def energy(self) -> Energy:
        """½κ|∫x dm - a|²."""
        return Energy(lambda mu: 0.5 * self.kappa * (mu.mean() - self._target(mu.points)).square().sum((-2, -1)))

    def confinement(self, x: Tensor) -> Tensor:
        """U(x) = k|x|²/2 + (d/2) log(2π/k)."""
        return 0.5 * self.stiffness * x.square().sum(-1) + 0.5 * self.dim * math.log(2 * math.pi / self.stiffness)

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """-(κ(E X - a) + (σ²/2) k x), by hand."""
        pull = self.kappa * (self._target(x) - mu.mean())
        rate = 0.5 * self.sigma**2 * self.stiffness
        # Parameters that are being fitted are tensors, which alpha= does not take.
        return pull - rate * x if isinstance(rate, Tensor) else torch.sub(pull, x, alpha=rate)

    def initial(self) -> Gaussian:
        """N(initial_mean, initial_variance·I)."""
        return Gaussian(list(self.initial_mean), self.initial_variance)

    def limit(self, t: float) -> Gaussian:
        """N(m∞ + (m₀ - m∞) e^{-λt}, v_t I), λ = κ + kσ²/2, m∞ = κa/λ, v_t = 1/k + (v₀ - 1/k) e^{-kσ²t}."""
        rate, variance = self.kappa + 0.5 * self.stiffness * self.sigma**2, 1 / self.stiffness
        # (1 - e^{-λt})/λ, which is t where λ = 0.
        elapsed = t if rate == 0 else -math.expm1(-rate * t) / rate
        start = torch.tensor(list(self.initial_mean), dtype=torch.float64)
        mean = start * math.exp(-rate * t) + self.kappa * elapsed * self._target(start)
        decay = math.exp(-self.stiffness * self.sigma**2 * t)
        return Gaussian(mean, variance + (self.initial_variance - variance) * decay)

    def log_invariant(self, x: Tensor) -> Tensor:
        """-k|x - m∞|²/2, unnormalised; it exists for κ + kσ²/2 > 0 and σ ≠ 0."""
        rate = self.kappa + 0.5 * self.stiffness * self.sigma**2
        if not (rate > 0 and self.sigma != 0):
            raise ValueError(
                f"GaussianLangevin with kappa = {self.kappa}, sigma = {self.sigma} has no invariant density: it needs "
                "σ ≠ 0 and κ + kσ²/2 > 0."
            )
        return -0.5 * self.stiffness * (x - self.kappa / rate * self._target(x)).square().sum(-1)

    def suggested(self) -> dict[str, Any]:
        """Settings that show the relaxation."""
        return {
            "n_particles": 1000,
            "n_replicas": 8,
            "horizon": 2.0,
            "dt": 0.005,
            "seed": 0,
            "save_every": 20,
            "observables": ("mean", "covariance", "energy", "free_energy"),
        }

    def _target(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.target, dtype=x.dtype, device=x.device)
