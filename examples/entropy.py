"""Relative entropy and Fisher information of a mean-field Ornstein-Uhlenbeck system on its way to equilibrium.

    python examples/entropy.py [--small] [--folder runs]

Estimates KL(m_t | m_∞) and I(m_t | m_∞) from the particles of all replicas, the density of m_∞ known up to a constant,
prints them beside the Gaussian closed forms with their distance in standard errors, stores runs/entropy.zarr and draws
runs/entropy.png.

Where the closed form falls below a standard error the particles say no more: the estimates are signed and scatter
around what is left of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import xarray as xr

import mfsde
from mfsde.analysis import entropy, plots
from mfsde.scenarios import MeanFieldOU

ORANGE = "#D55E00"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a few seconds: fewer particles")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where results go")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)

    case = MeanFieldOU(kappa=0.7, coupling=1.3, sigma=0.9, initial_mean=(1.5, 0.0), initial_variance=0.4)
    n, r = (500, 16) if options.small else (2500, 20)
    run = mfsde.simulate(case, n_particles=n, n_replicas=r, horizon=4.0, dt=0.005, seed=0, save_every=40)
    found = measured(case, run)
    store = options.folder / "entropy.zarr"
    found.to_zarr(store, mode="w", zarr_format=3, consolidated=False)

    print(table(found))
    print(f"\nlog Z = {found.kl.attrs['log_z']:.10f}, by quadrature to {found.kl.attrs['log_z_stderr']:.0e}")
    figure(found, options.folder / "entropy.png")
    print(f"stored {store}, drew {options.folder / 'entropy.png'}")


def measured(case: MeanFieldOU, run: xr.Dataset) -> xr.Dataset:
    """Estimates from all replicas' particles, their standard errors, and the closed forms."""
    estimates = {
        "kl": entropy.relative(run, case.log_invariant, pooled=True),
        "fisher": entropy.fisher(run, reference=case.log_invariant, degree=1, pooled=True),
    }
    exact = np.array([closed_forms(case, float(t)) for t in run.time.values])
    columns = {name: series.reset_coords("stderr", drop=True) for name, series in estimates.items()}
    columns |= {f"{name}_stderr": series.stderr.drop_vars("stderr") for name, series in estimates.items()}
    columns |= {f"{name}_exact": ("time", exact[:, k]) for k, name in enumerate(estimates)}
    return xr.Dataset(columns)


def closed_forms(case: MeanFieldOU, t: float) -> tuple[float, float]:
    """KL(N(m, v I) | N(0, w I)) and the relative Fisher information."""
    law, w = case.limit(t), case.sigma**2 / (2 * (case.kappa + case.coupling))
    v, square, d = float(law.cov[0, 0]), float(law.mean.square().sum()), law.dim
    kl = 0.5 * (d * (v / w - 1 - np.log(v / w)) + square / w)
    return kl, d * v * (1 / w - 1 / v) ** 2 + square / w**2


def table(found: xr.Dataset) -> str:
    lines = ["  time        KL (nat)     exact  s.e.       Fisher (1)       exact  s.e."]
    for index in range(0, found.sizes["time"], max(1, found.sizes["time"] // 10)):
        now = found.isel(time=index)
        cells = []
        for name in ("kl", "fisher"):
            value, error, exact = (float(now[f"{name}{part}"]) for part in ("", "_stderr", "_exact"))
            cells.append(f"{value:8.4f} ± {error:.4f} {exact:8.4f} {(value - exact) / error:+5.1f}")
        lines.append(f"{float(now.time):6.2f}  " + "   ".join(cells))
    return "\n".join(lines)


def figure(found: xr.Dataset, path: Path) -> None:
    fig, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axes, name in zip(panels, ("kl", "fisher"), strict=True):
        plots.entropy(found[name].assign_coords(stderr=found[f"{name}_stderr"]), ax=axes)
        axes.plot(found.time, found[f"{name}_exact"], color=ORANGE, linestyle="--", label="Gaussian closed form")
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.2 * float(found[f"{name}_stderr"].min()))
        axes.legend(frameon=False, fontsize=8)
    fig.suptitle("Relaxation of a mean-field Ornstein-Uhlenbeck system")
    fig.savefig(path, dpi=130)
    plt.close(fig)


if __name__ == "__main__":
    main()
