"""Propagation of chaos: how far N interacting particles are from independent copies of their mean-field limit.

The particles X^{i,N} and the nonlinear processes X̄^i are driven by the same noise and started from the same points
(synchronous coupling), and compared particle by particle. As reference serves a run of `mfsde.decoupled(scenario, law)`
or one large system, with the seed and the step of the run. For Lipschitz coefficients E sup_t |X^{i,N} - X̄^i|² ≤ C/N.

A decoupled run is exact when its law is that of the scheme. The law of the continuous equation differs from it by
O(dt), which leaves a floor of O(dt²) under the squared error, whatever N. Under common noise the limit is random, and a
given flow of laws is no reference; take a large system. Across births and deaths particles have no paths to compare:
such runs are refused, and their laws can be compared instead (`wasserstein.to_law`).

With a system of M particles as reference, which contains the N, the measured E|X^{i,N} - X^{i,M}|² is smaller than
the coupling error. Write D^N = X^{i,N} - X̄^i. Its leading part is a mean over the particles of centred terms,
(1/N) Σ_{j≤N} ξ_ij, independent over j given i, and both systems share the ξ_ij; so E D^N·D^M = E|D^M|² = C/M and

    E|X^{i,N} - X^{i,M}|² = E|D^N|² - E|D^M|² = C/N - C/M.

Hence E|D^N|² = E|X^{i,N} - X^{i,M}|² + E|D^M|², and a coarser system of M' < M particles gives the last term as
E|X^{i,M'} - X^{i,M}|² / (M/M' - 1). This is exact for linear drifts and additive noise, where the leading part is all
there is; otherwise the error is of higher order in 1/N.

Source: Sznitman, Topics in propagation of chaos (1991), Theorem 1.4 (for the first moment; squares go the same way).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import xarray as xr
from scipy import stats

from . import dynamics, particles, replicas
from .labels import apply
from .rates import Rate

Array = np.ndarray
TestFunction = Callable[[Array], Array]

# A variance over replicas has a relative standard error √(2/(R-1)): 53 % here.
FEWEST_REPLICAS = 8
# The start of a coupled pair agrees to the rounding of float32; the runs may have different dtypes.
START_TOLERANCE = 1e-5
# A rate of growth in time is fitted to at least this many saved times.
FEWEST_TIMES = 3
LEVEL = 0.95


# Strong errors --------------------------------------------------------------------------------------------------------


def coupling_error(run: xr.Dataset, reference: xr.Dataset, coarse_reference: xr.Dataset | None = None) -> xr.DataArray:
    """E|X^{i,N}_t - X̄^i_t|², the mean of `squared_error` over replicas.

    Args:
        run: the interacting system of N particles.
        reference: a run of `mfsde.decoupled(scenario, law)` or of a system of M > N particles, with equal seed, dt,
            saved times and replicas.
        coarse_reference: with a large system as reference, a second one of M' < M particles, from which the
            reference's own error is estimated and added.

    Returns:
        (time), with the standard error over replicas as the coordinate `stderr`, and `reference_error` where a coarse
        reference was given. Where all particles of a replica share one error, as in one-dimensional linear models,
        ± t·stderr covers 84, 88, 91, 94 % of the time at 8, 16, 32, 200 replicas: squares of Gaussians are skewed.

    Raises:
        TypeError: a run that is no Dataset.
        ValueError: runs that are not coupled, or have births and deaths; fewer than two replicas, values that are not
            finite.

    """
    errors = squared_error(run, reference, coarse_reference)
    return _mean(errors, "coupling_error", "coupling error E|X^{i,N} - X̄^i|²")


def squared_error(run: xr.Dataset, reference: xr.Dataset, coarse_reference: xr.Dataset | None = None) -> xr.DataArray:
    """(1/N) Σ_i |X^{i,N}_t - X̄^i_t|² for each replica, with the masses as weights, on a torus the shortest differences.

    Args:
        run: as for `coupling_error`.
        reference: likewise.
        coarse_reference: likewise.

    Returns:
        (time, replica), lazily where the runs are chunked. The coordinate `reference_error`, where there is one, is
        what has been added to E|X^{i,N} - X^{i,M}|².

    Raises:
        TypeError: a run that is no Dataset.
        ValueError: runs that are not coupled, or have births and deaths; a coarse reference that says nothing about the
            reference.

    """
    errors = _particle_mean(_squared_distance(run, reference), run)
    if coarse_reference is not None:
        own = _reference_error(reference, coarse_reference)
        errors = (errors + own).assign_coords(reference_error=own)
    return _described(
        errors.rename("squared_error"),
        run,
        reference,
        long_name="coupling error |X - X̄|²",
        estimator="synchronous coupling" + ("" if coarse_reference is None else ", plus the reference's own error"),
    )


def sup_error(run: xr.Dataset, reference: xr.Dataset) -> xr.DataArray:
    """E sup_t |X^{i,N}_t - X̄^i_t|² over the saved times: a lower bound of the supremum over all times.

    Args:
        run: as for `coupling_error`.
        reference: likewise. Against a large system the reference's own error is not added: suprema do not add up.

    Returns:
        A number, with the coordinate `stderr`.

    Raises:
        TypeError, ValueError: as `coupling_error`.

    """
    return _mean(sup_squared_error(run, reference), "sup_error", "coupling error E sup |X - X̄|²")


def sup_squared_error(run: xr.Dataset, reference: xr.Dataset) -> xr.DataArray:
    """(1/N) Σ_i sup_t |X^{i,N}_t - X̄^i_t|² over the saved times, for each replica.

    Args:
        run: as for `coupling_error`.
        reference: likewise.

    Returns:
        (replica).

    Raises:
        TypeError, ValueError: as `squared_error`.

    """
    suprema = _squared_distance(run, reference).max("time")
    weight = particles.weights(run)
    errors = _particle_mean(suprema, None if weight is None else weight.isel(time=-1, drop=True))
    return _described(
        errors.rename("sup_squared_error"),
        run,
        reference,
        long_name="coupling error sup |X - X̄|²",
        estimator=f"synchronous coupling, supremum over {run.sizes['time']} saved times",
    )


def uniform_error(run: xr.Dataset, reference: xr.Dataset, coarse_reference: xr.Dataset | None = None) -> xr.DataArray:
    """sup_t E|X^{i,N}_t - X̄^i_t|² over the saved times, at the coordinate `time`; never above `sup_error`.

    The maximum of estimates lies above the maximum of what they estimate, by a fraction of its standard error.

    Args:
        run: as for `coupling_error`.
        reference: likewise.
        coarse_reference: likewise.

    Returns:
        A number, with `stderr` (jackknife over replicas).

    Raises:
        TypeError, ValueError: as `coupling_error`.

    """
    errors = squared_error(run, reference, coarse_reference).compute()
    replicas.count(errors)
    samples = errors.transpose("replica", "time").values
    value, stderr = replicas.jackknife(lambda mean: mean.max(-1), samples)
    at = errors["time"].isel(time=int(samples.mean(0).argmax()))
    coords = {"stderr": stderr, "time": at, "n_particles": errors.attrs["n_particles"]}
    estimator = f"{errors.attrs['estimator']}; maximum over {len(errors.time)} saved times, jackknife over replicas"
    attrs = {**errors.attrs, "long_name": "coupling error sup_t E|X^{i,N} - X̄^i|²", "estimator": estimator}
    return xr.DataArray(value, coords, name="uniform_error", attrs=attrs)


def uniform_in_time(errors: xr.DataArray) -> Rate:
    """Growth rate γ of E|X^{i,N}_t - X̄^i_t|² ~ A e^{γt} over the second half of the saved times.

    Chaos that is uniform in time has γ = 0 once the error has saturated; an interval above 0 is flagged.

    Args:
        errors: (time, replica), from `squared_error`.

    Returns:
        The rate: value > 0 is growth. Its interval comes from the jackknife over replicas (on the linear model it
        covers 93-96 % from 8 replicas on).

    Raises:
        ValueError: fewer than two replicas, fewer than three times in the second half, an error that vanishes.

    """
    r = replicas.count(errors)
    t = errors["time"].values.astype(float)
    late = errors.isel(time=np.flatnonzero(t >= (t[0] + t[-1]) / 2)).transpose("replica", "time")
    t, samples = late["time"].values.astype(float), late.values
    if len(t) < FEWEST_TIMES:
        raise ValueError(
            f"uniform_in_time: {len(t)} saved times in the second half of the run; expected at least {FEWEST_TIMES}. "
            "Simulate with a smaller save_every."
        )
    particles.check_finite(samples, "uniform_in_time")
    if (replicas.leave_one_out(samples) <= 0).any():
        raise ValueError(
            "uniform_in_time: the error vanishes in the second half of the run, and zero has no growth rate. The "
            "particles do not interact, or run and reference are the same."
        )
    fit, stderr = replicas.jackknife(lambda mean: np.polynomial.polynomial.polyfit(t, np.log(mean), 1), samples)
    value, half = float(fit[1]), replicas.t_quantile(r, LEVEL) * float(stderr[1])
    return Rate(
        value=value,
        low=value - half,
        high=value + half,
        stderr=float(stderr[1]),
        window=(float(t[0]), float(t[-1])),
        prefactor=math.exp(float(fit[0])),
        method="growth rate of the mean error, log-linear fit, jackknife over replicas",
        flags=_growth_flags(value - half, value + half, float(t[-1] - t[0])),
    )


def table(
    runs: Iterable[xr.Dataset],
    references: xr.Dataset | Sequence[xr.Dataset],
    *,
    time: float | None = None,
    coarse_reference: xr.Dataset | None = None,
) -> xr.DataArray:
    """Coupling errors of systems of several sizes, replica by replica: what `rates.power` fits a power of N to.

    All N share their seed, hence their noise: replica r is to be deleted at every N at once, as `rates.power` does.
    Against one system of M particles the errors are C/N - C/M, steeper than 1/N, unless a coarse reference makes up for
    it.

    Args:
        runs: one for each N, equal in everything else.
        references: one for all, with at least as many particles as the largest; or one for each run.
        time: the saved time at which `squared_error` is taken; None takes `sup_squared_error`, as the theorem does.
        coarse_reference: as for `coupling_error`; needs a time.

    Returns:
        (n_particles, replica), by increasing N.

    Raises:
        TypeError: not runs.
        ValueError: fewer than two sizes, or equal ones; runs that differ in more than N; a time that was not saved;
            runs that are not coupled to their reference, or have births and deaths.

    """
    runs = list(runs)
    chosen = [references] * len(runs) if isinstance(references, xr.Dataset) else list(references)
    _check_table(runs, chosen, time, coarse_reference)
    columns = [
        sup_squared_error(run, reference)
        if time is None
        else _at(squared_error(run, reference, coarse_reference), time)
        for run, reference in zip(runs, chosen, strict=True)
    ]
    attrs = {name: value for name, value in columns[0].attrs.items() if name != "n_particles"}
    joined = xr.concat(
        columns, "n_particles", join="exact", coords="different", compat="equals", combine_attrs="override"
    )
    joined.attrs = attrs
    joined["n_particles"].attrs = {"long_name": "number of particles N", "units": "1"}
    return joined.sortby("n_particles").rename("coupling_error")


# Weak errors ----------------------------------------------------------------------------------------------------------


def weak_error(run: xr.Dataset, reference: xr.Dataset, phi: TestFunction) -> xr.DataArray:
    """E φ(X^{i,N}_t) - E φ(X̄_t), from the differences φ(X^{i,N}) - φ(X̄^i) on the same noise.

    The coupled copies are a control variate with known difference of means: two independent runs would estimate the
    same number with `variance_reduction` times the variance. Against a system of M particles the result is
    E φ(X^{i,N}) - E φ(X^{i,M}), short of the weak error by that of M, O(1/M).

    Args:
        run: as for `coupling_error`.
        reference: likewise.
        phi: φ on float64 arrays, (..., N, d) -> (..., N).

    Returns:
        (time), with the coordinates `stderr` (over replicas) and `variance_reduction`, infinite where the difference
        is the same in all replicas (at the start) and NaN where φ itself is.

    Raises:
        TypeError: a run that is no Dataset.
        ValueError: runs that are not coupled, or have births and deaths; fewer than two replicas, a φ that loses the
            particle axis.

    """
    x, y = _coupled(run, reference)
    r = replicas.count(x)
    ours, theirs = (_particle_mean(_evaluated(phi, z), run).compute() for z in (x, y))
    difference = ours - theirs
    of_difference = difference.var("replica", ddof=1)
    apart = ours.var("replica", ddof=1) + theirs.var("replica", ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        reduction = apart / of_difference
    result = difference.mean("replica").assign_coords(
        stderr=(of_difference / r) ** 0.5, variance_reduction=reduction, n_particles=_n_particles(run)
    )
    return _described(
        result.rename("weak_error"),
        run,
        reference,
        long_name="weak error E φ(X^{i,N}) - E φ(X̄)",
        estimator="mean over replicas of coupled differences",
        power=None,
    )


# Fluctuations ---------------------------------------------------------------------------------------------------------


def fluctuation(run: xr.Dataset, phi: TestFunction) -> xr.DataArray:
    """N·Var(m^N_t(φ)) over replicas, m^N(φ) = (1/N) Σ_i φ(X^i), beside the value Var_m(φ) of independent particles.

    The law of large numbers says that it stays bounded in N; the central limit theorem names its limit, which
    interaction moves away from Var_m(φ). For dX = -(κX + α(X - E X)) dt + σ dW and φ = x the limit is
    v₀e^{-2κt} + σ²(1 - e^{-2κt})/2κ, without α, and Var_m(φ) has κ + α in place of κ.

    Args:
        run: a run with equal masses that kept all its particles.
        phi: φ on float64 arrays, (..., N, d) -> (..., N).

    Returns:
        (time), with coordinates: `low`, `high`, the 95 % interval from the χ² law with R - 1 degrees of freedom that
        a Gaussian m^N(φ) gives (it covers 94-95 % at N = 50, also for skewed φ, from 8 replicas on); `stderr`,
        jackknife over replicas, with which ± t·stderr covers 85 % at 8 replicas and 93 % at 100; `iid` = Var_m(φ)
        from the pooled particles; `ratio` of the two with `ratio_stderr` (jackknife).

    Raises:
        ValueError: fewer than eight replicas, unequal masses, particles that were not kept, a φ that loses the
            particle axis, values that are not finite.

    Source: Tanaka, Hitsuda, Central limit theorem for a simple diffusion model of interacting particles (1981).

    """
    x = particles.positions(run)
    _check_fluctuation(run, x)
    value, stderr, iid, ratio, ratio_stderr = apply(
        _fluctuation,
        _evaluated(phi, x),
        input_core_dims=[["replica", "particle"]],
        output_core_dims=[[]] * 5,
        output_dtypes=[float] * 5,
    )
    r = x.sizes["replica"]
    tail = stats.chi2.ppf([0.5 + LEVEL / 2, 0.5 - LEVEL / 2], r - 1)
    result: xr.DataArray = value.assign_coords(
        stderr=stderr, low=value * ((r - 1) / tail[0]), high=value * ((r - 1) / tail[1]), iid=iid,
        ratio=ratio, ratio_stderr=ratio_stderr, n_particles=_n_particles(run),
    )  # fmt: skip
    result.attrs = {
        "long_name": "fluctuation N·Var(m^N(φ))",
        "units": "1",
        "estimator": f"variance over {r} replicas, jackknife over replicas",
        "n_particles": _n_particles(run),
    }
    return result.rename("fluctuation")


def _fluctuation(values: Array) -> tuple[Array, ...]:
    """N·Var of the replicas' means, its error, the pooled variance, their ratio and its error.    (..., R, N)."""
    r, n = values.shape[-2:]
    centred = values - values.mean((-2, -1), keepdims=True)
    means, squares = centred.mean(-1), np.square(centred).mean(-1)
    moments = np.stack([means, np.square(means), squares], -1)
    total = moments.sum(-2)
    variance, pooled = _variances(total, r, n)
    deleted = _variances(total[..., None, :] - moments, r - 1, n)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio, ratios = variance / pooled, deleted[0] / deleted[1]
    stderr, ratio_stderr = (replicas.jackknife_error(np.moveaxis(d, -1, 0)) for d in (deleted[0], ratios))
    return variance, stderr, pooled, ratio, ratio_stderr


