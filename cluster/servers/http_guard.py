"""The door of the router's HTTP side: who comes in, and how much a request may bring along.

Closed unless said otherwise: a new route asks for an operator until it is named here. Routes below `/v1/` ask
for any tenant and find it in `scope["wattline.identity"]`; whoever reads a body counts what comes of it.

A refusal leaves the connection open: a caller that is still sending would meet a reset, and not read why.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.request.errors import NotAllowed, RouterError, Unauthenticated
from cluster.security.auth import Authenticator, Credential, Identity, Need, presented_key

IDENTITY = "wattline.identity"
PEER_NAMES = "wattline.peer_names"
"""Keys of an ASGI scope: who calls, and the names in the certificate it showed."""
OPEN_PATHS = frozenset({"/healthz", "/readyz"})
"""Probes send no key; what they learn is no secret."""
TENANT_PREFIX = "/v1/"
MAX_DIGITS = 20
"""Of a length; no body is as long as that."""


class HttpGuard:
    """ASGI middleware around the whole application."""

    def __init__(
        self, app: ASGIApp, *, authenticator: Authenticator, protect_pages: bool, max_body_bytes: int
    ) -> None:
        self._app = app
        self._authenticator = authenticator
        self._protect_pages = protect_pages
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # No websocket is served.
            return
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        if _announced_bytes(headers) > self._max_body_bytes:
            await self._too_large()(scope, receive, send)
            return
        try:
            scope[IDENTITY] = self._identify(scope, headers)
        except RouterError as error:
            await _refusal(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _identify(self, scope: Scope, headers: list[tuple[str, str]]) -> Identity:
        """Who asks for this path, if it may. Raises Unauthenticated, NotAllowed."""
        need = self._need(scope["path"])
        if need is None:
            return Identity()
        credential = Credential(
            key=presented_key(headers, allows_basic=True), peer_names=scope.get(PEER_NAMES, ())
        )
        identity = self._authenticator.identify(credential)
        identity.check(need)
        return identity

    def _need(self, path: str) -> Need | None:
        """None: nobody is asked."""
        if path.startswith(TENANT_PREFIX):
            return Need.TENANT
        return Need.OPERATOR if self._protect_pages and path not in OPEN_PATHS else None

    def _too_large(self) -> Response:
        text = f"the body is over {self._max_body_bytes} bytes, the limit of this router; send less"
        return _json_error(413, text, code="request_too_large")


def _announced_bytes(headers: Iterable[tuple[str, str]]) -> int:
    lengths = [value for name, value in headers if name == "content-length"]
    # Python converts no more than some thousand digits.
    return max(
        (int(length[:MAX_DIGITS]) for length in lengths if length.isascii() and length.isdigit()), default=0
    )


def _refusal(error: RouterError) -> Response:
    """401 with a way to give a password, so that a browser asks for one; else 403."""
    if isinstance(error, Unauthenticated):
        headers = {"www-authenticate": 'Basic realm="wattline: any name, an API key as password"'}
        return _json_error(401, str(error), code="invalid_api_key", headers=headers)
    assert isinstance(error, NotAllowed)
    return _json_error(403, str(error), code="permission_denied")


def _json_error(status_code: int, text: str, *, code: str, headers: dict[str, str] | None = None) -> Response:
    """In the shape that OpenAI's clients read."""
    body: dict[str, Any] = {
        "error": {"message": text, "type": "invalid_request_error", "param": None, "code": code}
    }
    return Response(json.dumps(body), status_code=status_code, media_type="application/json", headers=headers)
