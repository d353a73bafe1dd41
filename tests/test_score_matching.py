"""Score matching: identities of its basis and its jackknife, then what a kernel density cannot do.

The statistical tolerance is 4 standard errors over independent samples.
"""

import math

import numpy as np
import pytest
from scipy import stats

from mfsde.analysis import score_matching
from mfsde.analysis.entropy import fisher

SE = 4.0


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def mean_and_error(values):
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def quadratic(x, w=1.0):
    return -0.5 * x.square().sum(-1) / w


def test_the_jackknife_of_score_matching_is_the_one_by_hand(rng):
    x = rng.normal(1.0, 1.3, size=(60, 2))
    basis = score_matching.Basis.of(2, 2, None)
    # Standardisation is part of the basis, so its map must be frozen for the comparison.
    functions = [basis._functions(x[:, k], k) for k in range(2)]
    psi = np.prod([functions[k][0][basis.powers[:, k]] for k in range(2)], axis=0).T
    slopes = basis(x, -x)[1]

    def q(keep):
        b, m = slopes[keep].mean(0), psi[keep].T @ psi[keep] / keep.sum()
        return float(np.sum(b * np.linalg.solve(m, b)))

    n = len(x)
    without = [q(np.arange(n) != i) for i in range(n)]
    by_hand = n * q(np.ones(n, bool)) - (n - 1) * np.mean(without)
    assert fisher(x, reference=lambda y: -y, degree=2) == pytest.approx(by_hand, rel=1e-9)
    assert q(np.ones(n, bool)) - by_hand > 0.05


def test_the_basis_holds_slopes_that_are_derivatives(rng):
    x, step = rng.uniform(0.5, 2.5, size=(50, 2)), 1e-6
    basis = score_matching.Basis.of(2, 3, (3.0, math.inf))
    # On a circle every order counts twice: 4 + 2·3 + 2·2 + 2·1 products of total order <= 3.
    assert basis.size == 16
    value, slope = basis(x, np.zeros_like(x))
    up, down = (basis(x + np.array([s, 0.0]), np.zeros_like(x))[0] for s in (step, -step))
    assert np.allclose(slope[:, :, 0], (up - down) / (2 * step), atol=1e-7)
    z, spread = (x[:, 1] - x[:, 1].mean()) / x[:, 1].std(), x[:, 1].std()
    column = int(np.flatnonzero((basis.powers == (0, 3)).all(1))[0])
    assert np.allclose(value[:, column], (z**3 - 3 * z) / math.sqrt(6))
    assert np.allclose(slope[:, column, 1], (3 * z**2 - 3) / math.sqrt(6) / spread)


def test_at_equilibrium_score_matching_scatters_around_zero_and_a_kernel_density_does_not(rng):
    # N(0.05, 1.1²) against N(0, 1): I = v (1 - 1/v)² + m² = 0.03895.
    v, m = 1.21, 0.05
    truth = v * (1 - 1 / v) ** 2 + m**2
    x = rng.normal(m, math.sqrt(v), size=(40, 500, 1))
    mean, error = mean_and_error(fisher(x, reference=quadratic))
    assert abs(mean - truth) < SE * error
    assert error < truth / 4

    def by_kernels(sample):
        density = stats.gaussian_kde(sample)
        step = 1e-4
        score = (density.logpdf(sample + step) - density.logpdf(sample - step)) / (2 * step)
        return np.mean((score + sample) ** 2)

    kernels = np.array([by_kernels(sample[:, 0]) for sample in x[:8]])
    assert abs(kernels.mean() - truth) > SE * kernels.std(ddof=1) / math.sqrt(8)
    mean, error = mean_and_error(fisher(rng.normal(size=(40, 500, 1)), reference=quadratic))
    assert abs(mean) < SE * error
