"""One energy under every dynamics of the family, and their comparison in one dataset.

A member has the energy, confinement, start and torus of another scenario, and its own equation:

    GradientFlowOf   dX = -D_mF dt                                       no noise
    LangevinOf       dX = -(D_mF + T ∇U) dt + σ dW                       T = σ²/2
    KineticOf        dX = V dt, dV = -(D_mF + T ∇U + γV) dt + σ dW       T = σ²/(2γ)
    NoisySGDOf        the drift of LangevinOf from a minibatch of the data; needs an energy with an mfsde.risk

The first two take `alpha`, births and deaths at the rate α(V - ∫ V dm) of `Selection`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from torch import Tensor

from .energy import Energy
from .gradient_flow import GradientFlow
from .kinetic import KineticLangevin
from .langevin import MeanFieldLangevin
from .measure import EmpiricalMeasure, Law
from .methods import suited
from .model import confinement, confinement_gradient, energy_of, scenario_name
from .run import simulate
from .selection import temperature_of
from .sgd import NoisySGD

# Scalar coordinates that all members share.
KEPT = ("n_particles", "dt", "seed")
# Attributes that say something of one member only.
OF_ONE = ("reaction", "selection")


class _Member:
    """What a member takes from the scenario `of`."""

    of: Any

    def __post_init__(self) -> None:
        if hasattr(self.of, "force"):
            raise ValueError(
                f"{scenario_name(self.of)} is kinetic, and its energy speaks of positions; pass its overdamped() "
                "scenario, of the same energy and temperature."
            )
        energy_of(self.of)

    @property
    def energy(self) -> Energy:
        """F of the scenario."""
        return energy_of(self.of)

    def confinement(self, x: Tensor) -> Tensor:
        """U of the scenario, 0 where it has none."""
        return confinement(self.of, x)

    def confinement_gradient(self, x: Tensor) -> Tensor:
        """∇U."""
        return confinement_gradient(self.of, x)

    def initial(self) -> Any:
        """The scenario's initial law or measure."""
        return self.of.initial()

    def observables(self) -> tuple[Any, ...]:
        """The scenario's observables, and the energy; without noise no free energy."""
        own = tuple(self.of.observables()) if hasattr(self.of, "observables") else ()
        if not temperature_of(self) > 0:
            own = tuple(o for o in own if o != "free_energy")
        return own if any(_name(o) == "energy" for o in own) else ("energy", *own)

    def suggested(self) -> dict[str, Any]:
        """The scenario's settings, by the method of this dynamics; its `observables` are its own."""
        given = dict(self.of.suggested()) if hasattr(self.of, "suggested") else {}
        given.pop("observables", None)
        return {**given, "method": suited(self)}

    @property
    def regulariser(self) -> Any:
        """The scenario's, None where it has none."""
        return getattr(self.of, "regulariser", None)

    @property
    def period(self) -> Any:
        """The scenario's torus, an attribute only where it has one."""
        return self.of.period

    @property
    def project(self) -> Any:
        """The scenario's projection, an attribute only where it has one."""
        return self.of.project


@dataclass(frozen=True)
class GradientFlowOf(_Member, GradientFlow):
    """dX = -D_mF(m, X) dt for the energy of a scenario, and of its regulariser the subgradient of least norm.

    Args:
        of: a scenario with an energy.
        alpha: None, or the rate of births and deaths.

    """

    of: Any
    alpha: float | None = None


@dataclass(frozen=True)
class LangevinOf(_Member, MeanFieldLangevin):
    """dX = -(D_mF + (σ²/2) ∇U) dt + σ dW for the energy, confinement and regulariser of a scenario.

    Args:
        of: a scenario with an energy.
        sigma: σ; the scenario's own when None.
        alpha: None, or the rate of births and deaths.
        bandwidth: None, or the width of the kernel of the log-density variant.

    """

    of: Any
    sigma: float | None = None
    alpha: float | None = None
    bandwidth: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "sigma", _noise_of(self.of, self.sigma))

    def smooth_drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """-(D_mF + (σ²/2) ∇U)."""
        return MeanFieldLangevin.drift(self, t, x, mu)

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """The smooth drift less the subgradient of the regulariser that is nearest to it."""
        v = self.smooth_drift(t, x, mu)
        return v if self.regulariser is None else v - self.regulariser.project_subgradient(x, v)

    def proximal(self, x: Tensor, h: float) -> Tensor:
        """The regulariser's proximal map."""
        nearest: Tensor = x if self.regulariser is None else self.regulariser.prox(x, h)
        return nearest


