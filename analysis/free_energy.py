"""The free energy V(m) = F(m) + T KL(m | e^{-U}) and its dissipation, of laws and of runs.

Conventions: dX = -(D_mF + (σ²/2) ∇U) dt + σ dW, T = σ²/2. A scenario is anything with `energy`, `sigma` and, where the
reference is not Lebesgue's, `confinement` = U; an unnormalised U shifts V by a constant. A law enters by quadrature,
exact for Gaussians and polynomials; a run enters particle by particle, and what needs the density of the particles
takes it from the Gaussian of their moments or from a given law.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from mfsde import EmpiricalMeasure
from mfsde.limit.free_energy import Density, dissipation_of, force, of_law, score_of, value_of, with_density
from mfsde.measure import Law
from mfsde.model import temperature
from mfsde.observables import gaussian_entropy

from . import particles
from .labels import apply

Flow = Callable[[float], Law]
Function = Callable[[Tensor], Tensor]

OF_ONE_RUN = ("time", "replica", "particle", "component")


def free_energy(scenario: Any, m: Any, *, law: Law | Flow | None = None) -> Any:
    """V(m) = F(m) + T (∫ U dm + ∫ m log m), T = σ²/2.

    Args:
        scenario: with energy, sigma and confinement.
        m: a Law with log_prob, or a run (or its position).
        law: for particles, the law (or t ↦ law) whose density stands for theirs; None takes the Gaussian of their
            moments, whose entropy is the largest: for particles that are not Gaussian that is a lower bound of V.

    Returns:
        A number for a law, DataArray over the remaining dimensions (time, replica) for a run.

    Raises:
        TypeError: the scenario has no energy or σ, the law no log_prob.
        ValueError: particles that are not finite, weighted, without density, or on a torus without `law`.

    """
    if isinstance(m, Law):
        return float(value_of(scenario, of_law(m)))
    return along(m, law, lambda density: value_of(scenario, density), "free_energy", "free energy V")


def dissipation(scenario: Any, m: Any, *, law: Law | Flow | None = None) -> Any:
    """∫ |D_mF + T ∇log m + T ∇U|² dm, which is -dV/dt along the flow and vanishes at m* alone.

    Arguments, return and errors as for `free_energy`; on particles it is biased upwards by O(1/N).
    """
    if isinstance(m, Law):
        return float(dissipation_of(scenario, of_law(m)))
    return along(m, law, lambda density: dissipation_of(scenario, density), "dissipation", "free-energy dissipation")


def generators(scenario: Any, functions: list[Function]) -> Callable[[Density], Tensor]:
    """For each f, ∫ (b·∇f + T Δf) dm and ∫ (b·∇²f b + 2T b·∇Δf + T² Δ²f) dm, b = -(D_mF + T ∇U).    (..., 2 len).

    The second is twice what Euler's step adds to E f at order dt².
    """
    t = temperature(scenario)

    def terms(m: Density) -> Tensor:
        # The force is the expensive part: once for all test functions.
        b = -force(scenario, m.measure)
        return torch.stack([value for f in functions for value in (_first(f, b, t, m), _second(f, b, t, m))], dim=-1)

    return terms


def _first(f: Function, b: Tensor, t: float, m: Density) -> Tensor:
    slope, laplacian = _gradient_and_laplacian(f, m.measure.points)
    return m.measure.integrate(lambda x: (b * slope).sum(-1) + t * laplacian)


def _second(f: Function, b: Tensor, t: float, m: Density) -> Tensor:
    x = m.measure.points
    curved = (_gradient(lambda y: (_gradient(f, y) * b).sum(-1), x).detach() * b).sum(-1)
    slope, twice = _gradient_and_laplacian(lambda y: _laplacian(f, y), x)
    return m.measure.integrate(lambda _: curved + 2 * t * (b * slope).sum(-1) + t**2 * twice)


def _gradient(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """∇f, with its graph."""
    with torch.enable_grad():
        at = x if x.requires_grad else x.detach().requires_grad_()
        value = f(at)
        if value.shape != x.shape[:-1]:
            raise ValueError(
                f"a test function returned shape {tuple(value.shape)} for points {tuple(x.shape)}; expected "
                f"{tuple(x.shape[:-1])}: sum over the last axis."
            )
        return _slope(value.sum(), at)


def _laplacian(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Δf, with its graph."""
    with torch.enable_grad():
        at = x if x.requires_grad else x.detach().requires_grad_()
        slope = _gradient(f, at)
        terms = [_slope(slope[..., k].sum(), at)[..., k] for k in range(x.shape[-1])]
        return torch.stack(terms).sum(0)


