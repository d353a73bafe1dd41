"""Rates with intervals: exponential decay in time, powers of N, dt or σ, contraction along the optimal coupling.

A rate is a slope of replica means on a logarithmic scale. Its interval comes from the delete-one-replica jackknife with
Student's t, over a window in which the mean stands above its noise; what would make the interval a lie is looked for,
and ends up in `Rate.flags`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xarray as xr
from scipy import optimize, special, stats

from . import wasserstein
from .labels import apply
from .particles import check_finite, check_matching, period, positions, weights
from .replicas import count, jackknife_error, leave_one_out, t_quantile

Array = np.ndarray

# A mean enters the window while it is at least this many standard errors above zero.
ABOVE_NOISE = 6.0
FEWEST_POINTS = 4
# Level of the tests that raise a flag: a sound series is flagged this often by each.
FLAG_LEVEL = 0.99
# Relative differences below this are rounding (a minimum is found to √ε at best), whatever the replicas say.
ROUNDING = 1e-6
# Share of the squared distance that a change of shape may have before the transport U-statistic is called biased.
LARGEST_SHAPE = 0.05


class Unresolved(ValueError):
    """No window stands above the noise: the data hold no rate."""


@dataclass(frozen=True)
class Rate:
    """A rate and its 95 % interval.

    Args:
        value: λ of A e^{-λt}, or p of A n^p.
        low: lower end of the 95 % interval.
        high: upper end.
        stderr: standard error over replicas.
        window: first and last abscissa that entered the fit.
        prefactor: A.
        method: how it was estimated, in words.
        flags: reasons to doubt it, empty when there are none.

    """

    value: float
    low: float
    high: float
    stderr: float
    window: tuple[float, float]
    prefactor: float
    method: str
    flags: tuple[str, ...] = ()

    def __str__(self) -> str:
        half = (self.high - self.low) / 2
        text = f"{self.value:.4g} ± {half:.2g} (95 %, {self.method}, window [{self.window[0]:g}, {self.window[1]:g}])"
        return text + "".join(f"\n  flag: {flag}" for flag in self.flags)

    def attributes(self) -> dict[str, Any]:
        """As attributes of a dataset: numbers and strings only."""
        return {
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "stderr": self.stderr,
            "window_start": self.window[0],
            "window_end": self.window[1],
            "prefactor": self.prefactor,
            "method": self.method,
            "flags": "; ".join(self.flags),
        }


# Exponential decay


def exponential(distance: xr.DataArray, *, start: float | None = None, stop: float | None = None) -> Rate:
    """λ of W₂ ~ A e^{-λt}, by a weighted straight line through log of the replica mean.

    What is fitted is free of the sampling floor where the series allows it: jackknife values (`debiased`, or the
    coordinate `unbiased` of `to_law`), else the squares less the squared coordinate `floor`, else the values as they
    are. The window begins at `start` and ends before the first time at which the mean is not 6 standard errors above
    zero. Weights are inverse squares of the relative standard errors, smoothed by a line in t; the interval is the
    delete-one-replica jackknife's, with t of R - 1 degrees of freedom. It is an interval for the slope of log W₂ over
    the window: the rate as t → ∞ only once transients are over (`start`), which the flags cannot always tell.

    Args:
        distance: (time, replica), with attrs["power"] = 1 for W₂ or 2 for W₂²; λ is W₂'s in either case.
        start: first time of the fit; an initial transient before it is left out.
        stop: last time of the fit.

    Returns:
        Rate. Flags are raised when, at the 1 % level, the logarithm is curved in the window (a transient, more than one
        exponential); a fit with a free floor to the whole series disagrees; the same fit from N/2 particles disagrees;
        or when the laws differ in shape, where the transport U-statistic is biased.

    Raises:
        Unresolved: no window of four times stands above the noise.
        ValueError: one replica, values that are not finite, dimensions other than (time, replica), times that do not
            increase, no `power`.

    """
    power = _power(distance)
    samples, label, exponent = _decaying(distance, power)
    t = np.asarray(distance["time"].values, dtype=np.float64)
    check_finite(samples, "rates.exponential")
    if not (np.diff(t) > 0).all():
        raise ValueError("rates.exponential: the times do not increase; sort the series with distance.sortby('time').")
    window = _window(t, samples, start, stop)
    line = _LogLine(t[window], samples[:, window])
    flags = [
        *line.curvature_flag("a transient, or more than one exponential; pass start= to begin later"),
        *_free_floor_flag(t, samples, window, line),
        *_half_flag(distance, t, window, line),
        *_shape_flag(distance, samples, window),
        *_bound_flag(distance),
    ]
    return line.rate(-1 / exponent, f"{label}, jackknife over {len(samples)} replicas", flags, 1 / exponent)


def _power(distance: xr.DataArray) -> int:
    if set(distance.dims) != {"time", "replica"}:
        raise ValueError(
            f"rates.exponential: expected a distance (time, replica); got dimensions {distance.dims}. Use "
            "wasserstein.to_law(run, law) or wasserstein.debiased(run, reference)."
        )
    power = distance.attrs.get("power")
    if power not in (1, 2):
        raise ValueError(
            f"rates.exponential: attrs['power'] is {power!r}; set it to 1 (the rate of the series itself, or of W₂) or "
            "to 2 (a squared distance: λ is that of its root)."
        )
    count(distance)
    return int(power)


def _decaying(distance: xr.DataArray, power: int) -> tuple[Array, str, int]:
    """Samples (R, T) whose mean decays like e^{-exponent·λt}, in words, and the exponent."""
    values = distance.transpose("replica", "time")
    if power == 2:
        return _floats(values), "log-linear fit of the squared distance", 2
    if "unbiased" in distance.coords:
        return _floats(distance["unbiased"].transpose("replica", "time")), "log-linear fit of W₂² without its floor", 2
    if "floor" in distance.coords:
        return _floats(values**2 - distance["floor"] ** 2), "log-linear fit of W₂² less the floor", 2
    return _floats(values), "log-linear fit", 1


def _floats(values: xr.DataArray) -> Array:
    return np.asarray(values.values, dtype=np.float64)


def _window(t: Array, samples: Array, start: float | None, stop: float | None) -> slice:
    """The contiguous times from `start` on whose means stand above the noise."""
    first = 0 if start is None else int(np.searchsorted(t, start - 1e-9))
    last = len(t) if stop is None else int(np.searchsorted(t, stop + 1e-9))
    mean, error = samples.mean(0), samples.std(0, ddof=1) / len(samples) ** 0.5
    above = (mean > ABOVE_NOISE * error) & (leave_one_out(samples) > 0).all(0)
    end = first
    while end < last and above[end]:
        end += 1
    if end - first >= FEWEST_POINTS:
        return slice(first, end)
    if last - first < FEWEST_POINTS:
        raise Unresolved(
            f"no rate: start = {start} and stop = {stop} leave {max(0, last - first)} of the saved times "
            f"{t[0]:g} ... {t[-1]:g}, and a fit takes {FEWEST_POINTS}. Widen the window, or save more often."
        )
    signal = mean[first:last] / np.maximum(error[first:last], 1e-300)
    raise Unresolved(
        f"no rate: from t = {t[first]:g} on, {end - first} saved times in a row stand {ABOVE_NOISE:g} standard errors "
        f"above the floor, and a fit takes {FEWEST_POINTS} (they are "
        f"{', '.join(f'{z:.3g}' for z in signal[:FEWEST_POINTS])}, ... of them above it). Save more often, use more "
        "particles or replicas, or start further from equilibrium."
    )


class _LogLine:
    """The weighted straight line through the logarithm of replica means, and its delete-one values."""

    def __init__(self, x: Array, samples: Array, weights: Array | None = None) -> None:
        self.x, self.replicas = x, len(samples)
        mean, error = samples.mean(0), samples.std(0, ddof=1) / len(samples) ** 0.5
        self.logs, self.without_logs = np.log(mean), np.log(leave_one_out(samples))
        self.weights = _smoothed(x, np.maximum(error / mean, 1e-12)) ** -2 if weights is None else weights
        solve = _solver(x, self.weights, 1)
        self.intercept, self.slope = solve @ self.logs
        self.slopes = self.without_logs @ solve[1]

    @property
    def error(self) -> float:
        """Jackknife standard error of the slope."""
        return float(jackknife_error(self.slopes))

    def rate(self, factor: float, method: str, flags: list[str], root: float = 1.0) -> Rate:
        """The slope times `factor`, with its interval; the prefactor is e^{intercept·root}."""
        value, stderr = factor * float(self.slope), abs(factor) * self.error
        half = t_quantile(self.replicas) * stderr
        window = (float(self.x[0]), float(self.x[-1]))
        with np.errstate(over="ignore"):
            prefactor = float(np.exp(root * self.intercept))
        return Rate(value, value - half, value + half, stderr, window, prefactor, method, tuple(flags))

    def curvature_flag(self, reason: str) -> list[str]:
        """A flag when a parabola fits better than chance."""
        if len(self.x) < 3:
            return []
        solve = _solver(self.x, self.weights, 2)[2]
        bend, error = float(solve @ self.logs), float(jackknife_error(self.without_logs @ solve))
        if not _differ(bend, error, self.replicas, 1 / float(np.ptp(self.x)) ** 2):
            return []
        return [f"curved on the logarithmic scale ({bend:.2g} ± {error:.1g} per squared unit): {reason}"]


def _solver(x: Array, weights: Array, degree: int) -> Array:
    """The matrix that maps ordinates to the coefficients of the weighted polynomial fit.    (degree + 1, n)."""
    # Powers of times far from 0 are nearly dependent; those of u = (x - centre)/scale are not.
    centre, scale = float(x.mean()), float(np.ptp(x)) / 2
    k = np.arange(degree + 1)
    powers = ((x - centre) / scale)[None] ** k[:, None]
    solved = np.linalg.solve((powers * weights) @ powers.T, powers * weights)
    lower = np.maximum(k - k[:, None], 0)
    back: Array = special.comb(k, k[:, None]) * (-centre) ** lower / scale ** k.astype(float)
    return back @ solved


def _smoothed(x: Array, errors: Array) -> Array:
    """Errors on a straight line in the logarithm: those of R replicas are noisy, and the smallest are so by chance."""
    trend = np.polynomial.polynomial.polyfit(x, np.log(errors), 1)
    smooth: Array = np.exp(np.polynomial.polynomial.polyval(x, trend))
    return smooth


def _differ(difference: float, error: float, replicas: int, scale: float) -> bool:
    """Whether a difference is more than chance, and more than rounding of numbers of size `scale`."""
    return abs(difference) > max(t_quantile(replicas, FLAG_LEVEL) * error, ROUNDING * abs(scale))


def _free_floor_flag(t: Array, samples: Array, window: slice, line: _LogLine) -> list[str]:
    """A flag when A e^{-at} + C, fitted from the window's start to the end of the series, has another a."""
    tail = slice(window.start, None)
    slope = -float(line.slope)
    if len(t[tail]) < FEWEST_POINTS + 1 or slope <= t_quantile(len(samples)) * line.error:
        return []
    x, y = t[tail], samples[:, tail]
    mean, error = y.mean(0), y.std(0, ddof=1) / len(y) ** 0.5
    # A series may end at its own reference, where the error is zero by construction.
    smallest = max(1e-2 * float(np.median(error)), ROUNDING**2 * float(mean.max()))
    weights = _smoothed(x, np.maximum(error, smallest) / smallest) ** -2
    found = np.array([_free_floor_rate(x, z, weights, slope) for z in [mean, *leave_one_out(y)]])
    spread = float(jackknife_error(found[1:] + line.slopes))
    if not _differ(found[0] - slope, spread, len(y), slope):
        return []
    return [
        f"free floor: with one the fit decays at {found[0]:.3g} where the window gives {slope:.3g}; the floor is not "
        "what it was taken for, or the decay is not one exponential"
    ]


