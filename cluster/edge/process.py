"""The router process: everything is put together here, started, and stopped in order.

Order of a stop: health says NOT_SERVING, new requests are refused, streams under way end (bounded), then the
servers close, links last.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import Mapping
from contextlib import AsyncExitStack
from importlib.metadata import version
from pathlib import Path
from random import Random
from time import monotonic, time
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from starlette.routing import BaseRoute

from cluster.addresses import RouterAddresses, join_host_port
from cluster.config import Config
from cluster.dashboard.feed import DashboardFeed
from cluster.dashboard.routes import dashboard_routes
from cluster.dashboard.snapshot import take_snapshot
from cluster.edge.health import HealthBoard
from cluster.edge.http_app import build_app
from cluster.edge.parts import (
    client_tls,
    link_tls,
    new_journal,
    new_tenants,
    open_gates,
    secret_of,
    serve_models,
)
from cluster.edge.reflection import enable_reflection
from cluster.ledger.location import ledger_address
from cluster.ledger.recorder import LedgerRecorder
from cluster.link.detokenize_worker import DetokenizeWorker
from cluster.link.replica_pool import ReplicaPool
from cluster.link.server import LinkServicer
from cluster.monitoring.targets import target_routes
from cluster.oip.service import OipServicer
from cluster.oip.wire_name import SERVICE as OIP_SERVICE
from cluster.openai.exchange import ExchangeGuard
from cluster.openai.routes import OpenAIRoutes
from cluster.request.resume_token import ResumeSeal
from cluster.router import cluster_service, service
from cluster.router.bookkeeping import Books
from cluster.router.cluster_service import ClusterServicer
from cluster.router.continuation import Continuations
from cluster.router.energy_record import EnergyRecord
from cluster.router.gate import Gate
from cluster.router.gauges import read_gauges, read_recorder
from cluster.router.ledger_entries import replica_sums
from cluster.router.refusal import Refusals
from cluster.router.resumption import Resumption
from cluster.router.route_finder import RouteFinder
from cluster.router.rpc import RpcGuard
from cluster.router.service import InferenceServicer
from cluster.router.siblings import Siblings
from cluster.router.story_record import StoryRecord
from cluster.router.streams import Streams
from cluster.router.turns import Turns
from cluster.security.auth import Authenticator
from cluster.security.cache_salt import CacheSalts
from cluster.security.unknown_names import unknown_names
from cluster.servers.grpc_servers import (
    Port,
    bind,
    bind_socket,
    client_server,
    link_server,
    request_limit_bytes,
)
from cluster.servers.http_guard import HttpGuard
from cluster.servers.http_server import HttpServer
from cluster.telemetry.metrics import RouterMetrics
from cluster.telemetry.tracing import Telemetry
from cluster.text.text_threads import TextThreads
from cluster.text.tokenizer import Tokenizer
from protos import (
    wattline_cluster_pb2_grpc,
    wattline_inference_pb2_grpc,
    wattline_link_pb2_grpc,
    wattline_oip_pb2_grpc,
)
from replicas.strict_messages import add_strictly

logger = logging.getLogger(__name__)

LEAVE_S = 0.2
"""From closing a shared port to refusing work: calls that came in meanwhile are served."""
ATTACH_WAIT_S = 10.0
"""For replicas to find a router that was started again, before clients do."""
ATTACH_POLL_S = 0.05
CUT_S = 1.0
"""After the streams' own time is over: what is left is cut."""


