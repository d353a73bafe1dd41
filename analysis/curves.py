"""Curves over replicas: a mean with two standard errors on either side, its floor and its fit, drawn."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from . import axes, particles, replicas
from .axes import BLACK, BLUE, ENTRY_WIDTH, GREEN, GREY, SMALL, VERMILLION, Colour
from .rates import Rate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STANDARD_ERRORS = 2
BAND = f"±\N{NO-BREAK SPACE}{STANDARD_ERRORS}\N{NO-BREAK SPACE}s.e."
MARKED = 60  # points up to which each gets a marker

Array = np.ndarray


@dataclass(frozen=True)
class Curve:
    """A mean over replicas, and its standard error where there is one."""

    x: Array
    mean: Array
    error: Array | None
    told: str

    @property
    def edges(self) -> tuple[Array, Array]:
        """Mean ∓ 2 standard errors."""
        half = np.zeros_like(self.mean) if self.error is None else STANDARD_ERRORS * self.error
        return self.mean - half, self.mean + half


def of_replicas(values: xr.DataArray, over: str, what: str) -> Curve:
    """The mean over replicas, or seeds, along a dimension; refused where it is empty or not finite."""
    if not isinstance(values, xr.DataArray):
        raise TypeError(f"{what}: got a {type(values).__name__}; expected a DataArray over {over!r} and 'replica'.")
    # A sweep over seeds makes replicas, too.
    sample = "seed" if "seed" in values.dims else "replica"
    if over not in values.coords or over not in values.dims or not set(values.dims) <= {over, sample}:
        raise ValueError(
            f"{what}: the dimensions are {values.dims} and the coordinates {tuple(map(str, values.coords))}; expected "
            f"{over!r}, with its coordinate, and perhaps 'replica'. Select along the others: .isel(component=0)."
        )
    if values.size == 0:
        raise ValueError(f"{what}: nothing to draw, the sizes are {dict(values.sizes)}. Check the selection.")
    values = values.sortby(over).compute()
    particles.check_finite(values.values, what)
    x = values[over].values.astype(float)
    particles.check_finite(x, f"{what}, {over}")
    r = values.sizes.get(sample, 0)
    if r > 1:
        mean = replicas.mean_and_error(values.astype(float), sample)
        told = f"{BAND} of\N{NO-BREAK SPACE}{r}\N{NO-BREAK SPACE}{sample}s"
        return Curve(x, mean.values, mean["stderr"].values, told)
    alone = values.isel({sample: 0}) if r else values
    if "stderr" in alone.coords and alone["stderr"].dims == (over,):
        error = alone["stderr"].values.astype(float)
        particles.check_finite(error, f"{what}, stderr")
        return Curve(x, alone.values.astype(float), error, BAND)
    return Curve(x, alone.values.astype(float), None, f"one {sample}, no error bar" if r else "no error bar")


def only_variable(table: xr.DataArray | xr.Dataset) -> xr.DataArray:
    """The array itself, or the one that a Dataset holds."""
    if isinstance(table, xr.DataArray):
        return table
    if not isinstance(table, xr.Dataset) or len(table.data_vars) != 1:
        held = sorted(map(str, table.data_vars)) if isinstance(table, xr.Dataset) else type(table).__name__
        raise TypeError(f"power: expected a DataArray, or a Dataset with one variable; got {held}. Pass table[name].")
    return next(iter(table.data_vars.values()))


def draw_series(values: xr.DataArray, ax: Axes | None, label: str | None) -> Axes:
    """A series over time with its band, on linear axes."""
    curve = of_replicas(values, "time", "series")
    ax = axes.given(ax)
    _room_for_one(ax, curve)
    style = axes.next_style(ax)
    _band(ax, curve, style["color"])
    ax.plot(curve.x, curve.mean, gid="mean", label=_entry(label, curve), zorder=3, **style, **_marker(curve))
    return axes.finish(ax, axes.title(values["time"]), axes.title(values), "best")


def draw_positive(ax: Axes, curve: Curve, label: str | None, bars: bool = False) -> tuple[float, float]:
    """The part of a curve that a log axis can show, a rug where the mean is not positive; returns the range to show."""
    shown = curve.mean > 0
    if not shown.any():
        raise ValueError(
            "no mean is positive, so a log axis has nothing to show: the distance is below what this many particles "
            "resolve. Use more particles or earlier times, or plots.series on a linear axis."
        )
    ax.set_yscale("log")
    _room_for_one(ax, curve)
    style = axes.next_style(ax)
    mean = np.where(shown, curve.mean, np.nan)
    if bars and curve.error is not None:
        ax.vlines(curve.x, *curve.edges, color=style["color"], linewidth=1.2, gid="bars")
    elif not bars:
        _band(ax, curve, style["color"])
    marker = {"marker": "o", "markersize": 4.5} if bars else _marker(curve)
    if bars:
        style["linestyle"] = "none"
    ax.plot(curve.x, mean, gid="mean", label=_entry(label or "mean", curve), zorder=3, **style, **marker)
    if not shown.all():
        ax.plot(
            curve.x[~shown], np.full((~shown).sum(), 0.03), transform=ax.get_xaxis_transform(), linestyle="none",
            marker="|", markersize=8, color=style["color"], label="mean ≤ 0", gid="rug",
        )  # fmt: skip
    # Lower ends are shown, unless one that nearly reaches 0 would flatten all the rest.
    below = np.maximum(curve.edges[0], curve.mean / 5) if bars else curve.mean
    return float(below[shown].min()), float(curve.edges[1].max())


def _band(ax: Axes, curve: Curve, colour: Colour) -> None:
    if curve.error is not None and len(curve.x) == 1:
        ax.vlines(curve.x, *curve.edges, color=colour, linewidth=1.2, gid="bars")
    elif curve.error is not None:
        ax.fill_between(curve.x, *curve.edges, color=colour, alpha=0.25, linewidth=0, gid="band", zorder=1)


def _room_for_one(ax: Axes, curve: Curve) -> None:
    """A range around a single abscissa, of which matplotlib makes an empty one, with a warning."""
    if len(curve.x) == 1 and not axes.count(ax):
        x = float(curve.x[0])
        ax.set_xlim((x / 2, 2 * x) if ax.get_xscale() == "log" else (x - 0.5, x + 0.5))


def floor(distance: xr.DataArray) -> Array | None:
    """The sampling floor at every time, where the distance carries one."""
    if "floor" not in distance.coords:
        return None
    floor = distance["floor"].sortby("time") if "time" in distance["floor"].dims else distance["floor"]
    others = [dim for dim in floor.dims if dim != "time"]
    values = np.broadcast_to(floor.mean(others).values.astype(float), distance.sizes["time"])
    particles.check_finite(values, "decay, floor")
    return values


def draw_floor(ax: Axes, times: Array, floor: Array) -> None:
    """A line, and grey below it."""
    # A log axis has no 0 to fill from.
    ax.fill_between(times, 1e-9 * floor, floor, color=GREY, alpha=0.2, linewidth=0, gid="below", zorder=0)
    ax.plot(times, floor, color=GREY, linestyle="--", linewidth=1.2, label="sampling floor", gid="floor")


def draw_replicas(ax: Axes, distance: xr.DataArray, curve: Curve, floor: Array) -> None:
    """A distance of every replica beside its floor, on linear axes from 0."""
    rows = distance.transpose("time", ...).values.astype(float).reshape(len(curve.x), -1)
    if rows.shape[1] > 1:
        ax.plot(curve.x, rows, color=BLUE, alpha=0.35, linewidth=0.8, gid="replica")
        ax.plot([], [], color=BLUE, alpha=0.35, linewidth=0.8, label="each replica")
    ax.plot(curve.x, curve.mean, color=BLUE, linewidth=1.8, label="mean", gid="mean", **_marker(curve))
    draw_floor(ax, curve.x, floor)
    _room_for_one(ax, curve)
    # Room for the legend.
    ax.set_ylim(0, 1.45 * max(float(rows.max()), float(floor.max())))


def draw_unbiased(ax: Axes, squares: xr.DataArray) -> None:
    """Roots of squared distances without their floor, where they are positive."""
    curve = of_replicas(squares.reset_coords(drop=True), "time", "decay, unbiased")
    shown = curve.mean > 0
    style: dict[str, Any] = {"linestyle": "none", "marker": "x", "markersize": 3.5, "color": GREEN, "zorder": 3}
    ax.plot(curve.x[shown], np.sqrt(curve.mean[shown]), label="floor removed", gid="unbiased", **style)


def draw_fit(ax: Axes, x: Array, y: Array, symbol: str, rate: Rate) -> None:
    """A fitted line, with the rate, its interval, its window and its flags in the legend."""
    first, last = rate.window
    told = [_interval(symbol, rate), f"on [{first:g}, {last:g}]"]
    told += [textwrap.shorten(f"flag: {flag}", 2 * ENTRY_WIDTH - 8, placeholder=" …") for flag in rate.flags]
    label = "\n".join(textwrap.fill(line, ENTRY_WIDTH) for line in told)
    style: Any = (0, (1, 1.2)) if rate.flags else "-"
    colour = VERMILLION if rate.flags else BLACK
    ax.plot(x, y, color=colour, linestyle=style, linewidth=2, label=label, gid="fit", zorder=4)


def _interval(symbol: str, rate: Rate) -> str:
    """Value ± half the interval, or value [low, high] where it is not symmetric."""
    half = (rate.high - rate.low) / 2
    if 0 < half < math.inf and half > 1e-6:
        digits = max(0, 1 - math.floor(math.log10(half)))
        value, low, high, width = (f"{z:.{digits}f}" for z in (rate.value, rate.low, rate.high, half))
    else:
        value, low, high, width = (f"{z:.4g}" for z in (rate.value, rate.low, rate.high, half))
    symmetric = abs((rate.high + rate.low) / 2 - rate.value) <= 0.05 * half
    told = f"{symbol} = {value} ± {width}" if symmetric else f"{symbol} = {value} [{low}, {high}]"
    return told.replace("-", "−") + " (95 %)"


def check_rate(rate: Rate | None, curve: Curve) -> None:
    """Refuses the rate of another series."""
    if rate is None:
        return
    if not isinstance(rate, Rate):
        raise TypeError(f"rate is a {type(rate).__name__}; expected what rates.exponential or rates.power returns.")
    particles.check_finite(np.array([rate.value, rate.prefactor, *rate.window]), "rate")
    slack = 1e-9 * float(np.abs(curve.x).max())
    if not curve.x[0] - slack <= rate.window[0] <= rate.window[1] <= curve.x[-1] + slack or rate.prefactor <= 0:
        raise ValueError(
            f"the rate was fitted on {rate.window} with prefactor {rate.prefactor:g}; the series covers "
            f"[{curve.x[0]:g}, {curve.x[-1]:g}]. Pass the rate of this series."
        )


def with_room(ax: Axes, curve: Curve) -> Axes:
    """Raises the top of a log axis until the legend in its upper right corner covers no curve."""
    entries = ax.get_legend_handles_labels()[1]
    lines = [line for entry in entries for line in entry.split("\n")]
    extent = ax.get_window_extent()
    point = ax.figure.dpi / 72 * SMALL
    # Sizes of text, in points of its font: 0.6 across a character, 1.4 from line to line, 5 for the line's sample.
    left = 1 - (0.6 * max(map(len, lines)) + 5) * point / extent.width
    free = max(0.3, 1 - (1.4 * len(lines) + 1) * point / extent.height)
    drawn = [line.get_data() for line in ax.lines if line.get_gid() in ("mean", "fit")]
    x, y = (np.concatenate(z) for z in zip((curve.x, curve.edges[1]), *drawn, strict=True))
    across = ax.transAxes.inverted().transform(ax.transData.transform(np.c_[x, np.ones_like(x)]))[:, 0]
    covered = y[(across > left) & (y > 0)]
    bottom, top = ax.get_ylim()
    if covered.size:
        top = max(top, bottom * (float(covered.max()) / bottom) ** (1 / free))
    ax.set_ylim(bottom, top)
    axes.log_ticks(ax.yaxis)
    return ax


def _entry(label: str | None, curve: Curve) -> str:
    return axes.typeset(f"{label}, {curve.told}" if label else curve.told, ENTRY_WIDTH)


def _marker(curve: Curve) -> dict[str, Any]:
    return {"marker": "o", "markersize": 2.5} if len(curve.x) <= MARKED else {}
