"""Differential entropy of a sample, in nats, from distances between neighbours: spacings on a line, k-th neighbours.

    H ≈ ψ(N) - ψ(k) + log V_d + (d/N) Σ_i log r_k(i),   r_k(i) the distance from x_i to its k-th neighbour

Components are rescaled first: on a line by the covariance of the particles, on a circle by their angular deviation. The
bias of the k-th neighbours is known exactly for Gaussian laws, by a quadrature over the law of r_k; it is subtracted.
What remains comes from the shape of the law, such as clusters that the common scale does not fit: it is estimated by
comparing N with N/2, and the estimate is refused where that shows a bias above `refused_above`.
"""

from __future__ import annotations

import math
import os
from functools import lru_cache, partial

import numpy as np
from scipy import special, stats
from scipy.spatial import cKDTree

from .labels import threaded
from .particles import Lengths

Array = np.ndarray

NEIGHBOURS = 4
# The least N for d = 1, 2, 3; above, it grows geometrically to FEWEST_AT_TEN at d = 10.
FEWEST, FEWEST_AT_THREE, FEWEST_AT_TEN = (100, 200, 500), 1_000, 10_000
LARGEST_DIM = 10
FEWEST_SPACINGS = 20
LARGEST_BIAS = 0.1
# The standard deviations of its estimate that a bias must exceed to be seen: runs hold thousands of samples.
SEEN = 4.5
# Many particles are compared with two parts of about this size, few with their halves.
PARTS, PART = 2, 5_000
# A copied particle lowers the rank of its neighbours by one: a bias of about 1/(k - 1) for each.
LARGEST_SHARE_OF_COPIES = 0.01
# A ball wider than its torus overlaps itself, at first by little.
LARGEST_SHARE_WRAPPED = 0.05
FLATTEST = 1e-12  # deviation of a component in units of its values


def spacing(x: Array, *, lengths: Lengths, checked: bool) -> Array:
    """log(x_(j) - x_(l)) - ψ(j - l) + ψ(N + 1), l, j = i ∓ m within the sample: no bias at uniform laws.

    (..., N, 1) -> (..., N).
    """
    n = x.shape[-2]
    m = half_window(n)
    order = np.argsort(x[..., 0], axis=-1)
    ordered = np.take_along_axis(x[..., 0], order, axis=-1)
    low, high = np.maximum(np.arange(n) - m, 0), np.minimum(np.arange(n) + m, n - 1)
    gaps = ordered[..., high] - ordered[..., low]
    if not (gaps > 0).all():
        raise ValueError(
            f"more than {m} particles coincide: a law with atoms has entropy -inf. Copies come from resampling or from "
            "a start at a point; select later times."
        )
    _refuse_copies(ordered, gaps / (high - low))
    terms = np.empty_like(ordered)
    np.put_along_axis(terms, order, np.log(gaps) - special.digamma(high - low) + special.digamma(n + 1), axis=-1)
    return terms


def _refuse_copies(ordered: Array, spacings: Array) -> None:
    """Refuses more coincidences than rounding explains.    Ordered particles and mean spacings around them, (..., N).

    On a lattice of width q, λ = q / spacing particles share a site on average, and 1 - (1 - e^{-λ})/λ of them add to
    one that is occupied. The width is that of float32 or float64 where the particles are, or their smallest distance,
    which for copies of unrounded particles is far too small. Copies of particles that share sites anyway (λ near 1) are
    not told apart from these.
    """
    steps = np.diff(ordered, axis=-1)
    ties = (steps == 0).mean(-1)
    if not (ties > LARGEST_SHARE_OF_COPIES).any():
        return
    single = ordered.astype(np.float32)
    rounding = np.abs(np.spacing(single if (single == ordered).all() else ordered)).astype(np.float64)
    smallest = np.where(steps > 0, steps, np.inf).min(-1, keepdims=True)
    shared = np.maximum(rounding, np.where(np.isfinite(smallest), smallest, 0.0)) / spacings
    explained = (1 + np.expm1(-shared) / shared).mean(-1)
    # Twice: the spacings are estimates.
    if (ties > LARGEST_SHARE_OF_COPIES + 2 * explained).any():
        raise ValueError(
            f"{100 * float(ties.max()):.3g} % of the particles are copies of another: a law with atoms has entropy "
            "-inf. Copies come from birth and death, resampling, or a start at a point; select times after they parted."
        )


