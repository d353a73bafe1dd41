"""Multilevel against plain Monte Carlo at the same error: cost, time, and the powers of the tolerance.

python -m benchmarks.multilevel prints the tables of docs/multilevel.md; rows() is the part that `make bench` runs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import xarray as xr
from torch import Tensor

import mfsde
from mfsde import multilevel
from mfsde.scenarios import DoubleWell, MeanFieldOU
from mfsde.scenarios.mean_field_gbm import MeanFieldGBM

from .timing import row

OU = MeanFieldOU(kappa=1.0, coupling=0.5, sigma=0.7)
WELL = DoubleWell()
GBM = MeanFieldGBM()
HORIZON = 1.0
FALLING = (8, 4, 2, 1)


def second_moment(t: float, x: Tensor, mu: mfsde.EmpiricalMeasure) -> Tensor:
    """∫ x² dm."""
    return mu.integrate(lambda y: y.square().sum(-1))


def mean(t: float, x: Tensor, mu: mfsde.EmpiricalMeasure) -> Tensor:
    """∫ x dm."""
    return mu.mean()[..., 0, 0]


def curved(t: float, x: Tensor, mu: mfsde.EmpiricalMeasure) -> Tensor:
    """Sin 2m + ∫ x² dm, m the mean."""
    return torch.sin(2 * mu.mean()[..., 0, 0]) + second_moment(t, x, mu)


def cases() -> list[tuple[str, Any, Any, float, float, float]]:
    """Name, scenario, functional, coarsest step, smallest tolerance, truth."""
    law = OU.limit(HORIZON)
    m, v = float(law.mean[0]), float(law.cov[0, 0])
    limit = mfsde.limit.fokker_planck(WELL, None, [HORIZON])
    return [
        ("mean-field OU, sin 2m + E X²", OU, curved, 0.125, 0.002, math.sin(2 * m) + v + m * m),
        # The cube needs a step at which no particle explodes.
        ("double well, E X", WELL, mean, 0.0625, 0.001, float(limit["mean"][0, 0])),
        ("mean-field GBM, E X²", GBM, second_moment, 0.125, 0.004, GBM.moments(HORIZON)[1]),
    ]


def table(scenario: Any, functional: Any, dt: float, tolerance: float) -> xr.Dataset:
    """Several tolerances, plain Monte Carlo run beside them."""
    return multilevel.cost_table(
        scenario, functional, tolerances=[k * tolerance for k in FALLING], seed=1, run_plain=True, first_samples=20,
        horizon=HORIZON, dt=dt, n_particles=32,
    )  # fmt: skip


def rows() -> list[dict]:
    found = []
    for name, scenario, functional, dt, least, truth in cases():
        costs = table(scenario, functional, dt, least)
        last = costs.isel(tolerance=-1)
        error = abs(float(last.estimate) - truth)
        plain = f"plain {float(last.plain_cost):.2g}, {float(last.plain_seconds):.2f} s"
        share = float(last.cost / last.plain_cost)
        where = f"{name}, ε = {least:g}"
        found.append(row("multilevel", f"{where}: cost", float(last.cost), "particle-steps", plain, share, 0.1))
        seconds = float(last.seconds)
        found.append(
            row("multilevel", f"{where}: time", seconds, "s", plain, seconds / float(last.plain_seconds), None)
        )
        found.append(row("multilevel", f"{where}: error", error, "", "the law of the limit", error / least, 3.0))
        powers = f"plain ε^({float(costs.plain_slope):.2f} ± {float(costs.plain_slope_stderr):.2f})"
        gap = float(costs.slope - costs.plain_slope)
        found.append(row("multilevel", f"{name}: exponent of ε", float(costs.slope), "", powers, gap, None))
    return found


def main() -> None:
    torch.set_num_threads(1)
    for name, scenario, functional, dt, least, truth in cases():
        costs = table(scenario, functional, dt, least)
        print(f"\n{name}: {truth:.6f}\n")
        print("| ε | estimate − truth | levels | cost | plain cost | ratio | time, s | plain time, s |")
        print("|---|---|---|---|---|---|---|---|")
        for k in range(costs.sizes["tolerance"]):
            c = costs.isel(tolerance=k)
            print(
                f"| {float(c.tolerance):g} | {float(c.estimate) - truth:+.5f} | {int(c.n_levels)} | "
                f"{float(c.cost):.3g} | {float(c.plain_cost):.3g} | {float(c.plain_cost / c.cost):.1f} | "
                f"{float(c.seconds):.2f} | {float(c.plain_seconds):.2f} |"
            )
        print(
            f"\nexponents {float(costs.slope):.2f} ± {float(costs.slope_stderr):.2f}, plain "
            f"{float(costs.plain_slope):.2f} ± {float(costs.plain_slope_stderr):.2f}"
        )
    found = multilevel.estimate(
        OU, curved, tolerance=0.002, horizon=HORIZON, dt=0.125, n_particles=32, seed=1, first_samples=20
    )
    print("\n| level | dt | N | samples | mean | variance | kurtosis | share of the cost |")
    print("|---|---|---|---|---|---|---|---|")
    for level in found.level.values:
        c = found.sel(level=level)
        print(
            f"| {level} | {float(c.dt):g} | {int(c.n_particles)} | {int(c.n_samples)} | {float(c['mean']):.5f} | "
            f"{float(c.variance):.2e} | {float(c.kurtosis):.1f} | {float(c.n_samples * c.unit_cost / found.cost):.0%} |"
        )
    print({name: f"{float(found[name]):.2f} ± {float(found[name + '_stderr']):.2f}" for name in ("alpha", "beta")})


if __name__ == "__main__":
    main()
