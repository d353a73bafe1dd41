"""Multilevel Monte Carlo: couplings to the bit, rates and errors against laws that are known."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import mfsde
from mfsde import halves, levels
from mfsde.halves import Problem, Samples
from mfsde.levels import Table
from mfsde.multilevel import ToleranceNotReached, cost_table, estimate, plain
from mfsde.noise import Noise
from mfsde.scenarios import DoubleWell, MeanFieldOU
from mfsde.scenarios.mean_field_gbm import MeanFieldGBM

OU = MeanFieldOU(kappa=1.0, coupling=0.5, sigma=0.7)
COARSE: dict[str, Any] = {"horizon": 1.0, "dt": 0.125, "n_particles": 16}


def second_moment(t: float, x: Tensor, mu: mfsde.EmpiricalMeasure) -> Tensor:
    """∫ |x|² dm."""
    return mu.integrate(lambda y: y.square().sum(-1))


def curved(t: float, x: Tensor, mu: mfsde.EmpiricalMeasure) -> Tensor:
    """Sin 2m + ∫ x² dm, m the mean: not linear in the law."""
    return torch.sin(2 * mu.mean()[..., 0, 0]) + second_moment(t, x, mu)


def curved_truth(scenario: MeanFieldOU, t: float) -> float:
    law = scenario.limit(t)
    m, v = float(law.mean[0]), float(law.cov[0, 0])
    return math.sin(2 * m) + v + m * m


def problem(scenario: Any = OU, functional: Any = curved, **settings: Any) -> Problem:
    chosen = {**COARSE, "seed": 7, "interaction": "mean", "device": "cpu", "dtype": torch.float64, **settings}
    return Problem.checked(scenario, functional, **chosen)


# Equations ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matrix:
    """dX = (m - 2X) dt + (1 + ½ tanh m₁) S dW + ½ dW⁰ on the plane: a matrix that depends on the law, common noise."""

    def drift(self, t, x, mu):
        return mu.mean() - 2 * x

    def diffusion(self, t, x, mu):
        s = x.new_tensor([[0.5, 0.2, 0.0], [0.0, 0.3, 0.4]])
        return (1 + 0.5 * torch.tanh(mu.mean()[..., :1, None])) * s

    def common_diffusion(self, t, x, mu):
        return 0.5

    def initial(self):
        return mfsde.Gaussian([1.0, 0.0], 0.5)


@dataclass(frozen=True)
class Reflected:
    """A Brownian motion that is attracted to its mean and reflected at 0."""

    def drift(self, t, x, mu):
        return mu.mean() - x

    def diffusion(self, t, x, mu):
        return 0.6

    def project(self, x):
        return x.abs()

    def initial(self):
        return mfsde.Uniform([0.1], [1.0])


@dataclass(frozen=True)
class Born(MeanFieldOU):
    def birth_death_rate(self, t, x, mu):
        return x[..., 0]


@dataclass(frozen=True)
class Sampled(MeanFieldOU):
    def sampled_drift(self, t, x, mu, sample):
        return -x


@dataclass(frozen=True)
class Explosive(MeanFieldOU):
    def drift(self, t, x, mu):
        return -30 * x**3


@dataclass(frozen=True)
class FromPoints(MeanFieldOU):
    def initial(self):
        return mfsde.EmpiricalMeasure(torch.zeros(16, 1))


# Coupling -------------------------------------------------------------------------------------------------------------


def simulated(scenario: Any, n_particles: int, dt: float, substeps: int, replicas: int, dtype: torch.dtype) -> Tensor:
    """The functional of a run's last state."""
    run = mfsde.simulate(
        scenario, n_particles=n_particles, horizon=1.0, dt=dt, seed=7, n_replicas=replicas, dtype=dtype,
        noise=Noise(7, substeps=substeps),
    )  # fmt: skip
    x = torch.from_numpy(run["position"].values[-1])
    return curved(1.0, x, mfsde.EmpiricalMeasure(x)).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scenario", [OU, MeanFieldGBM(), Matrix(), Reflected()])
