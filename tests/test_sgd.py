"""Stochastic gradient descent: its samples, its exact discrete moments, and the flow that it follows as ε → 0."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import ndtr
from torch import Tensor

import mfsde
from mfsde import EmpiricalMeasure, Gaussian, Neuron, Noise, NoisySGD, risk
from mfsde.clock import Clock
from mfsde.draws import SPAN, Draws
from mfsde.limit import moments
from mfsde.model import Equation
from mfsde.scenarios import MeanFieldOU
from mfsde.scenarios.isotropic_gaussians import IsotropicGaussians
from mfsde.scenarios.online_gaussians import OnlineGaussians, _orthant
from mfsde.sgd import check, sgd

FLOAT64 = torch.float64


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def draws(step: int = 0, n_replicas: int = 3, seed: int = 5, substeps: int = 1) -> Draws:
    return Draws(Noise(seed, substeps), step, n_replicas, FLOAT64, torch.device("cpu"))


# Draws ----------------------------------------------------------------------------------------------------------------


def asked(source: Draws) -> list[Tensor]:
    return [source.normals(4, 2), source.uniforms(3, 1), source.integers(6, 10), source.permutations(7)]


def test_draws_depend_on_step_replica_and_call_alone():
    for mine, again, one, other in zip(
        asked(draws()), asked(draws()), asked(draws(0, 1)), asked(draws(1)), strict=True
    ):
        assert torch.equal(mine, again)
        assert torch.equal(mine[:1], one)
        assert not torch.equal(mine, other)
        assert not torch.equal(mine[0], mine[1])
    # The data of a step made of fine ones are those of its first fine step.
    for coarse, fine in zip(asked(draws(3, substeps=4)), asked(draws(12)), strict=True):
        assert torch.equal(coarse, fine)


def test_no_two_calls_share_a_number():
    source = draws()
    own = [source.uniforms(200, 2) for _ in range(3)]
    later = draws(4)
    kept = [later.at(0).uniforms(200, 2), later.at(1).uniforms(200, 2)]
    values = torch.cat([z.flatten() for z in (*own, *kept)])
    assert len(values.unique()) == len(values)
    # Data kept from another step are that step's whoever asks, and end in no call of its own.
    assert torch.equal(kept[0], draws(9).at(0).uniforms(200, 2))


def test_permutations_are_uniform_and_the_same_in_every_precision():
    found = Draws(Noise(1), 0, 6000, torch.float32, torch.device("cpu")).permutations(3)
    assert torch.equal(found, Draws(Noise(1), 0, 6000, FLOAT64, torch.device("cpu")).permutations(3))
    counts = torch.stack([(found == torch.tensor(p)).all(1).sum() for p in itertools.permutations(range(3))])
    assert counts.sum() == 6000
    assert ((counts - 1000).abs() < 4 * math.sqrt(6000 * (1 / 6) * (5 / 6))).all()


def test_draws_refuse_more_than_a_step_has():
    with pytest.raises(ValueError, match=f"n = {SPAN} values in one call"):
        draws().uniforms(SPAN, 1)
    source = draws(n_replicas=1)
    for _ in range(511):
        source.uniforms(1, 1)
    with pytest.raises(ValueError, match="more than 511 calls in one step"):
        source.uniforms(1, 1)


# Minibatches ----------------------------------------------------------------------------------------------------------

INPUTS = normals(6, 3)
SMOOTH = torch.sin(INPUTS[:, 0])


def product(theta: Tensor, z: Tensor) -> Tensor:
    return theta[..., 0, :-1] @ z.mT * theta[..., 0, -1:]


def cube(f: Tensor, y: Tensor) -> Tensor:
    return (f - y).abs().pow(3)


ENERGIES = {
    "tanh": (Neuron("tanh", scale=1.7), "squared", SMOOTH),
    "relu": (Neuron("relu"), "squared", SMOOTH),
    "two outputs": (Neuron("sigmoid", n_outputs=2), "squared", torch.stack([SMOOTH, SMOOTH.cos()], 1)),
    "logistic": (Neuron("tanh"), "logistic", SMOOTH.sign()),
    "own loss": (Neuron("tanh"), cube, SMOOTH),
    "own feature": (product, "squared", SMOOTH),
    "own both": (product, cube, SMOOTH),
}


@pytest.mark.parametrize("name", ENERGIES)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_minibatch_gradient_is_the_average_of_those_of_its_data(name, weighted):
    feature, loss, targets = ENERGIES[name]
    energy = risk(feature, loss, INPUTS, targets)
    d = 3 + (targets.shape[1] if targets.ndim == 2 else 1)
    x = normals(2, 5, d, seed=1)
    mu = EmpiricalMeasure(x, torch.softmax(normals(2, 5, seed=2), -1) if weighted else None)
    for at in (x, normals(2, 4, d, seed=3)):
        single = [energy.minibatch_derivative(mu, at, torch.tensor([[s], [s]])) for s in range(6)]
        exact = energy.intrinsic_derivative(mu, at)
        close = {"rtol": 0, "atol": 1e-12}
        torch.testing.assert_close(sum(single) / 6, exact, **close)
        # Replicas have their own rows.
        both = energy.minibatch_derivative(mu, at, torch.tensor([[0, 4], [5, 5]]), 3.0)
        torch.testing.assert_close(both[0], 1.5 * (single[0] + single[4])[0], **close)
        torch.testing.assert_close(both[1], 3.0 * single[5][1], **close)
        # The data themselves, and the gradient of the same data as an energy of their own.
        alone = risk(feature, loss, INPUTS[2:3], targets[2:3]).intrinsic_derivative(mu, at)
        torch.testing.assert_close(single[2], alone, **close)
        assert not torch.allclose(single[2], exact, atol=1e-3)


@dataclass(frozen=True)
class Network(NoisySGD):
    """A tanh network on six points, with a ridge."""

    batch_size: int = 2
    sampling: str = "with_replacement"
    sigma: float = 0.0
    ridge: float = 0.3

    @cached_property
    def energy(self) -> mfsde.Energy:
        ridge = mfsde.potential(lambda x: 0.5 * self.ridge * x.square().sum(-1))
        return 2.0 * risk(Neuron("tanh"), "squared", INPUTS, SMOOTH) + ridge

    def confinement(self, x: Tensor) -> Tensor:
        return x.square().sum(-1)

    def initial(self) -> Gaussian:
        return Gaussian([0.0] * 4, 1.0)


BATCHES = {
    "with_replacement": list(itertools.product(range(6), repeat=2)),
    "without_replacement": list(itertools.combinations(range(6), 2)),
}


@pytest.mark.parametrize("sampling", BATCHES)
@pytest.mark.parametrize("sigma", [0.0, 0.8])
def test_the_sampled_drift_is_unbiased(sampling, sigma):
    case = Network(sampling=sampling, sigma=sigma)
    batches = torch.tensor(BATCHES[sampling])
    x = normals(1, 5, 4).expand(len(batches), 5, 4).contiguous()
    mu = EmpiricalMeasure(x)
    mean = case.sampled_drift(0.7, x, mu, batches).mean(0)

    def matches(drift: Tensor) -> bool:
        return torch.allclose(mean, drift[0], rtol=0, atol=1e-12)

    assert matches(case.drift(0.7, x, mu))
    # His loss is twice ours; without the temperature; without the ridge.
    assert not matches(2 * case.drift(0.7, x, mu))
    assert matches(replace(case, sigma=0.0).drift(0.7, x, mu)) == (sigma == 0.0)
    assert not matches(replace(case, ridge=0.0).drift(0.7, x, mu))


def test_minibatches_are_drawn_as_they_say():
    batches = {name: torch.cat([Network(4, name).sample(draws(k, 200)) for k in range(10)]) for name in BATCHES}
    for found in batches.values():
        counts = torch.bincount(found.flatten(), minlength=6)
        assert ((counts - 8000 / 6).abs() < 4 * math.sqrt(8000 * 5 / 36)).all()
    distinct = {name: (found.sort(1).values.diff(dim=1) > 0).all(1) for name, found in batches.items()}
    assert distinct["without_replacement"].all()
    # 6·5·4·3/6⁴ of independent ones.
    share = distinct["with_replacement"].double().mean().item()
    assert abs(share - 0.2778) < 4 * math.sqrt(0.2778 * 0.7222 / 2000)


@pytest.mark.parametrize("batch", [1, 2, 4, 5, 6])
def test_epochs_visit_each_datum_once(batch):
    """Also where the minibatch does not divide the data, and for a run that begins in the middle."""
    case = Network(batch, "epochs")
    stream = torch.cat([case.sample(draws(k)) for k in range(30)], dim=1)
    passes = stream[:, : stream.shape[1] // 6 * 6].unflatten(1, (-1, 6))
    assert torch.equal(passes.sort(-1).values, torch.arange(6).expand_as(passes))
    assert not torch.equal(passes[:, 0], passes[:, 1])
    assert not torch.equal(passes[0], passes[1])
    assert torch.equal(case.sample(draws(17)), stream[:, 17 * batch : 18 * batch])


# Exact moments of a linear model --------------------------------------------------------------------------------------

Z = torch.tensor([[0.6], [1.4], [-1.0]], dtype=FLOAT64)
Y = torch.tensor([1.0, 0.5, -2.0], dtype=FLOAT64)


def linear(theta: Tensor, z: Tensor) -> Tensor:
    return theta.squeeze(-2) @ z.mT


@dataclass(frozen=True)
class Linear(NoisySGD):
    """f(z) = E θ z: the mean follows a random affine recursion, deviations from it a linear one with Gaussian noise."""

    sigma: float = 0.7
    batch_size: int = 2
    curvature: float = 0.5

    @cached_property
    def energy(self) -> Any:
        return risk(linear, "squared", Z, Y)

    def confinement(self, x: Tensor) -> Tensor:
        return 0.5 * self.curvature * x.square().sum(-1)

    def step_size(self, t: float) -> float:
        return 1.0 / (1.0 + 0.5 * t)

    def initial(self) -> Gaussian:
        return Gaussian([2.0], [[0.4]])


@dataclass(frozen=True)
class HalfTemperature(Linear):
    """His √(2Ts_k)."""

    def diffusion(self, t, x, mu):
        return super().diffusion(t, x, mu) / math.sqrt(2)


@dataclass(frozen=True)
class DoubleTime(Linear):
    """2 s_k = 2ε instead of ε: the flow of R."""

    def sampled_drift(self, t, x, mu, sample):
        return 2 * super().sampled_drift(t, x, mu, sample)


@dataclass(frozen=True)
class OneDatum(Linear):
    """The first datum of a minibatch counted twice."""

    def sampled_drift(self, t, x, mu, sample):
        return super().sampled_drift(t, x, mu, sample[:, :1])


@dataclass(frozen=True)
class FullBatch(Linear):
    """No sampling noise."""

    def sampled_drift(self, t, x, mu, sample):
        return self.drift(t, x, mu)


class Moments(NamedTuple):
    """E M, Var M and E S² for the mean M of a replica and the (1/N) variance S² in it."""

    mean: float
    variance: float
    within: float


def recursion(case: Linear, n: int, dt: float, steps: int) -> Moments:
    """M' = (1 - h(A + Tκ)) M + hB + √(2Th/N) g, D' = (1 - hTκ) D + √(2Th) g', h = εξ; A, B of the minibatch."""
    z, y = Z[:, 0].numpy(), Y.numpy()
    batches = np.array(list(itertools.product(range(3), repeat=case.batch_size)))
    a, b = (z**2)[batches].mean(1), (z * y)[batches].mean(1)
    temperature, start = 0.5 * case.sigma**2, case.initial()
    m, v = start.mean.item(), start.cov.item()
    mean, square, within = m, m**2 + v / n, v * (1 - 1 / n)
    for k in range(steps):
        h = dt * case.step_size(k * dt)
        shrink, push = 1 - h * (a + temperature * case.curvature), h * b
        square = (shrink**2).mean() * square + 2 * (shrink * push).mean() * mean + (push**2).mean()
        square += 2 * temperature * h / n
        mean = shrink.mean() * mean + push.mean()
        within = (1 - h * temperature * case.curvature) ** 2 * within + 2 * temperature * h * (1 - 1 / n)
    return Moments(mean, square - mean**2, within)


