"""Axes of a picture: labels with units, colours and styles, log ranges and ticks, legends.

Colours are Okabe and Ito's, and lines differ in style as well. Nothing global changes: no rcParams, no backend, and
matplotlib is imported at the first picture.
"""

from __future__ import annotations

import math
import re
import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, GREY, BLACK = "#E69F00", "#56B4E9", "#777777", "#000000"
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
STYLES = ("-", "--", "-.", ":", (0, (6, 1)), (0, (3, 1, 1, 1)))

LARGEST_LEGEND = 6  # times with an entry each; more get a colour bar
SMALL = 7.5  # points, legends
LABEL_WIDTH, ENTRY_WIDTH = 36, 36  # characters per line, for axes of 3 inches

Array = np.ndarray
Colour = str | tuple[float, ...]


def given(ax: Axes | None) -> Axes:
    """The Axes that were given, else the current ones."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    current: Axes = plt.gca()
    return current


def is_dimensionless(units: str | None) -> bool:
    """Whether a label needs no units."""
    return units in (None, "", "1")


def with_units(name: str, units: str | None) -> str:
    """A label: name [units], broken into lines."""
    return typeset(name if is_dimensionless(units) else f"{name} [{units}]", LABEL_WIDTH)


def typeset(text: str, width: int) -> str:
    """Lines of at most `width` characters, with the exponents of X^{i,N} and e^-U raised and X̄ barred."""
    lines = textwrap.fill(text, width, break_on_hyphens=False, break_long_words=False)
    if "$" in lines:
        return lines
    raised = re.sub(r"\^(?:\{([^{}]*)\}|(-?\w+))", r"$^{\1\2}$", lines)
    return re.sub("(\\w)\N{COMBINING MACRON}", r"$\\mathrm{\\bar{\1}}$", raised)


def name_of(values: xr.DataArray) -> str:
    """The long name, else the name."""
    return str(values.attrs.get("long_name") or values.name or "value")


def title(values: xr.DataArray) -> str:
    """The label of an axis that shows these values."""
    return with_units(name_of(values), values.attrs.get("units"))


def count(ax: Axes) -> int:
    """Number of means on these Axes."""
    return sum(line.get_gid() == "mean" for line in ax.lines)


def next_style(ax: Axes) -> dict[str, Any]:
    """Colour and line style of the next mean on these Axes."""
    k = count(ax)
    return {"color": COLOURS[k % len(COLOURS)], "linestyle": STYLES[k % len(STYLES)]}


def shades(n: int) -> list[Colour]:
    """Dark to light along a map whose lightness is monotone, without its palest part."""
    from matplotlib import colormaps

    return [tuple(map(float, colormaps["viridis"](s))) for s in np.linspace(0, 0.85, n)]


def colour_bar(ax: Axes, times: Array, title: str) -> None:
    """The shades of many times, in the place of a legend."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    halves = (times[1:] + times[:-1]) / 2
    edges = np.concatenate([[2 * times[0] - halves[0]], halves, [2 * times[-1] - halves[-1]]])
    drawn = ScalarMappable(BoundaryNorm(edges, len(times)), ListedColormap(shades(len(times))))
    bar = ax.figure.colorbar(drawn, ax=ax, label=title, spacing="proportional", format="%g")
    bar.set_ticks(list(times[:: math.ceil(len(times) / LARGEST_LEGEND)]))
    bar.minorticks_off()


def log_range(ax: Axes, low: float, high: float, earlier: tuple[float, float] | None = None) -> None:
    """Shows [low, high] with a margin, and the range that earlier curves on these Axes needed."""
    margin = max(1.15, (high / low) ** 0.06)
    shown = earlier or (low, high)
    ax.set_ylim(min(low / margin, shown[0]), max(high * margin, shown[1]))


def earlier_range(ax: Axes) -> tuple[float, float] | None:
    """The range of a log axis that already shows a curve."""
    return ax.get_ylim() if ax.get_yscale() == "log" and count(ax) else None


def log_ticks(axis: Any, values: Array | None = None) -> None:
    """Ticks that can be read: the values themselves where they are few, 1-2-5 on a short range, else decades."""
    from matplotlib import ticker

    low, high = sorted(axis.get_view_interval())
    decades = math.log10(high / low)
    plain = low >= 1e-3 and high < 1e5
    axis.set_minor_formatter(ticker.NullFormatter())
    axis.set_major_formatter(ticker.FuncFormatter(lambda z, _: f"{z:g}" if plain else _scientific(z)))
    few = values is not None and plain and _spaced(values, decades)
    if few or decades < 0.7:
        axis.set_major_locator(ticker.FixedLocator(list(values)) if few else ticker.MaxNLocator(5))  # type: ignore[arg-type]
        axis.set_minor_locator(ticker.NullLocator())
    elif decades < 2.5:
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))


def _scientific(z: float) -> str:
    power = math.floor(math.log10(z) + 1e-9) if z > 0 else 0
    mantissa = f"{z / 10.0**power:.3g}"
    return f"10$^{{{power}}}$" if mantissa == "1" else f"{mantissa}·10$^{{{power}}}$"


def _spaced(values: Array, decades: float) -> bool:
    gaps = np.diff(np.log10(np.unique(values)))
    return len(gaps) > 0 and float(gaps.min()) > 0.11 * decades


def legend_style(location: str) -> dict[str, Any]:
    """Small, over what it covers, without a frame."""
    return {"loc": location, "fontsize": SMALL, "framealpha": 0.8, "edgecolor": "none", "borderaxespad": 0.3}


def finish(ax: Axes, across: str, up: str, legend: str | None) -> Axes:
    """Labels, no spines on two sides, and a legend at a location where there are entries."""
    ax.set(xlabel=across, ylabel=up)
    ax.spines[["top", "right"]].set_visible(False)
    if legend is not None and ax.get_legend_handles_labels()[0]:
        ax.legend(**legend_style(legend))
    return ax
