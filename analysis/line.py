"""Optimal transport in one dimension, exactly: monotone couplings on the line, shifted ones on the circle.

On the line W_p(a, b)^p = ∫_0^1 |Q_a(u) - Q_b(u)|^p du, Q the quantile functions. A sample's Q is constant on the N
cells ((i-1)/N, i/N]; against a law the integral over a cell is a quadrature of the law's quantile function.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from scipy import special
from torch import Tensor

from mfsde import Gaussian
from mfsde.measure import Law

Points = np.ndarray
Weights = np.ndarray | None
Quantile = Callable[[Points], Points]
Cells = Callable[[Law, int], tuple[Points, float]]

# Panels are halved until 8 Gauss nodes and 2 × 8 of them agree to this share of the whole integral.
PANEL_TOLERANCE = 1e-13
AGREEING = 1e-6  # of their quartile distance to the power: what two laws are integrated to 1e-13 of
ROUNDING = 1e-12  # of that constant: what is left of it in the difference
HALVINGS = 52
LARGEST_PANELS = 1 << 21
# From this many cells on those that a quantile function crosses slowly are integrated without a check.
MANY = 1000
STEEP = 20.0  # times the median change over a cell: the others
REMEMBERED = 4
TINY = float(np.finfo(float).tiny)
_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(8)
# Values at the nodes to a Legendre series, from the right.
_TO_SERIES = np.linalg.inv(np.polynomial.legendre.legvander(_NODES, 7)).T
_NODES, _NODE_WEIGHTS = (_NODES + 1) / 2, _NODE_WEIGHTS / 2
_FEW_NODES, _FEW_WEIGHTS = np.polynomial.legendre.leggauss(5)
_FEW_NODES, _FEW_WEIGHTS = (_FEW_NODES + 1) / 2, _FEW_WEIGHTS / 2
# Windows of a Bernstein polynomial are evaluated in blocks of this many floats (8 MiB).
WINDOW_FLOATS = 1 << 20


def cost(x: Points, p: Weights, y: Points, q: Weights, power: float = 2.0) -> float:
    """W^power between two weighted samples on the line, by their monotone rearrangement.    (N,), (M,)."""
    if p is None and q is None and len(x) == len(y):
        return float(np.mean(np.abs(np.sort(x) - np.sort(y)) ** power))
    (x, p), (y, q) = ordered(x, p), ordered(y, q)
    return _merged(x, np.cumsum(p), y, np.cumsum(q), power)


def law_cost(x: Points, p: Weights, law: Law, power: float = 2.0) -> float:
    """W^power between a weighted sample and a law on the line, by quadrature of the law's quantiles.    (N,)."""
    x, p = ordered(x, p)
    edges = levels(p)
    q = quantile(law)
    if power == 2:
        centre = _centre(law)
        means, within = cells(law, edges, centre)
        return float(np.sum(np.diff(edges) * np.square(x - centre - means)) + within)
    return integral(lambda u, cell: np.abs(x[cell, None] - q(u)) ** power, edges)


def laws_cost(a: Law, b: Law, power: float = 2.0) -> float:
    """∫|Q_a - Q_b|^power du between two laws on the line, to an absolute accuracy where they nearly agree.

    There the integrand is rounding, which no quadrature resolves; a constant far below what matters is added to it.
    """
    left, right = quantile(a), quantile(b)
    middle = np.array([0.25, 0.75])
    least = AGREEING * float(max(np.ptp(left(middle)), np.ptp(right(middle)))) ** power
    total = integral(lambda u, cell: np.abs(left(u) - right(u)) ** power + least, np.linspace(0, 1, 65))
    excess = total - least
    return excess if excess > ROUNDING * least else 0.0


def ordered(x: Points, p: Weights) -> tuple[Points, Points]:
    """The sample in ascending order, with its masses."""
    order = np.argsort(x, kind="stable")
    # In float32 a law's centre at an offset of 1e4 would be rounded to 1e-3.
    x = x.astype(np.float64)
    return x[order], np.full(len(x), 1 / len(x)) if p is None else p[order]


def levels(p: Points) -> Points:
    """Cumulative masses 0 = u_0 <= ... <= u_N = 1."""
    edges = np.concatenate([[0.0], np.cumsum(p)])
    edges[-1] = 1.0
    capped: Points = np.minimum(edges, 1.0)
    return capped


