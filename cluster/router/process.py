"""The router process: everything is put together here, started, and stopped in order.

Order of a stop: health says NOT_SERVING, new requests are refused, streams under way end (bounded), then the
servers close, links last.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import secrets
import signal
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from importlib.metadata import version
from pathlib import Path
from random import Random
from time import monotonic, time
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from starlette.routing import BaseRoute

from cluster.addresses import RouterAddresses, join_host_port
from cluster.command_error import CommandError
from cluster.config import Config, ConfigError, RouterSection, default_runtime_dir, load_config
from cluster.dashboard.feed import DashboardFeed
from cluster.dashboard.routes import dashboard_routes
from cluster.dashboard.snapshot import take_snapshot
from cluster.ledger.location import ledger_address
from cluster.ledger.recorder import LedgerRecorder
from cluster.link.replica_pool import ReplicaPool
from cluster.link.server import LinkServicer
from cluster.monitoring.targets import target_routes
from cluster.oip.service import OipServicer, add_oip
from cluster.openai.exchange import ExchangeGuard
from cluster.openai.routes import OpenAIRoutes
from cluster.router import cluster_service, service
from cluster.router.auth import Authenticator
from cluster.router.bookkeeping import Books
from cluster.router.cache_salt import CacheSalts
from cluster.router.certificates import CertificateFiles
from cluster.router.cluster_service import ClusterServicer
from cluster.router.energy_record import EnergyRecord
from cluster.router.grpc_servers import (
    Port,
    bind,
    bind_socket,
    client_server,
    link_server,
    request_limit_bytes,
)
from cluster.router.health import HealthBoard
from cluster.router.http_app import build_app
from cluster.router.http_guard import HttpGuard
from cluster.router.http_server import HttpServer
from cluster.router.journal import Journal, Objective
from cluster.router.ledger_entries import replica_sums
from cluster.router.resumption import Resumption
from cluster.router.rpc import RpcGuard
from cluster.router.secret import RouterSecret, draw_secret, read_secret
from cluster.router.served_model import ServedModel
from cluster.router.service import InferenceServicer
from cluster.router.streams import Streams
from cluster.telemetry.gauges import read_gauges, read_recorder
from cluster.telemetry.metrics import RouterMetrics
from cluster.telemetry.tracing import Telemetry
from cluster.text.detokenize_worker import DetokenizeWorker
from cluster.text.tokenizer import Tokenizer
from cluster.text.tokenizers import load_tokenizer
from protos import wattline_cluster_pb2_grpc, wattline_inference_pb2_grpc, wattline_link_pb2_grpc
from replicas.strict_messages import add_strictly

logger = logging.getLogger(__name__)

ADDRESSES_FILE = "router.json"
LOCAL_SOCKET = "router-0.sock"
CUT_S = 1.0
"""After the streams' own time is over: what is left is cut."""


