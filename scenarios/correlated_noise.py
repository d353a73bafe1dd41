"""A linear equation with full matrices: correlated noise of each particle, and correlated noise common to all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.linalg import solve_continuous_lyapunov
from torch import Tensor

from mfsde import EmpiricalMeasure, Gaussian

Matrix = Sequence[Sequence[float]]


@dataclass(frozen=True)
class CorrelatedLinear:
    """dX = (A X + B E X + c) dt + σ dW + σ⁰ dW⁰ on R^d, with matrices A, B (d, d), σ (d, m), σ⁰ (d, m⁰).

    With common noise E X is the mean given W⁰. In the limit the law given W⁰ is N(M_t, C_t) with

        dM = ((A + B) M + c) dt + σ⁰ dW⁰,    C' = A C + C Aᵀ + σσᵀ:

    the covariance is that of a particle around the common mean and is not random; the mean is a Gaussian process, whose
    covariance solves the same Lyapunov equation with A + B and σ⁰σ⁰ᵀ.

    Args:
        matrix: A.
        mean_matrix: B; none when empty.
        shift: c, d numbers; none when empty.
        sigma: σ, d rows of any number m of columns, a Brownian motion each.
        common_sigma: σ⁰, d rows of any number m⁰ of columns; no common noise when empty.
        initial_mean: initial mean, d numbers.
        initial_covariance: initial covariance, d rows, or a number v for v·I.

    Raises:
        ValueError: matrices that do not fit.

    Source: Karatzas, Shreve, Brownian Motion and Stochastic Calculus (1991), section 5.6, for linear equations;
    Carmona, Delarue, Probabilistic Theory of Mean Field Games II (2018), chapter 2, for common noise; Van Loan,
    Computing integrals involving the matrix exponential (1978).

    """

    matrix: Matrix = ((-1.0, 0.8), (-0.6, -0.5))
    mean_matrix: Matrix = ((0.3, 0.0), (0.2, -0.4))
    shift: Sequence[float] = (0.2, -0.1)
    sigma: Matrix = ((0.5, 0.2, 0.0), (0.3, -0.2, 0.4))
    common_sigma: Matrix = ()
    initial_mean: Sequence[float] = (1.0, -1.0)
    initial_covariance: Any = ((0.5, 0.2), (0.2, 0.3))

    def __post_init__(self) -> None:
        for name in ("matrix", "mean_matrix", "sigma", "common_sigma"):
            rows, square = getattr(self, name), name.endswith("matrix")
            optional = name in ("mean_matrix", "common_sigma") and len(rows) == 0
            widths = {len(row) for row in rows}
            if not optional and (len(rows) != self.dim or len(widths) != 1 or (square and widths != {self.dim})):
                raise ValueError(
                    f"{name} has {len(rows)} rows of {sorted(widths)} numbers; expected {self.dim} rows, as many as "
                    f"initial_mean has numbers, {'each as long' if square else 'all of one length'}."
                )
        if len(self.shift) not in (0, self.dim):
            raise ValueError(f"shift has {len(self.shift)} numbers; expected {self.dim}, or none.")
        self.initial()

    @property
    def dim(self) -> int:
        """Dimension d."""
        return len(self.initial_mean)

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """A x + B m + c."""
        constant = mu.mean() @ self._of_mean.to(x).mT + self._shift.to(x)
        return x @ x.new_tensor(self.matrix).mT + constant

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """σ, (1, ..., 1, d, m)."""
        return _constant(self.sigma, x)

    @property
    def common_diffusion(self) -> Callable[[float, Tensor, EmpiricalMeasure], Tensor]:
        """(t, x, mu) -> σ⁰, (1, ..., 1, d, m⁰); missing where there is no common noise, which would cost its draws."""
        if len(self.common_sigma) == 0:
            raise AttributeError("CorrelatedLinear without common_sigma has no common noise.")
        return lambda t, x, mu: _constant(self.common_sigma, x)

    def initial(self) -> Gaussian:
        """N(initial_mean, initial_covariance)."""
        return Gaussian(list(self.initial_mean), self.initial_covariance)

    def covariance(self, t: float) -> Tensor:
        """C_t = e^{At} C₀ e^{Aᵀt} + ∫₀ᵗ e^{As} σσᵀ e^{Aᵀs} ds: of the law, given W⁰ where there is common noise."""
        flow, gained = _lyapunov(self._matrix, _squared(self.sigma, self.dim), t)
        return flow @ self.initial().cov @ flow.mT + gained

    def law_of_mean(self, t: float) -> Gaussian:
        """The law of M_t: a point without common noise."""
        total = self._matrix + self._of_mean
        generator = torch.zeros(self.dim + 1, self.dim + 1, dtype=torch.float64)
        generator[:-1, :-1], generator[:-1, -1] = total, self._shift
        start = torch.cat([self.initial().mean, torch.ones(1, dtype=torch.float64)])
        mean = (torch.linalg.matrix_exp(t * generator) @ start)[:-1]
        return Gaussian(mean, _lyapunov(total, _squared(self.common_sigma, self.dim), t)[1])

    @property
    def limit(self) -> Callable[[float], Gaussian]:
        """T -> N(M_t, C_t); missing with common noise, whose path it depends on."""
        self._check_deterministic("limit")
        return lambda t: Gaussian(self.law_of_mean(t).mean, self.covariance(t))

    @property
    def log_invariant(self) -> Callable[[Tensor], Tensor]:
        """X -> -½(x - m)ᵀC^{-1}(x - m), (A + B) m + c = 0, A C + C Aᵀ + σσᵀ = 0; missing with common noise."""
        self._check_deterministic("log_invariant")
        return self._log_invariant

    def observables(self) -> tuple[str, ...]:
        """Mean and covariance."""
        return ("mean", "covariance")

    def suggested(self) -> dict[str, Any]:
        """Settings that show the relaxation."""
        return {"n_particles": 1000, "n_replicas": 8, "horizon": 4.0, "dt": 0.01, "seed": 0, "save_every": 10}

    def _log_invariant(self, x: Tensor) -> Tensor:
        total = self._matrix + self._of_mean
        if not all(float(torch.linalg.eigvals(m).real.max()) < 0 for m in (self._matrix, total)):
            raise ValueError(
                "CorrelatedLinear has an invariant law only if all eigenvalues of A and of A + B have negative real "
                f"parts; theirs are {_eigenvalues(self._matrix)} and {_eigenvalues(total)}."
            )
        stationary = solve_continuous_lyapunov(self._matrix.numpy(), -_squared(self.sigma, self.dim).numpy())
        centre = torch.linalg.solve(total, -self._shift)
        z = (x - centre.to(x)).unsqueeze(-1)
        white = torch.linalg.solve(torch.from_numpy(stationary).to(x), z)
        exponent: Tensor = -0.5 * (z * white).sum((-2, -1))
        return exponent

    def _check_deterministic(self, what: str) -> None:
        if len(self.common_sigma) > 0:
            raise AttributeError(
                f"CorrelatedLinear with common noise has no {what}: the law depends on the path of W⁰. `covariance` is "
                "its covariance given the path, and `law_of_mean` the law of its mean."
            )

    @property
    def _matrix(self) -> Tensor:
        return torch.tensor(self.matrix, dtype=torch.float64)

    @property
    def _of_mean(self) -> Tensor:
        shape = (self.dim, self.dim)
        return torch.tensor(self.mean_matrix, dtype=torch.float64).reshape(shape) if self.mean_matrix else _zeros(shape)

    @property
    def _shift(self) -> Tensor:
        return torch.tensor(self.shift, dtype=torch.float64) if self.shift else _zeros((self.dim,))


def _lyapunov(matrix: Tensor, noise: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """E^{At} and ∫₀ᵗ e^{As} Q e^{Aᵀs} ds: one exponential of a block matrix [1] for a short time, which is doubled.

    Over a long one the block e^{-Aᵀt} would swamp the others. [1] Van Loan (1978).
    """
    d = len(matrix)
    size = float(torch.linalg.matrix_norm(matrix, 1)) * t
    doublings = max(0, math.ceil(math.log2(size))) if size > 0 else 0
    block = torch.cat([torch.cat([matrix, noise], 1), torch.cat([torch.zeros_like(matrix), -matrix.mT], 1)])
    whole = torch.linalg.matrix_exp(block * (t / 2**doublings))
    flow, gained = whole[:d, :d], whole[:d, d:] @ whole[:d, :d].mT
    for _ in range(doublings):
        gained = gained + flow @ gained @ flow.mT
        flow = flow @ flow
    return flow, (gained + gained.mT) / 2


def _constant(rows: Matrix, x: Tensor) -> Tensor:
    """A matrix that is the same for all particles, with as many axes before it as x has before its last."""
    sigma = x.new_tensor(rows)
    return sigma.reshape(*[1] * (x.ndim - 1), *sigma.shape)


def _squared(rows: Matrix, d: int) -> Tensor:
    """The product σσᵀ, zero for no columns."""
    sigma = torch.tensor(rows, dtype=torch.float64).reshape(d, -1)
    return sigma @ sigma.mT


def _zeros(shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def _eigenvalues(matrix: Tensor) -> list[str]:
    return [f"{complex(value):.3g}" for value in torch.linalg.eigvals(matrix)]
