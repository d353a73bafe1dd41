"""Particles driven by their rank: the viscous Burgers equation for the distribution function."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from mfsde import Dirac, EmpiricalMeasure, Energy, Gaussian, Law
from mfsde.limit import GridLaw

REACH = 9.0  # deviations beyond which nothing is left of a Gaussian tail
NODES = 16  # of a limit's grid, on the width of its ends
ORDER = 12  # of the Gauss rule on every panel


@dataclass(frozen=True)
class RankBased:
    """dX = F_m(X) dt + σ dW on R, F_m(x) = ½(m(-∞, x) + m(-∞, x]).

    An atom counts half of itself: with N particles at different places the one of rank r = 1, ..., N moves at
    (r - ½)/N, particles at one place move alike, and the mean moves at exactly ½ for every N. The drift is found by
    sorting, O(N log N). It is ½ + ½ ∫ sign(x - y) m(dy), so the law is the W₂ gradient flow of
    -½ ∫ x dm - ¼ ∬ |x - y| dm dm + (σ²/2) ∫ m log m: particles repel each other by forces that do not decay.

    In the limit F = F_m solves the viscous Burgers equation ∂_t F + F ∂_x F = (σ²/2) ∂²_x F, which the Cole-Hopf
    transform makes a heat equation: with φ₀ = exp(-(1/σ²) ∫_{-∞}^x F₀) and Y ~ N(x, σ²t),

        F(t, x) = E[F₀(Y) φ₀(Y)]/E[φ₀(Y)].

    It rises from 0 to 1, so the wave spreads: with all particles started at a it is close to (x - a)/t between a and
    a + t.

    Args:
        sigma: σ > 0.
        initial_mean: centre of the initial law.
        initial_variance: its variance; 0 starts all particles at the centre (F₀ a Heaviside function), else Gaussian.

    Raises:
        ValueError: a negative variance, or σ <= 0.

    Source: Bossy, Talay, A stochastic particle method for the McKean-Vlasov and the Burgers equation (1997); Jourdain,
    Malrieu, Propagation of chaos and Poincaré inequalities for a system of particles interacting through their CDF
    (2008); Hopf (1950) and Cole (1951) for the transform.

    """

    sigma: float = 0.5
    initial_mean: float = 0.0
    initial_variance: float = 0.0

    def __post_init__(self) -> None:
        if not self.initial_variance >= 0 or not self.sigma > 0:
            raise ValueError(
                f"sigma = {self.sigma}, initial_variance = {self.initial_variance}; expected σ > 0 (particles that "
                "start at one place part by noise alone) and a variance >= 0."
            )

    @cached_property
    def energy(self) -> Energy:
        """-½ ∫ x dm - ¼ ∬ |x - y| dm dm = -∫ x F_m(x) m(dx)."""
        return Energy(lambda mu: -mu.integrate(lambda x: (x * distribution(mu, x))[..., 0]))

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """F_m(x) = -D_mF(mu, x)."""
        return distribution(mu, x)

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> float:
        """σ."""
        return self.sigma

    def initial(self) -> Dirac | Gaussian:
        """The point initial_mean, or N(initial_mean, initial_variance)."""
        if self.initial_variance == 0:
            return Dirac(self.initial_mean)
        return Gaussian([self.initial_mean], self.initial_variance)

    def limit(self, t: float) -> Law:
        """The law of density ∂_x F(t, ·), on a grid that follows its width; symmetric about initial_mean + t/2."""
        if t == 0:
            return self.initial()
        width = math.sqrt(self.initial_variance + self.sigma**2 * t)
        n = 2 + math.ceil(NODES * (t + 2 * REACH * width) / width)
        nodes = torch.linspace(-REACH * width, t + REACH * width, n, dtype=torch.float64)
        density = self._front(t, nodes) if self.initial_variance == 0 else self._quadrature(t, nodes)
        return GridLaw(nodes + self.initial_mean, density)

    def observables(self) -> tuple[str, ...]:
        """Mean and energy."""
        return ("mean", "energy")

    def suggested(self) -> dict[str, Any]:
        """Settings that show the wave spread."""
        return {"n_particles": 2000, "n_replicas": 8, "horizon": 2.0, "dt": 0.01, "seed": 0, "save_every": 10}

    def _front(self, t: float, x: Tensor) -> Tensor:
        """∂_x F for F₀ the Heaviside function, x from its jump on.

        There F/(1 - F) = exp((t - 2x)/2σ²) Φ((x - t)/s)/Φ(-x/s), s = σ√t.
        """
        s = self.sigma * math.sqrt(t)
        ahead, behind = (x - t) / s, -x / s
        odds = (t - 2 * x) / (2 * self.sigma**2) + torch.special.log_ndtr(ahead) - torch.special.log_ndtr(behind)
        slope = (_hazard(ahead) + _hazard(behind)) / s - 1 / self.sigma**2
        return torch.sigmoid(odds) * torch.sigmoid(-odds) * slope

    def _quadrature(self, t: float, x: Tensor) -> Tensor:
        """∂_x F = Cov(F₀(Y), Y)/(σ²t) under the law of density ∝ φ₀(y) e^{-(x - y)²/2σ²t}, x from the centre on."""
        s, deviation = self.sigma * math.sqrt(t), math.sqrt(self.initial_variance)
        y, weights = _panels(x, t, s, deviation)
        z = y / deviation
        # Torch's Φ is ½(1 + erf): without digits in its tail.
        below, above = (0.5 * torch.erfc(sign * z / math.sqrt(2)) for sign in (-1, 1))
        integral = y * below + deviation / math.sqrt(2 * math.pi) * torch.exp(-0.5 * z**2)
        p = torch.softmax(weights.log() - integral / self.sigma**2 - 0.5 * ((x[:, None] - y) / s) ** 2, -1)
        distance = y - x[:, None]
        centred = p * (distance - (p * distance).sum(-1, keepdim=True))
        # Whichever of F and 1 - F is small keeps its digits.
        small = torch.where((p * below).sum(-1, keepdim=True) < 0.5, below, -above)
        return (centred * small).sum(-1).clamp(min=0) / s**2


def distribution(mu: EmpiricalMeasure, x: Tensor) -> Tensor:
    """½(m(-∞, x) + m(-∞, x]) of a measure on the line, by sorting.    (..., M, 1) -> (..., M, 1)."""
    points, order = mu.points[..., 0].sort(dim=-1)
    at = mu.beside(x)[..., 0].contiguous()
    before = torch.searchsorted(points.detach(), at.detach())
    upto = torch.searchsorted(points.detach(), at.detach(), right=True)
    if mu.is_uniform:
        return ((before + upto).to(x.dtype) / (2 * mu.n_particles)).unsqueeze(-1)
    mass = torch.nn.functional.pad(mu.weights.gather(-1, order).cumsum(-1), (1, 0))
    return (0.5 * (mass.gather(-1, before) + mass.gather(-1, upto))).unsqueeze(-1)


def _hazard(z: Tensor) -> Tensor:
    """φ(z)/Φ(z)."""
    return torch.exp(-0.5 * z**2 - 0.5 * math.log(2 * math.pi) - torch.special.log_ndtr(z))


def _panels(x: Tensor, t: float, s: float, deviation: float) -> tuple[Tensor, Tensor]:
    """Gauss nodes and weights where Y has mass, for each x: panels that resolve both its kernel and F₀.

    Y is within reach of the mode of a log-concave density that is narrower than s, and the mode in [x - t, x].

    """
    low, high = x - t - REACH * s, x + REACH * s
    even = low[:, None] + torch.arange(math.ceil(2 * (t / s + 2 * REACH)), dtype=torch.float64) * (s / 2)
    halves = torch.arange(-2 * REACH, 2 * REACH + 1, dtype=torch.float64) / 2
    around = torch.minimum(torch.maximum(deviation * halves, low[:, None]), high[:, None])
    edges = torch.cat([even, around, high[:, None]], -1).sort(dim=-1).values.unsqueeze(-1)
    nodes, weights = (torch.from_numpy(a) for a in leggauss(ORDER))
    half = edges.diff(dim=1) / 2
    return (edges[:, :-1] + half * (1 + nodes)).flatten(1), (half * weights).flatten(1)
