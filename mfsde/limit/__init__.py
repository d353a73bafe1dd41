"""The deterministic N = ∞ side of a scenario: what its particles converge to, from the same definition."""

from .flow import flow as flow
from .flow import law_at as law_at
from .fokker_planck import fokker_planck as fokker_planck
from .grid_law import GridLaw as GridLaw
