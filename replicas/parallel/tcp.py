"""The plan channel between hosts: one TCP connection per follower, length-prefixed messages.

A follower greets with its rank and the epoch; one that belongs to another life is turned away. A closed
connection means that the other side is gone, unless rank 0 said goodbye.
"""

from __future__ import annotations

import socket
import struct
import time

from replicas.errors import RankLost
from replicas.parallel.channel import REPLY_BYTES, StepReply, decode_reply, encode_reply

MAX_MESSAGE_BYTES = 64 * 2**20
_SIZE = struct.Struct("<I")
_GOODBYE = 2**32 - 1
"""In place of a message's size."""
_GREETING = struct.Struct("<8sQII")
_MAGIC = b"wattline"
_CONNECT_POLL_S = 0.05
_GREETING_TIMEOUT_S = 5.0
_SILENCE_S = 2
"""A host that vanished says nothing: an idle connection is probed after this long, and as often again."""
_MAX_PROBES = 3
GONE_S = _SILENCE_S * (1 + _MAX_PROBES)
"""After which a host that answers no probe, or acknowledges no message, is gone."""


class TcpLeader:
    """Rank 0's end. `listener` is closed once all followers are attached."""

    def __init__(
        self, listener: socket.socket, *, size: int, epoch: int, attach_timeout_s: float, timeout_s: float
    ) -> None:
        self.timeout_s = timeout_s
        with listener:
            joined = _accept_all(listener, size, epoch, time.monotonic() + attach_timeout_s)
        self._connections = [joined[rank][0] for rank in sorted(joined)]
        self._names = [f"rank {rank} at {joined[rank][1]}" for rank in sorted(joined)]

    def publish(self, payload: bytes) -> None:
        if len(payload) > MAX_MESSAGE_BYTES:
            raise RankLost(f"a plan of {len(payload)} bytes exceeds the limit of {MAX_MESSAGE_BYTES}")
        for name, connection in zip(self._names, self._connections, strict=True):
            self._send(name, connection, _SIZE.pack(len(payload)) + payload)

    def collect(self) -> tuple[StepReply, ...]:
        replies = []
        for name, connection in zip(self._names, self._connections, strict=True):
            connection.settimeout(self.timeout_s)
            try:
                replies.append(decode_reply(_receive_exactly(connection, REPLY_BYTES)))
            except OSError as error:
                # Both are a TimeoutError; that of a host that answers no probe has the kernel's number.
                is_late = isinstance(error, TimeoutError) and error.errno is None
                what = f"kept rank 0 waiting for {self.timeout_s:g} s" if is_late else f"is gone: {error}"
                raise RankLost(f"{name} {what}") from error
        return tuple(replies)

    def close(self) -> None:
        for name, connection in zip(self._names, self._connections, strict=True):
            try:
                self._send(name, connection, _SIZE.pack(_GOODBYE))
            except RankLost:
                continue  # Gone already, which is what close is for.
            finally:
                connection.close()
        self._connections.clear()
        self._names.clear()

    def _send(self, name: str, connection: socket.socket, message: bytes) -> None:
        connection.settimeout(self.timeout_s)
        try:
            connection.sendall(message)
        except OSError as error:
            raise RankLost(f"{name} does not read its plans: {error}") from error


class TcpFollower:
    """The end of rank `rank`, 1 or more."""

    def __init__(
        self, address: tuple[str, int], *, rank: int, size: int, epoch: int, attach_timeout_s: float
    ) -> None:
        self._connection = _connect(address, time.monotonic() + attach_timeout_s)
        self._connection.sendall(_GREETING.pack(_MAGIC, epoch, rank, size))

    def receive(self) -> bytes | None:
        try:
            (size_bytes,) = _SIZE.unpack(_receive_exactly(self._connection, _SIZE.size))
            if size_bytes == _GOODBYE:
                return None
            if size_bytes > MAX_MESSAGE_BYTES:
                raise RankLost(f"a plan of {size_bytes} bytes exceeds the limit of {MAX_MESSAGE_BYTES}")
            return _receive_exactly(self._connection, size_bytes)
        except OSError as error:
            raise RankLost(f"rank 0 is gone: {error}") from error

    def reply(self, reply: StepReply) -> None:
        try:
            self._connection.sendall(encode_reply(reply))
        except OSError as error:
            raise RankLost(f"rank 0 is gone: {error}") from error

    def fail(self) -> None:
        """The connection's end says it."""
        self.close()

    def close(self) -> None:
        self._connection.close()


def _accept_all(
    listener: socket.socket, size: int, epoch: int, deadline_s: float
) -> dict[int, tuple[socket.socket, str]]:
    """The connection of each other rank, and the address it came from."""
    joined: dict[int, tuple[socket.socket, str]] = {}
    port = listener.getsockname()[1]
    try:
        while len(joined) < size - 1:
            listener.settimeout(max(deadline_s - time.monotonic(), 0.001))
            connection, (host, *_) = listener.accept()
            rank = _greet(connection, size, epoch)
            if rank is None or rank in joined:
                connection.close()
            else:
                joined[rank] = (connection, host)
    except TimeoutError as error:
        for connection, _ in joined.values():
            connection.close()
        missing = sorted(set(range(1, size)) - set(joined))
        raise RankLost(
            f"ranks {missing} did not attach in time; all hosts must reach each other (here port {port})"
        ) from error
    return joined


def _greet(connection: socket.socket, size: int, epoch: int) -> int | None:
    """The rank that dialled; None if it is not one of this group and life."""
    connection.settimeout(_GREETING_TIMEOUT_S)
    _tune(connection)
    try:
        magic, its_epoch, rank, its_size = _GREETING.unpack(_receive_exactly(connection, _GREETING.size))
    except OSError:
        return None
    is_ours = (magic, its_epoch, its_size) == (_MAGIC, epoch, size) and 1 <= rank < size
    return int(rank) if is_ours else None


def _connect(address: tuple[str, int], deadline_s: float) -> socket.socket:
    """Dial until rank 0 listens."""
    while True:
        left_s = deadline_s - time.monotonic()
        try:
            connection = socket.create_connection(address, timeout=max(left_s, 0.001))
        except OSError as error:
            if left_s < 0:
                raise RankLost(f"rank 0 does not listen at {address[0]}:{address[1]}: {error}") from error
            time.sleep(_CONNECT_POLL_S)
        else:
            connection.settimeout(None)
            _tune(connection)
            return connection


def _tune(connection: socket.socket) -> None:
    """Plans are small and waited for; and a peer that no longer exists is an error, not a silence."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_NODELAY, 1),
        (socket.TCP_KEEPIDLE, _SILENCE_S),
        (socket.TCP_KEEPINTVL, _SILENCE_S),
        (socket.TCP_KEEPCNT, _MAX_PROBES),
        (socket.TCP_USER_TIMEOUT, 1000 * GONE_S),
    ):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _receive_exactly(connection: socket.socket, size_bytes: int) -> bytes:
    """All of `size_bytes`; ConnectionError when the other side ends before."""
    received = bytearray()
    while len(received) < size_bytes:
        chunk = connection.recv(size_bytes - len(received))
        if not chunk:
            raise ConnectionError("the connection ended")
        received += chunk
    return bytes(received)
