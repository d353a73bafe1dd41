"""The theorems against closed forms, each with a twin that must fail."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import xarray as xr
from scipy import stats
from torch import Tensor

import mfsde
from mfsde import EmpiricalMeasure, Energy, Gaussian, Mixture, Uniform
from mfsde.analysis import contraction, theory, wasserstein
from mfsde.analysis.check import identity, inequality
from mfsde.analysis.contraction import theorem_5
from mfsde.analysis.gibbs import Gibbs, curvature, proximal
from mfsde.analysis.rates import Rate
from mfsde.scenarios import DoubleWell


@dataclass(frozen=True)
class Linear(mfsde.MeanFieldLangevin):
    """F = ½κ(mean - a)², U = ½k x² + log √(2π/k): Gaussian, solved in closed form."""

    kappa: float = 0.3
    a: float = 1.0
    k: float = 4.0
    sigma: float = 1.0
    m0: float = 2.0
    v0: float = 0.5

    @property
    def energy(self) -> Energy:
        return Energy(lambda mu: 0.5 * self.kappa * (mu.mean()[..., 0, 0] - self.a).square())

    def confinement(self, x: Tensor) -> Tensor:
        return 0.5 * self.k * x.square().sum(-1) + 0.5 * math.log(2 * math.pi / self.k)

    def initial(self) -> Gaussian:
        return Gaussian([self.m0], [[self.v0]])

    @property
    def rate(self) -> float:
        return self.kappa + 0.5 * self.sigma**2 * self.k

    def limit(self, t: float) -> Gaussian:
        end = self.kappa * self.a / self.rate
        mean = end + (self.m0 - end) * math.exp(-self.rate * t)
        variance = 1 / self.k + (self.v0 - 1 / self.k) * math.exp(-(self.sigma**2) * self.k * t)
        return Gaussian([mean], [[variance]])

    @property
    def minimiser(self) -> Gaussian:
        return Gaussian([self.kappa * self.a / self.rate], [[1 / self.k]])


LINEAR = Linear()
# t: mean, var, V, dissipation, W₂, KL to m*, sandwich from below, gap, sandwich from above
FLOW = {
    0.1: (1.6158671698975375, 0.41758001150890983, 2.7072467648052396, 11.941442311571153, 1.4926101559855436,
          4.4916711512311, 2.24583557561555, 2.576811982196544, 2.957434849764687),
    0.25: (1.182448232986917, 0.3419698602928606, 1.4168313657651945, 5.95355188562014, 1.055424212747966,
           2.240773476379991, 1.1203867381899955, 1.286396583156499, 1.477307904867978),
    0.5: (0.7224078731869257, 0.2838338208091532, 0.5355335616211582, 1.8699183816491365, 0.5928789038758574,
          0.7050679160343026, 0.3525339580171513, 0.4050987790124625, 0.46554832315707034),
    1.0: (0.31787522956872005, 0.25457890972218356, 0.17088021968148653, 0.18618787184491759, 0.18749586057920317,
          0.07035069779860967, 0.035175348899304834, 0.040445437072790885, 0.04650603847229985),
    2.0: (0.14922734508779323, 0.2500838656569756, 0.13084093113765774, 0.0018683310374038936, 0.018792749580615494,
          0.0007063489365649439, 0.0003531744682824719, 0.0004061485289620914, 0.00046706869874365073),
}  # fmt: skip
# m, v, w: KL, Fisher, W₂, and the right sides of HWI, log-Sobolev and T₂ (root) for N(m, v) against N(0, w)
FUNCTIONALS = [
    (1.0, 1.0, 1.0, 0.5, 1.0, 1.0, 0.5, 0.5, 1.0),
    (0.5, 2.0, 1.0, 0.27842640972002736, 0.75, 0.6492864354457206, 0.3515121098017341, 0.375, 0.7462257161476377),
    (0.0, 0.5, 2.0, 0.3181471805599453, 1.125, 0.7071067811865476, 0.625, 1.125, 1.1280907420237882),
    (1.5, 0.3, 0.7, 1.7450775016221733, 5.680272108843538, 1.527574829921216, 1.9739432938664443, 1.9880952380952381,
     1.5630446258092066),
]  # fmt: skip
# t: printed, corrected bound of Theorem 5
THEOREM_5 = {
    0.1: (1.5095392073547333, 1.6352643014756902),
    0.25: (1.0852435627133352, 1.325519480773637),
    0.5: (0.6261310677241027, 0.9340777907913153),
    1.0: (0.20842092705035767, 0.46384930350491393),
    2.0: (0.02309369698598521, 0.11438382997074055),
}
CLOSE = {"rel": 1e-9, "abs": 1e-12}


def gaussian(m: float, v: float) -> Gaussian:
    return Gaussian([m], [[v]])


def double_well(x: Tensor) -> Tensor:
    return (0.25 * x**4 - 0.5 * x.square()).sum(-1)


# Verdicts -------------------------------------------------------------------------------------------------------------


def test_a_verdict_weighs_the_margin_against_its_errors():
    assert inequality("a", 1.0, 0.9, stderr=0.04).verdict == "holds"
    assert inequality("a", 1.0, 0.9, stderr=0.03).verdict == "violated"
    assert inequality("a", 1.0, 5.0, stderr=0.03).verdict == "holds"
    assert identity("a", 1.0, 5.0, stderr=0.03).verdict == "violated"
    assert identity("a", 1.0, 1.1, stderr=0.03, discretisation=0.02).verdict == "holds"
    assert identity("a", 1.0, 1.1, hypotheses=["", "F is not convex"]).verdict == "hypothesis fails"
    text = str(identity("a", 1.0, 1.1, stderr=0.03, discretisation=0.02))
    assert text == "a: holds, margin 0.1 ± 0.03 (s.e.), declared error 0.02 [1 against 1.1]"


def test_sides_of_replicas_are_paired():
    rng = np.random.default_rng(0)
    common = rng.normal(size=50)
    difference = 0.1 + 0.01 * rng.normal(size=50)
    check = inequality("a", xr.DataArray(common, dims="replica"), common + difference)
    assert check.stderr == pytest.approx(difference.std(ddof=1) / 50**0.5)
    assert check.margin == pytest.approx(difference.mean())
    with pytest.raises(ValueError, match=r"at least two independent replicas"):
        inequality("a", np.ones(1), np.ones(1))
    with pytest.raises(ValueError, match=r"a: a side is not finite"):
        inequality("a", math.nan, 1.0)
    with pytest.raises(ValueError, match=r"one value per replica. Select one time"):
        inequality("a", xr.DataArray(np.ones((2, 3)), dims=("time", "replica")), 1.0)


def test_an_error_that_is_no_number_lets_nothing_hold():
    for error in (math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match=r"the stderr is .*; expected a finite number, 0 or more"):
            inequality("a", 1.0, 0.5, stderr=error)
        with pytest.raises(ValueError, match=r"the declared error is .*; expected a finite number, 0 or more"):
            identity("a", 1.0, 0.5, discretisation=error)
    with pytest.raises(ValueError, match=r"stderr = 0.1 was given with one value per replica"):
        inequality("a", np.ones(4), np.arange(4.0), stderr=0.1)
    for function in (lambda k: theory.hwi(0.5, 1.0, 1.0, k), lambda k: theory.log_sobolev(0.5, 1.0, k)):
        with pytest.raises(ValueError, match=r"the constant is nan; expected a finite number"):
            function(math.nan)
    with pytest.raises(ValueError, match=r"the constant is inf; expected a finite number"):
        theory.talagrand(0.5, 1.0, math.inf)


def test_replicas_are_paired_by_label():
    a = xr.DataArray([1.0, 2.0, 3.0], dims="replica", coords={"replica": [0, 1, 2]})
    turned = a.isel(replica=[2, 1, 0])
    for other in (turned, a.assign_coords(replica=[0, 1, 3])):
        with pytest.raises(ValueError, match=r"they are paired replica by replica. Select the same ones"):
            identity("a", a, other)
        with pytest.raises(ValueError, match=r"they are paired replica by replica. Select the same ones"):
            theory.log_sobolev(a, other, 1.0)
    assert identity("a", a, a).stderr == 0.0
    with pytest.raises(ValueError, match=r"the sides have 2 and 3 replicas"):
        identity("a", np.ones(2), np.ones(3))


def test_a_check_with_nothing_to_violate_does_not_hold():
    vacuous = identity("a", 1.0, 1.1, discretisation=6e3)
    assert vacuous.verdict == "hypothesis fails"
    assert vacuous.reason.startswith("vacuous: 3 s.e. + declared error = 6e+03 against sides of at most 1.1")
    assert inequality("a", 1.0, 1.1, stderr=0.2).verdict == "hypothesis fails"
    # A margin beyond its errors is no less true for their size, and a violation no less false.
    assert inequality("a", 1.0, 100.0, stderr=30.0).verdict == "holds"
    assert inequality("a", 100.0, 1.0, stderr=30.0).verdict == "violated"
    assert identity("a", 1e-20, 0.0, discretisation=1e-12).verdict == "holds"
    five = mfsde.simulate(LINEAR, n_particles=5, horizon=1.0, dt=0.01, n_replicas=16, seed=1, save_every=5)
    assert "vacuous" in theory.free_energy_dissipation(LINEAR, five).reason


# The linear flow in closed form ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", FLOW)
def test_laws_have_the_free_energy_and_dissipation_of_the_closed_form(t):
    mean, var, v, rate, w2, kl, *_ = FLOW[t]
    law = LINEAR.limit(t)
    assert float(law.mean[0]) == pytest.approx(mean, **CLOSE)
    assert float(law.cov[0, 0]) == pytest.approx(var, **CLOSE)
    assert theory.free_energy(LINEAR, law) == pytest.approx(v, **CLOSE)
    assert theory.dissipation(LINEAR, law) == pytest.approx(rate, **CLOSE)
    assert theory.relative_entropy(law, LINEAR.minimiser) == pytest.approx(kl, **CLOSE)
    assert wasserstein.distance(law, LINEAR.minimiser) == pytest.approx(w2, **CLOSE)


def test_free_energy_dissipates_along_the_flow():
    check = theory.free_energy_dissipation(LINEAR, LINEAR.limit, start=0.1, stop=2.0)
    assert check.verdict == "holds"
    assert check.lhs == pytest.approx(FLOW[2.0][2] - FLOW[0.1][2], rel=1e-9)
    assert abs(check.margin) < 1e-9
    # Planted faults: the flow run backwards (the sign), and the flow of another coupling.
    backwards = theory.free_energy_dissipation(LINEAR, lambda t: LINEAR.limit(2.1 - t), start=0.1, stop=2.0)
    other = theory.free_energy_dissipation(replace(LINEAR, kappa=0.31), LINEAR.limit, start=0.1, stop=2.0)
    assert backwards.verdict == other.verdict == "violated"
    assert backwards.margin == pytest.approx(2 * check.rhs, rel=1e-6)
    with pytest.raises(ValueError, match=r"needs start < stop; got start = None"):
        theory.free_energy_dissipation(LINEAR, LINEAR.limit)


def test_the_minimiser_satisfies_the_first_order_condition():
    assert theory.first_order(LINEAR, LINEAR.minimiser).verdict == "holds"
    assert theory.dissipation(LINEAR, LINEAR.minimiser) == pytest.approx(0, abs=1e-20)
    # As printed: exp(-(2/σ²)(δF/δm + U)), whose fixed point has precision 2k/σ² and another mean.
    precision = 2 * LINEAR.k / LINEAR.sigma**2
    centre = 2 * LINEAR.kappa * LINEAR.a / (2 * LINEAR.kappa + LINEAR.sigma**2 * precision)
    printed = theory.first_order(LINEAR, gaussian(centre, 1 / precision))
    assert printed.verdict == "violated"
    assert printed.lhs > 0.03
    assert theory.first_order(LINEAR, LINEAR.limit(2.0)).verdict == "violated"


def test_the_first_order_condition_of_a_double_well():
    # The symmetric law has mean zero, so that its Gibbs density is explicit: T = σ²/2, no reference measure.
    well = DoubleWell(theta=1.0, sigma=1.2)
    star = Gibbs(lambda x: -(double_well(x) + 0.5 * x.square().sum(-1)) / 0.72)
    check = theory.first_order(well, star)
    assert check.verdict == "holds"
    assert theory.dissipation(well, star) < 1e-20
    assert proximal(well, star.as_measure()).log_prob(torch.zeros(1, 1)).item() == pytest.approx(
        star.log_prob(torch.zeros(1, 1)).item(), rel=1e-6
    )
    wrong = Gibbs(lambda x: -(double_well(x) + 0.5 * x.square().sum(-1)) / 1.44)
    assert theory.first_order(well, wrong).verdict == "violated"
    with pytest.raises(TypeError, match=r"Dirac has no density log_prob"):
        theory.first_order(well, mfsde.Dirac(0.0))


@pytest.mark.parametrize("t", FLOW)
def test_the_entropy_sandwich(t):
    *_, low, gap, up = FLOW[t]
    lower, upper = theory.entropy_sandwich(LINEAR, LINEAR.limit(t), LINEAR.minimiser)
    assert (lower.verdict, upper.verdict) == ("holds", "holds")
    for value, wanted in ((lower.lhs, low), (lower.rhs, gap), (upper.lhs, gap), (upper.rhs, up)):
        assert value == pytest.approx(wanted, rel=1e-9, abs=1e-11)


def test_the_sandwich_needs_a_convex_energy_and_the_true_minimiser():
    concave = replace(LINEAR, kappa=-0.3)
    lower, upper = theory.entropy_sandwich(concave, LINEAR.limit(0.5), concave.minimiser)
    assert lower.verdict == upper.verdict == "hypothesis fails"
    assert "F is not convex along mixtures" in lower.reason
    wrong = gaussian(1.0, 0.3)
    assert theory.entropy_sandwich(LINEAR, LINEAR.limit(1.0), wrong)[1].verdict == "holds"
    assert theory.entropy_sandwich(LINEAR, gaussian(0.2, 0.3), wrong)[0].verdict == "violated"


def test_the_desai_zwanzig_energy_is_not_convex_along_mixtures():
    # ½ ∬ θ|x - y|²/2 = θ Var/2 is concave there: no sandwich, and indeed several stationary laws at small σ.
    well = DoubleWell(theta=1.0, sigma=1.2)
    star = Gibbs(lambda x: -(double_well(x) + 0.5 * x.square().sum(-1)) / 0.72)
    lower, _ = theory.entropy_sandwich(well, gaussian(0.4, 0.5), star, log_z=lambda mu: 0.0)
    assert lower.verdict == "hypothesis fails"
    # Without attraction F is linear, and both halves are equalities: p_m = m*.
    free = DoubleWell(theta=0.0, sigma=1.2)
    star = Gibbs(lambda x: -double_well(x) / 0.72)
    for check in theory.entropy_sandwich(free, gaussian(0.4, 0.5), star):
        assert check.verdict == "holds"
        assert abs(check.margin) < 1e-8


def test_convexity_along_mixtures_is_not_convexity_along_translations():
    points = [EmpiricalMeasure(torch.tensor([[c], [c + 1.0]], dtype=torch.float64)) for c in (0.0, 0.7, 3.0)]
    square = Energy(lambda mu: mu.integrate(lambda x: x.square().sum(-1)) ** 2)
    variance = Energy(lambda mu: mu.covariance()[..., 0, 0])
    assert theory.convexity_gap(square, points) > 0
    # The variance is convex along translations and concave along mixtures.
    assert theory.convexity_gap(variance, points) < -0.1
    # Linear: equality.
    assert abs(theory.convexity_gap(mfsde.potential(double_well), points)) < 1e-12
    with pytest.raises(ValueError, match=r"needs two measures or more"):
        theory.convexity_gap(square, points[:1])


# Functional inequalities ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", FUNCTIONALS)
def test_gaussian_functionals(row):
    m, v, w, kl, fisher, w2, hwi, lsi, t2 = row
    law, reference = gaussian(m, v), gaussian(0.0, w)
    assert theory.relative_entropy(law, reference) == pytest.approx(kl, **CLOSE)
    assert theory.relative_fisher(law, reference) == pytest.approx(fisher, **CLOSE)
    checks = theory.functional_inequalities(law, reference, convexity=1 / w)
    assert [check.verdict for check in checks] == ["holds"] * 3
    assert [check.rhs for check in checks] == pytest.approx([hwi, lsi, t2], rel=1e-9)
    assert [check.lhs for check in checks] == pytest.approx([kl, kl, w2], rel=1e-9, abs=1e-12)
    # Above the true K the hypothesis is seen to fail on the curvature of the reference.
    too_convex = theory.functional_inequalities(law, reference, convexity=1.5 / w)
    assert {check.verdict for check in too_convex} == {"hypothesis fails"}
    assert "curvature falls to" in too_convex[0].reason


def test_hwi_is_an_equality_for_translations_and_for_no_other_constant():
    law, reference = gaussian(1.3, 0.4), gaussian(0.0, 0.4)
    kl, i, w2 = theory.relative_entropy(law, reference), theory.relative_fisher(law, reference), 1.3
    assert abs(theory.hwi(kl, i, w2, 2.5).margin) < 1e-12
    assert theory.hwi(kl, i, w2, 2.51).verdict == "violated"
    assert theory.hwi(kl, i, w2, 2.49).margin > 0
    assert theory.talagrand(kl, w2, 2.51).verdict == theory.log_sobolev(kl, i, 2.51).verdict == "violated"


def test_in_two_dimensions_and_above_the_quadrature_is_exact():
    for d in (2, 3):
        law = Gaussian([1.0] * d, 0.5)
        reference = Gaussian([0.0] * d, 2.0)
        kl = 0.5 * d * (0.25 - 1 - math.log(0.25) + 0.5)
        assert theory.relative_entropy(law, reference) == pytest.approx(kl, rel=1e-9)
        assert all(c.verdict == "holds" for c in theory.functional_inequalities(law, reference))
        assert curvature(reference, torch.randn(5, d, dtype=torch.float64)) == pytest.approx(0.5, rel=1e-12)


def test_a_reference_that_is_not_convex():
    law = gaussian(0.5, 1.0)
    reference = Mixture([gaussian(-2.0, 0.5), gaussian(2.0, 0.5)])
    hwi, lsi, t2 = theory.functional_inequalities(law, reference, w2=1.0)
    # HWI allows K < 0; the other two do not, and then there is no bound to show.
    assert hwi.verdict == "holds"
    assert lsi.verdict == t2.verdict == "hypothesis fails"
    assert math.isnan(lsi.margin)
    assert "needs a positive one" in lsi.reason
    with pytest.raises(ValueError, match=r"mass where the reference's density is zero"):
        theory.relative_entropy(law, Uniform(-1.0, 1.0))


def test_functional_inequalities_of_replicas_carry_the_jackknife():
    rng = np.random.default_rng(1)
    _, _, w, kl, fisher, w2, rhs, *_ = FUNCTIONALS[3]
    # The delta method for w2 (√I - K w2/2) - KL, with independent errors.
    spread = np.array([0.02, 0.05, 0.01])
    samples = np.array([kl, fisher, w2]) + spread * rng.normal(size=(200, 3))
    check = theory.hwi(*samples.T, 1 / w)
    slopes = np.array([-1.0, w2 / (2 * math.sqrt(fisher)), math.sqrt(fisher) - w2 / w])
    assert check.stderr == pytest.approx(np.linalg.norm(slopes * spread) / 200**0.5, rel=0.15)
    assert abs(check.margin - (rhs - kl)) < 4 * check.stderr
    with pytest.raises(ValueError, match=r"An estimate below zero is noise"):
        theory.log_sobolev(-0.1, 1.0, 1.0)


# Constants and rates --------------------------------------------------------------------------------------------------


def test_the_log_sobolev_constant_of_a_gaussian():
    law = proximal(LINEAR, LINEAR.limit(0.5).as_measure())
    # p_m is N(., 1/k) for every m: α = k, by each criterion.
    bounds = contraction.log_sobolev_constant(law, reference=lambda x: -LINEAR.confinement(x))
    assert bounds.bakry_emery == pytest.approx(LINEAR.k, rel=1e-6)
    assert bounds.spectral_gap == pytest.approx(LINEAR.k, rel=1e-4)
    assert bounds.muckenhoupt[0] < LINEAR.k < bounds.muckenhoupt[1]
    assert bounds.holley_stroock < LINEAR.k
    assert bounds.low == pytest.approx(bounds.high, rel=1e-4)
    assert "log-Sobolev constant in [4, 4]" in str(bounds)


def test_muckenhoupt_on_a_gaussian_is_the_criterion_itself():
    # Barthe, Roberto: C = 2/α, max b <= C <= 4 max B, with the Gaussian's A = 1 - Φ and 1/p = √(2π) e^{x²/2}.
    x = np.linspace(0, 10.5, 200_001)
    inverse = np.sqrt(2 * np.pi) * np.exp(0.5 * x**2)
    weight = np.concatenate([[0.0], np.cumsum(0.5 * (inverse[1:] + inverse[:-1]))]) * (x[1] - x[0])
    a = stats.norm.sf(x)
    small, large = (float((a * np.log1p(c / a) * weight).max()) for c in (0.5, math.e**2))
    low, high = contraction.muckenhoupt(Gibbs(lambda x: -0.5 * x.square().sum(-1)))
    assert (low, high) == (pytest.approx(2 / (4 * large), rel=1e-3), pytest.approx(2 / small, rel=1e-3))
    # Within a factor of four of the truth, α = 1; it was off by sixteen.
    assert 0.25 < low < 1 < high < 4


def test_a_barrier_does_not_make_a_law_convex():
    # exp(-V/T), V = x⁴/4 - x²/2: Eyring-Kramers, gap = √2/π·e^{-1/(4T)} (twice the rate over the barrier, over T).
    for t in (0.005, 0.002):
        bounds = contraction.log_sobolev_constant(Gibbs(lambda x, t=t: double_well(x) / -t))
        kramers = math.sqrt(2) / math.pi * math.exp(-0.25 / t) / t
        assert math.isnan(bounds.spectral_gap)
        assert bounds.bakry_emery == pytest.approx(-1 / t, rel=1e-3)
        assert 0 < bounds.low < kramers
        assert bounds.high < 10 * kramers
    shallow = contraction.log_sobolev_constant(Gibbs(lambda x: double_well(x) / -0.02))
    assert shallow.high == pytest.approx(math.sqrt(2) / math.pi * math.exp(-12.5) / 0.02, rel=0.1)
    assert shallow.low < shallow.high
    with pytest.raises(ValueError, match=r"behind a barrier of some 700 nats"):
        contraction.log_sobolev_constant(Gibbs(lambda x: double_well(x) / -2e-4))


@pytest.mark.parametrize("c", [1.0, 10.0, 40.0])
def test_exponential_tails_have_no_log_sobolev_constant(c):
    law = Gibbs(lambda x: -c * (1 + x.square().sum(-1)).sqrt())
    with pytest.raises(ValueError, match=r"still grows at .* The tails are heavier than Gaussian"):
        contraction.log_sobolev_constant(law)


def test_bounds_that_contradict_each_other_are_refused():
    law = Gibbs(lambda x: -0.5 * x.square().sum(-1), score=lambda x: -5 * x)
    with pytest.raises(ValueError, match=r"the bounds contradict each other, 5 > 0.99"):
        contraction.log_sobolev_constant(law)


@pytest.mark.parametrize("height", [0.5, 1.0, 2.0])
def test_the_log_sobolev_constant_of_a_double_well(height):
    law = Gibbs(lambda x: -height * (0.5 * x**4 - x.square()).sum(-1))
    bounds = contraction.log_sobolev_constant(law)
    assert bounds.bakry_emery == pytest.approx(-2 * height, rel=1e-3)
    assert 0 < bounds.low < bounds.high == bounds.spectral_gap
    # A law that refutes the inequality with an α above the upper bound: ν ∝ (1 + εf)² p, f close to the eigenfunction.
    x = law.as_measure().points
    f = torch.erf(1.2 * height**0.5 * x[:, 0])
    p = law.as_measure().weights
    nu = (1 + 0.05 * f).square() * p
    nu = nu / nu.sum()
    kl = float((nu * (nu / p).log())[p > 1e-300].sum())
    slope = 0.05 * 2 * 1.2 * height**0.5 / math.pi**0.5 * torch.exp(-((1.2 * height**0.5 * x[:, 0]) ** 2))
    fisher = float((nu * (2 * slope / (1 + 0.05 * f)).square()).sum())
    assert theory.log_sobolev(kl, fisher, bounds.low).verdict == "holds"
    assert theory.log_sobolev(kl, fisher, 1.3 * bounds.high).verdict == "violated"


def test_holley_stroock_on_a_bounded_perturbation():
    law = Gibbs(lambda x: -0.5 * x.square().sum(-1) - 0.3 * torch.sin(3 * x).sum(-1))
    bounds = contraction.log_sobolev_constant(law, reference=lambda x: -0.5 * x.square().sum(-1))
    assert bounds.bakry_emery < 0
    assert bounds.holley_stroock == pytest.approx(math.exp(-0.6), rel=1e-3)
    assert bounds.low == bounds.holley_stroock < bounds.spectral_gap
    with pytest.raises(ValueError, match=r"the reference has curvature"):
        contraction.holley_stroock(law, double_well, torch.linspace(-1, 1, 5))


def test_the_rate_that_the_constant_predicts():
    bounds = contraction.smallest_constant(LINEAR, [LINEAR.limit(t).as_measure() for t in (0.0, 1.0)])
    assert contraction.predicted_rate(bounds.low, LINEAR) == pytest.approx(4.0, rel=1e-6)

    def measured(value: float) -> Rate:
        return Rate(value, value - 0.2, value + 0.2, 0.1, (0.0, 1.0), 1.0, "exact")

    # The free energy of the linear flow decays at 2(κ + σ²k/2) = 4.6.
    assert contraction.decay_rate(measured(4.6), bounds.low, LINEAR).verdict == "holds"
    assert contraction.decay_rate(measured(3.6), bounds.low, LINEAR).verdict == "violated"
    flagged = replace(measured(4.6), flags=("no window",))
    assert contraction.decay_rate(flagged, bounds.low, LINEAR).verdict == "hypothesis fails"
    star = theory.free_energy(LINEAR, LINEAR.minimiser)
    gaps = [theory.free_energy(LINEAR, LINEAR.limit(t)) - star for t in (0.0, 0.5, 1.0, 2.0)]
    assert all(
        gap <= gaps[0] * math.exp(-4.0 * t) * (1 + 1e-9) for gap, t in zip(gaps, (0.0, 0.5, 1.0, 2.0), strict=True)
    )


@pytest.mark.parametrize("t", THEOREM_5)
def test_both_forms_of_theorem_5(t):
    bounds = theorem_5(0.3, 4.0, 1.0)
    start = wasserstein.distance(LINEAR.limit(0.0), LINEAR.minimiser)
    assert bounds.bound(t, start, "printed") == pytest.approx(THEOREM_5[t][0], rel=1e-9)
    assert bounds.bound(t, start) == pytest.approx(THEOREM_5[t][1], rel=1e-9)
    w2 = wasserstein.distance(LINEAR.limit(t), LINEAR.minimiser)
    for form in ("printed", "corrected"):
        assert contraction.contraction_check(bounds, t, w2, start, form=form).verdict == "holds"


def test_the_printed_theorem_5_is_false_where_its_condition_holds():
    # F = ½κ mean², from N(2, 1/k): a pure translation.
    weak = replace(LINEAR, kappa=0.01, a=0.0, v0=0.25)
    bounds = theorem_5(0.01, 4.0, 1.0, p=2.5)
    assert bounds.condition == pytest.approx(-1.22, abs=1e-12)
    assert bounds.proved == "corrected"
    start, w2 = (wasserstein.distance(weak.limit(t), weak.minimiser) for t in (0.0, 1.0))
    assert w2 == pytest.approx(0.26797734933760997, rel=1e-9)
    printed, corrected = (
        contraction.contraction_check(bounds, 1.0, w2, start, form=f) for f in ("printed", "corrected")
    )
    assert printed.rhs == pytest.approx(0.03889642949077078, rel=1e-9)
    assert corrected.rhs == pytest.approx(0.27613847462178565, rel=1e-9)
    assert (printed.verdict, corrected.verdict) == ("violated", "holds")
    # So it is from N(2, ½) with a = 1, where the variance relaxes too.
    other = replace(weak, a=1.0, v0=0.5)
    start, w2 = (wasserstein.distance(other.limit(t), other.minimiser) for t in (0.0, 1.0))
    assert contraction.contraction_check(bounds, 1.0, w2, start, form="printed").verdict == "violated"
    assert contraction.contraction_check(bounds, 1.0, w2, start).verdict == "holds"


def test_condition_4():
    # U = k|x|²/2: k > p - 1 + 6C_F/σ²; the standard Gaussian reference is excluded for every p > 2.
    for k, p, c_f, sigma in ((3.3, 2.5, 0.3, 1.0), (3.29, 2.5, 0.3, 1.0), (3.31, 2.5, 0.3, 1.0), (1.0, 2.01, 0.0, 1.0)):
        assert theorem_5(c_f, k, sigma, p=p).condition_holds == (k > p - 1 + 6 * c_f / sigma**2 + 1e-12)
    outside = theorem_5(0.3, 1.0, 1.0)
    check = contraction.contraction_check(outside, 1.0, 0.1, 1.0, form="printed")
    assert check.verdict == "hypothesis fails"
    assert "condition (4)" in check.reason
    with pytest.raises(ValueError, match=r"bounds a moment p > 2"):
        theorem_5(0.3, 4.0, 1.0, p=2.0)
    with pytest.raises(ValueError, match=r"has the forms printed, corrected"):
        outside.bound(1.0, 1.0, "exact")


def test_slopes_far_from_the_origin_keep_their_digits():
    # |x|² - 2x·y + |y|² would lose the differences: f = 3.3 (x - c) has slope 3.3 wherever its points lie.
    x = 1e5 + torch.randn(300, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for c in (0.0, 1e5):
        assert contraction._along_points(x, 3.3 * (x - c)) == pytest.approx(3.3, rel=1e-4)


def test_estimated_constants_stay_below_the_known_ones_and_reach_them():
    mu = LINEAR.initial().as_measure()
    for kappa, a in ((0.3, 1.0), (0.3, -2.5), (0.7, 0.2)):
        known = kappa * max(1.0, abs(a))
        found = contraction.lipschitz(replace(LINEAR, kappa=kappa, a=a), [mu])
        assert 0.98 * known < found <= known * (1 + 1e-9)

    @dataclass(frozen=True)
    class Saturating(Linear):
        @property
        def energy(self) -> Energy:
            return Energy(
                lambda mu: 0.5 * self.kappa * (mu.integrate(lambda x: torch.tanh(x[..., 0])) - self.a).square()
            )

    found = contraction.lipschitz(Saturating(a=0.5), [mu])
    assert 0.1 < found <= 0.3 * 1.5
    estimated = contraction.contraction_of(LINEAR, [mu])
    exact = theorem_5(0.3, 4.0, 1.0)
    assert estimated.corrected == pytest.approx(exact.corrected, abs=0.02)
    assert estimated.condition == pytest.approx(exact.condition, abs=0.02)


# The bias of N particles ----------------------------------------------------------------------------------------------


def samples(law: mfsde.Law, replicas: int, n: int, seed: int = 0) -> Tensor:
    return law.sample(replicas * n, torch.Generator().manual_seed(seed)).reshape(replicas, n, law.dim)


@pytest.mark.parametrize("n", [5, 50])
def test_the_bias_of_independent_points(n):
    law = gaussian(0.3, 0.8)
    feature = Energy(lambda mu: 0.5 * (mu.integrate(lambda x: torch.tanh(x).sum(-1)) - 0.7).square())
    mu = law.as_measure()
    values = torch.tanh(mu.points[:, 0])
    var = float((mu.weights * values.square()).sum() - (mu.weights * values).sum() ** 2)
    check = theory.iid_bias(feature, samples(law, 2000, n), law)
    assert check.verdict == "holds"
    assert check.rhs == pytest.approx(var / (2 * n), rel=1e-9)
    # Two per cent of it: a constant wrong by a quarter would not pass.
    assert check.stderr < 0.04 * check.rhs
    assert identity("wrong", check.lhs, 1.25 * check.rhs, stderr=check.stderr).verdict == "violated"
    assert theory.iid_bias(feature, samples(gaussian(0.3, 1.2), 2000, n), law).verdict == "violated"
    # |δF/δm| <= (1 + .7)·2 and |δ²F/δm²| <= 4 for every law.
    bound = theory.bias_bound(feature, samples(law, 2000, n), law, 7.4)
    assert bound.verdict == "holds"
    assert theory.bias_bound(feature, samples(law, 2000, n), law, 0.1).verdict == "hypothesis fails"


def test_bias_refuses_bad_samples():
    law = gaussian(0.0, 1.0)
    x = samples(law, 4, 10)
    with pytest.raises(ValueError, match=r"expected \(replica, particle, component\)"):
        theory.iid_bias(LINEAR.energy, x[0], law)
    with pytest.raises(ValueError, match=r"1 of 40 values are not finite"):
        theory.iid_bias(
            LINEAR.energy, x.clone().index_put((torch.tensor(0),) * 3, torch.tensor(math.nan).double()), law
        )
    with pytest.raises(ValueError, match=r"iid_bias needs 400 replicas or more; got 4"):
        theory.iid_bias(LINEAR.energy, x, law)
    with pytest.raises(ValueError, match=r"at least two independent replicas"):
        theory.bias_bound(LINEAR.energy, x[:1], law, 100.0)
    with pytest.raises(ValueError, match=r"samples have 1 components and the law is in dimension 2"):
        theory.bias_bound(LINEAR.energy, x, Gaussian([0.0, 0.0], 1.0), 1.0)
    plane = Gibbs(lambda x: -x.square().sum(-1), 2)
    for held in (theory.iid_bias, theory.bias_bound):
        with pytest.raises(ValueError, match=r"the law's quadrature has 148225 points"):
            held(
                LINEAR.energy,
                torch.randn(400, 5, 2, dtype=torch.float64),
                plane,
                **{"bound": 1.0} if held is theory.bias_bound else {},
            )


# Runs -----------------------------------------------------------------------------------------------------------------

SETTINGS = {"n_particles": 400, "horizon": 1.0, "dt": 0.01, "n_replicas": 16, "seed": 3, "save_every": 5}


@pytest.fixture(scope="module")
def run() -> xr.Dataset:
    return mfsde.simulate(LINEAR, **SETTINGS)


def test_free_energy_along_a_run(run):
    v = theory.free_energy(LINEAR, run)
    assert v.dims == ("time", "replica")
    assert v.attrs == {"long_name": "free energy V", "units": "1", "estimator": "Gaussian plug-in density"}
    mean, error = v.mean("replica"), v.std("replica", ddof=1) / 4
    for t in (0.1, 0.5, 1.0):
        # Euler's bias here is at most dt·|dV/dt|, and E F(m^N) exceeds F by Var/(2N).
        slack = 4 * float(error.sel(time=t)) + 0.01 * FLOW[t][3] + 1 / 400
        assert abs(float(mean.sel(time=t)) - FLOW[t][2]) < slack
        assert abs(float(mean.sel(time=t)) - 1.3 * FLOW[t][2]) > slack
    dissipated = theory.dissipation(LINEAR, run)
    exact = theory.dissipation(LINEAR, run, law=LINEAR.limit)
    assert exact.attrs["estimator"] == "density from the given law"
    for t in (0.1, 0.5):
        for rate in (dissipated, exact):
            at = rate.sel(time=t)
            # Euler lags by a step at most: dt |dD/dt| <= dt·9.2 D.
            slack = 4 * float(at.std("replica", ddof=1)) / 4 + 0.092 * FLOW[t][3]
            assert abs(float(at.mean()) - FLOW[t][3]) < slack < 0.2 * FLOW[t][3]


def test_free_energy_dissipates_along_a_run(run):
    for law in (None, LINEAR.limit):
        check = theory.free_energy_dissipation(LINEAR, run, law=law)
        assert check.verdict == "holds"
        assert check.lhs < -2
        # The declared error and three standard errors are a tenth of the effect: there is something to violate.
        assert 3 * check.stderr + check.discretisation < 0.1 * abs(check.lhs)
        wrong = identity(check.name, check.lhs, -check.rhs, stderr=check.stderr, discretisation=check.discretisation)
        assert wrong.verdict == "violated"
    # Planted: another temperature, another coupling.
    for fault in (replace(LINEAR, sigma=1.2), replace(LINEAR, kappa=1.0)):
        assert theory.free_energy_dissipation(fault, run).verdict == "violated"
    part = theory.free_energy_dissipation(LINEAR, run, start=0.2, stop=0.8)
    assert part.verdict == "holds"
    assert part.lhs > check.lhs


def test_dask_and_memory_agree(run):
    chunked = run.chunk(time=4, particle=100)
    for function in (theory.free_energy, theory.dissipation):
        lazy = function(LINEAR, chunked, law=LINEAR.limit)
        assert lazy.chunks is not None
        xr.testing.assert_identical(lazy.compute(), function(LINEAR, run, law=LINEAR.limit))
    for lazy, eager in zip(*(theory.stationarity(LINEAR, r, start=0.5) for r in (chunked, run)), strict=True):
        assert (lazy.margin, lazy.verdict) == (pytest.approx(eager.margin, rel=1e-12), eager.verdict)


def test_particles_that_are_not_gaussian_need_their_law():
    well = DoubleWell(sigma=0.6, initial_variance=1.0)
    run = mfsde.simulate(well, **{**SETTINGS, "n_particles": 100})
    check = theory.free_energy_dissipation(well, run)
    assert check.verdict == "hypothesis fails"
    assert "pass law=" in check.reason


def test_stationarity_of_a_long_run_and_of_no_other():
    well = DoubleWell(theta=0.5, sigma=1.0, initial_mean=(0.0,))
    settings = {"n_particles": 100, "horizon": 12.0, "dt": 0.02, "n_replicas": 32, "seed": 5, "save_every": 10}
    long = mfsde.simulate(well, **settings)
    checks = theory.stationarity(well, long, start=4.0)
    assert [check.verdict for check in checks] == ["holds"] * 3
    assert "f = ½|x|²" in checks[1].name
    # Euler's term is exact for f = ½|x|²: E[b·x + dT] = -(dt/2) E|b|².
    assert abs(-checks[1].margin + checks[1].discretisation) < 4 * checks[1].stderr
    for fault in (replace(well, sigma=1.1), replace(well, theta=1.0)):
        assert "violated" in [check.verdict for check in theory.stationarity(fault, long, start=4.0)]
    moving = theory.stationarity(well, mfsde.simulate(well, **{**settings, "horizon": 0.4}), start=0.0)
    assert "violated" in [check.verdict for check in moving]


def test_the_sandwich_of_particles(run):
    lower, upper = theory.entropy_sandwich(LINEAR, run.sel(time=0.5), LINEAR.minimiser)
    assert (lower.verdict, upper.verdict) == ("holds", "holds")
    low, gap, up = FLOW[0.5][-3:]
    assert lower.margin == pytest.approx(gap - low, abs=4 * lower.stderr + lower.discretisation + 0.01)
    assert upper.margin == pytest.approx(up - gap, abs=4 * upper.stderr + upper.discretisation + 0.01)
    concave = replace(LINEAR, kappa=-0.3)
    assert theory.entropy_sandwich(concave, run.sel(time=0.5), concave.minimiser)[0].verdict == "hypothesis fails"
    assert theory.entropy_sandwich(LINEAR, run.sel(time=1.0), gaussian(1.5, 0.25))[0].verdict == "violated"
    with pytest.raises(ValueError, match=r"expected particles at one time; got 21"):
        theory.entropy_sandwich(LINEAR, run, LINEAR.minimiser)


def of_linear(alpha: float | None = None) -> mfsde.LangevinOf:
    return mfsde.LangevinOf(LINEAR, LINEAR.sigma, alpha=alpha)


@dataclass(frozen=True)
class Slowed(mfsde.NoisySGD):
    """LINEAR in the clock ξt."""

    xi: float = 1.0
    sigma: float = LINEAR.sigma

    @property
    def energy(self) -> Energy:
        return LINEAR.energy

    def confinement(self, x: Tensor) -> Tensor:
        return LINEAR.confinement(x)

    def step_size(self, t: float) -> float:
        return self.xi

    def initial(self) -> Gaussian:
        return LINEAR.initial()


@dataclass(frozen=True)
class Stirred(Linear):
    """LINEAR with another drift than its energy's."""

    swirl: float = 0.5

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        return super().drift(t, x, mu) + self.swirl


