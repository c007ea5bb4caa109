"""The thread that turns tokens into text, so that the event loop does it only where that is quicker.

One job is one step of one replica. A hand-over takes a tenth of a millisecond and wakes two threads, a token
takes a few microseconds: a small step is done on the spot, unless jobs wait. Jobs are done in order, which
keeps the tokens of a stream and its end in order too. The queue holds at most what the engines have produced
for live streams, and those are bounded.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from queue import SimpleQueue
from threading import Thread

from cluster.link.token_stream import End, TokenStream
from cluster.request.errors import EngineFault, RouterError
from cluster.text.answer_text import Piece
from replicas.request import TokenLogprobs

logger = logging.getLogger(__name__)

Logprobs = tuple[TokenLogprobs, ...]
StreamNews = tuple[tuple[int, ...], Logprobs, End | None]
StreamTokens = tuple[TokenStream, tuple[int, ...], Logprobs, End | None]
StreamPiece = tuple[TokenStream, Piece, Logprobs, End | None]
NOTHING = Piece("", (), False, 0)
MAX_TOKENS_ON_THE_SPOT = 32
"""Some 0.2 ms of the event loop."""


class DetokenizeWorker:
    """Owns one thread. Call it from the event loop that it was made for."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._jobs: SimpleQueue[Sequence[StreamTokens] | None] = SimpleQueue()
        self._num_open = 0
        self._thread = Thread(target=self._run, name="detokenize", daemon=True)
        self._thread.start()

    def submit(self, step: Sequence[StreamTokens]) -> None:
        """The new tokens of one step; the streams get their text now or soon."""
        if not self._num_open and sum([len(entry[1]) for entry in step]) <= MAX_TOKENS_ON_THE_SPOT:
            deliver([detokenize(*entry) for entry in step])
            return
        self._num_open += 1
        self._jobs.put(step)

    def close(self) -> None:
        """Finish what is queued, then end the thread."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (step := self._jobs.get()) is not None:
            pieces = [detokenize(*entry) for entry in step]
            try:
                self._loop.call_soon_threadsafe(self._deliver, pieces)
            except RuntimeError:
                return  # The loop is closed: nobody is left to read.

    def _deliver(self, pieces: Sequence[StreamPiece]) -> None:
        self._num_open -= 1
        deliver(pieces)


def detokenize(
    stream: TokenStream, token_ids: tuple[int, ...], logprobs: Logprobs, end: End | None
) -> StreamPiece:
    """Logprobs go with the tokens that are sent: those behind a stop are dropped as they are."""
    if isinstance(end, RouterError):
        return stream, NOTHING, (), end
    try:
        piece = stream.text.feed(token_ids, is_last=end is not None)
        return stream, piece, logprobs[: len(piece.token_ids)], end
    except Exception:
        # One tokenizer's fault must not stop the text of all streams.
        logger.exception("detokenize_failed tokens=%d", len(token_ids))
        return stream, NOTHING, (), EngineFault("the answer could not be turned into text")


def deliver(pieces: Sequence[StreamPiece]) -> None:
    for stream, piece, logprobs, end in pieces:
        stream.deliver(piece, end, logprobs)
