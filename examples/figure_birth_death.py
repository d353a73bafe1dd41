"""Births and deaths against plain descent, from a good and a bad start: a mixture of Gaussians is learnt.

    python examples/figure_birth_death.py [--small] [--folder runs]

Rotskoff, Mean-field neural networks (2020), birth-death dynamics (37), and the example of Rotskoff, Jelassi, Bruna,
Vanden-Eijnden, Global convergence of neuron birth-death dynamics (2019): f = ⅓[N(-2, ½) - 2N(0, 1) + N(2, ½)], units
c N(x; y, ½), n = 200, y₀ ~ U(-2, 2) or y₀ ~ N(-2, 0.1²). Ours: α = 1, c ~ N(0, 1), reinjection at rate 0.01 from
N(0, 1) × N(0, 4), times and replicas. Above the losses with the range over replicas; below f_n at the end against f.
From the bad start births and deaths alone stay where descent does, near the stationary network of two units: in these
runs escape needs reinjection. Writes birth-death.png.
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
from mfsde.scenarios import GaussianMixture
from mfsde.verification.birth_death import target

BLUE, ORANGE, VERMILLION = "#0072B2", "#E69F00", "#D55E00"
MEMBERS = (
    ("descent", {"alpha": 0.0}, BLUE, "-"),
    ("births and deaths", {"alpha": 1.0}, VERMILLION, "--"),
    ("with reinjection", {"alpha": 1.0, "reinjection_rate": 0.01}, ORANGE, "-"),
)
STARTS = (("uniform", "good start, y₀ ~ U(−2, 2)"), ("left", "bad start, y₀ ~ N(−2, 0.1²)"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a few seconds: fewer neurons and replicas")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where the picture goes")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)

    n, n_replicas, horizon = (60, 3, 16.0) if options.small else (200, 4, 60.0)
    figure, axes = plt.subplots(2, 2, figsize=(9, 5.6), layout="constrained", sharex="row", sharey="row")
    x = np.linspace(-5, 5, 401)
    for (above, below), (start, title) in zip(axes.T, STARTS, strict=True):
        below.plot(x, target(x), color="black", linewidth=3, alpha=0.3, label="f")
        for name, fields, colour, line in MEMBERS:
            case = GaussianMixture(initial_places=start, **fields)
            run = mfsde.simulate(
                case, n_particles=n, n_replicas=n_replicas, horizon=horizon, dt=0.2, seed=0, save_every=5
            )
            loss = run["loss"]
            above.semilogy(loss["time"], loss.mean("replica"), line, color=colour, label=name)
            above.fill_between(loss["time"], loss.min("replica"), loss.max("replica"), color=colour, alpha=0.2, lw=0)
            c, y = run["position"].isel(time=-1, replica=0).transpose("component", "particle").values
            network = (c * np.exp(-((x[:, None] - y) ** 2))).mean(-1) / np.sqrt(np.pi)
            below.plot(x, network, line, color=colour, label=name)
            end = loss.isel(time=-1)
            error = float(end.std("replica", ddof=1)) / n_replicas**0.5
            print(f"{title}, {name}: loss at t = {horizon:g} is {float(end.mean()):.2g} ± {error:.1g} (s.e.)")
        above.set(title=f"{title}, n = {n}", xlabel="t")
        above.title.set_fontsize(10)
        below.set(xlabel="x")
    axes[0, 0].set_ylabel("loss ½∫(f − f_n)² dx")
    axes[1, 0].set_ylabel(f"f_n(x), t = {horizon:g}")
    axes[0, 0].legend(fontsize=8, frameon=False)
    axes[1, 0].legend(fontsize=8, frameon=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    path = options.folder / "birth-death.png"
    figure.savefig(path, dpi=110)
    print(f"drew {path}")


if __name__ == "__main__":
    main()
