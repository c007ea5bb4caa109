"""The gated activation silu(gate) * up of the fused product, in one pass (SwiGLU: Shazeer, arXiv 2002.05202).

`gate_up_T2F` dense, float32, bfloat16 or float16; float32 inside, rounded once. Shape letters: T tokens,
F hidden columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_TILE = 1024


def swiglu(gate_up_T2F: torch.Tensor) -> torch.Tensor:
    """[T, F] of [T, 2F]: the first half is the gate."""
    tokens, double = gate_up_T2F.shape
    out_TF = gate_up_T2F.new_empty((tokens, double // 2))
    _swiglu[(tokens, -(-double // 2 // _TILE))](
        gate_up_T2F, out_TF, gate_up_T2F.stride(0), double // 2, TILE_F=_TILE, num_warps=4
    )
    return out_TF


@triton.jit
def _swiglu(gate_up_ptr, out_ptr, stride, size, TILE_F: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE_F + tl.arange(0, TILE_F)
    is_real = column < size
    source = gate_up_ptr + token * stride + column
    gate = tl.load(source, mask=is_real, other=0.0).to(tl.float32)
    up = tl.load(source + size, mask=is_real, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + token * size + column, out.to(out_ptr.dtype.element_ty), mask=is_real)
