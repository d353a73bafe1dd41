"""Mean-field Langevin training of a two-layer network on real digits: even against odd.

    python examples/digits.py [--small] [--folder runs]

Trains independent replicas of a network of N neurons, streams their particles to runs/digits.zarr, prints test
accuracy, energy and free energy over time, measures W₂ between the replicas' laws, and draws runs/digits.png.

In dimension 66 a thousand particles do not resolve the law: W₂ between two independent replicas, the sampling floor, is
as large as the distance to the limit. Convergence shows where particles do resolve it, in the plane of a neuron's
output weight β and its inner weight along the difference of the two class means.
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
from mfsde.analysis import wasserstein
from mfsde.scenarios import TwoLayerNetwork

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
GOAL = 0.97


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a few seconds: fewer neurons, a shorter run")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where results go")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)

    network = TwoLayerNetwork()
    settings = network.suggested()
    if options.small:
        settings |= {"n_particles": 200, "n_replicas": 2, "horizon": 9.0, "save_every": 30}
    store = options.folder / "digits.zarr"
    run = mfsde.simulate(network, store=store, overwrite=True, progress=True, **settings)
    distances = w2(network, run)
    distances.to_zarr(options.folder / "digits-w2.zarr", mode="w", zarr_format=3, consolidated=False)

    print(table(run, distances))
    accuracy, error = mean_and_error(run.test_accuracy.isel(time=-1))
    reached = "" if options.small else f"; {GOAL} {'reached' if float(accuracy) >= GOAL else 'not reached'}"
    measured = f"{float(accuracy):.4f} ± {float(error):.4f}"
    print(f"\ntest accuracy {measured} (standard error, {run.sizes['replica']} replicas){reached}")
    floor = float(distances.floor_full.isel(time=-1).mean())
    print(
        f"W₂ between replicas in all {run.sizes['component']} dimensions, at the end: {floor:.2f}, the floor of "
        f"N = {run.sizes['particle']}"
    )
    figure(run, distances, options.folder / "digits.png")
    print(f"stored {store} and {options.folder / 'digits-w2.zarr'}, drew {options.folder / 'digits.png'}")


def w2(network: TwoLayerNetwork, run: xr.Dataset) -> xr.Dataset:
    """W₂ to another replica's final law, and between replicas (the floor), in the plane and in all dimensions."""
    position = run.position.load()
    flat = position.dot(plane(network))
    flat = flat.rename(direction="component").transpose(*position.dims)
    return xr.Dataset(
        {
            "to_end": wasserstein.between(flat, final_law_of_another_replica(flat)),
            "floor": wasserstein.between_replicas(flat),
            "floor_full": wasserstein.between_replicas(position),
        }
    )


def plane(network: TwoLayerNetwork) -> xr.DataArray:
    """Two orthonormal directions in parameter space: the class difference, and the output weight."""
    data = network.dataset
    difference = (data.train_inputs * data.train_targets[:, None]).mean(0).numpy()
    basis = np.zeros((network.dim, 2))
    basis[:-1, 0] = difference / np.linalg.norm(difference)
    basis[-1, 1] = 1.0
    return xr.DataArray(basis, dims=("component", "direction"))


def final_law_of_another_replica(position: xr.DataArray) -> xr.DataArray:
    """The last frame, each replica's replaced by its neighbour's: an independent sample of the same law."""
    return position.isel(time=-1, drop=True).roll(replica=1)


def mean_and_error(values: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray]:
    """Mean over replicas and its standard error."""
    return values.mean("replica"), values.std("replica", ddof=1) / values.sizes["replica"] ** 0.5


def table(run: xr.Dataset, distances: xr.Dataset) -> str:
    rows = ["   time   risk  free energy   accuracy        W₂ to end   floor"]
    for time in run.time.values[:: max(1, run.sizes["time"] // 10)]:
        now, apart = run.sel(time=time), distances.sel(time=time)
        accuracy, error = mean_and_error(now.test_accuracy)
        rows.append(
            f"{time:7.2f} {float(now.energy.mean()):6.3f} {float(now.free_energy.mean()):12.3f}   "
            f"{float(accuracy):.4f} ± {float(error):.4f}   {float(apart.to_end.mean()):9.3f} "
            f"{float(apart.floor.mean()):7.3f}"
        )
    return "\n".join(rows)


def figure(run: xr.Dataset, distances: xr.Dataset, path: Path) -> None:
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    band(left, run.free_energy, BLUE, "free energy (Gaussian plug-in)")
    band(left, run.energy, ORANGE, "training risk F(m)")
    for axes in (left, right):
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter("")
    left.set_yticks([0.05, 0.1, 0.2, 0.5], labels=["0.05", "0.1", "0.2", "0.5"])
    right.set_yticks([0.2, 0.5, 1.0], labels=["0.2", "0.5", "1"])
    left.set(title="Energy falls", ylabel="energy")
    band(middle, run.test_accuracy, GREEN, "test accuracy")
    middle.axhline(GOAL, color=GREY, linestyle="--", linewidth=1, label=f"{GOAL}")
    middle.set(title="Even against odd digits", ylabel="test accuracy", ylim=(0.85, 1.0))
    band(right, distances.to_end, BLUE, "W₂ to the final law")
    band(right, distances.floor.rename(pair="replica"), GREY, "W₂ between replicas: sampling floor")
    right.set(title="Laws converge, down to N's floor", ylabel="W₂ in the plane")
    for axes in (left, middle, right):
        axes.set_xlabel("time t")
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    n, r = run.sizes["particle"], run.sizes["replica"]
    fig.suptitle(f"Mean-field Langevin dynamics of a two-layer network: N = {n} neurons, {r} replicas, bands ± 2 s.e.")
    fig.savefig(path, dpi=130)
    plt.close(fig)


def band(axes: plt.Axes, values: xr.DataArray, colour: str, label: str) -> None:
    mean, error = mean_and_error(values)
    axes.plot(values.time, mean, color=colour, label=label)
    axes.fill_between(values.time, mean - 2 * error, mean + 2 * error, color=colour, alpha=0.25, linewidth=0)


if __name__ == "__main__":
    main()
