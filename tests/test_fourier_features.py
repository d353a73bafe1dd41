"""Random Fourier features: identities with few features, unbiasedness, decay of the error, gradient structure."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mfsde import Dirac, Gaussian, Mixture
from mfsde.pairwise import fourier
from mfsde.pairwise.blocked import Blocked
from mfsde.pairwise.fourier import Fourier
from mfsde.pairwise.kernel import Kernel, Pairs

FLOAT64 = torch.float64
TURN = 2 * math.pi
every_sampling = pytest.mark.parametrize("sampling", ["sobol", "independent"])


def gaussian(z: Tensor) -> Tensor:
    return 0.8 * torch.exp(-z.square().sum(-1) / 2)


@dataclass(frozen=True)
class Cauchy:
    """The spectrum of exp(-|z|), of no moment."""

    @property
    def n_variates(self) -> int:
        return 1

    def from_variates(self, z: Tensor) -> Tensor:
        return torch.tan(math.pi * (torch.special.ndtr(z) - 0.5))


def some_pairs(n: int = 40, *, d: int = 2, m: int | None = None, replicas: int = 2, period=None) -> Pairs:
    generator = torch.Generator().manual_seed(n + d)
    points = torch.randn(replicas, n, d, generator=generator, dtype=FLOAT64)
    x = points if m is None else torch.randn(replicas, m, d, generator=generator, dtype=FLOAT64)
    weights = torch.softmax(torch.randn(replicas, n, generator=generator, dtype=FLOAT64), -1)
    return Pairs(x, points, weights, period)


def normal(d: int, scale: float = 1.0) -> Gaussian:
    return Gaussian([0.0] * d, scale**2)


# Identities -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slope", [False, True])
@pytest.mark.parametrize("m", [None, 7])
def test_one_feature_is_exact_for_a_cosine(m, slope):
    omega = torch.tensor([0.7, -1.3], dtype=FLOAT64)
    kernel = Kernel(lambda z: -2 * torch.cos(z @ omega))
    kernel = kernel.slope if slope else kernel
    pairs = some_pairs(m=m)
    found = Fourier(Dirac(omega), n_features=1).sums(kernel, pairs)
    torch.testing.assert_close(found, Blocked().sums(kernel, pairs), rtol=0, atol=1e-14)


@every_sampling
@pytest.mark.parametrize("n_features", [1, 5, 64])
def test_sums_are_those_of_the_kernel_that_the_features_make(n_features, sampling):
    """Ŵ(z) = W(0) mean cos ω·z and ∇Ŵ, by all pairs."""
    strategy = Fourier(normal(2), n_features=n_features, seed=3, sampling=sampling)
    omega = strategy.features()
    assert omega.shape == (n_features, 2)
    approximate = Kernel(lambda z: 0.8 * torch.cos(z @ omega.T).mean(-1))
    for pairs in (some_pairs(), some_pairs(m=9)):
        for kernel, expected in ((Kernel(gaussian), approximate), (Kernel(gaussian).slope, approximate.slope)):
            exact = Blocked().sums(expected, pairs)
            torch.testing.assert_close(strategy.sums(kernel, pairs), exact, rtol=0, atol=1e-14)


def test_own_terms_are_left_out():
    omega = torch.tensor([0.7, -1.3], dtype=FLOAT64)
    kernel = Kernel(lambda z: torch.cos(z @ omega))
    strategy = Fourier(Dirac(omega), n_features=1)
    pairs = some_pairs()
    own = torch.arange(40).flip(0)
    pairs = Pairs(pairs.points[:, own], pairs.points, pairs.weights, own=own)
    for kind in (kernel, kernel.slope):
        torch.testing.assert_close(
            strategy.sums(kind, pairs), Blocked().sums(kind, pairs).detach(), rtol=0, atol=1e-14, check_stride=False
        )


def test_the_approximate_force_is_the_gradient_of_the_approximate_energy():
    """N ∂_{x_i} of ½ Σ w w Ŵ, weights uniform: the approximate dynamics is a gradient flow."""
    strategy, pairs = Fourier(normal(3), n_features=32), some_pairs(20, d=3)
    kernel = Kernel(gaussian)
    weights = torch.full((2, 20), 1 / 20, dtype=FLOAT64)
    x = pairs.points.clone().requires_grad_()
    energy = 0.5 * (weights * strategy.sums(kernel, Pairs(x, x, weights))).sum()
    (slope,) = torch.autograd.grad(20 * energy, [x])
    force = strategy.sums(kernel.slope, Pairs(x.detach(), x.detach(), weights))
    torch.testing.assert_close(force, slope, rtol=0, atol=1e-14)


def test_the_approximate_kernel_is_positive_definite_and_forces_balance():
    strategy, pairs = Fourier(normal(2), n_features=16), some_pairs(50)
    charges = torch.randn(2, 50, generator=torch.Generator().manual_seed(1), dtype=FLOAT64)
    charged = Pairs(pairs.points, pairs.points, charges)
    assert bool(((charges * strategy.sums(Kernel(gaussian), charged)).sum(1) > 0).all())
    forces = strategy.sums(Kernel(gaussian).slope, pairs)
    torch.testing.assert_close((pairs.weights.unsqueeze(-1) * forces).sum(1), torch.zeros(2, 2, dtype=FLOAT64))


def test_a_torus_with_frequencies_on_its_dual_lattice_is_exact():
    """Kuramoto's kernel and its second harmonic, in one component; the other lives on a line."""
    omega = torch.tensor([[1.0, 0.5], [2.0, -1.0]], dtype=FLOAT64)
    kernel = Kernel(lambda z: (torch.cos(z @ omega.T) * torch.tensor([0.75, 0.25], dtype=FLOAT64)).sum(-1))
    spectrum = Mixture([Dirac(w) for w in omega], [0.75, 0.25])
    strategy = Fourier(spectrum, n_features=1024)
    share = float((strategy.features()[:, 0] == 1).double().mean())
    assert abs(share - 0.75) <= 1 / 1024
    pairs = some_pairs(period=(TURN, None))
    turned = Pairs(pairs.x + torch.tensor([2 * TURN, 0.0], dtype=FLOAT64), pairs.points, pairs.weights, pairs.period)
    torch.testing.assert_close(strategy.sums(kernel, turned), strategy.sums(kernel, pairs), rtol=0, atol=1e-12)
    torch.testing.assert_close(strategy.sums(kernel, pairs), Blocked().sums(kernel, pairs), rtol=0, atol=2e-3)


