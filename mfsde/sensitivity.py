"""Derivatives of a functional of the law with respect to the parameters of a scenario, through the whole run.

The run is a composition of steps, X_{k+1} = Φ_k(X_k, θ) with the noise of step k fixed by its key, and

    J_r(θ) = Σ_{k in times} objective(t_k, X_k, m_k) + dt Σ_{k < n} running(t_k, X_k, m_k),      m_k the replica's law.

Its derivative goes backwards (adjoint states λ_k = ∂J/∂X_k), the law's dependence on all particles included. The run
itself is `simulate`'s own, bit for bit; of its states every ⌈√n⌉-th is kept. From the last block of ⌈√n⌉ steps to the
first, each is then computed once more with its graph and differentiated: memory of O(√n) states, for twice the work of
backpropagation that keeps them all.

Source: Griewank, Walther, Evaluating derivatives (2008), ch. 12; Glasserman, Monte Carlo methods in financial
engineering (2004), ch. 7.2, on when derivatives of paths are derivatives of expectations.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from . import differentiability
from .clock import Clock
from .measure import EmpiricalMeasure
from .model import has_births, replaced, scenario_name
from .model import parameters as parameters_of
from .noise import Noise
from .pairwise.convolution import recorded
from .parameters import Parameters
from .provenance import canonical, encode
from .replay import METHODS, Replay, initial_state
from .run import System
from .settings import Settings, label
from .solver import integrate
from .tape import recording
from .torus import shortest

Functional = Callable[[float, Tensor, EmpiricalMeasure], Tensor]

REASONS = {
    "srk": "its strong order needs iterated integrals whose derivative is not written",
    "sgd": "sampled data make a discrete process, whose step has no limit that a parameter moves smoothly",
    "dopri5": "its step sizes depend on the state, and jump with it",
    "proximal": "a proximal map sets coordinates to zero, and its derivative is not written",
}


def differentiate(
    objective: Functional | None,
    scenario: Any,
    parameters: Iterable[str],
    *,
    n_particles: int,
    horizon: float,
    dt: float,
    seed: int,
    n_replicas: int = 1,
    times: Iterable[float] | None = None,
    running: Functional | None = None,
    n_batches: int | None = None,
    method: str = "euler",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float64,
    noise: Noise | None = None,
) -> xr.Dataset:
    """The gradient of a functional of the law with respect to parameters of the scenario, under fixed noise.

    It is the exact derivative of the number that `simulate` leads to with these settings (of the particle system and
    of the scheme, not of their limits), the dependence of the law on the parameters included.

    Args:
        objective: (t, x, mu) -> (R,), one number for each replica, a function of the replica's law; x (R, N, d). It
            sees no parameters: what it holds itself is a constant. None where `running` is all.
        scenario: as for `simulate`.
        parameters: names of fields: floats, sequences of floats or floating tensors, those of the initial law included.
        n_particles: N.
        horizon: final time, a whole number of steps dt.
        dt: step size.
        seed: the key of all randomness, as for `simulate`.
        n_replicas: independent copies of the whole system.
        times: where the objective is evaluated and summed, multiples of dt in [0, horizon]; the horizon when None.
        running: a rate (t, x, mu) -> (R,); Σ_k dt·running(t_k) over the steps is added.
        n_batches: number of batches of replicas with a gradient of their own, from which the standard error comes; the
            replicas must divide into it. None: one for each replica (each antithetic pair), at the cost in overhead of
            as many backward passes.
        method: "euler"; "milstein" or "heun" where `simulate` takes them.
        device: "cpu" or "cuda".
        dtype: torch.float64, or torch.float32 where a relative error of 1e-3 and more in the gradient does no harm.
        noise: `mfsde.Noise(seed, ...)`, as for `simulate`.

    Returns:
        Dataset with `value(replica)`, `gradient(parameter)`: that of the mean over replicas, `stderr(parameter)`: its
        standard error over batches (NaN for a single one), and `batch_gradient(batch, parameter)`.

    Raises:
        TypeError, ValueError: bad input; an objective or coefficients through which no derivative passes, or a wrong
            one (compared with difference quotients before the run); births and deaths, whose jumps have no path-wise
            derivative; a parameter that the objective does not depend on.
        FloatingPointError: the objective or its gradient is not finite.
        BlowUp: the state stopped being finite.

    """
    settings = Settings.checked(
        n_particles=n_particles, horizon=horizon, dt=dt, seed=seed, n_replicas=n_replicas, save_every=None,
        keep_particles=None, method=method, device=device, dtype=dtype, noise=noise, checkpoint_every=None,
    )  # fmt: skip
    problem = Sensitivity.start(objective, scenario, parameters, settings, times, running, n_batches)
    problem.check()
    return problem.dataset(*problem.evaluate())


@dataclasses.dataclass
class Sensitivity:
    """A run and what is differentiated: objective at some steps, running cost, parameters, batches of replicas."""

    system: System
    parameters: Parameters
    objective: Functional | None
    running: Functional | None
    steps: frozenset[int]
    batches: list[slice]

    @classmethod
    def start(
        cls,
        objective: Functional | None,
        scenario: Any,
        parameters: Iterable[str],
        settings: Settings,
        times: Iterable[float] | None,
        running: Functional | None,
        n_batches: int | None,
    ) -> Sensitivity:
        """The problem, checked as far as that needs no evaluation."""
        _check_differentiable(scenario, settings.method)
        if objective is None and running is None:
            raise TypeError("objective is None and so is running; there is nothing to differentiate.")
        for name, functional in (("objective", objective), ("running", running)):
            if functional is not None and not callable(functional):
                raise TypeError(f"{name} is a {type(functional).__name__}; expected a function (t, x, mu) -> (R,).")
        chosen = Parameters.of(scenario, parameters)
        steps = frozenset() if objective is None else _steps(times, settings)
        batches = _batches(n_batches, settings)
        return cls(System.start(scenario, settings, ()), chosen, objective, running, steps, batches)

    def at(self, scenario: Any) -> Sensitivity:
        """The same for other values of the parameters, without the comparison with difference quotients."""
        system = System.start(scenario, self.system.settings, ())
        return dataclasses.replace(self, system=system)

    @property
    def clock(self) -> Clock:
        """Steps to times."""
        return Clock(self.system.settings.dt)

    def check(self) -> None:
        """Compares automatic derivatives of the coefficients with difference quotients.

        Raises:
            TypeError, ValueError: they cannot be taken, or are wrong.

        """
        system, settings = self.system, self.system.settings
        times = (0.0, self.clock.time(settings.n_steps // 2))
        with _quiet():
            differentiability.check(
                system.equation.scenario, self.parameters, system.x, system.equation.weights, times,
                lambda scenario: initial_state(scenario, settings, slice(0, 1), system.x)[0],
            )  # fmt: skip

    def evaluate(self, check: bool = True) -> tuple[list[float], list[list[float]]]:
        """Values of the replicas, and the gradient of every batch's mean.

        `check` compares the objective's derivative at the last state with a difference quotient.

        Raises:
            ValueError: the objective returns something else than one number per replica, or no graph.
            FloatingPointError: value or gradient is not finite.

        """
        with _quiet():
            values, states = self._forward(check)
            gradients = [self._backward(rows, states) for rows in self.batches]
        self._check_gradients(gradients)
        flat = [[float(z) for g in found.values() if g is not None for z in g.flatten()] for found in gradients]
        return values, flat

    def dataset(self, values: list[float], gradients: list[list[float]]) -> xr.Dataset:
        """What `differentiate` returns."""
        table = xr.DataArray(gradients, dims=("batch", "parameter"))
        mean, count = table.mean("batch"), len(gradients)
        error = table.std("batch", ddof=1) / math.sqrt(count) if count > 1 else mean * math.nan
        found = xr.Dataset(
            {
                "value": ("replica", values, {"long_name": "objective", "units": "1"}),
                "gradient": mean.assign_attrs(long_name="derivative of the mean objective", units="1"),
                "stderr": error.assign_attrs(long_name="standard error of the gradient", units="1"),
                "batch_gradient": table.assign_attrs(long_name="derivative of a batch's mean objective", units="1"),
            },
            {"parameter": self.parameters.labels()},
        )
        return found.assign_attrs(self.provenance())

    def provenance(self) -> dict[str, Any]:
        """Scenario and settings."""
        system = self.system
        values = {name: encode(value) for name, value in parameters_of(system.scenario).items()}
        names = ("method", "device", "dtype", "n_particles", "n_replicas", "horizon", "dt", "seed", "substeps")
        described = {"scenario": system.equation.name, "parameters": canonical(values)}
        told = recorded(system.equation.strategies) | {"noise": system.settings.noise.identity()}
        described |= {name: canonical(value) for name, value in told.items()}
        return described | {name: getattr(system.settings, name) for name in names}

    def _forward(self, check: bool) -> tuple[list[float], dict[int, Tensor]]:
        """Runs as `simulate` does; returns values and the states from which blocks start."""
        system, n = self.system, self.system.settings.n_steps
        starts = range(0, n, _block(n))
        total = torch.zeros(system.x.shape[0], dtype=torch.float64, device=system.x.device)
        states: dict[int, Tensor] = {}

        def watch(step: int, x: Tensor) -> None:
            if step in starts or step == n:
                states[step] = x.clone()
            for factor, name, functional in self._terms(step):
                total.add_(self._evaluated(name, functional, step, x, system.equation.measure(x)), alpha=factor)

        stops = sorted({*starts, n, *self.steps, *(range(n) if self.running else ())} - {0})
        x = system.x.clone()
        with torch.no_grad():
            watch(0, x)
            integrate(
                system.equation, x, 0, n, self.clock, system.settings.noise, system.method, stops, watch
            )  # fmt: skip
        self._check_values(total)
        if check:
            self._check_objective(states[n])
        values: list[float] = total.tolist()
        return values, states

    def _backward(self, rows: slice, states: dict[int, Tensor]) -> dict[str, Tensor | None]:
        """The gradient of the mean over some replicas; None for a parameter that no path leads to."""
        system = self.system
        weights, base = system.equation.weights, system.equation.scenario
        leaves = Parameters.of(base, self.parameters.values).leaves()
        mass = None if weights is None else weights[rows].detach().clone().requires_grad_()
        last = system.settings.n_steps
        adjoint = _Adjoint(leaves, mass, torch.zeros_like(states[last][rows]))
        for first in reversed([*states][:-1]):
            # What a scenario caches of its parameters has a graph that one backward pass uses up: each has its own.
            replay = Replay(system, replaced(base, leaves), mass, rows.start)
            # In a method of its own, so that the graph is gone before the next one is built.
            self._pull_back(adjoint, replay, (first, last), states[first][rows], states[last][rows])
            last = first
        with recording():
            adjoint.arrive(*initial_state(replaced(base, leaves), system.settings, rows, system.x))
        return adjoint.gradient

    def _pull_back(self, adjoint: _Adjoint, replay: Replay, steps: tuple[int, int], start: Tensor, end: Tensor) -> None:
        x = start.detach().clone().requires_grad_()
        with recording():
            y, cost = self._block(replay, x, *steps)
            _check_replayed(self.system, y, end, steps[1])
            adjoint.pull_back(x, y, cost / len(x))

    def _block(self, replay: Replay, x: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
        """The state at step `last`, and the costs of steps first, ..., last - 1 (and of the very last)."""
        cost = x.new_zeros((), dtype=torch.float64)
        for step in range(first, last):
            cost = cost + self._cost(replay, step, x)
            x = replay.step(step, x)
        if last == self.system.settings.n_steps:
            cost = cost + self._cost(replay, last, x)
        return x, cost

    def _cost(self, replay: Replay, step: int, x: Tensor) -> Tensor | float:
        total: Tensor | float = 0.0
        for factor, name, functional in self._terms(step):
            total = total + factor * self._evaluated(name, functional, step, x, replay.measure(x)).double().sum()
        return total

    def _terms(self, step: int) -> Iterator[tuple[float, str, Functional]]:
        """What is added at a step, with its factor."""
        if self.objective is not None and step in self.steps:
            yield 1.0, "objective", self.objective
        if self.running is not None and step < self.system.settings.n_steps:
            yield self.system.settings.dt, "running", self.running

    def _evaluated(self, name: str, functional: Functional, step: int, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        value = functional(self.clock.time(step), x, mu)
        if not isinstance(value, Tensor) or value.shape != x.shape[:1]:
            told = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ValueError(
                f"{name}(t, x, mu) returned {told} for {x.shape[0]} replicas; expected a tensor ({x.shape[0]},), one "
                "number for each: mu.integrate(f) has that shape, mu.mean().sum((-2, -1)) too."
            )
        return value

    def _check_values(self, total: Tensor) -> None:
        if not bool(torch.isfinite(total).all()):
            replica = int(torch.nonzero(~torch.isfinite(total))[0])
            raise FloatingPointError(
                f"the objective is {float(total[replica])} in replica {replica}; a gradient needs finite values. Check "
                "it for a division by zero or a logarithm of a negative number."
            )

    def _check_objective(self, x: Tensor) -> None:
        """Whether its derivative with respect to the state is there, and right."""
        weights = self.system.equation.weights
        for name, functional in (("objective", self.objective), ("running", self.running)):
            if functional is None:
                continue
            t = self.clock.time(max(self.steps)) if name == "objective" else 0.0

            def value(y: Tensor, name: str = name, functional: Functional = functional, t: float = t) -> Tensor:
                mu = EmpiricalMeasure(y, period=self.system.equation.period)
                if weights is not None:
                    mu = EmpiricalMeasure.signed(y, weights[:1], self.system.equation.period)
                return self._evaluated(name, lambda _, z, m: functional(t, z, m), 0, y, mu)

            differentiability.check_functional(name, value, x[:1])

    def _check_gradients(self, gradients: list[dict[str, Tensor | None]]) -> None:
        name = self.system.equation.name
        for parameter in self.parameters.values:
            parts = [found[parameter] for found in gradients]
            if any(part is None for part in parts):
                raise ValueError(
                    f"the objective does not depend on {name}.{parameter}: it enters neither the initial law nor a "
                    "coefficient that the objective sees, and its derivative is zero. Leave it out."
                )
            if not all(bool(torch.isfinite(part).all()) for part in parts if part is not None):
                raise FloatingPointError(
                    f"the derivative with respect to {name}.{parameter} is not finite. Either a square root, norm or "
                    "logarithm is differentiated at 0 (σ or a variance that is 0), or adjoints grow beyond all bounds: "
                    "try a shorter horizon, a smaller dt, or finite differences with the same seed."
                )


class _Adjoint:
    """λ = ∂J/∂x on its way back, with what has been gathered for weights and parameters."""

    def __init__(self, leaves: dict[str, Tensor], mass: Tensor | None, state: Tensor) -> None:
        self._leaves, self._mass = leaves, mass
        self._state = state
        self._mass_slope = None if mass is None else torch.zeros_like(mass)
        self.gradient: dict[str, Tensor | None] = dict.fromkeys(leaves)

    def pull_back(self, x: Tensor, y: Tensor, cost: Tensor) -> None:
        """From the end y of a block to its start x."""
        inputs = [x] if self._mass is None else [x, self._mass]
        slopes = self._collect((self._state * y).sum() + cost, inputs)
        self._state = torch.zeros_like(x) if slopes[0] is None else slopes[0]
        if self._mass_slope is not None and slopes[1] is not None:
            self._mass_slope += slopes[1]

    def arrive(self, x: Tensor, weights: Tensor | None) -> None:
        """At the initial law."""
        total = (self._state * x).sum()
        if weights is not None and self._mass_slope is not None:
            total = total + (self._mass_slope * weights).sum()
        self._collect(total, [])

    def _collect(self, total: Tensor, inputs: list[Tensor]) -> list[Tensor | None]:
        if not total.requires_grad:
            return [None] * len(inputs)
        found = torch.autograd.grad(total, [*inputs, *self._leaves.values()], allow_unused=True)
        for name, slope in zip(self._leaves, found[len(inputs) :], strict=True):
            if slope is not None:
                before = self.gradient[name]
                slope = slope.double()
                self.gradient[name] = slope if before is None else before + slope
        return list(found[: len(inputs)])


def _check_differentiable(scenario: Any, method: str) -> None:
    name = scenario_name(scenario)
    transport = str(method).partition("+")[0]
    if has_births(scenario) or "+" in str(method):
        raise ValueError(
            f"{name} has births and deaths: which particle jumps, and when, does not move smoothly with a parameter, "
            "so the derivative of the path is not that of the expectation. Take finite differences of runs with one "
            "seed, or the likelihood ratio of the jumps."
        )
    if transport not in METHODS:
        reason = REASONS.get(transport, "its step is not written for derivatives")
        raise ValueError(
            f"method {method!r} cannot be differentiated: {reason}. Use one of {', '.join(METHODS)}, or finite "
            "differences of runs with one seed."
        )


def _steps(times: Iterable[float] | None, settings: Settings) -> frozenset[int]:
    """The steps at given times."""
    if times is None:
        return frozenset({settings.n_steps})
    asked = [float(t) for t in times]
    steps = [round(t / settings.dt) if math.isfinite(t) else -1 for t in asked]
    for t, step in zip(asked, steps, strict=True):
        if not 0 <= step <= settings.n_steps or abs(step * settings.dt - t) > 1e-9 * max(1.0, abs(t)):
            near = label(min(max(0, step), settings.n_steps) * settings.dt)
            raise ValueError(
                f"times contain {t}, which is no multiple of dt = {settings.dt} in [0, {settings.horizon}]; the "
                f"nearest one is {near}."
            )
    if not steps or len(set(steps)) != len(steps):
        raise ValueError(f"times = {asked}; expected at least one time, each once.")
    return frozenset(steps)


def _batches(n_batches: int | None, settings: Settings) -> list[slice]:
    """Batches of replicas of one size; antithetic pairs stay together."""
    unit = 2 if settings.noise.antithetic else 1
    independent = settings.n_replicas // unit
    count = independent if n_batches is None else n_batches
    if type(count) is not int:
        raise TypeError(f"n_batches = {n_batches!r}; expected a whole number or None.")
    if count < 1 or independent % count:
        pairs = " pairs of" if unit == 2 else ""
        raise ValueError(
            f"n_batches = {count} does not divide the {independent}{pairs} replicas into equal batches; expected a "
            "divisor."
        )
    size = settings.n_replicas // count
    return [slice(first, first + size) for first in range(0, settings.n_replicas, size)]


def _block(n_steps: int) -> int:
    """Steps of a block, ⌈√n⌉: as many states between two kept ones as are kept."""
    return math.isqrt(n_steps - 1) + 1


def _check_replayed(system: System, y: Tensor, state: Tensor, step: int) -> None:
    """The run and its replay must be the same path: a drift that draws its own numbers is not."""
    apart = shortest(y.detach() - state, system.equation.period).abs().max()
    allowed = (1e-6 if state.dtype == torch.float64 else 1e-2) * (1 + state.abs().max())
    if not bool(apart <= allowed):
        raise RuntimeError(
            f"{system.equation.name}: computed once more, the state at step {step} differs by {float(apart):.3g} from "
            "the run's, so their derivative is not the run's. Coefficients must be functions of (t, x, mu): is "
            "something random or remembered in them? Where the system is chaotic, take a shorter horizon."
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings of numbers that leave the graph: those that matter are found by comparison."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Converting a tensor with requires_grad=True")
        warnings.filterwarnings("ignore", message="To copy construct from a tensor")
        yield
