"""What happened to the replicas, when and why: the last events, for operators. Pure: time comes in.

A replica's standing is looked at several times a second; an event is a change of it. Whoever else moves
replicas `add`s an event, with its reason. Bounded; owned by the event loop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from time import monotonic, time

LAST_EVENTS = 50
MAX_REASON_CHARS = 200


class Stand(StrEnum):
    """How a replica stands with this router; the text is what operators read."""

    READY = "ready"
    DRAINING = "draining"
    """It takes no new work and ends what it has."""
    SILENT = "silent"
    """Nothing was heard of it lately: it gets no new work."""
    FROZEN = "frozen"
    """Nothing came while work was in flight: its streams were taken away."""
    DRAINED = "drained"
    """It left after draining."""
    LOST = "lost"
    """It left without draining."""


GONE = (Stand.DRAINED, Stand.LOST)
ATTACHED, RECOVERED = "attached", "recovered"
"""Kinds of events by which a replica comes to be ready."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """`reason`: why, in words; empty where there is nothing to explain."""

    stand: Stand
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetEvent:
    """`kind`: a stand, or how it came to be ready. `replica_id` is empty where all of a model are meant.

    `at_s` is on the router's monotonic clock, `at_unix_s` on the wall's.
    """

    model: str
    replica_id: str
    epoch: int
    kind: str
    reason: str
    at_s: float
    at_unix_s: float


class FleetRecord:
    """Mutable. Holds `LAST_EVENTS` events, and one per attached replica."""

    def __init__(
        self, *, clock_s: Callable[[], float] = monotonic, wall_s: Callable[[], float] = time
    ) -> None:
        self._clock_s = clock_s
        self._wall_s = wall_s
        self._events: deque[FleetEvent] = deque(maxlen=LAST_EVENTS)
        self._stands: dict[str, Stand] = {}
        self._silences: dict[str, int] = {}
        self._doubted: set[str] = set()
        """Replicas that were silent at one look."""
        self._last: dict[str, FleetEvent] = {}

    @property
    def events(self) -> Sequence[FleetEvent]:
        """Newest first."""
        return tuple(reversed(self._events))

    def last_of(self, replica_id: str) -> FleetEvent | None:
        """The last event of a replica that is attached."""
        return self._last.get(replica_id)

    def add(self, *, model: str, replica_id: str, epoch: int, kind: str, reason: str) -> FleetEvent:
        event = FleetEvent(
            model=model,
            replica_id=replica_id,
            epoch=epoch,
            kind=kind,
            reason=reason[:MAX_REASON_CHARS],
            at_s=self._clock_s(),
            at_unix_s=self._wall_s(),
        )
        self._events.append(event)
        return event

    def attach(self, *, model: str, replica_id: str, epoch: int, what: str) -> None:
        """A replica said Hello; `what` it is, in words."""
        before = next((event for event in self.events if event.replica_id == replica_id), None)
        if before is None:
            reason = what
        elif before.epoch == epoch:
            reason = "its link is back; the group went on"
        else:
            reason = f"a new group: {what}"
        self._silences.pop(replica_id, None)
        self._stands[replica_id] = Stand.READY
        self._last[replica_id] = self.add(
            model=model, replica_id=replica_id, epoch=epoch, kind=ATTACHED, reason=reason
        )

    def observe(self, *, model: str, replica_id: str, epoch: int, standing: Standing) -> None:
        """Note it, if the standing of an attached replica is another than when it was last looked at.

        Silence counts at the second look: after a pause of this process what they said is only not read yet.
        """
        stand = standing.stand
        before = self._stands.get(replica_id)
        is_first_look = stand is Stand.SILENT and replica_id not in self._doubted
        self._doubted.discard(replica_id)
        if before is None or stand is before:
            return
        if is_first_look:
            self._doubted.add(replica_id)
            return
        kind, reason = stand.value, standing.reason
        if stand is Stand.READY:
            kind, reason = RECOVERED, _after(before)
        if stand is Stand.SILENT:
            reason += self._forget_silence(replica_id)
        event = self.add(model=model, replica_id=replica_id, epoch=epoch, kind=kind, reason=reason)
        if stand in GONE:
            del self._stands[replica_id], self._last[replica_id]
            self._silences.pop(replica_id, None)
        else:
            self._stands[replica_id], self._last[replica_id] = stand, event

    def _forget_silence(self, replica_id: str) -> str:
        """On a busy machine a replica is silent again and again: the last time stands for all, counted."""
        count = self._silences[replica_id] = self._silences.get(replica_id, 0) + 1
        if count == 1:
            return ""
        kept = [event for event in self._events if event.replica_id != replica_id or not _is_silence(event)]
        self._events = deque(kept, maxlen=LAST_EVENTS)
        return f" ({count} times since it attached)"


def _is_silence(event: FleetEvent) -> bool:
    return event.kind == Stand.SILENT or (event.kind == RECOVERED and event.reason == _after(Stand.SILENT))


def _after(stand: Stand) -> str:
    return f"it was {stand.value} and speaks again"