def _variances(total: Array, r: int, n: int) -> tuple[Array, Array]:
    """N·Var of the means and the variance of one particle, both unbiased for independent particles.    (..., 3)."""
    mean, square, pooled = (total[..., k] / r for k in range(3))
    return n * r / (r - 1) * (square - np.square(mean)), n * r / (n * r - 1) * (pooled - np.square(mean))


# Coupled pairs --------------------------------------------------------------------------------------------------------


def _squared_distance(run: xr.Dataset, reference: xr.Dataset) -> xr.DataArray:
    """|X^{i,N} - X̄^i|², (time, replica, particle)."""
    x, y = _coupled(run, reference)
    squared: xr.DataArray = apply(
        _squared,
        x,
        y,
        input_core_dims=[["component"], ["component"]],
        kwargs={"lengths": particles.period(x, y)},
        output_dtypes=[float],
    )
    return squared.assign_coords(n_particles=_n_particles(run))


def _squared(x: Array, y: Array, lengths: particles.Lengths = None) -> Array:
    """|x - y|², the shortest on a torus.    (..., d), (..., d) -> (...)."""
    particles.check_finite(x, "the particles of run")
    particles.check_finite(y, "the particles of reference")
    # Near numbers subtract exactly in their own precision, so float32 particles need no copy in float64.
    apart = _shortest(x - y, lengths)
    squared: Array = np.einsum("...k,...k->...", apart, apart, dtype=np.float64)
    return squared


