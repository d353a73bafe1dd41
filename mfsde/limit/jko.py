"""Minimising movements: the implicit Euler scheme of a gradient flow in the space of measures.

    m₊ = argmin F(m) + T KL(m | e^{-U}) + W₂²(m, m_k)/(2τ),      T = σ²/2,

in one dimension over quantile functions, where W₂ is an L² distance; in any dimension over the positions of particles.
`geometry="kl"` puts KL(m | m_k)/(ατ) in the place of the transport cost (mirror.py), and "wfr" takes a step of each, a
splitting of the Wasserstein-Fisher-Rao flow. All of them are of first order in τ.

Source: Jordan, Kinderlehrer, Otto, The variational formulation of the Fokker-Planck equation (1998); Montanari, Mean
field descriptions of two-layer networks, (7.2)-(7.5); Rotskoff, (16)-(17) and (35)-(36). The flow is that of the energy
as it stands: where an equation is written as the flow of R/2, the energy to pass is R/2, and R runs twice as fast.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
import xarray as xr

from ..energy import Energy, potential
from ..measure import EmpiricalMeasure, Law
from ..model import confinement, energy_of, on_device, scenario_name, temperature
from ..noise import Noise, Stream
from ..progress import Progress
from ..store import Coordinate
from . import results
from .cloud import Cloud, Coupling, assignment, blob
from .coefficients import SAME, Coefficients, initial_law
from .domain import domain_of, first_box, widened
from .grid import Array, Grid
from .mirror import Nodes, Reaction, measure
from .quantile_map import Entropy, Levels
from .quantiles import Quantiles, quantiles_of

PARTS = {"wasserstein": ("transport",), "kl": ("react",), "wfr": ("transport", "react")}

REACH = 8.0  # quantiles are followed to Φ(±8): what lies beyond has mass 1e-15
LEVELS = 257  # default number of quantiles
FEWEST = 17

NOTHING = 1e-300  # mass of particles that have none

NODES = {1: 513, 2: 129}  # on each axis, where the grid is chosen here
DEPTH = 28.0  # below the maximum of a log density: where a chosen grid may end
LEAKING = 9.0  # the same for a given grid, whose end then carries 1e-4 of the mass
DOUBLINGS = 40


def jko(
    scenario: Any,
    tau: float,
    n_steps: int,
    *,
    geometry: str = "wasserstein",
    alpha: float | None = None,
    start: Law | EmpiricalMeasure | None = None,
    n_nodes: int | None = None,
    grid: Any = None,
    n_particles: int | None = None,
    seed: int | None = None,
    bandwidth: float | None = None,
    coupling: Coupling | None = None,
    store: results.Path_ | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> xr.Dataset:
    """Proximal steps of F + T KL(· | e^{-U}), the free energy of a scenario, from its initial law.

    The law is held in one of three forms. *Quantiles*, in one dimension, for "wasserstein" and "wfr": exact up to the
    square of the spacing of the levels, and for Gaussians up to rounding. *Nodes* of a grid, in one or two dimensions,
    for "kl". *Particles*, in any dimension and geometry, where `n_particles` is given or the start is a measure:
    positions move at fixed masses, masses change at fixed positions. With T = 0 they are exact; with T > 0 the entropy
    is that of the smoothed measure, ∫ log(K_h * m) dm, an approximation of declared bandwidth under which they repel.

    Where F is not convex, a step ends in the minimum that descent from m_k leads to.

    Args:
        scenario: with `energy` and a constant `sigma`; U is its `confinement`, zero without one.
        tau: τ, the step.
        n_steps: number of steps; times are 0, τ, ..., n_steps·τ.
        geometry: "wasserstein", "kl", or "wfr".
        alpha: α, the rate of the "kl" part (1 where it is left out).
        start: a law or a measure; the scenario's `initial()` where it is left out.
        n_nodes: number of quantiles (257), or of nodes on each axis of a chosen grid (513; 129 on a plane).
        grid: nodes (G,), or a pair of them: where the density is held ("kl"), or also given (quantiles).
        n_particles: N, drawn from the start as `simulate` draws its first replica.
        seed: of that draw.
        bandwidth: h, standard deviation of the Gaussian kernel in the entropy of particles.
        coupling: (x (N, d), y (N, d)) -> (i, j, masses), the optimal pairs of two samples of equal masses, such as
            `mfsde.analysis.wasserstein.coupling`, which uses POT. The default is `assignment`: the engine imports
            no POT, and for equal masses the two are equally exact.
        store: a folder to write to, opened again by `mfsde.open_run`.
        overwrite: replace an existing store.
        progress: show how far it is.

    Returns:
        Dataset over `time`: `quantile(level)` with coordinates level = Φ(z) and z, `density(x)`, or `position(replica,
        particle, component)` with `weight` where masses differ; `mean`, `covariance`; `energy` = F, `free_energy` = V;
        `step` = W₂(m_k, m_{k+1}), `divergence` = KL(m_{k+1} | m_k), `residual`, how far the step's optimality condition
        is from holding (in L²(m)). U may be unnormalised: V then carries -T log ∫ e^{-U}, and that logarithm stands in
        the settings as `log_reference_mass` (None where it is infinite, or d > 2).

    Raises:
        TypeError: no energy, no constant sigma, an argument of another form.
        ValueError: bad input; a law without density where one is needed; σ = 0 for quantiles; a torus, walls or
            common noise; a drift that is not that of the gradient flow; mass that leaves the grid.
        RuntimeError: a minimisation that did not converge: τ is too large for an F that is not convex.
        FileExistsError: the store exists.

    """
    tau, n_steps = _checked_steps(tau, n_steps)
    rate = _rate(geometry, alpha, tau)
    moved = on_device(scenario, torch.device("cpu"), torch.float64)
    law = initial_law(moved, start)
    options = {"n_nodes": n_nodes, "grid": grid, "n_particles": n_particles, "seed": seed, "bandwidth": bandwidth,
               "coupling": coupling}  # fmt: skip
    problem = Problem(moved, law, tau, rate, geometry, {k: v for k, v in options.items() if v is not None})
    with Progress(f"jko of {scenario_name(scenario)}", 0, n_steps, progress) as bar:
        form, frames = problem.solved(n_steps, bar)
    settings = {
        "method": "jko", "geometry": geometry, "tau": tau, "n_steps": n_steps, "alpha": rate / tau if rate else None,
        **form.settings, "log_reference_mass": log_reference_mass(moved, law) if problem.temperature else None,
    }  # fmt: skip
    times = tau * np.arange(n_steps + 1)
    return results.dataset(scenario, times, _series(form, frames), form.coords, settings, store, overwrite)


def gaussian_step(
    mean: Any, cov: Any, tau: float, stiffness: Any, temperature: float, centre: Any = 0.0
) -> tuple[Array, Array]:
    """The minimiser of ∫ ½(x-c)ᵀK(x-c) dm + T ∫ m log m + W₂²(m, N(mean, cov))/(2τ): a Gaussian.

    m₊ = (1 + τK)⁻¹ (mean + τKc), S₊ = (S + √(S² + 4τT(1 + τK))) (2(1 + τK))⁻¹, S = √cov, for K that commutes with cov.

    Args:
        mean: (d,), or a number.
        cov: (d, d), or a number v for v·I.
        tau: τ.
        stiffness: K, (d, d), or a number k for k·I; the sum of those of F and T·U.
        temperature: T >= 0.
        centre: c, (d,) or a number.

    Returns:
        m₊ (d,) and S₊² (d, d).

    Raises:
        ValueError: K and cov do not commute, 1 + τK is not positive, T < 0.

    Source: Montanari, (7.5), for this energy; Jordan, Kinderlehrer, Otto (1998).

    """
    m = np.atleast_1d(np.asarray(mean, dtype=np.float64))
    eye = np.eye(len(m))
    c, k = (np.asarray(z, dtype=np.float64) for z in (cov, stiffness))
    c, k = (z * eye if z.ndim == 0 else z for z in (c, k))
    if np.abs(c @ k - k @ c).max() > 1e-10 * np.abs(c).max() * np.abs(k).max():
        raise ValueError(
            "gaussian_step: the stiffness does not commute with cov, and the step has no closed form; use a stiffness "
            "with the same eigenvectors, or jko on particles."
        )
    shift = eye + tau * k
    if not tau > 0 or np.linalg.eigvalsh(shift).min() <= 0 or temperature < 0:
        raise ValueError(
            f"gaussian_step: tau = {tau!r}, temperature = {temperature!r}; expected tau > 0, temperature >= 0 and "
            "1 + tau*stiffness positive definite. A smaller tau makes the problem convex."
        )
    s = _root(c)
    wide = s + _root(c + 4 * tau * temperature * shift)
    deviation = np.linalg.solve(2 * shift, wide)
    return np.linalg.solve(shift, m + tau * k @ (centre * np.ones(len(m)))), deviation @ deviation.T


def log_reference_mass(scenario: Any, law: Law | EmpiricalMeasure) -> float | None:
    """The logarithm of ∫ e^{-U}, by the trapezoidal rule in d = 1, 2; None where U does not confine, or d > 2."""
    d = law.dim
    if not hasattr(scenario, "confinement") or d not in NODES:
        return None
    domain = domain_of(scenario, law)
    low, high = first_box(law, domain)
    for _ in range(DOUBLINGS):
        grid = Grid.box(list(low), list(high), 4 * NODES[d] - 3, domain.period)
        height = -_confinement(scenario, grid.points).reshape(grid.shape)
        out = domain.high_ends(height, grid, DEPTH)
        if not out:
            return float(np.logaddexp.reduce((height + np.log(grid.widths)).ravel()))
        low, high = widened(low, high, out, domain)
    return None


Frames = list[dict[str, Any]]


class Form(Protocol):
    """A law as it is followed: its state, the steps `transport` and `react` that it can take, and what is stored."""

    lead: ClassVar[tuple[str, ...]]

    @property
    def first(self) -> Any:
        """The state to start from."""

    @property
    def settings(self) -> dict[str, Any]:
        """What is recorded of the form."""

    @property
    def coords(self) -> dict[str, Coordinate]:
        """Coordinates of the dataset."""

    @property
    def described(self) -> dict[str, tuple[tuple[str, ...], str]]:
        """Dimensions and long names of what a frame holds besides energies."""

    def frame(self, state: Any) -> dict[str, Any]:
        """What is stored at a time."""

    def cloud(self, state: Any) -> tuple[Array, Array]:
        """Points (n, d) and their masses (n,)."""


# Which arguments speak of which form.
OPTIONS = {
    "particles": {"n_particles", "seed", "bandwidth", "coupling"},
    "nodes": {"n_nodes", "grid"},
    "quantiles": {"n_nodes", "grid"},
}


@dataclass(frozen=True)
class Problem:
    """What is minimised, from where and how, checked."""

    scenario: Any
    law: Law | EmpiricalMeasure
    tau: float
    rate: float
    geometry: str
    options: Mapping[str, Any]

    def __post_init__(self) -> None:
        name, d = self.name, self.law.dim
        energy_of(self.scenario)
        unknown = self.options.keys() - OPTIONS[self.form]
        if unknown:
            raise TypeError(
                f"jko: {', '.join(sorted(unknown))} does not apply where the law is held as {self.form}; that form "
                f"takes {', '.join(sorted(OPTIONS[self.form]))}. Particles are asked for by n_particles=."
            )
        if hasattr(self.scenario, "common_diffusion"):
            raise ValueError(
                f"{name} has common noise: its law is random and minimises nothing. Drop the common noise."
            )
        if getattr(self.scenario, "period", None) is not None:
            raise ValueError(
                f"{name} lives on a torus, where these steps are not defined; follow it with mfsde.limit.fokker_planck."
            )
        if self.geometry != "kl" and hasattr(self.scenario, "project"):
            raise ValueError(
                f"{name}.project keeps particles in a domain; a transport step knows no walls. Follow it with "
                'mfsde.limit.fokker_planck, or take geometry="kl", which moves nothing.'
            )
        if self.form == "quantiles" and d != 1:
            raise ValueError(
                f"{name} lives in dimension {d}, where laws have no quantile map; pass n_particles= (and seed=) to "
                "minimise over particles."
            )
        if self.form == "nodes" and d not in NODES:
            raise ValueError(
                f"{name} lives in dimension {d}; grids have d = 1 or 2. Pass n_particles= (and seed=) to hold the law "
                "as masses of particles."
            )
        if self.form == "quantiles" and self.temperature == 0:
            raise ValueError(
                f"{name} has sigma = 0: without entropy nothing keeps a quantile map increasing. Pass n_particles= "
                "(and seed=): particles need no entropy."
            )

    @property
    def name(self) -> str:
        """The scenario's name."""
        return scenario_name(self.scenario)

    @property
    def form(self) -> str:
        """How the law is held."""
        if "n_particles" in self.options or isinstance(self.law, EmpiricalMeasure):
            return "particles"
        return "nodes" if self.geometry == "kl" else "quantiles"

    @cached_property
    def temperature(self) -> float:
        """T = σ²/2, here zero as well."""
        sigma = getattr(self.scenario, "sigma", None)
        return 0.0 if sigma is not None and float(sigma) == 0 else temperature(self.scenario)

    def solved(self, n_steps: int, bar: Progress) -> tuple[Form, Frames]:
        """The law after 0, 1, ..., n_steps steps."""
        if self.form == "nodes":
            return self._on_nodes(n_steps, bar)
        form: Form = self._cloud() if self.form == "particles" else self._quantiles()
        return form, self._followed(form, n_steps, bar)

    def _followed(self, form: Form, n_steps: int, bar: Progress) -> Frames:
        parts = [getattr(form, part) for part in PARTS[self.geometry]]
        names = {"transport": "step", "react": "divergence"}
        state = form.first
        if self.geometry != "kl":
            _check_flow(self.scenario, *form.cloud(state))
        frames = [_frame(form, state, dict.fromkeys((names[p.__name__] for p in parts), 0.0), math.nan)]
        for k in range(n_steps):
            moved, residuals = {}, []
            for part in parts:
                state, moved[names[part.__name__]], residual = part(state)
                residuals.append(residual)
            frames.append(_frame(form, state, moved, max(residuals)))
            bar.at(k + 1)
        return frames

    def _internal(self) -> Energy:
        """F + T ∫ U dm."""
        energy = energy_of(self.scenario)
        if self.temperature == 0 or not hasattr(self.scenario, "confinement"):
            return energy
        return energy + self.temperature * potential(self.scenario.confinement)

    def _quantiles(self) -> Quantiles:
        assert isinstance(self.law, Law)
        n = _checked_count("n_nodes", self.options.get("n_nodes", LEVELS), FEWEST)
        levels = Levels(np.linspace(-REACH, REACH, n))
        return Quantiles(
            energy=energy_of(self.scenario),
            internal=self._internal(),
            entropy=Entropy(self.temperature, levels),
            confinement=lambda x: _confinement(self.scenario, x),
            tau=self.tau,
            rate=self.rate,
            first=quantiles_of(self.law, levels, self.name),
            grid=Grid.of(self.options["grid"], 1) if "grid" in self.options else None,
        )

    def _cloud(self) -> Cloud:
        x, mass = _particles_of(self.law, self.options.get("n_particles"), self.options.get("seed"))
        h, total = self.options.get("bandwidth"), self._internal()
        if self.temperature > 0:
            total = total + self.temperature * blob(_checked_bandwidth(h, x))
        elif h is not None:
            raise ValueError(f"bandwidth = {h!r} with sigma = 0: there is no entropy to smooth; leave it out.")
        return Cloud(
            energy=energy_of(self.scenario),
            total=total,
            tau=self.tau,
            rate=self.rate,
            first=(x, np.log(np.maximum(mass, NOTHING))),
            is_weighted=self.geometry != "wasserstein" or bool(np.ptp(mass) > 0),
            coupling=self.options.get("coupling", assignment),
            bandwidth=h,
            seed=self.options.get("seed"),
        )

    def _on_nodes(self, n_steps: int, bar: Progress) -> tuple[Nodes, Frames]:
        """On the given grid, or on one that is widened until the law stays inside up to the last step."""
        assert isinstance(self.law, Law)
        domain = domain_of(self.scenario, self.law)
        given = Grid.given(self.options.get("grid"), self.options.get("n_nodes"), self.law.dim)
        chosen = given is None
        if given is not None:
            domain.check(given, self.name)
        n = _checked_count("n_nodes", self.options.get("n_nodes", NODES[self.law.dim]), FEWEST)
        low, high = first_box(self.law, domain)
        for _ in range(DOUBLINGS if chosen else 1):
            grid = given or Grid.box(list(low), list(high), n)
            form = self._nodes(grid)
            frames = self._followed(form, n_steps, bar)
            logs = [np.log(np.maximum(frame["density"], 1e-300)) for frame in frames]
            out = {end for log in logs for end in domain.high_ends(log, grid, DEPTH if chosen else LEAKING)}
            if not out:
                _check_resolved(frames, grid)
                return form, frames
            low, high = widened(low, high, sorted(out), domain)
        raise ValueError(
            f"{self.name}: the law reaches the ends of "
            + " × ".join(f"[{a.nodes[0]:g}, {a.nodes[-1]:g}]" for a in grid.axes)
            + (": nothing confines it; take fewer steps." if chosen else "; widen the grid, or leave it out.")
        )

    def _nodes(self, grid: Grid) -> Nodes:
        if not hasattr(self.law, "log_prob"):
            raise ValueError(
                f"{self.name} starts from a {type(self.law).__name__} without a density, which a grid cannot hold; "
                "start from a law with one, start=mfsde.Gaussian(...), or pass n_particles=."
            )
        volume = np.log(grid.widths).ravel()
        log_mass = self.law.log_prob(torch.from_numpy(grid.points)).numpy() + volume
        log_reference = volume - _confinement(self.scenario, grid.points) if self.temperature else volume
        origin = log_mass - np.logaddexp.reduce(log_mass)
        energy = energy_of(self.scenario)
        return Nodes(grid, Reaction(energy, grid.points, self.temperature, log_reference, self.rate, origin))


