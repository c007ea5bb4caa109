"""Small sums between GPUs of one host in one kernel: every rank reads the others' memory and adds up.

NCCL takes several passes over the ring, which for the few KiB of a decode step is all latency. This one comes
from PyTorch's symmetric memory; it sums in rank order, so every rank gets the same bits, and it only launches
kernels, so a graph can record it. Whether it serves is tried by `process_group.py` once, at start-up, against
the group's own sum.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory

SmallSum = Callable[[torch.Tensor], torch.Tensor]
"""Sum a small contiguous tensor over the ranks, in place; returns it."""

MAX_BYTES = 256 * 2**10
"""Above, all ranks reading everything costs more than NCCL's passes."""
_GRANULE_BYTES = 16
"""Sizes must be a multiple, for loads of full width."""
DTYPES = (torch.bfloat16, torch.float32)
"""What the kernel adds."""


def is_small(x: torch.Tensor) -> bool:
    """Whether a sum of `x` is one that `open_one_shot` serves."""
    size_bytes = x.numel() * x.element_size()
    return 0 < size_bytes <= MAX_BYTES and size_bytes % _GRANULE_BYTES == 0 and x.dtype in DTYPES


def open_one_shot(group_name: str, device: torch.device) -> SmallSum:
    """Map the buffers of all ranks into each other; all ranks together. RuntimeError where it cannot be done.

    The kernel meets its peers before and after, so one buffer per type is enough for sums back to back.
    """
    buffers = {
        dtype: symmetric_memory.empty(MAX_BYTES // dtype.itemsize, dtype=dtype, device=device)
        for dtype in DTYPES
    }
    for buffer in buffers.values():
        symmetric_memory.rendezvous(buffer, dist.distributed_c10d.GroupName(group_name))

    def add_up(x: torch.Tensor) -> torch.Tensor:
        part = buffers[x.dtype][: x.numel()]
        part.copy_(x.view(-1))
        torch.ops.symm_mem.one_shot_all_reduce_out(part, "sum", group_name, x.view(-1))
        return x

    return add_up
