"""A ReLU network that learns another one from inputs on a sphere: the loss over all inputs in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mfsde import EmpiricalMeasure, Energy, Gaussian, Law, Observable, Product
from mfsde.gradient_flow import GradientFlow

# Pairs of neurons in one block of rows: what stays in the cache.
BLOCK_PAIRS = 1 << 16
# Below it a length is taken as 0, and its direction too.
SMALLEST = 1e-30


@dataclass(frozen=True)
class StudentTeacher(GradientFlow):
    """θ = (c, z) ∈ R × R^d descends V(θ, μ) = δE/δμ: dc = -G(z) dt, dz = -c ∇G(z) dt; born and dying at the rate αV.

    The student is ∫ c [x·z]_+ μ(dc, dz), the teacher f(x) = (1/n_T) Σ_i c_i [x·z_i]_+, and x is uniform on the sphere
    S^{d-1}(r) of radius r. With the arc-cosine kernel of order one, φ the angle between a and b,

        k(a, b) = E [a·x]_+ [b·x]_+ = (r²/d) |a||b| (sin φ + (π - φ) cos φ) / 2π,
        ∇_a k = (r²/d) (|b| sin φ a/|a| + (π - φ) b) / 2π,

    everything is a sum over pairs of neurons:

        E(μ) = ½ E (f - ∫ c [x·z]_+ dμ)² = C_f + ∫ F dμ + ½ ∬ K dμ dμ,    K(θ, θ') = c c' k(z, z'),
        F(θ) = -E f(x) c [x·z]_+ = -(c/n_T) Σ_i c_i k(z, z_i),    C_f = ½ E f² = ½ n_T^{-2} Σ_ij c_i c_j k(z_i, z_j),
        V(θ, μ) = c G(z),    G(z) = ∫ c' k(z, z') dμ - (1/n_T) Σ_i c_i k(z, z_i).

    O(N (N + n_T) d), in blocks of rows. Along the transport c² - |z|² of every neuron is conserved: a weight that
    starts at c > |z| stays positive, and a student of such neurons alone finds no teacher that is negative somewhere.
    A neuron that starts at |c| > |z| may also come to z = 0, where ∇G has no limit: there "dopri5" stops with an error,
    and "euler" steps across. From |c| < |z| no neuron gets there.

    The source gives neither d nor the teacher; those of `planted` are of the birth-death example. The teacher is drawn
    from a seed, c_i ~ N(0, 1), z_i ~ N(0, I/r²), so that x·z_i has variance 1: ours, as are the initial laws.

    Args:
        data_dim: d >= 2.
        n_teacher: n_T >= 1.
        radius: r; None is √d.
        alpha: α >= 0, births and deaths against transport; at 0 there is no method `birth_death_rate`.
        reinjection_rate: rate at which neurons are replaced by draws from N(0, 1) × N(0, I/r²), of full support. At 0
            there is no method `reinjection`.
        initial_mean: c ~ N(initial_mean, initial_deviation²).
        initial_deviation: of c.
        initial_spread: z ~ N(0, initial_spread² I/r²).
        teacher_seed: of the teacher.

    Raises:
        ValueError: parameters out of range.

    Source: Rotskoff, Mean-field neural networks (2020), (11)-(14), (22)-(24), "analytically tractable population loss";
    Rotskoff, Jelassi, Bruna, Vanden-Eijnden, Global convergence of neuron birth-death dynamics, 2019; the kernel: Cho,
    Saul, Kernel methods for deep learning, 2009.

    """

    data_dim: int = 10
    n_teacher: int = 10
    radius: float | None = None
    alpha: float = 0.0
    reinjection_rate: float = 0.0
    initial_mean: float = 0.0
    initial_deviation: float = 1.0
    initial_spread: float = 1.0
    teacher_seed: int = 0

    def __post_init__(self) -> None:
        if not (isinstance(self.data_dim, int) and self.data_dim >= 2):
            raise ValueError(f"data_dim = {self.data_dim!r}; expected a whole number >= 2, the inputs' dimension.")
        if not (isinstance(self.n_teacher, int) and self.n_teacher >= 1):
            raise ValueError(f"n_teacher = {self.n_teacher!r}; expected a whole number of units >= 1.")
        if self.radius is not None and not 0 < self.radius < math.inf:
            raise ValueError(f"radius = {self.radius}; expected a length > 0, or None for √d.")
        if not math.isfinite(self.initial_mean):
            raise ValueError(f"initial_mean = {self.initial_mean}; expected a finite number.")
        for name in ("alpha", "reinjection_rate", "initial_deviation", "initial_spread"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)}; expected a finite number >= 0.")

    @classmethod
    def planted(cls, **fields: Any) -> StudentTeacher:
        """The birth-death example: d = 50, unit-sphere inputs, 10 units; the student has 50. α = 1 is ours."""
        return cls(**{"data_dim": 50, "n_teacher": 10, "radius": 1.0, "alpha": 1.0, **fields})

    @cached_property
    def length(self) -> float:
        """The radius r of the sphere of inputs."""
        return math.sqrt(self.data_dim) if self.radius is None else float(self.radius)

    @cached_property
    def teacher(self) -> EmpiricalMeasure:
        """(1/n_T) Σ δ_{(c_i, z_i)}, in float64."""
        generator = torch.Generator().manual_seed(self.teacher_seed)
        return EmpiricalMeasure(self._full_support().sample(self.n_teacher, generator))

    @cached_property
    def loss_of_none(self) -> float:
        """C_f = ½ E f², the loss of a student that is 0."""
        return float(self._loss(EmpiricalMeasure(torch.zeros(1, 1 + self.data_dim, dtype=torch.float64))))

    @cached_property
    def energy(self) -> Energy:
        """E(μ), the loss."""
        return Energy(self._loss)

    def smooth_drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """-(G(z), c ∇G(z)), by hand."""
        level, slope = self.field(mu, mu.beside(x)[..., 1:])
        return -torch.cat([level.unsqueeze(-1), x[..., :1] * slope], dim=-1)

    def potential(self, mu: EmpiricalMeasure, x: Tensor) -> Tensor:
        """V(θ, μ) = F(θ) + ∫ K(θ, θ') μ(dθ') = c G(z).    (..., M, 1 + d) -> (..., M)."""
        x = mu.beside(x)
        return x[..., 0] * self.field(mu, x[..., 1:])[0]

    @property
    def birth_death_rate(self) -> Callable[[float, Tensor, EmpiricalMeasure], Tensor]:
        """(t, x, mu) -> α V; an attribute only where α > 0."""
        if self.alpha == 0:
            raise AttributeError("alpha = 0: nothing is born or dies.")
        return lambda t, x, mu: self.alpha * self.potential(mu, x)

    @property
    def reinjection(self) -> Callable[[], tuple[float, Law]]:
        """Rate and law of new neurons; an attribute only where the rate is positive."""
        if self.reinjection_rate == 0:
            raise AttributeError("reinjection_rate = 0: no neuron comes from outside.")
        return lambda: (self.reinjection_rate, self._full_support())

    def initial(self) -> Law:
        """Independent weights and places."""
        place = (self.initial_spread / self.length) ** 2
        return Product([Gaussian(self.initial_mean, self.initial_deviation**2), Gaussian([0.0] * self.data_dim, place)])

    def observables(self) -> tuple[Observable | str, ...]:
        """The loss."""
        return (Observable("loss", lambda t, x, mu: self.energy(mu), "1", "loss ½E(f - f_n)²"),)

    def suggested(self) -> dict[str, Any]:
        """The 50 neurons of the birth-death example, in a time in which they learn; ours but for their number."""
        return {"n_particles": 50, "n_replicas": 8, "horizon": 200.0, "dt": 0.1, "seed": 0, "save_every": 50}

    def inputs(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Independent inputs, uniform on the sphere of radius r: (n, d), in float64."""
        return self.length * directions(torch.randn(n, self.data_dim, generator=generator, dtype=torch.float64))

    def predict(self, mu: EmpiricalMeasure, inputs: Tensor) -> Tensor:
        """∫ c [x·z]_+ dμ at inputs (n, d), (..., n); of `teacher` it is f."""
        return mu.integrate(lambda x: x[..., :1] * torch.relu(x[..., 1:] @ inputs.to(x).mT))

    def kernel(self, a: Tensor, b: Tensor) -> Tensor:
        """k(a, b) of all pairs, (..., M, d), (..., N, d) -> (..., M, N); differentiable, also where a = ±b."""
        norms = a.norm(dim=-1).unsqueeze(-1) * b.norm(dim=-1).unsqueeze(-2)
        cosines: Tensor = ArcCosine.apply(directions(a) @ directions(b).mT)  # type: ignore[no-untyped-call]
        scaled: Tensor = cosines * norms
        return scaled * (self.length**2 / self.data_dim)

    def field(self, mu: EmpiricalMeasure, z: Tensor) -> tuple[Tensor, Tensor]:
        """G and ∇G at places z, (..., M, d) -> (..., M), (..., M, d), in blocks of rows; half the slope at z = 0."""
        weights, places = self._residual(mu)
        norms, unit = places.norm(dim=-1), directions(places)
        # Σ_j a_j |y_j| g(φ_j) and Σ_j a_j (π - φ_j) y_j: the weights with their lengths.
        sized = (weights * norms).unsqueeze(-1)
        weighted = weights.unsqueeze(-1) * places
        length, own = z.norm(dim=-1, keepdim=True), directions(z)
        level, slope = torch.empty_like(z[..., 0]), torch.empty_like(z)
        rows = max(1, BLOCK_PAIRS // (places.shape[-2] * max(1, math.prod(z.shape[:-2]))))
        for start in range(0, z.shape[-2], rows):
            block = slice(start, start + rows)
            cosine = (own[..., block, :] @ unit.mT).clamp_(-1.0, 1.0)
            sine = (1 - cosine.square()).sqrt_()
            rest = torch.acos(cosine).neg_().add_(math.pi)
            across = rest @ weighted
            level[..., block] = ((sine + rest.mul_(cosine)) @ sized).squeeze(-1)
            slope[..., block, :] = across.addcmul_(own[..., block, :], sine @ sized)
        scale = self.length**2 / (2 * math.pi * self.data_dim)
        return level.mul_(length.squeeze(-1)).mul_(scale), slope.mul_(scale)

    def _loss(self, mu: EmpiricalMeasure) -> Tensor:
        """½ Σ_ij a_i a_j k(y_i, y_j) over the residual's atoms."""
        weights, places = self._residual(mu)
        rows = max(1, BLOCK_PAIRS // (places.shape[-2] * max(1, math.prod(places.shape[:-2]))))
        total = weights.new_zeros(weights.shape[:-1])
        for start in range(0, places.shape[-2], rows):
            block = slice(start, start + rows)
            level = (self.kernel(places[..., block, :], places) @ weights.unsqueeze(-1)).squeeze(-1)
            total = total + (weights[..., block] * level).sum(-1)
        return 0.5 * total

    def _residual(self, mu: EmpiricalMeasure) -> tuple[Tensor, Tensor]:
        """Student less teacher as a signed measure of places: weights (..., N + n_T), places (..., N + n_T, d)."""
        teacher = self.teacher.points.to(mu.points)
        c, z = (part.expand(*mu.points.shape[:-2], *part.shape) for part in (teacher[:, 0], teacher[:, 1:]))
        weights = torch.cat([mu.weights * mu.points[..., 0], -c / self.n_teacher], dim=-1)
        return weights, torch.cat([mu.points[..., 1:], z], dim=-2)

    def _full_support(self) -> Law:
        return Product([Gaussian(0.0, 1.0), Gaussian([0.0] * self.data_dim, self.length**-2)])


def directions(z: Tensor) -> Tensor:
    """z/|z|, 0 at 0.    (..., d)."""
    length: Tensor = z.norm(dim=-1, keepdim=True)
    return z / length.clamp(min=SMALLEST)


class ArcCosine(torch.autograd.Function):
    """g(u) = (√(1 - u²) + (π - arccos u) u)/2π, whose derivative (π - arccos u)/2π is finite at u = ±1.

    Differentiated term by term it would be ∞ - ∞ there, on the diagonal of every pair sum.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        """g(u); u a cosine, which rounding may leave outside of [-1, 1]."""
        ctx.save_for_backward(u)
        u = u.clamp(-1.0, 1.0)
        return ((1 - u.square()).sqrt() + (math.pi - torch.acos(u)) * u) / (2 * math.pi)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        """Of g; differentiable once more inside of (-1, 1)."""
        (u,) = ctx.saved_tensors
        # At ±1 the second derivative is infinite: a point of the diagonal has none, and counts as 0.
        inside = u.abs() < 1
        ends = torch.acos(u.detach().clamp(-1.0, 1.0))
        angle = torch.where(inside, torch.acos(torch.where(inside, u, 0.0)), ends)
        return slopes[0] * (math.pi - angle) / (2 * math.pi)
