"""Brownian particles between a fixed and a moving wall: a domain and coefficients that depend on time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mfsde import EmpiricalMeasure, Observable, Uniform

from .reflected_interaction import mirrored


@dataclass(frozen=True)
class MovingWall:
    """dX = s X L'(t)/L(t) dt + σ(t) dW + dK on [0, L(t)], K the push of the walls.

    L(t) = ℓ + vt, σ(t) = σ(1 + a sin(2πft)). With s = 1 the medium stretches with its domain: X/L is a reflected
    Brownian motion of variance σ²/L² per unit time, so that E cos(nπX_t/L_t) = E cos(nπX₀/ℓ) exp(-½n²π² ∫₀ᵗ σ²/L² ds),
    for Euler's mirrored steps with the sum Σ σ(t_k)² h/L(t_{k+1})². The uniform law on [0, L(t)] is then exact at all
    times: `limit`. With s = 0 the medium stays and the wall pushes it: without noise, X_t = min(X₀, min_{s <= t} L(s)).

    Args:
        length: ℓ > 0, the distance of the walls at time 0.
        speed: v, the speed of the far wall.
        sigma: σ.
        modulation: a, relative change of σ(t).
        frequency: f, its frequency.
        stretch: s, how much of the dilation the particles follow.
        initial_share: the initial law is uniform on this share of [0, ℓ], from 0 on; in (0, 1].

    Raises:
        ValueError: ℓ <= 0, a share outside (0, 1]; when run, walls that have met.

    Source: Burdzy, Chen, Sylvester, The heat equation and reflected Brownian motion in time-dependent domains (2004).

    """

    length: float = 1.0
    speed: float = 0.5
    sigma: float = 0.5
    modulation: float = 0.5
    frequency: float = 1.0
    stretch: float = 1.0
    initial_share: float = 1.0

    def __post_init__(self) -> None:
        if not self.length > 0:
            raise ValueError(f"length = {self.length}; expected a positive distance of the walls.")
        if not 0 < self.initial_share <= 1:
            raise ValueError(f"initial_share = {self.initial_share}; expected a share in (0, 1].")

    def wall(self, t: float) -> float:
        """L(t) = ℓ + vt.    ValueError where it is not positive."""
        wall = self.length + self.speed * t
        if not wall > 0:
            raise ValueError(
                f"MovingWall: at t = {t:g} the walls have met: length = {self.length}, speed = {self.speed}. End the "
                f"run before t = {-self.length / self.speed:g}."
            )
        return wall

    def intensity(self, t: float) -> float:
        """σ(t) = σ(1 + a sin(2πft))."""
        return self.sigma * (1 + self.modulation * math.sin(2 * math.pi * self.frequency * t))

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """The dilation s x L'(t)/L(t)."""
        return (self.stretch * self.speed / self.wall(t)) * x

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> float:
        """σ(t)."""
        return self.intensity(t)

    def project_at(self, t: float, x: Tensor) -> Tensor:
        """Mirrored at both walls where they stand at time t, the end of the step."""
        return mirrored(x, self.wall(t))

    def initial(self) -> Uniform:
        """Uniform on [0, share ℓ]."""
        return Uniform(0.0, self.initial_share * self.length)

    @property
    def limit(self) -> Callable[[float], Uniform]:
        """The uniform law on [0, L(t)] as a function of t, where s = 1 and the initial law fills the domain.

        Raises:
            AttributeError: s ≠ 1 or share < 1: the law has no such formula.

        """
        if self.stretch != 1 or self.initial_share != 1:
            raise AttributeError(
                f"the law of MovingWall has a formula for stretch = initial_share = 1; here they are {self.stretch} "
                f"and {self.initial_share}."
            )
        return lambda t: Uniform(0.0, self.wall(t))

    def observables(self) -> tuple[Observable | str, ...]:
        """Mean, and the share of the particles in the outer half of the domain."""
        outer = Observable("outer", self._outer, "1", "share of particles in the outer half of [0, L(t)]")
        return ("mean", outer)

    def suggested(self) -> dict[str, Any]:
        """Settings in which the domain doubles."""
        return {"n_particles": 2000, "n_replicas": 8, "horizon": 2.0, "dt": 0.01, "seed": 0, "save_every": 10}

    def _outer(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        middle = 0.5 * self.wall(t)
        return mu.integrate(lambda z: (z > middle).to(z.dtype)).squeeze(-1)
