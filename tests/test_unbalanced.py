"""Unbalanced transport against closed forms, its dynamic definition, and independent solvers."""

import math

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.optimize import linprog, minimize
from scipy.spatial.distance import cdist

import mfsde
from mfsde import EmpiricalMeasure, Gaussian
from mfsde.analysis import unbalanced, wasserstein
from mfsde.analysis.unbalanced import (
    bounded_lipschitz,
    bounded_lipschitz_between,
    entropy_transport,
    hellinger_kantorovich,
    hellinger_kantorovich_between,
    wasserstein_fisher_rao,
)
from mfsde.scenarios.mean_field_ou import MeanFieldOU


def dirac(x, mass=1.0):
    return np.atleast_2d(np.asarray(x, dtype=float)), np.array([float(mass)])


def random_measure(rng, n, d=2, mass=None):
    masses = rng.exponential(size=n)
    return rng.normal(size=(n, d)), masses if mass is None else mass * masses / masses.sum()


def cost(x, y, length=1.0):
    """c = -2 log cos(r/ℓ), infinite from πℓ/2 on, entry by entry from the definition."""
    r = cdist(x, y) / length
    return np.array([[-2 * math.log(math.cos(z)) if z < math.pi / 2 else math.inf for z in row] for row in r])


def divergence(r, p):
    return sum((a * math.log(a / b) if a > 0 else 0.0) - a + b for a, b in zip(r, p, strict=True))


def objective(plan, c, p, q):
    moved = float(np.sum(plan[np.isfinite(c)] * c[np.isfinite(c)]))
    return moved + divergence(plan.sum(1), p) + divergence(plan.sum(0), q)


# Hellinger–Kantorovich: two Diracs and the dynamic definition


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (0.3, 2.0), (5.0, 1e-3)])
@pytest.mark.parametrize("r", [0.0, 1e-3, 0.7, 1.5, 1.5707, 1.58, 2.5, 40.0])
@pytest.mark.parametrize("length", [0.5, 1.0, 3.0])
def test_two_diracs_have_the_closed_form(a, b, r, length):
    found = hellinger_kantorovich(dirac([0.0, 0.0], a), dirac([0.0, r * length], b), length=length) ** 2
    assert found == pytest.approx(a + b - 2 * math.sqrt(a * b) * math.cos(min(r, math.pi / 2)), abs=2e-12 * (a + b))


def test_two_diracs_beyond_the_cut_are_destroyed_and_created():
    found = hellinger_kantorovich(dirac(0.0), dirac(2.0)) ** 2
    assert found == pytest.approx(2.0, abs=1e-12)
    # A planted fault: the cone's own angle, cut at π in place of π/2, would be more expensive than that.
    assert abs(found - (2 - 2 * math.cos(2.0))) > 0.5


def cone_path(a, b, angle, t):
    """Mass, position and their derivatives along the straight line between (√a, 0) and (√b, angle) in the plane."""
    x = (1 - t) * math.sqrt(a) + t * math.sqrt(b) * math.cos(angle)
    y = t * math.sqrt(b) * math.sin(angle)
    dx, dy = -math.sqrt(a) + math.sqrt(b) * math.cos(angle), math.sqrt(b) * math.sin(angle)
    mass = x**2 + y**2
    return mass, np.arctan2(y, x), 2 * (x * dx + y * dy), (x * dy - y * dx) / mass


@pytest.mark.parametrize(("a", "b", "r"), [(1.0, 1.0, 1.2), (0.4, 2.5, 0.8), (1.0, 0.05, 1.5)])
def test_both_distances_are_the_actions_of_the_travelling_dirac(a, b, r):
    # ρ_t = m(t) δ_{x(t)}: HK² = ∫ (|x'|²/ℓ² + ¼ (m'/m)²) m dt, WFR² = ∫ (½|x'|² + ½δ² (m'/m)²) m dt.
    length, delta = 1.7, 0.85
    nodes, weights = np.polynomial.legendre.leggauss(200)
    mass, _, growth, turn = cone_path(a, b, r / length, 0.5 + 0.5 * nodes)
    speed, rate = length * turn, growth / mass
    action = float(np.sum(0.5 * weights * mass * (speed**2 / length**2 + 0.25 * rate**2)))
    fisher = float(np.sum(0.5 * weights * mass * (0.5 * speed**2 + 0.5 * delta**2 * rate**2)))
    measures = dirac(0.0, a), dirac(r, b)
    assert hellinger_kantorovich(*measures, length=length) ** 2 == pytest.approx(action, rel=1e-10)
    assert wasserstein_fisher_rao(*measures, delta=delta) ** 2 == pytest.approx(fisher, rel=1e-10)
    assert wasserstein_fisher_rao(*measures, delta=delta) == pytest.approx(
        math.sqrt(2) * delta * hellinger_kantorovich(*measures, length=2 * delta), rel=1e-12
    )
    # A planted fault: the scale δ in place of 2δ.
    assert wasserstein_fisher_rao(*measures, delta=2 * delta) ** 2 != pytest.approx(fisher, rel=1e-2)


