"""The particle system as a torchsde problem: the only file that imports torchsde.

The clock counts steps: torchsde integrates in units of the step h, on whole numbers, so no time accumulates rounding.
In these units the drift is h·b and the Brownian motion has coefficient √h·σ; increments come from a keyed `Noise`.

What is done about the law inside σ. Particles are rows for torchsde, and its higher-order schemes assume that σ at a
row depends on that row alone. All schemes but Euler therefore see σ with the law frozen at the start of the step: then
the noise is row-wise, and for the McKean-Vlasov limit the frozen law costs O(h). What is neglected, the response of
the empirical law to single particles, leaves a strong error A·h + B·√(h/N).

Equations are Itô. Stratonovich schemes (heun, midpoint, euler_heun) get the drift b - ½ Σ_j (∂G_j) G_j, G the columns
of the diffusion.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# torchsde's solver classes are private; the package is pinned and the contract is tested (tests/test_solver.py).
from torchsde._core import methods as torchsde_methods
from torchsde._core.methods.euler import Euler

from .measure import EmpiricalMeasure
from .model import Equation
from .noise import Noise, Stream

ITO = ("euler", "milstein", "srk")
STRATONOVICH = ("heun", "midpoint", "euler_heun")
METHODS = ITO + STRATONOVICH

# Steps between two checks for infinities and NaN; a blow-up replays at most twice as many.
CHECK_EVERY = 64


class BlowUp(FloatingPointError):
    """The state stopped being finite.

    Attributes: step, time, replica, particle of the first bad entry.
    """

    def __init__(self, name: str, step: int, time: float, replica: int, particle: int, value: float) -> None:
        self.step, self.time, self.replica, self.particle = step, time, replica, particle
        super().__init__(
            f"{name} blew up: the state is {value} at step {step} (time {time:.12g}), replica {replica}, particle "
            f"{particle}. Earlier steps are finite. Try a smaller dt, or a drift that grows at most linearly."
        )


@dataclass(frozen=True)
class Clock:
    """Steps to times: t = step·dt."""

    dt: float

    def time(self, step: float) -> float:
        """Physical time of a step, or of a stage between two steps."""
        return float(step) * self.dt


class KeyedBrownian:
    """Brownian increments over whole steps of the clock, in the form torchsde's schemes ask for.

    Channels: the particle's own, then those shared by all particles of a replica.
    """

    levy_area_approximation = "space-time"

    def __init__(self, noise: Noise, x: Tensor, own: int, common: int, rows: bool = False) -> None:
        self._noise = noise
        self._own = (x.shape[0], x.shape[1], own)
        self._common = (x.shape[0], 1, common)
        self._options: dict[str, Any] = {"dtype": x.dtype, "device": x.device}
        self._rows = rows

    def __call__(self, start: Any, end: Any, return_U: bool = False) -> Any:
        """W_end - W_start, and with return_U also ∫ (W_s - W_start) ds; end = start + 1."""
        step = int(start)
        if not return_U:
            return self._join(lambda shape, stream: self._noise.increment(step, shape, stream=stream, **self._options))
        pairs = [self._noise.area(step, shape, stream=stream, **self._options) for shape, stream in self._streams()]
        return self._expand([w for w, _ in pairs]), self._expand([u for _, u in pairs])

    def _streams(self) -> list[tuple[tuple[int, int, int], Stream]]:
        both = [(self._own, Stream.IDIOSYNCRATIC), (self._common, Stream.COMMON)]
        return both if self._common[2] else both[:1]

    def _join(self, draw: Callable[[tuple[int, int, int], Stream], Tensor]) -> Tensor:
        return self._expand([draw(shape, stream) for shape, stream in self._streams()])

    def _expand(self, parts: list[Tensor]) -> Tensor:
        w = parts[0]
        if len(parts) == 2:
            w = torch.cat([w, parts[1].expand(-1, self._own[1], -1)], dim=-1)
        return w.flatten(0, 1) if self._rows else w


class ParticleSystem:
    """The equation on states (R, N, d), as the object a torchsde scheme steps.

    It has the methods the schemes call (f, g, their products) and none of torchsde's own wrapper, which would flatten
    states and draw from a global generator. SRK alone sees rows (R·N, d): it takes a third axis for a matrix.
    """

    def __init__(self, equation: Equation, method: str, clock: Clock) -> None:
        self.equation = equation
        self.clock = clock
        self.shape = equation.shape
        self.rows = method == "srk"
        self.sde_type = "ito" if method in ITO else "stratonovich"
        self.noise_type = _noise_type(equation, method)
        self._corrects = self.sde_type == "stratonovich" and not equation.is_additive
        self._law: EmpiricalMeasure | None = None

    def freeze(self, y: Tensor) -> None:
        """Fixes the law that σ sees during this step (Euler evaluates σ at its start only)."""
        self._law = self.equation.measure(y.view(self.shape))

    def f(self, step: Any, y: Tensor) -> Tensor:
        """The drift per step, h·b, with the Itô-Stratonovich correction where the scheme needs it."""
        t, x = self.clock.time(step), y.view(self.shape)
        b = self.equation.drift(t, x, self.equation.measure(x))
        if self._corrects:
            b = b - 0.5 * self._self_derivative(t, x)
        return (self.clock.dt * b).view(y.shape)

    def g(self, step: Any, y: Tensor) -> Tensor:
        """The diagonal diffusion per √step, √h·σ (schemes that need the matrix itself)."""
        x = y.view(self.shape)
        value = self.equation.diffusion(self.clock.time(step), x, self._frozen(x))
        sigma = value if isinstance(value, Tensor) else x.new_tensor(value)
        return (math.sqrt(self.clock.dt) * sigma).expand_as(x).reshape(y.shape)

    def g_prod(self, step: Any, y: Tensor, v: Tensor) -> Tensor:
        """√h·σ v, own and common channels."""
        x, v = y.view(self.shape), v.view(*self.shape[:2], -1)
        t, law, n = self.clock.time(step), self._frozen(x), self.equation.n_channels
        own = _product(self.equation.diffusion(t, x, law), v[..., :n])
        if self.equation.has_common_noise:
            own = own + _product(self.equation.common_diffusion(t, x, law), v[..., n:])
        return (math.sqrt(self.clock.dt) * own).view(y.shape)

    def f_and_g_prod(self, step: Any, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Both at once."""
        return self.f(step, y), self.g_prod(step, y, v)

    def g_prod_and_gdg_prod(self, step: Any, y: Tensor, v1: Tensor, v2: Tensor) -> tuple[Tensor, Tensor | float]:
        """√h·σ v1 and h·σ σ' v2: Milstein's term, row by row."""
        if self.equation.is_additive:
            return self.g_prod(step, y, v1), 0.0
        derivative = self._self_derivative(self.clock.time(step), y)
        return self.g_prod(step, y, v1), self.clock.dt * derivative * v2

    def _frozen(self, x: Tensor) -> EmpiricalMeasure:
        return self._law if self._law is not None else self.equation.measure(x)

    def _self_derivative(self, t: float, x: Tensor) -> Tensor:
        """Σ_j (∂_x G_j) G_j over the columns of own and common diffusion, law frozen."""
        law = self._frozen(x)
        total = _along_columns(lambda z: self.equation.diffusion(t, z, law), x)
        if self.equation.has_common_noise:
            total = total + _along_columns(lambda z: self.equation.common_diffusion(t, z, law), x)
        return total


