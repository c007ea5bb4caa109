"""Residual sum and root-mean-square norm in one pass over the row.

    x_TH += multiplier * delta_TH, rounded to x's dtype as the sum alone would be
    normed_TH = x / sqrt(mean(x^2) + eps) * weight_H, in float32, rounded once

RMSNorm: Zhang and Sennrich, arXiv 1910.07467; `multiplier` is Granite's residual_multiplier. float32,
bfloat16 or float16; any row stride. One program per token holds its row in registers. Shape letters:
T tokens, H hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from replicas.layers.triton.launch import power_of_two


def add_norm(
    x_TH: torch.Tensor,
    delta_TH: torch.Tensor | None,
    weight_H: torch.Tensor,
    *,
    multiplier: float,
    eps: float,
) -> torch.Tensor:
    """The norm of the new `x_TH`, which is changed in place; without a delta it stays."""
    tokens, hidden = x_TH.shape
    normed_TH = torch.empty_like(x_TH, memory_format=torch.contiguous_format)
    tile = power_of_two(hidden)
    _add_norm[(tokens,)](
        x_TH,
        x_TH if delta_TH is None else delta_TH,
        weight_H,
        normed_TH,
        x_TH.stride(0),
        x_TH.stride(0) if delta_TH is None else delta_TH.stride(0),
        multiplier,
        eps,
        HIDDEN=hidden,
        HAS_DELTA=delta_TH is not None,
        TILE_H=tile,
        num_warps=max(1, min(16, tile // 512)),
    )
    return normed_TH


@triton.jit
def _add_norm(
    x_ptr,
    delta_ptr,
    weight_ptr,
    normed_ptr,
    x_stride,
    delta_stride,
    multiplier,
    eps,
    HIDDEN: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    TILE_H: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, TILE_H)
    is_real = column < HIDDEN
    x = tl.load(x_ptr + token * x_stride + column, mask=is_real, other=0.0)
    if HAS_DELTA:
        delta = tl.load(delta_ptr + token * delta_stride + column, mask=is_real, other=0.0)
        x = (x.to(tl.float32) + multiplier * delta.to(tl.float32)).to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + token * x_stride + column, x, mask=is_real)
    wide = x.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, 0) / HIDDEN + eps)
    weight = tl.load(weight_ptr + column, mask=is_real, other=0.0).to(tl.float32)
    normed = wide * inverse * weight
    tl.store(normed_ptr + token * HIDDEN + column, normed.to(normed_ptr.dtype.element_ty), mask=is_real)
