"""Ground metrics: the distance between two points that transport pays for.

Euclidean space, the torus (shortest difference in every periodic component), and the sphere (great circles).
"""

from __future__ import annotations

import math

import numpy as np
from scipy.spatial import distance

Points = np.ndarray
Lengths = tuple[float, ...] | None

METRICS = ("euclidean", "sphere")
# Points of a sphere agree in norm to this; below it they were rounded, above they left it.
ROUNDNESS = 1e-4


def check_metric(metric: str, period: Lengths) -> None:
    """Refuses an unknown metric, or a sphere that is also a torus."""
    if metric not in METRICS:
        raise ValueError(
            f"metric {metric!r} is unknown; expected one of {', '.join(METRICS)} (a torus is read from the measure's "
            "or the run's `period`)."
        )
    if metric == "sphere" and period is not None:
        raise ValueError("the points carry a `period`, so they live on a torus; metric='sphere' does not apply.")


def distances(x: Points, y: Points, *, metric: str = "euclidean", period: Lengths = None) -> Points:
    """Ground distances r(x_i, y_j).    (N, d), (M, d) -> (N, M), float64."""
    if metric == "sphere":
        return _great_circle(x, y)
    root: Points = np.sqrt(squared_distances(x, y, period=period))
    return root


def squared_distances(x: Points, y: Points, *, metric: str = "euclidean", period: Lengths = None) -> Points:
    """Squared ground distances r(x_i, y_j)².    (N, d), (M, d) -> (N, M), float64.

    Raises:
        ValueError: points that do not lie on one sphere about the origin.

    """
    if metric == "sphere":
        squared: Points = np.square(_great_circle(x, y))
        return squared
    x, y = x.astype(np.float64), y.astype(np.float64)
    if period is None:
        # Differences, not |x|² + |y|² - 2xy, which would leave equal points 1e-8 apart.
        plain: Points = distance.cdist(x, y, "sqeuclidean")
        return plain
    cost = np.zeros((len(x), len(y)))
    for k in range(x.shape[1]):
        gap = x[:, None, k] - y[None, :, k]
        if period is not None and math.isfinite(period[k]):
            gap -= period[k] * np.round(gap / period[k])
        cost += np.square(gap, out=gap)
    return cost


def _great_circle(x: Points, y: Points) -> Points:
    """R·angle between points of norm R, from the chord: accurate for near and for opposite points."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    norms = np.concatenate([np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1)])
    radius = float(norms.mean())
    if radius == 0 or float(np.abs(norms - radius).max()) > ROUNDNESS * radius:
        raise ValueError(
            f"metric='sphere' needs points of one norm about the origin; the norms lie in [{norms.min():.6g}, "
            f"{norms.max():.6g}]. Project them (x / |x|) first."
        )
    x, y = x / np.linalg.norm(x, axis=1, keepdims=True), y / np.linalg.norm(y, axis=1, keepdims=True)
    near = np.sqrt(squared_distances(x, y))
    far = np.sqrt(squared_distances(x, -y))
    angle: Points = 2 * np.arctan2(near, far)
    return radius * angle
