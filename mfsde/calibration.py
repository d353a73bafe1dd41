"""Fitting parameters: the objective of a run, minimised under fixed noise.

The noise is a function of its key, so the mean of the objective over the replicas of one seed is a smooth deterministic
function of the parameters, with the gradient of `sensitivity`. Its minimiser is the sample average approximation of the
law's: another seed gives another one, and the scatter over seeds is its standard error.

Source: Shapiro, Monte Carlo sampling methods, Handbooks in OR & MS 10 (2003); Byrd, Lu, Nocedal, Zhu, A limited memory
algorithm for bound constrained optimization (1995).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from scipy.optimize import OptimizeResult, minimize

from .model import replaced
from .noise import Noise
from .parameters import Parameters
from .sensitivity import Functional, Sensitivity
from .settings import Settings

# Particles above which replicas are differentiated one by one.
APART = 10_000

Bounds = Mapping[str, tuple[float | None, float | None]]


class NotConverged(RuntimeError):
    """A fit ended elsewhere than in a minimum.

    Attributes: scenario, the best found; history, as `fit` returns it.
    """

    def __init__(self, message: str, scenario: Any, history: xr.Dataset) -> None:
        self.scenario, self.history = scenario, history
        super().__init__(message)


def fit(
    objective: Functional | None,
    scenario: Any,
    parameters: Iterable[str],
    *,
    n_particles: int,
    horizon: float,
    dt: float,
    seed: int,
    n_replicas: int = 1,
    times: Iterable[float] | None = None,
    running: Functional | None = None,
    bounds: Bounds | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 100,
    method: str = "euler",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float64,
    noise: Noise | None = None,
) -> tuple[Any, xr.Dataset]:
    """The scenario whose parameters minimise the replicas' mean objective, all evaluations under the same noise.

    Args:
        objective: (t, x, mu) -> (R,), as for `differentiate`; for data observed at several times a misfit that looks
            them up by t, and `times`.
        scenario: where the search starts.
        parameters: names of fields.
        n_particles: N.
        horizon: final time, a whole number of steps dt.
        dt: step size.
        seed: the key of all randomness, of every evaluation.
        n_replicas: independent copies of the whole system.
        times: where the objective is evaluated and summed; the horizon when None.
        running: a rate (t, x, mu) -> (R,), integrated over the run.
        bounds: {name: (low, high)}, None for no bound; needed where a scenario makes no sense everywhere (σ > 0).
        tolerance: the fit ends where no component of the (projected) gradient exceeds it, or where the objective
            changes by less than 1e-12 of its size.
        max_iterations: of L-BFGS-B.
        method: as for `differentiate`.
        device: "cpu" or "cuda".
        dtype: torch.float64, or torch.float32.
        noise: as for `simulate`.

    Returns:
        The fitted scenario, and the Dataset of all evaluations: `value(evaluation)`, `parameters(evaluation,
        parameter)`, `gradient(evaluation, parameter)`.

    Raises:
        TypeError, ValueError: as `differentiate`; bounds that do not fit.
        NotConverged: no minimum within max_iterations.
        BlowUp, FloatingPointError: a trial left what can be simulated; bound the parameters.

    """
    settings = Settings.checked(
        n_particles=n_particles, horizon=horizon, dt=dt, seed=seed, n_replicas=n_replicas, save_every=None,
        keep_particles=None, method=method, device=device, dtype=dtype, noise=noise, checkpoint_every=None,
    )  # fmt: skip
    # Small tensors cost their overhead, large ones the cache: replicas together, or one by one.
    n_batches = 1 if settings.n_particles < APART else None
    problem = Sensitivity.start(objective, scenario, parameters, settings, times, running, n_batches)
    limits = _limits(problem.parameters, bounds or {})
    _check_stopping(tolerance, max_iterations)
    problem.check()
    trials = _Trials(problem, scenario)
    found = minimize(
        trials, trials.start, jac=True, method="L-BFGS-B", bounds=limits,
        options={"maxiter": max_iterations, "gtol": tolerance, "ftol": 1e-12},
    )  # fmt: skip
    history = trials.history()
    fitted = replaced(scenario, problem.parameters.replacing(found.x.tolist()))
    if not _has_converged(found, history):
        raise NotConverged(
            f"the fit of {', '.join(problem.parameters.values)} has not converged after {found.nit} iterations "
            f"({found.message}); the largest component of the gradient is {np.abs(found.jac).max():.3g}. Raise "
            "max_iterations or tolerance, or start nearer; the best scenario so far is in this error's `scenario`.",
            fitted, history,
        )  # fmt: skip
    return fitted, history


class _Trials:
    """The objective and its gradient as a function of the vector of parameters, remembering every evaluation."""

    def __init__(self, problem: Sensitivity, scenario: Any) -> None:
        self._problem, self._scenario = problem, scenario
        self.start = np.array(problem.parameters.vector())
        self._points: list[list[float]] = []
        self._values: list[float] = []
        self._slopes: list[np.ndarray] = []

    def __call__(self, point: np.ndarray) -> tuple[float, np.ndarray]:
        """Mean over replicas, and its gradient."""
        vector = point.tolist()
        problem = self._problem.at(replaced(self._scenario, self._problem.parameters.replacing(vector)))
        try:
            values, slopes = problem.evaluate(check=not self._points)
        except FloatingPointError as problem_:
            told = ", ".join(f"{k} = {v:.6g}" for k, v in zip(self._problem.parameters.labels(), vector, strict=True))
            problem_.add_note(f"This happened in a fit, at {told}; keep the search away from there with bounds.")
            raise
        self._points.append(vector)
        self._values.append(math.fsum(values) / len(values))
        self._slopes.append(np.mean(slopes, axis=0))
        return self._values[-1], self._slopes[-1]

    def history(self) -> xr.Dataset:
        """All evaluations in their order."""
        dims = ("evaluation", "parameter")
        return xr.Dataset(
            {
                "value": ("evaluation", self._values, {"long_name": "mean objective", "units": "1"}),
                "parameters": (dims, self._points, {"long_name": "parameters tried", "units": "1"}),
                "gradient": (dims, self._slopes, {"long_name": "derivative of the mean objective", "units": "1"}),
            },
            {"parameter": self._problem.parameters.labels()},
            self._problem.provenance(),
        )


def _has_converged(found: OptimizeResult, history: xr.Dataset) -> bool:
    """A minimum, or a line search that rounding ends: the value no longer changes."""
    if found.success:
        return True
    best, size = float(history["value"].min()), float(np.abs(history["value"]).max())
    last = history["value"].values[-5:]
    return "ABNORMAL" in str(found.message).upper() and bool(np.all(np.abs(last - best) <= 1e-10 * size))


def _limits(parameters: Parameters, bounds: Bounds) -> list[tuple[float | None, float | None]]:
    """Bounds of every number.

    Raises:
        ValueError: for what is not fitted, out of order, or not around the start.

    """
    unknown = set(bounds) - set(parameters.values)
    if unknown:
        raise ValueError(
            f"bounds for {', '.join(sorted(unknown))}, which is not fitted; parameters are "
            f"{', '.join(parameters.values)}."
        )
    limits: list[tuple[float | None, float | None]] = []
    for name, size in parameters.sizes().items():
        low, high = bounds.get(name, (None, None))
        for number in Parameters({name: parameters.values[name]}).vector():
            if not (-math.inf if low is None else low) <= number <= (math.inf if high is None else high):
                raise ValueError(f"{name} starts at {number}, outside its bounds ({low}, {high}); start inside them.")
        limits += [(low, high)] * size
    return limits


def _check_stopping(tolerance: float, max_iterations: int) -> None:
    if not (isinstance(tolerance, (int, float)) and 0 < tolerance < math.inf):
        raise ValueError(f"tolerance = {tolerance!r}; expected a positive number, for instance 1e-6.")
    if type(max_iterations) is not int or max_iterations < 1:
        raise ValueError(f"max_iterations = {max_iterations!r}; expected a whole number >= 1.")
