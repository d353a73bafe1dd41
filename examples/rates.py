"""How fast a law converges: rates with intervals, above the sampling floor.

    python examples/rates.py [--small] [--folder runs]

Mean-field Ornstein-Uhlenbeck particles start off centre and relax; the rate of W₂ is known. In one dimension W₂ to the
invariant law is fitted without its sampling floor, beside what a straight line through log W₂ would have said, and it
is counted over other seeds how often either interval holds the rate. In ten dimensions the distance is no larger than
its floor from the start: the debiased exact transport distance is compared with the Gaussian plug-in. Last, the
contraction of two laws along their optimal coupling, which needs no fit; on the same noise it has no floor to speak of,
but once particles are closer than their spacing, N stays visible in the third digit. Prints the rates, stores the
distances with them in runs/rates.zarr, and draws runs/rates.png.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import xarray as xr
from scipy import stats

import mfsde
from mfsde.analysis import plots, rates, replicas, wasserstein
from mfsde.analysis.rates import Rate
from mfsde.scenarios import MeanFieldOU

DT = 0.02
GREY = "#777777"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a few seconds: fewer particles and replicas")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where results go")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    # Arrays of a few thousand particles are too small to be worth dividing among threads.
    torch.set_num_threads(1)

    ou = from_mean([1.0])
    settings = {"horizon": 8.0, "dt": DT, "seed": 7, "save_every": 10}
    settings |= {"n_particles": 500, "n_replicas": 10} if options.small else {"n_particles": 2000, "n_replicas": 20}
    run = mfsde.simulate(ou, **settings)
    distance = wasserstein.to_law(run, invariant(ou))
    rate = rates.exponential(distance)
    print(f"λ of the scheme                  {true_rate(ou):.4f}\n")
    print(f"d = 1, without the floor         {rate}")
    low, high = through_log(distance)
    print(f"d = 1, a line through log W₂     {(low + high) / 2:.4g} ± {(high - low) / 2:.2g} (95 %, from residuals)")
    print(f"{repeated(ou, 10 if options.small else 60)}\n")

    wide = in_ten_dimensions(options.small)
    fits = {name: rates.exponential(series) for name, series in wide.items()}
    for name, fit in fits.items():
        print(f"d = 10, {name:24s} {fit}")
    floor = float(wide["transport"].floor.isel(time=0))
    print(
        f"d = 10, W₂² at the start {float(wide['gaussian'].mean('replica')[0]):.3f}; its sampling floor {floor:.3f}\n"
    )

    # Two laws that differ in mean and in scale, on the same noise.
    other = mfsde.simulate(replace(ou, initial_mean=[0.0], initial_variance=9 * ou.initial_variance), **settings)
    early = slice(0, 4)
    contraction = rates.contraction_between(run.sel(time=early), other.sel(time=early), rates.drift_of(ou))
    print(table(replicas.mean_and_error(contraction), ou))

    store = options.folder / "rates.zarr"
    save(store, {"line": {"distance": (distance, rate)}, "wide": {k: (wide[k], fits[k]) for k in wide}})
    figure(distance, rate, wide, fits, contraction, options.folder / "rates.png")
    print(f"stored {store}, drew {options.folder / 'rates.png'}")


def from_mean(mean: Sequence[float]) -> MeanFieldOU:
    """Started at its stationary variance, so that only the mean relaxes and W₂ = |m₀| e^{-λt} from the beginning."""
    ou = MeanFieldOU(initial_mean=mean)
    pull = ou.kappa + ou.coupling
    # Euler's scheme: v ← (1 - λh)² v + σ²h.
    return replace(ou, initial_variance=ou.sigma**2 / (pull * (2 - pull * DT)))


def invariant(ou: MeanFieldOU) -> mfsde.Gaussian:
    return mfsde.Gaussian([0.0] * len(ou.initial_mean), ou.initial_variance)


def true_rate(ou: MeanFieldOU) -> float:
    """Of Euler's scheme, m ← (1 - κh) m; the equation has κ."""
    return -math.log1p(-ou.kappa * DT) / DT


def through_log(distance: xr.DataArray) -> tuple[float, float]:
    """The careless interval: least squares on log W₂ over all times, floor and all, its error from the residuals."""
    fit = stats.linregress(distance.time, np.log(distance.mean("replica")))
    half = stats.t.ppf(0.975, distance.sizes["time"] - 2) * fit.stderr
    return -fit.slope - half, -fit.slope + half


