"""Closed moment equations against formulas, and the refusal of equations that do not close."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad, solve_ivp
from scipy.linalg import expm
from torch import Tensor

import mfsde
from mfsde import Dirac, EmpiricalMeasure, Gaussian, Mixture, Uniform
from mfsde.limit import gaussian_limit, moments
from mfsde.limit.moments import Closure
from mfsde.scenarios import DoubleWell, GaussianLangevin, Kuramoto, MeanFieldOU

FLOAT64 = torch.float64


@dataclass(frozen=True)
class Equation:
    """dX = b(t, X, m) dt + σ(t, X, m) dW from given functions."""

    b: Callable[..., Any]
    a: Callable[..., Any] = lambda t, x, mu: 0.5
    law: Any = dataclasses.field(default_factory=lambda: Gaussian([1.0], [[0.3]]))

    def drift(self, t, x, mu):
        return self.b(t, x, mu)

    def diffusion(self, t, x, mu):
        return self.a(t, x, mu)

    def initial(self):
        return self.law


def found(scenario, t) -> tuple[np.ndarray, np.ndarray]:
    result = moments(scenario, np.atleast_1d(t))
    return result["mean"].values, result["covariance"].values


# Known solutions ------------------------------------------------------------------------------------------------------

# dX = [-0.7 X - 1.3 (X - E X)] dt + 0.9 dW, X₀ ~ N(1.5, 0.4): t, mean, variance.
OU = MeanFieldOU(kappa=0.7, coupling=1.3, sigma=0.9, initial_mean=(1.5,), initial_variance=0.4)
LINEAR_QUADRATIC = np.array(
    [
        (0.25, 1.2591855311538112, 0.2751561896313599),
        (0.5, 1.0570321345780702, 0.22922871843923104),
        (1.0, 0.7448779556871143, 0.206117338680525),
        (2.0, 0.36989544591240975, 0.20256625386901075),
        (4.0, 0.09121509393782695, 0.20250002222569702),
    ]
)
# Mean-field Langevin, κ = 0.3, a = 1, k = 4, σ = 1, from N(2, ½).
LANGEVIN = GaussianLangevin(0.3, (1.0,), 4.0, 1.0, (2.0,), 0.5)
MEAN_FIELD_LANGEVIN = np.array(
    [
        (0.1, 1.6158671698975375, 0.41758001150890983),
        (0.25, 1.182448232986917, 0.3419698602928606),
        (0.5, 0.7224078731869257, 0.2838338208091532),
        (1.0, 0.31787522956872005, 0.25457890972218356),
        (2.0, 0.14922734508779323, 0.2500838656569756),
    ]
)


@pytest.mark.parametrize(("case", "table"), [(OU, LINEAR_QUADRATIC), (LANGEVIN, MEAN_FIELD_LANGEVIN)])
def test_gaussian_models_have_the_tabled_moments(case, table):
    def error(scenario: Any) -> float:
        mean, cov = found(scenario, table[:, 0])
        return max(abs(mean[:, 0] - table[:, 1]).max(), abs(cov[:, 0, 0] - table[:, 2]).max())

    assert error(case) < 1e-11
    for name in ("sigma", "kappa", "initial_variance"):
        assert error(dataclasses.replace(case, **{name: 1.01 * getattr(case, name)})) > 1e-4


def test_the_drift_of_the_energy_gives_the_same_moments():
    class Derived(GaussianLangevin):
        drift = mfsde.MeanFieldLangevin.drift

    mean, cov = found(Derived(), MEAN_FIELD_LANGEVIN[:, 0])
    np.testing.assert_allclose(mean[:, 0], MEAN_FIELD_LANGEVIN[:, 1], rtol=0, atol=1e-11)
    np.testing.assert_allclose(cov[:, 0, 0], MEAN_FIELD_LANGEVIN[:, 2], rtol=0, atol=1e-11)


A = np.array([[-0.5, 1.1, 0.0], [-0.7, -0.2, 0.4], [0.3, -0.6, -1.0]])
B = np.array([[0.0, 0.2, 0.0], [0.1, 0.0, -0.3], [0.0, 0.0, 0.5]])
ROOT = np.array([[0.5, 0.0], [0.2, 0.3], [-0.1, 0.4]])
START = Gaussian([1.0, -0.5, 0.2], [[0.5, 0.1, 0.0], [0.1, 0.3, -0.05], [0.0, -0.05, 0.2]])
TILTED = Equation(
    lambda t, x, mu: x @ x.new_tensor(A).T + mu.mean() @ x.new_tensor(B).T + 0.7,
    lambda t, x, mu: x.new_tensor(ROOT)[None, None],
    START,
)


def van_loan(matrix: np.ndarray, noise: np.ndarray, cov: np.ndarray, t: float) -> np.ndarray:
    """e^{At} C e^{Aᵀt} + ∫₀ᵗ e^{As} Q e^{Aᵀs} ds, from one exponential of a block matrix."""
    d = len(matrix)
    blocks = expm(t * np.block([[-matrix, noise], [np.zeros((d, d)), matrix.T]]))
    forward = blocks[d:, d:].T
    return forward @ cov @ forward.T + forward @ blocks[:d, d:]


def test_three_dimensions_with_a_matrix_that_is_not_symmetric():
    times = np.array([0.3, 1.0, 2.5])
    mean, cov = found(TILTED, times)
    for k, t in enumerate(times):
        affine = expm(t * np.block([[A + B, np.full((3, 1), 0.7)], [np.zeros((1, 4))]]))
        expected = (affine @ [*START.mean.tolist(), 1.0])[:3]
        np.testing.assert_allclose(mean[k], expected, rtol=0, atol=1e-11)
        np.testing.assert_allclose(cov[k], van_loan(A, ROOT @ ROOT.T, START.cov.numpy(), t), rtol=0, atol=1e-11)
        # The mean's own drift does not act on the fluctuations, and A is not Aᵀ.
        for wrong in (A + B, A.T):
            assert abs(cov[k] - van_loan(wrong, ROOT @ ROOT.T, START.cov.numpy(), t)).max() > 1e-3


@pytest.mark.parametrize("d", [1, 2, 4, 12])
def test_the_ou_process_in_every_dimension(d):
    case = MeanFieldOU(initial_mean=tuple(np.linspace(-1, 2, d)), initial_variance=0.2)
    result = moments(case, [0.0, 0.7, 3.0])
    for k, t in enumerate(result.time.values):
        np.testing.assert_allclose(result["mean"].values[k], case.limit(t).mean, rtol=0, atol=1e-11)
        np.testing.assert_allclose(result["covariance"].values[k], case.limit(t).cov, rtol=0, atol=1e-11)
    assert result.residual.max() < 1e-14


def test_coefficients_that_depend_on_time_and_on_the_mean():
    # m = m₀ e^{sin t}, v' = 2 cos t v + m².
    case = Equation(lambda t, x, mu: math.cos(t) * x, lambda t, x, mu: mu.mean().expand_as(x))
    times = np.array([0.5, 2.0, 5.0])
    mean, cov = found(case, times)
    for k, t in enumerate(times):
        assert mean[k, 0] == pytest.approx(math.exp(math.sin(t)), abs=1e-11)
        # v e^{-2 sin t} grows at rate m² e^{-2 sin t} = m₀² = 1.
        assert cov[k, 0, 0] == pytest.approx((0.3 + t) * math.exp(2 * math.sin(t)), abs=1e-10)


def test_a_law_that_acts_by_more_than_its_moments_is_integrated_where_it_is_gaussian():
    case = Equation(lambda t, x, mu: mu.integrate(torch.tanh).unsqueeze(-2) - x)

    def slope(t, y):
        def weighted(z):
            return math.tanh(y[0] + math.sqrt(y[1]) * z) * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)

        return [quad(weighted, -12, 12, epsabs=1e-12)[0] - y[0], 0.25 - 2 * y[1]]

    expected = solve_ivp(slope, (0, 2.0), [1.0, 0.3], method="DOP853", rtol=1e-11, atol=1e-12).y[:, -1]
    mean, cov = found(case, 2.0)
    assert [mean[0, 0], cov[0, 0, 0]] == pytest.approx(list(expected), abs=1e-9)
    # From a uniform law of the same moments the equations do not close.
    half = math.sqrt(3 * 0.3)
    with pytest.raises(ValueError, match="drift depends on more of the law than mean and covariance"):
        moments(dataclasses.replace(case, law=Uniform(1 - half, 1 + half)), [2.0])


# Noise that depends on the state --------------------------------------------------------------------------------------


def geometric(law: Any = None) -> Equation:
    """dX = (0.05 X + 0.3 E X) dt + 0.4 X dW."""
    return Equation(
        lambda t, x, mu: 0.05 * x + 0.3 * mu.mean(), lambda t, x, mu: 0.4 * x, Dirac(2.0) if law is None else law
    )


def second_moment(t: float, start: float, square: float) -> float:
    """E X² of the above: s' = (2·0.05 + 0.16) s + 2·0.3 m², m = m₀ e^{0.35 t}."""
    rate = 0.26
    return math.exp(rate * t) * (start + 0.6 * square * math.expm1((0.7 - rate) * t) / (0.7 - rate))


