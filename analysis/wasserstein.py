"""Wasserstein distances between samples, weighted measures, laws and runs: the only file that imports POT.

W_p(a, b) = (inf_π ∫ r(x, y)^p dπ)^{1/p}: exactly, by sorting in one dimension, by quantile coupling against a law, in
closed form between Gaussians, by a linear program (network simplex) above. Every function returns the root, except
`debiased`, whose values are squared and signed. Data that are not finite and a program that did not converge raise; POT
by itself returns 0.0 for the former.

Between an N-sample and its own law W₂ is not zero but the sampling floor. `to_law` stores it beside the distance;
`debiased` removes it.
"""

from __future__ import annotations

import math
import os
import warnings
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr

from mfsde import EmpiricalMeasure, Gaussian
from mfsde.measure import Law
from mfsde.torus import period_lengths

from . import bures, circle, floor, limits, line, particles
from .ground import check_metric, squared_distances
from .labels import apply, described, replicated, threaded
from .laws import (
    Flow,
    Limit,
    as_lower_bound,
    block_over,
    each,
    is_gaussian,
    times_of,
    torus,
)
from .laws import to_law as to_law
from .replicas import check_independent, count
from .sinkhorn import sinkhorn_divergence as sinkhorn_divergence

# A program above this many bytes is refused; above this many seconds in all it is announced.
LARGEST_MEMORY = 6 * 2**30
LONG = 60.0
# Measured with POT 0.9.7 on one core: bytes and seconds for each entry of the cost matrix.
BYTES_PER_ENTRY = 42.0
SECONDS_PER_ENTRY = 2.0e-7
ITERATIONS = 10_000_000

Points = np.ndarray
Weights = np.ndarray | None
Lengths = tuple[float, ...] | None


class Estimate(NamedTuple):
    """A value and its standard error."""

    value: float
    stderr: float


# Between two measures


def distance(a: Any, b: Any, *, p: float = 2.0, metric: str = "euclidean") -> float:
    """W_p(a, b), exact.

    Args:
        a: a sample (N, d) or (N,) (array, tensor, DataArray), an `EmpiricalMeasure` (with its torus), or a law: any law
            in one dimension (p = 2 for one on a circle), a Gaussian beside a Gaussian (p = 2) above.
        b: likewise; numbers of points and weights may differ.
        p: the power, >= 1.
        metric: "euclidean" (on the torus of a measure that has a `period`), or "sphere" (great circles).

    Returns:
        W_p, in the units of the state.

    Raises:
        ValueError: points that are not finite, dimensions or tori that differ, a problem too large, a law in d > 1.
        RuntimeError: the program did not converge.

    """
    _check_power(p)
    if isinstance(a, Law) or isinstance(b, Law):
        return _law_distance(a, b, p, metric)
    period = _common_period(a, b)
    check_metric(metric, period)
    return _root(_cost(*_atoms(a, "a"), *_atoms(b, "b"), p, metric, period), p)


def gaussian_distance(mean_a: Points, cov_a: Points, mean_b: Points, cov_b: Points) -> float:
    """W₂ between Gaussians: W₂² = |m - m'|² + tr(C + C' - 2 (C^{1/2} C' C^{1/2})^{1/2}).

    Source: Dowson, Landau (1982); Gelbrich (1990). For other laws of these moments it is a lower bound.
    """
    return math.sqrt(max(0.0, float(bures.squared(mean_a, cov_a, mean_b, cov_b))))


def transport_cost(p: Points, q: Points, cost: Points) -> float:
    """Min ⟨C, P⟩ over P >= 0 with marginals p and q: the linear program behind everything above one dimension.

    Args:
        p: masses (N,), non-negative.
        q: masses (M,) of the same total.
        cost: (N, M), finite.

    Raises:
        ValueError: masses of different totals, negative or not finite; a cost that is not finite; a problem too large.
        RuntimeError: the simplex did not converge.

    """
    p, q, cost, total = _checked_program(p, q, cost)
    if total == 0:
        return 0.0
    # POT calls a program with costs well below zero infeasible; a constant moves the value and not the plan.
    least = min(0.0, float(cost.min()))
    return total * (float(_solved("emd2", p / total, q / total, cost - least)) + least)


