"""Frames between a supervisor and rank 0 of its group, over one Unix socket.

A frame is a little-endian uint32 length and that many bytes of a `ToRank` (down) or `FromRank` (up)
message. The supervisor is asynchronous and uses `read_event` and `write_command`; the rank is not and uses
`RankSocket`. Both see commands and events as plain dataclasses. The peer's end of the socket means the end
of the group: reading past it raises `RankLost`.
"""

from __future__ import annotations

import asyncio
import select
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from protos import wattline_link_pb2 as link_pb2
from protos import wattline_rank_pb2 as rank_pb2
from replicas.errors import RankLost
from replicas.expert_loads import ExpertLoads
from replicas.request import EngineReady, GenerationRequest
from replicas.step_report import StepReport
from replicas.wire.engines import ready_from_wire, ready_to_wire
from replicas.wire.loads import expert_loads_from_wire, expert_loads_to_wire
from replicas.wire.requests import request_from_wire, request_to_wire
from replicas.wire.steps import report_from_wire, report_to_wire

HEADER = struct.Struct("<I")
MAX_FRAME_BYTES = 16 * 2**20
SEND_TIMEOUT_S = 30.0
RECEIVE_BYTES = 256 * 2**10
MAX_COMMANDS_PER_RECEIVE = 256
CONNECT_RETRY_S = 0.05

