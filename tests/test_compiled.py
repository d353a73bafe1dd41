"""Compiled sums over pairs: against all pairs by torch, bit by bit over threads and rows, and what is refused."""

from __future__ import annotations

import dataclasses
import math
import os
import stat
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mfsde.pairwise import compiled, expression, native, trace
from mfsde.pairwise.blocked import Blocked
from mfsde.pairwise.compiled import Compiled
from mfsde.pairwise.kernel import Kernel, Pairs

FLOAT32, FLOAT64 = torch.float32, torch.float64
TOLERANCE = {FLOAT32: 3e-6, FLOAT64: 1e-13}
ONE, PARAMETER = torch.ones(1), torch.ones(1, requires_grad=True)
MATRIX = torch.tensor([[0.5, -0.2], [0.1, 0.9], [0.3, 0.3]], dtype=FLOAT64)


def gaussian(z: Tensor) -> Tensor:
    return torch.exp(-z.square().sum(-1) / 2)


def morse(z: Tensor) -> Tensor:
    return (1 - torch.exp(1 - (z.square().sum(-1) + 0.01).sqrt())) ** 2


def compact(z: Tensor) -> Tensor:
    return torch.relu(1 - z.square().sum(-1)) ** 2


def hat(z: Tensor) -> Tensor:
    r = z.norm(dim=-1)
    return torch.where(r < 1, 1 - r, torch.zeros_like(r))


def lennard_jones(z: Tensor) -> Tensor:
    s = z.square().sum(-1) + 0.0
    return s**-3 - s**-1.5


@dataclass(frozen=True)
class Anisotropic:
    """A scenario whose kernel reads a tensor field."""

    matrix: Tensor

    def kernel(self, z: Tensor) -> Tensor:
        return torch.tanh((z @ self.matrix.to(z.dtype).T).square().sum(-1))


