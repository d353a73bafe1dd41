"""Two isotropic Gaussians told apart by a wide network trained on fresh samples, one a step."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfsde import EmpiricalMeasure, Gaussian, Observable
from mfsde.draws import Draws

from .isotropic_gaussians import SMALLEST, IsotropicGaussians

# Pairs of neurons in one block of the population gradient: what stays in the cache.
BLOCK_PAIRS = 1 << 16

# Quadrature of an orthant's probability: from the correlation 0 below STRONG, from 1 above it.
STRONG = 0.95
NODES, STRONG_NODES = 20, 64


@dataclass(frozen=True)
class OnlineGaussians:
    """dw = -D_mF(m, w) dt, w ∈ R^d: neurons of f(x) = ∫ σ(⟨w, x⟩) m(dw) that learn y; with "sgd" from fresh samples.

    y = ±1 with probability ½, x | y ~ N(0, τ²I) in R^d, τ = 1 + yΔ, and F = R/2 = ½ E (y - f(x))². A step of "sgd"
    with ε = dt draws b = batch_size fresh samples and moves every neuron by

        w_i += ε (1/b) Σ_s (y_s - f(x_s)) σ'(⟨w_i, x_s⟩) x_s,

    which is [1], (3.5), with step size s_k = ε/2. The drift is its mean, in every dimension and for every law: with
    Z = τ⟨w, g⟩, Z' = τ⟨w', g⟩, g ~ N(0, I),

        D_mF(m, w) = V'(|w|) w/|w| + ½ Σ_τ τ² ∫ (w E σ''(Z)σ(Z') + w' E σ'(Z)σ'(Z')) m(dw').

    The first expectation is closed; the second is Σ c_k c_l P(Z > t_k, Z' > t_l), probabilities by a quadrature with an
    error below 1e-8. O(N²): about a microsecond for each pair of neurons. A law that is invariant under rotations stays
    so, and then |w| follows `reduced`, the scenario IsotropicGaussians.

    σ is piecewise linear and constant on the left.

    Args:
        delta: Δ in [0, 1).
        data_dim: d >= 2.
        scale: κ; the weights start from N(0, κ²I/d).
        left_value: value of σ on the left of all knots.
        knots: t_j, where the slope of σ changes, increasing.
        jumps: c_j, by how much.
        batch_size: samples a step, b.

    Raises:
        ValueError: parameters out of range, knots without their jumps.

    Source: [1] Montanari, One lecture on two-layer neural networks (2018), section 6, figure 6.1; Mei, Montanari,
    Nguyen, A mean field view of the landscape of two-layer neural networks, PNAS 115 (2018).

    """

    delta: float = 0.8
    data_dim: int = 40
    scale: float = 0.8
    left_value: float = -2.5
    knots: Sequence[float] = (0.5, 1.5)
    jumps: Sequence[float] = (10.0, -10.0)
    batch_size: int = 1

    def __post_init__(self) -> None:
        if self.data_dim is None:
            raise ValueError("data_dim = None; samples have a dimension. IsotropicGaussians has the limit d = ∞.")
        if self.batch_size < 1:
            raise ValueError(f"batch_size = {self.batch_size}; expected at least 1.")
        _ = self.reduced

    @cached_property
    def reduced(self) -> IsotropicGaussians:
        """The flow of |w|, where the law is invariant under rotations."""
        return IsotropicGaussians(
            self.delta, self.data_dim, self.scale, self.left_value, tuple(self.knots), tuple(self.jumps)
        )

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """-D_mF(mu, w), in blocks of rows: O(N² d) work, O(N d) memory."""
        x = mu.beside(x)
        r = x.norm(dim=-1, keepdim=True)
        total: Tensor = x * (-self._potential_slope(r) / r.clamp(min=SMALLEST))
        rows = max(1, BLOCK_PAIRS // mu.n_particles)
        for start in range(0, x.shape[-2], rows):
            block = slice(start, start + rows)
            total[..., block, :] -= self._interaction(x[..., block, :], mu)
        return total

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> float:
        """None."""
        return 0.0

    def sample(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """The fresh samples of a step: x_s, (R, b, d), and y_s, (R, b)."""
        y = draws.integers(self.batch_size, 2).mul_(2).sub_(1).to(draws.dtype)
        g = draws.normals(self.batch_size * self.data_dim, 1).view(-1, self.batch_size, self.data_dim)
        return torch.addcmul(g, g, y.unsqueeze(-1), value=self.delta), y

    def sampled_drift(self, t: float, x: Tensor, mu: EmpiricalMeasure, sample: tuple[Tensor, Tensor]) -> Tensor:
        """(1/b) Σ_s (y_s - f(x_s)) σ'(⟨w, x_s⟩) x_s."""
        inputs, y = sample
        value, slope = self.activation(torch.bmm(x, inputs.mT))
        if x is not mu.points:
            value, _ = self.activation(torch.bmm(mu.points, inputs.mT))
        f = value.mean(1) if mu.is_uniform else (value * mu.weights.unsqueeze(-1)).sum(1)
        coefficient = slope.mul_(((y - f) / self.batch_size).unsqueeze(1))
        # A matrix product of rank one takes twice as long as the outer product.
        return coefficient * inputs if self.batch_size == 1 else torch.bmm(coefficient, inputs)

    def activation(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """σ and σ' at z, elementwise."""
        value, slope = torch.full_like(z, self.left_value), torch.zeros_like(z)
        for t, c in zip(self.knots, self.jumps, strict=True):
            ramp = (z - t).relu_()
            value.add_(ramp, alpha=c)
            slope.add_(ramp.sign_(), alpha=c)
        return value, slope

    def initial(self) -> Gaussian:
        """N(0, κ²I/d)."""
        return Gaussian([0.0] * self.data_dim, self.scale**2 / self.data_dim)

    def radial(self, mu: EmpiricalMeasure) -> EmpiricalMeasure:
        """The law of |w|, a state of `reduced`."""
        norms = mu.points.norm(dim=-1, keepdim=True)
        return EmpiricalMeasure(norms, None if mu.is_uniform else mu.weights)

    def observables(self) -> tuple[Observable, ...]:
        """Mean norm, and the risk of the network averaged over rotations."""
        return (
            Observable("norm", lambda t, x, mu: self.radial(mu).mean()[..., 0, 0], "1", "mean of |w|"),
            Observable(
                "radial_risk",
                lambda t, x, mu: self.reduced.risk(self.radial(mu)),
                "1",
                "risk E (y - f(x))² of the network averaged over rotations",
            ),
        )

    def suggested(self) -> dict[str, Any]:
        """Settings of figure 6.1: N = 800, step size s_k = ε/2 = 1e-6."""
        return {
            "n_particles": 800,
            "n_replicas": 1,
            "horizon": 0.5,
            "dt": 2e-6,
            "seed": 0,
            "save_every": 10_000,
            "method": "sgd",
        }

    def _potential_slope(self, r: Tensor) -> Tensor:
        """V'(r), (..., N, 1)."""
        tau = self._deviations(r)
        knots, jumps = self._activation(r)
        u = knots / (tau * r).clamp(min=SMALLEST).unsqueeze(-1)
        slope = tau * (jumps * _density(u)).sum(-1)
        return -0.5 * (slope[..., :1] - slope[..., 1:])

    def _interaction(self, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """∫ ∇_w U(w, w') m(dw').    (..., M, d) -> (..., M, d)."""
        y, weights = mu.points, mu.weights.unsqueeze(-2)
        r, s = x.norm(dim=-1, keepdim=True), y.norm(dim=-1).unsqueeze(-2)
        rho = ((x @ y.mT) / (r * s).clamp(min=SMALLEST**2)).clamp(-1.0, 1.0)
        total = torch.zeros_like(x)
        for tau in (1 + self.delta, 1 - self.delta):
            a, b = (tau * r).clamp(min=SMALLEST), (tau * s).clamp(min=SMALLEST)
            along = (self._along(a, b, rho) * weights).sum(-1, keepdim=True)
            across = self._across(a, b, rho) * weights
            total += 0.5 * tau**2 * (x * along + across @ y)
        return total

    def _along(self, a: Tensor, b: Tensor, rho: Tensor) -> Tensor:
        """E σ''(Z)σ(Z') for centred Gaussians of correlation ρ, deviations a (..., M, 1) and b (..., 1, N)."""
        spread = (b * (1 - rho.square()).sqrt()).clamp(min=SMALLEST)
        total = torch.zeros_like(rho)
        for t, c in zip(self.knots, self.jumps, strict=True):
            # Given Z = t, Z' is Gaussian of mean ρbt/a and deviation b√(1 - ρ²).
            mean = rho * (b * t / a)
            inner = torch.full_like(rho, self.left_value)
            for other, jump in zip(self.knots, self.jumps, strict=True):
                u = (mean - other) / spread
                inner += jump * (spread * _density(u) + (mean - other) * torch.special.ndtr(u))
            total += c * _density(t / a) / a * inner
        return total

    def _across(self, a: Tensor, b: Tensor, rho: Tensor) -> Tensor:
        """E σ'(Z)σ'(Z')."""
        total = torch.zeros_like(rho)
        for t, c in zip(self.knots, self.jumps, strict=True):
            for other, jump in zip(self.knots, self.jumps, strict=True):
                total.add_(_orthant(t / a, other / b, rho), alpha=c * jump)
        return total

    def _deviations(self, like: Tensor) -> Tensor:
        return like.new_tensor([1 + self.delta, 1 - self.delta])

    def _activation(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return like.new_tensor(list(self.knots)), like.new_tensor(list(self.jumps))


def _density(u: Tensor) -> Tensor:
    return torch.exp(-0.5 * u.square()) / math.sqrt(2 * math.pi)


@functools.cache
def _nodes(n: int) -> tuple[tuple[float, float], ...]:
    """Gauss-Legendre nodes and weights on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return tuple(zip((0.5 * (1 + nodes)).tolist(), (0.5 * weights).tolist(), strict=True))


def _orthant(h: Tensor, k: Tensor, rho: Tensor) -> Tensor:
    """P(G > h, G' > k) for standard Gaussians of correlation ρ.    (..., M, 1), (..., 1, N), (..., M, N).

    Plackett: ∂P/∂ρ is their density at (h, k), so with ρ = sin θ

        P = Φ(-h)Φ(-k) + (1/2π) ∫_0^{arcsin ρ} exp(-(h² + k² - 2hk sin θ)/(2 cos² θ)) dθ,

    and near ρ = 1 the integral down from there. Error below 1e-14, and 1e-8 for |ρ| > STRONG.
    """
    angle = torch.asin(rho.clamp(-STRONG, STRONG))
    half, product = -0.5 * (h.square() + k.square()), h * k
    total, sine, exponent = torch.zeros_like(rho), torch.empty_like(rho), torch.empty_like(rho)
    for node, weight in _nodes(NODES):
        torch.mul(angle, node, out=sine).sin_()
        torch.mul(sine, product, out=exponent).add_(half)
        exponent.div_(sine.square_().neg_().add_(1.0)).exp_()
        total.add_(exponent, alpha=weight)
    total.mul_(angle / (2 * math.pi)).add_(torch.special.ndtr(-h) * torch.special.ndtr(-k))
    strong = rho.abs() > STRONG
    if bool(strong.any()):
        found = (z.expand_as(rho)[strong] for z in (h, k, rho))
        total[strong] = _strong_orthant(*found)
    return total


def _strong_orthant(h: Tensor, k: Tensor, rho: Tensor) -> Tensor:
    """The same for |ρ| near 1: P(ρ) = Φ(-max(h, k)) - (1/2π) ∫_0^{arccos ρ}, P(h, k; -ρ) = Φ(-h) - P(h, -k; ρ)."""
    negative = rho < 0
    k = torch.where(negative, -k, k)
    angle = torch.acos(rho.abs())
    gap, product = 0.5 * (h - k).square(), h * k
    total = torch.zeros_like(rho)
    for node, weight in _nodes(STRONG_NODES):
        # Nodes crowd at 0, where exp(-(h - k)²/(2v²)) rises at v = |h - k|.
        v = angle * node**3
        exponent = -gap / torch.sin(v).square().clamp(min=SMALLEST**2) - product / (1 + torch.cos(v))
        total.add_(torch.exp(exponent), alpha=3 * node**2 * weight)
    found = torch.special.ndtr(-torch.maximum(h, k)) - total * (angle / (2 * math.pi))
    return torch.where(negative, torch.special.ndtr(-h) - found, found)
