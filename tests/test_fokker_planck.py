"""The Fokker-Planck equation: closed forms, exact properties of the scheme, orders, bad input."""

import json
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mfsde
from mfsde.limit import finite_volume, fokker_planck
from mfsde.limit.coefficients import Coefficients, initial_law
from mfsde.limit.domain import domain_of
from mfsde.limit.finite_volume import FiniteVolumes, bernoulli
from mfsde.limit.grid import Grid
from mfsde.limit.integrators import Stepping
from mfsde.limit.level import Level, support
from mfsde.scenarios import DoubleWell, GaussianLangevin, KineticDoubleWell, MeanFieldOU, TwoPopulations

TURN = 2 * math.pi
STEPPING = Stepping("bdf", 1e-8, 1e-12, None)
TIMES = np.array([0.0, 0.3, 1.0, 2.0])


def solved(scenario, nodes, times=TIMES, stepping=STEPPING):
    """The solution on one grid, neither refined nor combined."""
    start = initial_law(scenario)
    domain = domain_of(scenario, start)
    return Level.solved(scenario, start, domain, Grid.of(nodes, start.dim, domain.period), np.asarray(times), stepping)


def exact(law, x):
    return law.log_prob(torch.tensor(np.asarray(x))[:, None]).exp().numpy()


# Closed forms ---------------------------------------------------------------------------------------------------------

OU = MeanFieldOU(kappa=0.7, coupling=1.3, sigma=0.9, initial_mean=(1.5,), initial_variance=0.4)


def errors(limit, law):
    """Largest errors of density, mean and variance over all times."""
    density = max(
        np.abs(limit.density.values[k] - exact(law(t), limit.x)).max() for k, t in enumerate(limit.time.values)
    )
    mean = max(abs(float(limit["mean"][k, 0]) - float(law(t).mean[0])) for k, t in enumerate(limit.time.values))
    variance = max(
        abs(float(limit.covariance[k, 0, 0]) - float(law(t).cov[0, 0])) for k, t in enumerate(limit.time.values)
    )
    return density, mean, variance


@pytest.mark.parametrize("grid", [None, np.linspace(-5.0, 7.0, 601)])
def test_the_mean_field_ou_process_has_its_gaussian_law(grid):
    limit = fokker_planck(OU, grid, TIMES)
    density, mean, variance = errors(limit, OU.limit)
    assert density < 1e-6
    assert mean < 1e-6
    assert variance < 1e-6
    assert np.abs(np.trapezoid(limit.density, limit.x) - 1).max() < 1e-12
    # The values of the linear-quadratic flow at t = 1: mean, variance.
    assert float(limit["mean"][2, 0]) == pytest.approx(0.7448779556871143, abs=1e-6)
    assert float(limit.covariance[2, 0, 0]) == pytest.approx(0.206117338680525, abs=1e-6)


@pytest.mark.parametrize("fault", [{"coupling": -1.3}, {"sigma": 0.9001}, {"kappa": 0.7001}])
def test_the_same_comparison_notices_a_wrong_equation(fault):
    assert max(errors(fokker_planck(replace(OU, **fault), None, TIMES), OU.limit)) > 1e-5


def test_the_error_estimate_holds_the_error():
    limit = fokker_planck(OU, np.linspace(-5, 7, 161), TIMES, extrapolate=False)
    for k, t in enumerate(TIMES[1:], 1):
        gap = np.abs(limit.density.values[k] - exact(OU.limit(t), limit.x))
        # The estimate is the error up to the next order in h²: h = 0.075 against a width of 0.45.
        assert gap.max() < 1.1 * limit.error.values[k].max() + 1e-8
        assert gap.max() > 0.8 * limit.error.values[k].max()
        assert abs(float(limit.covariance[k, 0, 0]) - float(OU.limit(t).cov[0, 0])) == pytest.approx(
            float(limit.covariance_error[k, 0, 0]), rel=0.1, abs=1e-8
        )


LANGEVIN = GaussianLangevin()


def langevin_value(t):
    """V = κ/2 (m - a)² + T KL(N(m, v) | N(0, 1/k)) and its dissipation."""
    s, law = LANGEVIN, LANGEVIN.limit(t)
    m, v, k, half = float(law.mean[0]), float(law.cov[0, 0]), s.stiffness, s.sigma**2 / 2
    kl = 0.5 * (k * v - 1 - math.log(k * v) + k * m**2)
    value = 0.5 * s.kappa * (m - s.target[0]) ** 2 + half * kl
    return value, (s.kappa * (m - s.target[0]) + half * k * m) ** 2 + half**2 * (k - 1 / v) ** 2 * v


@pytest.fixture(scope="module")
def langevin():
    return fokker_planck(LANGEVIN, None, [0.1, 0.25, 0.5, 1.0, 2.0])


