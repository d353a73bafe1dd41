"""Double-well particles attracted to their mean, with inertia: the kinetic Desai-Zwanzig model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mfsde import EmpiricalMeasure, Energy, Gaussian, KineticLangevin, Observable, potential

from .double_well import DoubleWell, _double_well, half_spread


@dataclass(frozen=True)
class KineticDoubleWell(KineticLangevin):
    """dX = V dt, dV = (X - X³ - θ(X - E X) - γV) dt + σ dW, component by component on R^{2d}.

    The energy is that of `DoubleWell`, without confinement. Stationary laws of positions are those of `DoubleWell` with
    noise √(2T), T = σ²/(2γ), and velocities are independent of them, N(0, T I); `overdamped()` is that scenario. Below
    a critical T three of them coexist.

    Args:
        theta: θ, strength of the attraction.
        gamma: γ, friction per unit time.
        sigma: σ, noise of the velocities.
        initial_mean: initial mean of positions, d numbers.
        initial_variance: initial variance of every component of positions; velocities start as N(0, T I).

    Source: Duong, Tugaut, The Vlasov-Fokker-Planck equation in non-convex landscapes, Electron. Commun. Probab. (2018).

    """

    theta: float = 1.0
    gamma: float = 1.0
    sigma: float = 0.8
    initial_mean: Sequence[float] = (0.5,)
    initial_variance: float = 0.5

    @cached_property
    def energy(self) -> Energy:
        """∫ V dm + ½ ∬ W dm dm, of the law of positions."""
        return potential(_double_well) + self.theta * Energy(half_spread)

    def confinement(self, x: Tensor) -> Tensor:
        """Zero: the energy's own potential confines."""
        return x.new_zeros(x.shape[:-1])

    def force(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """-D_mF(mu, x), by hand: the quadratic interaction needs the mean only."""
        return x - x**3 - self.theta * (x - mu.mean())

    def initial_position(self) -> Gaussian:
        """N(initial_mean, initial_variance·I)."""
        return Gaussian(list(self.initial_mean), self.initial_variance)

    def overdamped(self) -> DoubleWell:  # type: ignore[override]
        """`DoubleWell` at the same temperature; its times are these divided by γ."""
        sigma = math.sqrt(2 * self.temperature)
        return DoubleWell(self.theta, sigma, self.initial_mean, self.initial_variance)

    def observables(self) -> tuple[Observable, ...]:
        """Kinetic energy, and how velocities lean on positions (zero in equilibrium)."""
        return (
            Observable("kinetic_energy", lambda t, x, mu: self.kinetic_energy(mu), "1", "kinetic energy ½ ∫ |v|² dm"),
            Observable("virial", _virial, "1", "virial ∫ x·v dm"),
        )

    def suggested(self) -> dict[str, Any]:
        """Settings that reach a stationary law."""
        return {
            "n_particles": 2000,
            "n_replicas": 8,
            "horizon": 20.0,
            "dt": 0.05,
            "seed": 0,
            "save_every": 10,
            "method": "baoab",
            "observables": ("mean", "covariance", "energy"),
        }


def _virial(t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
    d = mu.dim // 2
    product: Tensor = mu.integrate(lambda y: torch.linalg.vecdot(y[..., :d], y[..., d:]))
    return product
