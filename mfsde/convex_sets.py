"""Convex sets as regularisers: domains of gradient flows.

Sets are indicators: 0 inside, infinite outside, their proximal map the projection, their subdifferential the normal
cone. They are added to other regularisers, and limited to some components, as `regularisers` says.

Source: Parikh, Boyd, Proximal algorithms (2014), sections 2 and 6.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .regularisers import Components, Regulariser, changed, check_components, chosen, of_the_chosen, scaled

# Distances within which a point counts as being on a curved or oblique wall, in roundings of the numbers involved.
ROUNDINGS = 16


class ConvexSet(Regulariser):
    """The indicator of a closed convex set: 0 inside, infinite outside."""

    @property
    def has_domain(self) -> bool:
        """It is one."""
        return True

    def prox(self, x: Tensor, h: float) -> Tensor:
        """The projection, whatever h."""
        scaled(h, 1.0)
        return self.project(x)

    @abc.abstractmethod
    def project(self, x: Tensor) -> Tensor:
        """The nearest point of the set.    (..., N, d)."""


@dataclass(frozen=True)
class Box(ConvexSet):
    """{low <= x_k <= high}.

    Args:
        low: a number, or one for each chosen component; -inf for none.
        high: as low; inf for none.
        components: which; all when None.

    """

    low: float | tuple[float, ...] = -math.inf
    high: float | tuple[float, ...] = math.inf
    components: Components = None

    def __post_init__(self) -> None:
        check_components(self)
        for low, high in _pairs(self.low, self.high):
            if not low <= high or low == math.inf or high == -math.inf:
                raise ValueError(f"Box: low = {self.low}, high = {self.high}; expected low <= high.")

    def value(self, x: Tensor) -> Tensor:
        """0 inside, infinite outside."""
        y = chosen(x, self.components)
        low, high = self._bounds(y)
        return _indicator(((y >= low) & (y <= high)).all(-1), x)

    def project(self, x: Tensor) -> Tensor:
        """Clamped."""
        return changed(x, self.components, lambda y: torch.clamp(y, *self._bounds(y)))

    def project_subgradient(self, x: Tensor, v: Tensor) -> Tensor:
        """On a face, the part of v that points out of it."""

        def nearest(y: Tensor, w: Tensor) -> Tensor:
            low, high = self._bounds(y)
            return torch.where(y <= low, w.clamp(max=0), 0.0) + torch.where(y >= high, w.clamp(min=0), 0.0)

        return of_the_chosen(x, v, self.components, nearest)

    def _bounds(self, y: Tensor) -> tuple[Tensor, Tensor]:
        try:
            low, high = (y.new_tensor(bound).expand(y.shape[-1]) for bound in (self.low, self.high))
        except RuntimeError:
            raise ValueError(
                f"Box: low = {self.low}, high = {self.high} do not fit {y.shape[-1]} components; expected a number, or "
                "one for each."
            ) from None
        return low, high


@dataclass(frozen=True)
class Ball(ConvexSet):
    """{|x - centre| <= radius}.

    Args:
        radius: r > 0.
        centre: a number, or one for each chosen component.
        components: which; all when None.

    """

    radius: float
    centre: float | tuple[float, ...] = 0.0
    components: Components = None

    def __post_init__(self) -> None:
        check_components(self)
        if not (math.isfinite(self.radius) and self.radius > 0):
            raise ValueError(f"Ball: radius = {self.radius}; expected a positive number.")
        if not all(math.isfinite(c) for c in _listed(self.centre)):
            raise ValueError(f"Ball: centre = {self.centre}; expected finite numbers.")

    def value(self, x: Tensor) -> Tensor:
        """0 inside and within rounding of the sphere, infinite outside."""
        y = self._from_centre(chosen(x, self.components))
        return _indicator(y.norm(dim=-1) <= self.radius + self._rounding(y), x)

    def project(self, x: Tensor) -> Tensor:
        """Pulled to the sphere along its radius."""

        def nearest(y: Tensor) -> Tensor:
            z = self._from_centre(y)
            r = z.norm(dim=-1, keepdim=True)
            return torch.where(r > self.radius, y - z + z * (self.radius / r), y)

        return changed(x, self.components, nearest)

    def project_subgradient(self, x: Tensor, v: Tensor) -> Tensor:
        """On the sphere, the outward part of v along the radius."""

        def nearest(y: Tensor, w: Tensor) -> Tensor:
            z = self._from_centre(y)
            r = z.norm(dim=-1, keepdim=True)
            normal = z / r.clamp(min=torch.finfo(z.dtype).tiny)
            outward = (w * normal).sum(-1, keepdim=True).clamp(min=0) * normal
            return torch.where(r >= self.radius - self._rounding(z), outward, 0.0)

        return of_the_chosen(x, v, self.components, nearest)

    def _from_centre(self, y: Tensor) -> Tensor:
        centre = _listed(self.centre)
        if len(centre) not in (1, y.shape[-1]):
            raise ValueError(
                f"Ball: centre = {self.centre} does not fit {y.shape[-1]} components; expected a number, or one each."
            )
        return y - y.new_tensor(centre)

    def _rounding(self, y: Tensor) -> float:
        return ROUNDINGS * torch.finfo(y.dtype).eps * (self.radius + math.hypot(*_listed(self.centre)))


@dataclass(frozen=True)
class HalfSpace(ConvexSet):
    """{⟨normal, x⟩ <= offset}.

    Args:
        normal: n ≠ 0, one number for each chosen component.
        offset: b.
        components: which; all when None.

    """

    normal: tuple[float, ...]
    offset: float = 0.0
    components: Components = None

    def __post_init__(self) -> None:
        check_components(self)
        length = math.hypot(*self.normal)
        if not (math.isfinite(length) and length > 0 and math.isfinite(self.offset)):
            raise ValueError(
                f"HalfSpace: normal = {self.normal}, offset = {self.offset}; expected finite numbers, not all of the "
                "normal's zero."
            )

    def value(self, x: Tensor) -> Tensor:
        """0 inside and within rounding of the wall, infinite outside."""
        y = chosen(x, self.components)
        return _indicator((self._excess(y) <= self._rounding(y)).squeeze(-1), x)

    def project(self, x: Tensor) -> Tensor:
        """Moved to the wall along the normal."""
        return changed(x, self.components, lambda y: y - self._excess(y).clamp(min=0) * self._unit(y))

    def project_subgradient(self, x: Tensor, v: Tensor) -> Tensor:
        """On the wall, the outward part of v along the normal."""

        def nearest(y: Tensor, w: Tensor) -> Tensor:
            unit = self._unit(y)
            outward = (w * unit).sum(-1, keepdim=True).clamp(min=0) * unit
            return torch.where(self._excess(y) >= -self._rounding(y), outward, 0.0)

        return of_the_chosen(x, v, self.components, nearest)

    def _unit(self, y: Tensor) -> Tensor:
        if len(self.normal) != y.shape[-1]:
            raise ValueError(f"HalfSpace: normal = {self.normal} does not fit {y.shape[-1]} components.")
        return y.new_tensor(self.normal) / math.hypot(*self.normal)

    def _excess(self, y: Tensor) -> Tensor:
        """Signed distance beyond the wall, (..., N, 1)."""
        return (y * self._unit(y)).sum(-1, keepdim=True) - self.offset / math.hypot(*self.normal)

    def _rounding(self, y: Tensor) -> Tensor:
        size: Tensor = y.norm(dim=-1, keepdim=True) + abs(self.offset) / math.hypot(*self.normal)
        return size * (ROUNDINGS * torch.finfo(y.dtype).eps)


@dataclass(frozen=True)
class Simplex(ConvexSet):
    """{x_k >= 0, Σ x_k = total} over the chosen components.

    Args:
        total: > 0.
        components: which; all when None.

    Source: Held, Wolfe, Crowder, Validation of subgradient optimization (1974), for the projection by sorting.

    """

    total: float = 1.0
    components: Components = None

    def __post_init__(self) -> None:
        check_components(self)
        if not (math.isfinite(self.total) and self.total > 0):
            raise ValueError(f"Simplex: total = {self.total}; expected a positive number.")

    def value(self, x: Tensor) -> Tensor:
        """0 on it within rounding, infinite elsewhere."""
        y = chosen(x, self.components)
        rounding = ROUNDINGS * torch.finfo(y.dtype).eps * self.total
        return _indicator((y >= 0).all(-1) & ((y.sum(-1) - self.total).abs() <= rounding), x)

    def project(self, x: Tensor) -> Tensor:
        """max(x - c, 0), c such that the sum is right."""

        def nearest(y: Tensor) -> Tensor:
            # Only what is near the largest component counts: seen from it, numbers of any size keep their digits.
            below = y - y.amax(-1, keepdim=True)
            z = _levelled(below, torch.zeros_like(y, dtype=torch.bool), self.total).clamp(min=0)
            return z * (self.total / z.sum(-1, keepdim=True))

        return changed(x, self.components, nearest)

    def project_subgradient(self, x: Tensor, v: Tensor) -> Tensor:
        """What v has beyond its projection on {Σ u_k = 0, u_k >= 0 where x_k = 0}, the directions that stay."""

        def nearest(y: Tensor, w: Tensor) -> Tensor:
            free = y > 0
            u = _levelled(w, free, 0.0)
            return w - torch.where(free, u, u.clamp(min=0))

        return of_the_chosen(x, v, self.components, nearest)


def _levelled(v: Tensor, free: Tensor, total: float) -> Tensor:
    """V - c, where Σ over the free of (v - c) and over the others of max(v - c, 0) is the total.    (..., N, k)."""
    # The free first, then the others from the largest on: those that count are a prefix.
    order = torch.where(free, math.inf, v).argsort(dim=-1, descending=True, stable=True)
    sorted_v, sorted_free = v.gather(-1, order), free.gather(-1, order)
    count = torch.arange(1, v.shape[-1] + 1, dtype=v.dtype, device=v.device)
    level = (sorted_v.cumsum(-1) - total) / count
    last = ((sorted_v > level) | sorted_free).sum(-1, keepdim=True).clamp(min=1) - 1
    return v - level.gather(-1, last)


def _indicator(inside: Tensor, x: Tensor) -> Tensor:
    return torch.where(inside, x.new_zeros(()), x.new_full((), math.inf))


def _listed(value: float | tuple[float, ...]) -> tuple[float, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _pairs(low: float | tuple[float, ...], high: float | tuple[float, ...]) -> list[tuple[float, float]]:
    lows, highs = _listed(low), _listed(high)
    n = max(len(lows), len(highs))
    if not {len(lows), len(highs)} <= {1, n}:
        raise ValueError(f"Box: low = {low} and high = {high} have different numbers of components.")
    return list(zip(lows * (n // len(lows)), highs * (n // len(highs)), strict=True))
