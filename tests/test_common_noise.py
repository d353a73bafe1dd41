"""The law given the common noise, against closed forms and against particles with the same W⁰."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch

import mfsde
from mfsde.limit import fokker_planck
from mfsde.noise import Noise, Stream


@dataclass(frozen=True)
class Shared:
    """dX = -(κX + α(X - E[X|W⁰])) dt + σ dW + (s + c sin X) dW⁰."""

    kappa: float = 1.0
    coupling: float = 0.5
    sigma: float = 0.5
    shared: float = 0.4
    waves: float = 0.0

    def drift(self, t, x, mu):
        return -self.kappa * x - self.coupling * (x - mu.mean())

    def diffusion(self, t, x, mu):
        return self.sigma

    def common_diffusion(self, t, x, mu):
        return self.shared + self.waves * torch.sin(x)

    def initial(self):
        return mfsde.Gaussian([0.5], [[0.3]])


DT, SEED, REPLICAS = 0.02, 7, 4


def conditional_mean(scenario, steps):
    """Euler's recursion for E[X | W⁰] of a linear equation, with the increments of the runs."""
    mean = np.full(REPLICAS, 0.5)
    for step in range(steps):
        z = Noise(SEED).increment(step, (REPLICAS, 1, 1), stream=Stream.COMMON, dtype=torch.float64)[:, 0, 0].numpy()
        mean = mean - scenario.kappa * mean * DT + scenario.shared * math.sqrt(DT) * z
    return mean


def test_the_conditional_mean_is_that_of_the_path():
    limit = fokker_planck(Shared(), None, [0.0, 1.0], dt=DT, seed=SEED, n_replicas=REPLICAS, n_nodes=257)
    assert limit.density.dims == ("time", "replica", "x")
    # Drift and mass move in either order: both are exact for the mean.
    assert limit["mean"].values[1, :, 0] == pytest.approx(conditional_mean(Shared(), 50), abs=1e-6)
    assert np.abs(np.trapezoid(limit.density, limit.x) - 1).max() < 1e-12
    # Another seed is another path; so is another replica.
    assert np.ptp(limit["mean"].values[1, :, 0]) > 0.1
    other = fokker_planck(Shared(), None, [1.0], dt=DT, seed=SEED + 1, n_replicas=1, n_nodes=129)
    assert abs(float(other["mean"][0, 0, 0]) - float(limit["mean"][1, 0, 0])) > 1e-3


def test_the_conditional_variance_tends_to_the_one_without_common_noise_at_first_order():
    rate = 1.5
    wanted = 0.25 / 3 + (0.3 - 0.25 / 3) * math.exp(-2 * rate)

    def gap(dt):
        limit = fokker_planck(Shared(), None, [1.0], dt=dt, seed=SEED, n_nodes=129)
        return float(limit.covariance[0, 0, 0, 0]) - wanted

    gaps = [gap(dt) for dt in (0.04, 0.02, 0.01)]
    slopes = np.log2(np.array(gaps[:-1]) / np.array(gaps[1:]))
    assert slopes[-1] == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("waves", [0.0, 0.4])
def test_particles_with_the_same_common_noise_have_that_law(waves):
    scenario = replace(Shared(), waves=waves)
    settings = {"n_particles": 20_000, "n_replicas": REPLICAS, "horizon": 1.0, "seed": SEED, "keep_particles": 0}
    run = mfsde.simulate(scenario, dt=DT, observables=["mean", "covariance"], **settings)
    limit = fokker_planck(scenario, None, [0.0, 1.0], dt=DT, seed=SEED, n_replicas=REPLICAS, n_nodes=257)
    variance = limit.covariance.values[1, :, 0, 0]
    gap = run["mean"].values[1, :, 0] - limit["mean"].values[1, :, 0]
    # Independent given W⁰ up to O(1/N): the mean of N particles has variance v/N; both are Euler's, with errors in dt
    # that differ by the order of the drift and the noise inside a step.
    bound = 4 * np.sqrt(variance / 20_000) + 0.3 * DT * np.abs(limit["mean"].values[1, :, 0]) + 0.1 * DT * waves
    assert (np.abs(gap) < bound).all()
    spread = run["covariance"].values[1, :, 0, 0] / variance - 1
    assert (np.abs(spread) < 4 * math.sqrt(2 / 20_000) + 1.5 * DT).all()
    # The law of another path is not theirs, nor is one without the common noise.
    assert (np.abs(np.roll(gap + limit["mean"].values[1, :, 0], 1) - limit["mean"].values[1, :, 0]) > bound).any()
    assert (np.abs(run["mean"].values[1, :, 0] - 0.5 * math.exp(-1)) > bound).any()