def quantile(law: Law) -> Quantile:
    """The law's quantile function on arrays.

    Raises:
        ValueError: it has none.

    """
    found = getattr(law, "quantile", None)
    if law.dim != 1 or not callable(found):
        raise ValueError(
            f"{type(law).__name__} (d = {law.dim}) has no quantile function; exact coupling with a law needs one "
            "dimension and a method quantile(u). Sample the law (law.sample(n)) instead and report the floor of n."
        )
    # Next to 1 levels round to 1, where an unbounded law's quantile is infinite.
    return lambda u: np.asarray(found(torch.from_numpy(np.clip(u, TINY, 1 - 2.0**-53))))


def cells(law: Law, edges: Points, centre: float = 0.0) -> tuple[Points, float]:
    """Mean of Q - centre over every cell, and what varies inside: Σ_i ∫_cell (Q - mean_i)² du.

    A Gaussian's are closed forms; others are integrated until converged.
    """
    if isinstance(law, Gaussian):
        mean, deviation = float(law.mean[0]), float(law.cov[0, 0]) ** 0.5
        standard, within = _standard_cells(edges)
        return mean - centre + deviation * standard, deviation**2 * within
    q = quantile(law)
    first = panels(lambda u, cell: q(u) - centre, edges)
    second = panels(lambda u, cell: np.square(q(u) - centre), edges)
    widths = np.diff(edges)
    means = np.divide(first, widths, out=np.zeros_like(first), where=widths > 0)
    return means, max(0.0, float(np.sum(second - widths * np.square(means))))


def even_levels(n: int) -> Points:
    """The levels 0, 1/n, ..., 1 of a sample of equal masses."""
    return np.arange(n + 1) / n


def even_cells(law: Law, n: int) -> tuple[Points, float]:
    """Means of Q over the cells of a sample of n equal masses, and what varies inside."""
    if isinstance(law, Gaussian):
        standard, within = _standard_even_cells(n)
        deviation = float(law.cov[0, 0]) ** 0.5
        return float(law.mean[0]) + deviation * standard, deviation**2 * within
    centre = _centre(law)
    means, within = cells(law, even_levels(n), centre)
    return means + centre, within


def quick_cells(law: Any, n: int) -> tuple[Points, float]:
    """`even_cells`, for large n in a fraction of the time.

    Where the quantile function changes little over a cell five Gauss nodes are enough: the cell is short, and there is
    at most a kink in it. Cells at the ends and in gaps of the law are integrated until converged.
    """
    if n < MANY or isinstance(law, Gaussian):
        return even_cells(law, n)
    q, edges = quantile(law), even_levels(n)
    centre = float(q(np.array([0.5]))[0])
    values = q(edges[:-1, None] + _FEW_NODES / n) - centre
    means = values @ _FEW_WEIGHTS
    within = np.square(values - means[:, None]) @ _FEW_WEIGHTS / n
    change = np.ptp(values, axis=1)
    steep = np.flatnonzero(change > STEEP * np.median(change))
    for run in np.split(steep, np.flatnonzero(np.diff(steep) > 1) + 1):
        if len(run):
            at = slice(run[0], run[-1] + 1)
            means[at], rest = cells(law, edges[run[0] : run[-1] + 2], centre)
            within[at] = rest / len(run)
    return means + centre, float(within.sum())


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


def _centre(law: Law) -> float:
    mean = getattr(law, "mean", None)
    return float(mean[0]) if isinstance(mean, Tensor) else float(quantile(law)(np.array([0.5]))[0])


@lru_cache(maxsize=8)
def _standard_even_cells(n: int) -> tuple[Points, float]:
    return _standard_cells(even_levels(n))


def _standard_cells(edges: Points) -> tuple[Points, float]:
    """∫_a^b Φ⁻¹ du = φ(Φ⁻¹(a)) - φ(Φ⁻¹(b)), and ∫_0^1 (Φ⁻¹)² = 1."""
    z = special.ndtri(edges)
    density = np.exp(-0.5 * np.square(z)) / np.sqrt(2 * np.pi)
    widths = np.diff(edges)
    means = np.divide(-np.diff(density), widths, out=np.zeros(len(widths)), where=widths > 0)
    return means, max(0.0, 1.0 - float(np.sum(widths * np.square(means))))


def integral(f: Callable[[Points, Points], Points], edges: Points) -> float:
    """∫ f du over all cells."""
    return float(panels(f, edges).sum())


