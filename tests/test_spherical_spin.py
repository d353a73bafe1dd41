"""Three spins on the sphere: moments of the target, and steps on samples against the drift."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import mfsde
from mfsde import EmpiricalMeasure, Noise
from mfsde.draws import Draws
from mfsde.scenarios.spherical_spin import SphericalSpin, with_constant

DOUBLE = torch.float64
SMALL = SphericalSpin(data_dim=3, n_data=500, batch_size=16)


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


@pytest.mark.parametrize("d", [2, 3, 6])
def test_the_target_is_its_sum_and_its_mean_square_that_of_the_sphere(d):
    case = SphericalSpin(data_dim=d)
    x = case.inputs(200_000, torch.Generator().manual_seed(3))
    written = torch.einsum("pqr,sp,sq,sr->s", case.couplings, x[:5], x[:5], x[:5]) / d
    torch.testing.assert_close(case.target(x[:5]), written, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(case.target(-x[:5]), -case.target(x[:5]), rtol=1e-12, atol=1e-12)
    squares = case.target(x).square()
    error = squares.std().item() / len(x) ** 0.5
    assert abs(squares.mean().item() - case.mean_square) < 4 * error
    # Without the traces it would be too small.
    assert abs(squares.mean().item() - 0.97 * case.mean_square) > 4 * error


def test_over_the_couplings_the_mean_square_is_d():
    for d in (3, 7):
        found = torch.tensor([SphericalSpin(data_dim=d, coupling_seed=k).mean_square for k in range(400)])
        assert abs(found.mean() - d) < 4 * found.std() / 20


@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_a_step_on_the_drifts_own_inputs_is_the_drift(activation):
    case = replace(SMALL, activation=activation, batch_size=500)
    inputs, _ = case.energy.data(torch.zeros(1, dtype=DOUBLE))
    x = normals(2, 7, 5)
    for mu in (EmpiricalMeasure(x), EmpiricalMeasure(x, torch.softmax(normals(2, 7, seed=1), -1))):
        sampled = case.sampled_drift(0.0, x, mu, inputs.expand(2, *inputs.shape))
        torch.testing.assert_close(sampled, case.drift(0.0, x, mu), rtol=1e-10, atol=1e-12)
        other = normals(2, 3, 5, seed=2)
        sampled = case.sampled_drift(0.0, other, mu, inputs.expand(2, *inputs.shape))
        torch.testing.assert_close(sampled, case.drift(0.0, other, mu), rtol=1e-10, atol=1e-12)


def test_samples_are_fresh_inputs_on_the_sphere():
    first = SMALL.sample(Draws(Noise(0), 0, 2, DOUBLE, torch.device("cpu")))
    second = SMALL.sample(Draws(Noise(0), 1, 2, DOUBLE, torch.device("cpu")))
    assert first.shape == (2, 16, 4)
    torch.testing.assert_close(first[..., :3].norm(dim=-1), torch.full((2, 16), 3**0.5, dtype=DOUBLE))
    assert (first[..., 3] == 1).all()
    assert not torch.isclose(first[0, :, :3], first[1, :, :3]).any()
    assert not torch.isclose(first[..., :3], second[..., :3]).any()
    assert with_constant(first[..., :3]).equal(first)


def test_training_on_fresh_samples_lowers_the_loss():
    settings = {"n_particles": 64, "n_replicas": 2, "horizon": 4.0, "dt": 0.01, "seed": 0, "save_every": 100}
    run = mfsde.simulate(SMALL, method="sgd", **settings)
    assert (run.loss.isel(time=-1) < 0.5 * run.loss.isel(time=0)).all()
    again = mfsde.simulate(replace(SMALL, coupling_seed=1), method="sgd", **settings)
    assert not torch.equal(torch.as_tensor(run.loss.values), torch.as_tensor(again.loss.values))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"data_dim": 1}, "data_dim = 1"),
        ({"activation": "relu"}, "activation = 'relu'; .*the odd part of ReLU units without bias is linear"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"n_data": 0}, "n_data = 0"),
        ({"batch_size": 6.5}, "batch_size = 6.5; expected a whole number"),
        ({"scale": 0.0}, "scale = 0.0"),
        ({"initial_spread": -1.0}, "initial_spread = -1.0"),
    ],
)
def test_parameters_out_of_range_are_refused(wrong, told):
    with pytest.raises(ValueError, match=told):
        SphericalSpin(**wrong)
