"""The clock of a run: steps are integers, times are formed from them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Clock:
    """Steps to times: t = step·dt."""

    dt: float

    def time(self, step: float) -> float:
        """Physical time of a step, or of a stage between two steps."""
        return float(step) * self.dt
