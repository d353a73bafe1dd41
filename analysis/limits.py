"""Limits of a run, given as a Law, as t ↦ Law, or as a Dataset of `mfsde.limit`: what distances and pictures take.

A distance takes the law of a Dataset (`as_flow`), a picture its stored density, linear between times and nodes, or
where it has none the average density of its law between the middles of the nodes.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from typing import Any, TypeGuard

import numpy as np
import torch
import xarray as xr
from scipy.interpolate import RegularGridInterpolator

from mfsde import limit as mean_field
from mfsde.limit.free_energy import with_density
from mfsde.measure import Law

from . import particles

COPIES = 3  # of a law on either side of its torus; more carry no mass that a picture could show
AXES = ("x", "y")

Array = np.ndarray
Flow = Law | Callable[[float], Law]
Limit = Flow | xr.Dataset


def is_dataset(law: Any) -> TypeGuard[xr.Dataset]:
    """Whether this is a Dataset of `mfsde.limit`; a run knows its number of particles."""
    known = ("density", "quantile", "position")
    return isinstance(law, xr.Dataset) and "n_particles" not in law.coords and any(name in law for name in known)


def has_paths(law: Any) -> TypeGuard[xr.Dataset]:
    """Whether this is one law for each path of a common noise."""
    return is_dataset(law) and "density" in law and "replica" in law["density"].dims


def as_flow(law: Limit) -> Flow:
    """A Law, or t ↦ Law; of a Dataset that of its densities, quantiles or particles."""
    return mean_field.flow(law) if isinstance(law, xr.Dataset) else law


def check_paths(run: xr.Dataset | xr.DataArray, limit: xr.Dataset) -> None:
    """Refuses laws given paths of a common noise that are not those of the run's replicas.

    Raises:
        ValueError: other replicas, another seed, another resolution of the path.

    """
    position = particles.positions(run)
    particles.check_matching(position, limit["density"], ("replica",))
    ours, theirs = (_seed(data) for data in (position, limit))
    if None not in (ours, theirs) and ours != theirs:
        raise ValueError(
            f"the run has seed {ours}, the limit seed {theirs}: other paths of the common noise. Solve the limit with "
            f"seed={ours} (and the run's dt)."
        )
    fine = (_resolution(run), _resolution(limit))
    if not any(map(math.isnan, fine)) and not math.isclose(*fine, rel_tol=1e-9):
        raise ValueError(
            f"the run draws its noise at dt = {fine[0]:g}, the limit at dt = {fine[1]:g}: other paths of the common "
            "noise. Solve the limit with the run's dt, or give the coarser one noise=mfsde.Noise(seed, substeps=k)."
        )


def _seed(data: xr.Dataset | xr.DataArray) -> int | None:
    return int(data["seed"]) if "seed" in data.coords and data["seed"].ndim == 0 else None


def _resolution(data: xr.Dataset | xr.DataArray) -> float:
    """Step of the increments that a run or a limit draws, NaN where it does not say."""
    noise = data.attrs.get("noise") or json.loads(data.attrs.get("settings", "{}")).get("noise")
    if noise is None or "dt" not in data.coords:
        return math.nan
    substeps = (json.loads(noise) if isinstance(noise, str) else noise).get("substeps", 1)
    return float(data["dt"]) / int(substeps)


# Pictures


def pooled(law: Any, run: xr.Dataset | xr.DataArray, replica: int | None = None) -> Any:
    """The law of a run's particles pooled over its replicas: with common noise the mean over its paths.

    Args:
        law: as in `at`; what has no paths is returned as it is.
        run: the run that is drawn.
        replica: index of the one that is drawn; None pools all.

    """
    if not has_paths(law):
        return law
    check_paths(run, law)
    density = law["density"]
    return law.assign(density=density.mean("replica") if replica is None else density.isel(replica=replica, drop=True))


def at(law: Any, t: float) -> Law | xr.DataArray:
    """The limit at time t: a Law, or density(x) or density(x, y)."""
    if isinstance(law, xr.Dataset):
        return _density_at(law, t) if "density" in law else mean_field.law_at(law, t)
    found = law if isinstance(law, Law) or not callable(law) else law(t)
    if not isinstance(found, Law):
        raise TypeError(
            f"the limit is a {type(found).__name__}; expected a Law, a function t -> Law, or a Dataset with "
            "density(time, x) or density(time, x, y)."
        )
    return found


def _density_at(limit: xr.Dataset, t: float) -> xr.DataArray:
    if "density" not in limit or set(limit["density"].dims) not in ({"time", "x"}, {"time", "x", "y"}):
        raise ValueError(
            "the limit Dataset has no density(time, x) or density(time, x, y); pass one that has it, or t -> Law. With "
            "common noise choose a path: limit.isel(replica=0)."
        )
    times = limit["time"].values
    slack = 1e-9 * max(1.0, abs(t))
    if not times[0] - slack <= t <= times[-1] + slack:
        raise ValueError(
            f"the limit is given on [{times[0]:g}, {times[-1]:g}] but t = {t:g} is drawn; solve it to the run's end."
        )
    density = limit["density"].transpose("time", *(axis for axis in AXES if axis in limit["density"].dims))
    if len(times) == 1:
        return density.isel(time=0)
    return density.interp(time=min(max(t, times[0]), times[-1]))


def atom(law: Law | xr.DataArray) -> Array | None:
    """The point that carries all mass of a law, None where there is no such point."""
    if isinstance(law, xr.DataArray) or not hasattr(law, "cov") or bool((law.cov != 0).any()):
        return None
    atom: Array = law.mean.numpy()  # type: ignore[attr-defined]
    return atom


def density(law: Law | xr.DataArray, nodes: Array, lengths: tuple[float, ...]) -> Array:
    """The density at nodes, wrapped around a torus.    (n, d) -> (n,)."""
    dim = law.ndim if isinstance(law, xr.DataArray) else law.dim
    if dim != nodes.shape[1]:
        raise ValueError(
            f"the limit lives in dimension {dim} and the particles in {nodes.shape[1]}; pass the law of the "
            "components that are drawn."
        )
    if isinstance(law, xr.DataArray):
        values = _stored(law, nodes, lengths)
    elif (own := circles(law)) is not None:
        _check_circles(own, lengths)
        values = with_density(law).log_prob(torch.from_numpy(nodes)).exp().numpy()
    else:
        if not hasattr(law, "log_prob") and hasattr(law, "cdf") and len(nodes) > 1 and nodes.shape[1] == 1:
            return _averaged(law, nodes[:, 0])
        if not hasattr(law, "log_prob"):
            raise TypeError(f"a {type(law).__name__} has no log_prob, so no density can be drawn.")
        turns = [(0,) if math.isinf(length) else range(-COPIES, COPIES + 1) for length in lengths]
        sides = np.array([0.0 if math.isinf(length) else length for length in lengths])
        moved = [torch.from_numpy(nodes + sides * turn) for turn in itertools.product(*turns)]
        values = np.sum([law.log_prob(points).exp().numpy() for points in moved], 0)
    particles.check_finite(values, "the density of the limit")
    return values


def _averaged(law: Any, nodes: Array) -> Array:
    """The density averaged between the middles of increasing nodes: a law known by its quantiles may have atoms."""
    middles = (nodes[1:] + nodes[:-1]) / 2
    edges = np.concatenate([[2 * nodes[0] - middles[0]], middles, [2 * nodes[-1] - middles[-1]]])
    found: Array = np.diff(law.cdf(torch.from_numpy(edges)).numpy()) / np.diff(edges)
    return found


def circles(law: Law) -> tuple[float, ...] | None:
    """The torus that a law lives on by itself, None for one on a line or plane."""
    period = getattr(law, "period", None)
    if period is None:
        return None
    parts = [period] * law.dim if isinstance(period, (int, float)) else list(period)
    lengths = tuple(math.inf if length is None else float(length) for length in parts)
    return None if all(map(math.isinf, lengths)) else lengths


def _stored(density: xr.DataArray, nodes: Array, lengths: tuple[float, ...]) -> Array:
    """Linear between the nodes of a density, zero outside them; on a circle the last one's neighbour is the first."""
    names = density.dims
    recorded = [density[name].attrs.get("period") for name in names]
    if any(recorded):
        _check_circles(tuple(math.inf if r is None else float(r) for r in recorded), lengths)
    rows, values, points = [], density.values.astype(float), nodes.copy()
    for k, (name, length) in enumerate(zip(names, lengths, strict=True)):
        row = density[name].values.astype(float)
        if math.isfinite(length):
            points[:, k] = row[0] + np.mod(points[:, k] - row[0], length)
            if row[-1] < row[0] + length * (1 - 1e-9):
                row, values = np.append(row, row[0] + length), np.concatenate([values, values.take([0], k)], k)
        rows.append(row)
    found: Array = RegularGridInterpolator(rows, values, bounds_error=False, fill_value=0.0)(points)
    return found


def _check_circles(own: tuple[float, ...], lengths: tuple[float, ...]) -> None:
    if not np.allclose(own, lengths, rtol=1e-9, atol=0):
        raise ValueError(
            f"the limit lives on a torus of lengths {own} and the particles on one of {lengths}; compare laws on the "
            "same space."
        )
