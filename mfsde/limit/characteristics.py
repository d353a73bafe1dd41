"""Equations without noise: the law is carried along X_i' = b(t, X_i, Σ_j w_j δ_{X_j}) from a quadrature of its start.

With births and deaths the masses follow w_i' = -w_i (V(X_i) - Σ_j w_j V(X_j)), V the birth-death rate: together the
Wasserstein-Fisher-Rao flow where b = -∇V.

Where the scenario has a domain, characteristics that reach its wall stay in it and follow the tangential part of b for
as long as b points outwards: x' = lim (project(x + εb) - x)/ε, the projected dynamical system.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from scipy.integrate import BDF, DOP853, Radau
from torch import Tensor

from ..energy import Energy
from ..measure import EmpiricalMeasure, Law, Mixture
from ..model import scenario_name
from ..progress import Progress
from ..torus import period_lengths
from . import results
from .coefficients import Coefficients, initial_law

Array = np.ndarray

METHODS = {"dop853": DOP853, "bdf": BDF, "radau": Radau}
NODES = {1: 256, 2: 32}  # on each axis, by the number of normal variates that make a point
FEWEST = 4
FARTHEST = 8.0  # deviations of a normal variate
# Distances, relative to the place (or 1):
ROUNDING = 1e-14  # of what rounding may do to a projection that leaves a point alone
LEAVING = 1e-10  # beyond the wall, from which on a point has met it
PROBE = 1e-8  # along a velocity, to find the wall
TURN = 1e-5  # along a velocity, to see how the wall turns it
MOST_STEPS = 100_000
SLOW = 2.0  # seconds for one call of the drift that are worth a word
LEAST = 1e-300  # of a mass, so that it has a logarithm


def characteristics(
    scenario: Any,
    times: Any,
    *,
    start: Law | EmpiricalMeasure | None = None,
    n_nodes: int | None = None,
    method: str = "dop853",
    rtol: float = 1e-9,
    atol: float = 1e-12,
    store: results.Path_ | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> xr.Dataset:
    """The law of the limit ∂_t m = -∇·(b m) - (V - ∫ V dm) m of an equation without noise, along its characteristics.

    V is the birth-death rate, 0 where there is none.

    The start is a weighted measure of points: the quadrature of a law (the trapezoidal rule in its normal variates,
    which converges geometrically for smooth laws and flows), or a given measure, taken as it is. The points
    are a law: nobody is left out of an interaction (`include_self=False` makes no difference).

    Args:
        scenario: as for `simulate`, with diffusion 0. `project` gives a domain whose wall is not stepped through (the
            nearest point, or a reflection; the wall is known to about 1e-8), `period` a torus.
        times: increasing, from 0 on; the equation always starts at 0.
        start: a law or a measure of points (N, d), instead of the scenario's `initial()`.
        n_nodes: nodes for each normal variate of the law: 256 for one variate, 32 for each of two. Laws of three and
            more are represented by their `as_measure()`, or the first n_nodes of its points.
        method: "dop853" (explicit, order 8), or for stiff equations "bdf" or "radau".
        rtol: relative tolerance of the steps.
        atol: absolute tolerance of the steps.
        store: a folder to write to, opened again by `mfsde.open_run`.
        overwrite: replace an existing store.
        progress: show how far it is: a drift that compares all pairs of points takes long in high dimension.

    Returns:
        Dataset over `time`, like a weighted run of one replica: `position` (replica, particle, component), `weight`
        (replica, particle); `mean`, `covariance`, and `energy` of a scenario that has one. For a start that is a law,
        `mean_error`, `covariance_error` and `energy_error`: the change from half as many nodes for each variate, far
        above the error where the law is resolved, and no bound where it is not.

    Raises:
        TypeError, ValueError: bad input; noise.
        RuntimeError: characteristics that cannot be continued, with the time and the state.
        FileExistsError: the store exists.

    Source: Ambrosio, Gigli, Savaré, Gradient Flows (2008), proposition 8.1.8; Nagurney, Zhang, Projected Dynamical
    Systems (1996), for the wall.

    """
    times = results.checked_times(times)
    stepping = Stepping.checked(method, rtol, atol)
    begin = initial_law(scenario, start)
    points = _points(begin, n_nodes)
    is_checked = isinstance(begin, Law) and points.n_particles > 1
    name = f"limit of {scenario_name(scenario)} along {points.n_particles} points"
    with Progress(name, 0, 200 if is_checked else 100, progress, "percent") as bar:
        fine = Solution.of(scenario, points, times, stepping, Pace(bar, 0, times, points.n_particles, progress))
        if is_checked:
            half = _points(begin, n_nodes, halved=True)
            pace = Pace(bar, 100, times, half.n_particles, False)
            coarse = Solution.of(scenario, half, times, stepping, pace).averages()
    series = {**fine.particles(), **fine.averages()}
    if is_checked:
        for name, (dims, values, long_name, units) in fine.averages().items():
            gap = np.abs(values - coarse[name][1])
            series[f"{name}_error"] = (dims, gap, f"change of the {long_name} from half as many nodes", units)
    settings = {"method": method, "rtol": rtol, "atol": atol, "n_points": fine.positions.shape[1]}
    return results.dataset(scenario, times, series, fine.coordinates(), settings, store, overwrite)


class Pace:
    """Says how far an integration is, in percent from `first` on, and once that its drift is slow.    times: (T,)."""

    def __init__(self, bar: Progress, first: int, times: Array, n_points: int, shown: bool) -> None:
        self._bar, self._end, self._n_points = bar, float(times[-1]), n_points
        self._first = self._reached = first
        self._hints = shown
        self._before: float | None = None

    def at(self, t: float) -> None:
        """The drift is asked for at time t."""
        now = time.monotonic()
        if self._hints and self._before is not None and now - self._before > SLOW:
            self._hints = False
            print(
                f"one call of the drift takes {now - self._before:.1f} s at {self._n_points} points, and a step needs "
                "a dozen; n_nodes (--nodes) takes fewer points, and simulate(method='euler') one call a step.",
                file=sys.stderr,
                flush=True,
            )
        self._before = now
        # Steps that are rejected are taken anew from before.
        self._reached = max(self._reached, self._first + int(100 * min(t / self._end, 1.0)))
        self._bar.at(self._reached)


@dataclass(frozen=True)
class Stepping:
    """How the ordinary differential equation is solved."""

    method: str
    rtol: float
    atol: float

    @classmethod
    def checked(cls, method: str, rtol: float, atol: float) -> Stepping:
        """Refuses what is no method or no tolerance."""
        if method not in METHODS:
            raise ValueError(f"method = {method!r}; expected one of {', '.join(map(repr, METHODS))}.")
        for name, value in (("rtol", rtol), ("atol", atol)):
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
                raise ValueError(f"{name} = {value!r}; expected a positive number.")
        return cls(method, float(rtol), float(atol))


class Flow:
    """The velocities of points in the domain of their scenario, and the rates of their masses.

    A state is the points, (n, d), with the logarithms of their masses as one more column where particles are born and
    die: (n, d + 1).

    Args:
        scenario: as for `simulate`.
        start: the points at time 0.

    Raises:
        TypeError, ValueError: as for `simulate`; common noise; diffusion at time 0.

    """

    def __init__(self, scenario: Any, start: EmpiricalMeasure) -> None:
        self.name = scenario_name(scenario)
        if hasattr(scenario, "common_diffusion"):
            raise ValueError(
                f"{self.name} has common noise (common_diffusion), and so no characteristics; use "
                "mfsde.limit.fokker_planck, or simulate."
            )
        self._weights = start.weights.double()
        points, mass = start.points.double().numpy(), self._weights.numpy()
        self._coefficients = Coefficients(scenario, points, mass, births=True)
        self.scenario, self.period = self._coefficients.scenario, self._coefficients.period
        self.dim, self._reacts = points.shape[1], self._coefficients.has_birth_death
        self._check_closed()
        self.has_domain = self._coefficients.has_projection
        lengths = period_lengths(self.period, self.dim)
        self._is_circle = np.array([math.isfinite(length) for length in lengths])
        self.start = points
        if self._reacts:
            self.start = np.append(points, np.log(np.maximum(mass, LEAST))[:, None], axis=1)
        self.check_noiseless(0.0, self.start)

    def places(self, y: Array) -> Array:
        """The points of a state.    (n, d)."""
        return np.ascontiguousarray(y[:, : self.dim])

    def weights(self, y: Array) -> Tensor:
        """The masses of a state.    (n,)."""
        return torch.softmax(torch.from_numpy(y[:, self.dim]), 0) if self._reacts else self._weights

    def law(self, y: Array) -> EmpiricalMeasure:
        """The measure of a state."""
        return EmpiricalMeasure.given(torch.from_numpy(self.places(y)), self.weights(y), self.period)

    def _check_closed(self) -> None:
        """Refuses mass from outside, and velocities that jump."""
        if self._coefficients.reinjection is not None:
            raise ValueError(
                f"{self.name} reinjects particles, whose law is no finite number of points; use "
                "mfsde.limit.fokker_planck with a little noise, or simulate."
            )
        regulariser = getattr(self.scenario, "regulariser", None)
        if regulariser is not None and not (regulariser.is_smooth or regulariser.has_domain):
            raise ValueError(
                f"the velocity of {self.name} jumps at the kinks of its regulariser {regulariser}, which no smooth "
                "integrator steps over; simulate with method='proximal'."
            )

    def check_noiseless(self, t: float, y: Array) -> None:
        """Refuses diffusion."""
        a = self._coefficients.covariance(t, self.places(y), self.law(y))
        if a.any():
            raise ValueError(
                f"{self.name} has diffusion: σσᵀ reaches {float(np.abs(a).max()):.3g} at t = {t:g}. Characteristics "
                "are for equations without noise; use mfsde.limit.fokker_planck."
            )

    def velocity(self, t: float, y: Array) -> Array:
        """The drift at the points of a state of their law, and the rate of their masses; not finite where it is not."""
        at, w = torch.from_numpy(self.places(y))[None], self.weights(y)
        # Of a law, no particle is left out: the points are its atoms only for the quadrature.
        mu = EmpiricalMeasure.given(at, w[None], self.period)
        with torch.no_grad():
            b: Tensor = self.scenario.drift(t, at, mu)[0]
            if self._reacts:
                rate = self._coefficients.rate(t, at, mu)[0]
                b = torch.cat([b, (w @ rate - rate).unsqueeze(-1)], dim=-1)
        return b.detach().numpy()

    def slope(self, t: float, y: Array, held: Array) -> Array:
        """The velocity of every point, and of those held at the wall what the wall leaves of it."""
        x = self.nearest(y)
        v = self.velocity(t, x)
        return np.where(held[:, None], self._at_wall(x, v)[2], v) if held.any() else v

    def pressed(self, t: float, y: Array) -> tuple[Array, Array]:
        """Which points the velocity moves out of the domain, and the points, these on the wall.    (n,), (n, d)."""
        if not self.has_domain:
            return np.zeros(len(y), dtype=bool), y
        x = self.nearest(y)
        out, wall, _ = self._at_wall(x, self.velocity(t, x))
        return out, np.where(out[:, None], wall, x)

    def outside(self, y: Array) -> Array:
        """Which points have left the domain.    (n, d) -> (n,)."""
        return _far(self._projected(y), y, LEAVING)

    def nearest(self, y: Array) -> Array:
        """The points of the domain that the wall lets through to y; y itself inside.    (n, d)."""
        p = self._projected(y)
        off = _far(p, y, ROUNDING)
        if not off.any():
            return y
        # A projection that reflects takes y as far inside as it was outside: the wall is in the middle.
        middle = (p + y) / 2
        reflects = ~_far(self._projected(middle), middle, ROUNDING)
        return np.where(off[:, None], np.where(reflects[:, None], middle, p), y)

    def wrapped(self, y: Array) -> Array:
        """The points as the scenario stores them: inside, and on a torus in its box.    (n, d)."""
        x = self.places(self.nearest(y))
        return self._coefficients.project(x) if self.has_domain else x

    def _at_wall(self, x: Array, v: Array) -> tuple[Array, Array, Array]:
        """Whether v presses against the wall at x, the point of the wall, and lim (nearest(x + εv) - x)/ε.

        A wall across an axis stops one component and leaves the others alone, exactly. How any other wall turns v is
        extrapolated from two ε.    (n, d), (n, d) -> (n,), (n, d), (n, d).
        """
        speed = np.linalg.norm(v, axis=-1, keepdims=True)
        scale = np.maximum(1.0, np.abs(x).max(-1, keepdims=True))
        time = np.divide(scale, speed, out=np.ones_like(speed), where=speed > 1e-300)
        near, far = PROBE * time, TURN * time
        wall = self.nearest(x + near * v)
        ahead, farther = wall + near * v, wall + far * v
        back, turned = self.nearest(ahead), self.nearest(farther)
        free = back == ahead
        stopped = np.abs(back - wall) <= 4 * np.spacing(scale)
        oblique = ~(free | stopped).all(-1, keepdims=True)
        left = np.where(free, v, 0.0)
        if oblique.any():
            half = (self.nearest(wall + far / 2 * v) - wall) / (far / 2)
            left = np.where(oblique, 2 * half - (turned - wall) / far, left)
        return (turned != farther).any(-1), wall - near * left, left

    def _projected(self, y: Array) -> Array:
        if not self.has_domain:
            return y
        x = self.places(y)
        return np.append(np.where(self._is_circle, x, self._coefficients.project(x)), y[:, self.dim :], axis=1)


def _far(p: Array, y: Array, distance: float) -> Array:
    """Which points differ by more than a distance, relative to the place (or 1).    (n, d), (n, d) -> (n,)."""
    far: Array = (np.abs(p - y) > distance * np.maximum(1.0, np.abs(y))).any(-1)
    return far


@dataclass(frozen=True)
class Solution:
    """Points and masses along time.    positions: (T, n, d), weights: (T, n)."""

    flow: Flow
    positions: Array
    weights: Array

    @classmethod
    def of(cls, scenario: Any, start: EmpiricalMeasure, times: Array, stepping: Stepping, pace: Pace) -> Solution:
        """Solved from the start to the times."""
        flow, positions, weights = Flow(scenario, start), [], []
        for t, y in zip(times, _march(flow, times, stepping, pace), strict=True):
            flow.check_noiseless(float(t), y)
            positions.append(flow.wrapped(y))
            weights.append(flow.weights(y).numpy())
        return cls(flow, np.stack(positions), np.stack(weights))

    def particles(self) -> dict[str, Any]:
        """Positions and masses, as in a run."""
        dims = ("replica", "particle", "component")
        return {
            "position": (dims, self.positions[:, None], f"characteristics of {self.flow.name}", "1"),
            "weight": (dims[:2], self.weights[:, None], "mass of each particle", "1"),
        }

    def averages(self) -> dict[str, Any]:
        """Mean, covariance and energy along time."""
        series = dict(results.moments(self.positions, self.weights))
        energy = getattr(self.flow.scenario, "energy", None)
        if isinstance(energy, Energy):
            laws = (
                EmpiricalMeasure(torch.from_numpy(x), torch.from_numpy(w), period=self.flow.period)
                for x, w in zip(self.positions, self.weights, strict=True)
            )
            with torch.no_grad():
                series["energy"] = ((), np.array([float(energy(mu)) for mu in laws]), "energy F(m)", "1")
        return series

    def coordinates(self) -> dict[str, Any]:
        """Labels of replica, particle and component."""
        _, n, d = self.positions.shape
        return {
            "replica": (("replica",), np.arange(1), {"long_name": "independent copy of the system", "units": "1"}),
            "particle": (("particle",), np.arange(n), {"long_name": "particle", "units": "1"}),
            **results.component_coordinate(d),
        }


def _march(flow: Flow, times: Array, stepping: Stepping, pace: Pace) -> Iterator[Array]:
    """The points at the times, one after the other.

    The integrator starts anew whenever points meet the wall or are let go by it: between, the equation is smooth.
    """
    t, y, step = 0.0, flow.nearest(flow.start), None
    held, y = flow.pressed(t, y)
    waiting = [float(s) for s in times]
    if waiting[0] == t:
        yield y
        waiting.pop(0)
    n_steps = 0
    while waiting:
        solver = _solver(flow, t, y, held, waiting[-1], step, stepping, pace)
        restarted = False
        while waiting and not restarted:
            n_steps += 1
            _advance(flow, solver, n_steps)
            t, y, met = _until_wall(flow, solver, held)
            if waiting[0] < t:
                path = solver.dense_output()
                while waiting and waiting[0] < t:
                    yield path(waiting.pop(0)).reshape(y.shape)
            if waiting and waiting[0] == t:
                yield y
                waiting.pop(0)
            if met.any() or held.any():
                pressed, wall = flow.pressed(t, y)
                now = met | (held & pressed)
                there = np.where(now[:, None], wall, y)
                restarted = bool((now != held).any() or _far(there, y, LEAVING).any())
                held, y = now, there
        step = solver.t - solver.t_old


def _solver(
    flow: Flow, t: float, y: Array, held: Array, end: float, step: float | None, stepping: Stepping, pace: Pace
) -> Any:
    """Scipy's integrator from a state, with the points at the wall that are held there."""

    def slope(s: float, values: Array) -> Array:
        pace.at(s)
        return flow.slope(s, values.reshape(y.shape), held).ravel()

    first = None if step is None else min(step, end - t)
    with np.errstate(all="ignore"):
        method = METHODS[stepping.method]
        return method(slope, t, y.ravel(), end, rtol=stepping.rtol, atol=stepping.atol, first_step=first)


