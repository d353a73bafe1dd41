"""diffrax: Euler with a constant step and UnsafeBrownianPath, its cheapest path for steps that are fixed.

Workload A only: what it adds to JAX, the solver and its noise, is what A measures.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import lineax

from ..workloads import DT, Case
from . import Competitor, Run
from .by_jax import DRIFTS, Drift


def competitors() -> list[Competitor]:
    return [Competitor("diffrax", {"A": functools.partial(prepared, DRIFTS["A"])}, dtypes=("float32",))]


def prepared(make: Callable[[Case], Drift], case: Case) -> Run:
    drift, shape = make(case), case.start().shape
    start = jnp.asarray(case.start()).ravel()

    def flow(t: Any, y: Any, args: Any) -> Any:
        return drift(y.reshape(shape), None).ravel()

    def diffusion(t: Any, y: Any, args: Any) -> Any:
        return lineax.DiagonalLinearOperator(jnp.full_like(y, case.noise))

    @jax.jit
    def solve(y: Any, end: Any, key: Any) -> Any:
        path = diffrax.UnsafeBrownianPath(shape=y.shape, key=key)
        terms = diffrax.MultiTerm(diffrax.ODETerm(flow), diffrax.ControlTerm(diffusion, path))
        found = diffrax.diffeqsolve(
            terms, diffrax.Euler(), 0.0, end, DT, y, saveat=diffrax.SaveAt(t1=True), max_steps=None,
            adjoint=diffrax.ForwardMode(),
        )  # fmt: skip
        return found.ys[-1].reshape(shape)

    key = jax.random.key(1)
    # The clock in float64, as x64 is on: float32 would end some runs with an additional step.
    return lambda steps: solve(start, jnp.float64(steps * DT), key).block_until_ready()
