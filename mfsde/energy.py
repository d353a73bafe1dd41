"""Energies: functionals of a measure, defined once, with all their derivatives.

`Energy(value)` differentiates any functional automatically. `potential` and `interaction` (and `risk`, in
`network.py`) know a faster route for the same derivatives; every one of them is tested against the automatic one.

Conventions. The functional derivative is normalised by ∫ δF/δm(m)(x) m(dx) = 0; the second derivative is the kernel of
the second variation along (δ_x - m, δ_y - m), so it integrates to zero in either argument. (Deriving δF/δm once more
gives δ²F/δm²(x, y) - δF/δm(y), which is not symmetric.) D_mF = ∇_x δF/δm.

Derivatives are computed on detached tensors and returned detached, except while a run is differentiated (`tape`).
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .measure import EmpiricalMeasure
from .pairwise.convolution import SAMPLE, aside, declared, error, named
from .pairwise.kernel import Function, Kernel, Strategy
from .tape import constant, is_recording, values, variable


class Energy:
    """A functional F of a measure, from `value(mu) -> (...,)`: one scalar per replica.

    `value` must be a function of the measure: it uses the weights (through `mu.integrate`, `mu.mean`, `mu.convolve`
    or `mu.weights`), so that splitting a particle into two halves changes nothing. This is checked at first use.

    Raises:
        ValueError: at first use, when `value` returns another shape or ignores the weights.

    """

    def __init__(self, value: Callable[[EmpiricalMeasure], Tensor]) -> None:
        self._value = value
        self._checked = False

    def __call__(self, mu: EmpiricalMeasure) -> Tensor:
        """F(mu), (...,): differentiable."""
        self._check(mu)
        return self._value(mu)

    def functional_derivative(self, mu: EmpiricalMeasure, x: Tensor) -> Tensor:
        """δF/δm(m)(x), with ∫ δF/δm dm = 0.    x: (..., M, d) -> (..., M)."""
        self._check(mu)
        with torch.enable_grad():
            points, weights = _joined(mu, x)
            (slope,) = _gradient(self._value(EmpiricalMeasure.signed(points, weights, mu.period)).sum(), [weights])
        n = mu.n_particles
        return slope[..., n:] - (constant(mu.weights) * slope[..., :n]).sum(-1, keepdim=True)

    def variation(self, mu: EmpiricalMeasure, x: Tensor) -> Tensor:
        """δF/δm(m)(x) up to a constant, at the cost of x alone: for fixed points.    x: (..., M, d) -> (..., M)."""
        return self.functional_derivative(mu, x)

    def intrinsic_derivative(self, mu: EmpiricalMeasure, x: Tensor) -> Tensor:
        """D_mF(m, x) = ∇_x δF/δm(m)(x).    x: (..., M, d) -> (..., M, d).

        On the particles themselves (x is mu.points) this is ∂_{x_i}F / w_i, one backward pass; a particle of mass
        zero is treated like a point elsewhere.
        """
        self._check(mu)
        if x is mu.points and (mu.is_uniform or bool((mu.weights > 0).all())):
            with torch.enable_grad():
                points = variable(x)
                at = EmpiricalMeasure(points, period=mu.period)
                if not mu.is_uniform:
                    at = EmpiricalMeasure.signed(points, constant(mu.weights), mu.period)
                (slope,) = _gradient(self._value(at).sum(), [points])
            return slope * mu.n_particles if mu.is_uniform else slope / constant(mu.weights).unsqueeze(-1)
        with torch.enable_grad():
            at_x = variable(mu.beside(x).clone())
            points, weights = _joined(mu, at_x)
            value = self._value(EmpiricalMeasure.signed(points, weights, mu.period)).sum()
            (slope,) = _gradient(value, [weights], create_graph=True)
            return _gradient(slope[..., mu.n_particles :].sum(), [at_x])[0]

    def second_derivative(self, mu: EmpiricalMeasure, x: Tensor, y: Tensor) -> Tensor:
        """δ²F/δm²(m)(x, y), zero mean in x and in y under m.    (..., M, d), (..., K, d) -> (..., M, K).

        M + 1 backward passes.
        """
        self._check(mu)
        n, m = mu.n_particles, x.shape[-2]
        x, y = mu.beside(x), mu.beside(y)
        with torch.enable_grad():
            points, weights = _joined(mu, torch.cat([x, y], dim=-2))
            value = self._value(EmpiricalMeasure.signed(points, weights, mu.period)).sum()
            (slope,) = _gradient(value, [weights], create_graph=True)
            of_x = [_gradient(slope[..., n + i].sum(), [weights], retain_graph=True)[0] for i in range(m)]
            (of_m,) = _gradient((constant(mu.weights) * slope[..., :n]).sum(), [weights], retain_graph=True)
        rows = torch.stack(of_x, dim=-2) - of_m.unsqueeze(-2)
        return rows[..., n + m :] - (constant(mu.weights).unsqueeze(-2) * rows[..., :n]).sum(-1, keepdim=True)

    def __add__(self, other: Energy) -> Energy:
        if not isinstance(other, Energy):
            return NotImplemented
        return Sum([*self._terms(), *other._terms()])

    def __sub__(self, other: Energy) -> Energy:
        return self + (-1.0) * other

    def __radd__(self, other: Any) -> Energy:
        # sum([F, G]) starts from 0.
        if not (isinstance(other, numbers.Real) and other == 0):
            return NotImplemented
        return self

    def __mul__(self, factor: float | Tensor) -> Energy:
        if not _is_number(factor):
            return NotImplemented
        return Sum([(factor * c, term) for c, term in self._terms()])

    __rmul__ = __mul__

    def __truediv__(self, divisor: float | Tensor) -> Energy:
        if not _is_number(divisor):
            return NotImplemented
        return self * (1.0 / divisor)

    def __neg__(self) -> Energy:
        return (-1.0) * self

    def _terms(self) -> Iterator[tuple[Any, Energy]]:
        yield 1.0, self

    def _check(self, mu: EmpiricalMeasure) -> None:
        if self._checked:
            return
        # What a check sums over is not what a run does.
        with torch.no_grad(), aside():
            _check_splitting(self._value, mu)
        self._checked = True


class Sum(Energy):
    """Σ_k c_k F_k; each term keeps its own way of being differentiated."""

    def __init__(self, terms: list[tuple[Any, Energy]]) -> None:
        self.terms = terms

    def _terms(self) -> Iterator[tuple[Any, Energy]]:
        yield from self.terms

    def __call__(self, mu: EmpiricalMeasure) -> Tensor:
        """Σ_k c_k F_k(mu)."""
        return self._combine(lambda term: term(mu), lambda c: c)

    def functional_derivative(self, mu: EmpiricalMeasure, x: Tensor) -> Tensor:
        """Σ_k c_k δF_k/δm."""
        return self._combine(lambda term: term.functional_derivative(mu, x))

    def variation(self, mu: EmpiricalMeasure, x: Tensor) -> Tensor:
        """Σ_k c_k δF_k/δm, up to a constant."""
        return self._combine(lambda term: term.variation(mu, x))

    def intrinsic_derivative(self, mu: EmpiricalMeasure, x: Tensor) -> Tensor:
        """Σ_k c_k D_mF_k."""
        return self._combine(lambda term: term.intrinsic_derivative(mu, x))

    def second_derivative(self, mu: EmpiricalMeasure, x: Tensor, y: Tensor) -> Tensor:
        """Σ_k c_k δ²F_k/δm²."""
        return self._combine(lambda term: term.second_derivative(mu, x, y))

    def _combine(self, part: Callable[[Energy], Tensor], factor: Callable[[Any], Any] | None = None) -> Tensor:
        factor = _constant_factor if factor is None else factor
        (first, term), *rest = self.terms
        total: Tensor = factor(first) * part(term)
        for c, term in rest:
            total = total + factor(c) * part(term)
        return total


class Potential(Energy):
    """∫ V dm: linear, so δF/δm = V - ∫ V dm and D_mF = ∇V."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__(lambda mu: mu.integrate(function))
        self._function = function

    def functional_derivative(self, mu: EmpiricalMeasure, x: Tensor) -> Tensor:
        """V(x) - ∫ V dm."""
        self._check(mu)
        with values():
            x = mu.beside(x)
            return self._function(x) - mu.integrate(self._function).unsqueeze(-1)

    def variation(self, mu: EmpiricalMeasure, x: Tensor) -> Tensor:
        """V(x)."""
        self._check(mu)
        with values():
            return self._function(mu.beside(x))

    def intrinsic_derivative(self, mu: EmpiricalMeasure, x: Tensor) -> Tensor:
        """∇V(x)."""
        self._check(mu)
        return gradient(self._function, mu.beside(x))

    def second_derivative(self, mu: EmpiricalMeasure, x: Tensor, y: Tensor) -> Tensor:
        """Zero."""
        return x.new_zeros((*mu.points.shape[:-2], x.shape[-2], y.shape[-2]))