def _free_floor_rate(x: Array, mean: Array, weights: Array, near: float) -> float:
    """The a that minimises Σ w (mean - A e^{-at} - C)², searched around `near`."""

    def misfit(log_a: float) -> float:
        basis = np.stack([np.exp(-np.exp(log_a) * (x - x[0])), np.ones_like(x)])
        gram = (basis * weights) @ basis.T
        solved = np.linalg.lstsq(gram, (basis * weights) @ mean, rcond=None)[0]
        return float(np.sum(weights * np.square(mean - solved @ basis)))

    bounds = (np.log(near) - 2, np.log(near) + 2)
    best = optimize.minimize_scalar(misfit, bounds=bounds, method="bounded", options={"xatol": 1e-8})
    return float(np.exp(best.x))


def _half_flag(distance: xr.DataArray, t: Array, window: slice, line: _LogLine) -> list[str]:
    """A flag when N/2 particles give another slope, or lose the window."""
    if "half" not in distance.coords:
        return []
    half = _floats(distance["half"].transpose("replica", "time"))[:, window]
    if not ((half.mean(0) > 0).all() and (leave_one_out(half) > 0).all()):
        return ["N/2 particles lose the window: with them the distance is not positive throughout; use more particles"]
    other = _LogLine(t[window], half, line.weights)
    difference = float(other.slope - line.slope)
    spread = float(jackknife_error(other.slopes - line.slopes))
    if not _differ(difference, spread, len(half), float(line.slope)):
        return []
    return [
        f"N/2 particles disagree with N (decay of the squared distance {-line.slope:.3g} and {-other.slope:.3g}): the "
        "statistic is biased; use more particles, or estimator='gaussian' for Gaussian laws"
    ]


