"""The gRPC side of the ledger store. All SQL runs on one thread, beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, NoReturn, TypeVar

import grpc

from cluster.ledger.bounds import MAX_TIME_S, problem_of
from cluster.ledger.database import DAY_S, Database
from cluster.ledger.entries import ReplicaSums, RequestEntry
from cluster.ledger.wire import replica_from_wire, request_from_wire, request_to_wire, summary_to_wire
from protos import wattline_ledger_pb2 as pb
from protos import wattline_ledger_pb2_grpc as pb_grpc

SERVICE = "wattline.v1.LedgerStore"
MAX_BATCH = 4096
"""Entries of one Record."""
LIST_BATCH = 512
Result = TypeVar("Result")
MAX_MJ = 2**62
"""Of a lease: SQLite's integers have 63 bits."""
MAX_AHEAD_S = 3600.0
"""By how much the clock of a router may be ahead."""


class LedgerServicer(pb_grpc.LedgerStoreServicer):
    """Owns the thread that owns the database. `wall_s` is the time since 1970."""

    def __init__(self, database: Database, *, wall_s: Callable[[], float]) -> None:
        self._database = database
        self._wall_s = wall_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ledger")

    async def run(self, work: Callable[[], Result]) -> Result:
        """Do something with the database, on its thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def close(self) -> None:
        """Finish what was begun. No call may follow."""
        self._thread.shutdown()
        self._database.close()

    async def Record(self, request: pb.RecordRequest, context: Any) -> pb.RecordResponse:
        num_entries = len(request.requests) + len(request.replicas)
        if num_entries > MAX_BATCH:
            await _refuse(
                context, f"requests, replicas: {num_entries} entries; at most {MAX_BATCH}; send fewer"
            )
        requests = [request_from_wire(entry) for entry in request.requests]
        replicas = [replica_from_wire(sums) for sums in request.replicas]
        latest_s = self._wall_s() + MAX_AHEAD_S
        entries: list[RequestEntry | ReplicaSums] = [*requests, *replicas]
        for entry in entries:
            if problem := problem_of(entry) or _problem_of_time(entry, latest_s=latest_s):
                await _refuse(context, problem)
        return pb.RecordResponse(num_new=await self.run(lambda: self._database.record(requests, replicas)))

    async def Summarize(self, request: pb.SummarizeRequest, context: Any) -> pb.SummarizeResponse:
        since_s, until_s = await self._span(request.since_s, request.until_s, context)
        return summary_to_wire(
            await self.run(lambda: self._database.summarize(since_s=since_s, until_s=until_s))
        )

    async def ListRequests(
        self, request: pb.ListRequestsRequest, context: Any
    ) -> AsyncIterator[pb.ClosedRequests]:
        since_s, until_s = await self._span(request.since_s, request.until_s, context)
        entries = self._database.list_requests(since_s=since_s, until_s=until_s)

        def take() -> list[RequestEntry]:
            return list(islice(entries, LIST_BATCH))

        while batch := await self.run(take):
            yield pb.ClosedRequests(requests=[request_to_wire(entry) for entry in batch])

    async def LeaseEnergy(self, request: pb.LeaseEnergyRequest, context: Any) -> pb.LeaseEnergyResponse:
        await _check_amount(context, "want_mj", request.want_mj)
        await _check_amount(context, "budget_mj_per_day", request.budget_mj_per_day)
        now_s = self._wall_s()
        day = int(now_s) // DAY_S
        granted_mj = await self.run(
            lambda: self._database.lease(
                request.tenant, want_mj=request.want_mj, budget_mj=request.budget_mj_per_day, day=day
            )
        )
        retry_after_s = 0.0 if granted_mj else (day + 1) * DAY_S - now_s
        return pb.LeaseEnergyResponse(granted_mj=granted_mj, retry_after_s=retry_after_s, day=day)

    async def GiveBackEnergy(
        self, request: pb.GiveBackEnergyRequest, context: Any
    ) -> pb.GiveBackEnergyResponse:
        await _check_amount(context, "unspent_mj", request.unspent_mj)
        await self.run(
            lambda: self._database.give_back(request.tenant, unspent_mj=request.unspent_mj, day=request.day)
        )
        return pb.GiveBackEnergyResponse()

    async def _span(self, since_s: float, until_s: float, context: Any) -> tuple[float, float]:
        until_s = until_s or self._wall_s()
        if not 0.0 <= since_s <= until_s <= MAX_TIME_S:  # Not-a-number fails, too.
            await _refuse(
                context,
                f"since_s: got {since_s:g}, until_s {until_s:g}; "
                f"allowed: 0 <= since <= until <= {MAX_TIME_S:g}; give seconds since 1970",
            )
        return since_s, until_s


def _problem_of_time(entry: RequestEntry | ReplicaSums, *, latest_s: float) -> str | None:
    """An entry of the future would be the newest for long, and the last to be pruned."""
    at_s = entry.ended_s if isinstance(entry, RequestEntry) else entry.at_s
    if 0.0 < at_s <= latest_s:
        return None
    field = "requests.ended_s" if isinstance(entry, RequestEntry) else "replicas.at_s"
    return f"{field}: got {at_s:.0f}; above 0 and up to {latest_s:.0f} is allowed; set the router's clock"


async def _check_amount(context: Any, field: str, value: int) -> None:
    if value > MAX_MJ:
        await _refuse(context, f"{field}: got {value}; at most {MAX_MJ}; lower it")


async def _refuse(context: Any, text: str) -> NoReturn:
    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)
    raise AssertionError("abort raises")
