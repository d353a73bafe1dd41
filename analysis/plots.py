"""Pictures: labelled arrays in, matplotlib Axes out.

Every function draws on the given Axes (the current ones when None) and returns them. What is drawn is what was given:
means over replicas with two standard errors on either side, or a line that says it has none; data that are empty or not
finite are refused. Labels come from the attributes `long_name` and `units`. Colours are Okabe and Ito's, and lines
differ in style as well. Nothing global changes: no rcParams, no backend, and matplotlib is imported at the first
picture.
"""

from __future__ import annotations

import math
import os
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from . import animations, axes, clouds, curves, fields, histograms, limits
from .axes import BLACK, BLUE, COLOURS, GREY, ORANGE
from .histograms import BINS, NODES
from .laws import to_law
from .particles import check_finite
from .rates import Rate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LARGEST_SUMMARY = 6  # panels on a page
EARLY = np.array([0.0, 0.1, 0.3, 1.0])  # shares of a run at which it is beside its limit
MEASURED = 13  # times at which the distance to a limit is computed for a picture

Array = np.ndarray


# Distances and rates


def decay(
    distance: xr.DataArray, rate: Rate | None = None, ax: Axes | None = None, *, label: str | None = None
) -> Axes:
    """W₂(t) on a log axis, with its sampling floor and the fit A e^{-λt} on the window it was fitted on.

    Args:
        distance: (time, replica), or (time) with a coordinate `stderr`; attrs["power"] is 1, or 2 for signed squares
            (the fit is then drawn squared). A coordinate `floor` is in the same units; of squares without the floor,
            `unbiased` (time, replica), the roots are marked: they are what was fitted. A mean ≤ 0 has no place on a log
            axis: it is left out, and marked on the time axis.
        rate: a fit; its prefactor and its λ belong to W₂ itself. One with flags is dotted, and the legend says why.
        ax: where to draw.
        label: legend entry, for several distances on the same Axes.

    Raises:
        ValueError: no power recorded, no positive mean, values that are not finite, a rate of another series.

    """
    power = distance.attrs.get("power") if isinstance(distance, xr.DataArray) else 1
    if power not in (1, 2):
        raise ValueError(
            f"decay: attrs['power'] is {power!r}; expected 1 (W₂) or 2 (signed W₂²). Arithmetic may have dropped it: "
            "distance.assign_attrs(power=1)."
        )
    curve, floor = curves.of_replicas(distance, "time", "decay"), curves.floor(distance)
    curves.check_rate(rate, curve)
    ax = axes.given(ax)
    earlier = axes.earlier_range(ax)
    low, high = curves.draw_positive(ax, curve, label)
    if power == 1 and "unbiased" in distance.coords:
        curves.draw_unbiased(ax, distance["unbiased"])
    if floor is not None:
        curves.draw_floor(ax, curve.x, floor)
        low = min(low, float(floor[floor > 0].min(initial=np.inf)))
    if rate is not None:
        times = np.linspace(*rate.window, NODES)
        fitted = (rate.prefactor * np.exp(-rate.value * times)) ** power
        ax.axvspan(*rate.window, color=ORANGE, alpha=0.15, linewidth=0, gid="window", zorder=0)
        curves.draw_fit(ax, times, fitted, "λ" if power == 1 else "λ of W₂", rate)
        low, high = min(low, float(fitted.min())), max(high, float(fitted.max()))
    axes.log_range(ax, low, high, earlier)
    axes.finish(ax, axes.title(distance["time"]), axes.title(distance), "upper right")
    return curves.with_room(ax, curve)


