"""The solvable and the reduced scenarios against formulas, energies, and the problems that they reduce."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import quad, solve_ivp
from scipy.special import iv
from torch import Tensor

from mfsde import Dirac, EmpiricalMeasure, Energy, MeanFieldLangevin
from mfsde.limit import characteristics, moments
from mfsde.limit.characteristics import quadrature
from mfsde.scenarios import GaussianLangevin, IsotropicGaussians, Kuramoto, VariableSelection
from mfsde.scenarios.isotropic_gaussians import NormOfGaussian

FLOAT64 = torch.float64


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def starts(case: Any, *lead: int, seed: int = 0) -> Tensor:
    law = case.initial()
    return law.from_variates(normals(*lead, law.n_variates, seed=seed))


def drives_downhill(case: Any, energy: Energy, x: Tensor, at: Tensor | None = None, weights: Any = None) -> bool:
    """Whether b = -D_mF to 1e-10, on the particles or elsewhere."""
    mu = EmpiricalMeasure(x, weights)
    at = x if at is None else at
    return torch.allclose(case.drift(0.0, at, mu), -energy.intrinsic_derivative(mu, at), rtol=0, atol=1e-10)


# Gaussian mean-field Langevin dynamics --------------------------------------------------------------------------------

# κ = 0.3, a = 1, k = 4, σ = 1, from N(2, ½): t, mean, variance, F + (σ²/2) KL, W₂ to equilibrium.
LANGEVIN = [
    (0.1, 1.6158671698975375, 0.41758001150890983, 2.7072467648052396, 1.4926101559855436),
    (0.5, 0.7224078731869257, 0.2838338208091532, 0.5355335616211582, 0.5928789038758574),
    (2.0, 0.14922734508779323, 0.2500838656569756, 0.13084093113765774, 0.018792749580615494),
]


@pytest.mark.parametrize(("t", "mean", "variance", "free_energy", "distance"), LANGEVIN)
def test_the_gaussian_langevin_limit_is_the_tabled_one(t, mean, variance, free_energy, distance):
    case = GaussianLangevin()
    law = case.limit(t)
    assert law.mean.item() == pytest.approx(mean, abs=1e-13)
    assert law.cov.item() == pytest.approx(variance, abs=1e-13)
    mu = law.as_measure()
    relative_entropy = mu.integrate(lambda x: law.log_prob(x) + case.confinement(x)).item()
    assert case.energy(mu).item() + 0.5 * relative_entropy == pytest.approx(free_energy, abs=1e-12)
    # An unnormalised U would shift it.
    shift = 0.25 * math.log(2 * math.pi / 4)
    assert abs(shift) > 0.1
    apart = math.hypot(mean - 0.3 / 2.3, math.sqrt(variance) - 0.5)
    assert apart == pytest.approx(distance, abs=1e-13)


WIDE = GaussianLangevin(0.4, (1.0, -2.0, 0.5), 1.5, 0.8, (2.0, 0.0, -1.0), 0.3)


def test_the_gaussian_langevin_drift_is_that_of_its_energy_and_confinement():
    x, w = normals(2, 6, 3), torch.softmax(normals(2, 6, seed=1), -1)
    for weights in (None, w):
        mu = EmpiricalMeasure(x, weights)
        derived = MeanFieldLangevin.drift(WIDE, 0.0, x, mu)
        torch.testing.assert_close(WIDE.drift(0.0, x, mu), derived, rtol=0, atol=1e-12)
        for wrong in (replace(WIDE, kappa=0.8), replace(WIDE, sigma=0.8 * 2**0.5), replace(WIDE, target=(1.0,))):
            assert not torch.allclose(wrong.drift(0.0, x, mu), derived, rtol=0, atol=1e-3)


@pytest.mark.parametrize("case", [WIDE, GaussianLangevin(), replace(WIDE, target=(0.7,)), replace(WIDE, sigma=0.0)])
def test_the_gaussian_langevin_limit_solves_its_moment_equations(case):
    result = moments(case, [0.3, 2.0])
    for k, t in enumerate([0.3, 2.0]):
        np.testing.assert_allclose(result["mean"].values[k], case.limit(t).mean, rtol=0, atol=1e-10)
        np.testing.assert_allclose(result["covariance"].values[k], case.limit(t).cov, rtol=0, atol=1e-10)


def test_the_invariant_law_of_gaussian_langevin():
    x = normals(7, 3)
    difference = WIDE.log_invariant(x) - WIDE.limit(200.0).log_prob(x)
    torch.testing.assert_close(difference, difference[:1].expand(7), rtol=0, atol=1e-12)
    norm = quad(lambda y: math.exp(-GaussianLangevin().confinement(torch.tensor([y], dtype=FLOAT64)).item()), -9, 9)[0]
    assert norm == pytest.approx(1, abs=1e-12)
    for wrong in ({"sigma": 0.0}, {"kappa": -5.0}):
        with pytest.raises(ValueError, match="has no invariant density"):
            replace(WIDE, **wrong).log_invariant(x)


def test_gaussian_langevin_refuses_what_is_no_equation():
    with pytest.raises(ValueError, match=r"stiffness = 0.0: e\^\(-k\|x\|²/2\) is a law for k > 0 only"):
        replace(WIDE, stiffness=0.0)
    with pytest.raises(ValueError, match="target has 2 numbers and initial_mean 3"):
        replace(WIDE, target=(1.0, 2.0))


# Isotropic Gaussians --------------------------------------------------------------------------------------------------

FIGURE_1 = IsotropicGaussians()
FIGURE_3 = IsotropicGaussians.non_monotone(0.4)
RADIAL = [
    FIGURE_1,
    FIGURE_3,
    replace(FIGURE_1, data_dim=None),
    replace(FIGURE_1, data_dim=3),
    replace(FIGURE_3, delta=0),
]


def activation(case: IsotropicGaussians, z: np.ndarray) -> np.ndarray:
    return case.left_value + sum(c * np.maximum(z - t, 0) for t, c in zip(case.knots, case.jumps, strict=True))


def test_the_activations_are_those_of_the_figures():
    np.testing.assert_allclose(activation(FIGURE_1, np.array([-9, 0.5, 1.0, 1.5, 9])), [-2.5, -2.5, 2.5, 7.5, 7.5])
    np.testing.assert_allclose(activation(FIGURE_3, np.array([-9, 0, 0.5, 1.5, 9])), [-2.5, -2.5, -4, 7.5, 7.5])


@pytest.mark.parametrize("case", RADIAL)
def test_the_radial_drift_is_minus_the_intrinsic_derivative_of_its_energy(case):
    x, w = normals(2, 9, 1).abs() + 0.05, torch.softmax(normals(2, 9, seed=1), -1)
    elsewhere = torch.linspace(0.01, 5, 7, dtype=FLOAT64)[None, :, None].expand(2, 7, 1)
    for weights in (None, w):
        assert drives_downhill(case, case.energy, x, weights=weights)
        assert drives_downhill(case, case.energy, x, elsewhere, weights)
        assert not drives_downhill(case, 2 * case.energy, x, weights=weights)
        assert not drives_downhill(case, -case.energy, x, weights=weights)
        assert not drives_downhill(case, replace(case, delta=case.delta + 0.1).energy, x, weights=weights)
        # Without the ½ in front of the interaction.
        double = Energy(lambda mu: 2 * case.energy(mu) - 0.5 - mu.integrate(lambda r: data_term(case, r)))
        assert not drives_downhill(case, double, x, weights=weights)


def data_term(case: IsotropicGaussians, r: Tensor) -> Tensor:
    """V from its definition, by quadrature of E σ(aG) = y₀ + Σ c E(aG - t)₊."""
    out = torch.zeros(r.shape[:-1], dtype=r.dtype)
    for y in (1, -1):
        a = (1 + y * case.delta) * r[..., 0]
        for t, c in zip(case.knots, case.jumps, strict=True):
            u = t / a
            ramp = a * torch.exp(-u * u / 2) / math.sqrt(2 * math.pi) - t * torch.special.ndtr(-u)
            out = out - 0.5 * y * c * ramp
    return out


@pytest.mark.parametrize("case", [FIGURE_1, FIGURE_3])
def test_the_risk_of_one_norm_in_infinite_dimension_is_an_integral(case):
    """R = ½ Σ_y (y - q(τ_y r))², q(a) = E σ(aG)."""
    case = replace(case, data_dim=None)
    for r in (0.0, 0.3, 1.0, 4.0):
        risk = 0.0
        for y in (1, -1):
            a = (1 + y * case.delta) * r
            breaks = [t / a for t in case.knots if a > 0 and abs(t / a) < 9]

            def weighted(g, a=a):
                return activation(case, a * g) * math.exp(-g * g / 2) / math.sqrt(2 * math.pi)

            q = quad(weighted, -12, 12, points=breaks or None, epsabs=1e-12, limit=200)[0]
            risk += 0.5 * (y - q) ** 2
        mu = EmpiricalMeasure(torch.full((1, 1), r, dtype=FLOAT64))
        assert case.risk(mu).item() == pytest.approx(risk, abs=1e-9)
        assert case.energy(mu).item() == pytest.approx(0.5 * risk, abs=1e-9)


def sampled_risk(case: IsotropicGaussians, radii: np.ndarray, n: int, seed: int) -> tuple[float, float]:
    """E (y - f(x))² = E [1 - 2yσ(w·x) + σ(w·x)σ(w'·x)] in R^d, w and w' independent; and its standard error."""
    rng = np.random.default_rng(seed)
    d = case.data_dim
    assert d is not None
    y = rng.choice([1.0, -1.0], n)
    x = (1 + y * case.delta)[:, None] * rng.standard_normal((n, d))

    def unit() -> np.ndarray:
        w = rng.standard_normal((n, d))
        w *= (rng.choice(radii, n) / np.linalg.norm(w, axis=1))[:, None]
        return activation(case, (w * x).sum(1))

    first, second = unit(), unit()
    values = 1 - 2 * y * first + first * second
    return values.mean(), values.std() / math.sqrt(n)


@pytest.mark.parametrize(
    "case", [replace(FIGURE_1, data_dim=5), replace(FIGURE_1, data_dim=2), replace(FIGURE_3, data_dim=4)]
)
def test_the_risk_is_that_of_the_full_problem(case):
    radii = np.array([0.4, 1.3, 2.5])
    mu = EmpiricalMeasure(torch.tensor(radii)[:, None])
    sampled, error = sampled_risk(case, radii, 400_000, 0)
    # In d = 2 the series is cut off at an error well below that of sampling.
    assert abs(case.risk(mu).item() - sampled) < 4 * error
    for wrong in (replace(case, data_dim=None), replace(case, delta=case.delta - 0.3)):
        assert abs(wrong.risk(mu).item() - sampled) > 4 * error


def test_the_series_is_cut_off_where_it_says(monkeypatch):
    from mfsde.scenarios import isotropic_gaussians as module

    def kept(case: IsotropicGaussians, terms: int) -> tuple[Tensor, float]:
        monkeypatch.setattr(module, "MOST_TERMS", terms)
        module._angular_moments.cache_clear()
        fresh = replace(case)
        x = torch.linspace(0.05, 6, 40, dtype=FLOAT64)[:, None]
        return fresh.drift(0.0, x, EmpiricalMeasure(x)), fresh.truncation

    for d, accuracy in [(2, 3e-2), (3, 2e-3), (6, 1e-6), (20, 1e-12), (40, 1e-12)]:
        case = replace(FIGURE_1, data_dim=d)
        (shorter, left), (longer, _) = kept(case, 64), kept(case, 4000 if d < 5 else 400)
        error = (shorter - longer).abs().max().item()
        assert error < accuracy
        assert error <= 400 * left + 1e-13  # (Σ|c_j|)² = 400
    module._angular_moments.cache_clear()


def test_high_dimension_is_close_to_infinite_dimension():
    x = starts(FIGURE_1, 50)
    drifts = [replace(FIGURE_1, data_dim=d).drift(0.0, x, EmpiricalMeasure(x)) for d in (1000, 10_000, None)]
    far, near = ((b - drifts[-1]).abs().max().item() for b in drifts[:2])
    # M_2 = 1/d.
    assert near < 5e-3
    assert far / near == pytest.approx(10, rel=0.01)


def test_the_angular_moments_are_those_of_a_coordinate_of_a_unit_vector():
    for d in (2, 3, 7, 40):
        for j, m in enumerate(replace(FIGURE_1, data_dim=d).angular_moments[:6], start=1):
            assert m == pytest.approx(math.prod((2 * i - 1) / (d + 2 * i - 2) for i in range(1, j + 1)), rel=1e-12)
        # u² has a Beta law.
        assert FIGURE_1.angular_moments[1] == pytest.approx(stats.beta(0.5, 19.5).moment(2), rel=1e-4)


@pytest.mark.parametrize(("scale", "d"), [(0.8, 40), (0.1, 320), (1.5, 2)])
def test_the_initial_norms_are_those_of_gaussian_weights(scale, d):
    law, chi = NormOfGaussian(scale, d), stats.chi(d, scale=scale / math.sqrt(d))
    z = torch.linspace(-8, 8, 33, dtype=FLOAT64)[:, None]
    expected = np.where(z < 0, chi.ppf(stats.norm.cdf(z)), chi.isf(stats.norm.sf(z)))
    np.testing.assert_allclose(law.from_variates(z), expected, rtol=1e-9)
    np.testing.assert_allclose(law.quantile(torch.special.ndtr(z[8:-8])), expected[8:-8], rtol=1e-9)
    x = torch.linspace(0.2, 2, 9, dtype=FLOAT64) * scale
    np.testing.assert_allclose(law.log_prob(x[:, None]), chi.logpdf(x), rtol=0, atol=1e-9)
    np.testing.assert_allclose(law.cdf(x), chi.cdf(x), rtol=0, atol=1e-10)
    assert law.log_prob(-x[:, None]).isneginf().all()
    mu = law.as_measure()
    for found in (law.mean.item(), mu.mean().item(), quadrature(law).mean().item()):
        assert found == pytest.approx(chi.mean(), abs=1e-12)
    for found in (law.cov.item(), mu.covariance().item(), quadrature(law).covariance().item()):
        assert found == pytest.approx(chi.var(), abs=1e-12)
    assert law.from_variates(z.float()).dtype == torch.float32
    # The norm of d normals, d times as many variates, has the same law.
    norms = scale * normals(4000, d).norm(dim=-1) / math.sqrt(d)
    assert stats.kstest(norms.numpy(), chi.cdf).pvalue > 1e-3


def dissipated(case: Any, times: np.ndarray, start: Any, **settings: Any) -> tuple[np.ndarray, np.ndarray]:
    """-dF/dt by differences of fourth order around each time, and ∫ |b|² dm there."""
    h = 1e-3
    around = np.unique(np.concatenate([times + k * h for k in (-2, -1, 0, 1, 2)]))
    result = characteristics(case, around, start=start, **settings)
    f = result.energy.values.reshape(len(times), 5)
    slope = (f[:, 0] - 8 * f[:, 1] + 8 * f[:, 3] - f[:, 4]) / (12 * h)
    rates = []
    for k in range(len(times)):
        x = torch.from_numpy(result.position.values[5 * k + 2, 0])
        mu = EmpiricalMeasure(x, torch.from_numpy(result.weight.values[0, 0]))
        b = case.drift(0.0, x, mu)
        # At the wall of r >= 0 nothing moves.
        b = torch.where((case.project(x + 1e-9 * b) == x).all(-1, keepdim=True), torch.zeros_like(b), b)
        rates.append((mu.weights * b.square().sum(-1)).sum().item())
    return -slope, np.array(rates)


@pytest.mark.parametrize(
    ("case", "times"),
    [(FIGURE_1, [0.3, 2.0, 8.0]), (FIGURE_3, [0.1, 0.5, 2.0]), (VariableSelection(), [0.5, 4.0, 8.0])],
)
def test_the_energy_is_dissipated_at_the_rate_of_a_gradient_flow(case, times):
    start = quadrature(case.initial(), 32 if case is FIGURE_1 or case is FIGURE_3 else 8)
    lost, rate = dissipated(case, np.array(times), start)
    assert (rate > 1e-4).all()
    np.testing.assert_allclose(lost, rate, rtol=0, atol=1e-6)
    # The flow of R, twice F, would lose four times as much of it.
    assert (abs(2 * lost - rate) > 1e-5).all()


def test_monotone_activation_learns():
    result = characteristics(FIGURE_1, np.linspace(0, 12, 13), start=quadrature(FIGURE_1.initial(), 24))
    assert (np.diff(result.energy.values) < 0).all()
    assert 2 * result.energy.values[-1] < 0.6 < 1.5 < 2 * result.energy.values[0]
    assert result.position.min() > 0


def test_non_monotone_activation_learns_from_large_weights_and_dies_from_small_ones():
    times = [0.0, 0.01, 0.02, 0.03, 1.0, 20.0]
    dying = replace(FIGURE_3, scale=0.1)
    success, failure = (characteristics(c, times, start=quadrature(c.initial(), 16)) for c in (FIGURE_3, dying))
    assert 2 * success.energy.values[-1] < 0.05
    assert success.position.values[-1].min() > 1
    # All norms reach 0 in finite time and stay: f = σ(0) = -2.5, R = ½(3.5² + 1.5²).
    assert (failure.position.values[-2:] == 0).all()
    assert failure.position.min() == 0
    assert 2 * failure.energy.values[-1] == pytest.approx(7.25, abs=1e-12)
    reached = (failure.position.values[:, 0, :, 0] == 0).sum(-1)
    assert (np.diff(reached) >= 0).all()
    assert 0 < reached[2] < 16
    for result in (success, failure):
        assert (np.diff(result.energy.values) <= 1e-12).all()


def test_zero_is_where_the_norms_are_held_although_the_force_points_outwards():
    x = torch.zeros(3, 1, dtype=FLOAT64)
    mu = EmpiricalMeasure(x)
    case = FIGURE_3
    assert (case.drift(0.0, x, mu) < -1).all()
    assert (case.project(x + case.drift(0.0, x, mu)) == 0).all()
    # Where all knots are to the right of 0 nothing moves there.
    assert (FIGURE_1.drift(0.0, x, mu) == 0).all()
    assert FIGURE_1.drift(0.0, x.float(), EmpiricalMeasure(x.float())).isfinite().all()


def test_many_particles_follow_the_radial_limit():
    """N = 800 by Euler from the same quantiles: h and 1/N apart."""
    case = replace(FIGURE_1, data_dim=None, scale=0.8)
    start = NormOfGaussian(0.8, 40)
    limit = characteristics(case, [1.0], start=start, n_nodes=64)
    u = (torch.arange(800, dtype=FLOAT64)[:, None] + 0.5) / 800
    x = start.quantile(u)
    for _ in range(200):
        x = case.project(x + 0.005 * case.drift(0.0, x, EmpiricalMeasure(x)))
    assert abs(x.mean().item() - limit["mean"].item()) < 2e-3


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"delta": 1.0}, r"delta = 1.0; expected 0 <= Δ < 1"),
        ({"delta": -0.1}, r"delta = -0.1; expected 0 <= Δ < 1"),
        ({"data_dim": 1}, r"data_dim = 1; expected d >= 2, or None for d = ∞"),
        ({"scale": 0.0}, r"scale = 0.0; expected κ > 0"),
        ({"knots": (1.5, 0.5)}, "expected increasing knots, one jump for each"),
        ({"knots": (0.5,)}, "expected increasing knots, one jump for each"),
    ],
)
def test_impossible_isotropic_gaussians_are_refused(wrong, what):
    with pytest.raises(ValueError, match=what):
        replace(FIGURE_1, **wrong)
    assert isinstance(replace(FIGURE_1, data_dim=None).initial(), Dirac)


# Variable selection ---------------------------------------------------------------------------------------------------


def test_the_variable_selection_drift_is_minus_the_intrinsic_derivative_of_its_energy():
    case = VariableSelection(delta=0.6)
    x = normals(2, 9, 4)
    x = torch.cat([x[..., :2], x[..., 2:].abs() + 0.05], -1)
    elsewhere = torch.cat([normals(2, 5, 2, seed=2), normals(2, 5, 2, seed=3).abs() + 0.05], -1)
    for weights in (None, torch.softmax(normals(2, 9, seed=1), -1)):
        assert drives_downhill(case, case.energy, x, weights=weights)
        assert drives_downhill(case, case.energy, x, elsewhere, weights)
        for wrong in (2 * case.energy, -case.energy, replace(case, delta=0.7).energy):
            assert not drives_downhill(case, wrong, x, weights=weights)


def test_the_values_of_the_network_are_those_of_the_full_problem():
    """E [f(x) | y] = ∫ E a max(⟨w, x⟩ + b, 0) dm in R^20 with 6 relevant coordinates, within four standard errors."""
    rng, n, d, relevant = np.random.default_rng(0), 200_000, 20, 6
    case = VariableSelection(delta=0.5, initial_a=0.7, initial_b=-0.3)
    points = np.array([[1.0, 0.3, 0.8, 0.5], [-0.7, -0.4, 0.2, 1.1], [1.5, -1.0, 1.4, 0.0]])
    weights = np.array([0.5, 0.3, 0.2])
    chosen = points[rng.choice(3, n, p=weights)]
    w = rng.standard_normal((n, d))
    for k, part in enumerate((w[:, :relevant], w[:, relevant:])):
        part *= (chosen[:, 2 + k] / np.linalg.norm(part, axis=1))[:, None]
    residuals, errors = [], []
    for y in (1, -1):
        x = rng.standard_normal((n, d))
        x[:, :relevant] *= 1 + y * case.delta
        values = chosen[:, 0] * np.maximum((w * x).sum(1) + chosen[:, 1], 0)
        residuals.append(y - values.mean())
        errors.append(values.std() / math.sqrt(n))
    sampled = 0.5 * sum(e**2 for e in residuals)
    error = math.hypot(*(e * s for e, s in zip(residuals, errors, strict=True)))
    mu = EmpiricalMeasure(torch.tensor(points), torch.tensor(weights))
    assert abs(case.risk(mu).item() - sampled) < 4 * error
    assert abs(case.energy(mu).item() - 0.5 * sampled) < 4 * error
    assert abs(replace(case, delta=0.55).risk(mu).item() - sampled) > 4 * error


def test_variable_selection_learns_and_selects():
    result = characteristics(VariableSelection(), np.linspace(0, 20, 11), n_nodes=12)
    risk = 2 * result.energy.values
    assert risk[0] == pytest.approx(1, abs=0.01)
    assert (np.diff(risk) < 0).all()
    assert risk[-1] < 1e-4
    first, last = (result["mean"].values[k, 2:] for k in (0, -1))
    np.testing.assert_allclose(first, [0.8 * 0.1875**0.5, 0.8 * 0.8125**0.5], atol=1e-12)
    assert last[0] > 2 * first[0]
    assert last[1] < first[1]
    assert (result.position.isel(component=slice(2, None)) >= 0).all()


def test_the_clock_takes_the_step_sizes_away():
    """θ' = -t^{-1/4} D_mF, followed from t₀ > 0 on, is the flow at `clock(t)`."""
    case = VariableSelection()
    for t in (0.3, 2.0):
        h = 1e-5
        assert (case.clock(t + h) - case.clock(t - h)) / (2 * h) == pytest.approx(t**-0.25, rel=1e-8)
    assert case.clock(0.0) == 0
    start = quadrature(case.initial(), 8)
    early, late = characteristics(case, [case.clock(0.1), case.clock(3.0)], start=start).position.values[:, 0]

    def slope(t: float, y: np.ndarray, sign: float = 1.0) -> np.ndarray:
        x = torch.from_numpy(y.reshape(early.shape))
        return sign * t**-0.25 * case.drift(t, x, EmpiricalMeasure(x, start.weights)).numpy().ravel()

    found = solve_ivp(slope, (0.1, 3.0), early.ravel(), method="DOP853", rtol=1e-9, atol=1e-11).y[:, -1]
    np.testing.assert_allclose(found.reshape(late.shape), late, rtol=0, atol=1e-7)
    (other,) = characteristics(replace(case, decay=0.0), [3.0], start=start).position.values[:, 0]
    assert abs(other - late).max() > 1e-2


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"delta": 1.0}, "delta = 1.0; expected 0 <= delta < 1"),
        ({"share": 0.0}, "share = 0.0; expected 0 < share < 1"),
        ({"decay": 1.0}, "decay = 1.0; expected 0 <= decay < 1"),
        ({"scale": 0.0}, "scale = 0.0, initial_variance = 1.0; expected κ > 0"),
        ({"initial_variance": -1.0}, "and a variance >= 0"),
    ],
)
def test_impossible_variable_selection_is_refused(wrong, what):
    with pytest.raises(ValueError, match=what):
        replace(VariableSelection(), **wrong)