def _check_resolved(frames: Frames, grid: Grid) -> None:
    """Refuses nodes farther apart than the law is wide, where sums over them are no integrals."""
    for frame in frames:
        for k, axis in enumerate(grid.axes):
            wide = math.sqrt(float(frame["covariance"][k, k]))
            if wide < float(axis.gaps.max()):
                raise ValueError(
                    f"grid: the law narrows to a deviation of {wide:.3g}, with nodes {axis.gaps.max():.3g} apart. Take "
                    "more nodes (n_nodes= or grid=) or fewer steps; where F is not convex, a smaller tau."
                )


def _frame(form: Form, state: Any, moved: dict[str, float], residual: float) -> dict[str, Any]:
    points, mass = form.cloud(state)
    moments = {name: values[0] for name, (_, values, _, _) in results.moments(points[None], mass[None]).items()}
    return {**form.frame(state), **moments, **moved, "residual": residual}


LONG_NAMES = {
    "mean": (("component",), "mean of the law"),
    "covariance": (("component", "component_2"), "covariance of the law"),
    "energy": ((), "energy F(m)"),
    "free_energy": ((), "free energy F + (σ²/2) KL(m | e^-U)"),
    "step": ((), "W₂ distance moved in a step"),
    "divergence": ((), "KL(m₊ | m) of a step"),
    "residual": ((), "L² norm of the gradient where a step's minimisation ended"),
}


