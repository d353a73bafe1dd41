"""How a run steps: which methods there are, and which are right for an equation.

A method is written TRANSPORT or TRANSPORT+REACTION. The transport moves particles over a step; the reaction, for
scenarios with a birth_death_rate, follows it (Lie splitting: first order in dt, as Euler is).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import birth_death, forward_backward, runge_kutta, sgd, splitting
from .clock import Clock
from .diffusion import directional, full
from .euler import euler
from .model import Equation
from .noise import Noise

ITO = ("euler", "milstein", "srk")
STRATONOVICH = ("heun", "midpoint", "euler_heun")
# Those that any equation may ask for.
METHODS = ITO + STRATONOVICH

# (equation, clock, noise, step, x): moves x from `step` to `step + 1`, in place.
Transport = Callable[[Equation, Clock, Noise, int, Tensor], None]
# (equation, t, h, noise, step, x): x, equation.weights and equation.parent after births and deaths over a time h.
# Returns the number of events in each replica.
Reaction = Callable[[Equation, float, float, Noise, int, Tensor], Tensor]


@dataclass(frozen=True)
class Scheme:
    """A transport that works in place.

    step: moves the state. check: refuses scenarios, seen at their initial state, that it cannot move. close: does what
    the step left for the next one, before anyone looks at the state.
    """

    step: Transport
    check: Callable[[Equation, Tensor], None] | None = None
    close: Callable[[Equation, Tensor], None] | None = None


IN_PLACE: dict[str, Scheme] = {
    "euler": Scheme(euler),
    "proximal": Scheme(forward_backward.proximal, forward_backward.check_proximal),
    "dopri5": Scheme(runge_kutta.dopri5, runge_kutta.check_dopri5),
    "sgd": Scheme(sgd.sgd, lambda equation, x: sgd.check(equation)),
    "baoab": Scheme(splitting.open_baoab, splitting.check, splitting.close),
    "obabo": Scheme(splitting.obabo, splitting.check),
}
TRANSPORTS = tuple(dict.fromkeys((*METHODS, *IN_PLACE)))
REACTIONS: dict[str, Reaction] = {
    "jumps": birth_death.jumps,
    "clocks": birth_death.clocks,
    "weights": birth_death.weights,
}


@dataclass(frozen=True)
class Method:
    """A method's two parts; the reaction is empty where nothing is born or dies."""

    transport: str
    reaction: str = ""

    @classmethod
    def of(cls, text: str, has_birth_death: bool) -> Method:
        """TRANSPORT or TRANSPORT+REACTION; with birth and death the reaction is "jumps" unless it is named.

        Raises:
            ValueError: unknown, or a reaction without births and deaths.

        """
        transport, plus, reaction = str(text).partition("+")
        if transport not in TRANSPORTS:
            raise ValueError(
                f"unknown method {text!r}; expected one of {', '.join(TRANSPORTS)}, and with a birth_death_rate one "
                f"of these followed by +{' or +'.join(REACTIONS)}. Adaptive schemes are not offered where there is "
                "noise: one step size would couple the replicas."
            )
        if plus and reaction not in REACTIONS:
            raise ValueError(f"unknown reaction in method {text!r}; expected +{', +'.join(REACTIONS)}.")
        if reaction and not has_birth_death:
            raise ValueError(
                f"method {text!r} names a reaction, and the scenario has no birth_death_rate(t, x, mu); use "
                f"{transport!r}."
            )
        return cls(transport, reaction or ("jumps" if has_birth_death else ""))


def suited(scenario: Any) -> str:
    """The method that suits a scenario: a splitting where it is kinetic, sampled steps where it has data to sample,
    proximal ones where its regulariser has kinks or a wall, Euler's else.
    """
    if hasattr(scenario, "force"):
        return "baoab"
    if hasattr(scenario, "sampled_drift"):
        return "sgd"
    regulariser = getattr(scenario, "regulariser", None)
    return "proximal" if regulariser is not None and not regulariser.is_smooth else "euler"


