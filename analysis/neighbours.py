"""Differential entropy of a sample, in nats, from distances between neighbours: spacings on a line, k-th neighbours.

    H ≈ ψ(N) - ψ(k) + log V_d + (d/N) Σ_i log r_k(i),   r_k(i) the distance from x_i to its k-th neighbour

The bias of the k-th neighbours is known exactly for Gaussian laws, by a quadrature over the law of r_k; it is
subtracted. What remains comes from the shape of the law: in d >= 4 it is estimated by comparing N with N/2, and the
estimate is refused where that shows a bias above `LARGEST_BIAS`.
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
# A copied particle lowers the rank of its neighbours by one: a bias of about 1/(k - 1) for each.
LARGEST_SHARE_OF_COPIES = 0.01


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
    terms = np.empty_like(ordered)
    np.put_along_axis(terms, order, np.log(gaps) - special.digamma(high - low) + special.digamma(n + 1), axis=-1)
    return terms


def half_window(n: int) -> int:
    """m, growing like N^{1/3}."""
    return max(3, int(n ** (1 / 3) / 2 + 0.5))


def nearest(x: Array, *, lengths: Lengths, checked: bool) -> Array:
    """ψ(N) - ψ(k) + log V_d + d log r_k on whitened particles, less its bias.    (..., N, d) -> (..., N)."""
    lead, (n, d) = x.shape[:-2], x.shape[-2:]
    samples = x.reshape(-1, n, d)
    # The tree's build and query release the interpreter: threads across samples, or inside the only one.
    workers = -1 if len(samples) == 1 else 1
    entropy = partial(_checked_by_halves if checked and d > 3 else _calibrated, lengths=lengths, workers=workers)
    found = threaded(lambda k: entropy(samples[k]), len(samples), os.cpu_count() or 1)
    return np.array(found).reshape(*lead, n)


def _checked_by_halves(x: Array, *, lengths: Lengths, workers: int) -> Array:
    """The terms, after the check that N/2 particles give the same: the bias falls like N^{-2/d}."""
    n, d = x.shape
    terms = _calibrated(x, lengths=lengths, workers=workers)
    whole = float(terms.mean())
    half = sum(float(_calibrated(x[k::2], lengths=lengths, workers=workers).mean()) for k in (0, 1)) / 2
    shrink = 2 ** (2 / d) - 1
    bias = (half - whole) / shrink
    # Its standard deviation, measured on Gaussian laws in d = 4 ... 10.
    noise = 0.25 * math.sqrt(d / n) / shrink
    if abs(bias) > LARGEST_BIAS + 3 * noise:
        raise ValueError(
            f"the kNN entropy of N = {n} particles in d = {d} is {whole:.3f}, and {half:.3f} from halves: a "
            f"bias of about {bias:.2f} nat, since neighbours are too far apart to resolve the law. Pool replicas, "
            "project on fewer components, or insist with beyond_range=True."
        )
    return terms


def _calibrated(x: Array, *, lengths: Lengths, workers: int) -> Array:
    """ψ(N) - ψ(k) + log V_d + d log r_k, r_k the distance to the k-th neighbour, less its bias at a Gaussian law."""
    n, d = x.shape
    if lengths is None:
        points, log_det = _whitened(x)
        shift, box = log_det - gaussian_bias(n, d), None
    else:
        box = np.array([length if math.isfinite(length) else 0.0 for length in lengths])
        points, shift = _wrapped(x, box), 0.0
    distance, _ = cKDTree(points, boxsize=box).query(points, k=[2, NEIGHBOURS + 1], workers=workers)
    copies = float((distance[:, 0] == 0).mean())
    if copies > LARGEST_SHARE_OF_COPIES or not (distance[:, 1] > 0).all():
        raise ValueError(
            f"{100 * copies:.3g} % of {n} particles are copies of another: a law with atoms has entropy -inf. Copies "
            "come from birth and death, resampling, a start at a point, or float32; select times after they parted, "
            "simulate in float64, or in one dimension use estimator='spacing'."
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
    if not (scale > 0).all():
        raise ValueError("a component is constant: the law has no density, its entropy is -inf. Drop the component.")
    centred /= scale
    values, vectors = np.linalg.eigh(centred.T @ centred / len(x))
    if values[0] <= 1e-12 * values[-1]:
        raise ValueError(
            "the particles lie on a hyperplane: the law has no density, its entropy is -inf. Project on fewer "
            "components."
        )
    return centred @ (vectors / np.sqrt(values)), float(np.log(scale).sum() + 0.5 * np.log(values).sum())


def _wrapped(x: Array, box: Array) -> Array:
    """Periodic components in [0, length)."""
    turned = np.where(box > 0, np.mod(x, np.where(box > 0, box, 1.0)), x)
    # mod of a tiny negative number rounds to the length itself, which the tree refuses.
    return np.where((box > 0) & (turned >= box), 0.0, turned)


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
