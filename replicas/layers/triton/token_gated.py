"""For one token: its norm, gate and up, and their activation in one launch, of an MLP or of chosen experts.

    hidden_CF = silu(normed @ gate.T) * (normed @ up.T), in float32, rounded once

The experts are read where the router's choices say: no lists, and none but those chosen. Norm as in
`token_linear.py`. Shape letters: H hidden, F hidden columns, E experts, C choices (1 for an MLP).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from replicas.layers.triton.token_tiles import token_tiles


def norm_gated(
    x_1H: torch.Tensor,
    norm_H: torch.Tensor,
    gate_up: torch.Tensor,
    *,
    eps: float,
    choices_1C: torch.Tensor | None = None,
) -> torch.Tensor:
    """[C, F] of x's dtype. `gate_up` is [2F, H], or with int32 choices [E, 2F, H]."""
    size, hidden = gate_up.shape[-2] // 2, gate_up.shape[-1]
    num_choices = 1 if choices_1C is None else choices_1C.shape[1]
    hidden_CF = x_1H.new_empty((num_choices, size))
    tiles = token_tiles(num_choices * size, hidden, x_1H.device, num_matrices=2)
    _norm_gated[(-(-size // tiles.rows), num_choices)](
        x_1H,
        norm_H,
        gate_up,
        x_1H if choices_1C is None else choices_1C,
        hidden_CF,
        eps,
        HIDDEN=hidden,
        SIZE=size,
        HAS_CHOICES=choices_1C is not None,
        TILE_N=tiles.rows,
        TILE_K=tiles.depth,
        num_warps=tiles.num_warps,
    )
    return hidden_CF


@triton.jit
def _norm_gated(
    x_ptr,
    norm_ptr,
    weight_ptr,
    choices_ptr,
    out_ptr,
    eps,
    HIDDEN: tl.constexpr,
    SIZE: tl.constexpr,
    HAS_CHOICES: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    choice = tl.program_id(1)
    if HAS_CHOICES:
        weight_ptr += tl.load(choices_ptr + choice).to(tl.int64) * (2 * SIZE * HIDDEN)
    column = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    is_column = column < SIZE
    depth = tl.arange(0, TILE_K)
    gate_from = weight_ptr + column.to(tl.int64)[:, None] * HIDDEN + depth[None, :]
    gate = tl.zeros([TILE_N, TILE_K], tl.float32)
    up = tl.zeros([TILE_N, TILE_K], tl.float32)
    square = tl.zeros([TILE_K], tl.float32)
    for start in range(0, HIDDEN, TILE_K):
        is_deep = start + depth < HIDDEN
        is_weight = is_column[:, None] & is_deep[None, :]
        gate_weight = tl.load(gate_from + start, mask=is_weight, other=0.0)
        up_weight = tl.load(gate_from + SIZE * HIDDEN + start, mask=is_weight, other=0.0)
        x = tl.load(x_ptr + start + depth, mask=is_deep, other=0.0).to(tl.float32)
        norm = tl.load(norm_ptr + start + depth, mask=is_deep, other=0.0).to(tl.float32)
        scaled = (x * norm)[None, :]
        gate += gate_weight.to(tl.float32) * scaled
        up += up_weight.to(tl.float32) * scaled
        square += x * x
    inverse = tl.rsqrt(tl.sum(square, 0) / HIDDEN + eps)
    opened = tl.sum(gate, 1) * inverse
    out = opened * tl.sigmoid(opened) * (tl.sum(up, 1) * inverse)
    tl.store(out_ptr + choice * SIZE + column, out.to(out_ptr.dtype.element_ty), mask=is_column)
