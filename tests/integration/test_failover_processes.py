"""Failover as it is: a router, two supervisors, and the processes of their ranks.

One replica is killed, frozen or replaced under its streams, which crawl until then. Every stream has the
tokens of a run that nothing disturbed, and the survivor's ledger is whole.
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
from inspect import isawaitable
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
from tests.crawling_rank import MODULE, crawl_file
from tests.router_fixture import MODEL, VOCAB_SIZE, Answer, TestRouter, collect, make_config, run_test_router

pytestmark = pytest.mark.processes

WAIT_S = 150.0
NULL = NullEngineConfig(step_ms=4.0, vocab_size=VOCAB_SIZE, context_tokens=512)
NUM_STREAMS = 16
NUM_TOKENS = 400
STALL_S = 3.0
"""Of tests that freeze a rank; the others are patient with ranks that are only slow."""
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
        ready_timeout_s=WAIT_S,
        stall_floor_s=WAIT_S,
    )
    config = replace(told, **changes)
    ranks = SubprocessRankGroup(runtime_dir=Path(config.runtime_dir), module=MODULE)
    supervisor = Supervisor(config, ranks, lambda _: None, first_link_timeout_s=WAIT_S)
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


def is_one_and_empty(found: list[cluster_pb.ReplicaStatus]) -> bool:
    """One replica is left; it runs nothing, and every block is free."""
    loads = [one.load for one in found]
    return len(loads) == 1 and all(
        not sum(load.running) and list(load.free_blocks) == list(load.total_blocks) for load in loads
    )


async def ledger_mj(address: str) -> dict[str, float]:
    """The ledger of a replica, by who the energy was for."""

    def read() -> str:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=WAIT_S) as answer:
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
    """The answers to requests that all have begun when `disturb` is called with the busiest replica.

    Where the router sends them is its own affair: one replica may have them all. What `disturb` returns is
    awaited, if it can be, before the streams go on at full speed.
    """
    crawl = crawl_file(Path(next(iter(replicas.values()))._config.shared_dir))
    crawl.touch()
    calls = [router.inference.Generate(request) for request in requests]
    begun = await asyncio.gather(*(anext(aiter(call)) for call in calls))
    busiest = max(await statuses(router), key=lambda replica: replica.requests_in_flight)
    disturbing = disturb(replicas[busiest.replica_id])
    if isawaitable(disturbing):
        await disturbing
    crawl.unlink()
    return list(await asyncio.gather(*(collect(*pair) for pair in zip(calls, begun, strict=True))))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
async def test_sixteen_streams_survive_a_lost_rank(how: signal.Signals) -> None:
    asks = [
        (tuple(range(10 + index, 20 + 2 * index)), SEEDED if index % 2 else GREEDY)
        for index in range(NUM_STREAMS)
    ]
    requests = [make_ask(ids, sampling, max_tokens=NUM_TOKENS) for ids, sampling in asks]
    async with two_replicas(stall_floor_s=STALL_S if how is signal.SIGSTOP else WAIT_S) as (router, replicas):
        answers = await disturbed(
            router, replicas, requests, lambda victim: os.kill(victim.processes[1].pid, how)
        )
        await until(router, is_one_and_empty)
        (survivor,) = await statuses(router)
        ledger = await ledger_mj(survivor.hello.metrics_address)
    for (ids, sampling), answer in zip(asks, answers, strict=True):
        drawn = SamplingParams(
            temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k, seed=sampling.seed
        )
        assert tuple(answer.token_ids) == null_continuation(ids, NUM_TOKENS, NULL, drawn)
    assert_moved(answers)
    assert ledger["request"] + ledger["idle"] + ledger["unattributed"] == ledger["meter"] > 0.0


async def test_streams_that_outlast_a_drain_go_on_elsewhere() -> None:
    requests = [make_ask((10 + index, 11, 12), GREEDY, max_tokens=400) for index in range(4)]
    async with two_replicas(drain_s=DRAIN_RESERVE_S + 0.2) as (router, replicas):

        async def leave(replica: Supervisor) -> None:
            await replica.drain()
            await replica.stop()

        answers = await disturbed(router, replicas, requests, leave)
    for request, answer in zip(requests, answers, strict=True):
        assert tuple(answer.token_ids) == null_continuation(tuple(request.tokens.ids), 400, NULL)
    assert_moved(answers)


async def test_a_real_model_goes_on_with_the_same_draws(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "checkpoint", seed=10)
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
