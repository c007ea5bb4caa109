"""One gRPC call around its handler: ids, server span, count, and the status of whatever went wrong.

This is the servicers' one catch-all: an error of ours becomes its status from `errors.py`, and anything else
is our bug: INTERNAL with an id that the log has too, and nothing of what happened inside.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

import grpc

from cluster.request.errors import ErrorStatus, RouterError, status_of
from cluster.security.auth import ANYBODY, Authenticator, Need, credential_of_call
from cluster.telemetry import semconv
from cluster.telemetry.metrics import RouterMetrics
from cluster.telemetry.rpc_span import RpcSpan
from cluster.telemetry.tracing import Telemetry
from replicas.strict_messages import MalformedMessage

logger = logging.getLogger(__name__)

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")


class Rpc:
    """A call under way. `model` is set once it is known to be a configured one, `identity` by the guard."""

    def __init__(
        self, *, request_id: str, span: RpcSpan, context: grpc.aio.ServicerContext[RequestT, ResponseT]
    ) -> None:
        self.request_id = request_id
        self.span = span
        self.model = ""
        self.identity = ANYBODY
        self.interruption: RouterError | None = None
        self._context = context
        self._task = asyncio.current_task()

    @property
    def id_metadata(self) -> tuple[tuple[str, str], ...]:
        return (
            (semconv.TRAILER_REQUEST_ID, self.request_id),
            (semconv.TRAILER_TRACE_ID, self.span.trace_id),
        )

    def time_remaining_s(self) -> float | None:
        """Time to the caller's deadline; None: there is none."""
        remaining_s: float | None = self._context.time_remaining()
        return remaining_s

    def interrupt(self, error: RouterError) -> None:
        """End the call with this error, even while it waits for the caller to read."""
        if self.interruption is None and self._task is not None:
            self.interruption = error
            self._task.cancel()


class RpcGuard:
    """Opens an `Rpc` around each handler."""

    def __init__(
        self,
        *,
        telemetry: Telemetry,
        metrics: RouterMetrics,
        authenticator: Authenticator,
        draw_id: Callable[[], str],
    ) -> None:
        self._authenticator = authenticator
        self._draw_id = draw_id
        self._telemetry = telemetry
        self._metrics = metrics

    @asynccontextmanager
    async def call(
        self,
        context: grpc.aio.ServicerContext[RequestT, ResponseT],
        method: str,
        *,
        is_inference: bool = False,
        need: Need = Need.TENANT,
    ) -> AsyncIterator[Rpc]:
        """The body runs inside, for callers who may; whatever it raises ends the call with its status."""
        rpc = self._open(context, method)
        code = grpc.StatusCode.OK
        try:
            self.identify(rpc, context, need)
            yield rpc
        except (Exception, asyncio.CancelledError) as error:
            code, status = _verdict(error, rpc, context, method)
            if status is None:
                raise
            await context.abort(code, status.message, (*status.trailers, *rpc.id_metadata))
        finally:
            rpc.span.end(code.name)
            if is_inference:
                self._metrics.count_request(rpc.model, code.name)

    @asynccontextmanager
    async def part(
        self,
        context: grpc.aio.ServicerContext[RequestT, ResponseT],
        method: str,
        tell: Callable[[str], Awaitable[None]],
    ) -> AsyncIterator[Rpc]:
        """One of several requests in a call: its error is told, and the call goes on.

        The body identifies its caller anew, since a call may last longer than a key.
        """
        rpc = self._open(context, method)
        code = grpc.StatusCode.OK
        try:
            yield rpc
        except (Exception, asyncio.CancelledError) as error:
            code, status = _verdict(error, rpc, context, method)
            if status is None:
                raise asyncio.CancelledError from error  # Not a fault of one request, to end the others with.
            with suppress(grpc.aio.InternalError):  # Nobody is there to be told.
                await tell(status.message)
        finally:
            rpc.span.end(code.name)
            self._metrics.count_request(rpc.model, code.name)

    def identify(
        self, rpc: Rpc, context: grpc.aio.ServicerContext[RequestT, ResponseT], need: Need = Need.TENANT
    ) -> None:
        """Find out who calls. Raises Unauthenticated, NotAllowed."""
        if not self._authenticator.is_open:
            rpc.identity = self._authenticator.identify(credential_of_call(context))
            rpc.identity.check(need)

    def _open(self, context: grpc.aio.ServicerContext[RequestT, ResponseT], method: str) -> Rpc:
        return Rpc(
            request_id=self._draw_id(),
            span=self._telemetry.start_rpc(method, context.invocation_metadata() or ()),
            context=context,
        )


def _verdict(
    error: BaseException, rpc: Rpc, context: grpc.aio.ServicerContext[RequestT, ResponseT], method: str
) -> tuple[grpc.StatusCode, ErrorStatus | None]:
    """How a call ends whose body raised this, and what its caller is told; None: it is raised again."""
    if isinstance(error, asyncio.CancelledError) and rpc.interruption is not None:
        asyncio.current_task().uncancel()  # type: ignore[union-attr]
        error = rpc.interruption
    if isinstance(error, RouterError):
        status = status_of(error)
        return status.code, status
    if isinstance(error, MalformedMessage):
        return grpc.StatusCode.INVALID_ARGUMENT, None
    # A write that fails because the caller is gone raises an internal type, maybe before the context knows.
    is_gone = isinstance(error, grpc.aio.InternalError) or context.cancelled() or context.done()
    if is_gone or isinstance(error, asyncio.CancelledError):
        return _cancel_code(context), None
    logger.exception("rpc_failed method=%s request_id=%s", method, rpc.request_id)
    code, message = grpc.StatusCode.INTERNAL, f"internal error; its id is {rpc.request_id}"
    return code, ErrorStatus(code=code, message=message, trailers=())


def _cancel_code(context: grpc.aio.ServicerContext[RequestT, ResponseT]) -> grpc.StatusCode:
    """Why a call was cancelled: its deadline, or its caller."""
    remaining_s: float | None = context.time_remaining()
    is_late = remaining_s is not None and remaining_s <= 0.0
    return grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED
