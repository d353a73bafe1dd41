"""Granular media: the sorted force, its energy, the exact collision of two grains, cooling and contraction."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

import mfsde
from mfsde import EmpiricalMeasure
from mfsde.noise import Noise
from mfsde.scenarios.granular_media import GranularMedia

FLOAT64 = torch.float64


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def pairwise(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Σ_j w_j |x_i - y_j|(x_i - y_j), written out.    (M, d), (N, d), (N,) -> (M, d)."""
    rows = [sum(w[j] * np.linalg.norm(p - y[j]) * (p - y[j]) for j in range(len(y))) for p in x]
    return np.stack(rows)


# Force and energy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_drift_is_the_sum_over_pairs(d, weighted, elsewhere):
    case = GranularMedia(stiffness=0.4)
    points, w = normals(2, 9, d), torch.softmax(normals(2, 9, seed=1), -1)
    mu = EmpiricalMeasure(points, w if weighted else None)
    x = normals(2, 6, d, seed=2) if elsewhere else points
    found = case.drift(0.0, x, mu)
    for r in range(2):
        wanted = -pairwise(x[r].numpy(), points[r].numpy(), mu.weights[r].numpy()) - 0.4 * x[r].numpy()
        np.testing.assert_allclose(found[r].numpy(), wanted, atol=1e-13)
    np.testing.assert_allclose(
        found.numpy(), -mu.convolve(lambda z: z.norm(dim=-1, keepdim=True) * z, x).numpy() - 0.4 * x.numpy(), atol=1e-13
    )


def test_the_sorted_force_bears_ties_far_away_grains_and_shared_points():
    x = torch.tensor([[0.5], [0.5], [-1.0], [0.5], [2.0]], dtype=FLOAT64)
    wanted = -pairwise(x.numpy(), x.numpy(), np.full(5, 0.2))
    np.testing.assert_allclose(GranularMedia().drift(0.0, x, EmpiricalMeasure(x)).numpy(), wanted, atol=1e-15)
    # Moments around 0 would lose everything here: 1e8 squared against 1.
    far = EmpiricalMeasure(x + 2.0**26)
    np.testing.assert_allclose(GranularMedia().drift(0.0, far.points, far).numpy(), wanted, atol=1e-12)
    batch = EmpiricalMeasure(torch.stack([x, 2 * x]))
    found = GranularMedia().drift(0.0, x, batch)
    np.testing.assert_allclose(found[0].numpy(), wanted, atol=1e-15)
    np.testing.assert_allclose(found[1].numpy(), -pairwise(x.numpy(), 2 * x.numpy(), np.full(5, 0.2)), atol=1e-14)


def test_the_sorted_force_in_single_precision():
    x = normals(3, 5000, 1).float()
    found = GranularMedia().drift(0.0, x, EmpiricalMeasure(x))
    exact = GranularMedia().drift(0.0, x.double(), EmpiricalMeasure(x.double()))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("stiffness", [0.0, 0.7])
def test_the_drift_is_minus_the_intrinsic_derivative_of_the_energy(d, stiffness):
    case = GranularMedia(stiffness=stiffness)
    x, w = normals(2, 6, d), torch.softmax(normals(2, 6, seed=1), -1)
    for mu in (EmpiricalMeasure(x), EmpiricalMeasure(x, w)):
        drift = case.drift(0.0, x, mu)
        torch.testing.assert_close(drift, -case.energy.intrinsic_derivative(mu, x), rtol=0, atol=1e-12)
        for wrong in (2 * case.energy, -case.energy, GranularMedia(stiffness=stiffness + 0.1).energy):
            assert not torch.allclose(drift, -wrong.intrinsic_derivative(mu, x), atol=1e-3)


def test_the_energy_of_two_grains():
    mu = EmpiricalMeasure(torch.tensor([[-1.0], [1.0]], dtype=FLOAT64))
    # ½ ∬ |x - y|³/3 = ½ · ½ · 8/3; ½k ∫ x² = ½k.
    assert float(GranularMedia().energy(mu)) == pytest.approx(2 / 3, abs=1e-15)
    assert float(GranularMedia(stiffness=0.6).energy(mu)) == pytest.approx(2 / 3 + 0.3, abs=1e-15)


def test_gradients_go_through_the_sorted_force():
    x = normals(2, 5, 1).requires_grad_()

    def sorted_force(points: Tensor) -> Tensor:
        return GranularMedia().drift(0.0, points, EmpiricalMeasure(points))

    assert torch.autograd.gradcheck(sorted_force, (x,))


# Cooling without noise ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TwoGrains(GranularMedia):
    """Two grains at distance g₀ = 2: g' = -g², g = g₀/(1 + g₀t)."""

    sigma: float = 0.0

    def initial(self):
        return EmpiricalMeasure(torch.tensor([[-1.0], [1.0]], dtype=FLOAT64))


def test_two_grains_approach_like_one_over_time():
    def gap(dt: float) -> float:
        run = mfsde.simulate(TwoGrains(), n_particles=2, horizon=2.0, dt=dt, seed=0, dtype=FLOAT64)
        return float(np.ptp(run.position.values[-1]))

    recursion = 2.0
    for _ in range(20):
        recursion -= 0.1 * recursion**2
    assert gap(0.1) == pytest.approx(recursion, abs=1e-14)
    errors = [abs(gap(dt) - 2 / (1 + 2 * 2.0)) for dt in (0.02, 0.01)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.05)
    # Half the force would be another law by far.
    assert abs(gap(0.01) - 2 / (1 + 2.0)) > 50 * errors[1]


