"""Time stepping of the Fokker-Planck equation: d mass/dt = A(t, mass) mass, and births and deaths.

Adaptive steps come from scipy's stiff integrators, whose Jacobian here is A with the law held fixed: what is left out
is not stiff. Any Runge-Kutta or multistep scheme keeps the mass to rounding; its values may fall below zero by its
tolerance, which is set right at the output and refused when it is more. The implicit Euler scheme is positive for
every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.integrate import BDF, Radau

from .finite_volume import FiniteVolumes
from .grid import Array

METHODS = {"radau": Radau, "bdf": BDF}
NEGATIVE = 1e-7  # of the whole mass: what adaptive steps may leave below zero


@dataclass(frozen=True)
class Stepping:
    """How to step: an adaptive method with its tolerances, or implicit Euler with dt."""

    method: str
    rtol: float
    atol: float
    dt: float | None

    def solve(self, volumes: FiniteVolumes, mass: Array, times: Array, watch: Callable[[float], None]) -> Array:
        """Masses (T, n) at the times, from `mass` (n,) at time 0.

        Raises:
            RuntimeError: steps that fail, or lose positivity.

        """
        march = self._euler if self.method == "euler" else self._adaptive
        found = np.empty((len(times), len(mass)))
        for k, values in enumerate(march(volumes, mass, times)):
            found[k] = _positive(values, float(times[k]))
            watch(float(times[k]))
        return found

    def _euler(self, volumes: FiniteVolumes, mass: Array, times: Array) -> Iterator[Array]:
        assert self.dt is not None
        step = 0
        for target in np.rint(times / self.dt).astype(int):
            while step < target:
                mass = volumes.step(step * self.dt, mass, self.dt)
                step += 1
            yield mass

    def _adaptive(self, volumes: FiniteVolumes, mass: Array, times: Array) -> Iterator[Array]:
        options = {"rtol": self.rtol, "atol": self.atol, "jac": volumes.jacobian}
        if self.method == "bdf":
            yield from _dense(volumes.slope, mass, times, options)
        else:
            yield from _restarted(volumes.slope, mass, times, options)


def _restarted(slope: Callable[..., Array], mass: Array, times: Array, options: dict[str, Any]) -> Iterator[Array]:
    """A one-step method lands on every output time: its interpolant is of lower order, and need not be positive."""
    t, first = 0.0, None
    for target in times:
        if target > t:
            length = float(target) - t
            solver = Radau(slope, t, mass, float(target), first_step=first and min(first, length), **options)
            while solver.status == "running":
                _advance(solver)
                # The last step before a stop is cut short, and says nothing of the next.
                first = max(float(solver.h_abs), first or 0.0) if solver.status == "running" else first or length
            t, mass = float(target), solver.y
        yield mass


def _dense(slope: Callable[..., Array], mass: Array, times: Array, options: dict[str, Any]) -> Iterator[Array]:
    """A multistep method goes through, and is read off the polynomial it steps with."""
    waiting = [float(t) for t in times]
    while waiting and waiting[0] <= 0:
        waiting.pop(0)
        yield mass
    if not waiting:
        return
    solver = BDF(slope, 0.0, mass, waiting[-1], **options)
    # Rows that scipy leaves as they were allocated: what stands there may warn.
    solver.D[2:] = 0.0
    while waiting:
        _advance(solver)
        path = solver.dense_output()
        while waiting and waiting[0] <= solver.t:
            yield path(waiting.pop(0))


def _advance(solver: Any) -> None:
    trouble = solver.step()
    if solver.status == "failed":
        raise RuntimeError(
            f"the Fokker-Planck equation could not be stepped beyond t = {solver.t:.6g} ({trouble}): the solution or a "
            "coefficient blows up there, or rtol and atol ask for more than float64 holds."
        )


def _positive(mass: Array, t: float) -> Array:
    """Values below zero by the tolerance become zero, and the mass is one."""
    lost = -float(np.minimum(mass, 0.0).sum())
    if not lost <= NEGATIVE:
        raise RuntimeError(
            f"the density fell below zero at t = {t:.6g} ({lost:.3g} of the mass): the steps are too long for it. "
            "Lower rtol and atol, or take method='euler' with dt=..., positive for every step."
        )
    kept = np.maximum(mass, 0.0)
    normalised: Array = kept / kept.sum()
    return normalised
