"""One gRPC call around its handler: ids, server span, count, and the status of whatever went wrong.

This is the servicers' one catch-all: an error of ours becomes its status from `errors.py`, and anything else
is our bug: INTERNAL with an id that the log has too, and nothing of what happened inside.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import NoReturn, TypeAlias, TypeVar

import grpc

from cluster.request.errors import RouterError, status_of
from cluster.security.auth import ANYBODY, Authenticator, Identity, Need, credential_of_call
from cluster.telemetry import semconv
from cluster.telemetry.metrics import RouterMetrics
from cluster.telemetry.rpc_span import RpcSpan
from cluster.telemetry.tracing import Telemetry
from replicas.strict_messages import MalformedMessage

logger = logging.getLogger(__name__)

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")
Trailers: TypeAlias = tuple[tuple[str, str | bytes], ...]


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
        rpc = Rpc(
            request_id=self._draw_id(),
            span=self._telemetry.start_rpc(method, context.invocation_metadata() or ()),
            context=context,
        )
        code = grpc.StatusCode.OK
        try:
            if not self._authenticator.is_open:
                rpc.identity = self._authenticator.identify(credential_of_call(context))
                rpc.identity.check(need)
            yield rpc
        except RouterError as error:
            code = status_of(error).code
            await _abort(context, error, rpc)
        except asyncio.CancelledError:
            if rpc.interruption is None:
                code = _cancel_code(context)
                raise
            code = status_of(rpc.interruption).code
            asyncio.current_task().uncancel()  # type: ignore[union-attr]
            await _abort(context, rpc.interruption, rpc)
        except MalformedMessage:
            code = grpc.StatusCode.INVALID_ARGUMENT
            raise
        except Exception:
            if context.cancelled() or context.done():
                # A write that fails because the caller is gone raises an internal type of gRPC.
                code = _cancel_code(context)
                raise
            code = grpc.StatusCode.INTERNAL
            logger.exception("rpc_failed method=%s request_id=%s", method, rpc.request_id)
            await context.abort(code, f"internal error; its id is {rpc.request_id}", rpc.id_metadata)
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
        *,
        identity: Identity,
    ) -> AsyncIterator[Rpc]:
        """One of several requests in a call of `identity`: its error is told, and the call goes on."""
        rpc = Rpc(
            request_id=self._draw_id(),
            span=self._telemetry.start_rpc(method, context.invocation_metadata() or ()),
            context=context,
        )
        rpc.identity = identity
        code = grpc.StatusCode.OK
        try:
            yield rpc
        except RouterError as error:
            code = status_of(error).code
            await tell(str(error))
        except asyncio.CancelledError:
            if rpc.interruption is None:
                code = _cancel_code(context)
                raise
            code = status_of(rpc.interruption).code
            asyncio.current_task().uncancel()  # type: ignore[union-attr]
            await tell(str(rpc.interruption))
        except Exception:
            if context.cancelled() or context.done():
                code = _cancel_code(context)
                raise
            code = grpc.StatusCode.INTERNAL
            logger.exception("rpc_failed method=%s request_id=%s", method, rpc.request_id)
            await tell(f"internal error; its id is {rpc.request_id}")
        finally:
            rpc.span.end(code.name)
            self._metrics.count_request(rpc.model, code.name)


async def _abort(
    context: grpc.aio.ServicerContext[RequestT, ResponseT], error: RouterError, rpc: Rpc
) -> NoReturn:
    status = status_of(error)
    await context.abort(status.code, status.message, (*status.trailers, *rpc.id_metadata))


def _cancel_code(context: grpc.aio.ServicerContext[RequestT, ResponseT]) -> grpc.StatusCode:
    """Why a call was cancelled: its deadline, or its caller."""
    remaining_s: float | None = context.time_remaining()
    is_late = remaining_s is not None and remaining_s <= 0.0
    return grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED
