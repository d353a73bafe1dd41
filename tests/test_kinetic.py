"""Kinetic equations: the splitting steps bit for bit, their laws against their own discrete moments, orders, limits.

Every statistical check has a twin with a planted fault that it must reject.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mfsde
from mfsde import EmpiricalMeasure, Energy, Gaussian, Noise, splitting
from mfsde import noise as noise_module
from mfsde.clock import Clock
from mfsde.kinetic import Kinetic, KineticLangevin
from mfsde.model import Equation
from mfsde.noise import kick_
from mfsde.phase_space import law_of_positions
from mfsde.product import Product
from mfsde.scenarios.kinetic_double_well import KineticDoubleWell

DOUBLE = {"dtype": torch.float64}
SCHEMES: dict[str, Callable[..., None]] = {"baoab": splitting.baoab, "obabo": splitting.obabo}


# Equations


@dataclass(frozen=True)
class GaussianKinetic(KineticLangevin):
    """F(m) = ½κ|∫x dm - a|², U = k|x|²/2: linear, so that schemes keep Gaussians Gaussian."""

    kappa: float = 0.7
    target: float = 1.0
    stiffness: float = 2.0
    gamma: float = 0.8
    sigma: float = 1.1
    start: tuple[float, ...] = (1.5,)
    variance: float = 0.3

    @property
    def energy(self) -> Energy:
        return Energy(lambda mu: 0.5 * self.kappa * (mu.mean() - self.target).square().sum((-2, -1)))

    def confinement(self, x: Tensor) -> Tensor:
        return 0.5 * self.stiffness * x.square().sum(-1)

    def initial_position(self) -> Gaussian:
        return Gaussian(list(self.start), self.variance)


@dataclass(frozen=True)
class Driven(Kinetic):
    """dV = (cos t - sin X - (X - E X) - γV) dt + σ dW: nonlinear, with a force that depends on time and law."""

    gamma: float = 0.5
    sigma: float = 0.7
    dim: int = 2

    def force(self, t, x, mu):
        return math.cos(t) - torch.sin(x) - (x - mu.mean())

    def initial(self):
        return Gaussian([0.5] * self.dim + [-0.2] * self.dim, 0.4)


@dataclass(frozen=True)
class Quartic(Kinetic):
    """dV = (-X - X³ - γV) dt + σ dW, without interaction: particles are independent."""

    gamma: float = 1.0
    sigma: float = 1.4

    def force(self, t, x, mu):
        return -x - x**3

    def initial_position(self):
        return Gaussian([0.0], 0.5)


def states(scenario: Any, **settings: Any) -> Tensor:
    """The saved states of a float64 run, (time, R, N, 2d)."""
    return torch.from_numpy(mfsde.simulate(scenario, **{**DOUBLE, **settings})["position"].values)


def equation_of(scenario: Any, x: Tensor) -> Equation:
    return Equation(scenario, x)


def some_state(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# The step itself


def step_by_hand(scheme: str, case: Any, noise: Noise, step: int, h: float, x: Tensor) -> Tensor:
    """One step as the letters say it, in torch."""
    d = x.shape[-1] // 2
    q, v = x[..., :d], x[..., d:]

    def force(t: float, q: Tensor) -> Tensor:
        return case.force(t, q, EmpiricalMeasure(q))

    def damp(v: Tensor, h: float, xi: Tensor) -> Tensor:
        c = math.exp(-case.gamma * h)
        spread = case.sigma * math.sqrt(h if case.gamma == 0 else (1 - c * c) / (2 * case.gamma))
        return c * v + spread * xi

    w, area = noise.area(step, q.shape, dtype=x.dtype)
    eta = math.sqrt(12) * (area - w / 2)
    t = step * h
    if scheme == "baoab":
        v = v + h / 2 * force(t, q)
        q = q + h / 2 * v
        v = damp(v, h, w)
        q = q + h / 2 * v
        v = v + h / 2 * force(t + h, q)
    else:
        v = damp(v, h / 2, (w + eta) / math.sqrt(2))
        v = v + h / 2 * force(t, q)
        q = q + h * v
        v = v + h / 2 * force(t + h, q)
        v = damp(v, h / 2, (w - eta) / math.sqrt(2))
    return torch.cat([q, v], -1)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("gamma", [0.0, 0.5])
@pytest.mark.parametrize("substeps", [1, 3])
def test_a_run_takes_the_steps_that_the_letters_say(scheme, gamma, substeps):
    case, noise = Driven(gamma), Noise(5, substeps)
    path = states(
        case, n_particles=7, n_replicas=3, horizon=1.0, dt=0.1, seed=5, noise=noise, save_every=1, method=scheme
    )
    x = path[0]
    for step in range(10):
        x = step_by_hand(scheme, case, noise, step, 0.1, x)
        torch.testing.assert_close(path[step + 1], x, rtol=1e-13, atol=1e-13)


def composed(x: Tensor, force: Tensor, w: Tensor, half: float, decay: float, deviation: float, due: bool) -> Tensor:
    """B A O A, rounding every product and sum, in numpy."""
    d = force.shape[-1]
    real = x.numpy().dtype.type
    half, decay, deviation = real(half), real(decay), real(deviation)
    q, v, f = x[..., :d].numpy(), x[..., d:].numpy(), force.numpy()
    for _ in range(1 + due):
        v = v + half * f
    q = q + half * v
    v = decay * v + deviation * w.numpy()
    q = q + half * v
    return torch.from_numpy(np.concatenate([q, v], -1))


def instruction_sets() -> list[int | None]:
    compiled = noise_module._compiled
    return [None] if compiled is None else [None, *range(len(compiled.instruction_sets()))]


@pytest.fixture(params=instruction_sets())
def backend(request, monkeypatch):
    """Without the compiled kernel, and with each of its instruction sets."""
    compiled = noise_module._compiled
    if request.param is None:
        monkeypatch.setattr(noise_module, "_compiled", None)
        yield
        return
    compiled.use(request.param)
    yield
    compiled.use(len(compiled.instruction_sets()) - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [1, 2, 3, 4, 5, 8, 9, 19])
def test_the_fused_pass_has_the_bits_of_its_parts_on_every_backend(backend, dtype, d):
    for n, substeps, due in ((1, 1, False), (70, 3, True), (300, 1, True), (300, 2, False)):
        x, force = some_state(2, n, 2 * d, dtype=dtype), some_state(2, n, d, dtype=dtype, seed=1)
        noise = Noise(7, substeps)
        w = noise.increment(5, force.shape, dtype=dtype)
        expected = composed(x, force, w, 0.05, 0.9, 0.3, due)
        kicked = x.clone()
        kicked[..., d:] = x[..., d:] + torch.from_numpy(force.numpy().dtype.type(0.05) * force.numpy())
        positions = torch.empty_like(force)
        y = x.clone()
        noise.kinetic_(y, force, positions, 0.05, 0.9, 0.3, 5, due=due)
        assert torch.equal(y, expected)
        assert torch.equal(positions, expected[..., :d])
        kick_(x, force, 0.05)
        assert torch.equal(x, kicked)


def test_antithetic_noise_mirrors_the_velocities():
    case, run = GaussianKinetic(start=(1.0,)), {"n_particles": 5, "horizon": 0.5, "dt": 0.1, "seed": 3}
    pair = states(case, n_replicas=2, noise=Noise(3, antithetic=True), method="baoab", **run)
    x = pair[0]
    for step in range(5):
        w = Noise(3).increment(step, (1, 5, 1), **DOUBLE)
        for half in (0, 1):
            d = x[half : half + 1]
            force = case.force(0.0, d[..., :1].contiguous(), EmpiricalMeasure(d[..., :1]))
            kicks = composed(
                d, force, w * (-1) ** half, 0.05, math.exp(-0.08), splitting.deviation(0.8, 1.1, 0.1), False
            )
            force = case.force(0.0, kicks[..., :1].contiguous(), EmpiricalMeasure(kicks[..., :1]))
            kicks[..., 1:] += 0.05 * force
            x = torch.cat([x[:half], kicks, x[half + 1 :]])
    torch.testing.assert_close(pair[-1], x, rtol=1e-13, atol=1e-13)


# Bits that must not depend on how a run is arranged


RUN: dict[str, Any] = {"n_particles": 40, "n_replicas": 3, "horizon": 2.0, "dt": 0.1, "seed": 4, "dtype": torch.float32}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_saving_does_not_change_a_run_although_kicks_of_neighbouring_steps_are_merged(scheme):
    often, seldom = (states(Driven(), **RUN, method=scheme, save_every=k) for k in (1, 7))
    assert torch.equal(often[::7][: len(seldom) - 1], seldom[:-1])
    assert torch.equal(often[-1], seldom[-1])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_run_that_goes_on_from_a_copy_of_its_state_has_the_same_bits(scheme):
    case, clock, noise = Driven(), Clock(0.1), Noise(2)
    start = some_state(2, 300, 4, dtype=torch.float32)
    equation, x = equation_of(case, start), start.clone()
    with torch.no_grad():
        for step in range(6):
            SCHEMES[scheme](equation, clock, noise, step, x)
            if step == 2:
                middle = x.clone()
        again = equation_of(case, middle)
        for step in range(3, 6):
            # A fresh tensor at every step: no force is at hand.
            middle = middle.clone()
            SCHEMES[scheme](again, clock, noise, step, middle)
    assert torch.equal(x, middle)


seen: list[float] = []


def interrupting(t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
    """An observable that ends the first run at its fifth frame."""
    seen.append(t)
    if len(seen) == 5:
        raise KeyboardInterrupt
    return x.new_zeros(len(x))


def test_resuming_a_run_does_not_change_it(tmp_path):
    run = {**RUN, "n_replicas": 1, "save_every": 4, "checkpoint_every": 4, "method": "baoab"}
    whole = mfsde.simulate(KineticDoubleWell(), **run)
    watch = mfsde.Observable("watch", interrupting)
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        mfsde.simulate(KineticDoubleWell(), store=tmp_path / "run.zarr", observables=(watch,), **run)
    resumed = mfsde.resume(tmp_path / "run.zarr", observables=(watch,))
    np.testing.assert_array_equal(resumed["position"].values, whole["position"].values)


def test_replicas_and_threads_do_not_change_a_run():
    three = states(Driven(), **RUN, method="baoab")
    one = states(Driven(), **{**RUN, "n_replicas": 1}, method="baoab")
    assert torch.equal(three[:, :1], one)
    big = {**RUN, "n_particles": 20_000, "n_replicas": 1, "horizon": 0.3, "method": "baoab"}
    alone = states(Driven(), **big)
    torch.set_num_threads(2)
    assert torch.equal(alone, states(Driven(), **big))


def test_a_particle_does_not_see_how_many_independent_others_there_are():
    few, many = (
        states(Quartic(), n_particles=n, horizon=1.0, dt=0.1, seed=1, method="baoab", dtype=torch.float32)
        for n in (20, 500)
    )
    assert torch.equal(many[:, :, :20], few)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_force_is_asked_once_per_step_unless_something_moves_the_state_between(scheme):
    asked: list[float] = []

    @dataclass(frozen=True)
    class Listening(Driven):
        def force(self, t, x, mu):
            asked.append(t)
            assert x is mu.points
            assert x.is_contiguous()
            return super().force(t, x, mu)

    case, clock, noise, x = Listening(), Clock(0.5), Noise(0), some_state(1, 4, 4)
    equation = equation_of(case, x)
    asked.clear()
    for step in range(4):
        SCHEMES[scheme](equation, clock, noise, step, x)
    assert asked == [0.0, 0.5, 1.0, 1.5, 2.0]
    asked.clear()
    x[0, 0, 0] += 1
    SCHEMES[scheme](equation, clock, noise, 4, x)
    SCHEMES[scheme](equation, clock, noise, 7, x)
    assert asked == [2.0, 2.5, 3.5, 4.0]


def test_a_force_of_another_law_is_not_reused():
    case, x = Driven(), some_state(1, 4, 4)
    equation = Equation(case, x, torch.full((1, 4), 0.25, dtype=torch.float64))
    twin = x.clone()
    with torch.no_grad():
        splitting.baoab(equation, Clock(0.1), Noise(0), 0, x)
        equation.weights = torch.tensor([[0.7, 0.1, 0.1, 0.1]], dtype=torch.float64)
        start = x.clone()
        splitting.baoab(equation, Clock(0.1), Noise(0), 1, x)
        fresh = Equation(case, twin, equation.weights)
        splitting.baoab(fresh, Clock(0.1), Noise(0), 1, start)
    assert torch.equal(x, start)


def test_a_state_that_was_changed_before_its_last_kick_is_refused():
    x = some_state(1, 4, 4)
    equation = equation_of(Driven(), x)
    splitting.open_baoab(equation, Clock(0.1), Noise(0), 0, x)
    x += 1
    with pytest.raises(RuntimeError, match="changed before the step's last kick"):
        splitting.open_baoab(equation, Clock(0.1), Noise(0), 1, x)


def test_an_open_step_is_closed_when_the_next_one_has_another_length():
    x = some_state(1, 4, 4)
    y, one, two = x.clone(), equation_of(Driven(), x), equation_of(Driven(), x)
    for equation, state, transport in ((one, x, splitting.open_baoab), (two, y, splitting.baoab)):
        transport(equation, Clock(0.1), Noise(0), 0, state)
        transport(equation, Clock(0.05), Noise(0), 2, state)
        splitting.obabo(equation, Clock(0.1), Noise(0), 3, state)
    assert torch.equal(x, y)


def test_what_is_kept_for_an_equation_goes_with_it():
    x = some_state(1, 4, 4)
    equation = equation_of(Driven(), x)
    splitting.baoab(equation, Clock(0.1), Noise(0), 0, x)
    gone = weakref.ref(equation)
    del equation
    gc.collect()
    assert gone() is None


@dataclass(frozen=True)
class Circle(Driven):
    """Positions on a circle of length 2π, velocities on a line; the force sees shortest differences."""

    period: tuple[float | None, ...] = (2 * math.pi, None)
    dim: int = 1

    def force(self, t, x, mu):
        assert list(mu.period) == [2 * math.pi]
        return -mu.convolve(lambda z: z, x)

    def project(self, x):
        return torch.cat([x[..., :1].remainder(2 * math.pi), x[..., 1:]], -1)


def test_positions_on_a_circle_are_projected_and_compared_on_it():
    path = states(Circle(), n_particles=9, n_replicas=2, horizon=3.0, dt=0.1, seed=7, save_every=1, method="baoab")
    positions = path[1:, ..., 0]
    assert bool(((positions >= 0) & (positions < 2 * math.pi)).all())
    assert float((positions[1:] - positions[:-1]).abs().max()) > 5
    x = path[0]
    for step in range(30):
        noise, d = Noise(7), 1

        def force(q: Tensor) -> Tensor:
            z = q - q.mT
            return -(z - 2 * math.pi * torch.round(z / (2 * math.pi))).mean(-1, keepdim=True)

        w = noise.increment(step, (2, 9, 1), **DOUBLE)
        y = composed(
            x, force(x[..., :d]), w, 0.05, math.exp(-0.05), splitting.deviation(0.5, 0.7, 0.1), False
        )  # fmt: skip
        y[..., d:] += 0.05 * force(y[..., :d])
        x = Circle().project(y)
        torch.testing.assert_close(path[step + 1], x, rtol=1e-12, atol=1e-12)


# Discrete laws of linear equations


@dataclass(frozen=True)
class Moments:
    """Mean (2,) and covariance (2, 2) of (x, v)."""

    mean: np.ndarray
    cov: np.ndarray


def linear_map(scheme: str, stiffness: float, gamma: float, sigma: float, h: float) -> tuple[np.ndarray, np.ndarray]:
    """The matrix M and the covariance Q of one step for the force -stiffness·x.

    Written from the letters alone, by composing (M, Q) -> (P M, P Q Pᵀ + noise).
    """

    def kick(s: float) -> tuple[np.ndarray, np.ndarray]:
        return np.array([[1, 0], [-s * stiffness, 1]]), np.zeros((2, 2))

    def drift(s: float) -> tuple[np.ndarray, np.ndarray]:
        return np.array([[1, s], [0, 1]]), np.zeros((2, 2))

    def damp(s: float) -> tuple[np.ndarray, np.ndarray]:
        c = math.exp(-gamma * s)
        return np.diag([1, c]), np.diag([0, sigma**2 / (2 * gamma) * (1 - c * c)])

    letters = {"B": kick, "A": drift, "O": damp}
    matrix, noise = np.eye(2), np.zeros((2, 2))
    for letter in scheme.upper():
        part, added = letters[letter](h / scheme.upper().count(letter))
        matrix, noise = part @ matrix, part @ noise @ part.T + added
    return matrix, noise


def stationary(scheme: str, stiffness: float, gamma: float, sigma: float, h: float) -> np.ndarray:
    """The covariance C = M C Mᵀ + Q."""
    matrix, noise = linear_map(scheme, stiffness, gamma, sigma, h)
    flat = np.linalg.solve(np.eye(4) - np.kron(matrix, matrix), noise.flatten())
    return flat.reshape(2, 2)


@pytest.mark.parametrize("h", [0.1, 0.5, 1.2])
@pytest.mark.parametrize("gamma", [0.1, 1.0, 20.0])
def test_the_stationary_laws_of_a_quadratic_potential_are_exact_where_they_are_said_to_be(h, gamma):
    stiffness, t = 1.7, 0.6
    sigma = math.sqrt(2 * gamma * t)
    shrunk = 1 - stiffness * h**2 / 4
    # Leimkuhler, Matthews (2013): exact positions. For OBABO (velocity Verlet inside): exact velocities.
    np.testing.assert_allclose(
        stationary("baoab", stiffness, gamma, sigma, h), np.diag([t / stiffness, t * shrunk]), atol=1e-12
    )
    np.testing.assert_allclose(
        stationary("obabo", stiffness, gamma, sigma, h), np.diag([t / stiffness / shrunk, t]), atol=1e-12
    )


def recursion(scheme: str, case: GaussianKinetic, h: float, steps: int, n: int) -> tuple[Moments, Moments]:
    """Moments of one component of a replica's mean, and of a particle's deviation from it.

    The mean has stiffness κ + Tk and 1/N of the noise, deviations Tk and 1 - 1/N of it.
    """
    t = case.sigma**2 / (2 * case.gamma)
    start = np.diag([case.variance, t])
    found = []
    for stiffness, share, centre in (
        (case.kappa + t * case.stiffness, 1 / n, case.kappa * case.target / (case.kappa + t * case.stiffness)),
        (t * case.stiffness, 1 - 1 / n, 0.0),
    ):
        matrix, noise = linear_map(scheme, stiffness, case.gamma, case.sigma, h)
        mean = np.array([case.start[0] - centre, 0.0]) if share == 1 / n else np.zeros(2)
        cov = share * start
        for _ in range(steps):
            mean, cov = matrix @ mean, matrix @ cov @ matrix.T + share * noise
        found.append(Moments(mean + np.array([centre, 0.0]) * (share == 1 / n), cov))
    return found[0], found[1]


LAW_RUN: dict[str, Any] = {"n_particles": 50, "n_replicas": 400, "horizon": 4.0, "dt": 0.4, "seed": 8, "save_every": 1}
LAW_STEPS = (1, 3, 6, 10)


def z_scores(path: Tensor, case: GaussianKinetic, scheme: str, h: float) -> list[float]:
    """Of means and second moments at some times against the scheme's own.    path: (time, R, N, 2d)."""
    scores = []
    d, n = path.shape[-1] // 2, path.shape[2]
    for step in LAW_STEPS:
        mean, within = recursion(scheme, case, h, step, n)
        x = path[step].reshape(*path.shape[1:3], 2, d)
        m = x.mean(1)
        deviation = x - m.unsqueeze(1)
        for a in range(2):
            scores.append(z_score(m[:, a].mean(-1), mean.mean[a]))
            for b in range(a, 2):
                centred = (m[:, a] - mean.mean[a]) * (m[:, b] - mean.mean[b])
                scores.append(z_score(centred.mean(-1), mean.cov[a, b]))
                scores.append(z_score((deviation[:, :, a] * deviation[:, :, b]).mean((1, 2)), within.cov[a, b]))
    return scores


