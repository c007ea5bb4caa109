"""The plan channel on one host: a ring of bytes in shared memory, written by rank 0, read by all others.

Each side writes only its own lines, so no lock is needed: the leader its head and the messages, a follower
its tail and its replies. All counters are int64 and only grow; a position in the ring is a counter modulo
the ring's size. A long message goes in several pieces. Whoever waits sleeps in the kernel on the bell of
the other side: an idle rank uses no processor time, save one look per second at whether rank 0 still lives.
"""

from __future__ import annotations

import time
from pathlib import Path

from replicas.errors import RankLost
from replicas.parallel.channel import REPLY_BYTES, StepReply, decode_reply, encode_reply
from replicas.parallel.futex import fence, futex_wait, futex_wake
from replicas.parallel.shared_file import HEADER_BYTES, SharedFile

RING_BYTES = 4 * 2**20
"""Bounds how far a follower may lag. A single plan may be longer: where long prompts that are cached already
begin together, all their blocks are news, and where penalties count them, all their tokens."""
REPLY_SLOTS = 16
"""Bounds the plans published and not collected."""
_WORD_BYTES = 8
_LINE_WORDS = 16
"""128 bytes: two cache lines, for processors that fetch lines in pairs."""
_REPLY_SLOT_BYTES = 32
_BELL, _PUBLISHED, _HEAD, _CLOSED = range(4)
_TAIL, _REPLIED, _FAILED = range(1, 4)
_SKIP = -1
"""In place of a piece's size: the next piece is at the ring's start. The size of a piece that is not the last
of its message is negative, too, and far below."""
_IDLE_SLICE_S = 1.0
_LAG_SLICE_S = 0.01


class _Layout:
    """Where in the shared file everything is, in words."""

    def __init__(self, num_followers: int, ring_bytes: int) -> None:
        assert ring_bytes % _WORD_BYTES == 0 and REPLY_BYTES <= _REPLY_SLOT_BYTES
        self.leader = HEADER_BYTES // _WORD_BYTES
        self.followers = tuple(self.leader + _LINE_WORDS * (1 + index) for index in range(num_followers))
        self.replies = self.leader + _LINE_WORDS * (1 + num_followers)
        self.ring = self.replies + num_followers * REPLY_SLOTS * _REPLY_SLOT_BYTES // _WORD_BYTES
        self.num_bytes = (self.ring * _WORD_BYTES - HEADER_BYTES) + ring_bytes

    def reply_bytes(self, follower_index: int, reply_index: int) -> slice:
        slot = follower_index * REPLY_SLOTS + reply_index % REPLY_SLOTS
        start = self.replies * _WORD_BYTES + slot * _REPLY_SLOT_BYTES
        return slice(start, start + REPLY_BYTES)


