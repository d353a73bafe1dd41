"""The equation's door, mean-field Langevin drifts, decoupled processes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mfsde
from mfsde import EmpiricalMeasure, Energy, Gaussian, MeanFieldLangevin, Mixture, decoupled, interaction, potential
from mfsde.model import RESERVED, Equation, energy_of, fields, on_device, scenario_name

FLOAT64 = torch.float64
R, N, D = 2, 4, 3


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


@dataclass(frozen=True)
class Plain:
    """dX = -κ(X - E X) dt + σ dW."""

    kappa: float = 0.8
    sigma: float = 0.5

    def drift(self, t, x, mu):
        return -self.kappa * (x - mu.mean())

    def diffusion(self, t, x, mu):
        return self.sigma

    def initial(self):
        return Gaussian([1.0] * D, 1.0)


def scenario(**methods):
    """`Plain` with some methods replaced."""
    return type("Case", (Plain,), methods)()


def with_drift(drift):
    return scenario(drift=lambda self, t, x, mu: drift(t, x, mu))


def with_diffusion(value, name="diffusion"):
    return scenario(**{name: lambda self, t, x, mu: value(x) if callable(value) else value})


def at_the_door(case, x=None, weights=None) -> Equation:
    return Equation(case, normals(R, N, D) if x is None else x, weights)


# The door: drifts -----------------------------------------------------------------------------------------------------


def test_a_plain_scenario_passes_and_keeps_its_numbers():
    x = normals(R, N, D)
    equation = at_the_door(Plain(), x)
    mu = equation.measure(x)
    assert torch.equal(equation.drift(0.0, x, mu), -0.8 * (x - x.mean(-2, keepdim=True)))
    assert equation.diffusion(0.0, x, mu) == 0.5
    assert (equation.name, equation.n_channels, equation.n_common) == ("Plain", D, 0)
    assert equation.is_additive
    assert not equation.has_common_noise
    assert not equation.has_projection


def leak(t, x, mu):
    x -= mu.mean()
    return x


@pytest.mark.parametrize(
    ("drift", "error", "message"),
    [
        (lambda t, x, mu: x[..., :1], ValueError, r"drift returned shape \(2, 4, 1\).*expected \(2, 4, 3\)"),
        (lambda t, x, mu: x.mean(-2), ValueError, r"shape \(2, 3\) for 4 particles in dimension 3.*keepdim=True"),
        (lambda t, x, mu: -mu.mean(), ValueError, r"shape \(2, 1, 3\).*one row per particle"),
        (lambda t, x, mu: x[0], ValueError, r"shape \(4, 3\).*2 replicas"),
        (lambda t, x, mu: 0.0, TypeError, r"returned a float.*A constant is torch.full_like\(x, c\)"),
        (lambda t, x, mu: None, TypeError, "returned a NoneType"),
        (lambda t, x, mu: x.float(), TypeError, r"returned torch.float32 on cpu; the run is torch.float64"),
        (leak, ValueError, "changed x in place; return a new tensor"),
        (lambda t, x, mu: x / 0, ValueError, r"not finite at the initial state: value .*inf at index \(0, 0, 0\)"),
        (lambda t, x, mu: x.log(), ValueError, "drift is not finite .* a logarithm of a negative number"),
    ],
)
def test_a_drift_that_is_none_is_refused(drift, error, message):
    with pytest.raises(error, match=message):
        at_the_door(with_drift(drift))


def test_the_message_names_the_first_bad_entry():
    def drift(t, x, mu):
        b = x.clone()
        b[1, 2, 0] = math.nan
        return b

    with pytest.raises(ValueError, match=r"value nan at index \(1, 2, 0\)"):
        at_the_door(with_drift(drift))


# The door: diffusions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["diffusion", "common_diffusion"])
@pytest.mark.parametrize(
    ("value", "channels", "form"),
    [
        (0.5, D, "number"),
        (0, D, "number"),
        (np.float64(0.5), D, "number"),
        (torch.tensor(0.5, dtype=FLOAT64), D, "diagonal"),
        (torch.ones(D, dtype=FLOAT64), D, "diagonal"),
        (torch.ones(N, 1, dtype=FLOAT64), D, "diagonal"),
        (torch.ones(R, 1, 1, dtype=FLOAT64), D, "diagonal"),
        (lambda x: 1 + x.square(), D, "diagonal"),
        (lambda x: x.square().sum(-1, keepdim=True), D, "diagonal"),
        (torch.ones(D, 5, dtype=FLOAT64)[None, None], 5, "general"),
        (torch.ones(R, N, D, 2, dtype=FLOAT64), 2, "general"),
        (torch.ones(R, 1, 1, 1, dtype=FLOAT64), 1, "general"),
    ],
)
def test_diffusions_are_numbers_diagonals_or_matrices(method, value, channels, form):
    equation = at_the_door(with_diffusion(value, method))
    found = {
        "diffusion": (equation.n_channels, equation.form),
        "common_diffusion": (equation.n_common, equation.common_form),
    }
    assert found[method] == (channels, form)
    assert equation.has_common_noise == (method == "common_diffusion")
    assert equation.is_additive == (form == "number")


@pytest.mark.parametrize("method", ["diffusion", "common_diffusion"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.ones(D, 5, dtype=FLOAT64), ValueError, r"shape \(3, 5\).*is matrix\[None, None\]"),
        (torch.ones(2, dtype=FLOAT64), ValueError, r"broadcasts to \(2, 4, 3\) \(diagonal\)"),
        (torch.ones(R, N, D, 2, 2, dtype=FLOAT64), ValueError, r"shape \(2, 4, 3, 2, 2\)"),
        (torch.ones(R, N, 2, 5, dtype=FLOAT64), ValueError, r"or to \(2, 4, 3, 'm'\)"),
        (torch.ones(3, N, D, 2, dtype=FLOAT64), ValueError, r"shape \(3, 4, 3, 2\)"),
        (torch.ones(D), TypeError, "returned torch.float32"),
        ([1.0], TypeError, r"returned a list; expected a float \(isotropic\)"),
        (True, TypeError, "returned a bool"),
        (None, TypeError, "returned a NoneType"),
        (math.nan, ValueError, "is not finite at the initial state: value nan"),
        (math.inf, ValueError, "is not finite at the initial state: value inf"),
        (lambda x: x.log(), ValueError, "is not finite at the initial state: value nan"),
    ],
)
def test_a_diffusion_that_is_none_is_refused(method, value, error, message):
    with pytest.raises(error, match=rf"Case.{method} .*{message}"):
        at_the_door(with_diffusion(value, method))


@given(
    ones=st.lists(st.booleans(), min_size=3, max_size=3),
    m=st.integers(1, 4),
    keep=st.integers(0, 3),
)
def test_every_singleton_axis_of_a_diffusion_may_be_broadcast(ones, m, keep):
    shape = [1 if one else size for one, size in zip(ones, (R, N, D), strict=True)]
    general = at_the_door(with_diffusion(torch.ones(*shape, m, dtype=FLOAT64)))
    assert (general.n_channels, general.form) == (m, "general")
    diagonal = at_the_door(with_diffusion(torch.ones(shape[3 - keep :], dtype=FLOAT64)))
    assert (diagonal.n_channels, diagonal.form) == (D, "diagonal")


# The door: the rest ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["drift", "diffusion", "initial"])
def test_a_missing_method_is_named(method):
    with pytest.raises(TypeError, match=f"Case has no method {method}"):
        at_the_door(scenario(**{method: None}))


class NoDataclass:
    drift, diffusion, initial = Plain.drift, Plain.diffusion, Plain.initial


@pytest.mark.parametrize("case", [NoDataclass(), Plain])
def test_what_is_no_instance_of_a_dataclass_is_refused(case):
    with pytest.raises(TypeError, match="is not an instance of a dataclass"):
        at_the_door(case)


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_reserved_field_names_are_refused(name):
    case = dataclass(frozen=True)(type("Case", (Plain,), {"__annotations__": {name: float}, name: 1.0}))
    with pytest.raises(ValueError, match=f"field name {name} is reserved"):
        at_the_door(case())


def test_reserved_are_the_settings_the_dimensions_and_the_variables():
    assert {"n_particles", "horizon", "dt", "seed", "n_replicas", "time", "replica", "particle", "component"} < RESERVED
    assert {"position", "weight", "save_every", "method", "device", "dtype", "noise", "store"} < RESERVED


def test_a_rate_of_births_and_deaths_is_one_number_for_each_particle():
    assert at_the_door(scenario(birth_death_rate=lambda self, t, x, mu: x[..., 0])).has_birth_death
    assert not at_the_door(Plain()).has_birth_death
    with pytest.raises(ValueError, match=r"birth_death_rate returned shape \(2, 4, 3\) .* expected .* \(2, 4\)"):
        at_the_door(scenario(birth_death_rate=lambda self, t, x, mu: x))
    with pytest.raises(ValueError, match="birth_death_rate returned a float"):
        at_the_door(scenario(birth_death_rate=lambda self, t, x, mu: 1.0))
    with pytest.raises(ValueError, match="birth_death_rate is not finite at the initial state"):
        at_the_door(scenario(birth_death_rate=lambda self, t, x, mu: x[..., 0] / 0.0))


def test_a_projection_keeps_the_shape_and_does_not_touch_the_initial_state():
    x = normals(R, N, D)
    before = x.clone()
    equation = at_the_door(scenario(project=lambda self, y: y.clamp_(-0.1, 0.1)), x)
    assert equation.has_projection
    assert torch.equal(x, before)
    assert equation.project(0.0, x.clone()).abs().max() <= 0.1
    with pytest.raises(ValueError, match=r"project returned shape \(2, 4, 1\)"):
        at_the_door(scenario(project=lambda self, y: y[..., :1]))


def test_the_period_reaches_the_measure_and_has_to_fit():
    x = normals(R, N, D)
    equation = at_the_door(scenario(period=[1.0, None, 2.0]), x)
    assert equation.measure(x).period == [1.0, None, 2.0]
    with pytest.raises(ValueError, match="does not fit dimension 3"):
        at_the_door(scenario(period=[1.0, None]))


def test_weights_reach_the_drift():
    x, weights = normals(R, N, D), torch.softmax(normals(R, N, seed=1), -1)
    equation = at_the_door(Plain(), x, weights)
    mean = (weights.unsqueeze(-1) * x).sum(-2, keepdim=True)
    found = equation.drift(0.0, x, equation.measure(x))
    torch.testing.assert_close(found, -0.8 * (x - mean), rtol=0, atol=1e-15)


# Devices and dtypes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WithTensors(Plain):
    centre: Tensor = field(default_factory=lambda: torch.ones(D))
    labels: Tensor = field(default_factory=lambda: torch.arange(3))
    doubled: Tensor = field(init=False, default_factory=lambda: torch.ones(1))

    def drift(self, t, x, mu):
        return self.centre - x


def test_floating_tensor_fields_are_moved_once_and_nothing_else_is():
    case = WithTensors(kappa=2.0)
    moved = on_device(case, torch.device("cpu"), FLOAT64)
    assert case.centre.dtype == torch.float32
    assert moved.centre.dtype == FLOAT64
    assert moved.labels is case.labels
    assert moved.kappa == 2.0
    assert on_device(moved, torch.device("cpu"), FLOAT64).centre is moved.centre
    assert at_the_door(moved).n_channels == D
    with pytest.raises(TypeError, match="Tensors that are fields are moved for you"):
        at_the_door(with_diffusion(case.centre))


def test_a_scenario_without_tensors_stays_itself():
    case = Plain()
    assert on_device(case, torch.device("cpu"), FLOAT64) is case


def test_a_decoupled_scenario_is_moved_with_its_law():
    law = Gaussian([0.0] * D, 1.0)
    moved = on_device(decoupled(WithTensors(), law), torch.device("cpu"), FLOAT64)
    assert moved.law is law
    assert fields(moved)["centre"].dtype == FLOAT64


# Mean-field Langevin --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Langevin(MeanFieldLangevin):
    """F = ½κ(mean - a)² + ½∬W, U = k|x|²/2 + x₁⁴."""

    kappa: float = 0.3
    a: float = 1.0
    k: float = 4.0
    sigma: float = 1.3

    @cached_property
    def energy(self) -> Energy:
        attraction = Energy(lambda mu: 0.5 * self.kappa * (mu.mean() - self.a).square().sum((-2, -1)))
        return attraction + interaction(lambda z: torch.exp(-z.square().sum(-1)))

    def confinement(self, x):
        return 0.5 * self.k * x.square().sum(-1) + x[..., 0] ** 4

    def initial(self):
        return Gaussian([0.0] * D, 1.0)


def langevin_drift(case: Langevin, x: Tensor) -> Tensor:
    z = x.unsqueeze(-2) - x.unsqueeze(-3)
    repulsion = (-2 * z * torch.exp(-z.square().sum(-1, keepdim=True))).mean(-2)
    force = case.kappa * (x.mean(-2, keepdim=True) - case.a) + repulsion
    quartic = torch.zeros_like(x)
    quartic[..., 0] = 4 * x[..., 0] ** 3
    return -(force + case.sigma**2 / 2 * (case.k * x + quartic))


@pytest.mark.parametrize("lead", [(), (R,), (R, 2)])
def test_the_langevin_drift_is_minus_force_minus_temperature_times_confinement(lead):
    case, x = Langevin(), normals(*lead, N, D)
    b = case.drift(0.0, x, EmpiricalMeasure(x))
    torch.testing.assert_close(b, langevin_drift(case, x), rtol=1e-12, atol=1e-12)
    # The temperature is σ²/2: neither σ² nor σ/2 nor none would do.
    for wrong in (2**0.5 * case.sigma, case.sigma**0.5, 0.0):
        assert not torch.allclose(b, langevin_drift(Langevin(sigma=wrong), x), rtol=1e-3)
    assert case.diffusion(0.0, x, EmpiricalMeasure(x)) == 1.3


def test_a_hand_written_confinement_gradient_is_used():
    class Faster(Langevin):
        def confinement_gradient(self, x):
            return torch.full_like(x, 10.0)

    x = normals(N, D)
    mu = EmpiricalMeasure(x)
    expected = -(Faster().energy.intrinsic_derivative(mu, x) + 1.3**2 / 2 * 10.0)
    torch.testing.assert_close(Faster().drift(0.0, x, mu), expected, rtol=0, atol=1e-14)


@given(order=st.permutations(range(N)))
def test_the_drift_follows_a_relabelling_of_the_particles(order):
    x = normals(N, D)
    b = Langevin().drift(0.0, x, EmpiricalMeasure(x))
    again = Langevin().drift(0.0, x[order], EmpiricalMeasure(x[order]))
    torch.testing.assert_close(again, b[order], rtol=1e-12, atol=1e-13)


def test_a_langevin_scenario_without_confinement_is_told_what_to_write():
    @dataclass(frozen=True)
    class Unconfined(MeanFieldLangevin):
        sigma: float = 1.0

        @property
        def energy(self):
            return potential(lambda x: x.square().sum(-1))

        def initial(self):
            return Gaussian(0.0, 1.0)

    with pytest.raises(TypeError, match=r"Unconfined does not define confinement\(x\).*for instance"):
        at_the_door(Unconfined())


def test_energy_of_a_scenario_without_one_is_refused():
    assert isinstance(energy_of(Langevin()), Energy)
    for case in (Plain(), scenario(energy=3.0)):
        with pytest.raises(TypeError, match="has no energy; declare `energy`"):
            energy_of(case)


# Decoupled processes --------------------------------------------------------------------------------------------------


def decoupled_drift(law, t: float = 0.0, x: Tensor | None = None) -> Tensor:
    x = normals(R, N, 1) if x is None else x
    return decoupled(Plain(), law).drift(t, x, EmpiricalMeasure(x))


def expected_drift(mean: float) -> Tensor:
    return -0.8 * (normals(R, N, 1) - mean)


GAUSSIAN = Gaussian(2.0, 0.3)
ATOMS = EmpiricalMeasure(torch.tensor([[1.0], [4.0]], dtype=FLOAT64), torch.tensor([0.25, 0.75], dtype=FLOAT64))


@pytest.mark.parametrize(
    ("law", "t", "mean"),
    [
        (GAUSSIAN, 0.7, 2.0),
        (Mixture([GAUSSIAN, Gaussian(0.0, 1.0)], [0.25, 0.75]), 0.0, 0.5),
        (ATOMS, 0.7, 3.25),
        (EmpiricalMeasure(torch.tensor([[1.0], [4.0]])), 0.7, 2.5),
        (lambda t: Gaussian(3 * t, 1.0), 0.7, 2.1),
        (lambda t: EmpiricalMeasure(torch.tensor([[1.0], [4.0]]) * t), 0.5, 1.25),
    ],
    ids=["Gaussian", "Mixture", "weighted atoms", "equal atoms", "flow of laws", "flow of measures"],
)
def test_a_decoupled_drift_sees_the_given_law_and_not_the_particles(law, t, mean):
    torch.testing.assert_close(decoupled_drift(law, t), expected_drift(mean), rtol=0, atol=1e-12)


def test_the_law_may_be_asked_for_at_any_sequence_of_times_dtypes_and_batches():
    case = decoupled(Plain(), lambda t: Gaussian(3 * t, 1.0))
    times = (0.0, 0.5, 0.5, 0.25)
    states = (normals(R, N, 1), normals(N, 1), normals(5, N, 1).float(), normals(5, N, 1))
    for t, x in [*((t, x) for t in times for x in states), *((t, x) for x in states for t in times)]:
        b = case.drift(t, x, EmpiricalMeasure(x))
        assert b.dtype == x.dtype
        torch.testing.assert_close(b, -0.8 * (x - 3 * t), rtol=0, atol=1e-12 if x.dtype == FLOAT64 else 1e-5)


def limit_dataset(times=(0.0, 0.5, 2.0)) -> xr.Dataset:
    """Densities N(t, 0.1) on uneven nodes."""
    x = np.sort(np.concatenate([np.linspace(-4, 6, 801), np.linspace(-1, 3, 301) + 1e-3]))
    t = np.asarray(times)
    density = np.exp(-((x - t[:, None]) ** 2) / 0.2) / np.sqrt(0.2 * np.pi)
    return xr.Dataset({"density": (("time", "x"), density)}, {"time": t, "x": x})


@pytest.mark.parametrize(
    ("t", "mean"), [(0.0, 0.0), (0.25, 0.25), (0.5, 0.5), (0.8, 0.8), (2.0, 2.0), (2.0 * (1 + 1e-12), 2.0)]
)
def test_a_limit_dataset_is_interpolated_in_time(t, mean):
    for dataset in (limit_dataset(), limit_dataset().transpose("x", "time")):
        # The trapezoid rule on nodes of uneven gaps h <= 0.0125 errs by less than h²/12 times the jumps' p' of order 1.
        torch.testing.assert_close(decoupled_drift(dataset, t), expected_drift(mean), rtol=0, atol=2e-5)


def test_between_two_times_the_law_is_their_mixture():
    law = decoupled(Plain(), limit_dataset()).law_at(0.8, normals(R, N, 1))
    # 0.8 is a fifth of the way from 0.5 to 2: variances 0.1, and the spread of the two means.
    assert law.covariance()[0].item() == pytest.approx(0.1 + 0.2 * 0.8 * 1.5**2, abs=1e-4)
    assert law.points.shape[:-2] == (R,)


@pytest.mark.parametrize("t", [-0.1, 2.1])
def test_a_time_outside_the_dataset_is_refused(t):
    with pytest.raises(ValueError, match=r"given on \[0.0, 2.0\] but the run asks for t = .*run's horizon"):
        decoupled_drift(limit_dataset(), t)


def test_a_dataset_of_one_time_is_that_law():
    torch.testing.assert_close(decoupled_drift(limit_dataset((1.0,)), 1.0), expected_drift(1.0), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("law", "error", "message"),
    [
        (3.0, TypeError, "law is a float; expected a Law"),
        (lambda t: 3.0, TypeError, "the law at a time is a float"),
        (xr.Dataset({"density": (("x",), [1.0])}), ValueError, r"no density\(time, x\)"),
        (xr.Dataset({"mean": (("time",), [1.0])}), ValueError, r"no density\(time, x\)"),
    ],
)
def test_what_is_no_law_is_refused(law, error, message):
    with pytest.raises(error, match=message):
        decoupled_drift(law)


def test_all_coefficients_are_decoupled_and_the_rest_is_the_scenarios():
    @dataclass(frozen=True)
    class Rich(Plain):
        def diffusion(self, t, x, mu):
            return (1 + mu.mean()).expand_as(x)

        def common_diffusion(self, t, x, mu):
            return (2 + mu.mean()).expand_as(x)

        def project(self, x):
            return x.clamp(-9, 9)

        def initial(self):
            return GAUSSIAN

        period = 7.0

    case, x = decoupled(Rich(kappa=3.0), Gaussian(5.0, 1.0)), normals(R, N, 1)
    mu = EmpiricalMeasure(x)
    for found, value in [(case.diffusion(0.0, x, mu), 6.0), (case.common_diffusion(0.0, x, mu), 7.0)]:
        torch.testing.assert_close(found, torch.full_like(x, value), rtol=0, atol=1e-12)
    assert case.initial() is GAUSSIAN
    assert case.observables() == ()
    assert case.law_at(0.0, x).period == 7.0
    assert fields(case)["kappa"] == 3.0
    assert scenario_name(case) == "decoupled(Rich)"
    equation = Equation(case, x)
    assert equation.has_projection
    assert equation.has_common_noise
    assert not hasattr(decoupled(Plain(), GAUSSIAN), "project")


def test_a_decoupled_langevin_drift_is_that_of_the_law():
    case, x = Langevin(), normals(R, N, 1)
    law = Gaussian(0.7, 0.4)
    b = decoupled(case, law).drift(0.0, x, EmpiricalMeasure(x))
    # ∫ 2(x - y) e^{-(x-y)²} N(dy; m, v) = 2(x - m) e^{-(x-m)²/(1+2v)} (1+2v)^{-3/2}
    spread = 1 + 2 * 0.4
    repulsion = -2 * (x - 0.7) * torch.exp(-((x - 0.7) ** 2) / spread) / spread**1.5
    expected = -(0.3 * (0.7 - 1.0) + repulsion + 1.3**2 / 2 * (4.0 * x + 4 * x**3))
    torch.testing.assert_close(b, expected, rtol=0, atol=1e-10)


# Corners


@dataclass(frozen=True)
class Confined(mfsde.MeanFieldLangevin):
    """U may be anything; F is zero."""

    potential: Any = None
    sigma: float = 1.0

    @property
    def energy(self):
        return 0.0 * mfsde.potential(lambda x: x.sum(-1))

    def confinement(self, x):
        return self.potential(x)

    def initial(self):
        return mfsde.Gaussian([0.0, 0.0], 1.0)


@pytest.mark.parametrize(
    "wrong", [lambda x: x.square().sum(), lambda x: x.square(), lambda x: x.square().sum(-1).mean(-1)]
)
def test_a_confinement_without_one_number_per_particle_is_refused(wrong):
    x = torch.randn(1, 4, 2)
    assert Confined(lambda x: x.square().sum(-1)).drift(0.0, x, EmpiricalMeasure(x)).shape == x.shape
    with pytest.raises(ValueError, match=r"confinement returned shape .* one number per particle"):
        Confined(wrong).drift(0.0, x, EmpiricalMeasure(x))


def test_a_langevin_scenario_without_sigma_or_energy_is_told_what_it_lacks():
    @dataclass(frozen=True)
    class Bare(mfsde.MeanFieldLangevin):
        def confinement(self, x):
            return x.square().sum(-1)

        def initial(self):
            return mfsde.Gaussian(0.0, 1.0)

    with pytest.raises(TypeError, match=r"Bare declares no sigma; .* needs all of sigma, energy, confinement"):
        Equation(Bare(), torch.randn(1, 4, 1))


@dataclass(frozen=True)
class Singular:
    """Repulsion that no particle exerts on itself."""

    def drift(self, t, x, mu):
        return mu.convolve(lambda z: z / z.square().sum(-1, keepdim=True), x, include_self=False)

    def diffusion(self, t, x, mu):
        return 0.1

    def initial(self):
        return mfsde.Gaussian(0.0, 1.0)


def test_a_given_law_has_no_self_to_leave_out():
    x, atoms = torch.tensor([[[0.3], [2.0]]]), torch.tensor([[1.0], [-1.0]])
    law = EmpiricalMeasure(atoms, torch.tensor([0.25, 0.75]))
    expected = [sum(w / (float(p) - a) for w, a in ((0.25, 1.0), (0.75, -1.0))) for p in x.flatten()]
    found = mfsde.decoupled(Singular(), law).drift(0.0, x, EmpiricalMeasure(x))
    torch.testing.assert_close(found.flatten(), torch.tensor(expected))


def test_a_drift_that_carries_a_graph_is_taken_without_it():
    @dataclass(frozen=True)
    class Tracked(Singular):
        def drift(self, t, x, mu):
            with torch.enable_grad():
                return x.detach().requires_grad_() * 2

        def initial(self):
            points = torch.tensor([[0.0], [1.0]], requires_grad=True)
            return EmpiricalMeasure(points * 1.0)

    run = mfsde.simulate(Tracked(), n_particles=2, horizon=0.2, dt=0.1, seed=0)
    assert run.position.shape == (2, 1, 2, 1)


def test_a_sigma_changed_in_place_is_refused():
    @dataclass(frozen=True)
    class Clamped(Singular):
        def diffusion(self, t, x, mu):
            return x.clamp_(min=0.5)

    with pytest.raises(ValueError, match=r"Clamped.diffusion changed x in place"):
        Equation(Clamped(), torch.randn(1, 4, 1))


def test_numbers_of_numpy_are_numbers():
    @dataclass(frozen=True)
    class Numpy(Singular):
        def diffusion(self, t, x, mu):
            return np.float32(0.5)

    equation = Equation(Numpy(), torch.randn(1, 4, 1))
    assert equation.is_additive
    assert equation.diffusion(0.0, torch.zeros(1, 4, 1), None) == 0.5


def test_a_matrix_that_could_be_rows_is_refused():
    @dataclass(frozen=True)
    class Ambiguous(Singular):
        wide: bool = False

        def diffusion(self, t, x, mu):
            matrix = x.new_tensor([[1.0, 2.0], [0.0, 1.0]])
            return matrix[None, None] if self.wide else matrix

        def initial(self):
            return mfsde.Gaussian([0.0, 0.0], 1.0)

    with pytest.raises(ValueError, match=r"may be a matrix or one row per particle. Write matrix\[None, None\]"):
        Equation(Ambiguous(), torch.randn(1, 2, 2))
    assert Equation(Ambiguous(wide=True), torch.randn(1, 2, 2)).form == "general"
