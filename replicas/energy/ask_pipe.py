"""What watchers tell their agent, one byte a word, in one named pipe: requests run, an edge is wanted.

The agent owns the pipe (`AskPipe`), and its poll thread waits there; a watcher of this host has an `Asker`.
Words are hints: one that is lost makes an edge late, and nothing wrong.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

RUNNING = b"r"
ASK = b"a"
_WORDS_BYTES = 4096
_SAY_RUNNING_NS = 2_000_000_000


class AskPipe:
    """The agent's end. Holds some thousand words; more are not needed, they all say the same."""

    def __init__(self, path: Path) -> None:
        """Raises OSError where no pipe can be made. What lies there is of an agent that is gone."""
        path.unlink(missing_ok=True)
        os.mkfifo(path, mode=0o600)
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(self._file, select.POLLIN)

    def wait(self, timeout_s: float) -> bool:
        """Sleep so long, or until somebody speaks; says whether somebody did."""
        return bool(self._poll.poll(timeout_s * 1e3))

    def take(self) -> bytes:
        """The words that were said since the last time; empty: none."""
        try:
            return os.read(self._file, _WORDS_BYTES)
        except BlockingIOError:
            return b""

    def wake(self) -> None:
        """Ask, for somebody who has just come. From any thread."""
        with suppress(BlockingIOError):
            os.write(self._file, ASK)

    def close(self, *, keeps_file: bool) -> None:
        """`keeps_file`: a thread may still wait there."""
        self.path.unlink(missing_ok=True)
        if not keeps_file:
            os.close(self._file)


class Asker:
    """The watcher's end; says nothing while no agent listens. Lives in one thread."""

    def __init__(self, *, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock = clock
        self._file: int | None = None
        self._said_ns = 0

    def open(self, path: str) -> None:
        """The pipe of the agent that is watched now. Raises OSError."""
        self.close()
        self._file = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        self._said_ns = 0

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def ask(self) -> None:
        """A request begins or ends here: an edge is wanted soon."""
        self._say(ASK)

    def note_running(self) -> None:
        """Call it as often as you like while requests run."""
        if self._file is not None and self._clock() - self._said_ns >= _SAY_RUNNING_NS:
            self._say(RUNNING)

    def _say(self, word: bytes) -> None:
        """Into a pipe that is full or has no agent any more, nothing: the next dial opens another."""
        if self._file is None:
            return
        self._said_ns = self._clock()
        with suppress(BlockingIOError, BrokenPipeError):
            os.write(self._file, word)
