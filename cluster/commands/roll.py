"""`wattline roll`: new router processes, one after another, under the running `up`."""

from __future__ import annotations

import os

import typer

from cluster.command_error import CommandError
from cluster.commands.interrupts import ROLL_SIGNAL


def roll() -> None:
    """Replace the routers of the running `up`, one after another.

    Streams under way finish where they are. With one router (router.processes: 1) nobody takes new ones
    meanwhile.
    """
    from cluster.config import default_runtime_dir
    from cluster.serving.run_folder import read_state

    folder = default_runtime_dir()
    state = read_state(folder)
    if state is None or not state.is_ready:
        raise CommandError(f"no `wattline up` serves in {folder}; start one with `wattline up --detach`")
    os.kill(state.pid, ROLL_SIGNAL)
    typer.echo(f"Process {state.pid} replaces its routers; follow {folder / 'router.log'}.")