def scores(case: Linear, like: Linear, n: int, dt: float, saves: tuple[int, ...]) -> np.ndarray:
    """Standard scores, over replicas, of the moments of a run of `case` against the recursion of `like`."""
    run = mfsde.simulate(
        case, n_particles=n, n_replicas=3000, horizon=saves[-1] * dt, dt=dt, seed=3, save_every=saves[0],
        method="sgd", dtype=FLOAT64,
    )  # fmt: skip
    found = []
    for steps in saves:
        x = run["position"].values[steps // saves[0], :, :, 0]
        expected = recursion(like, n, dt, steps)
        samples = np.stack([x.mean(1), (x.mean(1) - expected.mean) ** 2, x.var(1)])
        error = samples.mean(1) - expected
        found.append(error / (samples.std(1, ddof=1) / math.sqrt(samples.shape[1])))
    return np.abs(found)


SAVES = (4, 8, 24)


def test_noisy_sgd_has_the_moments_of_its_recursion():
    assert scores(Linear(), Linear(), 3, 0.15, SAVES).max() < 4
    assert scores(Linear(batch_size=1), Linear(batch_size=1), 3, 0.15, SAVES).max() < 4


@pytest.mark.parametrize("wrong", [HalfTemperature, DoubleTime, OneDatum, FullBatch])
def test_the_moments_tell_a_wrong_convention(wrong):
    """√(2Ts_k), a time axis that is doubled, a minibatch of one, no sampling at all."""
    assert scores(wrong(), Linear(), 3, 0.15, SAVES).max() > 8


def test_the_temperature_is_seen_in_the_variance():
    variance = scores(HalfTemperature(), Linear(), 3, 0.15, SAVES)[:, 2]
    assert variance[-1] > 8


def slope(step: list[float], error: list[float]) -> float:
    return float(np.polyfit(np.log(step), np.log(np.abs(error)), 1)[0])


def test_the_moments_approach_those_of_the_pde():
    """With N ≫ 1/ε: mean and variance have an error of order ε, the mean a standard deviation of order √ε."""
    steps = [16, 32, 64, 128]
    dts = [1.6 / k for k in steps]
    limit = moments(Linear(), [0.0, 1.6])
    mean, variance = limit["mean"].values[-1, 0], limit["covariance"].values[-1, 0, 0]
    exact = [recursion(Linear(), 10**9, dt, k) for dt, k in zip(dts, steps, strict=True)]
    assert abs(slope(dts, [found.mean - mean for found in exact]) - 1) < 0.1
    assert abs(slope(dts, [found.within - variance for found in exact]) - 1) < 0.1
    assert abs(slope(dts, [math.sqrt(found.variance) for found in exact]) - 0.5) < 0.05
    # The variance of half the temperature goes elsewhere, and so does the mean on twice the time.
    half = moments(Linear(sigma=0.7 / math.sqrt(2), curvature=1.0), [0.0, 1.6])["covariance"].values[-1, 0, 0]
    late = moments(Linear(), [0.0, 3.2])["mean"].values[-1, 0]
    assert abs(half - variance) > 5 * abs(exact[-1].within - variance)
    assert abs(late - mean) > 5 * abs(exact[-1].mean - mean)


# The limit ε → 0 of a network -----------------------------------------------------------------------------------------

STEPS = (8, 16, 32, 64, 128)
FINE = 256


def outputs(case: NoisySGD, method: str, steps: int, n: int, replicas: int) -> np.ndarray:
    """f(z) at the data at time 1, for every replica: (R, 6)."""
    run = mfsde.simulate(
        case, n_particles=n, n_replicas=replicas, horizon=1.0, dt=1.0 / steps, seed=1, method=method, dtype=FLOAT64
    )
    mu = EmpiricalMeasure(torch.from_numpy(run["position"].values[-1]))
    return risk(Neuron("tanh"), "squared", INPUTS, SMOOTH).predict(mu, INPUTS).numpy()


def fitted(squares: np.ndarray, *columns: np.ndarray) -> tuple[float, float]:
    """First coefficient of a fit to the log root mean squares of (runs, R), least squares, and its jackknife error.

    Runs may be dependent: replicas are left out of all of them at once.
    """
    weights = np.linalg.pinv(np.stack(columns, 1))[0]

    def coefficient(kept: np.ndarray) -> float:
        return float(weights @ (0.5 * np.log(kept.mean(1))))

    n = squares.shape[1]
    left = np.array([coefficient(np.delete(squares, r, 1)) for r in range(n)])
    return coefficient(squares), math.sqrt((n - 1) * left.var())


def test_sgd_and_exact_gradients_have_one_limit_at_the_rate_of_the_noise():
    """Equal initial weights and steps, so what is between them is the noise of the samples: c √ε (1 + kε)."""
    case, eps, one = Network(batch_size=1, ridge=0.0), 1 / np.array(STEPS), np.ones(len(STEPS))
    exact = [outputs(case, "euler", steps, 16, 120) for steps in STEPS]
    noise = [outputs(case, "sgd", steps, 16, 120) - like for steps, like in zip(STEPS, exact, strict=True)]
    rate, error = fitted(np.square(noise).mean(2), np.log(eps), one, eps)
    assert abs(rate - 0.5) < 4 * error
    assert abs(rate - 1.0) > 4 * error
    # Exact gradients: c (ε - ε₀)(1 + k (ε + ε₀)) to second order, less what the reference lacks itself.
    gap = np.array(exact) - outputs(case, "euler", FINE, 16, 120)
    size = np.square(gap).mean((1, 2))
    order = np.linalg.lstsq(np.stack([np.log(eps - 1 / FINE), one, eps + 1 / FINE], 1), 0.5 * np.log(size))[0][0]
    assert abs(order - 1.0) < eps[0] ** 2


def test_the_noise_of_the_samples_does_not_fall_with_the_number_of_particles():
    """All particles share the sample: N^0 (1 + b/N) between SGD and exact gradients, and no N^{-½}."""
    case, counts = Network(batch_size=1, ridge=0.0), np.array([16, 64, 256])
    noise = [outputs(case, "sgd", 32, n, 60) - outputs(case, "euler", 32, n, 60) for n in counts]
    power, error = fitted(np.square(noise).mean(2), np.log(counts), np.ones(3), 1 / counts)
    assert abs(power) < 4 * error
    assert abs(power + 0.5) > 4 * error


# Samples in a run -----------------------------------------------------------------------------------------------------

SMALL = OnlineGaussians(data_dim=5)


@dataclass(frozen=True)
class Recorded(OnlineGaussians):
    data_dim: int = 5
    seen: Any = None

    def sample(self, draws):
        self.seen.append(super().sample(draws))
        return self.seen[-1]


def samples(n_particles: int, n_replicas: int, **options: Any) -> tuple[Tensor, Tensor]:
    case = Recorded(seen=[])
    settings = {"horizon": 6e-3, "dt": 1e-3, "seed": 8, "method": "sgd", **options}
    run = mfsde.simulate(case, n_particles=n_particles, n_replicas=n_replicas, **settings)
    assert run.sizes["replica"] == n_replicas
    return tuple(torch.stack(parts) for parts in zip(*case.seen, strict=True))


def test_samples_are_the_same_for_every_number_of_particles_and_replicas():
    for mine, wide, single, other in zip(
        samples(3, 4), samples(9, 4), samples(3, 1), samples(3, 4, seed=9), strict=True
    ):
        assert torch.equal(mine, wide)
        assert torch.equal(mine[:, :1], single)
        assert not torch.equal(mine[:, 0], mine[:, 1])
        assert not torch.equal(mine[0], mine[1])
        assert not torch.equal(mine, other)


@pytest.mark.parametrize("case", [SMALL, Network(), Network(sampling="epochs", sigma=0.3)])
def test_a_batch_of_replicas_is_the_single_ones(case):
    settings = {"n_particles": 7, "horizon": 0.05, "dt": 5e-3, "seed": 2, "method": "sgd", "dtype": FLOAT64}
    batch = mfsde.simulate(case, n_replicas=3, **settings)["position"]
    single = mfsde.simulate(case, n_replicas=1, **settings)["position"]
    assert np.array_equal(batch[:, :1], single)
    assert not np.array_equal(batch[:, 1], batch[:, 0])


@pytest.mark.parametrize("case", [SMALL, Network(), Network(4, "epochs", 0.3)])
def test_a_run_goes_on_as_if_it_had_not_stopped(case):
    def march(x: Tensor, first: int, last: int) -> Tensor:
        equation = Equation(case, x)
        for step in range(first, last):
            sgd(equation, Clock(0.01), Noise(4), step, x)
        return x

    start = normals(2, 5, case.initial().dim)
    whole = march(start.clone(), 0, 11)
    halves = march(march(start.clone(), 0, 6), 6, 11)
    assert torch.equal(whole, halves)
    assert not torch.equal(whole, march(march(start.clone(), 0, 6), 5, 10))


def test_without_noise_none_is_drawn(monkeypatch):
    case = Network(sigma=0.0)
    x = normals(2, 5, 4)
    equation, before = Equation(case, x), x.clone()
    monkeypatch.setattr(Noise, "euler_", None)
    sgd(equation, Clock(0.1), Noise(4), 3, x)
    mu = EmpiricalMeasure(before)
    sample = case.sample(Draws(Noise(4), 3, 2, FLOAT64, x.device))
    expected = before + 0.1 * case.sampled_drift(0.3, before, mu, sample)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-15)


