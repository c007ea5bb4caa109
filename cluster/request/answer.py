"""What the router gives back for a request: pieces of text, then one summary. Plain data, no protobuf."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.energy.account import RequestEnergy
from replicas.request import FinishReason, TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one request. `completion_tokens` were sent; `wasted_tokens` were paid for, but not sent.

    Of several choices it is the sum: each of them has the prompt, and reads it from the cache if it can.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    wasted_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Where the time went: waiting here and in the engine, then the engine's, then by the router's clock."""

    queue_ms: float
    prefill_ms: float
    decode_ms: float
    ttft_ms: float
    total_ms: float


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text and tokens; `finish` (STOP or LENGTH) is set on the last one alone.

    `logprobs` is parallel to `token_ids` where asked for, else empty. `index`: of the choice.
    `prompt_logprobs` come with the first delta of the first choice where asked for: of every token of the
    prompt but the first.
    `resume_token`: on the first of an answer that another router could go on with, and again once a replica
    died under it; then it may be all there is.
    """

    text: str
    token_ids: tuple[int, ...]
    finish: FinishReason | None
    logprobs: tuple[TokenLogprobs, ...] = ()
    index: int = 0
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    resume_token: bytes = b""

    @property
    def is_empty(self) -> bool:
        """Nothing of the answer is in it."""
        return not (self.text or self.token_ids or self.finish)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """The end of a successful answer. `energy` None: unknown; `is_settled`: no better figures will come.

    `attempts`: replicas that worked on the choice that was moved most. `resumed_at` has the token offsets
    where another replica went on, choice by choice.
    """

    request_id: str
    trace_id: str
    usage: Usage
    timing: Timing
    energy: RequestEnergy | None
    is_settled: bool
    attempts: int = 1
    resumed_at: tuple[int, ...] = ()


def sum_usage(choices: Sequence[Usage]) -> Usage:
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in choices),
        cached_tokens=sum(usage.cached_tokens for usage in choices),
        completion_tokens=sum(usage.completion_tokens for usage in choices),
        wasted_tokens=sum(usage.wasted_tokens for usage in choices),
    )


def join_timing(choices: Sequence[Timing]) -> Timing:
    """Of choices side by side: the start of the first, the longest decode, the end of the last."""
    first = choices[0]
    return Timing(
        queue_ms=first.queue_ms,
        prefill_ms=first.prefill_ms,
        decode_ms=max(timing.decode_ms for timing in choices),
        ttft_ms=first.ttft_ms,
        total_ms=max(timing.total_ms for timing in choices),
    )
