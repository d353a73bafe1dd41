"""Laws known by an unnormalised density: the Gibbs laws of mean-field Langevin dynamics, and their curvature.

The density is tabulated once on a grid on which the trapezoidal rule, spectrally accurate for smooth densities that
decay, agrees with itself on every second node. That restricts the law to d <= 2. The grid covers the modes that a
search over many scales finds; one that is narrow at its distance, and that nothing slopes towards, can be missed.
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
from mfsde.model import confinement, confinement_gradient, energy_of, temperature

Field = Callable[[Tensor], Tensor]

NODES = {1: 2049, 2: 385}  # per axis, odd: every second node is a grid too
DEPTH = 70.0  # nats below the maximum at which the grid ends: e^{-70} is far below float64 rounding
DOUBLINGS = 40
REACH, CORE = 1e6, 0.1  # of the search for modes, in units of the scale: how far, and where its nodes become even
SEARCH = {1: 2049, 2: 129}  # its nodes per axis
MOST_MODES = 32
ZOOMS, ZOOM_NODES = 40, 2  # steps of a mode's refinement, and nodes on each side of it
NARROW = 2.0  # nats: a mode that stands higher above the nodes beside it is not resolved
SIGNIFICANT = 30.0  # nats below the top at which a mode still has to be resolved
QUADRATURE = 1e-9  # largest relative disagreement of the two grids
QUANTILES = [0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98]  # of the particles, where modes of p_m are sought too
DIFFERENCE = 1e-4  # step of central differences of a score


class Gibbs(Law):
    """The law with density e^{log_density}/Z on R or R², by quadrature.

    Args:
        log_density: (..., d) -> (...), up to a constant.
        dim: d, 1 or 2.
        centre: a point (d numbers or one) near which the law lives: where the search for its support starts.
        scale: its size there, in the units of the state.
        score: its gradient, where it is not to be had from automatic differentiation.
        starts: points (n, d) or (n,) from which further modes are sought.

    Raises:
        ValueError: d > 2, a density that does not decay or is not finite, or a grid too coarse for it.

    """

    def __init__(
        self,
        log_density: Field,
        dim: int = 1,
        *,
        centre: Any = 0.0,
        scale: float = 1.0,
        score: Field | None = None,
        starts: Any = None,
    ) -> None:
        if dim not in NODES:
            raise ValueError(
                f"Gibbs: a density is normalised on a grid in d = 1 or 2 only; got d = {dim}. Use a Law with "
                "a known log_prob; entropy_sandwich takes log_z= (thermodynamic integration)."
            )
        self._dim = dim
        self._log_density = log_density
        self._score = score
        middle = torch.as_tensor(centre, dtype=torch.float64).reshape(-1).expand(dim)
        modes, heights = _modes(log_density, middle, float(scale), starts)
        low, high = _support(log_density, middle, float(scale), modes, heights)
        points, cell, values = _grid(log_density, low, high)
        _check_resolved(low, high, values, modes, heights)
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
    return Gibbs(log_density, mu.dim, centre=mu.mean()[0], scale=spread or 1.0, score=score, starts=_quantiles(mu))


def _quantiles(mu: EmpiricalMeasure) -> Tensor:
    """Points of m that are spread over it: its quantiles along each axis.    (n, d)."""
    order = mu.points.argsort(0)
    levels = mu.weights[order].cumsum(0).contiguous()
    found = torch.searchsorted(levels.T.contiguous(), levels.new_tensor(QUANTILES).repeat(mu.dim, 1))
    return torch.cat([mu.points[order[found[k].clamp(max=len(order) - 1), k]] for k in range(mu.dim)])


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


def _modes(log_density: Field, centre: Tensor, scale: float, starts: Any) -> tuple[Tensor, Tensor]:
    """Local maxima (n, d) within DEPTH of the highest, and their heights: from nodes on many scales, refined."""
    d = len(centre)
    unit = torch.linspace(-1, 1, SEARCH[d], dtype=torch.float64) * math.asinh(REACH / CORE)
    offsets = CORE * scale * torch.sinh(unit)
    points = torch.cartesian_prod(*[c + offsets for c in centre]).reshape([SEARCH[d]] * d + [d])
    values = _bounded(log_density, points)
    pool = torch.nn.functional.max_pool1d if d == 1 else torch.nn.functional.max_pool2d
    top = (values == pool(values[None, None], 3, 1, 1)[0, 0]) & (values > -math.inf)
    found, order = points[top], values[top].argsort(descending=True)[:MOST_MODES]
    radius = CORE * scale + (found[order] - centre).norm(dim=-1) * float(unit[1] - unit[0])
    found = found[order]
    if starts is not None:
        more = torch.as_tensor(starts, dtype=torch.float64).reshape(-1, d)
        found, radius = torch.cat([found, more]), torch.cat([radius, radius.new_full((len(more),), CORE * scale)])
    found, heights = _refined(log_density, found, radius)
    kept = heights > (heights.max() if len(heights) else 0.0) - DEPTH
    return found[kept], heights[kept]


def _refined(log_density: Field, points: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Uphill from each point: to the best of the nodes around it, which draw together once it is the middle one."""
    d = points.shape[-1]
    steps = torch.linspace(-1, 1, 2 * ZOOM_NODES + 1, dtype=torch.float64)
    stencil = torch.cartesian_prod(*[steps] * d).reshape(-1, d)
    # The middle first: on a plateau it stays.
    stencil = stencil[stencil.norm(dim=-1).argsort()]
    values = points.new_zeros(len(points))
    for _ in range(ZOOMS):
        around = points[:, None] + radius[:, None, None] * stencil
        values, best = _bounded(log_density, around).max(-1)
        points = around[torch.arange(len(points)), best]
        radius = torch.where(stencil[best].abs().amax(-1) < 1, 0.5 * radius, radius)
    return points, values


