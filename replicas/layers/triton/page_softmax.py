"""The inner loop of both attention kernels: tiles of cached tokens, through a block table, into a softmax.

The online softmax (Milakov and Gimelshein, arXiv 1805.02867) in base 2: `best` is the running maximum of a
row, `total` and `summed` the sums below and above the fraction, all float32. Called by Triton code alone.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fold_pages(
    q,  # [M, D] query rows of one KV head
    keys_ptr,  # first element of that head in slot 0
    values_ptr,
    table_ptr,  # block table of the sequence
    first,  # tokens [first, last) are folded; first is a multiple of TILE_L
    last,
    position,  # [M]: with IS_MASKED a row sees tokens up to its position
    scale_log2,
    best,
    total,
    summed,
    IS_MASKED: tl.constexpr,
    SLOT_SIZE: tl.constexpr,  # elements from a slot to the next: K * D
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_L: tl.constexpr,
    PRECISION: tl.constexpr,
):
    dim = tl.arange(0, TILE_D)
    is_dim = dim < HEAD_DIM
    for start in range(first, last, TILE_L):
        token = start + tl.arange(0, TILE_L)
        is_cached = token < last
        page = tl.load(table_ptr + token // PAGE_TOKENS, mask=is_cached, other=0)
        place = (page.to(tl.int64) * PAGE_TOKENS + token % PAGE_TOKENS) * SLOT_SIZE
        k_from = keys_ptr + place[None, :] + dim[:, None]
        k = tl.load(k_from, mask=is_cached[None, :] & is_dim[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision=PRECISION) * scale_log2
        if IS_MASKED:
            scores = tl.where(token[None, :] <= position[:, None], scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        # A row that has seen nothing yet keeps -inf, and -inf - -inf is no number.
        anchor = tl.where(new_best == float("-inf"), 0.0, new_best)
        shrink = tl.exp2(best - anchor)
        weights = tl.exp2(scores - anchor[:, None])
        v_from = values_ptr + place[:, None] + dim[None, :]
        v = tl.load(v_from, mask=is_cached[:, None] & is_dim[None, :], other=0.0)
        total = total * shrink + tl.sum(weights, 1)
        summed = summed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        best = new_best
    return best, total, summed
