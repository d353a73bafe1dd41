"""The free energy falls by exactly its dissipation: Theorem 3 in closed form, on a grid and by particles.

    python examples/figure_dissipation.py [--small] [--folder runs]

Szpruch, Mean-field Langevin dynamics in the energy landscape of neural networks (2019), Theorem 3:
V(m_t) - V(m_s) = -∫_s^t ∫ |D_mF + (σ²/2) ∇m/m + (σ²/2) ∇U|² dm dr. On the left V(m_t) three times (closed form,
Fokker-Planck equation, particles), and V(m_0) less the dissipation that particles have spent until t; on the right
-dV/dt against the dissipation. The document gives no example; ours, in which laws stay Gaussian: F = ½κ(∫x dm - a)²,
U = k x²/2 + log √(2π/k), κ = 0.3, a = 1, k = 4, σ = 1, m_0 = N(2, 0.5). Writes dissipation.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import xarray as xr

import mfsde
from mfsde import limit
from mfsde.analysis import replicas, theory
from mfsde.scenarios import GaussianLangevin

BLUE, ORANGE, VERMILLION, GREEN, GREY = "#0072B2", "#E69F00", "#D55E00", "#009E73", "#777777"
HORIZON = 1.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a few seconds: fewer particles and replicas")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where the picture goes")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)

    langevin = GaussianLangevin()
    n, n_replicas = (300, 8) if options.small else (4000, 32)
    run = mfsde.simulate(
        langevin, n_particles=n, n_replicas=n_replicas, horizon=HORIZON, dt=0.0025, seed=0, save_every=10
    )
    density = limit.fokker_planck(langevin, None, np.linspace(0, HORIZON, 16))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    free_energy(left, langevin, run, density)
    rate_of_change(right, langevin, run, density)
    path = options.folder / "dissipation.png"
    figure.savefig(path, dpi=130)
    print(theory.free_energy_dissipation(langevin, langevin.limit, start=0.0, stop=HORIZON))
    print(theory.free_energy_dissipation(langevin, run, law=langevin.limit))
    print(f"drew {path}")


def free_energy(ax: plt.Axes, langevin: GaussianLangevin, run: xr.Dataset, density: xr.Dataset) -> None:
    """V(m_t), and V(m_0) less what has been spent."""
    times = np.linspace(0, HORIZON, 151)
    ax.plot(times, [theory.free_energy(langevin, langevin.limit(t)) for t in times], color=BLUE, label="closed form")
    ax.plot(density["time"], density["free_energy"], "o", color=GREEN, mfc="none", label="Fokker–Planck")
    values, spent = theory.free_energy(langevin, run), theory.dissipation(langevin, run)
    so_far = spent.cumulative_integrate("time")
    bars(ax, values.isel(time=slice(0, None, 4)), VERMILLION, "s", f"{run.sizes['particle']} particles")
    bars(
        ax,
        (values.isel(time=0) - so_far).isel(time=slice(2, None, 4)),
        ORANGE,
        "x",
        "$V(m_0)-\\int$ dissipation, particles",
    )
    lowest = theory.free_energy(langevin, limit.gibbs(langevin))
    ax.axhline(lowest, color=GREY, linestyle=":", label=f"$V(m^*)$ = {lowest:.4f}")
    ax.set(xlabel="t", ylabel="free energy $V(m_t)$", ylim=(0, None))
    tidy(ax)
    gap = replicas.mean_and_error((values.isel(time=0) - so_far - values).isel(time=-1))
    print(f"V(m_0) - ∫ dissipation - V(m_t) at t = {HORIZON}, particles: {float(gap):.4f} ± {float(gap.stderr):.4f}")


def rate_of_change(ax: plt.Axes, langevin: GaussianLangevin, run: xr.Dataset, density: xr.Dataset) -> None:
    """-dV/dt by differences of the closed form, and the dissipation."""
    times, h = np.linspace(1e-3, HORIZON, 151), 1e-4
    slope = [-(free(langevin, t + h) - free(langevin, t - h)) / (2 * h) for t in times]
    ax.plot(times, slope, color=BLUE, label="−dV/dt, closed form")
    ax.plot(density["time"], density["dissipation"], "o", color=GREEN, mfc="none", label="dissipation, Fokker–Planck")
    spent = theory.dissipation(langevin, run)
    bars(ax, spent.isel(time=slice(0, None, 4)), VERMILLION, "s", f"dissipation, {run.sizes['particle']} particles")
    ax.set(xlabel="t", ylabel="dissipation", yscale="log")
    tidy(ax)
    exact = theory.dissipation(langevin, langevin.limit(0.5))
    slope_there = -(free(langevin, 0.5 + h) - free(langevin, 0.5 - h)) / (2 * h)
    print(f"t = 0.5: dissipation {exact:.6f}, -dV/dt {slope_there:.6f}")


def free(langevin: GaussianLangevin, t: float) -> float:
    return float(theory.free_energy(langevin, langevin.limit(t)))


def bars(ax: plt.Axes, values: xr.DataArray, colour: str, marker: str, label: str) -> None:
    """Means over replicas, three standard errors to both sides."""
    mean = replicas.mean_and_error(values)
    style = {"linestyle": "none", "markersize": 4, "capsize": 2, "mfc": "none", "elinewidth": 1}
    ax.errorbar(mean["time"], mean, 3 * mean["stderr"], color=colour, marker=marker, label=label, **style)


def tidy(ax: plt.Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, frameon=False)


if __name__ == "__main__":
    main()
