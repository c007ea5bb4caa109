"""Requests that arrive together and begin the same: one computes the beginning, the others wait for it.

A block can be found by others as soon as a plan computes it: whoever comes later in the same plan may read
it, since every layer writes the keys and values of a whole step before it reads any. So a waiting sequence
that would have to compute what a leader, a running prefill, is about to compute is held until the leader's
plans have come that far; others may start before it, as long as they leave it its room. Nobody starves: a
leader is the first to get tokens of a step, so it is done or gone after a bounded number of steps; a sequence
waits for one leader in its life, and for none that matters less.

    leader    a b c d | e f      computes blocks 0..2
    held      a b c d | x        needs blocks 0..1 and its own tail: starts in the step that plans block 1

Pure; called by the lanes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from replicas.engine.sequence import Sequence

MIN_SHARED_TOKENS = 32
"""Less is computed twice sooner than it is waited for."""


def choose_leader(
    sequence: Sequence, prefilling: Iterable[Sequence], *, min_blocks: int, max_blocks: int
) -> None:
    """Let a waiting sequence wait for the first that will compute `min_blocks` or more of its blocks."""
    for leader in prefilling:
        if leader.request.priority < sequence.request.priority:
            continue
        num_shared = num_shared_blocks(leader, sequence, limit=max_blocks)
        if num_shared >= min_blocks:
            sequence.waits_for, sequence.num_awaited_blocks = leader, num_shared
            return


def num_shared_blocks(one: Sequence, other: Sequence, *, limit: int) -> int:
    """How many full blocks both begin with, up to `limit`: a hash names all tokens before it, too."""
    ours, theirs = one.block_hashes, other.block_hashes
    limit = min(limit, len(ours), len(theirs))
    return bisect_left(range(limit), True, key=lambda index: ours[index] != theirs[index])