@pytest.mark.parametrize("law", [Dirac(2.0), Gaussian([2.0], [[0.5]]), Uniform(1.0, 3.0)])
def test_geometric_brownian_motion_with_a_mean_field(law):
    mean, cov = found(geometric(law), [0.5, 1.0, 3.0])
    start = 4.0 + law.cov.item()
    for k, t in enumerate([0.5, 1.0, 3.0]):
        assert mean[k, 0] == pytest.approx(2 * math.exp(0.35 * t), rel=1e-11)
        assert cov[k, 0, 0] + mean[k, 0] ** 2 == pytest.approx(second_moment(t, start, 4.0), rel=1e-11)


def test_without_the_mean_of_the_noise_it_would_not_hold(monkeypatch):
    def dropped(self, t, y, law):
        return np.zeros((self.dim, self.dim))

    def at_the_mean(self, t, y, law):
        return self.coefficients.covariance(t, y[None, : self.dim], law)[0][None]

    for fault in (dropped, at_the_mean):
        monkeypatch.setattr(Closure, "_mean_noise", fault)
        mean, cov = found(geometric(), 1.0)
        assert abs(cov[0, 0, 0] + mean[0, 0] ** 2 - second_moment(1.0, 4.0, 4.0)) > 1e-2


def test_a_correlated_basket():
    """E X_i X_j = x_i x_j exp((μ_i + μ_j + (σσᵀ)_ij) t)."""
    mu_, sigma = np.array([0.05, -0.1, 0.2]), np.array([[0.2, 0.0], [0.1, 0.3], [-0.2, 0.15]])
    case = Equation(
        lambda t, x, mu: x.new_tensor(mu_) * x,
        lambda t, x, mu: x.unsqueeze(-1) * x.new_tensor(sigma),
        Dirac([1.0, 2.0, 0.5]),
    )
    x, (mean, cov) = np.array([1.0, 2.0, 0.5]), found(case, 1.5)
    drift = mu_[:, None] + mu_
    product = cov[0] + np.outer(mean[0], mean[0])
    np.testing.assert_allclose(product, np.outer(x, x) * np.exp(1.5 * (drift + sigma @ sigma.T)), rtol=1e-11)
    assert abs(product / (np.outer(x, x) * np.exp(1.5 * drift)) - 1).max() > 0.05


