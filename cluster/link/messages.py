"""Link protobuf to domain objects and back: the only arithmetic between the wire and the router."""

from __future__ import annotations

from cluster.energy.account import RequestEnergy
from cluster.energy.ledger_book import LedgerSums, ReplicaLedger, TenantSums
from cluster.link.engine_job import EngineJob
from cluster.link.token_stream import End, Finished
from cluster.request.errors import DeadlinePassed, ReplicaStopped, engine_error
from cluster.request.failover import LossReason
from protos import wattline_link_pb2 as link
from replicas.expert_heat import ExpertHeat
from replicas.request import GenerationRequest
from replicas.wire.deltas import FINISH_FROM_WIRE
from replicas.wire.requests import request_to_wire


def submit_command(job: EngineJob, *, request_id: int) -> link.ToReplica:
    """The command that starts a request."""
    request = GenerationRequest(
        request_id=request_id,
        prompt_ids=job.prompt_ids,
        max_tokens=job.max_tokens,
        sampling=job.sampling,
        stop_token_ids=job.stop_token_ids,
        priority=job.priority,
        # On a clock that is at 0 now: what is sent is the time left.
        deadline_ns=None if job.deadline_s is None else round(job.deadline_s * 1e9),
        lane=job.lane,
        attempt=job.attempt,
        first_offset=job.first_offset,
        cache_salt=job.cache_salt,
        tenant=job.tenant,
        scores_prompt=job.scores_prompt,
        traceparent=job.traceparent,
    )
    return link.ToReplica(submit=request_to_wire(request, now_ns=0))


def parse_end(delta: link.SequenceDelta) -> End:
    """How a sequence ended. A cancel that this router did not ask for means that the replica gave it up."""
    match delta.finish:
        case link.ENGINE_FINISH_STOP | link.ENGINE_FINISH_LENGTH:
            return Finished(reason=FINISH_FROM_WIRE[delta.finish])
        case link.ENGINE_FINISH_DEADLINE:
            return DeadlinePassed()
        case link.ENGINE_FINISH_CANCELLED:
            return ReplicaStopped(LossReason.REFUSED)
        case _:
            return engine_error(delta.error.code, delta.error.message)


def parse_energy(entry: link.RequestEnergy) -> RequestEnergy | None:
    """The ledger's figures for one request; None: unknown, and it stays so."""
    if not entry.source:
        return None
    return RequestEnergy(
        prefill_mj=entry.prefill_mj,
        decode_mj=entry.decode_mj,
        static_mj=entry.static_mj,
        wasted_mj=entry.wasted_mj,
        source=entry.source,
        method=entry.method,
        window_ms=entry.window_ms,
        confidence_factor=entry.confidence_factor,
        is_final=entry.final,
        host_mj=entry.host_mj if entry.HasField("host_mj") else None,
    )


def parse_ledger(message: link.FromReplica, *, replica_id: str) -> ReplicaLedger | None:
    """The sums of a replica's ledger, if this message brought them."""
    if not message.ledger:
        return None
    return ReplicaLedger(
        replica_id=replica_id,
        epoch=message.epoch,
        until_ns=max(entry.until_ns for entry in message.ledger),
        sums={
            entry.source: LedgerSums(
                meter_mj=entry.meter_mj,
                prefill_mj=entry.prefill_mj,
                decode_mj=entry.decode_mj,
                idle_mj=entry.idle_mj,
                unattributed_mj=entry.unattributed_mj,
                static_mj=entry.static_mj,
                wasted_mj=entry.wasted_mj,
                host_meter_mj=entry.host_meter_mj,
                host_requests_mj=entry.host_requests_mj,
                tenants={
                    each.tenant: TenantSums(prefill_mj=each.prefill_mj, decode_mj=each.decode_mj)
                    for each in entry.tenants
                },
            )
            for entry in message.ledger
        },
        confidence_factors={entry.source: entry.confidence_factor for entry in message.ledger},
    )


def parse_heat(message: link.ExpertHeat) -> ExpertHeat:
    """Raises ValueError if its cells are not those of its shape, or too many."""
    return ExpertHeat(
        num_layers=message.num_layers,
        num_experts=message.num_experts,
        layers_per_row=message.layers_per_row,
        experts_per_column=message.experts_per_column,
        load_percent=tuple(message.load_percent),
        copied_cells=tuple(message.copied_cells),
        tokens=message.tokens,
        num_ranks=message.num_ranks,
        num_copies=message.num_copies,
        imbalance=message.imbalance if message.HasField("imbalance") else None,
        imbalance_without_copies=(
            message.imbalance_without_copies if message.HasField("imbalance_without_copies") else None
        ),
    )
