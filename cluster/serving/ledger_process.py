"""The ledger store as a child of `up`: started, started again if it dies, ended.

Nobody waits for it: routers keep what they have to say until it answers. It dies with this process.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import yaml

from cluster.config import Config
from cluster.serving.child_log import open_log
from cluster.serving.run_folder import RunFolder

STOP_TIMEOUT_S = 5.0
FIRST_DELAY_S = 0.5
MAX_DELAY_S = 30.0
STEADY_S = 30.0
"""A store that lived this long is forgiven its earlier deaths."""

logger = logging.getLogger(__name__)


class LedgerProcess:
    """Owns one child. Call it from the thread that lives as long as the child shall."""

    def __init__(
        self, config: Config, folder: RunFolder, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config = config
        self._folder = folder
        self._clock = clock
        self._child: subprocess.Popen[bytes] | None = None
        self._started_s = 0.0
        self._restart_at_s: float | None = None
        self._delay_s = FIRST_DELAY_S

    def start(self) -> None:
        """Start the child, unless the configuration wants none or has one elsewhere."""
        if not self._config.ledger.enabled or self._config.ledger.address:
            return
        config_path = self._folder.path / "ledger.yaml"
        config_path.write_text(yaml.safe_dump(self._config.model_dump(mode="json")), encoding="utf-8")
        command = [sys.executable, "-m", "replicas.rank.launch", str(os.getpid()), "cluster.ledger"]
        with open_log(self._folder.ledger_log_path) as log:
            self._child = subprocess.Popen(
                [*command, "--config", str(config_path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._started_s = self._clock()
        self._restart_at_s = None

    def tend(self) -> None:
        """Start the child again if it died, later each time: serving goes on without it.

        So it does where a full disk or a full process table allows no new one now.
        """
        if self._child is None or self._child.poll() is None:
            return
        now_s = self._clock()
        if self._restart_at_s is None:
            is_steady = now_s - self._started_s > STEADY_S
            self._wait(now_s, f"code={self._child.returncode}", is_steady=is_steady)
        elif now_s >= self._restart_at_s:
            try:
                self.start()
            except OSError as error:
                self._wait(now_s, f"error={error}", is_steady=False)

    def stop(self) -> None:
        """End the child once it has written what it was told."""
        if self._child is None:
            return
        child, self._child = self._child, None
        if child.poll() is not None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            child.send_signal(number)
            try:
                child.wait(STOP_TIMEOUT_S)
                return
            except subprocess.TimeoutExpired:
                logger.warning("ledger_lingers pid=%d signal=%s", child.pid, number.name)

    def _wait(self, now_s: float, why: str, *, is_steady: bool) -> None:
        self._delay_s = FIRST_DELAY_S if is_steady else min(2 * self._delay_s, MAX_DELAY_S)
        self._restart_at_s = now_s + self._delay_s
        log = self._folder.ledger_log_path
        logger.warning("ledger_died %s restart_in_s=%.1f log=%s", why, self._delay_s, log)
