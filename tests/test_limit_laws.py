"""Limits as laws: particles against the Fokker-Planck equation, and limit Datasets wherever a law is taken.

How close particles must be to their limit. With N particles W₂² to the limit has the mean floor² where they are
independent points of it, and interaction changes that by a factor that does not depend on N: the mean of MeanFieldOU
has the stationary variance σ²/2κN instead of σ²/2(κ+α)N, that of DoubleWell four times the variance of independent
points, and the phase of Kuramoto is pulled nowhere. Three statements follow, and `Verdict` makes them.

* Across different replicas no floor is left: E⟨gap_r, gap_s⟩ = W₂²(law of the scheme, limit), r ≠ s, up to O(1/N²),
  with an error bar from the replicas (`unbiased`, t with R - 1 degrees of freedom). What remains is the bias of Euler's
  scheme, W₂ <= C dt: `test_the_bias_of_eulers_scheme` measures C from two dt's, below 1 for all scenarios here.
* Every replica: W₂² is about Σ λ_k Z_k² with Σ λ_k = floor² and, for Gaussian tails, λ_k ~ 1/k up to k ~ N: λ_1 is
  below 0.3 of the sum. Four times that is 1.2 of floor², (Σ λ_k²)^½ then is below 1.3 and the sum below 2 of it, and by
  Laurent and Massart (2000), Lemma 1, P(W₂² > floor² (2 + 2.6 √x + 2.4 x)) <= e^{-x}; for x = 10 W₂ < 6 floor.
* Nor are they closer than sampling allows: the mean of W₂² is above floor²/4.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from dataclasses import dataclass, replace

import matplotlib

matplotlib.use("Agg")
import numpy as np
import pytest
import torch
import xarray as xr
from matplotlib.figure import Figure
from torch import Tensor

import mfsde
from mfsde import EmpiricalMeasure, Gaussian, Mixture, Uniform, decoupled
from mfsde.analysis import circle, limits, line, plots, replicas
from mfsde.analysis.particles import positions
from mfsde.analysis.wasserstein import debiased, distance, gaussian_distance, to_law
from mfsde.limit import GridLaw, flow, fokker_planck, law_at
from mfsde.limit.quantile_law import QuantileLaw
from mfsde.scenarios import DoubleWell, GaussianLangevin, IsotropicGaussians, Kuramoto, MeanFieldOU

TURN = 2 * math.pi
N, R, DT, HORIZON = 20_000, 16, 0.004, 1.0
SE = 4.0


@dataclass(frozen=True)
class SpreadNoise:
    """dX = -X dt + √(a + b Var X) dW: a noise that grows with the spread of the law."""

    a: float = 0.1
    b: float = 0.8
    frozen_at: float | None = None

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        return -x

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        variance = mu.covariance()[..., 0, 0] if self.frozen_at is None else x.new_tensor(self.frozen_at)
        return (self.a + self.b * variance).sqrt()[..., None, None]

    def initial(self) -> Gaussian:
        return Gaussian([0.5], 1.0)

    def limit(self, t: float) -> Gaussian:
        # v' = -2v + a + bv.
        rest = self.a / (2 - self.b)
        return Gaussian([0.5 * math.exp(-t)], rest + (1 - rest) * math.exp(-(2 - self.b) * t))


@dataclass(frozen=True)
class PlaceNoise:
    """dX = (-X + c σσ'(X)) dt + σ(X) dW, σ(x) = s (1 + ½ sin 2x); in the sense of Itô for c = 0."""

    s: float = 0.6
    c: float = 0.0

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        return -x + self.c * self.diffusion(t, x, mu) * self.s * torch.cos(2 * x)

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        return self.s * (1 + 0.5 * torch.sin(2 * x))

    def initial(self) -> Gaussian:
        return Gaussian([0.3], 0.3)


@dataclass(frozen=True)
class CommonNoise:
    """dX = -(X + α(X - E[X|W⁰])) dt + σ dW + σ⁰ (1 + ½ sin X) dW⁰."""

    alpha: float = 0.5
    sigma: float = 0.5
    common: float = 0.6

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        return -x - self.alpha * (x - mu.mean())

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> float:
        return self.sigma

    def common_diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        return self.common * (1 + 0.5 * torch.sin(x))

    def initial(self) -> Gaussian:
        return Gaussian([0.5], 0.2)


# Scenario, and the limits that its particles do not have.
CASES = {
    "ornstein-uhlenbeck": (
        MeanFieldOU(),
        {"sigma": MeanFieldOU(sigma=0.735), "sign of the coupling": MeanFieldOU(coupling=-0.5)},
    ),
    "double well": (DoubleWell(), {"sigma": DoubleWell(sigma=0.84), "sign of the coupling": DoubleWell(theta=-1.0)}),
    "noise of the law": (
        SpreadNoise(),
        {"sigma": SpreadNoise(a=0.1 * 1.05**2, b=0.8 * 1.05**2), "law frozen": SpreadNoise(frozen_at=1.0)},
    ),
    "noise of the place": (PlaceNoise(), {"sigma": PlaceNoise(s=0.63), "Itô term dropped": PlaceNoise(c=0.5)}),
    "circle": (Kuramoto(), {"sigma": Kuramoto(sigma=1.05), "sign of the coupling": Kuramoto(coupling=-2.0)}),
}


@functools.cache
def particles(scenario, dt=DT, substeps=1, n=N):
    noise = mfsde.Noise(5, substeps=substeps)
    run = mfsde.simulate(
        scenario, n_particles=n, n_replicas=R, horizon=HORIZON, dt=dt, seed=5, save_every=round(0.8 / dt), noise=noise
    )
    return run.isel(time=slice(1, None))  # 0.8 and 1


@functools.cache
def limit(scenario):
    return fokker_planck(scenario, None, [0.0, 0.5, 0.8, HORIZON], n_nodes=257, energies=False, rtol=1e-7)


def wrong_limit(scenario):
    return fokker_planck(scenario, None, [HORIZON], n_nodes=129, energies=False, rtol=1e-5)


@dataclass(frozen=True)
class Verdict:
    """The three statements of the module's docstring, at one time."""

    removed: float
    stderr: float
    roots: np.ndarray
    floor: float

    @classmethod
    def of(cls, found: xr.DataArray) -> Verdict:
        mean = replicas.mean_and_error(found.unbiased)
        return cls(float(mean), float(mean.stderr), found.values, float(found.floor))

    @property
    def is_compatible(self) -> bool:
        slack = replicas.t_quantile(len(self.roots), 0.999) * self.stderr + DT**2
        far = self.roots.max() > 6 * self.floor
        return abs(self.removed) < slack and not far and np.square(self.roots).mean() > self.floor**2 / 4

    @property
    def is_rejected(self) -> bool:
        """Not by chance, either: by its error bar alone."""
        return self.removed > replicas.t_quantile(len(self.roots), 0.999) * self.stderr + DT**2


@pytest.mark.parametrize("name", CASES)
def test_particles_are_within_the_sampling_floor_of_their_limit(name):
    scenario, faults = CASES[name]
    found = to_law(particles(scenario), limit(scenario))
    for k in range(found.sizes["time"]):
        verdict = Verdict.of(found.isel(time=k))
        assert verdict.is_compatible, verdict
    end = particles(scenario).isel(time=[-1])
    for fault, wrong in faults.items():
        verdict = Verdict.of(to_law(end, wrong_limit(wrong)).isel(time=0))
        assert verdict.is_rejected, (fault, verdict)


@pytest.mark.parametrize("name", CASES)
def test_the_bias_of_eulers_scheme(name):
    # The same Brownian path at dt and 2 dt, so that the laws' difference C dt is nearly free of sampling. On the circle
    # the line's distance, which is an upper bound.
    scenario = CASES[name][0]
    coarse, fine = (
        positions(particles(scenario, dt, substeps, n=5000)).isel(time=[-1]) for dt, substeps in ((0.02, 2), (0.01, 1))
    )
    fine, coarse = (x.drop_attrs() for x in (fine, coarse))
    mean = replicas.mean_and_error(debiased(coarse, fine, estimator="quantile")).isel(time=0)
    bound = float(mean) + replicas.t_quantile(R, 0.999) * float(mean.stderr)
    assert math.sqrt(max(bound, 0.0)) < 1.0 * 0.01


@pytest.mark.parametrize("scenario", [SpreadNoise(), MeanFieldOU()])
def test_limits_are_their_closed_forms_to_a_small_part_of_the_floor(scenario):
    floor = math.sqrt(line.sampling_cost(scenario.limit(1.0), N))
    assert distance(law_at(limit(scenario), 1.0), scenario.limit(1.0)) < floor / 200


# A Dataset as the law of `to_law` and `debiased`


def test_a_dataset_is_its_flow_at_every_time():
    scenario = MeanFieldOU()
    run = mfsde.simulate(scenario, n_particles=100, n_replicas=3, horizon=1.0, dt=0.25, seed=1, save_every=1)
    law = limit(scenario)
    found, end = to_law(run, law), run.isel(time=[-1])
    xr.testing.assert_identical(found.isel(time=[-1]), to_law(end, flow(law)))
    xr.testing.assert_identical(found.isel(time=[-1]), to_law(end.position, law))
    np.testing.assert_array_equal(debiased(end, law), debiased(end, flow(law)))
    np.testing.assert_allclose(debiased(end, law), found.unbiased.isel(time=[-1]), atol=1e-12)
    assert debiased(end, law).attrs["estimator"].endswith("quantile")
    # At t = 0.25 and 0.75 quantiles are interpolated over Δt = 0.5 and 0.3: Δt²/8 times their second derivative in
    # time, of the order of the rate squared, 2.25, times 1.
    exact = to_law(run, scenario.limit)
    for t in (0.0, 0.5, 1.0):
        gap = distance(law_at(law, t), scenario.limit(t))
        assert float(abs(found - exact).sel(time=t).max()) <= gap + 1e-9
        assert float(found.floor.sel(time=t)) == pytest.approx(float(exact.floor.sel(time=t)), rel=1e-3)
    between = abs(found - exact).sel(time=[0.25, 0.75])
    assert 1e-4 < float(between.max()) < 2.25 * 0.5**2 / 8
    with pytest.raises(ValueError, match=r"given on \[0, 1\] but asked for at t = 1.5"):
        to_law(run.assign_coords(time=2 * run.time), law)


def test_on_the_plane_a_dataset_is_compared_by_its_moments():
    scenario = MeanFieldOU(initial_mean=(1.0, -1.0), initial_variance=0.5)
    law = fokker_planck(scenario, None, [0.0, 0.5], n_nodes=33, energies=False, rtol=1e-6)
    run = mfsde.simulate(scenario, n_particles=100, n_replicas=3, horizon=0.5, dt=0.05, seed=1)
    found, exact = to_law(run, law), to_law(run, scenario.limit)
    assert found.attrs["bound"] == "lower"
    assert "bound" not in exact.attrs
    for t in (0.0, 0.5):
        moments = [(at.mean.numpy(), at.cov.numpy()) for at in (law_at(law, t), scenario.limit(t))]
        gap = gaussian_distance(*moments[0], *moments[1])
        assert float(abs(found - exact).sel(time=t).max()) <= gap + 1e-9
        assert gap < 0.01
        assert float(found.floor.sel(time=t)) == pytest.approx(float(exact.floor.sel(time=t)), rel=0.01)
    few = run.isel(particle=slice(30))
    assert debiased(few, law).attrs["estimator"].endswith("transport")
    with pytest.raises(ValueError, match=r"lives in dimension 2, the particles in dimension 1"):
        to_law(run.isel(component=[0]), law)


@pytest.mark.parametrize(
    "law",
    [
        Mixture([Uniform(0.0, 1.0), Uniform(5.0, 6.0)], [0.31, 0.69]),
        Uniform(-1.0, 2.0),
        GridLaw(np.linspace(-4, 4, 65), np.exp(-(np.linspace(-4, 4, 65) ** 2)) + 1e-9),
    ],
)
def test_cells_of_many_particles_are_the_integrals_that_converged(law):
    n = 1500
    assert n >= line.MANY
    means, within = line.quick_cells(law, n)
    expected, rest = line.even_cells(law, n)
    # A share of 1e-6 of the distances between neighbours; W₂ changes by less.
    np.testing.assert_allclose(means, expected, atol=1e-8)
    assert within == pytest.approx(rest, rel=1e-5)
    assert line.sampling_cost(law, n, line.quick_cells) == pytest.approx(line.sampling_cost(law, n), rel=1e-6)


def test_laws_that_nearly_agree_have_a_distance():
    law = law_at(limit(MeanFieldOU()), 1.0)
    assert distance(law, law) < 1e-9
    assert distance(law, GridLaw(law.nodes[0] + 1e-6, law.density)) == pytest.approx(1e-6, rel=1e-4)
    assert distance(law, GridLaw(law.nodes[0] + 3.0, law.density)) == pytest.approx(3.0, rel=1e-9)


# Common noise: one law for each path


@functools.cache
def paths(seed=3, dt=0.01, n_replicas=4, **options):
    return fokker_planck(
        CommonNoise(), None, [0.0, 0.5, 1.0], dt=dt, seed=seed, n_replicas=n_replicas, n_nodes=129, **options
    )


@functools.cache
def common_run(dt=0.01, substeps=1):
    noise = mfsde.Noise(3, substeps=substeps)
    return mfsde.simulate(
        CommonNoise(),
        n_particles=5000,
        n_replicas=4,
        horizon=1.0,
        dt=dt,
        seed=3,
        save_every=round(1 / dt),
        noise=noise,
    )


def test_replicas_are_compared_with_the_paths_of_their_common_noise():
    run, law = common_run(), paths()
    found = to_law(run, law)
    assert found.dims == ("time", "replica")
    assert found.floor.dims == ("time", "replica")
    assert "unbiased" not in found.coords
    assert found.attrs["long_name"] == "Wasserstein distance W₂ to the law given W⁰"
    for r in (0, 3):
        one = to_law(run.isel(replica=[r]), law.isel(replica=r))
        np.testing.assert_array_equal(found.isel(replica=r), one.isel(replica=0))
        np.testing.assert_array_equal(found.floor.isel(replica=r), one.floor)
    # The bound for one replica of the module's docstring; the limit's scheme in time is that of the particles.
    assert bool((found < 6 * found.floor).all())
    assert float(np.square(found).mean()) < 2 * float(np.square(found.floor).mean())
    # A planted fault: other paths.
    wrong = to_law(run.isel(time=[-1]), law.isel(replica=[1, 2, 3, 0]).assign_coords(replica=law.replica))
    assert bool((wrong > 6 * wrong.floor).any())
    assert float(np.square(wrong).mean()) > 36 * float(np.square(wrong.floor).mean())


def test_paths_that_are_not_the_runs_are_refused():
    run, law = common_run(), paths()
    few = run.isel(particle=slice(10))
    for other in (law.isel(replica=[1, 0, 2, 3]), law.isel(replica=[0, 1])):
        with pytest.raises(ValueError, match=r"labels along 'replica' differ"):
            to_law(few, other)
    with pytest.raises(ValueError, match=r"the run has seed 3, the limit seed 4: other paths"):
        to_law(few, law.assign_coords(seed=4))
    with pytest.raises(ValueError, match=r"the run draws its noise at dt = 0.01, the limit at dt = 0.02: other paths"):
        to_law(few, law.assign_coords(dt=0.02))
    with pytest.raises(ValueError, match=r"no dimension `replica`, the limit a law for each"):
        to_law(few.isel(replica=0), law)
    with pytest.raises(ValueError, match=r"floor is removed across replicas of one law\. Use to_law"):
        debiased(few, law)
    with pytest.raises(ValueError, match=r"With common noise choose a path: limit\.isel\(replica=0\)"):
        decoupled(CommonNoise(), law)
    # A coarser limit of the same path of W⁰ is let through: dt and the number of substeps say so.
    coarse = law.assign_coords(dt=0.02)
    settings = json.loads(law.attrs["settings"])
    coarse.attrs["settings"] = json.dumps({**settings, "noise": {**settings["noise"], "substeps": 2}})
    to_law(few, coarse)


# The circle


def circle_law(nodes=129, closed=True):
    x = np.linspace(0, TURN, nodes) if closed else np.linspace(0, TURN, nodes - 1, endpoint=False)
    return GridLaw(x, 0.2 + np.exp(2 * np.cos(x - 1.0)), TURN)


def on_circle(points, length=TURN, **attrs):
    points = np.asarray(points, dtype=float)
    return xr.DataArray(
        points[..., None],
        dims=("time", "replica", "particle", "component"),
        coords={"time": 0.5 * np.arange(len(points))},
        attrs={"period": json.dumps([length]), "units": "rad", **attrs},
        name="position",
    )


def samples(law, t, r, n, seed=0):
    return law.sample(t * r * n, torch.Generator().manual_seed(seed)).numpy().reshape(t, r, n)


@pytest.mark.parametrize("n", [7, 50, 400])
def test_on_the_circle_the_distance_is_that_to_many_atoms_of_the_law(n):
    law, x = circle_law(), samples(circle_law(), 2, 3, n)
    found = to_law(on_circle(x), law)
    atoms = 20_000 // n * n
    middles = law.quantile((torch.arange(atoms) + 0.5).double() / atoms).numpy()
    for t, r in itertools.product(range(2), range(3)):
        # Within 1e-3 of the square of the floor: what is lost by atoms, and by a shift in whole cells.
        expected = line.circular_cost(np.repeat(x[t, r], atoms // n), None, middles, None, TURN)
        assert abs(float(found[t, r]) ** 2 - expected) < 1e-3 * float(found.floor[t]) ** 2
        one = distance(EmpiricalMeasure(torch.tensor(x[t, r])[:, None], period=TURN), law)
        assert one == pytest.approx(float(found[t, r]), rel=1e-12)
    assert "circle" in found.attrs["estimator"]
    assert "64 samples" in found.attrs["estimator"]
    assert found.attrs["units"] == "rad"


def test_turning_everything_changes_nothing_on_the_circle():
    law, x = circle_law(), samples(circle_law(), 1, 4, 200)
    found = to_law(on_circle(x), law)
    for moved in (x + TURN, x - 5 * TURN, np.mod(x + 1.0, TURN) - 1.0):
        np.testing.assert_allclose(to_law(on_circle(moved), law), found, rtol=1e-9)
    # Three whole cells of the law's grid.
    step = 3 * TURN / 128
    turned = GridLaw(law.nodes[0], np.roll(law.density, 3), TURN)
    np.testing.assert_allclose(to_law(on_circle(x + step), turned), found, atol=1e-5)
    np.testing.assert_allclose(to_law(on_circle(x), circle_law(closed=False)), found, rtol=1e-9)
    # A planted fault: on the line the cut is in the way of the shortest turn.
    low = np.mod(x, TURN)[0, 0]
    assert line.law_cost(low, None, law) > float(found[0, 0]) ** 2 * 1.01


@pytest.mark.parametrize("n", [100, 20_000])
def test_it_does_not_matter_where_a_circle_is_cut(n):
    # Nearly empty around π: cut there, and in the middle of its mass, where no shift by whole particles closes the gap.
    def narrow(first):
        x = np.linspace(first, first + TURN, 257)
        return GridLaw(x, np.exp(30 * np.cos(x)), TURN)

    x, cut = samples(narrow(-math.pi), 1, 4, n), -12 * TURN / 256
    found, other = (to_law(on_circle(x), narrow(first)) for first in (-math.pi, cut))
    # The law's splines begin elsewhere.
    np.testing.assert_allclose(found, other, rtol=1e-4)
    np.testing.assert_allclose(found.floor, other.floor, rtol=1e-4)
    np.testing.assert_allclose(found.unbiased, other.unbiased, atol=1e-3 * float(found.floor[0]) ** 2)
    # There is no way round: what the line has.
    expected = [math.sqrt(line.law_cost(y, None, narrow(-math.pi))) for y in x[0]] if n < 1000 else found[0]
    np.testing.assert_allclose(found[0], expected, rtol=1e-4)
    # A planted fault: levels that count from the cut.
    means, within = line.quick_cells(narrow(cut), n * math.ceil(circle.FEWEST_CELLS / n))
    gaps = np.stack([circle.Circle(TURN).displacements(y, means) for y in x[0]])
    assert bool((np.square(gaps).mean(1) + within > 1.2 * np.square(found[0].values)).any())


def test_on_the_circle_weights_are_masses():
    x = samples(circle_law(), 1, 1, 40)
    repeated = on_circle(np.concatenate([x, x[..., :20]], -1))
    weight = np.r_[np.full(20, 2.0), np.ones(20)] / 60
    run = xr.Dataset({"position": on_circle(x, weighted="by the variable weight"), "weight": ("particle", weight)})
    found = to_law(run, circle_law())
    assert float(found[0, 0]) == pytest.approx(float(to_law(repeated, circle_law())[0, 0]), abs=1e-4)
    assert "unbiased" not in found.coords


@pytest.mark.parametrize("n", [30, 1000])
def test_the_floor_of_the_circle_is_the_mean_over_its_samples(n):
    even = GridLaw(np.linspace(0, 3.0, 33), np.ones(33), 3.0)
    # For a uniform law n E W₂² -> L² E min_θ ∫(B - θ)² = L² (1/6 - 1/12), with variance 2/5 of its square.
    expected = math.sqrt(3.0**2 / 12 / n)
    found = to_law(on_circle(samples(even, 1, 3, n), 3.0), even)
    relative = 0.5 * math.sqrt(0.4 / circle.SAMPLES)
    assert float(found.floor[0]) == pytest.approx(expected, rel=SE * relative + 1 / n)
    # A planted fault: the floor of the line.
    assert math.sqrt(line.sampling_cost(even, n)) > (1 + SE * relative) * expected
    # The same in every call, and for samples of another law the mean of what they have.
    np.testing.assert_array_equal(found.floor, to_law(on_circle(samples(even, 1, 1, n, 7), 3.0), even).floor)
    law = circle_law()
    many = to_law(on_circle(samples(law, 40, 8, n)), law)
    squares = np.square(many.values).ravel()
    error = squares.std(ddof=1) / math.sqrt(len(squares)) + squares.std(ddof=1) / math.sqrt(circle.SAMPLES)
    assert abs(squares.mean() - float(many.floor[0]) ** 2) < SE * error


def test_without_the_floor_samples_of_a_law_on_the_circle_are_at_distance_zero():
    law = circle_law()
    found = to_law(on_circle(samples(law, 60, 4, 60)), law).unbiased.mean("replica")
    error = float(found.std(ddof=1)) / math.sqrt(60)
    assert abs(float(found.mean())) < SE * error
    # A turn of the particles is seen at its size: the optimal way is to turn them back.
    moved = to_law(on_circle(samples(law, 60, 4, 60) + 0.2), law).unbiased.mean("replica")
    assert float(moved.mean()) > SE * float(moved.std(ddof=1)) / math.sqrt(60)
    expected = distance(law, GridLaw(law.nodes[0] + 0.2, law.density, TURN)) ** 2
    assert abs(float(moved.mean()) - expected) < SE * float(moved.std(ddof=1)) / math.sqrt(60) + expected / 60


def test_debiased_samples_a_law_on_the_circle():
    law = circle_law()
    run = on_circle(samples(law, 1, 6, 60))
    found = debiased(run, law)
    assert found.attrs["estimator"].endswith("transport")
    dataset = xr.Dataset({"density": (("time", "x"), law.density[None])}, {"time": [0.0], "x": law.nodes[0]})
    dataset["x"].attrs["period"] = json.dumps(TURN)
    np.testing.assert_array_equal(debiased(run, dataset), found)
    with pytest.raises(
        ValueError, match=r"on a torus of lengths \(6\.28\d*,\), the particles on a torus of lengths \(5"
    ):
        debiased(run.assign_attrs(period="[5.0]"), law)


def test_laws_on_other_spaces_are_refused():
    law, run = circle_law(), on_circle(samples(circle_law(), 1, 3, 10))
    with pytest.raises(ValueError, match=r"the particles on a torus of lengths \(5"):
        to_law(run.assign_attrs(period="[5.0]"), law)
    with pytest.raises(ValueError, match=r"lives on a torus of lengths \(6\.28\d*,\), the particles on a line"):
        to_law(run.drop_attrs(), law)
    with pytest.raises(ValueError, match=r"law on the line has no distance to it\. Pass a law with the run's period"):
        to_law(run, Gaussian(3.0, 1.0))
    with pytest.raises(ValueError, match=r"law on the line has no distance to it"):
        to_law(run, GridLaw(law.nodes[0], law.density))
    plane = xr.concat([run, run], "component").assign_attrs(period="[6.0, 6.0]")
    with pytest.raises(ValueError, match=r"a torus of 2 components, where exact distances to a law exist on a circle"):
        to_law(plane, Gaussian([0.0, 0.0], 1.0))
    # One component of them that is a line, one that is a circle.
    mixed = plane.assign_attrs(period=json.dumps([TURN, None])).assign_coords(component=[0, 1])
    np.testing.assert_array_equal(to_law(mixed.isel(component=[0]), law), to_law(run, law))
    assert "circle" not in to_law(mixed.isel(component=[1]), Gaussian(3.0, 1.0)).attrs["estimator"]


def test_distances_to_laws_on_the_circle():
    law, x = circle_law(), samples(circle_law(), 1, 1, 50)[0, 0]
    turned = GridLaw(law.nodes[0] + 0.1, law.density, TURN)
    assert distance(law, law) < 1e-9
    far = line.even_cells(law, 3000)[0], line.even_cells(turned, 3000)[0]
    expected = math.sqrt(line.circular_cost(far[0], None, far[1], None, TURN))
    assert distance(law, turned) == pytest.approx(expected, rel=1e-3)
    assert distance(x, law) == distance(law, x)
    assert distance(x, law) == pytest.approx(float(to_law(on_circle(x[None, None]), law)[0, 0]), rel=1e-12)
    halves = np.r_[np.full(25, 1.5), np.full(25, 0.5)] / 50
    weighted = EmpiricalMeasure(torch.tensor(x)[:, None], torch.tensor(halves), period=TURN)
    repeated = np.concatenate([x[:25]] * 3 + [x[25:]])
    assert distance(weighted, law) == pytest.approx(distance(repeated, law), abs=1e-4)
    for pair in ((law, Gaussian(0.0, 1.0)), (GridLaw(law.nodes[0], law.density, 7.0), law)):
        with pytest.raises(ValueError, match=r"to a law on a torus W₂ is computed in one dimension"):
            distance(*pair)
    with pytest.raises(ValueError, match=r"got p = 1, "):
        distance(x, law, p=1)
    with pytest.raises(ValueError, match=r"the other on \(5"):
        distance(EmpiricalMeasure(torch.tensor(x)[:, None], period=5.0), law)


# Decoupled processes


def circle_dataset(closed=True, attrs=True, start=0.0):
    n = 64
    x = start + TURN * np.arange(n + closed) / n
    rows = np.stack([1 + 0.5 * np.cos(x), 1 - 0.8 * np.sin(x)]) / TURN
    dataset = xr.Dataset({"density": (("time", "x"), rows)}, {"time": [0.0, 1.0], "x": x})
    if attrs:
        dataset["x"].attrs["period"] = json.dumps(TURN)
    return dataset


def pull(law, t, scenario=None, x=None):
    x = torch.linspace(0, TURN, 7, dtype=torch.float64)[:, None] if x is None else x
    return decoupled(scenario or Kuramoto(), law).drift(t, x, EmpiricalMeasure(x))[:, 0]


@pytest.mark.parametrize("start", [0.0, -1.0])
@pytest.mark.parametrize(("closed", "attrs"), [(True, True), (False, True), (True, False), (False, False)])
def test_a_decoupled_drift_on_the_circle_sees_every_node_once(closed, attrs, start):
    # ∫ e^{iφ} m(dφ) is 1/4 for m = (1 + ½ cos φ)/2π, and -0.4 i for m = (1 - 0.8 sin φ)/2π; the trapezoidal rule is
    # exact for trigonometric polynomials.
    x = torch.linspace(0, TURN, 7, dtype=torch.float64)
    dataset = circle_dataset(closed, attrs, start)
    for t, c, s in ((0.0, 0.25, 0.0), (1.0, 0.0, -0.4), (0.3, 0.175, -0.12)):
        expected = 2.0 * (s * torch.cos(x) - c * torch.sin(x))
        torch.testing.assert_close(pull(dataset, t), expected, rtol=0, atol=1e-14)
    law = decoupled(Kuramoto(), dataset).law_at(0.0, x[:, None])
    assert law.points.shape[-2] == 64
    assert law.period == TURN


def test_uneven_nodes_of_a_circle_have_trapezoidal_weights():
    x = np.sort(np.random.default_rng(0).uniform(0, TURN, 4000))
    dataset = xr.Dataset({"density": (("time", "x"), (1 + 0.5 * np.cos(x))[None])}, {"time": [0.0], "x": x})
    law = decoupled(Kuramoto(), dataset).law_at(0.0, torch.zeros(1, 1, dtype=torch.float64))
    gaps = np.diff(np.append(x, x[0] + TURN))
    expected = (1 + 0.5 * np.cos(x)) * (gaps + np.roll(gaps, 1)) / 2
    np.testing.assert_allclose(law.weights, expected / expected.sum(), rtol=1e-12)


def test_tori_that_differ_are_refused():
    dataset = circle_dataset()
    dataset["x"].attrs["period"] = "7.0"
    with pytest.raises(ValueError, match=r"law lives on a torus of lengths \[7\.0\], the scenario on one of \[6\.28"):
        decoupled(Kuramoto(), dataset)
    twice = dataset.assign_coords(x=2 * dataset.x)
    twice["x"].attrs["period"] = json.dumps(TURN)
    with pytest.raises(ValueError, match=r"go round the circle of length 6\.28\d* more than once"):
        decoupled(Kuramoto(), twice)


def test_a_decoupled_process_on_the_circle_follows_its_limit():
    scenario = Kuramoto()
    settings = {"n_particles": 4000, "n_replicas": 4, "horizon": 0.5, "dt": 0.005, "seed": 1}
    run = mfsde.simulate(decoupled(scenario, limit(scenario)), **settings)
    found = to_law(run, limit(scenario)).isel(time=[-1])
    # Independent points of the limit: no interaction raises the floor.
    assert Verdict.of(found.isel(time=0)).is_compatible


@pytest.mark.parametrize("order", [("time", "x", "y"), ("y", "time", "x")])
def test_a_decoupled_drift_on_the_plane(order):
    # N((t, -1), diag(0.1, 0.2)) on uneven nodes.
    rows = [np.sort(np.concatenate([np.linspace(-3, 4, 141), np.linspace(-1, 1, 41) + 1e-3])), np.linspace(-4, 2, 101)]
    t = np.array([0.0, 1.0])
    density = np.exp(-((rows[0][:, None] - t[:, None, None]) ** 2) / 0.2 - (rows[1] + 1) ** 2 / 0.4)
    dataset = xr.Dataset({"density": (("time", "x", "y"), density)}, {"time": t, "x": rows[0], "y": rows[1]})
    ou = MeanFieldOU(initial_mean=(0.0, 0.0))
    x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    case = decoupled(ou, dataset.transpose(*order))
    for time in (0.0, 0.25, 1.0):
        law = case.law_at(time, x)
        torch.testing.assert_close(law.mean()[0], torch.tensor([time, -1.0]).double(), rtol=0, atol=2e-4)
        expected = torch.diag(torch.tensor([0.1 + time * (1 - time), 0.2]).double())
        torch.testing.assert_close(law.covariance(), expected, rtol=0, atol=5e-4)
        b = ou.drift(time, x, Gaussian([time, -1.0], 1.0).as_measure())
        torch.testing.assert_close(case.drift(time, x, EmpiricalMeasure(x)), b, rtol=0, atol=2e-4)


def test_a_torus_of_two_components_wraps_both():
    n, m = 16, 24
    x, y = TURN * np.arange(n + 1) / n, 2.0 * np.arange(m) / m
    density = (1 + 0.5 * np.cos(x))[:, None] * (1 + 0.3 * np.sin(math.pi * y))
    dataset = xr.Dataset({"density": (("time", "x", "y"), density[None])}, {"time": [0.0], "x": x, "y": y})
    for name, length in (("x", TURN), ("y", 2.0)):
        dataset[name].attrs["period"] = json.dumps(length)
    law = decoupled(MeanFieldOU(), dataset).law_at(0.0, torch.zeros(1, 2, dtype=torch.float64))
    assert law.points.shape[-2:] == (n * m, 2)
    waves = law.integrate(lambda z: torch.stack([z[..., 0].cos(), (math.pi * z[..., 1]).sin()], -1))
    np.testing.assert_allclose(waves, [0.25, 0.15], atol=1e-14)


# Pictures


def lines(ax, gid):
    return [artist for artist in ax.get_children() if artist.get_gid() == gid]


def test_the_stored_density_is_drawn_on_lines_circles_and_planes():
    run = on_circle(samples(circle_law(), 2, 2, 200), **{"long_name": "particles"})
    dataset = circle_dataset()
    for law in (dataset, circle_dataset(closed=False), circle_dataset(attrs=False), circle_dataset(start=-2.0)):
        ax = plots.density(run, law, [0.0], Figure().add_subplot())
        ((x, y),) = [np.asarray(curve.get_data()) for curve in lines(ax, "limit")]
        # Linear between 64 nodes.
        np.testing.assert_allclose(y, (1 + 0.5 * np.cos(x)) / TURN, atol=0.5 / TURN * (TURN / 64) ** 2 / 8 + 1e-12)
    half = limits.at(dataset, 0.5)
    np.testing.assert_allclose(half, dataset.density.mean("time"))
    grid = flow(dataset)(0.0)
    ax = plots.density(run, grid, [0.0], Figure().add_subplot())
    x, y = lines(ax, "limit")[0].get_data()
    np.testing.assert_allclose(y, (1 + 0.5 * np.cos(x)) / TURN, atol=1e-5)
    x, y = np.linspace(-2, 2, 33), np.linspace(-3, 3, 49)
    table = xr.Dataset({"density": (("time", "y", "x"), (x + 2 * y[:, None])[None])}, {"time": [0.0], "x": x, "y": y})
    points = np.random.default_rng(0).uniform(-2.5, 2.5, (50, 2))
    inside = abs(points[:, 0]) <= 2
    values = limits.density(limits.at(table, 0.0), points, (math.inf, math.inf))
    np.testing.assert_allclose(values, np.where(inside, points[:, 0] + 2 * points[:, 1], 0.0), atol=1e-12)
    with pytest.raises(ValueError, match=r"the limit lives in dimension 2 and the particles in 1"):
        plots.density(run, table, ax=Figure().add_subplot())
    with pytest.raises(ValueError, match=r"limit lives on a torus of lengths \(7\.0,\) and the particles on one of"):
        limits.density(GridLaw(np.linspace(0, 7, 9), np.ones(9), 7.0), points[:, :1], (TURN,))


def test_the_mean_over_paths_is_the_law_of_pooled_replicas():
    run, law = common_run().isel(particle=slice(100)), paths()
    ax = plots.density(run, law, [1.0], Figure().add_subplot())
    x, y = lines(ax, "limit")[0].get_data()
    expected = np.interp(x, law.x, law.density.isel(time=-1).mean("replica"))
    np.testing.assert_allclose(y, expected, atol=1e-12)
    assert limits.pooled(law, run, 2)["density"].identical(law["density"].isel(replica=2, drop=True))
    assert limits.pooled(None, run) is None
    with pytest.raises(ValueError, match=r"labels along 'replica' differ"):
        limits.pooled(law.isel(replica=[0]), run)


def test_a_row_of_laws_ends_with_their_distance_and_its_floor():
    scenario = MeanFieldOU()
    run = mfsde.simulate(scenario, n_particles=300, n_replicas=3, horizon=1.0, dt=0.05, seed=1, save_every=10)
    figure = plots.limit(run, limit(scenario), [0.0, 0.5, 1.0])
    *row, last = figure.axes
    assert [ax.get_title() for ax in figure.axes] == ["t = 0", "t = 0.5", "t = 1", "distance to the limit"]
    for ax, t in zip(row, (0.0, 0.5, 1.0), strict=True):
        heights, edges, _ = lines(ax, "histogram")[0].get_data()
        x = run.position.sel(time=t).values.ravel()
        np.testing.assert_allclose(heights, np.histogram(x, edges)[0] / len(x) / np.diff(edges))
        nodes, values = lines(ax, "limit")[0].get_data()
        np.testing.assert_array_equal(
            values, limits.density(limits.at(limit(scenario), t), nodes[:, None], (math.inf,))
        )
    found = to_law(run, limit(scenario))
    np.testing.assert_allclose(lines(last, "mean")[0].get_ydata(), found.mean("replica"))
    np.testing.assert_allclose(lines(last, "floor")[0].get_ydata(), found.floor)
    np.testing.assert_allclose([each.get_ydata() for each in lines(last, "replica")], found.T)
    assert [text.get_text() for text in last.get_legend().get_texts()] == ["each replica", "mean", "sampling floor"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["particles", "limit"]
    assert figure.get_suptitle() == "MeanFieldOU: N = 300, 3 replicas, dt = 0.05, seed = 1"
    figure.draw_without_rendering()
    again = plots.limit(run.position, limit(scenario), distance=2 * found)
    assert len(again.axes) == 4  # 0 and 0.1 of the run are nearest to one saved time
    np.testing.assert_allclose(lines(again.axes[-1], "mean")[0].get_ydata(), 2 * found.mean("replica"))
    assert again.get_suptitle() == ""
    with pytest.raises(ValueError, match=r"distance has no coordinate `floor`"):
        plots.limit(run, limit(scenario), distance=found.drop_vars("floor"))


def test_a_row_of_laws_on_the_plane_is_particles_and_level_lines():
    run = mfsde.simulate(
        MeanFieldOU(initial_mean=(0.0, 1.0)), n_particles=3000, n_replicas=2, horizon=0.2, dt=0.1, seed=0
    )
    figure = plots.limit(run, MeanFieldOU(initial_mean=(0.0, 1.0)).limit)
    assert len(figure.axes) == 2
    for ax, index in zip(figure.axes, (0, -1), strict=True):
        (cloud,) = lines(ax, "particles")
        points = run.position.isel(time=index).values.reshape(-1, 2)
        assert {tuple(p) for p in cloud.get_offsets().tolist()} <= {tuple(p) for p in points.astype(float).tolist()}
        assert len(cloud.get_offsets()) == 4000
        assert len(lines(ax, "limit")) == 1
    with pytest.raises(ValueError, match=r"limit: the particles have 3 components; a picture shows one or two"):
        plots.limit(
            mfsde.simulate(MeanFieldOU(initial_mean=(0.0,) * 3), n_particles=5, horizon=0.1, dt=0.1, seed=0), None
        )


# Limits without a density ---------------------------------------------------------------------------------------------


def test_particles_without_noise_are_within_the_floor_of_their_characteristics():
    network = IsotropicGaussians()
    settings = {"n_particles": 1000, "n_replicas": 6, "horizon": 2.0, "dt": 0.02, "seed": 0, "save_every": 50}
    run = mfsde.simulate(network, **settings)

    def excess(law):
        apart = to_law(run, law).isel(time=-1)
        return float((apart**2).mean() / apart.floor**2)

    right = excess(mfsde.limit.evolve(network, run.time.values))
    # Over replicas W₂² of independent points has a spread of about its mean; of six the mean stays below three of them,
    # and the law of another separation of the classes is tens of floors away.
    assert right < 3
    assert excess(mfsde.limit.evolve(replace(network, delta=0.6), run.time.values)) > 10


def test_characteristics_become_the_law_that_their_points_are_a_quadrature_of():
    flow = mfsde.limit.characteristics(MeanFieldOU(sigma=0.0), [0.0, 0.5, 1.0])
    law = law_at(flow, 1.0)
    wanted = mfsde.Gaussian([np.exp(-1.0)], [[np.exp(-3.0)]])
    u = torch.linspace(0.001, 0.999, 99, dtype=torch.float64)
    # Each point stands at the middle of its mass: second order in the spacing, 1/16 of a deviation, of the variates.
    assert torch.allclose(law.quantile(u), wanted.quantile(u), atol=1e-3 * float(wanted.cov[0, 0]) ** 0.5)
    assert torch.allclose(law.cdf(law.quantile(u)), u, atol=1e-12)
    assert float(law.mean[0]) == pytest.approx(float(wanted.mean[0]), abs=1e-9)
    assert float(law_at(flow, 0.75).mean[0]) == pytest.approx((np.exp(-0.5) + np.exp(-1.0)) / 2, abs=1e-3)


def test_quantiles_of_proximal_steps_are_a_law():
    steps = mfsde.limit.jko(GaussianLangevin(), 0.05, 4)
    law = law_at(steps, 0.2)
    moments = steps.isel(time=-1)
    exact = mfsde.Gaussian(moments["mean"].values, moments["covariance"].values)
    assert distance(law, exact) < 1e-6
    assert distance(law, mfsde.Gaussian(moments["mean"].values + 0.01, moments["covariance"].values)) > 9e-3


def test_an_atom_of_a_law_is_kept():
    law = QuantileLaw.of_atoms(np.array([0.0, 0.0, 1.0, 2.0]), np.array([0.3, 0.3, 0.2, 0.2]))
    assert float(law.quantile(torch.tensor(0.2, dtype=torch.float64))) == 0.0
    assert float(law.cdf(torch.tensor(-1e-9, dtype=torch.float64))) == 0.0
    assert float(law.cdf(torch.tensor(0.0, dtype=torch.float64))) > 0.4
    with pytest.raises(ValueError, match="levels increasing"):
        QuantileLaw([0.2, 0.1], [0.0, 1.0])
