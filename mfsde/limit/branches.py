"""Stationary laws along a parameter: branches, and the critical values at which they begin, end or turn."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from scipy import linalg, optimize

from .. import provenance
from ..measure import EmpiricalMeasure
from ..model import numeric_fields, replaced, scenario_name
from . import richardson
from .coefficients import Coefficients
from .fixed_points import Problem, StationaryLaw
from .gibbs import NODES, gibbs, starting
from .grid import Array, Grid
from .self_consistency import Fields, Shapes, fields_of, probes, shapes_of

LARGEST_STEP, SMALLEST_STEP = 0.05, 1e-6  # of arclength, in units of the range of the parameter
BENDING = 0.02  # distance of a branch from the cubic through two of its points, relative to the step
MOST_POINTS = 2000
NEWTON = 20
CONVERGED = 1e-11  # of the augmented equations, in units of the statistics' range
TURNING, DEGREE = 12, 8  # points at which a turn of a branch is looked at, and degree of the polynomial through them
CREEPING = 1e-8  # the same where Newton's method is slow
SLOPE = 1e-4  # step of differences along the parameter, in units of its range
PLACES = 3  # parameters at which the shapes of fields are probed
FEWEST = 2e-13


def critical(
    scenario: Any, over: str, low: float, high: float, *, start: Any = None, n_nodes: int | None = None
) -> float:
    """The value of a parameter at which the stationary law near `start` becomes neutral: its feedback crosses 1.

    There other stationary laws branch off (σ_c of Desai-Zwanzig along the symmetric law, K_c of Kuramoto along the
    uniform one) or the branch turns back. The feedback is found to about 1e-11, and its crossing to rounding of that.

    Args:
        scenario: as for `gibbs`.
        over: name of the field that is varied.
        low: one end of the interval searched.
        high: the other end; the feedback must be on different sides of 1.
        start: a law near the stationary law that is followed, at all values: a symmetric one stays symmetric.
        n_nodes: as for `gibbs`.

    Returns:
        The critical value.

    Raises:
        TypeError: no such field.
        ValueError: the feedback is on the same side of 1 at both ends; as `gibbs`.

    """
    _check_field(scenario, over)

    def excess(value: float, n: int | None = n_nodes) -> float:
        return gibbs(replaced(scenario, {over: value}), start=start, n_nodes=n).feedback - 1.0

    ends = excess(low), excess(high)
    if not ends[0] * ends[1] <= 0:
        raise ValueError(
            f"{scenario_name(scenario)}: the feedback is {1 + ends[0]:.4g} at {over} = {low:g} and {1 + ends[1]:.4g} "
            f"at {over} = {high:g}, on the same side of 1: no critical value is known to lie between. Choose another "
            "interval, or another start= (the law that loses its stability)."
        )
    found = float(optimize.brentq(excess, low, high, xtol=1e-13, rtol=1e-13))
    law = gibbs(replaced(scenario, {over: found}), start=start, n_nodes=n_nodes)
    if law.is_spectral:
        return found
    # At walls and with a current the law is of second order; two grids make it one of fourth.
    finer = 2 * law.grid.shape[0] - 1
    sharp = float(optimize.brentq(lambda v: excess(v, finer), low, high, xtol=1e-13, rtol=1e-13))
    return float(richardson.extrapolated(np.array(found), np.array(sharp)))


def branch(
    scenario: Any,
    over: str,
    low: float,
    high: float,
    *,
    start: Any = None,
    grid: Any = None,
    n_nodes: int | None = None,
) -> xr.Dataset:
    """The stationary laws that are connected with the one near `start` at `low`, followed until `over` leaves the
    interval.

    The branch is followed by arclength in the statistics through which the law acts, so that it may turn back.
    Critical values are where its feedback crosses 1 or its direction in `over` turns.

    Args:
        scenario: as for `gibbs`.
        over: name of the field that is varied.
        low: where the branch starts (it may be larger than `high`).
        high: where it ends, unless it comes back to `low` first.
        start: a law near the stationary law at `low`.
        grid: nodes that hold all laws of the branch; None: those for the ends, joined.
        n_nodes: number of nodes on each axis of that.

    Returns:
        Dataset over `point`: the parameter, `mean`, `covariance`, `free_energy` (NaN without one), `feedback`,
        `residual`; over `event`: `critical`, the critical values in the order of the branch.

    Raises:
        TypeError: no such field.
        ValueError: the law acts through too many statistics; as `gibbs`.
        RuntimeError: the branch cannot be followed further.

    Source: Keller, Numerical solution of bifurcation and nonlinear eigenvalue problems (1977), for the method.

    """
    _check_field(scenario, over)
    if not low != high:
        raise ValueError(f"branch: low = high = {low!r}; expected an interval of {over} to follow the law over.")
    family = Family.over(scenario, over, float(low), float(high), start, grid, n_nodes)
    points = family.followed()
    events = [value for k in range(len(points) - 1) for value in family.events(points[k], points[k + 1])]
    return _dataset(scenario, over, family, points, events)


@dataclass(frozen=True)
class Point:
    """A stationary law on a branch: (a, p) with p scaled to [0, 1], a unit tangent, the feedback."""

    at: Array
    tangent: Array
    feedback: float


class Family:
    """The self-consistency equations G(a, p) = image(a; p) - a = 0 over an interval of a parameter."""

    def __init__(
        self, make: Callable[[float], Any], ends: tuple[float, float], origin: EmpiricalMeasure, grid: Grid
    ) -> None:
        self._make, self._ends, self._origin, self._grid = make, ends, origin, grid
        self._kind = type(fields_of(make(ends[0]), grid, origin))
        found = [self._probed(p) for p in np.linspace(0, 1, PLACES)]
        _, weights, shapes = np.linalg.svd(np.vstack(found), full_matrices=False)
        self._shapes = shapes[weights > FEWEST * max(1.0, weights[0])]
        # The statistics' range over very different laws: one step of arclength is a small part of it.
        masses = probes(grid, 12)
        spaces = [self.shapes(p) for p in (0.0, 1.0)]
        images = [[space.image(space.of_law(mass)) for mass in masses] for space in spaces]
        self._size = max(1e-12, *(float(np.ptp(found, axis=0).max()) for found in images))

    @classmethod
    def over(
        cls, scenario: Any, over: str, low: float, high: float, start: Any, grid: Any, n_nodes: int | None
    ) -> Family:
        """From the arguments of `branch`."""
        origin = starting(scenario, start)

        def make(value: float) -> Any:
            return replaced(scenario, {over: value})

        chosen = _joined([gibbs(make(v), grid, start=start, n_nodes=n_nodes).grid for v in (low, high)], n_nodes)
        return cls(make, (low, high), origin, chosen)

    def _probed(self, p: float) -> Array:
        found = shapes_of(self._fields(p), self._field(p))
        if found is None:
            raise ValueError(
                f"{scenario_name(self.scenario(p))}: the law acts through too many statistics to follow a branch in "
                "them. Solve gibbs at each value, with start= the law before."
            )
        return found.shapes

    def scenario(self, p: float) -> Any:
        """The scenario at a scaled parameter."""
        return self._make(self.value(p))

    def value(self, p: float) -> float:
        """The parameter of a scaled one."""
        return self._ends[0] + p * (self._ends[1] - self._ends[0])

    def parameter(self, point: Point) -> float:
        """The parameter of a point."""
        return self.value(float(point.at[-1]))

    def _fields(self, p: float) -> Fields:
        mass = (self._grid.widths / self._grid.widths.sum()).ravel()
        return self._kind(Coefficients(self.scenario(p), self._grid.points, mass), self._grid)

    def _field(self, p: float) -> Array:
        return self._fields(p).of(self._origin)

    def shapes(self, p: float) -> Shapes:
        """The fields at a scaled parameter, in the shapes of all."""
        made = self._fields(p)
        return Shapes(made, made.of(self._origin), self._shapes)

    def gap(self, at: Array) -> Array:
        """G(a, p), scaled."""
        a = at[:-1] * self._size
        return (self.shapes(float(at[-1])).image(a) - a) / self._size

    def slopes(self, at: Array) -> Array:
        """∂G/∂(a, p), (r, r + 1)."""
        a, p = at[:-1] * self._size, float(at[-1])
        near = [self.gap(np.append(at[:-1], p + s * SLOPE)) for s in (-2, -1, 1, 2)]
        along = (near[0] - 8 * near[1] + 8 * near[2] - near[3]) / (12 * SLOPE)
        return np.column_stack([self.shapes(p).jacobian(a) - np.eye(len(a)), along])

    def point(self, at: Array, direction: Array) -> Point:
        """The point at a solution, its tangent turned into a direction."""
        slopes = self.slopes(at)
        tangent = linalg.svd(slopes)[2][-1]
        tangent = tangent if tangent @ direction >= 0 else -tangent
        feedback = np.linalg.eigvals(slopes[:, :-1] + np.eye(len(at) - 1)).real
        return Point(at, tangent, float(feedback.max(initial=0.0)))

    def onward(self, point: Point, length: float, tolerance: float = CREEPING) -> Point | None:
        """The point of the branch whose component along the tangent is `length` further; None where Newton fails."""
        at, best = point.at + length * point.tangent, math.inf
        for _ in range(NEWTON):
            try:
                rest = np.append(self.gap(at), (at - point.at) @ point.tangent - length)
                best = float(np.abs(rest).max())
                at = at - np.linalg.solve(np.vstack([self.slopes(at), point.tangent]), rest)
                if best < CONVERGED:
                    break
            except (np.linalg.LinAlgError, ValueError):
                return None
            if not np.abs(at - point.at).max() < 3 * abs(length) + 1e-12:
                return None
        # Next to a point where branches cross the equations are singular, and Newton's method creeps.
        return self.point(at, point.tangent) if best < tolerance else None

    def followed(self) -> list[Point]:
        """The points of the branch from p = 0 until it leaves [0, 1]."""
        problem = Problem(self.scenario(0.0), self._origin, self._grid, 1e-10)
        shapes = self.shapes(0.0)
        a = shapes.coefficients(problem.solve(problem.first)) / self._size
        points = [self.point(np.append(a, 0.0), np.append(np.zeros(len(a)), 1.0))]
        length = LARGEST_STEP
        while len(points) < MOST_POINTS:
            p = float(points[-1].at[-1])
            if len(points) > 1 and (p >= 1 or p <= 0):
                return self._cut(points)
            following = self.onward(points[-1], length)
            if following is None or not self._is_smooth(points[-1], following, length):
                length /= 2
                if length < SMALLEST_STEP:
                    raise RuntimeError(
                        f"{scenario_name(self.scenario(p))}: the branch cannot be followed beyond {self.value(p):.8g}; "
                        "the laws may leave the grid there (pass grid=), or cease to exist."
                    )
                continue
            points.append(following)
            length = min(LARGEST_STEP, 1.5 * length)
        return points

    def _is_smooth(self, one: Point, other: Point, length: float) -> bool:
        """Whether the branch bends little between two points, and passes half way where their cubic does.

        A step that lands on another branch, across a fork, does neither.
        """
        if one.tangent @ other.tangent < 0.9:
            return False
        middle = self.onward(one, length / 2)
        chord = float(np.linalg.norm(other.at - one.at))
        cubic = (one.at + other.at) / 2 + chord / 8 * (one.tangent - other.tangent)
        return middle is not None and float(np.abs(middle.at - cubic).max()) < BENDING * length

    def _cut(self, points: list[Point]) -> list[Point]:
        """The last point moved back onto the end of the interval."""
        last, before = points[-1], points[-2]
        end = 1.0 if last.at[-1] >= 1 else 0.0

        def beyond(share: float) -> float:
            found = self._between(before, last, share)
            return float(found.at[-1]) - end

        if beyond(1.0) == 0:
            return points
        share = optimize.brentq(beyond, 0.0, 1.0, xtol=1e-12)
        return [*points[:-1], self._between(before, last, share)]

    def _between(self, one: Point, other: Point, share: float) -> Point:
        """The point of the branch at a share of the way from one of its points to the next."""
        if share == 0:
            return one
        found = self.onward(one, share * float((other.at - one.at) @ one.tangent))
        if found is None:
            raise RuntimeError("the branch was lost between two of its points; lower LARGEST_STEP.")
        return found

    def events(self, one: Point, other: Point) -> list[float]:
        """Critical values between two points: the feedback crosses 1, or the branch turns in p."""
        if (one.feedback - 1) * (other.feedback - 1) < 0:
            return [self._crossing(one, other)]
        if one.tangent[-1] * other.tangent[-1] < 0:
            return [self._turn(one, other)]
        return []

    def _crossing(self, one: Point, other: Point) -> float:
        """The parameter at which the feedback is 1."""
        share = optimize.brentq(lambda s: self._between(one, other, s).feedback - 1, 0.0, 1.0, xtol=1e-12)
        return self.parameter(self._between(one, other, share))

    def _turn(self, one: Point, other: Point) -> float:
        """The extreme parameter between two points, of a polynomial through points of the branch.

        Where another branch crosses at the turn the equations are singular next to it, and points may be lost to it.
        """
        shares = 0.5 - 0.5 * np.cos(np.pi * (np.arange(TURNING) + 0.5) / TURNING)
        ahead = float((other.at - one.at) @ one.tangent)
        points = [(share, self.onward(one, share * ahead, CONVERGED)) for share in shares]
        known = [
            (share, float(point.at[-1]), abs(point.feedback - 1))
            for share, point in points
            # A tangent across is that of the other branch.
            if point is not None and point.tangent @ one.tangent > 0.5
        ]
        # Close to a crossing a point is known less well, as the distance of the feedback from 1 is small.
        where, values, weights = np.array(known).T
        path = np.polynomial.Chebyshev.fit(where, values, min(DEGREE, len(known) - 1), [0.0, 1.0], w=weights)
        turns = path.deriv().roots()
        inside = turns[(np.abs(turns.imag) < 1e-9) & (turns.real >= 0) & (turns.real <= 1)].real
        extreme = max(inside, key=lambda s: abs(float(path(s)) - float(path(0.0))))
        return self.value(float(path(extreme)))

    def law(self, point: Point) -> StationaryLaw:
        """The stationary law of a point."""
        p = float(point.at[-1])
        problem = Problem(self.scenario(p), self._origin, self._grid, 1e-9)
        return problem.law(self.shapes(p).field(point.at[:-1] * self._size))


def _dataset(scenario: Any, over: str, family: Family, points: list[Point], events: list[float]) -> xr.Dataset:
    laws = [family.law(point) for point in points]
    names = ("mean", "covariance", "free_energy", "residual")
    columns: dict[str, tuple[Any, Array]] = {
        "mean": (("point", "component"), np.array([law.mean.numpy() for law in laws])),
        "covariance": (("point", "component", "component_2"), np.array([law.cov.numpy() for law in laws])),
        "free_energy": ("point", np.array([np.nan if law.free_energy is None else law.free_energy for law in laws])),
        "residual": ("point", np.array([law.residual for law in laws])),
    }
    told = {name: f"{name.replace('_', ' ')} of the stationary law" for name in names}
    columns["feedback"] = ("point", np.array([point.feedback for point in points]))
    columns["critical"] = ("event", np.array(events, dtype=float))
    told |= {"feedback": "largest eigenvalue of the self-consistency map", "critical": f"critical {over}"}
    data = {name: (*column, {"long_name": told[name], "units": "1"}) for name, column in columns.items()}
    along = ("point", np.array([family.parameter(point) for point in points]), {"long_name": over, "units": "1"})
    described = provenance.describe(scenario)
    attributes = {"scenario": described["scenario"], "parameters": provenance.canonical(described["parameters"])}
    return xr.Dataset(data, {over: along, "component": np.arange(laws[0].dim)}, attributes)


def _check_field(scenario: Any, over: str) -> None:
    numbers = numeric_fields(scenario)
    if over not in numbers:
        raise TypeError(
            f"{scenario_name(scenario)} has no numeric field {over!r}; expected one of {', '.join(numbers)}."
        )


def _joined(grids: list[Grid], n_nodes: int | None) -> Grid:
    """One grid that holds several."""
    axes = list(zip(*(grid.axes for grid in grids), strict=True))
    low = [min(axis.nodes[0] for axis in row) for row in axes]
    high = [max(axis.nodes[-1] for axis in row) for row in axes]
    return Grid.box(low, high, n_nodes or max(NODES[len(low)], grids[0].shape[0]), grids[0].period)
