"""What the engine asks of an equation, and the equations it provides.

A scenario is any frozen dataclass with `drift`, `diffusion` and `initial`; `Equation` is the engine's view of one,
checked once at the door. `decoupled` replaces the particles' own law by a given one.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .energy import Energy, gradient
from .measure import EmpiricalMeasure, Law, Period, period_lengths
from .phase_space import law_of_positions

if TYPE_CHECKING:
    import xarray as xr

# Names that a run's dataset gives to its own settings, dimensions and variables.
RESERVED = frozenset(
    {
        *("n_particles", "horizon", "dt", "seed", "n_replicas", "save_every", "keep_particles", "observables"),
        *("method", "device", "dtype", "noise", "store", "overwrite", "checkpoint_every", "progress"),
        *("time", "replica", "particle", "component", "position", "weight", "parent", "events", "step"),
    }
)


# What a decoupled scenario takes over as it is, and what it evaluates at the given law.
COPIED = (
    *("project", "project_at", "period", "log_invariant", "limit", "suggested", "energy", "confinement", "sigma"),
    *("gamma", "regulariser", "proximal", "reinjection", "sample"),
)
OF_THE_LAW = ("common_diffusion", "birth_death_rate", "smooth_drift")


class Decoupled:
    """The scenario whose `mu` is a given flow of laws: the nonlinear process X̄ of propagation of chaos."""

    def __init__(self, scenario: Any, law: Any) -> None:
        self._scenario = scenario
        self.law = law
        self._flow = _flow(law, _period(scenario))
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
        return self._scenario.drift(t, x, self.law_at(t, x))  # type: ignore[no-any-return]

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Any:
        """The scenario's diffusion at the given law."""
        return self._scenario.diffusion(t, x, self.law_at(t, x))

    def initial(self) -> Any:
        """The scenario's initial law: equal seeds start both processes from the same points."""
        return self._scenario.initial()

    def observables(self) -> tuple[Any, ...]:
        """The scenario's observables, of the decoupled particles."""
        return tuple(self._scenario.observables()) if hasattr(self._scenario, "observables") else ()

    def law_at(self, t: float, x: Tensor) -> EmpiricalMeasure:
        """The given law at time t as a weighted measure beside x's leading axes."""
        asked = (t, x.shape[:-2], x.dtype, x.device)
        if self._measure is None or self._measure[0] != asked:
            law, lead = self._flow(t), x.shape[:-2]
            points = law.points.to(x).expand(*lead, *law.points.shape[-2:])
            weights = law.weights.to(x).expand(*lead, law.n_particles)
            self._measure = (asked, EmpiricalMeasure.given(points, weights, law.period))
        return self._measure[1]

    def _with_law(self, method: Callable[[float, Tensor, EmpiricalMeasure], Any]) -> Callable[..., Any]:
        return lambda t, x, mu: method(t, x, self.law_at(t, x))

    def _with_law_and_sample(self, drift: Callable[..., Any]) -> Callable[..., Any]:
        return lambda t, x, mu, sample: drift(t, x, self.law_at(t, x), sample)

    def _with_law_of_positions(self, force: Callable[[float, Tensor, EmpiricalMeasure], Any]) -> Callable[..., Any]:
        return lambda t, x, mu: force(t, x, law_of_positions(self.law_at(t, x)))


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


def _period(scenario: Any) -> Period:
    return getattr(scenario, "period", None)


def scenario_name(scenario: Any) -> str:
    """The name under which a scenario is recorded."""
    if isinstance(scenario, Decoupled):
        return f"decoupled({scenario_name(scenario._scenario)})"
    return type(scenario).__name__


def fields(scenario: Any) -> dict[str, Any]:
    """A scenario's parameters, by field name."""
    if isinstance(scenario, Decoupled):
        return fields(scenario._scenario)
    if not dataclasses.is_dataclass(scenario) or isinstance(scenario, type):
        raise TypeError(
            f"{scenario!r:.80} is not an instance of a dataclass; a scenario is a @dataclass(frozen=True) whose fields "
            "are its parameters, with methods drift, diffusion and initial."
        )
    return {f.name: getattr(scenario, f.name) for f in dataclasses.fields(scenario)}


def parameters(scenario: Any) -> dict[str, Any]:
    """A scenario's fields and, where it is another dynamics of a scenario `of`, those of that one, its own first."""
    own = fields(scenario)
    inner = own.get("of")
    if not dataclasses.is_dataclass(inner) or isinstance(inner, type):
        return own
    mine = {name: value for name, value in own.items() if name != "of"}
    return {**mine, **{name: value for name, value in parameters(inner).items() if name not in mine}}


