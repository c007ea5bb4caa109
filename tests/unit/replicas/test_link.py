"""A replica's end of one link, against a real server: greeting, order, heartbeats, and every way to end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random

import grpc
import pytest

from protos import wattline_link_pb2 as link_pb2
from replicas.config import ReplicaConfig
from replicas.frames import Cancel, Stop, Submit
from replicas.link.link import LinkSession, RouterLink
from replicas.link.links import LinkPool, resolve_target
from replicas.link.messages import Drain, Goodbye, ReplicaCard, ReplicaLoad, RouterCommand
from replicas.link.outbox import Outbox
from replicas.link.protocol import PROTOCOL_VERSION
from replicas.request import (
    CacheChange,
    EngineCosts,
    EngineReady,
    FinishReason,
    LoadSnapshot,
    SamplingParams,
    SequenceDelta,
)
from replicas.supervisor.rank_group import RankProcess
from replicas.wire.requests import request_from_wire
from tests.small_router import WAIT_S, SmallRouter

LOAD = LoadSnapshot(
    step=4,
    running=(1,),
    waiting=(0,),
    waiting_prefill_tokens=(0,),
    free_blocks=(7,),
    total_blocks=(8,),
)
CARD = ReplicaCard(
    config=ReplicaConfig(model="m", source="null", replica_id="r", routers=()),
    epoch=3,
    engine=EngineReady(
        architecture="Null",
        lanes=1,
        context_tokens=64,
        max_sequences=2,
        vocab_size=100,
        block_tokens=16,
        weights_digest="w",
        dtype="float32",
        device="cpu",
        eos_token_ids=(2,),
        costs=EngineCosts(
            active_params=1,
            shared_weight_bytes=1,
            expert_bytes=0,
            num_layers=1,
            attention_dim=1,
            kv_bytes_per_token=1,
        ),
        load=LOAD,
    ),
    ranks=(RankProcess(rank=0, pid=11, device="cpu", node="far", address="10.0.0.7"),),
    tokenizer_digest="t",
    engine_version="0.1.0",
    host="h",
    supervisor_pid=10,
    metrics_address="127.0.0.1:1",
)


BLOCK = bytes(16)


@dataclass
class Recorder:
    """A LinkHandler that remembers."""

    card: ReplicaCard = CARD
    sessions: list[LinkSession] = field(default_factory=list)
    commands: list[RouterCommand] = field(default_factory=list)
    lost_reasons: list[str] = field(default_factory=list)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    def cache(self) -> tuple[CacheChange, ...]:
        return (CacheChange(lane=0, added=(BLOCK,), is_snapshot=True),)

    def load(self) -> ReplicaLoad:
        return ReplicaLoad(engine=LOAD, energy_source="fake", power_w=80.0)

    def ledger(self) -> None:
        """No meter spoke."""

    def on_attached(self, session: LinkSession) -> None:
        self.sessions.append(session)
        self._notify()

    def on_command(self, session: LinkSession, command: RouterCommand) -> None:
        assert session is self.sessions[-1]
        self.commands.append(command)
        self._notify()

    def on_lost(self, session: LinkSession, reason: str) -> None:
        self.lost_reasons.append(reason)
        self._notify()

    async def wait(self, *, num_sessions: int = 0, num_commands: int = 0, num_lost: int = 0) -> None:
        def is_enough() -> bool:
            return (
                len(self.sessions) >= num_sessions
                and len(self.commands) >= num_commands
                and len(self.lost_reasons) >= num_lost
            )

        async with asyncio.timeout(WAIT_S), self.changed:
            await self.changed.wait_for(is_enough)

    def _notify(self) -> None:
        async def notify() -> None:
            async with self.changed:
                self.changed.notify_all()

        self.notifying = asyncio.ensure_future(notify())


@asynccontextmanager
async def linked(router: SmallRouter, *, max_pending_bytes: int = 1 << 20) -> AsyncIterator[Recorder]:
    recorder = Recorder()
    link = RouterLink(
        target=router.address,
        handler=recorder,
        attached={},
        random=Random(1),
        make_outbox=lambda: Outbox(max_pending_bytes=max_pending_bytes),
    )
    task = asyncio.create_task(link.run())
    try:
        await recorder.wait(num_sessions=1)
        yield recorder
    finally:
        task.cancel()
        await asyncio.wait({task})


async def test_hello_says_who_this_is() -> None:
    async with SmallRouter() as router, linked(router):
        replica = await router.attached()
        hello = replica.hello
        assert (hello.protocol, hello.replica_id, hello.model, replica.epoch) == (
            PROTOCOL_VERSION,
            "r",
            "m",
            3,
        )
        assert (hello.weights_digest, hello.tokenizer_digest, hello.energy_source) == ("w", "t", "fake")
        assert (list(hello.load.free_blocks), hello.load.power_w) == ([7], 80.0)
        assert hello.ranks[0] == link_pb2.RankProcess(rank=0, pid=11, device="cpu", address="10.0.0.7")


@pytest.mark.parametrize("context", ["", "00-ab-cd-01", f"00-{'A' * 32}-{'0' * 16}-01", "x\ntraces=y"])
def test_a_trace_context_that_is_none_gets_into_no_log(context: str) -> None:
    whole = f"00-{'a' * 32}-{'0' * 16}-01"
    told = [request_from_wire(link_pb2.Submit(traceparent=text), now_ns=0) for text in (whole, context)]
    assert [request.trace_id for request in told] == ["a" * 32, ""]


async def test_commands_come_down_in_order() -> None:
    async with SmallRouter() as router, linked(router) as recorder:
        replica = await router.attached()
        replica.submit(5, prompt_ids=(1, 2), max_tokens=9)
        replica.stop(5)
        replica.cancel(5)
        replica.send(link_pb2.ToReplica(drain=link_pb2.Drain(reason="update")))
        await recorder.wait(num_commands=4)
        submit, *rest = recorder.commands
        assert isinstance(submit, Submit)
        request = submit.request
        assert (request.request_id, request.prompt_ids, request.max_tokens) == (5, (1, 2), 9)
        assert (request.sampling, request.deadline_ns) == (SamplingParams(), None)
        assert rest == [Stop(request_id=5), Cancel(request_id=5), Drain(reason="update")]


async def test_tokens_go_up_in_order_whatever_is_merged() -> None:
    async with SmallRouter() as router, linked(router) as recorder:
        replica = await router.attached()
        outbox = recorder.sessions[0].outbox
        for offset in range(100):
            outbox.add_tokens(offset, [(1, 2, offset, (offset,))])
            if offset % 3 == 0:
                await asyncio.sleep(0)
        await replica.wait(lambda: len(replica.token_ids(1)) == 100, "all tokens")
        assert replica.token_ids(1) == list(range(100))
        assert len(replica.deltas[1]) <= 100
        assert replica.epochs == {3}


async def test_an_idle_link_beats() -> None:
    async with SmallRouter() as router, linked(router):
        replica = await router.attached()
        await replica.wait(lambda: replica.num_heartbeats >= 2, "two heartbeats")
        assert replica.loads[-1].step == LOAD.step


async def test_a_router_that_hangs_up_is_dialled_again() -> None:
    async with SmallRouter() as router, linked(router) as recorder:
        (await router.attached()).hang_up()
        await recorder.wait(num_sessions=2, num_lost=1)
        await router.attached()
        assert recorder.sessions[0] is not recorder.sessions[1]


async def test_a_router_that_does_not_read_loses_its_link() -> None:
    async with SmallRouter() as router, linked(router, max_pending_bytes=4_000_000) as recorder:
        replica = await router.attached()
        replica.is_reading.clear()
        outbox = recorder.sessions[0].outbox
        for offset in range(0, 40_000_000, 50_000):
            outbox.add_tokens(offset, [(1, 2, offset, (99_999,) * 50_000)])
            await asyncio.sleep(0)
            if recorder.lost_reasons:
                break
        await recorder.wait(num_lost=1)
        assert "reads too slowly" in recorder.lost_reasons[0]
        replica.is_reading.set()


async def test_a_router_that_does_not_welcome_is_dialled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replicas.link.link.WELCOME_TIMEOUT_S", 0.05)
    dials: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()
    server = await asyncio.start_server(lambda _reader, writer: dials.put_nowait(writer), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    recorder = Recorder()
    link = RouterLink(target=f"127.0.0.1:{port}", handler=recorder, attached={})
    task = asyncio.create_task(link.run())
    async with asyncio.timeout(WAIT_S):
        for _ in range(2):
            (await dials.get()).close()
    assert recorder.sessions == []
    task.cancel()
    await asyncio.wait({task})
    server.close()


class LateCancel(Outbox):
    """Cancels the link's task while its stream is being torn down: only then does the wait for this end."""

    task: asyncio.Task[None]

    async def overflow(self) -> None:
        try:
            await super().overflow()
        except asyncio.CancelledError:
            self.task.cancel()
            raise


