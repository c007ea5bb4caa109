"""The errors of the router, and the one table that turns them into gRPC statuses.

    RouterError
    ├── InvalidRequest      a field is wrong: names field, value, limit and fix
    ├── Unauthenticated     nobody knows who calls
    ├── NotAllowed          it is known who calls, and that it may not do this
    ├── UnknownModel        the model is not served here
    ├── ResumeRefused       the token of a stream to go on with does not fit
    ├── UnknownRequest      GetEnergy of a request that left the record, or never was
    ├── UnknownReplica      DrainReplica of a replica that is not attached
    ├── Overloaded          refused now rather than late; says when to come back
    ├── LimitReached        a limit of the tenant is reached; named, with when there is room again
    ├── SlowConsumer        the caller does not read, and its buffer is full
    ├── NoReplica           nothing attached can take it, or the router is stopping
    ├── ReplicaStopped      the replica went away under the stream
    ├── FailoverSpent       it did so more often than a stream is moved
    ├── Quarantined         replicas died under this prompt
    ├── DeadlinePassed      the caller's deadline passed
    └── EngineFault         the engine failed this request; details stay in the log

The text of every error goes to the caller: no prompt, no path, no internals in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import grpc
from google.protobuf import duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from cluster.request.failover import LossReason

STATUS_DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
MAX_SHOWN_CHARS = 80
"""Of a name that a caller made up."""


class RouterError(Exception):
    """Base of every error the router raises on purpose. `retry_after_ms` None: do not come back."""

    retry_after_ms: int | None = None


class InvalidRequest(RouterError, ValueError):
    """One field of a request is wrong. `got` describes the value and never holds text of a prompt."""

    def __init__(self, *, field: str, got: object, limit: str, fix: str) -> None:
        super().__init__(f"{field}: got {got}; allowed: {limit}; {fix}")
        self.field = field
        self._why = (got, limit, fix)

    def renamed(self, field: str) -> InvalidRequest:
        """The same in a protocol that has another name for the field."""
        got, limit, fix = self._why
        return InvalidRequest(field=field, got=got, limit=limit, fix=fix)


class Unauthenticated(RouterError):
    """The call carries nothing that says whose it is, or something wrong."""


class NotAllowed(RouterError):
    """This caller may not do that."""


class UnknownModel(RouterError):
    """No model of this name is configured, or not in this version. `served`: what the caller may ask for."""

    def __init__(self, *, field: str, name: str, served: tuple[str, ...]) -> None:
        self.field = field
        self.name = name[:MAX_SHOWN_CHARS].encode(errors="replace").decode()
        allowed = ", ".join(served) or "none for this caller"
        super().__init__(f"{field}: got {self.name!r}; allowed: {allowed}; name one that is served here")


class ResumeRefused(RouterError):
    """The answer cannot go on with this token; it has to start over."""


class UnknownRequest(RouterError):
    """The record of finished requests does not hold it."""


class UnknownReplica(RouterError):
    """No such replica is attached."""


class Overloaded(RouterError):
    """There is no room now."""

    def __init__(self, reason: str, *, retry_after_ms: int) -> None:
        super().__init__(f"{reason}; retry after {retry_after_ms} ms")
        self.retry_after_ms = retry_after_ms


class LimitReached(RouterError):
    """One of the tenant's own limits keeps the request out."""

    def __init__(self, reason: str, *, tenant: str, retry_after_ms: int) -> None:
        super().__init__(f"{reason}; retry after {retry_after_ms} ms")
        self.retry_after_ms = retry_after_ms
        self.tenant = tenant


class SlowConsumer(RouterError):
    """The caller stopped reading."""

    def __init__(self, *, limit_bytes: int) -> None:
        super().__init__(
            f"slow consumer: unread tokens exceed {limit_bytes} bytes; read faster or ask for fewer"
        )


class NoReplica(RouterError):
    """Nothing attached can take the request."""

    retry_after_ms = 1000


class ReplicaStopped(RouterError):
    """The replica that served the request is gone."""

    retry_after_ms = 100

    def __init__(self, reason: LossReason = LossReason.KILLED) -> None:
        super().__init__("the replica serving this request stopped; retry")
        self.reason = reason


