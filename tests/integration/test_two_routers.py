"""Two router processes on one port, as `wattline up` keeps them: kills and rolls cost no stream."""

from __future__ import annotations

import asyncio
import os
import signal
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import grpc
import pytest

from cluster.access import ASK_AGAIN
from cluster.client import Ask, Client
from cluster.config import parse_config
from cluster.serving.router_group import RouterGroup
from cluster.serving.run_folder import RunFolder
from protos import wattline_cluster_pb2 as cluster_pb
from protos import wattline_cluster_pb2_grpc as cluster_grpc
from protos import wattline_inference_pb2 as pb
from protos import wattline_inference_pb2_grpc as inference_grpc
from replicas.config import EngineLimits, NullEngineConfig, ReplicaConfig
from replicas.rank.null_runner import null_continuation
from replicas.supervisor.rank_group import SubprocessRankGroup
from replicas.supervisor.supervisor import Supervisor
from tests.router_fixture import MODEL, VOCAB_SIZE, collect

pytestmark = pytest.mark.processes

WAIT_S = 150.0
NULL = NullEngineConfig(step_ms=3.0, vocab_size=VOCAB_SIZE, context_tokens=512)
PROMPT = (10, 11, 12)
NUM_TOKENS = 40
NUM_CALLERS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Two:
    """A group of two routers, tended, and one replica attached to both."""

    group: RouterGroup
    folder: RunFolder

    @property
    def address(self) -> str:
        return self.group.addresses[0].grpc

    def pids(self) -> list[int]:
        """Of the routers that listen now."""
        return list(self.folder.router_pids().values())


@asynccontextmanager
async def two_routers() -> AsyncIterator[Two]:
    async with AsyncExitStack() as stack, asyncio.timeout(WAIT_S):
        path = Path(stack.enter_context(TemporaryDirectory(prefix="wl-", dir="/tmp")))
        folder = RunFolder(path)
        model = {"name": MODEL, "source": "null", "null_engine": {"vocab_size": VOCAB_SIZE}}
        ports = {"grpc_port": 0, "http_port": 0, "link_port": 0, "processes": 2}
        config = parse_config({"models": [model], "router": ports, "runtime_dir": str(path)})
        group = RouterGroup(config, folder)
        stack.callback(group.stop)
        group.start()
        while group.poll_addresses() is None:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        replica = ReplicaConfig(
            model=MODEL,
            source="null",
            replica_id="one",
            routers=tuple(one.link for one in group.addresses),
            limits=EngineLimits(max_sequences=32, max_waiting=64, num_blocks=1024),
            null=NULL,
            runtime_dir=str(path / "r"),
            shared_dir=str(path),
            ready_timeout_s=WAIT_S,
            stall_floor_s=WAIT_S,
        )
        ranks = SubprocessRankGroup(runtime_dir=Path(replica.runtime_dir))
        supervisor = Supervisor(replica, ranks, lambda _: None, first_link_timeout_s=WAIT_S)
        stack.push_async_callback(supervisor.stop)
        await supervisor.start()
        tending = asyncio.create_task(tend(group))
        stack.callback(tending.cancel)
        two = Two(group=group, folder=folder)
        for index in range(2):
            await attached(f"unix:{folder.router_socket(index)}")
        yield two


async def tend(group: RouterGroup) -> None:
    while True:
        await asyncio.sleep(0.05)
        group.tend()


async def attached(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        status, request = cluster_grpc.ClusterStub(channel).Status, cluster_pb.StatusRequest()
        while not (await status(request, wait_for_ready=True)).models[0].replicas:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():  # noqa: ASYNC110
        await asyncio.sleep(0.05)


def make_ask() -> pb.GenerateRequest:
    return pb.GenerateRequest(
        model=MODEL,
        tokens=pb.TokenIds(ids=PROMPT),
        sampling=pb.Sampling(temperature=0.0),
        limits=pb.Limits(max_tokens=NUM_TOKENS, ignore_eos=True),
    )


async def keep_asking(address: str, is_enough: asyncio.Event) -> int:
    """Plain gRPC, a new connection every three answers: how many answers, all of them whole.

    `wait_for_ready`: the kernel resets a connection that the leaving router had not accepted yet.
    """
    expected = list(null_continuation(PROMPT, NUM_TOKENS, NULL))
    count = 0
    while not is_enough.is_set():
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.service_config", ASK_AGAIN)]
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            stub = inference_grpc.InferenceStub(channel)
            for _ in range(3):
                call = stub.Generate(make_ask(), wait_for_ready=True)
                assert (await collect(call)).token_ids == expected
                count += 1
    return count


async def test_a_roll_loses_no_stream() -> None:
    async with two_routers() as two:
        before, is_enough = two.pids(), asyncio.Event()
        asking = [asyncio.create_task(keep_asking(two.address, is_enough)) for _ in range(NUM_CALLERS)]
        two.group.roll()
        await until(lambda: len(two.pids()) == 2 and not set(two.pids()) & set(before))
        is_enough.set()
        counts = await asyncio.gather(*asking)
    assert all(counts)


async def test_each_knows_what_the_other_did_and_outlives_it() -> None:
    async with two_routers() as two:
        first, second = (f"unix:{two.folder.router_socket(index)}" for index in range(2))
        async with grpc.aio.insecure_channel(first) as one, grpc.aio.insecure_channel(second) as other:
            for here, there in ((one, other), (other, one)):
                answer = await collect(inference_grpc.InferenceStub(here).Generate(make_ask()))
                asked = pb.GetEnergyRequest(request_id=answer.final.request_id)
                found = await inference_grpc.InferenceStub(there).GetEnergy(asked)
                assert found.usage.completion_tokens == NUM_TOKENS
        pages = [
            await asyncio.to_thread(read, f"http://{one.metrics}/metrics") for one in two.group.addresses
        ]
        assert all(f'wattline_requests_total{{code="OK",model="{MODEL}"}} 1.0' in page for page in pages)
        await outlive_the_first(two)


async def outlive_the_first(two: Two) -> None:
    """Whichever took the stream, it goes on; and the dead one comes back."""
    before = two.pids()
    to_kill = [before[0]]

    def ask_and_kill() -> tuple[int, ...]:
        ids: list[int] = []
        with Client(two.address) as client:
            ask = Ask(temperature=0.0, max_tokens=200, ignore_eos=True)
            for event in client.generate(MODEL, PROMPT, ask):
                ids.extend(getattr(event, "token_ids", ()))
                if len(ids) >= 20 and to_kill:
                    os.kill(to_kill.pop(), signal.SIGKILL)
        return tuple(ids)

    assert await asyncio.to_thread(ask_and_kill) == null_continuation(PROMPT, 200, NULL)
    await until(lambda: before[0] not in two.pids() and len(two.pids()) == 2)
    await attached(f"unix:{two.folder.router_socket(0)}")


def read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=WAIT_S) as answer:
        return str(answer.read(), "utf-8")