class InPlaceEuler(Euler):  # type: ignore[misc]
    """torchsde's Euler step, written into one buffer: x += h·b + √h·σ·ξ in a single pass of the noise kernel."""

    noise: Noise

    def step(self, t0: Any, t1: Any, y0: Tensor, extra0: Any) -> tuple[Tensor, tuple[()]]:
        """One step; y0 is overwritten."""
        system: ParticleSystem = self.sde
        equation, step = system.equation, int(t0)
        t, h = system.clock.time(step), system.clock.dt
        mu = equation.measure(y0)
        drift = equation.drift(t, y0, mu)
        sigma = equation.diffusion(t, y0, mu)
        shift = None
        if equation.has_common_noise:
            # Before the own noise moves y0: both coefficients belong to the start of the step.
            w = self.noise.increment(
                step, (y0.shape[0], 1, equation.n_common), stream=Stream.COMMON, dtype=y0.dtype, device=y0.device
            )
            shift = math.sqrt(h) * _product(equation.common_diffusion(t, y0, mu), w)
        if isinstance(sigma, Tensor) and sigma.ndim == y0.ndim + 1:
            w = self.noise.increment(step, (*y0.shape[:2], sigma.shape[-1]), dtype=y0.dtype, device=y0.device)
            # Before y0 moves: σ may be a view of it.
            noise_term = _product(sigma, w)
            y0.add_(drift, alpha=h).add_(noise_term, alpha=math.sqrt(h))
        else:
            if isinstance(sigma, Tensor):
                sigma = sigma.expand_as(y0).contiguous()
            self.noise.euler_(y0, drift.contiguous(), h, sigma, step)
        if shift is not None:
            y0.add_(shift)
        return y0, ()


