"""How often a reader of an answer gets a message, where tokens come faster than that.

A message costs a router tens of microseconds whatever is in it, so their number is shared among the streams:
what comes in between goes along with the next. The first tokens and the last never wait. An engine at work
for many streams takes longer for a step than this gap, and then each token is a message of its own.
"""

from __future__ import annotations

MAX_MESSAGES_PER_S = 5000
"""Of all streams together: some half a core of a small machine."""
MAX_GAP_S = 0.05
"""Text that comes twenty times a second still flows."""


class ReaderPace:
    """Mutable: counts the open streams of a router. Owned by the event loop."""

    __slots__ = ("num_streams",)

    def __init__(self) -> None:
        self.num_streams = 0

    @property
    def gap_s(self) -> float:
        """Between two messages of one stream. Example: 1.6 ms with 8 streams, 25.6 ms with 128."""
        return min(MAX_GAP_S, self.num_streams / MAX_MESSAGES_PER_S)
