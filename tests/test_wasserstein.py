"""W₂ by independent routes, what is refused, and the traps of the library below.

Statistical tolerances are 4 standard errors, over directions, draws or replicas.
"""

import ast
import itertools
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.optimize import linear_sum_assignment, linprog
from scipy.spatial.distance import cdist

import mfsde
from mfsde import Dirac, EmpiricalMeasure, Gaussian, Mixture, Uniform
from mfsde.analysis import ground, line, wasserstein
from mfsde.analysis.wasserstein import (
    between,
    between_replicas,
    coupling,
    debiased,
    distance,
    effort,
    gaussian_distance,
    sinkhorn_divergence,
    sliced,
    subsampled,
    to_law,
    transport_cost,
    transport_plan,
    upper_bound,
)
from mfsde.measure import Law
from mfsde.scenarios import MeanFieldOU

RNG = np.random.default_rng(7)
SE = 4.0


def by_permutations(x, y):
    """The definition for equal masses: the best of all assignments."""
    costs = [np.mean(np.sum((x - y[list(p)]) ** 2, axis=1)) for p in itertools.permutations(range(len(y)))]
    return math.sqrt(min(costs))


def by_assignment(x, y):
    costs = cdist(x, y, "sqeuclidean")
    return math.sqrt(costs[linear_sum_assignment(costs)].mean())


def by_highs(p, q, cost):
    """The linear program by another solver."""
    n, m = cost.shape
    marginals = np.vstack([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    found = linprog(cost.ravel(), A_eq=marginals, b_eq=np.concatenate([p, q]), method="highs-ipm")
    return found.fun


def measure(x, p=None, period=None):
    return EmpiricalMeasure(torch.tensor(x), None if p is None else torch.tensor(p), period=period)


def on_sphere(n, d=3, radius=1.0, seed=5):
    x = np.random.default_rng(seed).normal(size=(n, d))
    return radius * x / np.linalg.norm(x, axis=1, keepdims=True)


def positions(t=3, r=4, n=20, d=2, seed=7, **attrs):
    values = np.random.default_rng(seed).normal(size=(t, r, n, d))
    coords = {"time": np.arange(t) * 0.5, "replica": np.arange(r), "particle": np.arange(n), "component": np.arange(d)}
    dims = ("time", "replica", "particle", "component")
    return xr.DataArray(values, coords=coords, dims=dims, name="position", attrs=attrs)


def cloud(x, **attrs):
    return xr.DataArray(x, dims=("particle", "component"), attrs=attrs)


# Independent routes


@pytest.mark.parametrize("d", [1, 2, 5])
def test_it_is_the_best_assignment(d):
    x, y = RNG.normal(size=(6, d)), RNG.normal(1.0, 2.0, size=(6, d))
    assert distance(x, y) == pytest.approx(by_permutations(x, y), rel=1e-12)
    # A planted fault: the square in place of the root would not pass.
    assert distance(x, y) ** 2 != pytest.approx(by_permutations(x, y), rel=1e-3)
    x, y = RNG.normal(size=(80, d)), RNG.normal(size=(80, d))
    assert distance(x, y) == pytest.approx(by_assignment(x, y), rel=1e-10)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_sorting_and_the_linear_program_agree_in_one_dimension(p):
    x, y = RNG.normal(size=(40, 1)), RNG.normal(0.3, 1.4, size=(55, 1))
    masses = RNG.dirichlet(np.ones(40)), RNG.dirichlet(np.ones(55))
    found = distance(measure(x, masses[0]), measure(y, masses[1]), p=p)
    assert found**p == pytest.approx(transport_cost(*masses, cdist(x, y) ** p), rel=1e-10)
    # The same points in the plane take the program.
    plane = [np.hstack([z, np.zeros_like(z)]) for z in (x, y)]
    assert distance(measure(plane[0], masses[0]), measure(plane[1], masses[1]), p=p) == pytest.approx(found, rel=1e-10)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 4.0])
def test_weighted_measures_are_another_solvers_linear_program(p):
    x, y = RNG.normal(size=(12, 2)), RNG.normal(size=(15, 2))
    masses = RNG.dirichlet(np.ones(12)), RNG.dirichlet(np.ones(15))
    found = distance(measure(x, masses[0]), measure(y, masses[1]), p=p)
    assert found**p == pytest.approx(by_highs(*masses, cdist(x, y) ** p), rel=1e-7)
    # A planted fault: the cost of another power.
    assert found**p != pytest.approx(by_highs(*masses, cdist(x, y) ** (p + 0.1)), rel=1e-4)


def test_an_affine_image_under_a_positive_matrix_has_the_closed_form():
    # Y = AX + b, A symmetric positive definite, is optimal: W₂ is Bures' formula with the 1/N covariances.
    x = RNG.normal(size=(60, 3))
    a = np.array([[2.0, 0.3, 0.1], [0.3, 1.0, -0.2], [0.1, -0.2, 0.5]])
    y = x @ a + [1.0, -2.0, 0.5]
    moments = [(z.mean(0), np.cov(z.T, bias=True)) for z in (x, y)]
    assert distance(x, y) == pytest.approx(gaussian_distance(*moments[0], *moments[1]), rel=1e-10)
    # Planted faults: the 1/(N-1) covariances, and a map that is no gradient.
    assert distance(x, y) != pytest.approx(
        gaussian_distance(moments[0][0], moments[0][1] * 60 / 59, moments[1][0], moments[1][1] * 60 / 59), rel=1e-5
    )
    assert distance(x, y) != pytest.approx(distance(x, -y), rel=1e-2)


def test_gaussians_have_their_closed_form_as_laws():
    a, b = Gaussian([1.0, 0.0], [[4.0, 0.0], [0.0, 1.0]]), Gaussian([0.0, 0.0], [[0.25, 0.0], [0.0, 9.0]])
    assert distance(a, b) == pytest.approx(math.sqrt(1 + 1.5**2 + 4), rel=1e-12)
    assert distance(a, a) < 1e-7


