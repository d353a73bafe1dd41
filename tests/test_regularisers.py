"""Regularisers: every proximal map against a minimiser, its optimality and its inverse, every subdifferential against
its definition."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import LinearConstraint, NonlinearConstraint, minimize, nnls
from torch import Tensor

from mfsde.convex_sets import Ball, Box, HalfSpace, Simplex
from mfsde.provenance import decode, encode
from mfsde.regularisers import L1, GroupNorm, PathNorm, Regulariser, Separable, SquaredNorm, check_prox

DOUBLE = torch.float64

NORMS: list[Regulariser] = [
    L1(0.6),
    L1(0.6, (1, 3)),
    GroupNorm(0.7),
    GroupNorm(0.7, ((0, 2), (3,))),
    SquaredNorm(0.4),
    SquaredNorm(0.4, (2,)),
    PathNorm(0.8),
    PathNorm(0.8, (3,), (0, 1)),
    PathNorm(0.8, (1, 2)),
    L1(0.3, (0,)) + GroupNorm(0.5, ((1, 2, 3),)),
]
SETS: list[Regulariser] = [
    Box(-0.5, 0.7),
    Box((0.0, -math.inf), (math.inf, 0.3), (1, 2)),
    Ball(0.9),
    Ball(0.8, (0.3, -0.2, 0.5), (0, 1, 3)),
    HalfSpace((1.0, -2.0, 0.5, 0.3), 0.4),
    HalfSpace((3.0, 4.0), -1.0, (2, 3)),
    Simplex(),
    Simplex(1.7, (0, 1, 3)),
    Box(0.0, 1.0, (0,)) + Ball(0.6, 0.0, (1, 2)) + L1(0.4, (3,)),
]
ALL = NORMS + SETS
each = pytest.mark.parametrize("v", ALL, ids=repr)


def normals(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)


def kinks(v: Regulariser, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    """Points of the domain, many of them on kinks and walls: proximal maps of points near and far.    (60, 4)."""
    x = normals(60, 4, seed=seed, dtype=dtype) * torch.logspace(-1.5, 0.8, 60, dtype=dtype)[:, None]
    return v.prox(x, 0.9)


# The proximal maps


def proximal_value(v: Regulariser, y: np.ndarray, x: np.ndarray, h: float) -> float:
    return 0.5 * float(((y - x) ** 2).sum()) + h * float(v.value(torch.from_numpy(y)[None])[0])


def constraints(v: Regulariser) -> list[Any]:
    """The sets as scipy says them."""
    if isinstance(v, Separable):
        return [c for part in v.parts for c in constraints(part)]
    k = list(range(4)) if getattr(v, "components", None) is None else list(v.components)
    rows = np.eye(4)[k]
    if isinstance(v, Box):
        return [LinearConstraint(rows, v.low, v.high)]
    if isinstance(v, HalfSpace):
        return [LinearConstraint(np.array(v.normal) @ rows, -np.inf, v.offset)]
    if isinstance(v, Simplex):
        return [LinearConstraint(rows, 0, np.inf), LinearConstraint(rows.sum(0), v.total, v.total)]
    if isinstance(v, Ball):
        centre = np.broadcast_to(v.centre, len(k))
        return [
            NonlinearConstraint(
                lambda y: ((y[k] - centre) ** 2).sum(), -np.inf, v.radius**2, jac=lambda y: 2 * (y[k] - centre) @ rows
            )
        ]
    return []


@pytest.mark.parametrize("v", NORMS, ids=repr)
def test_no_point_does_better_than_the_proximal_map(v):
    """Scipy's minimiser from several starts, the map's own result among them."""
    h, excess = 0.7, 0.0
    for x in normals(6, 4, seed=1).numpy():
        found = v.prox(torch.from_numpy(x)[None], h)[0].numpy()
        least = proximal_value(v, found, x, h)
        others = [
            minimize(lambda y, x=x: proximal_value(v, y, x, h), start, method="Nelder-Mead",
                     options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 2000, "adaptive": True})
            for start in (x, found + 1e-3, np.zeros(4) + 0.01)
        ]  # fmt: skip
        best = min(others, key=lambda o: o.fun)
        assert least <= best.fun + 1e-12
        assert best.fun == pytest.approx(least, abs=1e-4)
        wrong = v.prox(torch.from_numpy(x)[None], h**2)[0].numpy()
        excess = max(excess, proximal_value(v, wrong, x, h) - least)
    assert excess > 1e-3


@pytest.mark.parametrize("v", SETS, ids=repr)
def test_projections_are_scipys(v):
    smooth = [part for part in getattr(v, "parts", ()) if isinstance(part, L1)]
    for x in 1.5 * normals(6, 4, seed=2).numpy():
        found = v.prox(torch.from_numpy(x)[None], 0.7)[0].numpy()
        target = x.copy()
        for part in smooth:  # the norm beside the sets, whose map is tested above
            target = part.prox(torch.from_numpy(target)[None], 0.7)[0].numpy()
        best = minimize(
            lambda y, t=target: 0.5 * ((y - t) ** 2).sum(), np.full(4, 0.2), jac=lambda y, t=target: y - t,
            method="SLSQP", constraints=constraints(v), options={"ftol": 1e-14, "maxiter": 500},
        )  # fmt: skip
        np.testing.assert_allclose(found, best.x, atol=1e-6)


@each
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
def test_what_the_proximal_map_took_away_is_a_subgradient_where_it_arrived(v, dtype):
    """(x - p)/h ∈ ∂V(p), for p = prox(x, h): its projection onto ∂V(p) is itself, and p is in the domain."""
    x = 1.5 * normals(3, 50, 4, seed=3, dtype=dtype)
    for h in (0.9, 0.05):
        p = v.prox(x, h)
        assert torch.isfinite(v.value(p)).all()
        g = (x - p) / h
        gap = (v.project_subgradient(p, g) - g).abs().max()
        assert gap < 200 * torch.finfo(dtype).eps / h
        if not v.has_domain:
            halved = v.prox(x, h / 2)  # a planted fault
            assert (v.project_subgradient(halved, (x - halved) / h) - (x - halved) / h).abs().max() > 1e-2


@each
def test_the_subgradient_nearest_to_v_is_one_and_no_other_is_nearer(v):
    """∂V(x) = {p: V(y) >= V(x) + ⟨p, y - x⟩ + o}, probed by directions; nearness by ⟨v - p, q - p⟩ <= 0, q ∈ ∂V(x)."""
    x, velocity = kinks(v, seed=4), 2 * normals(60, 4, seed=5)
    p = v.project_subgradient(x, velocity)
    directions = torch.nn.functional.normalize(normals(400, 1, 4, seed=6), dim=-1)
    # Towards other points of the domain: most directions leave a simplex.
    towards = kinks(v, seed=7).roll(1, 0)
    for eps in (1e-3, 1e-4):
        for y in (v.project(x + eps * directions), x + eps * (towards - x)):
            excess = v.value(y) - v.value(x) - (p * (y - x)).sum(-1)
            assert (excess >= -3 * eps * eps).all()
    # Other subgradients at the same points: projections of other velocities.
    for seed in range(8, 14):
        q = v.project_subgradient(x, 3 * normals(60, 4, seed=seed))
        assert (((velocity - p) * (q - p)).sum(-1) <= 1e-10).all()
        # Nonexpansive, as projections onto convex sets are, and idempotent.
    torch.testing.assert_close(v.project_subgradient(x, p), p, rtol=1e-9, atol=1e-9)


def tangents(v: Regulariser, x: Tensor) -> list[Tensor]:
    """Generators of the directions that stay in a polyhedron from its point x."""
    axes = list(torch.eye(4, dtype=DOUBLE))
    if isinstance(v, Box):
        return [e for e, at in zip(axes, x, strict=True) if at < v.high] + [
            -e for e, at in zip(axes, x, strict=True) if at > v.low
        ]
    if isinstance(v, Simplex):
        return [axes[j] - axes[i] for i in range(4) if x[i] > 0 for j in range(4) if j != i]
    n = torch.tensor(v.normal, dtype=DOUBLE)
    along = list(torch.linalg.svd(n[None]).Vh[1:])
    on_wall = abs(float(n @ x) - v.offset) < 1e-12
    return [*along, *(-u for u in along), -n] + ([] if on_wall else [n])


@pytest.mark.parametrize("v", [Box(-0.5, 0.7), HalfSpace((1.0, -2.0, 0.5, 0.3), 0.4), Simplex()], ids=repr)
def test_normal_cones_of_polyhedra_against_their_tangent_cones(v):
    """What is left of a velocity is its projection on the tangent cone: non-negative least squares of its generators
    (Moreau's decomposition)."""
    x = kinks(v, seed=9)
    for i, at in enumerate(x):
        generators = torch.stack(tangents(v, at)).numpy().T
        velocity = normals(4, seed=100 + i)
        found = velocity - v.project_subgradient(at[None], velocity[None])[0]
        coefficients, _ = nnls(generators, velocity.numpy())
        np.testing.assert_allclose(found.numpy(), generators @ coefficients, atol=1e-9)


@pytest.mark.parametrize("v", [L1(0.6), GroupNorm(0.7, ((0, 2), (3,))), PathNorm(0.8, (3,), (0, 1))], ids=repr)
def test_the_nearest_subgradient_is_that_of_a_small_proximal_step(v):
    """lim (x + hv - prox(x + hv))/h is the projection of v onto ∂V(x) for convex V, and for these locally."""
    x, velocity = kinks(v, seed=11), normals(60, 4, seed=12)
    h = 1e-7
    moved = x + h * velocity
    small = (moved - v.prox(moved, h)) / h
    torch.testing.assert_close(v.project_subgradient(x, velocity), small, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("v", NORMS, ids=repr)
def test_away_from_its_kinks_the_subgradient_is_the_automatic_gradient(v):
    x = normals(2, 30, 4, seed=13).requires_grad_()
    (slope,) = torch.autograd.grad(v.value(x).sum(), x)
    for velocity in (normals(2, 30, 4, seed=14), torch.zeros(2, 30, 4, dtype=DOUBLE)):
        torch.testing.assert_close(v.project_subgradient(x.detach(), velocity), slope, rtol=1e-12, atol=1e-12)


def test_kinks_are_met_exactly():
    x = normals(1, 2000, 4, seed=15)
    assert (L1(0.5).prox(x, 1.0) == 0).sum() == (x.abs() <= 0.5).sum()
    assert (GroupNorm(1.0).prox(x, 1.0) == 0).all(-1).sum() == (x.norm(dim=-1) <= 1).sum()
    y = PathNorm(0.9).prox(x, 1.0)
    a, b = x[..., 0].abs(), x[..., 1:].norm(dim=-1)
    assert torch.equal(y[..., 0] == 0, a <= 0.9 * b)
    assert torch.equal((y[..., 1:] == 0).all(-1), b <= 0.9 * a)
    assert ((y[..., 0] == 0) & (b > a)).any()
    assert ((y[..., 1:] == 0).all(-1) & (a > b)).any()
    s = Simplex().prox(x, 1.0)
    assert (s == 0).any()
    assert (s >= 0).all()


def test_the_path_norm_is_semiconvex_and_has_no_proximal_map_beyond_its_step_limit():
    v = PathNorm(0.8)
    assert v.step_limit == pytest.approx(1.25)
    x, y = normals(500, 4, seed=16), normals(500, 4, seed=17)

    def convexified(z: Tensor, c: float) -> Tensor:
        return v.value(z) + 0.5 * c * z.square().sum(-1)

    def gap(c: float) -> Tensor:
        return 0.5 * (convexified(x, c) + convexified(y, c)) - convexified((x + y) / 2, c)

    assert (gap(0.8) >= -1e-12).all()
    assert (gap(0.5) < -1e-3).any()
    v.prox(x, 1.24)
    with pytest.raises(ValueError, match=r"does not exist for the step h = 1\.25.*h < 1/weight = 1\.25"):
        v.prox(x, 1.25)


def test_a_large_point_is_projected_onto_the_simplex_to_full_precision():
    x = torch.tensor([[[1e20, 0.0, 1.0], [1e9, 1e9 + 0.25, 0.0], [-1e15, -1e15, -1e15]]], dtype=DOUBLE)
    expected = torch.tensor([[[1.0, 0.0, 0.0], [0.375, 0.625, 0.0], [1 / 3, 1 / 3, 1 / 3]]], dtype=DOUBLE)
    torch.testing.assert_close(Simplex().project(x), expected, rtol=1e-15, atol=1e-15)


@each
def test_particles_and_replicas_do_not_see_each_other_and_nothing_changes_in_place(v):
    x, velocity = 1.3 * normals(2, 3, 20, 4, seed=18), normals(2, 3, 20, 4, seed=19)
    before = x.clone(), velocity.clone()
    p = v.prox(x, 0.3)
    g = v.project_subgradient(p, velocity)
    assert v.value(p).shape == (2, 3, 20)
    assert torch.equal(p[1, 2, 5:6], v.prox(x[1, 2, 5:6], 0.3))
    assert torch.equal(g[1, 2, 5:6], v.project_subgradient(p[1, 2, 5:6], velocity[1, 2, 5:6]))
    assert torch.equal(before[0], x)
    assert torch.equal(before[1], velocity)
    nan = x.clone()
    nan[0, 0, 0] = math.nan
    assert torch.isnan(v.prox(nan, 0.3)).any() or v.used is not None


@each
def test_projections_stay_where_they_are(v):
    for dtype in (DOUBLE, torch.float32):
        x = 2 * normals(2, 40, 4, seed=20, dtype=dtype)
        p = v.project(x)
        torch.testing.assert_close(v.project(p), p, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
        assert v.has_domain or p is x
        assert torch.isfinite(v.value(p)).all()
        assert v.has_domain == (not torch.isfinite(v.value(x)).all())


@each
def test_a_run_records_it_and_builds_it_again(v):
    assert decode(encode(v)) == v


@each
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
def test_no_proximal_map_is_worse_than_to_stay(v, dtype):
    for x in (kinks(v, seed=22, dtype=dtype)[None], 1e4 * kinks(v, seed=23, dtype=dtype)[None]):
        for h in (0.9, 1e-3, 1e-9):
            check_prox(v, x, v.prox(x, h), h, "it")


@dataclass(frozen=True)
class Doubled(L1):
    def prox(self, x, h):
        return 2 * x


@dataclass(frozen=True)
class Overshooting(L1):
    """The other side of the kink: from |x| < hλ it takes the whole step."""

    def prox(self, x, h):
        return x - h * self.weight * x.sign()


@pytest.mark.parametrize("v", [Doubled(1.0), Doubled(1.0, (1,)), Overshooting(1.0)], ids=repr)
def test_a_proximal_map_that_is_worse_is_refused(v):
    x, h = torch.tensor([[[0.0, 0.0], [3.0, 0.1]]], dtype=DOUBLE), 0.5
    with pytest.raises(ValueError, match=rf"Flow: prox\(x, 0.5\) of {type(v).__name__}.* at x = \[3.0, 0.1\] it gives"):
        check_prox(v, x, v.prox(x, h), h, "Flow")
    with pytest.raises(ValueError, match="is not the minimiser"):
        check_prox(v, x, x / 0, h, "Flow")


def test_a_regulariser_of_ones_own_joins_the_others():
    @dataclass(frozen=True)
    class Huber(Regulariser):
        components: tuple[int, ...] = (0,)

        def value(self, x):
            return torch.nn.functional.huber_loss(x[..., 0], torch.zeros_like(x[..., 0]), reduction="none")

        def prox(self, x, h):
            y = x.clone()
            y[..., 0] = x[..., 0] - h * (x[..., 0] / (1 + h)).clamp(-1, 1)
            return y

        def project_subgradient(self, x, v):
            g = torch.zeros_like(x)
            g[..., 0] = x[..., 0].clamp(-1, 1)
            return g

    both = Huber() + L1(0.5, (1,))
    assert both.used == (0, 1)
    assert not both.is_smooth
    x = normals(1, 7, 2, seed=21)
    p = both.prox(x, 0.4)
    torch.testing.assert_close(both.project_subgradient(p, (x - p) / 0.4), (x - p) / 0.4)
    assert (SquaredNorm(1.0, (0,)) + SquaredNorm(2.0, (1,))).is_smooth
    with pytest.raises(TypeError):
        L1(1.0) + 3


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: L1(-1.0), "weight = -1.0; expected a number >= 0"),
        (lambda: GroupNorm(math.nan), "weight = nan"),
        (lambda: L1(1.0, ()), r"components are \(\); expected a tuple"),
        (lambda: L1(1.0, (0, 0)), "different whole numbers"),
        (lambda: L1(1.0, (-1,)), "different whole numbers >= 0"),
        (lambda: GroupNorm(1.0, ((0, 1), (1,))), "taken together"),
        (lambda: GroupNorm(1.0, ()), "groups is empty"),
        (lambda: PathNorm(1.0, (0,), (0, 1)), "outer and inner, taken together"),
        (lambda: PathNorm(1.0, (0, 1)).value(torch.zeros(1, 3, 2)), "are all of the 2 there are"),
        (lambda: Box(1.0, 0.0), "expected low <= high"),
        (lambda: Box((0.0, 1.0), (1.0, 2.0, 3.0)), "different numbers of components"),
        (lambda: Box((0.0, 1.0)).project(torch.zeros(1, 3, 3)), "do not fit 3 components"),
        (lambda: Ball(0.0), "radius = 0.0; expected a positive number"),
        (lambda: Ball(1.0, (0.0, 0.0)).project(torch.zeros(1, 3, 3)), "does not fit 3 components"),
        (lambda: Ball(1.0, math.inf), "expected finite numbers"),
        (lambda: HalfSpace((0.0, 0.0)), "not all of the normal's zero"),
        (lambda: HalfSpace((1.0,)).project(torch.zeros(1, 3, 3)), "does not fit 3 components"),
        (lambda: Simplex(0.0), "total = 0.0; expected a positive number"),
        (lambda: L1(1.0, (3,)).value(torch.zeros(1, 3, 3)), r"components \(3,\) do not fit points of 3 components"),
        (lambda: L1(1.0).prox(torch.zeros(1, 3, 3), -0.1), "step h is -0.1; expected h >= 0"),
        (lambda: Ball(1.0).prox(torch.zeros(1, 3, 3), math.nan), "step h is nan"),
        (lambda: L1(1.0) + Box(0.0, 1.0, (0,)), r"L1 \+ Box share components \(all, \(0,\)\).*not that of its terms"),
        (lambda: L1(1.0, (0, 1)) + Ball(1.0, 0.0, (1, 2)), "share components"),
        (lambda: PathNorm(1.0) + L1(1.0, (3,)), "share components"),
        (lambda: Separable(()), "no parts"),
    ],
)
def test_what_is_no_regulariser_is_refused(make, what):
    with pytest.raises(ValueError, match=what):
        make()


def test_parameters_can_be_replaced():
    assert replace(L1(0.5), weight=1.0) == L1(1.0)
