"""One replica's end of the link to one router address: dial, greet, carry, dial again.

The replica dials, so losing a router costs nothing but its own requests. The step path only fills outboxes;
this module's tasks do the sending. grpc.aio objects live on the one event loop of the process. Called by
`links.py`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, MutableMapping
from random import Random
from typing import Protocol, TypeAlias

import grpc
from grpc import aio

from protos.wattline_link_pb2 import FromReplica, ToReplica
from protos.wattline_link_pb2_grpc import ReplicaLinkStub
from replicas.config import LinkCredentials
from replicas.link.codec import (
    add_ledger,
    decode_command,
    encode_heartbeat,
    encode_heat,
    encode_hello,
    encode_parcel,
)
from replicas.link.dial import dial
from replicas.link.messages import Goodbye, LedgerState, ReplicaCard, ReplicaLoad, RouterCommand
from replicas.link.outbox import Outbox
from replicas.request import CacheChange
from replicas.wire.caches import cache_to_wire

HEARTBEAT_S = 0.25
LEDGER_S = 1.0
"""The ledger's sums, and the experts' heat if it is new, go along with whatever is sent, this often."""
WELCOME_TIMEOUT_S = 5.0
SEND_STALL_S = 10.0
"""A message that the transport does not take for this long ends the link."""
GOODBYE_TIMEOUT_S = 1.0
BACKOFF_MIN_S = 0.1
BACKOFF_MAX_S = 2.0
MAX_MESSAGE_BYTES = 8 * 2**20
"""Half of what a frame of the rank socket may hold, so every Submit that comes in can go on."""

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    # A frozen router sends no RST. Without ping_timeout_ms the other two notice it after a minute.
    ("grpc.keepalive_time_ms", 2000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.http2.ping_timeout_ms", 2000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Each dial is a fresh connection: our own back-off is the only one.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
)

AttachCall: TypeAlias = "aio.StreamStreamCall[FromReplica, ToReplica]"

logger = logging.getLogger(__name__)


class LinkEndedError(Exception):
    """The stream is over; the text says why."""


_STREAM_ERRORS = (LinkEndedError, grpc.RpcError, asyncio.InvalidStateError)
"""How a stream ends. gRPC raises the last one when a call is used after its end."""


class LinkSession:
    """One attached stream. Request ids are unique in it, so it is also the key of its requests."""

    def __init__(self, *, router_id: str, target: str, outbox: Outbox) -> None:
        self.router_id = router_id
        self.target = target
        self.outbox = outbox
        self.writing_since_s: float | None = None
        """While the transport has not taken a message yet, on the clock of the event loop."""


class LinkHandler(Protocol):
    """What a link needs of its replica. None of it may block."""

    @property
    def card(self) -> ReplicaCard: ...

    def load(self) -> ReplicaLoad:
        """The load now."""

    def ledger(self) -> LedgerState | None:
        """What the meter's energy has been divided into so far; None while no meter spoke."""

    def cache(self) -> tuple[CacheChange, ...]:
        """A snapshot of what the prefix caches hold."""

    def on_attached(self, session: LinkSession) -> None:
        """A router said Welcome."""

    def on_command(self, session: LinkSession, command: RouterCommand) -> None:
        """A router wants something."""

    def on_lost(self, session: LinkSession, reason: str) -> None:
        """The stream ended; nothing put into its outbox arrives any more."""


