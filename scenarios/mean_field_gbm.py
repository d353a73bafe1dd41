"""Geometric Brownian motion with its mean in drift and volatility: a noise that depends on the law."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mfsde import EmpiricalMeasure, Observable
from mfsde.measure import Law


@dataclass(frozen=True)
class MeanFieldGBM:
    """dX = (aX + b E X) dt + (sX + c E X) dW on the line.

    Mean m and second moment P close: m' = (a + b) m, P' = (2a + s²) P + (2b + 2sc + c²) m²; see `moments`. The law
    itself has a formula for b = c = 0 only, where it stays lognormal: `limit` exists then and not otherwise. From
    X₀ > 0 the limit stays positive if c = 0 and b >= 0 (Euler may leave in a large step); noise at X = 0 ends that.

    Args:
        growth: a.
        mean_growth: b.
        sigma: s.
        mean_sigma: c.
        initial_mean: E X₀ > 0.
        initial_log_variance: variance of log X₀, which is Gaussian; 0 starts at a point.

    Raises:
        ValueError: a mean that is not positive, a variance that is negative.

    Source: Carmona, Delarue, Probabilistic Theory of Mean Field Games I (2018), section 3.5, for linear mean-field
    equations; Black, Scholes (1973) for b = c = 0.

    """

    growth: float = 0.1
    mean_growth: float = 0.3
    sigma: float = 0.3
    mean_sigma: float = 0.2
    initial_mean: float = 1.0
    initial_log_variance: float = 0.1

    def __post_init__(self) -> None:
        if not self.initial_mean > 0 or not self.initial_log_variance >= 0:
            raise ValueError(
                f"initial_mean = {self.initial_mean}, initial_log_variance = {self.initial_log_variance}; expected a "
                "positive mean and a variance >= 0 of log X₀."
            )

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """The drift a x + b m."""
        return self.mean_growth * mu.mean() + self.growth * x

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """The volatility s x + c m, (..., N, 1)."""
        return self.mean_sigma * mu.mean() + self.sigma * x

    def initial(self) -> LogNormal:
        """The lognormal law of mean E X₀."""
        return self._lognormal(0.0)

    def moments(self, t: float) -> tuple[float, float]:
        """E X_t = m₀ e^{(a+b)t} and E X_t² = P₀ e^{At} + B m₀² (e^{2(a+b)t} - e^{At})/(2(a+b) - A).

        A = 2a + s², B = 2b + 2sc + c², and t e^{At} in place of the quotient where 2(a + b) = A.
        """
        m0, v0 = self.initial_mean, self.initial_log_variance
        rate = 2 * self.growth + self.sigma**2
        source = 2 * self.mean_growth + 2 * self.sigma * self.mean_sigma + self.mean_sigma**2
        gap = 2 * self.mean_growth - self.sigma**2
        elapsed = t if gap == 0 else math.expm1(gap * t) / gap
        mean = m0 * math.exp((self.growth + self.mean_growth) * t)
        return mean, m0**2 * math.exp(rate * t) * (math.exp(v0) + source * elapsed)

    @property
    def limit(self) -> Callable[[float], LogNormal]:
        """The law of X_t as a function of t where b = c = 0: log X_t ~ N(log m₀ - v₀/2 + (a - s²/2)t, v₀ + s²t).

        Raises:
            AttributeError: b or c is not 0: no formula is known.

        """
        if self.mean_growth != 0 or self.mean_sigma != 0:
            raise AttributeError(
                f"the law of MeanFieldGBM has a formula for mean_growth = mean_sigma = 0; here they are "
                f"{self.mean_growth} and {self.mean_sigma}. Use moments(t), or mfsde.limit.fokker_planck."
            )
        return self._lognormal

    def observables(self) -> tuple[Observable | str, ...]:
        """Mean and second moment."""
        second = Observable(
            "second_moment", lambda t, x, mu: mu.integrate(torch.square).squeeze(-1), "1", "second moment ∫ x² dm"
        )
        return ("mean", second)

    def suggested(self) -> dict[str, Any]:
        """Settings that show growth and spreading."""
        return {"n_particles": 2000, "n_replicas": 8, "horizon": 2.0, "dt": 0.01, "seed": 0, "save_every": 10}

    def _lognormal(self, t: float) -> LogNormal:
        start = math.log(self.initial_mean) - 0.5 * self.initial_log_variance
        drift = self.growth - 0.5 * self.sigma**2
        return LogNormal(start + drift * t, self.initial_log_variance + self.sigma**2 * t)


class LogNormal(Law):
    """The law of e^Y, Y ~ N(log_mean, log_variance), on the half-line.

    Raises:
        ValueError: a negative variance, parameters that are not finite.

    """

    def __init__(self, log_mean: float, log_variance: float) -> None:
        if not (math.isfinite(log_mean) and 0 <= log_variance < math.inf):
            raise ValueError(
                f"LogNormal: log_mean = {log_mean}, log_variance = {log_variance}; expected numbers, the variance >= 0."
            )
        self.log_mean, self.log_variance = log_mean, log_variance

    @property
    def dim(self) -> int:
        """One."""
        return 1

    @property
    def mean(self) -> Tensor:
        """e^{log_mean + log_variance/2}, (1,)."""
        return torch.tensor([math.exp(self.log_mean + 0.5 * self.log_variance)], dtype=torch.float64)

    @property
    def cov(self) -> Tensor:
        """mean² (e^{log_variance} - 1), (1, 1)."""
        return (self.mean.square() * math.expm1(self.log_variance))[None]

    def from_variates(self, z: Tensor) -> Tensor:
        """e^{log_mean + √log_variance z}."""
        return torch.exp(self.log_mean + math.sqrt(self.log_variance) * z)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density, (..., 1) -> (...), -inf for x <= 0.    ValueError for a point."""
        if self.log_variance == 0:
            raise ValueError("LogNormal.log_prob: log_variance = 0, the law is a point and has no density.")
        value = x[..., 0]
        y = torch.log(value.clamp(min=torch.finfo(x.dtype).tiny))
        density = -0.5 * (y - self.log_mean).square() / self.log_variance - y
        return torch.where(value > 0, density - 0.5 * math.log(2 * math.pi * self.log_variance), -math.inf)

    def cdf(self, x: Tensor) -> Tensor:
        """P(X <= x)."""
        y = torch.log(x.clamp(min=0)) - self.log_mean
        if self.log_variance == 0:
            return (y >= 0).to(x.dtype)
        below: Tensor = torch.special.ndtr(y / math.sqrt(self.log_variance))
        return below

    def quantile(self, u: Tensor) -> Tensor:
        """Inverse of the distribution function."""
        return torch.exp(self.log_mean + math.sqrt(self.log_variance) * torch.special.ndtri(u))

    def as_measure(self) -> EmpiricalMeasure:
        """The trapezoidal rule for the normal variate, which converges geometrically."""
        # e^{√v z} moves the Gaussian weight of the second moment by 2√v deviations.
        reach = 9.0 + 2 * math.sqrt(self.log_variance)
        z = torch.linspace(-reach, reach, 257, dtype=torch.float64)[:, None]
        weights = torch.exp(-0.5 * z[:, 0].square())
        return EmpiricalMeasure(self.from_variates(z), weights / weights.sum())