def _shape_flag(distance: xr.DataArray, samples: Array, window: slice) -> list[str]:
    """A flag when covariances differ by a share of the distance that may matter: the U-statistic needs translations."""
    if "shape" not in distance.coords:
        return []
    shape = _floats(distance["shape"].transpose("replica", "time"))[:, window]
    upper = shape.mean(0) + 2 * shape.std(0, ddof=1) / len(shape) ** 0.5
    share = float(np.max(upper / samples[:, window].mean(0)))
    if share <= LARGEST_SHAPE:
        return []
    return [
        f"shape: the covariances may differ by {share:.0%} of the squared distance, and the transport U-statistic is "
        "unbiased for translations only; begin later (start=), or estimator='gaussian' for Gaussian laws"
    ]


def _bound_flag(distance: xr.DataArray) -> list[str]:
    """A flag when the series is a lower bound of the distance, whose rate may be another one."""
    if distance.attrs.get("bound") != "lower":
        return []
    return [
        "bound: the laws are not Gaussian, and this is the rate of their means and covariances; use "
        "wasserstein.debiased(..., estimator='transport') for W₂"
    ]


# Powers


def power(table: xr.DataArray | xr.Dataset, over: str = "n_particles") -> Rate:
    """The exponent p of A n^p, by a weighted straight line through logarithms.

    Args:
        table: positive values with the dimension `over` and `replica` (or `seed`), as from `sweep` or `chaos.table`; or
            with `over` alone and standard errors as coordinate `stderr`. A Dataset with one variable stands for it.
        over: the swept name: n_particles, dt, sigma, ...

    Returns:
        Rate of the values as they are (of a squared error, twice its root's), negative for decay, with the jackknife's
        interval: one replica is left out at all n at once, since runs of equal seed share their noise. With `stderr`
        alone, points count as independent and the interval is ± 1.96 stderr. Flags: curvature on the log-log scale (a
        misfit, with `stderr`), means within 3 standard errors of zero.

    Raises:
        ValueError: fewer than three values of n, no replicas and no errors, values that are not finite, means <= 0.

    """
    values = _one_variable(table)
    if over not in values.dims:
        raise ValueError(f"rates.power: no dimension {over!r} among {values.dims}; name what was swept by over=.")
    n = np.asarray(values[over].values, dtype=np.float64)
    if len(np.unique(n)) < 3 or not (np.isfinite(n) & (n > 0)).all():
        raise ValueError(
            f"rates.power: {len(n)} values of {over} ({n.tolist()}); a slope takes three positive ones, all different."
        )
    rest = [d for d in values.dims if d != over]
    if rest in (["replica"], ["seed"]):
        return _replicated_power(n, values.transpose(rest[0], over), str(rest[0]))
    if not rest and "stderr" in values.coords:
        return _independent_power(n, values)
    raise ValueError(
        f"rates.power: expected dimensions ({over}, replica) or ({over}, seed), or ({over},) with a coordinate "
        f"`stderr`; got {values.dims}. Reduce the others (.isel(time=-1), .max('time'))."
    )


