"""Walls that stand and walls that move: mirrored steps against exact modes, stationary laws and the push of a wall."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

import mfsde
from mfsde import EmpiricalMeasure
from mfsde.scenarios.moving_wall import MovingWall
from mfsde.scenarios.reflected_interaction import ReflectedInteraction, mirrored

FLOAT64 = torch.float64
BOX = ReflectedInteraction(coupling=2.0, sigma=0.6, low=-0.5, high=1.5, initial_share=0.3)
WALL = MovingWall(length=1.0, speed=0.6, sigma=0.5, modulation=0.7, frequency=0.8, initial_share=0.3)


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def cosine_modes(share: float, orders: np.ndarray) -> np.ndarray:
    """E cos(nπξ) for ξ uniform on [0, share]."""
    return np.sin(orders * math.pi * share) / (orders * math.pi * share)


def scores(unit: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Distances of the modes E cos(nπξ), n = 1, ..., from what is wanted, in standard errors.    unit: (R, N)."""
    found = np.stack([np.cos((n + 1) * math.pi * unit).mean(-1) for n in range(len(wanted))])
    return np.abs(found.mean(1) - wanted) / (found.std(axis=1, ddof=1) / math.sqrt(found.shape[1]))


ORDERS = np.arange(1, 6)


# Standing walls -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mirroring_is_reflection_as_often_as_it_takes(dtype):
    x = (8 * normals(500)).to(dtype)
    wanted = []
    for y in x.double().tolist():
        while not 0 <= y <= 1.3:
            y = -y if y < 0 else 2 * 1.3 - y
        wanted.append(y)
    found = mirrored(x, 1.3)
    torch.testing.assert_close(found.double(), torch.tensor(wanted, dtype=FLOAT64), rtol=0, atol=5e-6)
    assert found.min() >= 0
    assert found.max() <= 1.3
    inside = torch.rand(100, generator=torch.Generator().manual_seed(1)).to(dtype)
    torch.testing.assert_close(mirrored(inside, 1.3), inside, rtol=0, atol=2e-7)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_drift_attracts_and_is_minus_the_derivative_of_the_energy(weighted):
    x, w = normals(2, 6, 1), torch.softmax(normals(2, 6, seed=1), -1)
    mu = EmpiricalMeasure(x, w if weighted else None)
    mean = (mu.weights[..., None] * x).sum(1, keepdim=True)
    drift = BOX.drift(0.0, x, mu)
    torch.testing.assert_close(drift, -2.0 * (x - mean), rtol=0, atol=1e-13)
    torch.testing.assert_close(drift, -BOX.energy.intrinsic_derivative(mu, x), rtol=0, atol=1e-12)
    assert not torch.allclose(drift, BOX.energy.intrinsic_derivative(mu, x), atol=1e-2)
    pairs = 2.0 * mfsde.interaction(lambda z: 0.5 * z.square().sum(-1))(mu)
    torch.testing.assert_close(BOX.energy(mu), pairs, rtol=1e-12, atol=0)


def test_particles_stay_between_their_walls():
    run = mfsde.simulate(
        replace(BOX, sigma=3.0), n_particles=200, n_replicas=2, horizon=2.0, dt=0.1, seed=1, save_every=1
    )
    assert run.position.values.min() >= np.float32(-0.5)
    assert run.position.values.max() <= np.float32(1.5)


@dataclass(frozen=True)
class Stopped(ReflectedInteraction):
    """Particles put back onto the wall in place of mirrored."""

    def project(self, x):
        return x.clamp(self.low, self.high)


def free_modes(cls: type, sigma: float) -> np.ndarray:
    case = cls(coupling=0.0, sigma=0.6, low=-0.5, high=1.5, initial_share=0.3)
    run = mfsde.simulate(case, n_particles=2000, n_replicas=16, horizon=0.8, dt=0.1, seed=3, dtype=FLOAT64)
    unit = (run.position.values[-1, :, :, 0] + 0.5) / 2.0
    wanted = cosine_modes(0.3, ORDERS) * np.exp(-0.5 * (ORDERS * math.pi * sigma / 2.0) ** 2 * 0.8)
    return scores(unit, wanted)


def test_free_mirrored_steps_have_the_modes_of_the_heat_equation_at_any_step():
    # Folding a Gaussian step is the Neumann heat kernel: no bias in dt.
    assert free_modes(ReflectedInteraction, 0.6).max() < 4
    assert free_modes(ReflectedInteraction, 0.66).max() > 4
    assert free_modes(Stopped, 0.6).max() > 4


