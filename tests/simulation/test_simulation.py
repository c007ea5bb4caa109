"""Whatever happens to the replicas: each stream ends once, with its own tokens, and every joule is somewhere.

The router's own code runs over simulated replicas in virtual time. A seed is a scenario, and fails again
alike: `play_seed(17)`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from random import Random

import pytest

from bench.simulation.sim_replica import ReplicaShape
from bench.simulation.virtual_time import run_virtual
from bench.simulation.world import Told, World
from cluster.balancing.decision import Policy
from cluster.config import Config, parse_config
from cluster.request.completion import Completion, TokenPrompt
from replicas.config import EngineLimits, NullEngineConfig
from replicas.rank.null_runner import null_continuation
from replicas.request import SamplingParams

NUM_SEEDS = 200
SEEDS_PER_TEST = 20
NUM_SOAK_SEEDS = 10_000
VOCAB_SIZE = 1000
QUIET_S = 4.0
"""After the last request: frozen replicas wake, late energy comes, limits are given back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request of a scenario. `cancel_s` after it came; None: it is read to the end."""

    at_s: float
    completion: Completion
    tenant: str
    deadline_s: float | None
    cancel_s: float | None


def make_config(random: Random) -> Config:
    model = {
        "name": "m",
        "source": "null",
        "null_engine": {"vocab_size": VOCAB_SIZE},
        "balancing": random.choice(list(Policy)).value,
        "limits": {"max_queued": random.choice([4, 64]), "max_queue_s": random.choice([0.5, 20.0])},
        "slo": {"ttft_ms": random.choice([None, 200.0]), "tpot_ms": random.choice([None, 50.0])},
    }
    tenants = [
        {"name": "heavy", "weight": 2.0},
        {"name": "light", "priority_max": 0},
        {
            "name": "tight",
            "concurrent": 3,
            "tokens_per_s": 300.0,
            "requests_per_s": 5.0,
            "joules_per_day": 60.0,
        },
    ]
    failover = {"freeze_s": 0.5, "wait_s": random.choice([0.0, 2.0]), "burst": random.choice([1, 64])}
    return parse_config({"models": [model], "tenants": tenants, "router": {"failover": failover}})


def make_shape(random: Random) -> ReplicaShape:
    return ReplicaShape(
        null=NullEngineConfig(
            step_ms=random.choice([4.0, 10.0, 25.0]),
            prefill_tokens_per_s=random.choice([2_000.0, 20_000.0]),
            vocab_size=VOCAB_SIZE,
            context_tokens=512,
        ),
        limits=EngineLimits(
            max_sequences=random.choice([2, 4, 16]),
            max_waiting=8,
            step_tokens=64,
            num_blocks=random.choice([24, 200]),
        ),
        ms_per_sequence=random.choice([0.0, 1.0]),
    )


def make_asked(random: Random) -> Asked:
    head = Random(random.randrange(3)).choices(range(3, VOCAB_SIZE), k=random.choice([0, 16, 48]))
    tail = random.choices(range(3, VOCAB_SIZE), k=random.randint(1, 40))
    seed = random.randrange(2**32)
    return Asked(
        at_s=random.uniform(0.0, 1.2),
        completion=Completion(
            model="m",
            prompt=TokenPrompt(ids=tuple(head + tail)),
            sampling=SamplingParams(temperature=random.choice([0.0, 1.0]), seed=seed),
            max_tokens=random.randint(1, 40),
            ignore_eos=True,
            priority=random.choice([-1, 0, 0, 0, 1]),
            session_id=random.choice(["", "", "a", "b"]),
            energy_wait_ms=random.choice([0, 100]),
        ),
        tenant=random.choice(["heavy", "heavy", "light", "tight", "unknown"]),
        deadline_s=random.choice([None, None, 0.2, 2.0]),
        cancel_s=random.choice([None, None, None, random.uniform(0.0, 0.4)]),
    )


async def disturb(world: World, random: Random, replica_id: str) -> None:
    """One thing that happens to one replica, and mostly is over after a while."""
    await asyncio.sleep(random.uniform(0.0, 1.0))
    replica = world.replicas[f"{replica_id}.1"]
    lasting_s = random.uniform(0.05, 2.0)
    match random.choice(["kill", "replace", "freeze", "slow", "stale"]):
        case "kill":
            world.kill(replica_id)
        case "replace":
            world.kill(replica_id)
            await asyncio.sleep(lasting_s)
            world.add_replica(replica_id, replica.shape, epoch=2)
        case "freeze":
            replica.freeze()
            await asyncio.sleep(lasting_s)
            replica.thaw()
        case "slow":
            replica.slowness = 10.0
            await asyncio.sleep(lasting_s)
            replica.slowness = 1.0
        case "stale":
            replica.is_stale = True
            await asyncio.sleep(lasting_s)
            replica.is_stale = False


async def send(world: World, asked: Asked, told: Told) -> None:
    await asyncio.sleep(asked.at_s)
    told.arrived_s = world.now_s()
    serving = asyncio.ensure_future(
        world.serve(asked.completion, told, tenant=asked.tenant, deadline_s=asked.deadline_s)
    )
    await asyncio.wait([serving], timeout=asked.cancel_s)
    if not serving.done():
        serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    if not serving.cancelled() and (error := serving.exception()) is not None:
        raise error


async def play(seed: int) -> Counter[str]:
    """One scenario, checked. Returns how its requests ended."""
    random = Random(seed)
    world = World(make_config(random), seed=seed)
    shape = make_shape(random)
    names = [f"r{index}" for index in range(random.randint(1, 4))]
    for name in names:
        world.add_replica(name, shape)
    asked = [make_asked(random) for _ in range(random.randint(5, 20))]
    told = [Told(arrived_s=0.0) for _ in asked]
    faults = [disturb(world, Random(random.random()), name) for name in names if random.random() < 0.4]
    async with asyncio.timeout(300.0), asyncio.TaskGroup() as tasks:
        for fault in faults:
            tasks.create_task(fault)
        for one, record in zip(asked, told, strict=True):
            tasks.create_task(send(world, one, record))
    await asyncio.sleep(QUIET_S)
    world.check_idle()
    world.pool.prefixes.check()
    await world.close()
    check_joules(world)
    return Counter([check_told(one, record, shape) for one, record in zip(asked, told, strict=True)])


def check_told(asked: Asked, told: Told, shape: ReplicaShape) -> str:
    """No token lost, doubled or swapped; one end. Returns how it ended."""
    completion = asked.completion
    assert isinstance(completion.prompt, TokenPrompt) and completion.max_tokens is not None
    expected = null_continuation(
        completion.prompt.ids, completion.max_tokens, shape.null, completion.sampling
    )
    assert tuple(told.token_ids) == expected[: len(told.token_ids)]
    if told.completed is not None:
        assert told.error is None and told.num_ends == 1
        assert tuple(told.token_ids) == expected
        assert told.completed.usage.completion_tokens == len(expected)
        return "completed"
    if told.error is not None:
        return type(told.error).__name__
    assert asked.cancel_s is not None, "only who goes away hears nothing"
    return "cancelled"


def check_joules(world: World) -> None:
    """What replicas drew is on the requests' bills, or was lost with a replica; nothing is there twice."""
    replicas = world.replicas.values()
    assert sum(one.divided_mj for one in replicas) == sum(one.billed_mj + one.lost_mj for one in replicas)
    assert world.model.energy_mj_total == sum(one.billed_mj for one in replicas)


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, SEEDS_PER_TEST), ids=lambda first: f"seed-{first}")
def test_promises_hold(first: int) -> None:
    ends: Counter[str] = Counter()
    for seed in range(first, first + SEEDS_PER_TEST):
        ends += play_seed(seed)
    assert ends["completed"] > 0 and ends["cancelled"] > 0 and ends["Overloaded"] > 0


def play_seed(seed: int) -> Counter[str]:
    try:
        return run_virtual(play(seed))
    except BaseException as error:
        error.add_note(f"seed {seed}")
        raise


def test_a_scenario_is_the_same_twice() -> None:
    assert [play_seed(seed) for seed in range(3)] == [play_seed(seed) for seed in range(3)]


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("first", range(NUM_SEEDS, NUM_SOAK_SEEDS, 100))
def test_promises_hold_for_long(first: int) -> None:
    for seed in range(first, first + 100):
        play_seed(seed)
