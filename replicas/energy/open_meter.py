"""Opens the meter that a watch names. Used by the energy agent alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from replicas.energy.cpu_model import CpuModelMeter
from replicas.energy.meter import Meter
from replicas.energy.nvml import NvmlMeter
from replicas.energy.rapl import RaplMeter
from replicas.energy.replay import FakeMeter
from replicas.energy.watch_key import WatchKey
from replicas.energy.zeus_meter import ZeusMeter
from replicas.errors import MeterUnavailable

_FAKE_POWER_W = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MeterSettings:
    """`poll_ns`: between reads of a counter whose edges are not known yet; the rest is the estimate's."""

    poll_ns: int
    cpu_static_w: float
    cpu_core_w: float
    clock: Callable[[], int] = time.monotonic_ns
    """Of the edges' times."""


def open_meter(key: WatchKey, settings: MeterSettings) -> Meter:
    """May block. MeterUnavailable where it cannot be read.

    `auto` never answers for GPUs with an estimate of the CPUs: that would be off by any factor.
    """
    clock = settings.clock
    if key.meter == "fake":
        return FakeMeter(((0, _FAKE_POWER_W),), clock=clock)
    if key.meter == "nvml" or (key.meter == "auto" and key.gpu_uuids):
        return NvmlMeter(key.gpu_uuids, poll_ns=settings.poll_ns, clock=clock)
    if key.meter == "rapl":
        return RaplMeter(clock=clock)
    if key.meter == "zeus":
        return ZeusMeter(clock=clock)
    if key.pids:
        return CpuModelMeter(
            key.pids, static_w=settings.cpu_static_w, core_w=settings.cpu_core_w, clock=clock
        )
    raise MeterUnavailable(
        f"meter {key.meter!r} has nothing to read: name gpu_uuids, or pids for an estimate"
    )
