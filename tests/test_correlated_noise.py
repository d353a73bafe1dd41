"""The linear equation with full matrices against loops, Lyapunov's equation, and Euler's own moments."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import mfsde
from mfsde import EmpiricalMeasure
from mfsde.limit import fokker_planck, moments
from mfsde.model import Equation
from mfsde.scenarios.correlated_noise import CorrelatedLinear

FLOAT64 = torch.float64
CASE = CorrelatedLinear()
COMMON = replace(CASE, common_sigma=((0.4, 0.1, 0.0, 0.2), (-0.3, 0.2, 0.3, 0.0)))
A, B, C = (np.array(part) for part in (CASE.matrix, CASE.mean_matrix, CASE.shift))


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def squared(rows: object) -> np.ndarray:
    sigma = np.array(rows)
    product: np.ndarray = sigma @ sigma.T if sigma.size else np.zeros((2, 2))
    return product


def second_moments(deviations: np.ndarray) -> np.ndarray:
    """The entries d_i d_j, i <= j, of rows of deviations (R, 2): (R, 3)."""
    return np.stack([deviations[:, i] * deviations[:, j] for i, j in ((0, 0), (0, 1), (1, 1))], -1)


def entries(matrix: np.ndarray) -> np.ndarray:
    return np.array([matrix[0, 0], matrix[0, 1], matrix[1, 1]])


def z_scores(samples: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Deviations of the mean over replicas (axis 0) in its standard errors."""
    error = samples.std(0, ddof=1) / math.sqrt(len(samples))
    return np.abs(samples.mean(0) - expected) / error


# Coefficients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_the_drift_is_its_formula(weighted):
    x, at = normals(2, 6, 2), normals(2, 4, 2, seed=3)
    mu = EmpiricalMeasure(x, torch.softmax(normals(2, 6, seed=1), -1) if weighted else None)
    for points in (x, at):
        b = CASE.drift(0.0, points, mu).numpy()
        for r in range(2):
            mean = sum(w * y for w, y in zip(mu.weights[r].numpy(), x[r].numpy(), strict=True))
            for i in range(points.shape[1]):
                np.testing.assert_allclose(b[r, i], A @ points[r, i].numpy() + B @ mean + C, rtol=0, atol=1e-14)
                assert not np.allclose(b[r, i], A.T @ points[r, i].numpy() + B @ mean + C, atol=1e-4)
    single = CASE.drift(0.0, x.float(), EmpiricalMeasure(x.float()))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), CASE.drift(0.0, x, EmpiricalMeasure(x)), rtol=0, atol=1e-5)


def test_noise_has_its_own_number_of_columns():
    x = normals(2, 5, 2)
    own, both = Equation(CASE, x), Equation(COMMON, x)
    assert (own.form, own.n_channels, own.n_common) == ("general", 3, 0)
    assert (both.common_form, both.n_channels, both.n_common) == ("general", 3, 4)
    assert not own.has_common_noise
    assert tuple(CASE.diffusion(0.0, x, EmpiricalMeasure(x)).shape) == (1, 1, 2, 3)
    np.testing.assert_array_equal(CASE.diffusion(0.0, x, EmpiricalMeasure(x))[0, 0].numpy(), np.array(CASE.sigma))


# The limit ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.1, 1.0, 7.0])
def test_the_limit_solves_lyapunovs_equation(t):
    h, law = 1e-4, CASE.limit(t)
    after, before = CASE.limit(t + h), CASE.limit(t - h)
    cov, mean = law.cov.numpy(), law.mean.numpy()
    cov_rate = (after.cov - before.cov).numpy() / (2 * h)
    mean_rate = (after.mean - before.mean).numpy() / (2 * h)
    np.testing.assert_allclose(cov_rate, A @ cov + cov @ A.T + squared(CASE.sigma), rtol=0, atol=1e-7)
    np.testing.assert_allclose(mean_rate, (A + B) @ mean + C, rtol=0, atol=1e-7)
    found = moments(CASE, [t])
    np.testing.assert_allclose(cov, found.covariance.values[0], rtol=0, atol=1e-10)
    np.testing.assert_allclose(mean, found["mean"].values[0], rtol=0, atol=1e-10)


def test_the_limit_starts_at_the_initial_law_and_ends_at_the_invariant_one():
    assert torch.equal(CASE.limit(0.0).cov, CASE.initial().cov)
    assert torch.equal(CASE.limit(0.0).mean, CASE.initial().mean)
    x = normals(7, 2)
    gap = CASE.log_invariant(x) - CASE.limit(300.0).log_prob(x)
    torch.testing.assert_close(gap, gap[:1].expand(7), rtol=0, atol=1e-10)
    bent = replace(CASE, sigma=((0.5, 0.2, 0.0), (0.3, 0.2, 0.4))).log_invariant(x) - CASE.limit(300.0).log_prob(x)
    assert (bent - bent[0]).abs().max() > 1e-2
    growing = replace(CASE, mean_matrix=((2.0, 0.0), (0.0, 2.0)))
    with pytest.raises(ValueError, match="all eigenvalues of A and of A"):
        growing.log_invariant(x)
    assert growing.limit(3.0).mean.isfinite().all()


def test_a_matrix_that_is_not_stable_needs_no_inverse():
    """Rotation and no pull at all: ∫ R Q Rᵀ ds of a full turn is t tr(Q)/2 I."""
    turning = CorrelatedLinear(matrix=((0.0, 1.0), (-1.0, 0.0)), mean_matrix=(), shift=(), initial_covariance=0.0)
    t = 2 * math.pi
    wanted = t * np.trace(squared(CASE.sigma)) / 2 * np.eye(2)
    np.testing.assert_allclose(turning.limit(t).cov.numpy(), wanted, rtol=0, atol=1e-12)
    still = replace(turning, matrix=((0.0, 0.0), (0.0, 0.0)))
    np.testing.assert_allclose(still.limit(3.0).cov.numpy(), 3 * squared(CASE.sigma), rtol=1e-14)
    assert still.limit(3.0).mean.tolist() == [1.0, -1.0]


