"""Readers that stop reading: what the router holds for them, and what the others lose.

Each asks for a long answer, reads one message, and then nothing. gRPC's own windows fill first; then the
router coalesces, up to its `stall_buffer_bytes`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

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
