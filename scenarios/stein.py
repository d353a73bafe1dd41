"""Stein variational gradient descent: particles without noise that are carried to a target law by a kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mfsde import EmpiricalMeasure, Gaussian, Mixture, Observable
from mfsde.limit import gaussian_limit

KERNELS = ("gaussian", "bilinear")


@dataclass(frozen=True)
class SteinVariational:
    """dX = ∫ [k(X, y) ∇log π(y) + ∇_y k(X, y)] m(dy) dt, without noise; π a mixture of Gaussians on R^d.

    The steepest descent of KL(m | π) among velocities in the unit ball of the kernel's space, whose slope is the
    squared kernelised Stein discrepancy: d/dt KL(m | π) = -KSD²(m | π). The particle itself is among the y.

    With k = exp(-|x - y|²/(2h²)) the drift costs O(N²) time and O(N) memory. With k = x·y + 1 it is
    X + E[s] + E[s Yᵀ] X with s = ∇log π(Y): O(N). For a Gaussian π = N(a, S), P = S^{-1}, mean m and covariance C of
    any law, in particular of any number of particles, then solve

        m' = m - P C m - (1 + |m|²) P(m - a),    C' = A C + C Aᵀ,    A = I - P C - P(m - a) mᵀ,

    since the drift is the affine A X - P(m - a); they are at rest where m = a and C = S.

    Args:
        target_means: one row of d numbers for each component of π.
        target_covariances: for each component a number c (for c·I), or its d rows.
        target_weights: of the components, summing to 1; equal when empty.
        kernel: "gaussian" or "bilinear".
        bandwidth: h > 0, of the Gaussian kernel.
        initial_mean: initial mean, d numbers.
        initial_variance: initial variance of every component.

    Raises:
        ValueError: an unknown kernel, h <= 0, components that do not fit or have no density.

    Source: Liu, Wang, Stein variational gradient descent: a general purpose Bayesian inference algorithm (2016), and
    Stein variational gradient descent as moment matching (2018), for the bilinear kernel; Lu, Lu, Nolen, Scaling limit
    of the Stein variational gradient descent (2019).

    """

    target_means: Sequence[Sequence[float]] = ((-1.5, 0.0), (1.5, 0.0))
    target_covariances: Sequence[Any] = (0.5, 0.5)
    target_weights: Sequence[float] = ()
    kernel: str = "gaussian"
    bandwidth: float = 0.7
    initial_mean: Sequence[float] = (0.0, 1.0)
    initial_variance: float = 0.5

    def __post_init__(self) -> None:
        if self.kernel not in KERNELS or not self.bandwidth > 0:
            raise ValueError(
                f"kernel = {self.kernel!r}, bandwidth = {self.bandwidth}; expected {' or '.join(map(repr, KERNELS))} "
                "and h > 0."
            )
        if len(self.target_covariances) != len(self.target_means) or self.target.dim != self.dim:
            raise ValueError(
                f"{len(self.target_means)} target_means and {len(self.target_covariances)} target_covariances; "
                f"expected as many of each, in the dimension {self.dim} of initial_mean."
            )
        if not all(bool((torch.linalg.eigvalsh(law.cov) > 0).all()) for law in self._laws):
            raise ValueError("target_covariances: a component is singular; the score ∇log π needs a density.")

    @property
    def dim(self) -> int:
        """Dimension d."""
        return len(self.initial_mean)

    @cached_property
    def target(self) -> Mixture:
        """The target law π."""
        return Mixture(self._laws, list(self.target_weights) or None)

    def score(self, x: Tensor) -> Tensor:
        """∇log π(x).    (..., d) -> (..., d)."""
        means, precisions, constants = (part.to(x) for part in self._components)
        pulls = ((means - x.unsqueeze(-2)).unsqueeze(-2) @ precisions).squeeze(-2)
        exponents = constants - 0.5 * ((means - x.unsqueeze(-2)) * pulls).sum(-1)
        return (torch.softmax(exponents, -1).unsqueeze(-1) * pulls).sum(-2)

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """∫ [k(x, y) s(y) + ∇_y k(x, y)] m(dy), s = ∇log π."""
        if self.kernel == "bilinear":
            s, outer = mu.integrate(self.score).unsqueeze(-2), mu.integrate(self._outer)
            return x + s + x @ outer.mT
        return self._against(mu, x, lambda k, z, s: k.unsqueeze(-1) * (s + z / self.bandwidth**2))

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> float:
        """Zero."""
        return 0.0

    def initial(self) -> Gaussian:
        """N(initial_mean, initial_variance·I)."""
        return Gaussian(list(self.initial_mean), self.initial_variance)

    @property
    def limit(self) -> Callable[[float], Gaussian]:
        """T -> N(m, C), for the bilinear kernel and a Gaussian target; otherwise this attribute is missing."""
        if self.kernel != "bilinear" or len(self.target_means) > 1:
            raise AttributeError(
                f"SteinVariational with kernel = {self.kernel!r} and {len(self.target_means)} components has no limit "
                "in closed form; it has one for the bilinear kernel and a Gaussian target."
            )
        return self._gaussian

    @property
    def log_invariant(self) -> Callable[[Tensor], Tensor]:
        """X -> log π(x); missing for the bilinear kernel and several components, where other laws are at rest."""
        if self.kernel == "bilinear" and len(self.target_means) > 1:
            raise AttributeError(
                "SteinVariational with the bilinear kernel matches moments only: π is not its limit unless it is "
                "Gaussian. Take kernel='gaussian'."
            )
        return self.target.log_prob

    @cached_property
    def _gaussian(self) -> Callable[[float], Gaussian]:
        return gaussian_limit(self)

    def discrepancy(self, mu: EmpiricalMeasure) -> Tensor:
        """KSD²(m | π) = ∫ (s·b + ∇·b) dm, b the drift, (...,)."""
        b, h = self.drift(0.0, mu.points, mu), self.bandwidth

        def divergence(x: Tensor) -> Tensor:
            if self.kernel == "bilinear":
                return mu.integrate(lambda y: (self.score(y) * y).sum(-1) + self.dim)[..., None].expand(x.shape[:-1])
            return self._against(mu, x, lambda k, z, s: k * (self.dim - (z * (s + z / h**2)).sum(-1)) / h**2)

        return mu.integrate(lambda x: (self.score(x) * b).sum(-1) + divergence(x))

    def observables(self) -> tuple[Observable | str, ...]:
        """Mean, covariance and the squared Stein discrepancy."""
        name = "squared kernelised Stein discrepancy to the target"
        return ("mean", "covariance", Observable("discrepancy", lambda t, x, mu: self.discrepancy(mu), "1", name))

    def suggested(self) -> dict[str, Any]:
        """Settings that reach the target."""
        return {"n_particles": 200, "n_replicas": 8, "horizon": 20.0, "dt": 0.05, "seed": 0, "save_every": 10}

    @cached_property
    def _laws(self) -> list[Gaussian]:
        pairs = zip(self.target_means, self.target_covariances, strict=True)
        return [Gaussian(list(a), s) for a, s in pairs]

    @cached_property
    def _components(self) -> tuple[Tensor, Tensor, Tensor]:
        """Means (K, d), precisions (K, d, d) and log(weight √det P) (K,) of the components."""
        means = torch.stack([law.mean for law in self._laws])
        precisions = torch.linalg.inv(torch.stack([law.cov for law in self._laws]))
        return means, precisions, self.target.weights.log() + 0.5 * torch.linalg.slogdet(precisions).logabsdet

    def _outer(self, y: Tensor) -> Tensor:
        """S(y) yᵀ.    (..., d) -> (..., d, d)."""
        return self.score(y).unsqueeze(-1) * y.unsqueeze(-2)

    def _against(self, mu: EmpiricalMeasure, x: Tensor, kernel: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """∫ kernel(k(x, y), x - y, s(y)) m(dy) for the Gaussian k.

        The scores ride along as further components of the points, so that each is computed once and pairs are met in
        the blocks of `convolve`.
        """
        points = torch.cat([mu.points, self.score(mu.points)], -1)
        scored = EmpiricalMeasure(points) if mu.is_uniform else EmpiricalMeasure.signed(points, mu.weights)

        def of_difference(difference: Tensor) -> Tensor:
            z, s = difference[..., : self.dim], -difference[..., self.dim :]
            return kernel(torch.exp(-0.5 * z.square().sum(-1) / self.bandwidth**2), z, s)

        return scored.convolve(of_difference, torch.cat([mu.beside(x), torch.zeros_like(mu.beside(x))], -1))