@dataclass(frozen=True)
class KineticOf(_Member, KineticLangevin):
    """dX = V dt, dV = -(D_mF + T ∇U + γV) dt + σ dW, T = σ²/(2γ); velocities start from N(0, T I).

    Args:
        of: a scenario with an energy on R^d.
        gamma: γ > 0.
        overdamped_sigma: σ of the Langevin dynamics at the same temperature T = σ²/2; the scenario's own when None.
            The noise of velocities is then σ√γ.

    """

    of: Any
    gamma: float = 1.0
    overdamped_sigma: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not float(self.gamma) > 0:
            raise ValueError(
                f"gamma = {self.gamma}; expected a friction > 0, which the temperature σ²/(2γ) is divided by."
            )
        object.__setattr__(self, "overdamped_sigma", _noise_of(self.of, self.overdamped_sigma))
        found = _speaking_of_positions(self.of)
        if found:
            raise ValueError(
                f"{scenario_name(self.of)} has a {found[0]}, which speaks of positions alone; write its kinetic "
                "scenario as a class of its own, whose state is (position, velocity)."
            )

    @property
    def sigma(self) -> float:
        """The noise of velocities, √(2γT)."""
        return float(self.overdamped_sigma) * math.sqrt(self.gamma)  # type: ignore[arg-type]

    def initial_position(self) -> Law:
        """The scenario's initial law."""
        law: Law = self.of.initial()
        return law

    def initial(self) -> Any:
        """Positions as the scenario starts them, velocities N(0, T I)."""
        return self.with_velocities(self.initial_position())

    def observables(self) -> tuple[Any, ...]:
        """The energy of positions; the scenario's own observables know nothing of velocities."""
        return ("energy",)


@dataclass(frozen=True)
class NoisySGDOf(_Member, NoisySGD):
    """The drift of `LangevinOf` from a minibatch of the data of the scenario's risk, one a step of "sgd".

    Args:
        of: a scenario whose energy has an mfsde.risk.
        sigma: σ; the scenario's own when None, 0 without noise.
        batch_size: data in a minibatch.
        sampling: "with_replacement", "without_replacement" or "epochs".

    """

    of: Any
    sigma: float | None = None
    batch_size: int = 1
    sampling: str = "with_replacement"

    def __post_init__(self) -> None:
        super().__post_init__()
        given = getattr(self.of, "sigma", 0.0) if self.sigma is None else self.sigma
        object.__setattr__(self, "sigma", float(given))
        self.check_batch()
        if getattr(self.of, "regulariser", None) is not None:
            raise ValueError(
                f"{scenario_name(self.of)} has a regulariser, which sampled steps do not take; use LangevinOf with "
                "method='proximal'."
            )


# The members by name: their class, and what is set unless it is given.
MEMBERS: dict[str, tuple[type, dict[str, Any]]] = {
    "gradient_flow": (GradientFlowOf, {}),
    "langevin": (LangevinOf, {}),
    "kinetic": (KineticOf, {}),
    "birth_death": (GradientFlowOf, {"alpha": 1.0}),
    "noisy_sgd": (NoisySGDOf, {}),
}


