"""The trained loss of wide networks against their number n of neurons.

    python examples/figure_loss_against_n.py [--small] [--folder runs]

Rotskoff, Mean-field neural networks (2020), loss against n for the student-teacher and the spherical 3-spin targets:
the loss after training falls like n^{-1}, whatever the dimension. Left: a ReLU student of n units learns a teacher of
100 from its exact population loss on the sphere S²(√3) (arc-cosine kernel), at three times; the excess over the loss of
512 neurons, freed of their own 1/512, falls like n^{-1}, and the loss itself until it meets ℓ(f_t), that of infinitely
many. Right: tanh units with a bias learn the 3-spin energy in d = 5 by SGD on fresh batches; loss on other inputs.

The source says n^{-1} and names the systems; dimensions, teacher, activation, initial laws, times and batches are ours.
Bars are two standard errors over replicas. Prints the slopes, and writes runs/loss-against-n.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import xarray as xr

import mfsde
from mfsde.analysis import rates
from mfsde.scenarios import SphericalSpin, StudentTeacher

COLOURS, MARKERS, GREY = ("#0072B2", "#D55E00", "#009E73"), ("o", "s", "^"), "#777777"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a few seconds: fewer neurons, replicas and steps")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where the picture goes")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    draw_student(axes[0], options.small)
    draw_spins(axes[1], options.small)
    keep(figure, options.folder / "loss-against-n.png")


def draw_student(ax: plt.Axes, small: bool) -> None:
    """Loss (open symbols) and its excess over infinitely many neurons (filled) at three times."""
    student = StudentTeacher(data_dim=3, n_teacher=100, initial_spread=2.0)
    sizes, large, r = ([16, 32, 64], 256, 12) if small else ([16, 32, 64, 128, 256], 512, 16)
    horizon = 1.0 if small else 10.0
    settings = {"n_replicas": r, "horizon": horizon, "dt": 0.1, "seed": 0, "save_every": max(1, round(horizon))}
    losses = losses_of(student, [*sizes, large], **settings)
    n = losses.n_particles
    own = losses.sel(n_particles=large)
    excess = ((losses - own) / (1 - n / large)).sel(n_particles=sizes)
    for share, colour, marker in zip((0.2, 0.5, 1.0), COLOURS, MARKERS, strict=True):
        t = share * horizon
        at = excess.sel(time=t, method="nearest")
        slope = rates.power(at)
        print(f"student-teacher, t = {t:g}: excess ~ n^p, p = {slope.value:.3f} ± {slope.stderr:.3f} (s.e.)")
        bars(ax, at, f"{marker}-", colour, f"t = {t:g}: slope {slope.value:.2f} ± {2 * slope.stderr:.2f}")
        whole = losses.sel(time=t, method="nearest", n_particles=sizes).mean("replica")
        ax.plot(sizes, whole, f"{marker}:", color=colour, markerfacecolor="none", linewidth=0.9, markersize=5)
    ax.plot([], [], "ko:", markerfacecolor="none", linewidth=0.9, markersize=5, label="the loss itself")
    first = float(excess.sel(n_particles=sizes[0]).isel(time=-1).mean())
    guide(ax, sizes, 0.3 * first)
    finish(ax, sizes, "student and teacher: loss less that of n = ∞")


def draw_spins(ax: plt.Axes, small: bool) -> None:
    """Loss on fresh inputs at three times of SGD."""
    sizes, r = ([8, 16, 32], 4) if small else ([8, 16, 32, 64, 128], 16)
    horizon = 4.0 if small else 40.0
    settings = {"n_replicas": r, "horizon": horizon, "dt": 0.02, "seed": 0, "save_every": round(horizon / 0.2)}
    losses = losses_of(SphericalSpin(), sizes, method="sgd", **settings)
    for share, colour, marker in zip((0.2, 0.5, 1.0), COLOURS, MARKERS, strict=True):
        t = share * horizon
        at = losses.sel(time=t, method="nearest")
        slope = rates.power(at)
        print(f"3-spin, t = {t:g}: loss ~ n^p, p = {slope.value:.3f} ± {slope.stderr:.3f} (s.e.)")
        bars(ax, at, f"{marker}-", colour, f"t = {t:g}: slope {slope.value:.2f} ± {2 * slope.stderr:.2f}")
    guide(ax, sizes, 0.3 * float(losses.isel(n_particles=0, time=-1).mean()))
    finish(ax, sizes, "spherical 3-spin, d = 5: loss of SGD")


def losses_of(case: Any, sizes: list[int], **settings: Any) -> xr.DataArray:
    """(n_particles, time, replica)."""
    runs = [mfsde.simulate(case, n_particles=n, keep_particles=0, dtype=torch.float64, **settings) for n in sizes]
    return xr.concat([run.loss for run in runs], xr.DataArray(sizes, dims="n_particles", name="n_particles"))


def bars(ax: plt.Axes, values: xr.DataArray, style: str, colour: str, label: str) -> None:
    mean, error = values.mean("replica"), 2 * values.std("replica", ddof=1) / values.sizes["replica"] ** 0.5
    # On a logarithmic scale a bar may not reach zero.
    below = np.minimum(error, 0.9 * mean)
    look = {"fmt": style, "color": colour, "markersize": 5, "linewidth": 1.2, "label": label}
    ax.errorbar(values.n_particles, mean, [below, error], **look)


def guide(ax: plt.Axes, sizes: list[int], start: float) -> None:
    n = np.array([sizes[0], sizes[-1]], dtype=float)
    ax.plot(n, start * n[0] / n, "--", color=GREY, linewidth=1.2, label="$n^{-1}$")


def finish(ax: plt.Axes, sizes: list[int], title: str) -> None:
    ax.set(xscale="log", yscale="log", xlabel="number of neurons n", ylabel="loss ½E(f − f_n)²", title=title)
    ax.set_xticks(sizes, [str(n) for n in sizes], minor=False)
    ax.xaxis.minorticks_off()
    ax.title.set_fontsize(10)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, frameon=False, loc="lower left")


def keep(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"  drew {path}")


if __name__ == "__main__":
    main()