def _gradient_and_laplacian(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    return _gradient(f, x).detach(), _laplacian(f, x).detach()


def _slope(value: Tensor, at: Tensor) -> Tensor:
    """∂value/∂at with its graph, zero where there is none: polynomials run out of derivatives."""
    if not value.requires_grad:
        return torch.zeros_like(at)
    (found,) = torch.autograd.grad(value, [at], create_graph=True, allow_unused=True, materialize_grads=True)
    return found


# A measure with its density


def of_particles(x: Tensor, period: Any, law: Law | None = None, plug_in: bool = True) -> Density:
    """By the particles, (..., N, d), with the density of `law` or of the Gaussian of their moments."""
    mu = EmpiricalMeasure(x, period=period)
    if law is not None:
        return Density(mu, -mu.integrate(with_density(law).log_prob), score_of(law, x))
    if not plug_in:
        return Density(mu, x.new_zeros(()), x.new_zeros(()))
    if period is not None:
        raise ValueError("particles on a torus have no Gaussian plug-in; pass law=, whose density is theirs.")
    n = mu.n_particles
    entropy = gaussian_entropy(mu)
    if not bool(torch.isfinite(entropy).all()):
        raise ValueError(
            "the particles lie in a plane or at a point somewhere, where no density exists and the free energy is "
            "infinite; leave out such times (a start from a Dirac: begin later)."
        )
    sample = mu.covariance() * (n / (n - 1))
    return Density(mu, entropy, -(x - mu.mean()) @ torch.linalg.inv(sample))


def variance(mu: EmpiricalMeasure, values: Tensor) -> float:
    """Variance of values on the points of a measure."""
    mean = (mu.weights * values).sum()
    return float((mu.weights * (values - mean).square()).sum())


# Runs


def positions(run: xr.Dataset | xr.DataArray) -> xr.DataArray:
    """Positions of a run of equal masses."""
    if particles.weights(run) is not None:
        raise ValueError("the particles have unequal masses, for which no replica errors are known; run equal ones.")
    return particles.positions(run)


def of_one_run(run: xr.Dataset | xr.DataArray, name: str) -> xr.DataArray:
    """Positions of a run that is not swept over parameters: a theorem is held against one scenario.

    Raises:
        ValueError: dimensions besides time, replica, particle and component; as `positions`.

    """
    position = positions(run)
    swept = [str(dim) for dim in position.dims if dim not in OF_ONE_RUN]
    if swept:
        raise ValueError(
            f"{name}: the particles have the dimensions {', '.join(swept)} besides {', '.join(OF_ONE_RUN)}, and one "
            f"scenario does not describe them all. Select one run: .isel({', '.join(f'{dim}=0' for dim in swept)})."
        )
    return position


def time_step(position: xr.DataArray, name: str) -> float:
    """The step dt of a run, without which Euler's error is unknown.

    Raises:
        ValueError: no scalar coordinate dt, or one that is not positive.

    """
    if "dt" not in position.coords or position["dt"].ndim or not 0 < float(position["dt"]) < math.inf:
        raise ValueError(
            f"{name}: the particles carry no scalar, positive coordinate dt, so Euler's error is unknown; pass the run."
        )
    return float(position["dt"])


def periods(position: xr.DataArray) -> list[float | None] | None:
    """The torus as measures take it: None on a line."""
    lengths = particles.period(position)
    return None if lengths is None else [None if math.isinf(length) else length for length in lengths]


def along(
    run: xr.Dataset | xr.DataArray,
    law: Law | Flow | None,
    function: Callable[[Density], Tensor],
    name: str,
    long_name: str,
    n_terms: int = 0,
) -> xr.DataArray:
    """A function of the measure, frame by frame, over all leading dimensions of the position.

    With n_terms > 0 the function returns (..., n_terms), a dimension `term`, and needs no density.
    """
    position = positions(run).transpose(..., "particle", "component")
    period = periods(position)
    if callable(law) and "time" not in position.coords:
        raise ValueError("a law that depends on time needs particles with a `time` coordinate.")
    time = position["time"].reset_coords(drop=True) if "time" in position.coords else xr.DataArray(0.0)

    def block(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        particles.check_finite(x, name)
        points = torch.from_numpy(np.array(x, dtype=np.float64))
        if not callable(law):
            return _filled(function(of_particles(points, period, law, not n_terms)), x)
        out = np.empty(x.shape[:-2])
        times = np.broadcast_to(t, x.shape[:-2])
        for value in np.unique(times):
            at = times == value
            out[at] = function(of_particles(points[torch.from_numpy(at)], period, law(float(value)))).numpy()
        return out

    found: xr.DataArray = apply(
        block,
        position,
        time,
        input_core_dims=[["particle", "component"], []],
        output_core_dims=[["term"] if n_terms else []],
        output_sizes={"term": n_terms} if n_terms else {},
        output_dtypes=[float],
    )
    estimator = "density from the given law" if law is not None else "exact" if n_terms else "Gaussian plug-in density"
    found = found.rename(name)
    found.attrs = {"long_name": long_name, "units": "1", "estimator": estimator}
    return found


def _filled(values: Tensor, x: np.ndarray) -> np.ndarray:
    lead = x.shape[:-2]
    return np.broadcast_to(values.detach().numpy(), lead + values.shape[len(lead) :]).copy()