def test_substeps_share_the_path():
    fine = fokker_planck(Shared(), None, [1.0], dt=0.01, noise=Noise(3), n_nodes=129)
    coarse = fokker_planck(Shared(), None, [1.0], dt=0.04, noise=Noise(3, substeps=4), n_nodes=129)
    apart = fokker_planck(Shared(), None, [1.0], dt=0.04, noise=Noise(3), n_nodes=129)
    near = abs(float(fine["mean"][0, 0, 0] - coarse["mean"][0, 0, 0]))
    assert near < 0.02
    assert abs(float(fine["mean"][0, 0, 0] - apart["mean"][0, 0, 0])) > 3 * near


@dataclass(frozen=True)
class Circle:
    """Brownian motion on the circle, all of it turned by W⁰."""

    period: ClassVar[float] = 2 * math.pi

    def drift(self, t, x, mu):
        return torch.zeros_like(x)

    def diffusion(self, t, x, mu):
        return 0.6

    def common_diffusion(self, t, x, mu):
        return 0.8

    def project(self, x):
        return torch.remainder(x, 2 * math.pi)

    def initial(self):
        return mfsde.Gaussian([3.0], [[0.2]])


def test_on_a_circle_the_law_is_turned_by_the_path():
    limit = fokker_planck(Circle(), None, [0.6], dt=DT, seed=SEED, n_nodes=201, n_replicas=2)
    steps = [Noise(SEED).increment(k, (2, 1, 1), stream=Stream.COMMON, dtype=torch.float64)[:, 0, 0] for k in range(30)]
    place = 3.0 + 0.8 * math.sqrt(DT) * sum(steps).numpy()
    n = np.arange(1, 30)[:, None]
    # Implicit Euler multiplies the n-th wave by (1 + ½σ²n² dt)^{-1} in a step.
    decay = np.exp(-0.1 * n**2) * (1 + 0.18 * n**2 * DT) ** -30
    for r in range(2):
        wanted = (1 + 2 * (decay * np.cos(n * (limit.x.values - place[r]))).sum(0)) / (2 * math.pi)
        assert np.abs(limit.density.values[0, r] - wanted).max() < 1e-5


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ({}, TypeError, "pass dt= and seed="),
        ({"dt": DT}, TypeError, "pass dt= and seed="),
        ({"dt": DT, "seed": 1, "noise": Noise(2)}, ValueError, "contradicts"),
        ({"dt": 0.3, "seed": 1}, ValueError, "whole number of steps"),
        ({"dt": -0.1, "seed": 1}, ValueError, "positive"),
        ({"dt": DT, "seed": 1, "method": "bdf"}, ValueError, "stepped by 'euler'"),
        ({"dt": DT, "seed": 1, "n_replicas": 0}, ValueError, "n_replicas"),
    ],
)
def test_bad_input_is_refused(arguments, kind, text):
    with pytest.raises(kind, match=text):
        fokker_planck(Shared(), None, [1.0], **arguments)


def test_walls_planes_and_crossing_paths_are_refused():
    @dataclass(frozen=True)
    class Walled(Shared):
        def project(self, x):
            return x.abs()

    with pytest.raises(ValueError, match="walls and common noise"):
        fokker_planck(Walled(), None, [1.0], dt=DT, seed=1)

    @dataclass(frozen=True)
    class Flat(Shared):
        def initial(self):
            return mfsde.Gaussian([0.0, 0.0], 1.0)

    with pytest.raises(ValueError, match="line and the circle"):
        fokker_planck(Flat(), None, [1.0], dt=DT, seed=1)
    with pytest.raises(ValueError, match="across one another"):
        fokker_planck(replace(Shared(), waves=30.0), None, [1.0], dt=0.5, seed=1, n_nodes=65)


def test_a_grid_that_the_mass_leaves_on_some_path_is_refused():
    with pytest.raises(ValueError, match="on some path at some time"):
        fokker_planck(Shared(), np.linspace(-0.2, 0.2, 41), [1.0], dt=DT, seed=SEED)
    with pytest.raises(ValueError, match="σ = 0"):
        fokker_planck(replace(Shared(), sigma=0.0), None, [1.0], dt=DT, seed=SEED)
    with pytest.raises(ValueError, match="energies"):
        fokker_planck(Shared(), None, [1.0], dt=DT, seed=SEED, energies=True)