def _bounded(log_density: Field, points: Tensor) -> Tensor:
    """The log density, -inf where it is no number: a search goes to places where arithmetic ends."""
    with torch.no_grad():
        values = log_density(points.reshape(-1, points.shape[-1]))
    _check_shape(values, points.reshape(-1, points.shape[-1]))
    return values.reshape(points.shape[:-1]).nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)


def _check_resolved(low: Tensor, high: Tensor, values: Tensor, modes: Tensor, heights: Tensor) -> None:
    """Refuses modes that fall between the nodes."""
    if not len(modes):
        return
    n = NODES[len(low)]
    nearest = ((modes - low) / (high - low) * (n - 1)).round().long().clamp(0, n - 1)
    flat = nearest[:, 0] if len(low) == 1 else nearest[:, 0] * n + nearest[:, 1]
    missed = (heights - values[flat] > NARROW) & (heights > heights.max() - SIGNIFICANT)
    if bool(missed.any()):
        raise ValueError(
            f"Gibbs: the peak at {modes[missed][0].tolist()} falls between the {n} nodes per axis on "
            f"[{low.tolist()}, {high.tolist()}]. Smooth it, or treat its peaks apart."
        )


def _support(log_density: Field, centre: Tensor, scale: float, modes: Tensor, heights: Tensor) -> tuple[Tensor, Tensor]:
    """A box with all modes, outside of which the density is below e^{-DEPTH} of its maximum."""
    inside = torch.cat([modes, centre[None]])
    peak = float(heights.max()) if len(heights) else -math.inf
    middle = (inside.min(0).values + inside.max(0).values) / 2
    reach = 4.0 * scale + float((inside - middle).abs().max())
    for _ in range(DOUBLINGS):
        points, _, values = _grid(log_density, middle - reach, middle + reach)
        edge = ((points - middle).abs() >= reach * (1 - 1e-9)).any(-1)
        if float(values[edge].max()) < max(peak, float(values.max())) - DEPTH:
            break
        reach *= 2
    else:
        raise ValueError(
            "Gibbs: the density does not decay: it is not integrable, or lives far from `centre`. Check the sign of "
            "log_density, or give centre and scale."
        )
    peak = max(peak, float(values.max()))
    for _ in range(DOUBLINGS):
        inside = torch.cat([points[values >= peak - DEPTH], modes])
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
    _check_shape(values, points)
    if bool(torch.isnan(values).any()) or float(values.max()) == math.inf:
        raise ValueError("Gibbs: log_density is NaN or +inf somewhere; it must be below infinity everywhere.")
    return points, float(((high - low) / (n - 1)).prod()), values


def _check_shape(values: Tensor, points: Tensor) -> None:
    if values.shape != points.shape[:-1]:
        raise ValueError(
            f"Gibbs: log_density returned shape {tuple(values.shape)} for points {tuple(points.shape)}; expected "
            f"{tuple(points.shape[:-1])}: sum over the last axis."
        )


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
