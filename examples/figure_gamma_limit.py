"""The Γ-limit σ → 0: minimisers of V^σ = F + (σ²/2) H minimise F in the limit, whether or not inf F is attained.

    python examples/figure_gamma_limit.py [--small] [--folder runs]

Szpruch, Mean-field Langevin dynamics in the energy landscape of neural networks (2019), Proposition 3:
F(m^{*,σ}) → inf F and V^σ(m^{*,σ}) → inf F as σ → 0. The document gives no example; ours: one tanh neuron type on one
datum, F = ½(∫tanh(x) dm - y)², U = x²/2 + ½ log 2π, for a target y = 0.5 that laws reach and y = 1.2 that none does
(inf F = ½(y - 1)² = 0.02 is not attained). Lines solve m^{*,σ} ∝ e^{λ tanh x - U}, λ = (2/σ²)(y - ∫tanh dm), by a root
in λ; circles are the fixed point of the engine, crosses a long run of 500 particles with three standard errors. Where
laws reach y, m^{*,σ} tends to the one with F = 0 that is nearest to e^{-U} in entropy. Where none does, entropy is
given up: the mass leaves for infinity, where tanh is 1. Writes gamma-limit.png.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy import optimize
from torch import Tensor

import mfsde
from mfsde import Energy, limit
from mfsde.analysis import replicas

BLUE, ORANGE, VERMILLION, GREEN, GREY = "#0072B2", "#E69F00", "#D55E00", "#009E73", "#777777"
NODES = np.linspace(-12, 12, 6001)
TANH, REFERENCE = np.tanh(NODES), 0.5 * NODES**2 + 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class OneDatum(mfsde.MeanFieldLangevin):
    """F = ½(∫tanh dm - y)², U = x²/2 + ½ log 2π."""

    target: float = 0.5
    sigma: float = 1.0

    @cached_property
    def energy(self) -> Energy:
        return Energy(lambda mu: 0.5 * (mu.integrate(lambda x: torch.tanh(x[..., 0])) - self.target).square())

    def confinement(self, x: Tensor) -> Tensor:
        return 0.5 * x.square().sum(-1) + 0.5 * math.log(2 * math.pi)

    def initial(self) -> mfsde.Gaussian:
        return mfsde.Gaussian([0.5], 1.0)

    def tilted(self, tilt: float) -> np.ndarray:
        """The density ∝ e^{λ tanh x - U} on the nodes."""
        density = np.exp(tilt * TANH - REFERENCE - abs(tilt))
        return density / (density.sum() * (NODES[1] - NODES[0]))

    def by_root(self, sigma: float) -> tuple[float, float, np.ndarray]:
        """F, V^σ and the density of m^{*,σ}, by the λ that is its own."""
        step = NODES[1] - NODES[0]

        def gap(tilt: float) -> float:
            return tilt - 2 / sigma**2 * (self.target - float(TANH @ self.tilted(tilt)) * step)

        density = self.tilted(optimize.brentq(gap, 0.0, 2 / sigma**2 * (self.target + 1)))
        value = 0.5 * (float(TANH @ density) * step - self.target) ** 2
        positive = density > 0
        logarithm = np.log(density, where=positive, out=np.zeros_like(density))
        entropy = float((density * (logarithm + REFERENCE)).sum())
        return value, value + 0.5 * sigma**2 * entropy * step, density


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a few seconds: fewer values of σ, shorter runs")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where the picture goes")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9.5, 3.3), layout="constrained")
    cases = ((OneDatum(0.5), BLUE, "y = 0.5, reached"), (OneDatum(1.2), VERMILLION, "y = 1.2, out of reach"))
    for case, colour, told in cases:
        against_sigma(left, case, colour, told, options.small)
    left.axhline(0.02, color=GREY, linestyle=":", label="inf $F$ = 0.02, out of reach")
    left.plot([], [], "o", color=GREY, mfc="none", label="fixed point of the engine")
    left.plot([], [], "x", color=GREY, label="500 particles")
    left.set(
        xlabel="σ",
        ylabel="$F$ and $V^\\sigma$ at $m^{*,\\sigma}$",
        xscale="log",
        yscale="log",
        ylim=(1e-8, 3),
        title="minima fall to inf $F$ as σ → 0",
    )
    densities(middle, OneDatum(0.5), (3.0, 1.0, 0.5, 0.1), "y = 0.5: to a law with F = 0")
    step = NODES[1] - NODES[0]
    tilt = optimize.brentq(lambda c: float(TANH @ OneDatum().tilted(c)) * step - 0.5, 0, 9)
    nearest = OneDatum().tilted(tilt)
    middle.plot(NODES, nearest, ":", color="black", linewidth=1.5, label="σ → 0")
    densities(right, OneDatum(1.2), (3.0, 1.0, 0.3, 0.1, 0.01), "y = 1.2: mass leaves")
    for ax in (left, middle, right):
        ax.spines[["top", "right"]].set_visible(False)
        ax.title.set_fontsize(10)
        ax.legend(fontsize=7, frameon=False, loc="upper left" if ax is not left else "lower right")
    path = options.folder / "gamma-limit.png"
    figure.savefig(path, dpi=130, pil_kwargs={"optimize": True})
    print(f"drew {path}")


def against_sigma(ax: plt.Axes, case: OneDatum, colour: str, told: str, small: bool) -> None:
    """F and V^σ at m^{*,σ}: by a root, by the engine's fixed point, by particles."""
    sigmas = np.geomspace(0.05, 3, 40)
    values = np.array([case.by_root(s)[:2] for s in sigmas])
    ax.plot(sigmas, values[:, 0], color=colour, label=f"$F$, {told}")
    ax.plot(sigmas, values[:, 1], "--", color=colour, label=f"$V^\\sigma$, {told}")
    found = []
    for sigma in np.geomspace(0.08, 3, 4 if small else 9):
        law = limit.gibbs(OneDatum(case.target, float(sigma)))
        found.append((sigma, float(case.energy(law.as_measure())), law.free_energy, *case.by_root(sigma)[:2]))
    sigma, energy, free, exact, exact_free = np.array(found).T
    ax.plot(sigma, energy, "o", color=colour, mfc="none", markersize=4)
    ax.plot(sigma, free, "o", color=colour, mfc="none", markersize=4)
    worst = max(np.abs(energy - exact).max(), np.abs(free - exact_free).max())
    print(f"{told}: largest difference of fixed point and root {worst:.1e}")
    for sigma in (0.5, 1.5):
        mean = by_particles(OneDatum(case.target, sigma), small)
        value = mean["F"]
        ax.errorbar(sigma, value[0], 3 * value[1], color=colour, marker="x", capsize=3)
        print(f"  σ = {sigma}: F by particles {value[0]:.5f} ± {value[1]:.5f}, N → ∞: {case.by_root(sigma)[0]:.5f}")


