"""What waits at the gate waits for a reason: another tenant's turn, an objective, or those ahead of it."""

from __future__ import annotations

import asyncio

import pytest

from bench.simulation.sim_replica import ReplicaShape
from bench.simulation.virtual_time import run_virtual
from bench.simulation.world import World
from cluster.config import parse_config
from cluster.request.completion import Completion, TokenPrompt
from replicas.config import EngineLimits, NullEngineConfig
from replicas.request import SamplingParams

NUM_ROWS = 8
PROMPT_TOKENS = 100
SHAPE = ReplicaShape(
    null=NullEngineConfig(step_ms=20.0, prefill_tokens_per_s=500.0),
    limits=EngineLimits(max_sequences=NUM_ROWS, num_blocks=512),
)
"""A prompt takes twice as long as an engine is given work ahead."""


def make_completion(index: int, *, max_tokens: int = 64) -> Completion:
    """Each has a prompt of its own: nothing of it is cached."""
    return Completion(
        model="m",
        prompt=TokenPrompt(ids=tuple(range(3 + index, 3 + index + PROMPT_TOKENS))),
        sampling=SamplingParams(),
        max_tokens=max_tokens,
        ignore_eos=True,
        energy_wait_ms=0,
    )


async def count_waiting(tenants: tuple[str, ...], ttft_ms: float | None) -> int:
    """How many of eight requests wait at the gate once the first has its first token."""
    model = {"name": "m", "source": "null", "slo": {"ttft_ms": ttft_ms}}
    world = World(parse_config({"models": [model]}), seed=1)
    world.add_replica("r0", SHAPE)
    # The engine's rate is known from now on.
    await world.ask(make_completion(0, max_tokens=4), tenant=tenants[0])
    asking = [
        asyncio.create_task(world.ask(make_completion(index), tenant=tenants[index % len(tenants)]))
        for index in range(1, 1 + NUM_ROWS)
    ]
    await asyncio.sleep(PROMPT_TOKENS / 500.0)
    num_waiting = len(world.gate)
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    await world.close()
    return num_waiting


def test_an_engine_gets_all_it_has_rows_for_of_one_tenant_without_an_objective() -> None:
    assert run_virtual(count_waiting(("one",), None)) == 0


@pytest.mark.parametrize(("tenants", "ttft_ms"), [(("one", "two"), None), (("one",), 60_000.0)])
def test_what_may_be_refused_or_overtaken_waits_at_the_gate(
    tenants: tuple[str, ...], ttft_ms: float | None
) -> None:
    assert run_virtual(count_waiting(tenants, ttft_ms)) > 0


async def refused_in_two_rushes(*, pause_s: float) -> list[bool]:
    """Whether one who comes into a long queue with time enough is refused, in each of them."""
    world = World(parse_config({"models": [{"name": "m", "source": "null"}]}), seed=1)
    world.add_replica("r0", SHAPE)
    refused = []
    for rush in range(2):
        others = [
            asyncio.create_task(world.ask(make_completion(each, max_tokens=4), tenant=f"tenant {each % 2}"))
            for each in range(100 * rush, 100 * rush + 3 * NUM_ROWS)
        ]
        while len(world.gate) > NUM_ROWS or not len(world.gate):  # noqa: ASYNC110
            await asyncio.sleep(SHAPE.null.step_ms / 1e3)
        told = await world.ask(make_completion(99 + 100 * rush), tenant="tenant 0", deadline_s=pause_s / 2)
        refused.append(told.error is not None)
        await asyncio.gather(*others)
        await asyncio.sleep(pause_s)
    await world.close()
    return refused


def test_a_pause_between_two_rushes_is_no_part_of_a_wait() -> None:
    assert run_virtual(refused_in_two_rushes(pause_s=60.0)) == [False, False]
