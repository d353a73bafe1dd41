"""Stochastic gradient descent as a method of a run: the drift at a step is that of a sample of the data.

One scenario gives three things that can then be compared: `drift`, the gradient flow on all the data, which "euler" and
the limit use; `sampled_drift`, an unbiased estimate of it from the sample of one step, which "sgd" uses; and their
common limit as the step goes to zero, since the sample's noise has mean zero and disappears like √ε.
"""

from __future__ import annotations

import functools
import math
import numbers
from typing import Any

import torch
from torch import Tensor

from .clock import Clock
from .draws import Draws
from .euler import explicit
from .langevin import number
from .measure import EmpiricalMeasure
from .model import Equation, confinement_gradient, energy_of, scenario_name, unchanged
from .network import minibatch_derivative, risks
from .noise import Noise
from .tape import is_recording

# Long name of a run's time axis.
TIME = "time kε of step k, ε = dt: step sizes s_k = ε ξ(kε)/2"

SAMPLING = ("with_replacement", "without_replacement", "epochs")


def sgd(equation: Equation, clock: Clock, noise: Noise, step: int, x: Tensor) -> None:
    """X += ε b̂(t, X, m; sample) + √ε σ(t, X, m) ξ, in place, at t = kε.    x: (R, N, d), at step k; ε = dt.

    The sample is drawn from the keyed stream DATA, one for each replica, whatever the number of particles.

    Raises:
        ValueError: sampled_drift returned another shape, or changed x.

    """
    t, mu, scenario = clock.time(step), equation.measure(x), equation.scenario
    sample = scenario.sample(Draws(noise, step, len(x), x.dtype, x.device))
    drift = unchanged(f"{equation.name}.sampled_drift", x, lambda: scenario.sampled_drift(t, x, mu, sample))
    if drift.shape != x.shape or drift.dtype is not x.dtype:
        raise ValueError(
            f"{equation.name}.sampled_drift returned shape {tuple(drift.shape)} in {drift.dtype}; expected "
            f"{tuple(x.shape)} in {x.dtype}, one row per particle, from the sample of each replica."
        )
    explicit(equation, clock, noise, step, x, mu, drift.detach())


def check(equation: Equation) -> None:
    """Refuses scenarios that have no data to sample.

    Raises:
        ValueError: no `sample` or `sampled_drift`; a minibatch that the data cannot give.

    """
    missing = [name for name in ("sample", "sampled_drift") if not callable(getattr(equation.scenario, name, None))]
    if missing:
        raise ValueError(
            f"method 'sgd' samples the data of {equation.name}, which defines no {' and no '.join(missing)}; write "
            "sample(draws), the data of one step, and sampled_drift(t, x, mu, sample), an unbiased estimate of the "
            "drift from it, or inherit mfsde.NoisySGD. 'euler' follows the drift itself."
        )
    if isinstance(equation.scenario, NoisySGD):
        equation.scenario.check_batch()


