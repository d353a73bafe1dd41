"""Fitting parameters to observed moments, with the gradient of the whole run.

    python examples/calibration.py [--small] [--folder runs]

Mean and variance of a mean-field Ornstein-Uhlenbeck process, observed at some times from a system of its own, are all
that is known; κ and σ are searched such that the particles' moments come near them. Each evaluation is a run under the
same noise, differentiated backwards through all its steps. Several seeds tell how far simulation noise moves the
answer; what they have in common is the error of the one observation. Last, the gradient is compared with difference
quotients. Prints all this, and writes runs/calibration.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
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
from mfsde.scenarios import MeanFieldOU

OPEN = {"fillstyle": "none"}
BLUE, VERMILLION, GREY = "#0072B2", "#D55E00", "#777777"
TRUTH = MeanFieldOU(kappa=1.3, coupling=0.5, sigma=0.6, initial_mean=(1.0,), initial_variance=0.2)
START = replace(TRUTH, kappa=0.4, sigma=1.2)
FITTED = ("kappa", "sigma")
GRID: dict[str, Any] = {"horizon": 2.0, "dt": 0.02, "dtype": torch.float64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a few seconds: fewer particles and seeds")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where the picture goes")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    n, seeds = (200, range(3)) if options.small else (2000, range(8))

    observed = mfsde.simulate(
        TRUTH, n_particles=n, seed=1000, save_every=10, keep_particles=0, observables=("mean", "covariance"), **GRID
    )
    settings = {"n_particles": n, "n_replicas": 2, "times": observed.time.values[1:], **GRID}
    fits = [
        mfsde.fit(misfit(observed), START, FITTED, seed=seed, bounds={"sigma": (0.01, None)}, **settings)
        for seed in seeds
    ]
    report(observed, fits)
    compare_with_quotients(observed, settings)
    draw(observed, fits, options.folder / "calibration.png")


def misfit(observed: xr.Dataset) -> Callable[..., torch.Tensor]:
    """(t, x, mu) -> squared deviations of mean and variance from those observed at t, for each replica."""

    def objective(t: float, x: torch.Tensor, mu: mfsde.EmpiricalMeasure) -> torch.Tensor:
        seen = observed.sel(time=t, method="nearest").isel(replica=0)
        mean, variance = mu.mean()[..., 0, 0], mu.covariance()[..., 0, 0]
        return (mean - float(seen["mean"].squeeze())) ** 2 + (variance - float(seen["covariance"].squeeze())) ** 2

    return objective


def report(observed: xr.Dataset, fits: list[tuple[MeanFieldOU, xr.Dataset]]) -> None:
    print("seed   κ        σ        evaluations  misfit")
    for seed, (fitted, history) in enumerate(fits):
        last = float(history["value"].min())
        print(f"{seed:4d}   {fitted.kappa:.4f}   {fitted.sigma:.4f}   {history.sizes['evaluation']:11d}  {last:.2e}")
    found = np.array([[fitted.kappa, fitted.sigma] for fitted, _ in fits])
    for name, column in zip(FITTED, found.T, strict=True):
        mean, error = column.mean(), column.std(ddof=1) / len(column) ** 0.5
        print(f"{name:6s} {mean:.4f} ± {error:.4f} (simulation), truth {getattr(TRUTH, name)}")


def compare_with_quotients(observed: xr.Dataset, settings: dict[str, Any]) -> None:
    """The gradient at the start beside central difference quotients under the same noise."""

    def value(scenario: MeanFieldOU) -> float:
        return float(mfsde.differentiate(misfit(observed), scenario, FITTED, seed=0, **settings)["value"].mean())

    gradient = mfsde.differentiate(misfit(observed), START, FITTED, seed=0, **settings)
    for name in FITTED:
        ends = [value(replace(START, **{name: getattr(START, name) + step})) for step in (1e-5, -1e-5)]
        quotient, slope = (ends[0] - ends[1]) / 2e-5, gradient.sel(parameter=name)
        told = f"{float(slope['gradient']):.8f} ± {float(slope['stderr']):.4f}"
        print(f"d misfit/d {name:6s} {told}, difference quotient {quotient:.8f}")


def draw(observed: xr.Dataset, fits: list[tuple[MeanFieldOU, xr.Dataset]], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    times = np.linspace(0, GRID["horizon"], 101)
    for scenario, color, label in ((START, GREY, "start"), (fits[0][0], BLUE, "fitted")):
        laws = [scenario.limit(t) for t in times]
        left.plot(times, [float(law.mean[0]) for law in laws], color=color, label=f"mean, {label}")
        left.plot(times, [float(law.cov[0, 0]) for law in laws], "--", color=color, label=f"variance, {label}")
    options = {"color": VERMILLION, "linestyle": "none", "markersize": 4, "zorder": 3}
    left.plot(observed.time, observed["mean"].squeeze(), "o", label="mean, observed", **options)
    left.plot(observed.time, observed["covariance"].squeeze(), "s", label="variance, observed", **options | OPEN)
    left.set(xlabel="t", title="observed moments and the fitted limit")
    left.set_ylim(top=1.5)
    left.legend(fontsize=8, frameon=False, ncols=3, loc="upper right", columnspacing=1.0, handlelength=1.5)

    for k, (_, history) in enumerate(fits):
        label = "evaluations of a fit" if k == 0 else None
        right.plot(*history["parameters"].values.T, ".-", color=BLUE, alpha=0.35, linewidth=0.8, label=label)
    right.plot(
        *zip(*[(f.kappa, f.sigma) for f, _ in fits], strict=True),
        "o",
        color=BLUE,
        markersize=4,
        label="fits, one a seed",
    )
    cross = {"color": VERMILLION, "markersize": 12, "markeredgewidth": 2, "zorder": 4}
    right.plot(TRUTH.kappa, TRUTH.sigma, "+", label="truth", **cross)
    right.set(xlabel="κ", ylabel="σ", title="paths of the search")
    right.legend(fontsize=8, frameon=False)
    for ax in (left, right):
        ax.title.set_fontsize(10)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"  drew {path}")


if __name__ == "__main__":
    main()
