"""SGD of a ReLU network that selects variables: its mean drift, its risk, and the flow that it reduces to."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from torch import Tensor

import mfsde
from mfsde import EmpiricalMeasure
from mfsde.draws import Draws
from mfsde.noise import Noise
from mfsde.scenarios import OnlineVariableSelection
from mfsde.scenarios.online_variable_selection import _Pairs

FLOAT64 = torch.float64
CASE = OnlineVariableSelection(delta=0.6, data_dim=7, n_relevant=3, initial_a=0.4)


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def off_its_copies(case: OnlineVariableSelection, x: Tensor, z: Tensor) -> Tensor:
    """½ R of the law (1 - s) δ_z + s δ_x in its part that is linear in s at 0: F's functional derivative, up to a
    constant, by autograd in x of closed forms in the pairs (x, z), which never meet."""
    total = torch.zeros(x.shape[:-1], dtype=x.dtype)
    for y in (1, -1):
        scale = torch.ones(case.data_dim, dtype=x.dtype)
        scale[: case.n_relevant] = 1 + y * case.delta
        w, v = x[:, 2:] * scale, z[:, 2:] * scale
        s = w.norm(dim=-1)
        mean = s * _Pairs.excess(-x[:, 1] / s)
        # E (sG + b)₊ (s'G' + b')₊ by the trapezoidal rule along v, in closed form across.
        g = torch.linspace(-9, 9, 2001, dtype=FLOAT64)
        p = torch.exp(-0.5 * g.square()) / math.sqrt(2 * math.pi) * (g[1] - g[0])
        r = v.norm(dim=-1)
        outer = (r[:, None] * g + z[:, 1, None]).relu()
        along = w @ (v / r[:, None]).T
        across = (s.square()[:, None] - along.square()).sqrt()[..., None]
        level = -(along[..., None] * g + x[:, 1, None, None]) / across
        both = (p * outer * across * _Pairs.excess(level)).sum(-1)
        total = total + 0.5 * x[:, 0] * (both @ z[:, 0] / len(z) - y * mean)
    return total


def test_the_drift_is_minus_the_derivative_of_the_energy():
    x, z = normals(5, 9), normals(6, 9, seed=1)
    at = x.clone().requires_grad_()
    slope = torch.autograd.grad(off_its_copies(CASE, at, z).sum(), at)[0]
    mu, t = EmpiricalMeasure(z), 0.7
    b = CASE.drift(t, x, mu)
    torch.testing.assert_close(b, -((t + 2e-4) ** -0.25) * slope, rtol=0, atol=1e-4)
    for wrong in (replace(CASE, delta=0.5), replace(CASE, n_relevant=4), replace(CASE, decay=0.0)):
        assert (wrong.drift(t, x, mu) - b).abs().max() > 1e-2


def test_the_risk_has_the_drift_as_its_gradient():
    """N ∂F/∂θ_i, by differences; ξ = 1."""
    case, x = replace(CASE, decay=0.0), normals(4, 9)
    h = 1e-3
    steps = h * torch.eye(36, dtype=FLOAT64).view(36, 4, 9)
    up, down = (torch.stack([case.risk(EmpiricalMeasure(x + sign * e)) for e in steps]) for sign in (1, -1))
    slope = -4 * (up - down).view(4, 9) / (4 * h)
    torch.testing.assert_close(case.drift(0.0, x, EmpiricalMeasure(x)), slope, rtol=0, atol=1e-4)


def test_samples_give_the_drift_and_the_risk_on_average():
    case, n = replace(CASE, batch_size=200_000), 200_000
    x = normals(1, 5, 9)
    mu = EmpiricalMeasure(x, torch.softmax(normals(1, 5, seed=3), -1))
    sample = case.sample(Draws(Noise(4), 0, 1, FLOAT64, x.device))
    inputs, y = sample
    f = (mu.weights[0, :, None] * x[0, :, :1] * (x[0, :, 2:] @ inputs[0].T + x[0, :, 1:2]).relu()).sum(0)
    loss = (y[0] - f).square()
    assert abs(loss.mean() - case.risk(mu)[0]) < 4 * loss.std() / math.sqrt(n)
    residual = (y[0] - f) * case.step_size(0.3)
    hidden = (x[0, :, 2:] @ inputs[0].T + x[0, :, 1:2]).relu()
    active = hidden.sign() * x[0, :, :1] * residual
    terms = torch.cat([(hidden * residual)[..., None], active[..., None], active[..., None] * inputs[0]], -1)
    errors = terms.std(1) / math.sqrt(n)
    found, exact = case.sampled_drift(0.3, x, mu, sample)[0], case.drift(0.3, x, mu)[0]
    assert ((found - exact).abs() < 4.5 * errors).all()
    assert ((found + exact).abs() > 4.5 * errors).any()
    # On others than the particles, the same.
    torch.testing.assert_close(case.sampled_drift(0.3, x.clone(), mu, sample)[0], found, rtol=0, atol=1e-12)


def test_inputs_have_the_variances_of_their_label():
    case = replace(CASE, batch_size=100_000)
    x, y = case.sample(Draws(Noise(1), 0, 1, FLOAT64, torch.device("cpu")))
    for label in (1, -1):
        spread = x[0, y[0] == label].std(0)
        expected = torch.tensor([1 + 0.6 * label] * 3 + [1.0] * 4, dtype=FLOAT64)
        torch.testing.assert_close(spread, expected, rtol=0.02, atol=0)


@pytest.mark.parametrize("rho", [-0.99, -0.5, 0.0, 0.7, 0.9, 0.999])
def test_moments_of_truncated_pairs(rho):
    """P(G > h, G' > k) of scipy, the other two by quadrature of what is given G."""
    x = torch.tensor([[1.0, 0.4, 1.3, 0.0]], dtype=FLOAT64)
    z = torch.tensor([[1.0, -0.7, 0.8 * rho, 0.8 * math.sqrt(1 - rho**2)]], dtype=FLOAT64)
    case = OnlineVariableSelection(0.0, 2, 1)
    pair = _Pairs.of(case, 1, x, z)
    h, k = float(pair.level), float(pair.levels)
    assert (h, k) == pytest.approx((-0.4 / 1.3, 0.7 / 0.8))
    expected = multivariate_normal(cov=[[1, rho], [rho, 1]]).cdf([-h, -k])
    assert float(pair.orthant) == pytest.approx(expected, abs=1e-6)
    g = torch.linspace(h, 10, 40_001, dtype=FLOAT64)
    density = torch.exp(-0.5 * g.square()) / math.sqrt(2 * math.pi)
    spread = math.sqrt(1 - rho**2)
    beyond = 0.8 * spread * _Pairs.excess((k - rho * g) / spread)
    assert float(pair.one()) == pytest.approx(float(torch.trapezoid(density * beyond, g)), abs=1e-7)
    both = torch.trapezoid(density * 1.3 * (g - h) * beyond, g)
    assert float(pair.both()) == pytest.approx(float(both), abs=1e-7)
    assert float(pair.on_edge()) == pytest.approx(float(density[0] * beyond[0] / 1.3), abs=1e-9)


def test_the_risk_of_random_directions_goes_to_that_of_the_reduced_law():
    """Var f given y is of order 1/d for infinitely many neurons, and 1/N for finitely many."""
    gaps = []
    for d, n in ((16, 200), (64, 800)):
        case = OnlineVariableSelection(data_dim=d, n_relevant=d // 4, initial_a=0.5, initial_variance=0.1)
        mu = EmpiricalMeasure(case.initial().from_variates(normals(n, case.initial().n_variates)))
        gaps.append(float(case.risk(mu) - case.reduced.risk(case.of_norms(mu))))
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.3)
    assert 0 < gaps[1] < 0.02


def test_the_clock_is_the_integral_of_the_step_sizes():
    h = 1e-5
    for t in (0.3, 2.0):
        assert (CASE.clock(t + h) - CASE.clock(t - h)) / (2 * h) == pytest.approx(CASE.step_size(t), rel=1e-8)
    assert CASE.clock(0.0) == 0
    assert CASE.clock(2.0) == pytest.approx(CASE.reduced.clock(2.0), rel=2e-3)
    assert CASE.reduced.share == 3 / 7


def test_a_run_of_sgd():
    run = mfsde.simulate(CASE, n_particles=20, n_replicas=2, horizon=0.02, dt=1e-3, seed=0, method="sgd")
    last = EmpiricalMeasure(torch.from_numpy(run["position"].values[-1]))
    np.testing.assert_allclose(run["limit_risk"][-1], CASE.reduced.risk(CASE.of_norms(last)), rtol=1e-5)
    np.testing.assert_allclose(run["output"][-1], last.mean()[:, 0, 0], rtol=1e-5)
    np.testing.assert_allclose(run["relevant"][-1], last.points[..., 2:5].norm(dim=-1).mean(-1), rtol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"delta": 1.0}, "delta = 1.0; expected 0 <= delta < 1"),
        ({"data_dim": 1}, "data_dim = 1; expected d >= 2"),
        ({"n_relevant": 0}, "n_relevant = 0 of data_dim = 7; expected 1 <= s₀ < d"),
        ({"n_relevant": 7}, "n_relevant = 7 of data_dim = 7"),
        ({"decay": 1.0}, "decay = 1.0; expected 0 <= decay < 1"),
        ({"offset": 0.0}, "offset = 0.0; expected t₀ > 0"),
        ({"scale": 0.0}, "scale = 0.0, initial_variance = 1.0; expected κ > 0"),
        ({"batch_size": 0}, "batch_size = 0; expected at least 1"),
    ],
)
def test_impossible_parameters_are_refused(wrong, what):
    with pytest.raises(ValueError, match=what):
        replace(CASE, **wrong)
