"""Sparse spikes: formulas against independent ones, and the global minimum that many particles find."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import mfsde
from mfsde import EmpiricalMeasure
from mfsde.model import Equation
from mfsde.scenarios.sparse_spikes import SparseSpikes

DOUBLE = torch.float64
SMALL = SparseSpikes(cutoff=4, spikes=((1.0, 0.1), (-0.8, 0.4), (1.2, 0.75)), circumference=12.0)


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def dirichlet(case: SparseSpikes, angle: np.ndarray) -> np.ndarray:
    """ψ(angle) = √(2c + 1)⁻¹ Σ_{|k| <= c} e^{ik angle}, with ∫ψ² d(angle)/2π = 1."""
    k = np.arange(-case.cutoff, case.cutoff + 1)
    return np.cos(np.multiply.outer(angle, k)).sum(-1) / math.sqrt(2 * case.cutoff + 1)


@pytest.mark.parametrize("case", [SMALL, SparseSpikes(circumference=1.0)])
def test_the_objective_is_the_squared_distance_of_the_filtered_signals(case):
    """By quadrature on the circle, exact for trigonometric polynomials."""
    x, w = normals(2, 9, 2), torch.softmax(normals(2, 9, seed=1), -1)
    grid, turn = np.arange(64) / 64 * 2 * math.pi, 2 * math.pi / case.circumference
    target = sum(a * dirichlet(case, grid - 2 * math.pi * place) for a, place in case.spikes)
    for mu in (EmpiricalMeasure(x), EmpiricalMeasure(x, w)):
        for r in range(2):
            amplitudes = (mu.weights[r] * x[r, :, 0]).numpy()
            mass = mu.weights[r].numpy()
            f = amplitudes @ dirichlet(case, grid - turn * x[r, :, 1:].numpy())
            expected = 0.5 * ((f - target) ** 2).mean() + case.penalty * (mass * np.abs(x[r, :, 0].numpy())).sum()
            assert case.objective(mu)[r].item() == pytest.approx(expected, rel=1e-12)


def test_the_drift_by_hand_is_that_of_the_energy_and_stops_at_zero():
    x, w = normals(2, 9, 2), torch.softmax(normals(2, 9, seed=1), -1)
    x[:, :4, 0] = 0
    for mu in (EmpiricalMeasure(x), EmpiricalMeasure(x, w)):
        v = SMALL.smooth_drift(0.0, x, mu)
        torch.testing.assert_close(v, -SMALL.energy.intrinsic_derivative(mu, x), rtol=1e-12, atol=1e-12)
        assert not torch.allclose(v, SMALL.energy.intrinsic_derivative(mu, x), atol=1e-3)
        force = v - SMALL.drift(0.0, x, mu)
        at_zero = x[..., 0] == 0
        torch.testing.assert_close(force[..., 0][~at_zero], 0.1 * x[..., 0].sign()[~at_zero], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(force[..., 0][at_zero], v[..., 0].clamp(-0.1, 0.1)[at_zero], rtol=1e-9, atol=1e-12)
        assert (force[..., 1] == 0).all()
    shifted = x + torch.tensor([0.0, 12.0])
    torch.testing.assert_close(
        SMALL.drift(0.0, shifted, EmpiricalMeasure(shifted)), SMALL.drift(0.0, x, EmpiricalMeasure(x))
    )
    assert torch.allclose(SMALL.project(shifted)[..., 1], torch.remainder(x[..., 1], 12.0))


def test_the_signed_measure_is_all_that_counts():
    x = normals(1, 9, 2)
    mu = EmpiricalMeasure(x)
    doubled = EmpiricalMeasure(torch.cat([x * torch.tensor([2.0, 1.0]), x * torch.tensor([0.0, 1.0])], 1))
    torch.testing.assert_close(SMALL.objective(mu), SMALL.objective(doubled))
    nu = SMALL.spike_measure(mu)
    torch.testing.assert_close(nu.weights.abs().sum(-1) * 0.1, SMALL.objective(mu) - SMALL.energy(mu))


# The global minimum


def certified(case: SparseSpikes, mu: EmpiricalMeasure) -> float:
    """Largest |η| on the circle."""
    grid = torch.arange(4000, dtype=DOUBLE)[None] / 4000 * case.circumference
    return float(case.certificate(mu, grid).abs().max())


def lower_bound(case: SparseSpikes, mu: EmpiricalMeasure) -> float:
    """A value of the dual problem, max ⟨q, y⟩ - ½|q|² with |⟨q, φ(θ)⟩| <= λ on the circle: at -r, scaled into it."""
    q = -case.residual(mu)[0] / max(1.0, certified(case, mu))
    return float(q @ torch.tensor(case._signal, dtype=DOUBLE) - 0.5 * q @ q)


def on_a_grid(case: SparseSpikes, n_nodes: int = 400) -> EmpiricalMeasure:
    """The minimiser over measures on a grid: FISTA."""
    nodes = torch.arange(n_nodes, dtype=DOUBLE) / n_nodes * case.circumference
    features, y = case._filtered(nodes)[0].numpy(), np.array(case._signal)
    step, a = 1 / np.linalg.eigvalsh(features.T @ features)[-1], np.zeros(n_nodes)
    ahead, inertia = a, 1.0
    for _ in range(20_000):
        moved = ahead - step * features @ (ahead @ features - y)
        new = np.sign(moved) * np.maximum(np.abs(moved) - step * case.penalty, 0)
        grown = (1 + math.sqrt(1 + 4 * inertia**2)) / 2
        ahead, a, inertia = new + (inertia - 1) / grown * (new - a), new, grown
    return EmpiricalMeasure(torch.stack([torch.from_numpy(a) * n_nodes, nodes], -1)[None])


def one_spike(case: SparseSpikes) -> float:
    """The least objective of a single spike w at θ: |φ| = 1, so that it is ½|y|² - ½(max|⟨φ(θ), y⟩| - λ)²."""
    y = torch.tensor(case._signal, dtype=DOUBLE)
    grid = torch.arange(100_000, dtype=DOUBLE) / 100_000 * case.circumference
    gain = (case._filtered(grid)[0] @ y).abs().max() - case.penalty
    return float(0.5 * y @ y - 0.5 * gain.clamp(min=0).square())


def fitted(case: SparseSpikes, **settings):
    shared = {"horizon": 60.0, "dt": 0.05, "seed": 0, "method": "proximal", "dtype": DOUBLE}
    return mfsde.simulate(case, **{**shared, **settings})


@pytest.fixture(scope="module")
def many():
    return fitted(SMALL, n_particles=48, horizon=120.0, save_every=8)


@pytest.fixture(scope="module")
def least(many) -> float:
    """The global minimum: many particles leave no duality gap."""
    mu = EmpiricalMeasure(torch.from_numpy(many["position"].values[-1]))
    low, reached = lower_bound(SMALL, mu), many["objective"].values[-1, 0]
    assert 0 <= reached - low < 1e-6
    return float(reached)


def test_many_particles_find_the_global_minimum(many, least):
    """Better than convex minimisation on a grid, which comes close."""
    objective = many["objective"].values[:, 0]
    assert (np.diff(objective) <= 1e-12).all()
    assert objective[0] > least + 1
    grid = on_a_grid(SMALL)
    assert least < SMALL.objective(grid).item() < least + 1e-4
    assert lower_bound(SMALL, grid) <= least
    # Complementary slackness: spikes sit where η is their sign, all other particles have stopped at exactly 0.
    mu = EmpiricalMeasure(torch.from_numpy(many["position"].values[-1]))
    w, theta = mu.points[..., 0], mu.points[..., 1]
    spikes = w != 0
    assert certified(SMALL, mu) < 1 + 1e-5
    assert (SMALL.certificate(mu, theta) - w.sign())[spikes].abs().max() < 1e-4
    assert 0.2 < spikes.double().mean() < 0.9
    places = torch.tensor([p for _, p in SMALL.spikes], dtype=DOUBLE) * 12.0
    near = ((theta[spikes][:, None] - places + 6.0) % 12.0 - 6.0).abs().amin(-1)
    assert near.max() < 0.5


def test_the_excess_vanishes_when_there_are_more_particles_than_spikes_but_not_at_once(least):
    """Figure 3: three spikes need three particles, gradient descent some more."""
    excess = {
        n: np.median(fitted(SMALL, n_particles=n, n_replicas=8, seed=1, horizon=40.0)["objective"].values[-1]) - least
        for n in (1, 3, 24)
    }
    assert excess[1] > one_spike(SMALL) - least - 1e-8
    assert excess[3] > 0.2
    assert -1e-9 < excess[24] < 1e-3


def test_from_a_single_place_all_particles_remain_one_spike(least):
    """A start that does not separate: the objective stays above that of the best single spike."""
    stuck = replace(SMALL, initial_spread=0.0, initial_place=0.6)
    run = fitted(stuck, n_particles=16, horizon=20.0)
    x = run["position"].values[-1, 0]
    assert np.ptp(x[:, 0]) < 1e-9
    assert np.ptp(x[:, 1]) < 1e-9
    single = one_spike(SMALL)
    assert single - least > 0.3
    assert run["objective"].values[-1, 0] >= single - 1e-8
    assert certified(SMALL, EmpiricalMeasure(torch.from_numpy(x)[None])) > 1.5


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_it_passes_the_door_in_both_precisions(dtype):
    case = SparseSpikes()
    x = case.initial().from_variates(normals(2, 6, 2)).to(dtype)
    equation = Equation(case, x)
    assert equation.form == "number"
    assert equation.drift(0.0, x, equation.measure(x)).dtype == dtype
    assert x[..., 0].abs().max() == 0


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"cutoff": 0}, "cutoff = 0; expected a whole number >= 1"),
        ({"spikes": ()}, "expected pairs"),
        ({"spikes": ((1.0,),)}, "expected pairs"),
        ({"penalty": -1.0}, "penalty = -1.0"),
        ({"circumference": 0.0}, "a circumference > 0"),
        ({"initial_spread": -0.1}, "initial_spread = -0.1"),
    ],
)
def test_impossible_spikes_are_refused(wrong, what):
    with pytest.raises(ValueError, match=what):
        replace(SMALL, **wrong)
