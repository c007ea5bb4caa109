"""What the balancer knows of one lane of one ready replica. Plain data: a recorded decision holds these."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneView:
    """`running`, `waiting`, `waiting_prefill_tokens` and `free_kv_tokens` are from the snapshot.

    `unseen_*` is what this router submitted that the snapshot cannot know of yet; `in_flight` is its own
    count of the whole replica. Rates, watts and step times of 0 are unknown. `attached_age_s` is how long the
    replica has been here: the balancer fills the oldest first, and the cluster removes the newest first.
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
    free_kv_tokens: int
    snapshot_age_s: float
    step_ms: float
    prefill_tokens_per_s: float
    step_ms_per_sequence: float = 0.0
    idle_power_w: float = 0.0
    active_power_w: float = 0.0
    attached_age_s: float = 0.0

    @property
    def num_requests(self) -> int:
        """All that is in the engine or on its way there."""
        return self.running + self.waiting + self.unseen_requests

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens to compute before a new prompt's turn."""
        return self.waiting_prefill_tokens + self.unseen_prefill_tokens

    @property
    def has_price(self) -> bool:
        """Whether joules are predicted from what it has measured, and not from a guess."""
        return bool(self.active_power_w and self.idle_power_w and self.prefill_tokens_per_s and self.step_ms)

    @property
    def has_room(self) -> bool:
        """Whether the engine's queue still takes a request."""
        return self.num_requests < self.max_sequences + self.max_waiting
