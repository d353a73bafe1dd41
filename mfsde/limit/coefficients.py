"""A scenario's drift and diffusion as the deterministic side reads them: at any points, for any law, in float64.

They are the methods that the particles call, checked by the same `Equation`; only the law they are given differs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..energy import Energy
from ..measure import EmpiricalMeasure, Law
from ..model import Equation, confinement_gradient, energy_of, fields, has_births, on_device, scenario_name

Array = np.ndarray

SAME = 1e-6  # relative difference of a drift from that of an energy that rounding allows
CHECKED = 64  # points at which a scenario's methods are checked


class Coefficients:
    """b(t, x, m), a(t, x, m) = σσᵀ and σ⁰(t, x, m) of a scenario, as arrays.

    Args:
        scenario: a frozen dataclass with drift, diffusion and initial.
        points: (n, d), at some of which its methods are checked.
        mass: (n,), their masses.
        births: whether the caller knows what to do about births and deaths.

    Raises:
        TypeError, ValueError: as for `simulate`: a method is missing or returns what it should not; births and deaths
            that the caller cannot take; a domain that moves.

    """

    def __init__(self, scenario: Any, points: Array, mass: Array, births: bool = False) -> None:
        fields(scenario)
        _check_known(scenario, births)
        self.scenario = on_device(scenario, torch.device("cpu"), torch.float64)
        self.name = scenario_name(scenario)
        some = np.unique(np.linspace(0, len(points) - 1, CHECKED).round().astype(int))
        shares = np.asarray(mass, dtype=np.float64)[some] + 1e-300
        x = torch.from_numpy(np.asarray(points, dtype=np.float64)[some])[None]
        self._equation = Equation(self.scenario, x, torch.from_numpy(shares / shares.sum())[None])
        self.period = self._equation.period
        self.dim = x.shape[-1]

    @property
    def has_common_noise(self) -> bool:
        """Whether one Brownian motion drives all particles."""
        return self._equation.has_common_noise

    @property
    def n_common(self) -> int:
        """Number of its components."""
        return self._equation.n_common

    @property
    def is_general(self) -> bool:
        """Whether σ is a matrix, so that a may have entries off the diagonal."""
        return self._equation.form == "general"

    @property
    def has_birth_death(self) -> bool:
        """Whether particles are born and die."""
        return self._equation.has_birth_death

    @property
    def reinjection(self) -> tuple[float, Law] | None:
        """Rate and law of the mass that comes from outside."""
        return self._equation.reinjection

    def rate(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """The birth-death rate V at points (1, n, d) of the law, (1, n), 0 where there is none."""
        return self._equation.birth_death_rate(t, x, mu)

    def excess_rate(self, t: float, mu: EmpiricalMeasure) -> Array:
        """L = V - ∫ V dm at the atoms of the law m, V the birth-death rate: ∂_t m = ... - L m.    (n,)."""
        at, law = _beside(mu.points.reshape(-1, self.dim).numpy(), mu)
        with torch.no_grad():
            rate = self._equation.birth_death_rate(t, at, law)[0].double()
        found: Array = (rate - law.weights[0] @ rate).numpy()
        return self._checked(found, "birth_death_rate", t)

    def drift(self, t: float, x: Array, mu: EmpiricalMeasure) -> Array:
        """The drift b at points (n, d).    ValueError where it is not finite."""
        at, law = _beside(x, mu)
        with torch.no_grad():
            b = self._equation.drift(t, at, law)
        return self._checked(b[0].numpy(), "drift", t)

    def covariance(self, t: float, x: Array, mu: EmpiricalMeasure) -> Array:
        """The matrix a = σσᵀ at points (n, d): its diagonal (n, d), or the whole (n, d, d) where σ is a matrix."""
        at, law = _beside(x, mu)
        with torch.no_grad():
            sigma = self._equation.diffusion(t, at, law)
        if self.is_general:
            assert isinstance(sigma, Tensor)
            s = sigma.expand(*at.shape, sigma.shape[-1])[0]
            return self._checked((s @ s.mT).numpy(), "diffusion", t)
        return self._checked(np.square(_expanded(sigma, at)[0]), "diffusion", t)

    def noiseless(self, times: Sequence[float], x: Array, laws: Sequence[EmpiricalMeasure]) -> list[int]:
        """The components without noise at points (n, d), at all the times and laws."""
        noisy = np.zeros(self.dim, dtype=bool)
        for t in times:
            for mu in laws:
                a = self.covariance(t, x, mu)
                noisy |= (a if a.ndim == 2 else np.diagonal(a, axis1=1, axis2=2)).any(0)
        return [int(k) for k in np.flatnonzero(~noisy)]

    def common(self, t: float, x: Array, mu: EmpiricalMeasure) -> Array:
        """σ⁰ at points (n, d): (n, d, m)."""
        at, law = _beside(x, mu)
        with torch.no_grad():
            sigma = self._equation.common_diffusion(t, at, law)
        if self._equation.common_form == "general":
            assert isinstance(sigma, Tensor)
            return self._checked(sigma.expand(*at.shape, sigma.shape[-1])[0].numpy(), "common_diffusion", t)
        diagonal = _expanded(sigma, at)[0]
        return self._checked(diagonal[..., None] * np.eye(self.dim), "common_diffusion", t)

    def project(self, x: Array) -> Array:
        """Points (n, d) moved back into the domain; unchanged where the scenario has none."""
        if not self._equation.has_projection:
            return x
        with torch.no_grad():
            moved: Array = self._equation.project(0.0, torch.from_numpy(x.copy())[None])[0].numpy()
        return moved

    @property
    def has_projection(self) -> bool:
        """Whether positions are moved back into a domain."""
        return self._equation.has_projection

    def is_gradient_flow(self, points: Array, laws: list[EmpiricalMeasure], times: tuple[float, ...] = (0.0,)) -> bool:
        """Whether b = -(D_mF + T ∇U), T = σ²/2, and a = σ² I hold at points (n, d), for all the laws and times."""
        energy, sigma = getattr(self.scenario, "energy", None), getattr(self.scenario, "sigma", None)
        if not isinstance(energy, Energy) or sigma is None or not float(sigma) > 0:
            return False
        return all(self.detour(points, mu, t) <= SAME for t in times for mu in laws)

    def detour(self, points: Array, mu: EmpiricalMeasure, t: float = 0.0) -> float:
        """Largest difference of b and -(D_mF + T ∇U), relative to b (or 1); infinite where a is not σ² I."""
        energy, sigma = energy_of(self.scenario), float(self.scenario.sigma)
        a = self.covariance(t, points, mu)
        if a.ndim != 2 or np.abs(a - sigma**2).max() > SAME * sigma**2:
            return math.inf
        # An energy sees a measure, not the law that a drift lives in.
        plain = EmpiricalMeasure(mu.points, mu.weights, period=mu.period)
        x = torch.from_numpy(points)
        slope = energy.intrinsic_derivative(plain, x) + 0.5 * sigma**2 * confinement_gradient(self.scenario, x)
        b = self.drift(t, points, mu)
        return float(np.abs(b + slope.numpy()).max()) / max(1.0, float(np.abs(b).max()))

    def _checked(self, values: Array, method: str, t: float) -> Array:
        if not np.isfinite(values).all():
            where = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
            raise ValueError(
                f"{self.name}.{method} is not finite at t = {t:g}: value {values[where]} at node {where[0]}. The limit "
                "evaluates it on the whole grid; leave such states out of the grid, or bound the coefficient there."
            )
        return values


def _check_known(scenario: Any, births: bool) -> None:
    name = scenario_name(scenario)
    if has_births(scenario) and not births:
        raise ValueError(
            f"{name} has births and deaths, which are followed in time only: use "
            "mfsde.limit.fokker_planck, mfsde.limit.characteristics where there is no noise, or simulate."
        )
    if hasattr(scenario, "project_at"):
        raise ValueError(
            f"{name} has a domain that moves (project_at), and grids stand still; simulate, or map the domain to a "
            "fixed one by a change of variables."
        )


def initial_law(scenario: Any, start: Any = None) -> Law | EmpiricalMeasure:
    """The law to start from: the given one, or the scenario's.

    Raises:
        TypeError: there is none, or it is no law.

    """
    if isinstance(start, Law) or (isinstance(start, EmpiricalMeasure) and start.points.ndim == 2):
        return start
    if start is not None:
        raise TypeError(
            f"start = {start!r:.60} does not do. This start is a {type(start).__name__}; expected a law "
            "(mfsde.Gaussian([0.0], [[1.0]])) or one EmpiricalMeasure of points (N, d)."
        )
    start = scenario.initial() if hasattr(scenario, "initial") else None
    if isinstance(start, EmpiricalMeasure) and start.points.ndim == 2:
        return start
    if isinstance(start, Law):
        return start
    raise TypeError(
        f"{scenario_name(scenario)}.initial() returned a {type(start).__name__}; the limit starts from a law "
        "(mfsde.Gaussian([0.0], [[1.0]]), ...) or one mfsde.EmpiricalMeasure of points (N, d)."
    )


def check_dimension(scenario: Any, d: int) -> None:
    """Refuses states of more than two components, with what else there is."""
    if d > 2:
        raise ValueError(
            f"{scenario_name(scenario)} lives in dimension {d}; densities are computed on grids in d = 1 or 2. In "
            "higher dimensions: mfsde.limit.moments for linear-quadratic equations, else simulate with many particles."
        )


def _beside(x: Array, mu: EmpiricalMeasure) -> tuple[Tensor, EmpiricalMeasure]:
    """Points and law with the replica axis that scenarios are used to."""
    at = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float64))[None]
    if mu.points.ndim == 3:
        return at, mu
    return at, EmpiricalMeasure.given(mu.points[None], mu.weights[None], mu.period)


def _expanded(sigma: float | Tensor, x: Tensor) -> Array:
    value = torch.as_tensor(sigma, dtype=x.dtype)
    return value.expand(x.shape).numpy()
