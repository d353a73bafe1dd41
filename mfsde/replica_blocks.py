"""A scenario whose costly coefficients are evaluated for some of the replicas at a time.

Replicas are independent, so the numbers are those of the whole batch; only what a coefficient allocates is less.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .measure import EmpiricalMeasure
from .model import with_methods
from .pairwise.convolution import of_replicas
from .pairwise.kernel import Key

# Coefficients with one value for each particle of each replica, which allocate most. Others may return one for all.
REPLICA_WISE = ("drift", "smooth_drift", "force", "birth_death_rate")

Coefficient = Callable[[float, Tensor, EmpiricalMeasure], Any]


@dataclass(frozen=True)
class ReplicaBlocks:
    """Evaluates coefficients in blocks of `size` replicas."""

    size: int

    def __call__(self, scenario: Any) -> Any:
        """The scenario with its coefficients in blocks."""
        return with_coefficients(scenario, self._in_blocks)

    def _in_blocks(self, coefficient: Coefficient) -> Coefficient:
        def blocked(t: float, x: Tensor, mu: EmpiricalMeasure) -> Any:
            n = len(x)
            if x.ndim != 3 or n <= self.size:
                return coefficient(t, x, mu)
            parts = []
            for start in range(0, n, self.size):
                rows = slice(start, min(start + self.size, n))
                with of_replicas(rows, n):
                    parts.append(_detached(coefficient(t, *_part(x, mu, rows))))
            return torch.cat(parts) if all(isinstance(part, Tensor) for part in parts) else parts[0]

        return blocked


def with_coefficients(scenario: Any, changed: Callable[[Coefficient], Coefficient]) -> Any:
    """A scenario whose replica-wise coefficients are changed, for whoever calls them from outside.

    A class with slots lets no method of one object be replaced; its scenario is returned as it is.
    """
    names = [name for name in REPLICA_WISE if callable(getattr(scenario, name, None))]
    try:
        return with_methods(scenario, {name: changed(getattr(scenario, name)) for name in names})
    except AttributeError:
        return scenario


class _Rows:
    """The randomness of a step for some of its replicas."""

    def __init__(self, key: Key, rows: slice) -> None:
        self._key, self._rows = key, rows

    def permutations(self, n: int) -> Tensor:
        return self._key.permutations(n)[self._rows]


def _part(x: Tensor, mu: EmpiricalMeasure, rows: slice) -> tuple[Tensor, EmpiricalMeasure]:
    """Some replicas of a state and of its law; points that are the state itself stay it."""
    some = x[rows]
    lead = mu.points.shape[:-2]
    if lead != x.shape[:1]:
        # One law for all replicas.
        return some, mu
    points = some if mu.points is x else mu.points[rows]
    weights = None if mu.is_uniform else mu.weights[rows]
    key = None if mu.key is None else _Rows(mu.key, rows)
    return some, EmpiricalMeasure.signed(points, weights, mu.period, key)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) and value.requires_grad else value