def numeric_fields(scenario: Any) -> dict[str, Any]:
    """The parameters that are plain numbers: scalar coordinates of every dataset."""
    found: dict[str, Any] = {}
    for name, value in parameters(scenario).items():
        number = value.item() if isinstance(value, Tensor) and value.ndim == 0 else value
        if isinstance(number, (int, float, np.integer, np.floating)) and not isinstance(number, bool):
            found[name] = number
    return found


def replaced(scenario: Any, changes: dict[str, Any]) -> Any:
    """The scenario with some parameters changed."""
    if isinstance(scenario, Decoupled):
        return Decoupled(replaced(scenario._scenario, changes), scenario.law)
    own = {name: value for name, value in changes.items() if name in fields(scenario)}
    others = {name: value for name, value in changes.items() if name not in own}
    if others and "of" in fields(scenario):
        own["of"] = replaced(scenario.of, others)
        others = {}
    return dataclasses.replace(scenario, **own, **others)


def on_device(scenario: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The scenario with its floating tensor fields on the run's device, in its dtype."""
    if isinstance(scenario, Decoupled):
        return Decoupled(on_device(scenario._scenario, device, dtype), scenario.law)
    moved: dict[str, Any] = {
        f.name: getattr(scenario, f.name).to(device=device, dtype=dtype)
        for f in dataclasses.fields(scenario)
        if f.init and isinstance(getattr(scenario, f.name), Tensor) and getattr(scenario, f.name).is_floating_point()
    }
    inner = fields(scenario).get("of")
    if dataclasses.is_dataclass(inner) and not isinstance(inner, type):
        moved["of"] = on_device(inner, device, dtype)
    return dataclasses.replace(scenario, **moved) if moved else scenario


class Equation:
    """A scenario as the solver sees it: coefficients on states (R, N, d), checked once when it is built.

    Args:
        scenario: the user's object.
        x: the initial state, (R, N, d), on the run's device.
        weights: (R, N) or None.
        checks_drift: whether the drift is looked at; a method that samples never calls it, and it may be costly.

    `weights`, `parent` and `events` belong to the state: births and deaths change them beside x.

    Raises:
        TypeError, ValueError: a method is missing or returns something of the wrong type, shape or dtype; a name is
            reserved; the message says which and what was expected.

    """

    def __init__(self, scenario: Any, x: Tensor, weights: Tensor | None = None, checks_drift: bool = True) -> None:
        self.name = scenario_name(scenario)
        self.scenario = scenario
        self.period = _period(scenario)
        self.shape = x.shape
        self.device = x.device
        self.weights = weights
        self.has_projection = hasattr(scenario, "project") or hasattr(scenario, "project_at")
        self.has_common_noise = hasattr(scenario, "common_diffusion")
        self.has_birth_death = hasattr(scenario, "birth_death_rate")
        # Of every particle, its ancestor at the last saved time; of every replica, the births since then.
        self.parent: Tensor | None = None
        self.events: Tensor | None = None
        self._check(x, checks_drift)

    def measure(self, x: Tensor) -> EmpiricalMeasure:
        """The empirical measure of a state."""
        if self.weights is None:
            return EmpiricalMeasure(x, period=self.period)
        return EmpiricalMeasure.signed(x, self.weights, self.period)

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """b(t, x, mu), (R, N, d), detached."""
        b: Tensor = self.scenario.drift(t, x, mu)
        return b.detach() if isinstance(b, Tensor) and b.requires_grad else b

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> float | Tensor:
        """σ(t, x, mu): a float, a tensor that broadcasts to x (diagonal), or (..., N, d, m)."""
        return _coefficient(self.scenario.diffusion(t, x, mu))

    def common_diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> float | Tensor:
        """σ⁰(t, x, mu), the coefficient of the Brownian motion shared by all particles."""
        return _coefficient(self.scenario.common_diffusion(t, x, mu))

    def project(self, t: float, x: Tensor) -> Tensor:
        """The state moved back into its domain at time t."""
        if hasattr(self.scenario, "project_at"):
            return self.scenario.project_at(t, x)  # type: ignore[no-any-return]
        return self.scenario.project(x)  # type: ignore[no-any-return]

    def birth_death_rate(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """The signed rate per unit time, (R, N), detached, before its mean is subtracted."""
        rate: Tensor = self.scenario.birth_death_rate(t, x, mu)
        return rate.detach() if isinstance(rate, Tensor) and rate.requires_grad else rate

    @cached_property
    def reinjection(self) -> tuple[float, Law] | None:
        """Rate and law of the particles that come from outside, where there are any."""
        return self.scenario.reinjection() if hasattr(self.scenario, "reinjection") else None

    def trace(self) -> None:
        """Starts to follow ancestors and events from this moment on."""
        n_replicas, n_particles, _ = self.shape
        self.parent = torch.arange(n_particles, device=self.device).repeat(n_replicas, 1)
        self.events = torch.zeros(n_replicas, dtype=torch.int64, device=self.device)

    def count(self, events: Tensor) -> None:
        """Adds the births and deaths of a step, (R,)."""
        if self.events is not None:
            self.events += events

    @cached_property
    def is_additive(self) -> bool:
        """True when every diffusion is a number: no dependence on the state."""
        return self.forms == {"number"}

    def _check(self, x: Tensor, checks_drift: bool) -> None:
        self._check_names()
        if self.period is not None:
            period_lengths(self.period, x.shape[-1])
        mu = self.measure(x)
        with torch.no_grad():
            if checks_drift:
                self._check_drift(x, mu)
            sigma = unchanged(f"{self.name}.diffusion", x, lambda: self.diffusion(0.0, x, mu))
            self.n_channels, form = self._check_diffusion("diffusion", sigma, x)
            self.n_common, common = 0, form
            if self.has_common_noise:
                shared = unchanged(f"{self.name}.common_diffusion", x, lambda: self.common_diffusion(0.0, x, mu))
                self.n_common, common = self._check_diffusion("common_diffusion", shared, x)
            self.forms = {form, common}
            self.form, self.common_form = form, common
            if self.has_projection:
                self._check_shape("project", self.project(0.0, x.clone()), x)
            if self.has_birth_death:
                self._check_rate(x, mu)

    def _check_names(self) -> None:
        for method in ("drift", "diffusion", "initial"):
            if not callable(getattr(self.scenario, method, None)):
                raise TypeError(
                    f"{self.name} has no method {method}; a scenario defines drift(t, x, mu), diffusion(t, x, mu) and "
                    "initial()."
                )
        for name in getattr(self.scenario, "declares", ()):
            if not hasattr(type(self.scenario), name) and name not in fields(self.scenario):
                raise TypeError(
                    f"{self.name} declares no {name}; the dynamics that it inherits needs all of "
                    f"{', '.join(self.scenario.declares)}, as fields, properties or methods."
                )
        taken = RESERVED & set(fields(self.scenario))
        if taken:
            raise ValueError(
                f"{self.name}: field name {', '.join(sorted(taken))} is reserved for settings, dimensions and "
                "variables of the dataset; rename it."
            )

    def _check_drift(self, x: Tensor, mu: EmpiricalMeasure) -> None:
        b = unchanged(f"{self.name}.drift", x, lambda: self.drift(0.0, x, mu))
        self._check_shape("drift", b, x)
        if not bool(torch.isfinite(b).all()):
            raise ValueError(
                f"{self.name}.drift is not finite at the initial state: {_first_bad(b)}. Check for a division by zero "
                "or a logarithm of a negative number there."
            )

    def _check_rate(self, x: Tensor, mu: EmpiricalMeasure) -> None:
        rate = unchanged(f"{self.name}.birth_death_rate", x, lambda: self.birth_death_rate(0.0, x, mu))
        if not isinstance(rate, Tensor) or rate.shape != x.shape[:-1]:
            told = f"shape {tuple(rate.shape)}" if isinstance(rate, Tensor) else f"a {type(rate).__name__}"
            raise ValueError(
                f"{self.name}.birth_death_rate returned {told} for {x.shape[-2]} particles and {x.shape[0]} replicas; "
                f"expected one signed rate per particle, {tuple(x.shape[:-1])} (positive: it dies)."
            )
        self._check_dtype("birth_death_rate", rate, x)
        self._check_finite("birth_death_rate", rate)

    def _check_shape(self, method: str, value: Any, x: Tensor) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{self.name}.{method} returned a {type(value).__name__}; expected a tensor of shape {tuple(x.shape)}. "
                "A constant is torch.full_like(x, c)."
            )
        if value.shape != x.shape:
            raise ValueError(
                f"{self.name}.{method} returned shape {tuple(value.shape)} for {x.shape[-2]} particles in dimension "
                f"{x.shape[-1]} and {x.shape[0]} replicas; expected {tuple(x.shape)}. A mean over particles needs "
                "keepdim=True (mu.mean() has it) and the result must broadcast to x, one row per particle."
            )
        self._check_dtype(method, value, x)

    def _check_dtype(self, method: str, value: Tensor, x: Tensor) -> None:
        if value.dtype != x.dtype or value.device != x.device:
            raise TypeError(
                f"{self.name}.{method} returned {value.dtype} on {value.device}; the run is {x.dtype} on {x.device}. "
                "Tensors that are fields are moved for you; create others with x.new_tensor(...)."
            )

    def _check_diffusion(self, method: str, value: Any, x: Tensor) -> tuple[int, str]:
        """Number of Brownian channels, and the form: "number", "diagonal" or "general"."""
        if isinstance(value, numbers.Real) and not isinstance(value, bool):
            self._check_finite(method, torch.tensor(float(value)))
            return x.shape[-1], "number"
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{self.name}.{method} returned a {type(value).__name__}; expected a float (isotropic), a tensor that "
                "broadcasts to x (diagonal), or (..., N, d, m)."
            )
        self._check_dtype(method, value, x)
        self._check_finite(method, value)
        if x.shape[-1] > 1 and value.shape == (x.shape[-1], x.shape[-1]) == tuple(x.shape[-2:]):
            raise ValueError(
                f"{self.name}.{method} returned shape {tuple(value.shape)}, which for {x.shape[-2]} particles "
                f"in dimension {x.shape[-1]} may be a matrix or one row per particle. Write "
                "matrix[None, None], or rows[None]."
            )
        general = value.ndim == x.ndim + 1
        target = (*x.shape, value.shape[-1]) if general else tuple(x.shape)
        try:
            fits = value.ndim <= x.ndim + 1 and torch.broadcast_shapes(value.shape, target) == target
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"{self.name}.{method} returned shape {tuple(value.shape)} for x {tuple(x.shape)}; expected a tensor "
                f"that broadcasts to {tuple(x.shape)} (diagonal) or to {(*x.shape, 'm')} (general; a constant (d, m) "
                "matrix is matrix[None, None])."
            )
        return (value.shape[-1], "general") if general else (x.shape[-1], "diagonal")

    def _check_finite(self, method: str, value: Tensor) -> None:
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{self.name}.{method} is not finite at the initial state: {_first_bad(value)}.")


