"""Wasserstein distances W₂ between samples, weighted measures and laws: the only file that imports POT.

Every function returns the root, W₂ = (inf_π ∫ |x - y|² dπ)^{1/2}, exactly: by sorting in one dimension, in closed form
between Gaussians, by a linear program (network simplex) above. Data that are not finite, and a program that
did not converge, raise; POT by itself returns 0.0 for the former.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import xarray as xr

from mfsde import EmpiricalMeasure, Gaussian
from mfsde.measure import Law, period_lengths

# A cost matrix above this many bytes is refused: the program would take minutes and gigabytes.
LARGEST_COST = 2 * 2**30
ITERATIONS = 10_000_000

Points = np.ndarray
Weights = np.ndarray | None
Lengths = tuple[float, ...] | None


def distance(a: Any, b: Any) -> float:
    """W₂(a, b), exact.

    Args:
        a: a sample (N, d) or (N,) (array, tensor, DataArray), an `EmpiricalMeasure`, or a Gaussian beside a Gaussian.
        b: likewise; numbers of points and weights may differ.

    Returns:
        W₂ in the units of the state.

    Raises:
        ValueError: points that are not finite, dimensions that differ, a problem too large, a law without closed form.
        RuntimeError: the program did not converge.

    """
    if isinstance(a, Gaussian) and isinstance(b, Gaussian):
        return gaussian_distance(*_moments(a), *_moments(b))
    for law in (a, b):
        if isinstance(law, Law):
            raise ValueError(
                f"distance: no closed form between a {type(a).__name__} and a {type(b).__name__}. Sample the law "
                "(law.sample(n)) and report the floor of n, or compare two Gaussians."
            )
    return _sample_distance(*_atoms(a, "a"), *_atoms(b, "b"), _common_period(a, b))


def gaussian_distance(mean_a: Points, cov_a: Points, mean_b: Points, cov_b: Points) -> float:
    """W₂ between Gaussians: W₂² = |m - m'|² + tr(C + C' - 2 (C^{1/2} C' C^{1/2})^{1/2}).

    Source: Dowson, Landau (1982); Gelbrich (1990). For other laws it is a lower bound.
    """
    root = _square_root(cov_a)
    cross = np.linalg.eigvalsh(root @ cov_b @ root)
    bures = np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(np.clip(cross, 0, None)).sum()
    return math.sqrt(max(0.0, float(np.sum((mean_a - mean_b) ** 2) + bures)))


def between(
    a: xr.DataArray, b: xr.DataArray, *, weight_a: xr.DataArray | None = None, weight_b: xr.DataArray | None = None
) -> xr.DataArray:
    """W₂ between two positions, over every remaining dimension they share (time, replica, pair, ...).

    Args:
        a: positions with dimensions `particle` and `component`; the torus is read from their attribute `period`.
        b: likewise; its number of particles may differ. Shared coordinates must be equal.
        weight_a: masses of a's particles, where they are not equal (`run["weight"]`).
        weight_b: likewise.

    Returns:
        DataArray over the remaining dimensions; problems run in threads.

    Raises:
        ValueError: as `distance`; coordinates or periods that differ; a missing dimension; weighted positions without
            their weights.

    """
    period = _recorded_period(a, b)
    _check_weighted(a, weight_a, "a")
    _check_weighted(b, weight_b, "b")
    for name, array in (("a", a), ("b", b)):
        if not {"particle", "component"} <= set(array.dims):
            raise ValueError(
                f"between: {name} has dimensions {array.dims}; expected `particle` and `component` among them (pass "
                'run["position"]; a run with keep_particles=0 has none).'
            )
    first = [x.drop_vars("particle", errors="ignore") for x in (a, weight_a) if x is not None]
    second = [
        x.rename(particle="particle_b").drop_vars("particle_b", errors="ignore") for x in (b, weight_b) if x is not None
    ]
    cores = [["particle", "component"], ["particle"]][: len(first)]
    cores += [["particle_b", "component"], ["particle_b"]][: len(second)]

    def batch(*arrays: Points) -> Points:
        x, p = (arrays[0], arrays[1]) if weight_a is not None else (arrays[0], None)
        y, q = (arrays[-2], arrays[-1]) if weight_b is not None else (arrays[-1], None)
        return _batch(x, p, y, q, period)

    result: xr.DataArray = xr.apply_ufunc(
        batch, *first, *second, input_core_dims=cores, join="exact", dask="parallelized", output_dtypes=[float]
    )
    return result.rename("w2").assign_attrs(
        long_name="Wasserstein distance W₂", units="1", power=1, estimator="exact optimal transport between samples"
    )


def between_replicas(position: xr.DataArray, weight: xr.DataArray | None = None) -> xr.DataArray:
    """W₂ between the laws of every two replicas, (..., pair): the sampling floor √(E W₂²(μ_N, μ'_N)).

    Independent replicas of one system have the same law; what is left is the price of N particles.
    """
    r = position.sizes["replica"]
    if r < 2:
        raise ValueError(f"between_replicas needs at least two replicas; this run has {r}. Simulate with n_replicas=2.")
    left, right = np.triu_indices(r, 1)

    def side(array: xr.DataArray, index: Points) -> xr.DataArray:
        return array.isel(replica=xr.DataArray(index, dims="pair")).drop_vars("replica", errors="ignore")

    masses = {} if weight is None else {"weight_a": side(weight, left), "weight_b": side(weight, right)}
    found = between(side(position, left), side(position, right), **masses)
    return found.assign_coords({"replica_a": ("pair", left), "replica_b": ("pair", right)})


def _batch(x: Points, p: Weights, y: Points, q: Weights, period: Lengths) -> Points:
    """W₂ over leading axes.    (..., N, d), (..., N), (..., M, d), (..., M) -> (...)."""
    lead = np.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    x, y = (np.broadcast_to(z, lead + z.shape[-2:]).reshape(-1, *z.shape[-2:]) for z in (x, y))
    p, q = (None if w is None else np.broadcast_to(w, lead + w.shape[-1:]).reshape(-1, w.shape[-1]) for w in (p, q))

    def one(k: int) -> float:
        return _sample_distance(x[k], None if p is None else p[k], y[k], None if q is None else q[k], period)

    # POT's solver and numpy's sort release the GIL; as many run at once as the largest cost matrix leaves room for.
    size = 8 * x.shape[1] * y.shape[1] if x.shape[2] > 1 else 1
    workers = max(1, min(os.cpu_count() or 1, LARGEST_COST // size))
    with ThreadPoolExecutor(workers) as threads:
        found = list(threads.map(one, range(len(x))))
    return np.array(found).reshape(lead)


def _sample_distance(x: Points, p: Weights, y: Points, q: Weights, period: Lengths = None) -> float:
    _check_points(x, y)
    # A common centre: at an offset of 1e4 squared distances would lose eight digits.
    centre = x.mean(0, dtype=np.float64)
    x, y = x.astype(np.float64) - centre, y.astype(np.float64) - centre
    p, q = (None if w is None else w.astype(np.float64) / w.sum(dtype=np.float64) for w in (p, q))
    if x.shape[1] == 1 and period is None:
        return _sorted_distance(x[:, 0], p, y[:, 0], q)
    return _program(x, p, y, q, period)


def _sorted_distance(x: Points, p: Weights, y: Points, q: Weights) -> float:
    # In one dimension the monotone rearrangement is optimal, so no linear program is needed.
    if p is None and q is None and len(x) == len(y):
        return math.sqrt(float(np.mean((np.sort(x) - np.sort(y)) ** 2)))
    (x, p), (y, q) = _ordered(x, p), _ordered(y, q)
    below_x, below_y = np.cumsum(p), np.cumsum(q)
    levels = np.union1d(below_x, below_y)
    masses = np.diff(levels, prepend=0.0)
    middle = levels - 0.5 * masses
    left = np.minimum(np.searchsorted(below_x, middle), len(x) - 1)
    right = np.minimum(np.searchsorted(below_y, middle), len(y) - 1)
    return math.sqrt(float(np.sum(masses * (x[left] - y[right]) ** 2)))


def _program(x: Points, p: Weights, y: Points, q: Weights, period: Lengths = None) -> float:
    size = 8 * len(x) * len(y)
    if size > LARGEST_COST:
        raise ValueError(
            f"W₂ between {len(x)} and {len(y)} points in dimension {x.shape[1]} needs a cost matrix of "
            f"{size / 2**30:.1f} GiB and minutes. Subsample (exchangeable particles: position.isel(particle=slice(k))) "
            "and report the subsample's floor, or project."
        )
    import ot

    p = np.full(len(x), 1 / len(x)) if p is None else p
    q = np.full(len(y), 1 / len(y)) if q is None else q
    cost = ot.dist(x, y, metric="sqeuclidean") if period is None else _torus_cost(x, y, period)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            squared = ot.emd2(p, q, cost, numItermax=ITERATIONS)
        except UserWarning as problem:
            raise RuntimeError(f"W₂ between {len(x)} and {len(y)} points did not converge: {problem}") from problem
    return math.sqrt(max(0.0, float(squared)))


def _torus_cost(x: Points, y: Points, period: tuple[float, ...]) -> Points:
    """Squared distance on the torus: the shortest difference in every component."""
    cost = np.zeros((len(x), len(y)))
    for k, length in enumerate(period):
        gap = x[:, None, k] - y[None, :, k]
        if math.isfinite(length):
            gap -= length * np.round(gap / length)
        cost += gap**2
    return cost


def _common_period(a: Any, b: Any) -> Lengths:
    """The torus of two measures; a plain sample beside a measure takes the measure's."""
    found = {
        tuple(period_lengths(m.period, m.dim))
        for m in (a, b)
        if isinstance(m, EmpiricalMeasure) and m.period is not None
    }
    if len(found) > 1:
        raise ValueError(f"distance: the measures live on different tori, with periods {sorted(found)}.")
    return found.pop() if found else None


def _recorded_period(a: xr.DataArray, b: xr.DataArray) -> Lengths:
    """The torus that a run recorded with its positions."""
    recorded = {array.attrs["period"] for array in (a, b) if "period" in array.attrs}
    if len(recorded) > 1:
        raise ValueError(f"between: the positions live on different tori, with periods {sorted(recorded)}.")
    if not recorded:
        return None
    return tuple(math.inf if length is None else float(length) for length in json.loads(recorded.pop()))


def _check_weighted(position: xr.DataArray, weight: xr.DataArray | None, name: str) -> None:
    if "weighted" in position.attrs and weight is None:
        raise ValueError(
            f'between: the particles of {name} have unequal masses; pass weight_{name}=run["weight"] (for '
            'between_replicas: weight=run["weight"]).'
        )


def _moments(law: Gaussian) -> tuple[Points, Points]:
    return law.mean.numpy(), law.cov.numpy()


def _atoms(a: Any, name: str) -> tuple[Points, Weights]:
    """Points (N, d) and weights (N,) or None."""
    weights: Weights = None
    if isinstance(a, EmpiricalMeasure):
        weights = None if a.is_uniform else a.weights.detach().cpu().numpy().astype(np.float64)
        a = a.points
    points = a.detach().cpu().numpy() if isinstance(a, torch.Tensor) else np.asarray(a)
    points = points[:, None] if points.ndim == 1 else points
    if points.ndim != 2 or len(points) == 0:
        raise ValueError(
            f"distance: {name} has shape {points.shape}; expected a sample (N, d) with N >= 1. For positions over time "
            "and replicas use `between`."
        )
    return points, weights


def _check_points(x: Points, y: Points) -> None:
    for name, points in (("first", x), ("second", y)):
        if not np.isfinite(points).all():
            raise ValueError(
                f"W₂: the {name} sample holds {int((~np.isfinite(points)).sum())} values that are not finite. A run "
                "that blew up has no law; select the times before."
            )
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(f"W₂: dimensions differ, {x.shape[-1]} and {y.shape[-1]}.")


def _ordered(x: Points, p: Weights) -> tuple[Points, Points]:
    order = np.argsort(x, kind="stable")
    return x[order], np.full(len(x), 1 / len(x)) if p is None else p[order]


def _square_root(matrix: Points) -> Points:
    values, vectors = np.linalg.eigh(matrix)
    root: Points = vectors * np.sqrt(np.clip(values, 0, None)) @ vectors.T
    return root
