"""How often a reader of an answer gets a message, where tokens come faster than that.

A message costs a router tens of microseconds whatever is in it, so their number is shared among the streams:
what comes in between goes along with the next. The first tokens and the last never wait. An engine at work
for many streams takes longer for a step than this gap, and then each token is a message of its own.

Nor do all streams write in one turn of the loop when a large step comes: grpc.aio asks for the next call when
it has the last, so callers come in one a turn or two, and 512 of them waited behind hundreds of writes each.
"""

from __future__ import annotations

import asyncio
from collections import deque

MAX_MESSAGES_PER_S = 5000
"""Of all streams together: some half a core of a small machine."""
MAX_GAP_S = 0.05
"""Text that comes twenty times a second still flows."""


MAX_MESSAGES_A_TURN = 16
"""Some milliseconds of the event loop. A turn of its own costs a hundredth of that."""


class ReaderPace:
    """Mutable: counts the open streams of a router and what they write in a turn. Owned by the event loop."""

    __slots__ = ("_num_written", "_waiting", "num_streams")

    def __init__(self) -> None:
        self.num_streams = 0
        self._num_written = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def gap_s(self) -> float:
        """Between two messages of one stream. Example: 1.6 ms with 8 streams, 25.6 ms with 128."""
        return min(MAX_GAP_S, self.num_streams / MAX_MESSAGES_PER_S)

    async def turn(self) -> None:
        """Return in a turn of the loop that has room for one more message; in the order of asking."""
        loop = asyncio.get_running_loop()
        if not self._num_written:
            loop.call_soon(self._next_turn)
        if self._num_written < MAX_MESSAGES_A_TURN:
            self._num_written += 1
            return
        let_in = loop.create_future()
        self._waiting.append(let_in)
        await let_in

    def _next_turn(self) -> None:
        self._num_written = 0
        while self._waiting and self._num_written < MAX_MESSAGES_A_TURN:
            let_in = self._waiting.popleft()
            if not let_in.done():  # A reader that was cancelled is.
                let_in.set_result(None)
                self._num_written += 1
        if self._num_written:
            asyncio.get_running_loop().call_soon(self._next_turn)