# The law as a function of time ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WithLimit(MeanFieldOU):
    @cached_property
    def _flow(self) -> Callable[[float], Gaussian]:
        return gaussian_limit(self)

    def limit(self, t: float) -> Gaussian:
        return self._flow(t)


TIMES = (0.0, 1e-3, 0.4, 1.0, 1.7, 6.0, 9.5)


def test_the_limit_of_a_scenario_that_has_no_formula():
    case = WithLimit(kappa=0.7, coupling=1.3, initial_mean=(1.5, -1.0))
    for t in TIMES:
        formula = MeanFieldOU.limit(case, t)
        torch.testing.assert_close(case.limit(t).mean, formula.mean, rtol=0, atol=1e-10)
        torch.testing.assert_close(case.limit(t).cov, formula.cov, rtol=0, atol=1e-10)


@pytest.mark.parametrize("horizon", [None, 0.3, 20.0])
def test_a_law_does_not_depend_on_what_was_asked_for_before(horizon):
    forwards, backwards = gaussian_limit(OU, horizon), gaussian_limit(OU, horizon)
    later = [backwards(t) for t in reversed(TIMES)][::-1]
    for t, law in zip(TIMES, later, strict=True):
        assert torch.equal(forwards(t).mean, law.mean)
        assert torch.equal(forwards(t).cov, law.cov)
        assert abs(law.cov.item() - OU.limit(t).cov.item()) < 1e-10


