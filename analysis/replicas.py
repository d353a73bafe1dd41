"""Independent replicas: means, standard errors and the delete-one jackknife.

Particles of one replica are dependent; replicas are not, unless their noise is antithetic: then pairs are, and their
replicas are refused. Every standard error of the analysis therefore comes from here, with t quantiles of R - 1 degrees
of freedom.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import xarray as xr
from scipy import stats

Array = np.ndarray
# Attribute of the coordinate `replica`, with words that say so.
ANTITHETIC = "antithetic"


def mean_and_error(values: xr.DataArray, dim: str = "replica") -> xr.DataArray:
    """Mean over replicas, with its standard error s/√R as the coordinate `stderr`.

    Raises:
        ValueError: fewer than two replicas, or antithetic ones.

    """
    r = count(values, dim)
    mean = values.mean(dim, keep_attrs=True)
    return mean.assign_coords(stderr=values.std(dim, ddof=1) / r**0.5)


def count(values: xr.DataArray, dim: str = "replica") -> int:
    """Number of independent replicas.

    Raises:
        ValueError: fewer than two, from which no error can be estimated; antithetic ones.

    """
    r = int(values.sizes.get(dim, 1))
    if r < 2:
        raise ValueError(
            f"an error bar needs at least two independent replicas; {values.name or 'this array'} has {r} along "
            f"{dim!r}. Simulate with n_replicas=8 or more (particles of one replica are dependent)."
        )
    check_independent(values, dim)
    return r


def check_independent(values: xr.DataArray | xr.Dataset, dim: str = "replica") -> None:
    """Refuses antithetic replicas, of which only the pairs (2j, 2j + 1) are independent.

    Raises:
        ValueError: there are both of a pair.

    """
    if are_independent(values, dim):
        return
    name = values.name if isinstance(values, xr.DataArray) else None
    raise ValueError(
        f"{name or 'this array'}: {values[dim].attrs[ANTITHETIC]} (mfsde.Noise(antithetic=True)), so that replicas "
        "are not independent, and the error of a mean is 0 to √2 times what they show. Of values that have been "
        "measured replica by replica take mfsde.analysis.control_variates.antithetic(values), the mean with its error, "
        "or control_variates.pairs(values), the means over pairs, which are independent. Of particles keep one of each "
        f"pair: .isel({dim}=slice(None, None, 2))."
    )


def are_independent(values: xr.DataArray | xr.Dataset, dim: str = "replica") -> bool:
    """Whether no two replicas have opposite noise, as their coordinate records it."""
    if dim not in values.coords or not values[dim].ndim or ANTITHETIC not in values[dim].attrs:
        return True
    pair = values[dim].values // 2
    return len(np.unique(pair)) == len(pair)


def leave_one_out(samples: Array) -> Array:
    """Means without each replica in turn.    (R, ...) -> (R, ...)."""
    r = len(samples)
    means: Array = (samples.sum(0) - samples) / (r - 1)
    return means


def jackknife(statistic: Callable[[Array], Array], samples: Array) -> tuple[Array, Array]:
    """A smooth function of replica means and its standard error.

    Args:
        statistic: mean (...) -> value (*out).
        samples: (R, ...), one row per replica.

    Returns:
        statistic(mean) and √((R-1)/R Σ_r (θ_{-r} - θ̄)²), both (*out).

    Raises:
        ValueError: fewer than two replicas.

    Source: Miller, The jackknife: a review (1974).

    """
    r = len(samples)
    if r < 2:
        raise ValueError(f"the jackknife needs at least two replicas; got {r}. Simulate with n_replicas=8 or more.")
    without = np.stack([np.asarray(statistic(mean)) for mean in leave_one_out(samples)])
    return np.asarray(statistic(samples.mean(0))), jackknife_error(without)


def jackknife_error(without: Array) -> Array:
    """Standard error from the delete-one values.    (R, ...) -> (...)."""
    r = len(without)
    error: Array = np.sqrt((r - 1) / r * np.square(without - without.mean(0)).sum(0))
    return error


def pseudo_values(full: Array, without: Array) -> Array:
    """Tukey's pseudo-values R θ - (R-1) θ_{-r}: their mean is bias-corrected, their scatter is θ's.

    Means over R - 1 of them are again the delete-one values (up to the bias correction), so a jackknife of anything
    computed from their mean is the jackknife over replicas.    (...), (R, ...) -> (R, ...).
    """
    r = len(without)
    values: Array = r * full - (r - 1) * without
    return values


def t_quantile(r: int, level: float = 0.95) -> float:
    """Two-sided t quantile for R replicas."""
    return float(stats.t.ppf(0.5 + level / 2, r - 1))
