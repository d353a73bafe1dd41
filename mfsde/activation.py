"""Activations of neurons, in place: σ, and σ' written in terms of s = σ(a)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .extensions import extension, threads

# Values that are not worth waking a thread for.
SERIAL = 1 << 15


_compiled = extension("_activation")


def tanh_(x: Tensor) -> Tensor:
    """tanh(x), in place; to a relative error of 4e-7 by a compiled kernel where x is float32 on the CPU.

    Torch's own takes several times as long there.
    """
    if not _is_compiled(x):
        return x.tanh_()
    n = x.shape[-1] if x.ndim else 1
    _compiled.tangents(x.data_ptr(), 0, 0, x.numel() // max(1, n), n, _threads(x))  # type: ignore[union-attr]
    increment_version(x)
    return x


def tanh_sum_(x: Tensor, masses: Tensor) -> Tensor:
    """X becomes s = tanh(x), in place; returns s @ masses.    x: (R, b, N), masses: (R, N, k) -> (R, b, k)."""
    if not _is_compiled(x, masses) or masses.shape[-1] != 1:
        return torch.bmm(tanh_(x), masses)
    beta, sums = masses.contiguous(), x.new_empty((*x.shape[:2], 1))
    for h, b, s in zip(x, beta, sums, strict=True):
        _compiled.tangents(h.data_ptr(), b.data_ptr(), s.data_ptr(), *h.shape, _threads(h))  # type: ignore[union-attr]
    increment_version(x)
    return sums


def _is_compiled(x: Tensor, *others: Tensor) -> bool:
    if _compiled is None or x.dtype is not torch.float32 or not x.is_cpu or not x.is_contiguous():
        return False
    # The kernel has no derivative: torch's own operation is followed instead.
    return not (torch.is_grad_enabled() and any(z.requires_grad for z in (x, *others)))


def _threads(x: Tensor) -> int:
    return 1 if x.numel() < SERIAL else threads()


class Activation(NamedTuple):
    """σ in place, and its derivative in terms of s = σ(a): σ' = offset + factor·φ(s), φ in place and in one pass.

    sum_: (R, b, N), (R, N, k) -> (R, b, k): σ in place, and the sums of its values with masses.
    """

    sigma_: Callable[[Tensor], Tensor]
    slope_: Callable[[Tensor], Tensor]
    offset: float
    factor: float
    sum_: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS: dict[str, Activation] = {
    "tanh": Activation(tanh_, Tensor.square_, 1.0, -1.0, tanh_sum_),
    "sigmoid": Activation(
        Tensor.sigmoid_,
        lambda s: s.addcmul_(s, s, value=-1),
        0.0,
        1.0,
        lambda x, masses: torch.bmm(x.sigmoid_(), masses),
    ),
    "relu": Activation(Tensor.relu_, Tensor.sign_, 0.0, 1.0, lambda x, masses: torch.bmm(x.relu_(), masses)),
}
