"""When the meters of a host are read next: as rarely as the bills of its requests allow. Pure: time comes in.

Each read wakes the agent and every watcher, and a bill needs but one edge after its last token. So watchers
say when requests run and when one begins or ends (`ask_pipe.py`), and that is when edges come.
"""

from __future__ import annotations

_USUAL_POLLS = 10
_SILENT_POLLS = 2
_IDLE_POLLS = 20
_RUNNING_NS = 3_000_000_000
"""Watchers say every 2 s that requests run (`ask_pipe.py`)."""
_CREDIT_POLLS = 20


class ReadPace:
    """In units of `poll_ns` (50 ms by default): a read every 10 while requests run, every 20 while none do.

    A read that is asked for comes at once, but half of one after the last at the earliest, and on average at
    most one in 2: reads that were not needed are saved up, ten of them. A watcher that cannot ask
    (`is_silent`) gets one every 2, always.
    """

    def __init__(self, *, poll_ns: int, now_ns: int) -> None:
        self.is_silent = False
        self.is_asked = False
        """A read is wanted sooner than it comes by itself."""
        self.deaf_until_ns = now_ns
        """Until then nothing that is said makes it come sooner; only told once all that was saved is used."""
        self._poll_ns = poll_ns
        self._last_ns = now_ns - _IDLE_POLLS * poll_ns
        self._paid_ns = now_ns
        """Reads up to now are paid for until then, at 2 each."""
        self._running_until_ns = now_ns

    def hear_running(self, now_ns: int) -> None:
        self._running_until_ns = now_ns + _RUNNING_NS

    def hear_ask(self, now_ns: int) -> None:
        """A request began or ended: an edge is wanted that is later than `now_ns`."""
        self.hear_running(now_ns)
        self.is_asked = True

    def note_read(self, now_ns: int) -> None:
        self._last_ns = now_ns
        self._paid_ns = max(self._paid_ns, now_ns) + _SILENT_POLLS * self._poll_ns
        soonest_ns = self._soonest_ns()
        self.deaf_until_ns = soonest_ns if self.is_asked and soonest_ns > now_ns + self._poll_ns else now_ns
        self.is_asked = False

    def edge_gap_ns(self, now_ns: int) -> int:
        """The least time between two edges of a counter that moves by itself."""
        is_running = self.is_silent or now_ns < self._running_until_ns
        return (_SILENT_POLLS if is_running else _IDLE_POLLS) * self._poll_ns

    def due_ns(self) -> int:
        """The next read, if nobody asks for it sooner."""
        if self.is_asked:
            return self._soonest_ns()
        if self.is_silent:
            return self._last_ns + _SILENT_POLLS * self._poll_ns
        is_running = self._last_ns < self._running_until_ns
        return self._last_ns + (_USUAL_POLLS if is_running else _IDLE_POLLS) * self._poll_ns

    def _soonest_ns(self) -> int:
        return max(self._last_ns + self._poll_ns // 2, self._paid_ns - _CREDIT_POLLS * self._poll_ns)
