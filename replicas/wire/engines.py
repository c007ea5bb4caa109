"""What an engine says of itself."""

from __future__ import annotations

from protos import wattline_rank_pb2 as rank_pb2
from replicas.request import EngineCosts, EngineReady
from replicas.wire.loads import load_from_wire, load_to_wire


def ready_to_wire(ready: EngineReady) -> rank_pb2.EngineReady:
    costs = ready.costs
    return rank_pb2.EngineReady(
        architecture=ready.architecture,
        lanes=ready.lanes,
        context_tokens=ready.context_tokens,
        max_sequences=ready.max_sequences,
        vocab_size=ready.vocab_size,
        block_tokens=ready.block_tokens,
        weights_digest=ready.weights_digest,
        dtype=ready.dtype,
        device=ready.device,
        load=load_to_wire(ready.load),
        costs=rank_pb2.EngineCosts(
            active_params=costs.active_params,
            shared_weight_bytes=costs.shared_weight_bytes,
            expert_bytes=costs.expert_bytes,
            num_layers=costs.num_layers,
            attention_dim=costs.attention_dim,
            kv_bytes_per_token=costs.kv_bytes_per_token,
        ),
        eos_token_ids=ready.eos_token_ids,
        kernels=ready.kernels,
        quantization=ready.quantization,
    )


def ready_from_wire(message: rank_pb2.EngineReady) -> EngineReady:
    return EngineReady(
        architecture=message.architecture,
        lanes=message.lanes,
        context_tokens=message.context_tokens,
        max_sequences=message.max_sequences,
        vocab_size=message.vocab_size,
        block_tokens=message.block_tokens,
        weights_digest=message.weights_digest,
        dtype=message.dtype,
        device=message.device,
        eos_token_ids=tuple(message.eos_token_ids),
        costs=EngineCosts(
            active_params=message.costs.active_params,
            shared_weight_bytes=message.costs.shared_weight_bytes,
            expert_bytes=message.costs.expert_bytes,
            num_layers=message.costs.num_layers,
            attention_dim=message.costs.attention_dim,
            kv_bytes_per_token=message.costs.kv_bytes_per_token,
        ),
        load=load_from_wire(message.load),
        kernels=message.kernels,
        quantization=message.quantization,
    )
