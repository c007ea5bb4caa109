"""Host memory on pages of 2 MiB, where the system gives them, for weights that every step reads through.

A core knows where some 4,000 pages lie. With 4 KiB each that is 16 MiB, so a step that streams 240 MB of
weights looks most of its pages up: at batch 1 to 8 that costs about 10 % of it (measured). Not for what
fills while requests wait: the first touch of such a page takes up to 5 ms in a virtual machine.
"""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch

CHUNK_BYTES = 64 * 2**20
"""Of an arena. What is left of it at the end is address space, not memory."""
_ALIGNMENT = 64
"""Of the tensors in an arena: a cache line."""


class HugeArena:
    """Copies of tensors, side by side in a few mappings. A mapping lives as long as any copy in it."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy."""
        if self._used + tensor.nbytes > len(self._chunk):
            self._chunk = _map(max(CHUNK_BYTES, tensor.nbytes))
            self._used = 0
        place = self._chunk[self._used : self._used + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self._used += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        return place.copy_(tensor)


def _map(num_bytes: int) -> torch.Tensor:
    """uint8 zeros in a mapping of their own."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # A kernel that was built without them.
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
