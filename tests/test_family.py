"""One energy under every dynamics: members have their own equations, their parameters are found, runs are joined."""

import json
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pytest
import torch

import mfsde
from mfsde import EmpiricalMeasure, GradientFlowOf, KineticOf, LangevinOf, NoisySGDOf, compare, members
from mfsde.model import numeric_fields, on_device, parameters, replaced
from mfsde.scenarios import DoubleWell, GaussianLangevin, KineticDoubleWell, Kuramoto, MeanFieldOU, TwoLayerNetwork

WELL = DoubleWell(theta=0.7, sigma=0.6)
SETTINGS = {"n_particles": 40, "n_replicas": 3, "horizon": 0.5, "dt": 0.05, "seed": 2, "save_every": 5}


@dataclass(frozen=True)
class Line(mfsde.MeanFieldLangevin):
    """The risk of f(z) = ∫ θ·z m(dθ) on five points."""

    sigma: float = 0.3
    slope: float = 2.0

    @cached_property
    def energy(self):
        s = torch.linspace(-1, 1, 5)
        return mfsde.risk(lambda theta, z: (theta * z).sum(-1), "squared", s[:, None], self.slope * s)

    def confinement(self, x):
        return 0.5 * x.square().sum(-1)

    def initial(self):
        return mfsde.Gaussian([0.0], 1.0)


