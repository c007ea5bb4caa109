"""One meter, polled once for all who watch it. Keeps edges only.

Owned by the agent; runs in its event loop. Subscribers that read slowly get wider windows, never wrong ones.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from replicas.energy.meter import Meter, MeterHealth, Reading

_EDGES_KEPT = 256
_POWER_PACE = 0.2


class Subscriber:
    """Edges on their way to one watcher, counted from its first one."""

    def __init__(self) -> None:
        self._edges: deque[Reading] = deque()
        self._base: Reading | None = None
        self._event = asyncio.Event()
        self._failure: BaseException | None = None

    def put(self, reading: Reading) -> None:
        base = self._base
        if base is None:
            base = self._base = reading
            reading = replace(reading, gap=False)
        static_mj = reading.static_mj
        if static_mj is not None:
            static_mj -= base.static_mj or 0
        edge = replace(reading, energy_mj=reading.energy_mj - base.energy_mj, static_mj=static_mj)
        self._edges.append(edge)
        if len(self._edges) > _EDGES_KEPT:
            dropped = self._edges.popleft()
            self._edges[0] = replace(self._edges[0], gap=self._edges[0].gap or dropped.gap)
        self._event.set()

    def fail(self, failure: BaseException) -> None:
        """No edge will come any more."""
        self._failure = failure
        self._event.set()

    async def take(self) -> list[Reading]:
        """All edges there are; waits for one. Safe to cancel. Raises what ended the polling."""
        await self._event.wait()
        if self._failure is not None:
            raise RuntimeError("the meter's polling ended") from self._failure
        self._event.clear()
        edges = list(self._edges)
        self._edges.clear()
        return edges


class MeterPoller:
    """Reads `meter` every `poll_s` from `start()` to `stop()` and hands each edge to the subscribers.

    `energy_mj` and `power_w` are for display: the count since the start, and an average over some edges.
    """

    def __init__(
        self, meter: Meter, *, group: str, poll_s: float, on_read_s: Callable[[float], None]
    ) -> None:
        self.group = group
        self.last: Reading | None = None
        self.energy_mj = 0
        self.power_w: float | None = None
        self._meter = meter
        self._poll_s = poll_s
        self._on_read_s = on_read_s
        self._subscribers: set[Subscriber] = set()
        self._task: asyncio.Task[None] | None = None

    @property
    def health(self) -> MeterHealth:
        return self._meter.health()

    @property
    def is_watched(self) -> bool:
        return bool(self._subscribers)

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"energy-poll-{self.group}")
        self._task.add_done_callback(self._on_end)

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._meter.close()

    def subscribe(self) -> Subscriber:
        subscriber = Subscriber()
        if self.last is not None:
            subscriber.put(self.last)
        self._subscribers.add(subscriber)
        return subscriber

    def unsubscribe(self, subscriber: Subscriber) -> None:
        self._subscribers.discard(subscriber)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            start_s = loop.time()
            self.poll()
            took_s = loop.time() - start_s
            self._on_read_s(took_s)
            await asyncio.sleep(max(self._poll_s - took_s, self._poll_s / 10))

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
        self.last = reading
        for subscriber in self._subscribers:
            subscriber.put(reading)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        failure = None if task.cancelled() else task.exception()
        if failure is not None:
            for subscriber in self._subscribers:
                subscriber.fail(failure)

    def _note_power(self, power_w: float) -> None:
        old_w = self.power_w
        self.power_w = power_w if old_w is None else old_w + _POWER_PACE * (power_w - old_w)
