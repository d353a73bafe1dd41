"""Montanari, One lecture on two-layer neural networks (2018), figure 6.3: a non-monotone activation, SGD on the limit.

Two isotropic Gaussians N(0, (1 ± Δ)² I) told apart by a two-layer network whose activation falls before it rises.
Weights that start small die: all norms reach 0 and stay, at the risk of f = σ(0). Larger ones reach the minimum.
Symbols: population risk along SGD, on 2000 fresh samples of each label, and in the inset the mean of |w|. Curves: the
limit, the PDE (5.4) for the law of |w|, whose wall r = 0 is not stepped through.

The document's: Δ = 0.5, d = 320, N = 800, w from N(0, κ²/d I), κ = 0.1 and 0.4. Ours: the activation, not given there,
with knots (0, -2.5), (½, -4), (3/2, 7.5); ε = 1e-6 by batches of 100 samples with steps of 1e-4. Convention: t = kε,
s_k = ε/2. If the caption's ε is s_k itself, its t is half of ours.

    python examples/figure_non_monotone.py [--small] [--folder runs]
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
from torch import Tensor

import mfsde
from mfsde import limit
from mfsde.scenarios import IsotropicGaussians, OnlineGaussians

KAPPAS = {0.1: ("#D55E00", "o"), 0.4: ("#0072B2", "s")}
DRAWN = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 80, 130, 200, 300)  # frames


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a few seconds: N = 60, d = 80, larger steps, to t = 0.1")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where the picture goes")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)

    n, d, dt, horizon, nodes = (60, 80, 1e-3, 0.1, 8) if options.small else (800, 320, 1e-4, 1.5, 64)
    figure, ax = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    inset = ax.inset_axes((0.56, 0.34, 0.42, 0.36))
    for kappa, (colour, marker) in KAPPAS.items():
        shape = IsotropicGaussians.non_monotone(kappa)
        case = OnlineGaussians(shape.delta, d, kappa, shape.left_value, shape.knots, shape.jumps, batch_size=100)
        run = mfsde.simulate(
            case, n_particles=n, horizon=horizon, dt=dt, seed=0, save_every=round(0.005 / dt), method="sgd"
        )
        run = run.isel(time=[k for k in DRAWN if k < run.sizes["time"]])
        risk = [sampled_risk(case, torch.from_numpy(x)) for x in run["position"].values[:, 0]]
        times = np.concatenate([np.linspace(0, 0.05, 26), np.geomspace(0.055, horizon, 60)])
        law = limit.characteristics(case.reduced, times, n_nodes=nodes)
        ax.plot(times, 2 * law["energy"], color=colour, linewidth=1.6)
        ax.plot(run.time, risk, marker, color=colour, markersize=4.5, label=f"κ = {kappa}")
        inset.plot(times, law["mean"].isel(component=0), color=colour, linewidth=1.3)
        inset.plot(run.time, run["norm"].isel(replica=0), marker, color=colour, markersize=3)
        report(kappa, run, risk, law)
    for axes in (ax, inset):
        axes.set(xscale="log", xlim=(0.004, horizon * 1.1))
        axes.spines[["top", "right"]].set_visible(False)
    inset.set_xlabel("t", fontsize=8, labelpad=0)
    inset.set_title("mean of |w|", fontsize=8)
    inset.tick_params(labelsize=7)
    ax.set(xlabel="time t = kε", ylabel="population risk E (y − f)²", ylim=(0, 8.2))
    ax.set_title(
        f"Δ = 0.5, d = {d}, N = {n}; $s_k$ = ε/2, ε = {dt / 100:g}; symbols SGD, curves the limit", fontsize=10
    )
    ax.legend(fontsize=8, frameon=False, loc="lower left")
    keep(figure, options.folder / "non-monotone.png")


def sampled_risk(case: OnlineGaussians, weights: Tensor, n: int = 2000) -> float:
    """½ Σ_y E ((y - f)² | y) over n fresh samples of each label."""
    g = torch.randn(n, case.data_dim, generator=torch.Generator().manual_seed(1), dtype=weights.dtype)
    risk = 0.0
    for y in (1.0, -1.0):
        f = case.activation((1 + y * case.delta) * g @ weights.mT)[0].mean(-1)
        risk += 0.5 * float((y - f).square().mean())
    return risk


def report(kappa: float, run: xr.Dataset, risk: list[float], law: xr.Dataset) -> None:
    """The last risk and mean norm, of SGD and in the limit, and when the limit's norms are all 0."""
    end = law.isel(time=-1)
    print(
        f"κ = {kappa}, t = {float(run.time[-1]):.2f}: risk {risk[-1]:.4f} (limit {2 * float(end['energy']):.4f}), "
        f"mean norm {float(run['norm'][-1, 0]):.4f} (limit {float(end['mean'][0]):.4f})"
    )
    dead = law.time.values[(law["position"] == 0).all(("replica", "particle", "component")).values]
    if len(dead):
        print(f"  in the limit all norms are 0 from t = {dead[0]:.3f} on")


def keep(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"  drew {path}")


if __name__ == "__main__":
    main()
