"""Weighted empirical measures and the laws that have a formula.

An `EmpiricalMeasure` is what every drift, diffusion and energy receives as `mu`. It may carry leading
axes (replicas) before the particle axis, so code written for one system works for a batch of them.
A `Law` is a probability measure given by a formula: it starts runs, and it is what particles converge to.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .pairwise.convolution import convolve, pairs_of
from .pairwise.kernel import Function, Kernel, Key
from .tape import is_recording, stacked
from .torus import Period, shortest

# Reductions over particles run in blocks of this many rows, so that their rounding depends neither on the
# number of threads nor on how many replicas share the batch.
BLOCK = 4096

# Up to this dimension covariances are sums of products, whose rounding depends on nothing but the points; above, matrix
# products are many times faster, and their rounding may depend on the number of threads.
ELEMENTWISE_DIM = 16


class EmpiricalMeasure:
    """The measure Σ_j w_j δ_{x_j}, with any leading axes (replicas) in front.

    Args:
        points: (..., N, d) floating tensor.
        weights: (..., N), non-negative and summing to 1 over the last axis; uniform 1/N when None.
        period: component-wise period of a torus, `None` on a line; differences in `convolve` are then the
            shortest ones, in [-period/2, period/2].

    Raises:
        TypeError: points are not a floating tensor.
        ValueError: shapes do not fit, there is no particle, or the weights are not a probability vector.

    """

    __slots__ = ("_is_given", "_weights", "key", "period", "points")

    def __init__(self, points: Tensor, weights: Tensor | None = None, *, period: Period = None) -> None:
        if not isinstance(points, Tensor) or not points.is_floating_point():
            raise TypeError(f"EmpiricalMeasure needs a floating tensor of points (..., N, d); got {points!r:.80}")
        if points.ndim < 2 or points.shape[-2] == 0:
            raise ValueError(
                f"EmpiricalMeasure needs points of shape (..., N, d) with N >= 1; got {tuple(points.shape)}. "
                "N scalars are written x[:, None]."
            )
        if weights is not None:
            _check_weights(points, weights)
        self.points = points
        self._weights = weights
        self._is_given = False
        self.period = period
        # The randomness of a step, for strategies that draw: a run sets it.
        self.key: Key | None = None

    @classmethod
    def signed(
        cls, points: Tensor, weights: Tensor | None, period: Period = None, key: Key | None = None
    ) -> EmpiricalMeasure:
        """The same sum without the check that the weights are a probability; key: the randomness of a step.

        Derivatives with respect to the measure move weights off the simplex.
        """
        mu = cls(points, period=period)
        mu._weights = weights
        mu.key = key
        return mu

    @classmethod
    def given(cls, points: Tensor, weights: Tensor, period: Period = None) -> EmpiricalMeasure:
        """A law that particles live in without being its atoms: it has no self to leave out in `convolve`."""
        mu = cls(points, weights, period=period)
        mu._is_given = True
        return mu

    @property
    def is_uniform(self) -> bool:
        """True when no weights were given: every particle has mass 1/N."""
        return self._weights is None

    @property
    def weights(self) -> Tensor:
        """(..., N), the mass of each particle."""
        if self._weights is None:
            n = self.n_particles
            return self.points.new_full((1,), 1.0 / n).expand(self.points.shape[:-1])
        return self._weights

    @property
    def n_particles(self) -> int:
        """Number of atoms N."""
        return self.points.shape[-2]

    @property
    def dim(self) -> int:
        """Dimension d of the state space."""
        return self.points.shape[-1]

    def mean(self) -> Tensor:
        """∫ x μ(dx).    (..., 1, d), so that it broadcasts against the particles."""
        return self._average(self.points, self.points.ndim - 2).unsqueeze(-2)

    def covariance(self) -> Tensor:
        """∫ (x - m)(x - m)ᵀ μ(dx), m = ∫ x dμ: the population covariance (1/N, not 1/(N-1)).    (..., d, d)."""
        centred = self.points - self.mean()
        if self.dim > ELEMENTWISE_DIM:
            weighted = centred / self.n_particles if self.is_uniform else centred * self.weights.unsqueeze(-1)
            return _blocked_gram(weighted, centred)
        rows = [self._average(centred[..., k : k + 1] * centred, centred.ndim - 2) for k in range(self.dim)]
        return torch.stack(rows, dim=-2)

    def integrate(self, f: Callable[[Tensor], Tensor]) -> Tensor:
        """∫ f dμ.    f: (..., N, d) -> (..., N, *out); returns (..., *out).

        Raises:
            ValueError: f dropped the particle axis.

        """
        values = f(self.points)
        axis = self.points.ndim - 2
        if values.shape[: axis + 1] != self.points.shape[: axis + 1]:
            raise ValueError(
                f"integrate: f returned shape {tuple(values.shape)} for points {tuple(self.points.shape)}; expected "
                f"{tuple(self.points.shape[: axis + 1])} followed by the shape of f(x). f must keep the particle axis."
            )
        return self._average(values, axis)

    def convolve(self, kernel: Kernel | Function, x: Tensor, include_self: bool = True) -> Tensor:
        """(K * μ)(x_i) = Σ_j w_j K(x_i - x_j).    x: (..., M, d), kernel: (..., d) -> (..., *out).

        The one O(N²) operation of the engine. A `Kernel` says how it is evaluated; a plain function is summed exactly,
        by the strategy that suits it (`pairwise.Exact`). Memory is O(N): there is no M × N tensor. With
        `include_self=False` the term j = i is left out (the kernel is never evaluated at 0) and the rest is
        renormalised by 1/(1 - w_i); x must then be the points.

        Raises:
            ValueError: `include_self=False` with x other than the points, or with a single particle; a strategy that
                does not suit the kernel.

        """
        include_self = include_self or self._is_given
        if not include_self:
            self._check_others(x)
        x = self.beside(x)
        own = None if include_self else torch.arange(x.shape[-2], device=x.device)
        total = convolve(kernel if isinstance(kernel, Kernel) else Kernel(kernel), pairs_of(self, x, own))
        if not include_self:
            rest = (1 - self.weights).reshape(total.shape[:2] + (1,) * (total.ndim - 2))
            total = total / rest
        return total.reshape(*x.shape[:-1], *total.shape[2:])

    def beside(self, x: Tensor) -> Tensor:
        """Points with the measure's leading axes: (M, d) points are shared by all replicas."""
        return x if x.shape[:-2] == self.points.shape[:-2] else x.expand(*self.points.shape[:-2], *x.shape[-2:])

    def displacement(self, x: Tensor, y: Tensor) -> Tensor:
        """X - y, the shortest one on a torus."""
        return shortest(x - y, self.period)

    def _average(self, values: Tensor, axis: int) -> Tensor:
        if self._weights is None:
            return blocked_sum(values, axis) / self.n_particles
        weights = self._weights.reshape(self._weights.shape + (1,) * (values.ndim - axis - 1))
        return blocked_sum(values * weights, axis)

    def _check_others(self, x: Tensor) -> None:
        if x.shape != self.points.shape or not (x is self.points or torch.equal(x, self.points)):
            raise ValueError(
                "convolve(include_self=False) leaves out particle i at x_i, so x must be the measure's own points; "
                "got other points. Evaluate elsewhere with include_self=True."
            )
        if self.n_particles == 1:
            raise ValueError("convolve(include_self=False) needs at least two particles: a single one has no others.")


