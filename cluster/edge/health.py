"""grpc.health.v1 for the router: one entry per configured model, and "" for the router as a whole.

A model is SERVING while a ready replica, which always is a complete group, is attached; the router is while
any model is. So it is NOT_SERVING until the first replica attached, and again once the router is stopping.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from grpc_health.v1 import health, health_pb2

from cluster.link.replica_pool import ReplicaPool

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
ROUTER = ""
REFRESH_S = 0.5
"""Attaching and draining show at once; only a stall, which is silence, has to be looked for."""


class HealthBoard:
    """Keeps the health service in step with the pool. Owned by the event loop."""

    def __init__(self, *, models: Collection[str], pool: ReplicaPool) -> None:
        self.servicer = health.aio.HealthServicer()
        self._models = models
        self._pool = pool
        self._changed = asyncio.Event()
        self._is_stopping = False

    def changed(self) -> None:
        """A replica came, went or changed its state."""
        self._changed.set()

    def ready_models(self) -> list[str]:
        """Models that take requests now."""
        return [] if self._is_stopping else [name for name in self._models if self._pool.ready(name)]

    async def watch(self) -> None:
        """Refresh for as long as the router runs."""
        while True:
            self._changed.clear()
            await self.refresh()
            try:
                async with asyncio.timeout(REFRESH_S):
                    await self._changed.wait()
            except TimeoutError:
                continue

    async def refresh(self) -> None:
        ready = self.ready_models()
        for name in self._models:
            await self.servicer.set(name, SERVING if name in ready else NOT_SERVING)
        await self.servicer.set(ROUTER, SERVING if ready else NOT_SERVING)

    async def stop(self) -> None:
        """NOT_SERVING from now on, whatever the replicas do."""
        self._is_stopping = True
        await self.servicer.enter_graceful_shutdown()
