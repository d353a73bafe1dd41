"""Mean-field Langevin dynamics: the noisy descent of an energy."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from .energy import gradient
from .measure import EmpiricalMeasure
from .model import energy_of, scenario_name
from .selection import Selection
from .tape import is_recording


class Confined:
    """A potential U of the reference law e^{-U}, written by who inherits it."""

    def confinement(self, x: Tensor) -> Tensor:
        """U(x), (..., N, d) -> (..., N)."""
        raise TypeError(
            f"{type(self).__name__} does not define confinement(x), the potential U of its reference law e^(-U); "
            "write it as (..., N, d) -> (..., N), for instance 0.5 * x.square().sum(-1)."
        )

    def confinement_gradient(self, x: Tensor) -> Tensor:
        """∇U(x), by automatic differentiation."""
        return gradient(self.confinement, x)


class MeanFieldLangevin(Confined, Selection):
    """dX = -(D_mF(m, X) + (σ²/2) ∇U(X)) dt + σ dW: the W₂ gradient flow of F(m) + (σ²/2) KL(m | e^{-U}).

    A frozen dataclass that inherits it declares `sigma`, `energy` (a cached_property, or a property, returning
    an `mfsde.Energy`; a function of the measure only), `confinement(x)` = U, (..., N, d) -> (..., N), and `initial()`.
    A hand-written `confinement_gradient(x)` is welcome where it is faster. With `alpha` particles are born and die
    besides (`Selection`).

    Source: Hu, Ren, Siska, Szpruch, Mean-field Langevin dynamics and energy landscape of neural networks, eq. (1).
    """

    sigma: Any
    energy: Any
    declares = ("sigma", "energy", "confinement")

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """-(D_mF(mu, x) + (σ²/2) ∇U(x))."""
        force: Tensor = energy_of(self).intrinsic_derivative(mu, x)
        return weighted_sum(force, self.confinement_gradient(x), 0.5 * number(self, "sigma") ** 2).neg_()

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> float | Tensor:
        """σ."""
        return number(self, "sigma")


def number(scenario: Any, name: str) -> float | Tensor:
    """A parameter that has to be one finite number, as a float; as the tensor that it is while a run is differentiated.

    Raises:
        TypeError: it is missing, or no number.
        ValueError: it is not finite.

    """
    given = getattr(scenario, name, None)
    value = given.item() if isinstance(given, Tensor) and given.ndim == 0 else given
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        told = "is missing" if value is None else f"is {value!r:.60}"
        raise TypeError(
            f"{scenario_name(scenario)}: {name} {told}; the equation needs one number for all components (sigma: its "
            "noise; gamma: friction per unit time of a kinetic equation)."
        )
    if not math.isfinite(value):
        raise ValueError(f"{scenario_name(scenario)}: {name} = {value} is not finite.")
    return given if isinstance(given, Tensor) and is_recording() else float(value)


def weighted_sum(slope: Tensor, other: Tensor, weight: float | Tensor) -> Tensor:
    """Slope + weight·other, in one pass where the weight is a number."""
    if isinstance(weight, Tensor):
        return slope + weight * other
    return torch.add(slope, other, alpha=weight)
