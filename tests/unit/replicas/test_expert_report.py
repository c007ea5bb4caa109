"""Reports come when something ran, not more often than once a second, and the last one is not lost."""

from __future__ import annotations

from replicas.expert_loads import ExpertLoads
from replicas.rank.expert_report import ExpertReport


def test_reports_are_a_second_apart_and_the_last_step_is_in_one() -> None:
    now_s, steps = 10.0, 0

    def read() -> ExpertLoads:
        return ExpertLoads(num_experts=1, tokens=(steps,))

    report = ExpertReport(read, clock=lambda: now_s)
    assert report.take() is None and report.wait_s is None
    steps = 1
    report.note_step()
    assert report.take() == ExpertLoads(num_experts=1, tokens=(1,))
    now_s, steps = 10.25, 2
    report.note_step()
    assert report.take() is None and report.wait_s == 0.75
    now_s = 11.0
    assert report.wait_s == 0.0
    assert report.take() == ExpertLoads(num_experts=1, tokens=(2,))
    assert report.take() is None and report.wait_s is None


def test_a_model_without_experts_is_silent() -> None:
    report = ExpertReport(None)
    report.note_step()
    assert (report.take(), report.wait_s) == (None, None)
