"""Rank 0's runner of a whole group: the same plan goes to every rank, and all must agree on what it gave.

Replies are compared one step late, so that rank 0 never waits for a rank that keeps up: a diverged group
delivers at most one step's tokens before it is given up.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from replicas.errors import RankLost
from replicas.parallel.channel import PlanLeader, digest_ids
from replicas.plan import PendingStep, Runner, StepOutcome, StepPlan, encode_plan

MAX_UNCOLLECTED = 1
"""Finished steps whose replies may still be under way."""


class GroupRunner:
    """Owns the order of plans and replies; the channel and rank 0's own runner are the caller's."""

    def __init__(self, runner: Runner, leader: PlanLeader) -> None:
        self._runner = runner
        self._leader = leader
        self._finished: deque[tuple[int, int]] = deque()

    def launch(self, plan: StepPlan) -> _GroupStep:
        self._leader.publish(encode_plan(plan))
        return _GroupStep(group=self, step=plan.step, pending=self._runner.launch(plan))

    def close(self) -> None:
        self._leader.close()
        self._runner.close()

    def settle(self, step: int, outcome: StepOutcome) -> None:
        """Rank 0 finished `step`. Raises RankLost if a rank is behind for too long, or sampled other ids."""
        self._finished.append((step, digest_ids(outcome.sampled_ids)))
        while len(self._finished) > MAX_UNCOLLECTED:
            expected = self._finished.popleft()
            for rank, reply in enumerate(self._leader.collect(), 1):
                if (reply.step, reply.digest) != expected:
                    raise RankLost(f"rank {rank} diverged from rank 0 at step {expected[0]}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _GroupStep:
    group: GroupRunner
    step: int
    pending: PendingStep

    def result(self) -> StepOutcome:
        outcome = self.pending.result()
        self.group.settle(self.step, outcome)
        return outcome