def test_no_path_of_a_dirac_costs_less():
    # Masses and positions bent away from the geodesic, ends fixed.
    a, b, r = 0.5, 1.5, 1.1
    t = (np.arange(4000) + 0.5) / 4000
    mass, x, growth, turn = cone_path(a, b, r, t)
    least = hellinger_kantorovich(dirac(0.0, a), dirac(r, b)) ** 2
    for size in (-0.3, -0.1, 0.1, 0.3):
        bump, slope = size * np.sin(np.pi * t), size * np.pi * np.cos(np.pi * t)
        heavier = np.mean(mass * np.exp(bump) * (turn**2 + 0.25 * (growth / mass + slope) ** 2))
        further = np.mean(mass * ((turn + slope) ** 2 + 0.25 * (growth / mass) ** 2))
        assert min(heavier, further) > least + 1e-3
    assert np.mean(mass * (turn**2 + 0.25 * (growth / mass) ** 2)) == pytest.approx(least, rel=1e-6)
    assert x[0] < 1e-3


def midpoint(a, b, length, t=0.5):
    """ρ_t of the geodesic: every pair of the lifted plan travels as two Diracs; mass outside its support fades."""
    (x, p), (y, q) = a, b
    plan = entropy_transport(cost(x, y, length), p, q).plan
    r, s = plan.sum(1), plan.sum(0)
    points, masses = [], []
    for i, j in np.argwhere(plan > 0):
        start, end = plan[i, j] * p[i] / r[i], plan[i, j] * q[j] / s[j]
        apart = float(np.linalg.norm(x[i] - y[j])) / length
        mass, angle, _, _ = cone_path(start, end, apart, np.array(t))
        share = float(angle) / apart if apart > 0 else 0.0
        points.append((1 - share) * x[i] + share * y[j])
        masses.append(float(mass))
    points += [*x[r == 0], *y[s == 0]]
    masses += [*((1 - t) ** 2 * p[r == 0]), *(t**2 * q[s == 0])]
    return np.array(points), np.array(masses)


@pytest.mark.parametrize("seed", range(3))
def test_distances_add_up_along_the_geodesic_that_the_plan_gives(seed):
    rng = np.random.default_rng(seed)
    a, b, length = random_measure(rng, 12), random_measure(rng, 9), 0.9
    whole = hellinger_kantorovich(a, b, length=length)
    for t in (0.25, 0.5):
        middle = midpoint(a, b, length, t)
        assert hellinger_kantorovich(a, middle, length=length) == pytest.approx(t * whole, rel=1e-7)
        assert hellinger_kantorovich(middle, b, length=length) == pytest.approx((1 - t) * whole, rel=1e-7)
    # A planted fault: masses interpolated linearly are off the geodesic.
    straight = np.concatenate([a[0], b[0]]), np.concatenate([0.5 * a[1], 0.5 * b[1]])
    legs = [hellinger_kantorovich(z, straight, length=length) for z in (a, b)]
    assert sum(legs) > whole * (1 + 1e-3)


# The solver


