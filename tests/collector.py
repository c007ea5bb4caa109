"""An OTLP collector: the protobuf service of a real one, which keeps what it gets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

ExportContext: TypeAlias = (
    "grpc.aio.ServicerContext[trace_service_pb2.ExportTraceServiceRequest, "
    "trace_service_pb2.ExportTraceServiceResponse]"
)


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """All spans, in the order in which they came."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    async def Export(  # noqa: N802
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: ExportContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        for resource_spans in request.resource_spans:
            for scope_spans in resource_spans.scope_spans:
                self.spans += scope_spans.spans
        return trace_service_pb2.ExportTraceServiceResponse()

    def span(self, name: str) -> Span:
        return next(span for span in self.spans if span.name == name)


@asynccontextmanager
async def run_collector() -> AsyncIterator[tuple[Collector, str]]:
    """The collector and its address."""
    servicer = Collector()
    server = grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield servicer, f"127.0.0.1:{port}"
    await server.stop(None)


def attributes(of: Span | Span.Event) -> dict[str, Any]:
    return {pair.key: _plain(pair.value) for pair in of.attributes}


def _plain(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_plain(item) for item in value.array_value.values]
    return getattr(value, str(kind))
