"""Limit datasets as laws: the law at a time, between saved times by interpolation."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ..measure import EmpiricalMeasure, Law
from .grid_law import GridLaw
from .quantile_law import QuantileLaw

REMEMBERED = 4
LEVELS = 4096  # equal cells of the levels by which a law between two others is averaged


class Displacement(Law):
    """The law whose quantile function is (1 - s) Q₀ + s Q₁: on the W₂ geodesic from one law on the line to another.

    Args:
        first: the law at s = 0, with a quantile function.
        second: the law at s = 1.
        share: s in [0, 1].

    Source: McCann, A convexity principle for interacting gases, Adv. Math. 128 (1997).

    """

    def __init__(self, first: Any, second: Any, share: float) -> None:
        self._first, self._second, self._share = first, second, share

    @property
    def dim(self) -> int:
        """One."""
        return 1

    def quantile(self, u: Tensor) -> Tensor:
        """(1 - s) Q₀(u) + s Q₁(u)."""
        between: Tensor = torch.lerp(self._first.quantile(u), self._second.quantile(u), self._share)
        return between

    def from_variates(self, z: Tensor) -> Tensor:
        """The quantile of Φ(z)."""
        return self.quantile(torch.special.ndtr(z.double())).to(z.dtype)

    @cached_property
    def mean(self) -> Tensor:
        """(1,): (1 - s) m₀ + s m₁."""
        return torch.lerp(self._first.mean, self._second.mean, self._share)

    @property
    def cov(self) -> Tensor:
        """(1, 1), by `as_measure`."""
        return self.as_measure().covariance()

    def as_measure(self) -> EmpiricalMeasure:
        """Equal masses at the middles of equal cells of levels."""
        u = (torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS
        return EmpiricalMeasure(self.quantile(u)[:, None])


def law_at(limit: xr.Dataset, t: float) -> Law:
    """The law of a limit at a time between its first and its last.

    At saved times the saved law. Between two of them on the line the interpolated quantiles, O(Δt²) from the truth; on
    a circle, a torus or a plane the interpolated densities.

    Args:
        limit: a Dataset of `fokker_planck` (a density), or on the line of `characteristics` or `jko` (particles,
            quantiles).
        t: the time.

    Raises:
        ValueError: none of these, several paths of common noise, a time outside.

    """
    saved = _saved(limit)
    times = limit["time"].values
    slack = 1e-9 * max(1.0, abs(t))
    if not times[0] - slack <= t <= times[-1] + slack:
        raise ValueError(
            f"the limit is given on [{times[0]:g}, {times[-1]:g}] but asked for at t = {t:g}; solve it up to there."
        )
    right = int(np.clip(np.searchsorted(times, t), 0, len(times) - 1))
    near = right if right == 0 or abs(times[right] - t) <= abs(times[right - 1] - t) else right - 1
    if abs(times[near] - t) <= slack:
        return saved(near)
    share = float((t - times[right - 1]) / (times[right] - times[right - 1]))
    first, second = saved(right - 1), saved(right)
    if isinstance(first, GridLaw) and isinstance(second, GridLaw) and (first.dim > 1 or first.period is not None):
        mixed = (1 - share) * first.grid.show(first.density) + share * second.grid.show(second.density)
        return GridLaw(_nodes(limit), mixed, first.period)
    return Displacement(first, second, share)


def flow(limit: xr.Dataset) -> Callable[[float], Law]:
    """The map t ↦ `law_at(limit, t)`, the last few laws remembered: a law as the analysis takes it."""
    known: dict[float, Law] = {}
    _saved(limit)
    loaded = limit.load()

    def at(t: float) -> Law:
        if t not in known:
            if len(known) >= REMEMBERED:
                known.clear()
            known[t] = law_at(loaded, t)
        return known[t]

    return at


def _saved(limit: xr.Dataset) -> Callable[[int], Law]:
    """The law at the k-th saved time, by what the dataset holds of it."""
    if "density" in limit and set(limit["density"].dims) in ({"time", "x"}, {"time", "x", "y"}):
        return lambda k: _of_density(limit, k)
    if "quantile" in limit and set(limit["quantile"].dims) == {"time", "level"}:
        return lambda k: QuantileLaw(limit["level"].values, limit["quantile"].isel(time=k).values)
    if "position" in limit and limit.sizes["component"] == limit.sizes.get("replica", 1) == 1:
        return lambda k: _of_particles(limit, k)
    found = {str(name): values.dims for name, values in limit.data_vars.items() if name in ("density", "position")}
    raise ValueError(
        f"the dataset has {found or 'no density'}; a limit as a law has density(time, x) or density(time, x, y), or on "
        "the line quantiles or weighted particles. With common noise choose a path: limit.isel(replica=0)."
    )


def _of_density(limit: xr.Dataset, k: int) -> GridLaw:
    axes = _axes(limit)
    lengths = [limit[name].attrs.get("period") for name in axes]
    period = None if all(p is None for p in lengths) else [None if p is None else float(json.loads(p)) for p in lengths]
    return GridLaw(_nodes(limit), np.array(limit["density"].transpose("time", *axes).isel(time=k).values), period)


def _of_particles(limit: xr.Dataset, k: int) -> QuantileLaw:
    frame = limit.isel(time=k)
    points = frame["position"].values.reshape(-1)
    masses = frame["weight"].values.reshape(-1) if "weight" in limit else np.ones(len(points))
    return QuantileLaw.of_atoms(points, masses)


def _axes(limit: xr.Dataset) -> list[str]:
    return [axis for axis in ("x", "y") if axis in limit["density"].dims]


def _nodes(limit: xr.Dataset) -> Any:
    rows = [np.array(limit[name].values, dtype=np.float64) for name in _axes(limit)]
    return rows[0] if len(rows) == 1 else rows
