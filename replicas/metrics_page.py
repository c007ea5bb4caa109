"""The read-only /metrics page of one process: a replica's supervisor, or an energy agent."""

from __future__ import annotations

import socket
import ssl
from socketserver import ThreadingMixIn
from threading import Thread
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from replicas.config import MetricsAccess

SILENCE_S = 10.0
"""A scraper that says nothing for this long is hung up on."""


class MetricsPage:
    """Served by threads of its own from its making to `close`. Raises OSError where it cannot listen.

    `address` is what scrapers are told: host:port, or https://host:port.
    """

    def __init__(self, registry: CollectorRegistry, access: MetricsAccess, *, port: int = 0) -> None:
        tls = _tls(access) if access.cert else None
        self._server = _Server(access.host, port)
        self._server.set_app(make_wsgi_app(registry))
        if tls is not None:
            # The thread of a scraper shakes hands: in that of the server a silent one would stop all.
            self._server.socket = tls.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.address = access.address(self._server.server_port)
        self._thread = Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Scrape(WSGIRequestHandler):
    timeout = SILENCE_S

    def log_message(self, format: str, *args: object) -> None:
        """A line per scrape is for nobody."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(self, host: str, port: int) -> None:
        (self.address_family, *_, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        super().__init__((str(address[0]), port), _Scrape)

    def handle_error(self, request: object, client_address: object) -> None:
        """A scraper that broke off, or showed no certificate, is no mistake of ours."""


def _tls(access: MetricsAccess) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=access.client_ca or None)
        context.load_cert_chain(access.cert, access.key)
    except OSError as error:
        files = ", ".join(filter(None, (access.cert, access.key, access.client_ca)))
        raise OSError(f"the certificates of /metrics cannot be read ({files}): {error}") from error
    if access.client_ca:
        context.verify_mode = ssl.CERT_REQUIRED
    return context