def test_a_sample_and_a_law_meet_in_either_order():
    x, law = RNG.normal(size=(30, 1)), Mixture([Gaussian([-1.0], [[0.1]]), Gaussian([1.0], [[0.1]])])
    assert distance(x, law) == distance(law, x) == distance(x[:, 0], law)
    assert distance(torch.tensor(x), Dirac(0.5)) == pytest.approx(math.sqrt(np.mean((x - 0.5) ** 2)), rel=1e-12)


@pytest.mark.parametrize("d", [1, 3])
def test_splitting_an_atom_and_an_atom_without_mass_change_nothing(d):
    x, y = RNG.normal(size=(8, d)), RNG.normal(size=(9, d))
    p, q = RNG.dirichlet(np.ones(8)), RNG.dirichlet(np.ones(9))
    plain = distance(measure(x, p), measure(y, q))
    split = np.concatenate([x, x[:1]]), np.concatenate([[0.3 * p[0]], p[1:], [0.7 * p[0]]])
    assert distance(measure(*split), measure(y, q)) == pytest.approx(plain, rel=1e-11)
    empty = np.concatenate([x, 100 + x[:1]]), np.concatenate([p, [0.0]])
    assert distance(measure(*empty), measure(y, q)) == pytest.approx(plain, rel=1e-11)
    assert distance(np.concatenate([x, x]), y) == pytest.approx(distance(x, y), rel=1e-11)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("d", [1, 2])
def test_it_is_a_distance(d, p):
    for seed in range(10):
        r = np.random.default_rng(seed)
        x, y, z = (r.normal(r.normal(), 1.0, size=(n, d)) for n in (7, 9, 9))
        assert distance(x, y, p=p) == pytest.approx(distance(y, x, p=p), rel=1e-11)
        assert distance(x, z, p=p) <= distance(x, y, p=p) + distance(y, z, p=p) + 1e-12
        assert distance(y, y[::-1], p=p) < 1e-12
        # W_p grows with p.
        assert distance(x, y, p=p) <= distance(x, y, p=p + 1) + 1e-12


# Ground metrics


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_on_the_circle_it_is_the_program_with_the_shorter_way(p, weighted):
    x, y = RNG.normal(size=(15, 1)), RNG.normal(0.8, 1.0, size=(18, 1))
    masses = [RNG.dirichlet(np.ones(n)) if weighted else np.full(n, 1 / n) for n in (15, 18)]
    gap = np.abs(x - y.T) % 2.0
    gap = np.minimum(gap, 2.0 - gap)
    given = masses if weighted else (None, None)
    found = distance(measure(x, given[0], 2.0), measure(y, given[1], 2.0), p=p)
    assert found**p == pytest.approx(transport_cost(*masses, gap**p), rel=1e-9)
    assert found < distance(measure(x, given[0]), measure(y, given[1]), p=p)


def test_on_a_torus_the_shorter_way_counts():
    x, y = torch.tensor([[0.01]], dtype=torch.float64), torch.tensor([[0.99]], dtype=torch.float64)
    assert distance(EmpiricalMeasure(x, period=1.0), EmpiricalMeasure(y, period=1.0)) == pytest.approx(0.02, rel=1e-9)
    assert distance(EmpiricalMeasure(x), EmpiricalMeasure(y)) == pytest.approx(0.98, rel=1e-9)
    # A plain sample beside a measure takes the measure's torus.
    assert distance(EmpiricalMeasure(x, period=1.0), y) == pytest.approx(0.02, rel=1e-9)
    with pytest.raises(ValueError, match="different tori"):
        distance(EmpiricalMeasure(x, period=1.0), EmpiricalMeasure(y, period=2.0))
    # Wrapping one component of a cloud moves nothing on the torus; the other lives on a line.
    points = RNG.uniform(size=(20, 2))
    moved = points + np.where(RNG.uniform(size=(20, 1)) < 0.5, 1.0, 0.0) * [1.0, 0.0]
    a, b = (cloud(z, period="[1.0, null]") for z in (points, moved))
    assert float(between(a, b)) < 1e-6
    assert float(between(a, b.drop_attrs())) < 1e-6
    assert float(between(a.drop_attrs(), b.drop_attrs())) > 0.1
    up = cloud(points + np.array([0.0, 1.0]), period="[1.0, null]")
    assert float(between(a, up)) == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize("radius", [1.0, 5.0])
def test_on_the_sphere_it_is_the_program_with_arc_lengths(p, radius):
    x, y = on_sphere(20, radius=radius), on_sphere(25, radius=radius, seed=6)
    arcs = radius * np.arccos(np.clip(x @ y.T / radius**2, -1, 1))
    found = distance(x, y, p=p, metric="sphere")
    assert found**p == pytest.approx(transport_cost(np.full(20, 1 / 20), np.full(25, 1 / 25), arcs**p), rel=1e-10)
    assert found > distance(x, y, p=p)


def test_arc_lengths_keep_their_digits_at_both_ends():
    north = np.array([[0.0, 0.0, 1.0]])
    for angle in (1e-9, 1e-4, math.pi - 1e-4, math.pi - 1e-9, math.pi):
        other = np.array([[math.sin(angle), 0.0, math.cos(angle)]])
        found = float(ground.distances(north, other, metric="sphere")[0, 0])
        assert min(found, math.pi - found) == pytest.approx(min(angle, math.pi - angle), rel=1e-6, abs=1e-15)
    # The arc cosine itself loses them all.
    assert math.acos(math.cos(1e-9)) == 0.0
    assert distance(north, -north, metric="sphere") == pytest.approx(math.pi, rel=1e-12)
    assert distance(on_sphere(9), on_sphere(9)[::-1], metric="sphere") < 1e-7


