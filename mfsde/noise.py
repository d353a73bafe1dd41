"""Random numbers as a function of a key: the same bits for every chunking, thread count, backend and device.

A value depends on (seed, stream, step, replica, particle, channel) and on nothing else. These form the key and the
counter of Philox4x32-10 [1]: the key is the seed, the counter is (block, stream·2¹⁶ + channel, step, replica), and the
map is injective, so that no two values share a word. Particle i takes word k = (i mod 256) // 64 of block
64·(i // 256) + i mod 64. Words (0, 1) and (2, 3) of a block are Box–Muller [2] pairs,

    z, z' = √(-2 log u) (cos 2πv, sin 2πv),      u = (x + ½)/2³²,      |z| ≤ 6.77,

one 32-bit word for each normal in float32 and in float64, so that both precisions follow the same path.

Every backend evaluates the same polynomials with + - × ÷ √ in the same order, and contracts nothing: IEEE arithmetic
then leaves one possible result. VERSION counts the definitions; it is stored with every run.

[1] Salmon, Moraes, Dror, Shaw, Parallel random numbers: as easy as 1, 2, 3, SC 2011.
[2] Box, Muller, A note on the generation of random normal deviates, Ann. Math. Statist. 29 (1958).
"""

import enum
import functools
import math
import operator
import os
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .extensions import extension, threads

VERSION = 1
SCHEME = "philox4x32-10/box-muller"

MAX_STEPS = 2**32
MAX_REPLICAS = 2**32
MAX_PARTICLES = 2**34
MAX_CHANNELS = 2**16

Shape = tuple[int, int, int] | torch.Size

# What the kernels are told of normals: 0 for float32, 1 for float64, and this for float64 values of float32 ones.
MIXED = 2


class Stream(enum.IntEnum):
    """What a value is for; two streams never share a word."""

    INITIAL = 0
    IDIOSYNCRATIC = 1
    COMMON = 2
    AREA = 3
    COMMON_AREA = 4
    JUMP = 5
    DATA = 6
    REINJECTION = 7
    BATCH = 8


BRIDGE = {Stream.IDIOSYNCRATIC: Stream.AREA, Stream.COMMON: Stream.COMMON_AREA}


def _load_compiled() -> ModuleType | None:
    choice = os.environ.get("MFSDE_NOISE", "")
    if choice == "numpy":
        return None
    if choice:
        raise ValueError(f"MFSDE_NOISE is {choice!r}; expected 'numpy', or unset it for the compiled kernel.")
    return extension("_noise")


_compiled = _load_compiled()


@functools.cache
def _portable(name: str) -> ModuleType:
    return import_module(f"._noise_{name}", __package__)


def _backend(kind: str) -> str:
    if kind == "cpu":
        return "c" if _compiled is not None else "numpy"
    return "triton" if kind == "cuda" and _has_triton() else "torch"


@functools.cache
def _has_triton() -> bool:
    try:
        import_module("triton")
    except ImportError:
        return False
    return True


def backend(device: torch.device | str = "cpu") -> str:
    """Name of what computes the noise on `device`: "c", "numpy", "triton" or "torch". All give the same bits.

    On the CPU: the compiled kernel, or numpy where it was not built or MFSDE_NOISE=numpy is set at import. On CUDA:
    Triton, or torch where it is not installed. On other devices torch.
    """
    return _backend(torch.device(device).type)


def _whole(name: str, value: Any) -> int:
    """`value` as an int; a bool or a float is a mistake, not a number."""
    if type(value) is int:
        return value
    if isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; expected an integer.")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}, a {type(value).__name__}; expected an integer.") from None


def _check_range(name: str, first: int, count: int, limit: int) -> None:
    if first < 0 or count < 0:
        raise ValueError(f"{name} {first} to {first + count}: expected non-negative numbers.")
    if first + count >= limit:
        raise ValueError(f"{name} up to {first + count}: expected fewer than 2**{limit.bit_length() - 1}.")


def _check_real(dtype: torch.dtype) -> bool:
    if dtype is torch.float32 or dtype is torch.float64:
        return dtype is torch.float64
    raise ValueError(f"dtype is {dtype}; expected torch.float32 or torch.float64.")


