"""Multilevel Monte Carlo over the step and the number of particles: a functional of the law to a given tolerance.

Sought is Ψ(m_T) for the law m_T of a McKean-Vlasov equation at the horizon T. Level ℓ has the step h_ℓ = h₀ 2^{-ℓ} and
N_ℓ = N₀ 2^ℓ particles; P_ℓ = Ψ(m^{N_ℓ}_T) is one sample of it, one system. The telescoping sum

    E P_L = E P_0 + Σ_{ℓ=1}^{L} E[P_ℓ - P̂_{ℓ-1}]

is estimated level by level with independent samples. P̂_{ℓ-1} is the average of Ψ over the two systems of N_ℓ/2
particles with step 2h_ℓ that are made of the first and of the second half of the particles of the fine system: the
same initial points, the same Brownian paths, each half with its own empirical law. Each half has the law of a system
of level ℓ-1, so that the sum telescopes; what is linear in the empirical law cancels in the difference, so that for
smooth Ψ and coefficients

    E[P_ℓ - P̂_{ℓ-1}] = O(h + 1/N),      Var[P_ℓ - P̂_{ℓ-1}] = O(h/N + 1/N²),      Var P_ℓ = O(1/N)

(h²/N in place of h/N for additive noise). Hence α = 1 and β = 2. Where the law enters through averages a sample costs
N/h, γ = 2, and the tolerance ε costs O(ε^{-2} (log ε)²); plain Monte Carlo needs N, 1/h ~ 1/ε, Var/ε² ~ 1/ε samples
and costs ε^{-3}. With pairwise interactions a sample costs N²/h, γ = 3, and the costs are ε^{-3} and ε^{-4}.

Sources: Giles, Multilevel Monte Carlo path simulation, Oper. Res. 56 (2008), Theorem 3.1 (complexity) and section 5
(the algorithm); Haji-Ali, Tempone, Multilevel and multi-index Monte Carlo methods for the McKean-Vlasov equation,
Stat. Comput. 28 (2018), section 3 (the coupling by halves); Collier, Haji-Ali, Nobile, von Schwerin, Tempone, A
continuation multilevel Monte Carlo algorithm, BIT 55 (2015).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from . import provenance
from .clock import Clock
from .euler import euler
from .measure import EmpiricalMeasure, Law
from .model import Equation, numeric_fields, on_device, scenario_name
from .noise import Noise, Stream
from .settings import Settings, label

Array = np.ndarray
Functional = Callable[[float, Tensor, EmpiricalMeasure], Tensor]

# Keyed replicas of a level: level ℓ has those from ℓ·SAMPLES on, plain Monte Carlo those of the last slot.
SAMPLES = 2**27
PLAIN_SLOT = 30
MOST_LEVELS = 24
# The fewest differences of which rates can be read.
PILOT_LEVEL = 2
# Of a new level; its variance is held against that of the level before.
FEWEST = 5
# A variance over fewer samples says little.
FEWEST_FIRST = 10
# Particles are stepped in batches of this many numbers: in the processor's cache, or enough for a GPU.
BATCH, GPU_BATCH = 2**16, 2**23
# Work of a step of N particles is N^p.
WORK = {"mean": 1, "pairwise": 2}
# Tolerances of the continuation fall by this factor.
FALL = 2.0
BRIDGED = (Stream.COMMON, Stream.COMMON_AREA)


class ToleranceNotReached(RuntimeError):
    """The levels or the budget are exhausted.

    Attributes: result, the dataset that `estimate` would have returned, with the error that was achieved.
    """

    def __init__(self, reason: str, result: xr.Dataset, tolerance: float) -> None:
        self.result = result
        super().__init__(
            f"tolerance {tolerance:g} was not reached: {reason}. Achieved: {float(result.estimate):.6g} with error "
            f"{float(result.error):.2g} (standard error {float(result.stderr):.2g}, estimated bias "
            f"{float(result.bias):.2g}); it is in .result. Ask for a larger tolerance, allow a larger max_level or "
            "max_cost, or start from a smaller dt or more particles."
        )


def estimate(
    scenario: Any,
    functional: Functional,
    *,
    tolerance: float,
    horizon: float,
    dt: float,
    n_particles: int,
    seed: int,
    max_level: int = 10,
    max_cost: float = math.inf,
    first_samples: int = 50,
    variance_share: float = 0.5,
    interaction: str = "mean",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float64,
) -> xr.Dataset:
    """Ψ(m_T) with root mean square error `tolerance`: stderr² ≤ θ·tolerance², bias² ≤ (1 - θ)·tolerance².

    The numbers of samples are those of Giles (2008), M_ℓ ∝ √(V_ℓ/C_ℓ); a level is added while the bias
    max_{k≤2} 2^{-kα} |E[P_{L-k} - P̂_{L-k-1}]| / (2^α - 1) is too large, where α is measured and taken to be at least ½
    and at most 1, its value for smooth functionals. Tolerances fall by factors of 2 to the one that is asked for, so
    that the samples of finer levels are chosen from what the coarser ones have shown.

    Args:
        scenario: a scenario that starts from a law; common noise, projections and any form of σ are welcome, and
            Ψ(m_T) is then averaged over the common noise.
        functional: Ψ as (t, x, mu) -> (R,), a function of the empirical law, with t the horizon. Smooth ones have the
            rates above; for others (indicators, quantiles) they are measured and reported.
        tolerance: ε, in units of Ψ.
        horizon: T, a whole number of steps dt.
        dt: step of the coarsest level, h₀. It must be small enough for the Euler scheme to be stable.
        n_particles: number of particles of the coarsest level, N₀.
        seed: key of all randomness. Other seeds are independent; results do not depend on batches or threads, up to the
            rounding of reductions.
        max_level: the finest level L allowed.
        max_cost: the most that may be spent, in particle-steps (pairs of particles and steps for "pairwise").
        first_samples: samples of the first three levels from which the variances are first estimated.
        variance_share: θ, the share of the squared tolerance that is left to the sampling error.
        interaction: "mean": a step costs N; "pairwise": N². What the samples are weighed with, and `cost`.
        device: "cpu" or "cuda".
        dtype: torch.float32 or torch.float64. In float32 differences below 1e-7 of Ψ are rounding.

    Returns:
        Dataset with `estimate`, `stderr`, `bias` (estimated, without sign), `error` = √(stderr² + bias²), `cost`, the
        rates `alpha`, `beta`, `gamma` with `alpha_stderr`, ..., and over `level`: `dt`, `n_particles`, `n_samples`,
        `mean`, `variance` and `kurtosis` of the differences (of P_0 on level 0), `fine_mean`, `fine_variance` of P_ℓ,
        `consistency` = (mean of P_{ℓ-1} - mean of P̂_{ℓ-1}) in standard errors, `unit_cost` of a sample, `seconds`
        spent. `plain_cost` is that of systems of the finest level alone, for the same share of the tolerance.

    Raises:
        TypeError: a functional that returns no tensor, a scenario without a law to start from.
        ValueError: bad settings; a scenario with births and deaths or with sampled data, whose levels do not couple.
        ToleranceNotReached: levels or budget are exhausted; the achieved error is in the message and in its `result`.
        FloatingPointError: a system blew up.

    """
    problem = _Problem.checked(scenario, functional, horizon, dt, n_particles, seed, interaction, device, dtype)
    _check_goal(tolerance, max_level, max_cost, first_samples, variance_share)
    goal = _Goal(tolerance, variance_share, max_level, max_cost)
    levels = [problem.samples(level, 0, first_samples) for level in range(PILOT_LEVEL + 1)]
    for target in _targets(_Table(problem, levels), tolerance):
        levels = _reach(problem, levels, target, goal)
    return _Table(problem, levels).dataset(goal)


def plain(
    scenario: Any,
    functional: Functional,
    *,
    stderr: float,
    horizon: float,
    dt: float,
    n_particles: int,
    seed: int,
    first_samples: int = 50,
    interaction: str = "mean",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float64,
) -> xr.Dataset:
    """E Ψ(m^N_T) of one step and one number of particles, by independent systems, to a standard error.

    Args:
        scenario: as for `estimate`.
        functional: likewise.
        stderr: the standard error to reach.
        horizon: T.
        dt: the step.
        n_particles: N.
        seed: key; independent of `estimate` with the same one.
        first_samples: systems from which the variance is first estimated.
        interaction: as for `estimate`.
        device: likewise.
        dtype: likewise.

    Returns:
        Dataset with `estimate`, `stderr`, `variance` (of one system), `n_samples`, `cost`, `seconds`.

    Raises:
        TypeError, ValueError, FloatingPointError: as for `estimate`.

    """
    problem = _Problem.checked(scenario, functional, horizon, dt, n_particles, seed, interaction, device, dtype)
    _check_positive("stderr", stderr)
    _check_count("first_samples", first_samples, FEWEST_FIRST)
    found = problem.samples(0, 0, first_samples, PLAIN_SLOT)
    while (wanted := math.ceil(found.values[:, 0].var(ddof=1) / stderr**2)) > len(found.values):
        found = found.joined(problem.samples(0, len(found.values), wanted - len(found.values), PLAIN_SLOT))
    values = found.values[:, 0]
    n, variance = len(values), float(values.var(ddof=1))
    numbers = {
        "estimate": (float(values.mean()), "mean of the functional"),
        "stderr": (math.sqrt(variance / n), "standard error"),
        "variance": (variance, "variance of one system"),
        "n_samples": (n, "number of systems"),
        "cost": (n * problem.unit_cost(0), "cost"),
        "seconds": (found.seconds, "time spent"),
    }
    return xr.Dataset({name: _number(*value) for name, value in numbers.items()}, attrs=problem.attributes({}))


def cost_table(
    scenario: Any,
    functional: Functional,
    *,
    tolerances: Sequence[float],
    seed: int,
    run_plain: bool = False,
    **settings: Any,
) -> xr.Dataset:
    """What several tolerances cost, multilevel and plain, with the fitted powers of the tolerance.

    Plain Monte Carlo is given the finest step and number of particles that the multilevel estimate needed, hence its
    bias, and as many systems as its standard error asks for: both have the same error.

    Args:
        scenario: as for `estimate`.
        functional: likewise.
        tolerances: at least three, in any order.
        seed: the k-th largest tolerance has the key seed + k: their errors are independent.
        run_plain: run plain Monte Carlo too; else its cost comes from the variances that were measured on the way.
        settings: the other settings of `estimate`.

    Returns:
        Dataset over `tolerance` (falling): `estimate`, `stderr`, `bias`, `error`, `n_levels`, `cost`, `seconds`,
        `plain_cost`, and with run_plain `plain_estimate`, `plain_stderr`, `plain_seconds`; the exponents p of
        cost ∝ ε^p as `slope`, `plain_slope` with `slope_stderr`, `plain_slope_stderr` (least squares in log-log).

    Raises:
        ValueError: fewer than three distinct tolerances; otherwise as for `estimate`.

    """
    wanted = sorted({float(tolerance) for tolerance in tolerances}, reverse=True)
    if len(wanted) < 3:
        raise ValueError(f"tolerances = {list(tolerances)}: a slope needs at least three distinct ones.")
    rows = []
    for k, tolerance in enumerate(wanted):
        found = estimate(scenario, functional, tolerance=tolerance, seed=seed + k, **settings)
        row = found[["estimate", "stderr", "bias", "error", "cost"]].assign(
            n_levels=found.sizes["level"], seconds=found["seconds"].sum(), plain_cost=found["plain_cost"]
        )
        rows.append(_with_plain(row, found, scenario, functional, seed + k, settings) if run_plain else row)
    axis = xr.Variable("tolerance", wanted, {"long_name": "tolerance", "units": "1"})
    table = xr.concat(rows, axis, combine_attrs="drop")
    for name in ("", "plain_"):
        fit = _line(np.log(wanted), np.log(table[f"{name}cost"].values), np.ones(len(wanted)))
        table[f"{name}slope"] = _number(fit.slope, f"exponent of the tolerance in the {name.rstrip('_')} cost".strip())
        table[f"{name}slope_stderr"] = _number(fit.residual_stderr, "standard error of the exponent")
    return table.assign_attrs(rows[0].attrs)


# Levels ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DividedNoise(Noise):
    """The noise of one system, given to `parts` smaller ones that have its particles between them.

    System r·parts + j of a shape (R·parts, n, m) has the noise of the particles jn, ..., (j + 1)n - 1 of the ordinary
    replica `first` + r, and what is common to that replica.
    """

    parts: int = 1
    first: int = 0

    def euler_(
        self,
        x: Tensor,
        drift: Tensor,
        h: float,
        diffusion: float | Tensor,
        step: int,
        *,
        stream: Stream = Stream.IDIOSYNCRATIC,
    ) -> None:
        """X += h·drift + √h·diffusion·ΔW, with the roundings of `Noise.euler_`."""
        k = self.substeps
        z = self._sum(step * k, k, (x.shape[0], x.shape[1], x.shape[2]), stream, 0, 0, x.dtype, x.device, None, 1.0)
        x.add_((h * drift).add_(z.mul_(math.sqrt(h / k) * diffusion)))

    def _sum(
        self,
        fine: int,
        k: int,
        window: tuple[int, int, int],
        stream: Stream,
        first_replica: int,
        first_particle: int,
        dtype: torch.dtype,
        device: torch.device | str,
        out: Tensor | None,
        scale: float | None = None,
    ) -> Tensor:
        systems, n, m = window
        shared = stream in BRIDGED
        whole = (systems // self.parts, n if shared else n * self.parts, m)
        z = super()._sum(fine, k, whole, stream, self.first, 0, dtype, device, None, scale)
        z = z.repeat_interleave(self.parts, 0) if shared else z.view(window)
        return z if out is None else out.copy_(z)


@dataclass(frozen=True)
class _Samples:
    """Samples of one level: values (M, 2) of P_ℓ and P̂_{ℓ-1} (0 on level 0), and the seconds that they took."""

    values: Array
    seconds: float

    def joined(self, more: _Samples) -> _Samples:
        return _Samples(np.concatenate([self.values, more.values]), self.seconds + more.seconds)


@dataclass(frozen=True)
class _Problem:
    """A checked scenario and functional, with the settings of the coarsest level."""

    equation: Equation
    law: Law
    functional: Functional
    settings: Settings
    work: int

    @classmethod
    def checked(
        cls, scenario: Any, functional: Functional, horizon: Any, dt: Any, n_particles: Any, seed: Any,
        interaction: str, device: Any, dtype: Any,
    ) -> _Problem:  # fmt: skip
        if interaction not in WORK:
            raise ValueError(f"interaction = {interaction!r}; expected one of {', '.join(map(repr, WORK))}.")
        settings = Settings.checked(
            n_particles=n_particles, horizon=horizon, dt=dt, seed=seed, n_replicas=1, save_every=None,
            keep_particles=None, method="euler", device=device, dtype=dtype, noise=None, checkpoint_every=None,
        )  # fmt: skip
        _check_scenario(scenario)
        moved = on_device(scenario, torch.device(settings.device), settings.torch_dtype)
        law = moved.initial() if hasattr(moved, "initial") else None
        if not isinstance(law, Law):
            raise TypeError(
                f"{scenario_name(scenario)}.initial() returned a {type(law).__name__}; levels have different numbers "
                "of particles, so they need a law to start from (mfsde.Gaussian([0.0], [[1.0]]), ...)."
            )
        # A number of replicas that differs from that of particles: a functional that mixes them up is found out.
        n_replicas = 3 if settings.n_particles != 3 else 4
        x = _start(law, DividedNoise(settings.seed), (n_replicas, settings.n_particles), settings)
        problem = cls(Equation(moved, x), law, functional, settings, WORK[interaction])
        problem.evaluate(x)
        return problem

    def n_steps(self, level: int) -> int:
        return self.settings.n_steps << level

    def n_particles(self, level: int) -> int:
        return self.settings.n_particles << level

    def dt(self, level: int) -> float:
        return math.ldexp(self.settings.dt, -level)

    def system_cost(self, level: int) -> float:
        """Of one system."""
        return self.n_steps(level) * math.pow(self.n_particles(level), self.work)

    def unit_cost(self, level: int) -> float:
        """Of one difference P_ℓ - P̂_{ℓ-1}: the fine system and its two halves."""
        return self.system_cost(level) + (2 * self.system_cost(level - 1) if level else 0.0)

    def samples(self, level: int, first: int, count: int, slot: int | None = None) -> _Samples:
        """The samples first, ..., first + count - 1 of a level."""
        if first + count > SAMPLES:
            raise ValueError(
                f"level {level} needs {first + count} samples, more than its {SAMPLES} keys; take a larger tolerance "
                "or more particles on the coarsest level."
            )
        started = time.perf_counter()
        batch = BATCH if self.settings.device == "cpu" else GPU_BATCH
        size = max(1, batch // (self.n_particles(level) * self.law.dim))
        place = (level if slot is None else slot) * SAMPLES
        values = np.zeros((count, 2))
        for start in range(0, count, size):
            end = min(start + size, count)
            replicas = (place + first + start, end - start)
            values[start:end, 0] = self.ends(level, level, *replicas)[:, 0]
            if level:
                values[start:end, 1] = self.ends(level - 1, level, *replicas).mean(1)
        return _Samples(values, time.perf_counter() - started)

    def ends(self, level: int, path: int, first: int, count: int) -> Array:
        """Ψ at the horizon of the systems of a level, on the paths of the systems of a level `path` ≥ `level`.

        (count, 2^{path - level}): a system of the level `path` has the particles of that many systems of this one.
        """
        parts = 2 ** (path - level)
        noise = DividedNoise(self.settings.seed, substeps=parts, parts=parts, first=first)
        clock = Clock(self.dt(level))
        with torch.no_grad():
            x = _start(self.law, noise, (count * parts, self.n_particles(level)), self.settings)
            for step in range(self.n_steps(level)):
                euler(self.equation, clock, noise, step, x)
                if self.equation.has_projection:
                    x = self.equation.project(clock.time(step + 1), x).contiguous()
            values = self.evaluate(x).double()
        if not bool(torch.isfinite(values).all()):
            raise FloatingPointError(
                f"{self.equation.name} blew up on level {level} (dt = {clock.dt:g}, {self.n_particles(level)} "
                "particles), or the functional is not finite there. Take a smaller dt for the coarsest level, or a "
                "drift that grows at most linearly."
            )
        found: Array = values.cpu().numpy().reshape(count, parts)
        return found

    def evaluate(self, x: Tensor) -> Tensor:
        """Ψ of the empirical laws of a state, checked.    (R, N, d) -> (R,)."""
        value = self.functional(self.settings.horizon, x, self.equation.measure(x))
        if not isinstance(value, Tensor):
            raise TypeError(
                f"the functional returned a {type(value).__name__}; expected a tensor of shape (R,), for instance "
                "mu.integrate(lambda x: x[..., 0].square())."
            )
        if value.shape != x.shape[:1]:
            raise ValueError(
                f"the functional returned shape {tuple(value.shape)} for {x.shape[0]} systems of {x.shape[1]} "
                f"particles in dimension {x.shape[2]}; expected ({x.shape[0]},), one number for each system."
            )
        return value.detach()

    def attributes(self, more: dict[str, Any]) -> dict[str, Any]:
        """Provenance."""
        described = provenance.describe(self.equation.scenario)
        told = {**self.settings.as_dict(), "work": self.work, **more}
        return {
            **described,
            "settings": told,
            "functional": provenance.encode(self.functional),
            "noise": self.settings.noise.identity(),
            "versions": provenance.versions(),
        }


def _start(law: Law, noise: Noise, shape: tuple[int, int], settings: Settings) -> Tensor:
    """Initial particles (R, N, d), as `simulate` draws them."""
    variates = (*shape, law.n_variates)
    options: dict[str, Any] = {"dtype": settings.torch_dtype, "device": torch.device(settings.device)}
    z = torch.empty(variates, **options)
    if law.n_variates:
        z = noise.normals(0, variates, stream=Stream.INITIAL, **options)
    return law.from_variates(z).contiguous()


# What the samples say -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    """A weighted least-squares line: its slope, and the standard error from the residuals or from given ones."""

    slope: float
    intercept: float
    residual_stderr: float
    stderr: float


def _line(x: Array, y: Array, errors: Array) -> _Line:
    w = 1 / np.square(errors)
    centre, level = (w @ x) / w.sum(), (w @ y) / w.sum()
    spread = w @ np.square(x - centre)
    slope = float(w @ ((x - centre) * (y - level)) / spread)
    misfit = float(w @ np.square(y - level - slope * (x - centre))) / max(1, len(x) - 2)
    given = 1 / math.sqrt(spread)
    # Two points leave no residual.
    residual = given * math.sqrt(misfit) if len(x) > 2 else math.nan
    return _Line(slope, float(level - slope * centre), residual, given * max(1.0, math.sqrt(misfit)))


@dataclass(frozen=True)
class _Goal:
    tolerance: float
    share: float
    max_level: int
    max_cost: float


@dataclass(frozen=True)
class _Table:
    """Statistics of the samples, level by level, and what follows from them."""

    problem: _Problem
    levels: list[_Samples]

    @cached_property
    def n_samples(self) -> Array:
        return np.array([len(level.values) for level in self.levels])

    @cached_property
    def unit_cost(self) -> Array:
        return np.array([self.problem.unit_cost(level) for level in range(len(self.levels))])

    @cached_property
    def differences(self) -> list[Array]:
        return [level.values[:, 0] - level.values[:, 1] for level in self.levels]

    @cached_property
    def mean(self) -> Array:
        return np.array([y.mean() for y in self.differences])

    @cached_property
    def variance(self) -> Array:
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
    def alpha(self) -> _Line:
        """Of |E[P_ℓ - P̂_{ℓ-1}]| ~ 2^{-αℓ}."""
        size = np.abs(self.mean[1:])
        return self._rate(size, np.sqrt(self.variance[1:] / self.n_samples[1:]) / np.maximum(size, 1e-300), 1.0)

    @cached_property
    def beta(self) -> _Line:
        """Of Var[P_ℓ - P̂_{ℓ-1}] ~ 2^{-βℓ}."""
        n = self.n_samples[1:]
        return self._rate(self.variance[1:], np.sqrt(np.maximum(self.kurtosis[1:] - 1, 2) / n), 2.0)

    @cached_property
    def gamma(self) -> _Line:
        """Of the cost of a difference ~ 2^{γℓ}."""
        fit = _line(np.arange(1, len(self.levels)), np.log2(self.unit_cost[1:]), np.ones(len(self.levels) - 1))
        return _Line(fit.slope, fit.intercept, 0.0, 0.0)

    @staticmethod
    def _rate(size: Array, relative_errors: Array, default: float) -> _Line:
        """-slope of log₂(size) over the levels 1, 2, ..., with the standard error that the sizes' own imply."""
        known = size > 0
        if known.sum() < 2:
            return _Line(default, 0.0, math.inf, math.inf)
        level = np.arange(1, len(size) + 1)[known]
        errors = np.maximum(relative_errors[known], 1e-6) / math.log(2)
        fit = _line(level, -np.log2(size[known]), errors)
        return _Line(fit.slope, fit.intercept, fit.residual_stderr, fit.stderr)

    @cached_property
    def steady_variance(self) -> Array:
        """Variances that few samples cannot make too small: at least half of what the level before lets expect."""
        rate = 2.0 ** max(self.beta.slope, 0.5)
        found = self.variance.copy()
        for k in range(2, len(found)):
            found[k] = max(found[k], 0.5 * found[k - 1] / rate)
        return np.asarray(found)

    @property
    def stderr(self) -> float:
        return float(np.sqrt(np.sum(self.steady_variance / self.n_samples)))

    @cached_property
    def bias(self) -> float:
        """|E P_L - Ψ(m_T)|, from the last three differences."""
        rate = 2.0 ** min(max(self.alpha.slope, 0.5), 1.0)
        size = np.abs(self.mean)
        for k in range(2, len(size)):
            size[k] = max(size[k], 0.5 * size[k - 1] / rate)
        last = size[1:][-3:]
        return float(np.max(last / rate ** np.arange(len(last) - 1.0, -1.0, -1.0)) / (rate - 1))

    @property
    def cost(self) -> float:
        return float(self.n_samples @ self.unit_cost)

    def wanted(self, tolerance: float, share: float) -> Array:
        """Samples of each level with stderr² ≤ share·tolerance² at the least cost (Giles 2008, eq. (12))."""
        v, c = self.steady_variance, self.unit_cost
        found: Array = np.ceil(np.sqrt(v / c) * np.sqrt(v * c).sum() / (share * tolerance**2)).astype(np.int64)
        return found

    def next_wanted(self, tolerance: float, share: float) -> int:
        """Samples of the level after the last, whose variance is extrapolated."""
        v = np.append(self.steady_variance, self.steady_variance[-1] / 2.0 ** max(self.beta.slope, 0.5))
        c = np.append(self.unit_cost, self.problem.unit_cost(len(self.levels)))
        return math.ceil(math.sqrt(v[-1] / c[-1]) * float(np.sqrt(v * c).sum()) / (share * tolerance**2))

    @property
    def fine_variance(self) -> Array:
        return np.array([level.values[:, 0].var(ddof=1) for level in self.levels])

    def plain_cost(self, stderr: float) -> float:
        """Of systems of the finest level alone; their variance is read off a power law over all levels."""
        last, fine = len(self.levels) - 1, self.fine_variance
        known = fine > 0
        if known.sum() < 2:
            return self.problem.system_cost(last)
        # The coarsest levels have the most samples, and the largest deviations from the power law.
        errors = np.sqrt(2 / self.n_samples[known] + 0.01)
        fit = _line(np.arange(last + 1)[known], np.log(fine[known]), errors)
        return math.exp(fit.intercept + fit.slope * last) / stderr**2 * self.problem.system_cost(last)

    def dataset(self, goal: _Goal) -> xr.Dataset:
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
            ("alpha", self.alpha, "rate of the mean differences"),
            ("beta", self.beta, "rate of the variances"),
            ("gamma", self.gamma, "rate of the costs"),
        ):
            numbers |= {name: (fit.slope, what), f"{name}_stderr": (fit.stderr, f"standard error of the {what}")}
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
        variables = {name: _number(*value) for name, value in numbers.items()} | {
            name: xr.Variable("level", values, {"long_name": what, "units": "s" if name == "seconds" else "1"})
            for name, (values, what) in columns.items()
        }
        coords = {k: v for k, v in numeric_fields(self.problem.equation.scenario).items() if k not in variables}
        levels = xr.Variable("level", np.arange(len(self.levels)), {"long_name": "level", "units": "1"})
        attributes = self.problem.attributes({"tolerance": goal.tolerance, "variance_share": goal.share})
        return xr.Dataset(variables, {"level": levels, **coords}, attributes)


