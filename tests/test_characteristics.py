"""Characteristics against solutions in closed form: smooth flows, walls, tori; quadrature; refusals."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad, solve_ivp

import mfsde
from mfsde import Dirac, EmpiricalMeasure, Gaussian, Mixture, Uniform
from mfsde.analysis import wasserstein
from mfsde.limit import characteristics
from mfsde.limit.characteristics import Flow, quadrature
from mfsde.scenarios import Kuramoto, MeanFieldOU

FLOAT64 = torch.float64
module = importlib.import_module("mfsde.limit.characteristics")  # its name in the package is the function


@dataclass(frozen=True)
class Equation:
    """dX = b(t, X, m) dt from a given function."""

    b: Callable[..., Any]
    law: Any = dataclasses.field(default_factory=lambda: Uniform(0.1, 0.6))

    def drift(self, t, x, mu):
        return self.b(t, x, mu)

    def diffusion(self, t, x, mu):
        return 0.0

    def initial(self):
        return self.law


# Smooth flows ---------------------------------------------------------------------------------------------------------

LINEAR = MeanFieldOU(kappa=0.7, coupling=1.3, sigma=0.0, initial_mean=(1.5,), initial_variance=0.4)


@pytest.mark.parametrize("method", ["dop853", "bdf", "radau"])
def test_a_linear_flow_in_closed_form(method):
    result = characteristics(LINEAR, [0.0, 0.5, 2.0], n_nodes=32, method=method)
    t = result.time.values
    start = result.position.values[0, 0, :, 0]
    centre = 1.5 * np.exp(-0.7 * t)
    path = centre + np.exp(-2 * t) * (start[:, None] - 1.5)
    exact = 1e-9 if method == "dop853" else 1e-6
    np.testing.assert_allclose(result.position.values[:, 0, :, 0], path.T, rtol=0, atol=10 * exact)
    np.testing.assert_allclose(result["mean"].values[:, 0], centre, rtol=0, atol=exact)
    np.testing.assert_allclose(result["covariance"].values[:, 0, 0], 0.4 * np.exp(-4 * t), rtol=0, atol=exact)
    # Without the attraction to the mean it is another flow.
    other = characteristics(dataclasses.replace(LINEAR, coupling=1.2), [2.0], n_nodes=32)
    assert abs(other["covariance"].item() - 0.4 * math.exp(-8)) > 1e-6


@pytest.mark.parametrize("d", [2, 3])
def test_a_linear_flow_in_more_dimensions(d):
    case = MeanFieldOU(sigma=0.0, initial_mean=(1.0, -1.0, 0.5)[:d], initial_variance=0.3)
    result = characteristics(case, [1.0])
    law = case.limit(1.0)
    np.testing.assert_allclose(result["mean"].values[0], law.mean, rtol=0, atol=1e-9)
    np.testing.assert_allclose(result["covariance"].values[0], law.cov, rtol=0, atol=1e-9)
    assert result.sizes["particle"] == {2: 32**2, 3: 4096}[d]


LOGISTIC = Equation(lambda t, x, mu: math.cos(t) * x * (1 - x))


def logistic(x: Any, t: float) -> Any:
    """X' = cos(t) X(1 - X)."""
    grown = x * math.exp(math.sin(t))
    return grown / (1 - x + grown)


def test_a_nonlinear_flow_that_depends_on_time():
    result = characteristics(LOGISTIC, [0.0, 1.0, 4.0], n_nodes=64)
    start = result.position.values[0, 0]
    for k, t in enumerate(result.time.values):
        np.testing.assert_allclose(result.position.values[k, 0], logistic(start, t), rtol=0, atol=1e-8)
        mean = quad(logistic, 0.1, 0.6, args=(t,), epsabs=1e-13)[0] / 0.5
        assert result["mean"].values[k, 0] == pytest.approx(mean, abs=1e-8)


def test_the_quadrature_converges_and_says_how_far_it_is():
    """A cubic flow towards two wells, whose law develops sharp features."""
    case = Equation(lambda t, x, mu: x - x**3 - 0.2 * mu.mean(), Gaussian([0.1], [[1.0]]))
    reference = characteristics(case, [1.0], n_nodes=512)
    errors = []
    for n in (16, 32, 64, 128):
        result = characteristics(case, [1.0], n_nodes=n)
        errors.append(max(abs(result[name] - reference[name]).max().item() for name in ("mean", "covariance")))
        reported = max(result[f"{name}_error"].max().item() for name in ("mean", "covariance"))
        assert errors[-1] < reported < 100 * errors[-1] + 1e-3
    assert errors[0] > 1e-2
    assert errors[1] < errors[0] / 10
    assert errors[2] < errors[1] / 10
    assert errors[3] < 1e-8


