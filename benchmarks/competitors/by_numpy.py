"""Loops written by hand in numpy: buffers, in-place updates, its own generator (PCG64)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ..workloads import DT, OU, Births, Case, Digits, digits, network_data
from . import Competitor, Run

Array = np.ndarray
BLOCK = 1 << 17


def competitors() -> list[Competitor]:
    return [Competitor("numpy", {"A": ou, "B": attraction, "C": network, "D": minibatches, "E": births})]


def ou(case: Case) -> Run:
    shrink, pull, noise = 1 - (OU.kappa + OU.coupling) * DT, OU.coupling * DT, case.noise * math.sqrt(DT)

    def run(steps: int) -> Array:
        rng, x = np.random.default_rng(1), case.start().copy()
        z = np.empty_like(x)
        for _ in range(steps):
            rng.standard_normal(out=z, dtype=x.dtype)
            mean = x.mean(1, keepdims=True)
            x *= x.dtype.type(shrink)
            z *= x.dtype.type(noise)
            z += x.dtype.type(pull) * mean
            x += z
        return x

    return run


def euler(case: Case, drift: Callable[[Array], Array], rng: np.random.Generator | None = None) -> Run:
    """One replica; the drift at σ = 0."""
    sigma = case.noise

    def run(steps: int) -> Array:
        own, x = rng or np.random.default_rng(1), case.start()[0].copy()
        z = np.empty_like(x)
        for _ in range(steps):
            moved = drift(x)
            moved *= x.dtype.type(DT)
            x *= x.dtype.type(1 - 0.5 * sigma**2 * DT)
            x += moved
            own.standard_normal(out=z, dtype=x.dtype)
            z *= x.dtype.type(sigma * math.sqrt(DT))
            x += z
        return x[None]

    return run


def attraction(case: Case) -> Run:
    n, dtype = case.n, case.dtype
    rows = max(1, min(n, BLOCK // n))
    block = np.empty((rows, n), dtype)
    sums = np.empty((n, 3), dtype)

    def drift(x: Array) -> Array:
        half = -0.5 * np.square(x).sum(1, keepdims=True)
        one = np.ones_like(half)
        left, right, ones = np.hstack([x, half, one]), np.hstack([x, one, half]).T.copy(), np.hstack([x, one])
        for k in range(0, n, rows):
            part = block[: min(rows, n - k)]
            np.matmul(left[k : k + rows], right, out=part)
            np.exp(part, out=part)
            np.matmul(part, ones, out=sums[k : k + rows])
        return (sums[:, :2] - x * sums[:, 2:]) / x.dtype.type(n)

    return euler(case, drift)


def network(case: Case) -> Run:
    z, y = (a.astype(case.dtype) for a in network_data())
    hidden = np.empty((case.n, len(z)), case.dtype)

    def drift(x: Array) -> Array:
        np.matmul(x[:, :-1], z.T, out=hidden)
        np.tanh(hidden, out=hidden)
        r = (y - x[:, -1] @ hidden / x.dtype.type(len(x))) / x.dtype.type(len(y))
        return _pulled(x, hidden, z, r)

    return euler(case, drift)


def minibatches(case: Case) -> Run:
    inputs, targets = (a.astype(case.dtype) for a in digits())
    rng = np.random.default_rng(1)

    def drift(x: Array) -> Array:
        rows = rng.integers(len(inputs), size=case.batch) if case.batch else slice(None)
        z, y = inputs[rows], targets[rows]
        hidden = np.tanh(x[:, :-1] @ z.T)
        f = x.dtype.type(Digits.scale / len(x)) * (x[:, -1] @ hidden)
        r = x.dtype.type(Digits.scale / len(y)) * y / (1 + np.exp(y * f))
        return _pulled(x, hidden, z, r)

    return euler(case, drift, rng)


def _pulled(x: Array, hidden: Array, z: Array, r: Array) -> Array:
    out = np.empty_like(x)
    out[:, -1] = hidden @ r
    np.square(hidden, out=hidden)
    np.subtract(1, hidden, out=hidden)
    np.multiply(hidden @ (z * r[:, None]), x[:, -1:], out=out[:, :-1])
    return out


def births(case: Case) -> Run:
    """Rates frozen over a step; ringers act at once."""

    def run(steps: int) -> Array:
        rng, x = np.random.default_rng(1), case.start()[0, :, 0].copy()
        z, u = np.empty_like(x), np.empty_like(x)
        for _ in range(steps):
            rng.standard_normal(out=z, dtype=x.dtype)
            z *= x.dtype.type(case.noise * math.sqrt(DT))
            x *= x.dtype.type(1 - DT)
            x += z
            rate = np.square(x) * x.dtype.type(0.5 * Births.alpha)
            rate -= rate.mean()
            rng.random(out=u, dtype=x.dtype)
            rings = np.flatnonzero(u < -np.expm1(-DT * np.abs(rate)))
            other = rng.integers(len(x), size=len(rings))
            dies = rate[rings] > 0
            x[np.where(dies, rings, other)] = x[np.where(dies, other, rings)]
        return x[None, :, None]

    return run
