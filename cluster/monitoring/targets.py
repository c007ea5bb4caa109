"""Where Prometheus finds what is attached to this router: its HTTP service discovery.

Format: https://prometheus.io/docs/prometheus/latest/http_sd/
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from cluster.link.replica_pool import ReplicaPool

TARGETS_PATH = "/metrics/targets"
AGENT_JOB = "wattline-agent"


def target_groups(pool: ReplicaPool) -> list[dict[str, object]]:
    """One group per attached replica that shows metrics, and one per energy agent that reads their meters.

    The series of a replica have no model or replica of their own, those of an agent name both in `hw_id`.
    """
    replicas = [
        _group(connection.hello.metrics_address, model=connection.hello.model, replica=connection.replica_id)
        for connection in pool
        if connection.hello.metrics_address
    ]
    agents = {
        address: connection.hello.host if number == 0 else _host_of(address)
        for connection in pool
        for number, address in enumerate(connection.agent_metrics_addresses)
        if address
    }
    return replicas + [_group(address, job=AGENT_JOB, host=host) for address, host in agents.items()]


def _host_of(address: str) -> str:
    return address.rpartition("://")[2].rpartition(":")[0]


def _group(address: str, **labels: str) -> dict[str, object]:
    """`address` is host:port, or https://host:port."""
    scheme, _, target = address.rpartition("://")
    return {"targets": [target], "labels": labels | ({"__scheme__": scheme} if scheme else {})}


def target_routes(pool: ReplicaPool) -> tuple[BaseRoute, ...]:
    """For the router's HTTP application."""

    async def show_targets(_: Request) -> Response:
        return JSONResponse(target_groups(pool))

    return (Route(TARGETS_PATH, show_targets),)
