"""Scenarios against the formulas they are named after, and the data sets they bring."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

import mfsde.scenarios
from mfsde import EmpiricalMeasure
from mfsde.model import Equation
from mfsde.observables import evaluate, resolve
from mfsde.scenarios import BUILT_IN, DoubleWell, MeanFieldOU, TwoLayerNetwork
from mfsde.scenarios.datasets import load
from mfsde.settings import Settings

FLOAT64 = torch.float64
SCENARIOS = {name: getattr(mfsde.scenarios, name) for name in BUILT_IN}
# Diffusions that are no number.
FORMS = {
    **dict.fromkeys(["MeanFieldGBM", "CuckerSmale", "TwoPopulations", "ConsensusBased"], "diagonal"),
    **dict.fromkeys(["CorrelatedLinear", "KineticDoubleWell", "BlackScholes"], "general"),
}
every_scenario = pytest.mark.parametrize("cls", SCENARIOS.values(), ids=SCENARIOS)


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def starts(case, *lead: int, n: int = 6) -> Tensor:
    law = case.initial()
    return law.from_variates(normals(*lead, n, law.n_variates))


# All of them ----------------------------------------------------------------------------------------------------------


@every_scenario
def test_a_built_in_scenario_is_a_frozen_dataclass_that_passes_the_door(cls):
    case = cls()
    x = starts(case, 2)
    equation = Equation(case, x)
    assert equation.name == cls.__name__
    assert equation.form == FORMS.get(cls.__name__, "number")
    with pytest.raises(dataclasses.FrozenInstanceError):
        case.sigma = 3.0
    single = x.float()
    torch.testing.assert_close(
        Equation(case, single).drift(0.0, single, EmpiricalMeasure(single)).double(),
        equation.drift(0.0, x, EmpiricalMeasure(x)),
        rtol=1e-3,
        atol=1e-4,
    )


@every_scenario
def test_suggested_settings_are_accepted(cls):
    suggested = cls().suggested()
    observables = resolve(cls(), suggested.pop("observables", ()))
    x = starts(cls(), 2, n=2 * cls().initial().dim + 2)
    assert all(len(evaluate(o, Equation(cls(), x), 0.0, x)) == 2 for o in observables)
    none = dict.fromkeys(["keep_particles", "noise", "checkpoint_every"])
    own = {"method": "euler", "device": "cpu", "dtype": torch.float32, **suggested}
    settings = Settings.checked(**none, **own)
    assert settings.n_steps * settings.dt == pytest.approx(settings.horizon)


@every_scenario
def test_every_parameter_can_be_replaced(cls):
    for field in dataclasses.fields(cls):
        if field.type == "float":
            changed = dataclasses.replace(cls(), **{field.name: 0.123})
            assert getattr(changed, field.name) == 0.123


@pytest.mark.parametrize("cls", [MeanFieldOU, DoubleWell])
def test_the_number_of_initial_means_is_the_dimension(cls):
    case = cls(initial_mean=(1.0, -2.0, 0.5), initial_variance=0.3)
    assert case.initial().mean.tolist() == [1.0, -2.0, 0.5]
    torch.testing.assert_close(case.initial().cov, 0.3 * torch.eye(3, dtype=FLOAT64))
    assert Equation(case, starts(case, 2)).n_channels == 3


def test_an_unknown_scenario_is_refused_with_the_known_ones():
    with pytest.raises(AttributeError, match="no attribute 'Hegselmann'; scenarios: MeanFieldOU, DoubleWell"):
        _ = mfsde.scenarios.Hegselmann


# Mean-field Ornstein-Uhlenbeck ----------------------------------------------------------------------------------------

OU = MeanFieldOU(kappa=0.7, coupling=1.3, sigma=0.9, initial_mean=(1.5,), initial_variance=0.4)

# t, mean, variance, W₂ to equilibrium of dX = [-0.7 X - 1.3 (X - E X)] dt + 0.9 dW, X₀ ~ N(1.5, 0.4), from quadrature.
LINEAR_QUADRATIC = [
    (0.25, 1.2591855311538112, 0.2751561896313599, 1.2613906611252654),
    (0.5, 1.0570321345780702, 0.22922871843923104, 1.0574238164336496),
    (1.0, 0.7448779556871143, 0.206117338680525, 0.7448887035425569),
    (2.0, 0.36989544591240975, 0.20256625386901075, 0.3698954532365635),
    (4.0, 0.09121509393782695, 0.20250002222569702, 0.0912150939378303),
]


@pytest.mark.parametrize(("t", "mean", "variance", "distance"), LINEAR_QUADRATIC)
def test_the_ou_limit_is_the_known_gaussian(t, mean, variance, distance):
    law = OU.limit(t)
    assert law.mean.item() == pytest.approx(mean, abs=1e-13)
    assert law.cov.item() == pytest.approx(variance, abs=1e-13)
    to_equilibrium = math.hypot(law.mean.item(), math.sqrt(law.cov.item()) - math.sqrt(0.2025))
    assert to_equilibrium == pytest.approx(distance, abs=1e-13)


def moment_residuals(case: MeanFieldOU, limit, t: float) -> tuple[float, float]:
    """d/dt E X - E b and d/dt Var X - 2 Cov(X, b) - σ², from the scenario's own drift."""
    h, mu = 1e-4, limit(t).as_measure()
    b = case.drift(t, mu.points, mu)
    mean_rate = (limit(t + h).mean - limit(t - h).mean).item() / (2 * h)
    variance_rate = (limit(t + h).cov - limit(t - h).cov).item() / (2 * h)
    expected = (mu.weights[:, None] * b).sum().item()
    covariance = (mu.weights[:, None] * (mu.points - mu.mean()) * b).sum().item()
    return abs(mean_rate - expected), abs(variance_rate - 2 * covariance - case.sigma**2)