@pytest.mark.parametrize("seed", range(6))
def test_it_agrees_with_a_general_minimiser(seed):
    rng = np.random.default_rng(seed)
    (x, p), (y, q) = random_measure(rng, 4), random_measure(rng, 3)
    c = cost(x, y, 0.8)
    inside = np.isfinite(c)

    def value(root):
        plan = np.zeros_like(c)
        plan[inside] = root**2
        return objective(plan, c, p, q)

    best = minimize(value, np.full(int(inside.sum()), 0.5), method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-9})
    found = entropy_transport(c, p, q)
    assert found.value == pytest.approx(best.fun, abs=1e-7)
    assert found.bound <= best.fun
    assert hellinger_kantorovich((x, p), (y, q), length=0.8) ** 2 == pytest.approx(found.value, rel=1e-12)
    # A planted fault: -log cos in place of -log cos².
    assert entropy_transport(0.5 * c, p, q).value < best.fun - 1e-3


@pytest.mark.parametrize("length", [0.05, 0.3, 1.0, 20.0])
def test_a_large_problem_is_solved_to_a_certified_gap(length):
    rng = np.random.default_rng(3)
    (x, p), (y, q) = random_measure(rng, 300, mass=1.0), random_measure(rng, 240, mass=1.7)
    c = cost(x, y, length)
    found = entropy_transport(c, p, q)
    assert abs(found.value - found.bound) <= 1e-12 * 2.7
    assert found.value == pytest.approx(objective(found.plan, c, p, q), abs=1e-12)
    assert (found.plan >= 0).all()
    assert (found.plan[np.isinf(c)] == 0).all()
    # At the optimum plans of the same shape have the right size: HK² = |μ| + |ν| - 2|P|.
    assert found.value == pytest.approx(2.7 - 2 * found.plan.sum(), abs=1e-7)


@pytest.mark.parametrize("case", ["grid", "duplicates", "wide masses", "at the cut", "nearly equal"])
def test_degenerate_problems_are_certified_too(case):
    rng = np.random.default_rng(5)
    grid = np.stack(np.meshgrid(np.arange(7.0), np.arange(7.0)), -1).reshape(-1, 2)
    x, y = rng.normal(size=(60, 2)), rng.normal(size=(60, 2))
    even = np.full(60, 1 / 60)
    wide = 10.0 ** rng.uniform(-12, 0, 60)
    a, b, length = {
        "grid": ((grid, np.full(49, 1 / 49)), (grid + 0.5, np.full(49, 1 / 49)), 2.0),
        "duplicates": ((np.repeat(x[:15], 4, 0), even), (np.repeat(y[:15], 4, 0), even), 1.0),
        "wide masses": ((x, wide), (y, wide[::-1]), 1.0),
        "at the cut": (dirac(0.0), dirac(np.nextafter(math.pi / 2, 0)), 1.0),
        "nearly equal": ((x, even), (x + 1e-6 * y, even), 1.0),
    }[case]
    found = entropy_transport(cost(a[0], b[0], length), a[1], b[1])
    assert abs(found.value - found.bound) <= 1e-12 * (a[1].sum() + b[1].sum())


def test_an_uncertified_gap_raises(monkeypatch):
    monkeypatch.setattr(unbalanced, "ITERATIONS", 4)
    rng = np.random.default_rng(3)
    with pytest.raises(RuntimeError, match=r"the gap between primal and dual value is \d"):
        hellinger_kantorovich(random_measure(rng, 20), random_measure(rng, 20))


# Hellinger–Kantorovich as a metric


def test_a_measure_is_at_distance_zero_from_itself():
    rng = np.random.default_rng(0)
    for n, d in ((1, 1), (50, 2), (120, 6)):
        a = random_measure(rng, n, d, mass=1.0)
        assert hellinger_kantorovich(a, a) <= 1e-6
        order = rng.permutation(n)
        assert hellinger_kantorovich(a, (a[0][order], a[1][order])) <= 1e-6
        assert hellinger_kantorovich(a, (a[0] + 1e-3, a[1])) > 5e-4


def test_splitting_an_atom_changes_nothing():
    rng = np.random.default_rng(1)
    a, b = random_measure(rng, 8), random_measure(rng, 5)
    halves = np.concatenate([a[0], a[0]]), np.concatenate([0.3 * a[1], 0.7 * a[1]])
    assert hellinger_kantorovich(halves, b) == pytest.approx(hellinger_kantorovich(a, b), rel=1e-10)
    with_nothing = np.concatenate([a[0], [[9.0, 9.0]]]), np.append(a[1], 0.0)
    assert hellinger_kantorovich(with_nothing, b) == pytest.approx(hellinger_kantorovich(a, b), rel=1e-12)


