"""Measures and laws: sums against explicit loops, laws against their exact moments."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mfsde import Dirac, EmpiricalMeasure, Gaussian, Law, Mixture, Uniform, measure
from mfsde.pairwise import blocked

FLOAT64 = torch.float64
CORRELATED = [[2.0, 0.6, -0.3], [0.6, 1.0, 0.2], [-0.3, 0.2, 0.5]]

LAWS: dict[str, Law] = {
    "gaussian in d=1": Gaussian([0.3], [[2.0]]),
    "gaussian in d=2": Gaussian([0.3, -1.0], [[2.0, 0.6], [0.6, 1.0]]),
    "gaussian in d=3": Gaussian([0.3, -1.0, 2.0], CORRELATED),
    "gaussian in d=5": Gaussian([1.0, 2.0, 3.0, 4.0, 5.0], 0.7),
    "singular gaussian": Gaussian([0.5, 1.0], [[1.0, 2.0], [2.0, 4.0]]),
    "gaussian with a fixed component": Gaussian([0.5, 1.0], [[0.0, 0.0], [0.0, 2.0]]),
    "uniform in d=1": Uniform(-1.0, 2.0),
    "uniform in d=2": Uniform([-1.0, 0.0], [2.0, 0.5]),
    "uniform in d=3": Uniform([-1.0, 0.0, 1.0], [2.0, 0.5, 4.0]),
    "dirac": Dirac([1.5]),
    "dirac in d=3": Dirac([1.5, 0.0, -2.0]),
    "mixture in d=1": Mixture([Gaussian(-2.0, 0.3), Gaussian(1.0, 1.2)], [0.3, 0.7]),
    "mixture with an atom": Mixture([Uniform(-1.0, 0.0), Dirac(1.0)], [0.6, 0.4]),
    "mixture in d=2": Mixture([Gaussian([-2.0, 0.0], 0.3), Uniform([0.0, 0.0], [1.0, 3.0])], [0.3, 0.7]),
    "mixture in d=3": Mixture([Gaussian([0.0, 1.0, 2.0], CORRELATED), Dirac([1.0, 1.0, 1.0])], [0.5, 0.5]),
}
IN_ONE_DIMENSION = [name for name, law in LAWS.items() if law.dim == 1]
WITH_DENSITY_IN_ONE = ["gaussian in d=1", "uniform in d=1", "mixture in d=1"]
every_law = pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normals(*shape: int, seed: int = 0, dtype: torch.dtype = FLOAT64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def some_measure(*lead: int, n: int = 6, d: int = 2, weighted: bool = False, period=None) -> EmpiricalMeasure:
    weights = torch.softmax(normals(*lead, n, seed=1), -1) if weighted else None
    return EmpiricalMeasure(normals(*lead, n, d), weights, period=period)


# Empirical measures ---------------------------------------------------------------------------------------------------


def test_uniform_weights_are_one_over_n():
    mu = some_measure(3, n=7)
    assert mu.is_uniform
    assert torch.equal(mu.weights, torch.full((3, 7), 1 / 7, dtype=FLOAT64))


@pytest.mark.parametrize("weighted", [False, True])
def test_mean_covariance_and_integral_are_weighted_sums(weighted):
    mu = some_measure(2, n=5, d=3, weighted=weighted)
    for r in range(2):
        x, w = mu.points[r], mu.weights[r]
        mean = sum(w[i] * x[i] for i in range(5))
        covariance = sum(w[i] * torch.outer(x[i] - mean, x[i] - mean) for i in range(5))
        fourth = sum(w[i] * x[i, 0] ** 4 for i in range(5))
        torch.testing.assert_close(mu.mean()[r, 0], mean, rtol=0, atol=1e-14)
        torch.testing.assert_close(mu.covariance()[r], covariance, rtol=0, atol=1e-14)
        torch.testing.assert_close(mu.integrate(lambda y: y[..., 0] ** 4)[r], fourth, rtol=1e-14, atol=0)


def test_covariance_divides_by_n_in_every_dimension():
    one = EmpiricalMeasure(torch.tensor([[0.0], [2.0]], dtype=FLOAT64))
    two = EmpiricalMeasure(torch.tensor([[0.0, 0.0], [2.0, 4.0]], dtype=FLOAT64))
    assert one.covariance().tolist() == [[1.0]]
    assert two.covariance().tolist() == [[1.0, 2.0], [2.0, 4.0]]


@given(
    lead=st.lists(st.integers(1, 3), max_size=2),
    n=st.integers(1, 6),
    d=st.integers(1, 4),
    out=st.lists(st.integers(1, 3), max_size=2),
    dtype=st.sampled_from([torch.float32, FLOAT64]),
    weighted=st.booleans(),
)
def test_shapes_and_dtypes_follow_the_points(lead, n, d, out, dtype, weighted):
    x = normals(*lead, n, d, dtype=dtype)
    weights = torch.softmax(normals(*lead, n, seed=1, dtype=dtype), -1) if weighted else None
    mu = EmpiricalMeasure(x, weights)
    results = {
        (*lead, n): mu.weights,
        (*lead, 1, d): mu.mean(),
        (*lead, d, d): mu.covariance(),
        (*lead, *out): mu.integrate(lambda y: y.sum(-1).reshape(*lead, n, *(1 for _ in out)).expand(*lead, n, *out)),
    }
    for shape, value in results.items():
        assert tuple(value.shape) == shape
        assert value.dtype == dtype
    for include_self in (True,) if n == 1 else (True, False):
        smoothed = mu.convolve(lambda z: z.square().sum(-1), x, include_self=include_self)
        assert smoothed.shape == x.shape[:-1]
        assert smoothed.dtype == dtype


@given(n=st.integers(1, 6), d=st.integers(1, 3), which=st.integers(0, 5), share=st.floats(0.01, 0.99))
def test_splitting_a_particle_changes_no_integral(n, d, which, share):
    mu = some_measure(n=n, d=d, weighted=True)
    i = which % n
    w = mu.weights.clone()
    w[i] *= share
    split = EmpiricalMeasure(
        torch.cat([mu.points, mu.points[i : i + 1]]), torch.cat([w, (1 - share) * mu.weights[i : i + 1]])
    )
    torch.testing.assert_close(split.mean(), mu.mean(), rtol=0, atol=1e-14)
    torch.testing.assert_close(split.covariance(), mu.covariance(), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("points", "weights", "error", "message"),
    [
        ([[0.0]], None, TypeError, "needs a floating tensor"),
        (torch.zeros(3, 1, dtype=torch.int64), None, TypeError, "needs a floating tensor"),
        (torch.zeros(3), None, ValueError, r"N scalars are written x\[:, None\]"),
        (torch.zeros(0, 2), None, ValueError, "N >= 1"),
        (torch.zeros(2, 1), torch.tensor([0.5]), ValueError, "weights have shape"),
        (torch.zeros(2, 1), torch.tensor([1.5, -0.5]), ValueError, "non-negative and sum to 1"),
        (torch.zeros(2, 1), torch.tensor([1.0, 1.0]), ValueError, "Divide by weights.sum"),
        (torch.zeros(2, 1), torch.tensor([math.nan, 1.0]), ValueError, "non-negative and sum to 1"),
    ],
)
def test_a_measure_refuses_what_is_none(points, weights, error, message):
    with pytest.raises(error, match=message):
        EmpiricalMeasure(points, weights)


def test_integrate_refuses_a_function_that_drops_the_particle_axis():
    with pytest.raises(ValueError, match="f must keep the particle axis"):
        some_measure(2).integrate(lambda x: x.mean(-2))


# Rounding does not depend on threads or on the batch ------------------------------------------------------------------


def moment_of(moment: str, x: Tensor, weights: Tensor | None) -> Tensor:
    return getattr(EmpiricalMeasure(x, weights), moment)()


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("moment", ["mean", "covariance"])
@pytest.mark.parametrize(
    ("n", "d"),
    [
        (7, 1),
        (7, 2),
        (7, 3),
        (1000, 3),
        (measure.BLOCK, 1),
        (measure.BLOCK, 8),
        (3 * measure.BLOCK + 5, 8),
        (80_001, 1),
    ],
)
def test_moments_have_the_same_bits_for_every_thread_count_and_batch(n, d, moment, weighted, dtype):
    x = normals(3, n, d, dtype=dtype)
    weights = torch.softmax(normals(3, n, seed=1, dtype=dtype), -1) if weighted else None
    batch = moment_of(moment, x, weights)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert torch.equal(moment_of(moment, x, weights), batch)
        for r in range(3):
            for row in (r, slice(r, r + 1)):
                assert torch.equal(moment_of(moment, x[row], None if weights is None else weights[row]), batch[row])


@pytest.mark.parametrize("n", [40, measure.BLOCK + 3])
def test_a_covariance_in_many_dimensions_does_not_depend_on_the_batch(n):
    x = normals(3, n, measure.ELEMENTWISE_DIM + 4)
    batch = EmpiricalMeasure(x).covariance()
    for r in range(3):
        assert torch.equal(EmpiricalMeasure(x[r]).covariance(), batch[r])
        torch.testing.assert_close(batch[r], torch.cov(x[r].T, correction=0), rtol=0, atol=1e-13)


# Convolution ----------------------------------------------------------------------------------------------------------


def convolved_by_loops(mu: EmpiricalMeasure, kernel, x: Tensor, include_self: bool = True) -> Tensor:
    rows = []
    for i in range(x.shape[0]):
        others = [j for j in range(mu.n_particles) if include_self or j != i]
        total = sum(mu.weights[j] * kernel(x[i] - mu.points[j]) for j in others)
        rows.append(total if include_self else total / (1 - mu.weights[i]))
    return torch.stack(rows)


KERNELS = {
    "scalar": lambda z: torch.exp(-z.square().sum(-1)),
    "vector": lambda z: z * torch.exp(-z.square().sum(-1, keepdim=True)),
    "matrix": lambda z: z.unsqueeze(-1) * torch.tanh(z).unsqueeze(-2),
}


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("include_self", [False, True])
def test_convolve_is_the_double_loop(kernel, weighted, include_self):
    mu = some_measure(2, n=5, weighted=weighted)
    found = mu.convolve(kernel, mu.points, include_self=include_self)
    for r in range(2):
        alone = EmpiricalMeasure(mu.points[r], mu.weights[r])
        expected = convolved_by_loops(alone, kernel, alone.points, include_self)
        torch.testing.assert_close(found[r], expected, rtol=0, atol=1e-14)


def test_convolve_at_other_points_is_the_double_loop():
    mu, x = some_measure(n=5, weighted=True), normals(3, 2, seed=5)
    expected = convolved_by_loops(mu, KERNELS["vector"], x)
    torch.testing.assert_close(mu.convolve(KERNELS["vector"], x), expected, rtol=0, atol=1e-14)


def test_a_constant_kernel_gives_one_with_and_without_self():
    mu = some_measure(n=5, weighted=True)
    for include_self in (False, True):
        ones = mu.convolve(lambda z: torch.ones_like(z[..., 0]), mu.points, include_self=include_self)
        torch.testing.assert_close(ones, torch.ones(5, dtype=FLOAT64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize("floats", [1, 25, 60])
def test_convolve_is_the_same_in_any_blocks(monkeypatch, floats, include_self):
    mu = some_measure(2, n=7, weighted=True)
    whole = mu.convolve(KERNELS["vector"], mu.points, include_self=include_self)
    rows = []

    def counting(z: Tensor) -> Tensor:
        rows.append(z.shape[-3])
        return KERNELS["vector"](z)

    monkeypatch.setattr(blocked, "PAIRWISE_FLOATS", floats)
    cut = mu.convolve(counting, mu.points, include_self=include_self)
    assert len(rows) > 1
    assert sum(rows) == 7
    torch.testing.assert_close(cut, whole, rtol=0, atol=1e-15)


def test_blocks_do_not_mix_replicas_when_x_is_shared_by_them(monkeypatch):
    mu, x = some_measure(3, n=4), normals(5, 2, seed=5)
    whole = mu.convolve(KERNELS["scalar"], x)
    assert whole.shape == (3, 5)
    monkeypatch.setattr(blocked, "PAIRWISE_FLOATS", 1)
    torch.testing.assert_close(mu.convolve(KERNELS["scalar"], x), whole, rtol=0, atol=1e-15)


@pytest.mark.parametrize("floats", [1, 25])
@pytest.mark.parametrize("include_self", [False, True])
def test_autograd_through_blocks_is_that_of_the_whole(monkeypatch, floats, include_self):
    def gradients() -> tuple[Tensor, ...]:
        x = normals(2, 7, 2).requires_grad_()
        weights = torch.softmax(normals(2, 7, seed=1), -1).requires_grad_()
        smoothed = EmpiricalMeasure(x, weights).convolve(KERNELS["vector"], x, include_self=include_self)
        return torch.autograd.grad((smoothed * normals(2, 7, 2, seed=2)).sum(), [x, weights])

    def without_blocks() -> tuple[Tensor, ...]:
        x = normals(2, 7, 2).requires_grad_()
        weights = torch.softmax(normals(2, 7, seed=1), -1).requires_grad_()
        pairs = KERNELS["vector"](x.unsqueeze(-2) - x.unsqueeze(-3))
        pairs = pairs if include_self else pairs * (1 - torch.eye(7, dtype=FLOAT64)).unsqueeze(-1)
        smoothed = (pairs * weights[:, None, :, None]).sum(-2)
        smoothed = smoothed if include_self else smoothed / (1 - weights).unsqueeze(-1)
        return torch.autograd.grad((smoothed * normals(2, 7, 2, seed=2)).sum(), [x, weights])

    monkeypatch.setattr(blocked, "PAIRWISE_FLOATS", floats)
    for found, expected in zip(gradients(), without_blocks(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_a_singular_kernel_is_finite_without_self_and_so_is_its_gradient():
    def coulomb(z: Tensor) -> Tensor:
        return 1 / z.square().sum(-1).sqrt()

    x = normals(5, 2).requires_grad_()
    value = EmpiricalMeasure(x).convolve(coulomb, x, include_self=False)
    (slope,) = torch.autograd.grad(value.sum(), [x])
    at = x.detach()
    for i in range(5):
        others = [j for j in range(5) if j != i]
        assert value[i].item() == pytest.approx(sum(coulomb(at[i] - at[j]).item() for j in others) / 4, rel=1e-13)
        # Each pair appears in the rows of both its particles.
        pull = sum(-2 * (at[i] - at[j]) * coulomb(at[i] - at[j]) ** 3 for j in others) / 4
        torch.testing.assert_close(slope[i], pull, rtol=1e-12, atol=0)
    with_self = EmpiricalMeasure(at).convolve(coulomb, at)
    assert torch.isinf(with_self).all()


@pytest.mark.parametrize(("period", "lengths"), [(2.0, (2.0, 2.0)), ([2.0, None], (2.0, None)), ([3.0, 1.0], (3, 1))])
@pytest.mark.parametrize("include_self", [False, True])
def test_differences_on_a_torus_are_the_shortest(period, lengths, include_self):
    mu = EmpiricalMeasure(3 * normals(6, 2), period=period)

    def shortest(difference: Tensor) -> Tensor:
        images = [[float(z) + k * (p or 0) for k in range(-15, 16)] for z, p in zip(difference, lengths, strict=True)]
        return torch.tensor([min(each, key=abs) for each in images], dtype=FLOAT64)

    found = mu.convolve(KERNELS["vector"], mu.points, include_self=include_self)
    expected = convolved_by_loops(mu, lambda z: KERNELS["vector"](shortest(z)), mu.points, include_self)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    on_the_line = EmpiricalMeasure(mu.points).convolve(KERNELS["vector"], mu.points, include_self=include_self)
    assert (found - on_the_line).abs().max() > 0.01


@pytest.mark.parametrize("period", [[1.0], -1.0, [1.0, 0.0]])
def test_a_period_that_does_not_fit_is_refused(period):
    mu = EmpiricalMeasure(torch.zeros(2, 2), period=period)
    with pytest.raises(ValueError, match="does not fit dimension 2"):
        mu.convolve(KERNELS["scalar"], mu.points)


def test_leaving_out_self_needs_the_points_and_company():
    with pytest.raises(ValueError, match="x must be the measure's own points"):
        some_measure().convolve(KERNELS["scalar"], normals(6, 2, seed=9), include_self=False)
    one = some_measure(n=1)
    with pytest.raises(ValueError, match="at least two particles"):
        one.convolve(KERNELS["scalar"], one.points, include_self=False)


# Laws -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IN_ONE_DIMENSION)
def test_samples_increase_with_their_variates_in_one_dimension(name):
    z = normals(500, LAWS[name].n_variates).sort(0).values
    steps = LAWS[name].from_variates(z).diff(dim=0)
    assert (steps >= 0).all()
    assert name == "dirac" or (steps > 0).any()


@every_law
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
@pytest.mark.parametrize(("few", "many"), [(20, 50), (1, 2), (7, 33), (1000, 20001)])
def test_the_first_samples_do_not_depend_on_how_many_follow(law, dtype, few, many):
    z = normals(many, law.n_variates, dtype=dtype)
    everything = law.from_variates(z)
    assert everything.shape == (many, law.dim)
    assert everything.dtype == dtype
    assert torch.equal(law.from_variates(z[:few]), everything[:few])
    assert torch.equal(law.from_variates(z[:few].clone().expand(3, few, law.n_variates))[1], everything[:few])


@every_law
def test_the_quadrature_has_the_exact_mean_and_covariance(law):
    mu = law.as_measure()
    assert mu.points.dtype == FLOAT64
    torch.testing.assert_close(mu.mean()[0], law.mean, rtol=0, atol=1e-11)
    torch.testing.assert_close(mu.covariance(), law.cov, rtol=0, atol=1e-11)


def test_the_moments_of_a_mixture_are_those_of_its_density():
    law = LAWS["mixture in d=1"]
    x = torch.linspace(-12, 12, 20001, dtype=FLOAT64)
    p = law.log_prob(x[:, None]).exp()
    mean = torch.trapezoid(x * p, x)
    assert mean.item() == pytest.approx(law.mean.item(), abs=1e-10)
    assert torch.trapezoid((x - mean) ** 2 * p, x).item() == pytest.approx(law.cov.item(), abs=1e-10)


def moments_agree(samples: Tensor, mean: Tensor, cov: Tensor) -> bool:
    """Sample mean and covariance within 4 standard errors; the covariance's error comes from the samples' products."""
    centred = samples - mean
    products = centred.unsqueeze(-1) * centred.unsqueeze(-2)
    errors = [samples.mean(0) - mean, products.mean(0) - cov]
    bounds = [4 * z.std(0) / len(samples) ** 0.5 + 1e-12 for z in (samples, products)]
    return all(bool((e.abs() <= b).all()) for e, b in zip(errors, bounds, strict=True))


@every_law
def test_sample_moments_are_the_laws_and_those_of_a_wrong_law_are_not(law):
    samples = law.sample(40_000, generator(3))
    assert moments_agree(samples, law.mean, law.cov)
    assert not moments_agree(samples, law.mean + 0.1, law.cov)
    assert not moments_agree(samples, law.mean, 1.2 * law.cov + 0.001 * torch.eye(law.dim))


def test_sampling_is_a_function_of_the_generator():
    law = LAWS["mixture in d=2"]
    assert torch.equal(law.sample(10, generator(1)), law.sample(10, generator(1)))
    assert not torch.equal(law.sample(10, generator(1)), law.sample(10, generator(2)))


@pytest.mark.parametrize("name", WITH_DENSITY_IN_ONE)
def test_a_density_integrates_to_one_and_to_the_distribution_function(name):
    law = LAWS[name]
    # Midpoints of cells whose edges hit the uniform law's: the midpoint rule is then exact for it.
    edges = torch.linspace(-16, 16, 32 * 400 + 1, dtype=FLOAT64)
    middle = (edges[1:] + edges[:-1]) / 2
    mass = (law.log_prob(middle[:, None]).exp() / 400).cumsum(0)
    assert mass[-1].item() == pytest.approx(1.0, abs=1e-9)
    torch.testing.assert_close(mass, law.cdf(edges[1:]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["gaussian in d=2", "uniform in d=2", "mixture in d=2"])
def test_a_density_in_the_plane_integrates_to_one(name):
    edges = torch.linspace(-12, 12, 24 * 16 + 1, dtype=FLOAT64)
    middle = (edges[1:] + edges[:-1]) / 2
    density = LAWS[name].log_prob(torch.cartesian_prod(middle, middle)).exp()
    assert (density.sum() / 16**2).item() == pytest.approx(1.0, abs=1e-9)


def test_log_prob_of_a_gaussian_is_torchs():
    law = LAWS["gaussian in d=3"]
    x = normals(2, 4, 3)
    expected = torch.distributions.MultivariateNormal(law.mean, law.cov).log_prob(x)
    torch.testing.assert_close(law.log_prob(x), expected, rtol=1e-12, atol=0)


def test_log_prob_of_a_box_is_minus_the_log_of_its_volume_in_double_precision():
    law = Uniform([-1.0, 0.0], [2.0, 0.5])
    x = torch.tensor([[0.0, 0.1], [0.0, 0.6], [-2.0, 0.1]], dtype=FLOAT64)
    expected = torch.tensor([-math.log(1.5), -math.inf, -math.inf], dtype=FLOAT64)
    torch.testing.assert_close(law.log_prob(x), expected, rtol=0, atol=1e-15)
    assert law.log_prob(x.float()).dtype == torch.float32


@pytest.mark.parametrize("name", WITH_DENSITY_IN_ONE)
def test_quantile_inverts_the_distribution_function(name):
    law = LAWS[name]
    u = torch.linspace(0.001, 0.999, 999, dtype=FLOAT64)
    torch.testing.assert_close(law.cdf(law.quantile(u)), u, rtol=0, atol=1e-13)
    x = law.quantile(u[::100])
    torch.testing.assert_close(law.quantile(law.cdf(x)), x, rtol=0, atol=1e-11)


def test_the_quantile_of_an_atom_is_the_atom():
    law = LAWS["mixture with an atom"]
    u = torch.tensor([0.3, 0.6, 0.61, 0.99], dtype=FLOAT64)
    torch.testing.assert_close(law.quantile(u), torch.tensor([-0.5, 0.0, 1.0, 1.0], dtype=FLOAT64), rtol=0, atol=1e-12)
    assert torch.equal(Dirac(2.0).quantile(u), torch.full_like(u, 2.0))
    assert Dirac(2.0).cdf(torch.tensor([1.9, 2.0])).tolist() == [0.0, 1.0]


def test_a_degenerate_gaussian_lives_on_its_line():
    x = LAWS["singular gaussian"].sample(100, generator())
    torch.testing.assert_close(x[:, 1] - 1.0, 2 * (x[:, 0] - 0.5), rtol=0, atol=1e-12)
    point = Gaussian([1.0], [[0.0]])
    assert torch.equal(point.sample(3, generator()), torch.ones(3, 1, dtype=FLOAT64))
    assert point.cdf(torch.tensor([0.9, 1.0])).tolist() == [0.0, 1.0]


def test_numbers_stand_for_one_dimension_and_multiples_of_the_identity():
    assert Gaussian(0.5, 2.0).cov.tolist() == [[2.0]]
    assert Gaussian([0.0, 1.0], 2.0).cov.tolist() == [[2.0, 0.0], [0.0, 2.0]]
    assert Uniform(0.0, [1.0, 2.0]).dim == 2
    assert Dirac(3.0).point.tolist() == [3.0]
    assert Mixture([Dirac(0.0), Dirac(1.0)]).weights.tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gaussian([0.0, 0.0], [[1.0]]), r"expected \(d,\) and \(d, d\)"),
        (lambda: Gaussian([0.0], [[-1.0]]), "not a covariance"),
        (lambda: Gaussian([0.0, 0.0], [[1.0, 0.5], [0.0, 1.0]]), "not a covariance"),
        (lambda: Gaussian([0.0, 0.0], [[1.0, 2.0], [2.0, 1.0]]), "not a covariance"),
        (lambda: Gaussian(math.nan, 1.0), "mean = .* is not finite"),
        (lambda: Gaussian(0.0, math.inf), "cov = .* is not finite"),
        (lambda: Uniform(1.0, 1.0), "expected low < high"),
        (lambda: Uniform([0.0, 2.0], [1.0, 1.0]), "expected low < high"),
        (lambda: Uniform(0.0, math.inf), "high = .* is not finite"),
        (lambda: Dirac([[1.0]]), r"expected a point of shape \(d,\)"),
        (lambda: Dirac(math.nan), "not finite"),
        (lambda: Mixture([]), "laws of one dimension"),
        (lambda: Mixture([Dirac(0.0), Dirac([0.0, 1.0])]), "laws of one dimension"),
        (lambda: Mixture([Dirac(0.0), Dirac(1.0)], [0.5, 0.6]), "not a probability"),
        (lambda: Mixture([Dirac(0.0), Dirac(1.0)], [1.5, -0.5]), "not a probability"),
        (lambda: Mixture([Dirac(0.0), Dirac(1.0)], [1.0]), "not a probability"),
        (lambda: LAWS["singular gaussian"].log_prob(torch.zeros(2, dtype=FLOAT64)), "no density"),
        (lambda: LAWS["gaussian in d=2"].quantile(torch.tensor(0.5)), "one dimension only"),
        (lambda: LAWS["uniform in d=2"].cdf(torch.tensor(0.5)), "one dimension only"),
        (lambda: LAWS["mixture in d=2"].quantile(torch.tensor(0.5)), "one dimension only"),
        (lambda: LAWS["dirac in d=3"].quantile(torch.tensor(0.5)), "one dimension only"),
    ],
)
def test_a_law_refuses_what_it_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()