def _check_weights(points: Tensor, weights: Tensor) -> None:
    if weights.shape != points.shape[:-1]:
        raise ValueError(
            f"weights have shape {tuple(weights.shape)}; expected {tuple(points.shape[:-1])}, one for each particle of "
            f"points {tuple(points.shape)}."
        )
    total = weights.detach().sum(-1)
    # NaN fails the comparison too.
    if not (bool((weights.detach() >= 0).all()) and bool(((total - 1).abs() <= 1e-4).all())):
        raise ValueError(
            f"weights must be non-negative and sum to 1 over the particles; the sums lie in "
            f"[{float(total.min()):.6g}, {float(total.max()):.6g}]. Divide by weights.sum(-1, keepdim=True)."
        )


def blocked_sum(values: Tensor, axis: int) -> Tensor:
    """Sum over one axis in fixed blocks, so that threads and leading axes do not change the rounding."""
    n = values.shape[axis]
    whole = n // BLOCK * BLOCK
    if whole == 0:
        return values.sum(axis)
    head: Tensor = values.narrow(axis, 0, whole).unflatten(axis, (-1, BLOCK)).sum(axis + 1).sum(axis)
    return head if whole == n else head + values.narrow(axis, whole, n - whole).sum(axis)


def _blocked_gram(a: Tensor, b: Tensor) -> Tensor:
    """Σ_i a_i b_iᵀ, replica by replica in blocks of rows.    (..., N, d), (..., N, d) -> (..., d, d)."""
    left, right = (z.reshape(-1, *z.shape[-2:]) for z in (a, b))
    total = left.new_zeros((len(left), a.shape[-1], b.shape[-1]))
    # One product for each replica and block: a batched one rounds differently for another number of replicas.
    for replica in range(len(left)):
        for start in range(0, left.shape[1], BLOCK):
            rows = slice(start, start + BLOCK)
            total[replica] += left[replica, rows].T @ right[replica, rows]
    return total.reshape(*a.shape[:-2], a.shape[-1], b.shape[-1])


