"""Whether derivatives pass through a scenario: automatic ones against difference quotients, before a run.

A parameter that leaves torch on its way (`float(self.sigma)`, `math.sqrt(self.a)`, `x.new_tensor(self.target)`, a
detached law) gives no error but a derivative that is wrong. Here every coefficient and the initial law are evaluated
beside the initial state of one replica, moved a little off it so that kinks there do not matter, and

    ⟨u, ∂f(v)⟩        is compared with        ⟨u, f(· + εv) - f(· - εv)⟩ / 2ε

for directions u, v that have a mean, with respect to the state and to every parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .measure import EmpiricalMeasure
from .model import replaced, scenario_name
from .parameters import Parameters
from .tape import recording

# ε of the quotient, and the error allowed relative to what the quotient is the sum of.
EPSILON = {torch.float64: 1e-5, torch.float32: 5e-3}
TOLERANCE = {torch.float64: 1e-4, torch.float32: 3e-2}

Values = dict[str, Tensor]
# What is differentiated, of a scenario and a state.
Evaluation = Callable[[Any, Tensor], Values]


def check(
    scenario: Any,
    parameters: Parameters,
    x: Tensor,
    weights: Tensor | None,
    times: Iterable[float],
    initial: Callable[[Any], Tensor],
) -> None:
    """Compares derivatives of drift, diffusions, projection and initial law with difference quotients.

    Args:
        scenario: on the run's device.
        parameters: what the run is differentiated with respect to.
        x: initial state, (R, N, d), of which the first replica serves.
        weights: (R, N) or None.
        times: when the coefficients are evaluated.
        initial: scenario -> its initial state.

    Raises:
        TypeError: a method fails on parameters that are tensors.
        ValueError: a derivative, or a value computed from tensors, is not what it should be.

    """
    mass, start = None if weights is None else weights[:1], x[:1]
    beside = start + 20 * EPSILON[x.dtype] * (1 + start.abs()) * _direction(start).to(x)

    def coefficients(case: Any, y: Tensor, t: float) -> Values:
        period = getattr(case, "period", None)
        mu = EmpiricalMeasure(y, period=period) if mass is None else EmpiricalMeasure.signed(y, mass, period)
        found = {"drift": case.drift(t, y, mu), "diffusion": case.diffusion(t, y, mu)}
        if hasattr(case, "common_diffusion"):
            found["common_diffusion"] = case.common_diffusion(t, y, mu)
        if hasattr(case, "project_at"):
            found["project_at"] = case.project_at(t, y)
        elif hasattr(case, "project"):
            found["project"] = case.project(y)
        return {method: _tensor(value) for method, value in found.items()}

    for t in times:
        _compare(scenario, parameters, lambda case, y, t=t: coefficients(case, y, t), beside)  # type: ignore[misc]
    _compare(scenario, parameters, lambda case, y: {"initial": initial(case)}, beside)


def check_functional(name: str, value: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Compares the derivative of a functional of the state with a difference quotient.

    Raises:
        ValueError: it has no graph, or another derivative.

    """
    with recording():
        at = x.detach().clone().requires_grad_()
        found = value(at)
        if not found.requires_grad:
            raise ValueError(
                f"{name}(t, x, mu) returned numbers without a graph: they do not depend on x, or are detached on the "
                "way (.item(), .detach(), numpy, torch.no_grad), and so have no derivative with respect to any "
                "parameter. Compute them from mu and x with torch operations."
            )
        slope = _slopes(found, [at])[0]
    with torch.no_grad():
        step = _step(x)
        wrong = _difference(slope, step, value(x), value(x + step), value(x - step), 2.0, x.dtype)
    if wrong:
        raise ValueError(
            f"{name}(t, x, mu): {wrong} with respect to x. Part of it is detached on the way, or it jumps; compute it "
            "from mu and x with torch operations."
        )


def _compare(scenario: Any, parameters: Parameters, evaluate: Evaluation, x: Tensor) -> None:
    name, leaves = scenario_name(scenario), parameters.leaves()
    with torch.no_grad():
        plain = evaluate(scenario, x)
    with recording():
        at = x.detach().clone().requires_grad_()
        taped = _taped(scenario, leaves, evaluate, at)
        slopes = {method: _slopes(value, [at, *leaves.values()]) for method, value in taped.items()}
    _check_values(name, taped, plain, x.dtype)
    with torch.no_grad():
        step = _step(x)
        ends = evaluate(scenario, x + step), evaluate(scenario, x - step)
        of_x = {method: found[0] for method, found in slopes.items()}
        _check_slopes(name, "x", of_x, step, plain, *ends, 2.0, x.dtype)
        for k, parameter in enumerate(leaves, 1):
            only = {method: found[k] for method, found in slopes.items()}
            step = _step(leaves[parameter].detach().double(), x.dtype)
            moved = _moved(scenario, parameters, parameter, step, evaluate, x)
            if moved is not None:
                _check_slopes(name, f"{name}.{parameter}", only, step, plain, *moved, x.dtype)


