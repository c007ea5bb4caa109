"""Whatever tables take, share and give back, no block is lost and none is given out twice."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from replicas.engine.block_pool import SCRATCH_BLOCK, BlockPool


class BlockPoolMachine(RuleBasedStateMachine):
    """Tables that allocate at their end, share a beginning of another, and are released whole."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(num_blocks=2)
        self.tables: list[list[int]] = []

    @initialize(num_blocks=st.integers(2, 12))
    def open_pool(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks=num_blocks)

    @rule(share=st.floats(0, 1))
    def start_table(self, share: float) -> None:
        self.tables.append(self.pool.allocate(round(share * self.pool.num_free)))

    @precondition(lambda self: self.tables and self.pool.num_free)
    @rule(pick=st.integers(0))
    def grow_table(self, pick: int) -> None:
        held = {block for table in self.tables for block in table}
        (block,) = self.pool.allocate(1)
        assert block not in held and block != SCRATCH_BLOCK
        self.tables[pick % len(self.tables)].append(block)

    @precondition(lambda self: self.tables)
    @rule(pick=st.integers(0), length=st.integers(0, 12))
    def fork_table(self, pick: int, length: int) -> None:
        beginning = self.tables[pick % len(self.tables)][:length]
        self.pool.share(beginning)
        self.tables.append(beginning)

    @precondition(lambda self: self.tables)
    @rule(pick=st.integers(0))
    def release_table(self, pick: int) -> None:
        self.pool.release(self.tables.pop(pick % len(self.tables)))

    @invariant()
    def every_block_is_free_or_held(self) -> None:
        self.pool.check(block for table in self.tables for block in table)


BlockPoolMachine.TestCase.settings = settings(
    max_examples=60, derandomize=True, stateful_step_count=40, deadline=None
)
TestBlockPool = BlockPoolMachine.TestCase
