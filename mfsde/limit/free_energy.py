"""The free energy V(m) = F(m) + T KL(m | e^{-U}), its dissipation and its first-order condition, of a law with a
density.

Conventions: dX = -(D_mF + T ∇U) dt + σ dW, T = σ²/2. A scenario is anything with `energy`, `sigma` and, where the
reference is not Lebesgue's, `confinement` = U; an unnormalised U shifts V by -T log ∫ e^{-U}.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..energy import gradient
from ..measure import EmpiricalMeasure, Law
from ..model import confinement, confinement_gradient, energy_of, temperature


class Density(NamedTuple):
    """A measure with the differential entropy and the score of the law it stands for."""

    measure: EmpiricalMeasure
    entropy: Tensor
    score: Tensor


def with_density(law: Law) -> Any:
    """The law, refused without a log_prob."""
    if not hasattr(law, "log_prob"):
        raise TypeError(f"{type(law).__name__} has no density log_prob; a free energy needs one.")
    return law


def of_law(law: Law) -> Density:
    """By the law's quadrature."""
    dense = with_density(law)
    mu = dense.as_measure()
    log_density = dense.log_prob(mu.points)
    # 0 log 0 = 0: a table of a density may hold nodes that carry nothing.
    entropy = -(mu.weights * torch.where(mu.weights > 0, log_density, 0.0)).sum(-1)
    return Density(mu, entropy, score_of(law, mu.points))


def score_of(density: Any, x: Tensor) -> Tensor:
    """∇ log density at x, of a law or of a function."""
    if hasattr(density, "score"):
        slope: Tensor = density.score(x)
        return slope
    return gradient(getattr(density, "log_prob", density), x)


def value_of(scenario: Any, m: Density) -> Tensor:
    """V of a measure with its density."""
    value: Tensor = internal(scenario, m.measure) - temperature(scenario) * m.entropy
    return value


def internal(scenario: Any, mu: EmpiricalMeasure) -> Tensor:
    """F(m) + T ∫ U dm."""
    with torch.no_grad():
        return energy_of(scenario)(mu) + temperature(scenario) * mu.integrate(lambda x: confinement(scenario, x))


def force(scenario: Any, mu: EmpiricalMeasure) -> Tensor:
    """D_mF + T ∇U on the points of m."""
    x = mu.points
    return energy_of(scenario).intrinsic_derivative(mu, x) + temperature(scenario) * confinement_gradient(scenario, x)


def dissipation_of(scenario: Any, m: Density) -> Tensor:
    """∫ |D_mF + T ∇log m + T ∇U|² dm, which is -dV/dt along the flow."""
    total = force(scenario, m.measure) + temperature(scenario) * m.score
    return m.measure.integrate(lambda x: total.square().sum(-1))


def first_order_residual(scenario: Any, law: Law) -> float:
    """Standard deviation under m of δF/δm + T log m + T U, which is constant where m is stationary.

    Source: Szpruch, Mean-field Langevin dynamics, Proposition 4.
    """
    mu, t = law.as_measure(), temperature(scenario)
    with torch.no_grad():
        x, w = mu.points, mu.weights
        value = energy_of(scenario).functional_derivative(mu, x) + t * confinement(scenario, x)
        value = value + t * torch.where(w > 0, with_density(law).log_prob(x), 0.0)
        mean = (w * value).sum()
        return float((w * (value - mean).square()).sum().sqrt())
