"""Σ_j w_j K(x_i - y_j) by a declared strategy: the choice among exact ones, the record of what was used, the error."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Hashable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..tape import is_recording
from ..torus import period_lengths
from . import compiled, moments
from .batches import Batches
from .blocked import Blocked
from .cells import Cells
from .compiled import Compiled
from .fourier import Fourier
from .grid import Grid
from .keops import KeOps
from .kernel import Function, Kernel, Pairs, Strategy
from .moments import Moments, Separable
from .trace import identity, kernel_identity

# What a pair costs in torch operations, in seconds; another machine only moves the choice below.
SECONDS_PER_PAIR = 1e-8
# Work that is worth the time of tracing a kernel, and that of a compiler.
SECONDS_WORTH_TRACING = 0.1
SECONDS_WORTH_COMPILING = 10.0
# The same in each sum, for functions that are made anew, and not the same or not known to be.
SECONDS_WORTH_A_TRACE = 5e-3
# Particles on which the error of a strategy is measured.
SAMPLE = 256

_ahead: ContextVar[int] = ContextVar("ahead", default=1)
# Kernels that a run met at its start, and whether it is starting.
_met: ContextVar[tuple[set[Hashable], bool] | None] = ContextVar("met", default=None)
_used: ContextVar[dict[str, Strategy] | None] = ContextVar("used", default=None)
_measured: ContextVar[tuple[dict[str, Tensor], int] | None] = ContextVar("measured", default=None)
_replicas: ContextVar[tuple[slice, int] | None] = ContextVar("replicas", default=None)


@dataclass(frozen=True)
class Exact(Strategy):
    """The exact strategy that suits kernel, size and work: on one machine a function of these alone.

    A resumed run therefore agrees. Moments for polynomial kernels; compiled sums where at least ten seconds of torch
    operations are ahead; blocks else.
    """

    exact: ClassVar[bool] = True

    def sums(self, kernel: Kernel, pairs: Pairs) -> Tensor:
        """(R, M, *out)."""
        return self.choice(kernel, pairs).sums(kernel, pairs)

    def choice(self, kernel: Kernel, pairs: Pairs) -> Strategy:
        """Which one it is."""
        one = SECONDS_PER_PAIR * pairs.x.shape[0] * pairs.x.shape[1] * pairs.points.shape[1]
        seconds = one * _ahead.get()
        if seconds < SECONDS_WORTH_TRACING or (one < SECONDS_WORTH_A_TRACE and not _is_known(kernel)):
            return Blocked()
        if _is_polynomial(kernel, pairs):
            return Moments()
        worth = seconds >= SECONDS_WORTH_COMPILING and _was_met(kernel)
        return Compiled() if worth and compiled.usable(kernel, pairs) else Blocked()


NAMED: dict[str, type[Strategy]] = {
    "exact": Exact,
    "blocked": Blocked,
    "compiled": Compiled,
    "moments": Moments,
    "keops": KeOps,
    "grid": Grid,
}
# Those that need parameters.
OTHERS: tuple[type[Strategy], ...] = (Separable, Cells, Batches, Fourier)


def convolve(kernel: Kernel, pairs: Pairs) -> Tensor:
    """Σ_j w_j K(x_i - y_j) over j ≠ own[i].    (R, M, *out).

    Raises:
        ValueError: a strategy that is unknown or wrong for the kernel.

    """
    strategy = chosen(kernel, pairs)
    _note(kernel.name, strategy)
    if not strategy.differentiable and (is_recording() or _needs_graph(pairs)):
        strategy = Blocked()
    total = strategy.sums(kernel, pairs)
    if not strategy.exact:
        _measure(kernel, pairs, total)
    return total


def declared(function: Function, strategy: Strategy | str) -> Kernel:
    """The kernel of a function and a strategy; the same object for functions that do the same.

    What strategies learn of a kernel they keep with the object, and an energy that is a property makes its functions
    anew at each step.
    """
    if not callable(function) or isinstance(function, Kernel):
        return Kernel(function, strategy)
    known = identity(function)
    return Kernel(function, named(strategy)) if known is None else _declared(_Named(function, known), named(strategy))


class _Named:
    """A function that is equal to those of the same identity."""

    def __init__(self, function: Function, identity: Hashable) -> None:
        self.function, self.identity = function, identity

    def __hash__(self) -> int:
        return hash(self.identity)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Named) and self.identity == other.identity


@functools.lru_cache(maxsize=64)
def _declared(named_function: _Named, strategy: Strategy) -> Kernel:
    return Kernel(named_function.function, strategy)


def chosen(kernel: Kernel, pairs: Pairs) -> Strategy:
    """The strategy that evaluates these sums."""
    return named(kernel.strategy).choice(kernel, pairs)


def named(strategy: Strategy | str) -> Strategy:
    """A strategy from its name.

    Raises:
        TypeError: neither a name nor a strategy.
        ValueError: an unknown name.

    """
    if isinstance(strategy, Strategy):
        return strategy
    if isinstance(strategy, type) and issubclass(strategy, Strategy):
        raise TypeError(f"strategy = {strategy.__name__} is a class; write {strategy.__name__}(...).")
    if not isinstance(strategy, str):
        raise TypeError(f"strategy = {strategy!r:.60}; expected a name ({', '.join(NAMED)}) or a pairwise strategy.")
    if strategy in NAMED:
        return NAMED[strategy]()
    needs = [kind.__name__ for kind in OTHERS if kind.__name__.lower() == strategy]
    hint = f" It needs parameters: mfsde.pairwise.{needs[0]}(...)." if needs else ""
    raise ValueError(f"unknown strategy {strategy!r}; expected one of {', '.join(NAMED)}.{hint}")


def error(kernel: Kernel | Function, mu: Any, sample: int = SAMPLE) -> Tensor:
    """√(Σ_i |a_i - e_i|² / Σ_i |e_i|²): sums a by the kernel's strategy against exact ones e.    (...,).

    On `sample` particles x_i of mu, evenly spread over their numbers; without the term j = i, where one is left out in
    neither. A random strategy is asked once, with the key of mu's step or one of its own.

    """
    kernel = kernel if isinstance(kernel, Kernel) else Kernel(kernel)
    pairs = pairs_of(mu, mu.points, None)
    pairs = pairs if pairs.key is not None else _with_key(pairs)
    rows = sampled_rows(mu.n_particles, sample, mu.points.device)
    with torch.no_grad():
        found = chosen(kernel, pairs).sums(kernel, pairs)[:, rows]
        expected = Blocked().sums(kernel, pairs.at(rows))
    return relative_error(found, expected).reshape(mu.points.shape[:-2])


def relative_error(found: Tensor, expected: Tensor) -> Tensor:
    """Root mean square of the difference relative to that of the expected values, per replica.    (R,)."""
    miss = (found - expected).double().square().flatten(1).sum(1)
    size = expected.double().square().flatten(1).sum(1)
    return torch.where(miss == 0, miss, miss / size).sqrt()


def sampled_rows(n: int, sample: int, device: torch.device) -> Tensor:
    """At most `sample` of the numbers 0, ..., n - 1, evenly spread."""
    count = min(n, sample)
    return torch.arange(count, device=device) * n // count


def pairs_of(mu: Any, x: Tensor, own: Tensor | None) -> Pairs:
    """The pairs of a measure (..., N, d) and points (..., M, d) with its leading axes, in their common dtype.

    Raises:
        ValueError: they are on different devices.

    """
    points, weights = mu.points.reshape(-1, *mu.points.shape[-2:]), mu.weights.reshape(-1, mu.n_particles)
    at = points if x is mu.points else x.reshape(-1, *x.shape[-2:])
    if not at.device == points.device == weights.device:
        raise ValueError(
            f"convolve: x is on {at.device}, the points on {points.device}, their weights on {weights.device}; move "
            "them to one device."
        )
    if not at.dtype == points.dtype == weights.dtype:
        common = torch.promote_types(torch.promote_types(at.dtype, points.dtype), weights.dtype)
        at, points, weights = at.to(common), points.to(common), weights.to(common)
    return Pairs(at, points, weights, mu.period, own, mu.key)


@contextlib.contextmanager
def _within(*settings: tuple[ContextVar[Any], Any]) -> Iterator[None]:
    tokens = [(variable, variable.set(value)) for variable, value in settings]
    try:
        yield
    finally:
        for variable, token in tokens:
            variable.reset(token)


def ahead(
    n_evaluations: int, kernels: set[Hashable] | None = None, is_start: bool = False
) -> contextlib.AbstractContextManager[None]:
    """Within it each sum is known to be evaluated that often: what a run of n steps has ahead.

    kernels: those that the start of the run has met, which collects them; no others are compiled unasked. One that
    changes with time would be compiled in each step.
    """
    return _within((_ahead, n_evaluations), (_met, None if kernels is None else (kernels, is_start)))


def of_replicas(rows: slice, n: int) -> contextlib.AbstractContextManager[None]:
    """Within it sums are those of some of n replicas: by the strategy of all, with errors at their places among all."""
    return _within((_ahead, _ahead.get() * n // (rows.stop - rows.start)), (_replicas, (rows, n)))


@contextlib.contextmanager
def used() -> Iterator[dict[str, Strategy]]:
    """Collects the strategies that sums are evaluated by: {name of the kernel: strategy}."""
    found: dict[str, Strategy] = {}
    with _within((_used, found)):
        yield found


def recorded(strategies: Mapping[str, Strategy]) -> dict[str, Any]:
    """What a dataset says of the strategies by which a run has summed over pairs, where it has."""
    told = {name: {**strategy.described(), "exact": strategy.exact} for name, strategy in strategies.items()}
    return {"interactions": told} if told else {}


def aside() -> contextlib.AbstractContextManager[None]:
    """Within it sums are neither recorded nor measured: they are no part of what is evaluated."""
    return _within((_used, None), (_measured, None))


@contextlib.contextmanager
def measured(sample: int = SAMPLE) -> Iterator[dict[str, Tensor]]:
    """Measures the relative error of every approximate sum that is evaluated: {name of the kernel: (R,)}."""
    errors: dict[str, Tensor] = {}
    with _within((_measured, (errors, sample))):
        yield errors


def _measure(kernel: Kernel, pairs: Pairs, total: Tensor) -> None:
    found = _measured.get()
    if found is None:
        return
    errors, sample = found
    rows = sampled_rows(pairs.x.shape[1], sample, pairs.x.device)
    error = relative_error(total[:, rows], Blocked().sums(kernel, pairs.at(rows)))
    some = _replicas.get()
    if some is not None:
        own, n = some
        part, error = error, error.new_zeros(n)
        error[own] = part
    errors[kernel.name] = torch.maximum(error, errors.get(kernel.name, error))


def _note(name: str, strategy: Strategy) -> None:
    found = _used.get()
    if found is None:
        return
    again = 2
    # Two functions may have one name.
    while found.setdefault(name, strategy) != strategy:
        name, again = f"{name.split(' #')[0]} #{again}", again + 1


def _is_known(kernel: Kernel) -> bool:
    """Whether a trace of it will serve again: it has an identity, and the start of the run, if any, has met it."""
    return kernel_identity(kernel) is not None and _was_met(kernel)


def _was_met(kernel: Kernel) -> bool:
    """Whether the start of the run, if there is one, has met this kernel; one that changes with time is another one."""
    found = _met.get()
    if found is None:
        return True
    kernels, is_start = found
    name = kernel_identity(kernel) or kernel
    if is_start:
        kernels.add(name)
    return name in kernels


def _is_polynomial(kernel: Kernel, pairs: Pairs) -> bool:
    lengths = period_lengths(pairs.period, pairs.x.shape[-1])
    return all(math.isinf(p) for p in lengths) and moments.degree_of(kernel, pairs.x) is not None


def _needs_graph(pairs: Pairs) -> bool:
    return torch.is_grad_enabled() and any(z.requires_grad for z in (pairs.x, pairs.points, pairs.weights))


def _with_key(pairs: Pairs) -> Pairs:
    return replace(pairs, key=_Drawn(pairs.points))


class _Drawn:
    """Shuffles outside a run."""

    def __init__(self, points: Tensor) -> None:
        self._shape = points.shape
        self._device = points.device

    def permutations(self, n: int) -> Tensor:
        """The same at every call."""
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randperm(n, generator=generator) for _ in range(self._shape[0])]
        return torch.stack(drawn).to(self._device)