def cloud(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_members_share_the_energy_and_have_their_own_equations():
    x = cloud(2, 30, 1)
    mu = EmpiricalMeasure(x)
    force = WELL.drift(0.0, x, mu)  # its own, written by hand; U = 0
    found = members(WELL, gamma=4.0, alpha=0.5)
    assert list(found) == ["gradient_flow", "langevin", "kinetic", "birth_death"]
    torch.testing.assert_close(found["gradient_flow"].drift(0.0, x, mu), force)
    torch.testing.assert_close(found["langevin"].drift(0.0, x, mu), force)
    assert found["gradient_flow"].diffusion(0.0, x, mu) == 0.0
    assert found["langevin"].diffusion(0.0, x, mu) == 0.6
    v = cloud(2, 30, 1).flip(1)
    state = torch.cat([x, v], -1)
    drift = found["kinetic"].drift(0.0, state, EmpiricalMeasure(state))
    torch.testing.assert_close(drift, torch.cat([v, force - 4.0 * v], -1))
    assert found["kinetic"].temperature == pytest.approx(0.18)  # that of the Langevin dynamics, σ²/2
    rate = found["birth_death"].birth_death_rate(0.0, x, mu)
    v_of_x = 0.25 * x[..., 0] ** 4 - 0.5 * x[..., 0] ** 2 + 0.7 * 0.5 * (x - mu.mean())[..., 0].square()
    centred = v_of_x - v_of_x.mean(-1, keepdim=True)
    torch.testing.assert_close(rate - rate.mean(-1, keepdim=True), 0.5 * centred)
    assert not hasattr(found["gradient_flow"], "birth_death_rate")


def test_the_confinement_enters_with_the_temperature():
    x = cloud(1, 20, 1)
    mu, case = EmpiricalMeasure(x), Line()
    full = case.energy.intrinsic_derivative(mu, x)
    torch.testing.assert_close(LangevinOf(case, 0.3).drift(0.0, x, mu), -(full + 0.045 * x))
    torch.testing.assert_close(GradientFlowOf(case).drift(0.0, x, mu), -full)
    torch.testing.assert_close(NoisySGDOf(case, 0.3, 5, "without_replacement").drift(0.0, x, mu), -(full + 0.045 * x))


def test_the_log_density_variant_is_the_rate_of_the_free_energy_and_says_so():
    """For m = N(0, s) the smoothed log density is that of N(0, s + h²): V = F' + T U + T log m_h, exact as N → ∞."""
    case = LangevinOf(Line(), 0.8, alpha=1.0, bandwidth=0.3)
    x = torch.linspace(-3, 3, 4001, dtype=torch.float64)[None, :, None]
    mass = torch.exp(-0.5 * x[0, :, 0] ** 2)
    mu = EmpiricalMeasure(x, (mass / mass.sum())[None])
    plain = LangevinOf(Line(), 0.8, alpha=1.0).birth_death_rate(0.0, x, mu)
    extra = case.birth_death_rate(0.0, x, mu) - plain
    middle = slice(1000, 3001)  # the cut at ±3 is felt near the ends
    expected = 0.32 * (-0.5 * x[0, :, 0] ** 2 / 1.09)
    off = (extra[0] - expected)[middle]
    assert float(off.max() - off.min()) < 1e-3
    run = mfsde.simulate(replace(case, bandwidth=0.5), **SETTINGS)
    assert "bandwidth 0.5" in run.attrs["selection"]
    with pytest.raises(ValueError, match=r"bandwidth = 0\.3 smooths the entropy"):
        mfsde.simulate(LangevinOf(Line(), 0.0, alpha=1.0, bandwidth=0.3), **SETTINGS)


def test_alpha_zero_changes_no_bit_and_a_negative_one_is_refused():
    still = mfsde.simulate(GradientFlowOf(WELL), **SETTINGS)
    zero = mfsde.simulate(GradientFlowOf(WELL, alpha=0.0), **SETTINGS)
    some = mfsde.simulate(GradientFlowOf(WELL, alpha=2.0), **SETTINGS)
    assert np.array_equal(still.position, zero.position)
    assert not np.array_equal(still.position, some.position)
    with pytest.raises(ValueError, match=r"alpha = -1\.0; expected a finite rate"):
        mfsde.simulate(GradientFlowOf(WELL, alpha=-1.0), **SETTINGS)


def test_comparison_is_one_dataset_of_the_runs_themselves(tmp_path):
    case = Line()
    table = compare(members(case, alpha=1.0, batch_size=2), **SETTINGS)
    assert table.position.dims == ("member", "time", "replica", "particle", "component")
    assert list(table.member.values) == ["gradient_flow", "langevin", "kinetic", "birth_death", "noisy_sgd"]
    assert json.loads(json.dumps(table.attrs["methods"]))["kinetic"] == "baoab"
    assert table.attrs["reactions"] == {"birth_death": "jumps"}
    assert "reaction" not in table.attrs
    alone = mfsde.simulate(LangevinOf(case, 0.3), **SETTINGS)
    assert np.array_equal(table.position.sel(member="langevin"), alone.position)
    kinetic = mfsde.simulate(KineticOf(case, 1.0, 0.3), method="baoab", **SETTINGS)
    assert np.array_equal(table.position.sel(member="kinetic"), kinetic.position.isel(component=[0]))
    assert np.array_equal(table.energy.sel(member="kinetic"), kinetic.energy)
    table.to_zarr(tmp_path / "table.zarr", zarr_format=3, consolidated=False)  # and warns of nothing


def test_members_of_a_circle_keep_it_and_kinetic_ones_refuse_it():
    flow = LangevinOf(Kuramoto(), 1.0)
    run = mfsde.simulate(flow, **SETTINGS)
    assert float(run.position.min()) >= 0
    assert run.position.attrs["period"]
    with pytest.raises(ValueError, match="Kuramoto has a project"):
        KineticOf(Kuramoto(), 1.0, 1.0)


def test_parameters_of_the_inner_scenario_are_recorded_replaced_swept_and_moved():
    case = LangevinOf(WELL, 0.4)
    assert {k: parameters(case)[k] for k in ("sigma", "theta", "alpha")} == {"sigma": 0.4, "theta": 0.7, "alpha": None}
    assert numeric_fields(case)["sigma"] == 0.4  # its own before the inner one's
    changed = replaced(case, {"sigma": 0.1, "theta": 2.0})
    assert (changed.sigma, changed.of.theta, changed.of.sigma) == (0.1, 2.0, 0.6)
    table = mfsde.sweep(case, {"theta": [0.5, 1.0]}, lambda run: run[["energy"]], **SETTINGS)
    assert table.energy.sizes["theta"] == 2

    @dataclass(frozen=True)
    class Shifted(DoubleWell):
        centre: torch.Tensor | None = None

    shifted = Shifted(centre=torch.zeros(1, dtype=torch.float64))
    moved = on_device(LangevinOf(shifted, 0.4), torch.device("cpu"), torch.float32)
    assert moved.of.centre.dtype is torch.float32


def test_a_member_is_resumed_from_its_record(tmp_path):
    store = tmp_path / "run.zarr"
    run = mfsde.simulate(KineticOf(WELL, 1.0, 0.5), method="baoab", store=store, **SETTINGS)
    assert float(run.theta) == 0.7
    assert mfsde.resume(store).equals(run)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: members(MeanFieldOU()), TypeError, "MeanFieldOU has no energy"),
        (lambda: compare({}), ValueError, "compare: no scenario"),
        (lambda: compare({"a": WELL}, method="euler", **SETTINGS), TypeError, "method belongs to one run"),
        (lambda: compare(members(WELL, batch_size=2), **SETTINGS), TypeError, "energy has no risk"),
    ],
)
def test_what_makes_no_family_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_gaussian_member_is_the_gaussian_scenario():
    """GaussianLangevin's own drift is written by hand; the member derives it."""
    case = GaussianLangevin()
    x = cloud(2, 12, case.initial().dim)
    mu = EmpiricalMeasure(x)
    torch.testing.assert_close(LangevinOf(case, case.sigma).drift(0.0, x, mu), case.drift(0.0, x, mu))