def _series(form: Form, frames: Frames) -> results.Series:
    known = {**LONG_NAMES, **form.described}
    found = {}
    for name in frames[0]:
        dims, long_name = known[name]
        values = np.array([frame[name] for frame in frames], dtype=np.float64)
        if form.lead:
            values = values[:, None]
        found[name] = ((*form.lead, *dims), values, long_name, "1")
    return found


# Input


def _checked_steps(tau: Any, n_steps: Any) -> tuple[float, int]:
    if not _is_positive(tau):
        raise ValueError(f"tau = {tau!r}; expected a positive number, the step of the scheme in units of time.")
    return float(tau), _checked_count("n_steps", n_steps, 1)


def _is_positive(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 < float(value) < math.inf


def _checked_count(name: str, value: Any, least: int) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} = {value!r}; expected a whole number.") from None
    if count < least:
        raise ValueError(f"{name} = {count}; expected at least {least}.")
    return count


def _rate(geometry: str, alpha: Any, tau: float) -> float:
    """The step ατ of the part that creates mass, 0 where there is none."""
    if geometry not in PARTS:
        raise ValueError(f"geometry = {geometry!r}; expected one of {', '.join(map(repr, PARTS))}.")
    if geometry == "wasserstein":
        if alpha is not None:
            raise TypeError('alpha is the rate of the "kl" part, which geometry="wasserstein" has not; leave it out.')
        return 0.0
    rate = 1.0 if alpha is None else alpha
    if not _is_positive(rate):
        raise ValueError(f'alpha = {alpha!r}; expected a positive number. Without it, geometry="wasserstein".')
    return float(rate) * tau


