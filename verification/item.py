"""A statement of the documents beside a measurement that can refute it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from mfsde.analysis.check import ERRORS, HOLDS, UNFOUNDED, VIOLATED, Check

Measure = Callable[[bool, bool], Iterator["Finding"]]


@dataclass(frozen=True)
class Finding:
    """A check, and the verdict that it must have.

    Args:
        check: numbers and verdict.
        expected: "holds" for a claim, "violated" for a misprint, "hypothesis fails" outside of the hypotheses.

    """

    check: Check
    expected: str = HOLDS

    @property
    def met(self) -> bool:
        """The verdict is the expected one."""
        return self.check.verdict == self.expected

    @property
    def interval(self) -> tuple[float, float]:
        """The measured value, 3 standard errors and the declared discretisation error to both sides."""
        half = ERRORS * self.check.stderr + self.check.discretisation
        return self.check.lhs - half, self.check.lhs + half


def claim(check: Check) -> Finding:
    """What must hold."""
    return Finding(check, HOLDS)


def misprint(check: Check) -> Finding:
    """A form printed in a document that must be violated."""
    return Finding(check, VIOLATED)


def outside(check: Check) -> Finding:
    """The statement where a hypothesis is broken on purpose: "hypothesis fails" must be seen."""
    return Finding(check, UNFOUNDED)


@dataclass(frozen=True)
class Item:
    """A statement, and how it is measured.

    Args:
        name: lower case with hyphens.
        source: document and number there, beginning with the document's: "001, Theorem 3".
        statement: as it is true, one line.
        hypotheses: those it needs.
        misprints: what the document prints instead, and what is wrong with it.
        fault: the planted fault, in words.
        measure: (quick, faulty) -> findings; with faulty the fault is in what is measured, the claims are the same.
        cost: in minutes, roughly: long items are started first.

    """

    name: str
    source: str
    statement: str
    hypotheses: tuple[str, ...]
    misprints: tuple[str, ...]
    fault: str
    measure: Measure
    cost: float = 0.5

    @property
    def document(self) -> str:
        """Number of the document."""
        return self.source[:3]


def item(
    *,
    source: str,
    statement: str,
    fault: str,
    hypotheses: tuple[str, ...] = (),
    misprints: tuple[str, ...] = (),
    cost: float = 0.5,
) -> Callable[[Measure], Item]:
    """Makes an item of a generator (quick, faulty) -> findings, named as it is."""

    def made(measure: Measure) -> Item:
        name = measure.__name__.replace("_", "-")
        return Item(name, source, statement, hypotheses, misprints, fault, measure, cost)

    return made


@dataclass(frozen=True)
class Result:
    """What was found for an item.

    Args:
        name: of the item.
        findings: checks with their expected verdicts.
        seconds: it took.
        error: what was raised, if anything was.

    """

    name: str
    findings: tuple[Finding, ...]
    seconds: float
    error: str = ""

    @property
    def verdict(self) -> str:
        """The worst of "error", "violated" (a claim; a misprint that holds), "hypothesis fails" and "holds"."""
        missed = [f for f in self.findings if not f.met]
        if self.error or not self.findings:
            return "error"
        if not missed:
            return HOLDS
        only_unfounded = all(f.expected == HOLDS and f.check.verdict == UNFOUNDED for f in missed)
        return UNFOUNDED if only_unfounded else VIOLATED

    @property
    def caught(self) -> bool:
        """A claim is violated: what a planted fault must do."""
        return any(f.expected == HOLDS and f.check.verdict == VIOLATED for f in self.findings)


def measured(what: Item, *, quick: bool, faulty: bool) -> Result:
    """Runs an item. Errors are part of the result: one item must not hide the others."""
    start = time.perf_counter()
    findings: list[Finding] = []
    error = ""
    try:
        findings.extend(_with_number(f) for f in what.measure(quick, faulty))
    except Exception as problem:
        error = f"{type(problem).__name__}: {problem}"
    return Result(what.name, tuple(findings), time.perf_counter() - start, error)


def _with_number(finding: Finding) -> Finding:
    """Checks without numbers have no interval to fail."""
    check = finding.check
    if math.isnan(check.margin) and check.verdict == HOLDS:
        return Finding(replace(check, verdict=VIOLATED, reason="not a number"), finding.expected)
    return finding