def half_window(n: int) -> int:
    """m, growing like N^{1/3}."""
    return max(3, int(n ** (1 / 3) / 2 + 0.5))


def nearest(x: Array, *, lengths: Lengths, checked: bool) -> Array:
    """ψ(N) - ψ(k) + log V_d + d log r_k on whitened particles, less its bias.    (..., N, d) -> (..., N)."""
    lead, (n, d) = x.shape[:-2], x.shape[-2:]
    samples = x.reshape(-1, n, d)
    # The tree's build and query release the interpreter: threads across samples, or inside the only one.
    workers = -1 if len(samples) == 1 else 1
    entropy = partial(_checked_by_parts if checked else _calibrated, lengths=lengths, workers=workers)
    found = threaded(lambda k: entropy(samples[k]), len(samples), os.cpu_count() or 1)
    return np.array(found).reshape(*lead, n)


def _checked_by_parts(x: Array, *, lengths: Lengths, workers: int) -> Array:
    """The terms, checked against those of a share 1/s of the particles: the bias falls like N^{-2/d}."""
    n, d = x.shape
    points, box, log_det = _rescaled(x, lengths)
    terms = _terms(points, box, workers)
    s = _share(n)
    # At the same particles and in the same units, so that log m itself cancels.
    changes = [float((_terms(points[k::s], box, workers) - terms[k::s]).mean()) for k in range(PARTS)]
    bias = float(np.mean(changes)) / (s ** (2 / d) - 1)
    if abs(bias) > refused_above(n, d):
        raise ValueError(
            f"the kNN entropy of N = {n} particles in d = {d} is {float(terms.mean()) + log_det:.3f}, and changes by "
            f"{float(np.mean(changes)):.3f} from N to N/{s}: a bias of about {bias:.2f} nat, since neighbours are too "
            "far apart to resolve the law. Pool replicas, project on fewer components, or insist with "
            "beyond_range=True."
        )
    return terms + log_det


def refused_above(n: int, d: int) -> float:
    """The estimated bias above which the kNN entropy is refused: `LARGEST_BIAS`, or what can be seen."""
    s = _share(n)
    # The standard deviation, measured on Gaussian laws in d = 1 ... 10.
    noise = (0.2 + 0.55 / d) * math.sqrt(d * s / (PARTS * n)) / (s ** (2 / d) - 1)
    return max(LARGEST_BIAS, float(SEEN * noise))


def _share(n: int) -> int:
    return max(2, n // PART)


def _calibrated(x: Array, *, lengths: Lengths, workers: int) -> Array:
    points, box, log_det = _rescaled(x, lengths)
    return _terms(points, box, workers) + log_det


def _rescaled(x: Array, lengths: Lengths) -> tuple[Array, Array | None, float]:
    """Particles in units of their scatter, their box, and what these units took off the entropy."""
    if lengths is None:
        points, log_det = _whitened(x)
        return points, None, log_det
    return _on_torus(x, np.array(lengths))


def _terms(points: Array, box: Array | None, workers: int) -> Array:
    """ψ(N) - ψ(k) + log V_d + d log r_k, r_k the distance to the k-th neighbour, less its bias at a Gaussian law."""
    n, d = points.shape
    shift = -gaussian_bias(n, d) if box is None else 0.0
    distance, _ = cKDTree(points, boxsize=box).query(points, k=[2, NEIGHBOURS + 1], workers=workers)
    copies = float((distance[:, 0] == 0).mean())
    if copies > LARGEST_SHARE_OF_COPIES or not (distance[:, 1] > 0).all():
        raise ValueError(
            f"{100 * copies:.3g} % of {n} particles are copies of another: a law with atoms has entropy -inf. Copies "
            "come from birth and death, resampling, a start at a point, or float32; select times after they parted, "
            "simulate in float64, or in one dimension use estimator='spacing', which bears rounding."
        )
    if box is not None and float((distance[:, 1] > box[box > 0].min() / 2).mean()) > LARGEST_SHARE_WRAPPED:
        raise ValueError(
            f"the neighbours of {n} particles in d = {d} are more than half a period apart. Simulate more particles, "
            "pool replicas, or project on fewer components."
        )
    terms: Array = d * np.log(distance[:, 1]) + (_log_volume(n, d) + shift)
    return terms


def _log_volume(n: int, d: int) -> float:
    ball = d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1)
    return float(special.digamma(n) - special.digamma(NEIGHBOURS)) + ball


