"""The one thread that reads the meters of a host: all of them, one after the other, each time it wakes.

To wake costs more than to read, so meters share their wake-ups, and no event loop wakes for a read that finds
nothing new. Between two rounds others have the processor's caches, so what a round costs is what it touches:
the second meter of a round is read for a tenth of what the first one takes. Owned by the agent.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from replicas.energy.polling import MeterPoller

_QUIET_S = 0.1


class PollThread:
    """Reads each of its pollers, waits `poll_s`, and so on; there is a thread while there are any.

    While all of them say that nothing runs it waits up to 100 ms, as long as a GPU takes for an edge: so late
    is the first edge of what runs then, and the last of what is over by that time. `num_reads` counts the
    reads of all meters.
    """

    def __init__(self, *, poll_s: float, sleep: Callable[[float], None] = time.sleep) -> None:
        self.num_reads = 0
        self._poll_s = poll_s
        self._quiet_s = max(poll_s, _QUIET_S)
        self._sleep = sleep
        self._pollers: tuple[MeterPoller, ...] = ()
        self._is_running = False
        self._changing = threading.Lock()
        """To change the two above."""
        self._reading = threading.Lock()
        """Held for a round, which takes the pollers as they are when it begins."""

    def add(self, poller: MeterPoller) -> None:
        """It is read from the next round on."""
        with self._changing:
            self._pollers = (*self._pollers, poller)
            if not self._is_running:
                self._is_running = True
                threading.Thread(target=self._run, name="energy-poll", daemon=True).start()

    def remove(self, poller: MeterPoller) -> None:
        """It is in no further round; the one that runs may still read it."""
        with self._changing:
            self._pollers = tuple(one for one in self._pollers if one is not poller)

    def wait_round(self) -> None:
        """Block until the round that runs, if any, is over."""
        with self._reading:
            return

    def _run(self) -> None:
        """A sleep is the cheapest way to wait. A meter that breaks is alone in that, and is read no more."""
        while self._pollers or self._goes_on():
            is_quiet = True
            with self._reading:
                for poller in self._pollers:
                    try:
                        poller.poll()
                    except Exception as error:
                        self.remove(poller)
                        poller.fail(error)
                    self.num_reads += 1
                    is_quiet = is_quiet and poller.is_quiet
            self._sleep(self._quiet_s if is_quiet else self._poll_s)

    def _goes_on(self) -> bool:
        """Whether a poller was added meanwhile; if not, the next one gets a thread of its own."""
        with self._changing:
            self._is_running = bool(self._pollers)
            return self._is_running
