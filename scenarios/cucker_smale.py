"""Flocking: particles that align their velocities with those of their neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mfsde import EmpiricalMeasure, Gaussian, Observable
from mfsde.limit import gaussian_limit


@dataclass(frozen=True)
class CuckerSmale:
    """dX = V dt, dV = K ∫ ψ(|X - x|)(v - V) m(dx, dv) dt + σ dW, ψ(r) = (1 + r²)^{-β}; states (X, V) in R^{2d}.

    The mean velocity is conserved by the interaction. Without noise all velocities tend to it for β <= ½, whatever the
    start; for β > ½ only if the start is not too spread out: two particles with β = 1 that move apart on one line flock
    if and only if w₀ + K atan r₀ < Kπ/2 (r₀ their distance, w₀ >= 0 its rate), and their distance tends to
    tan(w₀/K + atan r₀). For β = 0 every pair counts alike, the drift is K(v̄ - V): O(N), and the law stays Gaussian.

    Args:
        coupling: K.
        decay: β >= 0.
        sigma: σ, of the own noise on velocities.
        multiplicative: the noise is σ(V - v̄) dW, component by component, v̄ the mean velocity; it dies out in a flock,
            and leaves the mean velocity alone but for O(1/√N).
        initial_velocity: initial mean velocity, d numbers; positions start around 0.
        initial_position_variance: initial variance of every component of X.
        initial_velocity_variance: initial variance of every component of V.

    Raises:
        ValueError: β < 0, or a negative variance.

    Source: Cucker, Smale, Emergent behavior in flocks (2007); Ha, Lee, Levy, Emergence of time-asymptotic flocking in
    a stochastic Cucker-Smale system (2009), for own noise; Ahn, Ha, Stochastic flocking dynamics of the Cucker-Smale
    model with multiplicative white noises (2010), for noise in proportion to V - v̄.

    """

    coupling: float = 1.0
    decay: float = 0.4
    sigma: float = 0.1
    multiplicative: bool = False
    initial_velocity: Sequence[float] = (1.0, 0.0)
    initial_position_variance: float = 1.0
    initial_velocity_variance: float = 1.0

    def __post_init__(self) -> None:
        if not self.decay >= 0:
            raise ValueError(f"decay = {self.decay}; expected β >= 0: the kernel (1 + r²)^(-β) decreases.")
        if not (self.initial_position_variance >= 0 and self.initial_velocity_variance >= 0):
            raise ValueError(
                f"initial_position_variance = {self.initial_position_variance}, initial_velocity_variance = "
                f"{self.initial_velocity_variance}; expected variances >= 0."
            )

    @property
    def dim(self) -> int:
        """Dimension d of position and of velocity."""
        return len(self.initial_velocity)

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """(V, K ∫ ψ(|X - y|)(v - V) m(dy, dv)).    O(N²) time and O(N) memory; O(N) for β = 0."""
        velocity = x[..., self.dim :]
        alike = self.decay == 0
        pull = mu.mean()[..., self.dim :] - velocity if alike else mu.convolve(self._alignment, x)
        return torch.cat([velocity, self.coupling * pull], dim=-1)

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """0 for positions, and σ (or σ(V - v̄)) for velocities."""
        if not self.multiplicative:
            return x.new_tensor([0.0] * self.dim + [self.sigma] * self.dim)
        deviation = x[..., self.dim :] - mu.mean()[..., self.dim :]
        return torch.cat([torch.zeros_like(deviation), self.sigma * deviation], dim=-1)

    def initial(self) -> Gaussian:
        """N((0, initial_velocity), diag(initial variances))."""
        variances = [self.initial_position_variance] * self.dim + [self.initial_velocity_variance] * self.dim
        mean = [0.0] * self.dim + list(self.initial_velocity)
        return Gaussian(mean, torch.diag(torch.tensor(variances, dtype=torch.float64)))

    @property
    def limit(self) -> Callable[[float], Gaussian]:
        """T -> Gaussian, for β = 0 and own noise: each velocity is an Ornstein-Uhlenbeck process around the mean one.

        Var V = v₀ e^{-2Kt} + σ²(1 - e^{-2Kt})/(2K) in every component. There is no limit in closed form otherwise, and
        this attribute is missing.
        """
        if self.decay != 0 or self.multiplicative:
            raise AttributeError(
                f"CuckerSmale with decay = {self.decay}, multiplicative = {self.multiplicative} has no limit in closed "
                "form; it has one for decay = 0 and multiplicative = False."
            )
        return self._gaussian

    @cached_property
    def _gaussian(self) -> Callable[[float], Gaussian]:
        return gaussian_limit(self)

    def observables(self) -> tuple[Observable, ...]:
        """Mean velocity, and how far positions and velocities are spread: E|X - x̄|² and E|V - v̄|²."""
        d = self.dim

        def spread(part: slice) -> Callable[[float, Tensor, EmpiricalMeasure], Tensor]:
            return lambda t, x, mu: mu.integrate(lambda z: (z - mu.mean())[..., part].square().sum(-1))

        def mean_velocity(t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
            return mu.mean()[..., 0, d:]

        return (
            Observable("mean_velocity", mean_velocity, "1", "mean velocity", ("direction",)),
            Observable("position_variance", spread(slice(0, d)), "1", "E|X - mean|²"),
            Observable("velocity_variance", spread(slice(d, None)), "1", "E|V - mean|²"),
        )

    def suggested(self) -> dict[str, Any]:
        """Settings that show the flock form."""
        return {"n_particles": 200, "n_replicas": 8, "horizon": 10.0, "dt": 0.02, "seed": 0, "save_every": 10}

    def _alignment(self, z: Tensor) -> Tensor:
        """ψ(|X - y|)(v - V), of the difference (X - y, V - v)."""
        squared = z[..., : self.dim].square().sum(-1, keepdim=True)
        return (1 + squared).pow(-self.decay) * -z[..., self.dim :]
