"""The least time a step can take on a device of given rates, from the model's numbers alone.

Decode: the weights that are read (of a mixture the experts hit) and every sequence's cache, over the measured
bandwidth, or the products over the measured matmul rate, whichever is longer. Prefill: products over the
matmul rate, attention causal.
"""

from __future__ import annotations

from bench.gpu_check.rates import Rates
from replicas.config import ParallelConfig
from replicas.models.costs import costs_of
from replicas.models.spec import ModelSpec
from replicas.request import EngineCosts


def costs(spec: ModelSpec, itemsize: int) -> EngineCosts:
    return costs_of(spec, ParallelConfig(), weight_bytes=itemsize, kv_bytes=itemsize)


def decode_floor_s(
    spec: ModelSpec, rates: Rates, *, batch: int, context: float, experts_hit: int, itemsize: int
) -> float:
    """`experts_hit` is summed over the layers, as the decoder counts it."""
    cost = costs(spec, itemsize)
    weight_bytes = cost.shared_weight_bytes + experts_hit * cost.expert_bytes
    cache_bytes = batch * context * cost.kv_bytes_per_token
    attention_flops = 4 * batch * context * spec.num_layers * cost.attention_dim
    flops = 2 * batch * cost.active_params + attention_flops
    return max((weight_bytes + cache_bytes) / rates.best_b_s, flops / rates.matmul_flop_s)


def prefill_floor_s(spec: ModelSpec, rates: Rates, *, num_tokens: int, itemsize: int) -> float:
    """One chunk with nothing before it; the head works for one token."""
    cost = costs(spec, itemsize)
    head = spec.hidden_size * spec.vocab_size
    attention_flops = 2 * spec.num_layers * cost.attention_dim * num_tokens**2
    flops = 2 * (cost.active_params - head) * num_tokens + 2 * head + attention_flops
    return flops / rates.matmul_flop_s
