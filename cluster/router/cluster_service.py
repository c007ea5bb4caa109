"""`wattline.v1.Cluster`: what runs here, and what it carries."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sized
from dataclasses import asdict
from time import monotonic
from typing import TypeAlias

import grpc

from cluster.energy.ledger_book import LedgerBook
from cluster.link.fleet_record import FleetEvent
from cluster.link.replica_connection import ReplicaConnection, ReplicaState
from cluster.link.replica_pool import ReplicaPool
from cluster.request.errors import UnknownRequest
from cluster.router.gauges import num_waiting
from cluster.router.rpc import RpcGuard
from cluster.router.siblings import Siblings
from cluster.router.story_record import StoryRecord
from cluster.router.story_wire import story_message
from cluster.security.auth import Need
from cluster.served_model import ServedModel
from cluster.telemetry.journal import ClosedRequest, Journal, Spread
from protos import wattline_cluster_pb2 as pb
from protos import wattline_cluster_pb2_grpc as pb_grpc
from protos import wattline_link_pb2 as link
from replicas.expert_heat import merge_heat

SERVICE = pb.DESCRIPTOR.services_by_name["Cluster"].full_name
SIGNALS_PERIOD_S = 1.0

STATES = {
    ReplicaState.READY: pb.REPLICA_STATE_READY,
    ReplicaState.DRAINING: pb.REPLICA_STATE_DRAINING,
    ReplicaState.STALLED: pb.REPLICA_STATE_STALLED,
}

StatusContext: TypeAlias = "grpc.aio.ServicerContext[pb.StatusRequest, pb.StatusResponse]"
SignalsContext: TypeAlias = "grpc.aio.ServicerContext[pb.WatchSignalsRequest, pb.Signals]"
ExplainContext: TypeAlias = "grpc.aio.ServicerContext[pb.ExplainRequest, pb.ExplainResponse]"
DrainContext: TypeAlias = "grpc.aio.ServicerContext[pb.DrainReplicaRequest, pb.DrainReplicaResponse]"


class ClusterServicer(pb_grpc.ClusterServicer):
    """Reads; the only thing it changes is a replica's state, when told to drain it."""

    def __init__(
        self,
        *,
        guard: RpcGuard,
        models: Mapping[str, ServedModel],
        pool: ReplicaPool,
        queues: Mapping[str, Sized],
        journal: Journal,
        stories: StoryRecord,
        siblings: Siblings,
        router_id: str,
        version: str,
    ) -> None:
        self._guard = guard
        self._models = models
        self._pool = pool
        self._queues = queues
        self._journal = journal
        self._stories = stories
        self._siblings = siblings
        self._router_id = router_id
        self._version = version
        self._started_s = monotonic()

    async def Status(self, request: pb.StatusRequest, context: StatusContext) -> pb.StatusResponse:
        async with self._guard.call(context, f"{SERVICE}/Status", need=Need.OPERATOR):
            return self.status(last_requests=request.last_requests)

    async def WatchSignals(  # type: ignore[override]
        self, request: pb.WatchSignalsRequest, context: SignalsContext
    ) -> None:
        async with self._guard.call(context, f"{SERVICE}/WatchSignals", need=Need.OPERATOR):
            while True:
                await context.write(
                    pb.Signals(models=[self._signals(model) for model in self._models.values()])
                )
                await asyncio.sleep(SIGNALS_PERIOD_S)

    async def DrainReplica(
        self, request: pb.DrainReplicaRequest, context: DrainContext
    ) -> pb.DrainReplicaResponse:
        async with self._guard.call(context, f"{SERVICE}/DrainReplica", need=Need.OPERATOR):
            self._pool.drain(request.replica_id, reason="an operator asked for it (DrainReplica)")
            return pb.DrainReplicaResponse()

    async def Explain(self, request: pb.ExplainRequest, context: ExplainContext) -> pb.ExplainResponse:
        async with self._guard.call(context, f"{SERVICE}/Explain", need=Need.OPERATOR):
            try:
                found = self._stories.find(request.id)
            except UnknownRequest:
                if request.only_here or (answer := await self._siblings.explain(request)) is None:
                    raise
                return answer
            now_s = monotonic()
            return pb.ExplainResponse(
                router_id=self._router_id, stories=[story_message(story, now_s=now_s) for story in found]
            )

    def status(self, *, last_requests: int) -> pb.StatusResponse:
        """All that Status answers."""
        now_s = monotonic()
        return pb.StatusResponse(
            router_id=self._router_id,
            version=self._version,
            uptime_s=monotonic() - self._started_s,
            models=[self._model_status(model) for model in self._models.values()],
            last_requests=[
                _summary(closed, now_s=now_s) for closed in self._journal.last[: min(last_requests, 50)]
            ],
            events=[_event(event, now_s=now_s) for event in self._pool.fleet.events],
        )

    def _model_status(self, model: ServedModel) -> pb.ModelStatus:
        attached = self._pool.of_model(model.name)
        now_s = monotonic()
        answers = self._journal.of_model(model.name)
        by_output, by_total = answers.joules_per_token(now_s=now_s)
        announced = (connection.hello.energy_source for connection in attached)
        source = model.energy_source(announced, now_s=now_s)
        power = model.ledger.power(source, now_s=now_s)
        return pb.ModelStatus(
            name=model.name,
            min_replicas=model.section.replicas.min,
            max_replicas=model.section.replicas.max,
            active_requests=model.active_requests,
            waiting_requests=num_waiting(attached, self._queues[model.name]),
            output_tokens_per_s=model.token_rate.per_second(now_s=now_s),
            joules_per_output_token=by_output,
            energy_source=source,
            replicas=[self._replica_status(connection, now_s=now_s) for connection in attached],
            joules_per_total_token=by_total,
            ttft=_latency(answers.ttft_ms(now_s=now_s)),
            tpot=_latency(answers.tpot_ms(now_s=now_s)),
            slo_met=answers.num_met,
            slo_missed=answers.num_missed,
            ledger=_ledger(model.ledger),
            power=pb.PowerSplit(**asdict(power)) if power else None,
            experts=_balance(attached),
            host=_host(model.ledger, now_s=now_s),
        )

    def _replica_status(self, connection: ReplicaConnection, *, now_s: float) -> pb.ReplicaStatus:
        last = self._pool.fleet.last_of(connection.replica_id)
        return pb.ReplicaStatus(
            replica_id=connection.replica_id,
            state=STATES[connection.state],
            epoch=connection.epoch,
            hello=connection.hello,
            load=connection.load,
            requests_in_flight=connection.in_flight,
            attached_s=now_s - connection.attached_at_s,
            last_event=_event(last, now_s=now_s) if last else None,
        )

    def _signals(self, model: ServedModel) -> pb.ModelSignals:
        attached = self._pool.of_model(model.name)
        return pb.ModelSignals(
            model=model.name,
            ready_replicas=len(self._pool.ready(model.name)),
            requests_in_flight=model.active_requests,
            requests_waiting=num_waiting(attached, self._queues[model.name]),
            waiting_prefill_tokens=sum(
                sum(connection.load.waiting_prefill_tokens) for connection in attached
            ),
            prompt_tokens_total=model.prompt_tokens_total,
            output_tokens_total=model.output_tokens_total,
            requests_total=model.requests_total,
            refused_total=model.refused_total,
            energy_mj_total=model.energy_mj_total,
        )


