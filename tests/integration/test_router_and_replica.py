"""The two ends of the link as they are: a router and a supervisor with two processes of the null engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from tempfile import TemporaryDirectory

import grpc
import pytest

from protos import wattline_cluster_pb2 as cluster_pb
from protos import wattline_inference_pb2 as pb
from replicas.config import EngineLimits, NullEngineConfig, ParallelConfig, ReplicaConfig
from replicas.supervisor.rank_group import SubprocessRankGroup
from replicas.supervisor.supervisor import Supervisor
from tests.router_fixture import (
    MODEL,
    VOCAB_SIZE,
    TestRouter,
    collect,
    collect_choices,
    decode,
    fail,
    make_request,
    run_test_router,
)

pytestmark = pytest.mark.processes

WAIT_S = 150.0


def make_config(folder: Path, router: TestRouter) -> ReplicaConfig:
    (folder / "shm").mkdir()
    return ReplicaConfig(
        model=MODEL,
        source="null",
        replica_id="real",
        routers=(router.addresses.link,),
        parallel=ParallelConfig(tensor=2),
        limits=EngineLimits(max_sequences=8, max_waiting=16, num_blocks=256),
        null=NullEngineConfig(step_ms=2.0, vocab_size=VOCAB_SIZE, context_tokens=512),
        runtime_dir=str(folder / "run"),
        shared_dir=str(folder / "shm"),
        drain_s=25.0,
        ready_timeout_s=WAIT_S,
        stall_floor_s=WAIT_S,
    )


@pytest.fixture
async def router() -> AsyncIterator[TestRouter]:
    """A router with one real replica attached."""
    with TemporaryDirectory(prefix="wl-") as folder:
        async with run_test_router() as running:
            config = make_config(Path(folder), running)
            ranks = SubprocessRankGroup(runtime_dir=Path(config.runtime_dir))
            supervisor = Supervisor(config, ranks, lambda _: None, first_link_timeout_s=WAIT_S)
            try:
                await supervisor.start()
                yield running
            finally:
                await supervisor.stop()


async def replica_status(router: TestRouter) -> cluster_pb.ReplicaStatus:
    (replica,) = (await router.cluster.Status(cluster_pb.StatusRequest())).models[0].replicas
    return replica


async def wait_idle(router: TestRouter) -> None:
    """Until the engine itself says that it runs nothing and every block is free."""
    async with asyncio.timeout(WAIT_S):
        while True:
            load = (await replica_status(router)).load
            if not sum(load.running) and list(load.free_blocks) == list(load.total_blocks):
                return
            await asyncio.sleep(0.01)


async def test_a_request_goes_all_the_way_whatever_ends_it(router: TestRouter) -> None:
    answer = await collect(router.inference.Generate(make_request("hello", max_tokens=40)))
    again = await collect(router.inference.Generate(make_request("hello", max_tokens=40)))
    assert (len(answer.token_ids), answer.text) == (40, decode(answer.token_ids))
    assert again.token_ids == answer.token_ids
    assert answer.final.timing.decode_ms > 0.0

    stop_text = decode(answer.token_ids[10:12]).strip()[:8]
    stopped = await collect(
        router.inference.Generate(make_request("hello", max_tokens=400, stop=[stop_text]))
    )
    assert stopped.deltas[-1].finish_reason == pb.FINISH_REASON_STOP
    assert answer.text.startswith(stopped.text)

    call = router.inference.Generate(make_request("hello", max_tokens=400))
    await call.read()
    call.cancel()
    late = await fail(router.inference.Generate(make_request("hello", max_tokens=400), timeout=0.2))
    assert late.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await wait_idle(router)

    answers = await asyncio.gather(
        *(collect(router.inference.Generate(make_request(f"prompt {i}", max_tokens=20))) for i in range(12))
    )
    assert [len(each.token_ids) for each in answers] == [20] * 12
    await wait_idle(router)
    assert (await replica_status(router)).requests_in_flight == 0

    beginning = "the same beginning of every prompt " * 4
    first = await collect(router.inference.Generate(make_request(beginning + "one")))
    second = await collect(router.inference.Generate(make_request(beginning + "two")))
    assert first.final.usage.cached_tokens == 0
    assert second.final.usage.cached_tokens >= 16
    await wait_idle(router)
    assert (await replica_status(router)).load.cached_tokens_total == second.final.usage.cached_tokens

    several = make_request(beginning + "three", sampling=pb.Sampling(temperature=1.0, seed=3, n=3))
    choices, final = await collect_choices(router.inference.Generate(several))
    assert len({tuple(choice.token_ids) for choice in choices}) == 3
    prompt_tokens = final.usage.prompt_tokens // 3
    assert final.usage.cached_tokens >= 2 * 16 * ((prompt_tokens - 1) // 16)
    await wait_idle(router)
