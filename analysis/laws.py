"""Runs against laws: the law at every saved time, and W₂ of every replica to it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr

from mfsde.measure import Law

from . import bures, floor, line, particles
from .labels import apply, described, replicated, threaded

Points = np.ndarray
Weights = np.ndarray | None
Flow = Law | Callable[[float], Law]


def to_law(run: xr.Dataset | xr.DataArray, law: Flow) -> xr.DataArray:
    """W₂ of every replica to a law, with its sampling floor.

    In one dimension the exact quantile coupling; above, the distance between Gaussians of the same mean and covariance,
    which is W₂ for Gaussian laws and a lower bound for others.

    Args:
        run: a run or its `position`.
        law: a Law, or t ↦ Law (a scenario's `limit`).

    Returns:
        DataArray (time, replica), power 1, with the coordinates

        * `floor` (time): √E W₂²(m_N, m) of N independent points of the law, exact in one dimension, to leading order
          in 1/N for the Gaussian plug-in;
        * `unbiased` (time, replica), for three replicas or more: `debiased(run, law)`, the squared and signed distance
          without the floor, at no cost worth mentioning.

    Raises:
        ValueError: particles that are not finite, dimensions that differ, a torus, no quantile function.

    """
    position, weight = particles.positions(run), particles.weights(run)
    if particles.period(position) is not None:
        raise ValueError(
            "to_law: the run lives on a torus, where a law on the line has no distance to it. Sample the law and use "
            "wasserstein.between, or debiased with a reference run."
        )
    d, r = position.sizes["component"], position.sizes.get("replica", 1)
    arrays, cores = replicated(position, weight)

    def one(x: Points, p: Weights, at: Law) -> tuple[Points, Points, Points]:
        return _line_to_law(x, p, at) if d == 1 else _gaussian_to_law(x, p, at)

    values, below, unbiased = apply(
        block_over(one, law, d, 3),
        times_of(position, law),
        *arrays,
        input_core_dims=[[], *cores],
        output_core_dims=[["replica"], [], ["replica"]],
        output_dtypes=[float] * 3,
    )
    result: xr.DataArray = values.rename("distance").assign_coords(floor=described(below, "sampling floor of W₂"))
    if r >= floor.FEWEST and weight is None:
        result = result.assign_coords(unbiased=described(unbiased, "squared W₂ without its sampling floor"))
    if "replica" not in position.dims:
        result = result.isel(replica=0)
    return result.assign_attrs(
        long_name="Wasserstein distance W₂ to the law",
        units=str(position.attrs.get("units", "1")),
        power=1,
        estimator="exact quantile coupling" if d == 1 else "Gaussian plug-in (Bures)",
        n_particles=position.sizes["particle"],
    )


def block_over(one: Callable[..., tuple[Points, ...]], law: Flow, d: int, outputs: int) -> Callable[..., Any]:
    """A block function over times of a function of (particles of all replicas, masses, the law at that time)."""

    def block(t: Points, x: Points, *masses: Points) -> tuple[Points, ...]:
        if masses:
            particles.check_finite(x, "distance to a law")
            particles.check_masses(masses[0], "distance to a law, weights")
        lead = x.shape[:-3]
        times = np.broadcast_to(t, lead).reshape(-1)
        rows = x.reshape(-1, *x.shape[-3:])
        # Masses may be constant in time.
        shares = np.broadcast_to(masses[0], x.shape[:-1]).reshape(rows.shape[:-1]) if masses else None

        def at(k: int) -> tuple[Points, ...]:
            return one(rows[k], None if shares is None else shares[k], at_time(law, float(times[k]), d))

        found = threaded(at, len(rows), os.cpu_count() or 1)
        arrays = [np.array([f[i] for f in found]) for i in range(outputs)]
        return tuple(a.reshape(lead + a.shape[1:]) for a in arrays)

    return block


def at_time(law: Flow, t: float, d: int) -> Law:
    """The law at a time.    TypeError, ValueError when it is none, or lives in another dimension."""
    found = law if isinstance(law, Law) else law(t)
    if not isinstance(found, Law):
        raise TypeError(f"the law at t = {t:g} is a {type(found).__name__}; expected an mfsde Law.")
    if found.dim != d:
        raise ValueError(f"the law at t = {t:g} lives in dimension {found.dim}, the particles in dimension {d}.")
    return found


def times_of(position: xr.DataArray, law: Flow) -> xr.DataArray:
    """The times of the particles, 0 where they carry none and the law does not ask."""
    if "time" in position.coords:
        return position["time"]
    if not isinstance(law, Law):
        raise ValueError("the law depends on time but the particles carry no `time`; pass law(t) at their time.")
    return xr.DataArray(0.0)


def _line_to_law(x: Points, p: Weights, law: Law) -> tuple[Points, Points, Points]:
    """W₂ to a law on the line, its floor, and the jackknife values.    (R, N, 1), (R, N) or None."""
    n = x.shape[1]
    if p is not None:
        roots = np.array([math.sqrt(line.law_cost(y[:, 0], w, law)) for y, w in zip(x, _normalised(p), strict=True)])
        return roots, np.sqrt(line.sampling_cost(law, _effective(p))), roots
    means, within = line.even_cells(law, n)
    quantiles = np.sort(x[..., 0], axis=-1)
    # Infinities and NaN are sorted to the ends.
    particles.check_finite(quantiles[:, [0, -1]], "W₂ to a law")
    gap = np.subtract(quantiles, means, dtype=np.float64)
    own = np.einsum("rn,rn->r", gap, gap) / n
    roots = np.sqrt(own + within)
    values = floor.quantile_values(gap, own) if len(x) >= floor.FEWEST else roots
    return roots, np.sqrt(line.sampling_cost(law, n)), values


def _gaussian_to_law(x: Points, p: Weights, law: Law) -> tuple[Points, Points, Points]:
    """The same between Gaussians of equal moments.    (R, N, d)."""
    particles.check_finite(x, "W₂ to a law")
    mean, cov = floor.law_moments(law)
    first, second = bures.moments(x, p)
    roots = np.sqrt(np.maximum(bures.squared(first, bures.covariance(first, second), mean, cov), 0.0))
    below = np.sqrt(bures.sampling_cost(cov, x.shape[1] if p is None else _effective(p)))
    if len(x) < floor.FEWEST:
        return roots, below, roots
    return roots, below, floor.moment_values((first, second), (mean, cov + np.outer(mean, mean)))[0]


def _effective(p: Points) -> int:
    """1/Σw², the number of equal particles of the same variance, averaged over replicas."""
    return max(1, round(float(np.mean(1 / np.square(_normalised(p)).sum(-1)))))


def _normalised(p: Points) -> Points:
    masses = p.astype(np.float64)
    shares: Points = masses / masses.sum(-1, keepdims=True)
    return shares
