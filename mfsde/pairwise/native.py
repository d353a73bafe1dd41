"""From C source to a function in this process: the system's compiler, a folder of the user, ctypes."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

# No -ffast-math: linking with it makes every number of the process below 1e-38 a zero, and lets NaN be anything.
_PORTABLE = ("-O3", "-fPIC", "-shared", "-ffp-contract=off", "-fopenmp-simd", "-w")
_FAST = (*_PORTABLE, "-march=native", "-fno-math-errno", "-fno-trapping-math")
# Attempts in order: vector forms of the mathematical functions, this machine's instructions, anything.
ATTEMPTS = (
    (*_FAST, "-mprefer-vector-width=512", "-fno-tree-sink", "-fno-thread-jumps", "-DVECTOR_MATH"),
    _FAST,
    _PORTABLE,
)
_LIBRARIES = {0: ("-lmvec", "-lm")}
SECONDS = 60
# Libraries that are kept; those that were used longest ago give way.
KEPT = 256


class NoCompilerError(RuntimeError):
    """Why there is no compiled function."""


@functools.cache
def compiler() -> tuple[str, ...]:
    """The command of the C compiler: $CC, cc or gcc.

    Raises:
        NoCompilerError: there is none.

    """
    for command in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        words = tuple(shlex.split(command))
        if words and shutil.which(words[0]):
            return words
    raise NoCompilerError("no C compiler was found (tried $CC, cc, gcc, clang)")


def library(source: str) -> Any:
    """The function `sums` of a C source, compiled at most once per machine and user.

    Raises:
        NoCompilerError: no compiler, or none of the attempts gave a library that loads.

    """
    problem = ""
    for attempt, flags in enumerate(ATTEMPTS):
        words = (*flags, *_LIBRARIES.get(attempt, ("-lm",)))
        path = folder() / f"{_digest(source, words)}.so"
        try:
            if path.exists():
                # A file that no longer loads is made anew.
                with contextlib.suppress(OSError):
                    os.utime(path)
                    return _loaded(path)
            _build(source, words, path)
            _keep_the_last(path)
            return _loaded(path)
        except (OSError, subprocess.SubprocessError) as error:
            problem = problem or str(error)
    raise NoCompilerError(f"the C compiler {' '.join(compiler())} gave no library: {problem:.300}")


def folder() -> Path:
    """Where compiled kernels are kept: $XDG_CACHE_HOME/mfsde/kernels, readable by the user alone."""
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
        path = Path(home) / "mfsde" / "kernels"
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _is_mine(path):
            return path
    except (OSError, RuntimeError):
        pass  # a read-only disk, or a user without a home
    return _passing_folder()


@functools.cache
def _passing_folder() -> Path:
    """A folder for this process, where no other can be had."""
    return Path(tempfile.mkdtemp(prefix="mfsde-kernels-"))


def _keep_the_last(made: Path) -> None:
    """Remove what was used longest ago. A library that a process has loaded stays with it."""
    used = []
    for path in made.parent.glob("*.so"):
        with contextlib.suppress(OSError):
            used.append((path.stat().st_mtime_ns, path))
    for _, path in sorted(used)[:-KEPT]:
        if path != made:
            with contextlib.suppress(OSError):
                path.unlink()


def _is_mine(path: Path) -> bool:
    """Code is loaded from here: a folder that others may write to is none."""
    status = path.stat()
    # Where there are no users, a home is nobody else's.
    of_user = not hasattr(os, "getuid") or (status.st_uid == os.getuid() and not status.st_mode & 0o022)
    return of_user and os.access(path, os.W_OK)


def _digest(source: str, flags: tuple[str, ...]) -> str:
    said = "\0".join([source, *flags, *compiler(), _version(), _processor()])
    return hashlib.sha256(said.encode()).hexdigest()[:32]


@functools.cache
def _version() -> str:
    return subprocess.run([*compiler(), "--version"], capture_output=True, text=True, timeout=SECONDS).stdout


@functools.cache
def _processor() -> str:
    """What "native" means: a library made for one machine may stop another."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))}))
    return platform.processor() + platform.machine()


def _build(source: str, flags: tuple[str, ...], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as place:
        code, made = Path(place) / "kernel.c", Path(place) / "kernel.so"
        code.write_text(source)
        command = [*compiler(), *flags[:-2], "-o", str(made), str(code), *flags[-2:]]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        if done.returncode:
            raise OSError(done.stderr or f"exit status {done.returncode}")
        os.replace(made, path)


def _loaded(path: Path) -> Any:
    function = ctypes.CDLL(str(path)).sums
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [*(pointer,) * 4, *(integer,) * 4, ctypes.c_double, pointer]
    function.restype = None
    return function