def verdicts(scenario, run) -> set[str]:
    checks = [theory.free_energy_dissipation(scenario, run), *theory.stationarity(scenario, run)]
    return {f"{check.verdict}: {check.reason}" for check in checks}


def test_theorems_are_not_held_against_runs_with_births_and_deaths(run):
    born = mfsde.simulate(of_linear(alpha=2.0), **SETTINGS)
    # Whatever scenario is named: the run is what it is. Without its variables the record still says so.
    for scenario in (of_linear(alpha=2.0), of_linear(), LINEAR):
        for told in (born, born.drop_vars(["parent", "events"]), born.assign_attrs(reaction="")):
            (found,) = verdicts(scenario, told)
            assert found.startswith("hypothesis fails: particles are born and die in this run (")
    # A bare position does not know; its scenario does.
    (found,) = verdicts(of_linear(alpha=2.0), born["position"])
    assert found == "hypothesis fails: LangevinOf has births and deaths, and is no Langevin dynamics"
    # The contrary: without births they hold, and births that nobody knows of violate them.
    assert theory.free_energy_dissipation(of_linear(), mfsde.simulate(of_linear(), **SETTINGS)).verdict == "holds"
    assert theory.free_energy_dissipation(of_linear(), run).verdict == "holds"
    hidden = theory.free_energy_dissipation(LINEAR, born["position"])
    assert hidden.verdict == "violated"
    assert str(hidden).startswith("free-energy dissipation: violated, margin 1.")
    check = theory.free_energy_dissipation(LINEAR, born)
    assert math.isnan(check.margin)
    assert str(check) == f"free-energy dissipation: hypothesis fails\n  {check.reason}"