# Kuramoto -------------------------------------------------------------------------------------------------------------

OSCILLATORS = Kuramoto(coupling=1.7, sigma=0.8)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_kuramoto_drift_is_its_pairwise_formula_and_that_of_its_energy(weighted):
    x, w = 3 * normals(2, 6, 1), torch.softmax(normals(2, 6, seed=1), -1)
    mu = EmpiricalMeasure(x, w if weighted else None)
    pairs = torch.sin(x[:, None, :, 0] - x[:, :, None, 0])
    expected = 1.7 * (pairs * mu.weights[:, None]).sum(-1, keepdim=True)
    torch.testing.assert_close(OSCILLATORS.drift(0.0, x, mu), expected, rtol=0, atol=1e-12)
    assert not torch.allclose(OSCILLATORS.drift(0.0, x, mu), -expected, rtol=0, atol=1e-3)
    assert drives_downhill(OSCILLATORS, OSCILLATORS.energy, x, weights=w if weighted else None)
    assert not drives_downhill(OSCILLATORS, 2 * OSCILLATORS.energy, x)
    mean_cosine = (torch.cos(x[:, None, :, 0] - x[:, :, None, 0]) * mu.weights[:, None] * mu.weights[..., None]).sum(
        (1, 2)
    )
    torch.testing.assert_close(OSCILLATORS.energy(mu), -0.85 * mean_cosine, rtol=0, atol=1e-12)
    torch.testing.assert_close(OSCILLATORS.order(mu), mean_cosine.sqrt(), rtol=0, atol=1e-12)


