"""What a caller is told whose request is not admitted, and when to come back."""

from __future__ import annotations

from random import Random

from cluster.admission.decision import Decision, Verdict
from cluster.request.errors import LimitReached, NoReplica, Overloaded, RouterError

JITTER = 0.5
"""Of the advised wait, at most, on top: those refused at one time do not come back at one time."""


class Refusals:
    """Makes the errors. Owned by the event loop."""

    def __init__(self, random: Random) -> None:
        self._random = random

    def of(self, decision: Decision, *, tenant: str = "") -> RouterError:
        """The error for a decision that is not to admit."""
        match decision.verdict:
            case Verdict.ROUTER_STOPPING | Verdict.NO_REPLICA:
                return NoReplica(decision.reason)
            case Verdict.TENANT_LIMIT:
                retry_ms = self._later(decision.retry_after_ms)
                return LimitReached(decision.reason, tenant=tenant, retry_after_ms=retry_ms)
            case _:
                return self.overloaded(decision.reason, retry_after_ms=decision.retry_after_ms)

    def overloaded(self, reason: str, *, retry_after_ms: int) -> Overloaded:
        return Overloaded(reason, retry_after_ms=self._later(retry_after_ms))

    def _later(self, retry_after_ms: int) -> int:
        """Never sooner than advised: a limit would only be hit again."""
        return round(retry_after_ms * (1.0 + JITTER * self._random.random()))
