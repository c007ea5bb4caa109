"""The nouns that travel through a replica: what is asked, what one step gave.

Plain data, shared by engine, scheduler, supervisor and energy ledger. No torch, no protobuf.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from struct import pack
from typing import NamedTuple

from replicas.record import record
from replicas.step_trail import StepTrail

ROW_BYTES = 8
"""Of an integer in a column of `StepRows`."""


class FinishReason(Enum):
    """Why a sequence ended. Every accepted sequence gets exactly one."""

    STOP = auto()
    LENGTH = auto()
    CANCELLED = auto()
    DEADLINE = auto()
    ERROR = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is drawn. `temperature` 0 is greedy; `top_k` 0 is all tokens.

    `min_p` leaves out what is less likely than this share of the likeliest. `rank/logit_edits.py` has the
    arithmetic of penalties and of `logit_bias`, pairs of a token id and what is added to its logit.
    `num_logprobs` None: no logprobs; 0: those of the sampled tokens; k: and of the k likeliest beside each.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    num_logprobs: int | None = None

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """Whether a token's logit depends on the tokens before it."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def has_filter(self) -> bool:
        """Whether only the likeliest tokens may be drawn."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    @property
    def is_temperature_only(self) -> bool:
        """Nothing but temperature and seed is asked for; greedy, whatever filters say, is such a case."""
        return (self.is_greedy or not self.has_filter) and self.is_plain

    @property
    def is_plain(self) -> bool:
        """Nothing but temperature, top-p, top-k and seed is asked for."""
        return (
            self.min_p == 0.0 and self.num_logprobs is None and not self.logit_bias and not self.has_penalties
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """Tokens in, and the limits of what comes out.

    `first_offset` is the number of tokens at the end of `prompt_ids` that were already delivered to the
    client (0 except after a failover). `deadline_ns` is on the monotonic clock of this host; None: none.
    """

    request_id: int
    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_token_ids: frozenset[int] = frozenset()
    priority: int = 0
    deadline_ns: int | None = None
    lane: int = 0
    attempt: int = 0
    first_offset: int = 0
    cache_salt: bytes = b""
    """Only requests of one salt share cached KV. Chosen by the router, never by a client."""
    tenant: str = ""
    """Who pays, as the energy ledger's sums name it."""
    scores_prompt: bool = False
    """Also say the logprobs of the prompt. None of it is taken from the cache, which has no logits."""
    traceparent: str = ""
    """W3C context of the span that waits for it, for the logs of supervisor and rank 0; empty: none."""

    @property
    def trace_id(self) -> str:
        """Its part of `traceparent`."""
        return self.traceparent[3:35]


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceTiming:
    """Where the time of one sequence went, and what it cost beyond its tokens.

    `cached_tokens` of its prompt were found in the prefix cache when it was first admitted. `trail` None: it
    was in no step, or comes from an engine that does not say.
    """

    queue_us: int
    prefill_us: int
    decode_us: int
    cached_tokens: int
    wasted_tokens: int
    preemptions: int
    trail: StepTrail | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """What the model gave a token, sampled or of a prompt: natural logarithms.

    Before penalties, biases and temperature. `top` are (id, logprob) of the likeliest tokens, best first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@record
class SequenceDelta:
    """New tokens of one sequence. `finish`, `timing` and `error` are set on its last delta alone.

    `first_offset` is the offset of `token_ids[0]` among all tokens delivered for the request.
    `error` is (gRPC status name, text) and goes with `FinishReason.ERROR`. `logprobs` is parallel to
    `token_ids` where the request asks for them, else empty. `prompt_logprobs` come with the first token of a
    request that scores its prompt: of every token but the first.
    """

    request_id: int
    attempt: int
    first_offset: int
    token_ids: tuple[int, ...]
    finish: FinishReason | None = None
    timing: SequenceTiming | None = None
    error: tuple[str, str] | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSnapshot:
    """The state of an engine after a step; tuples hold one entry per lane, rates are averages.

    Cached blocks that nobody holds count as free: they are given out like any other.
    """

    step: int
    running: tuple[int, ...]
    waiting: tuple[int, ...]
    waiting_prefill_tokens: tuple[int, ...]
    free_blocks: tuple[int, ...]
    total_blocks: tuple[int, ...]
    step_ms: float = 0.0
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    prompt_tokens_total: int = 0
    generated_tokens_total: int = 0
    cached_tokens_total: int = 0
    """Of the prompt tokens: found in the prefix cache."""


@record
class CacheChange:
    """Hashes of full KV blocks that can be found in a lane's prefix cache from now on, and no more.

    `is_snapshot`: `added` is all there is.
    """

    lane: int
    added: tuple[bytes, ...] = ()
    removed: tuple[bytes, ...] = ()
    is_snapshot: bool = False


class StepMember(NamedTuple):
    """One sequence's part in one forward pass.

    `context_tokens` counts the KV tokens read, without the `new_tokens`. `wasted_tokens` is the part of
    `new_tokens` that was computed before (preemption).
    """

    request_id: int
    new_tokens: int
    context_tokens: int
    is_prefill: bool
    wasted_tokens: int = 0

    @property
    def is_plain(self) -> bool:
        """One new token of a sequence that goes on: its context is all there is to say."""
        return self.new_tokens == 1 and not self.is_prefill and not self.wasted_tokens


@record
class StepRows:
    """Who was in a forward pass, in columns: a supervisor passes on thousands a second and makes no objects.

    Columns are 64-bit integers of this host, side by side. `others` are the members, by index, that are not
    plain; nothing in them contradicts the columns.
    """

    request_ids: bytes = b""
    context_tokens: bytes = b""
    others: tuple[tuple[int, StepMember], ...] = ()

    @classmethod
    def of(cls, members: Sequence[StepMember]) -> StepRows:
        column = f"{len(members)}q"
        return cls(
            request_ids=pack(column, *[member.request_id for member in members]),
            context_tokens=pack(column, *[member.context_tokens for member in members]),
            others=tuple([(index, one) for index, one in enumerate(members) if not one.is_plain]),
        )

    def __len__(self) -> int:
        return len(self.request_ids) // ROW_BYTES

    @property
    def ids(self) -> memoryview[int]:
        return memoryview(self.request_ids).cast("q")

    @property
    def contexts(self) -> memoryview[int]:
        return memoryview(self.context_tokens).cast("q")

    @property
    def num_new_tokens(self) -> int:
        return len(self) + sum([member.new_tokens - 1 for _, member in self.others])

    @property
    def num_prompt_tokens(self) -> int:
        return sum([member.new_tokens for _, member in self.others if member.is_prefill])

    @property
    def num_decoding(self) -> int:
        return len(self) - sum([member.is_prefill for _, member in self.others])

    def members(self) -> tuple[StepMember, ...]:
        """An object of each, for readers that are in no hurry."""
        others = dict(self.others)
        return tuple(
            others.get(index) or StepMember(request_id, 1, context_tokens, is_prefill=False)
            for index, (request_id, context_tokens) in enumerate(zip(self.ids, self.contexts, strict=True))
        )


@record
class StepRecord:
    """One forward pass, as the energy ledger needs it. Times are monotonic nanoseconds of this host.

    `experts_hit` sums over layers the distinct experts touched; 0 for dense models.
    """

    step: int
    start_ns: int
    end_ns: int
    rows: StepRows
    experts_hit: int = 0

    @property
    def members(self) -> tuple[StepMember, ...]:
        return self.rows.members()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCosts:
    """What a token costs this model over the whole group, in FLOP and byte terms (`energy/weights.py`).

    `active_params` counts the weights a token multiplies; `shared_weight_bytes` every step reads once;
    `expert_bytes` is one expert of one layer (0 for dense); `attention_dim` = heads x head_dim.
    """

    active_params: int
    shared_weight_bytes: int
    expert_bytes: int
    num_layers: int
    attention_dim: int
    kv_bytes_per_token: int


TORCH_KERNELS = "torch"
"""Said of an engine that runs on torch's own kernels; else see `CpuLayers.name`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReady:
    """What an engine says of itself once every rank generated its golden token."""

    architecture: str
    lanes: int
    context_tokens: int
    max_sequences: int
    vocab_size: int
    block_tokens: int
    weights_digest: str
    dtype: str
    device: str
    eos_token_ids: tuple[int, ...]
    costs: EngineCosts
    load: LoadSnapshot
    kernels: str = TORCH_KERNELS
    quantization: str = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """All one `Engine.step()` gave: deltas of live and ended sequences, the load, and the record.

    `record` is None when nothing ran (only cancels or refusals were committed).
    """

    step: int
    deltas: tuple[SequenceDelta, ...]
    load: LoadSnapshot
    record: StepRecord | None
    cache: tuple[CacheChange, ...] = ()
