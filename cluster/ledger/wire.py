"""The ledger store's messages, to and from plain data."""

from __future__ import annotations

from dataclasses import fields

from cluster.ledger.entries import BilledEnergy, ModelSums, ReplicaSums, RequestEntry, RequestSums, Summary
from protos import wattline_ledger_pb2 as pb

_REQUEST_NAMES = tuple(field.name for field in fields(RequestEntry) if field.name != "energy")
_ENERGY_NAMES = tuple(field.name for field in fields(BilledEnergy))
_REPLICA_NAMES = tuple(field.name for field in fields(ReplicaSums))
_SUM_NAMES = tuple(field.name for field in fields(RequestSums))
_MODEL_NAMES = tuple(field.name for field in fields(ModelSums))


def request_to_wire(entry: RequestEntry) -> pb.ClosedRequestEntry:
    message = pb.ClosedRequestEntry(**{name: getattr(entry, name) for name in _REQUEST_NAMES})
    if entry.energy is not None:
        energy = {name: getattr(entry.energy, name) for name in _ENERGY_NAMES}
        message.energy.CopyFrom(pb.EnergyEntry(**energy))
    return message


def request_from_wire(message: pb.ClosedRequestEntry) -> RequestEntry:
    energy = None
    if message.HasField("energy"):
        billed = {name: getattr(message.energy, name) for name in _ENERGY_NAMES}
        if not message.energy.HasField("host_mj"):
            billed["host_mj"] = None
        energy = BilledEnergy(**billed)
    return RequestEntry(**{name: getattr(message, name) for name in _REQUEST_NAMES}, energy=energy)


def replica_to_wire(sums: ReplicaSums) -> pb.ReplicaSumsEntry:
    return pb.ReplicaSumsEntry(**{name: getattr(sums, name) for name in _REPLICA_NAMES})


def replica_from_wire(message: pb.ReplicaSumsEntry) -> ReplicaSums:
    return ReplicaSums(**{name: getattr(message, name) for name in _REPLICA_NAMES})


def summary_to_wire(summary: Summary) -> pb.SummarizeResponse:
    return pb.SummarizeResponse(
        requests=[
            pb.RequestSums(**{name: getattr(sums, name) for name in _SUM_NAMES}) for sums in summary.requests
        ],
        models=[
            pb.ModelSums(**{name: getattr(sums, name) for name in _MODEL_NAMES}) for sums in summary.models
        ],
    )


def summary_from_wire(message: pb.SummarizeResponse) -> Summary:
    return Summary(
        requests=tuple(
            RequestSums(**{name: getattr(sums, name) for name in _SUM_NAMES}) for sums in message.requests
        ),
        models=tuple(
            ModelSums(**{name: getattr(sums, name) for name in _MODEL_NAMES}) for sums in message.models
        ),
    )