def test_points_that_are_given_are_taken_as_they_are():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(5, 2, generator=generator, dtype=FLOAT64)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.25, 0.15], dtype=FLOAT64)
    case = Equation(lambda t, x, mu: mu.convolve(lambda z: -torch.sin(z), x), Gaussian([0.0, 0.0], 1.0))

    def slope(t, y):
        x = y.reshape(5, 2)
        return np.einsum("j,ijk->ik", weights.numpy(), -np.sin(x[:, None] - x[None])).ravel()

    expected = solve_ivp(slope, (0, 2), points.numpy().ravel(), method="RK45", rtol=1e-10, atol=1e-12).y[:, -1]
    result = characteristics(case, [2.0], start=EmpiricalMeasure(points, weights))
    np.testing.assert_allclose(result.position.values[0, 0].ravel(), expected, rtol=0, atol=1e-8)
    assert (result.weight.values == weights.numpy()).all()
    assert "mean_error" not in result
    equal = characteristics(case, [2.0], start=EmpiricalMeasure(points))
    assert abs(equal.position.values - result.position.values).max() > 1e-2


def test_the_particles_of_a_run_follow_them():
    """Euler with step h is O(h) away; the start is the same."""
    points = torch.linspace(0.1, 0.9, 7, dtype=FLOAT64)[:, None]
    case = Equation(lambda t, x, mu: x * (1 - x) - 0.5 * mu.mean(), EmpiricalMeasure(points))
    exact = characteristics(case, [1.0]).position.values[0]
    errors = []
    for dt in (0.02, 0.01):
        run = mfsde.simulate(case, n_particles=7, horizon=1.0, dt=dt, seed=0, dtype=FLOAT64)
        errors.append(abs(run.position.values[-1] - exact).max())
    assert errors[0] < 0.01
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)


def test_a_stiff_equation():
    case = Equation(lambda t, x, mu: -1e5 * (x - torch.cos(torch.tensor(t, dtype=x.dtype))))
    result = characteristics(case, [1.0], n_nodes=8, method="bdf")
    np.testing.assert_allclose(result.position.values, math.cos(1) + 1e-5 * math.sin(1), rtol=0, atol=1e-7)


# Walls ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Swing:
    """X' = cos t in [0, 1], from the uniform law: all meet the wall 1, leave it at π/2, and meet 0."""

    kind: str = "nearest"

    def drift(self, t, x, mu):
        return torch.full_like(x, math.cos(t))

    def diffusion(self, t, x, mu):
        return 0.0

    def project(self, x):
        if self.kind == "nearest":
            return x.clamp(0, 1)
        folded = torch.remainder(x, 2)
        return torch.where(folded > 1, 2 - folded, folded)

    def initial(self):
        return Uniform(0.0, 1.0)


def swing(x: np.ndarray, t: float) -> np.ndarray:
    """The solution until 3π/2."""
    if t <= math.pi / 2:
        return np.minimum(x + math.sin(t), 1)
    top = np.minimum(x + 1, 1)
    return np.maximum(top - 1 + math.sin(t), 0)


@pytest.mark.parametrize("kind", ["nearest", "reflect"])
def test_points_stay_at_a_wall_until_they_are_drawn_away(kind):
    result = characteristics(Swing(kind), [0.0, 0.5, 1.5, 2.5, 4.0], n_nodes=12)
    start = result.position.values[0, 0, :, 0]
    for k, t in enumerate(result.time.values):
        np.testing.assert_allclose(result.position.values[k, 0, :, 0], swing(start, t), rtol=0, atol=2e-8)
    assert result.position.min() >= 0
    assert result.position.max() <= 1
    assert (result.position.values[1] == 1).any()


def test_a_wall_that_did_not_hold_would_be_seen(monkeypatch):
    def error() -> float:
        result = characteristics(Swing(), [2.5], start=quadrature(Uniform(0.0, 1.0), 12))
        start = quadrature(Uniform(0.0, 1.0), 12).points.numpy()[:, 0]
        return abs(result.position.values[0, 0, :, 0] - swing(start, 2.5)).max()

    assert error() < 2e-8
    with monkeypatch.context() as patch:
        # Projected at the output only, points return from beyond the wall.
        patch.setattr(Flow, "slope", lambda self, t, y, held: self.velocity(t, self.nearest(y)))
        patch.setattr(module, "_until_wall", lambda flow, solver, held: (solver.t, solver.y.reshape(-1, 1), held))
        assert error() > 0.1
    with monkeypatch.context() as patch:
        # Held for ever, they are not drawn away.
        patch.setattr(Flow, "_at_wall", lambda self, x, v: (np.ones(len(x), dtype=bool), x, 0 * v))
        assert error() > 0.1


