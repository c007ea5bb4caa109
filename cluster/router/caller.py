"""Who asked: all that a request's stream needs to know of the protocol it came by."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from time import monotonic

from cluster.request.errors import DeadlinePassed, RouterError
from cluster.telemetry.rpc_span import RpcSpan


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asked. `time_remaining_s` gives None where there is no deadline.

    `accept` is awaited once the request is on its way to a replica. `interrupt` must end the iteration of
    `Streams.run` with this error, even while it waits for the caller to read.
    """

    request_id: str
    tenant: str
    span: RpcSpan
    time_remaining_s: Callable[[], float | None]
    accept: Callable[[], Awaitable[None]]
    interrupt: Callable[[RouterError], None]
    arrived_s: float = field(default_factory=monotonic)

    def deadline_s(self) -> float | None:
        """Time left for an engine; None: no deadline. Raises DeadlinePassed."""
        remaining_s = self.time_remaining_s()
        if remaining_s is not None and remaining_s <= 0.0:
            raise DeadlinePassed
        return remaining_s
