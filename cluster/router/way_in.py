"""A request on its way to a replica: who asks for what, and what it met there, whether it arrives or not."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.admission.decision import Arrival, Wait
from cluster.router.caller import Caller
from cluster.served_model import ServedModel


@dataclass(slots=True, kw_only=True)
class WayIn:
    """Mutable; owned by its stream. `arrival` None: not asked yet. `wait` None: it did not have to.

    `since_s`: when it began to look for a place; `queued_s`: how long that took, once it has one.
    """

    model: ServedModel
    caller: Caller
    arrival: Arrival | None = None
    wait: Wait | None = None
    since_s: float | None = None
    queued_s: float = 0.0

    def note_wait(self, wait: Wait) -> None:
        """What the queue knew when the request came to it."""
        self.wait = wait

    def waited_s(self, *, now_s: float) -> float:
        """Of one that has no place yet."""
        return 0.0 if self.since_s is None else now_s - self.since_s
