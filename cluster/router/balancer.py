"""Which replica takes a request: a pure function of load snapshots and of what was sent since.

Fresh replicas are compared by the time until they could give the first token; where every snapshot is old,
two random candidates are compared by what this router itself has in flight there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

FRESH_S = 1.0
"""A snapshot older than this says too little; an idle replica's heartbeat comes more often."""
UNKNOWN_PREFILL_TOKENS_PER_S = 10_000.0
"""Taken until a replica has measured its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneView:
    """One lane of one ready replica, as the balancer sees it.

    `running`, `waiting` and `waiting_prefill_tokens` are from the snapshot. `unseen_*` is what this router
    submitted that the snapshot cannot know of yet. `in_flight` is this router's own count.
    """

    replica_id: str
    lane: int
    running: int
    waiting: int
    waiting_prefill_tokens: int
    unseen_requests: int
    unseen_prefill_tokens: int
    in_flight: int
    max_sequences: int
    max_waiting: int
    snapshot_age_s: float
    step_ms: float
    prefill_tokens_per_s: float

    @property
    def has_room(self) -> bool:
        """Whether the engine's queue still takes a request."""
        requests = self.running + self.waiting + self.unseen_requests
        return requests < self.max_sequences + self.max_waiting


def choose_lane(lanes: Sequence[LaneView], *, prompt_tokens: int, random: Random) -> LaneView | None:
    """The lane that takes a request of this length; None if none has room. Equals are drawn by lot."""
    open_lanes = [lane for lane in lanes if lane.has_room]
    if not open_lanes:
        return None
    fresh = [lane for lane in open_lanes if lane.snapshot_age_s <= FRESH_S]
    if fresh:
        return min(
            fresh, key=lambda lane: (predicted_ttft_s(lane, prompt_tokens=prompt_tokens), random.random())
        )
    pair = random.sample(open_lanes, k=min(2, len(open_lanes)))
    return min(pair, key=lambda lane: (lane.in_flight, random.random()))


def predicted_ttft_s(lane: LaneView, *, prompt_tokens: int) -> float:
    """Seconds until the first token: the prefill work ahead, and a wait for a row where all are taken."""
    prefill_tokens = lane.waiting_prefill_tokens + lane.unseen_prefill_tokens + prompt_tokens
    prefill_s = prefill_tokens / (lane.prefill_tokens_per_s or UNKNOWN_PREFILL_TOKENS_PER_S)
    requests = lane.running + lane.waiting + lane.unseen_requests
    step_s = lane.step_ms / 1e3
    # A busy engine's step grows with its batch, and a queued request waits for rows to end.
    batch_s = step_s * (1.0 + requests / lane.max_sequences)
    queued = max(0, requests + 1 - lane.max_sequences)
    return prefill_s + batch_s + queued * step_s + requests * 1e-6
