"""Ctrl-C and SIGTERM: the first asks, the second insists."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class ForcedStop(BaseException):
    """The second signal: whatever is being waited for is left. Not an Exception, so nothing swallows it."""


class Interrupts:
    """Handles both signals while entered, in the main thread. `requested`: the first one came."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)

    def install(self) -> None:
        """Take both signals, also from a library that took them since."""
        for number in SIGNALS:
            signal.signal(number, self._note)

    @property
    def requested(self) -> bool:
        return self._event.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Sleep until the first signal or the timeout; True if it came."""
        return self._event.wait(timeout_s)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._event.is_set():
            raise ForcedStop
        self._event.set()
