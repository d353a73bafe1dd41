"""Particles driven by their rank against loops, their energy, Burgers' equation, and its Cole-Hopf solution."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm
from torch import Tensor

import mfsde
from mfsde import Dirac, EmpiricalMeasure, Gaussian, Noise, Observable
from mfsde.limit import fokker_planck
from mfsde.scenarios.rank_based import RankBased, distribution

FLOAT64 = torch.float64
SMOOTH = RankBased(sigma=0.6, initial_mean=-0.3, initial_variance=0.2)


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def z_scores(samples: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Deviations of the mean over replicas (axis 0) in its standard errors."""
    error = samples.std(0, ddof=1) / math.sqrt(len(samples))
    return np.abs(samples.mean(0) - expected) / error


# Drift and energy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_the_drift_counts_what_is_below_and_half_of_what_is_level(weighted):
    x = normals(2, 9, 1)
    x[:, 3], x[:, 7] = x[:, 5], x[:, 5]
    mu = EmpiricalMeasure(x, torch.softmax(normals(2, 9, seed=1), -1) if weighted else None)
    at = torch.cat([normals(2, 6, 1, seed=2), x[:, :2]], 1)
    for points in (x, at):
        found = SMOOTH.drift(0.0, points, mu).numpy()[..., 0]
        wanted = np.zeros_like(found)
        for r in range(2):
            for i, place in enumerate(points[r, :, 0].tolist()):
                for w, other in zip(mu.weights[r].tolist(), x[r, :, 0].tolist(), strict=True):
                    wanted[r, i] += w * (1.0 if other < place else 0.5 if other == place else 0.0)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-15)
        assert not np.allclose(found, 1 - wanted, atol=1e-2)
    single = SMOOTH.drift(0.0, x.float(), EmpiricalMeasure(x.float()))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), SMOOTH.drift(0.0, x, EmpiricalMeasure(x)), rtol=0, atol=1e-6)


def test_ranks_are_half_odd_and_their_mean_is_one_half():
    x = normals(3, 1000, 1)
    b = SMOOTH.drift(0.0, x, EmpiricalMeasure(x))
    ranks = x[..., 0].argsort(-1).argsort(-1).double()
    assert torch.equal(b[..., 0], (ranks + 0.5) / 1000)
    torch.testing.assert_close(b.mean(1), torch.full((3, 1), 0.5, dtype=FLOAT64), rtol=0, atol=1e-15)
    together = torch.zeros(1, 5, 1, dtype=FLOAT64)
    assert SMOOTH.drift(0.0, together, EmpiricalMeasure(together)).flatten().tolist() == [0.5] * 5


@pytest.mark.parametrize("weighted", [False, True])
def test_the_drift_is_minus_the_intrinsic_derivative_of_its_energy(weighted):
    x, w = normals(2, 7, 1), torch.softmax(normals(2, 7, seed=1), -1)
    mu = EmpiricalMeasure(x, w if weighted else None)
    mass = mu.weights
    pairs = (x - x.mT).abs() * mass.unsqueeze(-1) * mass.unsqueeze(-2)
    wanted = -0.5 * (mass * x[..., 0]).sum(-1) - 0.25 * pairs.sum((-2, -1))
    torch.testing.assert_close(SMOOTH.energy(mu), wanted, rtol=0, atol=1e-14)
    for at in (x, normals(2, 4, 1, seed=5), x.clone()):
        slope = SMOOTH.energy.intrinsic_derivative(mu, at)
        torch.testing.assert_close(SMOOTH.drift(0.0, at, mu), -slope, rtol=0, atol=1e-14)
        assert not torch.allclose(SMOOTH.drift(0.0, at, mu), slope, atol=1e-2)


# The limit ------------------------------------------------------------------------------------------------------------


