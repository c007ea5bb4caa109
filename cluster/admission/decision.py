"""Whether a request comes in: a question and its answer, plain data both, and the function between. Pure.

Refusing now is kinder than timing out later; a refusal names the limit and says when to come back. What is
compared is time in the queue: a prompt that takes long by itself is late wherever it goes, and is served.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from cluster.admission.tenant import LimitHit

MIN_RETRY_MS = 50
MAX_RETRY_MS = 5000
HEADROOM = 0.6
"""Of the objective for the first token: what the engine takes to begin varies, too."""
MIN_WAIT_SHARE = 0.25
"""Of the objective: this much waiting is never refused."""


class Verdict(StrEnum):
    """What becomes of a request, and why."""

    ADMIT = "admitted"
    ROUTER_STOPPING = "router_stopping"
    ROUTER_FULL = "router_full"
    NO_REPLICA = "no_replica"
    TENANT_LIMIT = "tenant_limit"
    QUEUE_FULL = "queue_full"
    DEADLINE = "deadline"
    """The first token is predicted to come after the caller's deadline."""
    OBJECTIVE = "objective"
    """The first token is predicted to miss the model's objective."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """What is known before any work is done for a request. `tenant_limit` None: no limit is reached."""

    is_stopping: bool
    in_flight: int
    max_streams: int
    has_replica: bool
    tenant_limit: LimitHit | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """What is known once the prompt is tokens and no lane can take it at once.

    `wait_s` is predicted for this router's queue, and two waits in a hundred are longer than `late_s`;
    `start_s` is from there to the first token. `can_displace`: one that waits would make room in
    a full queue. `is_below_share`: its tenant gets less than its share while another gets more.
    `deadline_s` None: the caller has all the time. `target_ttft_s` None: no objective is kept by refusing.
    """

    num_queued: int
    max_queued: int
    can_displace: bool
    is_below_share: bool
    wait_s: float
    late_s: float
    start_s: float
    deadline_s: float | None
    target_ttft_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """`reason` goes to the caller. `retry_after_ms` has a meaning only where something is exhausted."""

    verdict: Verdict
    reason: str = ""
    retry_after_ms: int = 0


ADMITTED = Decision(verdict=Verdict.ADMIT)


def decide_arrival(arrival: Arrival) -> Decision:
    """Before tokenising."""
    if arrival.is_stopping:
        return Decision(verdict=Verdict.ROUTER_STOPPING, reason="this router is stopping; use another")
    if not arrival.has_replica:
        return Decision(verdict=Verdict.NO_REPLICA, reason="no replica of this model is attached and ready")
    if arrival.in_flight >= arrival.max_streams:
        return Decision(
            verdict=Verdict.ROUTER_FULL,
            reason=f"{arrival.max_streams} streams are in flight, the router's limit",
            retry_after_ms=retry_after_ms(1.0),
        )
    if (hit := arrival.tenant_limit) is not None:
        return Decision(
            verdict=Verdict.TENANT_LIMIT,
            reason=f"the tenant's limit {hit.limit}={hit.value:g} is reached",
            retry_after_ms=max(MIN_RETRY_MS, int(hit.retry_after_s * 1e3)),
        )
    return ADMITTED


def decide_wait(wait: Wait) -> Decision:
    """Whether it may join the queue. In a full one it takes the place of one that matters less, or of one of
    a tenant above its share.

    A tenant below its share is not who makes the queue long: it is refused only where the likely wait misses
    the objective, not where it may.
    """
    if wait.num_queued >= wait.max_queued and not wait.can_displace:
        return Decision(
            verdict=Verdict.QUEUE_FULL,
            reason=f"{wait.num_queued} requests wait for this model, its limit max_queued",
            retry_after_ms=retry_after_ms(wait.wait_s / 2),
        )
    first_s = wait.wait_s + wait.start_s
    if wait.deadline_s is not None and first_s > wait.deadline_s:
        return Decision(
            verdict=Verdict.DEADLINE,
            reason=(
                f"the first token is expected in {first_s:.2f} s, the deadline is in {wait.deadline_s:.2f} s"
            ),
            retry_after_ms=retry_after_ms(first_s - wait.deadline_s),
        )
    if wait.target_ttft_s is None:
        return ADMITTED
    headroom, expected_s = (1.0, wait.wait_s) if wait.is_below_share else (HEADROOM, wait.late_s)
    allowed_s = max(MIN_WAIT_SHARE, headroom - wait.start_s / wait.target_ttft_s) * wait.target_ttft_s
    if expected_s > allowed_s:
        return Decision(
            verdict=Verdict.OBJECTIVE,
            reason=(
                f"the queue is expected to take {expected_s:.2f} s, "
                f"too long for this model's slo.ttft_ms={wait.target_ttft_s * 1e3:g}"
            ),
            retry_after_ms=retry_after_ms(expected_s - allowed_s),
        )
    return ADMITTED


def retry_after_ms(seconds: float) -> int:
    """Within bounds: nobody hammers, and nobody stays away because a queue was long for a moment."""
    return max(MIN_RETRY_MS, min(MAX_RETRY_MS, int(seconds * 1e3)))
