"""`wattline top`: the dashboard in a terminal."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.commands.options import Address, ApiKey, Ca, Cert, dial_router

PERIOD_S = 1.0
LAST_REQUESTS = 50


def top(
    address: Address = "",
    ca: Ca = "",
    cert: Cert = "",
    api_key: ApiKey = "",
    once: Annotated[bool, typer.Option("--once", help="Print it once and return.")] = False,
) -> None:
    """Show speed, latency, power and energy of every model, live. q quits.

    TTFT: time to first token; TPOT: time per later token; of half and of 95 of 100 answers. J/out: joules per
    token of the answers, J/tok: prompts included. The ledger reads prefill + decode + idle + unattributed =
    meter. In time: answers since the router started that kept the model's `slo`.
    """
    from rich.console import Console
    from rich.live import Live

    from cluster.client import CallError
    from cluster.commands.keyboard import Keyboard
    from cluster.commands.top_screen import TopScreen

    console = Console()
    with dial_router(address, ca=ca, cert=cert, api_key=api_key) as client:
        screen = TopScreen()
        screen.add(client.status(last_requests=LAST_REQUESTS))
        if once:
            console.print(screen.render(width=console.width, num_requests=10))
            return
        with Keyboard() as keyboard, Live(console=console, screen=True, auto_refresh=False) as live:
            try:
                while True:
                    live.update(screen.render(width=console.width, height=console.height), refresh=True)
                    if keyboard.wait_key(PERIOD_S) in ("q", "Q", "\x03", "\x04"):
                        return
                    try:
                        screen.add(client.status(last_requests=LAST_REQUESTS, timeout_s=PERIOD_S * 3))
                    except CallError as error:
                        screen.note_lost(str(error))
            except KeyboardInterrupt:
                return
