"""Oscillators whose frequencies differ: Kuramoto's model, with the frequency as a frozen component of the state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import special
from torch import Tensor

from mfsde import EmpiricalMeasure, Gaussian, Observable, Product
from mfsde.measure import Law

TURN = 2 * math.pi
NODES = 64  # of the quadrature of each component
LORENTZ, GAUSSIAN = "lorentz", "gaussian"


@dataclass(frozen=True)
class KuramotoFrequencies:
    """dθ = (ω + K r sin(ψ - θ)) dt + σ dW, dω = 0, on the circle [0, 2π) times R; r e^{iψ} = ∫ e^{iθ} dm.

    The state is (θ, ω): a frequency is drawn once and never moves. At time 0 the angle is independent of it, with the
    wrapped Cauchy law of parameter r₀ (0: uniform). The drift is O(N).

    Incoherence (r = 0) loses its stability at K_c = 2/∫ D/(D² + (ω - Ω)²) g(dω), D = σ²/2: `critical_coupling`.
    For Lorentz frequencies and σ = 0 the order parameter solves r' = -Δ r + ½K r(1 - r²), and the angles keep a
    wrapped Cauchy law: `order_limit`, `angles`. The joint law of (θ, ω) has no formula, hence no `limit`.

    Args:
        coupling: K.
        sigma: σ.
        frequencies: "lorentz", of density Δ/(π(Δ² + (ω - Ω)²)), or "gaussian", N(Ω, Δ²).
        width: Δ > 0.
        centre: Ω.
        initial_order: r₀ in [0, 1).
        initial_mean: angle around which the initial law lies.

    Raises:
        ValueError: another name of a law, Δ <= 0, r₀ outside [0, 1).

    Source: Kuramoto, Self-entrainment of a population of coupled non-linear oscillators (1975); Sakaguchi, Cooperative
    phenomena in coupled oscillator systems under external fields (1988), for σ > 0; Ott, Antonsen, Low dimensional
    behavior of large systems of globally coupled oscillators (2008), for the closed equation of r.

    """

    coupling: float = 2.0
    sigma: float = 0.0
    frequencies: str = LORENTZ
    width: float = 0.5
    centre: float = 0.0
    initial_order: float = 0.1
    initial_mean: float = math.pi

    def __post_init__(self) -> None:
        if self.frequencies not in (LORENTZ, GAUSSIAN):
            raise ValueError(f"frequencies = {self.frequencies!r}; expected {LORENTZ!r} or {GAUSSIAN!r}.")
        if not self.width > 0:
            raise ValueError(f"width = {self.width}; expected Δ > 0. Identical oscillators are the scenario Kuramoto.")
        _check_order("initial_order", self.initial_order)

    @property
    def period(self) -> tuple[float | None, ...]:
        """2π for the angle; frequencies live on a line."""
        return (TURN, None)

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """(ω + K (cos θ ∫ sin φ dm - sin θ ∫ cos φ dm), 0)."""
        theta, omega = x.split(1, dim=-1)
        c, s = mu.integrate(_unit).unsqueeze(-2).split(1, dim=-1)
        turning = omega + self.coupling * (s * torch.cos(theta) - c * torch.sin(theta))
        return torch.cat([turning, torch.zeros_like(turning)], dim=-1)

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> float | Tensor:
        """(σ, 0): the frequency is frozen."""
        if self.sigma == 0:
            return 0.0
        coefficient = x.new_zeros(2)
        coefficient[0] = self.sigma
        return coefficient

    def project(self, x: Tensor) -> Tensor:
        """The angle in [0, 2π); the frequency as it is."""
        theta, omega = x.split(1, dim=-1)
        return torch.cat([torch.remainder(theta, TURN), omega], dim=-1)

    def initial(self) -> Product:
        """Wrapped Cauchy angles, and frequencies independent of them."""
        law = Cauchy(self.centre, self.width) if self.frequencies == LORENTZ else Gaussian(self.centre, self.width**2)
        return Product([WrappedCauchy(self.initial_mean, self.initial_order), law])

    def order(self, mu: EmpiricalMeasure) -> Tensor:
        """The order parameter r = |∫ e^{iθ} dm|, (...,); about √(π/4N) for N independent uniform angles."""
        r: Tensor = mu.integrate(_unit).norm(dim=-1)
        return r

    def critical_coupling(self) -> float:
        """K_c: 2Δ + σ² for Lorentz frequencies; √(8/π) Δ / (e^{y²} erfc y), y = σ²/(√8 Δ), for Gaussian ones."""
        if self.frequencies == LORENTZ:
            return 2 * self.width + self.sigma**2
        y = torch.tensor(self.sigma**2 / (math.sqrt(8) * self.width), dtype=torch.float64)
        return math.sqrt(8 / math.pi) * self.width / float(torch.special.erfcx(y))

    def order_limit(self, t: float) -> float:
        """r(t) of infinitely many oscillators, from r' = a r - ½K r³, a = ½K - Δ; it tends to √(1 - 2Δ/K) or 0.

        Raises:
            ValueError: Gaussian frequencies, or noise: the equation does not close.

        Source: Ott, Antonsen (2008), equations (10) and (11).

        """
        if self.frequencies != LORENTZ or self.sigma != 0:
            raise ValueError(
                f"the equation of r closes for Lorentz frequencies without noise; here frequencies = "
                f"{self.frequencies!r}, sigma = {self.sigma}. Simulate with many particles instead."
            )
        growth = 0.5 * self.coupling - self.width
        # (1 - e^{-2at})/a, which is 2t where a = 0.
        elapsed = 2 * t if growth == 0 else -math.expm1(-2 * growth * t) / growth
        r0 = self.initial_order
        return r0 / math.sqrt(math.exp(-2 * growth * t) + 0.5 * self.coupling * r0**2 * elapsed)

    def angles(self, t: float) -> WrappedCauchy:
        """The law of θ at time t of infinitely many oscillators: E e^{inθ} = (r e^{iψ})^n, ψ = ψ₀ + Ωt.

        ValueError as `order_limit`.
        """
        return WrappedCauchy(self.initial_mean + self.centre * t, self.order_limit(t))

    def observables(self) -> tuple[Observable, ...]:
        """Order parameter."""
        return (Observable("order", lambda t, x, mu: self.order(mu), "1", "order parameter |∫ e^{iθ} dm|"),)

    def suggested(self) -> dict[str, Any]:
        """Settings that synchronise: K is twice the critical 2Δ."""
        return {"n_particles": 4000, "n_replicas": 8, "horizon": 12.0, "dt": 0.01, "seed": 0, "save_every": 20}


class WrappedCauchy(Law):
    """The law of an angle with E e^{inθ} = (r e^{iψ})^n, n >= 0, on (ψ - π, ψ + π).

    Its density is (1 - r²)/(2π(1 - 2r cos(θ - ψ) + r²)), with respect to the angle modulo 2π.

    Args:
        centre: ψ.
        order: r in [0, 1).

    """

    def __init__(self, centre: float, order: float) -> None:
        _check_order("order", order)
        self.centre, self.order = centre, order

    @property
    def dim(self) -> int:
        """One."""
        return 1

    @property
    def mean(self) -> Tensor:
        """ψ, (1,)."""
        return torch.tensor([self.centre], dtype=torch.float64)

    @property
    def cov(self) -> Tensor:
        """π²/3 + 4 Li₂(-r), the variance on (ψ - π, ψ + π), (1, 1)."""
        return torch.tensor([[math.pi**2 / 3 + 4 * float(special.spence(1 + self.order))]], dtype=torch.float64)

    def from_variates(self, z: Tensor) -> Tensor:
        """The quantile of Φ(z)."""
        return self._at(_normal_tail(z), z.sign())

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density, (..., 1) -> (...); periodic."""
        r = self.order
        # 1 - 2r cos + r², without cancellation where r is near 1.
        distance = (1 - r) ** 2 + 4 * r * torch.sin(0.5 * (x[..., 0] - self.centre)).square()
        return math.log((1 - r) * (1 + r) / TURN) - torch.log(distance)

    def cdf(self, x: Tensor) -> Tensor:
        """P(θ <= x) for an angle on (ψ - π, ψ + π)."""
        half = 0.5 * (x - self.centre).clamp(-math.pi, math.pi)
        return 0.5 + torch.atan2((1 + self.order) * torch.sin(half), (1 - self.order) * torch.cos(half)) / math.pi

    def quantile(self, u: Tensor) -> Tensor:
        """Inverse of the distribution function."""
        return self._at(torch.minimum(u, 1 - u), (u - 0.5).sign())

    def as_measure(self) -> EmpiricalMeasure:
        """Gauss-Legendre quadrature in the distribution function."""
        nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(NODES))
        return EmpiricalMeasure(self.quantile(0.5 + 0.5 * nodes[:, None]), weights / weights.sum())

    def _at(self, tail: Tensor, side: Tensor) -> Tensor:
        """The angle with mass `tail` beyond it, on one side of ψ."""
        scaled = (1 - self.order) * torch.cos(math.pi * tail)
        return self.centre + 2 * side * torch.atan2(scaled, (1 + self.order) * torch.sin(math.pi * tail))