# Online Gaussians -----------------------------------------------------------------------------------------------------

KINKED = OnlineGaussians(0.5, 3, 1.0, -2.5, (0.0, 0.5, 1.5), (-3.0, 14.5, -11.5))


@pytest.mark.parametrize("case", [replace(SMALL, data_dim=3), KINKED, replace(SMALL, batch_size=3)])
def test_the_online_drift_is_the_mean_of_sampled_ones(case):
    n_samples, d = 200_000, case.data_dim
    particles = 1.2 * normals(1, 4, d)
    # Two parallel neurons, two opposite ones.
    particles[0, 3] = -0.7 * particles[0, 2]
    x = particles.expand(n_samples, 4, d).contiguous()
    mu = EmpiricalMeasure(x)
    drifts = case.sampled_drift(0.0, x, mu, case.sample(draws(0, n_samples)))
    error = drifts.std(0) / math.sqrt(n_samples)

    def agrees(like: OnlineGaussians, factor: float = 1.0) -> bool:
        exact = factor * like.drift(0.0, particles, EmpiricalMeasure(particles))[0]
        return bool(((drifts.mean(0) - exact).abs() < 4 * error).all())

    assert agrees(case)
    assert not agrees(case, 2.0)
    assert not agrees(case, -1.0)
    assert not agrees(replace(case, delta=case.delta - 0.05))


