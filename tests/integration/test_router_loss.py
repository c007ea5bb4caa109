"""Two routers, and one is killed under its streams: every answer goes on at the other, without a seam."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import pytest
import yaml

from cluster import replies
from cluster.addresses import RouterAddresses, read_addresses
from cluster.client import Ask, CallError, Client
from protos import wattline_inference_pb2 as pb
from replicas.config import EngineLimits, NullEngineConfig, ParallelConfig, ReplicaConfig
from replicas.rank.null_runner import null_continuation
from replicas.supervisor.rank_group import SubprocessRankGroup
from replicas.supervisor.supervisor import Supervisor
from tests.checkpoints import make_llama
from tests.crawling_rank import MODULE, crawl_file
from tests.fake_replica import Fate
from tests.router_fixture import (
    MODEL,
    VOCAB_SIZE,
    collect,
    decode,
    fail,
    make_config,
    make_request,
    run_test_router,
    script,
    spell,
)

pytestmark = pytest.mark.processes

WAIT_S = 150.0
NUM_TOKENS = 300
PROMPT = (10, 11, 12)
NULL = NullEngineConfig(step_ms=4.0, vocab_size=VOCAB_SIZE, context_tokens=512)
NUM_BEFORE = 3
"""Tokens that the caller has when the router is killed; the replica crawls until then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterChild:
    process: asyncio.subprocess.Process
    addresses: RouterAddresses
    crawl: Path
    """While it is there, the replica crawls."""


@asynccontextmanager
async def router_child(folder: Path, name: str, model: dict[str, Any]) -> AsyncIterator[RouterChild]:
    """A router in a process of its own; all of one folder share a secret."""
    own = folder / name
    own.mkdir()
    config = {
        "models": [model],
        "router": {"grpc_port": 0, "http_port": 0, "link_port": 0, "secret_file": str(folder / "secret")},
        "runtime_dir": str(own),
    }
    path, addresses = own / "wattline.yaml", own / "router.json"
    path.write_text(yaml.safe_dump(config))
    with (own / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "cluster.edge", "-f", str(path), stdout=log, stderr=log
        )
    try:
        while not addresses.exists():
            assert process.returncode is None, (own / "log").read_text()
            await asyncio.sleep(0.02)
        yield RouterChild(process=process, addresses=read_addresses(addresses), crawl=crawl_file(folder))
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@asynccontextmanager
async def two_routers(
    *, model: dict[str, Any] | None = None, **changes: Any
) -> AsyncIterator[tuple[RouterChild, RouterChild]]:
    """Two routers and one replica that is attached to both."""
    section = {"name": MODEL, "source": "null", "null_engine": {"vocab_size": VOCAB_SIZE}, **(model or {})}
    async with AsyncExitStack() as stack, asyncio.timeout(WAIT_S):
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="wl-", dir="/tmp")))
        (folder / "secret").write_text("s" * 64)
        routers = [
            await stack.enter_async_context(router_child(folder, name, section)) for name in ("a", "b")
        ]
        told = ReplicaConfig(
            model=MODEL,
            source="null",
            replica_id="one",
            routers=tuple(router.addresses.link for router in routers),
            limits=EngineLimits(max_sequences=32, max_waiting=64, num_blocks=1024),
            null=NULL,
            runtime_dir=str(folder / "r"),
            shared_dir=str(folder),
            ready_timeout_s=WAIT_S,
            stall_floor_s=WAIT_S,
        )
        config = replace(told, **changes)
        ranks = SubprocessRankGroup(runtime_dir=Path(config.runtime_dir), module=MODULE)
        supervisor = Supervisor(config, ranks, lambda _: None, first_link_timeout_s=WAIT_S)
        stack.push_async_callback(supervisor.stop)
        await supervisor.start()
        for router in routers:
            await attached(router)
        yield routers[0], routers[1]


async def attached(router: RouterChild) -> None:
    def count() -> int:
        with Client(router.addresses.grpc) as client:
            return len(client.status().models[0].replicas)

    while not await asyncio.to_thread(count):  # noqa: ASYNC110
        await asyncio.sleep(0.02)


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    token_ids: tuple[int, ...]
    text: str
    final: replies.Final


