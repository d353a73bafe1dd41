"""Schemes: what is exact is tested bit for bit, laws and orders against their theory with measured standard errors.

Every statistical check has a twin with a planted fault that it must reject.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
import torchsde
from torch import Tensor

import mfsde
from mfsde import methods, solver
from mfsde.model import Equation
from mfsde.noise import Noise, Stream
from mfsde.scenarios import MeanFieldOU

DOUBLE = {"dtype": torch.float64}


# What is measured, and how precisely


def positions(scenario: Any, **settings: Any) -> Tensor:
    """The saved states of a float64 run, (time, R, N, d)."""
    return torch.from_numpy(mfsde.simulate(scenario, **{**DOUBLE, **settings})["position"].values)


def final(scenario: Any, **settings: Any) -> Tensor:
    """The last state, (R, N, d)."""
    return positions(scenario, **settings)[-1]


def agrees(samples: Tensor, expected: float, bias: float = 0.0) -> bool:
    """|mean - expected| within 4 standard errors of independent samples and a bias known to be at most `bias`."""
    standard_error = float(samples.std()) / math.sqrt(len(samples))
    return abs(float(samples.mean()) - expected) <= 4 * standard_error + bias


@dataclass(frozen=True)
class Slope:
    value: float
    stderr: float
    limit: float  # of the root mean square as h -> 0, in units of its smallest one

    def is_order(self, p: float, curvature: float = 0.05) -> bool:
        """Slope p within 3 standard errors and the next order's share, and an error that vanishes in the limit."""
        return abs(self.value - p) <= 3 * self.stderr + curvature and abs(self.limit) < 0.3


def slope(h: list[float], squares: Tensor, p: float = 1.0) -> Slope:
    """Of log √(mean square) against log h; its standard error by deleting one replica.    squares: (len(h), R).

    The limit is Richardson's: e = a + b h^p through the two smallest h, which differ by a factor 2.
    """
    x = torch.tensor(h, dtype=torch.float64).log()
    weights = (x - x.mean()) / (x - x.mean()).square().sum()
    n = squares.shape[1]
    value = float(weights @ squares.mean(1).log() / 2)
    without = (squares.sum(1, keepdim=True) - squares) / (n - 1)
    stderr = float(torch.sqrt((n - 1) / n * (weights @ without.log() / 2 - value).square().sum()))
    error = squares.mean(1).sqrt()
    limit = (2**p * error[-1] - error[-2]) / (2**p - 1) / error[-1]
    return Slope(value, stderr, float(limit))