def test_metrics_that_do_not_apply_are_refused():
    x = on_sphere(6)
    with pytest.raises(ValueError, match=r"metric 'chord' is unknown; expected one of euclidean, sphere"):
        distance(x, x, metric="chord")
    with pytest.raises(ValueError, match=r"live on a torus; metric='sphere' does not apply"):
        distance(measure(x, period=1.0), measure(x, period=1.0), metric="sphere")
    with pytest.raises(ValueError, match=r"needs points of one norm .* Project them \(x / \|x\|\) first"):
        distance(x, 1.01 * x, metric="sphere")
    with pytest.raises(ValueError, match=r"a law has no distance in metric 'sphere'; sample it"):
        distance(x[:, :1], Gaussian([0.0], [[1.0]]), metric="sphere")
    for attempt in (
        lambda: between(cloud(x), cloud(x), metric="chord"),
        lambda: subsampled(x, x, 3, metric="chord"),
        lambda: debiased(positions(), positions(seed=8), metric="chord"),
    ):
        with pytest.raises(ValueError, match=r"metric 'chord' is unknown"):
            attempt()


# The program itself


def test_the_plan_has_its_marginals_and_its_cost():
    p, q, cost = 3 * RNG.dirichlet(np.ones(10)), 3 * RNG.dirichlet(np.ones(14)), RNG.uniform(size=(10, 14))
    plan = transport_plan(p, q, cost)
    np.testing.assert_allclose(plan.sum(1), p, atol=1e-13)
    np.testing.assert_allclose(plan.sum(0), q, atol=1e-13)
    assert np.sum(plan * cost) == pytest.approx(transport_cost(p, q, cost), rel=1e-12)
    assert transport_cost(p, q, cost) == pytest.approx(by_highs(p, q, cost), rel=1e-7)
    # POT finds costs far below zero infeasible, and returns 0.0 with a warning.
    np.testing.assert_allclose(transport_plan(p, q, cost - 5.0), plan, atol=1e-12)
    assert transport_cost(p, q, cost - 5.0) == pytest.approx(transport_cost(p, q, cost) - 15.0, rel=1e-9)
    assert transport_cost(0 * p, 0 * q, cost) == 0.0
    assert not transport_plan(0 * p, 0 * q, cost).any()


def test_programs_that_are_none_are_refused():
    p, cost = np.full(3, 1 / 3), np.ones((3, 3))
    for solve in (transport_cost, transport_plan):
        with pytest.raises(ValueError, match=r"masses \(3,\) and \(3,\) do not fit a cost of shape \(3, 2\)"):
            solve(p, p, cost[:, :2])
        with pytest.raises(ValueError, match=r"equal totals; got 1 and 2\. Unequal masses have analysis\.unbalanced"):
            solve(p, 2 * p, cost)
        with pytest.raises(ValueError, match=r"masses must be non-negative"):
            solve(np.array([-1.0, 1.0, 1.0]), p, cost)
        for bad in (math.nan, math.inf):
            with pytest.raises(ValueError, match=r"transport, cost: 9 of 9 values are not finite"):
                solve(p, p, bad * cost)
            with pytest.raises(ValueError, match=r"transport, p: 3 of 3 values are not finite"):
                solve(bad * p, p, cost)


@pytest.mark.parametrize(("d", "n", "m"), [(1, 12, 12), (1, 12, 15), (3, 12, 12), (3, 12, 15)])
def test_the_coupling_carries_the_cost(d, n, m):
    x, y = RNG.normal(size=(n, d)), RNG.normal(size=(m, d))
    i, j, mass = coupling(x, y)
    np.testing.assert_allclose(np.bincount(i, mass, n), 1 / n, atol=1e-13)
    np.testing.assert_allclose(np.bincount(j, mass, m), 1 / m, atol=1e-13)
    assert math.sqrt(np.sum(mass * np.square(x[i] - y[j]).sum(1))) == pytest.approx(distance(x, y), rel=1e-10)
    with pytest.raises(ValueError, match="not finite"):
        coupling(x * math.nan, y)
    with pytest.raises(ValueError, match="dimensions differ"):
        coupling(x, np.zeros((m, d + 1)))


# The traps of POT


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("d", [1, 2])
def test_values_that_are_not_finite_raise_and_are_never_zero(bad, d):
    x, y = RNG.normal(size=(10, d)), RNG.normal(size=(10, d))
    x[3, 0] = bad
    attempts = [distance, coupling, sliced, upper_bound, lambda a, b: subsampled(a, b, 5)]
    for attempt, pair in itertools.product(attempts, ((x, y), (y, x))):
        with pytest.raises(ValueError, match="not finite"):
            attempt(*pair)
    if d == 1:
        with pytest.raises(ValueError, match="not finite"):
            distance(x, Gaussian([0.0], [[1.0]]))
    for other in (cloud(x), positions(d=d) * bad):
        with pytest.raises(ValueError, match="not finite"):
            between(other, cloud(y))


def test_a_run_that_blew_up_has_no_distance():
    a = positions()
    a[2, 1] = np.nan
    law = Gaussian([0.0, 0.0], 1.0)
    for attempt in (lambda z: between(z, positions()), between_replicas, lambda z: to_law(z, law)):
        with pytest.raises(ValueError, match=r"A run that blew up has no law; select the times before it did"):
            attempt(a)
    assert np.isfinite(between_replicas(a.isel(time=slice(2)))).all()
    for weight in (None, xr.DataArray(np.full(20, 0.05), dims="particle")):
        line = xr.Dataset({"position": a.isel(component=[0])} | ({} if weight is None else {"weight": weight}))
        with pytest.raises(ValueError, match="not finite"):
            to_law(line, Gaussian([0.0], [[1.0]]))


def test_a_program_that_does_not_converge_raises(monkeypatch):
    x, y = RNG.normal(size=(80, 2)), RNG.normal(size=(80, 2))
    assert wasserstein.ITERATIONS >= 10_000_000
    monkeypatch.setattr(wasserstein, "ITERATIONS", 5)
    for attempt in (distance, coupling, lambda a, b: between(cloud(a), cloud(b))):
        with pytest.raises(RuntimeError, match="transport between 80 and 80 points did not converge"):
            attempt(x, y)


