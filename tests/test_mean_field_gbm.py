"""Geometric Brownian motion with its mean in both coefficients: moments at every N, lognormal laws, positivity."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

import mfsde
from mfsde import EmpiricalMeasure
from mfsde.noise import Noise
from mfsde.scenarios.mean_field_gbm import LogNormal, MeanFieldGBM

FLOAT64 = torch.float64
CASE = MeanFieldGBM(growth=0.2, mean_growth=0.5, sigma=0.4, mean_sigma=0.3, initial_mean=1.5, initial_log_variance=0.1)
PLAIN = MeanFieldGBM(growth=0.3, mean_growth=0.0, sigma=0.4, mean_sigma=0.0, initial_mean=1.5)


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


# Equation and moments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighted", [False, True])
def test_drift_and_diffusion_are_their_formulas(dtype, weighted):
    x = CASE.initial().from_variates(normals(2, 6, 1)).to(dtype)
    mu = EmpiricalMeasure(x, torch.softmax(normals(2, 6, seed=1), -1).to(dtype) if weighted else None)
    y, w = x.double().numpy(), mu.weights.double().numpy()
    mean = (w[..., None] * y).sum(1, keepdims=True)
    tolerance = 1e-14 if dtype == FLOAT64 else 1e-6
    np.testing.assert_allclose(CASE.drift(0.0, x, mu).numpy(), 0.2 * y + 0.5 * mean, atol=tolerance)
    np.testing.assert_allclose(CASE.diffusion(0.0, x, mu).numpy(), 0.4 * y + 0.3 * mean, atol=tolerance)
    assert CASE.diffusion(0.0, x, mu).dtype == dtype


@pytest.mark.parametrize(
    "case", [CASE, PLAIN, replace(CASE, mean_growth=-0.3), replace(CASE, sigma=1.0, mean_growth=0.5, growth=0.0)]
)
def test_the_moments_solve_their_equations(case):
    a, b, s, c = case.growth, case.mean_growth, case.sigma, case.mean_sigma

    def rates(t: float, y: np.ndarray) -> list[float]:
        m, p = y
        return [(a + b) * m, (2 * a + s**2) * p + (2 * b + 2 * s * c + c**2) * m**2]

    start = [float(case.initial().mean), float(case.initial().cov) + float(case.initial().mean) ** 2]
    solved = integrate.solve_ivp(rates, (0, 1.5), start, rtol=1e-11, atol=1e-13).y[:, -1]
    assert case.moments(1.5) == pytest.approx(tuple(solved), rel=1e-9)
    assert case.moments(0.0) == pytest.approx(tuple(start), rel=1e-14)
    # The engine reads the same equations off drift and diffusion.
    limit = mfsde.limit.moments(case, [0.0, 1.5])
    mean, variance = float(limit["mean"][-1, 0]), float(limit.covariance[-1, 0, 0])
    assert (mean, variance + mean**2) == pytest.approx(case.moments(1.5), rel=1e-9)
    for wrong in ({"sigma": s + 0.1}, {"mean_sigma": c + 0.1}, {"growth": a + 0.1}):
        assert replace(case, **wrong).moments(1.5)[1] != pytest.approx(solved[1], rel=1e-3)


def test_moments_are_continuous_where_two_rates_meet():
    # 2b = s²: the quotient in P becomes t.
    exact = MeanFieldGBM(growth=0.1, mean_growth=0.125, sigma=0.5, mean_sigma=0.2)
    near = replace(exact, mean_growth=0.125 + 1e-9)
    assert exact.moments(2.0) == pytest.approx(near.moments(2.0), rel=1e-7)


def euler_moments(case: MeanFieldGBM, n: int, dt: float, steps: int) -> tuple[float, float, float]:
    """E M, E X_i², E M² of N Euler particles, M their mean: closed at every N and dt."""
    a, b, s, c = case.growth, case.mean_growth, case.sigma, case.mean_sigma
    m = float(case.initial().mean)
    p = float(case.initial().cov) + m**2
    q = m**2 + float(case.initial().cov) / n
    for _ in range(steps):
        noise = dt * (s**2 * p + (2 * s * c + c**2) * q)
        m, p, q = (
            (1 + (a + b) * dt) * m,
            (1 + a * dt) ** 2 * p + (2 * (1 + a * dt) * b * dt + (b * dt) ** 2) * q + noise,
            (1 + (a + b) * dt) ** 2 * q + noise / n,
        )
    return m, p, q


def test_particles_have_eulers_own_moments_at_every_n():
    n, dt = 5, 0.1
    run = mfsde.simulate(
        CASE, n_particles=n, n_replicas=20_000, horizon=1.0, dt=dt, seed=1, keep_particles=0, dtype=FLOAT64
    )
    mean, second = run["mean"].values[-1, :, 0], run.second_moment.values[-1]

    def scores(wanted: tuple[float, float, float]) -> np.ndarray:
        found = np.stack([mean, second, mean**2])
        return np.abs(found.mean(1) - wanted) / (found.std(axis=1, ddof=1) / math.sqrt(found.shape[1]))

    assert (scores(euler_moments(CASE, n, dt, 10)) < 4).all()
    assert scores(euler_moments(replace(CASE, mean_sigma=0.0), n, dt, 10)).max() > 4
    assert scores(euler_moments(replace(CASE, sigma=0.45), n, dt, 10)).max() > 4
    # With another N, and at N = ∞ and dt = 0, the numbers are others.
    assert scores(euler_moments(CASE, 10, dt, 10)).max() > 4
    m, p = CASE.moments(1.0)
    assert scores((m, p, m**2)).max() > 4


def test_eulers_moments_tend_to_the_moments():
    def gap(n: int, steps: int) -> float:
        m, p, _ = euler_moments(CASE, n, 1.0 / steps, steps)
        return abs(m - CASE.moments(1.0)[0]) + abs(p - CASE.moments(1.0)[1])

    assert gap(10**9, 100) / gap(10**9, 200) == pytest.approx(2, abs=0.02)
    assert gap(10**9, 10**5) < 1e-4


# The lognormal law ----------------------------------------------------------------------------------------------------


def test_only_the_plain_equation_has_a_limit():
    assert hasattr(PLAIN, "limit")
    for fields in ({"mean_growth": 0.1}, {"mean_sigma": 0.1}):
        assert not hasattr(replace(PLAIN, **fields), "limit")
    with pytest.raises(AttributeError, match=r"Use moments\(t\)"):
        _ = CASE.limit


def test_the_limit_has_the_moments_and_starts_at_the_initial_law():
    law = PLAIN.limit(1.2)
    m, p = PLAIN.moments(1.2)
    assert float(law.mean) == pytest.approx(m, rel=1e-13)
    assert float(law.cov) == pytest.approx(p - m**2, rel=1e-12)
    u = torch.tensor([0.01, 0.4, 0.99], dtype=FLOAT64)
    assert torch.equal(PLAIN.limit(0.0).quantile(u), PLAIN.initial().quantile(u))
    grid = mfsde.limit.fokker_planck(PLAIN, None, [0.0, 0.5], n_nodes=1025)
    x = torch.tensor(grid.x.values)[:, None]

    def gap(t: float) -> float:
        density = PLAIN.limit(t).log_prob(x).exp().numpy()
        return float(np.abs(grid.density.values[-1] - density).max() / density.max())

    assert gap(0.5) < 1e-4 < 1e-2 < gap(0.55)


def test_milstein_follows_the_exact_solution_path_by_path():
    horizon, finest = 1.0, 64

    def error(case: MeanFieldGBM, per: int, method: str) -> float:
        settings = {"n_particles": 500, "n_replicas": 1, "horizon": horizon, "seed": 3, "dtype": FLOAT64}
        run = mfsde.simulate(
            case, dt=per / finest, noise=Noise(3, substeps=per), method=method, save_every=None, **settings
        )
        w = sum(Noise(3).increment(k, (1, 500, 1), dtype=FLOAT64) for k in range(finest)).numpy() / math.sqrt(finest)
        exact = run.position.values[0] * np.exp((PLAIN.growth - PLAIN.sigma**2 / 2) * horizon + PLAIN.sigma * w)
        return float(np.sqrt(((run.position.values[-1] - exact) ** 2).mean()))

    rates = [math.log2(error(PLAIN, 4, m) / error(PLAIN, 1, m)) / 2 for m in ("milstein", "euler")]
    assert rates == pytest.approx([1.0, 0.5], abs=0.12)
    # The Stratonovich reading would be off by e^{s²/2}.
    assert error(replace(PLAIN, growth=PLAIN.growth + PLAIN.sigma**2 / 2), 1, "milstein") > 5 * error(
        PLAIN, 1, "milstein"
    )


def test_the_lognormal_law_is_scipys():
    law, known = LogNormal(0.3, 0.49), stats.lognorm(0.7, scale=math.exp(0.3))
    u = torch.tensor([[0.01], [0.4], [0.97]], dtype=FLOAT64)
    x = law.quantile(u)
    np.testing.assert_allclose(x.numpy(), known.ppf(u.numpy()), rtol=1e-12)
    np.testing.assert_allclose(law.log_prob(x).numpy(), known.logpdf(x.numpy())[:, 0], rtol=1e-12)
    torch.testing.assert_close(law.cdf(x), u, rtol=0, atol=1e-14)
    torch.testing.assert_close(law.from_variates(torch.special.ndtri(u)), x, rtol=1e-13, atol=0)
    assert [float(law.mean), float(law.cov)] == pytest.approx([known.mean(), known.var()], rel=1e-13)
    mu = law.as_measure()
    assert [float(mu.mean()), float(mu.covariance())] == pytest.approx([known.mean(), known.var()], rel=1e-12)
    below = torch.tensor([[-1.0], [0.0]], dtype=FLOAT64)
    assert law.log_prob(below).tolist() == [-math.inf, -math.inf]
    assert law.cdf(below).flatten().tolist() == [0.0, 0.0]


def test_a_lognormal_law_may_be_a_point():
    law = LogNormal(0.5, 0.0)
    assert law.from_variates(normals(3, 1)).flatten().tolist() == pytest.approx([math.exp(0.5)] * 3)
    assert law.cdf(torch.tensor([[1.0], [2.0]], dtype=FLOAT64)).flatten().tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match="the law is a point"):
        law.log_prob(torch.ones(1, 1))


# Positivity and bad input ---------------------------------------------------------------------------------------------


def test_particles_stay_positive_where_nothing_is_noisy_at_zero():
    settings = {"n_particles": 500, "n_replicas": 4, "horizon": 2.0, "dt": 0.01, "seed": 4}
    assert mfsde.simulate(replace(CASE, mean_sigma=0.0, sigma=1.0), **settings).position.values.min() > 0
    assert mfsde.simulate(replace(CASE, mean_sigma=0.8), **settings).position.values.min() < 0


@pytest.mark.parametrize("fields", [{"initial_mean": 0.0}, {"initial_log_variance": -0.1}])
def test_an_initial_law_that_is_none_is_refused(fields):
    with pytest.raises(ValueError, match="expected a positive mean and a variance >= 0"):
        MeanFieldGBM(**fields)
    with pytest.raises(ValueError, match="expected numbers, the variance >= 0"):
        LogNormal(0.0, -1.0)