def z_score(samples: Tensor, expected: float) -> float:
    """Of independent replicas."""
    return (float(samples.mean()) - expected) / (float(samples.std()) / math.sqrt(len(samples)))


def law_holds(path: Tensor, case: GaussianKinetic, scheme: str, h: float) -> bool:
    return max(abs(z) for z in z_scores(path, case, scheme, h)) <= 4


@cache
def law_run(scheme: str) -> Tensor:
    return states(GaussianKinetic(start=(1.5, 1.5)), method=scheme, **LAW_RUN)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_gaussian_mean_field_law_has_the_moments_of_the_scheme(scheme):
    case = GaussianKinetic(start=(1.5, 1.5))
    assert law_holds(law_run(scheme), case, scheme, 0.4)
    # At this step the two schemes, and the equation itself, are told apart.
    assert not law_holds(law_run(scheme), case, "obabo" if scheme == "baoab" else "baoab", 0.4)


@pytest.mark.parametrize(
    "fault",
    [
        {"sigma": 1.1 * math.sqrt(2)},  # temperature σ²/γ
        {"sigma": math.sqrt(2 * 0.8 * 1.1)},  # σ read as a temperature
        {"gamma": 0.4},
        {"kappa": -0.7},
        {"kappa": 0.0},
        {"stiffness": 2.4},
    ],
)
def test_another_equation_is_rejected(fault):
    case = GaussianKinetic(start=(1.5, 1.5))
    assert not law_holds(law_run("baoab"), replace(case, **fault), "baoab", 0.4)


