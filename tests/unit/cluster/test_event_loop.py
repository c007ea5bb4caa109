"""The loop of a router: what gRPC's thread has done is taken at once, and nothing is lost."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import grpc
import pytest

from cluster.servers import event_loop
from cluster.servers.event_loop import GrpcEventLoop

NUM_CALLS = 100
NUM_WAKEUPS = 200
WAIT_S = 120.0


class PollerCompletionQueue:
    """As gRPC's: it reads one byte each time. It is told of one more operation while it handles the first."""

    def __init__(self) -> None:
        self.reading, self.writing = socket.socketpair()
        self.reading.setblocking(False)
        self.num_handled = 0

    def handle(self, loop: asyncio.AbstractEventLoop) -> None:
        self.reading.recv(1)
        self.num_handled += 1
        if self.num_handled == 1:
            self.writing.send(b"1")
        else:
            loop.stop()


@pytest.fixture
def queue() -> Iterator[PollerCompletionQueue]:
    made = PollerCompletionQueue()
    yield made
    made.reading.close()
    made.writing.close()


def test_all_wakeups_that_wait_are_one_and_a_later_one_is_another(queue: PollerCompletionQueue) -> None:
    loop = GrpcEventLoop()
    try:
        loop.add_reader(queue.reading, partial(queue.handle, loop))
        for _ in range(NUM_WAKEUPS):
            queue.writing.send(b"1")
        loop.run_forever()
        loop.remove_reader(queue.reading)
    finally:
        loop.close()
    assert queue.num_handled == 2
    with pytest.raises(BlockingIOError):
        queue.reading.recv(1)


class Echo(grpc.GenericRpcHandler):
    def service(self, _: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        return grpc.unary_unary_rpc_method_handler(answer)


async def answer(request: bytes, _: object) -> bytes:
    return request


async def call_all() -> list[bytes]:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Echo(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with asyncio.timeout(WAIT_S), grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/echo/Echo")
        answers = await asyncio.gather(*(call(b"%d" % number) for number in range(NUM_CALLS)))
    await server.stop(0)
    return list(answers)


def test_grpcs_own_queue_is_known_and_every_call_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where a newer gRPC calls its queue otherwise: it would work as before, and as slowly."""
    num_taken = 0

    def take(wakeups: socket.socket, handle: Callable[[], Any]) -> None:
        nonlocal num_taken
        num_taken += 1
        take_all(wakeups, handle)

    take_all = event_loop._take_all
    monkeypatch.setattr(event_loop, "_take_all", take)
    assert event_loop.run(call_all()) == [b"%d" % number for number in range(NUM_CALLS)]
    assert num_taken > 0
