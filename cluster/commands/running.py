"""A stack in the foreground: started with progress on the screen, ended without leftovers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from cluster.command_error import CommandError
from cluster.commands.interrupts import ForcedStop, Interrupts
from cluster.commands.loading_screen import LoadingScreen
from cluster.commands.shortage import Shortage
from cluster.config import Config
from cluster.serving.ports import check_ports
from cluster.serving.ray_environment import settle_ray_environment
from cluster.serving.run_folder import RunFolder

if TYPE_CHECKING:
    from cluster.serving.stack import Stack

POLL_S = 0.2
TEND_PERIOD_S = 0.5
STATUS_ROUNDS = 4
"""A router is asked how it is in every fourth round: that costs both sides more than to see that it lives."""
GONE_TIMEOUT_S = 5.0
FORCED_EXIT_CODE = 130


@contextmanager
def running_stack(config: Config, console: Console) -> Iterator[tuple[Stack, Interrupts]]:
    """A stack that serves every model, until the block ends. Raises CommandError when it cannot start.

    After a first signal the block ends by itself if it watches the Interrupts; a second one kills.
    """
    folder = RunFolder(Path(config.runtime_dir))
    check_ports(config.router)
    folder.prepare()
    folder.acquire()
    try:
        with Interrupts() as interrupts:
            settle_ray_environment(config, folder)
            from cluster.serving.stack import Stack

            stack = Stack(config, folder)
            try:
                with console.status("Starting the router and Ray"):
                    stack.start()
                interrupts.install()
                _wait_ready(stack, config, interrupts, console)
                yield stack, interrupts
                console.print("Draining; Ctrl-C again to end at once.", style="dim")
            finally:
                stack.stop()
    except ForcedStop:
        _end_at_once(folder)
    finally:
        folder.release()


def _end_at_once(folder: RunFolder) -> None:
    """Kill every process below this one, and leave without asking Ray, which would wait for the dead."""
    import psutil

    children = psutil.Process().children(recursive=True)
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    shutil.rmtree(folder.shared_dir, ignore_errors=True)
    folder.release()
    psutil.wait_procs(children, timeout=GONE_TIMEOUT_S)
    os._exit(FORCED_EXIT_CODE)


def _wait_ready(stack: Stack, config: Config, interrupts: Interrupts, console: Console) -> None:
    with LoadingScreen(console, [section.name for section in config.models]) as screen:
        while not interrupts.requested:
            stack.tend()
            models = stack.progress()
            screen.show(models)
            if all(model.is_ready for model in models):
                stack.mark_ready()
                return
            interrupts.wait(POLL_S)
    raise CommandError("stopped before every model was ready")


def serve_until_interrupted(stack: Stack, interrupts: Interrupts, console: Console) -> None:
    """Keep the router alive until the first signal, and say when the number of ready replicas changes."""
    known: dict[str, int] = {}
    rounds = count()
    shortage = Shortage(stack.shortages, console)
    while not interrupts.wait(TEND_PERIOD_S):
        if interrupts.take_roll():
            console.print("Replacing the routers.")
            stack.roll_routers()
        was_rolling = stack.is_rolling
        stack.tend()
        if was_rolling and not stack.is_rolling:
            console.print("Every router is a new one.")
        if next(rounds) % STATUS_ROUNDS:
            continue
        state = stack.status()
        for model in state.models if state else ():
            if known.get(model.name, model.num_ready) != model.num_ready:
                console.print(f"{model.name}: {model.num_ready} of {model.min_replicas} replicas ready")
            known[model.name] = model.num_ready
        if state:
            shortage.note(any(model.num_ready < model.min_replicas for model in state.models))
