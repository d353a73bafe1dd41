"""The steps of a run once more, with their graph: what is differentiated.

A run overwrites its state and detaches its coefficients. `Replay` has the same steps for some of its replicas, as
functions of the state, of weights and of a scenario whose parameters are tensors.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from .clock import Clock
from .diffusion import along_columns, product
from .draws import Shuffles
from .measure import EmpiricalMeasure, Law
from .noise import Stream
from .run import System
from .settings import Settings

# Transports that have a step here.
METHODS = ("euler", "milstein", "heun")


class Replay:
    """The steps of a run for some of its replicas, out of place and with their graph.

    The same operations as the run's own, in the same order up to the rounding of a sum.
    """

    def __init__(self, system: System, scenario: Any, weights: Tensor | None, first_replica: int) -> None:
        self._equation = system.equation
        self._scenario, self._weights, self._first = scenario, weights, first_replica
        self._clock, self._noise = Clock(system.settings.dt), system.settings.noise
        self._advance = {"euler": self._euler, "milstein": self._milstein, "heun": self._heun}[system.method.transport]

    def measure(self, x: Tensor, step: int | None = None) -> EmpiricalMeasure:
        """The empirical measure of a state, with the randomness of a step for sums over pairs that draw."""
        key = None if step is None else Shuffles(self._noise, step, len(x), x.device, self._first)
        return EmpiricalMeasure.signed(x, self._weights, self._equation.period, key)

    def step(self, step: int, x: Tensor) -> Tensor:
        """The state one step later."""
        moved = self._advance(step, x)
        if hasattr(self._scenario, "project_at"):
            moved = self._scenario.project_at(self._clock.time(step + 1), moved)
        elif hasattr(self._scenario, "project"):
            moved = self._scenario.project(moved)
        return moved

    def _euler(self, step: int, x: Tensor) -> Tensor:
        """X + (h·b + √h·σ ξ) + √h·σ⁰ ξ⁰."""
        t, h, mu = self._clock.time(step), self._clock.dt, self.measure(x, step)
        own, common = self._increments(step, x)
        moved: Tensor = x + (h * self._scenario.drift(t, x, mu) + self._own(t, x, mu, own))
        return moved if common is None else moved + self._common(t, x, mu, common)

    def _milstein(self, step: int, x: Tensor) -> Tensor:
        """Euler's step + ½ h σσ'(ξ² - 1), component by component."""
        moved = self._euler(step, x)
        if self._equation.is_additive:
            return moved
        t, h, mu = self._clock.time(step), self._clock.dt, self.measure(x)
        own, _ = self._increments(step, x)
        return moved + 0.5 * h * self._self_derivative(t, x, mu) * (own.square() - 1)

    def _heun(self, step: int, x: Tensor) -> Tensor:
        """The mean of Euler's steps with coefficients of the start and of its end, Stratonovich; law in σ frozen."""
        law = self.measure(x)
        drift, noise = self._stratonovich(step, step, x, law)
        drift_end, noise_end = self._stratonovich(step, step + 1, x + drift + noise, law)
        return x + 0.5 * (drift + drift_end + noise + noise_end)

    def _stratonovich(self, step: int, at: int, x: Tensor, law: EmpiricalMeasure) -> tuple[Tensor, Tensor]:
        t, h = self._clock.time(at), self._clock.dt
        own, common = self._increments(step, x)
        drift = self._scenario.drift(t, x, self.measure(x, step))
        if not self._equation.is_additive:
            drift = drift - 0.5 * self._self_derivative(t, x, law)
        noise = self._own(t, x, law, own)
        return h * drift, noise if common is None else noise + self._common(t, x, law, common)

    def _self_derivative(self, t: float, x: Tensor, law: EmpiricalMeasure) -> Tensor:
        """Σ_j (∂_x G_j) G_j over the columns of own and common diffusion, law frozen."""
        total = along_columns(lambda z: self._scenario.diffusion(t, z, law), x)
        if self._equation.has_common_noise:
            total = total + along_columns(lambda z: self._scenario.common_diffusion(t, z, law), x)
        return total

    def _own(self, t: float, x: Tensor, mu: EmpiricalMeasure, w: Tensor) -> Tensor:
        return product(math.sqrt(self._clock.dt) * self._scenario.diffusion(t, x, mu), w)

    def _common(self, t: float, x: Tensor, mu: EmpiricalMeasure, w: Tensor) -> Tensor:
        return product(math.sqrt(self._clock.dt) * self._scenario.common_diffusion(t, x, mu), w)

    def _increments(self, step: int, x: Tensor) -> tuple[Tensor, Tensor | None]:
        options: dict[str, Any] = {"first_replica": self._first, "dtype": x.dtype, "device": x.device}
        shape = (x.shape[0], x.shape[1], self._equation.n_channels)
        own = self._noise.increment(step, shape, **options)
        if not self._equation.has_common_noise:
            return own, None
        shared = (x.shape[0], 1, self._equation.n_common)
        return own, self._noise.increment(step, shared, stream=Stream.COMMON, **options)


def initial_state(scenario: Any, settings: Settings, rows: slice, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """The initial state of some replicas, and their weights, with their graph."""
    start = scenario.initial()
    count, n = rows.stop - rows.start, settings.n_particles
    if isinstance(start, Law):
        shape = (count, n, start.n_variates)
        z = like.new_empty(shape)
        if start.n_variates:
            z = settings.noise.normals(
                0, shape, stream=Stream.INITIAL, first_replica=rows.start, dtype=like.dtype, device=like.device
            )
        return start.from_variates(z), None
    lead = len(start.points) if start.points.ndim == 3 else 1
    chosen = rows if lead > 1 else slice(None)
    points = start.points.reshape(lead, *start.points.shape[-2:])[chosen].to(like).expand(count, n, start.dim)
    if start.is_uniform:
        return points, None
    return points, start.weights.reshape(lead, n)[chosen].to(like).expand(count, n)
