"""One meter, read once for all who watch it. Keeps edges only.

Owned by the agent, read by its `poll_thread.py`. Watchers that read slowly get wider windows, never wrong
ones.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from dataclasses import replace

from replicas.energy.edge_pipe import EdgePipe
from replicas.energy.host_meter import HostMeter, HostSeat
from replicas.energy.meter import Meter, MeterHealth, MeterScope, MeterState, Reading, Source

_EDGES_KEPT = 256
_POWER_NS = 500_000_000
_HANGS = MeterHealth(state=MeterState.LOST)


class Subscriber:
    """Edges on their way to one watcher. Made in the event loop that takes them.

    With a `pipe` the watcher reads them there, and `take` has nothing to give but what is told and the end.
    """

    def __init__(self, pipe: EdgePipe | None = None) -> None:
        self.put = self._keep if pipe is None else pipe.write
        """Give it an edge. From any thread."""
        self._edges: deque[Reading] = deque()
        self._told: MeterState | None = None
        self._event = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._failure: BaseException | None = None

    def tell(self, state: MeterState) -> None:
        """No edges come, or they come again. From any thread."""
        self._told = state
        self._loop.call_soon_threadsafe(self._event.set)

    def fail(self, failure: BaseException) -> None:
        """No edge will come any more."""
        self._failure = failure
        self._loop.call_soon_threadsafe(self._event.set)

    async def take(self) -> list[Reading] | MeterState:
        """All edges there are, or what is told; waits for one. Safe to cancel.

        Raises what ended the polling.
        """
        await self._event.wait()
        if self._failure is not None:
            raise RuntimeError("the meter's polling ended") from self._failure
        told, self._told = self._told, None
        if told is None or not self._edges:
            self._event.clear()
        if told is not None:
            return told
        return [self._edges.popleft() for _ in range(len(self._edges))]

    def _keep(self, edge: Reading) -> None:
        self._edges.append(edge)
        if len(self._edges) > _EDGES_KEPT:
            dropped = self._edges.popleft()
            self._edges[0] = replace(self._edges[0], gap=self._edges[0].gap or dropped.gap)
        self._loop.call_soon_threadsafe(self._event.set)


class MeterPoller:
    """Reads `meter` when the poll thread says so, and hands each edge to the subscribers."""

    def __init__(self, meter: Meter, *, group: str) -> None:
        self.group = group
        self.last: Reading | None = None
        self.sums_mj: dict[Source, int] = {}
        """What was counted since its making, by the source of each edge; replaced, never changed."""
        self._marks: tuple[Reading, Reading] | None = None
        self._meter = meter
        self.edges = meter.edges
        """When to read it, where its counter moves by itself."""
        self._seat: HostSeat | None = None
        self._subscribers: tuple[Subscriber, ...] = ()
        self._failure: Exception | None = None
        self._hangs = self._owes_gap = False
        self._lock = threading.Lock()

    @property
    def scope(self) -> MeterScope:
        return self._meter.scope

    @property
    def edge_ns(self) -> int:
        """Of the last one; 0: there is none yet."""
        return 0 if self.last is None else self.last.t_ns

    @property
    def health(self) -> MeterHealth:
        return _HANGS if self._hangs else self._meter.health()

    @property
    def power_w(self) -> float | None:
        """Averaged over the last half second, or up to twice that."""
        return self._power_w(self.last)

    @property
    def has_seat(self) -> bool:
        return self._seat is not None

    @property
    def is_watched(self) -> bool:
        return bool(self._subscribers)

    def sit_at(self, host: HostMeter) -> None:
        """From the next edge on its part of the host's own energy is known."""
        self._seat = host.seat(self._meter)

    def close(self) -> None:
        """After its last poll."""
        if self._seat is not None:
            self._seat.leave()
        self._meter.close()

    def subscribe(self, pipe: EdgePipe | None = None) -> Subscriber:
        subscriber = Subscriber(pipe)
        with self._lock:
            if self.last is not None:
                subscriber.put(self.last)
            self._subscribers = (*self._subscribers, subscriber)
            if self._hangs:
                subscriber.tell(self.health.state)
            if self._failure is not None:
                subscriber.fail(self._failure)
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
        if self._hangs:  # It is dated from before it hung, and counts what was drawn since.
            self._owes_gap = self._owes_gap or reading.gap
            return
        if self._owes_gap:
            reading, self._owes_gap = replace(reading, gap=True), False
        if self._marks is None:
            self._marks = (reading, reading)
        elif reading.t_ns - self._marks[1].t_ns >= _POWER_NS:
            self._marks = (self._marks[1], reading)
        if self._seat is not None:
            reading = replace(reading, host_mj=self._seat.take_mj(self._power_w(reading) or 0.0))
        new_mj = 0 if last is None else reading.energy_mj - last.energy_mj
        self.sums_mj = {**self.sums_mj, reading.source: self.sums_mj.get(reading.source, 0) + new_mj}
        with self._lock:
            self.last = reading
            for subscriber in self._subscribers:
                subscriber.put(reading)

    def set_hangs(self, hangs: bool) -> None:
        """A read of it does not return, or has returned; its watchers are told."""
        with self._lock:
            self._hangs = hangs
            for subscriber in self._subscribers:
                subscriber.tell(self.health.state)

    def fail(self, error: Exception) -> None:
        """It is not polled any more; whatever ended that is said to the watchers, also to later ones."""
        with self._lock:
            self._failure = error
            for subscriber in self._subscribers:
                subscriber.fail(error)

    def _power_w(self, reading: Reading | None) -> float | None:
        if self._marks is None or reading is None or reading.t_ns == self._marks[0].t_ns:
            return None
        since = self._marks[0]
        return (reading.energy_mj - since.energy_mj) * 1e6 / (reading.t_ns - since.t_ns)
