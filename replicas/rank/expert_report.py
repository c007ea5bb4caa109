"""When rank 0 says how the experts are loaded: at most once a second, and after the last step.

Pure but for the clock it is given; called by the loop of `process.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from replicas.expert_loads import ExpertLoads

REPORT_S = 1.0


class ExpertReport:
    """Owns when the next report is due. `read` None: a model without experts has nothing to say."""

    def __init__(
        self, read: Callable[[], ExpertLoads] | None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._read = read
        self._clock = clock
        self._due_s = 0.0
        self._is_stale = False

    @property
    def wait_s(self) -> float | None:
        """How long the loop may sleep; None: as long as it likes."""
        return max(0.0, self._due_s - self._clock()) if self._is_stale else None

    def note_step(self) -> None:
        self._is_stale = self._read is not None

    def take(self) -> ExpertLoads | None:
        """The loads, if a report is due."""
        if self._read is None or not self._is_stale or self._clock() < self._due_s:
            return None
        self._is_stale = False
        self._due_s = self._clock() + REPORT_S
        return self._read()