def test_points_meet_the_wall_of_a_ball_and_slide_along_it():
    @dataclass(frozen=True)
    class Wind:
        """X' = (1, 0) in the unit disc: on the circle φ' = -sin φ."""

        def drift(self, t, x, mu):
            return x.new_tensor([1.0, 0.0]).expand_as(x)

        def diffusion(self, t, x, mu):
            return 0.0

        def project(self, x):
            norm = x.norm(dim=-1, keepdim=True)
            return torch.where(norm > 1, x / norm, x)

        def initial(self):
            return Dirac([0.0, 0.0])

    height = np.array([0.6, -0.3, 0.0])
    start = EmpiricalMeasure(torch.tensor(np.column_stack([[-0.2, 0.1, 0.0], height])))
    result = characteristics(Wind(), [0.1, 3.0], start=start)
    early, late = result.position.values[:, 0]
    np.testing.assert_allclose(early, start.points.numpy() + np.array([0.1, 0.0]), rtol=0, atol=1e-9)
    meeting = np.sqrt(1 - height**2) - start.points.numpy()[:, 0]
    angle = 2 * np.arctan(np.tan(np.arcsin(height) / 2) * np.exp(-(3.0 - meeting)))
    np.testing.assert_allclose(late, np.column_stack([np.cos(angle), np.sin(angle)]), rtol=0, atol=1e-8)


def test_a_corner_holds_in_both_directions():
    case = dataclasses.make_dataclass(
        "Corner",
        [],
        frozen=True,
        namespace={
            "drift": lambda self, t, x, mu: (
                x.new_tensor([-1.0, -0.5]).expand_as(x) + (t > 1) * x.new_tensor([0.0, 1.0])
            ),
            "diffusion": lambda self, t, x, mu: 0.0,
            "project": lambda self, x: x.clamp(min=0),
            "initial": lambda self: Dirac([0.3, 0.2]),
        },
    )()
    result = characteristics(case, [0.35, 1.0, 1.5])
    np.testing.assert_allclose(result.position.values[:, 0, 0], [[0, 0.025], [0, 0], [0, 0.25]], rtol=0, atol=1e-10)


@pytest.mark.parametrize("gap", [0.5, 3.0])
def test_two_oscillators_meet_through_the_seam_of_the_circle(gap):
    """Δ' = -K sin Δ: tan(Δ/2) decays like e^{-Kt}."""
    case = Kuramoto(coupling=2.0, sigma=0.0)
    start = torch.tensor([[0.2], [0.2 - gap + 2 * math.pi]], dtype=FLOAT64)
    result = characteristics(case, [0.0, 0.7], start=EmpiricalMeasure(start))
    x = result.position.values[:, 0, :, 0]
    assert ((x >= 0) & (x < 2 * math.pi)).all()
    found = (x[:, 0] - x[:, 1] + math.pi) % (2 * math.pi) - math.pi
    expected = [gap, 2 * math.atan(math.tan(gap / 2) * math.exp(-1.4))]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-8)
    assert result.position.attrs["period"] == f"[{2 * math.pi}]"
    # The circular mean does not move.
    middle = np.angle(np.exp(1j * x).mean(-1))
    np.testing.assert_allclose(middle, 0.2 - gap / 2, rtol=0, atol=1e-8)