def test_the_stationary_law_is_a_gaussian_between_its_walls():
    law = mfsde.limit.gibbs(BOX)
    deviation = BOX.sigma / math.sqrt(2 * BOX.coupling)
    known = stats.truncnorm(-1.0 / deviation, 1.0 / deviation, loc=0.5, scale=deviation)
    assert float(law.mean) == pytest.approx(0.5, abs=1e-8)
    assert float(law.cov) == pytest.approx(known.var(), abs=1e-5)
    x = torch.linspace(-0.4, 1.4, 7, dtype=FLOAT64)[:, None]
    difference = law.log_prob(x) - BOX.stationary_log_density(x)
    assert (difference - difference[0]).abs().max() < 1e-4
    wrong = law.log_prob(x) - replace(BOX, sigma=0.7).stationary_log_density(x)
    assert (wrong - wrong[0]).abs().max() > 1e-1
    assert BOX.stationary_log_density(torch.tensor([[-0.51], [1.51]])).tolist() == [-math.inf] * 2
    # Without walls every centre would do; here one alone.
    assert len(mfsde.limit.gibbs_all(BOX)) == 1


def test_particles_follow_the_fokker_planck_equation_with_walls():
    times = np.array([0.0, 0.5, 1.0, 2.0])
    settings = {"n_particles": 2000, "n_replicas": 32, "horizon": 2.0, "keep_particles": 0}
    coarse = mfsde.simulate(BOX, dt=0.02, noise=mfsde.Noise(5, substeps=2), seed=5, save_every=25, **settings)
    fine = mfsde.simulate(BOX, dt=0.01, seed=5, save_every=50, **settings)
    # The bias of mirrored Euler steps of order dt cancels.
    found = [
        2 * fine[name].values[..., 0].reshape(5, 32) - coarse[name].values[..., 0].reshape(5, 32)
        for name in ("mean", "covariance")
    ]
    found = np.stack(found)[:, [0, 1, 2, 4]].astype(float)
    error = found.std(axis=-1, ddof=1) / math.sqrt(32)

    def largest(case: ReflectedInteraction) -> float:
        limit = mfsde.limit.fokker_planck(case, None, times, n_nodes=65, rtol=1e-6, energies=False)
        wanted = np.stack([limit["mean"].values[:, 0], limit.covariance.values[:, 0, 0]])
        return float((np.abs(found.mean(-1) - wanted) / error).max())

    # The limit's own error is 1e-6 here, standard errors 1e-4 and more.
    assert largest(BOX) < 4
    assert largest(replace(BOX, coupling=2.3)) > 4
    assert largest(replace(BOX, sigma=0.65)) > 4


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"low": 1.0}, "expected low < high"),
        ({"initial_share": 0.0}, r"a share in \(0, 1\]"),
        ({"initial_share": 1.5}, r"a share in \(0, 1\]"),
        ({"coupling": -1.0}, "an attraction"),
    ],
)
def test_boxes_that_are_none_are_refused(fields, text):
    with pytest.raises(ValueError, match=text):
        ReflectedInteraction(**fields)


# A moving wall --------------------------------------------------------------------------------------------------------


def clock(case: MovingWall, dt: float, steps: int) -> float:
    """Euler's own Σ σ(t_k)² h/L(t_{k+1})²."""
    return sum(case.intensity(k * dt) ** 2 * dt / case.wall((k + 1) * dt) ** 2 for k in range(steps))


def stretched_modes(run_as: MovingWall, wanted_of: MovingWall, dt: float = 0.1, steps: int = 10) -> np.ndarray:
    run = mfsde.simulate(
        run_as, n_particles=2000, n_replicas=16, horizon=dt * steps, dt=dt, seed=2, dtype=FLOAT64, save_every=None
    )
    unit = run.position.values[-1, :, :, 0] / wanted_of.wall(dt * steps)
    decay = np.exp(-0.5 * (ORDERS * math.pi) ** 2 * clock(wanted_of, dt, steps))
    return scores(unit, cosine_modes(wanted_of.initial_share, ORDERS) * decay)


@dataclass(frozen=True)
class Late(MovingWall):
    """Reflected where the wall stood at the start of the step."""

    def project_at(self, t, x):
        return super().project_at(t - 0.1, x)


@pytest.mark.parametrize("speed", [0.6, -0.4])
def test_stretched_steps_have_their_modes_at_any_step(speed):
    case = replace(WALL, speed=speed)
    assert stretched_modes(case, case).max() < 4
    # A medium that does not stretch, a frozen σ, a wall that stands.
    for wrong in ({"stretch": 0.0}, {"modulation": 0.0}, {"speed": 0.0}):
        assert stretched_modes(replace(case, **wrong), case).max() > 4


