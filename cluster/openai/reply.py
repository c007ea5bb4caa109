"""One HTTP reply: a JSON document, or server-sent events. Knows what it has begun, so that errors fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.types import Send

from cluster.openai.json_writer import JsonWriter

JSON_TYPE = "application/json"
EVENTS_TYPE = "text/event-stream; charset=utf-8"


class Reply:
    """Owned by one request. Every reply ends once: by `send_document` or by `end_events`."""

    def __init__(self, send: Send, headers: Mapping[str, str], writer: JsonWriter) -> None:
        self._send = send
        self._headers = dict(headers)
        self._writer = writer
        self.has_begun = False
        """The status is out: nothing but events can follow."""

    async def send_document(
        self, document: Mapping[str, Any], *, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        *pieces, last = await self._writer.write(document)
        size_bytes = sum(map(len, pieces)) + len(last)
        await self._begin(
            status, {"content-type": JSON_TYPE, "content-length": str(size_bytes), **(headers or {})}
        )
        await self._send_pieces(*pieces)
        await self._end(last)

    async def begin_events(self) -> None:
        # No proxy shall collect them.
        await self._begin(
            200, {"content-type": EVENTS_TYPE, "cache-control": "no-store", "x-accel-buffering": "no"}
        )

    async def send_event(self, document: Mapping[str, Any]) -> None:
        pieces = await self._writer.write(document)
        pieces[0] = b"data: " + pieces[0]
        pieces[-1] += b"\n\n"
        await self._send_pieces(*pieces)

    async def send_comment(self, name: str, document: Mapping[str, Any]) -> None:
        """For who looks; clients skip it."""
        pieces = await self._writer.write(document)
        await self._send_pieces(b": " + name.encode() + b" " + b"".join(pieces) + b"\n\n")

    async def end_events(self, *, is_whole: bool) -> None:
        """`is_whole`: the answer ended in good order."""
        await self._end(b"data: [DONE]\n\n" if is_whole else b"")

    async def _send_pieces(self, *pieces: bytes) -> None:
        for body in pieces:
            await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def _end(self, body: bytes) -> None:
        await self._send({"type": "http.response.body", "body": body})

    async def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        assert not self.has_begun
        self.has_begun = True
        fields = [(name.encode(), value.encode()) for name, value in (self._headers | dict(headers)).items()]
        await self._send({"type": "http.response.start", "status": status, "headers": fields})