def transport_plan(p: Points, q: Points, cost: Points) -> Points:
    """The optimal P of `transport_cost`, (N, M)."""
    p, q, cost, total = _checked_program(p, q, cost)
    if total == 0:
        return np.zeros_like(cost)
    plan: Points = total * _solved("emd", p / total, q / total, cost - min(0.0, float(cost.min())))
    return plan


def coupling(x: Points, y: Points) -> tuple[Points, Points, Points]:
    """The optimal coupling for squared distance of two samples of equal masses: pairs i, j and their masses.

    (N, d), (M, d) -> three arrays (K,).
    """
    _check_points(x, y)
    if x.shape[1] == 1 and len(x) == len(y):
        order = np.argsort(x[:, 0], kind="stable"), np.argsort(y[:, 0], kind="stable")
        return *order, np.full(len(x), 1 / len(x))
    masses = np.full(len(x), 1 / len(x)), np.full(len(y), 1 / len(y))
    _check_size(len(x), len(y))
    plan = transport_plan(*masses, squared_distances(x, y))
    i, j = np.nonzero(plan)
    return i, j, plan[i, j]


class Effort(NamedTuple):
    """What exact programs are expected to take on one core."""

    seconds: float
    bytes: float


def effort(n: int, m: int, problems: int = 1) -> Effort:
    """Time and memory of exact programs between n and m points in d > 1, from POT's measured cost per entry."""
    # The network simplex is superquadratic: 0.1 s at N = 1000, 23 s at N = 10000.
    seconds = SECONDS_PER_ENTRY * n * m * max(1.0, math.sqrt(n * m) / 5000) ** 0.2
    return Effort(problems * seconds, BYTES_PER_ENTRY * n * m)


# When the exact program is too large


def subsampled(a: Any, b: Any, n: int, *, repeats: int = 8, seed: int = 0, metric: str = "euclidean") -> Estimate:
    """W₂ between disjoint random subsamples of n points: mean and standard error over them.

    It estimates E W₂(a_n, b_n), not W₂(a, b): the sampling floor of n is in it. Disjoint subsamples of independent
    points are independent, so the error is that of fresh data; at most ⌊N/n⌋ of them exist.

    Raises:
        ValueError: fewer than two disjoint subsamples, unequal masses, as `distance`.

    """
    (x, wx), (y, wy) = _atoms(a, "a"), _atoms(b, "b")
    period = _common_period(a, b)
    check_metric(metric, period)
    if wx is not None or wy is not None:
        raise ValueError("subsampled: the masses differ, so points are not exchangeable; pass points of equal mass.")
    possible = min(len(x), len(y)) // n if n >= 1 else 0
    if min(possible, repeats) < 2:
        raise ValueError(
            "subsampled: an error bar takes two disjoint subsamples or more, so "
            f"1 <= n <= {min(len(x), len(y)) // 2} and repeats >= 2; got n = {n}, repeats = {repeats}."
        )
    repeats = min(repeats, possible)
    rng = np.random.default_rng(seed)
    left, right = (z[rng.permutation(len(z))[: n * repeats]].reshape(repeats, n, -1) for z in (x, y))
    found = _batch(left, None, right, None, 2.0, metric, period)
    return Estimate(float(found.mean()), float(found.std(ddof=1) / math.sqrt(repeats)))


def upper_bound(a: Any, b: Any, *, n_plans: int = 64, seed: int = 0) -> float:
    """An upper bound of W₂ between equally many points of equal mass, in N log N: the cost of a coupling that exists.

    The bijection is merged from random binary space partitions (POT's BSP-OT). Near equal clouds it is loose.
    """
    (x, wx), (y, wy) = _atoms(a, "a"), _atoms(b, "b")
    _check_points(x, y)
    if wx is not None or wy is not None or len(x) != len(y) or _common_period(a, b) is not None:
        raise ValueError("upper_bound: expected two samples of equally many points of equal mass in Euclidean space.")
    import ot

    centre = x.mean(0, dtype=np.float64)
    x, y = x - centre, y - centre
    _, matched, _ = ot.compute_bspot_bijection(x, y, n_plans=n_plans, seed=seed)
    return math.sqrt(float(np.mean(np.square(x - y[matched]).sum(1))))


