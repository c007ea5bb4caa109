"""What this router tells the ledger store: closed requests, and the sums of the replicas it knows. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from cluster.energy.account import RequestEnergy
from cluster.ledger.entries import BilledEnergy, ReplicaSums, RequestEntry
from cluster.served_model import ServedModel
from cluster.telemetry.journal import ClosedRequest


def entry_of(closed: ClosedRequest, *, ended_s: float) -> RequestEntry:
    """A request whose account is settled; `ended_s` is since 1970."""
    return RequestEntry(
        request_id=closed.request_id,
        trace_id=closed.trace_id,
        tenant=closed.tenant,
        model=closed.model,
        outcome=closed.outcome,
        ended_s=ended_s,
        prompt_tokens=closed.usage.prompt_tokens,
        cached_tokens=closed.usage.cached_tokens,
        output_tokens=closed.usage.completion_tokens,
        wasted_tokens=closed.usage.wasted_tokens,
        ttft_ms=closed.timing.ttft_ms,
        total_ms=closed.timing.total_ms,
        energy=None if closed.account.energy is None else _billed(closed.account.energy),
    )


def replica_sums(models: Iterable[ServedModel], *, at_s: float) -> Iterator[ReplicaSums]:
    """What every replica's ledger has divided so far; every router it dials says the same."""
    for model in models:
        for ledger in model.ledger.newest:
            for source, sums in ledger.sums.items():
                yield ReplicaSums(
                    replica_id=ledger.replica_id,
                    epoch=ledger.epoch,
                    model=model.name,
                    source=source,
                    at_s=at_s,
                    meter_mj=sums.meter_mj,
                    request_mj=sums.requests_mj,
                    idle_mj=sums.idle_mj,
                    unattributed_mj=sums.unattributed_mj,
                    host_meter_mj=sums.host_meter_mj,
                    host_request_mj=sums.host_requests_mj,
                )


def _billed(energy: RequestEnergy) -> BilledEnergy:
    return BilledEnergy(
        prefill_mj=energy.prefill_mj,
        decode_mj=energy.decode_mj,
        static_mj=energy.static_mj,
        wasted_mj=energy.wasted_mj,
        source=energy.source,
        method=energy.method,
        confidence_factor=energy.confidence_factor,
        is_final=energy.is_final,
        host_mj=energy.host_mj,
    )