def test_theorems_are_not_held_against_another_drift_or_noise(run):
    slow = mfsde.simulate(Slowed(xi=0.3), **SETTINGS)
    (found,) = verdicts(Slowed(xi=0.3), slow)
    assert "hypothesis fails: the noise of Slowed at t = 0 is not σ = 1" in found
    assert theory.free_energy_dissipation(Slowed(xi=1.0), run).verdict == "holds"
    assert theory.free_energy_dissipation(LINEAR, slow).verdict == "violated"
    (found,) = verdicts(Stirred(), mfsde.simulate(Stirred(), **SETTINGS))
    assert "hypothesis fails: the drift of Stirred is not -(D_mF + T ∇U)" in found
    assert theory.free_energy_dissipation(Stirred(swirl=0.0), run).verdict == "holds"
    still = mfsde.GradientFlowOf(LINEAR)
    (found,) = verdicts(still, mfsde.simulate(still, **SETTINGS))
    assert "hypothesis fails: GradientFlowOf has no constant sigma > 0" in found
    # Independent copies of the nonlinear process follow the same flow of laws.
    copies = mfsde.decoupled(LINEAR, LINEAR.limit)
    assert theory.free_energy_dissipation(copies, mfsde.simulate(copies, **SETTINGS)).verdict == "holds"


