"""Which equation a run follows, as far as its record and its scenario tell.

Theorems of mean-field Langevin dynamics, dX = -(D_mF + T ∇U) dt + σ dW with T = σ²/2 > 0, are about no other; a
comparison path by path needs particles that have paths. Every function returns the sentence that says what is in the
way, "" where nothing is seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import xarray as xr

from mfsde import EmpiricalMeasure
from mfsde.limit.coefficients import SAME, Coefficients
from mfsde.measure import Law
from mfsde.model import energy_of, scenario_name
from mfsde.nonlinear_process import Decoupled

from . import particles

LOOKED_AT = 64  # particles of a cloud, or points of a quadrature, at which drifts are compared
JUMPS = ("jumps", "clocks")  # reactions in which a particle takes the place of another; "weights" moves masses only

Clouds = Iterable[tuple[float, EmpiricalMeasure]]


def births(run: xr.Dataset | xr.DataArray) -> str:
    """Births and deaths in a run: by its variables `parent` and `events`, or by its record."""
    found = [name for name in ("parent", "events") if name in getattr(run, "data_vars", ())]
    reaction = str(run.attrs.get("reaction", ""))
    if not found and reaction not in JUMPS:
        return ""
    if not found and "member" in run.coords:
        return "a member of this comparison has births and deaths, and the table does not say which (simulate it alone)"
    told = " and ".join(f"`{name}`" for name in found) or f"reaction {reaction!r}"
    return f"particles are born and die in this run ({told})"


def of_run(run: xr.Dataset | xr.DataArray) -> str:
    """Births and deaths, minibatches, velocities: what a run's record says that a Langevin dynamics has not."""
    found = births(run)
    if found:
        return f"{found}, which is no Langevin dynamics"
    transport = str(run.attrs.get("method", "")).partition("+")[0]
    if transport == "sgd":
        return "the run's steps follow minibatches (method 'sgd'), whose noise is none of the theorem's"
    if transport in ("baoab", "obabo"):
        return f"the run is kinetic (method {transport!r}), and the theorem is about the overdamped dynamics"
    return ""


def of_scenario(scenario: Any, clouds: Clouds) -> str:
    """Whether a scenario's dynamics is dX = -(D_mF + T ∇U) dt + σ dW, judged at some points of measures and times.

    Args:
        scenario: with an energy; one without a drift states no dynamics, and nothing is in the way.
        clouds: times and measures without leading axes.

    Raises:
        TypeError: no energy.
        ValueError: a drift that is not finite there.

    """
    if isinstance(scenario, Decoupled):
        # Independent copies follow the same flow of laws.
        scenario = scenario.scenario
    name = scenario_name(scenario)
    if hasattr(scenario, "force"):
        return f"{name} is kinetic, and the theorem is about the overdamped dynamics (scenario.overdamped())"
    energy_of(scenario)
    if not hasattr(scenario, "drift"):
        return ""
    if hasattr(scenario, "birth_death_rate") or hasattr(scenario, "reinjection"):
        return f"{name} has births and deaths, and is no Langevin dynamics"
    if hasattr(scenario, "common_diffusion"):
        return f"{name} has common noise, under which laws are random, and is no Langevin dynamics"
    if hasattr(scenario, "project_at"):
        return f"the domain of {name} moves, and the theorem is about a fixed one"
    if not float(getattr(scenario, "sigma", 0.0)) > 0:
        return f"{name} has no constant sigma > 0, and the theorem is about Langevin dynamics"
    for t, mu in clouds:
        some = np.unique(np.linspace(0, mu.n_particles - 1, LOOKED_AT).round().astype(int))
        points, mass = mu.points.double().numpy()[some], mu.weights.double().numpy()[some]
        apart = Coefficients(scenario, points, mass).detour(points, mu, t)
        if math.isinf(apart):
            return f"the noise of {name} at t = {t:g} is not σ = {float(scenario.sigma):g}, so T = σ²/2 is not its own"
        if apart > SAME:
            return (
                f"the drift of {name} is not -(D_mF + T ∇U): at t = {t:g} it differs by {apart:.2g} of its size, so "
                "the flow is not that of the free energy"
            )
    return ""


def clouds(position: xr.DataArray, period: Any) -> list[tuple[float, EmpiricalMeasure]]:
    """Some particles of the first replica at the first, the middle and the last saved time."""
    if "time" not in position.dims:
        position = position.expand_dims("time")
    n = position.sizes["time"]
    few = position.isel(time=sorted({0, n // 2, n - 1}), particle=slice(LOOKED_AT))
    few = few.isel(replica=0) if "replica" in few.dims else few
    x = few.transpose("time", "particle", "component").values.astype(np.float64)
    particles.check_finite(x, "position")
    times = few["time"].values if "time" in few.coords else np.zeros(len(x))
    return [
        (float(t), EmpiricalMeasure(torch.from_numpy(points), period=period))
        for t, points in zip(times, x, strict=True)
    ]


def started(scenario: Any, times: Iterable[float]) -> list[tuple[float, EmpiricalMeasure]]:
    """Points of a scenario's initial law, at some times; none where it has no such law."""
    law = scenario.initial() if hasattr(scenario, "initial") else None
    if isinstance(law, EmpiricalMeasure) and law.points.ndim == 2:
        mu = law
    elif isinstance(law, Law):
        mu = EmpiricalMeasure(law.sample(LOOKED_AT, torch.Generator().manual_seed(0)).double())
    else:
        return []
    return [(float(t), mu) for t in times]
