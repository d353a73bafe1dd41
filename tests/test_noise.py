"""The noise is one function of its key: exact identities first, then its law.

The law is tested on fixed keys, so a test passes always or never. Each statistical check returns how many standard
errors separate the data from the truth, and has a twin: the same check must reject a generator with a planted fault.
"""

import hashlib
import importlib.util
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr
from torch import Tensor

from mfsde import _noise_numpy, _noise_torch, noise
from mfsde.noise import Noise, Stream, backend

ROOT = Path(__file__).parent.parent
REALS = [torch.float32, torch.float64]
COMPILED = noise._compiled
needs_compiled = pytest.mark.skipif(COMPILED is None, reason="the compiled kernel is not in use")
FEW_ERRORS = 4.5  # standard errors: one false alarm in 150 000 for a single number, and some sixty are tested


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- The definition ---------------------------------------------------------------------------------------------------

# Random123's known answers: counter, key, words.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def hexadecimal(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def compiled_box_muller(words: np.ndarray[Any, Any], dtype: torch.dtype) -> np.ndarray[Any, Any]:
    assert COMPILED is not None
    words = np.ascontiguousarray(words, np.uint32)
    out = torch.empty(words.shape, dtype=dtype)
    COMPILED.box_muller(out.data_ptr(), dtype is torch.float64, words.ctypes.data, words.shape[1])
    return out.numpy()


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_known_answers(counter: str, key: str, words: str) -> None:
    c, (low, high), expected = hexadecimal(counter), hexadecimal(key), hexadecimal(words)
    seed = high << 32 | low
    arrays = tuple(np.array([w], np.uint64) for w in c)
    assert [int(w[0]) for w in _noise_numpy.philox(arrays, seed)] == expected  # type: ignore[arg-type]
    tensors = tuple(torch.tensor([w]) for w in c)
    assert [int(w[0]) for w in _noise_torch.philox(tensors, seed)] == expected  # type: ignore[arg-type]
    for _ in each_instruction_set():
        block = np.empty(256, np.uint32)
        COMPILED.words(block.ctypes.data, *c, seed)  # type: ignore[union-attr]
        assert [int(block[64 * k]) for k in range(4)] == expected


def each_instruction_set() -> Iterator[str]:
    """Every build of the compiled kernel that this processor can run, the one in use last."""
    if COMPILED is None:
        return
    for i, name in enumerate(COMPILED.instruction_sets()):
        COMPILED.use(i)
        yield name


def extreme_words() -> np.ndarray[Any, Any]:
    """Pairs of the words where a branch, a rounding or a quadrant changes."""
    near = [0, 1, 2, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2, 2**32 - 1]
    near += [_noise_numpy.NEAR_ONE + i for i in (-1, 0, 1)]
    near += [(eighth * 2**29 + i) % 2**32 for eighth in range(8) for i in (-1, 0, 1)]
    return np.array(np.meshgrid(near, near)).reshape(2, -1).astype(np.uint32)


def random_words(n: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 2**32, (2, n), dtype=np.uint32)


def reference_box_muller(words: np.ndarray[Any, Any], dtype: torch.dtype) -> np.ndarray[Any, Any]:
    real = np.float64 if dtype is torch.float64 else np.float32
    return np.stack(_noise_numpy.box_muller(words[0], words[1], real))


