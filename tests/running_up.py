"""A real `wattline up` in a process of its own, for tests of the whole system."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import psutil
import yaml

from cluster.client import Ask, CallError, Client
from cluster.replies import Delta, Energy, Final, ModelState, ReplicaState
from cluster.serving.run_folder import RunFolder, UpState, read_state
from replicas.config import NullEngineConfig
from replicas.rank.null_runner import null_continuation

READY_TIMEOUT_S = 200.0
NUM_STREAMS = 3
STREAM_TOKENS = 80
STREAM_PROMPT = (10, 11, 12)
END_TIMEOUT_S = 80.0
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

    @property
    def log(self) -> str:
        """What it told its operator."""
        return (self.folder.path / "out.log").read_text()

    def num_ready(self, name: str) -> int:
        return self.model(name).num_ready

    def replica(self, name: str) -> ReplicaState:
        (replica,) = self.model(name).replicas
        return replica

    def final_energy(self, final: Final) -> Energy:
        """Its joules, once all meter windows that it was in have closed."""
        wait_until(lambda: self.client.get_energy(final.request_id).is_final, READY_TIMEOUT_S, "the joules")
        return self.client.get_energy(final.request_id)


class Streaming:
    """Streams to a null model, one after another in each thread, until told to end; failures are kept."""

    def __init__(self, client: Client, model: str) -> None:
        self._client = client
        self._model = model
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._stream) for _ in range(NUM_STREAMS)]
        self.num_finished = 0
        self.failures: list[str] = []

    def __enter__(self) -> Streaming:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(timeout=READY_TIMEOUT_S)

    def wait_for_new(self) -> None:
        """Until streams that begin now have ended."""
        enough = self.num_finished + 3 * NUM_STREAMS
        wait_until(lambda: self.num_finished >= enough or bool(self.failures), READY_TIMEOUT_S, "new streams")

    def _stream(self) -> None:
        ask = Ask(max_tokens=STREAM_TOKENS, temperature=0.0, ignore_eos=True)
        expected = null_continuation(STREAM_PROMPT, STREAM_TOKENS, NullEngineConfig())
        while not self._over.is_set():
            try:
                *deltas, final = self._client.generate(self._model, STREAM_PROMPT, ask)
                assert isinstance(final, Final)
                got = [token for delta in deltas if isinstance(delta, Delta) for token in delta.token_ids]
                assert tuple(got) == expected
                self.num_finished += 1
            except (CallError, AssertionError) as error:
                self.failures.append(repr(error))
                return


def wait_until(is_done: Callable[[], bool], timeout_s: float, what: str) -> float:
    """Seconds it took. Fails the test after `timeout_s`."""
    start_s = time.monotonic()
    while not is_done():
        waited_s = time.monotonic() - start_s
        assert waited_s < timeout_s, f"{what}: not within {timeout_s:g} s"
        time.sleep(POLL_S)
    return time.monotonic() - start_s


def is_alive(process: psutil.Process) -> bool:
    """Whether it still does anything: an orphan stays a zombie where process 1 reaps none."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def wait_gone(family: Sequence[psutil.Process]) -> None:
    wait_until(lambda: not any(map(is_alive, family)), END_TIMEOUT_S, "the end of every process")


def start_up(
    config_path: Path, log_path: Path, environment: Mapping[str, str] = MappingProxyType({})
) -> psutil.Popen:
    command = [sys.executable, "-m", "cluster.cli", "up", "--file", str(config_path)]
    with log_path.open("wb") as log:
        return psutil.Popen(
            command,
            env=os.environ | environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


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
def running_up(
    make_config: Callable[[Path], dict[str, object]], environment: Mapping[str, str] = MappingProxyType({})
) -> Iterator[Running]:
    """`wattline up` with the configuration made for a fresh folder, ready when the block begins."""
    with tempfile.TemporaryDirectory(prefix="wl-", dir="/tmp") as name:
        folder = RunFolder(Path(name))
        config_path, log_path = folder.path / "wattline.yaml", folder.path / "out.log"
        config_path.write_text(yaml.safe_dump(make_config(folder.path)))
        process = start_up(config_path, log_path, environment)
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
