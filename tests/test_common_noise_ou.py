"""The Ornstein-Uhlenbeck process with common noise: the law given W⁰, and the variance of the mean at every N."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import mfsde
from mfsde import EmpiricalMeasure
from mfsde.model import Equation
from mfsde.noise import Noise, Stream
from mfsde.scenarios import MeanFieldOU
from mfsde.scenarios.common_noise_ou import CommonNoiseOU

FLOAT64 = torch.float64
CASE = CommonNoiseOU(kappa=0.8, coupling=1.1, sigma=0.9, shared=0.5, initial_mean=(1.5,), initial_variance=0.4)
PLANE = replace(CASE, initial_mean=(1.5, -0.5), correlation=0.6)


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


# Equation -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_coefficients_are_their_formulas(dtype):
    x = normals(2, 6, 2).to(dtype)
    mu = EmpiricalMeasure(x)
    wanted = -0.8 * x - 1.1 * (x - x.mean(1, keepdim=True))
    torch.testing.assert_close(PLANE.drift(0.0, x, mu), wanted, rtol=1e-5, atol=1e-6)
    assert PLANE.common_diffusion(0.0, x, mu) == 0.5
    assert CASE.diffusion(0.0, x, mu) == 0.9
    root = PLANE.diffusion(0.0, x, mu)
    assert root.dtype == dtype
    assert tuple(root.shape) == (1, 1, 2, 2)
    equation = Equation(PLANE, x)
    assert (equation.form, equation.common_form) == ("general", "number")


@pytest.mark.parametrize("d", [2, 3, 5])
@pytest.mark.parametrize("rho", [-0.2, 0.3, 1.0])
def test_the_root_squares_to_the_covariance(d, rho):
    case = CommonNoiseOU(sigma=0.7, correlation=rho, initial_mean=(0.0,) * d)
    root = case.diffusion(0.0, normals(1, 4, d), EmpiricalMeasure(normals(1, 4, d)))[0, 0].numpy()
    covariance = 0.49 * (np.full((d, d), rho) + (1 - rho) * np.eye(d))
    np.testing.assert_allclose(root @ root.T, covariance, atol=1e-14)


@pytest.mark.parametrize(("d", "rho"), [(2, 1.1), (2, -1.01), (4, -0.34)])
def test_a_number_that_is_no_correlation_is_refused(d, rho):
    with pytest.raises(ValueError, match=f"where {d} components can be correlated alike"):
        CommonNoiseOU(correlation=rho, initial_mean=(0.0,) * d)


# Law given W⁰ ---------------------------------------------------------------------------------------------------------


def test_without_common_noise_it_is_the_mean_field_process():
    quiet = replace(CASE, shared=0.0)
    known = MeanFieldOU(kappa=0.8, coupling=1.1, sigma=0.9, initial_mean=(1.5,), initial_variance=0.4).limit(1.3)
    law = quiet.marginal(1.3)
    assert float(law.mean) == pytest.approx(float(known.mean), rel=1e-14)
    assert float(law.cov) == pytest.approx(float(known.cov), rel=1e-14)
    assert float(quiet.conditional(1.3, [0.3]).cov) == pytest.approx(float(known.cov), rel=1e-14)


def test_the_marginal_law_spreads_the_conditional_one_by_the_variance_of_its_mean():
    for case in (CASE, PLANE):
        d = case.dim
        between = case.marginal(0.9).cov - case.conditional(0.9, [0.0] * d).cov
        wanted = case.variance_of_mean(0.9, 10**12) * torch.eye(d, dtype=FLOAT64)
        torch.testing.assert_close(between, wanted, rtol=0, atol=1e-11)
    # Dynkin: d/dt Var = -2κ Var + σ²/N + σ⁰².
    v, h, n = CASE.variance_of_mean, 1e-5, 7
    rate = (v(0.6 + h, n) - v(0.6 - h, n)) / (2 * h)
    assert rate == pytest.approx(-1.6 * v(0.6, n) + 0.81 / n + 0.25, abs=1e-8)
    assert v(0.0, n) == pytest.approx(0.4 / n)
    assert replace(CASE, kappa=0.0).variance_of_mean(2.0, n) == pytest.approx(0.4 / n + 2.0 * (0.81 / n + 0.25))


def test_the_law_given_the_path_is_that_of_the_fokker_planck_equation():
    dt, steps, seed = 0.005, 100, 2
    limit = mfsde.limit.fokker_planck(CASE, None, [0.5], dt=dt, seed=seed, n_replicas=2, n_nodes=129)
    mean = np.full(2, 1.5)
    for k in range(steps):
        w = Noise(seed).increment(k, (2, 1, 1), stream=Stream.COMMON, dtype=FLOAT64)[:, 0, 0].numpy()
        mean = (1 - 0.8 * dt) * mean + 0.5 * math.sqrt(dt) * w
    np.testing.assert_allclose(limit["mean"].values[0, :, 0], mean, atol=1e-6)
    x = torch.tensor(limit.x.values)[:, None]

    def gap(r: int, of: int) -> float:
        density = CASE.conditional(0.5, [mean[of]]).log_prob(x).exp().numpy()
        return float(np.abs(limit.density.values[0, r] - density).max())

    # Implicit Euler is of first order in the width.
    assert max(gap(0, 0), gap(1, 1)) < 2e-2
    assert min(gap(0, 1), gap(1, 0)) > 1e-1


# Particles ------------------------------------------------------------------------------------------------------------


def test_the_mean_of_the_particles_is_the_recursion_of_their_noise():
    n, dt, replicas = 30, 0.05, 3
    run = mfsde.simulate(PLANE, n_particles=n, n_replicas=replicas, horizon=1.0, dt=dt, seed=2, dtype=FLOAT64)
    root = PLANE.diffusion(0.0, torch.zeros(1, 1, 2, dtype=FLOAT64), None)[0, 0]
    mean = torch.tensor(run["mean"].values[0])
    for k in range(20):
        own = Noise(2).increment(k, (replicas, n, 2), dtype=FLOAT64).mean(1) @ root.T
        common = Noise(2).increment(k, (replicas, 1, 2), stream=Stream.COMMON, dtype=FLOAT64)[:, 0]
        mean = (1 - 0.8 * dt) * mean + math.sqrt(dt) * (own + 0.5 * common)
    np.testing.assert_allclose(run["mean"].values[-1], mean.numpy(), atol=1e-13)


def variance_by_recursion(case: CommonNoiseOU, n: int, dt: float, steps: int) -> float:
    """Variance of a component of the mean of N Euler particles: exact at every N and dt."""
    v = case.initial_variance / n
    for _ in range(steps):
        v = (1 - case.kappa * dt) ** 2 * v + dt * (case.sigma**2 / n + case.shared**2)
    return v


REPLICAS = 4000


@pytest.mark.parametrize("n", [1, 4, 50])
def test_the_variance_of_the_mean_is_eulers_own_at_every_n(n):
    run = mfsde.simulate(CASE, n_particles=n, n_replicas=REPLICAS, horizon=1.0, dt=0.1, seed=n, keep_particles=0)
    found = float(run["mean"].values[-1, :, 0].astype(float).var(ddof=1))

    def score(wanted: float) -> float:
        # The means are Gaussian and independent over replicas: a χ² law.
        return abs(found / wanted - 1) / math.sqrt(2 / (REPLICAS - 1))

    assert score(variance_by_recursion(CASE, n, 0.1, 10)) < 4
    # No common noise; a common noise that averages out; own noises that do not.
    assert score(variance_by_recursion(replace(CASE, shared=0.0), n, 0.1, 10)) > 4
    if n > 1:
        assert score(variance_by_recursion(CASE, n, 0.1, 10) / n) > 4
        assert score(variance_by_recursion(CASE, 1, 0.1, 10)) > 4


def test_the_recursion_of_the_variance_tends_to_its_formula():
    gaps = [variance_by_recursion(CASE, 5, 1 / k, k) - CASE.variance_of_mean(1.0, 5) for k in (200, 400)]
    assert gaps[0] / gaps[1] == pytest.approx(2, abs=0.02)
    assert abs(gaps[1]) < 1e-3


def test_particles_spread_around_their_mean_as_the_conditional_law():
    n, dt, steps = 10, 0.1, 10
    run = mfsde.simulate(PLANE, n_particles=n, n_replicas=REPLICAS, horizon=1.0, dt=dt, seed=9, keep_particles=0)
    values = run.covariance.values[-1].astype(float)
    mean, error = values.mean(0), values.std(0, ddof=1) / math.sqrt(REPLICAS)

    def scores(case: CommonNoiseOU, share: float = 1 - 1 / n) -> np.ndarray:
        c = np.array([[1.0, case.correlation], [case.correlation, 1.0]])
        spread = case.initial_variance * np.eye(2)
        for _ in range(steps):
            spread = (1 - (case.kappa + case.coupling) * dt) ** 2 * spread + dt * case.sigma**2 * c
        # Around the mean of N, (1 - 1/N) of it.
        return np.abs(share * spread - mean) / error

    assert scores(PLANE).max() < 4
    assert scores(replace(PLANE, correlation=0.5)).max() > 4
    assert scores(replace(PLANE, sigma=0.95)).max() > 4
    assert scores(PLANE, 1.0).max() > 4
    # Euler's recursion tends to the covariance of the conditional law.
    v, fine = 0.4, 20_000
    for _ in range(fine):
        v = (1 - 1.9 / fine) ** 2 * v + 0.81 / fine
    assert float(CASE.conditional(1.0, [0.0]).cov) == pytest.approx(v, abs=1e-4)
