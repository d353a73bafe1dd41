"""Verdicts: an inequality or an identity held against numbers with their standard errors.

An inequality has margin rhs - lhs and is violated when the margin is below -3 standard errors; an identity is violated
when |margin| exceeds 3 standard errors plus the declared discretisation error. Hypotheses come first: where one is seen
to fail, that is the verdict. A check whose errors leave nothing to violate is vacuous, and its verdict is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import xarray as xr

from . import replicas

ERRORS = 3.0  # standard errors of slack
ROUNDING = 1e-10  # of the larger side: below it a margin is arithmetic
VACUOUS = 0.5  # of the larger side: with more slack than that, a margin within it says nothing

HOLDS, VIOLATED, UNFOUNDED = "holds", "violated", "hypothesis fails"

Values = float | np.ndarray | xr.DataArray


@dataclass(frozen=True)
class Check:
    """A theorem held against numbers.

    Args:
        name: the theorem.
        margin: rhs - lhs.
        stderr: of the margin, over replicas; 0 for closed forms and quadrature.
        verdict: "holds", "violated" or "hypothesis fails".
        lhs: left side.
        rhs: right side.
        discretisation: declared error of the margin that replicas do not show (time step, quadrature, finite N).
        reason: the hypothesis that fails, or why the check is vacuous.
        source: where the theorem stands.
        relation: "<=" for an inequality, "=" for an identity.

    """

    name: str
    margin: float
    stderr: float
    verdict: str
    lhs: float
    rhs: float
    discretisation: float = 0.0
    reason: str = ""
    source: str = ""
    relation: str = "="

    def __str__(self) -> str:
        declared = f", declared error {self.discretisation:.1g}" if self.discretisation else ""
        if math.isnan(self.margin):
            return f"{self.name}: {self.verdict}\n  {self.reason}"
        text = f"{self.name}: {self.verdict}, margin {self.margin:.4g} ± {self.stderr:.2g} (s.e.){declared}"
        text += f" [{self.lhs:.5g} against {self.rhs:.5g}]"
        return text + (f"\n  {self.reason}" if self.reason else "")


def inequality(
    name: str,
    lhs: Values,
    rhs: Values,
    *,
    stderr: float = 0.0,
    discretisation: float = 0.0,
    hypotheses: Iterable[str] = (),
    source: str = "",
) -> Check:
    """Lhs <= rhs: violated iff rhs - lhs < -(3 s.e. + declared error).

    Args:
        name: the theorem.
        lhs: a number, or one value per replica; the two sides are paired replica by replica, by label where they have
            one.
        rhs: likewise.
        stderr: of the margin, where both sides are numbers.
        discretisation: declared error, 0 or more.
        hypotheses: what was seen to fail, in words; empty strings are skipped.
        source: reference.

    Returns:
        Check; "hypothesis fails", with a reason that begins with "vacuous", where both sides differ from 0, 3 s.e. +
        declared error exceeds half of the larger and the margin is no larger.

    Raises:
        ValueError: a side that is not finite, errors that are not finite or negative, a single replica, replicas that
            do not match, or a stderr beside sides that bring their own.

    """
    return _judged(name, _sides(name, lhs, rhs, stderr), discretisation, hypotheses, source, is_identity=False)


def identity(
    name: str,
    lhs: Values,
    rhs: Values,
    *,
    stderr: float = 0.0,
    discretisation: float = 0.0,
    hypotheses: Iterable[str] = (),
    source: str = "",
) -> Check:
    """Lhs = rhs: violated iff |rhs - lhs| > 3 s.e. + declared error. Arguments, return, errors as for `inequality`."""
    return _judged(name, _sides(name, lhs, rhs, stderr), discretisation, hypotheses, source, is_identity=True)


def _judged(
    name: str,
    sides: tuple[float, float, float, float],
    discretisation: float,
    hypotheses: Iterable[str],
    source: str,
    *,
    is_identity: bool,
) -> Check:
    check_error(name, "declared error", discretisation)
    lhs, rhs, margin, stderr = sides
    reason = "; ".join(h for h in hypotheses if h)
    errors, larger = ERRORS * stderr + discretisation, max(abs(lhs), abs(rhs))
    slack = errors + ROUNDING * larger
    violated = abs(margin) > slack if is_identity else margin < -slack
    # A side that is 0 sets no scale: "this vanishes" is judged by its errors alone.
    if not reason and not violated and margin <= slack and lhs and rhs and errors > VACUOUS * larger:
        reason = (
            f"vacuous: 3 s.e. + declared error = {errors:.2g} against sides of at most {larger:.2g}; use more "
            "particles or replicas, or smaller steps"
        )
    verdict = UNFOUNDED if reason else VIOLATED if violated else HOLDS
    relation = "=" if is_identity else "<="
    return Check(name, margin, stderr, verdict, lhs, rhs, discretisation, reason, source, relation)


def unfounded(name: str, reason: str, source: str = "") -> Check:
    """The verdict on a theorem that is about something else, so that there is no number to show."""
    return Check(name, math.nan, math.nan, UNFOUNDED, math.nan, math.nan, 0.0, reason, source)


def check_error(name: str, what: str, value: float) -> None:
    """Refuses an error that is negative or not finite: it would let everything hold.

    Raises:
        ValueError: it is.

    """
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: the {what} is {value}; expected a finite number, 0 or more.")


def _sides(name: str, lhs: Values, rhs: Values, stderr: float) -> tuple[float, float, float, float]:
    """Both sides, the margin and its standard error."""
    check_error(name, "stderr", stderr)
    left, right = paired(name, lhs, rhs)
    for side in (left, right):
        if not np.isfinite(side).all():
            raise ValueError(f"{name}: a side is not finite ({side}); an inequality needs two numbers.")
    if not (right - left).ndim:
        return float(left), float(right), float(right - left), stderr
    if stderr:
        raise ValueError(
            f"{name}: stderr = {stderr:g} was given with one value per replica, from which the error is computed; "
            "leave it out, or pass means."
        )
    margin, error = mean_and_error(right - left)
    return float(left.mean()), float(right.mean()), margin, error


def paired(name: str, *values: Values) -> list[np.ndarray]:
    """Numbers, or one value per replica, the same replicas in each.

    Raises:
        ValueError: another shape, replicas whose labels or numbers differ, or antithetic ones.

    """
    columns = [_values(name, value) for value in values]
    lengths = sorted({len(column) for column in columns if column.ndim})
    if len(lengths) > 1:
        raise ValueError(
            f"{name}: the sides have {' and '.join(map(str, lengths))} replicas; they are paired replica by replica."
        )
    labelled = [v.reset_coords(drop=True) for v in values if isinstance(v, xr.DataArray) and v.ndim]
    try:
        xr.align(*labelled, join="exact")
    except ValueError as error:
        shown = " and ".join(str(v["replica"].values) for v in labelled)
        raise ValueError(
            f"{name}: the sides have the replicas {shown}; they are paired replica by replica. Select the same ones in "
            "the same order."
        ) from error
    return columns


def _values(name: str, side: Values) -> np.ndarray:
    dims = side.dims if isinstance(side, xr.DataArray) else ()
    values = np.asarray(side, dtype=float)
    if values.ndim > 1 or (dims and dims != ("replica",)):
        raise ValueError(
            f"{name}: a side has shape {values.shape}{f' over {dims}' if dims else ''}; expected a number or one value "
            "per replica. Select one time with .sel(time=...)."
        )
    if isinstance(side, xr.DataArray) and dims:
        replicas.check_independent(side)
    return values


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean over replicas and its standard error.    (R,)."""
    found = replicas.mean_and_error(xr.DataArray(values, dims="replica", name="margin"))
    return float(found), float(found["stderr"])


