"""Transport on the line and on the circle against linear programs, brute-force quadrature and Monte Carlo.

Statistical tolerances are 4 standard errors over independent samples.
"""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from mfsde import Dirac, EmpiricalMeasure, Gaussian, Mixture, Uniform
from mfsde.analysis import line
from mfsde.analysis.wasserstein import distance, transport_cost
from mfsde.measure import Law

SE = 4.0
GAUSSIAN = Gaussian([0.3], [[2.0]])
UNIFORM = Uniform(-1.0, 2.0)
# A gap in the middle, at a level that is no dyadic fraction.
GAPPED = Mixture([Gaussian([-2.0], [[0.01]]), Gaussian([1.0], [[0.25]])], [0.3, 0.7])
LAWS = {"gaussian": GAUSSIAN, "uniform": UNIFORM, "mixture": GAPPED}


class Quantile(Law):
    """A law on the line that states its quantile function and nothing else."""

    dim = 1

    def __init__(self, function):
        self.quantile = function

    def from_variates(self, z):
        return self.quantile(torch.special.ndtr(z))

    def as_measure(self):
        raise NotImplementedError


def rng(seed=3):
    return np.random.default_rng(seed)


def quantile(law, u):
    return law.quantile(torch.from_numpy(u)).numpy()


def grid(edges, nodes):
    """Midpoints and weights, many in every interval and crowded at its ends: u = a + (b - a) sin²(πs/2)."""
    s = (np.arange(nodes) + 0.5) / nodes
    widths = np.diff(edges)[:, None]
    u = edges[:-1, None] + widths * np.sin(math.pi * s / 2) ** 2
    return u.ravel(), (widths * math.pi / 2 * np.sin(math.pi * s) / nodes).ravel()


def by_program(x, p, y, q, power, length=None):
    gap = np.abs(x[:, None] - y[None])
    if length is not None:
        gap = np.abs(gap - length * np.round(gap / length))
    return transport_cost(p, q, gap**power)


def measures(n, m, weighted, seed=3, spread=1.0):
    """Two samples on the line with masses."""
    r = rng(seed)
    x, y = r.normal(size=n) * spread, r.normal(0.3, 1.4, size=m) * spread
    if not weighted:
        return x, np.full(n, 1 / n), y, np.full(m, 1 / m)
    return x, r.dirichlet(np.ones(n)), y, r.dirichlet(np.ones(m))


# Samples


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize(("n", "m", "weighted"), [(40, 40, False), (40, 55, False), (40, 55, True), (1, 7, True)])
def test_sorting_is_the_linear_program(n, m, weighted, power):
    x, p, y, q = measures(n, m, weighted)
    masses = (p, q) if weighted else (None, None)
    found = line.cost(x, masses[0], y, masses[1], power)
    assert found == pytest.approx(by_program(x, p, y, q, power), rel=1e-10)
    # A planted fault: the order of one sample reversed.
    assert n == 1 or not np.isclose(np.sum(p * np.abs(x) ** power), found, rtol=1e-3)


def test_equal_masses_and_masses_that_happen_to_be_equal_agree():
    x, p, y, q = measures(31, 31, weighted=False)
    assert line.cost(x, None, y, None) == pytest.approx(line.cost(x, p, y, q), rel=1e-12)


@pytest.mark.parametrize("length", [None, 2.0])
def test_splitting_an_atom_changes_nothing(length):
    x, p, y, q = measures(9, 12, weighted=True)
    halves = np.append(x, x[0]), np.append(p, 0.25 * p[0])
    halves[1][0] *= 0.75

    def cost(points, masses):
        if length is None:
            return line.cost(points, masses, y, q)
        return line.circular_cost(points, masses, y, q, length)

    assert cost(*halves) == pytest.approx(cost(x, p), rel=1e-11)
    assert cost(np.append(x, x[0]), np.append(p, 0.25 * p[0]) / (1 + 0.25 * p[0])) != pytest.approx(
        cost(x, p), rel=1e-4
    )


