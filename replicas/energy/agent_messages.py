"""What the energy agent says and hears, between our words and the wire's. Pure, but for the survey."""

from __future__ import annotations

from protos import wattline_energy_pb2 as wire
from replicas.energy.meter import Reading
from replicas.energy.survey import survey_meters
from replicas.energy.watch_key import WatchKey, watch_key

_MAX_GROUP_CHARS = 256


def key_of(request: wire.WatchEnergyRequest) -> WatchKey:
    """ValueError says what is wrong with the watch."""
    if len(request.group) > _MAX_GROUP_CHARS:
        raise ValueError(
            f"group has {len(request.group)} characters, {_MAX_GROUP_CHARS} is the limit; shorten it"
        )
    return watch_key(request.meter, request.gpu_uuids, request.pids)


def reading_message(reading: Reading) -> wire.EnergyReading:
    return wire.EnergyReading(
        t_ns=reading.t_ns,
        energy_mj=reading.energy_mj,
        static_mj=reading.static_mj,
        host_mj=reading.host_mj,
        source=reading.source.value,
        confidence_factor=reading.confidence_factor,
        gap=reading.gap,
    )


def meter_descriptions() -> list[wire.MeterDescription]:
    """Every meter of the host. May block in a driver."""
    return [
        wire.MeterDescription(
            name=one.name,
            source=one.source.value,
            device=one.device,
            available=one.is_available,
            detail=one.detail,
            confidence_factor=one.confidence_factor,
        )
        for one in survey_meters()
    ]
