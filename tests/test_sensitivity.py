"""Gradients through a run: difference quotients under the same noise, closed forms, and what must be refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

import mfsde
import mfsde.calibration
import mfsde.kinetic
import mfsde.langevin
import mfsde.provenance
import mfsde.sgd
from mfsde import EmpiricalMeasure, Energy, Gaussian, Mixture, Noise, Uniform, interaction, potential, risk, sensitivity
from mfsde.calibration import fit
from mfsde.parameters import Parameters
from mfsde.replay import Replay
from mfsde.scenarios import DoubleWell, GaussianLangevin, KineticDoubleWell, Kuramoto, MeanFieldOU
from mfsde.sensitivity import differentiate
from mfsde.tape import recording

DOUBLE = {"dtype": torch.float64}
SETTINGS: dict[str, Any] = {"n_particles": 20, "horizon": 0.4, "dt": 0.04, "seed": 3, "n_replicas": 2}


def second_moment(t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
    """∫ |x|² dm + 0.3 Σ ∫ x dm."""
    return mu.integrate(lambda z: z.square().sum(-1)) + 0.3 * mu.mean().sum((-2, -1))


def value(scenario: Any, objective: Any = second_moment, **settings: Any) -> Tensor:
    """The objective at the end of a run of `simulate`, (R,)."""
    run = mfsde.simulate(scenario, **{**DOUBLE, **settings})
    x = torch.from_numpy(run["position"].values[-1])
    weights = torch.from_numpy(run["weight"].values[-1]) if "weight" in run else None
    return objective(settings["horizon"], x, EmpiricalMeasure(x, weights))


def quotients(scenario: Any, names: tuple[str, ...], evaluate: Callable[[Any], float], eps: float = 1e-5) -> np.ndarray:
    """Central difference quotients of `evaluate`, one for every number of the parameters."""
    chosen = Parameters.of(scenario, names)
    start, found = np.array(chosen.vector()), []
    for k in range(len(start)):
        ends = [replace(scenario, **chosen.replacing(start + s * eps * np.eye(len(start))[k])) for s in (1, -1)]
        found.append((evaluate(ends[0]) - evaluate(ends[1])) / (2 * eps))
    return np.array(found)


def agrees(found: xr.Dataset, expected: np.ndarray) -> bool:
    """To 1e-6 of the gradient's size: quotients with ε = 1e-5 have errors of some 1e-9."""
    return float(np.abs(found["gradient"] - expected).max()) <= 1e-6 * max(float(np.abs(expected).max()), 1e-3)


