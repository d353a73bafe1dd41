"""Regularisers V of gradient flows: convex or semiconvex functions with a proximal map, smooth or not.

Each is a small frozen dataclass with its weight λ included and three methods, for points x (..., N, d):

    value(x)                    V(x), (..., N);
    prox(x, h)                  argmin_y ½|y - x|² + h V(y), (..., N, d);
    project_subgradient(x, v)   the point of the subdifferential ∂V(x) nearest to v, (..., N, d).

A velocity ṽ less the last one is the velocity of minimal norm. `components` chooses what a regulariser acts on; the
rest of x is left alone. `V + W` acts on disjoint components. Indicators of sets are in `convex_sets`. A regulariser of
one's own is a frozen dataclass that inherits `Regulariser`; V is to be semiconvex, and ∂V is its Fréchet
subdifferential.

Source: Parikh, Boyd, Proximal algorithms (2014), sections 2 and 6; Chizat, Bach, On the global convergence of gradient
descent for over-parameterized models using optimal transport (2018), proposition 2.3.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

Components = tuple[int, ...] | None

# What a proximal map may be worse than its start, in roundings of the numbers involved.
ROUNDINGS = 64


class Regulariser(abc.ABC):
    """V with its proximal map and its subdifferential."""

    is_smooth: ClassVar[bool] = False

    @property
    def used(self) -> Components:
        """Components that V depends on; None for all."""
        return getattr(self, "components", None)

    @property
    def has_domain(self) -> bool:
        """Whether V is infinite somewhere."""
        return False

    @property
    def step_limit(self) -> float:
        """Steps h below it have a proximal map; infinite for convex V."""
        return math.inf

    @abc.abstractmethod
    def value(self, x: Tensor) -> Tensor:
        """V(x).    (..., N, d) -> (..., N)."""

    @abc.abstractmethod
    def prox(self, x: Tensor, h: float) -> Tensor:
        """The minimiser of ½|y - x|² + h V(y) over y.    (..., N, d)."""

    @abc.abstractmethod
    def project_subgradient(self, x: Tensor, v: Tensor) -> Tensor:
        """The point of ∂V(x) nearest to v.    (..., N, d), (..., N, d) -> (..., N, d)."""

    def project(self, x: Tensor) -> Tensor:
        """The nearest point of the domain of V.    (..., N, d)."""
        return x

    def __add__(self, other: Regulariser) -> Regulariser:
        if not isinstance(other, Regulariser):
            return NotImplemented
        return Separable((*_parts(self), *_parts(other)))


@dataclass(frozen=True)
class L1(Regulariser):
    """V(x) = λ Σ_k |x_k| over the chosen components.

    Args:
        weight: λ >= 0.
        components: which; all when None.

    """

    weight: float
    components: Components = None

    def __post_init__(self) -> None:
        _check_weight(self)
        check_components(self)

    def value(self, x: Tensor) -> Tensor:
        """λ Σ|x_k|."""
        return self.weight * chosen(x, self.components).abs().sum(-1)

    def prox(self, x: Tensor, h: float) -> Tensor:
        """The soft threshold: every |x_k| less hλ, exactly 0 below it."""
        c = scaled(h, self.weight)
        # A difference of equal numbers is exactly 0, and NaN stays NaN.
        return changed(x, self.components, lambda y: y - y.clamp(-c, c))

    def project_subgradient(self, x: Tensor, v: Tensor) -> Tensor:
        """λ sign(x_k), and at 0 what [-λ, λ] holds nearest to v_k."""

        def nearest(y: Tensor, w: Tensor) -> Tensor:
            return torch.where(y == 0, w.clamp(-self.weight, self.weight), self.weight * y.sign())

        return of_the_chosen(x, v, self.components, nearest)


@dataclass(frozen=True)
class GroupNorm(Regulariser):
    """V(x) = λ Σ_g |x_g|, Euclidean norms of disjoint groups of components.

    Args:
        weight: λ >= 0.
        groups: tuples of components; one group of all when None.

    """

    weight: float
    groups: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        _check_weight(self)
        if self.groups is not None and not self.groups:
            raise ValueError("GroupNorm: groups is empty; expected tuples of components, or None for one of all.")
        for group in self.groups or ():
            _checked_components(group, "GroupNorm: groups")
        if self.used is not None:
            _checked_components(self.used, "GroupNorm: groups, taken together,")

    @property
    def used(self) -> Components:
        """The components of all groups."""
        return None if self.groups is None else tuple(k for group in self.groups for k in group)

    def value(self, x: Tensor) -> Tensor:
        """λ Σ|x_g|."""
        norms = [chosen(x, group).norm(dim=-1) for group in self._groups]
        return self.weight * torch.stack(norms).sum(0)

    def prox(self, x: Tensor, h: float) -> Tensor:
        """Every |x_g| less hλ, exactly 0 below it."""
        c = scaled(h, self.weight)

        def shrunk(y: Tensor) -> Tensor:
            r = y.norm(dim=-1, keepdim=True)
            return _resized(y, r, r - r.clamp(max=c))

        for group in self._groups:
            x = changed(x, group, shrunk)
        return x

    def project_subgradient(self, x: Tensor, v: Tensor) -> Tensor:
        """λ x_g/|x_g|, and at 0 what the ball of radius λ holds nearest to v_g."""

        def nearest(y: Tensor, w: Tensor) -> Tensor:
            return _norm_subgradient(y, w, y.new_full((1,), self.weight))

        parts = [of_the_chosen(x, v, group, nearest) for group in self._groups]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)

    @property
    def _groups(self) -> Sequence[Components]:
        return (None,) if self.groups is None else self.groups


@dataclass(frozen=True)
class SquaredNorm(Regulariser):
    """V(x) = λ|x|² over the chosen components: smooth.

    Args:
        weight: λ >= 0.
        components: which; all when None.

    """

    weight: float
    components: Components = None
    is_smooth: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_weight(self)
        check_components(self)

    def value(self, x: Tensor) -> Tensor:
        """λ|x|²."""
        return self.weight * chosen(x, self.components).square().sum(-1)

    def prox(self, x: Tensor, h: float) -> Tensor:
        """The point x/(1 + 2hλ)."""
        return changed(x, self.components, lambda y: y / (1 + 2 * scaled(h, self.weight)))

    def project_subgradient(self, x: Tensor, v: Tensor) -> Tensor:
        """The gradient 2λx, whatever v."""
        return of_the_chosen(x, v, self.components, lambda y, w: 2 * self.weight * y)


@dataclass(frozen=True)
class PathNorm(Regulariser):
    """V(x) = λ|w||θ| for x = (w, θ), Euclidean norms: the regulariser of ReLU units w·max(⟨θ, z⟩, 0).

    Semiconvex, V + ½λ|x|² being convex, and 2-homogeneous. The proximal map is single-valued for hλ < 1: with
    x = (a, b) and c = hλ,

        |w| = (|a| - c|b|)/(1 - c²),   |θ| = (|b| - c|a|)/(1 - c²),

    along a and b; where one of these is negative it is 0 and the other part stays as it was.

    Args:
        weight: λ >= 0.
        outer: the components w.
        inner: the components θ; all others when None.

    """

    weight: float
    outer: tuple[int, ...] = (0,)
    inner: Components = None

    def __post_init__(self) -> None:
        _check_weight(self)
        _checked_components(self.outer, "PathNorm: outer")
        if self.inner is not None:
            _checked_components(self.inner, "PathNorm: inner")
            _checked_components((*self.outer, *self.inner), "PathNorm: outer and inner, taken together,")

    @property
    def used(self) -> Components:
        """Those of w and θ."""
        return None if self.inner is None else (*self.outer, *self.inner)

    @property
    def step_limit(self) -> float:
        """1/λ: beyond, ½|y - x|² + hV(y) has several minima."""
        return 1 / self.weight if self.weight > 0 else math.inf

    def value(self, x: Tensor) -> Tensor:
        """λ|w||θ|."""
        w, theta = (chosen(x, part) for part in self._both(x))
        product: Tensor = w.norm(dim=-1) * theta.norm(dim=-1)
        return self.weight * product

    def prox(self, x: Tensor, h: float) -> Tensor:
        """As above.    ValueError for hλ >= 1."""
        c = scaled(h, self.weight)
        if c >= 1:
            raise ValueError(
                f"PathNorm: the proximal map of {self.weight:g}·|w||θ| does not exist for the step h = {h:g}: "
                f"½|y - x|² + hV(y) is convex for h < 1/weight = {1 / self.weight:.6g} only. Use a smaller dt."
            )
        outer, inner = self._both(x)
        a, b = chosen(x, outer), chosen(x, inner)
        r, s = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
        both = 1 / (1 - c * c)
        w = torch.where(s <= c * r, r, ((r - c * s) * both).clamp(min=0))
        theta = torch.where(r <= c * s, s, ((s - c * r) * both).clamp(min=0))
        return _placed(_placed(x, outer, _resized(a, r, w)), inner, _resized(b, s, theta))

    def project_subgradient(self, x: Tensor, v: Tensor) -> Tensor:
        """λ(|θ|w/|w|, |w|θ/|θ|); where one part is 0, what the ball of radius λ|the other| holds nearest to its v."""
        outer, inner = self._both(x)
        w, theta = chosen(x, outer), chosen(x, inner)
        radii = (self.weight * part.norm(dim=-1, keepdim=True) for part in (theta, w))
        near_w = _norm_subgradient(w, chosen(v, outer), next(radii))
        near_theta = _norm_subgradient(theta, chosen(v, inner), next(radii))
        return _placed(_placed(torch.zeros_like(x), outer, near_w), inner, near_theta)

    def _both(self, x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        inner = self.inner or tuple(k for k in range(x.shape[-1]) if k not in self.outer)
        if not inner:
            raise ValueError(
                f"PathNorm: the outer components {self.outer} are all of the {x.shape[-1]} there are; expected some "
                "left for θ."
            )
        return self.outer, inner


@dataclass(frozen=True)
class Separable(Regulariser):
    """V = Σ_p V_p, each on components of its own: the proximal map is theirs, side by side.

    Raises:
        ValueError: components that two parts share, where the proximal map of the sum is not known.

    """

    parts: tuple[Regulariser, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("Separable: no parts; expected regularisers.")
        used = [part.used for part in self.parts]
        known = [k for u in used if u is not None for k in u]
        if len(self.parts) > 1 and (None in used or len(set(known)) < len(known)):
            raise ValueError(
                f"Separable: {' + '.join(type(part).__name__ for part in self.parts)} share components ("
                f"{', '.join('all' if u is None else str(u) for u in used)}), and the proximal map of such a sum is "
                "not that of its terms. Give each its own `components`, or move a smooth one to the energy."
            )

    @property
    def is_smooth(self) -> bool:  # type: ignore[override]
        """Whether all parts are."""
        return all(part.is_smooth for part in self.parts)

    @property
    def used(self) -> Components:
        """Those of all parts."""
        used = [part.used for part in self.parts]
        return None if None in used else tuple(k for u in used for k in u or ())

    @property
    def has_domain(self) -> bool:
        """Whether one part has."""
        return any(part.has_domain for part in self.parts)

    @property
    def step_limit(self) -> float:
        """The smallest one."""
        return min(part.step_limit for part in self.parts)

    def value(self, x: Tensor) -> Tensor:
        """Σ V_p(x)."""
        return torch.stack([part.value(x) for part in self.parts]).sum(0)

    def prox(self, x: Tensor, h: float) -> Tensor:
        """Every part's, on its components."""
        for part in self.parts:
            x = part.prox(x, h)
        return x

    def project_subgradient(self, x: Tensor, v: Tensor) -> Tensor:
        """Every part's, on its components."""
        return torch.stack([part.project_subgradient(x, v) for part in self.parts]).sum(0)

    def project(self, x: Tensor) -> Tensor:
        """Every part's, on its components."""
        for part in self.parts:
            x = part.project(x)
        return x


