"""The particles of a run as the analysis receives them: labelled, with their weights and their torus, checked once."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import xarray as xr

Lengths = tuple[float, ...] | None


def positions(run: xr.Dataset | xr.DataArray, name: str = "run") -> xr.DataArray:
    """`position(..., particle, component)` of a run, or the array itself.

    Raises:
        TypeError: neither a Dataset nor a DataArray.
        ValueError: no positions were kept, or the dimensions are missing.

    """
    if isinstance(run, xr.Dataset):
        if "position" not in run:
            raise ValueError(
                f"{name} has no `position`; a run simulated with keep_particles=0 keeps none. Keep some "
                "(keep_particles=None keeps all)."
            )
        run = run["position"]
    if not isinstance(run, xr.DataArray):
        raise TypeError(f"{name} is a {type(run).__name__}; expected a run Dataset or its `position`.")
    if not {"particle", "component"} <= set(run.dims):
        raise ValueError(
            f"{name} has dimensions {run.dims}; expected `particle` and `component` among them (pass run or "
            'run["position"]).'
        )
    if run.size == 0:
        raise ValueError(f"{name} holds no values: its sizes are {dict(run.sizes)}. Check the selection of times.")
    return run


def weights(run: xr.Dataset | xr.DataArray) -> xr.DataArray | None:
    """The particles' masses where they are not equal.

    Raises:
        ValueError: a bare position of weighted particles, which has lost them.

    """
    if isinstance(run, xr.Dataset):
        found: xr.DataArray | None = run.get("weight")
        return found
    if "weighted" in run.attrs:
        raise ValueError("the particles have unequal masses; pass the run itself, which holds `weight`.")
    return None


def period(*runs: xr.DataArray) -> Lengths:
    """The torus that runs recorded with their positions: one length per component, infinite on a line.

    Raises:
        ValueError: the runs live on different tori.

    """
    recorded = {run.attrs["period"] for run in runs if "period" in run.attrs}
    if len(recorded) > 1:
        raise ValueError(f"the positions live on different tori, with periods {sorted(recorded)}.")
    if not recorded:
        return None
    return tuple(math.inf if length is None else float(length) for length in json.loads(recorded.pop()))


def squared_units(position: xr.DataArray) -> str:
    """Units of a squared distance."""
    units = str(position.attrs.get("units", "1"))
    return units if units == "1" else f"({units})²"


def check_matching(a: xr.DataArray, b: xr.DataArray, dims: tuple[str, ...] = ("time", "component")) -> None:
    """Refuses two arrays whose labels differ along a dimension that both have.

    Raises:
        ValueError: labels differ; the message says where, and how many are shared.

    """
    for dim in dims:
        if dim not in a.dims or dim not in b.dims:
            continue
        left, right = (x[dim].values if dim in x.coords else np.arange(x.sizes[dim]) for x in (a, b))
        if left.shape == right.shape and (left == right).all():
            continue
        shared = np.intersect1d(left, right)
        move = (
            f"select the shared ones on both sides with .sel({dim}=...)"
            if len(shared)
            else "simulate both with the same dt and save_every"
            if dim == "time"
            else "compare laws on the same space"
        )
        raise ValueError(
            f"the labels along {dim!r} differ: {_short(left)} and {_short(right)}, {len(shared)} shared; {move}."
        )


def check_finite(values: np.ndarray, what: str) -> None:
    """Refuses values that are not finite.

    Raises:
        ValueError: some are not.

    """
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise ValueError(
            f"{what}: {bad} of {values.size} values are not finite. A run that blew up has no law; select the times "
            "before it did."
        )


def check_masses(values: np.ndarray, what: str) -> None:
    """Refuses masses, over the last axis, that are not those of a measure.

    Raises:
        ValueError: some are negative or not finite, or all are zero.

    """
    check_finite(values, what)
    if values.min() < 0 or values.sum(-1).min() <= 0:
        raise ValueError(
            f"{what}: masses must be non-negative and not all zero; the smallest is {values.min():.3g}, the smallest "
            f"total {values.sum(-1).min():.3g}."
        )


def _short(labels: Any) -> str:
    return f"{len(labels)} from {labels[0]} to {labels[-1]}" if len(labels) else "none"