def test_gaussian_langevin_dynamics_has_its_law_free_energy_and_dissipation(langevin):
    assert max(errors(langevin, LANGEVIN.limit)) < 1e-6
    for k, t in enumerate(langevin.time.values):
        value, dissipation = langevin_value(t)
        assert float(langevin.free_energy[k]) == pytest.approx(value, abs=1e-6)
        assert float(langevin.dissipation[k]) == pytest.approx(dissipation, abs=1e-6 * max(1, dissipation))
    # The printed values of the closed forms at t = 0.25 and 1.
    assert float(langevin.free_energy[1]) == pytest.approx(1.4168313657651945, abs=1e-6)
    assert float(langevin.dissipation[3]) == pytest.approx(0.18618787184491759, abs=1e-6)


def test_the_free_energy_falls_by_the_dissipation():
    # Theorem 3: V(m_t) - V(m_s) = -∫ dissipation, by Simpson's rule on times fine enough for 1e-8.
    times = np.linspace(0.25, 0.75, 41)
    limit = fokker_planck(LANGEVIN, None, times)
    weights = np.ones(41)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    spent = float(weights @ limit.dissipation.values) * (times[1] - times[0]) / 3
    assert float(limit.free_energy[0] - limit.free_energy[-1]) == pytest.approx(spent, abs=1e-6)
    # With T in place of 2T inside, as σ² read for σ²/2, it would not.
    assert abs(float(limit.free_energy[0] - limit.free_energy[-1]) - 2 * spent) > 0.1


@dataclass(frozen=True)
class Spread:
    """dX = -X dt + √(a + b Var m) dW: Var' = -2 Var + a + b Var."""

    a: float = 0.3
    b: float = 0.8

    def drift(self, t, x, mu):
        return -x

    def diffusion(self, t, x, mu):
        return (self.a + self.b * mu.covariance()).sqrt()

    def initial(self):
        return mfsde.Gaussian([0.5], [[1.0]])


def test_a_law_dependent_diffusion_has_its_variance():
    limit = fokker_planck(Spread(), None, TIMES)
    rest = 0.3 / 1.2
    wanted = rest + (1 - rest) * np.exp(-1.2 * TIMES)
    assert np.abs(limit.covariance.values[:, 0, 0] - wanted).max() < 1e-6
    # σ read at the initial law would give another one.
    frozen = 0.55 + 0.45 * np.exp(-2 * TIMES)
    assert np.abs(limit.covariance.values[1:, 0, 0] - frozen[1:]).max() > 1e-2


@dataclass(frozen=True)
class Tailed:
    """dX = -X dt + s √(1 + X²) dW: E X² = r + (1 - r) e^{-(2 - s²)t}, r = s²/(2 - s²), from N(0, 1)."""

    s: float = 0.5

    def drift(self, t, x, mu):
        return -x

    def diffusion(self, t, x, mu):
        return self.s * (1 + x.square()).sqrt()

    def initial(self):
        return mfsde.Gaussian([0.0], [[1.0]])


def test_a_state_dependent_diffusion_is_read_in_the_sense_of_ito():
    # The tails are those of a Student law: the grid is wide.
    limit = fokker_planck(Tailed(), np.linspace(-25, 25, 1501), TIMES)
    rest, rate = 0.25 / 1.75, 1.75
    wanted = rest + (1 - rest) * np.exp(-rate * TIMES)
    assert np.abs(limit.covariance.values[:, 0, 0] - wanted).max() < 2e-6
    # Stratonovich's drift adds ½σσ' = s²x/2.
    other = 0.25 / 1.5 + (1 - 0.25 / 1.5) * np.exp(-1.5 * TIMES)
    assert np.abs(limit.covariance.values[1:, 0, 0] - other[1:]).max() > 1e-2


@dataclass(frozen=True)
class Driven:
    """dX = (sin t - X) dt + σ(t) dW, σ(t)² = 1 + cos t."""

    def drift(self, t, x, mu):
        return math.sin(t) - x

    def diffusion(self, t, x, mu):
        return math.sqrt(1 + math.cos(t))

    def initial(self):
        return mfsde.Gaussian([0.0], [[1.0]])


def test_coefficients_may_depend_on_time():
    limit = fokker_planck(Driven(), None, TIMES)
    t = TIMES
    mean = (np.exp(-t) + np.sin(t) - np.cos(t)) / 2
    variance = np.exp(-2 * t) + (1 - np.exp(-2 * t)) / 2 + (2 * np.cos(t) + np.sin(t) - 2 * np.exp(-2 * t)) / 5
    assert np.abs(limit["mean"].values[:, 0] - mean).max() < 1e-6
    assert np.abs(limit.covariance.values[:, 0, 0] - variance).max() < 1e-6


# Domains --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reflected:
    """dX = -g dt + σ dW on [0, 1], reflected."""

    pull: float = 0.0
    sigma: float = 0.5

    def drift(self, t, x, mu):
        return torch.full_like(x, -self.pull)

    def diffusion(self, t, x, mu):
        return self.sigma

    def project(self, x):
        return 1 - (1 - x.abs()).abs()

    def initial(self):
        return mfsde.Uniform(0.1, 0.4)