# Errors ---------------------------------------------------------------------------------------------------------------


def scores_over_seeds(monkeypatch, spectrum, sampling: str, n_seeds: int = 200) -> Tensor:
    """(mean over seeds - exact) / its standard error, for sums of W and of ∇W at three points."""
    pairs = some_pairs(30, m=3, replicas=1)
    scores = []
    for kernel in (Kernel(gaussian), Kernel(gaussian).slope):
        strategies = [Fourier(spectrum, n_features=32, seed=s, sampling=sampling) for s in range(n_seeds)]
        # The check of the spectrum would see the fault first.
        monkeypatch.setattr(fourier, "_check", lambda *args: None)
        found = torch.stack([s.sums(kernel, pairs).flatten() for s in strategies])
        exact = Blocked().sums(kernel, pairs).detach().flatten()
        scores.append((found.mean(0) - exact) / (found.std(0) / n_seeds**0.5))
    return torch.cat(scores)


@every_sampling
def test_sums_are_unbiased_over_seeds(monkeypatch, sampling):
    assert float(scores_over_seeds(monkeypatch, normal(2), sampling).abs().max()) <= 4


@every_sampling
def test_a_spectrum_of_another_scale_is_not(monkeypatch, sampling):
    assert float(scores_over_seeds(monkeypatch, normal(2, 1.2), sampling).abs().max()) > 4


