"""Random Fourier features: W(z) = W(0) E cos(ω·z), ω drawn from the spectrum of W (Bochner's theorem).

A. Rahimi & B. Recht, Random features for large-scale kernel machines, NeurIPS 2007.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..torus import period_lengths, shortest
from .kernel import Kernel, Pairs, Strategy

# A block of phases ω·x holds at most this many floats (4 MiB in float32).
PHASES = 1 << 20

# Particles of each replica whose median is the origin of phases.
MEDIAN = 1 << 10

# A declared spectrum is checked with this many independent scrambles of as many frequencies each.
SCRAMBLES, FREQUENCIES = 64, 256

# In units of 1 / median |ω|: differences are checked without gaps up to NEAR and sparsely up to FAR.
NEAR, FAR = 48, 400


class Spectrum(Protocol):
    """A law of frequencies: a `Law`, or anything that turns standard normal variates into samples row by row."""

    def __hash__(self) -> int:
        """Frequencies are drawn once for each spectrum."""
        ...

    @property
    def n_variates(self) -> int:
        """Number q of standard normal variates that make one sample."""
        ...

    def from_variates(self, z: Tensor) -> Tensor:
        """(D, q) -> (D, d)."""
        ...


@dataclass(frozen=True)
class Fourier(Strategy):
    """Σ_j w_j Ŵ(x_i - y_j) with Ŵ(z) = W(0)/D Σ_k cos(ω_k·z), ω_k from W's spectrum: O((N + M) D d) work, O(N) memory.

    For scalar kernels W and their gradients, ∇Ŵ(z) = -W(0)/D Σ_k ω_k sin(ω_k·z). Ŵ is an even, positive definite
    function of its own (negative definite where W(0) < 0): the approximate dynamics is the gradient flow of
    ½ ∬ Ŵ dm dm, in any dimension, and E Ŵ = W over seeds. The spectrum of exp(-|z|²/2ℓ²) is N(0, I/ℓ²); of
    exp(-|z|/ℓ) in one dimension, Cauchy's law of scale 1/ℓ; of cos(ω·z), the point ω.

    The error contract. Independent frequencies give Ŵ(z) a variance of at most W(0)²/2D·(1 + o(1)) (Rahimi & Recht,
    Claim 1). Scrambled Sobol points through the spectrum's variates stay unbiased over seeds and err less: 16 times
    less for a Gaussian kernel at D = 512 in d = 2, twice in d = 5, no more than independent ones from d = 10 on (A. B.
    Owen, J. Complexity 14, 1998). The declared spectrum is checked against W once per kernel, to 5 standard errors of
    2^14 frequencies (at most 0.03) and 1e-3 |W(0)|, at differences of random directions: in steps of half a length
    ℓ = 1 / median |ω| up to 48 ℓ, and of 5.5 ℓ up to 400 ℓ. Beyond, W is taken at its word. `Interaction.error`
    measures the error of a drift.

    Args:
        spectrum: law of ω, with the variates of a `Law`.
        n_features: D; a power of two suits Sobol points.
        seed: of the frequencies, in [0, 2^32): equal seeds give equal features.
        sampling: "sobol" or "independent".

    Raises:
        ValueError: parameters out of range; in `sums`: a vector kernel that is no known gradient, W(0) not finite or
            zero, a spectrum that is not W's or of another dimension, frequencies off a torus's dual lattice.

    """

    spectrum: Spectrum
    n_features: int = 512
    seed: int = 0
    sampling: str = "sobol"

    exact: ClassVar[bool] = False
    differentiable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        is_law = hasattr(self.spectrum, "from_variates") and hasattr(self.spectrum, "n_variates")
        if not (is_law and isinstance(self.spectrum, Hashable)):
            raise TypeError(
                f"Fourier: {self.spectrum!r:.60} is no law of frequencies; expected a hashable one with from_variates "
                "and n_variates, such as Gaussian([0, 0], 1 / ell**2) for exp(-|z|²/2ell²) in d = 2."
            )
        if not self.n_features >= 1:
            raise ValueError(f"Fourier: n_features = {self.n_features!r}; expected at least 1.")
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(
                f"Fourier: seed = {self.seed!r}; expected 0 <= seed < 2^32, of which torch's generators keep every bit."
            )
        if self.sampling not in ("sobol", "independent"):
            raise ValueError(f'Fourier: sampling = {self.sampling!r}; expected "sobol" or "independent".')

    def features(self) -> Tensor:
        """The frequencies ω_k, (D, d), in float64."""
        return _features(self.spectrum, self.n_features, self.seed, self.sampling)

    def sums(self, kernel: Kernel, pairs: Pairs) -> Tensor:
        """(R, M) for W, (R, M, d) for ∇W."""
        scalar = kernel.potential or kernel
        _check(self, kernel, pairs)
        omega = self.features().to(pairs.x)
        # Only differences count, and phases far from 0 would lose digits.
        origin = _centre(pairs.points.detach()) if pairs.period is None else pairs.x.new_zeros(())
        x, points = pairs.x - origin, pairs.points - origin
        cosines, sines = _transform(points, pairs.weights, omega)
        at_zero = scalar(x.new_zeros(1, x.shape[-1]))
        scale = at_zero / len(omega)
        if kernel.potential is None:
            sums = scale * _combined(x, omega, cosines, sines).squeeze(-1)
            return sums if pairs.own is None else sums - pairs.weights[:, pairs.own] * at_zero
        # sin ω·(x - y) = sin ω·x cos ω·y - cos ω·x sin ω·y; the term left out is zero.
        return scale * _combined(x, omega, sines * omega, -cosines * omega)


def _centre(points: Tensor) -> Tensor:
    """Where most particles are, whatever the others do: medians of components.    (R, N, d) -> (R, 1, d)."""
    some = points[:, :: math.ceil(points.shape[1] / MEDIAN)].sort(dim=1).values
    return some[:, some.shape[1] // 2].unsqueeze(1)


def _combined(x: Tensor, omega: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Σ_k a_k cos ω_k·x_i + b_k sin ω_k·x_i.    a, b: (R, D, k) -> (R, M, k)."""
    if torch.is_grad_enabled() and any(z.requires_grad for z in (x, a, b)):
        return torch.cat([c @ a + s @ b for c, s in _waves(x, omega)], 1)
    # Small results between large temporaries would keep the memory of all of them.
    out, start = x.new_empty(*x.shape[:2], a.shape[-1]), 0
    for c, s in _waves(x, omega):
        out[:, start : start + c.shape[1]] = c @ a + s @ b
        start += c.shape[1]
    return out


