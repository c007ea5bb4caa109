"""`telemetry`, `energy` and `ray`: what surrounds the models and the router on their hosts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cluster.config.section import Section
from cluster.config.security import TlsSection, is_loopback


class TelemetrySection(Section):
    otlp_endpoint: str = Field("", description="gRPC OTLP endpoint; empty: no trace leaves the machine")
    otlp_insecure: bool = True
    service_name: str = "wattline"
    sample_ratio: float = Field(1.0, ge=0.0, le=1.0)
    record_prompts: bool = Field(
        False, description="put the text of prompts on spans; otherwise none is in spans, logs or metrics"
    )
    metrics_host: str = Field(
        "127.0.0.1",
        description="where /metrics of replicas and energy agents listen; 0.0.0.0: on their node's address",
    )
    agent_metrics_port: int = Field(
        0, ge=0, le=65535, description="of the energy agent of each node; 0: a free one"
    )
    metrics_tls: TlsSection = TlsSection()
    allow_insecure_metrics: bool = Field(
        False, description="show them on a public address without TLS and scrapers' certificates"
    )

    @model_validator(mode="after")
    def _metrics_are_not_open_to_all(self) -> TelemetrySection:
        is_closed = self.metrics_tls.client_ca or is_loopback(self.metrics_host)
        if not is_closed and not self.allow_insecure_metrics:
            raise ValueError(
                f"metrics_host {self.metrics_host!r} is reachable from other machines, and anybody could "
                "read there: set metrics_tls.cert, .key and .client_ca, or allow_insecure_metrics"
            )
        return self


class EnergySection(Section):
    meter: Literal["auto", "nvml", "rapl", "zeus", "cpu-model", "fake"] = "auto"
    host_meter: Literal["auto", "off", "rapl"] = Field(
        "auto",
        description="CPUs and memory beside the GPUs, apart from their joules; auto: RAPL where readable",
    )
    poll_ms: float = Field(
        50.0,
        ge=5.0,
        le=1000.0,
        description="a counter is read each until its edges are known, others at most every second",
    )
    agent_port: int = Field(
        9106,
        ge=1,
        le=65535,
        description="of each node's energy agent; open only where a model spans several hosts",
    )
    cpu_static_w: float = Field(10.0, ge=0.0, description="cpu-model: drawn whatever the work")
    pue: float = Field(
        1.0, ge=1.0, le=10.0, description="power of the building by that of its machines; for reports"
    )
    carbon_g_per_kwh: float | None = Field(
        None, ge=0.0, le=5000.0, description="of the grid, in g CO2e; for reports; empty: unknown"
    )
    price_per_kwh: float | None = Field(
        None, ge=0.0, le=1e6, description="of electricity, in `currency`; for reports; empty: unknown"
    )
    currency: str = Field("", max_length=8, description="what `price_per_kwh` is in, as reports show it")
    cpu_core_w: float = Field(8.0, ge=0.0, description="cpu-model: drawn by a busy core on top")


class RaySection(Section):
    address: str = Field("", description="empty: `up` owns a local Ray; `auto` or host:port joins one")
    auth_mode: Literal["auto", "disabled", "token"] = Field(
        "auto",
        description="auto: a token of its own for the Ray `up` owns; RAY_AUTH_MODE for a joined one",
    )
    object_store_mib: int = Field(128, ge=80)
