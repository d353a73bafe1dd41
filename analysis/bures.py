"""The Bures-Wasserstein geometry of Gaussians: W₂ as a function of means and covariances.

W₂² = |m - m'|² + tr(C + C' - 2 (C^{1/2} C' C^{1/2})^{1/2}); for laws of these moments that are not Gaussian it is a
lower bound (Dowson, Landau 1982; Gelbrich 1990).
"""

from __future__ import annotations

import numpy as np

Points = np.ndarray
Weights = np.ndarray | None


def squared(mean_a: Points, cov_a: Points, mean_b: Points, cov_b: Points) -> Points:
    """Squared distance, over leading axes of both sides.    (..., d), (..., d, d) -> (...)."""
    return np.asarray(np.square(mean_a - mean_b).sum(-1) + covariance_part(cov_a, cov_b))


def covariance_part(cov_a: Points, cov_b: Points) -> Points:
    """tr(C + C' - 2 (C^{1/2} C' C^{1/2})^{1/2}): what is left after the translation.    (..., d, d) -> (...)."""
    root = _square_root(cov_b)
    cross = np.linalg.eigvalsh(root @ cov_a @ root)
    traces = np.trace(cov_a, axis1=-2, axis2=-1) + np.trace(cov_b, axis1=-2, axis2=-1)
    part: Points = traces - 2 * np.sqrt(np.clip(cross, 0, None)).sum(-1)
    return part


def sampling_cost(cov: Points, n: float) -> float:
    """E of the squared distance between N Gaussian points' moments and their law's, to leading order in 1/N.

    (tr C + ½ Σ_ij λ_i λ_j (1 + δ_ij)/(λ_i + λ_j))/N with λ the eigenvalues of C: the mean's error, and the covariance's
    through the second-order expansion of the Bures distance.
    """
    values = np.clip(np.linalg.eigvalsh(cov), 0, None)
    sums = values[:, None] + values[None]
    products = np.outer(values, values) * (1 + np.eye(len(values)))
    pairs = np.divide(products, sums, out=np.zeros_like(sums), where=sums > 0)
    return float(values.sum() + 0.5 * pairs.sum()) / n


def moments(x: Points, p: Weights = None) -> tuple[Points, Points]:
    """∫ x dm and ∫ xxᵀ dm.    (..., N, d), (..., N) -> (..., d), (..., d, d)."""
    x = x.astype(np.float64)
    w = np.full(x.shape[:-1], 1 / x.shape[-2]) if p is None else p / p.sum(-1, keepdims=True, dtype=np.float64)
    weighted = w[..., None] * x
    return weighted.sum(-2), np.swapaxes(weighted, -1, -2) @ x


def covariance(first: Points, second: Points) -> Points:
    """Population covariance from the first two moments."""
    found: Points = second - first[..., :, None] * first[..., None, :]
    return found


def _square_root(matrix: Points) -> Points:
    values, vectors = np.linalg.eigh(matrix)
    root: Points = (vectors * np.sqrt(np.clip(values, 0, None))[..., None, :]) @ np.swapaxes(vectors, -1, -2)
    return root
