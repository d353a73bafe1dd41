"""Analysis: datasets and laws in, datasets or numbers out. Nothing here simulates.

What one calls: `wasserstein` (distances), `unbalanced` (measures of other mass), `rates`, `chaos` (particles against
their limit), `control_variates` (fewer replicas for one error), `entropy`, `theory` and `contraction` (theorems as
checks), `plots`, `overview` (all of it for one run).

What they stand on:
    runs as arrays, errors: `particles`, `labels`, `replicas`
    transport: `ground`, `line`, `bures`, `laws`, `floor`, `sinkhorn`
    entropy: `neighbours`, `log_density`, `normalisation`, `quadrature`, `annealing`, `score_matching`
    theorems: `check`, `dynamics` (which equation a run follows), `gibbs`, `free_energy`
    pictures: `axes`, `curves`, `clouds`, `limits`, `histograms`, `animations`, `fields`
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

_MODULES = frozenset(file.stem for file in Path(__file__).parent.glob("[a-z]*.py"))


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its modules: {', '.join(sorted(_MODULES))}.")
