"""Two populations in one run against loops, Euler's own moments given their sizes, and the limit's equations."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import mfsde
from mfsde import EmpiricalMeasure
from mfsde.scenarios.two_populations import TwoPopulations

FLOAT64 = torch.float64
CASE = TwoPopulations()


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def states(*lead: int, seed: int = 0) -> Tensor:
    """Positions with the labels 0, 1, 1, 0, 1, ..."""
    x = normals(*lead, 2, seed=seed)
    x[..., 1] = torch.tensor([0.0, 1, 1, 0, 1, 1, 0] * lead[-1])[: lead[-1]]
    return x


def z_scores(samples: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Deviations of the mean over replicas (axis 0) in its standard errors."""
    error = samples.std(0, ddof=1) / math.sqrt(len(samples))
    return np.abs(samples.mean(0) - expected) / error


def looped(case: TwoPopulations, at: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    out = np.zeros_like(at)
    for i, (place, label) in enumerate(at):
        a = int(label)
        out[i, 0] = -case.kappa[a] * place
        for b in (0, 1):
            members = [j for j in range(len(x)) if x[j, 1] == b]
            if sum(w[j] for j in members) > 0:
                mean = sum(w[j] * x[j, 0] for j in members) / sum(w[j] for j in members)
                out[i, 0] -= case.coupling[a][b] * (place - mean)
    return out


@pytest.mark.parametrize("weighted", [False, True])
def test_the_drift_is_its_formula(weighted):
    x, at = states(2, 7), states(2, 5, seed=3)
    mu = EmpiricalMeasure(x, torch.softmax(normals(2, 7, seed=1), -1) if weighted else None)
    for points in (x, at):
        b = CASE.drift(0.0, points, mu).numpy()
        for r in range(2):
            there = points[r].numpy(), x[r].numpy(), mu.weights[r].numpy()
            np.testing.assert_allclose(b[r], looped(CASE, *there), rtol=0, atol=1e-13)
            swapped = replace(CASE, coupling=((0.0, -3.0), (2.0, 2.0)))
            assert not np.allclose(b[r], looped(swapped, *there), atol=1e-2)
    sigma = CASE.diffusion(0.0, x, mu)
    np.testing.assert_array_equal(sigma[..., 1].numpy(), np.zeros((2, 7)))
    np.testing.assert_array_equal(sigma[..., 0].numpy(), np.where(x[..., 1] == 1, 0.6, 0.4))
    single = CASE.drift(0.0, x.float(), EmpiricalMeasure(x.float()))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), CASE.drift(0.0, x, EmpiricalMeasure(x)), rtol=0, atol=1e-5)


def test_a_population_without_particles_draws_nobody():
    x = states(2, 7)
    x[1, :, 1] = 0.0
    mu = EmpiricalMeasure(x)
    b = CASE.drift(0.0, x, mu)
    np.testing.assert_allclose(b[1].numpy(), looped(CASE, x[1].numpy(), x[1].numpy(), np.full(7, 1 / 7)), atol=1e-14)
    assert b.isfinite().all()
    assert CASE.masses(mu)[1].tolist() == [1.0, 0.0]
    assert CASE.means(mu)[1, 1] == CASE.variances(mu)[1, 1] == 0


def test_populations_are_binomial_and_frozen():
    run = mfsde.simulate(CASE, n_particles=50, n_replicas=400, horizon=0.2, dt=0.1, seed=1, dtype=FLOAT64)
    labels = run.position.values[..., 1]
    assert set(np.unique(labels)) == {0.0, 1.0}
    np.testing.assert_array_equal(labels[0], labels[-1])
    share = labels[0].mean(-1)
    found = np.stack([share, (share - 0.4) ** 2], -1)
    assert (z_scores(found, np.array([0.4, 0.4 * 0.6 / 50])) < 4).all()
    assert (z_scores(found, np.array([0.45, 0.4 * 0.6 / 50])) > 4).any()
    np.testing.assert_allclose(run.population_mass.values[0, :, 1], share, atol=1e-12)


# Moments --------------------------------------------------------------------------------------------------------------

DT, STEPS = 0.05, 20


def euler_moments(case: TwoPopulations, dt: float = DT, steps: int = STEPS) -> np.ndarray:
    """Means, and variances within, (4,), by Euler's recursion.

    The means of populations of any size follow that of the limit on average, and so do variances divided by n - 1.
    """
    m, v = np.array(case.initial_mean), np.array(case.initial_variance)
    a = np.array(case.coupling)
    rates = np.array(case.kappa) + a.sum(-1)
    for _ in range(steps):
        m, v = m + dt * (a @ m - rates * m), (1 - dt * rates) ** 2 * v + dt * np.array(case.sigma) ** 2
    return np.concatenate([m, v])


def test_populations_follow_eulers_moments():
    run = mfsde.simulate(
        CASE, n_particles=60, n_replicas=400, horizon=DT * STEPS, dt=DT, seed=2, keep_particles=0, dtype=FLOAT64
    )
    sizes = 60 * run.population_mass.values[-1]
    assert sizes.min() > 5
    unbiased = run.population_variance.values[-1] * sizes / (sizes - 1)
    found = np.concatenate([run.population_mean.values[-1], unbiased], -1)
    assert (z_scores(found, euler_moments(CASE)) < 4).all()
    for wrong in (
        {"sigma": (0.4, 0.65)},
        {"sigma": (0.6, 0.4)},
        {"kappa": (1.1, 1.5)},
        {"coupling": ((0.0, -3.0), (2.0, 2.0))},
        {"coupling": ((0.0, 2.0), (-3.0, 2.2))},
    ):
        assert (z_scores(found, euler_moments(replace(CASE, **wrong))) > 4).any()


@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_the_limit_solves_the_equations_of_the_moments(t):
    law = CASE.limit(t)
    found = [float(part.mean[0]) for part in law.components] + [float(part.cov[0, 0]) for part in law.components]
    fine, finer = (euler_moments(CASE, t / n, n) for n in (2000, 4000))
    np.testing.assert_allclose(found, 2 * finer - fine, rtol=0, atol=2e-6)
    assert law.weights.tolist() == [0.6, 0.4]
    assert [float(part.mean[1]) for part in law.components] == [0.0, 1.0]


def test_the_limit_without_any_pull_is_a_brownian_motion():
    free = TwoPopulations(kappa=(0.0, 1.0), coupling=((0.0, 0.0), (0.0, 0.0)))
    first, second = free.limit(2.0).components
    assert float(first.cov[0, 0]) == pytest.approx(0.3 + 0.16 * 2)
    assert float(second.mean[0]) == pytest.approx(-math.exp(-2))


def test_the_drift_of_the_limit_moves_its_means():
    """On the quadrature of the limit itself, a weighted measure."""
    t, h = 0.5, 1e-5
    law = CASE.limit(t).as_measure()
    b, members = CASE.drift(t, law.points, law)[:, 0], law.points[:, 1]
    for a in (0, 1):
        mass = law.weights * (members == a)
        rate = CASE.limit(t + h).components[a].mean[0] - CASE.limit(t - h).components[a].mean[0]
        assert float((mass * b).sum() / mass.sum()) == pytest.approx(float(rate) / (2 * h), abs=1e-8)


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"kappa": (1.0,)}, "are two numbers, one for each population"),
        ({"coupling": ((0.0, 1.0),)}, "and coupling two rows of two"),
        ({"share": 1.0}, "strictly between 0 and 1"),
    ],
)
def test_impossible_parameters_are_refused(wrong, what):
    with pytest.raises(ValueError, match=what):
        TwoPopulations(**wrong)
