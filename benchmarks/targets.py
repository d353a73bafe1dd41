"""What was aimed at, each computed from the rows of one run: met, not met, or not measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A number that is to be at most (or at least) a bound."""

    what: str
    unit: str
    bound: float
    value: Callable[[Rows], float | None]
    at_least: bool = False

    def verdict(self, rows: Rows) -> Row:
        value = self.value(rows)
        met = None if value is None else (value >= self.bound if self.at_least else value <= self.bound)
        sense = ">=" if self.at_least else "<="
        return {"what": self.what, "unit": self.unit, "target": f"{sense} {self.bound:g}", "value": value, "met": met}


@dataclass(frozen=True)
class Rows:
    """The timed rows of a run."""

    timed: tuple[Row, ...]
    startup: dict[str, float]

    def where(self, **wanted: Any) -> Iterable[Row]:
        defaults = {"threads": 1, "dtype": "float32", "replicas": 1, "device": "cpu"}
        wanted = {**defaults, **wanted}
        return [row for row in self.timed if all(row[name] == value for name, value in wanted.items())]

    def seconds(self, **wanted: Any) -> float | None:
        """The fastest of them: where several names are asked for, any will do."""
        names = wanted.pop("by", "mfsde")
        names = (names,) if isinstance(names, str) else names
        found = [row["seconds"] for name in names for row in self.where(by=name, **wanted)]
        return min(found, default=None)

    def cost(self, **wanted: Any) -> float | None:
        names = wanted.pop("by", "mfsde")
        names = (names,) if isinstance(names, str) else names
        found = [row["value"] for name in names for row in self.where(by=name, **wanted)]
        return min(found, default=None)


def ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


EXACT = ("mfsde compiled", "mfsde blocked", "mfsde keops")
FUSED = ("mfsde", "mfsde, compiled", "mfsde, fused")


def smooth(rows: Rows, **wanted: Any) -> float | None:
    """The fastest approximate strategy whose error is at most 1e-3."""
    names = {row["by"] for row in rows.where(workload="B") if (row.get("relative_error") or 1.0) <= 1e-3}
    return rows.seconds(workload="B", by=tuple(sorted(names)), **wanted)


def scaling(workload: str, by: str | tuple[str, ...], n: int) -> Callable[[Rows], float | None]:
    def value(rows: Rows) -> float | None:
        one, two = (rows.seconds(workload=workload, by=by, n=n, threads=k) for k in (1, 2))
        return ratio(one, two)

    return value


def share(workload: str, n: int, part: str, by: tuple[str, ...]) -> Callable[[Rows], float | None]:
    """Of what a GPU could do: the time that this part of a step needs at least, in that of the fastest of ours."""

    def value(rows: Rows) -> float | None:
        found = [row for row in rows.where(workload=workload, n=n, device="cuda") if row["by"] in by]
        return max((row["parts"][part] / row["seconds"] for row in found), default=None)

    return value


def launches(rows: Rows) -> float | None:
    return max((row["launches"] for row in rows.timed if row.get("launches") is not None), default=None)


TARGETS = (
    *(
        Target(f"A, N = {n:,}, one-pass drift", "ns/particle", 2.7, lambda r, n=n: r.cost(workload="A", n=n))
        for n in (10**5, 10**6)
    ),
    *(
        Target(f"A, N = {n:,}, fused", "ns/particle", 1.8, lambda r, n=n: r.cost(workload="A", n=n, by=FUSED))
        for n in (10**5, 10**6)
    ),
    *(
        Target(
            f"A, N = {n:,}, float64", "ns/particle", 3.6, lambda r, n=n: r.cost(workload="A", n=n, dtype="float64")
        )
        for n in (10**5, 10**6)
    ),
    Target("A, N = 1,000,000, two cores", "times faster", 1.7, scaling("A", "mfsde", 10**6), at_least=True),
    Target(
        "A, 64 replicas of N = 1,000", "µs/replica-step", 3.1,
        lambda r: None if (s := r.seconds(workload="A", n=1000, replicas=64)) is None else 1e6 * s / 64,
    ),
    *(
        Target(
            f"B exact, N = {n:,}", "ns/pair", 0.40, lambda r, n=n: r.cost(workload="B", n=n, by=EXACT)
        )
        for n in (10**4, 10**5)
    ),
    Target("B exact, N = 10,000, two cores", "times faster", 1.6, scaling("B", EXACT, 10**4), at_least=True),
    Target(
        "B exact, N = 10,000, against KeOps", "times faster", 10.0,
        lambda r: ratio(r.seconds(workload="B", n=10**4, by="KeOps"), r.seconds(workload="B", n=10**4, by=EXACT[:2])),
        at_least=True,
    ),
    Target(
        "B smooth kernel, N = 10,000, error <= 1e-3", "ms/step", 1.5,
        lambda r: None if (s := smooth(r, n=10**4)) is None else 1e3 * s,
    ),
    Target("C, N = 10,000", "ms/step", 14.0, lambda r: r.cost(workload="C", n=10**4, by=FUSED)),
    Target("C, N = 1,000", "ms/step", 1.4, lambda r: r.cost(workload="C", n=10**3, by=FUSED)),
    Target("GPU: A, N = 1e7, of the copy bandwidth", "share", 0.6, share("A", 10**7, "copy", FUSED), at_least=True),
    Target("GPU: B, N = 1e5, of the exp ceiling", "share", 0.5, share("B", 10**5, "exp", EXACT), at_least=True),
    Target("GPU: C, N = 1e5, of the matmul ceiling", "share", 0.5, share("C", 10**5, "products", FUSED), at_least=True),
    Target("GPU: launches per step", "launches", 3.0, launches),
    Target("import mfsde beyond torch", "s", 0.3, lambda r: r.startup.get("import")),
    Target("first step of an eager run", "s", 0.1, lambda r: r.startup.get("first step")),
)  # fmt: skip


def verdicts(rows: Iterable[Row], startup: dict[str, float]) -> list[Row]:
    timed = Rows(tuple(row for row in rows if row.get("seconds") is not None), startup)
    return [target.verdict(timed) for target in TARGETS]
