"""Splitting schemes for kinetic equations dX = V dt, dV = (force(t, X, m_X) - γV) dt + σ dW.

Its three parts are solved exactly, one after the other, over fractions of the step h:

    A: X += h·V,    B: V += h·force(t, X, m_X),    O: V = e^{-γh} V + σ √((1 - e^{-2γh})/(2γ)) ξ.

BAOAB is B A O A B and OBABO is O B A B O, every part that occurs twice over h/2. Both are of second order in law; for a
quadratic potential the stationary law of positions under BAOAB, and that of velocities under OBABO, is exact. The law
of positions is taken anew for every B, at its time.

The normals come from the Brownian path of Euler's noise: ξ is the step's increment for BAOAB, and two normals made of
it and of the area under the path for OBABO, so that runs with equal noise are coupled.

Source: Leimkuhler, Matthews, Rational construction of stochastic numerical methods for molecular sampling, AMRX (2013);
Bussi, Parrinello, Accurate sampling using Langevin dynamics, Phys. Rev. E 75 (2007) for OBABO.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor

from .clock import Clock
from .draws import set_key
from .kinetic import friction
from .langevin import number
from .measure import EmpiricalMeasure
from .model import Equation, unchanged
from .noise import Noise, kick_
from .phase_space import half_dimension, position_period

# Relative difference of a scenario's drift from the one that is split, that rounding allows.
SAME = {torch.float32: 1e-4, torch.float64: 1e-9}


def baoab(equation: Equation, clock: Clock, noise: Noise, step: int, x: Tensor) -> None:
    """One step of B A O A B, in place.    x: (R, N, 2d), positions first."""
    open_baoab(equation, clock, noise, step, x)
    close(equation, x)


def open_baoab(equation: Equation, clock: Clock, noise: Noise, step: int, x: Tensor) -> None:
    """One step of B A O A, whose last B is done by `close`, or by the next step in its own pass over the state.

    The bits are those of `baoab`. Until it is closed the velocities of x lack the last kick.
    """
    gamma, sigma, h = *_numbers(equation), clock.dt
    forces = _forces(equation, x)
    force, due = forces.at(clock.time(step), x, 0.5 * h)
    noise.kinetic_(
        x, force, forces.positions, 0.5 * h, math.exp(-gamma * h), deviation(gamma, sigma, h), step, due=due
    )  # fmt: skip
    set_key(equation, noise, step + 1)
    forces.renew(clock.time(step + 1), x, due=0.5 * h)


def close(equation: Equation, x: Tensor) -> None:
    """The last B of the last step, if it is still to come."""
    _forces(equation, x).close(x)


def obabo(equation: Equation, clock: Clock, noise: Noise, step: int, x: Tensor) -> None:
    """One step of O B A B O, in place.    x: (R, N, 2d), positions first."""
    gamma, sigma, h = *_numbers(equation), clock.dt
    decay, spread = math.exp(-0.5 * gamma * h), deviation(gamma, sigma, 0.5 * h)
    forces = _forces(equation, x)
    force, _ = forces.at(clock.time(step), x, 0.0)
    first, second = halves(noise, step, force)
    d = force.shape[-1]
    velocities = (decay * x[..., d:] + spread * first) + (0.5 * h) * force
    torch.add(x[..., :d], h * velocities, out=forces.positions)
    set_key(equation, noise, step + 1)
    force = forces.evaluate(clock.time(step + 1))
    velocities = decay * (velocities + (0.5 * h) * force) + spread * second
    torch.cat([forces.positions, velocities], dim=-1, out=x)
    forces.keep(clock.time(step + 1), x, force, due=0.0)


def _numbers(equation: Equation) -> tuple[float, float]:
    """The numbers γ and σ."""
    return float(friction(equation.scenario)), float(number(equation.scenario, "sigma"))


def deviation(gamma: float, sigma: float, h: float) -> float:
    """σ √((1 - e^{-2γh})/(2γ)): of the velocity that O adds over a time h; σ√h for γ = 0."""
    if gamma == 0:
        return sigma * math.sqrt(h)
    return sigma * math.sqrt(-math.expm1(-2 * gamma * h) / (2 * gamma))


def halves(noise: Noise, step: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normals (w ± η)/√2, w the step's increment and η = √12 (U - w/2), U the area below it.

    η is independent of w, and positive where the path rises early: the first is close to the first half's increment.
    """
    w, area = noise.area(step, like.shape, dtype=like.dtype, device=like.device)
    eta = math.sqrt(12) * (area - 0.5 * w)
    return math.sqrt(0.5) * (w + eta), math.sqrt(0.5) * (w - eta)


