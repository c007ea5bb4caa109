"""Who holds what: the part of a model that one rank of a group holds.

`shard_of` proves that the degrees divide the model, or says with every factor why not. Pure arithmetic.

    attention   query heads over tensor ranks; KV heads too, replicated when there are more ranks than heads
    dense MLP   hidden columns over tensor ranks
    experts     whole experts over expert ranks; with expert=1, their hidden columns over tensor ranks
    vocabulary  over all ranks, whatever the degrees: every rank holds the same last hidden state

In the `dispatch` layout a rank holds all but the experts of the others: its last hidden states are its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from replicas.config import ParallelConfig
from replicas.errors import BadParallelism
from replicas.models.spec import ModelSpec

VOCAB_GRANULE = 16
"""A rank's vocabulary rows are a multiple of this: aligned rows, and an argmax in two cheap levels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """What one rank holds. A `*_start` is the first index of its slice in the whole model.

    The vocabulary is padded to `vocab_ranks * vocab_rows`; `vocab_valid` of this rank's rows are real.
    `is_dispatched`: a rank has tokens of its own, and those of all go to the experts and back.
    """

    rank: int
    vocab_ranks: int
    head_start: int
    num_heads: int
    kv_head_start: int
    num_kv_heads: int
    ffn_start: int
    ffn_size: int
    expert_start: int
    num_experts: int
    vocab_start: int
    vocab_rows: int
    vocab_valid: int
    is_attention_split: bool
    is_ffn_split: bool
    is_dispatched: bool = False
    num_spare_experts: int = 0
    """Slots behind the rank's own experts, for copies of others."""

    @property
    def is_whole(self) -> bool:
        """Whether this rank alone computes every layer of its tokens."""
        return not (self.is_attention_split or self.is_ffn_split or self.is_dispatched)


def shard_of(spec: ModelSpec, parallel: ParallelConfig, rank: int) -> Shard:
    """The shard of `rank`; BadParallelism lists every degree that does not divide."""
    _prove(spec, parallel)
    assert 0 <= rank < parallel.num_ranks, (rank, parallel)
    tensor, num_ranks = parallel.tensor, parallel.num_ranks
    is_dispatched = parallel.layout == "dispatch"
    vocab_rank, vocab_ranks = (0, 1) if is_dispatched else (rank, num_ranks)
    tensor_rank = rank if tensor > 1 else 0
    expert_rank = rank if parallel.expert > 1 else 0
    ffn_degree = tensor if parallel.expert == 1 else 1
    num_kv_heads = max(1, spec.num_kv_heads // tensor)
    vocab_rows = -(-spec.vocab_size // (vocab_ranks * VOCAB_GRANULE)) * VOCAB_GRANULE
    vocab_start = vocab_rank * vocab_rows
    num_experts = spec.num_experts // parallel.expert
    ffn_size = spec.ffn_size // ffn_degree
    return Shard(
        rank=rank,
        vocab_ranks=vocab_ranks,
        head_start=tensor_rank * (spec.num_heads // tensor),
        num_heads=spec.num_heads // tensor,
        kv_head_start=tensor_rank * spec.num_kv_heads // tensor,
        num_kv_heads=num_kv_heads,
        ffn_start=tensor_rank * ffn_size if ffn_degree > 1 else 0,
        ffn_size=ffn_size,
        expert_start=expert_rank * num_experts,
        num_experts=num_experts,
        vocab_start=vocab_start,
        vocab_rows=vocab_rows,
        vocab_valid=max(0, min(vocab_rows, spec.vocab_size - vocab_start)),
        is_attention_split=tensor > 1,
        is_ffn_split=num_ranks > 1 and not is_dispatched,
        is_dispatched=is_dispatched,
        num_spare_experts=parallel.spare_experts,
    )


def _prove(spec: ModelSpec, parallel: ParallelConfig) -> None:
    tensor, expert = parallel.tensor, parallel.expert
    problems = []
    if spec.num_heads % tensor:
        problems.append(f"num_heads={spec.num_heads} % tensor={tensor} = {spec.num_heads % tensor}")
    larger, smaller = max(spec.num_kv_heads, tensor), min(spec.num_kv_heads, tensor)
    if larger % smaller:
        problems.append(f"num_kv_heads={spec.num_kv_heads} and tensor={tensor}: neither divides the other")
    if expert == 1 and spec.ffn_size % tensor:
        problems.append(f"ffn_size={spec.ffn_size} % tensor={tensor} = {spec.ffn_size % tensor}")
    if expert > 1 and not spec.num_experts:
        problems.append(
            f"expert={expert}, but {spec.architecture} has no experts; set expert=1, layout=shared"
        )
    elif expert > 1 and spec.num_experts % expert:
        problems.append(f"num_experts={spec.num_experts} % expert={expert} = {spec.num_experts % expert}")
    elif parallel.spare_experts > (most := max(0, spec.num_experts - spec.num_experts // expert - 1)):
        problems.append(f"spare_experts={parallel.spare_experts}; at most {most}, all but one of the others")
    if problems:
        raise BadParallelism(
            f"parallel tensor={tensor} expert={expert} does not divide {spec.architecture} "
            f"(num_heads={spec.num_heads}, num_kv_heads={spec.num_kv_heads}, ffn_size={spec.ffn_size}, "
            f"num_experts={spec.num_experts}): {'; '.join(problems)}"
        )
