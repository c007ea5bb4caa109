"""The last requests and the window of answers: bounded, and ratios of sums."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.energy.account import EnergyAccount
from cluster.request.answer import Timing, Usage
from cluster.telemetry.journal import (
    LAST_REQUESTS,
    WINDOW_S,
    ClosedRequest,
    Journal,
    Objective,
    Spread,
    spread,
)

USAGE = Usage(prompt_tokens=6, cached_tokens=0, completion_tokens=4, wasted_tokens=0)


def make_closed(
    request_id: str = "r", *, ttft_ms: float | None = 50.0, tpot_ms: float | None = 10.0
) -> ClosedRequest:
    return ClosedRequest(
        request_id=request_id,
        tenant="default",
        trace_id="0" * 32,
        model="m",
        ended_s=100.0,
        usage=USAGE,
        timing=Timing(queue_ms=1, prefill_ms=2, decode_ms=3, ttft_ms=50, total_ms=80),
        ttft_ms=ttft_ms,
        tpot_ms=tpot_ms,
        outcome="stop",
        account=EnergyAccount(),
    )


def make_journal(objective: Objective | None = None) -> Journal:
    return Journal([("m", objective or Objective(ttft_ms=100.0, tpot_ms=20.0))])


def test_the_newest_requests_come_first_and_the_oldest_are_let_go() -> None:
    journal = make_journal()
    for index in range(LAST_REQUESTS + 3):
        journal.add(make_closed(str(index)))
    assert [closed.request_id for closed in journal.last[:2]] == ["52", "51"]
    assert len(journal.last) == LAST_REQUESTS


@pytest.mark.parametrize(
    ("closed", "is_met"),
    [
        (make_closed(), True),
        (make_closed(ttft_ms=100.1), False),
        (make_closed(tpot_ms=20.1), False),
        (make_closed(tpot_ms=None), True),
        (replace(make_closed(ttft_ms=None), outcome="UNAVAILABLE"), False),
        (replace(make_closed(), outcome="UNAVAILABLE"), False),
        (replace(make_closed(), outcome="cancelled"), None),
    ],
)
def test_an_answer_keeps_the_objective_or_not(closed: ClosedRequest, is_met: bool | None) -> None:
    journal = make_journal()
    assert journal.add(closed) is is_met
    answers = journal.of_model("m")
    assert (answers.num_met, answers.num_missed) == (int(is_met is True), int(is_met is False))


def test_without_an_objective_nothing_is_kept_or_missed() -> None:
    journal = make_journal(Objective())
    assert journal.add(make_closed()) is None


def test_joules_per_token_are_a_ratio_of_sums_in_the_window() -> None:
    answers = make_journal().of_model("m")
    assert answers.joules_per_token(now_s=0.0) == (None, None)
    few = replace(USAGE, completion_tokens=1)
    answers.add_bill(energy_mj=9000, usage=few, source="tdp", now_s=1.0)
    answers.add_bill(energy_mj=1000, usage=USAGE, source="tdp", now_s=20.0)
    assert answers.joules_per_token(now_s=20.0) == (10.0 / 5, 10.0 / 17)
    assert answers.joules_per_token(now_s=1.5 + WINDOW_S) == (1.0 / 4, 1.0 / 10)
    answers.add_bill(energy_mj=8000, usage=USAGE, source="counter", now_s=21.0)
    assert answers.joules_per_token(now_s=21.0) == (2.0, 0.8)


def test_times_leave_with_the_window() -> None:
    journal = make_journal()
    journal.add(make_closed())
    answers = journal.of_model("m")
    assert answers.ttft_ms(now_s=101.0) == Spread(p50=50.0, p95=50.0)
    assert answers.tpot_ms(now_s=101.0) == Spread(p50=10.0, p95=10.0)
    assert answers.ttft_ms(now_s=101.0 + WINDOW_S) is None


def test_percentiles_are_values_that_occurred() -> None:
    assert spread([]) is None
    assert spread([3.0, 1.0, 2.0, 4.0]) == Spread(p50=2.0, p95=4.0)
    assert spread(range(1, 101)) == Spread(p50=50, p95=95)
    assert spread([7.0]) == Spread(p50=7.0, p95=7.0)