def test_sampled_and_exact_drift_agree_elsewhere_and_with_weights():
    x, at = normals(2, 4, 5), normals(2, 3, 5, seed=1)
    w = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=FLOAT64).expand(2, 4)
    sample = SMALL.sample(draws(0, 2))
    split = torch.cat([x[:, :1], x[:, 1:2], x[:, 1:2], *[x[:, 2:3]] * 3, *[x[:, 3:]] * 4], dim=1)
    for drift in (lambda y, mu: SMALL.drift(0.0, y, mu), lambda y, mu: SMALL.sampled_drift(0.0, y, mu, sample)):
        weighted, listed = drift(at, EmpiricalMeasure(x, w)), drift(at, EmpiricalMeasure(split))
        torch.testing.assert_close(weighted, listed, rtol=0, atol=1e-10)
        everywhere = drift(split, EmpiricalMeasure(split))
        torch.testing.assert_close(everywhere[:, :2], drift(x[:, :2], EmpiricalMeasure(split)), rtol=0, atol=1e-10)


def test_the_online_drift_averaged_over_rotations_is_the_radial_one():
    """Directions drawn at random, norms kept: the mean of the drift at a point, along it, and across."""
    case, n_rotations = replace(SMALL, data_dim=20), 4000
    radii, probes = torch.tensor([0.3, 0.9, 1.6], dtype=FLOAT64), torch.tensor([0.5, 1.1, 2.0], dtype=FLOAT64)
    directions = normals(n_rotations, 3, 20)
    mu = EmpiricalMeasure(directions * (radii / directions.norm(dim=-1)).unsqueeze(-1))
    at = torch.zeros(n_rotations, 3, 20, dtype=FLOAT64)
    at[..., 0] = probes
    drifts = case.drift(0.0, at, mu)
    mean, error = drifts.mean(0), drifts.std(0) / math.sqrt(n_rotations)
    radial = case.reduced.drift(0.0, probes[:, None], EmpiricalMeasure(radii[:, None]))[:, 0]
    assert ((mean[:, 0] - radial).abs() < 4 * error[:, 0]).all()
    assert (mean[:, 1:].abs() < 4 * error[:, 1:]).all()
    infinite = replace(case.reduced, data_dim=None)
    assert ((mean[:, 0] - infinite.drift(0.0, probes[:, None], EmpiricalMeasure(radii[:, None]))[:, 0]).abs()
            > 4 * error[:, 0]).any()  # fmt: skip
    _, risks = case.observables()
    torch.testing.assert_close(
        risks.function(0.0, mu.points, mu), case.reduced.risk(EmpiricalMeasure(radii[:, None])).expand(n_rotations)
    )


