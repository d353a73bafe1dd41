"""The deterministic N = ∞ side of a scenario: what its particles converge to, from the same definition."""

from .branches import branch as branch
from .branches import critical as critical
from .characteristics import characteristics as characteristics
from .flow import flow as flow
from .flow import law_at as law_at
from .fokker_planck import fokker_planck as fokker_planck
from .gibbs import StationaryLaw as StationaryLaw
from .gibbs import gibbs as gibbs
from .gibbs import gibbs_all as gibbs_all
from .grid_law import GridLaw as GridLaw
from .jko import gaussian_step as gaussian_step
from .jko import jko as jko
from .moments import gaussian_limit as gaussian_limit
from .moments import moments as moments
