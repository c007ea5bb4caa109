"""The products of the experts: every pair's token row times its expert's matrices, dropless.

A program takes a tile of one expert's list of pairs and a tile of output columns, and leaves at once where
the list is shorter: the grid is fixed by the host, the work by counts on the device. Two kernels: gate and up
with their activation (SwiGLU, arXiv 2002.05202), and down.

    x_TH, hidden_MF, y_MH   rows by token or by pair (token * C + choice); pairs of other ranks' experts are
                            not written
    gate_up_E2FH, down_EHF  as the checkpoint has them, dense
    float32, bfloat16 or float16; sums in float32

Shape letters: T tokens, C choices, M = T*C pairs, E local experts, F hidden columns, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from replicas.layers.triton.launch import LEAST_DOT, dot_precision, power_of_two


@dataclass(frozen=True, slots=True, kw_only=True)
class PairLists:
    """Who goes where: what `expert_lists.py` makes; the local experts begin at `first_expert`."""

    pairs_ET: torch.Tensor
    counts_X: torch.Tensor
    first_expert: int
    num_choices: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tiles:
    rows: int
    columns: int
    depth: int
    num_warps: int


def gated_experts(x_TH: torch.Tensor, gate_up_E2FH: torch.Tensor, lists: PairLists) -> torch.Tensor:
    """[M, F]: silu(gate) * up of every local pair."""
    num_local, double_size, hidden_size = gate_up_E2FH.shape
    size, tokens = double_size // 2, x_TH.shape[0]
    tiles = _tiles_of(tokens, lists, x_TH.dtype)
    hidden_MF = x_TH.new_empty((tokens * lists.num_choices, size))
    _gated[(-(-size // tiles.columns), -(-tokens // tiles.rows), num_local)](
        x_TH,
        gate_up_E2FH,
        hidden_MF,
        lists.pairs_ET,
        lists.counts_X,
        tokens,
        lists.first_expert,
        x_TH.stride(0),
        HIDDEN=hidden_size,
        SIZE=size,
        CHOICES=lists.num_choices,
        TILE_M=tiles.rows,
        TILE_N=tiles.columns,
        TILE_K=tiles.depth,
        PRECISION=dot_precision(x_TH.dtype),
        num_warps=tiles.num_warps,
        num_stages=3,
    )
    return hidden_MF


def down_experts(hidden_MF: torch.Tensor, down_EHF: torch.Tensor, lists: PairLists) -> torch.Tensor:
    """[M, H]: the down product of every local pair, not yet weighted."""
    num_local, hidden_size, size = down_EHF.shape
    tokens = hidden_MF.shape[0] // lists.num_choices
    tiles = _tiles_of(tokens, lists, hidden_MF.dtype)
    y_MH = hidden_MF.new_empty((hidden_MF.shape[0], hidden_size))
    _down[(-(-hidden_size // tiles.columns), -(-tokens // tiles.rows), num_local)](
        hidden_MF,
        down_EHF,
        y_MH,
        lists.pairs_ET,
        lists.counts_X,
        tokens,
        lists.first_expert,
        HIDDEN=hidden_size,
        SIZE=size,
        TILE_M=tiles.rows,
        TILE_N=tiles.columns,
        TILE_K=tiles.depth,
        PRECISION=dot_precision(hidden_MF.dtype),
        num_warps=tiles.num_warps,
        num_stages=3,
    )
    return y_MH


def _tiles_of(tokens: int, lists: PairLists, dtype: torch.dtype) -> _Tiles:
    """As many rows as an expert gets on average; a decode step is bound by weights and wants deep tiles."""
    mean_pairs = -(-tokens * lists.num_choices // lists.counts_X.shape[0])
    rows = min(128, power_of_two(mean_pairs, LEAST_DOT))
    if dtype == torch.float32:
        return _Tiles(rows=min(rows, 32), columns=32, depth=32, num_warps=4)
    if rows <= 32:
        return _Tiles(rows=rows, columns=32, depth=128, num_warps=4)
    return _Tiles(rows=rows, columns=64 if rows < 128 else 128, depth=64, num_warps=8 if rows == 128 else 4)


@triton.jit(do_not_specialize=["tokens", "first_expert"])
def _gated(
    x_ptr,
    weight_ptr,
    out_ptr,
    pairs_ptr,
    counts_ptr,
    tokens,
    first_expert,
    x_stride,
    HIDDEN: tl.constexpr,
    SIZE: tl.constexpr,
    CHOICES: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    expert = tl.program_id(2).to(tl.int64)
    count = tl.load(counts_ptr + first_expert + expert)
    place = tl.program_id(1) * TILE_M + tl.arange(0, TILE_M)
    if tl.program_id(1) * TILE_M >= count:
        return
    is_pair = place < count
    pair = tl.load(pairs_ptr + expert * tokens + place, mask=is_pair, other=0).to(tl.int64)
    column = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    is_column = column < SIZE
    depth = tl.arange(0, TILE_K)
    x_from = x_ptr + (pair // CHOICES)[:, None] * x_stride + depth[None, :]
    gate_from = weight_ptr + (expert * (2 * SIZE) + column)[None, :] * HIDDEN + depth[:, None]
    up_from = gate_from + SIZE * HIDDEN
    gate = tl.zeros([TILE_M, TILE_N], tl.float32)
    up = tl.zeros([TILE_M, TILE_N], tl.float32)
    for start in range(0, HIDDEN, TILE_K):
        is_deep = start + depth < HIDDEN
        x = tl.load(x_from + start, mask=is_pair[:, None] & is_deep[None, :], other=0.0)
        is_weight = is_deep[:, None] & is_column[None, :]
        gate_weight = tl.load(gate_from + start, mask=is_weight, other=0.0)
        up_weight = tl.load(up_from + start, mask=is_weight, other=0.0)
        gate = tl.dot(x, gate_weight, gate, input_precision=PRECISION)
        up = tl.dot(x, up_weight, up, input_precision=PRECISION)
    out = gate * tl.sigmoid(gate) * up
    to = out_ptr + pair[:, None] * SIZE + column[None, :]
    tl.store(to, out.to(out_ptr.dtype.element_ty), mask=is_pair[:, None] & is_column[None, :])


@triton.jit(do_not_specialize=["tokens", "first_expert"])
def _down(
    hidden_ptr,
    weight_ptr,
    out_ptr,
    pairs_ptr,
    counts_ptr,
    tokens,
    first_expert,
    HIDDEN: tl.constexpr,
    SIZE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    expert = tl.program_id(2).to(tl.int64)
    count = tl.load(counts_ptr + first_expert + expert)
    place = tl.program_id(1) * TILE_M + tl.arange(0, TILE_M)
    if tl.program_id(1) * TILE_M >= count:
        return
    is_pair = place < count
    pair = tl.load(pairs_ptr + expert * tokens + place, mask=is_pair, other=0).to(tl.int64)
    column = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    is_column = column < HIDDEN
    depth = tl.arange(0, TILE_K)
    hidden_from = hidden_ptr + pair[:, None] * SIZE + depth[None, :]
    weight_from = weight_ptr + (expert * HIDDEN + column)[None, :] * SIZE + depth[:, None]
    out = tl.zeros([TILE_M, TILE_N], tl.float32)
    for start in range(0, SIZE, TILE_K):
        is_deep = start + depth < SIZE
        hidden = tl.load(hidden_from + start, mask=is_pair[:, None] & is_deep[None, :], other=0.0)
        weight = tl.load(weight_from + start, mask=is_deep[:, None] & is_column[None, :], other=0.0)
        out = tl.dot(hidden, weight, out, input_precision=PRECISION)
    to = out_ptr + pair[:, None] * HIDDEN + column[None, :]
    tl.store(to, out.to(out_ptr.dtype.element_ty), mask=is_pair[:, None] & is_column[None, :])
