"""A gallery: the pictures of mfsde.analysis.plots, drawn from three runs.

    python examples/plots.py [--small] [--folder runs]

Relaxation of the mean-field Ornstein-Uhlenbeck process (law, paths, W₂ to the invariant law with its sampling floor,
coupling error against N), the energy of the double well and its law in one and two dimensions, and a pendulum with
noise and mean-field friction, whose angle lives on a circle. Writes PNGs, an animation, and two runs on one page each.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import xarray as xr
from torch import Tensor

import mfsde
from mfsde.analysis import chaos, plots, rates, wasserstein
from mfsde.scenarios import DoubleWell, MeanFieldOU

SIZE = (4, 3)  # inches: what a column of a paper leaves


@dataclass(frozen=True)
class Pendulum:
    """dX = V dt, dV = -(sin X + γV + α(V - E V)) dt + σ dW, X on a circle of length 2π."""

    gamma: float = 0.3
    coupling: float = 0.5
    sigma: float = 0.4
    period: tuple[float | None, float | None] = (2 * math.pi, None)

    def drift(self, t: float, x: Tensor, mu: mfsde.EmpiricalMeasure) -> Tensor:
        angle, speed = x[..., :1], x[..., 1:]
        return torch.cat([speed, -angle.sin() - self.gamma * speed - self.coupling * (speed - mu.mean()[..., 1:])], -1)

    def diffusion(self, t: float, x: Tensor, mu: mfsde.EmpiricalMeasure) -> Tensor:
        return x.new_tensor([0.0, self.sigma]).expand(x.shape)

    def initial(self) -> mfsde.Gaussian:
        return mfsde.Gaussian([-1.0, 2.5], [[0.2, 0.0], [0.0, 0.5]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a few seconds: fewer particles, shorter animation")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where pictures go")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)

    gallery = Gallery(options.folder)
    ornstein_uhlenbeck(gallery, options.small)
    double_well(gallery, options.small)
    pendulum(gallery, options.small)
    print("\n".join(f"drew {path}" for path in gallery.drawn))


class Gallery:
    """Pictures in a folder, each drawn on Axes of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.drawn: list[Path] = []

    def draw(self, name: str, picture: Callable[[plt.Axes], object]) -> None:
        figure, ax = plt.subplots(figsize=SIZE, layout="constrained")
        picture(ax)
        self.keep(name, figure)
        plt.close(figure)

    def keep(self, name: str, figure: plt.Figure) -> None:
        path = self.folder / f"plots-{name}.png"
        figure.savefig(path, dpi=130)
        self.drawn.append(path)

    def animate(self, name: str, run: xr.Dataset, **options: object) -> None:
        self.drawn.append(plots.animate(run, self.folder / f"plots-{name}", **options))


def ornstein_uhlenbeck(gallery: Gallery, small: bool) -> None:
    ou = MeanFieldOU(initial_mean=(3.0,))
    run = mfsde.simulate(
        ou, **{**ou.suggested(), "n_particles": 200 if small else 1000, "n_replicas": 8 if small else 20}
    )
    # The law at time 50 is the invariant one to 21 digits.
    distance = wasserstein.to_law(run, ou.limit(50.0))
    # Before time 1 the variance relaxes, too.
    rate = rates.exponential(distance, start=1.0)
    errors = coupling_errors([50, 100, 200] if small else [50, 100, 200, 400, 800])
    gallery.draw("density", lambda ax: plots.density(run, ou.limit, [0, 0.4, 1, 4], ax))
    gallery.draw("paths", lambda ax: plots.paths(run, ax=ax))
    gallery.draw("decay", lambda ax: plots.decay(distance, rate, ax))
    gallery.draw("chaos", lambda ax: plots.chaos_slope(errors, rates.power(errors), ax))
    gallery.keep("page", plots.summary(run, distance, rate, law=ou.limit))


def coupling_errors(sizes: list[int]) -> xr.DataArray:
    """E|X^{i,N} - X̄^i|² at time 1 against N, both processes driven by the same noise."""
    # Started at mean 0, which Euler's scheme keeps: from another mean it leaves the limit's by O(dt), whatever N is.
    ou = MeanFieldOU(initial_mean=(0.0,))
    # The error is nearly a square of one Gaussian, common to all particles: it takes many replicas.
    settings = {"n_replicas": 200, "horizon": 1.0, "dt": 0.05, "seed": 1}
    limit = mfsde.simulate(mfsde.decoupled(ou, ou.limit), n_particles=sizes[-1], **settings)
    return chaos.table([mfsde.simulate(ou, n_particles=n, **settings) for n in sizes], limit, time=1.0)


def double_well(gallery: Gallery, small: bool) -> None:
    case = DoubleWell(theta=0.3, sigma=0.4, initial_mean=(0.05,), initial_variance=0.05)
    settings = {**case.suggested(), "n_particles": 300 if small else 1000, "horizon": 5.0 if small else 10.0}
    run = mfsde.simulate(case, **settings)
    gallery.draw("energy", lambda ax: plots.energy(run, ax))
    gallery.draw("two-wells", lambda ax: plots.density(run, times=np.linspace(0, settings["horizon"], 12), ax=ax))
    plane = replace(case, initial_mean=(0.05, 0.05))
    flat = mfsde.simulate(plane, **settings)
    gallery.draw("plane", lambda ax: plots.density(flat, ax=ax))
    gallery.animate("double-well.gif", run.isel(time=slice(None, None, 2 if small else 1)), fps=10)


def pendulum(gallery: Gallery, small: bool) -> None:
    case = Pendulum()
    n = 150 if small else 500
    run = mfsde.simulate(case, n_particles=n, n_replicas=4, horizon=8.0, dt=0.01, seed=0, save_every=10)
    gallery.draw("phase", lambda ax: plots.phase(run, 2.0, ax=ax, scenario=case))
    gallery.draw("circle", lambda ax: plots.paths(run, 12, ax=ax))
    gallery.keep("pendulum-page", plots.summary(run))


if __name__ == "__main__":
    main()