def faulty_kernel(fault: str) -> Callable[..., None]:
    true = Noise.kinetic_

    def kinetic(self, x, force, positions, half, decay, deviation, step, *, due=False):
        changes = {
            "growing": (half, 1 / decay, deviation, due),
            "half the friction": (half, math.sqrt(decay), deviation, due),
            "noise without friction": (half, decay, 1.1 * math.sqrt(2 * half), due),
            "one kick forgotten": (half, decay, deviation, False),
            "drift over h": (2 * half, decay, deviation, due),
        }
        true(self, x, force, positions, *changes[fault][:3], step, due=changes[fault][3])

    return kinetic


@pytest.mark.parametrize(
    "fault", ["growing", "half the friction", "noise without friction", "one kick forgotten", "drift over h"]
)
def test_another_step_is_rejected(monkeypatch, fault):
    monkeypatch.setattr(Noise, "kinetic_", faulty_kernel(fault))
    case = GaussianKinetic(start=(1.5, 1.5))
    settings = {**LAW_RUN, "save_every": 10} if fault == "one kick forgotten" else LAW_RUN
    path = states(case, method="baoab", **settings)
    if fault == "one kick forgotten":
        # Saved seldom: where a frame is taken the step is closed.
        path = torch.stack([path[0]] * 10 + [path[-1]])
        within = recursion("baoab", case, 0.4, 10, 50)[1]
        good = law_run("baoab")[-1]
        assert spread_holds(good, within)
        assert not spread_holds(path[-1], within)
    else:
        assert not law_holds(path, case, "baoab", 0.4)


