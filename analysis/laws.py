"""Runs against laws: the law at every saved time, and W₂ of every replica to it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from mfsde import Gaussian
from mfsde.measure import Law

from . import bures, floor, line, particles
from .labels import apply, described, replicated, threaded

Points = np.ndarray
Weights = np.ndarray | None
Flow = Law | Callable[[float], Law]
Many = Callable[[Points, Weights, list[Law]], tuple[Points, ...]]

PIECE = 200_000  # values
REMEMBERED = 4


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

    cells, costs = remembered(line.even_cells), remembered(line.sampling_cost)
    many: Many = partial(_line_to_law, cells=cells, costs=costs) if d == 1 else each(_gaussian_to_law)
    values, below, unbiased = apply(
        block_over(many, law, d, 3),
        times_of(position, law),
        *arrays,
        input_core_dims=[[], *cores],
        output_core_dims=[["replica"], [], ["replica"]],
        output_dtypes=[float] * 3,
    )
    units = str(position.attrs.get("units", "1"))
    result: xr.DataArray = values.rename("distance").assign_coords(
        floor=described(below, "sampling floor of W₂", units)
    )
    if r >= floor.FEWEST and weight is None:
        squared = described(unbiased, "squared W₂ without its sampling floor", particles.squared_units(position))
        result = result.assign_coords(unbiased=squared)
    if "replica" not in position.dims:
        result = result.isel(replica=0)
    result = result.assign_attrs(
        long_name="Wasserstein distance W₂ to the law",
        units=units,
        power=1,
        estimator="exact quantile coupling" if d == 1 else "Gaussian plug-in (Bures)",
        n_particles=position.sizes["particle"],
    )
    return result if d == 1 or is_gaussian(law, position) else as_lower_bound(result)


def is_gaussian(law: Flow, position: xr.DataArray) -> bool:
    """Whether a law is Gaussian at every time of the particles."""
    if isinstance(law, Law):
        return isinstance(law, Gaussian)
    return all(isinstance(law(float(t)), Gaussian) for t in np.ravel(times_of(position, law).values))


def as_lower_bound(values: xr.DataArray) -> xr.DataArray:
    """Labels for a distance of moments between laws that are not Gaussian."""
    name = values.attrs["long_name"].replace("Wasserstein distance W₂", "lower bound of W₂")
    return values.assign_attrs(long_name=f"{name} (Gaussians of the same moments)", bound="lower")


def remembered(function: Callable[[Law, int], Any]) -> Callable[[Law, int], Any]:
    """The function, asked once for a law that stays the same from time to time; forgotten with the caller."""
    known: dict[tuple[int, int], tuple[Law, Any]] = {}

    def ask(law: Law, n: int) -> Any:
        found = known.get((id(law), n))
        if found is None:
            found = (law, function(law, n))
            if len(known) >= REMEMBERED:
                known.clear()
            known[id(law), n] = found
        return found[1]

    return ask


def block_over(many: Many, law: Flow, d: int, outputs: int, workers: int | None = None) -> Callable[..., Any]:
    """A block function over times of a function of several of them: (T, R, N, d), (T, R, N), T laws -> (T, ...), ..."""

    def block(t: Points, x: Points, *masses: Points) -> tuple[Points, ...]:
        if masses:
            particles.check_finite(x, "distance to a law")
            particles.check_masses(masses[0], "distance to a law, weights")
        lead = x.shape[:-3]
        times = np.broadcast_to(t, lead).reshape(-1)
        rows = x.reshape(-1, *x.shape[-3:])
        # Masses may be constant in time.
        shares = np.broadcast_to(masses[0], x.shape[:-1]).reshape(rows.shape[:-1]) if masses else None
        # Before the threads: a user's function holds the interpreter's lock.
        laws = [at_time(law, float(t), d) for t in times]

        # Pieces that stay in the cache, and are long enough for the threads to leave one another alone.
        size = max(1, PIECE // rows[0].size)

        def at(k: int) -> tuple[Points, ...]:
            piece = slice(k * size, (k + 1) * size)
            return many(rows[piece], None if shares is None else shares[piece], laws[piece])

        found = threaded(at, math.ceil(len(rows) / size), workers or os.cpu_count() or 1)
        arrays = [np.concatenate([f[i] for f in found]) for i in range(outputs)]
        return tuple(a.reshape(lead + a.shape[1:]) for a in arrays)

    return block


def each(one: Callable[[Points, Weights, Law], tuple[Points, ...]]) -> Many:
    """A function of one time, over several."""

    def many(x: Points, p: Weights, laws: list[Law]) -> tuple[Points, ...]:
        found = [one(x[k], None if p is None else p[k], law) for k, law in enumerate(laws)]
        return tuple(np.array(part) for part in zip(*found, strict=True))

    return many


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


def _line_to_law(
    x: Points, p: Weights, laws: list[Law], cells: Callable[..., Any], costs: Callable[..., Any]
) -> tuple[Points, ...]:
    """W₂ to laws on the line, its floor, and the jackknife values.    (T, R, N, 1) -> (T, R), (T,), (T, R)."""
    if p is not None:
        return each(_weighted_to_law)(x, p, laws)
    r, n = x.shape[1:3]
    found = [cells(law, n) for law in laws]
    means, within = np.stack([mean for mean, _ in found]), np.array([rest for _, rest in found])
    quantiles = np.sort(x[..., 0], axis=-1)
    # Infinities and NaN are sorted to the ends.
    particles.check_finite(quantiles[..., [0, -1]], "W₂ to a law")
    gap = np.subtract(quantiles, means[:, None], dtype=np.float64)
    own = np.einsum("trn,trn->tr", gap, gap) / n
    roots = np.sqrt(own + within[:, None])
    below = np.sqrt([costs(law, n) for law in laws])
    return roots, below, floor.quantile_values(gap, own) if r >= floor.FEWEST else np.full_like(roots, np.nan)


def _weighted_to_law(x: Points, p: Weights, law: Law) -> tuple[Points, Points, Points]:
    """The same for unequal masses at one time; products of replicas need common cells, which these have not."""
    shares = _normalised(np.asarray(p))
    roots = np.array([math.sqrt(line.law_cost(y[:, 0], w, law)) for y, w in zip(x, shares, strict=True)])
    return roots, np.sqrt(line.sampling_cost(law, _effective(shares))), np.full_like(roots, np.nan)


def _gaussian_to_law(x: Points, p: Weights, law: Law) -> tuple[Points, Points, Points]:
    """The same between Gaussians of equal moments.    (R, N, d)."""
    particles.check_finite(x, "W₂ to a law")
    mean, cov = floor.law_moments(law)
    # About the law's mean: second moments about a far origin would lose the covariance.
    first, second = bures.moments(x - mean, p)
    origin = np.zeros_like(mean)
    roots = np.sqrt(np.maximum(bures.squared(first, bures.covariance(first, second), origin, cov), 0.0))
    below = np.sqrt(bures.sampling_cost(cov, x.shape[1] if p is None else _effective(p)))
    if len(x) < floor.FEWEST:
        return roots, below, np.full_like(roots, np.nan)
    return roots, below, floor.moment_values((first, second), (origin, cov))[0]


def _effective(p: Points) -> int:
    """1/Σw², the number of equal particles of the same variance, averaged over replicas."""
    return max(1, round(float(np.mean(1 / np.square(_normalised(p)).sum(-1)))))


def _normalised(p: Points) -> Points:
    masses = p.astype(np.float64)
    shares: Points = masses / masses.sum(-1, keepdims=True)
    return shares