def check(equation: Equation, x: Tensor) -> None:
    """Refuses what is not a kinetic equation with a force, a friction and a constant noise of the velocities.

    Raises:
        TypeError: no force, or a gamma or sigma that is no number.
        ValueError: an odd dimension, γ < 0, a force of another shape, common noise, velocities on a circle, or a drift
            and diffusion that are not those of (γ, σ, force).

    """
    scenario, name = equation.scenario, equation.name
    if not callable(getattr(scenario, "force", None)):
        raise TypeError(
            f"methods 'baoab' and 'obabo' split a kinetic equation, and {name} has no force(t, x, mu) on positions; "
            "inherit mfsde.Kinetic (write force) or mfsde.KineticLangevin (declare an energy), or use 'euler'."
        )
    d = half_dimension(x, name)
    _numbers(equation)
    if equation.has_common_noise:
        raise ValueError(f"{name}: 'baoab' and 'obabo' have no common noise; use 'euler'.")
    position_period(equation.period, d)
    with torch.no_grad():
        _check_force(equation, x)
        _check_split(equation, x)


def _check_force(equation: Equation, x: Tensor) -> None:
    forces = _Forces(equation, x)
    forces.take(x)
    law = forces.law()
    name, expected = f"{equation.name}.force", forces.positions
    force = unchanged(name, expected, lambda: equation.scenario.force(0.0, expected, law))
    if not isinstance(force, Tensor) or force.shape != expected.shape:
        told = f"shape {tuple(force.shape)}" if isinstance(force, Tensor) else f"a {type(force).__name__}"
        raise ValueError(
            f"{name} returned {told} for positions {tuple(expected.shape)}; expected one row per particle, of d "
            "components: the force speaks of positions, not of the whole state."
        )
    if force.dtype is not x.dtype or force.device != x.device:
        raise TypeError(f"{name} returned {force.dtype} on {force.device}; the run is {x.dtype} on {x.device}.")
    if not bool(torch.isfinite(force).all()):
        raise ValueError(f"{name} is not finite at the initial state; check for a division by zero there.")


def _check_split(equation: Equation, x: Tensor) -> None:
    """Euler and the limit use drift and diffusion: they have to be those of the force, γ and σ."""
    scenario, d = equation.scenario, x.shape[-1] // 2
    forces = _Forces(equation, x)
    forces.take(x)
    velocities = x[..., d:]
    split = torch.cat([velocities, forces.evaluate(0.0) - friction(scenario) * velocities], dim=-1)
    mu = equation.measure(x)
    drift = equation.drift(0.0, x, mu)
    if float((drift - split).abs().max()) > SAME[x.dtype] * max(1.0, float(split.abs().max())):
        raise ValueError(
            f"{equation.name}: drift(t, x, mu) is not (v, force - γv), so 'baoab' would solve another equation than "
            "'euler'. Inherit mfsde.Kinetic, which derives drift and diffusion, or use 'euler'."
        )
    sigma = equation.diffusion(0.0, x, mu)
    wanted = torch.cat([x.new_zeros(d, d), number(scenario, "sigma") * torch.eye(d, dtype=x.dtype, device=x.device)])
    if not isinstance(sigma, Tensor) or sigma.ndim != x.ndim + 1 or sigma.shape[-2:] != wanted.shape:
        raise ValueError(
            f"{equation.name}: diffusion(t, x, mu) is not the matrix (0, σI) of shape (1, 1, {2 * d}, {d}) that drives "
            "velocities alone. Inherit mfsde.Kinetic, which derives it, or use 'euler'."
        )
    if float((sigma - wanted).abs().max()) > SAME[x.dtype] * max(1.0, float(wanted.abs().max())):
        raise ValueError(
            f"{equation.name}: diffusion(t, x, mu) is not (0, σI) with its own sigma; 'baoab' knows no other noise. "
            "Inherit mfsde.Kinetic, or use 'euler'."
        )


