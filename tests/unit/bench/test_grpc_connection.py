"""A connection takes apart what a gRPC server sends, wherever the socket cuts it."""

from __future__ import annotations

import asyncio

import pytest

from bench.grpc_connection import (
    ACK,
    COUNT,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    MESSAGE,
    PING,
    RST_STREAM,
    CallFailed,
    GrpcConnection,
    frame,
)


class Wire(asyncio.Transport):
    """What was sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = bytearray()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.sent += data


def make_connection() -> tuple[GrpcConnection, Wire]:
    connection, wire = GrpcConnection("host:1"), Wire()
    connection.connection_made(wire)
    return connection, wire


async def test_messages_are_whole_however_they_are_cut() -> None:
    connection, wire = make_connection()
    heard: list[bytes] = []
    call = connection.call("/a.B/C", b"ask", lambda message, _: heard.append(message))
    body = MESSAGE.pack(0, 3) + b"one" + MESSAGE.pack(0, 0) + MESSAGE.pack(0, 5) + b"three"
    answer = (
        frame(HEADERS, END_HEADERS, 1, b"\x88")
        + frame(PING, 0, 0, b"12345678")
        + frame(DATA, 0, 1, body[:10])
        + frame(DATA, 0, 1, body[10:])
        + frame(HEADERS, END_HEADERS | END_STREAM, 1, b"")
    )
    for byte in answer:
        connection.data_received(bytes([byte]))
    await call.ended
    assert heard == [b"one", b"", b"three"]
    assert wire.sent.endswith(
        frame(DATA, END_STREAM, 1, MESSAGE.pack(0, 3) + b"ask") + frame(PING, ACK, 0, b"12345678")
    )


async def test_a_stream_that_is_reset_has_failed() -> None:
    connection, _ = make_connection()
    call = connection.call("/a.B/C", b"", lambda message, _: None)
    connection.data_received(frame(RST_STREAM, 0, 1, COUNT.pack(8)))
    with pytest.raises(CallFailed, match="error 8"):
        await call.ended
