"""Where Prometheus finds what is attached to this router: its HTTP service discovery.

Format: https://prometheus.io/docs/prometheus/latest/http_sd/
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from cluster.link.replica_pool import ReplicaPool

TARGETS_PATH = "/metrics/targets"


def target_groups(pool: ReplicaPool) -> list[dict[str, object]]:
    """One group per attached replica that shows metrics; its series have no model or replica of their own."""
    return [
        {
            "targets": [connection.hello.metrics_address],
            "labels": {"model": connection.hello.model, "replica": connection.replica_id},
        }
        for connection in pool
        if connection.hello.metrics_address
    ]


def target_routes(pool: ReplicaPool) -> tuple[BaseRoute, ...]:
    """For the router's HTTP application."""

    async def show_targets(_: Request) -> Response:
        return JSONResponse(target_groups(pool))

    return (Route(TARGETS_PATH, show_targets),)
