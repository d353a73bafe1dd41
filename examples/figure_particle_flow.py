"""The particle gradient flow: paths of spikes and of ReLU neurons, as a picture and as an animation.

    python examples/figure_particle_flow.py [--small] [--folder runs]

An animation of ours of what the animation linked from the review of Yang and Goulbourne (Cambridge, 2020) shows, of
Chizat, Bach, On the global convergence of gradient descent for over-parameterized models using optimal transport
(2018), sections 4.1 and 4.2. Left: sparse deconvolution; every particle is a spike (place, w), all start at w = 0 and
places all over the circle. Right: a network of ReLU units in the plane; a neuron (w, θ) is drawn at √(|w||θ|) θ/|θ|,
coloured by the sign of w, and all start close to 0. Dotted lines are the atoms of the minimiser over all measures
(duality gap at most 1e-10 of the loss). Neurons gather on the rays: anywhere along them, and in any number, since only
their total |w||θ| counts there.

The document gives no parameters; all are ours: 100 spikes, five planted, circle of length 24, frequencies to 7,
λ = 0.1, t to 200; 100 neurons, 3 planted, expectation over N(0, I), V = λ|w||θ|, λ = 0.01, start uniform on a cube of
half-width 0.3, t to 1000. Writes runs/particle-flow.png and runs/particle-flow.gif; prints what the paths end with.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure

from mfsde.analysis import animations
from mfsde.verification.descent import Planted, relu, spikes

BLUE, VERMILLION, GREY = "#0072B2", "#D55E00", "#777777"
Array = np.ndarray


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a few seconds: fewer frames and a shorter time")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where the pictures go")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    # Arrays of a few hundred particles are too small to be worth dividing among threads.
    torch.set_num_threads(1)

    small, n_frames = options.small, 6 if options.small else 72
    network = relu()
    near = replace(network, case=replace(network.case, initial_scale=0.3), dt=0.5)
    runs = [
        (spikes(), recorded(spikes(), 10.0 if small else 200.0)),
        (near, recorded(near, 50.0 if small else 1000.0)),
    ]
    for problem, run in runs:
        told(problem, run)
    picture(runs, options.folder / "particle-flow.png")
    animation(runs, n_frames, options.folder / "particle-flow.gif")


def recorded(problem: Planted, horizon: float) -> xr.Dataset:
    """The flow of 100 particles, every step kept."""
    return problem.run(100, 1, horizon, save_every=1)


def told(problem: Planted, run: xr.Dataset) -> None:
    """The line about a run."""
    objective = run["objective"].values[:, 0]
    print(
        f"{problem.name}: F from {objective[0]:.4f} to {objective[-1]:.8f}, minimum {problem.least.objective:.8f} "
        f"(gap {problem.least.gap:.0e}); largest rise in a step {np.diff(objective).max():.0e}; m₀ = {problem.n_atoms}"
    )


def shown(problem: Planted, run: xr.Dataset) -> tuple[Array, Array]:
    """What is drawn of the particles, (T, N, 2), and their w, (T, N)."""
    x = run["position"].values[:, 0]
    w = x[..., 0]
    if problem.name == "spikes":
        return np.stack([x[..., 1] / problem.case.circumference, w], axis=-1), w
    # At the root of its length, so that small neurons are seen beside large ones.
    theta = x[..., 1:]
    length = np.linalg.norm(theta, axis=-1, keepdims=True)
    return np.sqrt(np.abs(w)[..., None] / np.maximum(length, 1e-300)) * theta, w


def frames_of(n_steps: int, n_frames: int) -> Array:
    """Steps at which the flow is shown: evenly spaced in the logarithm, since it slows down."""
    return np.unique(np.round(np.geomspace(1, n_steps + 1, n_frames)).astype(int) - 1)


def prepared(ax: plt.Axes, problem: Planted, points: Array) -> None:
    """Axes and the atoms of the minimiser."""
    atoms, nodes = problem.least.weights, problem.least.nodes
    if problem.name == "spikes":
        places = nodes[:, 0] / problem.case.circumference
        for place in merged(places):
            ax.axvline(place, color=GREY, linestyle=":", linewidth=1)
        top = 1.1 * float(np.abs(points[..., 1]).max())
        ax.set(xlim=(0, 1), ylim=(-top, top), xlabel="place θ, in turns", ylabel="w", title="sparse deconvolution")
    else:
        top = 1.05 * float(np.abs(points).max())
        for w, angle in zip(atoms, nodes[:, 0], strict=True):
            colour = BLUE if w > 0 else VERMILLION
            ax.plot(
                [0, 2 * top * np.cos(angle)], [0, 2 * top * np.sin(angle)], color=colour, linestyle=":", linewidth=1
            )
        ax.set(
            xlim=(-top, top),
            ylim=(-top, top),
            xlabel="√(|w| |θ|) θ₁/|θ|",
            ylabel="√(|w| |θ|) θ₂/|θ|",
            title="ReLU network",
        )
        ax.set_aspect("equal")
    ax.title.set_fontsize(10)
    ax.spines[["top", "right"]].set_visible(False)


def merged(places: Array) -> list[float]:
    """Places that are closer than a hundredth of a turn, once."""
    kept: list[float] = []
    for place in places:
        if all(abs(place - other) > 0.01 for other in kept):
            kept.append(float(place))
    return kept


def picture(runs: list[tuple[Planted, xr.Dataset]], path: Path) -> None:
    """Paths as lines, ends as points, and the objective above its minimum."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.5), layout="constrained")
    for ax, (problem, run), colour in zip(axes, runs, (BLUE, VERMILLION), strict=False):
        points, w = shown(problem, run)
        prepared(ax, problem, points)
        thin = frames_of(len(points) - 1, 200)
        for i in range(points.shape[1]):
            line = points[thin, i]
            if problem.name == "spikes":
                # A path that goes around the circle is cut where it jumps.
                line = np.where(np.abs(np.diff(line[:, :1], axis=0, append=line[-1:, :1])) > 0.5, np.nan, line)
            final = w[-1, i]
            tone = GREY if final == 0 else BLUE if final > 0 else VERMILLION
            ax.plot(*line.T, color=tone, linewidth=0.6, alpha=0.5)
            ax.plot(*points[-1, i], "o", color=tone, markersize=3)
        excess = run["objective"].values[:, 0] - problem.least.objective
        t = run["time"].values
        axes[2].plot(t[1:], np.maximum(excess[1:], 1e-10), color=colour, linewidth=1.6, label=problem.name)
    axes[2].set(xscale="log", yscale="log", xlabel="time t", ylabel="F(μ) − F*", title="excess over the minimum")
    axes[2].title.set_fontsize(10)
    axes[2].spines[["top", "right"]].set_visible(False)
    axes[2].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"  drew {path}")


