"""The nonlinear process of propagation of chaos: a scenario whose particles' own law is replaced by a given one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .measure import EmpiricalMeasure, Law
from .phase_space import law_of_positions
from .torus import Period, period_lengths

if TYPE_CHECKING:
    import xarray as xr

# What a decoupled scenario takes over as it is, and what it evaluates at the given law.
COPIED = (
    *("project", "project_at", "period", "log_invariant", "limit", "suggested", "energy", "confinement", "sigma"),
    *("gamma", "regulariser", "proximal", "reinjection", "sample", "confinement_gradient", "selects"),
    *("configuration", "temperature", "kinetic_energy", "internal_energy"),
)
OF_THE_LAW = ("common_diffusion", "birth_death_rate", "smooth_drift")


class Decoupled:
    """The scenario whose `mu` is a given flow of laws: the nonlinear process X̄ of propagation of chaos."""

    def __init__(self, scenario: Any, law: Any) -> None:
        self.scenario = scenario
        self.law = law
        self._flow = _flow(law, getattr(scenario, "period", None))
        self._measure: tuple[tuple[Any, ...], EmpiricalMeasure] | None = None
        for name in COPIED:
            if hasattr(scenario, name):
                setattr(self, name, getattr(scenario, name))
        for name in OF_THE_LAW:
            if hasattr(scenario, name):
                setattr(self, name, self._with_law(getattr(scenario, name)))
        if hasattr(scenario, "force"):
            self.force = self._with_law_of_positions(scenario.force)
        if hasattr(scenario, "sampled_drift"):
            self.sampled_drift = self._with_law_and_sample(scenario.sampled_drift)

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """The scenario's drift at the given law."""
        return self.scenario.drift(t, x, self.law_at(t, x))  # type: ignore[no-any-return]

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Any:
        """The scenario's diffusion at the given law."""
        return self.scenario.diffusion(t, x, self.law_at(t, x))

    def initial(self) -> Any:
        """The scenario's initial law: equal seeds start both processes from the same points."""
        return self.scenario.initial()

    def observables(self) -> tuple[Any, ...]:
        """The scenario's observables, of the decoupled particles."""
        return tuple(self.scenario.observables()) if hasattr(self.scenario, "observables") else ()

    def law_at(self, t: float, x: Tensor) -> EmpiricalMeasure:
        """The given law at time t as a weighted measure beside x's leading axes."""
        asked = (t, x.shape[:-2], x.dtype, x.device)
        if self._measure is None or self._measure[0] != asked:
            law, lead = self._flow(t), x.shape[:-2]
            if law.dim != x.shape[-1]:
                raise ValueError(
                    f"decoupled: the law at t = {t:g} lives in dimension {law.dim}, the particles in {x.shape[-1]}; "
                    "give the law of their whole state."
                )
            points = law.points.to(x).expand(*lead, *law.points.shape[-2:])
            weights = law.weights.to(x).expand(*lead, law.n_particles)
            self._measure = (asked, EmpiricalMeasure.given(points, weights, law.period))
        return self._measure[1]

    def _with_law(self, method: Callable[[float, Tensor, EmpiricalMeasure], Any]) -> Callable[..., Any]:
        return lambda t, x, mu: method(t, x, self.law_at(t, x))

    def _with_law_and_sample(self, drift: Callable[..., Any]) -> Callable[..., Any]:
        return lambda t, x, mu, sample: drift(t, x, self.law_at(t, x), sample)

    def _with_law_of_positions(self, force: Callable[[float, Tensor, EmpiricalMeasure], Any]) -> Callable[..., Any]:
        # Positions are asked for, and the law is one of positions and velocities.
        def at(t: float, x: Tensor, mu: EmpiricalMeasure) -> Any:
            return force(t, x, law_of_positions(self.law_at(t, torch.cat([x, x], dim=-1))))

        return at


def decoupled(scenario: Any, law: Any) -> Any:
    """The scenario with `mu` replaced by a given law: particles become independent copies of the nonlinear process.

    Args:
        scenario: any scenario.
        law: a Law or EmpiricalMeasure (constant in time), a function t -> Law or EmpiricalMeasure, or a Dataset with
            `density(time, x)` or `density(time, x, y)` (a limit; interpolated linearly in time).

    Returns:
        A scenario with the same parameters.

    Raises:
        TypeError: law is none of these.
        ValueError: a dataset without such a density, or on another torus; at run time, a time outside the dataset's.

    """
    return Decoupled(scenario, law)


