"""Rank 0's view of its group: every plan is published, and whoever samples other ids is found out."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from replicas.config import EngineLimits, NullEngineConfig
from replicas.errors import RankLost
from replicas.parallel.channel import StepReply, digest_ids
from replicas.plan import LAST_SAMPLED, NewRow, PlannedRow, Runner, StepPlan, decode_plan
from replicas.rank.group_runner import GroupRunner
from replicas.rank.null_runner import NullRunner
from replicas.request import SamplingParams

PROMPT = (5, 6, 7)


@dataclass(slots=True)
class InProcessLeader:
    """A channel whose followers run here; `skew` is added to the ids of the last one."""

    followers: list[Runner]
    skew: int = 0
    timeout_s: float = 1.0
    published: list[StepPlan] = field(default_factory=list)
    num_collected: int = 0
    is_closed: bool = False

    def publish(self, payload: bytes) -> None:
        self.published.append(decode_plan(payload))

    def collect(self) -> tuple[StepReply, ...]:
        plan = self.published[self.num_collected]
        self.num_collected += 1
        replies = []
        for index, follower in enumerate(self.followers):
            skew = self.skew if index == len(self.followers) - 1 else 0
            ids = tuple(token_id + skew for token_id in follower.launch(plan).result().sampled_ids)
            replies.append(StepReply(step=plan.step, compute_us=1, experts_hit=0, digest=digest_ids(ids)))
        return tuple(replies)

    def close(self) -> None:
        self.is_closed = True


def make_null() -> NullRunner:
    config = NullEngineConfig(step_ms=0.0, prefill_tokens_per_s=0.0)
    return NullRunner(config, EngineLimits(num_blocks=10))


def make_plan(step: int) -> StepPlan:
    is_first = step == 1
    row = PlannedRow(
        row=0,
        start_pos=0 if is_first else step + 1,
        token_ids=PROMPT if is_first else (LAST_SAMPLED,),
        new_blocks=(1,) if is_first else (),
        samples=True,
    )
    new_rows = (NewRow(row=0, sampling=SamplingParams()),) if is_first else ()
    return StepPlan(step=step, freed_rows=(), new_rows=new_rows, rows=(row,))


def test_every_plan_is_published_and_replies_are_collected_a_step_late() -> None:
    leader = InProcessLeader([make_null(), make_null()])
    group = GroupRunner(make_null(), leader)
    for step in (1, 2, 3):
        assert len(group.launch(make_plan(step)).result().sampled_ids) == 1
        assert (len(leader.published), leader.num_collected) == (step, step - 1)
    assert leader.published == [make_plan(step) for step in (1, 2, 3)]
    group.close()
    assert leader.is_closed


def test_a_rank_that_samples_other_ids_is_lost() -> None:
    group = GroupRunner(make_null(), InProcessLeader([make_null(), make_null()], skew=1))
    group.launch(make_plan(1)).result()
    with pytest.raises(RankLost, match="rank 2 diverged from rank 0 at step 1"):
        group.launch(make_plan(2)).result()
