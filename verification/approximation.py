"""What networks approximate: laws by N points, prices, any function by shallow and deep ones, and at which rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import xarray as xr
from scipy import integrate, linalg, special
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

import mfsde
from mfsde import EmpiricalMeasure, Energy, Gaussian, MeanFieldLangevin, Noise, risk
from mfsde.analysis import rates, theory
from mfsde.analysis.check import Check, identity, inequality
from mfsde.analysis.replicas import jackknife
from mfsde.measure import Law
from mfsde.network import Risk
from mfsde.scenarios import BlackScholes, DeepNetwork

from .item import Finding, claim, item, misprint, outside

Array = np.ndarray
Sizes = tuple[int, ...]
DOUBLE = torch.float64


def normals(seed: int, *shape: int) -> Tensor:
    """Standard normals in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def named(name: str, check: Check) -> Check:
    """The check under another name."""
    return replace(check, name=name)


def slope(values: dict[int, Array]) -> rates.Rate:
    """The power of N of replica means.    N -> (R,)."""
    table = xr.DataArray(np.stack(list(values.values())), {"n_particles": list(values)}, ("n_particles", "replica"))
    return rates.power(table)


# N points in place of a law -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SaturatingMean(MeanFieldLangevin):
    """F(m) = ½(∫ tanh dm - y)², U = ½x² + ½ log 2π."""

    y: float
    sigma: float = 0.8

    @cached_property
    def energy(self) -> Energy:
        """F."""
        return Energy(lambda mu: 0.5 * (mu.integrate(saturated) - self.y).square())

    def confinement(self, x: Tensor) -> Tensor:
        """U."""
        return 0.5 * x.square().sum(-1) + 0.5 * math.log(2 * math.pi)

    def initial(self) -> Gaussian:
        """N(0, 1)."""
        return Gaussian([0.0], 1.0)

    @property
    def bound(self) -> float:
        """L of (5), with a = ∫φ dν of any law ν and φ = tanh.

        |δF/δm| = |a - y||φ(x) - a| <= 2(1 + |y|); its own derivative, of mean zero in x' alone, is
        |φ(x) - 2a + y||φ(x') - a| <= 2(3 + |y|), and less where it is normalised in x as well.
        """
        return 8 + 4 * abs(self.y)


def saturated(x: Tensor) -> Tensor:
    """The feature tanh x of a point, (..., 1) -> (...)."""
    return torch.tanh(x).squeeze(-1)


