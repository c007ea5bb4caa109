"""A real `wattline up` in a process of its own, for tests of the whole system."""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from cluster.client import Client
from cluster.replies import ModelState, ReplicaState
from cluster.serving.run_folder import RunFolder, UpState, read_state

READY_TIMEOUT_S = 90.0
END_TIMEOUT_S = 40.0
POLL_S = 0.1

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A `wattline up` in a process of its own."""

    process: psutil.Popen
    folder: RunFolder
    config_path: Path
    state: UpState
    client: Client
    startup_s: float

    def model(self, name: str) -> ModelState:
        return next(model for model in self.client.status().models if model.name == name)

    def replica(self, name: str) -> ReplicaState:
        (replica,) = self.model(name).replicas
        return replica


def wait_until(is_done: Callable[[], bool], timeout_s: float, what: str) -> float:
    """Seconds it took. Fails the test after `timeout_s`."""
    start_s = time.monotonic()
    while not is_done():
        waited_s = time.monotonic() - start_s
        assert waited_s < timeout_s, f"{what}: not within {timeout_s:g} s"
        time.sleep(POLL_S)
    return time.monotonic() - start_s


def start_up(config_path: Path, log_path: Path) -> psutil.Popen:
    command = [sys.executable, "-m", "cluster.cli", "up", "--file", str(config_path)]
    with log_path.open("wb") as log:
        return psutil.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def end_everything(process: psutil.Popen) -> None:
    """End an `up` that a test left running: asked first, so that it leaves nothing; then by number."""
    if process.poll() is not None:
        return
    family = [*process.children(recursive=True), process]
    process.terminate()
    try:
        process.wait(timeout=END_TIMEOUT_S)
    except psutil.TimeoutExpired:
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=10)


@contextmanager
def running_up(make_config: Callable[[Path], dict[str, object]]) -> Iterator[Running]:
    """`wattline up` with the configuration made for a fresh folder, ready when the block begins."""
    with tempfile.TemporaryDirectory(prefix="wl-", dir="/tmp") as name:
        folder = RunFolder(Path(name))
        config_path, log_path = folder.path / "wattline.yaml", folder.path / "out.log"
        config_path.write_text(yaml.safe_dump(make_config(folder.path)))
        process = start_up(config_path, log_path)
        try:

            def is_ready() -> bool:
                assert process.poll() is None, log_path.read_text()
                state = read_state(folder.path)
                return state is not None and state.is_ready

            startup_s = wait_until(is_ready, READY_TIMEOUT_S, "start")
            logger.info("measured startup_s=%.1f", startup_s)
            state = read_state(folder.path)
            assert state is not None
            with Client(state.grpc) as client:
                yield Running(
                    process=process,
                    folder=folder,
                    config_path=config_path,
                    state=state,
                    client=client,
                    startup_s=startup_s,
                )
        finally:
            end_everything(process)
