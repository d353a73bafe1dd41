"""Scenarios: equations with their parameters and references, ready to run.

Each is a frozen dataclass; `BUILT_IN` lists them for the command line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .double_well import DoubleWell as DoubleWell
    from .gaussian_langevin import GaussianLangevin as GaussianLangevin
    from .isotropic_gaussians import IsotropicGaussians as IsotropicGaussians
    from .kuramoto import Kuramoto as Kuramoto
    from .mean_field_ou import MeanFieldOU as MeanFieldOU
    from .two_layer_network import TwoLayerNetwork as TwoLayerNetwork
    from .variable_selection import VariableSelection as VariableSelection

# Name -> module and a line on what it is: readable without importing torch.
BUILT_IN = {
    "MeanFieldOU": ("mean_field_ou", "mean-field Ornstein-Uhlenbeck, Gaussian, solvable (d any)"),
    "DoubleWell": ("double_well", "Desai-Zwanzig: double well with attraction to the mean, phase transition in sigma"),
    "GaussianLangevin": ("gaussian_langevin", "mean-field Langevin dynamics that stays Gaussian, solvable (d any)"),
    "TwoLayerNetwork": ("two_layer_network", "mean-field Langevin training of a two-layer network on bundled data"),
    "Kuramoto": ("kuramoto", "noisy identical oscillators on the circle, synchrony for K > sigma^2"),
    "IsotropicGaussians": ("isotropic_gaussians", "network telling two Gaussians apart, reduced to norms of weights"),
    "VariableSelection": ("variable_selection", "ReLU network selecting variables, reduced to (a, b, r1, r2)"),
}

__all__ = ["BUILT_IN", *sorted(BUILT_IN)]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in BUILT_IN:
        return getattr(import_module(f".{BUILT_IN[name][0]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; scenarios: {', '.join(BUILT_IN)}")
