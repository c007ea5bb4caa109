"""A request that kills its engine at any token, among harmless ones: the real router in virtual time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from bench.simulation.sim_replica import ReplicaShape
from bench.simulation.virtual_time import run_virtual
from bench.simulation.world import Told, World
from cluster.balancing.decision import Policy
from cluster.config import parse_config
from cluster.request.completion import Completion, TokenPrompt
from cluster.request.errors import Quarantined
from replicas.config import EngineLimits, NullEngineConfig
from replicas.rank.null_runner import null_continuation
from replicas.request import SamplingParams

VOCAB_SIZE = 30_000
NULL = NullEngineConfig(step_ms=10.0, prefill_tokens_per_s=2_000.0, vocab_size=VOCAB_SIZE, context_tokens=512)
LIMITS = EngineLimits(max_sequences=64, max_waiting=64, step_tokens=64, num_blocks=400)
NUM_REPLICAS = 4
NUM_TOKENS = 40
QUIET_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    at_s: float
    prompt: tuple[int, ...]

    @property
    def answer(self) -> tuple[int, ...]:
        return null_continuation(self.prompt, NUM_TOKENS, NULL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """`harm_at`: how many tokens the first one gives before it kills its engine."""

    asked: tuple[Asked, ...]
    harm_at: int
    policy: Policy

    @property
    def poison(self) -> int:
        culprit = self.asked[0]
        return (*culprit.prompt, *culprit.answer)[len(culprit.prompt) - 1 + self.harm_at]


@st.composite
def scenarios(draw: st.DrawFn, *, num_others: st.SearchStrategy[int]) -> Scenario:
    times_s = st.floats(0.0, 0.6)
    asked = tuple(
        Asked(at_s=draw(times_s), prompt=(500 + index, *range(3, 3 + draw(st.integers(1, 60)))))
        for index in range(1 + draw(num_others))
    )
    asked = (replace(asked[0], prompt=(*asked[0].prompt, 20_000)), *asked[1:])
    scenario = Scenario(
        asked=asked,
        harm_at=draw(st.integers(0, NUM_TOKENS - 1)),
        policy=draw(st.sampled_from([Policy.ENERGY, Policy.P2C, Policy.ROUND_ROBIN])),
    )
    everything = [token for one in asked for token in (*one.prompt, *one.answer)]
    assume(everything.count(scenario.poison) == 1)
    return scenario


async def play(scenario: Scenario) -> tuple[int, list[Told]]:
    """How many replicas died, and what each caller got."""
    model = {
        "name": "m",
        "source": "null",
        "null_engine": {"vocab_size": VOCAB_SIZE},
        "balancing": scenario.policy.value,
    }
    failover = {"wait_s": 5.0, "burst": 1000}
    world = World(parse_config({"models": [model], "router": {"failover": failover}}), seed=0)
    shape = ReplicaShape(null=replace(NULL, fail_at_token=scenario.poison), limits=LIMITS)
    for index in range(NUM_REPLICAS):
        world.add_replica(f"r{index}", shape)
    told = [Told(arrived_s=one.at_s) for one in scenario.asked]

    async def ask(one: Asked, record: Told) -> None:
        await asyncio.sleep(one.at_s)
        await world.serve(make_completion(one), record)

    async with asyncio.timeout(300.0), asyncio.TaskGroup() as asking:
        for one, record in zip(scenario.asked, told, strict=True):
            asking.create_task(ask(one, record))
    await asyncio.sleep(QUIET_S)
    world.check_idle()
    await world.close()
    return world.num_deaths, told


def make_completion(asked: Asked) -> Completion:
    return Completion(
        model="m",
        prompt=TokenPrompt(ids=asked.prompt),
        sampling=SamplingParams(),
        max_tokens=NUM_TOKENS,
        ignore_eos=True,
        energy_wait_ms=0,
    )


def check(scenario: Scenario) -> int:
    """The culprit is refused, everybody else has a whole answer. Returns how many replicas died."""
    num_deaths, (culprit, *others) = run_virtual(play(scenario))
    assert isinstance(culprit.error, Quarantined)
    assert tuple(culprit.token_ids) == scenario.asked[0].answer[: scenario.harm_at]
    for one, told in zip(scenario.asked[1:], others, strict=True):
        assert told.error is None and tuple(told.token_ids) == one.answer
    return num_deaths


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(scenarios(num_others=st.integers(0, 7)))
def test_the_culprit_is_refused_at_its_second_kill_and_nobody_else(scenario: Scenario) -> None:
    """As many as go one at a time; wherever in its answer it does harm."""
    assert check(scenario) == 2


@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(scenarios(num_others=st.integers(30, 50)))
def test_in_a_crowd_it_is_refused_at_its_third_kill_at_the_latest(scenario: Scenario) -> None:
    assert check(scenario) in (2, 3)
