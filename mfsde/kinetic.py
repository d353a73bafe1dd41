"""Kinetic (underdamped) dynamics: particles with velocities, a friction, and a force that sees the law of positions.

A state is (..., N, 2d), d positions and then d velocities; forces, energies and confinements speak of positions. The
splitting schemes "baoab" and "obabo" (`splitting.py`) and Euler integrate the same equation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .langevin import Confined, MeanFieldLangevin, number, weighted_sum
from .measure import EmpiricalMeasure, Gaussian, Law
from .model import energy_of, scenario_name
from .phase_space import half_dimension, law_of_positions
from .product import Product


class Kinetic:
    """dX = V dt, dV = (force(t, X, m_X) - γV) dt + σ dW, m_X the law of positions.

    A frozen dataclass that inherits it declares `gamma` (γ >= 0, per unit time), `sigma` (σ) and
    `force(t, x, mu)`, (..., N, d) -> (..., N, d), of positions and their law. The temperature is T = σ²/(2γ): where the
    force is -∇H(x), the law e^{-H(x)/T} N(0, T I)(v) is invariant.

    Source: Pavliotis, Stochastic processes and applications, chapter 6 (the Langevin equation).
    """

    gamma: Any
    sigma: Any
    declares: tuple[str, ...] = ("gamma", "sigma")

    def force(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """The force at positions x, (..., N, d), under the law of positions mu."""
        raise TypeError(
            f"{type(self).__name__} does not define force(t, x, mu), of positions (..., N, d) and their law; write it, "
            "or inherit KineticLangevin and declare an energy."
        )

    def initial_position(self) -> Law:
        """The law of positions at time 0."""
        raise TypeError(
            f"{type(self).__name__} defines neither initial(), a law of positions and velocities, nor "
            "initial_position(), the law of positions that start with velocities N(0, T I); write one of them."
        )

    def initial(self) -> Any:
        """`initial_position()`, and independent velocities N(0, T I)."""
        return self.with_velocities(self.initial_position())

    @property
    def temperature(self) -> float | Tensor:
        """T = σ²/(2γ).    ValueError for γ = 0, where nothing relaxes."""
        return temperature(self)

    def with_velocities(self, positions: Law) -> Law:
        """The law of independent positions and velocities, V ~ N(0, T I).

        With the stationary law of positions (`mfsde.limit.gibbs(scenario.overdamped())`) it is the invariant law.
        """
        if isinstance(positions, Gaussian):
            d = positions.dim
            velocities = self.temperature * torch.eye(d, dtype=torch.float64)
            return Gaussian(
                torch.cat([positions.mean, torch.zeros(d, dtype=torch.float64)]),
                torch.block_diag(positions.cov, velocities),
            )
        return Product([positions, Gaussian([0.0] * positions.dim, self.temperature)])

    def configuration(self, mu: EmpiricalMeasure) -> EmpiricalMeasure:
        """The law of positions under a law of states."""
        return law_of_positions(mu)

    def kinetic_energy(self, mu: EmpiricalMeasure) -> Tensor:
        """½ ∫ |v|² dm, (...,); d T/2 in equilibrium."""
        d = mu.dim // 2
        return mu.integrate(lambda x: 0.5 * x[..., d:].square().sum(-1))

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """(v, force(t, x, m_X) - γv), (..., N, 2d)."""
        d = half_dimension(x, type(self).__name__)
        positions, velocities = x[..., :d].contiguous(), x[..., d:]
        # An energy differentiates on the particles themselves where it is told that these are they.
        law = law_of_positions(mu, positions if x is mu.points else None)
        force = self.force(t, positions, law)
        return torch.cat([velocities, force - friction(self) * velocities], dim=-1)

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """(0, σI), (1, 1, 2d, d): channel k drives velocity k, as in the splitting schemes."""
        d = half_dimension(x, type(self).__name__)
        eye = torch.eye(d, dtype=x.dtype, device=x.device)
        matrix = torch.cat([torch.zeros_like(eye), number(self, "sigma") * eye])
        return matrix.reshape((1,) * (x.ndim - 1) + (2 * d, d))


class KineticLangevin(Confined, Kinetic):
    """dX = V dt, dV = -(D_mF(m_X, X) + T ∇U(X) + γV) dt + σ dW, T = σ²/(2γ).

    A frozen dataclass that inherits it declares `gamma` > 0, `sigma`, `energy` (a cached_property, or a property,
    returning an `mfsde.Energy` of the law of positions), `confinement(x)` = U, (..., N, d) -> (..., N), and
    `initial_position()` or `initial()`. A hand-written `confinement_gradient(x)` is welcome where it is faster.

    Invariant laws are products m*(dx) N(0, T I)(dv), m* ∝ exp(-δF/δm(m*, ·)/T - U): those of `overdamped()`, whatever γ
    is. There is no `log_invariant`: m* solves that equation, and there may be several. Compute it, then
    `scenario.with_velocities(mfsde.limit.gibbs(scenario.overdamped()))`.

    Source: Kazeykina, Ren, Tan, Yang, Ergodicity of the underdamped mean-field Langevin dynamics (2020).
    """

    energy: Any
    declares = ("gamma", "sigma", "energy")

    def force(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """-(D_mF(mu, x) + T ∇U(x)), of positions and their law."""
        slope: Tensor = energy_of(self).intrinsic_derivative(mu, x)
        return weighted_sum(slope, self.confinement_gradient(x), self.temperature).neg_()

    def internal_energy(self, mu: EmpiricalMeasure) -> Tensor:
        """F(m_X) + T ∫ U dm_X + ½ ∫ |v|² dm, (...,); with T ∫ m log m it is the free energy, which never increases."""
        positions = self.configuration(mu)
        potential = energy_of(self)(positions) + self.temperature * positions.integrate(self.confinement)
        total: Tensor = potential + self.kinetic_energy(mu)
        return total

    def overdamped(self) -> Overdamped:
        """The mean-field Langevin dynamics with the same stationary laws of positions, at their times multiplied by γ.

        As γ → ∞ at fixed T, X_{γs} becomes its solution at time s.
        """
        return Overdamped(self)


@dataclass(frozen=True)
class Overdamped(MeanFieldLangevin):
    """dX = -(D_mF(m, X) + T ∇U(X)) ds + √(2T) dW, with F, U and T = σ²/(2γ) of a kinetic scenario, s = t/γ."""

    kinetic: Any

    @property
    def sigma(self) -> float:
        """√(2T) = |σ|/√γ."""
        return math.sqrt(2 * float(self.kinetic.temperature))

    @property
    def energy(self) -> Any:
        """F."""
        return energy_of(self.kinetic)

    def confinement(self, x: Tensor) -> Tensor:
        """U(x)."""
        return self.kinetic.confinement(x)  # type: ignore[no-any-return]

    def confinement_gradient(self, x: Tensor) -> Tensor:
        """∇U(x)."""
        return self.kinetic.confinement_gradient(x)  # type: ignore[no-any-return]

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """The force, at the kinetic scenario's time γs."""
        return self.kinetic.force(number(self.kinetic, "gamma") * t, x, mu)  # type: ignore[no-any-return]

    def initial(self) -> Law:
        """The initial law of positions."""
        return self.kinetic.initial_position()  # type: ignore[no-any-return]


def friction(scenario: Any) -> float | Tensor:
    """γ >= 0.    ValueError for a negative one."""
    gamma = number(scenario, "gamma")
    if gamma < 0:
        raise ValueError(
            f"{scenario_name(scenario)}: gamma = {float(gamma)} would speed particles up; friction is gamma >= 0 (0: "
            "none)."
        )
    return gamma


def temperature(scenario: Any) -> float | Tensor:
    """T = σ²/(2γ).    ValueError for γ = 0, where there is none."""
    gamma, sigma = friction(scenario), number(scenario, "sigma")
    if gamma == 0:
        raise ValueError(
            f"{scenario_name(scenario)}: gamma = 0 has no temperature σ²/(2γ): nothing relaxes. Take gamma > 0, or "
            "inherit Kinetic and write force and initial() yourself."
        )
    return 0.5 * sigma**2 / gamma
