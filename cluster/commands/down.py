"""`wattline down`: end the stack that `wattline up` runs here."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.command_error import CommandError
from cluster.commands.options import DEFAULT_CONFIG, ConfigFile, read_config

if TYPE_CHECKING:
    from cluster.serving.run_folder import UpState

POLL_S = 0.1
FORCE_AFTER_S = 1.0
FORCED_WAIT_S = 20.0
LONGEST_DRAIN_S = 3600.0
"""Where no configuration says how long a drain may take."""
SETTLE_S = 30.0
"""Beyond the longest drain: time for Serve, Ray and the router to end."""


def down(
    file: ConfigFile = DEFAULT_CONFIG,
    force: Annotated[bool, typer.Option("--force", help="Do not wait for streams under way.")] = False,
) -> None:
    """End the running stack: drain its replicas, then its router and its Ray.

    Signals the process of `wattline up` and nothing else.
    """
    from cluster.config import default_runtime_dir
    from cluster.serving.run_folder import read_state

    # Without one, the default folder: where `up` ran need not be where `down` does. A name given is meant.
    config = read_config(file) if file.exists() or file != DEFAULT_CONFIG else None
    folder = Path(config.runtime_dir) if config else default_runtime_dir()
    state = read_state(folder)
    process = state.process() if state else None
    if state is None or process is None:
        raise CommandError(f"nothing runs in {folder}; `wattline up` starts a stack")
    drain_s = max(section.limits.drain_s for section in config.models) if config else LONGEST_DRAIN_S
    process.send_signal(signal.SIGTERM)
    if not _wait_end(state, timeout_s=FORCE_AFTER_S if force else drain_s + SETTLE_S):
        process.send_signal(signal.SIGTERM)
        if not _wait_end(state, timeout_s=FORCED_WAIT_S):
            raise CommandError(f"process {state.pid} does not end; see {folder}/up.log, or kill it")
    typer.echo(f"Ended process {state.pid} and all it started.")


def _wait_end(state: UpState, *, timeout_s: float) -> bool:
    end_s = time.monotonic() + timeout_s
    while state.process() is not None:
        if time.monotonic() > end_s:
            return False
        time.sleep(POLL_S)
    return True
