"""Oscillators with frequencies of their own: the laws they start from, Ott-Antonsen, Sakaguchi, and incoherence."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, special, stats
from torch import Tensor

import mfsde
from mfsde import EmpiricalMeasure, Product
from mfsde.model import Equation
from mfsde.scenarios.kuramoto_frequencies import Cauchy, KuramotoFrequencies, WrappedCauchy

FLOAT64 = torch.float64
TURN = 2 * math.pi
LORENTZ = KuramotoFrequencies(coupling=2.0, width=0.5, centre=0.3, initial_order=0.3, initial_mean=1.0)
NOISY = KuramotoFrequencies(coupling=4.0, sigma=1.0, frequencies="gaussian", width=0.8, initial_order=0.7)


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def z_score(values: np.ndarray, expected: float) -> float:
    """How many standard errors over replicas the mean is from what is expected."""
    return float((values.mean() - expected) / (values.std(ddof=1) / math.sqrt(len(values))))


# Equation -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_drift_is_the_sum_over_pairs(dtype, weighted):
    x = LORENTZ.initial().from_variates(normals(3, 7, 2)).to(dtype)
    w = torch.softmax(normals(3, 7, seed=1), -1).to(dtype) if weighted else None
    mu = EmpiricalMeasure(x, w)
    theta, omega, masses = x[..., 0].double().numpy(), x[..., 1].double().numpy(), mu.weights.double().numpy()
    pairs = np.sin(theta[:, None, :] - theta[:, :, None]) * masses[:, None, :]
    wanted = np.stack([omega + 2.0 * pairs.sum(-1), np.zeros_like(omega)], -1)
    found = LORENTZ.drift(0.0, x, mu)
    assert found.dtype == dtype
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-13 if dtype == FLOAT64 else 2e-6, rtol=1e-6)
    repelling = replace(LORENTZ, coupling=-2.0).drift(0.0, x, mu)
    assert not np.allclose(repelling.numpy(), wanted, atol=1e-2)


def test_frequencies_are_frozen_and_angles_stay_on_the_circle():
    run = mfsde.simulate(NOISY, n_particles=50, n_replicas=2, horizon=1.0, dt=0.05, seed=1, save_every=5)
    theta, omega = run.position.values[..., 0], run.position.values[..., 1]
    assert (omega == omega[:1]).all()
    assert (theta[1:] >= 0).all()
    assert (theta[1:] <= np.float32(TURN)).all()
    assert np.abs(np.diff(theta, axis=0)).min() > 0


def test_the_door_takes_angles_beside_frequencies():
    x = NOISY.initial().from_variates(normals(2, 5, 2))
    assert Equation(NOISY, x).form == "diagonal"
    assert Equation(LORENTZ, x).form == "number"
    assert torch.equal(NOISY.diffusion(0.0, x, EmpiricalMeasure(x)), torch.tensor([1.0, 0.0], dtype=FLOAT64))
    mu = EmpiricalMeasure(torch.tensor([[0.1, 0.0], [6.2, 5.0]], dtype=FLOAT64), period=NOISY.period)
    gap = mu.displacement(mu.points[:1], mu.points[1:])
    np.testing.assert_allclose(gap.numpy(), [[0.1 - 6.2 + TURN, -5.0]], atol=1e-12)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"frequencies": "uniform"}, "expected 'lorentz' or 'gaussian'"),
        ({"width": 0.0}, "Identical oscillators are the scenario Kuramoto"),
        ({"initial_order": 1.0}, "0 is uniform on the circle"),
    ],
)
def test_bad_fields_are_refused(fields, text):
    with pytest.raises(ValueError, match=text):
        KuramotoFrequencies(**fields)


# Laws -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [0.0, 0.3, 0.9])
def test_the_waves_of_a_wrapped_cauchy_law_are_powers(r):
    law = WrappedCauchy(1.0, r)
    theta = torch.arange(4096, dtype=FLOAT64)[:, None] * TURN / 4096
    mass = law.log_prob(theta).exp().numpy() * TURN / 4096
    for n in range(4):
        wave = (mass * np.exp(1j * n * (theta[:, 0].numpy() - 1.0))).sum()
        assert wave == pytest.approx(r**n, abs=1e-12)


@pytest.mark.parametrize("law", [WrappedCauchy(1.0, 0.0), WrappedCauchy(-2.0, 0.7), Cauchy(0.5, 2.0)])
def test_quantiles_and_distribution_are_inverse_and_those_of_the_density(law):
    u = torch.tensor([0.003, 0.1, 0.5, 0.77, 0.999], dtype=FLOAT64)
    torch.testing.assert_close(law.cdf(law.quantile(u)), u, rtol=0, atol=1e-13)
    z = torch.special.ndtri(u)
    torch.testing.assert_close(law.from_variates(z[:, None])[:, 0], law.quantile(u), rtol=1e-12, atol=1e-13)
    assert (torch.diff(law.from_variates(torch.linspace(-6, 6, 101, dtype=FLOAT64)[:, None])[:, 0]) > 0).all()
    x = law.quantile(u)[1:4, None]
    slope = (law.cdf(x + 1e-5) - law.cdf(x - 1e-5))[:, 0] / 2e-5
    torch.testing.assert_close(slope, law.log_prob(x).exp(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("r", [0.0, 0.3, 0.8])
def test_the_quadrature_of_a_wrapped_cauchy_law_has_its_mean_and_variance(r):
    law = WrappedCauchy(1.0, r)
    exact = integrate.quad(lambda y: y**2 * (1 - r**2) / (TURN * (1 - 2 * r * math.cos(y) + r**2)), -math.pi, math.pi)[
        0
    ]
    assert float(law.cov) == pytest.approx(exact, rel=1e-10)
    mu = law.as_measure()
    assert float(mu.mean()) == pytest.approx(1.0, abs=1e-13)
    assert float(mu.covariance()) == pytest.approx(exact, rel=1e-9)


def test_the_moments_of_a_product_are_those_of_its_components():
    law = NOISY.initial()
    angle = WrappedCauchy(math.pi, 0.7)
    torch.testing.assert_close(law.mean, torch.tensor([math.pi, 0.0], dtype=FLOAT64))
    torch.testing.assert_close(law.cov, torch.tensor([[float(angle.cov), 0.0], [0.0, 0.64]], dtype=FLOAT64))
    assert not hasattr(Cauchy(0.0, 1.0), "mean")
    with pytest.raises(AttributeError, match="no grid holds its tails"):
        _ = LORENTZ.initial().cov


def test_the_cauchy_law_is_scipys_and_finite_in_single_precision():
    z = torch.tensor([[-3.0], [-0.2], [1.5], [4.0]], dtype=FLOAT64)
    wanted = stats.cauchy(0.5, 2.0).ppf(special.ndtr(z.numpy()))
    np.testing.assert_allclose(Cauchy(0.5, 2.0).from_variates(z).numpy(), wanted, rtol=1e-9)
    # Φ(6) rounds to 1 in float32: from the other tail the largest frequency is still the right one.
    extreme = torch.tensor([[6.0], [-6.0]])
    found = Cauchy(0.0, 2.0).from_variates(extreme)[:, 0]
    tail = 2.0 / (math.pi * special.ndtr(-6.0))
    np.testing.assert_allclose(found.numpy(), [tail, -tail], rtol=1e-5)
    for law in (Cauchy(0.0, 1.0), WrappedCauchy(0.0, 0.5)):
        assert law.from_variates(torch.tensor([[-38.0], [0.0], [38.0]])).isfinite().all()


def test_a_product_law_has_independent_components():
    law = Product([WrappedCauchy(0.0, 0.4), Cauchy(1.0, 0.3)])
    assert law.dim == law.n_variates == 2
    z = normals(6, 2)
    x = law.from_variates(z)
    torch.testing.assert_close(x[:, 1:], Cauchy(1.0, 0.3).from_variates(z[:, 1:]), rtol=0, atol=0)
    total = WrappedCauchy(0.0, 0.4).log_prob(x[:, :1]) + Cauchy(1.0, 0.3).log_prob(x[:, 1:])
    torch.testing.assert_close(law.log_prob(x), total)
    mu = law.as_measure()
    # Lorentz and wave together: E e^{iθ} E 1/(1 + ((ω - 1)/.3)²) = .4 · ½.
    value = mu.integrate(lambda y: torch.cos(y[..., 0]) / (1 + ((y[..., 1] - 1) / 0.3) ** 2))
    assert float(value) == pytest.approx(0.2, abs=1e-9)


# Lorentz frequencies without noise ------------------------------------------------------------------------------------


@pytest.mark.parametrize("coupling", [0.0, 0.6, 1.0, 2.0])
def test_the_order_limit_solves_the_equation_of_ott_and_antonsen(coupling):
    case = replace(LORENTZ, coupling=coupling)
    k, delta = coupling, 0.5
    solved = integrate.solve_ivp(
        lambda t, r: -delta * r + k / 2 * r * (1 - r**2), (0, 5), [0.3], t_eval=[1.0, 5.0], rtol=1e-11, atol=1e-13
    )
    assert [case.order_limit(t) for t in (1.0, 5.0)] == pytest.approx(list(solved.y[0]), abs=1e-9)
    assert case.order_limit(0.0) == pytest.approx(0.3, abs=1e-15)
    at_rest = math.sqrt(1 - 2 * delta / k) if k > 1 else 0.0
    if k != 1:
        assert case.order_limit(200.0) == pytest.approx(at_rest, abs=1e-8)


def waves(case: KuramotoFrequencies, dt: float) -> np.ndarray:
    """∫ e^{inθ} dm, n = 1, 2, 3, of every replica at t = 2, turned back by the limit's phase.    (R, 3)."""
    run = mfsde.simulate(
        case, n_particles=4000, n_replicas=16, horizon=2.0, dt=dt, seed=3, dtype=FLOAT64, observables=()
    )
    theta = run.position.values[-1, :, :, 0] - 1.0 - 0.3 * 2.0
    return np.stack([np.exp(1j * n * theta).mean(-1) for n in (1, 2, 3)], -1)