def test_an_interval_reflects():
    limit = fokker_planck(Reflected(), None, [0.5, 2.0], n_nodes=257)
    assert limit.x.values[0] == pytest.approx(0, abs=1e-12)
    assert limit.x.values[-1] == pytest.approx(1, abs=1e-12)
    # Neumann series of the heat equation from the uniform law on [0.1, 0.4].
    x, n = limit.x.values, np.arange(1, 60)[:, None]
    start = 2 * (np.sin(0.4 * n * np.pi) - np.sin(0.1 * n * np.pi)) / (n * np.pi * 0.3)
    for k, t in enumerate([0.5, 2.0]):
        wanted = 1 + (start * np.exp(-0.125 * (n * np.pi) ** 2 * t) * np.cos(n * np.pi * x)).sum(0)
        # Second order in the cells that the jumps of the initial density cut.
        assert np.abs(limit.density.values[k] - wanted).max() < 3e-5
    assert float(limit["tail"].max()) == 0


def test_on_an_interval_a_constant_pull_ends_in_an_exponential_law():
    limit = fokker_planck(Reflected(pull=1.0), np.linspace(0, 1, 101), [30.0])
    rate = 2 / 0.25
    wanted = rate * np.exp(-rate * limit.x.values) / (1 - math.exp(-rate))
    # The trapezoidal mass of the exact density is 1 + (8 · 0.01)²/12.
    assert np.abs(limit.density.values[0] / wanted - 1).max() < 6e-4
    ratio = limit.density.values[0] / wanted
    assert np.ptp(ratio) < 1e-8


def test_a_grid_beyond_a_wall_is_refused():
    with pytest.raises(ValueError, match=r"beyond the domain \[0, 1\]"):
        fokker_planck(Reflected(), np.linspace(-1, 2, 101), [1.0])


@dataclass(frozen=True)
class Turning:
    """dX = v dt + σ dW on the circle, from a narrow Gaussian."""

    v: float = 3.0
    sigma: float = 0.8
    period: ClassVar[float] = TURN

    def drift(self, t, x, mu):
        return torch.full_like(x, self.v)

    def diffusion(self, t, x, mu):
        return self.sigma

    def project(self, x):
        return torch.remainder(x, TURN)

    def initial(self):
        return mfsde.Gaussian([0.5], [[0.2]])


@pytest.mark.parametrize("closed", [True, False])
def test_a_circle_wraps(closed):
    nodes = np.linspace(0, TURN, 201)[: 201 if closed else 200]
    limit = fokker_planck(Turning(), nodes, [0.0, 0.7, 2.0])
    assert np.array_equal(limit.x.values, nodes)
    n = np.arange(1, 40)[:, None]
    for k, t in enumerate([0.0, 0.7, 2.0]):
        decay = np.exp(-0.5 * (0.2 + 0.64 * t) * n**2)
        wanted = (1 + 2 * (decay * np.cos(n * (nodes - 0.5 - 3.0 * t))).sum(0)) / TURN
        assert np.abs(limit.density.values[k] - wanted).max() < 1e-5
    if closed:
        assert np.abs(np.trapezoid(limit.density, limit.x) - 1).max() < 1e-12
        assert np.array_equal(limit.density[:, 0], limit.density[:, -1])


def test_the_chosen_grid_of_a_circle_goes_round_it():
    limit = fokker_planck(Turning(), None, [0.5], n_nodes=101)
    assert limit.x.values[[0, -1]] == pytest.approx([0.0, TURN])


@dataclass(frozen=True)
class Plane:
    """dX = -AX dt + S dW on the plane, SSᵀ full."""

    matrix: tuple = ((1.0, 0.4), (-0.2, 0.7))
    root: tuple = ((0.6, 0.0), (0.25, 0.5))

    def drift(self, t, x, mu):
        return -x @ x.new_tensor(self.matrix).T

    def diffusion(self, t, x, mu):
        return x.new_tensor(self.root)[None, None]

    def initial(self):
        return mfsde.Gaussian([0.8, -0.5], [[0.3, -0.1], [-0.1, 0.4]])


def test_a_full_diffusion_matrix_on_the_plane():
    from scipy.linalg import expm, solve_continuous_lyapunov

    t, a, s = 0.8, np.array(Plane().matrix), np.array(Plane().root)
    nodes = np.linspace(-4.0, 4.0, 81)
    limit = fokker_planck(Plane(), (nodes, nodes), [t], rtol=1e-6, atol=1e-11)
    rest, flow = solve_continuous_lyapunov(a, s @ s.T), expm(-a * t)
    start = np.array([[0.3, -0.1], [-0.1, 0.4]])
    wanted = rest + flow @ (start - rest) @ flow.T
    # Combined, the error is of the next order in h² beyond the estimate: h = 0.1 against widths of 0.5.
    assert np.abs(limit["mean"].values[0] - flow @ [0.8, -0.5]).max() < 0.04 * limit.mean_error.values.max()
    assert np.abs(limit.covariance.values[0] - wanted).max() < 0.04 * limit.covariance_error.values.max()
    assert limit.density.values.min() >= 0
    # Without the mixed derivative the covariance would be another one.
    blind = np.diag(np.diag(s @ s.T))
    other = solve_continuous_lyapunov(a, blind)
    assert np.abs(limit.covariance.values[0] - (other + flow @ (start - other) @ flow.T)).max() > 1e-2


