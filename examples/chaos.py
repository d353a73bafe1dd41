"""Propagation of chaos, measured: N particles against independent copies of their mean-field limit.

    python examples/chaos.py [--small] [--folder runs]

Runs the mean-field Ornstein-Uhlenbeck process for N = 25, ..., 800 and the nonlinear process on the same noise, prints
E|X^{i,N} - X̄^i|² at the end beside its exact value and fits its power of N (theory: -1), checks that the error
stays bounded in time, measures a weak error and the fluctuations of the mean, stores the results of every replica in
runs/chaos.zarr, and draws runs/chaos.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import xarray as xr

import mfsde
from mfsde.analysis import chaos, plots, rates, replicas
from mfsde.scenarios import MeanFieldOU

SIZES = (25, 50, 100, 200, 400, 800)
# The size at which the dependence on time is shown.
SHOWN = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a few seconds: fewer replicas")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where results go")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)

    ou = MeanFieldOU(kappa=1.0, coupling=2.0)
    settings = {"horizon": 4.0, "dt": 0.02, "seed": 0, "n_replicas": 64 if options.small else 400, "save_every": 10}
    # The nonlinear process at the law of the scheme; that of the equation would leave an error of order dt² for all N.
    copies = mfsde.decoupled(ou, euler_law(ou, settings["dt"]))
    reference = mfsde.simulate(copies, n_particles=max(SIZES), **settings)
    errors = mfsde.sweep(
        ou,
        over={"n_particles": SIZES},
        reduce=lambda run: chaos.squared_error(run, reference).to_dataset(),
        **settings,
    )
    store = options.folder / "chaos.zarr"
    errors.to_zarr(store, mode="w", zarr_format=3, consolidated=False)

    final = errors.squared_error.isel(time=-1)
    slope = rates.power(final, over="n_particles")
    exact = [euler_error(ou, settings["horizon"], settings["dt"]) / n for n in SIZES]
    print(table(replicas.mean_and_error(final), exact))
    print(f"\nslope in N: {slope}")
    in_time = errors.squared_error.sel(n_particles=SHOWN)
    print(f"growth in time at N = {SHOWN}: {chaos.uniform_in_time(in_time)}")
    run = mfsde.simulate(ou, n_particles=SHOWN, **settings)
    print(beyond(run, reference))

    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    plots.chaos_slope(final, slope, ax=left)
    plots.series(in_time, ax=right, label=f"N = {SHOWN}")
    fig.savefig(options.folder / "chaos.png", dpi=130)
    plt.close(fig)
    print(f"stored {store}, drew {options.folder / 'chaos.png'}")


def euler_law(ou: MeanFieldOU, dt: float) -> Callable[[float], mfsde.Gaussian]:
    """The law of Euler's scheme for the limit: m ← (1 - κh) m, v ← (1 - λh)² v + σ²h, λ = κ + α."""

    def at(t: float) -> mfsde.Gaussian:
        step = round(t / dt)
        slow, fast = (1 - ou.kappa * dt) ** step, (1 - (ou.kappa + ou.coupling) * dt) ** np.arange(step + 1)
        variance = ou.initial_variance * fast[step] ** 2 + ou.sigma**2 * dt * np.square(fast[:step]).sum()
        return mfsde.Gaussian([slow * m for m in ou.initial_mean], float(variance))

    return at


def euler_error(ou: MeanFieldOU, t: float, dt: float) -> float:
    """N·E|X^{i,N} - X̄^i|² of Euler's scheme: d [v₀ (a_k - l_k)² + σ²h Σ_{j<k} (a_j - l_j)²], a = 1 - κh, l = 1 - λh.

    All particles have the same X^{i,N} - X̄^i. It is the mean of the noises, once relaxing at rate κ, once at rate λ.
    """
    step = round(t / dt)
    j = np.arange(step + 1)
    gap = np.square((1 - ou.kappa * dt) ** j - (1 - (ou.kappa + ou.coupling) * dt) ** j)
    return len(ou.initial_mean) * float(ou.initial_variance * gap[step] + ou.sigma**2 * dt * gap[:step].sum())


def table(errors: xr.DataArray, exact: list[float]) -> str:
    rows = ["    N   E|X - X̄|²   ± s.e.      exact      (measured - exact) / s.e."]
    for error, theory in zip(errors, exact, strict=True):
        value, stderr = float(error), float(error.stderr)
        z = (value - theory) / stderr
        rows.append(f"{int(error.n_particles):5d}   {value:.3e}   {stderr:.1e}   {theory:.3e}   {z:+.2f}")
    return "\n".join(rows)


def beyond(run: xr.Dataset, reference: xr.Dataset) -> str:
    """Weak error and fluctuations at the end."""
    weak = chaos.weak_error(run, reference, lambda x: np.square(x).sum(-1)).isel(time=-1)
    spread = chaos.fluctuation(run, lambda x: x[..., 0]).isel(time=-1)
    return (
        f"E X² - E X̄² = {float(weak):.2e} ± {float(weak.stderr):.1e} (s.e.), with {float(weak.variance_reduction):.0f} "
        f"times less variance than from independent runs\n"
        f"N·Var(mean) = {float(spread):.3f} [{float(spread.low):.3f}, {float(spread.high):.3f}]; independent particles "
        f"would have {float(spread.iid):.3f}"
    )


if __name__ == "__main__":
    main()
