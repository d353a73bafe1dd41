"""Histograms of particles with the limit on top: several times on a line, or one in the plane."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from mfsde.measure import Law

from . import axes, clouds, limits
from .axes import BLACK, BLUE, LARGEST_LEGEND, VERMILLION
from .clouds import Cloud

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 40
NODES = 400  # of a smooth curve
DRAWN = 4000  # particles of a cloud
OUTSIDE = 1e-3  # share of the particles beyond either end of a row of laws

Array = np.ndarray


def on_a_line(cloud: Cloud, law: Any, times: Any, ax: Axes, bins: int | Array) -> Axes:
    """Histograms at several times on top of each other, and the limit at each of them."""
    indices = clouds.indices_of(cloud.times, times)
    frames = [cloud.at(index) for index in indices]
    edges = edges_of(cloud.window(0, *(x for x, _ in frames)), bins)
    heights = [heights_of(x[:, 0], weight, edges) for x, weight in frames]
    top = top_of(heights)
    colours = axes.shades(len(indices))
    entries = len(indices) <= LARGEST_LEGEND
    for h, index, colour in zip(heights, indices, colours, strict=True):
        # More than a few filled shapes on top of each other are one shape.
        if entries:
            ax.stairs(h, edges, color=colour, fill=True, alpha=0.3, linewidth=0)
        label = f"t = {cloud.times[index]:.4g}" if entries else None
        ax.stairs(h, edges, color=colour, linewidth=1.2, label=label, gid="histogram")
    if law is not None:
        # A law that does not move is drawn once.
        curves = [
            limit_curve(limits.at(law, cloud.times[index]), edges, cloud, top)
            for index in (indices[-1:] if isinstance(law, Law) else indices)
        ]
        top = max(top, min(1.15 * max(float(y.max()) for _, y in curves), 3 * top))
        for k, (x, y) in enumerate(curves):
            label = None if k else "limit"
            ax.plot(x, y, color=BLACK, linestyle="--", linewidth=1.3, label=label, gid="limit")
    if not entries:
        axes.colour_bar(ax, cloud.times[indices], axes.title(cloud.position["time"]))
    ax.set(xlim=(edges[0], edges[-1]), ylim=(0, top))
    return axes.finish(ax, cloud.title(0), cloud.density_title(), "best")


def limit_curve(law: Law | xr.DataArray, edges: Array, cloud: Cloud, top: float) -> tuple[Array, Array]:
    """A density on the line, or a vertical line at a point mass."""
    atom = limits.atom(law)
    if atom is not None:
        return cloud.wrap(np.repeat(atom[:1], 2), 0), np.array([0.0, top])
    nodes = np.linspace(edges[0], edges[-1], NODES)
    return nodes, limits.density(law, nodes[:, None], cloud.lengths)


def in_the_plane(cloud: Cloud, law: Any, times: Any, ax: Axes, bins: int | Array) -> Axes:
    """A histogram of squares at one time, and level lines of the limit."""
    indices = clouds.indices_of(cloud.times, times) if times is not None else [len(cloud.times) - 1]
    if len(indices) != 1 or not isinstance(bins, (int, np.integer)):
        raise ValueError(
            f"in two dimensions density draws one time ({len(indices)} were asked for) and bins is a number; draw "
            "several times on several Axes."
        )
    x, weight = cloud.at(indices[0])
    sides = [np.linspace(*cloud.window(k, x[:, k]), int(bins) + 1) for k in range(2)]
    mass = np.histogram2d(x[:, 0], x[:, 1], sides, weights=weight)[0]
    drawn = ax.pcolormesh(*sides, (mass / np.outer(*map(np.diff, sides))).T, cmap="Blues", rasterized=True)
    ax.figure.colorbar(drawn, ax=ax, label=cloud.density_title())
    if law is not None:
        draw_levels(ax, limits.at(law, cloud.times[indices[0]]), cloud, sides)
        ax.plot([], [], color=VERMILLION, linewidth=1.4, label="limit")
    ax.set_title(f"t = {cloud.times[indices[0]]:g}", fontsize=9)
    return axes.finish(ax, cloud.title(0), cloud.title(1), "best")


def carrying(cloud: Cloud, component: int, frames: Sequence[tuple[Array, Array]]) -> tuple[float, float]:
    """A window that holds all but 0.1 % of the particles at either side, at every time."""
    return cloud.window(component, *(np.quantile(x[:, component], [OUTSIDE, 1 - OUTSIDE]) for x, _ in frames))


def row_on_a_line(cloud: Cloud, law: Any, indices: Sequence[int], row: Sequence[Axes], bins: int | Array) -> None:
    """One histogram for each time, the limit on top, on a common abscissa."""
    frames = [cloud.at(index) for index in indices]
    edges = edges_of(carrying(cloud, 0, frames), bins)
    for ax, index, (x, weight) in zip(row, indices, frames, strict=True):
        heights = heights_of(x[:, 0], weight, edges)
        ax.stairs(heights, edges, color=BLUE, fill=True, alpha=0.45, linewidth=0, label="particles", gid="histogram")
        top = 1.15 * float(heights.max())
        nodes, values = limit_curve(limits.at(law, cloud.times[index]), edges, cloud, top)
        ax.plot(nodes, values, color=BLACK, linestyle="--", linewidth=1.3, label="limit", gid="limit")
        # A limit that is far higher than the particles does not flatten them.
        ax.set(xlim=(edges[0], edges[-1]), ylim=(0, max(top, min(1.05 * float(values.max()), 3 * top))))
        axes.finish(ax, cloud.title(0), cloud.density_title() if ax is row[0] else "", None)


def row_in_the_plane(cloud: Cloud, law: Any, indices: Sequence[int], row: Sequence[Axes]) -> None:
    """A cloud of the first particles for each time, level lines of the limit on top, on common axes."""
    frames = [cloud.at(index) for index in indices]
    windows = [carrying(cloud, k, frames) for k in range(2)]
    for ax, index, (x, weight) in zip(row, indices, frames, strict=True):
        n = len(x)
        # Particles of all replicas: they follow one another in the pool.
        chosen = np.linspace(0, n - 1, min(n, DRAWN)).astype(int)
        sizes = np.clip(2 * DRAWN / n, 3, 12) * weight[chosen] / weight.mean()
        told = "particles" if len(chosen) == n else f"{len(chosen)} particles"
        style: dict[str, Any] = {"color": BLUE, "alpha": 0.45, "linewidths": 0, "rasterized": True}
        ax.scatter(x[chosen, 0], x[chosen, 1], s=sizes, label=told, gid="particles", **style)
        draw_levels(ax, limits.at(law, cloud.times[index]), cloud, [np.array(window) for window in windows])
        ax.plot([], [], color=VERMILLION, linewidth=1.4, label="limit")
        ax.set(xlim=windows[0], ylim=windows[1])
        axes.finish(ax, cloud.title(0), cloud.title(1) if ax is row[0] else "", None)


def draw_levels(ax: Axes, law: Law | xr.DataArray, cloud: Cloud, sides: Sequence[Array]) -> Any:
    """Level lines at 10, 30, ..., 90 % of the highest density; a cross for a point mass."""
    atom = limits.atom(law)
    if atom is not None:
        return ax.plot(*atom[:, None], marker="x", markersize=9, color=VERMILLION, gid="limit")[0]
    across, up = np.meshgrid(*(np.linspace(side[0], side[-1], 80) for side in sides))
    values = limits.density(law, np.stack([across.ravel(), up.ravel()], -1), cloud.lengths).reshape(across.shape)
    levels = values.max() * np.array([0.1, 0.3, 0.5, 0.7, 0.9])
    drawn = ax.contour(across, up, values, levels=levels, colors=VERMILLION, linewidths=1.4)
    drawn.set_gid("limit")
    return drawn


def edges_of(window: tuple[float, float], bins: int | Array) -> Array:
    """Of a number of bins in a window, or as they were given."""
    if isinstance(bins, (int, np.integer)):
        return np.linspace(*window, int(bins) + 1)
    edges = np.asarray(bins, dtype=float)
    if edges.ndim != 1 or len(edges) < 2 or not (np.diff(edges) > 0).all():
        raise ValueError("bins are a number, or edges in increasing order.")
    return edges


def heights_of(x: Array, weight: Array, edges: Array) -> Array:
    """Histogram density of all mass, what lies outside the edges included in the total."""
    return np.histogram(x, edges, weights=weight)[0] / np.diff(edges)


def top_of(heights: Sequence[Array]) -> float:
    """A height that shows the laws: a frame that is nearly a point mass does not flatten the others."""
    peaks = np.array([float(h.max()) for h in heights])
    return 1.15 * float(min(peaks.max(), 3 * np.median(peaks)))
