"""What the samples of the levels have shown: variances, rates, the error that is left and what less of it would cost.

Levels, P_ℓ and P̂_{ℓ-1} are those of `multilevel`.

The rates α, β are slopes over the levels there are, and tend to their limits only as levels refine: variances are
B·2^{-2ℓ} + A·2^{-3ℓ} + ..., whose local slope is above 2 for A > 0 (additive noise and a linear drift, for one) and
below for A < 0. Their standard errors are those of the samples; the distance from the limit is not in them.

Source of the pooled variances: Collier et al., BIT 55 (2015), who give each level a normal-gamma prior.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xarray as xr
from scipy.special import digamma, polygamma

from .halves import Array, Problem, Samples
from .model import numeric_fields
from .settings import label

# Degrees of freedom that the level before gives to a variance.
PRIOR = 5
# Measured rates are held between these where a finer level is expected from a coarser one: the upper ones are the
# limits for smooth functionals, which slopes of coarse levels may pass.
ALPHA, BETA = (0.5, 1.0), (0.5, 2.0)


@dataclass(frozen=True)
class Line:
    """A weighted least-squares line: its slope, and the standard error from the residuals or from given ones."""

    slope: float
    intercept: float
    residual_stderr: float
    stderr: float


def line(x: Array, y: Array, errors: Array) -> Line:
    """The line through the points (x, y), weighed with the standard errors of y."""
    w = 1 / np.square(errors)
    centre, level = (w @ x) / w.sum(), (w @ y) / w.sum()
    spread = w @ np.square(x - centre)
    slope = float(w @ ((x - centre) * (y - level)) / spread)
    misfit = float(w @ np.square(y - level - slope * (x - centre))) / max(1, len(x) - 2)
    given = 1 / math.sqrt(spread)
    # Two points leave no residual.
    residual = given * math.sqrt(misfit) if len(x) > 2 else math.nan
    return Line(slope, float(level - slope * centre), residual, given * max(1.0, math.sqrt(misfit)))


@dataclass(frozen=True)
class Goal:
    """What `estimate` was asked for, and within what: its tolerance, variance_share, max_level and max_cost."""

    tolerance: float
    share: float
    max_level: int
    max_cost: float


@dataclass(frozen=True)
class Table:
    """Statistics of the samples, level by level, and what follows from them."""

    problem: Problem
    levels: list[Samples]

    @cached_property
    def n_samples(self) -> Array:
        """M_ℓ."""
        return np.array([len(level.values) for level in self.levels])

    @cached_property
    def unit_cost(self) -> Array:
        """C_ℓ, of one sample."""
        return np.array([self.problem.unit_cost(level) for level in range(len(self.levels))])

    @cached_property
    def differences(self) -> list[Array]:
        """P_ℓ - P̂_{ℓ-1}, sample by sample."""
        return [level.values[:, 0] - level.values[:, 1] for level in self.levels]

    @cached_property
    def mean(self) -> Array:
        """Of the differences."""
        return np.array([y.mean() for y in self.differences])

    @cached_property
    def variance(self) -> Array:
        """V_ℓ, of the differences."""
        return np.array([y.var(ddof=1) for y in self.differences])

    @cached_property
    def kurtosis(self) -> Array:
        """E(Y - EY)⁴/Var²; 0 where nothing varies."""
        fourth = np.array([np.mean((y - y.mean()) ** 4) for y in self.differences])
        square = np.square([y.var() for y in self.differences])
        return np.asarray(np.divide(fourth, square, out=np.zeros_like(fourth), where=square > 0))

    @cached_property
    def consistency(self) -> Array:
        """(mean P_{ℓ-1} - mean P̂_{ℓ-1}) in standard errors: independent samples of one expectation."""
        found = np.zeros(len(self.levels))
        for k, (lower, upper) in enumerate(zip(self.levels, self.levels[1:], strict=False), 1):
            a, b = lower.values[:, 0], upper.values[:, 1]
            spread = math.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
            found[k] = (a.mean() - b.mean()) / spread if spread > 0 else 0.0
        return found

    @cached_property
    def alpha(self) -> Line:
        """Slope of |E[P_ℓ - P̂_{ℓ-1}]| ~ 2^{-αℓ} over the levels ℓ ≥ 1 there are, weighed with their errors."""
        size = np.abs(self.mean[1:])
        return self._rate(size, np.sqrt(self.steady_variance[1:] / self.n_samples[1:]) / np.maximum(size, 1e-300), 1.0)

    @cached_property
    def beta(self) -> Line:
        """Slope of Var[P_ℓ - P̂_{ℓ-1}] ~ 2^{-βℓ} over the levels ℓ ≥ 1 there are, weighed with their errors.

        With ν = M - 1, kurtosis κ and c = (κ - 3)/M, log V̂ has about the expectation log V + ψ(ν/2) - log(ν/2) - c/2
        and the variance ψ'(ν/2) + c. Few samples cannot show a large kurtosis: κ is at least its mean over all of them.
        """
        n = self.n_samples[1:]
        half = (n - 1) / 2
        kurtosis = np.maximum(self.kurtosis[1:], n @ self.kurtosis[1:] / n.sum())
        excess = np.maximum(kurtosis - 3, 0) / n
        size = self.variance[1:] * np.exp(np.log(half) - digamma(half) + excess / 2)
        return self._rate(size, np.sqrt(polygamma(1, half) + excess), 2.0)

    @cached_property
    def gamma(self) -> Line:
        """Of the cost of a difference ~ 2^{γℓ}."""
        fit = line(np.arange(1, len(self.levels)), np.log2(self.unit_cost[1:]), np.ones(len(self.levels) - 1))
        return Line(fit.slope, fit.intercept, 0.0, 0.0)

    @staticmethod
    def _rate(size: Array, relative_errors: Array, default: float) -> Line:
        """-slope of log₂(size) over the levels 1, 2, ..., with the standard error that the sizes' own imply."""
        known = size > 0
        if known.sum() < 2:
            return Line(default, 0.0, math.inf, math.inf)
        level = np.arange(1, len(size) + 1)[known]
        errors = np.maximum(relative_errors[known], 1e-6) / math.log(2)
        fit = line(level, -np.log2(size[known]), errors)
        return Line(fit.slope, fit.intercept, fit.residual_stderr, fit.stderr)

    @cached_property
    def steady_variance(self) -> Array:
        """V_ℓ pooled with what the level before lets expect: (ν V̂_ℓ + ν₀ V_{ℓ-1}/2^β)/(ν + ν₀), ν = M - 1, ν₀ = PRIOR.

        From level 2 on. Few samples make it neither too small nor too large by chance; many speak for themselves.
        """
        rate = _factor(self.beta, BETA)
        found = self.variance.copy()
        for k in range(2, len(found)):
            known = self.n_samples[k] - 1
            found[k] = (known * found[k] + PRIOR * found[k - 1] / rate) / (known + PRIOR)
        return np.asarray(found)

    @property
    def stderr(self) -> float:
        """Of the estimate."""
        return float(np.sqrt(np.sum(self.steady_variance / self.n_samples)))

    @cached_property
    def bias(self) -> float:
        """|E P_L - Ψ(m_T)|, from the last three differences."""
        rate = _factor(self.alpha, ALPHA)
        size = np.abs(self.mean)
        for k in range(2, len(size)):
            size[k] = max(size[k], 0.5 * size[k - 1] / rate)
        last = size[1:][-3:]
        return float(np.max(last / rate ** np.arange(len(last) - 1.0, -1.0, -1.0)) / (rate - 1))

    @property
    def cost(self) -> float:
        """Of all samples."""
        return float(self.n_samples @ self.unit_cost)

    def wanted(self, tolerance: float, share: float) -> Array:
        """Samples of each level with stderr² ≤ share·tolerance² at the least cost (Giles 2008, eq. (12))."""
        v, c = self.steady_variance, self.unit_cost
        found: Array = np.ceil(np.sqrt(v / c) * np.sqrt(v * c).sum() / (share * tolerance**2)).astype(np.int64)
        return found

    def next_wanted(self, tolerance: float, share: float) -> int:
        """Samples of the level after the last, whose variance is extrapolated."""
        v = np.append(self.steady_variance, self.steady_variance[-1] / _factor(self.beta, BETA))
        c = np.append(self.unit_cost, self.problem.unit_cost(len(self.levels)))
        return math.ceil(math.sqrt(v[-1] / c[-1]) * float(np.sqrt(v * c).sum()) / (share * tolerance**2))

    @property
    def fine_variance(self) -> Array:
        """Var P_ℓ."""
        return np.array([level.values[:, 0].var(ddof=1) for level in self.levels])

    def plain_cost(self, stderr: float) -> float:
        """Of systems of the finest level alone; their variance is read off a power law over all levels."""
        last, fine = len(self.levels) - 1, self.fine_variance
        known = fine > 0
        if known.sum() < 2:
            return self.problem.system_cost(last)
        # The coarsest levels have the most samples, and the largest deviations from the power law.
        errors = np.sqrt(2 / self.n_samples[known] + 0.01)
        fit = line(np.arange(last + 1)[known], np.log(fine[known]), errors)
        return math.exp(fit.intercept + fit.slope * last) / stderr**2 * self.problem.system_cost(last)

    def dataset(self, goal: Goal) -> xr.Dataset:
        """The result, labelled."""
        numbers: dict[str, tuple[float, str]] = {
            "estimate": (float(self.mean.sum()), "estimate of the functional of the law"),
            "stderr": (self.stderr, "standard error"),
            "bias": (self.bias, "estimated size of the bias"),
            "error": (math.hypot(self.stderr, self.bias), "root mean square error, estimated"),
            "cost": (self.cost, "cost in particle-steps" if self.problem.work == 1 else "cost in pairs and steps"),
            "plain_cost": (self.plain_cost(math.sqrt(goal.share) * goal.tolerance), "cost of plain Monte Carlo"),
        }
        for name, fit, what in (
            ("alpha", self.alpha, "rate of the mean differences over the levels used"),
            ("beta", self.beta, "rate of the variances over the levels used"),
            ("gamma", self.gamma, "rate of the costs"),
        ):
            numbers |= {name: (fit.slope, what), f"{name}_stderr": (fit.stderr, f"sampling error of the {what}")}
        n = range(len(self.levels))
        columns: dict[str, tuple[Array, str]] = {
            "dt": (np.array([label(self.problem.dt(k)) for k in n]), "step"),
            "n_particles": (np.array([self.problem.n_particles(k) for k in n]), "number of particles"),
            "n_samples": (self.n_samples, "number of samples"),
            "mean": (self.mean, "mean difference"),
            "variance": (self.variance, "variance of the differences"),
            "kurtosis": (self.kurtosis, "kurtosis of the differences"),
            "fine_mean": (np.array([level.values[:, 0].mean() for level in self.levels]), "mean of the fine systems"),
            "fine_variance": (self.fine_variance, "variance of the fine systems"),
            "consistency": (self.consistency, "gap between the two means of a level, in standard errors"),
            "unit_cost": (self.unit_cost, "cost of a sample"),
            "seconds": (np.array([level.seconds for level in self.levels]), "time spent"),
        }
        variables = {name: number(*value) for name, value in numbers.items()} | {
            name: xr.Variable("level", values, {"long_name": what, "units": "s" if name == "seconds" else "1"})
            for name, (values, what) in columns.items()
        }
        coords = {k: v for k, v in numeric_fields(self.problem.equation.scenario).items() if k not in variables}
        levels = xr.Variable("level", np.arange(len(self.levels)), {"long_name": "level", "units": "1"})
        attributes = self.problem.attributes({"tolerance": goal.tolerance, "variance_share": goal.share})
        return xr.Dataset(variables, {"level": levels, **coords}, attributes)


def _factor(rate: Line, between: tuple[float, float]) -> float:
    """2^rate, what one level divides by, the rate held between two numbers."""
    return math.pow(2.0, min(max(rate.slope, between[0]), between[1]))


def number(value: float, long_name: str) -> xr.Variable:
    """A number of a dataset, labelled."""
    return xr.Variable((), value, {"long_name": long_name, "units": "1"})
