"""Montanari, One lecture on two-layer neural networks (2018), figure 6.2: variable selection, SGD and its limit.

Two Gaussians whose first s₀ of d coordinates differ in variance, told apart by a two-layer ReLU network. "+": the
population risk E (y - f)² along SGD, exactly, for each run. Curve: the limit d = ∞, N = ∞, reduced to (a, b, r₁, r₂).
Inset: averages of a, b and r₁ along both.

The document's: d = 320, s₀ = 60, N = 800, ξ(t) = t^{-1/4}, ε = 2e-4. Ours, not given there: Δ = 0.8, a and b from
N(0, 1), w from N(0, 0.8²/d I), and two runs in place of one for each point. Convention: t = kε, s_k = ε ξ(t)/2. If the
caption's steps s_k are ε ξ(t), its flow is twice as fast.

"+" lies above the curve, by three errors of the first order that are of one size here. At t = 12 runs with each of d, N
and ε halved or doubled around d = 80, N = 200, ε = 2e-3 (8 replicas) have the risk of the limit and, on top,
0.07 (80/d) + 0.04 (εd/0.16) + 0.03 (200/N), where one sample a step makes the second: for the parameters of the
document 0.018 + 0.015 + 0.008. Earlier one run deviates more than that: by 0.03 at t = 4.

    python examples/figure_variable_selection.py [--small] [--folder runs]
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
from mfsde import EmpiricalMeasure, limit
from mfsde.scenarios import OnlineVariableSelection

PALETTE = {"output": ("#0072B2", "a", "o"), "shift": ("#009E73", "b", "s"), "relevant": ("#D55E00", "r₁", "^")}
GREY = "#333333"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a few seconds: fewer neurons, larger steps, d = 80")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where the picture goes")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)

    if options.small:
        case, n, eps = OnlineVariableSelection(data_dim=80, n_relevant=15, offset=1e-2), 100, 1e-2
    else:
        case, n, eps = OnlineVariableSelection(), 800, 2e-4
    run = mfsde.simulate(
        case, n_particles=n, n_replicas=2, horizon=20.0, dt=eps, seed=0, save_every=round(1.0 / eps), method="sgd"
    )
    risk = risks(case, run)
    t = np.geomspace(0.05, 20, 121)
    law = limit.characteristics(case.reduced, [case.clock(v) for v in t], n_nodes=16 if options.small else 48)
    at = limit.characteristics(
        case.reduced, [case.clock(v) for v in run.time.values], n_nodes=16 if options.small else 48
    )
    report(run, risk, at)

    figure, ax = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    ax.plot(t, 2 * law["energy"], color=GREY, linewidth=1.6, label="limit, d = ∞")
    times = np.repeat(run.time.values[:, None], risk.shape[1], 1)
    ax.plot(times, risk, "+", color=PALETTE["output"][0], markersize=6)
    ax.plot([], [], "+", color=PALETTE["output"][0], label=f"SGD, 2 runs, d = {case.data_dim}, N = {n}")
    ax.set(xlabel="time t = kε", ylabel="population risk E (y − f)²", xlim=(0, 20.5), ylim=(0, 1.09))
    ax.set_title(
        f"Δ = {case.delta}, $s_0$ = {case.n_relevant}, $s_k$ = ε ξ(t)/2, ξ = $t^{{-1/4}}$, ε = {eps:g}", fontsize=10
    )
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0.02, 0.02))
    draw_averages(ax.inset_axes((0.47, 0.42, 0.52, 0.5)), run, t, law)
    keep(figure, options.folder / "variable-selection.png")


def risks(case: OnlineVariableSelection, run: xr.Dataset) -> np.ndarray:
    """Population risk at the frames, (T, R)."""
    found = [
        [float(case.risk(EmpiricalMeasure(torch.from_numpy(x).double()))) for x in frame]
        for frame in run["position"].values
    ]
    return np.array(found)


def report(run: xr.Dataset, risk: np.ndarray, at: xr.Dataset) -> None:
    """Risks of the runs and of the limit."""
    print("   t    risk: SGD ± its deviation   limit")
    for k in range(0, len(risk), 4):
        told = f"{risk[k].mean():13.4f} ± {risk[k].std(ddof=1):.4f}"
        print(f"{float(run.time[k]):5.1f} {told}         {2 * float(at['energy'][k]):.4f}")


def draw_averages(ax: plt.Axes, run: xr.Dataset, t: np.ndarray, law: xr.Dataset) -> None:
    """Averages of a, b, r₁: one run on the curves of the limit."""
    for k, (name, (colour, letter, marker)) in enumerate(PALETTE.items()):
        ax.plot(t, law["mean"].isel(component=k), color=colour, linewidth=1.3)
        ax.plot(run.time, run[name].mean("replica"), marker, color=colour, markersize=3, label=f"mean of {letter}")
    ax.set_xlabel("t", fontsize=8, labelpad=0)
    ax.tick_params(labelsize=7)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=7, frameon=False, loc="center right", ncols=1)


def keep(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"  drew {path}")


if __name__ == "__main__":
    main()