def spread_holds(x: Tensor, within: Moments) -> bool:
    v = x[..., 2:] - x[..., 2:].mean(1, keepdim=True)
    q = x[..., :2] - x[..., :2].mean(1, keepdim=True)
    return all(
        abs(z_score(product.mean((1, 2)), expected)) <= 4
        for product, expected in ((v * v, within.cov[1, 1]), (q * q, within.cov[0, 0]))
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_equipartition_holds_as_far_as_the_scheme_has_it(scheme):
    # h = 0.8: BAOAB's velocities are 20 % too cold, OBABO's positions 30 % too wide, and nothing else is wrong.
    case = GaussianKinetic(kappa=0.7, target=0.0, stiffness=2.0, start=(0.0,))
    t = case.temperature
    x = states(case, n_particles=20, n_replicas=2000, horizon=24.0, dt=0.8, seed=2, method=scheme)[-1]
    cov = 0.95 * stationary(scheme, t * 2, 0.8, 1.1, 0.8) + 0.05 * stationary(scheme, t * 2 + 0.7, 0.8, 1.1, 0.8)
    squares = x.square().mean(1)
    assert abs(z_score(squares[:, 0], cov[0, 0])) <= 4
    assert abs(z_score(squares[:, 1], cov[1, 1])) <= 4
    assert abs(z_score((x[..., 0] * x[..., 1]).mean(1), 0.0)) <= 4
    # The other scheme's, and the exact one where this scheme has another.
    hot, wide = (cov[1, 1] / (1 - 0.8**2 * t * 2 / 4), cov[0, 0] * (1 - 0.8**2 * t * 2 / 4))
    if scheme == "baoab":
        assert abs(z_score(squares[:, 1], hot)) > 4
    else:
        assert abs(z_score(squares[:, 0], wide)) > 4


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_limit_sees_the_equation_that_the_schemes_split(scheme):
    # Moments of the mean-field limit against those of the scheme for N = ∞: an error of order h².
    case = GaussianKinetic()
    found = mfsde.limit.moments(case, [0.0, 2.0]).isel(time=1)
    errors = []
    for k in (20, 40):
        mean, within = recursion(scheme, case, 2.0 / k, k, 10**12)
        errors.append(
            np.append((mean.mean - found["mean"].values), (within.cov - found["covariance"].values).flatten())
        )
    assert np.abs(errors[1]).max() < 2e-3
    np.testing.assert_allclose(errors[0] / 4, errors[1], atol=0.02 * np.abs(errors[0]).max())
    other = mfsde.limit.moments(replace(case, gamma=0.9), [0.0, 2.0]).isel(time=1)
    assert np.abs(other["covariance"].values - found["covariance"].values).max() > 0.03
    pull = 0.35 * (float(found["mean"][0]) - 1) ** 2
    assert float(found["energy"]) == pytest.approx(pull, rel=1e-9)


# Orders


@pytest.mark.parametrize("scheme", SCHEMES)
def test_without_noise_the_schemes_are_second_order_methods(scheme):
    case = Driven(sigma=0.0)
    run = {"n_particles": 6, "horizon": 2.0, "seed": 0, "method": scheme}
    fine, *ends = (states(case, dt=2.0 / k, **run)[-1] for k in (1024, 32, 64, 128))
    errors = [float((end - fine).abs().max()) for end in ends]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.1)
    assert math.log2(errors[1] / errors[2]) == pytest.approx(2, abs=0.05)


