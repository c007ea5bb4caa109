"""The read-only /metrics page of one process: a replica's supervisor, or an energy agent."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, start_http_server

from replicas.config import MetricsAccess


class MetricsPage:
    """Served by threads of its own from its making to `close`. Raises OSError where it cannot listen.

    `address` is what scrapers are told: host:port, or https://host:port.
    """

    def __init__(self, registry: CollectorRegistry, access: MetricsAccess, *, port: int = 0) -> None:
        self._server, self._thread = start_http_server(
            port,
            addr=access.host,
            registry=registry,
            certfile=access.cert or None,
            keyfile=access.key or None,
            client_cafile=access.client_ca or None,
            client_auth_required=bool(access.client_ca),
        )
        self.address = access.address(self._server.server_port)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