def test_a_diffusion_too_oblique_for_the_cells_is_refused():
    oblique = replace(Plane(), root=((1.0, 0.0), (0.45, 0.1)))
    nodes = np.linspace(-4.0, 4.0, 41)
    with pytest.raises(ValueError, match="sides are in the ratio"):
        fokker_planck(oblique, (nodes, nodes), [0.1])
    # Cells in the ratio of the deviations hold it.
    fokker_planck(oblique, (2.17 * nodes, nodes), [0.05], rtol=1e-4)


def test_on_the_plane_independent_components_stay_independent():
    plane = DoubleWell(initial_mean=(0.5, -0.2))
    # Coarse, since what is compared is of the same order on both: products of the one-dimensional solutions.
    nodes = np.linspace(-3.3, 3.3, 31)
    limit = fokker_planck(plane, (nodes, nodes), [0.4], rtol=1e-6, atol=1e-11, energies=True)
    lines = [fokker_planck(DoubleWell(initial_mean=(m,)), nodes, [0.4]) for m in (0.5, -0.2)]
    product = np.multiply.outer(lines[0].density.values[0], lines[1].density.values[0])
    assert limit.density.dims == ("time", "x", "y")
    assert np.abs(limit.density.values[0] - product).max() < 5e-3 * product.max()
    # The dissipation needs the slope of the density, which these nodes know to some per cent.
    for name, accuracy in (("energy", 1e-2), ("free_energy", 1e-2), ("dissipation", 0.2)):
        assert float(limit[name][0]) == pytest.approx(sum(float(line[name][0]) for line in lines), rel=accuracy)


@dataclass(frozen=True)
class Torus:
    period: ClassVar[tuple] = (TURN, TURN)

    def drift(self, t, x, mu):
        return torch.ones_like(x)

    def diffusion(self, t, x, mu):
        return 0.7

    def project(self, x):
        return torch.remainder(x, TURN)

    def initial(self):
        return mfsde.Gaussian([1.0, 5.0], [[0.3, 0.0], [0.0, 0.4]])


def test_a_torus_of_two_components():
    limit = fokker_planck(Torus(), None, [1.0], n_nodes=61, rtol=1e-6, atol=1e-11)
    n = np.arange(1, 30)[:, None]

    def wrapped(x, mean, variance):
        return (1 + 2 * (np.exp(-0.5 * variance * n**2) * np.cos(n * (x - mean))).sum(0)) / TURN

    x, y = limit.x.values, limit.y.values
    wanted = np.multiply.outer(wrapped(x, 2.0, 0.79), wrapped(y, 6.0, 0.89))
    assert np.abs(limit.density.values[0] - wanted).max() < 1e-4


# Exact properties -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Random(mfsde.MeanFieldLangevin):
    """A rugged well with an even interaction of two scales."""

    waves: tuple = (0.5, 0.0, 0.0)
    attraction: float = 0.5
    repulsion: float = 0.5
    sigma: float = 0.8

    @property
    def energy(self):
        def well(x):
            ripples = sum(a * torch.sin((k + 1) * 1.7 * x + k) for k, a in enumerate(self.waves))
            return (0.1 * x**4 + ripples).sum(-1)

        def pairs(z):
            return (self.attraction * 0.5 * z.square() + self.repulsion * torch.exp(-2 * z.square())).sum(-1)

        return mfsde.potential(well) + mfsde.interaction(pairs)

    def confinement(self, x):
        return 0.5 * x.square().sum(-1)

    def initial(self):
        return mfsde.Gaussian([0.7], [[0.5]])


WAVES = st.tuples(*[st.floats(-2, 2)] * 3)


@settings(max_examples=3)
@given(WAVES, st.floats(-0.5, 2), st.floats(-2, 2), st.floats(0.3, 1.5))
def test_mass_sign_and_energy_for_random_potentials(waves, attraction, repulsion, sigma):
    scenario = Random(waves, attraction, repulsion, sigma)
    times = np.array([0.0, 0.02, 0.1, 0.3, 1.0])
    limit = fokker_planck(scenario, np.linspace(-5, 5, 49), times, extrapolate=False, rtol=1e-7)
    assert limit.density.values.min() >= 0
    assert np.abs(np.trapezoid(limit.density, limit.x) - 1).max() < 1e-12
    # Along the semi-discrete flow V falls but for the Gauss rule of the force, O(h⁵); steps add their tolerance.
    assert np.diff(limit.free_energy.values).max() < 1e-6 * max(1.0, float(np.abs(limit.free_energy).max()))


