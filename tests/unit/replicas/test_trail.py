"""A sequence's steps, from its chunks and tokens alone."""

from __future__ import annotations

from replicas.engine.trail import StepEnd, Trail
from replicas.step_trail import StepTrail, TokenGap

US = 1_000


def take_tokens(trail: Trail, *ends_us: tuple[int, int]) -> None:
    """A token at each (step, microsecond)."""
    for step, at_us in ends_us:
        trail.take_token(StepEnd(step=step, at_ns=at_us * US))


def test_a_preemption_is_a_gap_and_its_chunks_are_steps_of_decode() -> None:
    trail = Trail()
    trail.take_chunk(5)
    take_tokens(trail, (7, 10), (8, 12))
    trail.take_chunk(12)
    take_tokens(trail, (13, 40), (14, 42))
    assert trail.told(num_tokens=4) == StepTrail(
        first_step=5,
        first_token_step=7,
        last_step=14,
        num_prefill_steps=2,
        num_decode_steps=4,
        longest_gap=TokenGap(duration_us=28, end_us=30, step=13),
    )


def test_of_equal_gaps_the_first_counts() -> None:
    trail = Trail()
    take_tokens(trail, (1, 5), (2, 7), (3, 9))
    told = trail.told(num_tokens=3)
    assert told is not None and told.longest_gap == TokenGap(duration_us=2, end_us=2, step=2)


def test_what_ended_before_its_first_token_was_in_steps_of_prefill_alone() -> None:
    trail = Trail()
    for step in (3, 4, 9):
        trail.take_chunk(step)
    assert trail.told(num_tokens=0) == StepTrail(
        first_step=3,
        first_token_step=None,
        last_step=9,
        num_prefill_steps=3,
        num_decode_steps=0,
        longest_gap=None,
    )


def test_what_was_in_no_step_has_no_trail() -> None:
    assert Trail().told(num_tokens=0) is None