def test_it_is_symmetric_and_homogeneous_in_the_masses():
    rng = np.random.default_rng(2)
    a, b = random_measure(rng, 20), random_measure(rng, 30)
    one = hellinger_kantorovich(a, b)
    assert hellinger_kantorovich(b, a) == pytest.approx(one, rel=1e-11)
    for scale in (1e-200, 1e-6, 7.0, 1e9):
        scaled = hellinger_kantorovich((a[0], scale * a[1]), (b[0], scale * b[1]))
        assert scaled == pytest.approx(math.sqrt(scale) * one, rel=1e-10)


@pytest.mark.parametrize("seed", range(8))
def test_the_triangle_inequality_holds(seed):
    rng = np.random.default_rng(seed)
    a, b, c = (random_measure(rng, n, mass=m) for n, m in ((6, 1.0), (5, 2.5), (7, 0.3)))
    for f in (
        hellinger_kantorovich,
        lambda u, v: wasserstein_fisher_rao(u, v, delta=0.4),
        bounded_lipschitz,
        lambda u, v: bounded_lipschitz(u, v, convention="sum"),
    ):
        ab, bc, ac = f(a, b), f(b, c), f(a, c)
        assert ac <= ab + bc + 1e-9
        assert ab <= ac + bc + 1e-9
        assert bc <= ab + ac + 1e-9


def test_the_square_does_not_satisfy_the_triangle_inequality():
    # The twin: the inequality above is sharp enough to see a square in place of a root.
    ab, bc, ac = (hellinger_kantorovich(dirac(x), dirac(y)) ** 2 for x, y in ((0, 0.5), (0.5, 1.0), (0, 1.0)))
    assert ac > 1.5 * (ab + bc)


def test_clusters_that_cannot_exchange_mass_add_up():
    rng = np.random.default_rng(4)
    a, b, c, d = (random_measure(rng, n) for n in (6, 7, 8, 9))
    far = np.array([100.0, 0.0])
    both = (
        (np.concatenate([a[0], c[0] + far]), np.concatenate([a[1], c[1]])),
        (np.concatenate([b[0], d[0] + far]), np.concatenate([b[1], d[1]])),
    )
    parts = hellinger_kantorovich(a, b) ** 2 + hellinger_kantorovich(c, d) ** 2
    assert hellinger_kantorovich(*both) ** 2 == pytest.approx(parts, rel=1e-11)


def test_a_measure_without_mass_costs_what_the_other_weighs():
    a, nothing = (np.zeros((2, 3)), np.array([1.0, 1.5])), (np.zeros((1, 3)), np.zeros(1))
    assert hellinger_kantorovich(a, nothing) == pytest.approx(math.sqrt(2.5), rel=1e-15)
    assert hellinger_kantorovich(nothing, a) == pytest.approx(math.sqrt(2.5), rel=1e-15)
    assert hellinger_kantorovich(nothing, nothing) == 0.0
    for convention in ("max", "sum"):
        assert bounded_lipschitz(a, nothing, convention=convention) == pytest.approx(2.5, rel=1e-15)


# Limits in the length


def test_small_lengths_give_hellinger():
    rng = np.random.default_rng(6)
    x, p, q = rng.normal(size=(30, 2)), rng.exponential(size=30), rng.exponential(size=30)
    q[:3], p[-2:] = 0.0, 0.0
    hellinger = float(np.sum((np.sqrt(p) - np.sqrt(q)) ** 2))
    assert hellinger_kantorovich((x, p), (x, q), length=1e-4) ** 2 == pytest.approx(hellinger, rel=1e-12)
    small = wasserstein_fisher_rao((x, p), (x, q), delta=5e-5) / (math.sqrt(2) * 5e-5)
    assert small**2 == pytest.approx(hellinger, rel=1e-12)
    # Without a common atom nothing can be kept.
    apart = hellinger_kantorovich((x, p), (x + 1.0, q), length=1e-4) ** 2
    assert apart == pytest.approx(p.sum() + q.sum(), rel=1e-12)
    assert apart > 1.5 * hellinger


