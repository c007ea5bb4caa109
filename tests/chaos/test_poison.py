"""A request that its replica dies of, among others that do no harm. Case 5 of the fault matrix."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import grpc
import pytest

from replicas.config import ParallelConfig
from replicas.rank.null_runner import null_continuation
from tests.integration.test_failover_processes import GREEDY, NULL, make_ask, running, statuses, until
from tests.router_fixture import VOCAB_SIZE, TestRouter, collect, fail, make_config, run_test_router

pytestmark = [pytest.mark.processes, pytest.mark.chaos]

WAIT_S = 150.0
NUM_TOKENS = 300
STREAMING = [(110 + index, 11, 12) for index in range(3)]
NEW = [(120 + index, 11, 12) for index in range(3)]
WANTED = [null_continuation(ids, NUM_TOKENS, NULL) for ids in (*STREAMING, *NEW)]
POISON = next(token for token in range(200, VOCAB_SIZE) if all(token not in answer for answer in WANTED))
"""No other request has this token; nor has the one that a group answers before it is ready."""
POISONED = make_ask((5, POISON), GREEDY, max_tokens=NUM_TOKENS)


async def test_a_poisonous_request_kills_two_replicas_and_no_other_request() -> None:
    """Promise: it is quarantined, whether the others were streaming or came with it; they have all tokens."""
    config = make_config(router={"failover": {"wait_s": WAIT_S}})
    engine = {"parallel": ParallelConfig(), "null": replace(NULL, fail_at_token=POISON)}
    async with (
        asyncio.timeout(WAIT_S),
        run_test_router(config) as router,
        AsyncExitStack() as stack,
    ):
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="wl-")))
        await stack.enter_async_context(running(folder, router, "one", **engine))
        asks = [make_ask(ids, GREEDY, max_tokens=NUM_TOKENS) for ids in (*STREAMING, *NEW)]
        calls = [router.inference.Generate(ask) for ask in asks[: len(STREAMING)]]
        await until(router, lambda found: found[0].load.generated_tokens_total > 10 * len(STREAMING))
        calls += [router.inference.Generate(ask) for ask in asks[len(STREAMING) :]]
        # Once they are on their way: a call that comes when the only replica is dead is refused, rightly.
        await asyncio.gather(*(call.initial_metadata() for call in calls))
        poisoned = router.inference.Generate(POISONED)
        for name in ("two", "three"):
            await until(router, lambda found: not found)
            await stack.enter_async_context(running(folder, router, name, **engine))
        assert (await fail(poisoned)).code() is grpc.StatusCode.ABORTED
        answers = await asyncio.gather(*(collect(call) for call in calls))
        assert (await fail(router.inference.Generate(POISONED))).code() is grpc.StatusCode.ABORTED
        assert await names(router) == ["three"]
    assert [tuple(answer.token_ids) for answer in answers] == WANTED


async def names(router: TestRouter) -> list[str]:
    return [replica.replica_id for replica in await statuses(router)]
