"""What a meter is: a counter of millijoules with a time, a source and a confidence.

Implementations: `nvml.py` (GPU counter), `cpu_model.py` (estimate for machines without a meter), `replay.py`
(recorded and scripted ones). Unknown is None, never 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from replicas.energy.edge_lock import EdgeLock
from replicas.record import record


class Source(StrEnum):
    """Where a joule comes from, best first. The text is the label on the wire and in metrics."""

    COUNTER = "counter"
    POWER_INTEGRATED = "power_integrated"
    SHARED = "shared"
    MODEL_CALIBRATED = "model_calibrated"
    MODEL_TABLE = "model_table"
    TDP = "tdp"
    FAKE = "fake"


MEASURED = frozenset({Source.COUNTER, Source.POWER_INTEGRATED, Source.SHARED})
"""Sources that a meter stands behind."""
ESTIMATED = frozenset({Source.MODEL_CALIBRATED, Source.MODEL_TABLE, Source.TDP})
"""Sources that a model of the hardware stands behind; what is in neither is made up."""

CONFIDENCE_FACTORS = {
    Source.COUNTER: 1.05,
    Source.POWER_INTEGRATED: 1.10,
    Source.SHARED: 1.25,
    Source.MODEL_CALIBRATED: 1.15,
    Source.MODEL_TABLE: 1.5,
    Source.TDP: 2.0,
    Source.FAKE: 1.0,
}
"""The truth lies within value / factor .. value * factor."""


@record
class Reading:
    """A meter's counter at one instant.

    `t_ns` is on the host's monotonic clock, `energy_mj` counts from an arbitrary start and never falls.
    `static_mj` is the part drawn whatever the work, where the meter can tell. `gap`: the energy between the
    reading before and this one is not known to be complete (meter lost, reset, or re-opened). `host_mj`
    counts this meter's part of what the host drew beside its devices, and may begin anew; None: not known.
    """

    t_ns: int
    energy_mj: int
    source: Source
    static_mj: int | None = None
    gap: bool = False
    host_mj: int | None = None

    @property
    def confidence_factor(self) -> float:
        return CONFIDENCE_FACTORS[self.source]


class MeterState(StrEnum):
    """`stale`: its counter stands still. `reset`: it began anew in the last minute. `lost`: unreadable."""

    OK = "ok"
    STALE = "stale"
    RESET = "reset"
    LOST = "lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class MeterHealth:
    """`check_ratio`: its counter by its own integrated power; 1 is right, None where there is no power."""

    state: MeterState = MeterState.OK
    check_ratio: float | None = None


HEALTHY = MeterHealth()


class MeterScope(StrEnum):
    """What a meter's joules hold. `module`: GPUs with the CPUs and memory they share a module with."""

    DEVICE = "device"
    MODULE = "module"
    HOST = "host"


def hold_the_same(one: MeterScope, other: MeterScope) -> bool:
    """Whether joules of both, on one host, would be counted twice: a module's CPUs are the host's, too."""
    return {one, other} == {MeterScope.MODULE, MeterScope.HOST}


class Meter(Protocol):
    """Something that counts the energy of a fixed set of devices or processes."""

    @property
    def scope(self) -> MeterScope: ...

    @property
    def edges(self) -> EdgeLock | None:
        """When to read it, where its counter moves by itself; None: any time is as good."""

    def read(self) -> Reading | None:
        """The counter now; None while it is not known. One that blocks is set aside (`poll_thread.py`)."""

    def health(self) -> MeterHealth:
        """As of the last read."""

    def close(self) -> None:
        """Release the meter's library handles."""
