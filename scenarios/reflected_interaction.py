"""Particles between two walls that attract one another: reflection, with a stationary law in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mfsde import EmpiricalMeasure, Energy, Uniform


@dataclass(frozen=True)
class ReflectedInteraction:
    """dX = -α(X - E X) dt + σ dW + dK on [l, h], K the push of the walls.

    The gradient flow of ½α Var m + (σ²/2) ∫ m log m among laws on [l, h]; no mass flows through the walls. Its only
    stationary law is N((l + h)/2, σ²/(2α)) restricted to [l, h]: the walls, and not an external force, choose its
    centre. Steps that cross a wall are mirrored, which keeps the weak order one of Euler.

    Args:
        coupling: α >= 0, the attraction to the mean.
        sigma: σ.
        low: l.
        high: h > l.
        initial_share: the initial law is uniform on this share of [l, h], from l on; in (0, 1].

    Raises:
        ValueError: walls out of order, a share outside (0, 1], α < 0.

    Source: Sznitman, Nonlinear reflecting diffusion process, and the propagation of chaos and fluctuations associated
    (1984); Bossy, Gobet, Talay, A symmetrized Euler scheme for an efficient approximation of reflected diffusions
    (2004), for the mirrored steps.

    """

    coupling: float = 2.0
    sigma: float = 0.5
    low: float = 0.0
    high: float = 1.0
    initial_share: float = 0.25

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"low = {self.low}, high = {self.high}; expected low < high.")
        if not 0 < self.initial_share <= 1:
            raise ValueError(f"initial_share = {self.initial_share}; expected a share in (0, 1].")
        if not self.coupling >= 0:
            raise ValueError(f"coupling = {self.coupling}; expected α >= 0, an attraction.")

    @cached_property
    def energy(self) -> Energy:
        """½α Var m, which is ½ ∬ ½α|x - y|² dm dm without its sum over pairs."""
        return Energy(lambda mu: 0.5 * self.coupling * mu.covariance()[..., 0, 0])

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """-D_mF(mu, x), by hand."""
        return self.coupling * (mu.mean() - x)

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> float:
        """σ."""
        return self.sigma

    def project(self, x: Tensor) -> Tensor:
        """Mirrored at both walls, as often as it takes."""
        return self.low + mirrored(x - self.low, self.high - self.low)

    def initial(self) -> Uniform:
        """Uniform on [l, l + share (h - l)]."""
        return Uniform(self.low, self.low + self.initial_share * (self.high - self.low))

    def stationary_log_density(self, x: Tensor) -> Tensor:
        """-α|x - (l + h)/2|²/σ², unnormalised, -inf beyond the walls, (..., 1) -> (...)."""
        value = x[..., 0]
        inside = (value >= self.low) & (value <= self.high)
        density = -self.coupling / self.sigma**2 * (value - 0.5 * (self.low + self.high)).square()
        return torch.where(inside, density, -math.inf)

    def observables(self) -> tuple[str, ...]:
        """Mean, variance, energy."""
        return ("mean", "covariance", "energy")

    def suggested(self) -> dict[str, Any]:
        """Settings that show the cloud centred by its walls."""
        return {"n_particles": 2000, "n_replicas": 8, "horizon": 6.0, "dt": 0.01, "seed": 0, "save_every": 20}


def mirrored(x: Tensor, length: float) -> Tensor:
    """The point of [0, length] that x lands on when the line is folded at its ends.    Any shape."""
    folded = torch.remainder(x, 2 * length)
    return torch.minimum(folded, 2 * length - folded).clamp(0, length)
