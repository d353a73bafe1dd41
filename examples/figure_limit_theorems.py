"""The law of large numbers and the central limit theorem of a two-layer network.

    python examples/figure_limit_theorems.py [--small] [--folder runs]

Rotskoff, Mean-field neural networks (2020), (25)-(27), (31)-(32): f_t^(n) of n neurons tends to f_t, its fluctuations
√n(f_t^(n) - f_t) to the Gaussian g_t of (31), and n E∫|f_t^(n) - f_t|² dν to a function of t that goes to 0, below what
independent neurons of the same law would have: the interaction of neurons damps their fluctuations. Left: f_t^(n)(e_1)
of single networks, n = 20, 200, 2000, on top of f_t. Middle: histogram of √n(f_t^(n) - f_t)(e_1) over replicas at
t = 1, with the density of (31). Right: n times the mean square error against t for three n, with (31), and with the
value of independent neurons, which is the right side of (32) as t → ∞.

The source draws no such figure; the system is ours: linear units c x·z, θ = (c, z) in R³, x ~ N(0, I), target (1, ½)·x,
θ_i ~ N(0, 0.49 I), where f_t and (31) are closed equations. Euler's method with dt = 0.05 for all of them. Prints the
numbers, and writes runs/limit-theorems.png.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import xarray as xr

import mfsde
from mfsde.verification.function_space import LinearUnits, linear_covariances, variance_of_units

BLUE, VERMILLION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
SIZES = {20: VERMILLION, 200: GREEN, 2000: BLUE}
MARKERS = {20: "o", 200: "s", 2000: "^"}
DT, HORIZON, EVERY = 0.05, 4.0, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a few seconds: fewer replicas")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where the picture goes")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)

    units, n_steps = LinearUnits(), round(HORIZON / DT)
    moments = units.second_moments(units.initial().cov, n_steps, DT)[::EVERY]
    covariances = linear_covariances(units, n_steps, DT)[::EVERY]
    times, limit = np.arange(len(moments)) * EVERY * DT, moments[:, 0, 1:].numpy()
    networks = {n: simulated(units, n, 40 if options.small else 2000) for n in SIZES}

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    draw_paths(left, times, limit, networks)
    draw_fluctuations(middle, limit, covariances, networks, round(1.0 / (EVERY * DT)))
    independent = np.array([variance_of_units(s) for s in moments])
    draw_variances(right, times, limit, covariances, independent, networks)
    keep(figure, options.folder / "limit-theorems.png")


def simulated(units: LinearUnits, n: int, n_replicas: int) -> np.ndarray:
    """Networks u_t^(n), (time, replica, input)."""
    run: xr.Dataset = mfsde.simulate(
        units, n_particles=n, n_replicas=n_replicas, horizon=HORIZON, dt=DT, seed=0, save_every=EVERY,
        keep_particles=0, dtype=torch.float64,
    )  # fmt: skip
    found: np.ndarray = run.network.transpose("time", "replica", "input").values
    return found


def draw_paths(ax: plt.Axes, times: np.ndarray, limit: np.ndarray, networks: dict[int, np.ndarray]) -> None:
    """Some networks of each size on top of the limit."""
    for n, colour in SIZES.items():
        for replica in range(6):
            label = f"n = {n}" if replica == 0 else None
            ax.plot(times, networks[n][:, replica, 0], color=colour, linewidth=0.9, alpha=0.8, label=label)
    ax.plot(times, limit[:, 0], color="black", linewidth=1.8, linestyle="--", label="$f_t$, n = ∞")
    ax.set(xlabel="t", ylabel="$f_t^{(n)}(e_1)$", title="law of large numbers: six networks each")
    ax.legend(fontsize=8, frameon=False, loc="lower right")


def draw_fluctuations(
    ax: plt.Axes, limit: np.ndarray, covariances: torch.Tensor, networks: dict[int, np.ndarray], frame: int
) -> None:
    """Histograms of √n(f_t^(n) - f_t)(e_1) with the Gaussian of (31)."""
    deviation = float(covariances[frame][0, 0]) ** 0.5
    edges = np.linspace(-4 * deviation, 4 * deviation, 29)
    centres = 0.5 * (edges[1:] + edges[:-1])
    for n, colour in SIZES.items():
        scaled = n**0.5 * (networks[n][frame, :, 0] - limit[frame, 0])
        heights = np.histogram(scaled, edges)[0] / (len(scaled) * np.diff(edges))
        ax.plot(centres, heights, MARKERS[n], color=colour, markersize=4, label=f"n = {n}")
        found = float(np.square(scaled).mean())
        print(f"n = {n:5d}: E g² at e_1, t = 1: {found:.4f} (from (31): {deviation**2:.4f})")
    z = np.linspace(edges[0], edges[-1], 200)
    density = np.exp(-0.5 * (z / deviation) ** 2) / (deviation * math.sqrt(2 * math.pi))
    ax.plot(z, density, color="black", linewidth=1.5, label="Gaussian of (31)", zorder=0)
    ax.set(xlabel="$\\sqrt{n}\\,(f_t^{(n)} - f_t)(e_1)$", ylabel="density", title="central limit theorem, t = 1")
    ax.legend(fontsize=8, frameon=False, loc="upper left")


def draw_variances(
    ax: plt.Axes, times: np.ndarray, limit: np.ndarray, covariances: torch.Tensor, independent: np.ndarray,
    networks: dict[int, np.ndarray],
) -> None:  # fmt: skip
    """The left side of (32) in time, with (31) and the value of independent neurons."""
    stated = covariances.diagonal(dim1=-2, dim2=-1).sum(-1).numpy()
    for n, colour in SIZES.items():
        scaled = n * np.square(networks[n] - limit[:, None]).sum(-1)
        mean, error = scaled.mean(1), 2 * scaled.std(1, ddof=1) / scaled.shape[1] ** 0.5
        ax.errorbar(times, mean, error, fmt=MARKERS[n], color=colour, markersize=3.5, linewidth=1, label=f"n = {n}")
        at = round(1.0 / (EVERY * DT))
        print(
            f"n = {n:5d}: n E∫|f_t^(n) - f_t|² at t = 1: {mean[at]:.4f} ± {error[at] / 2:.4f} (s.e.; (31): "
            f"{stated[at]:.4f}, independent {independent[at]:.4f})"
        )
    ax.plot(times, stated, color="black", linewidth=1.5, label="(31)", zorder=0)
    ax.plot(times, independent, color=GREY, linewidth=1.5, linestyle=":", label="independent neurons")
    ax.set(
        xlabel="t", ylabel="$n\\,E\\int |f_t^{(n)} - f_t|^2 d\\nu$", yscale="log", ylim=(1e-6, 10),
        title="interaction damps fluctuations",
    )  # fmt: skip
    ax.legend(fontsize=8, frameon=False, loc="lower left")


def keep(figure: Any, path: Path) -> None:
    for ax in figure.axes:
        ax.title.set_fontsize(10)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"  drew {path}")


if __name__ == "__main__":
    main()
