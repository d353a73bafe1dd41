"""Who takes the steps of the workloads: one file for each library, imported when it is asked for.

A competitor prepares a case and gets a function of the number of steps, which takes them from the case's start and
returns the particles, (R, N, d). Each writes the step as a careful user of that library would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any

from ..workloads import Case

Run = Callable[[int], Any]
Prepare = Callable[[Case], Run]

FILES = ("engine", "by_torch", "by_torchsde", "by_numpy", "by_jax", "by_diffrax", "by_numba", "by_keops", "by_sisyphe")
# Packages besides those that mfsde needs itself: module -> the name that pip installs.
NEEDS = {
    "by_jax": {"jax": "jax"},
    "by_diffrax": {"jax": "jax", "diffrax": "diffrax"},
    "by_numba": {"numba": "numba"},
    "by_keops": {"pykeops": "pykeops"},
    "by_sisyphe": {"pykeops": "pykeops", "sisyphe": "sisyphe"},
}


@dataclass(frozen=True)
class Competitor:
    """Name, steps by workload, and where they run.

    tolerance: relative to the largest drift, how far the drift may be from the plain one; None where it is random.
    strategy: of the engine's pairwise sums, whose error is then reported.
    """

    name: str
    prepare: Mapping[str, Prepare]
    dtypes: tuple[str, ...] = ("float32", "float64")
    devices: tuple[str, ...] = ("cpu",)
    tolerance: float | None = 2e-4
    strategy: Any = None


def installed() -> tuple[list[Competitor], dict[str, str]]:
    """Those whose packages are here, and why the others are not."""
    found, missing = [], {}
    for name in FILES:
        absent = [package for module, package in NEEDS.get(name, {}).items() if find_spec(module) is None]
        if absent:
            missing[name.removeprefix("by_")] = f"not installed: {', '.join(absent)}"
            continue
        try:
            found += import_module(f".{name}", __package__).competitors()
        except Exception as problem:
            missing[name.removeprefix("by_")] = f"installed, but {type(problem).__name__}: {problem}"
    return found, missing


def versions() -> dict[str, str]:
    packages = {package for needs in NEEDS.values() for package in needs.values()} | {"jaxlib"}
    found = {}
    for package in sorted(packages):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
