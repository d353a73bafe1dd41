"""Limits of a run as pictures need them: the law at a time, and its density on a grid."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
import xarray as xr

from mfsde.measure import Law

from . import particles

COPIES = 3  # of a law on either side of its torus; more carry no mass that a picture could show

Array = np.ndarray


def at(law: Any, t: float) -> Law | xr.DataArray:
    """The limit at time t: a Law, or density(x)."""
    if isinstance(law, xr.Dataset):
        return _density_at(law, t)
    found = law if isinstance(law, Law) or not callable(law) else law(t)
    if not isinstance(found, Law):
        raise TypeError(
            f"the limit is a {type(found).__name__}; expected a Law, a function t -> Law, or a Dataset with "
            "density(time, x)."
        )
    return found


def _density_at(limit: xr.Dataset, t: float) -> xr.DataArray:
    if "density" not in limit or set(limit["density"].dims) != {"time", "x"}:
        raise ValueError("the limit Dataset has no density(time, x); pass one that has it, or t -> Law.")
    times = limit["time"].values
    slack = 1e-9 * max(1.0, abs(t))
    if not times[0] - slack <= t <= times[-1] + slack:
        raise ValueError(
            f"the limit is given on [{times[0]:g}, {times[-1]:g}] but t = {t:g} is drawn; solve it to the run's end."
        )
    if len(times) == 1:
        return limit["density"].isel(time=0)
    return limit["density"].interp(time=min(max(t, times[0]), times[-1]))


def atom(law: Law | xr.DataArray) -> Array | None:
    """The point that carries all mass of a law, None where there is no such point."""
    if isinstance(law, xr.DataArray) or not hasattr(law, "cov") or bool((law.cov != 0).any()):
        return None
    atom: Array = law.mean.numpy()  # type: ignore[attr-defined]
    return atom


def density(law: Law | xr.DataArray, nodes: Array, lengths: tuple[float, ...]) -> Array:
    """The density at nodes, wrapped around a torus.    (n, d) -> (n,)."""
    if isinstance(law, xr.DataArray):
        outside = {"left": 0.0, "right": 0.0} if math.isinf(lengths[0]) else {"period": lengths[0]}
        values: Array = np.interp(nodes[:, 0], law["x"].values, law.values, **outside)
    else:
        if not hasattr(law, "log_prob"):
            raise TypeError(f"a {type(law).__name__} has no log_prob, so no density can be drawn.")
        if law.dim != nodes.shape[1]:
            raise ValueError(
                f"the limit lives in dimension {law.dim} and the particles in {nodes.shape[1]}; pass the law of the "
                "components that are drawn."
            )
        turns = [(0,) if math.isinf(length) else range(-COPIES, COPIES + 1) for length in lengths]
        sides = np.array([0.0 if math.isinf(length) else length for length in lengths])
        moved = [torch.from_numpy(nodes + sides * turn) for turn in itertools.product(*turns)]
        values = np.sum([law.log_prob(points).exp().numpy() for points in moved], 0)
    particles.check_finite(values, "the density of the limit")
    return values
