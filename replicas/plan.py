"""The step plan: what rank 0 decided, and all ranks do.

Plain data here; `encode_plan` and `decode_plan` turn it into the int32 words that cross the ring. A plan
holds only differences: a follower keeps its own block tables and sampling parameters per row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from replicas.request import SamplingParams

LAST_SAMPLED = -1
"""Placeholder token: the one this row sampled in the step before, which the planner has not seen yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRow:
    """A sequence takes a row of the batch: `row` in [0, max_sequences)."""

    row: int
    sampling: SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRow:
    """One sequence's part of a step.

    Tokens `token_ids` go to positions `start_pos ...`; `new_blocks` are appended to the row's block table
    first. `samples`: the logits of the last token are sampled (false for all but the last prefill chunk).
    The sampled token belongs to position `start_pos + len(token_ids)`, which also keys the RNG.
    """

    row: int
    start_pos: int
    token_ids: tuple[int, ...]
    new_blocks: tuple[int, ...]
    samples: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One step. `freed_rows` are cleared before `new_rows` are set, and both before `rows` run.

    A row preempted and resumed appears in `freed_rows` and later again in `new_rows`.
    """

    step: int
    freed_rows: tuple[int, ...]
    new_rows: tuple[NewRow, ...]
    rows: tuple[PlannedRow, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(row.token_ids) for row in self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    """What a rank computed: one id per planned row with `samples`, in order; -1: its logits were not finite."""

    sampled_ids: tuple[int, ...]
    experts_hit: int = 0


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
