"""Measures of neurons as measures on the sphere, or on their parameters: what a homogeneous Φ sees of them.

A 2-homogeneous Φ(u) = |u|²Φ(u/|u|) integrates the same against μ and against its image h(μ) on the sphere; a partially
1-homogeneous Φ(w, θ) = wφ(θ) the same against μ and against a signed measure of θ. Both are sums Σ w_j δ_{x_j}
that are no probabilities: an `EmpiricalMeasure` whose weights are masses, so that `integrate(f)` is Σ w_j f(x_j).

Source: Chizat, Bach, On the global convergence of gradient descent for over-parameterized models using optimal
transport (2018), section 3 and appendix C.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .measure import EmpiricalMeasure


def on_sphere(mu: EmpiricalMeasure, degree: float = 2.0) -> EmpiricalMeasure:
    """h(μ) = Σ_j w_j |u_j|^p δ_{u_j/|u_j|}: ∫ φ dh(μ) = ∫ |u|^p φ(u/|u|) dμ.

    Its mass `weights.sum(-1)` is the p-th moment of μ. A particle at 0 has mass 0 and stands at the first basis vector.

    Args:
        mu: points u, (..., N, d).
        degree: p > 0, the degree of homogeneity.

    Returns:
        A measure of points (..., N, d) on the unit sphere with weights (..., N) >= 0, which sum to the moment.

    Raises:
        ValueError: a degree that is not positive.

    """
    if not degree > 0:
        raise ValueError(f"on_sphere: degree = {degree}; expected a positive number, 2 for two homogeneous layers.")
    # Scaled first: squares of small and of large numbers leave the range of floats.
    size = mu.points.abs().amax(-1, keepdim=True)
    at_zero = size == 0
    scaled = mu.points / torch.where(at_zero, torch.ones_like(size), size)
    length = scaled.norm(dim=-1, keepdim=True)
    pole = torch.zeros_like(mu.points)
    pole[..., 0] = 1
    directions = torch.where(at_zero, pole, scaled / torch.where(at_zero, torch.ones_like(length), length))
    masses = mu.weights * (length * size).squeeze(-1).pow(degree)
    return EmpiricalMeasure.signed(directions, masses)


def of_amplitudes(mu: EmpiricalMeasure, amplitude: int = 0) -> EmpiricalMeasure:
    """ν = Σ_j w_j a_j δ_{θ_j} for x_j = (a_j, θ_j): ∫ φ dν = ∫ a φ(θ) dμ.

    Signed; its total variation, where no two θ_j are equal, is ∫|a| dμ.

    Args:
        mu: points (a, θ), (..., N, d), d >= 2.
        amplitude: the component a.

    Returns:
        A measure of points θ, (..., N, d - 1), with weights (..., N) of both signs.

    Raises:
        ValueError: no component left for θ, or none of that number.

    """
    if not (0 <= amplitude < mu.dim and mu.dim >= 2):
        raise ValueError(
            f"of_amplitudes: amplitude = {amplitude} for points of {mu.dim} components; expected one of at least two."
        )
    rest = [k for k in range(mu.dim) if k != amplitude]
    period = mu.period
    if isinstance(period, (list, tuple, Tensor)):
        period = [period[k] for k in rest]
    return EmpiricalMeasure.signed(mu.points[..., rest], mu.weights * mu.points[..., amplitude], period)
