"""Cell lists: the pairs of a kernel of compact support, found among neighbouring cells."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..torus import Period, period_lengths, shortest
from .kernel import Kernel, Pairs, Strategy

# Candidate pairs that are alive at once (a single row may have more).
CANDIDATES = 1 << 20

# Cells are wider than asked by this share: no rounding of a position hides a pair at the edge of the support.
SLACK = 2.0**-20

# Above, a position has no fraction of a cell left in float64.
FURTHEST = 2**60


@dataclass(frozen=True)
class Cells(Strategy):
    """Σ_j w_j K(x_i - y_j) over the 3^d cells around x_i, for K(z) = 0 where |z| ≥ support (Euclidean norm).

    Equal to the sum over all pairs up to rounding, deterministic on the CPU. Work and time O(M·n), n the number of
    atoms in 3^d cells; memory O(M + N). Cells follow the particles: an outlier costs nothing. On a torus a whole number
    of cells fills a period, and the shortest difference is the one that counts. Under automatic differentiation each
    block of rows is evaluated once more in the backward pass.

    Args:
        support: radius outside of which K vanishes. It is checked at sampled differences, once for each kernel: from
            the radius to ten times as far K must be below 64 roundings of its largest value inside.
        cell: side of a cell, at least the support (the default).

    Raises:
        ValueError: a radius that is not positive, a cell smaller than the support; when summing, d > 3, or a kernel
            that does not vanish outside of its support.

    References:
        R. W. Hockney, J. W. Eastwood, Computer Simulation Using Particles (1981), § 8.4 (linked cells).

    """

    support: float
    cell: float | None = None

    exact: ClassVar[bool] = True
    differentiable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.support) and self.support > 0):
            raise ValueError(f"Cells: support = {self.support!r}; expected the radius outside of which K(z) = 0, > 0.")
        if self.cell is not None and not (math.isfinite(self.cell) and self.cell >= self.support):
            raise ValueError(
                f"Cells: support larger than the cell ({self.support:g} > {self.cell:g}): pairs would be missed beyond "
                "the neighbouring cells. Leave cell out, or make it at least the support."
            )

    def sums(self, kernel: Kernel, pairs: Pairs) -> Tensor:
        """(R, M, *out)."""
        replicas, m, d = pairs.x.shape
        if d > 3:
            raise ValueError(
                f"Cells: dimension {d}: each cell has 3^{d} = {3**d} neighbours, most of which hold no particle. Cell "
                'lists serve d <= 3; use strategy="exact".'
            )
        _check_support(kernel, self.support, pairs)
        cells = _Cells(pairs, (self.cell or self.support) * (1 + SLACK))
        x, y = _columns(pairs.x, cells.rows), _columns(pairs.points, cells.atoms)
        weights = pairs.weights.reshape(-1).index_select(0, cells.atoms)
        block = functools.partial(_sum, kernel, self.support, pairs.period, cells)
        if _has_graph(kernel, pairs):
            from torch.utils.checkpoint import checkpoint

            block = functools.partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
        parts = [block(rows, *x, *y, weights) for rows in cells.chunks()]
        total = torch.cat(parts).index_select(0, cells.rows.argsort())
        return total.reshape(replicas, m, *total.shape[1:])


class _Cells:
    """Rows x and atoms y of all replicas sorted by cell, and for each cell the stretches of atoms around it.

    rows, atoms: the sorted order. `own`: for each sorted row the place of the atom left out, -1 where none is.
    """

    def __init__(self, pairs: Pairs, side: float) -> None:
        x, y = pairs.x.detach(), pairs.points.detach()
        device = x.device
        n_rows, n_atoms = x.shape[1], y.shape[1]
        lengths = period_lengths(_rounded(pairs.period, x), x.shape[-1])
        coordinates = [_coordinates(x[..., k], y[..., k], p, side) for k, p in enumerate(lengths)]
        coordinates = _in_few_bits(coordinates, x.shape[0])
        row_cells, atom_cells = _keys(coordinates, x.shape[0])

        self.rows = row_cells.argsort(stable=True)
        atom_cells, self.atoms = atom_cells.sort(stable=True)
        occupied, self._cell = torch.unique_consecutive(row_cells[self.rows], return_inverse=True)
        low, high = _neighbourhoods(occupied, coordinates)
        self._first = torch.searchsorted(atom_cells, low)
        self._count = torch.searchsorted(atom_cells, high, right=True) - self._first
        self._reached = self._count.sum(1)[self._cell].cumsum(0)

        self.own: Tensor | None = None
        if pairs.own is not None:
            replica = torch.arange(x.shape[0], device=device).unsqueeze(1)
            atom = (pairs.own + n_atoms * replica).expand(-1, n_rows).reshape(-1)
            self.own = self.atoms.argsort()[atom[self.rows]]

    def chunks(self) -> Iterator[slice]:
        """Stretches of sorted rows with at most CANDIDATES candidates, or of a single row."""
        start, n = 0, len(self.rows)
        while start < n:
            before = int(self._reached[start - 1]) if start else 0
            stop = int(torch.searchsorted(self._reached, before + CANDIDATES, right=True))
            stop = max(stop, start + 1)
            yield slice(start, stop)
            start = stop

    def candidates(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Sorted row, and sorted atom of a neighbouring cell, of every candidate pair."""
        cell = self._cell[rows]
        count = self._count[cell].reshape(-1)
        stretch = torch.arange(len(count), device=count.device).repeat_interleave(count)
        shift = self._first[cell].reshape(-1) - (count.cumsum(0) - count)
        j = shift.index_select(0, stretch).add_(torch.arange(len(stretch), device=count.device))
        return stretch.div_(self._count.shape[1], rounding_mode="floor").add_(rows.start), j