def order_of(differences: Tensor) -> tuple[float, float]:
    """Slope in log₂ h of mean differences, and its standard error by deleting one replica.    differences: (2, R)."""
    n = differences.shape[1]
    total = differences.sum(1, keepdim=True)
    value = float((differences[0].mean() / differences[1].mean()).abs().log2())
    without = (total - differences) / (n - 1)
    each = (without[0] / without[1]).abs().log2()
    return value, float(torch.sqrt((n - 1) / n * (each - value).square().sum()))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_invariant_observables_of_a_nonharmonic_well_are_of_order_two(scheme):
    # Runs at h and h/2 share their path, which a convex well makes them forget to differ on: the difference of their
    # means is the difference of their errors. Velocities for BAOAB, positions for OBABO: the others are far smaller.
    component = 1 if scheme == "baoab" else 0
    means = []
    for k in (1, 2, 4):
        path = states(
            Quartic(), n_particles=100, n_replicas=100, horizon=16.0, dt=0.4 / k, seed=5,
            noise=Noise(5, substeps=4 // k), method=scheme, save_every=4 * k,
        )  # fmt: skip
        means.append(path[3:, ..., component].square().mean((0, 2)))
    value, stderr = order_of(torch.stack([means[0] - means[1], means[1] - means[2]]))
    assert stderr < 0.15
    # What is left of order four: at h = 0.4 its share is h² itself.
    assert abs(value - 2) <= 4 * stderr + 0.25
    assert abs(value - 1) > 4 * stderr + 0.25


def test_euler_and_the_splittings_follow_the_same_path_to_first_order():
    # Additive noise: all three have strong order 1, so that they differ by O(h) on one path.
    case = Driven()
    distances = []
    for k in (20, 40, 80):
        run = {"n_particles": 30, "n_replicas": 20, "horizon": 2.0, "dt": 2.0 / k, "seed": 3}
        shared = Noise(3, substeps=80 // k)
        ends = {m: states(case, method=m, noise=shared, **run)[-1] for m in ("euler", "baoab", "obabo")}
        distances.append([float((ends["euler"] - ends[m]).square().mean().sqrt()) for m in SCHEMES])
    for one in zip(*distances, strict=True):
        assert math.log2(one[0] / one[1]) == pytest.approx(1, abs=0.15)
        assert math.log2(one[1] / one[2]) == pytest.approx(1, abs=0.15)
    # On paths of their own they stay apart.
    other = states(case, method="baoab", **{**run, "seed": 4})[-1]
    assert float((ends["euler"] - other).square().mean().sqrt()) > 20 * distances[-1][0]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_coarse_run_and_a_fine_one_share_their_path(scheme):
    distances = []
    for k in (20, 40):
        run = {"n_particles": 30, "n_replicas": 20, "horizon": 2.0, "seed": 3, "method": scheme}
        coarse = states(Driven(), dt=2.0 / k, noise=Noise(3, substeps=160 // k), **run)[-1]
        fine = states(Driven(), dt=2.0 / 160, **run)[-1]
        distances.append(float((coarse - fine).square().mean().sqrt()))
    assert distances[0] < 0.05
    assert math.log2(distances[0] / distances[1]) > 0.9


def test_the_two_normals_of_a_step_are_independent_and_follow_the_path():
    like = torch.empty(40, 500, 1, dtype=torch.float64)
    first, second = splitting.halves(Noise(1), 3, like)
    w = Noise(1).increment(3, like.shape, **DOUBLE)
    torch.testing.assert_close((first + second) / math.sqrt(2), w, rtol=0, atol=1e-14)
    for product, expected in ((first * second, 0.0), (first * first, 1.0), (second * second, 1.0)):
        assert abs(z_score(product.mean((1, 2)), expected)) <= 4
    # The first goes with the first fine half of the path: its correlation with it is √3/2 of the rest's and 1/2 of w's.
    early = Noise(1).normals(6, like.shape, **DOUBLE)
    first, second = splitting.halves(Noise(1, substeps=2), 3, like)
    correlation = 0.5 * (1 + math.sqrt(3) / 2)
    assert abs(z_score((first * early).mean((1, 2)), correlation)) <= 4
    assert abs(z_score((second * early).mean((1, 2)), 1 - correlation)) <= 4


# Invariant laws and the overdamped limit


@cache
def equilibrium(sigma: float = 0.8) -> Tensor:
    """Frames of a double well in one of its two states, from t = 30 on: (time, R, N, 2)."""
    case = KineticDoubleWell(theta=2.0, gamma=0.8, sigma=sigma, initial_mean=(0.8,), initial_variance=0.2)
    run = {"n_particles": 400, "n_replicas": 40, "horizon": 60.0, "dt": 0.1, "seed": 6, "save_every": 20}
    return states(case, method="baoab", **run)[15:]


def is_product(path: Tensor, positions: EmpiricalMeasure, t: float) -> bool:
    """Positions of the given law and independent velocities N(0, T): moments to the fourth, to 4 standard errors.

    Biases: h²/4·E H'' ≤ 0.0065 of T for velocities at h = 0.1, of the same order or smaller for positions; 1/N = 0.0025
    of the law's moments for the finite system.
    """

    def mean(f: Callable[[Tensor], Tensor]) -> float:
        return float(positions.integrate(f).sum())

    x, v = path[..., 0], path[..., 1]
    m1, m2, m4 = (mean(lambda q, p=p: q[..., 0] ** p) for p in (1, 2, 4))
    expected = [
        (x, m1), (x**2, m2), (x**4, m4), (v, 0.0), (v**2, t), (v**4, 3 * t * t),
        (x * v, 0.0), (x * v**2, m1 * t), (x**2 * v**2, m2 * t),
    ]  # fmt: skip
    ok = True
    for sample, value in expected:
        replicas = sample.mean((0, 2))
        stderr = float(replicas.std()) / math.sqrt(len(replicas))
        ok &= abs(float(replicas.mean()) - value) <= 4 * stderr + 0.01 * max(abs(value), t)
    return ok


def test_the_invariant_law_is_the_gibbs_law_of_positions_times_gaussian_velocities():
    case = KineticDoubleWell(theta=2.0, gamma=0.8, sigma=0.8, initial_mean=(0.8,), initial_variance=0.2)
    assert case.temperature == pytest.approx(0.4)
    law = mfsde.limit.gibbs(case.overdamped())
    assert float(law.mean[0]) > 0.5
    assert is_product(equilibrium(), law.as_measure(), 0.4)
    # The same from the energy, with no hand-written drift.
    derived = mfsde.limit.gibbs(KineticLangevin.overdamped(case))
    torch.testing.assert_close(torch.as_tensor(derived.mean), torch.as_tensor(law.mean), rtol=0, atol=1e-7)


@pytest.mark.parametrize("sigma", [0.8 / math.sqrt(2), 0.8 * math.sqrt(0.8), 0.84])
def test_invariant_laws_of_other_temperatures_are_rejected(sigma):
    # σ²/(4γ), σ²/2, and one that is 10 % off.
    case = KineticDoubleWell(theta=2.0, gamma=0.8, sigma=sigma, initial_mean=(0.8,), initial_variance=0.2)
    law = mfsde.limit.gibbs(case.overdamped())
    assert not is_product(equilibrium(), law.as_measure(), case.temperature)
    assert not is_product(equilibrium(), law.as_measure(), 0.4)


def test_velocities_that_lean_on_positions_are_rejected():
    law = mfsde.limit.gibbs(KineticDoubleWell(theta=2.0, gamma=0.8, initial_mean=(0.8,)).overdamped())
    path = equilibrium().clone()
    path[..., 1] += 0.1 * (path[..., 0] - path[..., 0].mean())
    assert not is_product(path, law.as_measure(), 0.4)


@pytest.mark.parametrize("scheme", ["baoab", "obabo"])
def test_large_friction_gives_the_overdamped_path_at_times_multiplied_by_the_friction(scheme):
    # X + V/γ solves dY = force(X)/γ dt + σ/γ dW; with ds = dt/γ that is the overdamped equation up to X - Y = O(1/γ).
    # Equal normals step by step, since √(2T ds) = σ √dt / γ.
    distances = []
    for gamma in (4.0, 8.0):
        case = KineticDoubleWell(gamma=gamma, sigma=math.sqrt(gamma), initial_mean=(0.5,), initial_variance=0.5)
        run = {"n_particles": 50, "n_replicas": 10, "seed": 2}
        # γh = O(1/γ): the normals of OBABO are Euler's up to a share γh/4.
        h = 0.5 / gamma**2
        x = states(case, horizon=gamma, dt=h, method=scheme, **run)
        y = states(case.overdamped(), horizon=1.0, dt=h / gamma, **run)
        assert torch.equal(x[0, ..., :1], y[0])
        # x_0 + v_0/γ is where Y starts: another O(1/γ).
        distances.append(float((x[-1, ..., :1] + x[-1, ..., 1:] / gamma - y[-1]).square().mean().sqrt()))
        unscaled = states(case.overdamped(), horizon=gamma, dt=h, **run)
        assert float((x[-1, ..., :1] - unscaled[-1]).square().mean().sqrt()) > 2 * distances[-1]
    assert math.log2(distances[0] / distances[1]) == pytest.approx(1, abs=0.3)


# Forces, laws, observables


def test_the_derived_force_is_that_of_the_energy_and_of_the_temperature():
    case, x = KineticDoubleWell(theta=0.7, gamma=0.4, sigma=0.9), some_state(2, 6, 3)
    mu = EmpiricalMeasure(x)
    torch.testing.assert_close(case.force(0.0, x, mu), KineticLangevin.force(case, 0.0, x, mu), rtol=0, atol=1e-12)
    gaussian = GaussianKinetic(gamma=0.4, sigma=0.9)
    t = 0.81 / 0.8
    by_hand = -(0.7 * (mu.mean() - 1.0) + t * 2.0 * x)
    torch.testing.assert_close(gaussian.force(0.0, x, mu), by_hand, rtol=0, atol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_drift_and_diffusion_are_those_of_the_force(weighted):
    case, x = GaussianKinetic(), some_state(2, 6, 4)
    w = torch.softmax(some_state(2, 6, seed=3), -1) if weighted else None
    drift = case.drift(0.3, x, EmpiricalMeasure(x, w))
    force = case.force(0.3, x[..., :2], EmpiricalMeasure(x[..., :2].contiguous(), w))
    torch.testing.assert_close(drift[..., :2], x[..., 2:], rtol=0, atol=0)
    torch.testing.assert_close(drift[..., 2:], force - 0.8 * x[..., 2:], rtol=0, atol=1e-13)
    sigma = case.diffusion(0.3, x, EmpiricalMeasure(x))
    assert sigma.shape == (1, 1, 4, 2)
    assert torch.equal(sigma[0, 0], torch.tensor([[0, 0], [0, 0], [1.1, 0], [0, 1.1]], dtype=torch.float64))


def test_the_initial_law_joins_positions_with_velocities_of_the_temperature():
    case = GaussianKinetic(start=(1.0, -1.0), variance=0.3)
    law = case.initial()
    assert isinstance(law, Gaussian)
    assert law.mean.tolist() == [1.0, -1.0, 0.0, 0.0]
    torch.testing.assert_close(torch.diagonal(law.cov), torch.tensor([0.3, 0.3, 0.75625, 0.75625], **DOUBLE))
    uniform = case.with_velocities(mfsde.Uniform([0.0, 0.0], [1.0, 2.0]))
    assert isinstance(uniform, Product)
    z = some_state(1, 5, 4)
    x = uniform.from_variates(z)
    torch.testing.assert_close(x[..., 2:], math.sqrt(0.75625) * z[..., 2:])
    torch.testing.assert_close(x[..., :2], mfsde.Uniform([0.0, 0.0], [1.0, 2.0]).from_variates(z[..., :2]))


def test_a_product_law_has_the_moments_and_densities_of_its_factors():
    law = Product([mfsde.Uniform(0.0, 2.0), mfsde.Dirac(3.0), Gaussian([1.0], 0.5)])
    assert (law.dim, law.n_variates) == (3, 2)
    mu = law.as_measure()
    assert mu.n_particles == 64 * 64
    torch.testing.assert_close(mu.mean()[0], law.mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(mu.covariance(), law.cov, rtol=0, atol=1e-12)
    torch.testing.assert_close(law.cov, torch.diag(torch.tensor([1 / 3, 0, 0.5], **DOUBLE)))
    pair = Product([mfsde.Uniform(0.0, 2.0), Gaussian([1.0], 0.5)])
    x = torch.tensor([[0.5, 1.5], [3.0, 0.0]], **DOUBLE)
    expected = -math.log(2) + Gaussian([1.0], 0.5).log_prob(x[:1, 1:])
    torch.testing.assert_close(pair.log_prob(x)[:1], expected)
    assert float(pair.log_prob(x)[1]) == -math.inf
    many = Product([mfsde.Uniform([0.0] * 2, [2.0] * 2), Gaussian([1.0] * 2, 0.5)]).as_measure()
    assert many.n_particles == 4096
    torch.testing.assert_close(many.mean()[0], torch.ones(4, **DOUBLE), rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="at least one"):
        Product([])


def test_the_law_of_positions_keeps_weights_torus_and_what_it_is():
    x, w = some_state(2, 5, 4), torch.softmax(some_state(2, 5, seed=1), -1)
    mu = law_of_positions(EmpiricalMeasure(x, w, period=[1.0, None, None, None]))
    assert torch.equal(mu.points, x[..., :2])
    assert torch.equal(mu.weights, w)
    assert mu.period == [1.0, None]
    assert law_of_positions(EmpiricalMeasure.given(x, w))._is_given
    assert law_of_positions(EmpiricalMeasure(x)).is_uniform


def test_a_weighted_system_runs_with_its_weights():
    @dataclass(frozen=True)
    class Weighted(GaussianKinetic):
        def initial(self):
            return EmpiricalMeasure(some_state(8, 2), torch.softmax(some_state(8, seed=1), -1))

    path = states(Weighted(), n_particles=8, horizon=0.3, dt=0.1, seed=1, method="baoab", save_every=1)
    w, x = torch.softmax(some_state(8, seed=1), -1)[:, None], path[0]
    for step in range(3):

        def force(q: Tensor) -> Tensor:
            return -(0.7 * ((w * q).sum(-2, keepdim=True) - 1) + 0.75625 * 2 * q)

        increment = Noise(1).increment(step, (1, 8, 1), **DOUBLE)
        spread = splitting.deviation(0.8, 1.1, 0.1)
        x = composed(x, force(x[..., :1]), increment, 0.05, math.exp(-0.08), spread, False)
        x[..., 1:] += 0.05 * force(x[..., :1])
        torch.testing.assert_close(path[step + 1], x, rtol=1e-12, atol=1e-12)


def test_observables_of_a_kinetic_run_speak_of_positions():
    case = GaussianKinetic(start=(1.0, 0.5))
    names = ("energy", "confinement", "free_energy")
    run = mfsde.simulate(
        case, n_particles=50, horizon=0.2, dt=0.1, seed=1, method="baoab", observables=names, dtype=torch.float64
    )
    x = torch.from_numpy(run["position"].values)[-1]
    q, v = x[..., :2], x[..., 2:]
    energy = 0.35 * (q.mean(1) - 1).square().sum(-1)
    confinement = q.square().sum(-1).mean(-1)
    assert float(run["energy"][-1, 0]) == pytest.approx(float(energy), rel=1e-12)
    assert float(run["confinement"][-1, 0]) == pytest.approx(float(confinement), rel=1e-12)
    entropy = mfsde.observables.gaussian_entropy(EmpiricalMeasure(x))
    kinetic = 0.5 * v.square().sum(-1).mean(-1)
    free = energy + case.temperature * (confinement - entropy) + kinetic
    assert float(run["free_energy"][-1, 0]) == pytest.approx(float(free), rel=1e-12)
    with pytest.raises(TypeError, match="overdamped"):
        mfsde.model.temperature(case)
    with pytest.raises(ValueError, match=r"gibbs\(scenario.overdamped\(\)\)"):
        mfsde.limit.gibbs(case)


def test_the_free_energy_of_a_gaussian_run_decreases_to_its_minimum():
    # Gaussian laws: the plug-in entropy is the entropy. At the minimum V = F(m*) + T KL-like terms, exactly.
    case = GaussianKinetic(gamma=0.8, sigma=1.1, stiffness=1 / 0.75625, start=(2.0,), variance=2.0)
    run = mfsde.simulate(
        case,
        n_particles=20_000,
        horizon=16.0,
        dt=0.05,
        seed=1,
        save_every=20,
        method="baoab",
        observables="free_energy",
    )
    free = run["free_energy"].values[:, 0]
    assert (np.diff(free) < 0.01).all()
    t, pull = 0.75625, 0.7 / 1.7
    least = 0.35 * (1 - pull) ** 2 + 0.5 * pull**2 + t - t * math.log(2 * math.pi * math.e * t)
    assert free[-1] == pytest.approx(least, abs=0.02)


def test_decoupled_particles_feel_the_given_law_alone():
    case = GaussianKinetic()
    law = Gaussian([3.0, 0.0], [[1.0, 0.0], [0.0, 1.0]])
    run = {"horizon": 0.3, "dt": 0.1, "seed": 1, "method": "baoab"}
    alone = mfsde.decoupled(case, law)
    few, many = (states(alone, n_particles=n, **run) for n in (5, 9))
    assert torch.equal(few, many[:, :, :5])
    x = few[0]
    for step in range(3):

        def force(q: Tensor) -> Tensor:
            return -(0.7 * 2.0 + 0.75625 * 2 * q)

        w = Noise(1).increment(step, (1, 5, 1), **DOUBLE)
        x = composed(x, force(x[..., :1]), w, 0.05, math.exp(-0.08), splitting.deviation(0.8, 1.1, 0.1), False)
        x[..., 1:] += 0.05 * force(x[..., :1])
    torch.testing.assert_close(few[-1], x, rtol=1e-9, atol=1e-9)


def test_the_double_well_runs_as_it_suggests():
    settings = {**KineticDoubleWell().suggested(), "horizon": 0.5, "n_particles": 200}
    run = mfsde.simulate(KineticDoubleWell(), **settings)
    x = torch.from_numpy(run["position"].values)
    assert run.attrs["method"] == "baoab"
    expected = 0.5 * x[..., 1].square().mean(-1)
    torch.testing.assert_close(torch.from_numpy(run["kinetic_energy"].values), expected, rtol=1e-5, atol=1e-6)
    virial = (x[..., 0] * x[..., 1]).mean(-1)
    torch.testing.assert_close(torch.from_numpy(run["virial"].values), virial, rtol=1e-4, atol=1e-6)


# Bad input


def refused(case: Any, message: str, kind: type[Exception] = ValueError, method: str = "baoab") -> None:
    with pytest.raises(kind, match=message):
        mfsde.simulate(case, n_particles=6, horizon=0.2, dt=0.1, seed=0, method=method)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bad_parameters_are_refused(scheme):
    refused(Driven(gamma=-0.5), "gamma = -0.5 would speed particles up", method=scheme)
    refused(Driven(gamma=-0.5), "gamma = -0.5 would speed particles up", method="euler")
    refused(Driven(sigma=math.inf), "sigma = inf is not finite", method=scheme)
    refused(Driven(sigma=(0.1, 0.2)), r"sigma is \(0.1, 0.2\); the equation needs one number", TypeError, scheme)
    refused(Driven(gamma="1"), "gamma is '1'", TypeError, scheme)
    refused(GaussianKinetic(gamma=0.0), "gamma = 0 has no temperature", method=scheme)


def test_states_of_an_odd_dimension_are_refused():
    @dataclass(frozen=True)
    class Odd(Driven):
        def initial(self):
            return Gaussian([0.0] * 3, 1.0)

    refused(Odd(), "got 3 components")
    refused(Odd(), "got 3 components", method="euler")


@dataclass(frozen=True)
class Bare:
    """What a user writes without inheriting: drift and diffusion of the state, and the force to split it."""

    gamma: float = 0.5
    sigma: float = 0.3
    damping: float = 0.5
    spread: tuple[float, ...] = (0.0, 0.3)

    def force(self, t, x, mu):
        return -x - (x - mu.mean())

    def drift(self, t, x, mu):
        q, v = x[..., :1], x[..., 1:]
        return torch.cat([v, -q - (q - mu.mean()[..., :1]) - self.damping * v], -1)

    def diffusion(self, t, x, mu):
        return x.new_tensor(self.spread)[:, None][None, None]

    def initial(self):
        return Gaussian([1.0, 0.0], 0.5)


def test_any_scenario_with_a_force_can_be_split_if_it_is_the_force_of_its_drift():
    run = {"n_particles": 6, "horizon": 1.0, "dt": 0.1, "seed": 0, "method": "baoab"}
    assert torch.equal(states(Bare(), **run)[-1].isfinite(), torch.ones(1, 6, 2, dtype=torch.bool))
    refused(Bare(damping=0.6), r"drift\(t, x, mu\) is not \(v, force - γv\)")
    refused(Bare(spread=(0.1, 0.3)), r"diffusion\(t, x, mu\) is not \(0, σI\)")
    refused(Bare(sigma=0.4), r"diffusion\(t, x, mu\) is not \(0, σI\)")

    @dataclass(frozen=True)
    class Diagonal(Bare):
        def diffusion(self, t, x, mu):
            return x.new_tensor([0.0, 0.3])

    refused(Diagonal(), r"not the matrix \(0, σI\) of shape \(1, 1, 2, 1\)")


def test_scenarios_without_a_force_are_refused():
    refused(mfsde.scenarios.MeanFieldOU(), r"MeanFieldOU has no force\(t, x, mu\)", TypeError)

    @dataclass(frozen=True)
    class Forceless(Kinetic):
        gamma: float = 1.0
        sigma: float = 1.0

        def initial_position(self):
            return Gaussian([0.0], 1.0)

    refused(Forceless(), r"does not define force\(t, x, mu\)", TypeError)

    @dataclass(frozen=True)
    class Unconfined(GaussianKinetic):
        confinement = KineticLangevin.confinement

    refused(Unconfined(), r"does not define confinement\(x\)", TypeError)

    @dataclass(frozen=True)
    class Startless(Quartic):
        initial_position = Kinetic.initial_position

    refused(Startless(), r"defines neither initial\(\).*nor initial_position\(\)", TypeError)


def test_what_a_kinetic_scenario_does_not_declare_is_named():
    class Started:
        def initial(self):
            return Gaussian([0.0, 0.0], 1.0)

    @dataclass(frozen=True)
    class Frictionless(Started, Kinetic):
        sigma: float = 1.0

    @dataclass(frozen=True)
    class Noiseless(Started, Kinetic):
        gamma: float = 1.0

    @dataclass(frozen=True)
    class Powerless(Started, KineticLangevin):
        gamma: float = 1.0
        sigma: float = 1.0

    needs = "the dynamics that it inherits needs all of gamma, sigma"
    for method in ("euler", "baoab"):
        refused(Frictionless(), rf"Frictionless declares no gamma; {needs}, as", TypeError, method)
        refused(Noiseless(), rf"Noiseless declares no sigma; {needs}, as", TypeError, method)
        refused(Powerless(), rf"Powerless declares no energy; {needs}, energy, as", TypeError, method)


def test_forces_of_the_wrong_shape_and_forces_that_are_not_finite_are_refused():
    @dataclass(frozen=True)
    class Wide(Bare):
        def force(self, t, x, mu):
            return torch.cat([x, x], -1)

    @dataclass(frozen=True)
    class Singular(Bare):
        def force(self, t, x, mu):
            return x / 0

    @dataclass(frozen=True)
    class Other(Bare):
        def force(self, t, x, mu):
            return super().force(t, x, mu).double()

    refused(Wide(), r"force returned shape \(1, 6, 2\) for positions \(1, 6, 1\)")
    refused(Singular(), "force is not finite")
    refused(Other(), "force returned torch.float64", TypeError)


def test_common_noise_and_velocities_on_a_circle_are_refused():
    @dataclass(frozen=True)
    class Shared(Driven):
        def common_diffusion(self, t, x, mu):
            return 0.1

    refused(Shared(), "have no common noise")
    refused(Circle(period=(2 * math.pi, 1.0)), "puts velocities on a circle")


def test_the_fused_step_refuses_tensors_that_do_not_match():
    x, force = torch.zeros(1, 4, 2), torch.zeros(1, 4, 1)
    for wrong, message in (
        (torch.zeros(1, 4, 2), "expected \\(R, N, 2d\\)"),
        (force.double(), "one dtype"),
        (torch.zeros(1, 4, 2)[..., ::2], "not contiguous"),
        (torch.zeros(1, 4, 1, requires_grad=True), "requires a gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            Noise(0).kinetic_(x, wrong, torch.zeros(1, 4, 1), 0.1, 0.9, 0.1, 0)
        with pytest.raises(ValueError, match=message):
            kick_(x, wrong, 0.1)


def test_a_blow_up_names_its_step():
    @dataclass(frozen=True)
    class Explosive(Quartic):
        def force(self, t, x, mu):
            return x**3

        def initial(self):
            return mfsde.Dirac([5.0, 0.0])

    with pytest.raises(mfsde.BlowUp, match="blew up") as raised:
        states(Explosive(), n_particles=3, horizon=20.0, dt=0.1, seed=0, method="baoab")
    step = raised.value.step
    fine = states(Explosive(), n_particles=3, horizon=0.1 * (step - 1), dt=0.1, seed=0, method="baoab", save_every=1)
    assert bool(torch.isfinite(fine).all())


def test_a_decoupled_kinetic_run_is_measured_as_the_run_itself():
    case = KineticDoubleWell()
    settings = {"n_particles": 50, "horizon": 0.1, "dt": 0.05, "seed": 1, "method": "baoab"}
    settings["observables"] = ("energy", "confinement", "mean", "covariance", "entropy", "free_energy")
    run = mfsde.simulate(case, **settings)
    apart = mfsde.simulate(mfsde.decoupled(case, case.initial()), **settings)
    for name in run.data_vars:
        assert np.array_equal(run[name][0], apart[name][0]), name


def test_a_law_of_positions_alone_is_no_law_of_a_kinetic_state():
    """In even dimension half of the positions would be read as velocities."""
    case = KineticDoubleWell(initial_mean=(0.5, -0.5))
    flow = mfsde.decoupled(case, case.initial_position())
    with pytest.raises(ValueError, match="the law at t = 0 lives in dimension 2, the particles in 4"):
        mfsde.simulate(flow, n_particles=20, horizon=0.1, dt=0.05, seed=1, method="baoab")
