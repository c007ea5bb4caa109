"""Callers that vanish, freeze, give up, are late, or never stop asking. Cases 13 to 16 and 18."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest

from cluster.config import Config
from protos import wattline_cluster_pb2 as cluster_pb
from protos import wattline_inference_pb2 as pb
from tests.fake_replica import FakeReplica, Fate, hash_token
from tests.router_fixture import (
    MODEL,
    VOCAB_SIZE,
    TestRouter,
    collect,
    error_details,
    fail,
    make_config,
    make_request,
    run_test_router,
    spell,
)

pytestmark = pytest.mark.chaos

WAIT_S = 150.0
NUM_STALLED = 8
FOREVER = 1_000_000
"""Tokens that no test waits for."""
Call = grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]
CLIENT = f"""
import sys
from cluster.client import Ask, Client
with Client(sys.argv[1]) as client:
    ask = Ask(temperature=0.0, max_tokens={FOREVER}, ignore_eos=True)
    for event in client.generate({MODEL!r}, "hello", ask):
        print(len(event.token_ids), flush=True)
"""


@asynccontextmanager
async def client_child(router: TestRouter, replica: FakeReplica) -> AsyncIterator[asyncio.subprocess.Process]:
    """A client in a process of its own, that has read the one step the replica made, and waits for more."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CLIENT, router.addresses.grpc, stdout=asyncio.subprocess.PIPE
    )
    try:
        await replica.wait_command("submit")
        await replica.step()
        assert process.stdout is not None and await process.stdout.readline()
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


def make_endless() -> Config:
    """Answers have no end, and little of them is held for who does not read."""
    return make_config(router={"stall_buffer_bytes": 4096}, model={"limits": {"max_output_tokens": FOREVER}})


async def until_idle(router: TestRouter) -> None:
    """Nothing is under way, and nothing waits."""
    while await active_requests(router):  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def until_queued(router: TestRouter, count: int) -> None:
    while router.num_queued != count:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def active_requests(router: TestRouter) -> int:
    return (await router.cluster.Status(cluster_pb.StatusRequest())).models[0].active_requests


def expected(count: int, text: str = "hello") -> list[int]:
    return [hash_token(spell(text), pos, vocab_size=VOCAB_SIZE) for pos in range(count)]


@pytest.mark.processes
@pytest.mark.parametrize(
    "how",
    [
        pytest.param(signal.SIGKILL, id="vanishes"),
        pytest.param(signal.SIGSTOP, id="freezes", marks=pytest.mark.slow),
    ],
)
async def test_a_caller_that_is_gone_stops_the_engine(how: signal.Signals) -> None:
    """Case 13. Promise: its request is cancelled in the engine, at once or when its buffer is full."""
    config = make_config(
        router={"stall_buffer_bytes": 4096}, model={"limits": {"max_output_tokens": FOREVER}}
    )
    async with (
        asyncio.timeout(WAIT_S),
        run_test_router(config) as router,
        router.replica(context_tokens=2 * FOREVER, step_s=0.001, tokens_per_step=32) as replica,
    ):
        replica.running.clear()
        async with client_child(router, replica) as client:
            os.kill(client.pid, how)
            replica.running.set()
            await replica.wait_command("cancel")
            await until_idle(router)
        assert replica.load().running == [0]


@pytest.mark.slow
async def test_readers_that_stall_slow_nobody_and_are_cut() -> None:
    """Case 14. Promise: what is held for a slow reader is bounded, and others have all their tokens."""
    config = make_config(
        router={"stall_buffer_bytes": 4096}, model={"limits": {"max_output_tokens": FOREVER}}
    )
    async with (
        asyncio.timeout(WAIT_S),
        run_test_router(config) as router,
        router.replica(context_tokens=2 * FOREVER, max_sequences=128, step_s=0.001) as replica,
    ):
        replica.running.clear()
        endless = make_request(max_tokens=FOREVER, ignore_eos=True)
        stalled = [router.inference.Generate(endless) for _ in range(NUM_STALLED)]
        await replica.wait_command("submit", count=len(stalled))
        replica.tokens_per_step = 256
        replica.running.set()
        answer = await collect(router.inference.Generate(make_request(max_tokens=500, ignore_eos=True)))
        assert answer.token_ids == expected(500)
        await replica.wait_command("cancel", count=len(stalled))
        for call in stalled:
            assert (await fail(call)).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await until_idle(router)


