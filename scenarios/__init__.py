"""Scenarios: equations with their parameters and references, ready to run.

Each is a frozen dataclass; `BUILT_IN` lists them for the command line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .black_scholes import BlackScholes as BlackScholes
    from .common_noise_ou import CommonNoiseOU as CommonNoiseOU
    from .consensus import ConsensusBased as ConsensusBased
    from .correlated_noise import CorrelatedLinear as CorrelatedLinear
    from .cucker_smale import CuckerSmale as CuckerSmale
    from .curie_weiss import CurieWeiss as CurieWeiss
    from .deep_network import DeepNetwork as DeepNetwork
    from .double_well import DoubleWell as DoubleWell
    from .gaussian_langevin import GaussianLangevin as GaussianLangevin
    from .granular_media import GranularMedia as GranularMedia
    from .isotropic_gaussians import IsotropicGaussians as IsotropicGaussians
    from .kinetic_double_well import KineticDoubleWell as KineticDoubleWell
    from .kuramoto import Kuramoto as Kuramoto
    from .kuramoto_frequencies import KuramotoFrequencies as KuramotoFrequencies
    from .mean_field_gbm import MeanFieldGBM as MeanFieldGBM
    from .mean_field_ou import MeanFieldOU as MeanFieldOU
    from .mixture_birth_death import GaussianMixture as GaussianMixture
    from .moving_wall import MovingWall as MovingWall
    from .online_gaussians import OnlineGaussians as OnlineGaussians
    from .online_variable_selection import OnlineVariableSelection as OnlineVariableSelection
    from .planted_network import PlantedNetwork as PlantedNetwork
    from .rank_based import RankBased as RankBased
    from .reflected_interaction import ReflectedInteraction as ReflectedInteraction
    from .sparse_spikes import SparseSpikes as SparseSpikes
    from .spherical_spin import SphericalSpin as SphericalSpin
    from .stein import SteinVariational as SteinVariational
    from .student_teacher import StudentTeacher as StudentTeacher
    from .two_layer_network import TwoLayerNetwork as TwoLayerNetwork
    from .two_populations import TwoPopulations as TwoPopulations
    from .variable_selection import VariableSelection as VariableSelection

# Name -> module and a line on what it is: readable without importing torch.
BUILT_IN = {
    "MeanFieldOU": ("mean_field_ou", "mean-field Ornstein-Uhlenbeck, Gaussian, solvable (d any)"),
    "DoubleWell": ("double_well", "Desai-Zwanzig: double well with attraction to the mean, phase transition in sigma"),
    "GaussianLangevin": ("gaussian_langevin", "mean-field Langevin dynamics that stays Gaussian, solvable (d any)"),
    "TwoLayerNetwork": ("two_layer_network", "mean-field Langevin training of a two-layer network on bundled data"),
    "Kuramoto": ("kuramoto", "noisy identical oscillators on the circle, synchrony for K > sigma^2"),
    "KuramotoFrequencies": (
        "kuramoto_frequencies",
        "oscillators with random frequencies, Ott-Antonsen",
    ),
    "KineticDoubleWell": ("kinetic_double_well", "the double well with velocities and friction, product invariant law"),
    "GranularMedia": ("granular_media", "cubic attraction, O(N log N) on the line; cooling and contraction (d any)"),
    "CurieWeiss": ("curie_weiss", "continuous spins in their mean field, exact critical coupling (d any)"),
    "MeanFieldGBM": (
        "mean_field_gbm",
        "geometric Brownian motion with its mean in both coefficients, closed moments",
    ),
    "CommonNoiseOU": (
        "common_noise_ou",
        "Ornstein-Uhlenbeck with common noise, Gaussian given it (d any)",
    ),
    "CorrelatedLinear": ("correlated_noise", "linear with full matrices, correlated own and common noise (d any)"),
    "ReflectedInteraction": ("reflected_interaction", "attraction to the mean between two reflecting walls"),
    "MovingWall": (
        "moving_wall",
        "Brownian particles before a moving wall, uniform laws exact",
    ),
    "CuckerSmale": ("cucker_smale", "flocking: velocities align, two-particle closed form (d any)"),
    "RankBased": ("rank_based", "drift by rank, Burgers' equation in the limit, solvable by Cole-Hopf"),
    "SteinVariational": ("stein", "Stein variational gradient descent to a mixture of Gaussians, closed moments"),
    "ConsensusBased": ("consensus", "consensus-based optimisation: finds minimisers without gradients (d any)"),
    "TwoPopulations": (
        "two_populations",
        "two linear populations in one run, the label frozen in the state, solvable",
    ),
    "GaussianMixture": ("mixture_birth_death", "neurons that learn a Gaussian mixture by births and deaths"),
    "SparseSpikes": (
        "sparse_spikes",
        "sparse deconvolution on the torus, a non-smooth particle gradient flow",
    ),
    "StudentTeacher": ("student_teacher", "ReLU network learning another one, arc-cosine loss, births and deaths"),
    "PlantedNetwork": (
        "planted_network",
        "two-layer networks fitted to a planted one: homogeneous neurons, non-smooth regularisers",
    ),
    "SphericalSpin": ("spherical_spin", "the spherical 3-spin energy learnt by a network, a fresh batch a step"),
    "OnlineGaussians": (
        "online_gaussians",
        "SGD of a network telling two Gaussians apart, a fresh sample a step",
    ),
    "IsotropicGaussians": ("isotropic_gaussians", "network telling two Gaussians apart, reduced to norms of weights"),
    "OnlineVariableSelection": (
        "online_variable_selection",
        "SGD of a ReLU network selecting variables, a fresh sample a step",
    ),
    "BlackScholes": ("black_scholes", "correlated geometric Brownian motions, prices by Feynman-Kac (d any)"),
    "DeepNetwork": ("deep_network", "mean-field Langevin training of a mean of deep networks on a small regression"),
    "VariableSelection": ("variable_selection", "ReLU network selecting variables, reduced to (a, b, r1, r2)"),
}

__all__ = ["BUILT_IN", *sorted(BUILT_IN)]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in BUILT_IN:
        return getattr(import_module(f".{BUILT_IN[name][0]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; scenarios: {', '.join(BUILT_IN)}")
