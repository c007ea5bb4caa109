"""What the scheduler plans, literally: order, chunks, blocks, rows, priorities, deadlines."""

from __future__ import annotations

import pytest

from replicas.config import EngineLimits
from replicas.engine.prefill_pace import PrefillPace
from replicas.engine.scheduled_step import ScheduledStep
from replicas.engine.scheduler import Scheduler
from replicas.plan import LAST_SAMPLED, EngineShape, NewRow, PlannedRow, StepOutcome, StepPlan
from replicas.rank.null_runner import NULL_COSTS
from replicas.request import FinishReason, GenerationRequest, SamplingParams, StepMember

GREEDY = SamplingParams()
CAPACITY = 4 + 8
"""Sequences that run, and those that wait."""


def make_scheduler(
    *,
    num_blocks: int = 50,
    step_tokens: int = 8,
    max_sequences: int = 4,
    num_lanes: int = 1,
) -> Scheduler:
    """Blocks of 4 tokens. Without prefix caching: the prompts here all begin the same."""
    limits = EngineLimits(
        max_sequences=max_sequences,
        max_waiting=8,
        step_tokens=step_tokens,
        block_tokens=4,
        prefix_caching=False,
    )
    shape = EngineShape(
        architecture="test",
        vocab_size=100,
        context_tokens=100,
        num_blocks=num_blocks,
        eos_token_ids=(2,),
        weights_digest="",
        dtype="float32",
        device="cpu",
        costs=NULL_COSTS,
    )
    return Scheduler(limits, shape, num_lanes=num_lanes)


def submit(
    scheduler: Scheduler,
    request_id: int,
    num_prompt: int,
    *,
    max_tokens: int = 20,
    priority: int = 0,
    deadline_ns: int | None = None,
    lane: int = 0,
) -> None:
    request = GenerationRequest(
        request_id=request_id,
        prompt_ids=tuple(range(10, 10 + num_prompt)),
        max_tokens=max_tokens,
        priority=priority,
        deadline_ns=deadline_ns,
        lane=lane,
    )
    scheduler.submit(request, now_ns=0)


def plan(scheduler: Scheduler, *, now_ns: int = 0) -> ScheduledStep:
    step = scheduler.schedule(now_ns=now_ns)
    assert step is not None
    return step


def commit(scheduler: Scheduler, step: ScheduledStep, *sampled_ids: int) -> tuple[StepMember, ...]:
    members = scheduler.commit(step, StepOutcome(sampled_ids=sampled_ids), now_ns=0)
    scheduler.check()
    return members


def run(scheduler: Scheduler, *, now_ns: int = 0) -> StepPlan:
    """One whole step in which every row that samples gets token 50."""
    step = plan(scheduler, now_ns=now_ns)
    commit(scheduler, step, *(50 for row in step.plan.rows if row.samples))
    return step.plan


def brief(plan_: StepPlan) -> list[tuple[int, int, int]]:
    """(row, start, count) of each planned row."""
    return [(row.row, row.start_pos, len(row.token_ids)) for row in plan_.rows]


def test_decodes_come_first_and_prefill_chunks_fill_the_budget() -> None:
    scheduler = make_scheduler()
    submit(scheduler, 1, 3)
    assert run(scheduler) == StepPlan(
        step=1,
        freed_rows=(),
        new_rows=(NewRow(row=0, sampling=GREEDY),),
        rows=(PlannedRow(row=0, start_pos=0, token_ids=(10, 11, 12), new_blocks=(1,), samples=True),),
    )
    submit(scheduler, 2, 10)
    assert run(scheduler) == StepPlan(
        step=2,
        freed_rows=(),
        new_rows=(NewRow(row=1, sampling=GREEDY),),
        rows=(
            PlannedRow(row=0, start_pos=3, token_ids=(50,), new_blocks=(), samples=True),
            PlannedRow(
                row=1, start_pos=0, token_ids=tuple(range(10, 17)), new_blocks=(2, 3, 4), samples=False
            ),
        ),
    )
    assert run(scheduler).rows == (
        PlannedRow(row=0, start_pos=4, token_ids=(50,), new_blocks=(5,), samples=True),
        PlannedRow(row=1, start_pos=7, token_ids=(17, 18, 19), new_blocks=(), samples=True),
    )


@pytest.mark.parametrize(("is_packing", "counts"), [(False, [2, 2, 1]), (True, [5])])
def test_prompts_share_a_step_as_far_as_the_pace_has_it(*, is_packing: bool, counts: list[int]) -> None:
    scheduler = make_scheduler(step_tokens=512, max_sequences=5, num_blocks=120)
    pace = PrefillPace(stretch=2.0, is_packing=is_packing)
    for request_id in range(5):
        submit(scheduler, request_id, 80, max_tokens=1)
    for count in counts:
        step = scheduler.schedule(now_ns=0, pace=pace)
        assert step is not None
        commit(scheduler, step, *range(60, 60 + count))
    assert scheduler.is_idle


