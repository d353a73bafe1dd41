"""Variable selection by a wide ReLU network: its gradient flow, reduced to four numbers a neuron."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mfsde import EmpiricalMeasure, Energy, Gaussian, Observable

SMALLEST = 1e-12  # deviation s from which on b/s is formed


@dataclass(frozen=True)
class VariableSelection:
    """dθ = -D_mF(m, θ) dt, θ = (a, b, r₁, r₂): neurons a max(⟨w, x⟩ + b, 0), w = (w₁, w₂), r_i = |w_i|, that learn y.

    y = ±1 with probability ½; given y, the first γd coordinates of x ∈ R^d are N(0, τ_y²), τ_y = 1 + yΔ, the others
    N(0, 1): these say nothing about y. As d → ∞ the network's value f_y depends on x through y only, by the mean of a
    rectified Gaussian, M(b, s) = s φ(b/s) + b Φ(b/s), with s_y² = τ_y²r₁² + r₂²:

        f_y = ∫ a M(b, s_y) dm,    e_y = y - f_y,    F = R/2 = ¼ Σ_y e_y²,
        a' = ½ Σ_y e_y M(b, s_y),                   b' = ½ Σ_y e_y a Φ(b/s_y),
        r₁' = ½ Σ_y e_y a φ(b/s_y) τ_y² r₁/s_y,     r₂' = ½ Σ_y e_y a φ(b/s_y) r₂/s_y.

    The figure's step sizes ε ξ(t), ξ(t) = t^{-α}, give θ' = -ξ(t) D_mF: the same curve in another clock, singular at
    t = 0. Time here is ∫ ξ; `clock(t)` is what it shows at the figure's time t.

    Args:
        delta: Δ in [0, 1).
        share: γ in (0, 1), the share of relevant coordinates.
        decay: α in [0, 1), of the step sizes; used by `clock` alone.
        scale: κ; the weights start from N(0, κ²I/d), so from r₁ = κ√γ and r₂ = κ√(1-γ).
        initial_a: mean of the initial output weights.
        initial_b: mean of the initial offsets.
        initial_variance: their variance.

    Raises:
        ValueError: parameters out of range.

    Source: Mei, Montanari, Nguyen, A mean field view of the landscape of two-layer neural networks, PNAS 115 (2018),
    figure 4; Montanari, One lecture on two-layer neural networks, figure 6.2, where d = 320, γ = 60/320, α = ¼; Δ and
    the initial law are not given there.

    """

    delta: float = 0.8
    share: float = 0.1875
    decay: float = 0.25
    scale: float = 0.8
    initial_a: float = 0.0
    initial_b: float = 0.0
    initial_variance: float = 1.0

    def __post_init__(self) -> None:
        for name, low, value in (
            ("delta", "0 <=", self.delta),
            ("share", "0 <", self.share),
            ("decay", "0 <=", self.decay),
        ):
            if not (0 <= value < 1) or (name == "share" and value == 0):
                raise ValueError(f"{name} = {value}; expected {low} {name} < 1.")
        if not (self.scale > 0 and self.initial_variance >= 0):
            raise ValueError(
                f"scale = {self.scale}, initial_variance = {self.initial_variance}; expected κ > 0 and a variance >= 0."
            )

    @cached_property
    def energy(self) -> Energy:
        """F = R/2 = ¼ Σ_y (y - f_y)²."""
        return Energy(lambda mu: 0.25 * self._residuals(mu).square().sum(-1))

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """-D_mF(mu, θ), by hand."""
        a, b, r1, r2 = x.unbind(-1)
        tau, s = self._deviations(x)
        u = b.unsqueeze(-1) / s
        phi, mass = _density(u), torch.special.ndtr(u)
        half = 0.5 * self._residuals(mu).unsqueeze(-2)
        outer = a * (half * phi / s).sum(-1)
        return torch.stack(
            [
                (half * (s * phi + b.unsqueeze(-1) * mass)).sum(-1),
                a * (half * mass).sum(-1),
                a * (half * phi / s * tau.square()).sum(-1) * r1,
                outer * r2,
            ],
            dim=-1,
        )

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> float:
        """None."""
        return 0.0

    def project(self, x: Tensor) -> Tensor:
        """The norms r₁, r₂ >= 0."""
        return torch.cat([x[..., :2], x[..., 2:].clamp(min=0)], dim=-1)

    def initial(self) -> Gaussian:
        """Independent Gaussian a and b, r₁ = κ√γ, r₂ = κ√(1-γ)."""
        norms = [self.scale * math.sqrt(self.share), self.scale * math.sqrt(1 - self.share)]
        variances = torch.tensor([self.initial_variance, self.initial_variance, 0.0, 0.0], dtype=torch.float64)
        return Gaussian([self.initial_a, self.initial_b, *norms], torch.diag(variances))

    def clock(self, t: float) -> float:
        """∫₀ᵗ ξ(s) ds = t^{1-α}/(1-α), the time of this flow at the figure's time t."""
        return math.pow(t, 1 - self.decay) / (1 - self.decay)

    def risk(self, mu: EmpiricalMeasure) -> Tensor:
        """E (y - f(x))² = 2F, (...,)."""
        return 0.5 * self._residuals(mu).square().sum(-1)

    def observables(self) -> tuple[Observable | str, ...]:
        """Means of a, b, r₁, r₂, and the risk."""
        return ("mean", Observable("risk", lambda t, x, mu: self.risk(mu), "1", "risk E (y - f(x))²"))

    def suggested(self) -> dict[str, Any]:
        """Settings of the figure: N = 800."""
        return {"n_particles": 800, "n_replicas": 1, "horizon": 20.0, "dt": 0.02, "seed": 0, "save_every": 20}

    def _deviations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """τ_y, (2,), and s_y, (..., N, 2), for y = 1 and y = -1."""
        tau = x.new_tensor([1 + self.delta, 1 - self.delta])
        square = (tau * x[..., 2:3]).square() + x[..., 3:].square()
        return tau, square.clamp(min=SMALLEST**2).sqrt()

    def _residuals(self, mu: EmpiricalMeasure) -> Tensor:
        """e_y = y - f_y, (..., 2)."""
        return mu.points.new_tensor([1.0, -1.0]) - mu.integrate(self._outputs)

    def _outputs(self, x: Tensor) -> Tensor:
        """The values a M(b, s_y), (..., N, 2)."""
        b, s = x[..., 1:2], self._deviations(x)[1]
        values: Tensor = x[..., :1] * (s * _density(b / s) + b * torch.special.ndtr(b / s))
        return values


def _density(u: Tensor) -> Tensor:
    return torch.exp(-0.5 * u.square()) / math.sqrt(2 * math.pi)
