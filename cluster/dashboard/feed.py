"""Takes a snapshot a second, remembers it, and hands it to whoever listens: a bounded number of pages.

A listener that does not keep up gets the newest snapshot and misses those between; nothing queues up.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from time import monotonic, time
from typing import Any, TypeAlias

from cluster.dashboard.history import SERIES, History, point_of

PERIOD_S = 1.0
MAX_LISTENERS = 32
RETRY_MS = 1000
"""When a page that lost the stream dials again."""

logger = logging.getLogger(__name__)

Listener: TypeAlias = "asyncio.Queue[str | None]"


class TooManyListeners(Exception):
    """All places are taken; a page that closes frees one."""


class DashboardFeed:
    """Owns the history and the listeners. Make it and use it on one event loop."""

    def __init__(self, *, read: Callable[[], dict[str, Any]], router_id: str, version: str) -> None:
        self._read = read
        self._router = {"id": router_id, "version": version}
        self._started_s = monotonic()
        self._history = History()
        self._listeners: set[Listener] = set()
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False

    @property
    def num_listeners(self) -> int:
        return len(self._listeners)

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="dashboard")

    def close(self) -> None:
        """Stop, and end every stream."""
        self._is_closed = True
        if self._task is not None:
            self._task.cancel()
        for listener in self._listeners:
            _offer(listener, None)

    def tick(self) -> None:
        """Take a snapshot, remember it, hand it on."""
        snapshot = self.snapshot()
        self._history.add(snapshot["point"])
        if self._listeners:
            text = to_event("snapshot", snapshot)
            for listener in self._listeners:
                _offer(listener, text)

    def snapshot(self) -> dict[str, Any]:
        """Everything there is to show, now."""
        shown = self._read()
        return {
            "router": {**self._router, "uptime_s": monotonic() - self._started_s},
            "point": point_of(shown, unix_s=time()),
            **shown,
        }

    def join(self) -> Listener:
        """A place among the listeners; `leave` is due. Raises TooManyListeners."""
        if len(self._listeners) >= MAX_LISTENERS or self._is_closed:
            raise TooManyListeners
        listener: Listener = asyncio.Queue(maxsize=1)
        self._listeners.add(listener)
        return listener

    def leave(self, listener: Listener) -> None:
        self._listeners.discard(listener)

    async def events(self, listener: Listener) -> AsyncIterator[str]:
        """The history, the snapshot of now, then one a second until the router closes."""
        yield f"retry: {RETRY_MS}\n\n"
        points = self._history.points()
        # Off the event loop: a quarter of an hour of many models is a long text.
        yield await asyncio.to_thread(to_event, "history", {"series": SERIES, "points": points})
        yield to_event("snapshot", self.snapshot())
        while (text := await listener.get()) is not None:
            yield text

    async def _run(self) -> None:
        while True:
            try:
                self.tick()
            except Exception:
                # The dashboard must not take the router down, and a page shows that it is stale.
                logger.exception("dashboard_tick_failed")
            await asyncio.sleep(PERIOD_S)


def to_event(name: str, value: object) -> str:
    """One server-sent event: its name, and JSON without line breaks."""
    return f"event: {name}\ndata: {json.dumps(value, separators=(',', ':'), allow_nan=False)}\n\n"


def _offer(listener: Listener, text: str | None) -> None:
    """The newest wins: what was not read yet is let go."""
    if listener.full():
        listener.get_nowait()
    listener.put_nowait(text)