def test_lorentz_oscillators_follow_ott_and_antonsen_in_every_wave():
    # The same oscillators at two steps: Euler's bias of order dt cancels, and what is left is that of the sample. A
    # replica's order parameter is biased by O(1/N), a sixteenth of its standard error here.
    extrapolated = 2 * waves(LORENTZ, 0.025) - waves(LORENTZ, 0.05)
    law = LORENTZ.angles(2.0)
    assert law.centre == pytest.approx(1.6)

    def scores(case: KuramotoFrequencies) -> list[float]:
        r = case.order_limit(2.0)
        return [z_score(extrapolated[:, n - 1].real, r**n) for n in (1, 2, 3)]

    assert np.abs(scores(LORENTZ)).max() < 4
    # Nothing turns against the limit's phase.
    assert max(abs(z_score(extrapolated[:, n].imag, 0.0)) for n in range(3)) < 4
    for wrong in ({"width": 0.55}, {"coupling": 2.2}, {"initial_order": 0.33}):
        assert np.abs(scores(replace(LORENTZ, **wrong))).max() > 4


def test_formulas_of_lorentz_frequencies_are_refused_elsewhere():
    for case in (NOISY, replace(LORENTZ, sigma=0.1), replace(LORENTZ, frequencies="gaussian")):
        with pytest.raises(ValueError, match="closes for Lorentz frequencies without noise"):
            case.order_limit(1.0)
        with pytest.raises(ValueError, match="closes for Lorentz"):
            case.angles(1.0)
    assert not hasattr(LORENTZ, "limit")


