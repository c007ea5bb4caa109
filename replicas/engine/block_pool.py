"""The KV blocks of one lane: who holds how many references to which.

A block is a fixed number of token positions in every layer's KV cache; here it is only a number. Block 0 is
scratch for padding and is never given out. A block returns to the free list when its last reference goes,
and is given out again least recently freed first, so that freed contents live as long as they can.
Pure: called by the lanes of the scheduler alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

SCRATCH_BLOCK = 0


class BlockPool:
    """Owns the reference counts. Example: `num_blocks=4` gives out blocks 1, 2 and 3."""

    def __init__(self, *, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks is {num_blocks}; at least 2 (block {SCRATCH_BLOCK} is scratch)")
        self._references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(SCRATCH_BLOCK + 1, num_blocks))

    @property
    def num_total(self) -> int:
        """Blocks that can be given out."""
        return len(self._references) - 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each. The caller has looked at `num_free`."""
        assert count <= len(self._free), "the caller asks for no more than num_free"
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One more reference to blocks that somebody already holds."""
        for block in blocks:
            assert self._references[block] > 0, f"block {block} is free; only held blocks are shared"
            self._references[block] += 1

    def release(self, blocks: list[int]) -> None:
        """Give back one reference each. The end of a table is freed first: it is the least worth keeping."""
        for block in reversed(blocks):
            self._references[block] -= 1
            assert self._references[block] >= 0, f"block {block} was released more often than held"
            if self._references[block] == 0:
                self._free[block] = None

    def check(self, held: Iterable[int] = ()) -> None:
        """Assert that every block is free or held, and `held` (with repeats) are all the references."""
        counts = [0] * len(self._references)
        for block in held:
            counts[block] += 1
        assert counts == self._references, "references differ from the tables that hold them"
        assert counts[SCRATCH_BLOCK] == 0, "the scratch block is never held"
        num_held = sum(count > 0 for count in counts)
        assert num_held + len(self._free) == self.num_total, "a block is neither free nor held"
        assert not any(counts[block] for block in self._free), "a free block is held"
