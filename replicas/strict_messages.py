"""Bytes that are no message of a method end its call with INVALID_ARGUMENT.

gRPC itself answers UNKNOWN and logs a traceback, as for a mistake of the server's; anybody could fill its log
so.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

Servicer = TypeVar("Servicer")
Context = aio.ServicerContext[Any, Any]
TEXT = "the bytes are no message of this method: not protobuf, or a text that is not UTF-8"


class MalformedMessage(Exception):
    """A stream carried bytes that are no message of it. A handler lets it through."""

    def __init__(self) -> None:
        super().__init__(TEXT)


class _Malformed:
    """Stands for a message that could not be read."""


_MALFORMED = _Malformed()


def add_strictly(
    register: Callable[[Servicer, aio.Server], None],
    servicer: Servicer,
    server: aio.Server,
    *,
    name: str | None = None,
) -> None:
    """`register(servicer, server)`, a generated function, with strict reading of what comes in.

    `name`: what callers call the service by, where it is not the one of its `.proto`.
    """
    register(servicer, cast(aio.Server, _StrictServer(server, name)))


class _StrictServer:
    """What generated code needs of a server.

    gRPC's own registry of methods stays empty: grpc.aio keeps a task for the next call of each method in it,
    and goes through all of them at every call.
    """

    def __init__(self, server: aio.Server, name: str | None) -> None:
        self._server = server
        self._name = name

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """The same methods come again below, by name."""

    def add_registered_method_handlers(
        self, service: str, methods: Mapping[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None:
        service = self._name or service
        strict = {name: _strict(handler) for name, handler in methods.items()}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, strict),))


def _strict(handler: Any) -> Any:
    """The handler of one method; `handler` is gRPC's own named tuple."""
    wrapped: dict[str, Any] = {"request_deserializer": _reader(handler.request_deserializer)}
    for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
        behave = getattr(handler, kind)
        if behave is not None:
            wrapped[kind] = _behave_strictly(behave, is_streamed=handler.request_streaming)
    return handler._replace(**wrapped)


def _reader(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def read(content: bytes) -> Any:
        try:
            return parse(content)
        except DecodeError:
            return _MALFORMED

    return read


def _behave_strictly(behave: Callable[[Any, Context], Any], *, is_streamed: bool) -> Callable[..., Any]:
    """gRPC looks at the kind of function, so each kind stays what it is."""
    if inspect.isasyncgenfunction(behave):

        async def generate(request: Any, context: Context) -> AsyncIterator[Any]:
            if request is _MALFORMED:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, TEXT)
            async for response in behave(request, context):
                yield response

        return generate

    async def answer(request: Any, context: Context) -> Any:
        if request is _MALFORMED:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, TEXT)
        try:
            return await cast(Awaitable[Any], behave(_checked(request) if is_streamed else request, context))
        except MalformedMessage:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, TEXT)

    return answer


async def _checked(messages: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """The messages of a stream. Raises MalformedMessage."""
    async for message in messages:
        if message is _MALFORMED:
            raise MalformedMessage
        yield message
