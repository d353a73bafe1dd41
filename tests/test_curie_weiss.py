"""Continuous spins in their own mean field: drift, critical coupling, self-consistent magnetisation."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import integrate, optimize
from torch import Tensor

import mfsde
from mfsde import EmpiricalMeasure
from mfsde.scenarios import DoubleWell
from mfsde.scenarios.curie_weiss import CurieWeiss

FLOAT64 = torch.float64
CASE = CurieWeiss(coupling=1.6, quadratic=-0.4, field=0.2, sigma=0.9)
MAGNET = CurieWeiss(coupling=2.0)


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def spin_average(case: CurieWeiss, magnetisation: float, power: int) -> float:
    """<x^power> under exp(-2(V - J M x)/σ²), by quadrature of the formula."""

    def weight(x: float) -> float:
        v = x**4 / 4 + case.quadratic * x**2 / 2 - case.field * x
        return math.exp(-2 * (v - case.coupling * magnetisation * x) / case.sigma**2)

    total = integrate.quad(weight, -8, 8, epsabs=0, epsrel=1e-12, limit=400)[0]
    return integrate.quad(lambda x: x**power * weight(x), -8, 8, epsabs=1e-14, epsrel=1e-12, limit=400)[0] / total


def critical_by_quadrature(case: CurieWeiss) -> float:
    return case.sigma**2 / (2 * spin_average(replace(case, coupling=0.0), 0.0, 2))


# Equation -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_drift_is_its_formula(dtype, weighted):
    x = normals(2, 6, 2).to(dtype)
    mu = EmpiricalMeasure(x, torch.softmax(normals(2, 6, seed=1), -1).to(dtype) if weighted else None)
    y, w = x.double().numpy(), mu.weights.double().numpy()
    mean = (w[..., None] * y).sum(1, keepdims=True)
    wanted = -(y**3) + 0.4 * y + 0.2 + 1.6 * mean
    found = CASE.drift(0.0, x, mu)
    assert found.dtype == dtype
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-13 if dtype == FLOAT64 else 1e-5)


@pytest.mark.parametrize("d", [1, 3])
def test_the_drift_is_minus_the_intrinsic_derivative_of_the_energy(d):
    x, w = normals(2, 5, d), torch.softmax(normals(2, 5, seed=1), -1)
    for mu in (EmpiricalMeasure(x), EmpiricalMeasure(x, w)):
        drift = CASE.drift(0.0, x, mu)
        torch.testing.assert_close(drift, -CASE.energy.intrinsic_derivative(mu, x), rtol=0, atol=1e-12)
        for wrong in ({"coupling": -1.6}, {"quadratic": 0.4}, {"field": 0.0}):
            other = replace(CASE, **wrong).energy
            assert not torch.allclose(drift, -other.intrinsic_derivative(mu, x), atol=1e-2)


def test_a_shifted_well_makes_it_the_double_well():
    x = normals(2, 6, 1)
    mu = EmpiricalMeasure(x)
    spins = CurieWeiss(coupling=0.7, quadratic=0.7 - 1).drift(0.0, x, mu)
    torch.testing.assert_close(spins, DoubleWell(theta=0.7).drift(0.0, x, mu), rtol=0, atol=1e-14)


def test_without_field_the_equation_is_odd():
    x = normals(2, 6, 1)
    up, down = (MAGNET.drift(0.0, y, EmpiricalMeasure(y)) for y in (x, -x))
    assert torch.equal(up, -down)
    tilted = [replace(MAGNET, field=0.1).drift(0.0, y, EmpiricalMeasure(y)) for y in (x, -x)]
    assert not torch.allclose(tilted[0], -tilted[1])


# Stationary laws ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_the_critical_coupling_of_quartic_spins(sigma):
    case = CurieWeiss(sigma=sigma)
    assert case.critical_coupling() == pytest.approx(critical_by_quadrature(case), rel=1e-10)
    # It is the variance of the free spin that enters, and twice.
    assert case.critical_coupling() != pytest.approx(
        sigma**2 / spin_average(replace(case, coupling=0.0), 0.0, 2), rel=0.1
    )


def test_the_critical_coupling_has_a_formula_for_quartic_spins_alone():
    for fields in ({"quadratic": -0.5}, {"field": 0.1}):
        with pytest.raises(ValueError, match="has a formula for quadratic = field = 0"):
            CurieWeiss(**fields).critical_coupling()


@pytest.mark.parametrize("quadratic", [-0.5, 0.0, 0.5])
def test_the_limit_turns_unstable_where_the_variance_of_a_free_spin_says(quadratic):
    case = CurieWeiss(quadratic=quadratic)
    wanted = critical_by_quadrature(case)
    found = mfsde.limit.critical(case, "coupling", 0.5 * wanted, 1.5 * wanted, start=mfsde.Gaussian([0.0], 0.5))
    assert found == pytest.approx(wanted, rel=1e-7)
    # 2 Var = σ² and not Var = σ².
    assert found != pytest.approx(2 * wanted, rel=1e-2)


def test_magnetised_laws_appear_above_the_critical_coupling():
    critical = MAGNET.critical_coupling()
    below = mfsde.limit.gibbs_all(replace(MAGNET, coupling=0.95 * critical))
    assert [float(law.mean[0]) for law in below] == pytest.approx([0.0], abs=1e-8)
    above = mfsde.limit.gibbs_all(MAGNET)
    means = sorted(float(law.mean[0]) for law in above)
    root = optimize.brentq(lambda m: spin_average(MAGNET, m, 1) - m, 0.3, 3, xtol=1e-13)
    assert means == pytest.approx([-root, 0.0, root], abs=1e-8)
    # The magnetised ones have the least free energy.
    assert float(above[-1].mean[0]) == pytest.approx(0.0, abs=1e-8)
    other = optimize.brentq(lambda m: spin_average(replace(MAGNET, coupling=2.05), m, 1) - m, 0.3, 3)
    assert abs(other - root) > 1e-2


def test_the_gibbs_density_is_that_of_the_limit():
    law = mfsde.limit.gibbs(CASE)
    x = torch.linspace(-1.5, 1.5, 7, dtype=FLOAT64)[:, None]
    for sign, holds in ((1, True), (-1, False)):
        difference = law.log_prob(x) - CASE.log_gibbs(x, sign * float(law.mean[0]))
        assert bool((difference - difference[0]).abs().max() < 1e-6) == holds
    assert spin_average(CASE, float(law.mean[0]), 1) == pytest.approx(float(law.mean[0]), abs=1e-8)


# Particles ------------------------------------------------------------------------------------------------------------


def test_particles_magnetise_as_their_limit():
    settings = {"n_particles": 4000, "n_replicas": 16, "horizon": 8.0, "save_every": None, "keep_particles": 0}
    coarse = mfsde.simulate(MAGNET, dt=0.05, noise=mfsde.Noise(1, substeps=2), seed=1, **settings)
    fine = mfsde.simulate(MAGNET, dt=0.025, seed=1, **settings)
    # Euler's bias of order dt cancels; that of order 1/N is a tenth of a standard error. At t = 8 the law is at rest.
    found = 2 * fine.magnetisation.values[-1, :, 0].astype(float) - coarse.magnetisation.values[-1, :, 0]
    error = found.std(ddof=1) / math.sqrt(len(found))

    def score(case: CurieWeiss) -> float:
        root = optimize.brentq(lambda m: spin_average(case, m, 1) - m, 0.3, 3)
        return abs(found.mean() - root) / error

    assert score(MAGNET) < 4
    for wrong in ({"coupling": 2.05}, {"sigma": 1.1}, {"quadratic": 0.05}):
        assert score(replace(MAGNET, **wrong)) > 4


def test_the_magnetisation_on_its_way_is_that_of_the_fokker_planck_equation():
    times = np.array([0.0, 0.5, 1.0, 2.0])
    run = mfsde.simulate(
        MAGNET, n_particles=2000, n_replicas=32, horizon=2.0, dt=0.005, save_every=100, seed=2, keep_particles=0
    )
    limit = mfsde.limit.fokker_planck(MAGNET, None, times, n_nodes=129)
    values = run.magnetisation.sel(time=times).values[..., 0].astype(float)
    error = values.std(axis=1, ddof=1) / math.sqrt(values.shape[1])
    gap = np.abs(values.mean(1) - limit["mean"].values[:, 0])
    # Euler's bias: |m''| h/2 < 0.005.
    assert (gap < 4 * error + 0.005).all()
    other = mfsde.limit.fokker_planck(replace(MAGNET, coupling=2.3), None, times, n_nodes=129)
    assert (np.abs(values.mean(1) - other["mean"].values[:, 0]) > 4 * error + 0.005)[1:].all()