def cole_hopf(case: RankBased, t: float, x: float) -> float:
    """F(t, x) by scipy's quadrature of the heat kernel."""
    deviation, s = math.sqrt(case.initial_variance), case.sigma * math.sqrt(t)

    def weight(y: float) -> float:
        z = (y - case.initial_mean) / deviation
        integral = deviation * (z * norm.cdf(z) + norm.pdf(z))
        return math.exp(-integral / case.sigma**2) * norm.pdf(y, x, s)

    span = {"limit": 200, "points": [x, case.initial_mean]}
    low, high = x - t - 10 * s, x + 10 * s
    total = quad(weight, low, high, **span)[0]
    return quad(lambda y: weight(y) * norm.cdf((y - case.initial_mean) / deviation), low, high, **span)[0] / total


@pytest.mark.parametrize("t", [0.2, 2.0])
def test_the_limit_of_a_gaussian_start_is_cole_and_hopfs(t):
    places = np.array([-1.0, -0.2, 0.3, 1.0, 2.0])
    found = SMOOTH.limit(t).cdf(torch.from_numpy(places)).numpy()
    np.testing.assert_allclose(found, [cole_hopf(SMOOTH, t, x) for x in places], rtol=0, atol=2e-8)
    assert abs(found - [cole_hopf(replace(SMOOTH, sigma=0.66), t, x) for x in places]).max() > 1e-3


def residual(case: RankBased, t: float, x: Tensor, sign: float = 1.0) -> float:
    """Largest |∂_t F + F ∂_x F - (σ²/2) ∂²_x F| by differences of the limit's distribution function and density."""
    h = 1e-3
    later, earlier, law = (case.limit(t + s) for s in (h, -h, 0.0))
    in_time = (later.cdf(x) - earlier.cdf(x)) / (2 * h)
    density, slope = law.log_prob(x[:, None]).exp(), (law.log_prob(x[:, None]).exp() * law.score(x[:, None])[:, 0])
    return float((in_time + sign * law.cdf(x) * density - 0.5 * case.sigma**2 * slope).abs().max())


@pytest.mark.parametrize("case", [SMOOTH, RankBased(sigma=0.6, initial_mean=-0.3)])
def test_the_limit_solves_burgers_equation(case):
    x = torch.linspace(-1.5, 2.5, 23, dtype=FLOAT64)
    assert residual(case, 1.0, x) < 2e-6
    assert residual(case, 1.0, x, sign=-1.0) > 0.05


@pytest.mark.parametrize(("sigma", "t"), [(0.5, 1.0), (0.1, 2.0), (1.5, 0.05)])
def test_a_heaviside_start_is_the_limit_of_narrow_ones(sigma, t):
    front, narrow = (RankBased(sigma, 0.7, variance).limit(t) for variance in (0.0, 1e-10))
    x = torch.linspace(0.7 - 2 * sigma, 0.7 + t + 2 * sigma, 41, dtype=FLOAT64)
    torch.testing.assert_close(front.cdf(x), narrow.cdf(x), rtol=0, atol=1e-7)
    # Symmetric about the middle of the wave, whose ends are at 0.7 and 0.7 + t.
    torch.testing.assert_close(front.cdf(x) + front.cdf(1.4 + t - x), torch.ones(41, dtype=FLOAT64), rtol=0, atol=1e-9)
    assert front.mean.item() == pytest.approx(0.7 + t / 2, abs=1e-9)
    u = torch.linspace(0.01, 0.99, 9, dtype=FLOAT64)
    torch.testing.assert_close(front.cdf(front.quantile(u)), u, rtol=0, atol=1e-10)


def test_the_front_is_a_fan_for_little_noise():
    x = torch.linspace(0.2, 0.8, 7, dtype=FLOAT64)
    torch.testing.assert_close(RankBased(sigma=0.02).limit(1.0).cdf(x), x, rtol=0, atol=2e-3)


def test_the_limit_starts_at_the_initial_law():
    assert isinstance(RankBased().limit(0.0), Dirac)
    assert isinstance(SMOOTH.limit(0.0), Gaussian)
    early, start = SMOOTH.limit(1e-6), SMOOTH.initial()
    x = torch.linspace(-1.5, 1.0, 11, dtype=FLOAT64)
    torch.testing.assert_close(early.cdf(x), start.cdf(x), rtol=0, atol=2e-6)


@dataclass(frozen=True)
class Backwards(RankBased):
    """A planted fault: the drift is 1 - F."""

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        return 1 - distribution(mu, x)