def panels(f: Callable[[Points, Points], Points], edges: Points) -> Points:
    """∫_cell f du for every cell, by Gauss-Legendre panels that are halved where they have not converged.

    Args:
        f: (levels (P, 8), cell numbers (P,)) -> values (P, 8).
        edges: (N + 1,).

    Raises:
        RuntimeError: no convergence after 52 halvings or two million panels, or values that are not finite, as for a
            law without the moment that is integrated.

    """
    left, right = edges[:-1], edges[1:]
    cell = np.arange(len(left))
    total = np.zeros(len(left))
    # Of absolute values: the cells of a symmetric law cancel.
    size = 0.0
    coarse = _gauss(f, left, right, cell)
    for _ in range(HALVINGS):
        if len(left) > LARGEST_PANELS or not np.isfinite(coarse).all():
            break
        middle = (left + right) / 2
        halves = np.concatenate([left, middle]), np.concatenate([middle, right])
        # In one call: a quantile function found by bisection costs the same for one level and for a thousand.
        lower, upper = np.split(_gauss(f, *halves, np.concatenate([cell, cell])), 2)
        fine = lower + upper
        scale = size + np.abs(lower).sum() + np.abs(upper).sum()
        done = np.abs(fine - coarse) <= PANEL_TOLERANCE * scale
        np.add.at(total, cell[done], fine[done])
        size += float(np.abs(lower[done]).sum() + np.abs(upper[done]).sum())
        if done.all():
            return total
        go = ~done
        left, right = np.concatenate([left[go], middle[go]]), np.concatenate([middle[go], right[go]])
        coarse, cell = np.concatenate([lower[go], upper[go]]), np.concatenate([cell[go], cell[go]])
    rest = float(np.abs(coarse).sum())
    if not np.isfinite(rest) or rest > 1e-9 * (size + rest):
        raise RuntimeError(
            f"a quantile integral did not converge (rest {rest:.2g}); does the law have the moment that is asked for?"
        )
    np.add.at(total, cell, coarse)
    return total


def _gauss(f: Callable[[Points, Points], Points], left: Points, right: Points, cell: Points) -> Points:
    width = right - left
    values: Points = width * (f(left[:, None] + width[:, None] * _NODES, cell) @ _NODE_WEIGHTS)
    return values


def _merged(x: Points, below_x: Points, y: Points, below_y: Points, power: float) -> float:
    """∫|Q_x - Q_y|^power over the common refinement of two step functions."""
    edges = np.union1d(below_x, below_y)
    masses = np.diff(edges, prepend=0.0)
    middle = edges - 0.5 * masses
    left = np.minimum(np.searchsorted(below_x, middle), len(x) - 1)
    right = np.minimum(np.searchsorted(below_y, middle), len(y) - 1)
    return float(np.sum(masses * np.abs(x[left] - y[right]) ** power))


def circular_cost(x: Points, p: Weights, y: Points, q: Weights, length: float, power: float = 2.0) -> float:
    """W^power on the circle of a given length: the best of all shifted monotone couplings.    (N,), (M,).

    With both measures unrolled along the line, C(θ) = ∫_0^1 |Q_x(u) - Q_y(u + θ)|^power du is convex in the shift θ of
    mass, and its minimum is W^power.

    Source: Delon, Salomon, Sobolevskii, Fast transport optimization for Monge costs on the circle (2010).
    """
    (x, p), (y, q) = ordered(np.mod(x, length), p), ordered(np.mod(y, length), q)
    below_x, below_y = levels(p)[1:], levels(q)[1:]
    turns = np.arange(-2, 3)
    unrolled = (y + length * turns[:, None]).ravel()
    unrolled_below = (below_y + turns[:, None]).ravel()

    def shifted(theta: float) -> float:
        left = max(0, int(np.searchsorted(unrolled_below, theta, "right")) - 1)
        right = int(np.searchsorted(unrolled_below, theta + 1, "left")) + 2
        return _window(x, below_x, unrolled[left:right], unrolled_below[left:right] - theta, power)

    if np.array_equal(below_x, below_y):
        # Equal masses meet in whole particles: an integer shift is optimal.
        n = len(x)
        if np.allclose(p, 1 / n):
            return _least(lambda k: shifted(k / n), -n, n)
    return _least_real(shifted, -1.0, 1.0)


def _window(x: Points, below_x: Points, y: Points, below_y: Points, power: float) -> float:
    """∫_0^1 |Q_x - Q_y|^power where y's levels cover (0, 1]."""
    inside = below_y[(below_y > 0) & (below_y < 1)]
    edges = np.union1d(below_x, inside)
    masses = np.diff(edges, prepend=0.0)
    middle = edges - 0.5 * masses
    left = np.minimum(np.searchsorted(below_x, middle), len(x) - 1)
    right = np.searchsorted(below_y, middle)
    return float(np.sum(masses * np.abs(x[left] - y[right]) ** power))