def strong_errors(
    scenario: Any, method: str, steps: list[int], fine: int, exact: Tensor, seed: int = 3, **settings: Any
) -> Tensor:
    """Mean squares over particles at time 1 against `exact`, on the path of `fine` steps: (len(steps), R)."""
    r, n = exact.shape[:2]
    return torch.stack(
        [
            (
                final(
                    scenario, method=method, n_particles=n, n_replicas=r, horizon=1.0, dt=1 / k, seed=seed,
                    noise=Noise(seed, substeps=fine // k), **settings,
                ) - exact
            ).square().mean((1, 2))
            for k in steps
        ]
    )  # fmt: skip


def torchsde_end(
    scenario: Any, x: Tensor, n_steps: int, dt: float, noise: Noise, method: str, **options: Any
) -> Tensor:
    """The end of torchsde's own scheme in torchsde's own loop, on the same particle system and noise."""
    ours = solver._scheme(Equation(scenario, x), x, solver.Clock(dt), noise, method)
    theirs = solver.torchsde_methods.select(method=method, sde_type=ours.sde.sde_type)(
        sde=ours.sde, bm=ours.bm, dt=1.0, adaptive=False, rtol=0.0, atol=0.0, dt_min=0.0, options=options
    )
    with torch.no_grad():
        y = x.flatten(0, 1) if ours.sde.rows else x
        return theirs.integrate(y, torch.tensor([0.0, n_steps], dtype=torch.float64), ())[0][-1].view(x.shape)


# Equations


@dataclass(frozen=True)
class Geometric:
    """dX = aX dt + sX dW,  X_t = exp((a - s²/2)t + sW)."""

    rate: float = 0.3
    sigma: float = 0.6

    def drift(self, t, x, mu):
        return self.rate * x

    def diffusion(self, t, x, mu):
        return self.sigma * x

    def initial(self):
        return mfsde.Dirac([1.0])

    def exact(self, w: Tensor) -> Tensor:
        return torch.exp(self.rate - self.sigma**2 / 2 + self.sigma * w)


@dataclass(frozen=True)
class HyperbolicSine:
    """dX = ½s²X dt + s√(1 + X²) dW,  X = sinh(arsinh X_0 + sW) by Itô's formula. Read as Stratonovich it differs."""

    sigma: float = 0.7

    def drift(self, t, x, mu):
        return 0.5 * self.sigma**2 * x

    def diffusion(self, t, x, mu):
        return self.sigma * torch.sqrt(1 + x * x)

    def initial(self):
        return mfsde.Dirac([0.5])

    def exact(self, w: Tensor) -> Tensor:
        return torch.sinh(math.asinh(0.5) + self.sigma * w)


@dataclass(frozen=True)
class Additive:
    """dX = (-X - sin 2X + ½ cos t) dt + (2 + t) dW: nonlinear, and both coefficients depend on time."""

    def drift(self, t, x, mu):
        return -x - torch.sin(2 * x) + 0.5 * math.cos(t)

    def diffusion(self, t, x, mu):
        return 2 + t

    def initial(self):
        return mfsde.Dirac([1.0])


@dataclass(frozen=True)
class LawDependent:
    """dX = a dt + s(X + E X) dW, component by component: E X moves. N = 1 is dX = a dt + 2sX dW."""

    rate: float = 2.0
    sigma: float = 0.4
    start: tuple[float, ...] = (1.0, 1.0)

    def drift(self, t, x, mu):
        return torch.full_like(x, self.rate)

    def diffusion(self, t, x, mu):
        return self.sigma * (x + mu.mean())

    def initial(self):
        return mfsde.Dirac(list(self.start))


@dataclass(frozen=True)
class Brownian:
    """dX = σ dW on R^d; `matrix` (d, m) makes it general, a tuple diagonal."""

    sigma: Any = 1.0
    start: tuple[float, ...] = (0.0,)
    matrix: tuple[tuple[float, ...], ...] | None = None

    def drift(self, t, x, mu):
        return torch.zeros_like(x)

    def diffusion(self, t, x, mu):
        if self.matrix is not None:
            return x.new_tensor(self.matrix)[None, None]
        return self.sigma if isinstance(self.sigma, float) else x.new_tensor(self.sigma)

    def initial(self):
        return mfsde.Dirac(list(self.start))


@dataclass(frozen=True)
class Linear:
    """dX = AX dt + Σ_j B_j X dW_j in R², B_1 and B_2 do not commute."""

    a: tuple = ((-0.5, 0.2), (0.1, -0.3))
    b: tuple = (((0.3, 0.4), (0.0, -0.2)), ((0.0, -0.3), (0.5, 0.1)))

    def drift(self, t, x, mu):
        return x @ x.new_tensor(self.a).T

    def diffusion(self, t, x, mu):
        return torch.stack([x @ b.T for b in x.new_tensor(self.b)], -1)

    def initial(self):
        return mfsde.Dirac([1.0, -0.5])


@dataclass(frozen=True)
class Common:
    """dX = -κX dt + σ dW + σ⁰ dW⁰."""

    kappa: float = 0.8
    sigma: float = 0.5
    sigma0: float = 0.9

    def drift(self, t, x, mu):
        return -self.kappa * x

    def diffusion(self, t, x, mu):
        return self.sigma

    def common_diffusion(self, t, x, mu):
        return self.sigma0

    def initial(self):
        return mfsde.Gaussian([1.0], [[0.3]])


@dataclass(frozen=True)
class Mixed:
    """Every kind of coefficient at once; `kind` says the form of the own diffusion."""

    kind: str = "number"
    common: str = "none"

    def drift(self, t, x, mu):
        return -x - 0.5 * (x - mu.mean()) + math.sin(t)

    def diffusion(self, t, x, mu):
        return self._of(self.kind, t, x, mu)

    def initial(self):
        return mfsde.Gaussian([0.5, -0.5], 0.3)

    @staticmethod
    def _of(kind, t, x, mu):
        if kind == "number":
            return 0.4 + 0.1 * t
        if kind == "constant":
            return x.new_tensor([0.3, 0.6])
        if kind == "diagonal":
            return 0.3 * torch.cos(x) + 0.2 * mu.mean()
        return torch.stack([0.3 * x, 0.2 * torch.cos(x.flip(-1)), torch.full_like(x, 0.1)], -1)


@dataclass(frozen=True)
class MixedCommon(Mixed):
    def common_diffusion(self, t, x, mu):
        return self._of(self.common, t, x, mu)


# torchsde's contract


def test_torchsde_is_the_version_whose_private_classes_are_used():
    assert torchsde.__version__ == "0.2.6"


@pytest.mark.parametrize("kind", ["number", "constant", "diagonal", "general"])
@pytest.mark.parametrize("common", ["none", "number", "diagonal", "general"])
@pytest.mark.parametrize("substeps", [1, 3])
def test_euler_in_place_is_torchsdes_euler(kind, common, substeps):
    scenario = Mixed(kind) if common == "none" else MixedCommon(kind, common)
    noise = Noise(4, substeps)
    path = positions(scenario, n_particles=6, n_replicas=3, horizon=1.0, dt=0.05, seed=4, noise=noise)
    theirs = torchsde_end(scenario, path[0], 20, 0.05, noise, "euler")
    torch.testing.assert_close(path[-1], theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("method", methods.METHODS)
def test_a_scheme_takes_whole_steps_however_late_it_is(method):
    # A float clock that adds dt takes 11 steps of 0.1 to reach 1, and in float32 never leaves t = 1e4 with dt = 1e-4.
    scenario, x = Mixed(), torch.zeros(1, 2, 2)
    equation = Equation(scenario, x)
    first, seen = 10**8, []
    reached, _ = solver.integrate(
        equation, x, first, first + 3, solver.Clock(1e-4), Noise(0), methods.Method(method),
        [first + 1, first + 2, first + 3], lambda step, state: seen.append((step, state.clone())),
    )  # fmt: skip
    assert reached == first + 3
    assert [step for step, _ in seen] == [first + 1, first + 2, first + 3]
    assert all(not torch.equal(a[1], b[1]) for a, b in pairwise(seen))


def test_the_drift_is_asked_at_step_times_dt_and_once_per_euler_step():
    asked: list[float] = []

    @dataclass(frozen=True)
    class Listening(Brownian):
        def drift(self, t, x, mu):
            asked.append(t)
            return torch.zeros_like(x)

    final(Listening(), n_particles=2, horizon=1.0, dt=0.1, seed=0)
    # The first call is the check at the door.
    assert asked == [0.0, *(step * 0.1 for step in range(10))]


@pytest.mark.parametrize("method", methods.METHODS)
def test_nothing_is_drawn_from_torchs_or_numpys_generators(method):
    scenario = Mixed("diagonal")
    torch.manual_seed(1)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    a = final(scenario, n_particles=3, horizon=0.2, dt=0.1, seed=0, method=method)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)
    torch.manual_seed(2)
    assert torch.equal(a, final(scenario, n_particles=3, horizon=0.2, dt=0.1, seed=0, method=method))


def test_torchsdes_own_brownian_motion_is_never_built(monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a Brownian motion of torchsde was built")

    for name in ("BrownianInterval", "BrownianPath", "BrownianTree"):
        monkeypatch.setattr(getattr(torchsde, name), "__init__", refuse)
    for method in methods.METHODS:
        final(Mixed("constant"), n_particles=3, horizon=0.2, dt=0.1, seed=0, method=method)


# Exact identities of the schemes


def test_without_noise_euler_is_the_explicit_euler_method():
    ou = MeanFieldOU(sigma=0.0)
    path = positions(ou, n_particles=7, n_replicas=2, horizon=0.5, dt=0.05, seed=2, save_every=1)
    x = path[0]
    for step in range(10):
        x = x - 0.05 * (ou.kappa * x + ou.coupling * (x - x.mean(1, keepdim=True)))
        torch.testing.assert_close(path[step + 1], x, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("method", ["heun", "midpoint"])
def test_without_noise_the_stratonovich_schemes_are_second_order_methods(method):
    # x' = -κx - α(x - m): m decays by e^{-κt}, x - m by e^{-(κ+α)t}.
    ou = MeanFieldOU(sigma=0.0)
    start = positions(ou, n_particles=7, horizon=1.0, dt=1.0, seed=2)[0]
    mean = start.mean(1, keepdim=True)
    exact = math.exp(-1.0) * mean + math.exp(-1.5) * (start - mean)
    errors = [
        float((final(ou, n_particles=7, horizon=1.0, dt=h, seed=2, method=method) - exact).abs().max())
        for h in (1 / 64, 1 / 128)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize("method", ["srk", "heun", "midpoint"])
def test_without_noise_they_see_the_drift_at_their_stages_times(method):
    # x' = cos t - x, x_0 = 1: x_t = ½(cos t + sin t + e^{-t}). At the times of the step's ends only, the order is 1.
    @dataclass(frozen=True)
    class Driven(Brownian):
        def drift(self, t, x, mu):
            return math.cos(t) - x

    exact = 0.5 * (math.cos(1) + math.sin(1) + math.exp(-1))
    run = {"n_particles": 1, "horizon": 1.0, "seed": 0, "method": method}
    errors = [abs(float(final(Driven(0.0, (1.0,)), dt=h, **run)) - exact) for h in (1 / 64, 1 / 128)]
    assert math.log2(errors[0] / errors[1]) > 1.9


@pytest.mark.parametrize("method", methods.METHODS)
@pytest.mark.parametrize("scenario", [Brownian(0.7, (0.2, 0.1)), Brownian((0.7, 0.3), (0.2, 0.1))])
def test_a_coarse_run_and_a_fine_run_share_their_brownian_path(method, scenario):
    shared = {"n_particles": 5, "n_replicas": 2, "horizon": 1.2, "seed": 6, "method": method}
    coarse = positions(scenario, dt=0.3, noise=Noise(6, substeps=6), save_every=1, **shared)
    fine = positions(scenario, dt=0.05, save_every=6, **shared)
    torch.testing.assert_close(coarse, fine, rtol=1e-13, atol=1e-13)
    assert not torch.allclose(coarse[1:], positions(scenario, dt=0.3, save_every=1, **shared)[1:], atol=0.01)


@pytest.mark.parametrize("method", methods.METHODS)
@pytest.mark.parametrize(("n", "r"), [(1, 1), (4, 4), (1, 3), (5, 1)])
def test_a_component_does_not_see_how_many_others_there_are(method, n, r):
    # torchsde takes a three-dimensional g with a single column for scalar noise, and drops its last axis.
    @dataclass(frozen=True)
    class Components(HyperbolicSine):
        dim: int = 1

        def initial(self):
            return mfsde.Dirac([0.5] * self.dim)

    one, two = (
        final(Components(dim=d), n_particles=n, n_replicas=r, horizon=0.3, dt=0.1, seed=1, method=method)
        for d in (1, 2)
    )
    assert one.shape == (r, n, 1)
    torch.testing.assert_close(one, two[..., :1], rtol=1e-14, atol=1e-15)


@dataclass(frozen=True)
class Integrated(Brownian):
    """dX_1 = X_2 dt + σ_1 dW_1, dX_2 = σ_2 dW_2: X_1 holds ∫ W_2 ds, which SRK integrates exactly."""

    def drift(self, t, x, mu):
        return torch.stack([x[..., 1], torch.zeros_like(x[..., 1])], -1)


@pytest.mark.parametrize("sigma", [0.7, (0.0, 0.7)])
def test_srk_shares_the_time_integral_of_the_path_too(sigma):
    scenario = Integrated(sigma, (0.2, 0.1))
    shared = {"n_particles": 5, "n_replicas": 2, "horizon": 1.2, "seed": 6, "method": "srk"}
    coarse = final(scenario, dt=0.3, noise=Noise(6, substeps=6), **shared)
    torch.testing.assert_close(coarse, final(scenario, dt=0.05, **shared), rtol=1e-13, atol=1e-13)


def test_srk_integrates_the_keyed_area():
    scenario, noise = Integrated((0.0, 1.0), (0.0, 0.0)), Noise(6, substeps=5)
    end = final(scenario, n_particles=4, n_replicas=3, horizon=0.3, dt=0.3, seed=6, noise=noise, method="srk")
    w, area = noise.area(0, (3, 4, 2), dtype=torch.float64)
    torch.testing.assert_close(end[..., 1], math.sqrt(0.3) * w[..., 1])
    torch.testing.assert_close(end[..., 0], 0.3 * math.sqrt(0.3) * area[..., 1])


@pytest.mark.parametrize("common", ["none", "number"])
def test_particles_that_are_permuted_at_the_start_are_permuted_at_the_end(common):
    # Noise is keyed by the particle's index, so the particles share theirs here. To rounding: the mean over particles
    # is summed in another order.
    @dataclass(frozen=True)
    class Coupled(Common):
        points: Tensor = None  # type: ignore[assignment]

        def drift(self, t, x, mu):
            return -torch.tanh(x) - 2 * (x - mu.mean())

        def initial(self):
            return mfsde.EmpiricalMeasure(self.points)

    points = torch.linspace(-2, 3, 40, dtype=torch.float64)[:, None]
    order = torch.arange(40).roll(11).flip(0)
    scenario = Coupled(sigma=0.0, sigma0=0.0 if common == "none" else 0.9, points=points)
    run = {"n_particles": 40, "n_replicas": 2, "horizon": 1.0, "dt": 0.05, "seed": 1}
    straight, permuted = final(scenario, **run), final(replace(scenario, points=points[order]), **run)
    torch.testing.assert_close(permuted, straight[:, order], rtol=1e-13, atol=1e-13)
    assert not torch.allclose(permuted, straight)


@pytest.mark.parametrize("method", methods.METHODS)
def test_float32_and_float64_runs_follow_one_path(method):
    settings = {"n_particles": 30, "n_replicas": 2, "horizon": 1.0, "dt": 0.02, "seed": 8, "method": method}
    for scenario in (MeanFieldOU(), Geometric()):
        double = final(scenario, **settings)
        single = final(scenario, dtype=torch.float32, **settings)
        # 50 steps, each with a relative rounding of a few 2^-24 and a normal that is off by up to 6e-7.
        torch.testing.assert_close(single.double(), double, rtol=5e-5, atol=1e-5)
        assert not torch.equal(single.double(), double)


# Euler against its own moments


# dX = -(θX + κ(X - E X)) dt + σ dW, X_0 ~ N(m_0, v_0): mean and variance at time 1 by the recursion
# m' = (1 - θh)m, v' = (1 - (θ + κ)h)²v + σ²h of Euler's method, and of the equation itself.
THETA, KAPPA, SIGMA, M0, V0 = 0.7, 1.3, 0.9, 1.5, 0.4
EULER = {
    0.1: (0.72597346076894, 0.22701761263306208),
    0.05: (0.7355928952395864, 0.21591958602326816),
    0.025: (0.7402759170205533, 0.21086834122788717),
}
EXACT = (0.7448779556871143, 0.206117338680525)
LQ = MeanFieldOU(kappa=THETA, coupling=KAPPA, sigma=SIGMA, initial_mean=(M0,), initial_variance=V0)


def moments_agree(scenario: Any, h: float, mean: float, variance: float, n: int = 10) -> dict[str, bool]:
    """The N-particle moments of Euler's method, from those (mean, variance) of its N = ∞ limit.

    With M the mean over particles, D = X - M, ξ̄ the mean of the noise and λ = θ + κ,

        M' = (1 - θh) M + σ√h ξ̄,        D' = (1 - λh) D + σ√h (ξ - ξ̄),       Var ξ̄ = 1/N,  Var(ξ - ξ̄) = 1 - 1/N,

    so E M is that of the limit, E (population variance) is (1 - 1/N) times that of the limit, and
    Var M obeys V' = (1 - θh)² V + σ²h/N, V_0 = v_0/N.
    """
    x = final(scenario, n_particles=n, n_replicas=4000, horizon=1.0, dt=h, seed=11)[..., 0]
    m = x.mean(1)
    v = V0 / n
    for _ in range(round(1 / h)):
        v = (1 - THETA * h) ** 2 * v + SIGMA**2 * h / n
    return {
        "mean": agrees(m, mean),
        "variance of the mean": agrees((m - mean).square(), v),
        "population variance": agrees(x.var(1, correction=0), (1 - 1 / n) * variance),
    }


@pytest.mark.parametrize("h", [0.1, 0.05, 0.025])
def test_euler_has_its_exact_discrete_moments(h):
    assert all(moments_agree(LQ, h, *EULER[h]).values())


@pytest.mark.parametrize("h", [0.1, 0.05, 0.025])
def test_the_tabulated_moments_are_those_of_the_recursion(h):
    m, v = M0, V0
    for _ in range(round(1 / h)):
        m, v = (1 - THETA * h) * m, (1 - (THETA + KAPPA) * h) ** 2 * v + SIGMA**2 * h
    assert (m, v) == pytest.approx(EULER[h], rel=1e-12)


@pytest.mark.parametrize(
    ("fault", "seen_in"),
    [
        ({"sigma": 0.9 * 1.1}, {"variance of the mean", "population variance"}),
        ({"coupling": -1.3}, {"population variance"}),
        ({"kappa": -0.7}, {"mean", "variance of the mean", "population variance"}),
        ({"coupling": 0.65}, {"population variance"}),
    ],
)
def test_other_equations_do_not_have_these_moments(fault, seen_in):
    verdict = moments_agree(replace(LQ, **fault), 0.05, *EULER[0.05])
    assert {name for name, accepted in verdict.items() if not accepted} >= seen_in


def test_the_moments_are_those_of_euler_and_of_n_particles_not_of_the_limit():
    at_the_limit = moments_agree(LQ, 0.1, *EXACT)
    assert not at_the_limit["mean"]
    assert not at_the_limit["population variance"]
    mean, variance = EULER[0.1]
    assert not moments_agree(LQ, 0.1, mean, variance * 10 / 9)["population variance"]


def ou_is_near_its_limit(scenario: MeanFieldOU, limit: Callable[[float], mfsde.Gaussian], h: float = 0.01) -> bool:
    """Sampling error and the bias of Euler's method, with z = λh <= 1 and n = t/h steps:

    0 <= e^{-κt} - (1 - κh)^n <= κ²th/2 e^{-κ(t-h)}  and  0 <= e^{-2λt} - (1 - λh)^{2n} <= λ²th e^{-2λ(t-h)},

    from e^{-z} - (1 - z) <= z²/2 and aⁿ - bⁿ <= n(a - b)a^{n-1}; the noise's σ²/(λ(2 - z)) (1 - (1 - z)^{2n}) against
    σ²/(2λ) (1 - e^{-2λt}) adds σ²/(2λ) z/(2 - z).
    """
    ou, n = MeanFieldOU(), 200
    run = mfsde.simulate(scenario, n_particles=n, n_replicas=200, horizon=2.0, dt=h, seed=5, save_every=50, **DOUBLE)
    rate = ou.kappa + ou.coupling
    verdicts = []
    for t in run.time.values[1:]:
        x = torch.from_numpy(run.position.sel(time=t).values)[..., 0]
        variance = float(limit(t).cov)
        bias = rate**2 * t * h * math.exp(-2 * rate * (t - h))
        mean_bias = ou.kappa**2 * t * h / 2 * math.exp(-ou.kappa * (t - h))
        variance_bias = bias * ou.initial_variance + ou.sigma**2 / (2 * rate) * (bias + rate * h / (2 - rate * h))
        verdicts.append(agrees(x.mean(1), float(limit(t).mean), mean_bias))
        verdicts.append(agrees(x.var(1), variance, variance_bias))
    return all(verdicts)


def test_the_mean_field_ou_process_follows_its_limit():
    assert ou_is_near_its_limit(MeanFieldOU(), MeanFieldOU().limit)


@pytest.mark.parametrize("fault", [{"sigma": 0.77}, {"kappa": 1.1}, {"coupling": -0.5}, {"initial_mean": (1.1,)}])
def test_another_ou_process_does_not_follow_that_limit(fault):
    assert not ou_is_near_its_limit(replace(MeanFieldOU(), **fault), MeanFieldOU().limit)


# Strong orders

ORDERS = {"euler": 0.5, "milstein": 1.0, "srk": 1.5, "heun": 1.0, "midpoint": 1.0, "euler_heun": 1.0}
STEPS = [16, 32, 64, 128, 256]
ADDITIVE_STEPS = [16, 32, 64, 128]


def order_against_solution(scenario: Any, method: str) -> Slope:
    """5000 paths against the solution's formula, in which W_1 is the sum of the fine increments."""
    w = Noise(3, substeps=256).increment(0, (25, 200, 1), **DOUBLE)
    errors = strong_errors(scenario, method, STEPS, 256, scenario.exact(w))
    return slope([1 / k for k in STEPS], errors, ORDERS[method])


@pytest.mark.parametrize("scenario", [Geometric(), HyperbolicSine()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("method", methods.METHODS)
def test_strong_order_for_diagonal_noise_against_the_ito_solution(method, scenario):
    # Kloeden, Platen (1992), theorems 10.2.2 (Euler) and 10.3.5 (Milstein); Rößler (2010) for SRK.
    measured = order_against_solution(scenario, method)
    assert measured.is_order(ORDERS[method]), measured
    assert measured.stderr < 0.05


class Uncorrected(solver.ParticleSystem):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._corrects = False


@pytest.mark.parametrize("method", solver.STRATONOVICH)
def test_a_stratonovich_scheme_without_the_correction_has_another_limit(method, monkeypatch):
    monkeypatch.setattr(solver, "ParticleSystem", Uncorrected)
    for scenario in (Geometric(), HyperbolicSine()):
        assert not order_against_solution(scenario, method).is_order(1.0)


class Halved(solver.ParticleSystem):
    """Milstein's term without its ½, and twice the Itô-Stratonovich correction."""

    def _self_derivative(self, t: float, x: Tensor) -> Tensor:
        return 2 * super()._self_derivative(t, x)


@pytest.mark.parametrize("method", ["milstein", "heun", "midpoint", "euler_heun"])
def test_a_missing_half_is_seen(method, monkeypatch):
    monkeypatch.setattr(solver, "ParticleSystem", Halved)
    assert not order_against_solution(HyperbolicSine(), method).is_order(1.0)


@pytest.mark.parametrize("method", ["euler", "milstein", "srk"])
def test_a_wrong_sigma_is_seen(method):
    @dataclass(frozen=True)
    class Louder(Geometric):
        def diffusion(self, t, x, mu):
            return 1.1 * self.sigma * x

    assert not order_against_solution(Louder(), method).is_order(ORDERS[method])


@cache
def additive_reference() -> Tensor:
    return final(Additive(), n_particles=100, n_replicas=20, horizon=1.0, dt=1 / 1024, seed=3, method="srk")


ADDITIVE_ORDERS = {"euler": 1.0, "milstein": 1.0, "srk": 1.5, "heun": 1.0, "midpoint": 1.0, "euler_heun": 1.0}


@pytest.mark.parametrize("method", methods.METHODS)
def test_strong_order_for_additive_noise(method):
    # Milstein's term vanishes, so Euler has order 1; SRK has the iterated integral of W, hence 1.5.
    errors = strong_errors(Additive(), method, ADDITIVE_STEPS, 1024, additive_reference())
    measured = slope([1 / k for k in ADDITIVE_STEPS], errors, ADDITIVE_ORDERS[method])
    assert measured.is_order(ADDITIVE_ORDERS[method]), measured
    assert measured.stderr < 0.05


def test_the_additive_reference_is_a_solution():
    # Found by another scheme, of order 1: within its own error, which halves with the step.
    errors = strong_errors(Additive(), "heun", [512, 1024], 1024, additive_reference()).mean(1).sqrt()
    assert float(errors[1]) < 2e-3
    assert float(errors[0] / errors[1]) == pytest.approx(2, abs=0.2)


def test_srk_without_the_keyed_area_drops_to_order_one(monkeypatch):
    def without_area(self: Noise, step: int, shape: Any, **options: Any) -> tuple[Tensor, Tensor]:
        w = self.increment(step, shape, **options)
        return w, 0.5 * w

    reference = additive_reference()
    monkeypatch.setattr(Noise, "area", without_area)
    errors = strong_errors(Additive(), "srk", ADDITIVE_STEPS, 1024, reference)
    measured = slope([1 / k for k in ADDITIVE_STEPS], errors, 1.5)
    assert not measured.is_order(1.5)
    assert measured.value == pytest.approx(1.0, abs=0.1)


# A law-dependent diffusion

LAW_STEPS, LAW_FINE = [8, 16, 32, 64], 1024


@cache
def law_reference() -> Tensor:
    run = {"n_particles": 1000, "n_replicas": 10, "horizon": 1.0, "seed": 3}
    return final(LawDependent(), dt=1 / LAW_FINE, method="milstein", **run)


def law_order(end: Callable[[int], Tensor], reference: Tensor, steps: list[int] = LAW_STEPS) -> Slope:
    errors = torch.stack([(end(k) - reference).square().mean((1, 2)) for k in steps])
    return slope([1 / k for k in steps], errors)


@pytest.mark.parametrize("method", ["milstein", "srk", "heun"])
def test_schemes_of_a_law_dependent_diffusion_have_order_one_for_many_particles(method):
    # The frozen law leaves A·h + B·√(h/N); here N·h >= 15.
    def end(k: int) -> Tensor:
        run = {"n_particles": 1000, "n_replicas": 10, "horizon": 1.0, "seed": 3}
        return final(LawDependent(), dt=1 / k, method=method, noise=Noise(3, substeps=LAW_FINE // k), **run)

    measured = law_order(end, law_reference())
    assert measured.is_order(1.0), measured


class Unfrozen(solver.ParticleSystem):
    """What torchsde does by itself: σ sees the law of the stage, in which all particles have been shifted together."""

    def _frozen(self, x: Tensor) -> mfsde.EmpiricalMeasure:
        return self.equation.measure(x)

    def f_and_g(self, step: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.f(step, x), self.g(step, x)

    def prod(self, g: Tensor, v: Tensor) -> Tensor:
        return g * v


@pytest.mark.parametrize(("method", "options"), [("srk", {}), ("milstein", {"grad_free": True})])
def test_torchsdes_own_schemes_drop_to_order_half_for_a_law_dependent_diffusion(method, options, monkeypatch):
    start, reference = torch.ones(10, 1000, 2, dtype=torch.float64), law_reference()
    monkeypatch.setattr(solver, "ParticleSystem", Unfrozen)

    def end(k: int) -> Tensor:
        return torchsde_end(LawDependent(), start, k, 1 / k, Noise(3, LAW_FINE // k), method, **options)

    assert not law_order(end, reference).is_order(1.0)
    finer = law_order(end, reference, [64, 128, 256, 512])
    assert finer.value == pytest.approx(0.5, abs=3 * finer.stderr + 0.1), finer


@pytest.mark.parametrize("method", ["milstein", "srk"])
def test_the_frozen_law_costs_order_half_for_a_single_particle(method):
    # With N = 1 the law is the particle: dX = 2sX dW, of whose ½σσ' = 2s²X the frozen law gives half.
    single, steps = LawDependent(rate=0.0, sigma=0.25), [32, 64, 128, 256]
    exact = Geometric(rate=0.0, sigma=0.5).exact(Noise(3, substeps=256).increment(0, (1000, 1, 2), **DOUBLE))
    errors = strong_errors(single, method, steps, 256, exact)
    assert slope([1 / k for k in steps], errors, 0.5).is_order(0.5)


# General noise


def second_moments_agree(x: Tensor, mean: np.ndarray, second: np.ndarray) -> bool:
    """E X and E XXᵀ of independent particles.    x: (R, N, d)."""
    flat = x.reshape(-1, x.shape[-1])
    firsts = [agrees(flat[:, i], mean[i]) for i in range(len(mean))]
    seconds = [agrees(flat[:, i] * flat[:, j], second[i, j]) for i in range(len(mean)) for j in range(i + 1)]
    return all(firsts + seconds)


@pytest.mark.parametrize("method", ["euler", "heun", "midpoint", "euler_heun"])
def test_constant_general_noise_has_its_covariance(method):
    matrix = np.array([[0.5, -0.2, 0.1], [0.3, 0.0, 0.8]])
    scenario = Brownian(matrix=tuple(map(tuple, matrix)), start=(0.0, 0.0))
    x = final(scenario, n_particles=200, n_replicas=100, horizon=0.6, dt=0.2, seed=2, method=method)
    assert second_moments_agree(x, np.zeros(2), 0.6 * matrix @ matrix.T)
    assert not second_moments_agree(x, np.zeros(2), 0.6 * np.diag(np.diag(matrix @ matrix.T)))
    assert not second_moments_agree(1.1 * x, np.zeros(2), 0.6 * matrix @ matrix.T)


LINEAR_A, LINEAR_B = np.array(Linear().a), np.array(Linear().b)
X0 = np.array([1.0, -0.5])


def linear_moments(method: str, h: float) -> tuple[np.ndarray, np.ndarray]:
    """E X_1 and E X_1X_1ᵀ of a scheme, exactly: a step is X ↦ ΦX with Φ independent of X.

    With Q = hĀ + √h Σ_j B_j ξ_j, Euler has Φ = I + Q, Ā = A. Heun evaluates Q at X and at (I + Q)X and averages:
    Φ = I + Q + ½Q², Ā = A - ½ Σ B_j². E Φ ⊗ Φ is a polynomial of degree 4 in ξ: exact with five Gauss nodes.
    """
    correction = 0.5 * sum(b @ b for b in LINEAR_B)
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)
    weights = weights / weights.sum()
    mean_step, second_step = np.zeros((2, 2)), np.zeros((4, 4))
    for (u, p), (v, q) in ((a, b) for a in zip(nodes, weights, strict=True) for b in zip(nodes, weights, strict=True)):
        noise = math.sqrt(h) * (u * LINEAR_B[0] + v * LINEAR_B[1])
        if method == "euler":
            step = np.eye(2) + h * LINEAR_A + noise
        else:
            advance = h * (LINEAR_A - correction) + noise
            step = np.eye(2) + advance + 0.5 * advance @ advance
        mean_step += p * q * step
        second_step += p * q * np.kron(step, step)
    n = round(1 / h)
    mean = np.linalg.matrix_power(mean_step, n) @ X0
    return mean, (np.linalg.matrix_power(second_step, n) @ np.outer(X0, X0).ravel()).reshape(2, 2)


def linear_limit() -> tuple[np.ndarray, np.ndarray]:
    """E X' = A E X and P' = AP + PAᵀ + Σ B_j P B_jᵀ: the Itô equation's."""
    eye = np.eye(2)
    generator = np.kron(LINEAR_A, eye) + np.kron(eye, LINEAR_A) + sum(np.kron(b, b) for b in LINEAR_B)
    second = scipy.linalg.expm(generator) @ np.outer(X0, X0).ravel()
    return scipy.linalg.expm(LINEAR_A) @ X0, second.reshape(2, 2)


def linear_run(method: str, h: float) -> Tensor:
    return final(Linear(), n_particles=500, n_replicas=80, horizon=1.0, dt=h, seed=9, method=method)


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_general_noise_that_does_not_commute_has_the_schemes_exact_moments(method):
    assert second_moments_agree(linear_run(method, 0.1), *linear_moments(method, 0.1))


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_those_moments_converge_to_the_ito_equations(method):
    # Weak order 1: halving h at least halves the error.
    errors = [
        max(np.abs(a - b).max() for a, b in zip(linear_moments(method, h), linear_limit(), strict=True))
        for h in (1 / 64, 1 / 128)
    ]
    assert errors[1] < 0.02
    assert errors[0] / errors[1] > 1.9


@pytest.mark.parametrize("method", ["heun", "midpoint", "euler_heun"])
def test_stratonovich_schemes_with_general_noise_reach_the_ito_moments(method):
    # At h = 1/64 their bias, like Heun's (computed above), is below a standard error: 40000 paths.
    x = linear_run(method, 1 / 64)
    bias = max(np.abs(a - b).max() for a, b in zip(linear_moments("heun", 1 / 64), linear_limit(), strict=True))
    assert bias < float((x[..., 0] * x[..., 1]).std()) / 200
    assert second_moments_agree(x, *linear_limit())


def test_general_noise_without_the_correction_is_rejected(monkeypatch):
    monkeypatch.setattr(solver, "ParticleSystem", Uncorrected)
    assert not second_moments_agree(linear_run("heun", 0.1), *linear_moments("heun", 0.1))


def test_general_noise_with_a_transposed_matrix_is_rejected():
    @dataclass(frozen=True)
    class Transposed(Linear):
        def diffusion(self, t, x, mu):
            return super().diffusion(t, x, mu).mT

    x = final(Transposed(), n_particles=500, n_replicas=80, horizon=1.0, dt=0.1, seed=9)
    assert not second_moments_agree(x, *linear_moments("euler", 0.1))


# Common noise


def common_law_holds(x: Tensor, h: float) -> bool:
    """x: (R, N) at time 1. M' = (1 - κh)M + √h(σξ̄ + σ⁰ξ⁰), so V' = (1 - κh)²V + h(σ²/N + σ⁰²), V_0 = v_0/N.

    The deviations from M do not see W⁰: E (population variance) is (1 - 1/N)v, v' = (1 - κh)²v + hσ².
    """
    common, n = Common(), x.shape[1]
    mean, of_mean, within = 1.0, 0.3 / n, 0.3
    for _ in range(round(1 / h)):
        factor = 1 - common.kappa * h
        mean = factor * mean
        of_mean = factor**2 * of_mean + h * (common.sigma**2 / n + common.sigma0**2)
        within = factor**2 * within + h * common.sigma**2
    m = x.mean(1)
    return (
        agrees(m, mean)
        and agrees((m - mean).square(), of_mean)
        and agrees(x.var(1, correction=0), (1 - 1 / n) * within)
    )


COMMON_RUN = {"n_particles": 30, "n_replicas": 2000, "horizon": 1.0, "dt": 0.1, "seed": 14}


def test_common_noise_moves_the_mean_and_leaves_the_spread():
    assert common_law_holds(final(Common(), **COMMON_RUN)[..., 0], 0.1)


@pytest.mark.parametrize(
    "fault",
    [
        # Noise of the same strength that each particle has to itself.
        {"sigma": math.hypot(0.5, 0.9), "sigma0": 0.0},
        {"sigma0": 0.9 * 1.1},
        {"kappa": -0.8},
        {"sigma": 0.55},
    ],
)
def test_common_noise_check_rejects(fault):
    assert not common_law_holds(final(replace(Common(), **fault), **COMMON_RUN)[..., 0], 0.1)


def test_common_noise_shared_by_the_replicas_is_rejected(monkeypatch):
    increment = Noise.increment

    def shared(self: Noise, step: int, shape: Any, *, stream: Stream = Stream.IDIOSYNCRATIC, **options: Any) -> Tensor:
        if stream is not Stream.COMMON:
            return increment(self, step, shape, stream=stream, **options)
        return increment(self, step, (1, *shape[1:]), stream=stream, **options).expand(shape).contiguous()

    monkeypatch.setattr(Noise, "increment", shared)
    assert not common_law_holds(final(Common(), **COMMON_RUN)[..., 0], 0.1)


def test_deviations_from_the_mean_do_not_depend_on_the_common_noise():
    run = {"n_particles": 30, "n_replicas": 3, "horizon": 1.0, "dt": 0.1, "seed": 14}
    with_common, without = final(Common(), **run), final(replace(Common(), sigma0=0.0), **run)
    deviation, own = (x - x.mean(1, keepdim=True) for x in (with_common, without))
    torch.testing.assert_close(deviation, own, rtol=1e-13, atol=1e-13)
    assert float((with_common - without).abs().min()) > 1e-3


@pytest.mark.parametrize("method", methods.METHODS)
def test_particles_of_a_replica_share_the_common_noise_bit_for_bit_and_replicas_do_not(method):
    @dataclass(frozen=True)
    class Driven(Brownian):
        sigma: float = 0.0

        def common_diffusion(self, t, x, mu):
            return 0.9

    x = final(Driven(start=(0.1, 0.2)), n_particles=5, n_replicas=3, horizon=0.4, dt=0.1, seed=3, method=method)
    assert torch.equal(x, x[:, :1].expand_as(x))
    assert len(x[:, 0, 0].unique()) == 3
    w = sum(Noise(3).increment(step, (3, 1, 2), stream=Stream.COMMON, **DOUBLE) for step in range(4))
    torch.testing.assert_close(x[:, :1], 0.9 * math.sqrt(0.1) * w + torch.tensor([0.1, 0.2], dtype=torch.float64))


@pytest.mark.parametrize("method", ["heun", "midpoint", "euler_heun"])
def test_state_dependent_common_noise_converges_to_the_ito_solution(method):
    # dX = X(s dW + s⁰ dW⁰) is geometric Brownian motion: the columns commute, so the order is 1.
    @dataclass(frozen=True)
    class Both(Geometric):
        rate: float = 0.0

        def common_diffusion(self, t, x, mu):
            return 0.5 * x

    own = Noise(3, substeps=256).increment(0, (25, 200, 1), **DOUBLE)
    shared = Noise(3, substeps=256).increment(0, (25, 1, 1), stream=Stream.COMMON, **DOUBLE)
    exact = torch.exp(0.6 * own + 0.5 * shared - (0.6**2 + 0.5**2) / 2)
    measured = slope([1 / k for k in STEPS], strong_errors(Both(), method, STEPS, 256, exact))
    assert measured.is_order(1.0), measured


# Projection


@dataclass(frozen=True)
class Reflected(Brownian):
    def project(self, x):
        return x.abs()


@dataclass(frozen=True)
class Torus(Brownian):
    period: float = 1.0

    def project(self, x):
        return torch.remainder(x, self.period)


def is_half_normal(x: Tensor, t: float) -> bool:
    """|W_t|: mean √(2t/π), mean square t. Reflecting a symmetric walk at every step does not change the law of |S|."""
    flat = x.reshape(-1)
    return agrees(flat, math.sqrt(2 * t / math.pi)) and agrees(flat.square(), t)


def test_reflected_brownian_motion_is_half_normal_at_every_step():
    path = positions(Reflected(), n_particles=200, n_replicas=100, horizon=1.0, dt=0.1, seed=7, save_every=1)
    assert all(is_half_normal(path[k], 0.1 * k) for k in range(1, 11))


@pytest.mark.parametrize("fault", [Brownian(), Reflected(sigma=1.1), Reflected(start=(0.3,))])
def test_other_processes_are_not_half_normal(fault):
    assert not is_half_normal(final(fault, n_particles=200, n_replicas=100, horizon=1.0, dt=0.1, seed=7), 1.0)


@pytest.mark.parametrize("method", methods.METHODS)
def test_projection_follows_every_step_of_every_scheme(method):
    path = positions(Reflected(), n_particles=6, n_replicas=2, horizon=1.0, dt=0.1, seed=7, save_every=1, method=method)
    x = path[0]
    for step in range(10):
        x = (x + math.sqrt(0.1) * Noise(7).increment(step, (2, 6, 1), **DOUBLE)).abs()
        torch.testing.assert_close(path[step + 1], x, rtol=1e-13, atol=1e-14)
    sparse = positions(Reflected(), n_particles=6, n_replicas=2, horizon=1.0, dt=0.1, seed=7, method=method)
    assert torch.equal(sparse[-1], path[-1])


@pytest.mark.parametrize("method", methods.METHODS)
def test_a_torus_wraps_the_path_of_the_line(method):
    run = {"n_particles": 6, "n_replicas": 2, "horizon": 4.0, "dt": 0.1, "seed": 7, "save_every": 1, "method": method}
    torus, line = positions(Torus(), **run), positions(Brownian(), **run)
    assert float(torus.min()) >= 0
    assert float(torus.max()) < 1
    difference = (torus - line) - torch.round(torus - line)
    assert float(difference.abs().max()) < 1e-13
    assert float(line.abs().max()) > 1


# Propagation of chaos by synchronous coupling

CENTRED = MeanFieldOU(initial_mean=(0.0,))
CHAOS_N = [100, 200, 400, 800, 1600]


def coupling_errors(other_seed: int) -> Tensor:
    """E |X - X̄|² over particles at time 1, (len(CHAOS_N), R)."""
    nonlinear = mfsde.decoupled(CENTRED, CENTRED.limit)
    run = {"n_replicas": 60, "horizon": 1.0, "dt": 0.02}
    return torch.stack(
        [
            (
                final(CENTRED, n_particles=n, seed=21, **run) - final(nonlinear, n_particles=n, seed=other_seed, **run)
            ).square().mean((1, 2))
            for n in CHAOS_N
        ]
    )  # fmt: skip


def test_the_particles_approach_the_nonlinear_process_at_rate_one_over_n():
    # Sznitman (1991), theorem I.1.4: E sup |X - X̄|² <= C/N. Here exactly: with M the particles' mean and E X̄ = 0, all
    # particles have the same D = X - X̄, D' = (1 - λh)D + hαM, M' = (1 - κh)M + σ√h ξ̄, and M scales as N^-½.
    squares = coupling_errors(other_seed=21)
    ou, h = CENTRED, 0.02
    step = np.array([[1 - ou.kappa * h, 0.0], [h * ou.coupling, 1 - (ou.kappa + ou.coupling) * h]])
    second = np.diag([ou.initial_variance, 0.0])
    for _ in range(50):
        second = step @ second @ step.T + np.diag([ou.sigma**2 * h, 0.0])
    assert all(agrees(row, second[1, 1] / n) for row, n in zip(squares, CHAOS_N, strict=True))
    measured = slope(CHAOS_N, squares)
    assert abs(2 * measured.value + 1) <= 3 * 2 * measured.stderr
    assert measured.stderr < 0.1


def test_with_another_seed_they_do_not():
    measured = slope(CHAOS_N, coupling_errors(other_seed=22))
    assert abs(2 * measured.value + 1) > 3 * 2 * measured.stderr + 0.5


# Blow-ups


@dataclass(frozen=True)
class Cubic:
    """x' = x³ explodes at time 1/(2x_0²): the larger the start, the sooner."""

    def drift(self, t, x, mu):
        return x**3

    def diffusion(self, t, x, mu):
        return 0.0

    def initial(self):
        return mfsde.Gaussian([0.0, 0.0], 0.25)


CUBIC = {"n_particles": 40, "n_replicas": 4, "seed": 17}


def first_bad(h: float) -> tuple[int, int, int]:
    """Step, replica and particle of Euler's first infinity, by the plain loop."""
    x, step = positions(Cubic(), horizon=h, dt=h, **CUBIC)[0], 0
    while bool(torch.isfinite(x).all()):
        x, step = x + h * x**3, step + 1
    replica, particle, _ = torch.nonzero(~torch.isfinite(x))[0].tolist()
    return step, replica, particle


@pytest.mark.parametrize("method", methods.METHODS)
@pytest.mark.parametrize("dt", [0.02, 1e-3])
def test_a_blow_up_names_its_first_bad_step_time_replica_and_particle(method, dt):
    step, replica, particle = first_bad(dt)
    # Worth asking: not in a corner of the array, and for the small dt beyond the first check.
    assert replica > 0
    assert particle > 0
    assert dt > 1e-3 or step > solver.CHECK_EVERY
    with pytest.raises(mfsde.BlowUp) as caught:
        final(Cubic(), horizon=1000 * dt, dt=dt, method=method, **CUBIC)
    found = caught.value
    # The largest start explodes first under every scheme; Euler's step is known, the others' is shown to be the first.
    assert (found.replica, found.particle, found.time) == (replica, particle, found.step * dt)
    assert found.step == step if method in ("euler", "milstein") else found.step <= step
    final(Cubic(), horizon=(found.step - 1) * dt, dt=dt, method=method, **CUBIC)
    with pytest.raises(mfsde.BlowUp, match=f"at step {found.step} "):
        final(Cubic(), horizon=found.step * dt, dt=dt, method=method, **CUBIC)
    assert str(found).startswith("Cubic blew up: the state is ")
    assert f"step {found.step} (time {found.time:.12g}), replica {replica}, particle {particle}. " in str(found)


@pytest.mark.parametrize("save_every", [1, 7, 64, 1000])
def test_where_a_blow_up_is_found_does_not_depend_on_what_is_saved(save_every):
    with pytest.raises(mfsde.BlowUp) as caught:
        final(Cubic(), horizon=1.0, dt=1e-3, save_every=save_every, **CUBIC)
    assert (caught.value.step, caught.value.replica, caught.value.particle) == first_bad(1e-3)


def test_large_finite_states_are_no_blow_up():
    # Their sum overflows in float32, each of them does not.
    end = final(Brownian(start=(2e38,)), n_particles=10, horizon=0.2, dt=0.1, seed=0, dtype=torch.float32)
    assert bool(torch.isfinite(end).all())


def test_a_coupled_blow_up_is_blamed_on_the_particle_that_began_it():
    @dataclass(frozen=True)
    class Coupled(Cubic):
        points: Tensor = None  # type: ignore[assignment]

        def drift(self, t, x, mu):
            return x**3 - mu.mean()

        def initial(self):
            return mfsde.EmpiricalMeasure(self.points)

    points = torch.zeros(50, 1)
    points[33] = 40.0
    with pytest.raises(mfsde.BlowUp, match="replica 0, particle 33"):
        final(Coupled(points=points), n_particles=50, n_replicas=2, horizon=1.0, dt=0.01, seed=0)


# What is refused


def small(scenario: Any, method: str) -> Tensor:
    return final(scenario, n_particles=6, n_replicas=2, horizon=0.2, dt=0.1, seed=0, method=method)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match=r"unknown method 'rk4'; expected one of euler, milstein, srk, heun, midpoint"):
        small(Brownian(), "rk4")
    with pytest.raises(ValueError, match=r"unknown method 'reversible_heun'.*Adaptive schemes are not offered"):
        small(Brownian(), "reversible_heun")


@dataclass(frozen=True)
class Crossed(Brownian):
    """Diagonal, but each component's σ is a function of the other: ∂σ_1/∂x_2 ≠ 0."""

    def diffusion(self, t, x, mu):
        return 1 + x.flip(-1) ** 2


@dataclass(frozen=True)
class Leaking(Brownian):
    """σ takes its mean from x itself, where no law can be frozen."""

    def diffusion(self, t, x, mu):
        return 1 + x.mean(-2, keepdim=True) * torch.ones_like(x)


@dataclass(frozen=True)
class Detached(Geometric):
    def diffusion(self, t, x, mu):
        return self.sigma * x.detach()


@dataclass(frozen=True)
class OutOfTorch(Geometric):
    def diffusion(self, t, x, mu):
        return x.new_tensor(self.sigma * np.asarray(x.tolist()))


@dataclass(frozen=True)
class CommonState(Common):
    def diffusion(self, t, x, mu):
        return 0.1 * x


@dataclass(frozen=True)
class StateCommon(Common):
    def common_diffusion(self, t, x, mu):
        return 0.1 * x


@pytest.mark.parametrize("method", ["milstein", "srk"])
@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        (Linear(), r"'{}' needs a diagonal diffusion; Linear.diffusion is general .* Use 'euler', or 'heun'"),
        (Brownian(matrix=((1.0,),)), r"'{}' needs a diagonal diffusion; Brownian.diffusion is general"),
        (
            Crossed(start=(0.3, 0.2)),
            r"'{}' would be wrong for Crossed: component 1 of σ depends on component 0 of x, so the noise does not",
        ),
        (
            Leaking(start=(0.3,)),
            r"'{}' would be wrong for Leaking: σ at one particle depends on another through x; take means from mu",
        ),
        (CommonState(), r"'{}' would be wrong for CommonState: common and own noise do not commute"),
        (StateCommon(), r"'{}' would be wrong for StateCommon: common and own noise do not commute"),
    ],
)
def test_schemes_that_need_commuting_noise_refuse_the_rest(method, scenario, message):
    with pytest.raises(ValueError, match=message.format(method)):
        small(scenario, method)
    assert bool(torch.isfinite(small(scenario, "euler")).all())
    assert bool(torch.isfinite(small(scenario, "heun")).all())


@pytest.mark.parametrize("method", [m for m in methods.METHODS if m != "euler"])
def test_a_diffusion_without_derivative_is_refused_where_one_is_needed(method):
    with pytest.raises(ValueError, match=rf"'{method}' needs the derivative of Detached.diffusion.*detaches its input"):
        small(Detached(), method)
    with pytest.raises(ValueError, match=rf"'{method}' (needs the derivative of|differentiates) OutOfTorch.diffusion"):
        small(OutOfTorch(), method)
    assert torch.equal(small(Detached(), "euler"), small(Geometric(), "euler"))
    assert torch.allclose(small(OutOfTorch(), "euler"), small(Geometric(), "euler"))


@pytest.mark.parametrize("method", ["heun", "midpoint", "euler_heun"])
def test_a_detached_common_diffusion_is_refused(method):
    @dataclass(frozen=True)
    class DetachedCommon(Common):
        def common_diffusion(self, t, x, mu):
            return 0.1 * x.detach()

    with pytest.raises(ValueError, match=r"needs the derivative of DetachedCommon.common_diffusion"):
        small(DetachedCommon(), method)


def test_kinks_and_vanishing_diffusions_are_not_refused():
    @dataclass(frozen=True)
    class Kinked(Brownian):
        def diffusion(self, t, x, mu):
            return x.abs() * self.sigma

    for method in methods.METHODS:
        assert bool(torch.isfinite(small(Kinked(0.3, (0.0, 1.0)), method)).all())
