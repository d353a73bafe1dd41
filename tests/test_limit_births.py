"""Births and deaths on the deterministic side: against Gaussian moment equations, mirror flows and particles."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

import mfsde
from mfsde import Gaussian, Uniform, limit
from mfsde.analysis import wasserstein

TIMES = [0.0, 0.5, 1.0]


@dataclass(frozen=True)
class Quadratic:
    """V = kx²/2 moves and selects: m' = -km(1 + αv), v' = -2kv - αkv² + σ² for the Gaussian law N(m, v)."""

    k: float = 1.0
    alpha: float = 2.0
    sigma: float = 0.5

    def drift(self, t, x, mu):
        return -self.k * x

    def diffusion(self, t, x, mu):
        return self.sigma

    def birth_death_rate(self, t, x, mu):
        return 0.5 * self.alpha * self.k * x.square().sum(-1)

    def initial(self):
        return Gaussian([1.0], 1.0)

    def moments(self, times=TIMES):
        def slope(t, y):
            m, v = y
            return -self.k * m * (1 + self.alpha * v), -2 * self.k * v - self.alpha * self.k * v**2 + self.sigma**2

        return solve_ivp(slope, (0, times[-1]), (1.0, 1.0), t_eval=times, rtol=1e-11, atol=1e-13).y


@dataclass(frozen=True)
class Selected:
    """No motion: m_t ∝ e^{-t V} m_0 for V independent of m."""

    speed: float = 1.0

    def drift(self, t, x, mu):
        return torch.zeros_like(x)

    def diffusion(self, t, x, mu):
        return 0.0

    def birth_death_rate(self, t, x, mu):
        return self.speed * torch.cos(3 * x).squeeze(-1)

    def initial(self):
        return Gaussian([0.3], 0.5)


@dataclass(frozen=True)
class Renewed(Quadratic):
    """At rate ρ mass comes anew from N(2, 1/4)."""

    inflow: float = 0.7

    def birth_death_rate(self, t, x, mu):
        return torch.zeros_like(x[..., 0])

    def reinjection(self):
        return self.inflow, Gaussian([2.0], 0.25)


def gap(found, scenario):
    mean, variance = scenario.moments()
    return max(
        np.abs(found["mean"].values[:, 0] - mean).max(), np.abs(found.covariance.values[:, 0, 0] - variance).max()
    )


def test_the_density_with_births_and_deaths_has_the_gaussian_moments():
    found = limit.fokker_planck(Quadratic(), None, TIMES)
    assert gap(found, Quadratic()) < 1e-6
    for wrong in (replace(Quadratic(), alpha=-2.0), replace(Quadratic(), alpha=4.0), replace(Quadratic(), alpha=0.0)):
        assert gap(found, wrong) > 1e-2


def test_characteristics_with_masses_have_the_gaussian_moments():
    still = replace(Quadratic(), sigma=0.0)
    found = limit.characteristics(still, TIMES)
    assert gap(found, still) < 1e-8
    assert gap(found, replace(still, alpha=4.0)) > 1e-2
    assert np.allclose(found.weight.sum("particle"), 1.0, rtol=0, atol=1e-13)
    assert float(np.ptp(found.weight.isel(time=-1).values)) > 0
    # Without births and deaths masses stay as they are.
    plain = limit.characteristics(replace(still, alpha=0.0), TIMES)
    assert np.allclose(plain.weight.isel(time=0), plain.weight.isel(time=-1), rtol=1e-12)


def test_without_motion_the_law_is_reweighted_by_the_exponential_of_the_rate():
    times = [0.0, 0.4, 2.0]
    found = limit.characteristics(Selected(), times)
    x = found.position.values[0, 0, :, 0]
    for k, t in enumerate(times):
        weight = found.weight.values[0, 0] * np.exp(-t * np.cos(3 * x))
        assert np.abs(found.weight.values[k, 0] - weight / weight.sum()).max() < 1e-9
    late = found.weight.values[0, 0] * np.exp(2.0 * np.cos(3 * x))
    assert np.abs(found.weight.values[2, 0] - late / late.sum()).max() > 1e-3  # the other sign


def test_energy_falls_by_transport_and_selection():
    """dE/dt = -∫|∇V|² dm - α Var_m V, here E = ∫V dm (document 003, (34))."""
    still, times = replace(Quadratic(), sigma=0.0), np.linspace(0, 1, 201)
    found = limit.characteristics(still, times)
    x, w = found.position.values[:, 0, :, 0], found.weight.values[:, 0]
    v = 0.5 * x**2
    energy, mean = (w * v).sum(-1), (w * v).sum(-1, keepdims=True)
    loss = (w * x**2).sum(-1) + 2.0 * (w * (v - mean) ** 2).sum(-1)
    whole = np.trapezoid(loss, times)
    # The trapezoidal rule's own error, from every second time.
    rule = abs(whole - np.trapezoid(loss[::2], times[::2]))
    assert abs(energy[0] - energy[-1] - whole) < rule
    assert abs(energy[0] - energy[-1] - np.trapezoid((w * x**2).sum(-1), times)) > 100 * rule


def test_mass_that_comes_from_outside():
    """E X and E X² with inflow ρ: m' = -km + ρ(2 - m), P' = -2kP + σ² + ρ(17/4 - P)."""
    case = Renewed()
    found = limit.fokker_planck(case, None, TIMES)

    def moments(inflow):
        def slope(t, y):
            return -y[0] + inflow * (2 - y[0]), -2 * y[1] + case.sigma**2 + inflow * (4.25 - y[1])

        return solve_ivp(slope, (0, 1), (1.0, 2.0), t_eval=TIMES, rtol=1e-11, atol=1e-13).y

    second = found.covariance.values[:, 0, 0] + found["mean"].values[:, 0] ** 2
    for inflow, is_right in ((0.7, True), (1.4, False), (0.0, False)):
        mean, square = moments(inflow)
        off = max(np.abs(found["mean"].values[:, 0] - mean).max(), np.abs(second - square).max())
        assert (off < 1e-5) == is_right


def test_implicit_steps_with_births_and_deaths_are_of_first_order():
    gaps = [gap(limit.fokker_planck(Quadratic(), None, TIMES, dt=1 / n), Quadratic()) for n in (16, 32, 64, 128)]
    slopes = -np.diff(np.log2(gaps))
    # The slopes tend to 1; what is left halves with the step.
    assert abs(slopes[-1] - 1) < 2 * abs(slopes[-1] - slopes[-2])
    assert abs(slopes[-1] - 1) < 0.1


def test_particles_are_at_the_limit_within_their_floor():
    case = Quadratic()
    found = limit.fokker_planck(case, None, TIMES)
    run = mfsde.simulate(case, n_particles=1000, n_replicas=8, horizon=1.0, dt=1 / 256, seed=5, save_every=128)

    def excess(law):
        distance = wasserstein.to_law(run, law)
        squared = (distance**2).isel(time=-1)
        return float(squared.mean()), float(distance.floor.isel(time=-1) ** 2)

    measured, floor = excess(found)
    # Copies of one particle are dependent: the floor of independent ones is exceeded by their share, not more.
    assert measured < 4 * floor
    wrong, floor = excess(limit.fokker_planck(replace(case, alpha=0.0), None, TIMES))
    assert wrong > 10 * floor


@dataclass(frozen=True)
class Moving:
    def drift(self, t, x, mu):
        return -x

    def diffusion(self, t, x, mu):
        return 1.0

    def project_at(self, t, x):
        return x.clamp(0, 1 + t)

    def initial(self):
        return Uniform(0.0, 1.0)


@pytest.mark.parametrize(
    ("solve", "case", "message"),
    [
        (lambda case: limit.moments(case, TIMES), Quadratic(), "births and deaths, which are followed in time only"),
        (lambda case: limit.gibbs(case, None), Quadratic(), "births and deaths, which are followed in time only"),
        (lambda case: limit.characteristics(case, TIMES), replace(Renewed(), sigma=0.0), "reinjects particles"),
        (lambda case: limit.fokker_planck(case, None, TIMES), Moving(), "a domain that moves"),
    ],
)
def test_what_no_solver_can_take_is_refused(solve, case, message):
    with pytest.raises(ValueError, match=message):
        solve(case)


@dataclass(frozen=True)
class Drifting:
    """dX = V dt, dV = -V dt + dW/2; mass comes anew from around (5, 0)."""

    inflow: float = 0.5

    def drift(self, t, x, mu):
        return torch.cat([x[..., 1:], -x[..., 1:]], dim=-1)

    def diffusion(self, t, x, mu):
        return torch.tensor([0.0, 0.5], dtype=x.dtype)

    def birth_death_rate(self, t, x, mu):
        return torch.zeros_like(x[..., 0])

    def reinjection(self):
        return self.inflow, Gaussian([5.0, 0.0], 0.2)

    def initial(self):
        return Gaussian([0.0, 0.0], 0.2)


def test_mass_from_outside_is_on_the_grid_where_noise_is_degenerate():
    """m' = E V + ρ(5 - m), E V = 0."""
    found = limit.fokker_planck(Drifting(), None, [1.0], n_nodes=33)
    assert float(found.x[-1]) > 5 + 3 * np.sqrt(0.2)
    wanted = 5 * (1 - np.exp(-0.5))
    assert abs(float(found["mean"][0, 0]) - wanted) < 1.5 * float(found.mean_error[0, 0]) + 1e-6
    assert float(found["tail"].max()) < 1e-6
