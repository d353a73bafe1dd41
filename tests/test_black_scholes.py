"""Correlated geometric Brownian motions: coefficients, laws, the call in closed form, prices by multipliers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

import mfsde
from mfsde import EmpiricalMeasure
from mfsde.scenarios import BlackScholes
from mfsde.scenarios.black_scholes import CorrelatedLogNormal, equicorrelated

FLOAT64 = torch.float64
# E(X_1 - 100)_+ from x = 100, mu = .05, sigma = .2, by quadrature, undiscounted.
CALL = 10.986396449700798
UNEVEN = BlackScholes(
    (90.0, 120.0), (0.03, -0.02), ((0.2, 0.1, 0.0), (-0.1, 0.3, 0.05)),
    (1.0, -0.5), ((0.5, 0.5), (1.0, -1.0)), (-100.0, 20.0),
)  # fmt: skip


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def test_coefficients_are_their_formulas():
    x = normals(2, 5, 2).exp() * 100
    mu = EmpiricalMeasure(x)
    b, s = UNEVEN.drift(0.0, x, mu), UNEVEN.diffusion(0.0, x, mu)
    assert s.shape == (2, 5, 2, 3)
    for i in range(2):
        torch.testing.assert_close(b[..., i], x[..., i] * UNEVEN.growth[i])
        for j in range(3):
            torch.testing.assert_close(s[..., i, j], x[..., i] * UNEVEN.sigma[i][j])
    y = x.numpy()
    g = np.maximum(y.mean(-1) - 100, 0) - 0.5 * np.maximum(y[..., 0] - y[..., 1] + 20, 0)
    np.testing.assert_allclose(UNEVEN.payoff(x).numpy(), g, rtol=1e-13)


def test_the_symmetric_root_has_the_correlations():
    sigma = torch.tensor(equicorrelated(4, 0.2, -0.3), dtype=FLOAT64)
    expected = 0.04 * (1.3 * torch.eye(4, dtype=FLOAT64) - 0.3)
    torch.testing.assert_close(sigma @ sigma.mT, expected, rtol=0, atol=1e-16)
    assert equicorrelated(1, 0.2, 0.5) == ((0.2,),)


def test_the_call_has_its_known_value():
    assert BlackScholes.basket(1).value(1.0) == pytest.approx(CALL, abs=1e-12)
    # Discounted it is another number.
    assert BlackScholes.basket(1).value(1.0) != pytest.approx(CALL * math.exp(-0.05), rel=1e-3)


@pytest.mark.parametrize(("slope", "offset"), [(1.0, -80.0), (-1.0, 110.0), (0.5, 3.0), (-0.5, -3.0), (2.0, 0.0)])
def test_every_neuron_of_one_asset_has_a_closed_form(slope, offset):
    case = BlackScholes((100.0,), (0.05,), ((0.1, 0.2),), (1.5,), ((slope,),), (offset,))
    law = stats.lognorm(math.sqrt(0.05 * 2), scale=100 * math.exp((0.05 - 0.025) * 2))

    def weighted(x: float) -> float:
        return float(1.5 * max(slope * x + offset, 0) * law.pdf(x))

    kink = [-offset / slope] if slope * offset < 0 else [100.0]
    assert case.value(2.0) == pytest.approx(integrate.quad(weighted, 1e-9, 5000, points=kink, limit=400)[0], rel=1e-7)


def test_the_law_has_the_second_moments_and_starts_at_the_point():
    law = UNEVEN.limit(1.5)
    torch.testing.assert_close(
        law.cov + torch.outer(law.mean, law.mean), UNEVEN.second_moments(1.5), rtol=1e-13, atol=0
    )
    start = torch.tensor(UNEVEN.start, dtype=FLOAT64)
    torch.testing.assert_close(UNEVEN.limit(0.0).from_variates(normals(3, 3)), start.expand(3, 2))
    torch.testing.assert_close(UNEVEN.multiplier(1.5).mean * start, law.mean)
    mu = law.as_measure()
    torch.testing.assert_close(mu.mean()[0], law.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(mu.covariance(), law.cov, rtol=1e-9, atol=0)
    moments = mfsde.limit.moments(UNEVEN, [0.0, 1.5])
    np.testing.assert_allclose(moments["mean"].values[-1], law.mean, rtol=1e-8)
    np.testing.assert_allclose(moments.covariance.values[-1], law.cov, rtol=1e-7)


def test_the_density_is_scipys_in_one_dimension():
    law = CorrelatedLogNormal(torch.tensor([0.3]), torch.tensor([[0.3, 0.4]]))
    x = torch.tensor([[0.5], [1.0], [4.0]], dtype=FLOAT64)
    known = stats.lognorm(0.5, scale=math.exp(0.3)).logpdf(x[:, 0].numpy())
    np.testing.assert_allclose(law.log_prob(x).numpy(), known, rtol=1e-6)
    assert law.log_prob(-x).tolist() == [-math.inf] * 3


def test_prices_are_means_over_the_multiplier():
    case = BlackScholes.basket(1)
    z = normals(200, 2000, 1)
    found = case.feynman_kac(case.multiplier(1.0).from_variates(z))
    error = float(found.std() / len(found) ** 0.5)
    assert abs(float(found.mean()) - CALL) < 4 * error
    # With the law of X_T in place of the multiplier's the start counts twice.
    wrong = case.feynman_kac(case.limit(1.0).from_variates(z))
    assert abs(float(wrong.mean()) - CALL) > 100 * error


def test_a_run_has_eulers_own_moments_and_the_payoff_as_observable():
    n, dt = 2000, 0.25
    run = mfsde.simulate(UNEVEN, n_particles=n, n_replicas=50, horizon=1.0, dt=dt, seed=1, dtype=FLOAT64)
    x = run.position.values[-1]
    np.testing.assert_allclose(run.payoff.values[-1], UNEVEN.payoff(torch.as_tensor(x)).mean(-1), rtol=1e-12)
    s, growth = np.array(UNEVEN.sigma), np.array(UNEVEN.growth)
    step = 1 + (growth[:, None] + growth) * dt + np.outer(growth, growth) * dt**2 + s @ s.T * dt
    expected = np.outer(UNEVEN.start, UNEVEN.start) * step**4

    def score(wanted: np.ndarray) -> float:
        found = np.einsum("rni,rnj->rij", x, x) / n
        return float(np.abs((found.mean(0) - wanted) / (found.std(0, ddof=1) / 50**0.5)).max())

    assert score(expected) < 4
    # The Stratonovich reading has e^{½|σ^i|²t} more growth.
    assert score(expected * np.exp(0.5 * ((s**2).sum(1)[:, None] + (s**2).sum(1)))) > 20


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"start": ()}, "one positive price for each asset"),
        ({"start": 100.0}, "start = 100.0; expected one positive price"),
        ({"growth": 0.05}, "growth = 0.05; expected a tuple"),
        ({"sigma": (0.2, 0.2, 0.2)}, "sigma = .*; expected a tuple"),
        ({"start": (1.0, 0.0, 1.0)}, "one positive price"),
        ({"start": (1.0, math.inf, 1.0)}, "one positive price"),
        ({"growth": (0.1,)}, r"growth has 1 row\(s\) of \[1\] numbers; expected 1 of 3"),
        ({"sigma": ((0.2,),)}, "sigma has 1 row"),
        ({"sigma": ((0.2,), (0.1, 0.1), (0.1,))}, "expected 3 of one length"),
        ({"sigma": ((), (), ())}, "sigma has 3 row"),
        ({"sigma": ((0.2,), (math.nan,), (0.1,))}, "sigma has an entry that is not finite"),
        ({"inner": ((1.0, 1.0),)}, "inner has 1 row"),
        ({"inner": ()}, "outer has 1 row"),
        ({"outer": (1.0, 2.0)}, "outer has 1 row"),
        ({"offset": ()}, "offset has 1 row"),
        ({"activation": "sin"}, "activation = 'sin'; expected one of tanh"),
    ],
)
def test_bad_input_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        BlackScholes(**fields)


def test_what_has_no_answer_is_refused():
    for dim, volatility, correlation in [(0, 0.2, 0.0), (3, 0.2, -0.6), (2, 0.2, 1.1), (2, -1.0, 0.0)]:
        with pytest.raises(ValueError, match="can be correlated alike"):
            equicorrelated(dim, volatility, correlation)
    for law in (BlackScholes().multiplier, BlackScholes().limit, BlackScholes.basket(1).value):
        with pytest.raises(ValueError, match=r"t = -1\.0; expected the time that passes"):
            law(-1.0)
    with pytest.raises(ValueError, match="no closed form for d = 3"):
        BlackScholes().value(1.0)
    with pytest.raises(ValueError, match=r"expected \(d,\) and \(d, q\)"):
        CorrelatedLogNormal(torch.zeros(2), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="not finite"):
        CorrelatedLogNormal(torch.full((1,), math.nan), torch.zeros(1, 1))
