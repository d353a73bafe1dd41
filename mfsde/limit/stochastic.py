"""The Fokker-Planck equation given the common noise: one law per path of W⁰, driven by the increments that particles
get.

    dm = [-∂_x(b m) + ½ ∂_xx((σ² + |σ⁰|²) m)] dt - ∂_x(σ⁰ m) · dW⁰        (Itô, on the line or circle)

W⁰ moves points and not mass: a step is an implicit one of the rest on nodes that then go x ↦ x + v dt + σ⁰(t, x, m)
ΔW⁰, each with its mass, v the mean drift. That is Euler's step of the particles, with the idiosyncratic noise averaged
out; it is first order in dt as a law and needs no derivative of σ⁰. Nodes are laid anew where the mass no longer fits
them.

Source: Carmona, Delarue, Probabilistic Theory of Mean Field Games II (2018), §2.1 (conditional McKean-Vlasov
equations).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr

from ..measure import EmpiricalMeasure, Law
from ..model import scenario_name
from ..noise import Noise, Stream
from . import results, richardson
from .coefficients import Coefficients
from .deposit import deposit
from .domain import Domain, first_box
from .finite_volume import FiniteVolumes
from .grid import Array, Axis, Grid
from .grid_law import GridLaw
from .level import check_noise

NODES = 513
SUPPORT = 1e-14  # density, relative to its maximum, below which a window may end
NEAR = 1e-12  # density at an end, relative to the maximum, at which the window is laid anew
MARGIN = 0.2  # of the mass's stretch that a new window adds at either side
OUTSIDE = 1e-4  # mass that a user's grid may miss
SHARE = 0.5  # of a window that its mass must fill


@dataclass(frozen=True)
class Paths:
    """The paths of W⁰ that the replicas of a run with this noise and dt have; `saves` are the steps to be shown."""

    noise: Noise
    dt: float
    n_replicas: int
    saves: tuple[int, ...]

    @classmethod
    def checked(
        cls, scenario: Any, dim: int, dt: Any, seed: Any, noise: Any, n_replicas: int, times: Array, method: str | None
    ) -> Paths:
        """From the arguments of `fokker_planck`.

        Raises:
            TypeError, ValueError: what is missing or contradictory.

        """
        name = scenario_name(scenario)
        if dim != 1:
            raise ValueError(
                f"{name} has common noise in dimension {dim}; its law given W⁰ is computed on the line and the circle. "
                "Simulate with many particles instead: the replicas of a run are paths of W⁰."
            )
        if noise is not None and seed is not None and noise.seed != seed:
            raise ValueError(f"seed = {seed} contradicts noise.seed = {noise.seed}; pass one of them.")
        if dt is None or (seed is None and noise is None):
            raise TypeError(
                f"{name} has common noise, so its limit is a random law: pass dt= and seed= (or noise=), those of a "
                "run to get its paths of W⁰, and n_replicas=."
            )
        if method not in (None, "euler"):
            raise ValueError(f"method = {method!r}: an equation with common noise is stepped by 'euler', with dt.")
        if not (isinstance(dt, (int, float)) and math.isfinite(dt) and dt > 0):
            raise ValueError(f"dt = {dt!r}; expected a positive number.")
        if not isinstance(n_replicas, int) or n_replicas < 1:
            raise ValueError(f"n_replicas = {n_replicas!r}; expected a whole number >= 1.")
        results.check_whole_steps(times, dt)
        steps = np.rint(times / dt)
        return cls(Noise(seed) if noise is None else noise, float(dt), n_replicas, tuple(int(s) for s in steps))

    def increments(self, step: int, n_channels: int) -> Array:
        """ΔW⁰ of a step, (R, m)."""
        z = self.noise.increment(step, (self.n_replicas, 1, n_channels), stream=Stream.COMMON, dtype=torch.float64)
        increments: Array = math.sqrt(self.dt) * z[:, 0].numpy()
        return increments


def solve(
    scenario: Any,
    start: Law | EmpiricalMeasure,
    domain: Domain,
    grid: Any,
    times: Array,
    n_nodes: int | None,
    path: Paths,
    extrapolate: bool,
    store: results.Path_ | None,
    overwrite: bool,
) -> xr.Dataset:
    """The Dataset of `fokker_planck` for a scenario with common noise: density(time, replica, x)."""
    if np.isfinite([*domain.low, *domain.high]).any():
        raise ValueError(
            f"{scenario_name(scenario)} has walls and common noise, which would push mass through them; the law given "
            "W⁰ is computed on the line and the circle. Simulate with many particles instead."
        )
    given = Grid.given(grid, n_nodes, 1, domain.period)
    n = NODES if n_nodes is None else n_nodes
    n = n if given is None else given.shape[0]
    levels = [_laws(scenario, start, domain, path, size) for size in (n, 2 * n - 1)]
    shown = given or _window(levels[1], n, domain)
    densities = (_table(levels[0], shown), _table(levels[1], shown))
    _check_shown(shown.integral(densities[1]), shown)
    moments = (_moments(levels[0]), _moments(levels[1]))
    series = richardson.paired(shown, densities, moments, ("replica",), combine=extrapolate, told=" given W⁰")
    settings = {
        "method": "euler", "dt": path.dt, "noise": path.noise.identity(), "n_replicas": path.n_replicas, "nodes": [n],
        "extrapolate": extrapolate,
    }  # fmt: skip
    replica = (("replica",), np.arange(path.n_replicas), {"long_name": "path of the common noise", "units": "1"})
    own = {"dt": path.dt, "seed": path.noise.seed}
    coords = {
        **results.axis_coordinates(shown), **results.component_coordinate(1), "replica": replica,
        **{name: ((), np.asarray(value), {"long_name": name, "units": "1"}) for name, value in own.items()},
    }  # fmt: skip
    return results.dataset(scenario, times, series, coords, settings, store, overwrite)


Laws = list[list[GridLaw]]


def _laws(scenario: Any, start: Law | EmpiricalMeasure, domain: Domain, path: Paths, n: int) -> Laws:
    """The law at every output time, for every path: [time][replica]."""
    low, high = first_box(start, domain)
    first = Grid.box(list(low), list(high), n, domain.period)
    mass = deposit(start, first)
    coefficients = Coefficients(scenario, first.points, mass)
    check_noise(coefficients, first, mass, path.dt * np.array(path.saves))
    states = [(first, mass)] * path.n_replicas
    found: Laws = []
    step = 0
    for save in path.saves:
        while step < save:
            moves = path.increments(step, coefficients.n_common)
            states = [
                _stepped(coefficients, step * path.dt, path.dt, *state, move)
                for state, move in zip(states, moves, strict=True)
            ]
            step += 1
        found.append([GridLaw.of_mass(*state) for state in states])
    return found


def _stepped(
    coefficients: Coefficients, t: float, dt: float, grid: Grid, mass: Array, move: Array
) -> tuple[Grid, Array]:
    """One step of one path: mass along the nodes, then the nodes."""
    mu = grid.measure(mass)
    nodes = grid.points
    velocity = float(mass @ coefficients.drift(t, nodes, mu)[:, 0])
    after = FiniteVolumes(coefficients, grid).generator(t, mass, velocity).implicit_step(mass, dt)
    after = after / after.sum()
    moved = nodes[:, 0] + velocity * dt + coefficients.common(t, nodes, mu)[:, 0] @ move
    axis = grid.axes[0]
    turn = moved[-1] - moved[0]
    if not (np.diff(moved) > 0).all() or turn >= axis.length:
        raise ValueError(
            f"{coefficients.name}: at t = {t:g} the common noise carries points across one another in one step dt = "
            f"{dt:g}; take a smaller dt (with noise=mfsde.Noise(seed) and the run's substeps)."
        )
    return _laid(Grid((Axis(moved, axis.length, axis.is_closed),)), after)


def _laid(grid: Grid, mass: Array) -> tuple[Grid, Array]:
    """The mass on a window that it fills, and that ends where there is nearly none; the same one while it does."""
    axis, n = grid.axes[0], len(mass)
    if axis.is_circle:
        if axis.gaps.max() < 2 * axis.gaps.min():
            return grid, mass
        fresh = Axis(axis.nodes[0] + axis.length * np.arange(n) / n, axis.length, axis.is_closed)
    else:
        density = mass / axis.widths
        carries = np.flatnonzero(density > SUPPORT * density.max())
        low, high = axis.nodes[carries[0]], axis.nodes[carries[-1]]
        fits = max(density[0], density[-1]) < NEAR * density.max()
        if fits and high - low > SHARE * (axis.nodes[-1] - axis.nodes[0]) and axis.gaps.max() < 2 * axis.gaps.min():
            return grid, mass
        margin = MARGIN * (high - low)
        fresh = Axis(np.linspace(low - margin, high + margin, n))
    law = GridLaw.of_mass(grid, mass)
    laid = Grid((fresh,))
    fitted = np.exp(law.log_prob(torch.from_numpy(laid.points)).numpy()) * laid.widths
    return laid, fitted / fitted.sum()


def _window(laws: Laws, n: int, domain: Domain) -> Grid:
    """Even nodes around the mass of all laws."""
    if domain.period is not None:
        return Grid.box([float(laws[0][0].nodes[0][0])], [0.0], n, domain.period)
    ends = []
    for law in (law for row in laws for law in row):
        carries = law.nodes[0][law.density > SUPPORT * law.density.max()]
        ends.append((carries[0], carries[-1]))
    low, high = np.array(ends).T
    return Grid.box([float(low.min())], [float(high.max())], n)


def _check_shown(mass: Array, shown: Grid) -> None:
    if np.abs(mass - 1).max() > OUTSIDE:
        nodes = shown.axes[0].nodes
        raise ValueError(
            f"the grid on [{nodes[0]:g}, {nodes[-1]:g}] holds {mass.flat[np.abs(mass - 1).argmax()]:.6g} of the mass "
            "instead of 1 on some path at some time: W⁰ carries it out, or the nodes are too coarse. Widen or refine "
            "it, or pass grid=None to have it chosen."
        )


def _table(laws: Laws, shown: Grid) -> Array:
    """Densities (T, R, n) at the nodes that are shown."""
    points = torch.from_numpy(shown.points)
    return np.exp([[law.log_prob(points).numpy() for law in row] for row in laws])


def _moments(laws: Laws) -> results.Series:
    unrolled = [[law.grid.unrolled(law.density * law.grid.widths) for law in row] for row in laws]
    points, mass = (np.array([[pair[k] for pair in row] for row in unrolled]) for k in (0, 1))
    return results.moments(points, mass)