def sliced(a: Any, b: Any, *, n_directions: int = 200, seed: int = 0) -> Estimate:
    """Sliced W₂, SW₂² = mean over directions of W₂² between projections: another quantity, at most W₂/√d.

    The standard error is over directions.
    """
    (x, wx), (y, wy) = _atoms(a, "a"), _atoms(b, "b")
    _check_points(x, y)
    if _common_period(a, b) is not None:
        raise ValueError("sliced: a torus has no projections; subsample (wasserstein.subsampled) instead.")
    if n_directions < 2:
        raise ValueError(f"sliced: an error bar needs n_directions >= 2; got {n_directions}.")
    directions = np.random.default_rng(seed).normal(size=(n_directions, x.shape[1]))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    squared = np.array([line.cost(x @ e, wx, y @ e, wy) for e in directions])
    value = math.sqrt(float(squared.mean()))
    return Estimate(value, float(squared.std(ddof=1) / math.sqrt(n_directions)) / (2 * value) if value > 0 else 0.0)


# Labelled: runs in, DataArrays out


def between(
    a: xr.Dataset | xr.DataArray,
    b: xr.Dataset | xr.DataArray,
    *,
    weight_a: xr.DataArray | None = None,
    weight_b: xr.DataArray | None = None,
    p: float = 2.0,
    metric: str = "euclidean",
) -> xr.DataArray:
    """W_p between the particles of two runs, over every remaining dimension they share (time, replica, pair, ...).

    Args:
        a: a run or its `position`, with dimensions `particle` and `component`; the torus is read from the run.
        b: likewise; its number of particles may differ. Shared coordinates must be equal.
        weight_a: masses of a's particles, where a bare position is given and they are not equal.
        weight_b: likewise.
        p: the power, >= 1.
        metric: as in `distance`.

    Returns:
        DataArray over the remaining dimensions; problems run in threads.

    Raises:
        ValueError: as `distance`; labels or tori that differ; a missing dimension; weighted positions without weights.

    """
    _check_power(p)
    x, wx = _cloud(a, weight_a, "a")
    y, wy = _cloud(b, weight_b, "b")
    particles.check_matching(x, y, tuple(str(d) for d in x.dims if d != "particle"))
    period = particles.period(x, y)
    check_metric(metric, period)
    problems = math.prod({**x.sizes, **y.sizes}[d] for d in {*x.dims, *y.dims} - {"particle", "component"})
    _announce(x.sizes["particle"], y.sizes["particle"], x.sizes["component"], problems)
    first = [z.drop_vars("particle", errors="ignore") for z in (x, wx) if z is not None]
    second = [
        z.rename(particle="particle_b").drop_vars("particle_b", errors="ignore") for z in (y, wy) if z is not None
    ]
    cores = [["particle", "component"], ["particle"]][: len(first)]
    cores += [["particle_b", "component"], ["particle_b"]][: len(second)]

    def batch(*arrays: Points) -> Points:
        u, pu = (arrays[0], arrays[1]) if wx is not None else (arrays[0], None)
        v, pv = (arrays[-2], arrays[-1]) if wy is not None else (arrays[-1], None)
        return _batch(u, pu, v, pv, p, metric, period)

    result: xr.DataArray = apply(batch, *first, *second, input_core_dims=cores, output_dtypes=[float])
    return result.rename("distance").assign_attrs(
        long_name="Wasserstein distance " + ("W₂" if p == 2 else f"W_{p:g}"),
        units=str(x.attrs.get("units", "1")),
        power=1,
        estimator="exact optimal transport between samples",
    )


