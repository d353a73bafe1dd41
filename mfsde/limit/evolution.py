"""The limit of a scenario in time, by the method that its equation admits."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from ..measure import Law
from ..model import scenario_name
from ..noise import Noise
from . import results
from .characteristics import characteristics
from .coefficients import Coefficients, initial_law
from .fokker_planck import fokker_planck
from .moments import moments


def evolve(
    scenario: Any,
    times: Any,
    *,
    dt: float | None = None,
    seed: int | None = None,
    noise: Noise | None = None,
    n_replicas: int = 1,
    n_nodes: int | None = None,
    store: results.Path_ | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> xr.Dataset:
    """The law of the mean-field limit at given times: `fokker_planck`, `characteristics` or `moments`.

    * without noise: along characteristics, in any dimension;
    * in one or two dimensions: the density, by the Fokker-Planck equation, given W⁰ where there is common noise;
    * in more: mean and covariance, where they solve a closed equation.

    Args:
        scenario: as for `simulate`.
        times: increasing, from 0 on.
        dt: for common noise: the step of the run whose paths of W⁰ are wanted; unused otherwise.
        seed: for common noise: the key of that run; unused otherwise.
        noise: for common noise: as for `simulate`; unused otherwise.
        n_replicas: for common noise: number of paths; unused otherwise.
        n_nodes: nodes on each axis, or for each normal variate; unused for moments.
        store: a folder to write to, opened again by `mfsde.open_run`.
        overwrite: replace an existing store.
        progress: show how far it is.

    Returns:
        Dataset over `time`; `attrs["method"]` says what made it.

    Raises:
        TypeError, ValueError, RuntimeError, FileExistsError: as the method.

    """
    start = initial_law(scenario)
    kept: dict[str, Any] = {"store": store, "overwrite": overwrite}
    if hasattr(scenario, "common_diffusion"):
        own: dict[str, Any] = {"dt": dt, "seed": seed, "noise": noise, "n_replicas": n_replicas}
        return fokker_planck(scenario, None, times, n_nodes=n_nodes, **own, **kept)
    if is_noiseless(scenario, results.checked_times(times)):
        return characteristics(scenario, times, n_nodes=n_nodes, progress=progress, **kept)
    if start.dim > 2:
        return _moments(scenario, start.dim, times, **kept)
    return fokker_planck(scenario, None, times, n_nodes=n_nodes, progress=progress, **kept)


def _moments(scenario: Any, dim: int, times: Any, **kept: Any) -> xr.Dataset:
    try:
        return moments(scenario, times, **kept)
    except ValueError as problem:
        raise ValueError(
            f"{scenario_name(scenario)} lives in dimension {dim}: densities are computed on grids in d = 1 or 2 "
            f"only, and moments alone do not do. {problem}"
        ) from problem


def is_noiseless(scenario: Any, times: results.Array) -> bool:
    """Whether σ vanishes at the initial law, at 0 and at some of the times."""
    start = initial_law(scenario)
    mu = start.as_measure() if isinstance(start, Law) else start
    points, mass = mu.points.double().numpy(), mu.weights.double().numpy()
    coefficients = Coefficients(scenario, points, mass, births=True)
    some = (0.0, float(times[-1]) / 2, float(times[-1]))
    return not any(np.any(coefficients.covariance(t, points, mu)) for t in some)
