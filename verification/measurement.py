"""Items measured, in one process or several, and all that was found as a Dataset."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from mfsde import provenance
from mfsde.workers import at_least_one, run_all

from .catalogue import chosen, items
from .item import Result, measured

# By this a stored Dataset is known as one of these.
LONG_NAME = "verification of the source documents"


def verify(
    *names: str,
    quick: bool = False,
    faulty: bool = False,
    workers: int = 1,
    found: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Measures items and compares them with what they state.

    Args:
        names: of items, or numbers of documents; all items for none.
        quick: fewer particles, replicas and steps: the same claims, with wider intervals.
        faulty: with the planted faults, each of which must be `caught`.
        workers: processes that share the items; every one computes on one thread.
        found: called with each result, as soon as it is there.

    Returns:
        One result for each item, in the order of the catalogue or of the names.

    Raises:
        ValueError: an unknown name, workers below 1.
        TypeError: workers is no whole number, or a name no text.

    """
    wanted = [what.name for what in chosen(names)]
    task = functools.partial(_measure, tuple(wanted), quick, faulty)
    # Long items first, so that no process is left alone with one at the end.
    costs = [items()[name].cost for name in wanted]
    results: list[Result] = run_all(
        task, costs, at_least_one("workers", workers), wanted.__getitem__, lambda count, index, result: found(result)
    )
    return results


def dataset(results: Sequence[Result]) -> xr.Dataset:
    """A row for each check and one for each item.

    Over `check`: measured with its interval low, high; reference, the value or bound of the statement; margin, stderr,
    discretisation; verdict, expected, relation, check_name, item_of_check. Over `item`: item_verdict, seconds, and the
    coordinates source, statement.
    """
    rows = [(result.name, finding, *finding.interval) for result in results for finding in result.findings]
    checks = [finding.check for _, finding, _, _ in rows]
    numbers = {
        "measured": ([c.lhs for c in checks], "measured value"),
        "low": ([low for *_, low, _ in rows], "lower end: 3 standard errors and the declared discretisation error"),
        "high": ([high for *_, high in rows], "upper end"),
        "reference": ([c.rhs for c in checks], "value or bound that the statement gives"),
        "margin": ([c.margin for c in checks], "reference - measured"),
        "stderr": ([c.stderr for c in checks], "standard error of the margin over replicas"),
        "discretisation": ([c.discretisation for c in checks], "declared error that replicas do not show"),
    }
    words = {
        "verdict": [c.verdict for c in checks],
        "expected": [finding.expected for _, finding, _, _ in rows],
        "relation": [c.relation for c in checks],
        "check_name": [c.name for c in checks],
        "item_of_check": [name for name, *_ in rows],
    }
    data: dict[str, Any] = {
        name: ("check", np.array(values, dtype=float), {"long_name": text}) for name, (values, text) in numbers.items()
    }
    data |= {name: ("check", _text(values)) for name, values in words.items()}
    data["item_verdict"] = ("item", _text([r.verdict for r in results]))
    data["seconds"] = ("item", np.array([r.seconds for r in results]), {"long_name": "time taken", "units": "s"})
    known = items()
    coordinates = {
        "item": ("item", _text([r.name for r in results])),
        "source": ("item", _text([known[r.name].source for r in results])),
        "statement": ("item", _text([known[r.name].statement for r in results])),
    }
    attributes = {"long_name": LONG_NAME, **provenance.versions()}
    return xr.Dataset(data, coordinates, attributes)


def _text(values: Sequence[str]) -> np.ndarray:
    """Strings of variable length: Zarr 3 specifies no data type for those of a fixed one."""
    return np.array(values, dtype=object)


def _measure(names: tuple[str, ...], quick: bool, faulty: bool, index: int) -> Result:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return measured(items()[names[index]], quick=quick, faulty=faulty)
    finally:
        torch.set_num_threads(before)