def _shortest(difference: Array, lengths: particles.Lengths) -> Array:
    if lengths is None:
        return difference
    finite = np.isfinite(lengths)
    length = np.where(finite, lengths, 1.0).astype(difference.dtype)
    return difference - np.where(finite, length * np.round(difference / length), 0)


def _particle_mean(values: xr.DataArray, run: xr.Dataset | xr.DataArray | None) -> xr.DataArray:
    """Mean over particles, weighted by the run's masses (of those that were kept)."""
    weight = particles.weights(run) if isinstance(run, xr.Dataset) else run
    if weight is None:
        return values.mean("particle")
    weight = weight.reset_coords(drop=True).astype(float)
    mean: xr.DataArray = (values * weight).sum("particle") / weight.sum("particle")
    return mean


def _reference_error(reference: xr.Dataset, coarse: xr.Dataset) -> xr.DataArray:
    """E|X^{i,M} - X̄^i|² of the reference, from a system of M' < M particles.    (time, replica)."""
    _check_dataset(coarse, "coarse_reference")
    if _is_decoupled(reference) or _is_decoupled(coarse):
        raise ValueError(
            "coarse_reference estimates the error of a large reference system; a decoupled run is the nonlinear "
            "process and has none. Leave coarse_reference out, or pass two large systems."
        )
    m, coarse_m = _n_particles(reference), _n_particles(coarse)
    if coarse_m >= m:
        raise ValueError(
            f"coarse_reference has {coarse_m} particles and reference {m}; expected fewer, for instance {m // 2}."
        )
    return _particle_mean(_squared_distance(coarse, reference), coarse).reset_coords(drop=True) / (m / coarse_m - 1)


