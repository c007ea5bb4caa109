"""Ctrl-C and SIGTERM: the first asks, the second insists. And the signal of `wattline roll`."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ROLL_SIGNAL = signal.SIGUSR1


class ForcedStop(BaseException):
    """The second signal: whatever is being waited for is left. Not an Exception, so nothing swallows it."""


class Interrupts:
    """Handles both signals while entered, in the main thread. `requested`: the first one came."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._is_roll_wanted = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
        signal.signal(ROLL_SIGNAL, signal.SIG_DFL)

    def install(self) -> None:
        """Take both signals, also from a library that took them since."""
        for number in SIGNALS:
            signal.signal(number, self._note)
        signal.signal(ROLL_SIGNAL, self._note_roll)

    @property
    def requested(self) -> bool:
        return self._event.is_set()

    def take_roll(self) -> bool:
        """Whether new routers are wanted; true once per wish."""
        is_wanted, self._is_roll_wanted = self._is_roll_wanted, False
        return is_wanted

    def wait(self, timeout_s: float) -> bool:
        """Sleep until the first signal or the timeout; True if it came."""
        return self._event.wait(timeout_s)

    def _note_roll(self, number: int, frame: FrameType | None) -> None:
        self._is_roll_wanted = True

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._event.is_set():
            raise ForcedStop
        self._event.set()
