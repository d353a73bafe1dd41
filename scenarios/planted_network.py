"""Two-layer networks fitted to a planted one: non-smooth particle gradient flows of homogeneous neurons."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfsde import EmpiricalMeasure, Energy, Gaussian, Mixture, Observable, Uniform
from mfsde.convex_sets import Ball
from mfsde.gradient_flow import GradientFlow
from mfsde.measure import Dirac, Law
from mfsde.product import Product
from mfsde.regularisers import L1, PathNorm, Regulariser, SquaredNorm

from .student_teacher import ArcCosine

ACTIVATIONS = ("sigmoid", "tanh", "relu", "signed_square")
RELU = ("relu", "signed_square")


@dataclass(frozen=True)
class PlantedNetwork(GradientFlow):
    """dX = (ṽ - proj_{∂V}(ṽ)) dt for neurons X = (w, θ) fitted to the output of m₀ planted ones.

    F(m) + ∫ V dm = ½ E(∫ wσ(⟨θ, z⟩) dm - y(z))² + ∫ V dm,    y(z) = Σ_j w_j σ(⟨θ_j, z⟩),

    E the mean over data, or for ReLU units and without data the expectation over z ~ N(0, I), which has the closed
    form E σ(⟨a, z⟩)σ(⟨b, z⟩) = |a||b|(sin φ + (π - φ) cos φ)/2π, φ the angle of a and b. With r = ∫ wσ dm - y,
    ṽ = -(⟨r, σ(⟨θ, z⟩)⟩, w⟨r, σ'(⟨θ, z⟩) z⟩). The activation comes with its regulariser:

    * "sigmoid", "tanh": V = λ|w|, partially 1-homogeneous; neurons start with w = 0 and θ ~ N(0, s²I), or, where a
      radius bounds |θ|, θ uniform on the ball of radius s;
    * "relu": V = λ|w||θ|, 2-homogeneous; they start uniform on the cube [-s, s]^(1+d), which surrounds 0;
    * "signed_square": a ReLU unit εσ(⟨s(θ), z⟩), s(θ)_i = θ_i|θ_i|, of fixed sign ε = ±1 in the place of w, and
      V = λ|θ|²: 2-homogeneous, with a feature that is differentiable where the inputs have a density. Signs are equally
      likely, θ is uniform on [-s, s]^d.

    In each the flow's limit, where there is one, is a global minimiser over measures: for V = λ|w| over signed measures
    of θ with λ times their total variation, for ReLU units over signed measures on the unit sphere, and on that of the
    norm Σ|s_i| for the signed square. The source states it for all three with θ in R^d; for "relu", whose feature has a
    discontinuous differential at θ = 0, that is formal, and a ball does not meet the source's boundary condition
    ∂_n⟨r, σ⟩ = 0. It gives neither network nor parameters; the ones here are ours.

    Args:
        activation: as above.
        n_inputs: dimension of z without bias.
        bias: whether z carries a constant 1; only with data.
        n_data: number of inputs z ~ N(0, I), or None for the expectation over them, of ReLU units only.
        n_planted: m₀.
        planted_scale: length of the planted θ_j, whose directions are uniform; w_j = 1, -1, 1, ...
        penalty: λ.
        radius: of the ball that θ stays in, for "sigmoid" and "tanh"; None for all of R^d. λ|w| does not hold slopes
            back: over R^d steps are cheaper than what approaches them, and no minimum is attained.
        initial_scale: s.
        data_seed: of the data and of the planted directions.

    Raises:
        ValueError: numbers that are impossible, or an expectation that has no closed form.

    Source: Chizat, Bach, On the global convergence of gradient descent for over-parameterized models using optimal
    transport (2018), section 4.2, propositions 4.2 and 4.3, figure 3; Cho, Saul, Kernel methods for deep learning
    (2009), for the expectation.

    """

    activation: str = "relu"
    n_inputs: int = 2
    bias: bool = False
    n_data: int | None = None
    n_planted: int = 4
    planted_scale: float = 1.0
    penalty: float = 0.02
    radius: float | None = None
    initial_scale: float = 1.0
    data_seed: int = 0

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation = {self.activation!r}; expected one of {', '.join(ACTIVATIONS)}.")
        for name in ("n_inputs", "n_planted") + (("n_data",) if self.n_data is not None else ()):
            value = getattr(self, name)
            if not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
                raise ValueError(f"{name} = {value!r}; expected a whole number >= 1.")
        if self.n_data is None and (self.activation not in RELU or self.bias):
            raise ValueError(
                f"n_data = None asks for an expectation over inputs, which has a closed form for ReLU units without "
                f"bias only, not for {self.activation!r}{' with bias' if self.bias else ''}. Give a number of data."
            )
        spread_out = self.activation in RELU
        if not (
            0 <= self.penalty < math.inf
            and 0 <= self.initial_scale < math.inf
            and 0 < self.planted_scale < math.inf
            and not (spread_out and self.initial_scale == 0)
        ):
            raise ValueError(
                f"penalty = {self.penalty}, initial_scale = {self.initial_scale}, planted_scale = "
                f"{self.planted_scale}; expected finite numbers >= 0, a scale of planted neurons > 0, and for ReLU "
                "units an initial scale > 0: a neuron at 0 stays there."
            )
        if self.radius is not None and (self.activation in RELU or not 0 < self.initial_scale <= self.radius):
            raise ValueError(
                f"radius = {self.radius} for {self.activation!r} that starts with the scale {self.initial_scale}; "
                "expected None, or for 'sigmoid' and 'tanh' a radius >= initial_scale > 0."
            )

    @property
    def n_weights(self) -> int:
        """Components of θ."""
        return self.n_inputs + self.bias

    @cached_property
    def regulariser(self) -> Regulariser:
        """The one that the activation comes with."""
        if self.activation == "relu":
            return PathNorm(self.penalty)
        if self.activation == "signed_square":
            return SquaredNorm(self.penalty, tuple(range(1, 1 + self.n_weights)))
        if self.radius is not None:
            return L1(self.penalty, (0,)) + Ball(self.radius, components=tuple(range(1, 1 + self.n_weights)))
        return L1(self.penalty, (0,))

    @cached_property
    def energy(self) -> Energy:
        """½ E(∫ wσ dm - y)²."""
        return Energy(self._risk)

    def smooth_drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """-(⟨r, σ⟩, w⟨r, σ'z⟩) = -D_mF(mu, x) by hand; 0 along the signs of "signed_square"."""
        w, theta = x[..., :1], x[..., 1:]
        value, slope = self._correlated(mu, self.directions(theta))
        if self.activation == "signed_square":
            return torch.cat([torch.zeros_like(w), -2 * w * theta.abs() * slope], dim=-1)
        return -torch.cat([value.unsqueeze(-1), w * slope], dim=-1)

    def initial(self) -> Law:
        """As above."""
        box = Uniform([-self.initial_scale] * self.n_weights, [self.initial_scale] * self.n_weights)
        if self.activation == "relu":
            return Uniform([-self.initial_scale] * (1 + self.n_weights), [self.initial_scale] * (1 + self.n_weights))
        if self.activation == "signed_square":
            return Mixture([Product([Dirac([1.0]), box]), Product([Dirac([-1.0]), box])])
        if self.radius is not None:
            return Product([Dirac([0.0]), UniformBall(self.n_weights, self.initial_scale)])
        deviations = torch.tensor([0.0] + [self.initial_scale] * self.n_weights, dtype=torch.float64)
        return Gaussian([0.0] * (1 + self.n_weights), deviations.square().diag())

    def directions(self, theta: Tensor) -> Tensor:
        """What is multiplied with the inputs: θ, or θ|θ| component by component.    (..., N, d)."""
        return theta * theta.abs() if self.activation == "signed_square" else theta

    def first_variation(self, mu: EmpiricalMeasure, x: Tensor) -> Tensor:
        """F'(mu)(x) = ⟨r, wσ(⟨θ, z⟩)⟩ + V(x), (..., M) at neurons x (..., M, 1 + d).

        mu is a global minimiser if and only if it is >= 0 everywhere, and 0 on the support (proposition 3.1).
        """
        value = self._correlated(mu, self.directions(x[..., 1:]))[0]
        return x[..., 0] * value + self.regulariser.value(x)

    def certificate(self, mu: EmpiricalMeasure, directions: Tensor) -> Tensor:
        """η = -⟨r, σ(⟨s, z⟩)⟩/λ, (..., M) at directions s (..., M, d), of norm 1 for ReLU units.

        The norm is Euclidean for "relu" and Σ|s_i| for "signed_square". |η| <= 1 at all of them, and η = sign w at
        every neuron with w ≠ 0, is the same as F'(mu) >= 0 with 0 on the support.
        """
        return -self._correlated(mu, directions)[0] / self.penalty

    def kernel(self, a: Tensor, b: Tensor) -> Tensor:
        """E σ(⟨a, z⟩)σ(⟨b, z⟩).    (..., M, d), (..., N, d) -> (..., M, N)."""
        if self.n_data is None:
            return _arc_cosine(a, b)[0]
        return self._units(a)[0] @ self._units(b)[0].mT / self.n_data

    @cached_property
    def planted(self) -> Tensor:
        """The planted neurons (w_j, s_j), their directions s as they are multiplied with inputs.    (m₀, 1 + d)."""
        normals = np.random.default_rng([self.data_seed, 1]).standard_normal((self.n_planted, self.n_weights))
        lengths = np.linalg.norm(normals, axis=1, keepdims=True)
        signs = np.where(np.arange(self.n_planted) % 2, -1.0, 1.0)[:, None]
        return torch.from_numpy(np.concatenate([signs, self.planted_scale * normals / lengths], axis=1))

    @cached_property
    def inputs(self) -> Tensor:
        """The data z, (n_data, d)."""
        if self.n_data is None:
            raise ValueError("n_data is None: the loss is an expectation over N(0, I), and there are no inputs.")
        z = np.random.default_rng([self.data_seed, 0]).standard_normal((self.n_data, self.n_inputs))
        return torch.from_numpy(np.concatenate([z, np.ones((self.n_data, int(self.bias)))], axis=1))

    def predicted(self, mu: EmpiricalMeasure) -> Tensor:
        """∫ wσ(⟨θ, z⟩) dm at the data, (..., n_data)."""
        return mu.integrate(lambda x: x[..., :1] * self._units(self.directions(x[..., 1:]))[0])

    def observables(self) -> tuple[Observable | str, ...]:
        """The objective."""
        return (self.objective_observable(),)

    def suggested(self) -> dict[str, Any]:
        """Settings that come near the global minimum."""
        return {
            **{"n_particles": 100, "n_replicas": 1, "horizon": 200.0, "dt": 0.1, "seed": 0, "save_every": 40},
            "method": "proximal",
        }

    def _risk(self, mu: EmpiricalMeasure) -> Tensor:
        if self.n_data is not None:
            return 0.5 * (self.predicted(mu) - self._outputs.to(mu.points)).square().mean(-1)
        c, s = self._sources(mu)
        return 0.5 * (c.unsqueeze(-2) @ (_arc_cosine(s, s)[0] @ c.unsqueeze(-1)))[..., 0, 0]

    def _correlated(self, mu: EmpiricalMeasure, s: Tensor) -> tuple[Tensor, Tensor]:
        """⟨r, σ(⟨s, z⟩)⟩ and its gradient in s.    (..., M, d) -> (..., M), (..., M, d)."""
        if self.n_data is None:
            c, sources = self._sources(mu)
            values, along_s, along_source = _arc_cosine(s, sources)
            c = c.unsqueeze(-1)
            unit = s / s.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(s.dtype).tiny)
            return (values @ c).squeeze(-1), (along_s @ c) * unit + (along_source * c.mT) @ sources
        values, slopes = self._units(s)
        r = (self.predicted(mu) - self._outputs.to(s)).unsqueeze(-1) / self.n_data
        return (values @ r).squeeze(-1), (slopes * r.mT) @ self.inputs.to(s)

    def _sources(self, mu: EmpiricalMeasure) -> tuple[Tensor, Tensor]:
        """R = Σ_j c_j σ(⟨s_j, z⟩): the neurons of mu and minus the planted ones.    (..., N + m₀), (..., N + m₀, d)."""
        planted = self.planted.to(mu.points).expand(*mu.points.shape[:-2], *self.planted.shape)
        c = torch.cat([mu.weights * mu.points[..., 0], -planted[..., 0]], dim=-1)
        return c, torch.cat([self.directions(mu.points[..., 1:]), planted[..., 1:]], dim=-2)

    @cached_property
    def _outputs(self) -> Tensor:
        """The planted network at the data."""
        return self._units(self.planted[:, 1:])[0].mT @ self.planted[:, 0]

    def _units(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """σ and σ' at ⟨s, z⟩ for all data.    (..., N, d) -> (..., N, n_data)."""
        a = s @ self.inputs.to(s).mT
        if self.activation in RELU:
            return a.clamp(min=0), (a > 0).to(a.dtype)
        if self.activation == "tanh":
            h = a.tanh()
            return h, 1 - h.square()
        h = a.sigmoid()
        return h, h * (1 - h)


@dataclass(frozen=True)
class UniformBall(Law):
    """The uniform law on the ball of R^d of a radius: |x| = radius·U^(1/d), a direction of its own.

    Args:
        dim: d.
        radius: > 0.

    """

    dim: int = 2
    radius: float = 1.0

    @property
    def n_variates(self) -> int:
        """A direction takes d variates, the length one more."""
        return self.dim + 1

    def from_variates(self, z: Tensor) -> Tensor:
        """(..., d + 1) -> (..., d)."""
        direction = z[..., :-1] / z[..., :-1].norm(dim=-1, keepdim=True).clamp(min=torch.finfo(z.dtype).tiny)
        # Rounding must not take a point out of the ball.
        inside: Tensor = (1 - 1e-6) * self.radius * torch.special.ndtr(z[..., -1:]).pow(1 / self.dim) * direction
        return inside

    def as_measure(self) -> EmpiricalMeasure:
        """4096 quasi-random points."""
        sobol = torch.quasirandom.SobolEngine(self.n_variates, scramble=True, seed=0).draw(4096, dtype=torch.float64)
        return EmpiricalMeasure(self.from_variates(torch.special.ndtri(sobol.clamp(1e-12, 1 - 1e-12))))


def _arc_cosine(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """K = |a||b|J(cos φ)/2π, and the two factors of ∇_aK = (|b| sin φ/2π) a/|a| + ((π - φ)/2π) b.

    (..., M, d), (..., N, d) -> (..., M, N) three times. At a = 0, where K has a kink, a/|a| and cos φ count as 0.
    """
    tiny = torch.finfo(a.dtype).tiny
    r, s = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True).mT
    cosine = ((a / r.clamp(min=tiny)) @ (b.mT / s.clamp(min=tiny))).clamp(-1, 1)
    values: Tensor = r * s * ArcCosine.apply(cosine)  # type: ignore[no-untyped-call]
    detached = cosine.detach()
    along_a = s.detach() * (1 - detached.square()).clamp(min=0).sqrt() / (2 * math.pi)
    return values, along_a, (math.pi - detached.acos()) / (2 * math.pi)
