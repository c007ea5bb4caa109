"""Meter edges through a named pipe between processes of one host: a write of 34 bytes, and no more.

A message of gRPC costs either side half a millisecond, which ten times a second is half a percent of a core.
The agent owns the pipe and its file (`EdgePipe`); the watcher reads it (`read_edges`). Edges are whole in a
pipe: writes of this size are atomic.
"""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import AsyncGenerator, Awaitable
from pathlib import Path

from replicas.energy.meter import Reading, Source
from replicas.errors import MeterUnavailable

_EDGE = struct.Struct("<qqqqB?")
_UNKNOWN = -1
_SOURCES = tuple(Source)
_READ_BYTES = 1024 * _EDGE.size


class EdgePipe:
    """The writing end. Holds some thousand edges for a watcher that does not read; then it takes no more."""

    def __init__(self, path: Path) -> None:
        """Raises OSError where no pipe can be made."""
        os.mkfifo(path, mode=0o600)
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        self._owes_gap = False

    def write(self, edge: Reading) -> None:
        """One that finds the pipe full is not in it: the next that fits spans its time, and says its gap."""
        has_gap = edge.gap or self._owes_gap
        try:
            os.write(self._file, pack_edge(edge, has_gap=has_gap))
        except BlockingIOError:
            self._owes_gap = has_gap
        else:
            self._owes_gap = False

    def close(self) -> None:
        os.close(self._file)
        self.path.unlink(missing_ok=True)


def pack_edge(edge: Reading, *, has_gap: bool) -> bytes:
    static_mj = _UNKNOWN if edge.static_mj is None else edge.static_mj
    host_mj = _UNKNOWN if edge.host_mj is None else edge.host_mj
    return _EDGE.pack(edge.t_ns, edge.energy_mj, static_mj, host_mj, _SOURCES.index(edge.source), has_gap)


def unpack_edges(content: bytes) -> list[Reading]:
    """Raises MeterUnavailable when the agent writes other edges than we read."""
    try:
        return [
            Reading(
                t_ns=t_ns,
                energy_mj=energy_mj,
                static_mj=None if static_mj == _UNKNOWN else static_mj,
                host_mj=None if host_mj == _UNKNOWN else host_mj,
                source=_SOURCES[source],
                gap=gap,
            )
            for t_ns, energy_mj, static_mj, host_mj, source, gap in _EDGE.iter_unpack(content)
        ]
    except (struct.error, IndexError) as error:
        raise MeterUnavailable("the energy agent is of another version; restart it") from error


async def read_edges(path: str, *, until: Awaitable[object]) -> AsyncGenerator[list[Reading], None]:
    """What the agent writes, as it comes, until `until` is done. OSError if the pipe cannot be opened."""
    loop = asyncio.get_running_loop()
    has_more = asyncio.Event()
    end = asyncio.ensure_future(until)
    end.add_done_callback(lambda _: has_more.set())
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    loop.add_reader(file, has_more.set)
    try:
        while True:
            await has_more.wait()
            has_more.clear()
            try:
                content = os.read(file, _READ_BYTES)
            except BlockingIOError:
                content = b""
            if content:
                yield unpack_edges(content)
            elif end.done():
                return
    finally:
        loop.remove_reader(file)
        os.close(file)
        end.cancel()