def power(
    table: xr.DataArray | xr.Dataset,
    rate: Rate | None = None,
    over: str = "n_particles",
    ax: Axes | None = None,
    *,
    label: str | None = None,
) -> Axes:
    """A quantity against N, dt or σ on two log axes, with the fit A n^p.

    Args:
        table: (over, replica) or (over, seed), or (over) with a coordinate `stderr`; a Dataset with one variable is it.
        rate: a fit, drawn on its window.
        over: the dimension of the abscissa, positive.
        ax: where to draw.
        label: legend entry, for several tables on the same Axes.

    Raises:
        ValueError: an abscissa ≤ 0, no positive mean, values that are not finite, a rate of another table.

    """
    table = curves.only_variable(table)
    curve = curves.of_replicas(table, over, "power")
    if curve.x.min() <= 0:
        raise ValueError(f"power: {over} goes down to {curve.x.min():g}; a log axis needs positive values.")
    curves.check_rate(rate, curve)
    ax = axes.given(ax)
    earlier = axes.earlier_range(ax)
    ax.set_xscale("log")
    low, high = curves.draw_positive(ax, curve, label, bars=True)
    axes.log_range(ax, low, high, earlier)
    if rate is not None:
        n = np.geomspace(*rate.window, NODES)
        curves.draw_fit(ax, n, rate.prefactor * n**rate.value, "p", rate)
    axes.log_ticks(ax.xaxis, curve.x)
    axes.finish(ax, axes.title(table[over]), axes.title(table), "upper right")
    return curves.with_room(ax, curve)


def chaos_slope(
    table: xr.DataArray | xr.Dataset, rate: Rate | None = None, ax: Axes | None = None, *, label: str | None = None
) -> Axes:
    """E|X^{i,N} - X̄^i|² against N, beside the slope -1 of propagation of chaos.

    Args:
        table: as in `power`, over n_particles.
        rate: a fit.
        ax: where to draw.
        label: legend entry.

    Raises:
        ValueError: as `power`.

    Source: Sznitman, Topics in propagation of chaos (1991), Theorem 1.4.

    """
    table = curves.only_variable(table)
    ax = power(table, rate, "n_particles", ax, label=label)
    curve = curves.of_replicas(table, "n_particles", "chaos_slope")
    shown = curve.mean > 0
    n = curve.x[shown]
    # Half the geometric mean of N·error: below the data, so that neither hides the other.
    level = 0.5 * np.exp(np.log(n * curve.mean[shown]).mean())
    ax.plot(n, level / n, color=GREY, linestyle="--", linewidth=1, label="slope −1", gid="reference")
    axes.log_range(ax, float((level / n).min()), float(curve.mean.max()), axes.earlier_range(ax))
    ax.legend(**axes.legend_style("upper right"))
    return curves.with_room(ax, curve)


# Observables


def series(values: xr.DataArray, ax: Axes | None = None, label: str | None = None) -> Axes:
    """The mean over replicas of an observable, and a band of ±2 standard errors.

    Args:
        values: (time, replica), or (time) with a coordinate `stderr`; without either the legend says so.
        ax: where to draw; a second series gets another colour and style.
        label: legend entry.

    Raises:
        ValueError: other dimensions, no values, values that are not finite.

    """
    return curves.draw_series(values, ax, label)


def entropy(series: xr.DataArray, ax: Axes | None = None) -> Axes:
    """An entropy over time with its band, labelled with its estimator, up to the first comma or semicolon.

    Args:
        series: (time, replica), or (time) with a coordinate `stderr`.
        ax: where to draw.

    Raises:
        ValueError: as `series`.

    """
    estimator = series.attrs.get("estimator") if isinstance(series, xr.DataArray) else None
    return curves.draw_series(series, ax, estimator and re.split("[,;]", str(estimator))[0].strip())


def energy(run: xr.Dataset, ax: Axes | None = None) -> Axes:
    """The energy of a run and, where recorded, its free energy.

    Args:
        run: a run with the observable `energy` or `free_energy`.
        ax: where to draw.

    Raises:
        ValueError: it has neither.

    """
    found = [name for name in ("energy", "free_energy") if name in run]
    if not found:
        raise ValueError(
            "energy: the run recorded neither `energy` nor `free_energy`; simulate with "
            'observables=("energy", "free_energy") (a scenario with an energy has them).'
        )
    ax = axes.given(ax)
    for name in found:
        curves.draw_series(run[name], ax, axes.name_of(run[name]))
    if len(found) > 1:
        ax.set_ylabel(axes.with_units("energy", run[found[0]].attrs.get("units")))
    return ax


# Laws