class Router:
    """One router. Make it and use it on one event loop."""

    def __init__(
        self,
        config: Config,
        *,
        tokenizers: Mapping[str, Tokenizer],
        index: int = 0,
        folder: Path | None = None,
    ) -> None:
        """Router `index` of `router.processes`.

        `folder`: private to this user; operators of this machine and sibling routers find a socket there.
        """
        self._config = config
        section = config.router
        self._siblings = siblings = Siblings(folder=folder, index=index, count=section.processes)
        self._authenticator = Authenticator(section.auth)
        self.router_id = f"router-{secrets.token_hex(4)}"
        release = version("wattline")
        self._models = serve_models(config, tokenizers)
        for line in unknown_names(section.auth, models=self._models, tenants=self._authenticator.tenants):
            logger.warning("auth_name_unknown %s", line)
        self._metrics = RouterMetrics()
        self._telemetry = Telemetry(
            config.telemetry, router_id=self.router_id, version=release, pue=config.energy.pue
        )
        self._worker = DetokenizeWorker(asyncio.get_running_loop())
        self._threads = TextThreads(section.tokenizer_threads)
        self._pool = ReplicaPool(on_change=lambda: self._health.changed())
        finder = RouteFinder(pool=self._pool, random=Random(self.router_id))
        refusals = Refusals(Random(f"{self.router_id} refusals"))
        self._gates = gates = open_gates(self._models, self._pool, finder, refusals)
        self._tenants = new_tenants(config)
        self._health = HealthBoard(models=tuple(self._models), pool=self._pool)
        self._metrics.add_gauges(lambda: read_gauges(self._models, self._pool, gates))
        record = EnergyRecord(section.energy_record_count)
        self._journal, self._stories = new_journal(config), StoryRecord()
        self._dashboard = DashboardFeed(read=self._snapshot, router_id=self.router_id, version=release)
        self._ledger = self._new_ledger()
        self._streams = self._new_streams(record, gates, finder, refusals)
        guard = RpcGuard(
            telemetry=self._telemetry,
            metrics=self._metrics,
            authenticator=self._authenticator,
            draw_id=siblings.draw_id,
        )
        self._inference = InferenceServicer(
            guard=guard,
            models=self._models,
            pool=self._pool,
            streams=self._streams,
            record=record,
            threads=self._threads,
            siblings=siblings,
        )
        self._oip = self._oip_servicer(guard)
        self._cluster = self._cluster_servicer(guard, release)
        self._clients = self._client_server()
        self._pages: list[HttpServer] = []
        self._closing = self._to_close()
        """What has to be closed, in the reverse order of its start."""

    async def start(self, *, is_again: bool = False) -> RouterAddresses:
        """Bind every port, then serve. Raises PortInUse; `stop` is due all the same.

        `is_again`: there was one before, and its siblings serve; clients come in when replicas have.
        """
        section = self._config.router
        links = link_server()
        servicer = self._link_servicer()
        add_strictly(wattline_link_pb2_grpc.add_ReplicaLinkServicer_to_server, servicer, links)
        link_port = Port(key="router.link_port", host=section.link_host, port=section.link_port)
        link_address = bind(links, link_port, tls=link_tls(section))
        self._closing.push_async_callback(links.stop, grace=None)
        await links.start()
        if is_again:
            await self._await_replicas()
        clients = self._clients
        grpc_port = Port(key="router.grpc_port", host=section.host, port=section.grpc_port)
        grpc_address = bind(clients, grpc_port, tls=client_tls(section))
        bind_socket(clients, self._siblings.own_socket)
        self._closing.push_async_callback(clients.stop, grace=CUT_S)
        self._make_pages()
        await self._health.refresh()
        await clients.start()
        for pages in self._pages:
            await pages.start()
        self._dashboard.start()
        if self._ledger is not None:
            self._ledger.start()
        watching = asyncio.create_task(self._health.watch())
        self._closing.callback(watching.cancel)
        return RouterAddresses(
            router_id=self.router_id,
            pid=os.getpid(),
            grpc=grpc_address,
            link=link_address,
            http=join_host_port(section.host, self._pages[0].port),
            metrics=join_host_port(section.host, self._pages[-1].port),
        )

    async def stop(self, *, drain_s: float, hurry: asyncio.Event | None = None) -> None:
        """Let streams end for at most `drain_s` or until `hurry`; what is left fails with UNAVAILABLE."""
        leaving: set[asyncio.Task[None]] = set()
        if self._config.router.processes > 1:
            leaving.add(asyncio.create_task(self._leave(drain_s)))
            await asyncio.sleep(LEAVE_S)
        self._streams.is_stopping = True
        await self._health.stop()
        hurry = hurry or asyncio.Event()
        drained = asyncio.create_task(self._streams.idle.wait())
        hurried = asyncio.create_task(hurry.wait())
        await asyncio.wait((drained, hurried), timeout=drain_s, return_when=asyncio.FIRST_COMPLETED)
        drained.cancel()
        hurried.cancel()
        logger.info("router_closing id=%s streams_cut=%d", self.router_id, self._streams.in_flight)
        await self._closing.aclose()
        await asyncio.gather(*leaving)

    async def _leave(self, drain_s: float) -> None:
        """New connections go to the siblings, callers are told to make one; calls under way go on."""
        for pages in self._pages:
            pages.stop_accepting()
        await self._clients.stop(grace=drain_s + CUT_S)

    async def _await_replicas(self) -> None:
        """Until a replica of every model that always has one came back, or it takes too long."""
        wanted = [model.name for model in self._config.models if model.replicas.min > 0]
        try:
            async with asyncio.timeout(ATTACH_WAIT_S):
                while not all(self._pool.ready(name) for name in wanted):  # noqa: ASYNC110
                    await asyncio.sleep(ATTACH_POLL_S)
        except TimeoutError:
            logger.warning("router_starts_without_replicas id=%s", self.router_id)

    def _make_pages(self) -> None:
        """The HTTP servers: one; or the shared one, and one for what is this process's own."""
        section = self._config.router
        app = build_app(
            metrics=self._metrics,
            health=self._health,
            extra_routes=(
                *target_routes(self._pool),
                *dashboard_routes(self._dashboard),
                *self._foreign_routes(),
            ),
        )
        guarded = HttpGuard(
            app,
            authenticator=self._authenticator,
            protect_pages=section.auth.protect_pages,
            max_body_bytes=section.max_body_bytes,
        )
        is_shared = section.processes > 1
        tls = client_tls(section)
        self._pages = [
            HttpServer(guarded, host=section.host, port=section.http_port, tls=tls, is_shared=is_shared)
        ]
        if is_shared:
            self._pages.append(HttpServer(guarded, host=section.host, port=section.metrics_port, tls=tls))
        for pages in self._pages:
            self._closing.push_async_callback(pages.stop)
        # Pages hold their connection as long as there is news: without this, HTTP could not stop in time.
        self._closing.callback(self._dashboard.close)

    def _to_close(self) -> AsyncExitStack:
        stack = AsyncExitStack()
        stack.push_async_callback(self._telemetry.close)
        if self._ledger is not None:
            stack.push_async_callback(self._ledger.close)
        stack.push_async_callback(self._tenants.close)
        stack.callback(self._worker.close)
        stack.callback(self._threads.close)
        return stack

    def _snapshot(self) -> dict[str, Any]:
        return take_snapshot(
            models=self._models,
            pool=self._pool,
            queues=self._gates,
            journal=self._journal,
            now_s=monotonic(),
        )

    def _new_ledger(self) -> LedgerRecorder | None:
        if not self._config.ledger.enabled:
            return None
        recorder = LedgerRecorder(
            ledger_address(self._config),
            router_id=self.router_id,
            read_sums=lambda: replica_sums(self._models.values(), at_s=time()),
        )
        self._metrics.add_gauges(lambda: read_recorder(recorder))
        return recorder

    def _new_streams(
        self, record: EnergyRecord, gates: Mapping[str, Gate], finder: RouteFinder, refusals: Refusals
    ) -> Streams:
        section = self._config.router
        secret = secret_of(section)
        turns = Turns(finder=finder, random=Random(f"{self.router_id} turns"))
        return Streams(
            section=section,
            models=self._models,
            pool=self._pool,
            gates=gates,
            refusals=refusals,
            tenants=self._tenants,
            threads=self._threads,
            books=Books(
                record=record,
                journal=self._journal,
                stories=self._stories,
                metrics=self._metrics,
                telemetry=self._telemetry,
                ledger=self._ledger,
            ),
            resumption=Resumption(section=section.failover, turns=turns, metrics=self._metrics),
            salts=CacheSalts(secret.derive("cache salt")),
            continuations=Continuations(
                seal=ResumeSeal(secret.derive("resume token")), pool=self._pool, turns=turns
            ),
        )

    def _oip_servicer(self, guard: RpcGuard) -> OipServicer:
        return OipServicer(
            guard=guard,
            models=self._models,
            pool=self._pool,
            streams=self._streams,
            threads=self._threads,
        )

    def _cluster_servicer(self, guard: RpcGuard, release: str) -> ClusterServicer:
        return ClusterServicer(
            guard=guard,
            models=self._models,
            pool=self._pool,
            queues=self._gates,
            journal=self._journal,
            stories=self._stories,
            siblings=self._siblings,
            router_id=self.router_id,
            version=release,
        )

    def _link_servicer(self) -> LinkServicer:
        return LinkServicer(
            router_id=self.router_id,
            models=self._models,
            pool=self._pool,
            worker=self._worker,
            metrics=self._metrics,
            freeze_s=self._config.router.failover.freeze_s,
        )

    def _foreign_routes(self) -> tuple[BaseRoute, ...]:
        section = self._config.router
        if not section.protocols.openai:
            return ()
        guard = ExchangeGuard(
            telemetry=self._telemetry,
            metrics=self._metrics,
            max_body_bytes=min(section.max_body_bytes, request_limit_bytes(section)),
            draw_id=self._siblings.draw_id,
        )
        return OpenAIRoutes(
            guard=guard,
            models=self._models,
            pool=self._pool,
            streams=self._streams,
            threads=self._threads,
        ).routes()

    def _client_server(self) -> grpc.aio.Server:
        server = client_server(self._config.router)
        add_strictly(wattline_inference_pb2_grpc.add_InferenceServicer_to_server, self._inference, server)
        add_strictly(wattline_cluster_pb2_grpc.add_ClusterServicer_to_server, self._cluster, server)
        add_strictly(health_pb2_grpc.add_HealthServicer_to_server, self._health.servicer, server)
        names = [service.SERVICE, cluster_service.SERVICE, health.SERVICE_NAME]
        if self._config.router.protocols.oip:
            add_oip = wattline_oip_pb2_grpc.add_GRPCInferenceServiceServicer_to_server
            add_strictly(add_oip, self._oip, server, name=OIP_SERVICE)
            names.append(OIP_SERVICE)
        if self._config.router.has_reflection:
            enable_reflection(server, names)
        return server
