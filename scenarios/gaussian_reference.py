"""The Gaussian reference law that parameters of networks are drawn from and held near."""

from __future__ import annotations

import math

from torch import Tensor

from mfsde import Gaussian


class GaussianReference:
    """e^{-U} = N(0, s I) in R^d, s = `prior_variance`, d = `dim`, from which the particles start."""

    prior_variance: float

    @property
    def dim(self) -> int:
        """Parameters of one particle."""
        raise NotImplementedError

    def confinement(self, x: Tensor) -> Tensor:
        """U(x) = |x|²/(2s) + (d/2) log(2πs)."""
        constant = 0.5 * self.dim * math.log(2 * math.pi * self.prior_variance)
        return 0.5 / self.prior_variance * x.square().sum(-1) + constant

    def confinement_gradient(self, x: Tensor) -> Tensor:
        """x/s."""
        return x / self.prior_variance

    def initial(self) -> Gaussian:
        """N(0, s I)."""
        return Gaussian([0.0] * self.dim, self.prior_variance)