def test_large_lengths_give_wasserstein():
    rng = np.random.default_rng(7)
    x, y = rng.normal(size=(40, 2)), rng.normal(0.5, 1.2, size=(40, 2))
    w2 = wasserstein.distance(x, y)
    errors = []
    for length in (10.0, 20.0, 40.0):
        scaled = length * hellinger_kantorovich(x, y, length=length)
        errors.append(w2 - scaled)
        assert wasserstein_fisher_rao(x, y, delta=length / 2) == pytest.approx(scaled / math.sqrt(2), rel=1e-12)
    # From below, with error O(ℓ⁻²): -2 log cos z = z² + O(z⁴), and the marginals move by O(ℓ⁻²).
    assert 0 < errors[2] < errors[1] < errors[0] < 0.05 * w2
    assert errors[0] / errors[1] == pytest.approx(4, abs=0.3)
    assert errors[1] / errors[2] == pytest.approx(4, abs=0.3)


def test_it_is_monotone_in_the_length():
    # |v|²/ℓ² + ¼α² decreases in ℓ, |v|² + ¼ℓ²α² increases.
    rng = np.random.default_rng(8)
    a, b = random_measure(rng, 15), random_measure(rng, 12)
    lengths = np.geomspace(0.05, 50, 9)
    found = np.array([hellinger_kantorovich(a, b, length=s) for s in lengths])
    assert (np.diff(found) <= 1e-12).all()
    assert (np.diff(lengths * found) >= 0).all()


# Ground metrics and inputs


def test_a_torus_and_a_sphere_use_their_own_distance():
    def on_torus(x):
        return EmpiricalMeasure(torch.tensor([[x]], dtype=torch.float64), period=2 * math.pi)

    a, b = on_torus(0.2), on_torus(2 * math.pi - 0.3)
    assert hellinger_kantorovich(a, b) ** 2 == pytest.approx(2 - 2 * math.cos(0.5), abs=1e-12)
    assert bounded_lipschitz(a, b) == pytest.approx(0.5, abs=1e-12)
    # A sample beside a measure takes its torus.
    assert bounded_lipschitz(a, np.array([[2 * math.pi - 0.3]])) == pytest.approx(0.5, abs=1e-12)
    assert bounded_lipschitz(np.array([0.2]), np.array([2 * math.pi - 0.3])) == pytest.approx(2.0)
    north, east = dirac([0.0, 0.0, 2.0]), dirac([2.0, 0.0, 0.0])
    angle = hellinger_kantorovich(north, east, length=4.0, metric="sphere") ** 2
    assert angle == pytest.approx(2 - 2 * math.cos(math.pi / 4), abs=1e-12)
    assert hellinger_kantorovich(north, east, length=4.0) ** 2 < angle - 1e-2
    with pytest.raises(ValueError, match=r"different tori"):
        hellinger_kantorovich(a, EmpiricalMeasure(torch.zeros(1, 1), period=1.0))


def test_the_three_ways_to_write_a_measure_agree():
    rng = np.random.default_rng(9)
    x, y = rng.normal(size=(10, 2)), rng.normal(size=(12, 2))
    p = rng.dirichlet(np.ones(10))
    one = hellinger_kantorovich((x, p), y)
    weighted = EmpiricalMeasure(torch.tensor(x), torch.tensor(p))
    assert hellinger_kantorovich(weighted, torch.tensor(y)) == pytest.approx(one, rel=1e-12)
    assert hellinger_kantorovich((x.tolist(), p.tolist()), EmpiricalMeasure(torch.tensor(y))) == pytest.approx(one)
    assert hellinger_kantorovich(x, y) != pytest.approx(one, rel=1e-3)


