"""A mixture of Gaussians learnt by neurons that may die and be duplicated: where they start decides without births."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mfsde import EmpiricalMeasure, Energy, Gaussian, Law, Observable, Product, Uniform

# Of the unit: N(x; y, 1/2).
VARIANCE = 0.5
# f = Σ_j a_j N(x; b_j, s_j): a_j, b_j, s_j.
TARGET = ((1 / 3, -2.0, 0.5), (-2 / 3, 0.0, 1.0), (1 / 3, 2.0, 0.5))


# ½∫f² dx: the loss of no neuron at all.
LOSS_OF_NONE = 0.5 * sum(
    a * b * math.exp(-0.5 * (p - q) ** 2 / (s + r)) / math.sqrt(2 * math.pi * (s + r))
    for a, p, s in TARGET
    for b, q, r in TARGET
)


def density(z: Tensor, variance: float) -> Tensor:
    """N(z; 0, variance)."""
    return torch.exp(z.square() * (-0.5 / variance)) / math.sqrt(2 * math.pi * variance)


@dataclass(frozen=True)
class GaussianMixture:
    """θ = (c, y) descends V(θ, μ) = δE/δμ, and is born and dies at the rate αV.

    E(μ) = ½∫(f - ∫ c N(x; y, ½) dμ)² dx,      f = ⅓[N(x; -2, ½) - 2 N(x; 0, 1) + N(x; 2, ½)],
    V(θ, μ) = c G(y),      G(y) = ∫ c' N(y - y'; 1) dμ - Σ_j a_j N(y - b_j; ½ + s_j).

    With x integrated against Lebesgue's measure everything is a Gaussian in closed form; E(0) = ½∫f² = 0.06886827. The
    pairs cost O(N²).

    From the left, descent stays near the stationary network of two units (loss 0.0137), and so do births and deaths of
    finitely many neurons: global convergence asks for a support that stays full. With reinjection they find the rest.

    Args:
        alpha: α >= 0, births and deaths against transport; 0 is plain descent. Ours: the source does not say.
        reinjection_rate: rate at which neurons are replaced by draws from N(0, diag(1, 4)), of full support; ours. At 0
            there is no method `reinjection`.
        initial_places: "uniform", y ~ U(-2, 2), or "left", y ~ N(-2, 0.1²), where no neuron sees the right of f.
        initial_deviation: c ~ N(0, initial_deviation²); the source does not say.

    Raises:
        ValueError: initial places of another name; a rate or deviation that is negative or not finite.

    Source: Rotskoff, Jelassi, Bruna, Vanden-Eijnden, Global convergence of neuron birth-death dynamics, 2019.

    """

    alpha: float = 1.0
    reinjection_rate: float = 0.0
    initial_places: str = "uniform"
    initial_deviation: float = 1.0

    def __post_init__(self) -> None:
        if self.initial_places not in ("uniform", "left"):
            raise ValueError(f"initial_places = {self.initial_places!r}; expected 'uniform' or 'left'.")
        for name in ("alpha", "reinjection_rate", "initial_deviation"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)}; expected a finite number >= 0.")

    @cached_property
    def energy(self) -> Energy:
        """E(μ), the loss."""
        return Energy(self._loss)

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """-(G(y), c G'(y)), by hand."""
        c, y = x[..., 0], x[..., 1:]
        places = weighted_places(mu)
        value = self._target(y) - places.convolve(lambda z: density(z[..., 0], 2 * VARIANCE), y)
        slope = places.convolve(lambda z: z[..., 0] * density(z[..., 0], 2 * VARIANCE), y) / (2 * VARIANCE)
        return torch.stack([value, c * (self._target_slope(y) + slope)], dim=-1)

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> float:
        """0: plain descent between births and deaths."""
        return 0.0

    def birth_death_rate(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """α V = α c G(y)."""
        y = x[..., 1:]
        level = weighted_places(mu).convolve(lambda z: density(z[..., 0], 2 * VARIANCE), y) - self._target(y)
        return self.alpha * x[..., 0] * level

    @property
    def reinjection(self) -> Callable[[], tuple[float, Law]]:
        """Rate and law of new neurons; an attribute only where the rate is positive."""
        if self.reinjection_rate == 0:
            raise AttributeError("reinjection_rate = 0: no neuron comes from outside.")
        return lambda: (self.reinjection_rate, Gaussian([0.0, 0.0], [[1.0, 0.0], [0.0, 4.0]]))

    def initial(self) -> Law:
        """Independent weights and places."""
        if self.initial_places == "uniform":
            return Product([Gaussian(0.0, self.initial_deviation**2), Uniform(-2.0, 2.0)])
        return Gaussian([0.0, -2.0], [[self.initial_deviation**2, 0.0], [0.0, 0.01]])

    def observables(self) -> tuple[Observable, ...]:
        """The loss."""
        return (Observable("loss", lambda t, x, mu: self._loss(mu), "1", "loss ½∫(f - f_n)² dx"),)

    def suggested(self) -> dict[str, Any]:
        """The source's n = 200."""
        return {"n_particles": 200, "n_replicas": 8, "horizon": 100.0, "dt": 0.1, "seed": 0, "save_every": 20}

    def _loss(self, mu: EmpiricalMeasure) -> Tensor:
        places, y = weighted_places(mu), mu.points[..., 1:]
        pairs = places.integrate(lambda z: places.convolve(lambda d: density(d[..., 0], 2 * VARIANCE), y))
        return LOSS_OF_NONE - places.integrate(lambda _: self._target(y)) + 0.5 * pairs

    def _target(self, y: Tensor) -> Tensor:
        """∫ f(x) N(x; y, ½) dx.    (..., N, 1) -> (..., N)."""
        parts = [a * density(y[..., 0] - b, VARIANCE + s) for a, b, s in TARGET]
        return parts[0] + parts[1] + parts[2]

    def _target_slope(self, y: Tensor) -> Tensor:
        parts = [a * (b - y[..., 0]) / (VARIANCE + s) * density(y[..., 0] - b, VARIANCE + s) for a, b, s in TARGET]
        return parts[0] + parts[1] + parts[2]


def weighted_places(mu: EmpiricalMeasure) -> EmpiricalMeasure:
    """∫ c μ(dc, ·): the signed measure of places that the network is made of."""
    return EmpiricalMeasure.signed(mu.points[..., 1:], mu.weights * mu.points[..., 0])