def _advance(flow: Flow, solver: Any, n_steps: int) -> None:
    """One step.    RuntimeError where there is none."""
    with np.errstate(all="ignore"):
        message = solver.step()
    if solver.status != "failed" and n_steps < MOST_STEPS:
        return
    x = solver.y.reshape(flow.start.shape)
    i = int(np.abs(x).max(-1).argmax())
    place = ", ".join(f"{value:.6g}" for value in x[i])
    reason = message or f"{n_steps} steps were made"
    raise RuntimeError(
        f"{flow.name}: the characteristics cannot be continued past t = {solver.t:.9g}, where the farthest particle, "
        f"{i}, is at ({place}): {reason}. They blow up there, or the drift is not Lipschitz; ask for earlier times, or "
        "try method='bdf' if the equation is stiff."
    )


def _until_wall(flow: Flow, solver: Any, held: Array) -> tuple[float, Array, Array]:
    """The end of the step, or the first time in it at which points leave the domain, and which do."""
    y = solver.y.reshape(flow.start.shape)
    free = ~held
    if not flow.has_domain or not (flow.outside(y) & free).any():
        return float(solver.t), y, np.zeros(len(y), dtype=bool)
    path = solver.dense_output()
    low, high = solver.t_old, solver.t
    while high - low > 4 * np.spacing(high):
        middle = (low + high) / 2
        y = path(middle).reshape(flow.start.shape)
        low, high = (low, middle) if (flow.outside(y) & free).any() else (middle, high)
    y = path(high).reshape(flow.start.shape)
    met = flow.outside(y) & free
    return float(high), np.where(met[:, None], flow.nearest(y), y), met


