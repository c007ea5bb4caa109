"""How wide a launch should be: facts of the device and sizes that tiles are rounded to.

Tile sizes in the kernel files are chosen for Hopper (132 processors, 228 KiB of shared memory each) from
arithmetic, not yet from measurements; `make gpu-check` gives the time of every kernel.
"""

from __future__ import annotations

from functools import cache

import torch

LEAST_DOT = 16
"""A tensor core multiplies tiles of at least this many rows and columns; smaller ones are padded."""
_INTERPRETER_PROCESSORS = 2


@cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; a small number for the interpreter."""
    if device.type != "cuda":
        return _INTERPRETER_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def power_of_two(count: int, least: int = 1) -> int:
    """The smallest power of two that is at least `count` and `least`."""
    return max(least, 1 << (count - 1).bit_length())


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products are exact to rounding; TF32 would keep ten bits of them."""
    return "ieee" if dtype == torch.float32 else "tf32"