def _tensor(value: Any, name: str) -> Tensor:
    tensor = stacked(value).cpu() if is_recording() else torch.as_tensor(value, dtype=torch.float64).detach().cpu()
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} = {tensor.tolist()} is not finite; a law needs finite parameters.")
    return tensor


def _like(parameter: Tensor, x: Tensor) -> Tensor:
    return parameter.to(device=x.device, dtype=x.dtype)


def _normal_cdf(z: Tensor) -> Tensor:
    # torch's ndtr is (1 + erf)/2, which has no digits left in the lower tail.
    phi: Tensor = 0.5 * torch.special.erfc(-math.sqrt(0.5) * z)
    return phi


class Law(abc.ABC):
    """A probability measure given by a formula.

    Subclasses say how standard normal variates become samples, row by row: equal variates couple two laws, and in
    one dimension the coupling is monotone, hence optimal for W₂.
    """

    @property
    @abc.abstractmethod
    def dim(self) -> int:
        """Dimension d."""

    @property
    def n_variates(self) -> int:
        """Number q of standard normal variates that make one sample."""
        return self.dim

    @abc.abstractmethod
    def from_variates(self, z: Tensor) -> Tensor:
        """Samples from standard normals.    z: (..., N, q) -> (..., N, d), in z's dtype and on its device."""

    @abc.abstractmethod
    def as_measure(self) -> EmpiricalMeasure:
        """A quadrature of the law in float64: a weighted measure with the law's exact mean and covariance."""

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """N independent samples, (n, d), in float64."""
        return self.from_variates(torch.randn(n, self.n_variates, generator=generator, dtype=torch.float64))