# Noise: Sakaguchi's self-consistency ----------------------------------------------------------------------------------

N_WAVES = 60


def first_wave(omega: float, pull: float, temperature: float) -> float:
    """Re E e^{iθ} of the stationary law of dθ = (ω - pull sin θ) dt + √(2D) dW, from its Fourier coefficients.

    (iω n - D n²) c_n + (n pull/2)(c_{n-1} - c_{n+1}) = 0, c_0 = 1: a continued fraction from the far end.
    """
    ratio = 0.0 + 0.0j
    for n in range(N_WAVES, 0, -1):
        ratio = 0.5 * pull / (temperature * n - 1j * omega + 0.5 * pull * ratio)
    return ratio.real


def returned(r: float, case: KuramotoFrequencies) -> float:
    """∫ E[cos θ | ω, r] g(dω), the order that a field of order r produces."""
    d = case.sigma**2 / 2
    if case.frequencies == "gaussian":
        nodes = np.linspace(-9, 9, 801)
        omega, weights = case.width * nodes, np.exp(-(nodes**2) / 2) / np.exp(-(nodes**2) / 2).sum()
    else:
        angles = (np.arange(4000) + 0.5) / 4000
        omega, weights = case.width * np.tan(math.pi * (angles - 0.5)), np.full(4000, 1 / 4000)
    return float(sum(w * first_wave(o, case.coupling * r, d) for o, w in zip(omega, weights, strict=True)))