def test_bad_input_is_refused():
    good = (np.zeros((2, 2)), np.ones(2))
    for f in (hellinger_kantorovich, bounded_lipschitz):
        for bad in (np.nan, np.inf):
            with pytest.raises(ValueError, match=r"points of a: 1 of 4 values are not finite"):
                f((np.array([[0.0, 0.0], [bad, 0.0]]), np.ones(2)), good)
            with pytest.raises(ValueError, match=r"b has masses in \[.*expected finite ones ≥ 0"):
                f(good, (np.zeros((2, 2)), np.array([1.0, bad])))
        with pytest.raises(ValueError, match=r"a has masses in \[-1, 1\]; .* positive part"):
            f((np.zeros((2, 2)), np.array([1.0, -1.0])), good)
        with pytest.raises(ValueError, match=r"masses of shape \(3,\) for 2 points"):
            f((np.zeros((2, 2)), np.ones(3)), good)
        with pytest.raises(ValueError, match=r"dimensions 2 and 3"):
            f(good, np.zeros((2, 3)))
        with pytest.raises(ValueError, match=r"points of shape \(0, 2\)"):
            f(np.zeros((0, 2)), good)
        with pytest.raises(ValueError, match=r"points of shape \(2, 3, 1\).*_between"):
            f(EmpiricalMeasure(torch.zeros(2, 3, 1)), good)
        with pytest.raises(TypeError, match=r"a is a Gaussian, which has no atoms"):
            f(Gaussian([0.0], [[1.0]]), good)
        with pytest.raises(TypeError, match=r"tuple of 3"):
            f((0, 1, 2), good)
        with pytest.raises(ValueError, match=r"metric 'taxi' is unknown"):
            f(good, good, metric="taxi")
    for length in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"length = .* must be positive and finite"):
            hellinger_kantorovich(good, good, length=length)
    with pytest.raises(ValueError, match=r"delta = 0 must be positive"):
        wasserstein_fisher_rao(good, good, delta=0)
    with pytest.raises(ValueError, match=r"convention = 'mean' is unknown"):
        bounded_lipschitz(good, good, convention="mean")


def test_problems_that_are_too_large_are_refused_with_a_way_out():
    many = np.zeros((4000, 1))
    with pytest.raises(ValueError, match=r"4000 and 4000 atoms: at most 5000 together.*Subsample"):
        hellinger_kantorovich(many, many)
    more = np.zeros((20_000, 1))
    with pytest.raises(ValueError, match=r"cost matrix of 3\.0 GiB.*Subsample"):
        bounded_lipschitz(more, more)


def test_an_ill_posed_program_is_refused():
    p = np.ones(2)
    with pytest.raises(ValueError, match=r"cost has shape \(2, 3\)"):
        entropy_transport(np.zeros((2, 3)), p, p)
    with pytest.raises(ValueError, match=r"cost must be ≥ 0 and not NaN"):
        entropy_transport(np.full((2, 2), math.nan), p, p)
    with pytest.raises(ValueError, match=r"masses q must be finite"):
        entropy_transport(np.zeros((2, 2)), p, -p)


# The bounded-Lipschitz norm


@pytest.mark.parametrize("r", [0.0, 0.3, 1.9, 2.0, 7.0, 1e6])
def test_two_diracs_in_both_conventions(r):
    a, b = dirac([0.0, 0.0]), dirac([r, 0.0])
    assert bounded_lipschitz(a, b) == pytest.approx(min(r, 2), abs=1e-12)
    assert bounded_lipschitz(a, b, convention="sum") == pytest.approx(2 * r / (2 + r), abs=1e-9)


@pytest.mark.parametrize(("a", "b", "r"), [(1.0, 3.0, 0.5), (2.0, 0.25, 1.7), (1.0, 0.9, 5.0)])
def test_two_diracs_of_unequal_mass(a, b, r):
    found = bounded_lipschitz(dirac(0.0, a), dirac(r, b))
    assert found == pytest.approx(abs(a - b) + min(a, b) * min(r, 2), rel=1e-12)
    # A planted fault: the mass that is missing charged at the cost 2 of a pair.
    assert abs(found - (2 * abs(a - b) + min(a, b) * min(r, 2))) > 0.05


