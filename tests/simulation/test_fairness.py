"""A tenant below its fair share is not refused while another is above its."""

from __future__ import annotations

import asyncio
from collections import Counter
from random import Random

import pytest

from bench.simulation.sim_replica import ReplicaShape
from bench.simulation.virtual_time import run_virtual
from bench.simulation.world import Told, World
from cluster.config import parse_config
from cluster.request.completion import Completion, TokenPrompt
from replicas.config import EngineLimits, NullEngineConfig
from replicas.request import SamplingParams

VOCAB_SIZE = 1000
TTFT_MS = 500.0
LASTING_S = 5.0
MEAN_TOKENS = 16
SHAPE = ReplicaShape(
    null=NullEngineConfig(step_ms=20.0, prefill_tokens_per_s=20_000.0, vocab_size=VOCAB_SIZE),
    limits=EngineLimits(max_sequences=8, max_waiting=64, num_blocks=512),
)
CAPACITY_PER_S = SHAPE.limits.max_sequences / (MEAN_TOKENS * SHAPE.null.step_ms / 1e3)
MODEL = {
    "name": "m",
    "source": "null",
    "null_engine": {"vocab_size": VOCAB_SIZE},
    "slo": {"ttft_ms": TTFT_MS},
}


def make_world(*, seed: int, weights: dict[str, float]) -> World:
    tenants = [{"name": name, "weight": weight} for name, weight in weights.items()]
    world = World(parse_config({"models": [MODEL], "tenants": tenants}), seed=seed)
    world.add_replica("r0", SHAPE)
    return world


async def offer(world: World, random: Random, tenant: str, *, load: float) -> list[Told]:
    """So many times the capacity, at random times, answers of every length."""
    told: list[Told] = []
    async with asyncio.TaskGroup() as tasks:
        while world.now_s() < LASTING_S:
            await asyncio.sleep(random.expovariate(load * CAPACITY_PER_S))
            completion = Completion(
                model="m",
                prompt=TokenPrompt(ids=tuple(random.choices(range(3, VOCAB_SIZE), k=16))),
                sampling=SamplingParams(),
                max_tokens=max(1, min(8 * MEAN_TOKENS, round(random.expovariate(1.0 / MEAN_TOKENS)))),
                ignore_eos=True,
                energy_wait_ms=0,
            )
            told.append(Told(arrived_s=world.now_s()))
            tasks.create_task(world.serve(completion, told[-1], tenant=tenant))
    return told


async def play(seed: int, loads: dict[str, float], weights: dict[str, float]) -> dict[str, list[Told]]:
    world = make_world(seed=seed, weights=weights)
    told = await asyncio.gather(
        *(offer(world, Random(f"{seed}-{name}"), name, load=load) for name, load in loads.items())
    )
    world.check_idle()
    await world.close()
    return dict(zip(loads, told, strict=True))


def count_ends(told: list[Told]) -> Counter[str]:
    return Counter("served" if one.error is None else type(one.error).__name__ for one in told)


@pytest.mark.parametrize("seed", range(4))
def test_a_small_tenant_comes_in_beside_a_flood(seed: int) -> None:
    """It asks for a quarter of what there is, and half of it is its own."""
    told = run_virtual(play(seed, {"flood": 5.0, "small": 0.25}, {"flood": 1.0, "small": 1.0}))
    assert set(count_ends(told["small"])) == {"served"}
    assert count_ends(told["flood"])["Overloaded"] > len(told["flood"]) / 2
    in_time = [one for one in told["small"] if one.ttft_s * 1e3 <= TTFT_MS]
    assert len(in_time) >= 0.95 * len(told["small"])


def test_two_floods_share_by_weight() -> None:
    told = run_virtual(play(1, {"one": 4.0, "three": 4.0}, {"one": 1.0, "three": 3.0}))
    served = {name: sum(len(one.token_ids) for one in each) for name, each in told.items()}
    assert 2.0 < served["three"] / served["one"] < 4.5