def test_eulers_clock_tends_to_that_of_the_equation():
    exact = integrate.quad(lambda s: WALL.intensity(s) ** 2 / WALL.wall(s) ** 2, 0, 1)[0]
    gaps = [clock(WALL, 1 / k, k) - exact for k in (200, 400)]
    assert gaps[0] / gaps[1] == pytest.approx(2, abs=0.02)


def uniform_scores(case: MovingWall, dt: float = 0.1) -> np.ndarray:
    run = mfsde.simulate(case, n_particles=2000, n_replicas=16, horizon=1.0, dt=dt, seed=4, dtype=FLOAT64)
    law = MovingWall(length=1.0, speed=case.speed).limit(1.0)
    return scores(law.cdf(torch.tensor(run.position.values[-1, :, :, 0])).numpy(), np.zeros(len(ORDERS)))


@pytest.mark.parametrize("speed", [0.6, -0.4])
def test_a_uniform_medium_stays_uniform(speed):
    case = replace(WALL, speed=speed, initial_share=1.0)
    assert uniform_scores(case).max() < 4
    assert uniform_scores(replace(case, stretch=0.0)).max() > 4
    assert uniform_scores(replace(case, initial_share=0.5)).max() > 4
    assert uniform_scores(Late(**vars(case))).max() > 4


def test_a_limit_exists_where_the_medium_fills_its_domain():
    law = MovingWall(length=2.0, speed=0.5).limit(3.0)
    assert (float(law.low), float(law.high)) == (0.0, 3.5)
    assert not hasattr(WALL, "limit")
    assert not hasattr(MovingWall(stretch=0.0), "limit")
    with pytest.raises(AttributeError, match="for stretch = initial_share = 1"):
        _ = WALL.limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wall_pushes_a_quiet_medium_before_it(dtype):
    case = MovingWall(length=1.0, speed=-0.4, sigma=0.0, stretch=0.0)
    dt = 0.05
    run = mfsde.simulate(case, n_particles=300, horizon=2.0, dt=dt, seed=1, save_every=1, dtype=dtype)
    x, wall = run.position.values[:, 0, :, 0].astype(float), 1 - 0.4 * run.time.values[:, None]
    assert (x <= wall + 1e-6).all()
    gap = np.abs(x - np.minimum(x[0], wall))
    # A mirrored point lies behind the wall by no more than the wall moved.
    assert gap.max() <= 0.4 * dt + 1e-6
    assert gap[-1].max() > 0
    # Without the wall nothing would have moved.
    assert np.abs(x[-1] - x[0]).max() > 0.5


def test_particles_stay_behind_a_moving_wall_at_every_time():
    case = replace(WALL, speed=-0.3, sigma=2.0)
    run = mfsde.simulate(case, n_particles=200, n_replicas=2, horizon=2.0, dt=0.05, seed=3, save_every=1, dtype=FLOAT64)
    wall = 1 - 0.3 * run.time.values[:, None, None]
    assert (run.position.values[..., 0] >= 0).all()
    assert (run.position.values[..., 0] <= wall + 1e-15).all()
    assert ((run.outer.values >= 0) & (run.outer.values <= 1)).all()


def test_walls_that_meet_end_the_run():
    case = MovingWall(length=1.0, speed=-1.0)
    with pytest.raises(ValueError, match="the walls have met"):
        mfsde.simulate(case, n_particles=10, horizon=2.0, dt=0.1, seed=0)
    with pytest.raises(ValueError, match=r"End the run before t = 1\."):
        case.wall(1.5)
    with pytest.raises(ValueError, match="positive distance of the walls"):
        MovingWall(length=0.0)
    with pytest.raises(ValueError, match=r"a share in \(0, 1\]"):
        MovingWall(initial_share=2.0)


def test_coefficients_depend_on_time():
    x = torch.tensor([[[0.5]]], dtype=FLOAT64)
    mu = EmpiricalMeasure(x)
    assert float(WALL.drift(1.0, x, mu)) == pytest.approx(0.5 * 0.6 / 1.6)
    assert WALL.diffusion(0.0, x, mu) == 0.5
    assert WALL.diffusion(0.3, x, mu) == pytest.approx(0.5 * (1 + 0.7 * math.sin(2 * math.pi * 0.8 * 0.3)))