@dataclass(frozen=True, eq=False)
class Gaussian(Law):
    """N(mean, cov) on R^d.

    Args:
        mean: (d,); a number means d = 1.
        cov: (d, d), symmetric positive semi-definite; a number c means c·I.

    Raises:
        ValueError: shapes that do not fit, parameters that are not finite, a covariance that is not one.

    """

    mean: Tensor
    cov: Tensor

    def __init__(self, mean: Any, cov: Any) -> None:
        m = torch.atleast_1d(_tensor(mean, "mean"))
        c = _tensor(cov, "cov")
        c = c * torch.eye(len(m), dtype=c.dtype) if c.ndim == 0 else c
        if m.ndim != 1 or c.shape != (len(m), len(m)):
            raise ValueError(
                f"Gaussian: mean has shape {tuple(m.shape)} and cov {tuple(c.shape)}; expected (d,) and (d, d). "
                "In one dimension write Gaussian([m], [[v]])."
            )
        root, failed = torch.linalg.cholesky_ex(c)
        # A factor of an exactly symmetric matrix proves that it is a covariance; what has none is looked at.
        sound = torch.equal(c, c.T) and not bool(failed) and not bool(torch.isnan(root).any())
        object.__setattr__(self, "mean", m)
        object.__setattr__(self, "cov", c)
        object.__setattr__(self, "_factor", root if sound else _root_of_covariance(c))

    @property
    def dim(self) -> int:
        """Dimension d."""
        return len(self.mean)

    def from_variates(self, z: Tensor) -> Tensor:
        """Mean + L z with L Lᵀ = cov (Cholesky, or the eigenvector root when cov is singular)."""
        factor: Tensor = self._factor  # type: ignore[attr-defined]
        if bool((factor == torch.diag(torch.diagonal(factor))).all()):
            # Elementwise, so that a sample's rounding does not depend on how many there are.
            return _like(self.mean, z) + z * _like(torch.diagonal(factor), z)
        x = _like(self.mean, z).expand(*z.shape[:-1], self.dim)
        for k in range(self.dim):
            x = x + z[..., k : k + 1] * _like(factor[:, k], z)
        return x

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density, (..., d) -> (...).    ValueError if cov is singular."""
        factor = _like(self._factor, x)  # type: ignore[attr-defined]
        variances = torch.linalg.eigvalsh(self.cov)
        if float(variances.min()) <= 0:
            raise ValueError("Gaussian.log_prob: cov is singular, the law has no density.")
        centred = (x - _like(self.mean, x)).unsqueeze(-1)
        white = torch.linalg.solve(factor, centred).squeeze(-1)
        log_det = float(variances.log().sum())
        squared: Tensor = white.square().sum(-1)
        return -0.5 * (squared + log_det + self.dim * math.log(2 * math.pi))

    def cdf(self, x: Tensor) -> Tensor:
        """P(X <= x), one dimension only."""
        _one_dimensional(self, "cdf")
        deviation = _like(self.cov, x)[0, 0].sqrt()
        centred = x - _like(self.mean, x)
        if float(self.cov[0, 0]) == 0:
            return (centred >= 0).to(x.dtype)
        return _normal_cdf(centred / deviation)

    def quantile(self, u: Tensor) -> Tensor:
        """Inverse of the distribution function, one dimension only."""
        _one_dimensional(self, "quantile")
        z: Tensor = torch.special.ndtri(u)
        return _like(self.mean, u) + _like(self.cov, u)[0, 0].sqrt() * z

    def as_measure(self) -> EmpiricalMeasure:
        """Gauss-Hermite quadrature (64 nodes in d = 1, 32² in d = 2), matched Sobol points above."""
        if self.dim > 2:
            return _sobol_measure(self, self.mean, self.cov)
        from numpy.polynomial.hermite_e import hermegauss

        nodes, weights = (torch.from_numpy(a) for a in hermegauss(64 if self.dim == 1 else 32))
        z = torch.cartesian_prod(*[nodes] * self.dim).reshape(-1, self.dim)
        w = torch.cartesian_prod(*[weights / weights.sum()] * self.dim).reshape(-1, self.dim).prod(-1)
        return EmpiricalMeasure(self.from_variates(z), w)


def _root_of_covariance(c: Tensor) -> Tensor:
    """Q Λ^{1/2} of a covariance that is singular, or symmetric up to rounding.    ValueError if it is none."""
    values, vectors = torch.linalg.eigh((c + c.T) / 2)
    tolerance = 1e-12 * max(1.0, float(values.abs().max()))
    if not torch.allclose(c, c.T, rtol=1e-10, atol=1e-12) or float(values.min()) < -tolerance:
        raise ValueError(
            f"Gaussian: cov is not a covariance (smallest eigenvalue {float(values.min()):.3g}, asymmetry "
            f"{float((c - c.T).abs().max()):.3g}); expected a symmetric positive semi-definite matrix."
        )
    root, failed = torch.linalg.cholesky_ex(c)
    degenerate = bool(failed) or bool(torch.isnan(root).any())
    if degenerate and is_recording() and torch.equal(c, torch.diag(torch.diagonal(c))):
        # Its eigenvectors do not move with its variances, and a variance that is 0 has no derivative to spoil others.
        vectors = vectors.detach()
        values = torch.diagonal(c) @ vectors.square()
        fixed: Tensor = vectors * torch.where(values > 0, values, 1.0).sqrt() * (values > 0)
        return fixed
    factor: Tensor = vectors * values.clamp(min=0).sqrt() if degenerate else root
    return factor


@dataclass(frozen=True, eq=False)
class Uniform(Law):
    """The uniform law on the box [low, high].    low, high: (d,) or numbers, low < high.

    Raises:
        ValueError: bounds that do not fit, are not finite or not in order.

    """

    low: Tensor
    high: Tensor

    def __init__(self, low: Any, high: Any) -> None:
        bounds = torch.broadcast_tensors(torch.atleast_1d(_tensor(low, "low")), torch.atleast_1d(_tensor(high, "high")))
        if bounds[0].ndim != 1 or not bool((bounds[0] < bounds[1]).all()):
            raise ValueError(f"Uniform: expected low < high of shape (d,); got low = {low}, high = {high}.")
        object.__setattr__(self, "low", bounds[0].clone())
        object.__setattr__(self, "high", bounds[1].clone())

    @property
    def dim(self) -> int:
        """Dimension d."""
        return len(self.low)

    @property
    def mean(self) -> Tensor:
        """Centre of the box, (d,)."""
        return (self.low + self.high) / 2

    @property
    def cov(self) -> Tensor:
        """diag((high - low)²)/12, (d, d)."""
        return torch.diag((self.high - self.low).square() / 12)

    def from_variates(self, z: Tensor) -> Tensor:
        """Low + (high - low) Φ(z)."""
        return _like(self.low, z) + _like(self.high - self.low, z) * _normal_cdf(z)

    def log_prob(self, x: Tensor) -> Tensor:
        """-log volume inside the box, -inf outside."""
        inside = ((x >= _like(self.low, x)) & (x <= _like(self.high, x))).all(-1)
        level = x.new_tensor(-float((self.high - self.low).log().sum()))
        return torch.where(inside, level, x.new_tensor(-math.inf))

    def cdf(self, x: Tensor) -> Tensor:
        """P(X <= x), one dimension only."""
        _one_dimensional(self, "cdf")
        return ((x - _like(self.low, x)) / _like(self.high - self.low, x)).clamp(0, 1)

    def quantile(self, u: Tensor) -> Tensor:
        """Inverse of the distribution function, one dimension only."""
        _one_dimensional(self, "quantile")
        return _like(self.low, u) + _like(self.high - self.low, u) * u

    def as_measure(self) -> EmpiricalMeasure:
        """Gauss-Legendre quadrature (64 nodes in d = 1, 32² in d = 2), matched Sobol points above."""
        if self.dim > 2:
            return _sobol_measure(self, self.mean, self.cov)
        from numpy.polynomial.legendre import leggauss

        nodes, weights = (torch.from_numpy(a) for a in leggauss(64 if self.dim == 1 else 32))
        unit = torch.cartesian_prod(*[(nodes + 1) / 2] * self.dim).reshape(-1, self.dim)
        w = torch.cartesian_prod(*[weights / 2] * self.dim).reshape(-1, self.dim).prod(-1)
        return EmpiricalMeasure(self.low + (self.high - self.low) * unit, w / w.sum())


@dataclass(frozen=True, eq=False)
class Dirac(Law):
    """The point mass at `point`, (d,) or a number."""

    point: Tensor

    def __init__(self, point: Any) -> None:
        p = torch.atleast_1d(_tensor(point, "point"))
        if p.ndim != 1:
            raise ValueError(f"Dirac: expected a point of shape (d,); got {tuple(p.shape)}.")
        object.__setattr__(self, "point", p)

    @property
    def dim(self) -> int:
        """Dimension d."""
        return len(self.point)

    @property
    def n_variates(self) -> int:
        """Nothing is random."""
        return 0

    @property
    def mean(self) -> Tensor:
        """The point."""
        return self.point

    @property
    def cov(self) -> Tensor:
        """Zero, (d, d)."""
        return torch.zeros(self.dim, self.dim, dtype=torch.float64)

    def from_variates(self, z: Tensor) -> Tensor:
        """The point, once for each row of z."""
        return _like(self.point, z).expand(*z.shape[:-1], self.dim).clone()

    def cdf(self, x: Tensor) -> Tensor:
        """P(X <= x), one dimension only."""
        _one_dimensional(self, "cdf")
        return (x >= _like(self.point, x)).to(x.dtype)

    def quantile(self, u: Tensor) -> Tensor:
        """The point, one dimension only."""
        _one_dimensional(self, "quantile")
        return _like(self.point, u).expand_as(u).clone()

    def as_measure(self) -> EmpiricalMeasure:
        """One atom."""
        return EmpiricalMeasure(self.point[None])


@dataclass(frozen=True, eq=False)
class Mixture(Law):
    """Σ_k p_k law_k.

    In one dimension samples are quantiles of the mixture, so that the coupling by equal variates stays monotone;
    above, one extra variate chooses the component.

    Args:
        components: laws of one dimension d.
        weights: p, non-negative, summing to 1; equal when None.

    Raises:
        ValueError: no component, dimensions that differ, weights that are not a probability.

    """

    components: tuple[Law, ...]
    weights: Tensor

    def __init__(self, components: Sequence[Law], weights: Any = None) -> None:
        laws = tuple(components)
        if not laws or len({law.dim for law in laws}) != 1:
            raise ValueError(f"Mixture: expected laws of one dimension; got dimensions {[law.dim for law in laws]}.")
        p = _tensor([1.0 / len(laws)] * len(laws) if weights is None else weights, "weights")
        if p.shape != (len(laws),) or float(p.min()) < 0 or abs(float(p.sum()) - 1) > 1e-9:
            raise ValueError(
                f"Mixture: weights {p.tolist()} are not a probability over {len(laws)} components; they must be "
                "non-negative and sum to 1."
            )
        object.__setattr__(self, "components", laws)
        object.__setattr__(self, "weights", p)

    @property
    def dim(self) -> int:
        """Dimension d."""
        return self.components[0].dim

    @property
    def n_variates(self) -> int:
        """One in one dimension; above, the most that a component needs and one to choose it."""
        return 1 if self.dim == 1 else 1 + max(law.n_variates for law in self.components)

    @property
    def mean(self) -> Tensor:
        """Σ p_k mean_k, (d,)."""
        means = torch.stack([law.mean for law in self.components])  # type: ignore[attr-defined]
        return (self.weights[:, None] * means).sum(0)

    @property
    def cov(self) -> Tensor:
        """Σ p_k (cov_k + (mean_k - mean)(mean_k - mean)ᵀ), (d, d)."""
        total = torch.zeros(self.dim, self.dim, dtype=torch.float64)
        for p, law in zip(self.weights, self.components, strict=True):
            offset = law.mean - self.mean  # type: ignore[attr-defined]
            total = total + p * (law.cov + torch.outer(offset, offset))  # type: ignore[attr-defined]
        return total

    def from_variates(self, z: Tensor) -> Tensor:
        """The quantile of Φ(z) in one dimension; above, the component that Φ(z_0) falls into."""
        if self.dim == 1:
            return self.quantile(_normal_cdf(z.double())).to(z.dtype)
        if self.weights.requires_grad:
            raise ValueError(
                f"Mixture: in dimension {self.dim} a sample jumps from one component to another as the weights change, "
                "so it has no derivative with respect to them. Differentiate the components' parameters, or compare "
                "runs with the same seed."
            )
        u = _normal_cdf(z[..., :1].double())
        edges = self.weights.cumsum(0).to(z.device)
        chosen = torch.searchsorted(edges, u).clamp(max=len(self.components) - 1)
        out = z.new_zeros((*z.shape[:-1], self.dim))
        for k, law in enumerate(self.components):
            out = torch.where(chosen == k, law.from_variates(z[..., 1 : 1 + law.n_variates]), out)
        return out

    def log_prob(self, x: Tensor) -> Tensor:
        """Log Σ p_k density_k(x), (..., d) -> (...)."""
        parts = [
            math.log(float(p)) + law.log_prob(x)  # type: ignore[attr-defined]
            for p, law in zip(self.weights, self.components, strict=True)
            if float(p) > 0
        ]
        return torch.logsumexp(torch.stack(parts), dim=0)

    def cdf(self, x: Tensor) -> Tensor:
        """P(X <= x), one dimension only."""
        _one_dimensional(self, "cdf")
        parts = zip(self.weights, self.components, strict=True)
        return torch.stack([_share(p) * law.cdf(x) for p, law in parts]).sum(0)  # type: ignore[attr-defined]

    def quantile(self, u: Tensor) -> Tensor:
        """Inverse of the distribution function by bisection to float64 rounding, one dimension only."""
        _one_dimensional(self, "quantile")
        v = u.double()
        ends = torch.stack([law.quantile(v) for law in self.components])  # type: ignore[attr-defined]
        low, high = ends.amin(0).detach(), ends.amax(0).detach()
        for _ in range(64):
            middle = (low + high) / 2
            below = self.cdf(middle).detach() < v
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (self._implicit(high) if is_recording() else high).to(u.dtype)

    def _implicit(self, x: Tensor) -> Tensor:
        """The quantile x with its derivative in the parameters, dx = -dF/f: F(x) does not move with them."""
        at = x.detach().requires_grad_()
        (density,) = torch.autograd.grad(self.cdf(at).sum(), [at])
        level = self.cdf(x.detach())
        # Where an atom stands there is no density.
        return x - torch.where(density > 0, (level - level.detach()) / density, 0.0)

    def as_measure(self) -> EmpiricalMeasure:
        """The components' quadratures side by side."""
        parts = [law.as_measure() for law in self.components]
        weights = [float(p) * part.weights for p, part in zip(self.weights, parts, strict=True)]
        return EmpiricalMeasure(torch.cat([part.points for part in parts]), torch.cat(weights))


def _share(p: Tensor) -> float | Tensor:
    """A weight of a mixture as a number; as it is where a derivative is taken."""
    return p if p.requires_grad else float(p)


def _one_dimensional(law: Law, what: str) -> None:
    if law.dim != 1:
        raise ValueError(f"{type(law).__name__}.{what} exists in one dimension only; this law has d = {law.dim}.")


def _sobol_measure(law: Law, mean: Tensor, cov: Tensor, log2_n: int = 12) -> EmpiricalMeasure:
    """2^12 scrambled Sobol points through the law's variates, moved affinely onto its exact mean and covariance."""
    unit = torch.quasirandom.SobolEngine(law.n_variates, scramble=True, seed=0).draw(1 << log2_n, dtype=torch.float64)
    points = law.from_variates(torch.special.ndtri(unit.clamp(1e-9, 1 - 1e-9)))
    measure = EmpiricalMeasure(points)
    found, wanted = _square_root(measure.covariance()), _square_root(cov)
    matched = (points - measure.mean()) @ torch.linalg.pinv(found) @ wanted + mean
    return EmpiricalMeasure(matched)


def _square_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = vectors * values.clamp(min=0).sqrt() @ vectors.mT
    return root
