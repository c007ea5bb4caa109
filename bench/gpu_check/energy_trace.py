"""A thread that watches the energy counter while work runs, and windows between the counter's edges.

The counter moves about every 100 ms; between two of its edges the energy is known to the millijoule, and the
work done there is interpolated from the times at which steps were known to be complete.
"""

from __future__ import annotations

import bisect
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

Counter = Callable[[], int]
"""Millijoules, never falling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnergyWindow:
    """Between two edges of the counter."""

    start_s: float
    end_s: float
    energy_j: float

    @property
    def power_w(self) -> float:
        return self.energy_j / (self.end_s - self.start_s)


@dataclass(slots=True)
class EnergyTrace:
    """Polls `counter` every `period_s` from `__enter__` to `__exit__`; `edges` are (seconds, millijoules)."""

    counter: Counter
    period_s: float = 0.005
    edges: list[tuple[float, int]] = field(default_factory=list)
    num_polls: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> EnergyTrace:
        self._thread = threading.Thread(target=self._watch, name="energy-trace", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        assert self._thread is not None
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        last = self.counter()
        while not self._stop.wait(self.period_s):
            value = self.counter()
            self.num_polls += 1
            if value != last:
                self.edges.append((time.perf_counter(), value))
                last = value


def widest_window(edges: list[tuple[float, int]], start_s: float, end_s: float) -> EnergyWindow | None:
    """The longest window between edges within [start, end]; None where fewer than two edges lie there."""
    inside = [edge for edge in edges if start_s <= edge[0] <= end_s]
    if len(inside) < 2:
        return None
    (first_s, first_mj), (last_s, last_mj) = inside[0], inside[-1]
    return EnergyWindow(start_s=first_s, end_s=last_s, energy_j=(last_mj - first_mj) / 1e3)


def done_at(marks: list[tuple[float, float]], at_s: float) -> float:
    """Work done by `at_s`, between marks of (seconds, work done so far), which ascend."""
    index = bisect.bisect_left(marks, (at_s, 0.0))
    if index == 0:
        return marks[0][1]
    if index == len(marks):
        return marks[-1][1]
    (before_s, before), (after_s, after) = marks[index - 1], marks[index]
    return before + (after - before) * (at_s - before_s) / (after_s - before_s)
