"""The supervisor's end of the socket to rank 0: events in, commands out, neither ever waiting for the other.

Listens before the ranks start, accepts one peer and no second. Called by `supervisor.py`.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

from replicas.errors import RankLost
from replicas.frames import Command, Event, Shutdown, read_event, send_command, write_command

READ_BUFFER_BYTES = 2**20
MAX_PATH_BYTES = 107
"""Of a Unix socket; the kernel's limit."""
SHUTDOWN_TIMEOUT_S = 1.0


class EngineSocket:
    """One listening socket, then one connection.

    Commands that rank 0 does not read yet are bounded by the callers: a request sends at most Submit, Stop
    and Cancel, and the dispatcher bounds the requests.
    """

    def __init__(self, path: Path) -> None:
        if len(str(path).encode()) > MAX_PATH_BYTES:
            raise ValueError(
                f"socket path {path} has {len(str(path).encode())} bytes, the limit is {MAX_PATH_BYTES}; "
                "choose a shorter runtime_dir"
            )
        self._path = path
        self._server: asyncio.Server | None = None
        self._connected = asyncio.Event()
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def listen(self) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(
            self._accept, path=self._path, limit=READ_BUFFER_BYTES, backlog=1
        )
        self._path.chmod(0o600)

    async def read(self) -> Event:
        """The next event. Raises RankLost when rank 0 closed its end."""
        await self._connected.wait()
        assert self._reader is not None
        return await read_event(self._reader)

    def send(self, command: Command) -> None:
        """To an engine that is ready. Does nothing once rank 0 is gone, which `read` says."""
        assert self._writer is not None, "an engine that is ready has connected"
        if not self._writer.is_closing():
            send_command(self._writer, command)

    async def shut_down(self) -> None:
        """Ask the ranks to end. A peer that is gone or does not read is no error."""
        if self._writer is None:
            return
        with suppress(RankLost, TimeoutError):
            async with asyncio.timeout(SHUTDOWN_TIMEOUT_S):
                await write_command(self._writer, Shutdown())

    def close(self) -> None:
        """Close both sockets and remove the file. Idempotent."""
        if self._writer is not None:
            self._writer.close()
        if self._server is not None:
            self._server.close()
        self._path.unlink(missing_ok=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._connected.is_set():
            writer.close()
            return
        self._reader, self._writer = reader, writer
        self._connected.set()
