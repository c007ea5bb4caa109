"""Failover as it is: a router, two supervisors, and the processes of their ranks.

One replica is killed, frozen or replaced under its streams. Every stream has the tokens of a run that nothing
disturbed, and the survivor's ledger is whole.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from protos import wattline_cluster_pb2 as cluster_pb
from protos import wattline_inference_pb2 as pb
from replicas.config import EngineLimits, NullEngineConfig, ParallelConfig, ReplicaConfig
from replicas.rank.null_runner import null_continuation
from replicas.request import SamplingParams
from replicas.supervisor.rank_group import SubprocessRankGroup
from replicas.supervisor.supervisor import DRAIN_RESERVE_S, Supervisor
from tests.checkpoints import make_llama
from tests.router_fixture import MODEL, VOCAB_SIZE, Answer, TestRouter, collect, make_config, run_test_router

pytestmark = pytest.mark.processes

WAIT_S = 60.0
NULL = NullEngineConfig(step_ms=4.0, vocab_size=VOCAB_SIZE, context_tokens=512)
NUM_STREAMS = 16
NUM_TOKENS = 400
TOKENS_BEFORE = 10
"""Of each stream, about, when the test does what it is about."""
NUM_LAYERS = 32
"""Of the real model: a step takes milliseconds, so that the kill comes in the middle of every stream."""
SEEDED = pb.Sampling(temperature=1.0, top_p=0.9, top_k=50, seed=7)
GREEDY = pb.Sampling(temperature=0.0)


@asynccontextmanager
async def running(folder: Path, router: TestRouter, name: str, **changes: Any) -> AsyncIterator[Supervisor]:
    """A supervisor and its ranks, attached to the router."""
    told = ReplicaConfig(
        model=MODEL,
        source="null",
        replica_id=name,
        routers=(router.addresses.link,),
        parallel=ParallelConfig(tensor=2),
        limits=EngineLimits(max_sequences=32, max_waiting=64, num_blocks=1024),
        null=NULL,
        runtime_dir=str(folder / name),
        shared_dir=str(folder),
        ready_timeout_s=60.0,
        stall_floor_s=3.0,
    )
    config = replace(told, **changes)
    ranks = SubprocessRankGroup(runtime_dir=Path(config.runtime_dir))
    supervisor = Supervisor(config, ranks, lambda _: None)
    try:
        await supervisor.start()
        yield supervisor
    finally:
        await supervisor.stop()


@asynccontextmanager
async def two_replicas(**changes: Any) -> AsyncIterator[tuple[TestRouter, dict[str, Supervisor]]]:
    config = make_config(router={"failover": {"freeze_s": 5.0}})
    with TemporaryDirectory(prefix="wl-") as name:
        async with run_test_router(config) as router, AsyncExitStack() as replicas, asyncio.timeout(WAIT_S):
            yield (
                router,
                {
                    replica_id: await replicas.enter_async_context(
                        running(Path(name), router, replica_id, **changes)
                    )
                    for replica_id in ("one", "two")
                },
            )


def make_ask(prompt_ids: tuple[int, ...], sampling: pb.Sampling, **limits: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        model=MODEL,
        tokens=pb.TokenIds(ids=prompt_ids),
        sampling=sampling,
        limits=pb.Limits(ignore_eos=True, **limits),
    )


async def statuses(router: TestRouter) -> list[cluster_pb.ReplicaStatus]:
    return list((await router.cluster.Status(cluster_pb.StatusRequest())).models[0].replicas)


async def until(router: TestRouter, is_so: Callable[[list[cluster_pb.ReplicaStatus]], bool]) -> None:
    while not is_so(await statuses(router)):  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def ledger_mj(address: str) -> dict[str, float]:
    """The ledger of a replica, by who the energy was for."""

    def read() -> str:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            return str(answer.read(), "utf-8")

    found = re.findall(
        r'^wattline_ledger_millijoules\{.*ledger="(\w+)".*\} (\S+)$',
        await asyncio.to_thread(read),
        re.MULTILINE,
    )
    return {ledger: float(value) for ledger, value in found}


async def disturbed(
    router: TestRouter,
    replicas: dict[str, Supervisor],
    requests: list[pb.GenerateRequest],
    disturb: Callable[[Supervisor], Any],
) -> list[Answer]:
    """The answers to requests that are all being answered when `disturb` is called with the busiest replica.

    Where the router sends them is its own affair: one replica may have them all.
    """
    before = {replica.replica_id: replica.load.generated_tokens_total for replica in await statuses(router)}
    calls = [router.inference.Generate(request) for request in requests]
    busiest = ""

    def are_under_way(found: list[cluster_pb.ReplicaStatus]) -> bool:
        nonlocal busiest
        running = {replica.replica_id: sum(replica.load.running) for replica in found}
        busiest = max(running, key=lambda name: running[name])
        return sum(running.values()) == len(requests) and all(
            replica.load.generated_tokens_total - before[replica.replica_id]
            >= TOKENS_BEFORE * running[replica.replica_id]
            for replica in found
        )

    await until(router, are_under_way)
    disturb(replicas[busiest])
    return list(await asyncio.gather(*(collect(call) for call in calls)))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
async def test_sixteen_streams_survive_a_lost_rank(how: signal.Signals) -> None:
    asks = [
        (tuple(range(10 + index, 20 + 2 * index)), SEEDED if index % 2 else GREEDY)
        for index in range(NUM_STREAMS)
    ]
    requests = [make_ask(ids, sampling, max_tokens=NUM_TOKENS) for ids, sampling in asks]
    async with two_replicas() as (router, replicas):
        answers = await disturbed(
            router, replicas, requests, lambda victim: os.kill(victim.processes[1].pid, how)
        )
        await until(router, lambda replicas: len(replicas) == 1 and not sum(replicas[0].load.running))
        (survivor,) = await statuses(router)
        ledger = await ledger_mj(survivor.hello.metrics_address)
    for (ids, sampling), answer in zip(asks, answers, strict=True):
        drawn = SamplingParams(
            temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k, seed=sampling.seed
        )
        assert tuple(answer.token_ids) == null_continuation(ids, NUM_TOKENS, NULL, drawn)
    assert_moved(answers)
    assert list(survivor.load.free_blocks) == list(survivor.load.total_blocks)
    assert ledger["request"] + ledger["idle"] + ledger["unattributed"] == ledger["meter"] > 0.0


async def test_streams_that_outlast_a_drain_go_on_elsewhere() -> None:
    requests = [make_ask((10 + index, 11, 12), GREEDY, max_tokens=400) for index in range(4)]
    async with two_replicas(drain_s=DRAIN_RESERVE_S + 0.2) as (router, replicas):
        tasks = []

        async def leave(replica: Supervisor) -> None:
            await replica.drain()
            await replica.stop()

        answers = await disturbed(
            router, replicas, requests, lambda leaving: tasks.append(asyncio.create_task(leave(leaving)))
        )
        await asyncio.gather(*tasks)
    for request, answer in zip(requests, answers, strict=True):
        assert tuple(answer.token_ids) == null_continuation(tuple(request.tokens.ids), 400, NULL)
    assert_moved(answers)


async def test_a_real_model_goes_on_with_the_same_draws(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "checkpoint", num_layers=NUM_LAYERS, seed=10)
    limits = EngineLimits(max_sequences=8, step_tokens=64, block_tokens=8, num_blocks=512, context_tokens=300)
    requests = [
        make_ask(tuple(range(20 + index, 40 + 3 * index)), SEEDED if index % 2 else GREEDY, max_tokens=200)
        for index in range(6)
    ]
    changes = {"source": str(source), "limits": limits, "parallel": ParallelConfig(), "meter": "fake"}
    async with two_replicas(**changes) as (router, replicas):
        calm = await asyncio.gather(*(collect(router.inference.Generate(request)) for request in requests))
        shaken = await disturbed(
            router, replicas, requests, lambda victim: os.kill(victim.processes[0].pid, signal.SIGKILL)
        )
    assert [answer.token_ids for answer in shaken] == [answer.token_ids for answer in calm]
    assert [answer.text for answer in shaken] == [answer.text for answer in calm]
    assert_moved(shaken)


def assert_moved(answers: list[Answer]) -> None:
    """Those of the lost replica went on elsewhere, and say so; their joules are those of both replicas."""
    moved = [answer for answer in answers if answer.final.attempts == 2]
    assert moved
    for answer in moved:
        (resumed_at,) = answer.final.resumed_at
        assert 0 < resumed_at < len(answer.token_ids)
        # The lost replica's supervisor said what it knew; no meter window of its last steps will close.
        assert answer.final.energy.state == pb.ENERGY_STATE_PROVISIONAL
        assert 0.0 < answer.final.energy.wasted_j < answer.final.energy.total_j
