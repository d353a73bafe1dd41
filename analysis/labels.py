"""The labelled layer: functions of arrays applied under their labels, problems in threads."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xarray as xr

PIECES = 6


def apply(
    function: Callable[..., Any], *arrays: xr.DataArray, output_sizes: dict[str, int] | None = None, **options: Any
) -> Any:
    """`xr.apply_ufunc` with equal labels, lazily on dask-backed data; `output_sizes` of dimensions that are new."""
    # The coordinates' attributes have to stay: that of `replica` says whether replicas are independent.
    options = {"keep_attrs": True, **options}
    return xr.apply_ufunc(
        function,
        *arrays,
        join="exact",
        dask="parallelized",
        dask_gufunc_kwargs={"allow_rechunk": True, "output_sizes": output_sizes or {}},
        **options,
    )


def replicated(position: xr.DataArray, weight: xr.DataArray | None) -> tuple[list[xr.DataArray], list[list[str]]]:
    """Position and masses with a replica axis, and their core dimensions."""
    arrays = [z.drop_vars("particle", errors="ignore") for z in (position, weight) if z is not None]
    # Masses may be shared by all replicas.
    size = position.sizes.get("replica", 1)
    arrays = [z if "replica" in z.dims else z.expand_dims(replica=size) for z in arrays]
    return arrays, [["replica", "particle", "component"], ["replica", "particle"]][: len(arrays)]


def described(values: xr.DataArray, long_name: str, units: str = "1") -> xr.DataArray:
    """With a name for plots and tables."""
    return values.assign_attrs(long_name=long_name, units=units)


def threaded(one: Callable[[int], Any], number: int, workers: int) -> list[Any]:
    """[one(0), one(1), ...]: numpy's sort, LAPACK and POT's simplex release the interpreter's lock."""
    if number < 2 or workers < 2:
        return [one(k) for k in range(number)]
    # A few pieces for each worker: small problems are not lost in the pool's own work, and large ones stay balanced.
    size = max(1, number // (PIECES * workers))

    def piece(start: int) -> list[Any]:
        return [one(k) for k in range(start, min(start + size, number))]

    with ThreadPoolExecutor(workers) as pool:
        return list(itertools.chain.from_iterable(pool.map(piece, range(0, number, size))))
