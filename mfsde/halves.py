"""A system and the two made of its halves: samples of a functional of the law that couple two levels.

Levels, P_ℓ and P̂_{ℓ-1} are those of `multilevel`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import provenance
from .clock import Clock
from .draws import Shuffles
from .euler import euler
from .measure import EmpiricalMeasure, Law
from .model import Equation, has_births, on_device, scenario_name
from .noise import Noise, Stream
from .pairwise.convolution import recorded
from .settings import Settings

Array = np.ndarray
Functional = Callable[[float, Tensor, EmpiricalMeasure], Tensor]

# Keyed replicas of a level: level ℓ has those from ℓ·SAMPLES on, plain Monte Carlo those of the last slot.
SAMPLES = 2**27
PLAIN_SLOT = 30
# Particles are stepped in batches of this many numbers: in the processor's cache, or enough for a GPU.
BATCH, GPU_BATCH = 2**16, 2**23
# Work of a step of N particles is N^p.
WORK = {"mean": 1, "pairwise": 2}
BRIDGED = (Stream.COMMON, Stream.COMMON_AREA)


@dataclass(frozen=True)
class DividedNoise(Noise):
    """The noise of one system, given to `parts` smaller ones that have its particles between them.

    System r·parts + j of a shape (R·parts, n, m) has the noise of the particles jn, ..., (j + 1)n - 1 of the ordinary
    replica `first` + r, and what is common to that replica.
    """

    parts: int = 1
    first: int = 0

    def euler_(
        self,
        x: Tensor,
        drift: Tensor,
        h: float,
        diffusion: float | Tensor,
        step: int,
        *,
        stream: Stream = Stream.IDIOSYNCRATIC,
    ) -> None:
        """X += h·drift + √h·diffusion·ΔW, with the roundings of `Noise.euler_`."""
        k = self.substeps
        z = self._sum(step * k, k, (x.shape[0], x.shape[1], x.shape[2]), stream, 0, 0, x.dtype, x.device, None, 1.0)
        x.add_((h * drift).add_(z.mul_(math.sqrt(h / k) * diffusion)))

    def _sum(
        self,
        fine: int,
        k: int,
        window: tuple[int, int, int],
        stream: Stream,
        first_replica: int,
        first_particle: int,
        dtype: torch.dtype,
        device: torch.device | str,
        out: Tensor | None,
        scale: float | None = None,
    ) -> Tensor:
        systems, n, m = window
        shared = stream in BRIDGED
        whole = (systems // self.parts, n if shared else n * self.parts, m)
        z = super()._sum(fine, k, whole, stream, self.first, 0, dtype, device, None, scale)
        z = z.repeat_interleave(self.parts, 0) if shared else z.view(window)
        return z if out is None else out.copy_(z)


@dataclass(frozen=True)
class Samples:
    """Samples of one level: values (M, 2) of P_ℓ and P̂_{ℓ-1} (0 on level 0), and the seconds that they took."""

    values: Array
    seconds: float

    def joined(self, more: Samples) -> Samples:
        """These and more of the same level."""
        return Samples(np.concatenate([self.values, more.values]), self.seconds + more.seconds)


@dataclass(frozen=True)
class Problem:
    """A checked scenario and functional, with the settings of the coarsest level."""

    equation: Equation
    law: Law
    functional: Functional
    settings: Settings
    work: int

    @classmethod
    def checked(
        cls, scenario: Any, functional: Functional, horizon: Any, dt: Any, n_particles: Any, seed: Any,
        interaction: str, device: Any, dtype: Any,
    ) -> Problem:  # fmt: skip
        """Checked arguments of `estimate`.    TypeError, ValueError: as it says."""
        if interaction not in WORK:
            raise ValueError(f"interaction = {interaction!r}; expected one of {', '.join(map(repr, WORK))}.")
        settings = Settings.checked(
            n_particles=n_particles, horizon=horizon, dt=dt, seed=seed, n_replicas=1, save_every=None,
            keep_particles=None, method="euler", device=device, dtype=dtype, noise=None, checkpoint_every=None,
        )  # fmt: skip
        _check_scenario(scenario)
        moved = on_device(scenario, torch.device(settings.device), settings.torch_dtype)
        law = moved.initial() if hasattr(moved, "initial") else None
        if not isinstance(law, Law):
            raise TypeError(
                f"{scenario_name(scenario)}.initial() returned a {type(law).__name__}; levels have different numbers "
                "of particles, so they need a law to start from (mfsde.Gaussian([0.0], [[1.0]]), ...)."
            )
        # A number of replicas that differs from that of particles: a functional that mixes them up is found out.
        n_replicas = 3 if settings.n_particles != 3 else 4
        x = _start(law, DividedNoise(settings.seed), (n_replicas, settings.n_particles), settings)
        equation = Equation(moved, x, key=Shuffles(DividedNoise(settings.seed), 0, n_replicas, x.device))
        if equation.is_random:
            raise ValueError(
                f"{equation.name} sums over random batches, whose shuffles the two halves of a system do not share. "
                "Use another strategy for its sums over pairs."
            )
        problem = cls(equation, law, functional, settings, WORK[interaction])
        problem.evaluate(x)
        return problem

    def n_steps(self, level: int) -> int:
        """Of a level, to the horizon."""
        return self.settings.n_steps << level

    def n_particles(self, level: int) -> int:
        """N_ℓ."""
        return self.settings.n_particles << level

    def dt(self, level: int) -> float:
        """h_ℓ."""
        return math.ldexp(self.settings.dt, -level)

    def system_cost(self, level: int) -> float:
        """Of one system."""
        return self.n_steps(level) * math.pow(self.n_particles(level), self.work)

    def unit_cost(self, level: int) -> float:
        """Of one difference P_ℓ - P̂_{ℓ-1}: the fine system and its two halves."""
        return self.system_cost(level) + (2 * self.system_cost(level - 1) if level else 0.0)

    def samples(self, level: int, first: int, count: int, slot: int | None = None) -> Samples:
        """The samples first, ..., first + count - 1 of a level."""
        if first + count > SAMPLES:
            raise ValueError(
                f"level {level} needs {first + count} samples, more than its {SAMPLES} keys; take a larger tolerance "
                "or more particles on the coarsest level."
            )
        started = time.perf_counter()
        batch = BATCH if self.settings.device == "cpu" else GPU_BATCH
        size = max(1, batch // (self.n_particles(level) * self.law.dim))
        place = (level if slot is None else slot) * SAMPLES
        values = np.zeros((count, 2))
        for start in range(0, count, size):
            end = min(start + size, count)
            replicas = (place + first + start, end - start)
            values[start:end, 0] = self.ends(level, level, *replicas)[:, 0]
            if level:
                values[start:end, 1] = self.ends(level - 1, level, *replicas).mean(1)
        return Samples(values, time.perf_counter() - started)

    def ends(self, level: int, path: int, first: int, count: int) -> Array:
        """Ψ at the horizon of the systems of a level, on the paths of the systems of a level `path` ≥ `level`.

        (count, 2^{path - level}): a system of the level `path` has the particles of that many systems of this one.
        """
        parts = 2 ** (path - level)
        noise = DividedNoise(self.settings.seed, substeps=parts, parts=parts, first=first)
        clock = Clock(self.dt(level))
        with torch.no_grad():
            x = _start(self.law, noise, (count * parts, self.n_particles(level)), self.settings)
            for step in range(self.n_steps(level)):
                euler(self.equation, clock, noise, step, x)
                if self.equation.has_projection:
                    x = self.equation.project(clock.time(step + 1), x).contiguous()
            values = self.evaluate(x).double()
        # Fourth powers make the kurtosis: where they are not finite, no moment says anything.
        if not bool(torch.isfinite(values**4).all()):
            raise FloatingPointError(
                f"{self.equation.name} blew up on level {level} (dt = {clock.dt:g}, {self.n_particles(level)} "
                "particles), or the functional is not finite there. Take a smaller dt for the coarsest level, or a "
                "drift that grows at most linearly."
            )
        found: Array = values.cpu().numpy().reshape(count, parts)
        return found

    def evaluate(self, x: Tensor) -> Tensor:
        """Ψ of the empirical laws of a state, checked.    (R, N, d) -> (R,)."""
        value = self.functional(self.settings.horizon, x, self.equation.measure(x))
        if not isinstance(value, Tensor):
            raise TypeError(
                f"the functional returned a {type(value).__name__}; expected a tensor of shape (R,), for instance "
                "mu.integrate(lambda x: x[..., 0].square())."
            )
        if value.shape != x.shape[:1]:
            raise ValueError(
                f"the functional returned shape {tuple(value.shape)} for {x.shape[0]} systems of {x.shape[1]} "
                f"particles in dimension {x.shape[2]}; expected ({x.shape[0]},), one number for each system."
            )
        return value.detach()

    def attributes(self, more: dict[str, Any]) -> dict[str, Any]:
        """Provenance."""
        described = provenance.describe(self.equation.scenario)
        told = {**self.settings.as_dict(), "work": self.work, **more}
        return {
            **described,
            "settings": told,
            "functional": provenance.encode(self.functional),
            "noise": self.settings.noise.identity(),
            **recorded(self.equation.strategies),
            "versions": provenance.versions(),
        }


def _start(law: Law, noise: Noise, shape: tuple[int, int], settings: Settings) -> Tensor:
    """Initial particles (R, N, d), as `simulate` draws them."""
    variates = (*shape, law.n_variates)
    options: dict[str, Any] = {"dtype": settings.torch_dtype, "device": torch.device(settings.device)}
    z = torch.empty(variates, **options)
    if law.n_variates:
        z = noise.normals(0, variates, stream=Stream.INITIAL, **options)
    return law.from_variates(z).contiguous()


def _check_scenario(scenario: Any) -> None:
    name = scenario_name(scenario)
    if has_births(scenario):
        raise ValueError(
            f"{name} has births and deaths: which particle is born from which differs between a system and its halves, "
            "so that levels do not couple. Use mfsde.simulate with replicas."
        )
    if hasattr(scenario, "sampled_drift"):
        raise ValueError(
            f"{name} samples its data anew in every step, and the noise of the samples is of the order of the step: "
            "it has no path that a coarser level could share. Use mfsde.simulate with replicas, or a scenario with the "
            "drift of all data."
        )
