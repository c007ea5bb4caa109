"""Tracing of the router: the only place where the OpenTelemetry SDK is set up.

Traces leave the machine only if `telemetry.otlp_endpoint` is set; trace ids are valid and travel on either
way. A span of a request waits for its final joules before it is exported, at most `ENERGY_WAIT_S`, though it
ends at the time the answer ended. Attributes hold counts, names and joules, no text of answers, and text of
prompts only where `telemetry.record_prompts` is on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased, Sampler, TraceIdRatioBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from cluster.config import TelemetrySection
from cluster.energy.account import EnergyAccount
from cluster.energy.idle_share import IdleShare
from cluster.telemetry import semconv
from cluster.telemetry.inference_span import InferenceSpan
from cluster.telemetry.rpc_span import RpcSpan

logger = logging.getLogger(__name__)

ENERGY_WAIT_S = 2.0
EXPORT_TIMEOUT_S = 2.0
SHUTDOWN_S = 3.0
EXPORT_DELAY_MS = 1000
TRACE_HEADERS = ("traceparent", "tracestate")


class Telemetry:
    """Owns one tracer provider, and the spans that still wait for their joules."""

    def __init__(self, section: TelemetrySection, *, router_id: str, version: str, pue: float = 1.0) -> None:
        resource = Resource.create(
            {
                "service.name": section.service_name,
                "service.instance.id": router_id,
                "service.version": version,
            }
        )
        # Without an exporter nobody reads a span: recording none still gives every request its trace id.
        sampler: Sampler = (
            ParentBased(TraceIdRatioBased(section.sample_ratio)) if section.otlp_endpoint else ALWAYS_OFF
        )
        self._provider = TracerProvider(sampler=sampler, resource=resource, shutdown_on_exit=False)
        if section.otlp_endpoint:
            exporter = OTLPSpanExporter(
                endpoint=section.otlp_endpoint, insecure=section.otlp_insecure, timeout=EXPORT_TIMEOUT_S
            )
            self._provider.add_span_processor(
                BatchSpanProcessor(exporter, schedule_delay_millis=EXPORT_DELAY_MS)
            )
        self._tracer = self._provider.get_tracer("wattline", version)
        self._propagator = TraceContextTextMapPropagator()
        self._records_prompts = section.record_prompts
        self._pue = pue
        self._waiting: dict[InferenceSpan, tuple[EnergyAccount, IdleShare]] = {}

    def start_rpc(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> RpcSpan:
        """The server span of one gRPC call, a child of the caller's span if it sent a W3C trace context."""
        attributes = {semconv.RPC_SYSTEM_NAME: "grpc", semconv.RPC_METHOD: method}
        return self._start(method, attributes, metadata)

    def start_http(self, method: str, route: str, headers: Iterable[tuple[str, str | bytes]]) -> RpcSpan:
        """The same for an HTTP request, named as the conventions for HTTP do."""
        attributes = {semconv.HTTP_METHOD: method, semconv.HTTP_ROUTE: route}
        return self._start(f"{method} {route}", attributes, headers)

    def _start(
        self, name: str, attributes: Mapping[str, str], metadata: Iterable[tuple[str, str | bytes]]
    ) -> RpcSpan:
        carrier = {key: str(value) for key, value in metadata if key in TRACE_HEADERS}
        parent = self._propagator.extract(carrier, context=Context())
        return RpcSpan(
            self._tracer,
            name=name,
            attributes=attributes,
            parent=parent,
            records_prompts=self._records_prompts,
        )

    def hold_for_energy(self, span: InferenceSpan, account: EnergyAccount, idle_share: IdleShare) -> None:
        """Export a finished inference span with its final joules, or with what is known in two seconds."""
        if not span.is_recording:
            return
        self._waiting[span] = (account, idle_share)
        timer = asyncio.get_running_loop().call_later(ENERGY_WAIT_S, self._release, span)

        def settled() -> None:
            timer.cancel()
            self._release(span)

        account.when_settled(settled)

    async def close(self) -> None:
        """Export what is left, in bounded time: a dead collector must not hold up a stop."""
        for span in list(self._waiting):
            self._release(span)
        try:
            async with asyncio.timeout(SHUTDOWN_S):
                await asyncio.to_thread(self._provider.shutdown)
        except TimeoutError:
            logger.warning("telemetry_shutdown_timeout seconds=%s", SHUTDOWN_S)

    def _release(self, span: InferenceSpan) -> None:
        waiting = self._waiting.pop(span, None)
        if waiting is None:
            return
        energy, idle_share = waiting[0].energy, waiting[1]
        idle_share_mj = idle_share.of_mj(energy.source, energy.total_mj) if energy else None
        span.export(energy, idle_share_mj=idle_share_mj, pue=self._pue)