def answer(client: Client, ask: Ask, on_token: Any = lambda count: None) -> Said:
    """One whole answer; `on_token` is called with the number of tokens after every piece."""
    ids: list[int] = []
    text = ""
    for event in client.generate(MODEL, PROMPT, ask):
        if isinstance(event, replies.Final):
            return Said(token_ids=tuple(ids), text=text, final=event)
        ids.extend(event.token_ids)
        text += event.text
        on_token(len(ids))
    raise AssertionError("an answer ends with its final message")


def kill_midway(router: RouterChild) -> Any:
    """The replica crawls until the caller has a few tokens and the router is dead, then it hurries."""
    router.crawl.touch()

    def on_token(num_tokens: int) -> None:
        if num_tokens >= NUM_BEFORE and router.crawl.exists():
            os.kill(router.process.pid, signal.SIGKILL)
            router.crawl.unlink()

    return on_token


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "seed drawn by the server"])
async def test_a_stream_outlives_its_router(temperature: float) -> None:
    ask = Ask(temperature=temperature, max_tokens=NUM_TOKENS, ignore_eos=True)
    async with two_routers() as (first, second):
        with Client(f"{first.addresses.grpc},{second.addresses.grpc}") as client:
            said = await asyncio.to_thread(answer, client, ask, kill_midway(first))
            with pytest.raises(CallError) as caught:  # Whoever does not want it is told.
                left = replace(ask, resume=False)
                await asyncio.to_thread(answer, client, left, kill_midway(second))
    assert caught.value.code == "UNAVAILABLE"
    (resumed_at,) = said.final.resumed_at
    assert NUM_BEFORE <= resumed_at < NUM_TOKENS == len(said.token_ids)
    assert said.final.usage.completion_tokens == NUM_TOKENS
    assert said.final.usage.prompt_tokens == len(PROMPT)
    if temperature == 0.0:
        assert said.token_ids == null_continuation(PROMPT, NUM_TOKENS, NULL)


async def test_a_real_model_goes_on_with_the_same_draws(tmp_path: Path) -> None:
    source = str(make_llama(tmp_path / "checkpoint", seed=10))
    limits = EngineLimits(max_sequences=8, step_tokens=64, block_tokens=8, num_blocks=512, context_tokens=300)
    ask = Ask(temperature=1.0, top_p=0.9, seed=7, max_tokens=150, ignore_eos=True)
    changes: dict[str, Any] = {
        "source": source,
        "limits": limits,
        "parallel": ParallelConfig(),
        "meter": "fake",
    }
    async with two_routers(**changes) as (first, second):
        with Client(f"{first.addresses.grpc},{second.addresses.grpc}") as client:
            calm = await asyncio.to_thread(answer, client, ask)
            shaken = await asyncio.to_thread(answer, client, ask, kill_midway(first))
    assert shaken.final.resumed_at and not calm.final.resumed_at
    assert (shaken.token_ids, shaken.text) == (calm.token_ids, calm.text)