def _one_variable(table: xr.DataArray | xr.Dataset) -> xr.DataArray:
    if isinstance(table, xr.DataArray):
        return table
    if len(table.data_vars) != 1:
        raise ValueError(f"rates.power: the dataset holds {sorted(map(str, table.data_vars))}; pass one: table[name].")
    return next(iter(table.data_vars.values()))


def _replicated_power(n: Array, values: xr.DataArray, dim: str) -> Rate:
    count(values, dim)
    samples = _floats(values)
    check_finite(samples, "rates.power")
    mean, error = samples.mean(0), samples.std(0, ddof=1) / len(samples) ** 0.5
    if (leave_one_out(samples) <= 0).any() or (mean <= 0).any():
        raise Unresolved(
            f"no power law: means {np.array2string(mean, precision=3)} are not positive without any one replica; use "
            "more replicas, or leave out the values that are lost in noise."
        )
    order = np.argsort(n)
    line = _LogLine(np.log(n[order]), samples[:, order])
    flags = line.curvature_flag("not one power over this range; leave out the small or the large end")
    if (mean < 3 * error).any():
        flags.append("some means are within 3 standard errors of zero; use more replicas there")
    fitted = line.rate(1.0, f"log-log fit, jackknife over {len(samples)} {dim}s", flags)
    return _over_range(fitted, n)


