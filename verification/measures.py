"""Measures of neurons: what homogeneous functions see of them on the sphere, and a norm in which they converge."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

from mfsde import EmpiricalMeasure
from mfsde.analysis import unbalanced
from mfsde.analysis.check import identity
from mfsde.homogeneous import of_amplitudes, on_sphere

from .item import Finding, claim, item, misprint, outside

Array = np.ndarray

# The image on the sphere ----------------------------------------------------------------------------------------------

# A fixed input of the units below.
INPUT = torch.tensor([0.6, -1.1, 0.4], dtype=torch.float64)
# Deviation of every component of a Gaussian law of neurons.
DEVIATION = 0.7
# Along this one the law has a mean.
SHIFT = torch.tensor([0.5, -0.3, 0.2, 0.4], dtype=torch.float64)


def unit(u: Tensor) -> Tensor:
    """Φ(a, b) = a [b·x]_+ at one input: 2-homogeneous in (a, b).    (..., 4) -> (...)."""
    return u[..., 0] * torch.relu(u[..., 1:] @ INPUT)


def biased_unit(u: Tensor) -> Tensor:
    """Φ(a, b) = a tanh(b·x), which is 1-homogeneous in a and not homogeneous in (a, b)."""
    return u[..., 0] * torch.tanh(u[..., 1:] @ INPUT)


def inhomogeneity(phi: Callable[[Tensor], Tensor], u: Tensor, degree: float) -> str:
    """What is seen to fail where φ(2u) is not 2^p φ(u)."""
    gap = float((phi(2 * u) - 2**degree * phi(u)).abs().max())
    return f"Φ(2u) differs from {2**degree:g} Φ(u) by up to {gap:.2g}" if gap > 1e-12 * float(u.abs().max()) else ""


def rectified_mean(mean: float, deviation: float) -> float:
    """E [G]_+ for G ~ N(mean, deviation²)."""
    z = mean / deviation
    return mean * 0.5 * math.erfc(-z / math.sqrt(2)) + deviation * math.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)


@item(
    source="000, operator h",
    statement="∫ φ dh(μ) = ∫ |u|² φ(u/|u|) dμ: h(μ) has the mass ∫|u|² dμ, and ∫Φ dh(μ) = ∫Φ dμ for 2-homogeneous Φ; "
    "for Φ = wφ(θ), ∫Φ dμ = ∫φ dν with ν the amplitudes on θ",
    hypotheses=("Φ(λu) = λ²Φ(u) for λ > 0 (checked at λ = 2)",),
    fault="masses are first moments, as for a 1-homogeneous Φ",
)
def sphere(quick: bool, faulty: bool) -> Iterator[Finding]:
    """Identities of one sample to rounding, and Gaussian laws in closed form by replicas."""
    n_replicas, n = (32, 2000) if quick else (128, 20_000)
    generator = torch.Generator().manual_seed(11)
    u = SHIFT + DEVIATION * torch.randn(n_replicas, n, 4, generator=generator, dtype=torch.float64)
    mu = EmpiricalMeasure(u)
    image = on_sphere(mu, degree=1.0 if faulty else 2.0)
    mass, moment = image.weights.sum(-1), mu.integrate(lambda u: u.square().sum(-1))
    yield claim(identity(f"mass of h(μ), one sample of {n}", float(mass[0]), float(moment[0])))
    second = 4 * DEVIATION**2 + float(SHIFT.square().sum())
    yield claim(identity(f"mass of h(μ) against E|u|² of the law, R = {n_replicas}", mass.numpy(), second))
    yield claim(
        identity(
            f"∫ a[b·x]₊ dh(μ) = ∫ a[b·x]₊ dμ, one sample of {n}",
            float(image.integrate(unit)[0]),
            float(mu.integrate(unit)[0]),
            hypotheses=[inhomogeneity(unit, u[0], 2.0)],
        )
    )
    preactivation = rectified_mean(float(SHIFT[1:] @ INPUT), DEVIATION * float(INPUT.norm()))
    yield claim(
        identity(
            f"∫ a[b·x]₊ dh(μ); E a E[b·x]₊ of the law, R = {n_replicas}",
            image.integrate(unit).numpy(),
            float(SHIFT[0]) * preactivation,
        )
    )
    nu = of_amplitudes(mu)
    yield claim(
        identity(
            "∫ φ dν = ∫ wφ(θ) dμ, φ = tanh(θ·x): no sphere for θ",
            float(nu.integrate(lambda b: torch.tanh(b @ INPUT))[0]),
            float(mu.integrate(biased_unit)[0]),
        )
    )
    # E|w| = E w₊ + E w₋ of N(SHIFT₀, DEVIATION²).
    first = float(SHIFT[0])
    variation = rectified_mean(first, DEVIATION) + rectified_mean(-first, DEVIATION)
    yield claim(identity("total variation of ν against E|w|", nu.weights.abs().sum(-1).numpy(), variation))
    yield outside(
        identity(
            "∫Φ dh(μ) = ∫Φ dμ for Φ = a tanh(b·x)",
            float(image.integrate(biased_unit)[0]),
            float(mu.integrate(biased_unit)[0]),
            hypotheses=[inhomogeneity(biased_unit, u[0], 2.0)],
        )
    )


# The bounded-Lipschitz norm -------------------------------------------------------------------------------------------


def dirac(mass: float, place: float) -> tuple[Array, Array]:
    """Mass at a place of the line, as atoms."""
    return np.array([[place]]), np.array([mass])


def total_variation(a: tuple[Array, Array], b: tuple[Array, Array]) -> float:
    """Sup ∫ φ d(a - b) over |φ| ≤ 1 alone: the sum of |masses| of the difference, atom by atom."""
    places = np.unique(np.concatenate([a[0], b[0]]))
    return float(sum(abs(a[1][a[0][:, 0] == x].sum() - b[1][b[0][:, 0] == x].sum()) for x in places))


def dual_value(a: tuple[Array, Array], b: tuple[Array, Array], convention: str) -> float:
    """The supremum over φ on the atoms as a linear program, which knows nothing of transport.

    Variables φ_i on the atoms and s: |φ_i| ≤ s, |φ_i - φ_j| ≤ ℓ |x_i - x_j|, with s = ℓ = 1 ("max") or ℓ = 1 - s
    ("sum"). What is bounded on the atoms extends to the space with the same bounds.
    """
    x = np.concatenate([a[0], b[0]])
    n = len(x)
    i, j = (k.ravel() for k in np.nonzero(~np.eye(n, dtype=bool)))
    r = np.linalg.norm(x[i] - x[j], axis=-1)
    steep = np.zeros((len(i), n + 1))
    steep[np.arange(len(i)), i], steep[np.arange(len(i)), j] = 1.0, -1.0
    height = np.zeros((2 * n, n + 1))
    height[np.arange(n), np.arange(n)], height[n + np.arange(n), np.arange(n)] = 1.0, -1.0
    height[:, n] = -1.0
    bound = r.copy()
    if convention == "sum":
        steep[:, n] = r
    share = (1.0, 1.0) if convention == "max" else (0.0, 1.0)
    found = linprog(
        np.concatenate([-a[1], b[1], [0.0]]),
        A_ub=np.concatenate([steep, height]),
        b_ub=np.concatenate([bound, np.zeros(2 * n)]),
        bounds=[(None, None)] * n + [share],
        method="highs",
    )
    return -float(found.fun)


@item(
    source="000, BL norm",
    statement="‖μ - ν‖ = sup ∫φ d(μ - ν): {|φ| ≤ 1, Lip ≤ 1} is transport at cost min(r, 2), unequal masses through a "
    "node at cost 1; {|φ| + Lip ≤ 1} is max_s transport at cost min((1-s)r, 2s), that node at cost s; both metrise the "
    "weak convergence of non-negative measures",
    hypotheses=("φ Lipschitz as well as bounded", "μ, ν finite and non-negative"),
    misprints=(
        'printed: sup over |φ| ≤ 1 alone, "some Lipschitz conditions" being ignored in a footnote; without them it is '
        "total variation, 2 for any two distinct Diracs, and δ_{1/n} → δ_0 does not converge",
    ),
    fault="lengths are doubled: Lip φ ≤ 2",
)
def bounded_lipschitz(quick: bool, faulty: bool) -> Iterator[Finding]:
    """Two Diracs in closed form, clouds against the dual program, weak convergence."""
    stretch = 2.0 if faulty else 1.0

    def norm(a: tuple[Array, Array], b: tuple[Array, Array], convention: str = "max") -> float:
        return unbalanced.bounded_lipschitz((stretch * a[0], a[1]), (stretch * b[0], b[1]), convention=convention)

    for r in (0.3, 1.4, 5.0):
        a, b = dirac(1.0, 0.0), dirac(1.0, r)
        yield claim(identity(f"δ_0 against δ_{r}, |φ| ≤ 1, Lip ≤ 1: min(r, 2)", norm(a, b), min(r, 2.0)))
        yield claim(identity(f"δ_0 against δ_{r}, |φ| + Lip ≤ 1: 2r/(2 + r)", norm(a, b, "sum"), 2 * r / (2 + r)))
    for p, q, r in ((1.5, 0.4, 0.8), (0.2, 1.0, 3.0)):
        value = abs(p - q) + min(p, q) * min(r, 2.0)
        yield claim(
            identity(f"{p}δ_0 against {q}δ_{r}: |a−b| + min(a,b) min(r,2)", norm(dirac(p, 0), dirac(q, r)), value)
        )
    n = 12 if quick else 40
    rng = np.random.default_rng(5)
    a, b = ((rng.normal(size=(n, 2)), rng.uniform(0.0, scale, n)) for scale in (0.2, 0.3))
    for convention, told in (("max", "|φ| ≤ 1, Lip ≤ 1"), ("sum", "|φ| + Lip ≤ 1")):
        # Both programs and the maximum over s are solved to 1e-9 of the masses or better.
        yield claim(
            identity(
                f"{n} and {n} atoms of a plane, {told}: transport; dual",
                norm(a, b, convention),
                dual_value(a, b, convention),
                discretisation=1e-8,
            )
        )
    for k in (10, 1000):
        a, b = dirac(1.0, 1 / k), dirac(1.0, 0.0)
        yield claim(identity(f"δ_{{1/n}} → δ_0, n = {k}: 1/n", norm(a, b), 1 / k))
        yield misprint(identity(f"printed norm of δ_{{1/n}} − δ_0, n = {k}: 1/n", total_variation(a, b), 1 / k))
    apart = dirac(1.0, 0.0), dirac(1.0, 0.01)
    yield claim(identity("without Lip: total variation of δ_0 − δ_0.01", total_variation(*apart), 2.0))