def test_systems_are_those_of_simulate(scenario: Any, dtype: torch.dtype) -> None:
    # The fine system of level 2, and the first of the systems of level 0 that share its path: 16 of its 64 particles,
    # with increments made of four of its own.
    p = problem(scenario, dtype=dtype)
    fine = torch.from_numpy(p.ends(2, 2, 0, 3)[:, 0])
    coarse = torch.from_numpy(p.ends(0, 2, 0, 3))
    tolerance = {"rtol": 0, "atol": 1e-6 if dtype is torch.float32 else 1e-14}
    assert coarse.shape == (3, 4)
    torch.testing.assert_close(fine, simulated(scenario, 64, 1 / 32, 1, 3, dtype), **tolerance)
    torch.testing.assert_close(coarse[:, 0], simulated(scenario, 16, 1 / 8, 4, 3, dtype), **tolerance)
    if not isinstance(scenario, Matrix):
        # One rounding for each operation there and here: equal numbers.
        assert torch.equal(fine, simulated(scenario, 64, 1 / 32, 1, 3, dtype))
    assert not torch.isclose(coarse[:, 1], coarse[:, 0]).any()


def test_the_parts_have_the_particles_of_the_whole_between_them() -> None:
    # Without a drift particles are sums of their noise: the mean over all parts is the whole's, whatever the step.
    p = problem(replace(OU, kappa=0.0, coupling=0.0), lambda t, x, mu: mu.mean()[..., 0, 0])
    whole = p.ends(2, 2, 5, 4)[:, 0]
    for level in (0, 1):
        np.testing.assert_allclose(p.ends(level, 2, 5, 4).mean(1), whole, rtol=0, atol=1e-14)
        # Another replica has other particles.
        assert np.abs(p.ends(level, 2, 9, 4).mean(1) - whole).min() > 1e-3


def test_the_sum_telescopes_on_one_path() -> None:
    # Every level on the path of the finest: what one level adds, the next takes away, to the bit.
    p, top = problem(DoubleWell()), 3
    fine = [p.ends(level, top, 0, 5).mean(1) for level in range(top + 1)]
    total = fine[0] + sum(fine[level] - fine[level - 1] for level in range(1, top + 1))
    np.testing.assert_allclose(total, p.ends(top, top, 0, 5)[:, 0], rtol=0, atol=1e-15)
    # A level's coarse part is what the level below computes: same function, same path.
    pair = p.samples(top, 0, 5).values
    offset = top * halves.SAMPLES
    assert np.array_equal(pair[:, 0], p.ends(top, top, offset, 5)[:, 0])
    assert np.array_equal(pair[:, 1], p.ends(top - 1, top, offset, 5).mean(1))


def same_law(p: Problem, level: int, coarse: Problem) -> float:
    """Fine part of a level against the coarse part of the next one: independent samples; |z|."""
    a = p.samples(level, 0, 3000).values[:, 0]
    b = coarse.samples(level + 1, 0, 1500).values[:, 1]
    return abs(a.mean() - b.mean()) / math.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))


def test_fine_and_coarse_parts_of_a_level_have_one_law() -> None:
    p = problem(DoubleWell())
    assert same_law(p, 0, p) < 4
    assert same_law(p, 1, p) < 4
    # Coarse increments that forget one of their two fine ones.
    assert same_law(p, 0, problem(replace(DoubleWell(), sigma=0.8 / math.sqrt(2)))) > 4


