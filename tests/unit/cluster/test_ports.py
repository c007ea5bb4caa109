"""Ports are refused with a sentence that names port and key."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from cluster.command_error import CommandError
from cluster.config import RouterSection
from cluster.serving.ports import check_ports


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def make_router(*, grpc_port: int = 0, http_port: int = 0, link_port: int = 0) -> RouterSection:
    return RouterSection.model_validate(
        {"grpc_port": grpc_port, "http_port": http_port, "link_port": link_port}
    )


def test_free_ports_pass() -> None:
    check_ports(make_router())


def test_a_busy_port_is_named_with_its_key(busy_port: int) -> None:
    with pytest.raises(CommandError, match=rf"router\.http_port: port {busy_port} on 127\.0\.0\.1 is in use"):
        check_ports(make_router(http_port=busy_port))


def test_one_port_for_two_keys_is_refused_whoever_else_has_it(busy_port: int) -> None:
    with pytest.raises(CommandError, match=rf"router\.link_port: port {busy_port} is also router\.grpc_port"):
        check_ports(make_router(grpc_port=busy_port, link_port=busy_port))


def test_a_host_that_is_not_ours_is_refused() -> None:
    router = RouterSection.model_validate(
        {"host": "192.0.2.77", "allow_insecure": True, "grpc_port": 45872, "http_port": 0, "link_port": 0}
    )
    with pytest.raises(CommandError, match=r"router\.grpc_port: cannot listen on 192\.0\.2\.77:45872"):
        check_ports(router)
