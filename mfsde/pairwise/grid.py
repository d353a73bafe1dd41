"""Smooth kernels on a grid: spread the masses, multiply Fourier transforms, interpolate; d = 1, 2, line or torus.

K(x - y) ≈ Σ_{a,b} φ_a(x) c(g_a - g_b) φ_b(y) with cardinal B-splines φ of even order p at nodes g_a = a·h, and c the
kernel on differences of nodes after the filter P(ω)² in each component,

    P(ω) = (1 + γ (2 sin ω/2)^p) / Σ_k φ(k) e^{-iωk},    γ = |B_p| / p!    (B_p: Bernoulli's number).

1/Σ_k φ(k) e^{-iωk} alone interpolates; the factor makes P φ̂ = 1 + O(ω^{p+2}), so that what is left of an interpolation
error is its alias, which averages to zero over the position within a cell. c is Toeplitz, circulant on a torus: FFTs
with zero padding on lines and none on circles. Splines: Schoenberg 1946; the filters: Unser, Aldroubi & Eden, IEEE
Trans. Signal Process. 41 (1993); particles, meshes and B-splines: Hockney & Eastwood 1981, Essmann et al. 1995.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..torus import period_lengths, shortest
from .kernel import Kernel, Pairs, Strategy

# Padded nodes of one replica's grid: 2048 × 2048.
MOST_NODES = 1 << 22

# The spacing is found so that the measured error is this factor below the tolerance.
MARGIN = 2.0

# Spacings are searched for between 2^-20 and 2^20, in quarter octaves.
OCTAVES = 20

# Differences sampled in each octave of distances.
SAMPLE = 64

# Distances at which the error is looked at, in spacings, in one and in two dimensions: the largest boxes hold no more.
FAR = {1: 1 << 21, 2: 1 << 12}

# Chords of each octave are halved this often in double precision where K is rough: a length that remains is a jump.
HALVINGS = 36

# Of rough pieces at most this many are kept in an octave.
PIECES = 512

# Particles whose stencils are formed at once: they stay in the processor's cache.
BLOCK = 1 << 14

# Stencils of a cloud are kept between spreading and interpolation up to this many nodes (24 MiB).
KEPT_NODES = 1 << 21

# Transforms kept for one kernel: the box of a moving cloud changes among a few sizes.
KEPT = 8


@dataclass(frozen=True)
class Grid(Strategy):
    """Σ_j w_j K(x_i - y_j) for smooth K in d <= 2 by a grid and FFTs: O((N + M) p^d + G log G), G nodes.

    The error contract. `tolerance` bounds the relative root mean square error of K̂(x, y) against K(x - y) over the
    differences in every ball |z| <= ρ, ρ >= spacing, for all positions relative to the nodes. The spacing is the
    largest (a power of 2^(1/4)) for which this holds with a margin of 2, measured once per kernel on fixed random
    differences of all lengths from 2^-20 to 2^20, and on more of them where halving random chords finds K rough: a
    function of kernel, parameters, dimension and period, never of the particles, so that a resumed run finds the same.
    A given spacing is measured too. Kinks cost spacing; a jump whose height, relative to K's root mean square up to
    there, is above the tolerance has no spacing and is refused. `Interaction.error` measures the error of a drift.

    What this does not cover. Particles whose differences prefer the places where K is rough (two clusters at the
    distance of a kink) see the error there, not its mean over the ball. A cloud that has collapsed below the spacing
    loses relative accuracy; give a `spacing` then. The sum of all may cancel where single pairs do not. Features that
    64 chords in each octave of distances do not meet, within a small sector of the plane, say, or of values that
    agree at 4 (p + 1) points of each, stay unseen, and lengths below 2^-20 or above 2^20 are not looked at: choose
    units of the kernel's size.

    In the plane the box follows the particles at each step, with nodes at whole multiples of the spacing: its size
    changes rounding only. On CUDA this reads the extent back to the host, and the order of additions, hence
    the rounding, varies from call to call; on a CPU results depend neither on the number of threads nor on
    the call. A term left out (`own`) is subtracted as the grid sees it, w_i K̂(x_i, x_i); it is zero for odd K.

    Derivatives in x, points, weights and K's parameters are those of the interpolated sums, C^(p-2) in x; they carry
    an error of one order less, several times the tolerance. Vector kernels ∇W are interpolated as they are: the
    error is smaller than that of the derivative of an interpolated W, and forces of odd kernels add up to zero.
    Build the `Kernel` once: what is known of it is kept with the object (`Kernel.facts`).

    Args:
        tolerance: relative error, in [1e-10, 0.1] and at least 64 roundings of the particles' dtype.
        order: p, the number of nodes per component that a particle touches: 4, 6 or 8; chosen from the tolerance if
            None.
        spacing: h, in the units of x, instead of the search. On a torus the next one that divides the period.

    Raises:
        ValueError: parameters out of range; in `sums`: d > 2, K(0) not finite, a kernel that does not act entry by
            entry, jumps, is not smooth at the tolerance or has no length scale, a given spacing with an error above
            the tolerance, particles too far apart for a grid.

    """

    tolerance: float = 1e-3
    order: int | None = None
    spacing: float | None = None

    exact: ClassVar[bool] = False
    differentiable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 1e-10 <= self.tolerance <= 0.1:
            raise ValueError(f"Grid: tolerance = {self.tolerance!r} is not a relative error in [1e-10, 0.1].")
        if self.order not in (None, 4, 6, 8):
            raise ValueError(f"Grid: order = {self.order!r}; expected 4, 6, 8, or None to have it chosen.")
        if self.spacing is not None and not (0 < self.spacing < math.inf):
            raise ValueError(f"Grid: spacing = {self.spacing!r}; expected a positive length, or None to have it found.")

    @property
    def nodes(self) -> int:
        """p: the order, or the one that suits the tolerance."""
        if self.order is not None:
            return self.order
        return 4 if self.tolerance >= 3e-4 else 6 if self.tolerance >= 1e-5 else 8

    def spacing_for(self, kernel: Kernel, like: Tensor, period: Any = None) -> float:
        """The spacing h of this kernel for particles like these, (..., d) of a dtype and device.

        Raises:
            ValueError: see the class.

        """
        return _plan(self, kernel, like, tuple(period_lengths(period, like.shape[-1]))).spacing

    def sums(self, kernel: Kernel, pairs: Pairs) -> Tensor:
        """(R, M, *out)."""
        x, points = pairs.x, pairs.points
        if points.shape[-1] > 2:
            raise ValueError(
                f'Grid: d = {points.shape[-1]}, and a grid of nodes suits d <= 2. Use strategy="exact", or '
                "random features (Fourier) for a positive definite kernel."
            )
        if self.tolerance < 64 * torch.finfo(points.dtype).eps:
            raise ValueError(
                f"Grid: tolerance = {self.tolerance:.3g} is below what sums in {points.dtype} are rounded to. Use "
                f"float64, or a tolerance of at least {64 * torch.finfo(points.dtype).eps:.1g}."
            )
        plan = _plan(self, kernel, points, tuple(period_lengths(pairs.period, points.shape[-1])))
        box = plan.box([points] if _is_same(x, points) else [points, x])
        if box is None:
            return x.new_full((*x.shape[:2], *plan.out), math.nan)
        transform = plan.transform(kernel, box, points)
        memory = _memory_for(x, points, pairs.weights, transform)
        stencils = _Stencils(points, box, memory)
        field = _field(_spread(stencils, pairs.weights, box), transform, box)
        sums = _interpolate(stencils if _is_same(x, points) else _Stencils(x, box, memory), field)
        sums = sums.reshape(len(field), *x.shape[:2]).movedim(0, -1).reshape(*x.shape[:2], *plan.out)
        if pairs.own is None or plan.is_odd:
            return sums
        own = pairs.weights[:, pairs.own]
        return sums - own.reshape(own.shape + (1,) * len(plan.out)) * _at_itself(x, transform, box).reshape(sums.shape)


# The grid -------------------------------------------------------------------------------------------------------------


class _Box(NamedTuple):
    """One replica's nodes, per component: h, number (padded on lines), first one. guard: nodes beyond those in use."""

    spacing: tuple[float, ...]
    sizes: tuple[int, ...]
    first: tuple[int, ...]
    is_periodic: tuple[bool, ...]
    order: int
    guard: int