def exact_box_muller(words: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """In long double, with the angle reduced to an eighth of a turn and log1p near u = 1."""
    real = np.longdouble
    if np.finfo(real).nmant < 63:
        pytest.skip("long double has no more digits than double here")
    half = real(1) / 2
    x, turn = words
    radius = np.sqrt(
        -2
        * np.where(x >= 2**31, np.log1p(-((~x).astype(real) + half) / 2**32), np.log((x.astype(real) + half) / 2**32))
    )
    quarter = (turn.astype(np.int64) + 2**29) >> 30
    angle = (turn.astype(np.int64) - (quarter << 30) + half) * (np.arccos(real(-1)) / 2**31)
    cosine, sine = np.cos(angle), np.sin(angle)
    first = np.choose(quarter % 4, [cosine, -sine, -cosine, sine])
    second = np.choose(quarter % 4, [sine, cosine, -sine, -cosine])
    return np.stack([radius * first, radius * second])


def relative_error(z: np.ndarray[Any, Any], words: np.ndarray[Any, Any]) -> float:
    exact = exact_box_muller(words)
    return float(np.max(np.abs(z - exact) / np.abs(exact)))


@pytest.mark.parametrize(
    ("dtype", "absolute", "relative"), [(torch.float32, 5.3e-7, 3.5e-7), (torch.float64, 1.04e-15, 5e-16)]
)
def test_box_muller_is_accurate_to_the_last_digits(dtype: torch.dtype, absolute: float, relative: float) -> None:
    words = random_words(2**20)
    z = reference_box_muller(words, dtype)
    assert np.max(np.abs(z - exact_box_muller(words))) <= absolute
    assert relative_error(z, words) <= relative
    # The last digit alone would break the bound: the check can see what it claims.
    assert relative_error(z * (1 + 3 * np.finfo(z.dtype).eps), words) > relative
    tail = random_words(2**18)
    tail[0] %= 1000
    for edge in (tail, tail ^ np.array([[0xFFFFFFFF], [0]], np.uint32), extreme_words()):
        assert relative_error(reference_box_muller(edge, dtype), edge) <= relative


@pytest.mark.parametrize("dtype", REALS)
def test_extreme_words_give_finite_normals(dtype: torch.dtype) -> None:
    z = reference_box_muller(extreme_words(), dtype)
    assert np.isfinite(z).all()
    assert (z != 0).all()
    assert 6.76 < np.abs(z).max() < 6.77


@pytest.mark.parametrize("dtype", REALS)
def test_every_backend_maps_the_same_words_to_the_same_normals(dtype: torch.dtype) -> None:
    words = np.concatenate([random_words(2**18), extreme_words()], axis=1)
    reference = reference_box_muller(words, dtype)
    tensors = torch.from_numpy(words.astype(np.int64))
    assert np.array_equal(np.stack(_noise_torch.box_muller(tensors[0], tensors[1], dtype)), reference)
    for name in each_instruction_set():
        assert np.array_equal(compiled_box_muller(words, dtype), reference), name


def test_a_value_is_the_documented_function_of_its_key() -> None:
    seed, step, replica, channel, particle = 2**40 + 17, 2**31 + 5, 3, 2, 1000
    tile, k, j = particle // 256, particle % 256 // 64, particle % 64
    counter = (64 * tile + j, Stream.COMMON << 16 | channel, step, replica)
    words = _noise_numpy.philox(tuple(np.array([w], np.uint64) for w in counter), seed)  # type: ignore[arg-type]
    x, turn = (w.astype(np.uint32) for w in (words[:2] if k < 2 else words[2:]))
    expected = _noise_numpy.box_muller(x, turn, np.float64)[k % 2].item()
    z = Noise(seed).normals(step, (4, 1001, 3), stream=Stream.COMMON, dtype=torch.float64)
    assert z[replica, particle, channel].item() == expected


def test_float32_follows_float64() -> None:
    single = Noise(3).normals(0, (1, 10**6, 1)).double()
    double = Noise(3).normals(0, (1, 10**6, 1), dtype=torch.float64)
    assert (single - double).abs().max() <= 5.4e-7
    assert ((single - double).abs() / double.abs()).max() <= 3.5e-7


# --- Invariance -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", REALS)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 6, 7, 8, 11])
def test_prefixes_do_not_depend_on_particles_replicas_or_channels(dtype: torch.dtype, m: int) -> None:
    source = Noise(11, substeps=2)
    full = source.increment(4, (3, 1500, m), dtype=dtype)
    for n in (1, 15, 16, 17, 63, 64, 65, 100, 255, 256, 257, 1000):
        assert torch.equal(source.increment(4, (3, n, m), dtype=dtype), full[:, :n])
    assert torch.equal(source.increment(4, (2, 1500, m), dtype=dtype), full[:2])
    for channels in range(1, m):
        assert torch.equal(source.increment(4, (3, 1500, channels), dtype=dtype), full[:, :, :channels])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    cuts=st.lists(st.integers(0, 1200), min_size=1, max_size=6),
    start=st.sampled_from([0, 1, 63, 200, 256, 2**33 + 77]),
    replica=st.sampled_from([0, 5, 2**32 - 5]),
    m=st.integers(1, 10),
    k=st.integers(1, 3),
    dtype=st.sampled_from(REALS),
)
def test_any_chunking_gives_the_same_values(
    cuts: list[int], start: int, replica: int, m: int, k: int, dtype: torch.dtype
) -> None:
    source = Noise(5, substeps=k)
    edges = [0, *sorted(cuts), 1200]

    def chunks_agree(draw: Callable[..., Tensor]) -> bool:
        whole = draw(shape=(2, 1200, m), first_particle=start, first_replica=replica)
        chunks = [
            torch.cat([draw(shape=(1, b - a, m), first_particle=start + a, first_replica=replica + r) for r in (0, 1)])
            for a, b in pairwise(edges)
        ]
        return torch.equal(torch.cat(chunks, dim=1), whole)

    assert chunks_agree(lambda shape, **window: source.increment(9, shape, dtype=dtype, **window))
    assert chunks_agree(lambda shape, **window: source.area(9, shape, dtype=dtype, **window)[1])
    assert chunks_agree(lambda shape, **window: source.uniforms(9, shape, dtype=dtype, **window))
    assert chunks_agree(lambda shape, **window: source.integers(9, shape, 1000, **window))


