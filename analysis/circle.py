"""W₂ between samples and laws on the circle, exact but for the shift of mass.

On a circle of length L, with the sample and the law unrolled along the line,

    W₂² = min_θ ∫_0^1 |Q_N(u) - Q(u + θ)|² du,    Q(u + 1) = Q(u) + L,

convex in the shift θ of mass. Over M equal cells of levels, M a multiple of N, the integral is exact for θ = k/M, and
the best of these is above the minimum by at most about ∫Q'²/4M², beside a floor of the order of ∫Q'²/N. An arc without
mass, where Q jumps, would make that L²/M: levels count from the middle of the emptiest one, where no mass crosses.
"""

from __future__ import annotations

import bisect
import math
from typing import Any

import numpy as np
import torch
from scipy import special
from torch import Tensor

from mfsde import Noise
from mfsde.measure import Law
from mfsde.noise import Stream

from . import limits, line

Points = np.ndarray
Weights = np.ndarray | None

FEWEST_CELLS, FINE_CELLS = 1 << 14, 1 << 16  # beside a sample and between two laws
ARCS = 4096  # of equal mass, among which the emptiest is looked for
SAMPLES = 64  # of a law, whose mean is its floor; that of a uniform law is known to 4 %
INVERTED = 8192  # levels of its distribution function that they are drawn from


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
        self._cells = line.remembered(lambda law, n: line.quick_cells(Unrolled(law, length), n))

    def cells(self, law: Law, n: int) -> tuple[Points, float]:
        """`line.quick_cells` of the unrolled law for n particles, a whole number of them for each.

        Raises:
            ValueError: the law lives on a line.

        """
        if limits.circles(law) is None:
            raise ValueError(
                "to_law: the run lives on a torus, where a law on the line has no distance to it. Pass a law with the "
                "run's period (mfsde.limit.GridLaw, a limit Dataset), or sample the law and use wasserstein.between."
            )
        means, within = self._cells(law, n * math.ceil(FEWEST_CELLS / n))
        return means, within

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


def cost(a: Law | tuple[Points, Weights], b: Law, length: float) -> float:
    """W₂² on the circle between a weighted sample (N,), (N,), or a law, and a law."""
    around = Circle(length)
    if isinstance(a, Law):
        gap = around.displacements(around.cells(a, FINE_CELLS)[0], around.cells(b, FINE_CELLS)[0])
        return float(gap @ gap) / len(gap)
    x, p = a
    means, within = around.cells(b, len(x))
    if p is not None:
        return line.circular_cost(x, p, means, None, length) + within
    gap = around.displacements(x, means)
    return float(gap @ gap) / len(gap) + within