def orthant(h: float, k: float, rho: float) -> float:
    """P(G > h, G' > k) by conditioning on G."""
    rest = math.sqrt(1 - rho**2)
    edge = k / rho
    width = rest / abs(rho)
    breaks = [p for p in (edge - 6 * width, edge - width, edge, edge + width, edge + 6 * width) if h < p < 12]

    def density(u: float) -> float:
        return math.exp(-u * u / 2) / math.sqrt(2 * math.pi) * ndtr((rho * u - k) / rest)

    return quad(density, h, 12, points=breaks or None, epsabs=1e-13, epsrel=1e-12, limit=400)[0]


@pytest.mark.parametrize("rho", [0.1, -0.5, 0.8, -0.94, 0.96, -0.97, 0.99, 0.9999, -0.9999])
def test_the_orthant_probabilities_are_as_accurate_as_they_say(rho):
    rng = np.random.default_rng(0)
    for _ in range(20):
        h = rng.normal()
        k = h + rng.normal() * 10.0 ** -rng.integers(0, 5) if rng.random() < 0.6 else 2 * rng.normal()
        given = (torch.tensor([[v]], dtype=FLOAT64) for v in (h, k, rho))
        tolerance = 1e-12 if abs(rho) < 0.95 else 1e-8
        assert _orthant(*given).item() == pytest.approx(orthant(h, k, rho), abs=tolerance)


