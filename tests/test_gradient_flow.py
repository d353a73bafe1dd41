"""Gradient flows without noise: kinks that hold and release, first order in the step, the energy identity with the mean
norm; the adaptive scheme to its tolerance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.optimize import brentq
from torch import Tensor

import mfsde
from mfsde import EmpiricalMeasure
from mfsde.clock import Clock
from mfsde.convex_sets import Ball, Box, Simplex
from mfsde.forward_backward import check_proximal
from mfsde.forward_backward import proximal as proximal_step
from mfsde.gradient_flow import GradientFlow
from mfsde.limit import characteristics
from mfsde.model import Equation
from mfsde.noise import Noise
from mfsde.regularisers import L1, GroupNorm, PathNorm, Regulariser, SquaredNorm
from mfsde.runge_kutta import TOLERANCES, check_dopri5, dopri5

DOUBLE = torch.float64
RUN = {"dtype": DOUBLE, "seed": 0}


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def path(scenario: Any, **settings: Any) -> np.ndarray:
    """Positions at every step, (time, R, N, d)."""
    return mfsde.simulate(scenario, **{**RUN, "save_every": 1, "method": "proximal", **settings})["position"].values


@dataclass(frozen=True)
class Points:
    """A start from given points (N, d)."""

    points: Tensor

    def initial(self) -> EmpiricalMeasure:
        return EmpiricalMeasure(self.points)


# A kink that holds and releases: x' ∈ a(t) - x - λ∂|x|, a(t) = t - 2, for every particle alone ------------------------


@dataclass(frozen=True)
class Following(GradientFlow, Points):
    """F = ½∫|x - a(t)|² dm, a(t) = t - 2, V = λ|x|."""

    threshold: float = 1.2
    points: Tensor = field(default_factory=lambda: torch.tensor([[1.0], [0.2], [0.0], [-0.7], [4.0]], dtype=DOUBLE))

    @property
    def regulariser(self) -> L1:
        return L1(self.threshold)

    def smooth_drift(self, t, x, mu):
        return t - 2 - x


def following(x: float, c: float, t: np.ndarray) -> np.ndarray:
    """The exact path, piece by piece: x' = t - 2 - x - c sign x, held at 0 while |t - 2| <= c."""
    start, out = 0.0, np.zeros_like(t)
    while start < t[-1]:
        side = math.copysign(1.0, x if x else start - 2) if x or abs(start - 2) >= c else 0.0
        if side == 0:
            start = 2 + c
            continue

        def free(s: Any, x=x, start=start, side=side) -> Any:
            shift = -3 - side * c
            return s + shift + (x - start - shift) * np.exp(start - s)

        ahead = np.linspace(start, t[-1], 4001)[1:]
        crossed = np.flatnonzero(free(ahead) * side <= 0)
        end = brentq(free, start + 1e-12, ahead[crossed[0]]) if len(crossed) else t[-1]
        during = (t >= start) & (t <= end)
        out[during] = free(t[during])
        x, start = 0.0, end
    return out


STEPS = (60, 120, 240, 480)


def first_order(errors: list[float]) -> bool:
    """Over the numbers of steps: slope 1 and limit 0, both up to where between two steps the events happen to fall."""
    h = 1 / np.array(STEPS)
    slope = np.polyfit(np.log(h), np.log(errors), 1)[0]
    limit = np.polyfit(h, errors, 1, w=1 / h)[1]
    return abs(slope - 1) < 0.15 and abs(limit) < 0.5 * errors[-1]


def errors_of(scenario: Any, exact: Callable[[np.ndarray], np.ndarray], horizon: float) -> list[float]:
    """Mean distance of the particles from their exact paths (N, time), for all numbers of steps."""
    found = []
    for n_steps in STEPS:
        x = path(scenario, n_particles=len(scenario.points), horizon=horizon, dt=horizon / n_steps)[:, 0, :, 0]
        found.append(float(np.abs(x.T - exact(np.linspace(0, horizon, n_steps + 1))).mean()))
    return found


@dataclass(frozen=True)
class SquaredStep(Following):
    def proximal(self, x, h):
        return self.regulariser.prox(x, h * h)


@dataclass(frozen=True)
class NoKink(Following):
    def proximal(self, x, h):
        return x


@dataclass(frozen=True)
class Slower(Following):
    def smooth_drift(self, t, x, mu):
        return (t - 2 - x) / mu.n_particles


