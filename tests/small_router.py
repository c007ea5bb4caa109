"""The smallest router there can be: a link server that records what replicas say and sends what it is told.

For tests of a replica's end of the link, over real gRPC on loopback.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import TypeAlias

from grpc import aio

from protos import wattline_link_pb2 as link_pb2
from protos.wattline_link_pb2_grpc import ReplicaLinkServicer, add_ReplicaLinkServicer_to_server
from replicas.wire.deltas import delta_to_wire
from replicas.wire.steps import columns_from_wire

WAIT_S = 150.0

Context: TypeAlias = "aio.ServicerContext[link_pb2.FromReplica, link_pb2.ToReplica]"


class AttachedReplica:
    """One stream: everything that came up, and a way down. `wait` is the only way to wait."""

    def __init__(self, hello: link_pb2.FromReplica) -> None:
        self.epoch = hello.epoch
        self.hello = hello.hello
        self.deltas: dict[int, list[link_pb2.SequenceDelta]] = defaultdict(list)
        self.energy: dict[int, list[link_pb2.RequestEnergy]] = defaultdict(list)
        self.loads: list[link_pb2.LoadSnapshot] = []
        self.steps: list[int] = []
        self.cache: list[link_pb2.CacheChange] = []
        self.heats: list[link_pb2.ExpertHeat] = []
        self.num_heartbeats = 0
        self.epochs = {hello.epoch}
        self.draining: str | None = None
        self.goodbye: link_pb2.Goodbye | None = None
        self.has_ended = False
        self.is_reading = asyncio.Event()
        self.is_reading.set()
        self._commands: asyncio.Queue[link_pb2.ToReplica | None] = asyncio.Queue()
        self._changed = asyncio.Condition()

    def send(self, command: link_pb2.ToReplica) -> None:
        self._commands.put_nowait(command)

    def submit(
        self,
        request_id: int,
        prompt_ids: Sequence[int] = (5, 6, 7),
        *,
        max_tokens: int = 8,
        attempt: int = 1,
        deadline_ms: int = 0,
        lane: int = 0,
    ) -> None:
        submit = link_pb2.Submit(
            request_id=request_id,
            attempt=attempt,
            prompt_ids=prompt_ids,
            max_tokens=max_tokens,
            sampling=link_pb2.EngineSampling(top_p=1.0),
            deadline_ms=deadline_ms,
            lane=lane,
            traceparent=f"00-{request_id:032x}-{request_id:016x}-01",
        )
        self.send(link_pb2.ToReplica(submit=submit))

    def cancel(self, request_id: int) -> None:
        self.send(link_pb2.ToReplica(cancel=link_pb2.Cancel(request_id=request_id)))

    def stop(self, request_id: int) -> None:
        self.send(link_pb2.ToReplica(stop=link_pb2.Stop(request_id=request_id)))

    def hang_up(self) -> None:
        """End the stream from the router's side."""
        self._commands.put_nowait(None)

    def token_ids(self, request_id: int) -> list[int]:
        return [token for delta in self.deltas[request_id] for token in delta.token_ids]

    def last_delta(self, request_id: int) -> link_pb2.SequenceDelta | None:
        deltas = self.deltas[request_id]
        return deltas[-1] if deltas and deltas[-1].finish else None

    def final_energy(self, request_id: int) -> link_pb2.RequestEnergy | None:
        return next((entry for entry in self.energy[request_id] if entry.final), None)

    async def wait(self, predicate: Callable[[], object], what: str) -> None:
        """Until `predicate` holds; asked again after every message."""
        try:
            async with asyncio.timeout(WAIT_S), self._changed:
                await self._changed.wait_for(predicate)
        except TimeoutError:
            raise AssertionError(f"waited {WAIT_S:g} s in vain: {what}") from None

    async def finished(self, request_id: int) -> link_pb2.SequenceDelta:
        await self.wait(lambda: self.last_delta(request_id), f"the end of request {request_id}")
        last = self.last_delta(request_id)
        assert last is not None
        return last

    async def billed(self, request_id: int) -> link_pb2.RequestEnergy:
        await self.wait(lambda: self.final_energy(request_id), f"the bill of request {request_id}")
        bill = self.final_energy(request_id)
        assert bill is not None
        return bill

    async def ended(self) -> None:
        await self.wait(lambda: self.has_ended, "the end of the stream")

    async def take(self, message: link_pb2.FromReplica | None) -> None:
        """Record one message; None: the stream ended."""
        async with self._changed:
            if message is None:
                self.has_ended = True
            else:
                self._record(message)
            self._changed.notify_all()

    def _record(self, message: link_pb2.FromReplica) -> None:
        self.epochs.add(message.epoch)
        self.cache.extend(message.cache)
        if message.HasField("experts"):
            self.heats.append(message.experts)
        match message.WhichOneof("event"):
            case "step":
                self.steps.append(message.step.step)
                self.loads.append(message.step.load)
                plain = [delta_to_wire(delta) for delta in columns_from_wire(message.step.tokens).deltas()]
                for delta in (*plain, *message.step.deltas):
                    self.deltas[delta.request_id].append(delta)
            case "heartbeat":
                self.num_heartbeats += 1
                self.loads.append(message.heartbeat.load)
            case "energy":
                for entry in message.energy.requests:
                    self.energy[entry.request_id].append(entry)
            case "draining":
                self.draining = message.draining.reason
            case "goodbye":
                self.goodbye = message.goodbye

    async def commands(self) -> AsyncIterator[link_pb2.ToReplica]:
        while (command := await self._commands.get()) is not None:
            yield command


class SmallRouter(ReplicaLinkServicer):
    """A link server on a free loopback port. `attached` yields its streams in order of their Hello."""

    def __init__(self, router_id: str = "router-a", *, port: int = 0) -> None:
        self._router_id = router_id
        self._port = port
        self._attached: asyncio.Queue[AttachedReplica] = asyncio.Queue()
        self.address = ""

    async def __aenter__(self) -> SmallRouter:
        self._server = aio.server(
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.http2.min_ping_interval_without_data_ms", 500),
                ("grpc.http2.max_ping_strikes", 0),
            ]
        )
        add_ReplicaLinkServicer_to_server(self, self._server)
        self._port = self._server.add_insecure_port(f"127.0.0.1:{self._port}")
        self.address = f"127.0.0.1:{self._port}"
        await self._server.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._server.stop(grace=0)

    @property
    def port(self) -> int:
        return self._port

    @property
    def num_waiting(self) -> int:
        """Streams that greeted and were not asked for."""
        return self._attached.qsize()

    async def attached(self) -> AttachedReplica:
        async with asyncio.timeout(WAIT_S):
            return await self._attached.get()

    async def Attach(  # type: ignore[override]  # noqa: N802
        self, request_iterator: AsyncIterator[link_pb2.FromReplica], context: Context
    ) -> None:
        replica = AttachedReplica(await anext(request_iterator))
        await context.write(link_pb2.ToReplica(welcome=link_pb2.Welcome(router_id=self._router_id)))
        self._attached.put_nowait(replica)
        reader = asyncio.create_task(_read(replica, request_iterator))
        writer = asyncio.create_task(_write(replica, context))
        try:
            await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            reader.cancel()
            writer.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)
            await replica.take(None)


async def _read(replica: AttachedReplica, messages: AsyncIterator[link_pb2.FromReplica]) -> None:
    async for message in messages:
        await replica.is_reading.wait()
        await replica.take(message)


async def _write(replica: AttachedReplica, context: Context) -> None:
    async for command in replica.commands():
        await context.write(command)
