"""The step plan: what rank 0 decided, and all ranks do.

Plain data here; `encode_plan` and `decode_plan` turn it into the int32 words that cross the ring. A plan
holds only differences: a follower keeps its own block tables and sampling parameters per row.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from replicas.expert_loads import ExpertLoads
from replicas.record import record
from replicas.request import TORCH_KERNELS, EngineCosts, SamplingParams, TokenLogprobs
from replicas.sampling_words import sampling_from_words, sampling_to_words

WORD = "i"
"""Array code of a plan word: int32, in the byte order of the hosts of a group."""
STEP_WORDS = struct.Struct("=2i")
STEP_FIELDS = struct.Struct("=Q")

LAST_SAMPLED = -1
"""Placeholder token: the one this row sampled in the step before, which the planner has not seen yet."""
NO_NEXT = -1
"""Of a scored row: the chunk is its prompt's last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRow:
    """A sequence takes a row of the batch. Row r belongs to lane r // max_sequences.

    For a row with penalties alone: `history` is all its tokens, cached ones too, of which the first
    `num_prompt` are the client's prompt.
    """

    row: int
    sampling: SamplingParams
    history: tuple[int, ...] = ()
    num_prompt: int = 0


@record
class PlannedRow:
    """One sequence's part of a step.

    Tokens `token_ids` go to positions `start_pos ...`; `new_blocks` are appended to the row's block table
    first. `samples`: the logits of the last token are sampled (false for all but the last prefill chunk).
    The sampled token belongs to position `start_pos + len(token_ids)`, which also keys the RNG. A row may
    read blocks that a row before it in the same plan writes: each layer writes all before it reads any.
    """

    row: int
    start_pos: int
    token_ids: tuple[int, ...]
    new_blocks: tuple[int, ...]
    samples: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRow:
    """A planned row whose tokens have to be scored: how likely each was behind those before it.

    All but the first of its tokens here, then `next_id`, which comes first in the row's next chunk; NO_NEXT:
    there is no such chunk.
    """

    row: int
    next_id: int

    def targets(self, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        """What follows each of the row's tokens, as far as the prompt goes."""
        return token_ids[1:] if self.next_id == NO_NEXT else (*token_ids[1:], self.next_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One step. `freed_rows` are cleared before `new_rows` are set, and both before `rows` run.

    `rows` come lane by lane, within a lane decodes first; blocks are numbered within their lane. A row
    preempted and resumed appears in `freed_rows` and later again in `new_rows`.
    """

    step: int
    freed_rows: tuple[int, ...]
    new_rows: tuple[NewRow, ...]
    rows: tuple[PlannedRow, ...]
    scored: tuple[ScoredRow, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(row.token_ids) for row in self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineShape:
    """What a built runner says of itself. `num_blocks` counts block 0, which is scratch and never planned."""

    architecture: str
    vocab_size: int
    context_tokens: int
    num_blocks: int
    eos_token_ids: tuple[int, ...]
    weights_digest: str
    dtype: str
    device: str
    costs: EngineCosts
    kernels: str = TORCH_KERNELS
    scores_prompts: bool = False
    """Whether its runner does what `StepPlan.scored` asks for."""
    quantization: str = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    """What a rank computed: one id per planned row with `samples`, in order; -1: logits were not finite.

    `logprobs` is parallel to the ids, or empty if no row asked; None for a row that did not. `scores` are
    of the targets of all scored rows, one after another.
    """

    sampled_ids: tuple[int, ...]
    experts_hit: int = 0
    logprobs: tuple[TokenLogprobs | None, ...] = ()
    scores: tuple[TokenLogprobs, ...] = ()


class PendingStep(Protocol):
    """A step under way on a device."""

    def result(self) -> StepOutcome:
        """Block until the step is done."""


class Runner(Protocol):
    """One rank's shard of the model. All ranks of a group run the same plans in the same order."""

    def launch(self, plan: StepPlan) -> PendingStep:
        """Start a step. On CPU it runs here and now; on CUDA it is only enqueued."""

    def close(self) -> None:
        """Release memory and collectives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltRunner:
    """A runner that is loaded and ready to launch, and what it is. `expert_loads` None: it has no experts."""

    runner: Runner
    shape: EngineShape
    expert_loads: Callable[[], ExpertLoads] | None = None


Progress = Callable[[str, int, int], None]
"""Told while a runner is built: stage, done, total."""


def encode_plan(plan: StepPlan) -> bytes:
    """A plan as int32 words.

    Layout: step (2 words), counts of freed rows, new rows and rows; the freed rows; per new row: row, tokens
    of the prompt, count of the history, history, words of sampling; per row: row, start position, samples,
    counts of tokens and blocks, tokens, blocks; to the end, per scored row: row, next token.
    """
    words = [
        *STEP_WORDS.unpack(STEP_FIELDS.pack(plan.step)),
        len(plan.freed_rows),
        len(plan.new_rows),
        len(plan.rows),
        *plan.freed_rows,
    ]
    for new in plan.new_rows:
        words += (new.row, new.num_prompt, len(new.history))
        words += new.history
        words += sampling_to_words(new.sampling)
    for row in plan.rows:
        num_tokens, num_blocks = len(row.token_ids), len(row.new_blocks)
        words += (row.row, row.start_pos, row.samples, num_tokens, num_blocks)
        words += row.token_ids
        words += row.new_blocks
    for scored in plan.scored:
        words += (scored.row, scored.next_id)
    return array(WORD, words).tobytes()


def decode_plan(payload: bytes) -> StepPlan:
    """What `encode_plan` was given, up to the float32 of its sampling."""
    packed = array(WORD)
    packed.frombytes(payload)
    words = packed.tolist()
    (step,) = STEP_FIELDS.unpack(STEP_WORDS.pack(*words[:2]))
    num_freed, num_new, num_rows = words[2:5]
    at = 5 + num_freed
    freed_rows = tuple(words[5:at])
    new_rows = []
    for _ in range(num_new):
        row, num_prompt, num_history = words[at : at + 3]
        history = tuple(words[at + 3 : at + 3 + num_history])
        sampling, at = sampling_from_words(words, at + 3 + num_history)
        new_rows.append(NewRow(row=row, sampling=sampling, history=history, num_prompt=num_prompt))
    rows = []
    for _ in range(num_rows):
        row, start_pos, samples, num_tokens, num_blocks = words[at : at + 5]
        tokens_end = at + 5 + num_tokens
        rows.append(
            PlannedRow(
                row=row,
                start_pos=start_pos,
                token_ids=tuple(words[at + 5 : tokens_end]),
                new_blocks=tuple(words[tokens_end : tokens_end + num_blocks]),
                samples=bool(samples),
            )
        )
        at = tokens_end + num_blocks
    scored = [
        ScoredRow(row=row, next_id=next_id)
        for row, next_id in zip(words[at::2], words[at + 1 :: 2], strict=True)
    ]
    return StepPlan(
        step=step,
        freed_rows=freed_rows,
        new_rows=tuple(new_rows),
        rows=tuple(rows),
        scored=tuple(scored),
    )
