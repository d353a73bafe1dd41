"""How far a run is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

# Seconds between two lines where no terminal draws a bar.
LINE_EVERY = 10.0


class Progress:
    """Counts steps of a run, with steps per second and time left; silent unless shown.

    Used as a context manager; `at(step)` may be called as often as one likes.
    """

    def __init__(self, name: str, first: int, last: int, shown: bool, unit: str = "step") -> None:
        self._name, self._first, self._last, self._unit = name, first, last, unit
        self._shown = shown
        self._bar: tqdm | None = None
        self._began = self._printed = time.monotonic()

    def __enter__(self) -> Progress:
        if self._shown and sys.stderr.isatty():
            self._bar = tqdm(total=self._last, initial=self._first, desc=self._name, unit=self._unit)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def at(self, step: int) -> None:
        """The run has reached this step."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
        elif self._shown:
            self._print(step)

    def _print(self, step: int) -> None:
        now = time.monotonic()
        if now - self._printed < LINE_EVERY and step < self._last:
            return
        self._printed = now
        rate = (step - self._first) / max(now - self._began, 1e-9)
        left = (self._last - step) / rate if rate > 0 else float("inf")
        print(
            f"{self._name}: {self._unit} {step} of {self._last}, {rate:.3g} {self._unit}s/s, {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )
