"""The global minimum over measures of features: the convex problem that a network of infinitely many neurons solves.

    P(w) = ½|Σ_k w_k a_k - y|² + λ Σ_k |w_k|,    D(ν) = ½|y|² - ½|y - ν|²  where |⟨a_k, ν⟩| <= λ for all k,

max D = min P, and with r = y - Σ w_k a_k, ν = r·min(1, λ/max|⟨a_k, r⟩|) is admissible: P(w) - D(ν) bounds the error of
P(w). Where λ|w| is the regulariser of a neuron, P is its objective over signed measures on the neurons a_k; with w >= 0
only the upper bounds ⟨a_k, ν⟩ <= λ are left.

* `sparse_measure`: finitely many features, to the last digits;
* `sparse_measure_over`: a continuum of them;
* `features_of_gram`: features from inner products.

Source: Lawson, Hanson, Solving Least Squares Problems (1974), chapter 23; Lee, Battle, Raina, Ng, Efficient sparse
coding algorithms (2006); for the continuum Hettich, Kortanek, Semi-infinite programming, SIAM Review 35 (1993),
section 7.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray
Function = Callable[[Array], Array]

ROUNDING = 1e-13  # of λ: what ⟨a, r⟩ may exceed it by
DEPENDENT = 1e-11  # of the largest singular value: below it features count as linearly dependent
MOST_ROUNDS = 60  # of exchange
ZOOM = 24  # halvings of the grid around a local maximum


@dataclass(frozen=True)
class SparseMeasure:
    """A minimiser with its certificate.

    Args:
        weights: w, (m,); those off the support are exactly 0.
        objective: P(w).
        gap: P(w) - D(ν) >= 0: how far P(w) can be from the minimum.
        dual: ν, (n,).
        certificate: ⟨a_k, ν⟩/λ, (m,): at most 1 in size, and sign w_k where w_k ≠ 0.
        nodes: the places of the features, (m, p), where there is a continuum of them.

    """

    weights: Array
    objective: float
    gap: float
    dual: Array
    certificate: Array
    nodes: Array | None = None

    @property
    def support(self) -> Array:
        """Indices of the features in use."""
        return np.flatnonzero(self.weights)


def sparse_measure(
    features: Any, target: Any, penalty: float, *, nonnegative: bool = False, tolerance: float = 1e-10
) -> SparseMeasure:
    """The minimiser of ½|Σ_k w_k a_k - y|² + λ Σ_k |w_k|, over w in R^m or w >= 0.

    Active sets: the feature with the largest |⟨a, r⟩| enters, the quadratic problem on the active ones is solved
    exactly, and those whose weight would change sign leave. Dependent features are left along a null direction.

    Args:
        features: a_k as columns, (n, m).
        target: y, (n,).
        penalty: λ > 0.
        nonnegative: over w >= 0.
        tolerance: of the duality gap, relative to the objective.

    Raises:
        ValueError: shapes that do not fit, numbers that are not finite, λ <= 0.
        RuntimeError: the gap was not reached.

    """
    a, y = np.asarray(features, dtype=np.float64), np.asarray(target, dtype=np.float64)
    if a.ndim != 2 or y.shape != a.shape[:1] or not a.size:
        raise ValueError(
            f"sparse_measure: features of shape {a.shape} and a target of shape {y.shape}; expected (n, m), one column "
            "for each feature, and (n,)."
        )
    if not (np.isfinite(a).all() and np.isfinite(y).all() and math.isfinite(penalty) and penalty > 0):
        raise ValueError(
            f"sparse_measure: features or target are not finite, or penalty = {penalty} is not positive. Without a "
            "penalty there is no dual certificate; use numpy.linalg.lstsq."
        )
    weights = _active_set(a, y, penalty, nonnegative)
    residual = y - a @ weights
    pull = a.T @ residual
    objective, gap, scale = _certified(weights, residual, y, float(_size(pull, nonnegative).max()), penalty)
    # At the minimum 0 the gap has no other scale than |y|².
    if not gap <= tolerance * max(objective, tolerance * float(y @ y)):
        raise RuntimeError(
            f"sparse_measure: the duality gap is {gap:.3g} for an objective of {objective:.6g}; asked for "
            f"{tolerance:g} of it. The features are nearly dependent: scale them, thin the grid out, or allow more."
        )
    return SparseMeasure(weights, objective, max(gap, 0.0), scale * residual, scale * pull / penalty)


def sparse_measure_over(
    kernel: Callable[[Array, Array], Array],
    pull: Function,
    square: float,
    penalty: float,
    grid: Array,
    spacing: Array,
    *,
    tolerance: float = 1e-10,
) -> SparseMeasure:
    """The minimiser over signed measures on a continuum of features φ(θ), by exchange.

    The problem on finitely many nodes is solved, the local maxima of |⟨r, φ(θ)⟩| above λ become nodes, and so on until
    the gap for the continuum is small. The maxima are looked for on the grid, and then between its points.

    Args:
        kernel: ⟨φ(θ), φ(θ')⟩, (k, p), (l, p) -> (k, l).
        pull: ⟨y, φ(θ)⟩, (k, p) -> (k,).
        square: |y|².
        penalty: λ > 0.
        grid: points θ, (g, p), fine enough to meet every hill of |⟨r, φ⟩|.
        spacing: distance of neighbours in each component, (p,).
        tolerance: of the duality gap, relative to the objective.

    Returns:
        SparseMeasure whose features are the nodes in use; the dual is r in the features of `features_of_gram`.

    Raises:
        ValueError: as for `sparse_measure`, or a grid that is not (g, p).
        RuntimeError: the gap was not reached.

    """
    if grid.ndim != 2 or not grid.size:
        raise ValueError(f"sparse_measure_over: a grid of shape {grid.shape}; expected (g, p), one row for each place.")
    spacing = np.broadcast_to(np.asarray(spacing, dtype=np.float64), grid.shape[1:])
    nodes = grid[np.abs(pull(grid)).argmax()][None]
    for _ in range(MOST_ROUNDS):
        b = pull(nodes)
        a, y = features_of_gram(kernel(nodes, nodes), b, square)
        found = sparse_measure(a, y, penalty, tolerance=tolerance)
        used = found.support
        at, w = nodes[used], found.weights[used]

        def residual(theta: Array, at: Array = at, w: Array = w) -> Array:
            return np.asarray(pull(theta) - kernel(theta, at) @ w)

        peaks = _peaks(residual, grid, spacing)
        heights = np.abs(residual(peaks))
        highest = max(float(heights.max(initial=0.0)), float(np.abs(residual(at)).max(initial=0.0)))
        objective, gap, scale = _certified(w, y - a[:, used] @ w, y, highest, penalty)
        if gap <= tolerance * max(objective, tolerance * square):
            dual = scale * (y - a[:, used] @ w)
            return SparseMeasure(w, objective, max(gap, 0.0), dual, scale * residual(at) / penalty, at)
        nodes = np.unique(np.concatenate([at, peaks[heights > penalty]]), axis=0)
    raise RuntimeError(
        f"sparse_measure_over: after {MOST_ROUNDS} exchanges the duality gap is {gap:.3g} for an objective of "
        f"{objective:.6g}; asked for {tolerance:g} of it. Refine the grid, or allow more."
    )


def features_of_gram(gram: Array, correlations: Array, square: float) -> tuple[Array, Array]:
    """Features and a target with given inner products ⟨a_k, a_l⟩, ⟨a_k, y⟩, |y|².

    (m, m), (m,) -> (m + 1, m), (m + 1,).

    Raises:
        ValueError: products that are none: a negative eigenvalue beyond rounding.

    """
    full = np.block([[np.asarray(gram), np.asarray(correlations)[:, None]], [np.asarray(correlations), square]])
    values, vectors = np.linalg.eigh((full + full.T) / 2)
    if values[0] < -1e-10 * max(values[-1], 1e-300):
        raise ValueError(
            f"features_of_gram: the Gram matrix has the eigenvalue {values[0]:.3g} beside {values[-1]:.3g}; inner "
            "products have none below 0. Is the kernel positive semi-definite, and the target among its functions?"
        )
    root = np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T
    features: Array = root[:, :-1]
    return features, root[:, -1]


def _certified(w: Array, residual: Array, y: Array, highest: float, penalty: float) -> tuple[float, float, float]:
    """P(w), P(w) - D(ν), and the factor with which ν = factor·r is admissible."""
    scale = min(1.0, penalty / highest) if highest > 0 else 1.0
    fit, cost = 0.5 * float(residual @ residual), penalty * float(np.abs(w).sum())
    # ½|y|² - ½|y - sr|² = s⟨y, r⟩ - ½s²|r|².
    return fit + cost, fit + cost - scale * float(y @ residual) + scale**2 * fit, scale


def _size(pull: Array, nonnegative: bool) -> Array:
    size: Array = np.maximum(pull, 0.0) if nonnegative else np.abs(pull)
    return size


def _active_set(a: Array, y: Array, penalty: float, nonnegative: bool) -> Array:
    """The weights at which no feature wants to enter."""
    weights, least = np.zeros(a.shape[1]), 0.5 * float(y @ y)
    for _ in range(20 * (min(a.shape) + 50)):
        pull = a.T @ (y - a @ weights)
        size = np.where(weights == 0, _size(pull, nonnegative), 0.0)
        k = int(size.argmax())
        if size[k] <= penalty * (1 + ROUNDING):
            break
        active = np.append(np.flatnonzero(weights), k)
        signs = np.append(np.sign(weights[active[:-1]]), math.copysign(1.0, pull[k]))
        kept, sizes = _settled(a[:, active] * signs, y, penalty, np.abs(weights[active]))
        changed = np.zeros_like(weights)
        changed[active[kept]] = signs[kept] * sizes
        objective = 0.5 * float(np.square(y - a @ changed).sum()) + penalty * float(np.abs(changed).sum())
        if not objective < least:
            break  # no more than rounding is left to gain
        weights, least = changed, objective
    return weights


def _settled(b: Array, y: Array, penalty: float, v: Array) -> tuple[Array, Array]:
    """The minimum of ½|Bv - y|² + λ Σv over v >= 0 among features that leave when they reach 0.

    Returns which are left, and their v > 0.
    """
    kept = np.arange(b.shape[1])
    while len(kept):
        u, s, rows = np.linalg.svd(b[:, kept], full_matrices=False)
        rank = int((s > DEPENDENT * s[0]).sum())
        ones = np.ones(len(kept))
        if rank == len(kept):
            newton = rows.T @ ((u.T @ y) / s - penalty * (rows @ ones) / s**2)
            direction, longest = newton - v, 1.0
        else:
            # Along a null direction the fit stays and the penalty falls, or stays.
            null = ones - rows[:rank].T @ (rows[:rank] @ ones)
            if np.abs(null).max() < 1e-9:
                null = np.linalg.svd(b[:, kept])[2][-1]
                null = null if null.max() > -null.min() else -null
            direction, longest = -null, math.inf
        falling = direction < 0
        steps = np.where(falling, v / np.where(falling, -direction, 1.0), math.inf)
        step = min(longest, float(steps.min()))
        v = v + step * direction
        if step == longest and (v > 0).all():
            break
        left = (steps > step) & (v > 0)
        kept, v = kept[left], v[left]
    return kept, v


def _peaks(f: Function, grid: Array, spacing: Array) -> Array:
    """Local maxima of |f|: grid points above their neighbours, then halved steps around each of them.    (k, p)."""
    height = np.abs(f(grid))
    order = height.argsort()[::-1]
    found: list[int] = []
    for i in order[: 60 * grid.shape[1]]:
        if all((np.abs(grid[i] - grid[j]) > 1.5 * spacing).any() for j in found):
            found.append(int(i))
    at = grid[found]
    p = grid.shape[1]
    offsets = np.stack(np.meshgrid(*[[-1.0, 0.0, 1.0]] * p, indexing="ij"), axis=-1).reshape(-1, p)
    h = np.asarray(spacing, dtype=np.float64)
    for _ in range(ZOOM):
        around = at[:, None] + offsets * h
        values = np.abs(f(around.reshape(-1, p))).reshape(around.shape[:2])
        best = values.argmax(1)
        at = around[np.arange(len(at)), best]
        h = h / 2
    return at
