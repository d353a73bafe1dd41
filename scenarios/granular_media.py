"""The granular media equation: particles that collide inelastically attract by the cube of their distance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mfsde import EmpiricalMeasure, Energy, Gaussian, Observable, interaction, potential


@dataclass(frozen=True)
class GranularMedia:
    """dX = -(∇W * m(X) + k X) dt + σ dW on R^d, W(z) = |z|³/3, ∇W(z) = |z| z.

    The gradient flow of ½ ∬ W(x - y) dm dm + ½k ∫ |x|² dm + (σ²/2) ∫ m log m. For k = 0 the centre of mass moves by the
    mean of the noise alone. W is convex, but not uniformly at 0, so that decay is algebraic: two solutions with one
    centre of mass have W₂(t) <= W₂(0)/(1 + t W₂(0)/√2), and without noise v = ∫ |x - mean|² dm has
    v_t <= v₀/(1 + t √(2v₀))². The first is ⟨|a|a - |b|b, a - b⟩ >= ½|a - b|³ under synchronous coupling, the second
    v' = -∬ |x - y|³ dm dm <= -(2v)^{3/2}; both hold for the particles too.

    The drift is O(N log N) for d = 1, by sums over sorted particles; O(N²) above.

    Args:
        stiffness: k >= 0, the confinement.
        sigma: σ.
        initial_mean: initial mean, d numbers.
        initial_variance: initial variance of every component.

    Source: Benedetto, Caglioti, Carrillo, Pulvirenti, A non-Maxwellian steady distribution for one-dimensional granular
    media (1998); Carrillo, McCann, Villani, Kinetic equilibration rates for granular media (2003); Cattiaux, Guillin,
    Malrieu, Probabilistic approach for granular media equations in the non-uniformly convex case (2008).

    """

    stiffness: float = 0.0
    sigma: float = 0.5
    initial_mean: Sequence[float] = (0.0,)
    initial_variance: float = 1.0

    @cached_property
    def energy(self) -> Energy:
        """½ ∬ |x - y|³/3 dm dm + ½k ∫ |x|² dm."""
        collisions = interaction(_cubic)
        return collisions + self.stiffness * potential(_half_square) if self.stiffness else collisions

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """-D_mF(mu, x), by hand."""
        force = _sorted_force(x, mu) if mu.dim == 1 else mu.convolve(_slope, x)
        return -(force + self.stiffness * x)

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> float:
        """σ."""
        return self.sigma

    def initial(self) -> Gaussian:
        """N(initial_mean, initial_variance·I)."""
        return Gaussian(list(self.initial_mean), self.initial_variance)

    def temperature(self, mu: EmpiricalMeasure) -> Tensor:
        """∫ |x - mean|² dm/d, the granular temperature, (...,)."""
        variances = torch.diagonal(mu.covariance(), dim1=-2, dim2=-1)
        return torch.mean(variances, dim=-1)

    def observables(self) -> tuple[Observable | str, ...]:
        """Mean, granular temperature."""
        temperature = Observable("temperature", lambda t, x, mu: self.temperature(mu), "1", "∫ |x - mean|² dm / d")
        return ("mean", temperature)

    def suggested(self) -> dict[str, Any]:
        """Settings that reach the stationary law, around a centre of mass that moves little."""
        return {"n_particles": 2000, "n_replicas": 8, "horizon": 5.0, "dt": 0.01, "seed": 0, "save_every": 10}


def _sorted_force(x: Tensor, mu: EmpiricalMeasure) -> Tensor:
    """∫ |x - y|(x - y) m(dy) on the line, (..., M, 1): with A, B, C the mass, first and second moment left of x minus
    those right of it, A x² - 2B x + C.

    In float64 around the mean: these sums cancel.
    """
    centre = mu.mean()
    y, order = (mu.points - centre).squeeze(-1).double().sort(dim=-1)
    z = (mu.beside(x) - centre).squeeze(-1).double().contiguous()
    w = mu.weights.double().expand_as(y).gather(-1, order)
    left = torch.stack([w, w * y, w * y.square()]).cumsum(-1)
    total = left[..., -1:]
    left = torch.nn.functional.pad(left, (1, 0))
    rank = torch.searchsorted(y.detach(), z.detach())
    a, b, c = 2 * left.gather(-1, rank.expand(3, *rank.shape)) - total
    force: Tensor = ((a * z - 2 * b) * z + c).unsqueeze(-1)
    return force.to(x.dtype)


def _slope(z: Tensor) -> Tensor:
    """∇W(z) = |z| z."""
    distance: Tensor = z.norm(dim=-1, keepdim=True)
    return distance * z


def _cubic(z: Tensor) -> Tensor:
    """|z|³/3; |z| from its square, so that its gradient at 0 is 0 and not undefined."""
    square: Tensor = z.square().sum(-1)
    return square * torch.sqrt(square.clamp(min=torch.finfo(z.dtype).tiny)) / 3


def _half_square(x: Tensor) -> Tensor:
    energy: Tensor = 0.5 * x.square().sum(-1)
    return energy
