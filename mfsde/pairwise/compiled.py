"""All pairs by code made for the kernel: C on the CPU, torch.compile elsewhere, from the kernel's torch function."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..torus import period_lengths, shortest
from .blocked import Blocked
from .kernel import Kernel, Pairs, Strategy
from .native import NoCompilerError, library
from .source import Form, row_block, source
from .trace import Trace, UntraceableError, differences_among, evaluated, jumps, trace

# What one thread takes at a time: long beside the cost of handing it over, short beside Ctrl-C.
PAIRS_OF_A_TASK = 1 << 23
# Where a device's compiler does not fuse, a block of rows is this large; it bounds the memory (128 MiB in float32).
FLOATS_OF_A_BLOCK = 1 << 25


@dataclass(frozen=True)
class Compiled(Strategy):
    """Σ_j w_j K(x_i - y_j) by code made for K: all pairs, O(N) memory, and no tensor of differences.

    The kernel runs once on a probe, its torch operations become arithmetic on the components of z, and the system's C
    compiler turns that into a function (0.1 to 0.5 s, kept in ~/.cache/mfsde/kernels). Both steps are compared with
    the kernel. Sums over 1024 atoms are in the dtype of the points, sums of these in double. A row's result depends on
    its point and the atoms only: neither threads nor other rows change a bit. On other devices torch.compile does it.

    Gradients of a scalar K with respect to points and masses are compiled sums of K and ∇K; those of a vector K, and
    second derivatives, are evaluated by `Blocked`.

    Raises (in `sums`):
        ValueError: the kernel is no expression of the components, or the machine has no C compiler.

    """

    exact: ClassVar[bool] = True
    differentiable: ClassVar[bool] = True

    def sums(self, kernel: Kernel, pairs: Pairs) -> Tensor:
        """(R, M, *out)."""
        return _sums(kernel, pairs, False)


def usable(kernel: Kernel, pairs: Pairs) -> bool:
    """Whether `Compiled` can evaluate these sums. It makes the library if there is none: 0.1 to 0.5 s."""
    return reason(kernel, pairs) is None


def reason(kernel: Kernel, pairs: Pairs) -> str | None:
    """Why `Compiled` cannot evaluate these sums; None where it can."""
    try:
        found = _traced(kernel, pairs)
        _sums_by_code(found, kernel, pairs)
    except NoCompilerError as error:
        return str(_refusal(kernel, str(error)))
    except ValueError as error:
        return str(error)
    return None


def _traced(kernel: Kernel, pairs: Pairs) -> Trace:
    if pairs.x.dtype not in (torch.float32, torch.float64):
        raise _refusal(kernel, f"it has no code for {pairs.x.dtype}")
    _check_alike(pairs)
    try:
        return trace(kernel, pairs.x)
    except UntraceableError as error:
        raise _refusal(kernel, str(error)) from error


def _check_alike(pairs: Pairs) -> None:
    """Compiled code takes addresses: numbers of another kind there would be read as if they were of this one."""
    x, points, weights, own = pairs.x, pairs.points, pairs.weights, pairs.own
    if not (x.dtype == points.dtype == weights.dtype and x.device == points.device == weights.device):
        kinds = ", ".join(f"{z.dtype} on {z.device}" for z in (x, points, weights))
        raise ValueError(
            f"Compiled: x, points and weights are {kinds}; expected one dtype and one device. Convert them by "
            ".to(...), or use mu.convolve, which does it."
        )
    if own is not None and (own.dtype != torch.int64 or own.device != x.device):
        raise ValueError(
            f"Compiled: own is {own.dtype} on {own.device}; expected the numbers of atoms as torch.int64 on {x.device}."
        )


def _refusal(kernel: Kernel, why: str) -> ValueError:
    return ValueError(
        f"Compiled: the kernel {kernel.name} cannot be compiled: {why}. Expected a function of differences that acts "
        'entry by entry, made of arithmetic torch operations, and a C compiler. Use strategy="blocked".'
    )


def _sums(kernel: Kernel, pairs: Pairs, mirrored: bool) -> Tensor:
    """The sums of K, or of z ↦ K(-z) where mirrored."""
    found = _traced(kernel, pairs)
    if not (torch.is_grad_enabled() and any(z.requires_grad for z in (pairs.x, pairs.points, pairs.weights))):
        return _values(found.reversed, _mirrored(kernel), pairs) if mirrored else _values(found, kernel, pairs)
    if found.shape == () and _is_traceable(kernel.slope, pairs) and _is_injective(pairs.own):
        inputs = (pairs.x, pairs.points, pairs.weights)
        return _Sums.apply(*inputs, kernel, pairs, mirrored)  # type: ignore[no-any-return, no-untyped-call]
    return Blocked().sums(_mirrored(kernel) if mirrored else kernel, pairs)


def _mirrored(kernel: Kernel) -> Kernel:
    return Kernel(lambda z: kernel(-z))


def _values(found: Trace, kernel: Kernel, pairs: Pairs) -> Tensor:
    try:
        return _sums_by_code(found, kernel, pairs)(pairs)
    except NoCompilerError as error:
        raise _refusal(kernel, str(error)) from error


Sums = Callable[[Pairs], Tensor]


def _sums_by_code(found: Trace, kernel: Kernel, pairs: Pairs) -> Sums:
    """The code for pairs like these, compared with the kernel at their own differences when it first meets their scale.

    Raises:
        NoCompilerError: there is none, or it disagrees.

    """
    form = _form(pairs)
    sums: Sums
    if pairs.x.is_cpu:
        compared = sums = functools.partial(_by_library, found, function=_function(found, form))
    else:
        sums = functools.partial(_by_torch, found, rows=_compiled_rows(found, form.period))
        # Before a compiler, which would take seconds for these few rows: it keeps the constants.
        compared = functools.partial(_by_torch, found, rows=_rows(found, form.period))
    case = ("compared", form, pairs.x.device, _scale(pairs))
    if case not in found.made and check_among(pairs, kernel, form, compared):
        found.made[case] = True
    return sums


def _scale(pairs: Pairs) -> int | None:
    """Of the extent of the atoms, in powers of 256; not asked of other devices, whose host would have to wait."""
    if not pairs.x.is_cpu:
        return None
    with torch.no_grad():
        low, high = torch.aminmax(pairs.points)
        extent = float(high - low)
    return math.frexp(extent)[1] // 8 if math.isfinite(extent) else None


def _is_traceable(kernel: Kernel, pairs: Pairs) -> bool:
    try:
        trace(kernel, pairs.x)
    except UntraceableError:
        return False
    return True


# Derivatives ----------------------------------------------------------------------------------------------------------


class _Sums(torch.autograd.Function):
    """S_i = Σ_j w_j K(x_i - y_j) for scalar K; with g = ∂L/∂S,

    ∂L/∂x_i = g_i Σ_j w_j ∇K(x_i - y_j),   ∂L/∂y_j = -w_j Σ_i g_i ∇K(x_i - y_j),   ∂L/∂w_j = Σ_i g_i K(x_i - y_j):
    sums over pairs again, the last two seen from y_j over atoms x_i of masses g_i, with the kernel mirrored.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, points: Tensor, weights: Tensor, kernel: Kernel, pairs: Pairs, mirrored: bool
    ) -> Tensor:
        ctx.save_for_backward(x, points, weights)
        ctx.kernel, ctx.mirrored, ctx.period, ctx.own = kernel, mirrored, pairs.period, pairs.own
        return _sums(kernel, Pairs(x.detach(), points.detach(), weights.detach(), pairs.period, pairs.own), mirrored)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, points, weights = ctx.saved_tensors
        kernel, mirrored = ctx.kernel, ctx.mirrored
        sign = -1.0 if mirrored else 1.0
        there = Pairs(x, points, weights, ctx.period, ctx.own)
        back = Pairs(points, x, g, ctx.period, _inverse(ctx.own, points.shape[1]))
        of_x = of_points = of_weights = None
        if ctx.needs_input_grad[0]:
            of_x = sign * g.unsqueeze(-1) * _sums(kernel.slope, there, mirrored)
        if ctx.needs_input_grad[1]:
            of_points = -sign * weights.unsqueeze(-1) * _sums(kernel.slope, back, not mirrored)
        if ctx.needs_input_grad[2]:
            of_weights = _sums(kernel, back, not mirrored)
        return of_x, of_points, of_weights, None, None, None