def _latency(spread_ms: Spread | None) -> pb.Latency | None:
    return None if spread_ms is None else pb.Latency(p50_ms=spread_ms.p50, p95_ms=spread_ms.p95)


def _ledger(ledger: LedgerBook) -> list[link.LedgerTotals]:
    return [
        link.LedgerTotals(
            source=source,
            confidence_factor=ledger.confidence_factor(source) or 0.0,
            tenants=[link.TenantEnergy(tenant=name, **asdict(each)) for name, each in sums.tenants.items()],
            **sums.amounts_mj,
        )
        for source, sums in ledger.sums.items()
    ]


def _host(ledger: LedgerBook, *, now_s: float) -> pb.HostEnergy | None:
    host = ledger.host
    if host is None:
        return None
    return pb.HostEnergy(
        meter_mj=host.meter_mj, requests_mj=host.requests_mj, power_w=ledger.host_w(now_s=now_s)
    )


def _summary(closed: ClosedRequest, *, now_s: float) -> pb.RequestSummary:
    energy = closed.account.energy
    return pb.RequestSummary(
        request_id=closed.request_id,
        trace_id=closed.trace_id,
        model=closed.model,
        age_s=now_s - closed.ended_s,
        prompt_tokens=closed.usage.prompt_tokens,
        output_tokens=closed.usage.completion_tokens,
        ttft_ms=closed.ttft_ms,
        total_ms=closed.timing.total_ms,
        energy_mj=energy.total_mj if energy else None,
        is_final=closed.account.is_final,
        outcome=closed.outcome,
    )


def _event(event: FleetEvent, *, now_s: float) -> pb.FleetEvent:
    return pb.FleetEvent(
        model=event.model,
        replica_id=event.replica_id,
        kind=event.kind,
        reason=event.reason,
        age_s=now_s - event.at_s,
    )


def _balance(attached: list[ReplicaConnection]) -> pb.ExpertBalance | None:
    heat = merge_heat([connection.experts for connection in attached if connection.experts])
    if heat is None:
        return None
    load, layer, expert = heat.hottest
    return pb.ExpertBalance(
        imbalance=heat.imbalance,
        imbalance_without_copies=heat.imbalance_without_copies,
        num_copies=heat.num_copies,
        num_ranks=heat.num_ranks,
        hottest_load=load,
        hottest_layer=layer,
        hottest_expert=expert,
    )
