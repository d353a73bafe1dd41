"""Implicit steps of a law that is held by particles, in any dimension."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from ..energy import Energy
from ..store import Coordinate
from . import results
from .grid import Array
from .mirror import Reaction, value_of
from .newton import minimised
from .proximal import Proximal

Pairs = tuple[Array, Array, Array]
Coupling = Callable[[Array, Array], Pairs]

COUPLINGS = 100  # rounds of coupling and minimisation
SAME = 1e-12  # relative difference of two transport costs that are equal


@dataclass(frozen=True, eq=False)
class Cloud:
    """Particles: the state is their positions (N, d) and log masses (N,)."""

    energy: Energy
    total: Energy
    tau: float
    rate: float
    first: tuple[Array, Array]
    is_weighted: bool
    coupling: Coupling
    bandwidth: float | None
    seed: int | None
    lead: ClassVar[tuple[str, ...]] = ("replica",)

    @property
    def settings(self) -> dict[str, Any]:
        """What is recorded of the form."""
        return {"form": "particles", "n_particles": len(self.first[1]), "bandwidth": self.bandwidth, "seed": self.seed}

    @property
    def coords(self) -> dict[str, Coordinate]:
        """Coordinates of the dataset."""
        n, d = self.first[0].shape
        return {
            "replica": (("replica",), np.arange(1), {"long_name": "independent copy of the system", "units": "1"}),
            "particle": (("particle",), np.arange(n), {"long_name": "particle", "units": "1"}),
            **results.component_coordinate(d),
        }

    @property
    def described(self) -> dict[str, tuple[tuple[str, ...], str]]:
        """Dimensions and long names of what a frame holds besides energies."""
        return {
            "position": (("particle", "component"), "particles"),
            "weight": (("particle",), "mass of each particle"),
        }

    def transport(self, state: tuple[Array, Array]) -> tuple[tuple[Array, Array], float, float]:
        """One W₂ step, rounds of minimisation at a fixed coupling and of coupling anew, until it is optimal."""
        y, log_mass = state
        mass, n = np.exp(log_mass), len(y)
        pairs: Pairs = (np.arange(n), np.arange(n), np.full(n, 1 / n))
        x = y
        for _ in range(COUPLINGS):
            x, residual = minimised(Proximal(self.total, mass, _origins(pairs, y), self.tau, None), x)
            anew = self._coupled(x, y)
            # Whether a set of pairs is optimal does not depend on their masses. Atoms on top of one another have
            # several optimal sets, so costs are compared.
            if _cost(anew, x, y) >= (1 - SAME) * _cost(pairs, x, y):
                i, j, shares = pairs
                return (x, log_mass), math.sqrt(_cost((i, j, shares * n * mass[i]), x, y)), residual
            if np.ptp(mass) > 0:
                raise RuntimeError(
                    f"jko: with tau = {self.tau:g} particles of unequal masses pass one another, and the optimal "
                    "coupling splits them. Take a smaller tau."
                )
            pairs = anew
        raise RuntimeError(
            f"jko: the coupling still changed after {COUPLINGS} rounds at tau = {self.tau:g}; take a smaller tau, or "
            "check that `coupling` returns optimal pairs."
        )

    def react(self, state: tuple[Array, Array]) -> tuple[tuple[Array, Array], float, float]:
        """One KL step of the masses."""
        x, log_mass = state
        # The smoothed entropy is a function of the masses like any other: nothing is left for a reference.
        step = Reaction(self.total, x, 0.0, np.zeros(len(x)), self.rate, log_mass)
        found, divergence, residual = step.minimised()
        return (x, found), divergence, residual

    def frame(self, state: tuple[Array, Array]) -> dict[str, Any]:
        """What is stored at a time."""
        cloud = self.cloud(state)
        found = {
            "position": cloud[0],
            "energy": value_of(self.energy, *cloud),
            "free_energy": value_of(self.total, *cloud),
        }
        return {**found, "weight": cloud[1]} if self.is_weighted else found

    def cloud(self, state: tuple[Array, Array]) -> tuple[Array, Array]:
        """Points (N, d) and their masses (N,)."""
        return state[0], np.exp(state[1])

    def _coupled(self, x: Array, y: Array) -> Pairs:
        """The optimal pairs of points, each of mass 1/N, checked."""
        i, j, masses = self.coupling(x, y)
        n = len(x)
        for name, side in (("x", i), ("y", j)):
            if np.abs(np.bincount(side, masses, n) - 1 / n).max() > 1e-9 / n:
                raise ValueError(
                    f"coupling: the masses it returned do not give every point of {name} the share 1/{n}; expected "
                    "pairs (i, j, masses) as mfsde.analysis.wasserstein.coupling returns them."
                )
        return i, j, masses


def _origins(pairs: Pairs, y: Array) -> Array:
    """Where each particle comes from, on average over its pairs, (N, d)."""
    i, j, shares = pairs
    sums = np.stack([np.bincount(i, shares * column, len(y)) for column in y[j].T], axis=-1)
    found: Array = sums / np.bincount(i, shares, len(y))[:, None]
    return found


def _cost(pairs: Pairs, x: Array, y: Array) -> float:
    i, j, masses = pairs
    return float(masses @ np.square(x[i] - y[j]).sum(-1))


def assignment(x: Array, y: Array) -> Pairs:
    """The optimal coupling for squared distance of two samples of N points: pairs i, j and their masses 1/N.

    (N, d), (N, d) -> three arrays (N,). By sorting in one dimension, O(N³) at worst above.
    """
    n = len(x)
    if x.shape[1] == 1:
        pairs = np.argsort(x[:, 0], kind="stable"), np.argsort(y[:, 0], kind="stable")
    else:
        pairs = linear_sum_assignment(cdist(x, y, "sqeuclidean"))
    return *pairs, np.full(n, 1 / n)


def blob(bandwidth: float) -> Energy:
    """∫ log(K_h * m) dm with K_h the Gaussian kernel of standard deviation h: ∫ m log m of the smoothed law, almost.

    Source: Carrillo, Craig, Patacchini, A blob method for diffusion (2019).
    """

    def kernel(z: torch.Tensor) -> torch.Tensor:
        size = (2 * math.pi * bandwidth**2) ** (z.shape[-1] / 2)
        bell: torch.Tensor = torch.exp(-0.5 / bandwidth**2 * z.square().sum(-1)) / size
        return bell

    return Energy(lambda mu: mu.integrate(lambda x: mu.convolve(kernel, x).log()))