def test_kuramoto_lives_on_the_circle():
    x = 10 * normals(4, 5, 1)
    mu, wrapped = EmpiricalMeasure(x), EmpiricalMeasure(OSCILLATORS.project(x))
    assert ((wrapped.points >= 0) & (wrapped.points < 2 * math.pi)).all()
    drifts = OSCILLATORS.drift(0.0, x, mu), OSCILLATORS.drift(0.0, wrapped.points, wrapped)
    torch.testing.assert_close(*drifts, rtol=0, atol=1e-12)
    assert OSCILLATORS.period == pytest.approx(2 * math.pi)


@pytest.mark.parametrize("coupling", [2.0, 1.2])
def test_above_the_critical_coupling_the_synchronous_law_is_stationary(coupling):
    """M ∝ e^{2Kr cos θ/σ²} with r = I₁/I₀(2Kr/σ²): the flux b m - (σ²/2) m' vanishes."""
    case = replace(OSCILLATORS, coupling=coupling, sigma=1.0)
    r = 1.0
    for _ in range(2000):
        r = iv(1, 2 * coupling * r) / iv(0, 2 * coupling * r)
    assert r > 0.3
    x = torch.arange(64, dtype=FLOAT64)[:, None] * 2 * math.pi / 64

    def flux(concentration: float) -> float:
        density = torch.exp(concentration * torch.cos(x[:, 0]))
        mu = EmpiricalMeasure(x, density / density.sum())
        score = -concentration * torch.sin(x)
        return (case.drift(0.0, x, mu) - 0.5 * case.sigma**2 * score).abs().max().item()

    assert flux(2 * coupling * r) < 1e-12
    assert flux(coupling * r) > 1e-2
    assert flux(0.0) < 1e-12  # the uniform law always is


@pytest.mark.parametrize(("coupling", "synchronous"), [(1.1, True), (0.9, False)])
def test_the_critical_coupling_is_the_square_of_sigma(coupling, synchronous):
    """D/dt r = ½ (K - σ²) r near the uniform law: its linearisation along cos θ."""
    case = replace(OSCILLATORS, coupling=coupling, sigma=1.0)
    x, small = torch.arange(64, dtype=FLOAT64)[:, None] * 2 * math.pi / 64, 1e-6
    mu = EmpiricalMeasure(x, (1 + 2 * small * torch.cos(x[:, 0])) / 64)
    b = case.drift(0.0, x, mu)
    # d/dt E cos θ = -E b sin θ - (σ²/2) E cos θ.
    rate = -(mu.weights * (b * torch.sin(x) + 0.5 * torch.cos(x))[:, 0]).sum().item() / small
    assert rate == pytest.approx(0.5 * (coupling - 1.0), abs=1e-6)
    assert (rate > 0) == synchronous


def test_frozen_fields_are_all_there_is():
    for cls in (GaussianLangevin, IsotropicGaussians, Kuramoto, VariableSelection):
        with pytest.raises(dataclasses.FrozenInstanceError):
            cls().sigma = 3.0
