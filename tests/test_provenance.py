"""What is recorded of a scenario: parameters that come back, digests that see changes, paths that can be imported."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from mfsde import Dirac, EmpiricalMeasure, Gaussian, Mixture, Uniform, decoupled, provenance
from mfsde.provenance import (
    INLINE,
    CannotRebuild,
    canonical,
    decode,
    describe,
    digest,
    encode,
    import_path,
    load_class,
    load_file,
    rebuild,
    source_digest,
    versions,
)
from mfsde.scenarios import DoubleWell, MeanFieldOU

# Encoding -------------------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text())
VALUES = st.recursive(
    NUMBERS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.one_of(st.text(), st.integers(), st.booleans()), inner, max_size=4),
    ),
    max_leaves=12,
)


def through_json(value: Any) -> Any:
    return decode(json.loads(canonical(encode(value))))


def alike(a: Any, b: Any) -> bool:
    """Equal and of equal types, all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, dict):
        return list(map(repr, a)) == list(map(repr, b)) and all(map(alike, a.values(), b.values()))
    if isinstance(a, float):
        return a == b and math.copysign(1, a) == math.copysign(1, b)
    return a == b


@given(VALUES)
def test_plain_values_come_back_as_they_were(value):
    assert alike(through_json(value), value)


@given(VALUES, VALUES)
def test_different_values_have_different_texts(a, b):
    assert (canonical(encode(a)) == canonical(encode(b))) == alike(a, b)


def test_the_order_of_keys_does_not_change_the_canonical_text():
    assert canonical({"b": 1, "a": [2.0, None]}) == canonical({"a": [2.0, None], "b": 1}) == '{"a":[2.0,null],"b":1}'


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_numbers_that_json_lacks_come_back(value):
    assert repr(through_json(value)) == repr(value)


@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    dtype=st.sampled_from(["float32", "float64", "float16", "int64", "int32", "uint8", "bool"]),
    kind=st.sampled_from(["tensor", "array"]),
    seed=st.integers(0, 1000),
)
def test_small_arrays_come_back_bit_for_bit_with_shape_and_dtype(shape, dtype, kind, seed):
    array = (3 * np.random.default_rng(seed).standard_normal(shape)).astype("int64" if dtype == "uint8" else dtype)
    array = np.abs(array).astype(dtype) if dtype == "uint8" else np.asarray(array)
    value = torch.from_numpy(array) if kind == "tensor" else array
    back = through_json(value)
    assert type(back) is type(value)
    assert back.dtype == value.dtype
    assert tuple(back.shape) == tuple(value.shape)
    assert bool((back == value).all())


def test_numpy_scalars_are_recorded_as_numbers():
    assert through_json(np.float32(0.5)) == 0.5
    assert through_json(np.int64(3)) == 3


@pytest.mark.parametrize("law", [Gaussian([0.0, 1.0], [[2.0, 0.5], [0.5, 1.0]]), Uniform(-1.0, 2.0), Dirac([1.0, 2.0])])
def test_laws_come_back(law):
    for value in (law, Mixture([law, law], [0.25, 0.75])):
        back = through_json(value)
        assert type(back) is type(value)
        z = torch.randn(5, value.n_variates, dtype=torch.float64)
        assert torch.equal(back.from_variates(z), value.from_variates(z))


def square(x):
    return x**2


def cube(x):
    return x**3


def power(n):
    return lambda x: x**n


FINGERPRINTED = {
    "large tensors": (torch.zeros(INLINE + 1), torch.ones(INLINE + 1)),
    "large arrays": (np.zeros(INLINE + 1), np.ones(INLINE + 1)),
    "shapes": (torch.zeros(2, INLINE), torch.zeros(INLINE, 2)),
    "non-finite tensors": (torch.tensor([math.nan, 0.0]), torch.tensor([math.nan, 1.0])),
    "functions": (square, cube),
    "closures": (power(2), power(3)),
    "datasets": (xr.Dataset({"a": ("x", [1.0])}), xr.Dataset({"a": ("x", [2.0])})),
    "sets": (frozenset({1}), frozenset({2})),
    "complex numbers": (1j, 2j),
    "dtypes": (torch.float32, torch.float64),
    "measures": (EmpiricalMeasure(torch.zeros(2, 1)), EmpiricalMeasure(torch.ones(2, 1))),
}


@pytest.mark.parametrize(("one", "other"), FINGERPRINTED.values(), ids=FINGERPRINTED)
def test_what_json_cannot_say_is_a_fingerprint_that_tells_values_apart(one, other):
    assert canonical(encode(one)) == canonical(encode(one))
    assert canonical(encode(one)) != canonical(encode(other))
    with pytest.raises(CannotRebuild, match="recorded by its fingerprint only"):
        decode(encode(one))


