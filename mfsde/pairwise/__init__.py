"""Sums over pairs, Σ_j w_j K(x_i - x_j): kernels, and the strategies that evaluate them.

`mfsde.Kernel(K, strategy=...)` and `mfsde.interaction(W, strategy=...)` take a strategy, or the name of one that needs
no parameters. "exact", the default, chooses among the exact ones by kernel, size and work.
"""

from __future__ import annotations

from .blocked import Blocked
from .convolution import Exact, error
from .kernel import Kernel, Pairs, Strategy

__all__ = ["Blocked", "Exact", "Kernel", "Pairs", "Strategy", "error"]
