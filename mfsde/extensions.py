"""The compiled extensions of the engine, and the threads that they may use."""

from __future__ import annotations

import os
from importlib import import_module
from types import ModuleType

import torch  # before any extension, so that all share one OpenMP runtime

_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


# The OpenMP runtime of the parent has threads that a fork does not copy; waiting for them would never end.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def extension(name: str) -> ModuleType | None:
    """The compiled module of this name; None where it was not built."""
    try:
        return import_module(f".{name}", __package__)
    except ImportError:
        return None


def threads() -> int:
    """Torch's number of threads; one in a process that was forked."""
    return 1 if _forked else torch.get_num_threads()
