"""One meter, polled once for all who watch it. Keeps edges only.

Owned by the agent; the poll is a thread of its own, so that no event loop wakes for a read that finds nothing
new. Watchers that read slowly get wider windows, never wrong ones.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from replicas.energy.edge_pipe import EdgePipe
from replicas.energy.host_meter import HostSeat
from replicas.energy.meter import Meter, MeterHealth, MeterScope, Reading

_EDGES_KEPT = 256
_POWER_PACE = 0.2


class Subscriber:
    """Edges on their way to one watcher, counted from its first one. Made in the event loop that takes them.

    With a `pipe` the watcher reads them there, and `take` has nothing to give but the end.
    """

    def __init__(self, pipe: EdgePipe | None = None) -> None:
        self._pipe = pipe
        self._edges: deque[Reading] = deque()
        self._base: Reading | None = None
        self._has_gap = False
        self._event = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._failure: BaseException | None = None

    def put(self, reading: Reading) -> None:
        """From any thread."""
        base = self._base
        if base is None:
            base = self._base = reading
        static_mj = reading.static_mj
        if static_mj is not None:
            static_mj -= base.static_mj or 0
        has_gap = self._has_gap or (reading.gap and reading is not base)
        edge = Reading(
            t_ns=reading.t_ns,
            energy_mj=reading.energy_mj - base.energy_mj,
            source=reading.source,
            static_mj=static_mj,
            gap=has_gap,
            host_mj=reading.host_mj,
        )
        if self._pipe is not None:
            is_taken = self._pipe.write(edge)
            self._has_gap = has_gap and not is_taken
            return
        self._edges.append(edge)
        if len(self._edges) > _EDGES_KEPT:
            dropped = self._edges.popleft()
            self._edges[0] = replace(self._edges[0], gap=self._edges[0].gap or dropped.gap)
        self._loop.call_soon_threadsafe(self._event.set)

    def fail(self, failure: BaseException) -> None:
        """No edge will come any more."""
        self._failure = failure
        self._loop.call_soon_threadsafe(self._event.set)

    async def take(self) -> list[Reading]:
        """All edges there are; waits for one. Safe to cancel. Raises what ended the polling."""
        await self._event.wait()
        if self._failure is not None:
            raise RuntimeError("the meter's polling ended") from self._failure
        self._event.clear()
        return [self._edges.popleft() for _ in range(len(self._edges))]


class MeterPoller:
    """Reads `meter` every `poll_s` from `start()` to `stop()` and hands each edge to the subscribers.

    `energy_mj` and `power_w` are for display: the count since the start, and an average over some edges.
    """

    def __init__(
        self,
        meter: Meter,
        *,
        group: str,
        poll_s: float,
        on_read_s: Callable[[float], None],
        seat: HostSeat | None = None,
    ) -> None:
        """`seat`: where its part of the host's own energy is known, if anywhere."""
        self.group = group
        self.last: Reading | None = None
        self.energy_mj = 0
        self.power_w: float | None = None
        self._meter = meter
        self._poll_s = poll_s
        self._on_read_s = on_read_s
        self._seat = seat
        self._subscribers: tuple[Subscriber, ...] = ()
        self._lock = threading.Lock()
        self._is_ending = False
        self._thread = threading.Thread(target=self._run, name=f"energy-poll-{group}", daemon=True)

    @property
    def scope(self) -> MeterScope:
        return self._meter.scope

    @property
    def health(self) -> MeterHealth:
        return self._meter.health()

    @property
    def is_watched(self) -> bool:
        return bool(self._subscribers)

    def start(self) -> None:
        self._thread.start()

    async def stop(self) -> None:
        self._is_ending = True
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)
        if self._seat is not None:
            self._seat.leave()
        self._meter.close()

    def subscribe(self, pipe: EdgePipe | None = None) -> Subscriber:
        subscriber = Subscriber(pipe)
        with self._lock:
            if self.last is not None:
                subscriber.put(self.last)
            self._subscribers = (*self._subscribers, subscriber)
        return subscriber

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """No edge goes to it after this."""
        with self._lock:
            self._subscribers = tuple(one for one in self._subscribers if one is not subscriber)

    def poll(self) -> None:
        """Read once; an edge (a reading with a newer time) goes to every subscriber."""
        reading = self._meter.read()
        last = self.last
        if reading is None or (last is not None and reading.t_ns <= last.t_ns):
            return
        if last is not None:
            delta_mj = reading.energy_mj - last.energy_mj
            self.energy_mj += delta_mj
            self._note_power(delta_mj * 1e6 / (reading.t_ns - last.t_ns))
        if self._seat is not None:
            reading = replace(reading, host_mj=self._seat.take_mj(self.power_w or 0.0))
        with self._lock:
            self.last = reading
            for subscriber in self._subscribers:
                subscriber.put(reading)

    def _run(self) -> None:
        """The thread; a sleep is the cheapest way to wait. Whatever ends it early is said to the watchers."""
        try:
            while not self._is_ending:
                start_s = time.perf_counter()
                self.poll()
                took_s = time.perf_counter() - start_s
                self._on_read_s(took_s)
                time.sleep(max(self._poll_s - took_s, self._poll_s / 10))
        except Exception as error:
            with self._lock:
                for subscriber in self._subscribers:
                    subscriber.fail(error)

    def _note_power(self, power_w: float) -> None:
        old_w = self.power_w
        self.power_w = power_w if old_w is None else old_w + _POWER_PACE * (power_w - old_w)
