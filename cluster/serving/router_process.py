"""A router as a child of `up`: started, watched, started again with the same ports, ended.

Replicas dial it, so a restart costs them a re-dial and nothing else. The child dies with this process,
whatever kills it.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from cluster.addresses import RouterAddresses, read_addresses
from cluster.command_error import CommandError
from cluster.config import Config
from cluster.router.siblings import file_stem
from cluster.serving.child_log import open_log
from cluster.serving.run_folder import RunFolder, last_words

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 5.0
FIRST_DELAY_S = 0.2
MAX_DELAY_S = 5.0
STEADY_S = 30.0
"""A router that lived this long is forgiven its earlier deaths."""
MAX_DEATHS = 10

logger = logging.getLogger(__name__)


class RouterProcess:
    """Owns one child. Call it from the thread that lives as long as the child shall."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        *,
        index: int = 0,
        module: str = "cluster.edge",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._folder = folder
        self._index = index
        self._module = module
        self._clock = clock
        self._child: subprocess.Popen[bytes] | None = None
        self._started_s = 0.0
        self._restart_at_s: float | None = None
        self._num_deaths = 0
        self._leaving_pid: int | None = None
        """The child that was told to go for another, until that one listens."""
        self.addresses: RouterAddresses | None = None

    @property
    def pid(self) -> int | None:
        return self._child.pid if self._child else None

    @property
    def _addresses_path(self) -> Path:
        return self._folder.path / f"{file_stem(self._index)}.json"

    @property
    def pinned(self) -> Config:
        """The configuration, with the ports it listens on."""
        return self._config

    @property
    def is_restarting(self) -> bool:
        """From `restart` until the new child listens."""
        return self._leaving_pid is not None

    def start(self) -> None:
        """Start the child; `poll_addresses` tells when it listens."""
        self._started_s = self._clock()
        self._addresses_path.unlink(missing_ok=True)
        config_path = self._folder.path / f"{file_stem(self._index)}.yaml"
        config_path.write_text(yaml.safe_dump(self._config.model_dump(mode="json")), encoding="utf-8")
        command = [sys.executable, "-m", "replicas.rank.launch", str(os.getpid()), self._module]
        command += ["--config", str(config_path), "--addresses", str(self._addresses_path)]
        if self._index:
            command += ["--index", str(self._index)]
        if self.addresses and self._config.router.processes > 1:
            command.append("--again")
        with open_log(self._folder.router_log_path) as log:
            self._child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._restart_at_s = None

    def poll_addresses(self) -> RouterAddresses | None:
        """The addresses once the child listens. Raises CommandError if it ended or takes too long."""
        assert self._child, "start the router first"
        code = self._child.poll()
        if code is not None:
            raise CommandError(
                f"the router ended with code {code}: {last_words(self._folder.router_log_path)}; "
                f"log: {self._folder.router_log_path}"
            )
        if self._clock() - self._started_s > START_TIMEOUT_S:
            raise CommandError(
                f"the router did not listen within {START_TIMEOUT_S:g} s; log: {self._folder.router_log_path}"
            )
        if not self._addresses_path.exists():
            return None
        self.addresses = read_addresses(self._addresses_path)
        self._pin_ports(self.addresses)
        return self.addresses

    def tend(self) -> None:
        """Start the child again if it died, later each time. Raises CommandError when it cannot live."""
        if self._child is None:
            return
        now_s = self._clock()
        if self._restart_at_s is not None:
            if now_s >= self._restart_at_s:
                self._start_again(now_s)
            return
        code = self._child.poll()
        if code is None:
            if self._child.pid != self._leaving_pid and self._addresses_path.exists():
                self._leaving_pid = None
            return
        if self._child.pid == self._leaving_pid:
            self._start_again(now_s)
            return
        self._note_death(now_s, f"code={code}")

    def restart(self) -> None:
        """Let the child finish its streams and end; `tend` starts the next one. Of one that is dead, too."""
        if self._child is None:
            return
        self._leaving_pid = self._child.pid
        if self._child.poll() is None:
            self._child.terminate()

    def stop(self) -> None:
        """End the child: politely, then less so."""
        if self._child is None:
            return
        child, self._child = self._child, None
        if child.poll() is not None:
            return
        # The second SIGTERM cuts what is left of its streams.
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            child.send_signal(number)
            try:
                child.wait(STOP_TIMEOUT_S)
                return
            except subprocess.TimeoutExpired:
                logger.warning(
                    "router_lingers pid=%d signal=%s after_s=%g", child.pid, number.name, STOP_TIMEOUT_S
                )

    def _start_again(self, now_s: float) -> None:
        """A disk or a process table that is full now is one more death: other routers serve meanwhile."""
        try:
            self.start()
        except OSError as error:
            self._note_death(now_s, f"error={error}")

    def _note_death(self, now_s: float, why: str) -> None:
        self._num_deaths = 1 if now_s - self._started_s > STEADY_S else self._num_deaths + 1
        if self._num_deaths > MAX_DEATHS:
            raise CommandError(
                f"the router died {self._num_deaths} times in a row: "
                f"{last_words(self._folder.router_log_path)}; log: {self._folder.router_log_path}"
            )
        delay_s = min(FIRST_DELAY_S * 2 ** (self._num_deaths - 1), MAX_DELAY_S)
        logger.warning("router_died %s deaths=%d restart_in_s=%.1f", why, self._num_deaths, delay_s)
        self._restart_at_s = now_s + delay_s

    def _pin_ports(self, addresses: RouterAddresses) -> None:
        """A restart must listen where replicas and clients look for it, also where the port was 0."""
        ports = {
            "grpc_port": int(addresses.grpc.rpartition(":")[2]),
            "http_port": int(addresses.http.rpartition(":")[2]),
            "link_port": int(addresses.link.rpartition(":")[2]),
        }
        if self._config.router.processes > 1:
            ports["metrics_port"] = int(addresses.metrics.rpartition(":")[2])
        self._config = self._config.with_router(**ports)
