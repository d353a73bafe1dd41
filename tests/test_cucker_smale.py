"""Cucker-Smale particles against pairwise loops, the two-particle closed form, and Euler's own moments."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

import mfsde
from mfsde import EmpiricalMeasure
from mfsde.limit import characteristics
from mfsde.model import Equation
from mfsde.scenarios.cucker_smale import CuckerSmale

FLOAT64 = torch.float64


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def z_scores(samples: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Deviations of the mean over replicas (axis 0) in its standard errors."""
    error = samples.std(0, ddof=1) / math.sqrt(len(samples))
    return np.abs(samples.mean(0) - expected) / error


# Drift ----------------------------------------------------------------------------------------------------------------


def looped(case: CuckerSmale, at: np.ndarray, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    d, out = case.dim, np.zeros_like(at)
    for i, (place, velocity) in enumerate(zip(at[:, :d], at[:, d:], strict=True)):
        out[i, :d] = velocity
        for j in range(len(x)):
            r = math.dist(place, x[j, :d])
            out[i, d:] += case.coupling * w[j] * (x[j, d:] - velocity) / (1 + r**2) ** case.decay
    return out


@pytest.mark.parametrize("decay", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("d", [1, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_drift_is_its_sum_over_pairs(decay, d, weighted):
    case = CuckerSmale(coupling=1.7, decay=decay, initial_velocity=(0.0,) * d)
    x, at, w = normals(2, 6, 2 * d), normals(2, 4, 2 * d, seed=3), torch.softmax(normals(2, 6, seed=1), -1)
    mu = EmpiricalMeasure(x, w if weighted else None)
    for points in (x, at):
        b = case.drift(0.0, points, mu).numpy()
        wanted = np.stack([looped(case, points[r].numpy(), x[r].numpy(), mu.weights[r].numpy()) for r in range(2)])
        np.testing.assert_allclose(b, wanted, rtol=0, atol=1e-13)
        assert not np.allclose(b, -wanted, atol=1e-2)
    single = case.drift(0.0, x.float(), EmpiricalMeasure(x.float(), w.float() if weighted else None))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), case.drift(0.0, x, mu), rtol=0, atol=1e-5)


def test_the_interaction_conserves_the_mean_velocity():
    case = CuckerSmale(sigma=0.0)
    run = mfsde.simulate(case, n_particles=30, n_replicas=2, horizon=2.0, dt=0.1, seed=1, dtype=FLOAT64)
    velocity = run.mean_velocity.values
    np.testing.assert_allclose(velocity[1], velocity[0], rtol=0, atol=1e-14)
    assert (run.velocity_variance[1] < 0.7 * run.velocity_variance[0]).all()


def test_noise_drives_velocities_only():
    x = normals(2, 5, 4)
    assert CuckerSmale(sigma=0.3).diffusion(0.0, x, EmpiricalMeasure(x)).tolist() == [0.0, 0.0, 0.3, 0.3]
    found = CuckerSmale(sigma=0.3, multiplicative=True).diffusion(0.0, x, EmpiricalMeasure(x))
    wanted = np.concatenate([np.zeros((2, 5, 2)), 0.3 * (x - x.mean(1, keepdim=True))[..., 2:].numpy()], -1)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=1e-15)
    assert Equation(CuckerSmale(), x).form == "diagonal"


# Two particles --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair(CuckerSmale):
    """Two particles at one place with relative velocity w₀, in a centred frame."""

    w0: float = 1.2

    def initial(self) -> EmpiricalMeasure:
        return EmpiricalMeasure(torch.tensor([[0.0, self.w0 / 2], [0.0, -self.w0 / 2]], dtype=FLOAT64))


PAIR = Pair(coupling=1.0, decay=1.0, sigma=0.0, initial_velocity=(0.0,))


def followed(case: Pair, horizon: float) -> tuple[float, float]:
    """Distance and relative velocity at the horizon, from the scenario's drift."""

    def slope(t: float, y: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(y.reshape(2, 2))
        return case.drift(t, x, EmpiricalMeasure(x)).numpy().ravel()

    start = case.initial().points.numpy().ravel()
    end = solve_ivp(slope, (0, horizon), start, method="DOP853", rtol=1e-11, atol=1e-12).y[:, -1].reshape(2, 2)
    return float(end[0, 0] - end[1, 0]), float(end[0, 1] - end[1, 1])


def test_two_particles_flock_at_the_known_distance():
    known = 2.5721516221263188  # tan(w₀/K + atan r₀), K = 1, r₀ = 0, w₀ = 1.2
    assert math.tan(1.2) == pytest.approx(known, abs=1e-14)
    distance, velocity = followed(PAIR, 200.0)
    assert distance == pytest.approx(known, abs=1e-8)
    assert abs(velocity) < 1e-9
    for wrong in (replace(PAIR, coupling=1.05), replace(PAIR, decay=0.95), replace(PAIR, w0=1.21)):
        assert abs(followed(wrong, 200.0)[0] - known) > 1e-2
    # Beyond Kπ/2 they part for ever, at the velocity w₀ - Kπ/2.
    parting, faster = followed(replace(PAIR, w0=1.2 + math.pi / 2), 400.0)
    assert parting > 400
    assert faster == pytest.approx(1.2, abs=1e-2)


def test_two_particles_take_the_steps_of_euler():
    run = mfsde.simulate(PAIR, n_particles=2, horizon=3.0, dt=0.1, seed=0, dtype=FLOAT64)
    r, w = 0.0, 1.2
    for _ in range(30):
        r, w = r + 0.1 * w, w - 0.1 * w / (1 + r**2)
    final = run.position.values[-1, 0]
    np.testing.assert_allclose(final[0] - final[1], [r, w], rtol=0, atol=1e-13)


# Constant kernel ------------------------------------------------------------------------------------------------------

ALIKE = CuckerSmale(coupling=0.8, decay=0.0, sigma=0.6, initial_position_variance=0.5, initial_velocity_variance=1.5)
N, REPLICAS, DT, STEPS = 20, 400, 0.05, 20


def euler_moments(case: CuckerSmale, n: int, dt: float = DT) -> np.ndarray:
    """E (1/N) Σ (D_x², D_v²) summed over d components, D the deviation from the mean, by Euler's own recursion."""
    share = 1 - 1 / n
    cov = share * np.diag([case.initial_position_variance, case.initial_velocity_variance])
    step = np.array([[1.0, dt], [0.0, 1 - case.coupling * dt]])
    for _ in range(STEPS):
        own = cov[1, 1] if case.multiplicative else 1.0
        cov = step @ cov @ step.T + np.diag([0.0, case.sigma**2 * dt * share * own])
    return case.dim * np.diag(cov)


@pytest.mark.parametrize("multiplicative", [False, True])
def test_spreads_follow_eulers_recursion(multiplicative):
    case = replace(ALIKE, multiplicative=multiplicative)
    run = mfsde.simulate(
        case, n_particles=N, n_replicas=REPLICAS, horizon=DT * STEPS, dt=DT, seed=3, keep_particles=0, dtype=FLOAT64
    )
    found = np.stack([run[name].values[-1] for name in ("position_variance", "velocity_variance")], -1)
    assert (z_scores(found, euler_moments(case, N)) < 4).all()
    assert (z_scores(found, euler_moments(case, 10**9)) > 4).any()  # the finite number shows
    for wrong in ({"sigma": 0.72}, {"coupling": -0.8}, {"coupling": 0.9}, {"multiplicative": not multiplicative}):
        assert (z_scores(found, euler_moments(replace(case, **wrong), N)) > 4).any()
    # Its mean moves by the noise alone: variance σ²t/N in every component (less where the noise is multiplicative).
    drift = run.mean_velocity.values[-1] - run.mean_velocity.values[0]
    assert (z_scores(drift, np.zeros(2)) < 4).all()
    if not multiplicative:
        assert (z_scores(drift**2, np.full(2, 0.36 * DT * STEPS / N)) < 4).all()


@pytest.mark.parametrize("t", [0.0, 0.3, 2.0])
def test_the_limit_of_the_constant_kernel(t):
    law, k = ALIKE.limit(t), ALIKE.coupling
    decay = math.exp(-2 * k * t)
    variance = 1.5 * decay + 0.36 * (1 - decay) / (2 * k)
    elapsed = (1 - math.exp(-k * t)) / k
    together = 1.5 * math.exp(-k * t) * elapsed + 0.18 * elapsed**2
    spread = 0.5 + 1.5 * elapsed**2 + 0.36 * (t - 2 * elapsed + (1 - decay) / (2 * k)) / k**2
    for place in (0, 1):
        block = law.cov[[place, place, place + 2, place + 2], [place, place + 2, place, place + 2]].numpy()
        np.testing.assert_allclose(block, [spread, together, together, variance], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(law.mean.numpy(), [t, 0.0, 1.0, 0.0], atol=1e-12)
    # The closed form at dt → 0, N → ∞ of the recursion that the particles were tested with.
    assert replace(ALIKE, sigma=0.0).limit(t).cov[2, 2].item() == pytest.approx(1.5 * decay, rel=1e-10)


def test_the_limit_is_missing_where_it_is_not_known():
    for case in (CuckerSmale(), replace(ALIKE, multiplicative=True)):
        assert not hasattr(case, "limit")
        with pytest.raises(AttributeError, match="it has one for decay = 0 and multiplicative = False"):
            _ = case.limit


def test_the_law_without_noise_is_carried_along_characteristics():
    """Weighted nodes: the mean velocity stays, the spread of velocities falls, and slower with a decaying kernel."""
    slow, fast = (
        characteristics(
            replace(ALIKE, sigma=0.0, initial_velocity=(1.0,), initial_position_variance=4.0, decay=decay),
            [0.0, 1.0],
            n_nodes=12,
        )
        for decay in (1.0, 0.0)
    )
    for found in (slow, fast):
        np.testing.assert_allclose(found["mean"].values[1], [1.0, 1.0], atol=1e-7)
    kept, rest = (found.covariance.values[1, 1, 1] / found.covariance.values[0, 1, 1] for found in (fast, slow))
    assert kept == pytest.approx(math.exp(-1.6), rel=1e-7)
    assert kept + 0.05 < rest < 0.95


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"decay": -0.1}, "decay = -0.1; expected β >= 0"),
        ({"initial_velocity_variance": -1.0}, "expected variances >= 0"),
    ],
)
def test_impossible_parameters_are_refused(wrong, what):
    with pytest.raises(ValueError, match=what):
        CuckerSmale(**wrong)