def dual_program(x, signed, convention):
    """Sup Σ φ_i m_i over values at the atoms and, in the sum convention, the bound s: a linear program of its own."""
    n, r = len(x), cdist(x, x)
    rows, bounds = [], []
    for i in range(n):
        for j in range(n):
            if i != j:
                row = np.zeros(n + 1)
                row[i], row[j] = 1, -1
                # φ_i - φ_j ≤ r (1 - s), s the bound on |φ|; in the max convention both bounds are 1.
                row[n] = r[i, j] if convention == "sum" else 0.0
                rows.append(row)
                bounds.append(r[i, j])
        for sign in (1, -1):
            row = np.zeros(n + 1)
            row[i], row[n] = sign, -1
            rows.append(row)
            bounds.append(0.0)
    limits = [(None, None)] * n + [(0, 1) if convention == "sum" else (1, 1)]
    found = linprog(-np.append(signed, 0.0), A_ub=np.array(rows), b_ub=bounds, bounds=limits, method="highs")
    assert found.status == 0
    return -found.fun


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("convention", ["max", "sum"])
def test_it_is_the_supremum_over_bounded_lipschitz_functions(seed, convention):
    rng = np.random.default_rng(seed)
    n, m = rng.integers(1, 9, 2)
    spread = (0.3, 1.0, 5.0)[seed % 3]
    (x, p), (y, q) = random_measure(rng, n), random_measure(rng, m, mass=(None, 1.0, 30.0, 0.01)[seed % 4])
    x, y = spread * x, spread * y
    if seed % 2:
        # Some atoms in common, whose masses cancel in part.
        y[: min(n, m)] = x[: min(n, m)]
    expected = dual_program(np.concatenate([x, y]), np.concatenate([p, -q]), convention)
    found = bounded_lipschitz((x, p), (y, q), convention=convention)
    assert found == pytest.approx(expected, abs=1e-9 * (p.sum() + q.sum()))
    # A planted fault: the other convention. (Where one side outweighs the other, φ = 1 is best in both.)
    other = bounded_lipschitz((x, p), (y, q), convention="sum" if convention == "max" else "max")
    assert seed % 4 > 1 or abs(other - expected) > 1e-3


def test_a_larger_cloud_in_the_sum_convention():
    # The maximum over the share of the bound does not depend on how it was found: a grid never beats it.
    rng = np.random.default_rng(11)
    (x, p), (y, q) = random_measure(rng, 60, mass=1.0), random_measure(rng, 50, mass=1.2)
    found = bounded_lipschitz((x, p), (y, q), convention="sum")
    r, mass = cdist(x, y), np.append(p, 0.2)

    def value(s):
        rows = np.concatenate([np.minimum((1 - s) * r, 2 * s), np.full((1, 50), s)])
        return wasserstein.transport_cost(mass, q, rows)

    grid = np.linspace(0, 1, 101)[1:-1]
    values = [value(s) for s in grid]
    assert max(values) <= found + 1e-9
    assert found <= max(values) + 1e-3
    assert bounded_lipschitz((x, p), (y, q)) > found


def test_the_norm_of_nothing_is_zero():
    rng = np.random.default_rng(12)
    a = random_measure(rng, 20, 6)
    for convention in ("max", "sum"):
        assert bounded_lipschitz(a, a, convention=convention) <= 1e-10 * a[1].sum()
        assert bounded_lipschitz(a, (a[0], 1.01 * a[1]), convention=convention) == pytest.approx(0.01 * a[1].sum())


# The labelled layer


def weighted_run(seed, n, times=3, replicas=2, shift=0.0):
    rng = np.random.default_rng(seed)
    shape = (times, replicas, n)
    masses = rng.exponential(size=shape)
    coords = {"time": 0.1 * np.arange(times), "replica": np.arange(replicas), "particle": np.arange(n)}
    return xr.Dataset(
        {
            "position": (("time", "replica", "particle", "component"), rng.normal(shift, 1, (*shape, 2))),
            "weight": (("time", "replica", "particle"), masses / masses.sum(-1, keepdims=True)),
        },
        {**coords, "sigma": 0.7},
    )


@pytest.mark.parametrize(
    ("labelled", "plain", "name"),
    [
        (hellinger_kantorovich_between, hellinger_kantorovich, "hellinger_kantorovich"),
        (bounded_lipschitz_between, bounded_lipschitz, "bounded_lipschitz"),
    ],
)
def test_runs_are_compared_time_by_time(labelled, plain, name):
    a, b = weighted_run(0, 20), weighted_run(1, 15, shift=0.5)
    found = labelled(a, b)
    assert found.dims == ("time", "replica")
    assert found.name == name
    assert {"long_name", "units", "estimator"} <= set(found.attrs)
    assert float(found.sigma) == 0.7
    for k in np.ndindex(3, 2):
        pairs = [(z.position.values[k], z.weight.values[k]) for z in (a, b)]
        assert float(found.values[k]) == pytest.approx(plain(*pairs), rel=1e-12)
    # Weights matter.
    even = labelled(a.position, b.position)
    assert abs(even - found).max() > 1e-2
    # One law for all times, without a time axis; and the same numbers from lazy arrays.
    fixed = labelled(a, b.isel(time=-1, drop=True))
    np.testing.assert_array_equal(fixed.isel(time=-1), found.isel(time=-1))
    pytest.importorskip("dask")
    lazy = labelled(a.chunk(time=1, particle=7), b.chunk(replica=1, particle=4))
    np.testing.assert_array_equal(lazy.compute(), found)


