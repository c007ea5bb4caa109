"""Errors in OpenAI's shape, `{"error": {message, type, param, code}}`: status, text, when to come back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import grpc

from cluster.request.errors import InvalidRequest, RouterError, UnknownModel, status_of

HTTP_STATUSES = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    # Their client tries again after 409; a quarantined prompt stays refused, and an answer does not go on.
    grpc.StatusCode.ABORTED: 422,
    grpc.StatusCode.FAILED_PRECONDITION: 412,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.INTERNAL: 500,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
TYPES = {
    404: "not_found_error",
    429: "rate_limit_error",
}
"""Of other statuses below 500 it is the request, from there on the server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What the caller gets. `code` is the gRPC name of it, for metrics and spans."""

    status: int
    code: str
    document: dict[str, Any]
    headers: dict[str, str]


def failure_of(error: RouterError) -> Failure:
    """Every error of ours, by the one table that gRPC has too."""
    status = status_of(error)
    http_status = HTTP_STATUSES[status.code]
    headers = {}
    if error.retry_after_ms is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after_ms / 1e3))
        headers["retry-after-ms"] = str(error.retry_after_ms)
    return Failure(
        status=http_status,
        code=status.code.name,
        document=_document(
            status.message,
            http_status,
            param=error.field if isinstance(error, InvalidRequest | UnknownModel) else None,
            code="model_not_found" if isinstance(error, UnknownModel) else None,
        ),
        headers=headers,
    )


def internal_failure(request_id: str) -> Failure:
    """Our bug: nothing of what happened inside, but the id that the log has too."""
    message = f"internal error; its id is {request_id}"
    return Failure(status=500, code="INTERNAL", document=_document(message, 500), headers={})


def plain_failure(status: int, message: str, *, code: str) -> Failure:
    """What HTTP alone knows: no such path, a body that is too large."""
    return Failure(status=status, code=code, document=_document(message, status), headers={})


def _document(
    message: str, status: int, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
