"""One HTTP request around its handler: ids, span, count, body, hang-up, and the error of what went wrong.

What `rpc.py` is for gRPC. A caller that hangs up cancels the handler, and with it everything it began.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from cluster.openai.failures import Failure, failure_of, internal_failure, plain_failure
from cluster.openai.json_writer import JsonWriter
from cluster.openai.reply import Reply
from cluster.request.errors import RouterError
from cluster.router.caller import Caller
from cluster.security.auth import ANYBODY, Identity
from cluster.servers.http_guard import IDENTITY
from cluster.telemetry import semconv
from cluster.telemetry.metrics import RouterMetrics
from cluster.telemetry.rpc_span import RpcSpan
from cluster.telemetry.tracing import Telemetry

logger = logging.getLogger(__name__)

BODY_S = 30.0
BODY_BYTES_PER_S = 4096
"""A body may take `BODY_S`, and more time for what has come, but may not stand still for `BODY_S`."""
FAILURE_WRITE_S = 1.0
"""For the last words to a caller that may not read."""


class BodyRefused(Exception):
    """More came than a request may have, or it did not come in time; `failure` says it."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure


class Exchange:
    """A request under way. `model` is set once it is known to be a configured one."""

    def __init__(
        self, request: Request, *, request_id: str, span: RpcSpan, send: Send, writer: JsonWriter
    ) -> None:
        self.request = request
        self.request_id = request_id
        self.span = span
        self.model = ""
        self.interruption: RouterError | None = None
        self.task: asyncio.Task[str] | None = None
        self.reply = Reply(
            send,
            {
                "x-request-id": self.request_id,
                f"x-{semconv.TRAILER_REQUEST_ID}": self.request_id,
                f"x-{semconv.TRAILER_TRACE_ID}": span.trace_id,
            },
            writer,
        )

    @property
    def identity(self) -> Identity:
        """Who asks, as the guard of the whole application found out."""
        identity: Identity = self.request.scope.get(IDENTITY, ANYBODY)
        return identity

    def caller(self, position: int = 0) -> Caller:
        """Who asks for the prompt at this position; each has an id of its own in the records."""
        return Caller(
            request_id=self.request_id if position == 0 else f"{self.request_id}-{position}",
            tenant=self.identity.tenant,
            span=self.span,
            time_remaining_s=lambda: None,
            accept=_accept,
            interrupt=self.interrupt,
        )

    def interrupt(self, error: RouterError) -> None:
        """End the request with this error, even while it waits for the caller to read."""
        if self.interruption is None and self.task is not None:
            self.interruption = error
            self.task.cancel()


Handler = Callable[[Exchange, bytes], Coroutine[Any, Any, None]]


class ExchangeGuard:
    """Opens an `Exchange` around each handler."""

    def __init__(
        self,
        *,
        telemetry: Telemetry,
        metrics: RouterMetrics,
        max_body_bytes: int,
        draw_id: Callable[[], str],
    ) -> None:
        self._draw_id = draw_id
        self._telemetry = telemetry
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes
        self._writer = JsonWriter()

    def endpoint(self, route: str, handle: Handler, *, is_inference: bool = False) -> Endpoint:
        """An ASGI application for one route."""
        return Endpoint(self, route, handle, is_inference=is_inference)

    async def serve(
        self, scope: Scope, receive: Receive, send: Send, *, route: str, handle: Handler, is_inference: bool
    ) -> None:
        request = Request(scope, receive)
        span = self._telemetry.start_http(request.method, route, request.headers.items())
        exchange = Exchange(request, request_id=self._draw_id(), span=span, send=send, writer=self._writer)
        code = "CANCELLED"
        try:
            content = await self._read_body(request)
            code = await _serve_until_gone(
                self._guarded(exchange, handle(exchange, content)), exchange, receive
            )
        except BodyRefused as refusal:
            code = await _fail(exchange, refusal.failure)
        except ClientDisconnect:
            pass
        finally:
            span.end(code)
            if is_inference:
                self._metrics.count_request(exchange.model, code)

    async def _read_body(self, request: Request) -> bytes:
        """All of it. Raises BodyRefused before more than the limit is held, or once it is too late."""
        pieces, size_bytes = [], 0
        now_s = asyncio.get_running_loop().time
        began_s = now_s()
        try:
            async with asyncio.timeout(BODY_S) as limit:
                async for piece in request.stream():
                    size_bytes += len(piece)
                    if size_bytes > self._max_body_bytes:
                        raise _too_large(self._max_body_bytes)
                    pieces.append(piece)
                    limit.reschedule(BODY_S + min(now_s(), began_s + size_bytes / BODY_BYTES_PER_S))
        except TimeoutError:
            raise _too_slow(size_bytes, took_s=now_s() - began_s) from None
        return b"".join(pieces)

    async def _guarded(self, exchange: Exchange, work: Awaitable[None]) -> str:
        """The status of the work, which has been told to the caller."""
        try:
            await work
        except RouterError as error:
            return await _fail(exchange, failure_of(error))
        except asyncio.CancelledError:
            if exchange.interruption is None:
                raise
            assert exchange.task is not None
            exchange.task.uncancel()
            return await _fail(exchange, failure_of(exchange.interruption))
        except Exception:
            logger.exception(
                "http_failed route=%s request_id=%s", exchange.request.url.path, exchange.request_id
            )
            return await _fail(exchange, internal_failure(exchange.request_id))
        return "OK"


class Endpoint:
    """A route's application: Starlette hands it the connection as it is."""

    def __init__(self, guard: ExchangeGuard, route: str, handle: Handler, *, is_inference: bool) -> None:
        self._guard = guard
        self._route = route
        self._handle = handle
        self._is_inference = is_inference

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._guard.serve(
            scope, receive, send, route=self._route, handle=self._handle, is_inference=self._is_inference
        )


async def _serve_until_gone(work: Coroutine[Any, Any, str], exchange: Exchange, receive: Receive) -> str:
    """Run the work until it ends, or its caller hangs up."""
    task = exchange.task = asyncio.create_task(work)
    gone = asyncio.create_task(_hang_up(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)
    return "CANCELLED" if task.cancelled() else task.result()


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _fail(exchange: Exchange, failure: Failure) -> str:
    """Tell the caller what fits: a status, or the last event of what has begun."""
    with suppress(TimeoutError):
        async with asyncio.timeout(FAILURE_WRITE_S):
            if exchange.reply.has_begun:
                await exchange.reply.send_event(failure.document)
                await exchange.reply.end_events(is_whole=False)
            else:
                await exchange.reply.send_document(
                    failure.document, status=failure.status, headers=failure.headers
                )
    return failure.code


def _too_large(limit_bytes: int) -> BodyRefused:
    text = f"the body is larger than {limit_bytes} bytes; send less"
    return BodyRefused(plain_failure(413, text, code="INVALID_ARGUMENT"))


def _too_slow(size_bytes: int, *, took_s: float) -> BodyRefused:
    text = (
        f"body: {size_bytes} bytes came in {took_s:.1f} s, and it is not complete; allowed: {BODY_S:g} s, "
        f"1 s more for each {BODY_BYTES_PER_S} bytes, and no pause of {BODY_S:g} s; send it faster"
    )
    return BodyRefused(plain_failure(408, text, code="DEADLINE_EXCEEDED"))


async def _accept() -> None:
    """Nothing goes out before the first piece of an answer: until then the status can still say why not."""