def _taped(scenario: Any, leaves: dict[str, Tensor], evaluate: Evaluation, x: Tensor) -> Values:
    """The values with their graph."""
    try:
        return evaluate(replaced(scenario, leaves), x)
    except (TypeError, RuntimeError, AttributeError) as problem:
        raise TypeError(
            f"{scenario_name(scenario)} fails where {', '.join(leaves)} are tensors, as they are while a run is "
            f"differentiated: {type(problem).__name__}: {problem}. What takes numbers only is written in another way: "
            "a - k * x for torch.sub(a, x, alpha=k), k * torch.ones_like(x) for torch.full_like(x, k)."
        ) from problem


def _moved(
    scenario: Any, parameters: Parameters, name: str, step: Tensor, evaluate: Evaluation, x: Tensor
) -> tuple[Values, Values, float] | None:
    """The values on both sides of a parameter, and how many steps lie between; on one where the other is refused."""
    only = Parameters({name: parameters.values[name]})
    start = torch.tensor(only.vector(), dtype=torch.float64)
    for right, left in ((1, -1), (1, 0), (0, -1)):
        try:
            cases = [only.replacing((start + k * step.flatten().cpu()).tolist()) for k in (right, left)]
            ends = [evaluate(replaced(scenario, case), x) for case in cases]
        except ValueError:
            continue
        return ends[0], ends[1], float(right - left)
    return None


def _check_values(name: str, taped: Values, plain: Values, dtype: torch.dtype) -> None:
    for method, value in taped.items():
        wanted = plain[method].to(value)
        size = 1e3 * torch.finfo(dtype).eps * (1 + float(wanted.abs().max()))
        if value.shape != plain[method].shape or not bool(((value - wanted).abs() <= size).all()):
            raise ValueError(
                f"{name}.{method} has other values where its parameters are tensors, as they are while a run is "
                "differentiated: a sequence of numbers is then a tensor, for which + adds and * multiplies."
            )


def _check_slopes(
    name: str,
    what: str,
    slopes: dict[str, Tensor],
    step: Tensor,
    plain: Values,
    right: Values,
    left: Values,
    width: float,
    dtype: torch.dtype,
) -> None:
    for method, slope in slopes.items():
        wrong = _difference(slope, step, plain[method], right[method], left[method], width, dtype)
        if wrong:
            raise ValueError(
                f"{name}.{method}: {wrong} with respect to {what}. Something on the way leaves torch or is detached: "
                "float(...), math.sqrt, x.new_tensor(...), .item(), a measure made from x.detach(). Write self.a ** "
                "0.5, torch.exp, torch.as_tensor(self.a, dtype=x.dtype, device=x.device)."
            )


def _difference(
    slope: Tensor, step: Tensor, plain: Tensor, right: Tensor, left: Tensor, width: float, dtype: torch.dtype
) -> str:
    """Says how a derivative along `step` differs from the difference quotient; empty where it does not."""
    u = _direction(right)
    automatic = float((slope.double() * step.double()).sum())
    quotient = float((u * (right - left).double()).sum()) / width
    # Both sides: at a minimum the difference is small, its error is not.
    size = float((u * ((right - plain).abs() + (left - plain).abs()).double()).sum()) / width
    if not math.isfinite(automatic):
        return f"the automatic derivative is {automatic} (a root, norm or eigenvector at 0, a singular covariance?)"
    rounding = 20 * torch.finfo(dtype).eps * float((u * right.double()).abs().sum())
    if abs(automatic - quotient) <= TOLERANCE[dtype] * (size + abs(automatic)) + rounding:
        return ""
    return f"the automatic derivative along a step is {automatic:.6g}, a difference quotient {quotient:.6g},"


def _slopes(value: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """∂⟨u, value⟩ for each input."""
    if not value.requires_grad:
        return [torch.zeros_like(z) for z in inputs]
    total = (_direction(value) * value.double()).sum()
    return list(torch.autograd.grad(total, inputs, retain_graph=True, allow_unused=True, materialize_grads=True))


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def _direction(x: Tensor) -> Tensor:
    """Numbers around 1.3 that repeat nowhere, so that neither means nor differences escape."""
    steps = torch.arange(x.numel(), dtype=torch.float64, device=x.device)
    return 1.3 + torch.cos(steps).reshape(x.shape)


def _step(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """εv, of the size of x."""
    epsilon = EPSILON[x.dtype if dtype is None else dtype] * max(1.0, float(x.abs().max()))
    return (epsilon * _direction(x)).to(x.dtype)