def check_method(equation: Equation, method: Method, x: Tensor, times: Iterable[float] = (0.0,)) -> None:
    """Refuses schemes that would be silently wrong for this equation, as far as probes at the given times can tell.

    Raises:
        ValueError: a scheme that is not right here, with the reason and a scheme that is.

    """
    if method.reaction:
        birth_death.check(equation, method.reaction)
    scheme = IN_PLACE.get(method.transport)
    if scheme is not None and scheme.check is not None:
        scheme.check(equation, x)
    if scheme is not None or equation.is_additive:
        return
    for t in times:
        if method.transport in ("milstein", "srk"):
            _check_row_wise(equation, method.transport, x, t)
        _check_derivative(equation, method.transport, x, t)


def _check_row_wise(equation: Equation, method: str, x: Tensor, t: float) -> None:
    """Milstein and SRK without Lévy areas need commuting noise: component k of σ a function of x_k (and t, m)."""
    if equation.has_common_noise:
        raise ValueError(
            f"method {method!r} would be wrong for {equation.name}: common and own noise do not commute when a "
            "diffusion depends on the state. Use 'euler', or 'heun' (right law, strong order ½)."
        )
    if equation.form == "general":
        raise ValueError(
            f"method {method!r} needs a diagonal diffusion; {equation.name}.diffusion is general (..., N, d, m). Use "
            "'euler', or 'heun' (right law, strong order ½)."
        )
    moved = _response(equation, x, t)
    if moved is not None:
        raise ValueError(
            f"method {method!r} would be wrong for {equation.name}: {moved}. Use 'euler', or 'heun' (right law, strong "
            "order ½)."
        )


def _response(equation: Equation, x: Tensor, t: float) -> str | None:
    """What σ, at a frozen law, depends on besides its own component: found by moving one particle."""
    law = equation.measure(x)
    with torch.no_grad():
        before = full(equation.diffusion(t, x, law), x)
        for component in range(min(x.shape[-1], 16)):
            y = x.clone()
            y[:, 0, component] += 0.37 * (1 + y[:, 0, component].abs())
            changed = (full(equation.diffusion(t, y, law), y) != before).any(0)
            if bool(changed[1:].any()):
                return "σ at one particle depends on another through x; take means from mu, which is frozen over a step"
            others = [k for k in range(x.shape[-1]) if k != component and bool(changed[0, k])]
            if others:
                return (
                    f"component {others[0]} of σ depends on component {component} of x, so the noise does not commute"
                )
    return None


def _check_derivative(equation: Equation, method: str, x: Tensor, t: float) -> None:
    """∂σ comes from automatic differentiation: a detached σ would give a silent zero."""
    law = equation.measure(x)
    _compare_derivative(equation.name + ".diffusion", lambda z: equation.diffusion(t, z, law), method, x)
    if equation.has_common_noise:
        name = equation.name + ".common_diffusion"
        _compare_derivative(name, lambda z: equation.common_diffusion(t, z, law), method, x)


def _compare_derivative(name: str, sigma: Callable[[Tensor], float | Tensor], method: str, x: Tensor) -> None:
    direction = torch.cos(torch.arange(x.numel(), dtype=x.dtype, device=x.device)).reshape(x.shape)
    with torch.no_grad():
        try:
            (slope,) = directional(sigma, x, [direction])
        except (RuntimeError, NotImplementedError) as problem:
            raise ValueError(
                f"method {method!r} differentiates {name}, which torch cannot do here ({problem}). Write it with "
                "differentiable torch operations, or use 'euler'."
            ) from problem
        eps = 1e-2 if x.dtype == torch.float32 else 1e-5
        quotient = (full(sigma(x + eps * direction), x) - full(sigma(x - eps * direction), x)) / (2 * eps)
    # A kink near a few particles is no fault, a derivative that is missing at most of them is.
    telling = quotient.abs() > 0.05
    wrong = telling & ((slope - quotient).abs() > 0.2 * quotient.abs())
    if int(wrong.sum()) * 2 > int(telling.sum()):
        where = tuple(torch.nonzero(wrong)[0].tolist())
        raise ValueError(
            f"method {method!r} needs the derivative of {name}, but the automatic one ({float(slope[where]):.4g}) "
            f"differs from a difference quotient ({float(quotient[where]):.4g}): it detaches its input or leaves "
            "torch. Use 'euler'."
        )