def density(
    run: xr.Dataset | xr.DataArray,
    law: Any = None,
    times: float | Sequence[float] | None = None,
    ax: Axes | None = None,
    bins: int | Array = BINS,
) -> Axes:
    """The law of the particles, pooled over replicas, with the limit on top.

    In one dimension histograms at several times; in two a histogram of the plane at one time.

    Args:
        run: a run, or its position; on a torus particles are wrapped into the box.
        law: the limit: a Law with a density, a function t -> Law, or a Dataset with density(time, x) or density(time,
            x, y), of which the mean is drawn where there is one for each replica. A point mass is drawn as a line (a
            cross in two dimensions).
        times: which times (never indices); the nearest saved ones are drawn, and labelled. By default five, in two
            dimensions the last.
        ax: where to draw.
        bins: their number, or in one dimension their edges.

    Raises:
        ValueError: no particles kept, more than two components, values that are not finite, a time outside the run.
        TypeError: law is none of these.

    """
    cloud, law = clouds.of_run(run), limits.pooled(law, run)
    if cloud.dim == 1:
        return histograms.on_a_line(cloud, law, times, axes.given(ax), bins)
    if cloud.dim == 2:
        return histograms.in_the_plane(cloud, law, times, axes.given(ax), bins)
    raise ValueError(
        f"density: the particles have {cloud.dim} components; a picture shows one or two: run.isel(component=[0, 1])."
    )


def limit(
    run: xr.Dataset | xr.DataArray,
    limit: Any,
    times: float | Sequence[float] | None = None,
    *,
    distance: xr.DataArray | None = None,
    bins: int | Array = 60,
) -> Figure:
    """Particles on top of their limit: the law at some times, and how far apart they are over time.

    In one dimension histograms pooled over replicas, and W₂ of every replica beside the sampling floor, that of as many
    independent points of the limit: interaction takes it off the floor by a factor that does not depend on N. In two
    dimensions the particles and level lines of the limit.

    Args:
        run: a run, or its position; on a torus particles are wrapped into the box.
        limit: as in `density`; of one law for each path of a common noise the mean is drawn, and every replica is
            measured against its own.
        times: which times; the nearest saved ones are drawn. By default four, early ones closer together.
        distance: `wasserstein.to_law(run, limit)` where it is known already; else it is computed, at a dozen times.
        bins: their number, or in one dimension their edges.

    Returns:
        A Figure that no window knows; `figure.savefig(path)` writes it.

    Raises:
        ValueError, TypeError: as `density`, and as `wasserstein.to_law` in one dimension.

    """
    from matplotlib.figure import Figure

    cloud = clouds.of_run(run)
    if cloud.dim > 2:
        raise ValueError(
            f"limit: the particles have {cloud.dim} components; a picture shows one or two: run.isel(component=[0, 1])."
        )
    wanted = cloud.times[0] + EARLY * (cloud.times[-1] - cloud.times[0]) if times is None else times
    indices = clouds.indices_of(cloud.times, wanted)
    law = limits.pooled(limit, run)
    columns = len(indices) + (cloud.dim == 1)
    figure = Figure(figsize=(2.6 * columns + 0.4, 3.0), layout="constrained")
    panels = [figure.add_subplot(1, columns, k + 1) for k in range(columns)]
    row = panels[: len(indices)]
    if cloud.dim == 1:
        histograms.row_on_a_line(cloud, law, indices, row, bins)
        _against_floor(run, limit, distance, panels[-1])
    else:
        histograms.row_in_the_plane(cloud, law, indices, row)
    for ax, index in zip(row, indices, strict=True):
        ax.set_title(f"t = {cloud.times[index]:.4g}", fontsize=9)
    # Below the panels: a density leaves no corner free.
    style = axes.legend_style("outside lower left") | {"ncols": 2, "fontsize": 9, "markerscale": 3}
    figure.legend(*row[0].get_legend_handles_labels(), **style)
    if isinstance(run, xr.Dataset):
        figure.suptitle(_headline(run, 42 * columns, 0).split("\n")[0], fontsize=10)
    return figure


def _against_floor(run: xr.Dataset | xr.DataArray, limit: Any, distance: xr.DataArray | None, ax: Axes) -> None:
    if distance is None:
        n = run.sizes["time"]
        chosen = sorted({round(k) for k in np.linspace(0, n - 1, min(n, MEASURED))})
        distance = to_law(run.isel(time=chosen), limit)
    curve, floor = curves.of_replicas(distance, "time", "limit"), curves.floor(distance)
    if floor is None:
        raise ValueError("limit: the distance has no coordinate `floor`; pass what wasserstein.to_law returns.")
    curves.draw_replicas(ax, distance.sortby("time"), curve, floor)
    ax.set_title("distance to the limit", fontsize=9)
    axes.finish(ax, axes.title(distance["time"]), axes.with_units("W₂", distance.attrs.get("units")), "best")


