"""The one thread that reads the meters of a host: those that are due, each time it wakes.

To wake costs more than to read, so it wakes rarely (`read_schedule.py`). Between two rounds others have the
processor's caches, so a round costs what it touches.

A read that does not return holds up nobody: a guard looks every 2 s, sets that meter aside with the
thread that hangs in it, and starts another thread for the rest. When the read returns, its meter is read
again with the others, and its thread ends. Owned by the agent.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from replicas.energy.host_meter import HostMeter
from replicas.energy.polling import MeterPoller
from replicas.energy.read_schedule import ReadSchedule

_LOG = logging.getLogger(__name__)
_NAME = "energy-poll"
_LAST_ROUND_S = 1.0

T = TypeVar("T")


class PollThread:
    """Reads and closes its pollers; there is a thread while there are any.

    A read that takes longer than `hang_s` to twice that is said to hang. Each of these keeps a thread, so
    whoever adds meters looks at `num_hung` first. `num_reads` counts the reads of all meters. `host` is read
    before the meters that have a seat at it.
    """

    def __init__(self, schedule: ReadSchedule, *, host: HostMeter | None = None, hang_s: float = 2.0) -> None:
        self.num_reads = 0
        self._schedule = schedule
        self.host = host
        self._hang_s = hang_s
        self._pollers: tuple[MeterPoller, ...] = ()
        self._readable: tuple[MeterPoller, ...] = ()
        """Those of them that do not hang."""
        self._ended: tuple[MeterPoller, ...] = ()
        """To be closed."""
        self._hung: tuple[MeterPoller | HostMeter, ...] = ()
        self._called: list[MeterPoller | HostMeter] = []
        """The one whose meter is called just now. Taken out by the thread when the call returns, or by the
        guard before: whoever does it first goes on, so neither needs a lock for it."""
        self._thread: threading.Thread | None = None
        self._is_running = self._is_guarded = self._has_changed = False
        self._changing = threading.Lock()
        """To change any of these but `_called`; never held while a meter is called."""

    @property
    def num_hung(self) -> int:
        return len(self._hung)

    def add(self, poller: MeterPoller) -> None:
        """It is read from the next round on, which comes soon."""
        with self._changing:
            self._pollers = (*self._pollers, poller)
            self._start()
        self._schedule.wake()

    def end(self, poller: MeterPoller) -> None:
        """It is read no more, and closed once the read that runs, if any, has returned."""
        with self._changing:
            self._pollers = _without(self._pollers, poller)
            self._ended = (*self._ended, poller)
            self._start()
        self._schedule.wake()

    def close(self) -> None:
        """After the end of all: block until they are closed. What hangs is left behind."""
        thread = self._thread
        if thread is not None:
            self._schedule.wake()
            thread.join(_LAST_ROUND_S)
        self._schedule.close(is_waiting=thread is not None and thread.is_alive())

    def _start(self) -> None:
        """After each change, under the lock."""
        self._readable = _without(self._pollers, *self._hung)
        self._has_changed = True
        if self._is_running:
            return
        self._is_running = True
        self._thread = threading.Thread(target=self._run, name=_NAME, daemon=True)
        self._thread.start()
        if not self._is_guarded:
            self._is_guarded = True
            threading.Thread(target=self._guard, name="energy-guard", daemon=True).start()

    def _run(self) -> None:
        """What is in here runs ten times a second, with cold caches: it takes no lock, and calls little."""
        wait = self._schedule.wait
        while True:
            if self._has_changed:
                if not self._settle():
                    return
                has_counter = any(poller.edges is not None for poller in self._readable)
                wait = self._schedule.wait_for_edges if has_counter else self._schedule.wait
            due = wait(self._readable)
            for poller in due if self.host is None else self._with_host(self.host, due):
                if not self._call(poller, poller.poll):
                    return

    def _settle(self) -> bool:
        """Close what has ended. False if none is left to read: the next poller gets a thread of its own."""
        while True:
            with self._changing:
                closable = _without(self._ended, *self._hung)
                if not closable:
                    self._has_changed = False
                    self._is_running = bool(self._readable)
                    return self._is_running
                self._ended = _without(self._ended, closable[0])
            if not self._call(closable[0], closable[0].close):
                return False

    def _with_host(self, host: HostMeter, due: Sequence[MeterPoller]) -> Sequence[MeterPoller | HostMeter]:
        is_due = host not in self._hung and any(poller.has_seat for poller in due)
        return (host, *due) if is_due else due

    def _call(self, poller: MeterPoller | HostMeter, call: Callable[[], None]) -> bool:
        """False: it took too long, and others read by now. A meter that breaks is alone in that."""
        called = self._called = [poller]
        try:
            call()
        except Exception as error:
            self._drop(poller, error)
        try:
            called.pop()
        except IndexError:
            self._take_back(poller)
            return False
        self.num_reads += 1
        return True

    def _drop(self, poller: MeterPoller | HostMeter, error: Exception) -> None:
        with self._changing:
            self._pollers = _without(self._pollers, poller)
            self._readable = _without(self._readable, poller)
            self._has_changed = True
        poller.fail(error)

    def _guard(self) -> None:
        """Twice the same call at two looks: it hangs."""
        seen: list[MeterPoller | HostMeter] = []
        while True:
            time.sleep(self._hang_s)
            with self._changing:
                if not self._is_running:
                    self._is_guarded = False
                    return
                last, seen = seen, self._called
                if seen is last:
                    with suppress(IndexError):
                        self._set_aside(seen.pop())

    def _set_aside(self, poller: MeterPoller | HostMeter) -> None:
        """Under the lock."""
        _LOG.error("energy_agent.read_hangs", extra={"group": poller.group})
        self._hung = (*self._hung, poller)
        poller.set_hangs(True)
        self._is_running = False
        self._start()

    def _take_back(self, poller: MeterPoller | HostMeter) -> None:
        """The call into it has returned after all."""
        with self._changing:
            _LOG.warning("energy_agent.read_returned", extra={"group": poller.group})
            self.num_reads += 1
            self._hung = _without(self._hung, poller)
            poller.set_hangs(False)
            self._start()
        self._schedule.wake()


def _without(pollers: tuple[T, ...], *gone: object) -> tuple[T, ...]:
    return tuple(one for one in pollers if one not in gone)
