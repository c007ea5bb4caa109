"""Link protobuf to domain objects and back: the only arithmetic between the wire and the router."""

from __future__ import annotations

from cluster.link.engine_job import EngineJob
from cluster.link.token_stream import End, Finished
from cluster.router.energy_account import RequestEnergy
from cluster.router.errors import DeadlinePassed, ReplicaStopped, engine_error
from cluster.router.failover import LossReason
from cluster.router.ledger_book import LedgerSums, ReplicaLedger
from protos import wattline_link_pb2 as link
from replicas.expert_heat import ExpertHeat
from replicas.request import FinishReason, SequenceTiming
from replicas.wire import sampling_to_wire

MAX_DEADLINE_MS = 2**32 - 1
"""The most the wire holds, 49 days; a caller may have more time, which no answer needs."""


def submit_command(job: EngineJob, *, request_id: int) -> link.ToReplica:
    """The command that starts a request. A deadline under a millisecond is sent as one: 0 means none."""
    deadline_ms = (
        0 if job.deadline_s is None else int(min(max(1.0, job.deadline_s * 1e3), float(MAX_DEADLINE_MS)))
    )
    return link.ToReplica(
        submit=link.Submit(
            request_id=request_id,
            attempt=job.attempt,
            first_offset=job.first_offset,
            prompt_ids=job.prompt_ids,
            sampling=sampling_to_wire(job.sampling),
            max_tokens=job.max_tokens,
            stop_token_ids=sorted(job.stop_token_ids),
            priority=job.priority,
            deadline_ms=deadline_ms,
            lane=job.lane,
            traceparent=job.traceparent,
            cache_salt=job.cache_salt,
            prompt_logprobs=job.scores_prompt,
        )
    )


def parse_end(delta: link.SequenceDelta) -> End:
    """How a sequence ended. A cancel that this router did not ask for means that the replica gave it up."""
    timing = _parse_timing(delta.timing) if delta.HasField("timing") else None
    match delta.finish:
        case link.ENGINE_FINISH_STOP:
            return Finished(reason=FinishReason.STOP, timing=timing)
        case link.ENGINE_FINISH_LENGTH:
            return Finished(reason=FinishReason.LENGTH, timing=timing)
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


def _parse_timing(timing: link.SequenceTiming) -> SequenceTiming:
    return SequenceTiming(
        queue_us=timing.queue_us,
        prefill_us=timing.prefill_us,
        decode_us=timing.decode_us,
        cached_tokens=timing.cached_tokens,
        wasted_tokens=timing.wasted_tokens,
        preemptions=timing.preemptions,
    )