def _inverse(own: Tensor | None, n: int) -> Tensor | None:
    """Seen from the atoms: the row that leaves atom j out, -1 where none does."""
    if own is None:
        return None
    # Rows that leave out none are at -1: the place behind the last atom.
    inverse = own.new_full((n + 1,), -1)
    inverse[own] = torch.arange(len(own), device=own.device)
    return inverse[:n]


def _is_injective(own: Tensor | None) -> bool:
    """Whether no two rows leave out the same atom."""
    return own is None or bool((own[own >= 0].sort().values.diff() > 0).all())


# On the CPU -----------------------------------------------------------------------------------------------------------


def _form(pairs: Pairs) -> Form:
    period = tuple(period_lengths(pairs.period, pairs.x.shape[-1]))
    return Form(pairs.x.dtype, period, not _share_one_number(pairs.weights), pairs.own is not None)


def _share_one_number(weights: Tensor) -> bool:
    """Whether all atoms of a replica have one mass, by the layout: equal numbers are not looked for."""
    return weights.shape[-1] == 1 or weights.stride(-1) == 0


def _function(found: Trace, form: Form) -> Any:
    """The library's function, compared with the expressions when it is made."""
    function = found.made.get(form)
    if function is None:
        function = library(source(found, form))
        check(found, form, function)
        found.made[form] = function
    return function


