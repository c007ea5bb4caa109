"""Single keys from the terminal, without Enter. Where there is no terminal, no key is ever pressed."""

from __future__ import annotations

import os
import select
import sys
import termios
import time
import tty
from types import TracebackType
from typing import Self


class Keyboard:
    """While entered, keys come one by one and are not shown; Ctrl-C still interrupts."""

    def __init__(self) -> None:
        self._before: list[object] | None = None

    def __enter__(self) -> Self:
        if sys.stdin.isatty():
            self._before = termios.tcgetattr(sys.stdin.fileno())
            tty.setcbreak(sys.stdin.fileno())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, self._before)  # type: ignore[arg-type]

    def wait_key(self, timeout_s: float) -> str:
        """The next key; empty when none came in time. The end of the input is Ctrl-D."""
        if self._before is None:
            time.sleep(timeout_s)
            return ""
        readable, _, _ = select.select([sys.stdin], [], [], timeout_s)
        if not readable:
            return ""
        # Not through `sys.stdin`, whose buffer would hide further keys from `select`.
        keys = os.read(sys.stdin.fileno(), 64).decode(errors="replace")
        return keys[0] if keys else "\x04"