def between_replicas(run: xr.Dataset | xr.DataArray, weight: xr.DataArray | None = None) -> xr.DataArray:
    """W₂ between the laws of every two replicas, (..., pair): the sampling floor √(E W₂²(μ_N, μ'_N)).

    Independent replicas of one system have the same law; what is left is the price of N particles.
    """
    position, weight = _cloud(run, weight, "run")
    left, right = np.triu_indices(count(position), 1)

    def side(array: xr.DataArray, index: Points) -> xr.DataArray:
        return array.isel(replica=xr.DataArray(index, dims="pair")).drop_vars("replica", errors="ignore")

    masses = (None, None) if weight is None else (side(weight, left), side(weight, right))
    found = between(side(position, left), side(position, right), weight_a=masses[0], weight_b=masses[1])
    return found.assign_coords({"replica_a": ("pair", left), "replica_b": ("pair", right)})


def debiased(
    run: xr.Dataset | xr.DataArray,
    reference: xr.Dataset | xr.DataArray | Limit,
    *,
    estimator: str = "auto",
    partners: int = 2,
    metric: str = "euclidean",
) -> xr.DataArray:
    """W₂² between the laws of a run and of a reference, without the sampling floor: signed, unbiased at equal laws.

    Args:
        run: a run with R >= 3 replicas.
        reference: a run with at least as many replicas, at the same times or without `time`; or a Law, t ↦ Law, or a
            Dataset of `mfsde.limit`. A run's replicas may share the run's noise (the same seed): only different
            replicas are compared.
        estimator: "quantile" (one dimension; exact up to O(1/N²)), "gaussian" (the moments' Bures distance: W₂ for
            Gaussian laws, a lower bound for others), "transport" (the U-statistic of exact distances, for any laws; a
            law is sampled), or "auto": quantile in one dimension, above it gaussian against a Gaussian law, else
            transport.
        partners: of "transport": the number of other replicas that each is paired with; it takes about
            4·R·partners programs at every time.
        metric: of "transport", as in `distance`.

    Returns:
        DataArray (time, replica) of jackknife values, power 2: their replica mean is the estimate (it may be negative),
        their scatter its error. Coordinates

        * `half` (time, replica): the same from N/2 particles. Where it disagrees the statistic is biased;
        * `shape` (time, replica), with "transport" above one dimension: the squared Bures distance of the covariances.
          The U-statistic is unbiased for translations only; where `shape` is a sizeable part of it, it is something
          else.

    Raises:
        ValueError: fewer than three replicas, antithetic ones, labels that differ, particles that are not finite, an
            estimator that does not apply, one law for each path of a common noise.

    """
    position, weight = _cloud(run, None, "run")
    if limits.has_paths(reference):
        raise ValueError(
            "debiased: the limit has a law for each path of the common noise, and the floor is removed across replicas "
            "of one law. Use to_law(run, limit), which has the floor beside the distance."
        )
    target: Any = reference
    if limits.is_dataset(target):
        target = limits.as_flow(target)
    masses: xr.DataArray | None = None
    if not _is_flow(target):
        target, masses = _cloud(reference, None, "reference")
    clouds = [z for z in (position, target) if isinstance(z, xr.DataArray)]
    d, r = position.sizes["component"], position.sizes.get("replica", 1)
    n = min(z.sizes["particle"] for z in clouds)
    _check_debiased(r, n)
    for cloud in clouds:
        check_independent(cloud)
    period = particles.period(*clouds)
    check_metric(metric, period)
    is_euclidean = period is None and metric == "euclidean"
    to_gaussian = _is_flow(target) and is_gaussian(target, position)
    estimator = _chosen(estimator, to_gaussian, d, is_euclidean and weight is None and masses is None)
    distances = partial(_batch, power=2.0, metric=metric, period=period)
    how = floor.Debiasing(estimator, floor.pairing(r, partners), distances, line.remembered(line.quick_cells))
    if estimator == "transport":
        times = math.prod(s for k, s in position.sizes.items() if k not in ("replica", "particle", "component"))
        _announce(n, n, d, 4 * len(how.pairs) * times)
    if _is_flow(target):
        values, half, shape = _debiased_from_law(position, weight, target, how)
    else:
        values, half, shape = _debiased_from_run(position, weight, target, masses, how)
    result = _labelled_debiased(values, half, particles.squared_units(position), estimator, n)
    # A covariance of coordinates means nothing on a torus or a sphere.
    if estimator == "transport" and d > 1 and is_euclidean:
        title = "squared Bures distance of the covariances"
        result = result.assign_coords(shape=described(shape, title, result.attrs["units"]))
    is_bound = estimator == "gaussian" and _is_flow(target) and not to_gaussian
    return as_lower_bound(result) if is_bound else result


