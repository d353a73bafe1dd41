"""Interactions in runs: the strategy chosen and recorded, its error beside it, and what no strategy may change."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mfsde
from mfsde import EmpiricalMeasure, Kernel, interaction
from mfsde.pairwise import Batches, Blocked, Cells, Compiled, Exact, Fourier, Grid, Moments, convolution, error

FLOAT64 = torch.float64


def gaussian(z: Tensor) -> Tensor:
    return torch.exp(-0.5 * z.square().sum(-1))


def quadratic(z: Tensor) -> Tensor:
    return 0.5 * z.square().sum(-1)


def compact(z: Tensor) -> Tensor:
    return (1 - z.square().sum(-1)).relu() ** 3


STANDARD = mfsde.Gaussian([0.0, 0.0], 1.0)
# Strategies with a kernel that each can evaluate, and the relative error that each may have.
STRATEGIES: dict[str, tuple[Any, Any, float]] = {
    "exact": (gaussian, Exact(), 1e-12),
    "blocked": (gaussian, Blocked(), 1e-12),
    "compiled": (gaussian, Compiled(), 1e-12),
    "moments": (quadratic, Moments(), 1e-12),
    "cells": (compact, Cells(support=1.0), 1e-12),
    "grid": (gaussian, Grid(tolerance=1e-3), 1e-3),
    "fourier": (gaussian, Fourier(n_features=2048, spectrum=STANDARD), 0.2),
    "batches": (gaussian, Batches(size=8), 3.0),
}
every_strategy = pytest.mark.parametrize("name", STRATEGIES)


@dataclass(frozen=True)
class Aggregation:
    """dX = -(∇W * m)(X) dt + σ dW."""

    function: Any = gaussian
    strategy: Any = "exact"
    sigma: float = 0.3

    @cached_property
    def energy(self) -> mfsde.Energy:
        return interaction(self.function, strategy=self.strategy)

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        return -self.energy.intrinsic_derivative(mu, x)

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> float:
        return self.sigma

    def initial(self) -> mfsde.Gaussian:
        return STANDARD


def some_measure(*lead: int, n: int = 40, weighted: bool = False, seed: int = 0) -> EmpiricalMeasure:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(*lead, n, 2, generator=generator, dtype=FLOAT64)
    weights = torch.rand(*lead, n, generator=generator, dtype=FLOAT64) if weighted else None
    return EmpiricalMeasure(points, None if weights is None else weights / weights.sum(-1, keepdim=True))


def run(scenario: Any, **settings: Any) -> Any:
    chosen = {"n_particles": 32, "horizon": 0.3, "dt": 0.1, "seed": 1, "dtype": FLOAT64, **settings}
    return mfsde.simulate(scenario, **chosen)


# What a run says of itself --------------------------------------------------------------------------------------------


@every_strategy
def test_a_run_records_its_strategy_and_the_error_of_an_approximate_one(name):
    function, strategy, tolerance = STRATEGIES[name]
    found = run(Aggregation(function, strategy), n_replicas=2, save_every=1)
    (told,) = json.loads(found.attrs["interactions"]).values()
    assert told["strategy"] == ("blocked" if name == "exact" else name)
    assert told["exact"] is strategy.exact
    if strategy.exact:
        assert "interaction_error" not in found
        return
    assert found.interaction_error.dims == ("time", "replica")
    assert found.interaction_error.shape == (4, 2)
    assert (found.interaction_error > 1e-9).all()
    assert (found.interaction_error <= tolerance).all()


def test_the_recorded_error_is_that_of_the_drift_at_that_state():
    scenario = Aggregation(gaussian, Grid(tolerance=1e-2))
    found = run(scenario, save_every=1)
    for k in range(found.sizes["time"]):
        x = torch.from_numpy(found.position.values[k])
        mu = EmpiricalMeasure(x)
        near, exact = (replace(scenario, strategy=s).drift(0.0, x, mu) for s in (scenario.strategy, "blocked"))
        expected = ((near - exact).square().sum() / exact.square().sum()).sqrt()
        assert found.interaction_error.values[k, 0] == pytest.approx(float(expected), rel=1e-6)
        assert float(scenario.energy.error(mu)[0]) == pytest.approx(float(expected), rel=1e-6)


def test_a_sweep_over_strategies_has_their_errors_in_one_table():
    table = mfsde.sweep(
        Aggregation(), {"strategy": ["exact", "grid"]}, n_particles=32, horizon=0.2, dt=0.1, seed=1, dtype=FLOAT64
    )
    assert (table.interaction_error.sel(strategy="exact") == 0).all()
    assert (table.interaction_error.sel(strategy="grid") > 0).all()


def test_every_scheme_takes_compiled_forces():
    exact, compiled = (run(Aggregation(gaussian, s), method="srk", n_replicas=2) for s in ("blocked", "compiled"))
    np.testing.assert_allclose(compiled.position, exact.position, rtol=1e-12)


def test_a_scenario_without_sums_over_pairs_records_none():
    assert "interactions" not in run(mfsde.scenarios.MeanFieldOU()).attrs


def test_the_exact_strategy_follows_kernel_and_work(monkeypatch):
    mu = some_measure()
    kernels = [Kernel(f) for f in (gaussian, quadratic)]
    pairs = convolution.pairs_of(mu, mu.points, None)
    chosen = [convolution.chosen(kernel, pairs) for kernel in kernels]
    assert chosen == [Blocked(), Blocked()]
    with convolution.ahead(10**9):
        chosen = [convolution.chosen(kernel, pairs) for kernel in kernels]
    assert chosen == [Compiled(), Moments()]
    # Nothing is compiled for less than ten seconds of torch operations, a second or so here.
    with convolution.ahead(int(1 / convolution.SECONDS_PER_PAIR / 40**2)):
        assert convolution.chosen(kernels[0], pairs) == Blocked()


def test_a_long_run_is_compiled_and_agrees_with_the_blocked_one(monkeypatch):
    blocked = run(Aggregation(), save_every=1)
    monkeypatch.setattr(convolution, "SECONDS_PER_PAIR", 1.0)
    compiled = run(Aggregation(), save_every=1)
    (told,) = json.loads(compiled.attrs["interactions"]).values()
    assert told["strategy"] == "compiled"
    np.testing.assert_allclose(compiled.position, blocked.position, rtol=1e-12)


# What no strategy may change ------------------------------------------------------------------------------------------


def forces(name: str, mu: EmpiricalMeasure, x: Tensor | None = None) -> Tensor:
    function, strategy, _ = STRATEGIES[name]
    return interaction(function, strategy=strategy).intrinsic_derivative(mu, mu.points if x is None else x)


invariant = pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "batches"])


@invariant
def test_relabelling_particles_relabels_their_forces(name):
    mu = some_measure(2, weighted=True)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    moved = forces(name, EmpiricalMeasure(mu.points[:, order], mu.weights[:, order]))
    torch.testing.assert_close(moved, forces(name, mu)[:, order], rtol=1e-9, atol=1e-12)


@invariant
def test_a_particle_may_be_split_in_two(name):
    mu = some_measure()
    points, weights = mu.points, mu.weights.clone()
    weights[0] /= 2
    split = EmpiricalMeasure(torch.cat([points, points[:1]]), torch.cat([weights, weights[:1]]))
    torch.testing.assert_close(forces(name, split, points), forces(name, mu), rtol=1e-9, atol=1e-12)


@invariant
def test_replicas_do_not_know_of_each_other(name):
    mu = some_measure(3)
    alone = torch.stack([forces(name, EmpiricalMeasure(x)) for x in mu.points])
    torch.testing.assert_close(forces(name, mu), alone, rtol=1e-9, atol=1e-12)


@invariant
def test_moving_everything_moves_no_force(name):
    mu = some_measure()
    shifted = EmpiricalMeasure(mu.points + torch.tensor([0.37, -1.91], dtype=FLOAT64))
    tolerance = STRATEGIES[name][2]
    size = forces(name, mu).square().mean().sqrt()
    assert (forces(name, shifted) - forces(name, mu)).square().mean().sqrt() <= 2 * tolerance * size


@every_strategy
def test_the_forces_of_an_even_kernel_sum_to_zero(name):
    mu = some_measure(2)
    total = forces(name, mu).sum(-2)
    loose = name == "grid"
    assert (total.abs() <= (STRATEGIES[name][2] if loose else 1e-11) * forces(name, mu).abs().sum(-2)).all()


@every_strategy
def test_threads_change_nothing_but_rounding(name):
    function, strategy, _ = STRATEGIES[name]
    one = run(Aggregation(function, strategy), n_particles=300)
    torch.set_num_threads(2)
    two = run(Aggregation(function, strategy), n_particles=300)
    np.testing.assert_allclose(two.position, one.position, rtol=0, atol=1e-11)


@dataclass(frozen=True)
class KineticAggregation(mfsde.KineticLangevin):
    """The same force on positions."""

    strategy: Any = "exact"
    sigma: float = 0.5
    gamma: float = 1.0

    @property
    def energy(self) -> mfsde.Energy:
        return interaction(gaussian, strategy=self.strategy)

    def confinement(self, x: Tensor) -> Tensor:
        return 0.5 * x.square().sum(-1)

    def initial(self) -> mfsde.Gaussian:
        return mfsde.Gaussian([0.0] * 4, 1.0)


@pytest.mark.parametrize(
    ("scenario", "method"),
    [
        (Aggregation(gaussian, Compiled()), "euler"),
        (Aggregation(gaussian, Grid(tolerance=1e-3)), "euler"),
        (Aggregation(gaussian, Batches(size=8)), "heun"),
        (KineticAggregation(Batches(size=8)), "baoab"),
        (KineticAggregation(Batches(size=8)), "obabo"),
    ],
    ids=["compiled", "grid", "batches", "kinetic batches", "kinetic batches, obabo"],
)
def test_a_stored_run_is_resumed_to_the_bit(scenario, method, tmp_path):
    settings = {"save_every": 1, "checkpoint_every": 1, "method": method}
    whole = run(scenario, store=tmp_path / "whole", **settings)
    at = mfsde.run.Progress.at

    class Stop(Exception):
        pass

    def stopping(self: Any, step: int) -> None:
        at(self, step)
        if step == 2:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mfsde.run.Progress, "at", stopping)
        with pytest.raises(Stop):
            run(scenario, store=tmp_path / "cut", **settings)
    again = mfsde.resume(tmp_path / "cut", scenario=scenario)
    assert again.attrs["status"] == "complete"
    assert np.array_equal(again.position, whole.position)
    if "interaction_error" in whole:
        assert np.array_equal(again.interaction_error, whole.interaction_error)


# Random batches, whose steps have keys --------------------------------------------------------------------------------


def test_batches_are_shuffled_anew_in_each_step_and_the_same_in_each_run():
    scenario = Aggregation(gaussian, Batches(size=4), sigma=0.0)
    first, again = (run(scenario, save_every=1) for _ in range(2))
    assert np.array_equal(first.position, again.position)
    assert not np.array_equal(first.position, run(scenario, save_every=1, seed=2).position)
    moves = np.diff(first.position, axis=0)[:, 0]
    # The same batches in two steps would give nearly the same moves.
    assert np.corrcoef(moves[0].ravel(), moves[1].ravel())[0, 1] < 0.9
    exact = np.diff(run(replace(scenario, strategy="exact"), save_every=1).position, axis=0)[:, 0]
    assert np.corrcoef(exact[0].ravel(), exact[1].ravel())[0, 1] > 0.9


def test_observables_of_a_run_with_batches_are_exact():
    scenario = Aggregation(gaussian, Batches(size=4))
    found = run(scenario, save_every=1, observables=["energy"])
    exact = interaction(gaussian)
    for k in range(found.sizes["time"]):
        x = torch.from_numpy(found.position.values[k])
        assert float(found.energy[k, 0]) == pytest.approx(float(exact(EmpiricalMeasure(x))[0]), rel=1e-12)


def test_the_error_of_batches_outside_a_run_is_that_of_one_shuffle():
    small, large = (float(interaction(gaussian, strategy=Batches(size=p)).error(some_measure(n=400))) for p in (4, 100))
    assert 0.02 < large < small / 2


@pytest.mark.parametrize("method", ["baoab", "euler"])
def test_a_kinetic_run_records_the_error_of_its_force(method):
    found = run(KineticAggregation(Grid(tolerance=1e-2)), save_every=1, method=method)
    energy = KineticAggregation(Grid(tolerance=1e-2)).energy
    for k in range(found.sizes["time"]):
        positions = torch.from_numpy(found.position.values[k])[..., :2].contiguous()
        assert found.interaction_error.values[k, 0] == pytest.approx(float(energy.error(EmpiricalMeasure(positions))))


@dataclass(frozen=True)
class Late(Aggregation):
    """It interacts from t = 0.1 on only."""

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        return -x if t < 0.05 else super().drift(t, x, mu)


def test_a_kernel_that_comes_late_is_drawn_and_recorded():
    exact, batches = (run(Late(gaussian, s), save_every=1) for s in ("exact", Batches(size=4)))
    assert np.array_equal(exact.position[:2], batches.position[:2])
    assert not np.array_equal(exact.position[2], batches.position[2])
    (told,) = json.loads(batches.attrs["interactions"]).values()
    assert told == {"strategy": "batches", "size": 4, "exact": False}


def test_where_no_key_is_the_record_says_that_sums_are_exact():
    @dataclass(frozen=True)
    class Other(Aggregation):
        def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
            return -self.energy.intrinsic_derivative(EmpiricalMeasure(mu.points.clone()), x)

    (told,) = json.loads(run(Other(gaussian, Batches(size=4))).attrs["interactions"]).values()
    assert told["strategy"] == "blocked"


def test_methods_that_cannot_draw_refuse_batches():
    with pytest.raises(ValueError, match="drawn anew in each step by random batches"):
        run(Aggregation(gaussian, Batches(size=4), sigma=0.0), method="dopri5")
    from mfsde import multilevel

    with pytest.raises(ValueError, match="shuffles the two halves of a system do not share"):
        multilevel.estimate(
            Aggregation(gaussian, Batches(size=4)),
            lambda t, x, mu: mu.mean()[:, 0, 0],
            tolerance=0.1, n_particles=8, horizon=0.5, dt=0.25, seed=0, interaction="pairwise",
        )  # fmt: skip


@invariant
def test_mixed_precisions_are_summed_in_the_finer_one(name):
    function, strategy, _ = STRATEGIES[name]
    mu = some_measure()
    narrow = EmpiricalMeasure(mu.points.float())
    mixed = narrow.convolve(Kernel(function, strategy), mu.points)
    wide = EmpiricalMeasure(mu.points.float().double()).convolve(Kernel(function, strategy), mu.points)
    assert mixed.dtype is FLOAT64
    torch.testing.assert_close(mixed, wide, rtol=1e-6, atol=1e-9)


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "problem", "message"),
    [
        ("fast", ValueError, "unknown strategy 'fast'; expected one of exact, blocked, compiled"),
        ("cells", ValueError, r"needs parameters: mfsde.pairwise.Cells\(...\)"),
        (Grid, TypeError, r"strategy = Grid is a class; write Grid\(...\)"),
        (3, TypeError, "strategy = 3; expected a name"),
    ],
)
def test_strategies_that_are_none_are_refused(strategy, problem, message):
    with pytest.raises(problem, match=message):
        interaction(gaussian, strategy=strategy)
    with pytest.raises(problem, match=message):
        some_measure().convolve(Kernel(gaussian, strategy), some_measure().points)


def test_kernels_that_are_none_are_refused():
    with pytest.raises(TypeError, match="no function of differences"):
        Kernel(3.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a Kernel already"):
        Kernel(Kernel(gaussian))


def test_an_energy_that_is_not_even_is_refused_under_every_strategy():
    for _, strategy, _ in STRATEGIES.values():
        with pytest.raises(ValueError, match="W is not even"):
            interaction(lambda z: z[..., 0], strategy=strategy)(some_measure())


@pytest.mark.parametrize("name", ["blocked", "compiled", "grid"])
def test_the_error_of_a_wrong_force_is_seen(name, monkeypatch):
    function, strategy, _ = STRATEGIES[name]
    kernel = Kernel(function, strategy)
    assert (error(kernel, some_measure(2)) <= 1e-3).all()
    sums = type(strategy).sums
    monkeypatch.setattr(type(strategy), "sums", lambda self, *args: 1.1 * sums(self, *args))
    if name != "blocked":
        assert (error(kernel, some_measure(2)) > 0.09).all()


def test_an_energy_made_anew_at_each_step_has_one_kernel():
    kernels = [
        interaction(lambda z, a=a: a * z.square().sum(-1).neg().exp(), strategy=Grid(tolerance=tolerance)).kernel
        for a, tolerance in ((1.0, 1e-2), (1.0, 1e-2), (2.0, 1e-2), (1.0, 1e-3))
    ]
    assert kernels[0] is kernels[1]
    assert len({id(kernel) for kernel in kernels}) == 3
    scale = torch.ones(())
    by_tensor = [interaction(lambda z: scale * gaussian(z), strategy="compiled").kernel for _ in range(2)]
    assert by_tensor[0] is not by_tensor[1]


@pytest.mark.parametrize("strategy", ["compiled", "moments"])
def test_what_is_known_of_a_kernel_is_forgotten_when_it_changes(strategy):
    scale = [1.0]
    kernel = Kernel(lambda z: scale[0] * z.square().sum(-1), strategy)
    mu = some_measure()
    first = mu.convolve(kernel, mu.points)
    scale[0] = 3.0
    torch.testing.assert_close(mu.convolve(kernel, mu.points), 3 * first, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("strategy", ["compiled", "exact"])
def test_constants_do_not_leave_the_range_of_float32(strategy):
    x = 1e-10 * torch.linspace(-2, 2, 9).unsqueeze(-1)
    mu = EmpiricalMeasure(x)
    kernel = Kernel(lambda z: 1 / (1 + (z / 1e-10) ** 4).sum(-1), strategy)
    expected = mu.convolve(Kernel(kernel.function, "blocked"), x)
    torch.testing.assert_close(mu.convolve(kernel, x), expected, rtol=1e-5, atol=0)


def test_a_kernel_that_changes_with_time_is_compiled_for_no_step(monkeypatch):
    @dataclass(frozen=True)
    class Changing(Aggregation):
        def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
            return -mu.convolve(lambda z: z * torch.exp(-(1 + t) * z.square().sum(-1, keepdim=True)), x)

    monkeypatch.setattr(convolution, "SECONDS_PER_PAIR", 1.0)
    made = []
    usable = convolution.compiled.usable
    monkeypatch.setattr(convolution.compiled, "usable", lambda *args: made.append(1) or usable(*args))
    found = run(Changing(), horizon=1.0)
    assert np.isfinite(found.position).all()
    # At the start, and at t = 0 of the run.
    assert 1 <= len(made) <= 4


def test_a_potential_is_what_the_slope_sets():
    with pytest.raises(TypeError, match="potential is what `slope` sets"):
        Kernel(lambda z: z, potential=Kernel(gaussian))


def test_a_kernel_that_changes_with_time_is_not_traced_in_small_sums(monkeypatch):
    monkeypatch.setattr(convolution, "SECONDS_PER_PAIR", 1e-6)
    traced = []
    polynomial = convolution._is_polynomial
    monkeypatch.setattr(convolution, "_is_polynomial", lambda *args: traced.append(1) or polynomial(*args))
    mu, known = some_measure(), set()
    pairs = convolution.pairs_of(mu, mu.points, None)

    def chosen(t: float) -> Any:
        return convolution.chosen(Kernel(lambda z: torch.exp(-t * z.square().sum(-1))), pairs)

    with convolution.ahead(1000, known, is_start=True):
        assert chosen(0.0) == Blocked()
    met = len(traced)
    with convolution.ahead(1000, known):
        assert [chosen(t) for t in (0.0, 0.1, 0.2)] == [Blocked()] * 3
    # The one that the start has met, and no other.
    assert len(traced) == met + 1
