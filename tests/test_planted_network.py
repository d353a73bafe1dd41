"""Planted networks: the expectation against quadrature, drifts by hand against the energy, homogeneity, the minimum."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import mfsde
from mfsde import EmpiricalMeasure
from mfsde.homogeneous import on_sphere
from mfsde.limit import sparse_measure
from mfsde.model import Equation
from mfsde.regularisers import L1, PathNorm, SquaredNorm
from mfsde.scenarios.planted_network import PlantedNetwork

DOUBLE = torch.float64
CASES = {
    "sigmoid": PlantedNetwork("sigmoid", n_inputs=1, bias=True, n_data=12, planted_scale=4.0),
    "sigmoid-ball": PlantedNetwork("sigmoid", n_data=30, planted_scale=4.0, radius=4.0, initial_scale=4.0),
    "tanh": PlantedNetwork("tanh", n_inputs=3, n_data=9),
    "relu": PlantedNetwork("relu"),
    "relu-5": PlantedNetwork("relu", n_inputs=5),
    "relu-data": PlantedNetwork("relu", n_inputs=2, bias=True, n_data=11),
    "signed_square": PlantedNetwork("signed_square"),
    "signed_square-data": PlantedNetwork("signed_square", n_inputs=3, n_data=10),
}
all_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
SIGMA = {
    "sigmoid": lambda a: 1 / (1 + np.exp(-a)), "tanh": np.tanh,
    "relu": lambda a: np.maximum(a, 0), "signed_square": lambda a: np.maximum(a, 0),
}  # fmt: skip


def neurons(case: PlantedNetwork, n: int = 7, lead: tuple[int, ...] = (2,), seed: int = 0) -> Tensor:
    x = torch.randn(*lead, n, 1 + case.n_weights, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    if case.activation == "signed_square":
        x[..., 0] = x[..., 0].sign()
    return x


def plane_quadrature(n: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Directions on the circle; E f(z) = E|z|² · mean over them for 2-homogeneous f and z ~ N(0, I₂)."""
    angle = (np.arange(n) + 0.5) / n * 2 * math.pi
    return np.stack([np.cos(angle), np.sin(angle)], 1), np.full(n, 2.0 / n)


def by_numpy(case: PlantedNetwork, x: np.ndarray, masses: np.ndarray) -> float:
    """The objective of one replica, written down from the definition."""
    z, weight = (
        plane_quadrature() if case.n_data is None else (case.inputs.numpy(), np.full(case.n_data, 1 / case.n_data))
    )
    sigma = SIGMA[case.activation]
    theta = x[:, 1:] * abs(x[:, 1:]) if case.activation == "signed_square" else x[:, 1:]
    planted = case.planted.numpy()
    f = (masses * x[:, 0]) @ sigma(theta @ z.T) - planted[:, 0] @ sigma(planted[:, 1:] @ z.T)
    size, norm = abs(x[:, 0]), np.linalg.norm(x[:, 1:], axis=1)
    v = {"relu": size * norm, "signed_square": norm**2}.get(case.activation, size)
    return float(0.5 * weight @ f**2 + case.penalty * masses @ v)


@pytest.mark.parametrize("name", ["sigmoid", "tanh", "relu", "relu-data", "signed_square", "signed_square-data"])
def test_the_objective_is_the_squared_distance_of_two_networks(name):
    case = CASES[name]
    x, w = neurons(case), torch.softmax(torch.linspace(0, 1, 14, dtype=DOUBLE).reshape(2, 7), -1)
    for mu in (EmpiricalMeasure(x), EmpiricalMeasure(x, w)):
        for r in range(2):
            expected = by_numpy(case, x[r].numpy(), mu.weights[r].numpy())
            assert case.objective(mu)[r].item() == pytest.approx(expected, rel=1e-7)


