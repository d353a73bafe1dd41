"""What the engine asks of an equation.

A scenario is any frozen dataclass with `drift`, `diffusion` and `initial`; `Equation` is the engine's view of one,
checked once at the door.
"""

from __future__ import annotations

import copy
import dataclasses
import numbers
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .energy import Energy, gradient
from .measure import EmpiricalMeasure, Law
from .nonlinear_process import Decoupled
from .pairwise.convolution import used
from .pairwise.kernel import Key
from .torus import Period, period_lengths

# Names that a run's dataset gives to its own settings, dimensions and variables.
RESERVED = frozenset(
    {
        *("n_particles", "horizon", "dt", "seed", "n_replicas", "save_every", "keep_particles", "observables"),
        *("method", "device", "dtype", "noise", "store", "overwrite", "checkpoint_every", "compile", "progress"),
        *("memory", "workers"),
        *("time", "replica", "particle", "component", "position", "weight", "parent", "events", "step"),
        "interaction_error",
    }
)


def scenario_name(scenario: Any) -> str:
    """The name under which a scenario is recorded."""
    if isinstance(scenario, Decoupled):
        return f"decoupled({scenario_name(scenario.scenario)})"
    return type(scenario).__name__


def fields(scenario: Any) -> dict[str, Any]:
    """A scenario's parameters, by field name."""
    if isinstance(scenario, Decoupled):
        return fields(scenario.scenario)
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
        return Decoupled(replaced(scenario.scenario, changes), scenario.law)
    own = {name: value for name, value in changes.items() if name in fields(scenario)}
    others = {name: value for name, value in changes.items() if name not in own}
    if others and "of" in fields(scenario):
        own["of"] = replaced(scenario.of, others)
        others = {}
    return dataclasses.replace(scenario, **own, **others)


def on_device(scenario: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The scenario with its floating tensor fields on the run's device, in its dtype."""
    if isinstance(scenario, Decoupled):
        return Decoupled(on_device(scenario.scenario, device, dtype), scenario.law)
    moved: dict[str, Any] = {
        f.name: getattr(scenario, f.name).to(device=device, dtype=dtype)
        for f in dataclasses.fields(scenario)
        if f.init and isinstance(getattr(scenario, f.name), Tensor) and getattr(scenario, f.name).is_floating_point()
    }
    inner = fields(scenario).get("of")
    if dataclasses.is_dataclass(inner) and not isinstance(inner, type):
        moved["of"] = on_device(inner, device, dtype)
    return dataclasses.replace(scenario, **moved) if moved else scenario


def with_methods(scenario: Any, methods: Mapping[str, Callable[..., Any]]) -> Any:
    """The scenario with some methods replaced, for whoever calls them from outside.

    Raises:
        AttributeError: its class has slots, so that no method of one object can be replaced.

    """
    view = copy.copy(scenario)
    for name, method in methods.items():
        # Frozen: what is set stands before the class's method, for this object.
        object.__setattr__(view, name, method)
    return view


def has_births(scenario: Any) -> bool:
    """Whether particles are born and die: of one another (birth_death_rate), or from outside (reinjection)."""
    return hasattr(scenario, "birth_death_rate") or hasattr(scenario, "reinjection")


class Equation:
    """A scenario as the solver sees it: coefficients on states (R, N, d), checked once when it is built.

    Args:
        scenario: the user's object.
        x: the initial state, (R, N, d), on the run's device.
        weights: (R, N) or None.
        checks_drift: whether the drift is looked at; a method that samples never calls it, and it may be costly.

        key: the randomness of the first step, for sums over pairs that draw.

    `weights`, `parent` and `events` belong to the state: births and deaths change them beside x. `key` belongs to the
    step; `strategies` are those by which sums over pairs are evaluated at the start.

    Raises:
        TypeError, ValueError: a method is missing or returns something of the wrong type, shape or dtype; a name is
            reserved; the message says which and what was expected.

    """

    def __init__(
        self, scenario: Any, x: Tensor, weights: Tensor | None = None, checks_drift: bool = True, key: Key | None = None
    ) -> None:
        self.name = scenario_name(scenario)
        self.scenario = scenario
        self.period: Period = getattr(scenario, "period", None)
        self.shape = x.shape
        self.device = x.device
        self.weights = weights
        self.key = key
        self.has_projection = hasattr(scenario, "project") or hasattr(scenario, "project_at")
        self.has_common_noise = hasattr(scenario, "common_diffusion")
        self.has_birth_death = has_births(scenario)
        # Of every particle, its ancestor at the last saved time; of every replica, the births since then.
        self.parent: Tensor | None = None
        self.events: Tensor | None = None
        with used() as self.strategies:
            self._check(x, checks_drift)
        # What is evaluated between steps has no key.
        self.key = None

    @property
    def is_approximate(self) -> bool:
        """Whether the coefficients have sums over pairs that are not exact."""
        return any(not strategy.exact for strategy in self.strategies.values())

    @property
    def is_random(self) -> bool:
        """Whether they have sums that are drawn anew in each step."""
        return any(strategy.random for strategy in self.strategies.values())

    def measure(self, x: Tensor) -> EmpiricalMeasure:
        """The empirical measure of a state."""
        return EmpiricalMeasure.signed(x, self.weights, self.period, self.key)

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
        if not hasattr(self.scenario, "birth_death_rate"):
            # Particles come from outside, and none is born of another.
            return x.new_zeros(x.shape[:-1])
        rate: Tensor = self.scenario.birth_death_rate(t, x, mu)
        return rate.detach() if isinstance(rate, Tensor) and rate.requires_grad else rate

    @cached_property
    def reinjection(self) -> tuple[float, Law] | None:
        """Rate and law of the particles that come from outside, where there are any."""
        if not hasattr(self.scenario, "reinjection"):
            return None
        found = self.scenario.reinjection()
        if not isinstance(found, tuple) or len(found) != 2:
            raise TypeError(
                f"{self.name}.reinjection() returned {found!r:.60}; expected (rate, law): at that rate per unit time a "
                "particle is replaced by a draw from the law."
            )
        return found

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
            self._check_domain(x)
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

    def _check_domain(self, x: Tensor) -> None:
        """Steps project what they have moved, and not the start."""
        regulariser = getattr(self.scenario, "regulariser", None)
        if regulariser is None or not regulariser.has_domain:
            return
        values = regulariser.value(x)
        bad = torch.nonzero(~torch.isfinite(values))
        if len(bad):
            where = tuple(bad[0].tolist())
            raise ValueError(
                f"{self.name}: the initial state has V = {float(values[where])} at replica {where[0]}, particle "
                f"{where[1]}, x = {x[where].tolist()}, for V = {regulariser}. Start inside the domain."
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
