"""What is measured while running: functions of (t, x, mu), seen by all N particles at every saved step.

An `Observable` is user-given or one of the named ones here: `mean`, `covariance`, `energy`, `confinement`, `entropy`,
`free_energy`. A scenario's own come from its `observables()`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .measure import EmpiricalMeasure
from .model import RESERVED, Equation, configuration, energy_of, fields, scenario_name, temperature, unchanged
from .pairwise.convolution import measured

Function = Callable[[float, Tensor, EmpiricalMeasure], Tensor]


@dataclass(frozen=True)
class Observable:
    """A quantity recorded at every saved step.

    Args:
        name: name of the dataset variable.
        function: (t, x, mu) -> (R, ...), R the number of replicas.
        units: recorded as an attribute.
        long_name: recorded as an attribute; the name when empty.
        dims: names of the axes after `replica`; `name_1`, `name_2`, ... when None.

    """

    name: str
    function: Function
    units: str = "1"
    long_name: str = ""
    dims: tuple[str, ...] | None = None

    def dimensions(self, value: Tensor) -> tuple[str, ...]:
        """Dimension names of a recorded value, `time` apart."""
        extra = value.ndim - 1
        names = self.dims if self.dims is not None else tuple(f"{self.name}_{k + 1}" for k in range(extra))
        if len(names) != extra:
            raise ValueError(
                f"observable {self.name!r}: dims {names} name {len(names)} axes after `replica`, but the function "
                f"returned shape {tuple(value.shape)}."
            )
        return ("replica", *names)


def mean(scenario: Any = None) -> Observable:
    """∫ x dm, (R, d)."""
    return Observable("mean", lambda t, x, mu: mu.mean().squeeze(-2), "1", "mean over particles", ("component",))


def covariance(scenario: Any = None) -> Observable:
    """Population covariance of the particles, (R, d, d)."""
    return Observable(
        "covariance",
        lambda t, x, mu: mu.covariance(),
        "1",
        "population covariance over particles",
        ("component", "component_2"),
    )


def energy(scenario: Any) -> Observable:
    """F(m), for a scenario that has an energy."""
    functional = energy_of(scenario)
    return Observable("energy", lambda t, x, mu: functional(configuration(scenario, mu)), "1", "energy F(m)")


def confinement(scenario: Any) -> Observable:
    """∫ U dm, for a scenario with a confinement."""
    potential = _confinement(scenario)
    return Observable(
        "confinement",
        lambda t, x, mu: configuration(scenario, mu).integrate(potential),
        "1",
        "confinement ∫ U dm",
    )


def entropy(scenario: Any = None) -> Observable:
    """Gaussian plug-in of -∫ m log m: an upper bound, since no law of that covariance has more entropy."""
    return Observable(
        "entropy",
        lambda t, x, mu: gaussian_entropy(mu),
        "nat",
        "differential entropy, Gaussian plug-in (upper bound)",
    )


def free_energy(scenario: Any) -> Observable:
    """F(m) + (σ²/2) (∫ U dm + ∫ m log m) with the Gaussian plug-in for the entropy: a lower bound.

    It equals V^σ = F + (σ²/2) KL(m | e^{-U}) for Gaussian m and normalised U; an unnormalised U shifts it by a
    constant. A kinetic scenario's has the kinetic energy besides, and the entropy of positions and velocities.
    """
    if hasattr(scenario, "internal_energy"):
        return Observable(
            "free_energy",
            lambda t, x, mu: scenario.internal_energy(mu) - scenario.temperature * gaussian_entropy(mu),
            "1",
            "free energy F + T (∫ U dm + ∫ m log m) + ½ ∫ |v|² dm, Gaussian plug-in (lower bound)",
        )
    functional, potential, warmth = energy_of(scenario), _confinement(scenario), temperature(scenario)

    def value(t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        return functional(mu) + warmth * (mu.integrate(potential) - gaussian_entropy(mu))

    return Observable("free_energy", value, "1", "free energy F + (σ²/2) KL(m | e^-U), Gaussian plug-in (lower bound)")


NAMED: dict[str, Callable[[Any], Observable]] = {
    "mean": mean,
    "covariance": covariance,
    "energy": energy,
    "confinement": confinement,
    "entropy": entropy,
    "free_energy": free_energy,
}


def gaussian_entropy(mu: EmpiricalMeasure) -> Tensor:
    """½ log det(2πe Σ) from the sample covariance, without the bias of a log-determinant.    (...,), nats.

    For N Gaussian samples E log det S = log det Σ + Σ_{i<=d} ψ((N-i)/2) + d log(2/(N-1)), S the unbiased covariance
    (Wishart; Anderson, An Introduction to Multivariate Statistical Analysis, theorem 7.5.3).

    Raises:
        ValueError: N <= d, where the sample covariance is singular, or a weighted measure.

    """
    n, d = mu.n_particles, mu.dim
    if n <= d or not mu.is_uniform:
        raise ValueError(
            f"the Gaussian entropy needs more unweighted particles than dimensions; got N = {n}, d = {d}"
            f"{'' if mu.is_uniform else ', weighted'}. Drop `entropy` and `free_energy` from the observables."
        )
    sample = mu.covariance().double() * (n / (n - 1))
    degrees = torch.arange(n - 1, n - 1 - d, -1, dtype=torch.float64, device=sample.device)
    bias = torch.digamma(degrees / 2).sum() + d * math.log(2 / (n - 1))
    found = torch.linalg.slogdet(sample)
    # Rounding gives a singular covariance a tiny determinant of any sign; its entropy is -inf.
    scale = torch.diagonal(sample, dim1=-2, dim2=-1).amax(-1).clamp(min=1e-300)
    singular = (found.sign <= 0) | (torch.linalg.eigvalsh(sample)[..., 0] <= 1e-13 * d * scale)
    log_det: Tensor = torch.where(singular, -math.inf, found.logabsdet) - bias
    return (0.5 * (log_det + d * math.log(2 * math.pi * math.e))).to(mu.points.dtype)


def resolve(scenario: Any, extra: Iterable[Observable | str]) -> tuple[Observable, ...]:
    """A scenario's own observables and those of the call, names looked up.

    Raises:
        TypeError: something that is neither an Observable nor a name.
        ValueError: an unknown, reserved or repeated name.

    """
    own = tuple(scenario.observables()) if hasattr(scenario, "observables") else ()
    found = tuple(_one(scenario, item) for item in (*own, *listed(extra)))
    names = [o.name for o in found]
    taken = {name for name in names if name in RESERVED or name in fields(scenario) or names.count(name) > 1}
    if taken:
        raise ValueError(
            f"{scenario_name(scenario)}: observable name {', '.join(sorted(taken))} is taken by a setting, a "
            "dimension, a variable, a field or another observable; rename it."
        )
    return found


def evaluate(observable: Observable, equation: Equation, t: float, x: Tensor) -> Tensor:
    """The observable's value on a state.

    Raises:
        TypeError, ValueError: it is no tensor, or its first axis is not the replicas.

    """
    with torch.no_grad():
        value = unchanged(f"observable {observable.name!r}", x, lambda: observable.function(t, x, equation.measure(x)))
    if not isinstance(value, Tensor):
        raise TypeError(
            f"observable {observable.name!r} returned a {type(value).__name__}; expected a tensor (R, ...)."
        )
    if value.ndim == 0 or len(value) != len(x):
        raise ValueError(
            f"observable {observable.name!r} returned shape {tuple(value.shape)} for {len(x)} replicas; expected "
            f"({len(x)}, ...): one value per replica. mu.integrate(f) averages over particles and keeps replicas."
        )
    return value.detach()


def interaction_error(equation: Equation, t: float, x: Tensor) -> Tensor:
    """√(Σ_i |a_i - e_i|² / Σ_i |e_i|²): the sums a over pairs of the coefficients at t, against exact ones e.    (R,).

    The largest over kernels, on at most `convolution.SAMPLE` particles, evenly spread over their numbers.
    """
    mu = equation.measure(x)
    with torch.no_grad(), measured() as errors:
        equation.drift(t, x, mu)
        equation.diffusion(t, x, mu)
        if equation.has_common_noise:
            equation.common_diffusion(t, x, mu)
    return torch.stack([x.new_zeros(len(x), dtype=torch.float64), *errors.values()]).amax(0)


def is_named(observable: Observable) -> bool:
    """True for the observables of this file: their name says what they compute."""
    return getattr(observable.function, "__module__", None) == __name__


def listed(extra: Iterable[Observable | str]) -> Iterable[Observable | str]:
    """One observable or several, as several."""
    return (extra,) if isinstance(extra, (str, Observable)) else extra


def _one(scenario: Any, item: Any) -> Observable:
    if isinstance(item, Observable):
        return item
    if not isinstance(item, str):
        raise TypeError(f"observables: {item!r:.60} is neither an mfsde.Observable nor a name.")
    if item not in NAMED:
        raise ValueError(f"observables: unknown name {item!r}; expected one of {', '.join(NAMED)}, or an Observable.")
    return NAMED[item](scenario)


def _confinement(scenario: Any) -> Callable[[Tensor], Tensor]:
    potential = getattr(scenario, "confinement", None)
    if not callable(potential):
        raise TypeError(f"{scenario_name(scenario)} has no confinement(x); `confinement` and `free_energy` need one.")
    return potential  # type: ignore[no-any-return]