def _coefficient(value: Any) -> float | Tensor:
    """A diffusion without its graph, numbers of any kind as floats."""
    if isinstance(value, Tensor):
        return value.detach() if value.requires_grad and not torch.is_grad_enabled() else value
    # What is neither is refused at the door.
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else value


def unchanged(name: str, x: Tensor, call: Callable[[], Any]) -> Any:
    """The result of a user's function, refused when it changed the state in place."""
    version = x._version
    result = call()
    if x._version != version:
        raise ValueError(f"{name} changed x in place; return a new tensor (x - m, not x.sub_(m)).")
    return result


def _first_bad(value: Tensor) -> str:
    where = torch.nonzero(~torch.isfinite(value))[0].tolist()
    return f"value {float(value[tuple(where)])} at index {tuple(where)}"


def energy_of(scenario: Any) -> Energy:
    """The scenario's energy.

    Raises:
        TypeError: it has none.

    """
    energy = getattr(scenario, "energy", None)
    if not isinstance(energy, Energy):
        raise TypeError(
            f"{scenario_name(scenario)} has no energy; declare `energy` as a property that returns an mfsde.Energy, or "
            "leave out what is derived from it."
        )
    return energy


def configuration(scenario: Any, mu: EmpiricalMeasure) -> EmpiricalMeasure:
    """The part of a state's law that energies speak of: positions, where there are velocities too."""
    part: EmpiricalMeasure = scenario.configuration(mu) if hasattr(scenario, "configuration") else mu
    return part


