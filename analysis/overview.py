"""What can be said about one run: its distance to a law or to another run, the rate, entropy, coupling error.

Behind `mfsde analyse`; every number comes from the file that owns it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import xarray as xr

from mfsde.measure import Law

from . import chaos, entropy, particles, rates, replicas, wasserstein
from .gibbs import Gibbs
from .laws import Flow
from .rates import Rate

TARGETS = ("invariant", "limit")
SHOWN = 11  # rows of the printed table


@dataclass(frozen=True)
class Overview:
    """The measured series, the law they were compared with, the rate where there is one, and what was not measured."""

    measured: dict[str, xr.DataArray]
    law: Flow | None
    rate: Rate | None
    notes: tuple[str, ...]

    def dataset(self) -> xr.Dataset:
        """The series as one dataset, the rate in its attributes; errors and floors are named after their series."""
        parts = [_own_coordinates(name, values) for name, values in self.measured.items()]
        data = xr.merge(parts, join="exact", compat="equals")
        data.attrs = {"long_name": "analysis of a run", "notes": "; ".join(self.notes)}
        if self.rate is not None:
            data.attrs |= {f"rate_{key}": value for key, value in self.rate.attributes().items()}
        return data

    def table(self) -> str:
        """Replica means ± standard errors at some times, the rate, and the notes, as text."""
        series = {name: _with_error(values) for name, values in self.measured.items()}
        times = self.measured["distance"]["time"].values
        lines = ["      time" + "".join(f"{_heading(name, values):>28}" for name, values in series.items())]
        for k in range(0, len(times), max(1, (len(times) - 1) // (SHOWN - 1))):
            cells = [f"{_cell(values.isel(time=k)):>28}" for values in series.values()]
            lines.append(f"{times[k]:10.4g}" + "".join(cells))
        if self.rate is not None:
            lines.append(f"\nrate of W₂: {self.rate}")
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def overview(
    run: xr.Dataset,
    scenario: Any = None,
    *,
    to: str | None = None,
    reference: xr.Dataset | None = None,
    start: float | None = None,
    stop: float | None = None,
) -> Overview:
    """Distance, rate, relative entropy and coupling error of a run, as far as its scenario and a reference allow.

    Args:
        run: a run with particles and replicas.
        scenario: its scenario; where it has `log_invariant` or `limit`, a law to compare with.
        to: "invariant" or "limit"; by default the first that the scenario has. Ignored with a reference.
        reference: another run at the same times, or one without `time` (a last frame).
        start: first time of the rate's window.
        stop: last time of it.

    Returns:
        Overview: variables `distance` (time, replica), `relative_entropy` (time), `coupling_error` (time), as
        available.

    Raises:
        ValueError: nothing to compare with; a law of the wrong dimension; as the functions called.

    """
    dim = particles.positions(run).sizes["component"]
    notes: list[str] = []
    law = None
    if reference is not None:
        series = {"distance": wasserstein.debiased(run, reference).load()}
        if "time" in particles.positions(reference, "reference").dims:
            _try(series, notes, "coupling_error", lambda: chaos.coupling_error(run, reference))
    else:
        law = target(scenario, dim, to)
        series = {"distance": wasserstein.to_law(run, law).load()}
    if scenario is not None and hasattr(scenario, "log_invariant"):
        _try(series, notes, "relative_entropy", lambda: _relative_entropy(run, scenario))
    rate = None
    try:
        rate = rates.exponential(series["distance"], start=start, stop=stop)
    except ValueError as problem:
        notes.append(str(problem))
    return Overview(series, law, rate, tuple(notes))


def target(scenario: Any, dim: int, to: str | None) -> Flow:
    """The law a scenario is compared with: its invariant law, normalised by quadrature, or its limit at every time.

    Raises:
        ValueError: it has neither, not the one asked for, or an invariant law in d > 2.

    """
    if to is not None and to not in TARGETS:
        raise ValueError(f"to = {to!r}; expected one of {', '.join(TARGETS)}.")
    has = {"invariant": hasattr(scenario, "log_invariant") and dim <= 2, "limit": hasattr(scenario, "limit")}
    chosen = to if to is not None else next((name for name in TARGETS if has[name]), None)
    if chosen is None or not has[chosen]:
        raise ValueError(
            f"{type(scenario).__name__} in dimension {dim} offers no {chosen or 'law'} to compare with "
            "(log_invariant(x) in d <= 2, or limit(t)); compare with another run: reference=..."
        )
    if chosen == "limit":
        limit: Flow = scenario.limit
        return limit
    invariant: Law = Gibbs(scenario.log_invariant, dim)
    return invariant


def _relative_entropy(run: xr.Dataset, scenario: Any) -> xr.DataArray:
    found: xr.DataArray = entropy.relative(run, scenario.log_invariant, pooled=True)
    return found


def _try(series: dict[str, xr.DataArray], notes: list[str], name: str, measure: Any) -> None:
    """Measures what the data allow; what they do not is said, not hidden."""
    try:
        series[name] = measure().load()
    except (ValueError, RuntimeError) as problem:
        notes.append(f"no {name}: {problem}")


def _own_coordinates(name: str, values: xr.DataArray) -> xr.Dataset:
    """Errors and floors under names of their own: two series may both have a `stderr`."""
    own = [str(c) for c in values.coords if c in ("stderr", "floor", "unbiased", "half", "shape", "reference_error")]
    return values.rename({c: f"{name}_{c}" for c in own}).to_dataset(name=name)


def _with_error(values: xr.DataArray) -> xr.DataArray:
    if "replica" not in values.dims:
        return values
    return replicas.mean_and_error(values) if values.sizes["replica"] > 1 else values.isel(replica=0)


def _cell(value: xr.DataArray) -> str:
    text = f"{float(value):.4g}"
    return f"{text} ± {float(value['stderr']):.2g}" if "stderr" in value.coords else text


def _heading(name: str, values: xr.DataArray) -> str:
    if name == "distance":
        return "W₂" if values.attrs["power"] == 1 else "W₂², floor removed"
    return {"relative_entropy": "KL to invariant (nat)", "coupling_error": "E|X - X̄|²"}.get(name, name)
