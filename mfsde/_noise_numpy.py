"""The noise of noise.py in numpy: where nothing was compiled, and as the reference of the tests.

Written for reading against the definition; the operations and their order are those of every other backend.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]

LANE = 64  # consecutive particles that take the same word of their blocks
TILE = 4 * LANE  # the particles of 64 blocks
CHUNK = 16384  # counters at a time: their temporaries fit a level-2 cache

LOW = 0xFFFFFFFF
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85


def _table(text: str) -> tuple[float, ...]:
    return tuple(float.fromhex(number) for number in text.split())


# Minimax polynomials, highest power first: a Remez exchange in 60 digits, then rounded to the type.
# With t in (-1, 1) and y = t²: sin(πt/4)/t (relative error 3.2e-9, 3.3e-18) and (cos(πt/4) - 1)/y (absolute error of
# the cosine 5.4e-11, 3.3e-20).
SINE_32 = _table("-0x1.2d9302p-15 0x1.465e92p-9 -0x1.4abbbap-4 0x1.921fb6p-1")
SINE_64 = _table(
    "0x1.e3eed63267ce0p-38 -0x1.e30063a189f6cp-30 0x1.50782fca3a85cp-22 -0x1.32d2cce2d5383p-15 "
    "0x1.466bc67758700p-9 -0x1.4abbce625be41p-4 0x1.921fb54442d18p-1"
)
COSINE_32 = _table("0x1.d9f7bcp-19 -0x1.55c664p-12 0x1.03c1dep-6 -0x1.3bd3ccp-2")
COSINE_64 = _table(
    "-0x1.b26fe87b03e9dp-42 0x1.f9cc6ad036bf9p-34 -0x1.a6d1ecb740ad4p-26 0x1.e1f50683b42d6p-19 "
    "-0x1.55d3c7e3c95bcp-12 0x1.03c1f081b5ab0p-6 -0x1.3bd3cc9be45dep-2"
)
# (-2 log(1+f) + 2f - f²)/f³ in f, for f in [√½ - 1, √2 - 1]: 3.9e-9 of the logarithm that it enters.
LOG_32 = _table(
    "0x1.483938p-3 -0x1.0bee3cp-2 0x1.0d2fb8p-2 -0x1.219ab8p-2 "
    "0x1.545e06p-2 -0x1.99b438p-2 0x1.0002b4p-1 -0x1.55551ep-1"
)
# 2 (log((1+s)/(1-s)) - 2s)/s³ in s², s = f/(2+f): 4.9e-18 absolute.
LOG_64 = _table(
    "0x1.2f0566962d4a2p-2 0x1.39a1ba5a0fd37p-2 0x1.74663eecb9048p-2 0x1.c71c520944924p-2 0x1.24924941f1475p-1 "
    "0x1.999999997fdb5p-1 0x1.5555555555592p+0"
)
MINUS_2_LOG_2 = -float.fromhex("0x1.62e430p+0")
TWO_LOG_2 = _table("0x1.62e42fef00000p+0 0x1.473de6af278edp-33")  # upper and lower part
NEAR_ONE = 0xB504F334  # the words from here on have u > √½
ROOT_HALF_BITS = 0x3F3504F3  # of √½ in float32
BITS_TO_OCTAVE = 0x00095F619980C433  # bits of 1 less bits of √½ in float64
ONE_BITS = 0x3FF0000000000000
BELOW_ONE = 1.0 - 2.0**-24


def philox(counter: tuple[Array, Array, Array, Array], seed: int) -> tuple[Array, Array, Array, Array]:
    """Philox4x32-10 of four arrays of uint64 that broadcast and hold 32-bit words (Salmon et al., SC 2011)."""
    w0, w1, w2, w3 = counter
    k0, k1 = seed & LOW, seed >> 32
    for _ in range(10):
        a, b = w0 * MULTIPLIERS[0], w2 * MULTIPLIERS[1]
        w0, w1, w2, w3 = (b >> 32) ^ w1 ^ k0, b & LOW, (a >> 32) ^ w3 ^ k1, a & LOW
        k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
    return w0, w1, w2, w3


def horner(coefficients: tuple[float, ...], y: Any) -> Any:
    """The polynomial with these coefficients, highest power first, one rounding for every product and sum."""
    p = coefficients[0]
    for c in coefficients[1:]:
        p = p * y + c
    return p


def radius_32(x: Array) -> Array:
    """√(-2 log u), u = (x + ½)/2³², in float32; near 1 from ~x, which keeps the relative accuracy of log u."""
    near = x >= NEAR_ONE
    v = (x ^ np.where(near, np.uint32(LOW), np.uint32(0))).astype(np.float32) + np.float32(0.5)
    bits = v.view(np.int32)
    exponent = (bits - ROOT_HALF_BITS) >> 23
    m = (bits - (exponent << 23)).view(np.float32)
    f = np.where(near, v * -(2.0**-32), m - 1.0)
    e = np.where(near, np.float32(0.0), (exponent - 32).astype(np.float32))
    square = f * f
    return np.sqrt((square + square * (f * horner(LOG_32, f)) - 2.0 * f) + e * MINUS_2_LOG_2)  # type: ignore[no-any-return]


def radius_64(x: Array) -> Array:
    """√(-2 log u), u = (x + ½)/2³², in float64, where u, u - 1 and e·(2 log 2, upper part) are exact."""
    u = (x.astype(np.float64) + 0.5) * 2.0**-32
    bits = u.view(np.uint64)
    biased = (bits + BITS_TO_OCTAVE) >> 52
    m = (bits - (biased << 52) + ONE_BITS).view(np.float64)
    e = (biased.astype(np.int64) - 1023).astype(np.float64)
    f = m - 1.0
    s = f / (f + 2.0)
    z = s * s
    square = f * f
    upper, lower = TWO_LOG_2
    return np.sqrt(((square - s * (square + z * horner(LOG_64, z)) - 2.0 * f) - e * lower) - e * upper)  # type: ignore[no-any-return]


def box_muller(x: Array, turn: Array, dtype: Any) -> tuple[Array, Array]:
    """Two normals from two arrays of uint32 words: radius from x, angle 2π(turn + ½)/2³²."""
    single = np.dtype(dtype) == np.float32
    r = radius_32(x) if single else radius_64(x)
    # The nearest quarter turn is taken off in integers; t is odd, so neither function is ever zero.
    shifted = turn + np.uint32(0x20000000)
    quadrant = shifted >> 30
    odd = ((shifted & 0x3FFFFFFF) << 1 | 1).astype(np.int32) - 0x40000000
    t = odd.astype(dtype) * 2.0**-30
    y = t * t
    s = horner(SINE_32 if single else SINE_64, y) * t
    c = horner(COSINE_32 if single else COSINE_64, y) * y
    along, across = r + r * c, r * s
    swapped = (quadrant & 1) == 1
    cosine, sine = np.where(swapped, across, along), np.where(swapped, along, across)
    return (
        np.where(((quadrant + 1) & 2) != 0, -cosine, cosine),
        np.where((quadrant & 2) != 0, -sine, sine),
    )


Counters = tuple[Array, Array, Array]
Evaluate = Callable[[Counters], tuple[Array, ...]]


def _words(counters: Counters, stream: int, step: int, seed: int) -> list[Array]:
    block, channel, replica = counters
    words = philox((block, channel + (stream << 16), np.asarray(step, np.uint64), replica), seed)
    return [w.astype(np.uint32) for w in words]


def _window(shape: tuple[int, ...], first_replica: int, first_particle: int, dtype: Any, evaluate: Evaluate) -> Array:
    """(R, N, m) values of `evaluate`, which maps counters to the four words' values of each block."""
    n_replicas, n_particles, n_channels = shape
    first_tile, skipped = divmod(first_particle, TILE)
    end = skipped + n_particles
    n_tiles = -(-end // TILE)
    lanes = min(end, LANE)
    width = TILE if lanes == LANE else lanes
    values = np.empty((n_replicas * n_channels * n_tiles, width), dtype)
    lane = np.arange(lanes, dtype=np.uint64)
    size = max(CHUNK // lanes, 1)
    for start in range(0, len(values), size):
        task = np.arange(start, min(start + size, len(values)), dtype=np.uint64)[:, None]
        block = (task % n_tiles + first_tile) * LANE + lane
        counters = block, task // n_tiles % n_channels, task // (n_tiles * n_channels) + first_replica
        words = np.stack(evaluate(counters), axis=1)
        values[start : start + size] = words.reshape(len(task), -1)[:, :width]
    return values.reshape(n_replicas, n_channels, -1)[:, :, skipped:end].transpose(0, 2, 1)


def _sum(
    shape: tuple[int, ...],
    dtype: Any,
    seed: int,
    stream: int,
    step: int,
    substeps: int,
    first_replica: int,
    first_particle: int,
    single: bool,
) -> Array:
    precision = np.float32 if single else dtype

    def one(counters: Counters, fine: int) -> tuple[Array, ...]:
        w0, w1, w2, w3 = _words(counters, stream, fine, seed)
        z = (*box_muller(w0, w1, precision), *box_muller(w2, w3, precision))
        return tuple(value.astype(dtype, copy=False) for value in z)

    def evaluate(counters: Counters) -> tuple[Array, ...]:
        total = one(counters, step)
        for fine in range(step + 1, step + substeps):
            total = tuple(z + dz for z, dz in zip(total, one(counters, fine), strict=True))
        return total

    return _window(shape, first_replica, first_particle, dtype, evaluate)


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
    """Fill out (R, N, m), on the CPU, with scale · Σ_j z_{step + j}, in the order of j; unscaled for one substep.

    With `single` the normals z are those of float32, widened.
    """
    target = out.numpy()
    z = _sum(target.shape, target.dtype, seed, stream, step, substeps, first_replica, first_particle, single)
    target[...] = z if substeps == 1 else z * target.dtype.type(scale)


def draws(out: Tensor, seed: int, stream: int, step: int, first_replica: int, first_particle: int, high: int) -> None:
    """Fill out (R, N, m), on the CPU, with uniforms where high = 0, else with integers below it."""
    target = out.numpy()

    def evaluate(counters: Counters) -> tuple[Array, ...]:
        words = _words(counters, stream, step, seed)
        if high:
            return tuple((w.astype(np.uint64) * high >> 32).astype(np.int64) for w in words)
        uniforms = tuple((w.astype(np.float64) + 0.5) * 2.0**-32 for w in words)
        if target.dtype == np.float64:
            return uniforms
        return tuple(np.minimum(u.astype(np.float32), np.float32(BELOW_ONE)) for u in uniforms)

    target[...] = _window(target.shape, first_replica, first_particle, target.dtype, evaluate)


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
    """Replace x by x + (h·drift + c·Z), c = scale or scale·diffusion, in that order; all (R, N, d) on the CPU."""
    target = x.numpy()
    real = target.dtype.type
    z = _sum(target.shape, target.dtype, seed, stream, step, substeps, 0, 0, single)
    c = real(scale) if diffusion is None else real(scale) * diffusion.numpy()
    target[...] = target + (real(h) * drift.numpy() + c * z)
