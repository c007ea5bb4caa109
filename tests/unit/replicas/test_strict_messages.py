"""What `add_strictly` makes of the methods of a generated service."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import grpc
from grpc import aio
from grpc_health.v1 import health, health_pb2_grpc

from replicas.strict_messages import add_strictly


class FakeServer:
    """Keeps what is added to it."""

    def __init__(self) -> None:
        self.handlers: list[grpc.GenericRpcHandler] = []
        self.registered: list[str] = []

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        self.handlers += handlers

    def add_registered_method_handlers(self, service: str, methods: Mapping[str, Any]) -> None:
        self.registered += [f"{service}/{name}" for name in methods]


def test_methods_are_found_by_name_and_none_has_a_task_of_its_own() -> None:
    server = FakeServer()
    add_strictly(
        health_pb2_grpc.add_HealthServicer_to_server, health.aio.HealthServicer(), cast(aio.Server, server)
    )

    (handler,) = server.handlers
    assert cast(grpc.ServiceRpcHandler, handler).service_name() == "grpc.health.v1.Health"
    assert server.registered == []