def test_a_step_is_planned_before_the_last_ones_tokens_are_known() -> None:
    scheduler = make_scheduler()
    submit(scheduler, 1, 2)
    first, second = plan(scheduler), plan(scheduler)
    assert second.plan.rows == (
        PlannedRow(row=0, start_pos=2, token_ids=(LAST_SAMPLED,), new_blocks=(), samples=True),
    )
    commit(scheduler, first, 60)
    third = plan(scheduler)
    assert third.plan.rows[0].token_ids == (LAST_SAMPLED,)
    commit(scheduler, second, 61)
    commit(scheduler, third, 62)
    assert plan(scheduler).plan.rows[0].token_ids == (62,)
    assert [delta.token_ids for delta in scheduler.take_deltas()] == [(60,), (61,), (62,)]


def test_a_freed_row_is_told_with_the_next_plan_and_used_again_in_it() -> None:
    scheduler = make_scheduler(max_sequences=1)
    submit(scheduler, 1, 2, max_tokens=1)
    submit(scheduler, 2, 2, max_tokens=1)
    assert run(scheduler).freed_rows == ()
    second = run(scheduler)
    assert (second.freed_rows, second.new_rows) == ((0,), (NewRow(row=0, sampling=GREEDY),))
    submit(scheduler, 3, 2)
    assert run(scheduler).freed_rows == (0,)


def test_higher_priority_is_admitted_first_then_first_come() -> None:
    scheduler = make_scheduler(max_sequences=2, step_tokens=4)
    submit(scheduler, 1, 2)
    submit(scheduler, 2, 2)
    submit(scheduler, 3, 2, priority=1)
    step = plan(scheduler)
    assert [row.sequence.request.request_id for row in step.rows] == [3, 1]


def test_a_waiting_request_that_matters_more_takes_the_row_of_the_newest_that_matters_least() -> None:
    scheduler = make_scheduler(max_sequences=2)
    submit(scheduler, 1, 2)
    submit(scheduler, 2, 2)
    run(scheduler)
    submit(scheduler, 3, 2, priority=1)
    step = plan(scheduler)
    assert [row.sequence.request.request_id for row in step.rows] == [1, 3]
    assert (step.plan.freed_rows, brief(step.plan)) == ((1,), [(0, 2, 1), (1, 0, 2)])
    assert scheduler.load(step_ms=0, prefill_tokens_per_s=0, decode_tokens_per_s=0).waiting == (1,)


def test_equal_priority_never_preempts_to_be_admitted() -> None:
    scheduler = make_scheduler(max_sequences=1)
    submit(scheduler, 1, 2)
    run(scheduler)
    submit(scheduler, 2, 2)
    assert brief(run(scheduler)) == [(0, 2, 1)]


def test_out_of_blocks_the_newest_gives_way_and_is_computed_again() -> None:
    scheduler = make_scheduler(num_blocks=5, step_tokens=16)
    submit(scheduler, 1, 4)
    submit(scheduler, 2, 4)
    run(scheduler)  # Both have one block and need a second; the pool holds four.
    run(scheduler)
    for _ in range(3):
        run(scheduler)
    step = plan(scheduler)  # Position 8: both need a third, none is left.
    assert brief(step.plan) == [(0, 8, 1)] and step.plan.freed_rows == (1,)
    commit(scheduler, step, 50)
    for _ in range(6):
        assert brief(run(scheduler))[0][0] == 0
    # The first has filled the 16 positions of the pool, which are its context.
    assert [delta.finish for delta in scheduler.take_deltas() if delta.finish] == [FinishReason.LENGTH]
    step = plan(scheduler)
    assert brief(step.plan) == [(0, 0, 9)]
    (member,) = commit(scheduler, step, 50)
    assert (member.is_prefill, member.wasted_tokens) == (True, 8)


def test_admission_leaves_a_block_for_each_that_runs() -> None:
    scheduler = make_scheduler(num_blocks=6, step_tokens=32)
    submit(scheduler, 1, 8)
    submit(scheduler, 2, 12)
    assert brief(run(scheduler)) == [(0, 0, 8)]


def test_a_long_request_at_the_head_is_not_overtaken() -> None:
    scheduler = make_scheduler(num_blocks=6, step_tokens=32)
    submit(scheduler, 1, 8)
    submit(scheduler, 2, 12)
    submit(scheduler, 3, 1)
    assert brief(run(scheduler)) == [(0, 0, 8)]
    assert brief(run(scheduler)) == [(0, 8, 1)]


