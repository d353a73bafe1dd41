"""Stein variational gradient descent against loops, Stein's identity, and the closed equations of its moments."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

import mfsde
from mfsde import EmpiricalMeasure, Gaussian
from mfsde.limit import characteristics
from mfsde.scenarios.stein import SteinVariational

FLOAT64 = torch.float64
MIXTURE = SteinVariational(
    target_means=((-1.0, 0.5), (1.5, 0.0)),
    target_covariances=(0.6, ((0.8, 0.3), (0.3, 0.5))),
    target_weights=(0.3, 0.7),
    bandwidth=0.8,
)
MEAN, COVARIANCE = np.array([0.5, -0.3]), np.array([[1.2, 0.4], [0.4, 0.7]])
MOMENTS = SteinVariational((tuple(MEAN),), (tuple(map(tuple, COVARIANCE)),), kernel="bilinear")


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


# Drift ----------------------------------------------------------------------------------------------------------------


def looped(case: SteinVariational, at: np.ndarray, x: np.ndarray, w: np.ndarray, repulsion: float = 1.0) -> np.ndarray:
    """Σ_j w_j [k(x, x_j) ∇log π(x_j) + ∇_{x_j} k(x, x_j)], term by term."""
    score, out, h = score_of(case, x), np.zeros_like(at), case.bandwidth
    for i, place in enumerate(at):
        for j, y in enumerate(x):
            if case.kernel == "bilinear":
                k, slope = place @ y + 1, place
            else:
                k = math.exp(-((place - y) ** 2).sum() / (2 * h**2))
                slope = k * (place - y) / h**2
            out[i] += w[j] * (k * score[j] + repulsion * slope)
    return out


def score_of(case: SteinVariational, x: np.ndarray) -> np.ndarray:
    """The gradient of the target's log density, by automatic differentiation."""
    at = torch.from_numpy(x).requires_grad_()
    (slope,) = torch.autograd.grad(case.target.log_prob(at).sum(), [at])
    return slope.numpy()


@pytest.mark.parametrize("kernel", ["gaussian", "bilinear"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_drift_is_its_sum_over_pairs(kernel, weighted):
    case = replace(MIXTURE, kernel=kernel)
    x, at = normals(2, 6, 2), normals(2, 4, 2, seed=3)
    mu = EmpiricalMeasure(x, torch.softmax(normals(2, 6, seed=1), -1) if weighted else None)
    w = mu.weights.numpy()
    for points in (x, at):
        b = case.drift(0.0, points, mu).numpy()
        for r in range(2):
            there = points[r].numpy(), x[r].numpy(), w[r]
            np.testing.assert_allclose(b[r], looped(case, *there), rtol=0, atol=1e-12)
            assert not np.allclose(b[r], looped(case, *there, repulsion=-1.0), atol=1e-2)
    single = EmpiricalMeasure(x.float(), None if mu.is_uniform else mu.weights.float())
    found = case.drift(0.0, x.float(), single)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), case.drift(0.0, x, mu), rtol=1e-5, atol=1e-5)
    assert case.diffusion(0.0, x, mu) == 0


def test_the_score_is_the_gradient_of_the_log_density():
    x = 3 * normals(2, 7, 2)
    np.testing.assert_allclose(MIXTURE.score(x).numpy().reshape(-1, 2), score_of(MIXTURE, x.reshape(-1, 2).numpy()))
    far = torch.full((1, 2), 200.0, dtype=FLOAT64)
    assert MIXTURE.score(far).isfinite().all()


def test_the_target_is_at_rest():
    """Stein's identity ∫ (k ∇log π + ∇k) dπ = 0, by quadrature of the target."""
    case = replace(MIXTURE, bandwidth=1.3)
    law, at = case.target.as_measure(), normals(5, 2)
    assert case.drift(0.0, at, law).abs().max() < 1e-6
    other = replace(case, target_weights=(0.4, 0.6)).target.as_measure()
    assert case.drift(0.0, at, other).abs().max() > 1e-2
    assert case.discrepancy(law).abs() < 1e-6
    torch.testing.assert_close(case.log_invariant(at), case.target.log_prob(at))


