"""An answer that its caller's deadline cut is late, whoever noticed first; one that is given up is not."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from bench.simulation.sim_replica import ReplicaShape
from bench.simulation.virtual_time import run_virtual
from bench.simulation.world import World
from cluster.config import parse_config
from cluster.request.completion import Completion, TokenPrompt
from cluster.request.errors import DeadlinePassed
from cluster.router.route_finder import Errand
from replicas.config import EngineLimits, NullEngineConfig
from replicas.request import SamplingParams

SHAPE = ReplicaShape(
    null=NullEngineConfig(step_ms=20.0, prefill_tokens_per_s=10.0),
    limits=EngineLimits(max_sequences=8, num_blocks=512),
)
MODEL = {"name": "m", "source": "null", "slo": {"ttft_ms": 60_000.0}}
COMPLETION = Completion(
    model="m", prompt=TokenPrompt(ids=tuple(range(3, 103))), sampling=SamplingParams(), energy_wait_ms=0
)
"""Its first token takes ten seconds."""


async def ask_and_leave(*, deadline_s: float | None) -> tuple[str, int]:
    """How a request that ends after two seconds is remembered, and how many missed the objective."""
    world = World(parse_config({"models": [MODEL]}), seed=1)
    world.add_replica("r0", SHAPE)
    asking = asyncio.create_task(world.ask(COMPLETION, deadline_s=deadline_s))
    await asyncio.sleep(2.0)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    (closed,) = world.journal.last
    await world.close()
    return closed.outcome, world.journal.of_model("m").num_missed


@pytest.mark.parametrize(
    ("deadline_s", "remembered"),
    [(None, ("cancelled", 0)), (60.0, ("cancelled", 0)), (1.5, ("DEADLINE_EXCEEDED", 1))],
)
def test_a_deadline_is_no_caller_s_will(deadline_s: float | None, remembered: tuple[str, int]) -> None:
    assert run_virtual(ask_and_leave(deadline_s=deadline_s)) == remembered


async def wait_in_vain(*, deadline_s: float) -> float:
    """How long one waits behind answers that take longer than they were expected to."""
    world = World(parse_config({"models": [MODEL]}), seed=1)
    world.add_replica("r0", replace(SHAPE, limits=EngineLimits(max_sequences=1, num_blocks=512)))
    prompt = TokenPrompt(ids=(3, 4, 5))
    long = replace(COMPLETION, prompt=prompt, max_tokens=4000, ignore_eos=True)
    others = [asyncio.create_task(world.ask(long)) for _ in range(2)]
    await asyncio.sleep(1.0)
    errand = Errand(prompt_ids=prompt.ids, output_tokens=16, cache_salt=b"")
    since_s, tenant = world.now_s(), world.tenants.account("default").tenant
    with pytest.raises(DeadlinePassed):
        async with world.gate.place(errand, tenant=tenant, priority=0, deadline_s=deadline_s):
            pass
    waited_s = world.now_s() - since_s
    assert len(world.gate) == 0
    for other in others:
        other.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await world.close()
    return waited_s


def test_nobody_waits_in_the_queue_beyond_a_deadline_of_its_own() -> None:
    """Some protocols have one that does not end the call."""
    assert run_virtual(wait_in_vain(deadline_s=7.0)) == pytest.approx(7.0, abs=0.01)
