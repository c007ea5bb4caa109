"""The share of prompts in steps that decode: a simulated engine whose costs are known."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from replicas.engine.prefill_pace import (
    MEASURED_EVERY,
    MIN_TOKENS,
    SAVED_STEPS,
    UNMEASURED_TOKENS,
    PrefillPace,
)
from replicas.request import StepMember, StepRecord, StepRows

DECODE_MS = 10.0
TOKEN_MS = 0.25
LIMIT = 504


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Of a step of the simulated engine: `growth` is what a token costs more for every token before it."""

    token_ms: float = TOKEN_MS
    growth_ms: float = 0.0
    fixed_ms: float = 0.0

    def prompt_ms(self, position: int, num_tokens: int) -> float:
        mean_ms = self.token_ms + self.growth_ms * (position + num_tokens / 2)
        return self.fixed_ms + mean_ms * num_tokens if num_tokens else 0.0


PLAIN = Costs()


def make_record(num_decoding: int, num_prompt: int, prompt_ms: float | None = None) -> StepRecord:
    members = [
        StepMember(request_id=index, new_tokens=1, context_tokens=9, is_prefill=False)
        for index in range(num_decoding)
    ]
    if num_prompt:
        members.append(StepMember(request_id=99, new_tokens=num_prompt, context_tokens=0, is_prefill=True))
    more_ms = PLAIN.prompt_ms(0, num_prompt) if prompt_ms is None else prompt_ms
    duration_ms = (DECODE_MS if num_decoding else 0.0) + more_ms
    return StepRecord(step=1, start_ns=0, end_ns=round(duration_ms * 1e6), rows=StepRows.of(members))


def run(
    pace: PrefillPace,
    num_steps: int,
    *,
    num_decoding: int = 8,
    num_prefilling: int = 1,
    costs: Costs = PLAIN,
) -> tuple[list[int], float]:
    """Prompt tokens of each step of an endless prompt, and the mean time of a step."""
    chunks: list[int] = []
    total_ms = 0.0
    for _ in range(num_steps):
        chunk = pace.tokens(num_decoding=num_decoding, num_prefilling=num_prefilling, limit=LIMIT)
        record = make_record(num_decoding, chunk, costs.prompt_ms(sum(chunks), chunk))
        chunks.append(chunk)
        total_ms += record.end_ns / 1e6
        pace.observe(record, num_prefilling=num_prefilling)
    return chunks, total_ms / num_steps


def make_pace(stretch: float) -> PrefillPace:
    """One that has seen a decode step and a mixed one."""
    pace = PrefillPace(stretch=stretch, is_packing=False)
    pace.observe(make_record(8, 0), num_prefilling=0)
    pace.observe(make_record(8, 40), num_prefilling=0)
    return pace


def decode_alone(pace: PrefillPace, num_steps: int) -> None:
    for _ in range(num_steps):
        pace.observe(make_record(8, 0), num_prefilling=0)


@pytest.mark.parametrize("stretch", [1.5, 2.0, 3.0])
def test_a_long_prompt_stretches_steps_by_no_more_than_it_may(stretch: float) -> None:
    chunks, mean_ms = run(make_pace(stretch), 200)
    assert mean_ms == pytest.approx(stretch * DECODE_MS, rel=0.03)
    assert min(filter(None, chunks)) >= MIN_TOKENS


def test_nor_where_tokens_cost_the_more_the_longer_the_prompt_is() -> None:
    chunks, mean_ms = run(make_pace(2.0), 200, costs=Costs(growth_ms=TOKEN_MS / 1000))
    assert sum(chunks[:20]) > 2 * sum(chunks[-20:])
    assert mean_ms == pytest.approx(2.0 * DECODE_MS, rel=0.03)


def test_where_prompts_in_a_step_have_a_price_of_their_own_fewer_steps_take_more_of_them() -> None:
    """Steps of decodes alone are replayed from a graph, say; others cost three times as much."""
    costs = Costs(token_ms=0.02, fixed_ms=2 * DECODE_MS)
    chunks, mean_ms = run(make_pace(2.0), 400, costs=costs)
    assert mean_ms == pytest.approx(2.0 * DECODE_MS, rel=0.05)
    assert sum(chunks) * costs.token_ms >= 0.2 * 400 * DECODE_MS


