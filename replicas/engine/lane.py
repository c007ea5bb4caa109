"""One lane: a block pool and the sequences that live in it, waiting and running.

A lane owns where its sequences' blocks come from and in which order they get them. Both queues are kept
sorted by `Sequence.order`, so the first is served first and the last is preempted first. Pure; called by
the scheduler alone.

Admission takes the blocks of all known tokens at once: a prefill never stops half-way for want of blocks,
only decoding asks for more. It leaves one free block per running sequence, or decoding would soon preempt
what was just admitted.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from operator import attrgetter

from replicas.engine.block_pool import BlockPool
from replicas.engine.sequence import Sequence, SequenceState

_by_order = attrgetter("order")


class Lane:
    """Owns the pool and both queues; the scheduler owns rows, steps and outcomes."""

    def __init__(self, *, num_blocks: int, block_tokens: int) -> None:
        self.pool = BlockPool(num_blocks=num_blocks)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._block_tokens = block_tokens
        self._num_waiting_tokens = 0

    @property
    def capacity_tokens(self) -> int:
        """The longest sequence that fits when it is alone."""
        return self.pool.num_total * self._block_tokens

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens to compute before every sequence of this lane decodes."""
        return self._num_waiting_tokens + sum(
            sequence.num_uncomputed for sequence in self.running if not sequence.is_decoding
        )

    def enqueue(self, sequence: Sequence) -> None:
        sequence.state = SequenceState.WAITING
        insort(self.waiting, sequence, key=_by_order)
        self._num_waiting_tokens += sequence.length

    def admit(self, sequence: Sequence) -> None:
        """From waiting to running, with blocks. The caller has asked `has_blocks_for`."""
        self._remove_waiting(sequence)
        sequence.state = SequenceState.RUNNING
        sequence.blocks = self.pool.allocate(self._blocks_of(sequence))
        insort(self.running, sequence, key=_by_order)

    def remove(self, sequence: Sequence) -> None:
        """Out of its queue, and its blocks back into the pool."""
        if sequence.state is SequenceState.WAITING:
            self._remove_waiting(sequence)
            return
        _remove(self.running, sequence)
        self.pool.release(sequence.blocks)
        sequence.blocks = []

    def needs_block(self, sequence: Sequence) -> bool:
        """Whether the next position lies past the last block."""
        return sequence.num_computed == len(sequence.blocks) * self._block_tokens

    def grow(self, sequence: Sequence) -> None:
        """One more block. The caller has looked at `pool.num_free`."""
        sequence.blocks += self.pool.allocate(1)

    def has_blocks_for(self, sequence: Sequence) -> bool:
        return self._blocks_of(sequence) + len(self.running) <= self.pool.num_free

    def victims_for(self, sequence: Sequence, *, has_row: bool) -> list[Sequence]:
        """The fewest running sequences of lower priority whose blocks and row would admit `sequence`.

        Newest of the lowest priority first; empty if it fits as it is, and if all of them were not enough.
        """
        num_free, num_running = self.pool.num_free, len(self.running)
        needed = self._blocks_of(sequence)
        victims: list[Sequence] = []
        for victim in reversed(self.running):
            if (has_row or victims) and needed + num_running <= num_free:
                return victims
            if victim.request.priority >= sequence.request.priority:
                return []
            victims.append(victim)
            num_free += len(victim.blocks)
            num_running -= 1
        return victims

    def _blocks_of(self, sequence: Sequence) -> int:
        return -(-sequence.length // self._block_tokens)

    def _remove_waiting(self, sequence: Sequence) -> None:
        _remove(self.waiting, sequence)
        self._num_waiting_tokens -= sequence.length


def _remove(queue: list[Sequence], sequence: Sequence) -> None:
    index = bisect_left(queue, sequence.order, key=_by_order)
    assert queue[index] is sequence, "a sequence is in the queue its state says"
    del queue[index]