def _check_debiased(r: int, n: int) -> None:
    if r < floor.FEWEST:
        raise ValueError(
            f"debiased: the floor is removed across replicas, which takes at least {floor.FEWEST}; the run has {r}. "
            "Simulate with n_replicas=8 or more."
        )
    if n < 2:
        raise ValueError("debiased: the check at N/2 particles takes N >= 2; simulate more particles.")


def _labelled_debiased(
    values: xr.DataArray, half: xr.DataArray, units: str, estimator: str, n_particles: int
) -> xr.DataArray:
    title = "squared W₂ without its floor, from N/2 particles"
    return (
        values.rename("debiased")
        .assign_coords(half=described(half, title, units))
        .assign_attrs(
            long_name="squared Wasserstein distance W₂² without its sampling floor",
            units=units,
            power=2,
            estimator=f"jackknife values over replicas, {estimator}",
            n_particles=n_particles,
        )
    )


def _is_flow(reference: Any) -> bool:
    return isinstance(reference, Law) or (callable(reference) and not isinstance(reference, (xr.Dataset, xr.DataArray)))


def _chosen(estimator: str, to_gaussian: bool, d: int, is_plain: bool) -> str:
    """The estimator, chosen or checked."""
    if estimator == "auto":
        return "transport" if not is_plain else "quantile" if d == 1 else "gaussian" if to_gaussian else "transport"
    if estimator not in ("quantile", "gaussian", "transport"):
        raise ValueError(f"debiased: estimator {estimator!r} is unknown; expected quantile, gaussian or transport.")
    if estimator == "quantile" and (d > 1 or not is_plain):
        raise ValueError(
            f"debiased: the quantile estimator needs one dimension on the line and equal masses (d = {d}); use "
            "estimator='transport'."
        )
    if estimator == "gaussian" and not is_plain:
        raise ValueError("debiased: the gaussian estimator needs Euclidean space and equal masses; use 'transport'.")
    return estimator


def _debiased_from_law(
    position: xr.DataArray, weight: Any, law: Flow, how: floor.Debiasing
) -> tuple[xr.DataArray, ...]:
    d = position.sizes["component"]
    arrays, cores = replicated(position, weight)

    def one(x: Points, p: Weights, at: Law) -> tuple[Points, ...]:
        if how.estimator == "transport":
            return how.values(x, p, floor.law_samples(at, *x.shape[:2]), None)
        return how.values(x, p, at, None)

    found: tuple[xr.DataArray, ...] = apply(
        # Programs have threads of their own, as many as memory allows.
        block_over(each(one), law, d, 3, lengths=torus(position), workers=1 if how.estimator == "transport" else None),
        times_of(position, law),
        *arrays,
        input_core_dims=[[], *cores],
        output_core_dims=[["replica"]] * 3,
        output_dtypes=[float] * 3,
    )
    return found


