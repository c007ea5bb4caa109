"""A log names slow steps and failed sequences with their traces, and does not fill up with them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from replicas.logged_traces import MAX_LOGGED_TRACES, list_traces
from replicas.request import StepMember, StepRecord, StepRows
from replicas.supervisor.step_log import FAILED_PERIOD_S, SLOW_PERIOD_S, StepLog
from replicas.supervisor.step_watch import MIN_COMPARED_STEPS, StepWatch

MS = 1_000_000
TRACES = {1: "aa", 2: "bb", 4: "aa"}


@dataclass
class Desk:
    """A log, what it wrote, and a clock."""

    caplog: pytest.LogCaptureFixture
    now_s: float = 0.0

    def __post_init__(self) -> None:
        self.caplog.set_level("WARNING")
        watch = StepWatch(floor_s=2.0)
        for _ in range(MIN_COMPARED_STEPS):
            watch.note_step(0.01)
        self.log = StepLog(watch, lambda engine_id: TRACES.get(engine_id, ""), clock_s=lambda: self.now_s)

    def step(self, number: int, duration_ms: int, *engine_ids: int) -> None:
        members = [StepMember(engine_id, 1, 0, is_prefill=False) for engine_id in engine_ids]
        members.append(StepMember(9, 500, 0, is_prefill=True))
        self.log.note_step(
            StepRecord(step=number, start_ns=MS, end_ns=(1 + duration_ms) * MS, rows=StepRows.of(members))
        )

    def fail(self, step: int, engine_id: int) -> None:
        self.log.note_failure(step, engine_id, ("INTERNAL", "not finite"))

    @property
    def lines(self) -> list[str]:
        return [record.getMessage() for record in self.caplog.records]


def test_a_slow_step_is_named_with_the_traces_in_it(caplog: pytest.LogCaptureFixture) -> None:
    desk = Desk(caplog)
    desk.step(811, 249, 1, 2)
    desk.step(812, 431, 1, 2, 3, 4)
    assert desk.lines == [
        "slow_step step=812 ms=431 p99_ms=10.0 sequences=5 prompt_tokens=500 left_out=0 traces=aa,bb"
    ]


def test_slow_steps_and_failures_are_told_now_and_then_and_counted_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    desk = Desk(caplog)
    for number in range(5):
        desk.step(number, 300, 1)
        desk.fail(number, 2)
    desk.now_s += FAILED_PERIOD_S
    desk.fail(6, 3)
    desk.now_s += SLOW_PERIOD_S
    desk.step(7, 300, 1)
    first_step, first_failure, *later = desk.lines
    assert "step=0" in first_step and "step=0" in first_failure
    assert later == [
        "sequence_failed step=6 code=INTERNAL reason=not finite left_out=4 trace=",
        "slow_step step=7 ms=300 p99_ms=10.0 sequences=2 prompt_tokens=500 left_out=4 traces=aa",
    ]


def test_a_line_names_each_trace_once_and_no_more_than_it_can_hold() -> None:
    traces = list_traces(str(number) for number in [1, 1, *range(100)])
    assert traces.split(",") == ["1", "0", *map(str, range(2, MAX_LOGGED_TRACES))]
    assert list_traces(["", ""]) == ""
