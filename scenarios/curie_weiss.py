"""The Curie-Weiss model with continuous spins: a magnet whose spins feel only the mean magnetisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mfsde import EmpiricalMeasure, Energy, Gaussian, Observable, potential


@dataclass(frozen=True)
class CurieWeiss:
    """dX = -(X³ + aX - h) dt + J E X dt + σ dW, spin by spin, component by component on R^d.

    The gradient flow of F(m) + (σ²/2) ∫ m log m, F = ∫ V dm - ½J |∫ x dm|², V = Σ_k (x_k⁴/4 + a x_k²/2 - h x_k). A
    stationary law is ∝ exp(-2(V - J M·x)/σ²) with M its own mean. Without field (h = 0) M = 0 is one, alone if and only
    if J <= J_c = σ²/(2v), v the variance of a free spin (J = 0); above there are also ±M ≠ 0, and M = 0 is unstable.
    The coupling rewards alignment but does not hold spins together, as that of `DoubleWell` does, J(x - E X), which is
    this model at a = J - 1.

    Args:
        coupling: J.
        quadratic: a; negative for spins with two wells.
        field: h.
        sigma: σ, whose square is twice the temperature.
        initial_mean: initial mean, d numbers.
        initial_variance: initial variance of every component.

    Source: Dawson, Critical dynamics and fluctuations for a mean-field model of cooperative behavior (1983), and
    Ellis, Newman, Limit theorems for sums of dependent random variables occurring in statistical mechanics (1978), for
    the stationary laws; Dawson, Gärtner, Large deviations from the McKean-Vlasov limit (1987), for the dynamics.

    """

    coupling: float = 2.0
    quadratic: float = 0.0
    field: float = 0.0
    sigma: float = 1.0
    initial_mean: Sequence[float] = (0.2,)
    initial_variance: float = 0.5

    @cached_property
    def energy(self) -> Energy:
        """∫ V dm - ½J |∫ x dm|²."""
        alignment = Energy(lambda mu: -0.5 * self.coupling * mu.mean().square().sum((-2, -1)))
        return potential(self._free) + alignment

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """-D_mF(mu, x), by hand."""
        return torch.addcmul(self.coupling * mu.mean() + self.field, x, x.square() + self.quadratic, value=-1)

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> float:
        """σ."""
        return self.sigma

    def initial(self) -> Gaussian:
        """N(initial_mean, initial_variance·I)."""
        return Gaussian(list(self.initial_mean), self.initial_variance)

    def log_gibbs(self, x: Tensor, magnetisation: float | Tensor) -> Tensor:
        """-2(V(x) - J M·x)/σ², the unnormalised density of spins in a mean field M, (..., d) -> (...).

        Stationary where M is its own mean.
        """
        aligned = self.coupling * (x * magnetisation).sum(-1)
        return -2 / self.sigma**2 * (self._free(x) - aligned)

    def critical_coupling(self) -> float:
        """J_c = σ Γ(1/4)/(√8 Γ(3/4)) for quartic spins, a = h = 0, whose free variance is √2 σ Γ(3/4)/Γ(1/4).

        Raises:
            ValueError: a ≠ 0, where J_c = σ²/(2v) has no elementary form, or h ≠ 0, where nothing is critical.

        """
        if self.quadratic != 0 or self.field != 0:
            raise ValueError(
                f"the critical coupling has a formula for quadratic = field = 0; here they are {self.quadratic} and "
                f"{self.field}. Without field mfsde.limit.critical(scenario, 'coupling', low, high) finds it."
            )
        return abs(self.sigma) * math.gamma(0.25) / (math.sqrt(8) * math.gamma(0.75))

    def observables(self) -> tuple[Observable | str, ...]:
        """Magnetisation, energy."""
        magnetisation = Observable(
            "magnetisation", lambda t, x, mu: mu.mean().squeeze(-2), "1", "magnetisation ∫ x dm", ("component",)
        )
        return (magnetisation, "energy")

    def suggested(self) -> dict[str, Any]:
        """Settings that magnetise: J = 2 lies above J_c = 1.046."""
        return {"n_particles": 2000, "n_replicas": 8, "horizon": 8.0, "dt": 0.01, "seed": 0, "save_every": 20}

    def _free(self, x: Tensor) -> Tensor:
        """V(x), (..., d) -> (...)."""
        square = x.square()
        return (square * (0.25 * square + 0.5 * self.quadratic) - self.field * x).sum(-1)
