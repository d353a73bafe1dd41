"""The comparison with other libraries: everyone computes the workload, and who does not is found out."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import agreement, ceilings, comparison, competitors, plot, report, targets, timing
from benchmarks.agreement import Disagreement
from benchmarks.competitors import Competitor, Run, by_numpy, by_torch, by_torchsde, engine
from benchmarks.workloads import DT, WORKLOADS, Case

ALWAYS = [*engine.competitors(), *by_torch.competitors(), *by_torchsde.competitors(), *by_numpy.competitors()]
UNIT = {"copy": 1e-10, "exp": 3e-10, "tanh": 5e-10, "normal": 1e-9, "normal64": 2e-9, "flop": 1e-11}


def named(name: str) -> Competitor:
    return next(c for c in ALWAYS if c.name == name)


@pytest.mark.parametrize("workload", [w for w in WORKLOADS if w != "D"])
@pytest.mark.parametrize("name", ["mfsde", "mfsde blocked", "torch loop", "torchsde", "numpy"])
def test_everyone_computes_the_workload(name: str, workload: str) -> None:
    if workload in named(name).prepare:
        agreement.check(named(name), workload)


@pytest.mark.parametrize("name", ["mfsde", "torch loop", "numpy"])
def test_everyone_computes_the_digits(name: str) -> None:
    pytest.importorskip("sklearn")
    agreement.check(named(name), "D")


def faulty(fault: str, workload: str) -> Competitor:
    """The numpy loop with one thing wrong."""
    right = by_numpy.competitors()[0].prepare[workload]

    def prepare(case: Case) -> Run:
        if fault == "sigma":
            return right(dataclasses.replace(case, sigma=1.2 * case.noise))
        if fault == "time step":
            return lambda steps: right(case)(2 * steps)
        if fault == "one particle":

            def moved(steps: int) -> np.ndarray:
                x = right(case)(steps)
                x[0, -1] += 0.01
                return x

            return moved
        # Itô's noise read with the wrong power of the step.
        return right(dataclasses.replace(case, sigma=case.noise * math.sqrt(DT)))

    return Competitor(fault, {workload: prepare})


@pytest.mark.parametrize("workload", ["A", "B", "C"])
@pytest.mark.parametrize("fault", ["sigma", "time step", "one particle", "power of the step"])
def test_faults_are_found(fault: str, workload: str) -> None:
    with pytest.raises(Disagreement):
        agreement.check(faulty(fault, workload), workload)


@pytest.mark.parametrize("fault", ["sigma", "time step"])
def test_faults_of_births_and_deaths_are_found(fault: str) -> None:
    with pytest.raises(Disagreement):
        agreement.check(faulty(fault, "E"), "E")


def test_a_case_is_timed_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(comparison.EFFORT, True, comparison.Effort(1e-3, 2, 1.0, 1.0, most_steps=20))
    monkeypatch.setattr(comparison, "per_step", lambda runs, *rest: {name: (1e-4, 1e-2) for name in runs})
    of = [named("mfsde"), named("torch loop"), faulty("sigma", "A")]
    compared = comparison.Comparison("cpu", True, UNIT, of, {"jax": "not installed: jax"})
    rows = sorted(compared.compared(Case("A", 20_000)), key=lambda row: str(row["by"]))
    assert [row["by"] for row in rows] == ["mfsde", "sigma", "torch loop"]
    for row in rows[::2]:
        assert row["value"] == pytest.approx(5.0)
        assert row["fraction"] == pytest.approx(0.2)
    assert rows[1]["seconds"] is None
    assert "disagrees" in rows[1]["note"]
    assert len(list(report.lines(rows))) == 4
    json.dumps(rows)


def test_steps_are_differences_of_neighbouring_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 1.4, 2.0, 2.4, 5.0, 5.4])
    monkeypatch.setattr(timing, "seconds", lambda call, device: next(clock))
    assert timing.per_step({"a": (lambda steps: None, 5)}, 3) == {"a": (pytest.approx(0.1), 2.0)}


def test_what_takes_too_long_is_left_out() -> None:
    compared = comparison.Comparison("cpu", True, UNIT, [named("torch loop")], {})
    compared._verdicts["B", "torch loop", "float32"] = ""
    compared._seen["B", "torch loop"] = (1000, 0.01)
    (row,) = compared.compared(Case("B", 100_000))
    assert row["seconds"] is None
    assert row["note"] == "left out, a step would take about 1e+02 s"


def test_libraries_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(competitors.NEEDS, "by_keops", {"no_such_module": "no-such-package"})
    found, missing = competitors.installed()
    assert missing["keops"] == "not installed: no-such-package"
    assert "mfsde" in [c.name for c in found]


def test_ceilings_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"COPIED": 1 << 16, "CACHED": 1 << 12, "MATRIX": 64, "AGAIN": 1}.items():
        monkeypatch.setattr(ceilings, name, size)
    unit = ceilings.measured("cpu", quick=True)
    assert set(UNIT) <= set(unit)
    assert all(math.isfinite(value) for value in unit.values())
    assert "GFLOP/s" in ceilings.described(unit)


def test_ceilings_count_what_a_step_must_do() -> None:
    assert ceilings.of_step(Case("A", 1000), UNIT) == ("normals", pytest.approx(1e-6))
    assert ceilings.of_step(Case("A", 1000), UNIT | {"copy": 1e-9}) == ("copy", pytest.approx(8e-6))
    assert ceilings.of_step(Case("B", 1000), UNIT) == ("exp", pytest.approx(3e-4))
    # 4·n·N·d operations and n·N hyperbolic tangents.
    assert ceilings.of_step(Case("C", 1000), UNIT)[1] == pytest.approx(4e6 * 20 * 1e-11 + 1e6 * 5e-10)


def test_shares_of_a_gpu_are_those_of_the_part_that_was_aimed_at() -> None:
    parts = {"copy": 3e-4, "normals": 6e-4}
    rows = [row("A", by, 10**7, s, device="cuda", parts=parts) for by, s in (("mfsde", 6e-4), ("torch loop", 3e-4))]
    (found,) = [v for v in targets.verdicts(rows, {}) if v["what"].startswith("GPU: A")]
    assert found["value"] == pytest.approx(0.5)
    assert found["met"] is False


def row(workload: str, by: str, n: int, seconds: float, **others: Any) -> dict[str, Any]:
    case = Case(workload, n)
    plain = {"threads": 1, "dtype": "float32", "replicas": 1, "device": "cpu", "fraction": 0.5, "relative_error": None}
    value = case.of.value(case, seconds)
    measured = {"workload": workload, "by": by, "n": n, "seconds": seconds, "value": value, "ceiling": "exp"}
    return {**plain, **measured, "ceiling_seconds": seconds / 2, **others}


def test_targets_are_judged_from_the_rows() -> None:
    rows = [
        row("A", "mfsde", 10**5, 2.0e-4),
        row("A", "mfsde", 10**6, 2.0e-3),
        row("A", "mfsde", 10**6, 1.5e-3, threads=2),
        row("B", "mfsde compiled", 10**4, 0.05),
        row("B", "KeOps", 10**4, 0.6),
        row("B", "mfsde grid", 10**4, 1.0e-3, relative_error=1e-2),
        row("B", "mfsde fourier", 10**4, 1.4e-3, relative_error=5e-4),
    ]
    found = {v["what"]: v for v in targets.verdicts(rows, {"import": 0.5})}
    assert found["A, N = 100,000, one-pass drift"]["met"] is True
    assert found["A, N = 100,000, fused"]["met"] is False
    assert found["A, N = 1,000,000, two cores"]["value"] == pytest.approx(4 / 3)
    assert found["A, N = 1,000,000, two cores"]["met"] is False
    assert found["B exact, N = 10,000"]["value"] == pytest.approx(0.5)
    assert found["B exact, N = 10,000, against KeOps"]["met"] is True
    # The grid is faster, and not accurate enough.
    assert found["B smooth kernel, N = 10,000, error <= 1e-3"]["value"] == pytest.approx(1.4)
    assert found["C, N = 1,000"]["met"] is None
    assert found["import mfsde beyond torch"]["met"] is False


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    rows = [row("B", by, n, 1e-10 * n**2) for by in ("mfsde compiled", "KeOps") for n in (1000, 10_000)]
    machine = {"device": "cpu", "processor": "a processor", "versions": {"torch": torch.__version__}}
    plot.draw({"workloads": rows, "machines": [machine]}, tmp_path / "docs" / "performance.png")
    assert (tmp_path / "docs" / "performance.png").stat().st_size > 10_000