def paths(
    run: xr.Dataset | xr.DataArray,
    particles: int = 30,
    replica: int = 0,
    ax: Axes | None = None,
    *,
    component: int = 0,
) -> Axes:
    """Paths x_i(t) of the first particles of one replica, and the mean of all that were kept.

    On a torus paths are wrapped into the box, cut where they cross its edge, and have no mean.

    Args:
        run: a run, or its position.
        particles: how many paths.
        replica: index of the replica.
        ax: where to draw.
        component: index of the component.

    Raises:
        ValueError: no particles kept, values that are not finite, an index out of range.

    """
    cloud = clouds.of_run(run, replica)
    if not 0 <= component < cloud.dim:
        raise ValueError(f"paths: component {component} does not exist; the particles have {cloud.dim}, from 0 on.")
    if particles < 1:
        raise ValueError(f"paths: particles = {particles}; draw at least one.")
    position = cloud.position.isel(component=component)
    x = position.isel(particle=slice(particles)).transpose("time", "particle").values.astype(float)
    check_finite(x, "paths")
    times = cloud.times
    ax = axes.given(ax)
    length = cloud.lengths[component]
    wrapped, cut = clouds.cut(times, cloud.wrap(x, component), length)
    ax.plot(cut, wrapped, color=BLUE, alpha=0.35, linewidth=0.7, gid="path")
    ax.set_title(f"{x.shape[1]} of {position.sizes['particle']} particles, replica {replica}", fontsize=9)
    if math.isinf(length):
        ax.plot(times, cloud.mean(component), color=BLACK, linewidth=1.8, label="mean", gid="mean")
    else:
        ax.set_ylim(*cloud.box(component))
    return axes.finish(ax, axes.title(cloud.position["time"]), cloud.title(component), "best")


def phase(
    run: xr.Dataset | xr.DataArray,
    time: float | None = None,
    replica: int = 0,
    components: tuple[int, int] = (0, 1),
    ax: Axes | None = None,
    *,
    scenario: Any = None,
    frame: int | None = None,
) -> Axes:
    """Particles of one replica in the plane of two components, with the vector field that moves them.

    Args:
        run: a run, or its position.
        time: when; the nearest saved one is drawn. By default the last.
        replica: index of the replica.
        components: abscissa and ordinate.
        ax: where to draw.
        scenario: draws its drift b(t, x, m) at the law of the kept particles; further components of x are at their
            means.
        frame: the index of a saved time, instead of `time`.

    Raises:
        ValueError: no particles kept, values that are not finite, an index out of range, a time outside the run, both a
            time and a frame.

    """
    cloud = clouds.of_run(run, replica)
    i, j = components
    if not (0 <= i < cloud.dim and 0 <= j < cloud.dim) or i == j:
        raise ValueError(
            f"phase: components {components} of particles that have {cloud.dim}; a phase portrait needs two different "
            "ones, counted from 0."
        )
    index = clouds.frame_of(cloud.times, time, frame)
    x, weight = cloud.at(index)
    ax = axes.given(ax)
    ax.scatter(x[:, i], x[:, j], s=clouds.areas(weight), color=BLUE, alpha=0.6, linewidths=0, gid="particles", zorder=3)
    for axis, component in (("x", i), ("y", j)):
        ax.set(**{f"{axis}lim": cloud.window(component, x[:, component])})
    if scenario is not None:
        fields.draw_drift(ax, scenario, cloud, index, components)
    ax.set_title(f"t = {cloud.times[index]:g}, replica {replica}", fontsize=9)
    return axes.finish(ax, cloud.title(i), cloud.title(j), None)


# Animations and pages