# The algorithm --------------------------------------------------------------------------------------------------------


def _targets(table: _Table, tolerance: float) -> list[float]:
    """Tolerances that fall from the error of the first samples to the one asked for."""
    error = math.hypot(table.stderr, table.bias)
    n = max(0, math.floor(math.log(error / tolerance, FALL))) if error > 0 else 0
    return [tolerance * FALL**k for k in range(n, -1, -1)]


def _reach(problem: _Problem, levels: list[_Samples], target: float, goal: _Goal) -> list[_Samples]:
    """More samples, and more levels, until both parts of the error are below their share of the target."""
    while True:
        table = _Table(problem, levels)
        missing = np.maximum(table.wanted(target, goal.share) - table.n_samples, 0)
        if missing.any():
            _check_budget(table, float(missing @ table.unit_cost), goal)
            levels = [
                level.joined(problem.samples(k, len(level.values), int(more))) if more else level
                for k, (level, more) in enumerate(zip(levels, missing, strict=True))
            ]
            continue
        if table.bias <= math.sqrt(1 - goal.share) * target:
            return levels
        if len(levels) > goal.max_level:
            reason = f"the bias needs a level after max_level = {goal.max_level}"
            raise ToleranceNotReached(reason, table.dataset(goal), goal.tolerance)
        count = max(FEWEST, table.next_wanted(target, goal.share))
        _check_budget(table, count * problem.unit_cost(len(levels)), goal)
        levels = [*levels, problem.samples(len(levels), 0, count)]


