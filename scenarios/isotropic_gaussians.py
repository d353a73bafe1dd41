"""Two isotropic Gaussians told apart by a wide network: its gradient flow, reduced to the norms of the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from scipy import special
from torch import Tensor

from mfsde import Dirac, EmpiricalMeasure, Energy, Law, Observable

# The series of U_d ends where what is left out of Σ_j M_2j (2j)^{-3/2}, a bound on the error of ψ' up to a factor of
# order Σ|c_j|², is smaller than TRUNCATION, and after MOST_TERMS at the latest: the first in d >= 15.
TRUNCATION = 1e-12
MOST_TERMS = 64

SMALLEST = 1e-12  # norm from which on φ(t/r) is evaluated; below it is 0, or φ(0) for a knot at 0


@dataclass(frozen=True)
class IsotropicGaussians:
    """dr = -ψ'(r; m) dt, r >= 0: norms |w| of the neurons of f(x) = ∫ σ(⟨w, x⟩) m(dw) that learns y by gradient flow.

    y = ±1 with probability ½, x | y ~ N(0, τ²I) in R^d, τ = 1 + yΔ. The law of w stays invariant under rotations; its
    radial part m minimises half the risk,

        F = R/2 = ½ + ∫ V dm + ½ ∬ U dm dm,    ψ = V + ∫ U(·, r) m(dr),    V(r) = -½ (q(τ₊r) - q(τ₋r)),
        U(r, s) = ½ Σ_τ (q(τr) q(τs) + Σ_{j>=1} M_2j h_2j(τr) h_2j(τs)),

    q(a) = E σ(aG), h_k(a) = E σ(aG) He_k(G)/√k!, M_2j = E u^{2j} for u a coordinate of a uniform unit vector. Since U
    is a sum of products, the drift costs O(N) for each term. For d = ∞ all M_2j vanish.

    σ is piecewise linear and constant on the left. Norms that reach 0 stay there as long as ψ' >= 0.

    Args:
        delta: Δ in [0, 1).
        data_dim: d >= 2, or None for d = ∞.
        scale: κ; the weights start from N(0, κ²I/d).
        left_value: value of σ on the left of all knots.
        knots: t_j, where the slope of σ changes, increasing.
        jumps: c_j, by how much.

    Raises:
        ValueError: parameters out of range, knots without their jumps.

    Source: Mei, Montanari, Nguyen, A mean field view of the landscape of two-layer neural networks, PNAS 115 (2018),
    figures 1 to 3 and section 2 of the supplement; Montanari, One lecture on two-layer neural networks, figures 6.1
    and 6.3.

    """

    delta: float = 0.8
    data_dim: int | None = 40
    scale: float = 0.8
    left_value: float = -2.5
    knots: Sequence[float] = (0.5, 1.5)
    jumps: Sequence[float] = (10.0, -10.0)

    @classmethod
    def non_monotone(cls, scale: float = 0.1) -> IsotropicGaussians:
        """Figure 6.3, where κ = 0.1 fails and 0.4 succeeds: σ falls from -2.5 at 0 to -4 at ½, rises to 7.5 at 3/2."""
        return cls(0.5, 320, scale, -2.5, (0.0, 0.5, 1.5), (-3.0, 14.5, -11.5))

    def __post_init__(self) -> None:
        if not 0 <= self.delta < 1:
            raise ValueError(f"delta = {self.delta}; expected 0 <= Δ < 1, so that both deviations 1 ± Δ are positive.")
        if self.data_dim is not None and self.data_dim < 2:
            raise ValueError(f"data_dim = {self.data_dim}; expected d >= 2, or None for d = ∞.")
        if not self.scale > 0:
            raise ValueError(f"scale = {self.scale}; expected κ > 0: at w = 0 nothing moves.")
        if len(self.knots) != len(self.jumps) or list(self.knots) != sorted(set(self.knots)):
            raise ValueError(
                f"knots = {self.knots}, jumps = {self.jumps}; expected increasing knots, one jump for each."
            )

    @property
    def angular_moments(self) -> tuple[float, ...]:
        """M_2, M_4, ..., as many as the series keeps: M_2j = Γ(d/2) Γ(j+½) / (√π Γ(d/2+j))."""
        return _angular_moments(self.data_dim)[0]

    @property
    def truncation(self) -> float:
        """What is left out of Σ_j M_2j (2j)^{-3/2}: a bound, up to a factor of order Σ|c_j|², on the error of ψ'."""
        return _angular_moments(self.data_dim)[1]

    @cached_property
    def energy(self) -> Energy:
        """F = R/2 = ½ + ∫ V dm + ½ ∬ U dm dm."""
        return Energy(self._half_risk)

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """-ψ'(r) = -V'(r) - ½ Φ'(r)·∫ Φ dm, by hand, U = ½ Φ(r)·Φ(s)."""
        value, slope = self._features(x)
        mean = mu.integrate(lambda r: value if r is x else self._features(r)[0])
        interaction = 0.5 * (slope * mean.unsqueeze(-2)).sum(-1)
        return (-self._data_term(slope) - interaction).unsqueeze(-1)

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> float:
        """None."""
        return 0.0

    def project(self, x: Tensor) -> Tensor:
        """The norm, r >= 0."""
        return x.clamp(min=0)

    def initial(self) -> Law:
        """The law of |w| for w ~ N(0, κ²I/d); the point κ for d = ∞."""
        return Dirac(self.scale) if self.data_dim is None else NormOfGaussian(self.scale, self.data_dim)

    def risk(self, mu: EmpiricalMeasure) -> Tensor:
        """E (y - f(x))² = 2F, (...,)."""
        return 2 * self._half_risk(mu)

    def observables(self) -> tuple[Observable | str, ...]:
        """Mean norm and risk."""
        return ("mean", Observable("risk", lambda t, x, mu: self.risk(mu), "1", "risk E (y - f(x))²"))

    def suggested(self) -> dict[str, Any]:
        """Settings of the figures: N = 800, from small weights to convergence."""
        return {"n_particles": 800, "n_replicas": 1, "horizon": 20.0, "dt": 0.01, "seed": 0, "save_every": 20}

    def _half_risk(self, mu: EmpiricalMeasure) -> Tensor:
        mean = mu.integrate(lambda r: self._features(r)[0])
        return 0.5 + self._data_term(mean) + 0.25 * mean.square().sum(-1)

    def _data_term(self, features: Tensor) -> Tensor:
        """V, or V', from the features q(τ₊r), q(τ₋r), ..., or their derivatives."""
        return -0.5 * (features[..., 0] - features[..., 1])

    def _features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Φ(r) = (q(τr), √M_2 h_2(τr), √M_4 h_4(τr), ...) for both τ, and Φ'(r).    (..., N, 1) -> (..., N, 2 + 2J).

        q = y₀ + Σ c (aφ(t/a) - tΦ(-t/a)), q' = Σ c φ(t/a), and with ψ_k = φ He_k/√k! at t/a
        h_k = a Σ c ψ_{k-2}/√(k(k-1)), h_k' = Σ c (ψ_{k-2}/√(k(k-1)) + (t/a) ψ_{k-1}/√k).
        """
        tau = x.new_tensor([1 + self.delta, 1 - self.delta])
        knots, jumps = (x.new_tensor(list(values)) for values in (self.knots, self.jumps))
        a = x * tau
        u = knots / a.clamp(min=SMALLEST).unsqueeze(-1)
        psi = [torch.exp(-0.5 * u.square()) / math.sqrt(2 * math.pi)]
        ramp = a.unsqueeze(-1) * psi[0] - knots * torch.special.ndtr(-u)
        values, slopes = [self.left_value + (jumps * ramp).sum(-1)], [(jumps * psi[0]).sum(-1)]
        psi.append(u * psi[0])
        for j, moment in enumerate(self.angular_moments, start=1):
            k = 2 * j
            even = (jumps * psi[0]).sum(-1) * math.sqrt(moment / (k * (k - 1)))
            odd = (jumps * u * psi[1]).sum(-1) * math.sqrt(moment / k)
            values.append(a * even)
            slopes.append(even + odd)
            for m in (k - 1, k):
                psi = [psi[1], (u * psi[1] - math.sqrt(m) * psi[0]) / math.sqrt(m + 1)]
        return torch.cat(values, -1), torch.cat([tau * s for s in slopes], -1)


class NormOfGaussian(Law):
    """The law of |w|, w ~ N(0, κ²I/d).    scale: κ, data_dim: d."""

    def __init__(self, scale: float, data_dim: int) -> None:
        self.scale, self.data_dim = scale, data_dim

    @property
    def dim(self) -> int:
        """One."""
        return 1

    @property
    def mean(self) -> Tensor:
        """κ √(2/d) Γ((d+1)/2)/Γ(d/2), (1,)."""
        half = 0.5 * self.data_dim
        ratio = math.exp(math.lgamma(half + 0.5) - math.lgamma(half))
        return torch.tensor([self.scale * ratio / math.sqrt(half)], dtype=torch.float64)

    @property
    def cov(self) -> Tensor:
        """κ² - mean², (1, 1)."""
        return (self.scale**2 - self.mean.square())[None]

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density, (..., 1) -> (...)."""
        r, d = x[..., 0], self.data_dim
        rate = 0.5 * d / self.scale**2
        level = math.log(2) + 0.5 * d * math.log(rate) - math.lgamma(0.5 * d)
        return torch.where(
            r >= 0, level + torch.xlogy(r.new_tensor(d - 1.0), r.clamp(min=0)) - rate * r.square(), -math.inf
        )

    def cdf(self, x: Tensor) -> Tensor:
        """P(|w| <= x)."""
        half = x.new_tensor(0.5 * self.data_dim)
        below: Tensor = torch.special.gammainc(half, half * (x.clamp(min=0) / self.scale).square())
        return below

    def quantile(self, u: Tensor) -> Tensor:
        """Inverse of the distribution function."""
        return self._at(special.gammaincinv(0.5 * self.data_dim, u.detach().cpu().double().numpy()), u)

    def from_variates(self, z: Tensor) -> Tensor:
        """The quantile of Φ(z), from the upper tail where z > 0."""
        v = z.detach().cpu().double().numpy()
        half, tail = 0.5 * self.data_dim, special.ndtr(-abs(v))
        lower, upper = special.gammaincinv(half, tail), special.gammainccinv(half, tail)
        return self._at(np.where(v < 0, lower, upper), z)

    def as_measure(self) -> EmpiricalMeasure:
        """The trapezoidal rule for the normal variate, which converges geometrically."""
        z = torch.linspace(-8.5, 8.5, 129, dtype=torch.float64)[:, None]
        weights = torch.exp(-0.5 * z[:, 0].square())
        return EmpiricalMeasure(self.from_variates(z), weights / weights.sum())

    def _at(self, square: np.ndarray, like: Tensor) -> Tensor:
        """κ √(2 square/d), where d|w|²/(2κ²) = square has a Gamma law."""
        return torch.from_numpy(self.scale * np.sqrt(2 * square / self.data_dim)).to(like)


@cache
def _angular_moments(d: int | None) -> tuple[tuple[float, ...], float]:
    """The M_2j that are kept, and what is left out of Σ_j M_2j (2j)^{-3/2}."""
    if d is None:
        return (), 0.0
    j = np.arange(1, 100_000)
    log_m = special.gammaln(0.5 * d) - special.gammaln(0.5 * d + j) + special.gammaln(j + 0.5) - 0.5 * math.log(math.pi)
    terms = np.exp(log_m) * (2.0 * j) ** -1.5
    # The terms decrease at least as j^{-2}: those beyond the last one add at most j times it.
    left = np.cumsum(terms[::-1])[::-1] + j[-1] * terms[-1]
    kept = min(MOST_TERMS, int(np.searchsorted(-left, -TRUNCATION)))
    return tuple(np.exp(log_m[:kept]).tolist()), float(left[kept])