def _debiased_from_run(
    position: xr.DataArray, weight: Any, target: xr.DataArray, masses: Any, how: floor.Debiasing
) -> tuple[xr.DataArray, ...]:
    r, n = position.sizes["replica"], min(position.sizes["particle"], target.sizes["particle"])
    if target.sizes.get("replica", 1) < r:
        raise ValueError(
            f"debiased: the run has {r} replicas but the reference {target.sizes.get('replica', 1)}; the floor is "
            "removed with independent replicas on both sides. Simulate the reference with as many."
        )
    particles.check_matching(position, target)
    # Equal sizes: only then has the U-statistic mean zero at equal laws. Particles are exchangeable, so the first n do.
    chosen = {"replica": slice(r), "particle": slice(n)}
    first, cores = replicated(*_thinned(position, weight, chosen))
    second, _ = replicated(*_thinned(target, masses, chosen))
    second = [z.rename({k: f"{k}_b" for k in ("replica", "particle") if k in z.dims}) for z in second]
    second = [z.drop_vars(["replica_b", "particle_b"], errors="ignore") for z in second]
    seconds = [[f"{k}_b" if k != "component" else k for k in core] for core in cores]

    def block(*arrays: Points) -> tuple[Points, ...]:
        x, p = (arrays[0], arrays[1]) if weight is not None else (arrays[0], None)
        y, q = (arrays[-2], arrays[-1]) if masses is not None else (arrays[-1], None)
        for z in (x, y):
            particles.check_finite(z, "debiased")
        lead = np.broadcast_shapes(x.shape[:-3], y.shape[:-3])
        still = math.prod(y.shape[:-3]) == 1
        u, v = (np.broadcast_to(z, lead + z.shape[-3:]).reshape(-1, *z.shape[-3:]) for z in (x, y))
        pu, pv = (
            None if w is None else np.broadcast_to(w, lead + w.shape[-2:]).reshape(-1, *w.shape[-2:]) for w in (p, q)
        )
        own = None
        found = []
        for k in range(len(u)):
            if own is None or not still:
                own = how.within(v[k], None if pv is None else pv[k])
            found.append(how.values(u[k], None if pu is None else pu[k], v[k], None if pv is None else pv[k], own))
        return tuple(np.array([f[i] for f in found]).reshape(*lead, -1) for i in range(3))

    cores_all = [*cores[: 1 if weight is None else 2], *seconds[: 1 if masses is None else 2]]
    result: tuple[xr.DataArray, ...] = apply(
        block,
        *first,
        *second,
        input_core_dims=cores_all,
        output_core_dims=[["replica"]] * 3,
        output_dtypes=[float] * 3,
    )
    return result


# Labels


def _cloud(run: Any, weight: xr.DataArray | None, name: str) -> tuple[xr.DataArray, xr.DataArray | None]:
    """Position and masses of a run."""
    return particles.positions(run, name), weight if weight is not None else particles.weights(run)


def _thinned(position: xr.DataArray, weight: Any, chosen: dict[str, slice]) -> tuple[xr.DataArray, Any]:
    return position.isel(chosen), None if weight is None else weight.isel(chosen, missing_dims="ignore")


def _announce(n: int, m: int, d: int, problems: int) -> None:
    if d == 1:
        return
    _check_size(n, m)
    seconds = effort(n, m, problems).seconds
    if seconds > LONG:
        warnings.warn(
            f"{problems} exact programs between {n} and {m} points take about {seconds / 60:.0f} min of one core; "
            "select times (isel(time=slice(None, None, k))) or particles to shorten it.",
            stacklevel=3,
        )


# One pair of samples


