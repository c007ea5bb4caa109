"""Sleeps until a meter of the host is due. Owned by the poll thread, which reads what it says.

Meters that can be read at any time are read together (`read_pace.py`); a counter that moves by itself is read
when it moves (`edge_lock.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from replicas.energy.ask_pipe import AskPipe
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
        """Those to read now; empty when something was said meanwhile that may change what is due."""
        pace, now_ns = self.pace, self._clock()
        paced_ns = pace.due_ns()
        if not any(one.edges for one in pollers):
            return self._wait_paced(pollers, now_ns, paced_ns)
        dues_ns = [
            paced_ns if one.edges is None else one.edges.due_ns(now_ns, gap_ns=pace.edge_gap_ns(now_ns))
            for one in pollers
        ]
        first_ns = max(min(dues_ns), now_ns)
        if first_ns > now_ns and self._hears(now_ns, first_ns):
            return ()
        if first_ns >= paced_ns:
            pace.note_read(first_ns)
        return [one for one, due_ns in zip(pollers, dues_ns, strict=True) if due_ns <= first_ns]

    def _wait_paced(
        self, pollers: Sequence[MeterPoller], now_ns: int, paced_ns: int
    ) -> Sequence[MeterPoller]:
        """As above, of meters that are all read together: the less code runs, the less it costs."""
        if paced_ns > now_ns and self._hears(now_ns, paced_ns):
            return ()
        self.pace.note_read(max(now_ns, paced_ns))
        return pollers

    def _hears(self, now_ns: int, until_ns: int) -> bool:
        """Sleep until then, or until something is said that may change what is due: then True.

        A plain sleep is the cheapest, and serves for as long as no word could be heeded.
        """
        asks, pace = self.asks, self.pace
        deaf_ns = until_ns if asks is None or pace.is_asked else min(until_ns, pace.deaf_until_ns)
        if deaf_ns > now_ns:
            time.sleep((deaf_ns - now_ns) / 1e9)
            if asks is None or self._take(asks) or deaf_ns == until_ns:
                return deaf_ns < until_ns
        return asks is not None and asks.wait((until_ns - max(now_ns, deaf_ns)) / 1e9) and self._take(asks)

    def _take(self, asks: AskPipe) -> bool:
        """Whether anything was said."""
        has_word, has_ask = asks.take()
        if has_ask:
            self.pace.hear_ask(self._clock())
        elif has_word:
            self.pace.hear_running(self._clock())
        return has_word
