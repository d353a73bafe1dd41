"""Noisy identical oscillators on the circle, with a transition to synchrony."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mfsde import EmpiricalMeasure, Energy, Gaussian, Observable

TURN = 2 * math.pi


@dataclass(frozen=True)
class Kuramoto:
    """dθ = K ∫ sin(φ - θ) m(dφ) dt + σ dW on the circle [0, 2π).

    With z = ∫ e^{iφ} m(dφ) = r e^{iψ} the drift is K r sin(ψ - θ): O(N). The gradient flow of
    F(m) - (σ²/2) S(m), F = -½K ∬ cos(θ - φ) m(dθ) m(dφ) = -½K r², S the entropy. For K <= σ² all laws tend to the
    uniform one; above, the order parameter r tends to the positive root of r = I₁(2Kr/σ²)/I₀(2Kr/σ²).

    Args:
        coupling: K.
        sigma: σ.
        initial_mean: centre of the initial Gaussian, in [0, 2π).
        initial_variance: its variance.

    Source: Sakaguchi, Cooperative phenomena in coupled oscillator systems under external fields (1988); Bertini,
    Giacomin, Pakdaman, Dynamical aspects of mean field plane rotators and the Kuramoto model (2010).

    """

    coupling: float = 2.0
    sigma: float = 1.0
    initial_mean: float = math.pi
    initial_variance: float = 0.25

    @property
    def period(self) -> float:
        """2π."""
        return TURN

    @cached_property
    def energy(self) -> Energy:
        """-½K|∫ e^{iθ} dm|²."""
        return Energy(lambda mu: -0.5 * self.coupling * mu.integrate(_unit).square().sum(-1))

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """K (cos θ ∫ sin φ m(dφ) - sin θ ∫ cos φ m(dφ)) = -D_mF(mu, θ)."""
        c, s = mu.integrate(_unit).unsqueeze(-2).split(1, dim=-1)
        force: Tensor = self.coupling * (s * torch.cos(x) - c * torch.sin(x))
        return force

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> float:
        """σ."""
        return self.sigma

    def project(self, x: Tensor) -> Tensor:
        """The angle in [0, 2π)."""
        return torch.remainder(x, TURN)

    def initial(self) -> Gaussian:
        """N(initial_mean, initial_variance), read on the circle."""
        return Gaussian([self.initial_mean], self.initial_variance)

    def order(self, mu: EmpiricalMeasure) -> Tensor:
        """The order parameter |∫ e^{iθ} dm|, (...,)."""
        r: Tensor = mu.integrate(_unit).norm(dim=-1)
        return r

    def observables(self) -> tuple[Observable | str, ...]:
        """Energy and order parameter."""
        return ("energy", Observable("order", lambda t, x, mu: self.order(mu), "1", "order parameter |∫ e^{iθ} dm|"))

    def suggested(self) -> dict[str, Any]:
        """Settings that synchronise: K is twice the critical σ²."""
        return {"n_particles": 2000, "n_replicas": 8, "horizon": 5.0, "dt": 0.01, "seed": 0, "save_every": 10}


def _unit(x: Tensor) -> Tensor:
    """(cos θ, sin θ).    (..., N, 1) -> (..., N, 2)."""
    return torch.cat([torch.cos(x), torch.sin(x)], dim=-1)
