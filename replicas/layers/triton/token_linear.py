"""For one token: its norm and a matrix product in one launch.

    out_1O = (x / sqrt(mean(x^2) + eps) * norm) @ weight_OH.T, in float32, rounded once

Every program takes the norm of the whole row, which is a few KiB beside its part of the matrix. float32,
bfloat16 or float16; `weight_OH` dense. Shape letters: H hidden, O outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from replicas.layers.triton.token_tiles import token_tiles


def norm_linear(
    x_1H: torch.Tensor, norm_H: torch.Tensor, weight_OH: torch.Tensor, *, eps: float
) -> torch.Tensor:
    """[1, O] of x's dtype."""
    num_rows, hidden = weight_OH.shape
    out_1O = x_1H.new_empty((1, num_rows))
    tiles = token_tiles(num_rows, hidden, x_1H.device)
    _norm_linear[(-(-num_rows // tiles.rows),)](
        x_1H,
        norm_H,
        weight_OH,
        out_1O,
        eps,
        HIDDEN=hidden,
        ROWS=num_rows,
        TILE_N=tiles.rows,
        TILE_K=tiles.depth,
        num_warps=tiles.num_warps,
    )
    return out_1O


@triton.jit
def _norm_linear(
    x_ptr,
    norm_ptr,
    weight_ptr,
    out_ptr,
    eps,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    row = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    is_row = row < ROWS
    depth = tl.arange(0, TILE_K)
    weight_from = weight_ptr + row.to(tl.int64)[:, None] * HIDDEN + depth[None, :]
    product = tl.zeros([TILE_N, TILE_K], tl.float32)
    square = tl.zeros([TILE_K], tl.float32)
    for start in range(0, HIDDEN, TILE_K):
        is_deep = start + depth < HIDDEN
        weight = tl.load(weight_from + start, mask=is_row[:, None] & is_deep[None, :], other=0.0)
        x = tl.load(x_ptr + start + depth, mask=is_deep, other=0.0).to(tl.float32)
        norm = tl.load(norm_ptr + start + depth, mask=is_deep, other=0.0).to(tl.float32)
        product += weight.to(tl.float32) * (x * norm)[None, :]
        square += x * x
    inverse = tl.rsqrt(tl.sum(square, 0) / HIDDEN + eps)
    out = tl.sum(product, 1) * inverse
    tl.store(out_ptr + row, out.to(out_ptr.dtype.element_ty), mask=is_row)