def points_of(law: Law, seed: int, n_replicas: int, n: int, *, paired: bool = False) -> Tensor:
    """Points of a law, (R, N, d): independent, or in pairs x, 2 E x - x."""
    x = law.from_variates(normals(seed, n_replicas, n, law.n_variates))
    if paired:
        x[:, n // 2 :] = 2 * law.as_measure().mean() - x[:, : n // 2]
    return x


@item(
    source="001, Theorem 6; 002, Proposition 4.1",
    statement="|E F(m^N) − F(m*)| ≤ 2L/N for N i.i.d. points of m*, with E F(m^N) − F(m*) = Var(φ)/2N for "
    "F = ½(∫φ dm − y)²; inf_x R_N ≤ inf R + K/N for R = 2F, the risk",
    hypotheses=(
        "m* minimises F, without entropy",
        "points independent with law m*",
        "E sup_ν|δF/δm| + E sup_ν|δ²F/δm²| ≤ L",
        "∫U(θ, θ)dρ ≤ K for every ρ with R(ρ) ≤ inf R + ε₀ (at a minimiser is enough)",
    ),
    fault="points come in pairs mirrored at the mean",
)
def iid_bias(quick: bool, faulty: bool) -> Iterator[Finding]:
    """Means over samples of m* against Var(φ)/2N; the infimum over points by descent."""
    n_replicas = 2_000 if quick else 20_000
    law = Gaussian([0.3], 0.8)
    case = SaturatingMean(y=float(law.as_measure().integrate(saturated)))
    values = {}
    for n in (10, 40, 160):
        x = points_of(law, n, n_replicas, n, paired=faulty)
        values[n] = case.energy(EmpiricalMeasure(x)).numpy()
        bias = theory.iid_bias(case.energy, x, law)
        yield claim(named(f"E F(m^N) = Var(φ)/2N, N = {n}", bias))
        yield claim(named(f"its bound 2L/N, N = {n}", theory.bias_bound(case.energy, x, law, case.bound)))
    mu = law.as_measure()
    variance = float(mu.integrate(lambda x: (saturated(x) - case.y).square()))
    yield claim(identity("½∫ δ²F/δm²(x, x) dm* = ½ Var φ", n * bias.rhs, 0.5 * variance))
    yield outside(named("the bound with L = 0.1", theory.bias_bound(case.energy, x, law, 0.1)))
    rate = slope(values)
    yield claim(identity("power of N", rate.value, -1.0, stderr=rate.stderr))

    teacher = Gaussian([1.0, 0.2], [[1.0, 0.0], [0.0, 0.5]])
    network = taught(teacher)
    mu = teacher.as_measure()
    # K = ∫ U(θ, θ) dm*, U(θ, θ) = E φ(θ·z)².
    k = float(mu.integrate(lambda theta: neuron(theta.unsqueeze(-2), inputs()).square().mean(-1)))
    for n in (1, 4, 16):
        least = 2 * least_over_points(network, teacher, n)
        yield claim(inequality(f"a network of N neurons: inf_x R_N ≤ K/N, N = {n}", least, k / n))
    x = points_of(teacher, 7, 2_000, 10)
    yield claim(named("a network: E F(m^N) = Var/2N, N = 10", theory.iid_bias(network, x, teacher)))

    # The minimiser of F + T KL is another law, at which F is not least.
    entropic = mfsde.limit.gibbs(case)
    above = float(case.energy(entropic.as_measure()))
    n = 10_000
    everywhere = EmpiricalMeasure(torch.full((n, 1), math.atanh(case.y), dtype=DOUBLE))
    gap = abs(float(case.energy(everywhere)) - above)
    yield claim(identity("inf_x F^N = F(m*) = 0", float(case.energy(everywhere)), 0.0, discretisation=1e-15))
    reason = f"argmin V^σ, also written m*, does not minimise F: it lies {gap:.2g} above"
    name = f"with argmin V^σ for m*: |inf F^N − F(m*)| ≤ 2L/N, N = {n}"
    yield outside(inequality(name, gap, 2 * case.bound / n, hypotheses=[reason if gap > 2 * case.bound / n else ""]))


def inputs() -> Tensor:
    """Nine inputs in [-2, 2] and a constant, (9, 2)."""
    z = torch.linspace(-2, 2, 9, dtype=DOUBLE)
    return torch.stack([z, torch.ones_like(z)], -1)


def neuron(theta: Tensor, z: Tensor) -> Tensor:
    """The feature tanh(θ·z).    (..., N, 1, 2), (b, 2) -> (..., N, b)."""
    return torch.tanh((theta * z).sum(-1))


def taught(teacher: Law) -> Risk:
    """½ mean |∫ tanh(θ·z) dm - y|² with the teacher's own outputs y: F(teacher) = 0."""
    y = teacher.as_measure().integrate(lambda theta: neuron(theta.unsqueeze(-2), inputs()))
    return risk(neuron, "squared", inputs(), y.squeeze(0) if y.ndim > 1 else y)


def least_over_points(energy: Energy, law: Law, n: int) -> float:
    """The least F^N that descent finds from four samples of the law: above the infimum."""
    found = []
    for seed in range(4):
        x = law.from_variates(normals(seed, n, law.n_variates)).requires_grad_()
        descent = torch.optim.LBFGS([x], max_iter=100, line_search_fn="strong_wolfe")

        def closure(x: Tensor = x, descent: torch.optim.LBFGS = descent) -> Tensor:
            descent.zero_grad()
            value = energy(EmpiricalMeasure(x))
            value.backward()
            return value

        descent.step(closure)
        found.append(float(energy(EmpiricalMeasure(x.detach()))))
    return min(found)


# Prices ---------------------------------------------------------------------------------------------------------------

# E(X_1 - 100)_+ from x = 100 with μ = .05, σ = .2, by quadrature; not discounted.
CALL = 10.986396449700798


@item(
    source="001, PDE approximation without the curse of dimensionality",
    statement="v(t, x) = E g(W x) = ∫ RΦ(y x) m*(dy), not discounted, m* the law of the multiplier W; the mean of N "
    "draws has the root mean squared error √(Var g(Wx)/N), in which the dimension does not appear",
    hypotheses=("g the realisation of a one-hidden-layer network Φ", "W lognormal: constant μ and σ"),
    misprints=("printed: m* is the law of X_T; with it the factor x enters twice",),
    fault="the exponent of the multiplier lacks −½Σ_j(σ^{ij})²",
)
def feynman_kac(quick: bool, faulty: bool) -> Iterator[Finding]:
    """Closed-form call, exact multipliers and Euler runs; baskets of 1, 10 and 100 correlated assets."""
    n_replicas, n = (100, 2_000) if quick else (400, 20_000)
    case = BlackScholes.basket(1)
    yield claim(identity("call in closed form; by quadrature", case.value(1.0), CALL, discretisation=1e-11))
    coarse, fine = (sides_of_pde(case, h) for h in (2e-4, 1e-4))
    error = abs(fine[0] - coarse[0]) + abs(fine[1] - coarse[1])
    yield claim(identity("its PDE: −∂_t v = ½σ²x²∂²v + μx∂v", *fine, discretisation=error))
    multipliers = drawn(case, 1, n_replicas, n, faulty)
    prices = case.feynman_kac(multipliers).numpy()
    yield claim(identity(f"∫ RΦ(yx) m^N(dy), d = 1, {n_replicas * n:,} draws", prices, CALL))
    yield misprint(identity("with m* the law of X_T", case.feynman_kac(multipliers * case.start[0]).numpy(), CALL))
    wider = replace(case, outer=(1.0, -2.0, 1.0), inner=((1.0,),) * 3, offset=(-80.0, -100.0, -120.0))
    spreads = wider.feynman_kac(multipliers).numpy()
    yield claim(identity("three neurons, a butterfly spread: closed form", spreads, wider.value(1.0)))
    yield from euler_prices(quick)

    variance = variance_of_call(case)
    for dim in (1, 10, 100):
        yield from basket(dim, variance, quick, faulty)


def drawn(case: BlackScholes, seed: int, n_replicas: int, n: int, faulty: bool) -> Tensor:
    """Multipliers over a year, (R, N, d)."""
    z = normals(seed, n_replicas, n, len(case.sigma[0]))
    w = case.multiplier(1.0).from_variates(z)
    if faulty:
        w = w * torch.exp(0.5 * w.new_tensor(case.sigma).square().sum(-1))
    return w


def sides_of_pde(case: BlackScholes, h: float) -> tuple[float, float]:
    """-∂_t v and ½s²x²∂²v + μx∂v of the closed form, by central differences of order two."""
    x = case.start[0]

    def v(start: float, t: float) -> float:
        return replace(case, start=(start,)).value(t)

    # v depends on the time left, so that -∂_t is the derivative in it.
    by_time = (v(x, 1 + h) - v(x, 1 - h)) / (2 * h)
    dx = 10 * h * x
    first = (v(x + dx, 1.0) - v(x - dx, 1.0)) / (2 * dx)
    second = (v(x + dx, 1.0) - 2 * v(x, 1.0) + v(x - dx, 1.0)) / dx**2
    return by_time, 0.5 * case.sigma[0][0] ** 2 * x**2 * second + case.growth[0] * x * first


def variance_of_call(case: BlackScholes) -> float:
    """Var (X_1 - K)_+ in closed form: E (X - K)_+² = E X² Φ(d + s) - 2K E X Φ(d) + K² Φ(d - s)."""
    x, s, strike = case.start[0], case.sigma[0][0], -case.offset[0]
    forward = x * math.exp(case.growth[0])
    d = math.log(forward / strike) / s + 0.5 * s
    square = forward**2 * math.exp(s**2) * special.ndtr(d + s) - 2 * strike * forward * special.ndtr(d)
    return float(square + strike**2 * special.ndtr(d - s)) - case.value(1.0) ** 2


def euler_prices(quick: bool) -> Iterator[Finding]:
    """Runs of the engine: Euler's own mean, and the order of its error against exact solutions on the same paths."""
    # A growth at which the error of the mean and that of the variance do not cancel.
    case = BlackScholes.basket(1, growth=0.2)
    n_replicas, n, finest = 32, 4_000 if quick else 40_000, 16
    settings: dict[str, Any] = {"n_particles": n, "n_replicas": n_replicas, "horizon": 1.0, "seed": 3, "dtype": DOUBLE}
    shape = (n_replicas, n, 1)
    w = torch.stack([Noise(3).increment(k, shape, dtype=DOUBLE) for k in range(finest)]).sum(0)
    solution = torch.tensor(case.start, dtype=DOUBLE) * case.multiplier(1.0).from_variates(w / math.sqrt(finest))
    exact = case.payoff(solution).mean(-1).numpy()
    errors = []
    for per in (4, 2, 1):
        run = mfsde.simulate(case, dt=per / finest, noise=Noise(3, substeps=per), keep_particles=0, **settings)
        errors.append(exact - run.payoff.values[-1])
        if per == 4:
            mean = case.start[0] * (1 + case.growth[0] / 4) ** 4
            yield claim(identity("simulate, dt = ¼: E X = x(1 + μ dt)⁴", run["mean"].values[-1, :, 0], mean))
    yield claim(identity("closed form; exact solutions on the paths of the runs", exact, case.value(1.0)))

    def orders(e: Array) -> Array:
        halvings: Array = np.log2(e[:-1] / e[1:])
        return halvings

    (coarse, fine), spread = jackknife(orders, np.stack(errors, -1))
    yield claim(
        identity(
            "weak order of Euler, dt = 1/8 and 1/16", fine, 1.0, stderr=float(spread[1]),
            discretisation=abs(float(fine - coarse)),
        )
    )  # fmt: skip


def basket(dim: int, variance: float, quick: bool, faulty: bool) -> Iterator[Finding]:
    """The call on the mean of d correlated assets: price within its bounds, N·MSE, the power of N."""
    correlation = 0.3
    case = BlackScholes.basket(dim, correlation=correlation)
    n_replicas, sizes = (200, (32, 128, 512)) if quick else (400, (64, 256, 1024, 4096))
    squares, prices, seconds = {}, np.empty(0), np.empty(0)
    for n in sizes:
        # Half the squared difference of two estimates has the mean of the squared error: no reference is needed.
        w = [drawn(case, 10 * n + k, n_replicas, n, faulty) for k in range(2)]
        one, other = (case.feynman_kac(each).numpy() for each in w)
        squares[n] = 0.5 * (one - other) ** 2
        prices = 0.5 * (one + other)
        x = w[0] * w[0].new_tensor(case.start)
        seconds = x.mean(-1).square().mean(-1).numpy()
    known = float(case.second_moments(1.0).mean())
    yield claim(identity(f"E (basket)², d = {dim}", seconds, known))
    rate = slope(squares)
    yield claim(identity(f"power of N of the RMSE, d = {dim}", rate.value / 2, -0.5, stderr=rate.stderr / 2))
    scaled = sizes[-1] * squares[sizes[-1]]
    if dim == 1:
        yield claim(identity("N·MSE, d = 1: Var g(Wx)", scaled, variance))
        return
    yield claim(inequality(f"N·MSE, d = {dim}: not above d = 1", scaled, variance))
    # Jensen's inequality over assets, and given the factor that they share.
    shared = BlackScholes.basket(1, volatility=0.2 * math.sqrt(correlation))
    yield claim(inequality(f"v, d = {dim} ≤ call on one asset", prices, CALL))
    yield claim(inequality(f"call on the common factor ≤ v, d = {dim}", shared.value(1.0), prices))


# Deep networks --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ActivatedOutput(DeepNetwork):
    """A deep network with an activation after its last layer as well."""

    def network(self, theta: Tensor, z: Tensor) -> Tensor:
        """φ((RΨ)(z))."""
        value: Tensor = getattr(torch, self.activation)(super().network(theta, z))
        return value


def plain(case: DeepNetwork, theta: Tensor, z: Tensor) -> Tensor:
    """The same by torch.nn, one particle at a time.    (N, d), (b, p) -> (N, b, l_L)."""
    modules: list[nn.Module] = []
    for before, after in zip(case.layers, case.layers[1:], strict=False):
        modules += [nn.Linear(before, after, dtype=DOUBLE), {"tanh": nn.Tanh, "relu": nn.ReLU}[case.activation]()]
    network = nn.Sequential(*modules[:-1])
    rows = []
    for psi in theta:
        vector_to_parameters(psi, network.parameters())
        rows.append(network(z).detach())
    return torch.stack(rows)


def backpropagated(case: DeepNetwork, theta: Tensor) -> Array:
    """D_mF(m^N, Ψ_i) by the chain rule written out, layer after layer, for tanh and squared loss.    (N, d)."""
    x, z, y = (v.numpy() for v in (theta, case.inputs, case.targets.reshape(case.n_data, -1)))
    layers = []
    at = 0
    for before, after in zip(case.layers, case.layers[1:], strict=False):
        alpha = x[:, at : at + after * before].reshape(-1, after, before)
        beta = x[:, at + after * before : at + after * (before + 1)]
        layers.append((alpha, beta))
        at += after * (before + 1)
    states = [np.broadcast_to(z, (len(x), *z.shape))]
    for k, (alpha, beta) in enumerate(layers):
        a = states[-1] @ alpha.transpose(0, 2, 1) + beta[:, None]
        states.append(np.tanh(a) if k < len(layers) - 1 else a)
    delta = np.broadcast_to((states[-1].mean(0) - y) / len(y), states[-1].shape)
    parts: list[Array] = []
    for (alpha, _), below in zip(layers[::-1], states[-2::-1], strict=True):
        parts = [(delta.transpose(0, 2, 1) @ below).reshape(len(x), -1), delta.sum(1), *parts]
        delta = (delta @ alpha) * (1 - below**2)
    return np.concatenate(parts, axis=1)


@item(
    source="001, What is a neural net?",
    statement="(RΨ)(z⁰) = α^L z^{L−1} + β^L, z^k = φ(α^k z^{k−1} + β^k); as a feature its risk has "
    "D_mF(m, Ψ) = (1/n)Σ_s (f_s − y_s)·∇_Ψ(RΨ)(z_s), f_s = ∫(RΨ)(z_s)dm, and dF/dt = −∫|D_mF|² dm without noise",
    hypotheses=("φ differentiable", "F(m) = (1/2n)Σ_s|f_s − y_s|²"),
    fault="an activation follows the last layer as well",
)
def deep_network(quick: bool, faulty: bool) -> Iterator[Finding]:
    """The forward pass against torch.nn, the derivative against backpropagation, descent against dissipation."""
    made: Any = ActivatedOutput if faulty else DeepNetwork
    rounding = 1e-13
    for layers in ((1, 4, 3, 1), (3, 5, 5, 5, 5, 2)):
        case = made(layers)
        theta = normals(0, 20, case.dim)
        found = case.network(theta.unsqueeze(-2), case.inputs)
        gap = float((found - plain(case, theta, case.inputs).reshape(found.shape)).abs().max())
        name = f"RΨ less torch.nn, L = {len(layers) - 1}, largest of {found.numel()}"
        yield claim(identity(name, gap, 0.0, discretisation=rounding))
        mu = EmpiricalMeasure(theta)
        automatic = case.energy.intrinsic_derivative(mu, theta).numpy()
        by_hand = backpropagated(case, theta)
        gap = float(np.abs(automatic - by_hand).max())
        yield claim(identity(f"D_mF less the chain rule, L = {len(layers) - 1}", gap, 0.0, discretisation=rounding))

    n, one = 50, made((2, 50, 1))
    alpha, c = normals(1, n, 2), normals(2, n)
    theta = torch.cat([alpha.flatten(), alpha.new_zeros(n), c / n, alpha.new_zeros(1)])
    hidden = torch.tanh(one.inputs @ alpha.mT) @ c / n
    gap = float((one.network(theta[None, None], one.inputs)[0] - hidden).abs().max())
    yield claim(identity("L = 2: RΨ less (1/n) Σ c_i φ(α_i·z)", gap, 0.0, discretisation=rounding))

    # Without noise the risk decreases at the rate of the squared speed.
    case = replace(made(), sigma=0.0)
    steps = 40 if quick else 160
    settings: dict[str, Any] = {
        "n_particles": 20 if quick else 100,
        "horizon": 4.0,
        "seed": 0,
        "dtype": DOUBLE,
        "save_every": 1,
    }
    run = mfsde.simulate(case, dt=4.0 / steps, method="dopri5", **settings)
    x = torch.as_tensor(run.position.values[:, 0])
    rate = np.array([float(speed_squared(case, at)) for at in x])
    time = run.time.values
    spent, halved = (-integrate.simpson(rate[::k], x=time[::k]) for k in (1, 2))
    energy = run.energy.values[:, 0]
    change = float(energy[-1] - energy[0])
    error = abs(float(spent - halved))
    yield claim(identity("F(m_4) − F(m_0) = −∫∫|D_mF|² dm dt", change, float(spent), discretisation=error))
    yield claim(inequality("largest increase of F between saved times", float(np.diff(energy).max()), 0.0))


def speed_squared(case: DeepNetwork, x: Tensor) -> Tensor:
    """∫ |D_mF|² dm of the law of the points.    (N, d)."""
    return case.energy.intrinsic_derivative(EmpiricalMeasure(x), x).square().sum(-1).mean()


# Density --------------------------------------------------------------------------------------------------------------


def logistic(u: Array) -> Array:
    """1/(1 + e^{-u})."""
    return np.asarray(special.expit(u))


def bump(u: Array) -> Array:
    """e^{-u²}: bounded, continuous, not constant, not sigmoidal."""
    values: Array = np.exp(-np.square(u))
    return values


def cubic(u: Array) -> Array:
    """Returns u² + u³."""
    values: Array = u**2 + u**3
    return values


def polynomial_of(activation: Callable[[Array], Array], degree: int) -> str:
    """That an activation is a polynomial: its differences of order degree + 1 vanish."""
    values = activation(np.linspace(-2, 2, 65))
    left = np.abs(np.diff(values, degree + 1)).max()
    if left > 1e-9 * np.abs(values).max():
        return ""
    return f"the activation is a polynomial of degree {degree}: so is every network, and they are not dense"


def square_grid(n: int) -> Array:
    """Points of [-1, 1]², (n², 2)."""
    side = np.linspace(-1, 1, n)
    return np.stack([c.ravel() for c in np.meshgrid(side, side, indexing="ij")], -1)


def neurons(
    activation: Callable[[Array], Array], x: Array, n: int, seed: int, *, offsets: bool = True
) -> Callable[[Array], Array]:
    """The first n of one sequence of random neurons, as features of points.    (M, d) -> (M, n)."""
    rng = np.random.default_rng(seed)
    w, b = 4 * rng.normal(size=(x.shape[1], n)), 4 * rng.uniform(-1, 1, n)
    return lambda at: activation(at @ w + (b if offsets else 0.0))


def residuals(
    features: Callable[[Array], Array], f: Callable[[Array], Array], fitted: Array, held_out: Array, sizes: Sizes
) -> tuple[Array, Array]:
    """L² and sup norm of f - f_N over those of f, f_N least squares with the first N features, on other points.

    Nearly dependent features are held by a ridge of 1e-11 of the mean square, so that what is found is an upper bound.
    """
    train, test = features(fitted), features(held_out)
    gram, sums = train.T @ train, train.T @ f(fitted)
    norms, sups = [], []
    for n in sizes:
        ridge = 1e-11 * np.trace(gram[:n, :n]) / n * np.eye(n)
        left = f(held_out) - test[:, :n] @ linalg.solve(gram[:n, :n] + ridge, sums[:n], assume_a="pos")
        norms.append(math.sqrt(np.mean(left**2) / np.mean(f(held_out) ** 2)))
        sups.append(np.abs(left).max() / np.abs(f(held_out)).max())
    return np.array(norms), np.array(sups)


def largest(x: Array) -> Array:
    """max(|x|, |y|), with edges along the diagonals.    (M, 2) -> (M,)."""
    values: Array = np.abs(x).max(1)
    return values


def staircase(x: Array, f: Callable[[Array], Array], n: int, offsets: bool) -> Array:
    """f(-1) + Σ_j (f(x_j) - f(x_{j-1})) σ(s(x - c_j)): N steep neurons, one in the middle of each of N cells."""
    nodes = np.linspace(-1, 1, n + 1)
    centres, steepness = (nodes[1:] + nodes[:-1]) / 2, STEEP * n / 2
    hidden = logistic(steepness * (x[:, None] - (centres if offsets else 0 * centres)))
    values: Array = f(nodes[:1]) + hidden @ np.diff(f(nodes))
    return values


STEEP = 10.0  # steepness of a neuron of the staircase, in units of one over a cell


def corner(x: Array) -> Array:
    """||x - .3| - ½|, of Lipschitz constant 1."""
    return np.abs(np.abs(x - 0.3) - 0.5)


@item(
    source="002, Theorem 2.1; 001, Universal approximation (Hornik); 003, (8)–(9)",
    statement="inf over N neurons of ‖f − (1/N)Σ a_i σ(w_i·x + b_i)‖ → 0 as N → ∞, in L² and uniformly on compact sets",
    hypotheses=(
        "σ continuous with limits 1 and 0 (Cybenko), or bounded, continuous and not constant (Hornik), or continuous "
        "and no polynomial (003)",
        "f in L²(P), P on a compact set in the third case; f continuous for the uniform norm",
    ),
    fault="the neurons have no offsets b_i",
)
def density(quick: bool, faulty: bool) -> Iterator[Finding]:
    """A staircase of steep neurons within its bound; random neurons with fitted weights; polynomials fail."""
    grid = np.linspace(-1, 1, 4001)
    for n in (8, 64, 512):
        h = 2 / n
        # f changes by h at most over a cell. Its own neuron joins the two ends monotonously, up in the middle: within
        # h/2 of f. The others miss 0 or 1 by a geometric series.
        tails = 2 * math.exp(-STEEP / 2) / (1 - math.exp(-STEEP))
        bound = h * (0.5 + tails)
        found = float(np.abs(staircase(grid, corner, n, not faulty) - corner(grid)).max())
        yield claim(
            inequality(f"sup |f − f_N| of N steep neurons ≤ {2 * (0.5 + tails):.3f}/N, d = 1, N = {n}", found, bound)
        )

    x, between = (square_grid(n) for n in ((31, 60) if quick else (47, 92)))
    # ε and an N(ε).
    enough = {0.1: 64, 0.03: 256} if quick else {0.1: 64, 0.03: 256, 0.01: 1024}
    sizes = (16, *enough.values())
    for activation, name in ((logistic, "σ logistic"), (bump, "σ = exp(−u²)")):
        draws = [
            residuals(neurons(activation, x, sizes[-1], seed, offsets=not faulty), largest, x, between, sizes)
            for seed in range(20)
        ]
        left, sup = (np.stack(v) for v in zip(*draws, strict=True))
        for k, (error, n) in enumerate(enough.items(), 1):
            text = f"{name}, max(|x|, |y|) on the square"
            yield claim(inequality(f"{text}: L² residual, N = {n} ≤ {error:.0%}", left[:, k], error))
            yield claim(inequality(f"{text}: sup residual, N = {n} ≤ N = {sizes[k - 1]}", sup[:, k], sup[:, k - 1]))

    y = largest(x)
    powers = np.stack([x[:, 0] ** i * x[:, 1] ** j for i in range(4) for j in range(4 - i)], -1)
    distance = least_squares(powers, y)
    reason = polynomial_of(cubic, 3)
    for n in (64, 512):
        found = least_squares(neurons(cubic, x, n, 0)(x), y)
        yield claim(identity(f"σ cubic, N = {n}: residual = distance to cubics", found, distance))
        yield outside(inequality(f"σ cubic, N = {n}: ≤ 3 %", found, 0.03, hypotheses=[reason]))


def least_squares(features: Array, y: Array) -> float:
    """What the features leave of y, relative to it.    (M, n), (M,)."""
    left = y - features @ np.linalg.lstsq(features, y, rcond=1e-10)[0]
    return float(np.linalg.norm(left) / np.linalg.norm(y))


# Barron's rate --------------------------------------------------------------------------------------------------------


def ball(dim: int, radius: float, n: int, seed: int) -> Array:
    """Points uniform in a ball, (n, d); evenly spaced on a line."""
    if dim == 1:
        return np.linspace(-radius, radius, n)[:, None]
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, dim))
    return np.asarray(radius * x / np.linalg.norm(x, axis=1, keepdims=True) * rng.uniform(size=(n, 1)) ** (1 / dim))


