"""Measures on the sphere and of amplitudes: integrals of homogeneous functions do not see the difference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mfsde import EmpiricalMeasure
from mfsde.homogeneous import of_amplitudes, on_sphere

DOUBLE = torch.float64


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def laws() -> list[EmpiricalMeasure]:
    x, w = normals(2, 3, 12, 4), torch.softmax(normals(2, 3, 12, seed=1), -1)
    x[..., 5, :] = 0
    return [EmpiricalMeasure(x), EmpiricalMeasure(x, w)]


def relu_network(u: Tensor) -> Tensor:
    """Φ(w, θ) = w max(⟨θ, z⟩, 0) at three inputs z: 2-homogeneous.    (..., N, 4) -> (..., N, 3)."""
    z = torch.tensor([[1.0, 0.3, -0.5], [0.2, -1.0, 0.7], [-0.4, 0.1, 1.1]], dtype=u.dtype)
    return u[..., :1] * torch.relu(u[..., 1:] @ z)


@pytest.mark.parametrize("mu", laws(), ids=["uniform", "weighted"])
def test_two_homogeneous_functions_integrate_the_same_on_the_sphere(mu):
    nu = on_sphere(mu)
    torch.testing.assert_close(nu.integrate(relu_network), mu.integrate(relu_network), rtol=1e-13, atol=1e-14)
    for degree in (1.0, 3.5):
        wrong = on_sphere(mu, degree).integrate(relu_network) - mu.integrate(relu_network)
        assert wrong.abs().min() > 1e-3
    # A function of degree 1 needs the image of degree 1.
    torch.testing.assert_close(
        on_sphere(mu, 1.0).integrate(lambda u: u.abs().sum(-1)),
        mu.integrate(lambda u: u.abs().sum(-1)),
        rtol=1e-13,
        atol=0,
    )


@pytest.mark.parametrize("mu", laws(), ids=["uniform", "weighted"])
def test_the_mass_on_the_sphere_is_the_second_moment(mu):
    nu = on_sphere(mu)
    second = mu.integrate(lambda u: u.square().sum(-1))
    torch.testing.assert_close(nu.weights.sum(-1), second, rtol=1e-13, atol=0)
    torch.testing.assert_close(nu.points.norm(dim=-1), torch.ones(2, 3, 12, dtype=DOUBLE), rtol=1e-14, atol=0)
    assert (nu.weights >= 0).all()
    assert (nu.weights[..., 5] == 0).all()
    assert torch.equal(nu.points[0, 0, 5], torch.tensor([1.0, 0, 0, 0], dtype=DOUBLE))


def test_scaling_a_particle_and_its_mass_against_each_other_changes_nothing_on_the_sphere():
    x, w = normals(5, 3), torch.softmax(normals(5, seed=1), -1)
    scale = torch.rand(5, generator=torch.Generator().manual_seed(2), dtype=DOUBLE) + 0.5
    other = EmpiricalMeasure.signed(x * scale[:, None], w / scale.square())
    a, b = on_sphere(EmpiricalMeasure(x, w)), on_sphere(other)
    torch.testing.assert_close(a.points, b.points)
    torch.testing.assert_close(a.weights, b.weights)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_directions_of_tiny_and_huge_vectors(dtype):
    u = torch.tensor([[3e-30, 4e-30], [3e30, -4e30], [0.0, 0.0]], dtype=dtype)
    nu = on_sphere(EmpiricalMeasure(u), 1.0)
    expected = torch.tensor([[0.6, 0.8], [0.6, -0.8], [1.0, 0.0]], dtype=dtype)
    torch.testing.assert_close(nu.points, expected)
    torch.testing.assert_close(nu.weights, torch.tensor([5e-30, 5e30, 0.0], dtype=dtype) / 3)


@pytest.mark.parametrize("mu", laws(), ids=["uniform", "weighted"])
@pytest.mark.parametrize("amplitude", [0, 2])
def test_functions_linear_in_the_amplitude_integrate_the_same_against_the_signed_measure(mu, amplitude):
    nu = of_amplitudes(mu, amplitude)
    rest = [k for k in range(4) if k != amplitude]
    found = nu.integrate(lambda theta: torch.cos(theta.sum(-1)))
    expected = mu.integrate(lambda x: x[..., amplitude] * torch.cos(x[..., rest].sum(-1)))
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)
    assert nu.dim == 3
    assert (nu.weights < 0).any()
    total_variation = nu.weights.abs().sum(-1)
    torch.testing.assert_close(total_variation, mu.integrate(lambda x: x[..., amplitude].abs()), rtol=1e-13, atol=0)


def test_the_period_of_the_parameters_is_kept():
    mu = EmpiricalMeasure(normals(1, 4, 2), period=(None, 2 * math.pi))
    assert of_amplitudes(mu).period == [2 * math.pi]
    assert of_amplitudes(EmpiricalMeasure(normals(1, 4, 2))).period is None


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda mu: on_sphere(mu, 0.0), "degree = 0.0; expected a positive number"),
        (lambda mu: of_amplitudes(mu, 4), "amplitude = 4 for points of 4 components"),
        (lambda mu: of_amplitudes(EmpiricalMeasure(normals(3, 1))), "expected one of at least two"),
    ],
)
def test_what_has_no_image_is_refused(make, what):
    with pytest.raises(ValueError, match=what):
        make(laws()[0])