async def test_a_link_that_is_cancelled_while_its_stream_breaks_is_dialled_no_more() -> None:
    recorder, outbox = Recorder(), LateCancel()
    async with SmallRouter() as router, asyncio.timeout(WAIT_S):
        link = RouterLink(
            target=router.address, handler=recorder, attached={}, random=Random(1), make_outbox=lambda: outbox
        )
        outbox.task = asyncio.create_task(link.run())
        (await router.attached()).hang_up()
        await asyncio.wait({outbox.task})
    assert outbox.task.cancelled() and len(recorder.sessions) == 1


class Babbler(grpc.GenericRpcHandler):
    """A router that says these bytes, and then listens until it is left."""

    def __init__(self, *says: bytes) -> None:
        self._says = says
        self.is_left = asyncio.Event()

    def service(self, _details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        return grpc.stream_stream_rpc_method_handler(self._attach)

    async def _attach(
        self, messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> None:
        try:
            for said in self._says:
                await context.write(said)
            async for _ in messages:
                pass
        finally:
            self.is_left.set()


WELCOME = link_pb2.ToReplica(welcome=link_pb2.Welcome(router_id="a")).SerializeToString()


@pytest.mark.parametrize(("says", "is_welcome"), [((b"\xff",), False), ((WELCOME, b"\xff"), True)])
async def test_a_router_that_babbles_is_left(says: tuple[bytes, ...], is_welcome: bool) -> None:
    server, babbler, recorder = grpc.aio.server(), Babbler(*says), Recorder()
    server.add_generic_rpc_handlers((babbler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    link = RouterLink(target=f"127.0.0.1:{port}", handler=recorder, attached={})
    task = asyncio.create_task(link.run())
    async with asyncio.timeout(WAIT_S):
        await babbler.is_left.wait()
    task.cancel()
    await asyncio.wait({task})
    await server.stop(None)
    assert recorder.lost_reasons[:1] == (["the router sent bytes that are no command"] if is_welcome else [])


async def test_goodbye_is_the_last_word_and_arrives_behind_the_tokens() -> None:
    async with SmallRouter() as router:
        recorder = Recorder()
        pool = LinkPool(addresses=(router.address,), handler=recorder)
        task = asyncio.create_task(pool.run())
        replica = await router.attached()
        await recorder.wait(num_sessions=1)
        last = SequenceDelta(
            request_id=1, attempt=1, first_offset=0, token_ids=(7,), finish=FinishReason.STOP
        )
        recorder.sessions[0].outbox.add_deltas(1, [last])
        await pool.close(Goodbye(reason="a rank is lost", is_lost=True, num_unproven=3))
        await replica.ended()
        assert replica.token_ids(1) == [7]
        assert replica.goodbye == link_pb2.Goodbye(reason="a rank is lost", is_lost=True, num_unproven=3)
        async with asyncio.timeout(WAIT_S):
            await task


async def test_one_router_behind_two_addresses_has_one_stream() -> None:
    async with SmallRouter() as router:
        recorder = Recorder()

        async def resolve(address: str) -> tuple[str, ...]:
            return (*await resolve_target(address), f"ipv4:{address}")

        pool = LinkPool(addresses=(router.address,), handler=recorder, resolve=resolve)
        task = asyncio.create_task(pool.run())
        streams = [await router.attached() for _ in range(2)]
        # Both are welcomed; which of them the replica keeps is up to the order of its own reading.
        ends = [asyncio.create_task(stream.ended()) for stream in streams]
        done, others = await asyncio.wait(ends, timeout=WAIT_S, return_when=asyncio.FIRST_COMPLETED)
        assert len(done) == 1
        for other in others:
            other.cancel()
        assert list(pool.attached) == ["router-a"]
        assert len(recorder.sessions) == 1
        await pool.close(Goodbye(reason="done"))
        await asyncio.wait({task})


async def test_routers_that_join_the_name_are_dialled() -> None:
    async with SmallRouter("a") as first, SmallRouter("b") as second:
        recorder = Recorder()
        known = [first.address]

        async def resolve(_address: str) -> tuple[str, ...]:
            return tuple(known)

        pool = LinkPool(addresses=("routers:1",), handler=recorder, resolve=resolve, refresh_s=0.02)
        task = asyncio.create_task(pool.run())
        await first.attached()
        known[:] = [second.address]
        await second.attached()
        await recorder.wait(num_sessions=2)
        assert sorted(pool.attached) == ["a", "b"]
        await pool.close(Goodbye(reason="done"))
        await asyncio.wait({task})


async def test_addresses_resolve_to_targets() -> None:
    assert await resolve_target("unix:/run/router.sock") == ("unix:/run/router.sock",)
    assert await resolve_target("127.0.0.1:50052") == ("127.0.0.1:50052",)
    assert await resolve_target("[::1]:50052") == ("[::1]:50052",)
    with pytest.raises(ValueError, match="is not host:port"):
        await resolve_target("router")


async def test_a_router_learns_the_prefix_caches_whole_and_then_by_their_changes() -> None:
    async with SmallRouter() as router, linked(router) as recorder:
        replica = await router.attached()
        await replica.wait(lambda: replica.cache, "a snapshot")
        news = CacheChange(lane=0, added=(b"1" * 16,), removed=(BLOCK,))
        recorder.sessions[0].outbox.cache.add((news,))
        await replica.wait(lambda: len(replica.cache) == 2, "the change")
        first, second = replica.cache
        assert (first.is_snapshot, first.added, first.removed) == (True, BLOCK, b"")
        assert (second.is_snapshot, second.added, second.removed) == (False, b"1" * 16, BLOCK)