def _flow(law: Any, period: Period) -> Callable[[float], EmpiricalMeasure]:
    if isinstance(law, (Law, EmpiricalMeasure)):
        constant = _as_measure(law, period)
        return lambda t: constant
    if hasattr(law, "data_vars"):
        return _density_flow(law, period)
    if callable(law):
        return lambda t: _as_measure(law(t), period)
    raise TypeError(
        f"decoupled: law is a {type(law).__name__}; expected a Law, an EmpiricalMeasure, a function t -> Law, or a "
        "limit Dataset with density(time, x)."
    )


def _as_measure(law: Any, period: Period) -> EmpiricalMeasure:
    if isinstance(law, Law):
        law = law.as_measure()
    if not isinstance(law, EmpiricalMeasure):
        raise TypeError(f"decoupled: the law at a time is a {type(law).__name__}; expected a Law or EmpiricalMeasure.")
    return EmpiricalMeasure(law.points, None if law.is_uniform else law.weights, period=period)


def _density_flow(limit: xr.Dataset, period: Period) -> Callable[[float], EmpiricalMeasure]:
    names = ("x", "y") if "density" in limit and "y" in limit["density"].dims else ("x",)
    if "density" not in limit or set(limit["density"].dims) != {"time", *names}:
        raise ValueError(
            "decoupled: the dataset has no density(time, x) or density(time, x, y); pass one that has it, or t -> Law. "
            "With common noise choose a path: limit.isel(replica=0)."
        )
    columns = (limit["density"].transpose("time", *names), limit["time"])
    mass, times = (torch.from_numpy(c.values.astype("float64")) for c in columns)
    axes = []
    for k, (name, length) in enumerate(zip(names, _circles(limit, names, period), strict=True)):
        nodes, widths = _trapezoid(torch.from_numpy(limit[name].values.astype("float64")), length)
        mass = mass.narrow(k + 1, 0, len(nodes)) * widths.reshape(-1, *[1] * (len(names) - 1 - k))
        axes.append(nodes)
    points = torch.cartesian_prod(*axes).reshape(-1, len(axes))
    mass = mass.flatten(1)
    mass = mass / mass.sum(-1, keepdim=True)

    def at(t: float) -> EmpiricalMeasure:
        # A run's last time may exceed the dataset's by rounding.
        slack = 1e-9 * max(1.0, abs(t))
        if not float(times[0]) - slack <= t <= float(times[-1]) + slack:
            raise ValueError(
                f"decoupled: the law is given on [{float(times[0])}, {float(times[-1])}] but the run asks for t = {t}; "
                "solve the limit to the run's horizon."
            )
        right = int(torch.searchsorted(times, torch.tensor(t, dtype=torch.float64)).clamp(1, max(1, len(times) - 1)))
        left = max(0, min(right, len(times) - 1) - 1)
        right = min(right, len(times) - 1)
        span = float(times[right] - times[left])
        share = 0.0 if span == 0 else min(1.0, max(0.0, (t - float(times[left])) / span))
        return EmpiricalMeasure(points, (1 - share) * mass[left] + share * mass[right], period=period)

    return at


def _circles(limit: xr.Dataset, names: tuple[str, ...], period: Period) -> list[float]:
    """Circumference of every axis of a dataset, infinite on a line: as it says itself, else the scenario's."""
    own = [math.inf] * len(names) if period is None else period_lengths(period, len(names))
    recorded = [limit[name].attrs.get("period") for name in names]
    lengths = [length if r is None else float(r) for r, length in zip(recorded, own, strict=True)]
    if any(math.isfinite(a) and abs(a - b) > 1e-9 * a for a, b in zip(own, lengths, strict=True)):
        raise ValueError(
            f"decoupled: the law lives on a torus of lengths {lengths}, the scenario on one of {own}; solve the limit "
            "of the same scenario."
        )
    return lengths


def _trapezoid(nodes: Tensor, length: float) -> tuple[Tensor, Tensor]:
    """Distinct nodes and their weights; on a circle the last one's neighbour is the first, if it is not the first."""
    gaps = torch.diff(nodes)
    if math.isinf(length):
        gaps = torch.nn.functional.pad(gaps, (1, 1))
        return nodes, (gaps[1:] + gaps[:-1]) / 2
    rest = length - float(nodes[-1] - nodes[0])
    if rest > 1e-9 * length:
        gaps = torch.cat([gaps, gaps.new_tensor([rest])])
    elif rest > -1e-9 * length:
        nodes = nodes[:-1]
    else:
        raise ValueError(
            f"decoupled: nodes from {float(nodes[0]):g} to {float(nodes[-1]):g} go round the circle of length "
            f"{length:g} more than once."
        )
    return nodes, (gaps + gaps.roll(1)) / 2
