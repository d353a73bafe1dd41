"""The noise of noise.py in torch: for devices without Triton. The operations and their order are those of _noise_numpy.

torch has no unsigned 64-bit product: int64 wraps, which leaves the bits right, and an arithmetic shift is masked.
Sums, products, quotients and square roots are each a kernel of their own, so that nothing is contracted.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ._noise_numpy import (
    BELOW_ONE,
    BITS_TO_OCTAVE,
    COSINE_32,
    COSINE_64,
    LANE,
    LOG_32,
    LOG_64,
    LOW,
    MINUS_2_LOG_2,
    MULTIPLIERS,
    NEAR_ONE,
    ONE_BITS,
    ROOT_HALF_BITS,
    SINE_32,
    SINE_64,
    TILE,
    TWO_LOG_2,
    WEYL,
    horner,
)

# Counters at a time. A processor wants its temporaries in cache, a device wants few launches.
CHUNK = {"cpu": 16384}
CHUNK_ELSEWHERE = 2**20


def square_root(x: Tensor) -> Tensor:
    """√x rounded to nearest.

    torch's own is not on the CPU, where numpy's serves. Elsewhere it relies on a correctly rounded root in float64, as
    CUDA has; rounding that to float32 is rounding once, since 53 ≥ 2·24 + 2.
    """
    if x.is_cpu:
        return torch.from_numpy(np.sqrt(x.numpy()))
    return x.double().sqrt().to(x.dtype)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of four int64 tensors that broadcast and hold 32-bit words (Salmon et al., SC 2011)."""
    w0, w1, w2, w3 = counter
    k0, k1 = seed & LOW, seed >> 32
    for _ in range(10):
        a, b = w0 * MULTIPLIERS[0], w2 * MULTIPLIERS[1]
        w0, w1 = ((b >> 32) & LOW) ^ w1 ^ k0, b & LOW
        w2, w3 = ((a >> 32) & LOW) ^ w3 ^ k1, a & LOW
        k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
    return w0, w1, w2, w3


def radius_32(x: Tensor) -> Tensor:
    """√(-2 log u), u = (x + ½)/2³², in float32."""
    near = x >= NEAR_ONE
    v = torch.where(near, LOW - x, x).to(torch.float32) + 0.5
    bits = v.view(torch.int32)
    exponent = (bits - ROOT_HALF_BITS) >> 23
    m = (bits - (exponent << 23)).view(torch.float32)
    f = torch.where(near, v * -(2.0**-32), m - 1.0)
    e = torch.where(near, 0, exponent - 32).to(torch.float32)
    square = f * f
    return square_root((square + square * (f * horner(LOG_32, f)) - 2.0 * f) + e * MINUS_2_LOG_2)


def radius_64(x: Tensor) -> Tensor:
    """√(-2 log u), u = (x + ½)/2³², in float64."""
    u = (x.to(torch.float64) + 0.5) * 2.0**-32
    bits = u.view(torch.int64)
    biased = (bits + BITS_TO_OCTAVE) >> 52
    m = (bits - (biased << 52) + ONE_BITS).view(torch.float64)
    e = (biased - 1023).to(torch.float64)
    f = m - 1.0
    s = f / (f + 2.0)
    z = s * s
    square = f * f
    upper, lower = TWO_LOG_2
    return square_root(((square - s * (square + z * horner(LOG_64, z)) - 2.0 * f) - e * lower) - e * upper)


