"""The dashboard's addresses: the page, its files, its events, and one snapshot for scripts.

Read-only. Everything comes from this package: the content policy lets a browser load nothing else.
"""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import (
    FileResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from cluster.dashboard.feed import DashboardFeed, Listener, TooManyListeners

STATIC_DIR = Path(__file__).parent / "static"
CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
FILES = {path.name: path for path in STATIC_DIR.iterdir() if path.suffix in CONTENT_TYPES}
"""What may be asked for: names are looked up, never joined to a path."""


def dashboard_routes(feed: DashboardFeed) -> tuple[BaseRoute, ...]:
    """For the router's HTTP application."""

    async def show_page(_: Request) -> Response:
        return _file(FILES["index.html"])

    async def show_file(request: Request) -> Response:
        path = FILES.get(request.path_params["name"])
        if path is None:
            return PlainTextResponse("no such file\n", status_code=404, headers=SECURITY_HEADERS)
        return _file(path)

    async def show_snapshot(_: Request) -> Response:
        headers = {**SECURITY_HEADERS, "cache-control": "no-store"}
        return JSONResponse(feed.snapshot(), headers=headers)

    async def show_events(_: Request) -> Response:
        try:
            listener = feed.join()
        except TooManyListeners:
            headers = {**SECURITY_HEADERS, "retry-after": "10"}
            return PlainTextResponse(
                "too many dashboards are open; close one\n", status_code=503, headers=headers
            )
        return EventStream(feed, listener)

    return (
        Route("/", _redirect),
        Route("/dash", show_page),
        Route("/dash/", _redirect),
        Route("/dash/snapshot.json", show_snapshot),
        Route("/dash/events", show_events),
        Route("/dash/static/{name}", show_file),
    )


async def _redirect(_: Request) -> Response:
    return RedirectResponse("/dash", status_code=307)


def _file(path: Path) -> Response:
    # The type as we say it: what a machine believes about .js differs from one to the next.
    return FileResponse(
        path,
        media_type=CONTENT_TYPES[path.suffix],
        headers={**SECURITY_HEADERS, "cache-control": "no-cache"},
    )


class EventStream(StreamingResponse):
    """Server-sent events for one listener, which leaves when its page is closed, however that happens."""

    def __init__(self, feed: DashboardFeed, listener: Listener) -> None:
        super().__init__(
            feed.events(listener),
            media_type="text/event-stream",
            headers={**SECURITY_HEADERS, "cache-control": "no-store", "x-accel-buffering": "no"},
        )
        self._feed, self._listener = feed, listener

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._feed.leave(self._listener)
