"""One answer on its way through the router: filled by the link, drained by the caller's handler.

Lives on the event loop, but for `text`, which belongs to the detokenising thread while that has jobs. What a
slow reader leaves unread is coalesced here into four bytes a token and its text in UTF-8, and it is bounded:
as lists of numbers and strings the same would take some twenty times as much.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable
from dataclasses import dataclass

from cluster.link.batch_sizes import BatchSizes
from cluster.link.reader_pace import ReaderPace
from cluster.request.errors import RouterError
from cluster.text.answer_text import AnswerText, Piece
from replicas.request import FinishReason, SequenceTiming, TokenLogprobs

LOGPROBS_BYTES = 128
ALTERNATIVE_BYTES = 128
"""Python's objects for what is said of a token, and for each likely token beside it, rounded up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The engine ended the sequence in good order."""

    reason: FinishReason


End = Finished | RouterError
"""How an answer ends; each has exactly one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """All that came since the last batch. `is_stopped`: a stop text or token came. `end`: nothing follows.

    `prompt_logprobs` come with the first tokens, where asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    is_stopped: bool
    end: End | None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


class TokenStream:
    """The pending tokens of one request at one replica."""

    def __init__(
        self,
        *,
        link_id: int,
        attempt: int,
        first_offset: int,
        text: AnswerText,
        buffer_bytes: int,
        on_overflow: Callable[[], None],
        pace: ReaderPace,
        clock_s: Callable[[], float],
    ) -> None:
        self.link_id = link_id
        self.attempt = attempt
        self.text = text
        self.next_offset = first_offset
        """Offset of the next token from the link; everything else is a duplicate or a gap."""
        self.prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        """Set by the link before the first tokens are."""
        self.batches = BatchSizes()
        """Filled by the link."""
        self.timing: SequenceTiming | None = None
        """Set by the link with the end, good or bad, of an engine that gives one."""
        self.submitted_s = clock_s()
        self.wasted_tokens = 0
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        self._buffer_bytes = buffer_bytes
        self._on_overflow = on_overflow
        self._pace = pace
        self._clock_s = clock_s
        self._taken_s = float("-inf")
        self._text = bytearray()
        self._token_ids = array("I")
        self._logprobs: list[TokenLogprobs] = []
        self._is_stopped = False
        self._is_abandoned = False
        self._end: End | None = None
        self._wakeup: asyncio.Future[None] | None = None
        pace.num_streams += 1

    def deliver(self, piece: Piece, end: End | None, logprobs: tuple[TokenLogprobs, ...] = ()) -> None:
        """Add what a step gave. After the end, nothing is added any more."""
        if self._end is not None or self._is_abandoned:
            return
        self._end = end
        self.wasted_tokens += piece.wasted_tokens
        self._is_stopped = self._is_stopped or piece.is_stopped
        if piece.text:
            self._text += piece.text.encode()
        if piece.token_ids:
            self._token_ids.extend(piece.token_ids)
            self._logprobs.extend(logprobs)
            self.last_token_s = self._clock_s()
            self.first_token_s = self.first_token_s or self.last_token_s
        if self._wakeup is not None and not self._wakeup.done():
            self._wakeup.set_result(None)
        elif self._size_bytes() > self._buffer_bytes:
            self._on_overflow()

    def abandon(self) -> None:
        """Nobody reads it any more. Safe to call twice."""
        self._pace.num_streams -= not self._is_abandoned
        self._is_abandoned = True

    async def next(self) -> Batch:
        """Wait for something new, and take all of it, at the router's pace. One reader."""
        if not (self._text or self._token_ids or self._end):
            self._wakeup = asyncio.get_running_loop().create_future()
            await self._wakeup
            self._wakeup = None
        early_s = self._taken_s + self._pace.gap_s - self._clock_s()
        if early_s > 0.0 and not self._is_over:
            await asyncio.sleep(early_s)
        if self._taken_s > 0.0 and not self._is_over:
            await self._pace.turn()
        self._taken_s = self._clock_s()
        text, self._text = self._text, bytearray()
        token_ids, self._token_ids = self._token_ids, array("I")
        logprobs, self._logprobs = self._logprobs, []
        prompt_logprobs, self.prompt_logprobs = self.prompt_logprobs, ()
        return Batch(
            text=text.decode(),
            token_ids=tuple(token_ids),
            logprobs=tuple(logprobs),
            is_stopped=self._is_stopped,
            end=self._end,
            prompt_logprobs=prompt_logprobs,
        )

    @property
    def _is_over(self) -> bool:
        return self._end is not None or self._is_stopped

    async def wait_end(self) -> End:
        """Throw away what still comes, and return how it ended."""
        while self._end is None:
            await self.next()
        return self._end

    def _size_bytes(self) -> int:
        """What is unread; every token of a stream says as many logprobs."""
        said_bytes = LOGPROBS_BYTES + ALTERNATIVE_BYTES * len(self._logprobs[0].top) if self._logprobs else 0
        return (
            len(self._text)
            + len(self._token_ids) * self._token_ids.itemsize
            + len(self._logprobs) * said_bytes
        )