@pytest.mark.parametrize("d", [1, 2])
def test_a_cold_medium_cools_at_least_as_fast_as_haffs_law(d):
    case = GranularMedia(sigma=0.0, initial_mean=(0.0,) * d)
    run = mfsde.simulate(
        case, n_particles=200, n_replicas=2, horizon=4.0, dt=0.01, seed=1, save_every=20, dtype=FLOAT64,
        observables=["energy"],
    )  # fmt: skip
    v = d * run.temperature.values
    t = run.time.values[:, None]
    bound = v[0] / (1 + t * np.sqrt(2 * v[0])) ** 2
    # Euler's own v_{n+1} = v_n - h ∬|x - y|³ + h² ∫|b|²: the square adds less than 2 % at this step.
    assert (v <= 1.02 * bound).all()
    # The bound is of the right size: the same with twice the rate does not hold.
    assert (v[-1] > v[0] / (1 + 2 * t[-1] * np.sqrt(2 * v[0])) ** 2).all()
    assert (np.diff(run.energy.values, axis=0) < 0).all()


def test_the_energy_falls_with_the_mean_square_of_the_force():
    case = GranularMedia(stiffness=0.3)
    x, h = normals(4, 30, 1), 1e-6
    b = case.drift(0.0, x, EmpiricalMeasure(x))
    rate = (case.energy(EmpiricalMeasure(x + h * b)) - case.energy(EmpiricalMeasure(x - h * b))) / (2 * h)
    torch.testing.assert_close(rate, -b.square().sum(-1).mean(-1), rtol=1e-7, atol=0)


# Noise ----------------------------------------------------------------------------------------------------------------


def test_the_centre_of_mass_moves_by_the_mean_of_the_noise_alone():
    n, dt, steps = 40, 0.05, 20
    run = mfsde.simulate(
        GranularMedia(sigma=0.8), n_particles=n, n_replicas=3, horizon=steps * dt, dt=dt, seed=4, dtype=FLOAT64
    )
    noise = sum(Noise(4).increment(k, (3, n, 1), dtype=FLOAT64).mean(1) for k in range(steps))
    moved = run["mean"].values[-1] - run["mean"].values[0]
    np.testing.assert_allclose(moved, 0.8 * math.sqrt(dt) * noise.numpy(), atol=1e-13)
    held = mfsde.simulate(
        GranularMedia(sigma=0.8, stiffness=0.5), n_particles=n, n_replicas=3, horizon=1.0, dt=dt, seed=4, dtype=FLOAT64
    )
    assert np.abs(held["mean"].values[-1] - run["mean"].values[-1]).max() > 1e-2


def distances(seeds: tuple[int, int], variances=(0.5, 3.0)) -> tuple[np.ndarray, np.ndarray]:
    """Times and ∫|δ - mean δ|² under the coupling by indices, of two media: (T,), (T, R)."""
    settings = {"n_particles": 200, "n_replicas": 4, "horizon": 4.0, "dt": 0.01, "save_every": 20, "dtype": FLOAT64}
    runs = [
        mfsde.simulate(GranularMedia(sigma=0.6, initial_variance=v), seed=s, **settings)
        for v, s in zip(variances, seeds, strict=True)
    ]
    gap = runs[0].position.values - runs[1].position.values
    return runs[0].time.values, gap.var(axis=2)[..., 0]


def contracts(t: np.ndarray, squared: np.ndarray) -> bool:
    bound = squared[0] / (1 + t[:, None] * np.sqrt(squared[0] / 2)) ** 2
    return bool((squared <= 1.01 * bound).all() and (np.diff(squared, axis=0) < 0).all())


def test_media_with_the_same_noise_contract():
    assert contracts(*distances((7, 7)))
    # Under noises of their own they do not, and no law would say so.
    assert not contracts(*distances((7, 8)))


def test_laws_from_different_starts_become_one():
    t, squared = distances((7, 7), (0.1, 6.0))
    assert (squared[-1] < 0.03 * squared[0]).all()
    assert t[-1] == 4.0


def test_a_confined_medium_settles_at_its_gibbs_law():
    case = GranularMedia(stiffness=1.0, sigma=1.0, initial_variance=0.3)
    settings = {"n_particles": 2000, "n_replicas": 16, "horizon": 4.0, "keep_particles": 0}
    coarse = mfsde.simulate(case, dt=0.04, noise=mfsde.Noise(6, substeps=2), seed=6, **settings)
    fine = mfsde.simulate(case, dt=0.02, seed=6, **settings)
    second = [run.temperature.values[-1] + run["mean"].values[-1, :, 0] ** 2 for run in (coarse, fine)]
    # Euler's bias of order dt cancels; left are sampling, and O(1/N).
    found = 2 * second[1] - second[0]
    error = found.std(ddof=1) / math.sqrt(len(found))

    def score(scenario: GranularMedia) -> float:
        law = mfsde.limit.gibbs(scenario, n_nodes=257)
        return abs(found.mean() - float(law.cov[0, 0] + law.mean[0] ** 2)) / error

    assert score(case) < 4
    assert score(replace(case, sigma=1.1)) > 4
    assert score(replace(case, stiffness=1.2)) > 4
