"""Readers that stop reading: what the router holds for them, and what the others lose.

Each asks for a long answer, reads one message, and then nothing. gRPC's own windows fill first; then the
router coalesces, up to its `stall_buffer_bytes`.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc
import psutil

from bench.edge.flood import OWN_CONNECTION, Flood, make_request
from protos import wattline_inference_pb2_grpc as pb_grpc


@asynccontextmanager
async def stalled_readers(flood: Flood) -> AsyncIterator[None]:
    """`flood.streams` answers under way that nobody reads, each on a connection of its own."""
    async with asyncio.TaskGroup() as group:
        started = [asyncio.Event() for _ in range(flood.streams)]
        tasks = [
            group.create_task(_read_one_message(flood, index, event)) for index, event in enumerate(started)
        ]
        for event in started:
            await event.wait()
        yield
        for task in tasks:
            task.cancel()


async def _read_one_message(flood: Flood, index: int, started: asyncio.Event) -> None:
    address = flood.addresses[index % len(flood.addresses)]
    async with grpc.aio.insecure_channel(address, options=OWN_CONNECTION) as channel:
        call = pb_grpc.InferenceStub(channel).Generate(make_request(flood, index))
        await call.read()
        started.set()
        await asyncio.Event().wait()


def resident_bytes(pid: int) -> int:
    return int(psutil.Process(pid).memory_info().rss)


@dataclass(frozen=True, slots=True, kw_only=True)
class StalledRound:
    """Tokens/s of the live streams beside others that read and that do not; what the latter made us hold."""

    reading_tok_s: float
    stalled_tok_s: float
    held_bytes: int


def stalled_row(rounds: Sequence[StalledRound], *, readers: int) -> dict[str, object]:
    """The share kept is the median of the rounds' own: what slows the machine for a while slows both halves.

    The memory is the first round's: what it took, the router keeps for the next.
    """
    reading_tok_s = statistics.median(one.reading_tok_s for one in rounds)
    stalled_tok_s = statistics.median(one.stalled_tok_s for one in rounds)
    share_kept = statistics.median(one.stalled_tok_s / one.reading_tok_s for one in rounds)
    return {
        "readers": readers,
        "rounds": len(rounds),
        "mib_per_reader": round(rounds[0].held_bytes / readers / 2**20, 3),
        "live_tok_s_beside_reading": round(reading_tok_s, 1),
        "live_tok_s_beside_stalled": round(stalled_tok_s, 1),
        "share_kept": round(share_kept, 3),
    }
