"""Student and teacher: the arc-cosine kernel against Monte Carlo, the drift by hand against the energy, births."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import mfsde
from mfsde import EmpiricalMeasure
from mfsde.scenarios.student_teacher import ArcCosine, StudentTeacher

DOUBLE = torch.float64
SMALL = StudentTeacher(data_dim=4, n_teacher=3)
UNIT = replace(SMALL, radius=1.0)


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


@pytest.mark.parametrize("case", [SMALL, UNIT, replace(SMALL, radius=3.0)])
def test_the_kernel_is_the_mean_over_the_sphere(case):
    """With a standard error of 1e6 inputs; it is that of normal inputs at r = √d, where it has a known value."""
    a, b = normals(3, 4), normals(2, 4, seed=1)
    x = case.inputs(1_000_000, torch.Generator().manual_seed(2))
    torch.testing.assert_close(x.norm(dim=-1), torch.full((len(x),), case.length, dtype=DOUBLE))
    samples = torch.relu(x @ a.T).unsqueeze(-1) * torch.relu(x @ b.T).unsqueeze(-2)
    error = samples.std(0) / 1e3
    assert ((samples.mean(0) - case.kernel(a, b)).abs() < 4 * error).all()
    assert ((samples.mean(0) - 1.1 * case.kernel(a, b)).abs() > 4 * error).any()
    five = StudentTeacher(data_dim=5)
    known = five.kernel(torch.arange(1, 6, dtype=DOUBLE)[None] / 3, torch.tensor([[1, -1, 0.5, 0, 0.2]], dtype=DOUBLE))
    assert known.item() == pytest.approx(0.7257111097435454, rel=1e-14)


@pytest.mark.parametrize("case", [SMALL, UNIT])
def test_the_loss_is_the_mean_over_the_sphere_and_the_expanded_quadratic(case):
    mu = EmpiricalMeasure(normals(2, 6, 5), torch.softmax(normals(2, 6, seed=1), -1))
    x = case.inputs(200_000, torch.Generator().manual_seed(3))
    f = case.predict(case.teacher, x)
    samples = 0.5 * (f - case.predict(mu, x)).square()
    error = samples.std(-1) / len(x) ** 0.5
    assert ((samples.mean(-1) - case.energy(mu)).abs() < 4 * error).all()
    # C_f + ∫F dμ + ½∬K dμ dμ, with F = -E f φ.
    zero = EmpiricalMeasure.signed(mu.points, torch.zeros(2, 6, dtype=DOUBLE))
    linear = mu.integrate(lambda y: case.potential(zero, y))
    c, z = mu.weights * mu.points[..., 0], mu.points[..., 1:]
    square = (c.unsqueeze(-2) @ case.kernel(z, z) @ c.unsqueeze(-1)).flatten()
    torch.testing.assert_close(case.energy(mu), case.loss_of_none + linear + 0.5 * square, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(case.energy(mu), case.loss_of_none - linear + 0.5 * square, rtol=1e-3)
    assert abs((0.5 * f.square()).mean() - case.loss_of_none) < 4 * (0.5 * f.square()).std() / len(x) ** 0.5
    assert case.energy(case.teacher).abs() < 1e-15


@pytest.mark.parametrize("case", [SMALL, UNIT])
@pytest.mark.parametrize("weighted", [False, True])
def test_drift_and_potential_by_hand_are_those_of_the_energy(case, weighted):
    x = normals(2, 9, 5)
    # Parallel, opposite and equal neurons: the ends of the arc-cosine.
    x[:, 1, 1:], x[:, 2, 1:], x[:, 3] = 2 * x[:, 0, 1:], -x[:, 0, 1:], x[:, 0]
    mu = EmpiricalMeasure(x, torch.softmax(normals(2, 9, seed=1), -1) if weighted else None)
    other = normals(2, 4, 5, seed=2)
    for at in (x, other):
        drift = case.drift(0.0, at, mu)
        torch.testing.assert_close(drift, -case.energy.intrinsic_derivative(mu, at), rtol=1e-7, atol=1e-8)
        assert not torch.allclose(drift, case.energy.intrinsic_derivative(mu, at), atol=1e-3)
        centred = case.potential(mu, at) - mu.integrate(lambda y: case.potential(mu, y)).unsqueeze(-1)
        torch.testing.assert_close(centred, case.energy.functional_derivative(mu, at), rtol=1e-9, atol=1e-12)


def test_blocks_of_rows_change_nothing(monkeypatch):
    x = normals(2, 9, 5)
    mu = EmpiricalMeasure(x)
    whole, loss = SMALL.drift(0.0, x, mu), SMALL.energy(mu)
    monkeypatch.setattr("mfsde.scenarios.student_teacher.BLOCK_PAIRS", 30)
    torch.testing.assert_close(SMALL.drift(0.0, x, mu), whole, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(SMALL.energy(mu), loss, rtol=1e-12, atol=1e-14)


def test_the_arc_cosine_is_differentiable_twice_and_finite_at_its_ends():
    u = torch.tensor([-0.9, -0.2, 0.0, 0.7], dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(ArcCosine.apply, (u,))
    assert torch.autograd.gradgradcheck(ArcCosine.apply, (u,))
    ends = torch.tensor([-1.0, 1.0, 1 + 1e-15], dtype=DOUBLE, requires_grad=True)
    (slope,) = torch.autograd.grad(ArcCosine.apply(ends).sum(), [ends], create_graph=True)
    assert slope.tolist() == pytest.approx([0.0, 0.5, 0.5])
    assert torch.autograd.grad(slope.sum(), [ends])[0].isfinite().all()


def test_a_dead_neuron_moves_by_half_the_slope():
    x = normals(3, 5)
    x[0, 1:] = 0
    v = SMALL.drift(0.0, x, EmpiricalMeasure(x))
    weights, places = SMALL._residual(EmpiricalMeasure(x))
    torch.testing.assert_close(v[0, 1:], -x[0, 0] * (weights @ places) / 4, rtol=1e-12, atol=1e-14)
    assert v[0, 0] == 0


def test_descent_dissipates_and_conserves_the_balance_of_each_neuron():
    case = StudentTeacher(data_dim=5, n_teacher=3)
    settings = {"n_particles": 12, "n_replicas": 2, "horizon": 4.0, "dt": 0.05, "seed": 0, "dtype": DOUBLE}
    run = mfsde.simulate(case, method="dopri5", save_every=10, **settings)
    x = torch.as_tensor(run.position.values)
    balance = x[..., 0].square() - x[..., 1:].square().sum(-1)
    torch.testing.assert_close(balance, balance[:1].expand_as(balance), rtol=1e-7, atol=1e-7)
    assert (run.loss.diff("time") < 0).all()


def test_a_student_of_positive_weights_stays_positive_and_fails():
    """|z| < c for all neurons: no neuron becomes negative, however long it is trained."""
    case = StudentTeacher(data_dim=3, n_teacher=4, initial_mean=2.0, initial_deviation=0.1, initial_spread=0.3)
    settings = {"n_particles": 60, "n_replicas": 2, "horizon": 200.0, "dt": 0.2, "seed": 0, "save_every": 1000}
    positive = mfsde.simulate(case, **settings)
    free = mfsde.simulate(StudentTeacher(data_dim=3, n_teacher=4), **settings)
    assert (positive.position.isel(component=0) > 0).all()
    assert (positive.loss.isel(time=-1) > 10 * free.loss.isel(time=-1)).all()


def test_births_and_reinjection_are_there_where_they_are_asked_for():
    assert not hasattr(StudentTeacher(), "birth_death_rate")
    assert not hasattr(StudentTeacher(), "reinjection")
    case = StudentTeacher.planted(alpha=0.7, reinjection_rate=0.1)
    assert (case.data_dim, case.n_teacher, case.length) == (50, 10, 1.0)
    x = normals(2, 6, 51)
    mu = EmpiricalMeasure(x)
    rate = case.birth_death_rate(0.0, x, mu)
    centred = rate - rate.mean(-1, keepdim=True)
    torch.testing.assert_close(centred, 0.7 * case.energy.functional_derivative(mu, x), rtol=1e-9, atol=1e-12)
    found, law = case.reinjection()
    assert found == 0.1
    assert law.cov.diagonal().tolist() == [1.0] * 51
    settings = {"n_particles": 20, "n_replicas": 2, "horizon": 1.0, "dt": 0.1, "seed": 0}
    run = mfsde.simulate(case, **settings)
    assert int(run.events.sum()) > 0


def test_the_teacher_is_a_function_of_its_seed():
    assert torch.equal(StudentTeacher().teacher.points, StudentTeacher().teacher.points)
    assert not torch.equal(StudentTeacher().teacher.points, StudentTeacher(teacher_seed=1).teacher.points)
    variance = StudentTeacher(data_dim=50, n_teacher=400).teacher.points[:, 1:].var()
    assert abs(variance * 50 - 1) < 5 * math.sqrt(2 / (400 * 50))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"data_dim": 1}, "data_dim = 1"),
        ({"n_teacher": 0}, "n_teacher = 0"),
        ({"radius": 0.0}, "radius = 0.0"),
        ({"alpha": -1.0}, "alpha = -1.0"),
        ({"reinjection_rate": math.nan}, "reinjection_rate = nan"),
        ({"initial_spread": -0.1}, "initial_spread = -0.1"),
        ({"initial_mean": math.nan}, "initial_mean = nan"),
    ],
)
def test_parameters_out_of_range_are_refused(wrong, told):
    with pytest.raises(ValueError, match=told):
        StudentTeacher(**wrong)
