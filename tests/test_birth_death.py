"""Births and deaths: the assignments they are made of, their exact laws, the limit, and what is refused."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import solve_ivp
from scipy.linalg import expm
from torch import Tensor

import mfsde
from mfsde import Dirac, EmpiricalMeasure, Energy, Gaussian, MeanFieldLangevin, Noise, Stream, birth_death, noise
from mfsde.birth_death import check, resolve
from mfsde.clock import Clock
from mfsde.euler import euler
from mfsde.measure import Law
from mfsde.model import Equation
from mfsde.scenarios.mixture_birth_death import TARGET, GaussianMixture
from mfsde.selection import energy_rate, log_density

FLOAT64 = torch.float64
REACTIONS = {name: getattr(birth_death, name) for name in birth_death.REACTIONS}


def normals(*shape: int, seed: int = 0, dtype: torch.dtype = FLOAT64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64).to(dtype)


@dataclass(frozen=True)
class Quadratic:
    """V = k|x|²/2: transport along -∇V with noise σ, births and deaths at α times V; a fault multiplies the rate."""

    k: float = 1.0
    alpha: float = 1.5
    sigma: float = 0.6
    transport: float = 1.0
    centre: float = 1.0
    variance: float = 0.8
    fault: float = 1.0
    dim: int = 1

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        return -self.transport * self.k * x

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> float:
        return self.sigma

    def initial(self) -> Gaussian:
        return Gaussian([self.centre] * self.dim, self.variance)

    def birth_death_rate(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        return 0.5 * self.fault * self.alpha * self.k * x.square().sum(-1)

    def moments(self, times: Any) -> np.ndarray:
        """m' = -km(1 + αv), v' = -2kv - αkv² + σ²: (2, times)."""

        def slope(t: float, y: np.ndarray) -> list[float]:
            m, v = y
            pull, k = self.transport * self.k, self.k * self.alpha
            return [-pull * m - k * m * v, -2 * pull * v - k * v**2 + self.sigma**2]

        start = (self.centre, self.variance)
        return solve_ivp(slope, (0, max(times)), start, t_eval=times, rtol=1e-10, atol=1e-12).y


REACTING = Quadratic(transport=0.0, sigma=0.0)


# One by one, at once --------------------------------------------------------------------------------------------------


def one_by_one(target: Tensor, source: Tensor, n: int) -> list[int]:
    slots = list(range(n))
    for to, of in zip(target.tolist(), source.tolist(), strict=True):
        slots[to] = slots[of]
    return slots


@pytest.mark.parametrize(("n", "events"), [(2, 1), (2, 40), (3, 7), (10, 10), (10, 200), (200, 60), (1000, 900)])
def test_assignments_are_resolved_as_if_done_one_by_one(n, events):
    generator = torch.Generator().manual_seed(n * events)
    for _ in range(40):
        target = torch.randint(0, n, (events,), generator=generator)
        source = (target + torch.randint(1, n, (events,), generator=generator)) % n
        slots = torch.arange(n)
        to, of = resolve(target, source)
        assert len(to.unique()) == len(to)
        slots[to] = slots[of]
        assert slots.tolist() == one_by_one(target, source, n)


def test_long_chains_of_assignments_and_none():
    n = 5000
    along = torch.arange(n - 1)
    for target, source in ((along + 1, along), (along, along + 1), (along.flip(0) + 1, along.flip(0))):
        slots = torch.arange(n)
        to, of = resolve(target, source)
        slots[to] = slots[of]
        assert slots.tolist() == one_by_one(target, source, n)
    empty = torch.empty(0, dtype=torch.int64)
    assert [len(part) for part in resolve(empty, empty)] == [0, 0]


# Who rings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
@pytest.mark.parametrize(("replicas", "n"), [(1, 1), (3, 255), (2, 513), (2, 5000), (1, 100_003), (2, 0)])
def test_rings_are_halves_of_words_below_a_level(dtype, replicas, n, monkeypatch):
    rate, shift = normals(replicas, n, dtype=dtype), 0.1 * normals(replicas, 1, seed=1, dtype=dtype)
    found = Noise(7).rings(rate, 0.3, shift, 5)
    u = Noise(7).uniforms(5, (replicas, -(-n // 512) * 256, 1), dtype=FLOAT64)[..., 0]
    i = torch.arange(n)
    word = ((u * 2.0**32 - 0.5).long())[:, i // 512 * 256 + i % 256]
    half = torch.where(i // 256 % 2 == 0, word % 2**16, word // 2**16)
    rings = (half < (rate * 0.3).add(shift).abs() * 2.0**16).flatten()
    assert torch.equal(found, rings.nonzero().squeeze(-1))
    monkeypatch.setattr(noise, "_compiled", None)
    assert torch.equal(found, Noise(7).rings(rate, 0.3, shift, 5))


def test_rings_of_certain_and_impossible_events_and_bad_input():
    certain = torch.full((1, 1000), -1.0)
    assert torch.equal(Noise(0).rings(certain, 1.0, torch.zeros(1, 1), 0), torch.arange(1000))
    assert len(Noise(0).rings(certain, 1.0, torch.ones(1, 1), 0)) == 0
    with pytest.raises(ValueError, match=r"rate has shape \(1, 1000\) and shift \(1,\)"):
        Noise(0).rings(certain, 1.0, torch.zeros(1), 0)
    with pytest.raises(ValueError, match=r"rate is torch.float32 on cpu, shift is torch.float64"):
        Noise(0).rings(certain, 1.0, torch.zeros(1, 1, dtype=FLOAT64), 0)


@dataclass(frozen=True)
class Frozen:
    """Particles that stay where they are, at given rates per unit of position."""

    rate: float = 1.0

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        return torch.zeros_like(x)

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> float:
        return 0.0

    def initial(self) -> Dirac:
        return Dirac([0.0])

    def birth_death_rate(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        return self.rate * x[..., 0]


def test_a_particle_rings_with_probability_one_minus_exp():
    levels = torch.tensor([-0.9, -0.3, -0.02, -1e-5, 0.0, 0.02, 0.3, 0.9])
    x = levels.repeat(250)[None, :, None].expand(200, -1, 1).contiguous()
    slots, n = [], 250 * 200
    for seed in range(4):
        rate, mean = x[..., 0], torch.zeros(200, 1)
        found = Noise(seed).rings(rate.contiguous(), 1.0, -mean, 3)
        replica, particle = birth_death._places(found, 2000)
        signed = rate[replica, particle].double()
        dies, count = birth_death._events(found, replica, particle, signed, x.shape, Noise(seed), 3)[::2]
        assert int(count.sum()) == len(dies)
        # Deaths are where the target is the ringer; look at those: the level of every target that dies is its own.
        slots.append(count.sum())
    expected = n * (1 - torch.exp(-levels.abs().double())).sum()
    spread = math.sqrt(4 * n * float((torch.exp(-levels.abs()) * (1 - torch.exp(-levels.abs()))).sum()))
    total = float(sum(slots))
    assert abs(total - 4 * float(expected)) < 4 * spread
    # Without thinning a particle rings with probability |L| h.
    assert abs(total - 4 * n * float(levels.abs().sum())) > 20 * spread


# Exact laws -----------------------------------------------------------------------------------------------------------

THREE = (0.0, 1.0, 2.6)


def law_of_a_step(h: float, order: Callable[[tuple[int, ...], list[float]], list[tuple[int, ...]]]) -> dict[Any, float]:
    """The law of the slots of three particles after a step, by enumeration of ringers, orders and others."""
    rates = [v - sum(THREE) / 3 for v in THREE]
    law: dict[Any, float] = {}
    for rings in itertools.product([False, True], repeat=3):
        chance = math.prod(
            1 - math.exp(-abs(r) * h) if on else math.exp(-abs(r) * h) for on, r in zip(rings, rates, strict=True)
        )
        sequences = order(tuple(i for i in range(3) if rings[i]), rates)
        for sequence in sequences:
            for others in itertools.product([1, 2], repeat=len(sequence)):
                slots = [0, 1, 2]
                for i, step in zip(sequence, others, strict=True):
                    j = (i + step) % 3
                    to, of = (i, j) if rates[i] > 0 else (j, i)
                    slots[to] = slots[of]
                law[tuple(slots)] = law.get(tuple(slots), 0.0) + chance / len(sequences) / 2 ** len(sequence)
    return law


def any_order(ringers: tuple[int, ...], rates: list[float]) -> list[tuple[int, ...]]:
    return list(itertools.permutations(ringers))


def deaths_first(ringers: tuple[int, ...], rates: list[float]) -> list[tuple[int, ...]]:
    births_after = [
        all(rates[i] > 0 or rates[j] <= 0 for i, j in itertools.pairwise(p)) for p in any_order(ringers, rates)
    ]
    return list(itertools.compress(any_order(ringers, rates), births_after))


def chi_square(counts: dict[Any, int], law: dict[Any, float]) -> float:
    """The p-value of counts under a law; 0 where something impossible happened."""
    if set(counts) - set(law):
        return 0.0
    cells = [cell for cell in law if law[cell] > 1e-12]
    seen = np.array([counts.get(cell, 0) for cell in cells])
    return float(
        stats.chisquare(seen, seen.sum() * np.array([law[c] for c in cells]) / sum(law[c] for c in cells)).pvalue
    )


def test_a_step_of_three_particles_has_the_enumerated_law():
    h, replicas = 0.68, 60_000
    x = torch.tensor(THREE, dtype=FLOAT64)[None, :, None].repeat(replicas, 1, 1)
    start = x[0, :, 0].clone()
    birth_death.jumps(Equation(Frozen(), x), 0.0, h, Noise(2), 0, x)
    slots = torch.searchsorted(start, x[..., 0])
    cells, counts = slots.unique(dim=0, return_counts=True)
    seen = {tuple(cell): int(n) for cell, n in zip(cells.tolist(), counts, strict=True)}
    assert chi_square(seen, law_of_a_step(h, any_order)) > 1e-3
    # An order that prefers deaths is another law, and so is another step.
    assert chi_square(seen, law_of_a_step(h, deaths_first)) < 1e-6
    assert chi_square(seen, law_of_a_step(1.06 * h, any_order)) < 1e-6


def chain(n: int, start: int, rate: float, t: float) -> dict[int, float]:
    """The law of the number K of particles with V = rate, n - K others having 0: K → K - 1 at rate·K(n-K)/(n-1)."""
    k = np.arange(n + 1)
    down = rate * k * (n - k) / (n - 1)
    generator = np.diag(-down) + np.diag(down[1:], -1)
    return dict(enumerate(expm(t * generator)[start]))


@pytest.mark.parametrize(("reaction", "steps"), [("clocks", 2), ("jumps", 250)])
def test_two_states_follow_the_logistic_chain(reaction, steps):
    n, start, rate, replicas = 10, 6, 1.4, 6000
    x = torch.zeros(replicas, n, 1)
    x[:, :start] = 1.0
    equation = Equation(Frozen(rate), x)
    for step in range(steps):
        REACTIONS[reaction](equation, 0.0, 1.0 / steps, Noise(3), step, x)
    values, counts = x.sum((1, 2)).long().unique(return_counts=True)
    seen = dict(zip(values.tolist(), counts.tolist(), strict=True))
    assert chi_square(seen, chain(n, start, rate, 1.0)) > 1e-3
    # "Another" particle makes rates N/(N - 1) larger: p' = -rate·N/(N - 1) p(1 - p) for the chain's drift.
    assert chi_square(seen, chain(n, start, rate * (n - 1) / n, 1.0)) < 1e-6
    assert chi_square(seen, chain(n, start, 2 * rate, 1.0)) < 1e-6


def test_many_particles_in_two_states_follow_the_logistic_equation():
    n, replicas, rate, steps = 5000, 20, -2.0, 200
    x = torch.zeros(replicas, n, 1)
    x[:, : n // 10] = 1.0
    equation = Equation(Frozen(rate), x)
    shares = []
    for step in range(steps):
        birth_death.jumps(equation, 0.0, 1.0 / steps, Noise(4), step, x)
        if step % 50 == 49:
            shares.append(x.mean((1, 2)).double())

    def worst(rate: float) -> float:
        z = []
        for k, share in enumerate(shares):
            t = (k + 1) * 50 / steps
            p = 1 / (1 + 9 * math.exp(-rate * n / (n - 1) * t))
            z.append(float((share.mean() - p).abs() / (share.std() / math.sqrt(replicas))))
        return max(z)

    assert worst(2.0) < 4
    for fault in (-2.0, 4.0, 2.0 / steps):
        assert worst(fault) > 10


# The limit ------------------------------------------------------------------------------------------------------------


def deviation(run: Any, case: Quadratic, skip: int = 1) -> float:
    """Largest deviation of mean and variance from the limit, over components, in standard errors over replicas."""
    exact = case.moments(run.time.values)
    worst = 0.0
    for name, curve in (("mean", exact[0]), ("covariance", exact[1])):
        values = run[name].values.reshape(*run[name].shape[:2], -1)[skip:, :, 0]
        error = values.std(1, ddof=1) / math.sqrt(values.shape[1])
        worst = max(worst, float(np.max(np.abs(values.mean(1) - curve[skip:]) / error)))
    return worst


def run_of(case: Quadratic, method: str = "euler", **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "n_particles": 1000, "n_replicas": 64, "horizon": 1.0, "dt": 0.002, "seed": 5, "save_every": 125,
        "keep_particles": 0, "observables": ("mean", "covariance"),
    }  # fmt: skip
    return mfsde.simulate(case, method=method, **{**settings, **changes})


def split_moments(case: Quadratic, h: float, steps: int) -> tuple[float, float]:
    """Euler step, then exact reaction: the splitting's own moments for Gaussian laws."""
    m, v = case.centre, case.variance
    for _ in range(steps):
        shrink = 1 - h * case.k * case.transport
        m, v = shrink * m, shrink**2 * v + case.sigma**2 * h
        after = 1 / (1 / v + case.alpha * case.k * h)
        m, v = m * after / v, after
    return m, v


