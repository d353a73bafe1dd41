"""A scenario's coefficients compiled by torch (`simulate(..., compile=True)`): one pass, and no temporaries.

What the solver calls at every step, `drift(t, x, mu)` or the `force` of a kinetic equation, becomes one function of
tensors for the run's shape, dtype and device. The time enters as a symbol, so that no step compiles anything; fields of
the scenario are constants. Results are those of the eager method up to rounding, with the same noise. CUDA has the
compiled coefficients too, launched kernel by kernel: a CUDA graph would repeat the time and the step it was made with.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .measure import EmpiricalMeasure
from .model import Equation, with_methods
from .nonlinear_process import Decoupled
from .phase_space import half_dimension, position_period
from .torus import Period

# What a transport calls at every step; schemes that are not named differentiate σ and call the drift.
CALLED = {
    "euler": ("drift", "diffusion", "common_diffusion"),
    "proximal": ("smooth_drift", "diffusion", "common_diffusion"),
    "baoab": ("force",),
    "obabo": ("force",),
}
# Largest difference from the eager method, relative to its largest value, that another order of rounding explains.
SAME = {torch.float32: 1e-3, torch.float64: 1e-9}
# Compiled functions that are kept for runs to come.
KEPT = 64

Method = Callable[[float, Tensor, EmpiricalMeasure], Any]
Function = Callable[[Tensor, Tensor, Tensor | None], Tensor]

_numbers = itertools.count()


def compiled(equation: Equation, transport: str, x: Tensor, times: tuple[float, float]) -> Any:
    """The equation's scenario with the methods that the transport calls compiled, and compared with the eager ones.

    Args:
        equation: the checked scenario.
        transport: of the run's method.
        x: the initial state, (R, N, d).
        times: two times at which the compiled methods are compared with the eager ones.

    Raises:
        ValueError: a method that torch cannot compile as a whole, or not to the same values; no compiler; a transport
            or a scenario that leaves nothing to compile. The message says why.

    """
    name = equation.name
    if transport == "sgd":
        raise _refusal(name, "'sgd' calls sampled_drift with the data of each step, which is no function of (t, x, mu)")
    if isinstance(equation.scenario, Decoupled):
        raise _refusal(name, "a decoupled scenario looks its law up at every time, outside torch")
    if equation.strategies:
        raise _refusal(name, "its sums over pairs have kernels of their own, and are most of its cost")
    methods = {method: _coefficient(equation, method, x, times) for method in _costly(equation, transport, x)}
    try:
        return with_methods(equation.scenario, methods)
    except AttributeError:
        raise _refusal(name, "its class has slots, so that no method of one object can be replaced") from None


def _costly(equation: Equation, transport: str, x: Tensor) -> list[str]:
    """Methods that the transport calls and whose result is worth a kernel: a number or one matrix for all is not."""
    mu = equation.measure(x)
    coefficients = {"diffusion": equation.diffusion, "common_diffusion": equation.common_diffusion}
    found = []
    for method in CALLED.get(transport, ("drift",)):
        if method in coefficients and hasattr(equation.scenario, method):
            value = coefficients[method](0.0, x, mu)
            if not isinstance(value, Tensor) or value.numel() < x.numel():
                continue
        if hasattr(equation.scenario, method):
            found.append(method)
    return found


class _Coefficient:
    """One method of a scenario: compiled for the calls of a step, eager for all others."""

    def __init__(self, method: Method, function: Function, like: Tensor, weighted: bool) -> None:
        self._method, self._function = method, function
        self._like, self._weighted = (like.shape, like.dtype, like.device), weighted

    def __call__(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Any:
        known = (x.shape, x.dtype, x.device) == self._like and mu.is_uniform != self._weighted
        if not known or mu.points is not x or torch.is_grad_enabled():
            return self._method(t, x, mu)
        return self.at(t, x, mu)

    def at(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """The compiled values."""
        weights = mu.weights if self._weighted else None
        return self._function(torch.tensor(t, dtype=torch.float64), x, weights)


def _coefficient(equation: Equation, name: str, state: Tensor, times: tuple[float, float]) -> _Coefficient:
    """One method compiled, and found equal to the eager one at two times."""
    x, mu = _arguments(equation, name, state)
    method: Method = getattr(equation.scenario, name)
    key = _Key(method, _identity(equation.scenario), name, mu.period, mu.is_uniform, _place(x))
    found = _Coefficient(method, _function(key), x, not mu.is_uniform)
    what = f"{equation.name}.{name}"
    with torch.no_grad():
        for t in times:
            values, expected = _called(equation, name, found, t, x, mu), method(t, x, mu)
            if values.shape != expected.shape or values.dtype is not expected.dtype:
                raise _refusal(what, f"compiled it returns {tuple(values.shape)} in {values.dtype}")
            gap, scale = float((values - expected).abs().max()), float(expected.abs().max())
            if not gap <= SAME[x.dtype] * scale:
                raise _refusal(what, f"compiled values differ by {gap:.3g} from eager ones of up to {scale:.3g}")
    return found


def _arguments(equation: Equation, name: str, state: Tensor) -> tuple[Tensor, EmpiricalMeasure]:
    """What the transport passes to the method at the initial state."""
    if name != "force":
        return state, equation.measure(state)
    d = half_dimension(state, equation.name)
    positions, period = state[..., :d].contiguous(), position_period(equation.period, d)
    if equation.weights is None:
        return positions, EmpiricalMeasure(positions, period=period)
    return positions, EmpiricalMeasure.signed(positions, equation.weights, period)


def _called(
    equation: Equation, name: str, coefficient: _Coefficient, t: float, x: Tensor, mu: EmpiricalMeasure
) -> Tensor:
    """The compiled values; the first call compiles."""
    from torch._dynamo import config

    try:
        # torch's compiler imports parts of torch that torch deprecates.
        with config.patch(capture_scalar_outputs=True), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return coefficient.at(t, x, mu)
    except Exception as problem:
        derived = " (derived from its energy, unless written by hand)" if hasattr(equation.scenario, "energy") else ""
        raise _refusal(f"{equation.name}.{name}{derived}", _reason(problem)) from problem


def _refusal(what: str, reason: str) -> ValueError:
    return ValueError(f"compile=True is not for {what}: {reason}. Leave it out: compile=False runs the same equation.")


def _reason(problem: Exception) -> str:
    """The sentence in which torch's compiler says what it cannot do."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    told = [line.removeprefix("Explanation:").strip() for line in lines if line.startswith("Explanation:")]
    return ": ".join([*lines[:1], *told[:1]]).rstrip(".") or type(problem).__name__