@pytest.mark.parametrize("case", [OU, MeanFieldOU(), MeanFieldOU(kappa=0.5, coupling=-0.5), MeanFieldOU(kappa=-0.2)])
def test_the_ou_limit_solves_the_moment_equations_of_its_drift(case):
    assert max(moment_residuals(case, case.limit, 0.6)) < 1e-7
    for wrong in ({"kappa": case.kappa + 0.1}, {"sigma": 1.1 * case.sigma}, {"coupling": case.coupling + 0.1}):
        assert max(moment_residuals(case, dataclasses.replace(case, **wrong).limit, 0.6)) > 1e-3


def test_the_ou_limit_starts_at_the_initial_law_in_every_dimension():
    case = MeanFieldOU(initial_mean=(1.0, -2.0), initial_variance=0.3)
    assert torch.equal(case.limit(0.0).mean, case.initial().mean)
    assert torch.equal(case.limit(0.0).cov, case.initial().cov)
    later = case.limit(1.0)
    assert later.mean.tolist() == pytest.approx([math.exp(-1), -2 * math.exp(-1)])
    assert later.cov[0, 0] == later.cov[1, 1]
    assert later.cov[0, 1] == 0


def test_the_invariant_density_of_ou_is_its_limit_at_infinity():
    x = normals(7, 1)
    difference = OU.log_invariant(x) - OU.limit(200.0).log_prob(x)
    torch.testing.assert_close(difference, difference[:1].expand(7), rtol=0, atol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_ou_drift_is_its_formula(weighted):
    x, w = normals(2, 5, 3), torch.softmax(normals(2, 5, seed=1), -1)
    mu = EmpiricalMeasure(x, w if weighted else None)
    mean = (mu.weights.unsqueeze(-1) * x).sum(1, keepdim=True)
    torch.testing.assert_close(OU.drift(0.0, x, mu), -(0.7 * x + 1.3 * (x - mean)), rtol=0, atol=1e-14)
    assert OU.diffusion(0.0, x, mu) == 0.9


# Double well ----------------------------------------------------------------------------------------------------------


def drives_downhill(case, energy, x: Tensor, weights: Tensor | None = None) -> bool:
    mu = EmpiricalMeasure(x, weights)
    return torch.allclose(case.drift(0.0, x, mu), -energy.intrinsic_derivative(mu, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("d", [1, 3])
@pytest.mark.parametrize("theta", [0.0, 0.7, 2.0])
def test_the_double_well_drift_is_minus_the_intrinsic_derivative_of_its_energy(d, theta):
    case, x, w = DoubleWell(theta=theta), normals(2, 5, d), torch.softmax(normals(2, 5, seed=1), -1)
    for weights in (None, w):
        assert drives_downhill(case, case.energy, x, weights)
        assert not drives_downhill(case, 2 * case.energy, x, weights)
        assert not drives_downhill(case, -case.energy, x, weights)
        assert not drives_downhill(case, DoubleWell(theta=theta + 0.1).energy, x, weights)


def test_the_double_well_energy_of_two_atoms():
    mu = EmpiricalMeasure(torch.tensor([[0.0], [2.0]], dtype=FLOAT64))
    # ∫V = ½(16/4 - 4/2) = 1; ½∬W = ½ · (½ · θ · 4/2) = θ/2.
    assert DoubleWell(theta=0.6).energy(mu).item() == pytest.approx(1.0 + 0.3, abs=1e-15)


def test_the_wells_are_at_one_and_minus_one():
    for point, force in [(1.0, 0.0), (-1.0, 0.0), (0.0, 0.0), (0.5, 0.375), (2.0, -6.0)]:
        x = torch.full((4, 1), point, dtype=FLOAT64)
        assert DoubleWell().drift(0.0, x, EmpiricalMeasure(x)).flatten().tolist() == [force] * 4


# Data sets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "n_train", "n_test", "p", "positive"),
    [("digits", 1347, 450, 64, 891 / 1797), ("breast_cancer", 426, 143, 30, 357 / 569)],
)
def test_data_are_split_standardised_and_labelled(name, n_train, n_test, p, positive):
    data = load(name)
    assert tuple(data.train_inputs.shape) == (n_train, p + 1)
    assert tuple(data.test_inputs.shape) == (n_test, p + 1)
    for inputs, targets in [(data.train_inputs, data.train_targets), (data.test_inputs, data.test_targets)]:
        assert inputs.dtype == targets.dtype == FLOAT64
        assert inputs.isfinite().all()
        assert (inputs[:, -1] == 1).all()
        assert set(targets.tolist()) == {-1.0, 1.0}
        # A stratified split keeps the share of each class to one sample.
        assert abs((targets > 0).double().mean().item() - positive) < 1 / len(targets)
    z = data.train_inputs[:, :-1]
    torch.testing.assert_close(z.mean(0), torch.zeros(p, dtype=FLOAT64), rtol=0, atol=1e-13)
    deviation = z.std(0, correction=0) * p**0.5
    changing = deviation > 0
    torch.testing.assert_close(deviation[changing], torch.ones_like(deviation[changing]), rtol=0, atol=1e-12)
    assert changing.sum() == {"digits": 61, "breast_cancer": 30}[name]
    # Standardised with the training set's numbers, the test set is not exactly centred.
    assert data.test_inputs[:, :-1].mean(0).abs().max() > 1e-3


def test_the_label_of_a_digit_is_its_parity():
    from sklearn.datasets import load_digits

    bunch, data = load_digits(), load("digits")
    digit_of = {row.tobytes(): digit for row, digit in zip(bunch.data, bunch.target, strict=True)}
    z = torch.cat([data.train_inputs, data.test_inputs])[:, :-1].numpy()
    spread = np.ptp(z, axis=0)
    share = (z - z.min(0)) / np.where(spread > 0, spread, 1)
    pixels = np.rint(bunch.data.min(0) + share * np.ptp(bunch.data, axis=0))
    expected = [1.0 if digit_of[row.tobytes()] % 2 == 0 else -1.0 for row in pixels]
    assert torch.cat([data.train_targets, data.test_targets]).tolist() == expected


def test_a_split_is_a_function_of_its_seed():
    assert load("breast_cancer") is load("breast_cancer")
    first, again, other = load("breast_cancer", 1), load.__wrapped__("breast_cancer", 1), load("breast_cancer", 2)
    assert torch.equal(first.train_inputs, again.train_inputs)
    assert torch.equal(first.test_targets, again.test_targets)
    assert not torch.equal(first.train_targets, other.train_targets)


def test_an_unknown_data_set_is_refused():
    with pytest.raises(ValueError, match="unknown data set 'mnist'; expected 'digits' or 'breast_cancer'"):
        load("mnist")


# Two-layer network ----------------------------------------------------------------------------------------------------

ACTIVATIONS = {
    "tanh": (np.tanh, lambda a: 1 / np.cosh(a) ** 2),
    "sigmoid": (lambda a: 1 / (1 + np.exp(-a)), lambda a: np.exp(-a) / (1 + np.exp(-a)) ** 2),
    "relu": (lambda a: np.maximum(a, 0), lambda a: (a > 0) * 1.0),
}
SLOPES = {"squared": lambda f, y: f - y, "logistic": lambda f, y: -y / (1 + np.exp(y * f))}


def network_drift(case: TwoLayerNetwork, x: Tensor, sigma: float) -> np.ndarray:
    """-(1/n) Σ_s ℓ'(f_s, y_s) scale (β φ'(α·z_s) z_s, φ(α·z_s)) - (σ²/2) θ/s, particle by particle."""
    z, y = case.dataset.train_inputs.numpy(), case.dataset.train_targets.numpy()
    alpha, beta = x.numpy()[:, :-1], x.numpy()[:, -1]
    phi, slope = ACTIVATIONS[case.activation]
    hidden = z @ alpha.T
    f = case.scale * (phi(hidden) * beta).mean(1)
    loss = SLOPES[case.loss](f, y)
    rows = []
    for i in range(len(x)):
        of_alpha = (loss * case.scale * beta[i] * slope(hidden[:, i])) @ z / len(z)
        of_beta = (loss * case.scale * phi(hidden[:, i])).mean()
        rows.append(-np.append(of_alpha, of_beta) - sigma**2 / 2 * x[i].numpy() / case.prior_variance)
    return np.stack(rows)


@pytest.mark.parametrize("data", ["digits", "breast_cancer"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("loss", SLOPES)
def test_the_network_drift_is_noisy_gradient_descent_written_out(data, activation, loss):
    case = TwoLayerNetwork(data, activation, loss, scale=3.0, sigma=0.4, prior_variance=0.5)
    x = starts(case, n=7)
    found = case.drift(0.0, x, EmpiricalMeasure(x)).numpy()
    np.testing.assert_allclose(found, network_drift(case, x, 0.4), rtol=1e-11, atol=1e-12)
    assert not np.allclose(found, network_drift(case, x, 0.4 * 2**0.5), rtol=1e-3)
    assert case.diffusion(0.0, x, EmpiricalMeasure(x)) == 0.4


def test_the_reference_law_is_a_normalised_density():
    case = TwoLayerNetwork("breast_cancer", prior_variance=0.5)
    assert case.dim == 32
    x = starts(case, n=5)
    torch.testing.assert_close(-case.confinement(x), case.initial().log_prob(x), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        case.confinement_gradient(x), super(TwoLayerNetwork, case).confinement_gradient(x), rtol=1e-12, atol=0
    )


def test_energy_and_accuracy_of_a_network_written_out():
    case = TwoLayerNetwork("breast_cancer", scale=2.0, split=1)
    x = starts(case, 2, n=7)
    for inputs, targets, F in [
        (case.dataset.train_inputs, case.dataset.train_targets, case.energy),
        (case.dataset.test_inputs, case.dataset.test_targets, case.test_risk),
    ]:
        f = 2.0 * (torch.tanh(x[..., :-1] @ inputs.T) * x[..., -1:]).mean(1)
        torch.testing.assert_close(
            F(EmpiricalMeasure(x)), torch.log1p(torch.exp(-targets * f)).mean(-1), rtol=1e-12, atol=0
        )
    right = (f * targets > 0).double().mean(-1)
    torch.testing.assert_close(case.accuracy(EmpiricalMeasure(x)), right, rtol=0, atol=1e-15)
    assert torch.equal(case.accuracy(EmpiricalMeasure(x.float())), right.float())


def test_gradient_descent_lowers_the_risk_and_classifies():
    case = TwoLayerNetwork("breast_cancer", sigma=0.0)
    x = starts(case, n=50)
    before = case.energy(EmpiricalMeasure(x))
    for _ in range(100):
        x = x + 0.1 * case.drift(0.0, x, EmpiricalMeasure(x))
    assert case.energy(EmpiricalMeasure(x)) < 0.3 * before
    assert case.accuracy(EmpiricalMeasure(x)) > 0.9
    # Uphill it would not.
    assert case.energy(EmpiricalMeasure(x - case.drift(0.0, x, EmpiricalMeasure(x)))) > case.energy(EmpiricalMeasure(x))
