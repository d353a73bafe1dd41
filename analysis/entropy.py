"""Entropies of particle systems in nats: differential, relative to a density, and Fisher information.

    H(m) = -∫ log m dm,   KL(m | e^f/Z) = -H(m) - ∫ f dm + log Z,   I(m | π) = ∫ |∇log m - ∇log π|² dm

Three public functions take samples (arrays (N,), (N, d) or (..., N, d), numpy or torch, an `EmpiricalMeasure`) and runs
(a Dataset or its `position`). The estimates of H are those of `neighbours`, score matching has its own file, and
`normalise` finds log Z: a density is normalised or the call raises.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr

from mfsde import EmpiricalMeasure
from mfsde.observables import gaussian_entropy
from mfsde.torus import period_lengths

from . import labels, neighbours, particles, replicas, score_matching
from .laws import at_time, times_of
from .log_density import LogDensity, depends_on_time, score_function
from .neighbours import FEWEST_SPACINGS, NEIGHBOURS, fewest, gaussian_bias
from .normalisation import log_constant, normalise
from .particles import Lengths

__all__ = ["NEIGHBOURS", "differential", "fewest", "fisher", "gaussian_bias", "normalise", "relative"]

STARTS, FRAMES = 20_000, 100  # particles, of at most so many frames, among which modes are looked for
MISSED = 0.5  # nats above the highest mode that show another

Array = np.ndarray
Statistic = Callable[[Array], Array]
# A statistic of samples (..., N, d) -> (...), the same of all replicas' particles with its error
# (..., R, N, d) -> (...), (...), and attributes.
Plan = tuple[Statistic, Callable[[Array], tuple[Array, Array]], dict[str, Any]]


def differential(
    x: Any,
    *,
    estimator: str = "auto",
    pooled: bool = False,
    period: Any = None,
    beyond_range: bool = False,
) -> Any:
    """H(m) = -∫ log m dm.

    Estimators: "spacing" (d = 1), overlapping m-spacings with the exact expectation of log-spacings of a uniform law,
    windows shortened at the ends so that no particle is left out; "knn", Kozachenko and Leonenko with k = 4 on
    rescaled particles, without its bias at Gaussian laws, refused where N/2 particles give another number; "gaussian",
    the plug-in without the bias of its log-determinant, an upper bound of H. "auto" is "spacing" on a line and "knn"
    elsewhere; it never falls back on the Gaussian.

    Args:
        x: a sample (N,), (N, d), (..., N, d), a measure of equal masses, or a run.
        estimator: "auto", "spacing", "knn" or "gaussian".
        pooled: of a run: the particles of all replicas as one sample, with the jackknife error over replicas as
            coordinate `stderr`.
        period: of arrays: the torus they live on; a run and a measure know theirs.
        beyond_range: compute the kNN estimate outside its range of d and N, and without the check of N against N/2.

    Returns:
        float for one sample, (...) for many; for a run a DataArray over its remaining dimensions.

    Raises:
        ValueError: not finite, copies of particles, weighted particles, d or N outside the estimator's range, fewer
            than two replicas where they are pooled.

    Source: Kozachenko, Leonenko (1987); Vasicek (1976); Beirlant, Dudewicz, Györfi, van der Meulen (1997).

    """

    def plan(n: int, d: int, lengths: Lengths) -> Plan:
        terms, attrs = _estimator(estimator, n, d, lengths, beyond_range)
        return _mean_plan(terms, {"long_name": "differential entropy", "units": "nat", **attrs})

    return _apply(x, plan, "differential_entropy", pooled, period)


def relative(
    x: Any,
    log_density: Any,
    log_z: float | None = None,
    *,
    estimator: str = "auto",
    pooled: bool = False,
    period: Any = None,
    beyond_range: bool = False,
    tolerance: float | None = None,
    seed: int = 0,
) -> Any:
    """KL(m | e^f/Z) = -H(m) - ∫ f dm + log Z.

    Args:
        x: as `differential`.
        log_density: f, from points (..., d) to numbers (...), torch or numpy; or a Law with `log_prob`; of a run also
            t ↦ Law (a scenario's `limit`).
        log_z: log ∫ e^f, where known (0 for a normalised density, and for every Law); None finds it with `normalise`.
        estimator: of H, as `differential`.
        pooled: as `differential`; `stderr` then includes the error of log Z.
        period: as `differential`.
        beyond_range: as `differential`.
        tolerance: largest error of log Z, as `normalise`.
        seed: of `normalise`.

    Returns:
        As `differential`; signed, so that an estimate of 0 scatters around 0. The attributes `log_z` and
        `log_z_stderr` of a labelled result hold log Z, whose error is shared by all its values.

    Raises:
        ValueError: as `differential` and `normalise`; particles where the density vanishes (KL is infinite), or is
            higher than at every mode that `normalise` found.

    """
    labelled = isinstance(x, (xr.Dataset, xr.DataArray))
    if depends_on_time(log_density, _first_time(x) if labelled else 0.0):
        if not labelled:
            raise ValueError("relative: the law depends on time, which an array does not tell; pass law(t), or a run.")
        if log_z is not None:
            raise ValueError(f"relative: laws are normalised; leave out log_z = {log_z}.")
        options = {"estimator": estimator, "pooled": pooled, "period": period, "beyond_range": beyond_range}
        return _relative_to_flow(x, log_density, **options)
    density = LogDensity.of(log_density)
    if density.is_normalised and log_z is not None:
        raise ValueError(f"relative: {type(log_density).__name__} is normalised; leave out log_z = {log_z}.")
    if log_z is not None and not math.isfinite(log_z):
        raise ValueError(f"relative: log_z = {log_z} is not finite; leave it out to have it computed.")

    def plan(n: int, d: int, lengths: Lengths) -> Plan:
        entropy, attrs = _estimator(estimator, n, d, lengths, beyond_range)
        constant, error, highest = (0.0 if log_z is None else float(log_z)), 0.0, math.inf
        if log_z is None and not density.is_normalised:
            constant, error, highest = log_constant(density, d, lengths, tolerance, seed, _some_points(x, d))
        terms = partial(_relative_terms, entropy=entropy, density=density, log_z=constant, highest=highest)
        attrs = {"long_name": "relative entropy", "units": "nat", **attrs}
        attrs["estimator"] += "; KL = -H - ∫ log density dm + log Z"
        if attrs["bias"] == "upper bound":
            attrs["bias"] = "lower bound"
        return _mean_plan(terms, attrs | {"log_z": constant, "log_z_stderr": error})

    return _apply(x, plan, "relative_entropy", pooled, period)


def fisher(
    x: Any,
    score: Any = None,
    *,
    reference: Any = None,
    degree: int = 3,
    pooled: bool = False,
    period: Any = None,
) -> Any:
    """I(m | π) = ∫ |∇log m - ∇log π|² dm; without a reference ∫ |∇log m|² dm.

    Where ∇log m is known this is a mean over particles. Otherwise score matching: with s = ∇log π,

        I = sup_h -2 ∫ (div h + h·s) dm - ∫ |h|² dm,

    the supremum over polynomials h of the given total degree (trigonometric on a torus). It is a lower bound, exact
    when ∇log m - s lies in the basis (Gaussians: degree 1); the overfitting of a finite sample, p/N near equilibrium,
    is removed by a delete-one-particle jackknife. Signed: an estimate of 0 scatters around 0.

    Args:
        x: as `differential`.
        score: ∇log m where it is known: a function (..., d) -> (..., d), a log density, or a Law.
        reference: π: a log density up to a constant, its score, or a Law.
        degree: total degree of the basis.
        pooled: as `differential`.
        period: as `differential`.

    Returns:
        As `differential`. The attribute `bias` of a labelled result says what kind of estimate it is.

    Raises:
        ValueError: as `differential`; a basis too wide for N; scores that are not finite.

    Source: Hyvärinen, Estimation of non-normalized statistical models by score matching (2005), theorem 1.

    """
    known = None if score is None else score_function(score)
    base = None if reference is None else score_function(reference)
    if degree < 1:
        raise ValueError(f"fisher: degree = {degree}; expected at least 1 (affine score differences).")

    def plan(n: int, d: int, lengths: Lengths) -> Plan:
        attrs = {"long_name": "Fisher information" if base is None else "relative Fisher information", "units": "1"}
        if known is not None:
            attrs |= {"estimator": "mean over particles of the given score", "bias": "none"}
            return _mean_plan(partial(score_matching.known, score=known, reference=base), attrs)
        basis = score_matching.Basis.of(d, degree, lengths)
        if n < 10 * basis.size:
            raise ValueError(
                f"fisher: {basis.size} basis functions of degree {degree} in dimension {d} need "
                f"N >= {10 * basis.size}; got N = {n}. Lower the degree, pool replicas, or pass the "
                "score where it is known."
            )
        attrs["estimator"] = f"score matching (degree {degree}), overfitting removed by a jackknife over particles"
        attrs["bias"] = "lower bound: what is orthogonal to the basis is not seen"
        statistic = partial(score_matching.matched, basis=basis, reference=base)
        return statistic, partial(_pooled_jackknife, statistic), attrs

    return _apply(x, plan, "fisher_information", pooled, period)


def _relative_to_flow(run: Any, law: Callable[[float], Any], **options: Any) -> xr.DataArray:
    """The same relative to the law at each time."""
    position = particles.positions(run)
    d, times = position.sizes["component"], times_of(position, law)
    if "time" not in position.dims:
        return relative(run, at_time(law, float(times), d), **options)  # type: ignore[no-any-return]
    found = [
        relative(run.isel(time=[k]), at_time(law, float(t), d), **options) for k, t in enumerate(times.values.tolist())
    ]
    values: xr.DataArray = xr.concat(found, "time", coords="different", compat="equals", join="exact").transpose(
        *[dim for dim in position.dims if dim in found[0].dims]
    )
    return values


def _first_time(run: Any) -> float:
    return float(run["time"].values.flat[0]) if "time" in run.coords else 0.0


def _some_points(x: Any, d: int) -> Array:
    """Particles from all parts of a sample or a run, where modes may be.    (n, d), n <= STARTS."""
    if isinstance(x, (xr.Dataset, xr.DataArray)):
        position = particles.positions(x)
        rest = [dim for dim in position.dims if dim not in ("particle", "component")]
        frames = max(1, math.ceil(math.prod(position.sizes[dim] for dim in rest) / FRAMES))
        # Read where they lie: a run may be larger than the memory.
        every = {dim: slice(None, None, math.ceil(frames ** (1 / len(rest)))) for dim in rest}
        position = position.isel(every).transpose(..., "particle", "component")
        points = np.asarray(position.values, dtype=np.float64).reshape(-1, d)
    else:
        points = _points(x, "relative", None)[0].reshape(-1, d)
    points = points[np.isfinite(points).all(-1)]
    return points[:: math.ceil(max(1, len(points)) / STARTS)]


# From runs and samples to arrays (..., N, d)


def _apply(x: Any, plan: Callable[..., Any], name: str, pooled: bool, period: Any) -> Any:
    if isinstance(x, (xr.Dataset, xr.DataArray)):
        return _labelled(x, plan, name, pooled, period)
    if pooled:
        raise ValueError(f"{name}: pooled=True pools the replicas of a run; reshape an array to (..., N, d) instead.")
    points, lengths = _points(x, name, period)
    statistic, _, _ = plan(*points.shape[-2:], lengths)
    values = statistic(points)
    return float(values) if values.ndim == 0 else values


def _labelled(run: Any, plan: Callable[..., Any], name: str, pooled: bool, period: Any) -> xr.DataArray:
    position = particles.positions(run)
    if particles.weights(run) is not None:
        raise ValueError(_weighted(name))
    lengths = particles.period(position)
    if period is not None:
        told = tuple(period_lengths(period, position.sizes["component"]))
        if lengths not in (None, told):
            raise ValueError(f"{name}: period = {told}, but the run recorded {lengths}; leave it out.")
        lengths = told
    lengths = _finite(lengths)
    n, core = position.sizes["particle"], ["particle", "component"]
    if pooled:
        n, core = n * replicas.count(position), ["replica", *core]
    statistic, of_all, attrs = plan(n, position.sizes["component"], lengths)

    def block(x: Array) -> Any:
        x = x.astype(np.float64)
        particles.check_finite(x, name)
        return of_all(x) if pooled else statistic(x)

    outputs = 2 if pooled else 1
    found = labels.apply(
        block,
        position.drop_vars(core, errors="ignore"),
        input_core_dims=[core],
        output_core_dims=[[]] * outputs,
        output_dtypes=[float] * outputs,
        keep_attrs=True,
    )
    values: xr.DataArray = (found[0] if pooled else found).rename(name)
    values.attrs = attrs
    if not pooled:
        return values
    values.attrs["estimator"] += ", all replicas pooled, stderr by the jackknife over replicas"
    error = np.hypot(found[1], attrs.get("log_z_stderr", 0.0))
    return values.assign_coords(
        stderr=error.drop_attrs().assign_attrs(long_name="standard error", units=attrs["units"])
    )


def _mean_plan(terms: Statistic, attrs: dict[str, Any]) -> Plan:
    """Of a mean over particles of terms (..., N, d) -> (..., N)."""
    return lambda x: terms(x).mean(-1), partial(_pooled_terms, terms), attrs


def _pooled_terms(terms: Statistic, x: Array) -> tuple[Array, Array]:
    """A mean of terms over all replicas' particles, and s/√R of the replicas' means.    (..., R, N, d) -> 2 (...).

    The terms, -log m(x_i) up to a constant, are the influence of x_i on the entropy, so this is the infinitesimal
    jackknife over replicas. Deleting replicas overstates the error (by 40 % in d = 1): it also moves the neighbours of
    all others.
    """
    r, n, d = x.shape[-3:]
    means = terms(x.reshape(*x.shape[:-3], r * n, d)).reshape(*x.shape[:-1]).mean(-1)
    return means.mean(-1), means.std(-1, ddof=1) / math.sqrt(r)


def _pooled_jackknife(statistic: Statistic, x: Array) -> tuple[Array, Array]:
    """A statistic of all replicas' particles, and its delete-one-replica error.    (..., R, N, d) -> 2 (...)."""
    r, n, d = x.shape[-3:]
    lead = x.shape[:-3]
    without = [statistic(np.delete(x, k, axis=-3).reshape(*lead, (r - 1) * n, d)) for k in range(r)]
    return statistic(x.reshape(*lead, r * n, d)), replicas.jackknife_error(np.stack(without))


def _points(x: Any, name: str, period: Any) -> tuple[Array, Lengths]:
    """Points (..., N, d) in float64, finite, and their torus."""
    if isinstance(x, EmpiricalMeasure):
        if not x.is_uniform:
            raise ValueError(_weighted(name))
        x, period = x.points, x.period if x.period is not None else period
    points = x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)
    points = points[:, None] if points.ndim == 1 else points
    if points.ndim < 2 or points.size == 0 or not np.issubdtype(points.dtype, np.number):
        raise ValueError(
            f"{name}: got {points.dtype} of shape {points.shape}; expected a sample (N,), (N, d) or (..., N, d), "
            "N >= 1."
        )
    points = points.astype(np.float64)
    particles.check_finite(points, name)
    return points, _finite(None if period is None else tuple(period_lengths(period, points.shape[-1])))


