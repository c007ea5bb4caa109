"""Are the ports of a configuration free? Asked before anything starts, so that the answer is a sentence."""

from __future__ import annotations

import errno
import socket

from cluster.command_error import CommandError
from cluster.config import RouterSection


def check_ports(router: RouterSection) -> None:
    """Raises CommandError naming port and key. Port 0 is always free."""
    wanted = [
        ("router.grpc_port", router.host, router.grpc_port),
        ("router.http_port", router.host, router.http_port),
        *(
            ("router.link_port", router.link_host, router.link_port + index if router.link_port else 0)
            for index in range(router.processes)
        ),
        *(
            ("router.metrics_port", router.host, router.metrics_port + index if router.metrics_port else 0)
            for index in range(router.processes if router.processes > 1 else 0)
        ),
    ]
    given = [(key, host, port) for key, host, port in wanted if port]
    seen: dict[int, str] = {}
    for key, _, port in given:
        if port in seen:
            raise CommandError(f"{key}: port {port} is also {seen[port]}; give each its own")
        seen[port] = key
    for key, host, port in given:
        _check_port(key, host, port)


def _check_port(key: str, host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # Connections of an `up` that just ended linger on the port; they do not hinder a new one.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise CommandError(
                    f"{key}: port {port} on {host} is in use; end what uses it (`wattline down`, if it is a "
                    f"stack of yours) or set {key} to another port, 0 for a free one"
                ) from error
            raise CommandError(
                f"{key}: cannot listen on {host}:{port} ({error.strerror}); change it"
            ) from error