def test_theorems_are_not_held_against_minibatches_velocities_or_walls(run):
    for method in ("sgd", "baoab"):
        (found,) = verdicts(LINEAR, run.assign_attrs(method=method))
        assert found.startswith("hypothesis fails: the run")
        assert f"(method '{method}')" in found
    kinetic = mfsde.KineticOf(LINEAR, 1.0, 1.0)
    positions = mfsde.simulate(kinetic, method="euler", **SETTINGS)
    (found,) = verdicts(kinetic, positions)
    assert "hypothesis fails: KineticOf is kinetic" in found

    @dataclass(frozen=True)
    class Walled(Linear):
        def project(self, x: Tensor) -> Tensor:
            return x.abs()

    walled = mfsde.simulate(Walled(), **SETTINGS)
    checks = theory.stationarity(Walled(), walled, start=0.5)
    assert {check.verdict for check in checks} == {"hypothesis fails"}
    assert "projected into a domain" in checks[0].reason
    assert "violated" in [check.verdict for check in theory.stationarity(LINEAR, walled, start=0.5)]


def test_flows_and_rates_are_of_one_dynamics():
    def check(scenario):
        return theory.free_energy_dissipation(scenario, LINEAR.limit, start=0.1, stop=2.0)

    for other in (Slowed(xi=0.3), Stirred(), of_linear(alpha=2.0), mfsde.GradientFlowOf(LINEAR)):
        assert check(other).verdict == "hypothesis fails"
        assert check(other).reason
        decay = contraction.decay_rate(Rate(3.6, 3.5, 3.7, 0.01, (0.0, 1.0), 1.0, "given"), 4.0, other)
        assert (decay.verdict, bool(decay.reason)) == ("hypothesis fails", True)
    assert check(Slowed(xi=1.0)).verdict == check(of_linear()).verdict == "holds"
    # Theorem 5 with constants of a scenario that is slower than they say.
    mu = LINEAR.initial().as_measure()
    for scenario, verdict in ((LINEAR, "violated"), (of_linear(), "violated"), (Slowed(xi=0.3), "hypothesis fails")):
        bounds = contraction.contraction_of(scenario, [mu])
        assert contraction.contraction_check(bounds, 1.0, 0.9, 1.0).verdict == verdict