def test_the_expectation_in_five_dimensions_is_that_of_samples():
    case = CASES["relu-5"]
    a, b = case.planted[:, 1:], torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    z = torch.randn(200_000, 5, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    products = (a @ z.T).clamp(min=0).unsqueeze(1) * (b @ z.T).clamp(min=0)
    assert ((products.mean(-1) - case.kernel(a, b)).abs() < 4 * products.std(-1) / 200_000**0.5).all()
    assert case.kernel(a, a).diagonal().tolist() == pytest.approx([0.5] * 4)  # ½|a|²
    assert case.kernel(a, -a).diagonal().tolist() == pytest.approx([0.0] * 4, abs=1e-12)


@all_cases
def test_the_drift_by_hand_is_that_of_the_energy(case):
    x = neurons(case)
    for mu in (EmpiricalMeasure(x), EmpiricalMeasure(x, torch.softmax(x[..., 1], -1))):
        v, expected = case.smooth_drift(0.0, x, mu), -case.energy.intrinsic_derivative(mu, x)
        if case.activation == "signed_square":
            expected[..., 0] = 0  # signs are no coordinates
        torch.testing.assert_close(v, expected, rtol=1e-10, atol=1e-10)
        assert v.abs().max() > 1e-2
        elsewhere = neurons(case, seed=3)
        there = -case.energy.intrinsic_derivative(mu, elsewhere)
        torch.testing.assert_close(
            case.smooth_drift(0.0, elsewhere, mu)[..., 1:], there[..., 1:], rtol=1e-10, atol=1e-10
        )


@all_cases
def test_the_first_variation_is_the_derivative_towards_a_new_neuron(case):
    mu, x, h = EmpiricalMeasure(neurons(case)), neurons(case, n=3, seed=1), 1e-6
    found = case.first_variation(mu, x)
    for k in range(3):
        added = torch.cat([mu.points, x[:, k : k + 1]], -2)
        values = []
        for mass in (h, -h):
            weights = torch.cat([mu.weights, torch.full((2, 1), mass, dtype=DOUBLE)], -1)
            values.append(case.objective(EmpiricalMeasure.signed(added, weights)))
        torch.testing.assert_close(found[:, k], (values[0] - values[1]) / (2 * h), rtol=1e-6, atol=1e-8)
    # At a unit neuron of amplitude ±1 it is λ(1 ∓ η).
    s = x[..., 1:]
    if case.activation in ("relu", "signed_square"):
        s = s / s.norm(dim=-1, keepdim=True)
    unit = torch.cat([torch.ones_like(s[..., :1]), s], -1)
    expected = case.penalty * (1 - case.certificate(mu, case.directions(s)))
    torch.testing.assert_close(case.first_variation(mu, unit), expected)


def test_every_activation_has_its_regulariser_and_degree():
    kinds = {"sigmoid": L1, "tanh": L1, "relu": PathNorm, "signed_square": SquaredNorm}
    for case in CASES.values():
        x, scale = neurons(case), 1.7
        assert type(replace(case, radius=None).regulariser) is kinds[case.activation]
        larger = x.clone()
        # (w, θ) -> scale (w, θ), or w alone where only w is homogeneous, or θ alone at fixed signs.
        part = {"relu": slice(None), "signed_square": slice(1, None)}.get(case.activation, slice(0, 1))
        larger[..., part] *= scale
        degree = 2 if case.activation in ("relu", "signed_square") else 1
        none = EmpiricalMeasure.signed(x[:, :1], torch.zeros(2, 1, dtype=DOUBLE))
        ratio = case.first_variation(none, larger) / case.first_variation(none, x)
        torch.testing.assert_close(ratio, torch.full_like(ratio, scale**degree))


def test_only_the_image_on_the_sphere_counts_for_two_homogeneous_neurons():
    case, mu = CASES["relu"], EmpiricalMeasure(neurons(CASES["relu"]))
    image = on_sphere(mu)
    torch.testing.assert_close(case.objective(mu), case.objective(image))
    torch.testing.assert_close(case.first_variation(mu, mu.points), case.first_variation(image, mu.points))


def test_neurons_start_where_their_theorem_asks_for_it():
    for case in CASES.values():
        x = case.initial().from_variates(
            torch.randn(4000, case.initial().n_variates, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
        )
        if case.radius is not None:
            assert (x[:, 0] == 0).all()
            lengths = x[:, 1:].norm(dim=-1)
            assert lengths.max() < 4
            assert (lengths < 2).double().mean() == pytest.approx(0.25, abs=0.03)  # uniform on the disc
        elif case.activation in ("sigmoid", "tanh"):
            assert (x[:, 0] == 0).all()  # on the whole of {0} x R^d, which separates w = 1 from w = -1
            assert x[:, 1:].std(0).mean() == pytest.approx(1, abs=0.05)
        elif case.activation == "relu":
            assert x.abs().max() <= 1
            assert x.std(0).mean() == pytest.approx(3**-0.5, abs=0.02)  # on a neighbourhood of 0
        else:
            assert set(x[:, 0].tolist()) == {-1.0, 1.0}  # both copies
            assert abs(x[:, 0].mean()) < 0.1
            assert x[:, 1:].abs().max() <= 1


def test_signs_stay_and_the_objective_never_increases():
    for case in (CASES["signed_square"], CASES["relu"], CASES["sigmoid"]):
        run = mfsde.simulate(
            case, n_particles=20, n_replicas=2, horizon=10.0, dt=0.05, seed=0, save_every=1, method="proximal",
            dtype=DOUBLE,
        )  # fmt: skip
        assert (np.diff(run["objective"].values, axis=0) <= 1e-14).all()
        if case.activation == "signed_square":
            assert (run["position"].values[-1, ..., 0] == run["position"].values[0, ..., 0]).all()
        # d/dt F = -∫|v|² dμ over the run, to the first order of the scheme.
        lost = run["objective"].values[0] - run["objective"].values[-1]
        steps = [EmpiricalMeasure(torch.from_numpy(x)) for x in run["position"].values]
        rates = torch.stack([case.dissipation(0.0, mu) for mu in steps]).numpy()
        assert np.allclose(lost, 0.05 * (rates[1:] + rates[:-1]).sum(0) / 2, rtol=0.05)


def test_many_neurons_come_to_the_least_objective_over_measures_and_few_do_not():
    case = CASES["sigmoid-ball"]
    radius, angle = np.meshgrid(np.arange(1, 11) / 10 * 4.0, np.arange(200) / 200 * 2 * math.pi)
    grid = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1).reshape(-1, 2)
    z = case.inputs.numpy()
    y = case.planted.numpy()[:, 0] @ SIGMA["sigmoid"](case.planted.numpy()[:, 1:] @ z.T)
    found = sparse_measure(SIGMA["sigmoid"](grid @ z.T).T / 30**0.5, y / 30**0.5, case.penalty)
    # The optimum found elsewhere is one for the scenario: F' >= 0, with 0 on the support.
    neurons_ = torch.from_numpy(np.concatenate([np.ones((len(grid), 1)), grid], 1))[None]
    mu = EmpiricalMeasure.signed(neurons_, torch.from_numpy(found.weights)[None])
    torch.testing.assert_close(case.certificate(mu, neurons_[..., 1:])[0].numpy(), found.certificate, rtol=0, atol=1e-9)
    excess = {}
    for n in (1, 60):
        run = mfsde.simulate(
            case, n_particles=n, n_replicas=3, horizon=4000.0, dt=4.0, seed=0, method="proximal", dtype=DOUBLE
        )
        excess[n] = run["objective"].values[-1] / found.objective - 1
        assert np.linalg.norm(run["position"].values[..., 1:], axis=-1).max() < 4 + 1e-9
    assert abs(excess[60]).max() < 2e-3
    assert excess[1].min() > 0.1


@all_cases
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_it_passes_the_door_in_both_precisions(case, dtype):
    law = case.initial()
    z = torch.randn(2, 6, law.n_variates, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    x = law.from_variates(z).to(dtype)
    equation = Equation(case, x)
    assert equation.drift(0.0, x, equation.measure(x)).dtype == dtype


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"activation": "gelu"}, "expected one of sigmoid, tanh, relu, signed_square"),
        ({"n_inputs": 0}, "n_inputs = 0; expected a whole number >= 1"),
        ({"n_planted": 2.5}, "n_planted = 2.5"),
        ({"n_data": 0}, "n_data = 0"),
        ({"activation": "tanh"}, "closed form for ReLU units without bias only, not for 'tanh'"),
        ({"bias": True}, "not for 'relu' with bias"),
        ({"penalty": -0.1}, "penalty = -0.1"),
        ({"radius": 2.0}, "radius = 2.0 for 'relu'"),
        ({"activation": "tanh", "n_data": 5, "radius": 0.5}, "a radius >= initial_scale"),
        ({"initial_scale": -1.0}, "initial_scale = -1.0"),
        ({"planted_scale": 0.0}, "planted_scale = 0.0"),
        ({"initial_scale": 0.0}, "a neuron at 0 stays there"),
        ({"penalty": math.inf}, "penalty = inf"),
    ],
)
def test_impossible_networks_are_refused(wrong, what):
    with pytest.raises(ValueError, match=what):
        replace(PlantedNetwork(), **wrong)


def test_an_expectation_has_no_inputs():
    with pytest.raises(ValueError, match="there are no inputs"):
        _ = PlantedNetwork().inputs
