"""E(t) ≤ C/t is attained by births and deaths alone; with transport the decay is exponential.

    python examples/figure_convergence_rate.py [--small] [--folder runs]

Rotskoff, Mean-field neural networks (2020), (38): E(t) = E[μ_t] - E[μ_*] ≤ C/t for the birth-death dynamics (37). The
document gives no example; ours is V = kx²/2, k = 1, α = 2, from N(0.5, 1), where laws stay Gaussian:
m' = -km(1 + αv), v' = -2kv - αkv² with both, E = ½k(v + m²). Curves are closed forms of births and deaths alone, of
transport alone and of both, symbols are particles with 3 standard errors over replicas (ours: N and R as printed), the
guide is 1/(2αt). Writes convergence-rate.png.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

import mfsde
from mfsde.verification.birth_death import Quadratic

BLUE, VERMILLION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
PURE = Quadratic(alpha=2.0, speed=0.0, centre=0.5, variance=1.0)
# Shown until E has fallen to here.
LOWEST = 2e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a few seconds: fewer particles, an earlier end")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where the picture goes")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)

    n, n_replicas, last = (500, 8, 8.0) if options.small else (4000, 64, 32.0)
    members = (
        ("births and deaths alone", PURE, last, BLUE, "o"),
        ("transport alone", replace(PURE, alpha=0.0, speed=1.0), 5.5, VERMILLION, "s"),
        ("both", replace(PURE, speed=1.0), 5.5, GREEN, "^"),
    )
    figure, ax = plt.subplots(figsize=(5.4, 3.9), layout="constrained")
    times = np.geomspace(0.05, 100.0, 400)
    ax.loglog(times, 0.5 / (PURE.alpha * times), ":", color=GREY, label="1/(2αt)")
    for name, case, horizon, colour, marker in members:
        exact = case.excess(times)
        shown = exact > LOWEST
        ax.loglog(times[shown], exact[shown], color=colour, label=f"{name}, closed form")
        # Transport by Runge-Kutta: Euler's own rate would be visible beside these errors.
        dt = 0.01 if case.speed and not options.small else 0.02
        run = mfsde.simulate(
            case, n_particles=n, n_replicas=n_replicas, horizon=horizon, dt=dt, seed=3, save_every=round(0.1 / dt),
            keep_particles=0, observables=("energy",), method="dopri5+jumps",
        )["energy"]  # fmt: skip
        wanted = np.geomspace(0.1, horizon, 10)
        at = run.sel(time=wanted, method="nearest")
        values, error = at.mean("replica").values, at.std("replica", ddof=1).values / np.sqrt(n_replicas)
        style = {"color": colour, "mfc": "none", "markersize": 5, "capsize": 2}
        ax.errorbar(at["time"], values, 3 * error, fmt=marker, label=f"{name}, N = {n}, R = {n_replicas}", **style)
        end = float(at["time"][-1])
        print(
            f"{name}: E({end:.1f}) = {values[-1]:.3g} ± {3 * error[-1]:.1g}, closed form {float(case.excess(end)):.3g}"
        )
    ax.set(xlabel="t", ylabel="E(t)", ylim=(LOWEST, 6.0), title="energy above its minimum, V = kx²/2")
    ax.title.set_fontsize(10)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=7, frameon=False, loc="lower left")
    path = options.folder / "convergence-rate.png"
    figure.savefig(path, dpi=130)
    print(f"drew {path}")


if __name__ == "__main__":
    main()