def _evaluated(phi: TestFunction, x: xr.DataArray) -> xr.DataArray:
    """φ(x^i), (..., particle)."""

    def block(points: Array) -> Array:
        particles.check_finite(points, "the particles that φ is evaluated at")
        values = np.asarray(phi(points.astype(float)), dtype=float)
        if values.shape != points.shape[:-1]:
            raise ValueError(
                f"φ returned shape {values.shape} for points {points.shape}; expected {points.shape[:-1]}: one number "
                "for each particle, for instance lambda x: np.square(x).sum(-1)."
            )
        particles.check_finite(values, "φ of the particles")
        return values

    evaluated: xr.DataArray = apply(
        block,
        x,
        input_core_dims=[["particle", "component"]],
        output_core_dims=[["particle"]],
        output_dtypes=[float],
    )
    return evaluated


def _coupled(run: xr.Dataset, reference: xr.Dataset) -> tuple[xr.DataArray, xr.DataArray]:
    """The same particles of run and reference, once it is certain that they are driven by the same noise."""
    _check_dataset(run, "run")
    _check_dataset(reference, "reference")
    x, y = particles.positions(run, "run"), particles.positions(reference, "reference")
    if set(x.dims) != set(y.dims):
        raise ValueError(
            f"run has dimensions {x.dims} and reference {y.dims}; expected the same. Select from both alike."
        )
    _check_path(run, reference)
    _check_sizes(run, reference)
    y = _same_particles(x, y.reset_coords(drop=True)).transpose(*x.dims)
    particles.check_matching(x, y, ("time", "replica", "component"))
    _check_start(x, y)
    return x, y


