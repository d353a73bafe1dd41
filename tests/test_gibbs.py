"""Stationary laws, their branches and critical values."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import numpy as np
import pytest
import torch
from scipy import integrate, optimize

import mfsde
from mfsde.limit import GridLaw, branch, critical, fokker_planck, gibbs, gibbs_all
from mfsde.limit.free_energy import first_order_residual
from mfsde.scenarios import (
    DoubleWell,
    GaussianLangevin,
    KineticDoubleWell,
    Kuramoto,
    MeanFieldOU,
    SparseSpikes,
    TwoPopulations,
)

TURN = 2 * math.pi


def well_density(mean, sigma=0.8, theta=1.0):
    """The Desai-Zwanzig Gibbs density of a given mean, by adaptive quadrature: (moment of order k) ↦ value."""

    def weight(x):
        return math.exp(-2 / sigma**2 * (x**4 / 4 - x**2 / 2 + theta * (x**2 / 2 - x * mean)))

    total = integrate.quad(weight, -8, 8, epsabs=0, epsrel=1e-13)[0]
    return lambda k: integrate.quad(lambda x: x**k * weight(x), -8, 8, epsabs=0, epsrel=1e-13)[0] / total


def well_mean(sigma=0.8):
    return optimize.brentq(lambda m: well_density(m, sigma)(1) - m, 0.3, 1.2, xtol=1e-15)


# Against quadrature and closed forms ----------------------------------------------------------------------------------


def test_below_the_transition_three_laws_are_found():
    laws = gibbs_all(DoubleWell())
    mean = well_mean()
    assert sorted(float(law.mean[0]) for law in laws) == pytest.approx([-mean, 0.0, mean], abs=1e-10)
    assert [law.free_energy for law in laws] == sorted(law.free_energy for law in laws)
    symmetric = laws[-1]
    assert float(symmetric.mean[0]) == pytest.approx(0, abs=1e-10)
    assert float(symmetric.cov[0, 0]) == pytest.approx(well_density(0.0)(2), abs=1e-10)
    # The feedback of one statistic, the mean: θ Var/T.
    assert symmetric.feedback == pytest.approx(2 / 0.64 * well_density(0.0)(2), abs=1e-8)
    assert [law.feedback < 1 for law in laws] == [True, True, False]
    assert all(law.residual < 1e-8 for law in laws)


def test_above_the_transition_one_is():
    laws = gibbs_all(DoubleWell(sigma=1.3))
    assert len(laws) == 1
    assert float(laws[0].mean[0]) == pytest.approx(0, abs=1e-10)
    assert laws[0].feedback < 1


def test_the_law_near_the_start_is_returned():
    assert float(gibbs(DoubleWell()).mean[0]) == pytest.approx(well_mean(), abs=1e-10)
    left = gibbs(DoubleWell(), start=mfsde.Gaussian([-0.9], [[0.2]]))
    assert float(left.mean[0]) == pytest.approx(-well_mean(), abs=1e-10)
    middle = gibbs(DoubleWell(), start=mfsde.Gaussian([0.0], [[0.2]]))
    assert float(middle.mean[0]) == pytest.approx(0, abs=1e-10)


def test_gaussian_langevin_dynamics_ends_in_its_closed_form():
    law = gibbs(GaussianLangevin())
    assert isinstance(law, GridLaw)
    assert float(law.mean[0]) == pytest.approx(0.13043478260869565, abs=1e-11)
    assert float(law.cov[0, 0]) == pytest.approx(0.25, abs=1e-11)
    assert law.free_energy == pytest.approx(0.13043478260869565, abs=1e-11)
    # log ∫ exp(-δF/δm/T - U), δF/δm = κ(m - a)(x - m): a Gaussian integral.
    slope = 0.3 * (law.mean[0] - 1) / 0.5
    wanted = float(slope * law.mean[0] + slope**2 * 0.25 / 2)
    assert law.log_z == pytest.approx(wanted, abs=1e-11)
    # F sees the law through its mean alone.
    assert law.n_statistics == 1


def test_an_equation_without_an_energy_ends_in_its_stationary_solution():
    law = gibbs(MeanFieldOU())
    assert float(law.mean[0]) == pytest.approx(0, abs=1e-10)
    assert float(law.cov[0, 0]) == pytest.approx(0.49 / 3, abs=1e-10)
    assert law.free_energy is None
    assert law.residual < 1e-9
    assert law.feedback == pytest.approx(1 / 3, abs=1e-9)


@dataclass(frozen=True)
class Stirred:
    """A rotation besides the pull: stationary law N(0, σ²/2κ I), with a current."""

    spin: float = 2.0

    def drift(self, t, x, mu):
        turned = torch.stack([-x[..., 1], x[..., 0]], -1)
        return -x + self.spin * turned + 0.3 * (mu.mean() - x)

    def diffusion(self, t, x, mu):
        return 0.8

    def initial(self):
        return mfsde.Gaussian([0.3, 0.0], 0.3)


def test_a_stationary_law_with_a_current_on_the_plane():
    nodes = np.linspace(-2.6, 2.6, 31)
    law = gibbs(Stirred(), (nodes, nodes))
    assert torch.allclose(law.mean, torch.zeros(2, dtype=torch.float64), atol=1e-8)
    # Of fourth order, combined; without the combination the variance would be off by the estimate.
    assert torch.allclose(law.cov, 0.32 / 1.3 * torch.eye(2, dtype=torch.float64), atol=0.25 * law.error)
    assert law.error < 1e-2


@dataclass(frozen=True)
class Tilted:
    """dθ = (v - K sin θ) dt + σ dW: a current on the circle, known by quadrature."""

    v: float = 0.7
    k: float = 1.0
    sigma: float = 1.0
    period: ClassVar[float] = TURN

    def drift(self, t, x, mu):
        return self.v - self.k * torch.sin(x)

    def diffusion(self, t, x, mu):
        return self.sigma

    def project(self, x):
        return torch.remainder(x, TURN)

    def initial(self):
        return mfsde.Gaussian([3.0], [[0.2]])


def test_a_stationary_law_with_a_current_on_the_circle():
    law = gibbs(Tilted(), np.linspace(0, TURN, 401))

    def phi(x):
        return 2 * (0.7 * x + math.cos(x))

    def unnormalised(x):
        return math.exp(phi(x)) * integrate.quad(lambda y: math.exp(-phi(y)), x, x + TURN, epsrel=1e-12)[0]

    wanted = np.array([unnormalised(x) for x in law.nodes[0]])
    wanted /= wanted.sum() * law.grid.axes[0].widths[0]
    # Of fourth order, combined from two grids; the estimate is that of the finer one, of second order.
    assert np.abs(law.density - wanted).max() < 1e-8
    assert 1e-7 < law.error < 1e-4
    rough = gibbs(Tilted(), np.linspace(0, TURN, 51))
    assert 1e-8 < np.abs(rough.density - wanted[::8]).max() < 2e-5


def test_on_the_plane_components_of_a_separable_energy_keep_to_themselves():
    law = gibbs(DoubleWell(initial_mean=(0.5, -0.4)), n_nodes=41)
    mean = well_mean()
    assert law.mean.tolist() == pytest.approx([mean, -mean], abs=1e-8)
    assert float(law.cov[0, 1]) == pytest.approx(0, abs=1e-9)
    assert law.residual < 1e-8


@dataclass(frozen=True)
class Crowd(mfsde.MeanFieldLangevin):
    """A repulsion of Gaussian shape: the law acts through the convolution, not through a few moments."""

    strength: float = 3.0
    sigma: float = 1.0

    @cached_property
    def energy(self):
        return self.strength * mfsde.interaction(lambda z: torch.exp(-2 * z.square()).sum(-1))

    def confinement(self, x):
        return x.square().sum(-1)

    def initial(self):
        return mfsde.Gaussian([0.4], [[0.4]])


def test_an_interaction_of_many_shapes_is_solved_too():
    law = gibbs(Crowd(), n_nodes=121)
    assert law.residual < 1e-8
    assert law.n_statistics is None or law.n_statistics > 10
    assert float(law.mean[0]) == pytest.approx(0, abs=1e-8)
    # The law of the equation in time tends to it.
    late = fokker_planck(Crowd(), law.nodes[0], [12.0])
    assert np.abs(late.density.values[0] - law.density).max() < 2e-5
    assert float(late.free_energy[0]) == pytest.approx(law.free_energy, abs=1e-6)


def test_proposition_4_holds_at_the_stationary_law_and_not_beside_it():
    law = gibbs(DoubleWell())
    assert first_order_residual(DoubleWell(), law) < 1e-8
    x = law.nodes[0]
    for fault in (0.01 * x, 0.01 * x**2):
        perturbed = GridLaw.from_log(law.grid, law.log_density + fault)
        assert first_order_residual(DoubleWell(), perturbed) > 1e-4
    # exp(-(2/σ²)(δF/δm + U)), with U at the temperature's scale, is another law.
    wrong = replace(GaussianLangevin(), stiffness=4.0 * 2 / 1.0)
    assert first_order_residual(GaussianLangevin(), gibbs(wrong)) > 0.1


def test_the_fixed_point_is_the_end_of_the_flow():
    star = gibbs(DoubleWell())
    late = fokker_planck(DoubleWell(initial_variance=0.1), star.nodes[0], [30.0])
    assert np.abs(late.density.values[0] - star.density).max() < 1e-5
    assert float(late.residual[0]) < 1e-3


def test_a_user_grid_is_kept():
    nodes = np.linspace(-3, 3, 301)
    law = gibbs(DoubleWell(), nodes)
    assert np.array_equal(law.nodes[0], nodes)
    assert float(law.mean[0]) == pytest.approx(well_mean(), abs=1e-10)


def test_turned_copies_on_a_circle_count_once():
    laws = gibbs_all(Kuramoto(), n_nodes=129)
    assert len(laws) == 2
    assert [law.feedback for law in laws] == pytest.approx([1.0, 2.0], abs=1e-8)
    # r = I₁(2Kr/σ²)/I₀(2Kr/σ²), K = 2, σ = 1.
    from scipy.special import ive

    r = optimize.brentq(lambda r: ive(1, 4 * r) / ive(0, 4 * r) - r, 0.1, 1.0, xtol=1e-15)
    x, p = laws[0].nodes[0], laws[0].density * laws[0].grid.widths
    assert abs((p * np.exp(1j * x)).sum()) == pytest.approx(r, abs=1e-10)


# Along a parameter ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sigma_c():
    """σ²/(2θ) = Var of the symmetric law, by adaptive quadrature."""
    return optimize.brentq(lambda s: 2 / s**2 * well_density(0.0, s)(2) - 1, 0.7, 2.0, xtol=1e-14)


def test_the_critical_sigma_of_desai_and_zwanzig(sigma_c):
    found = critical(DoubleWell(), "sigma", 0.7, 2.0, start=mfsde.Gaussian([0.0], [[0.5]]))
    assert found == pytest.approx(sigma_c, abs=1e-8)
    assert sigma_c == pytest.approx(0.95597759, abs=1e-8)


def test_the_critical_coupling_of_kuramoto_is_sigma_squared():
    found = critical(Kuramoto(sigma=0.9), "coupling", 0.1, 3.0, start=mfsde.Uniform(0.0, TURN))
    assert found == pytest.approx(0.81, abs=1e-8)


def test_a_branch_through_the_pitchfork_turns_at_it(sigma_c):
    symmetric = branch(DoubleWell(), "sigma", 0.8, 1.2, start=mfsde.Gaussian([0.0], [[0.5]]), n_nodes=121)
    assert symmetric.critical.values == pytest.approx([sigma_c], abs=1e-8)
    assert np.abs(symmetric["mean"].values).max() < 1e-9
    assert symmetric.sigma.values[[0, -1]] == pytest.approx([0.8, 1.2])
    broken = branch(DoubleWell(), "sigma", 0.8, 1.2, start=mfsde.Gaussian([0.7], [[0.3]]), n_nodes=121)
    # Out along one well, through the symmetric law and back along the other.
    assert broken.critical.values == pytest.approx([sigma_c], abs=1e-8)
    assert broken["mean"].values[[0, -1], 0] == pytest.approx([well_mean(), -well_mean()], abs=1e-8)
    assert broken.feedback.values.max() < 1 + 1e-9


def test_a_long_step_does_not_jump_the_fork(sigma_c):
    # Over a wide interval the branch bends within a fraction of a step.
    found = branch(DoubleWell(), "sigma", 0.5, 1.6, start=mfsde.Gaussian([0.9], [[0.05]]), n_nodes=121)
    assert found.critical.values == pytest.approx([sigma_c], abs=1e-7)
    assert float(found["mean"][-1, 0]) == pytest.approx(-float(found["mean"][0, 0]), abs=1e-7)


@dataclass(frozen=True)
class Biased(DoubleWell):
    """Desai-Zwanzig in a field h: two folds below the transition."""

    field: float = 0.0
    sigma: float = 0.7
    initial_mean: tuple = (-0.8,)

    def drift(self, t, x, mu):
        return super().drift(t, x, mu) + self.field

    @cached_property
    def energy(self):
        return super().energy + mfsde.potential(lambda x: -self.field * x.sum(-1))


def test_folds_are_followed_round():
    found = branch(Biased(), "field", -0.1, 0.15, n_nodes=81)
    assert len(found.critical) == 2
    assert found.critical.values[0] == pytest.approx(-found.critical.values[1], abs=1e-8)

    # The field at which a law of mean m is stationary, and its largest value.
    def field_of(m):
        def mean(h):
            def weight(x):
                return math.exp(-2 / 0.49 * (x**4 / 4 - x**2 / 2 + x**2 / 2 - x * m - h * x))

            total = integrate.quad(weight, -8, 8, epsabs=0, epsrel=1e-13)[0]
            return integrate.quad(lambda x: x * weight(x), -8, 8, epsabs=0, epsrel=1e-13)[0] / total

        return optimize.brentq(lambda h: mean(h) - m, -1, 1, xtol=1e-15)

    top = optimize.minimize_scalar(
        lambda m: -field_of(m), bounds=(-0.6, -0.3), method="bounded", options={"xatol": 1e-9}
    )
    assert found.critical.values[0] == pytest.approx(-top.fun, abs=1e-8)
    assert (np.diff(found["mean"].values[:, 0]) > 0).all()
    # Outside the folds' mean values the law is stable, between them it is not.
    unstable = found.feedback.values > 1
    assert unstable.any()
    assert not unstable[[0, -1]].any()


# Bad input ------------------------------------------------------------------------------------------------------------


def test_what_has_no_stationary_law_is_told_so():
    with pytest.raises(ValueError, match="too weak"):
        gibbs(MeanFieldOU(kappa=-1.0))

    @dataclass(frozen=True)
    class Free(mfsde.MeanFieldLangevin):
        sigma: float = 1.0

        @property
        def energy(self):
            return mfsde.potential(lambda x: 0.1 * torch.sin(x).sum(-1))

        def confinement(self, x):
            return torch.zeros_like(x).sum(-1)

        def initial(self):
            return mfsde.Gaussian([0.0], [[1.0]])

    with pytest.raises(ValueError, match="too weak"):
        gibbs(Free())
    with pytest.raises(ValueError, match=r"at the ends of \[-3, 3\]"):
        gibbs(Free(), np.linspace(-3, 3, 101))


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: gibbs(MeanFieldOU(initial_mean=(0.0,) * 3)), ValueError, "d = 1 or 2"),
        (lambda: gibbs(DoubleWell(), start=0.5), TypeError, "expected a law"),
        (lambda: gibbs(DoubleWell(), np.linspace(-3, 3, 99), n_nodes=5), TypeError, "leave one out"),
        (lambda: critical(DoubleWell(), "sigma", 0.7, 0.8, start=mfsde.Gaussian([0.0], 1.0)), ValueError, "same side"),
        (lambda: critical(DoubleWell(), "noise", 0.7, 0.8), TypeError, "no numeric field 'noise'; expected one of"),
        (lambda: branch(DoubleWell(), "initial_mean", 0.7, 0.8), TypeError, "no numeric field"),
    ],
)
def test_bad_input_is_refused(call, kind, text):
    with pytest.raises(kind, match=text):
        call()


def test_common_noise_has_no_stationary_law():
    @dataclass(frozen=True)
    class Shared(MeanFieldOU):
        def common_diffusion(self, t, x, mu):
            return 0.3

    with pytest.raises(ValueError, match="random and has no fixed point"):
        gibbs(Shared())


def test_a_map_without_a_fixed_point_is_an_error_with_the_residual():
    @dataclass(frozen=True)
    class Contrary:
        """Every law is pushed to the other side of 0, and none stays."""

        def drift(self, t, x, mu):
            return -x - torch.where(mu.mean() >= 0, 1.0, -1.0).to(x)

        def diffusion(self, t, x, mu):
            return 0.5

        def initial(self):
            return mfsde.Gaussian([0.5], [[0.2]])

    with pytest.raises(RuntimeError, match=r"residual of [0-9.]+ .*does not contract"):
        gibbs(Contrary())


def test_a_fixed_point_that_is_not_reached_is_an_error_with_the_residual():
    with pytest.raises(RuntimeError, match=r"residual of \S+ \(asked for 1e-30\).*start="):
        gibbs(DoubleWell(), tolerance=1e-30)


# What a grid can hide -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heavy:
    """dX = -3X/(1 + X²) dt + dW: m* ∝ (1 + x²)^{-3}, of variance 1/3."""

    def drift(self, t, x, mu):
        return -3 * x / (1 + x.square())

    def diffusion(self, t, x, mu):
        return 1.0

    def initial(self):
        return mfsde.Gaussian([0.0], [[0.3]])


def test_a_chosen_grid_has_as_many_nodes_as_the_law_needs_and_a_coarse_one_is_refused():
    law = gibbs(Heavy())
    assert float(law.cov[0, 0]) == pytest.approx(1 / 3, abs=1e-4)
    assert len(law.nodes[0]) > 513
    assert law.error < 1e-6
    with pytest.raises(ValueError, match="nodes are too few"):
        gibbs(Heavy(), n_nodes=257)
    with pytest.raises(ValueError, match="nodes are too few"):
        gibbs(DoubleWell(), n_nodes=9)


@pytest.mark.parametrize("sigma", [0.05, 0.2])
def test_at_low_noise_all_three_laws_are_found_from_a_start_in_one_well(sigma):
    laws = gibbs_all(DoubleWell(sigma=sigma))
    means = sorted(float(law.mean[0]) for law in laws)
    assert means == pytest.approx([-means[2], 0.0, means[2]], abs=1e-9)
    assert means[2] > 0.9


def test_an_attraction_that_the_energy_does_not_know_is_not_ignored():
    @dataclass(frozen=True)
    class Leaning(DoubleWell):
        theta: float = 0.0
        sigma: float = 0.6
        initial_mean: tuple = (0.0,)

        def drift(self, t, x, mu):
            return super().drift(t, x, mu) + mu.mean()

    laws = gibbs_all(Leaning())
    assert len(laws) == 3
    assert all(law.free_energy is None for law in laws)


def test_a_planar_law_with_a_current_finds_its_own_grid():
    law = gibbs(Stirred(spin=0.3), n_nodes=29)
    # Combined from two grids; the estimate is that of the finer one before.
    assert torch.allclose(law.cov, 0.32 / 1.3 * torch.eye(2, dtype=torch.float64), atol=float(law.error) * 0.25)
    assert law.error < 1e-2


def test_on_an_interval_the_critical_value_is_extrapolated():
    @dataclass(frozen=True)
    class Walled(DoubleWell):
        def project(self, x):
            return x.clamp(-1.5, 1.5)

    def variance(s):
        def weight(x):
            return math.exp(-(x**4) / (2 * s**2))

        total = integrate.quad(weight, -1.5, 1.5, epsabs=0, epsrel=1e-13)[0]
        return integrate.quad(lambda x: x**2 * weight(x), -1.5, 1.5, epsabs=0, epsrel=1e-13)[0] / total

    wanted = optimize.brentq(lambda s: 2 / s**2 * variance(s) - 1, 0.7, 2.0, xtol=1e-14)
    found = critical(Walled(), "sigma", 0.8, 1.2, start=mfsde.Gaussian([0.0], [[0.04]]), n_nodes=257)
    assert found == pytest.approx(wanted, abs=1e-8)


def test_a_diffusion_that_depends_on_the_law_is_scanned_where_it_exists():
    @dataclass(frozen=True)
    class Livelier:
        """σ² = ½ + c (E X)²: the law N(0, ¼) stays; scanned values of (E X)² may be negative."""

        def drift(self, t, x, mu):
            return -x

        def diffusion(self, t, x, mu):
            return (0.5 + 0.1 * mu.mean().square()).sqrt()

        def initial(self):
            return mfsde.Gaussian([0.5], [[0.25]])

    (law,) = gibbs_all(Livelier())
    assert float(law.cov[0, 0]) == pytest.approx(0.25, abs=1e-8)


def test_impossible_numbers_are_refused():
    for arguments, text in (
        ({"n_nodes": 2}, "n_nodes"),
        ({"tolerance": -1.0}, "tolerance"),
        ({"n_nodes": 2.5}, "n_nodes"),
    ):
        with pytest.raises(ValueError, match=text):
            gibbs(DoubleWell(), **arguments)
    with pytest.raises(ValueError, match="start lives in dimension 2"):
        gibbs(DoubleWell(), start=mfsde.Gaussian([0.0, 0.0], 1.0))
    with pytest.raises(ValueError, match="low = high"):
        branch(DoubleWell(), "sigma", 0.8, 0.8)


def test_a_component_without_noise_has_no_stationary_density():
    with pytest.raises(ValueError, match="TwoPopulations has no noise on component 1 of the state"):
        gibbs(TwoPopulations())
    with pytest.raises(ValueError, match="SparseSpikes has no noise: stationary laws need not"):
        gibbs_all(SparseSpikes())
    with pytest.raises(ValueError, match=r"is kinetic: .*overdamped"):
        gibbs(KineticDoubleWell())