KERNELS = {
    "gaussian": Kernel(gaussian),
    "gaussian force": Kernel(gaussian).slope,
    "morse force": Kernel(morse).slope,
    "cucker-smale": Kernel(lambda z: (1 + z.square().sum(-1, keepdim=True)) ** -0.4),
    "power": Kernel(lambda z: z.norm(dim=-1) ** 2.5),
    "power force": Kernel(lambda z: z.norm(dim=-1) ** 2.5).slope,
    "cosine": Kernel(lambda z: torch.cos(2 * z).sum(-1)),
    "tanh components": Kernel(torch.tanh),
    "lennard-jones force": Kernel(lennard_jones).slope,
    "polynomial": Kernel(lambda z: z[..., 0] ** 4 - 2 * z[..., 0] * z[..., 1] + 1),
    "compact": Kernel(compact),
    "hat force": Kernel(hat).slope,
    "central": Kernel(lambda z: z * torch.sigmoid(-z.norm(dim=-1, keepdim=True))),
    "matrix valued": Kernel(lambda z: z.unsqueeze(-1) * z.unsqueeze(-2) * gaussian(z)[..., None, None]),
    "field": Kernel(Anisotropic(MATRIX).kernel),
    "written gradient": Kernel(lambda z: Kernel(gaussian).slope(z) + torch.ones_like(z)),
}
every_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
# Each makes a library: those that single precision could tell from double.
of_single_precision = pytest.mark.parametrize(
    "name", ["gaussian", "morse force", "cucker-smale", "power force", "tanh components", "hat force"]
)
of_double_precision = pytest.mark.parametrize(
    "name",
    ["gaussian force", "lennard-jones force", "compact", "central", "field", "matrix valued"],
)


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def some_pairs(replicas=1, n=1200, m=None, d=2, dtype=FLOAT64, weighted=False, own=False, period=None, seed=0) -> Pairs:
    """Atoms, seen from themselves or from m other points."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(replicas, n, d, generator=generator, dtype=FLOAT64).to(dtype)
    x = points if m is None else torch.randn(replicas, m, d, generator=generator, dtype=FLOAT64).to(dtype)
    weights = torch.softmax(torch.randn(replicas, n, generator=generator, dtype=FLOAT64), -1).to(dtype)
    weights = weights if weighted else torch.full((1,), 1 / n, dtype=dtype).expand(replicas, n)
    return Pairs(x, points, weights, period, torch.arange(n) if own else None)


def in_double(pairs: Pairs) -> Pairs:
    return Pairs(pairs.x.double(), pairs.points.double(), pairs.weights.double(), pairs.period, pairs.own)


def assert_equal_to_rounding(ours: Tensor, kernel: Kernel, pairs: Pairs) -> None:
    """Beside the sum of |K|: rounding does not know of cancellation."""
    true = Blocked().sums(kernel, in_double(pairs))
    size = Blocked().sums(Kernel(lambda z: kernel(z).abs()), in_double(pairs))
    assert ours.shape == true.shape
    assert ours.dtype == pairs.x.dtype
    gap = (ours - true).abs()
    assert bool((gap <= TOLERANCE[pairs.x.dtype] * size).all()), float((gap / size).max())


# Against all pairs ----------------------------------------------------------------------------------------------------


@of_single_precision
def test_single_precision_seen_from_elsewhere(name):
    kernel, pairs = KERNELS[name], some_pairs(m=7, dtype=FLOAT32)
    assert_equal_to_rounding(Compiled().sums(kernel, pairs), kernel, pairs)


@of_double_precision
def test_double_precision_with_masses_replicas_and_without_oneself(name):
    kernel, pairs = KERNELS[name], some_pairs(3, n=130, weighted=True, own=True)
    assert_equal_to_rounding(Compiled().sums(kernel, pairs), kernel, pairs)


@every_kernel
def test_the_torch_form_for_other_devices(kernel, monkeypatch):
    monkeypatch.setattr(compiled, "FLOATS_OF_A_BLOCK", 3 * 90 * 32)
    pairs = some_pairs(3, n=90, weighted=True, own=True, period=(4.0, None))
    found = trace.trace(kernel, pairs.x)
    ours = compiled._by_torch(found, pairs, compiled._rows(found, (4.0, math.inf)))
    assert_equal_to_rounding(ours, kernel, pairs)


def test_a_torus_takes_the_shortest_difference():
    pairs = some_pairs(2, n=1100, m=5, d=3, dtype=FLOAT32, period=(2 * math.pi, None, 1.5))
    kernel = Kernel(lambda z: z * torch.exp(-z.abs().sum(-1, keepdim=True)))
    assert_equal_to_rounding(Compiled().sums(kernel, pairs), kernel, pairs)


@pytest.mark.parametrize("n", [1, 2, 15, 1023, 1024, 1025])
def test_every_size_of_the_last_tile(n):
    for own in (False, True):
        pairs = some_pairs(n=n, dtype=FLOAT32, own=own).at(torch.tensor([0, n // 2, n - 1]))
        assert_equal_to_rounding(Compiled().sums(KERNELS["gaussian"], pairs), KERNELS["gaussian"], pairs)


def test_what_is_left_out_need_not_be_in_order():
    kernel, pairs = KERNELS["lennard-jones force"], some_pairs(2, n=2300, own=True, weighted=True)
    rows = torch.tensor([2200, 3, 1024, 3, 1023, 0, 2299])
    sums = Compiled().sums(kernel, pairs)
    assert bool(sums.isfinite().all())
    assert torch.equal(Compiled().sums(kernel, pairs.at(rows)), sums[:, rows])
    assert_equal_to_rounding(Compiled().sums(kernel, pairs.at(rows)), kernel, pairs.at(rows))


def test_single_precision_loses_nothing_to_the_number_of_atoms():
    pairs = some_pairs(n=100_000, m=6, dtype=FLOAT32)
    for kernel in (KERNELS["gaussian"], KERNELS["gaussian force"]):
        with torch.no_grad():
            ours, true = Compiled().sums(kernel, pairs), Blocked().sums(kernel, in_double(pairs))
        assert float((ours - true).norm() / true.norm()) < 1e-6


# Bits -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gaussian force", "tanh components"])
def test_neither_threads_nor_other_rows_change_a_bit(name, monkeypatch):
    kernel, pairs = KERNELS[name], some_pairs(2, n=1500, dtype=FLOAT32, own=True)
    one = Compiled().sums(kernel, pairs)
    monkeypatch.setattr(compiled, "PAIRS_OF_A_TASK", 37 * 1500)
    torch.set_num_threads(2)
    assert torch.equal(Compiled().sums(kernel, pairs), one)
    for rows in (torch.arange(1), torch.arange(5, 16), torch.arange(1023, 1500)):
        assert torch.equal(Compiled().sums(kernel, pairs.at(rows)), one[:, rows])


def test_no_tensor_of_pairs_is_made():
    class Largest(TorchDispatchMode):
        numel = 0

        @classmethod
        def _should_skip_dynamo(cls):
            return False

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                self.numel = max(self.numel, result.untyped_storage().size() // result.element_size())
            return result

    pairs = some_pairs(n=3000, dtype=FLOAT32)
    Compiled().sums(KERNELS["gaussian force"], pairs)
    with Largest() as largest:
        Compiled().sums(KERNELS["gaussian force"], pairs)
    assert 0 < largest.numel <= 2 * 3000


# The exponential of the generated code --------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "largest"), [(FLOAT32, 87.0), (FLOAT64, 708.0)])
def test_the_exponential_has_the_digits_of_its_argument(dtype, largest):
    z = torch.linspace(-largest, largest, 5001, dtype=dtype)
    pairs = Pairs(z.reshape(1, -1, 1), z.new_zeros(1, 1, 1), z.new_ones(1, 1))
    ours, true = Compiled().sums(Kernel(lambda z: z[..., 0].exp()), pairs)[0].double(), z.double().exp()
    # An error of half a unit in z log₂ e is one of |z| ε in the value.
    assert bool(((ours / true - 1).abs() <= torch.finfo(dtype).eps * (1.5 + z.double().abs())).all())


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64])
def test_logarithms_and_powers_have_their_digits(dtype):
    exponents = torch.linspace(-37.0, 38.0, 4001, dtype=FLOAT64)
    z = torch.cat([10.0**exponents, 1 + 10.0 ** -exponents[2000:3000]]).to(dtype)
    pairs = Pairs(z.reshape(1, -1, 1), z.new_zeros(1, 1, 1), z.new_ones(1, 1))
    kernel = Kernel(lambda z: torch.cat([z.log(), z.abs() ** 0.3, (1 + z.abs()) ** -0.4], -1))
    ours, eps, x = Compiled().sums(kernel, pairs)[0].double(), torch.finfo(dtype).eps, z.double()
    powers = torch.stack([x**0.3, (1 + x) ** -0.4], -1)
    # The logarithm to two units in the last place; a power as its logarithm tells.
    assert bool(((ours[:, 0] - x.log()).abs() <= 2 * eps * x.log().abs()).all())
    assert bool(((ours[:, 1:] / powers - 1).abs() <= eps * (2 + 2 * powers.log().abs())).all())


def several(z: Tensor) -> Tensor:
    functions = (
        torch.exp,
        torch.log,
        lambda z: z.abs() ** 0.3,
        torch.relu,
        torch.sign,
        torch.tanh,
        lambda z: z.clamp(-1, 2),
        lambda z: torch.exp(-z * z),
    )
    return torch.cat([f(z) for f in functions], -1)


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64])
def test_infinities_and_nan_come_through(dtype):
    values = torch.tensor([math.inf, -math.inf, math.nan, 1e4, -1e4, 0.0], dtype=dtype)
    pairs = Pairs(values.reshape(1, -1, 1), values.new_zeros(1, 1, 1), values.new_ones(1, 1))
    kernel = Kernel(several)
    torch.testing.assert_close(Compiled().sums(kernel, pairs), Blocked().sums(kernel, pairs), equal_nan=True)


# Derivatives ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "own"), [("power", True), ("cosine", False)])
def test_gradients_of_scalar_kernels(name, own):
    kernel = KERNELS[name]
    start = some_pairs(2, n=5, m=None if own else 3, weighted=True, own=own, period=None if own else (5.0, None))

    def sums(x: Tensor, points: Tensor, weights: Tensor) -> Tensor:
        return Compiled().sums(kernel, Pairs(x, points, weights, start.period, start.own))

    inputs = [z.clone().requires_grad_() for z in (start.x, start.points, start.weights)]
    assert torch.autograd.gradcheck(sums, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(sums, inputs, fast_mode=True)


def test_gradients_equal_those_of_all_pairs_where_the_points_are_the_atoms():
    def gradients(strategy, kernel: Kernel, weighted: bool) -> list[Tensor]:
        pairs = some_pairs(2, n=40, weighted=weighted, own=True)
        x, weights = pairs.x.clone().requires_grad_(), pairs.weights.clone().requires_grad_()
        sums = strategy.sums(kernel, Pairs(x, x, weights, None, pairs.own))
        return list(torch.autograd.grad((sums.square().sum((0, 1)) * torch.tensor([1.0])).sum(), [x, weights]))

    for name in ("gaussian", "gaussian force"):
        for ours, true in zip(
            gradients(Compiled(), KERNELS[name], True), gradients(Blocked(), KERNELS[name], True), strict=True
        ):
            torch.testing.assert_close(ours, true, rtol=1e-12, atol=1e-15)


def test_rows_that_leave_out_the_same_atom_have_gradients():
    start = some_pairs(n=9, own=True).at(torch.tensor([2, 2, 5]))
    x = start.x.clone().requires_grad_()
    ours = Compiled().sums(KERNELS["gaussian"], Pairs(x, start.points, start.weights, None, start.own)).sum()
    (slope,) = torch.autograd.grad(ours, x)
    torch.testing.assert_close(slope, Blocked().sums(KERNELS["gaussian force"], start))


# Planted faults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("exp", lambda x: trace._neg(trace._exp(x))),
        ("neg", lambda x: x),
        ("mul", lambda a, b: trace._mul(trace._mul(a, b), 1.0001)),
        ("sum", lambda x, dim=None, keepdim=False, **_: trace._mean(x, dim, keepdim)),
    ],
)
def test_a_wrong_translation_of_an_operation_is_caught(name, wrong, monkeypatch):
    monkeypatch.setitem(trace._OPERATIONS, name, wrong)
    with pytest.raises(trace.UntraceableError, match="its expressions give"):
        trace.trace(Kernel(lambda z: gaussian(z) * 1.5), torch.zeros(2))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("y + (real)", "y - (real)"),
        ("0.24022242085729485772f", "0.2405f"),
        ("const real d1 = x1_1 - y1", "const real d1 = x1_1 + y1"),
        ("scale * total", "total"),
        ("first += 1024", "first += 1025"),
        ("excludes && j == own2", "excludes && j == own1"),
    ],
)
def test_a_fault_in_the_generated_code_is_caught(right, wrong, monkeypatch):
    written = compiled.source

    def faulty(found, form):
        text = written(found, form)
        assert right in text
        return text.replace(right, wrong)

    monkeypatch.setattr(compiled, "source", faulty)
    pairs = some_pairs(n=20, dtype=FLOAT32, own=True)
    with pytest.raises(ValueError, match="the compiled sums differ from the kernel's"):
        Compiled().sums(Kernel(lambda z: gaussian(z) * len(wrong)), pairs)


def cauchy(z: Tensor) -> Tensor:
    return 1 / (1 + (z / 1e-10) ** 4).sum(-1)


def test_constants_that_leave_the_range_of_the_dtype_are_caught(monkeypatch):
    """At differences of size 1 the code gives 0, as it should: those of the points themselves tell."""
    pairs = some_pairs(n=9, d=1, dtype=FLOAT32)
    pairs = dataclasses.replace(pairs, x=1e-10 * pairs.x, points=1e-10 * pairs.points)
    assert_equal_to_rounding(Compiled().sums(Kernel(cauchy), pairs), Kernel(cauchy), pairs)
    monkeypatch.setattr(expression, "_is_moderate", lambda x: x.is_constant)
    trace._of_functions.clear()
    try:
        with pytest.raises(ValueError, match=r"gives? .* where (it|the kernel) gives"):
            Compiled().sums(Kernel(cauchy), pairs)
    finally:
        trace._of_functions.clear()


# What is refused ------------------------------------------------------------------------------------------------------


def by_value(z: Tensor) -> Tensor:
    return z.sum(-1) if bool(z.sum() > 0) else -z.sum(-1)


def centred(z: Tensor) -> Tensor:
    return z.sum(-1) - z.sum(-1).mean()


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (by_value, "decides by the value of z"),
        (centred, "does not act entry by entry"),
        (lambda z: torch.rand_like(z).sum(-1), "draws random numbers"),
        (lambda z: torch.lgamma(z).sum(-1), "lgamma has no scalar expression"),
        (lambda z: z.sum(-1).round().long(), "int64"),
        (lambda z: z.reshape(-1, 2).sum(-1), "returned shape"),
        (lambda z: z @ torch.ones(3, dtype=z.dtype), "raised RuntimeError on a probe"),
        (lambda z: torch.linalg.vector_norm(z, 0, dim=-1), "raised ZeroDivisionError on a probe"),
        (lambda z: torch.remainder(z, 0.1).sum(-1), "takes a remainder"),
        (lambda z: torch.fmod(z, 0.1).sum(-1), "takes a remainder"),
        (lambda z: z.sum(-1) / 0.0 * 0.0, "finite at none of the differences"),
        (lambda z: (PARAMETER * z).sum(-1), "requires a gradient"),
        (lambda z: gaussian(z) * PARAMETER.exp(), "requires a gradient"),
        (Kernel(lambda z: (PARAMETER * z.square()).sum(-1)).slope.function, "requires a gradient"),
    ],
)
def test_kernels_that_are_no_expressions_are_refused_with_the_reason(function, why):
    kernel, pairs = Kernel(function), some_pairs(n=4)
    with pytest.raises(ValueError, match=rf"cannot be compiled: .*{why}.*strategy=\"blocked\""):
        Compiled().sums(kernel, pairs)
    assert not compiled.usable(kernel, pairs)


def test_what_a_dtype_cannot_hold_is_refused():
    """What nan_to_num makes of infinity is 1.8e308 in double precision, 3.4e38 in single."""
    kernel = Kernel(lambda z: torch.nan_to_num(1 / z).sum(-1))
    assert not compiled.usable(kernel, some_pairs(n=4, dtype=FLOAT32))


@pytest.mark.parametrize("field", ["x", "points", "weights", "own"])
def test_numbers_of_another_kind_are_refused(field):
    pairs = some_pairs(n=4, m=4)
    other = torch.arange(4, dtype=torch.int32) if field == "own" else getattr(pairs, field).float()
    mixed = dataclasses.replace(pairs, **{field: other})
    with pytest.raises(ValueError, match=r"Compiled: .* expected .*torch\.(float|int)|Compiled: .* one dtype"):
        Compiled().sums(KERNELS["gaussian"], mixed)
    assert not compiled.usable(KERNELS["gaussian"], mixed)


def test_half_precision_is_refused():
    with pytest.raises(ValueError, match=r"no code for torch\.float16"):
        Compiled().sums(KERNELS["gaussian"], some_pairs(n=4, dtype=torch.float16))


@pytest.mark.parametrize(
    ("setting", "why"), [("/nowhere/cc", "no C compiler was found"), ("false", "gave no library"), ("true", "gave no")]
)
def test_without_a_compiler_the_reason_is_said(setting, why, monkeypatch):
    for words in (native.compiler, native._version):
        words.cache_clear()
    monkeypatch.setenv("CC", setting)
    monkeypatch.setenv("PATH", os.environ["PATH"] if setting != "/nowhere/cc" else "")
    try:
        kernel, pairs = Kernel(lambda z: gaussian(z) * 0.3), some_pairs(n=4)
        with pytest.raises(ValueError, match=rf'{why}.*Use strategy="blocked"'):
            Compiled().sums(kernel, pairs)
        assert why in str(compiled.reason(kernel, pairs))
    finally:
        for words in (native.compiler, native._version):
            words.cache_clear()


# What is kept ---------------------------------------------------------------------------------------------------------


def test_a_library_is_made_once_and_belongs_to_its_user(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pairs, built = some_pairs(n=4, dtype=FLOAT32), []
    build = native._build
    monkeypatch.setattr(native, "_build", lambda *args: (built.append(args), build(*args)))
    for _ in range(2):
        Compiled().sums(Kernel(lambda z: ONE * gaussian(z) * 0.7), pairs)
    assert len(built) == 1
    assert stat.S_IMODE(native.folder().stat().st_mode) == 0o700
    assert [path.suffix for path in native.folder().iterdir()] == [".so"]
    native.folder().chmod(0o777)
    assert tmp_path not in native.folder().parents


def test_only_the_libraries_used_last_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "KEPT", 2)
    for age, name in enumerate(["new", "middle", "old", "oldest"]):
        path = tmp_path / f"{name}.so"
        path.touch()
        os.utime(path, (1e9 - age, 1e9 - age))
    native._keep_the_last(tmp_path / "new.so")
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["middle", "new"]
    native._keep_the_last(tmp_path / "new.so")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_system_without_users_has_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delattr(os, "getuid")
    assert tmp_path in native.folder().parents


def test_functions_that_say_the_same_share_their_trace(monkeypatch):
    def kernel(scale: float) -> Kernel:
        return Kernel(lambda z: scale * gaussian(z))

    like, counted = torch.zeros(2), []
    recorded = trace.recorded
    monkeypatch.setattr(trace, "recorded", lambda *args: (counted.append(1), recorded(*args))[1])
    first = trace.trace(kernel(0.55), like)
    assert trace.trace(kernel(0.55), like) is first
    assert trace.trace(kernel(0.65), like) is not first
    assert trace.trace(kernel(0.55).slope, like) is trace.trace(kernel(0.55).slope, like)
    assert len(counted) == 3


SCALE = 2.0


def test_the_identity_of_a_function():
    def scaled(c):
        return lambda z: c * z

    def nested(f):
        return lambda z: f(z)

    def of_module(z):
        return SCALE * z

    same = [
        (scaled(1.0), scaled(1.0), scaled(2.0)),
        (nested(scaled(1.0)), nested(scaled(1.0)), nested(scaled(2.0))),
        (lambda z, c=1: c * z, None, None),
        (Frozen(1.0).kernel, Frozen(1.0).kernel, Frozen(2.0).kernel),
    ]
    for one, again, other in same[:2] + same[3:]:
        assert trace.identity(one) is not None
        assert trace.identity(one) == trace.identity(again) != trace.identity(other)
    before = trace.identity(of_module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "SCALE", 3.0)
        assert trace.identity(of_module) != before
    assert trace.identity(scaled(1)) != trace.identity(scaled(1.0)) != trace.identity(scaled(True))
    for unknown in (scaled(torch.ones(1)), scaled([1.0]), Anisotropic(MATRIX).kernel, object()):
        assert trace.identity(unknown) is None


@dataclass(frozen=True)
class Frozen:
    rate: float
    of_class = 1.0

    def kernel(self, z: Tensor) -> Tensor:
        return self.rate * z

    def by_helper(self, z: Tensor) -> Tensor:
        return self.helper(z)

    def helper(self, z: Tensor) -> Tensor:
        return SCALE * z

    @property
    def scale(self) -> float:
        return SCALE * self.rate

    def by_property(self, z: Tensor) -> Tensor:
        return self.scale * z

    def by_class(self, z: Tensor) -> Tensor:
        return self.of_class * z

    def __call__(self, z: Tensor) -> Tensor:
        return SCALE * z

    def by_name(self, z: Tensor) -> Tensor:
        return getattr(self, "scale") * z  # noqa: B009


def helped(scenario: Frozen, z: Tensor) -> Tensor:
    return scenario.by_helper(z)


@pytest.mark.parametrize(
    ("function", "owner", "name"),
    [
        (Frozen(1.0).by_helper, None, "SCALE"),
        (Frozen(1.0).by_property, None, "SCALE"),
        (Frozen(1.0), None, "SCALE"),
        ((lambda scenario: lambda z: helped(scenario, z))(Frozen(1.0)), None, "SCALE"),
        (Frozen(1.0).by_class, Frozen, "of_class"),
        (Frozen(1.0).by_helper, Frozen, "helper"),
    ],
)
def test_an_identity_holds_what_is_reached_through_an_object(function, owner, name, monkeypatch):
    before = trace.identity(function)
    assert before is not None
    assert before == trace.identity(function)
    if owner is None:
        monkeypatch.setitem(globals(), name, 3.0)
    else:
        monkeypatch.setattr(owner, name, 3.0 if name == "of_class" else lambda self, z: 4 * z)
    assert trace.identity(function) != before


def test_what_is_reached_in_ways_that_do_not_show_has_no_identity():
    class Settings:
        scale = 1.0

    assert trace.identity(Frozen(1.0).by_name) is None
    assert trace.identity(lambda z: Settings.scale * z) is None
    assert trace.identity(torch.ones(2).add) is None


def test_sums_follow_what_a_method_calls(monkeypatch):
    pairs = some_pairs(n=6, m=3)
    before = Compiled().sums(Kernel(Frozen(1.0).by_helper), pairs)
    monkeypatch.setitem(globals(), "SCALE", 2 * SCALE)
    torch.testing.assert_close(Compiled().sums(Kernel(Frozen(1.0).by_helper), pairs), 2 * before)


@pytest.mark.parametrize("of_rate", [lambda rate: rate, lambda rate: (rate + rate.square()).sum()])
def test_tensors_that_change_are_read_again(of_rate):
    rate = torch.tensor([0.5], dtype=FLOAT64)
    kernel, pairs = Kernel(lambda z: (of_rate(rate) * z).sum(-1)), some_pairs(n=6, m=3)
    before = Compiled().sums(kernel, pairs) / of_rate(rate)
    rate.mul_(2)
    torch.testing.assert_close(Compiled().sums(kernel, pairs), of_rate(rate) * before)
    rate.requires_grad_()
    with pytest.raises(ValueError, match="requires a gradient"):
        Compiled().sums(kernel, pairs)
    rate.requires_grad_(False)
    torch.testing.assert_close(Compiled().sums(kernel, pairs), of_rate(rate) * before)


def test_a_tensor_in_the_place_of_an_equal_one_may_require_a_gradient():
    rates = [torch.tensor(0.5, dtype=FLOAT64)]
    kernel, pairs = Kernel(lambda z: (rates[0] * z).sum(-1)), some_pairs(n=6, m=3)
    with torch.no_grad():
        Compiled().sums(kernel, pairs)
        rates[0] = rates[0].clone().requires_grad_()
        with pytest.raises(ValueError, match="requires a gradient"):
            Compiled().sums(kernel, pairs)


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e7])
def test_what_is_known_of_a_kernel_is_forgotten_in_every_unit(unit):
    width = [unit]
    kernel, like = Kernel(lambda z: torch.exp(-(z / width[0]).square().sum(-1))), torch.zeros(1, 2)
    known = kernel.facts(like)
    assert kernel.facts(like) is known
    width[0] = 1.5 * unit
    assert kernel.facts(like) is not known


def test_constants_that_a_kernel_makes_itself_are_no_tensors_of_others():
    found = trace.trace(Kernel(lambda z: (z * torch.tensor([1.0, 2.0]) + torch.ones(2)).sum(-1)), torch.zeros(2))
    assert found.tensors == ()
    assert [seen[0] is MATRIX for seen in trace.trace(KERNELS["field"], torch.zeros(2)).tensors] == [True]
