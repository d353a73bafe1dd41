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

from . import bures, circle, floor, limits, line, particles, replicas
from .labels import apply, described, replicated, threaded
from .limits import Flow as Flow
from .limits import Limit as Limit

Points = np.ndarray
Weights = np.ndarray | None
Lengths = tuple[float, ...] | None
Many = Callable[[Points, Weights, list[Law]], tuple[Points, ...]]

PIECE = 200_000  # values


def to_law(run: xr.Dataset | xr.DataArray, law: Limit) -> xr.DataArray:
    """W₂ of every replica to a law, with its sampling floor.

    In one dimension the exact quantile coupling, on a circle the best of its shifts; above, the distance between
    Gaussians of the same mean and covariance, which is W₂ for Gaussian laws and a lower bound for others.

    Args:
        run: a run or its `position`; on a circle the law has its `period`.
        law: a Law, t ↦ Law (a scenario's `limit`), or a Dataset of `mfsde.limit`, at the run's times or around them.
            With common noise, where it has a density for each path, replica r is compared with path r.

    Returns:
        DataArray (time, replica), power 1, with the coordinates

        * `floor` (time): √E W₂²(m_N, m) of N independent points of the law, exact on the line, the mean over 64
          samples on a circle, to leading order in 1/N for the Gaussian plug-in; (time, replica) with common noise;
        * `unbiased` (time, replica), for three independent replicas or more of one law: the squared and signed distance
          without the floor, at no cost worth mentioning; off the circle it is `debiased(run, law)`.

    Raises:
        ValueError: particles that are not finite, dimensions that differ, another torus or one of two components, no
            quantile function, a Dataset that ends before the run, other paths of the common noise.

    """
    if limits.has_paths(law):
        return _to_paths(run, law)
    law = limits.as_flow(law)
    position, weight = particles.positions(run), particles.weights(run)
    d, r = position.sizes["component"], position.sizes.get("replica", 1)
    lengths = torus(position)
    if lengths is not None and d > 1:
        raise ValueError(
            f"to_law: the run lives on a torus of {d} components, where exact distances to a law exist on a circle "
            "only. Sample the law and use wasserstein.between, or debiased, which samples it."
        )
    arrays, cores = replicated(position, weight)

    many = _metric(d, lengths)
    values, below, unbiased = apply(
        block_over(many, law, d, 3, lengths=lengths),
        times_of(position, law),
        *arrays,
        input_core_dims=[[], *cores],
        output_core_dims=[["replica"], [], ["replica"]],
        output_dtypes=[float] * 3,
    )
    is_free = r >= floor.FEWEST and weight is None and replicas.are_independent(position)
    result = _labelled(values, below, unbiased if is_free else None, position)
    result = result.assign_attrs(estimator=_estimator(d, lengths))
    return result if d == 1 or is_gaussian(law, position) else as_lower_bound(result)


def _metric(d: int, lengths: Lengths) -> Many:
    """How particles are measured against laws: by quantiles on the line and the circle, by moments above."""
    if d > 1:
        return each(_gaussian_to_law)
    if lengths is None:
        cells = line.remembered(line.quick_cells)
        costs = line.remembered(partial(line.sampling_cost, cells=cells))
        return partial(_line_to_law, cells=cells, costs=costs)
    around = circle.Circle(lengths[0])
    return partial(_circle_to_law, around=around, costs=line.remembered(around.sampling_cost))


def _labelled(
    values: xr.DataArray, below: xr.DataArray, unbiased: xr.DataArray | None, position: xr.DataArray
) -> xr.DataArray:
    """The distances with their floor and what is left above it."""
    units = str(position.attrs.get("units", "1"))
    result: xr.DataArray = values.rename("distance").assign_coords(
        floor=described(below, "sampling floor of W₂", units)
    )
    if unbiased is not None:
        squared = described(unbiased, "squared W₂ without its sampling floor", particles.squared_units(position))
        result = result.assign_coords(unbiased=squared)
    if "replica" not in position.dims:
        result = result.isel(replica=0)
    return result.assign_attrs(
        long_name="Wasserstein distance W₂ to the law",
        units=units,
        power=1,
        n_particles=position.sizes["particle"],
    )


def _estimator(d: int, lengths: Lengths) -> str:
    if lengths is not None:
        return f"exact quantile coupling on a circle; floor: mean over {circle.SAMPLES} samples of the law"
    return "exact quantile coupling" if d == 1 else "Gaussian plug-in (Bures)"


