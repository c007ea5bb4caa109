"""Edges through a named pipe: whole, in order, and never in the way of the agent."""

from __future__ import annotations

import asyncio
import os
from contextlib import aclosing
from pathlib import Path

import pytest

from replicas.energy.edge_pipe import EdgePipe, pack_edge, read_edges, unpack_edges
from replicas.energy.meter import Reading, Source
from replicas.energy.polling import Subscriber
from replicas.errors import MeterUnavailable

EDGES = [
    Reading(t_ns=1, energy_mj=0, source=Source.COUNTER, static_mj=None),
    Reading(t_ns=2**62, energy_mj=2**62, source=Source.TDP, static_mj=0, gap=True, host_mj=0),
]


def test_edges_come_out_as_they_went_in() -> None:
    assert unpack_edges(b"".join(pack_edge(edge, has_gap=edge.gap) for edge in EDGES)) == EDGES


def test_bytes_of_another_agent_are_refused() -> None:
    for content in (b"\x00" * 33, pack_edge(EDGES[0], has_gap=False)[:-2] + b"\xff\x00"):
        with pytest.raises(MeterUnavailable, match="another version; restart it"):
            unpack_edges(content)


async def test_a_watcher_reads_what_was_written_until_the_watch_ends(tmp_path: Path) -> None:
    pipe = EdgePipe(tmp_path / "edges")
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    read: list[Reading] = []
    async with asyncio.timeout(60), aclosing(read_edges(str(pipe.path), until=ended)) as batches:
        pipe.write(EDGES[0])
        read += await anext(batches)
        pipe.write(EDGES[1])
        ended.set_result(None)
        read += [edge async for batch in batches for edge in batch]
    pipe.close()
    assert read == EDGES
    assert list(tmp_path.iterdir()) == []


async def test_a_full_pipe_stops_nobody_and_keeps_the_gap(tmp_path: Path) -> None:
    pipe = EdgePipe(tmp_path / "edges")
    watcher = Subscriber(pipe)
    num_written = 0
    with pytest.raises(BlockingIOError):
        while True:
            os.write(pipe._file, pack_edge(EDGES[0], has_gap=False))
            num_written += 1
    for number in range(3):
        watcher.put(Reading(t_ns=number, energy_mj=number, source=Source.COUNTER, gap=number == 1))
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    async with asyncio.timeout(60), aclosing(read_edges(str(pipe.path), until=ended)) as batches:
        num_read = 0
        while num_read < num_written:
            num_read += len(await anext(batches))
        watcher.put(Reading(t_ns=9, energy_mj=9, source=Source.COUNTER))
        assert await anext(batches) == [Reading(t_ns=9, energy_mj=9, source=Source.COUNTER, gap=True)]
    pipe.close()