def integrate(
    equation: Equation,
    x: Tensor,
    first: int,
    last: int,
    clock: Clock,
    noise: Noise,
    method: str,
    stops: Iterable[int],
    watch: Callable[[int, Tensor], None],
    progress: Callable[[int], None] = lambda step: None,
    interrupted: Callable[[], bool] = lambda: False,
) -> tuple[int, Tensor]:
    """Runs the particle system from step `first` to step `last`.

    Args:
        equation: the checked scenario.
        x: state (R, N, d) at step `first`, contiguous; overwritten by Euler.
        first: step of x.
        last: step to stop at.
        clock: step to time.
        noise: the keyed noise.
        method: one of METHODS, already accepted by `check_method`.
        stops: increasing steps in (first, last] at which `watch(step, state)` is called. The state is a buffer that
            the next step overwrites.
        watch: called at each stop; what it raises ends the run.
        progress: called with the step now and then.
        interrupted: asked after every step; True ends the run there.

    Returns:
        The step reached, which is `last` unless interrupted, and the state at it.

    Raises:
        BlowUp: the state is no longer finite; watch has seen finite states only.

    """
    if first == last:
        return first, x
    solver = _scheme(equation, x, clock, noise, method)
    march = _March(solver, first, x, stops, watch, progress, interrupted)
    # Whole numbers as Python floats cost a microsecond less per comparison; SRK takes square roots of tensors.
    ends: Any = torch.tensor([first, last], dtype=torch.float64) if method == "srk" else [float(first), float(last)]
    with torch.no_grad(), contextlib.suppress(_Interrupted):
        solver.integrate(x.view(-1, x.shape[-1]) if solver.sde.rows else x, ends, ())
    return march.step, march.state


class _Interrupted(Exception):
    """Leaves torchsde's loop between two steps."""


class _March:
    """A scheme's step with what surrounds it: frozen law, projection, finiteness, stops.

    torchsde's loop calls it in place of the step. The state is taken from here because the loop's own outputs are
    interpolated (an infinity becomes NaN there) and copied.
    """

    def __init__(
        self,
        solver: Any,
        first: int,
        x: Tensor,
        stops: Iterable[int],
        watch: Callable[[int, Tensor], None],
        progress: Callable[[int], None],
        interrupted: Callable[[], bool],
    ) -> None:
        self._solver, self._scheme_step = solver, solver.step
        self._system: ParticleSystem = solver.sde
        self._stops = iter(stops)
        self._next_stop = next(self._stops, -1)
        self._watch, self._progress, self._interrupted = watch, progress, interrupted
        self._finite, self._finite_step = x.clone(), first
        self.step, self.state = first, x
        solver.step = self

    def __call__(self, start: Any, end: Any, y: Tensor, extra: Any) -> tuple[Tensor, Any]:
        try:
            y = self._advance(start, end, y)
        except Exception as problem:
            # A drift that fails on infinities (a decomposition, a check of its own) hides the blow-up before it.
            if not bool(torch.isfinite(y).all()):
                self._raise_first_bad(int(end), problem)
            raise
        self.step, self.state = int(end), y.view(self._system.shape)
        at_stop, interrupted = self.step == self._next_stop, self._interrupted()
        if at_stop or interrupted or self.step - self._finite_step >= CHECK_EVERY:
            self._check(self.step, self.state)
            self._progress(self.step)
        if at_stop:
            self._next_stop = next(self._stops, -1)
            self._watch(self.step, self.state)
        if interrupted:
            raise _Interrupted
        return y, ()

    def _advance(self, start: Any, end: Any, y: Tensor) -> Tensor:
        equation = self._system.equation
        if not isinstance(self._solver, InPlaceEuler):
            self._system.freeze(y)
        y, _ = self._scheme_step(start, end, y, ())
        if equation.has_projection:
            y = equation.project(y.view(self._system.shape)).contiguous().view(y.shape)
        return y

    def _check(self, step: int, y: Tensor) -> None:
        # One pass: the sum of a state with an infinity or NaN is not finite. Large finite states may overflow too.
        if not bool(torch.isfinite(y.sum())) and not bool(torch.isfinite(y).all()):
            self._raise_first_bad(step)
        if step - self._finite_step >= CHECK_EVERY:
            self._finite.copy_(y)
            self._finite_step = step

    def _raise_first_bad(self, last: int, cause: Exception | None = None) -> None:
        """Replays from the last finite state: noise is a function of the step, so the replay is exact."""
        y = self._finite.clone().view(-1, self._finite.shape[-1]) if self._system.rows else self._finite.clone()
        for step in range(self._finite_step, last):
            ends = torch.tensor([step, step + 1], dtype=torch.float64)
            y = self._advance(ends[0], ends[1], y)
            state = y.view(self._system.shape)
            bad = torch.nonzero(~torch.isfinite(state))
            if len(bad):
                replica, particle, component = bad[0].tolist()
                value, time = float(state[replica, particle, component]), self._system.clock.time(step + 1)
                raise BlowUp(self._system.equation.name, step + 1, time, replica, particle, value) from cause
        raise RuntimeError("a state that was not finite was finite when replayed: the drift is not deterministic.")


