"""What the router gives back for a request: pieces of text, then one summary. Plain data, no protobuf."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.router.energy_account import RequestEnergy
from replicas.request import FinishReason, TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one request. `completion_tokens` were sent; `wasted_tokens` were paid for, but not sent."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    wasted_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Where the time went. The first three are the engine's, the last two the router's."""

    queue_ms: float
    prefill_ms: float
    decode_ms: float
    ttft_ms: float
    total_ms: float


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text and tokens; `finish` (STOP or LENGTH) is set on the last one alone.

    `logprobs` is parallel to `token_ids` where asked for, else empty.
    """

    text: str
    token_ids: tuple[int, ...]
    finish: FinishReason | None
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """The end of a successful answer. `energy` None: unknown; `is_settled`: no better figures will come.

    `resumed_at` has the token offsets where another replica went on.
    """

    request_id: str
    trace_id: str
    usage: Usage
    timing: Timing
    energy: RequestEnergy | None
    is_settled: bool
    resumed_at: tuple[int, ...] = ()
