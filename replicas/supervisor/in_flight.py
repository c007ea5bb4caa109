"""Which router asked for what: the map between requests on links and requests in the engine.

Routers number their requests per stream; the engine needs one numbering. Pure: no I/O, no clock. Owned by
one supervisor.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

MAX_UNBILLED = 8192
"""Finished requests whose energy is still open; beyond it the oldest is forgotten, and stays unknown."""

PROOF_TOKENS = 4
"""Given by one replica they prove a request harmless that another one died under: more than a step or two
that is still under way when an engine fails."""

LinkT = TypeVar("LinkT", bound=Hashable)


@dataclass(frozen=True, slots=True, kw_only=True)
class Flight(Generic[LinkT]):
    """One request in the engine, and where it came from."""

    engine_id: int
    link: LinkT
    request_id: int
    attempt: int
    trace_id: str = ""


class InFlight(Generic[LinkT]):
    """All requests between their submission and their last joule.

    A flight is *live* until its router cancels it or is lost, *in the engine* until the engine ends it,
    and *unbilled* from then until its energy is closed.
    """

    def __init__(self) -> None:
        self._last_engine_id = 0
        self._in_engine: dict[int, Flight[LinkT]] = {}
        self._heard: dict[int, Flight[LinkT]] = {}
        self._live: dict[tuple[LinkT, int], Flight[LinkT]] = {}
        self._stopped: set[int] = set()
        self._unproven: dict[int, int] = {}
        """How many tokens those gave that came from another replica, up to the proof."""
        self._unbilled: OrderedDict[int, Flight[LinkT]] = OrderedDict()

    def __len__(self) -> int:
        """How many requests the engine holds."""
        return len(self._in_engine)

    @property
    def num_unbilled(self) -> int:
        """Landed requests whose energy is still open."""
        return len(self._unbilled)

    @property
    def num_unproven(self) -> int:
        """Live requests that came from another replica and have yet to prove themselves."""
        return len(self._unproven)

    def open(
        self, link: LinkT, *, request_id: int, attempt: int, is_moved: bool = False, trace_id: str = ""
    ) -> Flight[LinkT]:
        """Number a new request. The caller has made sure that no live one has its id.

        `is_moved`: another replica had it before.
        """
        assert (link, request_id) not in self._live
        self._last_engine_id += 1
        flight = Flight(
            engine_id=self._last_engine_id,
            link=link,
            request_id=request_id,
            attempt=attempt,
            trace_id=trace_id,
        )
        self._in_engine[flight.engine_id] = self._heard[flight.engine_id] = flight
        self._live[link, request_id] = flight
        if is_moved:
            self._unproven[flight.engine_id] = 0
        return flight

    def note_tokens(self, engine_id: int, count: int) -> None:
        """They came of it; of interest while it has yet to prove itself."""
        if engine_id not in self._unproven:
            return
        self._unproven[engine_id] += count
        if self._unproven[engine_id] >= PROOF_TOKENS:
            del self._unproven[engine_id]

    def live(self) -> tuple[Flight[LinkT], ...]:
        """Those that somebody waits for."""
        return tuple(self._live.values())

    def find(self, link: LinkT, request_id: int) -> Flight[LinkT] | None:
        """The live flight of a router's request."""
        return self._live.get((link, request_id))

    def stop(self, link: LinkT, request_id: int) -> Flight[LinkT] | None:
        """The live flight of a request whose answer is complete; None if unknown or stopped before."""
        flight = self.find(link, request_id)
        if flight is None or flight.engine_id in self._stopped:
            return None
        self._stopped.add(flight.engine_id)
        return flight

    def mute(self, flight: Flight[LinkT]) -> None:
        """Nobody waits for its tokens any more. It stays in the engine until the engine ends it."""
        if self._heard.pop(flight.engine_id, None) is not None:
            del self._live[flight.link, flight.request_id]
            self._unproven.pop(flight.engine_id, None)

    def listener(self, engine_id: int) -> Flight[LinkT] | None:
        """The live flight with this number; None if muted or unknown. Asked for every token."""
        return self._heard.get(engine_id)

    def trace_of(self, engine_id: int) -> str:
        """Of a request that the engine holds, muted or not; empty: it has none, or the engine ended it."""
        flight = self._in_engine.get(engine_id)
        return "" if flight is None else flight.trace_id

    def land(self, engine_id: int) -> None:
        """The engine ended it: from now on it only waits for its energy."""
        flight = self._in_engine.pop(engine_id, None)
        if flight is None:
            return
        self.mute(flight)
        self._stopped.discard(engine_id)
        self._unbilled[engine_id] = flight
        if len(self._unbilled) > MAX_UNBILLED:
            self._unbilled.popitem(last=False)

    def settle(self, engine_id: int) -> Flight[LinkT] | None:
        """Its energy is closed (or will never be known): forget it."""
        return self._unbilled.pop(engine_id, None)

    @property
    def unbilled(self) -> tuple[int, ...]:
        """Landed requests whose energy is still open, oldest first."""
        return tuple(self._unbilled)

    def drop_link(self, link: LinkT) -> tuple[int, ...]:
        """A router is gone: forget its unbilled requests and return those to cancel in the engine."""
        for engine_id in [number for number, flight in self._unbilled.items() if flight.link == link]:
            del self._unbilled[engine_id]
        orphans = [flight for flight in self._live.values() if flight.link == link]
        for flight in orphans:
            self.mute(flight)
        return tuple(flight.engine_id for flight in orphans)