def test_the_fokker_planck_equation_agrees():
    """The same drift on weighted nodes, and noise across the axes; on a coarse grid, 8e-3 is above its error."""
    nodes = np.linspace(-4, 4.5, 33), np.linspace(-4, 2.5, 33)
    found = fokker_planck(CASE, nodes, [0.3], rtol=1e-4, energies=False)

    def gap(law: mfsde.Gaussian) -> float:
        of_cov = np.abs(found.covariance.values[0] - law.cov.numpy()).max()
        return float(max(of_cov, np.abs(found["mean"].values[0] - law.mean.numpy()).max()))

    assert gap(CASE.limit(0.3)) < 8e-3
    for wrong in ({"mean_matrix": ()}, {"shift": ()}, {"sigma": ((0.5, 0.2, 0.0), (-0.3, 0.2, 0.4))}):
        assert gap(replace(CASE, **wrong).limit(0.3)) > 3e-2


def test_with_common_noise_the_law_is_known_given_its_path_only():
    for name in ("limit", "log_invariant"):
        assert hasattr(CASE, name)
        assert not hasattr(COMMON, name)
        with pytest.raises(AttributeError, match=f"has no {name}: the law depends on the path"):
            getattr(COMMON, name)
    t, h = 0.8, 1e-4
    law = COMMON.law_of_mean(t)
    rate = (COMMON.law_of_mean(t + h).cov - COMMON.law_of_mean(t - h).cov).numpy() / (2 * h)
    spread, both = law.cov.numpy(), A + B
    np.testing.assert_allclose(rate, both @ spread + spread @ both.T + squared(COMMON.common_sigma), atol=1e-7)
    torch.testing.assert_close(law.mean, CASE.limit(t).mean)
    torch.testing.assert_close(COMMON.covariance(t), CASE.limit(t).cov)
    assert CASE.law_of_mean(t).cov.abs().max() == 0


# Particles ------------------------------------------------------------------------------------------------------------

N, REPLICAS, DT, STEPS = 20, 1000, 0.05, 20


def euler_moments(case: CorrelatedLinear, n: int = N) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """E X, Cov of X̄ and E of the covariance within, by Euler's recursion for N particles."""
    d, own, common = 2, squared(case.sigma), squared(case.common_sigma)
    a, both = np.array(case.matrix), np.array(case.matrix) + np.array(case.mean_matrix)
    start = case.initial()
    mean, within = start.mean.numpy(), (1 - 1 / n) * start.cov.numpy()
    of_mean = start.cov.numpy() / n
    for _ in range(STEPS):
        mean = mean + DT * (both @ mean + np.array(case.shift))
        step, step_mean = np.eye(d) + DT * a, np.eye(d) + DT * both
        within = step @ within @ step.T + DT * (1 - 1 / n) * own
        of_mean = step_mean @ of_mean @ step_mean.T + DT * (own / n + common)
    return mean, of_mean, within


@pytest.mark.parametrize("case", [CASE, COMMON], ids=["own", "common"])
def test_particles_follow_eulers_moments(case):
    run = mfsde.simulate(
        case, n_particles=N, n_replicas=REPLICAS, horizon=DT * STEPS, dt=DT, seed=8, keep_particles=0, dtype=FLOAT64
    )
    mean, cov = run["mean"].values[-1], run.covariance.values[-1]

    def scores(scenario: CorrelatedLinear, n: int = N) -> np.ndarray:
        centre, of_mean, within = euler_moments(scenario, n)
        return np.concatenate(
            [
                z_scores(mean, centre),
                z_scores(second_moments(mean - centre), entries(of_mean)),
                z_scores(np.stack([cov[:, 0, 0], cov[:, 0, 1], cov[:, 1, 1]], -1), entries(within)),
            ]
        )

    assert (scores(case) < 4).all()
    flipped = tuple((a, -b, c) for a, b, c in case.sigma[1:])
    for wrong in (
        {"sigma": (case.sigma[0], *flipped)},  # the noise correlated the other way
        {"matrix": ((-1.0, -0.6), (0.8, -0.5))},  # transposed
        {"mean_matrix": ((0.0, 0.0), (0.0, 0.0))},
        {"common_sigma": COMMON.common_sigma if case is CASE else ()},
        {"shift": (0.4, -0.1)},
    ):
        assert (scores(replace(case, **wrong)) > 4).any()
    assert (scores(case, n=N // 2) > 4).any()


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"matrix": ((1.0, 0.0),)}, "matrix has 1 rows"),
        ({"mean_matrix": ((1.0, 0.0, 0.0),) * 2}, r"mean_matrix has 2 rows of \[3\] numbers; expected 2 rows.* long"),
        ({"sigma": ((1.0, 0.0), (1.0,))}, r"sigma has 2 rows of \[1, 2\] numbers.*all of one length"),
        ({"sigma": ()}, "sigma has 0 rows"),
        ({"common_sigma": ((1.0,),)}, "common_sigma has 1 rows"),
        ({"shift": (1.0,)}, "shift has 1 numbers; expected 2"),
        ({"initial_covariance": ((1.0, 2.0), (2.0, 1.0))}, "not a covariance"),
    ],
)
def test_matrices_that_do_not_fit_are_refused(wrong, what):
    with pytest.raises(ValueError, match=what):
        CorrelatedLinear(**wrong)
