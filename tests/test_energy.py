"""Energies: automatic and hand-written derivatives against closed forms and against differences along mixtures."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mfsde
from mfsde import EmpiricalMeasure, Energy, interaction, potential
from mfsde.pairwise import blocked

FLOAT64 = torch.float64


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def some_measure(*lead: int, n: int = 6, d: int = 2, weighted: bool = False, period=None) -> EmpiricalMeasure:
    weights = torch.softmax(normals(*lead, n, seed=1), -1) if weighted else None
    return EmpiricalMeasure(normals(*lead, n, d), weights, period=period)


def against(mu: EmpiricalMeasure, values: Tensor) -> Tensor:
    """∫ f dm from the values of f on the particles, last axis."""
    return (mu.weights * values).sum(-1)


# Closed forms ---------------------------------------------------------------------------------------------------------

KAPPA, A, Y = 0.7, 0.4, 0.3


@dataclass(frozen=True)
class ClosedForm:
    """An energy and its derivatives worked out by hand; x: (..., M, d), y: (..., K, d)."""

    energies: tuple[Energy, ...]
    value: Callable[[EmpiricalMeasure], Tensor]
    functional: Callable[[EmpiricalMeasure, Tensor], Tensor]
    intrinsic: Callable[[EmpiricalMeasure, Tensor], Tensor]
    second: Callable[[EmpiricalMeasure, Tensor, Tensor], Tensor]


def centre(mu: EmpiricalMeasure) -> Tensor:
    return (mu.weights.unsqueeze(-1) * mu.points).sum(-2, keepdim=True)


def variance(mu: EmpiricalMeasure) -> Tensor:
    return against(mu, (mu.points - centre(mu)).square().sum(-1))


def ridge(x: Tensor) -> Tensor:
    return torch.sin(x.sum(-1))


def quartic(x: Tensor) -> Tensor:
    return 0.25 * x.square().sum(-1).square()


def bell(z: Tensor) -> Tensor:
    return torch.exp(-0.5 * z.square().sum(-1))


def pairs(x: Tensor, y: Tensor) -> Tensor:
    return bell(x.unsqueeze(-2) - y.unsqueeze(-3))


def smoothed(mu: EmpiricalMeasure, x: Tensor) -> Tensor:
    return (pairs(x, mu.points) * mu.weights.unsqueeze(-2)).sum(-1)


def pulled(mu: EmpiricalMeasure, x: Tensor) -> Tensor:
    z = x.unsqueeze(-2) - mu.points.unsqueeze(-3)
    return -(z * (bell(z) * mu.weights.unsqueeze(-2)).unsqueeze(-1)).sum(-2)


def residual(mu: EmpiricalMeasure) -> Tensor:
    return against(mu, ridge(mu.points)) - Y


def inner(x: Tensor, y: Tensor) -> Tensor:
    return x @ y.mT


CLOSED_FORMS = {
    "mean": ClosedForm(
        (Energy(lambda mu: 0.5 * KAPPA * (mu.mean() - A).square().sum((-2, -1))),),
        lambda mu: 0.5 * KAPPA * (centre(mu) - A).square().sum((-2, -1)),
        lambda mu, x: KAPPA * ((centre(mu) - A) * (x - centre(mu))).sum(-1),
        lambda mu, x: KAPPA * (centre(mu) - A).expand_as(x),
        lambda mu, x, y: KAPPA * inner(x - centre(mu), y - centre(mu)),
    ),
    "variance": ClosedForm(
        (
            Energy(lambda mu: mu.integrate(lambda x: (x - mu.mean()).square().sum(-1))),
            Energy(lambda mu: mu.covariance().diagonal(dim1=-2, dim2=-1).sum(-1)),
        ),
        variance,
        lambda mu, x: (x - centre(mu)).square().sum(-1) - variance(mu).unsqueeze(-1),
        lambda mu, x: 2 * (x - centre(mu)),
        lambda mu, x, y: -2 * inner(x - centre(mu), y - centre(mu)),
    ),
    "neuron": ClosedForm(
        (Energy(lambda mu: 0.5 * (mu.integrate(ridge) - Y).square()),),
        lambda mu: 0.5 * residual(mu).square(),
        lambda mu, x: residual(mu).unsqueeze(-1) * (ridge(x) - against(mu, ridge(mu.points)).unsqueeze(-1)),
        lambda mu, x: residual(mu)[..., None, None] * torch.cos(x.sum(-1, keepdim=True)).expand_as(x),
        lambda mu, x, y: (
            (ridge(x) - against(mu, ridge(mu.points)).unsqueeze(-1)).unsqueeze(-1)
            * (ridge(y) - against(mu, ridge(mu.points)).unsqueeze(-1)).unsqueeze(-2)
        ),
    ),
    "interaction": ClosedForm(
        (
            interaction(bell),
            Energy(lambda mu: 0.5 * mu.integrate(lambda x: mu.convolve(bell, x))),
        ),
        lambda mu: 0.5 * against(mu, smoothed(mu, mu.points)),
        lambda mu, x: smoothed(mu, x) - against(mu, smoothed(mu, mu.points)).unsqueeze(-1),
        pulled,
        lambda mu, x, y: (
            pairs(x, y)
            - smoothed(mu, x).unsqueeze(-1)
            - smoothed(mu, y).unsqueeze(-2)
            + against(mu, smoothed(mu, mu.points))[..., None, None]
        ),
    ),
    "potential": ClosedForm(
        (potential(quartic), Energy(lambda mu: mu.integrate(quartic))),
        lambda mu: against(mu, quartic(mu.points)),
        lambda mu, x: quartic(x) - against(mu, quartic(mu.points)).unsqueeze(-1),
        lambda mu, x: x.square().sum(-1, keepdim=True) * x,
        lambda mu, x, y: torch.zeros(*x.shape[:-1], y.shape[-2], dtype=FLOAT64),
    ),
}


@pytest.mark.parametrize("form", CLOSED_FORMS.values(), ids=CLOSED_FORMS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
@pytest.mark.parametrize("d", [1, 3])
def test_derivatives_are_the_closed_forms(form, weighted, lead, d):
    mu = some_measure(*lead, n=5, d=d, weighted=weighted)
    x, y = normals(*lead, 4, d, seed=7), normals(*lead, 3, d, seed=8)
    for F in form.energies:
        for found, expected in [
            (F(mu), form.value(mu)),
            (F.functional_derivative(mu, x), form.functional(mu, x)),
            (F.functional_derivative(mu, mu.points), form.functional(mu, mu.points)),
            (F.intrinsic_derivative(mu, x), form.intrinsic(mu, x)),
            (F.intrinsic_derivative(mu, mu.points), form.intrinsic(mu, mu.points)),
            (F.second_derivative(mu, x, y), form.second(mu, x, y)),
            (F.second_derivative(mu, mu.points, y), form.second(mu, mu.points, y)),
        ]:
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", CLOSED_FORMS.values(), ids=CLOSED_FORMS)
def test_a_particle_of_mass_zero_feels_the_force_of_a_point_elsewhere(form):
    x, weights = normals(5, 2), torch.tensor([0.25, 0.0, 0.25, 0.5, 0.0], dtype=FLOAT64)
    mu = EmpiricalMeasure(x, weights)
    for F in form.energies:
        torch.testing.assert_close(F.intrinsic_derivative(mu, x), form.intrinsic(mu, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("weighted", [False, True])
def test_on_the_particles_the_derivative_is_the_particles_gradient_over_their_mass(weighted):
    mu = some_measure(n=4, weighted=weighted)
    F, h = curved(), 1e-5
    found = F.intrinsic_derivative(mu, mu.points)
    for i in range(4):
        for k in range(2):
            step = torch.zeros(4, 2, dtype=FLOAT64)
            step[i, k] = h
            up, down = (F(EmpiricalMeasure(mu.points + s, mu.weights)) for s in (step, -step))
            assert found[i, k].item() == pytest.approx(((up - down) / (2 * h * mu.weights[i])).item(), abs=1e-8)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("lead", [(), (2,)])
@pytest.mark.parametrize("period", [2.0, [2.0, None]])
def test_the_fast_interaction_is_the_automatic_one_on_a_torus(weighted, lead, period):
    mu = some_measure(*lead, n=5, weighted=weighted, period=period)
    x, y = normals(*lead, 4, 2, seed=7), normals(*lead, 3, 2, seed=8)
    fast, slow = CLOSED_FORMS["interaction"].energies
    for found, expected in [
        (fast(mu), slow(mu)),
        (fast.functional_derivative(mu, x), slow.functional_derivative(mu, x)),
        (fast.intrinsic_derivative(mu, x), slow.intrinsic_derivative(mu, x)),
        (fast.intrinsic_derivative(mu, mu.points), slow.intrinsic_derivative(mu, mu.points)),
        (fast.second_derivative(mu, x, y), slow.second_derivative(mu, x, y)),
    ]:
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert (fast(mu) - fast(EmpiricalMeasure(mu.points, mu.weights))).abs().max() > 1e-3


# Differences along mixtures -------------------------------------------------------------------------------------------


def curved() -> Energy:
    """An energy that is no polynomial in the measure, so that no order of differentiation is special."""
    return Energy(
        lambda mu: torch.exp(mu.integrate(ridge)) + mu.integrate(quartic) * mu.integrate(lambda x: mu.convolve(bell, x))
    )


def moved(mu: EmpiricalMeasure, *steps: tuple[float, Tensor]) -> EmpiricalMeasure:
    """m + Σ ε (δ_x - m), as one weighted measure; x: (d,)."""
    left = 1 - sum(eps for eps, _ in steps)
    points = torch.cat([mu.points, *[x[None] for _, x in steps]])
    weights = torch.cat([left * mu.weights, mu.weights.new_tensor([eps for eps, _ in steps])])
    return EmpiricalMeasure.signed(points, weights)


def is_first_variation(F, mu: EmpiricalMeasure, x: Tensor) -> bool:
    """d/dε F((1-ε)m + εδ_x) at 0 is δF/δm(x)."""
    h = 1e-4
    slopes = torch.stack([(F(moved(mu, (h, at))) - F(moved(mu, (-h, at)))) / (2 * h) for at in x])
    return torch.allclose(F.functional_derivative(mu, x), slopes, rtol=0, atol=1e-6)


def is_second_variation(F, mu: EmpiricalMeasure, x: Tensor, y: Tensor) -> bool:
    h = 1e-3

    def mixed(a: Tensor, b: Tensor) -> Tensor:
        corners = [(s, t, s * t * F(moved(mu, (s * h, a), (t * h, b)))) for s in (1, -1) for t in (1, -1)]
        return sum(value for _, _, value in corners) / (4 * h * h)

    expected = torch.stack([torch.stack([mixed(a, b) for b in y]) for a in x])
    return torch.allclose(F.second_derivative(mu, x, y), expected, rtol=0, atol=1e-4)


def is_gradient_of_the_first_variation(F, mu: EmpiricalMeasure, x: Tensor) -> bool:
    h = 1e-5
    columns = []
    for k in range(x.shape[-1]):
        step = torch.zeros(x.shape[-1], dtype=FLOAT64)
        step[k] = h
        up, down = F.functional_derivative(mu, x + step), F.functional_derivative(mu, x - step)
        columns.append((up - down) / (2 * h))
    return torch.allclose(F.intrinsic_derivative(mu, x), torch.stack(columns, -1), rtol=0, atol=1e-7)


def is_normalised(F, mu: EmpiricalMeasure, y: Tensor) -> bool:
    first = against(mu, F.functional_derivative(mu, mu.points))
    second = against(mu, F.second_derivative(mu, mu.points, y).mT)
    return float(first.abs()) < 1e-12 and float(second.abs().max()) < 1e-12


class Faulty:
    """An energy whose derivatives were got wrong: multiplied by a factor or shifted by a constant."""

    def __init__(self, right: Energy, factor: float = 1.0, shift: float = 0.0) -> None:
        self.right, self.factor, self.shift = right, factor, shift

    def __call__(self, mu):
        return self.right(mu)

    def functional_derivative(self, mu, x):
        return self.factor * self.right.functional_derivative(mu, x) + self.shift

    def intrinsic_derivative(self, mu, x):
        # The fault is in one of the two members of D_mF = ∇δF/δm.
        return self.right.intrinsic_derivative(mu, x) + self.shift

    def second_derivative(self, mu, x, y):
        return self.factor * self.right.second_derivative(mu, x, y) + self.shift


ENERGIES = {
    **{f"{name} {k}": F for name, form in CLOSED_FORMS.items() for k, F in enumerate(form.energies)},
    "curved": curved(),
    "sum": 0.5 * curved() - 2.0 * interaction(bell) + potential(quartic),
}
FAULTS = {"a missing half": (2.0, 0.0), "a sign": (-1.0, 0.0), "no normalisation": (1.0, 0.1)}


@pytest.mark.parametrize("F", ENERGIES.values(), ids=ENERGIES)
@pytest.mark.parametrize("weighted", [False, True])
def test_derivatives_are_the_variations_along_mixtures(F, weighted):
    mu = some_measure(n=5, weighted=weighted)
    x, y = normals(3, 2, seed=7), normals(2, 2, seed=8)
    assert is_first_variation(F, mu, x)
    assert is_second_variation(F, mu, x, y)
    assert is_gradient_of_the_first_variation(F, mu, x)
    assert is_gradient_of_the_first_variation(F, mu, mu.points)
    assert is_normalised(F, mu, y)


@pytest.mark.parametrize(("factor", "shift"), FAULTS.values(), ids=FAULTS)
def test_wrong_derivatives_are_seen(factor, shift):
    mu, x, y = some_measure(n=5, weighted=True), normals(3, 2, seed=7), normals(2, 2, seed=8)
    wrong = Faulty(curved(), factor, shift)
    assert not is_first_variation(wrong, mu, x)
    assert not is_second_variation(wrong, mu, x, y)
    assert not is_gradient_of_the_first_variation(wrong, mu, x)
    assert is_normalised(wrong, mu, y) == (shift == 0)


@given(
    lead=st.lists(st.integers(1, 2), max_size=2),
    n=st.integers(1, 5),
    m=st.integers(1, 3),
    k=st.integers(1, 3),
    d=st.integers(1, 3),
    weighted=st.booleans(),
    name=st.sampled_from(sorted(CLOSED_FORMS)),
    dtype=st.sampled_from([torch.float32, FLOAT64]),
)
def test_shapes_dtypes_and_normalisation_hold_for_every_measure(lead, n, m, k, d, weighted, name, dtype):
    weights = torch.softmax(normals(*lead, n, seed=1), -1).to(dtype) if weighted else None
    mu = EmpiricalMeasure(normals(*lead, n, d).to(dtype), weights)
    x, y = normals(*lead, m, d, seed=7).to(dtype), normals(*lead, k, d, seed=8).to(dtype)
    for F in CLOSED_FORMS[name].energies:
        values = [
            (F(mu), tuple(lead)),
            (F.functional_derivative(mu, x), (*lead, m)),
            (F.intrinsic_derivative(mu, x), (*lead, m, d)),
            (F.second_derivative(mu, x, y), (*lead, m, k)),
        ]
        for value, shape in values:
            assert tuple(value.shape) == shape
            assert value.dtype == dtype
        tolerance = 1e-12 if dtype == FLOAT64 else 1e-4
        assert against(mu, F.functional_derivative(mu, mu.points)).abs().max() < tolerance


# Algebra --------------------------------------------------------------------------------------------------------------


def derivatives(F: Energy, mu: EmpiricalMeasure, x: Tensor, y: Tensor) -> list[Tensor]:
    return [
        F(mu),
        F.functional_derivative(mu, x),
        F.intrinsic_derivative(mu, x),
        F.intrinsic_derivative(mu, mu.points),
        F.second_derivative(mu, x, y),
    ]


def test_energies_add_subtract_and_scale_with_all_their_derivatives():
    mu, x, y = some_measure(2, weighted=True), normals(2, 3, 2, seed=7), normals(2, 2, 2, seed=8)
    F, G, H = potential(quartic), interaction(bell), curved()
    f, g, h = (derivatives(energy, mu, x, y) for energy in (F, G, H))
    for combined, coefficients in [
        (F + G, (1, 1, 0)),
        (F - G, (1, -1, 0)),
        (-F, (-1, 0, 0)),
        (2.5 * F, (2.5, 0, 0)),
        (G * 0.5, (0, 0.5, 0)),
        (F - 2 * (G - 3 * H), (1, -2, 6)),
        (-(F + G) * 2, (-2, -2, 0)),
    ]:
        for k, found in enumerate(derivatives(combined, mu, x, y)):
            expected = coefficients[0] * f[k] + coefficients[1] * g[k] + coefficients[2] * h[k]
            torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


# Permutations and replicas --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("F", ENERGIES.values(), ids=ENERGIES)
@given(order=st.permutations(range(5)))
def test_forces_follow_a_relabelling_of_the_particles(F, order):
    mu = some_measure(n=5, weighted=True)
    again = EmpiricalMeasure(mu.points[order], mu.weights[order])
    force = F.intrinsic_derivative(mu, mu.points)
    torch.testing.assert_close(F.intrinsic_derivative(again, again.points), force[order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("F", ENERGIES.values(), ids=ENERGIES)
def test_a_replica_does_not_see_the_others(F):
    mu, x, y = some_measure(3, weighted=True), normals(3, 4, 2, seed=7), normals(3, 2, 2, seed=8)
    batch = derivatives(F, mu, x, y)
    for r in range(3):
        alone = EmpiricalMeasure(mu.points[r], mu.weights[r])
        for one, many in zip(derivatives(F, alone, x[r], y[r]), batch, strict=True):
            torch.testing.assert_close(one, many[r], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("F", ENERGIES.values(), ids=ENERGIES)
def test_points_shared_by_the_replicas_get_each_replicas_force(F):
    mu, x = some_measure(3, weighted=True), normals(4, 2, seed=7)
    each = x.expand(3, 4, 2)
    torch.testing.assert_close(F.functional_derivative(mu, x), F.functional_derivative(mu, each), rtol=0, atol=1e-12)
    shared = F.intrinsic_derivative(mu, x).expand(3, 4, 2)
    torch.testing.assert_close(shared, F.intrinsic_derivative(mu, each), rtol=0, atol=1e-12)


# Graphs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("F", ENERGIES.values(), ids=ENERGIES)
@pytest.mark.parametrize("tracked", ["nothing", "points", "weights", "x"])
def test_derivatives_come_back_detached_and_do_not_depend_on_what_is_tracked(F, tracked):
    mu, x = some_measure(n=5, weighted=True), normals(3, 2, seed=7)
    expected = derivatives(F, mu, x, x)[1:]
    points, weights = mu.points.clone(), mu.weights.clone()
    z = x.clone()
    {"points": points, "weights": weights, "x": z, "nothing": torch.zeros(1)}[tracked].requires_grad_()
    mu = EmpiricalMeasure(points, weights)
    for found, value in zip(derivatives(F, mu, z, z)[1:], expected, strict=True):
        assert not found.requires_grad
        torch.testing.assert_close(found, value, rtol=0, atol=1e-14)
    assert points.grad is None
    assert weights.grad is None


@pytest.mark.parametrize("F", ENERGIES.values(), ids=ENERGIES)
def test_derivatives_are_the_same_under_no_grad(F):
    mu, x = some_measure(n=5, weighted=True), normals(3, 2, seed=7)
    expected = derivatives(F, mu, x, x)
    with torch.no_grad():
        for found, value in zip(derivatives(F, mu, x, x), expected, strict=True):
            assert torch.equal(found, value)


def test_the_value_itself_is_differentiable():
    points = normals(5, 2).requires_grad_()
    weights = torch.softmax(normals(5, seed=1), -1)
    (slope,) = torch.autograd.grad(curved()(EmpiricalMeasure(points, weights)), [points])
    force = curved().intrinsic_derivative(EmpiricalMeasure(points.detach(), weights), points)
    torch.testing.assert_close(slope, weights[:, None] * force, rtol=1e-12, atol=1e-12)


# Memory ---------------------------------------------------------------------------------------------------------------


class Memory(TorchDispatchMode):
    """The largest tensor made under it, and the most bytes alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.alive = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._record(tensor.untyped_storage())
        return out

    def _record(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.largest = max(self.largest, size)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def test_the_memory_of_an_interaction_is_that_of_a_block_of_rows(monkeypatch):
    n, floats = 400, 8000
    monkeypatch.setattr(blocked, "PAIRWISE_FLOATS", floats)
    mu = some_measure(n=n)
    fast, slow = CLOSED_FORMS["interaction"].energies
    for work in (
        lambda: fast(mu),
        lambda: fast.functional_derivative(mu, mu.points),
        lambda: fast.intrinsic_derivative(mu, mu.points),
        lambda: fast.intrinsic_derivative(mu, mu.points.clone()),
        lambda: slow.functional_derivative(mu, mu.points),
        lambda: slow.intrinsic_derivative(mu, mu.points),
    ):
        with Memory() as used:
            work()
        assert used.largest <= 8 * floats
        # A handful of blocks: the differences, the kernel, their gradients.
        assert used.peak <= 8 * 8 * floats
    with Memory() as used:
        pairs(mu.points, mu.points).mean()
    assert used.largest > 8 * floats
    assert used.peak > 8 * 8 * floats


@pytest.mark.parametrize("floats", [1, 40])
def test_the_interaction_is_the_same_in_any_blocks(monkeypatch, floats):
    mu, x, y = some_measure(2, weighted=True), normals(2, 4, 2, seed=7), normals(2, 3, 2, seed=8)
    whole = [derivatives(F, mu, x, y) for F in CLOSED_FORMS["interaction"].energies]
    monkeypatch.setattr(blocked, "PAIRWISE_FLOATS", floats)
    for F, expected in zip(CLOSED_FORMS["interaction"].energies, whole, strict=True):
        for found, value in zip(derivatives(F, mu, x, y), expected, strict=True):
            torch.testing.assert_close(found, value, rtol=0, atol=1e-14)


# What is refused ------------------------------------------------------------------------------------------------------


WRONG = {
    "ignores the weights": (lambda mu: mu.points.square().mean((-2, -1)), "changes when a particle is split"),
    "sums over particles": (lambda mu: mu.points.square().sum((-2, -1)), "changes when a particle is split"),
    "keeps an axis": (
        lambda mu: mu.mean().sum(-1),
        r"returned shape \(2, 1\).*expected \(2,\), one scalar per replica",
    ),
    "mixes the replicas": (lambda mu: mu.mean().sum(), r"returned shape \(\).*expected \(2,\)"),
}


@pytest.mark.parametrize(("value", "message"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("use", range(4))
def test_what_is_no_function_of_the_measure_is_refused_at_first_use(value, message, use):
    F = Energy(value)
    mu = some_measure(2)
    work = [
        lambda: F(mu),
        lambda: F.functional_derivative(mu, mu.points),
        lambda: F.intrinsic_derivative(mu, mu.points),
        lambda: (2 * F + potential(quartic)).second_derivative(mu, mu.points, mu.points),
    ]
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            work[use]()


def test_forgotten_weights_are_seen_even_for_a_single_particle_and_for_equal_ones():
    for points in (torch.ones(1, 2, dtype=FLOAT64), torch.ones(5, 2, dtype=FLOAT64)):
        with pytest.raises(ValueError, match=r"Use the weights: mu\.integrate"):
            Energy(lambda mu: mu.points.square().mean((-2, -1)))(EmpiricalMeasure(points))


def test_an_interaction_that_is_not_even_is_refused():
    mu = some_measure()
    with pytest.raises(ValueError, match=r"W is not even"):
        interaction(lambda z: z.sum(-1))(mu)
    with pytest.raises(ValueError, match=r"W is not even"):
        interaction(lambda z: bell(z - 0.1)).intrinsic_derivative(mu, mu.points)


def test_an_interaction_or_potential_of_the_wrong_shape_is_refused():
    mu = some_measure()
    with pytest.raises(ValueError, match=r"Sum over the last axis"):
        interaction(lambda z: z.square())(mu)
    with pytest.raises(ValueError, match=r"one scalar per replica"):
        potential(lambda x: x.square()).intrinsic_derivative(mu, mu.points)
    with pytest.raises(ValueError, match=r"f must keep the particle axis"):
        potential(lambda x: x.square().sum())(mu)


def test_energies_are_divided_summed_and_multiplied_by_numbers_only():
    mu = some_measure(n=5, weighted=True)
    F, G = mfsde.potential(lambda x: x.square().sum(-1)), mfsde.potential(lambda x: x.sum(-1))
    torch.testing.assert_close((F / 4)(mu), F(mu) / 4)
    torch.testing.assert_close(sum([F, G])(mu), F(mu) + G(mu))
    for meaningless in (lambda: F * G, lambda: F + 1, lambda: 1 + F, lambda: F / G):
        with pytest.raises(TypeError):
            meaningless()


def test_an_energy_of_any_size_must_use_the_weights():
    small = mfsde.Energy(lambda mu: 1e-9 * mu.points.square().mean((-2, -1)))
    with pytest.raises(ValueError, match="split into two halves"):
        small(some_measure(n=5, weighted=False))


@pytest.mark.parametrize(
    "kernel",
    [lambda z: 1 / z.square().sum(-1), lambda z: -z.square().sum(-1).log(), lambda z: z.square().sum(-1).sqrt()],
    ids=["Riesz", "Coulomb", "a kink whose gradient is 0/0"],
)
def test_interactions_singular_on_the_diagonal_are_refused(kernel):
    with pytest.raises(ValueError, match=r"W\(0\) = .* regularise W at 0"):
        interaction(kernel)(some_measure(n=5))
