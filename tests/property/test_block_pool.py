"""Whatever tables take, share and give back, no block is lost and none is given out twice."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from replicas.engine.block_pool import SCRATCH_BLOCK, BlockPool

HASHES = st.sampled_from([bytes([number]) for number in range(8)])


class BlockPoolMachine(RuleBasedStateMachine):
    """Tables that allocate at their end, share a beginning of another, and are released whole.

    `contents` is what each block was last filed as: what is found must hold what was asked for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(num_blocks=2)
        self.tables: list[list[int]] = []
        self.contents: dict[int, bytes] = {}
        self.told: set[bytes] = set()

    @initialize(num_blocks=st.integers(2, 12))
    def open_pool(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks=num_blocks)

    @rule(share=st.floats(0, 1))
    def start_table(self, share: float) -> None:
        self.tables.append(self.take(round(share * self.pool.num_free)))

    @precondition(lambda self: self.tables and self.pool.num_free)
    @rule(pick=st.integers(0))
    def grow_table(self, pick: int) -> None:
        self.tables[pick % len(self.tables)] += self.take(1)

    @precondition(lambda self: self.tables)
    @rule(pick=st.integers(0), length=st.integers(0, 12))
    def fork_table(self, pick: int, length: int) -> None:
        beginning = self.tables[pick % len(self.tables)][:length]
        self.pool.share(beginning)
        self.tables.append(beginning)

    @precondition(lambda self: self.tables)
    @rule(pick=st.integers(0), name=HASHES)
    def file_block(self, pick: int, name: bytes) -> None:
        for block in self.tables[pick % len(self.tables)][-1:]:
            is_news = self.pool.find([name]) == [] and block not in self.contents
            self.pool.file(block, name)
            if is_news:
                self.contents[block] = name

    @rule(names=st.lists(HASHES, max_size=4))
    def share_what_is_found(self, names: list[bytes]) -> None:
        found = self.pool.find(names)
        assert [self.contents[block] for block in found] == names[: len(found)]
        num_free, num_held = self.pool.num_free, self.pool.num_held(set(found))
        self.pool.share(found)
        assert self.pool.num_free == num_free - len(set(found)) + num_held
        self.tables.append(found)

    @precondition(lambda self: self.tables)
    @rule(pick=st.integers(0))
    def forget_table(self, pick: int) -> None:
        table = self.tables[pick % len(self.tables)]
        self.pool.forget(table)
        for block in table:
            if (name := self.contents.pop(block, None)) is not None:
                assert self.pool.find([name]) == []

    @precondition(lambda self: self.tables)
    @rule(count=st.integers(0, 3))
    def foresee_releases(self, count: int) -> None:
        leaving, self.tables = self.tables[:count], self.tables[count:]
        foreseen = self.pool.num_free + self.pool.num_freed_by(leaving)
        for table in leaving:
            self.pool.release(table)
        assert self.pool.num_free == foreseen

    @precondition(lambda self: self.tables)
    @rule(pick=st.integers(0))
    def release_table(self, pick: int) -> None:
        self.pool.release(self.tables.pop(pick % len(self.tables)))

    @rule()
    def tell_changes(self) -> None:
        added, removed = self.pool.take_changes()
        assert not self.told & set(added) and set(removed) <= self.told
        self.told = (self.told - set(removed)) | set(added)
        assert self.told == set(self.contents.values()), "who hears every change knows what can be found"

    def take(self, count: int) -> list[int]:
        """Allocate: nobody else holds what comes, and it can be found no more."""
        held = {block for table in self.tables for block in table}
        num_blank = self.pool.num_free - sum(block not in held for block in self.contents)
        blocks = self.pool.allocate(count)
        assert not held.intersection(blocks) and SCRATCH_BLOCK not in blocks
        evicted = [self.contents.pop(block) for block in blocks if block in self.contents]
        assert len(evicted) == max(0, count - num_blank), "blank blocks go first"
        assert not any(self.pool.find([name]) for name in evicted)
        return blocks

    @invariant()
    def what_is_filed_is_found(self) -> None:
        assert self.pool.num_cached == len(self.contents)
        assert all(self.pool.find([name]) == [block] for block, name in self.contents.items())

    @invariant()
    def every_block_is_free_or_held(self) -> None:
        self.pool.check(block for table in self.tables for block in table)


BlockPoolMachine.TestCase.settings = settings(
    max_examples=60, derandomize=True, stateful_step_count=40, deadline=None
)
TestBlockPool = BlockPoolMachine.TestCase
