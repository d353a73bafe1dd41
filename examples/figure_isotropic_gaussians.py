"""Montanari, One lecture on two-layer neural networks (2018), figure 6.1: radial law of SGD on the limit's densities.

Two isotropic Gaussians N(0, (1 ± Δ)² I) told apart by a two-layer network with a monotone, piecewise linear activation.
Histograms: the norms |w_i| of one run of SGD. Curves: the density of |w| in the limit, the PDE (5.4), from its
characteristics: φ(z) dz/dr along the quantiles r(z).

The document's: Δ = 0.8, d = 40, N = 800, ρ₀ = N(0, 0.8²/d I), knots ½ and 1½, values -2.5 and 7.5. Ours: the times, and
ε = 1e-5 in place of 1e-6, which is ten times as many steps. Convention: t = kε, s_k = ε/2. If the caption's ε is s_k
itself, its t is half of ours.

The narrow peak near |w| = 0.1 at t = 10 is the limit's: where |w| is small, ⟨w, x⟩ < ½ for nearly all x, σ is constant
there and norms that fall hardly move any more. Its share, P(|w| < ¼), is 0.018 in the limit and printed for both.

    python examples/figure_isotropic_gaussians.py [--small] [--folder runs]
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
from mfsde.analysis import wasserstein
from mfsde.limit.characteristics import FARTHEST
from mfsde.scenarios import OnlineGaussians

BLUE, VERMILLION = "#0072B2", "#D55E00"
SHOWN = (0.0, 0.5, 2.0, 5.0, 7.5, 10.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a few seconds: fewer neurons, larger steps, to t = 2")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where the picture goes")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)

    # Small: the first fifth of the time.
    n, eps, unit, nodes = (200, 4e-4, 0.2, 128) if options.small else (800, 1e-5, 1.0, 512)
    case, times = OnlineGaussians(), [unit * t for t in SHOWN]
    run = mfsde.simulate(
        case, n_particles=n, horizon=times[-1], dt=eps, seed=0, save_every=round(0.5 * unit / eps), method="sgd"
    )
    law = limit.characteristics(case.reduced, times, n_nodes=nodes)

    figure, axes = plt.subplots(2, 3, figsize=(9, 5), sharex=True, layout="constrained")
    print("    t   W₂ of radial laws   of N independent norms   risk: SGD    limit")
    for ax, t in zip(axes.flat, times, strict=True):
        frame = run.sel(time=t, method="nearest")
        norms = np.linalg.norm(frame["position"].values[0], axis=-1)
        r, density = density_of(law.sel(time=t))
        ax.hist(norms, bins=np.linspace(0, 5, 61), density=True, color=BLUE, alpha=0.45, label=f"SGD, N = {n}")
        ax.plot(r, density, color=VERMILLION, linewidth=1.8, label="limit")
        ax.set_title(f"t = {t:g}", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
        report(t, norms, law, frame, 2 * float(law["energy"].sel(time=t)))
    weights = law["weight"].values[-1, 0]
    share = float(weights[law["position"].values[-1, 0, :, 0] < 0.25].sum())
    print(f"P(|w| < ¼) at t = {times[-1]:g}: SGD {np.mean(norms < 0.25):.4f}, limit {share:.4f}")
    axes[0, 0].set_xlim(0, 5)
    axes[0, 0].legend(fontsize=8, frameon=False)
    figure.supxlabel("norm of a weight |w|", fontsize=10)
    figure.supylabel("density", fontsize=10)
    figure.suptitle(f"Δ = {case.delta}, d = {case.data_dim}; t = kε, $s_k$ = ε/2, ε = {eps:g}", fontsize=10)
    keep(figure, options.folder / "isotropic-gaussians.png")


def density_of(law: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Quantiles r(z) of the law and its density φ(z) dz/dr; the flow on the line keeps their order."""
    r = law["position"].values[0, :, 0]
    z = np.linspace(-FARTHEST, FARTHEST, len(r))
    density = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi) / np.gradient(r, z)
    seen = abs(z) < 4.5
    return r[seen], density[seen]


def report(t: float, norms: np.ndarray, law: xr.Dataset, frame: xr.Dataset, risk: float) -> None:
    """Distances of the norms, and of as many independent ones, to the limit; both risks."""
    points = torch.from_numpy(norms.astype(float))[:, None]
    at = limit.law_at(law, t)
    distance = wasserstein.distance(EmpiricalMeasure(points), at)
    u = torch.rand(20, len(norms), 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    floor = np.sqrt(np.mean([wasserstein.distance(EmpiricalMeasure(at.quantile(v)), at) ** 2 for v in u]))
    print(f"{t:5.1f}   {distance:17.4f}   {floor:22.4f}   {float(frame['radial_risk'][0]):9.4f}   {risk:6.4f}")


def keep(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"  drew {path}")


if __name__ == "__main__":
    main()