@dataclasses.dataclass(frozen=True)
class _Key:
    """What a compiled function depends on."""

    method: Method = dataclasses.field(compare=False)
    scenario: Any
    name: str
    period: Period
    uniform: bool
    place: tuple[Any, ...]


def _place(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.dtype, x.device, torch.get_num_threads()


def _identity(value: Any) -> Any:
    """A value to compare scenarios by: numbers, text and tensors by what they hold, other objects by being the same."""
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return type(value), value
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(_identity, value))
    if isinstance(value, Tensor):
        held = value.detach().cpu().contiguous().numpy().tobytes()
        return value.shape, value.dtype, value.device, hashlib.sha256(held).hexdigest()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value), tuple(_identity(getattr(value, f.name)) for f in dataclasses.fields(value))
    return _Same(value)


@dataclasses.dataclass(frozen=True, eq=False)
class _Same:
    """An object that is compared by identity and kept, so that no other takes its place in memory."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


@functools.lru_cache(maxsize=KEPT)
def _function(key: _Key) -> Function:
    """The method as a function of tensors, which its first call compiles."""
    method, period = key.method, key.period

    def coefficient(time: Tensor, x: Tensor, weights: Tensor | None) -> Tensor:
        mu = EmpiricalMeasure(x, period=period)
        if weights is not None:
            mu = EmpiricalMeasure.signed(x, weights, period)
        # Read from a tensor of the graph the time is a symbol; an argument would become a constant of the code.
        value: Tensor = method(time.clone().item(), x, mu)
        return value

    # torch counts recompilations and remembers shapes by code object: with its own, no function limits another.
    code = coefficient.__code__.replace(co_name=f"{key.name}_{next(_numbers)}")
    apart = types.FunctionType(code, coefficient.__globals__, code.co_name, None, coefficient.__closure__)
    return torch.compile(apart, fullgraph=True, dynamic=False)