@dataclass(frozen=True)
class FromNorms(IsotropicGaussians):
    """The radial flow from given norms, (R, N, 1)."""

    start: Any = None

    def initial(self) -> EmpiricalMeasure:
        return EmpiricalMeasure(self.start)


def lengthening(eps: float, n_particles: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean norms of SGD at 0.2, less those of the radial flow from its own initial norms, and less the initial ones."""
    run = mfsde.simulate(
        replace(SMALL, data_dim=40), n_particles=n_particles, n_replicas=8, horizon=0.2, dt=eps, seed=0,
        save_every=round(0.2 / eps), method="sgd",
    )  # fmt: skip
    start, end = torch.from_numpy(run["position"].values).norm(dim=-1, keepdim=True)
    flow = mfsde.simulate(
        FromNorms(start=start), n_particles=n_particles, n_replicas=8, horizon=0.2, dt=0.1, seed=0, method="dopri5",
        keep_particles=0,
    )  # fmt: skip
    mean = end.double().mean((1, 2)).numpy()
    return mean - flow["mean"].values[-1].reshape(8), mean - start.double().mean((1, 2)).numpy()


def test_the_law_of_the_norms_follows_the_reduced_flow():
    """Mean norms of SGD against the radial flow, extrapolated to ε = 0 and N = ∞ for each replica: a ε + b/N."""
    fine, moved = lengthening(1e-4, 100)
    # The noise of the samples lengthens the weights; the particles' action on themselves shortens them.
    coarse, few = lengthening(2e-4, 100)[0], lengthening(1e-4, 50)[0]

    def score(values: np.ndarray) -> float:
        return abs(values.mean()) / (values.std(ddof=1) / math.sqrt(len(values)))

    limit = fine - (coarse - fine) - (few - fine)
    assert score(limit) < 4
    # Without the extrapolation in ε; with weights that stay where they are.
    assert score(coarse) > 4
    assert score(limit + moved - fine) > 4


# Bad input ------------------------------------------------------------------------------------------------------------


def refusal(case: Any, kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        mfsde.simulate(case, n_particles=4, horizon=0.1, dt=0.1, seed=0, method="sgd")
    return str(caught.value)


def test_what_no_run_can_sample_is_refused():
    assert "defines no sample and no sampled_drift" in refusal(MeanFieldOU())
    assert "batch_size = 7 is larger than the data, 6 points" in refusal(Network(7))
    assert "batch_size = 0; expected a whole number >= 1" in refusal(Network(0))
    assert "batch_size = 1.5; expected a whole number" in refusal(Network(1.5))
    assert "unknown sampling 'shuffled'; expected one of with_replacement, without_replacement, epochs" in refusal(
        Network(sampling="shuffled")
    )


@dataclass(frozen=True)
class Faulty(Network):
    rate: Any = 1.0
    fault: str = ""

    def step_size(self, t):
        return self.rate(t) if callable(self.rate) else self.rate

    @cached_property
    def energy(self):
        return mfsde.potential(lambda x: x.square().sum(-1)) if self.fault == "energy" else super().energy

    def sampled_drift(self, t, x, mu, sample):
        if self.fault == "in place":
            x.mul_(2.0)
        drift = super().sampled_drift(t, x, mu, sample)
        return drift.mean(1, keepdim=True) if self.fault == "shape" else drift


def test_faulty_methods_are_refused():
    assert "step_size(0) = -1.0; expected a finite ξ(t) >= 0" in refusal(Faulty(rate=-1.0))
    assert "step_size(0) = inf" in refusal(Faulty(rate=lambda t: t**-0.25))
    assert "sampled_drift returned shape (1, 1, 4)" in refusal(Faulty(fault="shape"))
    assert "sampled_drift changed x in place" in refusal(Faulty(fault="in place"))
    assert "energy has no risk" in refusal(Faulty(fault="energy"), TypeError)
    with pytest.raises(ValueError, match="batch_size = 0; expected at least 1"):
        OnlineGaussians(batch_size=0)
    with pytest.raises(ValueError, match="samples have a dimension"):
        OnlineGaussians(data_dim=None)


def test_a_descent_without_an_energy_is_told_what_it_lacks():
    @dataclass(frozen=True)
    class Bare(NoisySGD):
        def initial(self) -> Gaussian:
            return Gaussian([0.0], 1.0)

    assert "Bare declares no energy; the dynamics that it inherits needs all of energy, as" in refusal(
        Bare(), TypeError
    )


def test_the_door_names_the_missing_method():
    x = normals(1, 4, 1)
    with pytest.raises(ValueError, match="'euler' follows the drift itself"):
        check(Equation(MeanFieldOU(), x))
