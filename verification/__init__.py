"""The statements of the source documents, each beside a measurement that can refute it.

    from mfsde.verification import dataset, verify
    found = verify("contraction", "003", quick=True)      # a Result for each item: verdict, findings, seconds
    table = dataset(found)                                # xarray, a row for each check

Imports everything below it: scenarios, analysis and the engine. Nothing imports it but the command line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .measurement import dataset as dataset
    from .measurement import verify as verify

__all__ = ["dataset", "verify"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in __all__:
        return getattr(import_module(".measurement", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}.")