def check_method(equation: Equation, method: str, x: Tensor, times: Iterable[float] = (0.0,)) -> None:
    """Refuses schemes that would be silently wrong for this equation, as far as probes at the given times can tell.

    Raises:
        ValueError: unknown scheme, or one that is not right here, with the reason and a scheme that is.

    """
    if method not in METHODS:
        raise ValueError(
            f"unknown method {method!r}; expected one of {', '.join(METHODS)}. Adaptive schemes are not offered: one "
            "step size would couple the replicas."
        )
    if method == "euler" or equation.is_additive:
        return
    for t in times:
        if method in ("milstein", "srk"):
            _check_row_wise(equation, method, x, t)
        _check_derivative(equation, method, x, t)


def _check_row_wise(equation: Equation, method: str, x: Tensor, t: float) -> None:
    """Milstein and SRK without Lévy areas need commuting noise: component k of σ a function of x_k (and t, m)."""
    if equation.has_common_noise:
        raise ValueError(
            f"method {method!r} would be wrong for {equation.name}: common and own noise do not commute when a "
            "diffusion depends on the state. Use 'euler', or 'heun' (right law, strong order ½)."
        )
    if equation.form == "general":
        raise ValueError(
            f"method {method!r} needs a diagonal diffusion; {equation.name}.diffusion is general (..., N, d, m). Use "
            "'euler', or 'heun' (right law, strong order ½)."
        )
    moved = _response(equation, x, t)
    if moved is not None:
        raise ValueError(
            f"method {method!r} would be wrong for {equation.name}: {moved}. Use 'euler', or 'heun' (right law, strong "
            "order ½)."
        )


def _response(equation: Equation, x: Tensor, t: float) -> str | None:
    """What σ, at a frozen law, depends on besides its own component: found by moving one particle."""
    law = equation.measure(x)
    with torch.no_grad():
        before = _full(equation.diffusion(t, x, law), x)
        for component in range(min(x.shape[-1], 16)):
            y = x.clone()
            y[:, 0, component] += 0.37 * (1 + y[:, 0, component].abs())
            changed = (_full(equation.diffusion(t, y, law), y) != before).any(0)
            if bool(changed[1:].any()):
                return "σ at one particle depends on another through x; take means from mu, which is frozen over a step"
            others = [k for k in range(x.shape[-1]) if k != component and bool(changed[0, k])]
            if others:
                return (
                    f"component {others[0]} of σ depends on component {component} of x, so the noise does not commute"
                )
    return None


def _check_derivative(equation: Equation, method: str, x: Tensor, t: float) -> None:
    """∂σ comes from automatic differentiation: a detached σ would give a silent zero."""
    law = equation.measure(x)
    _compare_derivative(equation.name + ".diffusion", lambda z: equation.diffusion(t, z, law), method, x)
    if equation.has_common_noise:
        name = equation.name + ".common_diffusion"
        _compare_derivative(name, lambda z: equation.common_diffusion(t, z, law), method, x)


