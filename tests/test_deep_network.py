"""A mean of deep networks: the forward pass against torch's, its risk's derivative against backpropagation by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

import mfsde
from mfsde import EmpiricalMeasure
from mfsde.scenarios import DeepNetwork

FLOAT64 = torch.float64
MODULES = {"tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "relu": nn.ReLU}
SHAPES = [(1, 1), (3, 1), (1, 4, 3, 1), (2, 5, 1), (3, 4, 4, 4, 2)]


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def plain(case: DeepNetwork) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in zip(case.layers, case.layers[1:], strict=False):
        layers += [nn.Linear(before, after, dtype=FLOAT64), MODULES[case.activation]()]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("layers", SHAPES)
@pytest.mark.parametrize("activation", MODULES)
def test_the_forward_pass_is_torchs(layers, activation):
    case = DeepNetwork(layers, activation)
    theta, z, module = normals(2, 3, case.dim), normals(7, layers[0], seed=1), plain(case)
    found = case.network(theta.unsqueeze(-2), z)
    for r in range(2):
        for i in range(3):
            vector_to_parameters(theta[r, i], module.parameters())
            expected = module(z) if layers[-1] > 1 else module(z).squeeze(-1)
            torch.testing.assert_close(found[r, i], expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("layers", SHAPES)
def test_the_drift_descends_the_risk_and_the_confinement(layers):
    case = DeepNetwork(layers, sigma=0.4, prior_variance=0.5)
    x = normals(4, case.dim)
    # N ∇_i F^N = D_mF(m^N, x_i).
    at = x.clone().requires_grad_()
    value = case.energy(EmpiricalMeasure(at))
    (gradient,) = torch.autograd.grad(value, at)
    drift = case.drift(0.0, x, EmpiricalMeasure(x))
    torch.testing.assert_close(drift, -4 * gradient - 0.08 * x / 0.5, rtol=1e-11, atol=1e-12)
    f = case.network(x.unsqueeze(-2), case.inputs).mean(0)
    half = 0.5 * (f - case.targets).square()
    expected = half.mean() if half.ndim == 1 else half.sum(-1).mean()
    torch.testing.assert_close(value.detach(), expected, rtol=1e-13, atol=0)


def test_the_one_hidden_layer_is_a_mean_of_neurons():
    # With α² = c/n and no offsets: (RΨ)(z) = (1/n) Σ c_i φ(α_i·z), the network of Neurons.
    n, case = 6, DeepNetwork((2, 6, 1))
    alpha, c, z = normals(n, 2), normals(n, seed=1), normals(9, 2, seed=2)
    theta = torch.cat([alpha.flatten(), alpha.new_zeros(n), c / n, alpha.new_zeros(1)])
    neurons = mfsde.Neuron("tanh")(torch.cat([alpha, c[:, None]], 1).unsqueeze(-2), z).mean(0)
    torch.testing.assert_close(case.network(theta[None, None], z)[0], neurons, rtol=1e-13, atol=1e-14)


def test_the_reference_law_is_a_normalised_density():
    case = DeepNetwork(prior_variance=0.5)
    x = normals(5, case.dim)
    torch.testing.assert_close(-case.confinement(x), case.initial().log_prob(x), rtol=1e-12, atol=0)
    torch.testing.assert_close(case.confinement_gradient(x), super(DeepNetwork, case).confinement_gradient(x))


def test_data_lie_in_the_cube_and_are_different():
    for layers in SHAPES:
        case = DeepNetwork(layers)
        assert case.inputs.shape == (32, layers[0])
        assert case.inputs.abs().max() < 1
        assert len(case.inputs.unique(dim=0)) == 32
    assert DeepNetwork().targets.abs().max() == pytest.approx(1, abs=0.02)
    assert DeepNetwork((1, 1)).inputs[0].item() == pytest.approx(-1 + 1 / 32)


def test_training_lowers_the_risk():
    case = DeepNetwork()
    run = mfsde.simulate(case, n_particles=50, horizon=20.0, dt=0.1, seed=0)
    assert run.energy.values[-1, 0] < 0.5 * run.energy.values[0, 0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": (1,)}, "at least two: inputs and outputs"),
        ({"layers": (1, 0, 1)}, "expected whole numbers >= 1"),
        ({"layers": (1, 2.0, 1)}, "expected whole numbers >= 1"),
        ({"activation": "sin"}, "activation = 'sin'; expected one of"),
        ({"prior_variance": 0.0}, "expected a positive variance"),
        ({"prior_variance": math.inf}, "expected a positive variance"),
        ({"n_data": 0}, "one data point or more"),
        ({"n_data": 3.5}, "as a whole number"),
        ({"sigma": -0.1}, "expected a number >= 0"),
        ({"sigma": math.nan}, "expected a number >= 0"),
        ({"layers": 4}, "at least two: inputs and outputs"),
    ],
)
def test_bad_input_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DeepNetwork(**fields)
