"""Newton's method for the implicit steps of both geometries, inexact and damped.

Second derivatives are operators: the curvature of an energy is the difference of two of its own forces.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np

from .grid import Array

Operator = Callable[[Array], Array]

NEWTON = 100  # steps of Newton's method
CONVERGED = 1e-8  # its last step, in units of the problem; INEXACT times that is left
NEAR = 1e-6  # a step that needs no search along it
INEXACT = 1e-4  # relative residual of a step
CONJUGATE = 100  # conjugate gradients for it


class Smooth(Protocol):
    """A function Φ in a geometry that may change from point to point."""

    def value(self, x: Array) -> float:
        """Φ(x)."""

    def derivatives(self, x: Array) -> tuple[Array, Operator]:
        """Its gradient and its second derivative, a symmetric operator."""

    def inner(self, x: Array, a: Array, b: Array) -> float:
        """The inner product at x that makes them so."""

    def inverse(self, x: Array) -> Operator:
        """An approximate inverse of the second derivative, symmetric and positive."""

    def room(self, x: Array, step: Array) -> float:
        """The share of a step, at most 1, that stays where Φ is finite."""

    def scale(self, x: Array) -> float:
        """The unit in which steps are small or large."""

    @property
    def stiffness(self) -> float:
        """The part of the second derivative that comes from the distance to the last law."""


def minimised(problem: Smooth, x: Array) -> tuple[Array, float]:
    """A minimiser that descent from x reaches, and the norm of the gradient there.

    Damped Newton steps by conjugate gradients. The curvature of an energy is the difference of two of its forces: every
    energy has its own fast derivative, and Newton's method forgives an error of 1e-5.

    Raises:
        RuntimeError: none was reached.

    """
    with np.errstate(over="ignore", invalid="ignore"):
        return _descended(problem, x)


def _descended(problem: Smooth, x: Array) -> tuple[Array, float]:
    first, length = x, math.inf
    for _ in range(NEWTON):
        slope, curved = problem.derivatives(x)
        step = _newton_step(problem, x, slope, curved)
        length, scale, room = _norm(problem, x, step), problem.scale(x), problem.room(x, step)
        if length <= CONVERGED * scale and room == 1:
            x = x + step
            return x, _norm(problem, x, problem.derivatives(x)[0])
        near = length <= NEAR * scale
        share = room if near else _share(problem, x, step, room, problem.inner(x, slope, step))
        if share == 0 or not math.isfinite(length):
            break
        x = x + share * step
    raise RuntimeError(
        f"jko: the minimisation of a step did not converge: the gradient is still "
        f"{_norm(problem, x, problem.derivatives(x)[0]):.3g}, the last step was {length:.3g}. The energy is too far "
        f"from convex for this tau: take one {_shrinkage(problem, first):.2g} times smaller. If it is not smooth, "
        "smooth it."
    )


def _newton_step(problem: Smooth, x: Array, slope: Array, curved: Operator) -> Array:
    """The Newton step by conjugate gradients, cut off where the curvature is negative: it always descends."""
    inverse = problem.inverse(x)
    step, rest = np.zeros_like(x), -slope
    turned = inverse(rest)
    direction, size = turned, problem.inner(x, rest, turned)
    first = size
    for _ in range(CONJUGATE):
        if size <= INEXACT**2 * first:
            break
        image = curved(direction)
        curvature = problem.inner(x, direction, image)
        if not curvature > 0:
            return step if step.any() else direction
        step = step + size / curvature * direction
        rest = rest - size / curvature * image
        turned = inverse(rest)
        size, before = problem.inner(x, rest, turned), size
        direction = turned + size / before * direction
    return step


def _share(problem: Smooth, x: Array, step: Array, room: float, descent: float) -> float:
    """The largest of room, room/2, ... by which Φ descends as it should; 0 where there is none."""
    start = problem.value(x)
    for halvings in range(50):
        share = room * 0.5**halvings
        if problem.value(x + share * step) <= start + 1e-4 * share * descent + 1e-13 * abs(start):
            return share
    return 0.0


def _shrinkage(problem: Smooth, x: Array) -> float:
    """By how much a step is too long for Φ to be convex along its gradient at x, and a factor 2."""
    slope, curved = problem.derivatives(x)
    curvature = problem.inner(x, slope, curved(slope)) / problem.inner(x, slope, slope)
    return max(2.0, 2 * (1 - curvature / problem.stiffness))


def _norm(problem: Smooth, x: Array, a: Array) -> float:
    return math.sqrt(problem.inner(x, a, a))
