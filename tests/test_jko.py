"""Minimising movements against closed forms, exact flows and one another; each claim beside a fault that breaks it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.special import ndtr

import mfsde
from mfsde import Dirac, EmpiricalMeasure, Energy, Gaussian, MeanFieldLangevin, Mixture, Uniform
from mfsde.analysis import wasserstein
from mfsde.limit import fokker_planck
from mfsde.limit.cloud import assignment, blob
from mfsde.limit.grid_law import GridLaw
from mfsde.limit.jko import gaussian_step, jko
from mfsde.limit.mirror import Reaction, relevelled
from mfsde.limit.quantile_map import Levels
from mfsde.scenarios import DoubleWell, MeanFieldOU

# Scenarios ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quadratic:
    """F = ∫ ½k|x - c|² dm with T = σ²/2: everything stays Gaussian."""

    k: float = 1.0
    centre: float = 0.0
    sigma: float = 1.0
    m0: float = 1.0
    v0: float = 0.5
    dim: int = 1

    @cached_property
    def energy(self) -> Energy:
        return mfsde.potential(lambda x: 0.5 * self.k * (x - self.centre).square().sum(-1))

    @property
    def temperature(self) -> float:
        return 0.5 * self.sigma**2

    def drift(self, t, x, mu):
        return -self.k * (x - self.centre)

    def diffusion(self, t, x, mu):
        return self.sigma

    def initial(self):
        return Gaussian([self.m0] * self.dim, self.v0)


@dataclass(frozen=True)
class MeanPulled(MeanFieldLangevin):
    """F = ½κ(∫x dm - a)², U = ½kx² + log √(2π/k), normalised unless `shift` is added."""

    kappa: float = 0.3
    a: float = 1.0
    k: float = 4.0
    sigma: float = 1.0
    m0: float = 2.0
    v0: float = 0.5
    shift: float = 0.0

    @cached_property
    def energy(self) -> Energy:
        return Energy(lambda mu: 0.5 * self.kappa * (mu.mean() - self.a).square().sum((-2, -1)))

    def confinement(self, x):
        return 0.5 * self.k * x.square().sum(-1) + 0.5 * math.log(2 * math.pi / self.k) + self.shift

    def initial(self):
        return Gaussian([self.m0], [[self.v0]])

    def flow(self, t: float) -> tuple[float, float]:
        """Mean and variance at time t: truth.json, mfld_gauss."""
        rate = self.kappa + self.sigma**2 * self.k / 2
        end = self.kappa * self.a / rate
        mean = end + (self.m0 - end) * math.exp(-rate * t)
        return mean, 1 / self.k + (self.v0 - 1 / self.k) * math.exp(-(self.sigma**2) * self.k * t)


@dataclass(frozen=True)
class Egg:
    """F = ∫ Π cos(3x_k) + |x|²/10 dm: many wells, σ = 0."""

    sigma: float = 0.0

    @cached_property
    def energy(self) -> Energy:
        return mfsde.potential(lambda x: torch.cos(3 * x).prod(-1) + 0.1 * x.square().sum(-1))


def moments(run: xr.Dataset) -> np.ndarray:
    """Mean and standard deviation of a one-dimensional law over time, (T, 2)."""
    mean, variance = (run[name].values.reshape(run.sizes["time"], -1)[:, 0] for name in ("mean", "covariance"))
    return np.stack([mean, np.sqrt(variance)], -1)


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def identity(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n = np.arange(len(x))
    return n, n, np.full(len(x), 1 / len(x))


def order(taus: np.ndarray, errors: np.ndarray) -> tuple[float, float]:
    """The p of e = C τ^p e^{Dτ} and its standard error, by least squares on the logarithms."""
    design = np.stack([np.log(taus), np.ones(len(taus)), taus], -1)
    found, rest, *_ = np.linalg.lstsq(design, np.log(errors), rcond=None)
    variance = float(rest[0]) / (len(taus) - 3) * np.linalg.inv(design.T @ design)[0, 0]
    return float(found[0]), math.sqrt(variance)


def is_first_order(taus: np.ndarray, errors: np.ndarray) -> bool:
    p, stderr = order(taus, errors)
    # The residuals are not noise but the terms of the next order that e^{Dτ} does not have.
    return abs(p - 1) <= 4 * stderr + float(np.max(taus)) ** 2


# The step in closed form ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tau", "sigma", "k"), [(0.01, 1.0, 1.0), (0.3, 0.4, 3.0), (2.0, 2.0, 0.5), (50.0, 0.1, 1.0)])
def test_quantile_steps_are_the_gaussian_closed_form(tau: float, sigma: float, k: float) -> None:
    scenario = Quadratic(k=k, centre=-0.7, sigma=sigma)
    run = jko(scenario, tau, 4)

    def steps(temperature: float) -> np.ndarray:
        mean, cov, found = np.array([scenario.m0]), np.array([[scenario.v0]]), []
        for _ in range(4):
            mean, cov = gaussian_step(mean, cov, tau, k, temperature, scenario.centre)
            found.append(mean[0] + math.sqrt(cov[0, 0]) * run["z"].values)
        return np.array(found)

    gap = np.abs(run["quantile"].values[1:] - steps(scenario.temperature)).max()
    # Straight maps solve the discrete step: rounding and Newton's last step of 1e-11 deviations are all that is left.
    assert gap < 1e-10
    # A temperature of σ² in the place of σ²/2.
    assert np.abs(run["quantile"].values[1:] - steps(2 * scenario.temperature)).max() > 1e3 * 1e-8
    assert float(run["residual"][1:].max()) < 1e-10 * (1 + 1 / tau)


@pytest.mark.parametrize("tau", [0.02, 1.0])
def test_a_mean_field_step_couples_all_quantiles(tau: float) -> None:
    s = MeanPulled()
    run, (mean, variance) = jko(s, tau, 3), (s.m0, s.v0)
    for k in range(1, 4):
        mean = (mean + tau * s.kappa * s.a) / (1 + tau * (s.kappa + 0.5 * s.k))
        ((variance,),) = gaussian_step(0.0, variance, tau, 0.5 * s.k, 0.5)[1]
        expected = mean + math.sqrt(variance) * run["z"]
        assert float(np.abs(run["quantile"][k] - expected).max()) < 1e-10


@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_the_gaussian_step_is_stationary(temperature: float) -> None:
    m0, v0, tau, k, c = 0.4, 1.3, 0.7, 2.0, -1.0
    (m,), ((v,),) = gaussian_step(m0, v0, tau, k, temperature, c)
    s, s0 = math.sqrt(v), math.sqrt(v0)
    # ∂_m and ∂_s of ½k((m - c)² + s²) - T log s + ((m - m₀)² + (s - s₀)²)/(2τ).
    assert abs(k * (m - c) + (m - m0) / tau) < 1e-14
    assert abs(k * s - temperature / s + (s - s0) / tau) < 1e-14
    assert abs(k * s - (temperature + 0.1) / s + (s - s0) / tau) > 0.05


def test_the_gaussian_step_works_in_the_common_eigenvectors() -> None:
    turn = np.linalg.qr(normals(3, 3).numpy())[0]
    variances, stiffness = np.array([0.2, 1.0, 3.0]), np.array([2.0, 0.0, 0.5])
    mean, centre = np.array([1.0, -2.0, 0.5]), np.array([0.1, 0.2, 0.3])
    m, cov = gaussian_step(mean, turn * variances @ turn.T, 0.4, turn * stiffness @ turn.T, 0.3, centre)
    one = [
        gaussian_step(a, v, 0.4, k, 0.3, c)
        for a, v, k, c in zip(turn.T @ mean, variances, stiffness, turn.T @ centre, strict=False)
    ]
    np.testing.assert_allclose(turn.T @ m, [a[0] for a, _ in one], atol=1e-14)
    np.testing.assert_allclose(turn.T @ cov @ turn, np.diag([v[0, 0] for _, v in one]), atol=1e-14)


def test_the_gaussian_step_refuses_what_has_no_closed_form() -> None:
    with pytest.raises(ValueError, match="does not commute"):
        gaussian_step([0.0, 0.0], [[1.0, 0.5], [0.5, 1.0]], 0.1, [[1.0, 0.0], [0.0, 2.0]], 1.0)
    for tau, k, temperature in ((0.5, -2.0, 1.0), (0.0, 1.0, 1.0), (0.5, 1.0, -1.0)):
        with pytest.raises(ValueError, match="positive definite"):
            gaussian_step(0.0, 1.0, tau, k, temperature)


# Towards the flow -----------------------------------------------------------------------------------------------------

TAUS = 1 / 2.0 ** np.arange(3, 8)


def moments_at_one(scenario: Any, **options: Any) -> np.ndarray:
    """Mean and standard deviation at t = 1 for every τ, (len(TAUS), 2)."""
    return np.array([moments(jko(scenario, tau, round(1 / tau), **options))[-1] for tau in TAUS])


def test_the_scheme_follows_the_flow_to_first_order() -> None:
    s = MeanPulled(sigma=0.8)
    # Gaussians need few levels: 33 of them carry mean and variance to rounding.
    found = moments_at_one(s, n_nodes=33)
    exact, other = (np.array([m, math.sqrt(v)]) for m, v in (s.flow(1.0), replace(s, sigma=1.0).flow(1.0)))
    for errors in np.abs(found - exact).T:
        assert is_first_order(TAUS, errors)
        # Another order is told apart from one.
        assert not is_first_order(TAUS, errors * TAUS)
        assert not is_first_order(TAUS, errors / np.sqrt(TAUS))
    # The flow of another temperature is not approached.
    assert (np.abs(found - other)[-1] > 4 * np.abs(found - exact)[-1]).all()
    assert not any(is_first_order(TAUS, errors) for errors in np.abs(found - other).T)


def test_the_double_well_converges_to_first_order() -> None:
    scenario, fine = DoubleWell(), 1 / 256
    reference = moments(jko(scenario, fine, 128, n_nodes=33))[-1]
    taus = np.array([1 / 8, 1 / 16, 1 / 32, 1 / 64])
    runs = [moments(jko(scenario, tau, round(0.5 / tau), n_nodes=33))[-1] for tau in taus]
    for k in range(2):
        gaps = np.array([abs(run[k] - reference[k]) for run in runs])
        # e(τ) = Cτ(1 + Dτ + ...), so the distance to the fine run is C(τ - τ₀)(1 + D(τ + τ₀) + ...).
        slopes = np.diff(np.log(gaps)) / np.diff(np.log(taus - fine))
        bend = abs(slopes[1] - slopes[0])
        assert abs(slopes[-1] - 1) < bend
        assert bend < 0.2
    # Half as many levels, twice the spacing: the error of the levels is of second order.
    finest, half, quarter = (moments(jko(scenario, 0.1, 5, n_nodes=n))[-1] for n in (257, 65, 33))
    ratio = (quarter - finest) / (half - finest)
    np.testing.assert_allclose(ratio, (64 - 1) / (16 - 1), rtol=0.1)


def test_the_scheme_tends_to_the_fokker_planck_equation_at_first_order() -> None:
    scenario = DoubleWell()
    limit = fokker_planck(scenario, None, [0.5], energies=False)
    truth = np.array([float(limit["mean"][0, 0]), float(limit.covariance[0, 0, 0])])
    taus = np.array([1 / 8, 1 / 16, 1 / 32])
    runs = [jko(scenario, tau, round(0.5 / tau), n_nodes=513).isel(time=-1) for tau in taus]
    for k, name in enumerate(("mean", "covariance")):
        gaps = np.array([abs(float(run[name].values.ravel()[0]) - truth[k]) for run in runs])
        # e(τ) = Cτ(1 + Dτ + ...): the slope's distance from 1 halves with τ, and so is about what it changed by. The
        # levels add 4e-6 to gaps of 1e-3.
        slopes = np.diff(np.log(gaps)) / np.diff(np.log(taus))
        bend = abs(slopes[1] - slopes[0])
        assert abs(slopes[-1] - 1) < 1.5 * bend + 4e-6 / (gaps[-1] * math.log(2))
        assert bend < 0.3
    # Neither the equation of twice the energy nor that of another temperature is approached.
    for other in (replace(scenario, theta=2.0), replace(scenario, sigma=1.0)):
        wrong = fokker_planck(other, None, [0.5], energies=False)
        assert abs(float(runs[-1].covariance[0, 0]) - float(wrong.covariance[0, 0, 0])) > 4 * gaps[-1]


def test_twice_the_energy_runs_twice_as_fast() -> None:
    k, tau, n, x0 = 1.5, 0.01, 100, normals(20, 2)
    half, whole = (
        jko(Quadratic(k=c * k, sigma=0.0), tau, n, start=EmpiricalMeasure(x0))["position"].values[:, 0] for c in (1, 2)
    )
    t = tau * n

    def is_flow(x: np.ndarray, time: float) -> bool:
        # (1 + τk)^{-n} lies between e^{-kt} and e^{-kt + kt·τk/2}.
        ratio = x / x0.numpy()
        low = math.exp(-k * time)
        return bool(
            (ratio >= low * (1 - 1e-12)).all() and (ratio <= low * math.exp(0.5 * k * time * 2 * tau * k)).all()
        )

    assert is_flow(half[-1], t)
    assert is_flow(whole[-1], 2 * t)
    assert not is_flow(whole[-1], t)
    assert not is_flow(half[-1], 2 * t)
    # The identity behind it: 2F with τ is F with 2τ.
    doubled = jko(Quadratic(k=k, sigma=0.0), 2 * tau, n, start=EmpiricalMeasure(x0))["position"].values[:, 0]
    np.testing.assert_allclose(whole, doubled, rtol=1e-12)


# Descent --------------------------------------------------------------------------------------------------------------


def dissipates(run: xr.Dataset, tau: float, alpha: float = 1.0) -> bool:
    """V(m₊) + W₂²/(2τ) <= V(m), or with KL/(ατ), at every step."""
    value = run["free_energy"].values.reshape(run.sizes["time"])
    paid = np.zeros(len(value) - 1)
    if "step" in run:
        paid += run["step"].values.reshape(-1)[1:] ** 2 / (2 * tau)
    if "divergence" in run:
        paid += run["divergence"].values.reshape(-1)[1:] / (alpha * tau)
    return bool((value[1:] + paid <= value[:-1] + 1e-12 * np.abs(value).max()).all())


@pytest.mark.parametrize("tau", [0.02, 0.5])
@pytest.mark.parametrize(
    ("geometry", "options"),
    [
        ("wasserstein", {"n_nodes": 65}),
        ("kl", {"n_nodes": 129, "alpha": 2.0}),
        ("wasserstein", {"n_particles": 40, "seed": 1, "bandwidth": 0.2}),
        ("kl", {"n_particles": 40, "seed": 1, "bandwidth": 0.2, "alpha": 2.0}),
        ("wfr", {"n_particles": 40, "seed": 1, "bandwidth": 0.2, "alpha": 2.0}),
    ],
)
def test_the_free_energy_pays_for_every_step(tau: float, geometry: str, options: dict[str, Any]) -> None:
    run = jko(DoubleWell(), tau, 4, geometry=geometry, **options)
    alpha = options.get("alpha", 1.0)
    assert dissipates(run, tau, alpha)
    assert float(run["residual"][1:].max()) < 1e-9
    # Backwards, and with a price of distance that is too high by far.
    assert not dissipates(run.assign(free_energy=-run["free_energy"]), tau, alpha)
    assert not dissipates(run, tau / 20, alpha)


def test_the_value_of_a_law_is_the_closed_form() -> None:
    s = MeanPulled()
    run = jko(s, 0.1, 3)
    mean, deviation = moments(run).T
    divergence = 0.5 * (s.k * (deviation**2 + mean**2) - 1 - np.log(s.k * deviation**2))
    np.testing.assert_allclose(run["free_energy"], 0.5 * s.kappa * (mean - s.a) ** 2 + 0.5 * divergence, atol=1e-12)
    # An unnormalised U shifts V by -T log ∫ e^{-U}, and that is reported.
    other = jko(replace(s, shift=1.5), 0.1, 3)
    settings = json.loads(other.attrs["settings"])
    assert abs(settings["log_reference_mass"] + 1.5) < 1e-10
    np.testing.assert_allclose(
        other["free_energy"] + 0.5 * settings["log_reference_mass"], run["free_energy"], atol=1e-10
    )
    assert abs(json.loads(run.attrs["settings"])["log_reference_mass"]) < 1e-10
    assert json.loads(jko(Quadratic(), 0.1, 1).attrs["settings"])["log_reference_mass"] is None


# Particles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_particles_take_implicit_euler_steps(dim: int) -> None:
    x0, tau, k = normals(30, dim), 0.4, 2.0
    run = jko(Quadratic(k=k, sigma=0.0), tau, 5, start=EmpiricalMeasure(x0))
    factors = (1 + tau * k) ** -np.arange(6.0)
    np.testing.assert_allclose(run["position"].values[:, 0], factors[:, None, None] * x0.numpy(), atol=1e-13)
    # An explicit step is 1 - τk in the place of 1/(1 + τk).
    assert np.abs(run["position"].values[1, 0] - (1 - tau * k) * x0.numpy()).max() > 0.1
    moved = -np.diff(factors) * math.sqrt(float(x0.square().sum(-1).mean()))
    np.testing.assert_allclose(run["step"].values[1:, 0], moved, rtol=1e-12)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_the_assignment_is_the_optimal_coupling(dim: int) -> None:
    x, y = normals(40, dim, seed=1).numpy(), normals(40, dim, seed=2).numpy()
    i, j, masses = assignment(x, y)
    a, b, shares = wasserstein.coupling(x, y)
    assert set(zip(i, j, strict=True)) == set(zip(a, b, strict=True))
    cost = masses @ np.square(x[i] - y[j]).sum(-1)
    np.testing.assert_allclose(cost, shares @ np.square(x[a] - y[b]).sum(-1), rtol=1e-12)
    np.testing.assert_allclose(cost, wasserstein.distance(x, y) ** 2, rtol=1e-12)
    assert np.square(x - y).sum(-1).mean() > 1.1 * cost


def test_pairs_are_chosen_anew_until_they_are_optimal() -> None:
    tau, crossed = 100.0, 0
    for seed in range(4):
        y = normals(20, 2, seed=seed)
        start = EmpiricalMeasure(y)
        best, other, fixed = (
            jko(Egg(), tau, 1, start=start, coupling=c) for c in (None, wasserstein.coupling, identity)
        )
        x, stuck = (run["position"].values[1, 0] for run in (best, fixed))
        np.testing.assert_allclose(best["position"], other["position"], atol=1e-9)
        # Transport is what the step paid for, and the step is stationary for the optimal pairs.
        assert abs(float(best["step"][1, 0]) - wasserstein.distance(x, y)) < 1e-9
        i, j, _ = wasserstein.coupling(x, y.numpy())
        slope = Egg().energy.intrinsic_derivative(start, torch.from_numpy(x)).numpy()
        assert np.abs(slope[i] + (x[i] - y.numpy()[j]) / tau).max() < 1e-9
        if float(fixed["step"][1, 0]) > wasserstein.distance(stuck, y) + 1e-6:
            crossed += 1
            value = [float(r["free_energy"][1, 0]) + float(r["step"][1, 0]) ** 2 / (2 * tau) for r in (best, fixed)]
            assert value[0] < value[1] - 1e-6
            slope = Egg().energy.intrinsic_derivative(start, torch.from_numpy(stuck)).numpy()
            i, j, _ = wasserstein.coupling(stuck, y.numpy())
            assert np.abs(slope[i] + (stuck[i] - y.numpy()[j]) / tau).max() > 1e-4
    assert crossed >= 1


def test_the_smoothed_entropy() -> None:
    h, x = 0.3, normals(2, 2)
    one, two = EmpiricalMeasure(x[:1]), EmpiricalMeasure(x)
    peak = -math.log(2 * math.pi * h**2)
    assert abs(float(blob(h)(one)) - peak) < 1e-14
    near = math.exp(-float((x[0] - x[1]).square().sum()) / (2 * h**2))
    assert abs(float(blob(h)(two)) - peak - math.log(0.5 * (1 + near))) < 1e-14
    # It repels, but no force of its own moves the mean: implicit Euler, whatever the bandwidth.
    run = jko(Quadratic(), 0.3, 4, n_particles=50, seed=3, bandwidth=0.2)
    y, z = (torch.tensor(run["position"].values[k, 0]) for k in (0, 1))
    for temperature, holds in ((0.5, True), (1.0, False)):
        # Equal masses on the line: the pairs keep their order.
        repulsion = temperature * blob(0.2).intrinsic_derivative(EmpiricalMeasure(z), z)
        slope = z + repulsion + (z.sort(0).values - y.sort(0).values)[z.flatten().argsort().argsort()] / 0.3
        assert (float(slope.abs().max()) < 1e-8) is holds
    mean = run["mean"].values[:, 0, 0]
    np.testing.assert_allclose(mean, mean[0] * 1.3 ** -np.arange(5.0), atol=1e-12)
    cold = jko(Quadratic(sigma=0.0), 0.3, 4, n_particles=50, seed=3)
    assert (run["covariance"].values[1:] > 1.2 * cold["covariance"].values[1:]).all()


def test_particles_start_where_a_run_starts_and_are_read_like_one() -> None:
    scenario = DoubleWell(initial_mean=(0.5, 0.0), sigma=0.0)
    run = jko(scenario, 0.5, 2, n_particles=12, seed=5)
    simulated = mfsde.simulate(scenario, n_particles=12, horizon=0.5, dt=0.5, seed=5, dtype=torch.float64)
    np.testing.assert_array_equal(run["position"][0], simulated["position"][0])
    assert run["position"].dims == simulated["position"].dims
    distance = wasserstein.to_law(run, Gaussian([0.5, 0.0], 0.5))
    assert distance.dims == ("time", "replica")
    assert bool(np.isfinite(distance).all())
    between = wasserstein.between(run, run)
    np.testing.assert_allclose(between, 0.0, atol=1e-12)


def test_weighted_particles_do_not_pass_one_another() -> None:
    weights = torch.softmax(normals(8, seed=1), 0)
    start = EmpiricalMeasure(normals(8, 2), weights)
    run = jko(Quadratic(sigma=0.0, k=1.0), 0.5, 2, start=start)
    np.testing.assert_allclose(run["position"][2, 0], start.points / 1.5**2, atol=1e-13)
    np.testing.assert_allclose(run["weight"][:, 0], weights.expand(3, 8), rtol=1e-14)
    moved = math.sqrt(float((weights * start.points.square().sum(-1)).sum())) / 3
    assert abs(float(run["step"][1, 0]) - moved) < 1e-12
    refused = 0
    for seed in range(4):
        y = EmpiricalMeasure(normals(20, 2, seed=seed), torch.softmax(normals(20, seed=1), 0))
        try:
            jko(Egg(), 100.0, 1, start=y)
        except RuntimeError as problem:
            refused += "smaller tau" in str(problem)
    assert refused >= 1


# Mass that grows and shrinks ------------------------------------------------------------------------------------------


def test_a_linear_energy_multiplies_by_an_exponential() -> None:
    scenario, alpha, tau, n = Quadratic(k=1.3, sigma=0.0), 0.7, 0.4, 6
    run = jko(scenario, tau, n, geometry="kl", alpha=alpha, n_nodes=257)
    x, times = torch.tensor(run["x"].values)[:, None], run["time"].values
    grown = scenario.initial().log_prob(x).numpy() - alpha * times[:, None] * 0.5 * 1.3 * x.numpy()[:, 0] ** 2
    density = np.exp(grown - grown.max(1, keepdims=True))
    density /= np.trapezoid(density, run["x"].values, axis=1)[:, None]
    np.testing.assert_allclose(run["density"], density, rtol=1e-10, atol=1e-13)
    wrong = scenario.initial().log_prob(x).numpy() - times[-1] * 0.5 * 1.3 * x.numpy()[:, 0] ** 2
    assert (
        np.abs(np.exp(wrong - wrong.max()) / np.exp(wrong - wrong.max()).max() - density[-1] / density[-1].max()).max()
        > 0.01
    )
    mean, deviation = moments(run).T
    ratio = deviation[1:] / deviation[:-1]
    divergence = 0.5 * (ratio**2 - 1 + (np.diff(mean) / deviation[:-1]) ** 2) - np.log(ratio)
    np.testing.assert_allclose(run["divergence"][1:], divergence, atol=1e-11)
    # The same on the masses of particles, which do not move.
    cloud = jko(scenario, tau, n, geometry="kl", alpha=alpha, n_particles=15, seed=2)
    y = cloud["position"].values[0, 0, :, 0]
    weights = np.exp(-alpha * times[:, None] * 0.5 * 1.3 * y**2)
    np.testing.assert_allclose(cloud["weight"][:, 0], weights / weights.sum(1, keepdims=True), rtol=1e-10)
    np.testing.assert_array_equal(cloud["position"][-1], cloud["position"][0])
    # And on a plane.
    plane = jko(replace(scenario, dim=2), tau, n, geometry="kl", alpha=alpha)
    assert plane["density"].dims == ("time", "x", "y")
    expected = 1 / (1 / scenario.v0 + alpha * times * 1.3)
    np.testing.assert_allclose(plane["covariance"], expected[:, None, None] * np.eye(2), atol=1e-12)
    np.testing.assert_allclose(run["covariance"][:, 0, 0], expected, atol=1e-12)
    np.testing.assert_allclose(run["mean"][:, 0], scenario.m0 * expected / scenario.v0, atol=1e-12)


def test_its_fixed_point_is_the_gibbs_law() -> None:
    s = MeanPulled()
    run = jko(s, 10.0, 16, geometry="kl")
    mean, variance = s.flow(math.inf)
    x = torch.tensor(run["x"].values)[:, None]
    gap = [
        float(np.abs(run["density"][-1] - Gaussian([m], [[v]]).log_prob(x).exp().numpy()).max())
        for m, v in ((mean, variance), (mean, 2 * variance), (0.0, variance))
    ]
    # Each step divides what is left by more than 1 + ατT = 6: 6^{-16} of a density of order one, and rounding.
    assert gap[0] < 1e-10
    assert min(gap[1:]) > 0.05
    again = jko(s, 1.0, 1, geometry="kl", start=Gaussian([mean], [[variance]]))
    assert float(again["divergence"][1]) < 1e-20


@pytest.mark.parametrize("tau", [0.1, 1.0, 20.0])
def test_an_energy_that_is_not_linear_is_met_implicitly(tau: float) -> None:
    s = replace(MeanPulled(), kappa=50.0)
    run = jko(s, tau, 2, geometry="kl")
    mean, variance, temperature = s.m0, s.v0, 0.5
    for k in (1, 2):
        # log p₊ is quadratic; its linear part holds the new mean.
        shrunk = 1 + tau * temperature
        precision = (1 / variance + tau * temperature * s.k) / shrunk
        mean = (mean / variance + tau * s.kappa * s.a) / (shrunk * precision + tau * s.kappa)
        variance = 1 / precision
        np.testing.assert_allclose(moments(run)[k], [mean, math.sqrt(variance)], atol=1e-9)
    explicit = (s.m0 / s.v0 - tau * s.kappa * (s.m0 - s.a)) / (1 / s.v0 + tau * temperature * s.k)
    assert abs(explicit - moments(run)[1, 0]) > 0.1


# Both, one after the other --------------------------------------------------------------------------------------------


def reacted(mean: float, variance: float, rate: float, k: float, temperature: float) -> tuple[float, float]:
    """A KL step for ½kx² + T log m on a Gaussian."""
    shrunk = 1 + rate * temperature
    precision = (1 / variance + rate * k) / shrunk
    return mean / variance / shrunk / precision, 1 / precision


@pytest.mark.parametrize(("alpha", "tau"), [(1.0, 0.1), (3.0, 0.05), (1.0, 1.0)])
def test_the_splitting_is_one_step_of_each(alpha: float, tau: float) -> None:
    s = Quadratic(k=1.5)
    run, mean, variance = jko(s, tau, 4, geometry="wfr", alpha=alpha), s.m0, s.v0
    for k in range(1, 5):
        (mean,), ((variance,),) = gaussian_step(mean, variance, tau, s.k, s.temperature)
        mean, variance = reacted(mean, variance, alpha * tau, s.k, s.temperature)
        np.testing.assert_allclose(moments(run)[k], [mean, math.sqrt(variance)], atol=1e-10)
    # The other order is another scheme.
    mean, variance = reacted(s.m0, s.v0, alpha * tau, s.k, s.temperature)
    (mean,), ((variance,),) = gaussian_step(mean, variance, tau, s.k, s.temperature)
    assert np.abs(moments(run)[1] - [mean, math.sqrt(variance)]).max() > 1e-5


def test_the_splitting_sees_the_reference() -> None:
    s, tau = MeanPulled(), 0.2
    run, temperature = jko(s, tau, 1, geometry="wfr"), 0.5
    mean = (s.m0 + tau * s.kappa * s.a) / (1 + tau * (s.kappa + temperature * s.k))
    ((v,),) = gaussian_step(0.0, s.v0, tau, temperature * s.k, temperature)[1]
    shrunk = 1 + tau * temperature
    precision = (1 / v + tau * temperature * s.k) / shrunk
    mean = (mean / v + tau * s.kappa * s.a) / (shrunk * precision + tau * s.kappa)
    np.testing.assert_allclose(moments(run)[1], [mean, precision**-0.5], atol=1e-10)


def test_the_splitting_of_a_law_that_is_no_gaussian() -> None:
    scenario, x, tau = DoubleWell(), np.linspace(-4, 4, 401), 0.2
    both = jko(scenario, tau, 1, geometry="wfr", alpha=3.0, grid=x, n_nodes=513)
    first = jko(scenario, tau, 1, grid=x, n_nodes=513)
    law = GridLaw(x, first["density"].values[1])
    second = jko(scenario, tau, 1, geometry="kl", alpha=3.0, grid=x, start=law)
    # Levels 1/32 apart: their error is h²/24 times derivatives of order one.
    assert np.abs(moments(both)[1] - moments(second)[1]).max() < 1 / 32**2
    assert abs(float(both["divergence"][1]) / float(second["divergence"][1]) - 1) < 0.01
    assert np.abs(both["density"].values[1] - second["density"].values[1]).max() < 5 / 32**2
    assert np.abs(moments(first)[1] - moments(second)[1]).max() > 10 / 32**2


def gaussian_flow(k: float, alpha: float, temperature: float, transport: bool) -> np.ndarray:
    """m' = -km(1 + αv), v' = -2kv + 2T - αkv² + αTv from (1, ½) at t = 1; without transport the terms of α alone."""
    from scipy.integrate import solve_ivp

    def slope(t: float, y: np.ndarray) -> list[float]:
        m, v = y
        moved = [-k * m, -2 * k * v + 2 * temperature] if transport else [0.0, 0.0]
        return [moved[0] - alpha * k * m * v, moved[1] - alpha * k * v**2 + alpha * temperature * v]

    mean, variance = solve_ivp(slope, (0, 1), [1.0, 0.5], rtol=1e-11, atol=1e-13).y[:, -1]
    return np.array([mean, math.sqrt(variance)])


@pytest.mark.parametrize(
    ("geometry", "sigma", "options"),
    [
        ("kl", 0.8, {"grid": np.linspace(-7, 7, 65)}),
        ("wfr", 0.8, {"n_nodes": 33}),
        ("wfr", 0.0, {"start": Gaussian([1.0], [[0.5]]).as_measure()}),
    ],
)
def test_birth_and_death_follow_their_flow_to_first_order(geometry: str, sigma: float, options: dict[str, Any]) -> None:
    k, alpha, scenario = 1.0, 1.5, Quadratic(sigma=sigma)
    flow = partial(gaussian_flow, temperature=scenario.temperature, transport=geometry == "wfr")
    found = moments_at_one(scenario, geometry=geometry, alpha=alpha, **options)
    errors = np.abs(found - flow(k, alpha))
    assert all(is_first_order(TAUS, e) for e in errors.T)
    # The flow of twice the rate, and that of the other sign, are other flows.
    for other in (flow(k, 2 * alpha), flow(k, -alpha)):
        assert np.abs(found[-1] - other).max() > 10 * errors[-1].max()


def test_without_noise_a_kl_step_is_the_flow() -> None:
    run = jko(Quadratic(sigma=0.0), 0.25, 4, geometry="kl", alpha=1.5)
    # 1/v grows linearly, in the flow as in the step.
    np.testing.assert_allclose(moments(run)[-1], gaussian_flow(1.0, 1.5, 0.0, False), atol=1e-9)
    assert np.abs(moments(run)[-1] - gaussian_flow(1.0, 1.5, 0.0, True)).max() > 0.1


# Quantile maps --------------------------------------------------------------------------------------------------------


def test_levels_are_summed_by_parts() -> None:
    levels = Levels(np.linspace(-8, 8, 129))
    g = np.sin(levels.z) + levels.z**3
    left = float(levels.mass @ (levels.z * g))
    assert abs(left - float(levels.flux @ np.diff(g)) / levels.spacing) < 1e-12
    # With φ at the midpoints it would not be so.
    middles = np.exp(-((levels.z[1:] + levels.z[:-1]) ** 2) / 8)
    assert abs(left - float(middles / middles.sum() @ np.diff(g)) / levels.spacing) > 1e-4


def test_quantiles_of_a_changed_density() -> None:
    mixture = Mixture([Gaussian(-1.0, 0.5), Gaussian(1.0, 0.5)])
    errors = []
    for n in (65, 129, 257):
        z = np.linspace(-8, 8, n)
        at = torch.from_numpy(z)
        ratio = (mixture.log_prob(at[:, None]) - Gaussian(0.0, 1.0).log_prob(at[:, None])).numpy()
        gap = relevelled(z, z, ratio) - mixture.quantile(torch.special.ndtr(at)).numpy()
        errors.append(float(np.abs(gap[np.abs(z) <= 5]).max()))
        # A Gaussian factor makes a Gaussian, straight again; ends beyond Φ(±7) are continued.
        straight = relevelled(z, z, -0.3 * (z - 1) ** 2) - (0.6 / 1.6 + z / 1.6**0.5)
        assert np.abs(straight[np.abs(z) <= 7]).max() < 1e-6 * (16 / (n - 1)) ** 2
    # Cubic splines: a factor 16 for every halving, once the two bumps are resolved.
    assert errors[0] / errors[1] > 12
    assert errors[1] / errors[2] > 10
    assert errors[2] < 1e-6


@pytest.mark.parametrize(
    "law",
    [
        Uniform(-1.0, 2.0),
        Mixture([Gaussian(-1.0, 0.1), Gaussian(1.5, 0.05)]),
        Mixture([Uniform(-2, -1), Uniform(1, 2)]),
    ],
)
def test_laws_with_ends_and_holes_are_followed(law: mfsde.Law) -> None:
    grid = np.linspace(-5, 5, 1001)
    run = jko(Quadratic(sigma=1.0), 0.2, 3, start=law, grid=grid)
    # Under a linear force the mean is implicit Euler's for every law.
    mean = run["mean"].values[:, 0]
    np.testing.assert_allclose(mean, mean[0] * 1.2 ** -np.arange(4.0), atol=1e-10)
    # Jumps are averaged: the error is that of the levels, of second order, not the jump's share of a level, 0.02.
    assert abs(mean[0] - float(law.mean[0])) < (1 / 16) ** 2 / 24 * math.sqrt(float(law.cov[0, 0]))
    assert (np.diff(run["quantile"]) > 0).all()
    np.testing.assert_allclose(np.trapezoid(run["density"], grid, axis=1), 1.0, atol=1e-12)
    np.testing.assert_allclose(np.trapezoid(run["density"] * grid, grid, axis=1)[1:], run["mean"][1:, 0], atol=2e-3)


def test_a_density_is_that_of_the_quantiles() -> None:
    s, x = Quadratic(), np.linspace(-5, 6, 301)
    run = jko(s, 0.2, 2, grid=x)
    mean, deviation = moments(run).T
    expected = np.exp(-(((x - mean[:, None]) / deviation[:, None]) ** 2) / 2) / (
        math.sqrt(2 * math.pi) * deviation[:, None]
    )
    np.testing.assert_allclose(run["density"], expected, atol=1e-10)
    np.testing.assert_allclose(run["level"], ndtr(run["z"]), rtol=1e-14)


# Stored, refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"n_nodes": 33},
        {"geometry": "kl", "n_nodes": 65},
        {"geometry": "wfr", "n_particles": 5, "seed": 0, "bandwidth": 0.5},
    ],
)
def test_a_stored_result_is_the_one_in_memory(tmp_path: Any, options: dict[str, Any]) -> None:
    path = tmp_path / "steps.zarr"
    memory = jko(Quadratic(), 0.3, 2, **options)
    stored = jko(Quadratic(), 0.3, 2, **options, store=path)
    opened = mfsde.open_run(path)
    xr.testing.assert_equal(memory, stored.load())
    xr.testing.assert_equal(memory, opened.load())
    settings = json.loads(opened.attrs["settings"])
    assert settings["tau"] == 0.3
    assert settings["n_steps"] == 2
    assert opened.attrs["method"] == "jko"
    assert settings["geometry"] == options.get("geometry", "wasserstein")
    np.testing.assert_array_equal(memory["time"], [0.0, 0.3, 0.6])
    assert all(v.attrs["long_name"] and v.attrs["units"] for v in opened.data_vars.values())
    with pytest.raises(FileExistsError):
        jko(Quadratic(), 0.3, 2, **options, store=path)
    jko(Quadratic(), 0.1, 1, **options, store=path, overwrite=True)
    assert mfsde.open_run(path).sizes["time"] == 2


def changed(scenario: Any, **attributes: Any) -> Any:
    """The scenario with class attributes added."""
    cls = type(scenario)
    return dataclass(frozen=True)(type(cls.__name__, (cls,), attributes))()


def still(self: Any, *args: Any) -> Any:
    return args[0]


REFUSED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: jko(Quadratic(), 0.0, 1), ValueError, "tau = 0.0"),
    (lambda: jko(Quadratic(), math.inf, 1), ValueError, "tau = inf"),
    (lambda: jko(Quadratic(), "1", 1), ValueError, "tau = '1'"),
    (lambda: jko(Quadratic(), 0.1, 0), ValueError, "n_steps = 0"),
    (lambda: jko(Quadratic(), 0.1, 1.5), TypeError, "n_steps = 1.5"),
    (lambda: jko(Quadratic(), 0.1, 1, geometry="w2"), ValueError, "geometry = 'w2'"),
    (lambda: jko(Quadratic(), 0.1, 1, alpha=1.0), TypeError, "alpha"),
    (lambda: jko(Quadratic(), 0.1, 1, geometry="kl", alpha=-1.0), ValueError, "alpha = -1.0"),
    (lambda: jko(Quadratic(), 0.1, 1, start=0.5), TypeError, "start = 0.5"),
    (lambda: jko(Quadratic(), 0.1, 1, n_nodes=3), ValueError, "n_nodes = 3"),
    (lambda: jko(Quadratic(), 0.1, 1, seed=0), TypeError, "seed does not apply"),
    (lambda: jko(Quadratic(), 0.1, 1, n_particles=5, seed=0, n_nodes=33), TypeError, "n_nodes does not apply"),
    (lambda: jko(Quadratic(), 0.1, 1, n_particles=5), ValueError, "without seed"),
    (lambda: jko(Quadratic(), 0.1, 1, n_particles=5, seed=0), ValueError, "bandwidth = None.*Scott's rule gives 0"),
    (lambda: jko(Quadratic(sigma=0.0), 0.1, 1, n_particles=5, seed=0, bandwidth=0.1), ValueError, "no entropy"),
    (lambda: jko(Quadratic(), 0.1, 1, start=EmpiricalMeasure(normals(4, 1)), seed=1), ValueError, "nothing to draw"),
    (lambda: jko(Quadratic(sigma=0.0), 0.1, 1), ValueError, "sigma = 0.*n_particles"),
    (lambda: jko(Quadratic(sigma=-1.0), 0.1, 1), ValueError, "sigma"),
    (lambda: jko(Quadratic(dim=2), 0.1, 1), ValueError, "dimension 2.*n_particles"),
    (lambda: jko(Quadratic(dim=3), 0.1, 1, geometry="kl"), ValueError, "dimension 3.*n_particles"),
    (lambda: jko(Quadratic(), 0.1, 1, start=Dirac(0.0)), ValueError, "atoms"),
    (lambda: jko(Quadratic(), 0.1, 1, start=Mixture([Dirac(0.0), Gaussian(0.0, 1.0)])), ValueError, "atoms"),
    (lambda: jko(Quadratic(), 0.1, 1, geometry="kl", start=Dirac(0.0)), ValueError, "without a density"),
    (lambda: jko(MeanFieldOU(), 0.1, 1), TypeError, "has no energy"),
    (lambda: jko(changed(Quadratic(), period=1.0), 0.1, 1), ValueError, "torus"),
    (lambda: jko(changed(Quadratic(), project=still), 0.1, 1), ValueError, "walls"),
    (lambda: jko(changed(Quadratic(), common_diffusion=lambda s, t, x, mu: 1.0), 0.1, 1), ValueError, "common noise"),
    (lambda: jko(changed(Quadratic(), drift=lambda s, t, x, mu: -2 * x), 0.1, 1), ValueError, "no gradient flow"),
    (lambda: jko(changed(Quadratic(), diffusion=lambda s, t, x, mu: x), 0.1, 1), ValueError, "no gradient flow"),
    (lambda: jko(Egg(), 0.1, 1, n_particles=4, seed=0), TypeError, "initial"),
    (lambda: jko(Quadratic(), 0.1, 1, grid=np.linspace(-1, 1, 51)), ValueError, "lies outside"),
    (lambda: jko(Quadratic(), 0.1, 1, geometry="kl", grid=np.linspace(-1, 1, 51)), ValueError, "reaches the ends"),
    (lambda: jko(Quadratic(), 0.1, 1, geometry="kl", grid=np.linspace(-6, 6, 9)), ValueError, "nodes 1.5 apart"),
    (lambda: jko(Quadratic(), 0.1, 1, geometry="kl", grid=np.linspace(-6, 6, 99), n_nodes=99), TypeError, "two ways"),
    (
        lambda: jko(
            Egg(),
            0.1,
            1,
            start=EmpiricalMeasure(normals(4, 2)),
            coupling=lambda x, y: (*identity(x, y)[:2], np.ones(4)),
        ),
        ValueError,
        "coupling: the masses",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_bad_input_is_refused(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_constant_sigma_is_needed() -> None:
    @dataclass(frozen=True)
    class Bare:
        energy = Quadratic().energy

        def initial(self):
            return Gaussian(0.0, 1.0)

    with pytest.raises(TypeError, match="no field sigma"):
        jko(Bare(), 0.1, 1)


def test_a_step_that_has_no_minimum_raises() -> None:
    hill = Quadratic(k=-1.0)
    # 1 - τ > 0: still convex; 1 - τ < 0: unbounded below.
    assert float(jko(hill, 0.5, 1)["residual"][1]) < 1e-9
    with pytest.raises(RuntimeError, match=r"did not converge.*times smaller"):
        jko(hill, 2.0, 1)
    with pytest.raises(RuntimeError, match="did not converge"):
        jko(replace(hill, sigma=0.0, dim=2), 2.0, 1, n_particles=5, seed=0)
    with pytest.raises(ValueError, match=r"ends|narrows"):
        jko(Quadratic(k=-1.0, sigma=0.0), 5.0, 1, geometry="kl")


def test_a_kink_is_no_field() -> None:
    points = np.linspace(-3, 3, 61)[:, None]
    kink = Energy(lambda mu: 5 * (mu.mean() - 0.5).abs().sum((-2, -1)))
    mass = -0.5 * points[:, 0] ** 2 - math.log(np.exp(-0.5 * points[:, 0] ** 2).sum())
    with pytest.raises(RuntimeError, match="not smooth"):
        Reaction(kink, points, 0.0, np.zeros(61), 1.0, mass).minimised()
