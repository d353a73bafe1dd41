"""Wide two-layer networks trained by mean-field Langevin dynamics, on real data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from mfsde import EmpiricalMeasure, MeanFieldLangevin, Neuron, Observable, risk
from mfsde.network import Risk

from .datasets import Dataset, load
from .gaussian_reference import GaussianReference


@dataclass(frozen=True)
class TwoLayerNetwork(GaussianReference, MeanFieldLangevin):
    """dX = -(D_mF(m, X) + (σ²/2) ∇U(X)) dt + σ dW for the risk of a two-layer network.

    Particles are neurons θ = (α, β); the network is f(z) = scale·∫ β φ(α·z) m(dθ), z carrying a constant 1 for the
    bias. F is the training risk; U is the quadratic confinement of the reference law N(0, prior_variance·I),
    normalised: e^{-U} is its density.

    Args:
        data: "digits" (even against odd) or "breast_cancer", both shipped with scikit-learn.
        activation: "tanh", "sigmoid" or "relu".
        loss: "squared" or "logistic", on targets ±1.
        scale: factor in front of the mean over neurons; with 1 a network of bounded neurons learns slowly.
        sigma: σ; the temperature is σ²/2.
        prior_variance: variance of the reference law e^{-U}.
        split: seed of the train/test split.

    Source: Hu, Ren, Siska, Szpruch, Mean-field Langevin dynamics and energy landscape of neural networks (2019).

    """

    data: str = "digits"
    activation: str = "tanh"
    loss: str = "logistic"
    scale: float = 20.0
    sigma: float = 0.2
    prior_variance: float = 1.0
    split: int = 0

    @cached_property
    def dataset(self) -> Dataset:
        """Standardised inputs with a constant column, targets ±1, train and test."""
        return load(self.data, self.split)

    @cached_property
    def energy(self) -> Risk:
        """The training risk."""
        return self._risk(self.dataset.train_inputs, self.dataset.train_targets)

    @cached_property
    def test_risk(self) -> Risk:
        """The same functional on the test data."""
        return self._risk(self.dataset.test_inputs, self.dataset.test_targets)

    @property
    def dim(self) -> int:
        """Parameters of one neuron."""
        return self.dataset.train_inputs.shape[1] + 1

    def accuracy(self, mu: EmpiricalMeasure) -> Tensor:
        """Share of test points whose sign the network gets right, (...,)."""
        predicted = self.test_risk.predict(mu, self.dataset.test_inputs)
        return (predicted.sign() == self.dataset.test_targets.to(predicted)).to(predicted.dtype).mean(-1)

    def observables(self) -> tuple[Observable | str, ...]:
        """Energy, free energy and test accuracy."""
        return (
            "energy",
            "free_energy",
            Observable("test_accuracy", lambda t, x, mu: self.accuracy(mu), "1", "share of test points classified"),
        )

    def suggested(self) -> dict[str, Any]:
        """Settings that train it."""
        return {
            "n_particles": 1000,
            "n_replicas": 4,
            "horizon": 60.0,
            # The squared loss is stiffer: its curvature at the start is that of scale².
            "dt": 0.05 if self.loss == "logistic" else 0.01,
            "seed": 0,
            "save_every": 60,
        }

    def _risk(self, inputs: Tensor, targets: Tensor) -> Risk:
        return risk(Neuron(self.activation, scale=self.scale), self.loss, inputs, targets)
