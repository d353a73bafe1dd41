"""Animations: a cloud and its limit frame by frame, and the file that holds the frames."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import axes, clouds, histograms, limits
from .axes import BLACK, BLUE, VERMILLION
from .clouds import Cloud
from .histograms import BINS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = np.ndarray
Show = Callable[[int], None]  # draws a frame


def record(figure: Figure, show: Show, n_frames: int, path: Path, writer: Any) -> None:
    """Writes the frames under another name, and renames it when all are there."""
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        with writer.saving(figure, str(partial), dpi=100):
            for index in range(n_frames):
                show(index)
                if index == 0:
                    # Laid out once: labels that move from frame to frame would make the axes tremble.
                    figure.draw_without_rendering()
                    figure.set_layout_engine("none")
                writer.grab_frame()
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def writer_for(path: Path, fps: int) -> Any:
    """Of a GIF, or of a page with a player."""
    from matplotlib.animation import HTMLWriter, PillowWriter

    if not fps > 0:
        raise ValueError(f"animate: fps = {fps}; frames per second are positive.")
    if path.suffix == ".gif":
        return PillowWriter(fps=fps)
    if path.suffix == ".html":
        # By default matplotlib drops the frames above 20 MB, with a line in the log.
        return HTMLWriter(fps=fps, embed_frames=True, embed_limit=math.inf, default_mode="loop")
    raise ValueError(f"animate: {path.name!r} ends in {path.suffix!r}; expected .gif or .html.")


def on_a_line(cloud: Cloud, law: Any, ax: Axes) -> Show:
    """A histogram with the limit on top."""
    extremes = [(x.min(), x.max()) for x, _ in map(cloud.at, range(len(cloud.times)))]
    edges = histograms.edges_of(cloud.window(0, np.array(extremes)), BINS)
    heights = [histograms.heights_of(x[:, 0], weight, edges) for x, weight in map(cloud.at, range(len(cloud.times)))]
    top = histograms.top_of(heights)
    drawn = ax.stairs(np.zeros(len(edges) - 1), edges, color=BLUE, fill=True, alpha=0.55, label="particles")
    line = ax.plot([], [], color=BLACK, linestyle="--", linewidth=1.6, label="limit")[0] if law is not None else None
    ax.set(xlim=(edges[0], edges[-1]), ylim=(0, top))
    axes.finish(ax, cloud.title(0), cloud.density_title(), "upper right")

    def show(index: int) -> None:
        drawn.set_data(heights[index])
        if line is not None:
            line.set_data(*histograms.limit_curve(limits.at(law, cloud.times[index]), edges, cloud, top))

    return show


def in_the_plane(cloud: Cloud, law: Any, ax: Axes) -> Show:
    """The particles with level lines of the limit."""
    ends = [(x.min(0), x.max(0)) for x, _ in map(cloud.at, range(len(cloud.times)))]
    windows = [cloud.window(k, np.array(ends)[..., k]) for k in range(2)]
    drawn = ax.scatter([], [], color=BLUE, alpha=0.6, linewidths=0, label="particles", zorder=3)
    if law is not None:
        ax.plot([], [], color=VERMILLION, linewidth=1.4, label="limit")
    ax.set(xlim=windows[0], ylim=windows[1])
    axes.finish(ax, cloud.title(0), cloud.title(1), "upper right")
    levels: list[Any] = []

    def show(index: int) -> None:
        x, weight = cloud.at(index)
        drawn.set_offsets(x)
        drawn.set_sizes(clouds.areas(weight))
        for old in levels:
            old.remove()
        levels[:] = []
        if law is not None:
            levels.append(
                histograms.draw_levels(ax, limits.at(law, cloud.times[index]), cloud, [np.array(w) for w in windows])
            )

    return show