@settings(max_examples=15)
@given(WAVES, st.floats(0.05, 2), st.floats(1e-4, 1e4))
def test_the_generator_is_one_of_a_markov_chain_and_its_implicit_step_keeps_sign_and_mass(waves, sigma, dt):
    scenario = Random(waves, sigma=sigma)
    grid = Grid.of(np.sort(np.random.default_rng(0).uniform(-3, 3, 40)), 1)
    mass = np.random.default_rng(1).uniform(0, 1, 40) ** 8
    mass /= mass.sum()
    chain = FiniteVolumes(Coefficients(scenario, grid.points, mass), grid).generator(0.0, mass)
    assert chain.rate.min() >= 0
    matrix = chain.matrix().toarray()
    assert np.abs(matrix.sum(0)).max() < 1e-9 * np.abs(matrix).max()
    after = chain.implicit_step(mass, dt)
    assert after.min() >= 0
    # Rounding of the solve grows with the system's condition.
    condition = 1 + dt * chain.rate.max()
    assert after.sum() == pytest.approx(1, abs=1e-14 * condition)
    assert np.abs(after - dt * matrix @ after - mass).max() < 1e-14 * condition


def test_central_differences_in_place_of_the_exponential_fit_lose_the_sign(monkeypatch):
    monkeypatch.setattr(finite_volume, "bernoulli", lambda z: 1 - z / 2)
    grid = Grid.of(np.linspace(-3, 3, 20), 1)
    mass = np.full(20, 0.05)
    chain = FiniteVolumes(Coefficients(Random(sigma=0.2), grid.points, mass), grid).generator(0.0, mass)
    assert chain.rate.min() < 0


def test_a_discrete_equilibrium_is_the_gibbs_law_at_the_nodes():
    # Quartic wells have cubic forces, which the Gauss rule integrates exactly.
    nodes = np.linspace(-3, 3, 25)
    scenario = DoubleWell(theta=0.0, sigma=0.7)
    grid = Grid.of(nodes, 1)
    density = np.exp(-(nodes**4 / 4 - nodes**2 / 2) / (0.5 * 0.49))
    mass = density * grid.widths / grid.integral(density)
    chain = FiniteVolumes(Coefficients(scenario, grid.points, mass), grid).generator(0.0, mass)
    assert np.abs(chain.apply(mass)).max() < 1e-12 * chain.rate.max()


def test_bernoulli_is_accurate_everywhere():
    import mpmath

    for z in (-700.0, -30.0, -1.0, -1e-3, -1e-6, -1e-9, 0.0, 1e-9, 1e-6, 1e-3, 1.0, 30.0, 600.0):
        wanted = 1.0 if z == 0 else float(mpmath.mpf(z) / mpmath.expm1(mpmath.mpf(z)))
        assert bernoulli(np.array([z]))[0] == pytest.approx(wanted, rel=1e-11)


@dataclass(frozen=True)
class Counted:
    """An OU process that counts who asks for its drift."""

    calls: ClassVar[list] = []

    def drift(self, t, x, mu):
        self.calls.append((t, tuple(x.shape), mu.is_uniform))
        return -x + 0.5 * mu.mean()

    def diffusion(self, t, x, mu):
        return 0.7

    def initial(self):
        return mfsde.Gaussian([1.0], [[1.0]])


def test_particles_and_limit_call_the_same_drift():
    Counted.calls.clear()
    mfsde.simulate(Counted(), n_particles=50, horizon=0.1, dt=0.05, seed=0)
    particles = len(Counted.calls)
    assert particles >= 2
    assert all(uniform for _, _, uniform in Counted.calls)
    fokker_planck(Counted(), np.linspace(-5, 6, 51), [0.1])
    mine = Counted.calls[particles:]
    assert len(mine) > 10
    assert not any(uniform for _, _, uniform in mine)
    # At the two Gauss points of 50 faces, and of 100 after refinement, with a replica axis like a run's.
    assert {(1, 100, 1), (1, 200, 1)} <= {shape for _, shape, _ in mine}


def test_the_initial_law_may_be_a_point_or_a_weighted_cloud():
    @dataclass(frozen=True)
    class Started:
        start: object

        def drift(self, t, x, mu):
            return -x

        def diffusion(self, t, x, mu):
            return 0.6

        def initial(self):
            return self.start

    atoms = mfsde.EmpiricalMeasure(torch.tensor([[-1.03], [0.22], [1.51]]), torch.tensor([0.2, 0.5, 0.3]))
    for start, mean, square in (
        (mfsde.Dirac([0.613]), 0.613, 0.613**2),
        (atoms, 0.357, 0.2 * 1.0609 + 0.5 * 0.0484 + 0.3 * 2.2801),
    ):
        limit = fokker_planck(Started(start), None, [1.0], n_nodes=257)
        decay = math.exp(-2.0)
        assert float(limit["mean"][0, 0]) == pytest.approx(mean * math.exp(-1), abs=1e-6)
        wanted = square * decay + 0.18 * (1 - decay) - mean**2 * decay
        # Atoms shared by two nodes at distance h gain up to h²/4 of variance.
        assert float(limit.covariance[0, 0, 0]) == pytest.approx(wanted, abs=1e-4)


