"""Consensus-based optimisation against loops, Euler's own decay of the spread, and the minimisers it looks for."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import mfsde
from mfsde import EmpiricalMeasure
from mfsde.limit import moments
from mfsde.model import Equation
from mfsde.scenarios.consensus import OBJECTIVES, ConsensusBased

FLOAT64 = torch.float64


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def z_scores(samples: np.ndarray, expected: float) -> float:
    """Deviation of the mean over replicas in its standard errors."""
    return float(abs(samples.mean() - expected) / (samples.std(ddof=1) / math.sqrt(len(samples))))


# Objective and consensus point ----------------------------------------------------------------------------------------

FORMULAS = {
    "quadratic": lambda z: 0.5 * (z**2).sum(),
    "rastrigin": lambda z: (z**2 - 10 * np.cos(2 * np.pi * z) + 10).sum(),
    "ackley": lambda z: (
        -20 * np.exp(-0.2 * np.linalg.norm(z) / math.sqrt(len(z))) - np.exp(np.cos(2 * np.pi * z).mean()) + 20 + np.e
    ),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives_are_their_formulas_and_least_at_the_minimiser(objective):
    case = ConsensusBased(objective, minimiser=(0.5, -1.0, 2.0))
    x = 2 * normals(2, 5, 3)
    wanted = [[FORMULAS[objective](x[r, i].numpy() - [0.5, -1.0, 2.0]) for i in range(5)] for r in range(2)]
    np.testing.assert_allclose(case.value(x).numpy(), wanted, rtol=1e-12)
    assert case.value(torch.tensor([0.5, -1.0, 2.0], dtype=FLOAT64)).abs() < 1e-14
    assert (case.value(x) > 0.1).all()


def looped(case: ConsensusBased, x: np.ndarray, w: np.ndarray, sign: float = -1.0) -> np.ndarray:
    shares = np.zeros(len(x))
    for j, y in enumerate(x):
        shares[j] = w[j] * math.exp(sign * case.alpha * FORMULAS[case.objective](y - np.array(case.minimiser)))
    total: np.ndarray = (shares[:, None] * x).sum(0) / shares.sum()
    return total


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("weighted", [False, True])
def test_drift_and_diffusion_are_their_formulas(objective, weighted):
    case = ConsensusBased(objective, (0.3, -0.2), alpha=0.7, attraction=1.3, sigma=0.8)
    x, at = normals(2, 6, 2), normals(2, 4, 2, seed=3)
    mu = EmpiricalMeasure(x, torch.softmax(normals(2, 6, seed=1), -1) if weighted else None)
    for points in (x, at):
        b, own = case.drift(0.0, points, mu).numpy(), case.diffusion(0.0, points, mu).numpy()
        isotropic = replace(case, isotropic=True).diffusion(0.0, points, mu).numpy()
        for r in range(2):
            z = points[r].numpy() - looped(case, x[r].numpy(), mu.weights[r].numpy())
            np.testing.assert_allclose(b[r], -1.3 * z, rtol=0, atol=1e-13)
            np.testing.assert_allclose(own[r], 0.8 * z, rtol=0, atol=1e-13)
            np.testing.assert_allclose(isotropic[r], 0.8 * np.linalg.norm(z, axis=-1)[:, None], rtol=0, atol=1e-13)
            wrong = points[r].numpy() - looped(case, x[r].numpy(), mu.weights[r].numpy(), sign=1.0)
            assert not np.allclose(b[r], -1.3 * wrong, atol=1e-3)
    single = case.drift(0.0, x.float(), EmpiricalMeasure(x.float()))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), case.drift(0.0, x, EmpiricalMeasure(x)), rtol=0, atol=1e-5)
    assert Equation(case, x).form == "diagonal"


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
def test_a_large_alpha_takes_the_best_particle(dtype):
    x = 100 * normals(3, 50, 2).to(dtype)
    case = ConsensusBased(alpha=1e6)
    best = x.gather(1, case.value(x).argmin(-1)[:, None, None].expand(3, 1, 2))
    torch.testing.assert_close(case.consensus(EmpiricalMeasure(x)), best)
    # A particle without mass has no say, wherever it is.
    weights = torch.full((3, 50), 1 / 49, dtype=dtype)
    weights.scatter_(1, case.value(x).argmin(-1, keepdim=True), 0.0)
    second = case.value(x).argsort(-1)[:, 1]
    found = case.consensus(EmpiricalMeasure(x, weights))
    torch.testing.assert_close(found, x.gather(1, second[:, None, None].expand(3, 1, 2)))


# Decay without an objective -------------------------------------------------------------------------------------------

LINEAR = ConsensusBased("quadratic", (0.0, 0.0, 0.0), alpha=0.0, attraction=1.0, sigma=0.6, initial_variance=1.0)
N, REPLICAS, DT, STEPS = 30, 600, 0.05, 20
KNOWN = {True: 0.3985190410845142, False: 0.19398004229089189}  # E|X - EX|²/3 at t = 1 in the limit


def euler_factor(case: ConsensusBased, n: float, dt: float) -> float:
    """E V_{k+1}/E V_k of V = (1/N) Σ|X - X̄|² by Euler: (1 - λh)² + σ²h(1 - 1/N), times d in the last for isotropic."""
    spread = case.sigma**2 * dt * (1 - 1 / n)
    return (1 - case.attraction * dt) ** 2 + spread * (case.dim if case.isotropic else 1)


@pytest.mark.parametrize("isotropic", [True, False])
def test_the_spread_decays_as_euler_says(isotropic):
    case = replace(LINEAR, isotropic=isotropic)
    run = mfsde.simulate(
        case, n_particles=N, n_replicas=REPLICAS, horizon=DT * STEPS, dt=DT, seed=6, keep_particles=0, dtype=FLOAT64
    )
    found = run.spread.values[-1]

    def expected(scenario: ConsensusBased, n: float = N, dt: float = DT) -> float:
        return float(3 * (1 - 1 / n) * euler_factor(scenario, n, dt) ** STEPS)

    assert z_scores(found, expected(case)) < 4
    for wrong in ({"sigma": 0.8}, {"attraction": 1.1}, {"attraction": -1.0}, {"isotropic": not isotropic}):
        assert z_scores(found, expected(replace(case, **wrong))) > 4
    assert z_scores(found, expected(case, dt=1.0)) > 4
    # N → ∞ and dt → 0 of the same formula is the known law; the mean stays.
    assert euler_factor(case, math.inf, 1e-6) ** 10**6 == pytest.approx(KNOWN[isotropic], rel=1e-5)
    for k in range(3):
        assert z_scores(run.consensus.values[-1, :, k] - run.consensus.values[0, :, k], 0.0) < 4


@pytest.mark.parametrize("isotropic", [True, False])
def test_the_moments_of_the_limit_decay_as_known(isotropic):
    found = moments(replace(LINEAR, isotropic=isotropic), [0.0, 1.0])
    assert np.trace(found.covariance.values[1]) == pytest.approx(3 * KNOWN[isotropic], rel=1e-9)
    np.testing.assert_allclose(found["mean"].values[1], [1.0, 1.0, 1.0], atol=1e-12)


# Minimisers -----------------------------------------------------------------------------------------------------------


def successes(case: ConsensusBased) -> float:
    """Share of replicas whose consensus point ends within 0.25 of the minimiser, in every component."""
    run = mfsde.simulate(case, n_particles=200, n_replicas=60, horizon=8.0, dt=0.04, seed=1, keep_particles=0)
    near = np.abs(run.consensus.values[-1] - np.array(case.minimiser)).max(-1) < 0.25
    assert (run.spread[-1] < run.spread[0]).all()
    return float(near.mean())


@pytest.mark.parametrize(("objective", "minimiser"), [("rastrigin", (0.0, 0.0)), ("ackley", (2.0, -0.5))])
def test_the_minimiser_is_found(objective, minimiser):
    case = ConsensusBased(objective, minimiser)
    assert successes(case) >= 0.95
    # Not by those that start around (1, 1) and pay no heed to the objective.
    assert successes(replace(case, alpha=0.0)) < 0.3


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"objective": "rosenbrock"}, "objective = 'rosenbrock'; expected one of quadratic, rastrigin, ackley"),
        ({"minimiser": ()}, "minimiser has 0 numbers"),
        ({"alpha": -1.0}, "and α >= 0"),
    ],
)
def test_impossible_parameters_are_refused(wrong, what):
    with pytest.raises(ValueError, match=what):
        ConsensusBased(**wrong)
