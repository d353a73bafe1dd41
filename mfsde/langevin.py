"""Mean-field Langevin dynamics: the noisy descent of an energy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .energy import gradient
from .measure import EmpiricalMeasure
from .model import energy_of
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
        slope, half = self.confinement_gradient(x), 0.5 * number(self.sigma) ** 2
        if isinstance(half, Tensor):
            return -(force + half * slope)
        return torch.add(force, slope, alpha=half).neg_()

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> float | Tensor:
        """σ."""
        return number(self.sigma)


def number(value: Any) -> float | Tensor:
    """A parameter as a float; as the tensor that it is while a run is differentiated."""
    return value if isinstance(value, Tensor) and is_recording() else float(value)