# Orders ---------------------------------------------------------------------------------------------------------------


def slope(values):
    return np.log2(np.abs(np.array(values[:-1]) / np.array(values[1:])))


def variance_error(n, extrapolate):
    limit = fokker_planck(OU, np.linspace(-5, 7, n), [0.5], extrapolate=extrapolate, rtol=1e-11, atol=1e-14)
    return float(limit.covariance[0, 0, 0]) - float(OU.limit(0.5).cov[0, 0])


def test_space_is_of_second_order_and_combined_of_fourth():
    # Successive slopes end at the order; the first ones still carry the next power of h².
    assert slope([variance_error(n, False) for n in (41, 81, 161)])[-1] == pytest.approx(2, abs=0.03)
    assert slope([variance_error(n, True) for n in (41, 81, 161)])[-1] == pytest.approx(4, abs=0.15)


def test_implicit_euler_is_of_first_order_and_positive_for_a_long_step():
    reference = solved(OU, np.linspace(-5, 7, 121), [0.8]).moments()["mean"][1][0, 0]

    def gap(dt):
        found = solved(OU, np.linspace(-5, 7, 121), [0.8], Stepping("euler", 1, 1, dt))
        assert found.mass.min() >= 0
        assert found.mass.sum() == pytest.approx(1, abs=1e-13)
        return found.moments()["mean"][1][0, 0] - reference

    found = [gap(dt) for dt in (0.8, 0.1, 0.05, 0.025, 0.0125)]
    assert slope(found[1:])[-1] == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("method", ["radau", "bdf"])
def test_adaptive_methods_agree(method):
    limit = fokker_planck(DoubleWell(), np.linspace(-4, 5, 201), [1.0, 5.0], method=method)
    # From both methods at rtol 1e-11 on 801 nodes and their refinement.
    assert limit["mean"].values[:, 0] == pytest.approx([0.48122142, 0.59471172], abs=1e-6)


# Results --------------------------------------------------------------------------------------------------------------


def test_a_stored_limit_is_opened_like_a_run(tmp_path):
    limit = fokker_planck(DoubleWell(), np.linspace(-4, 4, 81), [0.0, 0.5], store=tmp_path / "limit.zarr")
    opened = mfsde.open_run(tmp_path / "limit.zarr")
    memory = fokker_planck(DoubleWell(), np.linspace(-4, 4, 81), [0.0, 0.5])
    for name in memory.variables:
        assert np.array_equal(opened[name].values, memory[name].values), name
    assert opened.attrs["status"] == "complete"
    assert opened.attrs["scenario"] == "DoubleWell"
    assert opened.attrs["method"] == "bdf"
    assert float(opened.sigma) == 0.8
    assert list(limit.data_vars) == list(memory.data_vars)
    with pytest.raises(FileExistsError, match="overwrite"):
        fokker_planck(DoubleWell(), np.linspace(-4, 4, 81), [0.5], store=tmp_path / "limit.zarr")
    fokker_planck(DoubleWell(), np.linspace(-4, 4, 81), [0.5], store=tmp_path / "limit.zarr", overwrite=True)


def test_energies_are_left_out_where_there_are_none_or_where_the_flow_is_no_gradient_flow():
    assert "energy" not in fokker_planck(OU, None, [0.1], n_nodes=65)

    @dataclass(frozen=True)
    class Turned(DoubleWell):
        def drift(self, t, x, mu):
            return super().drift(t, x, mu) + 0.1

    found = fokker_planck(Turned(), None, [0.1], n_nodes=65)
    assert "energy" in found
    assert "free_energy" not in found
    assert "free_energy" in fokker_planck(DoubleWell(), None, [0.1], n_nodes=65)


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        (dict(times=[1.0, 0.5]), ValueError, "increasing"),
        (dict(times=[-1.0]), ValueError, "from 0 on"),
        (dict(times="soon"), TypeError, "increasing numbers"),
        (dict(times=[]), ValueError, "at least one"),
        (dict(method="heun"), ValueError, "'radau', 'bdf' or 'euler'"),
        (dict(method="euler"), ValueError, "dt is the step of 'euler'"),
        (dict(method="bdf", dt=0.1), ValueError, "of it alone"),
        (dict(dt=0.3), ValueError, "whole number of steps"),
        (dict(rtol=0.0), ValueError, "rtol"),
        (dict(n_nodes=50), TypeError, "leave one out"),
        (dict(grid=np.linspace(-0.2, 0.2, 41)), ValueError, "initial law's mass"),
    ],
)
def test_bad_input_is_refused(arguments, kind, text):
    call = {"grid": np.linspace(-5, 7, 41), "times": [1.0], **arguments}
    grid, times = call.pop("grid"), call.pop("times")
    with pytest.raises(kind, match=text):
        fokker_planck(OU, grid, times, **call)