def test_jumps_with_transport_and_noise_follow_the_gaussian_equation():
    case = Quadratic()
    run = run_of(case)
    assert deviation(run, case) < 4
    # What the step contributes is below a standard error.
    m, v = split_moments(case, 0.002, 500)
    errors = [run[name].values[-1].std() / 8 for name in ("mean", "covariance")]
    assert abs(m - case.moments([1.0])[0][0]) < errors[0]
    assert abs(v - case.moments([1.0])[1][0]) < errors[1]
    for fault in (-1.0, 2.0, 0.002):
        assert deviation(run_of(replace(case, fault=fault)), case) > 8
    with pytest.raises(ValueError, match=r"\|L\| dt = .* > 1: more events are due"):
        run_of(replace(case, fault=500.0))


def test_clocks_with_transport_follow_the_gaussian_equation():
    case = Quadratic(sigma=0.0)
    settings = {"n_particles": 50, "n_replicas": 128, "horizon": 0.5, "dt": 0.02, "save_every": 5}
    run = run_of(case, "dopri5+clocks", **settings)
    # 50 particles: the mean of the empirical covariances is (1 - 1/N) of that of the law, to first order.
    run["covariance"] = run["covariance"] / 0.98
    assert deviation(run, case) < 4
    for fault in (-1.0, 2.0):
        wrong = run_of(replace(case, fault=fault), "dopri5+clocks", **settings)
        wrong["covariance"] = wrong["covariance"] / 0.98
        assert deviation(wrong, case) > 8


