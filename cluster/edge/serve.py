"""A router until a signal ends it: `wattline router`, and the children of `wattline up`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.command_error import CommandError
from cluster.config import Config, ConfigError, default_runtime_dir, load_config
from cluster.edge.process import Router
from cluster.servers import event_loop
from cluster.text.tokenizers import load_tokenizer
from replicas.long_lived import spare_the_collector

logger = logging.getLogger(__name__)

ADDRESSES_FILE = "router.json"


async def run_router(
    config: Config, *, addresses_path: Path | None = None, index: int = 0, is_again: bool = False
) -> None:
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
    router = Router(config, tokenizers=tokenizers, index=index, folder=path.parent)
    try:
        addresses = await router.start(is_again=is_again)
        spare_the_collector()
        addresses.write(path)
        logger.info("router_ready grpc=%s link=%s http=%s", addresses.grpc, addresses.link, addresses.http)
        await stopping.wait()
        path.unlink(missing_ok=True)
    finally:
        await router.stop(drain_s=max(section.limits.drain_s for section in config.models), hurry=hurry)


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m cluster.edge --config FILE`: a router and nothing else."""
    parser = argparse.ArgumentParser(prog="wattline router", description="Serve clients; replicas dial in.")
    parser.add_argument("-f", "--config", type=Path, required=True, help="wattline.yaml")
    parser.add_argument(
        "--addresses", type=Path, help=f"where to write {ADDRESSES_FILE}; default: runtime_dir"
    )
    parser.add_argument("--index", type=int, default=0, help="which of router.processes it is; default: 0")
    parser.add_argument("--again", action="store_true", help="let clients in when replicas are back")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        event_loop.run(
            run_router(
                load_config(given.config),
                addresses_path=given.addresses,
                index=given.index,
                is_again=given.again,
            )
        )
    except (ConfigError, CommandError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
