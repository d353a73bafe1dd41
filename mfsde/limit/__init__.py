"""The deterministic N = ∞ side of a scenario: what its particles converge to, from the same definition.

* `evolve`: the limit in time by the method that the equation admits, one of
  * `fokker_planck`: the density on a grid, d <= 2; given the common noise where there is one,
  * `characteristics`: equations without noise, in any d,
  * `moments`: mean and covariance where they close, in any d; `gaussian_limit` makes a scenario's `limit` of them.
* `gibbs`, `gibbs_all`: stationary laws; `branch`, `critical`: along a parameter.
* `jko`: proximal steps in W₂, in relative entropy, or both; `gaussian_step` is the closed form.
* `sparse_measure`, `sparse_measure_over`: the global minimum over signed measures of neurons, with its duality gap.
* `flow`, `law_at`: a limit Dataset as a law at any time; `GridLaw`: a law on a grid.

Imported as a whole: a name here is the function, not the module of the same name.
"""

from .branches import branch as branch
from .branches import critical as critical
from .characteristics import characteristics as characteristics
from .convex import sparse_measure as sparse_measure
from .convex import sparse_measure_over as sparse_measure_over
from .evolution import evolve as evolve
from .fixed_points import StationaryLaw as StationaryLaw
from .flow import flow as flow
from .flow import law_at as law_at
from .fokker_planck import fokker_planck as fokker_planck
from .gibbs import gibbs as gibbs
from .gibbs import gibbs_all as gibbs_all
from .grid_law import GridLaw as GridLaw
from .jko import gaussian_step as gaussian_step
from .jko import jko as jko
from .moments import gaussian_limit as gaussian_limit
from .moments import moments as moments
