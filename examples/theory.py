"""The theorems of mean-field Langevin dynamics, held against a Gaussian flow: in closed form and by particles.

    python examples/theory.py [--small]

F(m) = ½κ(mean - a)², U = ½k x² + log √(2π/k): every quantity has a formula. Each line is a theorem with its margin, the
standard error of the margin over replicas, the declared discretisation error, and the verdict.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import xarray as xr
from torch import Tensor

import mfsde
from mfsde import Energy, Gaussian
from mfsde.analysis import contraction, rates, theory, wasserstein
from mfsde.analysis.gibbs import proximal
from mfsde.analysis.theory import Check


@dataclass(frozen=True)
class GaussianLangevin(mfsde.MeanFieldLangevin):
    """dX = -(κ(E X - a) + ½σ²k X) dt + σ dW."""

    kappa: float = 0.3
    a: float = 1.0
    k: float = 4.0
    sigma: float = 1.0
    initial_mean: float = 2.0
    initial_variance: float = 0.5

    @property
    def energy(self) -> Energy:
        return Energy(lambda mu: 0.5 * self.kappa * (mu.mean()[..., 0, 0] - self.a).square())

    def confinement(self, x: Tensor) -> Tensor:
        return 0.5 * self.k * x.square().sum(-1) + 0.5 * math.log(2 * math.pi / self.k)

    def initial(self) -> Gaussian:
        return Gaussian([self.initial_mean], [[self.initial_variance]])

    def limit(self, t: float) -> Gaussian:
        rate = self.kappa + 0.5 * self.sigma**2 * self.k
        end = self.kappa * self.a / rate
        mean = end + (self.initial_mean - end) * math.exp(-rate * t)
        variance = 1 / self.k + (self.initial_variance - 1 / self.k) * math.exp(-(self.sigma**2) * self.k * t)
        return Gaussian([mean], [[variance]])

    @property
    def minimiser(self) -> Gaussian:
        return Gaussian([self.kappa * self.a / (self.kappa + 0.5 * self.sigma**2 * self.k)], [[1 / self.k]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a few seconds: fewer particles and replicas")
    small = parser.parse_args().small
    settings = {"n_particles": 200 if small else 2000, "n_replicas": 8 if small else 32, "dt": 0.01, "seed": 0}

    # The tensors are small: a second thread waits longer than it works.
    torch.set_num_threads(1)

    langevin = GaussianLangevin()
    show("Closed form", closed_form(langevin))
    show("Contraction (Theorem 5)", theorem_5(langevin))
    run = mfsde.simulate(langevin, horizon=2.0, save_every=5, **settings)
    show(
        f"Particles, N = {run.sizes['particle']}, {run.sizes['replica']} replicas",
        of_particles(langevin, run, settings),
    )
    show("Stationarity of a long run", stationary(langevin, settings))
    show("Bias of N independent points", bias(langevin, settings))
    show("Hypotheses and faults that must be seen", faults(langevin, run))


def closed_form(langevin: GaussianLangevin) -> Iterable[Check]:
    m, star = langevin.limit(0.5), langevin.minimiser
    yield theory.free_energy_dissipation(langevin, langevin.limit, start=0.1, stop=2.0)
    yield theory.first_order(langevin, star)
    yield from theory.functional_inequalities(m, star)
    yield from theory.entropy_sandwich(langevin, m, star)
    bounds = contraction.log_sobolev_constant(proximal(langevin, m.as_measure()))
    print(f"\np_m at t = 0.5: {bounds}")
    print(f"predicted decay of V - V*: e^(-{contraction.predicted_rate(bounds.low, langevin):.4g} t)")


def theorem_5(langevin: GaussianLangevin) -> Iterable[Check]:
    # At small κ the printed exponent is false although its condition holds.
    for scenario in (langevin, replace(langevin, kappa=0.01)):
        bounds = contraction.contraction_of(scenario, [scenario.initial().as_measure()])
        print(f"\nκ = {scenario.kappa}: estimated {bounds}")
        exact = contraction.theorem_5(scenario.kappa * max(1, abs(scenario.a)), scenario.k, scenario.sigma)
        start, later = (wasserstein.distance(scenario.limit(t), scenario.minimiser) for t in (0.0, 1.0))
        for form in ("printed", "corrected"):
            yield contraction.contraction_check(exact, 1.0, later, start, form=form)


def of_particles(langevin: GaussianLangevin, run: xr.Dataset, settings: dict[str, int | float]) -> Iterable[Check]:
    yield theory.free_energy_dissipation(langevin, run)
    yield theory.free_energy_dissipation(langevin, run, law=langevin.limit)
    yield from theory.entropy_sandwich(langevin, run.sel(time=0.5), langevin.minimiser)
    gap = theory.free_energy(langevin, run) - theory.free_energy(langevin, langevin.minimiser)
    bound = gap.isel(time=0, drop=True) * math.exp(-4.0 * 0.5)
    yield theory.inequality("V - V* decays like e^(-2αTt), t = 0.5", gap.sel(time=0.5), bound)
    measured = rates.exponential(gap.assign_attrs(power=1), start=0.3)
    print(f"\nV - V* decays at the rate {measured}")
    yield contraction.decay_rate(measured, 4.0, langevin)
    other = replace(langevin, initial_mean=-1.0, initial_variance=0.1)
    coupled = mfsde.simulate(other, horizon=2.0, save_every=5, **settings)
    yield contraction.stability(run, coupled, lipschitz=langevin.kappa, one_sided=-langevin.k, sigma=langevin.sigma)


def stationary(langevin: GaussianLangevin, settings: dict[str, int | float]) -> Iterable[Check]:
    long = mfsde.simulate(langevin, horizon=8.0, save_every=20, **{**settings, "n_particles": 200})
    yield from theory.stationarity(langevin, long, start=4.0)


def bias(langevin: GaussianLangevin, settings: dict[str, int | float]) -> Iterable[Check]:
    n, law = 50, langevin.limit(0.5)
    feature = Energy(lambda mu: 0.5 * (mu.integrate(lambda x: torch.tanh(x).sum(-1)) - 0.7).square())
    draws = law.sample(100 * int(settings["n_replicas"]) * n, torch.Generator().manual_seed(0)).reshape(-1, n, 1)
    yield theory.iid_bias(feature, draws, law)
    # |δF/δm| <= (1 + 0.7)·2 and |δ²F/δm²| <= 4, whatever the law.
    yield theory.bias_bound(feature, draws, law, 7.4)


def faults(langevin: GaussianLangevin, run: xr.Dataset) -> Iterable[Check]:
    yield theory.free_energy_dissipation(replace(langevin, sigma=1.3), run)
    printed = Gaussian([langevin.kappa * langevin.a / (langevin.kappa + langevin.k)], [[0.5 / langevin.k]])
    yield theory.first_order(langevin, printed)
    concave = replace(langevin, kappa=-0.3)
    yield from theory.entropy_sandwich(concave, langevin.limit(0.5), concave.minimiser)


def show(title: str, checks: Iterable[Check]) -> None:
    found = list(checks)
    print(f"\n{title}")
    for check in found:
        print(f"  {check}")


if __name__ == "__main__":
    main()
