"""A diffusion in any of its forms: a number, a diagonal or a matrix for each particle; its products and derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .tape import is_recording, variable

Sigma = Callable[[Tensor], float | Tensor]


def product(sigma: float | Tensor, w: Tensor) -> Tensor:
    """σ w for each form of σ.    w: (R, N or 1, m) -> (R, N or 1, d)."""
    if isinstance(sigma, Tensor) and sigma.ndim == w.ndim + 1:
        return torch.matmul(sigma, w.unsqueeze(-1)).squeeze(-1)
    return sigma * w


def full(value: float | Tensor, x: Tensor) -> Tensor:
    """σ at every particle: as x, (R, N, d), or (R, N, d, m) for a matrix."""
    if not isinstance(value, Tensor):
        return torch.full_like(x, value)
    return value.expand(*x.shape, value.shape[-1]) if value.ndim == x.ndim + 1 else value.expand_as(x)


def along_columns(sigma: Sigma, x: Tensor) -> Tensor:
    """Σ_j (∂_x G_j) G_j, (R, N, d), for G = σ(x) in any of its forms, row by row."""
    value = sigma(x)
    if not isinstance(value, Tensor):
        return torch.zeros_like(x)
    columns = full(value, x)
    total = torch.zeros_like(x)
    if columns.ndim == x.ndim:
        for k, slope in enumerate(directional(sigma, x, torch.diag_embed(columns).unbind(-1))):
            total[..., k] = slope[..., k]
    else:
        for j, slope in enumerate(directional(sigma, x, columns.unbind(-1))):
            total = total + slope[..., j]
    return total


def directional(sigma: Sigma, x: Tensor, directions: Iterable[Tensor]) -> list[Tensor]:
    """∂_x σ along each direction, by differentiating the adjoint u ↦ uᵀ∂σ, which is linear in u.

    (torch's forward mode would do it in one pass, but loads its deprecated compiler.)
    """
    with torch.enable_grad():
        at = variable(x)
        value = full(sigma(at), at)
        if not value.requires_grad:
            return [torch.zeros_like(value) for _ in directions]
        u = torch.zeros_like(value, requires_grad=True)
        (adjoint,) = torch.autograd.grad(value, at, u, create_graph=True, allow_unused=True, materialize_grads=True)
        if not adjoint.requires_grad:
            return [torch.zeros_like(value) for _ in directions]
        # A σ that a parameter moves and x does not has an adjoint with a graph, which u is no part of.
        options = {"retain_graph": True, "create_graph": is_recording(), "materialize_grads": True}
        return [torch.autograd.grad(adjoint, u, v, **options)[0] for v in directions]
