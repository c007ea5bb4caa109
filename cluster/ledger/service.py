"""The gRPC side of the ledger store. All SQL runs on one thread, beside the event loop."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, NoReturn, TypeVar

import grpc

from cluster.ledger.database import DAY_S, Database
from cluster.ledger.entries import RequestEntry
from cluster.ledger.wire import replica_from_wire, request_from_wire, request_to_wire, summary_to_wire
from protos import wattline_ledger_pb2 as pb
from protos import wattline_ledger_pb2_grpc as pb_grpc

SERVICE = "wattline.v1.LedgerStore"
MAX_BATCH = 4096
"""Entries of one Record."""
LIST_BATCH = 512
Result = TypeVar("Result")
MAX_MJ = 2**62
"""SQLite's integers have 63 bits."""


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
        for entry in requests:
            if problem := _problem(entry):
                await _refuse(context, problem)
        replicas = [replica_from_wire(sums) for sums in request.replicas]
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
        if not (math.isfinite(since_s) and math.isfinite(until_s) and 0.0 <= since_s <= until_s):
            await _refuse(context, f"since_s: got {since_s:g}, until_s {until_s:g}; give 0 <= since <= until")
        return since_s, until_s


def _problem(entry: RequestEntry) -> str | None:
    if not entry.request_id:
        return "requests.request_id: is empty; give each request its own"
    if not (math.isfinite(entry.ended_s) and entry.ended_s > 0.0):
        return f"requests.ended_s: got {entry.ended_s:g}; give seconds since 1970"
    counts = (entry.prompt_tokens, entry.cached_tokens, entry.output_tokens, entry.wasted_tokens)
    energy = entry.energy
    joules = (
        (energy.prefill_mj, energy.decode_mj, energy.static_mj, energy.wasted_mj, energy.host_mj or 0)
        if energy
        else ()
    )
    if max(*counts, *joules) > MAX_MJ:
        return f"requests: a count of {entry.request_id} is above {MAX_MJ}; it cannot be true"
    return None


async def _check_amount(context: Any, field: str, value: int) -> None:
    if value > MAX_MJ:
        await _refuse(context, f"{field}: got {value}; at most {MAX_MJ}; lower it")


async def _refuse(context: Any, text: str) -> NoReturn:
    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)
    raise AssertionError("abort raises")
