"""Attention over a paged KV cache.

The cache owns one K and one V tensor per layer, [blocks, block tokens, KV heads, head_dim]; block 0 is
scratch: padding points there and nobody reads it. A step is a list of spans of the flat tokens: groups of
decode rows (one token each) and prefill chunks. `attend` is what a paged GPU kernel would replace.
Shape letters: T tokens, B rows of a group, P pages of the longest row, L cached tokens, N query heads,
K KV heads, G = N/K query heads per KV head, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeGroup:
    """Rows [start, end) of the flat tokens, each the newest token of its own sequence.

    `bias_B11L` is 0 where a row has a cached token and -inf beyond its length; None: all are L long.
    """

    start: int
    end: int
    blocks_BP: torch.Tensor
    num_cached: int
    bias_B11L: torch.Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillChunk:
    """Tokens [start, end) of one sequence. `blocks_P` None: nothing before them is cached."""

    start: int
    end: int
    blocks_P: torch.Tensor | None = None
    num_cached: int = 0
    bias_TL: torch.Tensor | None = None


Span = DecodeGroup | PrefillChunk


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedSequences:
    """The sequences of a step as compiled kernels read them, in place of spans.

    A row of `rows_B4` is first flat token, number of tokens, position of the first, and row of `tables`,
    which lists the blocks of every sequence.
    """

    rows_B4: npt.NDArray[np.int64]
    tables: npt.NDArray[np.int64]


class PagedKV:
    """The KV cache of one rank. Sequences own blocks; who owns which is decided by the scheduler."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        block_tokens: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        shape = (num_blocks, block_tokens, num_kv_heads, head_dim)
        # Zeros: a finite value that is masked stays without effect, a NaN would not.
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(num_layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(num_layers)]

    def resize(self, num_blocks: int) -> None:
        """An empty cache of `num_blocks`. Only before anything holds on to the memory of the old one."""
        for caches in (self.keys, self.values):
            for layer, old in enumerate(caches):
                caches[layer] = old.new_empty(0)
                caches[layer] = torch.zeros((num_blocks, *old.shape[1:]), device=old.device, dtype=old.dtype)

    def write(self, layer: int, k_TKD: torch.Tensor, v_TKD: torch.Tensor, slots_T: torch.Tensor) -> None:
        """Store the tokens at `slots_T` = block * block tokens + place in the block."""
        self.keys[layer].view(-1, *k_TKD.shape[1:]).index_copy_(0, slots_T, k_TKD)
        self.values[layer].view(-1, *v_TKD.shape[1:]).index_copy_(0, slots_T, v_TKD)

    def gather(self, layer: int, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of `blocks`, concatenated: [tokens, K, D] each. Whole pages: 1.3-4x faster than tokens."""
        flat = blocks.reshape(-1)
        keys, values = self.keys[layer], self.values[layer]
        return keys.index_select(0, flat).flatten(0, 1), values.index_select(0, flat).flatten(0, 1)

    def scrub(self, index: torch.Tensor) -> None:
        """Turn values that are not finite into zeros, in distinct blocks that a broken sequence leaves."""
        for cache in (*self.keys, *self.values):
            clean = cache.index_select(0, index).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
            cache.index_copy_(0, index, clean)


def attend(
    kv: PagedKV,
    layer: int,
    q_TND: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    *,
    slots_T: torch.Tensor,
    spans: Sequence[Span],
    scale: float,
) -> torch.Tensor:
    """Write the new tokens to the cache, then attend span by span. Returns [T, N*D]."""
    kv.write(layer, k_TKD, v_TKD, slots_T)
    if len(spans) == 1 and isinstance(spans[0], DecodeGroup):
        return _decode(kv, layer, q_TND, spans[0], scale).reshape(q_TND.shape[0], -1)
    out_TND = torch.empty_like(q_TND)
    for span in spans:
        part = slice(span.start, span.end)
        if isinstance(span, DecodeGroup):
            out_TND[part] = _decode(kv, layer, q_TND[part], span, scale).view(out_TND[part].shape)
        else:
            out_TND[part] = _prefill(kv, layer, q_TND[part], k_TKD[part], v_TKD[part], span, scale)
    return out_TND.view(q_TND.shape[0], -1)


def _decode(kv: PagedKV, layer: int, q_BND: torch.Tensor, group: DecodeGroup, scale: float) -> torch.Tensor:
    """One query per sequence: the G heads of a KV head become G query rows of it, and no K is repeated."""
    rows, num_heads, head_dim = q_BND.shape
    k, v = kv.gather(layer, group.blocks_BP)
    num_kv_heads = k.shape[1]
    k_BKLD = k.view(rows, -1, num_kv_heads, head_dim)[:, : group.num_cached].transpose(1, 2)
    v_BKLD = v.view(rows, -1, num_kv_heads, head_dim)[:, : group.num_cached].transpose(1, 2)
    q_BKGD = q_BND.view(rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    return functional.scaled_dot_product_attention(
        q_BKGD, k_BKLD, v_BKLD, attn_mask=group.bias_B11L, scale=scale
    )


def _prefill(
    kv: PagedKV,
    layer: int,
    q_TND: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    chunk: PrefillChunk,
    scale: float,
) -> torch.Tensor:
    """Causal attention of a chunk over itself and what is cached before it."""
    if chunk.blocks_P is not None:
        k, v = kv.gather(layer, chunk.blocks_P)
        k_TKD, v_TKD = k[: chunk.num_cached], v[: chunk.num_cached]
    out_1NTD = functional.scaled_dot_product_attention(
        q_TND.transpose(0, 1).unsqueeze(0),
        k_TKD.transpose(0, 1).unsqueeze(0),
        v_TKD.transpose(0, 1).unsqueeze(0),
        attn_mask=chunk.bias_TL,
        is_causal=chunk.bias_TL is None,
        scale=scale,
        enable_gqa=True,
    )
    return out_1NTD.squeeze(0).transpose(0, 1)