def _check_budget(table: _Table, more: float, goal: _Goal) -> None:
    if table.cost + more > goal.max_cost:
        reason = f"{table.cost:.3g} was spent, {more:.3g} more is needed next, and max_cost is {goal.max_cost:.3g}"
        raise ToleranceNotReached(reason, table.dataset(goal), goal.tolerance)


def _with_plain(
    row: xr.Dataset, found: xr.Dataset, scenario: Any, functional: Functional, seed: int, settings: dict[str, Any]
) -> xr.Dataset:
    """A row of the cost table, plain Monte Carlo run with the finest step and number of particles."""
    told = found.attrs["settings"]
    last = found.isel(level=-1)
    shared = {name: settings[name] for name in ("horizon", "interaction", "device", "dtype") if name in settings}
    ran = plain(
        scenario, functional, stderr=math.sqrt(told["variance_share"]) * told["tolerance"], dt=float(last["dt"]),
        n_particles=int(last["n_particles"]), seed=seed, **shared,
    )  # fmt: skip
    return row.assign(
        plain_estimate=ran["estimate"], plain_stderr=ran["stderr"], plain_cost=ran["cost"], plain_seconds=ran["seconds"]
    )


def _number(value: float, long_name: str) -> xr.Variable:
    return xr.Variable((), value, {"long_name": long_name, "units": "1"})


