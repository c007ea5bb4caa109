"""Why replicas are missing while `up` runs, said once each time: what Ray waits for, or what it failed at.

Ray is asked in a thread of its own: where it is not well itself it does not answer, and routers must be
tended.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from rich.console import Console

ASK_AFTER_S = 10.0
"""A replica that is replaced at once needs no words. Until Ray knows a reason it is asked again."""


class Shortage:
    """Mutable; owned by the loop that calls `note`."""

    def __init__(
        self,
        reasons: Callable[[], list[str]],
        console: Console,
        *,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._reasons = reasons
        self._console = console
        self._clock_s = clock_s
        self._ask_at_s: float | None = None
        self._thread: threading.Thread | None = None
        self._is_told = False

    def note(self, is_short: bool) -> None:
        """Call it often."""
        if not is_short:
            self._ask_at_s, self._is_told = None, False
            return
        now_s = self._clock_s()
        if self._ask_at_s is None:
            self._ask_at_s = now_s + ASK_AFTER_S
        is_asking = self._thread is not None and self._thread.is_alive()
        if now_s >= self._ask_at_s and not is_asking and not self._is_told:
            self._ask_at_s = now_s + ASK_AFTER_S
            self._thread = threading.Thread(target=self._tell, name="shortage", daemon=True)
            self._thread.start()

    def _tell(self) -> None:
        for reason in self._reasons():
            self._console.print(reason, soft_wrap=True)
            self._is_told = True
