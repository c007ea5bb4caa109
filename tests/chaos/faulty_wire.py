"""A TCP wire between a replica and its router that can be slow, silent or cut: no privileges needed."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from random import Random
from types import TracebackType
from typing import Self

CHUNK_BYTES = 16_384


class FaultyWire:
    """`async with FaultyWire(to) as wire`: dial `wire.address`. Mutable; owned by the test's event loop.

    `delays_s`: each chunk waits for one of these, drawn by lot; what TCP makes of loss is such a delay.
    """

    def __init__(self, to: str, *, delays_s: tuple[float, ...] = (), seed: int = 0) -> None:
        host, _, port = to.rpartition(":")
        self._to = host, int(port)
        self._delays_s = delays_s
        self._random = Random(seed)
        self._flows = asyncio.Event()
        self._flows.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self.address = ""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def blackhole(self) -> None:
        """Nothing comes through, nothing is closed: what is sent is kept until `heal`."""
        self._flows.clear()

    def heal(self) -> None:
        self._flows.set()

    def cut(self) -> None:
        """Reset every connection; the next one is welcome."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._to)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, far_writer}
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.create_task(self._pump(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while chunk := await source.read(CHUNK_BYTES):
                if self._delays_s:
                    await asyncio.sleep(self._random.choice(self._delays_s))
                await self._flows.wait()
                sink.write(chunk)
                await sink.drain()
        sink.transport.abort()