def _batch(x: Points, p: Weights, y: Points, q: Weights, power: float, metric: str, period: Lengths) -> Points:
    """W_p over leading axes.    (..., N, d), (..., N), (..., M, d), (..., M) -> (...)."""
    lead = np.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    x, y = (np.broadcast_to(z, lead + z.shape[-2:]).reshape(-1, *z.shape[-2:]) for z in (x, y))
    p, q = (None if w is None else np.broadcast_to(w, lead + w.shape[-1:]).reshape(-1, w.shape[-1]) for w in (p, q))

    def one(k: int) -> float:
        masses = (None if w is None else w[k] for w in (p, q))
        return _root(_cost(x[k], next(masses), y[k], next(masses), power, metric, period), power)

    # POT's solver and numpy's sort release the GIL; as many run at once as memory allows.
    memory = effort(x.shape[1], y.shape[1]).bytes if x.shape[2] > 1 else 1.0
    found = threaded(one, len(x), max(1, min(os.cpu_count() or 1, int(LARGEST_MEMORY // memory))))
    return np.array(found).reshape(lead)


def _cost(
    x: Points, p: Weights, y: Points, q: Weights, power: float = 2.0, metric: str = "euclidean", period: Lengths = None
) -> float:
    """W^power between two weighted samples."""
    _check_points(x, y)
    p, q = (None if w is None else _shares(w) for w in (p, q))
    if x.shape[1] == 1 and metric == "euclidean":
        # A common centre: at an offset of 1e4 squared distances would lose eight digits.
        centre = x.mean(dtype=np.float64) if period is None else 0.0
        u, v = x[:, 0].astype(np.float64) - centre, y[:, 0].astype(np.float64) - centre
        if period is None or not math.isfinite(period[0]):
            return line.cost(u, p, v, q, power)
        return line.circular_cost(u, p, v, q, period[0], power)
    _check_size(len(x), len(y))
    cost = squared_distances(x, y, metric=metric, period=period)
    if power != 2:
        cost = cost ** (power / 2)
    p = np.full(len(x), 1 / len(x)) if p is None else p
    q = np.full(len(y), 1 / len(y)) if q is None else q
    return max(0.0, float(_solved("emd2", p, q, cost)))


def _solved(solver: str, p: Points, q: Points, cost: Points) -> Any:
    import ot

    # The outcome is read, not caught: filters of warnings belong to the process, and programs run in threads.
    problem = None
    try:
        found, log = getattr(ot, solver)(p, q, cost, numItermax=ITERATIONS, log=True)
        problem = log["warning"]
    except UserWarning as raised:
        problem = str(raised)
    if problem is not None:
        raise RuntimeError(f"transport between {len(p)} and {len(q)} points did not converge: {problem}")
    return found


def _checked_program(p: Points, q: Points, cost: Points) -> tuple[Points, Points, Points, float]:
    p, q, cost = (np.ascontiguousarray(z, dtype=np.float64) for z in (p, q, cost))
    if cost.shape != (len(p), len(q)):
        raise ValueError(f"transport: masses {p.shape} and {q.shape} do not fit a cost of shape {cost.shape}.")
    for name, z in (("p", p), ("q", q), ("cost", cost)):
        particles.check_finite(z, f"transport, {name}")
    if min(p.min(), q.min()) < 0 or abs(p.sum() - q.sum()) > 1e-9 * max(p.sum(), q.sum()):
        raise ValueError(
            f"transport: masses must be non-negative with equal totals; got {p.sum():.6g} and {q.sum():.6g}. Unequal "
            "masses have analysis.unbalanced."
        )
    _check_size(len(p), len(q))
    return p, q * (p.sum() / q.sum() if q.sum() > 0 else 1.0), cost, float(p.sum())


def _check_size(n: int, m: int) -> None:
    need = effort(n, m)
    if need.bytes > LARGEST_MEMORY:
        raise ValueError(
            f"W₂ between {n} and {m} points takes about {need.bytes / 2**30:.1f} GiB and {need.seconds:.0f} s. "
            "Subsample (wasserstein.subsampled, or position.isel(particle=slice(k)): particles are exchangeable) and "
            "report the subsample's floor, bound it (wasserstein.upper_bound), or measure another quantity "
            "(wasserstein.sliced)."
        )


def _check_power(p: float) -> None:
    if not (math.isfinite(p) and p >= 1):
        raise ValueError(f"W_p is a distance for finite p >= 1; got p = {p}.")


def _check_points(x: Points, y: Points) -> None:
    for name, points in (("first", x), ("second", y)):
        particles.check_finite(points, f"W₂, the {name} sample")
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(f"W₂: dimensions differ, {x.shape[-1]} and {y.shape[-1]}.")


def _root(cost: float, p: float) -> float:
    return float(cost ** (1 / p))


# What may be compared


def _law_distance(a: Any, b: Any, p: float, metric: str) -> float:
    if metric != "euclidean":
        raise ValueError(f"distance: a law has no distance in metric {metric!r}; sample it (law.sample(n)).")
    if isinstance(a, Law) and isinstance(b, Law) and a.dim != b.dim:
        raise ValueError(f"distance: dimensions differ, {a.dim} and {b.dim}.")
    if any(isinstance(z, Law) and limits.circles(z) is not None for z in (a, b)):
        return _circular_law_distance(a, b, p)
    if isinstance(a, Law) and isinstance(b, Law):
        if isinstance(a, Gaussian) and isinstance(b, Gaussian) and p == 2:
            return gaussian_distance(*floor.law_moments(a), *floor.law_moments(b))
        if a.dim == 1:
            return _root(line.laws_cost(a, b, p), p)
    law, sample = (a, b) if isinstance(a, Law) else (b, a)
    if isinstance(sample, Law) or law.dim > 1:
        raise ValueError(
            f"distance: no exact distance between a {type(a).__name__} and a {type(b).__name__} in dimension "
            f"{law.dim}. Sample the law (law.sample(n)) and report the floor of n, or compare two Gaussians with p = 2."
        )
    x, w = _atoms(sample, "the sample")
    _check_points(x, np.zeros((1, 1)))
    if _common_period(sample, sample) is not None:
        raise ValueError("distance: a measure on a torus and a law on the line do not compare; sample the law.")
    return _root(line.law_cost(x[:, 0].astype(np.float64), w, law, p), p)


def _circular_law_distance(a: Any, b: Any, p: float) -> float:
    """W₂ to a law on a circle. A plain sample lives on the law's circle."""
    other, law = (a, b) if isinstance(b, Law) and limits.circles(b) is not None else (b, a)
    own = limits.circles(law)
    theirs = limits.circles(other) if isinstance(other, Law) else _common_period(other, other) or own
    if p != 2 or law.dim != 1 or own is None or theirs is None or not np.allclose(own, theirs, rtol=1e-9, atol=0):
        raise ValueError(
            f"distance: to a law on a torus W₂ is computed in one dimension, from laws and samples on the same circle; "
            f"got p = {p:g}, a law on one of lengths {own} and the other on {theirs}. Sample the law (law.sample(n))."
        )
    if isinstance(other, Law):
        return _root(circle.cost(other, law, own[0]), 2)
    x, w = _atoms(other, "the sample")
    _check_points(x, np.zeros((1, 1)))
    return _root(circle.cost((x[:, 0].astype(np.float64), w), law, own[0]), 2)


def _common_period(a: Any, b: Any) -> Lengths:
    """The torus of two measures; a plain sample beside a measure takes the measure's."""
    found = {
        tuple(period_lengths(m.period, m.dim))
        for m in (a, b)
        if isinstance(m, EmpiricalMeasure) and m.period is not None
    }
    recorded = particles.period(*(m for m in (a, b) if isinstance(m, xr.DataArray)))
    found |= set() if recorded is None else {recorded}
    if len(found) > 1:
        raise ValueError(f"distance: the measures live on different tori, with periods {sorted(found)}.")
    return found.pop() if found else None


def _shares(masses: Points) -> Points:
    particles.check_masses(masses, "W₂, weights")
    shares: Points = masses.astype(np.float64) / masses.sum(dtype=np.float64)
    return shares


def _atoms(a: Any, name: str) -> tuple[Points, Weights]:
    """Points (N, d) and weights (N,) or None."""
    weights: Weights = None
    if isinstance(a, EmpiricalMeasure):
        weights = None if a.is_uniform else _shares(a.weights.detach().cpu().numpy())
        a = a.points
    if isinstance(a, xr.DataArray):
        a = _labelled_atoms(a)
    points = a.detach().cpu().numpy() if isinstance(a, torch.Tensor) else np.asarray(a)
    points = points[:, None] if points.ndim == 1 else points
    if points.ndim != 2 or len(points) == 0:
        raise ValueError(
            f"distance: {name} has shape {points.shape}; expected a sample (N, d) with N >= 1. For positions over time "
            "and replicas use `between`."
        )
    return points, weights if weights is None else weights / weights.sum()


def _labelled_atoms(a: xr.DataArray) -> Points:
    """One frame of one replica, with the particles first whatever the order of its dimensions."""
    if "weighted" in a.attrs:
        raise ValueError("distance: the particles have unequal masses; use `between` with the run, which holds them.")
    if {"particle", "component"} == set(a.dims):
        a = a.transpose("particle", "component")
    return a.values