def first_moment(dim: int, width: float) -> float:
    """∫ |ω||F(ω)| dω = E|ω| = √2 Γ((d+1)/2)/(Γ(d/2) s), ω ~ N(0, I/s²), for f = exp(-|x|²/2s²)."""
    return math.sqrt(2) * math.exp(math.lgamma((dim + 1) / 2) - math.lgamma(dim / 2)) / width


def greedy(x: Array, f: Array, amplitude: float, n: int, *, averaged: bool = True) -> Array:
    """E(f - f_N)² for N = 1, ..., n: f_N = (1 - α) f_{N-1} + α g, g = ±amplitude·1{v·x >= c} the most correlated.

    α minimises the error, and is ½ instead without averaging. Directions v are drawn, thresholds c are all there are.
    The indicators are limits of steep neurons in L² of the points.
    """
    rng = np.random.default_rng(1)
    v = np.ones((1, 1)) if x.shape[1] == 1 else rng.normal(size=(100, x.shape[1]))
    order = np.argsort(x @ v.T, axis=0)
    fitted, errors = np.zeros_like(f), []
    for _ in range(n):
        left = f - fitted
        # Σ of the residual over {v·x >= c}, for all directions and thresholds.
        sums = np.cumsum(left[order][::-1], axis=0)[::-1]
        k, j = np.unravel_index(np.abs(sums).argmax(), sums.shape)
        neuron = np.zeros_like(f)
        neuron[order[k:, j]] = amplitude * np.sign(sums[k, j])
        step = neuron - fitted
        alpha = float(np.clip(left @ step / (step @ step), 0, 1)) if averaged else 0.5
        fitted = fitted + alpha * step
        errors.append(float(np.mean((f - fitted) ** 2)))
    return np.array(errors)