def test_samples_depend_on_their_key_only(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(DoubleWell())
    whole = p.samples(1, 0, 40).values
    assert np.array_equal(p.samples(1, 13, 9).values, whole[13:22])
    assert not np.isin(p.samples(2, 0, 40).values, whole).any()
    monkeypatch.setattr(halves, "BATCH", 200)
    assert np.array_equal(p.samples(1, 0, 40).values, whole)


# Rates ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refined:
    """Of B 4^{-ℓ} + A 8^{-ℓ}: B and A in standard errors, and χ² with two degrees of freedom."""

    second: float
    third: float
    misfit: float


def refined(p: Problem, coupled: bool, count: int = 1000) -> Refined:
    """Fit to Var[P_ℓ - P̂_{ℓ-1}], ℓ = 1, ..., 4: their rate is 2 in the limit where B > 0 and nothing is left over."""
    level, found = np.arange(1, 5), []
    for k in map(int, level):
        # Keys of its own for each level.
        first = k * halves.SAMPLES
        fine = p.ends(k, k, first, count)[:, 0]
        y = fine - p.ends(k - 1, k, first if coupled else first + count, count).mean(1)
        found.append(np.array([1, math.sqrt((stats.kurtosis(y) + 2) / count)]) * 4.0**k * y.var(ddof=1))
    value, error = np.transpose(found)
    columns = np.stack([np.ones(4), 0.5**level], 1) / error[:, None]
    inverse = np.linalg.inv(columns.T @ columns)
    b = inverse @ columns.T @ (value / error)
    second, third = b / np.sqrt(np.diag(inverse))
    return Refined(second, third, float(np.square(value / error - columns @ b).sum()))


def mode(case: MeanFieldOU, rates: tuple[float, float], mean: float, h: float) -> float:
    """Var[u² - v²] at time 1 of u, with a rate and the step h, and v, with another and 2h, Gaussian on one path."""
    (a, b), mu, nu = rates, mean, mean
    uu = vv = uv = case.initial_variance
    p, q, noise = 1 - a * h, 1 - 2 * b * h, case.sigma**2 * h
    for _ in range(round(1 / (2 * h))):
        mu, nu = p * p * mu, q * nu
        uu, uv, vv = p**4 * uu + noise * (p * p + 1), p * p * q * uv + noise * (p + 1), q * q * vv + 2 * noise
    return 2 * (uu**2 + vv**2 - 2 * uv**2) + 4 * (mu**2 * uu + nu**2 * vv - 2 * mu * nu * uv)


def exact_variances(case: MeanFieldOU, last: int) -> np.ndarray:
    """Var[P_ℓ - P̂_{ℓ-1}] of ∫ x² dm, ℓ = 1, ..., last.

    N P_ℓ and N P̂_{ℓ-1} are sums of the squares of N independent orthonormal coordinates. The mean of the particles
    has the rate κ in both, the difference of the halves κ + α in the fine system and κ in its halves, all others κ + α.
    """
    free, bound = case.kappa, case.kappa + case.coupling
    found = []
    for level in range(1, last + 1):
        n, h = COARSE["n_particles"] << level, COARSE["dt"] / 2**level
        mean = case.initial_mean[0] * math.sqrt(n)
        whole = mode(case, (free, free), mean, h) + mode(case, (bound, free), 0.0, h)
        found.append((whole + (n - 2) * mode(case, (bound, bound), 0.0, h)) / n**2)
    return np.array(found)


def test_variances_are_the_exact_ones_of_the_linear_equation() -> None:
    exact = exact_variances(OU, 3)

    def agree(case: MeanFieldOU) -> bool:
        p, found = problem(case, second_moment), []
        for level in range(1, 4):
            y = np.diff(p.samples(level, 0, 2000).values, axis=1)
            found.append((y.var(ddof=1) / exact[level - 1] - 1) / math.sqrt((stats.kurtosis(y)[0] + 2) / len(y)))
        return bool(np.abs(found).max() < 4)

    assert agree(OU)
    assert not agree(replace(OU, coupling=0.7))


def test_the_exact_rate_falls_to_two_as_levels_refine() -> None:
    # A h²/N + B/N²: between 3 and 2, and 2 + O(2^{-ℓ}).
    slopes = -np.diff(np.log2(exact_variances(OU, 12)))
    assert ((slopes > 2) & (slopes < 3)).all()
    assert (np.diff(slopes) < 0).all()
    assert slopes[0] > 2.2
    assert slopes[-1] < 2.01


@pytest.mark.parametrize("scenario", [OU, DoubleWell(), MeanFieldGBM()])
def test_differences_vanish_at_the_right_order(scenario: Any) -> None:
    # h/N + 1/N², both 4^{-ℓ}, and corrections of relative order 2^{-ℓ}.
    fit = refined(problem(scenario), coupled=True)
    assert fit.second > 4
    assert fit.misfit < stats.chi2.isf(1e-4, 2)
    # Independent halves or paths differ by as much as their variances, of order 1/N, 2^{-ℓ}.
    assert refined(problem(scenario), coupled=False).misfit > 2 * stats.chi2.isf(1e-4, 2)


def test_halves_cancel_what_a_single_half_does_not() -> None:
    # One half instead of the average of two: its fluctuation, of order 1/N, stays.
    p = problem(OU)
    fine, halves = p.ends(3, 3, 0, 400)[:, 0], p.ends(2, 3, 0, 400)
    averaged, single = (fine - halves.mean(1)).var(), (fine - halves[:, 0]).var()
    assert single > 100 * averaged


def test_a_linear_functional_of_free_particles_has_no_difference_in_n() -> None:
    # Only the step is left: Var = O(h²/N) for additive noise, 2^{-3ℓ}.
    fit = refined(problem(replace(OU, coupling=0.0), second_moment), coupled=True)
    assert fit.misfit < stats.chi2.isf(1e-4, 2)
    assert abs(fit.second) < 4 < fit.third


# What few samples tell ------------------------------------------------------------------------------------------------


def drawn(counts: tuple[int, ...], sizes: list[float], seed: int = 0) -> Table:
    """A table of Gaussian differences of given variances."""
    rng = np.random.default_rng(seed)
    values = [math.sqrt(v) * rng.standard_normal((n, 1)) * [1, 0] for n, v in zip(counts, sizes, strict=True)]
    return Table(problem(), [Samples(value, 0.0) for value in values])


def test_the_error_of_a_slope_is_that_of_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    def z() -> np.ndarray:
        sizes = [1.0, *(0.01 / 4.0**k for k in range(5))]
        fits = [drawn((1000, 300, 60, 12, 5, 5), sizes, seed).beta for seed in range(400)]
        return np.array([(fit.slope - 2) / fit.stderr for fit in fits])

    found = z()
    assert abs(found.mean()) < 4 / math.sqrt(400)
    assert abs(found.std() - 1) < 0.2
    # The logarithm of a variance from few samples is too small in the mean, and makes slopes too steep.
    monkeypatch.setattr(levels, "digamma", np.log)
    assert z().mean() > 4 / math.sqrt(400)


def test_a_variance_from_few_samples_is_pooled_with_what_is_expected() -> None:
    table = drawn((1000, 300, 60, 5, 5), [1.0, 0.01, 0.0025, 1e-9, 0.1])
    rate, found = 2.0 ** min(max(table.beta.slope, 0.5), 2.0), table.steady_variance
    assert found[:2].tolist() == table.variance[:2].tolist()
    for k in (2, 3, 4):
        known = table.n_samples[k] - 1
        assert found[k] == pytest.approx((known * table.variance[k] + 5 * found[k - 1] / rate) / (known + 5))
    # Far below and far above the others: neither is believed, nor without influence.
    assert table.variance[3] < 1e-3 * found[3]
    assert found[4] < 0.6 * table.variance[4]


def test_a_slope_that_is_too_steep_starves_no_level(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of 2^{-4ℓ} the next level may show 2^{-2}.
    table = drawn((1000, 300, 300, 300), [1.0, 0.01, 0.01 / 16, 0.01 / 256])
    assert table.beta.slope > 3
    last = table.steady_variance[-1]
    v = np.append(table.steady_variance, last / 4)
    c = np.append(table.unit_cost, problem().unit_cost(4))
    expected = math.ceil(math.sqrt(v[-1] / c[-1]) * np.sqrt(v * c).sum() / 1e-6)
    assert table.next_wanted(math.sqrt(2e-6), 0.5) == expected
    monkeypatch.setattr(levels, "BETA", (0.5, 9.0))
    assert table.next_wanted(math.sqrt(2e-6), 0.5) < 0.7 * expected


# Estimates ------------------------------------------------------------------------------------------------------------


def claims_hold(errors: list[float], claimed: list[float]) -> bool:
    """Root mean square of error over claimed error at most 1, within what that many seeds can show (χ², 1e-4)."""
    square = np.square(np.array(errors) / np.array(claimed)).sum()
    return bool(square <= stats.chi2.isf(1e-4, len(errors)))


CASES = [
    (OU, curved, curved_truth(OU, 1.0), 0.01),
    (MeanFieldGBM(), second_moment, MeanFieldGBM().moments(1.0)[1], 0.02),
]


@pytest.mark.parametrize(("scenario", "functional", "truth", "tolerance"), CASES)
def test_the_error_is_what_was_claimed(scenario: Any, functional: Any, truth: float, tolerance: float) -> None:
    runs = [estimate(scenario, functional, tolerance=tolerance, seed=seed, **COARSE) for seed in range(12)]
    errors = [float(run.estimate) - truth for run in runs]
    claimed = [float(run.error) for run in runs]
    assert max(claimed) <= tolerance * 1.001
    assert claims_hold(errors, claimed)
    assert not claims_hold([e + 2 * tolerance for e in errors], claimed)
    # The bias alone is what is left after averaging over seeds.
    spread = np.std(errors, ddof=1) / math.sqrt(len(errors))
    assert abs(np.mean(errors)) < 4 * spread + 1.5 * np.mean([float(run.bias) for run in runs])
    assert all(np.abs(run.consistency).max() < 5 for run in runs)


def test_the_double_well_agrees_with_its_fokker_planck_equation() -> None:
    limit = mfsde.limit.fokker_planck(DoubleWell(), None, [1.0])
    truth = float(limit["covariance"][0, 0, 0] + limit["mean"][0, 0] ** 2)
    found = estimate(DoubleWell(), second_moment, tolerance=4e-3, seed=3, **{**COARSE, "dt": 0.0625})
    assert abs(float(found.estimate) - truth) < 4 * float(found.stderr) + 2 * float(found.bias)
    wrong = estimate(DoubleWell(theta=1.3), second_moment, tolerance=4e-3, seed=3, **{**COARSE, "dt": 0.0625})
    assert abs(float(wrong.estimate) - truth) > 4 * float(wrong.stderr) + 2 * float(wrong.bias)


def test_rates_are_reported_with_their_errors() -> None:
    found = estimate(OU, curved, tolerance=2e-3, seed=1, **COARSE)
    assert abs(float(found.alpha) - 1) < 4 * float(found.alpha_stderr) + 0.1
    # Of h²/N + 1/N² over these levels.
    assert 2 - 4 * float(found.beta_stderr) < float(found.beta) < 3 + 4 * float(found.beta_stderr)
    assert float(found.gamma) == pytest.approx(2, abs=1e-12)
    assert float(found.cost) == pytest.approx(float((found.n_samples * found.unit_cost).sum()))
    assert float(found.estimate) == pytest.approx(float(found["mean"].sum()), abs=1e-14)
    assert (np.diff(found["n_samples"]) <= 0).all()
    assert found["dt"].values.tolist() == [0.125 / 2**k for k in range(found.sizes["level"])]
    assert float(found.sigma) == 0.7
    assert found.attrs["settings"]["tolerance"] == 2e-3
    assert found["mean"].attrs["long_name"]


def test_the_same_call_gives_the_same_numbers() -> None:
    one, two = (estimate(OU, curved, tolerance=0.01, seed=5, **COARSE).drop_vars("seconds") for _ in range(2))
    assert one.identical(two)
    other = estimate(OU, curved, tolerance=0.01, seed=6, **COARSE)
    assert float(other.estimate) != float(one.estimate)


def test_pairwise_interactions_weigh_their_samples_by_pairs() -> None:
    found = estimate(OU, curved, tolerance=0.02, seed=5, interaction="pairwise", **COARSE)
    assert found["unit_cost"].values[:2].tolist() == [8 * 16**2, 16 * 32**2 + 2 * 8 * 16**2]
    assert float(found.gamma) == pytest.approx(3, abs=1e-12)


def test_common_noise_is_averaged_over() -> None:
    # E|X|² of dX = (m - 2X) dt + ... is not closed here; plain Monte Carlo on a fine level is the reference.
    settings = {**COARSE, "dt": 0.0625}
    found = estimate(Matrix(), second_moment, tolerance=0.02, seed=2, **settings)
    last = found.isel(level=-1)
    reference = plain(
        Matrix(), second_moment, stderr=0.008, seed=2, horizon=1.0, dt=float(last.dt), n_particles=int(last.n_particles)
    )
    gap = float(found.estimate) - float(reference.estimate)
    assert abs(gap) < 4 * math.hypot(float(found.stderr), float(reference.stderr))


# Cost -----------------------------------------------------------------------------------------------------------------


def test_the_answer_of_plain_monte_carlo_at_a_tenth_of_its_cost() -> None:
    settings = {**COARSE, "n_particles": 32}
    found = estimate(OU, curved, tolerance=2e-3, seed=4, **settings)
    last = found.isel(level=-1)
    reference = plain(
        OU, curved, stderr=math.sqrt(0.5) * 2e-3, seed=4, horizon=1.0, dt=float(last.dt),
        n_particles=int(last.n_particles),
    )  # fmt: skip
    gap = float(found.estimate) - float(reference.estimate)
    assert abs(gap) < 4 * math.hypot(float(found.stderr), float(reference.stderr))
    assert float(reference.cost) > 10 * float(found.cost)
    # What was predicted from the variances along the way.
    assert float(found.plain_cost) == pytest.approx(float(reference.cost), rel=0.5)


def apart(values: np.ndarray, expected: float) -> float:
    """Of a mean over independent values, in the t quantiles of 1e-3 on both sides."""
    error = values.std(ddof=1) / math.sqrt(len(values))
    return float(abs(values.mean() - expected) / (error * stats.t.isf(5e-4, len(values) - 1)))


def test_the_cost_grows_with_the_tolerance_as_derived() -> None:
    # Plain: variance 1/N, N and 1/h ~ 1/ε: ε^{-3}. Multilevel: ε^{-2} (Σ_{ℓ≤L} √(V_ℓ C_ℓ))², one level more for ε/2.
    tolerances = [0.024, 0.012, 0.006, 0.003]
    settings = {**COARSE, "n_particles": 32}
    tables = [
        cost_table(OU, curved, tolerances=tolerances, seed=10 * k, first_samples=10, **settings) for k in range(8)
    ]
    p = problem(n_particles=32)
    work = [math.sqrt(np.diff(p.samples(k, 0, 400).values).var() * p.unit_cost(k)) for k in range(5)]
    # Beyond that √(V C) is constant, as β = γ.
    last = int(np.mean([table.n_levels[-1] for table in tables])) - 1
    sums = np.cumsum(work + [work[-1]] * (last - 4))[-4:]
    logarithm = float(np.polyfit(np.log(tolerances), 2 * np.log(sums), 1)[0])
    assert -0.5 < logarithm < -0.05
    slope, steep = (np.array([float(table[name]) for table in tables]) for name in ("slope", "plain_slope"))
    assert apart(slope, -2 + logarithm) < 1 < apart(slope, -3)
    assert apart(steep, -3) < 1 < apart(steep, -2 + logarithm)
    truth = curved_truth(OU, 1.0)
    for table in tables:
        assert table.tolerance.values.tolist() == tolerances
        assert (table.plain_cost / table.cost).values[-1] > 5
        assert (np.abs(table.estimate - truth) < 3.5 * table.tolerance).all()
    ran = cost_table(OU, curved, tolerances=[0.04, 0.03, 0.02], seed=1, run_plain=True, **COARSE)
    assert {"plain_estimate", "plain_stderr", "plain_seconds"} <= set(ran)
    assert (np.abs(ran.plain_estimate - truth) < 3.5 * ran.tolerance).all()


def test_exhausted_levels_and_budgets_tell_what_was_achieved() -> None:
    with pytest.raises(ToleranceNotReached, match=r"a level after max_level = 2.*Achieved: .* with error") as caught:
        estimate(OU, curved, tolerance=1e-3, seed=1, max_level=2, **COARSE)
    assert caught.value.result.sizes["level"] == 3
    assert float(caught.value.result.error) > 1e-3
    with pytest.raises(ToleranceNotReached, match=r"max_cost is 1e\+06") as caught:
        estimate(OU, curved, tolerance=1e-3, seed=1, max_cost=1e6, **COARSE)
    assert float(caught.value.result.cost) <= 1e6
    error = abs(float(caught.value.result.estimate) - curved_truth(OU, 1.0))
    assert error < 4 * float(caught.value.result.error)


def test_what_does_not_vary_needs_no_samples() -> None:
    found = estimate(
        replace(OU, sigma=0.0, initial_variance=0.0), lambda t, x, mu: mu.mean()[..., 0, 0], tolerance=1e-3, seed=1,
        **COARSE,
    )  # fmt: skip
    last = float(found.dt[-1])
    assert float(found.estimate) == pytest.approx((1 - last) ** round(1 / last), abs=1e-12)
    assert abs(float(found.estimate) - math.exp(-1)) < 1e-3


# The door -------------------------------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {"tolerance": 0.05, "seed": 1, **COARSE}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tolerance": 0.0}, "tolerance = 0.0; expected a positive"),
        ({"tolerance": -1}, "tolerance = -1; expected a positive"),
        ({"tolerance": math.nan}, "tolerance = nan"),
        ({"horizon": 0.3}, "horizon = 0.3 is not a whole number of steps"),
        ({"dt": -0.1}, "dt = -0.1"),
        ({"n_particles": 0}, "n_particles = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"max_level": 1}, "max_level = 1; expected a whole number >= 2"),
        ({"max_level": 60}, "max_level = 60; expected at most"),
        ({"first_samples": 3}, "first_samples = 3; expected a whole number >= 10"),
        ({"max_cost": 0}, "max_cost = 0; expected a positive"),
        ({"variance_share": 1.0}, "variance_share = 1.0; expected a number strictly between"),
        ({"interaction": "triples"}, "interaction = 'triples'; expected one of 'mean', 'pairwise'"),
        ({"scenario": Born()}, "Born has births and deaths"),
        ({"scenario": Sampled()}, "Sampled samples its data anew"),
        ({"functional": lambda t, x, mu: x.mean()}, r"the functional returned shape \(\) for 3 systems"),
        ({"functional": lambda t, x, mu: mu.mean()}, r"returned shape \(3, 1, 1\) for 3 systems of 16 particles"),
        ({"functional": lambda t, x, mu: x.mean((0, 2))}, r"expected \(3,\), one number for each system"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes: dict[str, Any], message: str) -> None:
    call = {"scenario": OU, "functional": curved, **GOOD, **changes}
    with pytest.raises(ValueError, match=message):
        estimate(call.pop("scenario"), call.pop("functional"), **call)


def test_wrong_types_are_refused() -> None:
    with pytest.raises(TypeError, match="the functional returned a float"):
        estimate(OU, lambda t, x, mu: 1.0, **GOOD)
    with pytest.raises(TypeError, match="returned a EmpiricalMeasure; levels have different numbers of particles"):
        estimate(FromPoints(), curved, **GOOD)
    with pytest.raises(TypeError, match=r"max_level = 2\.5"):
        estimate(OU, curved, **GOOD, max_level=2.5)
    with pytest.raises(ValueError, match="a slope needs at least three"):
        cost_table(OU, curved, tolerances=[0.1, 0.2], seed=1, **COARSE)
    with pytest.raises(ValueError, match="stderr = 0"):
        plain(OU, curved, stderr=0, seed=1, **COARSE)


def test_a_system_that_explodes_says_on_which_level() -> None:
    with pytest.raises(FloatingPointError, match=r"Explosive blew up on level 0 \(dt = 0.125, 16 particles\)"):
        estimate(Explosive(initial_variance=4.0), curved, **GOOD)


def test_a_coarsest_step_that_explodes_is_named_though_its_values_are_finite():
    case = DoubleWell(initial_variance=10.0)

    def square(t, x, mu):
        return mu.integrate(lambda y: y.square().sum(-1))

    with pytest.raises(FloatingPointError, match=r"DoubleWell blew up on level \d .*smaller dt for the coarsest level"):
        estimate(case, square, tolerance=0.05, horizon=0.5, dt=0.5, n_particles=32, seed=0)
