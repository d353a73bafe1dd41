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
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from .halves import PLAIN_SLOT, Functional, Problem, Samples
from .levels import Goal, Table, line, number

MOST_LEVELS = 24
# The fewest differences of which rates can be read.
PILOT_LEVEL = 2
# Of a new level; its variance is pooled with what the level before lets expect.
FEWEST = 5
# A variance over fewer samples says little.
FEWEST_FIRST = 10
# Tolerances of the continuation fall by this factor.
FALL = 2.0


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
        rates `alpha`, `beta`, `gamma`, slopes over the levels used, which tend to their limits as levels refine, with
        the sampling errors `alpha_stderr`, ... of these slopes, and over `level`: `dt`, `n_particles`, `n_samples`,
        `mean`, `variance` and `kurtosis` of the differences (of P_0 on level 0), `fine_mean`, `fine_variance` of P_ℓ,
        `consistency` = (mean of P_{ℓ-1} - mean of P̂_{ℓ-1}) in standard errors, `unit_cost` of a sample, `seconds`
        spent. `plain_cost` is that of systems of the finest level alone, for the same share of the tolerance.

    Raises:
        TypeError: a functional that returns no tensor, a scenario without a law to start from.
        ValueError: bad settings; a scenario with births and deaths or with sampled data, whose levels do not couple.
        ToleranceNotReached: levels or budget are exhausted; the achieved error is in the message and in its `result`.
        FloatingPointError: a system blew up.

    """
    problem = Problem.checked(scenario, functional, horizon, dt, n_particles, seed, interaction, device, dtype)
    _check_goal(tolerance, max_level, max_cost, first_samples, variance_share)
    goal = Goal(tolerance, variance_share, max_level, max_cost)
    levels = [problem.samples(level, 0, first_samples) for level in range(PILOT_LEVEL + 1)]
    for target in _targets(Table(problem, levels), tolerance):
        levels = _reach(problem, levels, target, goal)
    return Table(problem, levels).dataset(goal)


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
    problem = Problem.checked(scenario, functional, horizon, dt, n_particles, seed, interaction, device, dtype)
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
    return xr.Dataset({name: number(*value) for name, value in numbers.items()}, attrs=problem.attributes({}))


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
        fit = line(np.log(wanted), np.log(table[f"{name}cost"].values), np.ones(len(wanted)))
        table[f"{name}slope"] = number(fit.slope, f"exponent of the tolerance in the {name.rstrip('_')} cost".strip())
        table[f"{name}slope_stderr"] = number(fit.residual_stderr, "standard error of the exponent")
    return table.assign_attrs(rows[0].attrs)


# The algorithm --------------------------------------------------------------------------------------------------------


def _targets(table: Table, tolerance: float) -> list[float]:
    """Tolerances that fall from the error of the first samples to the one asked for."""
    error = math.hypot(table.stderr, table.bias)
    n = max(0, math.floor(math.log(error / tolerance, FALL))) if error > 0 else 0
    return [tolerance * FALL**k for k in range(n, -1, -1)]


def _reach(problem: Problem, levels: list[Samples], target: float, goal: Goal) -> list[Samples]:
    """More samples, and more levels, until both parts of the error are below their share of the target."""
    while True:
        table = Table(problem, levels)
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


def _check_budget(table: Table, more: float, goal: Goal) -> None:
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


# The door -------------------------------------------------------------------------------------------------------------


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