def test_particles_stick_at_zero_and_are_released_to_first_order_in_the_step():
    case = Following()

    def exact(t: np.ndarray) -> np.ndarray:
        return np.stack([following(x, 1.2, t) for x in case.points[:, 0].tolist()])

    errors = errors_of(case, exact, 4.5)
    assert first_order(errors)
    assert errors[-1] < 0.01
    for fault in (SquaredStep(), NoKink(), Slower()):
        assert not first_order(errors_of(fault, exact, 4.5)), fault


def test_a_particle_at_the_kink_is_at_zero_exactly_for_as_long_as_the_exact_one():
    h, case = 0.01, Following()
    x = path(case, n_particles=5, horizon=4.5, dt=h)[:, 0, :, 0]
    t = np.linspace(0, 4.5, 451)
    for k, start in enumerate(case.points[:, 0].tolist()):
        exact = following(start, 1.2, t)
        held = exact == 0
        # Up to the first steps after the meeting, and to the step that sees |ṽ| > λ.
        assert abs(int((x[:, k] == 0).sum()) - int(held.sum())) <= 3
        assert (x[:, k] == 0)[held][3:].all()
        assert held.sum() > 150
        assert (x[1:, k] > 0)[t[1:] > 3.2 + 2 * h].all()
    # The minimal-norm drift alone, by explicit steps, hops over the kink and back.
    hopping = path(case, n_particles=5, horizon=4.5, dt=h, method="euler")[:, 0, 0, 0]
    assert (hopping != 0).all()
    assert (np.diff(np.sign(hopping[150:300])) != 0).sum() > 20


def test_the_limit_does_not_depend_on_the_step_once_at_rest():
    """Fixed points of the scheme are those of the flow: ṽ ∈ ∂V, whatever h."""

    @dataclass(frozen=True)
    class Resting(Following):
        def smooth_drift(self, t, x, mu):
            return 1.5 - x

    for h in (0.5, 0.1):
        end = path(Resting(), n_particles=5, horizon=40.0, dt=h)[-1]
        np.testing.assert_allclose(end, 0.3, atol=1e-8)


# Particles that interact: F = ½(mean - y)², V = λ|x| ------------------------------------------------------------------


@dataclass(frozen=True)
class Average(GradientFlow, Points):
    target: float = -0.6
    threshold: float = 0.35
    points: Tensor = field(default_factory=lambda: torch.tensor([[2.0], [0.9], [0.4], [-0.5]], dtype=DOUBLE))

    @cached_property
    def energy(self):
        return mfsde.Energy(lambda mu: 0.5 * (mu.integrate(lambda x: x[..., 0]) - self.target).square())

    @property
    def regulariser(self):
        return L1(self.threshold)


def average_path(case: Average, times: np.ndarray) -> np.ndarray:
    """The exact piecewise flow, (N, T): x_i' = y - M - λ sign x_i, or held at 0 while |y - M| <= λ.

    Between two events everything is a linear equation, solved to 1e-12; an event is a particle meeting 0 or let go.
    """
    x, t, out = case.points[:, 0].numpy().copy(), 0.0, []
    waiting = list(times)
    while waiting:
        v = case.target - x.mean()
        loose = (x != 0) | (abs(v) > case.threshold)
        sign = np.where(x != 0, np.sign(x), np.sign(v))

        def slope(s, z, loose=loose, sign=sign):
            return np.where(loose, case.target - z.mean() - case.threshold * sign, 0.0)

        def meets(s, z, loose=loose, sign=sign):
            return np.min(np.where(loose & (z * sign > -1), z * sign, 1.0))

        def lets_go(s, z, loose=loose):
            return 1.0 if loose.all() else case.threshold - abs(case.target - z.mean())

        meets.terminal = lets_go.terminal = True
        meets.direction = lets_go.direction = -1
        end = waiting[-1]
        found = solve_ivp(slope, (t, end), x, "DOP853", rtol=1e-12, atol=1e-13, events=[meets, lets_go],
                          dense_output=True)  # fmt: skip
        while waiting and waiting[0] <= found.t[-1]:
            out.append(found.sol(waiting.pop(0)))
        t, x = found.t[-1], found.y[:, -1].copy()
        if found.t_events[0].size:
            x[np.argmin(np.where(loose, np.abs(x), np.inf))] = 0.0
    return np.stack(out, 1)


@dataclass(frozen=True)
class ForgottenShare(Average):
    """∂_{x_i}F^N in place of N ∂_{x_i}F^N."""

    def smooth_drift(self, t, x, mu):
        return super().smooth_drift(t, x, mu) / mu.n_particles