def _independent_power(n: Array, values: xr.DataArray) -> Rate:
    mean, error = _floats(values), _floats(values["stderr"])
    check_finite(np.stack([mean, error]), "rates.power")
    if (mean <= 0).any() or (error <= 0).any():
        raise Unresolved("no power law: means and standard errors must be positive; leave out what is lost in noise.")
    x, weights = np.log(n), np.square(mean / error)
    solve = _solver(x, weights, 1)
    intercept, slope = (float(c) for c in solve @ np.log(mean))
    stderr = float(np.sqrt(np.square(solve[1]) @ (1 / weights)))
    half = 1.96 * stderr
    method = "log-log fit of independent points with given errors"
    misfit = float(weights @ np.square(np.log(mean) - intercept - slope * x))
    poor = misfit > stats.chi2.ppf(FLAG_LEVEL, len(n) - 2)
    flags = ("not one power over this range: the points miss the line by more than their errors",) if poor else ()
    window = (float(n.min()), float(n.max()))
    return Rate(slope, slope - half, slope + half, stderr, window, float(np.exp(intercept)), method, flags)


def _over_range(rate: Rate, n: Array) -> Rate:
    return replace(rate, window=(float(n.min()), float(n.max())))


# Contraction


def contraction(x: Array, y: Array, v: Array, w: Array) -> float:
    """-∫⟨v - w, x - y⟩dπ / ∫|x - y|²dπ along the optimal coupling π of two samples: a rate without sampling floor.

    With v, w the velocities that move the laws, d/dt ½W₂² = ∫⟨v - w, x - y⟩dπ. With v, w the drifts of one equation
    with additive noise the diffusion only helps, and the value bounds W₂'s rate from below. It is an identity for the
    samples, and a rate of the laws while they are further apart than their sampling floor: nearer, the optimal coupling
    pairs noise, and a drift that is not linear shows its contraction at that scale.

    Args:
        x: points, (N, d).
        y: points, (M, d).
        v: velocities at x, (N, d).
        w: velocities at y, (M, d).

    Raises:
        ValueError: arrays that are not (N, d), shapes that differ, values that are not finite, equal samples.

    Source: Ambrosio, Gigli, Savaré, Gradient Flows (2008), theorem 8.4.7; Bolley, Gentil, Guillin (2012).

    """
    if np.ndim(x) != 2 or np.ndim(y) != 2:
        raise ValueError(f"contraction: expected samples (N, d); got shapes {np.shape(x)} and {np.shape(y)}.")
    for name, z, like in (("v", v, x), ("w", w, y)):
        if np.shape(z) != np.shape(like):
            raise ValueError(f"contraction: {name} has shape {np.shape(z)}, its points {np.shape(like)}.")
        check_finite(np.asarray(z), f"contraction, {name}")
    i, j, mass = wasserstein.coupling(x, y)
    gap = x[i].astype(np.float64) - y[j]
    squared = float(mass @ np.square(gap).sum(-1))
    if squared == 0:
        raise ValueError("contraction: the samples are equal, so nothing contracts; compare different laws.")
    return -float(mass @ ((v[i].astype(np.float64) - w[j]) * gap).sum(-1)) / squared


