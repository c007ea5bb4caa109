"""One lane: a block pool, rows of the batch, and the sequences that live in it, waiting and running.

A lane owns where its sequences' blocks and rows come from and in which order they get them. Both queues are
kept sorted by `Sequence.order`, so the first is served first and the last is preempted first. Pure; called
by the scheduler alone.

Admission takes the blocks of all known tokens at once: a prefill never stops half-way for want of blocks,
only decoding asks for more. It leaves one free block per running sequence, or decoding would soon preempt
what was just admitted.

The beginning of a sequence that is cached is shared, not computed: full blocks only, and never all tokens,
since the last one has to run to give logits. A block of a prompt is filed when a plan computes it, so that
sequences of one step share it (`prefix_leaders.py`). If that computation breaks, or ends before a token was
sampled behind it, the block is forgotten, and who shared a broken one meanwhile starts anew.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterable
from operator import attrgetter

from replicas.engine.block_pool import BlockPool
from replicas.engine.prefix_hash import extend_hashes
from replicas.engine.prefix_leaders import MIN_SHARED_TOKENS, choose_leader
from replicas.engine.sequence import Sequence, SequenceState
from replicas.request import CacheChange

_by_order = attrgetter("order")


class Lane:
    """Owns the pool, the rows and both queues; the scheduler owns steps and outcomes."""

    def __init__(
        self, *, rows: range, num_blocks: int, block_tokens: int, caches_prefixes: bool = True
    ) -> None:
        self.pool = BlockPool(num_blocks=num_blocks)
        self._rows = rows
        self._free_rows = list(rows)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.prefilling: list[Sequence] = []
        """Of the running ones, those with more than their newest token to plan."""
        self._block_tokens = block_tokens
        self._caches_prefixes = caches_prefixes
        self._broken_blocks: set[int] = set()
        self._num_waiting_tokens = 0

    @property
    def capacity_tokens(self) -> int:
        """The longest sequence that fits when it is alone."""
        return self.pool.num_total * self._block_tokens

    @property
    def num_sequences(self) -> int:
        return len(self.waiting) + len(self.running)

    @property
    def num_rows(self) -> int:
        """The most sequences that run at once."""
        return len(self._rows)

    @property
    def num_free_rows(self) -> int:
        return len(self._free_rows)

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens to compute before every sequence of this lane decodes."""
        return self._num_waiting_tokens + sum(sequence.num_uncomputed for sequence in self.prefilling)

    def enqueue(self, sequence: Sequence) -> None:
        sequence.state = SequenceState.WAITING
        insort(self.waiting, sequence, key=_by_order)
        self._num_waiting_tokens += sequence.length

    def admit(self, sequence: Sequence) -> None:
        """From waiting to running, with a row and blocks. The caller has looked at both."""
        self._remove_waiting(sequence)
        sequence.row = heapq.heappop(self._free_rows)
        sequence.state = SequenceState.RUNNING
        cached = self._cached_blocks(sequence)
        self.pool.share(cached)
        sequence.blocks = cached + self.pool.allocate(self._blocks_of(sequence) - len(cached))
        sequence.reuse(num_blocks=len(cached), num_tokens=len(cached) * self._block_tokens)
        insort(self.running, sequence, key=_by_order)
        if not sequence.is_decoding:
            insort(self.prefilling, sequence, key=_by_order)

    def chunk_planned(self, sequence: Sequence) -> None:
        """Some of its prefill is planned: whoever comes later may share that. After the rest it decodes."""
        self._file(sequence, num_tokens=sequence.num_computed)
        if sequence.is_decoding and sequence in self.prefilling:
            _remove(self.prefilling, sequence)

    def remove(self, sequence: Sequence) -> None:
        """Out of its queue; its row is free again and its blocks are back in the pool."""
        if sequence.state is SequenceState.WAITING:
            self._remove_waiting(sequence)
            return
        _remove(self.running, sequence)
        if sequence in self.prefilling:
            _remove(self.prefilling, sequence)
        if not sequence.is_proved:
            self.pool.forget(sequence.blocks[sequence.num_reused_blocks :])
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        assert sequence.row is not None, "a running sequence has a row"
        heapq.heappush(self._free_rows, sequence.row)
        sequence.row = None

    def needs_block(self, sequence: Sequence) -> bool:
        """Whether the next position lies past the last block."""
        return sequence.num_computed == len(sequence.blocks) * self._block_tokens

    def grow(self, sequence: Sequence) -> None:
        """One more block. The caller has looked at `pool.num_free`."""
        sequence.blocks += self.pool.allocate(1)

    def file_computed(self, sequence: Sequence, *, num_tokens: int) -> None:
        """The KV of the first `num_tokens` of a running sequence is written and proved finite."""
        sequence.is_proved = True
        self._file(sequence, num_tokens=num_tokens)

    def _file(self, sequence: Sequence, *, num_tokens: int) -> None:
        num_full = num_tokens // self._block_tokens
        if num_full <= sequence.num_filed_blocks or not self._caches_prefixes:
            return
        self._extend_hashes(sequence)
        for index in range(sequence.num_filed_blocks, num_full):
            self.pool.file(sequence.blocks[index], sequence.block_hashes[index])
        sequence.num_filed_blocks = num_full

    def forget(self, sequence: Sequence) -> None:
        """The KV of a running sequence is not to be trusted: none of its blocks stays in the cache."""
        self.pool.forget(sequence.blocks)
        self._broken_blocks.update(sequence.blocks)

    def take_sharers_of_broken(self) -> list[Sequence]:
        """The running sequences that share what was forgotten since the last call, and have no token yet."""
        broken, self._broken_blocks = self._broken_blocks, set()
        return [
            sequence
            for sequence in (self.running if broken else ())
            if not sequence.is_proved and not broken.isdisjoint(sequence.blocks)
        ]

    def is_held(self, sequence: Sequence) -> bool:
        """Whether a waiting sequence had better wait for blocks that another one is about to compute."""
        if sequence.is_scoring:
            return False
        if sequence.waits_for is None and self._caches_prefixes and self.prefilling:
            choose_leader(
                sequence,
                self.prefilling,
                min_blocks=len(self._cached_blocks(sequence)) + -(-MIN_SHARED_TOKENS // self._block_tokens),
                max_blocks=self._num_sharable(sequence),
            )
        leader = sequence.waits_for
        return (
            leader is not None
            and leader.num_filed_blocks < sequence.num_awaited_blocks
            and leader in self.prefilling
        )

    def has_blocks_for(self, sequence: Sequence, *, besides: Iterable[Sequence] = ()) -> bool:
        """Whether it could be admitted now, and the waiting ones `besides` it as well."""
        reserved = sum([self._blocks_of(other) + 1 for other in besides])
        return self._num_needed(sequence, self._cached_blocks(sequence)) + reserved <= self.pool.num_free

    def victims_for(self, sequence: Sequence) -> list[Sequence]:
        """The fewest running sequences of lower priority whose blocks and row would admit `sequence`.

        Newest of the lowest priority first; empty if it fits as it is, and if all of them were not enough.
        """
        cached = self._cached_blocks(sequence)
        needed = self._num_needed(sequence, cached)
        num_free = self.pool.num_free
        victims: list[Sequence] = []
        for victim in reversed(self.running):
            if (self._free_rows or victims) and needed - len(victims) <= num_free:
                return victims
            if victim.request.priority >= sequence.request.priority:
                return []
            victims.append(victim)
            tables = [each.blocks for each in victims]
            num_free = self.pool.num_free + self.pool.num_freed_by(tables, without=cached)
        return victims

    def take_cache_change(self, index: int) -> CacheChange | None:
        """What this lane, number `index`, filed and let go since the last call; None: nothing."""
        added, removed = self.pool.take_changes()
        return CacheChange(lane=index, added=added, removed=removed) if added or removed else None

    def check_idle(self) -> None:
        """Assert that nothing is held when nothing lives."""
        assert len(self._free_rows) == len(self._rows), "an idle lane holds rows"
        assert self.pool.num_free == self.pool.num_total, "an idle lane holds blocks"

    def check(self) -> None:
        """Assert that queues, rows and blocks agree, by a pass over all of them; for tests."""
        self.pool.check(block for sequence in self.running for block in sequence.blocks)
        prefilling = [sequence for sequence in self.running if not sequence.is_decoding]
        assert self.prefilling == prefilling, "who prefills is not who says so"
        assert all(not sequence.blocks for sequence in self.waiting), "waiting sequences hold no blocks"
        assert all(sequence.row is None for sequence in self.waiting), "waiting sequences hold no row"
        held = [sequence.row for sequence in self.running if sequence.row is not None]
        assert sorted([*self._free_rows, *held]) == list(self._rows), "a row is lost or shared"

    def _cached_blocks(self, sequence: Sequence) -> list[int]:
        """The blocks a waiting sequence need not compute; at least its last token is left."""
        if not self._caches_prefixes:
            return []
        self._extend_hashes(sequence)
        if sequence.is_scoring:
            return []
        return self.pool.find(sequence.block_hashes[: self._num_sharable(sequence)])

    def _num_sharable(self, sequence: Sequence) -> int:
        return (len(sequence.tokens) - 1) // self._block_tokens

    def _extend_hashes(self, sequence: Sequence) -> None:
        extend_hashes(
            sequence.block_hashes,
            sequence.tokens,
            block_tokens=self._block_tokens,
            salt=sequence.request.cache_salt,
        )

    def _num_needed(self, sequence: Sequence, cached: list[int]) -> int:
        """Free blocks that its admission asks for: cached blocks that nobody holds are free ones, too."""
        return self._blocks_of(sequence) - self.pool.num_held(cached) + len(self.running)

    def _blocks_of(self, sequence: Sequence) -> int:
        return -(-sequence.length // self._block_tokens)

    def _remove_waiting(self, sequence: Sequence) -> None:
        _remove(self.waiting, sequence)
        self._num_waiting_tokens -= sequence.length


def _remove(queue: list[Sequence], sequence: Sequence) -> None:
    index = bisect_left(queue, sequence.order, key=_by_order)
    assert queue[index] is sequence, "a sequence is in the queue its state says"
    del queue[index]