def animate(
    run: xr.Dataset | xr.DataArray,
    path: str | os.PathLike[str],
    law: Any = None,
    fps: int = 20,
    replica: int | None = None,
) -> Path:
    """The law of the particles as it moves, one frame for each saved time.

    In one dimension a histogram with the limit on top, in two the particles with level lines of the limit.

    Args:
        run: a run, or its position.
        path: `.gif`, or `.html` for a page with a player. It is written under another name and then renamed.
        law: the limit, as in `density`.
        fps: frames per second.
        replica: index of the one to show; None pools all.

    Returns:
        The path.

    Raises:
        ValueError: another suffix, more than two components, values that are not finite.

    """
    from matplotlib.figure import Figure

    path = Path(path)
    writer = animations.writer_for(path, fps)
    cloud = clouds.of_run(run, replica)
    if cloud.dim > 2:
        raise ValueError(
            f"animate: the particles have {cloud.dim} components; a picture shows one or two: "
            "run.isel(component=[0, 1])."
        )
    figure = Figure(figsize=(4.8, 3.6), layout="constrained")
    ax = figure.add_subplot()
    law = limits.pooled(law, run, replica)
    draw = (animations.on_a_line if cloud.dim == 1 else animations.in_the_plane)(cloud, law, ax)

    def show(index: int) -> None:
        draw(index)
        ax.set_title(f"t = {cloud.times[index]:.6g}", fontsize=10)

    animations.record(figure, show, len(cloud.times), path, writer)
    return path


def summary(
    run: xr.Dataset, distance: xr.DataArray | None = None, rate: Rate | None = None, *, law: Any = None
) -> Figure:
    """A run on one page: its law, its paths, its observables, and the decay of a distance.

    Args:
        run: a run; what it did not record is left out.
        distance: as in `decay`.
        rate: as in `decay`.
        law: the limit, as in `density`.

    Returns:
        A Figure that no window knows; `figure.savefig(path)` writes it.

    Raises:
        ValueError: nothing to draw, values that are not finite.

    """
    from matplotlib.figure import Figure

    panels = _panels(run, distance, rate, law)
    if not panels:
        raise ValueError(
            "summary: the run holds neither particles nor observables, and no distance was given. Keep some particles "
            'or record observables=("mean", "energy").'
        )
    shown, hidden = panels[:LARGEST_SUMMARY], panels[LARGEST_SUMMARY:]
    columns = min(len(shown), 2 if len(shown) in (2, 4) else 3)
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(4 * columns, 3.1 * rows + 0.6), layout="constrained")
    for k, draw in enumerate(shown):
        draw(figure.add_subplot(rows, columns, k + 1))
    figure.suptitle(_headline(run, 48 * columns, len(hidden)), fontsize=10)
    return figure


def _panels(
    run: xr.Dataset, distance: xr.DataArray | None, rate: Rate | None, law: Any
) -> list[Callable[[Axes], object]]:
    panels: list[Callable[[Axes], object]] = []
    if distance is not None:
        panels.append(lambda ax: decay(distance, rate, ax))
    if "position" in run:
        dim = run["position"].sizes["component"]
        panels.append((lambda ax: density(run, law, ax=ax)) if dim <= 2 else (lambda ax: phase(run, ax=ax)))
        panels.append(lambda ax: paths(run, ax=ax))
    if "energy" in run or "free_energy" in run:
        panels.append(lambda ax: energy(run, ax))
    if "mean" in run and "component" in run["mean"].dims:
        panels.append(lambda ax: _mean(run["mean"], ax))
    others = [
        values
        for name, values in run.data_vars.items()
        if name not in ("energy", "free_energy") and set(values.dims) in ({"time"}, {"time", "replica"})
    ]
    return panels + [lambda ax, values=values: series(values, ax) for values in others]


def _mean(mean: xr.DataArray, ax: Axes) -> None:
    for component in range(min(mean.sizes["component"], len(COLOURS))):
        one = mean.isel(component=component, drop=True)
        series(one, ax, f"component {component}" if mean.sizes["component"] > 1 else None)


def _headline(run: xr.Dataset, width: int, hidden: int) -> str:
    facts = {"N": "n_particles", "dt": "dt", "seed": "seed"}
    told = [f"{name} = {run.coords[at].item():g}" for name, at in facts.items() if at in run.coords]
    told.insert(1, f"{run.sizes.get('replica', 1)} replicas")
    status = run.attrs.get("status", "complete")
    told += [] if status == "complete" else [f"status: {status}"]
    told += [f"{hidden} more observables not drawn"] if hidden else []
    fields = [f"{name} = {x.item():g}" for name, x in run.coords.items() if x.ndim == 0 and name not in facts.values()]
    first = f"{run.attrs.get('scenario', 'run')}: " + ", ".join(told)
    return "\n".join(textwrap.fill(line, width) for line in (first, ", ".join(fields)) if line)
