"""How loaded an engine is, and its experts."""

from __future__ import annotations

from protos import wattline_link_pb2 as link_pb2
from protos import wattline_rank_pb2 as rank_pb2
from replicas.expert_loads import ExpertLoads
from replicas.request import LoadSnapshot


def load_to_wire(load: LoadSnapshot) -> link_pb2.LoadSnapshot:
    """Power and joules per token are left 0: the supervisor knows them, an engine does not."""
    return link_pb2.LoadSnapshot(
        step=load.step,
        running=load.running,
        waiting=load.waiting,
        waiting_prefill_tokens=load.waiting_prefill_tokens,
        free_blocks=load.free_blocks,
        total_blocks=load.total_blocks,
        step_ms=load.step_ms,
        prefill_tokens_per_s=load.prefill_tokens_per_s,
        decode_tokens_per_s=load.decode_tokens_per_s,
        prompt_tokens_total=load.prompt_tokens_total,
        generated_tokens_total=load.generated_tokens_total,
        cached_tokens_total=load.cached_tokens_total,
    )


def load_from_wire(message: link_pb2.LoadSnapshot) -> LoadSnapshot:
    return LoadSnapshot(
        step=message.step,
        running=tuple(message.running),
        waiting=tuple(message.waiting),
        waiting_prefill_tokens=tuple(message.waiting_prefill_tokens),
        free_blocks=tuple(message.free_blocks),
        total_blocks=tuple(message.total_blocks),
        step_ms=message.step_ms,
        prefill_tokens_per_s=message.prefill_tokens_per_s,
        decode_tokens_per_s=message.decode_tokens_per_s,
        prompt_tokens_total=message.prompt_tokens_total,
        generated_tokens_total=message.generated_tokens_total,
        cached_tokens_total=message.cached_tokens_total,
    )


def expert_loads_to_wire(loads: ExpertLoads) -> rank_pb2.ExpertLoads:
    return rank_pb2.ExpertLoads(
        num_experts=loads.num_experts,
        tokens=loads.tokens,
        num_ranks=loads.num_ranks,
        spares=loads.spares,
    )


def expert_loads_from_wire(message: rank_pb2.ExpertLoads) -> ExpertLoads:
    return ExpertLoads(
        num_experts=message.num_experts,
        tokens=tuple(message.tokens),
        num_ranks=message.num_ranks,
        spares=tuple(message.spares),
    )
