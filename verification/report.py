"""What was found, as a table for the terminal and as JSON; what is stated, as a page."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from mfsde import provenance
from mfsde.analysis.check import ERRORS, HOLDS, ROUNDING, VIOLATED, Check

from .catalogue import DOCUMENTS, items
from .item import Finding, Item, Result

NAME, VALUE, REFERENCE = 52, 34, 15  # widths of the columns


def table(results: Sequence[Result]) -> str:
    """Lines for each item and its checks, and the count of verdicts."""
    return "\n".join([*(rows(result) for result in results), "", summary(results)])


def rows(result: Result) -> str:
    """An item: statement, verdict, seconds; below it name, measured value with interval, expected value, verdict."""
    what = items()[result.name]
    lines = [f"{what.name} · {what.source} · {result.verdict.upper()} · {result.seconds:.1f} s", f"  {what.statement}"]
    lines += [_row(finding) for finding in result.findings]
    return "\n".join([*lines, *([f"  {result.error}"] if result.error else [])])


def summary(results: Sequence[Result]) -> str:
    """How many items have which verdict, and how long they took."""
    counts = {v: [r.name for r in results if r.verdict == v] for v in dict.fromkeys(r.verdict for r in results)}
    told = "; ".join(
        f"{len(names)} {verdict}" + (f" ({', '.join(names)})" if verdict != HOLDS else "")
        for verdict, names in sorted(counts.items(), key=lambda pair: pair[0] != HOLDS)
    )
    n_checks = sum(len(r.findings) for r in results)
    items_and_checks = f"{_counted(len(results), 'item')}, {_counted(n_checks, 'check')}"
    return f"{items_and_checks}: {told}; {sum(r.seconds for r in results):.0f} s of work"


def self_test_row(result: Result) -> str:
    """The planted fault of an item, and the check that caught it, or none."""
    fault = items()[result.name].fault
    caught = [f.check for f in result.findings if f.expected == HOLDS and f.check.verdict == VIOLATED]
    if not caught:
        return f"MISSED  {result.name}: {fault}{'; ' + result.error if result.error else ''}"
    clearest = max(caught, key=_clarity)
    numbers = f"{_number(clearest.lhs)} against {_number(clearest.rhs)}"
    return f"caught  {result.name}: {fault}\n        by {clearest.name}: {numbers} ({result.seconds:.1f} s)"


def caught(results: Sequence[Result]) -> str:
    """How many planted faults were caught, and which were missed."""
    missed = [result.name for result in results if not result.caught]
    told = f"{len(results) - len(missed)} of {len(results)} planted faults caught"
    return told + (f"; missed: {', '.join(missed)}" if missed else "")


def as_json(results: Sequence[Result], **settings: Any) -> str:
    """Everything, with the versions it was measured with. Numbers that are not finite are null."""
    known = items()
    listed = [
        {
            "item": r.name,
            "source": known[r.name].source,
            "statement": known[r.name].statement,
            "hypotheses": known[r.name].hypotheses,
            "misprints": known[r.name].misprints,
            "fault": known[r.name].fault,
            "verdict": r.verdict,
            "caught": r.caught,
            "seconds": round(r.seconds, 3),
            "error": r.error,
            "checks": [_as_object(f) for f in r.findings],
        }
        for r in results
    ]
    return json.dumps(
        {"settings": settings, "versions": provenance.versions(), "items": listed}, indent=1, ensure_ascii=False
    )


def page() -> str:
    """docs/theory.md: every statement once, with its hypotheses, source, misprints and the name of its check."""
    known = items()
    lines = [PAGE]
    for number, title in DOCUMENTS.items():
        lines += [f"## {number}", "", f"{title}.", "", NOTATION[number], ""]
        for what in (w for w in known.values() if w.document == number):
            lines += [_section(what), ""]
    return "\n".join(lines).rstrip() + "\n"


PAGE = """\
# The statements, and what verifies them

Every statement of the four source documents that this software uses, once: as it is true, with its hypotheses, its
place, what the document prints where that is wrong, and the fault that its check is known to catch. The name in front
is that of the check:

    mfsde verify NAME ...           # measured values with intervals beside what is stated; --quick for a first look
    mfsde verify 001                # all of a document
    mfsde verify --self-test        # plant every fault: each must be caught

Conventions: dX = b dt + σ dW, T = σ²/2 = 1/β, H(m) = KL(m | g) with g = e^{−U} normalised, V^σ(m) = F(m) + T·H(m),
D_mF(m, x) = ∇_x δF/δm(m, x). A number is compared with its standard error over replicas: an identity is violated beyond
3 standard errors plus the declared discretisation error, an inequality where it fails by more than that. "hypothesis
fails" is a verdict of its own. This page is written by `make theory` from `verification/`.
"""


NOTATION = {
    "001": """\
