"""The rate at which an energy selects particles: births and deaths of the dynamics that descend it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .measure import EmpiricalMeasure
from .model import confinement, energy_of, scenario_name


class Selection:
    """Births and deaths for a scenario with an energy that declares `alpha`: L = α (V - ∫ V dm), per unit time.

        V = δF/δm(m, x) + T U(x) + R(x),    T = σ²/2,

    R the value of a regulariser. With the transport -∇V this is the Wasserstein-Fisher-Rao flow of
    F + ∫ (T U + R) dm [1]. A noise σ adds T Δm and is no part of V. Declare also `bandwidth` = h for the log-density
    variant, where T log(K_h * m) is added to V, K_h a Gaussian kernel: the flow of the free energy F + T KL(m | e^{-U})
    for h → 0, N → ∞ [2].

    Without alpha, or with alpha = None, nothing is born or dies.

    [1] Rotskoff, Jelassi, Bruna, Vanden-Eijnden, Global convergence of neuron birth-death dynamics, ICML 2019.
    [2] Lu, Lu, Nolen, Accelerating Langevin sampling with birth-death, 2019.
    """

    alpha: Any
    bandwidth: Any = None

    @property
    def birth_death_rate(self) -> Callable[[float, Tensor, EmpiricalMeasure], Tensor]:
        """(t, x, mu) -> α V(x), (..., N); an attribute only where alpha is declared.

        Raises:
            ValueError: a bandwidth without noise, or an alpha that is no rate.

        """
        alpha = getattr(self, "alpha", None)
        if alpha is None:
            raise AttributeError(f"{type(self).__name__} declares no alpha: nothing is born or dies.")
        rate, h = float(alpha), self.bandwidth
        if not 0 <= rate < math.inf:
            raise ValueError(f"{scenario_name(self)}: alpha = {rate}; expected a finite rate >= 0 per unit of V.")
        if h is not None and not temperature_of(self) > 0:
            raise ValueError(
                f"{scenario_name(self)}: bandwidth = {h} smooths the entropy's part T log m of the rate, and sigma = 0 "
                "has none; set sigma, or leave bandwidth out."
            )

        def selected(t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
            potential = energy_rate(self, mu, x)
            if h is not None:
                potential = potential.add(log_density(mu, x, float(h)), alpha=temperature_of(self))
            return rate * potential

        return selected

    @property
    def selects(self) -> str:
        """What V is, for the record of a run."""
        if self.bandwidth is None:
            return "energy"
        return f"free energy, log density smoothed by a Gaussian kernel of bandwidth {float(self.bandwidth):g}"


def temperature_of(scenario: Any) -> float:
    """T = σ²/2, 0 without noise."""
    return 0.5 * float(getattr(scenario, "sigma", 0.0)) ** 2


def energy_rate(scenario: Any, mu: EmpiricalMeasure, x: Tensor) -> Tensor:
    """δF/δm(mu, x) + T U(x) + R(x), up to a constant: the rate without entropy, before the factor α.

    x: (..., M, d) -> (..., M). T = σ²/2 is 0 where the scenario has no sigma, R the value of its regulariser.

    Raises:
        TypeError: the scenario has no energy.

    """
    potential = energy_of(scenario).variation(mu, x)
    temperature, regulariser = temperature_of(scenario), getattr(scenario, "regulariser", None)
    if temperature:
        potential = potential + temperature * confinement(scenario, x)
    return potential if regulariser is None else potential + regulariser.value(x)


def log_density(mu: EmpiricalMeasure, x: Tensor, bandwidth: float, include_self: bool = True) -> Tensor:
    """The logarithm of (K_h * m)(x), K_h the Gaussian density of covariance h² I.    (..., M, d) -> (..., M).

    At Gaussian m of covariance Σ that of N(mean, Σ + h² I). With the particle itself (the default, as in [2]) the value
    is finite, at least log K_h(0)/N; a lone particle looks 1/(N h^d) denser than it is. Without it this bias is gone,
    and a particle that is alone within many h has -∞, which a run refuses. O(N²) work, in blocks of rows. On a torus h
    must be small against the period.

    Raises:
        ValueError: a bandwidth that is not positive; include_self=False at other points than the particles.

    """
    if not 0 < bandwidth < math.inf:
        raise ValueError(f"log_density: bandwidth = {bandwidth}; expected a positive length, the width of the kernel.")
    scale = -0.5 / bandwidth**2
    smoothed = mu.convolve(lambda z: (scale * z.square().sum(-1)).exp_(), x, include_self)
    return smoothed.log_().sub_(mu.dim * math.log(bandwidth * math.sqrt(2 * math.pi)))
