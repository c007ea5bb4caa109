"""When the meters of a host are read next: as rarely as the bills of its requests allow. Pure: time comes in.

Each read wakes the agent and every watcher, and a bill needs but one edge after its last token. So watchers
say when requests run and when one begins or ends (`ask_pipe.py`), and that is when edges come.
"""

from __future__ import annotations

_USUAL_POLLS = 10
_USUAL_NS = 500_000_000
_SILENT_POLLS = 2
_IDLE_POLLS = 20
_IDLE_NS = 1_000_000_000
_RUNNING_NS = 3_000_000_000
"""Watchers say every 2 s that requests run (`ask_pipe.py`)."""
_PRICE_POLLS = 2
_CREDIT_READS = 10
_TRAIN_READS = 1


class ReadPace:
    """In units of `poll_ns` (50 ms by default): an edge every 10 while requests run, every 20 while none do;
    not less than one each half second and each second, unless a unit is longer.

    A read that is asked for comes at once, but half of one after the last at the earliest, and on average at
    most one in 2: reads that were not needed are saved up, ten of them. Who has used them up is taken to
    ask for the next read as well: to listen costs as much as to read. A watcher that cannot ask
    (`is_silent`) gets one every 2, always. A counter that moves by itself (`edge_due_ns`) has edges when its
    driver moves it, and no two that are asked for within 2 of these.
    """

    def __init__(self, *, poll_ns: int, now_ns: int) -> None:
        self.is_silent = False
        """Heeded from the next read on."""
        self.num_assumed = 0
        """Reads to come that count as asked for, whatever is said."""
        self._poll_ns = poll_ns
        self._silent_ns = _SILENT_POLLS * poll_ns
        self._usual_ns = max(self._silent_ns, min(_USUAL_POLLS * poll_ns, _USUAL_NS))
        self._idle_ns = max(self._silent_ns, min(_IDLE_POLLS * poll_ns, _IDLE_NS))
        self._price_ns = _PRICE_POLLS * poll_ns
        self._last_ns = now_ns - self._idle_ns
        self._paid_ns = now_ns
        """Reads up to now are paid for until then."""
        self._running_until_ns = self._asked_ns = self._last_ns - 1
        self._plan()

    def hear(self, now_ns: int, *, has_ask: bool) -> None:
        """Requests run; `has_ask`: one began or ended, so an edge is wanted that is later than `now_ns`."""
        self._running_until_ns = now_ns + _RUNNING_NS
        if has_ask:
            self._asked_ns = now_ns
        self._plan()

    def note_read(self, now_ns: int) -> None:
        was_asked, self._last_ns = self._asked_ns >= self._last_ns, now_ns
        self._paid_ns = max(self._paid_ns, now_ns) + self._price_ns
        if self.num_assumed:
            self.num_assumed -= 1
        elif was_asked and self._paid_ns - _CREDIT_READS * self._price_ns > now_ns + self._poll_ns:
            self.num_assumed = _TRAIN_READS
        self._plan()

    def is_edge_asked(self, edge_ns: int) -> bool:
        """Of a counter that moves by itself, whose last edge was then: whether the next is asked for."""
        return self._asked_ns >= edge_ns or self.num_assumed > 0

    def edge_due_ns(self, edge_ns: int) -> int:
        """From when on its next edge is wanted."""
        return edge_ns + (self._silent_ns if self.is_edge_asked(edge_ns) else self._gap_ns(edge_ns))

    def _plan(self) -> None:
        """Once for each change, not for each look: what is not run again need not be in a cache."""
        last_ns = self._last_ns
        self.is_asked = self._asked_ns >= last_ns or self.num_assumed > 0
        """A read is wanted sooner than it comes by itself."""
        if self.is_asked:
            paid_ns = self._paid_ns - _CREDIT_READS * self._price_ns
            self.due_ns = max(last_ns + self._poll_ns // 2, paid_ns)
            """The next read, if nobody asks for it sooner."""
        else:
            self.due_ns = last_ns + self._gap_ns(last_ns)

    def _gap_ns(self, last_ns: int) -> int:
        if self.is_silent:
            return self._silent_ns
        return self._usual_ns if last_ns < self._running_until_ns else self._idle_ns
