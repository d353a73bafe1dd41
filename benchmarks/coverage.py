"""What 95 % intervals of `rates.exponential` cover: `python -m benchmarks.coverage [--repeats 400] [NAME ...]`.

Every repeat is a fresh set of runs (its own seed). A case says what the rate is in truth: Euler's own discrete rate for
the mean-field OU process, the spectral gap of the linearised Fokker-Planck operator for the double well. Reported are
the shares that were refused, that were flagged, and, of those answered without a flag, the share whose interval holds
the truth. Of the repeats whose interval misses the truth ("misleading"), the share that was refused or flagged. The
table goes to docs/coverage.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from scipy import sparse, stats
from scipy.sparse.linalg import splu

import mfsde
from mfsde.analysis import rates, wasserstein
from mfsde.analysis.gibbs import Gibbs
from mfsde.scenarios import DoubleWell, MeanFieldOU

DT = 0.01
KAPPA, COUPLING, SIGMA = 1.0, 0.5, 0.7
PULL = KAPPA + COUPLING
# Of Euler's scheme: stationary variance, and the rates of the mean and of the standard deviation.
VARIANCE = SIGMA**2 / (PULL * (2 - PULL * DT))
MEAN_RATE = -math.log1p(-KAPPA * DT) / DT
SCALE_RATE = -2 * math.log1p(-PULL * DT) / DT
OUT = Path("build/coverage.json")


@dataclass(frozen=True)
class Case:
    """Runs, the series made from them, the true rate, and where the fit begins."""

    name: str
    series: Callable[[int], xr.DataArray]
    exact: Callable[[tuple[float, ...]], np.ndarray]
    truth: float
    start: float | None = None


def ou(
    seed: int, *, d: int, n: int, r: int, horizon: float, every: int, mean: float = 1.0, scale: float = 1.0
) -> xr.Dataset:
    """Mean-field OU from N(m₀, scale²·v∞), |m₀| = mean."""
    scenario = MeanFieldOU(
        KAPPA, COUPLING, SIGMA, initial_mean=(mean / math.sqrt(d),) * d, initial_variance=scale**2 * VARIANCE
    )
    return mfsde.simulate(
        scenario, n_particles=n, n_replicas=r, horizon=horizon, dt=DT, seed=seed, save_every=every, dtype=torch.float64
    )


def invariant(d: int) -> mfsde.Gaussian:
    """Euler's stationary law in the limit N = ∞."""
    return mfsde.Gaussian([0.0] * d, VARIANCE)


def to_law(seed: int, **settings: Any) -> xr.DataArray:
    return wasserstein.to_law(ou(seed, **settings), invariant(settings["d"]))


def to_sample(seed: int, **settings: Any) -> xr.DataArray:
    """Against independent samples of the stationary law, by exact transport."""
    d, n, r = (settings[k] for k in ("d", "n", "r"))
    run = ou(seed, **settings)
    drawn = invariant(d).sample(n * r, torch.Generator().manual_seed(seed + 10_000)).numpy().reshape(r, n, d)
    reference = xr.DataArray(drawn, dims=("replica", "particle", "component"), coords={"replica": np.arange(r)})
    return wasserstein.debiased(run, reference, estimator="transport")


# The double well, above its critical σ, where the symmetric Gibbs law is the only one.

WELL = DoubleWell(theta=1.0, sigma=1.6, initial_mean=(0.6,), initial_variance=0.5)
WELL_DT = 0.0025


@cache
def gibbs() -> Gibbs:
    """m* ∝ exp(-(2/σ²)(V + θx²/2)), the self-consistent law of mean 0."""
    return Gibbs(lambda x: (-(2 / WELL.sigma**2) * (x**4 / 4 - x**2 / 2 + WELL.theta * x**2 / 2)).sum(-1))


