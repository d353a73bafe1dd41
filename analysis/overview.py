"""What can be said about one run: its distance to a law or to another run, the rate, entropy, coupling error.

Behind `mfsde analyse`; every number comes from the file that owns it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xarray as xr

from . import chaos, entropy, particles, rates, replicas, wasserstein
from .gibbs import Gibbs
from .laws import Flow
from .rates import Rate

TARGETS = ("invariant", "limit")
SHOWN = 11  # rows of the printed table
SETTLED = 3.0  # standard errors by which a reference may still move


@dataclass(frozen=True)
class Overview:
    """The measured series, the law they were compared with, the rate where there is one, and what was not measured."""

    measured: dict[str, xr.DataArray]
    law: Flow | None
    rate: Rate | None
    notes: tuple[str, ...]
    source: str = ""

    def dataset(self) -> xr.Dataset:
        """The series as one dataset, the rate in its attributes; errors and floors are named after their series."""
        parts = [_own_coordinates(name, values) for name, values in self.measured.items()]
        data = xr.merge(parts, join="exact", compat="equals")
        data.attrs = {"long_name": "analysis of a run", "run": self.source, "notes": "; ".join(self.notes)}
        if self.rate is not None:
            data.attrs |= {f"rate_{key}": value for key, value in self.rate.attributes().items()}
        return data

    def table(self) -> str:
        """Replica means ± standard errors at some times, the rate, and the notes, as text."""
        series = {name: _with_error(values) for name, values in self.measured.items()}
        times = self.measured["distance"]["time"].values
        lines = [f"{name}: {values.attrs.get('long_name', name)}" for name, values in self.measured.items()]
        heads = "".join(f"{_heading(name, values):>28}" for name, values in series.items())
        lines += ["", "      time" + heads]
        for k in np.unique(np.linspace(0, len(times) - 1, SHOWN).round().astype(int)):
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
    last: bool = False,
    start: float | None = None,
    stop: float | None = None,
) -> Overview:
    """Distance, rate, relative entropy and coupling error of a run, as far as its scenario and a reference allow.

    Args:
        run: a run with particles and replicas.
        scenario: its scenario; where it has `log_invariant` or `limit`, a law to compare with.
        to: "invariant" or "limit"; by default the first that the scenario has.
        reference: another run at the same times.
        last: compare with the reference's last frame, at every time.
        start: first time of the rate's window.
        stop: last time of it.

    Returns:
        Overview: variables `distance` (time, replica), `relative_entropy` (time), `coupling_error` (time), as
        available.

    Raises:
        ValueError: nothing to compare with, or two things; the reference is the run itself; as the functions called.

    """
    if "time" not in particles.positions(run).dims:
        raise ValueError("overview: the run has no dimension `time`; select frames with isel(time=[-1]).")
    if reference is not None and to is not None:
        raise ValueError(f"overview: to = {to!r} and a reference are two things to compare with; leave one out.")
    notes = [_unfinished(run, "run")] if "status" in run.attrs else []
    law, series = None, {}
    if reference is not None:
        series["distance"] = _to_reference(run, reference, last, notes)
        if not last:
            _try(series, notes, "coupling_error", lambda: chaos.coupling_error(run, reference))
    else:
        law, name = target(scenario, particles.positions(run).sizes["component"], to)
        distance = wasserstein.to_law(run, law).load()
        title = distance.attrs["long_name"].replace("to the law", f"to {name}")
        series["distance"] = distance.assign_attrs(long_name=title)
    if scenario is not None and hasattr(scenario, "log_invariant"):
        _try(series, notes, "relative_entropy", lambda: _relative_entropy(run, scenario))
    rate = None
    try:
        rate = rates.exponential(series["distance"], start=start, stop=stop)
    except ValueError as problem:
        notes.append(str(problem) if isinstance(problem, rates.Unresolved) else f"no rate: {problem}")
    doubts = tuple(note for note in notes if note.startswith("the reference"))
    rate = replace(rate, flags=rate.flags + doubts) if rate is not None else None
    return Overview(series, law, rate, tuple(note for note in notes if note), str(run.attrs.get("digest", "")))


def _to_reference(run: xr.Dataset, reference: xr.Dataset, last: bool, notes: list[str]) -> xr.DataArray:
    """W₂² to a reference without the floor, with a note when the reference is no fixed law."""
    if _same(run, reference):
        if not last:
            raise ValueError("overview: the reference is the run itself; pass another one, or last=True.")
        notes.append("the reference is the run itself, so W₂ is forced to 0 at its end; a longer run is a better one")
    if not last:
        found: xr.DataArray = wasserstein.debiased(run, reference).load()
        return found.assign_attrs(long_name="squared W₂ to the reference at the same time, floor removed")
    notes.append(_unfinished(reference, "reference"))
    final = reference.isel(time=-1, drop=True)
    if reference.sizes["time"] > 1:
        middle = reference.isel(time=[reference.sizes["time"] // 2])
        still = "quantile" if middle.sizes["component"] == 1 else "gaussian"
        try:
            moved = replicas.mean_and_error(wasserstein.debiased(middle, final, estimator=still).isel(time=0))
            if float(moved) > SETTLED * float(moved["stderr"]):
                notes.append(
                    f"the reference still moves: W₂² = {float(moved):.2g} ± {float(moved['stderr']):.1g} between its "
                    "middle and its end. Rates against a law that is not reached are wrong; take a longer reference"
                )
        except ValueError as problem:
            notes.append(f"whether the reference still moves was not checked: {problem}")
    found = wasserstein.debiased(run, final).load()
    return found.assign_attrs(long_name="squared W₂ to the reference's last frame, floor removed")


def _same(run: xr.Dataset, reference: xr.Dataset) -> bool:
    return run is reference or ("digest" in run.attrs and run.attrs["digest"] == reference.attrs.get("digest"))


def _unfinished(run: xr.Dataset, name: str) -> str:
    status = run.attrs.get("status", "complete")
    return "" if status == "complete" else f"the {name} is {status}: it has frames up to t = {float(run['time'][-1]):g}"


def target(scenario: Any, dim: int, to: str | None) -> tuple[Flow, str]:
    """The law a scenario is compared with, and its name: the invariant law, by quadrature, or the limit at every time.

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
            "(log_invariant(x) in d <= 2, or limit(t)). Simulate a longer run and compare with its end: "
            "reference=..., last=True."
        )
    if chosen == "limit":
        return scenario.limit, "the limit at every time"
    return Gibbs(scenario.log_invariant, dim), "the invariant law"


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
        bound = "lower bound of " if values.attrs.get("bound") == "lower" else ""
        return bound + ("W₂" if values.attrs["power"] == 1 else "W₂², floor removed")
    return {"relative_entropy": "KL to invariant (nat)", "coupling_error": "E|X - X̄|²"}.get(name, name)
