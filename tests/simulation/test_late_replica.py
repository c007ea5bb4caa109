"""Streams that lost their only replica, and wait for another longer than a probation lasts."""

from __future__ import annotations

import asyncio

import pytest

from bench.simulation.sim_replica import ReplicaShape
from bench.simulation.virtual_time import run_virtual
from bench.simulation.world import Told, World
from cluster.config import parse_config
from cluster.request.completion import Completion, TokenPrompt
from cluster.router.turns import LOOK_AGAIN_S, PROBATION_S
from replicas.config import EngineLimits, NullEngineConfig
from replicas.request import SamplingParams

NUM_REQUESTS = 3
STEP_S = 0.02
SHAPE = ReplicaShape(
    null=NullEngineConfig(step_ms=STEP_S * 1e3), limits=EngineLimits(max_sequences=8, num_blocks=64)
)
CONFIG = {
    "models": [{"name": "m", "source": "null"}],
    "router": {"failover": {"wait_s": 6 * PROBATION_S}},
}


def make_completion(index: int) -> Completion:
    return Completion(
        model="m",
        prompt=TokenPrompt(ids=(10 + index, 11, 12)),
        sampling=SamplingParams(),
        max_tokens=20,
        ignore_eos=True,
        energy_wait_ms=0,
    )


async def count_beginners(*, gap_s: float) -> tuple[int, list[Told]]:
    """How many streams the next replica gets at once, when the first died before any had a token."""
    world = World(parse_config(CONFIG), seed=1)
    world.add_replica("first", SHAPE)
    asking = [asyncio.create_task(world.ask(make_completion(index))) for index in range(NUM_REQUESTS)]
    await asyncio.sleep(STEP_S / 2)
    world.kill("first")
    await asyncio.sleep(gap_s)
    world.add_replica("second", SHAPE)
    await asyncio.sleep(LOOK_AGAIN_S + STEP_S / 2)
    connection = world.pool.find("second")
    assert connection is not None
    beginners = connection.in_flight
    told = await asyncio.gather(*asking)
    await world.close()
    return beginners, told


@pytest.mark.parametrize("gap_s", [1.0, 3 * PROBATION_S])
def test_suspects_come_one_by_one_however_late_the_next_replica_is(gap_s: float) -> None:
    """One of them may be poisonous: together, nobody could tell which, and all would be given up with it."""
    beginners, told = run_virtual(count_beginners(gap_s=gap_s))
    assert beginners == 1
    assert [len(one.token_ids) for one in told] == [20] * NUM_REQUESTS
