"""Correlated geometric Brownian motions, and a price of theirs as the mean of a network over random multipliers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mfsde import EmpiricalMeasure, Gaussian, Observable
from mfsde.activation import ACTIVATIONS
from mfsde.measure import Dirac, Law

Matrix = Sequence[Sequence[float]]


def equicorrelated(dim: int, volatility: float, correlation: float) -> tuple[tuple[float, ...], ...]:
    """The symmetric σ with σσᵀ = v²((1 - ρ)I + ρ 1 1ᵀ).

    Raises:
        ValueError: dim < 1, a volatility that is no number >= 0, ρ outside [-1/(dim - 1), 1].

    """
    lowest = -1 / max(1, dim - 1)
    if dim < 1 or not 0 <= volatility < math.inf or not lowest <= correlation <= 1:
        raise ValueError(
            f"equicorrelated: dim = {dim}, volatility = {volatility}, correlation = {correlation}; expected dim >= 1, "
            f"a number >= 0 and {lowest:.4g} <= ρ <= 1, as {max(dim, 1)} components can be correlated alike."
        )
    if dim == 1:
        return ((volatility,),)
    rest, along = math.sqrt(1 - correlation), math.sqrt(1 + (dim - 1) * correlation)
    off = volatility * (along - rest) / dim
    return tuple(tuple(off + volatility * rest * (i == j) for j in range(dim)) for i in range(dim))


THREE_ASSETS = equicorrelated(3, 0.2, 0.3)


@dataclass(frozen=True)
class BlackScholes:
    """dX^i = X^i μ^i dt + X^i Σ_j σ^{ij} dB^j from a point x of R^d, and g(X) = Σ_k c_k φ(α_k·X + b_k).

    The solution is X_T^i = W^i x^i with the multiplier W^i = exp[(μ^i - ½ Σ_j (σ^{ij})²) T + Σ_j σ^{ij} B_T^j], so that

        v(0, x) = E g(X_T) = ∫ g(y x) m*(dy),    m* the law of W (of the multiplier, not of X_T), yx component-wise,

    solves ∂_t v + ½ tr[diag(x)σσᵀdiag(x) ∂²v] + μx·∂v = 0, v(T, ·) = g. Nothing is discounted. The mean of N draws has
    the error √(Var g(Wx)/N), in which d does not appear. Particles do not interact.

    The source gives no parameters. The ones here, ours, are three assets with constant correlation and a call
    (mean x - K)_+ on their basket: one neuron. `basket` makes that for any d.

    Args:
        start: x > 0, d numbers.
        growth: μ, d numbers.
        sigma: σ, d rows of any number d' of columns, a Brownian motion each.
        outer: c, one number for each neuron.
        inner: α, a row of d numbers for each neuron.
        offset: b, one number for each neuron.
        activation: φ: "relu", "tanh" or "sigmoid".

    Raises:
        ValueError: no asset, x that is not positive, numbers that are not finite, shapes that do not fit, an unknown
            activation.

    Source: Szpruch, Mean-field Langevin dynamics in the energy landscape of neural networks (2019), "PDE approximation
    without the curse of dimensionality"; Black, Scholes (1973) for the call.

    """

    start: Sequence[float] = (100.0, 100.0, 100.0)
    growth: Sequence[float] = (0.05, 0.05, 0.05)
    sigma: Matrix = THREE_ASSETS
    outer: Sequence[float] = (1.0,)
    inner: Matrix = ((1 / 3, 1 / 3, 1 / 3),)
    offset: Sequence[float] = (-100.0,)
    activation: str = "relu"

    @classmethod
    def basket(
        cls,
        dim: int,
        *,
        price: float = 100.0,
        strike: float = 100.0,
        growth: float = 0.05,
        volatility: float = 0.2,
        correlation: float = 0.3,
    ) -> BlackScholes:
        """A call (mean of x - K)_+ on d assets alike, with constant correlation; for d = 1 the plain call."""
        sigma = equicorrelated(dim, volatility, correlation)
        mean = ((1 / dim,) * dim,)
        return cls((price,) * dim, (growth,) * dim, sigma, (1.0,), mean, (-strike,))

    def __post_init__(self) -> None:
        if not isinstance(self.start, Sequence) or not self.start or not all(0 < x < math.inf for x in self.start):
            raise ValueError(
                f"start = {self.start}; expected one positive price for each asset, at least one: at 0 an asset stays."
            )
        for name in ("growth", "outer", "offset"):
            values, wanted = getattr(self, name), self.dim if name == "growth" else len(self.inner)
            _check(name, [values], 1, wanted)
        _check("sigma", self.sigma, self.dim, None)
        _check("inner", self.inner, len(self.inner), self.dim)
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation = {self.activation!r}; expected one of {', '.join(ACTIVATIONS)}.")

    @property
    def dim(self) -> int:
        """Dimension d."""
        return len(self.start)

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """x^i μ^i."""
        return x * x.new_tensor(self.growth)

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """x^i σ^{ij}, (..., N, d, d')."""
        return x.unsqueeze(-1) * x.new_tensor(self.sigma)

    def initial(self) -> Dirac:
        """The point x."""
        return Dirac(list(self.start))

    def multiplier(self, t: float) -> CorrelatedLogNormal:
        """The law m* of W over the time t: that of exp N((μ - ½ diag σσᵀ)t, σσᵀt)."""
        return self._lognormal(t, torch.zeros(self.dim, dtype=torch.float64))

    def limit(self, t: float) -> CorrelatedLogNormal:
        """The law of X_t = W x."""
        return self._lognormal(t, torch.tensor(self.start, dtype=torch.float64).log())

    def second_moments(self, t: float) -> Tensor:
        """E X^i X^j = x^i x^j exp((μ^i + μ^j + (σσᵀ)^{ij}) t), (d, d)."""
        x, growth, sigma = (torch.tensor(v, dtype=torch.float64) for v in (self.start, self.growth, self.sigma))
        return torch.outer(x, x) * torch.exp((growth[:, None] + growth + sigma @ sigma.mT) * t)

    def payoff(self, x: Tensor) -> Tensor:
        """g(x) = Σ_k c_k φ(α_k·x + b_k), (..., d) -> (...)."""
        hidden = x @ x.new_tensor(self.inner).mT + x.new_tensor(self.offset)
        value: Tensor = getattr(torch, self.activation)(hidden) @ x.new_tensor(self.outer)
        return value

    def feynman_kac(self, multipliers: Tensor) -> Tensor:
        """∫ g(y x) m^N(dy): the mean of the payoff over multipliers (..., N, d) -> (...)."""
        return self.payoff(multipliers * multipliers.new_tensor(self.start)).mean(-1)

    def value(self, t: float) -> float:
        """E g(X_t) in closed form, for one asset and rectified neurons: each is a call, a put or linear.

        With K = -b/α and d± = (log(x/K) + (μ ± ½s²)t)/(s√t): E(X - K)_+ = x e^{μt} Φ(d+) - K Φ(d-). Not discounted.

        Raises:
            ValueError: several assets, another activation, t < 0.

        """
        _check_time(t)
        if self.dim != 1 or self.activation != "relu":
            raise ValueError(
                f"BlackScholes.value: no closed form for d = {self.dim} and {self.activation!r}; it is there for d = 1 "
                "and 'relu'. Take feynman_kac(multiplier(t).from_variates(normals))."
            )
        forward = self.start[0] * math.exp(self.growth[0] * t)
        deviation = math.sqrt(sum(s * s for s in self.sigma[0]) * t)
        neurons = zip(self.outer, self.inner, self.offset, strict=True)
        return sum(c * _rectified(forward, deviation, row[0], b) for c, row, b in neurons)

    def observables(self) -> tuple[Observable | str, ...]:
        """Mean, and the mean payoff: its last value is v(0, x)."""
        payoff = Observable("payoff", lambda t, x, mu: mu.integrate(self.payoff), "1", "mean payoff ∫ g dm")
        return ("mean", payoff)

    def suggested(self) -> dict[str, Any]:
        """Settings that price the payoff after a year."""
        return {"n_particles": 2000, "n_replicas": 8, "horizon": 1.0, "dt": 0.01, "seed": 0, "save_every": 10}

    def _lognormal(self, t: float, start: Tensor) -> CorrelatedLogNormal:
        _check_time(t)
        growth, sigma = (torch.tensor(v, dtype=torch.float64) for v in (self.growth, self.sigma))
        return CorrelatedLogNormal(start + (growth - 0.5 * sigma.square().sum(-1)) * t, sigma * math.sqrt(t))


class CorrelatedLogNormal(Law):
    """The law of e^Y, component-wise, Y = log_mean + A Z, Z standard normal in R^q.

    Args:
        log_mean: (d,).
        factor: A, (d, q).

    Raises:
        ValueError: shapes that do not fit, numbers that are not finite.

    """

    def __init__(self, log_mean: Tensor, factor: Tensor) -> None:
        if log_mean.ndim != 1 or factor.ndim != 2 or len(factor) != len(log_mean):
            raise ValueError(
                f"CorrelatedLogNormal: log_mean has shape {tuple(log_mean.shape)} and factor {tuple(factor.shape)}; "
                "expected (d,) and (d, q)."
            )
        if not (log_mean.isfinite().all() and factor.isfinite().all()):
            raise ValueError("CorrelatedLogNormal: log_mean or factor is not finite; expected numbers.")
        self.log_mean, self.factor = log_mean.double(), factor.double()

    @property
    def dim(self) -> int:
        """Dimension d."""
        return len(self.log_mean)

    @property
    def n_variates(self) -> int:
        """Brownian motions q."""
        return self.factor.shape[1]

    @property
    def mean(self) -> Tensor:
        """exp(log_mean + ½ diag AAᵀ), (d,)."""
        return torch.exp(self.log_mean + 0.5 * self.factor.square().sum(-1))

    @property
    def cov(self) -> Tensor:
        """mean^i mean^j (e^{(AAᵀ)^{ij}} - 1), (d, d)."""
        return torch.outer(self.mean, self.mean) * torch.expm1(self.factor @ self.factor.mT)

    def from_variates(self, z: Tensor) -> Tensor:
        """exp(log_mean + A z)."""
        return torch.exp(self.log_mean.to(z) + z @ self.factor.to(z).mT)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density, (..., d) -> (...), -inf outside x > 0.    ValueError where AAᵀ is singular."""
        y = torch.log(x.clamp(min=torch.finfo(x.dtype).tiny))
        density = Gaussian(self.log_mean, self.factor @ self.factor.mT).log_prob(y) - y.sum(-1)
        return torch.where((x > 0).all(-1), density, -math.inf)

    def as_measure(self) -> EmpiricalMeasure:
        """That of Z through the exponential, moved affinely onto the exact mean and covariance."""
        normal = Gaussian([0.0] * self.n_variates, 1.0).as_measure()
        measure = EmpiricalMeasure(self.from_variates(normal.points), normal.weights)
        found, wanted = _root(measure.covariance()), _root(self.cov)
        centred = measure.points - measure.mean()
        return EmpiricalMeasure(centred @ torch.linalg.pinv(found) @ wanted + self.mean, normal.weights)


def _rectified(forward: float, deviation: float, slope: float, offset: float) -> float:
    """E(a X + b)_+ for a lognormal X of mean `forward` > 0 and log-deviation `deviation`."""
    mean = slope * forward + offset
    if slope * offset >= 0:
        # Of one sign for all X > 0.
        return max(mean, 0.0)
    if deviation == 0:
        return max(mean, 0.0)
    upper = math.log(-slope * forward / offset) / deviation + 0.5 * deviation
    side = math.copysign(1.0, slope)
    return slope * forward * _normal(side * upper) + offset * _normal(side * (upper - deviation))


def _normal(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2))


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = vectors * values.clamp(min=0).sqrt() @ vectors.mT
    return root


def _check_time(t: float) -> None:
    if not 0 <= t < math.inf:
        raise ValueError(f"t = {t}; expected the time that passes, a number >= 0.")


def _check(name: str, rows: Matrix, n_rows: int, width: int | None) -> None:
    """`n_rows` rows of `width` finite numbers, of one width of 1 or more where it is None."""
    if not isinstance(rows, Sequence) or not all(isinstance(row, Sequence) for row in rows):
        shown = rows[0] if n_rows == 1 and isinstance(rows, list) else rows
        raise ValueError(f"{name} = {shown}; expected a tuple, with a tuple for each row of a matrix.")
    widths = sorted({len(row) for row in rows})
    fits = len(rows) == n_rows >= 1 and len(widths) == 1 and (widths == [width] if width is not None else widths[0] > 0)
    if not fits:
        raise ValueError(
            f"{name} has {len(rows)} row(s) of {widths} numbers; expected {max(n_rows, 1)} of "
            f"{'one length' if width is None else width}: an entry for each asset or neuron."
        )
    if not all(math.isfinite(entry) for row in rows for entry in row):
        raise ValueError(f"{name} has an entry that is not finite: {rows}; expected numbers.")
