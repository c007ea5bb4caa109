"""`wattline roll`: new router processes, one after another, under the running `up`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.command_error import CommandError
from cluster.commands.interrupts import ROLL_SIGNAL
from cluster.commands.options import DEFAULT_CONFIG, ConfigFile, read_config

if TYPE_CHECKING:
    from cluster.serving.run_folder import RunFolder, UpState

POLL_S = 0.1
LONGEST_DRAIN_S = 3600.0
"""Where no configuration says how long a drain may take."""
START_S = 130.0
"""For a router to listen again once it has drained."""


def roll(
    file: ConfigFile = DEFAULT_CONFIG,
    wait: Annotated[bool, typer.Option(help="Return when every router is a new one.")] = True,
) -> None:
    """Replace the routers of the running `up`, one after another.

    Streams under way finish where they are; the other routers take new ones. With router.processes: 1 there
    is no other: callers are refused until the new one listens, some seconds.
    """
    from cluster.config import default_runtime_dir
    from cluster.serving.run_folder import RunFolder, read_state

    # Without one, the default folder. A name given is meant.
    config = read_config(file) if file.exists() or file != DEFAULT_CONFIG else None
    folder = RunFolder(Path(config.runtime_dir) if config else default_runtime_dir())
    state = read_state(folder.path)
    if state is None or not state.is_ready:
        raise CommandError(f"no `wattline up` serves in {folder.path}; start one with `wattline up --detach`")
    before = folder.router_pids()
    os.kill(state.pid, ROLL_SIGNAL)
    typer.echo(f"Process {state.pid} replaces {len(before)} of its routers, one after another.")
    if wait:
        drain_s = max(section.limits.drain_s for section in config.models) if config else LONGEST_DRAIN_S
        _watch(folder, state, before, timeout_s=len(before) * (drain_s + START_S))


def _watch(folder: RunFolder, state: UpState, before: dict[int, int], *, timeout_s: float) -> None:
    """Tell of each router that is new. Raises CommandError where it takes too long."""
    end_s = time.monotonic() + timeout_s
    waiting = dict(before)
    while waiting:
        for index, pid in folder.router_pids().items():
            if waiting.get(index, pid) != pid:
                typer.echo(f"Router {index}: process {waiting.pop(index)} is replaced by {pid}.")
        if state.process() is None:
            raise CommandError(f"process {state.pid} ended meanwhile; see {folder.log_path}")
        if time.monotonic() > end_s:
            names = ", ".join(map(str, waiting))
            raise CommandError(
                f"not replaced within {timeout_s:g} s: router {names}; see {folder.router_log_path}"
            )
        time.sleep(POLL_S)