def _waves(x: Tensor, omega: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The waves cos ω·x and sin ω·x, (R, rows, D) each, block by block."""
    rows = max(1, PHASES // (len(omega) * len(x)))
    for k in range(0, x.shape[1], rows):
        phases = x[:, k : k + rows] @ omega.T
        yield phases.cos(), phases.sin()


def _transform(points: Tensor, weights: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_j w_j cos ω·y_j and Σ_j w_j sin ω·y_j, (R, D, 1) each."""
    cosines = sines = points.new_zeros((len(points), len(omega), 1))
    start = 0
    for c, s in _waves(points, omega):
        masses = weights[:, start : start + c.shape[1]].unsqueeze(-1)
        cosines, sines = cosines + c.mT @ masses, sines + s.mT @ masses
        start += c.shape[1]
    return cosines, sines


@functools.lru_cache(maxsize=16)
def _features(spectrum: Spectrum, n: int, seed: int, sampling: str) -> Tensor:
    return _frequencies(spectrum, n, seed, sampling)


def _frequencies(spectrum: Spectrum, n: int, seed: int, sampling: str) -> Tensor:
    """(n, d), float64."""
    q = spectrum.n_variates
    if sampling == "sobol" and q > 0:
        engine = torch.quasirandom.SobolEngine(q, scramble=True, seed=seed)
        # Multiples of 2^-30 in [0, 1): their cells' centres, so that 0 is none.
        z = torch.special.ndtri(engine.draw(n, dtype=torch.float64) + 2.0**-31)
    else:
        z = torch.randn(n, q, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return spectrum.from_variates(z).detach()


# What must hold of a kernel -------------------------------------------------------------------------------------------


def _check(strategy: Fourier, kernel: Kernel, pairs: Pairs) -> None:
    """Once for a kernel."""
    lengths = tuple(period_lengths(pairs.period, pairs.x.shape[-1]))
    facts, key = kernel.facts(pairs.x), (Fourier, strategy.spectrum, lengths, pairs.x.dtype, pairs.x.device)
    if key not in facts:
        with torch.no_grad():
            _check_kernel(strategy.spectrum, kernel, pairs.x, lengths)
        facts[key] = True


def _check_kernel(spectrum: Spectrum, kernel: Kernel, like: Tensor, lengths: tuple[float, ...]) -> None:
    scalar, d = kernel.potential or kernel, like.shape[-1]
    dim = _probe(spectrum).shape[-1]
    if dim != d:
        raise ValueError(f"Fourier: the spectrum has frequencies in dimension {dim} and particles live in {d}.")
    at_zero = scalar(like.new_zeros(1, d))
    if at_zero.shape != (1,):
        raise ValueError(
            f"Fourier: {kernel.name} has values of shape {tuple(at_zero.shape[1:])} and is not known as a gradient; "
            "features approximate an even scalar W and its ∇W. For a drift that is ∇W * μ, use "
            "interaction(W, strategy=Fourier(...)).intrinsic_derivative, or Kernel(W, Fourier(...)).slope; else "
            'strategy="exact".'
        )
    size = float(at_zero)
    if not math.isfinite(size) or size == 0:
        raise ValueError(
            f"Fourier: {scalar.name} is {size} at 0, and features give W(0) E cos(ω·z), |W| <= |W(0)| < ∞. Subtract a "
            'constant from W, regularise it, or use strategy="exact".'
        )
    _check_torus(spectrum, lengths)
    z, expected, error = _expected(spectrum)
    values = _precisely(scalar, shortest(z, lengths), like)
    deviation = (values - size * expected).abs() / abs(size)
    excess = deviation - 5 * error - 1e-3
    worst = int(torch.nan_to_num(excess, nan=math.inf).argmax())
    if not float(excess[worst]) <= 0:
        raise ValueError(
            f"Fourier: the spectrum is not that of {scalar.name}: at z = {[round(float(c), 4) for c in z[worst]]}, "
            f"W(z)/W(0) = {float(values[worst]) / size:.4g} and E cos(ω·z) = "
            f"{float(expected[worst]):.4g} ± {float(error[worst]):.1g}. W must be positive definite up to its sign, "
            "and ω have its spectrum: N(0, I/ℓ²) for exp(-|z|²/2ℓ²)."
        )


def _precisely(kernel: Kernel, z: Tensor, like: Tensor) -> Tensor:
    """K(z) in double precision where K takes it: phases at large distances have few digits in single precision."""
    try:
        return kernel(z.to(like.device)).double().cpu()
    except RuntimeError:
        # It multiplies by a matrix of the particles' dtype.
        return kernel(z.to(like)).double().cpu()


@functools.lru_cache(maxsize=4)
def _probe(spectrum: Spectrum) -> Tensor:
    """Frequencies for checks, (SCRAMBLES, FREQUENCIES, d)."""
    return torch.stack([_frequencies(spectrum, FREQUENCIES, seed, "sobol") for seed in range(SCRAMBLES)])


@functools.lru_cache(maxsize=64)
def _expected(spectrum: Spectrum) -> tuple[Tensor, Tensor, Tensor]:
    """Differences of the spectrum's own scale, E cos(ω·z) there and its standard error, (Z, d), (Z,), (Z,)."""
    omega = _probe(spectrum)
    # A law of frequencies may have no moments.
    scale = 1 / float(omega.norm(dim=-1).median().clamp(min=1e-30))
    # Near 0 by its shape; then wherever W might be something, in steps of such lengths, and once more far out.
    near, apart, far = (2.0 ** torch.linspace(-3, 3, 64), torch.arange(8.5, NEAR, 0.5), torch.arange(NEAR, FAR, 5.5))
    lengths = torch.cat([near, apart, far]).double()
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(len(lengths), omega.shape[-1], generator=generator, dtype=torch.float64)
    z = direction / direction.norm(dim=-1, keepdim=True) * (scale * lengths).unsqueeze(-1)
    means = torch.cat([torch.cos(omega @ part.T).mean(1) for part in z.split(64)], -1)
    return z, means.mean(0), means.std(0) / SCRAMBLES**0.5


def _check_torus(spectrum: Spectrum, lengths: tuple[float, ...]) -> None:
    """Frequencies of periodic components are whole multiples of 2π/p."""
    omega = _probe(spectrum)
    for i, length in enumerate(lengths):
        if not math.isfinite(length):
            continue
        turns = omega[..., i] * (length / (2 * math.pi))
        if float((turns - turns.round()).abs().max()) > 1e-6:
            raise ValueError(
                f"Fourier: component {i} has period {length:.6g}, and cos(ω·z) has it only where ω is a whole multiple "
                "of 2π/period. Declare a discrete spectrum (a Mixture of Dirac points on these multiples), or use Grid "
                "in d <= 2."
            )
