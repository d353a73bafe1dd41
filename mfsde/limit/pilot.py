"""A box for a law whose noise is degenerate, from a few thousand particles.

Along an axis without noise the scheme on cells is upwind: it smears by half a cell's width times the speed, and the
far tails of a coarse grid then feed themselves. Particles smear nothing.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from ..measure import EmpiricalMeasure, Law
from ..noise import Noise, Stream
from .coefficients import Coefficients
from .domain import Domain, first_box
from .grid import Array

POINTS = 4096
EVERY = 8  # of them, one in so many makes the law that all move in: interactions of all pairs would take minutes
# Of POINTS normals the farthest is at 3.5 deviations. At 6 a Gaussian density is 1.5e-8 of its maximum: what a scheme
# of first order makes of lower ones is its own, and a wider box would cost it accuracy.
WIDENED = 6.0 / 3.5
FEWEST_STEPS, MOST_STEPS = 64, 4096
SAME = 0.1  # relative difference of the lengths of the boxes of two steps that agree
EXPLODED = 1e6  # first boxes, at which a path has blown up


def moved_without_noise(scenario: Any, start: Law | EmpiricalMeasure, times: Array) -> list[int]:
    """The components that a drift moves and no noise, at the initial law; none where there is no noise at all."""
    mu = start.as_measure() if isinstance(start, Law) else start
    mu = EmpiricalMeasure.given(mu.points.double(), mu.weights.double(), mu.period)
    points = mu.points.numpy()
    coefficients = Coefficients(scenario, points, mu.weights.numpy(), births=True)
    some = (0.0, float(times[-1]) / 2, float(times[-1]))
    still = coefficients.noiseless(some, points, [mu])
    if len(still) == start.dim:
        return []
    speeds = [np.abs(coefficients.drift(t, points, mu)).max(0) for t in some]
    return [k for k in still if max(speed[k] for speed in speeds) > 0]


def box_of_particles(
    scenario: Any, start: Law | EmpiricalMeasure, domain: Domain, times: Array
) -> tuple[Array, Array] | None:
    """A box around what particles reach up to the last time, widened to 6 deviations of a Gaussian; None: they blow up.

    Euler-Maruyama steps of 4096 particles in the law of every eighth, halved until the box moves by less than a tenth.
    With births and deaths the particles have masses; mass from outside starts to move at time 0.
    """
    previous: tuple[Array, Array] | None = None
    n = FEWEST_STEPS
    while n <= MOST_STEPS:
        found = _reached(scenario, start, domain, float(times[-1]), n)
        if found is not None and previous is not None:
            gap = np.abs(np.array(found) - np.array(previous)).max(0)
            if (gap <= SAME * (found[1] - found[0])).all():
                return _boxed(found, start, domain)
        previous, n = found, 2 * n
    return None


def _reached(
    scenario: Any, start: Law | EmpiricalMeasure, domain: Domain, horizon: float, n_steps: int
) -> tuple[Array, Array] | None:
    """The least and largest values of every component along the paths, (d,), (d,); None where they blow up."""
    noise, dt = Noise(0), horizon / n_steps
    x, atoms = _points(start, noise), slice(0, POINTS, EVERY)
    if hasattr(scenario, "reinjection"):
        x = np.concatenate([x, _points(scenario.reinjection()[1], noise)])
    log_mass = np.zeros(POINTS // EVERY)
    coefficients = Coefficients(scenario, x, np.full(len(x), 1 / len(x)), births=True)
    low, high = x.min(0), x.max(0)
    far = EXPLODED * np.maximum(1.0, np.abs([low, high]).max(0))
    for step in range(n_steps):
        t = step * dt
        mass = np.exp(log_mass - log_mass.max())
        law = EmpiricalMeasure.given(
            torch.from_numpy(x[atoms].copy()), torch.from_numpy(mass / mass.sum()), domain.period
        )
        z = noise.normals(step, (1, len(x), x.shape[1]), dtype=torch.float64)[0].numpy()
        try:
            if coefficients.has_birth_death:
                log_mass = log_mass - dt * coefficients.excess_rate(t, law)
            moved = x + dt * coefficients.drift(t, x, law)
            moved += math.sqrt(dt) * _scaled(coefficients.covariance(t, x, law), z)
        except ValueError:
            return None
        if not (np.abs(moved) < far).all():
            return None
        x = coefficients.project(moved)
        low, high = np.minimum(low, x.min(0)), np.maximum(high, x.max(0))
    return low, high


def _boxed(reached: tuple[Array, Array], start: Law | EmpiricalMeasure, domain: Domain) -> tuple[Array, Array]:
    """The widened box inside the walls; intervals, circles and the atoms of a measure as a whole."""
    first = first_box(start, domain)
    middle, half = (reached[0] + reached[1]) / 2, (reached[1] - reached[0]) / 2
    low, high = middle - WIDENED * half, middle + WIDENED * half
    if isinstance(start, EmpiricalMeasure):
        low, high = np.minimum(low, first[0]), np.maximum(high, first[1])
    # A component that nothing has moved yet keeps the least width of a first box.
    flat = half == 0
    low, high = np.where(flat, first[0], low), np.where(flat, first[1], high)
    closed = np.isfinite(domain.low) & np.isfinite(domain.high)
    closed |= np.array([length is not None for length in domain.period or [None] * start.dim])
    low, high = np.where(closed, first[0], low), np.where(closed, first[1], high)
    return np.maximum(low, domain.low), np.minimum(high, domain.high)


def _points(start: Law | EmpiricalMeasure, noise: Noise) -> Array:
    """Points of a law, of equal mass, (POINTS, d): keyed draws, or the atoms of a measure as often as they weigh."""
    if isinstance(start, EmpiricalMeasure):
        shares = np.cumsum(start.weights.double().numpy())
        levels = (np.arange(POINTS) + 0.5) / POINTS * shares[-1]
        atoms: Array = start.points.double().numpy()[np.searchsorted(shares, levels)]
        return atoms
    z = torch.zeros(POINTS, 0, dtype=torch.float64)
    if start.n_variates > 0:
        z = noise.normals(0, (1, POINTS, start.n_variates), stream=Stream.INITIAL, dtype=torch.float64)[0]
    points: Array = start.from_variates(z).double().numpy()
    return points


def _scaled(a: Array, z: Array) -> Array:
    """√a z for the diagonals (n, d) or matrices (n, d, d) a and normals (n, d)."""
    if a.ndim == 2:
        scaled: Array = np.sqrt(a) * z
        return scaled
    values, vectors = np.linalg.eigh(a)
    turned = np.sqrt(np.maximum(values, 0.0)) * z
    found: Array = (vectors @ turned[..., None])[..., 0]
    return found
