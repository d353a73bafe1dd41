"""Scalar expressions of the components of a difference z: what a kernel is once its tensors are taken away.

An expression is a node of a graph in which equal expressions are one object. The constructors fold constants and apply
identities of real arithmetic that keep infinities and NaN; rounding may change by units in the last place.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from weakref import WeakValueDictionary

# One argument or two, real values.
UNARY: dict[str, Callable[[float], float]] = {
    "neg": operator.neg,
    "abs": abs,
    "sign": lambda x: float((x > 0) - (x < 0)),
    "floor": lambda x: float(math.floor(x)),
    "ceil": lambda x: float(math.ceil(x)),
    "round": lambda x: float(round(x)),
    "trunc": lambda x: float(math.trunc(x)),
    "sqrt": math.sqrt,
    "exp": math.exp,
    "exp2": lambda x: math.pow(2.0, x),
    "expm1": math.expm1,
    "log": math.log,
    "log2": math.log2,
    "log1p": math.log1p,
    "sin": math.sin,
    "cos": math.cos,
    "tan": math.tan,
    "asin": math.asin,
    "acos": math.acos,
    "atan": math.atan,
    "sinh": math.sinh,
    "cosh": math.cosh,
    "tanh": math.tanh,
    "erf": math.erf,
    "erfc": math.erfc,
}
BINARY: dict[str, Callable[[float, float], float]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "pow": math.pow,
    "atan2": math.atan2,
    "max": max,
    "min": min,
}
COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "eq": operator.eq,
    "ne": operator.ne,
}
LOGICAL = ("and", "or", "not")


class Expression:
    """What is done (`op`) to which expressions (`args`); `value` of a constant, `index` k of a component z_k."""

    __slots__ = ("__weakref__", "args", "index", "op", "place", "value")

    op: str
    args: tuple[Expression, ...]
    value: float
    index: int
    place: tuple[bool, int, bytes]

    @property
    def is_constant(self) -> bool:
        """A number."""
        return self.op == "constant"

    @property
    def is_boolean(self) -> bool:
        """True or false rather than a real."""
        return self.op in COMPARISONS or self.op in LOGICAL

    def __repr__(self) -> str:
        if self.is_constant:
            return repr(self.value)
        if self.op == "component":
            return f"z{self.index}"
        return f"{self.op}({', '.join(map(repr, self.args))})"

    def __add__(self, other: Any) -> Expression:
        return add(self, real(other))

    def __radd__(self, other: Any) -> Expression:
        return add(real(other), self)

    def __mul__(self, other: Any) -> Expression:
        return multiply(self, real(other))

    def __rmul__(self, other: Any) -> Expression:
        return multiply(real(other), self)


_nodes: WeakValueDictionary[tuple[Any, ...], Expression] = WeakValueDictionary()


def _node(op: str, *args: Expression, value: float = math.nan, index: int = -1) -> Expression:
    key = (op, args, value.hex(), index)
    found = _nodes.get(key)
    if found is None:
        found = Expression()
        found.op, found.args, found.value, found.index = op, args, value, index
        found.place = _place(op, args, value, index)
        _nodes[key] = found
    return found


def _place(op: str, args: tuple[Expression, ...], value: float, index: int) -> tuple[bool, int, bytes]:
    """Where a node stands among the arguments of a sum or product: a function of what it says, in every process.

    Constants are first, then what is simple. The order decides how products and sums are fused, so it decides bits.
    """
    depth = 1 + max((a.place[1] for a in args), default=0)
    said = b"".join([op.encode(), value.hex().encode(), str(index).encode(), *(a.place[2] for a in args)])
    return op != "constant", depth, hashlib.blake2b(said, digest_size=8).digest()


def constant(value: float) -> Expression:
    """A number."""
    return _node("constant", value=float(value))


def component(index: int) -> Expression:
    """z_k."""
    return _node("component", index=index)


ZERO, ONE = constant(0.0), constant(1.0)


def real(x: Any) -> Expression:
    """A number or an expression as a real expression; true is 1."""
    if not isinstance(x, Expression):
        return constant(x)
    return where(x, ONE, ZERO) if x.is_boolean else x


def boolean(x: Any) -> Expression:
    """A number or an expression as a condition; what is not 0 is true."""
    if isinstance(x, Expression) and x.is_boolean:
        return x
    return compare("ne", real(x), ZERO)


def lower_bound(x: Expression) -> float:
    """A number that x stays above by its form, where it is not NaN; -inf where the form tells nothing."""
    if x.is_constant:
        return x.value
    if x.op in ("abs", "sqrt", "exp", "exp2", "cosh", "erfc"):
        return 0.0
    if x.op == "mul" and x.args[0] is x.args[1]:
        return 0.0
    if x.op not in ("add", "mul", "div", "min", "max", "log2"):
        return -math.inf
    bounds = [lower_bound(a) for a in x.args]
    if x.op in ("min", "max"):
        return BINARY[x.op](*bounds)
    if x.op == "log2":
        return math.log2(bounds[0]) if bounds[0] > 0 else -math.inf
    if x.op == "add":
        return sum(bounds)
    # The smallest product is 0 · ∞, which is NaN, or not below 0.
    return 0.0 if min(bounds) >= 0 else -math.inf


def is_non_negative(x: Expression) -> bool:
    """Whether x ≥ 0 (or NaN) follows from its form."""
    return lower_bound(x) >= 0


def is_non_positive(x: Expression) -> bool:
    """Whether x ≤ 0 (or NaN) follows from its form."""
    if x.is_constant:
        return x.value <= 0
    if x.op == "neg":
        return is_non_negative(x.args[0])
    if x.op == "mul" and x.args[0].is_constant:
        return x.args[0].value <= 0 and is_non_negative(x.args[1])
    return x.op == "sub" and is_non_positive(x.args[0]) and is_non_negative(x.args[1])


def unary(op: str, x: Expression) -> Expression:
    """f(x) for a function in `UNARY`."""
    x = real(x)
    if x.is_constant:
        try:
            return constant(UNARY[op](x.value))
        except (ValueError, OverflowError):
            return _node(op, x)
    if op == "neg":
        return _negative(x)
    if (op == "abs" and is_non_negative(x)) or (op in ("abs", "floor", "round", "trunc", "ceil") and x.op == op):
        return x
    if op == "abs" and x.op == "neg":
        return unary("abs", x.args[0])
    return _node(op, x)


def _negative(x: Expression) -> Expression:
    if x.op == "neg":
        return x.args[0]
    if x.op == "mul" and x.args[0].is_constant:
        return multiply(constant(-x.args[0].value), x.args[1])
    if x.op == "sub":
        return subtract(x.args[1], x.args[0])
    return _node("neg", x)


def add(a: Expression, b: Expression) -> Expression:
    """A + b."""
    a, b = real(a), real(b)
    if a.is_constant and b.is_constant:
        return constant(a.value + b.value)
    for x, other in ((a, b), (b, a)):
        if x is ZERO:
            return other
        if x.op == "neg":
            return subtract(other, x.args[0])
    return _node("add", *_ordered(a, b))


def subtract(a: Expression, b: Expression) -> Expression:
    """A - b."""
    a, b = real(a), real(b)
    if a.is_constant and b.is_constant:
        return constant(a.value - b.value)
    if b is ZERO:
        return a
    if a is ZERO:
        return _negative(b)
    if b.op == "neg":
        return add(a, b.args[0])
    return _node("sub", a, b)


def multiply(a: Expression, b: Expression) -> Expression:
    """A b, signs and constants in front."""
    a, b = _ordered(real(a), real(b))
    if a.is_constant and b.is_constant:
        return constant(a.value * b.value)
    if a is ONE:
        return b
    if a.is_constant and a.value == -1:
        return _negative(b)
    if a.op == "neg" or b.op == "neg":
        return _negative_product(a, b)
    for x, other in ((a, b), (b, a)):
        if x.op == "mul" and _is_moderate(x.args[0]) and not (other.is_constant and not _is_moderate(other)):
            first, second = x.args
            if other.is_constant:
                return multiply(multiply(first, other), second)
            return multiply(first, multiply(second, other))
    if a is b and a.op == "sqrt" and is_non_negative(a.args[0]):
        return a.args[0]
    return _node("mul", a, b)


def _is_moderate(x: Expression) -> bool:
    """A constant that may change its place in a product: others are there to keep float32 within its range."""
    return x.is_constant and 1e-3 <= abs(x.value) <= 1e3


def _negative_product(a: Expression, b: Expression) -> Expression:
    negative = (a.op == "neg") != (b.op == "neg")
    a, b = (x.args[0] if x.op == "neg" else x for x in (a, b))
    product = multiply(a, b)
    return _negative(product) if negative else product


def divide(a: Expression, b: Expression) -> Expression:
    """A / b; by a constant, its reciprocal times a."""
    a, b = real(a), real(b)
    if b.is_constant and 1e-30 <= abs(b.value) <= 1e30:
        return multiply(constant(1 / b.value), a)
    if a.op == "neg":
        return _negative(divide(a.args[0], b))
    if b.op == "neg":
        return _negative(divide(a, b.args[0]))
    if a.op == "mul" and _is_moderate(a.args[0]):
        return multiply(a.args[0], divide(a.args[1], b))
    return _node("div", a, b)


def power(x: Expression, p: Expression) -> Expression:
    """x^p, by products and square roots where 4 p is a small whole number."""
    x, p = real(x), real(p)
    if not p.is_constant:
        return unary("exp", multiply(p, unary("log", x))) if x.is_constant and x.value > 0 else _node("pow", x, p)
    q = p.value
    if x.is_constant:
        try:
            return constant(math.pow(x.value, q))
        except (ValueError, OverflowError, ZeroDivisionError):
            return _node("pow", x, p)
    if x.op == "sqrt" and is_non_negative(x.args[0]) and q > 0:
        return power(x.args[0], constant(q / 2))
    if q == 0:
        return ONE
    quarters = 4 * q
    # (-∞)^½ is ∞ for pow and NaN for a root, and a fourth root of a negative number is NaN for both.
    exactly = quarters.is_integer() and abs(q) <= 16 and (q.is_integer() or is_non_negative(x))
    if not exactly:
        return _node("pow", x, p)
    if q < 0:
        return divide(ONE, power(x, constant(-q)))
    whole, rest = divmod(int(quarters), 4)
    factors = [_whole_power(x, whole)] if whole else []
    root = unary("sqrt", x) if rest else x
    if rest & 2:
        factors.append(root)
    if rest & 1:
        factors.append(unary("sqrt", root))
    result = factors[0]
    for factor in factors[1:]:
        result = multiply(result, factor)
    return result


def _whole_power(x: Expression, n: int) -> Expression:
    if n == 1:
        return x
    half = _whole_power(x, n // 2)
    square = multiply(half, half)
    return multiply(square, x) if n % 2 else square


def extremum(op: str, a: Expression, b: Expression) -> Expression:
    """The larger ("max") or smaller ("min") of two; NaN where one is NaN."""
    a, b = _ordered(real(a), real(b))
    if a is b:
        return a
    if a.is_constant and b.is_constant and not (math.isnan(a.value) or math.isnan(b.value)):
        return constant(BINARY[op](a.value, b.value))
    return _node(op, a, b)


def compare(op: str, a: Expression, b: Expression) -> Expression:
    """A condition in `COMPARISONS`."""
    a, b = real(a), real(b)
    if a.is_constant and b.is_constant and COMPARISONS[op](a.value, b.value):
        return _node("le", ZERO, ZERO)
    return _node(op, a, b)


def conjunction(op: str, *conditions: Expression) -> Expression:
    """Conditions joined by "and" or "or", or "not" of one."""
    return _node(op, *map(boolean, conditions))


def where(condition: Expression, a: Expression, b: Expression) -> Expression:
    """A where the condition holds, b elsewhere."""
    condition, a, b = boolean(condition), real(a), real(b)
    if a is b:
        return a
    if condition.op in COMPARISONS and all(x.is_constant for x in condition.args):
        left, right = (x.value for x in condition.args)
        return a if COMPARISONS[condition.op](left, right) else b
    return _node("where", condition, a, b)


def arc_tangent(a: Expression, b: Expression) -> Expression:
    """The angle of the point (b, a)."""
    return _node("atan2", real(a), real(b))


def _ordered(a: Expression, b: Expression) -> tuple[Expression, Expression]:
    """By their places: a + b and b + a are one expression."""
    return (a, b) if a.place <= b.place else (b, a)


def in_order(expressions: Iterable[Expression]) -> Iterator[Expression]:
    """All nodes below the expressions, each once and after its arguments."""
    seen: set[Expression] = set()
    stack = [(e, False) for e in reversed(list(expressions))]
    while stack:
        node, ready = stack.pop()
        if ready:
            yield node
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((a, False) for a in reversed(node.args) if a not in seen)


def rebuilt(
    expressions: Iterable[Expression], replace: Callable[[Expression, list[Expression]], Expression | None]
) -> list[Expression]:
    """The same expressions with some nodes replaced: replace(node, its new arguments), None where it stays."""
    expressions = list(expressions)
    new: dict[Expression, Expression] = {}
    for node in in_order(expressions):
        args = [new[a] for a in node.args]
        new[node] = replace(node, args) or _again(node, args)
    return [new[e] for e in expressions]


def _again(node: Expression, args: list[Expression]) -> Expression:
    if not args:
        return node
    known: dict[str, Callable[..., Expression]] = {
        "add": add,
        "sub": subtract,
        "mul": multiply,
        "div": divide,
        "pow": power,
        "where": where,
        "atan2": arc_tangent,
    }
    if node.op in known:
        return known[node.op](*args)
    if node.op in UNARY:
        return unary(node.op, args[0])
    if node.op in COMPARISONS:
        return compare(node.op, *args)
    return conjunction(node.op, *args) if node.op in LOGICAL else extremum(node.op, *args)
