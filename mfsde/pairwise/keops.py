"""Sums over pairs by KeOps, which compiles one reduction for each formula."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..torus import Period, period_lengths
from . import expression as ex
from .expression import Expression
from .kernel import Kernel, Pairs, Strategy
from .trace import Trace, UntraceableError, trace

# KeOps writes a formula out as a tree; the time of its compilation grows with it.
LARGEST_FORMULA = 2000
ROWS, ATOMS = -3, -2

# A symbolic matrix of the pairs.
Lazy = Any


@dataclass(frozen=True)
class KeOps(Strategy):
    """Σ_j w_j K(x_i - y_j) by a reduction that KeOps generates and compiles, CPU or CUDA: O(MN) work, O(M + N) memory.

    K is translated once, from its torch operations to arithmetic between the components of z. The first sum of a kernel
    takes about ten seconds of compilation; KeOps keeps what it compiled in its cache. Equal to the sum over all pairs
    up to rounding. Where KeOps has no such function (expm1, log1p, tanh, sinh), formulas stand for it that keep its
    digits near 0.

    Raises:
        ImportError: pykeops is not installed.
        ValueError: when summing, a kernel that is no formula of KeOps: one that depends on data or on erf, one of
            more than LARGEST_FORMULA operations.

    References:
        B. Charlier, J. Feydy, J. A. Glaunès, F.-D. Collin, G. Durif, Kernel operations on the GPU, with autodiff,
        without memory overflows, J. Mach. Learn. Res. 22 (2021) 74.

    """

    exact: ClassVar[bool] = True
    differentiable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if importlib.util.find_spec("pykeops") is None:
            raise ImportError(
                'KeOps: pykeops is not installed. Install it with pip install "mfsde[keops]", or use strategy="exact".'
            )

    def sums(self, kernel: Kernel, pairs: Pairs) -> Tensor:
        """(R, M, *out)."""
        if pairs.own is not None and pairs.points.shape[1] >= 2 / torch.finfo(pairs.x.dtype).eps:
            raise ValueError(
                f"KeOps: {pairs.points.shape[1]} atoms have no numbers of their own in {pairs.x.dtype}, by which the "
                'one left out is known. Use float64, or strategy="exact".'
            )
        formula = _traced(kernel, pairs.x)
        replicas, m, d = pairs.x.shape
        x, y = _components(pairs.x, ROWS), _components(pairs.points, ATOMS)
        z = [_shortest(a - b, p) for a, b, p in zip(x, y, _lengths(pairs.period, d), strict=True)]
        if pairs.own is None:
            values = _evaluated(formula.outputs, z, pairs.x)
        else:
            (own,) = _components(pairs.own.to(pairs.x).expand(replicas, m).unsqueeze(-1), ROWS)
            atoms = torch.arange(pairs.points.shape[1], device=pairs.x.device).to(pairs.x)
            (atom,) = _components(atoms.expand(replicas, -1).unsqueeze(-1), ATOMS)
            same = own == atom
            # The kernel is kept from 0, where it may be singular.
            values = _evaluated(formula.outputs, [c + same for c in z], pairs.x)
            values = [_choice(same, 0 * v, v) for v in values]
        (weight,) = _components(pairs.weights.unsqueeze(-1), ATOMS)
        terms = values[0] if len(values) == 1 else values[0].concatenate(tuple(values), -1)
        # What several entries share is computed once.
        total = (weight * terms).auto_factorize().sum(dim=terms.nbatchdims + 1)
        return total.reshape(replicas, m, *formula.shape)  # type: ignore[no-any-return]


def _traced(kernel: Kernel, like: Tensor) -> Trace:
    try:
        formula = trace(kernel, like)
    except UntraceableError as error:
        raise ValueError(f'KeOps: {kernel.name} has no formula: {error}. Use strategy="exact".') from error
    sizes: dict[Expression, int] = {}
    for node in ex.in_order(formula.outputs):
        sizes[node] = 1 + sum(sizes[a] for a in node.args)
    size = sum(sizes[e] for e in formula.outputs)
    if size > LARGEST_FORMULA:
        raise ValueError(
            f"KeOps: {kernel.name} is a formula of {size} operations written out, more than {LARGEST_FORMULA}, whose "
            'compilation takes minutes. Use strategy="exact".'
        )
    return formula


def _components(x: Tensor, axis: int) -> list[Lazy]:
    """Components of points (R, N, d) as symbolic matrices (R, rows, atoms, 1), along one of its axes."""
    # Batches are slower: a single replica is none.
    columns = (c.unsqueeze(-1) for c in x.unbind(-1))
    return [
        _lazy((c.squeeze(0) if len(c) == 1 else c).unsqueeze(-2 if axis == ROWS else -3).contiguous()) for c in columns
    ]


def _lazy(x: Tensor) -> Lazy:
    from pykeops.torch import LazyTensor

    return LazyTensor(x)


def _lengths(period: Period, dim: int) -> list[float]:
    return [math.inf] * dim if period is None else period_lengths(period, dim)


def _shortest(z: Lazy, period: float) -> Lazy:
    return z if math.isinf(period) else z - period * _rounded(z / period)


# Expressions as formulas ----------------------------------------------------------------------------------------------


def _evaluated(outputs: Sequence[Expression], z: list[Lazy], like: Tensor) -> list[Lazy]:
    values: dict[Expression, Lazy] = {}
    for node in ex.in_order(outputs):
        values[node] = _value(node, [values[a] for a in node.args], z, like)
    # A constant has no rows of its own.
    return [values[e] * (z[0] == z[0]) if e.is_constant else values[e] for e in outputs]


def _value(node: Expression, args: list[Lazy], z: list[Lazy], like: Tensor) -> Lazy:
    """The formula of one node; conditions are 0 or 1.

    Raises:
        ValueError: a function that KeOps does not have.

    """
    if node.is_constant:
        return _lazy(like.new_tensor([node.value]))
    if node.op == "component":
        return z[node.index]
    if node.op == "pow" and not ex.is_non_negative(node.args[0]):
        raise ValueError(f'KeOps: x^p where x may be negative has no formula ({node!r:.80}). Use strategy="exact".')
    if node.op not in _FORMULAS:
        raise ValueError(f'KeOps has no function {node.op}. Use strategy="exact".')
    return _FORMULAS[node.op](*args)


def _choice(condition: Lazy, a: Lazy, b: Lazy) -> Lazy:
    """A where the condition is 1, b where it is 0."""
    return (2 * condition - 1).ifelse(a, b)


def _rounded(x: Lazy) -> Lazy:
    """To the nearest whole number, halves to the even one; KeOps takes halves away from 0."""
    away = x.round(0)
    return _choice((x - x.unary("Floor")) * 2 == 1, 2 * (x / 2).round(0), away)


def _truncated(x: Lazy) -> Lazy:
    return x.sign() * x.abs().unary("Floor")


def _expm1(x: Lazy) -> Lazy:
    """The value (u - 1) x / log u, u = e^x as rounded (Kahan): the errors of numerator and denominator cancel."""
    u = x.exp()
    far = _choice(x.abs() < 0.5, (u - 1) * x / u.log(), u - 1)
    return _choice(u == 1, x, far)


def _log1p(x: Lazy) -> Lazy:
    """The value x log u / (u - 1), u = 1 + x as rounded."""
    u = 1 + x
    # KeOps would cancel (1 + x) - 1 before anything is rounded, but not behind an absolute value.
    far = _choice(x.abs() < 0.5, x * u.log() / (u.abs() - 1), u.log())
    return _choice(u == 1, x, far)


def _tanh(x: Lazy) -> Lazy:
    m = _expm1(-2 * x.abs())
    return -x.sign() * m / (2 + m)


def _sinh(x: Lazy) -> Lazy:
    """By (m + m/(1 + m))/2, m = expm1|x|, with the sign of x; by halves where m overflows."""
    m = _expm1(x.abs())
    return x.sign() * _choice(x.abs() < 1, (m + m / (1 + m)) / 2, _half_exponentials(x.abs(), -1))


def _half_exponentials(x: Lazy, sign: int) -> Lazy:
    return (x - math.log(2)).exp() + sign * (-x - math.log(2)).exp()


_FORMULAS: dict[str, Callable[..., Lazy]] = {
    "neg": lambda x: -x,
    "abs": lambda x: x.abs(),
    "sign": lambda x: x.sign(),
    "floor": lambda x: x.unary("Floor"),
    "ceil": lambda x: -(-x).unary("Floor"),
    "round": _rounded,
    "trunc": _truncated,
    "sqrt": lambda x: x.sqrt(),
    "exp": lambda x: x.exp(),
    "expm1": _expm1,
    "log": lambda x: x.log(),
    "log1p": _log1p,
    "sin": lambda x: x.sin(),
    "cos": lambda x: x.cos(),
    "tan": lambda x: x.sin() / x.cos(),
    "asin": lambda x: x.asin(),
    "acos": lambda x: x.acos(),
    "atan": lambda x: x.atan(),
    "sinh": _sinh,
    "cosh": lambda x: _half_exponentials(x.abs(), 1),
    "tanh": _tanh,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "pow": lambda x, p: (p * x.log()).exp(),
    "atan2": lambda a, b: a.atan2(b),
    # Constants stand first: a comparison with NaN fails, and it is kept.
    "max": lambda a, b: _choice(a >= b, a, b),
    "min": lambda a, b: _choice(a <= b, a, b),
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "and": lambda a, b: a * b,
    "or": lambda a, b: a + b - a * b,
    "not": lambda a: 1 - a,
    "where": _choice,
}