@pytest.fixture(autouse=True)
def no_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digesting the source of a class of this file takes longer than the runs here."""
    monkeypatch.setattr(mfsde.provenance, "source_digest", lambda scenario: "")


# Scenarios that between them use all that an equation may ------------------------------------------------------------

INPUTS = torch.linspace(-1, 1, 9, **DOUBLE)[:, None]
INPUTS = torch.cat([INPUTS, torch.ones_like(INPUTS)], -1)
TARGETS = torch.sin(2 * INPUTS[:, 0])


@dataclass(frozen=True)
class Network(mfsde.MeanFieldLangevin):
    scale: float = 2.0
    prior: float = 1.0
    sigma: float = 0.3
    spread: float = 0.5
    kind: str = "neuron"

    @cached_property
    def energy(self) -> Energy:
        if self.kind == "neuron":
            return risk(mfsde.Neuron("tanh", scale=self.scale), "squared", INPUTS, TARGETS)
        if self.kind == "logistic":
            return risk(mfsde.Neuron("sigmoid", scale=self.scale), "logistic", INPUTS, torch.sign(TARGETS + 0.01))
        return risk(self.wave, lambda f, y: torch.log(torch.cosh(f - y)), INPUTS, TARGETS)

    def wave(self, theta: Tensor, z: Tensor) -> Tensor:
        return self.scale * theta[..., 2] * torch.sin((theta[..., :2] * z).sum(-1))

    def confinement(self, x: Tensor) -> Tensor:
        return 0.5 * self.prior * x.square().sum(-1)

    def initial(self) -> Gaussian:
        return Gaussian([0.0] * 3, self.spread)


@dataclass(frozen=True)
class ManyEnergies(mfsde.MeanFieldLangevin):
    theta: float = 0.7
    width: float = 2.0
    sigma: float = 0.3
    weights: tuple[float, float] = (0.5, 1.5)

    @cached_property
    def energy(self) -> Energy:
        a = torch.as_tensor(self.weights, **DOUBLE)
        wells = potential(lambda x: (a[0] * x.square() + a[1] * torch.sin(x)).sum(-1))
        spread = Energy(lambda mu: (self.theta * mu.covariance().diagonal(dim1=-2, dim2=-1).sum(-1)) ** 2)
        return self.theta * interaction(self.waves) + wells / 2 + spread - self.theta * Energy(self.bumps)

    def waves(self, z: Tensor) -> Tensor:
        return self.width * torch.cos(z).sum(-1)

    def bumps(self, mu: EmpiricalMeasure) -> Tensor:
        return mu.integrate(lambda x: mu.convolve(lambda z: torch.exp(-z.square().sum(-1) / self.width), x))

    def confinement(self, x: Tensor) -> Tensor:
        return x.square().square().sum(-1)

    def initial(self) -> Any:
        return Uniform([-1.0, -1.0], [1.0, self.width])


@dataclass(frozen=True)
class Inertial(mfsde.KineticLangevin):
    gamma: float = 0.8
    sigma: float = 0.6
    prior: float = 0.7
    width: float = 1.3

    @cached_property
    def energy(self) -> Energy:
        return interaction(lambda z: self.width * torch.cos(z).sum(-1))

    def confinement(self, x: Tensor) -> Tensor:
        return 0.5 * self.prior * x.square().sum(-1)

    def initial_position(self) -> Uniform:
        return Uniform([-1.0, -1.0], [1.0, self.width])


@dataclass(frozen=True)
class Descent(mfsde.NoisySGD):
    scale: float = 2.0
    prior: float = 0.6
    sigma: float = 0.5
    decay: float = 1.5

    @cached_property
    def energy(self) -> Energy:
        return risk(mfsde.Neuron("tanh", scale=self.scale), "squared", INPUTS, TARGETS)

    def confinement(self, x: Tensor) -> Tensor:
        return 0.5 * self.prior * x.square().sum(-1)

    def step_size(self, t: float) -> float:
        return 1.0 / (1.0 + self.decay * t)

    def initial(self) -> Gaussian:
        return Gaussian([0.1, -0.2, 0.3], 0.5)


@dataclass(frozen=True)
class Weighted(ManyEnergies):
    spread: float = 0.5

    def initial(self) -> EmpiricalMeasure:
        points = torch.randn(2, 20, 2, generator=torch.Generator().manual_seed(0), **DOUBLE)
        spread = torch.as_tensor(self.spread, **DOUBLE)
        return EmpiricalMeasure(
            spread * points, torch.softmax(torch.linspace(-1, 1, 20, **DOUBLE) * spread, 0).expand(2, 20)
        )


@dataclass(frozen=True)
class LawInSigma:
    a: float = 0.5
    b: float = 0.3
    c: float = 1.0
    matrix: Tensor = field(default_factory=lambda: torch.tensor([[0.1, 0.2], [0.3, -0.4]], **DOUBLE))

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        return -self.c * x @ self.matrix.T + (1 + t) * mu.convolve(lambda z: torch.tanh(self.b * z), x)

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Any:
        deviation = (1 + mu.covariance().diagonal(dim1=-2, dim2=-1).unsqueeze(-2)).sqrt()
        return self.a * deviation * (1.5 + torch.sin(x))

    def initial(self) -> Any:
        return Mixture([Gaussian([self.b, 0.0], 0.5), Uniform([-1.0, -1.0], [self.c, 1.0])], [0.4, 0.6])


@dataclass(frozen=True)
class CommonNoiseAndWall(LawInSigma):
    shared: float = 0.4

    def common_diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Any:
        return self.shared * torch.cos(x - mu.mean())

    def project(self, x: Tensor) -> Tensor:
        return torch.where(x < -self.c, -2 * self.c - x, x)


@dataclass(frozen=True)
class General(LawInSigma):
    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Any:
        first = torch.sin(x) * self.a
        return torch.stack([first, self.b * torch.cos(x + mu.mean()), self.c * torch.ones_like(x)], -1)


@dataclass(frozen=True)
class TwoBumps:
    share: float = 0.3
    centre: float = 1.0
    variance: float = 0.5

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        return -x

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> float:
        return 0.2

    def initial(self) -> Mixture:
        bumps = [Gaussian([self.centre], self.variance), Gaussian([-self.centre], 1.0)]
        return Mixture(bumps, [self.share, 1 - self.share])


@dataclass(frozen=True)
class Labelled(TwoBumps):
    """A component of the state that is random in one direction only."""

    def initial(self) -> Any:
        return Mixture([Gaussian([self.centre, 1.0], torch.diag(torch.stack([z, 0 * z]))) for z in self.variances])

    @property
    def variances(self) -> tuple[Tensor, Tensor]:
        return torch.as_tensor(self.variance, **DOUBLE), 2 * torch.as_tensor(self.share, **DOUBLE)


OU = MeanFieldOU(initial_mean=(1.0, -0.5))
OF_OU = ("kappa", "coupling", "sigma", "initial_mean", "initial_variance")
OF_NETWORK = ("scale", "prior", "sigma", "spread")
OF_LAW = ("a", "b", "c", "matrix")
OF_KURAMOTO = ("coupling", "sigma", "initial_mean", "initial_variance")
CASES: dict[str, tuple[Any, tuple[str, ...], dict[str, Any]]] = {
    "ornstein-uhlenbeck": (OU, OF_OU, {}),
    "double well": (DoubleWell(), ("theta", "sigma", "initial_mean", "initial_variance"), {}),
    "kuramoto": (Kuramoto(), OF_KURAMOTO, {}),
    "langevin by hand": (GaussianLangevin(), ("kappa", "target", "stiffness", "sigma"), {}),
    "kinetic": (KineticDoubleWell(), ("gamma", "sigma", "theta", "initial_mean"), {}),
    "kinetic, energy": (Inertial(), ("gamma", "sigma", "prior", "width"), {}),
    "noisy descent": (Descent(), ("scale", "prior", "sigma", "decay"), {}),
    "noisy descent, one": (Descent(), ("scale",), {}),
    "neurons": (Network(), OF_NETWORK, {}),
    "neurons, logistic": (Network(kind="logistic"), OF_NETWORK, {}),
    "any feature and loss": (Network(kind="wave"), OF_NETWORK, {}),
    "energies": (ManyEnergies(), ("theta", "width", "sigma", "weights"), {}),
    "weighted": (Weighted(), ("theta", "spread"), {}),
    "law in σ": (LawInSigma(), OF_LAW, {}),
    "law in σ, milstein": (LawInSigma(), OF_LAW, {"method": "milstein"}),
    "law in σ, heun": (LawInSigma(), OF_LAW, {"method": "heun"}),
    "additive, heun": (OU, OF_OU, {"method": "heun"}),
    "additive, milstein": (OU, OF_OU, {"method": "milstein"}),
    "common noise, wall": (CommonNoiseAndWall(), (*OF_LAW, "shared"), {}),
    "common noise, wall, heun": (CommonNoiseAndWall(), ("a", "shared"), {"method": "heun"}),
    "matrix": (General(), OF_LAW, {}),
    "matrix, heun": (General(), ("a", "b"), {"method": "heun"}),
    "mixture": (TwoBumps(), ("share", "centre", "variance"), {}),
    "singular covariance": (Labelled(), ("share", "centre", "variance"), {}),
    "fine steps": (LawInSigma(), ("a", "b"), {"noise": Noise(3, substeps=3)}),
    "antithetic": (LawInSigma(), ("a", "b"), {"noise": Noise(3, antithetic=True)}),
    "decoupled": (mfsde.decoupled(OU, Gaussian([0.3, 0.1], 0.5)), ("kappa", "coupling", "sigma"), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_difference_quotients_and_values_those_of_the_run(name):
    scenario, names, extra = CASES[name]
    settings = {**SETTINGS, **extra}
    found = differentiate(second_moment, scenario, names, **settings)
    assert np.array_equal(found["value"], value(scenario, **settings))
    changed = scenario.scenario if name == "decoupled" else scenario

    def mean(case: Any) -> float:
        case = mfsde.decoupled(case, scenario.law) if name == "decoupled" else case
        return float(value(case, **settings).mean())

    assert agrees(found, quotients(changed, names, mean))


@pytest.mark.parametrize("case", [KineticDoubleWell(), Inertial(), Descent()], ids=lambda case: type(case).__name__)
def test_a_noise_that_loses_its_derivative_is_refused(case, monkeypatch):
    """Twin of the cases above: σ as a float, in the drift's temperature and in the diffusion."""
    number = mfsde.langevin.number
    for module in (mfsde.kinetic, mfsde.sgd):
        monkeypatch.setattr(module, "number", lambda scenario, name: float(number(scenario, name)))
    with pytest.raises(ValueError, match=rf"{type(case).__name__}\.\w+: the automatic derivative along a step is 0"):
        differentiate(second_moment, case, ("sigma",), **SETTINGS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outside_of_a_recording_parameters_leave_no_graph(dtype):
    """Also where they are tensors that want one."""
    x = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    mu = EmpiricalMeasure(x)
    for plain in (KineticDoubleWell(), Inertial()):
        case = replace(plain, **Parameters.of(plain, ("gamma", "sigma")).leaves())
        for name in ("drift", "diffusion"):
            found, wanted = (getattr(s, name)(0.0, x, mu) for s in (case, plain))
            assert not found.requires_grad
            assert torch.equal(found, wanted)
            with recording():
                taped = getattr(case, name)(0.0, x, mu)
            assert taped.requires_grad
            assert taped.dtype is dtype
            torch.testing.assert_close(taped, wanted)


@pytest.mark.parametrize("name", ["ornstein-uhlenbeck", "kuramoto", "double well", "law in σ"])
def test_a_law_without_its_derivative_is_rejected(name, monkeypatch):
    scenario, names, extra = CASES[name]
    settings = {**SETTINGS, **extra}
    monkeypatch.setattr(
        Replay, "measure", lambda self, x, step=None: EmpiricalMeasure(x.detach(), period=self._equation.period)
    )
    found = differentiate(second_moment, scenario, names, **settings)
    assert not agrees(found, quotients(scenario, names, lambda case: float(value(case, **settings).mean())))


def test_the_forces_of_energies_are_the_same_with_and_without_a_graph():
    x = torch.randn(2, 7, 2, generator=torch.Generator().manual_seed(1), **DOUBLE)
    weights = torch.softmax(x[..., 0], -1)
    cases = [(ManyEnergies(), x), (Network(), torch.cat([x, x[..., :1]], -1)), (Kuramoto(), x[..., :1])]
    for case, points in cases:
        leaf = points.clone().requires_grad_()
        for w in (None, weights):
            for at in (leaf, leaf[:, :3].clone()):
                mu = EmpiricalMeasure(leaf, w)
                plain = case.energy.intrinsic_derivative(mu, at)
                with recording():
                    taped = case.energy.intrinsic_derivative(mu, at)
                assert not plain.requires_grad
                assert taped.requires_grad
                torch.testing.assert_close(taped, plain, rtol=1e-12, atol=1e-14)
                for name in ("functional_derivative", "variation"):
                    assert not getattr(case.energy, name)(mu, at).requires_grad


def test_gradients_of_batches_average_to_the_whole_and_do_not_depend_on_the_others():
    settings = {**SETTINGS, "n_replicas": 6}
    runs = {n: differentiate(second_moment, OU, OF_OU, n_batches=n, **settings) for n in (1, 2, 6)}
    for n, run in runs.items():
        np.testing.assert_allclose(run["gradient"], runs[1]["gradient"], rtol=1e-12)
        assert run["batch_gradient"].shape == (n, 6)
    each = runs[6]["batch_gradient"].values
    np.testing.assert_allclose(runs[6]["stderr"], each.std(0, ddof=1) / 6**0.5, rtol=1e-12)
    np.testing.assert_allclose(runs[2]["batch_gradient"], each.reshape(2, 3, 6).mean(1), rtol=1e-12)
    assert bool(runs[1]["stderr"].isnull().all())
    fewer = differentiate(second_moment, OU, OF_OU, **{**settings, "n_replicas": 2})
    np.testing.assert_allclose(fewer["batch_gradient"], each[:2], rtol=1e-12)
    assert list(runs[1]["parameter"].values) == [
        *("kappa", "coupling", "sigma", "initial_mean[0]", "initial_mean[1]", "initial_variance"),
    ]
    pairs = differentiate(second_moment, OU, OF_OU, **{**settings, "noise": Noise(3, antithetic=True)})
    assert pairs["batch_gradient"].shape == (3, 6)


# Closed form ----------------------------------------------------------------------------------------------------------


def euler_second_moment(kappa: Tensor, coupling: Tensor, sigma: Tensor, start: Tensor, variance: Tensor) -> Tensor:
    """E (1/N) Σ |X_i|² after Euler's n steps, d = 1: the mean and the deviations from it are autoregressions."""
    n, h, size = 20, 0.05, 10
    a, b = 1 - kappa * h, 1 - (kappa + coupling) * h
    powers = torch.arange(n)
    mean = a ** (2 * n) * (start**2 + variance / size) + sigma**2 * h / size * (a ** (2 * powers)).sum()
    return mean + (1 - 1 / size) * (b ** (2 * n) * variance + sigma**2 * h * (b ** (2 * powers)).sum())


def within_errors(found: xr.Dataset, expected: Tensor) -> bool:
    """Every component within 4 standard errors over replicas; the expectation is the scheme's own, without bias."""
    return bool((np.abs(found["gradient"] - expected.numpy()) <= 4 * found["stderr"]).all())


def moment(t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
    return mu.integrate(lambda z: z.square().sum(-1))


def test_the_mean_gradient_is_that_of_eulers_moments(monkeypatch):
    scenario = MeanFieldOU()
    numbers = [1.0, 0.5, 0.7, 1.0, 1.0]
    settings = {"n_particles": 10, "horizon": 1.0, "dt": 0.05, "seed": 1, "n_replicas": 300, "n_batches": 60}
    leaves = [torch.tensor(v, **DOUBLE, requires_grad=True) for v in numbers]
    expected = torch.stack(torch.autograd.grad(euler_second_moment(*leaves), leaves))
    found = differentiate(moment, scenario, OF_OU, **settings)
    assert within_errors(found, expected)
    assert float((found["stderr"] / np.abs(expected.numpy())).max()) < 0.1
    # The continuous equation's gradient is another one: the errors are small enough to tell.
    assert not within_errors(found, expected * torch.tensor([1.0, 1.0, 1.2, 1.0, 1.0], **DOUBLE))
    monkeypatch.setattr(Replay, "measure", lambda self, x, step=None: EmpiricalMeasure(x.detach()))
    assert not within_errors(differentiate(moment, scenario, OF_OU, **settings), expected)


# Costs along the way --------------------------------------------------------------------------------------------------


def test_costs_along_the_way_are_differentiated():
    def objective(t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        return (1 + t) * second_moment(t, x, mu)

    times, settings = [0.0, 0.1, 0.38, 0.4], {**SETTINGS, "dt": 0.02}

    def total(case: Any) -> float:
        run = mfsde.simulate(case, **settings, **DOUBLE, save_every=1)
        steps = [torch.from_numpy(x) for x in run["position"].values]
        costs = [objective(k * 0.02, x, EmpiricalMeasure(x)).mean().item() for k, x in enumerate(steps)]
        return sum(costs[round(t / 0.02)] for t in times) + 0.02 * sum(costs[:-1])

    found = differentiate(objective, OU, OF_OU, times=times, running=objective, **settings)
    assert float(found["value"].mean()) == pytest.approx(total(OU), rel=1e-13)
    assert agrees(found, quotients(OU, OF_OU, total))
    steps = list(np.arange(20) * 0.02)
    alone = differentiate(None, OU, OF_OU, running=objective, **settings)
    listed = differentiate(objective, OU, OF_OU, times=steps, **settings)
    np.testing.assert_allclose(alone["gradient"], 0.02 * listed["gradient"], rtol=1e-12)


# Memory ---------------------------------------------------------------------------------------------------------------


class Held:
    """What a graph saves, counted while it lives."""

    alive, peak = 0, 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        Held.alive += tensor.numel()
        Held.peak = max(Held.peak, Held.alive)

    def __del__(self) -> None:
        Held.alive -= self.tensor.numel()


def most_held(n_steps: int) -> int:
    """Largest number of floats that the graph of a run of n steps has at one moment."""
    Held.alive = Held.peak = 0
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        differentiate(second_moment, DoubleWell(), ("theta",), n_particles=50, horizon=1.0, dt=1 / n_steps, seed=0)
    return Held.peak


def grows_like_the_root(few: int, many: int) -> bool:
    """Sixteen times as many steps take four times the memory, to 10 % for what every step needs anyway."""
    return many <= 4.4 * few


def test_memory_grows_like_the_root_of_the_number_of_steps(monkeypatch):
    assert grows_like_the_root(most_held(100), most_held(1600))
    monkeypatch.setattr(sensitivity, "_block", lambda n: n)
    assert not grows_like_the_root(most_held(50), most_held(800))


def test_blocks_cover_every_number_of_steps():
    for n in (1, 2, 3, 5, 16, 17):
        settings = {**SETTINGS, "dt": 0.4 / n}
        found = differentiate(second_moment, OU, ("kappa",), **settings)
        assert agrees(found, quotients(OU, ("kappa",), lambda case: float(value(case, **settings).mean())))  # noqa: B023


# Kinds and precision --------------------------------------------------------------------------------------------------


def test_single_precision_gives_the_same_gradient_to_its_own():
    for scenario, names in ((OU, OF_OU), (Network(), OF_NETWORK), (LawInSigma(), ("a", "b", "c"))):
        if isinstance(scenario, LawInSigma):
            scenario = replace(scenario, matrix=scenario.matrix.float())
        double, single = (differentiate(second_moment, scenario, names, dtype=d, **SETTINGS) for d in REALS)
        size = float(np.abs(double["gradient"]).max())
        np.testing.assert_allclose(single["gradient"], double["gradient"], rtol=0, atol=1e-4 * size)


REALS = (torch.float64, torch.float32)


def test_parameters_are_a_vector_and_back():
    @dataclass
    class Case:
        a: float = 1.5
        rows: tuple[tuple[float, ...], ...] = ((1.0, 2.0), (3.0, 4.0))
        point: list[float] = field(default_factory=lambda: [0.5])
        table: Tensor = field(default_factory=lambda: torch.arange(2.0))
        n: int = 3

    chosen = Parameters.of(Case(), ["table", "a", "rows", "point"])
    assert chosen.vector() == [0.0, 1.0, 1.5, 1.0, 2.0, 3.0, 4.0, 0.5]
    assert chosen.labels()[:4] == ["table[0]", "table[1]", "a", "rows[0,0]"]
    back = chosen.replacing([z + 1 for z in chosen.vector()])
    assert back["a"] == 2.5
    assert back["rows"] == ((2.0, 3.0), (4.0, 5.0))
    assert back["point"] == [1.5]
    assert back["table"].dtype == torch.float32
    assert chosen.leaves()["rows"].shape == (2, 2)


# Refusals -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Leaky:
    """One mistake at a time."""

    a: float = 0.5
    vector: tuple[float, ...] = (0.2, 0.3)
    n: int = 2
    name: str = "x"
    mistake: str = ""
    unused: float = 1.0

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        if self.mistake == "float":
            return -x * float(self.a)
        if self.mistake == "math":
            return -x * math.sqrt(self.a)
        if self.mistake == "half":
            return -self.a * x - float(self.a) * mu.mean()
        if self.mistake == "new_tensor":
            return -x * x.new_tensor(list(self.vector)) * self.a
        if self.mistake == "law":
            return -self.a * (x - 0.5 * EmpiricalMeasure(x.detach()).mean())
        if self.mistake == "alpha":
            return torch.sub(mu.mean(), x, alpha=self.a)
        if self.mistake == "concatenation":
            return -self.a * x * len(self.vector + self.vector)
        if self.mistake == "random":
            return -self.a * x + torch.rand(x.shape, dtype=x.dtype)
        if self.mistake == "norm":
            return -self.a * x - (0 * self.vector[0] * x).square().sum(-1, keepdim=True).sqrt()
        return -self.a * x * torch.as_tensor(self.vector, dtype=x.dtype, device=x.device)

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Any:
        return 0.3

    def initial(self) -> Any:
        if self.mistake == "atoms":
            return Mixture([Gaussian([0.0, 0.0], 1.0)] * 2, [self.a, 1 - self.a])
        return Gaussian([0.0, 1.0], math.sqrt(self.a) if self.mistake == "initial" else 1.0)


MISTAKES = {
    "float": (r"Leaky.drift: the automatic derivative along a step is 0", ("a",)),
    "math": (r"Leaky.drift: .* with respect to Leaky.a. Something on the way leaves torch", ("a",)),
    "half": (r"Leaky.drift: .* with respect to Leaky.a", ("a",)),
    "new_tensor": (r"Leaky.drift: .* with respect to Leaky.vector", ("a", "vector")),
    "law": (r"Leaky.drift: .* with respect to x\. .*x\.detach\(\)", ("a",)),
    "concatenation": (r"Leaky.drift has other values where its parameters are tensors", ("vector",)),
    "initial": (r"Leaky.initial: .* with respect to Leaky.a", ("a",)),
    "atoms": (r"a sample jumps from one component to another", ("a",)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_loses_a_derivative_is_refused_before_the_run(mistake):
    message, names = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        differentiate(second_moment, Leaky(mistake=mistake), names, **SETTINGS)


def test_other_coefficients_that_cannot_be_differentiated_are_refused():
    with pytest.raises(TypeError, match=r"Leaky fails where a are tensors.*alpha.*a - k \* x"):
        differentiate(second_moment, Leaky(mistake="alpha"), ("a",), **SETTINGS)
    with pytest.raises(RuntimeError, match=r"computed once more, the state at step 10 differs"):
        _unchecked(second_moment, Leaky(mistake="random"), ("a",)).evaluate()
    with pytest.raises(ValueError, match=r"the objective does not depend on Leaky.unused"):
        differentiate(second_moment, Leaky(), ("a", "unused"), **SETTINGS)
    with pytest.raises(FloatingPointError, match=r"derivative with respect to Leaky.a is not finite.*norm"):
        _unchecked(second_moment, Leaky(mistake="norm"), ("a", "vector")).evaluate()


def _unchecked(objective: Any, scenario: Any, names: tuple[str, ...]) -> sensitivity.Sensitivity:
    """The problem without the comparison before the run."""
    extra = dict.fromkeys(("save_every", "keep_particles", "noise", "checkpoint_every"))
    settings = sensitivity.Settings.checked(**SETTINGS, **DOUBLE, **extra, method="euler", device="cpu")
    return sensitivity.Sensitivity.start(objective, scenario, names, settings, None, None, None)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (("kapa",), ValueError, r"Leaky has no parameter 'kapa'; its fields are a, vector"),
        (("n",), TypeError, r"Leaky.n is or contains 2, an integer"),
        (("name",), TypeError, r"Leaky.name is or contains 'x', a str"),
        ((), ValueError, r"expected at least one field of Leaky"),
        (("a", "a"), ValueError, r"each once"),
    ],
)
def test_parameters_that_are_none_are_refused(names, error, message):
    with pytest.raises(error, match=message):
        differentiate(second_moment, Leaky(), names, **SETTINGS)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"a": math.nan}, ValueError, "Leaky.a = nan is not finite"),
        ({"vector": ()}, ValueError, "Leaky.vector is empty"),
        ({"vector": (0.5, 1)}, TypeError, "Leaky.vector is or contains 1, an integer"),
        ({"vector": torch.tensor([1, 2])}, TypeError, r"tensor of torch.int64; a derivative needs a floating one"),
        ({"vector": torch.zeros(0)}, ValueError, "empty tensor"),
    ],
)
def test_values_without_a_derivative_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        differentiate(second_moment, replace(Leaky(), **change), tuple(change), **SETTINGS)


