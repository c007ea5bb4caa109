"""The null runner: its tokens hang on the sequence alone, its time on the plan."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from replicas.config import EngineLimits, NullEngineConfig
from replicas.plan import LAST_SAMPLED, NewRow, PlannedRow, StepPlan
from replicas.rank.null_runner import EOS_TOKEN_ID, NullRunner, null_continuation
from replicas.request import SamplingParams

LIMITS = EngineLimits(block_tokens=4, num_blocks=20)
CONFIG = NullEngineConfig(step_ms=0.0, prefill_tokens_per_s=0.0, vocab_size=500)
PROMPT = (5, 6, 7, 8, 9)


@dataclass(slots=True)
class StoppedClock:
    now_ns: int = 0

    def __call__(self) -> int:
        return self.now_ns


def make_plan(
    step: int,
    start_pos: int,
    token_ids: tuple[int, ...],
    new_blocks: tuple[int, ...] = (),
    *,
    is_new: bool = False,
) -> StepPlan:
    return StepPlan(
        step=step,
        freed_rows=(),
        new_rows=(NewRow(row=0, sampling=SamplingParams()),) if is_new else (),
        rows=(
            PlannedRow(row=0, start_pos=start_pos, token_ids=token_ids, new_blocks=new_blocks, samples=True),
        ),
    )


def test_writes_and_reads_its_cache_through_the_block_table() -> None:
    runner = NullRunner(CONFIG, LIMITS)
    expected = null_continuation(PROMPT, 2, CONFIG)
    assert runner.launch(make_plan(1, 0, PROMPT, (9, 3), is_new=True)).result().sampled_ids == expected[:1]
    assert runner.launch(make_plan(2, 5, (LAST_SAMPLED,))).result().sampled_ids == expected[1:]


def test_a_block_given_to_two_rows_changes_the_tokens() -> None:
    runner = NullRunner(CONFIG, LIMITS)
    runner.launch(make_plan(1, 0, PROMPT, (9, 3), is_new=True))
    other = StepPlan(
        step=2,
        freed_rows=(),
        new_rows=(NewRow(row=1, sampling=SamplingParams()),),
        rows=(PlannedRow(row=1, start_pos=0, token_ids=(70, 71), new_blocks=(9,), samples=False),),
    )
    runner.launch(other)
    assert (
        runner.launch(make_plan(3, 5, (LAST_SAMPLED,))).result().sampled_ids
        != null_continuation(PROMPT, 2, CONFIG)[1:]
    )


def test_a_continuation_does_not_depend_on_where_it_was_cut() -> None:
    for prompt_ids in ((5,), (5, 6, 7), tuple(range(5, 40))):
        whole = null_continuation(prompt_ids, 30, CONFIG)
        for cut in (1, 6, 29):
            assert null_continuation((*prompt_ids, *whole[:cut]), 30 - cut, CONFIG) == whole[cut:]


def test_draws_the_end_of_sequence_about_as_often_as_told() -> None:
    config = NullEngineConfig(vocab_size=500, eos_every=10)
    tokens = null_continuation(PROMPT, 5000, config)
    assert 400 < tokens.count(EOS_TOKEN_ID) < 600
    assert EOS_TOKEN_ID not in null_continuation(PROMPT, 5000, CONFIG)
    assert all(EOS_TOKEN_ID <= token < 500 for token in tokens)


def test_steps_take_their_time_one_after_another() -> None:
    clock = StoppedClock()
    runner = NullRunner(NullEngineConfig(step_ms=2.0, prefill_tokens_per_s=1000.0), LIMITS, clock=clock)
    first = runner.launch(make_plan(1, 0, PROMPT, (9, 3), is_new=True))
    second = runner.launch(make_plan(2, 5, (LAST_SAMPLED,)))
    assert (first.done_ns, second.done_ns) == (7_000_000, 9_000_000)
    clock.now_ns = 50_000_000
    assert runner.launch(make_plan(3, 6, (LAST_SAMPLED,))).done_ns == 52_000_000


def test_fails_and_hangs_on_order() -> None:
    failing = NullRunner(NullEngineConfig(fail_at_step=1), LIMITS)
    with pytest.raises(RuntimeError, match="told to fail at step 1"):
        failing.launch(make_plan(1, 0, PROMPT, (9, 3), is_new=True))
    poisoned = NullRunner(NullEngineConfig(fail_at_token=PROMPT[-1]), LIMITS)
    with pytest.raises(RuntimeError, match=f"told to fail at token {PROMPT[-1]}"):
        poisoned.launch(make_plan(1, 0, PROMPT, (9, 3), is_new=True))
    hanging = NullRunner(NullEngineConfig(hang_at_step=1), LIMITS)
    assert hanging.launch(make_plan(1, 0, PROMPT, (9, 3), is_new=True)).done_ns is None


def test_engines_that_give_the_same_tokens_have_the_same_digest() -> None:
    digests = [
        NullRunner(config, LIMITS).shape.weights_digest
        for config in (
            CONFIG,
            NullEngineConfig(vocab_size=500, step_ms=9.0),
            NullEngineConfig(vocab_size=501),
        )
    ]
    assert digests[0] == digests[1] != digests[2]
