"""What goes up a replica link as protobuf, and what comes down as commands. Called by `link.py` alone."""

from __future__ import annotations

from collections.abc import Iterable

from protos import wattline_link_pb2 as link_pb2
from replicas.energy.meter import CONFIDENCE_FACTORS
from replicas.expert_heat import ExpertHeat
from replicas.frames import Cancel, Stop, Submit
from replicas.link.messages import (
    Drain,
    EnergyStatement,
    LedgerState,
    ReplicaCard,
    ReplicaLoad,
    RouterCommand,
)
from replicas.link.outbox import Parcel
from replicas.link.protocol import PROTOCOL_VERSION
from replicas.wire.deltas import delta_to_wire
from replicas.wire.loads import load_to_wire
from replicas.wire.requests import request_from_wire
from replicas.wire.steps import columns_to_wire


def encode_hello(card: ReplicaCard, load: ReplicaLoad) -> link_pb2.FromReplica:
    config, engine = card.config, card.engine
    hello = link_pb2.Hello(
        protocol=PROTOCOL_VERSION,
        replica_id=config.replica_id,
        model=config.model,
        architecture=engine.architecture,
        tensor_parallel=config.parallel.tensor,
        expert_parallel=config.parallel.expert,
        layout=config.parallel.layout,
        lanes=engine.lanes,
        context_tokens=engine.context_tokens,
        max_sequences=engine.max_sequences,
        vocab_size=engine.vocab_size,
        weights_digest=engine.weights_digest,
        tokenizer_digest=card.tokenizer_digest,
        engine_version=card.engine_version,
        dtype=engine.dtype,
        device=engine.device,
        energy_source=load.energy_source,
        ranks=[
            link_pb2.RankProcess(rank=rank.rank, pid=rank.pid, device=rank.device, address=rank.address)
            for rank in card.ranks
        ],
        host=card.host,
        supervisor_pid=card.supervisor_pid,
        block_tokens=engine.block_tokens,
        load=encode_load(load),
        metrics_address=card.metrics_address,
        eos_token_ids=engine.eos_token_ids,
        kernels=engine.kernels,
        quantization=engine.quantization,
    )
    return link_pb2.FromReplica(epoch=card.epoch, hello=hello)


def encode_heartbeat(epoch: int, load: ReplicaLoad) -> link_pb2.FromReplica:
    return link_pb2.FromReplica(epoch=epoch, heartbeat=link_pb2.Heartbeat(load=encode_load(load)))


def encode_parcel(epoch: int, parcel: Parcel, load: ReplicaLoad) -> list[link_pb2.FromReplica]:
    """The messages of a parcel, in the order they have to go."""
    messages = []
    if parcel.tokens or parcel.deltas:
        step = link_pb2.StepOutput(
            step=parcel.step,
            tokens=columns_to_wire(parcel.tokens),
            deltas=[delta_to_wire(delta) for delta in parcel.deltas],
            load=encode_load(load),
        )
        messages.append(link_pb2.FromReplica(epoch=epoch, step=step))
    if parcel.energy:
        messages.append(link_pb2.FromReplica(epoch=epoch, energy=_encode_energy(parcel.energy)))
    if parcel.draining is not None:
        draining = link_pb2.Draining(reason=parcel.draining)
        messages.append(link_pb2.FromReplica(epoch=epoch, draining=draining))
    if parcel.goodbye is not None:
        last = parcel.goodbye
        goodbye = link_pb2.Goodbye(reason=last.reason, is_lost=last.is_lost, num_unproven=last.num_unproven)
        messages.append(link_pb2.FromReplica(epoch=epoch, goodbye=goodbye))
    return messages


def add_ledger(message: link_pb2.FromReplica, ledger: LedgerState | None) -> None:
    """One entry per source; none while no meter spoke."""
    if ledger is None:
        return
    message.agent_metrics_addresses.extend(ledger.agent_metrics_addresses)
    message.ledger.extend(
        link_pb2.LedgerTotals(
            until_ns=ledger.until_ns,
            source=source.value,
            confidence_factor=CONFIDENCE_FACTORS[source],
            meter_mj=sums.meter_mj,
            prefill_mj=sums.prefill_mj,
            decode_mj=sums.decode_mj,
            idle_mj=sums.idle_mj,
            unattributed_mj=sums.unattributed_mj,
            static_mj=sums.static_mj,
            wasted_mj=sums.wasted_mj,
            host_meter_mj=sums.host_meter_mj,
            host_requests_mj=sums.host_requests_mj,
            tenants=[
                link_pb2.TenantEnergy(tenant=name, prefill_mj=each.prefill_mj, decode_mj=each.decode_mj)
                for name, each in sums.payers.items()
            ],
        )
        for source, sums in ledger.sums.items()
    )


def encode_heat(heat: ExpertHeat) -> link_pb2.ExpertHeat:
    return link_pb2.ExpertHeat(
        num_layers=heat.num_layers,
        num_experts=heat.num_experts,
        layers_per_row=heat.layers_per_row,
        experts_per_column=heat.experts_per_column,
        load_percent=heat.load_percent,
        copied_cells=heat.copied_cells,
        tokens=heat.tokens,
        num_ranks=heat.num_ranks,
        num_copies=heat.num_copies,
        imbalance=heat.imbalance,
        imbalance_without_copies=heat.imbalance_without_copies,
    )


def encode_load(load: ReplicaLoad) -> link_pb2.LoadSnapshot:
    """Unknown power and cost are left 0, which no warm device draws."""
    message = load_to_wire(load.engine)
    message.joules_per_token = load.joules_per_token or 0.0
    message.power_w = load.power_w or 0.0
    message.idle_power_w = load.idle_power_w or 0.0
    message.active_power_w = load.active_power_w or 0.0
    return message


def decode_command(message: link_pb2.ToReplica, *, now_ns: int) -> RouterCommand | None:
    """None for a command of a newer router. The fields of a request are checked by the engine."""
    match message.WhichOneof("command"):
        case "submit":
            return Submit(request=request_from_wire(message.submit, now_ns=now_ns))
        case "cancel":
            return Cancel(request_id=message.cancel.request_id)
        case "stop":
            return Stop(request_id=message.stop.request_id)
        case "drain":
            return Drain(reason=message.drain.reason)
    return None


def _encode_energy(statements: Iterable[EnergyStatement]) -> link_pb2.EnergyReport:
    return link_pb2.EnergyReport(requests=[_encode_statement(statement) for statement in statements])


def _encode_statement(statement: EnergyStatement) -> link_pb2.RequestEnergy:
    joules = statement.joules
    if joules is None:
        return link_pb2.RequestEnergy(request_id=statement.request_id, attempt=statement.attempt, final=True)
    return link_pb2.RequestEnergy(
        request_id=statement.request_id,
        attempt=statement.attempt,
        prefill_mj=joules.prefill_mj,
        decode_mj=joules.decode_mj,
        static_mj=joules.static_mj,
        wasted_mj=joules.wasted_mj,
        source=joules.source.value,
        method=joules.method,
        window_ms=joules.window_ms,
        confidence_factor=joules.confidence_factor,
        final=joules.final,
        host_mj=joules.host_mj,
    )
