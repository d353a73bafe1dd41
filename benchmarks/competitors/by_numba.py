"""numba: whole runs in `njit(parallel=True, fastmath=True)`, one `prange` over the particles a step."""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange

from ..workloads import DT, OU, Births, Case, network_data
from . import Competitor, Run

# The compiler reads it as a constant.
ALPHA = Births.alpha


def competitors() -> list[Competitor]:
    return [Competitor("numba", {"A": ou, "B": attraction, "C": network, "E": births})]


def ou(case: Case) -> Run:
    of = np.dtype(case.dtype).type
    numbers = (
        of(1 - (OU.kappa + OU.coupling) * DT), of(OU.coupling * DT), of(case.noise * math.sqrt(DT)),
    )  # fmt: skip

    def run(steps: int) -> np.ndarray:
        x = case.start()[:, :, 0].copy()
        _ou(x, steps, *numbers)
        return x[:, :, None]

    return run


@njit(parallel=True, fastmath=True)
def _ou(x, steps, shrink, pull, noise):
    replicas, n = x.shape
    flat = x.reshape(-1)
    shift = np.empty(replicas, x.dtype)
    for _ in range(steps):
        for r in range(replicas):
            total = 0.0
            for i in prange(n):
                total += x[r, i]
            shift[r] = pull * total / n
        for i in prange(replicas * n):
            flat[i] = shrink * flat[i] + shift[i // n] + noise * flat.dtype.type(np.random.standard_normal())


def attraction(case: Case) -> Run:
    of = np.dtype(case.dtype).type
    numbers = (of(DT / case.n), of(1 - 0.5 * case.noise**2 * DT), of(case.noise * math.sqrt(DT)))

    def run(steps: int) -> np.ndarray:
        # Components apart: the inner loop then reads along rows.
        x = case.start()[0].T.copy()
        _attraction(x, np.empty_like(x), steps, *numbers, of(-0.5))
        return x.T[None]

    return run


@njit(parallel=True, fastmath=True)
def _attraction(x, moved, steps, h, shrink, noise, half):
    n = x.shape[1]
    zero = half - half
    for _ in range(steps):
        for i in prange(n):
            a, b, u, v = x[0, i], x[1, i], zero, zero
            for j in range(n):
                p, q = x[0, j] - a, x[1, j] - b
                e = math.exp(half * (p * p + q * q))
                u += e * p
                v += e * q
            moved[0, i] = shrink * a + h * u + noise * x.dtype.type(np.random.standard_normal())
            moved[1, i] = shrink * b + h * v + noise * x.dtype.type(np.random.standard_normal())
        x[:] = moved


def network(case: Case) -> Run:
    of = np.dtype(case.dtype).type
    z, y = (a.astype(case.dtype) for a in network_data())
    numbers = (of(DT), of(1 - 0.5 * case.noise**2 * DT), of(case.noise * math.sqrt(DT)))
    transposed = np.ascontiguousarray(z.T)

    def run(steps: int) -> np.ndarray:
        x = case.start()[0].copy()
        _network(x, z, transposed, y, steps, *numbers)
        return x[None]

    return run


@njit(parallel=True, fastmath=True)
def _network(x, z, transposed, y, steps, h, shrink, noise):
    n, p, size = len(x), z.shape[1], len(z)
    one = shrink / shrink
    for _ in range(steps):
        alpha, beta = np.ascontiguousarray(x[:, :p]), np.ascontiguousarray(x[:, p])
        hidden = np.dot(alpha, transposed)
        for i in prange(n):
            for s in range(size):
                hidden[i, s] = math.tanh(hidden[i, s])
        f = np.dot(beta, hidden)
        r = np.empty_like(y)
        for s in range(size):
            r[s] = (y[s] - f[s] / x.dtype.type(n)) / x.dtype.type(size)
        output = np.dot(hidden, r)
        weighted = np.empty_like(z)
        for s in range(size):
            for k in range(p):
                weighted[s, k] = z[s, k] * r[s]
        for i in prange(n):
            for s in range(size):
                hidden[i, s] = one - hidden[i, s] * hidden[i, s]
        pulled = np.dot(hidden, weighted)
        for i in prange(n):
            for k in range(p):
                x[i, k] = shrink * x[i, k] + h * beta[i] * pulled[i, k]
                x[i, k] += noise * x.dtype.type(np.random.standard_normal())
            x[i, p] = shrink * x[i, p] + h * output[i] + noise * x.dtype.type(np.random.standard_normal())


def births(case: Case) -> Run:
    of = np.dtype(case.dtype).type

    def run(steps: int) -> np.ndarray:
        x = case.start()[0, :, 0].copy()
        _births(x, np.empty_like(x), steps, DT, of(case.noise * math.sqrt(DT)))
        return x[None, :, None]

    return run


@njit(parallel=True, fastmath=True)
def _births(x, rate, steps, h, noise):
    """Transport in parallel; the jumps in turn, as they write where others read."""
    n = len(x)
    for _ in range(steps):
        total = 0.0
        for i in prange(n):
            x[i] = (1 - h) * x[i] + noise * np.random.standard_normal()
            rate[i] = 0.5 * ALPHA * x[i] * x[i]
            total += rate[i]
        mean = total / n
        for i in range(n):
            signed = rate[i] - mean
            # The chord of 1 - e^{-s} is below s: most are sent away without an exponential.
            u = np.random.random()
            if u < h * abs(signed) and u < -math.expm1(-h * abs(signed)):
                other = np.random.randint(n)
                if signed > 0:
                    x[i] = x[other]
                else:
                    x[other] = x[i]
