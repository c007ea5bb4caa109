"""What `Cluster/Status` answers, as plain data. Called by `client.py` alone."""

from __future__ import annotations

from cluster import replies
from protos import wattline_cluster_pb2 as pb
from protos import wattline_link_pb2 as link

REPLICA_STATES = {
    pb.REPLICA_STATE_READY: "ready",
    pb.REPLICA_STATE_DRAINING: "draining",
    pb.REPLICA_STATE_STALLED: "stalled",
}


def to_model_state(model: pb.ModelStatus) -> replies.ModelState:
    return replies.ModelState(
        name=model.name,
        min_replicas=model.min_replicas,
        max_replicas=model.max_replicas,
        active_requests=model.active_requests,
        waiting_requests=model.waiting_requests,
        output_tokens_per_s=model.output_tokens_per_s,
        joules_per_output_token=(
            model.joules_per_output_token if model.HasField("joules_per_output_token") else None
        ),
        energy_source=model.energy_source,
        replicas=tuple(to_replica_state(replica) for replica in model.replicas),
        joules_per_total_token=(
            model.joules_per_total_token if model.HasField("joules_per_total_token") else None
        ),
        ttft_ms=to_latency(model.ttft) if model.HasField("ttft") else None,
        tpot_ms=to_latency(model.tpot) if model.HasField("tpot") else None,
        slo_met=model.slo_met,
        slo_missed=model.slo_missed,
        ledger=tuple(to_ledger_state(entry) for entry in model.ledger),
        power=to_power_state(model.power) if model.HasField("power") else None,
        experts=to_expert_state(model.experts) if model.HasField("experts") else None,
        host=to_host_state(model.host) if model.HasField("host") else None,
    )


def to_replica_state(replica: pb.ReplicaStatus) -> replies.ReplicaState:
    hello, load = replica.hello, replica.load
    return replies.ReplicaState(
        replica_id=replica.replica_id,
        state=REPLICA_STATES.get(replica.state, "unknown"),
        epoch=replica.epoch,
        architecture=hello.architecture,
        tensor_parallel=hello.tensor_parallel,
        expert_parallel=hello.expert_parallel,
        device=hello.device,
        dtype=hello.dtype,
        kernels=hello.kernels,
        quantization=hello.quantization,
        energy_source=hello.energy_source,
        host=hello.host,
        supervisor_pid=hello.supervisor_pid,
        metrics_address=hello.metrics_address,
        ranks=tuple(
            replies.RankState(rank=rank.rank, pid=rank.pid, device=rank.device, address=rank.address)
            for rank in hello.ranks
        ),
        requests_in_flight=replica.requests_in_flight,
        attached_s=replica.attached_s,
        running=sum(load.running),
        waiting=sum(load.waiting),
        free_blocks=sum(load.free_blocks),
        total_blocks=sum(load.total_blocks),
        step_ms=load.step_ms,
        decode_tokens_per_s=load.decode_tokens_per_s,
        power_w=load.power_w or None,  # 0 on the wire is what no warm device draws: unknown.
        last_event=to_fleet_event(replica.last_event) if replica.HasField("last_event") else None,
    )


def to_fleet_event(event: pb.FleetEvent) -> replies.FleetEvent:
    return replies.FleetEvent(
        model=event.model,
        replica_id=event.replica_id,
        kind=event.kind,
        reason=event.reason,
        age_s=event.age_s,
    )


def to_expert_state(experts: pb.ExpertBalance) -> replies.ExpertState:
    has_bare = experts.HasField("imbalance_without_copies")
    return replies.ExpertState(
        imbalance=experts.imbalance if experts.HasField("imbalance") else None,
        imbalance_without_copies=experts.imbalance_without_copies if has_bare else None,
        num_copies=experts.num_copies,
        num_ranks=experts.num_ranks,
        hottest_load=experts.hottest_load,
        hottest_layer=experts.hottest_layer,
        hottest_expert=experts.hottest_expert,
    )


def to_latency(latency: pb.Latency) -> replies.Latency:
    return replies.Latency(p50=latency.p50_ms, p95=latency.p95_ms)


def to_ledger_state(entry: link.LedgerTotals) -> replies.LedgerState:
    return replies.LedgerState(
        source=entry.source,
        confidence_factor=entry.confidence_factor,
        meter_mj=entry.meter_mj,
        prefill_mj=entry.prefill_mj,
        decode_mj=entry.decode_mj,
        idle_mj=entry.idle_mj,
        unattributed_mj=entry.unattributed_mj,
        static_mj=entry.static_mj,
        wasted_mj=entry.wasted_mj,
    )


def to_power_state(power: pb.PowerSplit) -> replies.PowerState:
    return replies.PowerState(
        meter_w=power.meter_w,
        prefill_w=power.prefill_w,
        decode_w=power.decode_w,
        idle_w=power.idle_w,
        unattributed_w=power.unattributed_w,
        static_w=power.static_w,
    )


def to_host_state(host: pb.HostEnergy) -> replies.HostState:
    return replies.HostState(
        meter_mj=host.meter_mj,
        requests_mj=host.requests_mj,
        power_w=host.power_w if host.HasField("power_w") else None,
    )


def to_request_state(request: pb.RequestSummary) -> replies.RequestState:
    return replies.RequestState(
        request_id=request.request_id,
        trace_id=request.trace_id,
        model=request.model,
        age_s=request.age_s,
        prompt_tokens=request.prompt_tokens,
        output_tokens=request.output_tokens,
        ttft_ms=request.ttft_ms if request.HasField("ttft_ms") else None,
        total_ms=request.total_ms,
        energy_mj=request.energy_mj if request.HasField("energy_mj") else None,
        is_final=request.is_final,
        outcome=request.outcome,
    )
