"""Laws known by an unnormalised density: the Gibbs laws of mean-field Langevin dynamics, and their curvature.

The density is tabulated once on a grid on which the trapezoidal rule, spectrally accurate for smooth densities that
decay, agrees with itself on every second node. That restricts the law to d <= 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mfsde import EmpiricalMeasure
from mfsde.energy import gradient
from mfsde.measure import Law
from mfsde.model import energy_of

Field = Callable[[Tensor], Tensor]

NODES = {1: 2049, 2: 385}  # per axis, odd: every second node is a grid too
DEPTH = 70.0  # nats below the maximum at which the grid ends: e^{-70} is far below float64 rounding
DOUBLINGS = 40
QUADRATURE = 1e-9  # largest relative disagreement of the two grids
DIFFERENCE = 1e-4  # step of central differences of a score


class Gibbs(Law):
    """The law with density e^{log_density}/Z on R or R², by quadrature.

    Args:
        log_density: (..., d) -> (...), up to a constant.
        dim: d, 1 or 2.
        centre: a point (d numbers or one) near which the law lives: where the search for its support starts.
        scale: its size there, in the units of the state.
        score: its gradient, where it is not to be had from automatic differentiation.

    Raises:
        ValueError: d > 2, a density that does not decay or is not finite, or a grid too coarse for it.

    """

    def __init__(
        self, log_density: Field, dim: int = 1, *, centre: Any = 0.0, scale: float = 1.0, score: Field | None = None
    ) -> None:
        if dim not in NODES:
            raise ValueError(
                f"Gibbs: a density is normalised on a grid in d = 1 or 2 only; got d = {dim}. Give log Z instead "
                "(thermodynamic integration), or use a Law with log_prob."
            )
        self._dim = dim
        self._log_density = log_density
        self._score = score
        middle = torch.as_tensor(centre, dtype=torch.float64).reshape(-1).expand(dim)
        low, high = _support(log_density, middle, float(scale))
        points, cell, values = _grid(log_density, low, high)
        top = values.max()
        mass = torch.exp(values - top)
        self.log_z = float(top + torch.log(mass.sum() * cell))
        _check_grid(mass, dim)
        self._points = points
        self._mass = mass / mass.sum()
        self._cell = cell

    @property
    def dim(self) -> int:
        """Dimension d."""
        return self._dim

    @property
    def mean(self) -> Tensor:
        """(d,)."""
        return self.as_measure().mean()[0]

    @property
    def cov(self) -> Tensor:
        """(d, d)."""
        return self.as_measure().covariance()

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density, (..., d) -> (...), normalised."""
        return self._log_density(x) - self.log_z

    def score(self, x: Tensor) -> Tensor:
        """∇ log density, (..., d) -> (..., d)."""
        return gradient(self._log_density, x) if self._score is None else self._score(x)

    def as_measure(self) -> EmpiricalMeasure:
        """The grid with its masses."""
        return EmpiricalMeasure(self._points, self._mass)

    def table(self) -> tuple[Tensor, Tensor]:
        """Nodes and normalised log density on the line, (n,) each.

        Raises:
            ValueError: d = 2.

        """
        self._check_line("table")
        return self._points[:, 0], torch.log(self._mass) - math.log(self._cell)

    def cdf(self, x: Tensor) -> Tensor:
        """P(X <= x), one dimension only, linear between cells."""
        self._check_line("cdf")
        edges, levels = self._distribution()
        return _interpolated(edges, levels, x)

    def quantile(self, u: Tensor) -> Tensor:
        """Inverse of `cdf`, one dimension only."""
        self._check_line("quantile")
        edges, levels = self._distribution()
        rising = torch.cat([levels.new_ones(1, dtype=torch.bool), torch.diff(levels) > 0])
        return _interpolated(levels[rising], edges[rising], u)

    def from_variates(self, z: Tensor) -> Tensor:
        """The quantile of Φ(z), one dimension only."""
        return self.quantile(torch.special.ndtr(z.double())).to(z.dtype)

    def _distribution(self) -> tuple[Tensor, Tensor]:
        nodes = self._points[:, 0]
        edges = torch.cat([nodes[:1] - self._cell / 2, nodes + self._cell / 2])
        return edges, torch.cat([self._mass.new_zeros(1), self._mass.cumsum(0)])

    def _check_line(self, what: str) -> None:
        if self._dim != 1:
            raise ValueError(f"Gibbs.{what} exists in one dimension only; this law has d = {self._dim}.")


