"""The Fokker-Planck operator on a grid: m ↦ -∇·(b m) + ½ ∇²:(a m) as the generator of a Markov chain on its nodes.

Between neighbouring nodes at distance h the flux that is constant and solves J = (b - ½a') m - ½ a m' is

    J = ½ a (B(-P) m_i - B(P) m_{i+1})/h,    P = ∫ (2b - a')/a dx,    B(z) = z/(e^z - 1),

the scheme of Scharfetter and Gummel, with a on the face, so that a node where σ vanishes holds nothing back. P is a
two-point Gauss rule, exact for constant a and forces that are cubic polynomials. Jump rates are non-negative and what
leaves one node arrives at another: solutions keep their sign and their mass. Where a constant a makes the equation a
gradient flow, discrete equilibria are e^{∫2b/a} at the nodes exactly. Second order in space where |P| is small; where
it is large, or a = 0, the scheme is the upwind one, of first order.

Source: Scharfetter, Gummel, IEEE Trans. Electron Devices 16 (1969); Chang, Cooper, J. Comput. Phys. 6 (1970); for
jumps along diagonals Kushner, Dupuis, Numerical Methods for Stochastic Control Problems in Continuous Time (1992),
§5.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.linalg import solve_banded
from scipy.sparse.linalg import splu

from ..measure import EmpiricalMeasure
from .coefficients import Coefficients
from .deposit import deposit
from .grid import Array, Axis, Grid

GAUSS = np.array([-1.0, 1.0]) / math.sqrt(12.0)  # nodes of the two-point rule, in units of the interval's length
FAR = 1e3  # a cell Péclet number that stands for every larger one
POLISHING, POLISH = (
    3,
    1e8,
)  # implicit steps that a null vector is polished by, and their length in units of the fastest rate
LEAST = 1e-30  # of the maximum: what a stationary density is at least, so that its logarithm exists
UNEVEN = 1e-6  # relative: gaps that differ more are not even
SLACK = 1e-9  # relative: a diagonal entry this far below the off-diagonal one is rounding


@dataclass(frozen=True)
class Jumps:
    """Rates at which mass jumps from nodes `source` to nodes `target`, all flat indices, (k,)."""

    source: Array
    target: Array
    rate: Array


class Generator:
    """d mass/dt = A mass at one time and law: A has non-negative entries off the diagonal and columns that sum to 0."""

    def __init__(self, size: int, jumps: list[Jumps]) -> None:
        self.size = size
        self.source = np.concatenate([j.source for j in jumps])
        self.target = np.concatenate([j.target for j in jumps])
        self.rate = np.concatenate([j.rate for j in jumps])

    def apply(self, mass: Array) -> Array:
        """A mass.    (n,) -> (n,)."""
        moved = self.rate * mass[self.source]
        gained: Array = np.bincount(self.target, moved, self.size) - np.bincount(self.source, moved, self.size)
        return gained

    def matrix(self) -> sparse.csc_array:
        """A, (n, n)."""
        rows, columns = np.append(self.target, self.source), np.append(self.source, self.source)
        return sparse.csc_array((np.append(self.rate, -self.rate), (rows, columns)), shape=(self.size, self.size))

    def implicit_step(self, mass: Array, dt: float) -> Array:
        """(1 - dt A)^{-1} mass: positive and of the same mass for every dt > 0, the inverse of an M-matrix."""
        if np.abs(self.source - self.target).max() == 1:
            return self._tridiagonal_step(mass, dt)
        system = sparse.eye_array(self.size, format="csc") - dt * self.matrix()
        solved: Array = np.maximum(splu(system.tocsc()).solve(mass), 0.0)
        return solved

    def _tridiagonal_step(self, mass: Array, dt: float) -> Array:
        bands = np.zeros((3, self.size))
        bands[1] = 1.0 + dt * np.bincount(self.source, self.rate, self.size)
        up = self.target > self.source
        # scipy's order: row 0 holds what stands above the diagonal, shifted to the right.
        bands[0, self.source[~up]] = -dt * self.rate[~up]
        bands[2, self.source[up]] = -dt * self.rate[up]
        solved: Array = np.maximum(solve_banded((1, 1), bands, mass, check_finite=False), 0.0)
        return solved


class FiniteVolumes:
    """The operator of a scenario on a grid.

    Args:
        coefficients: its drift and diffusion.
        grid: one or two axes.

    Raises:
        ValueError: σ = 0 everywhere; at use, a diffusion matrix that no positive scheme on this grid can hold.

    """

    def __init__(self, coefficients: Coefficients, grid: Grid) -> None:
        self.coefficients, self.grid = coefficients, grid
        self.size = math.prod(grid.shape)
        index = np.arange(self.size).reshape(grid.shape)
        self._sides = [_neighbours(index, axis, k) for k, axis in enumerate(grid.axes)]
        self._faces = [_gauss_points(grid, k) for k in range(grid.dim)]
        self._gaps = [_along(axis.gaps, grid, k) for k, axis in enumerate(grid.axes)]
        widths = [_along(axis.widths, grid, k) for k, axis in enumerate(grid.axes)]
        self._widths = [(w[i], w[j]) for w, (i, j) in zip(widths, self._sides, strict=True)]
        self.points = np.concatenate(self._faces)
        self._diagonals = _diagonals(index, grid) if coefficients.is_general and grid.dim == 2 else None
        self.inflow, self._source = 0.0, np.zeros(self.size)
        if coefficients.reinjection is not None:
            self.inflow, law = coefficients.reinjection
            self._source = deposit(law, grid).ravel()

    def generator(self, t: float, mass: Array, velocity: float = 0.0) -> Generator:
        """A(t, m), m the masses of the nodes, (n,), seen from nodes that move at `velocity`.

        One call of the scenario's drift (at the Gauss points of all faces) and one of its diffusion.
        """
        drift, spread = self.fields(t, self.grid.measure(mass.reshape(1, *self.grid.shape)))
        return self.assembled(drift - velocity, spread)

    def excess_rate(self, t: float, mass: Array) -> Array | None:
        """L = V - ∫ V dm at the nodes, (n,), for a scenario with births and deaths."""
        if not self.coefficients.has_birth_death:
            return None
        return self.coefficients.excess_rate(t, self.grid.measure(mass.reshape(1, *self.grid.shape)))

    def slope(self, t: float, mass: Array) -> Array:
        """A mass - L mass + rate (π - mass), the last for a reinjection from π: the rate of change of mass.    (n,)."""
        moved, rate = self.generator(t, mass).apply(mass), self.excess_rate(t, mass)
        return moved if rate is None else moved - rate * mass + self.inflow * (self._source - mass)

    def jacobian(self, t: float, mass: Array) -> sparse.csc_array:
        """The derivative of `slope` with the law inside the coefficients and the mean of V held fixed, (n, n)."""
        matrix, rate = self.generator(t, mass).matrix(), self.excess_rate(t, mass)
        return matrix if rate is None else (matrix - sparse.diags_array(rate + self.inflow)).tocsc()

    def step(self, t: float, mass: Array, dt: float) -> Array:
        """An implicit Euler step, then births and deaths as a mirror step: positive, of the same mass, for every dt."""
        moved = self.generator(t, mass).implicit_step(mass, dt)
        rate = self.excess_rate(t, moved)
        if rate is None:
            return moved
        # Relative to the smallest rate, so that no exponential overflows.
        grown = moved * np.exp(-dt * (rate - rate.min()))
        share = -math.expm1(-self.inflow * dt)
        reacted: Array = (1 - share) * grown * (moved.sum() / grown.sum()) + share * self._source
        return reacted

    def fields(self, t: float, mu: EmpiricalMeasure) -> tuple[Array, Array]:
        """All of the scenario that A depends on: b at the Gauss points of the faces, a at the nodes and there."""
        points = np.concatenate([self.grid.points, self.points])
        return self.coefficients.drift(t, self.points, mu), self.coefficients.covariance(t, points, mu)

    def assembled(self, drift: Array, spread: Array) -> Generator:
        """A from the values of `fields`."""
        jumps, diagonal = [], spread
        if spread.ndim == 3:
            diagonal = np.diagonal(spread, axis1=1, axis2=2)
        if self._diagonals is not None:
            crossed, diagonal = self._crossed(spread, diagonal)
            jumps += crossed
        at_nodes, rest = diagonal[: self.size], diagonal[self.size :]
        for k, (i, j) in enumerate(self._sides):
            faces = self._slice(k)
            b = drift[faces, k].reshape(len(GAUSS), -1)
            a = rest[faces, k].reshape(len(GAUSS), -1)
            jumps += self._across(k, i, j, b, a, at_nodes[:, k])
        return Generator(self.size, jumps)

    def peclet(self, t: float, mass: Array) -> float:
        """The largest over the axes of the mean of |P| over the mass: above two the scheme is upwind there."""
        drift, spread = self.fields(t, self.grid.measure(mass.reshape(1, *self.grid.shape)))
        diagonal = spread if spread.ndim == 2 else np.diagonal(spread, axis1=1, axis2=2)
        found = []
        for k, (i, j) in enumerate(self._sides):
            faces = self._slice(k)
            a = diagonal[self.size :][faces, k].reshape(len(GAUSS), -1)
            numbers = np.abs(self._exponents(k, i, j, drift[faces, k].reshape(a.shape), a, diagonal[: self.size, k]))
            shares = mass[i] + mass[j]
            found.append(float(shares @ np.where((a > 0).all(0), np.minimum(numbers, FAR), FAR) / shares.sum()))
        return max(found)

    def stationary(self, drift: Array, spread: Array) -> Array:
        """The logarithm of the density with A m = 0, up to a constant, (n,).

        On a line or interval the flux vanishes, and the logarithm is summed up from node to node; elsewhere m is the
        null vector of A.
        """
        if self.grid.dim == 1 and not self.grid.axes[0].is_circle:
            diagonal = spread if spread.ndim == 2 else np.diagonal(spread, axis1=1, axis2=2)
            a = diagonal[self.size :, 0].reshape(len(GAUSS), -1)
            if not (a > 0).all():
                raise ValueError(
                    f"{self.coefficients.name}: σ vanishes between nodes, and no stationary density is known there."
                )
            (i, j), b = self._sides[0], drift[:, 0].reshape(len(GAUSS), -1)
            rises = self._exponents(0, i, j, b, a, diagonal[: self.size, 0])
            summed: Array = np.concatenate([[0.0], np.cumsum(rises)])
            return summed
        chain = self.assembled(drift, spread)
        system = chain.matrix().tolil()
        system[0, :] = 1.0
        mass = np.maximum(splu(system.tocsc()).solve(np.eye(1, self.size)[0]), 0.0)
        # The null vector is known to rounding of its maximum; implicit steps know its tails.
        for _ in range(POLISHING):
            mass = chain.implicit_step(mass / mass.sum(), POLISH / float(chain.rate.max()))
        found: Array = np.log(np.maximum(mass, LEAST * mass.max()) / self.grid.widths.ravel())
        return found

    def _slice(self, k: int) -> slice:
        """Where the Gauss points of the faces across axis k stand among all."""
        first = sum(len(points) for points in self._faces[:k])
        return slice(first, first + len(self._faces[k]))

    def _across(self, k: int, i: Array, j: Array, b: Array, a: Array, at_nodes: Array) -> list[Jumps]:
        """Jumps between neighbours along axis k, from b and a at the Gauss points (2, faces) and a at the nodes."""
        gap, (from_i, from_j) = self._gaps[k], self._widths[k]
        noisy, strength = (a > 0).all(0), a.mean(0) / (2 * gap)
        peclet = self._exponents(k, i, j, b, a, at_nodes)
        # Without noise the flux is carried by the flow alone, from the node upstream.
        flow = b.mean(0) - (at_nodes[j] - at_nodes[i]) / (2 * gap)
        up = np.where(noisy, bernoulli(-peclet) * strength, np.maximum(flow, 0.0)) / from_i
        down = np.where(noisy, bernoulli(peclet) * strength, np.maximum(-flow, 0.0)) / from_j
        return [Jumps(i, j, up), Jumps(j, i, down)]

    def _exponents(self, k: int, i: Array, j: Array, b: Array, a: Array, at_nodes: Array) -> Array:
        """P = ∫ (2b - a')/a dx over the faces across axis k, (faces,); 0 where a vanishes."""
        force = 2 * b * self._gaps[k] - (at_nodes[j] - at_nodes[i])
        exponents: Array = np.divide(force, a, out=np.zeros_like(b), where=a > 0).mean(0)
        return exponents

    def _crossed(self, spread: Array, diagonal: Array) -> tuple[list[Jumps], Array]:
        """Jumps along the diagonals of cells for a_xy, and what they leave to the axes."""
        assert self._diagonals is not None
        hx, hy = (float(axis.gaps[0]) for axis in self.grid.axes)
        mixed = spread[:, 0, 1]
        left = diagonal - np.abs(mixed)[:, None] * np.array([hx / hy, hy / hx])
        if (left < -SLACK * np.abs(diagonal).max()).any():
            wanted = math.sqrt(float(diagonal[:, 0].max() / diagonal[:, 1].max()))
            raise ValueError(
                f"{self.coefficients.name}: the off-diagonal diffusion reaches {np.abs(mixed).max():.3g}, too much for "
                f"a positive scheme on cells of {hx:.3g} × {hy:.3g}. Take cells whose sides are in the ratio "
                f"{wanted:.3g} of the standard deviations, or turn the coordinates to the principal axes."
            )
        rate = np.abs(mixed[: self.size]) / (2 * hx * hy)
        jumps = []
        for sign, pairs in self._diagonals:
            share = np.where(np.sign(mixed[: self.size]) == sign, rate, 0.0)
            jumps += [Jumps(i, j, share[i]) for i, j in pairs]
        return jumps, np.maximum(left, 0.0)


def bernoulli(z: Array) -> Array:
    """B(z) = z/(e^z - 1), to rounding for every z."""
    small = np.abs(z) < 1e-5
    safe = np.where(small, 1.0, z)
    with np.errstate(over="ignore"):
        far = safe / np.expm1(safe)
    return np.where(small, 1.0 - z / 2 + z**2 / 12, far)


def _neighbours(index: Array, axis: Axis, k: int) -> tuple[Array, Array]:
    """Flat indices of the nodes on the low and on the high side of every face across axis k."""
    n = index.shape[k]
    low = index if axis.is_circle else index.take(range(n - 1), k)
    high = np.roll(index, -1, k) if axis.is_circle else index.take(range(1, n), k)
    return low.ravel(), high.ravel()


def _gauss_points(grid: Grid, k: int) -> Array:
    """Gauss points of all faces across axis k, (2 faces, d): first all at the lower one."""
    axis = grid.axes[k]
    middles = axis.nodes[: len(axis.gaps)] + axis.gaps / 2
    rows = []
    for share in GAUSS:
        lines = [middles + share * axis.gaps if q == k else other.nodes for q, other in enumerate(grid.axes)]
        rows.append(np.stack([m.ravel() for m in np.meshgrid(*lines, indexing="ij")], axis=-1))
    return np.concatenate(rows)


def _along(values: Array, grid: Grid, k: int) -> Array:
    """Values along axis k repeated over the grid's faces (or nodes), flat."""
    shape = [len(values) if q == k else n for q, n in enumerate(grid.shape)]
    expanded = values.reshape([-1 if q == k else 1 for q in range(grid.dim)])
    return np.broadcast_to(expanded, shape).ravel()


def _diagonals(index: Array, grid: Grid) -> list[tuple[float, list[tuple[Array, Array]]]]:
    """For either sign of a_xy the pairs (from, to) of nodes that its jumps join."""
    for axis in grid.axes:
        if np.ptp(axis.gaps) > UNEVEN * axis.gaps.mean():
            raise ValueError("an off-diagonal diffusion needs evenly spaced nodes on both axes; take numpy.linspace.")
    found = []
    places = np.indices(grid.shape)
    for sign in (1, -1):
        pairs = []
        for step in (1, -1):
            moved = [
                _folded(place + move, axis)
                for place, move, axis in zip(places, (step, sign * step), grid.axes, strict=True)
            ]
            pairs.append((index.ravel(), index[tuple(moved)].ravel()))
        found.append((float(sign), pairs))
    return found


def _folded(place: Array, axis: Axis) -> Array:
    """Places one step on: round a circle, and back from a wall, which reflects along its normal."""
    n = len(axis.nodes)
    if axis.is_circle:
        return place % n
    last = n - 1
    folded: Array = last - np.abs(last - np.abs(place))
    return folded