def _particles_of(law: Law | EmpiricalMeasure, n: Any, seed: int | None) -> tuple[Array, Array]:
    """Positions (N, d) and masses (N,): the measure's, or drawn from the law as `simulate` draws them."""
    if isinstance(law, EmpiricalMeasure):
        if seed is not None or (n is not None and n != law.n_particles):
            raise ValueError(
                f"the start is a measure of {law.n_particles} particles: n_particles = {n!r} and seed = {seed!r} have "
                "nothing to draw. Leave them out, or start from a law."
            )
        mass = law.weights.double().numpy()
        return law.points.detach().double().numpy().copy(), mass / mass.sum()
    n = _checked_count("n_particles", n, 1)
    if seed is None:
        raise ValueError(
            "n_particles without seed: the particles are drawn from the start; pass seed=, as for simulate."
        )
    z = Noise(seed).normals(0, (1, n, max(1, law.n_variates)), stream=Stream.INITIAL, dtype=torch.float64)
    return law.from_variates(z[0, :, : law.n_variates]).numpy().copy(), np.full(n, 1 / n)


def _checked_bandwidth(h: Any, x: Array) -> float:
    n, d = x.shape
    if not _is_positive(h):
        wide = math.sqrt(float(x.var(axis=0).mean())) * n ** (-1 / (d + 4))
        raise ValueError(
            f"bandwidth = {h!r}: for sigma > 0 the entropy of particles is that of a smoothed law, and needs the "
            f"positive deviation of its kernel. Scott's rule gives {wide:.2g} here."
        )
    return float(h)


def _check_flow(scenario: Any, points: Array, mass: Array) -> None:
    """Refuses a scenario whose particles do not follow -(D_mF + T ∇U) with the constant σ: the steps would.

    Source: Hu, Ren, Siska, Szpruch (2021), (1).
    """
    if not hasattr(scenario, "drift"):
        return
    gap = Coefficients(scenario, points, mass).detour(points, measure(points, mass))
    if not gap <= SAME:
        raise ValueError(
            f"{scenario_name(scenario)} is no gradient flow of its energy: drift and -(D_mF + (σ²/2) ∇U) differ by "
            f"{gap:.3g} of the drift at the start, or diffusion is not the constant sigma. jko would follow another "
            "equation than the particles; mfsde.limit.fokker_planck follows this one."
        )


def _confinement(scenario: Any, x: Array) -> Array:
    """U at points (n, d), (n,)."""
    with torch.no_grad():
        values: Array = confinement(scenario, torch.from_numpy(x)).numpy()
    return values


def _root(matrix: Array) -> Array:
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    root: Array = vectors * np.sqrt(np.maximum(values, 0.0)) @ vectors.T
    return root
