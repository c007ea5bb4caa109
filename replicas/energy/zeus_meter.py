"""AMD GPUs and Jetson boards as one meter, through Zeus. Used by the energy agent alone."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable

from replicas.energy.meter import MeterHealth, MeterState, Reading, Source
from replicas.energy.zeus_devices import ZeusDevices, open_devices
from replicas.errors import MeterUnavailable

_PLAUSIBLE_W = 2_000
"""Of one device: no GPU or board draws as much."""
_SLACK_NS = 1_000_000_000
_RETRY_NS = 1_000_000_000
_RESET_SHOWN_NS = 60_000_000_000


class ZeusMeter:
    """Sum of all devices that Zeus shows on this host, whoever uses them: hence its source `shared`.

    A counter that falls or runs away begins anew, with a gap. A device that cannot be read makes the whole
    unknown until it can, and then there is a gap. `devices` None: those Zeus finds.
    """

    edges = None

    def __init__(
        self, devices: ZeusDevices | None = None, *, clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        devices = devices or open_devices(clock())
        self.scope = devices.scope
        self._counts = devices.counts
        self._errors: tuple[type[Exception], ...] = (
            *devices.errors,
            OSError,
            queue.Empty,
            MeterUnavailable,
        )
        self._clock = clock
        self._read_ns = clock()
        self._last_mj = [count(self._read_ns) for count in self._counts]
        self._energy_mj = 0
        self._is_lost = False
        self._retry_ns = self._reset_until_ns = 0

    def read(self) -> Reading | None:
        now_ns = self._clock()
        if self._is_lost and now_ns < self._retry_ns:
            return None
        try:
            counts_mj = [count(now_ns) for count in self._counts]
        except self._errors:
            self._is_lost, self._retry_ns = True, now_ns + _RETRY_NS
            return None
        deltas_mj = [new - last for new, last in zip(counts_mj, self._last_mj, strict=True)]
        most_mj = _PLAUSIBLE_W * (now_ns - self._read_ns + _SLACK_NS) // 1_000_000
        has_reset = not all(0 <= delta_mj <= most_mj for delta_mj in deltas_mj)
        has_gap = has_reset or self._is_lost
        if has_reset:
            self._reset_until_ns = now_ns + _RESET_SHOWN_NS
        self._energy_mj += 0 if has_gap else sum(deltas_mj)
        self._last_mj, self._read_ns, self._is_lost = counts_mj, now_ns, False
        return Reading(t_ns=now_ns, energy_mj=self._energy_mj, source=Source.SHARED, gap=has_gap)

    def health(self) -> MeterHealth:
        if self._is_lost:
            return MeterHealth(state=MeterState.LOST)
        return MeterHealth(state=MeterState.RESET if self._read_ns < self._reset_until_ns else MeterState.OK)

    def close(self) -> None:
        """Zeus ends what it started with the process."""