def test_identical_oscillators_have_the_ratio_of_bessel_functions():
    assert first_wave(0.0, 1.4, 0.5) == pytest.approx(special.i1(2.8) / special.i0(2.8), abs=1e-14)


@pytest.mark.parametrize(
    "case",
    [
        NOISY,
        replace(NOISY, width=0.05),
        replace(NOISY, frequencies="lorentz"),
        replace(NOISY, frequencies="lorentz", sigma=0.7, width=0.2),
    ],
)
def test_incoherence_loses_its_stability_at_the_critical_coupling(case):
    # Near r = 0 a field of order r produces K/K_c r.
    slope = returned(1e-4, case) / 1e-4
    assert slope == pytest.approx(case.coupling / case.critical_coupling(), rel=1e-5)
    assert slope != pytest.approx(case.coupling / replace(case, sigma=1.1 * case.sigma).critical_coupling(), rel=1e-3)


def test_the_critical_coupling_without_noise_is_kuramotos():
    assert LORENTZ.critical_coupling() == 1.0
    gaussian = replace(LORENTZ, frequencies="gaussian", width=0.8)
    assert gaussian.critical_coupling() == pytest.approx(2 / (math.pi * stats.norm(0, 0.8).pdf(0.0)), rel=1e-14)


def test_noisy_gaussian_oscillators_settle_at_the_self_consistent_order():
    settings = {"n_particles": 4000, "n_replicas": 16, "horizon": 6.0, "dtype": torch.float32, "keep_particles": 0}
    coarse = mfsde.simulate(NOISY, dt=0.04, noise=mfsde.Noise(5, substeps=2), seed=5, **settings)
    fine = mfsde.simulate(NOISY, dt=0.02, seed=5, **settings)
    # Euler's bias of order dt cancels; that of order 1/N is a twentieth of a standard error.
    order = 2 * fine.order.values[-1].astype(float) - coarse.order.values[-1]

    def root(case: KuramotoFrequencies) -> float:
        return float(optimize.brentq(lambda r: returned(r, case) - r, 0.1, 0.999))

    assert abs(z_score(order, root(NOISY))) < 4
    for wrong in ({"width": 0.01}, {"sigma": 1.1}, {"coupling": 3.7}):
        assert abs(z_score(order, root(replace(NOISY, **wrong)))) > 4


def test_uniform_angles_have_the_order_of_a_finite_sample():
    n = 400
    case = KuramotoFrequencies(coupling=0.0, sigma=1.0, initial_order=0.0)
    run = mfsde.simulate(case, n_particles=n, n_replicas=1024, horizon=0.5, dt=0.25, seed=2, keep_particles=0)
    # Uncoupled, they stay uniform and independent: E r = √(π/4N) up to a relative 1/(8N).
    for order in run.order.values.astype(float):
        assert abs(z_score(order, math.sqrt(math.pi / (4 * n)))) < 4
        assert abs(z_score(order, math.sqrt(1 / n))) > 4
        assert abs(z_score(order, 0.0)) > 4