def test_mass_that_leaves_the_grid_is_noticed():
    loose = MeanFieldOU(kappa=-0.5, coupling=0.0, sigma=1.0, initial_mean=(0.0,))
    with pytest.raises(ValueError, match="mass leaves the grid"):
        fokker_planck(loose, np.linspace(-6, 6, 101), [3.0])
    # A grid chosen around it follows it.
    limit = fokker_planck(loose, None, [3.0])
    gap = float(limit.covariance[0, 0, 0]) - float(loose.limit(3.0).cov[0, 0])
    assert abs(gap) < float(limit.covariance_error[0, 0, 0]) < 1

    # ∂_t X = X³ carries mass to infinity in finite time, and no grid holds it.
    @dataclass(frozen=True)
    class Escaping:
        def drift(self, t, x, mu):
            return x**3

        def diffusion(self, t, x, mu):
            return 1.0

        def initial(self):
            return mfsde.Gaussian([1.0], [[0.1]])

    with pytest.raises((ValueError, RuntimeError), match=r"leaves every grid|could not be stepped"):
        fokker_planck(Escaping(), None, [3.0])


def test_dimensions_above_two_and_noiseless_equations_are_sent_elsewhere():
    with pytest.raises(ValueError, match=r"d = 1 or 2.*moments"):
        fokker_planck(MeanFieldOU(initial_mean=(0.0, 0.0, 0.0)), None, [1.0])
    with pytest.raises(ValueError, match="characteristics"):
        fokker_planck(replace(OU, sigma=0.0), None, [1.0])


def test_a_coefficient_that_is_not_finite_on_the_grid_is_named():
    @dataclass(frozen=True)
    class Singular:
        def drift(self, t, x, mu):
            return 1 / (x - 2.0).clamp(min=0.0).sqrt() - x

        def diffusion(self, t, x, mu):
            return 1.0

        def initial(self):
            return mfsde.Gaussian([5.0], [[0.1]])

    with pytest.raises(ValueError, match="not finite"):
        fokker_planck(Singular(), np.linspace(0, 10, 101), [0.1])


# What a grid can hide -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Geometric:
    """dX = (1 - X) dt + ½X dW, through the point 0 where σ vanishes: E X = 1 + (E X₀ - 1) e^{-t}."""

    def drift(self, t, x, mu):
        return 1 - x

    def diffusion(self, t, x, mu):
        return 0.5 * x

    def initial(self):
        return mfsde.Gaussian([-1.0], [[0.01]])


def test_a_node_where_sigma_vanishes_holds_nothing_back():
    limit = fokker_planck(Geometric(), np.linspace(-4, 6, 501), TIMES)
    wanted = 1 - 2 * np.exp(-TIMES)
    gap = np.abs(limit["mean"].values[:, 0] - wanted)
    # Next to 0 the cells are too large for the drift: of first order, and the estimate says so.
    assert '"order":1' in limit.attrs["settings"]
    assert (gap < 2 * limit.mean_error.values[:, 0] + 1e-12).all()
    assert gap.max() < 0.03


@dataclass(frozen=True)
class Strip:
    """Oblique Brownian motion on a circle times an interval: the uniform law stays."""

    period: ClassVar[tuple] = (1.0, None)

    def drift(self, t, x, mu):
        return torch.zeros_like(x)

    def diffusion(self, t, x, mu):
        return x.new_tensor(np.linalg.cholesky([[1.0, 0.5], [0.5, 1.0]]))[None, None]

    def project(self, x):
        return torch.stack([torch.remainder(x[..., 0], 1.0), 1 - (1 - x[..., 1].abs()).abs()], -1)

    def initial(self):
        return mfsde.Uniform([0.0, 0.0], [1.0, 1.0])


def test_an_oblique_diffusion_is_reflected_at_a_wall():
    limit = fokker_planck(Strip(), None, [1.0], n_nodes=15)
    assert limit.density.values[-1] == pytest.approx(np.ones((15, 15)), abs=1e-9)


@pytest.mark.parametrize("start", [mfsde.Gaussian([2.0], [[1e-7]]), mfsde.Uniform(1.93, 2.07), mfsde.Dirac(2.0)])
def test_the_mean_of_a_law_narrower_than_a_cell_is_kept(start):
    @dataclass(frozen=True)
    class Narrow(MeanFieldOU):
        def initial(self):
            return start

    limit = fokker_planck(Narrow(), np.linspace(-3.03, 5.0, 61), [0.0, 1.0])
    assert float(limit["mean"][0, 0]) == pytest.approx(2.0, abs=1e-6)
    assert float(limit["mean"][1, 0]) == pytest.approx(2 * math.exp(-1), abs=1e-4)


def test_an_atom_far_away_is_not_dropped():
    points = torch.cat(
        [torch.randn(999, 1, generator=torch.Generator().manual_seed(0)), torch.tensor([[50.0]])]
    ).double()

    @dataclass(frozen=True)
    class Cloud(MeanFieldOU):
        def initial(self):
            return mfsde.EmpiricalMeasure(points)

    limit = fokker_planck(Cloud(), None, [0.0])
    assert float(limit["mean"][0, 0]) == pytest.approx(float(points.mean()), abs=1e-9)