class Well:
    """The double well's Fokker-Planck equation on a grid, written for f = m/m*, m* the Gibbs law.

    ∂_t m = ∂_x(T m* ∂_x f - θ m̄ m), T = σ²/2: the first term is linear and symmetric, the second carries the mean.
    """

    def __init__(self, well: DoubleWell = WELL, n: int = 2000, reach: float = 5.0) -> None:
        edges = np.linspace(-reach, reach, n + 1)
        self.theta, self.h = well.theta, edges[1] - edges[0]
        self.x, self.edges = (edges[1:] + edges[:-1]) / 2, edges
        temperature = well.sigma**2 / 2
        gibbs_at = [np.exp(-(z**4 / 4 - z**2 / 2 + well.theta * z**2 / 2) / temperature) for z in (self.x, edges[1:-1])]
        total = gibbs_at[0].sum() * self.h
        self.gibbs, face = (g / total for g in gibbs_at)
        # The flux through the inner faces, as matrices acting on m: diffusion, and transport by a unit mean.
        down = sparse.diags_array([-np.ones(n - 1), np.ones(n - 1)], offsets=[0, 1], shape=(n - 1, n))
        mean = sparse.diags_array([np.full(n - 1, 0.5)] * 2, offsets=[0, 1], shape=(n - 1, n))
        self.diffusion = -down.T @ sparse.diags_array(temperature * face / self.h**2) @ down
        self.diffusion = (self.diffusion @ sparse.diags_array(1 / self.gibbs)).tocsc()
        self.transport = (down.T @ mean).tocsc() * (well.theta / self.h)

    def rate(self) -> float:
        """The slowest rate of the equation linearised at the Gibbs law."""
        symmetric = self.diffusion.toarray() + np.outer(self.transport @ self.gibbs, self.x) * self.h
        values = np.linalg.eigvals(symmetric[::1]).real
        return float(-np.sort(values[values < -1e-6])[-1])

    def distances(self, times: np.ndarray, mean: float, variance: float, step: float = 1e-3) -> np.ndarray:
        """W₂ to the Gibbs law at the times, from a Gaussian (Crank-Nicolson, Adams-Bashforth for the mean)."""
        m = np.exp(-0.5 * (self.x - mean) ** 2 / variance)
        m /= m.sum() * self.h
        eye = sparse.eye_array(len(m), format="csc")
        solve = splu((eye - 0.5 * step * self.diffusion).tocsc()).solve
        pushed = [self._pushed(m)] * 2
        found, k = [], 0
        for t in times:
            while k < round(t / step):
                m = solve(m + 0.5 * step * (self.diffusion @ m) + step * (1.5 * pushed[1] - 0.5 * pushed[0]))
                pushed, k = [pushed[1], self._pushed(m)], k + 1
            found.append(self._to_gibbs(m))
        return np.array(found)

    def _pushed(self, m: np.ndarray) -> np.ndarray:
        return float(self.x @ m * self.h) * (self.transport @ m)

    def _to_gibbs(self, m: np.ndarray) -> float:
        u = (np.arange(200_000) + 0.5) / 200_000
        quantiles = [np.interp(u, np.concatenate([[0.0], np.cumsum(z) * self.h]), self.edges) for z in (m, self.gibbs)]
        return float(np.sqrt(np.mean((quantiles[0] - quantiles[1]) ** 2)))


@cache
def well_distances(times: tuple[float, ...]) -> np.ndarray:
    return Well().distances(np.array(times), WELL.initial_mean[0], WELL.initial_variance)


def ou_distances(times: tuple[float, ...], *, d: int, mean: float = 1.0, scale: float = 1.0, **_: Any) -> np.ndarray:
    """W₂ of Euler's mean-field OU to its stationary law: means and deviations decay by themselves."""
    steps = np.round(np.array(times) / DT)
    centre = mean * (1 - KAPPA * DT) ** steps
    variance = VARIANCE * (1 + (scale**2 - 1) * (1 - PULL * DT) ** (2 * steps))
    return np.sqrt(centre**2 + d * (np.sqrt(variance) - math.sqrt(VARIANCE)) ** 2)


def well_to_law(seed: int, *, n: int, r: int, horizon: float, every: int) -> xr.DataArray:
    run = mfsde.simulate(
        WELL, n_particles=n, n_replicas=r, horizon=horizon, dt=WELL_DT, seed=seed, save_every=every, dtype=torch.float64
    )
    return wasserstein.to_law(run, gibbs())


def cases() -> list[Case]:
    shift = {"horizon": 4.0, "every": 20}
    both = shift | {"scale": 2.5}
    pure = {"mean": 0.0, "scale": 1.1, "n": 2000, "r": 40, "horizon": 0.6, "every": 3}
    slow = {"n": 200, "r": 20, "horizon": 2.4, "every": 40}
    wide = {"mean": 0.0, "scale": 1.5, "n": 200, "r": 20, "horizon": 0.6, "every": 10}

    def made(name: str, how: Callable[..., xr.DataArray], truth: float, start: float | None = None, **s: Any) -> Case:
        return Case(name, partial(how, **s), partial(ou_distances, **s), truth, start)

    found = []
    for d in (1, 2, 10):
        label = f"d={d}, {'quantile' if d == 1 else 'Gaussian'}"
        found += [
            made(f"shift, {label}, R=20", to_law, MEAN_RATE, d=d, n=500, r=20, **shift),
            made(f"shift, {label}, R=8", to_law, MEAN_RATE, d=d, n=500, r=8, **shift),
            made(f"shift and scale 2.5, {label}", to_law, MEAN_RATE, d=d, n=500, r=20, **both),
            made(f"the same, start=1.6, {label}", to_law, MEAN_RATE, 1.6, d=d, n=2000, r=20, **both),
            made(f"scale 1.1, {label}", to_law, SCALE_RATE, d=d, **pure),
        ]
    for d in (2, 10):
        found += [
            made(f"shift, d={d}, transport", to_sample, MEAN_RATE, d=d, **slow),
            made(f"shift and scale 2.5, d={d}, transport", to_sample, MEAN_RATE, d=d, scale=2.5, **slow),
            made(f"scale 1.5, d={d}, transport", to_sample, SCALE_RATE, d=d, **wide),
        ]
    well = partial(well_to_law, n=1000, r=20, horizon=4.0, every=80)
    slowest = Well(n=600).rate()
    found += [
        Case("double well, quantile", well, well_distances, slowest),
        Case("the same, start=1, quantile", well, well_distances, slowest, 1.0),
    ]
    return found