@pytest.mark.parametrize("kernel", ["gaussian", "bilinear"])
def test_the_discrepancy_is_the_double_sum_of_the_stein_kernel(kernel):
    case, x = replace(MIXTURE, kernel=kernel), normals(2, 5, 2)
    mu = EmpiricalMeasure(x, torch.softmax(normals(2, 5, seed=1), -1))
    h, wanted = case.bandwidth, np.zeros(2)
    for r in range(2):
        points, w = x[r].numpy(), mu.weights[r].numpy()
        score = score_of(case, points)
        for i in range(5):
            for j in range(5):
                z, both = points[i] - points[j], score[i] @ score[j]
                if kernel == "bilinear":
                    k = (points[i] @ points[j] + 1) * both + score[i] @ points[i] + score[j] @ points[j] + 2
                else:
                    k = both + (score[i] - score[j]) @ z / h**2 + 2 / h**2 - z @ z / h**4
                    k *= math.exp(-(z @ z) / (2 * h**2))
                wanted[r] += w[i] * w[j] * k
    np.testing.assert_allclose(case.discrepancy(mu).numpy(), wanted, rtol=1e-12)


# Closed moments -------------------------------------------------------------------------------------------------------


def moment_flow(mean: np.ndarray, cov: np.ndarray, times: list[float], factor: float = 1.0) -> list[np.ndarray]:
    """(m, C) solving m' = m - P C m - (1 + |m|²) P(m - a), C' = A C + C Aᵀ, A = I - P C - P(m - a) mᵀ."""
    p = np.linalg.inv(COVARIANCE)

    def slope(t: float, y: np.ndarray) -> np.ndarray:
        m, c = y[:2], y[2:].reshape(2, 2)
        pull = p @ (m - MEAN)
        a = factor * np.eye(2) - p @ c - np.outer(pull, m)
        return np.concatenate([m - p @ c @ m - (1 + m @ m) * pull, (a @ c + c @ a.T).ravel()])

    start = np.concatenate([mean, cov.ravel()])
    return list(solve_ivp(slope, (0, times[-1]), start, method="DOP853", rtol=1e-12, atol=1e-13, t_eval=times).y.T)


def moments_of(run, k: int, r: int) -> np.ndarray:
    return np.concatenate([run["mean"].values[k, r], run.covariance.values[k, r].ravel()])


@pytest.mark.parametrize("n", [3, 20])
def test_the_moments_of_particles_solve_their_closed_equations(n):
    """For every number of particles: to 1e-6 by an adaptive method of order five."""
    run = mfsde.simulate(
        MOMENTS, n_particles=n, n_replicas=2, horizon=2.0, dt=0.05, seed=4, save_every=10, method="dopri5",
        dtype=FLOAT64,
    )  # fmt: skip
    times = run.time.values.tolist()
    for r in range(2):
        points = run.position.values[0, r]
        start = points.mean(0), np.cov(points.T, bias=True)
        wanted, wrong = moment_flow(*start, times), moment_flow(start[0], np.cov(points.T), times)
        found = [moments_of(run, k, r) for k in range(len(times))]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
        assert np.abs(np.array(found) - wrong)[1].max() > 1e-3
        assert np.abs(np.array(found) - moment_flow(*start, times, factor=1.01))[-1].max() > 1e-3


def test_euler_tends_to_the_closed_equations_at_first_order():
    def gap(dt: float) -> float:
        run = mfsde.simulate(MOMENTS, n_particles=8, horizon=1.0, dt=dt, seed=4, dtype=FLOAT64)
        points = run.position.values[0, 0]
        return float(
            np.abs(moments_of(run, -1, 0) - moment_flow(points.mean(0), np.cov(points.T, bias=True), [1.0])).max()
        )

    assert math.log2(gap(0.02) / gap(0.01)) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("t", [0.0, 0.7, 30.0])