def _has_graph(kernel: Kernel, pairs: Pairs) -> bool:
    """Whether the sums require a gradient; parameters that the kernel closes over may, too."""
    if not torch.is_grad_enabled():
        return False
    inputs = (pairs.x, pairs.points, pairs.weights)
    return any(z.requires_grad for z in inputs) or kernel(pairs.x[:1, :1]).requires_grad


def _sum(kernel: Kernel, support: float, period: Period, cells: _Cells, rows: slice, *sorted_inputs: Tensor) -> Tensor:
    """The sums of some sorted rows, from the components of sorted x and y, and weights.    (rows, *out)."""
    d = len(sorted_inputs) // 2
    x, y, weights = sorted_inputs[:d], sorted_inputs[d:-1], sorted_inputs[-1]
    with torch.no_grad():
        # Most candidates of a cell lie outside of the support: the kernel need not see them.
        i, j = cells.candidates(rows)
        z = _differences(x, y, i, j, period)
        near = sum((c.square() for c in z[1:]), z[0].square()) <= support**2 * (1 + 1e-4)
        if cells.own is not None:
            near &= cells.own.index_select(0, i) != j
        kept = near.nonzero().squeeze(1)
        i, j = i.index_select(0, kept), j.index_select(0, kept)
    values = kernel(torch.stack(_differences(x, y, i, j, period), -1))
    values = values * weights.index_select(0, j).reshape((-1,) + (1,) * (values.ndim - 1))
    total = values.new_zeros((rows.stop - rows.start, *values.shape[1:]))
    return total.index_add(0, i - rows.start, values)


def _differences(x: Sequence[Tensor], y: Sequence[Tensor], i: Tensor, j: Tensor, period: Period) -> list[Tensor]:
    # Component by component: gathering rows of two or three numbers is several times slower.
    z = [a.index_select(0, i) - b.index_select(0, j) for a, b in zip(x, y, strict=True)]
    if period is None:
        return z
    lengths = period_lengths(period, len(z))
    return [c if math.isinf(p) else shortest(c.unsqueeze(-1), p).squeeze(-1) for c, p in zip(z, lengths, strict=True)]


def _columns(x: Tensor, order: Tensor) -> list[Tensor]:
    """The components of sorted positions, (R, N, d) -> d times (R N,)."""
    return [c.index_select(0, order) for c in x.reshape(-1, x.shape[-1]).unbind(-1)]


# Coordinates of cells -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Axis:
    """Cells along one component: coordinates of x and y in {0, ..., extent - 1}; `turns` on a torus."""

    x: Tensor
    y: Tensor
    extent: int
    turns: bool


def _rounded(period: Period, x: Tensor) -> Period:
    """The period in the dtype of the positions, as differences see it."""
    if period is None:
        return None
    return [float(x.new_tensor(p)) for p in period_lengths(period, x.shape[-1])]


def _coordinates(x: Tensor, y: Tensor, period: float, side: float) -> _Axis:
    if math.isfinite(period):
        n = max(1, math.floor(period / side))
        # The remainder of a small negative number rounds to the period itself: the last cell and the first touch.
        turned = (torch.remainder(c.double(), period) * (n / period) for c in (x, y))
        on_x, on_y = (c.nan_to_num(0).long().clamp(0, n - 1) for c in turned)
        return _Axis(on_x, on_y, n, turns=True)
    # Division with floor takes an exact remainder: no position is put into a wrong cell, however far out.
    at = (torch.div(c.double(), side, rounding_mode="floor") for c in (x, y))
    return _line(*(c.nan_to_num(0).clamp(-FURTHEST, FURTHEST).long() for c in at))


def _line(x: Tensor, y: Tensor) -> _Axis:
    """Coordinates on a line that start at 1 and leave the last free: a neighbour is never a cell of the next row."""
    low = int(torch.minimum(x.min(), y.min())) - 1
    high = int(torch.maximum(x.max(), y.max())) + 1
    return _Axis(x - low, y - low, high - low + 1, turns=False)


