"""Sums over pairs, Σ_j w_j K(x_i - x_j): kernels, and the strategies that evaluate them.

`mfsde.Kernel(K, strategy=...)` and `mfsde.interaction(W, strategy=...)` take a strategy, or the name of one that needs
no parameters. "exact", the default, chooses among the exact ones by kernel, size and work.
"""

from __future__ import annotations

from .batches import Batches
from .blocked import Blocked
from .cells import Cells
from .compiled import Compiled
from .convolution import Exact, error
from .fourier import Fourier
from .grid import Grid
from .keops import KeOps
from .kernel import Kernel, Pairs, Strategy
from .moments import Moments, Separable

__all__ = [
    "Batches",
    "Blocked",
    "Cells",
    "Compiled",
    "Exact",
    "Fourier",
    "Grid",
    "KeOps",
    "Kernel",
    "Moments",
    "Pairs",
    "Separable",
    "Strategy",
    "error",
]
