"""Implicit steps of a law on the line that is held by its quantiles."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from scipy.special import ndtr

from ..energy import Energy
from ..measure import Law
from ..store import Coordinate
from . import results
from .grid import Array, Grid
from .mirror import Reaction, relevelled, value_of
from .newton import minimised
from .proximal import Proximal
from .quantile_map import Entropy, Levels

LEAST_SLOPE = 1e-8  # of a quantile map, in deviations: below it a law has an atom or ends
LOST = 1e-6  # mass over which the map may be as flat as that
AVERAGED = 16  # points between levels over which a map is averaged
UNRESOLVED = 1e-4  # error of the mean, in deviations, from which it is
OUTSIDE = 1e-4  # mass that a grid may miss


@dataclass(frozen=True, eq=False)
class Quantiles:
    """A law on the line as its quantiles X(z), (n,)."""

    energy: Energy
    internal: Energy
    entropy: Entropy
    confinement: Callable[[Array], Array]
    tau: float
    rate: float
    first: Array
    grid: Grid | None
    lead: ClassVar[tuple[str, ...]] = ()

    @property
    def levels(self) -> Levels:
        """The levels of the quantiles."""
        return self.entropy.levels

    @property
    def settings(self) -> dict[str, Any]:
        """What is recorded of the form."""
        return {"form": "quantiles", "levels": len(self.first)}

    @property
    def coords(self) -> dict[str, Coordinate]:
        """Coordinates of the dataset."""
        z = self.levels.z
        return {
            "level": (("level",), ndtr(z), {"long_name": "level of the quantile, Φ(z)", "units": "1"}),
            "z": (("level",), z, {"long_name": "normal deviate of the level", "units": "1"}),
            **results.component_coordinate(1),
            **({} if self.grid is None else results.axis_coordinates(self.grid)),
        }

    @property
    def described(self) -> dict[str, tuple[tuple[str, ...], str]]:
        """Dimensions and long names of what a frame holds besides energies."""
        return {"quantile": (("level",), "quantile of the law"), "density": (("x",), "density of the law")}

    def transport(self, x: Array) -> tuple[Array, float, float]:
        """One W₂ step: the quantiles, the distance moved, the residual."""
        problem = Proximal(self.internal, self.levels.mass, x[:, None], self.tau, self.entropy)
        found, residual = minimised(problem, x[:, None])
        return found[:, 0], problem.norm(found - x[:, None]), residual

    def react(self, x: Array) -> tuple[Array, float, float]:
        """One KL step: the quantiles, KL(m₊ | m), the residual."""
        log_mass = np.log(self.levels.mass)
        # A level stands for the volume w/ρ = w X'/φ, and w ∝ φ.
        log_reference = np.log(self.levels.slopes(x) * self.levels.spacing) - self.confinement(x[:, None])
        temperature = self.entropy.temperature
        step = Reaction(self.energy, x[:, None], temperature, log_reference, self.rate, log_mass)
        found, divergence, residual = step.minimised()
        return relevelled(self.levels.z, x, found - log_mass), divergence, residual

    def frame(self, x: Array) -> dict[str, Any]:
        """What is stored at a time."""
        cloud = self.cloud(x)
        found = {
            "quantile": x,
            "energy": value_of(self.energy, *cloud),
            "free_energy": value_of(self.internal, *cloud) + self.entropy.value(x[:, None]),
        }
        return found if self.grid is None else {**found, "density": self.density(x, self.grid)}

    def density(self, x: Array, grid: Grid) -> Array:
        """The density at the nodes of a grid, (G,): φ/X' at the quantiles, its logarithm a cubic spline between."""
        nodes = grid.axes[0].nodes
        log_density = -(self.levels.z**2) / 2 - np.log(self.levels.slopes(x))
        inside = (nodes >= x[0]) & (nodes <= x[-1])
        lost = 1 - float(self.levels.mass @ ((x >= nodes[0]) & (x <= nodes[-1])))
        if lost > OUTSIDE:
            raise ValueError(
                f"grid: a share {lost:.2g} of the law lies outside [{nodes[0]:g}, {nodes[-1]:g}]; widen the grid, or "
                "leave it out: the quantiles need none."
            )
        values = np.zeros(len(nodes))
        values[inside] = np.exp(CubicSpline(x, log_density)(nodes[inside]))
        return grid.normalised(values)

    def cloud(self, x: Array) -> tuple[Array, Array]:
        """Points (n, 1) and their masses (n,)."""
        return x[:, None], self.levels.mass


def quantiles_of(law: Law, levels: Levels, name: str) -> Array:
    """X(z), (n,), increasing.    ValueError for a law with atoms."""
    x, mass = _resolved(law, levels), levels.mass
    least = LEAST_SLOPE * _deviation(x, mass) * levels.spacing
    gaps = np.diff(x)
    flat = float(mass[1:][~(gaps > least)].sum())
    if not np.isfinite(x).all() or flat > LOST:
        raise ValueError(
            f"{name} starts from a law with atoms (a share {flat:.2g} of its quantiles does not increase), whose "
            "entropy is infinite. Start from a law with a density, start=mfsde.Gaussian(...), or follow particles, "
            "n_particles=500."
        )
    # Beyond the ends of its support, and where u = Φ(z) has no digits left, a map would be flat.
    gaps = np.maximum(gaps, least)
    centre = len(x) // 2
    left, right = np.cumsum(gaps[:centre][::-1])[::-1], np.cumsum(gaps[centre:])
    return np.concatenate([x[centre] - left, x[centre : centre + 1], x[centre] + right])


def _resolved(law: Law, levels: Levels) -> Array:
    """The law's quantiles at the levels, or their averages between levels where these jump from one to the next."""
    shifts = (np.arange(AVERAGED) + 0.5) / AVERAGED - 0.5
    z = np.column_stack([levels.z, levels.z[:, None] + shifts * levels.spacing])
    variates = torch.from_numpy(z.reshape(-1, 1).repeat(max(1, law.n_variates), 1))[:, : law.n_variates]
    x = law.from_variates(variates)[:, 0].numpy().reshape(z.shape)
    at, averages = x[:, 0], x[:, 1:].mean(1)
    gap = abs(float(levels.mass @ (at - averages)))
    return at if gap <= UNRESOLVED * _deviation(at, levels.mass) else averages


def _deviation(x: Array, mass: Array) -> float:
    return math.sqrt(float(mass @ np.square(x - mass @ x)))
