"""A mean of deep networks, trained by mean-field Langevin dynamics on a small regression."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mfsde import MeanFieldLangevin, risk
from mfsde.activation import ACTIVATIONS
from mfsde.network import Risk

from .gaussian_reference import GaussianReference


@dataclass(frozen=True)
class DeepNetwork(GaussianReference, MeanFieldLangevin):
    """dX = -(D_mF(m, X) + (σ²/2) ∇U(X)) dt + σ dW for F(m) = (1/n) Σ_s ½|∫ (RΨ)(z_s) m(dΨ) - y_s|².

    A particle is the whole parameter Ψ = ((α¹, β¹), ..., (α^L, β^L)) of a network of L layers,

        (RΨ)(z⁰) = α^L z^{L-1} + β^L,    z^k = φ(α^k z^{k-1} + β^k), k < L,

    laid out layer by layer, α^k by rows and then β^k. F is convex in m though not in Ψ: what is averaged are outputs.
    U is the quadratic confinement of the reference law N(0, prior_variance·I), normalised.

    The data are ours, since the source has none: points of a lattice in [-1, 1]^{l₀} and sin(π s + jπ/4) of the scaled
    sum s = Σ_i z_i/√l₀, j the number of the output.

    Args:
        layers: l₀, l₁, ..., l_L: inputs, hidden units, outputs.
        activation: φ: "tanh", "sigmoid" or "relu".
        sigma: σ; the temperature is σ²/2.
        prior_variance: variance of the reference law e^{-U}.
        n_data: number n of data.

    Raises:
        ValueError: fewer than two sizes or one below 1, an unknown activation, a σ that is no number >= 0, a
            variance <= 0, no whole number of data >= 1.

    Source: Szpruch, Mean-field Langevin dynamics in the energy landscape of neural networks (2019), "What is a neural
    net?"; Hu, Ren, Siska, Szpruch (2019) for the dynamics.

    """

    layers: Sequence[int] = (1, 4, 3, 1)
    activation: str = "tanh"
    sigma: float = 0.1
    prior_variance: float = 1.0
    n_data: int = 32

    def __post_init__(self) -> None:
        sizes = self.layers if isinstance(self.layers, Sequence) else ()
        if len(sizes) < 2 or not all(isinstance(size, int) and size >= 1 for size in sizes):
            raise ValueError(
                f"layers = {self.layers}; expected whole numbers >= 1, at least two: inputs and outputs, with the "
                "hidden layers between them."
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation = {self.activation!r}; expected one of {', '.join(ACTIVATIONS)}.")
        if not 0 <= self.sigma < math.inf:
            raise ValueError(f"sigma = {self.sigma}; expected a number >= 0, and 0 for descent without noise.")
        if not 0 < self.prior_variance < math.inf or not isinstance(self.n_data, int) or self.n_data < 1:
            raise ValueError(
                f"prior_variance = {self.prior_variance}, n_data = {self.n_data}; expected a positive variance and one "
                "data point or more, as a whole number."
            )

    @property
    def dim(self) -> int:
        """Number of parameters Σ_k l_k (l_{k-1} + 1)."""
        return sum(after * (before + 1) for before, after in zip(self.layers, self.layers[1:], strict=False))

    def network(self, theta: Tensor, z: Tensor) -> Tensor:
        """(RΨ)(z).    theta: (..., N, 1, d), z: (b, l₀) -> (..., N, b), or (..., N, b, l_L) for several outputs."""
        layers = self.split(theta.squeeze(-2))
        for k, (alpha, beta) in enumerate(layers):
            z = z @ alpha.mT + beta.unsqueeze(-2)
            if k < len(layers) - 1:
                z = getattr(torch, self.activation)(z)
        return z.squeeze(-1) if self.layers[-1] == 1 else z

    def split(self, theta: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(α^k, β^k) of each layer.    (..., d) -> (..., l_k, l_{k-1}), (..., l_k)."""
        sizes = list(zip(self.layers, self.layers[1:], strict=False))
        parts = theta.split([n for before, after in sizes for n in (after * before, after)], dim=-1)
        return [
            (alpha.unflatten(-1, (after, before)), beta)
            for alpha, beta, (before, after) in zip(parts[::2], parts[1::2], sizes, strict=True)
        ]

    @cached_property
    def inputs(self) -> Tensor:
        """z_s, (n, l₀): the lattice of a Kronecker sequence, evenly spaced for one input."""
        s = torch.arange(self.n_data, dtype=torch.float64)[:, None]
        if self.layers[0] == 1:
            return -1 + 2 * (s + 0.5) / self.n_data
        # Fractional parts of s·(√2, √3, √5, ...), square roots of numbers that are no squares.
        roots = [math.sqrt(k) for k in range(2, 4 * self.layers[0] + 8) if math.isqrt(k) ** 2 != k]
        return 2 * torch.frac((s + 0.5) * torch.tensor(roots[: self.layers[0]], dtype=torch.float64)) - 1

    @cached_property
    def targets(self) -> Tensor:
        """y_s, (n,), or (n, l_L) for several outputs."""
        phase = torch.arange(self.layers[-1], dtype=torch.float64) * math.pi / 4
        y = torch.sin(math.pi * self.inputs.sum(-1, keepdim=True) / math.sqrt(self.layers[0]) + phase)
        return y.squeeze(-1) if self.layers[-1] == 1 else y

    @cached_property
    def energy(self) -> Risk:
        """The risk F."""
        return risk(self.network, "squared", self.inputs, self.targets)

    def observables(self) -> tuple[str, ...]:
        """The risk."""
        return ("energy",)

    def suggested(self) -> dict[str, Any]:
        """Settings that train it."""
        return {"n_particles": 200, "n_replicas": 4, "horizon": 40.0, "dt": 0.1, "seed": 0, "save_every": 20}