def _same_particles(x: xr.DataArray, y: xr.DataArray) -> xr.DataArray:
    ours, theirs = (z["particle"].values for z in (x, y))
    if not np.isin(ours, theirs).all():
        raise ValueError(
            f"reference stored {len(theirs)} particles and lacks some of the {len(ours)} of run; the comparison is "
            "particle by particle. Simulate the reference with as many particles as the run or more, and keep them; or "
            f"compare the first ones, run.isel(particle=slice({min(len(ours), len(theirs))}))."
        )
    return y.sel(particle=ours)


def _mean(errors: xr.DataArray, name: str, long_name: str) -> xr.DataArray:
    """Mean over replicas, of the reference's error too."""
    mean = replicas.mean_and_error(errors)
    if "reference_error" in errors.coords:
        mean = mean.assign_coords(reference_error=errors["reference_error"].mean("replica"))
    mean.attrs = {**errors.attrs, "long_name": long_name}
    return mean.rename(name)


def _described(
    values: xr.DataArray, run: xr.Dataset, reference: xr.Dataset, long_name: str, estimator: str, power: int | None = 2
) -> xr.DataArray:
    # Of φ of the particles nobody knows the units.
    units = "1" if power is None else run["position"].attrs.get("units", "1")
    kind = "nonlinear process" if _is_decoupled(reference) else f"system of {_n_particles(reference)} particles"
    values.attrs = {
        "long_name": long_name,
        "units": units if units == "1" else f"({units})^{power}",
        "estimator": f"{estimator}, reference: {kind}",
        "n_particles": _n_particles(run),
    }
    if power is not None:
        values.attrs["power"] = power
    return values