def test_a_request_past_its_deadline_ends_before_it_costs_another_step() -> None:
    scheduler = make_scheduler()
    submit(scheduler, 1, 2, deadline_ns=100)
    submit(scheduler, 2, 2, deadline_ns=200)
    submit(scheduler, 3, 2)
    assert len(plan(scheduler, now_ns=99).plan.rows) == 3
    assert len(plan(scheduler, now_ns=100).plan.rows) == 2
    assert len(plan(scheduler, now_ns=250).plan.rows) == 1
    deltas = scheduler.take_deltas()
    assert [(delta.request_id, delta.finish) for delta in deltas] == [
        (1, FinishReason.DEADLINE),
        (2, FinishReason.DEADLINE),
    ]


def test_lanes_have_their_own_budget_blocks_and_rows() -> None:
    scheduler = make_scheduler(num_lanes=2, max_sequences=3, step_tokens=4)
    submit(scheduler, 1, 6, lane=0)
    submit(scheduler, 2, 3, lane=1)
    submit(scheduler, 3, 6, lane=1)
    first = run(scheduler)
    assert brief(first) == [(0, 0, 4), (3, 0, 3), (4, 0, 1)]
    assert [row.new_blocks for row in first.rows] == [(1, 2), (1,), (2, 3)]
    assert brief(run(scheduler)) == [(0, 4, 2), (3, 3, 1), (4, 1, 3)]
    load = scheduler.load(step_ms=1, prefill_tokens_per_s=2, decode_tokens_per_s=3)
    assert (load.running, load.free_blocks, load.waiting_prefill_tokens) == ((1, 2), (47, 46), (0, 2))


class SevenTokens(PrefillPace):
    """Prompts of all lanes may take seven tokens of a step."""

    def tokens(self, *, num_decoding: int, num_prefilling: int, limit: int) -> int:
        return min(7, limit)


def test_lanes_with_prompts_share_what_a_step_may_take_of_them() -> None:
    scheduler = make_scheduler(num_lanes=3, step_tokens=32)
    pace = SevenTokens(stretch=2.0, is_packing=True)
    submit(scheduler, 1, 9, lane=0)
    alone = scheduler.schedule(now_ns=0, pace=pace)
    submit(scheduler, 2, 9, lane=2)
    shared = scheduler.schedule(now_ns=0, pace=pace)
    assert alone is not None and shared is not None
    assert (brief(alone.plan), brief(shared.plan)) == ([(0, 0, 7)], [(0, 7, 2), (8, 0, 4)])


def test_a_full_lane_refuses_while_another_accepts() -> None:
    scheduler = make_scheduler(num_lanes=2)
    for request_id in range(CAPACITY):
        submit(scheduler, request_id, 1, lane=1)
    submit(scheduler, CAPACITY, 1, lane=1)
    submit(scheduler, CAPACITY + 1, 1, lane=0)
    submit(scheduler, CAPACITY + 2, 1, lane=2)
    full, unknown = scheduler.take_deltas()
    assert full.error == ("RESOURCE_EXHAUSTED", "8 requests wait already; retry later")
    assert unknown.error == ("INVALID_ARGUMENT", "lane is 2; this engine has lanes 0 to 1")
    assert scheduler.load(step_ms=1, prefill_tokens_per_s=2, decode_tokens_per_s=3).waiting == (1, CAPACITY)


def test_a_sequence_preempted_while_its_token_is_under_way_waits_for_it() -> None:
    scheduler = make_scheduler(max_sequences=1)
    submit(scheduler, 1, 2)
    first = plan(scheduler)
    submit(scheduler, 2, 2, priority=1, max_tokens=1)
    second = plan(scheduler)
    assert [row.sequence.request.request_id for row in second.rows] == [2]
    assert scheduler.schedule(now_ns=0) is None
    commit(scheduler, first, 60)
    commit(scheduler, second, 61)
    third = plan(scheduler)
    assert [(row.sequence.request.request_id, row.planned.token_ids) for row in third.rows] == [
        (1, (10, 11, 60))
    ]


def test_a_burst_before_the_first_step_fills_rows_and_queue() -> None:
    scheduler = make_scheduler()
    for request_id in range(CAPACITY):
        submit(scheduler, request_id, 1)
    assert scheduler.take_deltas() == ()
    submit(scheduler, CAPACITY, 1)
    (refusal,) = scheduler.take_deltas()
    assert refusal.error is not None
    assert (refusal.request_id, refusal.error[0]) == (CAPACITY, "RESOURCE_EXHAUSTED")
