"""The router's HTTP side: /metrics for scrapers, /healthz and /readyz for probes."""

from __future__ import annotations

from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from cluster.edge.health import HealthBoard
from cluster.telemetry.metrics import RouterMetrics


def build_app(
    *, metrics: RouterMetrics, health: HealthBoard, extra_routes: tuple[BaseRoute, ...] = ()
) -> Starlette:
    """The application; `extra_routes` is where further protocols and pages come in."""

    async def show_metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(metrics.registry), headers={"content-type": content_type})

    async def is_alive(_: Request) -> Response:
        return PlainTextResponse("alive\n")

    async def is_ready(_: Request) -> Response:
        ready = health.ready_models()
        return JSONResponse({"ready_models": ready}, status_code=200 if ready else 503)

    return Starlette(
        routes=[
            Route("/metrics", show_metrics),
            Route("/healthz", is_alive),
            Route("/readyz", is_ready),
            *extra_routes,
        ]
    )