@dataclass(frozen=True)
class Sparse(Line):
    """With λ|x|, of which the energy knows nothing."""

    weight: float = 5.0

    @property
    def regulariser(self):
        return mfsde.regularisers.L1(self.weight)


def test_noisy_members_take_the_regulariser_or_refuse_it():
    found = members(Sparse(sigma=1e-3), alpha=0.1)
    assert list(found) == ["gradient_flow", "langevin", "birth_death"]
    table = compare(found, **{**SETTINGS, "horizon": 2.0})
    assert set(table.attrs["methods"].values()) == {"proximal"}
    spread = table.position.isel(time=-1).std("particle").max()
    assert float(spread) < 0.01  # all are held at 0, the noisy ones up to their noise
    free = mfsde.simulate(LangevinOf(Line(sigma=1e-3), 1e-3), **{**SETTINGS, "horizon": 2.0})
    assert float(free.position.isel(time=-1).std("particle").max()) > 0.1
    for build in (lambda: KineticOf(Sparse(), 1.0, 1.0), lambda: NoisySGDOf(Sparse())):
        with pytest.raises(ValueError, match="has a regulariser"):
            build()


def test_members_leave_out_what_a_circle_cannot_have():
    assert "kinetic" not in members(Kuramoto())


def test_kinetic_scenarios_are_asked_for_their_overdamped_one():
    case = KineticDoubleWell()
    for build in (members, GradientFlowOf, LangevinOf, KineticOf):
        with pytest.raises(ValueError, match=r"KineticDoubleWell is kinetic.*overdamped\(\)"):
            build(case)
    assert "kinetic" in members(case.overdamped())


def test_the_kinetic_member_keeps_the_temperature_while_friction_is_swept():
    case = KineticOf(WELL)
    for gamma in (0.5, 4.0):
        changed = replaced(case, {"gamma": gamma})
        assert changed.temperature == pytest.approx(0.18)
        assert changed.sigma == pytest.approx(0.6 * gamma**0.5)
    with pytest.raises(ValueError, match=r"gamma = 0.*expected a friction > 0"):
        KineticOf(WELL, 0.0)


def test_a_network_is_compared_though_its_flow_has_no_free_energy():
    found = members(TwoLayerNetwork(), batch_size=16)
    assert "free_energy" not in found["gradient_flow"].observables()
    assert found["kinetic"].suggested()["method"] == "baoab"
    with pytest.raises(ValueError, match="batch_size = 5000 is larger than the data"):
        members(TwoLayerNetwork(), batch_size=5000)