# Checks at the door ---------------------------------------------------------------------------------------------------


def _check_dataset(run: Any, name: str) -> None:
    if not isinstance(run, xr.Dataset):
        raise TypeError(
            f"{name} is a {type(run).__name__}; expected a run Dataset, as simulate and open_run return it: its "
            "attributes tell whether two runs share their noise."
        )
    found = dynamics.births(run)
    if found:
        raise ValueError(
            f"{name}: {found}, so that the particle i of one time need not be that of the next, and no path belongs to "
            "a path of the other run. Measure laws instead: wasserstein.to_law(run, law), or "
            "wasserstein.debiased(run, reference)."
        )


def _check_path(run: xr.Dataset, reference: xr.Dataset) -> None:
    found = _differences(run, reference)
    if found:
        raise ValueError(
            f"run and reference are not coupled: {'; '.join(found)}. Synchronous coupling compares one noise, one "
            "scheme and one equation: simulate both with the same seed, dt, substeps, method and parameters."
        )


def _differences(run: xr.Dataset, reference: xr.Dataset) -> list[str]:
    """What both recorded and is not the same, besides N."""
    ours, theirs = _identity(run), _identity(reference)
    return [
        f"{name} is {ours[name]} in one and {theirs[name]} in the other"
        for name in ours
        if name in theirs and str(ours[name]) != str(theirs[name]) and ours[name] != theirs[name]
    ]


def _identity(run: xr.Dataset) -> dict[str, Any]:
    """What determines a run's equation, noise and scheme, as far as it was recorded."""
    attrs = run.attrs
    scalars = {str(name): c.item() for name, c in run.coords.items() if c.ndim == 0 and name != "n_particles"}
    settings = json.loads(attrs.get("settings", "{}"))
    chosen = {name: settings[name] for name in ("seed", "dt", "substeps", "method") if name in settings}
    noise = {f"noise {k}": v for k, v in json.loads(attrs.get("noise", "{}")).items() if k in ("scheme", "version")}
    source = {"source of the scenario": attrs["scenario_source"]} if attrs.get("scenario_source") else {}
    name = {"scenario": attrs["scenario"].replace("decoupled(", "").rstrip(")")} if "scenario" in attrs else {}
    return {**name, **json.loads(attrs.get("parameters", "{}")), **scalars, **chosen, **noise, **source}


