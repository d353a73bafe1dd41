"""Uniform chaos, multiplicative noise and common noise, in linear models whose moments close at every N and dt."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from scipy import linalg, stats

import mfsde
from mfsde import Gaussian, Noise, Stream
from mfsde.analysis import chaos, rates
from mfsde.analysis.check import Check, identity, inequality
from mfsde.measure import Dirac
from mfsde.scenarios import CommonNoiseOU, MeanFieldGBM, MeanFieldOU

from .item import Finding, claim, item, outside

Array = np.ndarray
DOUBLE = torch.float64

# Chaos that is uniform in time ----------------------------------------------------------------------------------------

CONFINED = MeanFieldOU(kappa=1.0, coupling=0.8, sigma=0.7, initial_mean=(1.0,), initial_variance=0.5)


def law_of_scheme(case: MeanFieldOU, dt: float) -> Callable[[float], Dirac]:
    """A law with the mean of Euler's limit, (1 - κ dt)^k m₀: the drift sees no more of it."""
    return lambda t: Dirac([(1 - case.kappa * dt) ** round(t / dt) * m for m in case.initial_mean])


def coupled_errors(case: MeanFieldOU, dt: float, n_steps: int) -> Array:
    """N E|X^{i,N} - X̄^i|² of Euler after 0, ..., n_steps steps.

    All D^i = X^{i,N} - X̄^i of a replica are one D. With Y the mean of the X̄^i less its expectation and λ = κ + α,

        D₊ = (1 - κ dt) D + α dt Y,    Y₊ = (1 - λ dt) Y + σ √dt ξ/√N,

    from D = 0 and Var Y = v₀/N, so that E D², E DY and E Y² close. As dt -> 0 and t -> ∞ N E D² tends to
    α²σ²/(2λκ(κ + λ)); without confinement, κ = 0, it grows like α²σ²t/λ².
    """
    stay, relax, pull = 1 - case.kappa * dt, 1 - (case.kappa + case.coupling) * dt, case.coupling * dt
    p, q, s = 0.0, 0.0, case.initial_variance
    found = [p]
    for _ in range(n_steps):
        p, q, s = (
            stay**2 * p + 2 * stay * pull * q + pull**2 * s,
            relax * (stay * q + pull * s),
            relax**2 * s + case.sigma**2 * dt,
        )
        found.append(p)
    return np.array(found)


def growth(errors: xr.DataArray) -> str:
    """That the error still grows in the second half of a run, as `uniform_in_time` reports it."""
    rate = chaos.uniform_in_time(errors)
    if rate.low <= 0:
        return ""
    return f"nothing confines the mean: the error still grows at the rate {rate.value:.2g} in the second half"


