"""What is waiting to go up one link, merged per request, so a slow router costs memory by the request only.

The step path adds and never waits; the link's writer takes all there is and sends it. While the writer keeps
up a parcel is one step; when it falls behind, the steps it missed travel as one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, replace

from replicas.link.cache_news import CacheNews
from replicas.link.messages import EnergyStatement
from replicas.request import SequenceDelta

MAX_PENDING_TOKENS = 1 << 18
MAX_PENDING_ENTRIES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcel:
    """Everything that was waiting; it goes in the order of the fields.

    `step` is that of the newest delta, `goodbye` the last word on the stream.
    """

    step: int
    deltas: tuple[SequenceDelta, ...]
    energy: tuple[EnergyStatement, ...]
    draining: str | None
    goodbye: str | None


class Outbox:
    """Deltas and energy of one link, in its numbering. Lives on one event loop, owned by one link session."""

    def __init__(
        self, *, max_pending_tokens: int = MAX_PENDING_TOKENS, max_pending_entries: int = MAX_PENDING_ENTRIES
    ) -> None:
        self._max_pending_tokens = max_pending_tokens
        self._max_pending_entries = max_pending_entries
        self.cache = CacheNews()
        """Goes along with whatever is sent next; wakes nobody."""
        self._step = 0
        self._deltas: dict[tuple[int, int], SequenceDelta] = {}
        self._pending_tokens = 0
        self._energy: dict[tuple[int, int], EnergyStatement] = {}
        self._draining: str | None = None
        self._goodbye: str | None = None
        self._wake = asyncio.Event()
        self._overflow = asyncio.Event()

    def add_deltas(self, step: int, deltas: Iterable[SequenceDelta]) -> None:
        self._step = step
        for delta in deltas:
            key = (delta.request_id, delta.attempt)
            waiting = self._deltas.get(key)
            self._deltas[key] = delta if waiting is None else _joined(waiting, delta)
            self._pending_tokens += len(delta.token_ids)
        self._note_added()

    def add_energy(self, statements: Iterable[EnergyStatement]) -> None:
        """A later statement about a request replaces the one still waiting."""
        for statement in statements:
            self._energy[statement.request_id, statement.attempt] = statement
        self._note_added()

    def add_draining(self, reason: str) -> None:
        self._draining = reason
        self._wake.set()

    def add_goodbye(self, reason: str) -> None:
        """Nothing is sent after it."""
        self._goodbye = reason
        self._wake.set()

    async def take(self, timeout_s: float) -> Parcel | None:
        """All that waits, as soon as there is something; None if nothing came in time."""
        if not self._wake.is_set():
            try:
                async with asyncio.timeout(timeout_s):
                    await self._wake.wait()
            except TimeoutError:
                return None
        parcel = Parcel(
            step=self._step,
            deltas=tuple(self._deltas.values()),
            energy=tuple(self._energy.values()),
            draining=self._draining,
            goodbye=self._goodbye,
        )
        self._deltas.clear()
        self._pending_tokens = 0
        self._energy.clear()
        self._draining = None
        self._wake.clear()
        return parcel

    async def overflow(self) -> None:
        """Return when more waits than may: the router reads too slowly to be served."""
        await self._overflow.wait()

    def _note_added(self) -> None:
        num_entries = len(self._deltas) + len(self._energy)
        if self._pending_tokens > self._max_pending_tokens or num_entries > self._max_pending_entries:
            self._overflow.set()
        self._wake.set()


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