def test_a_short_prompt_after_a_pause_is_computed_at_once() -> None:
    pace = make_pace(2.0)
    decode_alone(pace, 100)
    burst = (SAVED_STEPS + 1) * DECODE_MS / TOKEN_MS
    assert pace.tokens(num_decoding=8, num_prefilling=1, limit=10_000) == pytest.approx(burst, abs=1)
    assert pace.tokens(num_decoding=8, num_prefilling=1, limit=300) == 300


def test_what_is_saved_delays_decoding_by_a_bounded_time_once() -> None:
    pace = make_pace(2.0)
    decode_alone(pace, 1000)
    _, mean_ms = run(pace, 100)
    assert mean_ms * 100 <= (2.0 * 100 + SAVED_STEPS + 1) * DECODE_MS


def test_where_most_sequences_await_their_first_token_prompts_get_most_of_the_time() -> None:
    _, mean_ms = run(make_pace(2.0), 400, num_decoding=1, num_prefilling=7)
    assert mean_ms == pytest.approx(8 * DECODE_MS, rel=0.05)


def test_costs_are_learned_where_prompts_always_wait() -> None:
    """The first decode step was of one sequence; eight never decode without prompts but to be measured."""
    pace = PrefillPace(stretch=2.0, is_packing=False)
    pace.observe(StepRecord(step=1, start_ns=0, end_ns=10**6, rows=make_record(1, 0).rows), num_prefilling=0)
    chunks, _ = run(pace, 50)
    assert chunks.count(0) <= 2 + 50 / MEASURED_EVERY + SAVED_STEPS
    _, mean_ms = run(pace, 200)
    assert mean_ms == pytest.approx(2.0 * DECODE_MS, rel=0.05)


def test_nothing_is_bounded_where_nobody_decodes() -> None:
    assert make_pace(1.0).tokens(num_decoding=0, num_prefilling=3, limit=LIMIT) == LIMIT
    assert (
        PrefillPace(stretch=1.0, is_packing=False).tokens(num_decoding=0, num_prefilling=3, limit=LIMIT)
        == LIMIT
    )


def test_what_decoding_takes_is_measured_before_prompts_join_it() -> None:
    pace = PrefillPace(stretch=2.0, is_packing=False)
    assert pace.tokens(num_decoding=8, num_prefilling=3, limit=LIMIT) == 0
    decode_alone(pace, 1)
    assert pace.tokens(num_decoding=8, num_prefilling=3, limit=LIMIT) == LIMIT


def test_prompts_never_stop() -> None:
    chunks, _ = run(make_pace(1.0), 64, num_prefilling=0)
    assert set(chunks) == {0, MIN_TOKENS}
    assert chunks.count(0) <= 64 / MEASURED_EVERY
    assert make_pace(1.0).tokens(num_decoding=8, num_prefilling=1, limit=5) == 5


def test_prompts_share_a_step_until_they_take_as_long_as_its_decodes() -> None:
    pace = make_pace(2.0)
    assert pace.packed_tokens(num_decoding=8, limit=LIMIT) == DECODE_MS / TOKEN_MS
    assert pace.packed_tokens(num_decoding=0, limit=LIMIT) == DECODE_MS / TOKEN_MS
    assert pace.packed_tokens(num_decoding=8, limit=7) == 7


def test_a_step_takes_one_prompt_however_dear_it_is() -> None:
    pace = make_pace(2.0)
    pace.observe(make_record(8, 1, prompt_ms=1e6), num_prefilling=0)
    assert pace.packed_tokens(num_decoding=8, limit=LIMIT) == 1


def test_a_step_takes_a_bounded_number_of_prompt_tokens_where_none_has_a_price_yet() -> None:
    pace = PrefillPace(stretch=2.0, is_packing=False)
    assert pace.packed_tokens(num_decoding=0, limit=LIMIT) == UNMEASURED_TOKENS
    decode_alone(pace, 1)
    pace.observe(make_record(8, 40, prompt_ms=0.0), num_prefilling=0)
    assert pace.packed_tokens(num_decoding=8, limit=LIMIT) == UNMEASURED_TOKENS
    assert PrefillPace(stretch=2.0, is_packing=True).packed_tokens(num_decoding=8, limit=LIMIT) == LIMIT