@needs_compiled
@pytest.mark.parametrize("dtype", REALS)
@pytest.mark.parametrize("shape", [(1, 100_001, 1), (64, 1000, 1), (64, 1000, 3), (3, 5000, 9)])
def test_one_thread_and_two_give_the_same_bits(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    def everything() -> list[Tensor]:
        source = Noise(1)
        x = source.normals(0, shape, stream=Stream.INITIAL, dtype=dtype)
        source.euler_(x, x.clone(), 0.01, 0.3, 7)
        return [source.normals(2, shape, dtype=dtype), source.uniforms(2, shape, dtype=dtype), x]

    alone = everything()
    torch.set_num_threads(2)
    for one, two in zip(alone, everything(), strict=True):
        assert torch.equal(one, two)


def test_a_step_does_not_depend_on_the_steps_before() -> None:
    straight = [Noise(8).increment(step, (1, 50, 1)) for step in range(6)]
    for step in (5, 3, 0, 4):
        assert torch.equal(Noise(8).increment(step, (1, 50, 1)), straight[step])


def test_out_is_filled_and_returned() -> None:
    out = torch.full((2, 300, 2), math.nan)
    assert Noise(1).normals(0, (2, 300, 2), out=out) is out
    assert torch.equal(out, Noise(1).normals(0, (2, 300, 2)))


@pytest.mark.parametrize("shape", [(0, 5, 1), (2, 0, 1), (2, 5, 0)])
def test_nothing_is_asked_for_and_nothing_comes(shape: tuple[int, int, int]) -> None:
    assert Noise(1).normals(0, shape).shape == shape
    assert Noise(1).integers(0, shape, 3).shape == shape
    assert Noise(1).area(0, shape)[1].shape == shape
    Noise(1).euler_(torch.zeros(shape), torch.zeros(shape), 0.1, 1.0, 0)


def test_all_bits_of_the_seed_count() -> None:
    # torch.Generator on the CPU keeps the low 32 bits of its seed: 1 and 1 + 2**32 are one stream there.
    first = Noise(1).normals(0, (1, 64, 1))
    for seed in (0, 2, 1 + 2**32, 1 + 2**63, 2**64 - 1):
        assert not (Noise(seed).normals(0, (1, 64, 1)) == first).any()


def test_streams_steps_replicas_and_channels_share_no_value() -> None:
    values = [Noise(1).normals(0, (2, 64, 2), stream=s, dtype=torch.float64).flatten() for s in Stream]
    values += [Noise(1).normals(s, (1, 64, 1), dtype=torch.float64).flatten() for s in (1, 2, 2**32 - 2)]
    z = torch.cat(values)
    assert len(set(z.tolist())) == len(z)


# --- Backends ---------------------------------------------------------------------------------------------------------

WINDOWS = [
    ((1, 5000, 1), 0, 0),
    ((3, 300, 2), 17, 5),
    ((9, 1, 3), 0, 0),
    ((2, 7, 9), 250, 2**31),
    ((1, 90, 3), 2**33, 0),
    ((2, 600, 4), 1, 0),
    ((1, 300, 7), 100, 0),
    ((1, 300, 17), 0, 0),
]


def portable_modules() -> list[Any]:
    return [_noise_numpy, _noise_torch]


@pytest.mark.parametrize("dtype", REALS)
@pytest.mark.parametrize(("shape", "first_particle", "first_replica"), WINDOWS)
@pytest.mark.parametrize("k", [1, 3])
def test_backends_give_the_same_normals(
    dtype: torch.dtype, shape: tuple[int, int, int], first_particle: int, first_replica: int, k: int
) -> None:
    window = {"first_particle": first_particle, "first_replica": first_replica}
    seed, step = 2**63 + 2**31 + 5, 9
    ours = Noise(seed, k).increment(step, shape, dtype=dtype, **window)  # type: ignore[arg-type]
    for module in portable_modules():
        out = torch.empty(shape, dtype=dtype)
        module.normals(out, seed, 1, step * k, k, first_replica, first_particle, 1 / math.sqrt(k))
        assert torch.equal(out, ours), module.__name__
    for name in each_instruction_set():
        again = Noise(seed, k).increment(step, shape, dtype=dtype, **window)  # type: ignore[arg-type]
        assert torch.equal(again, ours), name


@pytest.mark.parametrize(("shape", "first_particle", "first_replica"), WINDOWS)
@pytest.mark.parametrize("high", [0, 1, 7, 2**31])
def test_backends_give_the_same_uniforms_and_integers(
    shape: tuple[int, int, int], first_particle: int, first_replica: int, high: int
) -> None:
    window = {"first_particle": first_particle, "first_replica": first_replica, "stream": Stream.DATA}
    for dtype in [torch.int64] if high else REALS:
        for name in ["", *each_instruction_set()]:
            if high:
                ours = Noise(5).integers(9, shape, high, **window)  # type: ignore[arg-type]
            else:
                ours = Noise(5).uniforms(9, shape, dtype=dtype, **window)  # type: ignore[arg-type]
            for module in portable_modules():
                out = torch.empty(shape, dtype=dtype)
                module.draws(out, 5, Stream.DATA, 9, first_replica, first_particle, high)
                assert torch.equal(out, ours), (name, module.__name__)


@pytest.mark.parametrize("dtype", REALS)
@pytest.mark.parametrize("shape", [(1, 5000, 1), (3, 300, 2), (2, 100, 8), (2, 65, 11), (1, 300, 16)])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("k", [1, 3])
def test_euler_is_its_formula_on_every_backend(
    dtype: torch.dtype, shape: tuple[int, int, int], diagonal: bool, k: int
) -> None:
    source = Noise(6, substeps=k)
    h, sigma, step = 0.013, 0.7, 4
    x = source.normals(0, shape, stream=Stream.INITIAL, dtype=dtype)
    drift = source.normals(1, shape, stream=Stream.INITIAL, dtype=dtype)
    diffusion = source.normals(2, shape, stream=Stream.INITIAL, dtype=dtype) if diagonal else sigma

    z = source.normals(step * k, shape, dtype=dtype)
    for j in range(1, k):
        z = z + source.normals(step * k + j, shape, dtype=dtype)
    root = math.sqrt(h / k)
    c = torch.tensor(root, dtype=dtype) * diffusion if diagonal else torch.tensor(root * sigma, dtype=dtype)
    expected = x + (torch.tensor(h, dtype=dtype) * drift + c * z)

    for name in ["", *each_instruction_set()]:
        moved = x.clone()
        source.euler_(moved, drift, h, diffusion, step)
        assert torch.equal(moved, expected), name
    field = diffusion if isinstance(diffusion, Tensor) else None
    for module in portable_modules():
        moved = x.clone()
        module.euler(moved, drift, field, 6, 1, step * k, k, h, root if diagonal else root * sigma)
        assert torch.equal(moved, expected), module.__name__


def test_euler_accepts_the_state_itself_as_drift_and_diffusion() -> None:
    x = Noise(1).normals(0, (2, 1000, 2), stream=Stream.INITIAL)
    apart = x.clone()
    Noise(1).euler_(apart, x.clone(), 0.1, x.clone(), 0)
    Noise(1).euler_(x, x, 0.1, x, 0)
    assert torch.equal(x, apart)


def test_euler_keeps_the_prefix_of_particles_and_replicas() -> None:
    def step(shape: tuple[int, int, int]) -> Tensor:
        x = Noise(1).normals(0, shape, stream=Stream.INITIAL)
        Noise(1).euler_(x, -x, 0.1, 0.5, 3)
        return x

    assert torch.equal(step((2, 333, 3)), step((5, 1000, 3))[:2, :333])


# --- Float32 normals in float64 ---------------------------------------------------------------------------------------

MIXED = {"dtype": torch.float64, "first_particle": 250, "first_replica": 2**31}


def assert_mixed_normals(shape: tuple[int, int, int], k: int, source: Noise) -> None:
    """The sum, in float64, of the widened float32 normals of the fine steps."""
    place = {name: value for name, value in MIXED.items() if name != "dtype"}
    z = torch.zeros(shape, dtype=torch.float64)
    for j in range(k):
        z = z + Noise(3).normals(5 * k + j, shape, dtype=torch.float32, **place).double()  # type: ignore[arg-type]
    expected = z if k == 1 else z * (1 / math.sqrt(k))
    for name in ["", *each_instruction_set()]:
        assert torch.equal(source.increment(5, shape, **MIXED), expected), name  # type: ignore[arg-type]
    for module in portable_modules():
        out = torch.empty(shape, dtype=torch.float64)
        module.normals(out, 3, 1, 5 * k, k, 2**31, 250, 1 / math.sqrt(k), source.precision is torch.float32)
        assert torch.equal(out, expected), module.__name__


@pytest.mark.parametrize("shape", [(1, 700, 1), (3, 1, 2), (2, 50, 9)])
@pytest.mark.parametrize("k", [1, 3])
def test_mixed_normals_are_those_of_float32_widened(shape: tuple[int, int, int], k: int) -> None:
    assert_mixed_normals(shape, k, Noise(3, substeps=k, precision=torch.float32))
    with pytest.raises(AssertionError):
        assert_mixed_normals(shape, k, Noise(3, substeps=k))


@pytest.mark.parametrize("k", [1, 3])
def test_mixed_steps_move_in_float64(k: int) -> None:
    source, shape = Noise(6, substeps=k, precision=torch.float32), (2, 300, 3)
    x, drift, field = (Noise(6).normals(i, shape, stream=Stream.INITIAL, dtype=torch.float64) for i in range(3))
    z = sum(source.normals(4 * k + j, shape, dtype=torch.float64) for j in range(k))
    for diffusion, c in ((0.7, math.sqrt(0.01 / k) * 0.7), (field, math.sqrt(0.01 / k) * field)):
        expected = x + (0.01 * drift + c * z)
        moved, chained = x.clone(), x.clone()
        source.euler_(moved, drift, 0.01, diffusion, 4)
        assert torch.equal(moved, expected)
        for module in portable_modules():
            tensor = diffusion if isinstance(diffusion, Tensor) else None
            scale = math.sqrt(0.01 / k) * (1.0 if tensor is not None else 0.7)
            moved = x.clone()
            module.euler(moved, drift, tensor, 6, 1, 4 * k, k, 0.01, scale, True)
            assert torch.equal(moved, expected), module.__name__
        Noise(6, substeps=k).euler_(chained, drift, 0.01, diffusion, 4)
        assert 0 < float((chained - expected).abs().max()) < 1e-6


def test_mixed_kinetic_steps_take_the_increment() -> None:
    source = Noise(6, substeps=2, precision=torch.float32)
    state, force = (Noise(6).normals(0, (2, 300, n), dtype=torch.float64) for n in (4, 2))
    positions, w = torch.empty_like(force), source.increment(3, force.shape, dtype=torch.float64)
    velocities = state[..., 2:] + 0.05 * force
    middle = state[..., :2] + 0.05 * velocities
    velocities = 0.9 * velocities + 0.3 * w
    middle = middle + 0.05 * velocities
    source.kinetic_(state, force, positions, 0.05, 0.9, 0.3, 3)
    assert torch.equal(state, torch.cat([middle, velocities], -1))
    assert torch.equal(positions, middle)


def test_mixed_noise_of_antithetic_pairs_and_of_areas() -> None:
    mixed = Noise(2, substeps=2, precision=torch.float32)
    pairs = Noise(2, substeps=2, antithetic=True, precision=torch.float32)
    z = mixed.increment(1, (2, 40, 3), dtype=torch.float64)
    assert torch.equal(pairs.increment(1, (4, 40, 3), dtype=torch.float64), torch.stack([z, -z], 1).flatten(0, 1))
    w, area = mixed.area(1, (2, 40, 3), dtype=torch.float64)
    assert torch.equal(w, z)
    own = [mixed.normals(2 + j, (2, 40, 3), stream=Stream.AREA, dtype=torch.float64) for j in range(2)]
    dw = [mixed.normals(2 + j, (2, 40, 3), dtype=torch.float64) for j in range(2)]
    u = [0.5 * dw[j] + own[j] / math.sqrt(12) for j in range(2)]
    assert torch.allclose(area, (u[0] + dw[0] + u[1]) / 2**1.5, rtol=0, atol=1e-15)


def test_precision_is_recorded_only_where_set_and_leaves_words_alone() -> None:
    assert "precision" not in Noise(5).identity()
    assert Noise(5, precision=torch.float32).identity()["precision"] == "float32"
    mixed, shape = Noise(5, precision=torch.float32), (1, 300, 2)
    uniforms = [source.uniforms(0, shape, dtype=torch.float64) for source in (mixed, Noise(5))]
    assert torch.equal(*uniforms)
    assert torch.equal(mixed.normals(0, shape), Noise(5).normals(0, shape))
    exact = Noise(5, precision=torch.float64)
    assert torch.equal(exact.normals(0, shape, dtype=torch.float64), Noise(5).normals(0, shape, dtype=torch.float64))
    with pytest.raises(ValueError, match="float32 values are asked for"):
        exact.normals(0, shape)
    with pytest.raises(ValueError, match=r"expected torch\.float32, torch\.float64 or None"):
        Noise(5, precision=torch.float16)


def test_where_a_compiler_exists_the_backend_is_compiled() -> None:
    # The extension is optional: without this test a failed build would only be slow.
    if os.environ.get("MFSDE_NOISE"):
        pytest.skip("MFSDE_NOISE chooses the backend")
    if not (shutil.which("cc") or shutil.which("gcc")):
        pytest.skip("no C compiler on this machine")
    assert backend() == "c"


SUMMARY = """
import hashlib, torch
from mfsde.noise import Noise, Stream, backend
torch.set_num_threads(1)
digest = hashlib.sha256()
for dtype in (torch.float32, torch.float64):
    for shape in ((1, 3000, 1), (3, 100, 5)):
        source = Noise(2**50 + 1, substeps=2)
        x = source.normals(0, shape, stream=Stream.INITIAL, dtype=dtype)
        source.euler_(x, -x, 0.1, 0.5, 3)
        values = [x, *source.area(1, shape, dtype=dtype), source.uniforms(2, shape, dtype=dtype)]
        for tensor in [*values, source.integers(3, shape, 60000)]:
            digest.update(tensor.numpy().tobytes())
print(backend(), digest.hexdigest())
"""


def run_python(script: str, **environment: str) -> list[str]:
    paths = os.pathsep.join([str(ROOT), *sys.path])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_environment_chooses_numpy_and_the_bits_stay() -> None:
    name, digest = run_python(SUMMARY, MFSDE_NOISE="numpy")
    assert name == "numpy"
    here: list[str] = []
    exec(SUMMARY, {"print": lambda *values: here.extend(values)})
    assert here[1] == digest
    script = "import mfsde.noise"
    with pytest.raises(AssertionError, match="MFSDE_NOISE is 'cupy'; expected 'numpy'"):
        run_python(script, MFSDE_NOISE="cupy")


INTERPRETED = """
import torch
from mfsde import _noise_numpy, _noise_triton
for dtype in (torch.float32, torch.float64):
    for shape, particle, replica, k in (((1, 900, 1), 0, 0, 1), ((2, 70, 2), 2**33 + 17, 2**31, 2)):
        results = []
        single = dtype == torch.float64 and k == 2
        for module in (_noise_numpy, _noise_triton):
            z, u, x = (torch.zeros(shape, dtype=dtype) for _ in range(3))
            n = torch.zeros(shape, dtype=torch.int64)
            module.normals(z, 2**63 + 2**31 + 5, 1, 2**32 - 9, k, replica, particle, 0.3, single)
            module.draws(u, 5, 6, 9, replica, particle, 0)
            module.draws(n, 5, 6, 9, replica, particle, 2**31)
            module.euler(x, z, None if k == 1 else z, 5, 1, 4, k, 0.013, 0.77, single)
            results.append((z, u, n, x))
        assert all(torch.equal(a, b) for a, b in zip(*results))
print("equal")
"""


def test_triton_interpreted_gives_the_same_bits() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: its kernels are untested here")
    assert run_python(INTERPRETED, TRITON_INTERPRET="1") == ["equal"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the bits of the device are untested here")
@pytest.mark.parametrize("dtype", REALS)
def test_cuda_gives_the_same_bits(dtype: torch.dtype) -> None:
    source = Noise(2**63 + 5, substeps=2)
    for shape in ((1, 100_000, 1), (3, 1000, 5)):
        x = source.normals(3, shape, dtype=dtype)
        there = source.normals(3, shape, dtype=dtype, device="cuda")
        assert torch.equal(there.cpu(), x)
        for ours, theirs in zip(
            source.area(3, shape, dtype=dtype), source.area(3, shape, dtype=dtype, device="cuda"), strict=True
        ):
            assert torch.equal(theirs.cpu(), ours)
        assert torch.equal(
            source.uniforms(3, shape, dtype=dtype, device="cuda").cpu(), source.uniforms(3, shape, dtype=dtype)
        )
        assert torch.equal(source.integers(3, shape, 9, device="cuda").cpu(), source.integers(3, shape, 9))
        for diffusion in (0.3, x.clone()):
            here, away = x.clone(), there.clone()
            source.euler_(here, x, 0.01, diffusion, 2)
            source.euler_(away, there, 0.01, diffusion.cuda() if isinstance(diffusion, Tensor) else diffusion, 2)
            assert torch.equal(away.cpu(), here)
        out = torch.empty(shape, dtype=dtype, device="cuda")
        _noise_torch.normals(out, source.seed, 1, 6, 2, 0, 0, 1 / math.sqrt(2))
        assert torch.equal(out.cpu(), source.increment(3, shape, dtype=dtype))


@needs_compiled
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_works() -> None:
    # A process forked after an OpenMP region waits for ever for threads that the fork did not copy.
    torch.set_num_threads(2)
    shape = (1, 200_000, 1)
    expected = Noise(1).normals(0, shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        same = np.array_equal(Noise(1).normals(0, shape).numpy(), expected.numpy())
        os._exit(0 if same else 1)
    deadline = time.monotonic() + 20
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the forked child hangs")
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(status) == 0


# --- Substeps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", REALS)
@pytest.mark.parametrize("k", [1, 2, 7])
def test_an_increment_is_the_sum_of_the_fine_ones(dtype: torch.dtype, k: int) -> None:
    shape = (2, 300, 2)
    fine, coarse = Noise(4), Noise(4, substeps=k)
    total = fine.increment(3 * k, shape, dtype=dtype)
    for j in range(1, k):
        total = total + fine.increment(3 * k + j, shape, dtype=dtype)
    expected = total * torch.tensor(1 / math.sqrt(k), dtype=dtype) if k > 1 else total
    assert torch.equal(coarse.increment(3, shape, dtype=dtype), expected)
    assert torch.equal(coarse.area(3, shape, dtype=dtype)[0], expected)


@pytest.mark.parametrize("stream", [Stream.IDIOSYNCRATIC, Stream.COMMON])
@pytest.mark.parametrize(("k", "inner"), [(2, 1), (6, 1), (6, 3)])
def test_an_area_is_composed_of_the_finer_ones(stream: Stream, k: int, inner: int) -> None:
    # ∫₀¹ W ds over n = k / inner shorter intervals of length 1/n, each with W - W_start scaled by n^(-½).
    shape = (2, 100, 2)
    n = k // inner
    middle = Noise(4, substeps=inner)
    start, area = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    for j in range(n):
        w, u = middle.area(5 * n + j, shape, stream=stream, dtype=torch.float64)
        area = area + (start + u / math.sqrt(n)) / n
        start = start + w / math.sqrt(n)
    w, u = Noise(4, substeps=k).area(5, shape, stream=stream, dtype=torch.float64)
    torch.testing.assert_close(w, start, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(u, area, rtol=1e-13, atol=1e-13)


def test_the_area_of_a_fine_step_is_its_formula() -> None:
    shape = (1, 300, 1)
    for stream, bridge in ((Stream.IDIOSYNCRATIC, Stream.AREA), (Stream.COMMON, Stream.COMMON_AREA)):
        w, u = Noise(4).area(5, shape, stream=stream, dtype=torch.float64)
        xi = Noise(4).normals(5, shape, stream=bridge, dtype=torch.float64)
        assert torch.equal(w, Noise(4).normals(5, shape, stream=stream, dtype=torch.float64))
        torch.testing.assert_close(u, w / 2 + xi / math.sqrt(12), rtol=1e-14, atol=1e-15)


# --- The law ----------------------------------------------------------------------------------------------------------


def faithful(z: Tensor) -> Tensor:
    return z


def too_wide(z: Tensor) -> Tensor:
    return z * 1.001


def skewed(z: Tensor) -> Tensor:
    return z + 0.001 * (z * z - 1)


def heavy(z: Tensor) -> Tensor:
    return z + 0.0005 * (z**3 - 3 * z)


def moment_errors(fault: Callable[[Tensor], Tensor], millions: int) -> float:
    """Largest deviation of the first four moments of `millions` of float32 normals, in standard errors."""
    totals = torch.zeros(4, dtype=torch.float64)
    for step in range(millions):
        z = fault(Noise(0).normals(step, (1, 10**6, 1)).double().flatten())
        square = z * z
        totals += torch.stack([z.sum(), square.sum(), torch.dot(square, z), torch.dot(square, square)])
    truth = torch.tensor([0.0, 1.0, 0.0, 3.0], dtype=torch.float64)
    variance = torch.tensor([1.0, 2.0, 15.0, 96.0], dtype=torch.float64)  # E z^2p - (E z^p)²
    n = millions * 1e6
    return float(((totals / n - truth).abs() / (variance / n).sqrt()).max())


def test_moments() -> None:
    # 1e8 normals where they are fast; the tolerance scales with the number.
    assert moment_errors(faithful, 100 if COMPILED else 10) < FEW_ERRORS


@pytest.mark.parametrize("fault", [too_wide, skewed, heavy])
def test_moments_reject_a_fault(fault: Callable[[Tensor], Tensor]) -> None:
    assert moment_errors(fault, 20) > FEW_ERRORS


def kolmogorov_smirnov(z: Tensor) -> float:
    """√n sup |F_n - Φ|, whose limit law exceeds 2.2 with probability 1.2e-4 (2 exp(-2·2.2²))."""
    cdf = ndtr(np.sort(z.numpy().ravel()).astype(np.float64))
    n = len(cdf)
    grid = np.arange(n + 1) / n
    return float(math.sqrt(n) * max(np.max(grid[1:] - cdf), np.max(cdf - grid[:-1])))


def test_the_law_is_normal_overall_and_for_each_word() -> None:
    z = Noise(0).normals(0, (1, 39_063 * 256, 1), stream=Stream.INITIAL)  # 1e7
    assert kolmogorov_smirnov(z) < 2.2
    for lane in z.view(-1, 4, 64).unbind(1):
        assert kolmogorov_smirnov(lane) < 2.2
    assert kolmogorov_smirnov(z * 1.003) > 2.2
    assert kolmogorov_smirnov(z.abs()) > 2.2


def neighbours() -> Sequence[tuple[str, Callable[[], Tensor]]]:
    """What could be correlated with the values of Noise(0) at step 8, replica 0, channel 0, if the key were weak."""
    n = 10**6

    def draw(seed: int = 0, step: int = 8, stream: Stream = Stream.IDIOSYNCRATIC, r: int = 0, c: int = 0) -> Tensor:
        z = Noise(seed).normals(step, (1, n, c + 1), stream=stream, first_replica=r, dtype=torch.float64)
        return z[0, :, c].contiguous()

    def shifted(lag: int) -> Tensor:
        return Noise(0).normals(8, (1, n, 1), first_particle=lag, dtype=torch.float64).flatten()

    lags = (1, 2, 63, 64, 65, 127, 128, 192, 255, 256, 512, 2**20)
    cases = [(f"lag {lag}", partial(shifted, lag)) for lag in lags]
    cases += [(f"step {step}", partial(draw, step=step)) for step in (7, 9, 10, 0, 8 + 2**16, 8 + 2**31)]
    cases += [(f"replica {r}", partial(draw, r=r)) for r in (1, 2, 8, 2**16, 2**31)]
    cases += [(f"channel {c}", partial(draw, c=c)) for c in (1, 2, 3, 4)]
    cases += [(stream.name, partial(draw, stream=stream)) for stream in Stream if stream != Stream.IDIOSYNCRATIC]
    cases += [(f"seed bit {b}", partial(draw, 1 << b)) for b in (*range(0, 32, 4), 31, 32, 33, 40, 48, 56, 63)]
    return cases


def correlation_error(a: Tensor, b: Tensor) -> float:
    """Largest of |corr(a, b)| and |corr(a² - 1, b² - 1)| in standard errors, for normals of variance 1."""
    n = len(a)
    linear = torch.dot(a, b).abs() / math.sqrt(n)
    squares = torch.dot(a * a - 1, b * b - 1).abs() / (2 * math.sqrt(n))
    return float(torch.maximum(linear, squares))


def test_50_correlations_vanish() -> None:
    base = Noise(0).normals(8, (1, 10**6, 1), dtype=torch.float64).flatten()
    cases = neighbours()
    assert len(cases) == 50
    errors = {name: correlation_error(base, draw()) for name, draw in cases}
    assert max(errors.values()) < FEW_ERRORS, errors
    independent = Noise(0).normals(9, (1, 10**6, 1), dtype=torch.float64).flatten()
    assert correlation_error(base, independent + 0.01 * base) > FEW_ERRORS
    assert correlation_error(base, independent * (1 + 0.01 * base**2)) > FEW_ERRORS


def area_error(w: Tensor, u: Tensor) -> float:
    """Largest deviation from E W = E U = 0, E W² = 1, E U² = 1/3, E WU = 1/2, in standard errors."""
    n = w.numel()
    deviations = [
        (w.mean(), 1.0),
        (u.mean(), 1 / 3),
        ((w * w).mean() - 1, 2.0),
        ((u * u).mean() - 1 / 3, 2 / 9),
        ((w * u).mean() - 1 / 2, 1 / 3 + 1 / 4),  # E W²U² - (E WU)² = E W² E U² + (E WU)²
    ]
    return max(abs(float(d)) / math.sqrt(variance / n) for d, variance in deviations)


@pytest.mark.parametrize("k", [1, 4])
def test_increment_and_area_have_their_covariance(k: int) -> None:
    w, u = Noise(0, substeps=k).area(0, (1, 10**6, 1), dtype=torch.float64)
    assert area_error(w, u) < FEW_ERRORS
    assert area_error(w, w / 2) > FEW_ERRORS  # no bridge
    assert area_error(w, u - w / 2) > FEW_ERRORS  # the centred area
    assert area_error(w * 1.01, u) > FEW_ERRORS


def uniform_error(u: Tensor) -> float:
    """Largest deviation of mean, variance and correlation of neighbours, in standard errors."""
    u = u.double().flatten() - 0.5
    n = len(u)
    neighbour = torch.dot(u[1:], u[:-1]) / n
    deviations = [(u.mean(), 1 / 12), ((u * u).mean() - 1 / 12, 1 / 180), (neighbour, 1 / 144)]
    return max(abs(float(d)) / math.sqrt(variance / n) for d, variance in deviations)


@pytest.mark.parametrize("dtype", REALS)
def test_uniforms(dtype: torch.dtype) -> None:
    u = Noise(0).uniforms(0, (1, 10**6, 1), dtype=dtype)
    assert uniform_error(u) < FEW_ERRORS
    assert uniform_error(u**1.01) > FEW_ERRORS
    assert uniform_error((u + u.roll(1, 1)) % 1 * 0.01 + u * 0.99) > FEW_ERRORS
    single = Noise(0).uniforms(0, (1, 10**6, 1)).double()
    assert (single - Noise(0).uniforms(0, (1, 10**6, 1), dtype=torch.float64)).abs().max() <= 2.0**-24


def test_a_uniform_that_rounds_to_one_stays_below() -> None:
    # Noise(20), step 41, particle 291015: the word is 2³² - 8, so that u = 1 - 7.5/2³² rounds to 1 in float32.
    place = {"step": 41, "shape": (1, 1, 1), "first_particle": 291015}
    exact = Noise(20).uniforms(**place, dtype=torch.float64).item()  # type: ignore[arg-type]
    assert exact == 1 - 7.5 / 2**32
    assert np.float32(exact) == 1
    for _ in ["", *each_instruction_set()]:
        assert Noise(20).uniforms(**place).item() == 1 - 2.0**-24  # type: ignore[arg-type]
    for module in portable_modules():
        out = torch.empty(1, 1, 1)
        module.draws(out, 20, Stream.JUMP, 41, 0, 291015, 0)
        assert out.item() == 1 - 2.0**-24


@pytest.mark.parametrize("high", [1, 2, 7, 1000, 2**31])
def test_integers_are_the_words_scaled(high: int) -> None:
    shape = (1, 10**5, 1)
    x = Noise(0).uniforms(0, shape, stream=Stream.DATA, dtype=torch.float64) * 2**32 - 0.5
    n = Noise(0).integers(0, shape, high)
    assert n.dtype is torch.int64
    assert torch.equal(n, x.long() * high >> 32)
    assert n.min() >= 0
    assert n.max() < high


def chi_square_error(counts: Tensor) -> float:
    """χ² of equal cells: its excess over its mean, in standard deviations."""
    expected = counts.sum() / len(counts)
    freedom = len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


def test_integers_fill_their_cells_evenly() -> None:
    n = Noise(0).integers(0, (1, 10**6, 1), 1000).flatten()
    assert chi_square_error(n.bincount(minlength=1000).double()) < FEW_ERRORS
    biased = torch.where(n % 2 == 0, n, Noise(0).integers(1, (1, 10**6, 1), 1000).flatten() // 2 * 2 + n % 2)
    biased = torch.where(torch.arange(10**6) % 50 == 0, torch.zeros_like(biased), biased)
    assert chi_square_error(biased.bincount(minlength=1000).double()) > FEW_ERRORS


# --- Refusals ---------------------------------------------------------------------------------------------------------


def test_a_noise_is_a_value() -> None:
    assert Noise(3) == Noise(3)
    assert Noise(3) != Noise(3, substeps=2)
    assert hash(Noise(3)) == hash(Noise(3))
    assert Noise(np.int64(3)).identity() == {  # type: ignore[arg-type]
        "scheme": "philox4x32-10/box-muller",
        "version": 1,
        "seed": 3,
        "substeps": 1,
    }
    assert type(Noise(np.int64(3)).seed) is int  # type: ignore[arg-type]


def test_version_1_is_frozen() -> None:
    # A change of these bits is another scheme: raise VERSION, for stored runs name it.
    assert noise.VERSION == 1
    values = torch.cat([Noise(1).normals(2, (2, 300, 2)).flatten(), Noise(1).uniforms(2, (2, 300, 2)).flatten()])
    assert (
        hashlib.sha256(values.numpy().tobytes()).hexdigest()
        == "352fc8a0fe75e66dd1068e0746bd6ea7a8e2f6805d569fc418418179f4f60313"
    )


@pytest.mark.parametrize("seed", [True, 1.0, "1", None])
def test_a_seed_is_an_integer(seed: Any) -> None:
    with pytest.raises(TypeError, match=r"seed is .*; expected an integer"):
        Noise(seed)


SHAPE = (1, 4, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Noise(-1), "seed is -1; expected 0 <= seed"),
        (lambda: Noise(2**64), "expected 0 <= seed < 2\\*\\*64"),
        (lambda: Noise(1, substeps=0), "substeps is 0; expected at least 1"),
        (lambda: Noise(1).normals(-1, SHAPE), "step is -1"),
        (lambda: Noise(1).normals(2**32, SHAPE), "expected 0 <= fine step < 2\\*\\*32"),
        (lambda: Noise(1, substeps=4).increment(2**30, SHAPE), "step is 1073741824 with 4 fine steps each"),
        (lambda: Noise(1, 4).euler_(torch.zeros(SHAPE), torch.zeros(SHAPE), 0.1, 1.0, 2**30), "fine steps each"),
        (lambda: Noise(1).normals(0, (4, 1)), "expected \\(replicas, particles, channels\\)"),  # type: ignore[arg-type]
        (lambda: Noise(1).normals(0, (1, -4, 1)), "particles 0 to -4: expected non-negative"),
        (lambda: Noise(1).normals(0, (1, 4, 2**16)), "channels up to 65536: expected fewer than 2\\*\\*16"),
        (lambda: Noise(1).normals(0, SHAPE, first_particle=2**34 - 4), "particles up to .* fewer than 2\\*\\*34"),
        (lambda: Noise(1).normals(0, SHAPE, first_replica=2**32 - 1), "replicas up to .* fewer than 2\\*\\*32"),
        (lambda: Noise(1).normals(0, SHAPE, dtype=torch.float16), "dtype is torch.float16; expected torch.float32"),
        (lambda: Noise(1).uniforms(0, SHAPE, dtype=torch.int64), "dtype is torch.int64"),
        (lambda: Noise(1).area(0, SHAPE, dtype=torch.int64), "dtype is torch.int64"),
        (lambda: Noise(1).area(0, SHAPE, stream=Stream.JUMP), "expected IDIOSYNCRATIC or COMMON"),
        (lambda: Noise(1).normals(0, SHAPE, stream=9), "9 is not a valid Stream"),  # type: ignore[arg-type]
        (lambda: Noise(1).normals(0, SHAPE, out=torch.zeros(1, 3, 1)), "out has shape \\(1, 3, 1\\)"),
        (lambda: Noise(1).normals(0, SHAPE, out=torch.zeros(SHAPE).double()), "dtype torch.float64; expected"),
        (lambda: Noise(1).normals(0, (2, 4, 1), out=torch.zeros(4, 2, 1).transpose(0, 1)), "out is not contiguous"),
        (lambda: Noise(1).normals(0, SHAPE, out=torch.zeros(SHAPE, requires_grad=True)), "out requires a gradient"),
        (lambda: Noise(1).normals(0, SHAPE, out=torch.zeros(SHAPE, device="meta")), "out is on meta; expected cpu"),
        (lambda: Noise(1).integers(0, SHAPE, 0), "high is 0; expected 1 <= high"),
        (lambda: Noise(1).integers(0, SHAPE, 2**31 + 1), "expected 1 <= high <= 2\\*\\*31"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("x", "drift", "diffusion", "message"),
    [
        (torch.zeros(4, 1), torch.zeros(4, 1), 1.0, "expected \\(R, N, d\\)"),
        (torch.zeros(SHAPE), torch.zeros(1, 1, 1), 1.0, "drift \\(1, 1, 1\\)"),
        (torch.zeros(SHAPE), torch.zeros(SHAPE), torch.ones(1), "diffusion \\(1,\\)"),
        (torch.zeros(SHAPE), torch.zeros(SHAPE).double(), 1.0, "drift is torch.float64"),
        (torch.zeros(SHAPE), torch.zeros(SHAPE, device="meta"), 1.0, "drift is torch.float32 on meta"),
        (torch.zeros(SHAPE).int(), torch.zeros(SHAPE).int(), 1.0, "dtype is torch.int32"),
        (torch.zeros(1, 4, 2), torch.zeros(1, 2, 4).mT, 1.0, "drift is not contiguous"),
        (torch.zeros(1, 2, 4).mT, torch.zeros(1, 4, 2), 1.0, "x or drift is not contiguous"),
        (torch.zeros(SHAPE, requires_grad=True), torch.zeros(SHAPE), 1.0, "requires a gradient"),
        (torch.zeros(SHAPE), torch.zeros(SHAPE, requires_grad=True), 1.0, "requires a gradient"),
    ],
)
def test_euler_refuses_what_does_not_match(x: Tensor, drift: Tensor, diffusion: float | Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Noise(1).euler_(x, drift, 0.1, diffusion, 0)


@pytest.mark.parametrize("step", [1.0, True, "0"])
def test_a_step_is_an_integer(step: Any) -> None:
    with pytest.raises(TypeError, match=r"step is .*; expected an integer"):
        Noise(1).normals(step, SHAPE)
