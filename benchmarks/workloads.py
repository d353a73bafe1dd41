"""The five workloads of the comparison: each as an mfsde scenario, and as plain float64 arithmetic to check against.

A  mean-field Ornstein-Uhlenbeck, d = 1          dX = -(κX + α(X - E X)) dt + σ dW
B  Gaussian attraction, d = 2                    dX = -((∇W * m)(X) + (σ²/2) X) dt + σ dW,  W(z) = -exp(-|z|²/2)
C  two-layer tanh network, n = 1000, d = 20      dX = -(D_mF(m, X) + (σ²/2) X) dt + σ dW,  F the squared risk
D  digits, minibatches of 32                     the same with F on the minibatch of a step, logistic loss, d = 66
E  births and deaths, d = 1                      dX = -X dt + σ dW; rate V = x²/2 per unit time

Everyone who is compared takes Euler steps of the same length from the same points, with noise of their own.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mfsde
from mfsde import scenarios

# A power of two: sums of steps are then exact in every floating format, and nobody takes an additional tiny step.
DT = 2.0**-7

N_DATA, N_INPUTS = 1000, 19
BATCH = 32


@dataclass(frozen=True)
class Case:
    """One size of a workload.

    sigma: σ, None for the workload's own. batch: data in a minibatch (D only); 0 takes all data once, which leaves no
    randomness.
    """

    workload: str
    n: int
    replicas: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    sigma: float | None = None
    batch: int = BATCH

    @property
    def of(self) -> Workload:
        return WORKLOADS[self.workload]

    @property
    def noise(self) -> float:
        """σ."""
        return self.of.sigma if self.sigma is None else self.sigma

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == "float64" else torch.float32

    def start(self) -> np.ndarray:
        """The points that everyone starts from, (R, N, d); not to be written to."""
        return _start(self.workload, self.replicas, self.n, self.dtype)

    def tensor(self) -> Tensor:
        """The same, a fresh tensor on the case's device."""
        return torch.tensor(self.start(), device=self.device)

    def without_noise(self) -> Case:
        return dataclasses.replace(self, sigma=0.0, batch=0)

    def __str__(self) -> str:
        size = f"N = {self.n:,}" if self.replicas == 1 else f"{self.replicas} x N = {self.n:,}"
        return f"{size} {self.dtype}" + ("" if self.device == "cpu" else f" {self.device}")


@functools.lru_cache(maxsize=2)
def _start(workload: str, replicas: int, n: int, dtype: str) -> np.ndarray:
    of = WORKLOADS[workload]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((replicas, n, of.dim), dtype=np.float32)
    x *= of.start_deviation
    x += of.start_mean
    x = x.astype(dtype)
    x.flags.writeable = False
    return x


class Cloud(mfsde.Law):
    """The law of the points that everyone starts from."""

    def __init__(self, points: np.ndarray) -> None:
        self._points = points

    @property
    def dim(self) -> int:
        return self._points.shape[-1]

    def from_variates(self, z: Tensor) -> Tensor:
        # A run that is being planned asks for the first few.
        few = self._points[: z.shape[0], : z.shape[-2]]
        return torch.tensor(few).to(z).reshape(z.shape)

    def as_measure(self) -> mfsde.EmpiricalMeasure:
        return mfsde.EmpiricalMeasure(torch.tensor(self._points[0], dtype=torch.float64))


def started(scenario: Any, case: Case) -> Any:
    """The scenario, with the case's points for its initial law."""
    kind = type(scenario)
    cloud = Cloud(case.start())
    named = type(kind.__name__, (kind,), {"initial": lambda self: cloud, "__module__": kind.__module__})
    values = {f.name: getattr(scenario, f.name) for f in dataclasses.fields(scenario)}
    return named(**values)