def regulariser_of(scenario: Any) -> Regulariser | None:
    """The regulariser that a scenario declares, None where it has none.

    Raises:
        TypeError: it is something else.

    """
    declared = getattr(scenario, "regulariser", None)
    if declared is not None and not isinstance(declared, Regulariser):
        raise TypeError(
            f"{type(scenario).__name__}.regulariser is {declared!r:.60}; expected an object of mfsde.regularisers or "
            "mfsde.convex_sets, its weight included, or None: mfsde.regularisers.L1(0.3), or one of your own that "
            "inherits Regulariser."
        )
    return declared


def check_prox(v: Regulariser, x: Tensor, p: Tensor, h: float, name: str) -> None:
    """Refuses a proximal map p of points x of the domain, (..., N, d), that is worse than to stay.

    The minimiser has ½|p - x|² + hV(p) <= hV(x), up to rounding.

    Raises:
        ValueError: a point where it has not.

    """
    stayed, moved = h * v.value(x), 0.5 * (p - x).square().sum(-1) + h * v.value(p)
    rounding = ROUNDINGS * torch.finfo(x.dtype).eps * (x.square().sum(-1) + p.square().sum(-1) + h + stayed.abs())
    bad = torch.nonzero(~(moved <= stayed + rounding))
    if len(bad):
        where = tuple(bad[0].tolist())
        raise ValueError(
            f"{name}: prox(x, {h:g}) of {v} is not the minimiser of ½|y - x|² + hV(y): at x = {x[where].tolist()} it "
            f"gives {p[where].tolist()} with the value {float(moved[where]):.6g}, and x itself has "
            f"{float(stayed[where]):.6g}. Correct prox, or V."
        )


