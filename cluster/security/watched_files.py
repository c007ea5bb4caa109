"""Files that may change while the router runs: noticed by time, size and inode, looked at once a second."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic

LOOK_PERIOD_S = 1.0

Stamp = tuple[tuple[int, int, int], ...]


class WatchedFiles:
    """Says when one of its files changed. Safe to call from several threads."""

    def __init__(self, paths: Sequence[Path], *, clock_s: Callable[[], float] = monotonic) -> None:
        self._paths = tuple(paths)
        self._clock_s = clock_s
        self._lock = threading.Lock()
        self._seen = _stamp(self._paths)
        self._look_at_s = clock_s() + LOOK_PERIOD_S

    def changed(self) -> bool:
        """Whether to read them again: true once per change, to the first who asks.

        A change that is under way, a file missing, is no change yet.
        """
        with self._lock:
            if self._clock_s() < self._look_at_s:
                return False
            self._look_at_s = self._clock_s() + LOOK_PERIOD_S
            stamp = _stamp(self._paths)
            if not stamp or stamp == self._seen:
                return False
            self._seen = stamp
            return True

    def look_again(self) -> None:
        """They could not be used: read them again, changed or not. What was wrong may be beside them."""
        with self._lock:
            self._seen = ()


def _stamp(paths: tuple[Path, ...]) -> Stamp:
    """Empty: one of them is not there."""
    try:
        stats = [path.stat() for path in paths]
    except OSError:
        return ()
    return tuple((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats)
