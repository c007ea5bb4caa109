"""`wattline.v1.Cluster`: what runs here, and what it carries."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from time import monotonic
from typing import TypeAlias

import grpc

from cluster.link.replica_connection import ReplicaConnection, ReplicaState
from cluster.link.replica_pool import ReplicaPool
from cluster.router.rpc import RpcGuard
from cluster.router.served_model import ServedModel
from protos import wattline_cluster_pb2 as pb
from protos import wattline_cluster_pb2_grpc as pb_grpc

SERVICE = pb.DESCRIPTOR.services_by_name["Cluster"].full_name
SIGNALS_PERIOD_S = 1.0

STATES = {
    ReplicaState.READY: pb.REPLICA_STATE_READY,
    ReplicaState.DRAINING: pb.REPLICA_STATE_DRAINING,
    ReplicaState.STALLED: pb.REPLICA_STATE_STALLED,
}

StatusContext: TypeAlias = "grpc.aio.ServicerContext[pb.StatusRequest, pb.StatusResponse]"
SignalsContext: TypeAlias = "grpc.aio.ServicerContext[pb.WatchSignalsRequest, pb.Signals]"
DrainContext: TypeAlias = "grpc.aio.ServicerContext[pb.DrainReplicaRequest, pb.DrainReplicaResponse]"


class ClusterServicer(pb_grpc.ClusterServicer):
    """Reads; the only thing it changes is a replica's state, when told to drain it."""

    def __init__(
        self,
        *,
        guard: RpcGuard,
        models: Mapping[str, ServedModel],
        pool: ReplicaPool,
        router_id: str,
        version: str,
    ) -> None:
        self._guard = guard
        self._models = models
        self._pool = pool
        self._router_id = router_id
        self._version = version
        self._started_s = monotonic()

    async def Status(self, request: pb.StatusRequest, context: StatusContext) -> pb.StatusResponse:
        async with self._guard.call(context, f"{SERVICE}/Status"):
            return self.status()

    async def WatchSignals(  # type: ignore[override]
        self, request: pb.WatchSignalsRequest, context: SignalsContext
    ) -> None:
        async with self._guard.call(context, f"{SERVICE}/WatchSignals"):
            while True:
                await context.write(
                    pb.Signals(models=[self._signals(model) for model in self._models.values()])
                )
                await asyncio.sleep(SIGNALS_PERIOD_S)

    async def DrainReplica(
        self, request: pb.DrainReplicaRequest, context: DrainContext
    ) -> pb.DrainReplicaResponse:
        async with self._guard.call(context, f"{SERVICE}/DrainReplica"):
            self._pool.drain(request.replica_id, reason="asked for by DrainReplica")
            return pb.DrainReplicaResponse()

    def status(self) -> pb.StatusResponse:
        """All that Status answers, for the dashboard too."""
        return pb.StatusResponse(
            router_id=self._router_id,
            version=self._version,
            uptime_s=monotonic() - self._started_s,
            models=[self._model_status(model) for model in self._models.values()],
        )

    def _model_status(self, model: ServedModel) -> pb.ModelStatus:
        attached = self._pool.of_model(model.name)
        now_s = monotonic()
        return pb.ModelStatus(
            name=model.name,
            min_replicas=model.section.replicas.min,
            max_replicas=model.section.replicas.max,
            active_requests=model.active_requests,
            waiting_requests=sum(sum(connection.load.waiting) for connection in attached),
            output_tokens_per_s=model.token_rate.per_second(now_s=now_s),
            joules_per_output_token=model.energy_rate.joules_per_output_token,
            energy_source=model.energy_rate.source or next((c.hello.energy_source for c in attached), ""),
            replicas=[_replica_status(connection, now_s=now_s) for connection in attached],
        )

    def _signals(self, model: ServedModel) -> pb.ModelSignals:
        attached = self._pool.of_model(model.name)
        return pb.ModelSignals(
            model=model.name,
            ready_replicas=len(self._pool.ready(model.name)),
            requests_in_flight=model.active_requests,
            requests_waiting=sum(sum(connection.load.waiting) for connection in attached),
            waiting_prefill_tokens=sum(
                sum(connection.load.waiting_prefill_tokens) for connection in attached
            ),
            prompt_tokens_total=model.prompt_tokens_total,
            output_tokens_total=model.output_tokens_total,
            requests_total=model.requests_total,
            refused_total=model.refused_total,
            energy_mj_total=model.energy_mj_total,
        )


def _replica_status(connection: ReplicaConnection, *, now_s: float) -> pb.ReplicaStatus:
    return pb.ReplicaStatus(
        replica_id=connection.replica_id,
        state=STATES[connection.state],
        epoch=connection.epoch,
        hello=connection.hello,
        load=connection.load,
        requests_in_flight=connection.in_flight,
        attached_s=now_s - connection.attached_at_s,
    )