class Workload(abc.ABC):
    """letter, title, dim and σ; the `scenario` and what a step costs at least.

    Those whose particles move without noise have `drift` too, in float64: of every particle at σ = 0, where nothing
    confines, (N, d) -> (N, d).
    """

    letter: str
    title: str
    dim: int
    sigma: float
    method = "euler"
    start_mean = 0.0
    start_deviation = 1.0
    # What a step is divided by in the table, and its unit.
    unit = "ns/particle"

    @abc.abstractmethod
    def scenario(self, case: Case, strategy: Any = None) -> Any:
        """The equation that mfsde runs."""

    def value(self, case: Case, seconds: float) -> float:
        """The cost of a step in the unit of the table."""
        return seconds * 1e9 / (case.replicas * case.n)


class OU(Workload):
    letter, title, dim, sigma = "A", "mean-field OU", 1, 0.7
    kappa, coupling = 1.0, 0.5
    start_mean = 1.0

    def scenario(self, case: Case, strategy: Any = None) -> Any:
        return scenarios.MeanFieldOU(self.kappa, self.coupling, case.noise)

    def drift(self, x: np.ndarray) -> np.ndarray:
        return -(self.kappa * x + self.coupling * (x - x.mean(0)))

    def law(self, x: np.ndarray, steps: int) -> tuple[float, float, float, float]:
        """Mean and variance of the particles after Euler steps from x (N,), and the standard errors of both.

        The empirical mean is a Gaussian chain of its own. Deviations from it are Gaussian given the start, of variance
        g = Σ σ²h a^{2k}(1 - 1/N) around the start's deviations shrunk by a^steps.
        """
        n, h, a, b = len(x), DT, 1 - (self.kappa + self.coupling) * DT, 1 - self.kappa * DT
        gained = self.sigma**2 * h * sum(a ** (2 * k) for k in range(steps))
        kept = float(np.var(x, dtype=np.float64)) * a ** (2 * steps)
        mean_error = math.sqrt(self.sigma**2 * h / n * sum(b ** (2 * k) for k in range(steps)))
        error = math.sqrt((2 * gained**2 + 4 * gained * kept) / n)
        return float(x.mean(dtype=np.float64)) * b**steps, kept + gained * (1 - 1 / n), mean_error, error


def attraction(z: Tensor) -> Tensor:
    """W(z) = -exp(-|z|²/2)."""
    return -torch.exp(-0.5 * z.square().sum(-1))


@dataclass(frozen=True)
class GaussianAttraction(mfsde.MeanFieldLangevin):
    """The W₂ gradient flow of ½ ∬ W dm dm + (σ²/2) KL(m | N(0, I))."""

    sigma: float = 0.5

    strategy = None

    @cached_property
    def energy(self) -> mfsde.Energy:
        if self.strategy is None:
            return mfsde.interaction(attraction)
        return mfsde.interaction(attraction, strategy=self.strategy)

    def confinement(self, x: Tensor) -> Tensor:
        return 0.5 * x.square().sum(-1)

    def confinement_gradient(self, x: Tensor) -> Tensor:
        return x

    def initial(self) -> mfsde.Gaussian:
        return mfsde.Gaussian([0.0, 0.0], 1.0)