# The door -------------------------------------------------------------------------------------------------------------


def _check_scenario(scenario: Any) -> None:
    name = scenario_name(scenario)
    if hasattr(scenario, "birth_death_rate"):
        raise ValueError(
            f"{name} has births and deaths: which particle is born from which differs between a system and its halves, "
            "so that levels do not couple. Use mfsde.simulate with replicas."
        )
    if hasattr(scenario, "sampled_drift"):
        raise ValueError(
            f"{name} samples its data anew in every step, and the noise of the samples is of the order of the step: "
            "it has no path that a coarser level could share. Use mfsde.simulate with replicas, or a scenario with the "
            "drift of all data."
        )


def _check_goal(tolerance: Any, max_level: Any, max_cost: Any, first_samples: Any, share: Any) -> None:
    _check_positive("tolerance", tolerance)
    _check_count("max_level", max_level, PILOT_LEVEL)
    if max_level > MOST_LEVELS:
        raise ValueError(f"max_level = {max_level}; expected at most {MOST_LEVELS}.")
    _check_count("first_samples", first_samples, FEWEST_FIRST)
    if isinstance(max_cost, (bool, str)) or not float(max_cost) > 0:
        raise ValueError(f"max_cost = {max_cost!r}; expected a positive number of particle-steps, or math.inf.")
    if isinstance(share, (bool, str)) or not 0 < float(share) < 1:
        raise ValueError(f"variance_share = {share!r}; expected a number strictly between 0 and 1.")


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, (bool, str)) or not (math.isfinite(float(value)) and float(value) > 0):
        raise ValueError(f"{name} = {value!r}; expected a positive, finite number in units of the functional.")


def _check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} = {value!r}; expected a whole number >= {least}.")
    if value < least:
        raise ValueError(f"{name} = {value}; expected a whole number >= {least}.")
