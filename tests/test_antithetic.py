"""Antithetic noise: replicas 2j and 2j + 1 are the ordinary replica j and its mirror image, to the bit."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from mfsde import _noise_numpy, _noise_torch, noise
from mfsde.measure import EmpiricalMeasure
from mfsde.noise import Noise, Stream
from mfsde.scenarios import DoubleWell, MeanFieldOU

REALS = [torch.float32, torch.float64]
NORMAL = [Stream.INITIAL, Stream.IDIOSYNCRATIC, Stream.COMMON, Stream.AREA, Stream.COMMON_AREA]
SHAPE = (6, 300, 2)
HALF = (3, 300, 2)


def draws(source: Noise, shape: tuple[int, int, int], dtype: torch.dtype, **window: Any) -> dict[str, Tensor]:
    """Everything that is normal, by name."""
    found = {f"normals of {s.name}": source.normals(7, shape, stream=s, dtype=dtype, **window) for s in NORMAL}
    for s in (Stream.IDIOSYNCRATIC, Stream.COMMON):
        found[f"increment of {s.name}"] = source.increment(7, shape, stream=s, dtype=dtype, **window)
        path, area = source.area(7, shape, stream=s, dtype=dtype, **window)
        found |= {f"path of {s.name}": path, f"area of {s.name}": area}
    return found


@pytest.mark.parametrize("dtype", REALS)
@pytest.mark.parametrize("k", [1, 3])
def test_a_pair_is_an_ordinary_replica_and_its_mirror_image(dtype: torch.dtype, k: int) -> None:
    ordinary = draws(Noise(5, substeps=k), HALF, dtype)
    for name, z in draws(Noise(5, substeps=k, antithetic=True), SHAPE, dtype).items():
        assert torch.equal(z[0::2], ordinary[name]), name
        assert torch.equal(z[1::2], -ordinary[name]), name
        assert not (z[0::2] + z[1::2]).any(), name
    # Ordinary replicas do not cancel.
    assert all((z[0] + z[1]).any() for z in draws(Noise(5, substeps=k), SHAPE, dtype).values())


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("first", [0, 1, 6, 2**31 + 3])
def test_windows_of_replicas_and_particles_give_the_same_values(k: int, first: int) -> None:
    source = Noise(9, substeps=k, antithetic=True)
    whole = draws(source, (5, 400, 2), torch.float64, first_replica=first, first_particle=100)
    for rows in ([0, 1, 5], [0, 2, 3, 5]):
        for columns in ([0, 400], [0, 33, 399, 400]):
            for a, b in pairwise(rows):
                for c, d in pairwise(columns):
                    place = {"first_replica": first + a, "first_particle": 100 + c}
                    part = draws(source, (b - a, d - c, 2), torch.float64, **place)
                    for name, z in part.items():
                        assert torch.equal(z, whole[name][a:b, c:d]), (name, a, b, c, d)


def test_out_is_filled_and_nothing_is_nothing() -> None:
    source = Noise(1, antithetic=True)
    out = torch.full(SHAPE, math.nan)
    assert source.normals(0, SHAPE, out=out) is out
    assert torch.equal(out, source.normals(0, SHAPE))
    for shape in ((0, 5, 1), (2, 0, 1), (2, 5, 0)):
        assert source.normals(0, shape).shape == shape
        source.euler_(torch.zeros(shape), torch.zeros(shape), 0.1, 1.0, 0)


def test_uniforms_and_integers_are_those_of_the_replica() -> None:
    mirrored, ordinary = Noise(3, antithetic=True), Noise(3)
    assert torch.equal(mirrored.uniforms(2, SHAPE), ordinary.uniforms(2, SHAPE))
    assert torch.equal(mirrored.integers(2, SHAPE, 1000), ordinary.integers(2, SHAPE, 1000))
    assert not torch.equal(mirrored.uniforms(2, SHAPE)[0], mirrored.uniforms(2, SHAPE)[1])


@pytest.mark.parametrize("dtype", REALS)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("replicas", [6, 5])
def test_euler_moves_a_pair_as_two_runs(dtype: torch.dtype, k: int, diagonal: bool, replicas: int) -> None:
    # Even replicas step as ordinary ones; odd ones as ordinary ones whose σ has the other sign.
    mirrored, ordinary = Noise(6, substeps=k, antithetic=True), Noise(6, substeps=k)
    x, drift, field = (Noise(n).normals(n, (replicas, 300, 2), dtype=dtype) for n in range(3))
    sigma = field if diagonal else 0.7
    moved = x.clone()
    mirrored.euler_(moved, drift, 0.013, sigma, 4)
    for part, sign in ((slice(0, None, 2), 1), (slice(1, None, 2), -1)):
        expected = x[part].clone()
        c = sign * field[part].contiguous() if diagonal else sign * 0.7
        ordinary.euler_(expected, drift[part].contiguous(), 0.013, c, 4)
        assert torch.equal(moved[part], expected)


def test_euler_accepts_the_state_itself_as_drift_and_diffusion() -> None:
    source = Noise(1, antithetic=True)
    x = source.normals(0, SHAPE, stream=Stream.INITIAL)
    apart = x.clone()
    source.euler_(apart, x.clone(), 0.1, x.clone(), 0)
    source.euler_(x, x, 0.1, x, 0)
    assert torch.equal(x, apart)


@pytest.mark.parametrize("due", [False, True])
def test_a_kinetic_step_moves_a_pair_as_two_runs(due: bool) -> None:
    mirrored, ordinary = Noise(6, substeps=2, antithetic=True), Noise(6, substeps=2)
    x, force = Noise(0).normals(0, (6, 300, 2)), Noise(1).normals(1, (6, 300, 1))
    moved, seen = x.clone(), torch.empty_like(force)
    mirrored.kinetic_(moved, force, seen, 0.05, 0.8, 0.3, 4, due=due)
    for part, sign in ((slice(0, None, 2), 1), (slice(1, None, 2), -1)):
        expected, places = x[part].clone(), torch.empty_like(force[part])
        ordinary.kinetic_(expected, force[part].contiguous(), places, 0.05, 0.8, sign * 0.3, 4, due=due)
        assert torch.equal(moved[part], expected)
        assert torch.equal(seen[part], places)


def test_every_backend_mirrors(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Noise(6, substeps=2, antithetic=True)

    def everything() -> list[Tensor]:
        x = source.normals(0, SHAPE, stream=Stream.INITIAL)
        source.euler_(x, x.clone(), 0.1, 0.3, 3)
        return [x, *draws(source, SHAPE, torch.float32).values()]

    ours = everything()
    monkeypatch.setattr(noise, "_compiled", None)
    for module in (_noise_numpy, _noise_torch):
        monkeypatch.setattr(noise, "_portable", lambda name, module=module: module)
        for a, b in zip(ours, everything(), strict=True):
            assert torch.equal(a, b), module.__name__


def end(scenario: Any, source: Noise, steps: int, dt: float) -> Tensor:
    """The state after some Euler steps of eight replicas, (8, 50, d)."""
    law = scenario.initial()
    z = source.normals(0, (8, 50, law.n_variates), stream=Stream.INITIAL, dtype=torch.float64)
    x = law.from_variates(z)
    for step in range(steps):
        mu = EmpiricalMeasure(x)
        source.euler_(x, scenario.drift(step * dt, x, mu).contiguous(), dt, scenario.sigma, step)
    return x


def spread_of_pair_means(scenario: Any, source: Noise) -> float:
    """Largest deviation of the pair means of the particles from their average over pairs."""
    x = end(scenario, source, 20, 0.05)
    means = (x[0::2] + x[1::2]) / 2
    return float((means - means.mean(0)).abs().max())


def test_pair_means_of_a_linear_gaussian_model_do_not_vary() -> None:
    # X is affine in the noise: X(z) + X(-z) = 2 X(0), particle by particle, the Euler scheme of the noiseless equation.
    ou = MeanFieldOU(kappa=0.7, coupling=0.4, sigma=0.9, initial_mean=(1.0, -2.0))
    assert spread_of_pair_means(ou, Noise(2, antithetic=True)) < 1e-14
    x = end(ou, Noise(2, antithetic=True), 20, 0.05)
    noiseless = (1 - 0.7 * 0.05) ** 20 * torch.tensor([1.0, -2.0], dtype=torch.float64)
    assert ((x[0::2] + x[1::2]) / 2 - noiseless).abs().max() < 1e-14
    # Without it they vary, and in a model that is not linear they do.
    assert spread_of_pair_means(ou, Noise(2)) > 0.1
    assert spread_of_pair_means(DoubleWell(), Noise(2, antithetic=True)) > 0.01


def test_what_is_stored_of_an_ordinary_noise_does_not_know_the_word() -> None:
    ordinary = {"scheme": "philox4x32-10/box-muller", "version": 1, "seed": 3, "substeps": 2}
    assert Noise(3, 2).identity() == Noise(3, 2, antithetic=False).identity() == ordinary
    assert Noise(3, 2, antithetic=True).identity() == {**ordinary, "antithetic": True}
    assert Noise(3) != Noise(3, antithetic=True)


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_antithetic_is_a_yes_or_no(value: Any) -> None:
    with pytest.raises(TypeError, match=r"antithetic is .*; expected True or False"):
        Noise(1, antithetic=value)