def test_the_error_of_independent_features_decays_like_one_over_the_root_of_their_number():
    """Root mean square over 64 seeds; the slope of log error in log D is -1/2, with its own standard error."""
    pairs = some_pairs(30, m=8, replicas=1)
    kernel, spectrum = Kernel(gaussian), normal(2)
    exact = Blocked().sums(kernel, pairs)
    counts = (16, 64, 256, 1024)
    squares = torch.stack(
        [
            torch.stack([(strategy.sums(kernel, pairs) - exact).square().mean() for strategy in strategies])
            for strategies in ([Fourier(spectrum, d, s, "independent") for s in range(64)] for d in counts)
        ]
    )
    mean = squares.mean(1)
    at = torch.tensor(counts, dtype=FLOAT64).log()
    at = (at - at.mean()) / (at - at.mean()).square().sum()
    slope = 0.5 * float((at * mean.log()).sum())
    error = 0.5 * float((at.square() * squares.var(1) / 64 / mean.square()).sum().sqrt())
    assert abs(slope + 0.5) <= 4 * error
    assert error <= 0.05


def test_sobol_points_err_several_times_less_in_the_plane():
    pairs = some_pairs(30, m=8, replicas=1)
    kernel, spectrum = Kernel(gaussian).slope, normal(2)
    exact = Blocked().sums(kernel, pairs).detach()
    independent, sobol = (
        torch.stack([(Fourier(spectrum, 512, s, how).sums(kernel, pairs) - exact).square().mean() for s in range(12)])
        for how in ("independent", "sobol")
    )
    assert float(sobol.mean().sqrt()) <= float(independent.mean().sqrt()) / 5


def test_a_spectrum_without_moments_serves():
    kernel = Kernel(lambda z: torch.exp(-z.abs().sum(-1)))
    pairs = some_pairs(d=1)
    found = Fourier(Cauchy(), n_features=4096).sums(kernel, pairs)
    torch.testing.assert_close(found, Blocked().sums(kernel, pairs), rtol=0, atol=2e-3)


# Features, blocks, derivatives ----------------------------------------------------------------------------------------


@every_sampling
def test_features_are_a_function_of_seed_and_number(sampling):
    torch.manual_seed(1)
    first = Fourier(normal(2), 33, 5, sampling).features()
    torch.manual_seed(2)
    assert torch.equal(first, Fourier(normal(2), 33, 5, sampling).features())
    assert not torch.equal(first, Fourier(normal(2), 33, 6, sampling).features())
    assert torch.equal(torch.randn(1), torch.randn(1, generator=torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("period", [None, TURN])
def test_blocks_of_rows_change_rounding_only(monkeypatch, period):
    spectrum = normal(2) if period is None else Dirac([1.0, 2.0])
    function = gaussian if period is None else lambda z: torch.cos(z[..., 0] + 2 * z[..., 1])
    pairs = some_pairs(50, m=31, period=period)
    strategy = Fourier(spectrum, n_features=16)
    for kernel in (Kernel(function), Kernel(function).slope):
        whole = strategy.sums(kernel, pairs)
        with monkeypatch.context() as patch:
            patch.setattr(fourier, "PHASES", 16 * 2 * 7)
            torch.testing.assert_close(strategy.sums(kernel, pairs), whole, rtol=0, atol=1e-15)


def test_far_from_the_origin_single_precision_keeps_its_digits():
    pairs = some_pairs(50)
    strategy = Fourier(normal(2))
    near = Pairs(pairs.x.float(), pairs.points.float(), pairs.weights.float())
    shift = torch.tensor([4096.0, -8192.0])
    rounded = (near.points + shift) - shift
    here = strategy.sums(Kernel(gaussian), Pairs(rounded, rounded, near.weights))
    there = strategy.sums(Kernel(gaussian), Pairs(rounded + shift, rounded + shift, near.weights))
    torch.testing.assert_close(there, here, rtol=0, atol=1e-6)


@pytest.mark.parametrize("place", [0, 1, -1])
def test_an_outlier_costs_the_others_no_digits(place):
    """Single precision keeps those of a cloud at the origin; it has none left of sums between the two."""
    pairs, strategy = some_pairs(50), Fourier(normal(2))
    points = pairs.points.float()
    points[0, place, 0] = points[1, place, 1] = 1e7
    rest = torch.arange(50) != place % 50
    weights = torch.where(rest, pairs.weights, 0).float()
    found = strategy.sums(Kernel(gaussian), Pairs(points[:, rest], points, weights))
    there = Pairs(points.double()[:, rest], points.double()[:, rest], weights.double()[:, rest])
    torch.testing.assert_close(found.double(), strategy.sums(Kernel(gaussian), there), rtol=0, atol=1e-5)


def test_sums_are_differentiable_in_points_weights_and_parameters(monkeypatch):
    # Every value of a parameter makes another kernel, to be checked again.
    monkeypatch.setattr(fourier, "_check", lambda *args: None)
    pairs = some_pairs(5, m=3, replicas=1)
    size = torch.tensor(0.8, dtype=FLOAT64, requires_grad=True)

    def sums(x: Tensor, points: Tensor, weights: Tensor, size: Tensor) -> Tensor:
        kernel = Kernel(lambda z: size * torch.exp(-z.square().sum(-1) / 2))
        strategy = Fourier(normal(2), n_features=8)
        both = [strategy.sums(k, Pairs(x, points, weights)).flatten() for k in (kernel, kernel.slope)]
        return torch.cat(both)

    inputs = [z.clone().requires_grad_() for z in (pairs.x, pairs.points, pairs.weights)]
    assert torch.autograd.gradcheck(sums, [*inputs, size])


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"n_features": 0}, "n_features = 0; expected at least 1"),
        ({"seed": -1}, "seed = -1; expected 0 <= seed"),
        ({"seed": 1 << 32}, r"expected 0 <= seed < 2\^32"),
        ({"sampling": "halton"}, "sampling = 'halton'"),
    ],
)
def test_parameters_out_of_range_are_refused(parameters, message):
    with pytest.raises(ValueError, match=message):
        Fourier(normal(2), **parameters)