def repeated(ou: MeanFieldOU, repeats: int) -> str:
    """How often the two intervals hold the rate, over runs with other seeds."""
    hits, naive = [], []
    for seed in range(1000, 1000 + repeats):
        run = mfsde.simulate(ou, n_particles=500, n_replicas=10, horizon=8.0, dt=DT, seed=seed, save_every=10)
        distance = wasserstein.to_law(run, invariant(ou))
        rate = rates.exponential(distance)
        low, high = through_log(distance)
        hits.append(rate.low <= true_rate(ou) <= rate.high)
        naive.append(low <= true_rate(ou) <= high)
    return f"of {repeats} repeats with N = 500 the first interval holds λ in {sum(hits)}, the second in {sum(naive)}"


def in_ten_dimensions(small: bool) -> dict[str, xr.DataArray]:
    """W₂² to the invariant law without its floor, by exact transport to samples and by moments."""
    ou = from_mean([10**-0.5] * 10)
    n, r = (80, 8) if small else (200, 20)
    run = mfsde.simulate(ou, n_particles=n, n_replicas=r, horizon=1.8, dt=DT, seed=1, save_every=15)
    law = invariant(ou)
    found = {name: wasserstein.debiased(run, law, estimator=name) for name in ("transport", "gaussian")}
    between = wasserstein.between_replicas(run.isel(time=[-1], replica=slice(4)))
    floor = np.full(run.sizes["time"], float(np.square(between).mean()))
    found["transport"] = found["transport"].assign_coords(floor=("time", floor))
    return found


def table(contraction: xr.DataArray, ou: MeanFieldOU) -> str:
    rows = [" time   contraction ± s.e.      N = ∞"]
    for value in contraction[::4]:
        rows.append(
            f"{float(value.time):5.2f}   {float(value):.4f} ± {float(value.stderr):.0e}       "
            f"{exact_contraction(ou, float(value.time)):.4f}"
        )
    return "\n".join(rows)


def exact_contraction(ou: MeanFieldOU, t: float) -> float:
    """λ - α|m - m'|²/W₂², λ = κ + α, for means m_t and 0, and deviations s and from 3s to s."""
    pull, step = ou.kappa + ou.coupling, round(t / DT)
    deviation = math.sqrt(ou.initial_variance)
    wider = deviation * math.sqrt(1 + 8 * (1 - pull * DT) ** (2 * step))
    apart = (ou.initial_mean[0] * (1 - ou.kappa * DT) ** step) ** 2
    return pull - ou.coupling * apart / (apart + (wider - deviation) ** 2)


def save(store: Path, groups: dict[str, dict[str, tuple[xr.DataArray, Rate]]]) -> None:
    """Each distance with its rate in its attributes, one group for each dimension of space."""
    for group, entries in groups.items():
        named = {
            name: series.drop_vars(["half", "shape"], errors="ignore").assign_attrs(
                {f"rate_{key}": value for key, value in rate.attributes().items()}
            )
            for name, (series, rate) in entries.items()
        }
        xr.Dataset(named).to_zarr(store, group=group, mode="w", zarr_format=3, consolidated=False)


def figure(
    distance: xr.DataArray,
    rate: Rate,
    wide: dict[str, xr.DataArray],
    fits: dict[str, Rate],
    contraction: xr.DataArray,
    path: Path,
) -> None:
    fig, (line, ten, still) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    plots.decay(distance, rate, ax=line)
    line.set_title("d = 1", fontsize=10)
    plots.decay(wide["transport"], fits["transport"], ax=ten, label="exact transport")
    plots.decay(wide["gaussian"], ax=ten, label="Gaussian plug-in")
    ten.set_title("d = 10, at or below the floor from the start", fontsize=10)
    plots.series(contraction, ax=still)
    exact = [exact_contraction(from_mean([1.0]), float(t)) for t in contraction.time]
    still.plot(contraction.time, exact, color=GREY, linestyle="--", label="N = ∞")
    still.legend(frameon=False, fontsize=8)
    still.set_title("d = 1, two laws that differ in mean and scale", fontsize=10)
    fig.savefig(path, dpi=130)
    plt.close(fig)


if __name__ == "__main__":
    main()