def test_a_point_becomes_a_gaussian():
    case = dataclasses.replace(TILTED, law=Dirac([1.0, 0.0, 0.0]))
    law = gaussian_limit(case)
    assert law(0.0).cov.abs().max() == 0
    np.testing.assert_allclose(law(0.8).cov, van_loan(A, ROOT @ ROOT.T, np.zeros((3, 3)), 0.8), rtol=0, atol=1e-10)


def test_a_limit_that_is_not_gaussian_is_refused():
    with pytest.raises(ValueError, match="the limit is not Gaussian, since σσᵀ depends on x"):
        gaussian_limit(geometric())
    uniform = Equation(lambda t, x, mu: -x, law=Uniform(0.0, 1.0))
    with pytest.raises(ValueError, match="the limit is not Gaussian, since the initial law is not Gaussian"):
        gaussian_limit(uniform)
    assert found(uniform, 1.0)[0][0, 0] == pytest.approx(0.5 * math.exp(-1), abs=1e-12)
    for t in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="the limit starts at t = 0"):
            gaussian_limit(OU)(t)
    with pytest.raises(ValueError, match="horizon = 0; expected a positive time"):
        gaussian_limit(OU, 0)


# What does not close --------------------------------------------------------------------------------------------------

SQUARE = Equation(lambda t, x, mu: x, lambda t, x, mu: (1 + (x - 1) ** 4).sqrt())
CLOSES_LATER = Equation(lambda t, x, mu: -x + max(0.0, t - 1) * torch.tanh(x))


@pytest.mark.parametrize(
    ("case", "what"),
    [
        (DoubleWell(), "drift is not affine in x"),
        (Equation(lambda t, x, mu: -x + 1e-6 * torch.sin(x)), "drift is not affine in x"),
        (Equation(lambda t, x, mu: -x + 0.1 * (x - 1) ** 2), "drift is not affine in x"),
        (Equation(lambda t, x, mu: x * x.flip(-1), law=Gaussian([0.0, 0.0], 1.0)), "drift is not affine in x"),
        (Equation(lambda t, x, mu: -x + mu.convolve(torch.sin, x)), "drift is not affine in x"),
        (CLOSES_LATER, "drift is not affine in x"),
        (SQUARE, "σσᵀ is no polynomial of degree two in x"),
        (
            Equation(lambda t, x, mu: -x, lambda t, x, mu: 1 + max(0.0, t - 1) * x),
            "diffusion depends on x, as it does not at the start",
        ),
        (
            Equation(lambda t, x, mu: -x, lambda t, x, mu: x * mu.integrate(torch.cos).unsqueeze(-2)),
            "diffusion depends on more of the law than mean and covariance",
        ),
        (
            Equation(lambda t, x, mu: mu.integrate(lambda y: y**3).unsqueeze(-2) - x, law=Gaussian([0.1] * 3, 1.0)),
            "drift depends on more of the law than mean and covariance",
        ),
    ],
)
def test_equations_that_do_not_close_are_refused_with_the_residual(case, what):
    with pytest.raises(ValueError, match=rf"moment equations do not close: {what} \(residual .*fokker_planck") as info:
        moments(case, [2.0])
    assert float(str(info.value).split("residual ")[1].split(")")[0]) > 1e-8


def test_equations_of_second_moments_close():
    """b = -Var(X) x: m' = -v m, v' = -2v² + σ², a Riccati equation."""
    case = Equation(lambda t, x, mu: -mu.covariance() * x, law=Mixture([Dirac(1.0), Dirac(3.0)]))
    mean, cov = found(case, 1.0)
    # v = c (1 + q)/(1 - q), c = σ/√2, q = (v₀ - c)/(v₀ + c) e^{-4ct}, v₀ = 1.
    c = 0.5 / math.sqrt(2)
    q = (1 - c) / (1 + c) * math.exp(-4 * c)
    assert cov[0, 0, 0] == pytest.approx(c * (1 + q) / (1 - q), abs=1e-11)
    # ∫v = ct + ½ log((1 - q)/(1 - q₀)) e^{...}: from d log(1 - q) = 4c q/(1 - q) dt and v = c + 2c q/(1 - q).
    integral = c + 0.5 * math.log((1 - q) / (1 - (1 - c) / (1 + c)))
    assert mean[0, 0] == pytest.approx(2 * math.exp(-integral), abs=1e-11)


def with_methods(**methods: Any) -> Any:
    return type("Special", (MeanFieldOU,), methods)()