@pytest.mark.parametrize("d", [1, 2])
def test_an_offset_costs_no_digits_in_float32(d):
    x, y = ((1e4 + RNG.normal(size=(50, d))).astype(np.float32) for _ in range(2))
    exact = distance(x.astype(np.float64) - 1e4, y.astype(np.float64) - 1e4)
    assert distance(x, y) == pytest.approx(exact, rel=1e-9)
    assert float(between(cloud(x), cloud(y))) == pytest.approx(exact, rel=1e-9)
    assert exact > 0.1


@pytest.mark.parametrize("d", [1, 2])
def test_masses_are_checked(d):
    x = cloud(RNG.normal(size=(5, d)))
    good = xr.DataArray(RNG.dirichlet(np.ones(5)), dims="particle")
    # Only their shares count.
    assert float(between(x, x + 1, weight_a=3 * good)) == pytest.approx(float(between(x, x + 1, weight_a=good)))
    for bad, message in (
        ([-0.1, 0.3, 0.3, 0.3, 0.2], r"masses must be non-negative and not all zero; the smallest is -0\.1"),
        ([0.0] * 5, r"masses must be non-negative and not all zero"),
        ([math.nan, 1, 1, 1, 1], r"1 of 5 values are not finite"),
        ([math.inf, 1, 1, 1, 1], r"1 of 5 values are not finite"),
    ):
        weight = xr.DataArray(bad, dims="particle")
        for masses in ({"weight_a": weight}, {"weight_b": weight}, {"weight_a": good, "weight_b": weight}):
            with pytest.raises(ValueError, match=message):
                between(x, x + 1, **masses)
        with pytest.raises(ValueError, match=message):
            to_law(xr.Dataset({"position": x, "weight": weight}), Gaussian([0.0] * d, 1.0))
    signed = EmpiricalMeasure.signed(torch.tensor(x.values), torch.tensor([-1.0, 0.5, 0.5, 0.5, 0.5]))
    for attempt in (distance, sliced, lambda a, b: subsampled(a, b, 5)):
        with pytest.raises(ValueError, match="masses must be non-negative"):
            attempt(signed, x)


def test_every_route_returns_the_root():
    # At scale s each is s times what it was; the debiased statistic, which says power 2, s² times.
    s, x, y = 3.0, RNG.normal(size=(12, 2)), RNG.normal(size=(12, 2))
    a, b = positions(n=10, d=1), positions(n=10, d=1, seed=9)
    routes = [
        lambda c: distance(c * x, c * y),
        lambda c: distance(c * x, c * y, p=3),
        lambda c: distance(c * x[:, :1], c * y[:, :1], p=1),
        lambda c: distance(c * x[:, :1], Gaussian([0.0], [[c**2]])),
        lambda c: distance(Gaussian([c], [[c**2]]), Uniform(0.0, c)),
        lambda c: gaussian_distance(c * np.ones(2), c**2 * np.eye(2), np.zeros(2), c**2 * np.diag([1.0, 2.0])),
        lambda c: distance(measure(c * x, period=2.0 * c), measure(c * y, period=2.0 * c)),
        lambda c: sliced(c * x, c * y).value,
        lambda c: subsampled(c * x, c * y, 5).value,
        lambda c: upper_bound(c * x, c * y),
        lambda c: float(between(c * a, c * b).mean()),
        lambda c: float(to_law(c * a, Gaussian([0.0], [[c**2]])).mean()),
        lambda c: float(to_law(c * a, Gaussian([0.0], [[c**2]])).floor.mean()),
        lambda c: math.sqrt(abs(float(debiased(c * a, c * b).mean()))),
    ]
    for k, route in enumerate(routes):
        assert route(s) == pytest.approx(s * route(1.0), rel=1e-8), k


def test_threads_change_nothing(monkeypatch):
    # POT's numThreads does nothing; problems run side by side instead.
    a, b = positions(n=30), positions(n=30, seed=9)
    found = {}
    for workers in (1, 4):
        monkeypatch.setattr("os.cpu_count", lambda workers=workers: workers)
        found[workers] = [between(a, b), between_replicas(a), debiased(a, b), to_law(a, Gaussian([0.0, 0.0], 1.0))]
    for one, four in zip(found[1], found[4], strict=True):
        xr.testing.assert_identical(one, four)


def sources():
    root = Path(__file__).parent.parent
    return {
        file: ast.parse(file.read_text())
        for file in itertools.chain(*((root / name).rglob("*.py") for name in ("mfsde", "scenarios", "analysis")))
    }


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0], node


def test_pot_is_imported_by_this_module_alone_and_only_when_needed():
    for file, tree in sources().items():
        names = {name for name, _ in imported(tree)}
        assert ("ot" in names) == (file.name == "wasserstein.py"), file
        assert all(node.col_offset > 0 for name, node in imported(tree) if name == "ot")


def test_functions_of_pot_that_are_wrong_are_not_used():
    # solve_batch and solve_sample_batch have a sign error, solve_sample(scaler=) scales one cloud only, `dist` loses
    # the digits of an offset, and wasserstein_1d checks no masses.
    wrong = {"solve_batch", "solve_sample_batch", "solve_sample", "solve", "dist", "wasserstein_1d", "emd2_1d"}
    for file, tree in sources().items():
        used = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ot"
        }
        assert not used & wrong, file


# Size


def test_a_problem_too_large_is_refused_with_its_estimate():
    x, y = np.zeros((100_000, 2)), np.ones((100_000, 2))
    need = effort(100_000, 100_000)
    message = rf"takes about {need.bytes / 2**30:.1f} GiB and {need.seconds:.0f} s\. Subsample .*upper_bound.*sliced"
    for attempt in (distance, coupling, lambda a, b: between(cloud(a), cloud(b))):
        with pytest.raises(ValueError, match=message):
            attempt(x, y)
    # In one dimension there is no program.
    assert distance(x[:, 0], y[:, 0]) == pytest.approx(1.0, rel=1e-12)


def test_the_effort_grows_with_the_problem():
    assert effort(100, 200, 7).seconds == pytest.approx(7 * effort(100, 200).seconds)
    assert effort(100, 200, 7).bytes == effort(200, 100).bytes
    assert effort(20_000, 20_000).seconds > 16 * effort(5000, 5000).seconds


