"""What a token costs a model: parameter and byte counts for the energy ledger, from the spec alone."""

from __future__ import annotations

from replicas.config import ParallelConfig
from replicas.models.spec import ModelSpec
from replicas.request import EngineCosts


def costs_of(spec: ModelSpec, parallel: ParallelConfig, *, weight_bytes: float, kv_bytes: int) -> EngineCosts:
    """Costs over the whole group; what every rank repeats (replicated attention, router) counts per rank.

    In the `dispatch` layout a token is computed by one rank but for the router, while the weights outside the
    experts are read by every rank: all have tokens in a step that matters. `weight_bytes` and `kv_bytes` are
    those of one weight and of one cached value.
    """
    ranks, is_dispatched = parallel.num_ranks, parallel.layout == "dispatch"
    attention_copies = ranks if parallel.tensor == 1 else 1
    kv_copies = (
        attention_copies if spec.num_kv_heads >= parallel.tensor else parallel.tensor // spec.num_kv_heads
    )
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    attention = spec.hidden_size * (2 * q_size * attention_copies + 2 * kv_size * kv_copies)
    ffn = 3 * spec.hidden_size * spec.ffn_size
    router = spec.hidden_size * spec.num_experts * ranks
    norms = 2 * spec.hidden_size * ranks
    head = spec.hidden_size * spec.vocab_size
    shared_layer = attention + router + norms + (0 if spec.num_experts else ffn)
    repeats = ranks if is_dispatched else 1
    active_layer = attention // repeats + router + norms + max(1, spec.experts_per_token) * ffn
    return EngineCosts(
        active_params=spec.num_layers * active_layer + head,
        shared_weight_bytes=round((spec.num_layers * shared_layer + head * repeats) * weight_bytes),
        expert_bytes=round(ffn * weight_bytes) if spec.num_experts else 0,
        num_layers=spec.num_layers,
        attention_dim=q_size,
        kv_bytes_per_token=2 * spec.num_layers * kv_size * kv_copies // repeats * kv_bytes,
    )