def test_interacting_particles_follow_the_piecewise_solution_to_first_order():
    case = Average()
    assert first_order(errors_of(case, lambda t: average_path(case, t), 3.0))
    for fault in (ForgottenShare(), replace(case, threshold=0.3)):
        assert not first_order(errors_of(fault, lambda t: average_path(case, t), 3.0)), fault
    x = average_path(case, np.linspace(0, 3.0, 7))
    assert (x[:, -1] == 0).sum() in (1, 2)  # some have met the kink and stay


def test_the_objective_never_increases_and_what_it_loses_is_the_dissipation():
    """d/dt F_m = -N⁻¹ Σ|x_i'|²: the mean norm. The sum over particles, or their N-th, is another number."""
    case = Average()
    losses = []
    for n_steps in (300, 600):
        h = 3.0 / n_steps
        run = mfsde.simulate(case, n_particles=4, horizon=3.0, dt=h, save_every=1, method="proximal", **RUN)
        objective, x = run["objective"].values[:, 0], run["position"].values[:, 0, :, 0]
        assert (np.diff(objective) <= 0).all()
        speeds = np.square(np.diff(x, axis=0) / h)
        lost = objective[0] - objective[-1]
        losses.append([abs(share * speeds.sum() * h - lost) / lost for share in (1 / 4, 1.0, 1 / 16)])
    assert losses[1][0] < 0.01
    assert losses[1][0] < 0.6 * losses[0][0]
    assert min(losses[1][1:]) > 0.5


# The velocity of minimal norm -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Neurons(GradientFlow):
    """½|∫ (w tanh θ₁, w sin θ₂, θ₁w²) dm - y|² in R³, with any regulariser."""

    regulariser: Any = None

    @cached_property
    def energy(self):
        def features(x: Tensor) -> Tensor:
            w, a, b = x.unbind(-1)
            return torch.stack([w * torch.tanh(a), w * torch.sin(b), a * w * w], -1)

        return mfsde.Energy(
            lambda mu: 0.5 * (mu.integrate(features) - mu.points.new_tensor([0.7, -0.4, 0.2])).square().sum(-1)
        )

    def initial(self):
        return mfsde.Gaussian([0.2, 0.0, -0.3], 0.5)


REGULARISERS: list[Regulariser | None] = [
    None,
    L1(0.3, (0,)),
    L1(0.2),
    GroupNorm(0.4, ((1, 2),)),
    PathNorm(0.5),
    SquaredNorm(0.3),
    Box(-0.5, 0.4),
    Ball(0.8),
    Simplex(),
    L1(0.2, (0,)) + Ball(0.6, 0.0, (1, 2)),
]


def at_kinks(v: Regulariser | None, seed: int = 0) -> Tensor:
    x = normals(2, 40, 3, seed=seed) * torch.logspace(-1.5, 0.5, 40, dtype=DOUBLE)[:, None]
    return x if v is None else v.prox(x, 0.9)


@pytest.mark.parametrize("v", REGULARISERS, ids=repr)
@pytest.mark.parametrize("weighted", [False, True])
def test_along_the_velocity_the_objective_decreases_at_its_mean_square(v, weighted):
    """(F(x + εv) - F(x))/ε → -∫|v|² dm, on kinks and walls too (where the domain is left by ε², drawn back)."""
    case, x = Neurons(v), at_kinks(v)
    weights = torch.softmax(normals(2, 40, seed=1), -1) if weighted else None

    def objective(y: Tensor) -> Tensor:
        return case.objective(EmpiricalMeasure(y, weights))

    mu = EmpiricalMeasure(x, weights)
    speed = case.drift(0.0, x, mu)
    dissipation = case.dissipation(0.0, mu)
    torch.testing.assert_close(dissipation, (mu.weights * speed.square().sum(-1)).sum(-1))

    def rate(velocity: Tensor) -> Tensor:
        quotients = []
        for eps in (2e-6, 1e-6):
            y = x + eps * velocity
            quotients.append((objective(y if v is None else v.project(y)) - objective(x)) / eps)
        return 2 * quotients[1] - quotients[0]

    torch.testing.assert_close(-rate(speed), dissipation, rtol=1e-4, atol=1e-7)
    assert (dissipation > 1e-3).all()
    if v is not None and not v.is_smooth:
        # Without the projection onto ∂V, or with the gradient taken on one side of a kink, it is not so.
        smooth = case.smooth_drift(0.0, x, mu)
        assert not torch.allclose(-rate(smooth), (mu.weights * smooth.square().sum(-1)).sum(-1), rtol=1e-2)