class Attraction(Workload):
    letter, title, dim, sigma = "B", "Gaussian attraction", 2, 0.5
    unit = "ns/pair"

    def scenario(self, case: Case, strategy: Any = None) -> Any:
        chosen = type("GaussianAttraction", (GaussianAttraction,), {"strategy": strategy, "__module__": __name__})
        return chosen(case.noise)

    def drift(self, x: np.ndarray) -> np.ndarray:
        parts = []
        for rows in np.array_split(x, max(1, len(x) ** 2 // 1_000_000)):
            apart = x - rows[:, None]
            parts.append((np.exp(-0.5 * (apart**2).sum(-1))[..., None] * apart).mean(1))
        return np.concatenate(parts)

    def value(self, case: Case, seconds: float) -> float:
        return seconds * 1e9 / (case.replicas * case.n**2)


@functools.cache
def network_data() -> tuple[np.ndarray, np.ndarray]:
    """Inputs (n, p) and targets (n,), float32."""
    inputs = np.random.default_rng(1).standard_normal((N_DATA, N_INPUTS), dtype=np.float32)
    return inputs, np.sin(inputs[:, 0])


@dataclass(frozen=True)
class Network(mfsde.MeanFieldLangevin):
    """Squared risk of ∫ β tanh(α·z) m(dθ), prior N(0, I)."""

    sigma: float = 0.1

    @cached_property
    def energy(self) -> mfsde.Energy:
        return mfsde.risk(mfsde.Neuron("tanh"), "squared", *network_data())

    def confinement(self, x: Tensor) -> Tensor:
        return 0.5 * x.square().sum(-1)

    def confinement_gradient(self, x: Tensor) -> Tensor:
        return x

    def initial(self) -> mfsde.Gaussian:
        return mfsde.Gaussian([0.0] * (N_INPUTS + 1), 1.0)


class TanhNetwork(Workload):
    letter, title, dim, sigma = "C", "two-layer tanh network", N_INPUTS + 1, 0.1
    unit = "ms/step"

    def scenario(self, case: Case, strategy: Any = None) -> Any:
        return Network(case.noise)

    def drift(self, x: np.ndarray) -> np.ndarray:
        z, y = (a.astype(float) for a in network_data())
        alpha, beta = x[:, :-1], x[:, -1:]
        hidden = np.tanh(alpha @ z.T)
        r = (hidden.T @ beta[:, 0] / len(x) - y) / len(y)
        slope = beta * ((1 - hidden**2) @ (z * r[:, None]))
        return -np.concatenate([slope, (hidden @ r)[:, None]], axis=1)

    def value(self, case: Case, seconds: float) -> float:
        return 1e3 * seconds


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Inputs (n, p) with a constant column and targets ±1, float32."""
    data = scenarios.datasets.load("digits")
    return data.train_inputs.numpy().astype(np.float32), data.train_targets.numpy().astype(np.float32)


@dataclass(frozen=True)
class Training(scenarios.TwoLayerNetwork):
    """The network without its observables, whose evaluation is no part of a step."""

    def observables(self) -> tuple[Any, ...]:
        return ()


class Digits(Workload):
    letter, title, dim, sigma = "D", f"digits, minibatches of {BATCH}", 66, 0.2
    scale = 20.0
    method = "sgd"
    unit = "µs/step"

    def scenario(self, case: Case, strategy: Any = None) -> Any:
        of, n = Training(scale=self.scale), len(digits()[0])
        sampling = "with_replacement" if case.batch else "without_replacement"
        return mfsde.NoisySGDOf(of, sigma=case.noise, batch_size=case.batch or n, sampling=sampling)

    def drift(self, x: np.ndarray) -> np.ndarray:
        z, y = (a.astype(float) for a in digits())
        alpha, beta = x[:, :-1], x[:, -1:]
        hidden = np.tanh(alpha @ z.T)
        f = self.scale * hidden.T @ beta[:, 0] / len(x)
        r = -self.scale * y / (1 + np.exp(y * f)) / len(y)
        slope = beta * ((1 - hidden**2) @ (z * r[:, None]))
        return -np.concatenate([slope, (hidden @ r)[:, None]], axis=1)

    def value(self, case: Case, seconds: float) -> float:
        return 1e6 * seconds


class Births(Workload):
    letter, title, dim, sigma = "E", "births and deaths", 1, 1.0
    alpha = 1.0
    start_deviation = 0.7**0.5

    def scenario(self, case: Case, strategy: Any = None) -> Any:
        from .birth_death import Quadratic

        return Quadratic(self.alpha, case.noise)

    def variance(self, v: float, steps: int) -> float:
        """After transport and selection in turn: v' = -2v + σ² - αv², a Gaussian staying one."""
        for _ in range(steps):
            v = (1 - DT) ** 2 * v + self.sigma**2 * DT
            v = v / (1 + self.alpha * v * DT)
        return v


WORKLOADS: dict[str, Workload] = {w.letter: w for w in (OU(), Attraction(), TanhNetwork(), Digits(), Births())}