async def test_a_token_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s" * 64)
    config = make_config(router={"secret_file": str(tmp_path / "secret")})
    request = make_request(max_tokens=20, sampling=pb.Sampling(temperature=1.0))
    async with run_test_router(config) as first, run_test_router(config) as second:
        async with first.replica() as old:
            answered = await collect(first.inference.Generate(request))
        (token,) = [delta.resume_token for delta in answered.deltas if delta.resume_token]

        def rest(**changes: Any) -> pb.GenerateRequest:
            again = pb.GenerateRequest()
            again.CopyFrom(request)
            again.resume.CopyFrom(
                pb.Resume(**{"token": token, "token_ids": answered.token_ids[:5], **changes})
            )
            return again

        async with second.replica(cached_tokens=9) as new:
            resumed = await collect(second.inference.Generate(rest()))
            usage = resumed.final.usage
            assert (usage.prompt_tokens, usage.cached_tokens) == (5, 5), "of the caller's own prompt"
            assert answered.token_ids[:5] + resumed.token_ids == answered.token_ids
            queue = second.router._streams._gates[MODEL]._queue
            tenant = second.router._tenants.account("default").tenant
            assert queue.counter(tenant) == 2.0 * len(answered.token_ids), "it counts as any other"
            (begun,), (gone_on,) = old.received("submit"), new.received("submit")
            assert gone_on.submit.sampling.seed == begun.submit.sampling.seed
            assert gone_on.submit.first_offset == 5
            assert decode(answered.token_ids[:5]) + resumed.text == answered.text
            longer, choices = rest(), rest()
            longer.limits.max_tokens = 30
            choices.sampling.n = 2
            refused = {
                "was not made by these routers": rest(token=token[:-1] + bytes([token[-1] ^ 1])),
                "belongs to another request": longer,
                "has its 20 tokens; nothing is left to resume": rest(token_ids=answered.token_ids),
            }
            for reason, bad in refused.items():
                error = await fail(second.inference.Generate(bad))
                assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
                assert reason in (error.details() or "")
            invalid = await fail(second.inference.Generate(choices))
            assert invalid.code() is grpc.StatusCode.INVALID_ARGUMENT
        async with second.replica(weights_digest="other"):
            error = await fail(second.inference.Generate(rest()))
            assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert "no replica has the weights that began this answer" in (error.details() or "")


async def test_an_answer_that_ended_has_nothing_left(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s" * 64)
    config = make_config(router={"secret_file": str(tmp_path / "secret")})
    request = make_request(max_tokens=20, stop=["xyz"])
    tokens = script(*spell("ab xyz cd"))
    async with run_test_router(config) as router, router.replica(tokens=tokens):
        answered = await collect(router.inference.Generate(request))
        (token,) = [delta.resume_token for delta in answered.deltas if delta.resume_token]
        request.resume.CopyFrom(pb.Resume(token=token, token_ids=answered.token_ids[:-2]))
        resumed = await collect(router.inference.Generate(request))
        sent = "".join(delta.text for delta in answered.deltas)
        assert sent.endswith(resumed.text) and resumed.deltas[-1].finish_reason == pb.FINISH_REASON_STOP
        request.resume.token_ids[:] = answered.token_ids
        error = await fail(router.inference.Generate(request))
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "the answer ended with these tokens" in (error.details() or "")


@pytest.mark.parametrize(
    ("token_index", "code"), [(0, grpc.StatusCode.UNAVAILABLE), (-1, grpc.StatusCode.ABORTED)]
)
async def test_what_a_replica_died_under_is_known_to_the_next_router(
    tmp_path: Path, token_index: int, code: grpc.StatusCode
) -> None:
    """The first token knows of no death yet, the newest one does: a second death is blamed on its request."""
    (tmp_path / "secret").write_text("s" * 64)
    config = make_config(router={"secret_file": str(tmp_path / "secret")})
    request = make_request(max_tokens=20)
    messages: list[pb.GenerateResponse] = []
    async with asyncio.timeout(WAIT_S), run_test_router(config) as first, run_test_router(config) as second:
        old, new = first.replica(), second.replica()
        await old.attach()
        old.running.clear()
        call = first.inference.Generate(request)
        await old.wait_command("submit")
        for _ in range(6):
            await old.step()
        await old.end(Fate.FAILED)
        with pytest.raises(grpc.aio.AioRpcError) as lost:
            async for message in call:
                messages.append(message)
        assert lost.value.code() is grpc.StatusCode.UNAVAILABLE
        tokens = [message.delta.resume_token for message in messages if message.delta.resume_token]
        token_ids = [token_id for message in messages for token_id in message.delta.token_ids]
        assert len(tokens) == 2 and len(token_ids) == 6
        request.resume.CopyFrom(pb.Resume(token=tokens[token_index], token_ids=token_ids))
        await new.attach()
        new.running.clear()
        call = second.inference.Generate(request)
        await new.wait_command("submit")
        await new.end(Fate.FAILED)
        assert (await fail(call)).code() is code