def temperature(scenario: Any) -> float:
    """T = σ²/2.

    Raises:
        TypeError: the scenario declares no constant σ.
        ValueError: σ = 0, where there is no entropy.

    """
    if hasattr(scenario, "configuration"):
        raise TypeError(
            f"{scenario_name(scenario)} is kinetic: its energy and temperature σ²/(2γ) speak of positions. Ask its "
            "overdamped() scenario, whose stationary laws of positions are the same."
        )
    sigma = getattr(scenario, "sigma", None)
    if sigma is None:
        raise TypeError(f"{scenario_name(scenario)} has no field sigma; the free energy needs the constant σ.")
    if not float(sigma) > 0:
        raise ValueError(f"sigma = {float(sigma)}: the free energy F + (σ²/2) KL needs σ > 0.")
    return 0.5 * float(sigma) ** 2


def confinement(scenario: Any, x: Tensor) -> Tensor:
    """U(x); zero for a scenario that defines none, whose reference measure is Lebesgue's."""
    potential = getattr(scenario, "confinement", None)
    return x.new_zeros(x.shape[:-1]) if potential is None else potential(x)


def confinement_gradient(scenario: Any, x: Tensor) -> Tensor:
    """∇U(x)."""
    if hasattr(scenario, "confinement_gradient"):
        slope: Tensor = scenario.confinement_gradient(x)
        return slope
    return gradient(lambda y: confinement(scenario, y), x)
