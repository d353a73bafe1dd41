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
from typing import Any

import torch
from torch import Tensor

# torchsde's solver classes are private; the package is pinned and the contract is tested (tests/test_solver.py).
from torchsde._core import methods as torchsde_methods
from torchsde._core.methods.euler import Euler

from . import pages
from .clock import Clock
from .diffusion import along_columns, product
from .draws import set_key
from .measure import EmpiricalMeasure
from .methods import IN_PLACE, REACTIONS, STRATONOVICH, Method, Transport
from .model import Equation
from .noise import Noise, Stream

# Steps between two checks for infinities and NaN; a blow-up replays at most twice as many.
CHECK_EVERY = 64

# Steps between two looks at the memory that they freed.
TRIM_EVERY = 16


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
        self.sde_type = "stratonovich" if method in STRATONOVICH else "ito"
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
        return (self.clock.dt * b).reshape(y.shape)

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
        own = product(self.equation.diffusion(t, x, law), v[..., :n])
        if self.equation.has_common_noise:
            own = own + product(self.equation.common_diffusion(t, x, law), v[..., n:])
        return (math.sqrt(self.clock.dt) * own).reshape(y.shape)

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
        total = along_columns(lambda z: self.equation.diffusion(t, z, law), x)
        if self.equation.has_common_noise:
            total = total + along_columns(lambda z: self.equation.common_diffusion(t, z, law), x)
        return total


class InPlace(Euler):  # type: ignore[misc]
    """A transport of `methods` in torchsde's loop: it overwrites the state."""

    transport: Transport
    noise: Noise

    def step(self, t0: Any, t1: Any, y0: Tensor, extra0: Any) -> tuple[Tensor, tuple[()]]:
        """One step; y0 is overwritten."""
        system: ParticleSystem = self.sde
        self.transport(system.equation, system.clock, self.noise, int(t0), y0)
        return y0, ()


def integrate(
    equation: Equation,
    x: Tensor,
    first: int,
    last: int,
    clock: Clock,
    noise: Noise,
    method: Method,
    stops: Iterable[int],
    watch: Callable[[int, Tensor], None],
    progress: Callable[[int], None] = lambda step: None,
    interrupted: Callable[[], bool] = lambda: False,
) -> tuple[int, Tensor]:
    """Runs the particle system from step `first` to step `last`.

    Args:
        equation: the checked scenario.
        x: state (R, N, d) at step `first`, contiguous; overwritten by the transports that work in place.
        first: step of x.
        last: step to stop at.
        clock: step to time.
        noise: the keyed noise.
        method: transport and reaction, already accepted by `check_method`.
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
    if x.is_cpu:
        pages.keep()
    solver = _scheme(equation, x, clock, noise, method.transport)
    march = _March(solver, noise, method, first, x, stops, watch, progress, interrupted)
    # Whole numbers as Python floats cost a microsecond less per comparison; SRK takes square roots of tensors.
    ends: Any = torch.tensor([first, last], dtype=torch.float64) if solver.sde.rows else [float(first), float(last)]
    with torch.no_grad(), contextlib.suppress(_Interrupted):
        solver.integrate(x.view(-1, x.shape[-1]) if solver.sde.rows else x, ends, ())
        march.close(march.state)
    return march.step, march.state


class _Interrupted(Exception):
    """Leaves torchsde's loop between two steps."""