def test_stability_is_not_held_against_particles_without_paths(run):
    given = {"lipschitz": 0.0, "one_sided": -6.0, "sigma": 1.0}
    other = started_elsewhere()
    assert contraction.stability(run, other, **given).verdict == "violated"
    born = mfsde.simulate(of_linear(alpha=2.0), **SETTINGS)
    for pair in ((born, other), (other, born)):
        check = contraction.stability(*pair, **given)
        assert check.verdict == "hypothesis fails"
        assert "born and die" in check.reason


def started_elsewhere() -> xr.Dataset:
    return mfsde.simulate(replace(LINEAR, m0=-1.0, v0=0.1), **SETTINGS)


def test_stability_of_coupled_runs(run):
    other = mfsde.simulate(replace(LINEAR, m0=-1.0, v0=0.1), **SETTINGS)
    # U = ½k x² has L = -k, F the Lipschitz constant κ; the coupled distance obeys the corrected exponent of Theorem 5.
    check = contraction.stability(run, other, lipschitz=0.3, one_sided=-4.0, sigma=1.0)
    assert check.verdict == "holds"
    assert contraction.stability(run, other, lipschitz=0.3, one_sided=4.0, sigma=1.0).margin > check.margin
    # The exponent as printed, 6C_F - C_U = -3.4 at κ = .1, is too fast; so is one of another U.
    weak = [mfsde.simulate(replace(LINEAR, kappa=0.1, m0=m), **SETTINGS) for m in (2.0, -1.0)]
    assert contraction.stability(*weak, lipschitz=0.1, one_sided=-4.0, sigma=1.0).verdict == "holds"
    assert contraction.stability(*weak, lipschitz=0.0, one_sided=-6.8, sigma=1.0).verdict == "violated"
    assert contraction.stability(run, other, lipschitz=0.0, one_sided=-6.0, sigma=1.0).verdict == "violated"