def test_the_limit_is_the_gaussian_of_the_closed_moments(t):
    law = MOMENTS.limit(t)
    wanted = moment_flow(np.array([0.0, 1.0]), 0.5 * np.eye(2), [t])[0] if t else [0, 1, 0.5, 0, 0, 0.5]
    np.testing.assert_allclose(torch.cat([law.mean, law.cov.flatten()]).numpy(), wanted, rtol=0, atol=1e-9)
    if t == 30.0:
        np.testing.assert_allclose(law.mean.numpy(), MEAN, atol=1e-9)
        np.testing.assert_allclose(law.cov.numpy(), COVARIANCE, atol=1e-9)


def relative_entropy(law: Gaussian) -> float:
    p = np.linalg.inv(COVARIANCE)
    gap, cov = law.mean.numpy() - MEAN, law.cov.numpy()
    return 0.5 * (np.trace(p @ cov) + gap @ p @ gap - 2 - np.linalg.slogdet(p @ cov)[1])


@pytest.mark.parametrize("t", [0.1, 1.0])
def test_the_relative_entropy_falls_at_the_squared_discrepancy(t):
    h = 1e-4
    slope = (relative_entropy(MOMENTS.limit(t + h)) - relative_entropy(MOMENTS.limit(t - h))) / (2 * h)
    discrepancy = MOMENTS.discrepancy(MOMENTS.limit(t).as_measure()).item()
    assert discrepancy > 1e-3
    assert slope == pytest.approx(-discrepancy, rel=1e-6)


def test_characteristics_carry_weighted_points_by_the_same_moments():
    found = characteristics(MOMENTS, [0.5, 1.5], n_nodes=16)
    for k, t in enumerate((0.5, 1.5)):
        law = MOMENTS.limit(t)
        np.testing.assert_allclose(found["mean"].values[k], law.mean.numpy(), atol=2e-5)
        np.testing.assert_allclose(found.covariance.values[k], law.cov.numpy(), atol=2e-5)


# The Gaussian kernel --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Collapsing(SteinVariational):
    """A planted fault: no repulsion."""

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        return self._against(mu, x, lambda k, z, s: k.unsqueeze(-1) * s)


def finds_both_wells(case: SteinVariational) -> bool:
    """Whether the variance is near the target's 0.5 + 1.5², and the discrepancy has fallen a hundredfold."""
    run = mfsde.simulate(case, n_particles=60, n_replicas=4, horizon=15.0, dt=0.1, seed=0, keep_particles=0)
    spread = run.covariance.values[-1, :, 0, 0]
    return bool((np.abs(spread / 2.75 - 1) < 0.15).all() and (run.discrepancy[-1] < 0.01 * run.discrepancy[0]).all())


def test_particles_spread_over_the_target():
    assert finds_both_wells(SteinVariational())
    assert not finds_both_wells(Collapsing())


# What there is not ----------------------------------------------------------------------------------------------------


def test_laws_are_missing_where_they_are_not_known():
    for case in (MIXTURE, replace(MIXTURE, kernel="bilinear"), replace(MOMENTS, kernel="gaussian")):
        assert not hasattr(case, "limit")
    assert hasattr(MOMENTS, "log_invariant")
    with pytest.raises(AttributeError, match="matches moments only"):
        _ = replace(MIXTURE, kernel="bilinear").log_invariant


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"kernel": "matern"}, "kernel = 'matern'.*expected 'gaussian' or 'bilinear'"),
        ({"bandwidth": 0.0}, "and h > 0"),
        ({"initial_mean": (0.0,)}, "in the dimension 1 of initial_mean"),
        ({"target_covariances": (0.5,)}, "expected as many of each"),
        ({"target_covariances": (0.5, 0.0)}, "a component is singular"),
        ({"target_weights": (0.5, 0.6)}, "not a probability"),
    ],
)
def test_impossible_targets_are_refused(wrong, what):
    with pytest.raises(ValueError, match=what):
        SteinVariational(**wrong)
