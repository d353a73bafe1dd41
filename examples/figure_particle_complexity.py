"""How many particles a particle gradient flow needs, beside convex minimisation on a grid.

    python examples/figure_particle_complexity.py [--small] [--folder runs]

After figure 3 of Chizat, Bach, On the global convergence of gradient descent for over-parameterized models using
optimal transport (2018), as shown in the review of Yang and Goulbourne (Cambridge, 2020): excess loss at convergence
against the number of particles m, for sparse deconvolution on the torus, a network of sigmoid units and one of ReLU
units. Every trial draws m particles; the flow moves them, and the convex problem keeps their places as a fixed grid and
finds the best amplitudes (duality gap at most 1e-10 of the loss). The vertical line is m₀, the number of atoms of the
minimiser over all places, whose own gap is at most 1e-10.

The document gives no parameters; all are ours. Spikes: five on a circle of length 24, frequencies to 7, λ = 0.1,
t = 200. Sigmoid: 4 planted units of |θ| = 4 in the plane, 100 data, |θ| <= 4, V = λ|w|, λ = 0.01, t = 5000. ReLU: 3
planted units in the plane, expectation over N(0, I), V = λ|w||θ|, λ = 0.01, t = 2000. Losses below 1e-10 are drawn at
1e-10; those between, of many particles, still fall at the end. Prints medians over the trials, and writes
runs/particle-complexity.png.
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

from mfsde.verification.descent import Planted, complexity, relu, sigmoid, spikes

BLUE, VERMILLION, GREY = "#0072B2", "#D55E00", "#777777"
FLOOR = 1e-10  # what the certified minimum is known to
TITLES = {"spikes": "sparse deconvolution", "sigmoid": "sigmoid network", "ReLU": "ReLU network"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a few seconds: fewer particles, trials and steps")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where the picture goes")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    # Arrays of a few hundred particles are too small to be worth dividing among threads.
    torch.set_num_threads(1)

    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.5), layout="constrained", sharey=True)
    for problem, ax in zip((spikes(), sigmoid(), relu()), axes, strict=True):
        panel(problem, ax, options.small)
    axes[0].set(ylabel="excess loss at convergence", ylim=(FLOOR / 3, 10))
    axes[1].legend(fontsize=8, edgecolor="none", framealpha=1.0, loc="lower left")
    keep(figure, options.folder / "particle-complexity.png")


def panel(problem: Planted, ax: plt.Axes, small: bool) -> None:
    """One problem: trials as points, medians as lines."""
    sizes = (2, 12) if small else (1, 2, 3, 4, 6, 8, 12, 20, 32, 56, 100)
    if small:
        problem = replace(problem, horizon=problem.horizon / 10)
    table = complexity(problem, sizes, 2 if small else 8)
    print(f"{problem.name}: minimum {problem.least.objective:.8f}, gap {problem.least.gap:.0e}, m₀ = {problem.n_atoms}")
    print("   m   flow      grid   (medians)")
    for name, colour, marker, label in (
        ("flow", BLUE, "o", "particle gradient flow"),
        ("grid", VERMILLION, "s", "convex minimisation on the grid"),
    ):
        values = np.maximum(table[name].transpose("replica", "n_particles").values, FLOOR)
        ax.plot(sizes, values.T, marker, color=colour, markersize=3, alpha=0.35, linestyle="none")
        ax.plot(sizes, np.median(values, axis=0), color=colour, linewidth=1.8, label=label)
    for m in sizes:
        flow, grid = (float(table[name].sel(n_particles=m).median()) for name in ("flow", "grid"))
        print(f"{m:4d}   {flow:.2e}  {grid:.2e}")
    ax.axvline(problem.n_atoms, color=GREY, linestyle=":", linewidth=1.4)
    ax.annotate(f" m₀ = {problem.n_atoms}", (problem.n_atoms, 3.0), color=GREY, fontsize=8)
    ax.set(xscale="log", yscale="log", xlabel="number of particles m")
    ax.set_title(TITLES[problem.name], fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)


def keep(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"  drew {path}")


if __name__ == "__main__":
    main()