def proximal(scenario: Any, mu: EmpiricalMeasure) -> Gibbs:
    """p_m ∝ exp(-(1/T) δF/δm(m, ·) - U), T = σ²/2: the Gibbs law of the potential that the particles of m feel.

    m* is its fixed point.

    Args:
        scenario: with `energy`, `sigma` and, where the reference is not Lebesgue, `confinement`.
        mu: m, without leading axes.

    Raises:
        TypeError: the scenario has no energy.
        ValueError: as `Gibbs`.

    Source: Szpruch, Mean-field Langevin dynamics, Proposition 4; Nitanda, Wu, Suzuki (2022), Definition 2.

    """
    energy, t = energy_of(scenario), temperature(scenario)

    def log_density(x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        slope = energy.functional_derivative(mu, flat)
        return (-slope / t - confinement(scenario, flat)).reshape(x.shape[:-1])

    def score(x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        slope = energy.intrinsic_derivative(mu, flat)
        return (-slope / t - confinement_gradient(scenario, flat)).reshape(x.shape)

    spread = float(mu.covariance().diagonal().sum() / mu.dim) ** 0.5
    return Gibbs(log_density, mu.dim, centre=mu.mean()[0], scale=spread or 1.0, score=score)


def temperature(scenario: Any) -> float:
    """T = σ²/2.

    Raises:
        TypeError: the scenario declares no constant σ.
        ValueError: σ = 0, where there is no entropy.

    """
    sigma = getattr(scenario, "sigma", None)
    if sigma is None:
        raise TypeError(f"{type(scenario).__name__} has no field sigma; the free energy needs the constant σ.")
    if not float(sigma) > 0:
        raise ValueError(f"sigma = {float(sigma)}: the free energy F + (σ²/2) KL needs σ > 0.")
    return 0.5 * float(sigma) ** 2


def confinement(scenario: Any, x: Tensor) -> Tensor:
    """U(x); zero for a scenario that defines none, whose reference measure is Lebesgue's."""
    potential = getattr(scenario, "confinement", None)
    return x.new_zeros(x.shape[:-1]) if potential is None else potential(x)


def confinement_gradient(scenario: Any, x: Tensor) -> Tensor:
    """∇U(x)."""
    if hasattr(scenario, "confinement_gradient"):
        slope: Tensor = scenario.confinement_gradient(x)
        return slope
    return gradient(lambda y: confinement(scenario, y), x)


def score_of(density: Any, x: Tensor) -> Tensor:
    """∇ log density at x, of a law or of a function."""
    if hasattr(density, "score"):
        slope: Tensor = density.score(x)
        return slope
    return gradient(getattr(density, "log_prob", density), x)


def curvature(density: Any, points: Any) -> float:
    """The smallest eigenvalue of -∇² log density over the points.

    The law is K-log-concave when this holds with K everywhere: on finitely many points it is an upper estimate of K,
    that is, it can refute a K and not prove it.

    Args:
        density: a law with log_prob, or a log density (..., d) -> (...), up to a constant.
        points: (n, d) or, on the line, (n,).

    Raises:
        ValueError: the Hessian is not finite somewhere.

    """
    x = torch.as_tensor(points, dtype=torch.float64)
    x = x[:, None] if x.ndim == 1 else x
    hessian = _differenced(density, x) if hasattr(density, "score") else _automatic(density, x)
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError(
            "curvature: the Hessian of the log density is not finite at some points; keep them inside its support."
        )
    return float(torch.linalg.eigvalsh(-(hessian + hessian.mT) / 2).min())


def _automatic(density: Any, x: Tensor) -> Tensor:
    """∇² log density by automatic differentiation.    (n, d) -> (n, d, d)."""
    function = getattr(density, "log_prob", density)
    with torch.enable_grad():
        at = x.detach().requires_grad_()
        value = function(at).sum()
        if not value.requires_grad:
            return x.new_zeros((*x.shape, x.shape[-1]))
        (slope,) = torch.autograd.grad(value, [at], create_graph=True)
        if not slope.requires_grad:
            return x.new_zeros((*x.shape, x.shape[-1]))
        rows = [
            torch.autograd.grad(slope[:, k].sum(), [at], retain_graph=True, materialize_grads=True, allow_unused=True)
            for k in range(x.shape[-1])
        ]
    return torch.stack([row[0] for row in rows], dim=-2).detach()


def _differenced(density: Any, x: Tensor) -> Tensor:
    """∇² log density by central differences of its score.    (n, d) -> (n, d, d)."""
    step = DIFFERENCE * max(1.0, float(x.std())) if len(x) > 1 else DIFFERENCE
    columns = [
        (density.score(x + step * e) - density.score(x - step * e)) / (2 * step)
        for e in torch.eye(x.shape[-1], dtype=x.dtype)
    ]
    return torch.stack(columns, dim=-1)


def _support(log_density: Field, centre: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """A box outside of which the density is below e^{-DEPTH} of its maximum, as tight as a coarse grid shows."""
    half = 4.0 * scale
    for _ in range(DOUBLINGS):
        points, _, values = _grid(log_density, centre - half, centre + half)
        edge = ((points - centre).abs() >= half * (1 - 1e-9)).any(-1)
        if float(values[edge].max()) < float(values.max()) - DEPTH:
            break
        half *= 2
    else:
        raise ValueError(
            "Gibbs: the density does not decay: it is not integrable, or lives far from `centre`. Check the sign of "
            "log_density, or give centre and scale."
        )
    for _ in range(DOUBLINGS):
        inside = points[values >= values.max() - DEPTH]
        cell = (points[-1] - points[0]) / (NODES[len(centre)] - 1)
        low, high = inside.min(0).values - cell, inside.max(0).values + cell
        shrunk = bool(((high - low) < 0.7 * (points[-1] - points[0])).any())
        points, _, values = _grid(log_density, low, high)
        if not shrunk:
            break
    return low, high


def _grid(log_density: Field, low: Tensor, high: Tensor) -> tuple[Tensor, float, Tensor]:
    """Nodes (n, d), the volume of a cell and the log density there."""
    n = NODES[len(low)]
    unit = torch.linspace(0, 1, n, dtype=torch.float64)
    axes = [a + (b - a) * unit for a, b in zip(low, high, strict=True)]
    points = torch.cartesian_prod(*axes).reshape(-1, len(low))
    with torch.no_grad():
        values = log_density(points)
    if values.shape != points.shape[:-1]:
        raise ValueError(
            f"Gibbs: log_density returned shape {tuple(values.shape)} for points {tuple(points.shape)}; expected "
            f"{tuple(points.shape[:-1])}: sum over the last axis."
        )
    if bool(torch.isnan(values).any()) or float(values.max()) == math.inf:
        raise ValueError("Gibbs: log_density is NaN or +inf somewhere; it must be below infinity everywhere.")
    return points, float(((high - low) / (n - 1)).prod()), values


def _check_grid(mass: Tensor, dim: int) -> None:
    n = NODES[dim]
    table = mass.reshape([n] * dim)
    half = table[(slice(None, None, 2),) * dim].sum() * 2**dim
    error = abs(float(half / table.sum()) - 1)
    # NaN fails the comparison too.
    if not error <= QUADRATURE:
        raise ValueError(
            f"Gibbs: quadrature on {n} and {n // 2 + 1} nodes per axis differs by {error:.1g} (limit {QUADRATURE:g}): "
            "the density has a kink or peaks too narrow for the grid. Smooth it, or treat its peaks apart."
        )


def _interpolated(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
    """Piecewise linear through (x, y), x increasing, constant outside."""
    v = at.double()
    right = torch.searchsorted(x, v.contiguous()).clamp(1, len(x) - 1)
    left = right - 1
    share = ((v - x[left]) / (x[right] - x[left])).clamp(0, 1)
    return (y[left] + share * (y[right] - y[left])).to(at.dtype)