# Laws


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("power", [1.0, 2.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_quantile_coupling_is_the_fine_quadrature(name, power, weighted):
    law = LAWS[name]
    x, p, _, _ = measures(7, 5, weighted)
    order = np.argsort(x)
    jumps = [0.3] if name == "mixture" else []
    edges = np.unique(np.concatenate([[0.0, 1.0], np.cumsum(p[order])[:-1], jumps]))
    u, weight = grid(edges, nodes=4000)
    atoms = x[order][np.minimum(np.searchsorted(np.cumsum(p[order]), u), len(x) - 1)]
    brute = np.sum(weight * np.abs(atoms - quantile(law, u)) ** power)
    found = line.law_cost(x, p if weighted else None, law, power)
    assert found == pytest.approx(brute, rel=2e-7)
    assert found != pytest.approx(np.sum(weight * np.abs(atoms + 0.01 - quantile(law, u)) ** power), rel=1e-5)


def test_the_closed_form_of_a_gaussian_is_its_integral():
    x, p, _, _ = measures(25, 5, weighted=True)
    same = Quantile(GAUSSIAN.quantile)
    for masses in (None, p):
        assert line.law_cost(x, masses, GAUSSIAN) == pytest.approx(line.law_cost(x, masses, same), rel=1e-10)
    means, within = line.even_cells(GAUSSIAN, 25)
    other, also_within = line.even_cells(same, 25)
    np.testing.assert_allclose(means, other, rtol=0, atol=1e-11)
    assert within == pytest.approx(also_within, rel=1e-9)


def test_a_law_of_one_point_is_a_sample_of_one_point():
    x, p, _, _ = measures(25, 5, weighted=True)
    assert line.law_cost(x, p, Dirac(0.4)) == pytest.approx(np.sum(p * (x - 0.4) ** 2), rel=1e-12)


def test_laws_have_the_closed_forms():
    a, b = Gaussian([1.0], [[4.0]]), Gaussian([0.0], [[0.25]])
    assert distance(a, b) == pytest.approx(math.sqrt(1 + 1.5**2), rel=1e-12)
    assert line.laws_cost(a, b) == pytest.approx(1 + 1.5**2, rel=1e-10)
    # E|1 + 1.5 Z| of a folded normal.
    folded = 1.5 * math.sqrt(2 / math.pi) * math.exp(-1 / 4.5) + math.erf(1 / (1.5 * math.sqrt(2)))
    assert distance(a, b, p=1) == pytest.approx(folded, rel=1e-10)
    assert distance(Uniform(0.0, 1.0), Uniform(1.0, 3.0)) == pytest.approx(math.sqrt(1 + 1 + 1 / 3), rel=1e-12)
    assert distance(GAPPED, Dirac(0.0)) ** 2 == pytest.approx(float(GAPPED.cov[0, 0] + GAPPED.mean[0] ** 2), rel=1e-10)
    assert distance(GAPPED, GAPPED) == 0.0


def test_float32_at_an_offset_costs_no_digits_against_a_law():
    offset = 10_000.0003
    x = (offset + rng().normal(size=60)).astype(np.float32)
    law, masses = Gaussian([offset], [[1.0]]), np.full(60, 1 / 60)
    assert line.law_cost(x, masses, law) == pytest.approx(line.law_cost(x.astype(float), masses, law), rel=1e-12)


@pytest.mark.parametrize(
    "function",
    [lambda u: torch.tan(math.pi * (u - 0.5)), lambda u: u * math.nan],
    ids=["no second moment", "not a number"],
)
def test_an_integral_that_does_not_converge_raises(function):
    for attempt in (
        lambda law: line.law_cost(rng().normal(size=20), None, law),
        lambda law: line.sampling_cost(law, 3),
    ):
        with pytest.raises(RuntimeError, match=r"did not converge .* does the law have the moment"):
            attempt(Quantile(function))


def test_cells_of_a_symmetric_law_converge_although_they_cancel():
    law = Mixture([Gaussian([-1.0], [[0.1]]), Gaussian([1.0], [[0.1]])])
    means, within = line.even_cells(law, 1)
    assert abs(means[0]) < 1e-10
    assert within == pytest.approx(1.1, rel=1e-10)


# The circle


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
@pytest.mark.parametrize(("n", "m", "weighted"), [(20, 20, False), (15, 23, False), (15, 23, True), (12, 12, True)])
@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])
def test_shifted_couplings_are_the_linear_program_on_the_circle(n, m, weighted, power, spread):
    length = 2.0
    x, p, y, q = measures(n, m, weighted, spread=spread)
    y = y + 0.9
    masses = (p, q) if weighted else (None, None)
    found = line.circular_cost(x, masses[0], y, masses[1], length, power)
    assert found == pytest.approx(by_program(x, p, y, q, power, length), rel=1e-9, abs=1e-13)