def test_a_constant_in_the_rate_changes_the_number_of_events_and_not_the_law(monkeypatch):
    case = Quadratic()
    centred = run_of(case)
    for constant in (0.0, 2.0):
        monkeypatch.setattr(birth_death, "mean_rate", lambda rate, c=constant: rate.new_full((len(rate), 1), -c))
        shifted = run_of(case)
        assert deviation(shifted, case) < 4
        assert int(shifted.events[1:].sum()) > int(centred.events[1:].sum())
    # All die, at the mean rate V + 2: about three times as many events as |V - mean| gives.
    assert float(shifted.events[1:].sum()) > 3 * float(centred.events[1:].sum())


def test_weights_of_a_pure_reaction_are_exact_for_every_step():
    x = normals(3, 50, 2)
    for steps in (1, 7):
        equation = Equation(REACTING, x, torch.softmax(normals(3, 50, seed=1), -1))
        start = equation.weights
        before = x.clone()
        for step in range(steps):
            events = birth_death.weights(equation, 0.0, 1.4 / steps, Noise(0), step, x)
        exact = start * torch.exp(-1.4 * REACTING.alpha * 0.5 * x.square().sum(-1))
        torch.testing.assert_close(equation.weights, exact / exact.sum(-1, keepdim=True), rtol=1e-12, atol=0)
        torch.testing.assert_close(equation.weights.sum(-1), torch.ones(3, dtype=FLOAT64), rtol=0, atol=1e-15)
        assert torch.equal(x, before)
        assert events.tolist() == [0, 0, 0]