def _finite(lengths: Lengths) -> Lengths:
    """None where all lengths are infinite: the space is no torus."""
    return lengths if lengths is not None and np.isfinite(lengths).any() else None


def _weighted(name: str) -> str:
    return (
        f"{name}: the particles have unequal masses, for which neighbour distances are no estimate. Thin them: keep "
        "particle i with probability w_i / max w (copies made by resampling would have entropy -inf)."
    )


# The estimators of H


def _estimator(name: str, n: int, d: int, lengths: Lengths, beyond_range: bool) -> tuple[Statistic, dict[str, Any]]:
    """Terms (..., N, d) -> (..., N) whose mean is H, and the attributes that say what they are."""
    chosen = _chosen(name, n, d, lengths, beyond_range)
    terms = partial(_ESTIMATORS[chosen], lengths=lengths, checked=not beyond_range)
    return terms, _label(chosen, n, d, lengths, beyond_range)


def _chosen(estimator: str, n: int, d: int, lengths: Lengths, beyond_range: bool) -> str:
    """The estimator's name, after the checks that need N and d only."""
    line = lengths is None
    chosen = ("spacing" if d == 1 and line else "knn") if estimator == "auto" else estimator
    if chosen not in _ESTIMATORS:
        raise ValueError(f"estimator = {estimator!r}; expected one of {', '.join(['auto', *_ESTIMATORS])}.")
    if chosen == "spacing" and (d > 1 or not line or n < FEWEST_SPACINGS):
        raise ValueError(
            f"the spacing estimator needs N >= {FEWEST_SPACINGS} points on a line; got N = {n}, d = {d}"
            f"{'' if line else ' on a torus'}. Use estimator='knn'."
        )
    if chosen == "gaussian" and not line:
        raise ValueError("the Gaussian plug-in knows no torus; use estimator='knn'.")
    if chosen == "gaussian" and n <= d:
        raise ValueError(f"the Gaussian plug-in needs more particles than dimensions; got N = {n}, d = {d}.")
    if chosen == "knn":
        neighbours.check_range(n, d, beyond_range)
    return chosen


