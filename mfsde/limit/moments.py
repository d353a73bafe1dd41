"""Mean and covariance of equations that close on them, in any dimension: drift affine in x, σσᵀ quadratic at most.

    m' = E b(t, X, μ),    C' = A C + C Aᵀ + E σσᵀ(t, X, μ),    b(t, x, μ) = A x + c,

A and c functions of time and of the law. They are read off the scenario's own drift at points around the mean, and
what they leave over at other points is the residual that is checked and returned.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import xarray as xr
from scipy.integrate import solve_ivp

from ..energy import Energy
from ..measure import Dirac, EmpiricalMeasure, Gaussian, Law
from ..model import configuration, scenario_name
from . import results
from .coefficients import Coefficients, initial_law

Array = np.ndarray

RTOL, ATOL = 1e-12, 1e-14
CLOSED = 1e-8  # residual, relative to the size of the coefficient around the mean, up to which the equations close
REACH = 3.0  # deviations around the mean within which that is looked at
REST = (
    1e-7  # of the places, per unit of time: a drift that is smaller is nearly at rest, and rounding what is left of it
)
LEAST = 1e-3  # deviation to look at, relative to the mean and to the largest deviation
PLACES = np.linspace(-1.0, 1.0, 5)  # on each line through the mean
OBLIQUE = 6  # lines beside the axes
REMEMBERED = 64  # laws


def moments(scenario: Any, times: Any, *, store: results.Path_ | None = None, overwrite: bool = False) -> xr.Dataset:
    """Mean and covariance of the mean-field limit, where they solve a closed ODE.

    They do if b(t, ·, μ) is affine and every entry of σσᵀ(t, ·, μ) a polynomial of degree two at most (σ constant, or
    affine in x), and both depend on μ through its mean and covariance. In d <= 2, if σσᵀ does not depend on x and the
    initial law is Gaussian, b and σ may depend on μ in any way: the law stays Gaussian, and integrals against it are
    taken by Gauss-Hermite quadrature.

    Args:
        scenario: as for `simulate`, in any dimension.
        times: increasing, from 0 on; the equation always starts at 0.
        store: a folder to write to, opened again by `mfsde.open_run`.
        overwrite: replace an existing store.

    Returns:
        Dataset over `time`: `mean` (component), `covariance` (component, component_2); `energy` of a scenario that has
        one, where the law is Gaussian or mean and covariance determine it; `residual`, how far the coefficients are
        from the form above within three deviations of the mean, relative to their size there.

    Raises:
        TypeError, ValueError: bad input; moments that do not close; common noise, a domain, a torus.
        RuntimeError: moments that leave every bound.
        FileExistsError: the store exists.

    Source: Carmona, Delarue, Probabilistic Theory of Mean Field Games I (2018), section 3.5, for the linear-quadratic
    case.

    """
    times = results.checked_times(times)
    closure = Closure(scenario)
    end = float(times[-1])
    states: Array = closure.solved(0.0, end, closure.start, at=times).y.T if end > 0 else closure.start[None]
    mean, cov = closure.unpacked(states)
    residual = np.array([closure.checked(float(t), y) for t, y in zip(times, states, strict=True)])
    series: dict[str, Any] = {
        "mean": (("component",), mean, "mean of the law", "1"),
        "covariance": (("component", "component_2"), cov, "covariance of the law", "1"),
        "residual": ((), residual, "distance of the coefficients from closed moment equations", "1"),
    }
    energy = closure.energy(states)
    if energy is not None:
        series["energy"] = ((), energy, "energy F(m)", "1")
    settings = {"method": "moments", "integrator": "DOP853", "rtol": RTOL, "atol": ATOL}
    coords = results.component_coordinate(closure.dim)
    return results.dataset(scenario, times, series, coords, settings, store, overwrite)


def gaussian_limit(scenario: Any, horizon: float | None = None) -> Callable[[float], Gaussian]:
    """The law of the mean-field limit as a function of time, for an equation whose limit stays Gaussian.

    A scenario makes its own `limit` with it:

        @cached_property
        def _flow(self):     return mfsde.limit.gaussian_limit(self)
        def limit(self, t):  return self._flow(t)

    Args:
        scenario: as for `simulate`, in any dimension.
        horizon: what is solved for at first, 1 when None; it is doubled as later times are asked for.

    Returns:
        t -> Gaussian, for every t >= 0.

    Raises:
        TypeError, ValueError: as `moments`, and where σσᵀ depends on x or the initial law is neither Gaussian nor a
            point; when called, a negative time.
        RuntimeError: when called, as `moments`.

    """
    closure = Closure(scenario)
    if not closure.is_gaussian:
        reason = "σσᵀ depends on x" if not closure.is_additive else "the initial law is not Gaussian"
        raise ValueError(
            f"{closure.name}: the limit is not Gaussian, since {reason}. mfsde.limit.moments has its mean and "
            "covariance; in d = 1 or 2 mfsde.limit.fokker_planck has its density."
        )
    return _Flow(closure, horizon)


class Closure:
    """The moment equations of a scenario, for states y = (m, C) of d + d² numbers.

    Args:
        scenario: as for `simulate`.

    Raises:
        TypeError, ValueError: as `moments`.

    """

    def __init__(self, scenario: Any) -> None:
        self.name = scenario_name(scenario)
        _check_free(scenario, self.name)
        start = initial_law(scenario)
        mean, cov = _first_moments(start)
        self.dim = len(mean)
        self.start = np.concatenate([mean, cov.ravel()])
        standard = Gaussian([0.0] * self.dim, 1.0).as_measure()
        self._rules = (standard.points.numpy(), standard.weights.numpy()), _skew_rule(self.dim)
        self._lines = _lines(self.dim)
        law = self._law(self.start)
        self.coefficients = Coefficients(scenario, law.points.numpy(), law.weights.numpy())
        a = self.coefficients.covariance(0.0, self._places(self.start), law)
        self.is_additive = _relative(a - a[:1], a) <= CLOSED
        self.is_gaussian = self.is_additive and isinstance(start, (Gaussian, Dirac))
        self.checked(0.0, self.start)

    def unpacked(self, y: Array) -> tuple[Array, Array]:
        """(..., d + d²) -> (..., d), (..., d, d)."""
        d = self.dim
        cov = y[..., d:].reshape(*y.shape[:-1], d, d)
        return y[..., :d], (cov + cov.swapaxes(-1, -2)) / 2

    def law(self, y: Array) -> Gaussian:
        """The Gaussian with these moments."""
        return Gaussian(*self.unpacked(y))

    def slope(self, t: float, y: Array) -> Array:
        """(m', C')."""
        if not np.isfinite(y).all():
            # The integrator tries a smaller step.
            return np.full_like(y, np.nan)
        _, cov = self.unpacked(y)
        law = self._law(y)
        matrix, at_mean, residual = self._affine(t, y, law)
        self._refuse("drift is not affine in x", residual)
        noise = matrix @ cov + cov @ matrix.T + self._mean_noise(t, y, law)
        return np.concatenate([at_mean, noise.ravel()])

    def solved(self, t: float, end: float, y: Array, at: Array | None = None) -> Any:
        """Scipy's solution from a state at time t to a later time, at given times or everywhere.

        Raises:
            RuntimeError: the moments leave every bound.

        """
        found = solve_ivp(
            self.slope, (t, end), y, method="DOP853", rtol=RTOL, atol=ATOL, t_eval=at, dense_output=at is None
        )
        if not found.success or not np.isfinite(found.y).all():
            raise RuntimeError(
                f"{self.name}: the moments leave every bound between t = {found.t[-1] if len(found.t) else t:.6g} and "
                f"{end:.6g}, or change too fast to be followed ({found.message}). Ask for earlier times; of a limit, "
                "with an earlier horizon."
            )
        return found

    def checked(self, t: float, y: Array) -> float:
        """How far the coefficients are from closing on mean and covariance, relative to their size.

        Raises:
            ValueError: too far.

        """
        law, places = self._law(y), self._places(y)
        b, a = self.coefficients.drift(t, places, law), self.coefficients.covariance(t, places, law)
        residuals = {"drift is not affine in x": self._affine(t, y, law)[2]}
        if self.is_additive:
            residuals["diffusion depends on x, as it does not at the start"] = _relative(a - a[:1], a)
        else:
            along = a[1:].reshape(-1, len(PLACES), *a.shape[1:])
            residuals["σσᵀ is no polynomial of degree two in x"] = _relative(np.diff(along, 3, axis=1), a)
        if not (self.is_gaussian and self.dim <= 2):
            other = self._law(y, rule=1)
            b_other, a_other = self.coefficients.drift(t, places, other), self.coefficients.covariance(t, places, other)
            gap = _relative(b_other - b, b, REST * float(np.abs(places).max()))
            residuals["drift depends on more of the law than mean and covariance"] = gap
            residuals["diffusion depends on more of the law than mean and covariance"] = _relative(a_other - a, a)
        for what, residual in residuals.items():
            self._refuse(what, residual)
        return max(residuals.values())

    def energy(self, states: Array) -> Array | None:
        """The energy, (T,), where it is known: the law is Gaussian, or mean and covariance determine it."""
        functional = getattr(self.coefficients.scenario, "energy", None)
        if not isinstance(functional, Energy):
            return None
        with torch.no_grad():
            values, other = (np.array([float(functional(self._seen(y, rule))) for y in states]) for rule in (0, 1))
        known = (self.is_gaussian and self.dim <= 2) or _relative(other - values, values) <= CLOSED
        return values if known else None

    def _seen(self, y: Array, rule: int) -> EmpiricalMeasure:
        """What the energy speaks of in a measure with these moments."""
        return configuration(self.coefficients.scenario, self._law(y, rule))

    def _law(self, y: Array, rule: int = 0) -> EmpiricalMeasure:
        """A measure with these moments: a quadrature of the Gaussian, or (rule 1) a skew one."""
        mean, cov = self.unpacked(y)
        points, weights = self._rules[rule]
        moved = torch.from_numpy(mean + points @ _root(cov))
        return EmpiricalMeasure.given(moved, torch.from_numpy(weights))

    def _places(self, y: Array) -> Array:
        """The mean, and places on lines through it.    (1 + n_lines n_places, d)."""
        mean, cov = self.unpacked(y)
        deviation = np.sqrt(np.maximum(np.diagonal(cov), 0.0))
        size = np.maximum(np.abs(mean), deviation.max())
        reach = REACH * np.maximum(deviation, LEAST * np.where(size > 0, size, 1.0))
        offsets = PLACES[:, None] * self._lines[:, None, :] * reach
        return np.concatenate([mean[None], mean + offsets.reshape(-1, self.dim)])

    def _affine(self, t: float, y: Array, law: EmpiricalMeasure) -> tuple[Array, Array, float]:
        """A, b(mean), and the part of b that is not affine, relative to b.    (d, d), (d,)."""
        d, x = self.dim, self._places(y)
        b = self.coefficients.drift(t, x, law)
        ends_x, ends_b = (v[1:].reshape(-1, len(PLACES), d)[:d, [0, -1]] for v in (x, b))
        matrix = (ends_b[:, 1] - ends_b[:, 0]).T / np.diagonal(ends_x[:, 1] - ends_x[:, 0])
        return matrix, b[0], _relative(b - b[0] - (x - x[0]) @ matrix.T, b, REST * float(np.abs(x).max()))

    def _mean_noise(self, t: float, y: Array, law: EmpiricalMeasure) -> Array:
        """E σσᵀ(t, X, μ), exact for polynomials of degree two.    (d, d)."""
        if self.is_additive:
            average = self.coefficients.covariance(t, y[None, : self.dim], law)[0]
        else:
            a = self.coefficients.covariance(t, law.points.numpy(), law)
            average = np.tensordot(law.weights.numpy(), a, 1)
        return average if average.ndim == 2 else np.diag(average)

    def _refuse(self, what: str, residual: float) -> None:
        if not residual <= CLOSED:
            raise ValueError(
                f"{self.name}: the moment equations do not close: {what} (residual {residual:.2g}); use "
                "mfsde.limit.fokker_planck in d = 1 or 2, or simulate with many particles."
            )


class _Flow:
    """The Gaussian at any time.

    The moments are solved for in pieces whose ends do not depend on the times that were asked for before: a run that is
    resumed sees the same numbers.
    """

    def __init__(self, closure: Closure, horizon: float | None) -> None:
        if horizon is not None and not (math.isfinite(horizon) and horizon > 0):
            raise ValueError(f"horizon = {horizon}; expected a positive time.")
        self._closure = closure
        self._first = 1.0 if horizon is None else float(horizon)
        self._ends: list[float] = [0.0]
        self._pieces: list[Callable[[float], Array]] = [lambda t: closure.start]
        self._at = lru_cache(REMEMBERED)(self._solved)

    def __call__(self, t: float) -> Gaussian:
        """The law at time t >= 0."""
        if not (math.isfinite(t) and t >= 0):
            raise ValueError(f"t = {t}; the limit starts at t = 0.")
        return self._at(float(t))

    def _solved(self, t: float) -> Gaussian:
        while t > self._ends[-1]:
            begin = self._ends[-1]
            end = 2 * begin or self._first
            found = self._closure.solved(begin, end, self._pieces[-1](begin))
            self._closure.checked(end, found.y[:, -1])
            self._ends.append(end)
            self._pieces.append(found.sol)
        k = next(k for k, end in enumerate(self._ends) if t <= end)
        return self._closure.law(self._pieces[k](t))


def _check_free(scenario: Any, name: str) -> None:
    """Refuses scenarios whose moments solve no closed equation, whatever their coefficients are."""
    for attribute, what in (
        ("common_diffusion", "common noise, under which the law is random"),
        ("project", "a domain"),
        ("period", "a torus"),
    ):
        if getattr(scenario, attribute, None) is not None:
            raise ValueError(
                f"{name} has {what} ({attribute}): its moments solve no closed equation. Use "
                "mfsde.limit.fokker_planck in d = 1 or 2, or simulate with many particles."
            )


def _first_moments(start: Law | EmpiricalMeasure) -> tuple[Array, Array]:
    """Mean and covariance of the initial law.    (d,), (d, d)."""
    if isinstance(start, (Gaussian, Dirac)):
        return start.mean.numpy(), start.cov.numpy()
    mu = start.as_measure() if isinstance(start, Law) else start
    exact = EmpiricalMeasure.given(mu.points.double(), mu.weights.double())
    return exact.mean()[0].numpy(), exact.covariance().numpy()


def _skew_rule(d: int) -> tuple[Array, Array]:
    """A measure of mean 0 and covariance I that is far from Gaussian: atoms on the axes, skew."""
    points = np.concatenate([value * math.sqrt(d) * np.eye(d) for value in (-0.5, 2.0)])
    return points, np.repeat([0.8 / d, 0.2 / d], d)


def _lines(d: int) -> Array:
    """Directions, the axes first.    (n_lines, d)."""
    if d == 1:
        return np.eye(1)
    oblique = np.cos(np.outer(np.arange(1, OBLIQUE + 1), np.arange(1, d + 1)))
    return np.concatenate([np.eye(d), oblique])


def _root(cov: Array) -> Array:
    """The symmetric root, which is smooth in the covariance."""
    values, vectors = np.linalg.eigh(cov)
    root: Array = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    return root


def _relative(part: Array, whole: Array, least: float = 0.0) -> float:
    """Size of a part relative to the whole, or to what the whole is at least; 0 for no part."""
    size = float(np.abs(part).max())
    return size / max(float(np.abs(whole).max()), least) if size > 0 else 0.0