class FailoverSpent(RouterError):
    """The stream lost its replica, and may not be moved (again)."""

    retry_after_ms = 1000

    def __init__(self, limit: str) -> None:
        super().__init__(f"the replica serving this request stopped, and {limit}; retry")


class Quarantined(RouterError):
    """The prompt is taken for the cause of the death of replicas."""

    def __init__(self) -> None:
        super().__init__("replicas stopped while serving this prompt; it is refused for ten minutes")


class DeadlinePassed(RouterError):
    """The caller's deadline passed before the answer was complete."""

    def __init__(self) -> None:
        super().__init__("the deadline passed before the answer was complete")


class EngineFault(RouterError):
    """The engine failed this request alone."""


STATUS_CODES: dict[type[RouterError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    NotAllowed: grpc.StatusCode.PERMISSION_DENIED,
    UnknownModel: grpc.StatusCode.NOT_FOUND,
    ResumeRefused: grpc.StatusCode.FAILED_PRECONDITION,
    UnknownRequest: grpc.StatusCode.NOT_FOUND,
    UnknownReplica: grpc.StatusCode.NOT_FOUND,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    LimitReached: grpc.StatusCode.RESOURCE_EXHAUSTED,
    SlowConsumer: grpc.StatusCode.RESOURCE_EXHAUSTED,
    NoReplica: grpc.StatusCode.UNAVAILABLE,
    ReplicaStopped: grpc.StatusCode.UNAVAILABLE,
    FailoverSpent: grpc.StatusCode.UNAVAILABLE,
    Quarantined: grpc.StatusCode.ABORTED,
    DeadlinePassed: grpc.StatusCode.DEADLINE_EXCEEDED,
    EngineFault: grpc.StatusCode.INTERNAL,
}
"""The table. A new error is a new line here and in the tree above."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorStatus:
    """What the caller gets: code, text, and trailing metadata with `google.rpc.Status`."""

    code: grpc.StatusCode
    message: str
    trailers: tuple[tuple[str, str | bytes], ...]


def status_of(error: RouterError) -> ErrorStatus:
    """The gRPC status of an error, with BadRequest, ResourceInfo or RetryInfo details where they apply."""
    code = STATUS_CODES[type(error)]
    message = str(error)
    status = status_pb2.Status(code=code_pb2.Code.Value(code.name), message=message)
    if isinstance(error, InvalidRequest):
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=message)
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, UnknownModel):
        resource = error_details_pb2.ResourceInfo(
            resource_type=error.field, resource_name=error.name, description=message
        )
        status.details.add().Pack(resource)
    if isinstance(error, LimitReached):
        quota = error_details_pb2.QuotaFailure.Violation(
            subject=f"tenant:{error.tenant}", description=message
        )
        status.details.add().Pack(error_details_pb2.QuotaFailure(violations=[quota]))
    if error.retry_after_ms is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(error.retry_after_ms)
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    trailers: list[tuple[str, str | bytes]] = [(STATUS_DETAILS_KEY, status.SerializeToString())]
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        # -1 tells gRPC's own retry policy to stop; a caller that does not read gains nothing by a retry.
        pushback_ms = -1 if error.retry_after_ms is None else error.retry_after_ms
        trailers.append((PUSHBACK_KEY, str(pushback_ms)))
    return ErrorStatus(code=code, message=message, trailers=tuple(trailers))


def engine_error(code_name: str, message: str) -> RouterError:
    """The error for a sequence its engine refused or failed: our own type for each code it may use.

    Only the words of refusals go on; whatever else happened in there is a fault without details.
    """
    if code_name == "INVALID_ARGUMENT":
        return InvalidRequest(
            field="request", got="what this replica cannot serve", limit=message, fix="change it"
        )
    if code_name == "RESOURCE_EXHAUSTED":
        return Overloaded("the replica's queue is full", retry_after_ms=250)
    if code_name == "UNAVAILABLE":
        return ReplicaStopped(LossReason.REFUSED)
    if code_name == "DEADLINE_EXCEEDED":
        return DeadlinePassed()
    return EngineFault("the engine failed this request")
