"""The two gRPC servers of a router: options and binding. What they serve is added by `process.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc

from cluster.addresses import PortInUse, join_host_port
from cluster.config import ConfigError, RouterSection
from cluster.security.certificates import CertificateFiles, grpc_credentials

SPARE_RPCS = 512
"""Calls beyond the streams admission allows: status, health watches, callers that do not read."""
LINK_MESSAGE_BYTES = 64 * 2**20
KEEPALIVE_MS = 5000
"""A frozen peer or a cut cable is noticed within twice this. gRPC's own defaults take a minute; it needs all
three timers (measured: without `ping_timeout_ms` 60 s, with it 2 s for 2 s)."""

SOCKET_PATH_BYTES = 107

KEEPALIVE = (
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_MS),
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """Where to listen; `key` is what the configuration calls it. Port 0: a free one."""

    key: str
    host: str
    port: int


def client_server(section: RouterSection) -> grpc.aio.Server:
    """The server callers dial."""
    return grpc.aio.server(
        options=(
            *KEEPALIVE,
            ("grpc.so_reuseport", int(section.processes > 1)),
            ("grpc.max_receive_message_length", request_limit_bytes(section)),
            ("grpc.max_concurrent_streams", section.max_streams + SPARE_RPCS),
        ),
        maximum_concurrent_rpcs=section.max_streams + SPARE_RPCS,
    )


def request_limit_bytes(section: RouterSection) -> int:
    """Over the prompt cap on purpose, so that a prompt just above it gets an answer that says so."""
    return 4 * section.max_prompt_bytes + 2**20


def link_server() -> grpc.aio.Server:
    """The server replicas dial."""
    return grpc.aio.server(
        options=(
            *KEEPALIVE,
            # By default two servers bind one port without a word.
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", LINK_MESSAGE_BYTES),
        )
    )


def bind_socket(server: grpc.aio.Server, path: Path | None) -> None:
    """Also serve a Unix socket, where its path is not too long for one; a file left of a dead router goes."""
    if path is None or len(bytes(path)) > SOCKET_PATH_BYTES:
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        server.add_insecure_port(f"unix:{path}")
    except RuntimeError as error:
        raise ConfigError(f"runtime_dir: no socket can be made at {path}; choose another folder") from error
    path.chmod(0o600)


def bind(server: grpc.aio.Server, wanted: Port, *, tls: CertificateFiles | None) -> str:
    """Bind and return host:port as it is, plain text where `tls` is None. Raises PortInUse, ConfigError."""
    address = join_host_port(wanted.host, wanted.port)
    try:
        if tls is None:
            bound_port = server.add_insecure_port(address)
        else:
            bound_port = server.add_secure_port(address, grpc_credentials(tls))
    except RuntimeError as error:
        raise PortInUse(key=wanted.key, host=wanted.host, port=wanted.port) from error
    if bound_port == 0:
        raise PortInUse(key=wanted.key, host=wanted.host, port=wanted.port)
    return join_host_port(wanted.host, bound_port)
