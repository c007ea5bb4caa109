"""What a request would find at a lane, and what it would cost there: time to the first token, time per token,
joules. Pure arithmetic over a `LaneView`.

Formulas, with R requests there, W tokens of prefill ahead, L prompt tokens of which `hit` are cached, an
expected answer of n tokens, steps of t seconds, and p prefill tokens a second:

    first token  (W + L - hit) / p + t, and where all rows are taken, n * t / rows for each request ahead
    each token   t, and what one more sequence adds to it
    joules       (active - idle watts) * (L - hit) / p             computing the prompt
                 + active watts * n * (what a sequence adds to t)  a longer step for everybody
                 + (active - idle watts) * t * n / (R + 1)         keeping the replica awake

The last term is the whole price of waking an idle replica, and next to nothing at a busy one: of R answers
with a random part left, the last ends after R/(R+1) of an answer; only the rest is on this request's account.
"""

from __future__ import annotations

from cluster.balancing.lane_view import LaneView

UNKNOWN_PREFILL_TOKENS_PER_S = 10_000.0
"""Taken until a replica has measured its own."""
UNKNOWN_IDLE_W = 100.0
UNKNOWN_ACTIVE_W = 400.0
"""Taken for replicas without a meter: equal work costs the same everywhere, and idle ones stay idle."""
GROWTH_TOKENS = 16
"""KV that each running sequence takes soon: engines keep a block free for each, too."""


def prefill_rate(lane: LaneView) -> float:
    """Prompt tokens a second."""
    return lane.prefill_tokens_per_s or UNKNOWN_PREFILL_TOKENS_PER_S


def predicted_ttft_s(lane: LaneView, *, uncached_tokens: int, output_tokens: int) -> float:
    """Seconds from the submission to the first token."""
    prefill_s = (lane.num_prefill_tokens + uncached_tokens) / prefill_rate(lane)
    step_s = lane.step_ms / 1e3
    num_ahead = max(0, lane.num_requests + 1 - lane.max_sequences)
    row_s = num_ahead * output_tokens * step_s / lane.max_sequences
    return prefill_s + step_s + row_s


def predicted_tpot_s(lane: LaneView) -> float:
    """Seconds per token with this request and the unseen ones in the batch."""
    return (lane.step_ms + lane.step_ms_per_sequence * (lane.unseen_requests + 1)) / 1e3


def added_joules(lane: LaneView, *, uncached_tokens: int, output_tokens: int) -> float:
    """What the replica draws because of this request, beyond what it would draw anyway."""
    active_w = lane.active_power_w or UNKNOWN_ACTIVE_W
    dynamic_w = max(0.0, active_w - (lane.idle_power_w or min(UNKNOWN_IDLE_W, active_w)))
    prefill_j = dynamic_w * uncached_tokens / prefill_rate(lane)
    stretch_j = active_w * output_tokens * lane.step_ms_per_sequence / 1e3
    awake_j = dynamic_w * lane.step_ms / 1e3 * output_tokens / (lane.num_requests + 1)
    return prefill_j + stretch_j + awake_j


def has_kv_for(lane: LaneView, *, uncached_tokens: int, output_tokens: int) -> bool:
    """Whether its KV is likely to last to the end of the answer: what waits there has taken none yet."""
    promised = lane.num_prefill_tokens + lane.running * GROWTH_TOKENS
    return uncached_tokens + output_tokens + promised <= lane.free_kv_tokens
