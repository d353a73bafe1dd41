"""The Euler-Maruyama step, written into the state in a single pass of the noise kernel."""

from __future__ import annotations

import math

from torch import Tensor

from .clock import Clock
from .diffusion import product
from .measure import EmpiricalMeasure
from .model import Equation
from .noise import Noise, Stream


def euler(equation: Equation, clock: Clock, noise: Noise, step: int, x: Tensor) -> None:
    """X += h·b(t, X, m) + noise, in place.    x: (R, N, d), at step `step`."""
    t, mu = clock.time(step), equation.measure(x)
    explicit(equation, clock, noise, step, x, mu, equation.drift(t, x, mu))


def explicit(
    equation: Equation, clock: Clock, noise: Noise, step: int, x: Tensor, mu: EmpiricalMeasure, drift: Tensor
) -> None:
    """X += h·drift + √h·σ(t, X, m) ξ + √h·σ⁰(t, X, m) ξ⁰, in place, for a drift of the start of the step."""
    t, h = clock.time(step), clock.dt
    sigma = equation.diffusion(t, x, mu)
    shift = None
    if equation.has_common_noise:
        # Before the own noise moves x: both coefficients belong to the start of the step.
        shape = (x.shape[0], 1, equation.n_common)
        w = noise.increment(step, shape, stream=Stream.COMMON, dtype=x.dtype, device=x.device)
        shift = math.sqrt(h) * product(equation.common_diffusion(t, x, mu), w)
    if isinstance(sigma, Tensor) and sigma.ndim == x.ndim + 1:
        w = noise.increment(step, (*x.shape[:2], sigma.shape[-1]), dtype=x.dtype, device=x.device)
        # Before x moves: σ may be a view of it.
        noise_term = product(sigma, w)
        x.add_(drift, alpha=h).add_(noise_term, alpha=math.sqrt(h))
    elif isinstance(sigma, Tensor):
        noise.euler_(x, drift.contiguous(), h, sigma.expand_as(x).contiguous(), step)
    elif sigma == 0:
        x.add_(drift, alpha=h)
    else:
        noise.euler_(x, drift.contiguous(), h, sigma, step)
    if shift is not None:
        x.add_(shift)