def test_the_declared_errors_are_there_and_large_enough():
    # Coarse steps: margins that three standard errors do not cover, and the declared error does.
    dt = 0.1
    settings = {"n_particles": 400, "n_replicas": 16, "dt": dt, "seed": 3}
    run = mfsde.simulate(LINEAR, horizon=1.0, save_every=1, **settings)
    check = theory.free_energy_dissipation(LINEAR, run, law=LINEAR.limit)
    assert abs(check.margin) > 5 * check.stderr
    assert check.verdict == "holds"
    rate = theory.dissipation(LINEAR, run, law=LINEAR.limit).mean("replica").values
    assert check.discretisation > 0.5 * dt * (rate[0] - rate[-1])
    assert identity("without", check.lhs, check.rhs, stderr=check.stderr).verdict == "violated"
    # E(b·x + T) = -(dt/2) E|b|² for the stationary Euler chain.
    at_rest = replace(LINEAR, m0=0.13, v0=0.25)
    long = mfsde.simulate(at_rest, horizon=6.0, save_every=5, **settings)
    check = theory.stationarity(at_rest, long, start=2.0)[1]
    assert abs(check.margin) > 5 * check.stderr
    assert check.verdict == "holds"
    assert identity("without", check.lhs, check.rhs, stderr=check.stderr).verdict == "violated"


