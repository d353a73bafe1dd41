"""Log Z on lines, planes and their tori: adaptive Gauss-Kronrod cubature of e^f in coordinates that suit its modes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import ndimage, optimize

from .log_density import DROP, LogDensity
from .particles import Lengths

Array = np.ndarray
Integrand = Callable[[Array], Array]

FARTHEST = 230.0  # axes end at e^FARTHEST scales
MOST_CELLS, PARTITIONS = {1: 100_000, 2: 10_000}, 5


def log_constant(
    density: LogDensity, d: int, lengths: Lengths, tolerance: float, starts: Array
) -> tuple[float, float, float]:
    """Log ∫ e^f in d <= 2 and its error, once two partitions agree, and the highest f."""
    ends = np.full(d, math.inf) if lengths is None else np.array(lengths)
    modes, peaks = _modes(density, d, ends, starts)
    peak = float(peaks[0])
    chart = _chart(density, modes[0], peak, np.isfinite(ends))
    near = modes[peaks > peak - DROP]
    low, high = _domain(density, chart, near, peak, ends)

    def integrand(u: Array) -> Array:
        x, jacobian = chart.points(u)
        values = density(x)
        if np.isnan(values).any() or (values == math.inf).any():
            raise ValueError(
                f"normalise: log_density is not a number, or infinite, near x = {x[~(values < math.inf)][0]}."
            )
        found: Array = np.exp(values - peak + jacobian)
        return found

    widths = np.array([min(_width(density, x, e, v) for e in chart.axes.T) for x, v in zip(near, peaks, strict=False)])
    marks = chart.inverse(near)
    stretch = np.where(chart.circle, 1.0, chart.scale * np.cosh(marks * ~chart.circle)).max(-1)
    total, error = _agreed(integrand, low, high, chart.circle, marks, widths / stretch, 0.1 * tolerance)
    return peak + math.log(total), error / total, peak


def _agreed(
    integrand: Integrand, low: Array, high: Array, circle: Array, marks: Array, widths: Array, tolerance: float
) -> tuple[float, float]:
    """The integral once two partitions agree: Gauss and Kronrod both miss a jump beside the edge of a cell."""
    before, apart = math.inf, math.inf
    for attempt in range(1, PARTITIONS + 1):
        shift = 0.137 * attempt * np.where(circle, 0.01 * (high - low), 1.0)
        finer = 1.0 + 0.3 * attempt
        total, error = _cubature(integrand, low - shift, high - shift * circle, marks, widths, finer, tolerance)
        apart, before = abs(total - before), total
        if apart <= 10 * tolerance * total or error > 10 * tolerance * total:
            break
    return total, max(error, apart if math.isfinite(apart) else 0.0)


@dataclass(frozen=True)
class _Chart:
    """x = c + B (s sinh u) on lines, x = u on circles."""

    centre: Array
    axes: Array
    scale: Array
    circle: Array

    def points(self, u: Array) -> tuple[Array, Array]:
        """x(u) and log |dx/du|.    (..., d) -> (..., d), (...)."""
        far = self.centre + (self.scale * np.sinh(np.where(self.circle, 0.0, u))) @ self.axes.T
        jacobian = np.where(self.circle, 0.0, np.log(self.scale) + np.log(np.cosh(u * ~self.circle)))
        return np.where(self.circle, u, far), jacobian.sum(-1)

    def inverse(self, x: Array) -> Array:
        return np.where(self.circle, x, np.arcsinh((x - self.centre) @ self.axes / self.scale))


def _modes(density: LogDensity, d: int, ends: Array, starts: Array) -> tuple[Array, Array]:
    """Local maxima, highest first, from a grid that is fine near 0 and reaches 1e6 and from starts, each refined."""
    fine = 1e-3 * np.sinh(np.linspace(-1, 1, 4001 if d == 1 else 241) * math.asinh(1e9))
    axes = [fine if math.isinf(end) else np.linspace(0, end, 513 if d == 1 else 129)[:-1] for end in ends]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    values = np.where(np.isnan(v := density(grid)), -math.inf, v)
    if not (values > -math.inf).any() or (values == math.inf).any():
        raise ValueError("normalise: log_density is infinite, or nowhere finite, on a grid around 0; check its sign.")
    tops = np.argwhere((values == ndimage.maximum_filter(values, 3, mode="nearest")) & (values > -math.inf))
    tops = tops[np.argsort(-values[tuple(tops.T)])][:12]
    steps = [np.gradient(axis) for axis in axes]
    sources = [(grid[tuple(top)], np.array([step[i] for step, i in zip(steps, top, strict=True)])) for top in tops]
    # A start lies on its mode: a first step of the grid's would leave it.
    reduced = np.where(np.isfinite(ends), np.mod(starts, np.where(np.isfinite(ends), ends, 1.0)), starts)
    sources += [(start, np.full(d, _reach(density, start))) for start in reduced]
    found = []
    for start, size in sources:
        simplex = np.vstack([start, start + np.diag(size)])
        best = optimize.minimize(
            lambda z: -float(np.nan_to_num(density(z), nan=-math.inf)),
            start,
            method="Nelder-Mead",
            options={"initial_simplex": simplex, "xatol": 1e-7 * float(size.max()), "fatol": 1e-9, "maxiter": 400},
        )
        found.append((float(-best.fun), best.x))
    found.sort(key=lambda item: -item[0])
    return np.array([x for _, x in found]), np.array([value for value, _ in found])


def _reach(density: LogDensity, start: Array) -> float:
    """The distance at which f has changed by 1 along an axis."""
    radii = np.geomspace(1e-12, 1e6, 181)[:, None]
    at = float(density(start))
    moved = np.array(
        [np.nan_to_num(density(start + s * radii * e), nan=-math.inf) for e in np.eye(len(start)) for s in (-1, 1)]
    )
    changed = (np.abs(moved - at) > 1).any(0)
    return float(radii[np.argmax(changed), 0]) if changed.any() else 1.0


def _chart(density: LogDensity, mode: Array, peak: float, circle: Array) -> _Chart:
    d = len(mode)
    axes = np.eye(d)
    if d == 2 and not circle.any():
        width = [_width(density, mode, e, peak) for e in axes]
        axes = np.linalg.eigh(_curvature(density, mode, 0.1 * min(width)))[1]
    scale = np.array([1.0 if circle[k] else _width(density, mode, axes[:, k], peak) for k in range(d)])
    return _Chart(mode, axes, scale, circle)


def _width(density: LogDensity, mode: Array, direction: Array, peak: float) -> float:
    """Distance along a line through the mode at which e^f has fallen by e on both sides."""
    radii = np.geomspace(1e-12, 1e100, 1121)[:, None] * max(1.0, float(np.abs(mode).max()) * 1e-3)
    sides = [density(mode + sign * radii * direction) for sign in (-1, 1)]
    high = np.logical_or(*[np.nan_to_num(side, nan=-math.inf) > peak - 1 for side in sides])
    if high.all():
        raise ValueError(f"normalise: e^f does not decay from {mode} along {direction}: it is not integrable.")
    return float(radii[np.argmin(high), 0])


def _curvature(density: LogDensity, mode: Array, step: float) -> Array:
    """-∇²f by differences; the identity where the mode is not smooth."""
    offsets = step * np.array([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1], [1, 1], [-1, -1], [1, -1], [-1, 1]])
    f = density(mode + offsets)
    if not np.isfinite(f).all():
        return np.eye(2)
    cross = f[5] + f[6] - f[7] - f[8]
    return -np.array([[f[1] + f[2] - 2 * f[0], cross / 4], [cross / 4, f[3] + f[4] - 2 * f[0]]]) / step**2


def _domain(density: LogDensity, chart: _Chart, modes: Array, peak: float, ends: Array) -> tuple[Array, Array]:
    """A box in u outside of which the integrand is below e^-DROP of the peak."""
    inside = chart.inverse(modes)
    low = np.where(chart.circle, 0.0, inside.min(0) - 1.0)
    high = np.where(chart.circle, ends, inside.max(0) + 1.0)
    floor = peak + float(np.log(chart.scale).sum()) - DROP
    growing = True
    while growing:
        growing = False
        for k in np.flatnonzero(~chart.circle):
            for edge, step in ((low, -0.5), (high, 0.5)):
                while _highest_on_face(density, chart, low, high, int(k), edge[k]) > floor:
                    edge[k] += step
                    growing = True
                    if abs(edge[k]) > FARTHEST:
                        raise ValueError(
                            f"normalise: e^f decays too slowly along {chart.axes[:, k]} to be integrated, if it is "
                            "integrable at all."
                        )
    return low, high


def _highest_on_face(density: LogDensity, chart: _Chart, low: Array, high: Array, k: int, at: float) -> float:
    u = np.linspace(low, high, 129) if len(low) > 1 else low[None].copy()
    u[:, k] = at
    x, jacobian = chart.points(u)
    values = np.nan_to_num(density(x), nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    return float((values + jacobian).max())


def _cubature(
    integrand: Integrand, low: Array, high: Array, marks: Array, widths: Array, finer: float, tolerance: float
) -> tuple[float, float]:
    """∫ over a box by 15-point Kronrod products, cells halved in every direction until their errors sum to little.

    Cells that hold a mode start no larger than its width, so that no peak falls between the nodes.
    """
    d = len(low)
    counts = np.ceil(finer * np.maximum(4, (high - low) / (0.5 if d == 1 else 1.0))).astype(int)
    edges = [np.linspace(low[k], high[k], counts[k] + 1) for k in range(d)]
    centres = np.stack(np.meshgrid(*[(e[1:] + e[:-1]) / 2 for e in edges], indexing="ij"), -1).reshape(-1, d)
    halves = np.broadcast_to((high - low) / counts / 2, centres.shape)
    for mark, width in zip(marks, widths, strict=True):
        while (wide := (np.abs(centres - mark) <= halves + 2 * width).all(1) & (halves > 2 * width).any(1)).any():
            (parts, sizes), kept = _split(centres[wide], halves[wide]), ~wide
            centres, halves = np.concatenate([centres[kept], parts]), np.concatenate([halves[kept], sizes])
    done, done_error, seen = 0.0, 0.0, 0
    while True:
        values, errors = _kronrod(integrand, centres, halves)
        seen += len(centres)
        total, error = done + float(values.sum()), done_error + float(errors.sum())
        if not total > 0:
            raise ValueError(
                "normalise: e^f integrates to 0 around its mode: the mode is not seen at double precision."
            )
        if error <= tolerance * total or seen > MOST_CELLS[d]:
            return total, max(error, 1e-15 * total)
        coarse = errors > tolerance * total / (4 * len(errors))
        done, done_error = done + float(values[~coarse].sum()), done_error + float(errors[~coarse].sum())
        centres, halves = _split(centres[coarse], halves[coarse])


def _split(centres: Array, halves: Array) -> tuple[Array, Array]:
    """Every cell halved in every direction."""
    d = centres.shape[1]
    signs = np.stack(np.meshgrid(*[[-0.5, 0.5]] * d, indexing="ij"), -1).reshape(-1, d)
    return (centres[:, None] + signs * halves[:, None]).reshape(-1, d), np.repeat(halves / 2, len(signs), axis=0)


def _kronrod(integrand: Integrand, centres: Array, halves: Array) -> tuple[Array, Array]:
    """Product rules on every cell and |Kronrod - Gauss|.    (C, d), (C, d) -> (C,), (C,)."""
    d = centres.shape[1]
    nodes = np.stack(np.meshgrid(*[_NODES] * d, indexing="ij"), -1).reshape(-1, d)
    fine, rough = _KRONROD, _GAUSS
    for _ in range(d - 1):
        fine, rough = np.multiply.outer(fine, _KRONROD), np.multiply.outer(rough, _GAUSS)
    values = integrand(centres[:, None] + halves[:, None] * nodes) * halves.prod(1)[:, None]
    return values @ fine.ravel(), np.abs(values @ (fine - rough).ravel())


# The (7, 15) pair of Gauss and Kronrod: QUADPACK's qk15.
_HALF_NODES = (
    *(0.991455371120812639206854697526329, 0.949107912342758524526189684047851, 0.864864423359769072789712788640926),
    *(0.741531185599394439863864773280788, 0.586087235467691130294144691693013, 0.405845151377397166906606412076961),
    *(0.207784955007898467600689403773245, 0.0),
)
_HALF_KRONROD = (
    *(0.022935322010529224963732008058970, 0.063092092629978553290700663189204, 0.104790010322250183839876322541518),
    *(0.140653259715525918745189590510238, 0.169004726639267902826583426598550, 0.190350578064785409913256402421014),
    *(0.204432940075298892414161999234649, 0.209482141084727828012999174891714),
)
_HALF_GAUSS = (
    *(0.0, 0.129484966168869693270611432679082, 0.0, 0.279705391489276667901467771423780, 0.0),
    *(0.381830050505118944950369775488975, 0.0, 0.417959183673469387755102040816327),
)
_NODES = np.array([*(-x for x in _HALF_NODES[:-1]), 0.0, *_HALF_NODES[-2::-1]])
_KRONROD = np.array([*_HALF_KRONROD, *_HALF_KRONROD[-2::-1]])
_GAUSS = np.array([*_HALF_GAUSS, *_HALF_GAUSS[-2::-1]])
