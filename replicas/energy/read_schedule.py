"""Sleeps until a meter of the host is due. Owned by the poll thread, which reads what it says.

Meters that can be read at any time are read together (`read_pace.py`); a counter that moves by itself is read
when it moves (`edge_lock.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from replicas.energy.ask_pipe import ASK, AskPipe
from replicas.energy.polling import MeterPoller
from replicas.energy.read_pace import ReadPace


class ReadSchedule:
    """Listens meanwhile to what watchers say in `asks`; None: there are none who can."""

    def __init__(self, *, poll_s: float, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.asks: AskPipe | None = None
        self.pace = ReadPace(poll_ns=round(poll_s * 1e9), now_ns=clock())
        self._clock = clock

    def wake(self) -> None:
        """Somebody has come or gone: look again. From any thread."""
        if self.asks is not None:
            self.asks.wake()

    def close(self, *, is_waiting: bool) -> None:
        """`is_waiting`: a thread may be in there for ever."""
        asks, self.asks = self.asks, None
        if asks is not None:
            asks.close(keeps_file=is_waiting)

    def wait(self, pollers: Sequence[MeterPoller]) -> Sequence[MeterPoller]:
        """Meters that can be read at any time, when they are due; empty when something was said meanwhile
        that may change when that is. The less code runs here, the less it costs."""
        pace, now_ns = self.pace, self._clock()
        due_ns = pace.due_ns
        if due_ns > now_ns and self._hears(now_ns, due_ns, is_asked=pace.is_asked):
            return ()
        pace.note_read(max(now_ns, due_ns))
        return pollers

    def wait_for_edges(self, pollers: Sequence[MeterPoller]) -> Sequence[MeterPoller]:
        """As above, where counters are among them that move by themselves: those that are due."""
        pace, now_ns = self.pace, self._clock()
        paced_ns, is_asked, has_paced = pace.due_ns, False, False
        dues_ns = []
        for one in pollers:
            if one.edges is None:
                has_paced, due_ns = True, paced_ns
                is_asked = is_asked or pace.is_asked
            else:
                due_ns = one.edges.due_ns(now_ns, after_ns=pace.edge_due_ns(one.edge_ns))
                is_asked = is_asked or pace.is_edge_asked(one.edge_ns)
            dues_ns.append(due_ns)
        first_ns = max(min(dues_ns), now_ns)
        if first_ns > now_ns and self._hears(now_ns, first_ns, is_asked=is_asked):
            return ()
        if first_ns >= paced_ns or not has_paced:
            pace.note_read(first_ns)
        return [one for one, due_ns in zip(pollers, dues_ns, strict=True) if due_ns <= first_ns]

    def _hears(self, now_ns: int, until_ns: int, *, is_asked: bool) -> bool:
        """Sleep until then, or until something is said that may change what is due: then True.

        What is asked for already comes no sooner by another word: a plain sleep serves, the cheapest of all.
        """
        asks, left_s = self.asks, (until_ns - now_ns) / 1e9
        if asks is not None and not is_asked:
            return asks.wait(left_s) and self._take(asks)
        time.sleep(left_s)
        if asks is not None and not self.pace.num_assumed:
            self._take(asks)
        return False

    def _take(self, asks: AskPipe) -> bool:
        """Whether anything was said."""
        words = asks.take()
        if words:
            self.pace.hear(self._clock(), has_ask=ASK in words)
        return bool(words)
