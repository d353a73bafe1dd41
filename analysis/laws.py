"""Runs against laws: the law at every saved time, and W₂ of every replica to it.

On a circle of length L, with the sample and the law unrolled along the line,

    W₂² = min_θ ∫_0^1 |Q_N(u) - Q(u + θ)|² du,    Q(u + 1) = Q(u) + L,

convex in the shift θ of mass. Over M equal cells of levels, M a multiple of N, the integral is exact for θ = k/M, and
the best of these is above the minimum by at most about ∫Q'²/4M², beside a floor of the order of ∫Q'²/N. An arc without
mass, where Q jumps, would make that L²/M: levels count from the middle of the emptiest one, where no mass crosses.
"""

from __future__ import annotations

import bisect
import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from scipy import special
from torch import Tensor

from mfsde import Gaussian, Noise
from mfsde.measure import Law
from mfsde.noise import Stream

from . import bures, floor, limits, line, particles
from .labels import apply, described, replicated, threaded
from .limits import Flow as Flow
from .limits import Limit as Limit

Points = np.ndarray
Weights = np.ndarray | None
Lengths = tuple[float, ...] | None
Many = Callable[[Points, Weights, list[Law]], tuple[Points, ...]]
Cells = Callable[[Law, int], tuple[Points, float]]

PIECE = 200_000  # values
REMEMBERED = 4

# From this many cells on those that a quantile function crosses slowly are integrated without a check.
MANY = 1000
STEEP = 20.0  # times the median change over a cell: the others
_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(5)
_NODES, _NODE_WEIGHTS = (_NODES + 1) / 2, _NODE_WEIGHTS / 2


FEWEST_CELLS, FINE_CELLS = 1 << 14, 1 << 16  # on a circle, beside a sample and between two laws
ARCS = 4096  # of equal mass, among which the emptiest is looked for
SAMPLES = 64  # of a law on a circle, whose mean is its floor; that of a uniform law is known to 4 %
INVERTED = 8192  # levels of its distribution function that they are drawn from


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
        * `unbiased` (time, replica), for three replicas or more of one law: the squared and signed distance without the
          floor, at no cost worth mentioning; off the circle it is `debiased(run, law)`.

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

    cells = remembered(even_cells)
    many: Many = each(_gaussian_to_law)
    if d == 1 and lengths is None:
        many = partial(_line_to_law, cells=cells, costs=remembered(partial(sampling_cost, cells=cells)))
    elif lengths is not None:
        circle = Circle(lengths[0])
        many = partial(_circle_to_law, circle=circle, costs=remembered(circle.sampling_cost))
    values, below, unbiased = apply(
        block_over(many, law, d, 3, lengths=lengths),
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
        estimator=_estimator(d, lengths),
        n_particles=position.sizes["particle"],
    )
    return result if d == 1 or is_gaussian(law, position) else as_lower_bound(result)


def _estimator(d: int, lengths: Lengths) -> str:
    if lengths is not None:
        return f"exact quantile coupling on a circle; floor: mean over {SAMPLES} samples of the law"
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


def even_cells(law: Any, n: int) -> tuple[Points, float]:
    """`line.even_cells`, for large n in a fraction of the time.

    Where the quantile function changes little over a cell five Gauss nodes are enough: the cell is short, and there is
    at most a kink in it. Cells at the ends and in gaps of the law are integrated until converged.
    """
    if n < MANY or isinstance(law, Gaussian):
        return line.even_cells(law, n)
    q, edges = line.quantile(law), line.even_levels(n)
    centre = float(q(np.array([0.5]))[0])
    values = q(edges[:-1, None] + _NODES / n) - centre
    means = values @ _NODE_WEIGHTS
    within = np.square(values - means[:, None]) @ _NODE_WEIGHTS / n
    change = np.ptp(values, axis=1)
    steep = np.flatnonzero(change > STEEP * np.median(change))
    for run in np.split(steep, np.flatnonzero(np.diff(steep) > 1) + 1):
        if len(run):
            at = slice(run[0], run[-1] + 1)
            means[at], rest = line.cells(law, edges[run[0] : run[-1] + 2], centre)
            within[at] = rest / len(run)
    return means + centre, float(within.sum())


def sampling_cost(law: Law, n: int, cells: Cells) -> float:
    """`line.sampling_cost`, with the cells of the law where they take long."""
    if n < MANY or isinstance(law, Gaussian):
        return line.sampling_cost(law, n)
    q, means = line.quantile(law), cells(law, n)[0]
    centre = float(np.mean(means))
    return float(line._kantorovich(lambda u: q(u) - centre, means - centre))


class Unrolled:
    """A law on a circle as one on the line: its levels count from the middle of its emptiest arc."""

    dim = 1

    def __init__(self, law: Any, length: float) -> None:
        self._law, self._length = law, length
        edges = line.quantile(law)(np.arange(ARCS + 1) / ARCS)
        arc = int(np.diff(edges).argmax())
        self._start = float(edges[arc : arc + 2].mean())
        self._first = float(self._below(np.array([self._start]))[0])

    def _below(self, x: Points) -> Points:
        found: Points = self._law.cdf(torch.from_numpy(x)).numpy()
        return found

    def quantile(self, u: Tensor) -> Tensor:
        """Q(u + u₀), Q(u + 1) = Q(u) + L."""
        shifted = u + self._first
        turned = (shifted >= 1).to(u)
        found: Tensor = self._law.quantile((shifted - turned).clamp(line.TINY, 1 - 2.0**-53)) + self._length * turned
        return found

    def table(self, n: int) -> tuple[Points, Points]:
        """Levels and points of n even steps round the circle, (n + 1,) each."""
        points = self._start + self._length * np.arange(n + 1) / n
        levels = np.append(np.mod(self._below(points[:-1]) - self._first, 1.0), 1.0)
        levels[0] = 0.0
        return np.maximum.accumulate(levels), points


