"""What is waiting to go up one link, merged per request: a slow router costs memory, within a bound.

The step path adds and never waits; the link's writer takes all there is and sends it. While the writer keeps
up a parcel is one step; when it falls behind, the steps it missed travel as one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain

from replicas.link.cache_news import CacheNews
from replicas.link.messages import EnergyStatement, Goodbye
from replicas.request import SequenceDelta
from replicas.step_report import TokenColumns, TokenRun

MAX_PENDING_BYTES = 7 * 2**20
"""As sent, where a message has 8 MiB at most; in memory likely tokens take fifteen times as much.
A prompt of 131,072 tokens may come with the five likeliest of each."""
MAX_PENDING_ENTRIES = 1 << 16
TOKEN_BYTES = 4
DELTA_BYTES = 64
LOGPROBS_BYTES = 12
LIKELY_TOKEN_BYTES = 8
MIN_GAP_S = 0.001
"""Between two parcels: a message has its price, and only a toy engine steps faster than this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcel:
    """Everything that was waiting; it goes in the order of the fields. `step` is that of the newest token or
    delta, `goodbye` the last word on the stream."""

    step: int
    tokens: TokenColumns
    deltas: tuple[SequenceDelta, ...]
    energy: tuple[EnergyStatement, ...]
    draining: str | None
    goodbye: Goodbye | None


class Outbox:
    """Deltas and energy of one link, in its numbering. Lives on one event loop, owned by one link session."""

    def __init__(
        self, *, max_pending_bytes: int = MAX_PENDING_BYTES, max_pending_entries: int = MAX_PENDING_ENTRIES
    ) -> None:
        self._max_pending_bytes = max_pending_bytes
        self._max_pending_entries = max_pending_entries
        self.cache = CacheNews()
        """Goes along with whatever is sent next; wakes nobody."""
        self._step = 0
        self._first_offsets: dict[tuple[int, int], int] = {}
        self._token_ids: dict[tuple[int, int], list[int]] = {}
        """Of the same requests, in the same order."""
        self._deltas: dict[tuple[int, int], SequenceDelta] = {}
        self._pending_bytes = 0
        self._energy: dict[tuple[int, int], EnergyStatement] = {}
        self._draining: str | None = None
        self._goodbye: Goodbye | None = None
        self.taken_s = float("-inf")
        """When the last parcel was taken, on the clock of the event loop."""
        self._wake = asyncio.Event()
        self._overflow = asyncio.Event()

    def add_tokens(self, step: int, runs: Iterable[TokenRun]) -> None:
        """Of requests that go on. Runs once per token of a step: it makes one list of each request."""
        self._step = step
        waiting = self._token_ids
        for request_id, attempt, first_offset, token_ids in runs:
            key = (request_id, attempt)
            self._pending_bytes += TOKEN_BYTES * len(token_ids)
            if key in waiting:
                waiting[key].extend(token_ids)
            elif key in self._deltas:
                self._join(key, first_offset, token_ids)
            else:
                self._first_offsets[key] = first_offset
                waiting[key] = list(token_ids)
        self._note_added()

    def add_deltas(self, step: int, deltas: Iterable[SequenceDelta]) -> None:
        self._step = step
        for delta in deltas:
            key = (delta.request_id, delta.attempt)
            waiting = self._deltas.get(key)
            self._deltas[key] = delta if waiting is None else _joined(waiting, delta)
            self._pending_bytes += _wire_bytes(delta)
        self._note_added()

    def add_energy(self, statements: Iterable[EnergyStatement]) -> None:
        """A later statement about a request replaces the one still waiting."""
        for statement in statements:
            self._energy[statement.request_id, statement.attempt] = statement
        self._note_added()

    def add_draining(self, reason: str) -> None:
        self._draining = reason
        self._wake.set()

    def add_goodbye(self, goodbye: Goodbye) -> None:
        """Nothing is sent after it."""
        self._goodbye = goodbye
        self._wake.set()

    def nudge(self) -> None:
        """Have the next parcel taken though nothing may be in it."""
        self._wake.set()

    async def take(self) -> Parcel:
        """All that waits, as soon as there is something."""
        await self._wake.wait()
        now_s = asyncio.get_running_loop().time
        if (early_s := self.taken_s + MIN_GAP_S - now_s()) > 0.0:
            await asyncio.sleep(early_s)
        self.taken_s = now_s()
        parcel = Parcel(
            step=self._step,
            tokens=self._take_tokens(),
            deltas=tuple(self._deltas.values()),
            energy=tuple(self._energy.values()),
            draining=self._draining,
            goodbye=self._goodbye,
        )
        self._deltas.clear()
        self._pending_bytes = 0
        self._energy.clear()
        self._draining = None
        self._wake.clear()
        return parcel

    async def overflow(self) -> None:
        """Return when more waits than may: the router reads too slowly to be served."""
        await self._overflow.wait()

    def _join(self, key: tuple[int, int], first_offset: int, token_ids: tuple[int, ...]) -> None:
        """Behind a delta that waits, so that the tokens of a request stay in their order."""
        request_id, attempt = key
        later = SequenceDelta(
            request_id=request_id, attempt=attempt, first_offset=first_offset, token_ids=token_ids
        )
        self._deltas[key] = _joined(self._deltas[key], later)

    def _take_tokens(self) -> TokenColumns:
        counts = [len(token_ids) for token_ids in self._token_ids.values()]
        tokens = TokenColumns(
            request_ids=[request_id for request_id, _ in self._token_ids],
            attempts=[attempt for _, attempt in self._token_ids],
            first_offsets=list(self._first_offsets.values()),
            counts=[] if all(count == 1 for count in counts) else counts,
            token_ids=list(chain.from_iterable(self._token_ids.values())),
        )
        self._first_offsets.clear()
        self._token_ids.clear()
        return tokens

    def _note_added(self) -> None:
        num_entries = len(self._token_ids) + len(self._deltas) + len(self._energy)
        if self._pending_bytes > self._max_pending_bytes or num_entries > self._max_pending_entries:
            self._overflow.set()
        self._wake.set()


def _wire_bytes(delta: SequenceDelta) -> int:
    """About what it takes in a message."""
    size_bytes = DELTA_BYTES + TOKEN_BYTES * len(delta.token_ids)
    for said in (*delta.logprobs, *delta.prompt_logprobs):
        size_bytes += LOGPROBS_BYTES + LIKELY_TOKEN_BYTES * len(said.top)
    return size_bytes


def _joined(earlier: SequenceDelta, later: SequenceDelta) -> SequenceDelta:
    """Two neighbouring deltas of one request as one."""
    assert earlier.finish is None, "a delta followed the last one of its request"
    assert not later.token_ids or later.first_offset == earlier.first_offset + len(earlier.token_ids)
    first_offset = earlier.first_offset if earlier.token_ids else later.first_offset
    return replace(
        later,
        first_offset=first_offset,
        token_ids=earlier.token_ids + later.token_ids,
        logprobs=earlier.logprobs + later.logprobs,
        prompt_logprobs=earlier.prompt_logprobs + later.prompt_logprobs,
    )
