"""The averages of an engine's speed."""

from __future__ import annotations

import pytest

from replicas.engine.load import LoadAverages
from replicas.request import StepMember, StepRecord, StepRows


def make_record(duration_ms: int, *, num_prefill: int = 0, num_decode: int = 0) -> StepRecord:
    members = [
        StepMember(request_id=1, new_tokens=count, context_tokens=0, is_prefill=is_prefill)
        for count, is_prefill in ((num_prefill, True), (num_decode, False))
        if count
    ]
    return StepRecord(step=1, start_ns=5, end_ns=5 + duration_ms * 1_000_000, rows=StepRows.of(members))


def test_the_first_step_is_its_own_average_and_later_ones_weigh_a_tenth() -> None:
    averages = LoadAverages()
    averages.observe(make_record(10, num_prefill=100))
    assert averages.step_ms == pytest.approx(10.0)
    assert averages.prefill_tokens_per_s == pytest.approx(10_000)
    averages.observe(make_record(20, num_prefill=100))
    assert averages.step_ms == pytest.approx(11.0)
    assert averages.prefill_tokens_per_s == pytest.approx(9_500)


def test_a_rate_is_not_moved_by_steps_without_its_tokens() -> None:
    averages = LoadAverages()
    averages.observe(make_record(10, num_prefill=100, num_decode=4))
    averages.observe(make_record(10, num_decode=8))
    assert averages.prefill_tokens_per_s == pytest.approx(10_000)
    assert averages.decode_tokens_per_s == pytest.approx(440)
