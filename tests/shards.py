"""Shards of a vocabulary, and the part of given logits that each holds."""

from __future__ import annotations

import torch

from replicas.parallel.degrees import VOCAB_GRANULE, Shard


def make_shard(vocab_size: int, *, rank: int = 0, num_ranks: int = 1) -> Shard:
    rows = -(-vocab_size // (num_ranks * VOCAB_GRANULE)) * VOCAB_GRANULE
    return Shard(
        rank=rank,
        vocab_ranks=num_ranks,
        head_start=0,
        num_heads=1,
        kv_head_start=0,
        num_kv_heads=1,
        ffn_start=0,
        ffn_size=1,
        expert_start=0,
        num_experts=0,
        vocab_start=rank * rows,
        vocab_rows=rows,
        vocab_valid=max(0, min(rows, vocab_size - rank * rows)),
        is_attention_split=False,
        is_ffn_split=False,
    )


def shard_of_logits(logits: torch.Tensor, shard: Shard) -> torch.Tensor:
    whole = torch.full((len(logits), shard.vocab_ranks * shard.vocab_rows), -torch.inf)
    whole[:, : logits.shape[1]] = logits
    return whole[:, shard.vocab_start : shard.vocab_start + shard.vocab_rows].clone()
