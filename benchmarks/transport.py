"""What distances cost beside the library calls they are made of, and what labels cost."""

from __future__ import annotations

import math

import numpy as np
import ot
import xarray as xr
from scipy import special

import mfsde
from mfsde.analysis import wasserstein

from .timing import interleaved, row


def rows() -> list[dict]:
    return [to_law(np.float32), to_law(np.float64), programs(), labels()]


def labelled(values: np.ndarray) -> xr.DataArray:
    coords = {"time": np.arange(len(values)) / len(values), "replica": np.arange(values.shape[1])}
    return xr.DataArray(values, dims=("time", "replica", "particle", "component"), coords=coords)


def to_law(dtype: type) -> dict:
    """Against one sort of the same array and the quadrature of the laws' quantiles, written down plainly."""
    t, r, n = 50, 20, 2000
    values = np.random.default_rng(0).normal(size=(t, r, n, 1)).astype(dtype)
    run = labelled(values)

    def law(time: float) -> mfsde.Gaussian:
        return mfsde.Gaussian([time], [[1 + time]])

    def plain() -> np.ndarray:
        quantiles = np.sort(values[..., 0], axis=-1)
        z = special.ndtri(np.arange(n + 1) / n)
        cells = -np.diff(np.exp(-0.5 * z**2)) * n / math.sqrt(2 * math.pi)
        laws = [law(float(time)) for time in run["time"].values]
        mean = np.array([float(one.mean[0]) for one in laws])[:, None, None]
        deviation = np.array([float(one.cov[0, 0]) for one in laws])[:, None, None] ** 0.5
        return np.sqrt(np.mean((quantiles - (mean + deviation * cells)) ** 2, axis=-1))

    seconds = interleaved({"to_law": lambda: wasserstein.to_law(run, law), "plain": plain}, repeats=21)
    case = f"W₂ to a 1-D law with floor, (T, R, N) = ({t}, {r}, {n}), {np.dtype(dtype)}"
    value, reference = 1e3 * seconds["to_law"], f"sort, quadrature {1e3 * seconds['plain']:.1f}"
    return row("transport", case, value, "ms", reference, seconds["to_law"] / seconds["plain"], 1.3)


def programs() -> dict:
    """400 programs of N = 500 in d = 2, against a plain loop over emd2: identical values."""
    t, r, n = 20, 20, 500
    rng = np.random.default_rng(1)
    a, b = (labelled(rng.normal(size=(t, r, n, 2))) for _ in range(2))

    def loop() -> np.ndarray:
        u = np.full(n, 1 / n)
        pairs = zip(a.values.reshape(-1, n, 2), b.values.reshape(-1, n, 2), strict=True)
        return np.sqrt([ot.emd2(u, u, ot.dist(x, y), numItermax=10**7) for x, y in pairs]).reshape(t, r)

    difference = float(np.abs(wasserstein.between(a, b).values - loop()).max())
    assert difference < 1e-12, difference
    seconds = interleaved({"between": lambda: wasserstein.between(a, b), "loop": loop}, repeats=3)
    case = f"{t} × {r} programs, N = {n}, d = 2 (values within {difference:.0e})"
    reference = f"loop over emd2 {seconds['loop']:.2f}"
    return row("transport", case, seconds["between"], "s", reference, seconds["between"] / seconds["loop"], 1 / 1.6)


def labels() -> dict:
    """The labelled layer against the array layer under it, N = 200."""
    t, r, n = 20, 20, 200
    rng = np.random.default_rng(2)
    a, b = (labelled(rng.normal(size=(t, r, n, 2))) for _ in range(2))

    def arrays() -> np.ndarray:
        return wasserstein._batch(a.values, None, b.values, None, 2.0, "euclidean", None)

    seconds = interleaved({"labelled": lambda: wasserstein.between(a, b), "arrays": arrays}, repeats=7)
    case = f"labels, {t} × {r} programs, N = {n}, d = 2"
    reference = f"arrays {seconds['arrays']:.3f}"
    return row("transport", case, seconds["labelled"], "s", reference, seconds["labelled"] / seconds["arrays"], 1.05)
