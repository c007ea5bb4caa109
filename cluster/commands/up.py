"""`wattline up`: router, Ray and every model of a configuration, in the foreground or detached."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.command_error import CommandError
from cluster.commands.options import DEFAULT_CONFIG, ConfigFile, read_config

if TYPE_CHECKING:
    from cluster.serving.run_folder import UpState

DETACH_POLL_S = 0.2


def up(
    file: ConfigFile = DEFAULT_CONFIG,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return once every model answers.")] = False,
) -> None:
    """Serve every model of a configuration, until Ctrl-C.

    Starts a local Ray (or joins `ray.address`), the router, and the ranks of every model. The first Ctrl-C
    lets streams under way finish; the second ends at once.
    """
    config = read_config(file)
    folder = Path(config.runtime_dir)
    if detach:
        _detach(file, folder, scheme=config.router.scheme)
        return
    from rich.console import Console

    from cluster.commands.running import running_stack, serve_until_interrupted
    from cluster.commands.status_screen import render_models

    console = Console()
    with running_stack(config, console) as (stack, interrupts):
        state = stack.status()
        if state:
            console.print(render_models(state))
            console.print()
        console.print(
            f"gRPC [bold]{stack.addresses.grpc}[/]  "
            f"dashboard [bold]{config.router.scheme}://{stack.addresses.http}/dash[/]"
        )
        console.print("Serving. Try `wattline chat`, in another terminal; Ctrl-C ends.", style="dim")
        serve_until_interrupted(stack, interrupts, console)


def _detach(file: Path, folder: Path, *, scheme: str) -> None:
    """The same command in a session of its own; this one waits until it serves."""
    from cluster.serving.run_folder import RunFolder, last_words, read_state

    running = RunFolder(folder)
    running.prepare()
    if (other := read_state(folder)) is not None:
        raise CommandError(
            f"process {other.pid} already runs `wattline up` in {folder}; end it with `wattline down`"
        )
    with running.log_path.open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli", "up", "--file", str(file.resolve())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    while (state := _state_of(child.pid, read_state(folder))) is None or not state.is_ready:
        if child.poll() is not None:
            raise CommandError(f"{last_words(running.log_path)}\nlog: {running.log_path}")
        time.sleep(DETACH_POLL_S)
    typer.echo(f"Serving in process {state.pid}: gRPC {state.grpc}, dashboard {scheme}://{state.http}/dash")
    typer.echo(f"Log: {running.log_path}. End it with `wattline down`.")


def _state_of(pid: int, state: UpState | None) -> UpState | None:
    return state if state and state.pid == pid else None