class _March:
    """A scheme's step with what surrounds it: frozen law, projection, births and deaths, finiteness, stops.

    torchsde's loop calls it in place of the step. The state is taken from here because the loop's own outputs are
    interpolated (an infinity becomes NaN there) and copied.
    """

    def __init__(
        self,
        solver: Any,
        noise: Noise,
        method: Method,
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
        self._noise, self._react = noise, REACTIONS[method.reaction] if method.reaction else None
        self._close = IN_PLACE[method.transport].close if method.transport in IN_PLACE else None
        self._finite_step = first
        self._keep(x)
        self.step, self.state = first, x
        solver.step = self

    def __call__(self, start: Any, end: Any, y: Tensor, extra: Any) -> tuple[Tensor, Any]:
        try:
            y = self._transported(start, end, y)
            self._react_to(start, end, y)
        except Exception as problem:
            # A drift that fails on infinities (a decomposition, a check of its own) hides the blow-up before it.
            if not bool(torch.isfinite(y).all()):
                self._raise_first_bad(int(end), problem)
            raise
        self.step, self.state = int(end), y.view(self._system.shape)
        if self.step % TRIM_EVERY == 0 and y.is_cpu:
            pages.trim()
        at_stop, interrupted = self.step == self._next_stop, self._interrupted()
        if at_stop or interrupted or self.step - self._finite_step >= CHECK_EVERY:
            self.close(y)
            self._check(self.step, self.state)
            self._progress(self.step)
        if at_stop:
            self._next_stop = next(self._stops, -1)
            self._watch(self.step, self.state)
        if interrupted:
            raise _Interrupted
        return y, ()

    def _transported(self, start: Any, end: Any, y: Tensor) -> Tensor:
        equation = self._system.equation
        if not isinstance(self._solver, InPlace):
            self._system.freeze(y)
        set_key(equation, self._noise, int(start))
        y, _ = self._scheme_step(start, end, y, ())
        if equation.has_projection or self._react is not None:
            self.close(y)
        if equation.has_projection:
            t = self._system.clock.time(end)
            y = equation.project(t, y.view(self._system.shape)).contiguous().view(y.shape)
        return y

    def _react_to(self, start: Any, end: Any, y: Tensor) -> None:
        """Births and deaths after the transport, in place; the end of the step."""
        if self._react is not None:
            equation, t, h = self._system.equation, self._system.clock.time(end), self._system.clock.dt
            equation.count(self._react(equation, t, h, self._noise, int(start), y.view(self._system.shape)))
        # What is evaluated between steps has no key.
        self._system.equation.key = None

    def close(self, y: Tensor) -> None:
        """Ends a step whose last part the transport would have done together with the next one."""
        if self._close is not None:
            self._close(self._system.equation, y)

    def _keep(self, x: Tensor) -> None:
        """The last state known to be finite, to replay from."""
        weights = self._system.equation.weights
        self._finite = x.clone()
        self._finite_weights = None if weights is None else weights.clone()

    def _check(self, step: int, y: Tensor) -> None:
        # One pass: the sum of a state with an infinity or NaN is not finite. Large finite states may overflow too.
        if not bool(torch.isfinite(y.sum())) and not bool(torch.isfinite(y).all()):
            self._raise_first_bad(step)
        if step - self._finite_step >= CHECK_EVERY:
            self._keep(y)
            self._finite_step = step

    def _raise_first_bad(self, last: int, cause: Exception | None = None) -> None:
        """Replays from the last finite state: noise is a function of the step, so the replay is exact."""
        y = self._finite.clone().view(-1, self._finite.shape[-1]) if self._system.rows else self._finite.clone()
        self._system.equation.weights = self._finite_weights
        for step in range(self._finite_step, last):
            ends = torch.tensor([step, step + 1], dtype=torch.float64)
            y = self._transported(ends[0], ends[1], y)
            self.close(y)
            state = y.view(self._system.shape)
            bad = torch.nonzero(~torch.isfinite(state))
            if len(bad):
                replica, particle, component = bad[0].tolist()
                value, time = float(state[replica, particle, component]), self._system.clock.time(step + 1)
                raise BlowUp(self._system.equation.name, step + 1, time, replica, particle, value) from cause
            self._react_to(ends[0], ends[1], y)
        raise RuntimeError("a state that was not finite was finite when replayed: the drift is not deterministic.")


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
    if method in IN_PLACE:
        scheme = InPlace(**settings)
        scheme.transport, scheme.noise = IN_PLACE[method].step, noise
        return scheme
    return torchsde_methods.select(method=method, sde_type=system.sde_type)(**settings)
