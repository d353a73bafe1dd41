"""The convex problem over measures of features: closed forms, all supports tried, and certificates that hold."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mfsde import limit
from mfsde.limit.convex import features_of_gram, sparse_measure, sparse_measure_over


def problem(n: int, m: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draws = np.random.default_rng(seed)
    return draws.standard_normal((n, m)), draws.standard_normal(n)


def objective(a: np.ndarray, y: np.ndarray, penalty: float, w: np.ndarray) -> float:
    return float(0.5 * np.square(a @ w - y).sum() + penalty * np.abs(w).sum())


def best_of_all_signs(a: np.ndarray, y: np.ndarray, penalty: float, signs: tuple[int, ...]) -> float:
    """The least objective over all supports and signs: quadratic problems, admissible where the signs come out."""
    found = [objective(a, y, penalty, np.zeros(a.shape[1]))]
    for chosen in itertools.product(signs, repeat=a.shape[1]):
        s = np.array(chosen, dtype=float)
        used = s != 0
        if not used.any():
            continue
        w = np.zeros(a.shape[1])
        w[used] = np.linalg.solve(a[:, used].T @ a[:, used], a[:, used].T @ y - penalty * s[used])
        if (w[used] * s[used] > 0).all():
            found.append(objective(a, y, penalty, w))
    return min(found)


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_best_of_all_supports(seed):
    a, y = problem(6, 5, seed)
    for nonnegative, signs in ((False, (-1, 0, 1)), (True, (0, 1))):
        found = sparse_measure(a, y, 0.4, nonnegative=nonnegative)
        assert found.objective == pytest.approx(best_of_all_signs(a, y, 0.4, signs), rel=1e-12)
        assert found.objective == pytest.approx(objective(a, y, 0.4, found.weights), rel=1e-13)
        assert not nonnegative or found.weights.min() >= 0


def test_orthonormal_features_are_thresholded():
    q, _ = np.linalg.qr(problem(7, 7)[0])
    y = problem(7, 7)[1]
    pull = q.T @ y
    np.testing.assert_allclose(
        sparse_measure(q, y, 0.5).weights, np.sign(pull) * np.maximum(abs(pull) - 0.5, 0), atol=1e-14
    )
    assert len(sparse_measure(q, y, 1.01 * abs(pull).max()).support) == 0


@pytest.mark.parametrize(("n", "m"), [(20, 10), (12, 4000), (40, 200)])
@pytest.mark.parametrize("nonnegative", [False, True])
def test_the_gap_is_small_and_the_dual_is_what_it_says(n, m, nonnegative):
    a, y = problem(n, m)
    found = sparse_measure(a, y, 0.3, nonnegative=nonnegative)
    assert 0 <= found.gap <= 1e-10 * found.objective
    pull = a.T @ found.dual / 0.3
    assert (pull if nonnegative else abs(pull)).max() <= 1 + 1e-12
    assert 0.5 * y @ y - 0.5 * np.square(y - found.dual).sum() == pytest.approx(found.objective, rel=1e-10)
    np.testing.assert_allclose(found.certificate, pull, atol=1e-12)
    np.testing.assert_allclose(pull[found.support], np.sign(found.weights[found.support]), atol=1e-9)
    # Any other admissible ν is a lower bound, any other w an upper one.
    nu = 0.5 * found.dual
    assert 0.5 * y @ y - 0.5 * np.square(y - nu).sum() < found.objective < objective(a, y, 0.3, 1.01 * found.weights)


def test_equal_and_dependent_features_share_what_one_would_have():
    a, y = problem(5, 3)
    alone = sparse_measure(a, y, 0.2)
    repeated = sparse_measure(np.concatenate([a, a, a[:, :1] + a[:, 1:2]], axis=1), y, 0.2)
    assert repeated.gap <= 1e-10 * repeated.objective
    # The sum of two features costs one penalty instead of two.
    assert repeated.objective <= alone.objective + 1e-13


def test_a_gram_matrix_is_enough():
    a, y = problem(9, 6)
    from_gram = sparse_measure(*features_of_gram(a.T @ a, a.T @ y, y @ y), 0.3)
    np.testing.assert_allclose(from_gram.weights, sparse_measure(a, y, 0.3).weights, atol=1e-9)
    with pytest.raises(ValueError, match="has the eigenvalue -"):
        features_of_gram(-np.eye(2), np.zeros(2), 1.0)


# A continuum: trigonometric features e^{ikθ}, |k| <= 3, of norm 1 ----------------------------------------

PLACES, SIZES, PENALTY = np.array([[0.7], [2.9], [4.6]]), np.array([1.0, -0.9, 1.2]), 0.05
CIRCLE = np.arange(200)[:, None] / 200 * 2 * np.pi


def dirichlet(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return sum(np.cos(k * (a - b.T)) for k in range(-3, 4)) / 7


def over_the_circle(**changed) -> limit.convex.SparseMeasure:
    given = {
        "kernel": dirichlet, "pull": lambda x: dirichlet(x, PLACES) @ SIZES,
        "square": SIZES @ dirichlet(PLACES, PLACES) @ SIZES, "penalty": PENALTY, "grid": CIRCLE,
        "spacing": 2 * np.pi / 200, **changed,
    }  # fmt: skip
    return sparse_measure_over(**given)


def test_the_minimum_over_the_circle_is_below_every_grid_and_above_its_dual():
    found = over_the_circle()
    assert 0 <= found.gap <= 1e-10 * found.objective
    errors = []
    for m in (50, 100, 200, 400):
        grid = np.arange(m)[:, None] / m * 2 * np.pi + 0.01
        a, y = features_of_gram(
            dirichlet(grid, grid), dirichlet(grid, PLACES) @ SIZES, SIZES @ dirichlet(PLACES, PLACES) @ SIZES
        )
        errors.append(sparse_measure(a, y, PENALTY).objective - found.objective)
    assert min(errors) > 0
    assert errors[-1] < 1e-4
    assert errors[0] > 10 * errors[-1]
    # Spikes near the planted ones, the certificate their sign.
    assert np.abs(found.nodes - PLACES.T).min(1).max() < 0.1
    np.testing.assert_allclose(found.certificate, np.sign(found.weights), atol=1e-6)
    assert found.weights.sum() == pytest.approx(SIZES.sum(), abs=0.3)


def test_a_problem_that_has_no_spike_has_the_minimum_zero_measure():
    found = over_the_circle(penalty=10.0)
    assert len(found.weights) == 0
    assert found.objective == pytest.approx(0.5 * SIZES @ dirichlet(PLACES, PLACES) @ SIZES)


# Refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "y", "penalty", "what"),
    [
        (np.ones((3, 2)), np.ones(2), 0.1, "expected \\(n, m\\)"),
        (np.ones(3), np.ones(3), 0.1, "expected \\(n, m\\)"),
        (np.ones((3, 2)), np.ones(3), 0.0, "penalty = 0.0 is not positive"),
        (np.full((3, 2), np.nan), np.ones(3), 0.1, "not finite"),
    ],
)
def test_impossible_problems_are_refused(a, y, penalty, what):
    with pytest.raises(ValueError, match=what):
        sparse_measure(a, y, penalty)


def test_a_grid_without_rows_is_refused():
    with pytest.raises(ValueError, match=r"a grid of shape \(200,\); expected \(g, p\)"):
        over_the_circle(grid=CIRCLE[:, 0])


def test_a_gap_that_is_not_reached_raises(monkeypatch):
    a, y = problem(20, 40)
    with pytest.raises(RuntimeError, match="duality gap"):
        sparse_measure(a, y, 0.1, tolerance=0.0)
    monkeypatch.setattr(limit.convex, "MOST_ROUNDS", 1)
    with pytest.raises(RuntimeError, match="after 1 exchanges the duality gap"):
        over_the_circle()
