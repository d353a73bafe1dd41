"""Fewer replicas for the same error: antithetic pairs and control variates.

Both take values of replicas and return an unbiased mean with its standard error and the factor by which the variance
fell. Nothing here simulates: the runs come from `mfsde.Noise(seed, antithetic=True)`, or from a second scenario under
the same seed whose expectation is known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from . import replicas
from .labels import apply

Array = np.ndarray
Values = xr.DataArray

# A control's mean that is farther from its expectation than this, in standard errors, has another expectation.
IMPLAUSIBLE = 6.0
# Directions in which the controls vary less than this, relative to the largest, are one control twice.
COLLINEAR = 1e-10


def antithetic(values: Values) -> xr.Dataset:
    """The mean over antithetic replicas, whose pairs (2j, 2j + 1) are independent.

    Var of the mean over R replicas is σ²(1 + ρ)/R, ρ the correlation within a pair: 0 where the value is affine in the
    noise, and larger than without for even functions of it (ρ > 0: then independent replicas are better).

    Args:
        values: (..., replica), of a run with `noise=mfsde.Noise(seed, antithetic=True)`.

    Returns:
        Dataset over the other dimensions: `estimate`, `stderr` (over pairs), `correlation` ρ within pairs (0 where
        nothing varies), and `variance_reduction` = 1/(1 + ρ), the factor that replicas as many as these but independent
        would need; infinite where pairs do not vary.

    Raises:
        TypeError: no DataArray.
        ValueError: an odd number of replicas, fewer than two pairs, or labels that are not whole pairs.

    Source: Hammersley, Morton, A new Monte Carlo technique: antithetic variates (1956).

    """
    _check_values(values, "values")
    first, second = _split(values)
    replicas.count(first)
    estimate, stderr, correlation, factor = apply(
        _paired, first, second, input_core_dims=[["replica"], ["replica"]], output_core_dims=[[], [], [], []]
    )
    return _described(
        values,
        estimate=(estimate, "mean over antithetic replicas"),
        stderr=(stderr, "standard error over pairs"),
        correlation=(correlation, "correlation within antithetic pairs"),
        variance_reduction=(factor, "factor of the variance"),
    )


def pairs(values: Values) -> Values:
    """Means over the pairs (2j, 2j + 1): as many independent replicas, for any other analysis.    replica -> R/2.

    Raises:
        TypeError, ValueError: as `antithetic`.

    """
    _check_values(values, "values")
    first, second = _split(values)
    found: Values = ((first + second) / 2).assign_attrs(values.attrs).rename(values.name)
    return found


def control_variate(
    value: Values,
    control: Values | Mapping[str, Values],
    expectation: Any,
) -> xr.Dataset:
    """The mean of Y - β·(C - E C), with the β that removes most of the variance, unbiased.

    β minimises the residual variance over replicas. Each replica is corrected with the β of the others, so that
    E[β_{-r}·(C_r - E C)] = 0 exactly and the mean is unbiased for every R; its standard error is that of the corrected
    values, which contain the error of β. With p controls the variance falls by 1 - R² at the price of a factor of about
    1 + p/R.

    Good controls: the same functional of the decoupled process `mfsde.decoupled(scenario, law)` or of a linear
    scenario, under the same seed, whose law is known. The expectation must be that of what was simulated, the scheme's:
    E C of the continuous equation leaves a bias β·O(dt). With antithetic replicas pass `pairs(value)` and
    `pairs(control)`.

    Args:
        value: Y, (..., replica).
        control: C with the replicas of Y, or several by name; dimensions that Y does not have are refused.
        expectation: E C, a number or a DataArray over dimensions of Y; by name for several controls.

    Returns:
        Dataset over the other dimensions: `estimate`, `stderr`, `coefficient` (β, over `control`), `control_error`
        ((mean of C - E C) in standard errors, over `control`), `variance_reduction` (of the mean, against plain
        averages), `plain` and `plain_stderr`. Where a control does not vary it changes nothing.

    Raises:
        TypeError: no DataArrays.
        ValueError: fewer than p + 4 replicas, antithetic ones that are not `pairs`, names or labels that do not match,
            controls that never vary, an expectation that the controls contradict.

    Source: Lavenberg, Welch, A perspective on the use of control variables (1981); Nelson, Control variate remedies
    (1990); the leave-one-out coefficient is Avramidis, Wilson, A splitting scheme for control variates (1993).

    """
    _check_values(value, "value")
    controls, centres = _named(value, control, expectation)
    centred = _centred(value, controls, centres)
    _check_replicas(value, controls)
    estimate, stderr, coefficient, error, plain, plain_stderr, factor = apply(
        _corrected,
        value.reset_coords(drop=True),
        centred,
        input_core_dims=[["replica"], ["control", "replica"]],
        output_core_dims=[[], [], ["control"], ["control"], [], [], []],
    )
    _check_expectation(error)
    return _described(
        value,
        estimate=(estimate, "mean with control variates"),
        stderr=(stderr, "standard error"),
        coefficient=(coefficient, "coefficient of the control"),
        control_error=(error, "gap between the control's mean and its expectation, in standard errors"),
        variance_reduction=(factor, "factor of the variance"),
        plain=(plain, "mean without controls"),
        plain_stderr=(plain_stderr, "standard error without controls"),
    )


def _centred(value: Values, controls: Mapping[str, Values], centres: Mapping[str, Any]) -> Values:
    """C - E C of every control beside the value, along `control`."""
    return xr.concat(
        [_like(value, controls[name] - centres[name], name) for name in controls],
        xr.Variable("control", list(controls)),
        coords="minimal",
        compat="override",
        join="exact",
    )


def _check_replicas(value: Values, controls: Mapping[str, Values]) -> None:
    """Independent ones, and enough of them."""
    r, p = replicas.count(value), len(controls)
    for control in controls.values():
        replicas.check_independent(control)
    if r < p + 4:
        raise ValueError(
            f"control_variate: {r} replicas and {p} controls; the coefficients and an error need at least {p + 4}."
        )


def _paired(first: Array, second: Array) -> tuple[Array, Array, Array, Array]:
    """The two of each pair, (..., R/2) -> mean, stderr, ρ, 1/(1 + ρ)."""
    means = (first + second) / 2
    own = (first.var(-1, ddof=1) + second.var(-1, ddof=1)) / 2
    together = means.var(-1, ddof=1)
    # Var of a pair mean is σ²(1 + ρ)/2.
    share = np.divide(2 * together, own, out=np.ones_like(own), where=own > 0)
    stderr = np.sqrt(together / means.shape[-1])
    return means.mean(-1), stderr, share - 1, _reciprocal(share)


def _reciprocal(share: Array) -> Array:
    return np.asarray(np.divide(1.0, share, out=np.full_like(share, math.inf), where=share > 0))


def _corrected(y: Array, c: Array) -> tuple[Array, ...]:
    """Y (..., R), C - E C (..., p, R) -> mean, stderr, β (..., p), error of C (..., p), plain mean, stderr, factor."""
    r = y.shape[-1]
    dy = y - y.mean(-1, keepdims=True)
    dc = c - c.mean(-1, keepdims=True)
    spread = np.sqrt(np.square(dc).mean(-1))
    # What varies by rounding alone does not vary.
    varies = spread > 1e-12 * np.abs(c).max(-1)
    scale = np.where(varies, spread, 1.0)
    dc = np.where(varies[..., None], dc / scale[..., None], 0.0)
    gram = dc @ dc.swapaxes(-1, -2)
    cross = dc @ dy[..., None]
    beta = _solve(gram, cross)[..., 0] / scale
    # Without replica r: Σ dc dcᵀ falls by R/(R-1) dc_r dc_rᵀ, about the mean of the others.
    rows = dc.swapaxes(-1, -2)
    fall = r / (r - 1)
    grams = gram[..., None, :, :] - fall * rows[..., :, None] * rows[..., None, :]
    crosses = cross[..., None, :, :] - fall * (rows * dy[..., None])[..., None]
    betas = _solve(grams, crosses)[..., 0] / scale[..., None, :]
    corrected = y - np.einsum("...rp,...pr->...r", betas, c)
    # Leave-one-out residuals carry the leverage of each replica: their scatter is the error of the mean and of β.
    stderr = corrected.std(-1, ddof=1) / math.sqrt(r)
    error = np.where(varies, c.mean(-1) / scale * math.sqrt(r - 1), 0.0)
    plain_stderr = y.std(-1, ddof=1) / math.sqrt(r)
    share = np.divide(stderr**2, plain_stderr**2, out=np.ones_like(stderr), where=plain_stderr > 0)
    return corrected.mean(-1), stderr, beta, error, y.mean(-1), plain_stderr, _reciprocal(share)


def _solve(gram: Array, cross: Array) -> Array:
    """The least-norm solution, so that what does not vary, or twice, has a coefficient too."""
    solution: Array = np.linalg.pinv(gram, rcond=COLLINEAR, hermitian=True) @ cross
    return solution


def _check_values(values: Any, name: str) -> None:
    if not isinstance(values, xr.DataArray):
        raise TypeError(f"{name} is a {type(values).__name__}; expected a DataArray with the dimension `replica`.")
    if "replica" not in values.dims:
        raise ValueError(f"{name} has dimensions {values.dims}; expected `replica` among them.")
    if not bool(np.isfinite(values).all()):
        raise ValueError(f"{name} has values that are not finite; a mean needs finite ones.")


def _split(values: Values) -> tuple[Values, Values]:
    """The first and the second replicas of the pairs, labelled by pair."""
    r = values.sizes["replica"]
    labels = values["replica"].values if "replica" in values.coords else np.arange(r)
    even = labels[0::2]
    if r % 2 or (even % 2).any() or not np.array_equal(labels[1::2], even + 1):
        raise ValueError(
            f"antithetic: {r} replicas labelled {labels[:6].tolist()}...; expected whole pairs 2j, 2j + 1. Simulate "
            "with an even n_replicas and noise=mfsde.Noise(seed, antithetic=True), and select both of a pair."
        )
    first, second = (values.isel(replica=slice(k, None, 2)).assign_coords(replica=even // 2) for k in (0, 1))
    return first, second


def _named(value: Values, control: Any, expectation: Any) -> tuple[dict[str, Values], dict[str, Any]]:
    """Controls and expectations by name."""
    if isinstance(control, xr.DataArray):
        name = str(control.name or "control")
        return {name: control}, {name: expectation}
    if not isinstance(control, Mapping) or not control:
        raise TypeError(f"control is a {type(control).__name__}; expected a DataArray, or DataArrays by name.")
    if not isinstance(expectation, Mapping) or set(expectation) != set(control):
        raise ValueError(f"expectation must name the controls {sorted(control)}, one number or DataArray for each.")
    return dict(control), dict(expectation)


def _like(value: Values, control: Values, name: str) -> Values:
    """A centred control with the dimensions of the value."""
    _check_values(control, f"control {name!r}")
    extra = set(control.dims) - set(value.dims)
    if extra:
        raise ValueError(
            f"control {name!r} has the dimensions {sorted(map(str, extra))}, which the value has not; select or "
            "average."
        )
    if control.sizes["replica"] != value.sizes["replica"]:
        raise ValueError(
            f"control {name!r} has {control.sizes['replica']} replicas and the value {value.sizes['replica']}; "
            "simulate both with one seed and n_replicas."
        )
    bare = control.reset_coords(drop=True)
    return bare.broadcast_like(value.reset_coords(drop=True)).transpose(*value.dims)


def _check_expectation(error: Values) -> None:
    worst = np.abs(error.transpose("control", ...).values).reshape(error.sizes["control"], -1).max(1)
    if worst.max() > IMPLAUSIBLE:
        name = str(error["control"].values[worst.argmax()])
        raise ValueError(
            f"control {name!r} has a mean {worst.max():.1f} standard errors from the expectation given; another "
            "expectation would bias the estimate. Give that of the scheme: its own step, its own number of particles."
        )


def _described(values: Values, **columns: tuple[Values, str]) -> xr.Dataset:
    units = values.attrs.get("units", "1")
    of_value = ("estimate", "stderr", "plain", "plain_stderr")
    found = {
        name: column.assign_attrs(long_name=long_name, units=units if name in of_value else "1")
        for name, (column, long_name) in columns.items()
    }
    return xr.Dataset(found, attrs={"value": str(values.name or "value"), "n_replicas": values.sizes["replica"]})
