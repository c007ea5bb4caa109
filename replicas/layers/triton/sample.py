"""The best token of every row of logits, with or without noise, without a word to the host.

The same draw as `replicas/rank/sampler.py`: an argmax of logit + temperature x Gumbel noise, which is a hash
(lowbias32 rounds) of the row's key and the token id. One pass finds the best of every tile of the vocabulary,
a second kernel the best of the tiles; a captured graph may hold both.

    logits_SV       float32, any row stride; the first `num_valid` columns are tokens
    keys_S2         int32: low and high word of the row's key
    temperatures_S  float32, 0: greedy

Shape letters: S rows, V local vocabulary, P tiles of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from replicas.layers.triton.launch import power_of_two

_TILE_V = 4096


def best_tokens(
    logits_SV: torch.Tensor,
    *,
    num_valid: int,
    first_id: int,
    keys_S2: torch.Tensor,
    temperatures_S: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 score [S], NaN where a logit is not finite, and int32 index [S] of the first best column.

    `first_id` is the token of column 0: noise belongs to tokens, not to columns.
    """
    rows = logits_SV.shape[0]
    tiles = -(-num_valid // _TILE_V)
    tile_scores_SP = logits_SV.new_empty((rows, tiles))
    tile_best_SP = torch.empty((rows, tiles), device=logits_SV.device, dtype=torch.int32)
    score_S = logits_SV.new_empty(rows)
    best_S = torch.empty(rows, device=logits_SV.device, dtype=torch.int32)
    _best_of_tiles[(rows, tiles)](
        logits_SV,
        keys_S2,
        temperatures_S,
        tile_scores_SP,
        tile_best_SP,
        logits_SV.stride(0),
        num_valid,
        first_id,
        TILE_V=_TILE_V,
        num_warps=8,
    )
    _best_of_rows[(rows,)](
        tile_scores_SP, tile_best_SP, score_S, best_S, TILES=tiles, TILE_P=power_of_two(tiles, 2), num_warps=1
    )
    return score_S, best_S


@triton.jit
def _mix32(x):
    """lowbias32, on unsigned words."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def _log1p(x):
    """log(1 + x), exact to rounding for small x too: the rounding of 1 + x is divided out (Kahan)."""
    wide = 1.0 + x
    rest = wide - 1.0
    is_small = rest == 0.0
    return tl.where(is_small, x, tl.log(wide) * (x / tl.where(is_small, 1.0, rest)))


@triton.jit
def _gumbel(token, low, high):
    hashed = _mix32(_mix32(_mix32(token) ^ low) + high) & 0x7FFFFFFF
    # The unit of `sampler.py`, just below 2**-31: never 1.
    uniform = (hashed.to(tl.int32).to(tl.float32) + 0.5) * 4.6566125955216364e-10
    return -tl.log(-_log1p(-uniform))


@triton.jit(do_not_specialize=["first_id"])
def _best_of_tiles(
    logits_ptr,
    keys_ptr,
    temperatures_ptr,
    scores_ptr,
    best_ptr,
    stride,
    num_valid,
    first_id,
    TILE_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    column = tile * TILE_V + tl.arange(0, TILE_V)
    is_token = column < num_valid
    logit = tl.load(logits_ptr + row * stride + column, mask=is_token, other=0.0)
    is_broken = tl.max((logit - logit != 0.0).to(tl.int32), 0) > 0
    temperature = tl.load(temperatures_ptr + row)
    score = logit
    if temperature != 0.0:
        low = tl.load(keys_ptr + row * 2).to(tl.uint32, bitcast=True)
        high = tl.load(keys_ptr + row * 2 + 1).to(tl.uint32, bitcast=True)
        token = (first_id + column).to(tl.uint32)
        score = logit + temperature * _gumbel(token, low, high)
    score = tl.where(is_token, score, float("-inf"))
    best = tl.max(score, 0)
    at = tile * TILE_V + tl.argmax(score, 0, tie_break_left=True)
    to = row * tl.num_programs(1) + tile
    tl.store(scores_ptr + to, tl.where(is_broken, float("nan"), best))
    tl.store(best_ptr + to, at)


@triton.jit
def _best_of_rows(scores_ptr, best_ptr, score_ptr, row_best_ptr, TILES: tl.constexpr, TILE_P: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILE_P)
    score = tl.load(scores_ptr + row * TILES + tile, mask=tile < TILES, other=float("-inf"))
    is_broken = tl.max((score != score).to(tl.int32), 0) > 0
    score = tl.where(score == score, score, float("-inf"))
    best = tl.max(score, 0)
    at = tl.argmax(score, 0, tie_break_left=True)
    tl.store(score_ptr + row, tl.where(is_broken, float("nan"), best))
    tl.store(row_best_ptr + row, tl.load(best_ptr + row * TILES + at))