def _check_out(out: Tensor, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    if tuple(out.shape) != shape or out.dtype is not dtype:
        raise ValueError(f"out has shape {tuple(out.shape)} and dtype {out.dtype}; expected {shape} and {dtype}.")
    if out.device.type != device.type or (device.index is not None and out.device.index != device.index):
        raise ValueError(f"out is on {out.device}; expected {device}.")
    if not out.is_contiguous():
        raise ValueError("out is not contiguous; pass a contiguous tensor, or none.")
    if out.requires_grad:
        raise ValueError("out requires a gradient, and noise has none; detach it.")


def _window(shape: Shape, first_replica: int, first_particle: int) -> tuple[int, int, int]:
    """The checked shape (R, N, m) of the values asked for."""
    if len(shape) != 3:
        raise ValueError(f"shape is {tuple(shape)}; expected (replicas, particles, channels).")
    n_replicas, n_particles, n_channels = (_whole("shape", n) for n in shape)
    _check_range("replicas", _whole("first_replica", first_replica), n_replicas, MAX_REPLICAS)
    _check_range("particles", _whole("first_particle", first_particle), n_particles, MAX_PARTICLES)
    _check_range("channels", 0, n_channels, MAX_CHANNELS)
    return n_replicas, n_particles, n_channels


@dataclass(frozen=True)
class Noise:
    """The random numbers of a run: a value, not a generator. Equal (seed, step, particle, ...) give equal numbers.

    seed: 0 ≤ seed < 2⁶⁴, all of whose bits count.
    substeps: a step of the run consists of k = `substeps` fine steps, and its Brownian increment is the sum of theirs:
    a run at dt with k substeps and a run at dt/k with one share their path.

    antithetic: replicas 2j and 2j + 1 have the normals of the ordinary replica j, of every stream, as z and as -z:
    those of initial points, Brownian paths, common noise and data (`Draws.normals`). Each replica alone is an ordinary
    one, so that means stay unbiased; the two of a pair are dependent, pairs are not. Uniforms, integers and events are
    those of the replica itself, as without: pairs mirror neither jumps nor the choice of data. A stream that serves
    normals and uniforms must serve them at different particles or steps.

    precision: torch.float32 gives a float64 state the normals of float32, which cost less: every fine normal is that
    of float32, widened; sums over substeps, products and steps stay in float64. None: that of the values asked for.
    Uniforms and integers are the same either way.

    `normals`, `uniforms` and `integers` speak of fine steps; `increment`, `area` and `euler_` of steps of the run. A
    shape is (R, N, m): replicas, particles and channels; `first_replica` and `first_particle` shift the window, and any
    partition into windows gives the same values. Fine steps and replicas stay below 2³², particles below 2³⁴, channels
    below 2¹⁶.

    Raises TypeError for a seed that is no integer and an `antithetic` that is no bool, ValueError for values out of
    range, for another precision than these and for normals of float64 asked for in float32.
    """

    seed: int
    substeps: int = 1
    antithetic: bool = False
    precision: torch.dtype | None = None

    def __post_init__(self) -> None:
        seed, substeps = _whole("seed", self.seed), _whole("substeps", self.substeps)
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}; expected 0 <= seed < 2**64.")
        if not 1 <= substeps < MAX_STEPS:
            raise ValueError(f"substeps is {substeps}; expected at least 1 and fewer than 2**32.")
        if not isinstance(self.antithetic, bool):
            raise TypeError(f"antithetic is {self.antithetic!r}; expected True or False.")
        if self.precision not in (None, torch.float32, torch.float64):
            raise ValueError(f"precision is {self.precision!r}; expected torch.float32, torch.float64 or None.")
        object.__setattr__(self, "seed", seed)
        object.__setattr__(self, "substeps", substeps)

    def identity(self) -> dict[str, int | str]:
        """What a run stores about its noise: scheme, version, seed, substeps; antithetic, precision where set."""
        known: dict[str, int | str] = {
            "scheme": SCHEME, "version": VERSION, "seed": self.seed, "substeps": self.substeps,
        }  # fmt: skip
        # Only where set: the digests of ordinary runs do not know the words.
        if self.antithetic:
            known["antithetic"] = True
        if self.precision is not None:
            known["precision"] = str(self.precision).removeprefix("torch.")
        return known

    def normals(
        self,
        step: int,
        shape: Shape,
        *,
        stream: Stream = Stream.IDIOSYNCRATIC,
        first_replica: int = 0,
        first_particle: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        out: Tensor | None = None,
    ) -> Tensor:
        """Standard normals of the fine step `step`: (R, N, m), written into `out` where given.

        The relative error against exact arithmetic is below 3.5e-7 in float32 and 5e-16 in float64.
        """
        window = _window(shape, first_replica, first_particle)
        fine = self._fine_step(step, 1)
        return self._sum(fine, 1, window, stream, first_replica, first_particle, dtype, device, out)

    def increment(
        self,
        step: int,
        shape: Shape,
        *,
        stream: Stream = Stream.IDIOSYNCRATIC,
        first_replica: int = 0,
        first_particle: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        out: Tensor | None = None,
    ) -> Tensor:
        """k^(-½) Σ_{j<k} z_{k·step + j}: the Brownian increment over a step of the run, on its clock. (R, N, m).

        The clock counts steps of the run, so the variance is 1; multiply by √dt. Summed in the order of j in `dtype`,
        then multiplied by k^(-½) rounded to `dtype`; for k = 1 it is `normals`.
        """
        window = _window(shape, first_replica, first_particle)
        fine = self._fine_step(step, self.substeps)
        return self._sum(fine, self.substeps, window, stream, first_replica, first_particle, dtype, device, out)

    def area(
        self,
        step: int,
        shape: Shape,
        *,
        stream: Stream = Stream.IDIOSYNCRATIC,
        first_replica: int = 0,
        first_particle: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> tuple[Tensor, Tensor]:
        """(W_1 - W_0, U) with U = ∫₀¹ (W_s - W_0) ds over one step of the run, on its clock. Twice (R, N, m).

        Over a fine step U = ½ w + ξ/√12: given its increment w, the area is normal with mean w/2 and variance 1/12; ξ
        comes from the stream AREA, or COMMON_AREA for COMMON. Over k of them U = k^(-3/2) Σ_j (S_j + U_j), where
        S_j = Σ_{i<j} w_i: so a coarse run and a fine one share the path between the steps too. E U² = 1/3, E WU = 1/2.

        Raises ValueError for a stream other than IDIOSYNCRATIC and COMMON.
        """
        if stream not in BRIDGE:
            raise ValueError(f"stream is {stream!r}; expected IDIOSYNCRATIC or COMMON, the Brownian ones.")
        window = _window(shape, first_replica, first_particle)
        k = self.substeps
        fine = self._fine_step(step, k)
        _check_real(dtype)
        path = torch.zeros(window, dtype=dtype, device=device)
        area = torch.zeros_like(path)
        w, xi = torch.empty_like(path), torch.empty_like(path)
        place = (first_replica, first_particle, dtype, path.device)
        # Out of place sums of two tensors only: no operation below can be contracted on any device.
        for j in range(fine, fine + k):
            self._sum(j, 1, window, stream, *place, w)
            self._sum(j, 1, window, BRIDGE[stream], *place, xi)
            area += path + (0.5 * w + xi * (1.0 / math.sqrt(12.0)))
            path += w
        if k > 1:
            path *= 1.0 / math.sqrt(k)
            area *= 1.0 / (k * math.sqrt(k))
        return path, area

    def uniforms(
        self,
        step: int,
        shape: Shape,
        *,
        stream: Stream = Stream.JUMP,
        first_replica: int = 0,
        first_particle: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """U = (x + ½)/2³², x the 32-bit word of the fine step `step`: (R, N, m), strictly inside (0, 1).

        Exact in float64. In float32 it is that number rounded to nearest, except that the 128 words that would round
        to 1 give 1 - 2⁻²⁴: the two differ by 6e-8 at most.
        """
        _check_real(dtype)
        return self._draw(step, 0, shape, stream, first_replica, first_particle, dtype, device)

    def integers(
        self,
        step: int,
        shape: Shape,
        high: int,
        *,
        stream: Stream = Stream.DATA,
        first_replica: int = 0,
        first_particle: int = 0,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """⌊x·high/2³²⌋, x the 32-bit word of the fine step `step`: int64 (R, N, m) in [0, high), high ≤ 2³¹.

        Each value has ⌊2³²/high⌋ or ⌈2³²/high⌉ words: its probability differs from 1/high by less than 2⁻³², a
        relative bias below high/2³².
        """
        high = _whole("high", high)
        if not 1 <= high <= 2**31:
            raise ValueError(f"high is {high}; expected 1 <= high <= 2**31.")
        return self._draw(step, high, shape, stream, first_replica, first_particle, torch.int64, device)

    def rings(self, rate: Tensor, h: float, shift: Tensor, step: int, *, stream: Stream = Stream.JUMP) -> Tensor:
        """Events of probability p ≥ |h·rate + shift|, the least multiple of 2⁻¹⁶, in one pass: (E,), int64, in order.

        They are told by slots: that of particle i in replica r is r·N + i.

        rate: (R, N), contiguous, shift: (R, 1), of one dtype and device. With y = |h·rate + shift| in that dtype,
        product and sum rounded once each, an event is x < 2¹⁶y. Here x is a half of a 32-bit word of channel 0 of the
        fine step `step`: of particle i the lower one (i // 256 even) or the upper one of the word of "particle"
        256·(i // 512) + i mod 256. Two particles share a word, since words are what sparse events cost.

        Events are independent over particles, and the same on every backend. To be thinned where p is to be exact.
        Raises ValueError for tensors that do not match.
        """
        fine = self._fine_step(step, 1)
        double = _check_real(rate.dtype)
        if rate.ndim != 2 or not rate.is_contiguous() or shift.shape != (len(rate), 1):
            raise ValueError(
                f"rate has shape {tuple(rate.shape)} and shift {tuple(shift.shape)}; expected (R, N), contiguous, and "
                "(R, 1)."
            )
        if shift.dtype is not rate.dtype or shift.device != rate.device:
            raise ValueError(f"rate is {rate.dtype} on {rate.device}, shift is {shift.dtype} on {shift.device}.")
        n_replicas, n_particles, _ = _window((*rate.shape, 1), 0, 0)
        if rate.is_cpu and _compiled is not None and rate.numel():
            shift = shift.contiguous()
            out = torch.empty(rate.shape, dtype=torch.bool)
            count = _compiled.rings(
                out.data_ptr(), double, self.seed, Stream(stream), fine, n_replicas, n_particles, rate.data_ptr(),
                shift.data_ptr(), h, threads(),
            )  # fmt: skip
            slots = torch.empty(count, dtype=torch.int64)
            _compiled.positions(slots.data_ptr(), out.data_ptr(), out.numel())
            return slots
        n_words = -(-n_particles // 512) * 256
        u = self.uniforms(fine, (n_replicas, n_words, 1), stream=stream, dtype=torch.float64, device=rate.device)
        words = (u * 2.0**32).long().view(n_replicas, n_words // 256, 1, 256)
        halves = torch.cat([words & 0xFFFF, words >> 16], dim=2).view(n_replicas, 2 * n_words)[:, :n_particles]
        return (halves < (rate * h).add_(shift).abs_().mul_(2.0**16)).flatten().nonzero().squeeze(-1)

    def euler_(
        self,
        x: Tensor,
        drift: Tensor,
        h: float,
        diffusion: float | Tensor,
        step: int,
        *,
        stream: Stream = Stream.IDIOSYNCRATIC,
    ) -> None:
        """X += h·drift + √h·diffusion·ΔW(step), in place and in one pass.

        x, drift and a tensor `diffusion` (a diagonal one): (R, N, d), contiguous, of one dtype and device. With
        Z = Σ_j z_{k·step + j} and every operation rounded once in that dtype,

            x + (h·b + c·Z),      c = σ·√(h/k) for a number, formed in float64 and then rounded,
                                  c = √(h/k)·σ_i for a tensor, √(h/k) rounded first.

        The result is the same on every backend. Not differentiable. Raises ValueError for tensors that do not match.
        """
        k = self.substeps
        fine = self._fine_step(step, k)
        shape = x.shape
        dtype = x.dtype
        kind = self._kind(dtype)
        root = math.sqrt(h / k)
        if isinstance(diffusion, Tensor):
            _check_euler(x, diffusion, "diffusion")
            field: Tensor | None = diffusion
            scale = root
        else:
            field = None
            scale = root * diffusion
        _check_euler(x, drift, "drift")
        if type(stream) is not Stream:
            stream = Stream(stream)
        n_replicas, n_particles, n_channels = shape
        if n_channels >= MAX_CHANNELS or n_particles >= MAX_PARTICLES or n_replicas >= MAX_REPLICAS:
            _window(shape, 0, 0)
        if x.numel() == 0:
            return
        if self.antithetic:
            z = self._sum(fine, k, (n_replicas, n_particles, n_channels), stream, 0, 0, dtype, x.device, None, 1.0)
            x.add_((h * drift).add_(z.mul_(scale if field is None else scale * field)))
            return
        if x.is_cpu and _compiled is not None:
            _compiled.euler(
                x.data_ptr(), kind, self.seed, stream, fine, k, n_replicas, n_particles, n_channels,
                drift.data_ptr(), 0 if field is None else field.data_ptr(), h, scale, threads(),
            )  # fmt: skip
            return
        module = _portable(_backend(x.device.type))
        module.euler(x, drift, field, self.seed, stream, fine, k, h, scale, kind == MIXED)

    def kinetic_(
        self,
        x: Tensor,
        force: Tensor,
        positions: Tensor,
        half: float,
        decay: float,
        deviation: float,
        step: int,
        *,
        due: bool = False,
    ) -> None:
        """B A O A of a kinetic state, in place and in one pass, with the increment w of `step`:

            V += half·F (twice if `due`),   X += half·V,   V = decay·V + deviation·w,   X += half·V.

        x: (R, N, 2d), positions first; force and positions: (R, N, d); all contiguous, of one dtype and device.
        `positions` receives X, for the next force. Every product and sum is rounded once, on every backend. Not
        differentiable. Raises ValueError for tensors that do not match.
        """
        _check_kinetic(x, force, "force")
        _check_kinetic(x, positions, "positions")
        if x.numel() == 0:
            return
        if x.is_cpu and _compiled is not None and not self.antithetic:
            k = self.substeps
            fine = self._fine_step(step, k)
            window = _window(force.shape, 0, 0)
            _compiled.kinetic(
                x.data_ptr(), self._kind(x.dtype), self.seed, Stream.IDIOSYNCRATIC, fine, k, *window,
                force.data_ptr(), positions.data_ptr(), half, decay, deviation, due, 1.0 / math.sqrt(k), threads(),
            )  # fmt: skip
            return
        w = self.increment(step, force.shape, dtype=x.dtype, device=x.device)
        # Out of place, product by product: no operation can be contracted on any device.
        push = half * force
        d = force.shape[-1]
        velocities = x[..., d:] + push
        if due:
            velocities += push
        middle = x[..., :d] + half * velocities
        velocities = decay * velocities + deviation * w
        torch.add(middle, half * velocities, out=positions)
        torch.cat([positions, velocities], dim=-1, out=x)

    def _kind(self, dtype: torch.dtype) -> int:
        """How the kernels make normals of this dtype: in float32, in float64, or in float32 for float64."""
        double = _check_real(dtype)
        if self.precision is None or self.precision is dtype:
            return int(double)
        if not double:
            raise ValueError(
                "precision is torch.float64, but float32 values are asked for: they would lose it. Use "
                "dtype=torch.float64, or leave precision out."
            )
        return MIXED

    def _fine_step(self, step: int, k: int) -> int:
        """First fine step of a step that has k of them."""
        step = _whole("step", step)
        if step < 0 or (step + 1) * k >= MAX_STEPS:
            raise ValueError(f"step is {step} with {k} fine steps each; expected 0 <= fine step < 2**32.")
        return step * k

    def _sum(
        self,
        fine: int,
        k: int,
        window: tuple[int, int, int],
        stream: Stream,
        first_replica: int,
        first_particle: int,
        dtype: torch.dtype,
        device: torch.device | str,
        out: Tensor | None,
        scale: float | None = None,
    ) -> Tensor:
        """`scale`, k^(-½) if None, times the sum of the normals of the fine steps fine, ..., fine + k - 1."""
        kind = self._kind(dtype)
        if out is None:
            out = torch.empty(window, dtype=dtype, device=device)
        else:
            _check_out(out, window, dtype, torch.device(device))
        stream = Stream(stream)
        if out.numel() == 0:
            return out
        scale = 1.0 / math.sqrt(k) if scale is None else scale
        if self.antithetic:
            first, skipped = divmod(first_replica, 2)
            pairs = (window[0] + skipped + 1) // 2, *window[1:]
            ordinary = Noise(self.seed, precision=self.precision)
            z = ordinary._sum(fine, k, pairs, stream, first, first_particle, dtype, out.device, None, scale)
            return out.copy_(torch.stack([z, -z], 1).flatten(0, 1)[skipped : skipped + window[0]])
        if out.is_cpu and _compiled is not None:
            _compiled.normals(
                out.data_ptr(), kind, self.seed, stream, fine, k, *window, first_replica, first_particle,
                scale, threads(),
            )  # fmt: skip
        else:
            module = _portable(_backend(out.device.type))
            module.normals(out, self.seed, stream, fine, k, first_replica, first_particle, scale, kind == MIXED)
        return out

    def _draw(
        self,
        step: int,
        high: int,
        shape: Shape,
        stream: Stream,
        first_replica: int,
        first_particle: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> Tensor:
        """Uniforms where high = 0, else integers below it."""
        window = _window(shape, first_replica, first_particle)
        fine = self._fine_step(step, 1)
        out = torch.empty(window, dtype=dtype, device=device)
        stream = Stream(stream)
        if out.numel() == 0:
            return out
        if out.is_cpu and _compiled is not None:
            _compiled.draws(
                out.data_ptr(), dtype is torch.float64, self.seed, stream, fine, 1, *window, first_replica,
                first_particle, high, threads(),
            )  # fmt: skip
        else:
            module = _portable(_backend(out.device.type))
            module.draws(out, self.seed, stream, fine, first_replica, first_particle, high)
        return out


def assign_(slots: Tensor, target: Tensor, source: Tensor) -> bool:
    """slots[target_k] ← slots[source_k], k = 0, 1, ... one by one, in place; False, nothing done, without the kernel.

    slots: (n, ...), contiguous, on the CPU; target, source: (E,), int64, in range.
    """
    if not slots.is_cpu or _compiled is None:
        return False
    target, source = target.contiguous(), source.contiguous()
    width = slots.element_size() * math.prod(slots.shape[1:])
    _compiled.assign(slots.data_ptr(), width, target.data_ptr(), source.data_ptr(), len(target))
    return True


def kick_(x: Tensor, force: Tensor, half: float) -> None:
    """B of a kinetic state, in place: V += half·F.    x: (R, N, 2d), force: (R, N, d), contiguous; rounded twice."""
    _check_kinetic(x, force, "force")
    d = force.shape[-1]
    if x.is_cpu and _compiled is not None:
        rows = x.shape[0] * x.shape[1]
        if rows:
            _compiled.kick(x.data_ptr(), _check_real(x.dtype), rows, d, force.data_ptr(), half, threads())
    else:
        x[..., d:] += half * force


def _check_kinetic(x: Tensor, other: Tensor, name: str) -> None:
    """`other` must hold one row of d values for each row of 2d, in every way that the kernel relies on."""
    if x.ndim != 3 or other.ndim != 3 or x.shape != (*other.shape[:2], 2 * other.shape[2]):
        raise ValueError(
            f"x has shape {tuple(x.shape)} and {name} {tuple(other.shape)}; expected (R, N, 2d) and (R, N, d)."
        )
    if other.dtype is not x.dtype or other.device != x.device:
        raise ValueError(
            f"x is {x.dtype} on {x.device}, {name} is {other.dtype} on {other.device}; expected one dtype and device."
        )
    if x.requires_grad or other.requires_grad:
        raise ValueError(f"x or {name} requires a gradient, and the fused step has none; detach it or step in torch.")
    if not (x.is_contiguous() and other.is_contiguous()):
        raise ValueError(f"x or {name} is not contiguous; call .contiguous() first.")


def _check_euler(x: Tensor, other: Tensor, name: str) -> None:
    """`other` must match x in every way that the kernel relies on."""
    if (
        other.shape == x.shape
        and other.dtype is x.dtype
        and other.is_contiguous()
        and x.is_contiguous()
        and x.ndim == 3
        and other.device == x.device
        and not x.requires_grad
        and not other.requires_grad
    ):
        return
    if x.ndim != 3 or other.shape != x.shape:
        raise ValueError(f"x has shape {tuple(x.shape)} and {name} {tuple(other.shape)}; expected (R, N, d) for both.")
    if other.dtype is not x.dtype or other.device != x.device:
        raise ValueError(
            f"x is {x.dtype} on {x.device}, {name} is {other.dtype} on {other.device}; expected one dtype and device."
        )
    if x.requires_grad or other.requires_grad:
        raise ValueError(f"x or {name} requires a gradient, and the fused step has none; detach it or step in torch.")
    raise ValueError(f"x or {name} is not contiguous; call .contiguous() first.")