def once(case: Case, seed: int) -> dict[str, Any]:
    """One repeat: its rate, its flags, the slope of the exact W₂ over its window; or its refusal."""
    torch.set_num_threads(1)
    series = case.series(seed)
    try:
        rate = rates.exponential(series, start=case.start)
    except rates.Unresolved:
        return {"refused": True}
    kinds = [flag.split(" ")[0].strip(":") for flag in rate.flags]
    ends = {"low": rate.low, "high": rate.high, "value": rate.value}
    return {"refused": False, "flags": kinds, "slope": exact_slope(case, series), **ends}


def exact_slope(case: Case, series: xr.DataArray) -> float:
    """The decay rate of the exact W₂ over the window that the fit took, with its weights."""
    samples, _, _ = rates._decaying(series, series.attrs["power"])
    times = series["time"].values
    window = rates._window(times, samples, case.start, None)
    line = rates._LogLine(times[window], samples[:, window])
    exact = case.exact(tuple(float(t) for t in times))[window]
    return -float(rates._solver(line.x, line.weights, 1)[1] @ np.log(exact))


def summary(case: Case, found: list[dict[str, Any]]) -> dict[str, Any]:
    answered = [f for f in found if not f["refused"]]
    clean = [f for f in answered if not f["flags"]]
    kinds = [kind for f in answered for kind in set(f["flags"])]
    missed = [f for f in answered if not f["low"] <= f["slope"] <= f["high"]]
    return {
        "case": case.name,
        "truth": case.truth,
        "repeats": len(found),
        "refused": 1 - len(answered) / len(found),
        "flagged": (len(answered) - len(clean)) / len(found),
        "flags": {kind: kinds.count(kind) / len(found) for kind in sorted(set(kinds))},
        "clean": len(clean),
        "slope": share([f["low"] <= f["slope"] <= f["high"] for f in clean]),
        "limit": share([f["low"] <= case.truth <= f["high"] for f in clean]),
        "all": share([f["low"] <= f["slope"] <= f["high"] for f in answered]),
        "missed": len(missed) / len(found),
        "caught": sum(bool(f["flags"]) for f in missed) / len(missed) if missed else None,
        "bias": float(np.mean([f["value"] / f["slope"] - 1 for f in answered])) if answered else None,
        "bias_limit": float(np.mean([f["value"] / case.truth - 1 for f in answered])) if answered else None,
        "width": float(np.mean([(f["high"] - f["low"]) / 2 for f in answered]) / case.truth) if answered else None,
    }


def share(holds: list[bool]) -> list[float] | None:
    """A share and its exact 95 % interval (Clopper, Pearson)."""
    if not holds:
        return None
    k, n = sum(holds), len(holds)
    low, high = stats.beta.ppf(0.025, k, n - k + 1), stats.beta.ppf(0.975, k + 1, n - k)
    return [k / n, float(low) if k else 0.0, float(high) if k < n else 1.0]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="cases whose name contains one of these")
    parser.add_argument("--repeats", type=int, default=400)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    table = []
    with ProcessPoolExecutor(options.workers) as pool:
        for case in cases():
            if options.names and not any(name in case.name for name in options.names):
                continue
            found = list(pool.map(partial(once, case), range(options.repeats), chunksize=4))
            row = summary(case, found)
            table.append(row)
            print(line(row), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(table, indent=1))


def line(row: dict[str, Any]) -> str:
    flags = ", ".join(f"{kind} {part:.0%}" for kind, part in row["flags"].items())
    cells = [
        row["case"],
        percent(row["refused"]),
        percent(row["flagged"]) + (f" ({flags})" if flags else ""),
        *(covering(row[key]) for key in ("slope", "limit", "all")),
        f"{percent(row['bias'])} / {percent(row['bias_limit'])}",
        f"± {percent(row['width'])}",
        percent(row["caught"]),
    ]
    return f"| {' | '.join(cells)} |"


def percent(part: float | None) -> str:
    return "–" if part is None else f"{100 * part:.1f} %"


def covering(found: list[float] | None) -> str:
    return "–" if found is None else f"{100 * found[0]:.1f} % [{100 * found[1]:.0f}, {100 * found[2]:.0f}]"


if __name__ == "__main__":
    main()