def contraction_between(run: xr.Dataset, other: xr.Dataset, drift: Callable[[float, Array], Array]) -> xr.DataArray:
    """`contraction` at every saved time and replica of two runs of one equation.    (time, replica).

    Args:
        run: a run.
        other: a run from another initial law, with the same times and replicas.
        drift: (t, x (N, d)) -> velocities (N, d), the law being that of x; `rates.drift_of(scenario)` makes it.

    Raises:
        ValueError: labels that differ, unequal masses, a torus, values that are not finite, equal samples.

    """
    x, y = positions(run), positions(other)
    if weights(run) is not None or weights(other) is not None or period(x, y) is not None:
        raise ValueError(
            "contraction_between: expected particles of equal mass in Euclidean space; for others call "
            "rates.contraction on resampled points, one time and replica at a time."
        )
    check_matching(x, y, ("time", "replica", "component"))
    y = y.rename(particle="particle_b").drop_vars("particle_b", errors="ignore")

    def block(t: Array, a: Array, b: Array) -> Array:
        lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        times = np.broadcast_to(t, lead).reshape(-1)
        u, v = (z.reshape(-1, *z.shape[-2:]) for z in (a, b))
        found = [
            contraction(u[k], v[k], drift(float(times[k]), u[k]), drift(float(times[k]), v[k])) for k in range(len(u))
        ]
        return np.array(found).reshape(lead)

    result: xr.DataArray = apply(
        block,
        x["time"],
        x.drop_vars("particle", errors="ignore"),
        y,
        input_core_dims=[[], ["particle", "component"], ["particle_b", "component"]],
        output_dtypes=[float],
    )
    return result.rename("contraction").assign_attrs(
        long_name="contraction rate along the optimal coupling", units="1", estimator="-∫⟨b - b', x - y⟩dπ/∫|x - y|²dπ"
    )


def drift_of(scenario: Any) -> Callable[[float, Array], Array]:
    """A scenario's drift on arrays (N, d), the law being that of the points."""
    import torch

    from mfsde import EmpiricalMeasure

    def drift(t: float, x: Array) -> Array:
        points = torch.from_numpy(np.array(x))[None]
        mu = EmpiricalMeasure(points, period=getattr(scenario, "period", None))
        velocities: Array = scenario.drift(t, points, mu)[0].detach().numpy()
        return velocities

    return drift
