"""`wattline status`: models, replicas, ranks, what they do and what they draw."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.commands.options import Address, ApiKey, Ca, Cert, Json, dial_router

WATCH_PERIOD_S = 1.0


def status(
    address: Address = "",
    ca: Ca = "",
    cert: Cert = "",
    api_key: ApiKey = "",
    as_json: Json = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Again every second, until Ctrl-C.")] = False,
) -> None:
    """Show every model with its replicas, ranks, speed and joules per token.

    J/out: joules per token of the answers of the last 30 s. source: where they come from; counter is
    measured, tdp and model_* are estimates.
    """
    import json
    import time
    from dataclasses import asdict

    from rich.console import Console
    from rich.live import Live

    from cluster.commands.status_screen import render_models

    with dial_router(address, ca=ca, cert=cert, api_key=api_key) as client:
        if as_json:
            typer.echo(json.dumps(asdict(client.status()), indent=2))
            return
        if not watch:
            Console().print(render_models(client.status()))
            return
        try:
            with Live(render_models(client.status()), auto_refresh=False) as live:
                while True:
                    time.sleep(WATCH_PERIOD_S)
                    live.update(render_models(client.status()), refresh=True)
        except KeyboardInterrupt:
            return