def _in_few_bits(axes: list[_Axis], replicas: int) -> list[_Axis]:
    """Axes whose product of extents fits an integer: where it does not, empty stretches are cut out.

    Raises:
        ValueError: particles in so many rows of cells that it does not fit even so.

    """
    if replicas * math.prod(a.extent for a in axes) >= 2**62:
        axes = [a if a.turns else _without_gaps(a) for a in axes]
    cells = replicas * math.prod(a.extent for a in axes)
    if cells >= 2**62:
        raise ValueError(f"Cells: {cells:.3g} cells, more than an integer can count. Give a larger cell.")
    return axes


def _without_gaps(axis: _Axis) -> _Axis:
    """An axis where more than one empty cell in a row is one empty cell; neighbours stay neighbours, and no others."""
    found, place = torch.unique(torch.cat([axis.x.reshape(-1), axis.y.reshape(-1)]), return_inverse=True)
    steps = found.diff(prepend=found[:1]).clamp(max=2)
    at = steps.cumsum(0)[place]
    x, y = at[: axis.x.numel()].reshape(axis.x.shape), at[axis.x.numel() :].reshape(axis.y.shape)
    return _line(x, y)


def _keys(axes: list[_Axis], replicas: int) -> tuple[Tensor, Tensor]:
    """One number for each cell of each replica, of every row and every atom."""
    replica = torch.arange(replicas, device=axes[0].x.device).unsqueeze(1)
    x, y = replica.expand_as(axes[0].x), replica.expand_as(axes[0].y)
    for axis in axes:
        x, y = x * axis.extent + axis.x, y * axis.extent + axis.y
    return x.reshape(-1), y.reshape(-1)


def _neighbourhoods(cells: Tensor, axes: list[_Axis]) -> tuple[Tensor, Tensor]:
    """First and last number of each stretch of neighbouring cells, (n, stretches) each.

    Along the last component three cells in a row are one stretch, except on a torus, where they may be parted.
    """
    shifts, stride = [], 1
    for k, axis in reversed(list(enumerate(axes))):
        if axis.turns:
            c = cells // stride % axis.extent
            # With one or two cells in a period both neighbours are the same one: it is visited once.
            around = {1: (0,), 2: (0, 1)}.get(axis.extent, (-1, 0, 1))
            shifts.append([((c + s) % axis.extent - c) * stride for s in around])
        elif k == len(axes) - 1:
            shifts.append([torch.zeros_like(cells)])
        else:
            shifts.append([torch.full_like(cells, s * stride) for s in (-1, 0, 1)])
        stride *= axis.extent
    middle = torch.stack([cells + sum(shift) for shift in itertools.product(*shifts)], 1)
    reach = 0 if axes[-1].turns else 1
    return middle - reach, middle + reach


# The declared support -------------------------------------------------------------------------------------------------


@torch.no_grad()
def _check_support(kernel: Kernel, support: float, pairs: Pairs) -> None:
    """Refuse a kernel that does not vanish at sampled differences outside of its support."""
    x = pairs.x
    d = x.shape[-1]
    case = (support, x.dtype, None if pairs.period is None else tuple(period_lengths(pairs.period, d)))
    known: set[object] = kernel.facts(x).setdefault("vanishes", set())
    if case in known:
        return
    directions = _directions(d).to(x)
    inside = torch.linspace(0.05, 0.95, 19, dtype=x.dtype, device=x.device)
    outside = torch.logspace(0, 1, 65, dtype=x.dtype, device=x.device) * (1 + 64 * torch.finfo(x.dtype).eps)
    scale = float(_sizes(kernel, (support * inside)[:, None, None] * directions, pairs.period).nan_to_num(0).max())
    z = shortest((support * outside)[:, None, None] * directions, pairs.period)
    # On a torus the way round the other side may be shorter than the support.
    z = z[z.norm(dim=-1) >= support]
    sizes = _sizes(kernel, z, pairs.period)
    wrong = ~(sizes <= 64 * torch.finfo(x.dtype).eps * scale)
    if bool(wrong.any()):
        k = int(wrong.long().argmax())
        raise ValueError(
            f"Cells: {kernel.name} does not vanish outside of its support {support:g}: |K(z)| = {float(sizes[k]):.3g} "
            f"at |z| = {float(z[k].norm()):.6g} (Euclidean), z = {[round(c, 6) for c in z[k].tolist()]}. Declare the "
            'radius from which on K is 0, or use strategy="exact".'
        )
    known.add(case)


def _sizes(kernel: Kernel, z: Tensor, period: Period) -> Tensor:
    """|K(z)|, its largest component.    (..., d) -> (n,)."""
    z = shortest(z, period).reshape(-1, z.shape[-1])
    values = kernel(z).abs()
    return values.reshape(len(z), -1).amax(1) if len(z) else values.new_zeros(0)


def _directions(d: int) -> Tensor:
    """Unit vectors: to the neighbours in the lattice, and twelve others.    (n, d)."""
    lattice = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)] * d).reshape(-1, d)
    others = torch.randn(12, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = torch.cat([lattice[lattice.norm(dim=-1) > 0], others])
    unit: Tensor = z / z.norm(dim=-1, keepdim=True)
    return unit
