"""A plan, and the sequences behind its rows."""

from __future__ import annotations

from dataclasses import dataclass

from replicas.engine.sequence import Sequence, SequenceState
from replicas.plan import PlannedRow, StepOutcome, StepPlan
from replicas.record import record
from replicas.request import StepMember


@record
class ScheduledRow:
    """One row of a plan and the sequence behind it; `repeated` tokens were computed before."""

    sequence: Sequence
    planned: PlannedRow
    is_prefill: bool
    repeated: int

    def member(self) -> StepMember:
        """Its part of the step, for the energy ledger: all of it is wasted on a sequence that has ended."""
        sequence, planned = self.sequence, self.planned
        num_tokens = len(planned.token_ids)
        wasted_tokens = num_tokens if sequence.state is SequenceState.FINISHED else self.repeated
        # By position: names cost a quarter of a microsecond more, in every row of every step.
        return StepMember(
            sequence.request.request_id, num_tokens, planned.start_pos, self.is_prefill, wasted_tokens
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledStep:
    """A plan, and whom its outcome belongs to: `rows` is parallel to `plan.rows`, `scored` to that of it."""

    plan: StepPlan
    rows: tuple[ScheduledRow, ...]
    scored: tuple[ScheduledRow, ...] = ()


def plan_row(sequence: Sequence, count: int, *, is_prefill: bool) -> ScheduledRow:
    """The next `count` tokens of a running sequence, and the blocks the runners have not heard of."""
    assert sequence.row is not None, "a running sequence has a row"
    start_pos, samples = sequence.num_computed, count == sequence.num_uncomputed
    token_ids, repeated = sequence.take(count)
    new_blocks = tuple(sequence.blocks[sequence.num_planned_blocks :])
    sequence.num_planned_blocks = len(sequence.blocks)
    planned = PlannedRow(
        row=sequence.row, start_pos=start_pos, token_ids=token_ids, new_blocks=new_blocks, samples=samples
    )
    return ScheduledRow(sequence=sequence, planned=planned, is_prefill=is_prefill, repeated=repeated)


def take_scores(step: ScheduledStep, outcome: StepOutcome) -> None:
    """Hand each scored row its part of the scores, also one that was preempted meanwhile: they hold."""
    at = 0
    for row, scored in zip(step.scored, step.plan.scored, strict=True):
        end = at + len(scored.targets(row.planned.token_ids))
        if row.sequence.state is not SequenceState.FINISHED:
            row.sequence.take_scores(row.planned, list(outcome.scores[at:end]))
        at = end
    assert at == len(outcome.scores), "a runner scores what it is asked to"
