"""A plan, and the sequences behind its rows."""

from __future__ import annotations

from dataclasses import dataclass

from replicas.engine.sequence import Sequence
from replicas.plan import PlannedRow, StepPlan
from replicas.record import record


@record
class ScheduledRow:
    """One row of a plan and the sequence behind it; `repeated` tokens were computed before."""

    sequence: Sequence
    planned: PlannedRow
    is_prefill: bool
    repeated: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledStep:
    """A plan, and whom its outcome belongs to. `rows` is parallel to `plan.rows`."""

    plan: StepPlan
    rows: tuple[ScheduledRow, ...]


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