def test_the_declared_error_of_the_sandwich_is_its_bias():
    few = mfsde.simulate(LINEAR, n_particles=20, horizon=0.5, dt=0.01, n_replicas=32, seed=3).isel(time=-1)
    # The lower margin is ½κ(mean - mean*)², so that halving the particles adds κ(h - h')²/8, of mean κ Var/(2N).
    halves = [few["position"].isel(particle=part, component=0).mean("particle") for part in (slice(10), slice(10, 20))]
    added = float((0.3 / 8 * np.square(halves[0] - halves[1])).mean())
    lower, upper = theory.entropy_sandwich(LINEAR, few, LINEAR.minimiser)
    assert lower.discretisation == pytest.approx(added, rel=1e-6)
    assert upper.discretisation == pytest.approx(added * upper.margin / lower.margin, rel=1e-6)
    # A χ² of 32 replicas: four standard errors of its mean are its size.
    assert 0 < added < 2 * 0.3 * FLOW[0.5][1] / 40


def test_the_declared_error_of_stability_is_eulers():
    # κ = 0: the runs are translates, whose distance falls by 1 - 2 dt a step: e^{-2.23 t} at dt = .1, for e^{-2 t}.
    settings = {"n_particles": 50, "n_replicas": 4, "dt": 0.1, "seed": 1, "horizon": 0.5, "save_every": 5}
    runs = [mfsde.simulate(replace(LINEAR, kappa=0.0, m0=m), **settings) for m in (2.0, -1.0)]
    check = contraction.stability(*runs, lipschitz=0.0, one_sided=-4.5, sigma=1.0)
    assert check.margin == pytest.approx(3 * (math.exp(-1.125) - 0.8**5), rel=1e-4)
    assert check.verdict == "holds"
    assert inequality("without", check.lhs, check.rhs, stderr=check.stderr).verdict == "violated"
    assert check.discretisation == pytest.approx(0.05 * 2.25**2 * 0.5 * check.rhs, rel=1e-9)