def _whitened(x: Array) -> tuple[Array, float]:
    """Particles with mean 0 and covariance I, and the log-determinant that this took off the entropy."""
    centred = x - x.mean(0)
    scale = np.sqrt(np.mean(centred**2, axis=0))
    # The mean of a constant is rounded, so its scale need not be 0.
    if not (scale > FLATTEST * np.abs(x).max(0)).all():
        raise ValueError("a component is constant: the law has no density, its entropy is -inf. Drop the component.")
    centred /= scale
    values, vectors = np.linalg.eigh(centred.T @ centred / len(x))
    if values[0] <= 1e-12 * values[-1]:
        raise ValueError(
            "the particles lie on a hyperplane: the law has no density, its entropy is -inf. Project on fewer "
            "components."
        )
    return centred @ (vectors / np.sqrt(values)), float(np.log(scale).sum() + 0.5 * np.log(values).sum())


def _on_torus(x: Array, lengths: Array) -> tuple[Array, Array, float]:
    """Particles in units of their scatter, the box (0 on a line), and what these units took off the entropy.

    On a circle the angular deviation √(-2 log|E e^{iθ}|), at most that of the uniform law.
    """
    circle = np.isfinite(lengths)
    points, box, log_det = np.empty_like(x), np.zeros(len(lengths)), 0.0
    if not circle.all():
        points[:, ~circle], log_det = _whitened(x[:, ~circle])
    turned = np.mod(x[:, circle], lengths[circle])
    wave = 2 * math.pi / lengths[circle]
    middle = np.angle(np.exp(1j * wave * turned).mean(0))
    # |E e^{iθ}| = 1 - 2 <sin²>, to full precision where particles are close to one another.
    apart = np.square(np.sin((wave * turned - middle) / 2)).mean(0)
    deviation = np.sqrt(-2 * np.log1p(-np.minimum(2 * apart, 1 - 1e-15))) / (2 * math.pi)
    if not (deviation > FLATTEST).all():
        raise ValueError("a component is constant: the law has no density, its entropy is -inf. Drop the component.")
    scale = lengths[circle] * np.minimum(deviation, 1 / math.sqrt(12))
    box[circle] = lengths[circle] / scale
    # mod of a tiny negative number rounds to the length itself, which the tree refuses.
    points[:, circle] = np.where(turned / scale >= box[circle], 0.0, turned / scale)
    return points, box, log_det + float(np.log(scale).sum())


@lru_cache(maxsize=256)
def gaussian_bias(n: int, d: int, k: int = NEIGHBOURS, nodes: int = 64) -> float:
    """Bias of the k-nearest-neighbour entropy of N samples of a Gaussian law in dimension d, exactly.

    Given a particle at squared norm s ~ χ²_d, the others' squared distances are non-central χ²_d(s), so the k-th
    smallest is their quantile at a Beta(k, N - k) variate: E log r_k is a double integral, here by Gauss-Legendre in
    both levels.
    """
    level, weight = np.polynomial.legendre.leggauss(nodes)
    level, weight = (level + 1) / 2, weight / 2
    norms = stats.chi2.ppf(level, d)
    squared = stats.ncx2.ppf(special.betaincinv(k, n - k, level), d, norms[:, None])
    mean_log = 0.5 * float(weight @ np.log(squared) @ weight)
    return _log_volume(n, d) + d * mean_log - d / 2 * math.log(2 * math.pi * math.e)


def check_range(n: int, d: int, beyond_range: bool) -> None:
    """Refuses a number of particles and a dimension outside the range of `nearest`."""
    if n <= max(2 * NEIGHBOURS, d + 1):
        raise ValueError(f"the kNN entropy needs more particles; got N = {n} in d = {d}.")
    if not beyond_range and (d > LARGEST_DIM or n < fewest(d)):
        need = f"d <= {LARGEST_DIM}" if d > LARGEST_DIM else f"N >= {fewest(d)} in d = {d}"
        raise ValueError(
            f"the kNN entropy of N = {n} particles in d = {d} is outside its range, {need}: at d = 20 it is off by "
            "more than a nat. Pool replicas, project on fewer components, take estimator='gaussian' (an upper "
            "bound), or insist with beyond_range=True."
        )


def fewest(d: int) -> int:
    """Least number of particles for which the kNN entropy in d <= 10 is offered."""
    if d <= len(FEWEST):
        return FEWEST[d - 1]
    return int(FEWEST_AT_THREE * (FEWEST_AT_TEN / FEWEST_AT_THREE) ** ((d - 3) / (LARGEST_DIM - 3)))