U: the reference is e^{−U}; C_F: Lipschitz constant of D_mF in (x, m) with W₂; C_U: constant of convexity of U; p_m ∝
exp(−(1/T) δF/δm(m, ·) − U); K: lower bound of −∇² log m*; X̄^i: independent copies, each with the law of the limit, on
the noise and from the start of particle i. Condition (4) of Theorem 5: ½σ²(p − 1) + 3C_F + ½σ²|∇U(0)| − ½σ²C_U < 0.
Assumptions: 1, F ∈ C¹, convex, bounded below; 2, x·∇U ≥ C_U|x|² + C'_U and ∇U Lipschitz; 5, D_mF bounded and
Lipschitz, smooth in x.""",
    "002": """\
ρ: law of the neurons θ; σ_*(x; θ): a neuron; R(ρ) = E(y − ∫σ_* dρ)², R_# = E y², V(θ) = −E y σ_*(x; θ),
U(θ, θ') = E σ_*(x; θ)σ_*(x; θ'), S: entropy, β = 1/T, s_k: step sizes, ε = 2 s_k/ξ(t). Figures 6.1 and 6.3: y = ±1, x
given y from N(0, τ_y² I), τ_± = 1 ± Δ, r = |w|, q(a) = E σ(aG) with G from N(0, 1), U_d the kernel U averaged over
rotations in R^d, κ the scale of ρ₀ = N(0, κ²I/d). Figure 6.2: a, b output weight and offset, r₁, r₂ norms of the
weights on relevant and other coordinates, s_y² = τ_y²r₁² + r₂², M(b, s) = sφ(b/s) + bΦ(b/s), φ and Φ the normal density
and distribution (taken at b/s_y), e_y = y − f_y.""",
    "003": """\
μ: law of the neurons θ = (c, z); φ(x, θ) = c φ̂(x, z): a neuron; F(θ) = −E y φ(x, θ), K(θ, θ') = E φ(x, θ)φ(x, θ'),
E(μ) = C_f + ∫F dμ + ½∬K dμdμ the loss, C_f = ½E f², V(θ, μ) = F + ∫K dμ its first variation, V̄ = ∫V dμ, F₁ the
functions ∫φ̂ dγ of signed measures γ of finite total variation, ω_t = √n(μ^{(n)}_t − μ_t), D the space of neurons, α
strength of births and deaths, ρ and π rate and law of reinjection; ν the law of inputs.""",
    "000": """\
F(μ) = R(∫Φ dμ) + ∫V dμ with the loss R and the regulariser V, F_m(u) its value at the measure of m particles u_i,
F'(μ) its first variation, F* its infimum, ṽ = −∇⟨R'(∫Φ dμ), Φ⟩, Ω the space of particles, η = −⟨R', φ⟩/λ the dual
certificate for the penalty λ, Q_r growing convex sets on which Φ and dΦ are bounded, m₀ the number of atoms of the
simplest minimiser.""",
}


def _section(what: Item) -> str:
    place = what.source[3:].lstrip(", ")
    lines = [f"**`{what.name}`** — {place}", "", f"> {what.statement}", ""]
    if what.hypotheses:
        lines.append(f"* Hypotheses: {'; '.join(what.hypotheses)}.")
    lines += [f"* Corrected: {text.rstrip('.')}." for text in what.misprints]
    lines.append(f"* Planted fault: {what.fault.rstrip('.')}.")
    return "\n".join(lines)


def _row(finding: Finding) -> str:
    check = finding.check
    low, high = finding.interval
    if math.isnan(check.margin):
        measured, reference = "no number", ""
    else:
        interval = "" if low == high else f" [{_number(low)}, {_number(high)}]"
        sign = {"<=": "≤", "=": "="}[check.relation]
        measured, reference = f"{_number(check.lhs)}{interval}", f"{sign} {_number(check.rhs)}"
    verdict = check.verdict
    if finding.expected != HOLDS:
        verdict += ", as it must" if finding.met else f", EXPECTED: {finding.expected}"
    told = f"    {check.name:<{NAME}} {measured:<{VALUE}} {reference:<{REFERENCE}} {verdict}"
    return told + (f"\n        {check.reason}" if check.reason else "")


def _as_object(finding: Finding) -> dict[str, Any]:
    check, (low, high) = finding.check, finding.interval
    numbers = {
        "measured": check.lhs, "low": low, "high": high, "reference": check.rhs, "margin": check.margin,
        "stderr": check.stderr, "discretisation": check.discretisation,
    }  # fmt: skip
    return {
        "name": check.name,
        "relation": check.relation,
        **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
        "verdict": check.verdict,
        "expected": finding.expected,
        "reason": check.reason,
    }


def _clarity(check: Check) -> float:
    """The margin in units of what is allowed, which a violated margin exceeds."""
    allowed = ERRORS * check.stderr + check.discretisation + ROUNDING * max(abs(check.lhs), abs(check.rhs))
    return abs(check.margin) / allowed


def _counted(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.5g}"
