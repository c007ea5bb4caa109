"""Causal attention of prompt chunks over pages: what is cached before them, and themselves.

FlashAttention-2 (Dao, arXiv 2307.08691) with keys and values read through a block table. A program takes a
run of tokens of one chunk and the G query heads of one KV head, folded into the rows of a tile, so that K
and V are read once for all of them. The chunk's own K and V must be in the pages already.

    q_TND     all flat tokens of the step; float32, bfloat16 or float16, any row stride
    starts_C1, lengths_C, tables_CP  int32: the chunks alone, decode rows left out
    out_TND   rows of decode tokens are left as they are

Shape letters: T tokens, C chunks, N query heads, K KV heads, G = N/K, D head_dim.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from replicas.layers.triton.launch import LEAST_DOT, dot_precision, power_of_two
from replicas.layers.triton.page_softmax import fold_pages


def prefill_attention(
    q_TND: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables_CP: torch.Tensor,
    lengths_C: torch.Tensor,
    starts_C1: torch.Tensor,
    out_TND: torch.Tensor,
    *,
    scale: float,
    max_chunk_tokens: int,
) -> None:
    """Fill the rows of the chunks in `out_TND`. No chunk has more than `max_chunk_tokens` tokens."""
    _, num_heads, head_dim = q_TND.shape
    num_kv_heads = keys.shape[2]
    group = num_heads // num_kv_heads
    # float32 tiles are twice as large, and their products run on the slower pipes anyway.
    is_wide = q_TND.dtype == torch.float32
    tile_rows = power_of_two(group, 32 if is_wide or max_chunk_tokens * group <= 32 else 128)
    tile_queries = tile_rows // group
    grid = (-(-max_chunk_tokens // tile_queries), num_kv_heads, lengths_C.shape[0])
    _attend_chunk[grid](
        q_TND,
        keys,
        values,
        tables_CP,
        lengths_C,
        starts_C1,
        out_TND,
        q_TND.stride(0),
        out_TND.stride(0),
        tables_CP.stride(0),
        scale * math.log2(math.e),
        GROUP=group,
        KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        PAGE_TOKENS=keys.shape[1],
        TILE_QUERIES=tile_queries,
        TILE_M=tile_rows,
        TILE_D=power_of_two(head_dim, LEAST_DOT),
        TILE_L=32 if is_wide else 64,
        PRECISION=dot_precision(q_TND.dtype),
        num_warps=8 if head_dim > 64 and (is_wide or tile_rows >= 128) else 4,
        num_stages=2 if is_wide else 3,
    )


# Tables and lengths are parts of larger tensors: their alignment changes from step to step, and a kernel for
# each would be compiled while requests wait.
@triton.jit(do_not_specialize=["tables_ptr", "lengths_ptr", "starts_ptr", "table_stride"])
def _attend_chunk(
    q_ptr,
    keys_ptr,
    values_ptr,
    tables_ptr,
    lengths_ptr,
    starts_ptr,
    out_ptr,
    q_stride,
    out_stride,
    table_stride,
    scale_log2,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    TILE_QUERIES: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_L: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # The last tokens look at the most: they start first.
    query_start = (tl.num_programs(0) - 1 - tl.program_id(0)) * TILE_QUERIES
    kv_head = tl.program_id(1)
    chunk = tl.program_id(2).to(tl.int64)
    first_token = tl.load(starts_ptr + chunk)
    num_tokens = tl.load(starts_ptr + chunk + 1) - first_token
    if query_start >= num_tokens:
        return
    length = tl.load(lengths_ptr + chunk)
    row = tl.arange(0, TILE_M)
    query = query_start + row // GROUP
    dim = tl.arange(0, TILE_D)
    is_row = ((row < TILE_QUERIES * GROUP) & (query < num_tokens))[:, None]
    is_out = is_row & (dim[None, :] < HEAD_DIM)
    flat = (first_token + query).to(tl.int64)[:, None]
    place = (kv_head * GROUP + row % GROUP)[:, None] * HEAD_DIM + dim[None, :]
    q = tl.load(q_ptr + flat * q_stride + place, mask=is_out, other=0.0)
    # Tiles that every row sees whole need no mask; the rest end at the last row's own token.
    first_position = length - num_tokens + query_start
    whole_end = (first_position + 1) // TILE_L * TILE_L
    end = tl.minimum(length, first_position + TILE_QUERIES)
    position = first_position + row // GROUP
    best = tl.full([TILE_M], float("-inf"), tl.float32)
    total = tl.zeros([TILE_M], tl.float32)
    summed = tl.zeros([TILE_M, TILE_D], tl.float32)
    tables_ptr += chunk * table_stride
    offset = kv_head * HEAD_DIM
    best, total, summed = fold_pages(
        q, keys_ptr + offset, values_ptr + offset, tables_ptr, 0, whole_end, position, scale_log2,
        best, total, summed, False, KV_HEADS * HEAD_DIM, HEAD_DIM, PAGE_TOKENS, TILE_D, TILE_L, PRECISION,
    )  # fmt: skip
    best, total, summed = fold_pages(
        q, keys_ptr + offset, values_ptr + offset, tables_ptr, whole_end, end, position, scale_log2,
        best, total, summed, True, KV_HEADS * HEAD_DIM, HEAD_DIM, PAGE_TOKENS, TILE_D, TILE_L, PRECISION,
    )  # fmt: skip
    out = (summed / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + flat * out_stride + place, out, mask=is_out)