@dataclass(eq=False)
class _Plan:
    """What is known of a kernel: its spacing, the shape of its values, K(-z) = -K(z), transforms of its last boxes."""

    strategy: Grid
    spacing: float
    lengths: tuple[float, ...]
    out: tuple[int, ...]
    is_odd: bool
    transforms: dict[Any, Tensor]

    def box(self, clouds: Sequence[Tensor]) -> _Box | None:
        """That holds all points; None where they are not finite, so that sums are NaN like exact ones."""
        order, guard = self.strategy.nodes, _guard(self.strategy.nodes, self.strategy.tolerance)
        spacing, sizes, first = [], [], []
        for i, length in enumerate(self.lengths):
            if math.isfinite(length):
                n = _smooth(math.ceil(length / self.spacing - 1e-9))
                spacing.append(length / n)
                sizes.append(n)
                first.append(0)
                continue
            ends = [[float(end) for end in torch.aminmax(z[..., i].detach())] for z in clouds]
            low, high = min(e[0] for e in ends), max(e[1] for e in ends)
            if not (math.isfinite(low) and math.isfinite(high)):
                return None
            if max(-low, high) / self.spacing * torch.finfo(clouds[0].dtype).eps > 0.1:
                raise ValueError(
                    f"Grid: positions up to {max(-low, high):.3g} are rounded too coarsely in {clouds[0].dtype} to be "
                    f"placed within cells of {self.spacing:.3g}. Move the origin to the particles, or use float64."
                )
            # The device may round a quotient otherwise than the host: one more node on each side.
            start = math.floor(low / self.spacing) - order // 2
            n = math.floor(high / self.spacing) + order // 2 + 2 - start
            spacing.append(self.spacing)
            sizes.append(_smooth(2 * (n + guard)))
            first.append(start)
        if math.prod(sizes) > MOST_NODES:
            raise ValueError(
                f"Grid: particles that need {' × '.join(map(str, sizes))} nodes at spacing {self.spacing:.3g}, padding "
                f'included; at most {MOST_NODES} are taken. A few outliers may spread the box: use strategy="exact", '
                "a larger tolerance or spacing, or a confinement that keeps particles together."
            )
        is_periodic = tuple(math.isfinite(length) for length in self.lengths)
        return _Box(tuple(spacing), tuple(sizes), tuple(first), is_periodic, order, guard)

    def transform(self, kernel: Kernel, box: _Box, like: Tensor) -> Tensor:
        """Fourier transform of c on the differences of nodes, (out, 1, ...)."""
        if torch.is_grad_enabled() and _has_parameters(kernel, like):
            return _transform(kernel, box, self.lengths, like)
        found = self.transforms.pop(box.sizes, None)
        if found is None:
            with torch.no_grad():
                found = _transform(kernel, box, self.lengths, like)
        self.transforms[box.sizes] = found
        while len(self.transforms) > KEPT:
            del self.transforms[next(iter(self.transforms))]
        return found


