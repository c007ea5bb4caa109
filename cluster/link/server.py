"""The router's side of the replica link: `wattline.v1.ReplicaLink/Attach`.

Replicas dial in. A stream is: Hello up, Welcome down, then steps, heartbeats and joules up, and work down.
When it ends, for whatever reason, the replica is forgotten; what it served goes on elsewhere, or fails.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from time import monotonic
from typing import Any, TypeAlias

import grpc

from cluster.link.detokenize_worker import DetokenizeWorker
from cluster.link.messages import parse_heat, parse_ledger
from cluster.link.plausibility import load_problem, strike_untrue
from cluster.link.reader_pace import ReaderPace
from cluster.link.replica_connection import ReplicaConnection
from cluster.link.replica_pool import ReplicaPool
from cluster.served_model import ServedModel
from cluster.telemetry.metrics import RouterMetrics
from protos import wattline_link_pb2 as link
from protos import wattline_link_pb2_grpc as link_grpc
from replicas.link.protocol import PROTOCOL_VERSION
from replicas.strict_messages import MalformedMessage
from replicas.wire.caches import cache_from_wire

logger = logging.getLogger(__name__)

MAX_REPLICAS = 1024
MAX_LANES = 1024
MAX_ID_CHARS = 256
HELLO_TIMEOUT_S = 10.0
WATCH_PERIOD_S = 0.1

LinkContext: TypeAlias = "grpc.aio.ServicerContext[link.FromReplica, link.ToReplica]"


class LinkServicer(link_grpc.ReplicaLinkServicer):
    """Owns the pace of all readers; connections live in the pool as long as their Attach call."""

    def __init__(
        self,
        *,
        router_id: str,
        models: Mapping[str, ServedModel],
        pool: ReplicaPool,
        worker: DetokenizeWorker,
        metrics: RouterMetrics,
        freeze_s: float,
    ) -> None:
        self._router_id = router_id
        self._models = models
        self._pool = pool
        self._worker = worker
        self._pace = ReaderPace()
        self._metrics = metrics
        self._freeze_s = freeze_s

    # A coroutine that writes, where the generated signature wants an iterator: gRPC takes both, and only this
    # form reads and writes at the same time.
    async def Attach(  # type: ignore[override]
        self, request_iterator: AsyncIterator[link.FromReplica], context: LinkContext
    ) -> None:
        connection = await self._greet(request_iterator, context)
        # Attached in the same breath as it was checked against the others: another life may be greeting too.
        connection.commands.put_nowait(link.ToReplica(welcome=link.Welcome(router_id=self._router_id)))
        self._pool.attach(connection)
        logger.info("replica_attached id=%s epoch=%d", connection.replica_id, connection.epoch)
        tasks: tuple[asyncio.Task[Any], ...] = ()
        try:
            # By itself: a first write that is cut short below would leave it to the status, as gRPC sees it,
            # and the core refuses to send it twice: the status would never leave.
            await context.send_initial_metadata(())
            tasks = (
                asyncio.create_task(self._read(connection, request_iterator)),
                asyncio.create_task(self._write(connection, context)),
                asyncio.create_task(connection.closed.wait()),
                asyncio.create_task(self._watch(connection)),
            )
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if isinstance(error := task.exception(), MalformedMessage):
                    raise error
                if error is not None:
                    logger.error("link_failed id=%s", connection.replica_id, exc_info=error)
        finally:
            self._pool.detach(connection)
            logger.info("replica_detached id=%s epoch=%d", connection.replica_id, connection.epoch)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _greet(
        self, messages: AsyncIterator[link.FromReplica], context: LinkContext
    ) -> ReplicaConnection:
        """The connection for a valid Hello; aborts the call on any other."""
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                message = await anext(messages)
        except (TimeoutError, StopAsyncIteration):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the link must begin with Hello")
        problem = self._hello_problem(message)
        if problem:
            logger.warning("replica_refused id=%s problem=%s", message.hello.replica_id, problem)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, problem)
        model = self._models[message.hello.model]
        if message.hello.tokenizer_digest != model.tokenizer.digest:
            logger.warning("tokenizer_differs id=%s model=%s", message.hello.replica_id, model.name)
        return ReplicaConnection(
            hello=message.hello,
            epoch=message.epoch,
            max_waiting=model.section.limits.max_waiting,
            freeze_s=self._freeze_s,
            worker=self._worker,
            pace=self._pace,
            clock_s=monotonic,
        )

    def _hello_problem(self, message: link.FromReplica) -> str:
        """What is wrong with the first message; empty: nothing."""
        hello = message.hello
        if message.WhichOneof("event") != "hello" or not hello.replica_id:
            return "the link must begin with a Hello that names its replica"
        if hello.protocol != PROTOCOL_VERSION:
            return f"link protocol {hello.protocol} is not spoken here; this router speaks {PROTOCOL_VERSION}"
        if hello.model not in self._models:
            return f"model {hello.model!r} is not configured at this router; it has {', '.join(self._models)}"
        if len(hello.replica_id) > MAX_ID_CHARS or not hello.replica_id.isprintable():
            return f"replica_id must be printable and have {MAX_ID_CHARS} characters at most"
        if hello.lanes > MAX_LANES:
            return f"{hello.lanes} lanes are too many; {MAX_LANES} is the limit"
        if min(hello.lanes, hello.context_tokens, hello.max_sequences, hello.vocab_size) < 1:
            return "lanes, context_tokens, max_sequences and vocab_size must be at least 1"
        if problem := load_problem(hello.load):
            return f"{problem}; it cannot be true"
        older = self._pool.find(hello.replica_id)
        if older is not None and older.epoch > message.epoch:
            return f"epoch {message.epoch} of this replica is over; {older.epoch} is attached"
        if older is not None and older.epoch == message.epoch and not older.is_silent:
            return "this replica is attached by another stream, which is alive"
        if older is None and len(self._pool) >= MAX_REPLICAS:
            return f"{MAX_REPLICAS} replicas are attached, which is the limit of a router"
        return ""

    async def _read(self, connection: ReplicaConnection, messages: AsyncIterator[link.FromReplica]) -> None:
        async for message in messages:
            if message.epoch != connection.epoch:
                continue  # From a life that is over.
            connection.heard()
            for problem in strike_untrue(message):
                logger.warning("claim_refused id=%s problem=%s", connection.replica_id, problem)
            self._book_ledger(connection, message)
            if message.cache:
                self._note_cache(connection, message)
            if message.HasField("experts"):
                _note_experts(connection, message.experts)
            event = message.WhichOneof("event")
            self._metrics.count_link_message("up", event or "none")
            match event:
                case "step":
                    num_tokens = connection.take_step(message.step)
                    if num_tokens:
                        self._models[connection.hello.model].token_rate.add(num_tokens, now_s=monotonic())
                    self._pool.on_load(connection.hello.model)
                    # Whoever got tokens writes them now: to ask gRPC for the next message takes as long.
                    await asyncio.sleep(0)
                case "heartbeat":
                    if message.heartbeat.HasField("load"):
                        connection.take_load(message.heartbeat.load)
                        self._pool.on_load(connection.hello.model)
                case "energy":
                    connection.take_energy(message.energy)
                case "draining":
                    connection.mark_draining(message.draining.reason)
                    self._pool.changed(connection)
                case "goodbye":
                    goodbye = message.goodbye
                    logger.info("replica_goodbye id=%s reason=%s", connection.replica_id, goodbye.reason)
                    connection.take_goodbye(goodbye)
                    return
                case _:
                    logger.warning("link_message_unexpected id=%s event=%s", connection.replica_id, event)

    def _book_ledger(self, connection: ReplicaConnection, message: link.FromReplica) -> None:
        ledger = parse_ledger(message, replica_id=connection.replica_id)
        if ledger is not None:
            connection.agent_metrics_addresses = tuple(message.agent_metrics_addresses)
            self._models[connection.hello.model].ledger.add(ledger, now_s=monotonic())

    def _note_cache(self, connection: ReplicaConnection, message: link.FromReplica) -> None:
        if self._pool.find(connection.replica_id) is not connection:
            return  # A newer life has taken its place: its cache is another one.
        for change in cache_from_wire(message.cache):
            owner = (connection.replica_id, change.lane)
            if change.is_snapshot:
                self._pool.prefixes.replace(owner, change.added)
            else:
                self._pool.prefixes.update(owner, added=change.added, removed=change.removed)

    async def _write(self, connection: ReplicaConnection, context: LinkContext) -> None:
        while True:
            command = await connection.commands.get()
            await context.write(command)
            self._metrics.count_link_message("down", command.WhichOneof("command") or "none")

    async def _watch(self, connection: ReplicaConnection) -> None:
        while True:
            await asyncio.sleep(WATCH_PERIOD_S)
            connection.check_progress()
            self._pool.observe(connection)


def _note_experts(connection: ReplicaConnection, heat: link.ExpertHeat) -> None:
    try:
        connection.experts = parse_heat(heat)
    except ValueError as error:
        logger.warning("expert_heat_refused id=%s problem=%s", connection.replica_id, error)
