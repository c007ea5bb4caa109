"""What a host can measure: every meter we know, how right it is, and why one cannot be used.

Probes without keeping anything open. Used by the agent (`DescribeMeters`) and by `wattline meters`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from replicas.energy.meter import CONFIDENCE_FACTORS, MeterScope, Source
from replicas.energy.nvml import GpuDescription, discover_gpus
from replicas.energy.rapl import POWERCAP_DIR, discover_zones
from replicas.energy.zeus_devices import discover_devices
from replicas.errors import MeterUnavailable


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundMeter:
    """`name` is what `energy.meter` takes. `detail` is the device's name, or why it cannot be read.

    The truth lies within value / confidence_factor .. value * confidence_factor.
    """

    name: str
    source: Source
    device: str
    is_available: bool
    detail: str

    @property
    def confidence_factor(self) -> float:
        return CONFIDENCE_FACTORS[self.source]


def survey_meters(powercap_dir: Path = POWERCAP_DIR) -> list[FoundMeter]:
    """Best first. Never raises: what is wrong is said in the list."""
    estimate = FoundMeter(
        name="cpu-model",
        source=Source.TDP,
        device="processes",
        is_available=True,
        detail="estimate: watts while warm plus watts per busy core",
    )
    return [*_gpus(), *_cpus(powercap_dir), *_zeus(), estimate]


def _gpus() -> list[FoundMeter]:
    try:
        gpus = discover_gpus()
    except MeterUnavailable as error:
        return [_missing("nvml", Source.COUNTER, str(error))]
    return [
        FoundMeter(
            name="nvml",
            source=Source.COUNTER if gpu.has_counter or gpu.unreadable else Source.POWER_INTEGRATED,
            device=gpu.uuid,
            is_available=not gpu.unreadable,
            detail=gpu.unreadable or _described(gpu),
        )
        for gpu in gpus
    ]


def _described(gpu: GpuDescription) -> str:
    notes = [] if gpu.has_counter else ["no energy counter"]
    notes += ["with the CPU and memory of its module"] if gpu.scope is MeterScope.MODULE else []
    return f"{gpu.name}: {', '.join(notes)}" if notes else gpu.name


def _cpus(powercap_dir: Path) -> list[FoundMeter]:
    try:
        zones = discover_zones(powercap_dir)
    except MeterUnavailable as error:
        return [_missing("rapl", Source.SHARED, str(error))]
    return [
        FoundMeter(
            name="rapl",
            source=Source.SHARED,
            device=zone.name,
            is_available=not zone.unreadable,
            detail=zone.unreadable
            or "the whole host's, whoever uses it; for one replica per host, or beside GPUs",
        )
        for zone in zones
    ]


def _zeus() -> list[FoundMeter]:
    try:
        devices = discover_devices()
    except MeterUnavailable as error:
        return [_missing("zeus", Source.SHARED, str(error).removeprefix("meter zeus: "))]
    return [
        FoundMeter(
            name="zeus",
            source=Source.SHARED,
            device=one.device,
            is_available=one.is_readable,
            detail=f"{one.detail}; all of them are one meter, for one replica per host"
            if one.is_readable
            else one.detail,
        )
        for one in devices
    ]


def _missing(name: str, source: Source, detail: str) -> FoundMeter:
    return FoundMeter(name=name, source=source, device="", is_available=False, detail=detail)
