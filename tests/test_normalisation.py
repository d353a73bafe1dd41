"""Normalising constants: closed forms within the stated error, and refusals where there is none.

Statistical tolerances are multiples of the standard error over independent systems of walkers; each has a twin with a
planted fault that the same tolerance rejects.
"""

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy import special

from mfsde import Gaussian, Mixture
from mfsde.analysis import annealing
from mfsde.analysis.normalisation import normalise


def well(x, beta=2.0):
    """A product of double wells, unnormalised."""
    return -beta * (0.25 * x**4 - 0.5 * x**2).sum(-1)


def well_log_z(beta=2.0):
    """∫ e^{-β(x⁴/4 - x²/2)} dx in closed form: (π/2) e^{β/8} (I_{-1/4} + I_{1/4})(β/8)."""
    return math.log(math.pi / 2 * (special.ive(-0.25, beta / 8) + special.ive(0.25, beta / 8))) + beta / 4


def quadratic(x, w=1.0):
    return -0.5 * x.square().sum(-1) / w


CONSTANTS = {
    "gauss": (quadratic, 1, 0.5 * math.log(2 * math.pi)),
    "gauss in the plane": (quadratic, 2, math.log(2 * math.pi)),
    "narrow and far": (lambda x: quadratic((x - 1e3) / 1e-3), 1, math.log(1e-3) + 0.5 * math.log(2 * math.pi)),
    "cauchy": (lambda x: -torch.log1p(x**2).sum(-1), 1, math.log(math.pi)),
    "student in the plane": (lambda x: -1.5 * torch.log1p(x.square().sum(-1)), 2, math.log(2 * math.pi)),
    "kink": (lambda x: -x.abs().sum(-1), 1, math.log(2)),
    "well": (well, 1, well_log_z()),
    "wells in the plane": (well, 2, 2 * well_log_z()),
    "cold well": (partial(well, beta=2000.0), 1, well_log_z(2000.0)),
    "banana": (lambda x: -0.5 * x[..., 0] ** 2 - 50 * (x[..., 1] - x[..., 0] ** 2) ** 2, 2, math.log(math.pi / 5)),
    "ridge": (Gaussian([3.0, -100.0], [[1.0, 0.9999], [0.9999, 1.0]]).log_prob, 2, 0.0),
    "needles": (Mixture([Gaussian([200.0], [[1e-4]]), Gaussian([-300.0], [[4e-4]])]).log_prob, 1, 0.0),
    "box": (lambda x: torch.where((x > 0) & (x < 1), 0.0, -math.inf).sum(-1), 1, 0.0),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_quadrature_finds_the_constant_within_its_error(name):
    log_density, d, truth = CONSTANTS[name]
    found, error = normalise(log_density, d)
    assert error <= {1: 1e-10, 2: 1e-8}[d]
    # Rounding of log e^f itself: 1e-16 of the largest exponent.
    assert abs(found - truth) < {1: 1e-10, 2: 1e-8}[d]


def test_on_a_torus_the_constant_is_a_bessel_function():
    def cosine(x):
        return 2 * torch.cos(x).sum(-1)

    truth = math.log(2 * math.pi * special.i0(2.0))
    assert normalise(cosine, 1, period=2 * math.pi)[0] == pytest.approx(truth, abs=1e-10)
    assert normalise(cosine, 2, period=2 * math.pi)[0] == pytest.approx(2 * truth, abs=1e-8)
    mixed = normalise(lambda x: 2 * torch.cos(x[..., 0]) - x[..., 1] ** 2 / 2, 2, period=[2 * math.pi, None])
    assert mixed[0] == pytest.approx(truth + 0.5 * math.log(2 * math.pi), abs=1e-8)
    with pytest.raises(ValueError, match="no method for a torus in dimension 3"):
        normalise(cosine, 3, period=2 * math.pi)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_what_cannot_be_integrated_is_refused(d):
    for log_density in (
        lambda x: 0 * x.sum(-1),
        lambda x: -(x[..., 0] ** 2) if d > 1 else 0.5 * x[..., 0],
        lambda x: -0.5 * d * torch.log1p(x.square().sum(-1)),
    ):
        with pytest.raises(ValueError, match=r"not integrable|integrable at all"):
            normalise(log_density, d)


def test_an_error_above_the_tolerance_is_refused():
    disc = lambda x: torch.where(x.square().sum(-1) < 1, 0.0, -math.inf)  # noqa: E731
    with pytest.raises(RuntimeError, match="more than the tolerance 1e-08"):
        normalise(disc, 2)
    found, error = normalise(disc, 2, tolerance=1e-2)
    assert abs(found - math.log(math.pi)) < max(error, 1e-3)
    with pytest.raises(RuntimeError, match=r"log Z = .* more than the tolerance 1e-05"):
        normalise(well, 3, tolerance=1e-5)
    with pytest.raises(ValueError, match="not a number"):
        normalise(lambda x: torch.sqrt(x - 0.5).sum(-1) - x.abs().sum(-1), 1)


def test_annealing_finds_the_constant_of_a_product_within_its_error():
    truth = 5 * normalise(well, 1)[0]
    found, error = normalise(well, 5, seed=3)
    assert 0 < error < 0.02
    # t with 7 degrees of freedom: 4.8 standard errors are exceeded once in 500.
    assert abs(found - truth) < 4.8 * error
    assert normalise(well, 5, seed=3) == (found, error)
    # The planted fault: a temperature 8 % off, whose constant the same tolerance rejects.
    assert abs(found - 5 * normalise(partial(well, beta=2.16), 1)[0]) > 4.8 * error


def test_annealing_sees_modes_that_are_far_apart():
    peaks = [Gaussian([6.0, 6.0, -6.0], 0.5), Gaussian([-6.0, -8.0, 0.0], 1.0)]
    found, error = normalise(Mixture(peaks, [0.3, 0.7]).log_prob, 3)
    assert abs(found) < 4.8 * error
    # Had it missed the smaller one, it would be off by log 0.7.
    assert abs(math.log(0.7)) > 4.8 * error


@pytest.mark.parametrize("d", [1, 2])
def test_points_near_a_narrow_mode_show_it(d):
    """Half of the mass lies where no point of the grid does; found blindly, it is missed without a word."""
    near = np.full((40, d), 20.2) + 1e-4 * np.random.default_rng(0).normal(size=(40, d))
    peaks = [Gaussian([0.0] * d, 9.0), Gaussian([20.2] * d, 1e-6)]
    log_density = lambda x: Mixture(peaks).log_prob(x)  # noqa: E731
    blind, error = normalise(log_density, d)
    assert blind == pytest.approx(-math.log(2), abs=1e-6)
    assert error < 1e-8
    found, error = normalise(log_density, d, near=near)
    assert abs(found) <= max(error, 1e-9)
    with pytest.raises(ValueError, match=r"expected finite points \(n, "):
        normalise(log_density, d, near=near[0])


def test_annealing_that_never_reached_the_highest_mode_is_refused():
    peaks = [Gaussian([0.0] * 3, 1.0), Gaussian([20.2, 7.3, 1.0], 0.01)]
    with pytest.raises(RuntimeError, match="no walker of the annealing reached"):
        normalise(lambda x: Mixture(peaks).log_prob(x), 3, near=[[20.2, 7.3, 1.0]])


def test_the_stated_error_of_annealing_is_its_scatter(monkeypatch):
    monkeypatch.setattr(annealing, "WALKERS", 128)
    pulls = []
    for seed in range(12):
        found, error = normalise(partial(quadratic, w=0.5), 3, seed=seed, tolerance=1.0)
        pulls.append((found - 1.5 * math.log(math.pi)) / error)
    # Σ of 12 squared t₇ pulls: mean 16.8, and 1 in 1000 above 70.
    assert np.square(pulls).sum() < 70
    assert np.square(np.array(pulls) * 3).sum() > 70
