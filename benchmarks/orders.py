"""The orders of the Fokker-Planck schemes in space and time, as the tables of docs/limit.md.

python -m benchmarks.orders
"""

from __future__ import annotations

import numpy as np

from mfsde.limit import fokker_planck
from mfsde.scenarios import DoubleWell, MeanFieldOU

OU = MeanFieldOU(kappa=0.7, coupling=1.3, sigma=0.9, initial_mean=(1.5,), initial_variance=0.4)
WELL = DoubleWell()
T = 0.5


def main() -> None:
    best = fokker_planck(WELL, np.linspace(-4, 5, 2561), [T], rtol=1e-11, atol=1e-15)
    truth = float(OU.limit(T).cov[0, 0]), float(best["mean"][0, 0])
    print(f"Errors at t = {T}: variance of the mean-field OU process (closed form), mean of Desai-Zwanzig.\n")
    sizes = (41, 81, 161, 321, 641)
    table(
        "nodes",
        sizes,
        [space(n, truth) for n in sizes],
        ("OU, order 2", "well, order 2", "OU, combined", "well, combined"),
    )
    steps = (0.1, 0.05, 0.025, 0.0125, 0.00625)
    table("dt", steps, [euler(dt) for dt in steps], ("OU, implicit Euler", "well, implicit Euler"))
    tolerances = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
    table("rtol", tolerances, [adaptive(r) for r in tolerances], ("well, bdf", "well, radau"), rates=False)


def space(n: int, truth: tuple[float, float]) -> list[float]:
    found = []
    for extrapolate in (False, True):
        ou = fokker_planck(OU, np.linspace(-5, 7, n), [T], rtol=1e-11, atol=1e-15, extrapolate=extrapolate)
        well = fokker_planck(WELL, np.linspace(-4, 5, n), [T], rtol=1e-11, atol=1e-15, extrapolate=extrapolate)
        found += [abs(float(ou.covariance[0, 0, 0]) - truth[0]), abs(float(well["mean"][0, 0]) - truth[1])]
    return found


def euler(dt: float) -> list[float]:
    """Against the adaptive solution on the same grid: the error in time alone."""
    found = []
    for scenario, grid in ((OU, np.linspace(-5, 7, 161)), (WELL, np.linspace(-4, 5, 161))):
        fine = fokker_planck(scenario, grid, [T], rtol=1e-11, atol=1e-15)
        rough = fokker_planck(scenario, grid, [T], dt=dt)
        found.append(abs(float(rough["mean"][0, 0]) - float(fine["mean"][0, 0])))
    return found


def adaptive(rtol: float) -> list[float]:
    grid = np.linspace(-4, 5, 161)
    fine = fokker_planck(WELL, grid, [T], rtol=1e-12, atol=1e-16, method="radau")
    rough = [fokker_planck(WELL, grid, [T], rtol=rtol, atol=1e-4 * rtol, method=m) for m in ("bdf", "radau")]
    return [abs(float(r["mean"][0, 0]) - float(fine["mean"][0, 0])) for r in rough]


def table(over: str, values: tuple, rows: list[list[float]], names: tuple[str, ...], rates: bool = True) -> None:
    print(f"| {over} | " + " | ".join(names) + " |")
    print("|---" * (len(names) + 1) + "|")
    for k, (value, errors) in enumerate(zip(values, rows, strict=True)):
        cells = []
        for j, error in enumerate(errors):
            order = f" ({np.log2(rows[k - 1][j] / error):.2f})" if rates and k else ""
            cells.append(f"{error:.2e}{order}")
        print(f"| {value:g} | " + " | ".join(cells) + " |")
    print()


if __name__ == "__main__":
    main()
