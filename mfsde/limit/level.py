"""The Fokker-Planck equation on one grid, and the box of a grid that holds its solution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..measure import EmpiricalMeasure, Law
from ..model import configuration, scenario_name
from ..progress import Progress
from . import results
from .coefficients import Coefficients
from .deposit import deposit
from .domain import Domain, first_box, widened
from .finite_volume import FiniteVolumes
from .free_energy import dissipation_of, first_order_residual, of_law, value_of
from .grid import Array, Grid
from .grid_law import GridLaw
from .integrators import Stepping
from .pilot import box_of_particles, moved_without_noise

PILOT_NODES = {1: 257, 2: 49}
PILOT = Stepping("bdf", 1e-4, 1e-10, None)
PILOT_TIMES = 9
MOST_PILOT_NODES = {1: 4097, 2: 97}
DOUBLINGS = 12
SUPPORT = 1e-14  # density, relative to its maximum, below which the chosen box ends


@dataclass(frozen=True)
class Level:
    """The solution on one grid: masses (T, *shape), ‖∂_t m‖_{L¹} (T,), and the largest cell Péclet number."""

    scenario: Any
    coefficients: Coefficients
    domain: Domain
    grid: Grid
    mass: Array
    residual: Array
    peclet: float

    @classmethod
    def solved(
        cls,
        scenario: Any,
        start: Law | EmpiricalMeasure,
        domain: Domain,
        grid: Grid,
        times: Array,
        stepping: Stepping,
        bar: Progress | None = None,
        done: int = 0,
    ) -> Level:
        """Solved from the initial law to the times."""
        first = deposit(start, grid)
        coefficients = Coefficients(scenario, grid.points, first.ravel(), births=True)
        check_noise(coefficients, grid, first, times)
        volumes = FiniteVolumes(coefficients, grid)
        reached = iter(range(done + 1, done + len(times) + 1))

        def watch(t: float) -> None:
            if bar is not None:
                bar.at(next(reached))

        mass = stepping.solve(volumes, first.ravel(), times, watch)
        slopes = [volumes.slope(float(t), m) for t, m in zip(times, mass, strict=True)]
        found = mass.reshape(-1, *grid.shape)
        peclet = max(volumes.peclet(float(t), m) for t, m in zip(times, mass, strict=True))
        return cls(scenario, coefficients, domain, grid, found, np.abs(slopes).sum(1), peclet)

    @property
    def density(self) -> Array:
        """Nodal densities, (T, *shape)."""
        density: Array = self.mass / self.grid.widths
        return density

    def tails(self) -> Array:
        """Mass near the open ends of the grid, (T,)."""
        return self.domain.tails(self.mass, self.grid)

    def law(self, k: int) -> GridLaw:
        """The law at time k."""
        return GridLaw.of_mass(self.grid, self.mass[k])

    def moments(self) -> results.Series:
        """Mean and covariance along time."""
        return results.moments(*self.grid.unrolled(self.mass))

    def energies(self, gradient_flow: bool) -> Mapping[str, Array]:
        """Energy along time, and for a gradient flow what belongs to it."""
        found: dict[str, list[float]] = {}
        for k in range(len(self.mass)):
            for name, value in _energies(self.coefficients.scenario, self.law(k), gradient_flow).items():
                found.setdefault(name, []).append(value)
        return {name: np.array(values) for name, values in found.items()}

    def is_gradient_flow(self, times: Array) -> bool:
        """Whether the flow descends the free energy by transport alone, judged at some laws and times."""
        if self.coefficients.has_birth_death:
            return False
        laws = [self.grid.measure(self.mass[0]), *self.grid.few_atoms(3)]
        return self.coefficients.is_gradient_flow(self.grid.points, laws, (0.0, float(times[-1]) / 2, float(times[-1])))


def check_noise(coefficients: Coefficients, grid: Grid, mass: Array, times: Array) -> None:
    """Refuses an equation without noise."""
    mu = grid.measure(mass)
    if not any(coefficients.covariance(float(t), grid.points, mu).any() for t in (0.0, times[-1] / 2, times[-1])):
        raise ValueError(
            f"{coefficients.name} has σ = 0: its law is carried along characteristics and need not have a density. Use "
            "mfsde.limit.characteristics."
        )


def _energies(scenario: Any, law: GridLaw, gradient_flow: bool) -> dict[str, float]:
    m = of_law(law)
    with torch.no_grad():
        found = {"energy": float(scenario.energy(configuration(scenario, m.measure)))}
    if gradient_flow:
        found["free_energy"] = float(value_of(scenario, m))
        found["dissipation"] = float(dissipation_of(scenario, m))
        found["first_order_residual"] = first_order_residual(scenario, law)
    return found


def support(scenario: Any, start: Law | EmpiricalMeasure, domain: Domain, times: Array) -> tuple[Array, Array]:
    """A box outside of which the density stays below 1e-14 of its maximum, found on coarse grids.

    Where a component moves without noise, the box of `pilot`: coarse grids would smear mass over any box.

    Raises:
        ValueError: the mass leaves every box.

    """
    low, high = first_box(start, domain)
    if hasattr(scenario, "reinjection"):
        other = first_box(scenario.reinjection()[1], domain)
        low, high = np.minimum(low, other[0]), np.maximum(high, other[1])
    if all(_is_closed(domain, k) for k in range(start.dim)):
        return low, high
    degenerate = [k for k in moved_without_noise(scenario, start, times) if not _is_closed(domain, k)]
    if degenerate and times[-1] > 0:
        found = box_of_particles(scenario, start, domain, times)
        if found is None:
            raise ValueError(_leaves(scenario, low, high, times))
        return found
    pilots = np.union1d(times, np.linspace(0, times[-1], PILOT_TIMES)) if times[-1] > 0 else times
    first = high - low
    for _ in range(DOUBLINGS):
        # Cells stay as small as they began: larger ones smear a drift that points outwards over any box.
        n = min(MOST_PILOT_NODES[start.dim], round(PILOT_NODES[start.dim] * float(((high - low) / first).max())))
        grid = Grid.box(list(low), list(high), n, domain.period)
        level = Level.solved(scenario, start, domain, grid, pilots, PILOT)
        carried = [_carrying(level, k) for k in range(start.dim)]
        out = [(k, side) for k, (_, reached) in enumerate(carried) for side in reached]
        if not out:
            shrunk = np.array([ends for ends, _ in carried])
            return np.maximum(shrunk[:, 0], domain.low), np.minimum(shrunk[:, 1], domain.high)
        low, high = widened(low, high, out, domain)
    raise ValueError(_leaves(scenario, low, high, times))


def _leaves(scenario: Any, low: Array, high: Array, times: Array) -> str:
    return (
        f"{scenario_name(scenario)}: the mass leaves every grid up to [{low[0]:.3g}, {high[0]:.3g}] before t = "
        f"{times[-1]:g}. Either the equation does not confine it, or the law has heavy tails, or noise is degenerate "
        "(weak or none along a component) and the cells smear mass outwards; pass a grid, or stop earlier."
    )


def _is_closed(domain: Domain, k: int) -> bool:
    circle = domain.period is not None and domain.period[k] is not None
    return circle or bool(np.isfinite([domain.low[k], domain.high[k]]).all())


def _carrying(level: Level, k: int) -> tuple[tuple[float, float], list[int]]:
    """The stretch of axis k that carries mass at some time, and the open ends that it comes near."""
    axis = level.grid.axes[k]
    if axis.is_circle:
        return (axis.nodes[0], axis.nodes[0] + axis.length), []
    density = np.moveaxis(level.density, k + 1, -1).reshape(len(level.mass), -1, len(axis.nodes)).max(1)
    carries = np.flatnonzero((density > SUPPORT * density.max(1, keepdims=True)).any(0))
    first, last, n = int(carries[0]), int(carries[-1]), len(axis.nodes)
    reached = [s for s, near in ((0, first < 2), (1, last > n - 3)) if near and level.domain.is_open(axis, k, s)]
    return (axis.nodes[max(0, first - 2)], axis.nodes[min(n - 1, last + 2)]), reached
