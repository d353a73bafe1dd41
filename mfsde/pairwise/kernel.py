"""The three words of a pairwise sum Σ_j w_j K(x_i - y_j): the kernel K, the pairs (x, y, w), and the strategy."""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..torus import Period, shortest

Function = Callable[[Tensor], Tensor]

# Differences at which a kernel is looked at: near unit length, and as many at every other scale.
PROBES = 16


class Key(Protocol):
    """Where the randomness of a step comes from (`Draws`)."""

    def permutations(self, n: int) -> Tensor:
        """Uniform permutations of 0, ..., n - 1, int64, (R, n)."""
        ...


@dataclass(frozen=True)
class Pairs:
    """What a sum runs over: atoms y_j of masses w_j, seen from x_i.

    x: (R, M, d), points: (R, N, d), weights: (R, N). period: of a torus. own: (M,) int64, the atom that x_i is and that
    its sum leaves out, or None where none is left out. key: the randomness of the step, in a run.
    """

    x: Tensor
    points: Tensor
    weights: Tensor
    period: Period = None
    own: Tensor | None = None
    key: Key | None = None

    def differences(self, rows: slice) -> Tensor:
        """x_i - y_j for some i, the shortest ones on a torus.    (R, rows, N, d)."""
        return shortest(self.x[:, rows].unsqueeze(-2) - self.points.unsqueeze(-3), self.period)

    def at(self, rows: Tensor) -> Pairs:
        """The same sums for some i only.    rows: (m,) int64."""
        own = None if self.own is None else self.own[rows]
        return dataclasses.replace(self, x=self.x[:, rows], own=own)


class Kernel:
    """K: differences z (..., d) -> (..., *out), a function that acts entry by entry, and how its sums are evaluated.

    Args:
        function: K, written with torch operations.
        strategy: a `Strategy`, or the name of one that needs no parameters; "exact" chooses among the exact ones.

    Attributes: `potential` is W where the kernel is ∇W.

    """

    def __init__(
        self, function: Function, strategy: Strategy | str = "exact", *, potential: Kernel | None = None
    ) -> None:
        if isinstance(function, Kernel):
            raise TypeError("Kernel: the function is a Kernel already; pass its .function with another strategy.")
        if not callable(function):
            raise TypeError(f"Kernel: {function!r:.60} is no function of differences z (..., d).")
        if potential is not None and function != potential._gradient:
            raise TypeError("Kernel: potential is what `slope` sets; use Kernel(W).slope, or interaction(W), for ∇W.")
        self.function = function
        self.strategy = strategy
        self.potential = potential
        self._facts: dict[Any, tuple[Tensor | None, dict[Any, Any]]] = {}

    def __repr__(self) -> str:
        return f"Kernel({self.name}, strategy={self.strategy!r})"

    def __call__(self, z: Tensor) -> Tensor:
        """K(z)."""
        return self.function(z)

    @property
    def name(self) -> str:
        """What the function is called."""
        if self.potential is not None:
            return f"gradient of {self.potential.name}"
        return getattr(self.function, "__qualname__", type(self.function).__qualname__)

    def facts(self, like: Tensor) -> dict[Any, Any]:
        """What strategies have learnt of K, for points like these; forgotten once K's values at some z have changed.

        A function may close over numbers and tensors that change, or come to require a gradient. On devices other than
        the CPU, where looking would make the host wait, it is taken to be a constant.
        """
        if self.potential is not None:
            known = self.potential.facts(like)
            return known.setdefault("of the slope", {})  # type: ignore[no-any-return]
        place = (like.shape[-1], like.dtype, like.device)
        values = self._facts.get(place, (None, {}))[0]
        if values is None or like.is_cpu:
            found = self._probed(like)
            if values is None or not _are_the_same(values, found):
                self._facts[place] = (found, {})
        return self._facts[place][1]

    def _probed(self, like: Tensor) -> Tensor:
        """K at fixed differences of several sizes; it requires a gradient where something that K closes over does."""
        try:
            # Asked within no_grad too: a gradient that is lost there would be missed elsewhere.
            with torch.enable_grad():
                values = self.function(_probes(like.shape[-1], like.dtype, like.device))
            return values.detach().requires_grad_(values.requires_grad)
        except Exception:
            # A kernel that fails here says so where it is summed.
            return like.new_zeros(0)

    @cached_property
    def slope(self) -> Kernel:
        """∇K of a scalar kernel, (..., d) -> (..., d), with the same strategy."""
        return Kernel(self._gradient, self.strategy, potential=self)

    def _gradient(self, z: Tensor) -> Tensor:
        """With its graph where gradients are followed: in backward passes too, whose threads know of no tape."""
        keeps = torch.is_grad_enabled()
        with torch.enable_grad():
            at = z.view_as(z) if keeps and z.requires_grad else z.detach().requires_grad_()
            value = self.function(at).sum()
            if not value.requires_grad:
                return torch.zeros_like(z)
            (slope,) = torch.autograd.grad(value, [at], create_graph=keeps, allow_unused=True)
        return torch.zeros_like(z) if slope is None else slope


@functools.lru_cache(maxsize=32)
def _probes(d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(2 PROBES, d)."""
    exponents = torch.cat([torch.linspace(-2, 1, PROBES), torch.linspace(-12, 12, PROBES)]).to(device, torch.float64)
    angles = torch.arange(1, 2 * PROBES * d + 1, dtype=torch.float64, device=device).reshape(-1, d)
    return (10 ** exponents.unsqueeze(-1) * torch.cos(angles)).to(dtype)


def _are_the_same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or a.requires_grad != b.requires_grad:
        return False
    return torch.equal(_bits(a.detach()), _bits(b.detach()))


def _bits(values: Tensor) -> Tensor:
    """NaN equals itself."""
    return torch.nan_to_num(values, nan=math.pi)


class Strategy(abc.ABC):
    """How the sums of a kernel are evaluated. Strategies are frozen dataclasses; their fields are recorded.

    `exact`: equal to the sum over all pairs up to rounding. `differentiable`: made of torch operations that automatic
    differentiation follows, whatever the kernel. `random`: a function of the step's key too.
    """

    exact: ClassVar[bool]
    differentiable: ClassVar[bool] = False
    random: ClassVar[bool] = False

    def choice(self, kernel: Kernel, pairs: Pairs) -> Strategy:
        """The strategy that acts: another one where this one chooses, or cannot."""
        return self

    @property
    def name(self) -> str:
        """The name that is recorded."""
        return type(self).__name__.lower()

    @abc.abstractmethod
    def sums(self, kernel: Kernel, pairs: Pairs) -> Tensor:
        """Σ_j w_j K(x_i - y_j) without j = own[i].    (R, M, *out).

        Raises:
            ValueError: a kernel or pairs that it would be wrong for, with the reason and the next move.

        """

    def described(self) -> dict[str, Any]:
        """Name and parameters, plain values for JSON."""
        plain = (bool, int, float, str, type(None))
        told: dict[str, Any] = {"strategy": self.name}
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            # A function's repr is an address, another one in each process.
            told[f.name] = value if isinstance(value, plain) else getattr(value, "__qualname__", repr(value))
        return told
