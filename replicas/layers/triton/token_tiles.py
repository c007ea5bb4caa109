"""How a product for one token is cut: a program reads some rows of a matrix, whole, in tiles.

A single row of activations leaves nothing for the tensor cores: the time is that of reading the weights, so
what counts is bytes under way. A tile is some 16 KiB, and there are several programs per processor, so that
each has more than the 36 KiB outstanding that 4.8 TB/s at a microsecond of latency ask of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from replicas.layers.triton.launch import num_processors, power_of_two

_PROGRAMS_PER_PROCESSOR = 4
_MOST_ROWS = 16
_TILE_ELEMENTS = 8192
_ELEMENTS_PER_WARP = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTiles:
    """`rows` of the matrix by `depth` of its columns."""

    rows: int
    depth: int
    num_warps: int


def token_tiles(num_rows: int, depth: int, device: torch.device, *, num_matrices: int = 1) -> TokenTiles:
    """For `num_rows` products of `depth` terms in all; `num_matrices` tiles are held at once."""
    programs = _PROGRAMS_PER_PROCESSOR * num_processors(device)
    rows = min(_MOST_ROWS // num_matrices, 1 << max(0, (num_rows // programs).bit_length() - 1))
    columns = min(power_of_two(depth), _TILE_ELEMENTS // num_matrices // rows)
    num_warps = max(1, min(4, rows * columns * num_matrices // _ELEMENTS_PER_WARP))
    return TokenTiles(rows=rows, depth=columns, num_warps=num_warps)