def _compare_derivative(name: str, sigma: Callable[[Tensor], float | Tensor], method: str, x: Tensor) -> None:
    direction = torch.cos(torch.arange(x.numel(), dtype=x.dtype, device=x.device)).reshape(x.shape)
    with torch.no_grad():
        try:
            (slope,) = _directional(sigma, x, [direction])
        except (RuntimeError, NotImplementedError) as problem:
            raise ValueError(
                f"method {method!r} differentiates {name}, which torch cannot do here ({problem}). Write it with "
                "differentiable torch operations, or use 'euler'."
            ) from problem
        eps = 1e-2 if x.dtype == torch.float32 else 1e-5
        quotient = (_full(sigma(x + eps * direction), x) - _full(sigma(x - eps * direction), x)) / (2 * eps)
    # A kink near a few particles is no fault, a derivative that is missing at most of them is.
    telling = quotient.abs() > 0.05
    wrong = telling & ((slope - quotient).abs() > 0.2 * quotient.abs())
    if int(wrong.sum()) * 2 > int(telling.sum()):
        where = tuple(torch.nonzero(wrong)[0].tolist())
        raise ValueError(
            f"method {method!r} needs the derivative of {name}, but the automatic one ({float(slope[where]):.4g}) "
            f"differs from a difference quotient ({float(quotient[where]):.4g}): it detaches its input or leaves "
            "torch. Use 'euler'."
        )


def _full(value: float | Tensor, x: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.full_like(x, value)
    return value.expand(*x.shape, value.shape[-1]) if value.ndim == x.ndim + 1 else value.expand_as(x)


def _noise_type(equation: Equation, method: str) -> str:
    if equation.is_additive:
        return "additive"
    return "diagonal" if method in ("milstein", "srk") else "general"


def _scheme(equation: Equation, x: Tensor, clock: Clock, noise: Noise, method: str) -> Any:
    system = ParticleSystem(equation, method, clock)
    brownian = KeyedBrownian(noise, x, equation.n_channels, equation.n_common, system.rows)
    settings: dict[str, Any] = {
        "sde": system,
        "bm": brownian,
        "dt": 1.0,
        "adaptive": False,
        "rtol": 0.0,
        "atol": 0.0,
        "dt_min": 0.0,
        "options": {},
    }
    if method == "euler":
        scheme = InPlaceEuler(**settings)
        scheme.noise = noise
        return scheme
    return torchsde_methods.select(method=method, sde_type=system.sde_type)(**settings)


def _product(sigma: float | Tensor, w: Tensor) -> Tensor:
    """σ w for each form of σ.    w: (R, N or 1, m) -> (R, N or 1, d)."""
    if isinstance(sigma, Tensor) and sigma.ndim == w.ndim + 1:
        return torch.matmul(sigma, w.unsqueeze(-1)).squeeze(-1)
    return sigma * w


def _along_columns(sigma: Callable[[Tensor], float | Tensor], x: Tensor) -> Tensor:
    """Σ_j (∂_x G_j) G_j, (R, N, d), for G = σ(x) in any of its forms, row by row."""
    value = sigma(x)
    if not isinstance(value, Tensor):
        return torch.zeros_like(x)
    columns = _full(value, x)
    total = torch.zeros_like(x)
    if columns.ndim == x.ndim:
        for k, slope in enumerate(_directional(sigma, x, torch.diag_embed(columns).unbind(-1))):
            total[..., k] = slope[..., k]
    else:
        for j, slope in enumerate(_directional(sigma, x, columns.unbind(-1))):
            total = total + slope[..., j]
    return total


def _directional(sigma: Callable[[Tensor], float | Tensor], x: Tensor, directions: Iterable[Tensor]) -> list[Tensor]:
    """∂_x σ along each direction, by differentiating the adjoint u ↦ uᵀ∂σ, which is linear in u.

    (torch's forward mode would do it in one pass, but loads its deprecated compiler.)
    """
    with torch.enable_grad():
        at = x.detach().requires_grad_()
        value = _full(sigma(at), at)
        if not value.requires_grad:
            return [torch.zeros_like(value) for _ in directions]
        u = torch.zeros_like(value, requires_grad=True)
        (adjoint,) = torch.autograd.grad(value, at, u, create_graph=True, allow_unused=True, materialize_grads=True)
        if not adjoint.requires_grad:
            return [torch.zeros_like(value) for _ in directions]
        return [torch.autograd.grad(adjoint, u, v, retain_graph=True)[0] for v in directions]
