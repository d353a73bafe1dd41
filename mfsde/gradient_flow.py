"""Gradient flows without noise: particles that descend an energy and a regulariser, smooth or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .energy import Energy
from .measure import EmpiricalMeasure
from .model import energy_of
from .observables import Observable
from .regularisers import regulariser_of
from .selection import Selection


class GradientFlow(Selection):
    """dX = v(m, X) dt, v = ṽ - proj_{∂V(X)}(ṽ), ṽ = -D_mF(m, X): the W₂ gradient flow of F(m) + ∫ V dm.

    v is minus the element of least norm of D_mF + ∂V. With N particles of mass 1/N it is the gradient flow of
    F_N(x) = F(N⁻¹ Σ δ_{x_i}) + N⁻¹ Σ V(x_i) for the mean norm N⁻¹ Σ|u_i|², and along it

        d/dt F_N(x) = -N⁻¹ Σ|x_i'|² = -∫|v|² dm.

    A frozen dataclass that inherits it declares `energy` (a cached_property, or a property, returning an
    `mfsde.Energy`; a function of the measure only), where there is one `regulariser` (an object of
    `mfsde.regularisers`, weight included, or of `mfsde.convex_sets`), and `initial()`. A hand-written `smooth_drift` is
    welcome where it is faster.

    Where V has kinks or a domain, run it with method="proximal": its steps land on the kinks and stay there. A smooth
    flow may also take "dopri5", to the precision of the dtype. With a domain, `project` is its projection.

    Source: Chizat, Bach, On the global convergence of gradient descent for over-parameterized models using optimal
    transport (2018), definition 2.2 and proposition 2.3; theorem 2.6 for N → ∞.
    """

    energy: Any
    regulariser: Any = None

    @property
    def declares(self) -> tuple[str, ...]:
        """The energy, unless a drift is written by hand."""
        own = type(self)
        derived = own.smooth_drift is GradientFlow.smooth_drift and own.drift is GradientFlow.drift
        return ("energy",) if derived else ()

    def smooth_drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """ṽ = -D_mF(mu, x)."""
        force: Tensor = energy_of(self).intrinsic_derivative(mu, x)
        return force.neg_()

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """ṽ - proj_{∂V(x)}(ṽ)."""
        v, regulariser = self.smooth_drift(t, x, mu), regulariser_of(self)
        return v if regulariser is None else v - regulariser.project_subgradient(x, v)

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> float:
        """None."""
        return 0.0

    def proximal(self, x: Tensor, h: float) -> Tensor:
        """The minimiser of ½|y - x|² + h V(y) over y, particle by particle."""
        regulariser = regulariser_of(self)
        return x if regulariser is None else regulariser.prox(x, h)

    @property
    def project(self) -> Callable[[Tensor], Tensor]:
        """The projection onto the domain of V; an attribute only of flows that have one."""
        regulariser = regulariser_of(self)
        if regulariser is None or not regulariser.has_domain:
            raise AttributeError(f"{type(self).__name__} has no regulariser with a domain, and so no projection.")
        return regulariser.project

    def objective(self, mu: EmpiricalMeasure) -> Tensor:
        """F(mu) + ∫ V dmu, (...,)."""
        value, regulariser = energy_of(self)(mu), regulariser_of(self)
        return value if regulariser is None else value + mu.integrate(regulariser.value)

    def dissipation(self, t: float, mu: EmpiricalMeasure) -> Tensor:
        """∫|v|² dmu = -d/dt objective, (...,)."""
        v = self.drift(t, mu.points, mu)
        return mu.integrate(lambda x: v.square().sum(-1))

    def observables(self) -> tuple[Observable | str, ...]:
        """The objective, where there is an energy."""
        return (self.objective_observable(),) if isinstance(getattr(self, "energy", None), Energy) else ()

    def objective_observable(self) -> Observable:
        """F(m) + ∫ V dm at every saved step."""
        return Observable("objective", lambda t, x, mu: self.objective(mu), "1", "objective F(m) + ∫ V dm")
