"""The nonlinear Fokker-Planck equation ∂_t m = -∇·(b(t, x, m) m) + ½ ∇²:(σσᵀ(t, x, m) m) of a scenario.

Finite volumes on a grid and on its refinement, adaptive implicit steps; the two solutions are combined to fourth order
in space, and their difference is the error estimate that is returned with the result.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import xarray as xr

from ..energy import Energy
from ..measure import EmpiricalMeasure, Law
from ..model import scenario_name
from ..noise import Noise
from ..progress import Progress
from . import results, richardson, stochastic
from .coefficients import Coefficients, check_dimension, initial_law
from .domain import Domain, domain_of
from .grid import Array, Grid
from .integrators import METHODS, Stepping
from .level import Level, support

RTOL = {1: 1e-8, 2: 1e-6}
NODES = {1: 513, 2: 129}  # on each axis, where the grid is chosen here; its refinement has twice as many
LEAKING = 1e-4  # mass at the open end of a grid that is an error
UPWIND = 2.0  # cell Péclet number, averaged over the mass, from which the scheme is of first order


def fokker_planck(
    scenario: Any,
    grid: Any,
    times: Any,
    *,
    n_nodes: int | None = None,
    method: str | None = None,
    dt: float | None = None,
    rtol: float | None = None,
    atol: float = 1e-12,
    extrapolate: bool = True,
    energies: bool | None = None,
    seed: int | None = None,
    noise: Noise | None = None,
    n_replicas: int = 1,
    store: results.Path_ | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> xr.Dataset:
    """The law of the mean-field limit at given times: ∂_t m = -∇·(b m) + ½ ∇²:(σσᵀ m) from the scenario's `initial()`.

    Args:
        scenario: as for `simulate`, in one or two dimensions; b and σ may depend on t, x and the law. `project` gives
            an interval (or rectangle) with reflecting walls, `period` a torus.
        grid: nodes (G,) with G >= 5, or a pair of them in two dimensions; None has them chosen around the mass.
        times: increasing, from 0 on; the equation always starts at 0.
        n_nodes: nodes on each axis where the grid is chosen (513; 129 in two dimensions).
        method: "bdf" (adaptive, orders 1 to 5; the default), "radau" (adaptive, order 5: steps onto every output time,
            about three times the work), or "euler" (implicit, first order, positive for every dt).
        dt: step of "euler", and of an equation with common noise.
        rtol: relative tolerance of adaptive steps (1e-8; 1e-6 on the plane, where the grid is what limits).
        atol: absolute tolerance of adaptive steps, on the mass of a node.
        extrapolate: combine the solutions on the grid and on its refinement to fourth order in space; else the
            result is the one on the refinement, of second order.
        energies: add `energy`, and for gradient flows `free_energy`, `dissipation` and `first_order_residual`. The
            default is True on the line and False on the plane, where an interaction costs O(G⁴).
        seed: for a scenario with common noise: key of W⁰, the path of a run with this seed and dt.
        noise: `mfsde.Noise(seed, substeps=k)`, as for `simulate`.
        n_replicas: number of paths of W⁰, those of the replicas of a run.
        store: a folder to write to, opened again by `mfsde.open_run`.
        overwrite: replace an existing store.
        progress: show how far it is.

    Returns:
        Dataset over `time`: `density(time, x)` (or (time, x, y); with common noise (time, replica, x)), nodal, of
        trapezoid mass 1; `error` in space, that of the solution on the refinement by Richardson, usually much larger
        than that of the combination; `mean`, `covariance` and their `_error`; `residual` = ‖∂_t m‖_{L¹}; `tail`, the
        mass near open ends of the grid; energies. Where cells are too large for the drift the scheme is of first order:
        nothing is combined, and the estimate is that of order one (`order` in the settings). Usable as the law of
        `wasserstein.to_law`, `decoupled` and the plots.

    Raises:
        TypeError, ValueError: bad input; more than two dimensions; mass that leaves the grid; a law that no grid holds.
        RuntimeError: steps that fail or lose positivity.
        FileExistsError: the store exists.

    Source: Carrillo, McCann, Villani (2003), for the equation; the scheme is in finite_volume.py.

    """
    times = results.checked_times(times)
    start = initial_law(scenario)
    check_dimension(scenario, start.dim)
    _check_density(scenario, start)
    domain = domain_of(scenario, start)
    if hasattr(scenario, "common_diffusion"):
        if energies:
            raise ValueError("energies are not computed along paths of a common noise; leave energies out.")
        path = stochastic.Paths.checked(scenario, start.dim, dt, seed, noise, n_replicas, times, method)
        return stochastic.solve(scenario, start, domain, grid, times, n_nodes, path, extrapolate, store, overwrite)
    if seed is not None or noise is not None or n_replicas != 1:
        raise TypeError(
            f"{scenario_name(scenario)} has no common_diffusion: its limit is one law, without seed, noise or "
            "n_replicas."
        )
    stepping = _stepping(method, RTOL[start.dim] if rtol is None else rtol, atol, dt, times)
    chosen = _grid(scenario, start, domain, grid, times, n_nodes)
    with Progress(f"limit of {scenario_name(scenario)}", 0, 2 * len(times), progress, "time") as bar:
        coarse, fine = (
            Level.solved(scenario, start, domain, level, times, stepping, bar, done)
            for level, done in ((chosen, 0), (chosen.refined(), len(times)))
        )
    wanted = start.dim == 1 if energies is None else energies
    series = _series(coarse, fine, times, extrapolate, wanted)
    settings = {
        "method": stepping.method, "rtol": stepping.rtol, "atol": atol, "dt": dt, "extrapolate": extrapolate,
        "nodes": list(chosen.shape), "order": order_of(fine),
    }  # fmt: skip
    coords = {**results.axis_coordinates(chosen), **results.component_coordinate(start.dim)}
    return results.dataset(scenario, times, series, coords, settings, store, overwrite)


LONG_NAMES = {
    "energy": "energy F(m)",
    "free_energy": "free energy F + (σ²/2) KL(m | e^-U)",
    "dissipation": "free-energy dissipation ∫ |D_mF + (σ²/2)(∇log m + ∇U)|² dm",
    "first_order_residual": "standard deviation of δF/δm + (σ²/2)(log m + U) under m",
}


def _series(coarse: Level, fine: Level, times: Array, extrapolate: bool, energies: bool) -> dict[str, Any]:
    grid, order = coarse.grid, order_of(fine)
    combine = extrapolate and order == 2
    densities = (coarse.density, grid.restricted(fine.density))
    series = richardson.paired(grid, densities, (coarse.moments(), fine.moments()), order=order, combine=combine)
    series["residual"] = ((), fine.residual, "L¹ norm of ∂_t m", "1")
    series["tail"] = ((), fine.tails(), "mass near open ends of the grid", "1")
    _check_tails(fine)
    if energies and isinstance(getattr(coarse.scenario, "energy", None), Energy):
        descends = coarse.is_gradient_flow(times)
        at_rough, at_sharp = (level.energies(descends) for level in (coarse, fine))
        for name, values in at_sharp.items():
            # A deviation that tends to zero would be carried below it.
            whole = combine and name != "first_order_residual"
            found = richardson.extrapolated(at_rough[name], values) if whole else values
            series[name] = ((), found, LONG_NAMES[name], "1")
    return series


def order_of(level: Level) -> int:
    """Two, or one where the cells are too large for the drift (or for no noise at all) and the scheme is upwind."""
    return 2 if level.peclet <= UPWIND else 1


def _check_tails(level: Level) -> None:
    tails = level.tails()
    if tails.max() > LEAKING:
        k = int(tails.argmax())
        ends = " × ".join(f"[{axis.nodes[0]:g}, {axis.nodes[-1]:g}]" for axis in level.grid.axes)
        raise ValueError(
            f"mass leaves the grid: about {tails[k]:.2g} of it is at the ends of {ends} (time {k} of {len(tails)}; "
            f"allowed {LEAKING:g}). Widen the grid, or pass grid=None to have it chosen."
        )


# Input


def _check_density(scenario: Any, start: Any) -> None:
    """Refuses a law of several pieces that has no density, with the component that never gets one."""
    if isinstance(start, EmpiricalMeasure) or not hasattr(start, "log_prob"):
        return
    mu = start.as_measure()
    points = mu.points.double()
    mu = EmpiricalMeasure.given(points, mu.weights.double(), mu.period)
    try:
        start.log_prob(points[:1])
    except ValueError as problem:
        if not (np.diag(start.cov.numpy()) > 0).all():
            return  # A law that does not spread at all along some axis: an atom, or refused where masses are laid down.
        name = scenario_name(scenario)
        coefficients = Coefficients(scenario, points.numpy(), mu.weights.numpy(), births=True)
        still = coefficients.noiseless((0.0,), points.numpy(), [mu])
        closed = "; scenario.limit(t) is its law in closed form" if hasattr(scenario, "limit") else ""
        if still:
            raise ValueError(
                f"{name}: component {still[0]} of the state has neither noise nor, at the start, a density (a label "
                f"that particles are drawn with, for instance): the law has none at any time, and a grid cannot hold "
                f"it. Simulate{closed}."
            ) from problem
        raise ValueError(
            f"{name}: the initial law is singular and has no density on a grid ({problem}) Give it a small variance "
            f"in every direction, or simulate{closed}."
        ) from problem


def _stepping(method: str | None, rtol: float, atol: float, dt: float | None, times: Array) -> Stepping:
    chosen = method or ("euler" if dt is not None else "bdf")
    if chosen not in (*METHODS, "euler"):
        raise ValueError(f"method = {method!r}; expected 'radau', 'bdf' or 'euler'.")
    if (chosen == "euler") != (dt is not None):
        raise ValueError(f"method = {chosen!r} with dt = {dt!r}: dt is the step of 'euler', and of it alone.")
    for name, value in (("rtol", rtol), ("atol", atol), ("dt", dt if dt is not None else 1.0)):
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
            raise ValueError(f"{name} = {value!r}; expected a positive number.")
    if dt is not None:
        results.check_whole_steps(times, dt)
    return Stepping(chosen, rtol, atol, dt)


def _grid(
    scenario: Any, start: Law | EmpiricalMeasure, domain: Domain, grid: Any, times: Array, n_nodes: int | None
) -> Grid:
    """The user's grid, checked, or one around all that carries mass up to the last time."""
    given = Grid.given(grid, n_nodes, start.dim, domain.period)
    if given is not None:
        domain.check(given, scenario_name(scenario))
        return given
    n = NODES[start.dim] if n_nodes is None else n_nodes
    low, high = support(scenario, start, domain, times)
    return Grid.box(list(low), list(high), n, domain.period)