class Interaction(Energy):
    """½ ∬ W(x - y) m(dx) m(dy), W even, diagonal included: δF/δm = W * m - 2F, D_mF = ∇W * m.

    All derivatives are sums over pairs, evaluated by the strategy of the kernel.
    """

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(lambda mu: 0.5 * mu.integrate(lambda x: mu.convolve(kernel, x)))
        self.kernel = kernel

    def functional_derivative(self, mu: EmpiricalMeasure, x: Tensor) -> Tensor:
        """(W * m)(x) - ∬ W dm dm."""
        self._check(mu)
        with values():
            mean = mu.integrate(lambda y: mu.convolve(self.kernel, y))
            return mu.convolve(self.kernel, x) - mean.unsqueeze(-1)

    def variation(self, mu: EmpiricalMeasure, x: Tensor) -> Tensor:
        """(W * m)(x)."""
        self._check(mu)
        with values():
            return mu.convolve(self.kernel, x)

    def intrinsic_derivative(self, mu: EmpiricalMeasure, x: Tensor) -> Tensor:
        """(∇W * m)(x)."""
        self._check(mu)
        with values():
            return mu.convolve(self.kernel.slope, x)

    def error(self, mu: EmpiricalMeasure, sample: int = SAMPLE) -> Tensor:
        """The relative error of D_mF on the particles, √(Σ_i |a_i - e_i|² / Σ_i |e_i|²), against exact sums.    (...,).

        On `sample` particles, evenly spread over their numbers.
        """
        self._check(mu)
        return error(self.kernel.slope, mu, sample)

    def second_derivative(self, mu: EmpiricalMeasure, x: Tensor, y: Tensor) -> Tensor:
        """W(x - y) - (W * m)(x) - (W * m)(y) + ∬ W dm dm."""
        self._check(mu)
        x, y = mu.beside(x), mu.beside(y)
        with values():
            pairs = self.kernel(mu.displacement(x.unsqueeze(-2), y.unsqueeze(-3)))
            at_x, at_y = mu.convolve(self.kernel, x), mu.convolve(self.kernel, y)
            mean = mu.integrate(lambda z: mu.convolve(self.kernel, z))
            return pairs - at_x.unsqueeze(-1) - at_y.unsqueeze(-2) + mean[..., None, None]

    def _check(self, mu: EmpiricalMeasure) -> None:
        if self._checked:
            return
        with torch.no_grad():
            z = _probe(mu)[..., 1:, :] - _probe(mu)[..., :1, :]
            there, back = self.kernel(z), self.kernel(-z)
        if there.shape != z.shape[:-1]:
            raise ValueError(
                f"interaction: W returned shape {tuple(there.shape)} for differences {tuple(z.shape)}; expected "
                f"{tuple(z.shape[:-1])}. Sum over the last axis: W(z) = z.square().sum(-1)."
            )
        if not torch.allclose(there, back, rtol=1e-4, atol=1e-6, equal_nan=True):
            raise ValueError(
                "interaction: W is not even, W(z) ≠ W(-z). An energy sees only its even part: pass "
                "lambda z: (W(z) + W(-z)) / 2, or write the force as a drift with mu.convolve."
            )
        self._check_at_zero(mu)
        super()._check(mu)

    def _check_at_zero(self, mu: EmpiricalMeasure) -> None:
        """The diagonal belongs to the energy: W and ∇W are evaluated where particles meet themselves."""
        zero = torch.zeros_like(mu.points.detach()[..., :1, :])
        value, slope = self.kernel(zero), self.kernel.slope(zero)
        if bool(torch.isfinite(value).all()) and bool(torch.isfinite(slope).all()):
            return
        raise ValueError(
            f"interaction: W(0) = {float(value.flatten()[0])}, ∇W(0) = {slope.flatten()[: mu.dim].tolist()}. The "
            "energy includes the diagonal, so both must be finite: regularise W at 0 (|z|² + ε² for |z|²), or write "
            "the force as a drift, mu.convolve(K, x, include_self=False)."
        )


