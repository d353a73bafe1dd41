"""The forward–backward step: explicit in what is smooth, implicit in what is not.

    x ← prox_{hV}(x + h·ṽ(t, x, m) + √h·σ(t, x, m) ξ)

First order in h; with noise and a wall the order in law is ½, as that of every scheme that projects onto the wall [3]
(a `project` that mirrors is better there). Particles land on the kinks of V exactly (on 0 for |w|, on a wall for a
set), stay while ṽ lies in ∂V there, and are released when it leaves it: for convex V the scheme's stationary points are
those of the flow, whatever h, and without noise the objective does not increase where h <= 2/L, L the Lipschitz
constant of ṽ as a function of all particles.

[1] Lions, Mercier, Splitting algorithms for the sum of two nonlinear operators (1979).
[2] With noise: Durmus, Majewski, Miasojedow, Analysis of Langevin Monte Carlo via convex optimization (2019).
[3] Costantini, Pacchiarotti, Sartoretto, Numerical approximation for functionals of reflecting diffusion processes,
    SIAM J. Appl. Math. 58 (1998).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .clock import Clock
from .euler import explicit
from .model import Equation, unchanged
from .noise import Noise
from .regularisers import check_prox, regulariser_of
from .torus import shortest

# Differences, relative to the place (or 1), that a projection may make to a point of its domain.
ROUNDING = 1e-4


def proximal(equation: Equation, clock: Clock, noise: Noise, step: int, x: Tensor) -> None:
    """One forward–backward step of a scenario with `smooth_drift` and `proximal`, in place.    x: (R, N, d)."""
    scenario, mu = equation.scenario, equation.measure(x)
    v: Tensor = scenario.smooth_drift(clock.time(step), x, mu)
    explicit(equation, clock, noise, step, x, mu, v.detach())
    x.copy_(scenario.proximal(x, clock.dt))


def check_proximal(equation: Equation, x: Tensor) -> None:
    """Refuses scenarios without the two parts of the step, and parts that do not suit the initial state x, (R, N, d).

    Raises:
        TypeError: a `regulariser` that is none.
        ValueError: no `smooth_drift` or `proximal`; a state where the regulariser is infinite; a proximal map that is
            not finite, leaves the domain, or is worse than to stay.

    """
    scenario, name = equation.scenario, equation.name
    missing = [m for m in ("smooth_drift", "proximal") if not callable(getattr(scenario, m, None))]
    if missing:
        raise ValueError(
            f"method 'proximal' needs smooth_drift(t, x, mu) and proximal(x, h); {name} has no "
            f"{' and no '.join(missing)}. Inherit mfsde.GradientFlow and declare a regulariser, or use 'euler'."
        )
    regulariser = regulariser_of(scenario)
    with torch.no_grad():
        if regulariser is not None:
            _check_values(f"{name}: the initial state has", regulariser, x, "Start inside the domain.")
        # A step for which every proximal map exists; one that is too long is refused by the map itself.
        h = 0.5 * min(1.0, getattr(regulariser, "step_limit", 1.0))
        y = unchanged(f"{name}.proximal", x, lambda: scenario.proximal(x, h))
        if not isinstance(y, Tensor) or y.shape != x.shape or not bool(torch.isfinite(y).all()):
            raise ValueError(
                f"{name}.proximal(x, {h:g}) is not finite, or no tensor of shape {tuple(x.shape)}, at the initial "
                "state; expected the minimiser of ½|y - x|² + hV(y), one row per particle."
            )
        if regulariser is not None:
            _check_values(f"{name}.proximal leaves the domain: it has", regulariser, y, "Project onto the domain.")
            check_prox(regulariser, x, y, h, name)
        if equation.has_projection:
            _check_projection(equation, y, h)


def _check_values(what: str, regulariser: Any, x: Tensor, advice: str) -> None:
    values = regulariser.value(x)
    bad = torch.nonzero(~torch.isfinite(values))
    if len(bad):
        where = tuple(bad[0].tolist())
        raise ValueError(
            f"{what} V = {float(values[where])} at replica {where[0]}, particle {where[1]}, x = "
            f"{x[where].tolist()}, for V = {regulariser}. {advice}"
        )


def _check_projection(equation: Equation, y: Tensor, h: float) -> None:
    """What starts in the domain is to stay in it: else the projection that follows would undo the proximal map."""
    inside = equation.project(0.0, y.clone())
    there = equation.scenario.proximal(inside, h)
    gap = shortest(equation.project(0.0, there.clone()) - there, equation.period).abs()
    if bool((gap > ROUNDING * (1 + there.abs())).any()):
        raise ValueError(
            f"{equation.name}.proximal leaves the domain: from a point inside, `project` moves its result by "
            f"{float(gap.max()):.3g}. The two do not commute there, and a step would solve another equation; let them "
            "act on different components, or put the set into the regulariser."
        )