def test_the_circle_has_no_origin():
    x, p, y, q = measures(30, 30, weighted=True)
    plain = line.circular_cost(x, p, y, q, 3.0)
    for turn in (0.4, 1.7, -8.3):
        assert line.circular_cost(x + turn, p, y + turn, q, 3.0) == pytest.approx(plain, rel=1e-9)
    assert line.circular_cost(x + 0.4, p, y, q, 3.0) != pytest.approx(plain, rel=1e-2)
    assert line.circular_cost(x, None, x + 3.0, None, 3.0) < 1e-25


def test_the_circle_is_no_longer_than_the_line():
    x, p, y, q = measures(30, 40, weighted=True)
    assert line.circular_cost(x, p, y, q, 2.0) < 0.9 * line.cost(x, p, y, q)
    # So long that nobody goes round.
    assert line.circular_cost(x, p, y, q, 100.0) == pytest.approx(line.cost(x, p, y, q), rel=1e-10)
    period = EmpiricalMeasure(torch.tensor([[0.01]], dtype=torch.float64), period=1.0)
    assert distance(period, np.array([[0.99]])) == pytest.approx(0.02, rel=1e-9)


# The floor


def monte_carlo(law, n, repeats, seed=11):
    """Mean and standard error of W₂²(m_N, m) over independent samples."""
    x = np.sort(law.sample(repeats * n, torch.Generator().manual_seed(seed)).numpy().reshape(repeats, n), axis=1)
    means, within = line.even_cells(law, n)
    squared = np.square(x - means).mean(1) + within
    return squared.mean(), squared.std(ddof=1) / math.sqrt(repeats)


@pytest.mark.parametrize(("n", "repeats"), [(1, 20_000), (2, 20_000), (20, 4000), (500, 800)])
@pytest.mark.parametrize("name", LAWS)
def test_the_sampling_cost_is_the_mean_over_samples(name, n, repeats):
    law = LAWS[name]
    mean, error = monte_carlo(law, n, repeats)
    assert abs(mean - line.sampling_cost(law, n)) < SE * error
    # A planted fault: the floor of three quarters of the variance.
    assert abs(mean - 0.75 * line.sampling_cost(law, n)) > SE * error


def test_the_sampling_cost_has_its_closed_forms():
    # One point: two independent draws differ by twice the variance. Two: E X_(2) = σ/√π against a cell mean σ√(2/π).
    assert line.sampling_cost(GAUSSIAN, 1) == pytest.approx(4.0, rel=1e-9)
    assert line.sampling_cost(GAUSSIAN, 2) == pytest.approx(2 * 2 * (1 - math.sqrt(2) / math.pi), rel=1e-9)
    assert line.sampling_cost(GAPPED, 1) == pytest.approx(2 * float(GAPPED.cov[0, 0]), rel=1e-9)
    for n in (1, 2, 7, 20, 199, 200, 500, 3000):
        assert line.sampling_cost(UNIFORM, n) == pytest.approx(9 / (6 * n), rel=1e-8)
        assert line.sampling_cost(Dirac(0.4), n) == 0.0


@pytest.mark.parametrize("n", [1, 2, 20, 500, 3000])
def test_the_sampling_cost_of_two_points_is_a_binomial_deviation(n):
    # W₂² between p̂ and p on {0, 1} is |p̂ - p|; its mean is of order N^{-1/2}, as for every law with a gap.
    law = Mixture([Dirac(0.0), Dirac(1.0)], [0.7, 0.3])
    k = np.arange(n + 1)
    exact = float(np.sum(stats.binom.pmf(k, n, 0.3) * np.abs(k / n - 0.3)))
    assert line.sampling_cost(law, n) == pytest.approx(exact, rel=1e-5)


def test_a_law_without_quantiles_is_refused():
    for law in (Gaussian([0.0, 0.0], 1.0), Uniform([0.0, 0.0], 1.0)):
        with pytest.raises(ValueError, match=r"has no quantile function; .* Sample the law"):
            line.law_cost(np.zeros(3), None, law)
