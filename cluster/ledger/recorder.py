"""A router's way to the ledger store: batches, sent again until they are heard, never waited for.

What the store has not confirmed is kept, up to a bound; beyond it the oldest entry is dropped and counted.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from itertools import islice

import grpc

from cluster.ledger.bounds import problem_of
from cluster.ledger.entries import ReplicaSums, RequestEntry
from cluster.ledger.wire import replica_to_wire, request_to_wire
from protos import wattline_ledger_pb2 as pb
from protos import wattline_ledger_pb2_grpc as pb_grpc

PERIOD_S = 0.5
"""So `kill -9` of a router costs at most what was settled in it, and what is settled before the commit."""
SUMS_PERIOD_S = 5.0
BATCH = 1000
MAX_PENDING = 65_536
RECORD_TIMEOUT_S = 5.0
MAX_DELAY_S = 5.0
LAST_TIMEOUT_S = 2.0

logger = logging.getLogger(__name__)


class LedgerRecorder:
    """Mutable; owned by the event loop. `read_sums` gives the running sums of all replicas' lives known here.

    Only those go to the store that have changed since it heard of them: most of these lives may be over.
    """

    def __init__(
        self, address: str, *, router_id: str, read_sums: Callable[[], Iterable[ReplicaSums]]
    ) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self._store = pb_grpc.LedgerStoreStub(self._channel)
        self._router_id = router_id
        self._read_sums = read_sums
        self._pending: deque[RequestEntry] = deque()
        self._told: dict[tuple[str, int, str], ReplicaSums] = {}
        """What the store has confirmed, by life and source."""
        self._task: asyncio.Task[None] | None = None
        self.num_dropped = 0
        self.is_reached = True

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="ledger-recorder")

    def add(self, entry: RequestEntry) -> None:
        """Take an entry; it is on its way within half a second."""
        if len(self._pending) >= MAX_PENDING:
            self._pending.popleft()
            self.num_dropped += 1
        self._pending.append(entry)

    async def close(self) -> None:
        """Send what is left, if the store answers at once."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_TIMEOUT_S):
                while await self._send(self._sums()) and self._pending:
                    continue
        await self._channel.close()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        delay_s, next_sums_s = PERIOD_S, loop.time()
        while True:
            await asyncio.sleep(delay_s)
            sums: list[ReplicaSums] = []
            if loop.time() >= next_sums_s:
                sums = self._sums()
            is_sent = await self._send(sums) if sums or self._pending else True
            if is_sent and sums:
                next_sums_s = loop.time() + SUMS_PERIOD_S
            has_backlog = len(self._pending) >= BATCH
            delay_s = (
                (0.0 if has_backlog else PERIOD_S) if is_sent else min(2 * delay_s + PERIOD_S, MAX_DELAY_S)
            )

    async def _send(self, sums: list[ReplicaSums]) -> bool:
        batch = list(islice(self._pending, BATCH))
        request = pb.RecordRequest(
            router_id=self._router_id,
            requests=[request_to_wire(entry) for entry in batch],
            replicas=[replica_to_wire(one) for one in sums],
        )
        try:
            await self._store.Record(request, timeout=RECORD_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                self._drop_refused(batch, reason=error.details() or "")
                return True
            if self.is_reached:
                logger.warning("ledger_unreached code=%s pending=%d", error.code().name, len(self._pending))
            self.is_reached = False
            return False
        if not self.is_reached:
            logger.info("ledger_reached pending=%d", len(self._pending))
        self.is_reached = True
        self._forget(batch)
        self._told.update((_series_of(one), replace(one, at_s=0.0)) for one in sums)
        return True

    def _sums(self) -> list[ReplicaSums]:
        """What is news to the store, a batch at most.

        Not those that it would refuse, and the requests beside them: replicas may say anything.
        """
        known = {_series_of(one): one for one in self._read_sums() if problem_of(one) is None}
        self._told = {series: told for series, told in self._told.items() if series in known}
        news = (one for series, one in known.items() if self._told.get(series) != replace(one, at_s=0.0))
        return list(islice(news, BATCH))

    def _drop_refused(self, batch: list[RequestEntry], *, reason: str) -> None:
        """What is wrong would be refused for ever, and the rest with it. All of it, if we cannot tell."""
        wrong = [entry for entry in batch if problem_of(entry)] or batch
        logger.error("ledger_refused entries=%d reason=%s", len(wrong), reason)
        self.num_dropped += len(wrong)
        dropped = set(map(id, wrong))
        self._pending = deque(entry for entry in self._pending if id(entry) not in dropped)

    def _forget(self, batch: list[RequestEntry]) -> None:
        """Take it off the front; what was dropped while it was under way was at the front, too."""
        sent = set(map(id, batch))
        while self._pending and id(self._pending[0]) in sent:
            self._pending.popleft()


def _series_of(sums: ReplicaSums) -> tuple[str, int, str]:
    return sums.replica_id, sums.epoch, sums.source