def test_long_work_is_announced(monkeypatch):
    monkeypatch.setattr(wasserstein, "LONG", 1e-9)
    a, b = positions(), positions(seed=8)
    with pytest.warns(UserWarning, match=r"^12 exact programs between 20 and 20 points .* select times"):
        between(a, b)
    with pytest.warns(UserWarning, match=r"^18 exact programs"):
        between_replicas(a)
    for reference in (b, Uniform([-1.0, -1.0], 1.0)):
        with pytest.warns(UserWarning, match=r"^72 exact programs"):
            debiased(a, reference)
    # Sorting is never long.
    between(a.isel(component=[0]), b.isel(component=[0]))


# Ways out of a large problem


def test_subsamples_are_samples_with_an_error_bar():
    r = np.random.default_rng(3)
    found = [subsampled(r.normal(size=(120, 2)), r.normal(0.5, 1.0, size=(120, 2)), 20, seed=k) for k in range(200)]
    values, errors = (np.array(part) for part in zip(*found, strict=True))
    # Six disjoint pairs are independent, so the stated error is the scatter over fresh data: E stderr² = Var.
    squares = np.square(errors)
    spread = math.sqrt(2 / 199 + np.var(squares) / np.mean(squares) ** 2 / 200)
    assert abs(values.var(ddof=1) / squares.mean() - 1) < SE * spread
    # Overlapping subsamples of the same clouds would state less: planted fault.
    assert values.var(ddof=1) / (squares.mean() / 4) - 1 > SE * spread
    # The floor of 20 points is in it: it is not W₂ of the laws.
    assert values.mean() > math.sqrt(0.5) + SE * values.std() / math.sqrt(200)
    x, y = r.normal(size=(60, 2)), r.normal(size=(50, 2))
    for n, repeats in ((0, 8), (26, 8), (20, 1)):
        with pytest.raises(ValueError, match=rf"1 <= n <= 25 and repeats >= 2; got n = {n}, repeats = {repeats}"):
            subsampled(x, y, n, repeats=repeats)
    masses = torch.softmax(torch.randn(60, generator=torch.Generator().manual_seed(0)), 0)
    with pytest.raises(ValueError, match="the masses differ"):
        subsampled(EmpiricalMeasure(torch.tensor(x).float(), masses), y, 20)


def test_labelled_samples_bring_their_torus_and_refuse_lost_masses():
    attrs = {"period": "[1.0, null]"}
    x = xr.DataArray([[0.95, 0.0]], dims=("particle", "component"), attrs=attrs)
    y = xr.DataArray([[0.05, 0.0]], dims=("particle", "component"), attrs=attrs)
    assert distance(x, y) == pytest.approx(0.1, rel=1e-12)
    assert distance(x, y.drop_attrs()) == pytest.approx(0.1, rel=1e-12)
    square = xr.DataArray(RNG.normal(size=(2, 2)), dims=("particle", "component"))
    assert distance(square, square.transpose("component", "particle")) == 0
    with pytest.raises(ValueError, match="use `between` with the run"):
        distance(x.assign_attrs(weighted="yes"), y)


def test_a_flow_of_laws_is_taken_for_gaussian_only_where_it_is():
    """Two wells with the covariance of a Gaussian: its moments do not tell them apart, transport does."""
    narrow = [[0.0199, 0.0], [0.0, 1.0]]
    well = Mixture([Gaussian([-0.99, 0.0], narrow), Gaussian([0.99, 0.0], narrow)])
    run = positions(t=2, r=12, n=150)
    constant, flow = debiased(run, well), debiased(run, lambda t: well)
    np.testing.assert_allclose(flow, constant, rtol=1e-10)
    assert "transport" in flow.attrs["estimator"]
    moments = debiased(run, lambda t: well, estimator="gaussian")
    error = flow.std("replica", ddof=1) / math.sqrt(12)
    assert (flow.mean("replica") > SE * error).all()
    assert (abs(moments.mean("replica")) < SE * moments.std("replica", ddof=1) / math.sqrt(12)).all()
    assert moments.attrs["bound"] == "lower"
    assert "lower bound of W₂" in to_law(run, well).attrs["long_name"]
    assert "bound" not in to_law(run, lambda t: Gaussian([t, 0.0], 1.0)).attrs


@pytest.mark.parametrize("offset", [1e6, 1e8])
def test_gaussian_distances_survive_a_far_origin(offset):
    x = RNG.normal(size=(2, 5, 50, 2))
    here = xr.DataArray(x, dims=("time", "replica", "particle", "component"), coords={"time": [0.0, 1.0]})
    near, far = (to_law(here + o, Gaussian([o, o], 1.0)) for o in (0.0, offset))
    # float64 holds 1e-16·offset of a position, no more.
    np.testing.assert_allclose(far, near, atol=1e-14 * offset)
    np.testing.assert_allclose(far.unbiased, near.unbiased, atol=1e-14 * offset)
    other = here.roll(replica=1)
    shifted = [debiased(here + o, other + o, estimator="gaussian") for o in (0.0, offset)]
    np.testing.assert_allclose(*shifted, atol=1e-14 * offset)


def test_a_law_that_changes_or_has_no_hash_is_asked_again():
    class Moving(Law):
        __hash__ = None

        def __init__(self):
            self.at = 0.0

        dim = 1

        def from_variates(self, z):
            return z + self.at

        def as_measure(self):
            return Gaussian([self.at], [[1.0]]).as_measure()

        def quantile(self, u):
            return torch.special.ndtri(u) + self.at

    law, run = Moving(), positions(d=1)
    before = to_law(run, law)
    law.at = 5.0
    assert float(abs(to_law(run, law) - before).min()) > 2.0


