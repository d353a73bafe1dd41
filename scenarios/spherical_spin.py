"""The energy of three interacting spins on a sphere, learnt by a wide network from fresh samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mfsde import EmpiricalMeasure, Gaussian, Neuron, Observable, risk
from mfsde.draws import Draws
from mfsde.network import Risk

ACTIVATIONS = ("tanh", "sigmoid")


@dataclass(frozen=True)
class SphericalSpin:
    """dθ = -D_mE(m, θ) dt: neurons θ = (z, b, c) of scale·∫ c h(x·z + b) m(dθ) learn f, with "sgd" from samples.

        f(x) = d^{-1} Σ_pqr a_pqr x_p x_q x_r,    a_pqr ~ N(0, 1) independent,    x uniform on S^{d-1}(√d),
        E(m) = ½ E_x (f(x) - scale·∫ c h(x·z + b) dm)².

    A step of "sgd" draws batch_size fresh inputs. `drift` and `energy` take the mean over the sphere, which has no
    closed form, over n_data fixed inputs; `energy` of a trained network therefore tells of those inputs, and
    `test_energy` of others. Of the target everything is known: with s the symmetrised couplings,

        E_x f² = (6|s|² + 9 Σ_p (Σ_q s_pqq)²) / ((d + 2)(d + 4)),    E_a E_x f² = d.

    f is odd and cubic. Of ReLU units without bias the odd part is linear, so they cannot fit it; bounded units with a
    bias can. Activation, dimension, scale and initial law are ours: the source gives none.

    Args:
        data_dim: d >= 2.
        activation: h, "tanh" or "sigmoid".
        scale: factor in front of the mean over neurons.
        batch_size: fresh samples in a step of "sgd".
        n_data: inputs that stand for the sphere in `drift` and `energy`.
        initial_spread: z ~ N(0, initial_spread² I/d), b ~ N(0, initial_spread²); c ~ N(0, 1).
        coupling_seed: of the couplings; the inputs' is the next one.

    Raises:
        ValueError: parameters out of range.

    Source: Rotskoff, Mean-field neural networks (2020), "spherical 3-spin"; Rotskoff, Vanden-Eijnden, Trainability and
    accuracy of neural networks: an interacting particle system approach, 2018.

    """

    data_dim: int = 5
    activation: str = "tanh"
    scale: float = 10.0
    batch_size: int = 64
    n_data: int = 2000
    initial_spread: float = 1.0
    coupling_seed: int = 0

    def __post_init__(self) -> None:
        if not (isinstance(self.data_dim, int) and self.data_dim >= 2):
            raise ValueError(f"data_dim = {self.data_dim!r}; expected a whole number >= 2, the inputs' dimension.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation = {self.activation!r}; expected one of {', '.join(ACTIVATIONS)}: the odd part of ReLU "
                "units without bias is linear."
            )
        for name in ("batch_size", "n_data"):
            if not (isinstance(getattr(self, name), int) and getattr(self, name) >= 1):
                raise ValueError(f"{name} = {getattr(self, name)!r}; expected a whole number of samples >= 1.")
        if not (0 < self.scale < math.inf and 0 <= self.initial_spread < math.inf):
            raise ValueError(
                f"scale = {self.scale}, initial_spread = {self.initial_spread}; expected a finite factor > 0 and a "
                "finite deviation >= 0."
            )

    @cached_property
    def couplings(self) -> Tensor:
        """The couplings a, (d, d, d), in float64."""
        generator = torch.Generator().manual_seed(self.coupling_seed)
        return torch.randn(self.data_dim, self.data_dim, self.data_dim, generator=generator, dtype=torch.float64)

    @cached_property
    def mean_square(self) -> float:
        """E_x f², exactly: the sixth moments of the sphere over the couplings."""
        d, a = self.data_dim, self.couplings
        orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
        s = torch.stack([a.permute(order) for order in orders]).mean(0)
        trace = torch.einsum("pqq->p", s)
        return float(6 * s.square().sum() + 9 * trace.square().sum()) / ((d + 2) * (d + 4))

    @cached_property
    def energy(self) -> Risk:
        """½ (f - f_n)² on n_data inputs."""
        return self._risk(self.inputs(self.n_data, torch.Generator().manual_seed(self.coupling_seed + 1)))

    @cached_property
    def test_energy(self) -> Risk:
        """The same on as many other inputs."""
        return self._risk(self.inputs(self.n_data, torch.Generator().manual_seed(self.coupling_seed + 2)))

    def target(self, inputs: Tensor) -> Tensor:
        """The value f(x), (..., d) -> (...)."""
        d, a = self.data_dim, self.couplings.to(inputs)
        pairs = (inputs.unsqueeze(-1) * inputs.unsqueeze(-2)).flatten(-2)
        return ((pairs @ a.reshape(d * d, d)) * inputs).sum(-1) / d

    def inputs(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Independent inputs, uniform on the sphere of radius √d: (n, d), in float64."""
        return self._on_sphere(torch.randn(n, self.data_dim, generator=generator, dtype=torch.float64))

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """-D_mE(mu, θ), the mean over n_data inputs."""
        return self.energy.intrinsic_derivative(mu, x).neg_()

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> float:
        """None."""
        return 0.0

    def sample(self, draws: Draws) -> Tensor:
        """The fresh inputs of a step with a constant in front of the bias, (R, batch_size, d + 1)."""
        g = draws.normals(self.batch_size * self.data_dim, 1).view(-1, self.batch_size, self.data_dim)
        return with_constant(self._on_sphere(g))

    def sampled_drift(self, t: float, x: Tensor, mu: EmpiricalMeasure, sample: Tensor) -> Tensor:
        """Mean over the samples of (f - f_n)(x_s) ∇_θ scale·c h(x_s·z + b)."""
        value, slope = self._units(x, sample)
        at = value if x is mu.points else self._units(mu.points, sample)[0]
        weighted = mu.points[..., -1] * mu.weights
        f = self.scale * (weighted.unsqueeze(-2) @ at).squeeze(-2)
        residual = (self.target(sample[..., :-1]) - f).unsqueeze(-1) * (self.scale / self.batch_size)
        inner = slope.mul_(residual.mT) @ sample
        return torch.cat([x[..., -1:] * inner, value @ residual], dim=-1)

    def initial(self) -> Gaussian:
        """Independent Gaussians."""
        place = self.initial_spread**2 / self.data_dim
        variances = [place] * self.data_dim + [self.initial_spread**2, 1.0]
        return Gaussian([0.0] * (self.data_dim + 2), torch.diag(torch.tensor(variances, dtype=torch.float64)))

    def observables(self) -> tuple[Observable | str, ...]:
        """The loss, on inputs that the drift has not seen."""
        return (Observable("loss", lambda t, x, mu: self.test_energy(mu), "1", "loss ½E(f - f_n)²"),)

    def suggested(self) -> dict[str, Any]:
        """Settings in which it learns; ours."""
        return {
            "n_particles": 128,
            "n_replicas": 4,
            "horizon": 20.0,
            "dt": 0.01,
            "seed": 0,
            "save_every": 100,
            "method": "sgd",
        }

    def _units(self, x: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The values h and h' at x·z + b, (R, N, b)."""
        value = x[..., :-1] @ inputs.mT
        if self.activation == "tanh":
            value.tanh_()
            return value, 1 - value.square()
        value.sigmoid_()
        return value, value * (1 - value)

    def _on_sphere(self, g: Tensor) -> Tensor:
        length: Tensor = g.norm(dim=-1, keepdim=True)
        return g * (math.sqrt(self.data_dim) / length)

    def _risk(self, inputs: Tensor) -> Risk:
        return risk(Neuron(self.activation, scale=self.scale), "squared", with_constant(inputs), self.target(inputs))


def with_constant(inputs: Tensor) -> Tensor:
    """Inputs with the 1 that a bias multiplies, (..., d) -> (..., d + 1)."""
    return torch.cat([inputs, torch.ones_like(inputs[..., :1])], dim=-1)