def _plan(strategy: Grid, kernel: Kernel, like: Tensor, lengths: tuple[float, ...]) -> _Plan:
    facts = kernel.facts(like)
    key = (strategy, lengths, like.dtype, like.device)
    if key not in facts:
        with torch.no_grad():
            out, is_odd = _checked(kernel, like, lengths)
            spacing = _spacing(_Measure(strategy, kernel, _precise(kernel, like), lengths))
        facts[key] = _Plan(strategy, spacing, lengths, out, is_odd, {})
    plan: _Plan = facts[key]
    return plan


def _has_parameters(kernel: Kernel, like: Tensor) -> bool:
    """Whether K's values are functions of tensors that require gradients, other than z."""
    z = like.new_zeros(1, like.shape[-1]).requires_grad_()
    with torch.enable_grad():
        values = kernel(z)
    if values.grad_fn is None:
        return values.requires_grad and values is not z
    pending, seen = [values.grad_fn], {values.grad_fn}
    while pending:
        node = pending.pop()
        if getattr(node, "variable", z) is not z:
            return True
        new = {following for following, _ in node.next_functions if following is not None} - seen
        pending += new
        seen |= new
    return False


def _transform(kernel: Kernel, box: _Box, lengths: Sequence[float], like: Tensor) -> Tensor:
    axes = []
    for i, (h, n) in enumerate(zip(box.spacing, box.sizes, strict=True)):
        lag = torch.arange(-(n // 2), n // 2 + 1, dtype=torch.float64)
        axes.append(h * (lag if box.is_periodic[i] else _levelled(lag, n / 2, box.guard)))
    z = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).to(like)
    values = kernel(shortest(z, lengths))
    if not bool(torch.isfinite(values.detach()).all()):
        raise ValueError(
            f"Grid: {kernel.name} is not finite at some differences in the box of the particles (|z| <= "
            f'{float(z.detach().norm(dim=-1).max()):.3g}). Write K so that it is finite there, or use strategy="exact".'
        )
    d = len(box.sizes)
    for i, n in enumerate(box.sizes):
        if n % 2 == 0:
            # Half a turn is reached from both sides: their mean keeps odd kernels odd.
            ends = (values.narrow(i, 0, 1) + values.narrow(i, n, 1)) / 2
            values = torch.cat([ends, values.narrow(i, 1, n - 1)], i)
    values = torch.fft.ifftshift(values.reshape(*box.sizes, -1).movedim(-1, 0), dim=tuple(range(-d, 0)))
    found: Tensor = torch.fft.rfftn(values, dim=tuple(range(-d, 0)))
    for i, n in enumerate(box.sizes):
        filtered = _filter(box.order, n)[: found.shape[i + 1]].square().to(like)
        found = found * filtered.reshape(-1, *(1,) * (d - 1 - i))
    return found.unsqueeze(1)


def _levelled(lag: Tensor, end: float, guard: int) -> Tensor:
    """Differences of nodes, twice differentiable and flat where the circle is cut, at `end`.

    The lags beyond those in use, all below end - guard, only keep the cut away from them; a kernel must not grow
    there. The same for all clouds that share a number of nodes, whose transform is kept.
    """
    start = end - guard / 2
    s = ((lag.abs() - start) / (end - start)).clamp(0, 1)
    return torch.where(s > 0, start + (end - start) * (s - s**3 + s**4 / 2), lag.abs()) * lag.sign()


def _field(masses: Tensor, transform: Tensor, box: _Box) -> Tensor:
    """Sums over nodes, c * masses.    (R, *nodes) -> (out, R·nodes)."""
    dims = tuple(range(-len(box.sizes), 0))
    product = torch.fft.rfftn(masses, dim=dims) * transform
    field: Tensor = torch.fft.irfftn(product, s=box.sizes, dim=dims)
    return field.flatten(1)


def _smooth(n: int) -> int:
    """The smallest 2^a 3^b 5^c >= n: lengths that FFTs are fast for."""
    while True:
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 1


# Particles and nodes --------------------------------------------------------------------------------------------------


class _Stencils:
    """The p^d nodes around each particle and their weights, (p^d, B) and (p^d, B), block by block of all replicas."""

    def __init__(self, x: Tensor, box: _Box, memory: _Memory | None) -> None:
        self.x = x.reshape(-1, x.shape[-1])
        self.box = box
        self.memory = memory
        self.per_replica = x.shape[1]
        self._spacing, self._first = (x.new_tensor(v).unsqueeze(1) for v in (box.spacing, box.first))
        self._keeps = len(self.x) * box.order ** len(box.sizes) <= KEPT_NODES
        self._blocks: dict[int, tuple[Tensor, Tensor]] = {}

    def __iter__(self) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """Rows, the grids of their replicas, nodes numbered from the first of these, weights."""
        grid = math.prod(self.box.sizes)
        for start in range(0, len(self.x), BLOCK):
            rows = slice(start, start + BLOCK)
            nodes, weights = self._blocks.get(start) or self._block(rows)
            if self._keeps:
                self._blocks[start] = nodes, weights
            last = min(rows.stop, len(self.x)) - 1
            grids = slice(start // self.per_replica * grid, (last // self.per_replica + 1) * grid)
            yield rows, grids, nodes, weights

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor | None:
        """Memory for the result of an operation; None where it allocates its own."""
        return None if self.memory is None else self.memory.take(name, shape, dtype or self.x.dtype)

    def _block(self, rows: slice) -> tuple[Tensor, Tensor]:
        box, place = self.box, rows.start if self._keeps else 0
        at = self.x[rows].T / self._spacing
        d, n = at.shape
        shape = (box.order,) * d + (n,)
        nodes = self._nodes(at.detach().floor() - self._first, self.take(f"nodes {place}", shape, torch.int64))
        if len(self.x) > self.per_replica:
            replica = torch.arange(rows.start, rows.start + n, device=at.device) // self.per_replica
            nodes += (replica - rows.start // self.per_replica) * math.prod(box.sizes)
        if d == 1:
            weights = _weights(at, box.order, self.take(f"weights {place}", (box.order, 1, n)))
            return nodes, weights[:, 0]
        each = _weights(at, box.order, self.take("weights of components", (box.order, d, n)))
        out = self.take(f"weights {place}", shape)
        return nodes.flatten(0, 1), torch.mul(each[:, 0].unsqueeze(1), each[:, 1], out=out).flatten(0, 1)

    def _nodes(self, cells: Tensor, out: Tensor | None) -> Tensor:
        """Numbers of the nodes around cells, (d, B) -> (p, B) or (p, p, B)."""
        sizes, p = self.box.sizes, self.box.order
        offsets = torch.arange(1 - p // 2, 1 + p // 2, device=cells.device).unsqueeze(1)
        if any(self.box.is_periodic):
            each = [(cell.long() + offsets).remainder_(n) for cell, n in zip(cells, sizes, strict=True)]
            return each[0] if len(each) == 1 else torch.add(each[0].mul_(sizes[1]).unsqueeze(1), each[1], out=out)
        if len(sizes) == 1:
            return torch.add(cells[0].long(), offsets, out=out)
        # Below 2^24, so exact in single precision too.
        numbers = torch.add(cells[1], cells[0], alpha=sizes[1]).long()
        return torch.add(numbers, offsets.unsqueeze(1) * sizes[1] + offsets, out=out)


def _weights(at: Tensor, p: int, out: Tensor | None = None) -> Tensor:
    """φ at the p nodes around positions in units of the spacing, by Horner's rule.    (d, B) -> (p, d, B)."""
    within = at - at.detach().floor()
    c = _pieces_like(p, at.dtype, at.device)
    weights = torch.addcmul(c[-2], c[-1], within, out=out)
    for k in range(p - 3, -1, -1):
        weights = torch.addcmul(c[k], weights, within, out=out)
    return weights


def _spread(stencils: _Stencils, masses: Tensor, box: _Box) -> Tensor:
    """Σ_j w_j φ_a(y_j).    (R, *nodes)."""
    masses = masses.reshape(-1)
    total = masses.new_zeros(len(masses) // stencils.per_replica * math.prod(box.sizes))
    for rows, grids, nodes, weights in stencils:
        shares = torch.mul(weights, masses[rows], out=stencils.take("values", tuple(weights.shape)))
        if grids.stop - grids.start > nodes.numel():
            total[grids].scatter_add_(0, nodes.flatten(), shares.flatten())
        else:
            # A node that collects the masses of all blocks one by one loses digits.
            part = masses.new_zeros(grids.stop - grids.start)
            total[grids] += part.scatter_add_(0, nodes.flatten(), shares.flatten())
    return total.reshape(-1, *box.sizes)


def _interpolate(stencils: _Stencils, field: Tensor) -> Tensor:
    """Σ_a φ_a(x_i) field_a.    (out, R·M)."""
    parts = []
    for _, grids, nodes, weights in stencils:
        out = stencils.take("values", (len(field), nodes.numel()))
        values = torch.index_select(field[:, grids], 1, nodes.flatten(), out=out).reshape(len(field), *nodes.shape)
        values = values * weights if out is None else values.mul_(weights)
        parts.append(values.sum(1))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class _Memory(threading.local):
    """Temporaries of a thread, used again at each call: fresh pages would cost as much as the sums."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of this shape, with anything in it."""
        size = math.prod(shape)
        found = self.kept.get((name, dtype))
        if found is None or len(found) < size:
            found = self.kept[name, dtype] = torch.empty(size, dtype=dtype)
        return found[:size].view(shape)


_MEMORY = _Memory()


def _memory_for(*tensors: Tensor) -> _Memory | None:
    """None where operations are recorded or compiled, and on devices that keep freed memory themselves."""
    recorded = torch.is_grad_enabled() and any(z.requires_grad for z in tensors)
    return None if recorded or torch.compiler.is_compiling() or tensors[0].device.type != "cpu" else _MEMORY


def _at_itself(x: Tensor, transform: Tensor, box: _Box) -> Tensor:
    """K̂(x_i, x_i) = Σ_k A_k(x_i) c_k with A_k = Σ_a φ_a φ_{a+k}, even in k.    (R·M, out)."""
    d, p = len(box.sizes), box.order
    c = torch.fft.irfftn(transform[:, 0], s=box.sizes, dim=tuple(range(-d, 0)))
    for i in range(1, d + 1):
        ahead = torch.arange(p, device=x.device)
        twice = c.index_select(i, ahead) + c.index_select(i, -ahead % box.sizes[i - 1])
        half = torch.where(ahead == 0, 0.5, 1.0).to(x)
        c = twice * half.reshape(-1, *(1,) * (d - i))
    parts = []
    for points in x.reshape(-1, d).split(BLOCK):
        weights = _weights(points.T / x.new_tensor(box.spacing).unsqueeze(1), p)
        overlaps = torch.stack([(weights[: p - k] * weights[k:]).sum(0) for k in range(p)])
        parts.append(torch.einsum("oa,an->no" if d == 1 else "oab,an,bn->no", c, *overlaps.unbind(1)))
    return torch.cat(parts)


def _is_same(x: Tensor, points: Tensor) -> bool:
    """One cloud: its stencils are formed once. An alias that is differentiated is another variable."""
    if x is points:
        return True
    alike = x.data_ptr() == points.data_ptr() and x.shape == points.shape and x.stride() == points.stride()
    return alike and not (x.requires_grad or points.requires_grad)


# B-splines ------------------------------------------------------------------------------------------------------------


@functools.cache
def _pieces(p: int) -> Tensor:
    """Coefficients (power k, node a) of the weights of the nodes 1 - p/2, ..., p/2 at u in [0, 1)."""
    # Row j: N_q(u + j) as a polynomial in u, from N_q(t) = (t N_{q-1}(t) + (q - t) N_{q-1}(t - 1)) / (q - 1).
    rows = torch.ones(1, 1, dtype=torch.float64)
    for q in range(2, p + 1):
        new = torch.zeros(q, q, dtype=torch.float64)
        for j in range(q - 1):
            new[j, : q - 1] += j * rows[j]
            new[j, 1:] += rows[j]
            new[j + 1, : q - 1] += (q - 1 - j) * rows[j]
            new[j + 1, 1:] -= rows[j]
        rows = new / (q - 1)
    return rows.flip(0).T.contiguous()


@functools.lru_cache(maxsize=32)
def _pieces_like(p: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """The same power by power, (p, 1, 1) each."""
    return [row.reshape(-1, 1, 1).to(device, dtype) for row in _pieces(p)]


@functools.lru_cache(maxsize=32)
def _filter(p: int, n: int) -> Tensor:
    """P(2πk/n), k = 0, ..., n - 1."""
    angle = torch.arange(n, dtype=torch.float64) * (2 * math.pi / n)
    # At u = 0 the weights are φ at 1 - p/2, ..., p/2 with a zero at the end.
    at_nodes = _pieces(p)[0]
    sampled = sum(at_nodes[a] * torch.cos(angle * (a + 1 - p // 2)) for a in range(p))
    bernoulli = {4: 1 / 30, 6: 1 / 42, 8: 1 / 30}[p]
    return (1 + bernoulli / math.factorial(p) * (2 * torch.sin(angle / 2)) ** p) / sampled


@functools.cache
def _guard(p: int, tolerance: float) -> int:
    """Nodes beyond which the filters carry less than tolerance/10 of where the periodic differences are cut."""
    taps = torch.fft.irfft(_filter(p, 256)[:129].square(), 256).abs()
    tail = taps[:128].flip(0).cumsum(0).flip(0)
    return int((tail > tolerance / 10).sum())


# The spacing ----------------------------------------------------------------------------------------------------------


def _checked(kernel: Kernel, like: Tensor, lengths: Sequence[float]) -> tuple[tuple[int, ...], bool]:
    """The shape of K's values, and whether K is odd.    ValueError: not finite at 0, or not acting entry by entry."""
    at_zero = kernel(like.new_zeros(1, like.shape[-1]))
    if not bool(torch.isfinite(at_zero).all()):
        raise ValueError(
            f"Grid: {kernel.name} is not finite at 0; a singular kernel has no values on a grid. Regularise it, "
            '|z|² + ε² for |z|², or use strategy="exact" and include_self=False.'
        )
    z = shortest(_differences(like.shape[-1])[0].to(like), lengths)
    whole = kernel(z)
    if whole.shape[:2] != z.shape[:2]:
        raise ValueError(
            f"Grid: {kernel.name} returned shape {tuple(whole.shape)} for differences {tuple(z.shape)}; expected "
            f"{tuple(z.shape[:-1])} followed by the shape of K(z)."
        )
    part = kernel(z[1:].flip(1)[:, ::3])
    if not torch.allclose(part, whole[1:].flip(1)[:, ::3], rtol=1e-4, atol=1e-30, equal_nan=True):
        raise ValueError(
            f"Grid: {kernel.name} depends on which other differences it is given; a grid needs a translation "
            "invariant kernel, K(z) of one difference at a time, (..., d) -> (..., *out). Write it as a drift."
        )
    return tuple(at_zero.shape[1:]), torch.equal(kernel(-z), -whole)


def _precise(kernel: Kernel, like: Tensor) -> Tensor:
    """The same in float64, where K takes it: rounding must not pass for roughness, nor change the spacing."""
    precise = like.new_zeros(1, like.shape[-1], dtype=torch.float64)
    try:
        kernel(precise)
    except RuntimeError:
        # It multiplies by a matrix of the particles' dtype.
        return like
    return precise


class _Rough(NamedTuple):
    """Pieces z + s·edge, 0 <= s <= 1, of K rougher than the tolerance at their length; all shorter than an octave.

    z, edge: (n, d). octave: (n,), the number of theirs. share: (n,) of the octave's differences.
    jumps: (k, 2), |z| and height of the jumps found.
    """

    z: Tensor
    edge: Tensor
    octave: Tensor
    share: Tensor
    jumps: Tensor


class _Measure:
    """The error that a grid of any spacing makes with a kernel, on fixed random differences and where K is rough."""

    def __init__(self, strategy: Grid, kernel: Kernel, like: Tensor, lengths: Sequence[float]) -> None:
        self.strategy, self.kernel, self.like, self.lengths = strategy, kernel, like, lengths
        self.wanted = strategy.tolerance / MARGIN
        self.error = functools.cache(self._error)
        z, self.within, radii = _differences(like.shape[-1])
        # Beyond a torus all differences are there again.
        self.octaves = int((radii <= 2 * sum(lengths)).sum())
        self.z, self.within, self.radii = z[: self.octaves], self.within[: self.octaves], radii[: self.octaves]
        size = self._values(self.z).square().sum(-1).mean(1)
        # Octaves of differences where K overflows are none that particles have.
        self.usable = torch.isfinite(size)
        self.volume = self.radii ** like.shape[-1] * self.usable
        self.size = torch.where(self.usable, size, 0.0) * self.volume

    def _values(self, z: Tensor) -> Tensor:
        """K at differences, in double precision.    (..., d) -> (..., out)."""
        values = self.kernel(shortest(z.to(self.like), self.lengths))
        return values.reshape(*z.shape[:-1], -1).double().cpu()

    def _error(self, h: float, nearest: float = 1 / 8) -> float:
        """Largest root mean square error over balls |z| <= ρ, ρ >= h, relative to K's root mean square there.

        Octaves |z| < nearest · h are left out.
        """
        view = (self.radii >= nearest * h) & (self.radii <= h * FAR[self.like.shape[-1]])
        squares = torch.zeros(self.octaves, dtype=torch.float64)
        squares[view] = self._squares(self.z[view], self.within[view], h).mean(1)
        error = self._worst(squares, view, h)
        if error > self.strategy.tolerance:
            return error
        # Of features narrower than the distances between samples these see nothing.
        rough, length = self.rough, self.strategy.nodes * h / 4
        size = rough.edge.norm(dim=-1)
        near = view[rough.octave] & (size <= length) & (size > length / 2)
        if not bool(near.any()):
            return error
        z, edge, octave, share = (part[near] for part in rough[:4])
        u, within = torch.rand(2, len(z), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        # They are a spline wide.
        z = z + edge * (0.5 + 4 * (u - 0.5)).unsqueeze(-1)
        squares.index_add_(0, octave, 4 * share * self._squares(z, within, h))
        return self._worst(squares, view, h)

    def _worst(self, squares: Tensor, view: Tensor, h: float) -> float:
        """From the mean squares of octaves."""
        squares = torch.where(view & self.usable, squares, 0.0) * self.volume
        size = torch.where(view, self.size, 0.0)
        ratio = squares.cumsum(0) / size.cumsum(0)
        worst = torch.nan_to_num(ratio[view & (self.radii >= h)], nan=math.inf, posinf=math.inf)
        return math.sqrt(float(worst.max())) if len(worst) else math.inf

    def _squares(self, z: Tensor, within: Tensor, h: float) -> Tensor:
        """|K̂ - K|² at differences z and positions within a cell.    (..., d), (...) -> (...).

        To first order the error is the sum of those of interpolation in each component of x and of y, uncorrelated
        over the positions of x and y within their cells.
        """
        p = self.strategy.nodes
        stencil, taps = _cardinal(p, _guard(p, self.strategy.tolerance), within)
        exact = self._values(z)
        squares = torch.zeros(z.shape[:-1], dtype=torch.float64)
        for i in range(z.shape[-1]):
            offsets = torch.zeros(*within.shape, len(stencil), z.shape[-1], dtype=torch.float64)
            offsets[..., i] = (stencil - within.unsqueeze(-1)) * h
            found = (self._values(z.unsqueeze(-2) + offsets) * taps.unsqueeze(-1)).sum(-2)
            squares += 2 * (found - exact).square().sum(-1)
        return squares

    @functools.cached_property
    def rough(self) -> _Rough:
        """Chords of all octaves, halved again and again where K is no polynomial to within the tolerance."""
        d, eps = self.like.shape[-1], torch.finfo(self.like.dtype).eps
        mean = (self.size.cumsum(0) / self.volume.cumsum(0).clamp(min=1e-300)).sqrt()
        least = torch.where(self.usable, mean * max(self.wanted, FAR[d] * eps), math.inf)
        generator = torch.Generator().manual_seed(3)
        start, edge = (z[: self.octaves] for z in _chords(d))
        share = edge.norm(dim=-1) / edge.norm(dim=-1).sum(1, keepdim=True) / 4
        octave = torch.arange(self.octaves).unsqueeze(1).expand(share.shape)
        z = torch.stack([start + k / 4 * edge for k in range(4)])
        pieces = [z, *(part.expand(4, *part.shape) for part in (edge / 4, octave, share))]
        pieces = [part.flatten(0, 2) for part in pieces]
        kept = []
        for _ in range(HALVINGS if self.like.dtype == torch.float64 else HALVINGS // 2):
            is_rough = self._roughness(pieces[0], pieces[1]) > least[pieces[2]]
            pieces = _thinned([part[is_rough] for part in pieces], generator)
            if not len(pieces[0]):
                break
            z, edge, octave, share = pieces
            kept.append(pieces)
            pieces = [torch.cat(two) for two in ((z, z + edge / 2), (edge / 2,) * 2, (octave,) * 2, (share / 2,) * 2)]
        jumps = self._jumps(pieces[0], pieces[1], least[pieces[2]])
        kept.append([part[:0] for part in pieces])
        z, edge, octave, share = (torch.cat(parts) for parts in zip(*kept, strict=True))
        return _Rough(z, edge, octave, share, jumps)

    def _roughness(self, z: Tensor, edge: Tensor) -> Tensor:
        """|Δ^p K| at p + 1 points of pieces, 1 to 1/p of a jump that they cross.    (n, d), (n, d) -> (n,)."""
        p = self.strategy.nodes
        values = self._values(z.unsqueeze(1) + edge.unsqueeze(1) * (torch.arange(p + 1) / p).unsqueeze(1).double())
        largest = math.comb(p - 1, p // 2)
        signs = [(-1) ** k * math.comb(p, k) / largest for k in range(p + 1)]
        differences = (values * torch.tensor(signs, dtype=torch.float64).unsqueeze(1)).sum(1)
        size: Tensor = torch.linalg.vector_norm(differences, dim=-1)
        return size

    def _jumps(self, z: Tensor, edge: Tensor, least: Tensor) -> Tensor:
        """|z| and height where K is rough at the end of all halvings and as much so 64 times farther around."""
        if not len(z):
            return torch.zeros(0, 2, dtype=torch.float64)
        here, around = self._roughness(z, edge), self._roughness(z - 32 * edge, 65 * edge)
        found = (here > least) & (here > around / 8)
        height = (self._values(z + edge) - self._values(z)).norm(dim=-1)
        return torch.stack([shortest(z, self.lengths).norm(dim=-1), height], 1)[found]

    def check_jumps(self, nearest: float = 0.0, farthest: float = math.inf) -> None:
        """ValueError: a jump at such distances."""
        jumps = self.rough.jumps
        jumps = jumps[(jumps[:, 0] >= nearest) & (jumps[:, 0] <= farthest)]
        if len(jumps):
            radius, height = jumps[jumps[:, 1].argmax()].tolist()
            raise ValueError(
                f"Grid: {self.kernel.name} is not smooth enough for a grid: it jumps by {height:.2g} near |z| = "
                f"{radius:.4g}, and pairs at that distance are wrong by as much at every spacing. "
                + ("Make it periodic, l" if math.isfinite(min(self.lengths)) else "L")
                + 'et it change over a length, give a tolerance above its relative height, or use strategy="exact".'
            )


def _thinned(pieces: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    """At most `PIECES` of each octave, chosen at random, that stand for all: what is rough everywhere needs no more."""
    octave = pieces[2]
    number = torch.bincount(octave, minlength=1)
    if not len(octave) or int(number.max()) <= PIECES:
        return pieces
    order = torch.argsort(octave + torch.rand(len(octave), generator=generator, dtype=torch.float64))
    rank = torch.arange(len(order)) - (number.cumsum(0) - number)[octave[order]]
    z, edge, octave, share = (part[order[rank < PIECES]] for part in pieces)
    return [z, edge, octave, share * (number[octave] / PIECES).clamp(min=1)]


def _spacing(measure: _Measure) -> float:
    """The strategy's, or the one found.    ValueError: the error of it, or of all, is above the tolerance."""
    given, tolerance = measure.strategy.spacing, measure.strategy.tolerance
    spacing = given if given is not None else _find_spacing(measure)
    # A jump that stopped the search is one that the next grids would hold.
    measure.check_jumps(spacing / 8, 2 * spacing * FAR[measure.like.shape[-1]])
    if given is not None and not measure.error(given, 0.0) <= tolerance:
        raise ValueError(
            f"Grid: the relative error of {measure.kernel.name} is {measure.error(given, 0.0):.2g} at spacing "
            f"{given:.6g}, above the tolerance {tolerance:.2g}. Give a smaller spacing, or none to have it found, or a "
            "larger tolerance."
        )
    return spacing


def _find_spacing(measure: _Measure) -> float:
    """The last 2^(k/4), from fine to coarse, with an error below the tolerance and its margin."""
    wanted = measure.wanted
    period = min(measure.lengths)
    is_bounded = math.isfinite(period)
    finest = -4 * OCTAVES if not is_bounded else math.ceil(4 * math.log2(period / math.sqrt(MOST_NODES)))
    coarsest = 4 * OCTAVES if not is_bounded else math.floor(4 * math.log2(period / measure.strategy.nodes))

    def error(k: int) -> float:
        return measure.error(2 ** (k / 4))

    def whole(k: int) -> float:
        # What happens within a cell is an error too, where the finer spacings did not resolve it.
        return measure.error(2 ** (k / 4), 0.0) if error(k) <= wanted else error(k)

    # The finest may fail by rounding alone: values near 0 of 1 - exp(-|z|²), say.
    tried = range(finest, coarsest, 8)
    low = first = next((k for k in tried if error(k) <= wanted), coarsest)
    high = next((k for k in range(first + 8, coarsest, 8) if error(k) > wanted), coarsest)
    if high == coarsest and error(high) <= wanted:
        low = high
    low = max(low, high - 8)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if error(middle) <= wanted else (low, middle)
    if whole(low) > MARGIN * wanted:
        measure.check_jumps(2 ** (finest / 4))
        best = min(tried, key=whole, default=low)
        raise ValueError(
            f"Grid: {measure.kernel.name} is not smooth enough for a grid: the relative error is {whole(best):.2g} at "
            f"spacing {2 ** (best / 4):.3g}, the best one, and {wanted:.2g} was wanted. Regularise the kernel"
            + (", make it periodic" if is_bounded else "")
            + ', give a larger tolerance, or use strategy="exact".'
        )
    if low == coarsest and not is_bounded:
        raise ValueError(
            f"Grid: {measure.kernel.name} has no length scale: like a polynomial of degree "
            f'{measure.strategy.nodes - 1} it is interpolated at any spacing. Use strategy="exact", whose moments cost '
            "O(N), or give a spacing."
        )
    return float(2 ** (low / 4))


@functools.cache
def _differences(d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Differences in octaves of |z|, positions within a cell, and the octaves' radii.    (A, S, d), (A, S), (A,)."""
    generator = torch.Generator().manual_seed(0)
    radii = 2.0 ** torch.arange(-OCTAVES, OCTAVES + 1, dtype=torch.float64)
    shape = (len(radii), SAMPLE)
    direction = torch.randn(*shape, d, generator=generator, dtype=torch.float64)
    direction = direction / direction.norm(dim=-1, keepdim=True)
    inner = 0.5**d
    level = (torch.arange(SAMPLE, dtype=torch.float64) + 0.5) / SAMPLE
    length = (inner + (1 - inner) * level) ** (1 / d) * radii.unsqueeze(1)
    within = torch.rand(*shape, generator=generator, dtype=torch.float64)
    return direction * length.unsqueeze(-1), within, radii


@functools.cache
def _chords(d: int) -> tuple[Tensor, Tensor]:
    """From the differences of each octave to others of about their direction: starts and edges.    (A, S, d) each."""
    start = _differences(d)[0]
    generator = torch.Generator().manual_seed(1)
    length = start.norm(dim=-1)[:, torch.randperm(SAMPLE, generator=generator)]
    # Of every other one in the octave below, so that no distance is none's.
    length = length * torch.tensor([1.0, 0.5]).repeat(SAMPLE // 2)
    end = start / start.norm(dim=-1, keepdim=True) * length.unsqueeze(-1)
    if d == 2:
        angle = (torch.rand(end.shape[:2], generator=generator, dtype=torch.float64) - 0.5) * (2 * math.pi / 3)
        x, y = end.unbind(-1)
        end = torch.stack([x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()], -1)
    return start, end - start


def _cardinal(p: int, guard: int, within: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes around a cell, (T,), and their weights in the interpolated value at positions u, (..., T)."""
    impulse = torch.fft.irfft(_filter(p, 256)[:129], 256)
    stencil = torch.arange(1 - p // 2 - guard, 1 + p // 2 + guard)
    spline = sum(within.unsqueeze(-1) ** k * _pieces(p)[k] for k in range(p))
    lags = torch.arange(1 - p // 2, 1 + p // 2).unsqueeze(1) - stencil
    return stencil, spline @ impulse[lags]