def box_muller(x: Tensor, turn: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two normals from two int64 tensors of 32-bit words: radius from x, angle 2π(turn + ½)/2³²."""
    single = dtype is torch.float32
    r = radius_32(x) if single else radius_64(x)
    shifted = (turn + 0x20000000) & LOW
    quadrant = shifted >> 30
    odd = ((shifted & 0x3FFFFFFF) << 1 | 1) - 0x40000000
    t = odd.to(dtype) * 2.0**-30
    y = t * t
    s = horner(SINE_32 if single else SINE_64, y) * t
    c = horner(COSINE_32 if single else COSINE_64, y) * y
    along, across = r + r * c, r * s
    swapped = (quadrant & 1) == 1
    cosine, sine = torch.where(swapped, across, along), torch.where(swapped, along, across)
    return (
        torch.where(((quadrant + 1) & 2) != 0, -cosine, cosine),
        torch.where((quadrant & 2) != 0, -sine, sine),
    )


Counters = tuple[Tensor, Tensor, Tensor]
Evaluate = Callable[[Counters], tuple[Tensor, ...]]


def _words(counters: Counters, stream: int, step: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    block, channel, replica = counters
    return philox((block, channel + (stream << 16), torch.full_like(replica, step), replica), seed)


def _window(out: Tensor, first_replica: int, first_particle: int, evaluate: Evaluate) -> Tensor:
    """(R, N, m) values of `evaluate`, which maps counters to the four words' values of each block."""
    n_replicas, n_particles, n_channels = out.shape
    first_tile, skipped = divmod(first_particle, TILE)
    end = skipped + n_particles
    n_tiles = -(-end // TILE)
    lanes = min(end, LANE)
    width = TILE if lanes == LANE else lanes
    values = out.new_empty((n_replicas * n_channels * n_tiles, width))
    lane = torch.arange(lanes, device=out.device)
    size = max(CHUNK.get(out.device.type, CHUNK_ELSEWHERE) // lanes, 1)
    for start in range(0, len(values), size):
        task = torch.arange(start, min(start + size, len(values)), device=out.device)[:, None]
        block = (task % n_tiles + first_tile) * LANE + lane
        counters = block, task // n_tiles % n_channels, task // (n_tiles * n_channels) + first_replica
        words = torch.stack(evaluate(counters), dim=1)
        values[start : start + size] = words.reshape(len(task), -1)[:, :width]
    return values.view(n_replicas, n_channels, -1)[:, :, skipped:end].transpose(1, 2)


def _sum(
    out: Tensor,
    seed: int,
    stream: int,
    step: int,
    substeps: int,
    first_replica: int,
    first_particle: int,
    single: bool,
) -> Tensor:
    precision = torch.float32 if single else out.dtype

    def one(counters: Counters, fine: int) -> tuple[Tensor, ...]:
        w0, w1, w2, w3 = _words(counters, stream, fine, seed)
        z = (*box_muller(w0, w1, precision), *box_muller(w2, w3, precision))
        return tuple(value.to(out.dtype) for value in z)

    def evaluate(counters: Counters) -> tuple[Tensor, ...]:
        total = one(counters, step)
        for fine in range(step + 1, step + substeps):
            total = tuple(z + dz for z, dz in zip(total, one(counters, fine), strict=True))
        return total

    return _window(out, first_replica, first_particle, evaluate)


def normals(
    out: Tensor,
    seed: int,
    stream: int,
    step: int,
    substeps: int,
    first_replica: int,
    first_particle: int,
    scale: float,
    single: bool = False,
) -> None:
    """Fill out (R, N, m) with scale · Σ_j z_{step + j}, in the order of j; unscaled for one substep.

    With `single` the normals z are those of float32, widened.
    """
    z = _sum(out, seed, stream, step, substeps, first_replica, first_particle, single)
    out.copy_(z if substeps == 1 else z * scale)


def draws(out: Tensor, seed: int, stream: int, step: int, first_replica: int, first_particle: int, high: int) -> None:
    """Fill out (R, N, m) with uniforms where high = 0, else with integers below it."""

    def evaluate(counters: Counters) -> tuple[Tensor, ...]:
        words = _words(counters, stream, step, seed)
        if high:
            return tuple(w * high >> 32 for w in words)
        uniforms = tuple((w.to(torch.float64) + 0.5) * 2.0**-32 for w in words)
        if out.dtype is torch.float64:
            return uniforms
        return tuple(u.to(torch.float32).clamp(max=BELOW_ONE) for u in uniforms)

    out.copy_(_window(out, first_replica, first_particle, evaluate))


def euler(
    x: Tensor,
    drift: Tensor,
    diffusion: Tensor | None,
    seed: int,
    stream: int,
    step: int,
    substeps: int,
    h: float,
    scale: float,
    single: bool = False,
) -> None:
    """Replace x by x + (h·drift + c·Z), c = scale or scale·diffusion, in that order; all (R, N, d)."""
    z = _sum(x, seed, stream, step, substeps, 0, 0, single)
    c = scale if diffusion is None else scale * diffusion
    x.copy_(x + (h * drift + c * z))