STATES = ("queued", "prefill", "decode", "failover")
NUM_AHEAD = 2
"""Requests that a replica with one row takes: one runs, one is next."""
PATIENCE_S = 4.0
"""The deadline of callers that have one: enough to get into any state, and no state ends by itself."""


@asynccontextmanager
async def caught_in(state: str, *, timeout_s: float | None = None) -> AsyncIterator[Call]:
    """A call that stays in this state until it ends from outside; then nothing of it is left."""
    config = make_config(router={"failover": {"wait_s": WAIT_S}})
    async with (
        asyncio.timeout(WAIT_S),
        run_test_router(config) as router,
        router.replica(max_sequences=1) as replica,
    ):
        replica.running.clear()
        before = [router.inference.Generate(make_request()) for _ in range(6)] if state == "queued" else []
        if before:
            await replica.wait_command("submit", count=NUM_AHEAD)
            await until_queued(router, len(before) - NUM_AHEAD)
        call = router.inference.Generate(make_request(max_tokens=40), timeout=timeout_s)
        await bring_into(state, router, replica, num_before=len(before))
        yield call
        for one in before:
            one.cancel()
        await until_idle(router)
        if state == "failover":
            return
        replica.running.set()
        answer = await collect(router.inference.Generate(make_request()))
        assert answer.token_ids == expected(8)
        assert replica.load().running == [0]


async def bring_into(state: str, router: TestRouter, replica: FakeReplica, *, num_before: int) -> None:
    if state == "queued":
        await until_queued(router, num_before - NUM_AHEAD + 1)
        return
    await replica.wait_command("submit")
    if state != "prefill":
        await replica.step()
    if state == "failover":
        await replica.end(Fate.KILLED)


@pytest.mark.parametrize("state", STATES)
async def test_a_cancelled_call_leaves_nothing_behind(state: str) -> None:
    """Case 15. Promise: cancelled in any state it ends once, and its place and its row are free."""
    async with caught_in(state) as call:
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await collect(call)
        assert await call.code() is grpc.StatusCode.CANCELLED


@pytest.mark.slow
@pytest.mark.parametrize("state", STATES)
async def test_a_late_call_ends_once_and_leaves_nothing_behind(state: str) -> None:
    """Case 16. Promise: DEADLINE_EXCEEDED in any state, once, and nothing is kept for it."""
    async with caught_in(state, timeout_s=PATIENCE_S) as call:
        assert (await fail(call)).code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_storm_of_retries_is_told_to_wait_and_passes() -> None:
    """Case 18. Promise: a full router refuses with a time to come back, and serves at once when it has room.

    The callers ignore what they are told, as the worst do.
    """
    async with (
        asyncio.timeout(WAIT_S),
        run_test_router(make_config(router={"max_streams": 2})) as router,
        router.replica() as replica,
    ):
        replica.running.clear()
        inside = [router.inference.Generate(make_request()) for _ in range(2)]
        await replica.wait_command("submit", count=2)
        for _ in range(10):
            storm = [fail(router.inference.Generate(make_request())) for _ in range(20)]
            for error in await asyncio.gather(*storm):
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert error_details(error)["RetryInfo"].retry_delay.ToMilliseconds() > 0
        assert len(replica.received("submit")) == 2
        replica.running.set()
        for call in inside:
            assert (await collect(call)).token_ids == expected(8)
        await until_idle(router)
        assert (await collect(router.inference.Generate(make_request()))).token_ids == expected(8)