class RouterLink:
    """Keeps one stream to one target open until closed.

    `attached` is shared by all links of a replica: router id to session. A router that is reached by two
    addresses keeps its first stream.
    """

    def __init__(
        self,
        *,
        target: str,
        handler: LinkHandler,
        attached: MutableMapping[str, LinkSession],
        credentials: LinkCredentials | None = None,
        random: Random | None = None,
        make_outbox: Callable[[], Outbox] = Outbox,
    ) -> None:
        self._target = target
        self._handler = handler
        self._attached = attached
        self._credentials = credentials
        self._random = random or Random()
        self._make_outbox = make_outbox
        self._session: LinkSession | None = None
        self._failed_dials = 0
        self._is_closing = False

    @property
    def is_attached(self) -> bool:
        return self._session is not None

    async def run(self) -> None:
        """Dial and carry, again and again, until cancelled or `close`d."""
        while not self._is_closing:
            reason = await self._attach()
            if self._is_closing:
                return
            self._failed_dials += 1
            level = logging.WARNING if self._failed_dials == 1 else logging.DEBUG
            logger.log(
                level,
                "link_down target=%s failed_dials=%d reason=%s",
                self._target,
                self._failed_dials,
                reason,
            )
            await asyncio.sleep(self._backoff_s())

    def close(self, goodbye: Goodbye) -> None:
        """Send what is due and then Goodbye; `run` returns when it is out."""
        self._is_closing = True
        if self._session is not None:
            self._session.outbox.add_goodbye(goodbye)

    def _backoff_s(self) -> float:
        ceiling_s = min(BACKOFF_MAX_S, BACKOFF_MIN_S * 2.0 ** min(self._failed_dials, 10))
        return self._random.uniform(BACKOFF_MIN_S, ceiling_s)

    async def _attach(self) -> str:
        """One stream, from dial to end. Returns why it ended."""
        try:
            dialled = dial(self._target, self._credentials, CHANNEL_OPTIONS)
        except OSError as error:
            return f"the link's certificates cannot be read: {error}"
        async with dialled as channel:
            call = ReplicaLinkStub(channel).Attach()
            try:
                session = await self._greet(call)
                return await self._carry(call, session)
            except _STREAM_ERRORS as error:
                return _describe(error)
            finally:
                call.cancel()

    async def _greet(self, call: AttachCall) -> LinkSession:
        """Hello up, Welcome down."""
        handler = self._handler
        try:
            async with asyncio.timeout(WELCOME_TIMEOUT_S):
                await call.write(encode_hello(handler.card, handler.load()))
                message = await call.read()
        except TimeoutError as error:
            raise LinkEndedError(f"no Welcome within {WELCOME_TIMEOUT_S:g} s") from error
        if not isinstance(message, ToReplica):
            raise LinkEndedError(await _ending(call))
        if message.WhichOneof("command") != "welcome":
            raise LinkEndedError(f"the router began with {message.WhichOneof('command')}, not with Welcome")
        router_id = message.welcome.router_id or self._target
        if router_id in self._attached:
            raise LinkEndedError(f"router {router_id} is attached at {self._attached[router_id].target}")
        return LinkSession(router_id=router_id, target=self._target, outbox=self._make_outbox())

    async def _carry(self, call: AttachCall, session: LinkSession) -> str:
        """Move commands down and parcels up until one side ends it."""
        self._session = self._attached[session.router_id] = session
        self._failed_dials = 0
        reason = "this replica is closing"
        try:
            self._handler.on_attached(session)
            await _run_until_one_fails(
                self._receive(call, session),
                self._send(call, session),
                _end_on_overflow(session),
                _watch(session),
            )
        except _STREAM_ERRORS as error:
            reason = _describe(error)
        finally:
            self._session = None
            del self._attached[session.router_id]
            self._handler.on_lost(session, reason)
        return reason

    async def _receive(self, call: AttachCall, session: LinkSession) -> None:
        handler = self._handler
        while isinstance(message := await call.read(), ToReplica):
            command = decode_command(message, now_ns=time.monotonic_ns())
            if command is not None:
                handler.on_command(session, command)
        raise LinkEndedError(await _ending(call))

    async def _send(self, call: AttachCall, session: LinkSession) -> None:
        handler = self._handler
        epoch = handler.card.epoch
        ledger_due_s = 0.0
        told = None
        now_s = asyncio.get_running_loop().time
        while True:
            parcel = await session.outbox.take()
            load = handler.load()
            messages = encode_parcel(epoch, parcel, load) or [encode_heartbeat(epoch, load)]
            is_last = parcel.goodbye is not None
            if is_last or time.monotonic() >= ledger_due_s:
                add_ledger(messages[0], handler.ledger())
                ledger_due_s = time.monotonic() + LEDGER_S
                if load.experts is not None and load.experts is not told:
                    messages[0].experts.CopyFrom(encode_heat(load.experts))
                    told = load.experts
            news = session.outbox.cache.take()
            messages[0].cache.extend(cache_to_wire(handler.cache() if news is None else news))
            for message in messages:
                session.writing_since_s = now_s()
                await call.write(message)
                session.writing_since_s = None
            if is_last:
                await call.done_writing()
                # Cancelling at once could overtake the Goodbye; a router ends the stream when it has read it.
                await asyncio.sleep(GOODBYE_TIMEOUT_S)
                raise LinkEndedError("this replica said Goodbye")


async def _run_until_one_fails(*works: Coroutine[None, None, None]) -> None:
    """Side by side; raises what the first one raised, when all have ended.

    No task group: one of Python 3.11 that ends with an error keeps a cancel that comes meanwhile to itself,
    and the link would be dialled for ever.
    """
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        failed = [task for task in tasks if task.done() and not task.cancelled()]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in failed:
        task.result()


async def _watch(session: LinkSession) -> None:
    """Heartbeats while nothing else is sent, and an end to a transport that takes nothing.

    One timer for all messages: one for each was a tenth of what the supervisor spends on a step.
    """
    now_s = asyncio.get_running_loop().time
    while True:
        since_s = session.writing_since_s
        if since_s is not None and now_s() - since_s >= SEND_STALL_S:
            raise LinkEndedError(f"the router took nothing for {SEND_STALL_S:g} s")
        quiet_s = now_s() - session.outbox.taken_s
        if quiet_s >= HEARTBEAT_S:
            session.outbox.nudge()
            quiet_s = 0.0
        await asyncio.sleep(HEARTBEAT_S - quiet_s)


async def _end_on_overflow(session: LinkSession) -> None:
    await session.outbox.overflow()
    raise LinkEndedError("the router reads too slowly: its outbox is over the limit")


async def _ending(call: AttachCall) -> str:
    """Why the router ended the stream, whose `read` gave no message."""
    if not call.done():  # gRPC gives None for bytes that are no message, and the stream goes on.
        return "the router sent bytes that are no command"
    code, details = await call.code(), await call.details()
    return f"the router ended the stream: {code.name} {details or ''}".strip()


def _describe(error: BaseException) -> str:
    if isinstance(error, aio.AioRpcError):
        return f"{error.code().name} {error.details() or ''}".strip()
    return str(error) or type(error).__name__