def of_means(
    name: str,
    sides: Callable[..., tuple[float, float]],
    arguments: tuple[Values, ...],
    hypotheses: list[str],
    source: str,
) -> Check:
    """An inequality between functions of means; the margin's error by the jackknife over replicas."""
    columns = paired(name, *arguments)
    if any(not np.isfinite(c).all() or float(c.mean()) < -ROUNDING for c in columns):
        shown = ", ".join(f"{float(c.mean()):.4g}" for c in columns)
        raise ValueError(
            f"{name}: entropy, Fisher information and distance are finite and not negative; got means {shown}. An "
            "estimate below zero is noise: use more particles."
        )

    def both(mean: np.ndarray) -> np.ndarray:
        lhs, rhs = sides(*np.maximum(mean, 0.0))
        return np.array([rhs - lhs, lhs, rhs])

    if any(c.ndim for c in columns):
        samples = np.stack(np.broadcast_arrays(*columns), axis=-1)
        found, errors = replicas.jackknife(both, samples)
    else:
        found, errors = both(np.array([float(c) for c in columns])), np.zeros(3)
    if math.isnan(found[0]):
        # The bound does not exist without its hypothesis; there is no number to show.
        reason = "; ".join(h for h in hypotheses if h)
        return Check(name, math.nan, math.nan, UNFOUNDED, float(found[1]), math.nan, 0.0, reason, source, "<=")
    return inequality(
        name, float(found[1]), float(found[2]), stderr=float(errors[0]), hypotheses=hypotheses, source=source
    )