class Cauchy(Law):
    """The law of density Δ/(π(Δ² + (ω - Ω)²)).    centre: Ω, width: Δ > 0. It has no mean and no covariance."""

    def __init__(self, centre: float, width: float) -> None:
        self.centre, self.width = centre, width

    @property
    def dim(self) -> int:
        """One."""
        return 1

    @property
    def mean(self) -> Tensor:
        """It has none: AttributeError."""
        raise AttributeError(
            "a Cauchy law has no mean and no covariance, and no grid holds its tails; use its quantiles, or Gaussian "
            "frequencies."
        )

    @property
    def cov(self) -> Tensor:
        """It has none: AttributeError."""
        return self.mean

    def from_variates(self, z: Tensor) -> Tensor:
        """The quantile of Φ(z), from the nearer tail: finite in float32, where Φ(z) rounds to 1."""
        return self._at(_normal_tail(z), z.sign())

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density, (..., 1) -> (...)."""
        return -math.log(math.pi * self.width) - torch.log1p(((x[..., 0] - self.centre) / self.width).square())

    def cdf(self, x: Tensor) -> Tensor:
        """P(ω <= x)."""
        return 0.5 + torch.atan((x - self.centre) / self.width) / math.pi

    def quantile(self, u: Tensor) -> Tensor:
        """Inverse of the distribution function."""
        return self._at(torch.minimum(u, 1 - u), (u - 0.5).sign())

    def as_measure(self) -> EmpiricalMeasure:
        """Quantiles of the midpoints of equal masses: Ω + Δ tan on even angles, exact for ω ↦ 1/(1 + (ω - Ω)²/Δ²)."""
        midpoints = (torch.arange(NODES, dtype=torch.float64) + 0.5) / NODES
        return EmpiricalMeasure(self.quantile(midpoints[:, None]))

    def _at(self, tail: Tensor, side: Tensor) -> Tensor:
        angle = math.pi * tail.clamp(min=torch.finfo(tail.dtype).tiny)
        return self.centre + self.width * side * torch.cos(angle) / torch.sin(angle)


def _unit(x: Tensor) -> Tensor:
    """(cos θ, sin θ).    (..., N, 2) -> (..., N, 2)."""
    theta = x[..., :1]
    return torch.cat([torch.cos(theta), torch.sin(theta)], dim=-1)


def _normal_tail(z: Tensor) -> Tensor:
    """P(Z > |z|); torch's ndtr rounds it to 0 from |z| = 5.5 on in float32."""
    return 0.5 * torch.erfc(z.abs() / math.sqrt(2))


def _check_order(name: str, r: float) -> None:
    if not 0 <= r < 1:
        raise ValueError(f"{name} = {r}; expected 0 <= r < 1: 0 is uniform on the circle, 1 a point.")