def test_the_upper_bound_is_one():
    for d, seed in itertools.product((1, 2, 5), range(3)):
        r = np.random.default_rng(seed)
        x, y = r.normal(size=(64, d)), r.normal(0.5, 1.5, size=(64, d))
        assert upper_bound(x, y, seed=seed) >= distance(x, y) - 1e-12
        assert upper_bound(x, y, seed=seed) < 2.5 * distance(x, y)
    assert upper_bound(x, x + 2.0) == pytest.approx(2 * math.sqrt(5), rel=1e-9)
    for pair in ((x, y[:-1]), (measure(x, np.full(64, 1 / 64)), y), (measure(x, period=9.0), y)):
        with pytest.raises(ValueError, match=r"equally many points of equal mass in Euclidean space"):
            upper_bound(*pair)


@pytest.mark.parametrize("d", [2, 5])
def test_the_sliced_distance_is_below_and_turns_with_the_clouds(d):
    x, y = RNG.normal(size=(50, d)), RNG.normal(0.3, 2.0, size=(40, d))
    found = sliced(x, y, n_directions=400)
    assert found.value <= distance(x, y) / math.sqrt(d) + SE * found.stderr
    turn = np.linalg.qr(RNG.normal(size=(d, d)))[0]
    turned = sliced(x @ turn, y @ turn, n_directions=400, seed=1)
    assert abs(found.value - turned.value) < SE * math.hypot(found.stderr, turned.stderr)
    # A planted fault: a stretch is no rotation.
    stretched = sliced(2 * x, 2 * y, n_directions=400, seed=1)
    assert abs(found.value - stretched.value) > SE * math.hypot(found.stderr, stretched.stderr)
    # A translation by v has mean ⟨e, v⟩² = |v|²/d.
    moved = sliced(x, x + 1.0, n_directions=400)
    assert abs(moved.value - 1.0) < SE * moved.stderr
    assert sliced(x, x).value == 0.0


def test_the_sliced_distance_takes_masses_and_no_torus():
    x, p = RNG.normal(size=(6, 2)), np.array([0.5, 0.1, 0.1, 0.1, 0.1, 0.1])
    doubled = np.concatenate([np.repeat(x[:1], 5, 0), x[1:]])
    y = RNG.normal(size=(9, 2))
    assert sliced(measure(x, p), y).value == pytest.approx(sliced(doubled, y).value, rel=1e-10)
    with pytest.raises(ValueError, match=r"a torus has no projections"):
        sliced(measure(x, period=1.0), y)
    with pytest.raises(ValueError, match=r"needs n_directions >= 2; got 1"):
        sliced(x, y, n_directions=1)


# The Sinkhorn divergence


def tensors(n=12, m=15, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 2, generator=generator, dtype=torch.float64)
    return x, 0.5 + torch.rand(m, 2, generator=generator, dtype=torch.float64)


def test_the_divergence_tends_to_the_squared_distance():
    x, y = tensors(6, 6)
    exact = distance(x, y) ** 2
    found = [float(sinkhorn_divergence(x, y, reg, tolerance=1e-5)) for reg in (0.5, 0.05, 0.01)]
    errors = [abs(value / exact - 1) for value in found]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert errors[2] < 1e-3


def test_the_divergence_of_equal_clouds_is_zero_and_otherwise_positive():
    x, y = tensors()
    assert abs(float(sinkhorn_divergence(x, x, 0.1))) < 1e-10
    assert abs(float(sinkhorn_divergence(x, x.flip(0), 0.1))) < 1e-10
    assert float(sinkhorn_divergence(x, x + 1e-3, 0.1)) > 1e-8
    assert float(sinkhorn_divergence(x, y, 0.1)) == pytest.approx(float(sinkhorn_divergence(y, x, 0.1)), rel=1e-7)
    # A translation is exact at every ε.
    assert float(sinkhorn_divergence(x, x + 1.0, 0.5)) == pytest.approx(2.0, rel=1e-8)


def test_the_divergence_has_the_gradient_of_finite_differences():
    x, y = tensors(5, 6)
    x.requires_grad_(True)
    options = {"iterations": 100_000, "tolerance": 1e-13}
    (gradient,) = torch.autograd.grad(sinkhorn_divergence(x, y, 0.3, **options), x)
    step, base = 1e-5, x.detach()
    for i, k in itertools.product(range(5), range(2)):
        shift = torch.zeros_like(base)
        shift[i, k] = step
        up, down = (float(sinkhorn_divergence(base + s * shift, y, 0.3, **options)) for s in (1, -1))
        assert float(gradient[i, k]) == pytest.approx((up - down) / (2 * step), abs=1e-7)
    # A planted fault: the gradient of W₂² itself is another.
    i, j, mass = coupling(base.numpy(), y.numpy())
    plain = torch.zeros_like(base).index_add(
        0, torch.tensor(i), 2 * torch.tensor(mass)[:, None] * (base[torch.tensor(i)] - y[torch.tensor(j)])
    )
    assert float((gradient - plain).abs().max()) > 1e-3


def test_the_divergence_lives_in_float32_where_the_plan_underflows():
    x, y = (z.float() for z in tensors())
    found = sinkhorn_divergence(x, y + 3.0, 0.05, tolerance=1e-4)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(distance(x, y + 3.0) ** 2, rel=1e-2)


def test_a_divergence_that_does_not_converge_raises():
    x, y = tensors()
    with pytest.raises(RuntimeError, match=r"between 12 and 15 points did not converge at ε = .*; raise reg"):
        sinkhorn_divergence(x, y, 0.01, iterations=1)
    for reg in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"expected a positive ε in squared units"):
            sinkhorn_divergence(x, y, reg)
    for bad in (x * math.nan, x[0], x.int()):
        with pytest.raises(ValueError, match=r"y must be a finite floating tensor \(N, d\)"):
            sinkhorn_divergence(x, bad, 0.1)


# What cannot be compared


