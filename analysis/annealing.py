"""Log Z in higher dimensions: annealed importance sampling with resampling, from a Gaussian to the target.

Independent systems of walkers give the standard error; a second run from the Gaussian fitted to the first result must
agree with it.

Source: Del Moral, Doucet, Jasra, Sequential Monte Carlo samplers (2006); Meng, Wong (1996), equation 4.1, for the
bridge; Roberts, Tweedie (1996) for MALA.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special

from .log_density import DROP, LogDensity

Array = np.ndarray

ISLANDS, WALKERS, SWEEPS = 8, 2048, 12
ASCENTS, ASCENT_SCALES = 8, (1.0, 10.0, 100.0)
KEPT_WEIGHT, ACCEPTANCE, MOST_STAGES = 0.5, 0.6, 200


def log_constant(density: LogDensity, d: int, seed: int, tolerance: float, starts: Array) -> tuple[float, float, float]:
    """Log ∫ e^f and its standard error, once two annealing paths agree, and the highest f."""
    generator = np.random.default_rng(seed)
    modes = _ascents(density, d, starts)
    first, first_error, x = _anneal(density, _covering(density, modes), generator)
    flat = x.reshape(-1, d)
    found, error, x = _anneal(density, _Start(flat.mean(0), 1.2 * np.cov(flat.T)), generator)
    if abs(first - found) > 5 * math.hypot(first_error, error) + tolerance / 2:
        raise RuntimeError(
            f"normalise: two annealing paths give log Z = {first:.4g} ± {first_error:.2g} and {found:.4g} ± "
            f"{error:.2g}: some mass was not found. Pass log_z."
        )
    highest, reached = float(density(modes[0])), float(density(x).max())
    # Half of the walkers of a Gaussian lie within d/2 of its peak.
    if reached < highest - d / 2 - 1:
        raise RuntimeError(
            f"normalise: log_density is {highest:.4g} at its highest mode, {modes[0]}, which no walker of the "
            f"annealing reached ({reached:.4g}): some mass was not found. Pass log_z."
        )
    return found, error, highest


@dataclass(frozen=True)
class _Start:
    """A Gaussian from which the annealing starts."""

    mean: Array
    cov: Array

    def sample(self, generator: np.random.Generator) -> Array:
        z = generator.standard_normal((ISLANDS, WALKERS, len(self.mean)))
        found: Array = self.mean + z @ np.linalg.cholesky(self.cov).T
        return found

    def log_density(self, x: Array) -> Array:
        white = np.linalg.solve(np.linalg.cholesky(self.cov), (x - self.mean)[..., None])[..., 0]
        log_det = np.linalg.slogdet(self.cov)[1]
        found: Array = -0.5 * (np.square(white).sum(-1) + log_det + len(self.mean) * math.log(2 * math.pi))
        return found

    def score(self, x: Array) -> Array:
        found: Array = -(x - self.mean) @ np.linalg.inv(self.cov)
        return found


def _covering(density: LogDensity, modes: Array) -> _Start:
    """A Gaussian wider than the target: the scatter of its modes, and how far each reaches along the axes.

    The reach is the farthest crossing of e^-20 of the peak.
    """
    d = modes.shape[1]
    mode, peak = modes[0], float(density(modes[0]))
    radii = np.geomspace(1e-6, 1e60, 1321)[:, None]
    deviation = np.empty(d)
    for k, axis in enumerate(np.eye(d)):
        sides = [np.nan_to_num(density(mode + sign * radii * axis), nan=-math.inf) for sign in (-1, 1)]
        reach = max(float(radii[np.flatnonzero(side > peak - 20).max(initial=0), 0]) for side in sides)
        tail = max(float((side + d * np.log(radii[:, 0]))[-1]) for side in sides)
        if tail > peak + d * math.log(reach) - DROP:
            raise ValueError(f"normalise: e^f does not decay fast enough along component {k}: it is not integrable.")
        deviation[k] = reach / 4
    apart = modes - modes.mean(0)
    return _Start(modes.mean(0), np.diag(deviation**2) + apart.T @ apart / len(modes))


def _ascents(density: LogDensity, d: int, given: Array) -> Array:
    """Local maxima reached from given points and from 0 and around it at several scales.

    The highest first, without those below e^-DROP of it.
    """
    generator = np.random.default_rng(0)
    starts = [np.zeros(d), *(scale * z for scale in ASCENT_SCALES for z in generator.standard_normal((ASCENTS, d)))]
    starts += list(given)
    found = []
    for start in starts:
        if not math.isfinite(float(density(start))):
            continue
        best = optimize.minimize(
            lambda z: -float(np.nan_to_num(density(z), nan=-math.inf)),
            start,
            jac=lambda z: -density.gradient(z),
            method="L-BFGS-B",
            options={"maxiter": 100},
        )
        if np.isfinite(best.x).all() and math.isfinite(best.fun):
            found.append((-float(best.fun), best.x))
    if not found:
        raise ValueError("normalise: log_density is not finite at 0 nor at random points around; check its sign.")
    found.sort(key=lambda item: -item[0])
    return np.array([x for value, x in found if value > found[0][0] - DROP])


def _anneal(density: LogDensity, start: _Start, generator: np.random.Generator) -> tuple[float, float, Array]:
    """Log Z, its standard error over independent systems, and samples of the target.

    Stages p_β ∝ q^{1-β} e^{βf} from q to e^f; each step keeps KEPT_WEIGHT of the effective sample.
    """
    x = start.sample(generator)
    beta, step, log_z = 0.0, 0.5, np.zeros(ISLANDS)
    for _ in range(MOST_STAGES):
        work = _work(density, start, x)
        rise = _next_rise(work, 1 - beta)
        beta = min(1.0, beta + rise)
        moved = _resampled(x, rise * work, generator)
        flat = moved.reshape(-1, x.shape[-1])
        root = np.linalg.cholesky(np.cov(flat.T))
        moved, step = _moved(density, start, beta, moved, root, step, generator)
        log_z += _bridge(rise * work, rise * _work(density, start, moved))
        x = moved
        if beta == 1.0:
            return float(log_z.mean()), float(log_z.std(ddof=1) / math.sqrt(ISLANDS)), x
    raise RuntimeError(f"normalise: the annealing did not reach the target in {MOST_STAGES} stages. Pass log_z.")


def _work(density: LogDensity, start: _Start, x: Array) -> Array:
    values = density(x) - start.log_density(x)
    if np.isnan(values).any() or (values == math.inf).any():
        raise ValueError("normalise: log_density is not a number, or infinite, at points of the annealing.")
    work: Array = values
    return work


def _next_rise(work: Array, left: float) -> float:
    """The increase of β at which the effective sample size is KEPT_WEIGHT of the walkers, at most what is left."""

    def kept(rise: float) -> float:
        w = special.softmax(rise * work, axis=1)
        return float((1 / np.square(w).sum(1)).mean() / work.shape[1]) - KEPT_WEIGHT

    if kept(left) >= 0:
        return left
    return float(optimize.brentq(kept, 0.0, left, xtol=1e-6 * left))


def _resampled(x: Array, log_weight: Array, generator: np.random.Generator) -> Array:
    """Systematic resampling in each system."""
    weights = special.softmax(log_weight, axis=1)
    n = x.shape[1]
    marks = (np.arange(n) + generator.random((len(x), 1))) / n
    chosen = [np.searchsorted(np.cumsum(w), m).clip(max=n - 1) for w, m in zip(weights, marks, strict=True)]
    return np.stack([system[index] for system, index in zip(x, chosen, strict=True)])


def _moved(
    density: LogDensity,
    start: _Start,
    beta: float,
    x: Array,
    root: Array,
    step: float,
    generator: np.random.Generator,
) -> tuple[Array, float]:
    """MALA for p_β, preconditioned by the covariance; the step follows the acceptance."""

    def target(z: Array) -> tuple[Array, Array]:
        slope = (1 - beta) * start.score(z) + beta * density.gradient(z)
        # ∇ in whitened coordinates, clipped: far out a quartic's drift would leave the numbers.
        return (1 - beta) * start.log_density(z) + beta * density(z), _clipped(slope @ root, step)

    value, slope = target(x)
    for _ in range(SWEEPS):
        noise = generator.standard_normal(x.shape)
        jump = 0.5 * step**2 * slope + step * noise
        there = x + jump @ root.T
        value_there, slope_there = target(there)
        back = (-jump - 0.5 * step**2 * slope_there) / step
        log_ratio = value_there - value + 0.5 * (np.square(noise).sum(-1) - np.square(back).sum(-1))
        accepted = np.log(generator.random(log_ratio.shape)) < log_ratio
        x = np.where(accepted[..., None], there, x)
        value, slope = np.where(accepted, value_there, value), np.where(accepted[..., None], slope_there, slope)
    # Only between stages: a step that changed within one would break detailed balance.
    return x, step * math.exp(float(accepted.mean()) - ACCEPTANCE)


def _clipped(slope: Array, step: float) -> Array:
    """A drift of at most two noise lengths: a function of the point alone, so that MALA stays exact."""
    longest = 2 * math.sqrt(slope.shape[-1]) * 2 / step
    length = np.linalg.norm(slope, axis=-1, keepdims=True)
    shorter: Array = slope * np.minimum(1.0, longest / np.maximum(length, 1e-300))
    return shorter


def _bridge(forward: Array, backward: Array) -> Array:
    """Log Z₁/Z₀ from log(p₁/p₀) at samples of p₀ and of p₁, equally many: the optimal bridge.    (I, n) -> (I,)."""
    low = np.minimum(forward.min(1), backward.min(1)) - 1.0
    high = np.maximum(forward.max(1), backward.max(1)) + 1.0
    for _ in range(60):
        middle = (low + high) / 2
        excess = special.expit(forward - middle[:, None]).sum(1) - special.expit(middle[:, None] - backward).sum(1)
        low, high = np.where(excess > 0, middle, low), np.where(excess > 0, high, middle)
    found: Array = (low + high) / 2
    return found
