"""JAX: one `jit` of a `lax.scan` over the keys of its own generator."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..workloads import DT, OU, Births, Case, Digits, digits, network_data
from . import Competitor, Run

# Without it float64 is not to be had; every array states its dtype, so float32 stays what it is.
jax.config.update("jax_enable_x64", True)

Drift = Callable[[Any, Any], Any]
ROWS = 256


def competitors() -> list[Competitor]:
    steps = {letter: functools.partial(prepared, make) for letter, make in DRIFTS.items()}
    return [Competitor("JAX", {**steps, "E": births}, dtypes=("float32",))]


def prepared(make: Callable[[Case], Drift], case: Case) -> Run:
    drift, start = make(case), jnp.asarray(case.start())
    noise, pull = case.noise * math.sqrt(DT), 0.0 if case.workload == "A" else 0.5 * case.noise**2

    def step(x: Any, key: Any) -> tuple[Any, None]:
        own, other = jax.random.split(key)
        z = jax.random.normal(own, x.shape, x.dtype)
        return x + DT * (drift(x, other) - pull * x) + noise * z, None

    return scanned(step, start)


def scanned(step: Callable[[Any, Any], tuple[Any, None]], start: Any) -> Run:
    @functools.partial(jax.jit, static_argnums=2)
    def solve(x: Any, key: Any, steps: int) -> Any:
        return lax.scan(step, x, jax.random.split(key, steps))[0]

    key = jax.random.key(1)
    return lambda steps: solve(start, key, steps).block_until_ready()


def ou(case: Case) -> Drift:
    return lambda x, key: -OU.kappa * x - OU.coupling * (x - x.mean(1, keepdims=True))


def attraction(case: Case) -> Drift:
    def at(x: Any, xi: Any) -> Any:
        apart = x - xi
        return (jnp.exp(-0.5 * (apart**2).sum(-1, keepdims=True)) * apart).mean(0)

    # All pairs at once would be an N x N array: rows in batches.
    return lambda x, key: lax.map(functools.partial(at, x[0]), x[0], batch_size=min(ROWS, case.n))[None]


def network(case: Case) -> Drift:
    z, y = (jnp.asarray(a, case.dtype) for a in network_data())

    def drift(x: Any, key: Any) -> Any:
        hidden = jnp.tanh(x[0, :, :-1] @ z.T)
        r = (y - x[0, :, -1] @ hidden / case.n) / len(y)
        return _pulled(x, hidden, z, r)

    return drift


def minibatches(case: Case) -> Drift:
    inputs, targets = (jnp.asarray(a, case.dtype) for a in digits())

    def drift(x: Any, key: Any) -> Any:
        z, y = inputs, targets
        if case.batch:
            rows = jax.random.randint(key, (case.batch,), 0, len(inputs))
            z, y = inputs[rows], targets[rows]
        hidden = jnp.tanh(x[0, :, :-1] @ z.T)
        f = Digits.scale / case.n * (x[0, :, -1] @ hidden)
        return _pulled(x, hidden, z, Digits.scale / len(y) * y * jax.nn.sigmoid(-y * f))

    return drift


def _pulled(x: Any, hidden: Any, z: Any, r: Any) -> Any:
    slope = x[0, :, -1:] * ((1 - hidden**2) @ (z * r[:, None]))
    return jnp.concatenate([slope, (hidden @ r)[:, None]], axis=1)[None]


DRIFTS: dict[str, Callable[[Case], Drift]] = {"A": ou, "B": attraction, "C": network, "D": minibatches}


def births(case: Case) -> Run:
    """Rates frozen over a step; everyone draws a partner, and those who do not ring write outside the array."""
    noise, n = case.noise * math.sqrt(DT), case.n

    def step(x: Any, key: Any) -> tuple[Any, None]:
        keys = jax.random.split(key, 3)
        x = (1 - DT) * x + noise * jax.random.normal(keys[0], x.shape, x.dtype)
        rate = 0.5 * Births.alpha * x**2
        rate = rate - rate.mean()
        rings = jax.random.uniform(keys[1], x.shape, x.dtype) < -jnp.expm1(-DT * jnp.abs(rate))
        own, other = jnp.arange(n), jax.random.randint(keys[2], (n,), 0, n)
        target = jnp.where(rings, jnp.where(rate > 0, own, other), n)
        source = jnp.where(rate > 0, other, own)
        return x.at[target].set(x[source], mode="drop"), None

    run = scanned(step, jnp.asarray(case.start()[0, :, 0]))
    return lambda steps: run(steps)[None, :, None]
