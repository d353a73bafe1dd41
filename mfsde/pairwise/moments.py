"""Sums over pairs that factorise: polynomial kernels by moments, separable ones by features. O(N) in place of O(N²)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..torus import period_lengths
from . import expression as ex
from .expression import Expression
from .kernel import Kernel, Pairs, Strategy
from .trace import Trace, UntraceableError, trace

HIGHEST_DEGREE = 6
MOST_MONOMIALS = 1000
# Sums over atoms go in blocks of this many, so that threads and other replicas do not change their rounding.
BLOCK = 4096
# Monomials of some rows or atoms hold at most this many floats (16 MiB in float32), and stay in the cache if they can.
MONOMIAL_FLOATS = 1 << 22
ROWS = 8 * BLOCK

Index = tuple[int, ...]
Polynomial = Mapping[Index, float]


class NotPolynomialError(ValueError):
    """Why a kernel is no polynomial."""


@dataclass(frozen=True)
class Moments(Strategy):
    """Σ_j w_j K(x_i - y_j) of a polynomial K by the moments of the atoms: O((N + M) · monomials).

    K(z) = Σ_α c_α z^α is read off the kernel's operations, exactly, and expanded about the weighted mean of the atoms
    by the binomial theorem. degree: of K, a declaration that is checked; None takes the degree that is found.

    Raises (in `sums`):
        ValueError: K is no polynomial, has a higher degree than declared or than 6, more than 1000 monomials, or the
            differences live on a torus.

    """

    degree: int | None = None
    exact: ClassVar[bool] = True
    differentiable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.degree is not None and (not isinstance(self.degree, int) or self.degree < 0):
            raise ValueError(f"Moments(degree={self.degree!r}): expected a whole number >= 0, or None to find it.")

    def sums(self, kernel: Kernel, pairs: Pairs) -> Tensor:
        """(R, M, *out)."""
        period = period_lengths(pairs.period, pairs.x.shape[-1])
        if not all(map(math.isinf, period)):
            raise ValueError(
                f"Moments: a polynomial is not periodic, and the differences have period {pairs.period}. Use another "
                "exact strategy, or Separable for a trigonometric kernel."
            )
        try:
            found = trace(kernel, pairs.x)
            polynomials = polynomial(found)
        except (UntraceableError, NotPolynomialError) as error:
            raise ValueError(
                f'Moments: the kernel {kernel.name} is no polynomial of z: {error}. Use strategy="exact".'
            ) from error
        self._check(kernel, polynomials, pairs.x.dtype)
        # By a power of two nothing is rounded, and powers of z stay within the range of float32.
        unit = _unit(polynomials)
        scaled = pairs if unit == 1.0 else replace(pairs, x=pairs.x / unit, points=pairs.points / unit)
        values = _expanded(_in_units(polynomials, unit), scaled)
        return values.reshape(*values.shape[:2], *found.shape)

    def _check(self, kernel: Kernel, polynomials: Sequence[Polynomial], dtype: torch.dtype) -> None:
        degree = _degree(polynomials)
        if self.degree is not None and degree > self.degree:
            raise ValueError(
                f"Moments(degree={self.degree}): the kernel {kernel.name} has degree {degree}. Declare that, or None."
            )
        if degree > HIGHEST_DEGREE:
            raise ValueError(
                f"Moments: the kernel {kernel.name} has degree {degree}; beyond {HIGHEST_DEGREE} its expansion loses "
                'too many digits. Use strategy="exact".'
            )
        if not _fits(polynomials, dtype):
            raise ValueError(
                f"Moments: the coefficients of the kernel {kernel.name} are too far apart for {dtype}, in whatever "
                'unit of length. Use float64, or strategy="blocked".'
            )


def degree_of(kernel: Kernel, like: Tensor) -> int | None:
    """The degree of a polynomial kernel that `Moments` takes, None for every other.    like: (..., d).

    It runs the kernel once, in a millisecond, and remembers the answer.
    """
    try:
        polynomials = polynomial(trace(kernel, like))
    except (UntraceableError, NotPolynomialError):
        return None
    degree = _degree(polynomials)
    return degree if degree <= HIGHEST_DEGREE and _fits(polynomials, like.dtype) else None


# From expressions to polynomials --------------------------------------------------------------------------------------


def polynomial(found: Trace) -> tuple[Polynomial, ...]:
    """For each entry of K(z), the coefficient of each monomial z^α.

    Raises:
        NotPolynomialError: an operation that no polynomial has, or too many monomials.

    """
    if "polynomial" not in found.made:
        try:
            found.made["polynomial"] = _polynomials(found)
        except NotPolynomialError as error:
            found.made["polynomial"] = error
    made: tuple[Polynomial, ...] | NotPolynomialError = found.made["polynomial"]
    if isinstance(made, NotPolynomialError):
        raise made
    return made


def _polynomials(found: Trace) -> tuple[Polynomial, ...]:
    known: dict[Expression, Polynomial] = {}
    for node in ex.in_order(found.outputs):
        known[node] = _polynomial(node, [known[a] for a in node.args], found.dim)
        if len(known[node]) > MOST_MONOMIALS:
            raise NotPolynomialError(f"it has more than {MOST_MONOMIALS} monomials")
    return tuple(known[e] for e in found.outputs)


def _polynomial(node: Expression, args: Sequence[Polynomial], dim: int) -> Polynomial:
    if node.is_constant:
        if not math.isfinite(node.value):
            raise NotPolynomialError(f"it contains {node.value}")
        return {(0,) * dim: node.value} if node.value else {}
    if node.op == "component":
        return {tuple(int(k == node.index) for k in range(dim)): 1.0}
    if node.op in ("add", "sub"):
        return _total(args[0], args[1], 1.0 if node.op == "add" else -1.0)
    if node.op == "neg":
        return {index: -c for index, c in args[0].items()}
    if node.op == "mul":
        return _product(*args)
    raise NotPolynomialError(f"it contains {'a quotient' if node.op == 'div' else node.op}")


def _total(a: Polynomial, b: Polynomial, sign: float) -> Polynomial:
    return {i: c for i in {**a, **b} if (c := a.get(i, 0.0) + sign * b.get(i, 0.0))}


def _product(a: Polynomial, b: Polynomial) -> Polynomial:
    if len(a) * len(b) > MOST_MONOMIALS**2:
        raise NotPolynomialError(f"it has more than {MOST_MONOMIALS} monomials")
    result: dict[Index, float] = {}
    for (i, c), (j, e) in itertools.product(a.items(), b.items()):
        index = tuple(map(sum, zip(i, j, strict=True)))
        result[index] = result.get(index, 0.0) + c * e
    if not all(map(math.isfinite, result.values())):
        raise NotPolynomialError("its coefficients leave the range of float64")
    return {i: c for i, c in result.items() if c}


def _unit(polynomials: Sequence[Polynomial]) -> float:
    """A length in which the leading coefficients are near 1; 1 where they are not far from it."""
    degree = _degree(polynomials)
    leading = max((abs(c) for p in polynomials for index, c in p.items() if sum(index) == degree), default=0.0)
    if degree == 0 or leading == 0 or 1e-12 <= leading <= 1e12:
        return 1.0
    return 2.0 ** -round(math.log2(leading) / degree)


def _in_units(polynomials: Sequence[Polynomial], unit: float) -> list[Polynomial]:
    return [{index: c * unit ** sum(index) for index, c in p.items()} for p in polynomials]


def _fits(polynomials: Sequence[Polynomial], dtype: torch.dtype) -> bool:
    coefficients = [abs(c) for p in _in_units(polynomials, _unit(polynomials)) for c in p.values()]
    return max(coefficients, default=0.0) <= torch.finfo(dtype).max


def _degree(polynomials: Sequence[Polynomial]) -> int:
    return max((sum(index) for p in polynomials for index in p), default=0)


# Sums by moments ------------------------------------------------------------------------------------------------------


def _expanded(polynomials: Sequence[Polynomial], pairs: Pairs) -> Tensor:
    """Σ_α c_α Σ_{β≤α} binom(α, β) x^β Σ_j w_j (-y_j)^{α-β}, x and y about a common centre.    (R, M, outputs)."""
    centre = _centre(pairs)
    lower = sorted({beta for p in polynomials for alpha in p for beta in _below(alpha)}, key=lambda i: (sum(i), i))
    moments = _moments(lower, centre, pairs)
    coefficients = [_coefficients(p, moments) for p in polynomials]
    rows = _chunk(lower, len(pairs.x))
    parts = []
    for begin in range(0, pairs.x.shape[1], rows):
        x = pairs.x[:, begin : begin + rows]
        parts.append(_evaluated(lower, coefficients, [x[..., k] - centre[..., k] for k in range(x.shape[-1])], x))
    values = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return values if pairs.own is None else values - _own_terms(polynomials, pairs)


def _centre(pairs: Pairs) -> Tensor:
    """The mean of the atoms by the size of their masses: any centre gives the sum, a near one its digits. (R, 1, d)."""
    with torch.no_grad():
        if _stays_uniform(pairs.weights):
            return pairs.points.mean(1, keepdim=True)
        sizes = pairs.weights.abs()
        sizes = sizes / sizes.sum(-1, keepdim=True).clamp_min(torch.finfo(sizes.dtype).tiny)
        return (sizes.unsqueeze(-1) * pairs.points).sum(1, keepdim=True)


def _stays_uniform(weights: Tensor) -> bool:
    """Whether all atoms of a replica have one mass, by the layout, and stay so under differentiation."""
    return weights.stride(-1) == 0 and not weights.requires_grad


def _below(alpha: Index) -> list[Index]:
    return list(itertools.product(*(range(a + 1) for a in alpha)))


def _chunk(indices: Sequence[Index], replicas: int) -> int:
    """Rows or atoms whose monomials are held at a time: whole blocks."""
    fitting = MONOMIAL_FLOATS // max(1, len(indices) * replicas) // BLOCK * BLOCK
    return max(BLOCK, min(ROWS, fitting))


def _moments(indices: Sequence[Index], centre: Tensor, pairs: Pairs) -> dict[Index, Tensor]:
    """Σ_j w_j (-y_j)^γ in double precision.    (R,) each."""
    n, weights = pairs.points.shape[1], pairs.weights
    chunk, uniform = _chunk(indices, len(pairs.x)), _stays_uniform(weights)
    totals: dict[Index, Tensor] = {}
    for begin in range(0, n, chunk):
        part = slice(begin, begin + chunk)
        y = [centre[..., k] - pairs.points[:, part, k] for k in range(pairs.x.shape[-1])]
        for index, monomial in _monomials(indices, y, None if uniform else weights[:, part]):
            if monomial is not None:
                total = _total_over_atoms(monomial)
                totals[index] = totals[index] + total if begin else total
    if not uniform:
        return totals
    mass = weights[:, 0].double()
    return {i: mass * totals[i] if i in totals else mass * n for i in indices}


def _monomials(
    indices: Sequence[Index], components: Sequence[Tensor], first: Tensor | None
) -> list[tuple[Index, Tensor | None]]:
    """The monomials first · v^γ, each from one of a lower degree; None stands for 1."""
    known: dict[Index, Tensor | None] = {}
    for index in indices:
        last = max((k for k, a in enumerate(index) if a), default=None)
        if last is None:
            known[index] = first
            continue
        parent = known[tuple(a - (k == last) for k, a in enumerate(index))]
        known[index] = components[last] if parent is None else parent * components[last]
    return list(known.items())


def _total_over_atoms(values: Tensor) -> Tensor:
    n = values.shape[-1]
    whole = n // BLOCK * BLOCK
    head = values[..., :whole].unflatten(-1, (-1, BLOCK)).sum(-1).double().sum(-1) if whole else 0.0
    return head + values[..., whole:].sum(-1).double()


def _coefficients(p: Polynomial, moments: Mapping[Index, Tensor]) -> dict[Index, Tensor]:
    """Of x^β: Σ_{α≥β} c_α binom(α, β) M_{α-β}.    (R,) each."""
    result: dict[Index, Tensor] = {}
    for alpha, c in p.items():
        for beta in _below(alpha):
            rest = tuple(a - b for a, b in zip(alpha, beta, strict=True))
            term = c * math.prod(map(math.comb, alpha, beta)) * moments[rest]
            result[beta] = result[beta] + term if beta in result else term
    return result


def _evaluated(
    indices: Sequence[Index], coefficients: Sequence[Mapping[Index, Tensor]], x: Sequence[Tensor], like: Tensor
) -> Tensor:
    """Polynomials of the rows, term by term: a matrix product would round differently for other rows."""
    totals: list[Tensor | None] = [None] * len(coefficients)
    for index, monomial in _monomials(indices, x, None):
        for k, known in enumerate(coefficients):
            if index in known:
                c, total = known[index].to(like.dtype).unsqueeze(-1), totals[k]
                if monomial is None:
                    totals[k] = c.expand(like.shape[:-1])
                else:
                    totals[k] = monomial * c if total is None else torch.addcmul(total, monomial, c)
    return torch.stack([like.new_zeros(like.shape[:-1]) if t is None else t for t in totals], dim=-1)


def _own_terms(polynomials: Sequence[Polynomial], pairs: Pairs) -> Tensor:
    at_zero = pairs.x.new_tensor([p.get((0,) * pairs.x.shape[-1], 0.0) for p in polynomials])
    return pairs.weights[:, pairs.own].unsqueeze(-1) * at_zero


# Declared features ----------------------------------------------------------------------------------------------------

# Pairs on which the identity is checked: this many rows and atoms.
SAMPLE = 16
Features = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Separable(Strategy):
    """K(x - y) = Σ_r left_r(x) right_r(y) by declared features: O((N + M) r).

    left: (..., d) -> (..., r, *out), right: (..., d) -> (..., r); cos(x - y) = cos x cos y + sin x sin y is
    `Separable(f, f)` with f(x) = (cos x, sin x). The identity is checked on pairs of the first sum of a kernel. In
    sums of ∇W the features are those of W, and left is differentiated.

    Raises (in `sums`):
        ValueError: the identity fails, with the largest discrepancy.

    """

    left: Features
    right: Features
    exact: ClassVar[bool] = True
    differentiable: ClassVar[bool] = True

    def sums(self, kernel: Kernel, pairs: Pairs) -> Tensor:
        """(R, M, *out)."""
        self._check(kernel if kernel.potential is None else kernel.potential, pairs)
        right = self.right(pairs.points)
        total = torch.einsum("rn,rnk->rk", pairs.weights, right).unsqueeze(1)
        if pairs.own is not None:
            total = total - pairs.weights[:, pairs.own].unsqueeze(-1) * right[:, pairs.own]
        sums = Kernel(lambda x: _contracted(self.left(x), total))
        return sums(pairs.x) if kernel.potential is None else sums.slope(pairs.x)

    def _check(self, kernel: Kernel, pairs: Pairs) -> None:
        checked: set[Separable] = kernel.facts(pairs.x).setdefault("separable", set())
        if self in checked:
            return
        with torch.no_grad():
            rows = torch.linspace(0, pairs.x.shape[1] - 1, SAMPLE, device=pairs.x.device).long().unique()
            atoms = torch.linspace(0, pairs.points.shape[1] - 1, SAMPLE, device=pairs.x.device).long().unique()
            some = Pairs(pairs.x[:, rows], pairs.points[:, atoms], pairs.weights[:, atoms], pairs.period)
            z = some.differences(slice(None))
            # A kernel that is singular at 0 is not separable there; the pairs of a particle with itself tell nothing.
            apart = z.abs().amax(-1) > 0
            left, right = self.left(some.x).unsqueeze(2), self.right(some.points).unsqueeze(1)
            _check_shapes(left, right, kernel(z))
            declared = _contracted(left, right)
            true = kernel(z)
            apart = apart.reshape(apart.shape + (1,) * (true.ndim - apart.ndim)).expand(true.shape)
            gap, size = (declared - true).abs()[apart], true.abs()[apart]
            tolerance = 1e-9 if true.dtype == torch.float64 else 1e-4
            if gap.numel() and not float(gap.max()) <= tolerance * max(float(size.max()), float(left.abs().max())):
                raise ValueError(
                    f"Separable: Σ_r left_r(x) right_r(y) differs from {kernel.name}(x - y) by up to "
                    f"{float(gap.max()):.3g} where the kernel is at most {float(size.max()):.3g}. Check the features, "
                    'or use strategy="exact".'
                )
        checked.add(self)


def _check_shapes(left: Tensor, right: Tensor, values: Tensor) -> None:
    r = right.shape[-1]
    if right.ndim != 4 or left.ndim < 4 or left.shape[3] != r or left.shape[4:] != values.shape[3:]:
        raise ValueError(
            f"Separable: left returned {tuple(left.shape[3:])} and right {tuple(right.shape[3:])} for each point; "
            f"expected (r, {', '.join(map(str, values.shape[3:]))}) and (r,) with one r."
        )


def _contracted(left: Tensor, right: Tensor) -> Tensor:
    """Σ_r left_r right_r.    (..., r, *out), (..., r) -> (..., *out)."""
    axis = right.ndim - 1
    return (left * right.reshape(right.shape + (1,) * (left.ndim - right.ndim))).sum(axis)