def _check_sizes(run: xr.Dataset, reference: xr.Dataset) -> None:
    if _is_decoupled(run):
        raise ValueError(
            "run is a decoupled run, the nonlinear process; expected the interacting system first, then the reference."
        )
    if _is_decoupled(reference):
        return
    n, m = _n_particles(run), _n_particles(reference)
    if m < n:
        raise ValueError(
            f"reference has {m} particles and run {n}; a reference system is the larger one. Swap them, or simulate "
            "mfsde.decoupled(scenario, law) as the reference."
        )
    if m == n:
        raise ValueError(
            f"run and reference are both systems of {n} particles with the same noise: their difference, 0, says "
            "nothing about the limit. Take a larger reference, or mfsde.decoupled(scenario, law)."
        )


def _check_start(x: xr.DataArray, y: xr.DataArray) -> None:
    """Equal seeds start from equal points; points that differ were not coupled, whatever the attributes say."""
    if "time" not in x.dims or float(x["time"][0]) != 0:
        return
    ours, theirs = (z.isel(time=0).values.astype(float) for z in (x, y))
    for values, name in ((ours, "run"), (theirs, "reference")):
        particles.check_finite(values, f"{name} at time 0")
    apart = np.abs(_shortest(ours - theirs, particles.period(x, y))).max()
    if apart > START_TOLERANCE * max(1.0, np.abs(ours).max()):
        raise ValueError(
            f"run and reference start from different points, up to {apart:.3g} apart; coupled particles start "
            "together. Simulate both with the same seed and initial law."
        )


def _check_table(
    runs: list[xr.Dataset], references: list[xr.Dataset], time: float | None, coarse: xr.Dataset | None
) -> None:
    for k, run in enumerate(runs):
        _check_dataset(run, f"runs[{k}]")
    sizes = [_n_particles(run) for run in runs]
    if len(set(sizes)) < 2 or len(set(sizes)) < len(sizes):
        raise ValueError(f"table: the runs have {sizes} particles; expected at least two different sizes, each once.")
    if len(references) != len(runs):
        raise ValueError(
            f"table: {len(references)} references for {len(runs)} runs; expected one for all, or one for each."
        )
    if time is None and coarse is not None:
        raise ValueError("table: the errors of run and reference add up at a time, not as suprema; pass time=.")
    for run in runs[1:]:
        found = _differences(runs[0], run)
        if found:
            raise ValueError(
                f"table: the runs differ in more than their size: {'; '.join(found)}. Simulate all N with the same "
                "settings and parameters."
            )


def _at(errors: xr.DataArray, time: float) -> xr.DataArray:
    saved = errors["time"].values
    if time not in saved:
        raise ValueError(
            f"time {time} was not saved; the nearest saved time is {saved[np.abs(saved - time).argmin()]} "
            f"({len(saved)} from {saved[0]} to {saved[-1]})."
        )
    return errors.sel(time=time)


def _check_fluctuation(run: xr.Dataset, x: xr.DataArray) -> None:
    r = replicas.count(x)
    if r < FEWEST_REPLICAS:
        raise ValueError(
            f"fluctuation: a variance over {r} replicas has a relative error of {math.sqrt(2 / (r - 1)):.0%}; expected "
            f"at least {FEWEST_REPLICAS} replicas, and 200 for 10 %. Simulate with a larger n_replicas."
        )
    if particles.weights(run) is not None:
        raise ValueError(
            "fluctuation: the particles have unequal masses, so that 1/N is not the order of the variance; expected "
            "equal ones."
        )
    n, kept = _n_particles(run), x.sizes["particle"]
    if kept < n:
        raise ValueError(
            f"fluctuation: the mean over {kept} of {n} interacting particles does not fluctuate as the mean over all. "
            "Simulate with keep_particles=None."
        )


def _growth_flags(low: float, high: float, length: float) -> tuple[str, ...]:
    if low > 0:
        return (f"the error grows, by a factor of at least {math.exp(low * length):.3g} over the window",)
    if high * length > math.log(2):
        return ("the interval lets the error double over the window; take more replicas or a longer run",)
    return ()


def _is_decoupled(run: xr.Dataset) -> bool:
    return str(run.attrs.get("scenario", "")).startswith("decoupled(")


def _n_particles(run: xr.Dataset) -> int:
    """N of the system, of which fewer particles may have been kept."""
    return int(run["n_particles"]) if "n_particles" in run.coords else int(run.sizes["particle"])
