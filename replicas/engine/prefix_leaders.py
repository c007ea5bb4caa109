"""Requests that arrive together and begin the same: one computes the beginning, the others wait for it.

A running sequence leads until its first token shows that its KV is good: then others can find its blocks. A
waiting sequence that would have to compute what a leader is computing is held meanwhile; others may start
before it, as long as they leave it its room. Nobody starves: a leader runs, so it is done or gone after a
bounded number of steps; a sequence waits for one leader in its life, and for none that matters less.

    leader    a b c d | e f      computes blocks 0..2
    held      a b c d | x        needs blocks 0..1 and its own tail: starts when 0 and 1 are there

Pure; owned by a lane.
"""

from __future__ import annotations

from bisect import bisect_left

from replicas.engine.sequence import Sequence

MIN_SHARED_TOKENS = 32
"""Less is computed twice sooner than it is waited for."""


class PrefixLeaders:
    """The sequences of a lane whose KV is being computed and nobody can find yet."""

    def __init__(self, *, block_tokens: int) -> None:
        self._min_blocks = -(-MIN_SHARED_TOKENS // block_tokens)
        self._leaders: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """It starts to run; its `block_hashes` are complete."""
        self._leaders.append(sequence)

    def discard(self, sequence: Sequence) -> None:
        """Its blocks can be found, or it runs no more. No error if it led nobody."""
        if sequence in self._leaders:
            self._leaders.remove(sequence)

    def is_leading(self, sequence: Sequence | None) -> bool:
        return sequence in self._leaders

    def leader_of(
        self, sequence: Sequence, *, num_cached_blocks: int, num_sharable_blocks: int
    ) -> Sequence | None:
        """Whom a waiting sequence should wait for, if so many of the blocks it could share are cached."""
        needed = num_cached_blocks + self._min_blocks
        for leader in self._leaders:
            if leader.request.priority < sequence.request.priority:
                continue
            if num_shared_blocks(leader, sequence, limit=num_sharable_blocks) >= needed:
                return leader
        return None


def num_shared_blocks(one: Sequence, other: Sequence, *, limit: int) -> int:
    """How many full blocks both begin with, up to `limit`: a hash names all tokens before it, too."""
    ours, theirs = one.block_hashes, other.block_hashes
    limit = min(limit, len(ours), len(theirs))
    return bisect_left(range(limit), True, key=lambda index: ours[index] != theirs[index])
