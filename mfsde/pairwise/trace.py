"""From a kernel written with torch operations to scalar expressions of the components of z.

The kernel runs once on a probe while every torch operation, those of its backward pass included, is repeated on arrays
of expressions. So whatever the kernel is made of, what is left is arithmetic between numbers.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import math
import types
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import expression as ex
from .expression import Expression
from .kernel import Kernel

# Expressions beyond this size gain nothing from a compiler.
LARGEST = 4000
# Traces of functions that are written anew at each call are kept by what the functions say.
KEPT = 256

Array = NDArray[Any]


# A tensor that a kernel closes over, its version, and whether it required a gradient.
Seen = tuple[Tensor, int, bool]


def _are_current(tensors: Sequence[Seen]) -> bool:
    return all(t._version == version and t.requires_grad == required for t, version, required in tensors)


class UntraceableError(ValueError):
    """Why a kernel is no expression of the components of z, as long as the `tensors` that it closes over stay."""

    tensors: tuple[Seen, ...] = ()

    def is_current(self) -> bool:
        """Whether the reason may still hold."""
        return _are_current(self.tensors)


@dataclass(frozen=True, eq=False)
class Trace:
    """K(z) as scalar expressions.

    outputs: one for each entry of K(z), in row-major order; shape: of K(z); dim: of z.
    made: what other files derived from it once (polynomials, libraries).
    """

    outputs: tuple[Expression, ...]
    shape: tuple[int, ...]
    dim: int
    tensors: tuple[Seen, ...] = ()
    made: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def reversed(self) -> Trace:
        """The kernel K(-z)."""
        outputs = ex.rebuilt(self.outputs, lambda z, _: ex.unary("neg", z) if z.op == "component" else None)
        return Trace(tuple(outputs), self.shape, self.dim)

    def is_current(self) -> bool:
        """Whether the tensors that the kernel closes over are still the numbers that they were."""
        return _are_current(self.tensors)

    def __call__(self, z: Tensor) -> Tensor:
        """K(z) by its expressions.    (..., d) -> (..., *shape)."""
        values = evaluated(self.outputs, list(z.unbind(-1)))
        like = z[..., 0]
        parts = [torch.as_tensor(v, dtype=z.dtype, device=z.device).expand(like.shape) for v in values]
        return torch.stack(parts, dim=-1).reshape(*like.shape, *self.shape)


def trace(kernel: Kernel, like: Tensor) -> Trace:
    """The expressions of a kernel of differences (..., d), compared with the kernel itself.    like: (..., d).

    Raises:
        UntraceableError: an operation without an expression, a value that depends on data, or a disagreement.

    """
    dim, key = like.shape[-1], "trace"
    known = kernel.facts(like)
    found = known.get(key)
    if found is None or not found.is_current():
        found = known[key] = _of_function(kernel, dim, like)
    if isinstance(found, UntraceableError):
        raise found
    return found


_of_functions: OrderedDict[Hashable, Trace | UntraceableError] = OrderedDict()


def _of_function(kernel: Kernel, dim: int, like: Tensor) -> Trace | UntraceableError:
    name = kernel_identity(kernel)
    key = None if name is None else (name, dim, like.dtype, like.device)
    if key in _of_functions:
        _of_functions.move_to_end(key)
        return _of_functions[key]
    found = _traced(kernel, dim, like)
    if key is not None and not found.tensors:
        _of_functions[key] = found
        if len(_of_functions) > KEPT:
            _of_functions.popitem(last=False)
    return found


def _traced(kernel: Kernel, dim: int, like: Tensor) -> Trace | UntraceableError:
    # In double precision where the kernel takes it: constants keep their digits, and the comparison can be sharp.
    for dtype in dict.fromkeys((torch.float64, like.dtype)):
        recorder = _Recorder()
        try:
            found = recorded(kernel, dim, dtype, like.device, recorder)
            for precision in dict.fromkeys((dtype, like.dtype)):
                check(found, kernel, _probes_at(like, precision))
            return found
        except UntraceableError as error:
            error.tensors = recorder.seen()
            return error
        except Exception as error:
            # Whatever a kernel does on a probe, its sums can be evaluated by its own operations.
            reason = UntraceableError(f"it raised {type(error).__name__} on a probe: {error!s:.200}")
            reason.tensors = recorder.seen()
    return reason


def recorded(kernel: Kernel, dim: int, dtype: torch.dtype, device: torch.device, recorder: _Recorder) -> Trace:
    """The expressions of a kernel, not yet compared with it."""
    probe = torch.linspace(0.37, 0.91, dim, dtype=dtype, device=device).reshape(1, 1, dim)
    recorder.know(probe, np.array([ex.component(k) for k in range(dim)], dtype=object).reshape(1, 1, dim))
    # With a graph, so that what derives from a tensor that requires a gradient is seen to require one.
    with recorder, torch.enable_grad():
        value = kernel(probe)
    if tuple(value.shape[:2]) != (1, 1):
        raise UntraceableError(f"it returned shape {tuple(value.shape)} for differences {tuple(probe.shape)}")
    entries = recorder.expressions(value).reshape(-1)
    outputs = tuple(ex.real(e) for e in entries)
    if sum(1 for _ in ex.in_order(outputs)) > LARGEST:
        raise UntraceableError(f"it needs more than {LARGEST} scalar operations per pair")
    return Trace(outputs, tuple(value.shape[2:]), dim, recorder.seen())


# Differences at which expressions are compared: of several sizes, and some of the points themselves.
SAMPLE = 64


def _probes_at(like: Tensor, dtype: torch.dtype) -> Tensor:
    """(5 or 6, SAMPLE, d)."""
    d = like.shape[-1]
    # Keyed by nothing but the dimension, and apart from every generator of the program.
    z = torch.randn(5, SAMPLE, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64)
    z = (z * torch.tensor([0.0, 0.03, 0.3, 1.0, 10.0]).reshape(5, 1, 1)).to(device=like.device, dtype=dtype)
    apart = differences_among(like).to(dtype)
    return z if len(apart) == 0 else torch.cat([z, apart[torch.arange(SAMPLE) % len(apart)][None]])


def differences_among(points: Tensor) -> Tensor:
    """Finite differences, none of them 0, between points that are far apart by their numbers.    (<= SAMPLE, d)."""
    y = points.detach().reshape(-1, points.shape[-1])
    n = len(y)
    first = torch.arange(min(n, SAMPLE), device=y.device) * n // max(1, min(n, SAMPLE))
    z = y[first] - y[(first + n // 2 + first % 7) % n]
    return z[(z.isfinite() & (z.abs().amax(-1, keepdim=True) > 0)).all(-1)]


def check(found: Trace, kernel: Kernel, z: Tensor) -> None:
    """Compare expressions and kernel at differences of several sizes.    z: (sizes, n, d).

    Raises:
        UntraceableError: they disagree, or no finite value is there to be compared.

    """
    with torch.no_grad():
        theirs, ours = kernel(z).to(torch.float64), found(z).to(torch.float64)
        if theirs.shape != ours.shape:
            raise UntraceableError(f"it returned shape {tuple(theirs.shape)} for differences {tuple(z.shape)}")
        tolerance = 1e-9 if z.dtype == torch.float64 else 1e-3
        size = theirs.abs().nan_to_num(0.0, 0.0, 0.0)
        size = tolerance * (size + size.mean(tuple(range(1, size.ndim)), keepdim=True) * 1e-3)
        equal = ((theirs - ours).abs() <= size) | (theirs == ours) | (theirs.isnan() & ours.isnan())
        if not bool(equal.all()):
            equal |= (theirs - ours).abs() <= size + jumps(kernel, z, theirs)
    if not bool(equal.all()):
        k = int((~equal).long().argmax())
        raise UntraceableError(
            f"its expressions give {float(ours.flatten()[k]):.6g} where it gives {float(theirs.flatten()[k]):.6g}; "
            "perhaps it does not act entry by entry, or calls what torch does not see"
        )
    if not bool(theirs.isfinite().flatten(0, 1).any(0).all()):
        raise UntraceableError("it is finite at none of the differences at which its expressions would be compared")


def jumps(kernel: Kernel, z: Tensor, values: Tensor) -> Tensor:
    """What a rounding of z does to K(z): all of a step, where z is at its edge."""
    nudge = 4 * torch.finfo(z.dtype).eps
    around = [(kernel(z * (1 + sign * nudge)).to(values.dtype) - values).abs() for sign in (1, -1)]
    return torch.maximum(*around).nan_to_num(0.0, 0.0, 0.0)


# Expressions by torch operations --------------------------------------------------------------------------------------

_TORCH_BINARY: dict[str, Callable[..., Any]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.true_divide,
    "pow": torch.pow,
    "atan2": torch.atan2,
    "max": torch.maximum,
    "min": torch.minimum,
    "and": torch.logical_and,
    "or": torch.logical_or,
    **{op: getattr(torch, op) for op in ex.COMPARISONS},
}


def evaluated(outputs: Sequence[Expression], components: Sequence[Tensor]) -> list[Tensor | float]:
    """Expressions of tensors z_1, ..., z_d that broadcast; constants stay numbers."""
    values: dict[Expression, Any] = {}
    like = components[0]
    for node in ex.in_order(outputs):
        args = [values[a] for a in node.args]
        values[node] = _value(node, args, components, like)
    return [values[e] for e in outputs]


def _value(node: Expression, args: list[Any], components: Sequence[Tensor], like: Tensor) -> Any:
    if node.is_constant:
        # As in the dtype of z, which may hold less.
        return math.copysign(math.inf, node.value) if abs(node.value) > torch.finfo(like.dtype).max else node.value
    if node.op == "component":
        return components[node.index]
    if node.op in ("add", "sub", "mul", "div") and any(isinstance(a, Tensor) for a in args):
        return ex.BINARY[node.op](*args)
    if node.op == "where":
        return torch.where(_tensor(args[0], like), args[1], args[2])
    args = [_tensor(a, like) for a in args]
    if node.op in ex.UNARY or node.op == "not":
        return getattr(torch, "logical_not" if node.op == "not" else node.op)(*args)
    return _TORCH_BINARY[node.op](*args)


def _tensor(value: Any, like: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else like.new_tensor(value)


# The recorder ---------------------------------------------------------------------------------------------------------


class _Recorder(TorchDispatchMode):
    """Runs torch operations, and repeats those that depend on z on arrays of expressions."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # The default loads all of torch.compile at the first operation, 1.5 s.
        return False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Tensors are kept alive, so that no other takes their identity.
        self._known: dict[int, tuple[Tensor, Array]] = {}
        self._made: dict[int, Any] = {}
        # Those that the kernel did not make itself.
        self.constants: dict[int, Tensor] = {}

    def seen(self) -> tuple[Seen, ...]:
        return tuple((t, t._version, t.requires_grad) for t in self.constants.values())

    def know(self, tensor: Tensor, entries: Array) -> None:
        self._known[id(tensor)] = (tensor, entries)

    def depends(self, value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return any(map(self.depends, value))
        return isinstance(value, Tensor) and id(value) in self._known

    def expressions(self, value: Any) -> Any:
        """A tensor as an array of expressions, numbers where it does not depend on z."""
        if isinstance(value, (list, tuple)):
            return [self.expressions(v) for v in value]
        if not isinstance(value, Tensor):
            return value
        if id(value) in self._known:
            return self._known[id(value)][1]
        if value.numel() > LARGEST:
            raise UntraceableError(f"it closes over a tensor of {value.numel()} entries")
        numbers = value.detach().cpu().reshape(-1).tolist()
        entries = np.empty(len(numbers), dtype=object)
        entries[:] = [ex.constant(v) for v in numbers]
        return entries.reshape(tuple(value.shape))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise UntraceableError(f"it draws random numbers ({name})")
        if name != "lift_fresh":
            self._meet((*args, *kwargs.values()))
        if not (self.depends(args) or self.depends(tuple(kwargs.values()))):
            result = func(*args, **kwargs)
            for part in result if isinstance(result, (list, tuple)) else [result]:
                self._made[id(part)] = part
            return result
        if name not in _OPERATIONS and name.removesuffix("_") not in _OPERATIONS:
            return self._decomposed(func, name, args, kwargs)
        in_place = func._schema.is_mutable
        # Torch first: where shapes do not fit, its message is the better one.
        result = func(*args, **kwargs)
        with np.errstate(all="ignore"):
            rule = _OPERATIONS.get(name) or _OPERATIONS[name.removesuffix("_")]
            entries = rule(*self.expressions(args), **{k: self.expressions(v) for k, v in kwargs.items()})
        if in_place:
            if id(args[0]) not in self._known:
                raise UntraceableError(f"it writes into a tensor that it did not make from z ({name}); use torch.stack")
            target = self._known[id(args[0])][1]
            if not target.flags.writeable:
                raise UntraceableError(f"it writes into an expanded tensor ({name})")
            target[...] = entries
            return result
        self._keep(result, entries, name)
        return result

    def _meet(self, value: Any) -> None:
        """Remember the tensors that come from outside."""
        if isinstance(value, (list, tuple)):
            for part in value:
                self._meet(part)
        elif isinstance(value, Tensor) and id(value) not in self._known and id(value) not in self._made:
            self.constants[id(value)] = value
            if value.requires_grad:
                raise UntraceableError("it depends on a tensor that requires a gradient, which would be lost")

    def _keep(self, result: Any, entries: Any, name: str) -> None:
        if not isinstance(result, Tensor):
            for part, one in zip(result, entries, strict=True):
                self._keep(part, one, name)
            return
        entries = np.asarray(entries, dtype=object)
        if entries.shape != tuple(result.shape):
            raise UntraceableError(f"its operation {name} has shape {tuple(result.shape)}, not {entries.shape}")
        self.know(result, entries)

    def _decomposed(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero"):
            raise UntraceableError(f"it decides by the value of z ({name}); use torch.where")
        with self:
            result = func.decompose(*args, **kwargs)
            if result is NotImplemented:
                from torch._decomp import decomposition_table

                rule = decomposition_table.get(func)
                if rule is None:
                    raise UntraceableError(f"its operation {name.removeprefix('prims::')} has no scalar expression")
                result = rule(*args, **kwargs)
        return result


def _entrywise(function: Callable[..., Expression], n: int) -> Callable[..., Array]:
    over = np.frompyfunc(function, n, 1)
    return lambda *args: np.asarray(over(*args), dtype=object)


def _unary(op: str) -> Callable[..., Array]:
    return _entrywise(functools.partial(ex.unary, op), 1)


_add, _sub, _mul, _div, _pow = (_entrywise(f, 2) for f in (ex.add, ex.subtract, ex.multiply, ex.divide, ex.power))
_max, _min = (_entrywise(functools.partial(ex.extremum, op), 2) for op in ("max", "min"))
_where = _entrywise(ex.where, 3)
_exp, _log, _sqrt, _neg, _abs, _sign = map(_unary, ("exp", "log", "sqrt", "neg", "abs", "sign"))
_real = _entrywise(ex.real, 1)


def _reciprocal(x: Any) -> Array:
    return _div(1.0, x)


def _sigmoid(x: Any) -> Array:
    return _reciprocal(_add(1.0, _exp(_neg(x))))


def _divided(x: Any, y: Any, *, rounding_mode: str | None = None) -> Array:
    if rounding_mode is None:
        return _div(x, y)
    return _unary(rounding_mode)(_div(x, y))


def _no_remainder(*_: Any, **__: Any) -> Array:
    # x - y floor(x / y) is noise where x / y has no fraction left, and the exact one is no faster than torch's.
    raise UntraceableError("it takes a remainder, which has no accurate scalar expression")


def _clamped(x: Any, low: Any = None, high: Any = None, **limits: Any) -> Array:
    low, high = limits.get("min", low), limits.get("max", high)
    x = _real(x) if low is None else _max(x, low)
    return x if high is None else _min(x, high)


def _axes(x: Array, dim: Any) -> tuple[int, ...]:
    if dim is None or dim == []:
        return tuple(range(x.ndim))
    return tuple(d % x.ndim for d in ([dim] if isinstance(dim, int) else dim)) if x.ndim else ()


def _reduced(over: Callable[..., Array]) -> Callable[..., Array]:
    """A sum, product or extremum over axes, by halves: short chains of dependent operations."""

    def reduce(x: Any, dim: Any = None, keepdim: bool = False, **_: Any) -> Array:
        axes = _axes(x, dim)
        kept = [k for k in range(x.ndim) if k not in axes]
        parts = x.transpose(*kept, *axes).reshape([x.shape[k] for k in kept] + [-1])
        while parts.shape[-1] > 1:
            n = parts.shape[-1]
            joined = over(parts[..., : n - 1 : 2], parts[..., 1::2])
            parts = np.concatenate([joined, parts[..., n - 1 :]], axis=-1) if n % 2 else joined
        shape = [1 if k in axes else x.shape[k] for k in range(x.ndim)]
        return _real(parts).reshape(shape if keepdim else [x.shape[k] for k in kept])

    return reduce


_sum = _reduced(_add)


def _mean(x: Any, dim: Any = None, keepdim: bool = False, **_: Any) -> Array:
    count = math.prod(x.shape[k] for k in _axes(x, dim))
    return _div(_sum(x, dim, keepdim), float(count))


def _norm(x: Any, order: float = 2.0, dim: Any = None, keepdim: bool = False, **_: Any) -> Array:
    if order == 2:
        return _sqrt(_sum(_mul(x, x), dim, keepdim))
    if order == 1:
        return _sum(_abs(x), dim, keepdim)
    if math.isinf(order):
        return _reduced(_max if order > 0 else _min)(_abs(x), dim, keepdim)
    return _pow(_sum(_pow(_abs(x), order), dim, keepdim), 1.0 / order)


def _matrix_product(a: Any, b: Any) -> Array:
    return np.asarray(np.matmul(a, b), dtype=object)


def _expanded(x: Any, size: Sequence[int], **_: Any) -> Array:
    own = [1] * (len(size) - x.ndim) + list(x.shape)
    return np.broadcast_to(x, [o if s == -1 else s for s, o in zip(size, own, strict=True)])


def _squeezed(x: Any, dim: Any = None) -> Array:
    axes = _axes(x, dim)
    return np.reshape(x, [n for k, n in enumerate(x.shape) if not (k in axes and n == 1)])


def _sliced(x: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Array:
    return x[(slice(None),) * (dim % x.ndim) + (slice(start, end, step),)]  # type: ignore[no-any-return]


def _selected(x: Any, dim: int, index: int) -> Array:
    at = index % x.shape[dim]
    return np.squeeze(_sliced(x, dim, at, at + 1), axis=dim)  # a view, whatever is left of the axes


def _split(x: Any, size: Any, dim: int = 0) -> list[Array]:
    n = x.shape[dim]
    sizes = [size] * (n // size) + ([n % size] if n % size else []) if isinstance(size, int) else size
    return list(np.split(x, np.cumsum(sizes)[:-1], axis=dim))


def _unbound(x: Any, dim: int = 0) -> list[Array]:
    return [_selected(x, dim, k) for k in range(x.shape[dim])]


def _zeros(shape: Any) -> Array:
    return np.full(tuple(shape), ex.ZERO, dtype=object)


def _select_backward(slope: Any, sizes: Any, dim: int, index: int) -> Array:
    whole = _zeros(sizes)
    whole[(slice(None),) * (dim % whole.ndim) + (index,)] = slope
    return whole


def _slice_backward(slope: Any, sizes: Any, dim: int, start: int, end: int, step: int) -> Array:
    whole = _zeros(sizes)
    whole[(slice(None),) * (dim % whole.ndim) + (slice(start, end, step),)] = slope
    return whole


def _full_like(x: Any, value: Any, **_: Any) -> Array:
    return np.full(x.shape, ex.constant(value), dtype=object)


def _converted(x: Any, *, dtype: torch.dtype | None = None, **_: Any) -> Array:
    if dtype is None or dtype == torch.bool:
        return x if dtype is None else _entrywise(ex.boolean, 1)(x)
    if not dtype.is_floating_point:
        raise UntraceableError(f"it turns z into {dtype}")
    return _real(x)


def _indexed(x: Any, indices: Any) -> Array:
    where = tuple(slice(None) if i is None else _numbers(i) for i in indices)
    return np.asarray(x[where], dtype=object)


def _numbers(index: Array) -> Array:
    """Indices that do not depend on z."""
    if not all(isinstance(e, Expression) and e.is_constant for e in index.reshape(-1)):
        raise UntraceableError("it indexes by the value of z; use torch.where")
    return np.asarray([int(e.value) for e in index.reshape(-1)], dtype=np.int64).reshape(index.shape)


def _copy(x: Any, *_: Any, **__: Any) -> Array:
    return np.array(x, dtype=object)


def _same(x: Any, *_: Any, **__: Any) -> Any:
    return x


def _scaled_add(x: Any, y: Any, *, alpha: Any = 1) -> Array:
    return _add(x, y if alpha == 1 else _mul(y, alpha))


def _scaled_sub(x: Any, y: Any, *, alpha: Any = 1) -> Array:
    return _sub(x, y if alpha == 1 else _mul(y, alpha))


def _comparison(op: str) -> Callable[..., Array]:
    return _entrywise(functools.partial(ex.compare, op), 2)


def _logical(op: str, n: int) -> Callable[..., Array]:
    return _entrywise(functools.partial(ex.conjunction, op), n)


def _tanh_backward(slope: Any, y: Any) -> Array:
    return _mul(slope, _sub(1.0, _mul(y, y)))


def _sigmoid_backward(slope: Any, y: Any) -> Array:
    return _mul(slope, _mul(y, _sub(1.0, y)))


def _threshold_backward(slope: Any, x: Any, threshold: Any) -> Array:
    return _where(_comparison("le")(x, threshold), 0.0, slope)


_OPERATIONS: dict[str, Callable[..., Any]] = {
    **{op: _unary(op) for op in ex.UNARY if op not in ("div", "pow")},
    **{op: _comparison(op) for op in ex.COMPARISONS},
    "add": _scaled_add,
    "sub": _scaled_sub,
    "rsub": lambda x, y, alpha=1: _scaled_sub(y, x, alpha=alpha),
    "mul": _mul,
    "div": _divided,
    "pow": _pow,
    "square": lambda x: _mul(x, x),
    "reciprocal": _reciprocal,
    "rsqrt": lambda x: _reciprocal(_sqrt(x)),
    "log10": lambda x: _mul(1 / math.log(10), _log(x)),
    "sgn": _sign,
    "frac": lambda x: _sub(x, _unary("trunc")(x)),
    "remainder": _no_remainder,
    "fmod": _no_remainder,
    "atan2": _entrywise(ex.arc_tangent, 2),
    "sigmoid": _sigmoid,
    "relu": lambda x: _max(x, 0.0),
    "clamp": _clamped,
    "clamp_min": lambda x, low: _clamped(x, low),
    "clamp_max": lambda x, high: _clamped(x, None, high),
    "hardtanh": lambda x, low=-1.0, high=1.0: _clamped(x, low, high),
    "maximum": _max,
    "minimum": _min,
    "where": _where,
    "masked_fill": lambda x, mask, value: _where(mask, value, x),
    "logical_and": _logical("and", 2),
    "logical_or": _logical("or", 2),
    "logical_not": _logical("not", 1),
    "bitwise_and": _logical("and", 2),
    "bitwise_or": _logical("or", 2),
    "bitwise_not": _logical("not", 1),
    "isnan": lambda x: _comparison("ne")(x, x),
    "addcmul": lambda x, a, b, *, value=1: _add(x, _mul(value, _mul(a, b))),
    "addcdiv": lambda x, a, b, *, value=1: _add(x, _mul(value, _div(a, b))),
    "lerp": lambda a, b, t: _add(a, _mul(t, _sub(b, a))),
    "tanh_backward": _tanh_backward,
    "sigmoid_backward": _sigmoid_backward,
    "threshold_backward": _threshold_backward,
    "sum": _sum,
    "mean": _mean,
    "prod": _reduced(_mul),
    "amax": _reduced(_max),
    "amin": _reduced(_min),
    "linalg_vector_norm": _norm,
    "norm": lambda x, p=2.0, dim=None, keepdim=False, **_: _norm(x, 2.0 if p is None else p, dim, keepdim),
    "mm": _matrix_product,
    "bmm": _matrix_product,
    "mv": _matrix_product,
    "dot": _matrix_product,
    "addmm": lambda c, a, b, *, beta=1, alpha=1: _add(_mul(beta, c), _mul(alpha, _matrix_product(a, b))),
    "view": lambda x, size: x.reshape(size),
    "_unsafe_view": lambda x, size: x.reshape(size),
    "reshape": lambda x, size: x.reshape(size),
    "expand": _expanded,
    "unsqueeze": lambda x, dim: np.expand_dims(x, dim),
    "squeeze": _squeezed,
    "permute": lambda x, dims: x.transpose(dims),
    "transpose": lambda x, a, b: np.swapaxes(x, a, b),
    "t": lambda x: x.T,
    "select": _selected,
    "slice": _sliced,
    "split": _split,
    "split_with_sizes": _split,
    "unbind": _unbound,
    "cat": lambda parts, dim=0: np.concatenate(parts, axis=dim),
    "stack": lambda parts, dim=0: np.stack(parts, axis=dim),
    "repeat": lambda x, times: np.tile(x, times),
    "flip": np.flip,
    "roll": lambda x, shifts, dims=(): np.roll(x, tuple(shifts), tuple(dims) or None),
    "diagonal": lambda x, offset=0, dim1=0, dim2=1: np.diagonal(x, offset, dim1, dim2),
    "index": _indexed,
    "index_select": lambda x, dim, index: np.take(x, _numbers(index), axis=dim),
    "cumsum": lambda x, dim, **_: np.cumsum(_real(x), axis=dim),
    "cumprod": lambda x, dim, **_: np.cumprod(_real(x), axis=dim),
    "select_backward": _select_backward,
    "slice_backward": _slice_backward,
    "clone": _copy,
    "detach": _same,
    "real": _same,
    "alias": _same,
    "lift_fresh": _same,
    "_to_copy": _converted,
    "copy_": lambda x, y, *_: np.broadcast_to(_real(y), x.shape),
    "fill_": lambda x, value: _full_like(x, value),
    "zero_": lambda x: _zeros(x.shape),
    "ones_like": lambda x, **_: _full_like(x, 1.0),
    "zeros_like": lambda x, **_: _full_like(x, 0.0),
    "empty_like": lambda x, **_: _full_like(x, math.nan),
    "full_like": _full_like,
    "new_zeros": lambda x, size, **_: _zeros(size),
    "new_ones": lambda x, size, **_: np.full(tuple(size), ex.ONE, dtype=object),
    "new_full": lambda x, size, value, **_: np.full(tuple(size), ex.constant(value), dtype=object),
    "new_empty": lambda x, size, **_: np.full(tuple(size), ex.constant(math.nan), dtype=object),
}


# The identity of a function -------------------------------------------------------------------------------------------


def kernel_identity(kernel: Kernel) -> Hashable | None:
    """What a kernel says, where that can be compared; None elsewhere."""
    if kernel.potential is not None:
        name = identity(kernel.potential.function)
        return None if name is None else ("slope", name)
    return identity(kernel.function)


# Modules and classes whose attributes stay as they are: those of users may change.
_CONSTANT_MODULES = ("builtins", "torch", "math", "numpy", __name__.partition(".")[0])
# What reads names that the code does not show.
_DYNAMIC = {"getattr", "setattr", "vars", "locals", "globals", "eval", "exec", "__import__", "__dict__", "__class__"}
_DYNAMIC |= {"attrgetter", "methodcaller"}
# What operators call without naming it.
_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
_OPERATORS = {f"__{side}{op}__" for op in _BINARY for side in ("", "r")}
_OPERATORS |= {"__call__", "__getitem__", "__len__", "__iter__", "__next__", "__contains__", "__bool__", "__neg__"}
_OPERATORS |= {"__abs__", "__pos__", "__float__", "__int__", "__index__", "__eq__", "__ne__", "__lt__", "__le__"}
_OPERATORS |= {"__gt__", "__ge__", "__enter__", "__exit__", "__torch_function__", "__getattr__", "__getattribute__"}
# How deep functions of functions are read.
DEPTH = 8


def identity(value: Any) -> Hashable | None:
    """Equal for functions that do the same: code, defaults, what they close over or find in their module.

    Of a frozen dataclass, its fields and whatever else of it some function names: methods, properties, attributes of
    the class. None where that cannot be told: tensors and other objects that may change.
    """
    reader = _Reader()
    while True:
        names = len(reader.names)
        found = reader.read(value, DEPTH)
        # What is named in a function that is read late may be an attribute of an object that was read before it.
        if found is None or not reader.met_objects or len(reader.names) == names:
            return found


class _Reader:
    """Reads values; `names` are all that the functions among them name."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.met_objects = False

    def read(self, value: Any, depth: int) -> Hashable | None:
        if value is None or isinstance(value, (bool, int, str, bytes, torch.dtype, torch.device)):
            return (type(value).__name__, value)
        if isinstance(value, float):
            return ("float", value.hex())
        if depth == 0:
            return None
        if isinstance(value, types.ModuleType):
            return ("object", value) if _is_constant(value.__name__) else None
        if isinstance(value, type):
            return ("object", value) if _is_constant(value.__module__) else None
        if isinstance(value, types.BuiltinFunctionType):
            of_module = value.__self__ is None or isinstance(value.__self__, types.ModuleType)
            # torch's own are static methods of a class.
            return ("object", value) if of_module or isinstance(value.__self__, type) else None
        if isinstance(value, (tuple, frozenset)):
            return self._all("tuple", value, depth)
        if isinstance(value, functools.partial):
            return self._all("partial", (value.func, value.args, tuple(sorted(value.keywords.items()))), depth)
        if isinstance(value, types.MethodType):
            return self._all("method", (value.__func__, value.__self__), depth)
        if isinstance(value, types.FunctionType):
            return self._function(value, depth)
        parameters = getattr(type(value), "__dataclass_params__", None)
        return self._object(value, depth) if parameters is not None and parameters.frozen else None

    def _function(self, function: types.FunctionType, depth: int) -> Hashable | None:
        names, is_plain = _named(function.__code__)
        if not is_plain or function.__dict__:
            return None
        self.names |= names
        try:
            cells = tuple(cell.cell_contents for cell in function.__closure__ or ())
        except ValueError:
            return None
        found = tuple(function.__globals__[n] for n in sorted(names) if n in function.__globals__)
        defaults = (function.__defaults__, tuple(sorted((function.__kwdefaults__ or {}).items())))
        return self._all(function.__code__, (cells, found, defaults), depth)

    def _object(self, value: Any, depth: int) -> Hashable | None:
        """A frozen dataclass: its fields, what is named of it, and what operators call."""
        self.met_objects = True
        fields = [f.name for f in dataclasses.fields(value)]
        reached: dict[str, Any] = {}
        for kind in reversed(type(value).__mro__):
            if not _is_constant(kind.__module__):
                reached |= {n: vars(kind)[n] for n in vars(kind).keys() & (self.names | _OPERATORS)}
        if "__getattr__" in reached or "__getattribute__" in reached:
            return None
        reached |= {n: v for n, v in getattr(value, "__dict__", {}).items() if n in self.names}
        names = sorted(n for n in reached if n not in fields and not _is_written_by_dataclasses(reached[n]))
        said = self._all(cast(Hashable, type(value)), tuple(getattr(value, n) for n in fields), depth)
        rest = self._all(tuple(names), tuple(_underlying(reached[n]) for n in names), depth)
        return None if said is None or rest is None else (said, rest)

    def _all(self, kind: Hashable, parts: Sequence[Any] | frozenset[Any], depth: int) -> Hashable | None:
        names = tuple(self.read(part, depth - 1) for part in parts)
        return None if any(name is None for name in names) else (kind, names)


def _is_constant(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _CONSTANT_MODULES


def _is_written_by_dataclasses(value: Any) -> bool:
    """Comparisons, which do what the fields say."""
    return isinstance(value, types.FunctionType) and value.__code__.co_filename == "<string>"


def _underlying(value: Any) -> Any:
    """The function of a method or property."""
    if isinstance(value, property):
        return value.fget
    return value.__func__ if isinstance(value, (staticmethod, classmethod)) else value


@functools.lru_cache(maxsize=1024)
def _named(code: types.CodeType) -> tuple[frozenset[str], bool]:
    """The names in a code, and whether it finds nothing but what they say."""
    names, is_plain = set(code.co_names), True
    for instruction in dis.get_instructions(code):
        if instruction.opname == "IMPORT_NAME":
            is_plain &= _is_constant(instruction.argval)
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            inner, inner_is_plain = _named(const)
            names |= inner
            is_plain &= inner_is_plain
    return frozenset(names), is_plain and names.isdisjoint(_DYNAMIC)