def _label(chosen: str, n: int, d: int, lengths: Lengths, beyond_range: bool) -> dict[str, Any]:
    if chosen == "spacing":
        return {
            "estimator": f"spacing (m = {neighbours.half_window(n)}) entropy, two-sided",
            "bias": "below its standard error, above it where modes are far apart",
        }
    if chosen == "gaussian":
        return {"estimator": "Gaussian plug-in entropy, bias of the log-determinant removed", "bias": "upper bound"}
    seen = neighbours.refused_above(n, d)
    attrs: dict[str, Any] = {
        "estimator": f"kNN (k = {NEIGHBOURS}) entropy, components rescaled",
        "bias": f"refused where N against N/2 shows more than {seen:.2g} nat; hard edges, heavy tails: twice that",
    }
    if lengths is None:
        attrs["estimator"] += ", bias at Gaussian laws removed"
        attrs["removed_gaussian_bias"] = gaussian_bias(n, d)
    if beyond_range:
        attrs["bias"] = "unknown"
        attrs["flag"] = f"range of d and N not checked (d = {d}, N = {n})"
    return attrs


def _gaussian(x: Array, *, lengths: Lengths, checked: bool) -> Array:
    found: Array = gaussian_entropy(EmpiricalMeasure(torch.from_numpy(np.ascontiguousarray(x)))).numpy()
    if not np.isfinite(found).all():
        raise ValueError("the sample covariance is singular: the law has no density, its entropy is -inf.")
    centred = x - x.mean(-2, keepdims=True)
    white = np.linalg.solve(np.swapaxes(centred, -1, -2) @ centred / x.shape[-2], np.swapaxes(centred, -1, -2))
    # The squared Mahalanobis distances of a sample average d.
    distances = (np.swapaxes(white, -1, -2) * centred).sum(-1)
    terms: Array = found[..., None] + 0.5 * (distances - x.shape[-1])
    return terms


_ESTIMATORS: dict[str, Callable[..., Array]] = {
    "spacing": neighbours.spacing,
    "knn": neighbours.nearest,
    "gaussian": _gaussian,
}


def _relative_terms(
    x: Array, *, entropy: Statistic, density: LogDensity, log_z: float, highest: float = math.inf
) -> Array:
    values = density(x)
    if not np.isfinite(values).all():
        raise ValueError(
            f"log_density is not finite at {int((~np.isfinite(values)).sum())} of {values.size} particles: where the "
            "density vanishes the relative entropy is infinite."
        )
    if values.max() > highest + MISSED:
        raise ValueError(
            f"log_density is {values.max():.4g} at a particle, but {highest:.4g} at the highest mode that was found: "
            "log Z misses a mode. Pass log_z."
        )
    terms: Array = log_z - entropy(x) - values
    return terms