@item(
    source="002, Theorem 2.2 (Barron)",
    statement="some network of N neurons has E(f̂ − f)² ≤ (2r ∫|ω||F(ω)|dω)²/N, P on a ball of radius r",
    hypotheses=("σ sigmoidal", "P supported on B(0, r)", "∫|ω||F(ω)|dω < ∞", "the constant f(0) is not counted"),
    misprints=(
        "printed: E{f̂ − f}, without the square; as it stands it bounds nothing, and read as E|f̂ − f| it is false",
    ),
    fault="the greedy step is ½ in place of the minimiser, about 1/N",
)
def barron(quick: bool, faulty: bool) -> Iterator[Finding]:
    """Frank–Wolfe on half-spaces for a Gaussian target."""
    radius, width, n_points = 1.0, 1.0, 1_000 if quick else 4_000
    most = 64 if quick else 256
    for dim in (1, 3):
        x = ball(dim, radius, n_points, dim)
        f = np.exp(-0.5 * np.square(x).sum(1) / width**2)
        moment = first_moment(dim, width)
        omega = np.random.default_rng(5).normal(size=(200, 1_000, dim)) / width
        norms = np.linalg.norm(omega, axis=-1).mean(1)
        yield claim(identity(f"∫|ω||F|dω sampled; closed, d = {dim}", norms, moment))
        at = x[n_points // 3]
        waves = np.cos(omega @ at).mean(1)
        yield claim(identity(f"f(x) = ∫ e^{{iω·x}}F(ω)dω at a point, d = {dim}", waves, float(f[n_points // 3])))
        amplitude = 2 * radius * moment
        errors = greedy(x, f - 1.0, amplitude, most, averaged=not faulty)
        for n in (1, 4, 16, most):
            bound = amplitude**2 / n
            yield claim(inequality(f"E(f̂ − f)², greedy, d = {dim}, N = {n}", float(errors[n - 1]), bound))

    # Scaled by c both errors scale, by c² with the square and by c without it; the bound by c².
    scale, x = 0.01, ball(1, radius, n_points, 0)
    f = scale * np.exp(-0.5 * x[:, 0] ** 2 / width**2)
    amplitude = scale * 2 * radius * first_moment(1, width)
    squared = float(greedy(x, f - scale, amplitude, 1)[0])
    yield claim(inequality(f"E(f̂ − f)², target times {scale}, N = 1", squared, amplitude**2))
    # A single neuron of a monotone σ is monotone: on one half of the ball, where f falls while it rises, a constant is
    # as near.
    half = f[x[:, 0] > 0]
    least = 0.5 * float(np.abs(half - np.median(half)).mean())
    yield misprint(inequality(f"least E|f̂ − f| of one neuron, target times {scale}", least, amplitude**2))
