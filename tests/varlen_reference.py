"""`torch.nn.attention.varlen.varlen_attn` over pages as torch documents it, in plain torch.

The real one runs on CUDA alone. Checks every argument against the documentation before it computes: shapes,
int32, cumulative counts, bounds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.nn import functional


def varlen_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    num_splits: int | None,
) -> torch.Tensor:
    """Every sequence by itself: its pages in the order of its table, causal to the lower right."""
    num_queries, num_heads, _ = query.shape
    num_kv_heads = key.shape[2]
    for counts in (cu_seq_q, cu_seq_k, seqused_k, block_table):
        assert counts.dtype == torch.int32 and counts.stride(-1) == 1
    starts, cached, lengths = cu_seq_q.tolist(), cu_seq_k.tolist(), seqused_k.tolist()
    assert starts[0] == 0 and starts[-1] == num_queries
    assert cached == [0, *itertools.accumulate(lengths)]
    assert len(starts) == len(cached) == len(lengths) + 1 == len(block_table) + 1
    assert max(end - start for start, end in itertools.pairwise(starts)) <= max_q
    assert max(lengths) <= max_k
    assert enable_gqa == (num_heads != num_kv_heads)
    assert window_size in ((-1, -1), (-1, 0))
    assert num_splits == 1, "over pages, FlashAttention 2 puts several splits together wrongly"
    out = torch.empty_like(query)
    for row, (start, end) in enumerate(itertools.pairwise(starts)):
        length = lengths[row]
        table = block_table[row, : -(-length // key.shape[1])].long()
        k, v = (cache[table].flatten(0, 1)[:length].transpose(0, 1) for cache in (key, value))
        is_seen = torch.ones(end - start, length, dtype=torch.bool, device=query.device)
        if window_size == (-1, 0):
            is_seen = is_seen.tril(length - (end - start))
        mixed = functional.scaled_dot_product_attention(
            query[start:end].transpose(0, 1), k, v, attn_mask=is_seen, scale=scale, enable_gqa=enable_gqa
        )
        out[start:end] = mixed.transpose(0, 1)
    return out


@dataclass(slots=True)
class Recorded:
    """A function that keeps what it was called with."""

    attend: Callable[..., torch.Tensor]
    calls: list[tuple[tuple[object, ...], dict[str, object]]] = field(default_factory=list)

    def __call__(self, *args: object, **kwargs: object) -> torch.Tensor:
        self.calls.append((args, kwargs))
        return self.attend(*args, **kwargs)
