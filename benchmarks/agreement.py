"""Whether a competitor computes the workload: asked before it is timed.

Without noise three steps must be those of plain float64 arithmetic, to rounding or to the strategy's declared
tolerance. With noise the difference to the step without must be σ√h times standard normals. The OU process must have
the mean and variance of its Euler chain, births and deaths the variance of their Gaussian closure.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from .competitors import Competitor, Run
from .workloads import DT, OU, WORKLOADS, Births, Case

SMALL = {"A": 4096, "B": 600, "C": 200, "D": 100, "E": 100_000}
STEPS, LONG = 3, 64
# Standard errors that pass.
BOUND = 4.5


class Disagreement(AssertionError):
    """A competitor that does something else."""


def check(competitor: Competitor, workload: str, dtype: str = "float32", device: str = "cpu") -> None:
    """Raises Disagreement with what differs, and by how much."""
    case = Case(workload, SMALL[workload], dtype=dtype, device=device)
    prepare = competitor.prepare[workload]
    if workload == "E":
        _check_variance(case, final(prepare(case), LONG))
        return
    if competitor.tolerance is not None:
        _check_drift(case, final(prepare(case.without_noise()), STEPS), competitor.tolerance)
        # Minibatches are random as well: their noise is seen around the gradient of all the data.
        whole = dataclasses.replace(case, batch=0)
        _check_noise(whole, final(prepare(whole), 1), final(prepare(case.without_noise()), 1))
    if workload == "A":
        _check_law(case, final(prepare(case), LONG))


def final(run: Run, steps: int) -> np.ndarray:
    """The particles after some steps, (R, N, d), in float64."""
    keeps = run(steps)
    if keeps is None:
        keeps = run(steps, keep=True)
    value: Any = keeps.cpu() if hasattr(keeps, "cpu") else keeps
    return np.asarray(value, dtype=np.float64)


def plain(case: Case, steps: int) -> np.ndarray:
    """Euler without noise, in float64, of the first replica."""
    x = case.start()[0].astype(np.float64)
    for _ in range(steps):
        x = x + DT * case.of.drift(x)
    return x


def _check_drift(case: Case, found: np.ndarray, tolerance: float) -> None:
    expected, start = plain(case, STEPS), case.start()[0].astype(np.float64)
    # Adding small increments to a state loses what the state's own rounding is.
    rounding = STEPS * np.finfo(case.dtype).eps * np.abs(start).max() / np.abs(expected - start).max()
    error = np.abs(found[0] - expected).max() / np.abs(expected - start).max()
    if not error <= tolerance + rounding:
        raise Disagreement(f"moves without noise by {error:.2g} of the largest move other than plain arithmetic")


def _check_noise(case: Case, noisy: np.ndarray, silent: np.ndarray) -> None:
    pull = 0.0 if case.workload == "A" else 0.5 * case.noise**2
    z = (noisy - silent + DT * pull * case.start()) / (case.noise * math.sqrt(DT))
    count = z.size
    scores = (z.mean() * math.sqrt(count), (z.var() - 1) * math.sqrt(count / 2))
    if not max(map(abs, scores)) <= BOUND:
        raise Disagreement(f"noise has mean and variance {scores[0]:.1f} and {scores[1]:.1f} standard errors away")


def _check_law(case: Case, found: np.ndarray) -> None:
    of = WORKLOADS["A"]
    assert isinstance(of, OU)
    mean, variance, mean_error, variance_error = of.law(case.start()[0, :, 0], LONG)
    scores = ((found[0].mean() - mean) / mean_error, (found[0].var() - variance) / variance_error)
    if not max(map(abs, scores)) <= BOUND:
        raise Disagreement(f"mean and variance {scores[0]:.1f} and {scores[1]:.1f} standard errors away")


def _check_variance(case: Case, found: np.ndarray) -> None:
    of = WORKLOADS["E"]
    assert isinstance(of, Births)
    expected = of.variance(float(case.start().var()), LONG)
    # Ancestors in common leave fewer independent particles: those that lived through all steps bound them from below.
    independent = case.n * math.exp(-LONG * DT * of.alpha * expected)
    error = expected * math.sqrt(2 / independent)
    # Rings that are frozen over a step, and meet, are of second order in it.
    bias = 2 * DT * expected**2
    miss = float(np.square(found[0]).mean()) - expected
    if not abs(miss) <= BOUND * error + bias:
        raise Disagreement(f"variance {expected + miss:.4f} after {LONG} steps instead of {expected:.4f} ± {error:.4f}")
