"""`wattline ledger`: the ledger store as a process. Off the token path: routers wait for it for nothing."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import grpc

from cluster.command_error import CommandError
from cluster.config import Config, ConfigError, load_config
from cluster.config.ledger import LedgerSection
from cluster.ledger.database import Database, LedgerFileError
from cluster.ledger.service import LedgerServicer
from cluster.router.grpc_servers import bind
from protos import wattline_ledger_pb2_grpc

ADDRESS_FILE = "ledger.json"
PRUNE_PERIOD_S = 600.0
STOP_GRACE_S = 2.0

logger = logging.getLogger(__name__)


def ledger_path(config: Config) -> Path:
    """The file of a configuration's ledger."""
    return Path(config.ledger.path) if config.ledger.path else Path(config.runtime_dir) / "ledger.db"


async def run_ledger(config: Config, *, address_path: Path | None = None) -> None:
    """Serve until SIGTERM or SIGINT; then finish what was begun.

    Once the port is open its address is written to `address_path`. Raises ConfigError for a file that is no
    ledger or a port that is taken.
    """
    path = ledger_path(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        database = Database(path)
    except LedgerFileError as error:
        raise ConfigError(f"ledger.path: {error}") from error
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    servicer = LedgerServicer(database, wall_s=time.time)
    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    wattline_ledger_pb2_grpc.add_LedgerStoreServicer_to_server(servicer, server)
    try:
        address = bind(server, key="ledger.port", host=config.ledger.host, port=config.ledger.port)
        await server.start()
        if address_path is not None:
            partial = address_path.with_suffix(".part")
            partial.write_text(json.dumps({"address": address}), encoding="utf-8")
            partial.replace(address_path)
        logger.info("ledger_ready address=%s path=%s", address, path)
        await _prune_until(stopping, servicer, database, config.ledger)
    finally:
        await server.stop(STOP_GRACE_S)
        servicer.close()


async def _prune_until(
    stopping: asyncio.Event, servicer: LedgerServicer, database: Database, section: LedgerSection
) -> None:
    """Every ten minutes, and at once."""
    while not stopping.is_set():
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
        try:
            async with asyncio.timeout(PRUNE_PERIOD_S):
                await stopping.wait()
        except TimeoutError:
            continue


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m cluster.ledger --config FILE`: a ledger store and nothing else."""
    parser = argparse.ArgumentParser(prog="wattline ledger", description="Remember what requests cost.")
    parser.add_argument("-f", "--config", type=Path, required=True, help="wattline.yaml")
    parser.add_argument("--addresses", type=Path, help="where to write the address once it listens")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        asyncio.run(run_ledger(load_config(given.config), address_path=given.addresses))
    except (ConfigError, CommandError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
