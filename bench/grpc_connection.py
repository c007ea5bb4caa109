"""One connection to a gRPC server that takes all messages of all its streams as they come, at little cost.

grpc.aio takes a step of 32 streams apart into 32 operations, each with a thread's wake-up and a turn of the
loop: 0.1 ms of CPU for each message, on the cores that the system under test computes on. Here a step is one
read of the socket and a few lines of Python per message; what travels is the same. As much of HTTP/2 as a
caller of streamed answers needs, in plain text. Headers are not looked at: why a stream failed is not known.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from struct import Struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM = ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
FRAME = Struct(">HBBBI")
"""Length in two parts, type, flags, stream."""
MESSAGE = Struct(">BI")
"""Whether it is compressed, length."""
SETTING = Struct(">HI")
COUNT = Struct(">I")
HEADER_TABLE_SIZE, ENABLE_PUSH, INITIAL_WINDOW_SIZE = 1, 2, 4
FIRST_WINDOW_BYTES = 65535
ENDLESS_BYTES = 2**31 - 1
"""The largest window: a bench takes less of a connection, and no window is ever widened."""


class CallFailed(Exception):
    """A stream or the connection ended before it should; the text says how."""


@dataclass(slots=True, eq=False)
class Call:
    """One call under way. `on_message` gets each message and when it came, in seconds of `perf_counter`.

    `ended` is done at the end of the stream, and fails with CallFailed where the server cut it.
    """

    on_message: Callable[[bytes, float], None]
    ended: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    received: bytearray = field(default_factory=bytearray)
    """Of a message that is not complete."""


class GrpcConnection(asyncio.Protocol):
    """Lives on one event loop."""

    def __init__(self, authority: str) -> None:
        self._authority = authority
        self._received = bytearray()
        self._calls: dict[int, Call] = {}
        self._next_stream = 1
        self._credit_bytes = FIRST_WINDOW_BYTES
        """How much the server takes now, of all streams."""
        self._unsent: deque[tuple[int, bytes]] = deque()

    @classmethod
    async def open(cls, address: str) -> GrpcConnection:
        """`address` is host:port. Raises OSError."""
        host, _, port = address.rpartition(":")
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: cls(address), host, int(port))
        return connection

    def close(self) -> None:
        self._transport.close()

    def call(self, method: str, request: bytes, on_message: Callable[[bytes, float], None]) -> Call:
        """Begin a call with one request; `method` is /package.Service/Name."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        call = self._calls[stream] = Call(on_message)
        headers = {
            ":method": "POST",
            ":scheme": "http",
            ":path": method,
            ":authority": self._authority,
            "content-type": "application/grpc",
            "te": "trailers",
        }
        block = b"".join(b"\0" + _text(name) + _text(value) for name, value in headers.items())
        self._transport.write(frame(HEADERS, END_HEADERS, stream, block))
        self._unsent.append((stream, MESSAGE.pack(0, len(request)) + request))
        self._send()
        return call

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        settings = (HEADER_TABLE_SIZE, 0), (ENABLE_PUSH, 0), (INITIAL_WINDOW_SIZE, ENDLESS_BYTES)
        transport.write(
            PREFACE
            + frame(SETTINGS, 0, 0, b"".join(SETTING.pack(*setting) for setting in settings))
            + frame(WINDOW_UPDATE, 0, 0, COUNT.pack(ENDLESS_BYTES - FIRST_WINDOW_BYTES))
        )

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter()
        received, at = self._received, 0
        received += data
        while len(received) - at >= FRAME.size:
            high, low, kind, flags, stream = FRAME.unpack_from(received, at)
            begin = at + FRAME.size
            end = begin + (high << 8 | low)
            if len(received) < end:
                break
            self._take(kind, flags, stream, bytes(received[begin:end]), now_s)
            at = end
        del received[:at]

    def connection_lost(self, exc: Exception | None) -> None:
        for stream in list(self._calls):
            self._end(stream, f"the connection was lost: {exc or 'the server closed it'}")

    def _take(self, kind: int, flags: int, stream: int, payload: bytes, now_s: float) -> None:
        if kind == DATA and stream in self._calls:
            assert not flags & PADDED, "gRPC pads no messages"
            self._take_messages(self._calls[stream], payload, now_s)
        elif kind == RST_STREAM:
            self._end(stream, f"the server reset the stream with error {COUNT.unpack(payload)[0]}")
        elif kind == SETTINGS and not flags & ACK:
            self._transport.write(frame(SETTINGS, ACK, 0, b""))
        elif kind == PING and not flags & ACK:
            self._transport.write(frame(PING, ACK, 0, payload))
        elif kind == GOAWAY:
            self._transport.close()
        elif kind == WINDOW_UPDATE and not stream:
            self._credit_bytes += COUNT.unpack(payload)[0]
            self._send()
        if flags & END_STREAM and kind in (DATA, HEADERS):
            self._end(stream)

    def _take_messages(self, call: Call, payload: bytes, now_s: float) -> None:
        received, at = call.received, 0
        received += payload
        while len(received) - at >= MESSAGE.size:
            is_compressed, length = MESSAGE.unpack_from(received, at)
            assert not is_compressed, "no compression was asked for"
            begin = at + MESSAGE.size
            if len(received) < begin + length:
                break
            call.on_message(bytes(received[begin : begin + length]), now_s)
            at = begin + length
        del received[:at]

    def _end(self, stream: int, failure: str = "") -> None:
        call = self._calls.pop(stream, None)
        if call is None or call.ended.done():
            return
        if failure:
            call.ended.set_exception(CallFailed(failure))
        else:
            call.ended.set_result(None)

    def _send(self) -> None:
        """Requests, as far as the server takes them. Each fits into the window of its own stream."""
        while self._unsent and len(self._unsent[0][1]) <= self._credit_bytes:
            stream, body = self._unsent.popleft()
            assert len(body) <= FIRST_WINDOW_BYTES, f"a request of {len(body)} bytes"
            self._credit_bytes -= len(body)
            self._transport.write(frame(DATA, END_STREAM, stream, body))


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    length = len(payload)
    return FRAME.pack(length >> 8, length & 255, kind, flags, stream) + payload


def _text(text: str) -> bytes:
    """As HPACK has it, without Huffman's code."""
    assert len(text) < 127
    return bytes([len(text)]) + text.encode()