# Descriptions and digests ---------------------------------------------------------------------------------------------


@given(kappa=st.floats(0.1, 5), sigma=st.floats(0.1, 5), means=st.lists(st.floats(-3, 3), min_size=1, max_size=3))
def test_a_scenario_is_rebuilt_from_its_description(kappa, sigma, means):
    case = MeanFieldOU(kappa=kappa, sigma=sigma, initial_mean=tuple(means))
    again = rebuild(json.loads(canonical(describe(case))))
    assert again == case
    assert digest(describe(again)) == digest(describe(case))


def test_a_description_names_path_parameters_and_source():
    described = describe(MeanFieldOU(kappa=2.0))
    assert described["scenario"] == "MeanFieldOU"
    assert described["scenario_path"] == "mfsde.scenarios.mean_field_ou:MeanFieldOU"
    assert described["parameters"]["kappa"] == 2.0
    assert described["scenario_source"] == source_digest(MeanFieldOU)
    assert len(described["scenario_source"]) == 64


@pytest.mark.parametrize(
    "change", [{"kappa": 1.0 + 1e-15}, {"sigma": 0.71}, {"initial_mean": (1.0, 1.0)}, {"initial_mean": [1.0]}]
)
def test_a_digest_changes_with_a_field(change):
    case = MeanFieldOU()
    assert digest(describe(dataclasses.replace(case, **change))) != digest(describe(case))
    assert digest(describe(dataclasses.replace(case))) == digest(describe(case))


def test_different_classes_with_equal_fields_differ():
    assert source_digest(MeanFieldOU) != source_digest(DoubleWell)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Gaussian(0.0, 1.0), Gaussian(0.5, 1.0)),
        (EmpiricalMeasure(torch.zeros(2, 1)), EmpiricalMeasure(torch.ones(2, 1))),
        (square, cube),
    ],
    ids=["laws", "measures", "flows"],
)
def test_the_digest_of_a_decoupled_scenario_sees_its_law(one, other):
    described = describe(decoupled(MeanFieldOU(), one))
    assert described["scenario"] == "decoupled(MeanFieldOU)"
    assert digest(described) != digest(describe(decoupled(MeanFieldOU(), other)))
    assert digest(described) != digest(describe(MeanFieldOU()))
    with pytest.raises(CannotRebuild, match="not defined in a module or file"):
        rebuild(described)


# Files ----------------------------------------------------------------------------------------------------------------

SOURCE = """
from dataclasses import dataclass, field
from mfsde import Gaussian

@dataclass(frozen=True)
class Pull:
    kappa: float = 1.0

    def drift(self, t, x, mu):
        return -self.kappa * x

    def diffusion(self, t, x, mu):
        return 0.5

    def initial(self):
        return Gaussian(0.0, 1.0)

    @dataclass(frozen=True)
    class Inner:
        a: float = 2.0

@dataclass(frozen=True)
class Child(Pull):
    n: int = 3
    derived: float = field(init=False, default=7.0)

number = 3
"""


@pytest.fixture
def write(tmp_path):
    """Writes the source, with replacements, into a fresh file; forgets the modules made from it."""
    known = set(sys.modules)

    def to_file(name: str, *replacements: tuple[str, str]) -> str:
        source = SOURCE
        for old, new in replacements:
            assert old in source
            source = source.replace(old, new)
        path = tmp_path / name
        path.write_text(source)
        return str(path)

    yield to_file
    for name in set(sys.modules) - known:
        if name.startswith("mfsde_file_"):
            del sys.modules[name]


def test_the_import_path_of_a_file_scenario_is_its_file(write):
    file = write("mine.py")
    for name in ("Pull", "Child", "Pull.Inner"):
        cls = load_class(f"{file}:{name}")
        assert import_path(cls) == f"{file}:{name}"
        assert load_class(import_path(cls)) is cls


def test_a_file_scenario_is_rebuilt_in_another_process(write):
    described = describe(load_class(f"{write('mine.py')}:Child")(kappa=2.5, n=4))
    program = (
        "import json, sys; from mfsde.provenance import *; d = json.loads(sys.argv[1]); c = rebuild(d);"
        "assert digest(describe(c)) == digest(d); print(c.kappa, c.n, c.derived)"
    )
    command = [sys.executable, "-c", program, canonical(described)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "2.5 4 7.0"), done.stderr


