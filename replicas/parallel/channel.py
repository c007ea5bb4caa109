"""How rank 0 tells the other ranks of its group what to compute, and learns how it went.

One leader (rank 0), n followers (ranks 1..n). Every message goes to every follower, in order; every follower
answers every message with one reply, in order. `ring.py` does this on one host, `tcp.py` between hosts.
Both belong to one epoch of one group: what an older life left behind cannot be read.
"""

from __future__ import annotations

import struct
import zlib
from array import array
from dataclasses import dataclass
from typing import Protocol

from replicas.plan import WORD

_REPLY = struct.Struct("<QIII")
REPLY_BYTES = _REPLY.size
MAX_UINT32 = 2**32 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReply:
    """A follower's answer to one plan. `digest` is of the ids it sampled: ranks that differ have diverged."""

    step: int
    compute_us: int
    experts_hit: int
    digest: int


class PlanLeader(Protocol):
    """Rank 0's end. Not thread-safe. `timeout_s` is how long a follower may keep it waiting, from now on."""

    timeout_s: float

    def publish(self, payload: bytes) -> None:
        """Hand a message to all followers. Raises `RankLost` when one lags too far behind for too long."""

    def collect(self) -> tuple[StepReply, ...]:
        """The replies, in rank order, to the oldest message not collected yet.

        Waits for them; raises `RankLost` when one does not come in time, or a follower says that it failed.
        """

    def close(self) -> None:
        """Tell the followers that no message follows. Idempotent."""


class PlanFollower(Protocol):
    """The end of one other rank. Not thread-safe."""

    def receive(self) -> bytes | None:
        """The next message; sleeps in the kernel until it comes. None: the leader closed.

        Raises `RankLost` when the leader is gone without closing.
        """

    def reply(self, reply: StepReply) -> None:
        """Answer the oldest message not answered yet."""

    def fail(self) -> None:
        """Tell the leader that this rank ends; it raises at its next `collect` or `publish`."""

    def close(self) -> None:
        """Let go of the channel. Idempotent."""


def digest_ids(sampled_ids: tuple[int, ...]) -> int:
    return zlib.crc32(array(WORD, sampled_ids).tobytes())


def encode_reply(reply: StepReply) -> bytes:
    return _REPLY.pack(reply.step, min(reply.compute_us, MAX_UINT32), reply.experts_hit, reply.digest)


def decode_reply(payload: bytes) -> StepReply:
    step, compute_us, experts_hit, digest = _REPLY.unpack(payload)
    return StepReply(step=step, compute_us=compute_us, experts_hit=experts_hit, digest=digest)