def potential(function: Callable[[Tensor], Tensor]) -> Energy:
    """F(m) = ∫ V dm.    V: (..., N, d) -> (..., N)."""
    return Potential(function)


def interaction(kernel: Kernel | Function, *, strategy: Strategy | str | None = None) -> Interaction:
    """F(m) = ½ ∬ W(x - y) m(dx) m(dy), W even, diagonal included.    W: (..., d) -> (...).

    strategy: how its sums over pairs are evaluated (`mfsde.pairwise`); None is the kernel's own, "exact" for a plain
    function. What an approximate one is worth is `interaction(W, strategy=...).error(mu)`.

    Raises:
        TypeError, ValueError: an unknown strategy. At first use: W is not even, not finite, or of another shape.

    """
    if strategy is not None:
        kernel = declared(kernel.function if isinstance(kernel, Kernel) else kernel, named(strategy))
    return Interaction(kernel if isinstance(kernel, Kernel) else Kernel(kernel))


def gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """∇V at every point, for V acting row by row.    x: (..., N, d) -> (..., N, d), detached unless recording."""
    with torch.enable_grad():
        at = variable(x)
        value = function(at)
        if value.shape != at.shape[:-1]:
            raise ValueError(
                f"{getattr(function, '__qualname__', function)} returned shape {tuple(value.shape)} for points "
                f"{tuple(at.shape)}; expected {tuple(at.shape[:-1])}, one number per particle: sum over the last axis."
            )
        (slope,) = _gradient(value.sum(), [at])
    return slope


