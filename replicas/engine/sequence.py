"""One request on its way through the engine: its tokens, its place, and what it has cost.

States: WAITING -> RUNNING -> FINISHED, with RUNNING -> WAITING on preemption and WAITING -> FINISHED on
cancel, stop or deadline. The scheduler moves a sequence between states; this file owns the arithmetic of
positions and the rules of when a sequence ends. Pure.

Positions, for a prompt of 5 and two tokens generated while a third is being computed:

    tokens        p0 p1 p2 p3 p4 g0 g1          len(tokens) = 7, known
    num_pending                        1        g2 is sampled by a step under way
    length                                      8
    num_computed                       7        the KV of positions 0..6 is written, or will be by that step
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from replicas.engine.trail import NEVER, NS_PER_US, StepEnd, Trail
from replicas.plan import LAST_SAMPLED, NO_NEXT, NewRow, PlannedRow, ScoredRow
from replicas.request import (
    FinishReason,
    GenerationRequest,
    SequenceDelta,
    SequenceTiming,
    TokenLogprobs,
)
from replicas.sampling_words import as_float32


class SequenceState(Enum):
    """Where a sequence is. It leaves FINISHED never."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """Mutable; owned by the scheduler. `order` sorts: highest priority first, then first come."""

    request: GenerationRequest
    order: tuple[int, int]
    submitted_ns: int
    context_tokens: int
    """The most tokens, prompt and output, that this sequence may have."""
    tokens: list[int] = field(init=False)
    num_prompt: int = field(init=False)
    max_length: int = field(init=False)
    """The length at which it ends, whatever it says."""
    state: SequenceState = SequenceState.WAITING
    row: int | None = None
    blocks: list[int] = field(default_factory=list)
    num_planned_blocks: int = 0
    """The first blocks of `blocks` that a plan has already told the runners."""
    block_hashes: list[bytes] = field(default_factory=list)
    """Hashes of the first full blocks of `tokens`, as far as somebody asked for them."""
    waits_for: Sequence | None = None
    """Whose blocks it waits, or once waited, to share (`prefix_leaders.py`), and how many of them."""
    num_awaited_blocks: int = 0
    is_proved: bool = False
    """A finite token was sampled behind the KV it has now."""
    num_reused_blocks: int = 0
    """The first blocks of `blocks` that others computed."""
    num_filed_blocks: int = 0
    """The first blocks of `blocks` that are in the prefix cache, or equal to one that is."""
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache when it was first admitted."""
    num_computed: int = 0
    num_pending: int = 0
    num_ever_computed: int = 0
    """The highest `num_computed` so far: below it, computing is repeating."""
    num_useful_in_flight: int = 0
    """New, not repeated, tokens in steps under way."""
    wasted_tokens: int = 0
    preemptions: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of its prompt from the second token on, as far as it is scored; given away with the first token."""
    scheduled_ns: int | None = None
    trail: Trail = field(default_factory=Trail)

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_ids)
        self.num_prompt = len(self.tokens)
        self.max_length = min(self.num_prompt + self.request.max_tokens, self.context_tokens)

    @property
    def length(self) -> int:
        return len(self.tokens) + self.num_pending

    @property
    def num_uncomputed(self) -> int:
        return len(self.tokens) + self.num_pending - self.num_computed

    @property
    def num_generated(self) -> int:
        """Tokens known and delivered by this attempt."""
        return len(self.tokens) - self.num_prompt

    @property
    def is_scoring(self) -> bool:
        """What is computed of it has to be scored, too."""
        return self.request.scores_prompt and len(self.tokens) == self.num_prompt

    @property
    def is_decoding(self) -> bool:
        """Only its newest generated token is not computed yet."""
        length = len(self.tokens) + self.num_pending
        return length - self.num_computed == 1 and length > self.num_prompt

    @property
    def awaits_last(self) -> bool:
        """A step under way samples what is certainly its last token: there is nothing more to plan."""
        return self.num_pending > 0 and self.length >= self.max_length

    def take(self, count: int) -> tuple[tuple[int, ...], int]:
        """Plan the next `count` positions: their token ids, and how many of them were computed before."""
        start, end = self.num_computed, self.num_computed + count
        known = self.tokens[start:end]
        if len(known) < count:
            known.append(LAST_SAMPLED)
            assert len(known) == count, "at most one planned token is not known yet"
        repeated = 0
        if start < self.num_ever_computed:
            repeated = min(self.num_ever_computed - start, count)
            self.wasted_tokens += repeated
        self.num_computed = end
        if end > self.num_ever_computed:
            self.num_ever_computed = end
        self.num_useful_in_flight += count - repeated
        if end == self.length:
            self.num_pending += 1
        return tuple(known), repeated

    def new_row(self) -> NewRow:
        """What ranks are told once. They count tokens for penalties alone, the answer so far included."""
        request, row = self.request, self.row
        assert row is not None, "a running sequence has a row"
        sampling = as_float32(request.sampling)
        if not sampling.has_penalties:
            return NewRow(row=row, sampling=sampling)
        num_prompt = len(request.prompt_ids) - request.first_offset
        return NewRow(row=row, sampling=sampling, history=tuple(self.tokens), num_prompt=num_prompt)

    def reuse(self, *, num_blocks: int, num_tokens: int) -> None:
        """It starts running with KV that is there already: nobody computes its first tokens."""
        self.num_computed = num_tokens
        self.num_filed_blocks = self.num_reused_blocks = num_blocks
        self.is_proved = False
        if self.scheduled_ns is None:
            self.cached_tokens = num_tokens

    def append(self, token_id: int, end: StepEnd) -> FinishReason | None:
        """The oldest pending token is known, with its step. Says whether it ends the sequence."""
        self.num_pending -= 1
        self.tokens.append(token_id)
        self.trail.take_token(end)
        if token_id in self.request.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.tokens) >= self.max_length else None

    def scored_row(self, planned: PlannedRow) -> ScoredRow:
        """What of a planned chunk of its prompt is to be scored."""
        end = planned.start_pos + len(planned.token_ids)
        assert planned.row == self.row and end <= self.num_prompt, "only a prompt is scored"
        return ScoredRow(row=planned.row, next_id=NO_NEXT if end == self.num_prompt else self.tokens[end])

    def take_scores(self, planned: PlannedRow, scores: list[TokenLogprobs]) -> None:
        """The scores of a chunk; after a preemption, some of them for the second time."""
        num_known = len(self.prompt_logprobs) - planned.start_pos
        assert num_known >= 0, "chunks are scored in order"
        self.prompt_logprobs += scores[num_known:]

    def preempt(self) -> None:
        """Forget all KV. Tokens stay, and so does a pending one: its step is under way and will give it."""
        self.num_computed = 0
        self.num_planned_blocks = 0
        self.num_filed_blocks = 0
        self.preemptions += 1

    def finish(self) -> None:
        """What is still under way buys nothing from here on, and nobody is waited for: a leader that waited
        itself would keep all leaders before it."""
        self.state = SequenceState.FINISHED
        self.waits_for = None
        self.wasted_tokens += self.num_useful_in_flight
        self.num_useful_in_flight = 0

    def token_delta(self, token_id: int, logprobs: tuple[TokenLogprobs, ...] = ()) -> SequenceDelta:
        """The delta of the token appended last."""
        request = self.request
        return SequenceDelta(
            request_id=request.request_id,
            attempt=request.attempt,
            first_offset=request.first_offset + self.num_generated - 1,
            token_ids=(token_id,),
            logprobs=logprobs,
            prompt_logprobs=self._give_prompt_logprobs() if self.prompt_logprobs else (),
        )

    def last_delta(
        self,
        token_ids: tuple[int, ...],
        finish: FinishReason,
        *,
        now_ns: int,
        error: tuple[str, str] | None = None,
        logprobs: tuple[TokenLogprobs, ...] = (),
    ) -> SequenceDelta:
        """The one delta that ends the sequence. `token_ids` are appended already; a stop token is one."""
        request = self.request
        return SequenceDelta(
            request_id=request.request_id,
            attempt=request.attempt,
            first_offset=request.first_offset + self.num_generated - len(token_ids),
            token_ids=token_ids,
            finish=finish,
            timing=self._timing(now_ns),
            error=error,
            logprobs=logprobs,
            prompt_logprobs=self._give_prompt_logprobs() if token_ids else (),
        )

    def _give_prompt_logprobs(self) -> tuple[TokenLogprobs, ...]:
        given, self.prompt_logprobs = tuple(self.prompt_logprobs), []
        return given

    def _timing(self, now_ns: int) -> SequenceTiming:
        """Queue until first planned, prefill until the first token, decode until now."""
        scheduled_ns = now_ns if self.scheduled_ns is None else self.scheduled_ns
        first_token = self.trail.first_token
        first_token_ns = now_ns if first_token is NEVER else first_token.at_ns
        return SequenceTiming(
            queue_us=(scheduled_ns - self.submitted_ns) // NS_PER_US,
            prefill_us=(first_token_ns - scheduled_ns) // NS_PER_US,
            decode_us=(now_ns - first_token_ns) // NS_PER_US,
            cached_tokens=self.cached_tokens,
            wasted_tokens=self.wasted_tokens,
            preemptions=self.preemptions,
            trail=self.trail.told(num_tokens=self.num_generated),
        )
