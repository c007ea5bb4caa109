"""The block pool: order of use, references, and the scratch block."""

from __future__ import annotations

import pytest

from replicas.engine.block_pool import BlockPool


def test_gives_out_every_block_but_the_scratch_block() -> None:
    pool = BlockPool(num_blocks=4)
    assert (pool.num_total, pool.num_free) == (3, 3)
    assert pool.allocate(3) == [1, 2, 3]
    assert pool.num_free == 0


def test_reuses_the_least_recently_freed_first_and_the_end_of_a_table_before_its_start() -> None:
    pool = BlockPool(num_blocks=7)
    first, second = pool.allocate(2), pool.allocate(2)
    pool.release(second)
    pool.release(first)
    assert pool.allocate(6) == [5, 6, 4, 3, 2, 1]


def test_a_shared_block_is_free_only_after_its_last_reference() -> None:
    pool = BlockPool(num_blocks=3)
    blocks = pool.allocate(1)
    pool.share(blocks)
    pool.check(held=[1, 1])
    pool.release(blocks)
    assert pool.num_free == 1
    pool.release(blocks)
    assert pool.num_free == 2
    pool.check()


def test_releasing_twice_is_caught() -> None:
    pool = BlockPool(num_blocks=3)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(blocks)


def test_sharing_a_free_block_is_caught() -> None:
    with pytest.raises(AssertionError, match="only held or cached blocks"):
        BlockPool(num_blocks=3).share([1])


def test_the_check_catches_a_lost_block() -> None:
    pool = BlockPool(num_blocks=3)
    pool.allocate(1)
    with pytest.raises(AssertionError, match="references differ"):
        pool.check()


def test_a_pool_of_nothing_but_scratch_is_refused() -> None:
    with pytest.raises(ValueError, match="num_blocks is 1; at least 2"):
        BlockPool(num_blocks=1)
