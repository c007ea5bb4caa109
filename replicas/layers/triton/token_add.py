"""For one token: a matrix product, or the weighted sum of those of the chosen experts, added to the residual.

    x_1H += multiplier * sum over c of share_c * (hidden_CF[c] @ weight.T), in float32, rounded once

A program owns its part of `x_1H`: nobody else reads or writes it in this launch. Experts are added in the
order of the choices. Shape letters: H hidden, F inputs, E experts, C choices (1 without experts).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from replicas.layers.triton.token_tiles import token_tiles


def add_product(
    x_1H: torch.Tensor,
    hidden_CF: torch.Tensor,
    weight: torch.Tensor,
    *,
    multiplier: float,
    choices_1C: torch.Tensor | None = None,
    shares_1C: torch.Tensor | None = None,
) -> None:
    """Change dense `x_1H`. `weight` is [H, F]; with int32 choices and float32 shares [E, H, F]."""
    hidden, size = weight.shape[-2:]
    num_choices = 1 if choices_1C is None else choices_1C.shape[1]
    tiles = token_tiles(hidden, size, x_1H.device)
    _add_product[(-(-hidden // tiles.rows),)](
        x_1H,
        hidden_CF,
        weight,
        x_1H if choices_1C is None else choices_1C,
        x_1H if shares_1C is None else shares_1C,
        multiplier,
        HIDDEN=hidden,
        SIZE=size,
        CHOICES=num_choices,
        HAS_CHOICES=choices_1C is not None,
        TILE_N=tiles.rows,
        TILE_K=tiles.depth,
        num_warps=tiles.num_warps,
    )


@triton.jit
def _add_product(
    x_ptr,
    hidden_ptr,
    weight_ptr,
    choices_ptr,
    shares_ptr,
    multiplier,
    HIDDEN: tl.constexpr,
    SIZE: tl.constexpr,
    CHOICES: tl.constexpr,
    HAS_CHOICES: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    row = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    is_row = row < HIDDEN
    depth = tl.arange(0, TILE_K)
    weight_from = weight_ptr + row.to(tl.int64)[:, None] * SIZE + depth[None, :]
    product = tl.zeros([TILE_N, TILE_K], tl.float32)
    for choice in tl.static_range(CHOICES):
        chosen_from = weight_from
        share = 1.0
        if HAS_CHOICES:
            chosen_from += tl.load(choices_ptr + choice).to(tl.int64) * (HIDDEN * SIZE)
            share = tl.load(shares_ptr + choice)
        for start in range(0, SIZE, TILE_K):
            is_deep = start + depth < SIZE
            weight = tl.load(chosen_from + start, mask=is_row[:, None] & is_deep[None, :], other=0.0)
            hidden = tl.load(hidden_ptr + choice * SIZE + start + depth, mask=is_deep, other=0.0)
            product += weight.to(tl.float32) * (hidden.to(tl.float32) * share)[None, :]
    x = tl.load(x_ptr + row, mask=is_row, other=0.0).to(tl.float32)
    out = x + multiplier * tl.sum(product, 1)
    tl.store(x_ptr + row, out.to(x_ptr.dtype.element_ty), mask=is_row)