@pytest.mark.parametrize("v", REGULARISERS, ids=repr)
def test_the_velocity_is_the_limit_of_the_proximal_step(v):
    case, h = Neurons(v), 1e-7
    x = at_kinks(v, seed=2)
    equation = Equation(case, x)
    y = x.clone()
    proximal_step(equation, Clock(h), Noise(0), 0, y)
    torch.testing.assert_close((y - x) / h, case.drift(0.0, x, equation.measure(x)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("v", REGULARISERS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_the_objective_decreases_along_proximal_steps(v, dtype):
    case = Neurons(v)
    start = normals(2, 12, 3, seed=3).to(dtype)
    start = start if v is None else v.project(start)

    @dataclass(frozen=True)
    class Started(Neurons):
        def initial(self):
            return EmpiricalMeasure(start)

    run = mfsde.simulate(Started(case.regulariser), n_particles=12, n_replicas=2, horizon=2.0, dt=0.05, save_every=1,
                         method="proximal", seed=0, dtype=dtype)  # fmt: skip
    objective = run["objective"].values.astype(float)
    rounding = 20 * torch.finfo(dtype).eps * np.abs(objective).max()
    assert (np.diff(objective, axis=0) <= rounding).all()
    assert np.isfinite(objective).all()
    assert (objective[-1] < objective[0] - 0.01).all()


def test_splitting_a_particle_leaves_the_velocities_as_they_are():
    case = Neurons(L1(0.3, (0,)))
    x = at_kinks(case.regulariser, seed=4)[:, :9]
    w = torch.softmax(normals(2, 9, seed=5), -1)
    both = torch.cat([x, x[:, :1]], 1)
    halves = torch.cat([w[:, :1] / 2, w[:, 1:], w[:, :1] / 2], 1)
    whole = case.drift(0.0, x, EmpiricalMeasure(x, w))
    split = case.drift(0.0, both, EmpiricalMeasure(both, halves))
    torch.testing.assert_close(split[:, :9], whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(split[:, 9], whole[:, 0], rtol=1e-12, atol=1e-12)


def test_a_law_given_from_outside_takes_the_place_of_the_particles():
    case = Neurons(L1(0.3, (0,)))
    law = EmpiricalMeasure(normals(1, 30, 3, seed=6)[0])
    x = path(mfsde.decoupled(case, law), n_particles=6, horizon=0.5, dt=0.1)
    mu = EmpiricalMeasure(law.points[None])
    y = torch.from_numpy(x[0])
    for k in range(5):
        y = case.regulariser.prox(y + 0.1 * case.smooth_drift(0.0, y, mu), 0.1)
        np.testing.assert_allclose(x[k + 1], y, rtol=1e-12, atol=1e-13)


# Sets and the limit ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InASet(GradientFlow):
    """½|x - (3, 0.9)|² + ½|mean|² on a set: particles run into its wall, slide along it and rest."""

    regulariser: Any

    def smooth_drift(self, t, x, mu):
        return x.new_tensor([3.0, 0.9]) - x - mu.mean()

    def initial(self):
        return mfsde.Uniform([-0.5, -0.5], [0.3, 0.2])


@pytest.mark.parametrize("v", [Ball(1.0), Box((-1.0, -1.0), (0.9, 0.5))], ids=repr)
def test_proximal_steps_in_a_set_tend_to_the_characteristics_with_its_wall(v):
    case = InASet(v)
    start = EmpiricalMeasure(case.initial().from_variates(normals(6, 2, seed=7)))
    times = np.linspace(0, 1.5, 7)
    exact = characteristics(case, times, start=start)["position"].values[:, 0]

    @dataclass(frozen=True)
    class Started(InASet):
        def initial(self):
            return start

    errors = []
    for n_steps in STEPS:
        x = path(Started(v), n_particles=6, horizon=1.5, dt=1.5 / n_steps, save_every=n_steps // 6)[:, 0]
        assert torch.isfinite(v.value(torch.from_numpy(x))).all()
        errors.append(float(np.abs(x - exact).mean()))
    assert first_order(errors)
    assert np.abs(exact[-1] - np.array([2.0, 0.6])).max(-1).min() > 0.5
    free = characteristics(Neurons() if False else InASet(SquaredNorm(0.0)), times, start=start)["position"].values[
        :, 0
    ]
    assert np.abs(free[-1] - exact[-1]).max() > 0.1


def test_euler_steps_in_a_set_are_projected():
    x = path(InASet(Ball(1.0)), n_particles=6, horizon=1.5, dt=0.01, method="euler")
    assert (np.linalg.norm(x, axis=-1) <= 1 + 1e-12).all()
    y = path(InASet(Ball(1.0)), n_particles=6, horizon=1.5, dt=0.01)
    np.testing.assert_allclose(x, y, atol=1e-3)
    assert hasattr(InASet(Ball(1.0)), "project")
    assert not hasattr(InASet(SquaredNorm(1.0)), "project")


# Proximal Langevin ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noisy(GradientFlow):
    """dX ∈ -(X + λ∂|X|) dt + σ dW, alone or with another noise."""

    threshold: float = 0.6
    sigma: float = 0.8

    @cached_property
    def energy(self):
        return mfsde.potential(lambda x: 0.5 * x.square().sum(-1))

    @property
    def regulariser(self):
        return L1(self.threshold)

    def diffusion(self, t, x, mu):
        return self.sigma

    def initial(self):
        return mfsde.Gaussian([0.0], [[0.1]])


def second_moment(threshold: float, sigma: float, h: float, n_steps: int) -> float:
    """E X² of the scheme itself after n steps from N(0, 0.1): the law of y = x + hṽ + √h σξ carried on a grid."""
    y, gap = np.linspace(-4, 4, 1601, retstep=True)

    def soft(z):
        return np.sign(z) * np.maximum(np.abs(z) - h * threshold, 0)

    def spread(centres):
        return np.exp(-0.5 * ((y[:, None] - centres) / sigma) ** 2 / h) * gap / math.sqrt(2 * math.pi * h) / sigma

    density = np.exp(-0.5 * y**2 / 0.1)
    density = spread((1 - h) * y) @ (density / density.sum())
    step = spread((1 - h) * soft(y))
    for _ in range(n_steps - 1):
        density = step @ density
    return float(density @ soft(y) ** 2)


def test_noisy_proximal_steps_have_the_second_moment_of_the_scheme():
    h, n_steps = 0.1, 20
    exact = second_moment(0.6, 0.8, h, n_steps)

    def z_score(case: Noisy) -> float:
        x = path(case, n_particles=200, n_replicas=64, horizon=n_steps * h, dt=h, save_every=n_steps)[-1]
        moments = np.square(x).mean((1, 2))
        return float((moments.mean() - exact) / (moments.std(ddof=1) / 8))

    assert abs(z_score(Noisy())) <= 4
    for fault in (Noisy(sigma=0.8 * math.sqrt(h)), Noisy(sigma=0.9), Noisy(threshold=0.5)):
        assert abs(z_score(fault)) > 4.5


def test_noise_of_every_form_enters_as_in_euler():
    @dataclass(frozen=True)
    class Formed(Noisy):
        form: str = "number"

        @property
        def regulariser(self):
            return None

        def diffusion(self, t, x, mu):
            matrix = x.new_tensor([[0.3, 0.1], [0.0, 0.4]])
            return {"number": 0.5, "diagonal": 0.1 * x, "general": matrix[None, None]}[self.form]

        def common_diffusion(self, t, x, mu):
            return 0.2

        def initial(self):
            return mfsde.Gaussian([0.0, 1.0], 0.5)

    for form in ("number", "diagonal", "general"):
        shared = {"n_particles": 5, "n_replicas": 2, "horizon": 1.0, "dt": 0.1}
        assert np.array_equal(path(Formed(form=form), **shared), path(Formed(form=form), method="euler", **shared))


# The adaptive scheme --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Logistic:
    """x' = cos(t) x(1 - x), every particle alone."""

    def drift(self, t, x, mu):
        return math.cos(t) * x * (1 - x)

    def diffusion(self, t, x, mu):
        return 0.0

    def initial(self):
        return mfsde.Uniform([0.1], [0.6])


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("dt", [4.0, 0.5])
def test_dopri5_is_as_precise_as_it_says(dtype, dt):
    run = mfsde.simulate(Logistic(), n_particles=20, n_replicas=2, horizon=4.0, dt=dt, seed=0, method="dopri5",
                         dtype=dtype, save_every=1)  # fmt: skip
    x = run["position"].values.astype(float)
    grown = x[0] * np.exp(np.sin(run["time"].values))[:, None, None, None]
    error = np.abs(x - grown / (1 - x[0] + grown)).max()
    assert error < 20 * TOLERANCES[dtype][0]
    assert error > 0
    euler = mfsde.simulate(Logistic(), n_particles=20, horizon=4.0, dt=0.5, seed=0, dtype=dtype)["position"].values
    assert np.abs(euler[-1, 0] - x[-1, 0]).max() > 1e-3


def test_dopri5_is_of_fifth_order_within_a_step():
    """Its trial step, without error control: halving it divides the error of a step by 2⁶."""
    from mfsde.runge_kutta import _Replica

    x = torch.linspace(0.1, 0.6, 5, dtype=DOUBLE)[None, :, None]
    replica = _Replica(Equation(Logistic(), x), 0)

    def errors(h: float) -> tuple[float, float]:
        y, _, difference = replica._trial(0.3, h, x, replica.slope(0.3, x))
        grown = x * math.exp(math.sin(0.3 + h) - math.sin(0.3))
        return float((y - grown / (1 - x + grown)).abs().max()), float(difference.abs().max())

    (a, da), (b, db) = errors(0.1), errors(0.05)
    assert math.log2(a / b) == pytest.approx(6, abs=0.4)
    assert math.log2(da / db) == pytest.approx(5, abs=0.4)


def test_dopri5_agrees_with_the_characteristics_of_a_weighted_law():
    case = Neurons(SquaredNorm(0.1))
    x, w = normals(12, 3, seed=8), torch.softmax(normals(12, seed=9), -1)
    start = EmpiricalMeasure(x, w)

    @dataclass(frozen=True)
    class Started(Neurons):
        def initial(self):
            return start

    exact = characteristics(case, [0.0, 1.0, 2.0], start=start)["position"].values[:, 0]
    run = mfsde.simulate(Started(SquaredNorm(0.1)), n_particles=12, horizon=2.0, dt=1.0, method="dopri5", save_every=1,
                         **RUN)  # fmt: skip
    np.testing.assert_allclose(run["position"].values[:, 0], exact, rtol=0, atol=1e-8)
    objective = run["objective"].values[:, 0]
    assert (np.diff(objective) < 0).all()
    uniform = characteristics(case, [2.0], start=EmpiricalMeasure(x))["position"].values[0, 0]
    assert np.abs(uniform - exact[-1]).max() > 1e-3


def steps_of(scenario: Any, x: Tensor, n_steps: int = 2, weights: Tensor | None = None) -> Tensor:
    equation, y = Equation(scenario, x, weights), x.clone()
    for step in range(n_steps):
        dopri5(equation, Clock(0.2), Noise(0), step, y)
    return y


@pytest.mark.parametrize("weighted", [False, True])
def test_replicas_of_dopri5_do_not_see_each_other(weighted):
    """Bit for bit: one that needs many small steps beside one that needs few."""
    case = Neurons(SquaredNorm(0.1))
    x = torch.stack([normals(7, 3), 0.01 * normals(7, 3, seed=1), 2 * normals(7, 3, seed=2)])
    w = torch.softmax(normals(3, 7, seed=3), -1) if weighted else None
    together = steps_of(case, x, weights=w)
    for r in range(3):
        alone = steps_of(case, x[r : r + 1], weights=None if w is None else w[r : r + 1])
        assert torch.equal(together[r], alone[0])
    order = [2, 0, 1]
    assert torch.equal(steps_of(case, x[order], weights=None if w is None else w[order]), together[order])


class Stop(Exception):
    pass


STOPS: list[float] = []  # not part of the observable, which a store compares


@pytest.mark.parametrize("method", ["dopri5", "proximal"])
def test_an_interrupted_run_ends_bit_for_bit_as_the_whole_one(method, tmp_path):
    case = Neurons(SquaredNorm(0.1))
    settings = {"n_particles": 8, "n_replicas": 2, "horizon": 2.0, "dt": 0.25, "save_every": 1, "method": method}

    def stops(t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        if STOPS and t >= STOPS[0]:
            STOPS.clear()
            raise Stop
        return x[:, 0, 0]

    STOPS.append(1.0)

    with pytest.raises(Stop):
        mfsde.simulate(case, store=tmp_path / "broken.zarr", checkpoint_every=1,
                       observables=[mfsde.Observable("first", stops)], **settings, **RUN)  # fmt: skip
    resumed = mfsde.resume(tmp_path / "broken.zarr", scenario=case, observables=[mfsde.Observable("first", stops)])
    whole = mfsde.simulate(case, **settings, **RUN)
    rarely = mfsde.simulate(case, **{**settings, "save_every": None}, **RUN)
    assert np.array_equal(resumed["position"].values, whole["position"].values)
    assert np.array_equal(rarely["position"].values[-1], whole["position"].values[-1])


def test_dopri5_says_where_a_solution_becomes_infinite():
    @dataclass(frozen=True)
    class Explosive(Logistic):
        def drift(self, t, x, mu):
            return x * x

        def initial(self):
            return mfsde.Dirac([1.0])

    with pytest.raises(RuntimeError, match=r"cannot continue Explosive past t = (1|0\.99999\d*), replica 0"):
        mfsde.simulate(Explosive(), n_particles=2, horizon=2.0, dt=2.0, method="dopri5", **RUN)


# The door -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Doors(Logistic):
    """A scenario that a method refuses, for one reason or other."""

    def initial(self):
        return mfsde.Gaussian([0.0, 0.5], 0.1)


@dataclass(frozen=True)
class WithNoise(Doors):
    def diffusion(self, t, x, mu):
        return 0.3


@dataclass(frozen=True)
class WithMatrix(Doors):
    def diffusion(self, t, x, mu):
        return torch.zeros_like(x)


@dataclass(frozen=True)
class WithCommonNoise(Doors):
    def common_diffusion(self, t, x, mu):
        return 0.3


@dataclass(frozen=True)
class LaterNoise(Doors):
    def diffusion(self, t, x, mu):
        return 0.0 if t < 0.05 else 0.1


@dataclass(frozen=True)
class OnlyProximal(Doors):
    def proximal(self, x, h):
        return x


@dataclass(frozen=True)
class Flow(GradientFlow):
    regulariser: Any = None

    @cached_property
    def energy(self):
        return mfsde.potential(lambda x: 0.5 * x.square().sum(-1))

    def initial(self):
        return mfsde.Gaussian([0.0, 0.5], 0.1)


@dataclass(frozen=True)
class OnATorus(Flow):
    """A norm pulls places on a circle to 0: from 0.9 it is nearer across the origin, and `project` turns it round."""

    period = (None, 1.0)

    def project(self, x):
        return torch.cat([x[..., :1], x[..., 1:].clamp(0.4, 0.6)], -1)


@dataclass(frozen=True)
class LeavesItsSet(Box):
    def prox(self, x, h):
        return x + h


@dataclass(frozen=True)
class NotFinite(L1):
    def prox(self, x, h):
        return x / 0


@pytest.mark.parametrize(
    ("scenario", "method", "what"),
    [
        (Doors(), "proximal", "Doors has no smooth_drift and no proximal. Inherit mfsde.GradientFlow"),
        (OnlyProximal(), "proximal", "OnlyProximal has no smooth_drift. "),
        (Flow(PathNorm(4.0)), "proximal", r"does not exist for the step h = 0\.5: .* h < 1/weight = 0\.25 only"),
        (Flow(Ball(0.1)), "proximal", "Flow: the initial state has V = inf at replica 0, particle 0.*Start inside"),
        (Flow(LeavesItsSet(-9.0, 0.9)), "proximal", "Flow.proximal leaves the domain: it has V = inf"),
        (Flow(NotFinite(1.0)), "proximal", r"Flow.proximal\(x, 0.5\) is not finite"),
        (OnATorus(L1(1.0)), "proximal", "OnATorus.proximal leaves the domain: from a point inside, `project` moves"),
        (WithNoise(), "dopri5", "WithNoise has some: its diffusion is 0.3 at t = 0"),
        (WithMatrix(), "dopri5", "its diffusion is not the number 0"),
        (WithCommonNoise(), "dopri5", "has some"),
        (LaterNoise(), "dopri5", "LaterNoise has some: its diffusion is 0.1 at t = 0.5"),
        (Flow(L1(1.0)), "dopri5", "needs a smooth drift; the velocity of Flow jumps .* Use 'proximal'"),
        (Flow(Box(-9.0, 9.0)), "dopri5", "kinks or a wall"),
    ],
)
def test_what_a_method_cannot_do_is_refused_with_the_reason(scenario, method, what):
    with pytest.raises(ValueError, match=what):
        mfsde.simulate(scenario, n_particles=4, horizon=1.0, dt=0.5, method=method, **RUN)


def test_what_a_method_can_do_passes():
    for v in (None, L1(1.0, (0,)), Box(-9.0, 9.0), PathNorm(1.0)):
        x = Flow().initial().from_variates(normals(1, 4, 2))
        check_proximal(Equation(Flow(v), x), x)
    x = normals(1, 4, 2)
    check_dopri5(Equation(Flow(SquaredNorm(1.0)), x), x)
    assert (
        mfsde.simulate(Flow(), n_particles=3, horizon=1.0, dt=0.5, method="dopri5", **RUN).attrs["method"] == "dopri5"
    )


def test_a_flow_without_an_energy_says_so():
    @dataclass(frozen=True)
    class Empty(GradientFlow):
        def initial(self):
            return mfsde.Dirac([0.0])

    for method in ("proximal", "euler"):
        with pytest.raises(
            TypeError, match="Empty declares no energy; the dynamics that it inherits needs all of energy"
        ):
            mfsde.simulate(Empty(), n_particles=2, horizon=1.0, dt=0.5, method=method, **RUN)
    # A drift by hand needs none, and then there is no objective to observe.
    assert InASet(None).declares == ()
    assert InASet(None).observables() == ()


@pytest.mark.parametrize("method", ["proximal", "euler"])
@pytest.mark.parametrize("wrong", [0.3, "L1", L1])
def test_a_regulariser_that_is_none_is_refused_where_it_is_first_used(method, wrong):
    what = r"Flow.regulariser is .*; expected an object of mfsde.regularisers or mfsde.convex_sets, its weight included"
    with pytest.raises(TypeError, match=what):
        mfsde.simulate(Flow(wrong), n_particles=2, horizon=1.0, dt=0.5, method=method, **RUN)
    x = normals(1, 4, 2)
    for use in (lambda: Flow(wrong).proximal(x, 0.1), lambda: Flow(wrong).objective(EmpiricalMeasure(x))):
        with pytest.raises(TypeError, match=what):
            use()


@dataclass(frozen=True)
class Walled:
    """Brownian motion on [0, 1], reflected in the limit; its stationary law is uniform."""

    def drift(self, t, x, mu):
        return torch.zeros_like(x)

    smooth_drift = drift

    def diffusion(self, t, x, mu):
        return 1.0

    def proximal(self, x, h):
        return x.clamp(0.0, 1.0)

    def initial(self):
        return mfsde.Uniform(0.0, 1.0)


def misfit(powers, steps, excess, errors):
    """χ² of the best combination of two powers of the step, one degree of freedom for three steps."""
    design = np.array(steps)[:, None] ** np.array(powers) / np.array(errors)[:, None]
    target = np.array(excess) / errors
    found, *_ = np.linalg.lstsq(design, target, rcond=None)
    return float(((design @ found - target) ** 2).sum())


def test_with_noise_a_wall_costs_half_an_order():
    """E (X - ½)² - 1/12 is a√h + bh where steps are projected onto the walls, and not ah + bh²."""
    steps, excess, errors = [1 / 16, 1 / 64, 1 / 256], [], []
    for h in steps:
        run = mfsde.simulate(Walled(), n_particles=4000, n_replicas=10, horizon=1.0, dt=h, seed=3, method="proximal")
        square = run.position.isel(time=-1).values[..., 0] - 0.5
        values = (square**2).mean(-1) - 1 / 12
        excess.append(values.mean())
        errors.append(values.std(ddof=1) / len(values) ** 0.5)
    assert misfit((0.5, 1.0), steps, excess, errors) < 16
    assert misfit((1.0, 2.0), steps, excess, errors) > 100


@dataclass(frozen=True)
class Overshooting(Regulariser):
    """V = |x| with a map that is not its proximal one."""

    def value(self, x):
        return x.abs().sum(-1)

    def prox(self, x, h):
        return 2 * x

    def project_subgradient(self, x, v):
        return x.sign()


@dataclass(frozen=True)
class Regularised(GradientFlow):
    v: Any = None
    spread: float = 1.0

    @property
    def regulariser(self):
        return self.v

    @cached_property
    def energy(self):
        return mfsde.potential(lambda x: 0.5 * x.square().sum(-1))

    def initial(self):
        return mfsde.Gaussian([0.0], self.spread)


@pytest.mark.parametrize(
    ("v", "method", "error", "message"),
    [
        (Overshooting(), "proximal", ValueError, "Overshooting"),
        (0.3, "proximal", TypeError, "expected an object of mfsde.regularisers or mfsde.convex_sets"),
        (0.3, "euler", TypeError, "expected an object of mfsde.regularisers or mfsde.convex_sets"),
        (Box(-0.1, 0.1), "euler", ValueError, "Start inside the domain"),
        (Box(-0.1, 0.1), "proximal", ValueError, "Start inside the domain"),
    ],
)
def test_regularisers_that_do_not_fit_are_refused_at_the_door(v, method, error, message):
    with pytest.raises(error, match=message):
        mfsde.simulate(Regularised(v), n_particles=20, horizon=0.1, dt=0.05, seed=0, method=method)