def test_what_cannot_be_compared_is_refused():
    x = RNG.normal(size=(10, 2))
    with pytest.raises(ValueError, match="dimensions differ, 2 and 3"):
        distance(x, RNG.normal(size=(10, 3)))
    with pytest.raises(ValueError, match="dimensions differ, 2 and 1"):
        distance(x, Uniform(0.0, 1.0))
    with pytest.raises(ValueError, match="dimensions differ, 1 and 2"):
        distance(Uniform(0.0, 1.0), Gaussian([0.0, 0.0], 1.0))
    with pytest.raises(ValueError, match="expected a sample"):
        distance(x, np.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match=r"a has shape \(0, 2\); expected a sample"):
        distance(x[:0], x)
    for pair in ((x, Gaussian([0.0, 0.0], 1.0)), (Uniform([0.0, 0.0], 1.0), Gaussian([0.0, 0.0], 1.0))):
        with pytest.raises(ValueError, match=r"no exact distance between .* Sample the law"):
            distance(*pair)
    with pytest.raises(ValueError, match=r"compare two Gaussians with p = 2"):
        distance(Gaussian([0.0, 0.0], 1.0), Gaussian([0.0, 0.0], 1.0), p=1)
    with pytest.raises(ValueError, match=r"a measure on a torus and a law on the line do not compare"):
        distance(measure(x[:, :1], period=1.0), Gaussian([0.0], [[1.0]]))


@pytest.mark.parametrize("p", [0.5, 0.0, -1.0, math.nan, math.inf])
def test_powers_below_one_and_infinite_ones_are_refused(p):
    x = RNG.normal(size=(10, 2))
    for attempt in (lambda: distance(x, x, p=p), lambda: between(cloud(x), cloud(x), p=p)):
        with pytest.raises(ValueError, match=r"W_p is a distance for finite p >= 1; got p = "):
            attempt()


# Runs: `between`


@pytest.mark.parametrize("d", [1, 2])
def test_between_runs_over_the_remaining_dimensions_and_keeps_coordinates(d):
    a, b = positions(d=d, units="m"), positions(d=d, n=30, seed=8)
    found = between(a, b)
    assert found.dims == ("time", "replica")
    assert found.attrs["power"] == 1
    assert found.attrs["units"] == "m"
    assert "exact" in found.attrs["estimator"]
    assert "W₂" in found.attrs["long_name"]
    assert "W_3" in between(a, b, p=3).attrs["long_name"]
    np.testing.assert_array_equal(found.time, a.time)
    for t, r in itertools.product(range(3), range(4)):
        assert float(found[t, r]) == distance(a.values[t, r], b.values[t, r])


def test_between_takes_the_sphere_and_masses_of_runs():
    x, y = on_sphere(8), on_sphere(8, seed=6)
    assert float(between(cloud(x), cloud(y), metric="sphere")) == distance(x, y, metric="sphere")
    p, q = RNG.dirichlet(np.ones(8)), RNG.dirichlet(np.ones(8))
    runs = [
        xr.Dataset({"position": cloud(z, weighted="by the variable weight"), "weight": ("particle", w)})
        for z, w in ((x, p), (y, q))
    ]
    assert float(between(*runs)) == pytest.approx(distance(measure(x, p), measure(y, q)), rel=1e-12)
    assert float(between(runs[0], cloud(y))) == pytest.approx(distance(measure(x, p), y), rel=1e-12)
    assert float(between(cloud(x), runs[1])) == pytest.approx(distance(x, measure(y, q)), rel=1e-12)


def test_between_broadcasts_a_reference_and_refuses_other_labels():
    a = positions()
    end = between(a, a.isel(time=-1, drop=True))
    assert end.dims == ("time", "replica")
    assert float(abs(end.isel(time=-1)).max()) < 1e-7
    with pytest.raises(ValueError, match=r"'time' differ"):
        between(a, a.assign_coords(time=a.time + 1e-12))
    with pytest.raises(ValueError, match=r"'time' differ: .* 0 shared; simulate both with the same dt and save_every"):
        between(a, a.assign_coords(time=a.time + 100))
    with pytest.raises(ValueError, match=r"'component' differ"):
        between(a, a.isel(component=[0]))
    with pytest.raises(ValueError, match=r"'replica' differ: .* 2 shared"):
        between(a, a.isel(replica=[0, 1]))
    with pytest.raises(ValueError, match="`particle` and `component`"):
        between(a.isel(particle=0), a)
    with pytest.raises(ValueError, match="different tori"):
        between(a.assign_attrs(period="[1.0, 1.0]"), a.assign_attrs(period="[2.0, 1.0]"))


def test_masses_are_part_of_the_law():
    a = cloud(np.array([[0.0], [1.0]]), weighted="by the variable weight")
    p, q = (xr.DataArray(w, dims="particle") for w in ([0.9, 0.1], [0.1, 0.9]))
    assert float(between(a, a, weight_a=p, weight_b=q)) == pytest.approx(math.sqrt(0.8), rel=1e-12)
    with pytest.raises(ValueError, match="unequal masses; pass the run itself"):
        between(a, a)
    pairs = a.expand_dims(replica=2)
    weights = xr.concat([p, q], "replica")
    assert float(between_replicas(pairs, weights)[0]) == pytest.approx(math.sqrt(0.8), rel=1e-12)


def test_between_replicas_takes_every_pair_once():
    a = positions()
    found = between_replicas(a)
    assert found.sizes == {"time": 3, "pair": 6}
    pairs = list(zip(found.replica_a.values.tolist(), found.replica_b.values.tolist(), strict=True))
    assert pairs == list(itertools.combinations(range(4), 2))
    assert float(found[1, 4]) == distance(a.values[1, 1], a.values[1, 3])
    with pytest.raises(ValueError, match="at least two independent replicas"):
        between_replicas(a.isel(replica=[0]))


# Runs: `to_law`


@pytest.mark.parametrize("weighted", [False, True])
def test_to_law_is_the_distance_of_every_replica_to_the_law_of_its_time(weighted):
    a = positions(d=1, units="m")

    def law(t):
        return Gaussian([t], [[1.0 + t]])

    weight = xr.DataArray(np.random.default_rng(0).dirichlet(np.ones(20)), dims="particle")
    found = to_law(xr.Dataset({"position": a, "weight": weight}) if weighted else a, law)
    assert found.dims == ("time", "replica")
    assert found.attrs["units"] == "m"
    assert found.attrs["power"] == 1
    for (t, time), r in itertools.product(enumerate(a.time.values), range(4)):
        expected = distance(measure(a.values[t, r], weight.values if weighted else None), law(time))
        assert float(found[t, r]) == pytest.approx(expected, rel=1e-12)
    assert found.floor.dims == ("time",)
    effective = round(1 / float(np.square(weight).sum())) if weighted else 20
    floor = line.sampling_cost(Gaussian([0.0], [[1.0]]), effective) * (1 + a.time.values)
    np.testing.assert_allclose(found.floor, np.sqrt(floor), rtol=1e-12)
    assert ("unbiased" in found.coords) == (not weighted)


