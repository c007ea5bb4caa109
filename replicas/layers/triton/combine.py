"""The sum of what the chosen experts made of a token, weighted by their shares, in float32.

`y_MH` holds one row per pair (token * C + choice); rows of other ranks' experts were never written and are
not read. Choices are added in order, so that a sum is the same on every run. Shape letters: T tokens,
C choices, M = T*C pairs, H hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from replicas.layers.triton.launch import power_of_two

_MAX_TILE = 1024


def combine_experts(
    y_MH: torch.Tensor,
    choices_TC: torch.Tensor,
    shares_TC: torch.Tensor,
    *,
    first_expert: int,
    num_local: int,
) -> torch.Tensor:
    """[T, H] of y's dtype: this rank's experts' part; zeros for a token none of whose experts are here."""
    tokens, num_choices = choices_TC.shape
    hidden_size = y_MH.shape[1]
    out_TH = y_MH.new_empty((tokens, hidden_size))
    tile = min(_MAX_TILE, power_of_two(hidden_size))
    _combine[(tokens, -(-hidden_size // tile))](
        y_MH,
        choices_TC,
        shares_TC,
        out_TH,
        first_expert,
        num_local,
        HIDDEN=hidden_size,
        CHOICES=num_choices,
        TILE_H=tile,
        num_warps=max(1, min(4, tile // 256)),
    )
    return out_TH


@triton.jit(do_not_specialize=["first_expert", "num_local"])
def _combine(
    y_ptr,
    choices_ptr,
    shares_ptr,
    out_ptr,
    first_expert,
    num_local,
    HIDDEN: tl.constexpr,
    CHOICES: tl.constexpr,
    TILE_H: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE_H + tl.arange(0, TILE_H)
    is_real = column < HIDDEN
    summed = tl.zeros([TILE_H], tl.float32)
    for choice in tl.static_range(CHOICES):
        pair = token * CHOICES + choice
        local = tl.load(choices_ptr + pair) - first_expert
        is_here = (local >= 0) & (local < num_local)
        y = tl.load(y_ptr + pair * HIDDEN + column, mask=is_real & is_here, other=0.0).to(tl.float32)
        summed += tl.where(is_here, tl.load(shares_ptr + pair), 0.0) * y
    tl.store(out_ptr + token * HIDDEN + column, summed.to(out_ptr.dtype.element_ty), mask=is_real)
