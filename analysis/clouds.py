"""Clouds: the particles of a run frame by frame, as pictures need them, on a line or wrapped into their torus."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from . import axes, particles

SHOWN_TIMES = 5

Array = np.ndarray


@dataclass(frozen=True)
class Cloud:
    """The particles of a run frame by frame, wrapped into the box of their torus; frames are read when asked for."""

    position: xr.DataArray
    weight: xr.DataArray | None
    lengths: tuple[float, ...]
    corner: tuple[float, ...]

    @property
    def dim(self) -> int:
        """Number of components."""
        return self.position.sizes["component"]

    @property
    def times(self) -> Array:
        """The saved times."""
        times: Array = self.position["time"].values.astype(float)
        return times

    def at(self, index: int) -> tuple[Array, Array]:
        """Points and masses at a time, pooled over replicas.    (n, d), (n,), the masses summing to 1."""
        frame = self.position.isel(time=index).transpose(..., "particle", "component")
        x = frame.values.astype(float).reshape(-1, self.dim)
        particles.check_finite(x, f"the particles at t = {self.times[index]:g}")
        x = np.stack([self.wrap(x[:, k], k) for k in range(self.dim)], -1)
        if self.weight is None:
            return x, np.full(len(x), 1 / len(x))
        mass = self.weight.isel(time=index) if "time" in self.weight.dims else self.weight
        w = mass.transpose(*frame.dims[:-1]).values.astype(float).ravel()
        particles.check_masses(w, f"the masses at t = {self.times[index]:g}")
        return x, w / w.sum()

    def mean(self, component: int) -> Array:
        """Over particles (and replicas), at every time; of a line, not of a torus."""
        x = self.position.isel(component=component)
        over = [dim for dim in x.dims if dim != "time"]
        means = x.mean(over) if self.weight is None else (x * self.weight).sum(over) / self.weight.sum(over)
        particles.check_finite(means.values, "the mean of the particles")
        return means.values.astype(float)

    def wrap(self, x: Array, component: int) -> Array:
        """Values of a component in the box of its torus."""
        length, corner = self.lengths[component], self.corner[component]
        return x if math.isinf(length) else corner + np.mod(x - corner, length)

    def box(self, component: int) -> tuple[float, float]:
        """The interval that a torus is shown on."""
        return self.corner[component], self.corner[component] + self.lengths[component]

    def window(self, component: int, *samples: Array) -> tuple[float, float]:
        """The box of a torus; on a line what holds all samples, with a margin."""
        if not math.isinf(self.lengths[component]):
            return self.box(component)
        low, high = min(float(x.min()) for x in samples), max(float(x.max()) for x in samples)
        margin = 0.05 * (high - low) or 0.5
        return low - margin, high + margin

    def title(self, component: int) -> str:
        """The label of an axis that shows a component."""
        name = "x" if self.dim == 1 else f"x, component {component}"
        return axes.with_units(name, self.position.attrs.get("units"))

    def density_title(self) -> str:
        """The label of an axis that shows a density of the cloud."""
        units = self.position.attrs.get("units")
        return axes.with_units(
            "density", None if axes.is_dimensionless(units) else f"1/{units}{'' if self.dim == 1 else '²'}"
        )


def of_run(run: xr.Dataset | xr.DataArray, replica: int | None = None) -> Cloud:
    """The cloud of all replicas, or of one."""
    position = particles.positions(run)
    weight = particles.weights(run)
    if "time" not in position.dims:
        raise ValueError(f"the particles have dimensions {position.dims}; keep the time: run.isel(time=[-1]).")
    further = [str(dim) for dim in position.dims if dim not in ("time", "replica", "particle", "component")]
    if further:
        raise ValueError(
            f"the particles have further dimensions {further}, whose laws are not one law; select along them: "
            f"run.isel({further[0]}=0)."
        )
    if replica is not None and "replica" in position.dims:
        r = position.sizes["replica"]
        if not -r <= replica < r:
            raise ValueError(f"replica {replica} does not exist; the run has {r}, from 0 on.")
        position = position.isel(replica=replica)
        weight = weight.isel(replica=replica) if weight is not None and "replica" in weight.dims else weight
    dim = position.sizes["component"]
    lengths = particles.period(position) or (math.inf,) * dim
    if len(lengths) != dim:
        # The attribute describes all components of the state, and the labels say which ones are left.
        lengths = tuple(lengths[int(k)] for k in position["component"].values)
    first = position.isel(time=0).min([d for d in position.dims if d not in ("time", "component")]).values
    # A run keeps its torus as [0, L) or [-L/2, L/2); the first frame tells which, and either shows the same law.
    corner = tuple(0.0 if low >= 0 else -length / 2 for low, length in zip(first, lengths, strict=True))
    return Cloud(position, weight, lengths, corner)


def cut(times: Array, x: Array, length: float) -> tuple[Array, Array]:
    """Paths with a gap wherever they cross the edge of the torus.    (T,), (T, n) -> (T', n), (T',)."""
    if math.isinf(length):
        return x, times
    jumps = np.abs(np.diff(x, axis=0)) > length / 2
    # A row of gaps between every two frames; where a path does not jump, it goes through the middle.
    middle = np.where(jumps, np.nan, (x[1:] + x[:-1]) / 2)
    wrapped = np.empty((2 * len(x) - 1, x.shape[1]))
    wrapped[::2], wrapped[1::2] = x, middle
    between = np.empty(2 * len(times) - 1)
    between[::2], between[1::2] = times, (times[1:] + times[:-1]) / 2
    return wrapped, between


def frame_of(times: Array, time: float | None, frame: int | None) -> int:
    """The index of a time or of a frame, by default of the last."""
    if time is not None and frame is not None:
        raise ValueError(f"time = {time} and frame = {frame} both say when; give one of them.")
    if time is not None:
        return index_of(times, time)
    index = -1 if frame is None else frame
    if not isinstance(index, (int, np.integer)) or not -len(times) <= index < len(times):
        raise ValueError(
            f"frame {index} does not exist; the run has {len(times)}, counted from 0, or from -1 backwards. For t = "
            f"{index} pass time={index}."
        )
    return int(index) % len(times)


def index_of(times: Array, time: float) -> int:
    """The frame nearest to a time."""
    slack = 1e-9 * max(1.0, float(np.abs(times).max()))
    if not times[0] - slack <= time <= times[-1] + slack:
        raise ValueError(f"t = {time} is outside the saved times [{times[0]:g}, {times[-1]:g}].")
    return int(np.abs(times - time).argmin())


def indices_of(times: Array, asked: float | Sequence[float] | None) -> list[int]:
    """The frames nearest to the times asked for, by default a few from first to last."""
    if asked is None:
        return sorted({round(k) for k in np.linspace(0, len(times) - 1, SHOWN_TIMES)})
    found = sorted({index_of(times, float(t)) for t in np.atleast_1d(np.asarray(asked, dtype=float))})
    if not found:
        raise ValueError(f"no times were asked for; the run has {len(times)}, from {times[0]:g} to {times[-1]:g}.")
    return found


def areas(weight: Array) -> Array:
    """Marker areas in proportion to the masses, smaller where there are many."""
    return weight * len(weight) * float(np.clip(4000 / len(weight), 2, 16))