@item(
    source="001, Outlook i)",
    statement="sup_t E|X^{i,N} − X̄^i|² ≤ C/N; linear case: N E|X^{i,N} − X̄^i|² → α²σ²/(2λκ(κ + λ)), λ = κ + α",
    hypotheses=("confinement κ > 0 of the mean", "the copies have the noise and the initial points of the particles"),
    fault="the coupling of particles and copies is 1.4 α",
)
def uniform_chaos(quick: bool, faulty: bool) -> Iterator[Finding]:
    """Coupled runs against the exact error of the scheme; without confinement it grows."""
    n_replicas, sizes = (600, (10, 40, 160)) if quick else (2_000, (10, 40, 160, 640))
    dt, n_steps, every = 0.05, 240, 20
    settings: dict[str, Any] = {
        "horizon": dt * n_steps, "dt": dt, "seed": 0, "save_every": every, "dtype": DOUBLE, "n_replicas": n_replicas,
        # The errors of all particles of a replica are equal.
        "keep_particles": 2,
    }  # fmt: skip
    case = replace(CONFINED, coupling=1.4 * CONFINED.coupling) if faulty else CONFINED
    copies = mfsde.decoupled(case, law_of_scheme(CONFINED, dt))
    runs = [mfsde.simulate(case, n_particles=n, **settings) for n in sizes]
    references = [mfsde.simulate(copies, n_particles=n, **settings) for n in sizes]
    exact = coupled_errors(CONFINED, dt, n_steps)[::every]
    bound = float(exact.max())
    for n, run, reference in zip(sizes, runs, references, strict=True):
        errors = chaos.squared_error(run, reference)
        for t in (1.0, 4.0, 12.0):
            at = n * errors.sel(time=t, method="nearest").values
            yield claim(identity(f"N E|X − X̄|² at t = {t:g}, N = {n}", at, float(exact[round(t / dt / every)])))
        largest = chaos.uniform_error(run, reference)
        name = f"N sup_t E|X − X̄|² ≤ C, N = {n}"
        yield claim(inequality(name, n * float(largest), bound, stderr=n * float(largest.stderr)))
    for t in (1.0, 4.0, 12.0):
        rate = rates.power(chaos.table(runs, references, time=t))
        yield claim(identity(f"power of N at t = {t:g}", rate.value, -1.0, stderr=rate.stderr))
    late = chaos.uniform_in_time(chaos.squared_error(runs[-1], references[-1]))
    half = slice(len(exact) // 2, None)
    expected = np.polynomial.polynomial.polyfit(runs[-1].time.values[half], np.log(exact[half]), 1)[1]
    # The exact error still grows at this rate: what is left of the transient.
    yield claim(
        identity("growth rate for t in [6, 12]", late.value, 0.0, stderr=late.stderr, discretisation=abs(expected))
    )

    lam = CONFINED.kappa + CONFINED.coupling
    limit = (CONFINED.coupling * CONFINED.sigma) ** 2 / (2 * lam * CONFINED.kappa * (CONFINED.kappa + lam))
    at = sizes[-1] * chaos.squared_error(runs[-1], references[-1]).values[-1]
    scheme = abs(float(exact[-1]) - limit)
    yield claim(identity("late error: α²σ²/(2λκ(κ + λ))", at, limit, discretisation=scheme))

    free = replace(CONFINED, kappa=0.0)
    n = sizes[1]
    run, reference = (
        mfsde.simulate(each, n_particles=n, **settings)
        for each in (free, mfsde.decoupled(free, law_of_scheme(free, dt)))
    )
    errors = chaos.squared_error(run, reference)
    grown = float(coupled_errors(free, dt, n_steps)[-1])
    yield claim(identity(f"κ = 0: N E|X − X̄|² at t = 12, N = {n}", n * errors.values[-1], grown))
    yield outside(
        inequality("κ = 0: N E|X − X̄|² ≤ C at t = 12", n * errors.values[-1], bound, hypotheses=[growth(errors)])
    )


# Multiplicative noise -------------------------------------------------------------------------------------------------

GROWING = MeanFieldGBM(
    growth=0.1, mean_growth=0.3, sigma=0.5, mean_sigma=0.3, initial_mean=1.0, initial_log_variance=0.1
)


def euler_moments(case: MeanFieldGBM, n: int, dt: float, n_steps: int) -> tuple[float, float]:
    """E X_i and E X_i² of N Euler particles.

    With M their mean and q = E M²: E X_i M = q by exchangeability, and the noise of M has 1/N of E(sX + cM)² dt.
    """
    a, b, s, c = case.growth, case.mean_growth, case.sigma, case.mean_sigma
    m, variance = float(case.initial().mean), float(case.initial().cov)
    p, q = m**2 + variance, m**2 + variance / n
    for _ in range(n_steps):
        noise = dt * (s**2 * p + (2 * s * c + c**2) * q)
        p = (1 + a * dt) ** 2 * p + (2 * (1 + a * dt) * b * dt + (b * dt) ** 2) * q + noise
        q = (1 + (a + b) * dt) ** 2 * q + noise / n
        m *= 1 + (a + b) * dt
    return m, p


def moments_of_particles(case: MeanFieldGBM, n: int, t: float) -> float:
    """E X_i² of N particles in continuous time: p' = (2a + s²)p + (2b + 2sc + c²)q, q' = 2(a + b)q + noise/N."""
    a, b, s, c = case.growth, case.mean_growth, case.sigma, case.mean_sigma
    shared = 2 * s * c + c**2
    generator = np.array([[2 * a + s**2, 2 * b + shared], [s**2 / n, 2 * (a + b) + shared / n]])
    m, variance = float(case.initial().mean), float(case.initial().cov)
    return float((linalg.expm(t * generator) @ [m**2 + variance, m**2 + variance / n])[0])


def coupled_growth(case: MeanFieldGBM, n: int, dt: float, n_steps: int) -> float:
    """E|X^{i,N} - X̄^i|² of Euler, the copies seeing the scheme's own mean m.

    With D_i = X^{i,N} - X̄^i, Z_i = X̄^i - m and G the mean of the D + Z,

        D_i₊ = (1 + a dt) D_i + b dt G + √dt ξ_i (s D_i + c G),    Z_i₊ = (1 + a dt) Z_i + √dt ξ_i (s Z_i + (s + c) m),

    so that E D_i², E D_iD_j, E D_iZ_i, E D_iZ_j and E Z_i² close; E D_i = E D_i m = 0.
    """
    a, b, s, c = case.growth, case.mean_growth, case.sigma, case.mean_sigma
    m, stay, pull = float(case.initial().mean), 1 + a * dt, b * dt
    own = pair = own_z = pair_z = 0.0
    z = float(case.initial().cov)
    for _ in range(n_steps):
        with_d, with_z = (own + (n - 1) * pair) / n, (own_z + (n - 1) * pair_z) / n
        # E D_i G, E Z_i G and E G².
        dg, zg, gg = with_d + with_z, with_z + z / n, with_d + 2 * with_z + z / n
        drifted = 2 * stay * pull * dg + pull**2 * gg
        own, pair, own_z, pair_z, z, m = (
            stay**2 * own + drifted + dt * (s**2 * own + 2 * s * c * dg + c**2 * gg),
            stay**2 * pair + drifted,
            stay**2 * own_z + stay * pull * zg + dt * (s**2 * own_z + s * c * zg),
            stay**2 * pair_z + stay * pull * zg,
            stay**2 * z + dt * (s**2 * z + (s + c) ** 2 * m**2),
            (stay + pull) * m,
        )
    return own


def stratonovich(case: MeanFieldGBM) -> MeanFieldGBM:
    """The Itô equation of dX = (aX + bm) dt + (sX + cm)∘dW: ½s(sX + cm) more drift, the law frozen."""
    s, c = case.sigma, case.mean_sigma
    return replace(case, growth=case.growth + 0.5 * s**2, mean_growth=case.mean_growth + 0.5 * s * c)


@item(
    source="001, Outlook ii)",
    statement="dX = (aX + b E X)dt + (sX + c E X)dW: m' = (a + b)m, P' = (2a + s²)P + (2b + 2sc + c²)m²; "
    "E|X^{i,N} − X̄^i|² = O(1/N)",
    hypotheses=("Itô's integral", "coefficients Lipschitz in x and in the law"),
    fault="the noise is read as Stratonovich's: ½s(sX + c E X) more drift",
)
def multiplicative_noise(quick: bool, faulty: bool) -> Iterator[Finding]:
    """Runs against Euler's own moments at every N, against those of the limit, and against coupled copies."""
    n_replicas = 2_000 if quick else 20_000
    case = stratonovich(GROWING) if faulty else GROWING
    dt, n_steps = 0.05, 20
    settings: dict[str, Any] = {"horizon": 1.0, "seed": 1, "dtype": DOUBLE}
    for n in (4, 32):
        run = mfsde.simulate(case, n_particles=n, n_replicas=n_replicas, dt=dt, keep_particles=0, **settings)
        mean, square = euler_moments(GROWING, n, dt, n_steps)
        yield claim(identity(f"E X at t = 1, Euler, N = {n}", run["mean"].values[-1, :, 0], mean))
        yield claim(identity(f"E X² at t = 1, Euler, N = {n}", run.second_moment.values[-1], square))

    many = 4_000 if quick else 40_000
    run = mfsde.simulate(case, n_particles=many, n_replicas=16, dt=dt, keep_particles=0, **settings)
    mean, square = GROWING.moments(1.0)
    scheme = [abs(e - x) for e, x in zip(euler_moments(GROWING, many, dt, n_steps), (mean, square), strict=True)]
    yield claim(identity(f"limit: m, N = {many}", run["mean"].values[-1, :, 0], mean, discretisation=scheme[0]))
    yield claim(identity(f"limit: P, N = {many}", run.second_moment.values[-1], square, discretisation=scheme[1]))
    closure = mfsde.limit.moments(GROWING, [0.0, 1.0])
    found = float(closure.covariance[-1, 0, 0]) + float(closure["mean"][-1, 0]) ** 2
    yield claim(identity("P by the engine's moment equations", found, square, discretisation=1e-8 * square))

    # A Stratonovich scheme, given the drift that makes it solve Itô's equation.
    n = 32
    halves = [
        mfsde.simulate(
            case, n_particles=n, n_replicas=n_replicas // 4, dt=dt / k, noise=Noise(1, substeps=2 // k),
            method="heun", keep_particles=0, **settings,
        ).second_moment.values[-1]
        for k in (1, 2)
    ]  # fmt: skip
    error = abs(float(np.mean(halves[1] - halves[0])))
    known = moments_of_particles(GROWING, n, 1.0)
    yield claim(identity(f"E X² by Heun's scheme, N = {n}", halves[1], known, discretisation=error))

    sizes = (10, 40, 160)
    coupled = {**settings, "dt": dt, "n_replicas": 300 if quick else 2_000}

    def mean_of_scheme(t: float) -> Dirac:
        return Dirac(float(GROWING.initial().mean) * (1 + (GROWING.growth + GROWING.mean_growth) * dt) ** round(t / dt))

    copies = mfsde.decoupled(case, mean_of_scheme)
    runs = [mfsde.simulate(case, n_particles=n, **coupled) for n in sizes]
    references = [mfsde.simulate(copies, n_particles=n, **coupled) for n in sizes]
    exact = {n: coupled_growth(GROWING, n, dt, n_steps) for n in sizes}
    for n, one, other in zip(sizes, runs, references, strict=True):
        errors = chaos.squared_error(one, other).values[-1]
        yield claim(identity(f"N E|X − X̄|² at t = 1, N = {n}", n * errors, n * exact[n]))
    rate = rates.power(chaos.table(runs, references, time=1.0))
    # What 1/N² leaves of the exact error's own power.
    bent = max(abs(math.log(exact[n] / exact[4 * n]) / math.log(4) - 1) for n in sizes[:-1])
    yield claim(identity("power of N", rate.value, -1.0, stderr=rate.stderr, discretisation=bent))


# Common noise ---------------------------------------------------------------------------------------------------------

SHARED = CommonNoiseOU(
    kappa=0.8, coupling=1.1, sigma=0.7, shared=0.5, initial_mean=(1.5,), initial_variance=0.4
)  # fmt: skip


def variances(rate: float, start: float, noise: float, dt: float, n_steps: int) -> float:
    """Euler's variance of an Ornstein-Uhlenbeck process: v₊ = (1 - rate dt)² v + noise² dt."""
    v = start
    for _ in range(n_steps):
        v = (1 - rate * dt) ** 2 * v + noise**2 * dt
    return v


def conditional_means(case: CommonNoiseOU, dt: float, n_steps: int, n_replicas: int, seed: int) -> Array:
    """E[X | W⁰] of Euler along the common noise of a run, M₊ = (1 - κ dt) M + σ⁰ √dt ξ⁰.    (R,)."""
    m = np.full(n_replicas, case.initial_mean[0])
    for k in range(n_steps):
        shared = Noise(seed).increment(k, (n_replicas, 1, 1), stream=Stream.COMMON, dtype=DOUBLE)[:, 0, 0].numpy()
        m = (1 - case.kappa * dt) * m + case.shared * math.sqrt(dt) * shared
    return m


@item(
    source="001, Outlook iv)",
    statement="given W⁰ the law of dX = −(κX + α(X − E[X|W⁰]))dt + σdW + σ⁰dW⁰ is N(M, v) with dM = −κM dt + σ⁰dW⁰, "
    "v' = −2(κ + α)v + σ²; Var X = v + Var M",
    hypotheses=("W⁰ one path for all particles", "linear coefficients, Gaussian initial law"),
    fault="every particle has a noise of size σ⁰ of its own in place of the common one",
)
def common_noise(quick: bool, faulty: bool) -> Iterator[Finding]:
    """Particles of a replica against the conditional law along its own W⁰, replicas against the law of M."""
    n_replicas = 400 if quick else 4_000
    dt, n_steps = 0.05, 30
    case = replace(SHARED, sigma=math.hypot(SHARED.sigma, SHARED.shared), shared=0.0) if faulty else SHARED
    settings: dict[str, Any] = {"horizon": dt * n_steps, "dt": dt, "seed": 2, "dtype": DOUBLE, "n_replicas": n_replicas}
    rate, centre = SHARED.kappa + SHARED.coupling, SHARED.initial_mean[0] * (1 - SHARED.kappa * dt) ** n_steps
    v = variances(rate, SHARED.initial_variance, SHARED.sigma, dt, n_steps)
    own = variances(SHARED.kappa, SHARED.initial_variance, SHARED.sigma, dt, n_steps)
    common = variances(SHARED.kappa, 0.0, SHARED.shared, dt, n_steps)
    path = conditional_means(SHARED, dt, n_steps, n_replicas, 2)
    misses, spread = {}, {}
    for n in (20, 80, 320):
        x = mfsde.simulate(case, n_particles=n, **settings).position.values[-1, :, :, 0]
        mean = x.mean(1)
        yield claim(identity(f"variance given W⁰, N = {n}", x.var(1, ddof=1), v))
        misses[n] = (mean - path) ** 2
        yield claim(identity(f"N E(mean of N − M)², M along the run's W⁰, N = {n}", n * misses[n], own))
        spread[n] = (mean - centre) ** 2
        yield claim(identity(f"variance of the mean of N = {n}", spread[n], common + own / n))
    yield claim(identity("skewness given W⁰, N = 320", stats.skew(x, axis=1, bias=False), 0.0))
    yield claim(identity("excess kurtosis given W⁰, N = 320", stats.kurtosis(x, axis=1, bias=False), 0.0))
    table = xr.DataArray(np.stack(list(misses.values())), {"n_particles": list(misses)}, ("n_particles", "replica"))
    power = rates.power(table)
    yield claim(identity("power of N of E(mean of N − M)²", power.value, -1.0, stderr=power.stderr))

    t, n = dt * n_steps, 320
    # Var X = E Var(X|W⁰) + Var E[X|W⁰], in continuous time and with infinitely many particles.
    total = float(SHARED.marginal(t).cov)
    known: Gaussian = SHARED.conditional(t, [0.0])
    scheme = abs(v * (1 - 1 / n) + common + own / n - total)
    yield claim(identity("Var X of the limit, W⁰ not known", ((x - centre) ** 2).mean(1), total, discretisation=scheme))
    inner = abs(v - float(known.cov))
    yield claim(identity("Var(X|W⁰) of the limit", x.var(1, ddof=1), float(known.cov), discretisation=inner))
    yield outside(averaging_out(spread, own))
    yield from conditional_law(dt, n_steps, path, float(known.cov))


def conditional_law(dt: float, n_steps: int, path: Array, variance: float) -> Iterator[Finding]:
    """The stochastic Fokker-Planck equation of the law given W⁰, along the paths of the runs."""
    times, solve = [0.0, dt * n_steps], mfsde.limit.fokker_planck
    fine, coarse = (solve(SHARED, None, times, dt=dt, seed=2, n_replicas=4, n_nodes=g) for g in (129, 65))
    means, rough = (law["mean"].values[-1, :, 0] for law in (fine, coarse))
    grid = float(np.abs(means - rough).max())
    for r in range(2):
        yield claim(identity(f"SPDE: mean along W⁰ of replica {r}", means[r], path[r], discretisation=grid))
    halved = solve(SHARED, None, times, dt=dt / 2, seed=2, n_nodes=129)
    by_half, by_whole = (float(law.covariance[-1, 0, 0, 0]) for law in (halved, fine))
    # Of first order in dt: what halving changes is what it leaves.
    error = abs(by_half - by_whole) + abs(by_whole - float(coarse.covariance[-1, 0, 0, 0]))
    yield claim(identity("SPDE: variance along W⁰", by_half, variance, discretisation=error))


def averaging_out(spread: dict[int, Array], own: float) -> Check:
    """The variance of the mean of N particles as if it tended to 0, which needs independent ones."""
    few, many = min(spread), max(spread)
    ratio = float(spread[few].mean() / spread[many].mean())
    reason = f"the particles share W⁰: {many // few} times as many have 1/{ratio:.2g} of the variance of the mean"
    shares = ratio < 0.5 * many / few
    name = f"variance of the mean of N = {many} without common noise"
    return identity(name, spread[many], own / many, hypotheses=[reason if shares else ""])
