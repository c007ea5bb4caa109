"""uvicorn inside a running event loop: no signal handlers of its own, and a port that is bound first."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from cluster.addresses import PortInUse
from cluster.security.certificates import CertificateFiles, https_context
from cluster.servers.http_connection import HttpConnection

STOP_S = 2.0
BACKLOG = 2048
"""Connections that the kernel keeps until they are accepted."""


class HttpServer:
    """Owns one listening socket and the task that serves it."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        host: str,
        port: int,
        tls: CertificateFiles | None = None,
        is_shared: bool = False,
    ) -> None:
        """`is_shared`: other processes of this user may listen on the port too."""
        self._socket = _bind(host, port, is_shared=is_shared)
        self.port: int = self._socket.getsockname()[1]
        # One accept each time there are some. asyncio tries as often as its backlog says, and where
        # descriptors have run out each try fails, is logged and sets a timer: the loop does little else.
        config = uvicorn.Config(
            app,
            http=HttpConnection,
            ws="none",
            lifespan="off",
            # A warning is what anybody gets it to say with bytes that are no request.
            log_level="error",
            access_log=False,
            backlog=1,
        )
        config.timeout_graceful_shutdown = int(STOP_S)
        config.load()
        config.ssl = https_context(tls) if tls else None
        self._server = _QuietServer(config)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        await self._server.listening.wait()
        self._socket.listen(BACKLOG)

    def stop_accepting(self) -> None:
        """New connections go to whoever else listens on the port; those that are open go on."""
        for server in self._server.servers:
            server.close()

    async def stop(self) -> None:
        self._server.end()
        if self._task is not None:
            await self._task
        self._socket.close()


class _QuietServer(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

        self._ending = asyncio.Event()

    def end(self) -> None:
        self.should_exit = True
        self._ending.set()

    async def main_loop(self) -> None:
        """One tick a second for the Date header, where uvicorn wakes up ten times; ends at once when told."""
        while not await self.on_tick(0):
            try:
                async with asyncio.timeout(1.0):
                    await self._ending.wait()
            except TimeoutError:
                continue

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the process, which has more than HTTP to stop."""
        yield


def _bind(host: str, port: int, *, is_shared: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    # Only frees a port that nobody listens on any more; two listeners still cannot share it.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if is_shared:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise PortInUse(key="router.http_port", host=host, port=port) from error
    listener.setblocking(False)
    return listener