def by_particles(case: OneDatum, small: bool) -> dict[str, tuple[float, float]]:
    """½(E tanh - y)² from the time average of ∫tanh dm over the second half of a long run, without the 1/N bias."""
    run = mfsde.simulate(
        case, n_particles=500, n_replicas=8, horizon=10.0 if small else 100.0, dt=0.02, seed=0, save_every=50,
        observables=(mfsde.Observable("tanh", lambda t, x, mu: mu.integrate(lambda z: torch.tanh(z[..., 0]))),),
        keep_particles=0,
    )  # fmt: skip
    late = run["tanh"].isel(time=slice(run.sizes["time"] // 2, None)).mean("time")
    mean = replicas.mean_and_error(late)
    off = float(mean) - case.target
    return {"F": (0.5 * off**2, abs(off) * float(mean["stderr"]))}


def densities(ax: plt.Axes, case: OneDatum, sigmas: tuple[float, ...], title: str) -> None:
    """The density of m^{*,σ} for several σ."""
    colours = plt.colormaps["viridis"](np.linspace(0.85, 0.1, len(sigmas)))
    for sigma, colour in zip(sigmas, colours, strict=True):
        value, _, density = case.by_root(sigma)
        ax.plot(NODES, density, color=colour, label=f"σ = {sigma:g}: F = {value:.2g}")
    ax.plot(NODES, np.exp(-REFERENCE), "--", color=GREY, linewidth=1, label="$e^{-U}$")
    ax.set(xlabel="x", ylabel="density", xlim=(-6.5, 5.5), ylim=(0, None), title=title)


if __name__ == "__main__":
    main()
