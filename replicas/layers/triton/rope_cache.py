"""Rotary embedding of queries and keys, and the write of keys and values to their pages, in one pass.

    qkv_TC       the fused product, N + 2K heads side by side; float32, bfloat16 or float16
    cos_T1D, signed_sin_T1D  as `rope.Rotation` has them, of qkv's dtype (RoPE: Su et al., arXiv 2104.09864)
    slots_T      int64: block * block tokens + place; padding rows name slot 0, the scratch block
    keys, values [blocks, page tokens, K, D], dense

Element i pairs with i + D/2. Products and sum in float32, rounded once. Shape letters: T tokens, N query
heads, K KV heads, D head_dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from replicas.layers.rope import Rotation
from replicas.layers.triton.launch import power_of_two

_TILE_HEADS = 4


def rope_to_cache(
    qkv_TC: torch.Tensor,
    rotation: Rotation,
    slots_T: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    num_heads: int,
) -> torch.Tensor:
    """Rotated queries [T, N, D]; the step's keys and values are in the cache afterwards."""
    tokens = qkv_TC.shape[0]
    num_kv_heads, head_dim = keys.shape[2:]
    all_heads = num_heads + 2 * num_kv_heads
    q_TND = qkv_TC.new_empty((tokens, num_heads, head_dim))
    _rotate_and_write[(tokens, -(-all_heads // _TILE_HEADS))](
        qkv_TC,
        rotation.cos_T1D,
        rotation.signed_sin_T1D,
        slots_T,
        q_TND,
        keys,
        values,
        qkv_TC.stride(0),
        HEADS=num_heads,
        KV_HEADS=num_kv_heads,
        HALF=head_dim // 2,
        TILE_N=_TILE_HEADS,
        TILE_R=power_of_two(head_dim // 2),
        num_warps=1,
    )
    return q_TND


@triton.jit
def _rotate_and_write(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    q_ptr,
    keys_ptr,
    values_ptr,
    qkv_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_R: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * TILE_N + tl.arange(0, TILE_N))[:, None]
    pair = tl.arange(0, TILE_R)[None, :]
    is_pair = pair < HALF
    is_query = head < HEADS
    is_key = (head >= HEADS) & (head < HEADS + KV_HEADS)
    is_value = (head >= HEADS + KV_HEADS) & (head < HEADS + 2 * KV_HEADS)

    source = qkv_ptr + token * qkv_stride + head * (2 * HALF) + pair
    is_read = (is_query | is_key | is_value) & is_pair
    left = tl.load(source, mask=is_read, other=0.0)
    right = tl.load(source + HALF, mask=is_read, other=0.0)
    angle = token * (2 * HALF) + pair
    cos = tl.load(cos_ptr + angle, mask=is_pair, other=0.0).to(tl.float32)
    # The second half of the signed sine has the plain sign.
    sin = tl.load(sin_ptr + angle + HALF, mask=is_pair, other=0.0).to(tl.float32)
    a, b = left.to(tl.float32), right.to(tl.float32)
    turned_left = (a * cos - b * sin).to(left.dtype)
    turned_right = (b * cos + a * sin).to(left.dtype)

    to_q = q_ptr + (token * HEADS + head) * (2 * HALF) + pair
    tl.store(to_q, turned_left, mask=is_query & is_pair)
    tl.store(to_q + HALF, turned_right, mask=is_query & is_pair)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    to_key = keys_ptr + (slot * KV_HEADS + head - HEADS) * (2 * HALF) + pair
    tl.store(to_key, turned_left, mask=is_key & is_pair)
    tl.store(to_key + HALF, turned_right, mask=is_key & is_pair)
    to_value = values_ptr + (slot * KV_HEADS + head - HEADS - KV_HEADS) * (2 * HALF) + pair
    tl.store(to_value, left, mask=is_value & is_pair)
    tl.store(to_value + HALF, right, mask=is_value & is_pair)
