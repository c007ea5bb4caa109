"""All router processes of one `up`: as many as asked for, on one client port, each with a link of its own.

The kernel spreads new connections over them. They share nothing but the secret: one that dies is started
again while the others serve. `roll` replaces them one after another; streams under way finish meanwhile.
"""

from __future__ import annotations

import logging
from collections import deque

from cluster.addresses import RouterAddresses
from cluster.config import Config, RouterSection
from cluster.security.secret import write_secret
from cluster.serving.router_process import RouterProcess
from cluster.serving.run_folder import RunFolder

logger = logging.getLogger(__name__)


class RouterGroup:
    """Owns the router children. Call it from the thread that lives as long as they shall."""

    def __init__(self, config: Config, folder: RunFolder) -> None:
        self._config = config
        self._folder = folder
        self._routers: list[RouterProcess] = []
        self._to_roll: deque[RouterProcess] = deque()

    @property
    def addresses(self) -> tuple[RouterAddresses, ...]:
        """Of those that listen."""
        return tuple(router.addresses for router in self._routers if router.addresses)

    def start(self) -> None:
        """Start the first; `poll_addresses` starts the others on its ports and tells when all listen."""
        config = self._config
        if not config.router.secret_file:
            write_secret(self._folder.secret_path)
            config = config.with_router(secret_file=str(self._folder.secret_path))
        self._config = config
        self._start_one(config)

    def poll_addresses(self) -> tuple[RouterAddresses, ...] | None:
        """The addresses once all listen. Raises CommandError if one ended or takes too long."""
        for router in self._routers:
            if router.addresses is None and router.poll_addresses() is None:
                return None
        first = self._routers[0]
        for index in range(len(self._routers), self._config.router.processes):
            self._start_one(_beside(first.pinned, index, asked=self._config.router))
        return self.addresses if len(self.addresses) == self._config.router.processes else None

    def tend(self) -> None:
        """Call often: starts dead routers again, and goes on with a roll. Raises CommandError."""
        for router in self._routers:
            router.tend()
        while self._to_roll and not self._to_roll[0].is_restarting:
            self._to_roll.popleft()
            if not self._to_roll:
                logger.info("routers_rolled count=%d", len(self._routers))
                return
            self._to_roll[0].restart()

    def roll(self) -> None:
        """Replace every router by a new one, the next when the one before takes streams again."""
        if not self._to_roll:
            self._to_roll.extend(self._routers)
            self._to_roll[0].restart()

    @property
    def is_rolling(self) -> bool:
        """From `roll` until the last one listens."""
        return bool(self._to_roll)

    def stop(self) -> None:
        for router in self._routers:
            router.stop()

    def _start_one(self, config: Config) -> None:
        router = RouterProcess(config, self._folder, index=len(self._routers))
        self._routers.append(router)
        router.start()


def _beside(config: Config, index: int, *, asked: RouterSection) -> Config:
    """What router `index` is told: the ports for clients are the first one's, the others its own."""
    return config.with_router(
        link_port=asked.link_port + index if asked.link_port else 0,
        metrics_port=asked.metrics_port + index if asked.metrics_port else 0,
    )
