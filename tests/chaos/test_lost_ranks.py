"""Ranks and replicas that die or freeze under their streams. Cases 1 to 6 of the fault matrix."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import grpc
import psutil
import pytest

from protos import wattline_inference_pb2 as pb
from replicas.rank.null_runner import null_continuation
from replicas.supervisor.supervisor import Supervisor
from tests.integration.test_failover_processes import (
    GREEDY,
    NULL,
    STALL_S,
    WAIT_S,
    disturbed,
    is_one_and_empty,
    make_ask,
    running,
    two_replicas,
    until,
)
from tests.router_fixture import Answer, TestRouter, collect, fail, make_config, run_test_router

pytestmark = [pytest.mark.processes, pytest.mark.chaos]

NUM_TOKENS = 300
NUM_STREAMS = 4


def make_asks() -> list[pb.GenerateRequest]:
    return [make_ask((10 + index, 11, 12), GREEDY, max_tokens=NUM_TOKENS) for index in range(NUM_STREAMS)]


def assert_exact(requests: list[pb.GenerateRequest], answers: list[Answer]) -> None:
    """No token is lost, doubled or changed, and each stream ended once (`collect` checks that)."""
    for request, answer in zip(requests, answers, strict=True):
        assert tuple(answer.token_ids) == null_continuation(tuple(request.tokens.ids), NUM_TOKENS, NULL)


@pytest.mark.parametrize(
    ("rank", "how"),
    [
        pytest.param(1, signal.SIGKILL, id="case1-kill-follower"),
        pytest.param(0, signal.SIGKILL, id="case2-kill-leader", marks=pytest.mark.slow),
        pytest.param(1, signal.SIGSTOP, id="case3-stop-follower", marks=pytest.mark.slow),
        pytest.param(0, signal.SIGSTOP, id="case3-stop-leader"),
    ],
)
async def test_no_stream_notices_a_lost_rank(rank: int, how: signal.Signals) -> None:
    """Promise: callers see no error and the tokens of an undisturbed run; the survivor holds no block."""
    requests = make_asks()
    async with two_replicas(stall_floor_s=STALL_S if how is signal.SIGSTOP else WAIT_S) as (router, replicas):
        answers = await disturbed(
            router, replicas, requests, lambda victim: os.kill(victim.processes[rank].pid, how)
        )
        await until(router, is_one_and_empty)
    assert_exact(requests, answers)
    assert any(answer.final.attempts == 2 for answer in answers)


async def test_a_stopped_rank_that_wakes_up_says_nothing_more() -> None:
    """Case 4. Promise: a zombie that is continued after its streams moved adds no token, and is gone."""
    requests = make_asks()
    pids: list[int] = []

    def stop(victim: Supervisor) -> None:
        pids.extend(process.pid for process in victim.processes)
        os.kill(pids[1], signal.SIGSTOP)

    async with two_replicas(stall_floor_s=STALL_S) as (router, replicas):
        answers = asyncio.create_task(disturbed(router, replicas, requests, stop))
        while not pids:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await until(router, lambda left: len(left) == 1)
        with suppress(ProcessLookupError):
            os.kill(pids[1], signal.SIGCONT)
        assert_exact(requests, await answers)
        while any(psutil.pid_exists(pid) and _is_alive(pid) for pid in pids):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_streams_wait_for_a_replica_when_all_are_gone() -> None:
    """Case 6. Promise: with `wait_s` a stream goes on when a replica is back, new ones are refused."""
    (request, *_) = make_asks()
    config = make_config(router={"failover": {"wait_s": WAIT_S}})
    with TemporaryDirectory(prefix="wl-") as name:
        async with run_test_router(config) as router, asyncio.timeout(WAIT_S):
            async with running(Path(name), router, "one") as one:
                answers = asyncio.create_task(disturbed_alone(router, one, request))
                await until(router, lambda left: not left)
                refused = await fail(router.inference.Generate(request))
                assert refused.code() is grpc.StatusCode.UNAVAILABLE
                assert not answers.done()
            async with running(Path(name), router, "two"):
                answer = await answers
    assert_exact([request], [answer])
    assert answer.final.attempts == 2


async def disturbed_alone(router: TestRouter, victim: Supervisor, request: pb.GenerateRequest) -> Answer:
    (answer,) = await disturbed(
        router,
        {"one": victim},
        [request],
        lambda busiest: os.kill(busiest.processes[0].pid, signal.SIGKILL),
    )
    return answer


@pytest.mark.slow
async def test_without_a_wait_the_loss_of_all_is_unavailable_once() -> None:
    """Case 6. Promise: UNAVAILABLE, and the next replica serves the next request."""
    (request, *_) = make_asks()
    with TemporaryDirectory(prefix="wl-") as name:
        async with run_test_router() as router, asyncio.timeout(WAIT_S):
            async with running(Path(name), router, "one") as one:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await disturbed_alone(router, one, request)
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            async with running(Path(name), router, "two"):
                assert_exact([request], [await collect(router.inference.Generate(request))])


def _is_alive(pid: int) -> bool:
    """A child that ended, and was not waited for yet, is not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
