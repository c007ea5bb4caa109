"""Whether a request may come in: decided before any work is done for it. Pure.

Refusing now is kinder than timing out later; a refusal says when to come back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from cluster.router.balancing.lane_view import LaneView
from cluster.router.balancing.prediction import prefill_rate

MIN_RETRY_MS = 50
MAX_RETRY_MS = 5000


class Verdict(Enum):
    ADMIT = auto()
    ROUTER_STOPPING = auto()
    ROUTER_FULL = auto()
    NO_REPLICA = auto()
    REPLICAS_FULL = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """`retry_after_ms` has a meaning only where there is no room."""

    verdict: Verdict
    retry_after_ms: int = 0


def decide(*, is_stopping: bool, in_flight: int, max_streams: int, lanes: Sequence[LaneView]) -> Decision:
    """Admit or refuse one request to a model whose ready lanes are `lanes`."""
    if is_stopping:
        return Decision(verdict=Verdict.ROUTER_STOPPING)
    if in_flight >= max_streams:
        return Decision(verdict=Verdict.ROUTER_FULL, retry_after_ms=retry_after_ms(lanes))
    if not lanes:
        return Decision(verdict=Verdict.NO_REPLICA)
    if not any(lane.has_room for lane in lanes):
        return Decision(verdict=Verdict.REPLICAS_FULL, retry_after_ms=retry_after_ms(lanes))
    return Decision(verdict=Verdict.ADMIT)


def retry_after_ms(lanes: Sequence[LaneView]) -> int:
    """When the least loaded lane will have worked off half of the prefill that waits there."""
    waits_s = [lane.num_prefill_tokens / prefill_rate(lane) for lane in lanes]
    wait_ms = int(500 * min(waits_s, default=1.0))
    return max(MIN_RETRY_MS, min(MAX_RETRY_MS, wait_ms))