def test_to_law_above_one_dimension_is_the_distance_of_the_moments():
    a, law = positions(d=3), Gaussian([0.5, 0.0, 0.0], np.diag([1.0, 2.0, 3.0]))
    found = to_law(a, law)
    for t, r in itertools.product(range(3), range(4)):
        x = a.values[t, r]
        expected = gaussian_distance(x.mean(0), np.cov(x.T, bias=True), law.mean.numpy(), law.cov.numpy())
        assert float(found[t, r]) == pytest.approx(expected, rel=1e-10)
    assert "Bures" in found.attrs["estimator"]
    box = Uniform([-1.0] * 3, 1.0)
    assert float(to_law(a, box)[0, 0]) > 0


def test_a_single_system_and_a_single_time_have_a_distance_too():
    a, law = positions(d=1), Gaussian([0.0], [[1.0]])
    whole = to_law(a, law)
    assert float(to_law(a.isel(replica=1), law)[2]) == float(whole[2, 1])
    assert to_law(a.isel(replica=1), law).dims == ("time",)
    np.testing.assert_array_equal(to_law(a.isel(time=1), lambda t: law), whole[1])
    np.testing.assert_array_equal(to_law(a.isel(time=1, drop=True), law), whole[1])
    with pytest.raises(ValueError, match=r"particles carry no `time`; pass law\(t\) at their time"):
        to_law(a.isel(time=1, drop=True), lambda t: law)


class Nameless(Law):
    """A law with neither quantiles nor moments."""

    def __init__(self, dim):
        self._dim = dim

    @property
    def dim(self):
        return self._dim

    def from_variates(self, z):
        return z

    def as_measure(self):
        raise NotImplementedError


def test_laws_that_do_not_fit_are_refused():
    a = positions(d=1)
    with pytest.raises(ValueError, match=r"run lives on a torus, where a law on the line has no distance"):
        to_law(a.assign_attrs(period="[1.0]"), Gaussian([0.0], [[1.0]]))
    with pytest.raises(ValueError, match=r"law at t = 0 lives in dimension 2, the particles in dimension 1"):
        to_law(a, Gaussian([0.0, 0.0], 1.0))
    with pytest.raises(TypeError, match=r"law at t = 0 is a float; expected an mfsde Law"):
        to_law(a, lambda t: 1.0)
    with pytest.raises(ValueError, match=r"Nameless \(d = 1\) has no quantile function"):
        to_law(a, Nameless(1))
    with pytest.raises(ValueError, match=r"Nameless states no mean and cov"):
        to_law(positions(d=2), Nameless(2))
    assert debiased(positions(d=2), Nameless(2)).attrs["estimator"].endswith("transport")


# Runs: all of them


@pytest.mark.parametrize("d", [1, 2])
def test_chunked_and_swept_data_give_the_same_numbers(d):
    pytest.importorskip("dask")
    a, b = (xr.concat([positions(d=d, seed=s), positions(d=d, seed=s + 1) * 2], "kappa") for s in (1, 5))
    a, b = (z.assign_coords(kappa=[0.5, 1.0]) for z in (a, b))
    law = MeanFieldOU(initial_mean=(1.0,) * d).limit
    for name, route in {
        "between": lambda z, w: between(z, w),
        "to_law": lambda z, w: to_law(z, law),
        "debiased": lambda z, w: debiased(z, w),
        "debiased from a law": lambda z, w: debiased(z, law),
        "between_replicas": lambda z, w: between_replicas(z),
    }.items():
        plain = route(a, b)
        chunks = {"time": 1, "particle": 7, "replica": 2}
        lazy = route(a.chunk(chunks), b.chunk(chunks))
        assert lazy.chunks is not None, name
        xr.testing.assert_identical(lazy.compute(), plain)
        for k in range(2):
            np.testing.assert_array_equal(plain.isel(kappa=k), route(a.isel(kappa=k), b.isel(kappa=k)))
        # A fixed reference is shared by the sweep.
        if name in ("between", "debiased"):
            shared = route(a, b.isel(kappa=0, drop=True))
            np.testing.assert_array_equal(shared.isel(kappa=0), plain.isel(kappa=0))


def test_runs_of_the_engine_go_in_as_they_are():
    ou = MeanFieldOU()
    settings = {"n_particles": 20, "n_replicas": 3, "horizon": 0.4, "dt": 0.1, "save_every": 2}
    a, b = (mfsde.simulate(ou, seed=s, **settings) for s in (1, 2))
    found = to_law(a, ou.limit)
    np.testing.assert_array_equal(found.time, a.time)
    assert between(a, b).dims == debiased(a, b).dims == found.dims
    kept = mfsde.simulate(ou, seed=1, keep_particles=0, **settings)
    for attempt in (lambda: to_law(kept, ou.limit), lambda: between(a, kept), lambda: debiased(kept, b)):
        with pytest.raises(ValueError, match=r"has no `position`; .* keep_particles=0 keeps none"):
            attempt()
    with pytest.raises(ValueError, match=r"'time' differ: .* 2 shared; select the shared ones on both sides"):
        between(a, b.isel(time=slice(1, None)))


def test_programs_in_threads_leave_the_filters_of_warnings_alone():
    before = list(warnings.filters)
    run = xr.DataArray(RNG.normal(size=(4, 5, 20, 2)), dims=("time", "replica", "particle", "component"))
    debiased(run, run.isel(time=0), estimator="transport")
    between(run, run)
    assert list(warnings.filters) == before