class RingLeader:
    """Rank 0's end."""

    def __init__(
        self,
        path: Path,
        *,
        size: int,
        epoch: int,
        attach_timeout_s: float,
        timeout_s: float,
        ring_bytes: int = RING_BYTES,
    ) -> None:
        self.timeout_s = timeout_s
        self._layout = _Layout(size - 1, ring_bytes)
        self._ring_bytes = ring_bytes
        # With its size a piece takes half of the ring, so that one always fits behind or before the other.
        self._longest_piece_bytes = ring_bytes // 2 - _WORD_BYTES
        self._num_published = 0
        self._num_collected = 0
        self._is_closed = False
        self._file = SharedFile.attach(
            path,
            num_bytes=self._layout.num_bytes,
            rank=0,
            size=size,
            epoch=epoch,
            timeout_s=attach_timeout_s,
        )

    def publish(self, payload: bytes) -> None:
        is_answerable = self._num_published - self._num_collected < REPLY_SLOTS
        assert is_answerable, "replies are collected before more is published"
        self._num_published += 1
        rest, limit = memoryview(payload), self._longest_piece_bytes
        while len(rest) > limit:
            self._put(rest[:limit], size_word=-limit)
            rest = rest[limit:]
        self._put(rest, size_word=len(rest))

    def collect(self) -> tuple[StepReply, ...]:
        index = self._num_collected
        assert index < self._num_published, "only what was published is answered"
        replies = []
        for follower_index, line in enumerate(self._layout.followers):
            self._await(follower_index, line + _REPLIED, index + 1)
            payload = self._file.bytes[self._layout.reply_bytes(follower_index, index)]
            replies.append(decode_reply(bytes(payload)))
        self._num_collected += 1
        return tuple(replies)

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._file.words[self._layout.leader + _CLOSED] = 1
        self._ring_bell()
        self._file.close()

    def _put(self, piece: memoryview, *, size_word: int) -> None:
        words, line = self._file.words, self._layout.leader
        head = words[line + _HEAD]
        start = head % self._ring_bytes
        needed = _piece_bytes(len(piece))
        skipped = self._ring_bytes - start if self._ring_bytes - start < needed else 0
        self._await_space(head + skipped + needed - self._ring_bytes)
        if skipped:
            words[self._layout.ring + start // _WORD_BYTES] = _SKIP
            start = 0
        at = self._layout.ring + start // _WORD_BYTES
        words[at] = size_word
        data = (at + 1) * _WORD_BYTES
        self._file.bytes[data : data + len(piece)] = piece
        words[line + _HEAD] = head + skipped + needed
        fence()
        words[line + _PUBLISHED] += 1
        self._ring_bell()

    def _await_space(self, tail: int) -> None:
        """Return when all followers have read up to `tail`."""
        for follower_index, line in enumerate(self._layout.followers):
            self._await(follower_index, line + _TAIL, tail)

    def _await(self, follower_index: int, word: int, count: int) -> None:
        """Return when a follower's counter has reached `count`."""
        words, line = self._file.words, self._layout.followers[follower_index]
        deadline_s = time.monotonic() + self.timeout_s if words[word] < count else 0.0
        while True:
            bell = words[line + _BELL]
            fence()
            if words[line + _FAILED]:
                raise RankLost(f"rank {1 + follower_index} failed")
            if words[word] >= count:
                fence()
                return
            if time.monotonic() > deadline_s:
                raise RankLost(f"rank {1 + follower_index} kept rank 0 waiting for {self.timeout_s:g} s")
            if not futex_wait(self._file.address + line * _WORD_BYTES, bell, _LAG_SLICE_S):
                self._file.check_peers()

    def _ring_bell(self) -> None:
        self._file.words[self._layout.leader + _BELL] += 1
        fence()
        address = self._file.address + self._layout.leader * _WORD_BYTES
        futex_wake(address, len(self._layout.followers))


class RingFollower:
    """The end of rank `rank`, 1 or more."""

    def __init__(
        self,
        path: Path,
        *,
        rank: int,
        size: int,
        epoch: int,
        attach_timeout_s: float,
        ring_bytes: int = RING_BYTES,
    ) -> None:
        self._layout = _Layout(size - 1, ring_bytes)
        self._index = rank - 1
        self._line = self._layout.followers[self._index]
        self._ring_bytes = ring_bytes
        self._num_read = 0
        """Pieces; `_num_received` counts messages."""
        self._num_received = 0
        self._is_closed = False
        self._file = SharedFile.attach(
            path,
            num_bytes=self._layout.num_bytes,
            rank=rank,
            size=size,
            epoch=epoch,
            timeout_s=attach_timeout_s,
        )

    def receive(self) -> bytes | None:
        words, leader = self._file.words, self._layout.leader
        pieces: list[bytes] = []
        while True:
            bell = words[leader + _BELL]
            fence()
            if self.has_message():
                if self._read_into(pieces):
                    self._num_received += 1
                    return b"".join(pieces)
                continue
            if words[leader + _CLOSED]:
                return None
            if not futex_wait(self._file.address + leader * _WORD_BYTES, bell, _IDLE_SLICE_S):
                self._file.check_peers()

    def has_message(self) -> bool:
        return bool(self._file.words[self._layout.leader + _PUBLISHED] > self._num_read)

    def reply(self, reply: StepReply) -> None:
        words = self._file.words
        replied = words[self._line + _REPLIED]
        assert replied < self._num_received, "only what was received is answered"
        self._file.bytes[self._layout.reply_bytes(self._index, replied)] = encode_reply(reply)
        fence()
        words[self._line + _REPLIED] = replied + 1
        self._ring_bell()

    def fail(self) -> None:
        self._file.words[self._line + _FAILED] = 1
        self._ring_bell()

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._file.close()

    def _read_into(self, pieces: list[bytes]) -> bool:
        """The next piece; whether it is the last of its message."""
        fence()
        words, ring = self._file.words, self._layout.ring
        tail = words[self._line + _TAIL]
        start = tail % self._ring_bytes
        if words[ring + start // _WORD_BYTES] == _SKIP:
            tail += self._ring_bytes - start
            start = 0
        at = ring + start // _WORD_BYTES
        size_word, data = words[at], (at + 1) * _WORD_BYTES
        size_bytes = abs(size_word)
        pieces.append(bytes(self._file.bytes[data : data + size_bytes]))
        fence()
        words[self._line + _TAIL] = tail + _piece_bytes(size_bytes)
        self._num_read += 1
        return bool(size_word >= 0)

    def _ring_bell(self) -> None:
        self._file.words[self._line + _BELL] += 1
        fence()
        futex_wake(self._file.address + self._line * _WORD_BYTES, 1)


def _piece_bytes(size_bytes: int) -> int:
    """In the ring: a word for the size, and the piece up to a whole word."""
    return _WORD_BYTES + -(-size_bytes // _WORD_BYTES) * _WORD_BYTES
