"""One energy under five dynamics: gradient flow, Langevin, kinetic, birth-death and noisy SGD.

A two-layer network learns a step from 64 points. The energy is written once; `mfsde.members` puts it under every
dynamics of the family, `mfsde.compare` runs them with equal noise into one dataset. All neurons start in one narrow
cluster: descent has to pull it apart, births and deaths have little to choose from, and inertia is of use. Drawn: the
risk along time, each dynamics over its replicas, and what the networks have learned.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import matplotlib
import numpy as np
import torch
import xarray as xr

import mfsde

LABELS = {
    "gradient_flow": "gradient flow",
    "langevin": "Langevin",
    "kinetic": "kinetic",
    "birth_death": "gradient flow with births and deaths",
    "noisy_sgd": "noisy SGD, minibatches of 8",
}


@dataclass(frozen=True)
class Step(mfsde.MeanFieldLangevin):
    """The risk of f(z) = 4 ∫ β tanh(α·z) m(dα, dβ), z = (s, 1), on y = tanh(4 s - 2) + tanh(4 s + 2); U = |θ|²/(2·4).

    Args:
        sigma: σ; the temperature is σ²/2.
        spread: deviation of the initial cluster of neurons.

    """

    sigma: float = 0.06
    spread: float = 0.3

    @cached_property
    def data(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs (s, 1) on [-2, 2] and targets."""
        s = torch.linspace(-2, 2, 64)
        return torch.stack([s, torch.ones_like(s)], -1), torch.tanh(4 * s - 2) + torch.tanh(4 * s + 2)

    @cached_property
    def neuron(self) -> mfsde.Neuron:
        """4 β tanh(α·z)."""
        return mfsde.Neuron("tanh", scale=4.0)

    @cached_property
    def energy(self) -> mfsde.Energy:
        """The mean of ½(f - y)² over the data."""
        return mfsde.risk(self.neuron, "squared", *self.data)

    def confinement(self, x: torch.Tensor) -> torch.Tensor:
        """|θ|²/8, up to a constant."""
        return x.square().sum(-1) / 8

    def initial(self) -> mfsde.Gaussian:
        """A cluster at (0.5, 1.5, -0.5)."""
        return mfsde.Gaussian([0.5, 1.5, -0.5], self.spread**2)


def main() -> None:
    """Runs the five, writes family.zarr and family.png."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="fewer neurons, a shorter run")
    parser.add_argument("--folder", default="runs", help="where to write")
    options = parser.parse_args()
    matplotlib.use("agg")
    torch.set_num_threads(1)
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)

    scenario = Step()
    members = mfsde.members(scenario, alpha=2.0, gamma=1.0, batch_size=8)
    n_particles, n_replicas, horizon = (100, 4, 5.0) if options.small else (500, 8, 40.0)
    table = mfsde.compare(
        members, n_particles=n_particles, n_replicas=n_replicas, horizon=horizon, dt=0.05, seed=0,
        save_every=round(horizon / 0.05 / 50),
    )  # fmt: skip
    table.to_zarr(folder / "family.zarr", mode="w", zarr_format=3, consolidated=False)
    last = table.energy.isel(time=-1)
    for name in members:
        mean, spread = float(last.sel(member=name).mean()), float(last.sel(member=name).std(ddof=1))
        print(f"{LABELS[name]:<38} risk {mean:.2e}, deviation over replicas {spread:.1e}")
    draw(scenario, table, folder / "family.png")
    print(f"written: {folder / 'family.zarr'}, {folder / 'family.png'}")


def draw(scenario: Step, table: xr.Dataset, file: Path) -> None:
    """The risk along time, and the functions at the end."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    inputs, targets = scenario.data
    right.plot(inputs[:, 0], targets, "k.", markersize=3, label="data")
    for k, name in enumerate(table.member.values):
        colour, risk = f"C{k}", table.energy.sel(member=name)
        low, high = risk.min("replica"), risk.max("replica")
        left.plot(table.time, risk.mean("replica"), color=colour, label=LABELS[name])
        left.fill_between(table.time, low, high, color=colour, alpha=0.15, linewidth=0)
        neurons = torch.from_numpy(table.position.sel(member=name).isel(time=-1, replica=0).values)
        right.plot(inputs[:, 0], learned(scenario, neurons), color=colour, linewidth=1)
    left.set(yscale="log", xlabel="time", ylabel="risk (mean and range over replicas)")
    left.legend(fontsize=8)
    right.set(xlabel="input", ylabel="network at the end, one replica")
    right.legend(fontsize=8)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def learned(scenario: Step, neurons: torch.Tensor) -> np.ndarray:
    """The network's values on the data."""
    return scenario.neuron(neurons.unsqueeze(-2), scenario.data[0]).mean(0).numpy()


if __name__ == "__main__":
    main()
