"""One HTTP reply: a JSON document, or server-sent events. Knows what it has begun, so that errors fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.types import Send

JSON_TYPE = "application/json"
EVENTS_TYPE = "text/event-stream; charset=utf-8"


class Reply:
    """Owned by one request. Every reply ends once: by `send_document` or by `end_events`."""

    def __init__(self, send: Send, headers: Mapping[str, str]) -> None:
        self._send = send
        self._headers = dict(headers)
        self.has_begun = False
        """The status is out: nothing but events can follow."""

    async def send_document(
        self, document: Mapping[str, Any], *, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        body = _encode(document)
        await self._begin(
            status, {"content-type": JSON_TYPE, "content-length": str(len(body)), **(headers or {})}
        )
        await self._send({"type": "http.response.body", "body": body})

    async def begin_events(self) -> None:
        # No proxy shall collect them.
        await self._begin(
            200, {"content-type": EVENTS_TYPE, "cache-control": "no-store", "x-accel-buffering": "no"}
        )

    async def send_event(self, document: Mapping[str, Any]) -> None:
        await self._send_piece(b"data: " + _encode(document) + b"\n\n")

    async def send_comment(self, name: str, document: Mapping[str, Any]) -> None:
        """For who looks; clients skip it."""
        await self._send_piece(b": " + name.encode() + b" " + _encode(document) + b"\n\n")

    async def end_events(self, *, is_whole: bool) -> None:
        """`is_whole`: the answer ended in good order."""
        body = b"data: [DONE]\n\n" if is_whole else b""
        await self._send({"type": "http.response.body", "body": body})

    async def _send_piece(self, body: bytes) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        assert not self.has_begun
        self.has_begun = True
        fields = [(name.encode(), value.encode()) for name, value in (self._headers | dict(headers)).items()]
        await self._send({"type": "http.response.start", "status": status, "headers": fields})


def _encode(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
