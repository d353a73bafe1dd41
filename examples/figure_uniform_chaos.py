"""Propagation of chaos that is uniform in time, and one that is not.

    python examples/figure_uniform_chaos.py [--small] [--folder runs]

Szpruch, Mean-field Langevin dynamics in the energy landscape of neural networks (2019), Outlook (i). N particles and
their independent copies X̄^i, each a solution of the limit driven by the same noise: on the left the largest
E|X^{i,N} - X̄^i|² over all times against N, with the fitted power and its 95 % interval; on the right the error against
time for several N. With confinement (κ = 1) it stays, without (κ = 0) it grows like the variance of a wandering mean.
The document gives no example; ours: the mean-field Ornstein-Uhlenbeck process dX = -(κX + α(X - E X)) dt + σ dW,
α = 0.5, σ = 0.7, m_0 = N(0, 1). Lines are the exact error of the scheme: all particles of a replica differ from their
copies by one D, D' = -κD + αM with M the mean of the copies. Writes uniform-chaos.png.
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
from mfsde.analysis import chaos, rates, replicas
from mfsde.scenarios import MeanFieldOU

BLUE, SKY, GREEN, VERMILLION, GREY = "#0072B2", "#56B4E9", "#009E73", "#D55E00", "#777777"
CONFINED = MeanFieldOU(kappa=1.0, coupling=0.5, sigma=0.7, initial_mean=(0.0,), initial_variance=1.0)
FREE = replace(CONFINED, kappa=0.0)
SETTINGS: dict[str, Any] = {"horizon": 20.0, "dt": 0.05, "seed": 0, "save_every": 20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a few seconds: fewer replicas and sizes")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where the picture goes")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)

    sizes = (25, 50, 100) if options.small else (25, 50, 100, 200, 400)
    n_replicas = 40 if options.small else 300
    confined = {n: errors_of(CONFINED, n, n_replicas) for n in sizes}
    free = {n: errors_of(FREE, n, n_replicas) for n in sizes}
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    against_size(left, confined, free)
    against_time(right, confined, free)
    path = options.folder / "uniform-chaos.png"
    figure.savefig(path, dpi=130)
    print(f"drew {path}")


def errors_of(case: MeanFieldOU, n: int, n_replicas: int) -> xr.DataArray:
    """E|X^{i,N} - X̄^i|², (time, replica)."""
    run = mfsde.simulate(case, n_particles=n, n_replicas=n_replicas, **SETTINGS)
    copies = mfsde.simulate(mfsde.decoupled(case, case.limit), n_particles=n, n_replicas=n_replicas, **SETTINGS)
    return chaos.squared_error(run, copies).compute()


def of_scheme(case: MeanFieldOU, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Times and E D² of the Euler scheme: second moments of (M, D), M' = -(κ+α)M + noise of variance σ²/N."""
    h, steps = SETTINGS["dt"], round(SETTINGS["horizon"] / SETTINGS["dt"])
    rate = case.kappa + case.coupling
    advance = np.array([[1 - h * rate, 0.0], [h * case.coupling, 1 - h * case.kappa]])
    second = np.diag([case.initial_variance / n, 0.0])
    found = [0.0]
    for _ in range(steps):
        second = advance @ second @ advance.T + np.diag([h * case.sigma**2 / n, 0.0])
        found.append(second[1, 1])
    return h * np.arange(steps + 1), np.array(found)


def against_size(ax: plt.Axes, confined: dict[int, xr.DataArray], free: dict[int, xr.DataArray]) -> None:
    """The largest error over the times against N."""
    sizes = np.array(list(confined))
    rows = ((confined, CONFINED, BLUE, "o", "κ = 1"), (free, FREE, VERMILLION, "s", "κ = 0"))
    for errors, case, colour, marker, told in rows:
        # At the time at which the exact error is largest: a maximum of estimates would lie above it.
        times, exact = of_scheme(case, int(sizes[0]))
        saved = errors[int(sizes[0])]["time"].values
        worst = float(saved[np.interp(saved, times, exact).argmax()])
        table = xr.concat(
            [errors[n].sel(time=worst).drop_vars("n_particles", errors="ignore") for n in sizes], "n_particles"
        )
        table = table.assign_coords(n_particles=sizes)
        slope = rates.power(table)
        mean = replicas.mean_and_error(table)
        half = (slope.high - slope.low) / 2
        label = f"{told}: power {slope.value:.2f} ± {half:.2g}"
        style = {"linestyle": "none", "marker": marker, "mfc": "none", "capsize": 3}
        ax.errorbar(sizes, mean, 3 * mean["stderr"], color=colour, label=label, **style)
        ax.plot(sizes, exact.max() * sizes[0] / sizes, color=colour, linewidth=1.2)
        print(f"{told}, t = {worst:g}: E|X^(i,N) - X̄^i|² ~ N^p, p = {slope}")
        print(
            "  N · error:",
            ", ".join(f"{n * float(m):.4f} ± {n * float(m.stderr):.4f}" for n, m in zip(sizes, mean, strict=True)),
        )
        print(f"  exact:     {exact.max() * sizes[0]:.4f}")
    ax.set(xlabel="N", ylabel=r"$\max_{t\leq 20}\; E|X^{i,N}_t-\bar{X}^i_t|^2$", xscale="log", yscale="log")
    ax.set_xticks(sizes, [str(n) for n in sizes])
    ax.minorticks_off()
    tidy(ax)


def against_time(ax: plt.Axes, confined: dict[int, xr.DataArray], free: dict[int, xr.DataArray]) -> None:
    """The error against time, for the smallest, a middle and the largest N."""
    sizes = list(confined)
    chosen = [sizes[0], sizes[len(sizes) // 2], sizes[-1]]
    for n, colour in zip(chosen, (BLUE, GREEN, SKY), strict=True):
        curve(ax, CONFINED, confined[n], n, colour, "o", f"κ = 1, N = {n}")
    for n, style in zip((chosen[0], chosen[-1]), ("s", "D"), strict=True):
        curve(ax, FREE, free[n], n, VERMILLION, style, f"κ = 0, N = {n}")
    growth = chaos.uniform_in_time(confined[chosen[0]])
    print(f"κ = 1, N = {chosen[0]}: growth rate over the second half {growth}")
    ax.set(xlabel="t", ylabel=r"$E|X^{i,N}_t-\bar{X}^i_t|^2$", yscale="log", ylim=(4e-7, None))
    tidy(ax, "lower right")


def curve(ax: plt.Axes, case: MeanFieldOU, errors: xr.DataArray, n: int, colour: str, marker: str, label: str) -> None:
    times, exact = of_scheme(case, n)
    ax.plot(times[1:], exact[1:], color=colour, linewidth=1.2)
    mean = replicas.mean_and_error(errors.isel(time=slice(1, None)))
    style = {"linestyle": "none", "marker": marker, "mfc": "none", "markersize": 4, "capsize": 2, "elinewidth": 1}
    ax.errorbar(mean["time"], mean, 3 * mean["stderr"], color=colour, label=label, **style)


def tidy(ax: plt.Axes, place: str = "best") -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, frameon=False, loc=place, ncols=1 + (place != "best"))


if __name__ == "__main__":
    main()