Clock = Callable[[], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """Down: generate for this request."""

    request: GenerationRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """Down: the caller is gone; end with CANCELLED."""

    request_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Down: the answer is complete; end with STOP."""

    request_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shutdown:
    """Down: end the group now; what is in flight is not finished."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadingProgress:
    """Up: how far a rank got in `stage`, in the unit of that stage."""

    rank: int
    stage: str
    done: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFailure:
    """Up: the engine ends; the last event of a socket."""

    reason: str


Command = Submit | Cancel | Stop | Shutdown
Event = LoadingProgress | EngineReady | StepReport | ExpertLoads | EngineFailure


async def read_event(reader: asyncio.StreamReader) -> Event:
    """The next event of rank 0. Raises `RankLost` when the socket ended, also in the middle of a frame."""
    try:
        (size_bytes,) = HEADER.unpack(await reader.readexactly(HEADER.size))
        _check_size(size_bytes)
        return decode_event(await reader.readexactly(size_bytes))
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        raise RankLost("rank 0 closed its socket") from error


def send_command(writer: asyncio.StreamWriter, command: Command, *, clock: Clock = time.monotonic_ns) -> None:
    """Send one command at once; what rank 0 does not read yet stays in the writer's buffer."""
    writer.write(_frame(encode_command(command, now_ns=clock())))


async def write_command(
    writer: asyncio.StreamWriter, command: Command, *, clock: Clock = time.monotonic_ns
) -> None:
    """Send one command; waits while rank 0 is slow to read. Raises `RankLost` when it is gone."""
    try:
        send_command(writer, command, clock=clock)
        await writer.drain()
    except ConnectionError as error:
        raise RankLost("rank 0 closed its socket") from error


class RankSocket:
    """Rank 0's end of the socket. Owns it, and the bytes of a frame not yet complete."""

    def __init__(self, connection: socket.socket, *, clock: Clock = time.monotonic_ns) -> None:
        connection.settimeout(SEND_TIMEOUT_S)
        self._connection = connection
        self._clock = clock
        self._received = bytearray()

    @classmethod
    def connect(cls, path: str, *, timeout_s: float, clock: Clock = time.monotonic_ns) -> RankSocket:
        """Dial the supervisor; it may still be about to listen, so a refusal is retried until `timeout_s`."""
        give_up_at_s = time.monotonic() + timeout_s
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.connect(path)
            except (FileNotFoundError, ConnectionRefusedError) as error:
                connection.close()
                if time.monotonic() > give_up_at_s:
                    raise RankLost(f"no supervisor listens at {path} after {timeout_s} s") from error
                time.sleep(CONNECT_RETRY_S)
            else:
                return cls(connection, clock=clock)

    def send(self, event: Event) -> None:
        """Raises `RankLost` when the supervisor is gone, or has not read for `SEND_TIMEOUT_S`."""
        try:
            self._connection.sendall(_frame(encode_event(event)))
        except OSError as error:
            raise RankLost(f"the supervisor does not read: {error}") from error

    def receive(self, *, wait: bool, timeout_s: float | None = None) -> list[Command]:
        """The commands that have arrived; with `wait`, sleeps in the kernel until there is at least one, or
        `timeout_s` have passed.

        A flood is left in the socket after `MAX_COMMANDS_PER_RECEIVE`, so that it cannot starve the steps.
        """
        commands: list[Command] = []
        while len(commands) < MAX_COMMANDS_PER_RECEIVE:
            blocks = wait and not commands
            if not select.select([self._connection], [], [], timeout_s if blocks else 0)[0]:
                break
            try:
                chunk = self._connection.recv(RECEIVE_BYTES)
            except ConnectionError as error:
                raise RankLost("the supervisor closed the socket") from error
            if not chunk:
                raise RankLost("the supervisor closed the socket")
            self._received += chunk
            commands += self._parse()
        return commands

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> RankSocket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _parse(self) -> list[Command]:
        commands: list[Command] = []
        start = 0
        while len(self._received) - start >= HEADER.size:
            (size_bytes,) = HEADER.unpack_from(self._received, start)
            _check_size(size_bytes)
            end = start + HEADER.size + size_bytes
            if len(self._received) < end:
                break
            payload = bytes(self._received[start + HEADER.size : end])
            commands.append(decode_command(payload, now_ns=self._clock()))
            start = end
        del self._received[:start]
        return commands


def encode_command(command: Command, *, now_ns: int) -> bytes:
    """The payload of a frame down."""
    match command:
        case Submit():
            message = rank_pb2.ToRank(submit=request_to_wire(command.request, now_ns=now_ns))
        case Cancel():
            message = rank_pb2.ToRank(cancel=link_pb2.Cancel(request_id=command.request_id))
        case Stop():
            message = rank_pb2.ToRank(stop=link_pb2.Stop(request_id=command.request_id))
        case Shutdown():
            message = rank_pb2.ToRank(shutdown=rank_pb2.Shutdown())
    return message.SerializeToString()


def decode_command(payload: bytes, *, now_ns: int) -> Command:
    message = rank_pb2.ToRank.FromString(payload)
    kind = message.WhichOneof("command")
    match kind:
        case "submit":
            return Submit(request=request_from_wire(message.submit, now_ns=now_ns))
        case "cancel":
            return Cancel(request_id=message.cancel.request_id)
        case "stop":
            return Stop(request_id=message.stop.request_id)
        case "shutdown":
            return Shutdown()
    raise RankLost(f"a frame from the supervisor holds no command known here ({kind})")


def encode_event(event: Event) -> bytes:
    """The payload of a frame up."""
    match event:
        case StepReport():
            message = rank_pb2.FromRank(step=report_to_wire(event))
        case LoadingProgress():
            message = rank_pb2.FromRank(
                loading=rank_pb2.LoadingProgress(
                    rank=event.rank, stage=event.stage, done=event.done, total=event.total
                )
            )
        case ExpertLoads():
            message = rank_pb2.FromRank(experts=expert_loads_to_wire(event))
        case EngineReady():
            message = rank_pb2.FromRank(ready=ready_to_wire(event))
        case EngineFailure():
            message = rank_pb2.FromRank(failure=rank_pb2.EngineFailure(reason=event.reason))
    return message.SerializeToString()


def decode_event(payload: bytes) -> Event:
    message = rank_pb2.FromRank.FromString(payload)
    kind = message.WhichOneof("event")
    match kind:
        case "step":
            return report_from_wire(message.step)
        case "experts":
            return expert_loads_from_wire(message.experts)
        case "loading":
            loading = message.loading
            return LoadingProgress(
                rank=loading.rank, stage=loading.stage, done=loading.done, total=loading.total
            )
        case "ready":
            return ready_from_wire(message.ready)
        case "failure":
            return EngineFailure(reason=message.failure.reason)
    raise RankLost(f"a frame from rank 0 holds no event known here ({kind})")


def _frame(payload: bytes) -> bytes:
    _check_size(len(payload))
    return HEADER.pack(len(payload)) + payload


def _check_size(size_bytes: int) -> None:
    if size_bytes > MAX_FRAME_BYTES:
        raise RankLost(f"a frame of {size_bytes} bytes is longer than the limit of {MAX_FRAME_BYTES}")
