"""How many KV blocks fit into a device: what is left when weights, a full step and the graphs have theirs.

`blocks_that_fit` is the arithmetic; `measure_step_bytes` asks PyTorch's allocator what a warm-up step needs
beyond what is there before and after it. Called by `runner.py` while a replica starts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from replicas.config import EngineLimits
from replicas.errors import BadCheckpoint

PROBE_BLOCKS = 2
"""Blocks of the cache that a rank measures its steps with: a warm-up step uses scratch alone."""
MIN_BLOCKS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """A device with its weights loaded. `free_bytes` counts what PyTorch holds but does not use as free.

    `step_bytes` is the most a step needs at once; `graph_bytes` what captured steps keep for themselves.
    """

    total_bytes: int
    free_bytes: int
    step_bytes: int
    graph_bytes: int


def blocks_that_fit(memory: DeviceMemory, *, ratio: float, block_bytes: int) -> int:
    """Blocks in the `ratio` of the device that a rank may use; BadCheckpoint says what takes how much.

    Example: of 80 GiB 90 % may be used; 20 GiB are taken, 3 GiB are for steps: 49 GiB are left for blocks.
    """
    spared_bytes = round((1.0 - ratio) * memory.total_bytes)
    left_bytes = memory.free_bytes - memory.step_bytes - memory.graph_bytes - spared_bytes
    num_blocks = max(0, left_bytes) // block_bytes
    if num_blocks < MIN_BLOCKS:
        mib = 2**20
        raise BadCheckpoint(
            f"the device has no room for a KV cache: {memory.free_bytes // mib} of "
            f"{memory.total_bytes // mib} MiB are free beside the weights, a step needs "
            f"{memory.step_bytes // mib} MiB, graphs {memory.graph_bytes // mib} MiB, and "
            f"limits.gpu_memory_ratio={ratio:g} spares {spared_bytes // mib} MiB; raise it, lower "
            "limits.step_tokens or limits.max_sequences, or use more ranks"
        )
    return num_blocks


def configured_blocks(limits: EngineLimits, *, block_bytes: int) -> int:
    """The configured number, or as many as fit the configured bytes: the same on every rank of a group."""
    num_blocks = limits.num_blocks or limits.host_kv_bytes // block_bytes
    if num_blocks < MIN_BLOCKS:
        raise BadCheckpoint(
            f"limits give {num_blocks} KV blocks (num_blocks={limits.num_blocks}, "
            f"kv_cache_bytes={limits.host_kv_bytes}); at least {MIN_BLOCKS} blocks of {block_bytes} bytes "
            "are needed"
        )
    return num_blocks


def measure_step_bytes(device: torch.device, run: Callable[[], object]) -> int:
    """What `run` allocates at its peak beyond what is there before it. CUDA only."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before_bytes = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before_bytes


def read_device_memory(device: torch.device, *, step_bytes: int, graph_bytes: int) -> DeviceMemory:
    """After a measured step, so that what libraries hold for themselves is not counted as free."""
    torch.cuda.empty_cache()
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return DeviceMemory(
        total_bytes=total_bytes, free_bytes=free_bytes, step_bytes=step_bytes, graph_bytes=graph_bytes
    )
