"""Attention of one new token per sequence over pages, split over the context (flash-decoding).

A program takes the G query heads of one KV head of one sequence, folded into the rows of a tile, and a part
of its context; the parts are merged by their log-sum weights (Dao et al., "Flash-Decoding", 2023; the online
softmax itself is `page_softmax.py`). The number of parts is fixed by the host, their
borders come from lengths on the device: a captured graph serves every context up to its bound.

    q_BND     float32, bfloat16 or float16; heads and head_dim dense, any row stride
    keys, values  [blocks, page tokens, K, D] of q's dtype, dense, as `PagedKV` has them
    tables_BP, lengths_B  int32; out [B, N, D] of q's dtype; sums in float32

A length of 0 gives zeros. Shape letters: B sequences, N query heads, K KV heads, G = N/K, D head_dim.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from replicas.layers.triton.launch import LEAST_DOT, dot_precision, num_processors, power_of_two
from replicas.layers.triton.page_softmax import fold_pages

_MAX_SPLITS = 64
_PROGRAMS_PER_PROCESSOR = 2


def decode_attention(
    q_BND: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables_BP: torch.Tensor,
    lengths_B: torch.Tensor,
    out_BND: torch.Tensor,
    *,
    scale: float,
    max_context_tokens: int,
) -> None:
    """Fill `out_BND`. No length is above `max_context_tokens`."""
    rows, num_heads, head_dim = q_BND.shape
    num_kv_heads = keys.shape[2]
    tile_tokens = tile_tokens_of(head_dim, q_BND.dtype)
    splits = num_splits(
        rows * num_kv_heads, -(-max_context_tokens // tile_tokens), num_processors(q_BND.device)
    )
    # With one part the kernel writes the output itself, and these are not touched.
    part_shape = (rows, num_heads, splits) if splits > 1 else (1, 1, 1)
    sums = torch.empty((*part_shape, head_dim), device=q_BND.device, dtype=torch.float32)
    stats = torch.empty((*part_shape, 2), device=q_BND.device, dtype=torch.float32)
    group = num_heads // num_kv_heads
    _attend_part[(rows, num_kv_heads, splits)](
        q_BND,
        keys,
        values,
        tables_BP,
        lengths_B,
        out_BND,
        sums,
        stats,
        q_BND.stride(0),
        out_BND.stride(0),
        tables_BP.stride(0),
        scale * math.log2(math.e),
        GROUP=group,
        KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        PAGE_TOKENS=keys.shape[1],
        SPLITS=splits,
        TILE_G=power_of_two(group, LEAST_DOT),
        TILE_D=power_of_two(head_dim, LEAST_DOT),
        TILE_L=tile_tokens,
        PRECISION=dot_precision(q_BND.dtype),
        num_warps=4,
        num_stages=3,
    )
    if splits > 1:
        _merge_parts[(rows, num_heads)](
            sums,
            stats,
            out_BND,
            out_BND.stride(0),
            HEAD_DIM=head_dim,
            SPLITS=splits,
            TILE_D=power_of_two(head_dim),
            num_warps=2,
        )


def tile_tokens_of(head_dim: int, dtype: torch.dtype) -> int:
    """Cached tokens of one tile: K and V of three pipeline stages must fit the shared memory."""
    tile_bytes = 16 * 1024
    return max(LEAST_DOT, min(128, tile_bytes // (power_of_two(head_dim, LEAST_DOT) * dtype.itemsize)))


def num_splits(num_programs: int, num_tiles: int, processors: int) -> int:
    """Parts of a context, a power of two: enough to fill the device twice, none smaller than a tile."""
    wanted = -(-_PROGRAMS_PER_PROCESSOR * processors // num_programs)
    return power_of_two(max(1, min(wanted, num_tiles, _MAX_SPLITS)))


# A kernel for every alignment of the tables would be compiled while requests wait.
@triton.jit(do_not_specialize=["tables_ptr", "lengths_ptr", "table_stride"])
def _attend_part(
    q_ptr,
    keys_ptr,
    values_ptr,
    tables_ptr,
    lengths_ptr,
    out_ptr,
    sums_ptr,
    stats_ptr,
    q_stride,
    out_stride,
    table_stride,
    scale_log2,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE_G: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_L: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lengths_ptr + row)
    part_tokens = tl.cdiv(tl.cdiv(length, TILE_L), SPLITS) * TILE_L
    first = split * part_tokens
    end = tl.minimum(first + part_tokens, length)

    group = tl.arange(0, TILE_G)
    head = kv_head * GROUP + group
    dim = tl.arange(0, TILE_D)
    is_out = (group[:, None] < GROUP) & (dim[None, :] < HEAD_DIM)
    q = tl.load(q_ptr + row * q_stride + head[:, None] * HEAD_DIM + dim[None, :], mask=is_out, other=0.0)

    # One query per sequence sees all that is cached: the mask is the end of the part.
    best, total, summed = fold_pages(
        q, keys_ptr + kv_head * HEAD_DIM, values_ptr + kv_head * HEAD_DIM, tables_ptr + row * table_stride,
        first, end, tl.full([TILE_G], end - 1, tl.int32), scale_log2,
        tl.full([TILE_G], float("-inf"), tl.float32), tl.zeros([TILE_G], tl.float32),
        tl.zeros([TILE_G, TILE_D], tl.float32),
        True, KV_HEADS * HEAD_DIM, HEAD_DIM, PAGE_TOKENS, TILE_D, TILE_L, PRECISION,
    )  # fmt: skip
    if SPLITS == 1:
        # An empty context has total 0; a broken one keeps its NaN for the sampler to find.
        out = summed / tl.where(total == 0.0, 1.0, total)[:, None]
        to = out_ptr + row * out_stride + head[:, None] * HEAD_DIM + dim[None, :]
        tl.store(to, out.to(out_ptr.dtype.element_ty), mask=is_out)
    else:
        part = (row * (KV_HEADS * GROUP) + head) * SPLITS + split
        tl.store(stats_ptr + part * 2, best, mask=group < GROUP)
        tl.store(stats_ptr + part * 2 + 1, total, mask=group < GROUP)
        tl.store(sums_ptr + part[:, None] * HEAD_DIM + dim[None, :], summed, mask=is_out)


@triton.jit
def _merge_parts(
    sums_ptr,
    stats_ptr,
    out_ptr,
    out_stride,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dim = tl.arange(0, TILE_D)
    part = (row * tl.num_programs(1) + head) * SPLITS + tl.arange(0, SPLITS)
    best = tl.load(stats_ptr + part * 2)
    total = tl.load(stats_ptr + part * 2 + 1)
    is_used = best != float("-inf")
    shrink = tl.where(is_used, tl.exp2(best - tl.max(best, 0)), 0.0)
    summed = tl.load(
        sums_ptr + part[:, None] * HEAD_DIM + dim[None, :],
        mask=is_used[:, None] & (dim[None, :] < HEAD_DIM),
        other=0.0,
    )
    whole = tl.sum(total * shrink, 0)
    out = tl.sum(summed * shrink[:, None], 0) / tl.where(whole == 0.0, 1.0, whole)
    to = out_ptr + row * out_stride + head * HEAD_DIM + dim
    tl.store(to, out.to(out_ptr.dtype.element_ty), mask=dim < HEAD_DIM)
