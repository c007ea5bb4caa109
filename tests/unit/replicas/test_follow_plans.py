"""A follower launches a plan before it waits for the step before, if steps are planned ahead."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from replicas.parallel.channel import StepReply
from replicas.plan import PendingStep, StepOutcome, StepPlan, encode_plan
from replicas.rank.process import _run_plans


@dataclass(slots=True)
class Log:
    """A channel with three plans, and a runner of them: what happens, in order."""

    events: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=lambda: [1, 2, 3])
    bad_step: int = 0

    def receive(self) -> bytes | None:
        if not self.steps:
            return None
        return encode_plan(StepPlan(step=self.steps.pop(0), freed_rows=(), new_rows=(), rows=()))

    def reply(self, reply: StepReply) -> None:
        self.events.append(f"reply {reply.step}")

    def fail(self) -> None:
        raise AssertionError("nothing fails here")

    def launch(self, plan: StepPlan) -> PendingStep:
        if plan.step == self.bad_step:
            raise RuntimeError("broken")
        self.events.append(f"launch {plan.step}")
        return Pending(self, plan.step)

    def close(self) -> None:
        pass


@dataclass(slots=True)
class Pending:
    log: Log
    step: int

    def result(self) -> StepOutcome:
        self.log.events.append(f"wait {self.step}")
        return StepOutcome(sampled_ids=())


@pytest.mark.parametrize(
    ("lookahead", "wanted"),
    [
        (
            0,
            [
                "launch 1",
                "wait 1",
                "reply 1",
                "launch 2",
                "wait 2",
                "reply 2",
                "launch 3",
                "wait 3",
                "reply 3",
            ],
        ),
        (1, ["launch 1", "launch 2", "wait 1", "reply 1", "launch 3", "wait 2", "reply 2"]),
    ],
)
def test_plans_are_launched_as_they_come(lookahead: int, wanted: list[str]) -> None:
    log = Log()
    _run_plans(log, log, lookahead=lookahead)
    assert log.events == wanted


def test_a_rank_that_fails_says_in_which_step(caplog: pytest.LogCaptureFixture) -> None:
    log = Log(bad_step=2)
    with pytest.raises(RuntimeError, match="broken"):
        _run_plans(log, log, lookahead=0)
    assert caplog.messages == ["rank_failed newest_step=2"]
