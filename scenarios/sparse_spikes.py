"""Sparse deconvolution on the circle: particles that are spikes, with an amplitude and a place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mfsde import EmpiricalMeasure, Energy, Gaussian, Observable
from mfsde.gradient_flow import GradientFlow
from mfsde.homogeneous import of_amplitudes
from mfsde.regularisers import L1

TURN = 2 * math.pi


@dataclass(frozen=True)
class SparseSpikes(GradientFlow):
    """dX = (ṽ - proj_{∂V}(ṽ)) dt for X = (w, θ): spikes fitted to a signal that went through a low-pass filter.

    F(m) + ∫ V dm = ½‖∫ w ψ(· - θ) dm - y‖² + λ ∫ |w| dm,    y = Σ_j a_j ψ(· - θ_j),

    in L² of the circle of a given circumference, ψ the Dirichlet kernel of frequencies up to a cutoff, of norm 1. All
    is computed in its Fourier coefficients: with φ(θ) the real ones of ψ(· - θ) and r = ∫ wφ dm - y,
    ṽ = -(⟨r, φ(θ)⟩, w⟨r, φ'(θ)⟩). Only ∫ w δ_θ dm counts, a signed measure on the circle whose total variation the
    penalty is: the flow is that of a partially 1-homogeneous problem. From spikes of amplitude 0 all over the circle it
    tends to the global minimum; from a single place it cannot, since spikes at one place remain one spike.

    The source gives neither signal nor parameters; the ones here are ours. The circumference is the unit in which
    θ moves: a longer circle slows places against amplitudes.

    Args:
        cutoff: the largest frequency.
        spikes: (a_j, θ_j), the places θ_j in turns of the circle.
        penalty: λ.
        circumference: length of the circle.
        initial_place: centre of the initial places, in turns.
        initial_spread: deviation of the initial Gaussian of places, in turns: 1 is uniform to 5e-9, 0 a single place.

    Source: Chizat, Bach, On the global convergence of gradient descent for over-parameterized models using optimal
    transport (2018), sections 3.2 and 4.1, figure 3.

    """

    cutoff: int = 7
    spikes: tuple[tuple[float, float], ...] = ((1.0, 0.1), (-0.8, 0.28), (1.2, 0.5), (0.6, 0.68), (-1.0, 0.87))
    penalty: float = 0.1
    circumference: float = TURN
    initial_place: float = 0.0
    initial_spread: float = 1.0

    def __post_init__(self) -> None:
        if not (isinstance(self.cutoff, int) and self.cutoff >= 1):
            raise ValueError(f"cutoff = {self.cutoff}; expected a whole number >= 1.")
        if not self.spikes or any(len(spike) != 2 for spike in self.spikes):
            raise ValueError(f"spikes = {self.spikes}; expected pairs (amplitude, place), at least one.")
        if not (self.penalty >= 0 and self.circumference > 0 and self.initial_spread >= 0):
            raise ValueError(
                f"penalty = {self.penalty}, circumference = {self.circumference}, initial_spread = "
                f"{self.initial_spread}; expected numbers >= 0, and a circumference > 0."
            )

    @property
    def period(self) -> tuple[None, float]:
        """Amplitudes live on a line, places on the circle."""
        return None, self.circumference

    @cached_property
    def regulariser(self) -> L1:
        """λ|w|."""
        return L1(self.penalty, (0,))

    @cached_property
    def energy(self) -> Energy:
        """½|∫ wφ dm - y|²."""
        return Energy(lambda mu: 0.5 * self.residual(mu).square().sum(-1))

    def smooth_drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """-(⟨r, φ(θ)⟩, w⟨r, φ'(θ)⟩) = -D_mF(mu, x), by hand."""
        r = self.residual(mu).unsqueeze(-1)
        values, slopes = self._filtered(x[..., 1])
        return -torch.cat([values @ r, x[..., :1] * (slopes @ r)], dim=-1)

    def project(self, x: Tensor) -> Tensor:
        """Places in [0, circumference)."""
        return torch.cat([x[..., :1], torch.remainder(x[..., 1:], self.circumference)], dim=-1)

    def initial(self) -> Gaussian:
        """Amplitude 0 at places of a Gaussian read on the circle."""
        deviation = self.initial_spread * self.circumference
        return Gaussian([0.0, self.initial_place * self.circumference], [[0.0, 0.0], [0.0, deviation**2]])

    def residual(self, mu: EmpiricalMeasure) -> Tensor:
        """R = ∫ wφ dm - y, (..., 2·cutoff + 1)."""
        return mu.integrate(lambda x: x[..., :1] * self._filtered(x[..., 1])[0]) - mu.points.new_tensor(self._signal)

    def certificate(self, mu: EmpiricalMeasure, places: Tensor) -> Tensor:
        """η(θ) = -⟨r, φ(θ)⟩/λ, (..., M) at places (..., M).

        mu is a global minimiser if and only if |η| <= 1 on the circle and η(θ) = sign w at every spike (w, θ), w ≠ 0.
        """
        values: Tensor = self._filtered(places)[0] @ self.residual(mu).unsqueeze(-1)
        return -values.squeeze(-1) / self.penalty

    def spike_measure(self, mu: EmpiricalMeasure) -> EmpiricalMeasure:
        """∫ w δ_θ dm, the signed measure of places that mu stands for."""
        return of_amplitudes(mu)

    def observables(self) -> tuple[Observable | str, ...]:
        """The objective, and the share of particles that are spikes."""
        return (
            self.objective_observable(),
            Observable("active", lambda t, x, mu: mu.integrate(_is_spike), "1", "share of particles with w ≠ 0"),
        )

    def suggested(self) -> dict[str, Any]:
        """Settings that find the five spikes."""
        return {
            **{"n_particles": 200, "n_replicas": 1, "horizon": 100.0, "dt": 0.004, "seed": 0, "save_every": 250},
            "method": "proximal",
        }

    @cached_property
    def _signal(self) -> list[float]:
        """The Fourier coefficients y."""
        a, turns = torch.tensor(self.spikes, dtype=torch.float64).unbind(-1)
        coefficients: list[float] = (a @ self._filtered(turns * self.circumference)[0]).tolist()
        return coefficients

    def _filtered(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """φ(θ) and φ'(θ): the coefficients of ψ(· - θ) for 1, √2 cos, √2 sin.    (..., N) -> (..., N, 2·cutoff + 1)."""
        wave = TURN / self.circumference
        k = torch.arange(1, self.cutoff + 1, dtype=places.dtype, device=places.device) * wave
        angle, scale = places.unsqueeze(-1) * k, 1 / math.sqrt(2 * self.cutoff + 1)
        cosine, sine = math.sqrt(2) * scale * torch.cos(angle), math.sqrt(2) * scale * torch.sin(angle)
        constant = torch.full_like(places, scale).unsqueeze(-1)
        values = torch.cat([constant, cosine, sine], dim=-1)
        return values, torch.cat([torch.zeros_like(constant), -k * sine, k * cosine], dim=-1)


def _is_spike(x: Tensor) -> Tensor:
    return (x[..., 0] != 0).to(x.dtype)
