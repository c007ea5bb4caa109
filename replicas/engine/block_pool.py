"""The KV blocks of one lane: who holds how many references to which, and what the full ones hold.

A block is a fixed number of token positions in every layer's KV cache; here it is only a number. Block 0 is
scratch for padding and is never given out. A full block can be filed under the hash of its contents
(`prefix_hash.py`): whoever needs the same contents shares it instead of computing them, also after its last
reference has gone, until the block is needed for something else. Blank blocks are given out before cached
ones, and of those the least recently used goes first. A filed block is never written to: it is full.
Pure: called by the lanes of the scheduler alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from replicas.engine.cache_log import CacheLog

SCRATCH_BLOCK = 0


class BlockPool:
    """Owns the reference counts and the file. Example: `num_blocks=4` gives out blocks 1, 2 and 3."""

    def __init__(self, *, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks is {num_blocks}; at least 2 (block {SCRATCH_BLOCK} is scratch)")
        self._references = [0] * num_blocks
        self._blank: OrderedDict[int, None] = OrderedDict.fromkeys(range(SCRATCH_BLOCK + 1, num_blocks))
        """Free blocks that hold nothing of use, least recently freed first."""
        self._cached: OrderedDict[int, None] = OrderedDict()
        """Free blocks that are filed, least recently used first."""
        self._block_by_hash: dict[bytes, int] = {}
        self._hash_by_block: dict[int, bytes] = {}
        self._log = CacheLog()

    @property
    def num_total(self) -> int:
        """Blocks that can be given out."""
        return len(self._references) - 1

    @property
    def num_free(self) -> int:
        """Blocks that can be given out now; a cached block that nobody holds is one of them."""
        return len(self._blank) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks that can be found by their contents, held or not."""
        return len(self._block_by_hash)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each. The caller has looked at `num_free`."""
        assert count <= self.num_free, "the caller asks for no more than num_free"
        blocks = [self._take_free() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest prefix of `hashes` that is cached. Takes no reference."""
        blocks = []
        for block_hash in hashes:
            block = self._block_by_hash.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One more reference to blocks that somebody holds or that are cached."""
        for block in blocks:
            if self._references[block] == 0:
                assert block in self._cached, f"block {block} is free; only held or cached blocks are shared"
                del self._cached[block]
            self._references[block] += 1

    def release(self, blocks: list[int]) -> None:
        """Give back one reference each. The end of a table is freed first: it is the least worth keeping."""
        for block in reversed(blocks):
            self._references[block] -= 1
            assert self._references[block] >= 0, f"block {block} was released more often than held"
            if self._references[block] == 0:
                (self._cached if block in self._hash_by_block else self._blank)[block] = None

    def file(self, block: int, block_hash: bytes) -> None:
        """A held block is full and computed: from now on it can be found. The first of equals stays."""
        assert self._references[block] > 0, f"block {block} is free; only held blocks are filed"
        if block_hash not in self._block_by_hash and block not in self._hash_by_block:
            self._block_by_hash[block_hash] = block
            self._hash_by_block[block] = block_hash
            self._log.note(block_hash, is_filed=True)

    def forget(self, blocks: Iterable[int]) -> None:
        """What these held blocks hold is not to be trusted: nobody shall find them any more."""
        for block in blocks:
            assert self._references[block] > 0, f"block {block} is free; only held blocks are forgotten"
            self._unfile(block)

    def take_changes(self) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        """Hashes that can be found since the last call, and hashes that cannot be any more."""
        return self._log.take()

    def num_held(self, blocks: Iterable[int]) -> int:
        """How many of these somebody holds; sharing them takes nothing from `num_free`."""
        return sum(self._references[block] > 0 for block in blocks)

    def num_freed_by(self, tables: Sequence[list[int]], *, without: Iterable[int] = ()) -> int:
        """How much `num_free` would grow if these tables were released and the blocks `without` kept."""
        kept = set(without)
        counts: dict[int, int] = {}
        for table in tables:
            for block in table:
                counts[block] = counts.get(block, 0) + 1
        return sum(self._references[block] == count and block not in kept for block, count in counts.items())

    def check(self, held: Iterable[int] = ()) -> None:
        """Assert that every block is free or held, and `held` (with repeats) are all the references."""
        counts = [0] * len(self._references)
        for block in held:
            counts[block] += 1
        assert counts == self._references, "references differ from the tables that hold them"
        assert counts[SCRATCH_BLOCK] == 0, "the scratch block is never held"
        num_held = sum(count > 0 for count in counts)
        assert num_held + self.num_free == self.num_total, "a block is neither free nor held"
        assert not any(counts[block] for block in (*self._blank, *self._cached)), "a free block is held"
        filed = {block: block_hash for block_hash, block in self._block_by_hash.items()}
        assert filed == self._hash_by_block, "the file differs from its index"
        assert len(filed) == len(self._block_by_hash), "a block is filed twice"
        assert self._cached.keys() <= filed.keys(), "a cached block cannot be found"
        assert not self._blank.keys() & filed.keys(), "a blank block can be found"

    def _take_free(self) -> int:
        if self._blank:
            return self._blank.popitem(last=False)[0]
        block = self._cached.popitem(last=False)[0]
        self._unfile(block)
        return block

    def _unfile(self, block: int) -> None:
        block_hash = self._hash_by_block.pop(block, None)
        if block_hash is not None:
            del self._block_by_hash[block_hash]
            self._log.note(block_hash, is_filed=False)