class Circle:
    """W₂ between samples and laws on the circle of a length."""

    def __init__(self, length: float) -> None:
        self.length = length
        self._cells: Cells = remembered(lambda law, n: even_cells(Unrolled(law, length), n))

    def cells(self, law: Law, n: int) -> tuple[Points, float]:
        """`even_cells` of the unrolled law for n particles, a whole number of them for each.

        Raises:
            ValueError: the law lives on a line.

        """
        if limits.circles(law) is None:
            raise ValueError(
                "to_law: the run lives on a torus, where a law on the line has no distance to it. Pass a law with the "
                "run's period (mfsde.limit.GridLaw, a limit Dataset), or sample the law and use wasserstein.between."
            )
        return self._cells(law, n * math.ceil(FEWEST_CELLS / n))

    def displacements(self, x: Points, means: Points) -> Points:
        """Optimal displacements from the cells of a law to a sample, cell by cell.    (N,), (M,) -> (M,)."""
        m, low = len(means), means[0]
        ordered = np.repeat(np.sort(low + np.mod(x - low, self.length)), m // len(x))
        unrolled = (means + self.length * np.arange(-2, 3)[:, None]).ravel()

        def gap(k: int) -> Points:
            between: Points = ordered - unrolled[2 * m + k : 3 * m + k]
            return between

        def rises(k: int) -> bool:
            one, other = gap(k), gap(k + 1)
            return bool(one @ one <= other @ other)

        # Convex in the shift: the first one that no further shift improves.
        shifts = range(-2 * m, 2 * m)
        best = shifts[bisect.bisect_left(shifts, True, hi=len(shifts) - 1, key=rises)]
        return np.roll(gap(best), best)

    def sampling_cost(self, law: Law, n: int) -> float:
        """E W₂²(m_N, m), the mean over samples of the law that are the same in every call."""
        means, within = self.cells(law, n)
        # Levels of even points determine quantiles to (L/8192)², a share of 1e-6 of the floor of a million points.
        levels, points = Unrolled(law, self.length).table(INVERTED)
        total = 0.0
        for k in range(SAMPLES):
            z = Noise(0).increment(k, (1, n, 1), stream=Stream.DATA, dtype=torch.float64).numpy().ravel()
            gap = self.displacements(np.interp(np.sort(special.ndtr(z)), levels, points), means)
            total += float(gap @ gap) / len(gap) + within
        return total / SAMPLES


def circular_cost(a: Law | tuple[Points, Weights], b: Law, length: float) -> float:
    """W₂² on the circle between a weighted sample (N,), (N,), or a law, and a law."""
    circle = Circle(length)
    if isinstance(a, Law):
        gap = circle.displacements(circle.cells(a, FINE_CELLS)[0], circle.cells(b, FINE_CELLS)[0])
        return float(gap @ gap) / len(gap)
    x, p = a
    means, within = circle.cells(b, len(x))
    if p is not None:
        return line.circular_cost(x, p, means, None, length) + within
    gap = circle.displacements(x, means)
    return float(gap @ gap) / len(gap) + within


def _circle_to_law(
    x: Points, p: Weights, laws: list[Law], circle: Circle, costs: Callable[..., Any]
) -> tuple[Points, ...]:
    """W₂ to laws on a circle, its floor, and the jackknife values.    (T, R, N, 1) -> (T, R), (T,), (T, R)."""
    if p is not None:
        return each(partial(_weighted_to_circle, circle=circle))(x, p, laws)
    r, n = x.shape[1:3]
    particles.check_finite(x, "W₂ to a law")
    roots, below, unbiased = [], [], []
    for rows, law in zip(x[..., 0].astype(np.float64), laws, strict=True):
        means, within = circle.cells(law, n)
        gap = np.stack([circle.displacements(row, means) for row in rows])
        own = np.einsum("rm,rm->r", gap, gap) / len(means)
        roots.append(np.sqrt(own + within))
        below.append(math.sqrt(costs(law, n)))
        unbiased.append(floor.quantile_values(gap, own) if r >= floor.FEWEST else np.full(r, np.nan))
    return np.array(roots), np.array(below), np.array(unbiased)


def _weighted_to_circle(x: Points, p: Weights, law: Law, circle: Circle) -> tuple[Points, Points, Points]:
    """The same for unequal masses at one time: levels of masses cut cells, which are then atoms of the law."""
    shares = _normalised(np.asarray(p))
    n = _effective(shares)
    means, within = circle.cells(law, n)
    squares = [
        line.circular_cost(y[:, 0].astype(np.float64), w, means, None, circle.length) + within
        for y, w in zip(x, shares, strict=True)
    ]
    roots = np.sqrt(squares)
    return roots, np.sqrt(circle.sampling_cost(law, n)), np.full_like(roots, np.nan)


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