class NoisySGD:
    """Noisy stochastic gradient descent on the risk of a two-layer network, and the flow that it follows.

        b(t, x, m) = -ξ(t) (D_mF(m, x) + T ∇U(x)),    σ(t) = σ √ξ(t),    T = σ²/2.

    With method "sgd" and ε = dt, step k from t = kε takes a minibatch's risk F̂ in place of F,

        θ_i += -ε ξ(t) (D_m F̂(m, θ_i) + T ∇U(θ_i)) + √(2 T ε ξ(t)) g_i,

    and as ε → 0, N → ∞ the law of the θ_i follows ∂_t m = ξ(t) (∇·(m (∇δF/δm + T ∇U)) + T Δm), the W₂ flow of
    F + T KL(m | e^{-U}) in the clock ∫ ξ. "euler" steps the same flow with the gradient of all the data.

    Conventions, against [1]: time is t = kε, k = ⌊t/ε⌋, and his step sizes are s_k = ε ξ(kε)/2. His loss (y - f)² is
    twice the "squared" loss here, so that his (3.5), which moves by 2 s_k ∇σ_* (y - f), is the step above and F = R/2:
    his PDE (5.4) is the W₂ flow of R/2. The noise is √(4 T s_k) g, which adds T Δρ as in (8.2); his √(2 T s_k) adds
    half of it.

    A frozen dataclass that inherits it declares `energy`, an `mfsde.risk(...)` (or a sum of it and other energies,
    whose gradient is taken exactly), and `initial()`; and as it needs them `batch_size`, `sigma` (0: no noise),
    `sampling`, `confinement(x)` = U (none: 0) and `step_size(t)` = ξ (1).

    sampling: "with_replacement", independent data; "without_replacement", distinct data within a minibatch; "epochs",
    every datum once in each pass through the data, in a new random order. Minibatches of the first two are independent
    from step to step, and the gradient is unbiased given the past; in epochs it is unbiased, but not given the past.
    The latter two sort n numbers, at every step and at every pass.

    Raises ValueError for a minibatch that is empty or larger than the data, an unknown sampling, a step size that is
    negative or infinite; TypeError for an energy without a risk.

    [1] Montanari, One lecture on two-layer neural networks (2018), (3.1)-(3.5), (5.1)-(5.5), (8.1)-(8.6).
    """

    energy: Any
    declares = ("energy",)
    sigma: Any = 0.0
    batch_size: int = 1
    sampling: str = "with_replacement"

    def step_size(self, t: float) -> float:
        """ξ(t) >= 0."""
        return 1.0

    def drift(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> Tensor:
        """-ξ(t) (D_mF(mu, x) + T ∇U(x)), on all the data."""
        rate = self._rate(t)
        return self._confined(rate, x, energy_of(self).intrinsic_derivative(mu, x) * -rate)

    def diffusion(self, t: float, x: Tensor, mu: EmpiricalMeasure) -> float | Tensor:
        """σ √ξ(t)."""
        rate = self._rate(t)
        return number(self, "sigma") * (rate.sqrt() if isinstance(rate, Tensor) else math.sqrt(rate))

    def sample(self, draws: Draws) -> Tensor:
        """The minibatch of a step: numbers of data, int64, (R, b)."""
        self.check_batch()
        n, b = self._n_data, self.batch_size
        if self.sampling == "with_replacement":
            return draws.integers(b, n)
        if self.sampling == "without_replacement":
            return draws.permutations(n)[:, :b]
        return _pass_through(draws, n, b)

    def sampled_drift(self, t: float, x: Tensor, mu: EmpiricalMeasure, sample: Tensor) -> Tensor:
        """-ξ(t) (D_mF̂(mu, x) + T ∇U(x)), F̂ the risk on the minibatch.    x: (R, N, d), sample: (R, b)."""
        rate = float(self._rate(t))
        return self._confined(rate, x, minibatch_derivative(energy_of(self), mu, x, sample, -rate))

    def check_batch(self) -> None:
        """Refuses minibatches that the data cannot give (ValueError)."""
        n, b = self._n_data, self.batch_size
        if self.sampling not in SAMPLING:
            raise ValueError(
                f"{scenario_name(self)}: unknown sampling {self.sampling!r}; expected one of {', '.join(SAMPLING)}."
            )
        if isinstance(b, bool) or not isinstance(b, numbers.Integral) or b < 1:
            raise ValueError(f"{scenario_name(self)}: batch_size = {b!r}; expected a whole number >= 1.")
        if b > n:
            raise ValueError(
                f"{scenario_name(self)}: batch_size = {b} is larger than the data, {n} points; take at most {n}, or "
                "'euler' for the gradient on all of them."
            )

    @property
    def _n_data(self) -> int:
        sizes = {term.n_data for term in risks(energy_of(self))}
        if len(sizes) != 1:
            raise TypeError(
                f"{scenario_name(self)}.energy has {'no risk' if not sizes else 'risks on different numbers of data'}; "
                "noisy SGD samples the data of an mfsde.risk(feature, loss, inputs, targets)."
            )
        return sizes.pop()

    def _rate(self, t: float) -> float | Tensor:
        """ξ(t), as a float; as the tensor that it is while a run is differentiated."""
        try:
            given = self.step_size(t)
            rate = float(given)
        except ZeroDivisionError:
            rate = math.inf
        if not 0 <= rate < math.inf:
            raise ValueError(
                f"{scenario_name(self)}.step_size({t:g}) = {rate}; expected a finite ξ(t) >= 0. Where ξ is singular at "
                "0, shift it: (t + dt)^(-α) is its value at the end of the step."
            )
        return given if isinstance(given, Tensor) and is_recording() else rate

    def _confined(self, rate: float | Tensor, x: Tensor, force: Tensor) -> Tensor:
        """The force, overwritten, with -ξ T ∇U."""
        sigma = number(self, "sigma")
        if sigma == 0 or not hasattr(self, "confinement"):
            return force
        slope, weight = confinement_gradient(self, x), -0.5 * rate * sigma**2
        return force + weight * slope if isinstance(weight, Tensor) else force.add_(slope, alpha=weight)


def _pass_through(draws: Draws, n: int, b: int) -> Tensor:
    """Data kb to (k + 1)b - 1 of one shuffled pass after another: (R, b)."""
    first, last = draws.step * b, (draws.step + 1) * b
    parts = []
    for epoch in range(first // n, (last - 1) // n + 1):
        # The step in which a pass begins is its own, as b <= n.
        order = _order(draws.noise, epoch * n // b, draws.n_replicas, n, draws.device)
        parts.append(order[:, max(0, first - epoch * n) : last - epoch * n])
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


@functools.lru_cache(maxsize=2)
def _order(noise: Noise, step: int, n_replicas: int, n: int, device: torch.device) -> Tensor:
    """The order of the pass that begins in a step; a function of its arguments, kept for the steps that follow."""
    return Draws(noise, step, n_replicas, torch.float64, device).at(step).permutations(n)
