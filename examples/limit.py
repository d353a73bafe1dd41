"""Particles on top of their limit, computed from the same definition.

    python examples/limit.py [--small] [--folder runs]

For every built-in scenario on a line, a circle or a plane the Fokker-Planck equation is solved and drawn over the
particles, with W₂ of every replica to it beside the sampling floor: what as many independent points of the limit would
have. Where the interaction keeps the particles' fluctuations alive (the phase of synchronised oscillators wanders, and
so does the mean near a phase transition) W₂ goes above the floor, by a factor that does not depend on N. Last, the
phase diagram of the double well: the means of all stationary laws against σ, followed from one another, the critical σ
where they meet, and particles that have come to rest. Prints the distances, and writes runs/limit-*.png.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import xarray as xr

import mfsde
from mfsde import limit
from mfsde.analysis import plots, replicas, wasserstein
from mfsde.scenarios import DoubleWell, GaussianLangevin, IsotropicGaussians, Kuramoto, MeanFieldOU

BLUE, VERMILLION, GREY = "#0072B2", "#D55E00", "#777777"
SCENARIOS = {
    "ornstein-uhlenbeck": MeanFieldOU(initial_mean=(2.0,), initial_variance=0.3),
    "double-well": DoubleWell(theta=0.5, sigma=0.5, initial_mean=(0.4,), initial_variance=0.5),
    "gaussian-langevin": GaussianLangevin(),
    "kuramoto": Kuramoto(initial_mean=0.5, initial_variance=1.5),
    "isotropic-gaussians": IsotropicGaussians(),
}
PLANE = DoubleWell(theta=0.5, sigma=0.6, initial_mean=(0.3, -0.1), initial_variance=0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a few seconds: fewer particles and nodes")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where pictures go")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    # Arrays of a few thousand particles are too small to be worth dividing among threads.
    torch.set_num_threads(1)

    print(f"{'':20s}     N  W₂ ± s.e.            floor    W₂/floor  W₂(limit, its formula)")
    for name, scenario in SCENARIOS.items():
        on_top(name, scenario, options)
    on_top("double-well-plane", PLANE, options)
    phase_diagram(options)


def on_top(name: str, scenario: Any, options: argparse.Namespace) -> None:
    """The picture of one scenario, and its line of the table."""
    # Without noise the reduced network is slow, and its drift a series.
    slow = isinstance(scenario, IsotropicGaussians)
    unit, n = (4.0, 1000) if slow else (1.0, 10_000)
    run = mfsde.simulate(
        scenario, n_particles=n // 10 if options.small else n, n_replicas=6, horizon=2.0 * unit, dt=0.005 * unit,
        seed=0, save_every=80,
    )  # fmt: skip
    plane = run.sizes["component"] == 2
    # An equation on the plane is solved at the times that are drawn.
    shown = [unit * t for t in (0.0, 0.4, 0.8, 2.0)]
    nodes = (25 if options.small else 49) if plane else (129 if options.small else None)
    law = limit.evolve(scenario, shown if plane else run.time.values, n_nodes=nodes)
    distance = wasserstein.to_law(run.sel(time=shown) if plane else run, law)
    print(line_of(name, scenario, law, distance))
    figure = plots.limit(run, law, shown, distance=None if plane else distance)
    keep(figure, options.folder / f"limit-{name}.png")


def line_of(name: str, scenario: Any, law: xr.Dataset, distance: xr.DataArray) -> str:
    end = distance.isel(time=-1)
    mean = replicas.mean_and_error(end)
    told = f"{name:20s}{distance.attrs['n_particles']:6d}  {float(mean):.5f} ± {float(mean.stderr):.5f}"
    told += f"   {float(end.floor):.5f}  {float(mean / end.floor):5.2f}"
    if hasattr(scenario, "limit"):
        t = float(end.time)
        told += f"     {wasserstein.distance(limit.law_at(law, t), scenario.limit(t)):.0e}"
    return told + ("     (between moments)" if "bound" in distance.attrs else "")


def phase_diagram(options: argparse.Namespace) -> None:
    """Means of the stationary laws of the double well against σ."""
    well, low, high, nodes = DoubleWell(theta=1.0), 0.5, 1.3, 129 if options.small else 257
    even, right = mfsde.Gaussian([0.0], 0.5), mfsde.Gaussian([0.9], 0.1)
    critical = limit.critical(well, "sigma", low, high, start=even, n_nodes=nodes)
    symmetric = limit.branch(well, "sigma", low, high, start=even, n_nodes=nodes)
    # Up one well, through the fork and down the other.
    broken = limit.branch(well, "sigma", low, high, start=right, n_nodes=nodes)
    print(f"double well, θ = 1: three stationary laws below σ = {critical:.8f}, one above")

    unstable = symmetric["sigma"].values[symmetric["feedback"].values > 1]
    figure, ax = plt.subplots(figsize=(5, 3.6), layout="constrained")
    line = {"color": BLUE, "linewidth": 1.8}
    ax.plot(broken["sigma"], broken["mean"].isel(component=0), label="stable law", **line)
    ax.plot([critical, high], [0.0, 0.0], **line)
    ax.plot(np.append(unstable, critical), np.zeros(len(unstable) + 1), "--", label="unstable law", **line)
    ax.axvline(critical, color=GREY, linestyle=":", linewidth=1.2, label=f"critical σ = {critical:.4f}")
    draw_particles(ax, well, np.linspace(low + 0.05, high - 0.05, 5 if options.small else 9), options)
    ax.set(xlabel="σ", ylabel="mean", title="stationary laws of the double well, θ = 1")
    ax.title.set_fontsize(10)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, frameon=False, loc="upper right")
    keep(figure, options.folder / "limit-phase-diagram.png")


def draw_particles(ax: plt.Axes, well: DoubleWell, sigmas: np.ndarray, options: argparse.Namespace) -> None:
    """Means of particles that started to the left and to the right, at a late time."""
    n, horizon = (500, 20.0) if options.small else (2000, 40.0)
    points = []
    for sigma in sigmas:
        for start in (-0.5, 0.5):
            run = mfsde.simulate(
                replace(well, sigma=float(sigma), initial_mean=(start,)), n_particles=n, n_replicas=3, horizon=horizon,
                dt=0.02, seed=0, keep_particles=0, observables=("mean",),
            )  # fmt: skip
            points += [(sigma, float(mean)) for mean in run["mean"].isel(time=-1, component=0)]
    label = f"{n} particles, t = {horizon:g}"
    ax.plot(*np.array(points).T, "x", color=VERMILLION, markersize=4, label=label, zorder=3)


def keep(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"  drew {path}")


if __name__ == "__main__":
    main()