def _parts(v: Regulariser) -> tuple[Regulariser, ...]:
    return v.parts if isinstance(v, Separable) else (v,)


def _index(x: Tensor, components: tuple[int, ...]) -> slice | list[int]:
    """The components as an index, a slice where they follow each other."""
    if max(components) >= x.shape[-1]:
        raise ValueError(f"components {components} do not fit points of {x.shape[-1]} components.")
    first, last = components[0], components[-1]
    consecutive = components == tuple(range(first, last + 1))
    return slice(first, last + 1) if consecutive else list(components)


def chosen(x: Tensor, components: Components) -> Tensor:
    """The chosen components of the points x.    (..., N, d) -> (..., N, k)."""
    return x if components is None else x[..., _index(x, components)]


def _placed(x: Tensor, components: Components, part: Tensor) -> Tensor:
    """A copy of x with the chosen components replaced."""
    if components is None:
        return part
    y = x.clone()
    y[..., _index(x, components)] = part
    return y


def changed(x: Tensor, components: Components, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The points x with the chosen components changed, and all others left alone."""
    return _placed(x, components, change(chosen(x, components)))


def of_the_chosen(x: Tensor, v: Tensor, components: Components, nearest: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A subgradient: of the chosen components, and 0 for all others."""
    found = nearest(chosen(x, components), chosen(v, components))
    return found if components is None else _placed(torch.zeros_like(x), components, found)


def _resized(y: Tensor, norm: Tensor, wanted: Tensor) -> Tensor:
    """The vectors y, of these norms, with the wanted ones; 0 stays 0.    (..., N, k), (..., N, 1), (..., N, 1)."""
    return y * torch.where(norm > 0, wanted / norm, norm)


def _norm_subgradient(y: Tensor, v: Tensor, radius: Tensor) -> Tensor:
    """The point of ∂(radius·|·|)(y) nearest to v: radius·y/|y|, and v itself, at most radius long, where y is 0."""
    norm = y.norm(dim=-1, keepdim=True)
    size = v.norm(dim=-1, keepdim=True)
    held = torch.where(size > radius, v * (radius / size), v)
    return torch.where(norm > 0, y * (radius / norm), held)


def scaled(h: float, weight: float) -> float:
    """h·λ.    ValueError unless h >= 0."""
    if not h >= 0:
        raise ValueError(f"prox: the step h is {h}; expected h >= 0.")
    return h * weight


def _check_weight(v: L1 | GroupNorm | SquaredNorm | PathNorm) -> None:
    if not (math.isfinite(v.weight) and v.weight >= 0):
        raise ValueError(f"{type(v).__name__}: weight = {v.weight}; expected a number >= 0.")


def check_components(v: Regulariser) -> None:
    """Refuses components that are no tuple of different whole numbers."""
    if v.used is not None:
        _checked_components(v.used, f"{type(v).__name__}: components")


def _checked_components(components: tuple[int, ...], name: str) -> None:
    whole = all(isinstance(k, int) and not isinstance(k, bool) and k >= 0 for k in components)
    if not isinstance(components, tuple) or not components or not whole or len(set(components)) < len(components):
        raise ValueError(
            f"{name} are {components!r}; expected a tuple of different whole numbers >= 0, as (0,) or (1, 2)."
        )
