"""Adaptive Runge–Kutta steps for equations without noise: Dormand–Prince 5(4) within each step of the clock.

Every replica has its own step sizes: an error of one would otherwise change the rounding of the others. Every step of
the clock begins with a trial of its whole length, so that nothing but the state is carried from one to the next.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .clock import Clock
from .measure import EmpiricalMeasure
from .model import Equation
from .noise import Noise

# Tolerances of the error of a step, relative to the state and absolute. Of float32 they leave room for its rounding.
TOLERANCES = {torch.float32: (1e-5, 1e-6), torch.float64: (1e-9, 1e-12)}
# A step that would need more is stiff, or leads to infinity.
MOST_TRIALS = 10_000
SAFETY, SMALLEST, LARGEST = 0.9, 0.2, 5.0

# Dormand, Prince, A family of embedded Runge-Kutta formulae (1980): nodes, stages; the last stage is the fifth-order
# result, and its slope the first one of the next step.
NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
# The fifth-order weights less the fourth-order ones.
ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def dopri5(equation: Equation, clock: Clock, noise: Noise, step: int, x: Tensor) -> None:
    """The solution of X' = b(t, X, m) at the end of a step from its start, in place.    x: (R, N, d).

    In as many steps of its own as keep the error of each particle in each within 1e-9|x| + 1e-12 in float64, and
    1e-5|x| + 1e-6 in float32; the errors at the end of a run add up. A domain is met only at the end of the step.

    Raises:
        ValueError: noise, at a time at which the check at the door did not see it.
        RuntimeError: no step is small enough.

    """
    start = clock.time(step)
    _check_noiseless(equation, start, x)
    for replica in range(len(x)):
        _Replica(equation, replica).advance(start, clock.time(step + 1), x[replica : replica + 1])


def check_dopri5(equation: Equation, x: Tensor) -> None:
    """Refuses noise at the initial state x, (R, N, d), and drifts that jump: those of regularisers with kinks.

    Raises:
        ValueError: these.

    """
    if equation.has_common_noise or equation.forms != {"number"}:
        raise _noisy(equation, "its diffusion is not the number 0")
    regulariser = getattr(equation.scenario, "regulariser", None)
    if regulariser is not None and not regulariser.is_smooth:
        raise ValueError(
            f"method 'dopri5' needs a smooth drift; the velocity of {equation.name} jumps where its regulariser "
            f"{regulariser} has kinks or a wall, and an adaptive step would creep up to them. Use 'proximal', which "
            "lands on them."
        )
    if equation.is_random:
        raise ValueError(
            f"method 'dopri5' controls an error, and the drift of {equation.name} is drawn anew in each step by random "
            "batches. Use 'euler', or another strategy for its sums over pairs."
        )
    _check_noiseless(equation, 0.0, x)


def _check_noiseless(equation: Equation, t: float, x: Tensor) -> None:
    sigma = equation.diffusion(t, x, equation.measure(x))
    if isinstance(sigma, Tensor) or sigma != 0:
        raise _noisy(equation, f"its diffusion is {sigma} at t = {t:g}")


def _noisy(equation: Equation, reason: str) -> ValueError:
    return ValueError(
        f"method 'dopri5' is for equations without noise, and {equation.name} has some: {reason}. Use 'euler', "
        "'milstein' or 'heun'."
    )


class _Replica:
    """One replica of the system, as an ordinary differential equation for its particles (1, N, d)."""

    def __init__(self, equation: Equation, replica: int) -> None:
        self._equation, self._replica = equation, replica
        weights = equation.weights
        self._weights = None if weights is None else weights[replica : replica + 1]

    def slope(self, t: float, y: Tensor) -> Tensor:
        """The drift at (t, y) in the replica's own law."""
        return self._equation.drift(t, y, EmpiricalMeasure.signed(y, self._weights, self._equation.period))

    def advance(self, start: float, end: float, y: Tensor) -> None:
        """From `start` to `end`, in place."""
        relative, absolute = TOLERANCES[y.dtype]
        t, h, first = start, end - start, self.slope(start, y)
        for _ in range(MOST_TRIALS):
            # The last one ends on the clock, whatever its length was rounded to.
            is_last = t + h >= end or end - (t + h) < 1e-9 * (end - start)
            h = end - t if is_last else h
            reached, last, difference = self._trial(t, h, y, first)
            scale = absolute + relative * torch.maximum(y.abs(), reached.abs())
            error = float((difference.abs() / scale).amax())
            factor = SAFETY * error**-0.2 if error > 0 else LARGEST
            # NaN, of a stage that left the drift's domain, compares false.
            if error <= 1:
                y.copy_(reached)
                if is_last:
                    return
                t, first = t + h, last
                h *= min(LARGEST, factor)
            else:
                h *= max(SMALLEST, factor) if error < float("inf") else SMALLEST
                if t + h <= t:
                    break
        raise RuntimeError(
            f"method 'dopri5' cannot continue {self._equation.name} past t = {t:.9g}, replica {self._replica}: steps "
            f"of {h:.3g} are still too long. The drift is stiff or not smooth there, or the solution becomes infinite; "
            "use 'euler' with a small dt, or 'proximal' for a drift with kinks."
        )

    def _trial(self, t: float, h: float, y: Tensor, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The fifth-order result of a step, the slope there, and its difference from the fourth-order one."""
        slopes, at = [first], y
        for node, row in zip(NODES[1:], STAGES[1:], strict=True):
            at = y + _combined(row, slopes, h)
            slopes.append(self.slope(t + node * h, at))
        return at, slopes[-1], _combined(ERROR, slopes, h)


def _combined(coefficients: tuple[float, ...], slopes: list[Tensor], h: float) -> Tensor:
    """H Σ_i c_i k_i."""
    total = torch.zeros_like(slopes[0])
    for c, k in zip(coefficients, slopes, strict=True):
        if c:
            total.add_(k, alpha=h * c)
    return total
