"""Variable selection by a wide ReLU network trained on fresh samples, one a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mfsde import EmpiricalMeasure, Gaussian, Observable
from mfsde.draws import Draws

from .online_gaussians import BLOCK_PAIRS, _density, _orthant
from .variable_selection import SMALLEST, VariableSelection

# Neurons and their copies have correlation 1, where the conditional deviation √(1 - ρ²) is 0.
NARROWEST = 1e-9


@dataclass(frozen=True)
class OnlineVariableSelection:
    """dθ = -ξ(t) D_mF(m, θ) dt, θ = (a, b, w) ∈ R^{2+d}: neurons a max(⟨w, x⟩ + b, 0) that learn y; "sgd" from samples.

    y = ±1 with probability ½; given y, the first s₀ coordinates of x ∈ R^d are N(0, τ_y²), τ_y = 1 + yΔ, the others
    N(0, 1); F = R/2 = ½ E (y - f(x))², ξ(t) = (t + t₀)^{-α}. A step of "sgd" with ε = dt draws b = batch_size fresh
    samples and moves every neuron by

        θ_i += ε ξ(t) (1/b) Σ_s (y_s - f(x_s)) ∇_θ σ_*(x_s; θ_i),

    which is [1], (3.5), with step size s_k = ε ξ(kε)/2. The drift is its mean in every dimension and for every law, by
    the moments of a truncated pair of Gaussians: O(N²), some microseconds for each pair of neurons. As d → ∞ with
    s₀ = γd and weights of random directions, (a, b, |w₁|, |w₂|) follows `reduced`, the scenario VariableSelection, in
    the clock ∫ξ, w₁ ∈ R^{s₀} and w₂ the parts of w.

    Args:
        delta: Δ in [0, 1).
        data_dim: d >= 2.
        n_relevant: s₀, from 1 to d - 1.
        decay: α in [0, 1), of the step sizes.
        offset: t₀ > 0, the step ε for ξ = t^{-α} at the end of each step.
        scale: κ; w starts from N(0, κ²I/d).
        initial_a: mean of the initial output weights.
        initial_b: mean of the initial offsets.
        initial_variance: their variance.
        batch_size: samples a step, b.

    Raises:
        ValueError: parameters out of range.

    Source: [1] Montanari, One lecture on two-layer neural networks (2018), figure 6.2: d = 320, s₀ = 60, α = ¼,
    ε = 2e-4; Δ and the initial law are not given there. Mei, Montanari, Nguyen, A mean field view of the landscape of
    two-layer neural networks, PNAS 115 (2018), figure 4. The moments: Rosenbaum, Moments of a truncated bivariate
    normal distribution, J. R. Stat. Soc. B 23 (1961).

    """

    delta: float = 0.8
    data_dim: int = 320
    n_relevant: int = 60
    decay: float = 0.25
    offset: float = 2e-4
    scale: float = 0.8
    initial_a: float = 0.0
    initial_b: float = 0.0
    initial_variance: float = 1.0
    batch_size: int = 1

    def __post_init__(self) -> None:
        if self.data_dim < 2:
            raise ValueError(f"data_dim = {self.data_dim}; expected d >= 2: relevant coordinates and others.")
        if not 1 <= self.n_relevant < self.data_dim:
            raise ValueError(
                f"n_relevant = {self.n_relevant} of data_dim = {self.data_dim}; expected 1 <= s₀ < d, so that there is "
                "something to select and something to leave."
            )
        if not self.offset > 0:
            raise ValueError(f"offset = {self.offset}; expected t₀ > 0, where ξ(0) = t₀^(-α) is finite: take dt.")
        if self.batch_size < 1:
            raise ValueError(f"batch_size = {self.batch_size}; expected at least 1.")
        _ = self.reduced

    @cached_property
    def reduced(self) -> VariableSelection:
        """The flow of (a, b, |w₁|, |w₂|) as d → ∞, in the time ∫ξ."""
        return VariableSelection(
            self.delta,
            self.n_relevant / self.data_dim,
            self.decay,
            self.scale,
            self.initial_a,
            self.initial_b,
            self.initial_variance,
        )

    def step_size(self, t: float) -> float:
        """ξ(t) = (t + t₀)^{-α}."""
        return math.pow(t + self.offset, -self.decay)

    def clock(self, t: float) -> float:
        """∫₀ᵗ ξ(s) ds, the time of `reduced` at time t."""
        power = 1 - self.decay
        return (math.pow(t + self.offset, power) - math.pow(self.offset, power)) / power

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """-ξ(t) D_mF(mu, θ), in blocks of rows: O(N² d) work, O(N d) memory."""
        x = mu.beside(x)
        total = torch.empty_like(x)
        rows = max(1, BLOCK_PAIRS // mu.n_particles)
        for start in range(0, x.shape[-2], rows):
            block = slice(start, start + rows)
            total[..., block, :] = self._force(x[..., block, :], mu)
        return total.mul_(self.step_size(t))

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> float:
        """None."""
        return 0.0

    def sample(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """The fresh samples of a step: x_s, (R, b, d), and y_s, (R, b)."""
        y = draws.integers(self.batch_size, 2).mul_(2).sub_(1).to(draws.dtype)
        x = draws.normals(self.batch_size * self.data_dim, 1).view(-1, self.batch_size, self.data_dim)
        x[..., : self.n_relevant].mul_((1 + self.delta * y).unsqueeze(-1))
        return x, y

    def sampled_drift(self, t: float, x: Tensor, mu: EmpiricalMeasure, sample: tuple[Tensor, Tensor]) -> Tensor:
        """ξ(t) (1/b) Σ_s (y_s - f(x_s)) ∇_θ σ_*(x_s; θ)."""
        inputs, y = sample
        hidden = self._hidden(x, inputs)
        own = hidden if x is mu.points else self._hidden(mu.points, inputs)
        # f = Σ_i w_i a_i max(⟨w_i, x⟩ + b_i, 0).
        f = torch.bmm((mu.points[..., 0] * mu.weights).unsqueeze(1), own).squeeze(1)
        residual = ((y - f) * (self.step_size(t) / self.batch_size)).unsqueeze(1)
        drift = torch.empty_like(x)
        torch.sum(hidden * residual, -1, out=drift[..., 0])
        active = hidden.sign_().mul_(residual).mul_(x[..., :1])
        torch.sum(active, -1, out=drift[..., 1])
        # A matrix product of rank one takes twice as long as the outer product.
        drift[..., 2:] = active * inputs if self.batch_size == 1 else torch.bmm(active, inputs)
        return drift

    def initial(self) -> Gaussian:
        """Independent Gaussian a and b, w ~ N(0, κ²I/d)."""
        variances = [self.initial_variance] * 2 + [self.scale**2 / self.data_dim] * self.data_dim
        mean = [self.initial_a, self.initial_b] + [0.0] * self.data_dim
        return Gaussian(mean, torch.diag(torch.tensor(variances, dtype=torch.float64)))

    def of_norms(self, mu: EmpiricalMeasure) -> EmpiricalMeasure:
        """The law of (a, b, |w₁|, |w₂|), a state of `reduced`."""
        x, end = mu.points, 2 + self.n_relevant
        norms = [x[..., 2:end].norm(dim=-1, keepdim=True), x[..., end:].norm(dim=-1, keepdim=True)]
        return EmpiricalMeasure(torch.cat([x[..., :2], *norms], -1), None if mu.is_uniform else mu.weights)

    def risk(self, mu: EmpiricalMeasure) -> Tensor:
        """E (y - f(x))² over fresh data, (...,): O(N² d) work."""
        total = torch.zeros_like(mu.points[..., 0, 0])
        rows = max(1, BLOCK_PAIRS // mu.n_particles)
        for start in range(0, mu.n_particles, rows):
            block = slice(start, start + rows)
            x = mu.points[..., block, :]
            weight = x[..., 0] * mu.weights[..., block]
            for y in (1, -1):
                pairs = _Pairs.of(self, y, x, mu.points)
                ours = pairs.both() @ (mu.points[..., 0] * mu.weights).unsqueeze(-1)
                mean = pairs.deviation * pairs.excess(pairs.level)
                total += 0.5 * (weight * (ours - 2 * y * mean).squeeze(-1)).sum(-1)
        return 1 + total

    def observables(self) -> tuple[Observable, ...]:
        """Averages of the reduced law, and the risk that it has in the limit d → ∞."""
        names = {
            "output": "mean output weight",
            "shift": "mean offset",
            "relevant": "mean of |w₁|",
            "other": "mean of |w₂|",
        }

        def mean(k: int) -> Callable[[float, Tensor, EmpiricalMeasure], Tensor]:
            return lambda t, x, mu: self.of_norms(mu).mean()[..., 0, k]

        means = [Observable(name, mean(k), "1", long_name) for k, (name, long_name) in enumerate(names.items())]
        risk = Observable(
            "limit_risk",
            lambda t, x, mu: self.reduced.risk(self.of_norms(mu)),
            "1",
            "risk that the law of (a, b, |w₁|, |w₂|) has as d → ∞",
        )
        return (*means, risk)

    def suggested(self) -> dict[str, Any]:
        """Settings of figure 6.2: N = 800, step size s_k = ε ξ/2 with ε = 2e-4."""
        return {
            "n_particles": 800,
            "n_replicas": 1,
            "horizon": 10.0,
            "dt": 2e-4,
            "seed": 0,
            "save_every": 1000,
            "method": "sgd",
        }

    def _hidden(self, x: Tensor, inputs: Tensor) -> Tensor:
        """max(⟨w_i, x_s⟩ + b_i, 0), (R, N, b)."""
        return torch.baddbmm(x[..., 1:2], x[..., 2:], inputs.mT).relu_()

    def _force(self, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """½ Σ_y E (y - f) ∇_θ σ_* given y.    (..., M, 2 + d)."""
        a, w = x[..., :1], x[..., 2:]
        total = torch.zeros_like(x)
        outer = (mu.points[..., 0] * mu.weights).unsqueeze(-1)
        for y in (1, -1):
            pairs = _Pairs.of(self, y, x, mu.points)
            total[..., :1] += 0.5 * (y * pairs.deviation * pairs.excess(pairs.level) - pairs.both() @ outer)
            mass = torch.special.ndtr(-pairs.level)
            total[..., 1:2] += 0.5 * a * (y * mass - pairs.one() @ outer)
            along = _density(pairs.level) / pairs.deviation
            toward = (y * along - pairs.on_edge() @ outer) * w - pairs.orthant @ (outer * mu.points[..., 2:])
            toward[..., : self.n_relevant] *= (1 + y * self.delta) ** 2
            total[..., 2:] += 0.5 * a * toward
        return total


@dataclass(frozen=True)
class _Pairs:
    """Gaussian inputs sG + b of M neurons beside s'G' + b' of N, given y: levels h = -b/s, k = -b'/s', correlation ρ.

    deviation, level: (..., M, 1); deviations, levels: (..., 1, N); rho, orthant = P(G > h, G' > k): (..., M, N).
    """

    deviation: Tensor
    deviations: Tensor
    level: Tensor
    levels: Tensor
    rho: Tensor
    orthant: Tensor

    @classmethod
    def of(cls, case: OnlineVariableSelection, y: int, x: Tensor, z: Tensor) -> _Pairs:
        scaled, others = (
            torch.cat([(1 + y * case.delta) * v[..., 2 : 2 + case.n_relevant], v[..., 2 + case.n_relevant :]], -1)
            for v in (x, z)
        )
        s = scaled.norm(dim=-1, keepdim=True).clamp(min=SMALLEST)
        r = others.norm(dim=-1).unsqueeze(-2).clamp(min=SMALLEST)
        rho = (scaled @ others.mT / (s * r)).clamp(-1.0, 1.0)
        h, k = -x[..., 1:2] / s, -z[..., 1].unsqueeze(-2) / r
        return cls(s, r, h, k, rho, _orthant(h, k, rho))

    @property
    def spread(self) -> Tensor:
        """√(1 - ρ²)."""
        spread: Tensor = (1 - self.rho.square()).clamp(min=NARROWEST**2).sqrt()
        return spread

    @staticmethod
    def excess(h: Tensor) -> Tensor:
        """E (G - h)₊."""
        excess: Tensor = _density(h) - h * torch.special.ndtr(-h)
        return excess

    def on_edge(self) -> Tensor:
        """E δ(sG + b) (s'G' + b')₊: given G = h, G' is Gaussian of mean ρh and deviation √(1 - ρ²)."""
        return _density(self.level) / self.deviation * self.deviations * self._beyond()

    def one(self) -> Tensor:
        """E 1{sG + b > 0} (s'G' + b')₊."""
        h, k, rho = self.level, self.levels, self.rho
        edges = _density(k) * self._tail(h, k) + rho * _density(h) * self._tail(k, h)
        return self.deviations * (edges - k * self.orthant)

    def both(self) -> Tensor:
        """E (sG + b)₊ (s'G' + b')₊."""
        h, k, rho = self.level, self.levels, self.rho
        edges = k * _density(h) * self._tail(k, h) + h * _density(k) * self._tail(h, k)
        corner = _density(h) * self.spread * _density((k - rho * h) / self.spread)
        return self.deviation * self.deviations * ((rho + h * k) * self.orthant - edges + corner)

    def _beyond(self) -> Tensor:
        """E (G' - k)₊ given G = h."""
        distance = self.rho * self.level - self.levels
        u = distance / self.spread
        beyond: Tensor = self.spread * _density(u) + distance * torch.special.ndtr(u)
        return beyond

    def _tail(self, h: Tensor, k: Tensor) -> Tensor:
        """P(G > h | G' = k)."""
        tail: Tensor = torch.special.ndtr((self.rho * k - h) / self.spread)
        return tail