def test_a_run_is_held_against_one_scenario(run):
    swept = xr.concat([run["position"], run["position"]], xr.DataArray([0.1, 0.3], dims="kappa", name="kappa"))
    swept = swept.assign_coords(dt=run["dt"])
    given = {"lipschitz": 0.3, "one_sided": -4.0, "sigma": 1.0}
    for held in (
        lambda: theory.stationarity(LINEAR, swept),
        lambda: theory.free_energy_dissipation(LINEAR, swept),
        lambda: theory.entropy_sandwich(LINEAR, swept.isel(time=5), LINEAR.minimiser),
        lambda: theory.iid_bias(LINEAR.energy, swept.isel(time=5), LINEAR.limit(0.25)),
        lambda: contraction.stability(swept, swept, **given),
    ):
        with pytest.raises(ValueError, match=r"the particles have the dimensions kappa besides .* \.isel\(kappa=0\)"):
            held()


def test_stability_refuses_runs_that_are_not_coupled(run):
    given = {"lipschitz": 0.3, "one_sided": -4.0, "sigma": 1.0}
    other = mfsde.simulate(replace(LINEAR, m0=-1.0), **{**SETTINGS, "seed": 4})
    with pytest.raises(ValueError, match=r"the runs differ in seed \(3, 4\)"):
        contraction.stability(run, other, **given)
    with pytest.raises(ValueError, match=r"start from equal particles"):
        contraction.stability(run, run, **given)
    with pytest.raises(ValueError, match=r"labels along 'time' differ"):
        contraction.stability(run, run.isel(time=slice(3)), **given)
    with pytest.raises(ValueError, match=r"stability: the particles carry no scalar, positive coordinate dt"):
        contraction.stability(*(r.drop_vars("dt") for r in (run, started_elsewhere())), **given)
    torus = [r["position"].assign_attrs(period="[1.0]") for r in (run, started_elsewhere())]
    with pytest.raises(ValueError, match=r"live on a torus"):
        contraction.stability(*torus, **given)
    weighted = run.assign(weight=run["position"].isel(component=0))
    with pytest.raises(ValueError, match=r"unequal masses"):
        contraction.stability(weighted, weighted, **given)


def test_refusals_of_runs(run):
    with pytest.raises(ValueError, match=r"at least two independent replicas"):
        theory.free_energy_dissipation(LINEAR, run.isel(replica=[0]))
    with pytest.raises(ValueError, match=r"three saved times or more"):
        theory.free_energy_dissipation(LINEAR, run.isel(time=[0, -1]))
    with pytest.raises(ValueError, match=r"no saved time lies in \[5.0, None\]"):
        theory.free_energy_dissipation(LINEAR, run, start=5.0)
    with pytest.raises(ValueError, match=r"carry no scalar, positive coordinate dt"):
        theory.stationarity(LINEAR, run.drop_vars("dt"))
    with pytest.raises(ValueError, match=r"unequal masses"):
        theory.free_energy(LINEAR, run.assign(weight=run["position"].isel(component=0)))
    broken = run["position"].copy()
    broken[2, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"free_energy: 1 of .* values are not finite"):
        theory.free_energy(LINEAR, broken)
    with pytest.raises(ValueError, match=r"at a point somewhere, where no density exists"):
        theory.free_energy_dissipation(LINEAR, mfsde.simulate(replace(LINEAR, v0=0.0), **SETTINGS))
    with pytest.raises(RuntimeError, match=r"did not converge .* Choose a later start"):
        # A heat flow from a point: its dissipation is not integrable at 0.
        theory.free_energy_dissipation(LINEAR, lambda t: gaussian(0.0, t + 1e-300), start=0.0, stop=1.0)
    with pytest.raises(TypeError, match=r"has no energy"):
        theory.free_energy(object(), run)
    with pytest.raises(ValueError, match=r"needs σ > 0"):
        theory.free_energy(replace(LINEAR, sigma=0.0), run)
    with pytest.raises(ValueError, match=r"a test function returned shape"):
        theory.stationarity(LINEAR, run, functions={"x": lambda x: x})


# Gibbs laws -----------------------------------------------------------------------------------------------------------


def test_a_gibbs_law_is_normalised_wherever_it_lives():
    for centre, width in ((0.0, 1.0), (30.0, 0.01), (-5.0, 20.0)):
        law = Gibbs(
            lambda x, c=centre, w=width: -0.5 * ((x[..., 0] - c) / w) ** 2, centre=centre + 2 * width, scale=width
        )
        assert law.log_z == pytest.approx(0.5 * math.log(2 * math.pi) + math.log(width), abs=1e-9)
        exact = gaussian(centre, width**2)
        x = exact.sample(20, torch.Generator().manual_seed(0))
        assert torch.allclose(law.log_prob(x), exact.log_prob(x), atol=1e-8)
        u = torch.tensor([0.01, 0.3, 0.9], dtype=torch.float64)
        assert torch.allclose(law.quantile(u), exact.quantile(u), atol=1e-4 * width)
        assert torch.allclose(law.cdf(law.quantile(u)), u, atol=1e-10)
    plane = Gibbs(lambda x: -x.square().sum(-1) - x[..., 0] * x[..., 1], 2)
    assert plane.log_z == pytest.approx(math.log(2 * math.pi) - 0.5 * math.log(3.0), abs=1e-9)
    assert torch.allclose(plane.cov, torch.linalg.inv(torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)))


def test_a_gibbs_law_finds_modes_far_apart():
    def two(x: Tensor, far: float) -> Tensor:
        return torch.logsumexp(torch.stack([-0.5 * (x - m).square().sum(-1) for m in (0.0, far)]), 0)

    for far in (30.0, -300.0):
        assert Gibbs(lambda x, f=far: two(x, f)).log_z == pytest.approx(math.log(2 * math.sqrt(2 * math.pi)), abs=1e-9)
    plane = Gibbs(lambda x: two(x, 25.0), 2)
    assert plane.log_z == pytest.approx(math.log(4 * math.pi), abs=1e-9)
    # Further apart than the grid resolves: an error, not a mode less.
    with pytest.raises(ValueError, match=r"falls between|peaks too narrow"):
        Gibbs(lambda x: two(x, 1e5))


@pytest.mark.parametrize("sigma", [0.3, 0.1, 0.02])
def test_the_proximal_law_has_both_wells_when_the_particles_have_one(sigma):
    # No attraction: p_m ∝ exp(-V/T) is symmetric for every m, log Z = log 2 + ½ log(πT) + 1/(4T) to first order.
    free = DoubleWell(theta=0.0, sigma=sigma)
    noise = torch.randn(50, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    law = proximal(free, EmpiricalMeasure(1 + 0.7 * sigma * noise))
    assert float(law.mean[0]) == pytest.approx(0, abs=1e-9)
    assert float(law.cdf(torch.tensor([0.5]).double())) == pytest.approx(0.5, abs=0.02)


def test_a_gibbs_law_refuses_what_it_cannot_normalise():
    with pytest.raises(ValueError, match=r"does not decay"):
        Gibbs(lambda x: 0.1 * x[..., 0])
    with pytest.raises(ValueError, match=r"d = 1 or 2 only"):
        Gibbs(lambda x: -x.square().sum(-1), 3)
    with pytest.raises(ValueError, match=r"kink or peaks too narrow"):
        Gibbs(lambda x: -x.abs().sum(-1) - 1e6 * x.clamp(max=0.0123).square().sum(-1) * (x[..., 0] > 0))
    with pytest.raises(ValueError, match=r"sum over the last axis"):
        Gibbs(lambda x: -x.square())
    with pytest.raises(ValueError, match=r"NaN or \+inf"):
        Gibbs(lambda x: -(x[..., 0].sqrt()))
    with pytest.raises(ValueError, match=r"exists in one dimension only"):
        Gibbs(lambda x: -x.square().sum(-1), 2).quantile(torch.tensor([0.5]))
