"""What the kNN entropy costs over its tree and queries alone, and the labels over the arrays."""

from __future__ import annotations

import numpy as np
import xarray as xr
from scipy.spatial import cKDTree

from mfsde.analysis import entropy
from mfsde.analysis.entropy import NEIGHBOURS

from .timing import interleaved, row

PARTICLES, DIM = 100_000, 2
TIMES, REPLICAS, FEW = 25, 20, 200


def rows() -> list[dict]:
    return [neighbours(), labels()]


def neighbours() -> dict:
    x = np.random.default_rng(1).normal(size=(PARTICLES, DIM))
    seconds = interleaved(
        {
            "entropy": lambda: entropy.differential(x, estimator="knn"),
            "tree": lambda: cKDTree(x).query(x, k=NEIGHBOURS + 1, workers=-1),
        }
    )
    own, tree = seconds["entropy"], seconds["tree"]
    return row("entropy", f"kNN, N = {PARTICLES:,}, d = {DIM}", own, "s", f"cKDTree alone {tree:.3f}", own / tree, 1.5)


def labels() -> dict:
    x = np.random.default_rng(1).normal(size=(TIMES, REPLICAS, FEW, DIM))
    position = xr.DataArray(x, dims=("time", "replica", "particle", "component"))
    seconds = interleaved(
        {
            "labelled": lambda: entropy.differential(position, estimator="knn"),
            "array": lambda: entropy.differential(x, estimator="knn"),
        }
    )
    own, array = seconds["labelled"], seconds["array"]
    case = f"labelled kNN, (time, replica, N) = {TIMES, REPLICAS, FEW}, d = {DIM}"
    return row("entropy", case, own, "s", f"array layer {array:.3f}", own / array, 1.05)