class _Forces:
    """The force at the end of a step, kept for the start of the next one as long as nobody changed the state.

    It is computed from the same positions by the same call either way, so that a resumed run has the same bits.
    """

    def __init__(self, equation: Equation, x: Tensor) -> None:
        # The equation owns what is kept for it, and goes when it goes.
        self._equation: Any = weakref.proxy(equation)
        d = x.shape[-1] // 2
        # Positions in a row: a force that strides over velocities is several times slower.
        self.positions = x.new_empty((*x.shape[:-1], d))
        self._period = position_period(equation.period, d)
        # A step that is followed by a projection, or by births and deaths, does not start where the last one ended.
        self._keeps = not (equation.has_projection or getattr(equation, "has_birth_death", False))
        self._key: tuple[Any, ...] | None = None
        self._state: Tensor | None = None
        self._force = self.positions
        self._half = 0.0

    def fits(self, x: Tensor) -> bool:
        """Whether the buffers are those of such a state."""
        positions = self.positions
        shape = (*x.shape[:-1], x.shape[-1] // 2)
        return positions.shape == shape and positions.dtype is x.dtype and positions.device == x.device

    def at(self, t: float, x: Tensor, half: float) -> tuple[Tensor, bool]:
        """The force at the state x and time t, and whether a kick by it over a time `half` is still to come."""
        if self._half != half and self._holds(x):
            self.close(x)
        if self._keeps and self._key == self._identity(t, x):
            return self._force, self._half != 0
        self._refuse_changes(x)
        self.take(x)
        return self.evaluate(t), False

    def take(self, x: Tensor) -> None:
        """The positions of a state."""
        self.positions.copy_(x[..., : self.positions.shape[-1]])

    def law(self) -> EmpiricalMeasure:
        """The law of the positions."""
        equation = self._equation
        return EmpiricalMeasure.signed(self.positions, equation.weights, self._period, equation.key)

    def evaluate(self, t: float) -> Tensor:
        """The force at the positions and time t, (R, N, d)."""
        force: Tensor = self._equation.scenario.force(t, self.positions, self.law())
        return force.detach().contiguous()

    def renew(self, t: float, x: Tensor, due: float) -> None:
        """The force at the end of a step, whose kick over a time `due` is still to come."""
        self.keep(t, x, self.evaluate(t), due)

    def keep(self, t: float, x: Tensor, force: Tensor, due: float) -> None:
        """Remembers a force and the state that it belongs to."""
        self._force, self._half, self._state = force, due, x
        self._key = self._identity(t, x)

    def close(self, x: Tensor) -> None:
        """The kick that is still to come."""
        if self._half == 0 or not self._holds(x):
            return
        self._refuse_changes(x)
        kick_(x, self._force, self._half)
        self._half = 0.0
        if self._key is not None:
            self._key = (*self._key[:-1], x._version)

    def _identity(self, t: float, x: Tensor) -> tuple[Any, ...]:
        weights = self._equation.weights
        mass = None if weights is None else (weights.data_ptr(), weights._version)
        # The state is held, so that its address belongs to no other; torch counts the changes made to it.
        return t, mass, x.data_ptr(), x._version

    def _holds(self, x: Tensor) -> bool:
        return self._state is not None and self._state.data_ptr() == x.data_ptr()

    def _refuse_changes(self, x: Tensor) -> None:
        if self._half != 0 and self._holds(x) and self._key is not None and self._key[-1] != x._version:
            raise RuntimeError("the state was changed before the step's last kick; call splitting.close first.")


_known: weakref.WeakKeyDictionary[Equation, _Forces] = weakref.WeakKeyDictionary()


def _forces(equation: Equation, x: Tensor) -> _Forces:
    found = _known.get(equation)
    if found is None or not found.fits(x):
        found = _known[equation] = _Forces(equation, x)
    return found
