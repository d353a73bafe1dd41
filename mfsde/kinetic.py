"""Kinetic (underdamped) dynamics: particles with velocities, a friction, and a force that sees the law of positions.

A state is (..., N, 2d), d positions and then d velocities; forces, energies and confinements speak of positions. The
splitting schemes "baoab" and "obabo" (`splitting.py`) and Euler integrate the same equation.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .energy import gradient
from .langevin import MeanFieldLangevin
from .measure import EmpiricalMeasure, Gaussian, Law, _sobol_measure, period_lengths
from .model import energy_of, scenario_name

# Atoms of a product of quadratures; above it a quasi-random sample of the product is taken.
MOST_ATOMS = 1 << 17


class Kinetic:
    """dX = V dt, dV = (force(t, X, m_X) - γV) dt + σ dW, m_X the law of positions.

    A frozen dataclass that inherits it declares `gamma` (γ >= 0, per unit time), `sigma` (σ) and
    `force(t, x, mu)`, (..., N, d) -> (..., N, d), of positions and their law. The temperature is T = σ²/(2γ): where the
    force is -∇H(x), the law e^{-H(x)/T} N(0, T I)(v) is invariant.

    Source: Pavliotis, Stochastic processes and applications, chapter 6 (the Langevin equation).
    """

    gamma: Any
    sigma: Any

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
    def temperature(self) -> float:
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
        matrix = x.new_zeros((2 * d, d))
        matrix[d:].fill_diagonal_(number(self, "sigma"))
        return matrix.reshape((1,) * (x.ndim - 1) + (2 * d, d))


class KineticLangevin(Kinetic):
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

    def confinement(self, x: Tensor) -> Tensor:
        """U(x), (..., N, d) -> (..., N)."""
        raise TypeError(
            f"{type(self).__name__} does not define confinement(x), the potential U of its reference law e^(-U); "
            "write it as (..., N, d) -> (..., N), for instance 0.5 * x.square().sum(-1)."
        )

    def confinement_gradient(self, x: Tensor) -> Tensor:
        """∇U(x), by automatic differentiation."""
        return gradient(self.confinement, x)

    def force(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """-(D_mF(mu, x) + T ∇U(x)), of positions and their law."""
        slope: Tensor = energy_of(self).intrinsic_derivative(mu, x)
        return torch.add(slope, self.confinement_gradient(x), alpha=self.temperature).neg()

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
        return math.sqrt(2 * self.kinetic.temperature)

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


def law_of_positions(mu: EmpiricalMeasure, points: Tensor | None = None) -> EmpiricalMeasure:
    """The marginal law of positions under a law of states, on its torus.

    Args:
        mu: a measure on R^{2d}.
        points: its positions (..., N, d), where they are at hand.

    """
    d = half_dimension(mu.points, "law_of_positions")
    points = mu.points[..., :d].contiguous() if points is None else points
    period = position_period(mu.period, d)
    if mu.is_uniform:
        return EmpiricalMeasure(points, period=period)
    made = EmpiricalMeasure.given if mu._is_given else EmpiricalMeasure.signed
    return made(points, mu.weights, period)


def position_period(period: Any, d: int) -> list[float | None] | None:
    """The period of positions from that of states: d lengths (or None), then None for every velocity.

    Raises:
        ValueError: velocities on a circle.

    """
    if period is None:
        return None
    lengths = period_lengths(period, 2 * d)
    if any(math.isfinite(length) for length in lengths[d:]):
        raise ValueError(
            f"period = {period!r} puts velocities on a circle; give one entry per component of the state, positions "
            f"first, and None for the {d} velocities."
        )
    return [length if math.isfinite(length) else None for length in lengths[:d]]


def half_dimension(x: Tensor, name: str) -> int:
    """The number d of positions in a state of 2d components.    ValueError if it is odd."""
    d, odd = divmod(x.shape[-1], 2)
    if odd or d == 0:
        raise ValueError(
            f"{name}: a kinetic state has d positions and d velocities; got {x.shape[-1]} components. initial() must "
            "be a law of both; initial_position() is that of positions alone."
        )
    return d


def number(scenario: Any, name: str) -> float:
    """A parameter that has to be one finite number.

    Raises:
        TypeError: it is missing, or no number.
        ValueError: it is not finite.

    """
    value = getattr(scenario, name, None)
    if isinstance(value, Tensor) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        told = "is missing" if value is None else f"is {value!r:.60}"
        raise TypeError(
            f"{scenario_name(scenario)}: {name} {told}; a kinetic equation needs one number for all components (gamma: "
            "friction per unit time; sigma: noise of the velocities)."
        )
    if not math.isfinite(value):
        raise ValueError(f"{scenario_name(scenario)}: {name} = {value} is not finite.")
    return float(value)


def friction(scenario: Any) -> float:
    """γ >= 0.    ValueError for a negative one."""
    gamma = number(scenario, "gamma")
    if gamma < 0:
        raise ValueError(
            f"{scenario_name(scenario)}: gamma = {gamma} would speed particles up; friction is gamma >= 0 (0: none)."
        )
    return gamma


def temperature(scenario: Any) -> float:
    """T = σ²/(2γ).    ValueError for γ = 0, where there is none."""
    gamma, sigma = friction(scenario), number(scenario, "sigma")
    if gamma == 0:
        raise ValueError(
            f"{scenario_name(scenario)}: gamma = 0 has no temperature σ²/(2γ): nothing relaxes. Take gamma > 0, or "
            "inherit Kinetic and write force and initial() yourself."
        )
    return 0.5 * sigma**2 / gamma