def _least(f: Callable[[int], float], low: int, high: int) -> float:
    """Minimum of a convex function on the integers low..high."""
    while high - low > 2:
        middle = (low + high) // 2
        if f(middle) <= f(middle + 1):
            high = middle + 1
        else:
            low = middle
    return min(f(k) for k in range(low, high + 1))


def _least_real(f: Callable[[float], float], low: float, high: float) -> float:
    """Minimum of a convex, piecewise linear function, by ternary search to rounding."""
    for _ in range(120):
        a, b = low + (high - low) / 3, high - (high - low) / 3
        if f(a) <= f(b):
            high = b
        else:
            low = a
    return f((low + high) / 2)


def sampling_cost(law: Law, n: int, cells: Cells | None = None) -> float:
    """E W₂²(m_N, m) of N independent points of a law: the square of the sampling floor.

    With K_N the Kantorovich operator, the Bernstein polynomial of the cell means of Q, E W₂² = 2 ∫ Q (Q - K_N Q) du,
    because E X_(i) is Q smoothed by the Beta(i, N + 1 - i) density. For large N it is (1/N) ∫ u(1-u) Q'(u)² du
    (Bobkov, Ledoux 2019) where that is finite. For large n the means may come from `cells`, such as `quick_cells`.
    """
    if isinstance(law, Gaussian):
        return float(law.cov[0, 0]) * _standard_sampling_cost(n)
    q = quantile(law)
    if cells is None or n < MANY:
        means, centre = even_cells(law, n)[0], _centre(law)
    else:
        means = cells(law, n)[0]
        centre = float(np.mean(means))
    return _kantorovich(lambda u: q(u) - centre, means - centre)


@lru_cache(maxsize=32)
def _standard_sampling_cost(n: int) -> float:
    return _kantorovich(lambda u: special.ndtri(np.minimum(u, 1 - 2.0**-53)), _standard_even_cells(n)[0])


def _kantorovich(q: Quantile, means: Points) -> float:
    """2 ∫ Q (Q - K_N Q) du, K_N Q interpolated on panels and Q integrated on them until converged, jumps and all."""
    edges = _resolved(len(means))
    left, width = edges[:-1], np.diff(edges)
    nodes = left[:, None] + width[:, None] * _NODES
    series = _smoothed(means, nodes.ravel()).reshape(nodes.shape) @ _TO_SERIES

    def integrand(u: Points, cell: Points) -> Points:
        place = 2 * (u - left[cell, None]) / width[cell, None] - 1
        smoothed = np.polynomial.legendre.legval(place, series[cell].T[..., None], tensor=False)
        values = q(u)
        product: Points = values * (values - smoothed)
        return product

    return max(0.0, 2 * integral(integrand, edges))


def _resolved(n: int) -> Points:
    """Edges of panels over (0, 1): no wider than two deviations √(u(1-u)/N) of K_N, graded to both ends."""
    # With u = sin²(θ) the deviation of K_N is 1/(2√N) in θ everywhere.
    even = np.sin(np.linspace(0.0, np.pi / 4, 2 + int(np.pi / 4 * np.sqrt(n)))) ** 2
    graded = 0.5 ** np.arange(14 + int(np.ceil(np.log2(n))), 1, -1.0)
    inner = np.union1d(even[1:-1], graded)
    inner = inner[np.diff(inner, append=0.5) > 1e-9 * inner]
    return np.concatenate([[0.0], inner, [0.5], 1 - inner[::-1], [1.0]])


def _smoothed(means: Points, u: Points) -> Points:
    """K_N Q (u) = Σ_k C(N-1, k) u^k (1-u)^{N-1-k} mean_k, over the ten deviations around (N-1)u.    (P,) -> (P,)."""
    n = len(means)
    reach = 10 + int(10 * np.sqrt(n / 4))
    span = min(n, 2 * reach + 1)
    first = np.clip(np.round((n - 1) * u).astype(int) - reach, 0, n - span)
    k = np.arange(n)
    choices = special.gammaln(n) - special.gammaln(k + 1) - special.gammaln(n - k)
    found = np.empty_like(u)
    rows = max(1, WINDOW_FLOATS // span)
    for start in range(0, len(u), rows):
        at = slice(start, start + rows)
        window = first[at, None] + np.arange(span)
        chance = window * np.log(u[at])[:, None] + (n - 1 - window) * np.log1p(-u[at])[:, None]
        chance = np.exp(chance + choices[window])
        found[at] = np.einsum("gk,gk->g", chance, means[window]) / chance.sum(1)
    return found
