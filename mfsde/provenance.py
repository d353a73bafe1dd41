"""Where a run came from: canonical parameters, the scenario's import path and source, versions.

Parameters are written as JSON that says how to build them again; what JSON cannot say (a function, a large tensor) is
written as a fingerprint, and such a scenario has to be passed to `resume`.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import pickle
import platform
import subprocess
import sys
import textwrap
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import __version__
from .model import fields, scenario_name
from .nonlinear_process import Decoupled

# Modules made by `load_file` are named by this and a digest of their path.
FROM_FILE = "mfsde_file_"
# Tensors of at most this many entries are written out; larger ones are fingerprinted.
INLINE = 256


class CannotRebuild(TypeError):
    """A recorded value holds no more than a fingerprint."""


def describe(scenario: Any) -> dict[str, Any]:
    """Name, import path (None if there is none), parameters and source digest of a scenario."""
    inner = scenario.scenario if isinstance(scenario, Decoupled) else scenario
    parameters = {name: encode(value) for name, value in fields(scenario).items()}
    described: dict[str, Any] = {
        "scenario": scenario_name(scenario),
        "scenario_path": None if isinstance(scenario, Decoupled) else import_path(type(scenario)),
        "parameters": parameters,
        "scenario_source": source_digest(type(inner)),
    }
    if isinstance(scenario, Decoupled):
        described["law"] = encode(scenario.law)
    return described


def rebuild(described: dict[str, Any]) -> Any:
    """The scenario that `describe` described.

    Raises:
        CannotRebuild: it has no import path, a parameter is a fingerprint, or the class is gone.

    """
    if described["scenario_path"] is None:
        raise CannotRebuild(f"{described['scenario']} was not defined in a module or file that can be imported again")
    try:
        cls = load_class(described["scenario_path"])
    except (ImportError, AttributeError, FileNotFoundError, ValueError) as problem:
        raise CannotRebuild(f"{described['scenario_path']} cannot be imported ({problem})") from problem
    initial = {f.name for f in dataclasses.fields(cls) if f.init}
    return cls(**{name: decode(value) for name, value in described["parameters"].items() if name in initial})


def digest(value: Any) -> str:
    """sha256 of canonical JSON."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values, equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def encode(value: Any) -> Any:
    """A parameter as JSON values."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    if isinstance(value, (tuple, list)):
        return {type(value).__name__ if type(value) in (tuple, list) else "tuple": [encode(v) for v in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(k), encode(v)] for k, v in value.items()]}
    if isinstance(value, (Tensor, np.ndarray)):
        return _encode_array(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        inner = {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"object": import_path(type(value)) or type(value).__qualname__, "fields": inner}
    return _fingerprint(value)


def decode(value: Any) -> Any:
    """The parameter that `encode` wrote.

    Raises:
        CannotRebuild: it wrote a fingerprint.

    """
    if not isinstance(value, dict):
        return value
    if "float" in value:
        return float(value["float"])
    if "tuple" in value or "list" in value:
        return tuple(decode(v) for v in value["tuple"]) if "tuple" in value else [decode(v) for v in value["list"]]
    if "dict" in value:
        return {decode(k): decode(v) for k, v in value["dict"]}
    if "values" in value:
        array = np.asarray(value["values"], dtype=value["dtype"]).reshape(value["shape"])
        return torch.from_numpy(array.copy()) if value["kind"] == "tensor" else array
    if "object" in value and ":" in value["object"]:
        cls = load_class(value["object"])
        initial = {f.name for f in dataclasses.fields(cls) if f.init}
        return cls(**{k: decode(v) for k, v in value["fields"].items() if k in initial})
    raise CannotRebuild(f"a parameter ({canonical(value):.80}) is recorded by its fingerprint only")


def source_digest(value: Any) -> str | None:
    """sha256 of the syntax tree of a class (with its bases outside mfsde) or function; None without source.

    Comments and layout do not count; a changed drift does.
    """
    parts = []
    for item in _lineage(value):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(item)))
        except (OSError, TypeError, SyntaxError):
            return None
        parts.append(ast.dump(tree))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest() if parts else None


def import_path(cls: type) -> str | None:
    """'module:Class', 'path/to/file.py:Class', or None when neither would find it again."""
    module = sys.modules.get(cls.__module__)
    if module is None or cls.__module__ == "__main__" or "<locals>" in cls.__qualname__:
        return None
    if not cls.__module__.startswith(FROM_FILE) and _importable(cls.__module__):
        return f"{cls.__module__}:{cls.__qualname__}"
    file = getattr(module, "__file__", None)
    return f"{Path(file).resolve()}:{cls.__qualname__}" if file else None


def load_class(path: str) -> type:
    """The class behind 'module:Class' or 'path/to/file.py:Class'.

    Raises:
        ValueError: not of this form.
        FileNotFoundError, ImportError, AttributeError: nothing is there.

    """
    where, _, name = path.rpartition(":")
    if not where or not name:
        raise ValueError(f"{path!r} names no class; expected 'module:Class' or 'path/to/file.py:Class'.")
    module = load_file(where) if where.endswith(".py") else importlib.import_module(where)
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            classes = [k for k, v in vars(module).items() if isinstance(v, type) and v.__module__ == module.__name__]
            raise AttributeError(f"{where} defines no {name}; its classes are: {', '.join(classes) or 'none'}.")
        value = getattr(value, part)
    if not isinstance(value, type):
        raise ValueError(f"{path} is a {type(value).__name__}; expected a scenario class.")
    return value


def load_file(file: str | Path) -> ModuleType:
    """A Python file as a module, once per file.

    Raises:
        FileNotFoundError: there is no such file.

    """
    path = Path(file).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    name = f"{FROM_FILE}{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be loaded as Python.")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up while the file runs.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@cache
def versions() -> dict[str, str]:
    """Versions of everything a result may depend on."""
    packages = ("torch", "torchsde", "numpy", "POT", "xarray", "zarr")
    found = {name: _version(name) for name in packages}
    return {"mfsde": __version__, "python": platform.python_version(), **found, "git_commit": _git_commit()}


def _encode_array(value: Tensor | np.ndarray) -> dict[str, Any]:
    kind = "tensor" if isinstance(value, Tensor) else "array"
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
    known = {"kind": kind, "shape": list(array.shape), "dtype": str(array.dtype)}
    if array.size <= INLINE and array.dtype.kind in "biuf" and np.isfinite(array).all():
        return {**known, "values": array.ravel().tolist()}
    return {**known, "sha256": hashlib.sha256(array.tobytes()).hexdigest()}


def _fingerprint(value: Any) -> dict[str, Any]:
    """What tells a value from others without saying how to build it.

    A function: its source (a lambda: its code) and what it closes over. A partial or bound method: its parts. Anything
    else: its pickled bytes.
    """
    named = getattr(value, "__qualname__", type(value).__qualname__)
    known: dict[str, Any] = {"opaque": f"{getattr(value, '__module__', type(value).__module__)}.{named}"}
    if isinstance(value, partial):
        return {"opaque": "functools.partial", "bound": [_bound(v) for v in (value.func, value.args, value.keywords)]}
    if isinstance(value, MethodType):
        return {**known, "bound": [_bound(value.__func__), _bound(value.__self__)]}
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        defaults = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        source = None if value.__name__ == "<lambda>" else source_digest(value)
        return {**known, "code": source or _code(value.__code__), "bound": [_bound(v) for v in (*cells, *defaults)]}
    try:
        content = sorted(map(repr, value)) if isinstance(value, (set, frozenset)) else value
        return {**known, "sha256": hashlib.sha256(pickle.dumps(content, protocol=4)).hexdigest()}
    except (pickle.PicklingError, TypeError, AttributeError):
        return {**known, "source": source_digest(value)}


def _bound(value: Any) -> Any:
    """What a function closes over. Objects with a life of their own (caches) count by their class."""
    plain = (int, float, complex, str, tuple, list, dict, set, frozenset, Tensor, np.ndarray, np.generic)
    callables = (FunctionType, MethodType, partial)
    if value is None or isinstance(value, (*plain, *callables)) or dataclasses.is_dataclass(value):
        return encode(value)
    return {"opaque": f"{type(value).__module__}.{type(value).__qualname__}"}


def _code(code: CodeType) -> str:
    """Digest of compiled code: instructions, names and constants, wherever it was written."""
    constants = [_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    parts = (code.co_code.hex(), code.co_names, code.co_varnames, code.co_freevars, constants)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _lineage(value: Any) -> list[Any]:
    if not isinstance(value, type):
        return [value]
    ours = __package__ or "mfsde"
    return [
        c
        for c in value.__mro__
        if c is not object and (c is value or c.__module__.partition(".")[0] not in {ours, "builtins", "typing", "abc"})
    ]


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _git_commit() -> str:
    """The commit of mfsde's own source tree, with '+' when files differ from it; empty outside a checkout."""
    here = Path(__file__).resolve().parent
    if not (here.parent / ".git").exists():
        return ""
    try:
        commit = _git(here, "rev-parse", "HEAD")
        return commit + ("+" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
