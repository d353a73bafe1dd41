"""W₂ to the minimiser contracts exponentially: both exponents of Theorem 5, the printed one where it is false.

    python examples/figure_contraction.py [--small] [--folder runs]

Szpruch, Mean-field Langevin dynamics in the energy landscape of neural networks (2019), Theorem 5:
W₂(m_t, m*) <= e^{(6C_F - C_U)t} W₂(m_0, m*) as printed, without σ²/2. Synchronous coupling proves the exponent
2C_F - σ²C_U/2. At weak attraction the printed bound is crossed although the theorem's condition (4) holds. The document
gives no example; ours: F = ½κ(∫x dm - a)², U = k x²/2 + log √(2π/k), a = 1, k = 4 (C_F = κ, C_U = k),
m_0 = N(2, 0.5), three pairs of κ and σ. Lines are the closed form, symbols particles without their sampling floor,
three standard errors; the exact rate is κ + σ²k/2. Writes contraction.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

import mfsde
from mfsde.analysis import contraction, rates, replicas, wasserstein
from mfsde.scenarios import GaussianLangevin

BLUE, VERMILLION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
CASES = (GaussianLangevin(), GaussianLangevin(kappa=0.01), GaussianLangevin(kappa=0.01, sigma=0.5))
FLOOR = 8e-3  # below it particles are their sampling noise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a few seconds: fewer particles and replicas")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where the picture goes")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)

    figure, panels = plt.subplots(1, len(CASES), figsize=(11, 3.7), layout="constrained", sharey=True)
    for ax, case in zip(panels, CASES, strict=True):
        panel(ax, case, options.small)
    panels[0].set_ylabel("$W_2(m_t, m^*)$")
    path = options.folder / "contraction.png"
    figure.savefig(path, dpi=130)
    print(f"drew {path}")


def panel(ax: plt.Axes, case: GaussianLangevin, small: bool) -> None:
    """One pair of κ and σ."""
    exact_rate = case.kappa + 0.5 * case.sigma**2 * case.stiffness
    horizon = 4.0 / exact_rate
    star = mfsde.limit.gibbs(case)
    minimiser = mfsde.Gaussian([case.kappa / exact_rate], 1 / case.stiffness)
    means = f"mean of m* {float(star.mean):.10f}, its formula {float(minimiser.mean):.10f}"
    print(f"κ = {case.kappa}, σ = {case.sigma}: {means}")
    times = np.linspace(0, horizon, 121)
    distance = np.array([wasserstein.distance(case.limit(t), minimiser) for t in times])
    ax.plot(times, distance, color=BLUE, label=f"closed form, rate κ + σ²k/2 = {exact_rate:.4g}")

    bounds = contraction.theorem_5(case.kappa, case.stiffness, case.sigma)
    ax.plot(
        times, bounds.bound(times, distance[0]), "--", color=GREEN, label=f"proved: $e^{{{bounds.corrected:.4g}\\,t}}$"
    )
    printed = bounds.bound(times, distance[0], "printed")
    is_false = (distance > printed * (1 + 1e-9)).any()
    label = f"printed: $e^{{{bounds.printed:.4g}\\,t}}${', false' if is_false else ''}"
    ax.plot(times, printed, ":", color=VERMILLION, linewidth=2, label=label)

    run = mfsde.simulate(
        case, n_particles=400 if small else 2000, n_replicas=10 if small else 40, horizon=horizon, dt=horizon / 800,
        seed=0, save_every=40,
    )  # fmt: skip
    measured = wasserstein.to_law(run, minimiser)
    # The variance relaxes faster than the mean; after it has, one exponential is left.
    rate = rates.exponential(measured, start=0.8 / exact_rate)
    squares = replicas.mean_and_error(measured["unbiased"].reset_coords(drop=True))
    shown = squares.values > 3 * squares["stderr"].values
    root = np.sqrt(squares.values[shown])
    error = 3 * squares["stderr"].values[shown] / (2 * root)
    told = f"{run.sizes['particle']} particles, rate {rate.value:.3f} ± {(rate.high - rate.low) / 2:.2g}"
    ax.errorbar(
        squares["time"].values[shown], root, error, color="black", marker="o", mfc="none", linestyle="none",
        markersize=4, capsize=2, elinewidth=1, label=told,
    )  # fmt: skip
    told = f"(4) {'holds' if bounds.condition_holds else 'fails'}"
    ax.set(xlabel="t", yscale="log", ylim=(FLOOR, 20.0), title=f"κ = {case.kappa}, σ = {case.sigma:g}; {told}")
    ax.title.set_fontsize(10)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, frameon=False, loc="upper right")
    for form in ("corrected", "printed"):
        t = 1.0 / exact_rate
        later = wasserstein.distance(case.limit(t), minimiser)
        print(f"  {contraction.contraction_check(bounds, t, later, float(distance[0]), form=form)}")
    print(f"  rate of particles {rate}")


if __name__ == "__main__":
    main()
