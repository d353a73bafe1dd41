"""Results of the deterministic side as datasets: labelled, with their provenance, stored and opened like runs."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr

from .. import provenance
from ..model import numeric_fields
from ..settings import label
from ..store import Coordinate, Layout, Memory, Variable, ZarrStore, open_run
from ..torus import period_lengths
from .grid import Grid

Array = np.ndarray
# Name -> dimensions after time, values (time, ...), long name, units.
Series = Mapping[str, tuple[tuple[str, ...], Array, str, str]]
Path_ = str | os.PathLike[str]

AXES = ("x", "y")


def dataset(
    scenario: Any,
    times: Array,
    series: Series,
    coords: Mapping[str, Coordinate],
    settings: Mapping[str, Any],
    store: Path_ | None = None,
    overwrite: bool = False,
) -> xr.Dataset:
    """Series over time as a dataset in memory, or from the store it was written to.

    Args:
        scenario: where it came from; its numeric fields become scalar coordinates.
        times: increasing, rounded to 12 significant digits here.
        series: name -> (dims without time, values (time, ...), long name, units).
        coords: name -> (dims, values, attributes).
        settings: plain values that say how it was computed; `method` becomes an attribute of its own.
        store: folder of a Zarr store, as for `simulate`.
        overwrite: replace an existing store.

    Raises:
        FileExistsError: the store exists.

    """
    variables = tuple(
        Variable(
            name,
            dims,
            values.shape[1:],
            str(values.dtype),
            {"long_name": long_name, "units": units, **(_geometry(scenario, series) if name == "position" else {})},
        )
        for name, (dims, values, long_name, units) in series.items()
    )
    layout = Layout(
        np.array([label(float(t)) for t in times]),
        variables,
        _coordinates(scenario, coords),
        _attributes(scenario, settings),
    )
    sink = Memory(layout) if store is None else ZarrStore.create(store, layout, overwrite)
    for k in range(len(times)):
        sink.append(k, {name: torch.from_numpy(np.array(values[k])) for name, (_, values, _, _) in series.items()})
    sink.close("complete")
    return sink.dataset() if isinstance(sink, Memory) else open_run(sink.path)


def checked_times(times: Any) -> Array:
    """The times of a result as an array.

    Raises:
        TypeError, ValueError: no increasing finite numbers from 0 on.

    """
    try:
        t = np.atleast_1d(np.asarray(times, dtype=np.float64))
    except (TypeError, ValueError):
        raise TypeError(f"times = {times!r:.60}; expected increasing numbers from 0 on.") from None
    if t.ndim != 1 or not len(t) or not np.isfinite(t).all() or t[0] < 0 or not (np.diff(t) > 0).all():
        raise ValueError(f"times = {times!r:.60}; expected increasing finite numbers from 0 on, at least one.")
    return t


def check_whole_steps(times: Array, dt: float) -> None:
    """Refuses times that are no whole numbers of steps."""
    off = np.abs(np.rint(times / dt) * dt - times) > 1e-9 * np.maximum(times, dt)
    if off.any():
        raise ValueError(f"times: {times[off][0]:g} is not a whole number of steps dt = {dt:g}; choose times that are.")


def axis_coordinates(grid: Grid) -> dict[str, Coordinate]:
    """The nodes as coordinates `x` (and `y`), with the period of a circle."""
    found: dict[str, Coordinate] = {}
    for name, axis in zip(AXES, grid.axes, strict=False):
        period = {"period": json.dumps(axis.length)} if axis.is_circle else {}
        found[name] = ((name,), axis.shown, {"long_name": "state", "units": "1", **period})
    return found


def component_coordinate(dim: int) -> dict[str, Coordinate]:
    """The components of the state."""
    return {"component": (("component",), np.arange(dim), {"long_name": "component of the state", "units": "1"})}


def moments(points: Array, mass: Array) -> Series:
    """`mean` and `covariance` of masses (..., n) on points (n, d) or (..., n, d), named as in runs.

    The leading axes are time and, with common noise, replica.
    """
    first = (mass[..., None] * points).sum(-2)
    centred = points - first[..., None, :]
    second = np.einsum("...n,...ni,...nj->...ij", mass, centred, centred)
    lead = ("replica",) * (mass.ndim - 2)
    return {
        "mean": ((*lead, "component"), first, "mean of the law", "1"),
        "covariance": ((*lead, "component", "component_2"), second, "covariance of the law", "1"),
    }


def _geometry(scenario: Any, series: Series) -> dict[str, str]:
    """What a distance between particles has to know, as a run tells it: masses that are not equal, and the torus."""
    told = {"weighted": "by the variable weight"} if "weight" in series else {}
    period = getattr(scenario, "period", None)
    if period is None:
        return told
    lengths = period_lengths(period, series["position"][1].shape[-1])
    return {**told, "period": json.dumps([length if length < math.inf else None for length in lengths])}


def _coordinates(scenario: Any, coords: Mapping[str, Coordinate]) -> dict[str, Coordinate]:
    scalars = {name: value for name, value in numeric_fields(scenario).items() if name not in coords}
    named: dict[str, Coordinate] = {
        name: ((), np.asarray(value), {"long_name": name, "units": "1"}) for name, value in scalars.items()
    }
    return {**coords, **named}


def _attributes(scenario: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    described = provenance.describe(scenario)
    return {
        **described,
        "settings": dict(settings),
        "method": str(settings["method"]),
        "versions": provenance.versions(),
        "digest": provenance.digest([described, dict(settings)]),
    }