def gap_to_fokker_planck(case: RankBased, law: RankBased) -> float:
    with_energy = not isinstance(case, Backwards)
    found = fokker_planck(case, np.linspace(-4, 4.6, 259), [1.0], energies=with_energy)
    density = law.limit(1.0).log_prob(torch.tensor(found.x.values)[:, None]).exp().numpy()
    return float(np.abs(found.density.values[0] - density).max())


def test_the_fokker_planck_equation_agrees():
    """The same drift on weighted nodes."""
    assert gap_to_fokker_planck(SMOOTH, SMOOTH) < 2e-5
    assert gap_to_fokker_planck(SMOOTH, replace(SMOOTH, sigma=0.63)) > 1e-3
    assert gap_to_fokker_planck(Backwards(0.6, -0.3, 0.2), SMOOTH) > 1e-2


def test_the_free_energy_falls_at_the_rate_of_its_dissipation():
    found = fokker_planck(SMOOTH, np.linspace(-4, 4.6, 259), np.linspace(0.5, 0.6, 5))
    energy, dissipation = found.free_energy.values, found.dissipation.values
    slope = np.gradient(energy, found.time.values, edge_order=2)
    np.testing.assert_allclose(slope, -dissipation, rtol=2e-3)


# Particles ------------------------------------------------------------------------------------------------------------

PLACES = (-0.5, 0.0, 0.3, 0.8, 1.4)
BELOW = Observable("below", lambda t, x, mu: mu.integrate(lambda z: (z <= z.new_tensor(PLACES)).to(z.dtype)))


def shares(case: RankBased, dt: float, substeps: int) -> np.ndarray:
    """Shares of particles below some places at t = 1, by replica."""
    run = mfsde.simulate(
        case, n_particles=1000, n_replicas=100, horizon=1.0, dt=dt, seed=5, noise=Noise(5, substeps=substeps),
        observables=(BELOW,), keep_particles=0,
    )  # fmt: skip
    found: np.ndarray = run.below.values[-1].astype(float)
    return found


def test_particles_have_the_limits_distribution():
    """With Euler's O(dt) taken out by half the step on the same path; O(1/N) is below a tenth of the errors."""
    found = 2 * shares(SMOOTH, 0.05, 1) - shares(SMOOTH, 0.1, 2)
    places = torch.tensor(PLACES, dtype=FLOAT64)

    def scores(case: RankBased, t: float = 1.0) -> np.ndarray:
        return z_scores(found, case.limit(t).cdf(places).numpy())

    assert (scores(SMOOTH) < 4).all()
    for wrong in ({"sigma": 0.63}, {"initial_mean": -0.28}, {"initial_variance": 0.23}):
        assert (scores(replace(SMOOTH, **wrong)) > 4).any()
    assert (scores(SMOOTH, 1.05) > 4).any()
    reflected = replace(SMOOTH, initial_mean=0.3).limit(1.0)  # the wave of drift F - 1, seen in a mirror
    assert (z_scores(found, 1 - reflected.cdf(-places).numpy()) > 4).any()


def test_the_mean_of_the_particles_is_a_brownian_motion_with_drift_one_half():
    """Exactly, for Euler and every N: mean a + t/2, variance σ²t/N."""
    case, n = RankBased(sigma=0.8, initial_mean=0.5), 10
    run = mfsde.simulate(
        case, n_particles=n, n_replicas=400, horizon=1.0, dt=0.1, seed=2, keep_particles=0, dtype=FLOAT64
    )
    mean = run["mean"].values[-1, :, 0] - 1.0
    found = np.stack([mean, mean**2], -1)
    assert (z_scores(found, np.array([0.0, 0.64 / n])) < 4).all()
    assert (z_scores(found, np.array([0.5, 0.64 / n])) > 4).any()
    assert (z_scores(found, np.array([0.0, 0.64 / (n - 3)])) > 4).any()


@pytest.mark.parametrize("wrong", [{"sigma": 0.0}, {"initial_variance": -1.0}])
def test_impossible_parameters_are_refused(wrong):
    with pytest.raises(ValueError, match=r"expected σ > 0 .* and a variance >= 0"):
        RankBased(**wrong)