def test_runs_that_do_not_fit_are_refused():
    a, b = weighted_run(0, 6), weighted_run(1, 5)
    with pytest.raises(ValueError, match=r"labels along 'time' differ"):
        hellinger_kantorovich_between(a, b.assign_coords(time=b.time + 1e-12))
    with pytest.raises(ValueError, match=r"labels along 'replica' differ"):
        hellinger_kantorovich_between(a, b.assign_coords(replica=[4, 5]))
    broken = a.copy(deep=True)
    broken.position[1, 0, 2, 1] = np.nan
    with pytest.raises(ValueError, match=r"a at index \(1, 0\): 1 of 12 values are not finite"):
        hellinger_kantorovich_between(broken, b)
    with pytest.raises(ValueError, match=r"no `position`"):
        bounded_lipschitz_between(a.drop_vars("position"), b)
    with pytest.raises(ValueError, match=r"length = -1"):
        hellinger_kantorovich_between(a, b, length=-1)


def test_the_torus_of_a_run_is_respected():
    a = xr.DataArray([[[0.2]]], dims=("time", "particle", "component"), attrs={"period": f"[{2 * math.pi}]"})
    b = a.copy(data=[[[2 * math.pi - 0.3]]])
    assert float(bounded_lipschitz_between(a, b)[0]) == pytest.approx(0.5, abs=1e-12)
    lifted = bounded_lipschitz_between(a.drop_attrs(), b.drop_attrs())
    assert float(lifted[0]) == pytest.approx(2.0, abs=1e-12)
    with pytest.raises(ValueError, match=r"unequal masses; pass the run itself"):
        bounded_lipschitz_between(a.assign_attrs(weighted="yes"), b)


def test_a_part_of_the_weighted_particles_does_not_pass_for_all():
    a, b = (weighted_run(seed, 6).assign_coords(n_particles=6) for seed in (0, 1))
    kept = a.isel(particle=slice(4))
    with pytest.raises(ValueError, match=r"a holds only some of its weighted particles.*destroyed"):
        hellinger_kantorovich_between(kept, b)
    whole = kept.assign(weight=kept.weight / kept.weight.sum("particle"))
    assert (hellinger_kantorovich_between(whole, b) <= math.sqrt(2)).all()


def test_a_simulated_run():
    run = mfsde.simulate(MeanFieldOU(), n_particles=30, horizon=0.2, dt=0.1, seed=0, n_replicas=2, save_every=1)
    other = mfsde.simulate(MeanFieldOU(), n_particles=25, horizon=0.2, dt=0.1, seed=1, n_replicas=2, save_every=1)
    found = hellinger_kantorovich_between(run, other, length=2.0)
    assert found.sizes == {"time": 3, "replica": 2}
    x, y = (z.position.isel(time=-1, replica=1).values for z in (run, other))
    assert float(found[-1, 1]) == pytest.approx(hellinger_kantorovich(x, y, length=2.0), rel=1e-12)
    assert float(abs(hellinger_kantorovich_between(run, run)).max()) <= 1e-6


def test_labelled_points_bring_their_torus_and_refuse_lost_masses():
    attrs = {"period": "[1.0, null]"}
    x, y = (xr.DataArray([[z, 0.0]], dims=("particle", "component"), attrs=attrs) for z in (0.95, 0.05))
    assert bounded_lipschitz(x, y) == pytest.approx(0.1, rel=1e-9)
    with pytest.raises(ValueError, match="has lost its unequal masses"):
        bounded_lipschitz(x.assign_attrs(weighted="yes"), y)
