"""What a caller is told whose request is not admitted."""

from __future__ import annotations

from cluster.router.admission.decision import Decision, Verdict
from cluster.router.errors import LimitReached, NoReplica, Overloaded, RouterError


def refusal_of(decision: Decision, *, tenant: str = "") -> RouterError:
    """The error for a decision that is not to admit."""
    match decision.verdict:
        case Verdict.ROUTER_STOPPING | Verdict.NO_REPLICA:
            return NoReplica(decision.reason)
        case Verdict.TENANT_LIMIT:
            return LimitReached(decision.reason, tenant=tenant, retry_after_ms=decision.retry_after_ms)
        case _:
            return Overloaded(decision.reason, retry_after_ms=decision.retry_after_ms)