def test_a_file_is_loaded_once(write):
    file = write("mine.py")
    assert load_file(file) is load_file(file)
    assert load_class(f"{file}:Pull") is load_class(f"{file}:Pull")


def test_a_file_that_fails_is_not_remembered(write):
    file = write("broken.py", ("number = 3", "number = 1 / 0"))
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            load_file(file)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_file(file + ".missing.py")


def file_digest(file: str, name: str = "Pull") -> str | None:
    return source_digest(load_class(f"{file}:{name}"))


def test_comments_and_layout_do_not_change_the_source_digest(write):
    before = file_digest(write("a.py"))
    assert before is not None
    commented = write("b.py", ("        return 0.5", "        # half\n\n        return (\n            0.5\n        )"))
    assert file_digest(commented) == before


@pytest.mark.parametrize(
    "change",
    [
        ("-self.kappa * x", "-self.kappa * x**3"),
        ("return 0.5", "return 0.6"),
        ("kappa: float = 1.0", "kappa: float = 2.0"),
    ],
)
def test_a_changed_equation_changes_the_source_digest_of_its_class_and_of_those_that_inherit_it(write, change):
    before, after = write("a.py"), write("b.py", change)
    for name in ("Pull", "Child"):
        assert file_digest(after, name) != file_digest(before, name)


def test_a_change_elsewhere_in_the_file_does_not_change_the_source_digest(write):
    before, after = write("a.py"), write("b.py", ("number = 3", "number = 4"), ("n: int = 3", "n: int = 4"))
    assert file_digest(after) == file_digest(before)
    assert file_digest(after, "Child") != file_digest(before, "Child")


def test_the_source_digest_of_a_function_is_its_own():
    assert source_digest(square) == source_digest(square)
    assert source_digest(square) != source_digest(cube)
    assert source_digest(len) is None


# Classes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("MeanFieldOU", ValueError, "names no class; expected 'module:Class' or 'path/to/file.py:Class'"),
        (":MeanFieldOU", ValueError, "names no class"),
        ("mfsde.scenarios:", ValueError, "names no class"),
        ("no_such_module_of_ours:OU", ModuleNotFoundError, "no_such_module_of_ours"),
        ("/nowhere/file.py:OU", FileNotFoundError, r"there is no file /nowhere/file\.py"),
        ("mfsde.scenarios.mean_field_ou:OU", AttributeError, "defines no OU; its classes are: MeanFieldOU"),
        ("mfsde.scenarios:BUILT_IN", ValueError, "is a dict; expected a scenario class"),
    ],
)
def test_a_path_that_leads_to_no_class_is_refused(path, error, message):
    with pytest.raises(error, match=message):
        load_class(path)


def test_a_built_in_class_is_found_by_its_path():
    assert load_class("mfsde.scenarios.double_well:DoubleWell") is DoubleWell
    assert import_path(DoubleWell) == "mfsde.scenarios.double_well:DoubleWell"
    assert import_path(Gaussian) == "mfsde.measure:Gaussian"


def test_a_class_inside_a_function_has_no_path_and_cannot_be_rebuilt():
    @dataclass(frozen=True)
    class Local:
        sigma: float = 1.0

    assert import_path(Local) is None
    with pytest.raises(CannotRebuild, match="Local was not defined in a module or file that can be imported again"):
        rebuild(describe(Local()))


def test_a_class_that_is_gone_or_a_fingerprint_cannot_be_rebuilt():
    described = describe(MeanFieldOU())
    for path in ("no_such_module_of_ours:OU", "mfsde.scenarios.mean_field_ou:Gone", "/nowhere/file.py:OU"):
        with pytest.raises(CannotRebuild, match="cannot be imported"):
            rebuild({**described, "scenario_path": path})
    large = describe(MeanFieldOU(initial_mean=torch.zeros(INLINE + 1)))
    with pytest.raises(CannotRebuild, match="fingerprint only"):
        rebuild(large)


@dataclass(frozen=True)
class Nested:
    a: float = 1.0
    derived: float = field(init=False, default=2.0)


def test_a_dataclass_inside_a_parameter_comes_back_without_its_derived_fields():
    assert import_path(Nested) is not None
    assert through_json((Nested(a=3.0),)) == (Nested(a=3.0),)


# Versions -------------------------------------------------------------------------------------------------------------


def test_versions_name_everything_a_result_may_depend_on():
    found = versions()
    assert set(found) == {"mfsde", "python", "torch", "torchsde", "numpy", "POT", "xarray", "zarr", "git_commit"}
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["numpy"] == np.__version__
    assert all(isinstance(value, str) for value in found.values())
    assert provenance._version("no-such-package-of-ours") == "not installed"
