"""The event loop of a process that serves many gRPC streams: it takes all that gRPC has done at once.

grpc.aio's own thread puts every finished operation into a queue and a byte into a socket; its handler on the
loop empties the queue and reads one byte (grpcio 1.85). A router that writes a hundred messages in a turn
goes through a hundred turns more, to read the bytes left over. When they fill the socket, gRPC's thread
stands still until most of them are read: 512 streams stop together for tens of milliseconds, several times a
second, and a new one, which takes many operations after each other, begins seconds late.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")

_MAX_WAKEUPS = 65536
"""Far more than the socket holds."""


class GrpcEventLoop(asyncio.SelectorEventLoop):
    """To be there before the first object of grpc.aio is made."""

    def add_reader(
        self, fd: FileDescriptorLike, callback: Callable[[*Arguments], Any], *args: *Arguments
    ) -> None:
        if isinstance(fd, socket.socket) and _is_grpc(callback):
            super().add_reader(fd, partial(_take_all, fd, partial(callback, *args)))
        else:
            super().add_reader(fd, callback, *args)


def run(main: Coroutine[Any, Any, Result]) -> Result:
    """As `asyncio.run`, in such a loop."""
    with asyncio.Runner(loop_factory=GrpcEventLoop) as runner:
        return runner.run(main)


def _is_grpc(callback: Callable[..., Any]) -> bool:
    """Whether it is the handler of grpc.aio's queue, which is bound to its loop by a `partial`."""
    method = getattr(callback, "func", callback)
    return type(getattr(method, "__self__", None)).__name__ == "PollerCompletionQueue"


def _take_all(wakeups: socket.socket, handle: Callable[[], Any]) -> None:
    """Read the bytes that are there, but for the one that `handle` reads itself.

    An operation is in the queue before its byte is in the socket, so `handle` finds all that these stand for.
    """
    try:
        num_waiting = len(wakeups.recv(_MAX_WAKEUPS, socket.MSG_PEEK))
    except BlockingIOError:
        return  # Another loop of this process was faster.
    if num_waiting > 1:
        wakeups.recv(num_waiting - 1)
    handle()