class Router:
    """One router. Make it and use it on one event loop."""

    def __init__(
        self,
        config: Config,
        *,
        tokenizers: Mapping[str, Tokenizer],
        local_socket: Path | None = None,
    ) -> None:
        """`local_socket`: also serve operators of this machine there; its folder is private to this user."""
        self._config = config
        self._local_socket = local_socket
        section = config.router
        self._authenticator = Authenticator(section.auth)
        self.router_id = f"router-{secrets.token_hex(4)}"
        release = version("wattline")
        self._models = _serve_models(config, tokenizers)
        self._metrics = RouterMetrics()
        self._telemetry = Telemetry(config.telemetry, router_id=self.router_id, version=release)
        self._worker = DetokenizeWorker(asyncio.get_running_loop())
        self._tokenizing = ThreadPoolExecutor(section.tokenizer_threads, thread_name_prefix="tokenize")
        self._pool = ReplicaPool(random=Random(self.router_id), on_change=lambda: self._health.changed())
        self._health = HealthBoard(models=tuple(self._models), pool=self._pool)
        self._metrics.add_gauges(lambda: read_gauges(self._models, self._pool))
        record = EnergyRecord(section.energy_record_count)
        self._journal = journal = _new_journal(config)
        self._dashboard = DashboardFeed(read=self._snapshot, router_id=self.router_id, version=release)
        self._ledger = self._new_ledger()
        self._streams = self._new_streams(
            Books(
                record=record,
                journal=journal,
                metrics=self._metrics,
                telemetry=self._telemetry,
                ledger=self._ledger,
            )
        )
        guard = RpcGuard(telemetry=self._telemetry, metrics=self._metrics, authenticator=self._authenticator)
        self._inference = InferenceServicer(
            guard=guard,
            models=self._models,
            pool=self._pool,
            streams=self._streams,
            record=record,
            tokenizing=self._tokenizing,
        )
        self._oip = OipServicer(guard=guard, models=self._models, pool=self._pool, streams=self._streams)
        self._cluster = ClusterServicer(
            guard=guard,
            models=self._models,
            pool=self._pool,
            journal=journal,
            router_id=self.router_id,
            version=release,
        )
        self._links = LinkServicer(
            router_id=self.router_id,
            models=self._models,
            pool=self._pool,
            worker=self._worker,
            metrics=self._metrics,
            freeze_s=section.failover.freeze_s,
        )
        self._closing = AsyncExitStack()
        """What has to be closed, in the reverse order of its start."""
        self._closing.push_async_callback(self._telemetry.close)
        if self._ledger is not None:
            self._closing.push_async_callback(self._ledger.close)
        self._closing.callback(self._worker.close)
        self._closing.callback(self._tokenizing.shutdown, wait=False, cancel_futures=True)

    async def start(self) -> RouterAddresses:
        """Bind every port, then serve. Raises PortInUse; `stop` is due all the same."""
        section = self._config.router
        links = link_server()
        add_strictly(wattline_link_pb2_grpc.add_ReplicaLinkServicer_to_server, self._links, links)
        link_port = Port(key="router.link_port", host=section.link_host, port=section.link_port)
        link_address = bind(links, link_port, tls=_link_tls(section))
        self._closing.push_async_callback(links.stop, grace=None)
        clients = self._client_server()
        grpc_port = Port(key="router.grpc_port", host=section.host, port=section.grpc_port)
        grpc_address = bind(clients, grpc_port, tls=_client_tls(section))
        bind_socket(clients, self._local_socket)
        self._closing.push_async_callback(clients.stop, grace=CUT_S)
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
        http = HttpServer(guarded, host=section.host, port=section.http_port, tls=_client_tls(section))
        self._closing.push_async_callback(http.stop)
        # Pages hold their connection as long as there is news: without this, HTTP could not stop in time.
        self._closing.callback(self._dashboard.close)
        await self._health.refresh()
        for server in (links, clients, http):
            await server.start()
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
            http=join_host_port(section.host, http.port),
        )

    async def stop(self, *, drain_s: float, hurry: asyncio.Event | None = None) -> None:
        """Let streams end for at most `drain_s` or until `hurry`; what is left fails with UNAVAILABLE."""
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

    def _snapshot(self) -> dict[str, Any]:
        return take_snapshot(models=self._models, pool=self._pool, journal=self._journal, now_s=monotonic())

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

    def _new_streams(self, books: Books) -> Streams:
        section = self._config.router
        return Streams(
            section=section,
            models=self._models,
            pool=self._pool,
            tokenizing=self._tokenizing,
            books=books,
            resumption=Resumption(section=section.failover, pool=self._pool, metrics=self._metrics),
            salts=CacheSalts(_secret_of(section).derive("cache salt")),
        )

    def _foreign_routes(self) -> tuple[BaseRoute, ...]:
        section = self._config.router
        if not section.protocols.openai:
            return ()
        guard = ExchangeGuard(
            telemetry=self._telemetry,
            metrics=self._metrics,
            max_body_bytes=request_limit_bytes(section),
        )
        return OpenAIRoutes(
            guard=guard,
            models=self._models,
            pool=self._pool,
            streams=self._streams,
            executor=self._tokenizing,
        ).routes()

    def _client_server(self) -> grpc.aio.Server:
        server = client_server(self._config.router)
        add_strictly(wattline_inference_pb2_grpc.add_InferenceServicer_to_server, self._inference, server)
        add_strictly(wattline_cluster_pb2_grpc.add_ClusterServicer_to_server, self._cluster, server)
        if self._config.router.protocols.oip:
            add_strictly(add_oip, self._oip, server)
        add_strictly(health_pb2_grpc.add_HealthServicer_to_server, self._health.servicer, server)
        names = (service.SERVICE, cluster_service.SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        if self._config.router.has_reflection:
            reflection.enable_server_reflection(names, server)
        return server


def _serve_models(config: Config, tokenizers: Mapping[str, Tokenizer]) -> dict[str, ServedModel]:
    limit_bytes = config.router.max_prompt_bytes
    return {
        model.name: ServedModel(model, tokenizers[model.name], max_prompt_bytes=limit_bytes)
        for model in config.models
    }


def _secret_of(section: RouterSection) -> RouterSecret:
    return read_secret(Path(section.secret_file)) if section.secret_file else draw_secret()


def _client_tls(section: RouterSection) -> CertificateFiles | None:
    tls = section.tls
    if not tls.is_on:
        return None
    peer_ca = Path(tls.client_ca) if tls.client_ca else None
    return CertificateFiles(owner="router.tls", cert=Path(tls.cert), key=Path(tls.key), peer_ca=peer_ca)


def _link_tls(section: RouterSection) -> CertificateFiles | None:
    tls = section.link_tls
    if not tls.is_on:
        return None
    return CertificateFiles(
        owner="router.link_tls", cert=Path(tls.cert), key=Path(tls.key), peer_ca=Path(tls.ca)
    )


def _new_journal(config: Config) -> Journal:
    return Journal(
        (model.name, Objective(ttft_ms=model.slo.ttft_ms, tpot_ms=model.slo.tpot_ms))
        for model in config.models
    )


async def run_router(config: Config, *, addresses_path: Path | None = None) -> None:
    """Serve until SIGTERM or SIGINT; a second signal cuts the streams that are left.

    Once every port is open, the addresses are written to `addresses_path`, default `runtime_dir`/router.json.
    Raises ConfigError for a tokenizer that cannot be read or a port that is taken.
    """
    tokenizers = {section.name: await asyncio.to_thread(load_tokenizer, section) for section in config.models}
    path = addresses_path or Path(config.runtime_dir or default_runtime_dir()) / ADDRESSES_FILE
    stopping, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (hurry if stopping.is_set() else stopping).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    router = Router(config, tokenizers=tokenizers, local_socket=path.with_name(LOCAL_SOCKET))
    try:
        addresses = await router.start()
        addresses.write(path)
        logger.info("router_ready grpc=%s link=%s http=%s", addresses.grpc, addresses.link, addresses.http)
        await stopping.wait()
        path.unlink(missing_ok=True)
    finally:
        await router.stop(drain_s=max(section.limits.drain_s for section in config.models), hurry=hurry)


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m cluster.router --config FILE`: a router and nothing else."""
    parser = argparse.ArgumentParser(prog="wattline router", description="Serve clients; replicas dial in.")
    parser.add_argument("-f", "--config", type=Path, required=True, help="wattline.yaml")
    parser.add_argument(
        "--addresses", type=Path, help=f"where to write {ADDRESSES_FILE}; default: runtime_dir"
    )
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        asyncio.run(run_router(load_config(given.config), addresses_path=given.addresses))
    except (ConfigError, CommandError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