def animation(runs: list[tuple[Planted, xr.Dataset]], n_frames: int, path: Path) -> None:
    """The same, frame by frame."""
    figure = Figure(figsize=(7.2, 3.5), layout="constrained")
    axes = figure.subplots(1, 2)
    drawn: list[tuple[Any, ...]] = []
    for ax, (problem, run) in zip(axes, runs, strict=True):
        points, w = shown(problem, run)
        prepared(ax, problem, points)
        steps = frames_of(len(points) - 1, n_frames)
        steps = steps[np.round(np.linspace(0, len(steps) - 1, n_frames)).astype(int)]
        cloud = ax.scatter(*points[0].T, s=14, linewidths=0, zorder=3)
        drawn.append((ax, cloud, points, w, steps, run["time"].values, ax.get_title()))

    def show(index: int) -> None:
        for ax, cloud, points, w, steps, times, title in drawn:
            step = steps[min(index, n_frames - 1)]
            cloud.set_offsets(points[step])
            cloud.set_facecolors([GREY if v == 0 else BLUE if v > 0 else VERMILLION for v in w[step]])
            ax.set_title(f"{title}, t = {times[step]:.4g}", fontsize=10)

    # The last frame stands for a second.
    animations.record(figure, show, n_frames + n_frames // 6, path, animations.writer_for(path, 12))
    print(f"  drew {path}, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