@pytest.mark.parametrize(
    ("objective", "error", "message"),
    [
        (
            lambda t, x, mu: second_moment(t, x, mu).detach(),
            ValueError,
            r"objective\(t, x, mu\) returned numbers without",
        ),
        (lambda t, x, mu: torch.ones(len(x)), ValueError, "without a graph: they do not depend on x"),
        (
            lambda t, x, mu: moment(t, x, mu) * mu.mean().detach().sum((-2, -1)),
            ValueError,
            r"objective\(t, x, mu\): the",
        ),
        (
            lambda t, x, mu: mu.mean(),
            ValueError,
            r"returned shape \(2, 1, 2\) for 2 replicas; expected a tensor \(2,\)",
        ),
        (lambda t, x, mu: 1.0, ValueError, "returned a float for 2 replicas"),
        (lambda t, x, mu: moment(t, x, mu) / 0, FloatingPointError, "the objective is inf in replica 0"),
        ("energy", TypeError, "objective is a str; expected a function"),
        (None, TypeError, "there is nothing to differentiate"),
    ],
)
def test_objectives_that_are_none_are_refused(objective, error, message):
    with pytest.raises(error, match=message):
        differentiate(objective, OU, ("kappa",), **SETTINGS)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"method": "srk"}, ValueError, "method 'srk' cannot be differentiated.*Use one of euler, milstein, heun"),
        ({"method": "sgd"}, ValueError, "sampled data"),
        ({"method": "dopri5"}, ValueError, "step sizes depend on the state"),
        ({"method": "proximal"}, ValueError, "sets coordinates to zero"),
        *(({"method": m}, ValueError, f"'{m}' cannot be") for m in ("midpoint", "euler_heun", "baoab", "obabo")),
        (
            {"times": [0.405]},
            ValueError,
            "times contain 0.405, which is no multiple of dt = 0.04 .* nearest one is 0.4",
        ),
        ({"times": [0.04, 0.04]}, ValueError, "each once"),
        ({"times": []}, ValueError, "at least one time"),
        ({"n_batches": 3}, ValueError, "n_batches = 3 does not divide the 2 replicas"),
        ({"n_batches": 1.0}, TypeError, "n_batches = 1.0; expected a whole number"),
        ({"dtype": torch.float16}, TypeError, "expected torch.float32 or torch.float64"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        differentiate(second_moment, OU, ("kappa",), **{**SETTINGS, **change})


def test_jumps_have_no_derivative_of_the_path():
    @dataclass(frozen=True)
    class Selected(MeanFieldOU):
        def birth_death_rate(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
            return x.square().sum(-1)

    with pytest.raises(ValueError, match=r"Selected has births and deaths.*finite differences.*likelihood ratio"):
        differentiate(second_moment, Selected(), ("kappa",), **SETTINGS)


def test_a_run_that_blows_up_says_where():
    with pytest.raises(mfsde.BlowUp, match="DoubleWell blew up"):
        differentiate(second_moment, DoubleWell(initial_variance=1e6), ("theta",), **SETTINGS)


# Fitting --------------------------------------------------------------------------------------------------------------

TRUTH = MeanFieldOU(kappa=1.3, sigma=0.6, initial_variance=0.2)
TIMES = [0.25, 0.5, 0.75, 1.0]
FIT: dict[str, Any] = {"n_particles": 100, "horizon": 1.0, "dt": 0.05, "n_replicas": 2, "times": TIMES}


def misfit(means: dict[float, float], variances: dict[float, float]) -> Any:
    """Squared deviations of mean and variance from those observed."""

    def objective(t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        k = round(t, 9)
        return (mu.mean()[:, 0, 0] - means[k]).square() + (mu.covariance()[:, 0, 0] - variances[k]).square()

    return objective


def euler_moments(scenario: MeanFieldOU) -> tuple[dict[float, float], dict[float, float]]:
    """Mean and variance of Euler's law at TIMES, N → ∞."""
    means, variances, m, v, h = {}, {}, scenario.initial_mean[0], scenario.initial_variance, FIT["dt"]
    for k in range(1, 21):
        m, v = (
            m * (1 - scenario.kappa * h),
            v * (1 - (scenario.kappa + scenario.coupling) * h) ** 2 + scenario.sigma**2 * h,
        )
        means[round(k * h, 9)], variances[round(k * h, 9)] = m, v
    return means, variances


def test_a_fit_to_a_run_of_the_same_noise_finds_its_parameters():
    run = mfsde.simulate(TRUTH, seed=5, save_every=5, observables=("mean", "covariance"), **DOUBLE,
                         **{k: FIT[k] for k in ("n_particles", "horizon", "dt")})  # fmt: skip
    at = [round(float(t), 9) for t in run["time"]]
    seen = [dict(zip(at, run[name].values.reshape(-1), strict=True)) for name in ("mean", "covariance")]
    start = replace(TRUTH, kappa=0.4, sigma=1.2)
    fitted, history = fit(misfit(*seen), start, ("kappa", "sigma"), seed=5, **{**FIT, "n_replicas": 1}, tolerance=1e-9)
    assert fitted.kappa == pytest.approx(1.3, abs=1e-6)
    assert fitted.sigma == pytest.approx(0.6, abs=1e-6)
    assert fitted == replace(TRUTH, kappa=fitted.kappa, sigma=fitted.sigma)
    assert history["value"].values[-1] < 1e-15 < history["value"].values[0]
    np.testing.assert_array_equal(history["parameters"][0], [0.4, 1.2])
    assert history.attrs["scenario"] == "MeanFieldOU"


def test_a_fit_is_the_same_whether_replicas_are_differentiated_together_or_apart(monkeypatch):
    found = []
    for apart in (10_000, 1):
        monkeypatch.setattr(mfsde.calibration, "APART", apart)
        fitted, _ = fit(misfit(*euler_moments(TRUTH)), TRUTH, ("kappa", "sigma"), seed=2, **FIT)
        found.append([fitted.kappa, fitted.sigma])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def recovers(scenario: MeanFieldOU, seeds: range) -> bool:
    """Whether fits with several seeds surround the truth: within 4 standard errors, and 2/N for the curved misfit."""
    objective = misfit(*euler_moments(TRUTH))
    start = replace(scenario, kappa=0.8, sigma=1.0)
    bounds = {"sigma": (0.01, None)}
    found = []
    for seed in seeds:
        fitted, _ = fit(objective, start, ("kappa", "sigma"), seed=seed, bounds=bounds, **FIT)
        found.append([fitted.kappa, fitted.sigma])
    errors = np.array(found) - [TRUTH.kappa, TRUTH.sigma]
    stderr = errors.std(0, ddof=1) / len(errors) ** 0.5
    return bool((np.abs(errors.mean(0)) <= 4 * stderr + 2 / FIT["n_particles"]).all())


def test_fits_with_several_seeds_surround_the_truth():
    assert recovers(TRUTH, range(8))
    # A pull to the mean that is not there is paid for with σ.
    assert not recovers(replace(TRUTH, coupling=0.0), range(8))


def test_fits_that_cannot_be_made_are_refused():
    objective = misfit(*euler_moments(TRUTH))
    refused = {
        "bounds for sigma, which is not fitted": {"bounds": {"sigma": (0, 1)}},
        r"kappa starts at 1.3, outside its bounds \(2, None\)": {"bounds": {"kappa": (2, None)}},
        "tolerance = 0": {"tolerance": 0},
        "max_iterations = 0": {"max_iterations": 0},
    }
    for message, change in refused.items():
        with pytest.raises(ValueError, match=message):
            fit(objective, TRUTH, ("kappa",), seed=0, **FIT, **change)
    start = replace(TRUTH, kappa=0.1, sigma=2.0)
    with pytest.raises(mfsde.NotConverged, match="has not converged after 1 iterations") as caught:
        fit(objective, start, ("kappa", "sigma"), seed=0, max_iterations=1, **FIT)
    assert dataclasses.is_dataclass(caught.value.scenario)
    assert caught.value.history.sizes["parameter"] == 2
    with pytest.raises(FloatingPointError) as blown:
        fit(objective, replace(TRUTH, kappa=-1e300), ("kappa",), seed=0, **FIT)
    assert "keep the search away from there with bounds" in "".join(blown.value.__notes__)
