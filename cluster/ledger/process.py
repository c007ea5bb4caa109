"""`wattline ledger`: the ledger store as a process. Off the token path: routers wait for it for nothing."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sqlite3
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import grpc

from cluster.command_error import CommandError
from cluster.config import Config, ConfigError, load_config
from cluster.config.ledger import LedgerSection
from cluster.ledger.database import Database, LedgerFileError
from cluster.ledger.location import SOCKET_NAME, ledger_path
from cluster.ledger.lock import held_alone
from cluster.ledger.service import LedgerServicer
from cluster.servers.grpc_servers import Port, bind, bind_socket
from protos import wattline_ledger_pb2_grpc
from replicas.strict_messages import add_strictly

PRUNE_PERIOD_S = 600.0
STOP_GRACE_S = 2.0

logger = logging.getLogger(__name__)


async def run_ledger(config: Config) -> None:
    """Serve until SIGTERM or SIGINT; then finish what was begun.

    On a Unix socket of this user's, and on a port where one is configured. Raises ConfigError for a file that
    is no ledger, CommandError for a port that is taken, and where another store runs already.
    """
    path, socket = ledger_path(config), Path(config.runtime_dir) / SOCKET_NAME
    socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with held_alone(path, socket):
        await _serve(config, path, socket)


async def _serve(config: Config, path: Path, socket: Path) -> None:
    try:
        database = Database(path)
    except LedgerFileError as error:
        raise ConfigError(f"ledger.path: {error}") from error
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    servicer = LedgerServicer(database, wall_s=time.time)
    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    add_strictly(wattline_ledger_pb2_grpc.add_LedgerStoreServicer_to_server, servicer, server)
    try:
        bind_socket(server, socket)
        if config.ledger.port:
            bind(server, Port(key="ledger.port", host=config.ledger.host, port=config.ledger.port), tls=None)
        await server.start()
        logger.info("ledger_ready path=%s", path)
        await prune_until(stopping, servicer, database, config.ledger)
    finally:
        await server.stop(STOP_GRACE_S)
        servicer.close()


async def prune_until(
    stopping: asyncio.Event, servicer: LedgerServicer, database: Database, section: LedgerSection
) -> None:
    """Every ten minutes, and at once. Where a full disk or a lock forbids it, the store serves on without."""
    while not stopping.is_set():
        try:
            gone = await servicer.run(
                lambda: database.prune(
                    now_s=time.time(),
                    request_days=section.request_days,
                    sums_days=section.sums_days,
                    max_requests=section.max_requests,
                )
            )
            if gone:
                logger.info("ledger_pruned requests=%d", gone)
        except sqlite3.Error as error:
            logger.warning("ledger_not_pruned error=%s", error)
        try:
            async with asyncio.timeout(PRUNE_PERIOD_S):
                await stopping.wait()
        except TimeoutError:
            continue


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m cluster.ledger --config FILE`: a ledger store and nothing else."""
    parser = argparse.ArgumentParser(prog="wattline ledger", description="Remember what requests cost.")
    parser.add_argument("-f", "--config", type=Path, required=True, help="wattline.yaml")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        asyncio.run(run_ledger(load_config(given.config)))
    except (ConfigError, CommandError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
