"""`telemetry`, `energy` and `ray`: what surrounds the models and the router on their hosts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cluster.config.section import Section


class TelemetrySection(Section):
    otlp_endpoint: str = Field("", description="gRPC OTLP endpoint; empty: no trace leaves the machine")
    otlp_insecure: bool = True
    service_name: str = "wattline"
    sample_ratio: float = Field(1.0, ge=0.0, le=1.0)
    record_prompts: bool = Field(
        False, description="put the text of prompts on spans; otherwise none is in spans, logs or metrics"
    )


class EnergySection(Section):
    meter: Literal["auto", "nvml", "rapl", "cpu-model", "fake"] = "auto"
    poll_ms: float = Field(
        50.0, ge=5.0, le=1000.0, description="between two reads of a meter; 20 to 50 suit a GPU's counter"
    )
    cpu_static_w: float = Field(10.0, ge=0.0, description="cpu-model: drawn whatever the work")
    pue: float = Field(
        1.0, ge=1.0, le=10.0, description="power of the building by that of its machines; for reports"
    )
    carbon_g_per_kwh: float | None = Field(
        None, ge=0.0, le=5000.0, description="of the grid, in g CO2e; for reports; empty: unknown"
    )
    cpu_core_w: float = Field(8.0, ge=0.0, description="cpu-model: drawn by a busy core on top")


class RaySection(Section):
    address: str = Field("", description="empty: `up` owns a local Ray; `auto` or host:port joins one")
    auth_mode: Literal["auto", "disabled", "token"] = Field(
        "auto",
        description="auto: a token of its own for the Ray `up` owns; RAY_AUTH_MODE for a joined one",
    )
    object_store_mib: int = Field(128, ge=80)