# Quadrature -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("law", "n_points"),
    [
        (Gaussian([1.0], [[0.3]]), 256),
        (Uniform(-1.0, 2.0), 256),
        (Dirac([1.0, 2.0]), 1),
        (Gaussian([1.0, 2.0], [[1.0, 0.5], [0.5, 1.0]]), 32**2),
        (Gaussian([1.0, 2.0, 3.0], torch.diag(torch.tensor([0.0, 0.4, 0.0]))), 256),
        (Gaussian([1.0, 2.0, 3.0, 4.0], torch.diag(torch.tensor([0.7, 0.0, 0.4, 0.0]))), 32**2),
        (Uniform([0.0, 1.0, 2.0], [1.0, 2.0, 4.0]), 4096),
        (Mixture([Uniform(0.0, 1.0), Gaussian([3.0], [[0.1]]), Dirac(5.0)], [0.5, 0.2, 0.3]), 513),
    ],
)
def test_the_measure_of_a_law_has_its_moments(law, n_points):
    mu = quadrature(law)
    assert mu.n_particles == n_points
    assert mu.weights.sum().item() == pytest.approx(1, abs=1e-14)
    torch.testing.assert_close(mu.mean()[0], law.mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(mu.covariance(), law.cov, rtol=0, atol=1e-12)


def test_the_rule_converges_geometrically():
    law = Uniform(-1.0, 2.0)
    exact = (math.exp(2) - math.exp(-1)) / 3
    errors = [abs(quadrature(law, n).integrate(torch.exp).item() - exact) for n in (8, 16, 32, 64)]
    assert errors[0] < 0.05
    assert errors[1] < errors[0] ** 1.7
    assert errors[2] < errors[1] ** 1.7
    assert errors[3] < 1e-14


# The dataset, and what is refused -------------------------------------------------------------------------------------


def test_the_result_is_read_like_a_weighted_run(tmp_path):
    result = characteristics(LINEAR, [0.0, 1.0], store=tmp_path / "c.zarr")
    assert result.position.dims == ("time", "replica", "particle", "component")
    assert result.weight.dims == ("time", "replica", "particle")
    assert result.sizes["replica"] == 1
    np.testing.assert_allclose(result.weight.sum("particle").values, 1, atol=1e-14)
    assert result.attrs["method"] == "dop853"
    assert float(result.kappa) == 0.7
    assert (mfsde.open_run(tmp_path / "c.zarr").position.values == result.position.values).all()
    with pytest.raises(FileExistsError):
        characteristics(LINEAR, [1.0], store=tmp_path / "c.zarr")
    distance = wasserstein.to_law(result, LINEAR.limit)
    assert distance.max() < 0.02
    assert wasserstein.to_law(result, LINEAR.initial()).values[1] > 0.5


def test_the_energy_comes_along():
    class Falling(Equation):
        energy = mfsde.potential(lambda x: 0.5 * x[..., 0] ** 2)

    result = characteristics(Falling(lambda t, x, mu: -x, Gaussian([1.0], [[1.0]])), [0.0, 1.0])
    np.testing.assert_allclose(result.energy.values, np.exp([0, -2]), rtol=0, atol=1e-9)
    assert result.energy_error.max() < 1e-9


def special(**methods: Any) -> Any:
    return type("Special", (MeanFieldOU,), methods)(sigma=0.0)


@pytest.mark.parametrize(
    ("case", "what"),
    [
        (MeanFieldOU(sigma=0.1), r"has diffusion: σσᵀ reaches 0\.01 at t = 0.*use mfsde.limit.fokker_planck"),
        (special(diffusion=lambda self, t, x, mu: t), "has diffusion: σσᵀ reaches 1 at t = 1"),
        (special(common_diffusion=lambda self, t, x, mu: 0.0), "has common noise"),
    ],
)
def test_noise_is_refused(case, what):
    with pytest.raises(ValueError, match=what):
        characteristics(case, [0.0, 1.0], n_nodes=8)


def test_a_blow_up_says_when_and_where():
    case = Equation(lambda t, x, mu: x**2, EmpiricalMeasure(torch.tensor([[0.5], [2.0], [1.0]], dtype=FLOAT64)))
    with pytest.raises(RuntimeError, match=r"cannot be continued past t = 0\.5\d*, where the farthest particle, 1,"):
        characteristics(case, [0.4, 1.0])
    np.testing.assert_allclose(
        characteristics(case, [0.4]).position.values[0, 0, :, 0], [0.5 / 0.8, 2 / 0.2, 1 / 0.6], rtol=1e-8
    )


def test_steps_without_end_are_refused(monkeypatch):
    monkeypatch.setattr(module, "MOST_STEPS", 20)
    with pytest.raises(RuntimeError, match="20 steps were made"):
        characteristics(Equation(lambda t, x, mu: -torch.sign(x - 0.3)), [5.0], n_nodes=8)


@pytest.mark.parametrize(
    ("settings", "error", "what"),
    [
        ({"method": "euler"}, ValueError, "method = 'euler'; expected one of 'dop853', 'bdf', 'radau'"),
        ({"rtol": 0.0}, ValueError, "rtol = 0.0; expected a positive number"),
        ({"atol": -1.0}, ValueError, "atol = -1.0; expected a positive number"),
        ({"n_nodes": 4}, ValueError, "n_nodes = 4; expected a whole number, at least 8"),
        ({"start": torch.zeros(3, 1)}, TypeError, "start is a Tensor; expected a law"),
        ({"start": EmpiricalMeasure(torch.zeros(2, 3, 1))}, TypeError, "start is a EmpiricalMeasure; expected a law"),
        ({"start": EmpiricalMeasure(torch.zeros(3, 1)), "n_nodes": 8}, ValueError, "n_nodes is for laws"),
    ],
)
def test_bad_input_is_refused(settings, error, what):
    with pytest.raises(error, match=what):
        characteristics(LINEAR, [1.0], **settings)
    with pytest.raises(ValueError, match="expected increasing finite numbers"):
        characteristics(LINEAR, [1.0, 0.0])