@pytest.mark.parametrize(
    ("case", "what"),
    [
        (with_methods(common_diffusion=lambda self, t, x, mu: 0.1), "has common noise, under which the law is random"),
        (with_methods(project=lambda self, x: x.clamp(min=0)), "has a domain"),
        (Kuramoto(), "has a domain"),
        (with_methods(period=1.0), "has a torus"),
    ],
)
def test_other_geometries_are_refused(case, what):
    for call in (lambda: moments(case, [1.0]), lambda: gaussian_limit(case)):
        with pytest.raises(ValueError, match=what):
            call()


@pytest.mark.parametrize("times", [[], [1.0, 0.5], [-1.0], [0.0, 0.0], [math.nan], [[1.0]]])
def test_times_that_are_no_times_are_refused(times):
    with pytest.raises(ValueError, match="expected increasing finite numbers from 0 on"):
        moments(OU, times)
    with pytest.raises(TypeError, match="expected increasing numbers"):
        moments(OU, ["soon"])


def test_moments_that_blow_up_say_when():
    # m' = m³ + ..., infinite before t = 1.
    case = Equation(lambda t, x, mu: x * mu.integrate(torch.square).unsqueeze(-2))
    with pytest.raises(RuntimeError, match=r"the moments leave every bound between t = .* Ask for earlier times"):
        moments(case, [0.1, 5.0])
    assert moments(case, [0.1])["mean"].item() > 1


# The dataset ----------------------------------------------------------------------------------------------------------


def test_the_result_is_labelled_and_has_its_energy(tmp_path):
    result = moments(LANGEVIN, [0.0, 0.5], store=tmp_path / "m.zarr")
    assert result["mean"].dims == ("time", "component")
    assert result["covariance"].dims == ("time", "component", "component_2")
    assert result.attrs["method"] == "moments"
    assert float(result.kappa) == 0.3
    for k, t in enumerate([0.0, 0.5]):
        assert result.energy.values[k] == pytest.approx(0.15 * (LANGEVIN.limit(t).mean.item() - 1) ** 2, abs=1e-12)
    again = mfsde.open_run(tmp_path / "m.zarr")
    assert (again["mean"].values == moments(LANGEVIN, [0.0, 0.5])["mean"].values).all()
    with pytest.raises(FileExistsError):
        moments(LANGEVIN, [0.5], store=tmp_path / "m.zarr")


def test_the_energy_is_left_out_where_the_moments_do_not_know_it():
    class Quartic(Equation):
        energy = mfsde.potential(lambda x: x[..., 0] ** 4)

    class Quadratic(Equation):
        energy = mfsde.potential(lambda x: x[..., 0] ** 2)

    def drift(t: float, x: Any, mu: Any) -> Any:
        return -x

    # E X⁴ = m⁴ + 6m²v + 3v² of a Gaussian.
    m, v = math.exp(-1), 0.3 * math.exp(-2) + 0.125 * (1 - math.exp(-2))
    known = moments(Quartic(drift), [1.0]).energy.item()
    assert known == pytest.approx(m**4 + 6 * m**2 * v + 3 * v**2, abs=1e-11)
    assert "energy" not in moments(Quartic(drift, law=Uniform(0.0, 1.0)), [1.0])
    assert "energy" not in moments(Quartic(drift, law=Gaussian([1.0] * 3, 0.3)), [1.0])
    assert moments(Quadratic(drift, law=Uniform(0.0, 1.0)), [0.0]).energy.item() == pytest.approx(1 / 3, abs=1e-12)


def test_a_measure_of_points_is_a_start():
    points = torch.tensor([[0.0], [1.0], [5.0]])
    weights = torch.tensor([0.2, 0.5, 0.3])
    mean, cov = found(Equation(lambda t, x, mu: -x, law=EmpiricalMeasure(points, weights)), 1.0)
    assert mean[0, 0] == pytest.approx(2.0 * math.exp(-1), abs=1e-7)
    start = 0.5 + 7.5 - 4.0
    assert cov[0, 0, 0] == pytest.approx(start * math.exp(-2) + 0.125 * (1 - math.exp(-2)), abs=1e-6)


def test_tensors_are_float64_whatever_the_scenario_holds():
    @dataclass(frozen=True)
    class Held(MeanFieldOU):
        matrix: Tensor = dataclasses.field(default_factory=lambda: -torch.eye(1))

        def drift(self, t, x, mu):
            return x @ self.matrix

    assert found(Held(), 1.0)[0][0, 0] == pytest.approx(math.exp(-1), abs=1e-12)
