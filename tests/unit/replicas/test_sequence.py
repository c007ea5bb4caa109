"""The arithmetic of one sequence: positions, placeholders, endings, and what its delta says."""

from __future__ import annotations

from replicas.engine.sequence import Sequence, SequenceState
from replicas.engine.trail import StepEnd
from replicas.plan import LAST_SAMPLED
from replicas.request import FinishReason, GenerationRequest, SequenceDelta, SequenceTiming
from replicas.step_trail import StepTrail, TokenGap


def make_sequence(
    prompt_ids: tuple[int, ...] = (10, 11, 12, 13, 14),
    *,
    max_tokens: int = 8,
    context_tokens: int = 100,
    first_offset: int = 0,
) -> Sequence:
    request = GenerationRequest(
        request_id=1,
        prompt_ids=prompt_ids,
        max_tokens=max_tokens,
        stop_token_ids=frozenset({99}),
        attempt=2,
        first_offset=first_offset,
    )
    return Sequence(request=request, order=(0, 0), submitted_ns=1_000, context_tokens=context_tokens)


def test_chunks_of_a_prompt_sample_only_at_its_end() -> None:
    sequence = make_sequence()
    assert sequence.take(3) == ((10, 11, 12), 0)
    assert (sequence.num_uncomputed, sequence.num_pending, sequence.is_decoding) == (2, 0, False)
    assert sequence.take(2) == ((13, 14), 0)
    assert (sequence.num_uncomputed, sequence.num_pending, sequence.is_decoding) == (1, 1, True)


def test_a_token_under_way_is_planned_as_a_placeholder() -> None:
    sequence = make_sequence()
    sequence.take(5)
    assert sequence.take(1) == ((LAST_SAMPLED,), 0)
    assert sequence.append(7, StepEnd(step=1, at_ns=2_000)) is None
    assert (sequence.length, sequence.num_pending, sequence.num_computed) == (7, 1, 6)
    assert sequence.append(8, StepEnd(step=1, at_ns=3_000)) is None
    assert sequence.take(1) == ((8,), 0)


def test_what_was_computed_before_a_preemption_is_wasted() -> None:
    sequence = make_sequence()
    sequence.take(5)
    sequence.append(7, StepEnd(step=1, at_ns=2_000))
    sequence.take(1)
    sequence.append(8, StepEnd(step=1, at_ns=2_000))
    sequence.preempt()
    assert sequence.take(4) == ((10, 11, 12, 13), 4)
    assert sequence.take(3) == ((14, 7, 8), 2)
    assert (sequence.wasted_tokens, sequence.preemptions) == (6, 1)


def test_ends_at_a_stop_token_at_max_tokens_and_at_the_context() -> None:
    for sequence, token_id, finish in (
        (make_sequence(), 99, FinishReason.STOP),
        (make_sequence(max_tokens=1), 7, FinishReason.LENGTH),
        (make_sequence(max_tokens=1), 99, FinishReason.STOP),
        (make_sequence(context_tokens=6), 7, FinishReason.LENGTH),
        (make_sequence(), 7, None),
    ):
        sequence.take(5)
        assert sequence.append(token_id, StepEnd(step=1, at_ns=2_000)) is finish


def test_knows_that_its_last_token_is_under_way() -> None:
    for sequence, awaits in (
        (make_sequence(max_tokens=1), True),
        (make_sequence(context_tokens=6), True),
        (make_sequence(max_tokens=2), False),
    ):
        assert not sequence.awaits_last
        sequence.take(5)
        assert sequence.awaits_last is awaits


def test_ending_wastes_what_is_under_way() -> None:
    sequence = make_sequence()
    sequence.take(5)
    sequence.take(1)
    sequence.finish()
    assert sequence.state is SequenceState.FINISHED
    assert sequence.wasted_tokens == 6


def test_deltas_count_on_from_what_an_earlier_attempt_delivered() -> None:
    sequence = make_sequence(first_offset=3)
    sequence.scheduled_ns = 3_000
    sequence.take(5)
    sequence.append(7, StepEnd(step=1, at_ns=10_000))
    assert sequence.token_delta(7) == SequenceDelta(request_id=1, attempt=2, first_offset=3, token_ids=(7,))
    sequence.append(99, StepEnd(step=3, at_ns=15_000))
    assert sequence.last_delta((99,), FinishReason.STOP, now_ns=15_000) == SequenceDelta(
        request_id=1,
        attempt=2,
        first_offset=4,
        token_ids=(99,),
        finish=FinishReason.STOP,
        timing=SequenceTiming(
            queue_us=2,
            prefill_us=7,
            decode_us=5,
            cached_tokens=0,
            wasted_tokens=0,
            preemptions=0,
            trail=StepTrail(
                first_step=1,
                first_token_step=1,
                last_step=3,
                num_prefill_steps=1,
                num_decode_steps=1,
                longest_gap=TokenGap(duration_us=5, end_us=5, step=3),
            ),
        ),
    )


def test_a_sequence_that_never_ran_only_queued() -> None:
    timing = make_sequence().last_delta((), FinishReason.CANCELLED, now_ns=9_000).timing
    assert timing is not None
    assert (timing.queue_us, timing.prefill_us, timing.decode_us) == (8, 0, 0)
    assert timing.trail is None


def test_at_its_end_it_lets_go_of_whom_it_waited_for() -> None:
    """Each may have led the next: the last of a chain would keep the prompts of all before it."""
    leader, follower = make_sequence(), make_sequence()
    follower.waits_for = leader
    follower.finish()
    assert follower.waits_for is None
