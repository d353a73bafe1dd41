"""The noise of noise.py in Triton, for CUDA. The operations and their order are those of _noise_numpy.

Every kernel is launched with enable_fp_fusion=False: a fused multiply-add would round once where the others round
twice. For the same reason the float32 root is sqrt_rn and the only quotient is in float64, both rounded to nearest.
One program computes BLOCK counters of one replica, with the channels innermost, so that stores are coalesced.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# A kernel's parameters have no Python types.

import struct
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from torch.cuda import device as cuda_device

from . import _noise_numpy as reference
from ._noise_numpy import LANE, TILE

BLOCK = 256

# A kernel reads globals only if they are constexpr.
SINE_32, SINE_64 = tl.constexpr(reference.SINE_32), tl.constexpr(reference.SINE_64)
COSINE_32, COSINE_64 = tl.constexpr(reference.COSINE_32), tl.constexpr(reference.COSINE_64)
LOG_32, LOG_64 = tl.constexpr(reference.LOG_32), tl.constexpr(reference.LOG_64)
MINUS_2_LOG_2 = tl.constexpr(reference.MINUS_2_LOG_2)
UPPER, LOWER = tl.constexpr(reference.TWO_LOG_2[0]), tl.constexpr(reference.TWO_LOG_2[1])
NEAR_ONE, LOW = tl.constexpr(reference.NEAR_ONE), tl.constexpr(reference.LOW)
ROOT_HALF_BITS = tl.constexpr(reference.ROOT_HALF_BITS)
BITS_TO_OCTAVE, ONE_BITS = tl.constexpr(reference.BITS_TO_OCTAVE), tl.constexpr(reference.ONE_BITS)
BELOW_ONE = tl.constexpr(reference.BELOW_ONE)
M0, M1 = tl.constexpr(reference.MULTIPLIERS[0]), tl.constexpr(reference.MULTIPLIERS[1])
W0, W1 = tl.constexpr(reference.WEYL[0]), tl.constexpr(reference.WEYL[1])
LANES, TILES = tl.constexpr(LANE), tl.constexpr(TILE)


@triton.jit
def _horner(coefficients: tl.constexpr, n: tl.constexpr, y):
    p = y * coefficients[0] + coefficients[1]
    for i in tl.static_range(2, n):
        p = p * y + coefficients[i]
    return p


@triton.jit
def _word(x):
    """The 32 bits of a host integer, which arrives signed."""
    return x.to(tl.int32).to(tl.uint32, bitcast=True)


@triton.jit
def _philox(w0, w1, w2, w3, k0, k1):
    """Philox4x32-10 (Salmon et al., SC 2011); all uint32."""
    m0 = tl.full((), M0, tl.uint32)
    m1 = tl.full((), M1, tl.uint32)
    for _ in tl.static_range(10):
        high_a = tl.umulhi(w0, m0 + tl.zeros_like(w0))
        high_b = tl.umulhi(w2, m1 + tl.zeros_like(w2))
        low_a = w0 * m0
        low_b = w2 * m1
        w0 = high_b ^ w1 ^ k0
        w1 = low_b
        w2 = high_a ^ w3 ^ k1
        w3 = low_a
        k0 = k0 + tl.full((), W0, tl.uint32)
        k1 = k1 + tl.full((), W1, tl.uint32)
    return w0, w1, w2, w3


@triton.jit
def _radius_32(x):
    near = x >= tl.full((), NEAR_ONE, tl.uint32)
    v = tl.where(near, x ^ tl.full((), LOW, tl.uint32), x).to(tl.float32) + 0.5
    bits = v.to(tl.int32, bitcast=True)
    exponent = (bits - ROOT_HALF_BITS) >> 23
    m = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    f = tl.where(near, v * -2.3283064365386963e-10, m - 1.0)  # -2⁻³²
    e = tl.where(near, 0, exponent - 32).to(tl.float32)
    square = f * f
    return tl.sqrt_rn((square + square * (f * _horner(LOG_32, 8, f)) - 2.0 * f) + e * MINUS_2_LOG_2)


@triton.jit
def _radius_64(x):
    u = (x.to(tl.float64) + 0.5) * 2.3283064365386963e-10
    bits = u.to(tl.int64, bitcast=True)
    biased = (bits + BITS_TO_OCTAVE) >> 52
    m = (bits - (biased << 52) + ONE_BITS).to(tl.float64, bitcast=True)
    e = (biased - 1023).to(tl.float64)
    f = m - 1.0
    s = f / (f + 2.0)
    z = s * s
    square = f * f
    return tl.sqrt(((square - s * (square + z * _horner(LOG_64, 7, z)) - 2.0 * f) - e * LOWER) - e * UPPER)


@triton.jit
def _box_muller(x, turn, DOUBLE: tl.constexpr):
    shifted = turn + tl.full((), 0x20000000, tl.uint32)
    quadrant = (shifted >> 30).to(tl.int32)
    odd = (((shifted & 0x3FFFFFFF) << 1) | 1).to(tl.int32) - 0x40000000
    if DOUBLE:
        r = _radius_64(x)
        t = odd.to(tl.float64) * 9.313225746154785e-10  # 2⁻³⁰
        y = t * t
        s = _horner(SINE_64, 7, y) * t
        c = _horner(COSINE_64, 7, y) * y
    else:
        r = _radius_32(x)
        t = odd.to(tl.float32) * 9.313225746154785e-10
        y = t * t
        s = _horner(SINE_32, 4, y) * t
        c = _horner(COSINE_32, 4, y) * y
    along = r + r * c
    across = r * s
    swapped = (quadrant & 1) == 1
    cosine = tl.where(swapped, across, along)
    sine = tl.where(swapped, along, across)
    first = tl.where(((quadrant + 1) & 2) != 0, -cosine, cosine)
    second = tl.where((quadrant & 2) != 0, -sine, sine)
    return first, second


@triton.jit
def _place(first_replica, first_particle, n_particles, n_channels, SIZE: tl.constexpr):
    """Counters of this program, and where their first word's values go: block, channel, replica, particle, offset."""
    n = n_particles.to(tl.int64)
    m = n_channels.to(tl.int64)
    first = first_particle.to(tl.int64)
    skipped = first % TILES
    blocks = (skipped + n + TILES - 1) // TILES * LANES
    programs = (blocks * m + SIZE - 1) // SIZE
    program = tl.program_id(0).to(tl.int64)
    replica = program // programs
    entry = (program % programs) * SIZE + tl.arange(0, SIZE)
    channel = entry % m
    block = entry // m
    particle = block // LANES * TILES + block % LANES - skipped
    offset = (replica * n + particle) * m + channel
    block = (block + first // TILES * LANES).to(tl.uint32)
    return block, channel.to(tl.uint32), _word(first_replica) + replica.to(tl.uint32), particle, offset


@triton.jit
def _words(block, channel, replica, stream, step, k0, k1):
    zero = tl.zeros_like(block)
    second = (_word(stream) << 16) | channel
    return _philox(block, second, zero + step, zero + replica, _word(k0), _word(k1))


@triton.jit
def _real(bits, DOUBLE: tl.constexpr):
    """A host float, which arrives as the bits of float64: a float argument would lose half of them."""
    value = bits.to(tl.int64).to(tl.float64, bitcast=True)
    if not DOUBLE:
        value = value.to(tl.float32)
    return value


@triton.jit
def _normal_pair(x, turn, DOUBLE: tl.constexpr, SINGLE: tl.constexpr):
    """Box-Muller in the precision of the state, or, where SINGLE, in float32 and widened to it."""
    if SINGLE:
        first, second = _box_muller(x, turn, False)
        first = first.to(tl.float64)
        second = second.to(tl.float64)
    else:
        first, second = _box_muller(x, turn, DOUBLE)
    return first, second


@triton.jit
def _sum(block, channel, replica, stream, step, substeps, k0, k1, DOUBLE: tl.constexpr, SINGLE: tl.constexpr):
    fine = _word(step)
    x0, x1, x2, x3 = _words(block, channel, replica, stream, fine, k0, k1)
    z0, z1 = _normal_pair(x0, x1, DOUBLE, SINGLE)
    z2, z3 = _normal_pair(x2, x3, DOUBLE, SINGLE)
    for _ in range(1, substeps):
        fine += tl.full((), 1, tl.uint32)
        x0, x1, x2, x3 = _words(block, channel, replica, stream, fine, k0, k1)
        d0, d1 = _normal_pair(x0, x1, DOUBLE, SINGLE)
        d2, d3 = _normal_pair(x2, x3, DOUBLE, SINGLE)
        z0 += d0
        z1 += d1
        z2 += d2
        z3 += d3
    return z0, z1, z2, z3


KEY = ("k0", "k1", "stream", "step", "substeps", "first_replica", "first_particle", "n_particles", "n_channels")


@triton.jit(do_not_specialize=[*KEY, "scale"])
def _normals_kernel(
    out, k0, k1, stream, step, substeps, first_replica, first_particle, n_particles, n_channels, scale,
    DOUBLE: tl.constexpr, SINGLE: tl.constexpr, SCALED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    block, channel, replica, particle, offset = _place(first_replica, first_particle, n_particles, n_channels, SIZE)
    z0, z1, z2, z3 = _sum(block, channel, replica, stream, step, substeps, k0, k1, DOUBLE, SINGLE)
    if SCALED:
        factor = _real(scale, DOUBLE)
        z0 *= factor
        z1 *= factor
        z2 *= factor
        z3 *= factor
    lane = n_channels.to(tl.int64) * LANES
    inside = particle >= 0
    tl.store(out + offset, z0, mask=inside & (particle < n_particles))
    inside = particle + LANES >= 0
    tl.store(out + offset + lane, z1, mask=inside & (particle + LANES < n_particles))
    inside = particle + 2 * LANES >= 0
    tl.store(out + offset + 2 * lane, z2, mask=inside & (particle + 2 * LANES < n_particles))
    inside = particle + 3 * LANES >= 0
    tl.store(out + offset + 3 * lane, z3, mask=inside & (particle + 3 * LANES < n_particles))


@triton.jit
def _draw(x, high, INTEGER: tl.constexpr, DOUBLE: tl.constexpr):
    if INTEGER:
        value = (x.to(tl.int64) * high) >> 32
    else:
        value = (x.to(tl.float64) + 0.5) * 2.3283064365386963e-10
        if not DOUBLE:
            value = tl.minimum(value.to(tl.float32), BELOW_ONE)
    return value


@triton.jit(do_not_specialize=[*KEY, "high"])
def _draws_kernel(
    out, k0, k1, stream, step, first_replica, first_particle, n_particles, n_channels, high,
    INTEGER: tl.constexpr, DOUBLE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    block, channel, replica, particle, offset = _place(first_replica, first_particle, n_particles, n_channels, SIZE)
    x0, x1, x2, x3 = _words(block, channel, replica, stream, _word(step), k0, k1)
    limit = high.to(tl.int64)
    lane = n_channels.to(tl.int64) * LANES
    inside = (particle >= 0) & (particle < n_particles)
    tl.store(out + offset, _draw(x0, limit, INTEGER, DOUBLE), mask=inside)
    inside = (particle + LANES >= 0) & (particle + LANES < n_particles)
    tl.store(out + offset + lane, _draw(x1, limit, INTEGER, DOUBLE), mask=inside)
    inside = (particle + 2 * LANES >= 0) & (particle + 2 * LANES < n_particles)
    tl.store(out + offset + 2 * lane, _draw(x2, limit, INTEGER, DOUBLE), mask=inside)
    inside = (particle + 3 * LANES >= 0) & (particle + 3 * LANES < n_particles)
    tl.store(out + offset + 3 * lane, _draw(x3, limit, INTEGER, DOUBLE), mask=inside)


@triton.jit
def _advance(x, drift, diffusion, offset, inside, z, h, scale, DIAGONAL: tl.constexpr):
    c = scale
    if DIAGONAL:
        c = scale * tl.load(diffusion + offset, mask=inside)
    moved = tl.load(x + offset, mask=inside) + (h * tl.load(drift + offset, mask=inside) + c * z)
    tl.store(x + offset, moved, mask=inside)


@triton.jit(do_not_specialize=[*KEY, "h", "scale"])
def _euler_kernel(
    x, drift, diffusion, k0, k1, stream, step, substeps, first_replica, first_particle, n_particles, n_channels,
    h, scale, DIAGONAL: tl.constexpr, DOUBLE: tl.constexpr, SINGLE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    block, channel, replica, particle, offset = _place(first_replica, first_particle, n_particles, n_channels, SIZE)
    z0, z1, z2, z3 = _sum(block, channel, replica, stream, step, substeps, k0, k1, DOUBLE, SINGLE)
    dt = _real(h, DOUBLE)
    c = _real(scale, DOUBLE)
    lane = n_channels.to(tl.int64) * LANES
    _advance(x, drift, diffusion, offset, particle < n_particles, z0, dt, c, DIAGONAL)
    particle += LANES
    offset += lane
    _advance(x, drift, diffusion, offset, particle < n_particles, z1, dt, c, DIAGONAL)
    particle += LANES
    offset += lane
    _advance(x, drift, diffusion, offset, particle < n_particles, z2, dt, c, DIAGONAL)
    particle += LANES
    offset += lane
    _advance(x, drift, diffusion, offset, particle < n_particles, z3, dt, c, DIAGONAL)


def _signed(word: int) -> int:
    """The 32 bits of `word` as a signed integer: so that every launch has the same argument types."""
    return word - 2**32 if word >= 2**31 else word


def _bits(value: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def _key(seed: int, stream: int, step: int) -> tuple[int, int, int, int]:
    return _signed(seed & reference.LOW), _signed(seed >> 32), int(stream), _signed(step)


def _launch(kernel: Any, out: Tensor, first_particle: int, *arguments: Any, **constants: bool) -> None:
    n_replicas, n_particles, n_channels = out.shape
    n_tiles = -(-(first_particle % TILE + n_particles) // TILE)
    programs = n_replicas * -(-n_tiles * LANE * n_channels // BLOCK)
    options = {**constants, "SIZE": BLOCK, "num_warps": 4, "enable_fp_fusion": False}
    if out.is_cuda:
        with cuda_device(out.device):
            kernel[(programs,)](*arguments, **options)
    else:
        kernel[(programs,)](*arguments, **options)


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
    _, n_particles, n_channels = out.shape
    key = _key(seed, stream, step)
    window = _signed(first_replica), first_particle, n_particles, n_channels
    _launch(
        _normals_kernel, out, first_particle, out, *key, substeps, *window, _bits(scale),
        DOUBLE=out.element_size() == 8, SINGLE=single, SCALED=substeps > 1,
    )  # fmt: skip


def draws(out: Tensor, seed: int, stream: int, step: int, first_replica: int, first_particle: int, high: int) -> None:
    """Fill out (R, N, m) with uniforms where high = 0, else with integers below it."""
    _, n_particles, n_channels = out.shape
    key = _key(seed, stream, step)
    window = _signed(first_replica), first_particle, n_particles, n_channels
    _launch(
        _draws_kernel, out, first_particle, out, *key, *window, high,
        INTEGER=high > 0, DOUBLE=out.element_size() == 8,
    )  # fmt: skip


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
    _, n_particles, n_channels = x.shape
    key = _key(seed, stream, step)
    field = x if diffusion is None else diffusion
    _launch(
        _euler_kernel, x, 0, x, drift, field, *key, substeps, 0, 0, n_particles, n_channels, _bits(h), _bits(scale),
        DIAGONAL=diffusion is not None, DOUBLE=x.element_size() == 8, SINGLE=single,
    )  # fmt: skip
