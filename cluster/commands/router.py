"""`wattline router`: one router in the foreground, where `up` does not start it (on Kubernetes)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.options import DEFAULT_CONFIG, ConfigFile, read_config


def router(
    file: ConfigFile = DEFAULT_CONFIG,
    addresses: Annotated[
        Path | None, typer.Option(help="Write the addresses it listens on to this file.", metavar="FILE")
    ] = None,
) -> None:
    """Run one router; replicas dial its link port."""
    import logging

    from cluster.edge.serve import run_router
    from cluster.servers import event_loop

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    event_loop.run(run_router(read_config(file), addresses_path=addresses))