def _gradient(output: Tensor, inputs: list[Tensor], **options: Any) -> list[Tensor]:
    """Gradients that are zero, not missing, where the output does not depend on the input."""
    if not output.requires_grad:
        return [torch.zeros_like(z) for z in inputs]
    if is_recording():
        options["create_graph"] = True
    found = torch.autograd.grad(output, inputs, allow_unused=True, **options)
    slopes = [torch.zeros_like(z) if g is None else g for g, z in zip(found, inputs, strict=True)]
    return slopes if options.get("create_graph") else [g.detach() for g in slopes]


def _is_number(factor: Any) -> bool:
    """Parameters of an energy are tensors while a run is differentiated."""
    return isinstance(factor, numbers.Real) or (isinstance(factor, Tensor) and factor.ndim == 0)


def _constant_factor(factor: float | Tensor) -> float | Tensor:
    return constant(factor) if isinstance(factor, Tensor) else factor


def _joined(mu: EmpiricalMeasure, x: Tensor) -> tuple[Tensor, Tensor]:
    """The atoms of μ and, with weight zero, the points x: where weights are differentiated."""
    lead = mu.points.shape[:-2]
    points = torch.cat([constant(mu.points), mu.beside(x)], dim=-2)
    extra = mu.points.new_zeros((*lead, x.shape[-2]))
    weights = torch.cat([constant(mu.weights), extra], dim=-1).requires_grad_()
    return points, weights


def _probe(mu: EmpiricalMeasure) -> Tensor:
    """At most four particles of μ, spread out so that they differ even when the law is a point."""
    points = mu.points.detach()[..., :4, :]
    points = points if points.shape[-2] > 1 else points.expand(*points.shape[:-2], 2, points.shape[-1])
    shift = torch.linspace(0.1, 0.7, points.shape[-2], dtype=points.dtype, device=points.device)
    return points + shift.unsqueeze(-1) * torch.cos(
        torch.arange(points.shape[-1], dtype=points.dtype, device=points.device)
    )


def _check_splitting(value: Callable[[EmpiricalMeasure], Tensor], mu: EmpiricalMeasure) -> None:
    points = _probe(mu)
    n = points.shape[-2]
    weights = torch.arange(1, n + 1, dtype=points.dtype, device=points.device)
    weights = (weights / weights.sum()).expand(points.shape[:-1])
    whole = value(EmpiricalMeasure.signed(points, weights, mu.period))
    if whole.shape != mu.points.shape[:-2]:
        raise ValueError(
            f"Energy: value(mu) returned shape {tuple(whole.shape)} for points {tuple(mu.points.shape)}; expected "
            f"{tuple(mu.points.shape[:-2])}, one scalar per replica. mu.mean() keeps a particle axis: use "
            "mu.integrate, or sum over the last two axes."
        )
    half = 0.5 * weights[..., :1]
    halves = value(
        EmpiricalMeasure.signed(
            torch.cat([points[..., :1, :], points], dim=-2),
            torch.cat([half, half, weights[..., 1:]], dim=-1),
            mu.period,
        )
    )
    size = torch.nan_to_num(whole).abs().max()
    if not torch.allclose(whole, halves, rtol=1e-3, atol=1e-5 * float(size), equal_nan=True):
        raise ValueError(
            "Energy: value(mu) changes when a particle is split into two halves, so it is not a function of the "
            f"measure ({float(whole.flatten()[0]):.6g} became {float(halves.flatten()[0]):.6g}). Use the weights: "
            "mu.integrate(f) instead of f(mu.points).mean()."
        )
