"""One HTTP connection: uvicorn's, with a bounded head and the names in the caller's certificate.

httptools reads heads of any length for any time, and nobody has been asked who he is by then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cluster.servers.http_guard import PEER_NAMES

MAX_HEAD_BYTES = 64 * 2**10
"""Of a request line and its headers; what one read brings is looked at as a whole."""
HEAD_S = 30.0
"""From a new connection, or from the end of an answer, to the end of the next head. And how long a caller may
take none of a document, or of what is left for one that is closed, or twice that."""
TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class HttpConnection(HttpToolsProtocol):
    """Made by uvicorn for each connection."""

    _head_bytes = 0
    """Read since the last request was complete."""
    _is_in_head = True
    _left_bytes = (-1, -1)
    """Not yet taken, and not yet written, at the last look."""
    _looking: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        names = _names(transport.get_extra_info("peercert") or {})
        if names:
            self.app: ASGIApp = _with_names(self.app, names)
        self._look_later()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_looking()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        super().data_received(data)
        if self._is_in_head and self._head_bytes > MAX_HEAD_BYTES:
            if self._is_idle and not self.transport.is_closing():
                self.transport.write(TOO_LARGE)
            self.transport.close()

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._is_in_head, self._head_bytes = True, 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look_later()

    @property
    def _is_idle(self) -> bool:
        """No answer is under way."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def _unsent_bytes(self) -> int:
        """Of an answer whose length was said. A stream of events ends by itself where its caller is slow."""
        return 0 if self._is_idle else self.cycle.expected_content_length

    def _look_later(self) -> None:
        self._stop_looking()
        self._looking = self.loop.call_later(HEAD_S, self._look)

    def _stop_looking(self) -> None:
        if self._looking is not None:
            self._looking.cancel()

    def _look(self) -> None:
        """Nobody is waited for without end: not for a request, and not until an answer is read."""
        left_bytes = (self.transport.get_write_buffer_size(), self._unsent_bytes)
        if self._is_idle and not self.transport.is_closing():
            self.transport.close()
        elif (self.transport.is_closing() or self._unsent_bytes) and left_bytes == self._left_bytes:
            self.transport.abort()
        self._left_bytes = left_bytes
        self._look_later()


def _with_names(app: ASGIApp, names: tuple[str, ...]) -> ASGIApp:
    async def named(scope: Scope, receive: Receive, send: Send) -> None:
        scope[PEER_NAMES] = names
        await app(scope, receive, send)

    return named


def _names(certificate: Mapping[str, Any]) -> tuple[str, ...]:
    """Alternative names, then common names, as Python's ssl module tells them."""
    common = [value for part in certificate.get("subject", ()) for key, value in part if key == "commonName"]
    return (*(value for _, value in certificate.get("subjectAltName", ())), *common)