def check(found: Trace, form: Form, function: Any) -> None:
    """Compare a compiled function with torch operations on a few rows.

    Raises:
        NoCompilerError: they disagree.

    """
    n, m = 1100, 2 * row_block(found) + 1
    z = torch.randn(1, n, found.dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    lengths = [1.0 if math.isinf(p) else p / 2 for p in form.period]
    points = (z * z.new_tensor(lengths)).to(form.dtype)
    weights = torch.linspace(0.5, 1.5, n, dtype=form.dtype)[None]
    weights = weights if form.weighted else weights[:, :1].expand(1, n)
    own = torch.arange(m) * 120 if form.own else None
    pairs = Pairs(points[:, torch.arange(m) * 120], points, weights, form.period, own)
    double = Pairs(pairs.x.double(), points.double(), weights.double(), form.period, own)
    absolute = Kernel(lambda z: found(z).abs())
    ours = _by_library(found, pairs, function).double()
    wide, narrow = Blocked().sums(Kernel(found), double), Blocked().sums(Kernel(found), pairs).double()
    # What rounding of the kernel's own arithmetic does to the sum, and no less than that of the sum.
    size = Blocked().sums(absolute, double).amax(1, keepdim=True)
    tolerance = 8 * (narrow - wide).abs().amax(1, keepdim=True) + 16 * torch.finfo(form.dtype).eps * size
    if not bool((((ours - wide).abs() <= tolerance) | ~wide.isfinite() | ~narrow.isfinite()).all()):
        raise NoCompilerError(
            f"the compiled sums differ from the kernel's by {float((ours - wide).abs().max()):.3g}, where rounding "
            f"explains {float(tolerance.max()):.3g}"
        )


def check_among(pairs: Pairs, kernel: Kernel, form: Form, sums: Sums) -> bool:
    """Compare code with the kernel itself, in its own dtype, at differences of these pairs; False where there are none.

    Where the kernel is finite there, so is the code, and they agree: constants that left the range of the dtype show.

    Raises:
        NoCompilerError: they disagree.

    """
    z = differences_among(pairs.points)
    if not len(z):
        return False
    z = shortest(z, pairs.period)
    # Each difference twice: one atom alone would count as of uniform mass.
    atoms = z.new_zeros(1, 2, z.shape[-1])
    halves = z.new_full((1, 2), 0.5) if form.weighted else z.new_full((1, 1), 0.5).expand(1, 2)
    own = torch.full((len(z),), -1, dtype=torch.int64, device=z.device) if form.own else None
    with torch.no_grad():
        values = kernel(z)
        ours, theirs = sums(Pairs(z[None], atoms, halves, pairs.period, own))[0].double(), values.double()
        size = theirs.abs()
        tolerance = 1e3 * torch.finfo(z.dtype).eps * (size + size.nan_to_num(0.0, 0.0, 0.0).amax(0, keepdim=True))
        wrong = theirs.isfinite() & ~((ours - theirs).abs() <= tolerance + jumps(kernel, z, values))
    if bool(wrong.any()):
        k = int(wrong.flatten().long().argmax())
        raise NoCompilerError(
            f"the compiled sums give {float(ours.flatten()[k]):.6g} where the kernel gives "
            f"{float(theirs.flatten()[k]):.6g}, at a difference of two of the points"
        )
    return True


def _by_library(found: Trace, pairs: Pairs, function: Any) -> Tensor:
    (replicas, m, _), n, outputs = pairs.x.shape, pairs.points.shape[1], len(found.outputs)
    x, points = (z.detach().transpose(1, 2).contiguous() for z in (pairs.x, pairs.points))
    weights, out = pairs.weights.detach(), pairs.x.new_empty((replicas, outputs, m))
    own = None if pairs.own is None else pairs.own.contiguous()
    uniform = _share_one_number(weights)
    scales = weights[:, 0].tolist() if uniform else [1.0] * replicas
    weights = weights.contiguous() if not uniform else out
    rows = max(1, PAIRS_OF_A_TASK // n)

    def task(where: tuple[int, int]) -> None:
        r, begin = where
        function(
            x[r].data_ptr(),
            points[r].data_ptr(),
            weights[r].data_ptr(),
            None if own is None else own.data_ptr(),
            begin,
            min(begin + rows, m),
            m,
            n,
            scales[r],
            out[r].data_ptr(),
        )

    _each(task, [(r, begin) for r in range(replicas) for begin in range(0, m, rows)])
    return out.transpose(1, 2).reshape(replicas, m, *found.shape)


def _each(task: Callable[[tuple[int, int]], None], tasks: list[tuple[int, int]]) -> None:
    threads = min(torch.get_num_threads(), len(tasks))
    if threads <= 1:
        for one in tasks:
            task(one)
    else:
        list(_pool(torch.get_num_threads()).map(task, tasks))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="mfsde-pairs")


# The threads of a parent do not live in its child.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)


# On other devices -----------------------------------------------------------------------------------------------------

Rows = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def _compiled_rows(found: Trace, period: tuple[float, ...]) -> Rows:
    key = ("torch", period)
    if key not in found.made:
        found.made[key] = torch.compile(_rows(found, period), dynamic=True)
    return found.made[key]  # type: ignore[no-any-return]


def _rows(found: Trace, period: tuple[float, ...]) -> Rows:
    """Some rows as component-wise torch operations, one reduction each: what a compiler fuses into one loop."""

    def rows(x: Tensor, points: Tensor, weights: Tensor, own: Tensor | None) -> Tensor:
        """x: (R, B, d), points: (R, N, d), weights: (R, N), own: (B,) -> (R, B, outputs)."""
        components = [x[..., k].unsqueeze(-1) - points[..., k].unsqueeze(-2) for k in range(found.dim)]
        turned = [z if math.isinf(p) else z - p * torch.round(z / p) for z, p in zip(components, period, strict=True)]
        masses = weights.unsqueeze(-2)
        if own is not None:
            left_out = own.unsqueeze(-1) == torch.arange(points.shape[1], device=x.device)
            turned = [torch.where(left_out, 1.0, z) for z in turned]
            masses = torch.where(left_out, 0.0, masses)
        return torch.stack([(masses * value).sum(-1) for value in _broadcast(found, turned)], dim=-1)

    return rows


def _broadcast(found: Trace, components: list[Tensor]) -> list[Tensor]:
    values = evaluated(found.outputs, components)
    return [v if isinstance(v, Tensor) else torch.full_like(components[0], v) for v in values]


def _by_torch(found: Trace, pairs: Pairs, rows: Rows) -> Tensor:
    (replicas, m, _), n = pairs.x.shape, pairs.points.shape[1]
    size = max(1, FLOATS_OF_A_BLOCK // (replicas * n))
    parts = []
    for begin in range(0, m, size):
        block = slice(begin, begin + size)
        own = None if pairs.own is None else pairs.own[block]
        parts.append(rows(pairs.x[:, block], pairs.points, pairs.weights, own))
    return torch.cat(parts, dim=1).reshape(replicas, m, *found.shape)
