"""The KV cache of a device: what is left when everything else has its part."""

from __future__ import annotations

import pytest

from replicas.config import EngineLimits
from replicas.errors import BadCheckpoint
from replicas.rank.device_memory import DeviceMemory, blocks_that_fit, configured_blocks

GIB = 2**30


def make_memory(*, free_gib: int = 60, step_gib: int = 2, graph_gib: int = 1) -> DeviceMemory:
    return DeviceMemory(
        total_bytes=80 * GIB,
        free_bytes=free_gib * GIB,
        step_bytes=step_gib * GIB,
        graph_bytes=graph_gib * GIB,
    )


def test_blocks_fill_what_the_ratio_leaves() -> None:
    assert blocks_that_fit(make_memory(), ratio=0.9, block_bytes=GIB) == 49
    assert blocks_that_fit(make_memory(), ratio=1.0, block_bytes=GIB) == 57
    assert blocks_that_fit(make_memory(), ratio=0.9, block_bytes=4 * GIB) == 12
    assert blocks_that_fit(make_memory(step_gib=20), ratio=0.9, block_bytes=GIB) == 31


@pytest.mark.parametrize(
    "memory", [make_memory(free_gib=8), make_memory(step_gib=52), make_memory(graph_gib=49)]
)
def test_no_room_is_told_with_what_takes_it(memory: DeviceMemory) -> None:
    with pytest.raises(BadCheckpoint, match=r"gpu_memory_ratio=0.9 spares 8192 MiB; raise it, lower"):
        blocks_that_fit(memory, ratio=0.9, block_bytes=GIB)


def test_configured_sizes_come_first() -> None:
    assert configured_blocks(EngineLimits(num_blocks=7, kv_cache_bytes=1000), block_bytes=10) == 7
    assert configured_blocks(EngineLimits(kv_cache_bytes=1000), block_bytes=10) == 100
    assert configured_blocks(EngineLimits(), block_bytes=2**20) == 256
    with pytest.raises(BadCheckpoint, match="at least 2 blocks of 600 bytes"):
        configured_blocks(EngineLimits(kv_cache_bytes=1000), block_bytes=600)


def test_a_ratio_out_of_bounds_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gpu_memory_ratio is 1\.5; above 0, at most 1"):
        EngineLimits(gpu_memory_ratio=1.5)