def weighted_moments(case: Quadratic, h: float) -> list[float]:
    """Mean and variance at time 1 of a Gauss-Hermite system that is carried and weighted."""
    start = case.initial().as_measure()
    x = start.points[None].clone()
    equation = Equation(case, x, start.weights[None])
    for step in range(round(1 / h)):
        euler(equation, Clock(h), Noise(0), step, x)
        birth_death.weights(equation, (step + 1) * h, h, Noise(0), step, x)
    mu = equation.measure(x)
    return [mu.mean().item(), mu.covariance().item()]


def test_weights_with_transport_follow_the_gaussian_equation():
    case = Quadratic(sigma=0.0)
    exact = case.moments([1.0])[:, 0]
    coarse, fine = (np.array(weighted_moments(case, h)) - exact for h in (0.01, 0.005))
    assert np.all(np.abs(coarse) < 0.01)
    np.testing.assert_allclose(coarse / fine, 2, rtol=0.03)
    np.testing.assert_allclose(2 * fine - coarse, 0, atol=2e-5)
    for fault in (-1.0, 2.0, 0.005):
        assert np.abs(np.array(weighted_moments(replace(case, fault=fault), 0.005)) - exact).max() > 0.03


@dataclass(frozen=True)
class Learning:
    """E(μ) = ½(∫ sin dμ - a)² + ¼(∫ x² dμ)²: an interacting energy, its gradient flow and its rate."""

    alpha: float = 0.7

    @property
    def energy(self) -> Energy:
        return Energy(
            lambda mu: (
                0.5 * (mu.integrate(lambda x: x[..., 0].sin()) - 0.3).square()
                + 0.25 * mu.integrate(lambda x: x[..., 0].square()).square()
            )
        )

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        return -self.energy.intrinsic_derivative(mu, x)

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> float:
        return 0.0

    def initial(self) -> Gaussian:
        return Gaussian([0.5], [[1.0]])

    def birth_death_rate(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        return self.alpha * energy_rate(self, mu, x)


def test_energy_dissipates_by_the_gradient_and_the_variance_of_the_first_variation():
    case, h = Learning(), 1e-3
    start = case.initial().as_measure()
    x = start.points[None].clone()
    equation = Equation(case, x, start.weights[None])
    for step in range(200):
        mu = equation.measure(x.clone())
        before = case.energy(mu).item()
        slope = case.energy.functional_derivative(mu, mu.points)
        squared = case.energy.intrinsic_derivative(mu, mu.points).square().sum(-1)
        gradient, variance = ((mu.weights * y).sum().item() for y in (squared, slope.square()))
        euler(equation, Clock(h), Noise(0), step, x)
        birth_death.weights(equation, 0.0, h, Noise(0), step, x)
        rate = (case.energy(equation.measure(x)).item() - before) / h
        assert rate == pytest.approx(-gradient - case.alpha * variance, rel=6 * h)
        assert abs(rate + gradient) > 20 * h * gradient


# Reinjection ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fed(Quadratic):
    """Ornstein-Uhlenbeck particles that are replaced at a rate by draws from N(2, ½)."""

    alpha: float = 0.0
    inflow: float = 0.8

    def reinjection(self) -> tuple[float, Law]:
        return self.inflow, Gaussian([2.0] * self.dim, 0.5)

    def recursion(self, h: float, steps: int) -> list[list[float]]:
        """Mean and second moment at every step: Euler, then m + (1 - e^{-ρh})(m_π - m)."""
        m, s, keep = self.centre, self.variance + self.centre**2, math.exp(-self.inflow * h)
        rows = [[m, s]]
        for _ in range(steps):
            m, s = (1 - h * self.k) * m, (1 - h * self.k) ** 2 * s + self.sigma**2 * h
            m, s = keep * m + (1 - keep) * 2.0, keep * s + (1 - keep) * 4.5
            rows.append([m, s])
        return rows


def fed_deviation(case: Fed, method: str, truth: Fed) -> float:
    run = run_of(case, method, n_particles=500, horizon=2.0, dt=0.05, save_every=10)
    means = run["mean"].values[..., 0]
    seconds = run["covariance"].values[..., 0, 0] + means**2
    exact = np.array(truth.recursion(0.05, 40))[::10]
    worst = 0.0
    for values, curve in ((means, exact[:, 0]), (seconds, exact[:, 1])):
        error = values[1:].std(1, ddof=1) / 8
        worst = max(worst, float(np.max(np.abs(values[1:].mean(1) - curve[1:]) / error)))
    return worst


@pytest.mark.parametrize("reaction", ["jumps", "clocks", "weights"])
def test_reinjection_follows_its_moment_equations(reaction):
    # With clocks the exact rate is seen over each step, as the recursion has it; few events let them end soon.
    case = Fed()
    assert fed_deviation(case, f"euler+{reaction}", case) < 4
    for fault in (0.0, 0.4, 1.6):
        assert fed_deviation(replace(case, inflow=fault), "euler+jumps", case) > 6


def test_reinjection_fills_what_births_empty_and_is_known_by_its_parents():
    case = Fed(transport=0.0, sigma=0.0, alpha=1.0, inflow=0.5, dim=2)
    run = mfsde.simulate(case, n_particles=203, n_replicas=3, horizon=2.0, dt=0.05, seed=1, save_every=4, dtype=FLOAT64)
    position, parent = run.position.values, run.parent.values
    for frame in range(1, len(position)):
        for r in range(3):
            old = parent[frame, r] >= 0
            assert np.array_equal(position[frame, r][old], position[frame - 1, r][parent[frame, r][old]])
            # A reinjected particle is new, and so are its copies.
            seen = {tuple(row) for row in position[frame - 1, r]}
            assert not any(tuple(row) in seen for row in position[frame, r][~old])
    new = (parent[1:] == -1).mean()
    assert 0.5 * (1 - math.exp(-0.1)) < new < 2 * (1 - math.exp(-0.1))
    copies = [
        len(rows) - len({tuple(row) for row in rows}) for rows in position[1:][parent[1:] == -1].reshape(1, -1, 2)
    ]
    assert copies[0] > 0


# Invariances ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Diffusing:
    """The equation of Quadratic without births and deaths."""

    sigma: float = 0.6

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        return -1.0 * x

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> float:
        return self.sigma

    def initial(self) -> Gaussian:
        return Gaussian([1.0], 0.8)


@pytest.mark.parametrize("reaction", REACTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
def test_rate_zero_is_the_diffusion_to_the_bit(reaction, dtype):
    settings = {
        "n_particles": 77,
        "n_replicas": 3,
        "horizon": 1.0,
        "dt": 0.1,
        "seed": 2,
        "save_every": 5,
        "dtype": dtype,
    }
    with_it = mfsde.simulate(Quadratic(alpha=0.0), method=f"euler+{reaction}", **settings)
    without = mfsde.simulate(Diffusing(), **settings)
    assert np.array_equal(with_it.position.values, without.position.values)
    if reaction == "weights":
        np.testing.assert_allclose(with_it.weight.values, 1 / 77, rtol=1e-6)
    else:
        assert np.array_equal(with_it.parent.values, np.broadcast_to(np.arange(77), (3, 3, 77)))
        assert int(with_it.events.sum()) == 0


@pytest.mark.parametrize("method", ["euler", "euler+clocks", "euler+weights"])
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
def test_a_replica_is_the_same_in_every_batch(method, dtype):
    case = Fed(alpha=1.5, inflow=0.3, dim=2)
    settings = {"n_particles": 201, "horizon": 0.3, "dt": 0.05, "seed": 2, "save_every": 2, "dtype": dtype}
    many = mfsde.simulate(case, method=method, n_replicas=5, **settings)
    for few in (1, 2):
        alone = mfsde.simulate(case, method=method, n_replicas=few, **settings)
        for name in alone.data_vars:
            assert np.array_equal(alone[name].values, many[name].isel(replica=slice(few)).values), name


def test_births_and_deaths_conserve_particles_and_their_places():
    run = mfsde.simulate(
        replace(REACTING, dim=3), n_particles=300, n_replicas=2, horizon=1.0, dt=0.02, seed=3, save_every=10
    )
    position, parent, events = run.position.values, run.parent.values, run.events.values
    assert np.isfinite(position).all()
    assert np.array_equal(parent[0], np.broadcast_to(np.arange(300), (2, 300)))
    for frame in range(1, len(position)):
        for r in range(2):
            assert np.array_equal(position[frame, r], position[frame - 1, r][parent[frame, r]])
    assert events[0].tolist() == [0, 0]
    assert (events[1:] > 20).all()
    # Each event copies one particle over one other.
    moved = (parent[1:] != np.arange(300)).sum(-1)
    assert (moved > 0).all()
    assert (moved <= events[1:]).all()


def test_more_particles_share_their_candidates_and_time_may_stop_anywhere(tmp_path):
    case = Quadratic()
    settings = {"n_particles": 150, "n_replicas": 2, "horizon": 0.4, "dt": 0.02, "seed": 1, "save_every": 5}
    whole = mfsde.simulate(case, **settings)
    often = mfsde.simulate(case, **{**settings, "save_every": 1})
    assert np.array_equal(whole.position.values, often.position.values[::5])
    rate = normals(1, 2000, dtype=torch.float32)
    few, many = (Noise(1).rings(rate[:, :n].contiguous(), 0.1, torch.zeros(1, 1), 4) for n in (700, 2000))
    assert torch.equal(few, many[many < 700])


@pytest.mark.parametrize("method", ["euler", "euler+clocks", "euler+weights"])
def test_without_the_compiled_kernel_a_run_is_the_same(method, monkeypatch):
    # There, as on a GPU, assignments are resolved instead of done one by one.
    case = Fed(alpha=4.0, inflow=0.3, dim=2)
    settings = {"n_particles": 41, "n_replicas": 3, "horizon": 0.3, "dt": 0.02, "seed": 2, "save_every": 5}
    compiled = mfsde.simulate(case, method=method, **settings)
    monkeypatch.setattr(noise, "_compiled", None)
    monkeypatch.setattr(noise, "_backend", lambda kind: "numpy")
    portable = mfsde.simulate(case, method=method, **settings)
    for name in compiled.data_vars:
        assert np.array_equal(compiled[name].values, portable[name].values), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", ["euler", "euler+clocks", "euler+weights"])
def test_cuda_follows_the_cpu(method):
    case = Fed(alpha=1.5, inflow=0.3, dim=2)
    settings = {"n_particles": 1001, "n_replicas": 3, "horizon": 0.2, "dt": 0.02, "seed": 2, "dtype": FLOAT64}
    cpu, cuda = (mfsde.simulate(case, method=method, device=device, **settings) for device in ("cpu", "cuda"))
    for name in cpu.data_vars:
        np.testing.assert_allclose(cuda[name].values, cpu[name].values, rtol=1e-9, atol=1e-12)


# The rate of an energy ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Annealed(MeanFieldLangevin):
    """F = κ/2 |mean - a|², U = |x|²/2, with births and deaths at α(δF/δm + T U + T log K_h * m)."""

    kappa: float = 0.5
    sigma: float = 1.0
    alpha: float = 1.0
    bandwidth: float = 0.4
    entropy: float = 1.0

    @property
    def energy(self) -> Energy:
        return Energy(lambda mu: 0.5 * self.kappa * (mu.mean() - 1.0).square().sum((-2, -1)))

    def confinement(self, x: Tensor) -> Tensor:
        return 0.5 * x.square().sum(-1)

    def initial(self) -> Gaussian:
        return Gaussian([-1.0], [[1.5]])

    def birth_death_rate(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        level = energy_rate(self, mu, x)
        return self.alpha * (level + self.entropy * 0.5 * self.sigma**2 * log_density(mu, x, self.bandwidth))

    def moments(self, times: Any) -> np.ndarray:
        """Gaussian: m' = -(κ(m-1) + Tm)(1 + αv), v' = 2T(1 - v) - αT(v² - v²/(v + h²))."""
        temperature = 0.5 * self.sigma**2

        def slope(t: float, y: np.ndarray) -> list[float]:
            m, v = y
            pull = self.kappa * (m - 1) + temperature * m
            shrink = temperature * (v**2 - v**2 / (v + self.bandwidth**2))
            return [-pull * (1 + self.alpha * v), 2 * temperature * (1 - v) - self.alpha * shrink]

        return solve_ivp(slope, (0, max(times)), (-1.0, 1.5), t_eval=times, rtol=1e-10, atol=1e-12).y


def test_the_rate_of_an_energy_is_its_first_variation_and_the_confinement():
    case, x = Annealed(), normals(2, 7, 3)
    mu = EmpiricalMeasure(x, torch.softmax(normals(2, 7, seed=1), -1))
    at = normals(2, 4, 3, seed=2)
    exact = case.energy.functional_derivative(mu, at) + 0.5 * case.confinement(at)
    difference = energy_rate(case, mu, at) - exact
    torch.testing.assert_close(difference, difference[:, :1].expand(2, 4), rtol=0, atol=1e-13)
    cold = energy_rate(Learning(), EmpiricalMeasure(x[..., :1]), x[..., :1])
    torch.testing.assert_close(cold, Learning().energy.variation(EmpiricalMeasure(x[..., :1]), x[..., :1]))
    with pytest.raises(TypeError, match="Quadratic has no energy"):
        energy_rate(Quadratic(), mu, at)


def test_the_log_density_is_that_of_a_mixture_of_gaussians():
    x, w = normals(2, 9, 2), torch.softmax(normals(2, 9, seed=1), -1)
    at = normals(2, 5, 2, seed=3)
    kernel = mfsde.Gaussian([0.0, 0.0], 0.36)
    pairs = kernel.log_prob(at[:, :, None] - x[:, None])
    exact = torch.logsumexp(pairs + w.log()[:, None], -1)
    torch.testing.assert_close(log_density(EmpiricalMeasure(x, w), at, 0.6), exact, rtol=0, atol=1e-12)
    own = kernel.log_prob(x[:, :, None] - x[:, None]).masked_fill(torch.eye(9, dtype=torch.bool), -math.inf)
    exact = torch.logsumexp(own, -1) - math.log(8)
    mu = EmpiricalMeasure(x)
    torch.testing.assert_close(log_density(mu, x, 0.6, include_self=False), exact, rtol=0, atol=1e-12)
    assert bool((log_density(mu, x, 0.6) > kernel.log_prob(torch.zeros(2, dtype=FLOAT64)) - math.log(9)).all())
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="expected a positive length"):
            log_density(mu, x, bad)


def test_birth_death_langevin_follows_the_free_energy_of_a_gaussian():
    case = Annealed()
    settings = {
        "n_particles": 300,
        "n_replicas": 16,
        "horizon": 0.4,
        "dt": 0.01,
        "save_every": 20,
        "dtype": torch.float32,
    }
    assert deviation(run_of(case, **settings), case) < 4
    # Without the entropy, or the births and deaths at all.
    for fault in ({"entropy": 0.0}, {"alpha": 0.0}, {"alpha": -1.0}):
        assert deviation(run_of(replace(case, **fault), **settings), case) > 5


# The mixture of Gaussians ---------------------------------------------------------------------------------------------


def test_the_mixture_has_the_loss_and_the_drift_of_its_integrals():
    case = GaussianMixture(alpha=0.7)
    none = EmpiricalMeasure(torch.zeros(1, 2, 2, dtype=FLOAT64))
    assert case.energy(none).item() == pytest.approx(0.0688682701, abs=5e-11)
    theta, w = normals(2, 6, 2), torch.softmax(normals(2, 6, seed=1), -1)
    grid = torch.linspace(-14, 14, 4001, dtype=FLOAT64)
    target = sum(a * mfsde.Gaussian([b], s).log_prob(grid[:, None]).exp() for a, b, s in TARGET)
    for weights in (None, w):
        mu = EmpiricalMeasure(theta, weights)
        units = mfsde.Gaussian([0.0], 0.5).log_prob((grid[:, None] - theta[:, None, :, 1]).unsqueeze(-1)).exp()
        network = (mu.weights[:, None] * theta[:, None, :, 0] * units).sum(-1)
        loss = 0.5 * torch.trapezoid((target - network).square(), grid)
        torch.testing.assert_close(case.energy(mu), loss, rtol=0, atol=1e-12)
        b = case.drift(0.0, theta, mu)
        torch.testing.assert_close(b, -case.energy.intrinsic_derivative(mu, theta), rtol=0, atol=1e-14)
        rate = case.birth_death_rate(0.0, theta, mu)
        shift = rate - 0.7 * case.energy.functional_derivative(mu, theta)
        torch.testing.assert_close(shift, shift[:, :1].expand(2, 6), rtol=0, atol=1e-14)


def test_the_mixture_reinjects_when_asked_only():
    assert not hasattr(GaussianMixture(), "reinjection")
    rate, law = replace(GaussianMixture(), reinjection_rate=0.3).reinjection()
    assert (rate, law.cov.diagonal().tolist()) == (0.3, [1.0, 4.0])
    for wrong, told in (
        ({"initial_places": "right"}, "expected 'uniform' or 'left'"),
        ({"reinjection_rate": -1.0}, ">= 0"),
    ):
        with pytest.raises(ValueError, match=told):
            GaussianMixture(**wrong)
    start = GaussianMixture(initial_deviation=0.5).initial()
    drawn = start.from_variates(normals(20_000, 2))
    assert bool((drawn[:, 1].abs() < 2).all())
    for mu in (EmpiricalMeasure(drawn), start.as_measure()):
        exact = torch.diag(torch.tensor([0.25, 4 / 3], dtype=FLOAT64))
        torch.testing.assert_close(mu.covariance(), exact, rtol=0, atol=0.03)


def test_descent_stays_where_births_and_reinjection_leave():
    settings = {"n_particles": 100, "n_replicas": 8, "horizon": 40.0, "dt": 0.2, "seed": 0, "keep_particles": 0}

    def final(**fields: Any) -> tuple[float, float]:
        loss = mfsde.simulate(GaussianMixture(initial_places="left", **fields), **settings).loss.values[-1]
        return float(loss.mean()), float(loss.std(ddof=1) / math.sqrt(len(loss)))

    descent, with_births = final(alpha=0.0), final(alpha=1.0)
    escaped = final(alpha=1.0, reinjection_rate=0.01)
    assert descent[0] - escaped[0] > 4 * math.hypot(descent[1], escaped[1])
    assert escaped[0] + 4 * escaped[1] < 0.4 * descent[0]
    # Births alone put no neuron where there is none: the local minimum is ½∫f² of what is not seen, and stays.
    assert descent[0] > 0.0136
    assert with_births[0] > 0.0136
    everywhere = mfsde.simulate(GaussianMixture(), **settings).loss.values[-1]
    assert everywhere.mean() < 0.1 * descent[0]


# What is refused ------------------------------------------------------------------------------------------------------


def equation_of(case: Any, n: int = 20, weights: Tensor | None = None) -> Equation:
    return Equation(case, normals(1, n, 1), weights)


@dataclass(frozen=True)
class Fallible(Quadratic):
    """A rate that fails late; reinjection as given."""

    value: float = math.nan

    def birth_death_rate(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        rate = super().birth_death_rate(t, x, mu)
        if t > 0.15:
            rate[1, 4] = self.value
        return rate


@pytest.mark.parametrize("reaction", REACTIONS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rates_that_are_not_finite_stop_the_run(reaction, value):
    with pytest.raises(
        FloatingPointError,
        match=rf"Fallible.birth_death_rate is {value} at time 0.2, replica 1, particle 4; expected a",
    ):
        mfsde.simulate(
            Fallible(value=value), n_particles=20, n_replicas=2, horizon=1.0, dt=0.1, seed=0, method=f"euler+{reaction}"
        )


def test_a_mean_rate_that_overflows_is_told_apart():
    x = torch.ones(1, 4, 1)
    with pytest.raises(FloatingPointError, match=r"its mean over the particles overflows torch.float32"):
        birth_death.jumps(Equation(Frozen(2e38), x), 0.0, 0.1, Noise(0), 0, x)


def test_a_step_that_is_too_long_names_one_that_would_do():
    x = torch.tensor([[[0.0], [0.0], [0.0], [40.0]]])
    told = r"\|L\| = 30 at time 0.5, replica 0, particle 3 .* dt = 0.033 would just do, dt = 0.0033 keeps"
    with pytest.raises(ValueError, match=told):
        birth_death.jumps(Equation(Frozen(), x), 0.5, 0.1, Noise(0), 0, x)
    birth_death.jumps(Equation(Frozen(), x), 0.5, 0.033, Noise(0), 0, x)
    x = torch.tensor([[[0.0], [0.0], [0.0], [4e6]]])
    with pytest.raises(ValueError, match=r"events per particle are due in the step before time 0.5 in replica 0"):
        birth_death.clocks(Equation(Frozen(), x), 0.5, 0.1, Noise(0), 0, x)


def test_systems_that_a_reaction_cannot_run_are_refused():
    for reaction in ("jumps", "clocks"):
        with pytest.raises(ValueError, match=r"N = 1 has no other; take n_particles >= 2"):
            check(equation_of(Quadratic(), 1), reaction)
        with pytest.raises(ValueError, match=r"would not conserve mass; use the reaction \"weights\""):
            check(equation_of(Quadratic(), 2, torch.full((1, 2), 0.5, dtype=FLOAT64)), reaction)
        check(equation_of(Quadratic(), 2), reaction)
    check(equation_of(Quadratic(), 1), "weights")
    with pytest.raises(ValueError, match="unknown reaction 'flips'; expected one of jumps, clocks, weights"):
        check(equation_of(Quadratic()), "flips")
    for inflow in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="expected a finite rate per unit time, >= 0"):
            check(equation_of(Fed(inflow=inflow)), "jumps")
    wrong = equation_of(Fed())
    for law, told in ((Gaussian([0.0, 0.0], 1.0), "a law in dimension 2"), (3.0, "a float")):
        wrong.__dict__["reinjection"] = (1.0, law)
        with pytest.raises(ValueError, match=f"gives {told}; expected"):
            check(wrong, "jumps")


def test_weights_that_lost_mass_or_degenerated_are_refused():
    x = normals(1, 4, 1)
    equation = Equation(Frozen(), x, torch.full((1, 4), 0.2, dtype=FLOAT64))
    with pytest.raises(FloatingPointError, match=r"replica 0 have total mass 0.8 at time 1; expected a probability"):
        birth_death.weights(equation, 1.0, 0.1, Noise(0), 0, x)
    equation.weights = None
    with pytest.raises(ValueError, match="moves weights, and the system has none"):
        birth_death.weights(equation, 1.0, 0.1, Noise(0), 0, x)
    x = torch.tensor([[[0.0], [1.0], [2.0]]])
    equation = Equation(Frozen(), x, torch.full((1, 3), 1 / 3))
    birth_death.weights(equation, 1.0, 12.0, Noise(0), 0, x)
    # Nothing is lost on the way: what has become small can grow again.
    assert float(equation.weights.min()) > 0
    with pytest.raises(FloatingPointError, match=r"at time 2 particle 0 of replica 0 holds all the mass"):
        birth_death.weights(equation, 2.0, 12.0, Noise(0), 0, x)


def test_a_weight_too_small_for_its_dtype_stays_positive_and_comes_back():
    x = torch.tensor([[[0.0], [0.1], [200.0]]])
    equation = Equation(Frozen(), x, torch.full((1, 3), 1 / 3))
    birth_death.weights(equation, 0.0, 1.0, Noise(0), 0, x)
    assert float(equation.weights[0, 2]) == torch.finfo(torch.float32).tiny
    assert float(equation.weights.sum()) == pytest.approx(1, abs=1e-6)


def test_reinjected_particles_share_no_word_with_their_decision():
    # Channels 0 and 1 of the stream decide; the variates start at channel 2.
    law = Gaussian([0.0], 1.0)
    z = birth_death._variates(law, Noise(1), 3, (2, 5), 0, torch.zeros(2, 5, 1, dtype=FLOAT64))
    drawn = Noise(1).normals(3, (2, 5, 3), stream=Stream.REINJECTION, dtype=FLOAT64)
    assert torch.equal(z, drawn[..., 2:])


@dataclass(frozen=True)
class Renewed:
    """Particles at 5 that only come from outside: E X_t = 5 e^{-t} for a law of mean 0 at rate 1."""

    inflow: float = 1.0

    def drift(self, t, x, mu):
        return torch.zeros_like(x)

    def diffusion(self, t, x, mu):
        return 0.0

    def initial(self):
        return mfsde.Dirac([5.0])

    def reinjection(self):
        return self.inflow, mfsde.Gaussian([0.0], 1.0)


@pytest.mark.parametrize("method", ["euler+jumps", "euler+clocks", "euler+weights"])
def test_reinjection_needs_no_rate_of_births(method):
    """Euler's own mean: a particle survives a step with probability e^{-h} in all three."""
    run = mfsde.simulate(Renewed(), n_particles=200, n_replicas=30, horizon=1.0, dt=0.1, seed=4, method=method)
    means = run.position.isel(time=-1, component=0).mean("particle").values
    stderr = means.std(ddof=1) / len(means) ** 0.5
    assert abs(means.mean() - 5 * math.exp(-1)) < 4 * stderr
    assert abs(means.mean() - 5) > 8 * stderr
    assert abs(means.mean() - 5 * math.exp(-2)) > 8 * stderr
    if "events" in run:
        assert int(run.events.max()) == 0  # nobody was born of another


def test_particles_from_outside_the_domain_are_refused_at_the_door():
    @dataclass(frozen=True)
    class Held(Renewed):
        def project(self, x):
            return x.clamp(0, 6)

    with pytest.raises(ValueError, match=r"Held\.reinjection draws from a law of which .*% lies outside the domain"):
        mfsde.simulate(Held(), n_particles=10, horizon=1.0, dt=0.1, seed=0)

    @dataclass(frozen=True)
    class Circle(Renewed):
        period = 6.0

        def project(self, x):
            return torch.remainder(x, 6.0)

    mfsde.simulate(Circle(), n_particles=10, horizon=1.0, dt=0.1, seed=0)  # on a circle nothing is outside


def test_jumps_of_a_decoupled_scenario_are_refused_since_copies_are_not_independent():
    flow = mfsde.decoupled(Quadratic(), mfsde.Gaussian([0.0], 1.0))
    with pytest.raises(ValueError, match="particles that copy one another are no independent copies"):
        mfsde.simulate(flow, n_particles=10, horizon=1.0, dt=0.1, seed=0)
    mfsde.simulate(flow, n_particles=10, horizon=0.2, dt=0.1, seed=0, method="euler+weights")


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_a_blow_up_is_named_before_the_rate_that_it_makes_infinite(method):
    @dataclass(frozen=True)
    class Explosive(Quadratic):
        def drift(self, t, x, mu):
            return x**3

    with pytest.raises(mfsde.BlowUp, match=r"Explosive blew up: the state is .* at step"):
        mfsde.simulate(Explosive(alpha=0.0), n_particles=20, horizon=20.0, dt=0.2, seed=0, method=method)