def test_an_energy_that_the_drift_descends_at_one_law_only_is_no_free_energy():
    @dataclass(frozen=True)
    class Leaning(DoubleWell):
        """The drift has an attraction that the energy has not: they agree where the mean is zero."""

        initial_mean: tuple = (0.0,)

        def drift(self, t, x, mu):
            return super().drift(t, x, mu) + mu.mean()

    assert "free_energy" not in fokker_planck(Leaning(), None, [0.1], n_nodes=65)

    @dataclass(frozen=True)
    class Ageing(DoubleWell):
        def drift(self, t, x, mu):
            return (1 + t) * super().drift(t, x, mu)

    assert "free_energy" not in fokker_planck(Ageing(), None, [0.1], n_nodes=65)


def test_the_mean_on_a_circle_does_not_depend_on_the_spacing():
    for n in (33, 65):
        limit = fokker_planck(replace(Turning(), v=0.0), np.linspace(0, TURN, n), [40.0])
        assert float(limit["mean"][0, 0]) == pytest.approx(math.pi, abs=1e-4)


def test_a_circle_may_begin_anywhere_and_a_law_go_round_it_many_times():
    @dataclass(frozen=True)
    class Centred(Turning):
        def project(self, x):
            return torch.remainder(x + math.pi, TURN) - math.pi

        def initial(self):
            return mfsde.Gaussian([25.0], [[30.0]])

    limit = fokker_planck(Centred(), None, [0.0], n_nodes=65)
    assert limit.x.values[0] == pytest.approx(-math.pi)
    assert np.ptp(limit.density.values) < 1e-6


def test_settings_of_a_common_noise_are_refused_without_one():
    with pytest.raises(TypeError, match="no common_diffusion"):
        fokker_planck(OU, None, [1.0], seed=1)


# Degenerate noise -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spring:
    """dX = V dt, dV = (-kX - V) dt + dW: Gaussian, with noise in V alone."""

    stiffness: float = 1.0

    def drift(self, t, x, mu):
        place, speed = x[..., :1], x[..., 1:]
        return torch.cat([speed, -self.stiffness * place - speed], dim=-1)

    def diffusion(self, t, x, mu):
        return torch.tensor([0.0, 1.0], dtype=x.dtype)

    def initial(self):
        return mfsde.Gaussian([1.0, 0.0], 0.3)


def test_where_a_component_moves_without_noise_the_estimate_of_first_order_holds_the_error():
    times = [0.5, 1.0]
    found = fokker_planck(Spring(), None, times, n_nodes=33)
    assert json.loads(found.attrs["settings"])["order"] == 1

    def off(name, stiffness):
        exact = mfsde.limit.moments(Spring(stiffness), times)
        return float(np.abs(found[name] - exact[name]).max() / found[f"{name}_error"].max())

    # The estimate is the leading term of the error; on coarse cells the next one is a part of it.
    assert off("mean", 1.0) < 1.5
    assert off("covariance", 1.0) < 1.5
    assert off("mean", 2.0) > 3
    assert found["tail"].max() < 1e-6


def test_cells_smear_no_box_where_noise_is_degenerate():
    well, times = KineticDoubleWell(), np.array([0.0, 2.0])
    start = initial_law(well)
    low, high = support(well, start, domain_of(well, start), times)
    # From five deviations, x = 4, a particle falls by V = 56 and more and comes to speeds of 11.
    assert (high - low < 25).all()
    deviation = start.cov.diagonal().sqrt().numpy()
    assert (low < start.mean.numpy() - 5 * deviation).all()
    assert (high > start.mean.numpy() + 5 * deviation).all()


@dataclass(frozen=True)
class Bursting(Spring):
    def drift(self, t, x, mu):
        return torch.cat([x[..., :1] ** 3, -x[..., 1:]], dim=-1)


def test_a_box_that_no_particles_stay_in_is_an_error():
    with pytest.raises(ValueError, match=r"leaves every grid .* does not confine .* cells smear mass"):
        fokker_planck(Bursting(), None, [2.0])


@dataclass(frozen=True)
class Skew(Spring):
    """Noise in both components, and a start on two lines."""

    def diffusion(self, t, x, mu):
        return 1.0

    def initial(self):
        return mfsde.Mixture([mfsde.Gaussian([0.0, a], [[1.0, 0.0], [0.0, 0.0]]) for a in (0.0, 1.0)], [0.5, 0.5])


def test_a_law_without_a_density_is_refused_with_the_component_and_the_way_out():
    with pytest.raises(ValueError, match=r"component 1 .* neither noise nor.* Simulate; scenario.limit\(t\)"):
        fokker_planck(TwoPopulations(), None, [0.5])
    with pytest.raises(ValueError, match=r"Skew: the initial law is singular .* small variance"):
        fokker_planck(Skew(), None, [0.5])