def _points(start: Law | EmpiricalMeasure, n_nodes: int | None, halved: bool = False) -> EmpiricalMeasure:
    """The measure that is carried along."""
    if isinstance(start, EmpiricalMeasure):
        if n_nodes is not None:
            raise ValueError("n_nodes is for laws; the start is a measure, which is taken as it is.")
        return start
    if n_nodes is not None and (not isinstance(n_nodes, int) or n_nodes < 2 * FEWEST):
        raise ValueError(f"n_nodes = {n_nodes!r}; expected a whole number, at least {2 * FEWEST}.")
    return quadrature(start, n_nodes, halved)


def quadrature(law: Law, n_nodes: int | None = None, halved: bool = False) -> EmpiricalMeasure:
    """A law as a weighted measure of points, in float64.

    Args:
        law: any; a mixture has the quadratures of its components side by side.
        n_nodes: for each normal variate, as for `characteristics`.
        halved: with half as many.

    """
    if isinstance(law, Mixture):
        parts = [quadrature(part, n_nodes, halved) for part in law.components]
        weights = [float(p) * part.weights for p, part in zip(law.weights, parts, strict=True)]
        return EmpiricalMeasure(torch.cat([part.points for part in parts]), torch.cat(weights))
    moving = _moving(law)
    if len(moving) > len(NODES):
        full = law.as_measure()
        n = min(n_nodes or full.n_particles, full.n_particles) // (2 if halved else 1)
        return EmpiricalMeasure(full.points[:n], full.weights[:n] / full.weights[:n].sum())
    n = (n_nodes or NODES.get(len(moving), 1)) // (2 if halved else 1)
    # Both errors of the rule, exp(-end²/2) for what is cut off and exp(-2π²/gap²), are then equal.
    end = min(FARTHEST, math.sqrt(math.pi * n))
    nodes = torch.linspace(-end, end, n, dtype=torch.float64)
    z = torch.zeros(n ** len(moving), law.n_variates, dtype=torch.float64)
    if moving:
        z[:, moving] = torch.cartesian_prod(*[nodes] * len(moving)).reshape(len(z), -1)
    density = torch.exp(-0.5 * z.square().sum(-1))
    return EmpiricalMeasure(law.from_variates(z), density / density.sum())


def _moving(law: Law) -> list[int]:
    """The variates that move the points of a law: a Gaussian of rank k has k of them."""
    at = torch.linspace(-1.0, 1.3, law.n_variates, dtype=torch.float64)
    steps = torch.cat(
        [torch.zeros(1, law.n_variates, dtype=torch.float64), torch.eye(law.n_variates, dtype=torch.float64)]
    )
    points = law.from_variates(at + steps)
    return [k for k in range(law.n_variates) if not torch.equal(points[k + 1], points[0])]
