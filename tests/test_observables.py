"""Observables on measures whose value is known, and the statistics of the Gaussian entropy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
from torch import Tensor

from mfsde import EmpiricalMeasure, Energy, Gaussian, MeanFieldLangevin, Observable
from mfsde.model import RESERVED, Equation
from mfsde.observables import NAMED, evaluate, gaussian_entropy, resolve

FLOAT64 = torch.float64


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


@dataclass(frozen=True)
class GaussianLangevin(MeanFieldLangevin):
    """F = ½κ(mean - a)², e^{-U} = N(0, 1/k): the law stays Gaussian."""

    kappa: float = 0.3
    a: float = 1.0
    k: float = 4.0
    sigma: float = 1.0

    @cached_property
    def energy(self) -> Energy:
        return Energy(lambda mu: 0.5 * self.kappa * (mu.mean() - self.a).square().sum((-2, -1)))

    def confinement(self, x):
        return 0.5 * self.k * x.square().sum(-1) + 0.5 * math.log(2 * math.pi / self.k)

    def initial(self):
        return Gaussian(2.0, 0.5)


@dataclass(frozen=True)
class Bare:
    """No energy, no confinement."""

    def drift(self, t, x, mu):
        return -x

    def diffusion(self, t, x, mu):
        return 1.0

    def initial(self):
        return Gaussian(0.0, 1.0)


def measured(name: str, x: Tensor, case=None) -> Tensor:
    case = GaussianLangevin() if case is None else case
    (observable,) = resolve(case, name)
    return evaluate(observable, Equation(case, x), 0.0, x)


# Named observables ----------------------------------------------------------------------------------------------------


def test_named_observables_of_two_replicas_of_two_atoms():
    x = torch.tensor([[[0.0], [2.0]], [[1.0], [5.0]]], dtype=FLOAT64)
    log = 0.5 * math.log(2 * math.pi / 4)
    assert measured("mean", x).tolist() == [[1.0], [3.0]]
    assert measured("covariance", x).tolist() == [[[1.0]], [[4.0]]]
    torch.testing.assert_close(measured("energy", x), torch.tensor([0.0, 0.6], dtype=FLOAT64))
    torch.testing.assert_close(measured("confinement", x), torch.tensor([4.0, 26.0], dtype=FLOAT64) + log)


def test_mean_and_covariance_in_several_dimensions():
    x = normals(3, 50, 2)
    torch.testing.assert_close(measured("mean", x, Bare()), x.mean(1), rtol=0, atol=1e-15)
    expected = torch.stack([torch.cov(each.T, correction=0) for each in x])
    torch.testing.assert_close(measured("covariance", x, Bare()), expected, rtol=0, atol=1e-14)


def test_free_energy_is_put_together_from_its_parts():
    x, case = normals(3, 50, 1), GaussianLangevin(sigma=0.6)
    parts = {name: measured(name, x, case) for name in ("energy", "confinement", "entropy", "free_energy")}
    expected = parts["energy"] + 0.18 * (parts["confinement"] - parts["entropy"])
    torch.testing.assert_close(parts["free_energy"], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", NAMED)
def test_every_named_observable_labels_its_axes_and_says_what_it_is(name):
    (observable,) = resolve(GaussianLangevin(), [name])
    value = measured(name, normals(2, 5, 1))
    assert observable.name == name
    assert observable.long_name
    assert observable.units == ("nat" if name == "entropy" else "1")
    assert observable.dimensions(value) == {
        "mean": ("replica", "component"),
        "covariance": ("replica", "component", "component_2"),
    }.get(name, ("replica",))


# Entropy --------------------------------------------------------------------------------------------------------------

CORRELATED = torch.tensor([[2.0, 0.6, -0.3], [0.6, 1.0, 0.2], [-0.3, 0.2, 0.5]], dtype=FLOAT64)
REPLICAS = 4000


def is_unbiased(values: Tensor, expected: float) -> bool:
    """The mean over replicas within 4 of its standard errors."""
    return abs(float(values.mean()) - expected) < 4 * float(values.std()) / len(values) ** 0.5


def entropy_without_correction(mu: EmpiricalMeasure) -> Tensor:
    n, d = mu.n_particles, mu.dim
    sample = mu.covariance() * n / (n - 1)
    return 0.5 * (torch.logdet(sample) + d * math.log(2 * math.pi * math.e))


@pytest.mark.parametrize(("n", "d"), [(2, 1), (10, 1), (4, 3), (30, 3)])
def test_the_gaussian_entropy_is_unbiased_and_without_the_wishart_correction_it_is_not(n, d):
    law = Gaussian([1.0, -1.0, 0.5][:d], CORRELATED[:d, :d])
    exact = 0.5 * float(torch.logdet(2 * math.pi * math.e * law.cov))
    mu = EmpiricalMeasure(law.from_variates(normals(REPLICAS, n, d)))
    assert is_unbiased(gaussian_entropy(mu), exact)
    assert not is_unbiased(entropy_without_correction(mu), exact)
    # A deviation that is 5 % too large is seen as well.
    assert not is_unbiased(gaussian_entropy(mu), exact - d * math.log(1.05)) or n < 10


def test_the_gaussian_entropy_shifts_by_the_log_determinant_of_a_linear_map():
    x, matrix = normals(3, 20, 3), torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 3.0, 0.5]], dtype=FLOAT64)
    moved = gaussian_entropy(EmpiricalMeasure(x @ matrix.T + 5))
    torch.testing.assert_close(moved - gaussian_entropy(EmpiricalMeasure(x)), torch.zeros(3, dtype=FLOAT64))


def test_the_entropy_keeps_the_dtype_of_the_particles():
    x = normals(2, 100, 1)
    single = gaussian_entropy(EmpiricalMeasure(x.float()))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), gaussian_entropy(EmpiricalMeasure(x)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("mu", "message"),
    [
        (EmpiricalMeasure(torch.zeros(3, 3)), r"got N = 3, d = 3\. Drop `entropy`"),
        (EmpiricalMeasure(torch.zeros(1, 1)), "got N = 1, d = 1"),
        (EmpiricalMeasure(torch.zeros(2, 1), torch.tensor([0.5, 0.5])), "got N = 2, d = 1, weighted"),
    ],
)
def test_an_entropy_that_cannot_be_estimated_is_refused(mu, message):
    with pytest.raises(ValueError, match=message):
        gaussian_entropy(mu)


# V = ½κ(m - a)² + (σ²/2) KL(N(m, v) | N(0, 1/k)) for κ = 0.3, a = 1, k = 4, σ = 1, computed independently.
FREE_ENERGIES = [
    (1.6158671698975375, 0.41758001150890983, 2.7072467648052396),
    (0.7224078731869257, 0.2838338208091532, 0.5355335616211582),
    (0.14922734508779323, 0.2500838656569756, 0.13084093113765774),
]


@pytest.mark.parametrize(("mean", "variance", "expected"), FREE_ENERGIES)
def test_the_free_energy_of_gaussian_particles_is_the_closed_form(mean, variance, expected):
    case, n = GaussianLangevin(), 40
    x = Gaussian(mean, variance).from_variates(normals(REPLICAS, n, 1))
    # E (mean of N - a)² exceeds (m - a)² by v/N; the rest of V is linear in the law or estimated without bias.
    expected = expected + 0.5 * case.kappa * variance / n
    assert is_unbiased(measured("free_energy", x), expected)
    assert not is_unbiased(measured("free_energy", x, GaussianLangevin(sigma=2**0.5)), expected)
    assert not is_unbiased(measured("free_energy", x, GaussianLangevin(k=4.5)), expected)


# What a scenario and a call may ask for -------------------------------------------------------------------------------


def first_coordinate(t, x, mu):
    return mu.integrate(lambda y: y[..., 0])


@dataclass(frozen=True)
class WithObservables(GaussianLangevin):
    def observables(self):
        return "energy", Observable("own", first_coordinate, "m", "first coordinate")


def test_a_scenarios_observables_come_first_and_names_are_looked_up():
    found = resolve(WithObservables(), ["mean", Observable("mine", first_coordinate)])
    assert [o.name for o in found] == ["energy", "own", "mean", "mine"]
    assert [o.name for o in resolve(WithObservables(), ())] == ["energy", "own"]
    assert [o.name for o in resolve(Bare(), Observable("mine", first_coordinate))] == ["mine"]


@pytest.mark.parametrize("name", [*sorted(RESERVED), "kappa", "energy", "own"])
def test_names_that_are_taken_are_refused(name):
    with pytest.raises(ValueError, match=f"observable name {name} is taken"):
        resolve(WithObservables(), [Observable(name, first_coordinate)])


def test_a_name_given_twice_is_refused():
    with pytest.raises(ValueError, match="observable name mean is taken"):
        resolve(Bare(), ["mean", "mean"])


@pytest.mark.parametrize(
    ("item", "error", "message"),
    [
        ("average", ValueError, "unknown name 'average'; expected one of mean, covariance"),
        (3, TypeError, "3 is neither an mfsde.Observable nor a name"),
        (first_coordinate, TypeError, "is neither an mfsde.Observable nor a name"),
        ("energy", TypeError, "Bare has no energy"),
        ("free_energy", TypeError, "Bare has no energy"),
        ("confinement", TypeError, r"Bare has no confinement\(x\)"),
    ],
)
def test_what_cannot_be_observed_is_refused(item, error, message):
    with pytest.raises(error, match=message):
        resolve(Bare(), [item])


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda t, x, mu: 3.0, TypeError, r"'mine' returned a float; expected a tensor \(R, ...\)"),
        (lambda t, x, mu: x.mean(), ValueError, r"returned shape \(\) for 2 replicas"),
        (lambda t, x, mu: x.mean(0), ValueError, r"returned shape \(5, 1\) for 2 replicas; expected \(2, ...\)"),
    ],
)
def test_a_value_that_is_not_one_per_replica_is_refused(function, error, message):
    x = normals(2, 5, 1)
    with pytest.raises(error, match=message):
        evaluate(Observable("mine", function), Equation(Bare(), x), 0.0, x)


def test_an_observable_sees_time_state_and_weights_and_leaves_no_graph():
    x, weights = normals(2, 5, 1).requires_grad_(), torch.softmax(normals(2, 5, seed=1), -1)
    observable = Observable("mine", lambda t, x, mu: t * mu.mean()[:, 0] + x[:, 0])
    found = evaluate(observable, Equation(Bare(), x.detach(), weights), 2.0, x)
    expected = 2 * (weights.unsqueeze(-1) * x).sum(1) + x[:, 0]
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-15)
    assert not found.requires_grad


def test_axes_of_an_observable_are_named_by_the_user_or_numbered():
    value = torch.zeros(2, 3, 4)
    assert Observable("mine", first_coordinate).dimensions(value) == ("replica", "mine_1", "mine_2")
    named = Observable("mine", first_coordinate, dims=("row", "column"))
    assert named.dimensions(value) == ("replica", "row", "column")
    with pytest.raises(ValueError, match=r"dims \('row', 'column'\) name 2 axes.*returned shape \(2, 3\)"):
        named.dimensions(value[..., 0])