def members(
    scenario: Any, *, sigma: float | None = None, gamma: float = 1.0, alpha: float = 1.0, batch_size: int | None = None
) -> dict[str, Any]:
    """The members of the family on a scenario's energy, all noisy ones at one temperature T = σ²/2.

    Args:
        scenario: with an energy.
        sigma: σ of the Langevin dynamics; the scenario's own when None.
        gamma: γ of the kinetic dynamics, whose noise is then σ√γ.
        alpha: rate of births and deaths.
        batch_size: data in a minibatch of noisy SGD; None leaves it out.

    Returns:
        name -> scenario: gradient_flow, langevin, kinetic, birth_death (the gradient flow with births and deaths), and
        noisy_sgd where batch_size is given. Kinetic dynamics only on R^d and without a regulariser. It is slower by the
        factor γ: as γ → ∞ its positions at time γs are those of the Langevin dynamics at s.

    Raises:
        TypeError: no energy, or no sigma.

    """
    found: dict[str, Any] = {"gradient_flow": GradientFlowOf(scenario), "langevin": LangevinOf(scenario, sigma)}
    if not _speaking_of_positions(scenario):
        found["kinetic"] = KineticOf(scenario, gamma, sigma)
    found["birth_death"] = GradientFlowOf(scenario, alpha)
    if batch_size is not None:
        found["noisy_sgd"] = NoisySGDOf(scenario, sigma, batch_size)
    return found


def compare(scenarios: Mapping[str, Any], **settings: Any) -> xr.Dataset:
    """Runs of several dynamics with equal settings and noise, in one dataset with a dimension `member`.

    Each runs by its own method: "baoab" where it is kinetic, "sgd" where it samples, "proximal" where a regulariser has
    kinks, "euler" else. Positions only are kept of kinetic states; a variable that some members lack is NaN there. The
    attributes `methods` and `reactions` say how each member ran.

    Args:
        scenarios: name -> scenario, for instance from `members`; states of one dimension (positions, if kinetic).
        settings: of `simulate`, without store and method.

    Raises:
        TypeError, ValueError: as `simulate`; no scenario; `store` or `method`, which belong to one run.

    """
    if not isinstance(scenarios, Mapping) or not scenarios:
        raise ValueError(
            "compare: no scenario; expected name -> scenario, at least one, for instance mfsde.members(scenario)."
        )
    taken = sorted({"store", "method"} & set(settings))
    if taken:
        raise TypeError(f"compare: {', '.join(taken)} belongs to one run; leave it out, or simulate one by one.")
    runs, reactions = [], {}
    for name, scenario in scenarios.items():
        run = _positions(scenario, simulate(scenario, method=suited(scenario), **settings))
        if "reaction" in run.attrs:
            reactions[name] = run.attrs["reaction"]
        run = run.drop_attrs(deep=False).assign_attrs({k: v for k, v in run.attrs.items() if k not in OF_ONE})
        runs.append(run.drop_vars([name for name in run.coords if name not in run.dims and name not in KEPT]))
    names = np.array(list(scenarios), dtype=object)
    table: xr.Dataset = xr.concat(
        runs, dim=xr.DataArray(names, dims="member", name="member", attrs={"long_name": "dynamics"}),
        join="exact", coords="minimal", compat="equals", combine_attrs="drop_conflicts", data_vars="all",
    )  # fmt: skip
    methods = {name: suited(scenario) for name, scenario in scenarios.items()}
    return table.assign_attrs(methods=methods, reactions=reactions)


def _noise_of(scenario: Any, sigma: float | None) -> float:
    """The σ that was given, or the scenario's own."""
    if sigma is None:
        sigma = getattr(scenario, "sigma", None)
    if sigma is None:
        raise TypeError(
            f"{scenario_name(scenario)} has no field sigma; say which noise its Langevin dynamics has: sigma=..."
        )
    return float(sigma)


def _speaking_of_positions(scenario: Any) -> list[str]:
    """What a scenario has that a state of positions and velocities cannot take over."""
    found = [name for name in ("project", "period") if hasattr(scenario, name)]
    return found + ["regulariser"] * (getattr(scenario, "regulariser", None) is not None)


def _positions(scenario: Any, run: xr.Dataset) -> xr.Dataset:
    """A run without what not every member has: velocities, ancestors, counts of events."""
    run = run.drop_vars([name for name in ("parent", "events") if name in run])
    if not hasattr(scenario, "force"):
        return run
    half = slice(0, run.sizes["component"] // 2)
    return run.isel({dim: half for dim in ("component", "component_2") if dim in run.dims})


def _name(observable: Any) -> str:
    return observable if isinstance(observable, str) else str(observable.name)