def _to_paths(run: xr.Dataset | xr.DataArray, limit: xr.Dataset) -> xr.DataArray:
    """`to_law` of every replica to the law given its path of the common noise."""
    position = particles.positions(run)
    if "replica" not in position.dims:
        raise ValueError(
            "to_law: the run has no dimension `replica`, the limit a law for each; keep it (run.isel(replica=[k])), or "
            "choose the law as well (limit.isel(replica=k))."
        )
    limits.check_paths(run, limit)
    found = []
    for k in range(position.sizes["replica"]):
        one = to_law(run.isel(replica=[k]), limit.isel(replica=k, drop=True))
        found.append(one.assign_coords(floor=one["floor"].expand_dims(replica=one["replica"])))
    result: xr.DataArray = xr.concat(found, "replica").transpose(..., "replica")
    below = result["floor"].transpose(..., "replica")
    return result.assign_coords(floor=below).assign_attrs(long_name=f"{found[0].attrs['long_name']} given W⁰")


def torus(position: xr.DataArray) -> Lengths:
    """One length per component that is kept, infinite on a line; None where there is no torus."""
    lengths = particles.period(position)
    if lengths is not None and len(lengths) != position.sizes["component"]:
        # The attribute describes all components of the state, and the labels say which ones are left.
        lengths = tuple(lengths[int(k)] for k in position["component"].values)
    return None if lengths is None or all(map(math.isinf, lengths)) else lengths


def is_gaussian(law: Flow, position: xr.DataArray) -> bool:
    """Whether a law is Gaussian at every time of the particles."""
    if isinstance(law, Law):
        return isinstance(law, Gaussian)
    return all(isinstance(law(float(t)), Gaussian) for t in np.ravel(times_of(position, law).values))


def as_lower_bound(values: xr.DataArray) -> xr.DataArray:
    """Labels for a distance of moments between laws that are not Gaussian."""
    name = values.attrs["long_name"].replace("Wasserstein distance W₂", "lower bound of W₂")
    return values.assign_attrs(long_name=f"{name} (Gaussians of the same moments)", bound="lower")


def block_over(
    many: Many, law: Flow, d: int, outputs: int, *, lengths: Lengths = None, workers: int | None = None
) -> Callable[..., Any]:
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
        laws = [at_time(law, float(t), d, lengths) for t in times]

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


def at_time(law: Flow, t: float, d: int, lengths: Lengths = None) -> Law:
    """The law at a time.    TypeError, ValueError when it is none, or lives on another space than the particles."""
    found = law if isinstance(law, Law) else law(t)
    if not isinstance(found, Law):
        raise TypeError(f"the law at t = {t:g} is a {type(found).__name__}; expected an mfsde Law.")
    if found.dim != d:
        raise ValueError(f"the law at t = {t:g} lives in dimension {found.dim}, the particles in dimension {d}.")
    own = limits.circles(found)
    if own is not None and (lengths is None or not np.allclose(own, lengths, rtol=1e-9, atol=0)):
        space = "a line" if lengths is None else f"a torus of lengths {lengths}"
        raise ValueError(f"the law at t = {t:g} lives on a torus of lengths {own}, the particles on {space}.")
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


def _circle_to_law(
    x: Points, p: Weights, laws: list[Law], around: circle.Circle, costs: Callable[..., Any]
) -> tuple[Points, ...]:
    """W₂ to laws on a circle, its floor, and the jackknife values.    (T, R, N, 1) -> (T, R), (T,), (T, R)."""
    if p is not None:
        return each(partial(_weighted_to_circle, around=around))(x, p, laws)
    r, n = x.shape[1:3]
    particles.check_finite(x, "W₂ to a law")
    roots, below, unbiased = [], [], []
    for rows, law in zip(x[..., 0].astype(np.float64), laws, strict=True):
        means, within = around.cells(law, n)
        gap = np.stack([around.displacements(row, means) for row in rows])
        own = np.einsum("rm,rm->r", gap, gap) / len(means)
        roots.append(np.sqrt(own + within))
        below.append(math.sqrt(costs(law, n)))
        unbiased.append(floor.quantile_values(gap, own) if r >= floor.FEWEST else np.full(r, np.nan))
    return np.array(roots), np.array(below), np.array(unbiased)


def _weighted_to_circle(x: Points, p: Weights, law: Law, around: circle.Circle) -> tuple[Points, Points, Points]:
    """The same for unequal masses at one time: levels of masses cut cells, which are then atoms of the law."""
    shares = _normalised(np.asarray(p))
    n = _effective(shares)
    means, within = around.cells(law, n)
    squares = [
        line.circular_cost(y[:, 0].astype(np.float64), w, means, None, around.length) + within
        for y, w in zip(x, shares, strict=True)
    ]
    roots = np.sqrt(squares)
    return roots, np.sqrt(around.sampling_cost(law, n)), np.full_like(roots, np.nan)


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
