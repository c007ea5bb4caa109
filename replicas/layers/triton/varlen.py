"""torch's own variable-length attention over pages, where this torch has it: an alternative to our kernels.

`torch.nn.attention.varlen.varlen_attn` takes a block table in newer versions only, so its signature is asked,
not its version. It runs on CUDA alone; FlashAttention 2 inside it wants pages of a multiple of 256 tokens
(said upstream, to be confirmed by `make gpu-check`). Needs no Triton.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import cast

import torch

_NEEDED = {"block_table", "seqused_k", "enable_gqa", "scale", "window_size"}
_CAUSAL = (-1, 0)

VarlenAttention = Callable[..., torch.Tensor]


@cache
def find_varlen() -> VarlenAttention | None:
    """The function, if its signature has all that pages need; None on an older torch."""
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415 (not in every torch)
    except ImportError:
        return None
    takes_pages = set(inspect.signature(varlen_attn).parameters) >= _NEEDED
    return cast(VarlenAttention, varlen_attn) if takes_pages else None


def varlen_attention(
    attend: VarlenAttention,
    q_TND: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables_BP: torch.Tensor,
    lengths_B: torch.Tensor,
    starts_B1: torch.Tensor,
    *,
    scale: float,
    max_chunk_tokens: int,
    max_context_tokens: int,
) -> torch.Tensor:
    """[T, N, D] of all sequences of `starts_B1`: prompt chunks, or decode rows with chunks of one token."""
    return attend(
        q_TND,
        keys,
        values,
        starts_B1,
        None,
        max_chunk_tokens,
        max_context_tokens,
        scale=scale,
        window_size=_CAUSAL,
        enable_gqa=keys.shape[2] != q_TND.shape[1],
        seqused_k=lengths_B,
        block_table=tables_BP,
    )