def test_what_is_no_law_of_frequencies_is_refused():
    with pytest.raises(TypeError, match="is no law of frequencies"):
        Fourier(torch.randn)


@pytest.mark.parametrize("d", [1, 2, 8])
@pytest.mark.parametrize("scale", [0.97, 1.03])
def test_a_spectrum_three_per_cent_off_is_refused_and_the_right_one_is_not(d, scale):
    pairs = some_pairs(5, d=d)
    Fourier(normal(d)).sums(Kernel(gaussian), pairs)
    with pytest.raises(ValueError, match="the spectrum is not that of gaussian"):
        Fourier(normal(d, scale)).sums(Kernel(gaussian), pairs)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda z: z * gaussian(z).unsqueeze(-1),
            r"not known as a gradient.* interaction\(W, strategy=Fourier\(...\)\)\.intrinsic_derivative",
        ),
        (lambda z: 1 - gaussian(z) / 0.8, "is 0.0 at 0"),
        (lambda z: 1 / z.norm(dim=-1), "is inf at 0"),
        (lambda z: gaussian(z) + 0.2, "W must be positive definite up to its sign"),
        (lambda z: gaussian(z) * (1 + 0.1 * torch.tanh(z[..., 0])), "the spectrum is not that of"),
        (lambda z: gaussian(z) + 0.4 * torch.exp(-(z.norm(dim=-1) - 16).square()), r"at z = .*E cos\(ω·z\) = "),
        (lambda z: gaussian(z) + 0.05 * (z.norm(dim=-1) > 80), "the spectrum is not that of"),
        (lambda z: torch.where(z.norm(dim=-1) > 3, math.nan, gaussian(z)), "the spectrum is not that of"),
    ],
)
def test_kernels_without_that_spectrum_are_refused(function, message):
    with pytest.raises(ValueError, match=message):
        Fourier(normal(2)).sums(Kernel(function), some_pairs(5))


def test_a_spectrum_of_another_dimension_is_refused():
    with pytest.raises(ValueError, match="frequencies in dimension 3 and particles live in 2"):
        Fourier(normal(3)).sums(Kernel(gaussian), some_pairs(5))


def test_frequencies_off_a_torus_dual_lattice_are_refused():
    with pytest.raises(ValueError, match=r"component 1 has period 6.28319, .* whole multiple of 2π/period"):
        Fourier(normal(2)).sums(Kernel(gaussian), some_pairs(5, period=(None, TURN)))
