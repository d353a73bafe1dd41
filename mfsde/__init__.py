"""mfsde: McKean-Vlasov SDEs, their particle systems and their limits, from one definition.

Names are loaded at first use, so that `import mfsde` and the command line's help do not wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "measure": ("Dirac", "EmpiricalMeasure", "Gaussian", "Law", "Mixture", "Uniform"),
    "product": ("Product",),
    "kinetic": ("Kinetic", "KineticLangevin"),
    "energy": ("Energy", "interaction", "potential"),
    "pairwise.kernel": ("Kernel",),
    "activation": (),
    "network": ("Neuron", "risk"),
    "nonlinear_process": ("decoupled",),
    "langevin": ("MeanFieldLangevin",),
    "noise": ("Noise", "Stream"),
    "draws": ("Draws",),
    "sgd": ("NoisySGD",),
    "gradient_flow": ("GradientFlow",),
    "observables": ("Observable",),
    "solver": ("BlowUp",),
    "store": ("open_run",),
    "memory": ("DoesNotFit", "Plan"),
    "run": ("plan", "resume", "simulate", "sweep"),
    "sensitivity": ("differentiate",),
    "calibration": ("NotConverged", "fit"),
    "family": ("GradientFlowOf", "KineticOf", "LangevinOf", "NoisySGDOf", "compare", "members"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
# Modules that are used by their own name.
_MODULES = {
    *("model", "pairwise", "limit", "multilevel", "regularisers", "convex_sets", "homogeneous", "scenarios"),
    "analysis",
}

__all__ = sorted(_HOME)

# The same names for readers and type checkers.
if TYPE_CHECKING:
    from .calibration import NotConverged as NotConverged
    from .calibration import fit as fit
    from .draws import Draws as Draws
    from .energy import Energy as Energy
    from .energy import interaction as interaction
    from .energy import potential as potential
    from .family import GradientFlowOf as GradientFlowOf
    from .family import KineticOf as KineticOf
    from .family import LangevinOf as LangevinOf
    from .family import NoisySGDOf as NoisySGDOf
    from .family import compare as compare
    from .family import members as members
    from .gradient_flow import GradientFlow as GradientFlow
    from .kinetic import Kinetic as Kinetic
    from .kinetic import KineticLangevin as KineticLangevin
    from .langevin import MeanFieldLangevin as MeanFieldLangevin
    from .measure import Dirac as Dirac
    from .measure import EmpiricalMeasure as EmpiricalMeasure
    from .measure import Gaussian as Gaussian
    from .measure import Law as Law
    from .measure import Mixture as Mixture
    from .measure import Uniform as Uniform
    from .memory import DoesNotFit as DoesNotFit
    from .memory import Plan as Plan
    from .network import Neuron as Neuron
    from .network import risk as risk
    from .noise import Noise as Noise
    from .noise import Stream as Stream
    from .nonlinear_process import decoupled as decoupled
    from .observables import Observable as Observable
    from .pairwise.kernel import Kernel as Kernel
    from .product import Product as Product
    from .run import plan as plan
    from .run import resume as resume
    from .run import simulate as simulate
    from .run import sweep as sweep
    from .sensitivity import differentiate as differentiate
    from .sgd import NoisySGD as NoisySGD
    from .solver import BlowUp as BlowUp
    from .store import open_run as open_run


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _HOME:
        value = getattr(import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value
    if name in _HOMES or name in _MODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module 'mfsde' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__"})
