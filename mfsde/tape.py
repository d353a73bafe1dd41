"""The tape: whether derivatives and laws keep the graph of automatic differentiation.

Energies differentiate on detached tensors and return detached ones, and laws hold plain numbers: what a run needs.
While a run itself is differentiated (`recording`), the same code keeps its graph, so that D_mF can be differentiated
once more, with respect to points, weights and parameters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_recording: ContextVar[bool] = ContextVar("recording", default=False)


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Within it derivatives keep their graph."""
    token = _recording.set(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        _recording.reset(token)


def is_recording() -> bool:
    """Whether derivatives keep their graph."""
    return _recording.get()


def constant(x: Tensor) -> Tensor:
    """X, where no derivative is taken: detached, unless recording."""
    return x if _recording.get() else x.detach()


def variable(x: Tensor) -> Tensor:
    """X as the variable of a derivative, apart from every other use of x."""
    if _recording.get() and x.requires_grad:
        return x.view_as(x)
    return x.detach().requires_grad_()


def values() -> Any:
    """The context of what is evaluated and not differentiated: without a graph, unless recording."""
    return contextlib.nullcontext() if _recording.get() else torch.no_grad()


def stacked(value: Any) -> Tensor:
    """Numbers, tensors or nested sequences of them as one float64 tensor that keeps their graph."""
    if isinstance(value, Tensor):
        return value.to(torch.float64)
    if isinstance(value, (list, tuple)) and value:
        return torch.stack([stacked(part) for part in value])
    return torch.as_tensor(value, dtype=torch.float64)
